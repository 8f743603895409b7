"""Finished runs, heat maps and benchmarks as one HTML page that needs no network, for screens, phones and paper.

    python tools/report.py results/*.json --out report.html
    python tools/report.py runs/*/result*.json results/cka_*.json --out report.html --plots results

Takes a run's result.json (or several under "runs"), the JSON of tools/cka.py and that of the benchmarks; results/paper.json
is passed over. Accuracies are those of the last epoch: mean and sample standard deviation over seeds. --plots writes the
data-scale figure as data_scale.svg, too.
"""

import argparse
import html
import itertools
import json
import math
import re
import statistics
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))
import paper

import recipe

MAX_BYTES = 2**26  # of a results file
WANTED = "a run's result (students, recipe), several under 'runs', a heat map of tools/cka.py or a benchmark (commit, versions)"


class ReportError(ValueError):
    """A results file cannot be used; the message says which and where, what was found and what was expected."""


class Run(typing.NamedTuple):
    """A run's record as train.py wrote it, and where it lay."""

    file: str
    record: dict

    @property
    def settings(self):
        return self.record["recipe"]

    @property
    def name(self):
        """The recipe's name, which only the command tells."""
        found = re.search(r"([\w.-]+)\.json", str(self.record.get("command")))
        return found[1] if found else Path(self.file).stem


class Results(typing.NamedTuple):
    runs: list  # of Run
    maps: list  # of (file, CKA result)
    benchmarks: list  # of (file, dict)
    notes: list  # of (file, text)


# ---------------------------------------------------------------- reading


def read(paths):
    """Results of files; RecipeError or ReportError for one that is none."""
    results, seen = Results([], [], [], []), set()
    for path in map(str, paths):
        tree = recipe.read_json(path, MAX_BYTES)
        if not isinstance(tree, dict):
            raise ReportError(f"{path}: expected {WANTED}, found a {type(tree).__name__}")
        if isinstance(tree.get("cells"), list) and "about" in tree:  # the paper's own numbers, which `paper` reads
            continue
        if "cka" in tree:
            check_map(tree, path)
            results.maps.append((path, tree))
        elif "runs" in tree or "students" in tree:
            expect(tree.get("runs", []), list, f"{path}: runs")
            for i, record in enumerate(tree.get("runs", [tree])):
                check_run(record, f"{path}: runs[{i}]." if "runs" in tree else f"{path}: ")
                text = json.dumps(record, sort_keys=True)
                if text not in seen:  # a run's own file, and the same in results/
                    results.runs.append(Run(path, record))
                seen.add(text)
            if isinstance(tree.get("note"), str):
                results.notes.append((path, tree["note"]))
        elif "commit" in tree:
            results.benchmarks.append((path, tree))
        else:
            raise ReportError(f"{path}: expected {WANTED}, found the keys {', '.join(list(tree)[:8]) or '(none)'}")
    return results


def expect(value, kind, where):
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {dict: "an object", list: "a list", str: "a text", (int, float): "a number"}
        raise ReportError(f"{where}: expected {words[kind]}, found {json.dumps(value)[:60]}")
    return value


def check_run(record, where):
    """What the page reads of a run is there and of its type; curves are looked at where they are drawn."""
    expect(record, dict, where.removesuffix(".").removesuffix(": "))
    settings = expect(record.get("recipe"), dict, f"{where}recipe")
    for key, kind in (("epochs", (int, float)), ("data", dict), ("students", list)):
        expect(settings.get(key), kind, f"{where}recipe.{key}")
    students = expect(record.get("students"), list, f"{where}students")
    if len(students) != len(settings["students"]):
        raise ReportError(f"{where}students: expected the recipe's {len(settings['students'])}, found {len(students)}")
    for i, (student, own) in enumerate(zip(students, settings["students"], strict=True)):
        expect(student, dict, f"{where}students[{i}]")
        expect(student.get("name"), str, f"{where}students[{i}].name")
        expect(expect(own, dict, f"{where}recipe.students[{i}]").get("model"), str, f"{where}recipe.students[{i}].model")
        last = expect(student.get("last"), dict, f"{where}students[{i}].last")
        expect(last.get("top1"), (int, float), f"{where}students[{i}].last.top1")
    try:
        for own in settings["students"]:
            paper.experiment(settings, own)
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{where}recipe: expected one that train.py resolved, found none of {error}") from None


