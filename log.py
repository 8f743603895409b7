"""What people watch: the plan before a run, and rows of metrics and TensorBoard during it.

metrics.jsonl has a row for every `log_every` steps (means over these steps) and for every evaluation. Names
are "what/student": loss, hard and soft (the weighted sum, the label loss, the distillation loss), lr, top1
and top5 (per cent), top1_ema, gradient_hard, gradient_soft and their ratio; "speed/images_per_second";
"seconds/part" of one step.
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import time

import numpy as np
import pandas as pd
import torch
from timm.utils import distribute_bn

import launch
import rundir
import sources
from evaluate import accuracy

GRADIENTS = ("gradient_hard", "gradient_soft", "gradient_ratio")
# What TensorBoard shows of a student, by group. It sorts the groups by name: wall_clock comes after train.
BOARD = {
    "test": ("top1", "top5", "top1_ema", "top5_ema"),
    "train": ("loss", "hard", "soft", "lr", *GRADIENTS),
    "wall_clock": ("seconds",),
}
RUN_BOARD = {  # and of the run, by the names of a row
    "epoch": "wall_clock/epoch",
    "speed/images_per_second": "wall_clock/images_per_second",
    "seconds/data": "wall_clock/seconds_data",
    "seconds/teacher": "wall_clock/seconds_teacher",
}
MAX_SKIPPED_STEPS = 10  # in a row, or more than 1 % of the steps of a run
MIN_GRADIENT_SCALE = 1e-3  # float16's scale starts at 65536 and halves with every overflow
SHOWN_MEMORY = 1e7  # bytes, below which the plan says nothing of them


class Clock:
    """Seconds between marks, summed by name, on the device's clock: a kernel runs long after its launch."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.marks = []
        self.window, self.total = {}, {}  # since the last log row, since the run began

    def mark(self, name):
        """The time since the mark before belongs to `name` (None: to nothing)."""
        mark = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            mark.record()
        self.marks.append((name, mark))

    def read(self):
        """Add up the marks; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        for (_, before), (name, now) in itertools.pairwise(self.marks):
            if name is not None:
                seconds = before.elapsed_time(now) / 1000 if self.on_gpu else now - before
                for sums in (self.window, self.total):
                    sums[name] = sums.get(name, 0.0) + seconds
        self.marks = []


class Log:
    """The rows of one run, in metrics.jsonl and on TensorBoard.

    stop: the step at which the run ends; limit: batches of an evaluation, for a trial; board: what
    TensorBoard shows of a student.
    """

    def __init__(self, folder, settings, lead, students, loader, test_loader, stop, limit=None, board=BOARD):
        self.board = board
        self.folder, self.settings, self.lead, self.students = folder, settings, lead, students
        self.loader, self.test_loader, self.stop, self.limit = loader, test_loader, stop, limit
        self.steps_per_epoch = loader.steps_per_epoch
        self.path = folder / "metrics.jsonl"
        self.clock = Clock(lead.device)
        self.steps, self.window = 0, 0.0  # optimizer steps since the last row, and the seconds they took
        self.seconds = 0.0  # of all steps, over all resumptions
        self.index = None  # ids of the newest batch's images, which a dump names
        self.warned_broken = 0  # broken images that a warning has named
        self.unwritten = []  # rows that the disk did not take

    def count_step(self, seconds, index):
        """A step took so many seconds; its last batch had these image ids."""
        self.index = index
        self.steps += 1
        self.window += seconds
        self.seconds += seconds

    def losses(self, step):
        """Write a row of means since the last one; returns the mean loss of the students, for people."""
        row, means = {}, []
        for student in self.students:
            values, skipped = student.read_sums(self.steps, self.loader.accumulate)
            self.check_finite(student, skipped, step)
            means.append(values.get("loss", math.nan))
            if not math.isfinite(values.get("loss", 0.0)):  # results hold finite numbers
                loss = f"the loss is {values['loss']} by step {step}"
                raise launch.TrainingError(f"student {student.name!r}: {loss}, its gradients are finite")
            group = student.optimizer.param_groups[0]
            values["lr"] = group["lr"] / group.get("lr_scale", 1.0)
            if student.skipped:
                values["overflows" if student.accelerator.scaler else "skipped"] = student.skipped
            # not in the last row, which a resumed run may write without a step
            if step % self.settings.log_every == 0:
                values |= student.log_gradients()
            row |= {f"{name}/{student.name}": value for name, value in values.items()}
        row |= self.warn_of_broken_images()
        row["speed/images_per_second"] = self.steps * self.settings.batch_size / self.window
        self.clock.read()
        row |= {f"seconds/{name}": seconds / self.steps for name, seconds in self.clock.window.items()}
        self.steps, self.window, self.clock.window = 0, 0.0, {}
        self.write(step, row)
        return float(np.mean(means))

    def check_finite(self, student, skipped, step):
        """Count and tell how many steps since the last row had a gradient that was not finite.

        With too many of them, writes a dump and raises TrainingError. float16's overflows are expected: there
        only the gradient scale counts.
        """
        student.skipped += skipped
        student.skipped_in_a_row = student.skipped_in_a_row + skipped if skipped == self.steps else 0
        if not skipped:
            return
        message = (
            f"student {student.name!r}: gradient not finite in {skipped} of the last {self.steps} steps, "
            f"where it was replaced by zeros; {student.skipped} such steps by step {step}"
        )
        if (scaler := student.accelerator.scaler) is not None:
            if scaler.get_scale() >= MIN_GRADIENT_SCALE:
                return
            message += f"; float16's gradient scale is {scaler.get_scale():.3g}: try --mixed_precision bf16"
        else:
            many = student.skipped > max(MAX_SKIPPED_STEPS, self.stop / 100)
            many = many or student.skipped_in_a_row >= MAX_SKIPPED_STEPS
            if not many and not launch.uses_deepspeed(student.accelerator):  # which has stepped with them
                return self.lead.print(f"warning: {message}")
        terms = zip(student.terms, map(str, student.last_part.tolist()), strict=False)  # JSON has no NaN
        facts = {"step": step, "student": student.name, "skipped": student.skipped}
        facts |= {"lr": student.optimizer.param_groups[0]["lr"], "terms of the last batch": dict(terms)}
        facts |= {"images of the last batch": self.index.tolist()}
        dump = self.folder / f"not-finite-{student.name}-{step}.json"
        if self.lead.is_main_process:
            rundir.write_atomic(dump, json.dumps(facts, indent=2) + "\n")
        raise launch.TrainingError(f"{message}: see {dump}")

    def warn_of_broken_images(self):
        """{"broken_images": their number so far}, or {}; new ones are named, twenty at most."""
        broken = list(self.loader.broken.values())
        if len(broken) > self.warned_broken:
            new = "\n  ".join(broken[self.warned_broken :][:20])
            self.lead.print(
                f"warning: {len(broken)} images are broken and were left out so far; new:\n  {new}"
            )
            self.warned_broken = len(broken)
        return {"broken_images": len(broken)} if broken else {}

    def accuracy(self, step):
        """Evaluate every student and its EMA in one pass, write a row, keep the last and best scores."""
        networks = [(student, "", student.net) for student in self.students]
        networks += [(student, "_ema", student.ema.module) for student in self.students if student.ema]
        if self.lead.num_processes > 1:
            for _, _, network in networks:  # BatchNorm of each process has seen other images
                distribute_bn(network, self.lead.num_processes, reduce=True)
        row = {}
        scores = accuracy([network for _, _, network in networks], self.test_loader, self.lead, self.limit)
        for (student, suffix, _), score in zip(networks, scores, strict=True):
            row |= {f"{metric}{suffix}/{student.name}": score[metric] for metric in ("top1", "top5")}
            if suffix:
                student.last["ema"] = score
                continue
            student.last = {**score, "step": step, "epoch": step / self.steps_per_epoch}
            if student.best is None or score["top1"] > student.best["top1"]:
                student.best = student.last
        self.write(step, row)

    def write(self, step, row):
        """One row, with its step and epoch."""
        row = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **row}
        if self.lead.is_main_process:
            self.unwritten.append(row)
            try:
                self.flush()
            except OSError as error:
                rows = f"{len(self.unwritten)} rows, which are kept for the next time"
                self.lead.print(f"warning: {self.path} did not take {rows}: {error}")
        try:
            # On the board every student is a run, so that one chart compares them.
            self.lead.log({RUN_BOARD[key]: row[key] for key in row if key in RUN_BOARD}, step=step)
            for student in self.students:
                names = {f"{part}/{m}": f"{m}/{student.name}" for part, ms in self.board.items() for m in ms}
                values = {name: row[key] for name, key in names.items() if row.get(key) is not None}
                student.accelerator.log(values, step=step)
        except OSError as error:
            self.lead.print(f"warning: TensorBoard did not get the row of step {step}: {error}")

    def flush(self):
        """Append the unwritten rows to metrics.jsonl, all or none; OSError where the disk is full."""
        text = "".join(json.dumps(row) + "\n" for row in self.unwritten).encode()
        with open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(text) < len(text):
                file.truncate(before)
                raise OSError("no space left")
        self.unwritten = []

    def state(self):
        """The log's part of a checkpoint, with all rows on the disk."""
        self.clock.read()
        self.flush()
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
        return {
            "seconds": self.seconds,
            "timed": (self.steps, self.window),
            "clock": {"window": self.clock.window, "total": self.clock.total},
            "metrics_bytes": self.path.stat().st_size,
        }

    def restore(self, state):
        """Continue from what `state` gave (None: begin); rows that were written after it are cut off.

        TrainingError if rows that were written before it are missing or damaged.
        """
        if self.lead.is_main_process:
            size = state["metrics_bytes"] if state else 0
            there = self.path.stat().st_size if self.path.exists() else 0
            if there < size:
                raise launch.TrainingError(
                    f"{self.path}: {there} bytes, at the newest checkpoint there were {size}: put the file "
                    "back, or start again with --overwrite"
                )
            if there:
                os.truncate(self.path, size)
                self.rows()
        if state:
            self.seconds, (self.steps, self.window) = state["seconds"], state["timed"]
            self.clock.window, self.clock.total = state["clock"]["window"], state["clock"]["total"]
            self.warned_broken = len(self.loader.broken)

    def last_step(self):
        """The step of the last row on the disk; 0 without one."""
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def rows(self):
        """All rows, also those that the disk has not taken; TrainingError if a line is not a row."""
        written = self.path.read_bytes().splitlines() if self.path.exists() else []
        try:
            rows = [json.loads(line) for line in written]
            for row in rows:
                row["step"] + row["epoch"]
        except (ValueError, TypeError, LookupError) as error:
            raise launch.TrainingError(
                f"{self.path}: damaged ({error}): start again with --overwrite"
            ) from error
        return rows + self.unwritten

    def open_board(self, step):
        """TensorBoard's files; what an interrupted run wrote after `step` is hidden.

        A student's lie in FOLDER/STUDENT, because TensorBoard calls a run by its path.
        """
        for name, accelerator in [("", self.lead), *((s.name, s.accelerator) for s in self.students)]:
            accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def close_board(self):
        """Close TensorBoard's files. Its HPARAMS tab then has the students, with their newest accuracies."""
        if not self.lead.is_main_process:
            return
        for student in [None, *self.students]:
            accelerator = student.accelerator if student else self.lead
            summaries = hyper_parameters(self.settings, student.settings) if student else ()
            try:
                for tracker in accelerator.trackers:
                    for summary in summaries:
                        tracker.writer.file_writer.add_summary(summary)
                    tracker.finish()
            except OSError as error:  # a board was removed during the run; the result is written
                self.lead.print(f"warning: TensorBoard's files are not complete: {error}")


