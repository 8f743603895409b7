"""data.py: which images when; what is skipped, what stops a run, what it says; worker processes. Real
files.
"""

import atexit
import collections
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, exit_code, forked, make_recipe, needs_cifar, needs_imagenet
from PIL import Image
from scipy import stats
from test_augment import GREY16, gradient, picture_file, rotated, with_palette
from test_sources import (
    BROKEN,
    COLUMNS,
    WHOLE,
    WNIDS,
    N,
    class_folders,
    encoded,
    write_folder,
    write_parquet,
    write_tar,
)  # fmt: skip
from timm.data.distributed_sampler import RepeatAugSampler
from torchvision import transforms

import augment
import data
import recipe
import resident
import sources
import workers

SIZE = 16
DIGITS_STREAM = dict(
    data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=100
)
STREAM = dict(data__streaming=True, data__train_size=N, data__shuffle_buffer=6)
RESIZED = COLUMNS["data__crop"]
RANDOM = {"kind": "resized", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "random"}
KINDS = pytest.mark.parametrize("kind", ["mapped", "stream"])
WORKERS = pytest.mark.parametrize("workers", [0, 2])


def loader(rank=0, world=1, workers=0, batch_size=64, per_process=None, device="cpu", **changes):
    sizes = dict(batch_size=batch_size, batch_size_per_process=per_process or batch_size // world)
    section = make_recipe(**{"batch_size": batch_size, "batch_size_per_process": batch_size} | changes).data
    return data.TrainLoader(section, **sizes, rank=rank, world=world, workers=workers, device=device)


def small(source, kind="mapped", batch_size=4, **changes):
    """A loader of the ants and bees."""
    columns = COLUMNS | (STREAM if kind == "stream" else {})
    return loader(batch_size=batch_size, data__source=str(source), **columns | changes)


def read(made, start, stop, seed=1):
    """The batches of steps start..stop-1, and their images' ids in order."""
    batches = list(made.batches(seed, start, stop))
    return batches, [i for _, _, index in batches for i in index.tolist()]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


def evaluation(source, workers=0, **changes):
    section = make_recipe(
        batch_size=4, batch_size_per_process=4, data__source=str(source), **COLUMNS | changes
    ).data
    return data.test_loader(section, batch_size=4, workers=workers)


@pytest.fixture(scope="session")
def small_sources(tmp_path_factory):
    """{"mapped": class folders, "stream": parquet files, "clean": the class folders with nothing broken}"""
    root = tmp_path_factory.mktemp("small")
    return {
        "mapped": write_folder(root / "mapped", WHOLE | BROKEN),
        "stream": write_parquet(root / "stream", WHOLE | BROKEN),
        "clean": write_folder(root / "clean", WHOLE),
    }


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("changes", [{}, DIGITS_STREAM], ids=["mapped", "stream"])
def test_an_epoch_holds_every_image_once(changes):
    made = loader(**changes)
    steps = made.steps_per_epoch
    (first, ids), (_, second) = read(made, 0, steps), read(made, steps, 2 * steps)
    assert first[0][0].dtype == torch.uint8 and first[0][0].shape == (64, 3, 8, 8)
    assert first[0][1].dtype == first[0][2].dtype == torch.int64 and len(first[0]) == 3
    if not changes:
        assert sorted(ids) == sorted(second) == list(range(898))
    else:  # ids are checksums; drop_last leaves out two images; nothing comes twice
        assert len(set(ids)) >= 890 and len(ids) == 896
    assert ids != second


@pytest.mark.parametrize(
    "changes", [{}, DIGITS_STREAM, {"data__resident": True}], ids=["mapped", "stream", "resident"]
)
def test_one_loader_serves_every_seed(changes):
    """From any step, one after the other and at the same time: nothing depends on what came before."""
    made = loader(**changes)
    everything, _ = read(made, 11, 17)  # over the end of an epoch
    assert equal(everything[4:], read(made, 15, 17)[0])
    alone = [everything] + [read(made, 11, 17, seed=seed)[0] for seed in (4, 5)]
    together = [made.batches(seed, 11, 17) for seed in (1, 4, 5)]
    for batches in zip(*together, *alone, strict=True):
        assert equal(batches[:3], batches[3:])
    assert len({tuple(read(made, 11, 12, seed=seed)[1]) for seed in (1, 4, 5)}) == 3


@pytest.mark.parametrize(
    "changes", [{}, {"data__rand_augment": "rand-m7-mstd0.5"}], ids=["crop", "rand_augment"]
)
def test_results_do_not_depend_on_the_number_of_workers(changes):
    alone, _ = read(loader(**changes), 8, 17)
    assert equal(alone, read(loader(workers=2, **changes), 8, 17)[0])
    assert equal(alone[3:], read(loader(workers=3, **changes), 11, 17)[0])


@WORKERS
def test_a_stream_resumes_at_any_step(workers):
    everything, _ = read(loader(workers=workers, **DIGITS_STREAM), 0, 28)
    for start in (1, 20):
        rest, _ = read(loader(workers=workers, **DIGITS_STREAM), start, 28)
        assert equal(everything[start:], rest)


def test_processes_share_each_step_and_see_the_same_images():
    """The images of a step, and what they look like, are the same for 1 process, 2 processes and 2
    accumulated batches.
    """
    one, halves, accumulating = loader(), [loader(rank=r, world=2) for r in range(2)], loader(per_process=32)
    for step in (0, 13, 14):  # the last step of the epoch, 13, is a short one: 898 = 14 * 64 + 2
        batches, ids = read(one, step, step + 1)
        parts = [read(half, step, step + 1) for half in halves]
        assert sorted(ids) == sorted(parts[0][1] + parts[1][1])
        accumulated, order = read(accumulating, step, step + 1)
        assert order == ids[0::2] + ids[1::2]  # dealt out one by one
        images = batches[0][0]
        assert torch.equal(torch.cat([b[0] for b in accumulated]), torch.cat([images[0::2], images[1::2]]))
        assert torch.equal(parts[1][0][0][0], images[1::2])
        assert len(parts[0][1]) == len(parts[1][1])


def test_streams_of_two_processes_and_workers_share_the_shards():
    ids = []
    for rank in range(2):
        for _, _, index in loader(rank=rank, world=2, workers=2, **DIGITS_STREAM).batches(1, 0, 14):
            ids += index.tolist()
    assert len(ids) == 896
    rows = sources.open_split(make_recipe().data, "train").rows
    everything = collections.Counter(zlib.crc32(row["image"]["bytes"]) for row in rows)
    assert not collections.Counter(ids) - everything  # two of the digits are equal to the byte


def test_augmentation_depends_only_on_seed_epoch_repeat_and_id():
    """By one seed of all four."""
    made, seen = loader(), {}
    batches, rows = data._MappedBatches(made, 3), made.split.rows
    for noise in range(2):
        augment.seed_all(noise)
        for epoch, repeat, i in ((0, 0, 5), (1, 0, 5), (0, 1, 5), (0, 0, 6)):
            image = batches[[(epoch, repeat, i)]][0][0]
            assert torch.equal(seen.setdefault((epoch, repeat, i), image), image)
            seeds = [augment.seed_of(3, epoch, i, repeat)]
            (view,) = augment.train_views(made.data)(rows[i]["image"]["bytes"], seeds)
            assert torch.equal(view, image)
    assert not torch.equal(seen[0, 0, 5], seen[1, 0, 5])


class InOrder:
    """Stands for numpy's generator: both samplers get the same permutation."""

    def permutation(self, n):
        return np.arange(n)[::-1]


def test_repeats_are_dealt_out_as_timms_sampler_does(monkeypatch):
    changes = dict(data__repeats=3, data__drop_last=True, per_process=8)
    eight = [loader(rank=rank, world=8, **changes) for rank in range(8)]
    alone = loader(**changes)
    monkeypatch.setattr(np.random, "default_rng", lambda key: InOrder())
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n).flip(0))
    for rank, made in enumerate(eight):
        theirs = list(
            RepeatAugSampler(range(898), num_replicas=8, rank=rank, num_repeats=3, selected_round=64)
        )
        assert made.steps_per_epoch == 14 and len(theirs) == 14 * 8  # an epoch is as long as without repeats
        assert [row for batch in data._order(made, 0, 0, 14) for _, _, row in batch] == theirs
    parts = list(data._order(alone, 0, 0, 1))  # one process accumulates what eight would see
    assert parts == [next(data._order(made, 0, 0, 1)) for made in eight]
    assert all(len({row for _, _, row in part}) == 8 for part in parts)


