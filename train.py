"""Train the students of a recipe, several at once over one teacher forward.

    accelerate launch train.py recipes/quickstart.json
    accelerate launch train.py recipes/prev_cifar_res20_res56.json --data ../shared/data/cifar100 --limit 200
    accelerate launch train.py recipes/prev_cifar_res20_res56.json --set epochs=60 students.kd.lr=0.1 --students kd --resume

Writes into --out (default: runs/RECIPE): recipe.json as it ran, metrics.jsonl and tensorboard/, checkpoints/ to --resume
from, students/NAME/ for timm, and result.json. Processes, precision and devices belong to `accelerate launch`.

The learning rate, the ramp of the distillation loss and all randomness are functions of (seed, step): a run that was
stopped and resumed is the uninterrupted run bit for bit, and a student learns the same alone or in company.
"""

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import datasets
import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend, InitProcessGroupKwargs, ProjectConfiguration, gather_object
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, distribute_bn
from tqdm import tqdm

import data
import losses
import models
import recipe
from evaluate import accuracy, table, to_float

COUNTERS = ("skipped", "barren", "last", "best")  # of a student, saved as JSON
MAX_STATE_BYTES = 16 << 20  # of a checkpoint's JSON files
KEEP_CHECKPOINTS = 2
MAX_FAILED_SAVES = 3  # in a row; then the run stops with EXIT_UNSAVED
MAX_SKIPPED_STEPS = 10  # in a row, or more than 1 % of a run's steps
MIN_GRADIENT_SCALE = 1e-3  # float16's scale starts at 65536 and halves with every overflow
EXIT_UNSAVED = 74  # EX_IOERR of sysexits.h
GRADIENTS = ("gradient_hard", "gradient_soft", "gradient_ratio")
CURVE_POINTS = 300  # of a curve in result.json
LOSS_CURVES, ACCURACY_CURVES = ("loss", "hard", "soft", *GRADIENTS), ("top1", "top1_ema")
BOARD = {"train": ("loss", "hard", "soft", "lr", "seconds", *GRADIENTS)}  # TensorBoard
BOARD["test"] = ("top1", "top5", "top1_ema", "top5_ema")
RUN_BOARD = ("epoch", "speed/images_per_second", "seconds/data", "seconds/teacher")
ELEMENTWISE = {"sgd", "momentum", "adam", "adamw", "nadam", "nadamw", "lion", "rmsprop"}  # blind to where a tensor ends
FUSED = {"sgd", "momentum", "adam", "adamw"}  # timm's names for PyTorch's fused optimizers
TERMS = ("loss", "hard", "soft")  # of models.Distilled, in its order
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and why."""

    exit_code = 1


class Unsaved(TrainingError):
    """Checkpoints cannot be written any more; the older ones are valid."""

    exit_code = EXIT_UNSAVED


class Stopped(TrainingError):
    """A signal stopped the run, after a checkpoint."""

    def __init__(self, message, signal_number):
        super().__init__(message)
        self.exit_code = 128 + signal_number


# ---------------------------------------------------------------- functions of the step


def lr_at(step, steps_per_epoch, epochs, schedule, lr):
    """Learning rate of optimizer step `step` (from 0). Cosine equals timm's CosineLRScheduler stepped once per epoch."""
    epoch = step // steps_per_epoch
    if schedule.kind == "milestones":
        return lr * schedule.factor ** sum(m <= epoch for m in schedule.milestones)
    t = epoch if schedule.per == "epoch" else step / steps_per_epoch
    if t < schedule.warmup_epochs:
        return schedule.warmup_lr + (lr - schedule.warmup_lr) * t / schedule.warmup_epochs
    return schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * t / epochs)) / 2


def soft_weight_at(epoch, soft):
    """Weight of the distillation term, ramped up over its first epochs as mdistiller does for DKD (epochs from 1)."""
    if soft is None:
        return 0.0
    return soft.weight * min((epoch + 1) / soft.warmup_epochs, 1) if soft.warmup_epochs else soft.weight


# ---------------------------------------------------------------- the loop


@dataclasses.dataclass
class Trainee:
    """A student with all that its training changes."""

    settings: recipe.Student
    accelerator: Accelerator
    module: torch.nn.Module  # a prepared models.Distilled
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    # Loss terms stay on the device until a log row, because reading is a synchronisation: vectors of TERMS and a 1.
    parts: list = dataclasses.field(default_factory=list)  # of this step's batches
    last_part: torch.Tensor | None = None
    latest: tuple | None = None  # logits, the teacher's, target, soft_weight of the newest batch, for `log_gradients`
    sums: torch.Tensor | float = 0.0  # since the last log row, without those of skipped steps
    skipped: int = 0  # steps left out by the last log row, because a gradient was not finite
    barren: int = 0  # steps up to the last log row, all of them skipped
    last: dict | None = None  # the newest scores, with their step
    best: dict | None = None

    @property
    def distilled(self):
        """The module without what DDP, DeepSpeed and torch.compile put around it."""
        return self.accelerator.unwrap_model(self.module, keep_torch_compile=False)

    @property
    def net(self):
        return self.distilled.net


@dataclasses.dataclass
class Run:
    """One seed of a recipe: what the loop needs."""

    settings: recipe.Recipe
    folder: Path
    lead: Accelerator
    trainees: list
    teacher: torch.nn.Module | None
    teacher_taps: tuple | None  # where its features are taken, if a student's loss compares features
    loader: data.TrainLoader
    test_loader: object
    limit: int | None
    clock: "Clock"
    signals: "Signals"
    memo: models.Memo | None = None  # of the teacher's logits
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent in them, over all resumptions
    timed: tuple = (0, 0.0)  # steps and seconds since the last log row
    index: torch.Tensor | None = None  # ids of the last batch's images
    failed_saves: int = 0  # in a row
    told_broken: int = 0  # broken images that were told of
    unwritten: list = dataclasses.field(default_factory=list)  # log rows that the disk did not take

    @property
    def stop(self):
        total = self.settings.epochs * self.loader.steps_per_epoch
        return min(total, self.limit or total)


class Clock:
    """Seconds between marks, summed by name, on the device's own clock: a kernel runs long after Python has queued it."""

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


def train(run):
    """The training loop. Leaves the trainees trained, the log written and a last checkpoint."""
    settings, loader, lead = run.settings, run.loader, run.lead
    mix = data.mixer(settings.data)
    batches = iter(loader.batches(run.step, run.stop))
    quiet = dict(disable=not lead.is_main_process, mininterval=0.2 if sys.stderr.isatty() else 30)  # a log file wants few lines
    progress = tqdm(total=run.stop, initial=run.step, unit="step", desc=run.folder.name, **quiet)
    while run.step < run.stop:
        started, epoch = time.perf_counter(), run.step // loader.steps_per_epoch
        for part in range(loader.accumulate):
            run.clock.mark(None)
            images, labels, index, *crops = next(batches)  # crops: of a resident set
            seed = data.seed_of(settings.seed, run.step, part, lead.process_index)
            images = to_float(images, lead.device)
            target, index = (t.to(lead.device, non_blocking=True) for t in (labels, index))
            if mix:
                data.seed_all(seed, lead.device)
                images, target = mix(images, target)
            run.clock.mark("data")
            taught = None if run.teacher is None else recall(run, *crops) if run.memo else teach(run, images)
            run.clock.mark("teacher")
            for trainee in run.trainees:
                data.seed_torch(seed, lead.device)  # the same dropout, alone or in company
                lr = lr_at(run.step, loader.steps_per_epoch, settings.epochs, settings.schedule, trainee.settings.lr)
                soft_weight = soft_weight_at(epoch, trainee.settings.soft)
                learn(trainee, images, taught, target, index, lr, soft_weight)
                run.clock.mark(trainee.settings.name)
        run.step, run.index = run.step + 1, index
        took = time.perf_counter() - started
        run.seconds, run.timed = run.seconds + took, (run.timed[0] + 1, run.timed[1] + took)

        if run.step % settings.log_every == 0:
            progress.set_postfix(loss=log_losses(run))
        epochs_done, rest = divmod(run.step, loader.steps_per_epoch)
        last = epochs_done == settings.epochs
        if rest == 0 and (last or epochs_done % settings.evaluate_every == 0):
            log_accuracy(run)
        if run.step % (settings.save_every or loader.steps_per_epoch) == 0 or run.step == run.stop:
            save(run)
        progress.update()
        if signal_number := run.signals.agreed():
            save(run)
            raise Stopped(f"{run.folder}: stopped by signal {signal_number} at step {run.step}: --resume", signal_number)
    progress.close()


