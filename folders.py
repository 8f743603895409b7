"""Class folders of images: their splits, classes and files, listed in seconds and without a cache.

    photos/train/cat/1.jpg, photos/val/cat/2.jpg   splits train and validation
    photos/cat/1.jpg                               one split, train

An image belongs to the folder directly below its split, however deep it lies: train/CLASS/images/1.jpg. Other
folders (parquet or tar files, a table of metadata beside the images) are left to `datasets`, which is slow
here: it takes minutes for 60,000 files.
"""

import functools
import itertools
import os

import datasets
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

# Names of the folders of splits -> names of splits, as `datasets` has them.
SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation"}
SPLITS |= {"validation": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test"}
TABLES = ("metadata.csv", "metadata.jsonl", ".parquet", ".arrow", ".tar")  # ends of names: no class folders


class DataError(ValueError):
    """The data cannot be used as the recipe says; the message says what was found and what to do."""


def is_image(file):
    return file[file.rfind(".") :].lower() in Image.registered_extensions()  # splitext is slow


@functools.lru_cache(maxsize=4)  # the splits and the recipes of a run open the same folders
def open_splits(root):
    """({split: Dataset with columns image and label}, {split: its files}, {split: its classes}).

    Classes are numbered in the order of their names, over all splits. Folders are listed once in a process.
    None for other folders than class folders; DataError for class folders that cannot be used as they are.
    """
    root = os.fspath(root)
    folders, files = _entries(root)
    if any(file.endswith(TABLES) for file in files):
        return None
    _refuse_loose(root, files)
    places = {}
    for name in folders:
        split = SPLITS.get(name.lower())
        if split in places:
            raise DataError(f"{places[split]}/ and {root}/{name}/ are both the split {split}: join them")
        if split:
            places[split] = os.path.join(root, name)
    if "train" not in places and len(places) < len(folders):
        places = {"train": root}  # the class folders themselves
    listed = {}
    for split, place in places.items():
        try:
            listed[split] = _classes(place)
        except DataError:
            if split != "test" or "validation" not in places:  # many data sets keep the labels of test/ back
                raise
    if not listed or not all(listed.values()):
        return None
    names = sorted({name for classes in listed.values() for name in classes})
    files = {split: list(itertools.chain(*classes.values())) for split, classes in listed.items()}
    rows = {split: _table(classes, files[split], names) for split, classes in listed.items()}
    return rows, files, {split: list(classes) for split, classes in listed.items()}


def _entries(folder, follow=True):
    """(names of folders, names of files), sorted, without hidden ones. follow: links to folders count."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith((".", "__")):
                (folders if entry.is_dir(follow_symlinks=follow) else files).append(entry.name)
    return sorted(folders), sorted(files)


def _classes(split):
    """{class: its files} of the folder of a split; {} where it is no folder of class folders."""
    folders, files = _entries(split)
    if any(file.endswith(TABLES) for file in files):
        return {}
    _refuse_loose(split, files)
    disable = os.environ.get("RANK", "0") != "0" or None  # None: in a log file, too
    bar = tqdm(folders, f"listing {split}", unit="class", delay=2, leave=False, disable=disable)
    classes = {name: _images(os.path.join(split, name)) for name in bar}
    filled = {name: images for name, images in classes.items() if images}
    if list(filled) == ["images"]:  # Tiny-ImageNet's val/images/1.jpg
        own = [os.path.relpath(file, split) for file in filled["images"]]
        _refuse_loose(split, [file for file in own if file.count(os.sep) == 1])
    if 1 < len(filled) < len(folders):
        empty = [name for name in folders if name not in filled]
        raise DataError(
            f"{split}/{empty[0]}: no images in this class folder ({len(empty)} of {len(folders)} have none; "
            "HEIC and SVG are not read): put images there or move the folder away"
        )
    return filled


def _refuse_loose(folder, files):
    """DataError for images beside class folders, or instead of them."""
    if loose := next(filter(is_image, files), None):
        raise DataError(
            f"{folder}: its images do not lie in class folders, as {loose}: put each into {folder}/CLASS/ or "
            "move them away (an annotations file beside them is not read)"
        )


def _images(folder):
    """The images below a folder: its own, then those of its folders, each sorted."""
    folders, files = _entries(folder, follow=False)  # a link to a folder above would have no end
    images = [os.path.join(folder, file) for file in files if is_image(file)]
    for name in folders:
        images += _images(os.path.join(folder, name))
    return images


def _table(classes, files, names):
    """A Dataset from Arrow columns: encoding a million paths one by one would take a minute."""
    ids = {name: i for i, name in enumerate(names)}
    labels = [ids[name] for name, images in classes.items() for _ in images]
    columns = [pa.nulls(len(files), pa.binary()), pa.array(files, pa.string())]
    image = pa.StructArray.from_arrays(columns, ["bytes", "path"])
    kinds = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)}
    features = datasets.Features(kinds)
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())}, features.arrow_schema)
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint="class-folders")
