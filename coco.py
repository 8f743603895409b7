"""COCO: a folder of images and annotations, checked; augmented samples; batches; average precision.

    split = Split(Path("coco"), "train2017", training=True)
    loader = TrainLoader(split, settings, rank=0, world=1, workers=2)
    for images, sizes, targets, index in loader.batches(seed=0, start=0, stop=10): ...

Images are uint8 [B, 3, H, W], padded with zeros to multiples of 32; sizes are their (height, width) without
the padding. A target holds `boxes` [N, 4] (x1, y1, x2, y2, in pixels of the padded image), `labels` [N] (from
1 on, in the order of the category ids), `masks` uint8 [N, h, w] at the size of the file, flipped as the
image but neither cropped nor resized, and `to_mask` [4], which maps pixels of the image to pixels of its
masks: x * to_mask[0] + to_mask[2], y * to_mask[1] + to_mask[3].
"""

import concurrent.futures
import contextlib
import functools
import io
import json
import os
import random
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pycocotools.mask
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from tqdm import tqdm
from typing_extensions import NotRequired, TypedDict  # noqa: UP035  pydantic needs it before Python 3.12

import augment
import recipe
from sources import DataError
from workers import Loader

STRIDE = 32  # of the deepest map: sides of batches are multiples of it
METRICS = tuple(
    f"{m}_{kind}" for kind in ("box", "mask") for m in ("ap", "ap50", "ap75", "aps", "apm", "apl")
)
LAYOUT = (
    "expected COCO's layout: train2017/ and val2017/ with the images, annotations/instances_train2017.json "
    "and annotations/instances_val2017.json; name the folder with --data"
)


@recipe.section
class Crop:
    """For a share of the images: short side resized to one of short_sides, a window cut, and that resized."""

    share: recipe.Share
    short_sides: recipe.NonEmpty[recipe.Pixels]
    window: recipe.Pair[recipe.Pixels]  # least and largest side of the window, each side drawn alone


@recipe.section
class Data:
    source: recipe.Text  # the folder; `--data DIR` sets it
    short_sides: recipe.NonEmpty[recipe.Pixels]  # training: one is drawn for each image
    long_side: recipe.Pixels  # the aspect is kept: the short side gets smaller where this would be exceeded
    test_short_side: recipe.Pixels
    crop: Crop | None
    hflip: recipe.Share
    streaming: ClassVar[bool] = False  # what checkpoints ask of the data of any run


# ---------------------------------------------------------------- the folder, checked


class _Image(TypedDict):
    id: recipe.Whole
    file_name: str
    width: recipe.Count
    height: recipe.Count


class _Runs(TypedDict):
    size: list[recipe.Whole]
    counts: list[recipe.Whole] | str


class _Annotation(TypedDict):
    id: recipe.Whole
    image_id: recipe.Whole
    category_id: recipe.Whole
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    area: FiniteFloat
    iscrowd: Literal[0, 1]
    segmentation: NotRequired[list[list[FiniteFloat]] | _Runs]


class _Category(TypedDict):
    id: recipe.Whole
    name: str


