"""What a finished run leaves: students for timm with their cards, result.json, and the printed table."""

import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import accelerate
import datasets
import numpy as np
import timm
import torch

import cifar_resnet
import launch
import models
import recipe
import rundir
from evaluate import table
from log import GRADIENTS, count_parameters

LOSS_CURVES, ACCURACY_CURVES = ("loss", "hard", "soft", *GRADIENTS), ("top1", "top1_ema")
CURVE_POINTS = 300  # of a curve in result.json


def finish(log, step, teacher_scores):
    """Write what is missing of the log, the students for timm, and result.json; returns its content."""
    if log.steps:
        log.losses(step)  # after the last checkpoint, because a resumed run would not have this row
    if log.students[0].last is None or log.students[0].last["step"] != step:
        log.accuracy(step)
    if not log.lead.is_main_process:
        return None
    result = result_of(log, step, teacher_scores)
    export_students(log, result)
    write_result(log.folder, result)  # last, because a run with a result is finished
    return result


def export_students(log, result):
    """Write students/NAME (and NAME-ema) for timm, see models.export, with README.md, the hub's card."""
    data, names = log.settings.data, log.loader.split.names
    preprocessing = {key: getattr(data, key) for key in ("size", "crop_pct", "interpolation")}
    (log.folder / "students").mkdir(exist_ok=True)
    for student, scores in zip(log.students, result["students"], strict=True):
        networks = {student.name: (student.net, scores["last"])}
        if student.ema:
            networks[f"{student.name}-ema"] = student.ema.module, scores["last"]["ema"]
        for name, (network, last) in networks.items():
            folder, model_args = log.folder / "students" / name, student.settings.model_args
            models.export(network, folder, model_args=model_args, label_names=names, **preprocessing)
            text = card(name, student.settings, scores["parameters"], last, data, names or [], result)
            rundir.write_atomic(folder / "README.md", text)


def card(name, student, parameters, scores, data, names, result):
    """The text of a card. student, data: of the recipe; scores: of the last epoch; names: of the classes."""
    shown = ", ".join(map(plain, names[:10])) + ", ..." * (len(names) > 10)
    classes = f"{data.classes} classes ({shown})" if names else f"{data.classes} classes"
    tested = f"{scores['n']:,} of {plain(data.source)}, {data.test_split}"
    lesson, teacher = f"Trained on labels alone, with {student.hard.loss}", result["teacher"]
    if student.soft:
        lesson = (
            f"Distilled with {student.soft.weight:g} {student.soft.loss} {student.soft.args} + "
            f"{student.hard.weight:g} {student.hard.loss} from {plain(teacher['name'])} "
            f"({teacher['parameters']:,} parameters, top-1 {teacher['top1']:.2f} %)"
        )
    trial = f"; a trial of {result['steps']} steps" if result["limit"] else ""
    needs = "\nimport cifar_resnet  # of this project: timm does not have the network"
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, knowledge-distillation]
---

# {name}

{student.model}, {parameters:,} parameters, for images of {data.size} pixels and {classes}.
{lesson}.

| test images | top-1 | top-5 |
|---|---|---|
| {tested} | {scores["top1"]:.2f} % | {scores["top5"]:.2f} % |

The numbers are those of the last epoch ({result["epochs"]:g} epochs, seed {result["seed"]}{trial}).

```python
import timm, torch{needs * (student.model in cifar_resnet.VARIANTS)}
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

Trained with {versions}, commit {result["commit"]}, by

    {recipe.printable(result["command"])}
"""


def plain(text):
    """A name from others for Markdown: in one line, without characters that have a meaning there."""
    return re.sub(r"([\\`*\[\]<>|#~$])", r"\\\1", recipe.printable(text))


def result_of(log, step, teacher_scores):
    """What result.json holds: the last evaluation counts, the best is only logged."""
    students, rows, facts = log.students, log.rows(), facts_of_run(log, step, "train.py")
    seconds = facts["seconds_per_step"].items()
    log.lead.print("seconds a step: " + ", ".join(f"{name} {value:.3g}" for name, value in seconds))
    return {
        "seed": log.settings.seed,
        "students": [
            {"name": s.name, "parameters": count_parameters(s.net), "last": s.last, "best": s.best}
            for s in students
        ],
        "curves": {s.name: curve(rows, s.name, "step", LOSS_CURVES) for s in students},
        "accuracy": {s.name: curve(rows, s.name, "epoch", ACCURACY_CURVES) for s in students},
        "teacher": teacher_scores,
        **facts,
    }


def facts_of_run(log, step, script):
    """What the result of a run of train.py or detect.py holds beside its scores; script: which of them."""
    on_gpu = log.lead.device.type == "cuda"
    return {
        "steps": step,
        "epochs": step / log.steps_per_epoch,
        "limit": log.limit,
        "seconds": round(log.seconds, 1),
        "seconds_per_step": {name: round(total / step, 6) for name, total in log.clock.total.items()},
        "broken_images": len(log.loader.broken),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "images_per_second": round(step * log.settings.batch_size / log.seconds, 1),
        "command": shlex.join([script, *sys.argv[1:]]),
        **environment(log.lead),
        "recipe": dataclasses.asdict(log.settings),
    }


def write_result(folder, result):
    text = json.dumps(result, indent=2)
    numbers = r"\[\n[-+.\deE,\s]+\]"
    text = re.sub(numbers, lambda match: " ".join(match[0].split()), text)  # a curve is one line
    rundir.write_atomic(folder / "result.json", text + "\n")


def curve(rows, name, x, metrics):
    """{x: [...], metric: [...]} of a student over the rows with its first metric, at most CURVE_POINTS.

    A metric that a row lacks (a gradient's norm in the last one) is null there; one that no row has is left
    out.
    """
    rows = [row for row in rows if f"{metrics[0]}/{name}" in row]
    rows = [rows[round(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), CURVE_POINTS))]
    result = {x: [row[x] for row in rows]}
    for metric in metrics:
        values = [row.get(f"{metric}/{name}") for row in rows]
        if set(values) - {None}:
            result[metric] = [v and float(f"{v:.6g}") for v in values]
    return result


def environment(accelerator):
    """What a number needs beside it and its command: commit, versions, hardware."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40"]
    git += ["--exclude=*", "--dirty=+changes"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else _cpu_name()
    packages = (torch, timm, accelerate, datasets, np)
    return {
        "commit": commit,
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in packages},
        "hardware": {"device": device, "cpus": os.cpu_count(), "processes": accelerator.num_processes},
        "precision": launch.precision(accelerator),
    }


def _cpu_name():
    """As in /proc/cpuinfo, or what Python knows."""
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def summary(results):
    """A table of last-epoch accuracies: the teacher, and each student's mean and spread over seeds."""
    rows = []
    if teacher := results[0]["teacher"]:
        rows.append(_row("teacher", teacher, [teacher]))
    for i, student in enumerate(results[0]["students"]):
        scores = [result["students"][i]["last"] for result in results]
        rows.append(_row(student["name"], student, scores))
        if "ema" in scores[0]:
            rows.append(_row(f"{student['name']}-ema", student, [score["ema"] for score in scores]))
    return table(rows)


def _row(name, network, scores):
    row = {"network": name, "parameters": network["parameters"]}
    for metric, spread in (("top1", "±"), ("top5", "± ")):
        values = [score[metric] for score in scores]
        row[metric] = float(np.mean(values))
        row[spread] = float(np.std(values, ddof=1)) if len(values) > 1 else "-"
    return row | {"seeds": len(scores), "n": scores[0]["n"]}
