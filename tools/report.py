"""Finished runs and heat maps as one HTML page, and as pictures.

    python tools/report.py results/*.json --out report.html     # for screens, phones and paper; no network
    python tools/report.py scale --along steps                  # results/scale.svg and results/scale.json
    python tools/report.py curves results/quickstart.json --out docs/quickstart.svg

Reads results of train.py (a run's result.json, or several under "runs") and of tools/cka.py. The other files
of results/ are passed over: benchmarks, and the paper's numbers, which stand beside ours without being named.
Accuracies are those of the last epoch: mean and sample standard deviation over seeds.

`scale` is the paper's Figure 1 on shares of CIFAR-100: how far vanilla KD is behind DKD and DIST. It reads
runs of recipes/study_fraction_*.json with any data.fraction. A line has runs of equal epochs, as in the
paper, or --along steps runs of equal steps: data.fraction=0.25 epochs=960 is then in line with 240 epochs of
all images.

Results may come from strangers: their text is escaped, and the page forbids scripts and all addresses.
"""

import argparse
import base64
import collections
import html
import itertools
import json
import re
import statistics
import sys
import typing
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # so that the tool runs from any folder

import figures  # noqa: E402
import paper  # noqa: E402

import recipe  # noqa: E402

WANTED = "a run's result (students, recipe), several under 'runs', or a heat map of tools/cka.py"
CURVES = (  # part of a record, x, y, title of its chart
    ("accuracy", "epoch", "top1", "Top-1, %"),
    ("curves", "step", "loss", "Loss"),
    ("curves", "step", "hard", "Label loss"),
    ("curves", "step", "soft", "Distillation loss"),
    ("curves", "step", "gradient_ratio", "Gradient norm of the label loss / of the distillation loss"),
)


class Results(typing.NamedTuple):
    runs: list  # of (file, record as train.py wrote it)
    maps: list  # of (file, what tools/cka.py wrote)
    notes: list  # of (file, its "note" about its runs)

    @property
    def complete(self):
        """The records of runs that were no trials."""
        return [record for _, record in self.runs if record.get("limit") is None]


# ---------------------------------------------------------------- reading


def read(paths):
    """Results of files; RecipeError where one cannot be used, or none is a result."""
    results, seen = Results([], [], []), set()
    for path in map(str, paths):
        text = json.dumps(recipe.read_json(path, paper.MAX_BYTES), ensure_ascii=False)
        tree = json.loads(text.encode(errors="replace"))  # without halves of surrogate pairs
        keys = set(tree) if isinstance(tree, dict) else set()
        if "cka" in keys:
            results.maps.append((path, check_map(tree, path)))
        elif {"students", "recipe"} <= keys or isinstance(keys and tree.get("runs"), list):
            for record in paper.records_of(tree):
                key = json.dumps(check_run(record, path), sort_keys=True)
                if key not in seen:  # the same run may lie in runs/ and in results/
                    results.runs.append((path, record))
                seen.add(key)
            if "note" in keys:
                results.notes.append((path, tree["note"]))
        elif not is_from_another_tool(tree):
            found = f"the keys {', '.join(list(tree)[:8]) or '(none)'}" if keys else type(tree).__name__
            raise recipe.RecipeError(f"{path}: expected {WANTED}, found {found}")
    if not results.runs and not results.maps:
        raise recipe.RecipeError(f"{', '.join(map(str, paths))}: expected {WANTED}, found none")
    return results


def is_from_another_tool(tree):
    """Whether it is the paper's numbers, the points of `scale`, or benchmarks with their commit."""
    parts = [tree, *tree.values()] if isinstance(tree, dict) else []
    return any(isinstance(part, dict) and {"cells", "figure_1", "commit"} & set(part) for part in parts)


def check_run(record, path):
    """The record, if it has all that the page reads; without options that recipes no longer have."""
    try:
        recipe.drop_removed(record["recipe"])
        number(record["seed"])
        number(record["recipe"]["epochs"])
        number(record["recipe"]["data"].get("fraction", 1.0))
        for result, student in zip(record["students"], record["recipe"]["students"], strict=True):
            paper.experiment(record["recipe"], student)
            number(result["last"]["top1"])
            _ = result["name"], student["model"]
            if student["soft"]:
                number(record["teacher"]["top1"])
        for part, x, y, _ in CURVES:
            curves_of([record], part, x, y)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wanted = "a result as train.py writes it, and its recipe as resolved"
        raise recipe.RecipeError(f"{path}: expected {wanted}; {type(error).__name__}: {error}") from None
    return record


