"""The harness of tools/bench.py: ways to do the same work take turns, and become rows of a Markdown table.

Every way has a process of its own, and the ways take turns of about a second. Times are medians over the
rounds; a ratio is the median of the ratios to the first way within a round, so that other work on the
machine affects all ways.
"""

import contextlib
import ctypes
import dataclasses
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
from pathlib import Path

import datasets
import torch

import launch
from finish import environment

TURN = 1.0  # seconds; a way repeats its call for about as long before the next way's turn
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

# ---------------------------------------------------------------- the harness


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ways to do the same work, {name: function without arguments}.

    The function is called in the process of its way and returns the call to measure, which returns how many
    images it went through, or None. memory: measure the peak too.
    """

    title: str
    ways: dict
    memory: bool = False


def compare(comparison, args):
    """{"title", "clock", "rows"}: what `row_of` gives for each way."""
    ways = comparison.ways.items()
    peaks = {name: start(name, make, args, memory=True)() for name, make in ways if comparison.memory}
    turns = {name: start(name, make, args) for name, make in ways}
    clock = "cpu" if args.device == "cpu" else "wall"
    rounds = [{name: turn() for name, turn in turns.items()} for _ in range(args.rounds)]
    rows = [row_of(name, rounds, clock) | {"peak_mb": peaks.get(name)} for name in turns]
    return {"title": comparison.title, "clock": clock, "rows": rows}


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
            print(*rows_of(comparisons[-1]), sep="\n", flush=True)
    about = environment(launch.make_accelerator())
    about |= {"command": shlex.join(["tools/bench.py", *sys.argv[1:]])}
    about |= {"device": args.device, "threads": args.threads, "rounds": args.rounds}
    return about | {"comparisons": comparisons}


def row_of(name, rounds, clock):
    """A way's medians over rounds [{way: measures of `seconds_of`}], beside the first way's."""
    seconds = [taken[name][clock] for taken in rounds]
    first = [next(iter(taken.values()))[clock] for taken in rounds]
    ratios = [a / b for a, b in zip(first, seconds, strict=True)]
    images, median = rounds[0][name]["images"], statistics.median(seconds)
    return {
        "name": name,
        "seconds": median,
        "images_per_second": images and images / median,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "difference": statistics.median(b - a for a, b in zip(first, seconds, strict=True)),
    }


def start(name, make, args, memory=False):
    """Start the process of a way and wait until it is warm; returns a function that asks it for a measure."""
    context = multiprocessing.get_context("fork")  # the imports, longer than most turns, happen once
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, make, args, memory), daemon=True)
    process.start()
    there.close()

    def receive():
        try:
            return here.recv()
        except EOFError:
            raise SystemExit(f"error: the process of {name!r} ended; its traceback is above") from None

    def ask():
        here.send("measure")
        return receive()

    receive()
    return ask


def serve(connection, make, args, memory):
    """The process of a way: says when it is warm, then answers each request, until the other side is gone."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if memory and args.device == "cpu":
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: glibc gives back what a call has freed
    call, calls = make(), 1
    if not args.small:
        call()  # compiles; libraries load at first use
        calls = math.ceil(TURN / seconds_of(call, 1, args.device)["wall"])
    connection.send("warm")
    with contextlib.suppress(EOFError):
        while connection.recv():
            measure = peak_of(call, args.device) if memory else seconds_of(call, calls, args.device)
            connection.send(measure)


def seconds_of(call, calls, device):
    """Seconds of one call by two clocks, and its images. CPU: of this process and its finished children."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in range(calls):
        images = call()
    if device != "cpu":
        torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    return {"cpu": (cpu_seconds() - cpu) / calls, "wall": wall / calls, "images": images}


def cpu_seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_of(call, device):
    """MB that a call needs above what is there before it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to the present size
    call()
    return (resident_kb("VmHWM") - before) / 1024


def resident_kb(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---------------------------------------------------------------- the table


def duration(seconds):
    scale = next((s for s in ((1, "s"), (1e3, "ms")) if abs(seconds) * s[0] >= 1), (1e6, "us"))
    return f"{seconds * scale[0]:.3g} {scale[1]}"


def rows_of(comparison):
    """The lines of a comparison in the Markdown table; its title is in the first."""
    for i, row in enumerate(comparison["rows"]):
        title = f"{comparison['title']} ({comparison['clock']} time)"
        speed, peak = row["images_per_second"], row["peak_mb"]
        cells = [title if i == 0 else "", row["name"], duration(row["seconds"])]
        cells += [
            "" if speed is None else f"{speed:,.0f}/s",
            "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_range"]),
        ]
        cells += [duration(row["difference"]), "" if peak is None else f"{peak:,.0f} MB"]
        yield f"| {' | '.join(cells)} |"


def table(files):
    """Markdown of files with {section: what `measure` gave}; later files replace sections."""
    sections = {}
    for file in files:
        sections |= json.loads(file.read_text())
    lines = [
        "| what | way | time | images | ratio | difference | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in sections.values():
        for comparison in result["comparisons"]:
            lines += rows_of(comparison)
    lines.append("")
    for name, result in sections.items():
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        where = f"{result['hardware']['device']}, {result['threads']} threads, {result['rounds']} rounds"
        lines.append(f"- {name}: `{result['command']}`; {where}; {versions}; commit {result['commit']}")
    return "\n".join(lines)


def write_table(path, text):
    """Replace what is between the two markers of a Markdown file."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: {path}: expected the lines '{BEGIN}' and '{END}' around the table")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
