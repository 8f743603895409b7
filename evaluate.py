"""Accuracy of a classifier: functions for the training loop, and a command line.

    python evaluate.py runs/quickstart                                 # a run's folder: all its students
    python evaluate.py runs/quickstart/students/kd --data DIR          # an exported student
    python evaluate.py resnet56.pth --model cifar_resnet56 --data DIR  # a checkpoint file of a timm model
    python evaluate.py runs/a1_res50_beitb resnet50.a1_in1k --on imagenet real v2 --data DIR --v2 DIR
    python evaluate.py runs/own_images --per-class --confusion confusion.csv
    python evaluate.py runs/own_images/students/kd --images cat.jpg folder/    # five best classes of each

Top-1 and top-5 in per cent and the number of images, as a table, or with --json as JSON. Every image counts
once, whatever the number of processes, and is decoded once for all checkpoints that want it prepared alike;
ImageNet and ImageNet-ReaL share their forward passes. How images are prepared is told on the error output.
The metric is a `Metric` of the Hugging Face package `evaluate`, offline.
"""

import argparse
import collections
import functools
import importlib.metadata
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":  # the imports below take seconds
    print(f"evaluate.py {' '.join(sys.argv[1:])}: loading PyTorch ...", file=sys.stderr)

import datasets
import numpy as np
import pandas as pd
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import ImageNetInfo, RealLabelsImagenet

import augment
import class_names
import data
import folders
import models
import recipe
import rundir
import sources

# Missing, the package would be noticed at the first evaluation, maybe in hours.
SITE_PACKAGES = str(importlib.metadata.distribution("evaluate").locate_file(""))


def import_hf_evaluate():
    """The package `evaluate`, although this file of the same name comes first on sys.path.

    The package imports itself by its absolute name, so no alias works; it needs it only while it is imported.
    """
    this_module = sys.modules.pop("evaluate", None)
    sys.path.insert(0, SITE_PACKAGES)
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path.remove(SITE_PACKAGES)
        sys.modules.pop("evaluate", None)
        if this_module is not None:
            sys.modules["evaluate"] = this_module


@functools.cache
def top_k():
    """A `Metric`: per cent of rows with a right class among the first k of `predictions` (ids, best first).

    A row's reference is the list of its right classes: one, or with ImageNet-ReaL several. The class is made
    at its first use, because importing the package takes seconds: it brings scipy and audio code.
    """
    package = import_hf_evaluate()
    ids = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({"predictions": ids, "references": ids})

    class TopK(package.Metric):
        def _info(self):
            texts = dict(description=top_k.__doc__, citation="", inputs_description="")
            return package.MetricInfo(features=features, **texts)

        def _compute(self, predictions, references, ks=(1, 5)):
            rows = zip(predictions, references, strict=True)
            hits = np.array([np.isin(best, right) for best, right in rows])  # [n, largest k]
            return {f"top{k}": round(100 * float(hits[:, :k].any(axis=1).mean()), 4) for k in ks}

    return TopK


def accuracy(networks, loader, accelerator, limit=None):
    """[{"top1", "top5" in per cent, "n" images}] of each network: see `predict` for the arguments."""
    _, labels, best = predict(networks, loader, accelerator, limit)
    return [score(ids, [[label] for label in labels]) for ids in best]


@torch.no_grad()
def predict(networks, loader, accelerator, limit=None):
    """(index, label, five best class ids of each network) of the images of all processes, from one pass.

    networks: images in [0, 1] -> logits [B, K]; they are left in the mode they came in. `loader` yields
    (uint8 images, labels, index), each image on one process only; shares may differ in size. `limit`: batches
    to read, for a trial. Raises DataError where there are no images.
    """
    training = [network.training for network in networks]
    for network in networks:
        network.eval()
    rows = []
    for i, (images, labels, index) in enumerate(loader):
        if i == limit:
            break
        images = to_float(images, accelerator.device)
        best = []
        for network in networks:
            with accelerator.autocast():
                logits = network(images)
            # ids: 100 times smaller to gather than logits; float32: in bfloat16 ties would change the score
            best.append(logits.float().topk(min(5, logits.shape[1])).indices.tolist())
        rows += zip(index.tolist(), labels.tolist(), *best, strict=True)
    for network, mode in zip(networks, training, strict=True):
        network.train(mode)

    rows = gather_object(rows)  # shares of unequal size: nothing is padded, so nothing is counted twice
    if not rows:
        raise sources.DataError("there are no images to evaluate on")
    index, labels, *best = zip(*rows, strict=True)
    return index, labels, best


