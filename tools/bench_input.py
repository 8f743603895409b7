"""What an ImageNet crop costs on the CPU: timm's loader against data.py's pipelines, by the CPU time of one process and thread.

    python tools/bench_input.py --data ../shared/data/imagenet_sample
        [--recipe a2_res50_beitb] [--interpolation random] [--rounds 15] [--batch 48] [--json FILE]
    python tools/bench_input.py --data DIR --stages      # where the time of the fast pipeline goes

Rounds take the ways in turn, so that other work on the machine meets all; a ratio is the median of the rounds' ratios to timm,
with the quarter and three-quarter ratios beside it. All ways serve the same images of an epoch, uint8, in batches. timm's is
its data set and transforms with its fast_collate, as create_loader with the prefetcher has them, from bytes in memory;
data.py reads the parquet files. "decode only" is the limit of what decodes whole images: simplejpeg, into memory that is kept.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import recipe
import train

ROOT = Path(__file__).resolve().parent.parent


def settings_of(args):
    path, source = ROOT / "recipes" / f"{args.recipe}.json", json.dumps(str(args.data))
    section = recipe.load(path, [f"data.source={source}"]).data
    streamless = dict(streaming=False, shuffle_buffer=0, train_size=None, repeats=1, test_split=section.train_split)
    crop = dataclasses.replace(section.crop, interpolation=args.interpolation or section.crop.interpolation)
    return dataclasses.replace(section, **streamless, crop=crop)


class Timms:
    """create_loader's batches with the prefetcher: ImageDataset's decoding, transforms to uint8, fast_collate."""

    def __init__(self, settings, raws):
        self.raws, crop = raws, settings.crop
        self.transform = create_transform(
            settings.size,
            is_training=True,
            use_prefetcher=True,
            scale=crop.scale,
            ratio=crop.ratio,
            hflip=settings.hflip,
            color_jitter=None,
            auto_augment=settings.rand_augment,
            interpolation=crop.interpolation,
        )

    def __call__(self, index):
        return fast_collate([(self.transform(Image.open(io.BytesIO(self.raws[i])).convert("RGB")), 0) for i in index])


class Ours:
    """The training loader's batches, in this process."""

    def __init__(self, settings, batch, **changes):
        loader = data.TrainLoader(
            dataclasses.replace(settings, **changes), seed=0, batch_size=batch, batch_size_per_process=batch, device="cpu"
        )
        self.images, self.repeats = data._Images(loader), loader.data.repeats

    def __call__(self, index):
        keys = itertools.product(index[: len(index) // self.repeats], range(self.repeats))
        return self.images[[(0, repeat, i) for i, repeat in keys]]


def decode_only(raws, room, index):
    for i in index:
        simplejpeg.decode_jpeg(raws[i], buffer=room)


def ways(args):
    """{name: a function of a batch's row numbers}"""
    settings = settings_of(args)
    rows = data.open_split(settings, settings.train_split).rows
    raws = [data._read_bytes(image) for image in rows[:][settings.image]]
    fast = functools.partial(Ours, settings, args.batch, pipeline="fast")
    return {
        "timm, uint8, fast_collate": Timms(settings, raws),
        "data.pipeline timm": Ours(settings, args.batch),
        "fast": fast(),
        "fast, RandAugment on the device": fast(rand_augment_on="device"),
        "fast, 3 repeats": fast(repeats=3),
        "fast, 3 repeats, RandAugment on the device": fast(repeats=3, rand_augment_on="device"),
        "decode only": functools.partial(decode_only, raws, np.empty(data.ROOM, np.uint8)),
    }, len(rows)


def measure(args):
    """[{"way", "seconds" a crop, "images_per_second", "ratio", "quarters"}]"""
    functions, n = ways(args)
    order, taken = np.random.default_rng(0), {way: [] for way in functions}
    for round_ in range(args.rounds + 1):  # the first is for warming up
        index = order.choice(n, args.batch, replace=False).tolist()
        for way, function in functions.items():
            started = time.process_time()
            function(index)
            if round_:
                taken[way].append((time.process_time() - started) / args.batch)
    first, rows = next(iter(taken.values())), []
    for way, seconds in taken.items():
        ratios, middle = [a / b for a, b in zip(first, seconds, strict=True)], statistics.median(seconds)
        low, ratio, high = statistics.quantiles(ratios, n=4)
        row = {"way": way, "seconds": middle, "images_per_second": 1 / middle, "ratio": ratio, "quarters": [low, high]}
        rows.append(row)
    return rows


def stages(args):
    """[{"way", "seconds" a crop, "images_per_second", "ratio": share}] of the fast pipeline's parts, timed inside of it."""
    spent = dict.fromkeys(
        ("read the row", "look through the bytes", "draw", "decode", "crop and resize", "RandAugment", "batch"), 0.0
    )

    def timed(owner, name, stage):
        function = getattr(owner, name)

        def call(*a, **k):
            started = time.process_time()
            result = function(*a, **k)
            spent[stage] += time.process_time() - started
            return result

        setattr(owner, name, call)

    own, n = Ours(settings_of(args), args.batch, pipeline="fast"), 0
    own(range(args.batch))
    views, rows = own.images.views, own.images.rows
    for name, stage in (("_draw", "draw"), ("_pixels", "decode"), ("_resized", "crop and resize"), ("painter", "RandAugment")):
        timed(views, name, stage)
    timed(data._Jpeg, "of", "look through the bytes")
    timed(data, "default_collate", "batch")
    total = 0.0
    for start in range(0, (args.rounds * args.batch) % (len(rows) - args.batch) + 1, args.batch):
        index = range(start, start + args.batch)
        started = time.process_time()
        rows[list(index)]
        spent["read the row"] += time.process_time() - started
        started = time.process_time()
        own(index)
        total, n = total + time.process_time() - started, n + args.batch
    spent["the rest"] = total - sum(spent.values())
    return [{"way": s, "seconds": t / n, "images_per_second": n / t, "ratio": t / total} for s, t in spent.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="parquet files of ImageNet, or a part of it")
    parser.add_argument("--recipe", default="a2_res50_beitb", help="whose augmentation is used")
    parser.add_argument("--interpolation", choices=["random", "bilinear", "bicubic"], help="default: the recipe's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    section = "stages" if args.stages else "ways"
    rows = stages(args) if args.stages else measure(args)
    crop = settings_of(args).crop.interpolation
    print(f"{section}: {args.recipe}, crops {crop}, batches of {args.batch}, one thread, CPU time, {args.rounds} rounds")
    for row in rows:
        spread = "  ({:.2f} to {:.2f})".format(*row["quarters"]) if "quarters" in row else ""
        print(f"{row['way']:44}{1000 * row['seconds']:7.2f} ms{row['images_per_second']:8.0f} img/s{row['ratio']:7.2f}{spread}")
    if args.json:
        result = {"rows": rows, "rounds": args.rounds, "batch": args.batch, "threads": 1, "interpolation": crop}
        result |= {"tool": shlex.join(sys.argv), **train.environment(train.make_accelerator())}
        del result["command"]
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(known | {f"{section}, {crop}": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