@KINDS
def test_an_image_is_decoded_once_for_its_crops(kind, monkeypatch):
    stream = DIGITS_STREAM if kind == "stream" else {}
    decoded, decode = [], augment.decode
    monkeypatch.setattr(augment, "decode", lambda content: decoded.append(content) or decode(content))
    made = loader(batch_size=66, data__repeats=3, **{"data__drop_last": True} | stream)
    crops = collections.defaultdict(list)
    for images, _, index in made.batches(0, 0, made.steps_per_epoch):
        for image, i in zip(images, index.tolist(), strict=True):
            crops[i].append(image)
    assert made.steps_per_epoch == 13 and len(decoded) == 13 * 66 // 3 == len(set(decoded))
    assert collections.Counter(map(len, crops.values())) == {3: 286}
    assert (
        sum(len({crop.numpy().tobytes() for crop in views}) > 1 for views in crops.values()) > 250
    )  # other crops


def test_rows_hold_the_labels_of_the_images(tmp_path):
    """Class = colour, from class folders, through crop and batch."""
    for i, name in enumerate("abc"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(6):
            pixels = np.random.default_rng(k).integers(0, 60, (30, 40, 3), dtype=np.uint8)
            pixels[..., i] += 150
            mode = "L" if k == 5 and i == 0 else "RGB"
            (tmp_path / "train" / name / f"{k}.jpg").write_bytes(
                encoded(Image.fromarray(pixels).convert(mode))
            )
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    made = small(tmp_path, batch_size=6, data__classes=3)
    assert made.steps_per_epoch == 3
    for images, labels, index in made.batches(0, 0, 3):
        assert images.shape == (6, 3, 16, 16) and torch.equal(made.labels()[index], labels)
        assert images.float().mean((2, 3)).argmax(1)[labels > 0].tolist() == labels[labels > 0].tolist()
    assert sum(len(labels) for _, labels, _ in evaluation(tmp_path, data__classes=3)) == 18


def test_wnid_folders_take_imagenets_places(tmp_path):
    """A part of the classes still gets the ids that a network of 1,000 classes answers with."""
    for i, place in enumerate((999, 3, 500), 1):
        for split, name in (
            ("train", f"{i}_0.JPEG"),
            ("train", f"{i}_1.JPEG"),
            ("val", f"ILSVRC2012_val_{i:08d}.JPEG"),
        ):
            path = tmp_path / split / WNIDS[place] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(WHOLE[0])
    made = small(tmp_path, batch_size=6, data__classes=1000)
    ((_, labels, _),) = made.batches(0, 0, 1)
    assert sorted(labels.tolist()) == [3, 3, 500, 500, 999, 999] == sorted(made.labels().tolist())
    (batch,) = data.test_loader(made.data, batch_size=4, numbered=True)
    assert dict(zip(batch[2].tolist(), batch[1].tolist(), strict=True)) == {1: 999, 2: 3, 3: 500}


# ---------------------------------------------------------------- sizes and refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__train_size=900), "898 images found, the recipe's data.train_size is 900"),
        (dict(data__drop_last=True, batch_size=900), "898 images do not fill one step of 900"),
        (dict(world=3), "batch_size 64 is not a multiple of 3 processes x batch_size_per_process 21"),
        (
            dict(data__fraction=0.25, data__train_size=224),
            "898 images found, the recipe's data.train_size is 224",
        ),
    ],
    ids=range(4),
)
def test_data_that_cannot_be_used_is_refused_before_any_work(changes, message):
    with pytest.raises(data.DataError, match=message):
        loader(**changes)


def test_a_stream_of_class_folders_is_refused(small_sources):
    with pytest.raises(
        data.DataError, match=r"sorted by class.*--set data.streaming=false data.shuffle_buffer=0"
    ):
        small(small_sources["mapped"], "stream")


def truncated(file):
    file.write_bytes(file.read_bytes()[:-1000])