def teach(run, images):
    """(logits, features or None) of the teacher: one forward, whatever the number of students."""
    dtype = PRECISIONS[run.settings.teacher.precision or precision(run.lead)]
    with torch.inference_mode(), torch.autocast(run.lead.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        if run.teacher_taps:
            logits, features = run.teacher(images, run.teacher_taps, run.settings.teacher.preactivation)
        else:
            logits, features = run.teacher(images), None
    # copies: a student's backward may not keep tensors that were made in inference mode
    return logits.clone(), features and [feature.clone() for feature in features]


def recall(run, crops):
    """What `teach` gives for crops of a resident set, int64 [2, B]; forwards only what it has never given before."""
    own = run.loader.resident
    return run.memo(crops, lambda crops: teach(run, to_float(own.crops(*crops.to(own.device)), own.device))[0]), None


def learn(trainee, images, taught, target, index, lr, soft_weight):
    """One forward and backward of one student; the optimizer steps when accelerate has accumulated enough."""
    accelerator, optimizer = trainee.accelerator, trainee.optimizer
    with accelerator.accumulate(trainee.module):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        terms = trainee.module(images, taught, target, index, torch.full((), soft_weight, device=images.device))
        trainee.latest = terms.pop("logits", None), taught and taught[0], target, soft_weight
        recomputed = trainee.settings.grad_checkpointing
        with models.frozen_statistics(trainee.module) if recomputed else contextlib.nullcontext():
            accelerator.backward(terms["loss"])  # with DeepSpeed also clips and steps
        values = [term.detach() for term in terms.values()]
        trainee.parts.append(torch.stack([*values, torch.ones_like(values[0])]))
        if accelerator.sync_gradients:
            tally(trainee, update(trainee))


def update(trainee):
    """Clip, step, average; returns whether the gradient was finite, a bool tensor: the same on every process.

    A step whose gradient is not finite is left out, on the device: for the host to look would stop the pipeline.
    """
    accelerator = trainee.accelerator
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # has stepped already: the loss must tell
        finite = accelerator.reduce(trainee.parts[-1][0].clone(), "sum").isfinite()
    else:
        finite = step_optimizer(trainee)
    if trainee.ema:
        trainee.ema.update(trainee.net)
    return finite


def step_optimizer(trainee):
    """Clip and step; returns whether the gradient was finite, on the device."""
    accelerator, optimizer, clip = trainee.accelerator, trainee.optimizer, trainee.settings.clip_grad
    accelerator.unscale_gradients(optimizer)
    inner = optimizer.optimizer
    parameters = [p for group in inner.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters])))
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    finite = norm.isfinite()
    if accelerator.scaler is not None:
        optimizer.step()
    elif getattr(inner, "_step_supports_amp_scaling", False):  # PyTorch's protocol between scalers and fused optimizers
        inner.grad_scale, inner.found_inf = None, finite.logical_not().float()
        inner.step()
    elif finite:  # a synchronisation: this optimizer knows no other way
        inner.step()
    for parameter in parameters:  # zero_grad() would take 20 us to do it
        parameter.grad = None
    return finite


def tally(trainee, finite):
    """Add up the loss terms of a step that was taken, on the device."""
    for part in trainee.parts:
        trainee.sums = trainee.sums + torch.where(finite, part, 0.0)
    trainee.last_part, trainee.parts = trainee.parts[-1], []


def read_sums(run, trainee):
    """(mean loss terms by name since the last log row, steps that were skipped since then), over all processes."""
    *sums, batches = run.lead.reduce(trainee.sums.clone(), "mean").tolist()
    steps = round(batches) // run.loader.accumulate
    means = {name: total / batches for name, total in zip(TERMS, sums, strict=False)} if steps else {}
    return means, run.timed[0] - steps


def check_finite(run, skipped):
    """Too many steps without a finite gradient end the run, with a dump; the older checkpoints are good."""
    for trainee, new in zip(run.trainees, skipped, strict=True):
        name, scaler = trainee.settings.name, trainee.accelerator.scaler
        trainee.skipped += new
        trainee.barren = trainee.barren + new if new == run.timed[0] else 0
        many = trainee.barren >= MAX_SKIPPED_STEPS or trainee.skipped > max(MAX_SKIPPED_STEPS, run.stop / 100)
        deepspeed = trainee.accelerator.distributed_type == DistributedType.DEEPSPEED  # has taken the step
        if scaler is not None:
            if new and scaler.get_scale() < MIN_GRADIENT_SCALE:
                raise TrainingError(
                    f"student {name!r}: float16's gradient scale fell to {scaler.get_scale():.3g} by step {run.step}: every "
                    "gradient overflows; try --mixed_precision bf16"
                )
        elif many or (new and deepspeed):
            stop_with_dump(run, trainee)
        elif new:
            run.lead.print(
                f"warning: student {name!r}: gradient not finite in {new} of the last {run.timed[0]} steps, which were "
                f"skipped; {trainee.skipped} skipped by step {run.step}"
            )


def stop_with_dump(run, trainee):
    name, dump = trainee.settings.name, run.folder / f"not-finite-{trainee.settings.name}-{run.step}.json"
    told = {"step": run.step, "student": name, "skipped": trainee.skipped, "lr": trainee.optimizer.param_groups[0]["lr"]}
    terms = zip(TERMS, trainee.last_part.tolist(), strict=False)
    told["terms of the last batch"] = {term: str(value) for term, value in terms}  # NaN is not JSON
    told["images of the last batch"] = run.index.tolist()
    if run.lead.is_main_process:
        recipe.write_atomic(dump, json.dumps(told, indent=2) + "\n")
    raise TrainingError(
        f"student {name!r}: the gradient is not finite at step {run.step}, loss {told['terms of the last batch']['loss']}; "
        f"{told['skipped']} steps were skipped: {dump}"
    )


class Signals:
    """SIGTERM and the first Ctrl-C are remembered until the end of a step; the second Ctrl-C leaves at once."""

    def __init__(self, processes):
        self.received = 0
        # gloo, whatever the gradients use: the processes agree without waiting for their GPUs
        self.group = torch.distributed.new_group(backend="gloo") if processes > 1 else None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number, _):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self):
        """The signal that any process received, on all of them; 0 for none."""
        if self.group is None:
            return self.received
        flag = torch.tensor(self.received)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(flag)


# ---------------------------------------------------------------- what is written while it runs


