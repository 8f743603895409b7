"""Accuracy of a classifier: two functions for the training loop, one command for people.

    python evaluate.py runs/quickstart                                     # a run's folder: all its students
    python evaluate.py runs/prev_cifar_res20_res56/students/kd --data DIR  # an exported student
    python evaluate.py resnet56.pth --model cifar_resnet56 --data DIR      # a checkpoint file of a timm model
    python evaluate.py runs/a1_res50_beitb resnet50.a1_in1k --on imagenet real v2 --data DIR --v2 DIR

Top-1 and top-5 in per cent and the number of images, as a table, or with --json as JSON. Images are counted once each,
whatever the number of processes, and decoded once for all checkpoints that want them prepared alike; ImageNet and
ImageNet-ReaL share their forward passes, too. The metric is a `Metric` of the Hugging Face package `evaluate`, offline.
"""

import argparse
import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import RealLabelsImagenet

import data
import models
import recipe


def import_hf_evaluate():
    """The package `evaluate`, although this file of the same name comes first on sys.path.

    The package imports itself by its absolute name, so no alias works. It needs the name only while it is imported: this
    folder leaves sys.path and this module sys.modules for that long, and `import evaluate` goes on meaning this file.
    """
    here, path, own = Path(__file__).resolve().parent, sys.path[:], sys.modules.pop("evaluate", None)
    sys.path[:] = [p for p in path if Path(p or ".").resolve() != here]
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path[:] = path
        sys.modules.pop("evaluate", None)
        if own is not None:
            sys.modules["evaluate"] = own


hf_evaluate = import_hf_evaluate()


class TopK(hf_evaluate.Metric):
    """Share of rows with a right class among the first k of `predictions` (class ids, best first), in per cent.

    A row's reference is the list of its right classes: one, or with ImageNet-ReaL several.
    """

    def _info(self):
        ids = datasets.Sequence(datasets.Value("int32"))
        return hf_evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions, references, ks=(1, 5)):
        hits = np.array([np.isin(best, right) for best, right in zip(predictions, references, strict=True)])  # [n, largest k]
        return {f"top{k}": round(100 * float(hits[:, :k].any(axis=1).mean()), 4) for k in ks}


def accuracy(networks, loader, accelerator, limit=None):
    """[{"top1", "top5" in per cent, "n" images}] of each network over the images of all processes; see `predict`."""
    _, labels, best = predict(networks, loader, accelerator, limit)
    return [score(own, [[label] for label in labels]) for own in best]


@torch.no_grad()
def predict(networks, loader, accelerator, limit=None):
    """(index, label, five best class ids of each network) of the images of all processes, from one pass over `loader`.

    networks: images in [0, 1] -> logits [B, K]; they are left in the mode they came in. `loader` yields (uint8 images,
    labels, index), each image on one process only; shares may differ in size. `limit`: batches to read, for a trial.
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
            # ids, not logits, and of float32 logits: 100 times smaller to hand on, and bfloat16 ties would move the figure
            best.append(logits.float().topk(min(5, logits.shape[1])).indices.tolist())
        rows += zip(index.tolist(), labels.tolist(), *best, strict=True)
    for network, mode in zip(networks, training, strict=True):
        network.train(mode)
    rows = gather_object(rows)  # shares of unequal size: nothing is padded, so nothing is counted twice
    if not rows:
        raise data.DataError("there are no images to evaluate on")
    index, labels, *best = zip(*rows, strict=True)
    return index, labels, best


def score(best, right):
    """{"top1", "top5", "n"} of class ids (best first) against each image's right ones; images without any do not count.

    With fewer than 5 classes "top5" is 100.
    """
    rows = [(b, r) for b, r in zip(best, right, strict=True) if r]
    if not rows:
        return {"top1": float("nan"), "top5": float("nan"), "n": 0}
    metric = TopK(keep_in_memory=True)
    return {**metric.compute(predictions=[b for b, _ in rows], references=[r for _, r in rows]), "n": len(rows)}


def real_labels():
    """{number of an ImageNet validation image: its right classes, maybe none}: ImageNet-ReaL, as timm packages it.

    Beyer et al., "Are we done with ImageNet?", 2020: 46,837 of the 50,000 images have labels.
    """
    names = {f"ILSVRC2012_val_{i:08d}.JPEG": i for i in range(1, 50_001)}
    return {names[name]: right for name, right in RealLabelsImagenet(list(names)).real_labels.items()}


def to_float(images, device):
    """uint8 images [B, 3, H, W] on the host -> float32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float().div_(255)


def table(rows):
    """Dictionaries with equal keys -> an aligned text table; floats with two decimals."""
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = [all(isinstance(row[key], (int, float)) for row in rows) for key in rows[0]]
    align = [str.rjust if n else str.ljust for n in numeric]
    return "\n".join("  ".join(a(c, w) for a, c, w in zip(align, line, widths, strict=True)).rstrip() for line in lines)


# ---------------------------------------------------------------- command line