def score(best, right):
    """{"top1", "top5", "n"} of class ids (best first) against each image's right ones.

    Images without right ones do not count. With fewer than 5 classes "top5" is 100.
    """
    rows = [(b, r) for b, r in zip(best, right, strict=True) if r]
    if not rows:
        return {"top1": float("nan"), "top5": float("nan"), "n": 0}
    predictions, references = zip(*rows, strict=True)
    shares = top_k()(keep_in_memory=True).compute(predictions=predictions, references=references)
    return {**shares, "n": len(rows)}


def real_labels():
    """{number of an ImageNet validation image: its right classes, maybe none}: ImageNet-ReaL, from timm.

    Beyer et al., "Are we done with ImageNet?", 2020: 46,837 of the 50,000 images have labels.
    """
    names = {f"ILSVRC2012_val_{i:08d}.JPEG": i for i in range(1, 50_001)}
    return {names[name]: right for name, right in RealLabelsImagenet(list(names)).real_labels.items()}


def to_float(images, device):
    """uint8 images [B, 3, H, W] on the host -> float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def table(rows):
    """Dictionaries with equal keys -> an aligned text table; floats with two decimals."""
    frame = pd.DataFrame(rows, dtype=object)
    cells = frame.map(lambda value: f"{value:.2f}" if isinstance(value, float) else recipe.printable(value))
    return cells.to_string(index=False)


# ---------------------------------------------------------------- command line

IMAGENET = "ILSVRC/imagenet-1k"
V2 = "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz"
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")


# What data.test_loader reads of a recipe's `data`; equal for networks that can share a pass.
READ = "source train_split test_split image label classes streaming size crop_pct interpolation"
TestData = collections.namedtuple("TestData", READ)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    what = "a run's folder, an exported student, a .safetensors or .pth file, or timm's name of weights"
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help=what)
    add("--model", help="timm name of the network in a checkpoint file")
    add("--data", help="folder of the data set (parquet, or class folders), a name on the hub, or digits")
    sets = "ImageNet-1K validation, the same with ReaL labels, V2"
    add("--on", nargs="+", default=[], choices=("imagenet", "real", "v2"), help=sets)
    add("--v2", metavar="DIR", help="ImageNet-V2: its folder (class folders 0 to 999) or name on the hub")
    add("--size", type=int, help="pixels of the images (default: as in the training, else timm's)")
    add("--crop-pct", type=float, help="resize to size / crop_pct, then crop the centre (default: likewise)")
    add("--interpolation", choices=INTERPOLATIONS, help="of that resizing (default: likewise)")
    add("--batch-size", type=int, default=256, help="per process (default: 256)")
    add("--workers", type=int, default=2, help="loader processes per process (default: 2)")
    add("--images", nargs="+", default=[], metavar="FILE", help="images, or folders of them, to classify")
    add("--per-class", action="store_true", help="top-1 of each class instead of all images")
    add("--confusion", type=Path, metavar="FILE.csv", help="write how often each class was taken for which")
    add("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)

    accelerator = Accelerator()
    changes = {"size": args.size, "crop_pct": args.crop_pct, "interpolation": args.interpolation}
    choose = functools.partial(test_sets, source=args.data, on=args.on, v2=args.v2, changes=changes)
    try:
        if args.images:
            rows = classify(args.checkpoints, image_files(args.images), changes, accelerator.device)
        else:
            opened = (open_networks(path, args.model, choose) for path in args.checkpoints)
            networks = list(itertools.chain.from_iterable(opened))
            names = ("batch_size", "workers", "per_class", "confusion")
            options = {name: getattr(args, name) for name in names}
            rows = evaluate(networks, accelerator, is_imagenet=bool(args.on), **options)
    except (recipe.RecipeError, sources.DataError, models.ModelError, OSError) as error:
        accelerator.print(f"error: {recipe.printable(error)}", file=sys.stderr)
        sys.exit(2)
    accelerator.print(json.dumps(rows, indent=2) if args.json else table(rows))


def evaluate(networks, accelerator, *, is_imagenet, batch_size, workers, per_class=False, confusion=None):
    """One row of scores for each network and result. Networks that want the same images share one pass.

    networks: those of `open_networks`. per_class: rows for each class instead; confusion: a CSV file to
    write. How images are prepared, and where classes were matched by name, is told on the error output.
    """
    rows, passes, counts = [], {}, {}
    for name, network, sets in networks:
        for results, section in sets:
            section, ids = match_classes(name, network, section, is_imagenet)
            filled = [{"checkpoint": name, "data": result, "split": section.test_split} for result in results]
            passes.setdefault((results, section), []).append((network.to(accelerator.device), ids, filled))
            rows += filled
            for note in notes(network, section, ids):
                accelerator.print(f"{name}: {note}", file=sys.stderr)

    place = dict(rank=accelerator.process_index, world=accelerator.num_processes, workers=workers)
    for (results, section), members in passes.items():
        real = real_labels() if is_imagenet and "real" in results else None
        loader = data.test_loader(section, batch_size=batch_size, numbered=real is not None, **place)
        index, labels, best = predict([network for network, _, _ in members], loader, accelerator)
        for (network, ids, filled), answers in zip(members, best, strict=True):
            for row in filled:
                is_real = real and row["data"] == "real"
                right = [real[i] for i in index] if is_real else [[label] for label in labels]
                row.update(score(answers, [[ids[i] for i in one] for one in right]))
            if per_class or confusion:  # one number for each pair of classes
                key = filled[0]["checkpoint"], filled[0]["data"]
                right = [ids[label] for label in labels]
                counts[key] = confusions(network, right, [answer[0] for answer in answers])
    if confusion and accelerator.is_main_process:
        text = pd.concat(counts, names=["checkpoint", "data", "class"]).to_csv()
        rundir.write_atomic(confusion, text)
    if per_class:
        return [row for key, table_of_one in counts.items() for row in class_rows(*key, table_of_one)]
    return rows


def confusions(network, labels, answers):
    """A frame with the number of images of each class (rows) that were taken for each class (columns)."""
    names = class_names.of_network(network) or [str(i) for i in range(network.model.num_classes)]
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (np.array(labels), np.array(answers)), 1)
    return pd.DataFrame(counts, index=names, columns=names)


def class_rows(name, result, counts):
    """{"checkpoint", "data", "class", "n", "top1", "most often taken for"} of each class that has images."""
    rows = []
    for label, row in counts[counts.sum(axis=1) > 0].iterrows():
        wrong = row.drop(label)
        other = str(wrong.idxmax()) if wrong.sum() else ""
        top1 = 100 * float(row[label] / row.sum())
        counted = {"checkpoint": name, "data": result, "class": label, "n": int(row.sum()), "top1": top1}
        rows.append(counted | {"most often taken for": other})
    return rows


def image_files(paths):
    """The files among paths, and the images in the folders among them; DataError where there is nothing."""
    files = []
    for path in map(Path, paths):
        if not (path.is_file() or path.is_dir()):
            raise sources.DataError(f"--images {path}: no such file")
        images = (file for file in path.rglob("*") if folders.is_image(file.name))
        files += sorted(images) if path.is_dir() else [path]
    if not files:
        raise sources.DataError(f"--images {' '.join(paths)}: no images there")
    return files


@torch.no_grad()
def classify(paths, files, changes, device):
    """{"checkpoint", "image", "1" .. "5"}: the five most probable classes of each image, "cat 97.1 %"."""
    rows = []
    for path in paths:
        if not Path(path).is_dir():
            raise models.ModelError(f"{path}: --images needs an exported student's folder, with its classes")
        for folder in exported_students(Path(path)):
            network, config = models.load_exported(folder)
            network.to(device).eval()
            names = class_names.of_network(network) or [str(i) for i in range(network.model.num_classes)]
            prepared = preprocessing(str(folder), config, None, changes)
            transform = augment.test_transform(SimpleNamespace(**prepared))
            for file in files:
                with sources.named(file):
                    pixels = torch.as_tensor(transform(augment.decode(file.read_bytes())))
                shares, ids = network(to_float(pixels[None], device)).softmax(1)[0].topk(min(5, len(names)))
                best = zip(ids.tolist(), shares.tolist(), strict=True)
                row = {str(k): f"{names[i]} {100 * share:.1f} %" for k, (i, share) in enumerate(best, 1)}
                rows.append({"checkpoint": str(folder), "image": str(file), **row})
    return rows


def notes(network, section, ids):
    """Lines that say how a network gets its test images, and how their classes were matched."""
    statistics = ", ".join(f"{key} {value}" for key, value in network.statistics.items())
    resizing = f"size {section.size}, crop_pct {section.crop_pct}, interpolation {section.interpolation}"
    yield f"{section.source} prepared with {resizing}, {statistics}"
    total = network.model.num_classes
    if ids != list(range(total)):
        matched = f"{section.source} has {len(ids)} of the network's {total} classes, matched by name"
        yield f"{matched}; the network may answer with any of them"


# ---------------------------------------------------------------- which networks, which images


def open_networks(path, model, choose):
    """(name, network, test sets) of a folder's exported students, a file with weights of `model`, a timm tag.

    choose: (name, timm configuration, recipe.Data of the recipe that trained it or None) -> test sets.
    """
    if Path(path).is_dir():
        for folder in exported_students(Path(path)):
            network, config = models.load_exported(folder)
            file = folder.parent.parent / "recipe.json"
            trained_on = recipe.load(file).data if file.is_file() else None
            sets = choose(str(folder), config, trained_on)
            models.check_forward(network, str(folder), network.model.num_classes, sets[0][1].size)
            yield str(folder), network, sets
        return

    is_tag = not Path(path).exists() and timm.is_model(path)
    model = path if is_tag else model
    if not model:
        expected = "a folder, a timm tag, or a file whose network is named with --model"
        raise models.ModelError(f"{path}: expected {expected}")
    models.check_name(model)
    tagged = is_tag or "." in model
    config = models.pretrained_config(model) if tagged else timm.get_pretrained_cfg(model).to_dict()
    sets = choose(path, config, None)
    section, trained_size = sets[0][1], config["input_size"][-1]
    if is_tag:
        models.check_pretrained(model, classes=section.classes, size=trained_size)
    resized = config.get("fixed_input_size") and section.size != trained_size
    model_args = {"img_size": section.size} if resized else {}
    weights = dict(pretrained=True) if is_tag else dict(checkpoint=path)
    shape = dict(classes=section.classes, size=section.size, model_args=model_args)
    yield path, models.build(model, **shape, **weights), sets


def exported_students(folder):
    """The folders of exported students: the folder itself, or those of the runs in it."""
    if (folder / "config.json").is_file():
        return [folder]
    students = sorted(config.parent for config in folder.glob("**/students/*/config.json"))
    if not students:
        raise models.ModelError(f"{folder}: no finished student in this folder (no students/*/config.json)")
    return students


def test_sets(name, config, trained_on, *, source, on, v2, changes):
    """[(results, TestData)]: the ImageNet sets in `on`, or `source`, or what the network was trained on.

    trained_on: recipe.Data or None; for config and changes see `preprocessing`.
    """
    prepared = preprocessing(name, config, trained_on, changes)
    sets = []
    if "imagenet" in on or "real" in on:
        results = tuple(result for result in ("imagenet", "real") if result in on)
        imagenet = source or (trained_on and trained_on.source) or IMAGENET
        sets.append((results, test_data(imagenet, prepared, 1000)))
    if "v2" in on:
        if not v2:
            hint = f"name its folder (or its name on the hub) with --v2; it is at {V2}"
            raise sources.DataError(f"ImageNet-V2: {hint}")
        sets.append((("v2",), test_data(v2, prepared, 1000)))
    if on:
        return sets

    if trained_on:
        fields = {name: getattr(trained_on, name) for name in TestData._fields}
        section = TestData(**fields | prepared | {"source": source or trained_on.source})
    elif source:
        section = test_data(source, prepared)
    else:
        missing = "no recipe.json beside it says which data to use: name it with --data"
        raise models.ModelError(f"{name}: {missing}")
    return [((section.source,), section)]


def preprocessing(name, config, trained_on, changes):
    """{"size", "crop_pct", "interpolation"}: those of the training, else of timm's configuration, changed."""
    known = vars(trained_on) if trained_on else config | {"size": config["input_size"][-1]}
    values = {key: known[key] if change is None else change for key, change in changes.items()}
    size, crop_pct, interpolation = values.values()
    valid = size in range(1, 4097) and isinstance(crop_pct, (int, float)) and 0 < crop_pct <= 1
    if not valid or interpolation not in INTERPOLATIONS:
        expected = f"expected 1 to 4096 pixels, a crop_pct in (0, 1], {' or '.join(INTERPOLATIONS)}"
        raise models.ModelError(f"{name}: images cannot be prepared with {values}: {expected}")
    return values


def test_data(source, prepared, classes=None):
    """The TestData of a source alone, in the layout of its kind; prepared: as `preprocessing` returns."""
    fields = sources.evaluation_fields(source)
    rest = {"source": source, "train_split": None, "classes": classes or fields["classes"]}
    return TestData(**fields | prepared | rest)


def match_classes(name, network, section, is_imagenet):
    """(section, class ids): a network's class id for each class id of the data; by name where both have any.

    The section gets the number of classes of its source, which may be a part of the network's. Raises
    ModelError or DataError for a network that does not know the classes of the data.
    """
    known, wanted, total = class_names.of_network(network), None, network.model.num_classes
    if known and is_imagenet:
        wanted = ImageNetInfo().label_names()
    elif known:
        wanted = sources.open_split(section._replace(classes=None), section.test_split).names
        section = section._replace(classes=len(wanted)) if wanted else section
    if not wanted and total != section.classes:
        raise models.ModelError(f"{name} has {total} classes, {section.source} has {section.classes}")
    with sources.named(f"{name} on {section.source}"):
        return section, class_names.match(known, wanted) if wanted else list(range(total))


if __name__ == "__main__":
    main()
