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

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import math
import random
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo, Mixup, create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, RandAugment, rand_augment_transform
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
    """(image, class id) of one undecoded row."""
    named, image, label = _undecoded(row, index, data, ids)
    with _broken(named, image):
        return decode(image), label


def _undecoded(row, index, data, ids):
    """(what errors call it, {"bytes", "path"} with the bytes read, class id) of one row."""
    image, label = _image(row, data), row[data.label]
    named = f"image {index} ({_printable(image['path'] or 'no file name')})"
    known = range(data.classes if ids is None else len(ids))
    if not isinstance(label, int) or label not in known:
        raise DataError(f"{named}: label {label!r} is not in 0..{len(known) - 1}")
    try:
        raw = _read_bytes(image)
    except Exception as error:  # whatever the file system in between raises
        raise DataError(f"{named} cannot be read: {error!r}") from error
    return named, {"bytes": raw, "path": image["path"]}, label if ids is None else ids[label]


@contextlib.contextmanager
def _broken(named, image):
    """BrokenImage only for bytes that are no image: a file that is not there, or a network that is down, is no reason to
    train on less.
    """
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{named} needs more memory than there is") from error
    except Image.UnidentifiedImageError as error:  # its own text has an address in memory
        raise BrokenImage(f"{named}: cannot be decoded: no image, {len(image['bytes'])} bytes") from error
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


# ---------------------------------------------------------------- a part of a JPEG