def log_losses(run):
    """Write a row of mean loss terms, learning rates and speed since the last one; returns the mean loss for people."""
    means, skipped = zip(*(read_sums(run, trainee) for trainee in run.trainees), strict=True)
    check_finite(run, skipped)
    steps, seconds = run.timed
    row = {}
    for trainee, terms in zip(run.trainees, means, strict=True):
        name = trainee.settings.name
        row |= {f"{term}/{name}": mean for term, mean in terms.items()}
        row[f"lr/{name}"] = trainee.optimizer.param_groups[0]["lr"]
        if trainee.skipped:  # a float16 scaler's overflows are a matter of course
            row[f"{'overflows' if trainee.accelerator.scaler else 'skipped'}/{name}"] = trainee.skipped
        if run.step % run.settings.log_every == 0:  # not for the rest at the end, which a resumed run may log without a step
            row |= log_gradients(trainee)
        trainee.sums = 0.0
        if not math.isfinite(row.get(f"loss/{name}", 0.0)):
            raise TrainingError(f"student {name!r}: the loss is {row[f'loss/{name}']} by step {run.step}")
    if broken := len(run.loader.broken):
        row["broken_images"] = broken
        if broken > run.told_broken:
            named = "\n  ".join(list(run.loader.broken.values())[run.told_broken :][:20])
            run.lead.print(f"warning: {broken} images are broken and were left out so far; new:\n  {named}")
            run.told_broken = broken
    row["speed/images_per_second"] = steps * run.settings.batch_size / seconds
    run.clock.read()
    row |= {f"seconds/{name}": seconds / steps for name, seconds in run.clock.window.items()}  # of a step
    run.timed, run.clock.window = (0, 0.0), {}
    write_row(run, row)
    return np.mean([row.get(f"loss/{t.settings.name}", math.nan) for t in run.trainees])


def log_gradients(trainee):
    """What the label and the distillation term pull with: norms of the newest batch's gradients in the logits, their ratio.

    {} for a student without a distillation term, or with one on features, which does not reach the logits. The mean over
    processes, each of its own batch.
    """
    if trainee.distilled.soft is None or trainee.distilled.taps:
        return {}
    norms = [trainee.accelerator.reduce(norm, "mean").item() for norm in trainee.distilled.gradient_norms(*trainee.latest)]
    found = {"gradient_hard": norms[0], "gradient_soft": norms[1]}
    if norms[1]:
        found["gradient_ratio"] = norms[0] / norms[1]
    return {f"{what}/{trainee.settings.name}": value for what, value in found.items() if math.isfinite(value)}


def log_accuracy(run):
    """Evaluate every student (and its EMA) in one pass, write a row, remember each one's last and best scores."""
    networks = [
        (t, suffix, net) for t in run.trainees for suffix, net in (("", t.net), ("_ema", t.ema and t.ema.module)) if net
    ]
    for _, _, net in networks:
        if run.lead.num_processes > 1:
            distribute_bn(net, run.lead.num_processes, reduce=True)  # each process has seen other images
    row = {}
    scores = accuracy([net for _, _, net in networks], run.test_loader, run.lead, run.limit)
    for (trainee, suffix, _), found in zip(networks, scores, strict=True):
        row |= {f"{metric}{suffix}/{trainee.settings.name}": found[metric] for metric in ("top1", "top5")}
        if suffix:
            trainee.last["ema"] = found
            continue
        trainee.last = {**found, "step": run.step, "epoch": run.step / run.loader.steps_per_epoch}
        if trainee.best is None or found["top1"] > trainee.best["top1"]:
            trainee.best = trainee.last
    write_row(run, row)


def write_row(run, row):
    row = {"step": run.step, "epoch": round(run.step / run.loader.steps_per_epoch, 4), **row}
    if run.lead.is_main_process:
        run.unwritten.append(row)
        write_rows(run)
    try:
        # On the board every student is a run of its own, so that one chart compares them.
        run.lead.log({key: value for key, value in row.items() if key in RUN_BOARD}, step=run.step)
        for trainee in run.trainees:
            own = {f"{part}/{m}": row.get(f"{m}/{trainee.settings.name}") for part, ms in BOARD.items() for m in ms}
            trainee.accelerator.log({key: value for key, value in own.items() if value is not None}, step=run.step)
    except OSError as error:
        run.lead.print(f"warning: TensorBoard did not get the row of step {run.step}: {error}")


def write_rows(run):
    """Append what is unwritten to metrics.jsonl, whole lines or nothing; a full disk keeps them for the next time."""
    path = run.folder / "metrics.jsonl"
    try:
        with open(path, "ab", buffering=0) as file:
            before, text = file.tell(), "".join(json.dumps(row) + "\n" for row in run.unwritten).encode()
            if file.write(text) < len(text):
                file.truncate(before)
                raise OSError("no space left")
        run.unwritten = []
    except OSError as error:
        run.lead.print(f"warning: {path} did not take {len(run.unwritten)} rows, which are kept for the next: {error}")


# ---------------------------------------------------------------- checkpoints


def save(run):
    """A checkpoint of now. One that cannot be written is reported; the run stops after MAX_FAILED_SAVES of them in a row."""
    sums = [run.lead.reduce(t.sums.clone(), "mean").tolist() if run.timed[0] else 0.0 for t in run.trainees]
    optimizers = [optimizer_state(trainee) for trainee in run.trainees]
    broken = gather_object(list(run.loader.broken.items()))
    run.clock.read()
    for trainee in run.trainees:
        if bad := [k for k, v in trainee.distilled.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]:
            raise TrainingError(f"student {trainee.settings.name!r}: {bad[0]} is not finite at step {run.step}: not saved")
    if not run.lead.is_main_process:
        return
    try:
        write_checkpoint(run, sums, optimizers, broken)
        run.failed_saves = 0
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # a full disk is all three
        run.failed_saves += 1
        shutil.rmtree(run.folder / "checkpoints" / f".tmp-{run.step}", ignore_errors=True)
        told = f"{run.folder}: no checkpoint at step {run.step}: {error}"
        if run.failed_saves == MAX_FAILED_SAVES:
            raise Unsaved(f"{told}; {MAX_FAILED_SAVES} in a row. Older ones are valid: make room and --resume") from error
        run.lead.print(f"warning: {told}; the run goes on, older checkpoints are valid")


def write_checkpoint(run, sums, optimizers, broken):
    """checkpoints/step-N: tensors as safetensors, the rest as JSON, digests of all. It appears complete or not at all."""
    folder = run.folder / "checkpoints"
    temporary, final = folder / f".tmp-{run.step}", folder / f"step-{run.step:08d}"
    if final.exists():
        return
    folder.mkdir(exist_ok=True)  # not its parents: a run's folder that vanished is an error
    shutil.rmtree(temporary, ignore_errors=True)
    check_space(run, folder)
    temporary.mkdir()
    write_rows(run)
    metrics = run.folder / "metrics.jsonl"
    with open(metrics, "ab") as file:
        os.fsync(file.fileno())
    state = {"step": run.step, "seconds": run.seconds, "timed": run.timed, "workers": run.loader.workers, "students": {}}
    state |= {
        "broken": broken,
        "clock": {"window": run.clock.window, "total": run.clock.total},
        "metrics_bytes": metrics.stat().st_size,
    }
    for trainee, own_sums, optimizer in zip(run.trainees, sums, optimizers, strict=True):
        name = trainee.settings.name
        optimizer_tensors, optimizer_rest = split_optimizer_state(optimizer)
        write_tensors(temporary / f"{name}.safetensors", trainee.distilled.state_dict())
        write_tensors(temporary / f"{name}.optimizer.safetensors", optimizer_tensors)
        if trainee.ema:
            write_tensors(temporary / f"{name}.ema.safetensors", trainee.ema.module.state_dict())
        state["students"][name] = {
            "optimizer": optimizer_rest,
            "scaler": trainee.accelerator.scaler.state_dict() if trainee.accelerator.scaler else None,
            "sums": own_sums,
            **{key: getattr(trainee, key) for key in COUNTERS},
        }
    recipe.write_atomic(temporary / "state.json", json.dumps(state))
    recipe.write_atomic(temporary / "manifest.json", json.dumps(manifest(run, temporary), indent=2) + "\n")
    recipe.sync_directory(temporary)
    os.replace(temporary, final)
    recipe.sync_directory(folder)
    for old in [*checkpoints(run.folder)[:-KEEP_CHECKPOINTS], *folder.glob(".tmp-*")]:
        shutil.rmtree(old, ignore_errors=True)


