"""The data-scale figure: how far vanilla KD is behind DKD and DIST, over the share of CIFAR-100 that is trained on.

    python tools/scale.py                            # results/*.json -> results/scale.svg and results/scale.json
    python tools/scale.py runs --out scale.svg --along steps

Every run of recipes/study_fraction_weak.json and study_fraction_strong.json counts, at any data.fraction. A gap is the
method's last-epoch top-1 minus kd's of the same seed: their mean, and the sample standard deviation as error bars. Runs of
other epochs are lines of their own, as the paper compares subsets; with `--along steps`, runs of another number of steps are:
`data.fraction=0.25 epochs=960` is then in line with 240 epochs of all images. Beside them stand the bars of the paper's
Figure 1 (results/paper.json).
"""

import argparse
import collections
import html
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # runnable from anywhere

import paper  # noqa: E402

import recipe  # noqa: E402

METHODS = {"dkd": "#0072b2", "dist": "#d55e00"}  # told apart by colour-blind readers, and by their names at the lines' ends
WIDTH, HEIGHT, TOP, BOTTOM, PANELS = 900, 460, 64, 372, ((70, 500), (590, 870))
FIGURE_1 = {
    "cifar-100": "CIFAR-100",
    "imagenet-1k-30pct": "IN-1K 30 %",
    "imagenet-1k-60pct": "IN-1K 60 %",
    "imagenet-1k": "IN-1K",
}


def points(found, along="epochs"):
    """[{"augmentation", "epochs", "fraction", "method", "mean", "spread", "gaps": {seed: gap}, "teacher"}], in order."""
    top1, teachers = collections.defaultdict(dict), collections.defaultdict(set)
    for augmentation in ("weak", "strong"):
        file = json.loads(recipe.dump(paper.load(f"study_fraction_{augmentation}")))
        wanted = {s["name"]: paper.experiment(file, s) for s in file["students"] if s["soft"]}
        for record in found:
            fraction = record["recipe"]["data"].get("fraction", 1.0)
            for student, result in zip(record["recipe"]["students"], record["students"], strict=True):
                if not student["soft"] or student["soft"]["loss"] not in wanted:
                    continue
                method = student["soft"]["loss"]
                like = wanted[method] | {"data": wanted[method]["data"] | {"fraction": fraction}}
                own = paper.experiment(record["recipe"], student)
                reduced = paper.reduction(own if along == "epochs" else of_all_images(own, fraction), like)
                if reduced is None:
                    continue
                key = (
                    augmentation,
                    ("steps of " if along == "steps" else "") + (reduced or f"{file['epochs']} epochs"),
                    fraction,
                )
                top1[(*key, method)].setdefault(record["seed"], result["last"]["top1"])
                teachers[(*key, method)].add(record["teacher"]["top1"])
    rows = []
    for key in sorted(key for key in top1 if key[-1] in METHODS):
        *group, method = key
        kd = top1.get((*group, "kd"), {})
        gaps = {seed: round(value - kd[seed], 4) for seed, value in sorted(top1[key].items()) if seed in kd}
        if not gaps:
            continue
        spread = statistics.stdev(gaps.values()) if len(gaps) > 1 else None
        row = dict(
            zip(("augmentation", "epochs", "fraction", "method"), key, strict=True), mean=statistics.fmean(gaps.values())
        )
        rows.append(row | {"spread": spread, "gaps": gaps, "teacher": sorted(teachers[key])})
    return rows


def of_all_images(experiment, fraction):
    """The experiment on a share of the images with the epochs, and milestones, in which all images make as many steps."""
    schedule = dict(experiment["schedule"])
    if "milestones" in schedule:
        schedule["milestones"] = [round(m * fraction) for m in schedule["milestones"]]
    return experiment | {"epochs": round(experiment["epochs"] * fraction), "schedule": schedule}


def figure_1():
    """The paper's bars: [{"dataset", "method", "mean"}]."""
    cells = [c for c in paper.paper()["cells"] if c["table"] == "fig1"]
    return [{"dataset": c["dataset"], "method": c["method"], "mean": c["value"]} for c in cells]


# ---------------------------------------------------------------- drawing; by hand: one figure is no reason for matplotlib


