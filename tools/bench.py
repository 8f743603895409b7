"""Time and memory of this project beside the usual ways to do the same work, measured side by side.

    python tools/bench.py input      # images per second: timm's loader, our pipelines; CIFAR by PIL, resident
    python tools/bench.py step       # a training step: mdistiller's, vanillaKD's and timm's loop, ours
    python tools/bench.py losses     # losses and their definitions: time, peak memory
    python tools/bench.py startup    # imports; a dry run of the quickstart
    python tools/bench.py folders    # listing class folders of images
    python tools/bench.py detection  # batches by aspect ratio; annotations in memory
    python tools/bench.py overhead   # what our loop adds to a plain one, with next to no arithmetic
        [--rounds 5] [--threads 1] [--device cuda] [--data DIR] [--json results/bench.json]
    python tools/bench.py table [--json FILE] [--write docs/speed.md]    # what --json wrote, as Markdown

Every way has a process of its own, and the ways take turns of about a second. Times are medians over the
rounds; a ratio is the median of the ratios to the first way within a round, so that other work on the
machine affects all ways. On a CPU the time is the CPU time of the process, on a GPU that of the wall clock.
Memory is the peak during one call above what is there before it, in a fresh process: of the
process on a CPU, of PyTorch's allocator on a GPU. Not tested on a GPU: there was none.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm.data
import timm.task
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import register_model
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import Comparison, measure, table
from paper import rewrite

import augment
import coco
import data
import distill
import folders
import launch
import losses
import models
import recipe
import sources
import train
from evaluate import to_float
from log import Log

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- input


def compare_input(args):
    for interpolation in ("bicubic", "random"):
        kernel = f"data.crop.interpolation={interpolation}"
        load = partial(data_of, args, "a2_res50_beitb", "imagenet_sample", kernel)
        exact, fast = load(), load("data.pipeline=fast")
        ways = {
            "timm's create_loader": timm_batches(exact, 50),
            "ours, pipeline timm": our_batches(exact, 50),
            "ours, pipeline fast": our_batches(fast, 50),
            "ours, pipeline fast, 3 repeats": our_batches(dataclasses.replace(fast, repeats=3), 50),
        }
        title = f"224 pixels, {interpolation} kernel, {exact.rand_augment}, uint8, imagenet_sample"
        yield Comparison(f"training crops, {title}", ways, images=50)

    settings = data_of(args, "prev_cifar_res20_res56", "cifar100")
    resident = dataclasses.replace(settings, resident=True)
    ways = {
        "PIL data set and DataLoader, normalised": pil_batches(settings, 64),
        "ours, memory-mapped PNG, uint8": our_batches(settings, 64),
        "ours, resident, uint8": our_batches(resident, 64),
        "ours, resident, normalised": normalised(our_batches(resident, 64)),
    }
    yield Comparison("training crops, 32 pixels, batches of 64, cifar100", ways, images=64)


def data_of(args, name, folder, *overrides):
    """The recipe.Data of a recipe with the images of a folder of --data."""
    source = args.data / folder
    if not source.is_dir():
        raise recipe.RecipeError(f"{source}: no such folder: name the one around {folder}/ with --data")
    plain = [f"data.source={source}", "data.train_size=null", "data.streaming=false", "data.shuffle_buffer=0"]
    plain += ["data.repeats=1", f"data.fraction={0.2 if args.small else 1.0}"]
    return recipe.load(ROOT / "recipes" / f"{name}.json", [*plain, *overrides]).data


def raw_images(settings):
    """The files of the training images of a recipe.Data, as bytes."""
    split = sources.open_split(settings, settings.train_split)
    return [sources.encoded(row, i, settings, split).content for i, row in enumerate(split.rows)]


def our_batches(settings, batch):
    loader = data.TrainLoader(settings, batch_size=batch, batch_size_per_process=batch)
    yield from loader.batches(0, 0, 10**9)


def normalised(batches):
    mean, std = (torch.rand(1, 3, 1, 1) for _ in range(2))
    return ((to_float(images, "cpu") - mean) / std for images, *_ in batches)


class Raws(list):
    """Images as bytes, as the reader of timm's ImageDataset gives them."""

    def __getitem__(self, i):
        return io.BytesIO(super().__getitem__(i)), 0


