"""Images: sources, decoding, augmentation, mixing, order, loaders. One section of a recipe in, uint8 batches out.

    train = TrainLoader(data, seed=0, batch_size=64, batch_size_per_process=64)
    for images, labels, index in train.batches(start=0, stop=train.steps_per_epoch): ...

Batches are (images uint8 [B, 3, size, size], labels int64 [B], index int64 [B]); scaling to [0, 1], mixing and each
network's own normalisation happen on the device. What an image looks like in an epoch depends only on (seed, epoch, its
id), never on workers, processes or what came before: results do not change with the number of workers, and a run can be
resumed at any step without saved generator states.
"""

import difflib
import functools
import io
import itertools
import random
import zlib
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import ToNumpy
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info
from torchvision import transforms

DIGITS_TRAIN = 898  # of scikit-learn's 1,797 digits


class DataError(ValueError):
    """The data cannot be used as the recipe says; the message says what was found and what to do."""


# ---------------------------------------------------------------- sources


def open_split(data, split):
    """One split, images undecoded: a memory-mapped datasets.Dataset, or an IterableDataset where `data.streaming`.

    `data.source`: a name on the hub, a folder of parquet files, a folder of images in class folders, or "digits".
    """
    source = data.source
    splits = _splits(source, data.streaming)
    if split not in splits:
        near = difflib.get_close_matches(split, splits, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{source}: no split {split!r}{hint} (splits: {', '.join(splits)})")
    rows = splits[split]
    for column in (data.image, data.label):
        if rows.column_names and column not in rows.column_names:
            near = difflib.get_close_matches(column, rows.column_names, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{source}: no column {column!r}{hint} (columns: {', '.join(rows.column_names)})")
    found = getattr(rows.features[data.label], "num_classes", data.classes) if rows.features else data.classes
    if found != data.classes:
        raise DataError(f"{source}: column {data.label!r} has {found} classes, the recipe's data.classes is {data.classes}")
    # Decoding is ours: one decode error inside a streamed iterator would end the epoch in silence.
    return rows.select_columns([data.image, data.label]).cast_column(data.image, datasets.Image(decode=False))


def _splits(source, streaming):
    """{split name: rows} of a source, as `datasets` finds them."""
    if source == "digits":
        return {split: rows.to_iterable_dataset(num_shards=8) if streaming else rows for split, rows in _digits().items()}
    local = Path(source).is_dir()
    if not local and source.count("/") != 1:
        raise DataError(f"{source}: not a folder, not a data set's name on the hub ('owner/name'), not 'digits'")
    try:
        return datasets.load_dataset(source, streaming=streaming)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        hint = "" if local else "; to work offline, download its parquet files and pass their folder with --data DIR"
        raise DataError(f"{source}: cannot be loaded as images: {error.__cause__ or error}{hint}") from error
    except ValueError as error:
        raise DataError(f"{source}: not a data set of images that `datasets` can read: {error}") from error


@functools.cache
def _digits():
    """scikit-learn's bundled handwritten digits (8x8, 16 grey levels) in the form of any other data set: no download.

    The split is that of scikit-learn's own classification example, first half and second half.
    """
    from sklearn.datasets import load_digits  # only here: a second of import that no other source needs

    digits = load_digits()
    images = [Image.fromarray(np.uint8(image * 255 / 16)) for image in digits.images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])})
    columns = {"image": images, "label": digits.target.tolist()}
    rows = datasets.Dataset.from_dict(columns, features=features)
    return {"train": rows.select(range(DIGITS_TRAIN)), "test": rows.select(range(DIGITS_TRAIN, len(rows)))}


