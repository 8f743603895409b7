"""Matplotlib figures of tools/report.py and tools/cka.py, as SVG: curves, heat maps, the data-scale study."""

import io

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.rcParams |= {
    "svg.fonttype": "none",  # text stays text: smaller, and readable for search and screen readers
    "svg.hashsalt": "report",  # the same figure is the same file
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "lines.linewidth": 1.5,
}
# Okabe and Ito's colours, which colour-blind people can tell apart; dashes, for prints without colours
STYLES = {
    "kd": ("#000000", "-"),
    "dkd": ("#0072b2", "-"),
    "dist": ("#d55e00", "--"),
    "alone": ("#777777", ":"),
    "rkd": ("#cc79a7", "-"),
    "cc": ("#009e73", "--"),
    "crd": ("#56b4e9", ":"),
    "reviewkd": ("#b08900", "-."),
}
SCALE_TITLE = "Top-1 of DKD and DIST minus vanilla KD's, percentage points"
FIGURE_1 = {
    "cifar-100": "CIFAR-100",
    "imagenet-1k-30pct": "IN-1K 30 %",
    "imagenet-1k-60pct": "IN-1K 60 %",
    "imagenet-1k": "IN-1K",
}


def svg(figure, title):
    """A figure as the text of an SVG file; `title` is what a screen reader says."""
    text = io.StringIO()
    unknown = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=unknown | {"Title": printable(title, 200)})
    return text.getvalue()


def printable(value, length):
    """Text for a figure, at most so long: what XML cannot hold is replaced, as names come from strangers."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= length else text[: length - 1] + "…"


def chart(title, curves, x_label, size=(3.6, 2.3), teacher=None, bottom=None):
    """Figure of curves {student: [a curve {x: y} of each seed]} from y = bottom, and of a teacher's value.

    Several seeds are drawn as their mean with a band of one sample standard deviation. The axis is
    logarithmic where y spans decades.
    """
    figure = Figure(size, layout="constrained")
    axes = figure.subplots()
    for i, (name, seeds) in enumerate(curves.items()):
        colour, dashes = STYLES.get(name, list(STYLES.values())[i % len(STYLES)])
        frame = pd.DataFrame(seeds).sort_index(axis=1)
        mean, spread = frame.mean(), frame.std()
        marker = "o" if len(mean) < 5 else ""
        label = printable(name, 24)
        axes.plot(mean.index, mean, dashes, color=colour, marker=marker, markersize=4, label=label)
        if len(seeds) > 1:
            axes.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    lowest, highest = axes.dataLim.intervaly
    if teacher is not None:
        axes.axhline(teacher, color="#009e73", linestyle="-.", linewidth=1, label="teacher")
    if 0 < 50 * lowest < highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.margins(x=0.01)
    axes.set_ylim(bottom)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set(xlabel=x_label, ylabel=printable(title, 60))
    figure.legend(loc="outside right center", frameon=False)
    return figure


def dots(scores, label):
    """Figure of scores {name: [one of each seed]}: means with bars of one sample standard deviation."""
    frame, rows = pd.DataFrame(map(pd.Series, scores.values())), range(len(scores))
    figure = Figure((3.6, 0.8 + 0.25 * len(scores)), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(frame.mean(axis=1), rows, xerr=frame.std(axis=1), fmt="o", color="#0072b2", capsize=3)
    axes.set_yticks(rows, [printable(name, 24) for name in scores])
    axes.invert_yaxis()
    axes.set(xlabel=label, ylabel="network")
    axes.grid(axis="x")
    return figure


def heat_map(result):
    """Figure of a matrix of tools/cka.py, the first model's layers upwards, the second's to the right."""
    matrix = np.array(result["cka"], float)  # null is NaN: a layer with equal features for all images
    tall = 2.6 * np.clip(matrix.shape[0] / matrix.shape[1], 0.5, 1.4)
    figure = Figure((3.6, tall + 0.4), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["magma"].with_extremes(bad="#888888")
    shown = dict(origin="lower", aspect="auto", interpolation="none")
    image = axes.imshow(matrix, cmap=colours, vmin=0, vmax=1, **shown)
    axes.grid(False)
    first, second = (printable(name, 40) for name in result["models"])
    axes.set_xlabel(f"layers of {second}")
    axes.set_ylabel(f"layers of {first}")
    figure.colorbar(image, ticks=(0, 0.5, 1))
    return figure


def scale_figure(points, paper):
    """Figure of the data-scale study on the left, and of the paper's Figure 1 on the right, on one scale.

    points: see report.scale_points; paper: [{"dataset", "method", "mean"}].
    """
    figure = Figure((9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    frame = pd.DataFrame(points)
    for i, (line, rows) in enumerate(frame.groupby(["augmentation", "epochs", "method"])):
        augmentation, epochs, method = line
        colour, is_weak = STYLES[method][0], augmentation == "weak"
        x = rows["fraction"] * 1.02 ** (i % 4 - 1.5)  # error bars beside each other
        dots = dict(marker="o", markerfacecolor="white" if is_weak else colour, capsize=3)
        dots["label"] = printable(f"{method}, {augmentation}, {epochs}", 60)
        spread = rows["spread"].astype(float)  # NaN for one seed: no bar
        left.errorbar(x, rows["mean"], spread, color=colour, linestyle="--" if is_weak else "-", **dots)
    shares = sorted(frame["fraction"].unique())
    left.set_xscale("log")
    left.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
    left.minorticks_off()
    left.set_xlabel("share of CIFAR-100's training images, ResNet-56 to ResNet-20")
    bars = pd.DataFrame(paper).pivot(index="dataset", columns="method", values="mean").loc[list(FIGURE_1)]
    for method, shift in (("dkd", -0.2), ("dist", 0.2)):
        drawn = right.bar(np.arange(len(bars)) + shift, bars[method], 0.36, color=STYLES[method][0])
        right.bar_label(drawn, fmt="%g", padding=2)
    right.set_xticks(range(len(FIGURE_1)), FIGURE_1.values())
    right.set_xlabel("the paper's Figure 1")
    right.tick_params(labelleft=True)
    for axes in (left, right):
        axes.axhline(0, color="#666666", linewidth=1)
        axes.set_axisbelow(True)
        axes.margins(y=0.1)
    left.legend()
    figure.suptitle(SCALE_TITLE, x=0.01, ha="left", fontsize="x-large")
    explained = "weak: crop and flip; strong: with RandAugment, mixup, cutmix"
    left.set_title(f"{explained}; error bars: standard deviation over seeds", loc="left", fontsize="medium")
    return figure
