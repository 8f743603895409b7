"""data.py: order, augmentation, streams, sources. Real parquet, real PNG and JPEG files."""

import collections
import io
import random
import zlib

import numpy as np
import pytest
import torch
from conftest import SHARED, make_recipe, needs_cifar, needs_imagenet
from PIL import Image
from torchvision import transforms

import data

STREAM = dict(data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=100)


def loader(workers=0, rank=0, world=1, seed=3, batch_size=64, per_process=None, **changes):
    section = make_recipe(**{"batch_size": batch_size, "batch_size_per_process": batch_size} | changes).data
    sizes = dict(batch_size=batch_size, batch_size_per_process=per_process or batch_size // world)
    return data.TrainLoader(section, seed=seed, **sizes, rank=rank, world=world, workers=workers)


def read(own, start, stop):
    """{(image id, position in the run): image} and the ids in order."""
    batches = list(own.batches(start, stop))
    return batches, [i for _, _, index in batches for i in index.tolist()]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("changes", [{}, STREAM], ids=["mapped", "stream"])
def test_an_epoch_holds_every_image_once(changes):
    own = loader(**changes)
    (first, ids), (_, second) = read(own, 0, own.steps_per_epoch), read(own, own.steps_per_epoch, 2 * own.steps_per_epoch)
    assert first[0][0].dtype == torch.uint8 and first[0][0].shape == (64, 3, 8, 8) and first[0][1].dtype == torch.int64
    if not changes:
        assert sorted(ids) == sorted(second) == list(range(898))
    else:  # ids are checksums; drop_last leaves out two images; nothing comes twice
        assert len(set(ids)) >= 890 and len(ids) == 896
    assert ids != second


def test_order_does_not_depend_on_history_and_depends_on_the_seed():
    own = loader()
    everything, ids = read(own, 0, 30)
    rest, _ = read(own, 17, 30)
    assert equal(everything[17:], rest)
    assert read(loader(seed=4), 0, 3)[1] != ids[:192]


@pytest.mark.parametrize("changes", [{}, {"data__rand_augment": "rand-m7-mstd0.5"}], ids=["crop", "rand_augment"])
def test_results_do_not_depend_on_the_number_of_workers(changes):
    alone, _ = read(loader(**changes), 0, 20)
    assert equal(alone, read(loader(workers=2, **changes), 0, 20)[0])
    assert equal(alone[7:], read(loader(workers=3, **changes), 7, 20)[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 7, 14, 15, 20])
def test_a_stream_resumes_at_any_step(workers, start):
    own = loader(workers=workers, **STREAM)
    everything, _ = read(own, 0, 28)
    rest, _ = read(loader(workers=workers, **STREAM), start, 28)
    assert equal(everything[start:], rest)


def test_processes_share_each_step_and_see_the_same_images():
    """The images of a step, and what they look like, are the same for 1 process, 2 processes and 2 accumulated batches."""
    for step in (0, 13, 14):  # the last step of the epoch, 13, is a short one: 898 = 14 * 64 + 2
        one, ids = read(loader(), step, step + 1)
        parts = [read(loader(rank=r, world=2), step, step + 1) for r in range(2)]
        assert sorted(ids) == sorted(parts[0][1] + parts[1][1])
        accumulated, order = read(loader(per_process=32), step, step + 1)
        assert order == ids[0::2] + ids[1::2]  # dealt out one by one
        assert torch.equal(torch.cat([b[0] for b in accumulated]), torch.cat([one[0][0][0::2], one[0][0][1::2]]))
        assert torch.equal(parts[1][0][0][0], one[0][0][1::2])
        assert len(parts[0][1]) == len(parts[1][1])


def test_streams_of_two_processes_and_workers_share_the_shards():
    ids = []
    for rank in range(2):
        for _, _, index in loader(rank=rank, world=2, workers=2, **STREAM).batches(0, 14):
            ids += index.tolist()
    assert len(ids) == 896
    everything = collections.Counter(
        zlib.crc32(row["image"]["bytes"]) for row in data.open_split(make_recipe().data, "train").rows
    )
    assert not collections.Counter(ids) - everything  # two of the digits are equal to the byte


def test_augmentation_depends_only_on_seed_epoch_and_id():
    own = loader()
    images, seen = data._Images(own), {}
    for noise in range(2):
        random.seed(noise), np.random.seed(noise), torch.manual_seed(noise)
        for key in ((0, 0, 5), (1, 0, 5), (0, 1, 5), (0, 0, 6)):
            image = images[[key]][0][0]
            assert torch.equal(seen.setdefault(key, image), image)
    assert not torch.equal(seen[0, 0, 5], seen[1, 0, 5])


def test_crop_and_flip_are_the_classic_ones():
    """All 9 x 9 shifts of the zero-padded image and their mirror images, nothing else, each about as often."""
    section = make_recipe(data__size=32, data__crop={"kind": "pad", "padding": 4}, data__hflip=0.5).data
    picture = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(picture, ((4, 4), (4, 4), (0, 0)))
    views = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y : y + 32, x : x + 32]
            for flip in (crop, crop[:, ::-1]):
                views[flip.transpose(2, 0, 1).tobytes()] = 0
    transform = data.train_transform(section)
    torch.manual_seed(0)
    for _ in range(162 * 20):
        views[np.asarray(transform(Image.fromarray(picture))).tobytes()] += 1  # KeyError: a view that is not one of the 162
    assert len(views) == 162 and min(views.values()) > 3 and max(views.values()) < 50


