"""Images: sources, decoding, augmentation, mixing, order, loaders. One section of a recipe in, uint8 batches out.

    train = TrainLoader(data, seed=0, batch_size=64, batch_size_per_process=64)
    for images, labels, index in train.batches(start=0, stop=train.steps_per_epoch): ...

Batches are (images uint8 [B, 3, size, size], labels int64 [B], index int64 [B]); scaling to [0, 1], mixing and each
network's own normalisation happen on the device. What an image looks like in an epoch depends only on (seed, epoch, its
id), never on workers, processes or what came before: results do not change with the number of workers, and a run can be
resumed at any step without saved generator states.

A training image that cannot be decoded is skipped, counted and named, up to `data.max_broken`; its place in the batch is
taken by another crop of a good image of that batch, so that batches keep their sizes and their order. Evaluation skips
nothing: a score over fewer images would be another score.
"""

import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import random
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from timm.data import ImageNetInfo, Mixup, create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ToNumpy
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info
from torchvision import transforms

DIGITS_TRAIN = 898  # of scikit-learn's 1,797 digits
DIGITS_SHARDS = 8  # where they are streamed
FRACTION_SEED = 0  # of the cut to data.fraction: not the run's, whose spread would then be that of other images, too
MAX_PIXELS = 89_478_485  # PIL warns of a decompression bomb above this, and refuses twice of it; here both are refused


class DataError(ValueError):
    """The data cannot be used as the recipe says; the message says what was found and what to do."""


class BrokenImage(DataError):
    """One image's bytes are not an image. Training goes on without it, see TrainLoader."""


