"""Train detectors on COCO from the backbones of a recipe, several at once over the same decoded batches.

    accelerate launch detect.py recipes/coco_maskrcnn_res50_1x.json --data COCO --students kd rsb \\
        --set students.kd.weights=runs/a1_res50_beitb/students/kd

A student of these recipes is a backbone with its weights. Writes into --out (default: runs/RECIPE) what
train.py writes; students/NAME/ holds model.safetensors and config.json of the whole detector, and
predictions.json, its detections on val2017 in COCO's format. Average precision is in per cent, of the last
epoch. As with train.py, a resumed run is the uninterrupted run bit for bit, and a student learns the same
alone or in company.
"""

import dataclasses
import json
import os
import sys
import time
from typing import Annotated, ClassVar, Literal

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":  # the imports below take seconds
    print(f"detect.py {' '.join(sys.argv[1:])}: loading PyTorch and the recipe ...", file=sys.stderr)

import numpy as np
import timm.layers
import torch
from accelerate.utils import ProjectConfiguration, gather_object
from pydantic import Field
from timm.utils import distribute_bn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

import augment
import checkpoint
import class_names
import coco
import detectors
import distill
import finish
import launch
import optim
import recipe
import rundir
import train as classification
from evaluate import table
from log import Log, count_parameters

BOARD = {"test": coco.METRICS, "train": (*detectors.Detector.terms, "lr"), "wall_clock": ("seconds",)}
DRAWN, DRAWN_SCORE = 4, 0.5  # test images on TensorBoard, and the least score of a drawn detection
COLORS = ("red", "lime", "blue", "yellow", "magenta", "cyan")


def train(settings, loader, students, log, checkpoints, signals, step, stop, evaluate):
    """Train `students` from optimizer step `step` to `stop`. Leaves the log written and a last checkpoint."""
    lead, device, per_epoch = log.lead, log.lead.device, loader.steps_per_epoch
    batches = loader.batches(settings.seed, step, stop)
    progress = classification.progress_bar(log.folder.name, step, stop, lead)
    while step < stop:
        started = time.perf_counter()
        for part in range(loader.accumulate):
            log.clock.mark(None)
            images, sizes, targets, index = next(batches)
            images = images.to(device, non_blocking=True)
            targets = [{key: t.to(device, non_blocking=True) for key, t in one.items()} for one in targets]
            log.clock.mark("data")

            for student in students:
                # the same samples of proposals and the same dropout, alone or in company
                seed = augment.seed_of(settings.seed, step, part, lead.process_index)
                augment.seed_torch(seed, device)
                lr = optim.lr_at(step, per_epoch, settings.epochs, settings.schedule, student.settings.lr)
                with student.accelerator.accumulate(student.module):
                    optim.set_lr(student.optimizer, lr)
                    student.backward(student.module(images, sizes, targets))
                    if student.accelerator.sync_gradients:
                        student.step()  # clip, optimizer
                log.clock.mark(student.name)
        step += 1
        log.count_step(time.perf_counter() - started, index)

        if step % settings.log_every == 0:
            progress.set_postfix({"mean loss": log.losses(step)})
        evaluated = settings.evaluate_every and step % (per_epoch * settings.evaluate_every) == 0
        if evaluated and step < stop:
            evaluate(step)
        if step % (settings.save_every or per_epoch) == 0 or step == stop:
            checkpoints.save(step, students, log, loader)
        progress.update()
        if number := signals.agreed():
            checkpoints.save(step, students, log, loader)
            raise launch.Stopped(f"{log.folder}: stopped by signal {number} at step {step}: --resume", number)
    progress.close()


# ---------------------------------------------------------------- the recipe


@recipe.section
class Student:
    name: recipe.Name
    model: recipe.Text  # timm's name, with a tag where weights is "timm"
    model_args: dict  # passed to timm.create_model
    weights: recipe.Text | None  # an exported folder, a file, "timm"; null: random
    frozen_stages: Annotated[int, Field(ge=0, le=4)]  # 1: the stem and the first stage
    norm: Literal["sync", "batch", "frozen"]  # BatchNorm: over all processes, of one, or kept statistics
    optimizer: recipe.Text  # timm's name
    optimizer_args: dict
    lr: recipe.Number
    weight_decay: recipe.Number
    decay_norm_and_bias: bool
    clip_grad: recipe.Number | None
    paper: dict | None = None
    ema: ClassVar[None] = None  # what checkpoints and distill.Student ask of any student
    grad_checkpointing: ClassVar[bool] = False