RESTART_INDEX = b"restarts\0"  # begins the APP11 segment by which tools/prepare.py lists the restart markers
JPEG_SEGMENTS = {0xC0, 0xC1, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # of the frames that are known here
RESTARTS = [b"\xff" + bytes([0xD0 + i]) for i in range(8)]


@dataclasses.dataclass
class JpegFrame:
    """What stands before the scan of a JPEG. Positions are bytes from the file's first."""

    at: int = 0  # where the frame header begins
    width: int = 0
    height: int = 0
    mcu_width: int = 8  # pixels of what is coded as one
    mcu_height: int = 8
    scan: int = 0  # where the entropy-coded data begin
    interval: int = 0  # MCUs between restart markers
    places: np.ndarray | None = None  # of these markers, from `scan`


def jpeg_frame(jpeg):
    """The `JpegFrame` of a JPEG whose first scan has all components; ValueError for other bytes."""
    frame, at, components = JpegFrame(), 2, 0
    while jpeg[at : at + 1] == b"\xff":
        marker, end = jpeg[at + 1], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        body = jpeg[at + 4 : end]
        if marker not in JPEG_SEGMENTS:
            break
        if marker in (0xC0, 0xC1, 0xC2):  # the last: progressive, whose scans are several; for tools/prepare.py
            frame.at, components = at, body[5]
            frame.height, frame.width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            if components > 1:  # of one component, every block is coded for itself
                factors = body[7::3]
                frame.mcu_width, frame.mcu_height = 8 * max(f >> 4 for f in factors), 8 * max(f & 15 for f in factors)
        elif marker == 0xDD:
            frame.interval = int.from_bytes(body, "big")
        elif marker == 0xEB and body.startswith(RESTART_INDEX):
            frame.places = np.frombuffer(body[len(RESTART_INDEX) :], "<u4")
        elif marker == 0xDA:
            frame.scan = end
            break
        at = end
    if not frame.scan or not frame.width or body[0] != components:
        raise ValueError("no JPEG whose first scan has all components")
    return frame


def cut(jpeg, box):
    """A JPEG of the part of `jpeg` that holds the box (left, upper, right, lower), and the (x, y) of its corner; by slices.

    None where tools/prepare.py has left no index, or one that is not this file's. What lies between two restart markers can be
    decoded by itself. With one MCU more on each side, for decoders that interpolate colours across blocks, the box has the
    pixels that it has in the whole image.
    """
    frame, (left, upper, right, lower) = jpeg_frame(jpeg), map(int, box)
    columns, rows = -(-frame.width // frame.mcu_width), -(-frame.height // frame.mcu_height)
    if frame.places is None or not frame.interval or columns % frame.interval:
        return None
    across, width = columns // frame.interval, frame.interval * frame.mcu_width  # parts of a row, and a part's pixels
    first = max(0, (left - frame.mcu_width) // width)
    last = min(across, -(-(right + frame.mcu_width) // width))
    top = max(0, upper // frame.mcu_height - 1)
    bottom = min(rows, -(-lower // frame.mcu_height) + 1)
    edges = frame.scan + np.concatenate([[-2], frame.places, [len(jpeg) - 2 - frame.scan]]).astype(np.int64)
    if len(edges) != across * rows + 1:
        return None

    chosen = np.arange(across * rows).reshape(rows, across)[top:bottom, first:last].ravel()
    begin, end, whole = edges[chosen] + 2, edges[chosen + 1], np.frombuffer(jpeg, np.uint8)
    if end.max() > len(jpeg) - 2 or (whole[end] != 0xFF).any():
        return None
    if ((whole[end + 1] != 0xD0 + chosen % 8) & (chosen < across * rows - 1)).any():
        return None
    parts = [RESTARTS[0]] * (2 * len(chosen))
    parts[::2] = [jpeg[b:e] for b, e in zip(begin.tolist(), end.tolist(), strict=True)]
    parts[1::2] = (RESTARTS * (len(chosen) // 8 + 1))[: len(chosen)]
    parts[-1] = b"\xff\xd9"
    corner = first * width, top * frame.mcu_height
    size = min(frame.height, bottom * frame.mcu_height) - corner[1], min(frame.width, last * width) - corner[0]
    sizes = b"".join(side.to_bytes(2, "big") for side in size)
    return b"".join([jpeg[: frame.at + 5], sizes, jpeg[frame.at + 9 : frame.scan], *parts]), corner


class _TimmViews:
    """The crops of one image, from the transforms as timm builds them, to the byte."""

    def __init__(self, data, per_process):
        self.transform, self.policy = train_transform(data), None
        if data.rand_augment_on == "device":
            self.transform.transforms, self.policy = _without_rand_augment(self.transform)

    def __call__(self, raw, index, seeds, broken):
        """(view, ) for each seed; with RandAugment on the device (view, what it shall do there)."""
        with broken():
            image = decode(raw)
        for seed in seeds:
            seed_all(seed)
            view = _transformed(image, index, self.transform)
            yield (view, _as_numbers(_drawn(self.policy), self.policy.num_layers)) if self.policy else (view,)

    def channels_first(self, images):
        return images


# ---------------------------------------------------------------- one image, fast

# Bytes of memory that are kept for a decoded image: what comes fresh from the kernel costs a third of decoding.
ROOM = 12_000_000


class _Jpeg:
    """An undecoded JPEG in colour, in one sequential scan, whole: PIL would decode it, too, to the same pixels."""

    def __init__(self, raw, frame):
        self.raw, self.frame, self.size = raw, frame, (frame.width, frame.height)

    @classmethod
    def of(cls, raw):
        """None for anything else. A marker inside of the scan is not whole: PIL may refuse what comes after it."""
        try:
            frame = jpeg_frame(raw)
        except (ValueError, IndexError):
            return None
        plain = raw[:2] == b"\xff\xd8" and raw[frame.at + 1] != 0xC2 and raw[frame.at + 4] == 8 and raw[frame.at + 9] == 3
        if plain and 0 < frame.width * frame.height <= MAX_PIXELS and _ends_whole(raw, frame.scan):
            return cls(raw, frame)
        return None

    def pixels(self, box, room):
        """(uint8 [H, W, 3] with the pixels of the box (left, upper, right, lower), the (x, y) of its corner), in `room` if it
        is large enough; the rest is left out where that can be.

        That is what `cut` says; or else what lies below: libjpeg stops at the height that the header names, here with two
        MCUs more than the box has, since the chroma of a row is interpolated with that of the next.
        """
        part = cut(self.raw, box) if self.frame.places is not None else None
        if part:
            return simplejpeg.decode_jpeg(part[0], strict=False), part[1]
        at, rows = self.frame.at + 5, min(self.frame.height, (box[3] // self.frame.mcu_height + 2) * self.frame.mcu_height)
        raw = bytearray(self.raw)
        raw[at : at + 2] = rows.to_bytes(2, "big")
        room = room if 3 * rows * self.frame.width <= len(room) else None
        return simplejpeg.decode_jpeg(raw, buffer=room, strict=False), (0, 0)  # PIL, too, passes over libjpeg's warnings


def _ends_whole(raw, start):
    """Whether the first marker in a scan's data that is no restart is the end of the image."""
    scan = np.frombuffer(raw, np.uint8, offset=start)
    after = scan[np.flatnonzero(scan[:-1] == 0xFF) + 1]
    other = after[(after != 0) & (after & 0xF8 != 0xD0)]
    return len(other) > 0 and other[0] == 0xD9


class _FastViews:
    """The crops of one image: timm's draws in timm's order, other arithmetic.

    A JPEG is decoded by simplejpeg, whose pixels are PIL's, as far as the crops need it; other files by PIL. A crop is resized
    by PyTorch: horizontally, then vertically, as PIL did before Pillow 13, and within 2 levels of that. Pillow 13 resizes some
    crops the other way round (its #9549): they differ from ours as from Pillow 12's, near black and white, by 13 levels at
    most in 200 crops of photographs (65 dB). RandAugment is `_Painter`'s. Memory is used again from image to image, so a view
    lives until `per_process` others were made.
    """

    def __init__(self, data, per_process):
        (self.crop, *rest), self.policy = _without_rand_augment(train_transform(data))
        self.flip, self.size = next((t.p for t in rest if isinstance(t, transforms.RandomHorizontalFlip)), 0), data.size
        self.painter = None if data.rand_augment_on == "device" or not self.policy else _Painter(data.size)
        self.room, self.cropped = np.empty(ROOM, np.uint8), np.empty(ROOM, np.uint8)
        self.places = itertools.cycle(np.empty((per_process, data.size, data.size, 3), np.uint8))

    def __call__(self, raw, index, seeds, broken):
        """(view, ) for each seed; with RandAugment on the device (view, what it shall do there)."""
        with broken():
            image = _Jpeg.of(raw["bytes"]) or decode(raw)
        plans = [self._draw(seed, *image.size) for seed in seeds]
        pixels, (x, y) = self._pixels(image, raw, _around([box for box, *_ in plans]), broken)
        for (top, left, height, width), mode, flipped, ops in plans:
            view, crop = next(self.places), pixels[top - y : top - y + height, left - x : left - x + width]
            resized = self._resized(crop, mode)
            cv2.flip(resized, 1, dst=view) if flipped else np.copyto(view, resized)
            if self.painter:
                self.painter(view, ops)
            yield (
                torch.from_numpy(view),
                *([_as_numbers(ops, self.policy.num_layers)] if self.policy and not self.painter else []),
            )

    def _draw(self, seed, width, height):
        seed_all(seed)
        box = self.crop.get_params(torch.empty((3, height, width), device="meta"), self.crop.scale, self.crop.ratio)
        mode = self.crop.interpolation
        mode = random.choice(mode) if isinstance(mode, (tuple, list)) else mode
        flipped = self.flip > 0 and bool(torch.rand(1) < self.flip)
        return box, _pil_name(mode), flipped, _drawn(self.policy) if self.policy else []

    def _pixels(self, image, raw, box, broken):
        if isinstance(image, _Jpeg):
            try:
                return image.pixels(box, self.room)
            except ValueError:  # whatever it is, PIL decides
                with broken():
                    image = decode(raw)
        return np.asarray(image), (0, 0)

    def _resized(self, pixels, mode):
        room = self.cropped[: pixels.size] if pixels.size <= ROOM else np.empty(pixels.size, np.uint8)
        crop = room.reshape(pixels.shape)
        np.copyto(crop, pixels)
        crop = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # with [None] last it would count as channels first
        return F.interpolate(crop, (self.size, self.size), mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()

    def channels_first(self, images):
        """uint8 [B, size, size, 3] -> [B, 3, size, size], channels last in memory, as they were painted."""
        return images.permute(0, 3, 1, 2)


def _around(boxes):
    """(left, upper, right, lower) of what holds all boxes (top, left, height, width)."""
    top, left, height, width = np.array(boxes).T
    return tuple(map(int, (left.min(), top.min(), (left + width).max(), (top + height).max())))


def _pil_name(mode):
    """ "bilinear" or "bicubic" of PIL's and of torchvision's enumerations."""
    return getattr(mode, "name", str(mode)).lower()


# ---------------------------------------------------------------- RandAugment: what is drawn, and its arithmetic

# The numbers of the operations, for the device. Those of timm's sets but for blurs, which stay PIL's.
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
TABLES = ("Invert", "Posterize", "PosterizeIncreasing", "PosterizeOriginal", "Solarize", "SolarizeIncreasing", "SolarizeAdd")
TABLES += ("Brightness", "BrightnessIncreasing")
COLOURS = ("Color", "ColorIncreasing", "Desaturate")
OPS = (
    *WARPS,
    *TABLES,
    *COLOURS,
    "Contrast",
    "ContrastIncreasing",
    "Sharpness",
    "SharpnessIncreasing",
    "AutoContrast",
    "Equalize",
)
FILL = (124, 116, 104)  # ImageNet's mean colour, as timm's create_transform has it
GREY = np.array([[19595, 38470, 7471]], np.float32) / 65536  # of red, green and blue in PIL's grey
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
DOWN = -0.5 + 1 / 4096  # PIL cuts where OpenCV rounds; a little more than half, since whole numbers may be a little less


def _without_rand_augment(transform):
    """(the other steps, timm's RandAugment or None), whose operations note what they were to do, see `_drawn`."""
    steps = [step for step in transform.transforms if not isinstance(step, RandAugment)]
    policy = next((step for step in transform.transforms if isinstance(step, RandAugment)), None)
    for op in policy.ops if policy else []:
        op.aug_fn = functools.partial(_note, op.name)
    return steps, policy


def _note(name, notes, value=0.0, *, resample, fillcolor):
    cubic = False
    if name in WARPS:  # here timm draws the kernel of a warp
        cubic = _pil_name(random.choice(resample) if isinstance(resample, (tuple, list)) else resample) == "bicubic"
    return [*notes, (name, value, cubic)]


def _drawn(policy):
    """[(operation, value, whether bicubic)] of one image, drawn by timm's own code. Fewer than layers: some do nothing."""
    return policy([])


def _timms_op(name, image, value):
    """PIL image, changed as timm would."""
    return NAME_TO_OP[name](image, *([] if LEVEL_TO_ARG[name] is None else [value]))


def _table(name, value):
    """uint8 [256]: what timm's operation on single values makes of each."""
    return np.asarray(_timms_op(name, RAMP, value))[0]


def _contrast_table(mean, factor):
    """As PIL's ImageEnhance.Contrast, of an image whose mean grey is `mean`, float in 0..255."""
    return np.asarray(Image.blend(Image.new("L", RAMP.size, int(mean + 0.5)), RAMP, factor))[0]


def _autocontrast_table(low, high):
    """As PIL's ImageOps.autocontrast, of a channel with values low..high."""
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return np.clip(np.trunc(np.arange(256) * scale - low * scale), 0, 255).astype(np.uint8)


def _equalize_table(counts):
    """As PIL's ImageOps.equalize, of a channel with int counts [256]."""
    used = counts[counts > 0]
    step = (used.sum() - used[-1]) // 255
    if len(used) <= 1 or not step:
        return np.arange(256, dtype=np.uint8)
    return np.minimum((step // 2 + np.cumsum(counts) - counts) // step, 255).astype(np.uint8)


def _shift(name, value, size):
    """Pixels by which each row (of X) or column (of Y) reads to the right or below, float64 [size]."""
    if name.startswith("Shear"):
        return value * (np.arange(size) + 0.5)
    return np.full(size, value * size if name.endswith("Rel") else value, np.float64)


def _weights(distance, cubic):
    """PIL's kernels: those of pixels n - 1 .. n + 2 at n + distance, 0 <= distance < 1; cubic with a = -1, else linear."""
    d = distance
    if cubic:
        return -d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2
    return 0 * d, 1 - d, d, 0 * d


class _Painter:
    """RandAugment on uint8 arrays [size, size, 3], in place.

    Against timm's own operations on PIL images of the same array: those by a table (also of contrast, autocontrast and
    equalize) to the bit; colour, sharpness, shears, translations and bilinear rotation within 1 level. Bicubic rotation and
    blurs are PIL's. Buffers are kept: an array of this size comes fresh from the kernel, which costs more than the work.
    """

    def __init__(self, size):
        self.size, shape = size, (size, size, 3)
        self.other, self.fill, self.grey = (
            np.empty(shape, np.uint8),
            np.empty(shape, np.uint8),
            np.empty((size, size), np.uint8),
        )
        self.fill[:] = FILL
        self.wide = np.zeros((size, 3 * size, 3), np.uint8)  # the image in the middle: rows are cut out of it, shifted
        row, rest = self.wide.strides[0], (size + 3) * 3
        self.cuts = np.lib.stride_tricks.as_strided(self.wide, (size, 2 * size - 2, rest), (row, 3, 1))
        self.taps, self.sums = torch.empty(size, rest), torch.empty(size, size * 3)
        self.strip = np.empty((size, size + 3, 3), np.uint8)
        self.floats, self.turned = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def __call__(self, image, ops):
        for name, value, cubic in ops:
            if name in TABLES:
                cv2.LUT(image, _table(name, value), dst=image)
            elif name.startswith("Contrast"):
                mean = cv2.mean(cv2.transform(image, GREY, dst=self.grey))[0]
                cv2.LUT(image, _contrast_table(mean, value), dst=image)
            elif name == "AutoContrast":
                bounds = [cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]
                self._look_up(image, [_autocontrast_table(*both) for both in bounds])
            elif name == "Equalize":
                counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(3)]
                self._look_up(image, [_equalize_table(own) for own in counts])
            elif name in COLOURS:
                cv2.cvtColor(cv2.transform(image, GREY, dst=self.grey), cv2.COLOR_GRAY2RGB, dst=self.other)
                factor = 1 - value if name == "Desaturate" else value
                self._blend(image, min(max(factor, 0.0), 1.0) if name == "Desaturate" else factor)
            elif name.startswith("Sharpness"):
                cv2.filter2D(image, -1, SMOOTH, dst=self.other)
                for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
                    self.other[edge] = image[edge]
                self._blend(image, value)
            elif name in WARPS[1:]:
                self._slide(image, _shift(name, value, self.size), cubic, upright="Y" in name, uniform="Translate" in name)
            elif name == "Rotate" and not cubic:
                self._rotate(image, value)
            else:
                resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
                warp = dict(resample=resample, fillcolor=FILL)
                args = [] if LEVEL_TO_ARG[name] is None else [value]
                np.copyto(image, np.asarray(NAME_TO_OP[name](Image.fromarray(image), *args, **warp)))

    def _look_up(self, image, tables):
        cv2.LUT(image, np.stack(tables, axis=1)[None], dst=image)

    def _blend(self, image, factor):
        """image * factor + other * (1 - factor)."""
        cv2.addWeighted(image, factor, self.other, 1 - factor, DOWN, dst=image)

    def _slide(self, image, shift, cubic, *, upright, uniform):
        """Each row (upright: column) resampled `shift` pixels further on, all (uniform) by as many."""
        n, source = self.size, cv2.transpose(image, dst=self.other) if upright else image
        self.wide[:, n : 2 * n] = source
        self.wide[:, n - 3 : n], self.wide[:, 2 * n : 2 * n + 3] = source[:, :1], source[:, -1:]
        whole = np.floor(shift)
        first = np.clip(whole.astype(np.int64), 2 - n, n - 4) + n - 1
        weights = np.stack(_weights(shift - whole, cubic)).astype(np.float32)
        result = self.other if upright else image
        if uniform:
            cut = self.wide[:, first[0] : first[0] + n + 3]
            cv2.filter2D(cut, -1, weights[:, :1].T, dst=self.strip, anchor=(0, 0), delta=DOWN)
            np.copyto(result, self.strip[:, :n])
        else:
            self.taps.copy_(torch.from_numpy(self.cuts[np.arange(n), first]))
            chosen = range(4) if cubic else (1, 2)
            self.sums.zero_()
            for i in chosen:
                self.sums.addcmul_(self.taps[:, 3 * i : 3 * (i + n)], torch.from_numpy(weights[i])[:, None])
            cv2.add(self.sums.numpy(), DOWN, dst=result.reshape(n, -1), dtype=cv2.CV_8U)
        at = np.arange(n)
        outside = (at < np.ceil(-shift - 0.5)[:, None]) | (at >= np.ceil(n - 0.5 - shift)[:, None])
        cv2.copyTo(self.fill, outside.view(np.uint8), result)
        if upright:
            cv2.transpose(result, dst=image)

    def _rotate(self, image, degrees):
        """Bilinear."""
        n, (a, b, c, d, e, f) = self.size, _rotation(degrees, self.size)
        np.copyto(self.floats, image)
        to_source = np.array([[a, b, (a + b) / 2 + c - 0.5], [d, e, (d + e) / 2 + f - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(self.floats, to_source, (n, n), dst=self.turned, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        cv2.add(self.turned.reshape(n, -1), DOWN, dst=image.reshape(n, -1), dtype=cv2.CV_8U)
        at = np.arange(n) + 0.5
        x, y = a * at + (b * at + c)[:, None], d * at + (e * at + f)[:, None]
        cv2.copyTo(self.fill, ((x < 0) | (x >= n) | (y < 0) | (y >= n)).view(np.uint8), image)


def _rotation(degrees, size):
    """The six numbers of the affine map from an output pixel to its source, as PIL's Image.rotate computes them."""
    angle, middle = -math.radians(degrees % 360.0), size / 2
    a, b, d, e = (round(v, 15) for v in (math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)))
    return a, b, a * -middle + b * -middle + middle, d, e, d * -middle + e * -middle + middle


def _as_numbers(ops, layers):
    """float64 [layers, 3]: number in OPS, value, whether bicubic, of what `rand_augment` shall do; -1 where nothing."""
    rows = [(OPS.index(name), value, cubic) for name, value, cubic in ops]
    return torch.tensor(rows + [(-1, 0, 0)] * (layers - len(rows)), dtype=torch.float64)


def rand_augment(images, drawn):
    """RandAugment on the device of images, uint8 [B, 3, size, size]; drawn float64 [B, layers, 3] on the host, by the loader.

    What becomes of an image does not depend on the others. Against timm's operations on PIL images: within 1 level where
    the input is the same; PIL's kernels and edges. The host waits for nothing: `drawn` says which images go together.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    for layer in drawn.unbind(1):
        for group, own in DEVICE_OPS.items():
            chosen = torch.isin(layer[:, 0], torch.tensor([float(OPS.index(name)) for name in group])).nonzero()[:, 0]
            if len(chosen):
                names = [OPS[int(i)] for i in layer[chosen, 0]]
                at = chosen.to(images.device, non_blocking=True)
                images[at] = own(images[at], names, layer[chosen, 1], layer[chosen, 2] > 0)
    return images


def _look_up(images, tables):
    """images uint8 [n, 3, size, size] through tables uint8 [n, 3 or 1, 256]."""
    tables = tables.expand(-1, 3, -1).to(images.device, non_blocking=True)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _tables(images, names, values, cubic):
    tables = [_table(name, int(v) if "Bright" not in name else v) for name, v in zip(names, values.tolist(), strict=True)]
    return _look_up(images, torch.from_numpy(np.stack(tables))[:, None])


def _grey(images):
    """As PIL's convert("L"), int64 [n, 1, size, size]."""
    red, green, blue = images.long().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _between(images, other, factors):
    """As PIL's Image.blend(other, image, factor): uint8 of other + factor * (image - other), cut and bounded."""
    factors = factors.float().to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return (other + factors * (images.float() - other)).clamp_(0, 255).byte()


def _contrasts(images, names, values, cubic):
    return _between(images, (_grey(images).double().mean((2, 3), keepdim=True) + 0.5).floor().float(), values)


def _colours(images, names, values, cubic):
    plain = torch.tensor([name == "Desaturate" for name in names])
    return _between(images, _grey(images).float(), torch.where(plain, (1 - values).clamp(0, 1), values))


def _sharpnesses(images, names, values, cubic):
    kernel = torch.from_numpy(SMOOTH * 13).to(images.device)[None, None].expand(3, 1, 3, 3)
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = (F.conv2d(smooth, kernel, groups=3) / 13 + 0.5).floor()
    return _between(images, smooth, values)


def _counts(images):
    """Pixels of each value, int64 [n, 3, 256]."""
    pixels = images.flatten(2).long()
    return torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device).scatter_add_(
        2, pixels, torch.ones_like(pixels)
    )


def _autocontrasts(images, names, values, cubic):
    low, high = (edge(images.flatten(2), 2).double()[..., None] for edge in (torch.amin, torch.amax))
    values = torch.arange(256, device=images.device)
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # a number / a tensor would be number * reciprocal
    tables = (values * scale - low * scale).clamp(0, 255)
    return _look_up(images, torch.where(high > low, tables, values.double()).byte())


def _equalizes(images, names, values, cubic):
    counts = _counts(images)
    last = counts.gather(2, images.flatten(2).amax(2, keepdim=True).long())
    step = (counts.sum(2, keepdim=True) - last) // 255
    tables = ((step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)).clamp(max=255)
    several = ((counts > 0).sum(2, keepdim=True) > 1) & (step > 0)
    return _look_up(images, torch.where(several, tables, torch.arange(256, device=images.device)).byte())


def _warps(images, names, values, cubic):
    n, size, device = len(images), images.shape[-1], images.device
    maps = torch.tensor([_affine(name, v, size) for name, v in zip(names, values.tolist(), strict=True)], dtype=torch.float64)
    a, b, c, d, e, f = maps.float().to(device, non_blocking=True).view(n, 6, 1, 1).unbind(1)
    middle = torch.arange(size, device=device) + 0.5
    x, y = (p * middle + q * middle[:, None] + r for p, q, r in ((a, b, c), (d, e, f)))
    outside = (x < 0) | (x >= size) | (y < 0) | (y >= size)
    cubic = cubic.to(device, non_blocking=True).view(n, 1, 1)
    (left, across), (top, down) = (
        (whole.long(), _kernels(p - whole, cubic)) for p, whole in ((v - 0.5, (v - 0.5).floor()) for v in (x, y))
    )
    pixels, sums = images.flatten(2), torch.zeros(images.shape, device=device)
    for i, vertical in enumerate(down):
        row = (top + i - 1).clamp(0, size - 1) * size
        for j, horizontal in enumerate(across):
            place = (row + (left + j - 1).clamp(0, size - 1)).view(n, 1, -1).expand(-1, 3, -1)
            sums += (vertical * horizontal)[:, None] * pixels.gather(2, place).view_as(sums)
    fill = torch.tensor(FILL, dtype=torch.uint8).to(device, non_blocking=True).view(1, 3, 1, 1)
    return torch.where(
        outside[:, None], fill, (sums + 1 / 256).clamp_(0, 255).byte()
    )  # sums in float32: whole ones may be a little less


def _kernels(distance, cubic):
    return [torch.where(cubic, *both) for both in zip(_weights(distance, True), _weights(distance, False), strict=True)]


def _affine(name, value, size):
    """The map from an output pixel to its source, as PIL's transform takes it."""
    if name == "Rotate":
        return _rotation(value, size)
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    along = value * size if name.endswith("Rel") else value
    if name.startswith("Shear"):
        return (a, value, c, d, e, f) if "X" in name else (a, b, c, value, e, f)
    return (a, b, along, d, e, f) if "X" in name else (a, b, c, d, e, along)


DEVICE_OPS = {
    WARPS: _warps,
    TABLES: _tables,
    COLOURS: _colours,
    ("Contrast", "ContrastIncreasing"): _contrasts,
    ("Sharpness", "SharpnessIncreasing"): _sharpnesses,
    ("AutoContrast",): _autocontrasts,
    ("Equalize",): _equalizes,
}


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

    With data.rand_augment_on "device" the images of a batch are on `device`, RandAugment applied, drawn as on the CPU.
    """

    def __init__(self, data, *, seed, batch_size, batch_size_per_process, rank=0, world=1, workers=0, pin=False, device="cpu"):
        if batch_size % (batch_size_per_process * world):
            raise DataError(
                f"batch_size {batch_size} is not a multiple of {world} processes x batch_size_per_process "
                f"{batch_size_per_process}: launch another number of processes or change batch_size_per_process"
            )
        self.data, self.seed, self.per_process, self.rank, self.world = data, seed, batch_size_per_process, rank, world
        self.batch_size, self.accumulate = batch_size, batch_size // (batch_size_per_process * world)
        self.workers, self.pin, self.device, self.broken = workers, pin, device, {}
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
        if data.rand_augment_on == "device":
            unknown = [op.name for op in _without_rand_augment(train_transform(data))[1].ops if op.name not in OPS]
            if unknown:
                told = f"data.rand_augment {data.rand_augment!r} has {', '.join(unknown)}"
                raise DataError(f"{told}, which the device cannot do: set data.rand_augment_on to 'cpu'")
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
                images, labels, index, *drawn, broken = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if death := dead_worker(error):
                    raise death from error
                raise
            self._count(broken)
            if drawn:
                images = rand_augment(images.to(self.device, non_blocking=True), *drawn)
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
    """Batches of crops, from `row(what) -> (undecoded row, id)` and `name(what)`, the id under which it may be broken."""

    def __init__(self, loader):
        self.data, self.seed, self.ids = loader.data, loader.seed, loader.split.ids
        self.per_process = loader.per_process

    @functools.cached_property  # made in the process that uses it: its memory is its own
    def views(self):
        return (_FastViews if self.data.pipeline == "fast" else _TimmViews)(self.data, self.per_process)

    def batch(self, keys):
        """(images, labels, index, what `rand_augment` needs if that is on the device, {id: reason} of broken images) for
        keys (epoch, repeat, what).

        An image is decoded once for its crops, which are neighbours. The place of a broken one goes to the next good one of
        the batch, as a crop with a number that no other has: nothing depends on other batches, workers or what came before.
        """
        samples, broken = [], {}
        for what, group in itertools.groupby(keys, key=lambda key: key[2]):
            numbers = [key[:2] for key in group]
            try:
                samples += self._crops(what, numbers)
            except BrokenImage as error:
                broken[self.name(what)] = str(error)
                samples += [None] * len(numbers)
        if not any(samples):
            reasons = _first(list(broken.values()))
            raise DataError(f"{self.data.source}: none of the {len(keys)} images of a batch can be decoded\n{reasons}")
        good = [i for i, sample in enumerate(samples) if sample]
        for i in set(range(len(keys))).difference(good):
            epoch, _, what = keys[min(good, key=lambda g: (g - i) % len(keys))]
            (samples[i],) = self._crops(what, [(epoch, self.data.repeats + i)])
        images, *rest = default_collate(samples)
        return (self.views.channels_first(images), *rest, broken)

    def _crops(self, what, numbers):
        """[(image, label, id) and what is drawn for the device] of one image, one for each (epoch, repeat)."""
        row, index = self.row(what)
        named, image, label = _undecoded(row, index, self.data, self.ids)
        seeds = [seed_of(self.seed, epoch, index, repeat) for epoch, repeat in numbers]
        views = self.views(image, index, seeds, functools.partial(_broken, named, image))
        return [(view, label, index, *drawn) for view, *drawn in views]


class _Images(_Crops, Dataset):
    """Whole batches by lists of (epoch, repeat, row number)."""

    def __init__(self, loader):
        super().__init__(loader)
        self.rows = loader.split.rows

    def __getitem__(self, keys):
        own = list(dict.fromkeys(index for *_, index in keys))
        columns = self.rows[own]  # a third of the time of row by row
        self.read = {i: dict(zip(columns, values, strict=True)) for i, *values in zip(own, *columns.values(), strict=True)}
        return self.batch(keys)

    def row(self, index):
        return self.read[index], index

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

    def row(self, row):
        return row, _checksum(_image(row, self.data))

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


def test_loader(data, *, batch_size, rank=0, world=1, workers=0, pin=False, numbered=False, device=None):
    """Every image of the test split once over all processes (shares may differ in size), in a fixed order.

    `numbered`: the index of an image is the number in its file name, ILSVRC2012_val_00000001.JPEG, by which ImageNet-ReaL
    knows it; DataError for other names. `device`: where a resident set lies, for who evaluates more than once; None: nowhere.
    """
    if device is not None and data.resident and data.crop_pct == 1:
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