def check_space(run, folder):
    """OSError if the disk has no room for 1.2 times the last checkpoint: a half-written one would fill it for all."""
    if found := checkpoints(run.folder):
        needed, free = 1.2 * sum(p.stat().st_size for p in found[-1].iterdir()), shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{free:,} bytes are free, {int(needed):,} are needed")


def manifest(run, folder):
    """What a checkpoint consists of: a flipped bit or a lost page of it shows in neither safetensors nor the file system."""
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
    settings = hashlib.sha256(recipe.dump(run.settings).encode()).hexdigest()
    place = {"step": run.step, "epoch": run.step / run.loader.steps_per_epoch, "recipe_sha256": settings}
    world = {"processes": run.lead.num_processes, "batch_size": run.settings.batch_size}
    return {"schema": 1, **place, **world, "versions": {m.__name__: m.__version__ for m in (torch, timm)}, "files": files}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder):
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


def problem_of(folder):
    """What is wrong with a checkpoint, or None."""
    try:
        files = recipe.read_json(folder / "manifest.json", MAX_STATE_BYTES)["files"]
        for name, wanted in files.items():
            path = folder / name
            if path.name != name or path.is_symlink():
                return f"manifest.json names {name!r}, which is not a plain file of its folder"
            if path.stat().st_size != wanted["bytes"] or sha256(path) != wanted["sha256"]:
                return f"{name} is not what was written"
        return None if "state.json" in files else "manifest.json does not name state.json"
    except (OSError, recipe.RecipeError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def newest_valid(run):
    """The newest checkpoint that is as it was written; invalid ones are renamed .bad-*, never deleted.

    None where the run has never saved; TrainingError where it has and nothing is left: starting over is not for us to decide.
    """
    bad = []
    for folder in reversed(checkpoints(run.folder)):
        if (problem := problem_of(folder)) is None:
            if bad and run.lead.is_main_process:
                run.lead.print("\n".join(f"warning: {line}" for line in bad) + f"\nwarning: going on from {folder.name}")
            return folder
        bad.append(f"{folder} is damaged ({problem}): set aside as .bad-{folder.name}")
    if bad or list((run.folder / "checkpoints").glob(".bad-*")):
        raise TrainingError("\n".join([*bad, f"{run.folder}: no valid checkpoint is left; --overwrite starts again"]))
    return None


def set_aside(folder):
    """Rename the damaged checkpoints that are newer than the newest valid one, or all."""
    for path in reversed(checkpoints(folder)):
        if problem_of(path) is None:
            return
        aside = path.with_name(f".bad-{path.name}")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}+")
        os.replace(path, aside)


def restore(run):
    """Continue from the newest valid checkpoint, if there is one. Rows that were logged after it are cut off."""
    found = newest_valid(run)
    run.lead.wait_for_everyone()
    if run.lead.is_main_process:
        set_aside(run.folder)
    state = recipe.read_json(found / "state.json", MAX_STATE_BYTES) if found else {"step": 0, "metrics_bytes": 0}
    metrics = run.folder / "metrics.jsonl"
    if run.lead.is_main_process and metrics.exists():
        os.truncate(metrics, state["metrics_bytes"])
    if not found:
        return
    if run.settings.data.streaming and state["workers"] != run.loader.workers:
        raise data.DataError(f"{run.folder}: a stream's order depends on its readers: resume with --workers {state['workers']}")
    run.step, run.seconds, run.timed = state["step"], state["seconds"], tuple(state["timed"])
    run.clock.window, run.clock.total = state["clock"]["window"], state["clock"]["total"]
    run.loader.broken = dict(state["broken"])
    run.told_broken = len(run.loader.broken)
    for trainee in run.trainees:
        name, own = trainee.settings.name, state["students"][trainee.settings.name]
        trainee.distilled.load_state_dict(safetensors.torch.load_file(found / f"{name}.safetensors"))
        tensors = safetensors.torch.load_file(found / f"{name}.optimizer.safetensors")
        load_optimizer_state(trainee, join_optimizer_state(tensors, own["optimizer"]))
        if trainee.ema:
            trainee.ema.module.load_state_dict(safetensors.torch.load_file(found / f"{name}.ema.safetensors"))
        if own["scaler"]:
            trainee.accelerator.scaler.load_state_dict(own["scaler"])
        trainee.sums = torch.tensor(own["sums"], device=run.lead.device)
        for key in COUNTERS:
            setattr(trainee, key, own[key])


def optimizer_state(trainee):
    """The optimizer's state_dict, whole on every process: checkpoints do not depend on their number, or on DeepSpeed."""
    if not partitioned(trainee.accelerator):
        return trainee.optimizer.state_dict()
    zero, states, groups, n = trainee.optimizer.optimizer, {}, [], 0
    for parameters, group in zip(zero.bit16_groups, zero.optimizer.param_groups, strict=True):
        (flat,) = group["params"]
        for key, value in zero.optimizer.state[flat].items():
            for i, parameter in enumerate(parameters, n):
                states.setdefault(i, {})[key] = value
                if torch.is_tensor(value) and value.shape == flat.shape:
                    whole = value.new_zeros(parameter.numel())
                    for in_whole, in_flat in pieces(parameter):
                        whole[in_whole] = value[in_flat]
                    states[i][key] = trainee.accelerator.reduce(whole, "sum").view(parameter.shape)
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append(rest | {"params": list(range(n, n + len(parameters)))})
        n += len(parameters)
    return {"state": states, "param_groups": groups}


def load_optimizer_state(trainee, state_dict):
    """Continue from what `optimizer_state` gave; the module's weights are loaded already."""
    if partitioned(trainee.accelerator):
        return load_partitions(trainee.optimizer.optimizer, state_dict)
    trainee.optimizer.load_state_dict(state_dict)
    for parameter, values in trainee.optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                # in the parameter's memory layout, as it was: LAMB's norms sum in that order, to the last bit
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_partitions(zero, state_dict):
    """This process's pieces of a whole optimizer state: DeepSpeed keeps all tensors of a parameter group in one flat one."""
    zero.refresh_fp32_params()
    n = 0
    groups = zip(zero.bit16_groups, zero.optimizer.param_groups, state_dict["param_groups"], strict=True)
    for parameters, group, saved in groups:
        (flat,), states = group["params"], [state_dict["state"].get(i, {}) for i in range(n, n + len(parameters))]
        group |= {key: value for key, value in saved.items() if key != "params"}
        for key, value in states[0].items():
            if torch.is_tensor(value) and value.shape == parameters[0].shape:
                value = torch.zeros_like(flat)
                for parameter, state in zip(parameters, states, strict=True):
                    for in_whole, in_flat in pieces(parameter):
                        value[in_flat] = state[key].flatten()[in_whole]
            zero.optimizer.state[flat][key] = value
        n += len(parameters)


def pieces(parameter):
    """(slice of the flattened parameter, slice of this process's flat tensor): one pair, or none where others hold it."""
    if (own := parameter._hp_mapping) is None:
        return []
    whole, flat = own.lp_fragment_address, own.hp_fragment_address
    return [(slice(whole.start, whole.start + whole.numel), slice(flat.start, flat.start + flat.numel))]