@recipe.section
class Recipe:
    about: recipe.Text
    seed: recipe.Whole
    epochs: recipe.Count
    batch_size: recipe.Count  # images per optimizer step, over all processes
    batch_size_per_process: recipe.Count  # images of a forward pass; the rest is gradient accumulation
    schedule: recipe.WarmMilestones
    data: coco.Data
    detector: detectors.Settings
    students: recipe.NonEmpty[Student]
    log_every: recipe.Count = 50  # steps
    evaluate_every: recipe.Count | None = None  # epochs; null: after the last one only
    save_every: recipe.Count | None = None  # steps; null: once an epoch

    def contradictions(self):
        names = [student.name for student in self.students]
        milestones = list(self.schedule.milestones)
        for student in self.students:
            if student.weights == "timm" and "." not in student.model:
                yield f"students: {student.name}: timm has several weights: give model a tag"
        if len(set(names)) < len(names):
            yield f"students: names must differ, got {names}"
        if milestones != sorted(set(milestones)):
            yield f"schedule.milestones: expected ascending epochs, got {milestones}"
        if self.data.crop and self.data.crop.window[0] > self.data.crop.window[1]:
            yield f"data.crop.window: expected least and largest side, got {list(self.data.crop.window)}"
        if any(stage.iou == 0 or min(stage.stds) == 0 for stage in self.detector.stages):
            yield "detector.stages: expected iou and stds above 0"


def load(path, overrides, options):
    """The recipe with the command line's changes: --set, --data, --students."""
    if options.data:
        overrides = [*overrides, f"data.source={json.dumps(options.data)}"]
    settings = recipe.load(path, overrides, Recipe)
    if options.students:
        students = classification.chosen_students(settings, path, options.students)
        settings = dataclasses.replace(settings, students=students)
    return settings


def check_launch(settings, lead):
    """RecipeError for a launch that cannot train the recipe."""
    launch.check_launch(settings, lead)
    if launch.uses_deepspeed(lead):
        raise recipe.RecipeError(
            "DeepSpeed: not supported for detectors, which fit on one GPU: use multi-GPU"
        )
    for student in settings.students:
        if student.norm == "sync" and lead.num_processes > 1 and lead.device.type == "cpu":
            raise recipe.RecipeError(
                f"student {student.name!r}: norm is 'sync', but PyTorch has no BatchNorm over several CPU "
                f"processes: --set students.{student.name}.norm=frozen, or launch one process"
            )


# ---------------------------------------------------------------- a run


def run(path, overrides, out, options):
    """Train a recipe into `out`; everything is checked and built before its folder is made."""
    tracking = dict(log_with="tensorboard", project_config=ProjectConfiguration(str(out), str(out)))
    lead = launch.make_accelerator(**tracking)
    settings = load(path, overrides, options)
    check_launch(settings, lead)
    place = dict(rank=lead.process_index, world=lead.num_processes)
    splits = [
        coco.Split(settings.data.source, name, training=training, **place)
        for name, training in (("train2017", True), ("val2017", False))
    ]
    class_names.check_same(splits[0].names, splits[1].names, "train2017", "val2017")
    pin = lead.device.type == "cuda"
    loader = coco.TrainLoader(splits[0], settings, **place, workers=options.workers, pin=pin)
    built = [build(settings, student, splits[0], lead) for student in settings.students]

    lock = rundir.lock(out) if lead.is_main_process else None
    if lead.is_main_process:
        rundir.open_folder(out, settings, options)
    lead.wait_for_everyone()
    if (result := classification.finished(out, options.limit)) is None:
        students = [
            prepare(student, *parts[:2], loader, **tracking)
            for student, parts in zip(settings.students, built, strict=True)
        ]
        backbones = [backbone for _, _, backbone in built]
        result = train_and_finish(settings, out, lead, loader, splits[1], students, backbones, options)
    if lead.is_main_process:
        rows = [
            {"network": s["name"], "parameters": s["parameters"], **s["last"]} for s in result["students"]
        ]
        print(f"\n{out}\n{table(rows)}")
        lock.close()