def check_map(tree, path):
    rows = expect(tree["cka"], list, f"{path}: cka")
    layers = expect(tree.get("layers"), list, f"{path}: layers")
    names = expect(tree.get("models"), list, f"{path}: models")
    if len(layers) != 2 or len(names) != 2 or not all(isinstance(axis, list) and axis for axis in layers):
        raise ReportError(f"{path}: expected two models and the layers of each")
    if len(rows) != len(layers[0]) or any(not isinstance(row, list) or len(row) != len(layers[1]) for row in rows):
        raise ReportError(f"{path}: cka: expected {len(layers[0])} rows of {len(layers[1])} numbers, one for each layer")
    for value in itertools.chain(*rows):
        if value is not None:
            expect(value, (int, float), f"{path}: cka")


# ---------------------------------------------------------------- drawing


def palette(words):
    """{name of a CSS variable: colour}."""
    names = ["paper", "panel", "ink", "quiet", "line", "link", *(f"c{i}" for i in range(8))]
    return dict(zip(names, words.split(), strict=True))


LIGHT = palette(
    "#ffffff #f5f6f8 #1c2128 #5b6470 #d5d9df #0b5cad #0067b1 #c44e00 #00805d #a8477f #8a6d00 #2a8fc4 #7a4f3a #5b6470"
)
DARK = palette(
    "#14171c #1d2229 #e6e9ee #a0a9b5 #3a424d #7ab8f5 #5aaef0 #ff8f4a #3fc9a0 #e58fc0 #d9b93b #8fd3f5 #c79a84 #a0a9b5"
)
COLOURS = {"kd": 0, "dkd": 1, "dist": 2, "cc": 4, "rkd": 3, "crd": 5, "reviewkd": 6, "scratch": 7, "alone": 7}  # everywhere
FIGURE_CSS = """svg text{font:11px system-ui,sans-serif;fill:var(--ink)}
svg .title{font-weight:600;font-size:12px}
svg .quiet{fill:var(--quiet)}
svg .end{text-anchor:end}
svg .middle{text-anchor:middle}
svg .axis{stroke:var(--line);fill:none}
svg .zero{stroke:var(--quiet)}
svg polyline{fill:none;stroke-width:1.5;stroke-linejoin:round}
svg .absent{fill:#888}
""" + "".join(f"svg .c{i}{{stroke:var(--c{i});fill:var(--c{i})}}svg polyline.c{i}{{fill:none}}\n" for i in range(8))
WIDTH, HEIGHT = 360, 230
# The colours of torch_cka's maps at 0, 1/8, ... 1.
MAGMA = ("000004", "1c1044", "4f127b", "812581", "b5367a", "e55064", "fb8761", "fec287", "fcfdbf")
LEVELS = 64


def esc(text):
    return html.escape(str(text))