def describe(source):
    """What a data set offers, for evaluating a checkpoint that came without a recipe: split, columns, classes.

    Takes test or validation, the first column of images and the first of class labels.
    """
    splits = _splits(str(source), streaming=True)
    split = next((s for s in ("test", "validation") if s in splits), None)
    if split is None:
        raise DataError(f"{source}: no split called test or validation (splits: {', '.join(splits)})")
    features = splits[split].features or {}
    image = next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
    label = next((n for n, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise DataError(f"{source}: needs a column of images and one of class labels (columns: {', '.join(features)})")
    return {"test_split": split, "image": image, "label": label, "classes": features[label].num_classes}


# ---------------------------------------------------------------- one image


def seed_all(*key):
    """Seed torch, numpy and random from integers: timm draws from all three. The key is all the state there is."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def decode(row):
    """{"bytes", "path"} -> RGB image. No EXIF rotation, as in timm and torchvision."""
    raw = row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()
    return Image.open(io.BytesIO(raw)).convert("RGB")


def train_transform(data):
    """PIL image -> uint8 array [3, size, size]; draws from torch's, numpy's and random's global generators."""
    if data.crop.kind == "resized":
        return create_transform(
            data.size,
            is_training=True,
            scale=data.crop.scale,
            ratio=data.crop.ratio,
            interpolation=data.crop.interpolation,
            hflip=data.hflip,
            color_jitter=None,
            auto_augment=data.rand_augment,
            re_prob=0.0,
            use_prefetcher=True,  # uint8 out
        )
    steps = [_ExactSize(data.size), transforms.RandomCrop(data.size, padding=data.crop.padding)]
    steps.append(transforms.RandomHorizontalFlip(data.hflip))
    if data.rand_augment:
        # timm's create_transform gives its policy the same two values; they scale with the image
        hyper = {"translate_const": int(data.size * 0.45), "img_mean": (124, 116, 104)}
        steps.append(rand_augment_transform(data.rand_augment, hyper))
    return transforms.Compose([*steps, ToNumpy()])


class _ExactSize:
    """Refuse other sizes: RandomCrop would take a corner of a large photograph and say nothing."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        if image.size != (self.size, self.size):
            raise DataError(
                f"{image.width}x{image.height} pixels; data.crop 'pad' needs {self.size}x{self.size}, 'resized' any"
            )
        return image


def test_transform(data):
    """PIL image -> uint8 array [3, size, size]: resize to size / crop_pct, centre crop. Nothing random."""
    return create_transform(data.size, crop_pct=data.crop_pct, interpolation=data.interpolation, use_prefetcher=True)


def _sample(row, index, data, transform):
    """(uint8 tensor, label, index) of one undecoded row."""
    label = row[data.label]
    if label is None or not 0 <= label < data.classes:
        raise DataError(f"image {index}: label {label} is not in 0..{data.classes - 1}")
    try:
        image = decode(row[data.image])
    except Exception as error:  # PIL raises anything from SyntaxError to struct.error on a broken file
        raise DataError(f"image {index} ({row[data.image]['path'] or 'no file name'}) cannot be decoded: {error!r}") from error
    try:
        return torch.as_tensor(transform(image)), label, index
    except DataError as error:
        raise DataError(f"image {index}: {error}") from None


# ---------------------------------------------------------------- training


class TrainLoader:
    """The training batches of one process, for a whole run.

    A step is one optimizer step of `batch_size` images over all processes: `accumulate` batches here, of
    `batch_size_per_process` images each. Without drop_last an epoch's last step is smaller, the same share on each process.
    """

    def __init__(self, data, *, seed, batch_size, batch_size_per_process, rank=0, world=1, workers=0, pin=False):
        if batch_size % (batch_size_per_process * world):
            raise DataError(
                f"batch_size {batch_size} is not a multiple of {world} processes x batch_size_per_process "
                f"{batch_size_per_process}: launch another number of processes or change batch_size_per_process"
            )
        self.data, self.seed, self.per_process, self.rank, self.world = data, seed, batch_size_per_process, rank, world
        self.batch_size, self.accumulate = batch_size, batch_size // (batch_size_per_process * world)
        self.workers, self.pin = workers, pin
        self.rows = open_split(data, data.train_split)
        self.size = data.train_size if data.streaming else len(self.rows)
        if data.train_size not in (None, self.size):
            raise DataError(f"{data.train_split}: {self.size} images found, the recipe's data.train_size is {data.train_size}")
        self.steps_per_epoch = self.size // batch_size
        if not data.drop_last and self.size % batch_size >= self.accumulate * world:
            self.steps_per_epoch += 1
        readers = world * max(workers, 1)
        if data.streaming and self.rows.num_shards < readers:
            self.rows = self.rows.reshard()  # row groups instead of files
            if self.rows.num_shards < readers:
                raise DataError(f"{self.rows.num_shards} shards cannot feed {readers} readers: fewer processes or --workers")
        if not self.steps_per_epoch:
            raise DataError(f"{data.train_split}: {self.size} images do not fill one step of {batch_size}")

    def batches(self, start, stop):
        """Batches of steps start..stop-1: `accumulate` for each step. One set of worker processes serves them all."""
        common = dict(num_workers=self.workers, pin_memory=self.pin)
        if self.data.streaming:
            return DataLoader(_Stream(self, start, stop), batch_size=None, **common)
        images = _Images(self.rows, self.data, train_transform(self.data), self.seed)
        return DataLoader(images, batch_sampler=_Order(self, start, stop), **common)


class _Order(Sampler):
    """Lists of (epoch, row number): step s is rows order[s * batch_size:][:batch_size], whoever reads them.

    Every process takes its own part of that slice, so the images of a step do not depend on the number of processes.
    """

    def __init__(self, loader, start, stop):
        self.loader, self.start, self.stop = loader, start, stop

    def __iter__(self):
        loader, current = self.loader, None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, loader.steps_per_epoch)
            if epoch != current:
                order, current = np.random.default_rng([loader.seed, epoch]).permutation(loader.size), epoch
            rows = order[position * loader.batch_size :][: loader.batch_size]
            share = len(rows) // (loader.world * loader.accumulate)  # equal on all: gradients are averaged, not summed
            for k in range(loader.accumulate):
                first = (k * loader.world + loader.rank) * share
                yield [(epoch, int(row)) for row in rows[first : first + share]]


class _Images(Dataset):
    """Rows by (epoch, row number), decoded and augmented."""

    def __init__(self, rows, data, transform, seed):
        self.rows, self.data, self.transform, self.seed = rows, data, transform, seed

    def __getitem__(self, key):
        epoch, index = key
        seed_all(self.seed, epoch, index)
        return _sample(self.rows[index], index, self.data, self.transform)


class _Stream(IterableDataset):
    """Whole batches from a stream: shards shuffled by (seed, epoch) and dealt to processes and workers, then a buffer.

    An image's id is a checksum of its bytes, the one name that survives any sharding. `datasets`' own shuffle is not
    used: it sleeps 5 s at the end of a pass, copies its buffer, and cannot be resumed inside an epoch; here a resumed
    reader skips rows without decoding them. Which images make a batch depends on the number of processes and workers.
    """

    def __init__(self, loader, start, stop):
        self.loader, self.start, self.stop = loader, start, stop
        self.transform = train_transform(loader.data)

    def __iter__(self):
        loader, info = self.loader, get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        per_epoch = loader.steps_per_epoch * loader.accumulate
        first, last = self.start * loader.accumulate, self.stop * loader.accumulate
        slot = (first + worker) % workers  # the DataLoader takes batch `first` from worker 0: deal as if it began at 0
        for epoch in range(first // per_epoch, -(-last // per_epoch)):
            mine = [b for b in range(epoch * per_epoch, (epoch + 1) * per_epoch) if b % workers == slot and b < last]
            skip = sum(b < first for b in mine)
            rows = itertools.islice(self._rows(epoch, slot, workers), skip * loader.per_process, None)
            for _ in mine[skip:]:
                yield default_collate([self._augmented(row, epoch) for row in itertools.islice(rows, loader.per_process)])

    def _rows(self, epoch, slot, workers):
        """Undecoded rows of this process's and worker's shards, endless: a short share starts again, so steps stay equal."""
        loader, n = self.loader, self.loader.rows.num_shards
        shards = np.random.default_rng([loader.seed, epoch]).permutation(n)
        shards = shards[loader.rank * workers + slot :: loader.world * workers]
        chance = random.Random(f"{loader.seed} {epoch} {loader.rank} {slot}")
        while True:
            yield from _shuffled(self._read(shards, n), loader.data.shuffle_buffer, chance)

    def _read(self, shards, n):
        for shard in shards:
            # .iter, because __iter__ in a DataLoader worker would divide this one shard among the workers again
            for columns in self.loader.rows.shard(num_shards=n, index=int(shard)).iter(batch_size=32):
                yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))

    def _augmented(self, row, epoch):
        image = row[self.loader.data.image]
        index = _checksum(image)
        seed_all(self.loader.seed, epoch, index)
        return _sample(row, index, self.loader.data, self.transform)


def _checksum(image):
    return zlib.crc32(image["bytes"] if image["bytes"] is not None else image["path"].encode())


def _shuffled(rows, size, chance):
    """Rows through a buffer of `size`, each output drawn from it at random, each row once."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        i = chance.randrange(size)
        yield buffer[i]
        buffer[i] = row
    chance.shuffle(buffer)
    yield from buffer


def mixer(data):
    """(images [B,3,H,W] float, labels [B]) -> (mixed images, target [B, K] whose rows sum to 1), or None for no mixing.

    timm's Mixup, drawing from numpy's global generator. No label smoothing here: it commutes with mixing and belongs to
    each student.
    """
    if not (data.mixup or data.cutmix):
        return None
    return Mixup(mixup_alpha=data.mixup, cutmix_alpha=data.cutmix, label_smoothing=0.0, num_classes=data.classes)


# ---------------------------------------------------------------- evaluation


def test_loader(data, *, batch_size, rank=0, world=1, workers=0, pin=False):
    """Every image of the test split once over all processes (shares may differ in size), in a fixed order."""
    rows = open_split(data, data.test_split)
    images = _TestImages(rows, data, test_transform(data), rank, world)
    if data.streaming:
        return DataLoader(_TestStream(images), batch_size, num_workers=workers, pin_memory=pin)
    if not len(rows):
        raise DataError(f"{data.test_split}: no images")
    return DataLoader(images, batch_size, num_workers=workers, pin_memory=pin)


class _TestImages(Dataset):
    """This process's share of a memory-mapped split."""

    def __init__(self, rows, data, transform, rank, world):
        self.rows, self.data, self.transform, self.rank, self.world = rows, data, transform, rank, world

    def __len__(self):
        return len(range(self.rank, len(self.rows), self.world))

    def __getitem__(self, i):
        index = self.rank + i * self.world
        return _sample(self.rows[index], index, self.data, self.transform)


class _TestStream(IterableDataset):
    """This process's share of a streamed split: shards dealt to processes and workers."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        own, info = self.images, get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        n = own.rows.num_shards
        for shard in range(own.rank * workers + worker, n, own.world * workers):
            for columns in own.rows.shard(num_shards=n, index=shard).iter(batch_size=32):
                for image, label in zip(columns[own.data.image], columns[own.data.label], strict=True):
                    row = {own.data.image: image, own.data.label: label}
                    yield _sample(row, _checksum(image), own.data, own.transform)