def damaged(file):
    content = bytearray(file.read_bytes())
    content[200:4000] = bytes(byte ^ 255 for byte in content[200:4000])
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        damaged,
        lambda file: file.write_bytes(b"<html>404</html>" * 99),
        lambda f: f.write_bytes(b""),
    ],
    ids=["truncated", "damaged", "foreign", "empty"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_read_is_told_in_a_line(damage, workers, tmp_path):
    source = write_parquet(tmp_path / "p", WHOLE, shards=2)
    damage(source / "train-00001-of-00002.parquet")
    with pytest.raises(data.DataError, match="a file cannot be read: ") as error:
        read(small(source, "stream", workers=workers), 0, 10)
    assert "\n" not in str(error.value) and str(source) in str(error.value)


def test_splits_with_other_classes_are_refused_before_training(tmp_path):
    class_folders(tmp_path, train=["ant", "bee"], val=["ant"])
    with pytest.raises(
        data.DataError, match=r"train and validation have other classes: only in train: 'bee'$"
    ):
        small(tmp_path)


def test_an_epoch_is_the_fraction_whatever_seed_processes_and_workers():
    full, part = loader(), loader(data__fraction=0.25, data__train_size=898)
    rows = sources.share_of_each_class(full.labels().numpy(), 0.25)
    assert (
        part.size == len(rows) == len(part.labels()) and part.steps_per_epoch == 4
    )  # of 224; 898 is the full set's
    batches, ids = read(part, 0, 4)
    assert sorted(ids) == list(range(224))  # places in the fraction: what CRD's banks are indexed by
    assert torch.equal(part.labels(), full.labels()[rows])
    for _, labels, index in batches:
        assert torch.equal(part.labels()[index], labels)
    pictures = [part.split.rows[i]["image"]["bytes"] for i in range(224)]
    assert pictures == [full.split.rows[int(i)]["image"]["bytes"] for i in rows]
    assert equal(batches, read(loader(data__fraction=0.25, workers=2), 0, 4)[0])
    assert read(part, 0, 4, seed=4)[1] != ids
    halves = [read(loader(data__fraction=0.25, rank=rank, world=2), 0, 3)[1] for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(ids[:192])


def test_fewer_images_than_processes_and_workers(tmp_path):
    """3 images, 2 processes of 4 workers: equal steps, or an error with the numbers; evaluation sees each
    image once.
    """
    write_folder(tmp_path, {0: WHOLE[0], 1: WHOLE[1], 20: WHOLE[20]})
    write_folder(tmp_path, {0: WHOLE[0], 1: WHOLE[1], 20: WHOLE[20]}, "validation")
    for rank in range(2):
        made = small(tmp_path, batch_size=2, rank=rank, world=2, workers=4)
        assert [len(labels) for _, labels, _ in made.batches(0, 0, 2)] == [1, 1]
    for changes in (dict(batch_size=4), dict(batch_size=8, data__drop_last=False, world=8)):
        with pytest.raises(
            data.DataError, match=f"train: 3 images do not fill one step of {changes['batch_size']}"
        ):
            small(tmp_path, **changes)
    section, seen = made.data, []
    for rank in range(4):
        for _, _, index in data.test_loader(section, batch_size=2, rank=rank, world=4, workers=2):
            seen += index.tolist()
    assert sorted(seen) == [0, 1, 2]


def test_empty_shards(tmp_path, monkeypatch):
    """One does no harm; all of them are an error, where the numbers of images are known and where they are
    not.
    """
    source = write_parquet(tmp_path / "p", WHOLE)
    write_parquet(tmp_path / "e", {}, shards=5)
    shutil.copy(tmp_path / "e" / "train-00002-of-00005.parquet", source)
    made = small(source, "stream", data__train_size=32)
    assert len(set(read(made, 0, 8)[1])) == 32
    with pytest.raises(data.DataError, match="0 images found, the recipe"):
        small(tmp_path / "e", "stream")
    monkeypatch.setattr(sources, "shard_lengths", lambda split: None)
    with pytest.raises(data.DataError, match="the shards of reader 0 of process 0 are empty"):
        read(small(tmp_path / "e", "stream"), 0, 1)
    with pytest.raises(data.DataError, match="5 shards cannot feed 6 readers: fewer processes or --workers"):
        small(source, "stream", batch_size=8, world=2, workers=3)


# ---------------------------------------------------------------- streams


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Parquet shards of 5, 17, 1, 9 and 30 images, in row groups of 4, with the hub's schema."""
    folder, n = tmp_path_factory.mktemp("uneven"), 0
    names = datasets.ClassLabel(names=[str(i) for i in range(62)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    for shard, length in enumerate((5, 17, 1, 9, 30)):
        images = [
            {"bytes": gradient(4 * i, size=(12, 10)), "path": f"{i}.JPEG"} for i in range(n, n + length)
        ]
        table = datasets.Dataset.from_dict(
            {"image": images, "label": list(range(n, n + length))}, features=features
        )
        table.to_parquet(folder / f"train-{shard:05d}-of-00005.parquet", batch_size=4)
        n += length
    return folder


def uneven_stream(source, batch_size=4, **changes):
    settings = dict(
        data__streaming=True, data__drop_last=True, data__shuffle_buffer=7, data__crop=RANDOM, data__size=8
    )
    settings |= dict(data__source=str(source), data__classes=62, data__train_size=62)
    return loader(batch_size=batch_size, **settings | changes)


def served(made, start=0, stop=None):
    """Labels (every image of `uneven` has its own), batch by batch."""
    return [labels.tolist() for _, labels, _ in made.batches(0, start, stop or made.steps_per_epoch)]


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 3), (3, 1), (7, 0)])
def test_uneven_shards_are_shared_without_loss_or_duplicates(uneven, world, workers):
    """Also with more readers than shards: each image at most once an epoch, the same number of steps for
    each process.
    """
    size = 2 * world
    ranks = [uneven_stream(uneven, size, rank=r, world=world, workers=workers) for r in range(world)]
    steps = 62 // size
    assert {r.steps_per_epoch for r in ranks} == {steps}
    for epoch in range(2):
        batches_of = [served(r, epoch * steps, (epoch + 1) * steps) for r in ranks]
        assert {len(batches) for batches in batches_of} == {steps}
        seen = [label for batches in batches_of for batch in batches for label in batch]
        assert len(seen) == len(set(seen)) == steps * size
    assert batches_of[0] != served(ranks[0], 0, steps)  # another order in another epoch


@WORKERS
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_resumed_stream_serves_exactly_the_rest_of_its_epoch(uneven, workers, repeats):
    everything = served(uneven_stream(uneven, workers=workers, data__repeats=repeats), 0, 30)
    for start in (6, 15, 22):
        assert (
            served(uneven_stream(uneven, workers=workers, data__repeats=repeats), start, 30)
            == everything[start:]
        )
    for epoch in (everything[:15], everything[15:]):
        counts = collections.Counter(label for batch in epoch for label in batch)
        assert sum(counts.values()) == 60 and (
            set(counts.values()) == {1} if repeats == 1 else max(counts.values()) == 3
        )


def test_the_footers_of_a_stream_are_counted_once(uneven, monkeypatch):
    """Not for each seed, epoch or dry run: on the hub each is a request."""
    read_metadata, counted = sources.pq.read_metadata, []
    monkeypatch.setattr(
        sources.pq, "read_metadata", lambda file: counted.append(file.name) or read_metadata(file)
    )
    made = uneven_stream(uneven)
    for seed in range(2):
        for start in (0, 7):
            assert len(list(made.batches(seed, start, 30))) == 30 - start
    assert sorted(counted) == sorted(made.split.files) and len(counted) == 5


def test_a_webdataset_mirror(tmp_path, monkeypatch):
    """timm/imagenet-1k-wds names its columns jpg and cls; ReaL's numbers come from the members' names."""
    images = [(f"n{i:04d}", i, "jpg", gradient(3 * i, size=(12, 10))) for i in range(20)]
    folder = write_tar(tmp_path / "wds", images, shards=2)
    write_tar(
        folder, [(f"ILSVRC2012_val_{i:08d}", 7 * i, "jpg", WHOLE[i]) for i in range(1, 6)], "validation"
    )
    columns = dict(data__image="jpg", data__label="cls", data__classes=1000, data__train_size=20)
    labels = [label for batch in served(uneven_stream(folder, workers=2, **columns)) for label in batch]
    assert len(labels) == len(set(labels)) == 20
    monkeypatch.setattr(
        sources, "shard_lengths", lambda split: None
    )  # as on the hub, where a tar file does not tell
    labels = [label for batch in served(uneven_stream(folder, workers=2, **columns)) for label in batch]
    assert len(labels) == 20 and len(set(labels)) >= 18  # a worker's 3 batches begin its 10 images again
    with pytest.raises(data.DataError, match="2 shards cannot feed 4 readers"):
        uneven_stream(folder, 8, world=2, workers=2, **columns)
    with pytest.raises(data.DataError, match=r"no column 'image' \(columns: cls, jpg"):
        uneven_stream(folder, data__classes=1000)
    fields = sources.evaluation_fields(str(folder)) | {"classes": 1000}
    section = types.SimpleNamespace(
        source=str(folder), size=8, crop_pct=1.0, interpolation="bicubic", **fields
    )
    (batch,) = data.test_loader(section, batch_size=8, numbered=True)
    assert batch[1].tolist() == [7, 14, 21, 28, 35] and batch[2].tolist() == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- pipelines


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    for split in ("train", "validation"):
        write_folder(folder, {i: picture_file(i, quality=92) for i in (*range(6), *range(20, 26))}, split)
    return folder


RAND = {
    "data__rand_augment": "rand-m7-mstd0.5",
    "data__repeats": 3,
    "data__crop": RANDOM,
    "data__size": 48,
    "data__hflip": 0.5,
}


@pytest.mark.parametrize("pipeline", ["fast", "timm"])
def test_views_do_not_depend_on_workers_processes_or_resuming(photographs, pipeline):
    changes = RAND | {"batch_size": 12, "data__pipeline": pipeline}
    everything, _ = read(small(photographs, **changes), 0, 4)
    assert equal(everything, read(small(photographs, workers=2, **changes), 0, 4)[0])
    assert equal(everything[2:], read(small(photographs, **changes), 2, 4)[0])
    parts = [read(small(photographs, rank=rank, world=2, **changes), 0, 4)[0] for rank in range(2)]
    for whole, *shares in zip(everything, *parts, strict=True):
        for rank, share in enumerate(shares):
            assert all(torch.equal(a[rank::2], b) for a, b in zip(whole, share, strict=True))
    assert everything[0][0].is_contiguous(memory_format=torch.channels_last) == (pipeline == "fast")


def test_repeats_are_decoded_once(photographs, monkeypatch):
    decoded, decode = [], augment.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        augment.simplejpeg, "decode_jpeg", lambda raw, **k: decoded.append(1) or decode(raw, **k)
    )
    made = small(photographs, batch_size=12, **RAND, data__pipeline="fast")
    (images, _, index), *_ = made.batches(1, 0, 1)
    assert len(decoded) == len(set(index.tolist())) == 4 and len(images) == 12
    assert len({image.numpy().tobytes() for image in images}) == 12