# ---------------------------------------------------------------- sources


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a source, images undecoded."""

    rows: datasets.Dataset | datasets.IterableDataset  # memory-mapped, or a stream
    ids: list | None  # class id of each label of the source; None: they are the class ids
    names: list | None  # the classes by id, where the source names all of them
    files: list  # what it is read from, one file a shard; for image folders the images; none for "digits"
    beside: dict  # the same of every split of the source, by split


def open_split(data, split):
    """The `Split` of `data.source` by name; a stream where `data.streaming`.

    `data.source`: a name on the hub, a folder of parquet files, of webdataset tar files, of images in class folders, or
    "digits". Raises DataError naming the nearest split or column, and for classes that are not the recipe's.
    """
    source = data.source
    splits, files = _splits(source, data.streaming)
    if split not in splits:
        raise DataError(f"{source}: no split {split!r}{_nearest(split, splits)} (splits: {', '.join(splits)})")
    rows = splits[split]
    for column in (data.image, data.label):
        if rows.column_names and column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise DataError(f"{source}: no column {column!r}{_nearest(column, rows.column_names)} (columns: {known})")
    ids, names = None, getattr((rows.features or {}).get(data.label), "names", None)
    if names:
        ids = class_ids(source, names, data.classes)
        names = [name for _, name in sorted(zip(ids, names, strict=True))] if len(names) == data.classes else None
    # Decoding is ours: one decode error inside a streamed iterator would end the epoch in silence.
    rows = rows.select_columns([data.image, data.label]).cast_column(data.image, datasets.Image(decode=False))
    return Split(rows, ids, names, files.get(split, []), files)


def class_ids(source, names, classes):
    """The class id of each of a source's label names: their own order, but for ImageNet's two kinds of folders.

    WNIDs ("n01440764") take the place that timm's list of the 1,000 gives them, so that a folder with a part of the
    classes fits. Numbers ("0" to "999", ImageNet-V2) mean themselves; sorted as text, "10" would come before "2".
    Raises DataError for another number of classes, and for the 1,000 of ImageNet in another order.
    """
    imagenet = ImageNetInfo() if classes == 1000 else None
    numbers = all(name.isascii() and name.isdigit() and int(name) < classes for name in names)
    if numbers and len(set(map(int, names))) == len(names) and (imagenet or len(names) == classes):
        return [int(name) for name in names]
    if imagenet and all(re.fullmatch(r"n\d{8}", name) for name in names):
        known = {wnid: i for i, wnid in enumerate(imagenet.label_names())}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise DataError(f"{source}: class {unknown[0]!r} is not one of ImageNet's 1,000 (and {len(unknown) - 1} more)")
        return [known[name] for name in names]
    if len(names) != classes:
        raise DataError(f"{source}: {len(names)} classes found, the recipe's data.classes is {classes}")
    if imagenet:
        _check_imagenet_order(source, names, [imagenet.index_to_description(i) for i in range(1000)])
    return list(range(classes))


def _check_imagenet_order(source, names, expected):
    """Other people's labels may be ImageNet's in another order, which costs a teacher all its accuracy."""
    found, expected = ([re.split(r",| \(", name)[0] for name in list_] for list_ in (names, expected))
    if len(set(found) & set(expected)) > 900:
        for i, (name, wanted) in enumerate(zip(found, expected, strict=True)):
            if name != wanted:
                raise DataError(f"{source}: class {i} is {names[i]!r}, ImageNet's is {wanted!r}: not the order of the WNIDs")


def check_classes(data, split):
    """DataError if the training split `split` and the test split do not name the same classes, as their own files say.

    `datasets` makes one list of classes of all the splits' folders, and takes the first parquet file's for all. Class
    folders are compared by name, and so is a class without images an error; of parquet files the lists that they declare.
    """
    known = getattr((split.rows.features or {}).get(data.label), "names", None) or ()
    names = [_named_classes(split.beside.get(s, []), data.label, known) for s in (data.train_split, data.test_split)]
    if None in names or names[0] == names[1]:
        return
    only = [sorted(set(a) - set(b)) for a, b in (names, names[::-1])]
    found = [f"only in {s}: {_listed(o)}" for s, o in zip((data.train_split, data.test_split), only, strict=True) if o]
    i = next((i for i, (a, b) in enumerate(zip(*names, strict=False)) if a != b), None)
    found = found or [f"class {i} is {names[0][i]!r} in {data.train_split}, {names[1][i]!r} in {data.test_split}"]
    raise DataError(f"{data.source}: {data.train_split} and {data.test_split} have other classes: {'; '.join(found)}")


def _named_classes(files, label, known):
    """The classes that a split's files name, in their order: its class folders, or its first parquet file's; else None."""
    if _are_images(files):
        folders = sorted({file.rsplit("/", 2)[-2] for file in files})
        return folders if set(folders) <= set(known) else None  # else the labels come from a table beside the images
    if files and files[0].endswith(".parquet") and Path(files[0]).is_file():
        return getattr(datasets.Features.from_arrow_schema(pq.read_schema(files[0])).get(label), "names", None)
    return None


def _listed(names):
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _splits(source, streaming):
    """({split name: rows}, {split name: its files}) of a source, as `datasets` finds them."""
    if source == "digits":
        splits = {s: rows.to_iterable_dataset(DIGITS_SHARDS) if streaming else rows for s, rows in _digits().items()}
        return splits, {}
    local = Path(source).is_dir()
    if not local and source.count("/") != 1:
        raise DataError(f"{source}: not a folder, not a data set's name on the hub ('owner/name'), not 'digits'")
    try:
        builder = datasets.load_dataset_builder(source)
        files = {str(split): list(map(str, found)) for split, found in (builder.config.data_files or {}).items()}
        if streaming:
            return builder.as_streaming_dataset(), files
        builder.download_and_prepare()
        return builder.as_dataset(), files
    except (OSError, datasets.exceptions.DatasetsError) as error:
        hint = "" if local else "; to work offline, download its parquet files and pass their folder with --data DIR"
        raise DataError(f"{source}: cannot be loaded as images: {error.__cause__ or error}{hint}") from error
    except ValueError as error:
        raise DataError(f"{source}: not a data set of images that `datasets` can read: {error}") from error


def _shard_lengths(split):
    """Images in each shard of a streamed split, where a look at its files tells; else None (tar files on the hub)."""
    if not split.files:  # digits
        return [sum(1 for _ in split.rows.shard(split.rows.num_shards, i)) for i in range(split.rows.num_shards)]
    if len(split.files) != split.rows.num_shards:
        return None
    if all(file.endswith(".parquet") for file in split.files):
        count = _rows_of_parquet
    elif all(file.endswith(".tar") and Path(file).is_file() for file in split.files):
        count = _rows_of_tar
    else:
        return None
    with ThreadPoolExecutor(16) as pool:  # on the hub each footer is a request
        return list(pool.map(count, split.files))


def _rows_of_parquet(file):
    with fsspec.open(file, "rb") as opened:
        return pq.read_metadata(opened).num_rows


def _rows_of_tar(file):
    """Samples of a webdataset shard: members with the same name up to the first dot are one. Reads the headers alone."""
    with tarfile.open(file) as tar:
        return len({re.sub(r"\.[^/]*$", "", member.name) for member in tar if member.isfile()})


def _cut(split, data):
    """The split with data.fraction of its rows."""
    labels = split.rows.with_format("numpy", columns=[data.label])[:][data.label]
    return dataclasses.replace(split, rows=split.rows.select(share_of_each_class(labels, data.fraction)))


def share_of_each_class(labels, fraction):
    """Row numbers, ascending, of a share of each class of labels [n]: the rounded count, but at least one of a class.

    Drawn with one seed for all runs, so that seeds, recipes and machines compare on the same images; a smaller share lies
    inside a larger one. It depends on the order of the rows, which is the source's.
    """
    drawn = np.random.default_rng(FRACTION_SEED).random(len(labels))  # the lowest of a class are in, whatever the fraction
    by_class = np.lexsort((drawn, labels))
    _, start, count = np.unique(np.asarray(labels)[by_class], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(start, count)
    return np.sort(by_class[place < np.repeat(np.maximum(1, np.rint(fraction * count)), count)])


def _are_images(files):
    return bool(files) and Path(files[0]).suffix.lower() in Image.registered_extensions()


def _nearest(word, known):
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


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


@functools.cache
def describe(source):
    """What a data set offers for evaluating a checkpoint without a recipe: the fields of a recipe's `data` that name it.

    Takes test or validation, or the only split there is; the first column of images, and the first of class labels or
    else a webdataset's "cls".
    """
    splits, files = _splits(str(source), streaming=True)
    split = next((s for s in ("test", "validation") if s in splits), None if len(splits) > 1 else next(iter(splits)))
    if split is None:
        raise DataError(f"{source}: no split called test or validation (splits: {', '.join(splits)})")
    features = splits[split].features or {}
    image = next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
    label = next((n for n, f in features.items() if isinstance(f, datasets.ClassLabel)), "cls" if "cls" in features else None)
    if image is None or label is None:
        raise DataError(f"{source}: needs a column of images and one of class labels (columns: {', '.join(features)})")
    columns = {"test_split": str(split), "image": image, "label": label}
    classes = getattr(features[label], "num_classes", None)
    # one shard: one worker would decode it all; memory-mapping an image folder costs its file names only
    return {**columns, "classes": classes, "streaming": not _are_images(files.get(str(split), []))}


# ---------------------------------------------------------------- one image


def seed_of(*key):
    """One seed of several integers: all the state that randomness has here."""
    return int.from_bytes(hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=4).digest(), "little")


def seed_torch(seed, device=None):
    """The generators of the CPU and of `device`. torch.manual_seed also asks for devices that are not there, for 0.6 ms."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def seed_all(seed, device=None):
    """Seed random, numpy and torch: timm draws from all three."""
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed, device)