def draw(rows, bars):
    """The figure as SVG: ours on the left, the paper's on the right, one scale of percentage points for both."""
    ends = [r["mean"] + sign * (r.get("spread") or 0) for r in (*rows, *bars) for sign in (-1, 1)]
    step = max(0.5, math.ceil(2 * (max(ends) - min(ends)) / 8) / 2)
    low, high = (step * rounded(end / step) for rounded, end in ((math.floor, min(*ends, 0)), (math.ceil, max(*ends, 0))))

    def y(value):
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)

    parts = [axis(y, [low + i * step for i in range(round((high - low) / step) + 1)])]
    shares = sorted({r["fraction"] for r in rows})
    left, right = PANELS[0][0] + 40, PANELS[0][1] - 70

    def x(share):
        span = math.log(shares[-1] / shares[0])
        return round(left + (math.log(share / shares[0]) / span if span else 0.5) * (right - left), 1)

    parts += [text(x(share), BOTTOM + 20, f"{100 * share:g} %") for share in shares]
    parts.append(text((left + right) / 2, BOTTOM + 42, "share of CIFAR-100's training images, ResNet-56 to ResNet-20"))
    lines, names, several = collections.defaultdict(list), [], len({r["epochs"] for r in rows}) > 1
    for r in rows:
        lines[r["augmentation"], r["epochs"], r["method"]].append(r)
    for i, ((augmentation, epochs, method), own) in enumerate(sorted(lines.items())):
        nudged = [(x(r["fraction"]) + 3 * (i % 4) - 4.5, y(r["mean"]), r) for r in own]  # error bars beside each other
        parts.append(line(nudged, METHODS[method], augmentation == "weak", y))
        said = f"{method}, {augmentation}" + (f", {epochs.removeprefix('steps of ').split()[0]} ep." if several else "")
        names.append((nudged[-1][1], said, METHODS[method]))
    at = -math.inf
    for height, said, colour in sorted(names):
        at = max(height, at + 13)  # names of close lines stand below each other
        parts.append(text(right + 14, at + 4, said, "start", colour))
    groups, width = list(FIGURE_1), (PANELS[1][1] - PANELS[1][0]) / len(FIGURE_1)
    for i, group in enumerate(groups):
        middle = PANELS[1][0] + (i + 0.5) * width
        parts.append(text(middle, BOTTOM + 20, FIGURE_1[group], size=11))
        for j, method in enumerate(METHODS):
            value = next(b["mean"] for b in bars if (b["dataset"], b["method"]) == (group, method))
            at = middle - 22 + 22 * j
            top, height = min(y(value), y(0)), max(abs(y(value) - y(0)), 1)
            parts.append(f'<rect x="{at}" y="{top}" width="20" height="{height:.1f}" fill="{METHODS[method]}"/>')
            parts.append(text(at + 10, top - 4 if value >= 0 else top + height + 12, f"{value:g}", size=10))
    parts.append(text(sum(PANELS[1]) / 2, BOTTOM + 42, "the paper's Figure 1"))
    epochs = sorted({r["epochs"] for r in rows})
    heading = f"Top-1 of DKD and DIST minus vanilla KD's, percentage points ({'; '.join(epochs)})"
    below = "dashed, weak: crop and flip; strong: with RandAugment, mixup, cutmix; bars: standard deviation over seeds"
    parts += [text(20, 26, heading, "start", size=15), text(20, 46, below, "start")]
    return svg(WIDTH, HEIGHT, heading, parts)


def svg(width, height, title, parts):
    """A figure that is a file or stands in a page; `title` is what a screen reader says."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def axis(y, ticks):
    lines = []
    for tick in ticks:
        weight = 1.5 if abs(tick) < 1e-9 else 0.5
        for start, end in PANELS:
            lines.append(f'<path d="M{start} {y(tick)}H{end}" stroke="#666" stroke-width="{weight}"/>')
        lines.append(text(PANELS[0][0] - 8, y(tick) + 4, f"{tick:g}", "end"))
        lines.append(text(PANELS[1][0] - 8, y(tick) + 4, f"{tick:g}", "end"))
    return "\n".join(lines)


def line(nudged, colour, dashed, y):
    dash = ' stroke-dasharray="6 4"' * dashed
    path = "M" + "L".join(f"{x:.1f} {at}" for x, at, _ in nudged)
    parts = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    for x, at, r in nudged:
        if r["spread"]:
            top, bottom = y(r["mean"] + r["spread"]), y(r["mean"] - r["spread"])
            bar = f"M{x:.1f} {top}V{bottom}M{x - 3:.1f} {top}h6M{x - 3:.1f} {bottom}h6"
            parts.append(f'<path d="{bar}" stroke="{colour}" fill="none"/>')
        parts.append(
            f'<circle cx="{x:.1f}" cy="{at}" r="4" fill="{"white" if dashed else colour}" stroke="{colour}" stroke-width="2"/>'
        )
    return "\n".join(parts)


def text(x, y, said, anchor="middle", colour="#222", size=12):
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{html.escape(said)}</text>'


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", default=ROOT / "results", help="folder of result files (default: results/)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "scale.svg", metavar="SVG", help="the points go beside it, as JSON"
    )
    parser.add_argument("--along", choices=["epochs", "steps"], default="epochs", help="what the runs of a line have in common")
    args = parser.parse_args(arguments)
    rows = points(list(paper.records(args.results)), args.along)
    if not rows:
        parser.error(
            f"{args.results}: no finished run of recipes/study_fraction_weak.json or study_fraction_strong.json with kd in it"
        )
    recipe.write_atomic(args.out, draw(rows, figure_1()))
    recipe.write_atomic(args.out.with_suffix(".json"), json.dumps({"points": rows, "figure_1": figure_1()}, indent=2) + "\n")
    for r in rows:
        gap = f"{r['mean']:+.2f}" + (f" ± {r['spread']:.2f}" if r["spread"] is not None else "")
        print(r["augmentation"], r["epochs"], f"fraction {r['fraction']:g}: {r['method']} - kd = {gap}, seeds {len(r['gaps'])}")


if __name__ == "__main__":
    main()
