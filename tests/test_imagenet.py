"""ImageNet: the augmentation, sampling and optimizer of upstream's timm pipeline, its sources, streams, teachers and labels."""

import collections
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import types

import datasets
import numpy as np
import pytest
import timm.data
import torch
from conftest import ROOT, STUDENT, make_recipe, write
from PIL import Image
from timm.data import ImageNetInfo, Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

import data
import evaluate
import losses
import models
import train

WNIDS = ImageNetInfo().label_names()
A2 = dict(
    data__size=64,
    data__crop={"kind": "resized", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "random"},
    data__hflip=0.5,
    data__rand_augment="rand-m7-mstd0.5",
)


def jpeg(colour, size=(80, 60), mode="RGB"):
    """A photograph's stand-in: a gradient, so that a crop shows where it was taken, with blue telling images apart."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([across, down, np.full_like(across, colour)], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def seeded(seed, function, *arguments):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return function(*arguments)


# ---------------------------------------------------------------- augmentation


def upstreams_transform(size=64):
    """As vanillaKD's train-kd.py has timm build it for A1/A2: --aa rand-m7-mstd0.5 --color-jitter 0, prefetcher (uint8)."""
    return create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=0,
        auto_augment="rand-m7-mstd0.5",
        interpolation="random",
    )


def test_a_crop_is_timms_to_the_pixel(tmp_path):
    """What the loader serves equals what timm's own data set serves, given the same generators."""
    for i in range(4):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"{i}.jpg").write_bytes(jpeg(60 * i, mode="L" if i == 3 else "RGB"))
        (tmp_path / "train" / "b").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "b" / f"{i}.jpg").write_bytes(jpeg(60 * i + 20))
    section = make_recipe(data__source=str(tmp_path), data__classes=2, **A2).data
    loader = data.TrainLoader(section, seed=5, batch_size=8, batch_size_per_process=8)
    theirs = timm.data.ImageDataset(str(tmp_path / "train"), transform=upstreams_transform())
    for images, labels, index in loader.batches(0, 3):
        for image, label, i in zip(images, labels, index.tolist(), strict=True):
            epoch = 0 if images is None else loader_epoch.setdefault(i, -1) + 1
            loader_epoch[i] = epoch
            data.seed_all(data.seed_of(5, epoch, i, 0))
            expected, own_label = theirs[i]
            assert label == own_label and torch.equal(image, torch.as_tensor(expected))


loader_epoch = {}


def corners(transform, n, seed):
    """Left edge, top edge, width and height of n crops, read from the gradient in the red and green channels."""
    image, found = Image.open(io.BytesIO(jpeg(0, size=(256, 192)))), []
    for i in range(n):
        crop = np.asarray(seeded(seed + i, transform, image), dtype=float)
        left, right = sorted((crop[0, :, 0].mean(), crop[0, :, -1].mean()))  # a flip exchanges them
        found.append((left, crop[1, 0].mean(), right - left, crop[1, -1].mean() - crop[1, 0].mean()))
    return np.array(found)


def test_crops_are_distributed_as_timms():
    section = make_recipe(**A2 | {"data__rand_augment": None}).data
    ours = corners(data.train_transform(section), 500, 0)
    timms = create_transform(64, is_training=True, use_prefetcher=True, color_jitter=0, interpolation="random")
    theirs = corners(timms, 500, 10_000)
    for a, b in zip(ours.T, theirs.T, strict=True):  # Kolmogorov-Smirnov, p = 0.001 at 1.95 * sqrt(2 / n)
        grid = np.sort(np.concatenate([a, b]))
        distance = np.abs(np.searchsorted(np.sort(a), grid) / 500 - np.searchsorted(np.sort(b), grid) / 500).max()
        assert distance < 1.95 * np.sqrt(2 / 500)
    share = (ours[:, 2] * ours[:, 3]) / 255**2
    assert 0.06 < share.min() < 0.12 and share.max() > 0.9  # scale 0.08 to 1