def build(settings, student, split, lead):
    """(Detector, optimizer, backbone) of a student; every student starts from the same seed."""
    torch.manual_seed(settings.seed)
    try:
        detector, backbone = detectors.build(settings.detector, student, len(split.names))
        if student.norm == "sync" and lead.num_processes > 1:
            detector = timm.layers.convert_sync_batchnorm(detector)
        return detector, optim.make_optimizer(detector, student), backbone
    except ValueError as error:
        raise recipe.RecipeError(f"student {student.name!r}: {error}") from error


def prepare(student, detector, optimizer, loader, **tracking):
    accelerator = launch.make_accelerator(gradient_accumulation_steps=loader.accumulate, **tracking)
    module, optimizer = accelerator.prepare(detector, optimizer)
    if accelerator.scaler is not None:
        optim.start_momentum(optimizer.optimizer)
    return distill.Student(student, accelerator, module.train(), optimizer, None, detector.terms)


def train_and_finish(settings, out, lead, loader, split, students, backbones, options):
    """Train from where the run was left; returns what result.json holds."""
    total = settings.epochs * loader.steps_per_epoch
    stop = min(total, options.limit or total)
    log = Log(out, settings, lead, students, loader, split, stop, options.limit, BOARD)
    checkpoints = checkpoint.Checkpoints(out, settings, lead)
    signals = launch.Signals(lead.num_processes)
    step = checkpoints.restore(students, log, loader)
    log.open_board(step)
    lead.print(plan(log, step))
    with signals:
        train(
            *(settings, loader, students, log, checkpoints, signals, step, stop),
            evaluate=lambda step: evaluate(log, split, step, options.workers),
        )
        if log.steps:
            log.losses(stop)  # after the last checkpoint, because a resumed run would not have this row
        found = evaluate(log, split, stop, options.workers)
        result = None
        if lead.is_main_process:
            for student in students:
                export(log, student, split, found[student.name])
            result = result_of(log, stop, backbones)
            finish.write_result(out, result)  # last, because a run with a result is finished
    log.close_board()
    return result


