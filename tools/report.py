"""Finished runs, heat maps and benchmarks as one HTML page that needs no network, for screens, phones and paper.

    python tools/report.py results/*.json --out report.html
    python tools/report.py runs/*/result.json results/cka_*.json --out report.html

Takes a run's result.json (or several under "runs"), the JSON of tools/cka.py and that of the benchmarks; the paper's numbers
(results/paper.json) stand beside ours without being named. Accuracies are those of the last epoch: mean and sample standard
deviation over seeds, by tools/paper.py; the data-scale figure is that of tools/scale.py.
"""

import argparse
import collections
import html
import itertools
import json
import math
import re
import statistics
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # runnable from anywhere

import paper  # noqa: E402
import scale  # noqa: E402

import recipe  # noqa: E402

MAX_BYTES = 2**26  # of a results file
WANTED = "a run's result (students, recipe), several under 'runs', a heat map of tools/cka.py or a benchmark (commit)"


class ReportError(ValueError):
    """A results file cannot be used; the message says which and where, what was found and what was expected."""


class Results(typing.NamedTuple):
    runs: list  # of (file, record as train.py wrote it)
    maps: list  # of (file, what tools/cka.py wrote)
    benchmarks: list  # of (file, dict)


# ---------------------------------------------------------------- reading


def read(paths):
    """Results of files; RecipeError or ReportError for one that is none."""
    results, seen = Results([], [], []), set()
    for path in map(str, paths):
        tree = recipe.read_json(path, MAX_BYTES)
        if not isinstance(tree, dict):
            raise ReportError(f"{path}: expected {WANTED}, found a {type(tree).__name__}")
        if "cells" in tree or "figure_1" in tree:  # the paper's numbers and the figure's points: both are made anew
            continue
        if "cka" in tree:
            results.maps.append((path, checked_map(tree, path)))
        elif ("students" in tree and "recipe" in tree) or "runs" in tree:
            for record in tree.get("runs", [tree]):
                text = json.dumps(check_run(record, path), sort_keys=True)
                if text not in seen:  # a run's own file, and the same in results/
                    results.runs.append((path, record))
                seen.add(text)
        elif "commit" in tree or (tree and all(isinstance(part, dict) and "commit" in part for part in tree.values())):
            results.benchmarks.extend([(path, tree)] if "commit" in tree else [(f"{path}: {k}", v) for k, v in tree.items()])
        else:
            raise ReportError(f"{path}: expected {WANTED}, found the keys {', '.join(list(tree)[:8]) or '(none)'}")
    return results