def hyper_parameters(settings, student):
    """Summaries for TensorBoard: the settings of a student, its schedule and its data, and that it ended."""
    from torch.utils.tensorboard.summary import hparams  # slow, and TensorBoard's writer has loaded it

    tree = dataclasses.asdict(settings)
    tree = {key: tree[key] for key in ("seed", "epochs", "batch_size", "schedule", "data")}
    tree |= dataclasses.asdict(student)
    (row,) = pd.json_normalize(tree).to_dict("records")
    texts = {key: json.dumps(v) for key, v in row.items() if isinstance(v, (dict, list, tuple))}
    # The first summary would make the columns of the first run those of all; TensorBoard then collects them.
    _, start, end = hparams(row | texts, {})
    return start, end


# ---------------------------------------------------------------- before a run


def plan(log, teacher, step):
    """What a run will do and need, as text: batch, steps, data, networks, losses, memory.

    teacher: its Network, or None.
    """
    settings, loader, data = log.settings, log.loader, log.settings.data
    kind = "streamed" if data.streaming else "memory-mapped"
    if loader.resident:
        kind = f"resident on {loader.resident.device} ({_megabytes(loader.resident.images.nbytes)})"
    share = f" ({data.fraction:g} of each class)" if data.fraction < 1 else ""
    crops = log.stop * settings.batch_size
    lines = [
        f"{log.folder}: {settings.epochs} epochs of {loader.steps_per_epoch} steps"
        + (f", of which this run makes {log.stop} steps" if log.limit else "")
        + (f"; resumed at step {step}" if step else ""),
        f"  data: {loader.size:,} images{share} of {data.source}, {kind}; {crops:,} crops of "
        f"{data.size} pixels from {-(-crops // data.repeats):,} images read ({data.repeats} of each)",
        f"  batch: {settings.batch_size} = {loader.world} processes x {loader.per_process} "
        f"x {loader.accumulate} accumulated",
    ]
    if data.test_split == sources.HELD_OUT:
        share = f"{100 * sources.HELD_OUT_SHARE:g} % of the images of each class of {data.train_split}"
        lines.append(f"  tested on {share}, which are left out of the training: there is no other split")
    kept, largest = 0, 0
    if teacher is not None:
        parameters = count_parameters(teacher)
        kept += 4 * parameters
        name, size = settings.teacher.model or "its recipe", teacher.size or data.size
        lines.append(f"  teacher: {name}, {parameters:,} parameters, {size} pixels")
    for student in log.students:
        line, weights, activations = plan_student(student, data.size, loader.per_process)
        lines.append(line)
        kept, largest = kept + weights, max(largest, activations)
    return "\n".join(lines) + _memory("\n  memory of a process: ", kept, largest)