# ---------------------------------------------------------------- broken images


def test_broken_images_are_skipped_counted_and_named(small_sources):
    """All else is as if nothing were broken: a broken image's place goes to another crop of the next good
    one.
    """
    made = small(small_sources["mapped"])
    batches, clean = read(made, 0, 10)[0], read(small(small_sources["clean"]), 0, 10)[0]
    places = 0
    for (images, labels, index), (whole, _, wanted) in zip(batches, clean, strict=True):
        assert images.shape == (4, 3, SIZE, SIZE) and labels.tolist() == [
            int(i >= N // 2) for i in index.tolist()
        ]
        for place, i in enumerate(wanted.tolist()):
            if i not in BROKEN:
                assert index[place] == i and torch.equal(images[place], whole[place])
                continue
            following = next(j for j in wanted.roll(-place).tolist() if j not in BROKEN)
            assert index[place] == following and places < 4
            assert not any(torch.equal(images[place], crop) for crop in whole)  # not the same crop twice
            places += 1
    assert places == 4 and made.broken.keys() == BROKEN.keys()
    for i, label in ((3, "ant"), (11, "ant"), (17, "ant"), (30, "bee")):
        path = f"{small_sources['mapped']}/train/{label}/{i:03d}.jpg"
        assert made.broken[i].startswith(f"image {i} ({path}): cannot be decoded: ")
    assert "truncated" in made.broken[3] and "no image, 0 bytes" in made.broken[11]
    assert "no image, 39 bytes" in made.broken[17]


@KINDS
@WORKERS
def test_a_resumed_run_with_broken_images_is_the_tail_of_the_whole(small_sources, kind, workers):
    """Also where an image's crops fall into two batches, and what was found broken."""

    def opened():
        return small(small_sources[kind], kind, workers=workers, data__repeats=3)

    whole, before, after = opened(), opened(), opened()
    batches, _ = read(whole, 0, 30)  # three epochs
    assert {images.shape[0] for images, _, _ in batches} == {4} and whole.broken
    for start in (1, 13):
        before.broken = {}
        head, _ = read(before, 0, start)
        after.broken = before.broken
        assert equal(head + read(after, start, 30)[0], batches)
        assert after.broken == whole.broken


def test_broken_images_do_not_depend_on_the_number_of_workers(small_sources):
    results = []
    for number in (0, 2):
        made = small(small_sources["mapped"], workers=number)
        batches = iter(made.batches(1, 0, 10))
        head = [next(batches) for _ in range(3)]
        seen = dict(made.broken)  # workers are ahead; what they found there does not count yet
        results.append((head + list(batches), seen, made.broken))
    (alone, seen, broken), (helped, helped_seen, helped_broken) = results
    assert (
        equal(alone, helped)
        and seen == helped_seen
        and broken == helped_broken
        and len(seen) < len(broken) == 4
    )


@WORKERS
def test_a_stream_names_every_broken_image_once(small_sources, workers):
    made = small(small_sources["stream"], "stream", workers=workers)
    batches, _ = read(made, 0, 20)  # two epochs
    names = sorted(text.split("(")[1].split(")")[0] for text in made.broken.values())
    assert names == ["003.jpg", "011.jpg", "017.jpg", "030.jpg"]
    good = {zlib.crc32(WHOLE[i]) for i in WHOLE.keys() - BROKEN.keys()}
    assert all(set(index.tolist()) <= good and len(index) == 4 for _, _, index in batches)


@KINDS
def test_processes_keep_in_step_whoever_has_the_broken_images(small_sources, kind):
    broken = {}
    for rank in range(2):
        made = small(small_sources[kind], kind, batch_size=8, rank=rank, world=2)
        assert [images.shape for images, _, _ in made.batches(1, 0, 5)] == [(4, 3, SIZE, SIZE)] * 5
        assert not made.broken.keys() & broken.keys()
        broken |= made.broken
    assert len(broken) == 4


@pytest.mark.parametrize("share, allowed", [(0.0, 0), (0.001, 1), (0.06, 2)])
@KINDS
def test_more_broken_images_than_the_recipe_allows_stop_the_run(small_sources, kind, share, allowed):
    source = small_sources[kind]
    made = small(source, kind, data__max_broken=share)
    said = rf"{source}, train: (\d) of 40 images are broken.*data.max_broken {share} allows {allowed}: "
    with pytest.raises(data.DataError, match=said) as error:
        for _ in made.batches(1, 0, 10):
            assert len(made.broken) <= allowed
    assert str(error.value).count(".jpg): cannot be decoded") == len(made.broken) > allowed


def test_the_cap_holds_over_resumptions_and_names_twenty(small_sources):
    made = small(small_sources["mapped"])
    made.broken = {1000 + i: f"image {1000 + i} (before.jpg): gone" for i in range(20)}
    with pytest.raises(data.DataError, match="21 of 40 images are broken") as error:
        read(made, 0, 10)
    assert str(error.value).count("(before.jpg)") == 20


@KINDS
def test_a_batch_without_one_good_image_stops_the_run(small_sources, kind):
    with pytest.raises(
        data.DataError, match=r"none of the 1 images of a batch can be decoded\nimage \d+ \(.*\.jpg\): cannot"
    ):
        read(small(small_sources[kind], kind, batch_size=1), 0, N)


@KINDS
def test_equal_cells_are_counted_apart(tmp_path, kind):
    """An exporter that wrote empty cells without paths: seven images are missing, not one."""
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["ant", "bee"])}
    )
    empty = [None, None, None, b"", b"", b"no image", b"no image"]
    cells = [{"bytes": WHOLE[i], "path": None} for i in range(N - len(empty))]
    cells += [cell if cell is None else {"bytes": cell, "path": None} for cell in empty]
    cells = [cells[7 * i % N] for i in range(N)]  # spread over shards and batches
    for shard in range(2):
        columns = {"image": cells[shard::2], "label": [0] * (N // 2)}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "p" / f"train-{shard:05d}-of-00002.parquet")
    made = small(tmp_path / "p", kind, batch_size=8, data__repeats=2)
    everything, _ = read(made, 0, 5)
    for _ in range(2):
        made.broken = {}
        read(made, 0, 40)  # every image comes in some epoch; none is counted again in a later one
        assert (
            len(made.broken) == 7 and sum("no image, 0 bytes" in text for text in made.broken.values()) == 5
        )
    before = dict(made.broken)
    read(made, 40, 50)  # resumed
    assert made.broken == before and equal(everything, read(made, 0, 5)[0])
    with pytest.raises(data.DataError, match=r"[3-7] of 40 images are broken so far.*allows 2: "):
        read(small(tmp_path / "p", kind, batch_size=8, data__max_broken=0.05), 0, 5)


@KINDS
def test_a_wrong_label_is_never_skipped(tmp_path, kind):
    labels = {i: int(i >= N // 2) for i in range(N)} | {6: -1}
    made = small(write_parquet(tmp_path / "p", WHOLE, names=None, labels=labels), kind, data__max_broken=1.0)
    with pytest.raises(data.DataError, match=r"image \d+ \(006.jpg\): label -1 is not in 0..1"):
        read(made, 0, 10)
    assert not made.broken


@KINDS
def test_a_cell_without_bytes_is_never_skipped(tmp_path, kind):
    (tmp_path / "secret.jpg").write_bytes(WHOLE[0])
    source = write_parquet(tmp_path / "p", WHOLE | {6: str(tmp_path / "secret.jpg")})
    made = small(source, kind, data__max_broken=1.0)
    with pytest.raises(
        data.DataError, match=r"image \d+ \(.*secret.jpg\): .*a table must contain the bytes of its images"
    ):
        read(made, 0, 10)
    assert not made.broken


def test_a_file_that_is_not_there_is_not_a_broken_image(tmp_path):
    """A disk or a network that is gone must not shrink the data set."""
    made = small(write_folder(tmp_path, WHOLE))
    (tmp_path / "train" / "bee" / "025.jpg").unlink()
    with pytest.raises(data.DataError, match=r"image 25 \(.*025.jpg\) cannot be read: FileNotFoundError"):
        read(made, 0, 10)
    assert not made.broken


# ---------------------------------------------------------------- worker processes


@pytest.fixture
def impatient(monkeypatch):
    """Workers look for their parent process, and it for them, after 0.2 s instead of 5 s."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.2)


@KINDS
def test_a_worker_that_dies_is_an_error_with_advice(small_sources, kind, impatient, monkeypatch):
    made, decode, shared = (
        small(small_sources[kind], kind, workers=2),
        augment.decode,
        set(os.listdir("/dev/shm")),
    )

    def fatal(content):
        if torch.utils.data.get_worker_info().id == 1 and content != WHOLE[0]:
            time.sleep(0.3)  # a batch that is on its way to the main process arrives
            os._exit(1)
        return decode(content)

    monkeypatch.setattr(augment, "decode", fatal)
    with pytest.raises(
        data.DataError, match=r"a worker process that loads images died: DataLoader worker.*--workers 0"
    ):
        read(made, 0, 10)
    assert set(os.listdir("/dev/shm")) <= shared


def test_other_errors_are_not_blamed_on_workers():
    assert workers.dead_worker(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def end(pids, seconds=30):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_workers_serve_on_when_the_group_is_told_to_stop(tmp_path, impatient):
    """SIGTERM of a batch system, SIGINT of Ctrl-C: the trainer decides when to stop."""
    made, test, caught = loader(workers=2), data.test_loader(make_recipe().data, batch_size=64, workers=2), []

    def trainer():
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *a: caught.append(a[0]))
        for batches in (made.batches(1, 0, 20), iter(test)):
            seen = [next(batches)]
            os.killpg(0, signal.SIGTERM), os.killpg(0, signal.SIGINT)
            seen += batches
            with open(tmp_path / "log", "a") as file:
                print(len(seen), len(caught), signal.pthread_sigmask(signal.SIG_BLOCK, []), file=file)

    assert os.waitpid(forked(trainer), 0)[1] == 0
    assert (tmp_path / "log").read_text() == "20 2 set()\n15 4 set()\n"


def test_workers_end_when_the_trainer_is_killed(tmp_path, impatient):
    made, log = loader(workers=2), tmp_path / "log"
    others = {process.pid for process in multiprocessing.active_children()}  # of earlier tests

    def trainer():
        batches = made.batches(1, 0, 1000)
        next(batches)
        workers = {process.pid for process in multiprocessing.active_children()} - others
        log.write_text(" ".join(map(str, workers)) + "\n")
        time.sleep(1000)

    pid = forked(trainer)
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.02)
    workers = log.read_text().split()
    assert len(workers) == 2 and all(map(is_alive, workers))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert end(workers)


def test_workers_end_with_a_trainer_that_fails(tmp_path):
    """An error that nobody catches keeps its frames, and with them the loader, until the process ends."""
    others = {process.pid for process in multiprocessing.active_children()}  # of earlier tests

    def trainer():
        batches = iter(workers.Loader(range(10**6), num_workers=2))
        next(batches)
        pids = {process.pid for process in multiprocessing.active_children()} - others
        (tmp_path / "log").write_text(" ".join(map(str, pids)))
        atexit._run_exitfuncs()  # what an end does that no error prevents

    assert exit_code(forked(trainer)) == 0
    pids = (tmp_path / "log").read_text().split()
    assert len(pids) == 2 and end(pids)


@pytest.mark.slow
def test_workers_end_with_a_process_that_fails():
    """As above in a process of its own: nothing but its error is told."""
    script = (
        "import multiprocessing, workers\n"
        "batches = iter(workers.Loader(range(10**6), num_workers=2))\n"
        "next(batches)\n"
        "print(*(process.pid for process in multiprocessing.active_children()))\n"
        "raise SystemError\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stdout.split()) == 2 and end(done.stdout.split())
    assert done.stderr.endswith("\nSystemError\n") and "killed" not in done.stderr


# ---------------------------------------------------------------- resident sets

RESIDENT = dict(data__resident=True, data__hflip=0.5)


def views_drawn(made, seed, start, stop):
    return resident.drawn_views(made.resident, made.data, data._order(made, seed, start, stop), seed)


def one_by_one(index, view, section, monkeypatch):
    """The crops that the transform of single images makes, with its draws set to `view`."""
    side, made = 2 * section.crop.padding + 1, []
    rows = sources.open_split(section, section.train_split).rows
    transform = augment.train_transform(section)
    for i, v in zip(index.tolist(), view.tolist(), strict=True):
        y, x = divmod(v // 2, side)
        drawn = staticmethod(lambda *_, y=y, x=x: (y, x, section.size, section.size))
        monkeypatch.setattr(transforms.RandomCrop, "get_params", drawn)
        monkeypatch.setattr(torch, "rand", lambda *_, v=v: torch.tensor(0.0 if v % 2 else 1.0))
        made.append(torch.as_tensor(transform(augment.decode(rows[i][section.image]["bytes"]))))
    monkeypatch.undo()
    return torch.stack(made)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_with_equal_draws_the_pixels_are_those_of_single_images(padding, monkeypatch):
    made = loader(**RESIDENT, data__crop={"kind": "pad", "padding": padding})
    resident = made.resident
    assert resident.views == 2 * (2 * padding + 1) ** 2
    view, index = torch.arange(resident.views), torch.arange(resident.views) * 7
    crops = resident.crops(index, view)
    assert torch.equal(crops, one_by_one(index, view, made.data, monkeypatch)) and crops.dtype == torch.uint8
    whole = resident.crops(index, torch.full_like(view, resident.whole))
    assert torch.equal(whole, resident.images[index, :, padding : padding + 8, padding : padding + 8])


def test_a_fraction_is_resident_alone():
    part, single = (loader(data__fraction=0.25, data__resident=on) for on in (True, False))
    assert len(part.resident.images) == part.size == single.size < 898 and single.resident is None
    assert torch.equal(part.resident.labels, single.labels())
    batches = data.test_loader(part.data, batch_size=64, device="cpu")
    assert sum(len(labels) for _, labels, _ in batches) == 899  # of the test split all


def drawn_views(made, epochs, seed=1):
    """{(epoch, image id): view} of an epoch's batches; without repeats an image comes once."""
    views = {}
    for step in range(epochs * made.steps_per_epoch):  # each step by itself: nothing comes from before
        drawn = list(views_drawn(made, seed, step, step + 1))
        for (images, _, index), (numbers, view) in zip(
            made.batches(seed, step, step + 1), drawn, strict=True
        ):
            assert index.tolist() == numbers.tolist()
            assert torch.equal(images, made.resident.crops(index, torch.from_numpy(view)))
            views |= {
                (step // made.steps_per_epoch, i): v
                for i, v in zip(numbers.tolist(), view.tolist(), strict=True)
            }
    return views


def test_crops_and_flips_have_the_distribution_of_torchvision():
    ours = np.array(list(drawn_views(loader(**RESIDENT | {"data__hflip": 0.3}), epochs=12).values()))
    image, crop, flip = transforms.ToPILImage()(torch.zeros(3, 10, 10)), transforms.RandomCrop(8), torch.rand
    torch.manual_seed(0)
    theirs = np.array(
        [
            2 * (3 * y + x) + int(flip(1) < 0.3)
            for y, x, *_ in (crop.get_params(image, (8, 8)) for _ in range(len(ours)))
        ]
    )
    counts = [np.bincount(views, minlength=18) for views in (ours, theirs)]
    assert stats.chi2_contingency(counts).pvalue > 0.01
    expected = len(ours) / 9 * np.tile([0.7, 0.3], 9)
    assert (
        stats.chisquare(counts[0], expected).pvalue > 0.01
        and stats.chisquare(counts[1], expected).pvalue > 0.01
    )


def test_views_of_an_image_are_independent_between_epochs_and_repeats():
    epochs = drawn_views(loader(**RESIDENT), epochs=2)
    pairs = [(epochs[0, i], epochs[1, i]) for e, i in epochs if e == 0 and (1, i) in epochs]
    repeated = np.stack(list(views_drawn(loader(**RESIDENT, data__repeats=2), 1, 0, 13)))  # [13, 2, 64]
    index, views = repeated.transpose(1, 0, 2).reshape(2, -1, 2)
    assert (index[:, 0] == index[:, 1]).all()
    for table in (pairs, views):
        positions = np.array(table) // 2  # 9 of them
        counts = np.zeros((9, 9))
        np.add.at(counts, tuple(positions.T), 1)
        assert stats.chi2_contingency(counts).pvalue > 0.01


def test_a_view_depends_on_seed_epoch_and_image_alone():
    made = loader(**RESIDENT)
    expected = drawn_views(made, epochs=2)
    assert len(expected) == 2 * 898
    assert drawn_views(loader(**RESIDENT, batch_size=32, per_process=16, workers=2), epochs=2) == expected
    halves = [drawn_views(loader(**RESIDENT, world=2, rank=rank), epochs=2) for rank in range(2)]
    assert not halves[0].keys() & halves[1].keys() and halves[0] | halves[1] == expected
    assert drawn_views(made, epochs=2, seed=4) != expected
    first, second = ({i: v for (e, i), v in expected.items() if e == epoch} for epoch in range(2))
    assert first != second


@pytest.mark.parametrize(
    "changes", [{}, {"data__repeats": 3}, {"data__drop_last": True}], ids=["plain", "repeats", "drop_last"]
)
@pytest.mark.parametrize("world, rank", [(1, 0), (2, 1)])
def test_order_and_labels_are_those_of_the_other_loader(changes, world, rank):
    place = dict(batch_size=128, per_process=32, world=world, rank=rank) | changes
    resident, single = (
        loader(**place, data__hflip=0.5, data__resident=resident) for resident in (True, False)
    )
    ours, theirs = (read(made, 3, made.steps_per_epoch + 1)[0] for made in (resident, single))
    assert len(ours) == len(theirs) >= 10
    for (images, labels, index), (others, their_labels, their_index) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, their_labels) and torch.equal(index, their_index)
        assert images.shape == others.shape and images.dtype == others.dtype == torch.uint8


@pytest.fixture(scope="session")
def broken_source(tmp_path_factory):
    """16x16 images in parquet files, four of them broken."""
    import io

    pictures = {i: encoded(Image.open(io.BytesIO(raw)).resize((16, 16)), "PNG") for i, raw in WHOLE.items()}
    folder = write_parquet(tmp_path_factory.mktemp("resident") / "broken", pictures | BROKEN)
    write_parquet(folder, {i: pictures[i] for i in range(8)}, split="test")
    return folder


def broken_loader(folder, **changes):
    more = dict(
        data__source=str(folder), data__classes=2, data__size=16, data__max_broken=0.5, data__drop_last=True
    )
    return loader(batch_size=8, **RESIDENT | more | changes)


@pytest.mark.parametrize("repeats", [1, 2])
def test_broken_images_are_those_of_the_other_loader(repeats, broken_source):
    resident, single = (
        broken_loader(broken_source, data__resident=resident, data__repeats=repeats)
        for resident in (True, False)
    )
    assert sorted(resident.broken) == sorted(BROKEN)  # before the first batch
    resident.broken = {}  # the trainer's next run
    ours, theirs = (read(made, 0, 4 * made.steps_per_epoch)[0] for made in (resident, single))
    for (_, labels, index), (_, their_labels, their_index) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, their_labels) and torch.equal(index, their_index)
    assert single.broken.items() <= resident.broken.items() and len(resident.broken) == 4
    assert len(single.broken) == 4 or repeats == 2  # where four epochs do not show every image
    assert equal(ours, read(resident, 0, 4 * resident.steps_per_epoch)[0])


def test_faults_are_told_before_the_first_batch(broken_source, tmp_path):
    def error(folder, **changes):
        with pytest.raises(data.DataError) as caught:
            broken_loader(folder, **changes)
        return str(caught.value)

    told = error(broken_source, data__max_broken=0.05)
    assert told.startswith(
        f"{broken_source}, train: 4 of {N} images are broken so far, the recipe's data.max_broken 0.05 "
        f"allows 2:"
    )
    assert error(broken_source, data__size=17) == (
        "image 0 (000.jpg): 16x16 pixels; data.crop 'pad' needs 17x17, 'resized' any"
    )
    labels = dict.fromkeys(range(N), 0) | {0: 2}
    for split in ("train", "test"):
        write_parquet(tmp_path / "labels", WHOLE, split, names=None, labels=labels)
    assert error(tmp_path / "labels") == "image 0 (000.jpg): label 2 is not in 0..1"


# ---------------------------------------------------------------- evaluation


def test_test_images_are_untouched_at_their_own_size():
    (images, labels, index), *_ = data.test_loader(make_recipe().data, batch_size=899)
    raw = sources._digits()["test"]
    assert torch.equal(images[7], transforms.PILToTensor()(raw[7]["image"].convert("RGB")))
    assert labels.tolist() == raw["label"] and index.tolist() == list(range(899))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 1), (3, 0)])
