"""What the resident set and the teacher's memo save on CIFAR-100, by the CPU time of one process with one thread.

    python tools/bench_cifar.py data --data ../shared/data/cifar100    # loaders of single images, the resident set
    python tools/bench_cifar.py memo --data ../shared/data/cifar100    # a step of kd, res56 -> res20
        [--rounds 5] [--steps 5] [--json FILE]

Rounds take the ways in turn, so that other work on the machine meets all; a ratio is the median of the rounds' ratios to the
first way. A JSON file keeps what it has of the other section.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
import recipe
import train
from evaluate import to_float

ROOT = Path(__file__).resolve().parent.parent
BATCH, MEAN, STD = 64, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class SingleImages(Dataset):
    """The usual CIFAR pipeline, mdistiller's among others: pixels in memory, PIL and torchvision on one image at a time."""

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i], i


def make_settings(source, *changes):
    changes = [f"data.source={json.dumps(source)}", "data.resident=true", *changes]
    settings = recipe.load(ROOT / "recipes" / "prev_cifar_res20_res56.json", changes)
    return dataclasses.replace(settings, students=settings.students[:1])


def endless(batches):
    """Batches of a loader, epoch after epoch; each way goes on where it was in the last round."""
    return itertools.chain.from_iterable(iter(batches) for _ in itertools.count())


def loaders(args):
    """{way: a function that makes one batch}"""
    settings = make_settings(args.data).data
    sizes = dict(seed=0, batch_size=BATCH, batch_size_per_process=BATCH)
    resident = data.TrainLoader(settings, **sizes)
    mapped = data.TrainLoader(dataclasses.replace(settings, resident=False), **sizes)
    pixels = resident.resident.images[:, :, 4:36, 4:36].permute(0, 2, 3, 1).contiguous().numpy()
    usual = endless(DataLoader(SingleImages(pixels, resident.resident.labels.tolist()), BATCH, shuffle=True))
    ours, one_by_one = (loader.batches(0, 10**6) for loader in (resident, mapped))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return {
        "PIL, one at a time, normalised": lambda: next(usual)[0],
        "memory-mapped PNG, one at a time, uint8": lambda: next(one_by_one)[0],
        "resident, uint8": lambda: next(ours)[0],
        "resident, float in [0, 1]": lambda: to_float(next(ours)[0], "cpu"),
        "resident, normalised": lambda: (to_float(next(ours)[0], "cpu") - mean) / std,
    }


def steps(args):
    """{way: a function that makes one training step}; all ways take the same batches."""
    folder = tempfile.TemporaryDirectory(dir=ROOT)  # on this disk; as long as the functions live
    settings = make_settings(args.data)
    teacher = dataclasses.replace(settings.teacher, recipe=None, model="cifar_resnet56")
    options = train.Options(args.data, None, None, False, False, 0)
    network = models.build("cifar_resnet56", classes=100, size=32).eval().requires_grad_(False)
    out = Path(folder.name) / "run"
    out.mkdir()
    run = train.make_run(dataclasses.replace(settings, teacher=teacher), out, network, options)
    memos, batches = {}, list(run.loader.batches(0, args.steps))
    for kind in ("device", "disk"):
        run.settings = dataclasses.replace(settings, teacher=dataclasses.replace(teacher, memo=kind))
        memos[kind] = train.make_memo(run, Path(folder.name))
        memos[kind].folder = folder

    def step(batches, memo, forget):
        images, labels, index, crops = next(batches)
        if forget:
            memo.checks[crops[0] * memo.views + crops[1]] = 0
        run.memo = memo
        images = to_float(images, "cpu")
        taught = train.recall(run, crops) if memo else train.teach(run, images)
        train.learn(run.trainees[0], images, taught, labels, index, 0.01, 0.9)

    ways = {"without": (None, False)} | {
        f"{kind}, {state}": (memo, state == "cold") for kind, memo in memos.items() for state in ("cold", "warm")
    }
    return {way: functools.partial(step, itertools.cycle(batches), *what) for way, what in ways.items()}


def measure(ways, rounds, calls, images):
    """[{"way", "seconds" a batch, "images_per_second", "ratio"}], medians over rounds."""
    taken = {way: [] for way in ways}
    for round_ in range(rounds + 1):  # the first is for warming up
        for way, function in ways.items():
            started = time.process_time()
            for _ in range(calls):
                function()
            if round_:
                taken[way].append((time.process_time() - started) / calls)
    first = next(iter(taken.values()))
    rows = []
    for way, seconds in taken.items():
        ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
        middle = statistics.median(seconds)
        rows.append({"way": way, "seconds": middle, "images_per_second": images / middle, "ratio": ratio})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["data", "memo"])
    parser.add_argument("--data", required=True, help="CIFAR-100: a folder, or its name on the hub")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="batches a round (default: 100 of data, 5 of memo)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.steps = args.steps or {"data": 100, "memo": 5}[args.section]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure({"data": loaders, "memo": steps}[args.section](args), args.rounds, args.steps, BATCH)
    print(f"{args.section}: CIFAR-100, batches of {BATCH}, one thread, CPU time, median of {args.rounds} rounds")
    for row in rows:
        print(f"{row['way']:42}{1000 * row['seconds']:10.2f} ms{row['images_per_second']:10.0f} img/s{row['ratio']:8.2f}x")
    if args.json:
        result = {"rows": rows, "rounds": args.rounds, "steps": args.steps, "batch": BATCH, "threads": 1}
        result |= {"tool": shlex.join(sys.argv), **train.environment(train.make_accelerator())}
        del result["command"]
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(known | {args.section: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
