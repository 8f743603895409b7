"""Finished runs as one HTML page, and as pictures.

    python tools/report.py runs/ --out report.html      # every result below; for screens, phones and paper
    python tools/report.py scale --along steps          # results/scale.svg and results/scale.json
    python tools/report.py curves results/quickstart.json --out docs/quickstart.svg

Reads results of train.py (a run's result.json, or several under "runs"), and passes over other files, such as
benchmarks and detectors. The paper's numbers stand beside ours without being named. Accuracies are those of
the last epoch: mean and sample standard deviation over seeds.

`scale` is the paper's Figure 1 on shares of CIFAR-100: how far vanilla KD is behind DKD and DIST. It reads
runs of recipes/study_fraction_*.json with any data.fraction. A line has runs of equal epochs, as in the
paper, or with --along steps of equal steps: data.fraction=0.25 epochs=960 beside 240 epochs of all images.

Results may come from strangers: their text is escaped, and the page forbids scripts and all addresses.
"""

import argparse
import base64
import collections
import html
import json
import statistics
import sys
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # so that the tool runs from any folder

import figures  # noqa: E402
import paper  # noqa: E402

import recipe  # noqa: E402
import rundir  # noqa: E402

WANTED = "a run's result (students, recipe), or several under 'runs'"
CURVES = (  # part of a record, x, y, title of its chart. "loss" would compare sums of different losses.
    ("accuracy", "epoch", "top1", "top-1, %"),
    ("curves", "step", "hard", "label loss"),
    ("curves", "step", "soft", "distillation loss"),
    ("curves", "step", "gradient_ratio", "gradient of label / distillation loss"),
)


# ---------------------------------------------------------------- reading


def read(paths):
    """[(file, record)] of files, and of folders: every result.json below, else their JSON files.

    Raises RecipeError for a result that is not as train.py wrote it, and where there is none.
    """
    runs, seen, files = [], set(), []
    for path in map(Path, paths):
        below = sorted(path.rglob("result.json")) or sorted(path.glob("*.json"))
        files += below if path.is_dir() else [path]
    for path in files:
        text = json.dumps(recipe.read_json(path, paper.MAX_BYTES), ensure_ascii=False)
        tree = json.loads(text.encode(errors="replace"))  # without halves of surrogate pairs
        try:
            is_result = isinstance(tree, dict) and (
                {"students", "recipe"} <= tree.keys() or isinstance(tree.get("runs"), list)
            )
            if not is_result or "detector" in tree.get("recipe", ()):  # tools/paper.py 11 has its numbers
                continue
            for record in paper.records_of(tree):
                key = json.dumps(check_run(record), sort_keys=True)
                if key not in seen:  # the same run may lie in runs/ and in results/
                    runs.append((path, {"note": tree.get("note")} | record))
                seen.add(key)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise recipe.RecipeError(f"{path}: expected {WANTED}; {type(error).__name__}: {error}") from None
    if not runs:
        raise recipe.RecipeError(f"{', '.join(map(str, paths))}: expected {WANTED}, found none")
    return runs


def finished(runs):
    """The records of runs that were no trials."""
    return [record for _, record in runs if record.get("limit") is None]


def check_run(record):
    """The record, if it has all that the page reads; without options that recipes no longer have."""
    tree, students = record["recipe"], record["recipe"]["students"]
    recipe.drop_removed(tree)
    for result, student in zip(record["students"], students, strict=True):
        paper.experiment(tree, student)
        _ = result["name"], student["model"]
    scores = [result | result["last"] for result in record["students"]]
    if record.get("teacher") or any(student["soft"] for student in students):
        scores.append(record["teacher"])
    numbers = [score[key] for score in scores for key in ("top1", "n", "parameters")]
    for value in (record["seed"], tree["epochs"], tree["data"].get("fraction", 1.0), *numbers):
        number(value)
    for part, x, y, _ in CURVES:
        curves_of([record], part, x, y)
    return record