IMAGENET = "ILSVRC/imagenet-1k"
V2 = "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a run's folder, an exported student, a .safetensors or .pth file, or the timm name of pretrained weights",
    )
    parser.add_argument("--model", help="timm name of the network in a checkpoint file")
    parser.add_argument("--data", help="folder of the data set (parquet, or class folders), a name on the hub, or digits")
    parser.add_argument(
        "--on", nargs="+", choices=("imagenet", "real", "v2"), help="ImageNet-1K validation, the same with ReaL labels, V2"
    )
    parser.add_argument("--v2", metavar="DIR", help="ImageNet-V2: its folder (class folders 0 to 999) or name on the hub")
    parser.add_argument("--batch-size", type=int, default=256, help="per process (default: 256)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes per process (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)
    accelerator = Accelerator()
    try:
        rows = evaluate(args, accelerator)
    except (recipe.RecipeError, data.DataError, models.ModelError) as error:
        accelerator.print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    accelerator.print(json.dumps(rows, indent=2) if args.json else table(rows))


@dataclasses.dataclass(frozen=True)
class TestData:
    """What data.test_loader reads of a recipe's `data`; equal for networks that can share a pass."""

    source: str
    test_split: str
    image: str
    label: str
    classes: int
    streaming: bool
    size: int
    crop_pct: float
    interpolation: str


def evaluate(args, accelerator):
    """One row of scores for each network and result. Networks that want the same images share one pass over them."""
    found = [entry for path in args.checkpoints for entry in _networks(path, args)]
    passes = {}
    for name, network, wanted in found:
        for results, section in wanted:
            if network.model.num_classes != section.classes:
                classes = f"{network.model.num_classes} classes, {section.source} has {section.classes}"
                raise models.ModelError(f"{name} has {classes}")
            passes.setdefault((results, section), {})[name] = network.to(accelerator.device)
    scores = {}
    for (results, section), members in passes.items():
        place = dict(rank=accelerator.process_index, world=accelerator.num_processes, workers=args.workers)
        loader = data.test_loader(section, batch_size=args.batch_size, numbered="real" in results, **place)
        index, labels, best = predict(list(members.values()), loader, accelerator)
        for result in results:
            real = real_labels() if result == "real" else None
            right = [real[i] for i in index] if real else [[label] for label in labels]
            scores |= {(name, result): score(own, right) for name, own in zip(members, best, strict=True)}
    rows = [(name, result, section) for name, _, wanted in found for results, section in wanted for result in results]
    return [
        {"checkpoint": name, "data": result, "split": section.test_split, **scores[name, result]}
        for name, result, section in rows
    ]


def _networks(path, args):
    """(name, network, [(results, TestData)]) of a folder's exported students, of a checkpoint file, of a timm tag."""
    if Path(path).is_dir():
        for student in _students(Path(path)):
            network, config = models.load_exported(student)
            run = student.parent.parent / "recipe.json"
            own = recipe.load(run).data if run.is_file() else None
            yield str(student), network, _wanted(student, own or _prepared(config), own, args)
        return
    is_tag = not Path(path).exists() and timm.is_model(path)
    if not is_tag and not args.model:
        what = "name the network in this file with --model" if Path(path).exists() else "not a folder, a file or a timm tag"
        raise models.ModelError(f"{path}: {what}")
    model = path if is_tag else args.model
    models.check_name(model)
    config = models.pretrained_config(model) if is_tag else timm.get_pretrained_cfg(model).to_dict()
    wanted = _wanted(path, _prepared(config), None, args)
    section = wanted[0][1]
    if is_tag:
        models.check_pretrained(model, classes=section.classes, size=section.size)
    weights = dict(pretrained=True) if is_tag else dict(checkpoint=path)
    yield path, models.build(model, classes=section.classes, size=section.size, **weights), wanted


def _students(folder):
    """The exported students in a folder: the folder itself, or those of the runs below it."""
    if (folder / "config.json").is_file():
        return [folder]
    found = sorted(config.parent for config in folder.glob("**/students/*/config.json"))
    if not found:
        raise models.ModelError(f"{folder}: no finished student in this folder (no config.json, no students/*/config.json)")
    return found


def _prepared(config):
    """How timm's configuration of a network wants its images."""
    keys = ("crop_pct", "interpolation")
    return types.SimpleNamespace(size=config["input_size"][-1], **{key: config[key] for key in keys})


def _wanted(name, prepared, own, args):
    """[(results, TestData)]: the sets of --on, or the data of the network's own recipe, or --data."""
    if args.on:
        results, wanted = tuple(r for r in ("imagenet", "real") if r in args.on), []
        if results:
            wanted.append((results, _test_data(args.data or (own and own.source) or IMAGENET, prepared, 1000)))
        if "v2" in args.on:
            if not args.v2:
                raise data.DataError(f"ImageNet-V2: name its folder (or its name on the hub) with --v2; it is at {V2}")
            wanted.append((("v2",), _test_data(args.v2, prepared, 1000)))
        return wanted
    if own:
        values = {field.name: getattr(own, field.name) for field in dataclasses.fields(TestData)}
        section = TestData(**values | {"source": args.data or own.source})
    elif args.data:
        section = _test_data(args.data, prepared)
    else:
        raise models.ModelError(f"{name}: no recipe.json beside it says which data to use: name it with --data")
    return [((section.source,), section)]


def _test_data(source, prepared, classes=None):
    columns = data.describe(source)
    preprocessing = dict(size=prepared.size, crop_pct=prepared.crop_pct, interpolation=prepared.interpolation)
    return TestData(**columns | preprocessing | {"source": source, "classes": classes or columns["classes"]})


if __name__ == "__main__":
    main()