class _File(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


_FILE = TypeAdapter(_File)


class Split:
    """One split of a COCO folder. DataError names what is missing or wrong in it.

    training: crowds, boxes of less than a pixel and images without objects are left out; else all images
    are kept, and `truth` is what `average_precision` compares with. The annotations of training are one
    array of bytes, which worker processes share: Python objects are five times as large, and each process
    would copy them. Process `rank` of `world` compares the headers of its share of the images.
    """

    def __init__(self, folder, name, *, training, rank=0, world=1):
        self.folder, self.file = Path(folder) / name, Path(folder) / "annotations" / f"instances_{name}.json"
        for path, exists in ((self.folder, os.path.isdir), (self.file, os.path.isfile)):
            if not exists(path):
                raise DataError(f"{path}: not found; {LAYOUT}")
        tree = read(self.file)
        self.names = [category["name"] for category in tree["categories"]]
        self.category_ids = [category["id"] for category in tree["categories"]]
        self.truth = None if training else COCO()
        if self.truth is not None:
            self.truth.dataset = tree
            with contextlib.redirect_stdout(io.StringIO()):
                self.truth.createIndex()
        objects = {image["id"]: [] for image in tree["images"]}
        for annotation in tree["annotations"] if training else ():
            if not annotation["iscrowd"] and min(annotation["bbox"][2:]) >= 1 and annotation["area"] > 0:
                label = 1 + self.category_ids.index(annotation["category_id"])
                objects[annotation["image_id"]].append(
                    [label, annotation["bbox"], annotation["segmentation"]]
                )
        self.images = [image for image in tree["images"] if objects[image["id"]] or not training]
        written = [json.dumps(objects[image["id"]]).encode() for image in self.images]
        self.bytes = np.frombuffer(b"".join(written), np.uint8)
        self.offsets = np.cumsum([0, *map(len, written)])
        self.is_wide = np.array([image["width"] > image["height"] for image in self.images])
        self.check_images(self.images[rank::world])

    def __len__(self):
        return len(self.images)

    def objects(self, i):
        """[label, [x, y, width, height], segmentation] of the objects of an image."""
        return json.loads(self.bytes[self.offsets[i] : self.offsets[i + 1]].tobytes())

    def check_images(self, images):
        """DataError for images that are missing or that have another size than the JSON file says."""
        there = set(os.listdir(self.folder))
        for image in images:
            if image["file_name"] not in there:
                raise DataError(f"{self.folder / image['file_name']}: not found; {self.file} names it")
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            disable = None if len(images) > 10_000 else True  # seconds for all of COCO
            sizes = pool.map(self.size_in_file, images)
            for image, size in tqdm(zip(images, sizes, strict=True), "images", len(images), disable=disable):
                if size != (wanted := (image["width"], image["height"])):
                    raise DataError(
                        f"{self.folder / image['file_name']}: {size[0]}x{size[1]} pixels, {self.file} says "
                        f"{wanted[0]}x{wanted[1]}: the image and the file must be of one release"
                    )

    def size_in_file(self, image):
        path = self.folder / image["file_name"]
        try:
            with Image.open(path, formats=augment.FORMATS) as opened:
                return opened.size
        except Exception as error:  # PIL raises anything from SyntaxError to struct.error
            raise DataError(f"{path}: cannot be decoded: {error}") from None

    def decoded(self, i):
        """The image as RGB; DataError names its file."""
        path = self.folder / self.images[i]["file_name"]
        try:
            return augment.decode(path.read_bytes())
        except (OSError, DataError) as error:
            raise DataError(f"{path}: {error}") from None


def read(file):
    """The JSON of instances_*.json, checked, its categories in the order of their ids; else DataError."""
    try:
        tree = _FILE.validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"])) or "the file"
        raise DataError(f"{file}: {place}: {fault['msg']}: expected COCO's instances_*.json") from None
    tree["categories"].sort(key=lambda category: category["id"])
    sizes, known = {}, {category["id"] for category in tree["categories"]}
    for image in tree["images"]:
        if image["id"] in sizes:
            raise DataError(f"{file}: image id {image['id']} stands there twice")
        if Path(image["file_name"]).name != image["file_name"]:
            raise DataError(f"{file}: image {image['id']}: {image['file_name']!r} is not the name of a file")
        sizes[image["id"]] = image["height"], image["width"]
    if not sizes or len(known) < len(tree["categories"]) or not known:
        raise DataError(f"{file}: expected images and categories, each category with an id of its own")
    for annotation in tree["annotations"]:
        if annotation["image_id"] not in sizes:
            problem = f"image id {annotation['image_id']} is not among the images"
        elif annotation["category_id"] not in known:
            problem = f"category id {annotation['category_id']} is not among the categories"
        else:
            problem = _problem_of(annotation.get("segmentation"), *sizes[annotation["image_id"]])
        if problem:
            raise DataError(f"{file}: annotation {annotation['id']}: {problem}")
    return tree


def _problem_of(segmentation, height, width):
    """What is wrong with a segmentation, polygons or run lengths, of an image; None if nothing is."""
    if not segmentation:
        return "no segmentation: masks are trained and evaluated, so every object needs one"
    if isinstance(segmentation, list):
        good = all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)
        return None if good else "segmentation: expected polygons of 3 and more points, [[x, y, x, y, ...]]"
    if segmentation["size"] != [height, width]:
        return f"segmentation: size is {segmentation['size']}, the image's is {[height, width]}"
    counts = segmentation["counts"]
    if isinstance(counts, str):
        with contextlib.suppress(ValueError, MemoryError):
            pycocotools.mask.decode(segmentation)
            return None
    elif sum(counts) == height * width:
        return None
    return "segmentation: counts are not the run lengths of the image"