@pytest.mark.parametrize("labels", [torch.arange(16) % 10, torch.randint(0, 10, (16,))])
def test_mixing_and_then_smoothing_is_timms_smoothed_mixing(labels):
    """A1: mixup 0.2, cutmix 1.0, smoothing 0.1. Ours smooths for each student; the loss of timm's mixed target is the same."""
    mix = data.mixer(make_recipe(data__mixup=0.2, data__cutmix=1.0, data__drop_last=True).data)
    timms = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    images, logits = torch.rand(16, 3, 8, 8), torch.randn(16, 10)
    for seed in range(20):
        ours, target = seeded(seed, mix, images.clone(), labels)
        theirs, smoothed = seeded(seed, timms, images.clone(), labels)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(target.sum(dim=1), torch.ones(16))
        torch.testing.assert_close(
            losses.binary_cross_entropy(logits, target, smoothing=0.1), BinaryCrossEntropy()(logits, smoothed)
        )
        torch.testing.assert_close(
            losses.cross_entropy(logits, target, smoothing=0.1), SoftTargetCrossEntropy()(logits, smoothed)
        )


def test_random_erasing_covers_with_noise_of_the_datas_own_spread():
    erase = data.mixer(make_recipe(data__random_erasing=1.0).data)
    images, labels = torch.full((64, 3, 32, 32), 0.25), torch.arange(64)
    erased, same = seeded(0, erase, images.clone(), labels)
    changed = (erased - 0.25).abs() > 1e-6
    assert same is labels and 0.02 < changed.float().mean() < 0.34  # timm: 2 % to a third of the area
    noise = erased[:, 0][changed[:, 0]]
    assert abs(noise.mean() - 0.485) < 0.01 and abs(noise.std() - 0.229) < 0.01  # unit variance for a normalised image
    quiet = data.mixer(make_recipe(data__random_erasing=0.25).data)
    share = (seeded(1, quiet, images.clone(), labels)[0] - 0.25).abs().amax((1, 2, 3)) > 1e-6
    assert 4 < share.sum() < 30


# ---------------------------------------------------------------- repeated augmentation


class InOrder:
    """Stands for numpy's generator: both samplers get the same permutation."""

    def permutation(self, n):
        return np.arange(n)[::-1]


def test_repeats_are_dealt_out_as_timms_sampler_does(monkeypatch):
    section = make_recipe(data__repeats=3, data__drop_last=True).data
    monkeypatch.setattr(np.random, "default_rng", lambda key: InOrder())
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n).flip(0))
    for rank in range(8):
        own = data.TrainLoader(section, seed=0, batch_size=64, batch_size_per_process=8, rank=rank, world=8)
        sampler = RepeatAugSampler(range(898), num_replicas=8, rank=rank, num_repeats=3, selected_round=64)
        theirs = list(sampler)
        assert own.steps_per_epoch == 14 and len(theirs) == 14 * 8  # an epoch is as long as without repeats
        ours = [row for batch in data._Order(own, 0, 14) for _, _, row in batch]
        assert ours == theirs
    alone = data.TrainLoader(section, seed=0, batch_size=64, batch_size_per_process=8)
    parts = list(data._Order(alone, 0, 1))  # one process accumulates what eight would see
    eight = [
        next(
            iter(data._Order(data.TrainLoader(section, seed=0, batch_size=64, batch_size_per_process=8, rank=r, world=8), 0, 1))
        )
        for r in range(8)
    ]
    assert parts == eight and all(len({row for _, _, row in part}) == 8 for part in parts)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_is_decoded_once_for_its_crops(streaming, monkeypatch):
    stream = dict(data__streaming=True, data__train_size=898, data__shuffle_buffer=50) if streaming else {}
    section = make_recipe(data__repeats=3, data__drop_last=True, **stream).data
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda row: decoded.append(row["bytes"]) or decode(row))
    loader = data.TrainLoader(section, seed=0, batch_size=66, batch_size_per_process=66)
    crops = collections.defaultdict(list)
    for images, _, index in loader.batches(0, loader.steps_per_epoch):
        for image, i in zip(images, index.tolist(), strict=True):
            crops[i].append(image)
    assert loader.steps_per_epoch == 13 and len(decoded) == 13 * 66 // 3 == len(set(decoded))
    assert collections.Counter(map(len, crops.values())) == {3: 286}
    assert sum(len({crop.numpy().tobytes() for crop in own}) > 1 for own in crops.values()) > 250  # other crops


