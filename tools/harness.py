"""The harness of tools/bench.py: ways to do the same work take turns, and become rows of a Markdown table."""

import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import statistics
import sys
import tempfile
import time
import typing
from pathlib import Path

import datasets
import torch
from paper import markdown

import launch
from finish import environment

TURN = 1.0  # seconds; a way repeats its work for about as long before the next way's turn


class Comparison(typing.NamedTuple):
    """Ways to do the same work, {name: generator}.

    What a generator does up to its next `yield` is a call, which is measured. It begins in the process of
    its way.
    """

    title: str
    ways: dict
    images: int | None = None  # that a call goes through
    memory: bool = False  # measure the peak of a call too


def compare(comparison, args):
    """{"title", "clock", "rows"}: what `row_of` gives for each way."""
    ways, images = comparison.ways.items(), comparison.images
    peaks = {name: start(name, work, args, memory=True)() for name, work in ways if comparison.memory}
    turns = {name: start(name, work, args) for name, work in ways}
    rounds = [{name: turn() for name, turn in turns.items()} for _ in range(args.rounds)]
    rows = [row_of(name, rounds, images) | {"peak_mb": peaks.get(name)} for name in turns]
    return {"title": comparison.title, "clock": "cpu" if args.device == "cpu" else "wall", "rows": rows}


def measure(section, args):
    """What the comparisons of a section gave, with command, commit, versions and hardware."""
    torch.set_num_threads(1)  # a process that has started OpenMP's threads must not fork
    datasets.disable_progress_bars()
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for comparison in section(args):
            comparisons.append(compare(comparison, args))
            print(markdown(rows_of(comparisons[-1])), flush=True)
    about = environment(launch.make_accelerator())
    about |= {"command": shlex.join(["tools/bench.py", *sys.argv[1:]])}
    about |= {"device": args.device, "threads": args.threads, "rounds": args.rounds}
    return about | {"comparisons": comparisons}


def row_of(name, rounds, images=None):
    """A way's medians over rounds [{way: seconds of a call}], beside the first way's."""
    seconds = [taken[name] for taken in rounds]
    first = [next(iter(taken.values())) for taken in rounds]
    ratios = [a / b for a, b in zip(first, seconds, strict=True)]
    median = statistics.median(seconds)
    return {
        "name": name,
        "seconds": median,
        "images_per_second": images and images / median,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "difference": statistics.median(b - a for a, b in zip(first, seconds, strict=True)),
    }


# ---------------------------------------------------------------- the process of a way


def start(name, work, args, memory=False):
    """Start the process of a way and wait until it is warm; returns a function that asks it for a measure."""
    context = multiprocessing.get_context("fork")  # the imports, longer than most turns, happen once
    here, there = context.Pipe()
    context.Process(target=serve, args=(there, work, args, memory), daemon=True).start()
    there.close()

    def ask():
        try:
            here.send("measure")
            return here.recv()
        except (EOFError, OSError):
            raise SystemExit(f"error: the process of {name!r} ended; its traceback is above") from None

    ask()
    return ask


def serve(connection, work, args, memory):
    """Answer the first request when the way is warm, and each later one with a measure."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if memory and args.device == "cpu":
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: glibc gives back what a call has freed
    calls = 1
    if not args.small:
        next(work)  # compiles; libraries load at first use
        calls = math.ceil(TURN / seconds_of(work, 1, args.device))
    with contextlib.suppress(EOFError):  # the other side has ended
        connection.recv()
        connection.send("warm")
        while connection.recv():
            connection.send(peak_of(work, args.device) if memory else seconds_of(work, calls, args.device))


def seconds_of(work, calls, device):
    """Seconds of a call: CPU time of this process and its finished children, or on a GPU wall time."""
    clock = cpu_seconds if device == "cpu" else time.perf_counter
    begin = clock()
    for _ in range(calls):
        next(work)
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - begin) / calls


def cpu_seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_of(work, device):
    """MB that a call needs above what is there before it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        next(work)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to the present size
    next(work)
    return (resident_kb("VmHWM") - before) / 1024


def resident_kb(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---------------------------------------------------------------- the table


def duration(seconds):
    scale = next((s for s in ((1, "s"), (1e3, "ms")) if abs(seconds) * s[0] >= 1), (1e6, "us"))
    return f"{seconds * scale[0]:.3g} {scale[1]}"


def rows_of(comparison):
    """The rows of a comparison in the table; its title is in the first."""
    title = f"{comparison['title']} ({comparison['clock']} time)"
    return [
        {
            "what": "" if i else title,
            "way": row["name"],
            "time": duration(row["seconds"]),
            "images": f"{row['images_per_second']:,.0f}/s" if row["images_per_second"] else "",
            "ratio": "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_range"]),
            "difference": duration(row["difference"]),
            "peak memory": "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f} MB",
        }
        for i, row in enumerate(comparison["rows"])
    ]


def table(file):
    """Markdown of a file with {section: what `measure` gave}."""
    sections, rows, lines = json.loads(file.read_text()), [], []
    for name, result in sections.items():
        for comparison in result["comparisons"]:
            rows += rows_of(comparison)
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        where = f"{result['hardware']['device']}, {result['threads']} threads, {result['rounds']} rounds"
        lines.append(f"- {name}: `{result['command']}`; {where}; {versions}; commit {result['commit']}")
    return "\n".join([markdown(rows), "", *lines])