def number(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, found {json.dumps(value)[:60]}")
    return value


def curves_of(records, part, x, y):
    """{student: [a curve {x: y} of each record]}; absent values (null) and absent curves are left out."""
    curves = collections.defaultdict(list)
    for record in records:
        for name, columns in (record.get(part) or {}).items():
            pairs = zip(columns[x], columns[y], strict=True) if y in columns else ()
            if curve := {number(a): number(b) for a, b in pairs if b is not None}:
                curves[name].append(curve)
    return curves


# ---------------------------------------------------------------- the data-scale study


def scale_points(students, along="epochs"):
    """Lead of dkd and dist over kd, for each share of the images: mean and spread over the seeds of both.

    [{"augmentation", "epochs", "fraction", "method", "mean", "spread", "gaps": {seed: gap}, "teacher"}]
    of students (see paper.trained). along "epochs" or "steps": what the runs of a line have in common.
    """
    top1, teachers = collections.defaultdict(dict), collections.defaultdict(set)
    for augmentation in ("weak", "strong"):
        study = paper.load(f"study_fraction_{augmentation}")
        wanted = {s["name"]: paper.experiment(study, s) for s in study["students"] if s["soft"]}
        for done, record, result in students:
            method = done["student"].get("soft") and done["student"]["soft"]["loss"]
            if method not in wanted:
                continue
            fraction = done["data"]["fraction"]
            same_share = wanted[method] | {"data": wanted[method]["data"] | {"fraction": fraction}}
            reduced = paper.reduction(on_all_images(done) if along == "steps" else done, same_share)
            if reduced is not None:
                line = "steps of " * (along == "steps") + (reduced or f"{study['epochs']} epochs")
                key = augmentation, line, fraction, method
                top1[key].setdefault(record["seed"], result["last"]["top1"])
                teachers[key].add(record["teacher"]["top1"])
    points = []
    for (*group, method), scores in sorted(top1.items()):
        kd = top1.get((*group, "kd"), {})
        gaps = {seed: round(value - kd[seed], 4) for seed, value in sorted(scores.items()) if seed in kd}
        if gaps and method != "kd":
            point = dict(zip(("augmentation", "epochs", "fraction"), group, strict=True), method=method)
            spread = statistics.stdev(gaps.values()) if len(gaps) > 1 else None
            point |= {"mean": statistics.fmean(gaps.values()), "spread": spread, "gaps": gaps}
            points.append(point | {"teacher": sorted(teachers[*group, method])})
    return points


def on_all_images(experiment):
    """The experiment with the epochs, and milestones, in which all images make as many steps as its share."""
    schedule, fraction = dict(experiment["schedule"]), experiment["data"]["fraction"]
    if "milestones" in schedule:
        schedule["milestones"] = [round(m * fraction) for m in schedule["milestones"]]
    return experiment | {"epochs": round(experiment["epochs"] * fraction), "schedule": schedule}


def figure_1():
    """The paper's bars: [{"dataset", "method", "mean"}]."""
    cells = [cell for cell in paper.paper()["cells"] if cell["table"] == "fig1"]
    return [{"dataset": c["dataset"], "method": c["method"], "mean": c["value"]} for c in cells]


# ---------------------------------------------------------------- parts of the page

NUMBER = r"[-+]?[\d.,]*(?: ± [\d.]+)?|not run"


def table(rows, columns, caption):
    """Columns of dictionaries as an HTML table, without the empty ones; numbers are right-aligned."""
    texts = [[str(row.get(column, "")) for column in columns] for row in rows]
    frame = pd.DataFrame(texts, columns=columns).loc[:, lambda frame: (frame != "").any()]
    styles = {}
    for name, column in frame.items():
        if column.str.fullmatch(NUMBER).all():
            styles[name] = [{"selector": "", "props": "text-align:right;white-space:nowrap"}]
        elif column.str.len().max() > 40:
            styles[name] = [{"selector": "", "props": "min-width:15rem"}]
    styler = Styler(frame, cell_ids=False).hide(axis="index").set_table_styles(styles)
    styler.format(escape="html").format_index(escape="html", axis=1)
    label = f'tabindex="0" role="region" aria-label="{escaped(caption)}"'
    return f'<p class="caption">{escaped(caption)}</p><div class="box" {label}>{styler.to_html()}</div>'


def escaped(value):
    """A value of a results file as HTML; lists and objects as text."""
    if isinstance(value, dict):
        return ", ".join(f"{escaped(key)} {escaped(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(escaped, value))
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def picture(figure, title):
    """A figure in the page: as an image, so that not even a hostile SVG could run or load anything."""
    data = base64.b64encode(figures.svg(figure, title).encode()).decode()
    return f'<img alt="{escaped(title)}" src="data:image/svg+xml;base64,{data}">'


def against_paper(students):
    """Every table of the paper for which there is a run, whole: what has not been run is marked."""
    columns = ["student", "teacher", "method", "epochs", "paper", "ours", "±", "seeds", "difference"]
    columns += ["our teacher", "reduced", "measure", "label loss", "lr", "weight_decay"]
    tables = paper.tables_with_numbers(students)
    if not tables:
        return ""
    parts = [table(rows, columns, f"Table {name} of the paper") for name, rows in tables.items()]
    hint = "Commands, and what is disputed about the cells: <code>python tools/paper.py all</code>."
    return f"<h2>Against the paper</h2>{''.join(parts)}<p>{hint}</p>"


def experiments(runs):
    """[[(file, record)]]: runs that differ in their seed only are one experiment."""
    groups = collections.defaultdict(list)
    for file, record in runs:
        settings = rundir.consequential(record["recipe"]) | {"seed": None}
        groups[json.dumps([settings, record.get("limit")], sort_keys=True)].append((file, record))
    return list(groups.values())


def accuracies(groups):
    """The table of all students with what they gained over labels alone, and of their teachers."""
    rows = []
    for group in groups:
        run, (_, first), records = heading_of(*group[0]), group[0], [record for _, record in group]
        settings = first["recipe"]["students"]
        top1 = pd.DataFrame([[result["last"]["top1"] for result in r["students"]] for r in records])
        alone = next((i for i, student in enumerate(settings) if not student["soft"]), None)
        shared = {"run": run, "seeds": len({record["seed"] for record in records})}
        for i, (result, student) in enumerate(zip(first["students"], settings, strict=True)):
            row = shared | {"student": result["name"], "top-1, %": with_spread(top1[i])}
            row |= {"model": student["model"], "parameters": result["parameters"], "n": result["last"]["n"]}
            row["loss"] = student["soft"]["loss"] if student["soft"] else "labels alone"
            if student["soft"] and alone is not None:
                row["gain"] = with_spread(top1[i] - top1[alone], "+")
            rows.append(row)
        if any(student["soft"] for student in settings):
            teacher = first["teacher"]
            row = {"run": run, "student": "(teacher)", "model": paper.teacher_of(first["recipe"]["teacher"])}
            scores = pd.Series([record["teacher"]["top1"] for record in records]).drop_duplicates()
            row |= {"top-1, %": with_spread(scores), "seeds": len(scores)}
            row |= {"parameters": teacher["parameters"], "n": teacher["n"]}
            rows.append(row)
    columns = ["run", "student", "top-1, %", "gain", "seeds", "n", "loss", "model", "parameters"]
    caption = "Last epoch: mean ± sample standard deviation over seeds; n test images."
    return table(rows, columns, f"{caption} Gain: points above the student with labels alone, seed by seed.")


def with_spread(values, sign=""):
    """Mean and sample standard deviation of a Series as text."""
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.2f}{spread}"


def experiment(runs):
    """The part of the page for runs [(file, record)] of one recipe with different seeds."""
    head = f"<h3>{escaped(heading_of(*runs[0]))}</h3><p>{escaped(runs[0][1]['recipe'].get('about', ''))}</p>"
    pictures = "".join(picture(figure, title) for figure, title in charts([record for _, record in runs]))
    return f'{head}<div class="charts">{pictures}</div>{made_by(runs)}'


def charts(records):
    """(figure, title): curves with several points, losses of one kind in one chart; else last accuracies."""
    settings = {student["name"]: student for student in records[0]["recipe"]["students"]}
    teacher = records[0]["teacher"]["top1"] if records[0].get("teacher") else None
    for part, x, y, title in CURVES:
        kinds = collections.defaultdict(dict)
        for name, curves in curves_of(records, part, x, y).items():
            term = settings.get(name, {}).get(y)
            if max(map(len, curves)) > 1:
                kinds[f"{title}: {term['loss']}" if term else title][name] = curves
        for kind, curves in kinds.items():
            yield figures.chart(kind, curves, x, teacher=teacher if y == "top1" else None), kind
        if y == "top1" and not kinds and len(settings) > 1:
            names = [result["name"] for result in records[0]["students"]]
            last = ([result["last"]["top1"] for result in record["students"]] for record in records)
            scores = dict(zip(names, zip(*last, strict=True), strict=True))
            yield figures.dots(scores | ({} if teacher is None else {"teacher": [teacher]}), title), title


def made_by(runs):
    """What is needed to make the numbers of runs again, once; a list: commands are too long for a table."""
    keys = ("note", "command", "commit", "seed", "steps", "seconds", "precision", "hardware", "versions")
    facts = {"file": [file for file, _ in runs]}
    facts |= {key: [record[key] for _, record in runs if record.get(key) is not None] for key in keys}
    texts = {key: "; ".join(dict.fromkeys(map(escaped, values))) for key, values in facts.items()}
    lines = [f"<dt>{key}</dt><dd>{text}</dd>" for key, text in texts.items() if text]
    return f"<dl>{''.join(lines)}</dl>"


def heading_of(file, record):
    """Name of a run's folder, or of a file of several runs; length, and what makes it less than a run."""
    folder = file.absolute().parent
    if folder.name.startswith("seed"):  # of a recipe with several runs
        folder = folder.parent
    name = folder.name if file.name == "result.json" else file.stem
    length = f"{record['recipe']['epochs']:g} epochs"
    if record.get("limit") is not None:
        length = f"a trial of {record['limit']} steps, which says nothing about accuracy"
    share = record["recipe"]["data"].get("fraction", 1.0)
    return f"{name}: {length}" + f", {100 * share:g} % of the images" * (share != 1)


# ---------------------------------------------------------------- the page

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;color:#1c2128;font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin:2.2rem 0 .5rem;border-bottom:1px solid #d5d9df}
h3{margin:1.6rem 0 .3rem}h1,h2,h3,p,dd{overflow-wrap:anywhere}p{max-width:46rem;margin:.5rem 0}
.caption,dt{color:#5b6470}.box{overflow-x:auto;margin:.3rem 0 1rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid #d5d9df;max-width:28rem}
td:first-child{overflow-wrap:anywhere;min-width:8.5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 .8rem;font-size:.8rem;max-width:60rem}
dd{margin:0}img{display:block;width:100%;height:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.2rem}
@media (max-width:30rem){th,td{padding:.25rem}td:first-child{min-width:6.5rem}}
@media print{
@page{margin:14mm}
body{font-size:10pt;max-width:none;padding:0}.box{overflow:visible}
table{font-size:7.5pt}th,td{min-width:0!important;padding:.15rem .3rem}td{overflow-wrap:anywhere}
tr,dl,img{break-inside:avoid}h2,h3,.caption{break-after:avoid}.charts{grid-template-columns:1fr 1fr}
}
"""


def page(runs):
    """The whole report as HTML text."""
    groups = experiments(runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Distillation results</title><style>{STYLE}</style></head><body>"
        f"<h1>Distillation results</h1><p>{count(runs)}</p><h2>Accuracy</h2>{accuracies(groups)}"
        f"{against_paper(paper.trained(finished(runs)))}"
        f"<h2>Training</h2>{''.join(map(experiment, groups))}</body></html>\n"
    )


def count(runs):
    complete = len(finished(runs))
    return f"Finished runs: {complete}; trials: {len(runs) - complete}."


# ---------------------------------------------------------------- command line


def write_page(runs, args):
    """All results as one HTML page; this is what happens without a COMMAND."""
    args.out.write_text(page(runs), encoding="utf-8")
    print(f"{args.out}: {count(runs)}")


def write_scale(runs, args):
    """The data-scale figure, and its points beside it as JSON."""
    points = scale_points(paper.trained(finished(runs)), args.along)
    if not points:
        raise recipe.RecipeError("no finished run of recipes/study_fraction_*.json with kd in it")
    figure = figures.scale_figure(points, figure_1())
    args.out.write_text(figures.svg(figure, figures.SCALE_TITLE), encoding="utf-8")
    text = json.dumps({"points": points, "figure_1": figure_1()}, indent=2)
    args.out.with_suffix(".json").write_text(text + "\n")


def write_curves(runs, args):
    """Accuracies of students over the epochs with their teacher's, from the lowest of the second half up."""
    taught = [record for record in finished(runs) if record.get("teacher")]
    curves = curves_of(taught or finished(runs), "accuracy", "epoch", "top1")  # not the teacher's own run
    every = [list(curve.values()) for seeds in curves.values() for curve in seeds]
    if max(map(len, every), default=0) < 2:
        raise recipe.RecipeError("no run has accuracies of several epochs: set evaluate_every of its recipe")
    teachers = {record["teacher"]["top1"] for record in taught}
    seeds = max(map(len, curves.values()))
    label = "epoch" + f" (mean and standard deviation of {seeds} seeds)" * (seeds > 1)
    teacher = teachers.pop() if len(teachers) == 1 else None
    lowest = min(min(curve[len(curve) // 2 :]) for curve in every)
    figure = figures.chart("top-1, %", curves, label, (7, 3.2), teacher, bottom=lowest - 1)
    args.out.write_text(figures.svg(figure, f"top-1, %, by {label}"), encoding="utf-8")


COMMANDS = {
    "page": (write_page, Path("report.html")),
    "scale": (write_scale, ROOT / "results" / "scale.svg"),
    "curves": (write_curves, Path("curves.svg")),
}


def main(arguments=None):
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    function, out = COMMANDS[arguments.pop(0) if arguments and arguments[0] in COMMANDS else "page"]
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    add = parser.add_argument
    add("results", nargs="*", default=[ROOT / "results"], help="JSON files, or folders (default: results)")
    add("--out", type=Path, default=out, metavar="FILE", help="default: report.html, scale.svg, curves.svg")
    along = "of scale: what the runs of a line have in common (default: epochs)"
    add("--along", choices=("epochs", "steps"), default="epochs", help=along)
    args = parser.parse_args(arguments)
    try:
        function(read(args.results), args)
    except recipe.RecipeError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
