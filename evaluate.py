"""Accuracy of a classifier: one function for the training loop, one command for people.

    python evaluate.py runs/quickstart                                   # a run's folder: all its students
    python evaluate.py runs/prev_cifar_res20_res56/students/kd --data DIR  # an exported student
    python evaluate.py resnet56.pth --model cifar_resnet56 --data DIR    # a checkpoint file of a timm model

Top-1 and top-5 in per cent and the number of images, as a table, or with --json as JSON. Images are counted once each,
whatever the number of processes. The metric is a `Metric` of the Hugging Face package `evaluate`, used offline.
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
    """Share of rows whose label is among the first k of `predictions` (class ids, best first), in per cent."""

    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("int32")), "references": datasets.Value("int32")}
        return hf_evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, ks=(1, 5)):
        hits = np.asarray(predictions) == np.asarray(references)[:, None]  # [n, largest k]
        return {f"top{k}": round(100 * float(hits[:, :k].any(axis=1).mean()), 4) for k in ks}


@torch.no_grad()
def accuracy(network, loader, accelerator, limit=None):
    """{"top1", "top5" in per cent, "n" images} of `network` (images in [0, 1] -> logits [B, K]) over all processes.

    `loader` yields (uint8 images, labels, index), each image on one process only; shares may differ in size. With fewer
    than 5 classes "top5" is 100. `limit`: batches to read, for a trial. The network is left in the mode it came in.
    """
    training = network.training
    network.eval()
    rows = []
    for i, (images, labels, _) in enumerate(loader):
        if i == limit:
            break
        with accelerator.autocast():
            logits = network(to_float(images, accelerator.device))
        # ids, not logits, and of float32 logits: 100 times smaller to hand on, and bfloat16 ties would move the figure
        best = logits.float().topk(min(5, logits.shape[1])).indices
        rows += zip(best.tolist(), labels.tolist(), strict=True)
    network.train(training)
    rows = gather_object(rows)  # shares of unequal size: nothing is padded, so nothing is counted twice
    metric = TopK(keep_in_memory=True)
    scores = metric.compute(predictions=[best for best, _ in rows], references=[label for _, label in rows])
    return {**scores, "n": len(rows)}


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


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, an exported student's folder, or a .safetensors or .pth file")
    parser.add_argument("--model", help="timm name of the network in a checkpoint file")
    parser.add_argument("--data", help="folder of the data set (parquet, or class folders), a name on the hub, or digits")
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


def evaluate(args, accelerator):
    """One row of scores per network found at `args.checkpoint`."""
    rows = []
    for name, network, section in _networks(Path(args.checkpoint), args.model, args.data):
        if network.model.num_classes != section.classes:
            raise models.ModelError(f"{name} has {network.model.num_classes} classes, {section.source} has {section.classes}")
        loader = data.test_loader(
            section,
            batch_size=args.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=args.workers,
        )
        scores = accuracy(network.to(accelerator.device), loader, accelerator)
        rows.append({"checkpoint": str(name), "data": section.source, "split": section.test_split, **scores})
    return rows


def _networks(path, model, source):
    """(path, network, data section) of every exported student below a folder, or of one checkpoint file."""
    if path.is_dir():
        found = [path] if (path / "config.json").is_file() else sorted(p.parent for p in path.glob("**/students/*/config.json"))
        if not found:
            raise models.ModelError(f"{path}: no finished student in this folder (no config.json, no students/*/config.json)")
        for folder in found:
            network, config = models.load_exported(folder)
            yield folder, network, _section(folder, config, source)
        return
    if not model:
        raise models.ModelError(f"{path}: name the network in this file with --model")
    models.check_name(model)
    section = _section(path, timm.get_pretrained_cfg(model).to_dict(), source)
    yield path, models.build(model, classes=section.classes, size=section.size, checkpoint=path), section


def _section(path, config, source):
    """What to read and how: the recipe of the run that `path` belongs to, or else the data set's columns and timm's config."""
    run = path.parent.parent / "recipe.json"
    if run.is_file():
        section = recipe.load(run).data
        return dataclasses.replace(section, source=source or section.source)
    if source is None:
        raise models.ModelError(f"{path}: no recipe.json beside it says which data to use: name it with --data")
    size, crop_pct, interpolation = config["input_size"][-1], config["crop_pct"], config["interpolation"]
    section = dict(source=source, streaming=False, size=size, crop_pct=crop_pct, interpolation=interpolation)
    return types.SimpleNamespace(**section, **data.describe(source))


if __name__ == "__main__":
    main()