def split_optimizer_state(state_dict):
    """An optimizer's state_dict as (tensors by "state.index.name" or "param_groups.index.name", the JSON that is left)."""
    tensors, rest = {}, {}
    groups = dict(enumerate(state_dict["param_groups"]))
    for part, entries in (("state", state_dict["state"]), ("param_groups", groups)):
        rest[part] = {}
        for index, values in entries.items():
            rest[part][index] = {k: v for k, v in values.items() if not torch.is_tensor(v)}
            tensors |= {f"{part}.{index}.{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return tensors, rest


def join_optimizer_state(tensors, rest):
    """The inverse of `split_optimizer_state`, after both halves went through files."""
    joined = {part: {int(index): dict(values) for index, values in entries.items()} for part, entries in rest.items()}
    for key, value in tensors.items():
        part, index, name = key.split(".", 2)
        joined[part][int(index)][name] = value
    return {"state": joined["state"], "param_groups": list(joined["param_groups"].values())}


def write_tensors(path, tensors):
    # copies: DeepSpeed's weights are views of one flat tensor, and safetensors refuses memory that is shared
    safetensors.torch.save_file({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---------------------------------------------------------------- how it was launched


def make_accelerator(**settings):
    """An Accelerator of this launch. Without a GPU, DeepSpeed's processes find each other over gloo only."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available():
        settings["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(**settings)


def precision(accelerator):
    """ "no", "bf16" or "fp16": what autocast runs in. DeepSpeed has its own setting, `torch_autocast`."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.mixed_precision
    autocast = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {})
    return {"bfloat16": "bf16", "float16": "fp16"}[autocast["dtype"]] if autocast.get("enabled") else "no"


def partitioned(accelerator):
    """Whether each process holds a piece of the optimizer's state: ZeRO from stage 1 on."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage > 0


def check_launch(settings, accelerator):
    """Raises RecipeError for a launch that accelerate or DeepSpeed would take and train something else with, in silence."""
    launched, kind = int(os.environ.get("WORLD_SIZE", 1)), accelerator.distributed_type
    if accelerator.num_processes != launched:  # accelerate on a machine without GPUs: every process would train alone
        raise recipe.RecipeError(
            f"{launched} processes were launched, accelerate sees {accelerator.num_processes}: see the README"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise recipe.RecipeError("--mixed_precision fp16 on a CPU: accelerate would train in float32; use bf16 or no")
    if accelerator.mixed_precision == "fp8" or kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise recipe.RecipeError(
            f"{kind.value}, --mixed_precision {accelerator.mixed_precision}: not supported; a student fits on one GPU: "
            "use multi-GPU or DeepSpeed stages 0 to 2, with bf16, fp16 or no"
        )
    if kind == DistributedType.DEEPSPEED:
        check_deepspeed(settings, accelerator)


def check_deepspeed(settings, accelerator):
    """Raises RecipeError for a DeepSpeed configuration that would not train what the recipe says."""
    config, stage = accelerator.state.deepspeed_plugin.deepspeed_config, accelerator.state.deepspeed_plugin.zero_stage
    if stage > 2:
        raise recipe.RecipeError(
            f"DeepSpeed ZeRO stage {stage}: weights in pieces cannot be evaluated, averaged (EMA) or exported here, and a "
            "student fits on one GPU: use stage 0, 1 or 2"
        )
    halves = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled") not in (None, False)]
    if halves or accelerator.mixed_precision != "no":
        raise recipe.RecipeError(
            f"DeepSpeed with {' and '.join(halves) or accelerator.mixed_precision}: it would cast the weights, BatchNorm's "
            'too; use --mixed_precision no and "torch_autocast": {"enabled": true, "dtype": "bfloat16"} in its JSON file'
        )
    if precision(accelerator) == "fp16":
        raise recipe.RecipeError("DeepSpeed with float16: its loss scale cannot be saved without pickle; use bfloat16, or DDP")
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        raise recipe.RecipeError("DeepSpeed with offload_optimizer: it would replace the recipe's optimizer by its own")
    whole = [s for s in settings.students if s.optimizer not in ELEMENTWISE]
    if stage and whole:
        raise recipe.RecipeError(
            f"DeepSpeed ZeRO stage {stage} with student {whole[0].name!r}'s optimizer {whole[0].optimizer!r}: the stage "
            f"cuts all tensors into flat pieces, and {whole[0].optimizer} needs whole ones (LAMB's trust ratio is per tensor): "
            f"use stage 0 or DDP, or one of {', '.join(sorted(ELEMENTWISE))}"
        )


def configure_deepspeed(accelerator, student, loader):
    """The recipe's batch and clipping; DeepSpeed would clip at 1.0 if it were not told."""
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": loader.per_process,
        "gradient_accumulation_steps": loader.accumulate,
        "train_batch_size": loader.batch_size,
        "gradient_clipping": student.clip_grad or 0.0,
    }


# ---------------------------------------------------------------- before and after the loop


def make_student(settings, student, teacher=None, labels=None):
    """(models.Distilled, optimizer) with the initial weights of this seed; raises RecipeError naming the student.

    A loss on features is built for the shapes of the student's and the `teacher`'s, with the training `labels` by image id.
    """
    torch.manual_seed(settings.seed)  # every student starts from its own draw of the same seed, alone or in company
    try:
        network = models.build(
            student.model,
            classes=settings.data.classes,
            size=settings.data.size,
            model_args=student.model_args,
            pretrained=student.pretrained,
            mean=student.mean,
            std=student.std,
        )
        if student.grad_checkpointing:
            checkpoint_activations(network.model, student)
        hard = losses.make_loss(student.hard.loss, losses.LABEL_LOSSES, smoothing=student.hard.smoothing)
        soft, taps = losses.make_loss(student.soft.loss, **student.soft.args) if student.soft else None, None
        if compares_features(student):
            taps = student.taps or network.default_taps()
            own = network.shapes(settings.data.size, taps, student.preactivation)
            theirs = teacher.shapes(settings.data.size, teacher_taps(settings, teacher), settings.teacher.preactivation)
            soft = soft(own, theirs, labels)
        module = models.Distilled(network, hard, soft, student.hard.weight, taps, student.preactivation)
        optimizer = make_optimizer(module, student)
    except (ValueError, TypeError, AssertionError) as error:
        raise recipe.RecipeError(f"student {student.name!r}: {error}") from error
    return module, optimizer


def make_optimizer(module, student):
    """timm's optimizer of that name: fused where PyTorch has it fused, and LAMB as one that can skip a step on the device."""
    fused = {"fused": True} if student.optimizer in FUSED else {}
    optimizer = create_optimizer_v2(
        module,
        opt=student.optimizer,
        lr=student.lr,
        weight_decay=student.weight_decay,
        filter_bias_and_bn=not student.decay_norm_and_bias,
        **fused | student.optimizer_args,
    )
    if isinstance(optimizer, timm.optim.Lamb):
        return models.Lamb.like(optimizer)
    return optimizer


def start_momentum(optimizer):
    """Zero momentum for SGD: where the very first step is left out, PyTorch would take what the memory held."""
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] and not optimizer.defaults["dampening"]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def checkpoint_activations(model, student):
    """timm's activation checkpointing; ValueError for a network without it."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ValueError(f"grad_checkpointing: {student.model} does not have it") from None


def compares_features(student):
    """Whether a student's distillation loss is a module on features, not a function of logits."""
    return bool(student.soft) and isinstance(losses.LOSSES.get(student.soft.loss), type)


def teacher_taps(settings, teacher):
    """Where the teacher's features are taken; None where no student compares features, so that taking them costs nothing."""
    if any(compares_features(student) for student in settings.students):
        return settings.teacher.taps or teacher.default_taps()
    return None


