"""Where images come from: a split of a data set, its files and its classes. Nothing is decoded here.

    split = open_split(data, data.train_split)
    image = encoded(split.rows[0], 0, data, split)  # its name, bytes and class id

`data` is the section of a recipe, or any object with the fields that a function reads.
"""

import contextlib
import dataclasses
import functools
import os
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

import class_names
import folders
from folders import DataError
from recipe import nearest, printable

DIGITS_TRAIN = 898  # of scikit-learn's 1,797 digits
TEST_SPLITS = ("validation", "test")  # the first that is there
HELD_OUT, HELD_OUT_SHARE = "held out", 0.1  # a test split that is a share of each class of the training split
FRACTION_SEED = 0  # fixed: if runs drew their own images, the spread over seeds would contain that choice
MAX_BYTES = 256 * 2**20  # of one image's file: a larger one is a mistake, or a device that never ends
READ_ROWS = 32  # at once, of a stream
REASONS_SHOWN = 20  # of broken images in an error message


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a source, images undecoded."""

    rows: datasets.Dataset | datasets.IterableDataset  # memory-mapped, or a stream
    ids: list | None  # class id of each label of the source; None: the labels are the class ids
    names: list | None  # the classes by id, where the source names all of them
    files: list  # one file a shard; in image folders one file an image; none for "digits"
    beside: dict  # {split name: its files} of all splits of the source
    folders: dict  # {split name: its classes} of all splits, if the source is class folders
    openable: frozenset  # the files that a row may name instead of containing bytes: images, zip archives


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One image before decoding."""

    name: str  # for error messages
    path: str | None
    content: bytes  # of its file; b"" for an empty cell of a table
    label: int  # class id


# ---------------------------------------------------------------- a split


def resolved(data):
    """The section with the splits and the number of classes that it leaves to its source (null) filled in.

    The test split is validation or test, else a tenth of each class of the training split, HELD_OUT.
    """
    if data.train_split and data.test_split and data.classes:
        return data
    source = data.source
    splits, _, _ = _splits(source, data.streaming)
    train = data.train_split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    _check_split(source, train, splits)
    others = [name for name in TEST_SPLITS if name in splits and name != train]
    test = data.test_split or (others or [HELD_OUT])[0]
    names = _names_in(splits[train].features, data.label) or []
    if not (data.classes or names):
        raise DataError(
            f"{source}: no classes found: put each image into the folder of its class, CLASS/1.jpg; for a "
            "table with classes as numbers, set data.classes to their number"
        )
    if not data.classes and len(names) == 1:
        inner = os.path.join(source, names[0])
        hint = f"; if its folders are the classes, give --data {inner}" if os.path.isdir(inner) else ""
        raise DataError(f"{source}: one class found, {names[0]!r}, expected two or more class folders{hint}")
    classes = data.classes or len(names)
    return dataclasses.replace(data, train_split=str(train), test_split=str(test), classes=classes)


def open_split(data, name):
    """The `Split` of `data.source` called `name`; a stream where `data.streaming`.

    With the test split HELD_OUT, the training split is what is left of its images.

    `data.source`: a data set on the Hugging Face hub, "digits", or a folder of parquet files, of webdataset
    tar files or of images in class folders. `data.classes` None: as many as it names. Raises DataError for a
    split or column that is not there, with the nearest one that is, and for another number of classes.
    """
    source = data.source
    splits, files, class_folders = _splits(source, data.streaming)
    if data.test_split == HELD_OUT and name in (HELD_OUT, data.train_split):
        splits = splits | _held_out(splits, data)
        files = {HELD_OUT: files.get(data.train_split, [])} | files
    _check_split(source, name, splits)
    rows = splits[name]
    for column in (data.image, data.label):
        if rows.column_names and column not in rows.column_names:
            hint, known = nearest(column, rows.column_names), ", ".join(rows.column_names)
            raise DataError(f"{source}: no column {column!r}{hint} (columns: {known})")

    ids = None
    names = _names_in(rows.features, data.label)
    if names:
        classes = data.classes or len(names)
        with named(source):
            ids = class_names.class_ids(names, classes)
        names = [name for _, name in sorted(zip(ids, names, strict=True))] if len(names) == classes else None

    # undecoded: `datasets` ends a stream without an error at the first image that it cannot decode
    rows = rows.select_columns([data.image, data.label])
    rows = rows.cast_column(data.image, datasets.Image(decode=False))
    listed = files.get(name, [])
    return Split(rows, ids, names, listed, files, class_folders, _openable(listed))