def test_test_images_are_untouched_at_their_own_size():
    section = make_recipe().data
    (images, labels, index), *_ = data.test_loader(section, batch_size=899)
    raw = data._digits()["test"]
    assert torch.equal(images[7], transforms.PILToTensor()(raw[7]["image"].convert("RGB")))
    assert labels.tolist() == raw["label"] and index.tolist() == list(range(899))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(world, workers, streaming):
    section = make_recipe(**(STREAM if streaming else {})).data
    labels = []
    for rank in range(world):
        for _, part, _ in data.test_loader(section, batch_size=100, rank=rank, world=world, workers=workers):
            labels += part.tolist()
    assert sorted(labels) == sorted(data._digits()["test"]["label"])


def test_mixing_keeps_probabilities_and_is_seeded():
    mix = data.mixer(make_recipe(data__mixup=0.2, data__cutmix=1.0, data__drop_last=True).data)
    kinds = set()
    for seed in range(20):
        results = []
        for _ in range(2):
            data.seed_all(data.seed_of(seed))
            results.append(mix(torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)))
        (images, target), again = results
        assert torch.equal(images, again[0]) and torch.equal(target, again[1])
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        original = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        weight = target[0, 0].item()  # of the image itself, the rest is of its mirror in the batch
        torch.testing.assert_close(target[0, 7].item(), 1 - weight, rtol=0, atol=1e-6)
        kept = (images == original).float().mean().item()
        if abs(kept - weight) < 1e-3:
            kinds.add("cutmix")
        else:
            torch.testing.assert_close(images, weight * original + (1 - weight) * original.flip(0), rtol=0, atol=1e-5)
            kinds.add("mixup")
    assert kinds == {"mixup", "cutmix"}
    assert data.mixer(make_recipe().data) is None


# ---------------------------------------------------------------- sources


def folder_of_images(root, splits=("train", "val"), classes=("ant", "bee", "cat"), size=(40, 30)):
    chance = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            for i in range(6):
                path = root / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = chance.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).convert("L" if i == 5 and label == 0 else "RGB").save(path)
    return root


OWN = dict(
    data__test_split="validation",
    data__classes=3,
    data__size=16,
    data__crop={"kind": "resized", "scale": [0.5, 1.0], "ratio": [0.75, 1.33], "interpolation": "random"},
    data__crop_pct=0.875,
)


def test_a_folder_of_images(tmp_path):
    folder_of_images(tmp_path / "photos")
    own = loader(batch_size=6, data__source=str(tmp_path / "photos"), **OWN)
    assert own.steps_per_epoch == 3
    for images, labels, _ in own.batches(0, 3):
        assert images.shape == (6, 3, 16, 16)
        assert images.float().mean((2, 3)).argmax(1)[labels > 0].tolist() == labels[labels > 0].tolist()  # class = colour
    section = make_recipe(data__source=str(tmp_path / "photos"), **OWN).data
    assert sum(len(labels) for _, labels, _ in data.test_loader(section, batch_size=4)) == 18
    found = {"test_split": "validation", "image": "image", "label": "label", "classes": 3, "streaming": False}
    assert data.describe(tmp_path / "photos") == found


def test_a_stream_of_class_folders_is_refused(tmp_path):
    folder_of_images(tmp_path / "photos")
    stream = dict(data__streaming=True, data__train_size=18, data__drop_last=True, data__shuffle_buffer=4)
    with pytest.raises(data.DataError, match=r"sorted by class.*--set data.streaming=false data.shuffle_buffer=0"):
        loader(batch_size=6, data__source=str(tmp_path / "photos"), **OWN, **stream)


def test_an_empty_class_in_one_split_does_not_shift_the_labels(tmp_path):
    folder_of_images(tmp_path / "photos", splits=("train",))
    folder_of_images(tmp_path / "photos", splits=("val",), classes=("ant", "cat"))
    section = make_recipe(data__source=str(tmp_path / "photos"), **OWN).data
    assert data.open_split(section, "validation").names == ["ant", "bee", "cat"]
    labels = [label for _, batch, _ in data.test_loader(section, batch_size=4) for label in batch.tolist()]
    assert sorted(set(labels)) == [0, 2]