def check_run(record, path):
    """The record, if it has all that the page reads."""
    try:
        for student, own in zip(record["students"], record["recipe"]["students"], strict=True):
            paper.experiment(record["recipe"], own)
            number(student["last"]["top1"]), student["name"], own["model"]
        for x, y, own in ((x, y, own) for part, x, y, _ in CURVES for own in (record.get(part) or {}).values()):
            if y in own:
                [
                    number(value)
                    for _, *values in zip(own[x], own[x], own[y], strict=True)
                    for value in values
                    if value is not None
                ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ReportError(f"{path}: expected a result as train.py writes it, and its recipe as resolved; {said}") from None
    return record


def number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, found {json.dumps(value)[:60]}")
    return value


def checked_map(tree, path):
    shape = [len(layers) for layers in tree.get("layers", [])]
    rows = tree["cka"]
    if len(shape) != 2 or len(tree.get("models", [])) != 2 or [len(rows), *{len(row) for row in rows}] != shape:
        raise ReportError(f"{path}: expected two models, the layers of each, and a row of cka for each layer of the first")
    return tree


# ---------------------------------------------------------------- drawing; by hand: a page for no network needs little

COLOURS = ("#0067b1", "#c44e00", "#00805d", "#a8477f", "#8a6d00", "#2a8fc4", "#7a4f3a", "#5b6470")
METHODS = ("kd", "dkd", "dist", "rkd", "cc", "crd", "reviewkd", "alone")  # the colour of each, in every chart
WIDTH, HEIGHT, LEFT, BOTTOM = 360, 230, 46, 196
MAGMA = ("000004", "1c1044", "4f127b", "812581", "b5367a", "e55064", "fb8761", "fec287", "fcfdbf")  # at 0, 1/8, ... 1
LEVELS = 64


def svg(width, height, label, parts):
    """A figure that stands alone or in a page; `label` is what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}" '
        f'font-family="system-ui,sans-serif"><rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def chart(title, series, x_label):
    """Curves [(name, [(x, y)])]; one name, say of several seeds, has one colour. A logarithmic axis where y spans decades."""
    names = list(dict.fromkeys(name for name, _ in series))
    colour = {name: COLOURS[METHODS.index(name) if name in METHODS else i % len(COLOURS)] for i, name in enumerate(names)}
    xs, ys = zip(*itertools.chain(*(points for _, points in series)), strict=True)
    warp = math.log10 if min(ys) > 0 and max(ys) / min(ys) > 50 else float
    (low_x, high_x), (low_y, high_y) = padded(xs, 0), padded([warp(y) for y in ys], 0.05)
    parts, top = [scale.text(4, 14, title, "start", size=13)], 34
    x = LEFT
    for name in names:
        if x + 16 + 7 * len(name) > WIDTH:
            x, top = LEFT, top + 16
        parts.append(f'<rect x="{x}" y="{top - 9}" width="10" height="4" fill="{colour[name]}"/>')
        parts.append(scale.text(x + 14, top - 3, name, "start", size=11))
        x += 30 + 7 * len(name)

    def place(x, y):
        across, up = (x - low_x) / (high_x - low_x), (warp(y) - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - 12 - LEFT), BOTTOM - up * (BOTTOM - top - 6)

    for tick in ticks(low_y, high_y):
        value = 10**tick if warp is math.log10 else tick
        height = place(low_x, value)[1]
        parts.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - 12}" stroke="#d5d9df"/>')
        parts.append(scale.text(LEFT - 4, round(height + 4, 1), f"{value:.3g}", "end", "#5b6470", 11))
    for tick in ticks(low_x, high_x):
        parts.append(scale.text(round(place(tick, ys[0])[0], 1), BOTTOM + 14, f"{tick:g}", "middle", "#5b6470", 11))
    parts.append(scale.text((LEFT + WIDTH) / 2, HEIGHT - 5, x_label, "middle", "#5b6470", 11))
    for name, points in series:
        places = [place(*point) for point in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour[name]}" stroke-width="1.5" stroke-linejoin="round"/>')
        dots = places if len(places) < 5 else []
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour[name]}"/>' for x, y in dots]
    return svg(WIDTH, HEIGHT, title, parts)


def padded(values, share):
    low, high = min(values), max(values)
    room = (high - low) * share or (0.5 if low == high else 0)
    return low - room, high + room


def ticks(low, high, n=5):
    """About n round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def heat_map(result):
    """The matrix of tools/cka.py with the first model's layers upwards and the second's to the right, as in the paper."""
    matrix, left, top, side = result["cka"], 40, 10, 268
    rows, columns = len(matrix), len(matrix[0])
    tall = round(side * min(max(rows / columns, 0.5), 1.4))
    height, paths = top + tall + 40, collections.defaultdict(list)
    for i, row in enumerate(matrix):
        start = 0
        for colour, cells in itertools.groupby(map(magma, row)):
            n = len(list(cells))
            paths[colour].append(f"M{start} {rows - 1 - i}h{n}v1h-{n}z")
            start += n
    cells = "".join(f'<path fill="{colour}" d="{"".join(d)}"/>' for colour, d in paths.items())
    frame = f'x="{left}" y="{top}" width="{side}" height="{tall}"'
    crisp = 'preserveAspectRatio="none" shape-rendering="crispEdges"'
    parts = [f'<svg {frame} viewBox="0 0 {columns} {rows}" {crisp}>{cells}</svg>']
    for tick in ticks(0, rows - 1):
        parts.append(scale.text(left - 4, round(top + tall * (1 - (tick + 0.5) / rows) + 4, 1), f"{tick:g}", "end", size=11))
    for tick in ticks(0, columns - 1):
        parts.append(scale.text(round(left + side * (tick + 0.5) / columns, 1), top + tall + 14, f"{tick:g}", size=11))
    parts.append(scale.text(left + side / 2, height - 8, "layers of " + shortened(result["models"][1], 40), size=11))
    upwards = scale.text(0, 0, "layers of " + shortened(result["models"][0], min(40, tall // 8)), size=11)
    parts.append(f'<g transform="translate(11 {top + tall / 2:.1f}) rotate(-90)">{upwards}</g>')
    bar = left + side + 10
    for i in range(LEVELS):
        y = top + tall * (1 - (i + 1) / LEVELS)
        fill = magma(i / (LEVELS - 1))
        parts.append(f'<rect x="{bar}" y="{y:.2f}" width="10" height="{tall / LEVELS + 0.3:.2f}" fill="{fill}"/>')
    parts += [scale.text(bar + 13, top + tall * (1 - v) + (8 if v else 0), f"{v:g}", "start", size=11) for v in (0, 0.5, 1)]
    return svg(WIDTH, height, "CKA of " + " and ".join(map(str, result["models"])), parts)


def magma(value):
    """The colour of a similarity, in LEVELS steps; grey where a layer says the same of every image."""
    if value is None:
        return "#888888"
    place = round(min(max(value, 0), 1) * (LEVELS - 1)) / (LEVELS - 1) * 8
    low = min(int(place), 7)
    ends = (bytes.fromhex(MAGMA[k]) for k in (low, low + 1))
    return "#" + bytes(round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True)).hex()


def shortened(name, n):
    return name if len(name) <= n else name[: n - 1] + "…"


# ---------------------------------------------------------------- the page's parts


def table(rows, caption):
    """Dictionaries with equal keys; columns that are empty throughout are left out."""
    columns = [key for key in rows[0] if any(row[key] not in ("", None) for row in rows)]
    numeric = {
        key for key in columns if all(re.fullmatch(r"[-+−]?[\d.,:]*( ?± ?[\d.]+)?|not run", str(row[key])) for row in rows)
    }

    def kind(key, words):
        return " class=number" if key in numeric else " class=long" if len(words) > 30 else ""

    def cells(tag, values):
        return "".join(f"<{tag}{kind(k, shown(v))}>{shown(v)}</{tag}>" for k, v in values)

    head = cells("th", ((key, key) for key in columns))
    body = "".join(f"<tr>{cells('td', ((key, row[key]) for key in columns))}</tr>" for row in rows)
    words = html.escape(caption)
    box = f'<div class="box" tabindex="0" role="region" aria-label="{words}">'
    return f"{box}<table><caption>{words}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def shown(value):
    """A value as a table's cell: nested ones as text."""
    if isinstance(value, dict):
        return ", ".join(f"{html.escape(str(key))} {shown(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "" if value is None else html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def figure(drawing, caption=""):
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def against_paper(records):
    """Every table of the paper for which there is a run, whole: what has not been run is marked."""
    parts = []
    for name in (*paper.TABLES, paper.STUDY):
        rows = [paper.row(cell, records) for cell in paper.cells(name)]
        if any(row["seeds"] or row["reduced"] for row in rows):
            rows = [{key: value for key, value in row.items() if key not in ("cell", "command")} for row in rows]
            parts.append(table(rows, f"Table {name} of the paper"))
            disputed = "".join(f"<li>{shown(d['topic'])}: {shown(d['resolution'])}</li>" for d in paper.disputes(name))
            parts.append(f"<p>Disputed here, and what was chosen:</p><ul>{disputed}</ul>" if disputed else "")
    none = "<p>None of these runs has the settings of a cell of the paper.</p>"
    return "".join(parts) + "<p>The commands of all cells: <code>python tools/paper.py all</code>.</p>" if parts else none


def data_scale(records):
    """The figure, for runs of equal epochs and for those of equal steps, where there are two shares of the images."""
    figures = []
    for along in ("epochs", "steps"):
        rows = scale.points(records, along)
        lines = collections.Counter((row["augmentation"], row["epochs"], row["method"]) for row in rows)
        rows = [row for row in rows if lines[row["augmentation"], row["epochs"], row["method"]] > 1]
        if rows:
            drawing = f'<div class="wide">{scale.draw(rows, scale.figure_1())}</div>'
            figures.append(figure(drawing, f"Runs of a line have the same number of {along}."))
    return (
        "".join(figures) or "<p>No setting was run on several shares of the training images (<code>data.fraction</code>).</p>"
    )


def similarity(maps):
    figures = []
    for file, result in maps:
        likest = [max(own) for row in result["cka"] if (own := [v for v in row if v is not None])]
        mean = (
            f"; of a layer of the first to its likest in the second, on average {statistics.fmean(likest):.2f}"
            if likest
            else ""
        )
        caption = f"<b>{shown(result['models'][0])}</b> (up) and <b>{shown(result['models'][1])}</b> (right): "
        caption += f"{shown(result.get('images'))} images of {shown(result.get('data'))}{mean}. <code>{shown(file)}</code>"
        figures.append(figure(heat_map(result), caption))
    words = "<p>Minibatch linear CKA between all layers, 0 to 1; grey: a layer that says the same of every image.</p>"
    return f'{words}<div class="charts">{"".join(figures)}</div>'


CURVES = (  # part of a record, x, y, what a chart of it is called
    ("accuracy", "epoch", "top1", "Top-1, %"),
    ("curves", "step", "loss", "Loss"),
    ("curves", "step", "hard", "Label loss"),
    ("curves", "step", "soft", "Distillation loss"),
    ("curves", "step", "gradient_ratio", "Gradient norm of the label loss / of the distillation loss"),
)


def training(runs):
    """Runs that differ in their seed only, together: accuracies and curves."""
    groups = collections.defaultdict(list)
    for file, record in runs:
        settings = {k: v for k, v in record["recipe"].items() if k not in ("seed", "runs", "about")}
        groups[json.dumps([settings, record.get("limit")], sort_keys=True)].append((file, record))
    return "".join(map(experiment, groups.values()))


def experiment(runs):
    (_, first), records = runs[0], [record for _, record in runs]
    settings, rows = first["recipe"], []
    for i, student in enumerate(first["students"]):
        own, values = settings["students"][i], [record["students"][i]["last"]["top1"] for record in records]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        facts = {"student": student["name"], "model": own["model"], "loss": (own.get("soft") or {}).get("loss", "labels alone")}
        rows.append(facts | {"top-1 %": f"{statistics.fmean(values):.2f}{spread}", "seeds": len(values)})
    teacher = first.get("teacher") or {}
    if teacher:
        taught = paper.taught_by(settings["teacher"])
        rows.append(dict.fromkeys(rows[0], "") | {"student": "(teacher)", "model": taught, "top-1 %": shown(teacher["top1"])})
    charts = []
    for part, x, y, title in CURVES:
        curves = [(name, own) for record in records for name, own in (record.get(part) or {}).items() if y in own]
        series = [(name, [p for p in zip(own[x], own[y], strict=True) if None not in p]) for name, own in curves]
        if series := [(name, points) for name, points in series if points]:
            charts.append(figure(chart(title, series, x)))
    share = settings["data"].get("fraction", 1.0)
    said = f"{name_of(*runs[0])}: {settings['epochs']:g} epochs" + (f", {100 * share:g} % of the images" if share != 1 else "")
    about = f"<p>{shown(settings['about'])}</p>" if settings.get("about") else ""
    files = f"<p class=quiet>{shown([file for file, _ in runs])}</p>"
    charts = f'<div class="charts">{"".join(charts)}</div>'
    return f"<h3>{shown(said)}</h3>{warning(*runs[0])}{about}{files}{table(rows, 'Last epoch, test images')}{charts}"


def name_of(file, record):
    """The recipe's name, which only the command tells."""
    found = re.search(r"([\w.-]+)\.json", str(record.get("command")))
    return found[1] if found else Path(file).stem


def warning(file, record):
    """What makes a run less than its recipe, in words; "" for a whole one."""
    said, epochs = "", record["recipe"]["epochs"]
    path = ROOT / "recipes" / f"{name_of(file, record)}.json"
    if record.get("limit") is not None:
        said = f"A trial of {record['limit']} steps, which says nothing about accuracy."
    elif path.is_file() and epochs < (whole := recipe.load(path).epochs):
        said = f"A reduced schedule: {epochs:g} epochs where the recipe has {whole:g}."
    return f'<p class="warning">{shown(said)}</p>' if said else ""


def benchmark(file, tree):
    """A table of its rows, if it has some, and all else that it tells."""
    rows = tree.get("rows")
    parts = [f"<h3>{shown(tree.get('title') or Path(file).stem)}</h3>"]
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        keys = list(dict.fromkeys(itertools.chain(*rows)))
        parts.append(table([{key: row.get(key) for key in keys} for row in rows], file))
        tree = {key: value for key, value in tree.items() if key != "rows"}
    facts = [{"": key, "value": value} for key, value in tree.items() if key != "title"]
    return "".join(parts) + table(facts, f"{file}: conditions")


def provenance(runs):
    rows = []
    for file, record in runs:
        facts = {"run": name_of(file, record), "students": [student["name"] for student in record["students"]]}
        kept = ("seed", "steps", "seconds", "precision", "hardware", "versions", "commit", "command")
        rows.append(facts | {key: record.get(key) for key in kept} | {"file": file})
    return table(rows, "Every run")


# ---------------------------------------------------------------- the page

STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:#fff;color:#1c2128;font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin:2.2rem 0 .5rem;border-bottom:1px solid #d5d9df}h3{margin:1.6rem 0 .3rem}
h1,h2,h3,p,li,figcaption{overflow-wrap:anywhere}
p,ul{max-width:46rem;margin:.5rem 0}ul{padding-left:1.2rem}nav a{margin-right:1rem;display:inline-block;padding:.2rem 0}
.quiet,figcaption,caption{color:#5b6470;font-size:.85rem}
.warning{border-left:4px solid #c44e00;padding:.2rem .7rem;background:#f5f6f8}
.box{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.2rem 0}
th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid #d5d9df;max-width:28rem}
td.long{min-width:16rem;overflow-wrap:anywhere}
td.number,th.number{text-align:right;white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.2rem}
figure{margin:0;break-inside:avoid}figure svg{display:block;width:100%;height:auto}
.wide{overflow-x:auto}.wide svg{min-width:44rem}
@media print{
@page{margin:14mm}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}.box{overflow:visible}
table{font-size:7.5pt}th,td,td.long{min-width:0;padding:.15rem .3rem}
tr,.warning{break-inside:avoid}.wide svg{min-width:0}h2,h3,caption{break-after:avoid}.charts{grid-template-columns:1fr 1fr}
}
"""


def page(results):
    """The whole report as HTML text."""
    whole = [record for _, record in results.runs if record.get("limit") is None]
    sections = {
        "Against the paper": results.runs and against_paper(whole),
        "Data scale": results.runs and data_scale(whole),
        "Similarity of layers": results.maps and similarity(results.maps),
        "Training": results.runs and training(results.runs),
        "Benchmarks": "".join(benchmark(*entry) for entry in results.benchmarks),
        "Where the numbers come from": results.runs and provenance(results.runs),
    }
    sections = {title: part for title, part in sections.items() if part}
    links = "".join(f'<a href="#s{i}">{title}</a>' for i, title in enumerate(sections))
    body = "".join(f'<section><h2 id="s{i}">{title}</h2>{part}</section>' for i, (title, part) in enumerate(sections.items()))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Distillation results</title><style>{STYLE}</style></head><body>"
        f"<h1>Distillation results</h1><p>{counted(results)}</p><nav>{links}</nav>{body}</body></html>\n"
    )


def counted(results):
    trials = sum(record.get("limit") is not None for _, record in results.runs)
    facts = [(len(results.runs) - trials, "finished run"), (trials, "trial"), (len(results.maps), "heat map")]
    return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in [*facts, (len(results.benchmarks), "benchmark")] if n) + "."


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="JSON files of runs, heat maps and benchmarks")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, say report.html")
    args = parser.parse_args(arguments)
    try:
        results = read(args.results)
    except (recipe.RecipeError, ReportError) as error:
        parser.exit(2, f"error: {error}\n")
    recipe.write_atomic(args.out, page(results))
    print(f"{args.out}: {counted(results)}")


if __name__ == "__main__":
    main()