def _check_split(source, name, splits):
    if name not in splits:
        known = ", ".join(map(str, splits))
        raise DataError(f"{source}: no split {name!r}{nearest(name, splits)} (splits: {known})")


def _held_out(splits, data):
    """{the training split, HELD_OUT}: the rows of the training split, parted by class."""
    rows = splits.get(data.train_split)
    if not isinstance(rows, datasets.Dataset):
        raise DataError(f"{data.source}: test images can be held out of a memory-mapped training split only")
    labels = labels_of(rows, data)
    labels_seen, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        names, label = _names_in(rows.features, data.label), int(labels_seen[counts.argmin()])
        raise DataError(
            f"{data.source}: class {names[label] if names else label!r} has one image: no test image can be "
            "held out of it; add images, or a folder val/ beside train/"
        )
    held = share_of_each_class(labels, HELD_OUT_SHARE)
    rest = np.setdiff1d(np.arange(len(rows)), held)
    return {data.train_split: rows.select(rest), HELD_OUT: rows.select(held)}


def _splits(source, streaming):
    """({split name: rows}, {split name: its files}, {split name: its class folders}) of a source."""
    if source == "digits":
        splits = _digits()
        if streaming:
            splits = {name: rows.to_iterable_dataset(num_shards=8) for name, rows in splits.items()}
        return splits, {}, {}

    local = os.path.isdir(source)  # False, unlike pathlib's, for a name that is too long
    if not local and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):  # neither /photos nor ./photos
        raise DataError(
            f"{source}: not a folder, not a data set's name on the hub ('owner/name'), not 'digits'"
            f"{'; an archive must be unpacked' * os.path.isfile(source)}"
        )
    try:
        if local and (opened := folders.open_splits(source)):
            return opened
        builder = datasets.load_dataset_builder(source)
        data_files = builder.config.data_files or {}
        files = {str(name): [str(file) for file in listed] for name, listed in data_files.items()}
        if streaming:
            return builder.as_streaming_dataset(), files, {}
        builder.download_and_prepare()
        return builder.as_dataset(), files, {}
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = "to work offline, download its parquet files and pass their folder with --data DIR"
        if local:
            hint = "expected class folders, CLASS/1.jpg, or parquet files; archives must be unpacked"
        reason = error.__cause__ or error
        raise DataError(f"{source}: cannot be loaded as images: {reason}; {hint}") from error