def decode(image):
    """{"bytes", "path"} -> RGB image; any exception for what is none, or has more than MAX_PIXELS.

    One rule for folders, parquet and tar files. No EXIF rotation, as in timm and torchvision: a damaged EXIF does no harm.
    Transparency is dropped, the colours under it stay. Of 16 bits of grey the upper 8 are kept, as PIL does with colours.
    """
    opened = Image.open(io.BytesIO(_read_bytes(image)))  # the header alone
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(f"{opened.width}x{opened.height} pixels, more than data.MAX_PIXELS, {MAX_PIXELS}")
    if opened.mode.startswith("I"):
        opened = _upper_bits(opened)
    if opened.mode == "P" and "transparency" in opened.info:
        opened = opened.convert("RGBA")  # PIL warns of the direct way
    return opened.convert("RGB")


def _upper_bits(image):
    """16-bit grey to 8 bits: PIL's own conversion makes 255 of everything above 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values {values.min()}..{values.max()}, expected 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _read_bytes(image):
    if image["bytes"] is not None or image["path"] is None:
        return image["bytes"] or b""
    with fsspec.open(image["path"], "rb") as file:  # a path on this disk, or a streamed one on the hub
        return file.read()


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


def _decoded(row, index, data, ids):
    """(image, class id) of one undecoded row. BrokenImage only for bytes that are no image: a file that is not there, or a
    network that is down, is no reason to train on less.
    """
    image, label = _image(row, data), row[data.label]
    named = f"image {index} ({_printable(image['path'] or 'no file name')})"
    known = range(data.classes if ids is None else len(ids))
    if not isinstance(label, int) or label not in known:
        raise DataError(f"{named}: label {label!r} is not in 0..{len(known) - 1}")
    try:
        raw = _read_bytes(image)
    except Exception as error:  # whatever the file system in between raises
        raise DataError(f"{named} cannot be read: {error!r}") from error
    try:
        return decode({"bytes": raw, "path": image["path"]}), label if ids is None else ids[label]
    except MemoryError as error:
        raise DataError(f"{named} needs more memory than there is") from error
    except Image.UnidentifiedImageError as error:  # its own text has an address in memory
        raise BrokenImage(f"{named}: cannot be decoded: no image, {len(raw)} bytes") from error
    except Exception as error:  # PIL raises anything from SyntaxError to struct.error on a broken file
        raise BrokenImage(f"{named}: cannot be decoded: {error!r}") from error


def _image(row, data):
    return row[data.image] or {"bytes": None, "path": None}  # None: an empty cell of a table


def _printable(text):
    """File names come from strangers: no control characters in a terminal or a log."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _transformed(image, index, transform):
    try:
        return torch.as_tensor(transform(image))
    except DataError as error:
        raise DataError(f"image {index}: {error}") from None