def rasterized(segmentation, height, width):
    """uint8 mask [height, width] of a segmentation, as pycocotools draws it."""
    runs = segmentation
    if isinstance(segmentation, list):
        runs = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = pycocotools.mask.frPyObjects(segmentation, height, width)
    return pycocotools.mask.decode(runs)


# ---------------------------------------------------------------- one image


def resized(width, height, short_side, long_side):
    """(width, height) with the aspect kept and the short side as wanted, unless the long side is too long."""
    scale = min(short_side / min(width, height), long_side / max(width, height))
    return int(width * scale + 0.5), int(height * scale + 0.5)


def training_sample(split, i, data, seed):
    """(image uint8 [3, h, w], target) of an image; flip, window and size are drawn from `seed` alone.

    Boxes that keep less than a pixel in the window are dropped, so a target may be empty. The window of
    `data.crop` is cut and resized in one step, from the pixels of the file.
    """
    chance = random.Random(seed)
    image, objects = split.decoded(i), split.objects(i)
    width, height = image.size
    masks = np.stack([rasterized(segmentation, height, width) for _, _, segmentation in objects])
    corners = np.array([[x, y, x + w, y + h] for _, (x, y, w, h), _ in objects])
    if chance.random() < data.hflip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        masks = masks[:, :, ::-1]
        corners = np.stack([width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], 1)
    window = 0, 0, width, height
    if data.crop and chance.random() < data.crop.share:
        window = crop_window(width, height, data, chance)
    left, top, right, bottom = window
    size = resized(right - left, bottom - top, chance.choice(data.short_sides), data.long_side)
    image = image.resize(size, Image.Resampling.BILINEAR, box=window)
    to_mask = np.array([(right - left) / size[0], (bottom - top) / size[1], left, top])
    corners = (corners - np.tile(to_mask[2:], 2)) / np.tile(to_mask[:2], 2)
    corners = corners.clip(0, np.tile(size, 2))
    kept = (corners[:, 2:] - corners[:, :2]).min(1) >= 1
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), {
        "boxes": torch.tensor(corners[kept], dtype=torch.float32),
        "labels": torch.tensor([label for label, _, _ in objects])[kept],
        "masks": torch.from_numpy(np.ascontiguousarray(masks[kept])),
        "to_mask": torch.tensor(to_mask, dtype=torch.float32),
    }


def crop_window(width, height, data, chance):
    """(left, top, right, bottom) in pixels of the file: mmdetection's RandomCrop "absolute_range"."""
    low, high = data.crop.window
    sides = resized(width, height, chance.choice(data.crop.short_sides), data.long_side)
    starts, ends = [], []
    for length, side in zip((width, height), sides, strict=True):
        cut = chance.randint(min(side, low), min(side, high))
        start = chance.randint(0, side - cut)
        starts.append(start * length / side)
        ends.append(min((start + cut) * length / side, length))
    return *starts, *ends