def check_map(tree, path):
    """The heat map, if its layers and its numbers are those of two models."""
    try:
        models, matrix = [str(name) for name in tree["models"]], tree["cka"]
        known = [number(value) for row in matrix for value in row if value is not None]
        rows, columns = (len(layers) for layers in tree["layers"])
        lengths = [len(row) for row in matrix]
        fits = len(models) == 2 and known and lengths == [columns] * rows
    except (KeyError, TypeError, ValueError) as error:
        wanted = "a heat map as tools/cka.py writes it"
        raise recipe.RecipeError(f"{path}: expected {wanted}; {type(error).__name__}: {error}") from None
    if not fits:
        wanted = "the layers of two models, and a row of cka for each layer of the first"
        raise recipe.RecipeError(f"{path}: expected {wanted}")
    return tree | {"models": models}


def number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, found {json.dumps(value)[:60]}")
    return value


def curves_of(records, part, x, y):
    """{student: [a curve [(x, y)] of each record]}; absent values (null) and absent curves are left out."""
    curves = collections.defaultdict(list)
    for record in records:
        for name, columns in (record.get(part) or {}).items():
            pairs = zip(columns[x], columns[y], strict=True) if y in columns else ()
            if curve := [(number(a), number(b)) for a, b in pairs if b is not None]:
                curves[name].append(curve)
    return curves


# ---------------------------------------------------------------- the data-scale study


def scale_points(records, along="epochs"):
    """Lead of dkd and dist over kd, for each share of the images: mean and spread over the seeds of both.

    [{"augmentation", "epochs", "fraction", "method", "mean", "spread", "gaps": {seed: gap}, "teacher"}]
    of complete runs. along "epochs" or "steps": what the runs of a line have in common.
    """
    top1, teachers = collections.defaultdict(dict), collections.defaultdict(set)
    for augmentation, record in itertools.product(("weak", "strong"), records):
        study = json.loads(recipe.dump(paper.load(f"study_fraction_{augmentation}")))
        wanted = {s["name"]: paper.experiment(study, s) for s in study["students"] if s["soft"]}
        fraction = record["recipe"]["data"].get("fraction", 1.0)
        for student, result in zip(record["recipe"]["students"], record["students"], strict=True):
            method = student["soft"] and student["soft"]["loss"]
            if method not in wanted:
                continue
            done = paper.experiment(record["recipe"], student)
            if along == "steps":
                done = on_all_images(done, fraction)
            data = wanted[method]["data"] | {"fraction": fraction}
            reduced = paper.reduction(done, wanted[method] | {"data": data})
            if reduced is not None:
                line = "steps of " * (along == "steps") + (reduced or f"{study['epochs']} epochs")
                key = augmentation, line, fraction, method
                top1[key].setdefault(record["seed"], result["last"]["top1"])
                teachers[key].add(record["teacher"]["top1"])
    points = []
    for key in sorted(top1):
        *group, method = key
        kd = top1.get((*group, "kd"), {})
        gaps = {seed: round(value - kd[seed], 4) for seed, value in sorted(top1[key].items()) if seed in kd}
        if gaps and method != "kd":
            point = dict(zip(("augmentation", "epochs", "fraction", "method"), key, strict=True))
            spread = statistics.stdev(gaps.values()) if len(gaps) > 1 else None
            point |= {"mean": statistics.fmean(gaps.values()), "spread": spread, "gaps": gaps}
            points.append(point | {"teacher": sorted(teachers[key])})
    return points


def on_all_images(experiment, fraction):
    """The experiment with the epochs, and milestones, in which all images make as many steps as its share."""
    schedule = dict(experiment["schedule"])
    if "milestones" in schedule:
        schedule["milestones"] = [round(m * fraction) for m in schedule["milestones"]]
    return experiment | {"epochs": round(experiment["epochs"] * fraction), "schedule": schedule}


def figure_1():
    """The paper's bars: [{"dataset", "method", "mean"}]."""
    cells = [cell for cell in paper.paper()["cells"] if cell["table"] == "fig1"]
    return [{"dataset": c["dataset"], "method": c["method"], "mean": c["value"]} for c in cells]


# ---------------------------------------------------------------- parts of the page

NUMBER = r"[-+]?[\d.]*(?: ± [\d.]+)?|not run"