# ---------------------------------------------------------------- training


class TrainLoader:
    """The training batches of one process, for a whole run.

    A step is one optimizer step of `batch_size` images over all processes: `accumulate` batches here, of
    `batch_size_per_process` images each. Without drop_last an epoch's last step is smaller, the same share on each process.

    With data.fraction below 1 the split, its size, labels and ids (row numbers) are those of the cut; data.train_size is not.

    `broken`: what was skipped, {image id: "image 17 (name): reason"}, of the batches that `batches` has given out so far. A
    trainer that resumes sets it to what it was (ids are int), so that the cap holds for the whole run.

    With data.resident batches are made on `device` and have a fourth part, int64 [2, B] on the host: the ids of the images
    and the numbers of their views, see Resident. All broken images are known, and counted, before the first batch.
    """

    def __init__(self, data, *, seed, batch_size, batch_size_per_process, rank=0, world=1, workers=0, pin=False, device="cpu"):
        if batch_size % (batch_size_per_process * world):
            raise DataError(
                f"batch_size {batch_size} is not a multiple of {world} processes x batch_size_per_process "
                f"{batch_size_per_process}: launch another number of processes or change batch_size_per_process"
            )
        self.data, self.seed, self.per_process, self.rank, self.world = data, seed, batch_size_per_process, rank, world
        self.batch_size, self.accumulate = batch_size, batch_size // (batch_size_per_process * world)
        self.workers, self.pin, self.broken = workers, pin, {}
        self.split = open_split(data, data.train_split)
        check_classes(data, self.split)
        self.lengths = self._check_stream() if data.streaming else None
        known = sum(self.lengths) if self.lengths else None if data.streaming else len(self.split.rows)
        self.size = data.train_size if known is None else known
        if data.train_size not in (None, self.size):
            raise DataError(
                f"{data.source}, {data.train_split}: {self.size} images found, the recipe's data.train_size is "
                f"{data.train_size}: if these are the right images, --set data.train_size={self.size}"
            )
        if data.fraction < 1:
            self.split = _cut(self.split, data)
            self.size = len(self.split.rows)
        self.steps_per_epoch = self.size // batch_size
        if not data.drop_last and self.size % batch_size >= self.accumulate * world:
            self.steps_per_epoch += 1
        if not self.steps_per_epoch:
            raise DataError(f"{data.source}, {data.train_split}: {self.size} images do not fill one step of {batch_size}")
        self.resident = None
        if data.resident:
            self.resident = resident(data, data.train_split, torch.device(device), cut=data.fraction < 1)
            self._count(self.resident.broken)

    def _check_stream(self):
        """The lengths of a stream's shards, where they are known."""
        source, shards, readers = self.data.source, self.split.rows.num_shards, self.world * max(self.workers, 1)
        if _are_images(self.split.files):
            raise DataError(
                f"{source}: image files lie sorted by class, and a stream cannot shuffle them: "
                "--set data.streaming=false data.shuffle_buffer=0"
            )
        lengths = _shard_lengths(self.split)
        if lengths is None and shards < readers:
            raise DataError(f"{source}: {shards} shards cannot feed {readers} readers: fewer processes or --workers")
        return lengths

    def labels(self):
        """Class id of every training image by its index, int64 [size]; None for a stream, which has neither beforehand."""
        if self.data.streaming:
            return None
        labels = torch.as_tensor(self.split.rows.with_format("numpy", columns=[self.data.label])[:][self.data.label])
        return labels if self.split.ids is None else torch.tensor(self.split.ids)[labels]

    def batches(self, start, stop):
        """Batches of steps start..stop-1: `accumulate` for each step. One set of worker processes serves them all.

        Raises DataError for more broken images than data.max_broken allows, and for a worker process that died.
        """
        if self.resident:
            return _resident_batches(self, _Order(self, start, stop))
        common = dict(batch_size=None, num_workers=self.workers, pin_memory=self.pin)  # None: they come as batches
        if self.data.streaming:
            return self._watched(iter(DataLoader(_Stream(self, start, stop), **common)))
        return self._watched(iter(DataLoader(_Images(self), sampler=_Order(self, start, stop), **common)))

    def _watched(self, batches):
        while True:
            try:
                images, labels, index, broken = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if death := dead_worker(error):
                    raise death from error
                raise
            self._count(broken)
            yield images, labels, index

    def _count(self, broken):
        self.broken.update(broken)
        data, allowed = self.data, max(1, int(self.data.max_broken * self.size)) if self.data.max_broken else 0
        if broken and len(self.broken) > allowed:
            raise DataError(
                f"{data.source}, {data.train_split}: {len(self.broken)} of {self.size} images are broken so far, the recipe's "
                f"data.max_broken {data.max_broken} allows {allowed}: repair or remove them, or allow more with "
                f"--set data.max_broken=SHARE\n{_first(list(self.broken.values()))}"
            )


