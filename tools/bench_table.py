"""One table of what the benchmarks wrote: this project beside its peer, the ratio that was wanted, and the limit.

    python tools/bench_table.py                                  # from results/bench_*.json, as Markdown
    python tools/bench_table.py --write results/performance.md   # between the two comments of that file

A line is made again by its command; a benchmark that has not been run has no line.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runnable from anywhere

import recipe  # noqa: E402

BEGIN, END = "<!-- table: python tools/bench_table.py --write results/performance.md -->", "<!-- /table -->"
WANTED_LOSSES = {"kd": 2, "dkd": 3, "dist": 2, "rkd": 20}  # none slower than its reference


def row_of(rows, key, name):
    return next(row for row in rows if row[key] == name)


def ways(section, key, lines, limit=None):
    """(what, ours, peer, ratio, wanted, limit) of a section that compares ways; its first row is the peer's."""
    rows, peer = section["rows"], section["rows"][0]
    unit = "ms" if "ms" in peer else "seconds"
    scale = 1 if unit == "ms" else 1000
    for what, name, wanted in lines:
        if any(row[key] == name for row in rows):
            own = row_of(rows, key, name)
            yield what, f"{scale * own[unit]:.3g} ms", f"{peer[key]}: {scale * peer[unit]:.3g} ms", own["ratio"], wanted, limit


def image_pipeline(found):
    for interpolation in ("bicubic", "random"):
        if section := found.get(f"ways, {interpolation}"):
            limit = f"decode only {row_of(section['rows'], 'way', 'decode only')['ratio']:.2f}"
            lines = [("fast", 1.8), ("fast, RandAugment on the device", 2.2)]
            lines += [("fast, 3 repeats", 2.7), ("fast, 3 repeats, RandAugment on the device", 4.5)]
            lines = [(f"ImageNet crop, {interpolation}: {name}", name, wanted) for name, wanted in lines]
            yield from ways(section, "way", lines, limit)


def cifar_pipeline(found):
    wanted = {"resident, uint8": 7, "device, warm": 2, "disk, warm": 2}
    for name, section in found.items():
        names = [row["way"] for row in section["rows"][1:]]
        yield from ways(section, "way", [(f"CIFAR {name}: {way}", way, wanted.get(way)) for way in names])


def step(wanted):
    def lines(found):
        floor = f"float32 products alone: {found['floor_ms']:.0f} ms, {found['floor_ratio']:.2f}"
        names = [row["name"] for row in found["rows"][1:]]
        what = f"{found['work']['teacher']} -> {found['work']['student']}"
        yield from ways(found, "name", [(f"{what}: {name}", name, wanted.get(name)) for name in names], floor)

    return lines


def losses(found):
    for name, pair in found["losses"].items():
        ours, reference = pair["rows"]
        share = f"memory {ours['peak_mb'] / max(reference['peak_mb'], 1e-9):.2f} of it"
        ratio = reference["seconds"] / ours["seconds"]
        times = [f"{1000 * row['seconds']:.3g} ms" for row in (ours, reference)]
        yield f"loss {name}", times[0], f"its definition: {times[1]}", ratio, WANTED_LOSSES.get(name, 1), share
    yield "CRD's set-up, 1,281,167 images", f"{statistics.median(found['crd_setup_seconds']):.2f} s", "", None, "1 s", ""


def overhead(found):
    yield "the loop around a step", f"{found['overhead_us']:.0f} us more", "a plain loop", None, "100 us", ""


def students(found):
    n, peer = len(found["students"]), f"a run for each: {found['each']:.3g} s"
    yield (
        f"{n} students in one run, equal weights: {found['equal']}",
        f"{found['together']:.3g} s",
        peer,
        found["ratio"],
        None,
        "",
    )


def startup(found):
    largest = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in list(found["imports"].items())[:3])
    yield "command to the end of the first step", f"{found['seconds']:.1f} s", "", None, None, f"imports: {largest}"


def memory(found):
    sizes = found["peak_resident_mb"]
    said = f"{sizes[0]:.0f} MB, {sizes[-1]:.0f} MB after {1000 * len(sizes):,}"
    yield "peak resident size after 1,000 steps", said, "", None, "flat", ""


def scaling(found):
    one, two = (f"{row['images_per_second']:.0f} img/s" for row in found["rows"])
    yield "two processes, batch each", two, f"one: {one}", 2 * found["efficiency"], None, "2, on two idle cores"


SECTIONS = {  # file, its lines, how it is made
    "bench_input": (image_pipeline, "tools/bench_input.py"),
    "bench_cifar": (cifar_pipeline, "tools/bench_cifar.py"),
    "bench_step_cifar": (
        step({"ours": 1.5, "ours, compiled": 1.5, "ours, compiled, teacher in bf16": 1.5}),
        "tools/bench_step.py cifar",
    ),
    "bench_step_imagenet": (step({"ours": 1.15, "ours, compiled": 1.15}), "tools/bench_step.py imagenet"),
    "bench_overhead": (overhead, "tools/bench_step.py overhead"),
    "bench_losses": (losses, "tools/bench.py losses"),
    "bench_students": (students, "tools/bench_runs.py students"),
    "bench_startup": (startup, "tools/bench_step.py startup"),
    "bench_memory": (memory, "tools/bench_step.py memory"),
    "bench_scaling": (scaling, "tools/bench_runs.py scaling"),
}


def table(folder):
    lines = ["| what | ours | peer | ratio | wanted | limit | command |", "|---|---|---|---|---|---|---|"]
    for name, (section, command) in SECTIONS.items():
        path = folder / f"{name}.json"
        for what, ours, peer, ratio, wanted, limit in section(json.loads(path.read_text())) if path.is_file() else []:
            shown = "" if ratio is None else f"{ratio:.2f}"
            if ratio is not None and wanted and ratio < wanted:
                shown = f"**{shown}**"
            lines.append(f"| {what} | {ours} | {peer} | {shown} | {wanted or ''} | {limit or ''} | `{command}` |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    made = table(args.results)
    if not args.write:
        return print(made)
    before, begin, rest = args.write.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{args.write}: expected the lines '{BEGIN}' and '{END}' around the table")
    recipe.write_atomic(args.write, f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