def test_evaluation_sees_every_image_once_in_each_pass(world, workers, streaming):
    section, passes = make_recipe(**(DIGITS_STREAM if streaming else {})).data, [[], []]
    for rank in range(world):
        test = data.test_loader(section, batch_size=100, rank=rank, world=world, workers=workers)
        for labels in passes:
            labels += [label for _, part, _ in test for label in part.tolist()]
    assert passes[0] == passes[1] and sorted(passes[0]) == sorted(sources._digits()["test"]["label"])


def test_evaluation_of_a_resident_set_is_that_of_the_other_loader():
    for rank in range(2):
        place = dict(batch_size=100, rank=rank, world=2, device="cpu")
        ours, theirs = (
            list(data.test_loader(make_recipe(data__resident=on).data, **place)) for on in (True, False)
        )
        assert equal(ours, theirs)


@pytest.mark.parametrize("streaming", [False, True])
@WORKERS
def test_evaluation_never_skips(tmp_path, streaming, workers):
    source = write_parquet(tmp_path / "p", WHOLE | {17: BROKEN[17]}, "validation", shards=2)
    others = set(multiprocessing.active_children())
    with pytest.raises(data.DataError, match=r"^image \d+ \(017.jpg\): cannot be decoded: .*\)$") as error:
        list(evaluation(source, workers, **STREAM if streaming else {}))
    assert "\n" not in str(error.value)  # also from a worker, to whose errors PyTorch adds its traceback
    assert not set(multiprocessing.active_children()) - others  # the workers have ended, too