def _first(lines, n=20):
    return "\n".join(lines[:n] + ([f"and {len(lines) - n} more"] if len(lines) > n else []))


def dead_worker(error):
    """The DataError for PyTorch's RuntimeError about a loader's worker process that is gone; None for other errors.

    PyTorch raises it wherever the main process happens to be when the signal comes, which may be outside of the loader.
    """
    if not re.search(r"DataLoader worker \(pid|Communication with the workers is no longer possible", str(error)):
        return None
    return DataError(
        f"a worker process that loads images died: {str(error).splitlines()[0]} Often the memory or /dev/shm is full, or "
        "`ulimit -n` too low: try fewer --workers; --workers 0 loads in the main process and shows what is wrong"
    )


class _Order(Sampler):
    """Lists of (epoch, repeat, row number): step s is crops[s * batch_size:][:batch_size], whoever reads them.

    crops are an epoch's random order of the images, each `repeats` times in a row, cut at the length of the data set.
    They are dealt out one by one, as in timm's RepeatAugSampler: the crops of an image fall to different processes. With
    fewer processes they fall to the batches that are accumulated instead, so a step does not depend on their number.
    """

    def __init__(self, loader, start, stop):
        self.loader, self.start, self.stop = loader, start, stop

    def __iter__(self):
        loader, current = self.loader, None
        parts = loader.world * loader.accumulate
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, loader.steps_per_epoch)
            if epoch != current:
                order, current = np.random.default_rng([loader.seed, epoch]).permutation(loader.size), epoch
            crops = range(position * loader.batch_size, min((position + 1) * loader.batch_size, loader.size))
            share = len(crops) // parts  # equal for all: gradients are averaged, not summed
            for k in range(loader.accumulate):
                own = crops[k * loader.world + loader.rank :: parts][:share]
                yield [(epoch, c % loader.data.repeats, int(order[c // loader.data.repeats])) for c in own]


class _Crops:
    """Batches of crops, from `load(what) -> (image, class id, id)` and `name(what)`, the id under which it may be broken."""

    def __init__(self, loader):
        self.data, self.seed, self.ids = loader.data, loader.seed, loader.split.ids
        self.transform = train_transform(loader.data)

    def batch(self, keys):
        """(images, labels, index, {id: reason} of broken images) for keys (epoch, repeat, what).

        An image is decoded once for its crops, which are neighbours. The place of a broken one goes to the next good one of
        the batch, as a crop with a number that no other has: nothing depends on other batches, workers or what came before.
        """
        samples, broken, previous = [], {}, None
        for epoch, repeat, what in keys:
            if what != previous:
                previous, loaded = what, None
                try:
                    loaded = self.load(what)
                except BrokenImage as error:
                    broken[self.name(what)] = str(error)
            samples.append(loaded and self._crop(*loaded, epoch, repeat))
        if not any(samples):
            reasons = _first(list(broken.values()))
            raise DataError(f"{self.data.source}: none of the {len(keys)} images of a batch can be decoded\n{reasons}")
        good = [i for i, sample in enumerate(samples) if sample]
        for i in set(range(len(keys))).difference(good):
            epoch, _, what = keys[min(good, key=lambda g: (g - i) % len(keys))]
            samples[i] = self._crop(*self.load(what), epoch, self.data.repeats + i)
        return (*default_collate(samples), broken)

    def _crop(self, image, label, index, epoch, repeat):
        seed_all(seed_of(self.seed, epoch, index, repeat))
        return _transformed(image, index, self.transform), label, index


class _Images(_Crops, Dataset):
    """Whole batches by lists of (epoch, repeat, row number)."""

    def __init__(self, loader):
        super().__init__(loader)
        self.rows = loader.split.rows

    def __getitem__(self, keys):
        return self.batch(keys)

    def load(self, index):
        return *_decoded(self.rows[index], index, self.data, self.ids), index

    def name(self, index):
        return index


class _Stream(_Crops, IterableDataset):
    """Whole batches from a stream: shards in an order of (seed, epoch), dealt to processes and workers, then a buffer.

    Where the shards' lengths are known, every reader takes as many images as its batches need from their concatenation:
    each image comes once an epoch, whatever the number of shards. Where they are not (tar files on the hub), readers take
    whole shards, and one with too few images begins its shards again.

    An image's id is a checksum of its bytes, the one name that survives any sharding. `datasets`' own shuffle is not
    used: it sleeps 5 s at the end of a pass, copies its buffer, and cannot be resumed inside an epoch; here a resumed
    reader skips rows without decoding them. Which images make a batch depends on the number of processes and workers.
    Repeated crops are neighbours in a batch: to spread them over processes, each would have to read all of the stream.
    """

    def __init__(self, loader, start, stop):
        super().__init__(loader)
        self.loader, self.start, self.stop = loader, start, stop

    def __iter__(self):
        loader, info = self.loader, get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        per_epoch, repeats = loader.steps_per_epoch * loader.accumulate, loader.data.repeats
        first, last = self.start * loader.accumulate, self.stop * loader.accumulate
        slot = (first + worker) % workers  # the DataLoader takes batch `first` from worker 0: deal as if it began at 0
        for epoch in range(first // per_epoch, -(-last // per_epoch)):
            batches = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            dealt = [[b for b in batches if b % workers == s] for s in range(workers)]
            needed = [-(-len(own) * loader.per_process // repeats) for own in dealt]  # images of each worker here
            before = loader.rank * sum(needed) + sum(needed[:slot])
            rows = self._rows(epoch, slot, workers, before, needed[slot])
            skip = sum(b < first for b in dealt[slot]) * loader.per_process  # crops
            keys = itertools.islice(self._keys(rows, epoch), skip, None)
            for b in dealt[slot]:
                if first <= b < last:
                    yield self.batch(list(itertools.islice(keys, loader.per_process)))

    def _rows(self, epoch, slot, workers, before, needed):
        """Undecoded rows of one process's worker in an epoch, shuffled."""
        loader, n = self.loader, self.loader.split.rows.num_shards
        shards = np.random.default_rng([loader.seed, epoch]).permutation(n).tolist()
        chance = random.Random(f"{loader.seed} {epoch} {loader.rank} {slot}")
        if loader.lengths:
            yield from _shuffled(self._interval(shards, before, needed), loader.data.shuffle_buffer, chance)
            return
        while True:  # a short share begins again, so that steps stay equal
            own = (row for shard in shards[loader.rank * workers + slot :: loader.world * workers] for row in self._read(shard))
            rows = _shuffled(own, loader.data.shuffle_buffer, chance)
            row = next(rows, None)
            if row is None:
                raise DataError(f"{loader.data.source}: the shards of reader {slot} of process {loader.rank} are empty")
            yield row
            yield from rows

    def _interval(self, shards, before, needed):
        """Rows before..before+needed-1 of the concatenated shards, which go round (with repeats few images may not do)."""
        for shard in itertools.cycle(shards):
            if not needed:
                return
            length = self.loader.lengths[shard]
            taken = max(min(needed, length - before), 0)
            if taken:
                yield from itertools.islice(self._read(shard), before, before + taken)
            before, needed = max(before - length, 0), needed - taken

    def _read(self, shard):
        # .iter, because __iter__ in a DataLoader worker would divide this one shard among the workers again
        for columns in self.loader.split.rows.shard(self.loader.split.rows.num_shards, shard).iter(batch_size=32):
            yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))

    def _keys(self, rows, epoch):
        for row in rows:
            for repeat in range(self.data.repeats):
                yield epoch, repeat, row

    def load(self, row):
        index = _checksum(_image(row, self.data))
        return *_decoded(row, index, self.data, self.ids), index

    def name(self, row):
        # not the id alone: a hundred empty files are a hundred broken images
        image = _image(row, self.data)
        return zlib.crc32((image["path"] or "").encode(errors="surrogateescape"), _checksum(image))


def _checksum(image):
    return zlib.crc32(image["bytes"] if image["bytes"] is not None else (image["path"] or "").encode(errors="surrogateescape"))


def _shuffled(rows, size, chance):
    """Rows through a buffer of `size`, each output drawn from it at random, each row once."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        i = chance.randrange(size)
        yield buffer[i]
        buffer[i] = row
    chance.shuffle(buffer)
    yield from buffer


# ---------------------------------------------------------------- a set that is resident


class Resident:
    """A split's images, padded, as one tensor on a device: uint8 [N, 3, size + 2 padding, size + 2 padding].

    A crop of an image is one of its `views`: view = 2 * (y * (2 padding + 1) + x) + flipped, for a crop at (y, x) of the
    padded image. Decoded once; a broken image stays black, is in `broken` by its id, and no batch shows it.
    """

    def __init__(self, split, data, device):
        p, self.size, self.device = data.crop.padding, data.size, device
        self.views, self.broken = 2 * (2 * p + 1) ** 2, {}
        n, side = len(split.rows), data.size + 2 * p
        try:
            images, labels = torch.zeros(n, 3, side, side, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
            for i, (image, labels[i]) in enumerate(self._decoded(split, data)):
                if image is not None:
                    images[i, :, p : p + data.size, p : p + data.size] = torch.from_numpy(image)
            self.images, self.labels = images.to(device), labels.to(device)
        except RuntimeError as error:  # on a GPU and on a CPU
            told = f"{data.source}: its {n:,} images do not fit into the memory of {device}"
            raise DataError(f"{told} ({3 * n * side**2 / 1e9:.2f} GB): set data.resident to false") from error
        self.whole = 2 * p * (2 * p + 2)  # the view without shift and flip

    def _decoded(self, split, data):
        """(uint8 [3, size, size] or None, class id) of every row. PIL decodes outside of Python's lock: threads do."""

        def decoded(index, row):
            try:
                image, label = _decoded(row, index, data, split.ids)
            except BrokenImage as error:
                return None, str(error)
            if image.size != (data.size, data.size):
                raise DataError(
                    f"{data.source}: image {index}: {image.width}x{image.height} pixels; data.resident needs "
                    f"{data.size}x{data.size}: set data.resident to false, and data.crop to 'resized' for other sizes"
                )
            return np.array(image).transpose(2, 0, 1), label

        rows = (dict(zip(c, v, strict=True)) for c in split.rows.iter(1000) for v in zip(*c.values(), strict=True))
        with ThreadPoolExecutor() as pool:
            for i, (image, label) in enumerate(pool.map(decoded, itertools.count(), rows)):
                if image is None:
                    self.broken[i] = label
                yield image, 0 if image is None else label

    def crops(self, index, view):
        """uint8 [B, 3, size, size]: view int64 [B] of images index int64 [B], both on the device."""
        shifts = self.images.unfold(2, self.size, 1).unfold(3, self.size, 1).permute(0, 2, 3, 1, 4, 5)  # a view of memory
        shift = view // 2
        images = shifts[index, shift // shifts.shape[2], shift % shifts.shape[2]]
        return torch.where((view % 2 == 1).view(-1, 1, 1, 1), images.flip(3), images)

    def digest(self):
        """sha256 of the pixels."""
        return hashlib.sha256(self.images.cpu().numpy()).hexdigest()


@functools.lru_cache(maxsize=2)  # training and test: every run of a recipe, and its teacher's evaluation, share them
def resident(data, name, device, *, cut=False):
    """The `Resident` of a split by name, `cut` to data.fraction of it."""
    split = open_split(data, name)
    return Resident(_cut(split, data) if cut else split, data, device)


def _resident_batches(loader, order):
    """(images, labels, index) on the device and int64 [2, B] on the host, (image id, view): see TrainLoader."""
    own, data = loader.resident, loader.data

    @functools.lru_cache(maxsize=data.repeats + 1)
    def views(epoch, repeat):
        # not [seed, epoch, repeat]: numpy ignores zeros at the end, and [seed, epoch] draws the order
        chance = np.random.default_rng([loader.seed, epoch, 1 + repeat])
        return 2 * chance.integers(own.views // 2, size=loader.size) + (chance.random(loader.size) < data.hflip)

    for keys in order:
        epoch, repeats, index = np.array(keys).T
        if own.broken:
            repeats, index = _without_broken(own.broken, repeats, index, data)
        view = np.empty_like(index)
        for repeat in set(repeats.tolist()):
            view[repeats == repeat] = views(epoch[0], repeat)[index[repeats == repeat]]
        crops = torch.from_numpy(np.stack([index, view]))
        index, view = crops.to(own.device, non_blocking=True)
        yield own.crops(index, view), own.labels[index], index, crops


def _without_broken(broken, repeats, index, data):
    """Broken images' places go to the next good image of the batch, as _Crops.batch does."""
    good = [i for i, image in enumerate(index.tolist()) if image not in broken]
    if not good:
        reasons = _first([broken[image] for image in index.tolist()])
        raise DataError(f"{data.source}: none of the {len(index)} images of a batch can be decoded\n{reasons}")
    source = [min(good, key=lambda g, i=i: (g - i) % len(index)) for i in range(len(index))]
    places = np.arange(len(index))
    return np.where(source == places, repeats, data.repeats + places), index[source]


# ---------------------------------------------------------------- mixing


def mixer(data):
    """(images [B,3,H,W] float in [0, 1], labels [B]) -> (images, target): random erasing, mixup, cutmix. None for neither.

    target is [B, K] with rows that sum to 1, or the labels where nothing is mixed. timm's RandomErasing and Mixup, drawing
    from the global generators; one draw of Mixup for the whole batch, as upstream. No label smoothing here: it commutes
    with mixing and belongs to each student.
    """
    mix = None
    if data.mixup or data.cutmix:
        mix = Mixup(mixup_alpha=data.mixup, cutmix_alpha=data.cutmix, label_smoothing=0.0, num_classes=data.classes)
    if not data.random_erasing:
        return mix

    def erase_and_mix(images, labels):
        images = _erase(images, data.random_erasing)
        return mix(images, labels) if mix else (images, labels)

    return erase_and_mix


def _erase(images, probability):
    """timm's RandomErasing draws noise of unit variance for normalised images: ImageNet's statistics go off and on again."""
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    erasing = RandomErasing(probability, mode="pixel", device=images.device)
    return erasing((images - mean) / std) * std + mean


# ---------------------------------------------------------------- evaluation


def test_loader(data, *, batch_size, rank=0, world=1, workers=0, pin=False, numbered=False, device="cpu"):
    """Every image of the test split once over all processes (shares may differ in size), in a fixed order.

    `numbered`: the index of an image is the number in its file name, ILSVRC2012_val_00000001.JPEG, by which ImageNet-ReaL
    knows it; DataError for other names.
    """
    if data.resident and data.crop_pct == 1 and not numbered:
        own = resident(data, data.test_split, torch.device(device))
        if own.broken:
            raise DataError(next(iter(own.broken.values())))
        shares = torch.arange(rank, len(own.labels), world, device=device).split(batch_size)
        return [(own.crops(i, torch.full_like(i, own.whole)), own.labels[i], i) for i in shares if len(i)]
    split = open_split(data, data.test_split)
    images = _TestImages(split, data, test_transform(data), rank, world, numbered)
    if isinstance(split.rows, datasets.IterableDataset):
        return DataLoader(_TestStream(images), batch_size, num_workers=workers, pin_memory=pin)
    if not len(split.rows):
        raise DataError(f"{data.source}, {data.test_split}: no images")
    return DataLoader(images, batch_size, num_workers=workers, pin_memory=pin)


class _TestImages(Dataset):
    """This process's share of a memory-mapped split."""

    def __init__(self, split, data, transform, rank, world, numbered):
        self.rows, self.ids, self.data, self.transform = split.rows, split.ids, data, transform
        self.rank, self.world, self.numbered = rank, world, numbered

    def __len__(self):
        return len(range(self.rank, len(self.rows), self.world))

    def __getitem__(self, i):
        index = self.rank + i * self.world
        return self.sample(self.rows[index], index)

    def sample(self, row, index):
        if self.numbered:
            index = _validation_number(_image(row, self.data))
        image, label = _decoded(row, index, self.data, self.ids)
        return _transformed(image, index, self.transform), label, index


def _validation_number(image):
    match = re.search(r"ILSVRC2012_val_(\d{8})", image["path"] or "")
    if not match:
        found = Path(image["path"]).name if image["path"] else "no name"
        raise DataError(f"ImageNet-ReaL knows an image by its file name, ILSVRC2012_val_00000001.JPEG; found {found}")
    return int(match[1])


class _TestStream(IterableDataset):
    """This process's share of a streamed split: shards dealt to processes and workers."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        own, info = self.images, get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        n = own.rows.num_shards
        for shard in range(own.rank * workers + worker, n, own.world * workers):
            for columns in own.rows.shard(n, shard).iter(batch_size=32):
                for image, label in zip(columns[own.data.image], columns[own.data.label], strict=True):
                    row = {own.data.image: image, own.data.label: label}
                    yield own.sample(row, _checksum(_image(row, own.data)))