# ---------------------------------------------------------------- sources and streams


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Parquet shards of 5, 17, 1, 9 and 30 images, in row groups of 4, with the hub's schema."""
    folder, n = tmp_path_factory.mktemp("uneven"), 0
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(62)])})
    for shard, length in enumerate((5, 17, 1, 9, 30)):
        images = [{"bytes": jpeg(4 * i, size=(12, 10)), "path": f"{i}.JPEG"} for i in range(n, n + length)]
        table = datasets.Dataset.from_dict({"image": images, "label": list(range(n, n + length))}, features=features)
        table.to_parquet(folder / f"train-{shard:05d}-of-00005.parquet", batch_size=4)
        n += length
    return folder


def stream(source, batch_size=4, per_process=None, seed=0, rank=0, world=1, workers=0, **changes):
    settings = dict(data__source=str(source), data__streaming=True, data__drop_last=True, data__shuffle_buffer=7)
    settings |= dict(data__classes=62, data__train_size=62, data__size=8, data__crop=A2["data__crop"])
    section = make_recipe(batch_size=batch_size, batch_size_per_process=per_process or batch_size, **settings | changes).data
    place = dict(rank=rank, world=world, workers=workers)
    return data.TrainLoader(
        section, seed=seed, batch_size=batch_size, batch_size_per_process=per_process or batch_size, **place
    )