def plan(log, step):
    """What a run will do, as text."""
    settings, loader, data = log.settings, log.loader, log.settings.data
    lines = [
        f"{log.folder}: {settings.epochs} epochs of {loader.steps_per_epoch} steps"
        + (f", of which this run makes {log.stop} steps" if log.limit else "")
        + (f"; resumed at step {step}" if step else ""),
        f"  data: {loader.size:,} images with objects and {len(log.test_loader):,} test images of "
        f"{data.source}, {len(loader.split.names)} classes; "
        f"{loader.split.bytes.nbytes / 1e6:,.1f} MB of annotations",
        f"  batch: {settings.batch_size} = {loader.world} processes x {loader.per_process} "
        f"x {loader.accumulate} accumulated; at most {max(data.short_sides)} x {data.long_side} pixels",
    ]
    for student in log.students:
        s = student.settings
        lines.append(
            f"  student {s.name}: {s.model} from {s.weights or 'random weights'}, "
            f"{count_parameters(student.distilled):,} parameters, "
            f"{len(settings.detector.stages)} stages of heads, {s.frozen_stages} of the trunk frozen, "
            f"norm {s.norm}; {s.optimizer} {s.optimizer_args} lr {s.lr:g}, "
            f"weight decay {s.weight_decay:g}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- evaluation and what a run leaves


def evaluate(log, split, step, workers):
    """Score every student on the test images, each on one process; returns {name: predictions}.

    The scores become `student.last` and a row, and some images with their detections go to TensorBoard.
    """
    lead, data = log.lead, log.settings.data
    detectors_of = [(student, student.distilled.eval()) for student in log.students]
    if lead.num_processes > 1:
        for _, detector in detectors_of:  # BatchNorm of each process has seen other images
            distribute_bn(detector, lead.num_processes, reduce=True)
    found, ids = {student.name: [] for student in log.students}, []
    place = dict(rank=lead.process_index, world=lead.num_processes)
    loader = coco.test_loader(split, data, **place, workers=workers, limit=log.limit)
    disable = not lead.is_main_process
    for images, sizes, i in tqdm(
        loader, "test", len(loader.sampler), disable=disable, mininterval=1, leave=False
    ):
        for student, detector in detectors_of:
            with torch.no_grad(), student.accelerator.autocast():
                (detections,) = detector(images.to(lead.device), sizes)
            detections = in_file(detections, sizes[0], split.images[i])
            found[student.name] += coco.predictions(split, i, **detections)
            if len(ids) < DRAWN:
                draw(student, split, i, detections, step)
        ids.append(split.images[i]["id"])
    ids = gather_object(ids)
    for student, detector in detectors_of:
        detector.train()
        found[student.name] = gather_object(found[student.name])
    # pycocotools takes minutes on all of COCO: each process scores other students, so that none waits long
    mine = log.students[lead.process_index :: lead.num_processes]
    scores = [(s.name, coco.average_precision(split.truth, found[s.name], ids)) for s in mine]
    scores = dict(gather_object(scores))
    for student in log.students:
        counts = {"n": len(ids), "step": step, "epoch": step / log.steps_per_epoch}
        student.last = scores[student.name] | counts
    log.write(step, {f"{key}/{name}": value for name, ap in scores.items() for key, value in ap.items()})
    return found


def in_file(detections, size, image):
    """The detections of a resized image (its height and width) in the pixels of its file, on the host."""
    height, width = image["height"], image["width"]
    scale = detections["boxes"].new_tensor([width / size[1], height / size[0]]).repeat(2)
    boxes = detections["boxes"].float() * scale
    masks = paste_masks_in_image(detections["masks"], boxes, (height, width))[:, 0] >= 0.5
    return {
        "boxes": boxes.cpu(),
        "scores": detections["scores"].cpu(),
        "labels": detections["labels"].cpu(),
        "masks": masks.cpu(),
    }


def draw(student, split, i, detections, step):
    """Put a test image with its detections, boxes and masks, on the student's TensorBoard."""
    if not student.accelerator.trackers:
        return
    kept = detections["scores"] >= DRAWN_SCORE
    image = torch.from_numpy(np.array(split.decoded(i))).permute(2, 0, 1)
    if kept.any():  # torchvision warns of nothing to draw
        image = with_detections(image, {key: value[kept] for key, value in detections.items()}, split.names)
    for tracker in student.accelerator.trackers:
        tracker.writer.add_image(f"test/{split.images[i]['file_name']}", image, step)


def with_detections(image, detections, names):
    colors = [COLORS[i % len(COLORS)] for i in range(len(detections["masks"]))]
    for mask, color in zip(detections["masks"], colors, strict=True):  # together, overlaps would be black
        image = draw_segmentation_masks(image, mask, alpha=0.5, colors=color)
    pairs = zip(detections["labels"], detections["scores"], strict=True)
    texts = [f"{names[label - 1]} {score:.2f}" for label, score in pairs]
    return draw_bounding_boxes(image, detections["boxes"], texts, colors)


def export(log, student, split, found):
    """Write students/NAME: the detector as detectors.load_exported reads it, and its predictions."""
    folder, net, data = log.folder / "students" / student.name, student.net, log.settings.data
    exported = detectors.Exported(
        model=student.settings.model,
        model_args=student.settings.model_args,
        **net.statistics,
        detector=log.settings.detector,
        classes=tuple(split.names),
        category_ids=tuple(split.category_ids),
        short_side=data.test_short_side,
        long_side=data.long_side,
    )
    detectors.export(student.distilled, folder, exported)
    rundir.write_atomic(folder / "predictions.json", json.dumps(found))


def result_of(log, step, backbones):
    """What result.json holds; the scores are those of the last evaluation."""
    rows, students = log.rows(), log.students
    curves = {s.name: finish.curve(rows, s.name, "step", detectors.Detector.terms) for s in students}
    accuracy = {s.name: finish.curve(rows, s.name, "epoch", ("ap_box", "ap_mask")) for s in students}
    described = [
        {"name": s.name, "parameters": count_parameters(s.distilled), "last": s.last, "backbone": backbone}
        for s, backbone in zip(students, backbones, strict=True)
    ]
    return {
        "seed": log.settings.seed,
        "students": described,
        "curves": curves,
        "accuracy": accuracy,
        "teacher": None,
        **finish.facts_of_run(log, step, "detect.py"),
    }


def main(arguments=None):
    parser = classification.make_parser(__doc__)
    args = parser.parse_args(arguments)
    classification.launch_command(parser, args, lambda out: run(args.recipe, args.set, out, args))


if __name__ == "__main__":
    main()