def timm_batches(settings, batch):
    """create_loader with its prefetcher, up to the uint8 batches that the prefetcher moves to a GPU."""
    crop, images = settings.crop, timm.data.ImageDataset("", reader=Raws(raw_images(settings)))
    views = dict(scale=crop.scale, ratio=crop.ratio, interpolation=crop.interpolation, hflip=settings.hflip)
    views |= dict(auto_augment=settings.rand_augment, color_jitter=None, is_training=True)
    here = dict(num_workers=0, device=torch.device("cpu"))
    loader = timm.data.create_loader(images, settings.size, batch, **views, **here).loader
    while True:
        yield from loader


def pil_batches(settings, batch):
    """The usual CIFAR pipeline, mdistiller's among others: pixels in memory, one image at a time."""
    pixels = [np.asarray(augment.decode(raw)) for raw in raw_images(settings)]
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))])

    def collate(images):
        return torch.stack([transform(Image.fromarray(image)) for image in images])

    loader = DataLoader(pixels, batch, shuffle=True, drop_last=True, collate_fn=collate)
    while True:
        yield from loader


# ---------------------------------------------------------------- a training step


def compare_step(args):
    cifar, imagenet = ("cifar_resnet56", "cifar_resnet20", 64, 32), ("resnet34", "resnet18", 8, 224)
    if args.small:
        cifar, imagenet = ("cifar_resnet8", "cifar_resnet8", 2, 32), ("resnet10t", "resnet10t", 2, 32)
    elif args.device != "cpu":
        imagenet = ("resnet34", "resnet18", 256, 224)
    yield compare_loops(args, "prev_cifar_res20_res56", cifar, "mdistiller's loop")
    yield compare_loops(args, "strong_res18_res34", imagenet, "vanillaKD's loop", "timm's task")


def compare_loops(args, name, pair, plain, timms=None):
    settings = step_settings(name, *pair)
    ways = {plain: plain_loop(settings, args.device, reads=True)}
    if timms:
        ways[timms] = plain_loop(settings, args.device, timms_task=True)
    ways["ours"] = our_loop(settings)
    if not args.small:  # compiling takes a minute or two
        compiled = dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR")
        ways["ours, compiled"] = our_loop(settings, **compiled)
        half = dict(compiled, ACCELERATE_MIXED_PRECISION="bf16")
        ways["ours, compiled, bf16"] = our_loop(settings, **half)
    title = "a step, {} to {}, {} images of {} pixels".format(*pair)
    return Comparison(title, ways, images=settings.batch_size)


def compare_overhead(args):
    """A call is 100 steps, because a call of our loop sets up a progress bar."""
    settings = step_settings("prev_cifar_res20_res56", "bench_matrix", "bench_matrix", 64, 8)
    ways = {
        "a plain loop": plain_loop(settings, args.device, steps=100),
        "ours": our_loop(settings, steps=100),
    }
    title = "100 steps of a network with one matrix, 64 images of 8 pixels"
    yield Comparison(title, ways, images=6400)


@register_model
def bench_matrix(num_classes, **_):
    """A network of one matrix, for images of 8 pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
    model.pretrained_cfg = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear")
    return model


def step_settings(name, teacher, student, batch, size):
    """A recipe with student `kd` and other networks, far from a row of the log and an epoch's end."""
    sizes = [f"batch_size={batch}", f"batch_size_per_process={batch}", f"data.size={size}"]
    off = ["data.mixup=0", "data.cutmix=0", "data.random_erasing=0", "log_every=1000000000"]
    settings = recipe.load(ROOT / "recipes" / f"{name}.json", [*sizes, *off])
    (kd,) = (student for student in settings.students if student.name == "kd")
    kd = dataclasses.replace(kd, model=student, model_args={})
    untrained = recipe.Teacher(model=teacher)
    return dataclasses.replace(settings, teacher=untrained, students=(kd,))