@functools.cache
def _digits():
    """scikit-learn's bundled handwritten digits, 8x8 pixels of 16 greys, as a data set: nothing to download.

    The split is that of scikit-learn's own classification example: first half and second half.
    """
    from sklearn.datasets import load_digits  # a second of import that other sources do not need

    digits = load_digits()
    columns = {
        "image": [Image.fromarray(np.uint8(image * 255 / 16)) for image in digits.images],
        "label": digits.target.tolist(),
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    return {"train": rows.select(range(DIGITS_TRAIN)), "test": rows.select(range(DIGITS_TRAIN, len(rows)))}


def is_image_folder(files):
    """Whether a split's files are images, sorted by class as in class folders."""
    return bool(files) and folders.is_image(files[0])


def _openable(files):
    """Images and zip archives among a split's files, by their listed and by their downloaded paths."""
    listed = [file for file in files if folders.is_image(file) or file.endswith(".zip")]
    on_hub = [re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)", file) for file in listed]
    parts = [match.groups() for match in on_hub if match]
    cached = functools.partial(huggingface_hub.try_to_load_from_cache, repo_type="dataset")
    return frozenset([*listed, *(cached(name, path, revision=commit) for name, commit, path in parts)])


@functools.cache
def evaluation_fields(source):
    """The fields of a recipe's `data` that name a source's test images, for checkpoints without a recipe.

    Takes the split validation or test, or the only one there is; the first column of images; the first
    column of class labels, or else a webdataset's "cls". Raises DataError where one of them is not there.
    """
    splits, files, _ = _splits(str(source), streaming=True)
    known = [name for name in TEST_SPLITS if name in splits]
    split = str((known or list(splits))[0])
    if not known and len(splits) > 1:
        raise DataError(f"{source}: no split called validation or test (splits: {', '.join(splits)})")

    features = splits[split].features or {}
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += ["cls"] if "cls" in features else []
    if not images or not labels:
        known = ", ".join(features)
        raise DataError(f"{source}: no column of images or none of class labels (columns: {known})")
    return {
        "test_split": split,
        "image": images[0],
        "label": labels[0],
        "classes": getattr(features[labels[0]], "num_classes", None),
        # an image folder is one shard, which one worker would decode alone; its index is quickly made
        "streaming": not is_image_folder(files.get(split)),
    }


# ---------------------------------------------------------------- one row


def encoded(row, index, data, split):
    """The `Encoded` image of a row of `split.rows`; errors name it by `index` and its path.

    Raises DataError for a label that is not a class, and for a file that cannot be read, is too large or is
    not the source's: the path in a cell without bytes comes from whoever made the table, and could name any
    file of this machine and any address, so only files that the source lists are opened.
    """
    cell = _cell(row, data)
    path, label = cell["path"], row[data.label]
    name = f"image {index} ({printable(path or 'no file name')})"
    labels = range(data.classes if split.ids is None else len(split.ids))
    if not isinstance(label, int) or label not in labels:
        raise DataError(f"{name}: label {label!r} is not in 0..{len(labels) - 1}")

    content = cell["bytes"]
    if content is None and path is not None:
        member, _, archive = path.partition("::")
        if (archive if member.startswith("zip://") else path) not in split.openable:
            raise DataError(
                f"{name}: its row has a path, which is not one of the files of {data.source}, and no bytes: "
                "a table must contain the bytes of its images"
            )
        content = _read(path, name)
    return Encoded(name, path, content or b"", label if split.ids is None else split.ids[label])


def checksum(row, data):
    """CRC-32 of an image's bytes, or of its path where the row has none: the same for any sharding."""
    cell = _cell(row, data)
    if cell["bytes"] is not None:
        return zlib.crc32(cell["bytes"])
    return zlib.crc32((cell["path"] or "").encode(errors="surrogateescape"))


def _cell(row, data):
    return row[data.image] or {"bytes": None, "path": None}  # None: an empty cell of a table


def _read(path, name):
    try:
        # fsspec would take "::" in the name of a file on this disk for a chain of addresses
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except Exception as error:  # whatever the file system in between raises
        raise DataError(f"{name} cannot be read: {error!r}") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{name} has more than {MAX_BYTES:,} bytes: remove it from the data set")
    return content


@contextlib.contextmanager
def named(what):
    """Errors about an image or a source begin with its name."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{what}: {error}") from error.__cause__


def nothing_decoded(source, n, broken):
    """The DataError for a batch of `n` images of which all are broken; {number: reason}."""
    return DataError(f"{source}: none of the {n} images of a batch can be decoded\n{reasons(broken)}")


def reasons(broken):
    """The first REASONS_SHOWN lines of {number: reason}."""
    return "\n".join(list(broken.values())[:REASONS_SHOWN])


def shard_rows(split, shard, source):
    """The rows of one shard of a stream; DataError where it cannot be read."""
    with readable(source):
        # .iter, because __iter__ in a worker process would divide this one shard among the workers again
        for columns in split.rows.shard(split.rows.num_shards, shard).iter(batch_size=READ_ROWS):
            yield from rows_of(columns)


@contextlib.contextmanager
def readable(source):
    """A truncated or foreign file of a source is a DataError, whatever the reader in between raises."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{source}: a file cannot be read: {reason}") from error