def served(loader, start=0, stop=None):
    """Labels (every image of `uneven` has its own), batch by batch."""
    return [labels.tolist() for _, labels, _ in loader.batches(start, stop or loader.steps_per_epoch)]


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 3), (2, 2), (3, 1), (4, 2), (7, 0)])
def test_uneven_shards_are_shared_without_loss_or_duplicates(uneven, world, workers):
    """Also with more readers than shards: each image at most once an epoch, the same number of steps for each process."""
    size = 2 * world
    ranks = [stream(uneven, size, 2, rank=r, world=world, workers=workers) for r in range(world)]
    assert {r.steps_per_epoch for r in ranks} == {62 // size}
    for epoch in range(2):
        steps = 62 // size
        own = [served(r, epoch * steps, (epoch + 1) * steps) for r in ranks]
        assert {len(batches) for batches in own} == {steps}
        seen = [label for batches in own for batch in batches for label in batch]
        assert len(seen) == len(set(seen)) == steps * size
    assert own[0] != served(ranks[0], 0, steps)  # another order in another epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_resumed_stream_serves_exactly_the_rest_of_its_epoch(uneven, workers, repeats):
    everything = served(stream(uneven, workers=workers, data__repeats=repeats), 0, 30)
    for start in (1, 6, 14, 15, 22):
        assert served(stream(uneven, workers=workers, data__repeats=repeats), start, 30) == everything[start:]
    for epoch in (everything[:15], everything[15:]):
        counts = collections.Counter(label for batch in epoch for label in batch)
        assert sum(counts.values()) == 60 and (set(counts.values()) == {1} if repeats == 1 else max(counts.values()) == 3)


def tar_shards(folder, split, shards):
    folder.mkdir(exist_ok=True)
    for number, names in enumerate(shards):
        with tarfile.open(folder / f"imagenet1k-{split}-{number:04d}.tar", "w") as tar:
            for name, label in names:
                for suffix, content in (("cls", str(label).encode()), ("jpg", jpeg(3 * label % 250, size=(12, 10)))):
                    entry = tarfile.TarInfo(f"{name}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def test_a_webdataset_mirror(tmp_path, monkeypatch):
    """timm/imagenet-1k-wds names its columns jpg and cls; ReaL's numbers come from the members' names."""
    folder = tar_shards(tmp_path / "wds", "train", [[(f"n{i:04d}", i) for i in range(10 * k, 10 * k + 10)] for k in range(2)])
    tar_shards(folder, "validation", [[(f"ILSVRC2012_val_{i:08d}", 7 * i) for i in range(1, 6)]])
    columns = dict(data__image="jpg", data__label="cls", data__classes=1000, data__train_size=20)
    loader = stream(folder, workers=2, **columns)
    labels = [label for batch in served(loader) for label in batch]
    assert len(labels) == len(set(labels)) == 20
    monkeypatch.setattr(data, "_shard_lengths", lambda split: None)  # as on the hub, where a tar file does not tell
    labels = [label for batch in served(stream(folder, workers=2, **columns)) for label in batch]
    assert len(labels) == 20 and len(set(labels)) >= 18  # a worker's 3 batches begin its 10 images again
    with pytest.raises(data.DataError, match="2 shards cannot feed 4 readers"):
        stream(folder, 8, 4, world=2, workers=2, **columns)
    with pytest.raises(data.DataError, match=r"no column 'image' \(columns: cls, jpg"):
        stream(folder, data__classes=1000)
    section = types.SimpleNamespace(
        source=str(folder), size=8, crop_pct=1.0, interpolation="bicubic", **data.describe(str(folder))
    )
    section.classes = 1000
    (batch,) = data.test_loader(section, batch_size=8, numbered=True)
    assert batch[1].tolist() == [7, 14, 21, 28, 35] and batch[2].tolist() == [1, 2, 3, 4, 5]


def class_folders(root, split, images):
    """images: [(class folder, file name, pixel value)]"""
    for folder, name, value in images:
        (root / split / folder).mkdir(parents=True, exist_ok=True)
        (root / split / folder / name).write_bytes(jpeg(value, size=(16, 16)))
    return root


def test_wnid_folders_take_imagenets_places(tmp_path):
    """A part of the classes still gets the ids that a network of 1,000 classes answers with."""
    chosen = [WNIDS[i] for i in (999, 3, 500)]
    class_folders(tmp_path, "train", [(wnid, f"{wnid}_{i}.JPEG", 9) for wnid in chosen for i in range(2)])
    class_folders(tmp_path, "val", [(wnid, f"ILSVRC2012_val_{i:08d}.JPEG", 9) for i, wnid in enumerate(chosen, 1)])
    section = make_recipe(data__source=str(tmp_path), data__classes=1000, data__test_split="validation", **A2).data
    (batch,) = data.test_loader(section, batch_size=4, numbered=True)
    assert dict(zip(batch[2].tolist(), batch[1].tolist(), strict=True)) == {1: 999, 2: 3, 3: 500}
    loader = data.TrainLoader(section, seed=0, batch_size=6, batch_size_per_process=6)
    ((_, labels, _),) = loader.batches(0, 1)
    assert sorted(labels.tolist()) == [3, 3, 500, 500, 999, 999]


def test_class_ids():
    assert data.class_ids("s", WNIDS, 1000) == list(range(1000))
    assert data.class_ids("s", [str(i) for i in sorted(range(1000), key=str)], 1000) == sorted(range(1000), key=str)
    assert data.class_ids("s", ["ant", "bee"], 2) == [0, 1]
    assert data.class_ids("s", ["10", "9"], 2) == [0, 1]  # names that happen to be numbers, but not 0 to K - 1
    imagenet = ImageNetInfo()
    described = [imagenet.index_to_description(i) for i in range(1000)]
    assert data.class_ids("s", described, 1000) == list(range(1000))
    swapped = [described[1], described[0], *described[2:]]
    with pytest.raises(data.DataError, match=r"class 0 is 'goldfish.*', ImageNet's is 'tench': not the order of the WNIDs"):
        data.class_ids("s", swapped, 1000)
    with pytest.raises(data.DataError, match="class 'n00000000' is not one of ImageNet's 1,000"):
        data.class_ids("s", [WNIDS[0], "n00000000"], 1000)
    with pytest.raises(data.DataError, match=re.escape("s: 2 classes found, the recipe's data.classes is 3")):
        data.class_ids("s", ["0", "1"], 3)


# ---------------------------------------------------------------- optimizer


def lamb_by_hand(parameters, gradients, moments, step, lr, decay, eps=1e-6):
    """You et al. 2020 with timm's and upstream's choices: gradients clipped to a global norm of 1, L2 into the ratio."""
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().clamp(min=1.0)
    for name, p in parameters.items():
        g, (m, v) = gradients[name] / norm, moments[name]
        m.mul_(0.9).add_(0.1 * g), v.mul_(0.999).add_(0.001 * g * g)
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + eps)
        if p.ndim > 1:  # biases and norms: no decay, no trust ratio
            update = update + decay * p
            update = update * (p.norm() / update.norm() if p.norm() > 0 and update.norm() > 0 else 1.0)
        p.sub_(lr * update)


def test_lamb_is_the_papers():
    """The optimizer that make_student builds, against the formulas, five steps in float64."""
    student = dict(STUDENT, soft=None, optimizer="lamb", optimizer_args={}, lr=5e-3, weight_decay=0.03)
    settings = make_recipe(students=[student])
    module, optimizer = train.make_student(settings, settings.students[0])
    module.double()
    names = dict(module.named_parameters())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {n for n, p in names.items() if id(p) in decayed} == {n for n, p in names.items() if p.ndim > 1}
    own = {n: p.detach().clone() for n, p in names.items()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in own.items()}
    torch.manual_seed(0)
    for step in range(1, 6):
        gradients = {n: torch.randn_like(p) * 10 ** (step - 3) for n, p in own.items()}
        for n, p in names.items():
            p.grad = gradients[n].clone()
        optimizer.step()
        lamb_by_hand(own, gradients, moments, step, 5e-3, 0.03)
    for n, p in names.items():
        torch.testing.assert_close(p.detach(), own[n], rtol=1e-9, atol=1e-12)


def test_upstreams_optimizer_groups_are_ours():
    """ResNet-50 and ViT: as create_optimizer_v2 of timm groups the bare model."""
    for name in ("resnet18", "vit_tiny_patch16_224"):
        model = timm.create_model(name, num_classes=10)
        theirs = create_optimizer_v2(model, "lamb", lr=1e-3, weight_decay=0.1)
        bare = {id(p): n for n, p in model.named_parameters()}
        plain = {bare[id(p)] for g in theirs.param_groups if not g["weight_decay"] for p in g["params"]}
        student = dict(STUDENT, soft=None, model=name, model_args={}, optimizer="lamb", optimizer_args={}, weight_decay=0.1)
        settings = make_recipe(students=[student], data__size=224)
        module, optimizer = train.make_student(settings, settings.students[0])
        own = {id(p): n.removeprefix("net.model.") for n, p in module.named_parameters()}
        ours = {own[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
        assert ours == plain


# ---------------------------------------------------------------- the run


def test_the_plan_says_what_a_launch_will_cost(tmp_path, capsys):
    path = write(tmp_path / "r.json", epochs=3, batch_size=32, batch_size_per_process=16, data__repeats=3, data__drop_last=True)
    train.main([str(path), "--out", str(tmp_path / "run"), "--limit", "2", "--workers", "0"])
    plan = capsys.readouterr().out
    assert "3 epochs of 28 steps, of which this run makes 2 steps" in plan
    assert "data: 898 images of digits, memory-mapped; 64 crops of 8 pixels from 22 images read (3 of each)" in plan
    assert "batch: 32 = 1 processes x 16 x 2 accumulated" in plan
    assert "student alone: cifar_resnet8, 2,718 parameters, sgd lr 0.05, weight decay 0.0005, 1 cross_entropy" in plan
    assert re.search(
        r"memory a process, about: 0.00 GB of weights, gradients and optimizer, 0.00 GB of activations for 16", plan
    )


def test_the_estimate_of_activations_is_what_autograd_keeps():
    network = models.build("cifar_resnet8", classes=10, size=8)
    own = train.activation_bytes(network, 8, train.Accelerator())
    stem = 4 * 16 * 8 * 8  # bytes of one map of one image
    assert 10 * stem < own < 40 * stem
    assert not network.model.bn1.running_mean.any()  # the statistics did not move


def test_an_untrained_teacher_is_for_trials_only(tmp_path, capsys):
    teacher = {"model": "cifar_resnet8", "model_args": {"widths": [4, 4, 8, 8]}, "pretrained": False}
    path = write(tmp_path / "r.json", teacher=teacher, students=[STUDENT])
    with pytest.raises(SystemExit):
        train.main([str(path), "--out", str(tmp_path / "run"), "--workers", "0"])
    assert "expected one of recipe, checkpoint, pretrained (untrained, it is good for a trial" in capsys.readouterr().err
    train.main([str(path), "--out", str(tmp_path / "run"), "--workers", "0", "--limit", "1"])
    assert "warning: teacher cifar_resnet8 is at chance level" in capsys.readouterr().out


def test_ema_is_the_running_average(tmp_path, capsys):
    path = write(tmp_path / "r.json", students=[dict(STUDENT, soft=None, ema=0.8)], save_every=1, epochs=1)
    for steps in (1, 2, 3):
        train.main([str(path), "--out", str(tmp_path / "run"), "--limit", str(steps), "--workers", "0", "--resume"])
        state = train.safetensors.torch.load_file(train.checkpoints(tmp_path / "run")[-1] / "kd.safetensors")
        ema = train.safetensors.torch.load_file(train.checkpoints(tmp_path / "run")[-1] / "kd.ema.safetensors")
        weights = {k.removeprefix("net."): v.double() for k, v in state.items() if "num_batches" not in k}
        if steps == 1:
            settings = make_recipe(students=[dict(STUDENT, soft=None)])
            start = train.make_student(settings, settings.students[0])[0].net.state_dict()
            average = {k: start[k].double() for k in weights}
        average = {k: 0.8 * average[k] + 0.2 * v for k, v in weights.items()}
        for key, value in average.items():
            torch.testing.assert_close(ema[key].double(), value, rtol=1e-5, atol=1e-7)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    evaluate.main([str(tmp_path / "run"), "--json", "--workers", "0"])
    rows = {r["checkpoint"].split("/")[-1]: r for r in json.loads(capsys.readouterr().out.split("\n[", 1)[1].join(["[", ""]))}
    assert set(rows) == {"kd", "kd-ema"} and result["students"][0]["last"]["ema"]["n"] == 64 * 3


BN = """
import torch, types, train
from accelerate import Accelerator, debug_launcher
def main():
    lead = Accelerator(cpu=True)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 5))
    net[1].running_mean.fill_(lead.process_index), net[1].running_var.fill_(1.0 + 2 * lead.process_index)
    trainee = types.SimpleNamespace(settings=types.SimpleNamespace(name="a"), net=net, ema=None, last=None, best=None)
    images, labels = torch.zeros(3 + lead.process_index, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    loader = [(images, labels[: len(images)], labels[: len(images)])]
    train.write_row = lambda run, row: None
    run = types.SimpleNamespace(trainees=[trainee], lead=lead, limit=None, step=1, test_loader=loader)
    run.loader = types.SimpleNamespace(steps_per_epoch=1)
    train.log_accuracy(run)
    assert net[1].running_mean.eq(0.5).all() and net[1].running_var.eq(2.0).all(), net[1].running_mean
    assert trainee.last["n"] == 7
debug_launcher(main, num_processes=2)
print("averaged")
"""


def test_batchnorm_statistics_are_averaged_over_processes_before_evaluation():
    out = subprocess.run([sys.executable, "-c", BN], cwd=ROOT, capture_output=True, text=True)
    assert "averaged" in out.stdout, out.stderr[-2000:]