def text(x, y, content, kind="", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{extra}>{esc(content)}</text>'


def svg(width, height, label, parts):
    """An inline figure; `label` is what a screen reader says."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(label)}">{"".join(parts)}</svg>'


def standalone(*figures):
    """Inline figures, side by side, as one SVG file in the light colours: not every viewer knows CSS variables."""
    sizes = [tuple(map(int, re.match(r'<svg viewBox="0 0 (\d+) (\d+)"', figure).groups())) for figure in figures]
    width, height = sum(w for w, _ in sizes), max(h for _, h in sizes)
    css = re.sub(r"var\(--(\w+)\)", lambda name: LIGHT[name[1]], FIGURE_CSS)
    parts, x = [], 0
    for figure, (w, h) in zip(figures, sizes, strict=True):
        parts.append(figure.replace("<svg ", f'<svg x="{x}" width="{w}" height="{h}" ', 1))
        x += w
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    ground = f'<rect width="100%" height="100%" fill="{LIGHT["paper"]}"/>'
    return f"{head}<style>{css}</style>{ground}{''.join(parts)}</svg>\n"


def ticks(low, high, n=5):
    """About n round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axes:
    """The frame of a plot: ranges, grid, labels, legend; `at` places a point."""

    def __init__(self, title, xs, ys, x_label, legend, log=False, x_ticks=None):
        self.log = log
        ys = [math.log10(y) for y in ys] if log else ys
        self.low_x, self.high_x = padded(xs, 0.0)
        self.low_y, self.high_y = padded(ys, 0.05)
        self.title, self.x_label, self.x_ticks = title, x_label, x_ticks
        self.rows = wrapped(legend)
        self.left, self.right, self.bottom = 46, WIDTH - 12, HEIGHT - 34
        self.top = 26 + 16 * len(self.rows)

    def at(self, x, y):
        y = math.log10(y) if self.log else y
        across = (x - self.low_x) / (self.high_x - self.low_x)
        up = (y - self.low_y) / (self.high_y - self.low_y)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def frame(self):
        parts = [text(2, 12, self.title, "title"), text((self.left + self.right) / 2, HEIGHT - 4, self.x_label, "quiet middle")]
        for i, row in enumerate(self.rows):
            x = 4
            for name, colour in row:
                y = 26 + 16 * i
                parts += [f'<rect x="{x}" y="{y - 7}" width="10" height="4" class="c{colour}"/>', text(x + 14, y, name)]
                x += legend_width(name)
        for y in ticks(self.low_y, self.high_y):
            place = self.at(self.low_x, 10**y if self.log else y)[1]
            shown = f"{10**y:.3g}" if self.log else f"{y:g}"
            parts += [f'<path class="axis" d="M{self.left} {place:.1f}H{self.right}"/>']
            parts += [text(self.left - 4, place + 4, shown, "quiet end")]
        for x, shown in self.x_ticks or [(x, f"{x:g}") for x in ticks(self.low_x, self.high_x)]:
            parts.append(
                text(self.at(x, 10**self.low_y if self.log else self.low_y)[0], self.bottom + 14, shown, "quiet middle")
            )
        return parts


def padded(values, share):
    low, high = min(values), max(values)
    room = (high - low) * share or (0.5 if low == high else 0)
    return low - room, high + room


def legend_width(name):
    return 26 + 6.5 * len(name)


def wrapped(legend):
    """(name, colour) in rows that fit."""
    rows, used = [], WIDTH
    for name, colour in legend:
        name = name if len(name) < 50 else name[:48] + "…"
        if used + legend_width(name) > WIDTH:
            rows.append([])
            used = 0
        rows[-1].append((name, colour))
        used += legend_width(name)
    return rows


def colours(names):
    """{name: colour}: a method has its own, other names take those that are left, in turn."""
    names = list(dict.fromkeys(names))
    own = {name: COLOURS[name] for name in names if name in COLOURS}
    left = [c for c in range(8) if c not in own.values()] or list(range(8))
    return own | {name: left[i % len(left)] for i, name in enumerate(n for n in names if n not in COLOURS)}


def lines(title, series, x_label):
    """Curves [(name, [(x, y)])]; one name, say of several seeds, has one colour. A logarithmic axis where y spans decades."""
    chosen = colours(name for name, _ in series)
    xs, ys = zip(*itertools.chain(*(points for _, points in series)), strict=True)
    log = min(ys) > 0 and max(ys) / min(ys) > 50
    axes = Axes(title, xs, ys, x_label, chosen.items(), log)
    parts = axes.frame()
    for name, points in series:
        shown = " ".join("{:.1f},{:.1f}".format(*axes.at(x, y)) for x, y in points)
        parts.append(f'<polyline class="c{chosen[name]}" points="{shown}"/>')
        if len(points) == 1:
            parts.append('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(chosen[name], *axes.at(*points[0])))
    return svg(WIDTH, HEIGHT, title, parts)


def gaps(title, series, x_label, x_ticks=None, joined=True):
    """Points with error bars {name: [(x, mean, standard deviation or None)]} around a line at 0."""
    chosen = colours(series)
    everything = list(itertools.chain(*series.values()))
    xs = [x for x, _, _ in everything]
    room = 0.06 * (max(xs) - min(xs) or 1)
    ys = [0.0] + [mean + side * (sd or 0) for _, mean, sd in everything for side in (-1, 1)]
    axes = Axes(title, [min(xs) - room, max(xs) + room], ys, x_label, chosen.items(), x_ticks=x_ticks)
    parts = axes.frame()
    parts.append('<path class="zero" d="M{:.1f} {:.1f}H{}"/>'.format(*axes.at(axes.low_x, 0), axes.right))
    for i, (name, points) in enumerate(series.items()):
        shift = 4 * (i - (len(series) - 1) / 2)  # side by side, so that error bars do not hide each other
        places = []
        for x, mean, sd in points:
            px, py = axes.at(x, mean)
            places.append((px + shift, py))
            parts.append(f'<circle class="c{chosen[name]}" cx="{px + shift:.1f}" cy="{py:.1f}" r="3"/>')
            if sd:
                (_, low), (_, high) = axes.at(x, mean - sd), axes.at(x, mean + sd)
                parts.append(f'<path class="c{chosen[name]}" d="M{px + shift:.1f} {low:.1f}V{high:.1f}"/>')
        if joined:
            shown = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(f'<polyline class="c{chosen[name]}" points="{shown}"/>')
    return svg(WIDTH, HEIGHT, title, parts)


def heat_map(result):
    """The matrix of tools/cka.py with the first model's layers upwards and the second's to the right, as in the paper."""
    matrix = result["cka"]
    rows, columns = len(matrix), len(matrix[0])
    left, top, side = 40, 10, 268
    tall = round(side * min(max(rows / columns, 0.5), 1.4))
    height = top + tall + 40
    paths = {}
    for i, row in enumerate(matrix):
        start = 0
        for level, cells in itertools.groupby(map(level_of, row)):
            n = len(list(cells))
            paths.setdefault(level, []).append(f"M{start} {rows - 1 - i}h{n}v1h-{n}z")
            start += n
    colour = {None: 'class="absent"'} | {i: f'fill="{magma(i / (LEVELS - 1))}"' for i in range(LEVELS)}
    cells = "".join(f'<path {colour[level]} d="{"".join(d)}"/>' for level, d in paths.items())
    frame = f'x="{left}" y="{top}" width="{side}" height="{tall}"'
    parts = [
        f'<svg {frame} viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" shape-rendering="crispEdges">{cells}</svg>'
    ]
    for y in ticks(0, rows):
        parts.append(text(left - 4, top + tall * (1 - (y + 0.5) / rows) + 4, f"{y:g}", "quiet end") if y < rows else "")
    for x in ticks(0, columns):
        parts.append(text(left + side * (x + 0.5) / columns, top + tall + 14, f"{x:g}", "quiet middle") if x < columns else "")
    parts.append(text(left + side / 2, height - 8, "layers of " + shortened(result["models"][1], 36), "middle"))
    turn = f' transform="rotate(-90 11 {top + tall / 2:.1f})"'
    parts.append(text(11, top + tall / 2, "layers of " + shortened(result["models"][0], min(36, tall // 8)), "middle", turn))
    bar = left + side + 10
    for i in range(LEVELS):
        y = top + tall * (1 - (i + 1) / LEVELS)
        parts.append(f'<rect x="{bar}" y="{y:.2f}" width="10" height="{tall / LEVELS + 0.3:.2f}" {colour[i]}/>')
    parts += [text(bar + 13, top + tall * (1 - v) + (8 if v else 0), f"{v:g}", "quiet") for v in (0, 0.5, 1)]
    return svg(WIDTH, height, "CKA of " + " and ".join(map(str, result["models"])), parts)


def level_of(value):
    return None if value is None else round(min(max(value, 0), 1) * (LEVELS - 1))


def magma(share):
    i = min(int(share * 8), 7)
    low, high = (bytes.fromhex(MAGMA[k]) for k in (i, i + 1))
    return "#" + bytes(round(a + (b - a) * (share * 8 - i)) for a, b in zip(low, high, strict=True)).hex()


def shortened(name, n):
    name = str(name)
    return name if len(name) <= n else name[: n - 1] + "…"


# ---------------------------------------------------------------- the page's parts


def table(rows, caption=""):
    """Dictionaries with equal keys; columns that are empty throughout are left out."""
    columns = [key for key in rows[0] if any(row[key] not in ("", None) for row in rows)]
    numeric = {key for key in columns if all(re.fullmatch(r"[-+−]?[\d.,:]+ ?.?|-|", str(row[key])) for row in rows)}
    mark = {key: ' class="number"' if key in numeric else "" for key in columns}
    head = "".join(f"<th{mark[key]}>{esc(key)}</th>" for key in columns)
    cell = lambda key, value: "" if value is None else esc(f"{value:.4g}" if isinstance(value, float) else value)  # noqa: E731
    body = "".join("<tr>" + "".join(f"<td{mark[key]}>{cell(key, row[key])}</td>" for key in columns) + "</tr>" for row in rows)
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    scroll = f'<div class="box" tabindex="0" role="region" aria-label="{esc(caption or "table")}">'
    return f"{scroll}<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def figure(drawing, caption=""):
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def spread(values):
    """Mean and sample standard deviation, as a table shows them."""
    return f"{statistics.fmean(values):.2f}", f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""


def against_paper(runs):
    """Every table of the paper for which there is a run, whole: what has not been run is marked."""
    records = [run.record for run in runs if run.record.get("limit") is None]
    parts = []
    for name in paper.TABLES:
        cells = paper.cells(name)
        rows = [paper.row(cell, records) for cell in cells]
        if not any(row["seeds"] for row in rows):
            continue
        shown = [{key: value for key, value in row.items() if key not in ("cell", "command")} for row in rows]
        parts.append(table(shown, f"Table {name} of the paper"))
        disputed = [d for d in paper.paper()["disagreements"] if name in d["tables"]]
        items = "".join(f"<li>{esc(d['topic'])}: {esc(d['resolution'])}</li>" for d in disputed)
        parts.append(f"<p>Disputed here, and what was chosen:</p><ul>{items}</ul>" if items else "")
    none = "<p>None of these runs has the settings of a cell of the paper.</p>"
    return "".join(parts) + "<p>The commands of all cells: <code>python tools/paper.py all</code>.</p>" if parts else none


def experiments(runs):
    """{settings without the seed: runs}, in the order of the files."""
    found = {}
    for run in runs:
        settings = {k: v for k, v in run.settings.items() if k not in ("seed", "runs", "about")}
        found.setdefault(json.dumps([settings, run.record.get("limit")], sort_keys=True), []).append(run)
    return list(found.values())


def experiment(runs):
    """Heading, accuracies and curves of runs that differ in their seed."""
    first = runs[0]
    settings, rows = first.settings, []
    for i, student in enumerate(first.record["students"]):
        own, results = settings["students"][i], [run.record["students"][i] for run in runs]
        values = [result["last"]["top1"] for result in results]
        mean, deviation = spread(values)
        top5 = [result["last"].get("top5") for result in results]
        rows.append(
            {
                "student": student["name"],
                "model": own["model"],
                "loss": (own.get("soft") or {}).get("loss", "labels alone"),
                "top-1 %": mean,
                "±": deviation,
                "seeds": len(values),
                "of each seed": ", ".join(f"{v:.2f}" for v in values) if len(values) > 1 else "",
                "top-5 %": spread(top5)[0] if all(isinstance(v, (int, float)) for v in top5) else "",
            }
        )
    teacher = first.record.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("top1"), (int, float)):
        top5 = f"{teacher['top5']:.2f}" if isinstance(teacher.get("top5"), (int, float)) else ""
        facts = {"student": "(teacher)", "model": taught_by(settings), "top-1 %": f"{teacher['top1']:.2f}", "top-5 %": top5}
        rows.append(dict.fromkeys(rows[0], "") | facts)
    warning = f'<p class="warning">{esc(w)}</p>' if (w := reduced(first)) else ""
    about = f"<p>{esc(settings['about'])}</p>" if settings.get("about") else ""
    charts = "".join(figure(chart) for chart in curves(runs))
    charts = f'<div class="charts">{charts}</div>' if charts else '<p class="quiet">These results hold no curves.</p>'
    return f"<h3>{esc(headline(first))}</h3>{warning}{about}{table(rows, 'Last epoch, test images')}{charts}"


def headline(run):
    fraction = run.settings["data"].get("fraction", 1.0)
    share = f", {100 * fraction:g} % of the images" if fraction != 1 else ""
    return f"{run.name}: {run.settings['epochs']:g} epochs{share}"


def taught_by(settings):
    teacher = settings.get("teacher") or {}
    return teacher.get("model") or str(teacher.get("recipe") or "").removesuffix(".json")


def reduced(run):
    """What makes a run less than its recipe, in words; "" for a whole one."""
    if run.record.get("limit") is not None:
        return f"A trial of {run.record['limit']} steps, which says nothing about accuracy."
    path = paper.ROOT / "recipes" / f"{run.name}.json"
    whole = recipe.load(path).epochs if path.is_file() else 0
    if run.settings["epochs"] < whole:
        return f"A reduced schedule: {run.settings['epochs']:g} epochs where the recipe has {whole:g}."
    return ""


CURVES = {"loss": "Loss", "hard": "Label loss", "soft": "Distillation loss"}
CURVES["gradient_ratio"] = "Gradient of the label loss / of the distillation loss"


def curves(runs):
    """Charts of what the runs recorded; those without any give none."""
    wanted = [("accuracy", "epoch", "top1", "Top-1, %"), *(("curves", "step", key, title) for key, title in CURVES.items())]
    for part, x, y, title in wanted:
        series = []
        for run in runs:
            recorded = run.record.get(part) or {}
            for name, own in expect(recorded, dict, f"{run.file}: {part}").items():
                points = pairs(own, x, y, f"{run.file}: {part}.{name}")
                series += [(name, points)] if points else []
        if series:
            yield lines(title, series, x)


def pairs(own, x, y, where):
    """[(x, y)] of one recorded curve; an absent value (null) is left out, and so is an absent curve."""
    if y not in expect(own, dict, where):
        return []
    xs, ys = expect(own.get(x), list, f"{where}.{x}"), expect(own[y], list, f"{where}.{y}")
    if len(xs) != len(ys):
        raise ReportError(f"{where}: expected as many {x} as {y}, found {len(xs)} and {len(ys)}")
    points = [(a, b) for a, b in zip(xs, ys, strict=True) if b is not None]
    for value in itertools.chain(*points):
        expect(value, (int, float), where)
    return points


def data_scale(runs):
    """[(title, {student: [(share in %, mean gap to kd in points, standard deviation or None, seeds)]})].

    A panel for each setting that was run on two shares of the images or more; the gap is that of each seed.
    """
    panels = {}
    for run in runs:
        if run.record.get("limit") is not None:
            continue
        for own, result in zip(run.settings["students"], run.record["students"], strict=True):
            tree = paper.experiment(run.settings, own)
            fraction = tree["data"].pop("fraction", 1.0)
            tree["student"] = {k: v for k, v in tree["student"].items() if k not in ("hard", "soft")}
            if tree["teacher"] is not None:
                top1 = panels.setdefault(json.dumps(tree, sort_keys=True), (headline_of(run, own), {}))[1]
                top1.setdefault(fraction, {}).setdefault(run.record.get("seed"), {})[own.get("name")] = result["last"]["top1"]
    for title, shares in panels.values():
        series = {}
        for fraction, seeds in sorted(shares.items()):
            names = dict.fromkeys(name for found in seeds.values() for name in found if name != "kd")
            for name in names:
                found = [top1[name] - top1["kd"] for top1 in seeds.values() if name in top1 and "kd" in top1]
                if found:
                    deviation = statistics.stdev(found) if len(found) > 1 else None
                    series.setdefault(str(name), []).append((100 * fraction, statistics.fmean(found), deviation, len(found)))
        if len({share for points in series.values() for share, *_ in points}) > 1:
            yield title, series


def headline_of(run, own):
    mixed = [key for key in ("rand_augment", "mixup", "cutmix") if run.settings["data"].get(key)]
    strength = "strong" if mixed else "weak"
    return f"{own['model']}, {strength} augmentation, {run.settings['epochs']:g} epochs"


def figure_one():
    """The paper's own: {method: [(place, gap, None)]} and the places' names."""
    cells = [cell for cell in paper.paper()["cells"] if cell["table"] == "fig1"]
    places = list(dict.fromkeys(cell["dataset"] for cell in cells))
    names = {"cifar-100": "CIFAR-100", "imagenet-1k": "ImageNet"} | {f"imagenet-1k-{n}pct": f"{n} % of it" for n in (30, 60)}
    series = {}
    for cell in cells:
        series.setdefault(cell["method"], []).append((places.index(cell["dataset"]), cell["value"], None))
    return series, [(i, names.get(place, place)) for i, place in enumerate(places)]


def data_scale_figures(panels):
    figures = [
        gaps(title, {name: [p[:3] for p in points] for name, points in series.items()}, "share of the training images, %")
        for title, series in panels
    ]
    series, places = figure_one()
    return [*figures, gaps("The paper's Figure 1", series, "training images", places, joined=False)]


def scale_section(runs):
    panels = list(data_scale(runs))
    if not panels:
        return "<p>No setting here was run on several shares of the training images (<code>data.fraction</code>).</p>"
    charts = "".join(figure(chart) for chart in data_scale_figures(panels))
    rows = [
        {
            "setting": title,
            "share %": f"{share:g}",
            "method": name,
            "gap": f"{mean:+.2f}",
            "±": "" if sd is None else f"{sd:.2f}",
            "seeds": n,
        }
        for title, series in panels
        for name, points in series.items()
        for share, mean, sd, n in points
    ]
    words = "<p>Top-1 of a method less that of kd, in points: above 0, kd is behind. Error bars: one standard deviation over"
    return f'{words} seeds.</p><div class="charts">{charts}</div>{table(rows, "The gaps")}'


def cka_section(maps):
    figures = []
    for file, result in maps:
        best = [max((v for v in row if v is not None), default=None) for row in result["cka"]]
        best = [value for value in best if value is not None]
        told = (
            f", on average {statistics.fmean(best):.2f} between a layer of the first and its likest of the second"
            if best
            else ""
        )
        facts = f"{result.get('images')} images of {result.get('data')}, batches of {result.get('batch')}"
        grey = " Grey: the same for every image." if any(v is None for row in result["cka"] for v in row) else ""
        caption = f"<b>{esc(result['models'][0])}</b> (up) and <b>{esc(result['models'][1])}</b> (right)."
        caption += f" {esc(facts)}{esc(told)}.{grey} <code>{esc(file)}</code>"
        figures.append(figure(heat_map(result), caption))
    return f'<p>Minibatch linear CKA between all layers.</p><div class="charts">{"".join(figures)}</div>'


def benchmark(file, tree):
    """A table of its rows, if it has some, and all else that it tells."""
    rows = tree.get("rows")
    parts = [f"<h3>{esc(tree.get('title') or Path(file).stem)}</h3>"]
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        keys = list(dict.fromkeys(key for row in rows for key in row))
        parts.append(table([{key: plain(row.get(key)) for key in keys} for row in rows], Path(file).name))
    else:
        rows = None
    others = [{"": key, "value": plain(v)} for key, v in tree.items() if key != "title" and (key != "rows" or rows is None)]
    return "".join(parts) + table(others, f"{Path(file).name}: conditions")


def plain(value):
    """A value as a table's cell: nested ones as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(v)}" for key, v in value.items())
    return json.dumps(value) if isinstance(value, (list, bool)) else value


def provenance(runs):
    rows = []
    for run in runs:
        record = run.record
        hardware = record.get("hardware") if isinstance(record.get("hardware"), dict) else {}
        seconds = record.get("seconds")
        rows.append(
            {
                "run": run.name,
                "students": ", ".join(student["name"] for student in record["students"]),
                "seed": record.get("seed"),
                "epochs": f"{run.settings['epochs']:g}",
                "steps": record.get("steps"),
                "hours": f"{seconds / 3600:.2f}" if isinstance(seconds, (int, float)) else "",
                "precision": record.get("precision"),
                "hardware": f"{hardware.get('processes', '?')} x {hardware.get('device', '?')}",
                "versions": plain(record.get("versions")),
                "commit": str(record.get("commit") or "")[:12] + ("+changes" if "+" in str(record.get("commit")) else ""),
                "file": run.file,
                "command": record.get("command"),
            }
        )
    return table(rows, "Every run")


# ---------------------------------------------------------------- the page

PAGE_CSS = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.25rem;margin:2.2rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6rem 0 .3rem}
h1,h2,h3,p,li,figcaption{overflow-wrap:anywhere}
p,ul{max-width:46rem;margin:.5rem 0}ul{padding-left:1.2rem}
a{color:var(--link)}nav a{margin-right:1rem;display:inline-block;padding:.2rem 0}
code{font-size:.9em}
.quiet,figcaption{color:var(--quiet)}figcaption{font-size:.85rem}
.warning{border-left:4px solid var(--c1);padding:.2rem .7rem;background:var(--panel)}
.box{overflow-x:auto;margin:.8rem 0;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--quiet);padding:.2rem 0;white-space:nowrap}
th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
th{border-bottom:2px solid var(--line)}.number{text-align:right}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.2rem}
figure{margin:0;break-inside:avoid}figure svg{display:block;width:100%;height:auto}
@media print{
@page{margin:14mm}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}
.box{overflow:visible}table{font-size:7.5pt}th,td{white-space:normal;overflow-wrap:anywhere;padding:.15rem .3rem}
caption{white-space:normal}
.number{white-space:nowrap}
tr,figure,.warning{break-inside:avoid}h2,h3,caption{break-after:avoid}thead{display:table-header-group}
.charts{grid-template-columns:1fr 1fr}
}
"""


def variables(colours):
    return ":root{" + "".join(f"--{name}:{value};" for name, value in colours.items()) + "}"


def page(results):
    """The whole report as HTML text."""
    runs = results.runs
    sections = {}
    if runs:
        sections["Against the paper"] = against_paper(runs)
        sections["Data scale"] = scale_section(runs)
    if results.maps:
        sections["Similarity of layers"] = cka_section(results.maps)
    if runs:
        notes = "".join(f"<p>{esc(Path(file).name)}: {esc(note)}</p>" for file, note in results.notes)
        sections["Training"] = notes + "".join(experiment(group) for group in experiments(runs))
    if results.benchmarks:
        sections["Benchmarks"] = "".join(benchmark(*entry) for entry in results.benchmarks)
    if runs:
        sections["Where the numbers come from"] = provenance(runs)
    links = "".join(f'<a href="#s{i}">{title}</a>' for i, title in enumerate(sections))
    body = "".join(f'<section><h2 id="s{i}">{title}</h2>{part}</section>' for i, (title, part) in enumerate(sections.items()))
    css = "".join(
        (
            variables(LIGHT),
            ":root{color-scheme:light dark}",
            f"@media screen and (prefers-color-scheme:dark){{{variables(DARK)}}}",
            PAGE_CSS,
            FIGURE_CSS,
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Distillation results</title><style>{css}</style></head><body>"
        f"<h1>Distillation results</h1><p>{counted(results)}</p><nav>{links}</nav>{body}</body></html>\n"
    )


def counted(results):
    whole = sum(run.record.get("limit") is None for run in results.runs)
    facts = [(whole, "finished run"), (len(results.runs) - whole, "trial"), (len(results.maps), "heat map")]
    facts.append((len(results.benchmarks), "benchmark"))
    return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in facts if n) + "."


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="JSON files of runs, heat maps and benchmarks")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, say report.html")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write data_scale.svg there, too")
    args = parser.parse_args(arguments)
    try:
        results = read(args.results)
        text = page(results)
        panels = list(data_scale(results.runs)) if args.plots else None
        if args.plots and not panels:
            raise ReportError("--plots: no setting among these runs was run on several shares of the images (data.fraction)")
    except (recipe.RecipeError, ReportError) as error:
        parser.exit(2, f"error: {error}\n")
    if panels:
        args.plots.mkdir(parents=True, exist_ok=True)
        recipe.write_atomic(args.plots / "data_scale.svg", standalone(*data_scale_figures(panels)))
    recipe.write_atomic(args.out, text)
    print(f"{args.out}: {counted(results)}")


if __name__ == "__main__":
    main()