def rows_of(columns):
    """{column: values} -> {column: value} for each row."""
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


# ---------------------------------------------------------------- classes


def check_classes(data, split):
    """DataError if the files of the training and the test split do not name the same classes.

    `datasets` makes one list of classes from the folders of all splits, and takes the list of the first
    parquet file for all of them. `split`: either of the two.
    """
    wanted = (data.train_split, data.test_split)
    train, test = (_declared_classes(split, name, data.label) for name in wanted)
    if train and test:
        with named(data.source):
            class_names.check_same(train, test, *wanted)


def _declared_classes(split, name, label):
    """The classes by the files of a split: folders, the list in its first parquet file, or None."""
    files = split.beside.get(name)
    if name in split.folders:
        return split.folders[name]
    if is_image_folder(files):
        declared = sorted({file.rsplit("/", 2)[-2] for file in files})
        known = _names_in(split.rows.features, label) or ()
        return declared if set(declared) <= set(known) else None  # else a table beside the images has them
    if files and files[0].endswith(".parquet") and Path(files[0]).is_file():
        with readable(files[0]):
            return _names_in(datasets.Features.from_arrow_schema(pq.read_schema(files[0])), label)
    return None


def _names_in(features, label):
    return getattr((features or {}).get(label), "names", None)


# ---------------------------------------------------------------- numbers of images


def shard_lengths(split):
    """Images in each shard of a streamed split; None where its files do not tell (tar files on the hub)."""
    shards = split.rows.num_shards
    if not split.files:  # digits
        return [sum(1 for _ in split.rows.shard(shards, i)) for i in range(shards)]
    countable = [
        f for f in split.files if f.endswith(".parquet") or (f.endswith(".tar") and Path(f).is_file())
    ]
    if len(split.files) != shards or countable != split.files:
        return None
    with ThreadPoolExecutor(16) as pool:  # on the hub each footer is a request
        return list(pool.map(_rows_in, split.files))


def _rows_in(file):
    """Rows of a parquet file, or samples of a webdataset shard: names that agree up to the first dot."""
    with readable(file):
        if file.endswith(".tar"):
            with tarfile.open(file) as tar:
                return len({re.sub(r"\.[^/]*$", "", member.name) for member in tar if member.isfile()})
        with fsspec.open(file, "rb") as opened:
            return pq.read_metadata(opened).num_rows


def take_fraction(split, data):
    """The split with data.fraction of the rows of each class."""
    taken = share_of_each_class(labels_of(split.rows, data), data.fraction)
    return dataclasses.replace(split, rows=split.rows.select(taken))


def labels_of(rows, data):
    """The labels of memory-mapped rows as the source has them, an array [n]."""
    return rows.with_format("numpy", columns=[data.label])[:][data.label]


def share_of_each_class(labels, fraction):
    """Row numbers, ascending, of a share of each class of labels [n]: the rounded count, but at least one.

    One seed for all runs, so that seeds, recipes and machines compare on the same images; a smaller share
    is a part of a larger one. It depends on the order of the rows, which is the source's.
    """
    drawn = np.random.default_rng(FRACTION_SEED).random(len(labels))
    by_class = np.lexsort((drawn, labels))  # in a class by the number drawn: the lowest are taken
    _, start, count = np.unique(np.asarray(labels)[by_class], return_index=True, return_counts=True)
    place_in_class = np.arange(len(labels)) - np.repeat(start, count)
    taken = np.maximum(1, np.rint(fraction * count))
    return np.sort(by_class[place_in_class < np.repeat(taken, count)])