def plan_student(student, size, per_process):
    """(line, bytes of weights, gradients and optimizer state, bytes of activations) of a student."""
    settings, module = student.settings, student.distilled
    line = (
        f"  student {student.name}: {settings.model}, {count_parameters(student.net):,} parameters, "
        f"{settings.optimizer} lr {settings.lr:g}, weight decay {settings.weight_decay:g}, "
        f"{settings.hard.weight:g} {settings.hard.loss}"
    )
    if settings.soft:
        line += f" + {settings.soft.weight:g} {settings.soft.loss} {settings.soft.args}"
    banks = 0
    if module.taps:
        banks = sum(buffer.nbytes for buffer in module.soft.buffers())
        line += f", which trains {count_parameters(module.soft):,} parameters on taps {list(module.taps)}"
    moments = 1 if isinstance(student.optimizer.optimizer, torch.optim.SGD) else 2
    copies = 2 + moments + bool(student.ema)  # weights, gradients, moments, average
    weights = banks + 4 * count_parameters(module) * copies
    activations = per_process * activation_bytes(student.net, size, student.accelerator)
    return line + _memory("; ", weights, activations), weights, activations


def activation_bytes(network, size, accelerator):
    """Bytes that autograd keeps for the backward pass of one image, measured on two (for BatchNorm)."""
    network = copy.deepcopy(network).train()  # a copy, because the forward moves BatchNorm's statistics
    saved = {}
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), accelerator.autocast():
        logits = network(torch.zeros(2, 3, size, size, device=accelerator.device))
    del logits  # only now: it keeps alive what was saved, so that no address is used twice
    return sum(n for address, n in saved.items() if address not in weights) / 2


def count_parameters(network):
    return sum(p.numel() for p in network.parameters())


def _memory(before, weights, activations):
    if weights + activations < SHOWN_MEMORY:
        return ""
    kept = f"{_megabytes(weights)} of weights and state"
    return f"{before}about {kept}, {_megabytes(activations)} of activations"


def _megabytes(n):
    return f"{n / 1e6:,.1f} MB"