def make_loaders(settings, options, accelerator):
    """(training loader, test loader) of this process; raises data.DataError for data that the recipe does not fit."""
    place = dict(rank=accelerator.process_index, world=accelerator.num_processes, workers=options.workers)
    place |= dict(pin=accelerator.device.type == "cuda", device=accelerator.device)
    sizes = dict(batch_size=settings.batch_size, batch_size_per_process=settings.batch_size_per_process)
    loader = data.TrainLoader(settings.data, seed=settings.seed, **sizes, **place)
    return loader, data.test_loader(settings.data, batch_size=settings.batch_size_per_process, **place)


def make_run(settings, folder, teacher, options):
    """Build everything of one run and bring it to where it was."""
    tracked = dict(log_with="tensorboard", project_config=ProjectConfiguration(str(folder), str(folder / "tensorboard")))
    lead = make_accelerator(**tracked)
    loader, test_loader = make_loaders(settings, options, lead)
    trainees = []
    labels = loader.labels() if any(map(compares_features, settings.students)) else None
    for student in settings.students:
        # one Accelerator per student: its own gradient scaler and its own count of accumulated batches
        accelerator = make_accelerator(gradient_accumulation_steps=loader.accumulate, **tracked)
        module, optimizer = make_student(settings, student, teacher, labels)
        if compares_features(student):
            share_memory(module, accelerator)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            configure_deepspeed(accelerator, student, loader)
            module.to(memory_format=torch.contiguous_format)  # it flattens weights, and its broadcast fails on others
        module, optimizer = accelerator.prepare(module, optimizer)
        if accelerator.distributed_type != DistributedType.DEEPSPEED:  # it leaves no step out, and lays out weights anew
            start_momentum(optimizer.optimizer)
        module.train()
        trainee = Trainee(student, accelerator, module, optimizer, None)
        if student.ema is not None:
            trainee.ema = ModelEmaV3(trainee.net, decay=student.ema)
        trainees.append(trainee)
    taps, dynamo = teacher_taps(settings, teacher), lead.state.dynamo_plugin
    if teacher is not None and dynamo.backend != DynamoBackend.NO:
        teacher = torch.compile(teacher, **dynamo.to_kwargs())  # the students are compiled by `prepare`
        torch._dynamo.config.recompile_limit = 4 * len(trainees) + 4  # they share Distilled.forward: a graph for each
    clock, signals = Clock(lead.device), Signals(lead.num_processes)
    run = Run(settings, folder, lead, trainees, teacher, taps, loader, test_loader, options.limit, clock, signals)
    restore(run)
    for name, accelerator in [("run", lead), *((t.settings.name, t.accelerator) for t in trainees)]:
        accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": run.step + 1}})
    return run


def make_memo(run, folder):
    """The memo of run's teacher, or None; on disk in `folder`, under a digest of all that its logits depend on.

    RecipeError where the logits of an image depend on its place in the batch, as with uneven shares of a CPU's threads.
    """
    kind, own, batch = run.settings.teacher and run.settings.teacher.memo, run.loader.resident, run.loader.per_process
    if kind is None:
        return None
    sizes = (len(own.labels), own.views, run.settings.data.classes, batch, own.device)
    sample = torch.stack([torch.arange(batch) % sizes[0], torch.arange(batch) % own.views])
    (there, _), (back, _) = (teach(run, to_float(own.crops(*s.to(own.device)), own.device)) for s in (sample, sample.flip(1)))
    if not torch.equal(there, back.flip(0)):
        raise recipe.RecipeError(
            f"teacher.memo: with batches of {batch} the teacher's logits of an image depend on its place in the batch (by "
            f"{(there - back.flip(0)).abs().max():.1e}): set another batch_size_per_process, or memo to null"
        )
    if kind == "device":
        return models.Memo(*sizes)
    # the sample's logits stand for the precision, the hardware and the libraries, whose rounding is in every row
    parts = [models.digest(run.teacher), own.digest(), *map(str, sizes[:-1]), str(there.tolist())]
    return models.FileMemo(*sizes, folder / hashlib.sha256(" ".join(parts).encode()).hexdigest())


def share_memory(module, accelerator):
    """A loss's memory of past batches (CRD) is updated alike on every process, from what all of them saw.

    DDP would instead copy the main process's memory to all of them before every forward: 1.3 GB on ImageNet.
    """
    if hasattr(module.soft, "gather"):
        module.soft.gather = accelerator.gather
    buffers = [f"soft.{name}" for name, _ in module.soft.named_buffers()]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)


def make_teacher(settings, path, out, options, accelerator):
    """(network, {"name", "top1", "top5", "n", ...}) of the recipe's teacher, evaluated; trained first where it must be."""
    wanted = settings.teacher
    if wanted.recipe:
        folder = trained(beside(path, wanted.recipe), out.parent, options, accelerator)
        (student,) = load(beside(path, wanted.recipe), [], dataclasses.replace(options, students=None)).students
        exported = folder / "students" / student.name
        network, name = models.load_exported(exported)[0], str(exported)
    else:
        sources = dict(pretrained=wanted.pretrained, checkpoint=wanted.checkpoint, mean=wanted.mean, std=wanted.std)
        shape = dict(classes=settings.data.classes, size=settings.data.size, resize=wanted.size, model_args=wanted.model_args)
        network, name = models.build(wanted.model, **shape, **sources), wanted.checkpoint or wanted.model
    network = network.to(accelerator.device).eval().requires_grad_(False)
    (scores,) = accuracy([network], make_loaders(settings, options, accelerator)[1], accelerator, options.limit)
    chance = 1 / settings.data.classes
    floor = 100 * (chance + 3 * math.sqrt(chance * (1 - chance) / scores["n"]))  # three standard deviations above guessing
    accelerator.print(f"teacher {name}: top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % of {scores['n']} images")
    if scores["top1"] <= floor:
        message = f"teacher {name} is at chance level: top-1 {scores['top1']:.2f} % of {scores['n']} images with "
        message += f"{settings.data.classes} classes. Are the weights, the class order and mean/std those of this data?"
        if not options.limit:
            raise models.ModelError(message)
        accelerator.print(f"warning: {message} Going on, because --limit asks for a trial only.")
    return models.freeze(network, settings.data.size), {"name": name, "parameters": count_parameters(network), **scores}


def trained(path, parent, options, accelerator):
    """The folder with the result of a teacher's recipe: finished before, or begun before and continued, or trained now."""
    options = dataclasses.replace(options, students=None, overwrite=False)
    folder = parent / path.stem
    if not finished(folder, None):
        folder = parent / (path.stem + limit_suffix(options))
        run_recipe(path, [], folder, dataclasses.replace(options, resume=folder.exists()))
    begun = json.loads(recipe.dump(recipe.load(folder / "recipe.json")))
    changes = differences(begun, json.loads(recipe.dump(load(path, [], options))))
    if changes:
        accelerator.print(f"note: the teacher in {folder} was trained with other settings than {path}: {'; '.join(changes)}")
    return folder


HARMLESS = {"memo", "about", "paper", "log_every", "evaluate_every", "save_every", "runs", "max_broken", "grad_checkpointing"}