def table(rows, caption):
    """Dictionaries with equal keys as an HTML table, without empty columns; numbers are right-aligned."""
    texts = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    frame = pd.DataFrame(texts).loc[:, lambda frame: (frame != "").any()]
    styles = {}
    for name, column in frame.items():
        if column.str.fullmatch(NUMBER).all():
            styles[name] = [{"selector": "", "props": "text-align:right;white-space:nowrap"}]
        elif column.str.len().max() > 40:
            styles[name] = [{"selector": "", "props": "min-width:15rem"}]
    styler = Styler(frame, cell_ids=False).hide(axis="index").set_table_styles(styles)
    styler.format(escape="html").format_index(escape="html", axis=1).set_caption(escaped(caption))
    label = f'tabindex="0" role="region" aria-label="{escaped(caption)}"'
    return f'<div class="box" {label}>{styler.to_html()}</div>'


def escaped(value):
    """A value of a results file as HTML; lists and objects as text."""
    if isinstance(value, dict):
        return ", ".join(f"{escaped(key)} {escaped(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(escaped, value))
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def picture(figure, title, caption="", kind=""):
    """A figure in the page: as an image, so that not even a hostile SVG could run or load anything."""
    data = base64.b64encode(figures.svg(figure, title).encode()).decode()
    image = f'<img alt="{escaped(title)}" src="data:image/svg+xml;base64,{data}">'
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def against_paper(records):
    """Every table of the paper for which there is a run, whole: what has not been run is marked."""
    parts = []
    for name in (*paper.TABLES, paper.STUDY):
        rows = [paper.row(cell, records) for cell in paper.cells(name)]
        if any(row["seeds"] or row["reduced"] for row in rows):
            parts.append(table(list(map(brief, rows)), f"Table {name} of the paper"))
            if disputes := paper.disputes(name):
                items = [f"<li>{escaped(d['topic'])}: {escaped(d['resolution'])}</li>" for d in disputes]
                parts.append(f"<p>Disputed here, and what was chosen:</p><ul>{''.join(items)}</ul>")
    if not parts:
        return "<p>None of these runs has the settings of a cell of the paper.</p>"
    parts.append("<p>The commands of all cells: <code>python tools/paper.py all</code>.</p>")
    return "".join(parts)


def brief(row):
    """A row of paper.py with its numbers near the beginning, for phones."""
    network = " → ".join(filter(None, (row["teacher"], row["student"])))
    first = ("method", "epochs", "paper", "ours", "±", "seeds", "difference", "our teacher", "reduced")
    last = ("measure", "label loss", "lr", "weight_decay", "disputed")
    shown = {"network": network} | {key: row[key] for key in (*first, *last)}
    if row["measure"] == "kd_minus_best_other":
        shown |= {"method": "kd minus best other", "measure": ""}
    return shown


def data_scale(records):
    """The figure for equal epochs and for equal steps, where a line has two shares of the images."""
    pictures = []
    for along in ("epochs", "steps"):
        points = scale_points(records, along)
        lines = collections.Counter((p["augmentation"], p["epochs"], p["method"]) for p in points)
        points = [p for p in points if lines[p["augmentation"], p["epochs"], p["method"]] > 1]
        if points:
            caption = f"Runs of a line have the same number of {along}."
            pictures.append(
                picture(
                    figures.scale_figure(points, figure_1()),
                    figures.scale_title(points),
                    caption,
                    kind="wide",
                )
            )
    none = "<p>No setting was run on several shares of the training images (<code>data.fraction</code>).</p>"
    return "".join(pictures) or none


def similarity(maps):
    """The heat maps, with the mean over the first model's layers of their largest similarity."""
    pictures = []
    for file, result in maps:
        rows = [[value for value in row if value is not None] for row in result["cka"]]
        mean = statistics.fmean(max(row) for row in rows if row)
        first, second = map(escaped, result["models"])
        images, data = (escaped(result.get(key, "unknown")) for key in ("images", "data"))
        caption = f"<b>{first}</b> (up) and <b>{second}</b> (right), images: {images} of {data}. "
        caption += (
            f"CKA of a layer of the first and the most similar one of the second: {mean:.2f} on average."
        )
        pictures.append(
            picture(figures.heat_map(result), figures.map_title(result), caption + made_by(file, result))
        )
    about = (
        "Minibatch linear CKA between all layers, 0 to 1; grey: a layer with equal features of all images."
    )
    return f'<p>{about}</p><div class="charts">{"".join(pictures)}</div>'


def training(results):
    """Accuracies and curves of all runs; those that differ in their seed only are one experiment."""
    groups = collections.defaultdict(list)
    for file, record in results.runs:
        settings = {k: v for k, v in record["recipe"].items() if k not in ("seed", "runs", "about")}
        groups[json.dumps([settings, record.get("limit")], sort_keys=True)].append((file, record))
    notes = [f"<p>{escaped(file)}: {escaped(note)}</p>" for file, note in results.notes]
    return "".join([*notes, *map(experiment, groups.values())])


def experiment(runs):
    """The part of the page for runs [(file, record)] of one recipe with different seeds."""
    (file, first), records = runs[0], [record for _, record in runs]
    settings, rows = first["recipe"], []
    for i, student in enumerate(settings["students"]):
        top1 = [record["students"][i]["last"]["top1"] for record in records]
        spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        loss = student["soft"]["loss"] if student["soft"] else "labels alone"
        row = {"student": first["students"][i]["name"], "model": student["model"], "loss": loss}
        rows.append(row | {"top-1 %": f"{statistics.fmean(top1):.2f}{spread}", "seeds": len(top1)})
    if any(student["soft"] for student in settings["students"]):
        teacher = {"student": "(teacher)", "model": paper.teacher_of(settings["teacher"])}
        rows.append(dict.fromkeys(rows[0]) | teacher | {"top-1 %": f"{first['teacher']['top1']:.2f}"})
    charts = []
    for part, x, y, title in CURVES:
        curves = curves_of(records, part, x, y)
        if any(len(curve) > 1 for seeds in curves.values() for curve in seeds):
            charts.append(picture(figures.chart(title, curves, x), title))
    heading = f"{name_of(file, first)}: {settings['epochs']:g} epochs"
    share = settings["data"].get("fraction", 1.0)
    if share != 1:
        heading += f", {100 * share:g} % of the images"
    parts = [f"<h3>{escaped(heading)}</h3>", warning(file, first)]
    if settings.get("about"):
        parts.append(f"<p>{escaped(settings['about'])}</p>")
    parts.append(table(rows, "Last epoch, test images"))
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    return "".join([*parts, *itertools.starmap(made_by, runs)])


def made_by(file, record):
    """What is needed to make a number again; a list, as commands are too long for a table."""
    keys = ("command", "commit", "seed", "steps", "seconds", "precision", "hardware", "versions")
    facts = {"file": file} | {key: record[key] for key in keys if record.get(key) is not None}
    lines = [f"<dt>{key}</dt><dd>{escaped(value)}</dd>" for key, value in facts.items()]
    return f"<dl>{''.join(lines)}</dl>"


def name_of(file, record):
    """The recipe's name, which only the command tells."""
    match = re.search(r"([\w.-]+)\.json", str(record.get("command")))
    return match[1] if match else Path(file).stem


def warning(file, record):
    """What makes a run less than its recipe, or ""."""
    text, epochs = "", record["recipe"]["epochs"]
    path = ROOT / "recipes" / f"{name_of(file, record)}.json"
    if record.get("limit") is not None:
        text = f"A trial of {record['limit']} steps, which says nothing about accuracy."
    elif path.is_file() and epochs < (whole := recipe.load(path).epochs):
        text = f"A reduced schedule: {epochs:g} epochs where the recipe has {whole:g}."
    return f'<p class="warning">{escaped(text)}</p>' if text else ""


# ---------------------------------------------------------------- the page

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
*{box-sizing:border-box}
html{background:#fff;color:#1c2128;font:16px/1.5 system-ui,sans-serif}
body{margin:0 auto;padding:1rem;max-width:76rem}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin:2.2rem 0 .5rem;border-bottom:1px solid #d5d9df}
h3{margin:1.6rem 0 .3rem}h1,h2,h3,p,li,dd,figcaption{overflow-wrap:anywhere}
p,ul{max-width:46rem;margin:.5rem 0}ul{padding-left:1.2rem}
nav a{margin-right:1rem;display:inline-block;padding:.2rem 0}
figcaption,caption{color:#5b6470;font-size:.85rem;text-align:left}
.warning{border-left:4px solid #d55e00;padding:.2rem .7rem;background:#f5f6f8}
.box{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid #d5d9df;max-width:28rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem;font-size:.8rem;max-width:60rem}
dt{color:#5b6470}dd{margin:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.2rem}
figure{margin:0;break-inside:avoid}figure img{display:block;width:100%;height:auto}
.wide{overflow-x:auto}.wide img{min-width:44rem}
@media print{
@page{margin:14mm}
html{font-size:10pt}body{max-width:none;padding:0}nav{display:none}.box,.wide{overflow:visible}
table{font-size:7.5pt}th,td{min-width:0!important;padding:.15rem .3rem}td{overflow-wrap:anywhere}
tr,.warning,dl{break-inside:avoid}dl{font-size:8pt}.wide img{min-width:0}
h2,h3,caption{break-after:avoid}.charts{grid-template-columns:1fr 1fr}
}
"""


def page(results):
    """The whole report as HTML text."""
    sections = {
        "Against the paper": results.runs and against_paper(results.complete),
        "Data scale": results.runs and data_scale(results.complete),
        "Similarity of layers": results.maps and similarity(results.maps),
        "Training": results.runs and training(results),
    }
    links, body = [], []
    for i, (title, part) in enumerate(sections.items()):
        if part:
            links.append(f'<a href="#s{i}">{title}</a>')
            body.append(f'<section><h2 id="s{i}">{title}</h2>{part}</section>')
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Distillation results</title><style>{STYLE}</style></head><body>"
        f"<h1>Distillation results</h1><p>{count(results)}</p><nav>{''.join(links)}</nav>{''.join(body)}"
        "</body></html>\n"
    )


def count(results):
    trials = len(results.runs) - len(results.complete)
    numbers = [(len(results.complete), "finished run"), (trials, "trial"), (len(results.maps), "heat map")]
    return ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in numbers if n) + "."


# ---------------------------------------------------------------- command line


def write_page(results, args):
    """All results as one HTML page; this is what happens without a COMMAND."""
    args.out.write_text(page(results), encoding="utf-8")
    print(f"{args.out}: {count(results)}")


def write_scale(results, args):
    """The data-scale figure, and its points beside it as JSON."""
    points = scale_points(results.complete, args.along)
    if not points:
        studies = "recipes/study_fraction_weak.json or study_fraction_strong.json"
        raise recipe.RecipeError(f"no finished run of {studies} with kd in it")
    args.out.write_text(
        figures.svg(figures.scale_figure(points, figure_1()), figures.scale_title(points)), encoding="utf-8"
    )
    tree = {"points": points, "figure_1": figure_1()}
    args.out.with_suffix(".json").write_text(json.dumps(tree, indent=2) + "\n")
    for p in points:
        gap = f"{p['mean']:+.2f}" + (f" ± {p['spread']:.2f}" if p["spread"] is not None else "")
        line = f"{p['augmentation']} {p['epochs']} fraction {p['fraction']:g}: {p['method']} - kd = {gap}"
        print(f"{line}, seeds {len(p['gaps'])}")


def write_curves(results, args):
    """Accuracies of students over the epochs with their teacher's, from the lowest of the second half up."""
    taught = [record for record in results.complete if record.get("teacher")]
    curves = curves_of(taught or results.complete, "accuracy", "epoch", "top1")  # not the teacher's own run
    if not any(len(curve) > 1 for seeds in curves.values() for curve in seeds):
        hint = "set evaluate_every of its recipe to less than its epochs"
        raise recipe.RecipeError(f"no run was evaluated after several epochs: {hint}")
    teachers = {record["teacher"]["top1"] for record in taught}
    seeds = max(map(len, curves.values()))
    title = "Top-1 accuracy, %" + f": mean and standard deviation over {seeds} seeds" * (seeds > 1)
    teacher = teachers.pop() if len(teachers) == 1 else None
    late = [curve[len(curve) // 2 :] for seeds in curves.values() for curve in seeds]
    lowest = min(top1 for curve in late for _, top1 in curve)
    figure = figures.chart(title, curves, "epoch", (7, 3.2), teacher, bottom=lowest - 1)
    args.out.write_text(figures.svg(figure, title), encoding="utf-8")


COMMANDS = {
    "page": (write_page, Path("report.html")),
    "scale": (write_scale, ROOT / "results" / "scale.svg"),
    "curves": (write_curves, Path("curves.svg")),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    files = sorted((ROOT / "results").glob("*.json"))
    for name, (function, out) in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        add, what = command.add_argument, "JSON files of runs and heat maps (default: results/*.json)"
        add("results", nargs="*", default=files, metavar="RESULTS", help=what)
        add("--out", type=Path, default=out, metavar="FILE", help=f"default: {out.name}")
    along = "what the runs of a line have in common (default: epochs)"
    commands.choices["scale"].add_argument(
        "--along", choices=("epochs", "steps"), default="epochs", help=along
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["page", *arguments]
    args = parser.parse_args(arguments)
    try:
        args.function(read(args.results), args)
    except recipe.RecipeError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