def one_batch(settings, device):
    """(images uint8 [B, 3, H, W], class ids [B], image ids [B]) on the device."""
    n, size = settings.batch_size, settings.data.size
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, device=device)
    return images, torch.randint(settings.data.classes, (n,), device=device), torch.arange(n, device=device)


def our_loop(settings, steps=1, **launched):
    """train.train with its parts; `launched`: what `accelerate launch` would set in the environment."""
    os.environ.update(launched)
    lead, (student,) = launch.make_accelerator(), settings.students
    endless_epoch = dict(accumulate=1, steps_per_epoch=10**9, broken={})
    batches = itertools.repeat(one_batch(settings, lead.device))
    loader = SimpleNamespace(batches=lambda *_: batches, **endless_epoch)
    students = [distill.prepare_student(student, *distill.build_student(settings, student), loader)]
    teacher = distill.build_teacher(settings.teacher, settings.data).to(lead.device)
    teacher = train.compiled(distill.freeze(teacher, settings.data.size), lead, 1)
    teacher = distill.Teacher(teacher, settings.teacher, lead)
    log = Log(Path("bench"), settings, lead, students, loader, None, loader.steps_per_epoch)
    checkpoints = SimpleNamespace(save=lambda *_: None)
    parts = settings, loader, teacher, students, log, checkpoints, launch.Signals(1)
    for step in itertools.count(0, steps):
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            train.train(*parts, step, step + steps)
        yield


def plain_loop(settings, device, steps=1, reads=False, timms_task=False):
    """A loop as other repositories write it, or around timm's task in the layout that its script offers.

    reads: the loss and two accuracies of every step, as mdistiller and vanillaKD.
    """
    layout = torch.channels_last if timms_task else torch.contiguous_format
    data, (student,) = settings.data, settings.students
    network = models.build(student.model, classes=data.classes, size=data.size).model.train()
    teacher = distill.build_teacher(settings.teacher, data).model.eval().requires_grad_(False)
    network, teacher = (net.to(device).to(memory_format=layout) for net in (network, teacher))
    names = dict(opt=student.optimizer, lr=student.lr, weight_decay=student.weight_decay)
    optimizer = create_optimizer_v2(network, **names, **student.optimizer_args)
    images, labels, _ = one_batch(settings, device)
    mean, std = (torch.full((1, 3, 1, 1), value, device=device) for value in (0.45, 0.25))
    task = partial(plain_task, network, teacher)
    if timms_task:
        task = timm.task.LogitDistillationTask(network, teacher, device=images.device, temperature=4.0)

    while True:
        for _ in range(steps):
            inputs = ((images.float() / 255 - mean) / std).contiguous(memory_format=layout)
            terms = task(inputs, labels)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            if reads:
                top = terms["output"].topk(5)[1].eq(labels[:, None])
                for value in (terms["loss"], top[:, :1].float().mean(), top.any(dim=1).float().mean()):
                    value.item()
        yield


def plain_task(network, teacher, images, labels):
    """Cross-entropy and distillation as mdistiller and vanillaKD write them, called as timm's task is."""
    logits = network(images)
    with torch.no_grad():
        teacher_logits = teacher(images)
    log_p, p = F.log_softmax(logits / 4, dim=1), F.softmax(teacher_logits / 4, dim=1)
    kd = 16 * F.kl_div(log_p, p, reduction="batchmean")
    return {"loss": 0.1 * F.cross_entropy(logits, labels) + 0.9 * kd, "output": logits}


# ---------------------------------------------------------------- losses


