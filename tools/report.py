"""Finished runs and heat maps as one HTML page that needs no network, for screens, phones and paper.

    python tools/report.py results/*.json --out report.html
    python tools/report.py runs/*/result.json results/cka_*.json --out report.html

Takes a run's result.json (or several under "runs") and the JSON of tools/cka.py; the paper's numbers (results/paper.json)
stand beside ours without being named, and benchmarks have a table of their own (tools/bench_table.py): both are passed over.
Accuracies are those of the last epoch: mean and sample standard deviation over seeds, by tools/paper.py; the data-scale
figure is that of tools/scale.py.
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
WANTED = "a run's result (students, recipe), several under 'runs', or a heat map of tools/cka.py"


class ReportError(ValueError):
    """A results file cannot be used; the message says which and where, what was found and what was expected."""


class Results(typing.NamedTuple):
    runs: list  # of (file, record as train.py wrote it)
    maps: list  # of (file, what tools/cka.py wrote)
    notes: list  # of (file, what is said of its runs)


# ---------------------------------------------------------------- reading


def read(paths):
    """Results of files; RecipeError or ReportError for one that is none."""
    results, seen = Results([], [], []), set()
    for path in map(str, paths):
        tree = recipe.read_json(path, MAX_BYTES)
        if isinstance(tree, dict) and "cka" in tree:
            results.maps.append((path, check_map(tree, path)))
        elif isinstance(tree, dict) and ({"students", "recipe"} <= set(tree) or isinstance(tree.get("runs"), list)):
            for record in tree.get("runs", [tree]):
                text = json.dumps(check_run(record, path), sort_keys=True)
                if text not in seen:  # a run's own file, and the same in results/
                    results.runs.append((path, record))
                seen.add(text)
            results.notes.extend([(path, tree["note"])] if "note" in tree else [])
        elif not from_another_tool(tree):
            found = f"the keys {', '.join(list(tree)[:8]) or '(none)'}" if isinstance(tree, dict) else type(tree).__name__
            raise ReportError(f"{path}: expected {WANTED}, found {found}")
    if not results.runs and not results.maps:
        raise ReportError(f"{', '.join(map(str, paths))}: expected {WANTED}, found none")
    return results


def from_another_tool(tree):
    """Whether it is what else lies in results/: the paper's numbers, tools/scale.py's points, a benchmark or several."""
    parts = [tree, *tree.values()] if isinstance(tree, dict) else []
    return any(isinstance(part, dict) and {"cells", "figure_1", "commit"} & set(part) for part in parts)


def check_run(record, path):
    """The record, if it has all that the page reads."""
    try:
        number(record["seed"]), number(record["recipe"]["epochs"]), number(record["recipe"]["data"].get("fraction", 1.0))
        for student, own in zip(record["students"], record["recipe"]["students"], strict=True):
            paper.experiment(record["recipe"], own)
            number(student["last"]["top1"]), student["name"], own["model"]
            if own["soft"]:
                number(record["teacher"]["top1"])
        for x, y, own in ((x, y, own) for part, x, y, _ in CURVES for own in (record.get(part) or {}).values()):
            points(own, x, y)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ReportError(f"{path}: expected a result as train.py writes it, and its recipe as resolved; {said}") from None
    return record


def number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, found {json.dumps(value)[:60]}")
    return value


def points(own, x, y):
    """[(x, y)] of one recorded curve; an absent value (null) is left out, and so is an absent curve."""
    pairs = zip(own[x], own[y], strict=True) if y in own else ()
    return [(number(a), number(b)) for a, b in pairs if b is not None]


def check_map(tree, path):
    """The heat map, if its layers and its numbers are those of two models."""
    try:
        (first, second), shape = tree["models"], [len(layers) for layers in tree["layers"]]
        known = [number(value) for row in tree["cka"] for value in row if value is not None]
        fits = [{len(tree["cka"])}, {len(row) for row in tree["cka"]}] == [{n} for n in shape] and known
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: expected a heat map as tools/cka.py writes it; {type(error).__name__}: {error}") from None
    if not fits:
        raise ReportError(f"{path}: expected the layers of two models, and a row of cka for each layer of the first")
    return tree | {"models": [str(first), str(second)]}


# ---------------------------------------------------------------- drawing; by hand: a page for no network needs little

NAMES = ("kd", "dkd", "dist", "alone", "rkd", "cc", "crd", "reviewkd")
COLOURS = ("#222222", *scale.METHODS.values(), "#777777", "#a8477f", "#00805d", "#2a8fc4", "#8a6d00")
DASHES = ("none", "none", "6 2", "2 2", "none", "6 2", "2 2", "8 2 2 2")  # a print may have no colours
LINES = [f'stroke="{c}" stroke-dasharray="{d}"' for c, d in zip(COLOURS, DASHES, strict=True)]
WIDTH, HEIGHT, LEFT, BOTTOM = 360, 230, 46, 196
MAGMA = ("000004", "1c1044", "4f127b", "812581", "b5367a", "e55064", "fb8761", "fec287", "fcfdbf")  # at 0, 1/8, ... 1
LEVELS = 64


def chart(title, series, x_label):
    """Curves [(name, [(x, y)])]; one name, say of several seeds, has one colour. A logarithmic axis where y spans decades."""
    names = list(dict.fromkeys(name for name, _ in series))
    own = {name: LINES[NAMES.index(name) if name in NAMES else i % len(LINES)] for i, name in enumerate(names)}
    xs, ys = zip(*itertools.chain(*(points for _, points in series)), strict=True)
    warp = math.log10 if min(ys) > 0 and max(ys) / min(ys) > 50 else float
    (low_x, high_x), (low_y, high_y) = padded(xs, 0), padded([warp(y) for y in ys], 0.05)
    parts, top, x = [scale.text(4, 14, title, "start", size=13)], 34, LEFT
    for name in names:
        if x + 24 + 7 * len(name) > WIDTH and x > LEFT:
            x, top = LEFT, top + 16
        parts.append(f'<path d="M{x} {top - 7}h18" stroke-width="2" {own[name]}/>')
        parts.append(scale.text(x + 22, top - 3, name, "start", size=11))
        x += 38 + 7 * len(name)

    def place(x, y):
        across, up = (x - low_x) / (high_x - low_x), (warp(y) - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - 12 - LEFT), BOTTOM - up * (BOTTOM - top - 6)

    decades = [m * 10**k for k in range(math.floor(low_y), math.ceil(high_y)) for m in (1, 3)] if warp is math.log10 else ()
    for value in [v for v in decades if low_y <= warp(v) <= high_y] or ticks(low_y, high_y):
        height = place(low_x, value)[1]
        parts.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - 12}" stroke="#d5d9df"/>')
        parts.append(scale.text(LEFT - 4, round(height + 4, 1), f"{value:g}", "end", "#5b6470", 11))
    for tick in ticks(low_x, high_x):
        parts.append(scale.text(round(place(tick, ys[0])[0], 1), BOTTOM + 14, f"{tick:g}", "middle", "#5b6470", 11))
    parts.append(scale.text((LEFT + WIDTH) / 2, HEIGHT - 5, x_label, "middle", "#5b6470", 11))
    for name, curve in series:
        places = [place(*point) for point in curve]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke-width="1.5" stroke-linejoin="round" {own[name]}/>')
        dots = places if len(places) < 5 else []
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="white" {own[name].split()[0]}/>' for x, y in dots]
    return scale.svg(WIDTH, HEIGHT, title, parts)


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
        size = f'width="10" height="{tall / LEVELS + 0.3:.2f}"'
        parts.append(f'<rect x="{bar}" y="{y:.2f}" {size} fill="{magma(i / (LEVELS - 1))}"/>')
    parts += [scale.text(bar + 13, top + tall * (1 - v) + (8 if v else 0), f"{v:g}", "start", size=11) for v in (0, 0.5, 1)]
    return scale.svg(WIDTH, height, "CKA of " + " and ".join(result["models"]), parts)


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
    number = re.compile(r"[-+]?[\d.]*( ± [\d.]+)?|not run")
    numeric = {key for key in columns if all(number.fullmatch(str(row[key])) for row in rows)}

    def cells(tag, values):
        kinds = ("number" if key in numeric else "long" if len(shown(v)) > 40 else "" for key, v in values)
        return "".join(f'<{tag} class="{kind}">{shown(v)}</{tag}>' for kind, (_, v) in zip(kinds, values, strict=True))

    head = cells("th", [(key, key) for key in columns])
    body = "".join(f"<tr>{cells('td', [(key, row[key]) for key in columns])}</tr>" for row in rows)
    box = f'<div class="box" tabindex="0" role="region" aria-label="{shown(caption)}">'
    return f"{box}<table><caption>{shown(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def shown(value):
    """A value as a table's cell: nested ones as text."""
    if isinstance(value, dict):
        return ", ".join(f"{html.escape(str(key))} {shown(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return "" if value is None else html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def figure(drawing, caption=""):
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


SETTINGS = ("measure", "lr", "weight_decay", "label loss")


def against_paper(records):
    """Every table of the paper for which there is a run, whole: what has not been run is marked."""
    parts = []
    for name in (*paper.TABLES, paper.STUDY):
        rows = [paper.row(cell, records) for cell in paper.cells(name)]
        if any(row["seeds"] or row["reduced"] for row in rows):
            values = {key: {str(row[key]) for row in rows if "minus" not in row["measure"]} for key in SETTINGS}
            common = {key: min(own) for key, own in values.items() if len(own) == 1 and own != {""}}
            caption = ", ".join([f"Table {name} of the paper", *(f"{key} {value}" for key, value in common.items())])
            parts.append(table([brief(row, common) for row in rows], caption))
            disputed = "".join(f"<li>{shown(d['topic'])}: {shown(d['resolution'])}</li>" for d in paper.disputes(name))
            parts.append(f"<p>Disputed here, and what was chosen:</p><ul>{disputed}</ul>" if disputed else "")
    none = "<p>None of these runs has the settings of a cell of the paper.</p>"
    return "".join(parts) + "<p>The commands of all cells: <code>python tools/paper.py all</code>.</p>" if parts else none


def brief(row, common):
    """A row with the numbers near its beginning, for narrow screens, and without what the caption says of all rows."""
    gap = "minus" in row["measure"]  # kd_minus_best_other
    pair = f"{row['teacher']} → {row['student']}" if row["teacher"] and row["student"] else row["teacher"] or row["student"]
    first = {"network": pair, "method": row["measure"].replace("_", " ") if gap else row["method"], "epochs": row["epochs"]}
    first |= {key: row[key] for key in ("paper", "ours", "±", "seeds", "difference", "our teacher", "reduced")}
    others = {key: "" if gap else row[key] for key in SETTINGS if key not in common}
    return first | others | {"disputed": row["disputed"]}


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
    none = "<p>No setting was run on several shares of the training images (<code>data.fraction</code>).</p>"
    return "".join(figures) or none


def similarity(maps):
    figures = []
    for file, result in maps:
        likest = statistics.fmean(max(own) for row in result["cka"] if (own := [v for v in row if v is not None]))
        mean = f"; of a layer of the first to its likest in the second, on average {likest:.2f}"
        caption = f"<b>{shown(result['models'][0])}</b> (up) and <b>{shown(result['models'][1])}</b> (right): "
        caption += f"{shown(result.get('images'))} images of {shown(result.get('data'))}{mean}.{made_by(file, result)}"
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
    if any(own["soft"] for own in settings["students"]):
        taught, top1 = paper.taught_by(settings["teacher"]), f"{first['teacher']['top1']:.2f}"
        rows.append(dict.fromkeys(rows[0], "") | {"student": "(teacher)", "model": taught, "top-1 %": top1})
    charts = []
    for part, x, y, title in CURVES:
        curves = [(name, points(own, x, y)) for record in records for name, own in (record.get(part) or {}).items()]
        if series := [(name, curve) for name, curve in curves if curve]:
            charts.append(figure(chart(title, series, x)))
    share = settings["data"].get("fraction", 1.0)
    said = f"{name_of(*runs[0])}: {settings['epochs']:g} epochs" + (f", {100 * share:g} % of the images" if share != 1 else "")
    about = f"<p>{shown(settings['about'])}</p>" if settings.get("about") else ""
    charts = f'<div class="charts">{"".join(charts)}</div>'
    facts = "".join(itertools.starmap(made_by, runs))
    return f"<h3>{shown(said)}</h3>{warning(*runs[0])}{about}{table(rows, 'Last epoch, test images')}{charts}{facts}"


def made_by(file, record):
    """What a number needs to be made again: a list, as commands are too long for a table."""
    run = {key: record[key] for key in ("seed", "steps", "seconds", "precision") if record.get(key) is not None}
    facts = {"command": record.get("command"), "commit": record.get("commit"), "run": run, "file": file}
    facts |= {key: record.get(key) for key in ("hardware", "versions")}
    return f"<dl>{''.join(f'<dt>{key}</dt><dd>{shown(value)}</dd>' for key, value in facts.items() if value)}</dl>"


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
td.long{min-width:16rem;overflow-wrap:anywhere}dt{color:#5b6470}dd{margin:0;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem;font-size:.8rem;margin:.8rem 0;max-width:60rem}
.number{text-align:right;white-space:nowrap}.wide{overflow-x:auto}.wide svg{min-width:44rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.2rem}
figure{margin:0;break-inside:avoid}figure svg{display:block;width:100%;height:auto}
@media print{
@page{margin:14mm}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}.box{overflow:visible}
table{font-size:7.5pt}th,td,td.long{min-width:0;padding:.15rem .3rem}
tr,.warning,dl{break-inside:avoid}dl{font-size:8pt}.wide svg{min-width:0}
h2,h3,caption{break-after:avoid}.charts{grid-template-columns:1fr 1fr}
}
"""


def page(results):
    """The whole report as HTML text."""
    whole = [record for _, record in results.runs if record.get("limit") is None]
    notes = "".join(f"<p>{shown(file)}: {shown(note)}</p>" for file, note in results.notes)
    sections = {
        "Against the paper": results.runs and against_paper(whole),
        "Data scale": results.runs and data_scale(whole),
        "Similarity of layers": results.maps and similarity(results.maps),
        "Training": results.runs and notes + training(results.runs),
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
    return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in facts if n) + "."


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="JSON files of runs and heat maps")
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