def padded(images):
    """(uint8 [B, 3, H, W], sizes) of images, each in the upper left corner of its place."""
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (-(-max(sides) // STRIDE) * STRIDE for sides in zip(*sizes, strict=True))
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


# ---------------------------------------------------------------- batches


def batches_of_epoch(is_wide, size, seed, epoch):
    """Image numbers in batches of `size`: each image at most once, wide and tall images apart.

    Batches need less padding so. The last few batches are mixed, and images that do not fill one are left
    out: other images in every epoch.
    """
    batches, waiting = [], {True: [], False: []}
    for i in np.random.default_rng(augment.seed_of(seed, epoch)).permutation(len(is_wide)):
        group = waiting[bool(is_wide[i])]
        group.append(int(i))
        if len(group) == size:
            batches.append(group.copy())
            group.clear()
    rest = waiting[True] + waiting[False]
    return batches + [rest[i : i + size] for i in range(0, len(rest) - size + 1, size)]


class TrainLoader:
    """The training batches of one process; the same for any number of workers and of processes.

    A step is `batch_size` images: `accumulate` batches here, of `per_process` images each.
    """

    def __init__(self, split, settings, *, rank, world, workers, pin=False):
        self.pin = pin
        self.split, self.settings, self.rank, self.world, self.workers = split, settings, rank, world, workers
        self.per_process = settings.batch_size_per_process
        self.parts, rest = divmod(settings.batch_size, self.per_process)
        self.accumulate, uneven = divmod(self.parts, world)
        if rest or uneven:
            raise DataError(
                f"batch_size {settings.batch_size} is not a multiple of {world} processes x "
                f"batch_size_per_process {self.per_process}: launch another number of processes or change it"
            )
        self.size, self.broken = len(split), {}
        self.steps_per_epoch = self.size // settings.batch_size
        if not self.steps_per_epoch:
            raise DataError(
                f"{split.folder}: {self.size} images with objects are less than batch_size, "
                f"{settings.batch_size}"
            )

    def batches(self, seed, start, stop):
        """(images, sizes, targets, index int64 [B]) of steps start..stop-1, `accumulate` for each step."""
        samples = _Samples(self.split, functools.partial(self.sample, seed))
        order = self.order(seed, start, stop)
        loader = Loader(
            samples, batch_size=None, sampler=order, num_workers=self.workers, pin_memory=self.pin
        )
        return iter(loader)

    def order(self, seed, start, stop):
        known = None
        for step in range(start, stop):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != known:
                known = epoch
                batches = batches_of_epoch(self.split.is_wide, self.per_process, seed, epoch)
            for part in range(self.rank, self.parts, self.world):
                yield [(epoch, i) for i in batches[step_of_epoch * self.parts + part]]

    def sample(self, seed, keys):
        seeds = [augment.seed_of(seed, epoch, self.split.images[i]["id"]) for epoch, i in keys]
        data = self.settings.data
        samples = [training_sample(self.split, i, data, s) for (_, i), s in zip(keys, seeds, strict=True)]
        images, targets = zip(*samples, strict=True)
        return *padded(images), list(targets), torch.tensor([i for _, i in keys])


class _Samples(torch.utils.data.Dataset):
    """What a function makes of a key, in the processes of a loader."""

    def __init__(self, split, function):
        self.split, self.function = split, function

    def __len__(self):
        return len(self.split)

    def __getitem__(self, key):
        return self.function(key)


def test_loader(split, data, *, rank, world, workers, limit=None):
    """(image uint8 [1, 3, H, W], sizes, number) of this process's share of the images, at most `limit`.

    One image at a time: in a batch its scores would depend on the padding that the other images need.
    """
    share = range(rank, len(split), world)[:limit]
    return Loader(
        _Samples(split, functools.partial(_test_sample, split, data)),
        batch_size=None,
        sampler=share,
        num_workers=workers,
    )


def _test_sample(split, data, i):
    image = split.decoded(i)
    image = image.resize(
        resized(*image.size, data.test_short_side, data.long_side), Image.Resampling.BILINEAR
    )
    return *padded([torch.from_numpy(np.array(image)).permute(2, 0, 1)]), i


# ---------------------------------------------------------------- predictions and their average precision


def predictions(split, i, boxes, scores, labels, masks):
    """COCO's list of the detections of an image.

    boxes: [N, 4] in pixels of the file; masks: bool [N, height, width] of the file.
    """
    result = []
    for (x, y, right, bottom), score, label, mask in zip(
        boxes.tolist(), scores.tolist(), labels.tolist(), masks.numpy(), strict=True
    ):
        runs = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
        result.append(
            {
                "image_id": split.images[i]["id"],
                "category_id": split.category_ids[label - 1],
                "bbox": [round(value, 2) for value in (x, y, right - x, bottom - y)],
                "score": float(f"{score:.6g}"),
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode("ascii")},
            }
        )
    return result


def average_precision(truth, found, image_ids):
    """METRICS in per cent, by pycocotools, of predictions for these images; None without such objects.

    truth: a COCO; found: as `predictions` gives. Small, medium and large are the areas of boxes for _box,
    of masks for _mask.
    """
    scores = []
    for kind in ("bbox", "segm"):
        results = COCO()
        results.dataset = {key: truth.dataset[key] for key in ("images", "categories")}
        results.dataset["annotations"] = [_result(i, one, kind) for i, one in enumerate(found, 1)]
        with contextlib.redirect_stdout(io.StringIO()):
            results.createIndex()
            evaluation = COCOeval(truth, results, kind)
            evaluation.params.imgIds = sorted(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        scores += [None if value < 0 else 100 * float(value) for value in evaluation.stats[:6]]
    return dict(zip(METRICS, scores, strict=True))


def _result(number, one, kind):
    """A prediction as COCO.loadRes completes it; numbers begin at 1, because 0 means "not matched"."""
    if kind == "bbox":
        area = one["bbox"][2] * one["bbox"][3]
    else:
        area = float(pycocotools.mask.area(one["segmentation"]))
    return {key: one[key] for key in ("image_id", "category_id", "score", "bbox", "segmentation")} | {
        "id": number,
        "area": area,
        "iscrowd": 0,
    }