def compare_losses(args):
    batch, classes, width, images, negatives = 256, 1000, 2048, 1_281_167, 16_384
    if args.small:
        batch, classes, width, images, negatives = 8, 10, 16, 100, 8
    few = batch // 8  # of CRD, whose definition copies a row for each negative of each image
    shapes = [(width,)]

    def crd():
        return losses.CRD(shapes, shapes, torch.arange(images) % classes, negatives=negatives)

    def compared(name, makes, batch, width, ids=None):
        """Losses {name: function that makes it} on [batch, width]; on features with ids below `ids`."""
        ways = {way: loss_step(make, batch, width, ids, args.device) for way, make in makes.items()}
        return Comparison(f"{name}, forward and backward, {batch} x {width}", ways, memory=True)

    rkds = {"its definition": lambda: defined_rkd, "ours": lambda: losses.RKD(shapes, shapes)}
    yield compared("rkd", rkds, batch, width, ids=batch)
    crds = {"its definition": lambda: DefinedCRD(images, few, width, negatives), "ours": crd}
    yield compared(f"crd, {images:,} images, {negatives:,} negatives", crds, few, width, ids=images)
    on_logits = {name: partial(losses.LOSSES.get, name) for name in ("kd", "dkd", "dist", "bkl")}
    yield compared("losses on logits", on_logits, batch, classes)


def loss_step(make, batch, width, ids, device):
    loss = make()
    student, teacher = (3 * torch.randn(batch, width, device=device) for _ in range(2))
    student.requires_grad_()
    inputs = student, teacher, torch.randint(ids or width, (batch,), device=device)
    if ids:
        inputs = [student], [teacher], None, inputs[-1]
    if isinstance(loss, nn.Module):
        loss.to(device)
    while True:
        student.grad = None
        loss(*inputs).backward()
        yield


def defined_rkd(student_features, teacher_features, target, index):
    """With [B, B, D] tensors, as vanillaKD and mdistiller."""

    def relations(x):
        gaps = x[:, None] - x
        distance = gaps.norm(dim=2)
        unit = F.normalize(gaps, dim=2)
        return distance / distance[distance > 0].mean(), unit @ unit.transpose(1, 2)

    with torch.no_grad():
        teacher = relations(*teacher_features)
    distance, angle = map(F.smooth_l1_loss, relations(*student_features), teacher)
    return 25 * distance + 50 * angle


class DefinedCRD(nn.Module):
    """With [B, 1 + K, D] rows copied from the banks; negatives of whatever class, drawn beforehand."""

    def __init__(self, images, batch, width, negatives, dim=128):
        super().__init__()
        self.images, self.noise = images, negatives / images
        self.student, self.teacher = nn.Linear(width, dim), nn.Linear(width, dim)
        banks = ((2 * torch.rand(images, dim) - 1) * (3 / dim) ** 0.5 for _ in range(2))
        self.bank_student, self.bank_teacher = map(nn.Buffer, banks)
        self.sampled = nn.Buffer(torch.randint(images, (batch, 1 + negatives)))

    def forward(self, student_features, teacher_features, target, index):
        v_student = F.normalize(self.student(*student_features))
        v_teacher = F.normalize(self.teacher(*teacher_features))
        loss = self.contrast(v_student, self.bank_teacher) + self.contrast(v_teacher, self.bank_student)
        with torch.no_grad():
            for v, bank in ((v_student, self.bank_student), (v_teacher, self.bank_teacher)):
                bank.index_copy_(0, index, F.normalize(0.5 * bank[index] + 0.5 * v))
        return loss

    def contrast(self, v, bank):
        rows = bank.index_select(0, self.sampled.flatten()).view(*self.sampled.shape, -1)
        x = (torch.bmm(rows, v[:, :, None]).squeeze(2) / 0.07).exp()
        x = x / (x.detach().mean() * self.images)
        positive = x[:, 0] / (x[:, 0] + self.noise + 1e-7)
        negative = self.noise / (x[:, 1:] + self.noise + 1e-7)
        return -(positive.log().sum() + negative.log().sum()) / len(v)


# ---------------------------------------------------------------- start-up, class folders, detection