def differences(old, new, path=""):
    """Lines 'a.b: old -> new' for the settings of two recipes (as JSON) that can change a result."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in new | old if k not in HARMLESS]
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}.{i}")]
    return [] if old == new or path == "data.source" else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def write_result(run, teacher_scores):
    """Export the students and write result.json: the last evaluation is the result, the best one is only told."""
    lead, names = run.lead, run.loader.split.names
    if run.timed[0]:
        log_losses(run)  # after the last checkpoint: the rows of a shortened interval are not those of a resumed run
    if run.trainees[0].last is None or run.trainees[0].last["step"] != run.step:
        log_accuracy(run)
    seconds = {name: round(total / run.step, 6) for name, total in run.clock.total.items()}
    lead.print("seconds a step: " + ", ".join(f"{name} {value:.3g}" for name, value in seconds.items()))
    if not lead.is_main_process:
        return None
    students = []
    for trainee in run.trainees:
        name, data_settings = trainee.settings.name, run.settings.data
        preprocessing = {k: getattr(data_settings, k) for k in ("size", "crop_pct", "interpolation")}
        (run.folder / "students").mkdir(exist_ok=True)
        for exported, net in ((name, trainee.net), (f"{name}-ema", trainee.ema and trainee.ema.module)):
            if net:
                folder = run.folder / "students" / exported
                models.export(net, folder, model_args=trainee.settings.model_args, label_names=names, **preprocessing)
        students.append({"name": name, "parameters": count_parameters(trainee.net), "last": trainee.last, "best": trainee.best})
    rows = metrics_rows(run)
    result = {
        "seed": run.settings.seed,
        "students": students,
        "curves": {t.settings.name: curve(rows, t.settings.name, "step", LOSS_CURVES) for t in run.trainees},
        "accuracy": {t.settings.name: curve(rows, t.settings.name, "epoch", ACCURACY_CURVES) for t in run.trainees},
        "teacher": teacher_scores,
        "steps": run.step,
        "epochs": run.step / run.loader.steps_per_epoch,
        "limit": run.limit,
        "seconds": round(run.seconds, 1),
        "seconds_per_step": seconds,
        "broken_images": len(run.loader.broken),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if lead.device.type == "cuda" else None,
        "images_per_second": round(run.step * run.settings.batch_size / run.seconds, 1),
        **environment(lead),
        "recipe": dataclasses.asdict(run.settings),
    }
    text = json.dumps(result, indent=2)
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # a curve is a line
    recipe.write_atomic(run.folder / "result.json", text + "\n")
    return result


def metrics_rows(run):
    """All rows of the log, those that the disk has not taken, too."""
    path = run.folder / "metrics.jsonl"
    written = path.read_text().splitlines() if path.exists() else []
    return [*map(json.loads, written), *run.unwritten]


def curve(rows, name, x, metrics):
    """{x: [...], metric: [...]} of a student over the rows with its first metric: at most CURVE_POINTS, evenly, with the last.

    A metric that a row lacks (a gradient's norm in the last one) is null there; one that no row has is left out.
    """
    rows = [row for row in rows if f"{metrics[0]}/{name}" in row]
    rows = [rows[round(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), CURVE_POINTS))]
    found = {metric: [row.get(f"{metric}/{name}") for row in rows] for metric in metrics}
    found = {metric: [v and float(f"{v:.6g}") for v in values] for metric, values in found.items() if set(values) - {None}}
    return {x: [row[x] for row in rows], **found}


def environment(accelerator):
    """What a number needs beside it: command, commit, versions, hardware."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    changed = bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout)
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else _cpu_name()
    return {
        "command": shlex.join(["train.py", *sys.argv[1:]]),
        "commit": commit and commit + ("+changes" if changed else ""),
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (torch, timm, accelerate, datasets, np)},
        "hardware": {"device": device, "cpus": os.cpu_count(), "processes": accelerator.num_processes},
        "precision": precision(accelerator),
    }


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def count_parameters(network):
    return sum(p.numel() for p in network.parameters())


# ---------------------------------------------------------------- recipes and folders


def load(path, overrides, options):
    """The recipe with the command line's changes: --set, --data, --students."""
    if options.data:
        overrides = [*overrides, f"data.source={json.dumps(options.data)}"]
    settings = recipe.load(path, overrides)
    if options.students:
        known = {s.name: s for s in settings.students}
        for name in options.students:
            if name not in known:
                raise recipe.RecipeError(f"{path}: --students: no student {name!r} (students: {', '.join(known)})")
        settings = dataclasses.replace(settings, students=tuple(s for s in settings.students if s.name in options.students))
        if not any(s.soft for s in settings.students):
            settings = dataclasses.replace(settings, teacher=None)
    return settings


def beside(path, name):
    """A recipe named in another: as given, or in the same folder."""
    return Path(name) if Path(name).exists() else Path(path).parent / name


def limit_suffix(options):
    return f"-limit{options.limit}" if options.limit else ""


def check(settings, path, options, accelerator):
    """Build, once and for nothing, what training will build, so that no error waits behind hours of a teacher's training."""
    loader, _ = make_loaders(settings, options, accelerator)
    teacher, labels = None, None
    if any(map(compares_features, settings.students)):
        teacher, labels = untrained_teacher(settings, path, options), loader.labels()
    for student in settings.students:
        make_student(settings, student, teacher, labels)
        if compares_features(student) and settings.teacher.memo:
            raise recipe.RecipeError(
                f"{path}: teacher.memo: it holds logits, and student {student.name!r} compares features "
                f"({student.soft.loss}): set memo to null, or leave the student out with --students"
            )
    wanted = settings.teacher
    if wanted and wanted.pretrained:
        models.check_pretrained(wanted.model, classes=settings.data.classes, size=wanted.size or settings.data.size)
    if wanted and not (wanted.pretrained or wanted.checkpoint or wanted.recipe or options.limit):
        raise recipe.RecipeError(
            f"{path}: teacher: expected one of recipe, checkpoint, pretrained (untrained, it is good for a trial with --limit)"
        )
    if wanted and wanted.recipe:
        teacher_path = beside(path, wanted.recipe)
        taught = load(teacher_path, [], dataclasses.replace(options, students=None))
        if len(taught.students) != 1 or taught.runs != 1 or taught.teacher:
            raise recipe.RecipeError(f"{path}: teacher.recipe: {teacher_path} must train one student, once, without a teacher")
        if taught.data.classes != settings.data.classes:
            raise recipe.RecipeError(
                f"{path}: teacher.recipe: {teacher_path} has {taught.data.classes} classes, this recipe {settings.data.classes}"
            )
        check(taught, teacher_path, options, accelerator)


def untrained_teacher(settings, path, options):
    """A network of the teacher's shape, for the shapes of its features."""
    network, size = settings.teacher, settings.teacher.size
    if network.recipe:
        network = load(beside(path, network.recipe), [], dataclasses.replace(options, students=None)).students[0]
    shape = dict(classes=settings.data.classes, size=settings.data.size, resize=size, model_args=network.model_args)
    return models.build(network.model, **shape)


def open_folder(folder, settings, options):
    """Make a run's folder, or check that it may be continued or replaced. The recipe as it runs is written into it."""
    here, text = folder / "recipe.json", recipe.dump(settings)
    if {p.name for p in folder.iterdir()} - {"recipe.json", ".lock"}:  # alone, they are of a start that failed
        if not here.exists():
            raise recipe.RecipeError(f"{folder}: not empty, and not the folder of a run (no recipe.json): choose another --out")
        if options.overwrite:
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif not options.resume:
            raise recipe.RecipeError(f"{folder}: holds a run already: continue it with --resume or replace it with --overwrite")
        elif changes := differences(json.loads(recipe.dump(recipe.load(here))), json.loads(text)):
            lines = "\n  ".join(changes)
            raise recipe.RecipeError(f"{folder}: --resume with other settings than the run began with:\n  {lines}")
    folder.mkdir(parents=True, exist_ok=True)
    recipe.write_atomic(here, text)