def parquet(folder, bad_label=None, split="train"):
    import datasets

    rows = []
    for i in range(10):
        buffer = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 20 * i, dtype=np.uint8)).save(buffer, "PNG")
        rows.append({"picture": {"bytes": buffer.getvalue(), "path": None}, "kind": i % 2 if bad_label is None else bad_label})
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    folder.mkdir(exist_ok=True)
    for name in (split, "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


COLUMNS = dict(
    data__image="picture", data__label="kind", data__classes=2, data__size=16, data__crop={"kind": "pad", "padding": 2}
)


def test_local_parquet_with_plain_integer_labels(tmp_path):
    own = loader(batch_size=5, data__source=str(parquet(tmp_path / "p")), **COLUMNS)
    assert [len(labels) for _, labels, _ in own.batches(0, 2)] == [5, 5]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__source="digit"), "digit: not a folder, not a data set's name on the hub"),
        (dict(data__source="/no/where"), "/no/where: not a folder"),
        (dict(data__train_split="training"), r"digits: no split 'training', did you mean 'train'\? \(splits: train, test\)"),
        (dict(data__image="img"), r"digits: no column 'img'.*\(columns: image, label\)"),
        (dict(data__label="labels"), r"digits: no column 'labels', did you mean 'label'"),
        (dict(data__classes=100), "digits: 10 classes found, the recipe's data.classes is 100"),
        (dict(data__train_size=900), "898 images found, the recipe's data.train_size is 900"),
        (dict(data__drop_last=True, batch_size=900), "898 images do not fill one step of 900"),
        (dict(world=3), "batch_size 64 is not a multiple of 3 processes x batch_size_per_process 21"),
    ],
    ids=range(9),
)
def test_data_that_cannot_be_used_is_refused_before_any_work(changes, message):
    own = {k: changes[k] for k in ("world", "workers") if k in changes} | {"batch_size": changes.get("batch_size", 64)}
    rest = {k: v for k, v in changes.items() if k not in ("world", "workers", "batch_size")}
    with pytest.raises(data.DataError, match=message):
        list(loader(**own, **rest).batches(0, 1))


def test_labels_out_of_range_are_refused(tmp_path):
    own = loader(batch_size=5, data__source=str(parquet(tmp_path / "p", bad_label=-1)), **COLUMNS)
    with pytest.raises(data.DataError, match=r"image \d+ \(no file name\): label -1 is not in 0..1"):
        list(own.batches(0, 1))


def test_photographs_are_not_cropped_as_if_they_were_small(tmp_path):
    folder_of_images(tmp_path / "photos")
    own = loader(batch_size=6, data__source=str(tmp_path / "photos"), **OWN | {"data__crop": {"kind": "pad", "padding": 4}})
    with pytest.raises(data.DataError, match="40x30 pixels"):
        list(own.batches(0, 1))


# ---------------------------------------------------------------- real data

CIFAR = dict(
    data__source=str(SHARED / "cifar100"), data__image="img", data__label="fine_label", data__classes=100, data__size=32
)


@needs_cifar
@pytest.mark.parametrize("streaming", [False, True])
def test_cifar100_from_parquet(streaming):
    stream = (
        dict(data__streaming=True, data__train_size=50_000, data__drop_last=True, data__shuffle_buffer=500) if streaming else {}
    )
    own = loader(data__crop={"kind": "pad", "padding": 4}, **CIFAR, **stream)
    assert own.steps_per_epoch == (781 if streaming else 782)
    batches = list(own.batches(0, 8))
    assert len({i for _, _, index in batches for i in index.tolist()}) == 512
    assert len(set(torch.cat([labels for _, labels, _ in batches]).tolist())) > 80  # shuffled across classes
    mean = torch.cat([images for images, _, _ in batches]).float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.5071, 0.4867, 0.4408]) * 0.88, rtol=0.1, atol=0)  # the padding is black


@needs_imagenet
@pytest.mark.parametrize("streaming", [False, True])
def test_imagenet_sample_from_parquet(streaming):
    stream = (
        dict(data__streaming=True, data__train_size=200, data__drop_last=True, data__shuffle_buffer=20) if streaming else {}
    )
    resized = {"kind": "resized", "scale": [0.08, 1.0], "ratio": [0.75, 1.3333], "interpolation": "random"}
    source = dict(
        data__source=str(SHARED / "imagenet_sample"), data__classes=1000, data__size=64, data__test_split="validation"
    )
    own = loader(batch_size=8, data__crop=resized, data__rand_augment="rand-m7-mstd0.5", **source, **stream)
    assert [images.shape for images, _, _ in own.batches(0, 2)] == [(8, 3, 64, 64)] * 2
    section = make_recipe(**source, data__crop_pct=0.95, data__interpolation="bicubic").data
    assert sum(len(labels) for _, labels, _ in data.test_loader(section, batch_size=16)) == 50