def test_a_broken_test_image_of_a_resident_set_is_an_error(broken_source):
    made = broken_loader(broken_source, data__test_split="train", data__train_split="test")
    with pytest.raises(data.DataError, match=r"^image 3 \(003.jpg\): cannot be decoded"):
        data.test_loader(made.data, batch_size=8, device="cpu")


def odd_images():
    """Suffix and content of images of which sources or readers could make different pixels."""
    damaged = rotated(6).replace(b"MM\x00*", b"MM\xff\xff").replace(b"II*\x00", b"II\xff\xff")
    assert damaged != rotated(6)
    images = [("jpg", rotated(i)) for i in range(1, 9)] + [("jpg", damaged)]
    images += [("png", encoded(Image.fromarray(np.tile(GREY16, (4, 4))), "PNG")), ("png", with_palette(0))]
    return images + [("jpg", encoded(Image.new("CMYK", (30, 30), (0, 128, 255, 0)))), ("jpg", WHOLE[0])]


def test_folder_parquet_and_tar_agree_on_every_image(tmp_path):
    images = odd_images()
    for suffix in ("jpg", "png"):  # a tar file's column is called by its suffix
        files = {i: content for i, (s, content) in enumerate(images) if s == suffix} | {N - 1: images[-1][1]}
        folder = write_folder(tmp_path / f"folder {suffix}", files, "validation", name="{:03d}." + suffix)
        parquet = write_parquet(tmp_path / f"parquet {suffix}", files, "validation", shards=1)
        samples = [(f"{i:03d}", int(i >= N // 2), suffix, content) for i, content in files.items()]
        tar = write_tar(tmp_path / f"tar {suffix}", samples, "validation")
        inside = dict(data__image=suffix, data__label="cls")
        seen = [
            list(evaluation(folder)),
            list(evaluation(parquet)),
            list(evaluation(parquet, **STREAM)),
            list(evaluation(tar, **STREAM, **inside)),
        ]
        first = torch.cat([images for images, _, _ in seen[0]])
        assert len(first) == len(files)
        for other in seen[1:]:
            assert torch.equal(torch.cat([images for images, _, _ in other]), first)
        if suffix == "jpg":
            assert all(
                torch.equal(image, first[-1]) for image in first[:9]
            )  # orientations 1 to 8, damaged EXIF


# ---------------------------------------------------------------- real data


CIFAR = dict(
    data__source=str(SHARED / "cifar100"),
    data__image="img",
    data__label="fine_label",
    data__classes=100,
    data__size=32,
)


@needs_cifar
@KINDS
def test_cifar100_from_parquet(kind):
    stream = dict(
        data__streaming=True, data__train_size=50_000, data__drop_last=True, data__shuffle_buffer=500
    )
    made = loader(data__crop={"kind": "pad", "padding": 4}, **CIFAR, **(stream if kind == "stream" else {}))
    assert made.steps_per_epoch == (781 if kind == "stream" else 782)
    batches, ids = read(made, 0, 8)
    assert len(set(ids)) == 512
    assert len(set(torch.cat([labels for _, labels, _ in batches]).tolist())) > 80  # shuffled across classes
    mean = torch.cat([images for images, _, _ in batches]).float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(
        mean, torch.tensor([0.5071, 0.4867, 0.4408]) * 0.88, rtol=0.1, atol=0
    )  # the padding is black


@needs_cifar
def test_a_tenth_of_cifar100():
    settings = recipe.load(
        ROOT / "recipes" / "study_fraction_weak.json",
        ["data.fraction=0.1", f"data.source={SHARED / 'cifar100'}"],
    )
    made = data.TrainLoader(settings.data, batch_size=64, batch_size_per_process=64)
    assert (
        made.size == 5000 and made.steps_per_epoch == 79 and made.labels().bincount().tolist() == [50] * 100
    )


@pytest.mark.slow
@needs_cifar
def test_resident_cifar100(monkeypatch):
    """Its test split, to save time."""
    changes = [
        f"data.source={SHARED / 'cifar100'}",
        "data.resident=true",
        "data.train_split=test",
        "data.train_size=10000",
    ]
    section = recipe.load(ROOT / "recipes" / "prev_cifar_res20_res56.json", changes).data
    made = data.TrainLoader(section, batch_size=64, batch_size_per_process=64)
    assert made.resident.views == 162 and not made.broken
    images, labels, index = next(made.batches(1, 1000, 1001))
    ((numbers, view),) = views_drawn(made, 1, 1000, 1001)
    assert torch.equal(images, one_by_one(numbers, view, section, monkeypatch))
    assert torch.equal(labels, made.labels()[index]) and index.tolist() == numbers.tolist()


@needs_imagenet
@KINDS
def test_imagenet_sample_from_parquet(kind):
    stream = dict(data__streaming=True, data__train_size=200, data__drop_last=True, data__shuffle_buffer=20)
    source = dict(data__source=str(SHARED / "imagenet_sample"), data__classes=1000, data__size=64)
    changes = source | dict(
        data__test_split="validation", data__crop=RANDOM, data__rand_augment="rand-m7-mstd0.5"
    )
    made = loader(batch_size=8, **changes, **(stream if kind == "stream" else {}))
    assert [images.shape for images, _, _ in made.batches(1, 0, 2)] == [(8, 3, 64, 64)] * 2
    section = make_recipe(**changes, data__crop_pct=0.95, data__interpolation="bicubic").data
    assert sum(len(labels) for _, labels, _ in data.test_loader(section, batch_size=16)) == 50