def lock(folder):
    """Hold a run's folder for this process; the kernel lets go of it when the process ends, however it ends.

    A POSIX record lock, which loader workers do not inherit: flock would outlive a killed trainer in them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  open as long as it is held
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise recipe.RecipeError(f"{folder}: another run holds it: {file.read().strip()}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def finished(folder, limit):
    """The result of a run that reached its end (or `limit` steps), or None."""
    if not (folder / "result.json").exists():
        return None
    result = recipe.read_json(folder / "result.json", MAX_STATE_BYTES)
    complete = result["limit"] is None or (limit is not None and result["steps"] >= limit)
    return result if complete else None


def run_recipe(path, overrides, out, options):
    """Train every run of a recipe into `out`; returns the results, one per seed."""
    accelerator = make_accelerator()
    settings = load(path, overrides, options)
    check_launch(settings, accelerator)
    check(settings, path, options, accelerator)
    folders = {
        seed: out / f"seed{seed}" if settings.runs > 1 else out for seed in range(settings.seed, settings.seed + settings.runs)
    }
    locks = []
    if accelerator.is_main_process:
        for seed, folder in folders.items():
            locks.append(lock(folder))
            open_folder(folder, dataclasses.replace(settings, seed=seed, runs=1), options)
    accelerator.wait_for_everyone()
    teacher, teacher_scores = (None, None)
    if settings.teacher:
        teacher, teacher_scores = make_teacher(settings, path, out, options, accelerator)
    results, memo = [], None
    for seed, folder in folders.items():
        result = finished(folder, options.limit)
        if result is None:
            run = make_run(dataclasses.replace(settings, seed=seed, runs=1), folder, teacher, options)
            run.memo = memo = memo or make_memo(run, out.parent / "memo")
            describe(run)
            with run.signals:
                train(run)
                result = write_result(run, teacher_scores)
            for tracker in [*run.lead.trackers, *(tracker for t in run.trainees for tracker in t.accelerator.trackers)]:
                tracker.finish()
        results.append(result)
    accelerator.wait_for_everyone()
    for held in locks:
        held.close()
    if accelerator.is_main_process:
        print(f"\n{out}\n{summary(results)}")
    return results


def describe(run):
    """The plan, before it costs a day."""
    settings, loader, kind = run.settings, run.loader, "streamed" if run.settings.data.streaming else "memory-mapped"
    if loader.resident:
        kind = f"resident on {loader.resident.device} ({_gigabytes(loader.resident.images.nbytes)})"
    steps, repeats = run.stop, settings.data.repeats
    share = f" ({settings.data.fraction:g} of each class)" if settings.data.fraction < 1 else ""
    lines = [
        f"{run.folder}: {settings.epochs} epochs of {loader.steps_per_epoch} steps"
        + (f", of which this run makes {run.stop} steps" if run.limit else "")
        + (f"; resumed at step {run.step}" if run.step else ""),
        f"  data: {loader.size:,} images{share} of {settings.data.source}, {kind}; {steps * settings.batch_size:,} crops of "
        f"{settings.data.size} pixels from {-(-steps * settings.batch_size // repeats):,} images read ({repeats} of each)",
        f"  batch: {settings.batch_size} = {loader.world} processes x {loader.per_process} x {loader.accumulate} accumulated",
    ]
    fixed, kept = 0, 0
    if run.teacher is not None:
        fixed += 4 * count_parameters(run.teacher)
        size = run.teacher.size or settings.data.size
        lines.append(
            f"  teacher: {settings.teacher.model or 'its recipe'}, {count_parameters(run.teacher):,} parameters, {size} pixels"
        )
    if run.memo:
        size = _gigabytes(models.memo_bytes(len(run.memo.checks), 1, settings.data.classes))
        lines.append(f"    its logits for {run.memo.views} views an image: {size} on the {settings.teacher.memo}")
    for t in run.trainees:
        soft = f" + {t.settings.soft.weight:g} {t.settings.soft.loss} {t.settings.soft.args}" if t.settings.soft else ""
        lines.append(
            f"  student {t.settings.name}: {t.settings.model}, {count_parameters(t.net):,} parameters, {t.settings.optimizer} "
            f"lr {t.settings.lr:g}, weight decay {t.settings.weight_decay:g}, "
            f"{t.settings.hard.weight:g} {t.settings.hard.loss}{soft}"
        )
        module = t.distilled
        memory = sum(b.nbytes for b in module.soft.buffers()) if module.taps else 0
        if module.taps:
            own = count_parameters(module.soft)
            lines.append(
                f"    its loss trains {own:,} parameters and keeps {_gigabytes(memory)}, features at taps {list(module.taps)}"
            )
        moments = 1 if isinstance(t.optimizer.optimizer, torch.optim.SGD) else 2
        own = memory + 4 * count_parameters(module) * (2 + moments + bool(t.ema))  # weights, gradients, moments, average
        activations = loader.per_process * activation_bytes(t.net, settings.data.size, t.accelerator)
        lines.append(f"    memory, about: {_memory(own, activations, loader)}")
        fixed, kept = fixed + own, max(kept, activations)
    lines.append(f"  memory a process, about: {_memory(fixed, kept, loader)}")
    run.lead.print("\n".join(lines))


def activation_bytes(network, size, accelerator):
    """Bytes that autograd keeps for the backward pass of one image (measured on two: BatchNorm wants more than one)."""
    network, saved = copy.deepcopy(network).train(), {}  # a copy: the forward moves BatchNorm's statistics
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), accelerator.autocast():
        logits = network(torch.zeros(2, 3, size, size, device=accelerator.device))  # its graph keeps what was saved alive
    del logits
    return sum(n for address, n in saved.items() if address not in weights) / 2


def _memory(fixed, activations, loader):
    kept = f"{_gigabytes(activations)} of activations for {loader.per_process} images"
    return f"{_gigabytes(fixed)} of weights, gradients and optimizer, {kept}"


def _gigabytes(n):
    return f"{n / 1e9:.2f} GB"


def summary(results):
    """Table of last-epoch accuracies: one row for the teacher and one per student, mean and spread over the seeds."""
    rows = []
    if results[0]["teacher"]:
        rows.append(_row("teacher", [results[0]["teacher"]], results[0]["teacher"]["parameters"]))
    for i, student in enumerate(results[0]["students"]):
        scores = [r["students"][i]["last"] for r in results]
        rows.append(_row(student["name"], scores, student["parameters"]))
        if "ema" in scores[0]:
            rows.append(_row(f"{student['name']}-ema", [s["ema"] for s in scores], student["parameters"]))
    return table(rows)


def _row(name, scores, parameters):
    row = {"network": name, "parameters": parameters}
    for metric in ("top1", "top5"):
        values = [s[metric] for s in scores]
        row[metric] = float(np.mean(values))
        row["±" if metric == "top1" else "± "] = float(np.std(values, ddof=1)) if len(values) > 1 else "-"
    return row | {"seeds": len(scores), "n": scores[0]["n"]}


# ---------------------------------------------------------------- command line


@dataclasses.dataclass(frozen=True)
class Options:
    """What belongs to this launch and not to the recipe."""

    data: str | None
    students: list | None
    limit: int | None
    resume: bool
    overwrite: bool
    workers: int


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="JSON file: a run's settings")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="change the recipe, e.g. epochs=60"
    )
    parser.add_argument("--data", help="where the data is: a folder, a name on the hub, or digits (sets data.source)")
    parser.add_argument("--students", nargs="+", metavar="NAME", help="train only these of the recipe's students")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/RECIPE); its teacher's lies beside it")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --out and start again")
    parser.add_argument(
        "--limit", type=_positive, metavar="STEPS", help="a trial: stop after so many steps, evaluate on so many batches"
    )
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="loader processes per process")
    args = parser.parse_args(arguments)
    options = Options(args.data, args.students, args.limit, args.resume, args.overwrite, args.workers)
    out = args.out or Path("runs") / (args.recipe.stem + limit_suffix(options))
    if args.resume and args.overwrite:
        parser.error("--resume continues a run, --overwrite deletes it: choose one")
    try:
        run_recipe(args.recipe, args.set, out, options)
    except (recipe.RecipeError, data.DataError, models.ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if not (death := data.dead_worker(error)):
            raise
        print(f"error: {death}", file=sys.stderr)
        sys.exit(2)
    Accelerator().end_training()


def _positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    main()