def repeated(function, *arguments, **options):
    while True:
        function(*arguments, **options)
        yield


def compare_startup(args):
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    commands = ["-c 'import torch, timm, accelerate, datasets'", "-c 'import train'"]
    commands += ["train.py recipes/quickstart.json --dry-run"]
    if args.small:
        commands = ["-c 'import json'", "-c 'import csv'"]
    run = partial(repeated, subprocess.run, cwd=ROOT, check=True, capture_output=True)
    ways = {command: run([sys.executable, *shlex.split(command)]) for command in commands}
    yield Comparison("start-up", ways)


def compare_folders(args):
    """Of empty files: nothing is decoded."""
    classes, images = (3, 4) if args.small else (1000, 60)
    root, count = args.folder / "photos", classes * images
    for i in range(count):
        file = root / "train" / f"{i % classes:04}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    ways = {
        "torchvision's ImageFolder": repeated(ImageFolder, root / "train"),
        "ours": repeated(folders.open_splits.__wrapped__, root),  # not from its cache
    }
    yield Comparison(f"listing {count:,} files in {classes} class folders", ways, images=count)


def compare_detection(args):
    """Batches of 4 for a trunk, at 333x200, and the annotations of training in memory."""
    split = coco.Split(args.data / "coco_sample", "train2017", training=True)
    sides = [coco.resized(image["width"], image["height"], 200, 333) for image in split.images]
    images = [torch.zeros(3, height, width, dtype=torch.uint8) for width, height in sides]
    network = timm.create_model("resnet18", num_classes=0).eval().to(args.device)

    @torch.no_grad()
    def features(batches):
        for batch in batches:
            network(to_float(coco.padded([images[i] for i in batch])[0], args.device))

    order = np.random.default_rng(0).permutation(len(images)).tolist()
    mixed = [order[i : i + 4] for i in range(0, len(order) - 3, 4)]
    apart = coco.batches_of_epoch(split.is_wide, 4, seed=0, epoch=0)
    ways = {
        "batches at random": repeated(features, mixed),
        "wide and tall images apart": repeated(features, apart),
    }
    yield Comparison("a ResNet-18 on batches of 4 images of COCO", ways, images=4 * len(mixed))

    copies = 1 if args.small else 400
    count = len(split) * copies

    def as_objects():
        return len([split.objects(i % len(split)) for i in range(count)])

    def as_bytes():
        kept = np.tile(split.bytes, copies)
        for i in range(count):
            split.objects(i % len(split))
        return kept

    ways = {
        "all kept as Python objects": repeated(as_objects),
        "kept as one array of bytes": repeated(as_bytes),
    }
    title = f"reading the annotations of {count:,} images of COCO"
    yield Comparison(title, ways, images=count, memory=True)


# ---------------------------------------------------------------- command line

SECTIONS = {
    "input": compare_input,
    "step": compare_step,
    "losses": compare_losses,
    "startup": compare_startup,
    "overhead": compare_overhead,
    "folders": compare_folders,
    "detection": compare_detection,
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("section", choices=[*SECTIONS, "table"])
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1, help="of a process on a CPU")
    add("--device", default="cpu", help="cpu or cuda")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", metavar="DIR")
    add("--json", type=Path, metavar="FILE", help="put the result into this file; other sections in it stay")
    add("--write", type=Path, metavar="FILE.md", help="of table: put it between the markers of this file")
    add("--small", action="store_true", help="tiny sizes and one call a turn: shows that a section works")
    args = parser.parse_args(arguments)
    try:
        if args.section != "table":
            result = measure(SECTIONS[args.section], args)
            if args.json:
                known = json.loads(args.json.read_text()) if args.json.exists() else {}
                args.json.write_text(json.dumps(known | {args.section: result}, indent=2) + "\n")
            return
        text = table(args.json or ROOT / "results" / "bench.json")
        rewrite(args.write, "bench", text) if args.write else print(text)
    except (recipe.RecipeError, sources.DataError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
