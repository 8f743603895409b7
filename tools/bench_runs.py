"""What whole runs cost: several students in one run against a run for each, two processes against one, and a checkpoint.

    python tools/bench_runs.py students RECIPE [--limit 40] [--set PATH=VALUE ...]     # equal weights, and the ratio of times
    python tools/bench_runs.py scaling RECIPE [--limit 40] [--set PATH=VALUE ...]      # images/s of 1 and of 2 processes
    python tools/bench_runs.py checkpoint                                              # ResNet-50 with LAMB's state and EMA
        [--rounds 3] [--json FILE]

Times are medians over rounds that take the ways in turn, so that other work on the machine meets all.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import recipe
import train

ROOT = Path(__file__).resolve().parent.parent


def students(args):
    """{"together", "each", "ratio", "equal"}: seconds in training steps, whether the last weights are equal bit for bit."""
    names = [student.name for student in recipe.load(args.recipe, args.set).students]
    ways = {"together": names} | {name: [name] for name in names}
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            taken = {}
            for way, chosen in ways.items():
                out = Path(folder) / f"{way}-{i}"
                command = [sys.executable, ROOT / "train.py", args.recipe, "--students", *chosen, "--limit", args.limit]
                command += ["--workers", 1, "--out", out, "--set", "runs=1", *args.set]
                subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                taken[way] = json.loads((out / "result.json").read_text())["seconds"]
            rounds.append(taken)
            print(f"round {i}: {taken}", flush=True)
        equal = all(equal_weights(Path(folder) / "together-0", Path(folder) / f"{name}-0", name) for name in names)
    together = statistics.median(taken["together"] for taken in rounds)
    each = statistics.median(sum(taken[name] for name in names) for taken in rounds)
    return {
        "students": names,
        "steps": args.limit,
        "together": together,
        "each": each,
        "ratio": each / together,
        "equal": equal,
    }


def equal_weights(a, b, name):
    a, b = (safetensors.torch.load_file(train.checkpoints(folder)[-1] / f"{name}.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def scaling(args):
    """{"rows": [{"processes", "images_per_second", "of_each"}], "efficiency"} with the same batch in every process."""
    settings, rounds = recipe.load(args.recipe, args.set), []
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            taken = {}
            for n in (1, 2):
                out = Path(folder) / f"{n}-{i}"
                command = [*launch, *(["--multi_gpu"] if n > 1 else []), "--num_processes", n, ROOT / "train.py", args.recipe]
                command += ["--limit", args.limit, "--workers", 0, "--out", out, "--set", "runs=1", *args.set]
                command.append(f"batch_size={n * settings.batch_size_per_process}")
                subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
                taken[n] = json.loads((out / "result.json").read_text())["images_per_second"]
            rounds.append(taken)
            print(f"round {i}: {taken}", flush=True)
    rows = [{"processes": n, "images_per_second": statistics.median(taken[n] for taken in rounds)} for n in (1, 2)]
    rows = [row | {"of_each": row["images_per_second"] / row["processes"]} for row in rows]
    return {"rows": rows, "efficiency": statistics.median(taken[2] / taken[1] / 2 for taken in rounds), "steps": args.limit}


def checkpoint(args):
    """Seconds to write, to sync and to digest what a checkpoint of one student holds."""
    weights = models.build("resnet50", classes=1000, size=224).state_dict()
    numbers = {f"{i}": torch.randn_like(v) for i, v in enumerate(weights.values()) if v.is_floating_point()}
    parts = [weights, {f"{m}.{k}": v for m in ("exp_avg", "exp_avg_sq") for k, v in numbers.items()}, weights]
    rounds = []
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # on this disk, not in memory
        for i in range(args.rounds):
            paths, marks = [Path(folder) / f"{i}-{j}.safetensors" for j in range(3)], [time.perf_counter()]
            for path, tensors in zip(paths, parts, strict=True):
                safetensors.torch.save_file(
                    {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}, path
                )
            marks.append(time.perf_counter())
            for path in paths:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            marks.append(time.perf_counter())
            for path in paths:
                train.sha256(path)
            marks.append(time.perf_counter())
            rounds.append([after - before for before, after in itertools.pairwise(marks)])
        size = sum(path.stat().st_size for path in paths)
    write, sync, digest = (statistics.median(values) for values in zip(*rounds, strict=True))
    return {"bytes": size, "write": write, "sync": sync, "digest": digest, "seconds": write + sync + digest}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["students", "scaling", "checkpoint"])
    parser.add_argument("recipe", nargs="?", default=ROOT / "recipes" / "quickstart.json")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    result = {"students": students, "scaling": scaling, "checkpoint": checkpoint}[args.section](args)
    result |= {"rounds": args.rounds, "tool": shlex.join(map(str, sys.argv)), **train.environment(train.make_accelerator())}
    del result["command"]
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
