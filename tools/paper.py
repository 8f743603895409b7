"""The paper's tables: the number of every cell, ours beside it, and the command that makes it.

    python tools/paper.py 3             # Table 3 as Markdown; 1a, 1b, 2 to 11, or all
    python tools/paper.py 4c            # Table 4 at the scale of CIFAR-100: study_ablation_cifar.json
    python tools/paper.py --docs        # the tables with our numbers, between two markers in docs/results.md

A cell of results/paper.json is a recipe plus overrides. Cells that are the same training have the same
folder, so their commands can be given in any order: --resume finishes a run or leaves it alone. Our number is
the top-1 of the last epoch: mean and sample standard deviation over the seeds of all records with the cell's
settings. Records with these settings and fewer epochs stand under "reduced"; they are no numbers of the
paper. "disputed" names the disagreements between the paper, its code and its sources about the cell.
"""

import argparse
import dataclasses
import functools
import json
import shlex
import statistics
import sys
import typing
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the tool runs from any folder

import recipe  # noqa: E402

MAX_BYTES = 2**26  # of a results file
STUDY = "4c"
DETECTION = "11"  # its networks are detectors: recipes of detect.py, average precision instead of top-1
TABLES = ("1a", "1b", *map(str, range(2, 11)), DETECTION)
# How a cell of Table 11 names its backbone: the student of the recipe.
BACKBONES = {"prev. 77.1": "tv", "prev. 80.4": "rsb", "ours 83.1": "kd"}
BACKBONES |= {"prev. 83.0": "fcmae", "prev. 83.9": "fcmae_in22k", "ours 85.0": "kd"}
ACCURACIES = ("result", "reference", "not_reported")  # kinds of cells: the accuracy of one network
LABEL_LOSSES = {  # the paper's names
    None: {},
    "none": {"hard.weight": 0},
    "ce": {"hard.loss": "cross_entropy"},
    "bce": {"hard.loss": "binary_cross_entropy"},
}
TEST_SETS = {
    "imagenet-real": "real",
    "imagenet-v2": "v2",
}  # evaluate.py's names
# Keys of a recipe that two runs of one experiment may differ in: where the same images lie, ...
ORIGIN = {"source", "train_split", "test_split", "image", "label", "streaming", "shuffle_buffer"}
# ... and what does not change an accuracy (`resident`: other draws from the same distribution).
HARMLESS = {"name", "paper", "max_broken", "grad_checkpointing", "resident"}
# Values that runs had before a key was part of recipes, where the key has no default.
BEFORE = {recipe.Data: {"repeats": 1, "random_erasing": 0.0}, recipe.Student: {"ema": None}}
DOCS = ROOT / "docs" / "results.md"


class Training(typing.NamedTuple):
    """The run that makes a cell."""

    recipe_name: str
    student: str
    changes: dict  # {path in the recipe: value}, only what differs from the file
    alone: bool  # the recipe trains this student only
    script: str = "train.py"

    @property
    def overrides(self):
        return tuple(f"{path}={value}" for path, value in self.changes.items())

    @property
    def folder(self):
        parts = ["runs/" + self.recipe_name]
        if not self.alone:
            parts.append(self.student)
        for path, value in self.changes.items():
            parts.append(f"{path.removeprefix(f'students.{self.student}.')}-{value}")
        return ".".join(parts)

    @property
    def command(self):
        words = ["accelerate", "launch", self.script, f"recipes/{self.recipe_name}.json"]
        if self.script == "detect.py":
            words += ["--data", "COCO"]
        if not self.alone:
            words += ["--students", self.student]
        if self.changes:
            words += ["--set", *self.overrides]
        if not self.alone or self.changes:  # else the folder is train.py's default
            words += ["--out", self.folder]
        return shlex.join([*words, "--resume"])

    @property
    def settings(self):
        """(recipe, student in it) as JSON, with the changes."""
        tree = load(self.recipe_name, self.overrides)
        return tree, next(student for student in tree["students"] if student["name"] == self.student)


class Numbers(typing.NamedTuple):
    """What was measured for a cell: top-1 (or average precision) by seed, and the top-1 of the teachers."""

    scores: dict
    teachers: list

    @property
    def mean(self):
        return statistics.fmean(self.scores.values())

    @property
    def spread(self):
        return f"{statistics.stdev(self.scores.values()):.2f}" if len(self.scores) > 1 else ""


@functools.cache
def paper():
    return json.loads((ROOT / "results" / "paper.json").read_text())


@functools.cache
def load(name, overrides=()):
    """A recipe as JSON, with overrides; recipes of detect.py are another format and have none."""
    path = ROOT / "recipes" / f"{name}.json"
    if name.startswith("coco_"):
        return recipe.read_json(path)
    return json.loads(recipe.dump(recipe.load(path, overrides)))


def cells(table=None):
    """The cells of a table of the paper, of the study 4c, or of all the paper's tables."""
    if table == STUDY:
        return study()
    return [cell for cell in paper()["cells"] if cell["table"] in (TABLES if table is None else (table,))]


def study():
    """The first six cells of Table 4, on CIFAR-100; `elsewhere` is the paper's number on ImageNet."""
    shared = dict(table=STUDY, kind="result", recipe="study_ablation_cifar", overrides={})
    shared |= dict(student="cifar_resnet20", teacher="cifar_resnet56", dataset="cifar-100", metric="top1")
    rows = []
    for cell in cells("4"):
        _, epochs, hard, soft = cell["id"].split(".")
        if epochs == "300":
            name = f"{hard}_{soft}"
            row = {"id": f"4c.{name}", "method": name, "hard_label_loss": hard, "elsewhere": cell["value"]}
            rows.append(row | shared)
    return rows


# ---------------------------------------------------------------- from a cell to a command


def training(cell):
    """The Training of a cell; None where no recipe trains its network: it is quoted, derived or a setting."""
    if cell["table"] == DETECTION:
        backbone = BACKBONES.get(cell["overrides"].get("backbone_checkpoint"))
        return backbone and Training(cell["recipe"], backbone, {}, False, "detect.py")
    if cell["kind"] not in ACCURACIES or not (ROOT / f"recipes/{cell.get('recipe')}.json").exists():
        return None
    settings, name = load(cell["recipe"]), cell.get("method", "scratch")
    student = next(student for student in settings["students"] if student["name"] == name)
    hard = {f"hard.{key}": value for key, value in student["hard"].items()}
    present = student | hard | {"epochs": settings["epochs"]}
    wanted = {k: v for k, v in cell["overrides"].items() if k not in ("method", "hard_label_loss")}
    wanted |= LABEL_LOSSES[cell["overrides"].get("hard_label_loss")]
    changes = {}
    for key, value in wanted.items():
        if value != present[key]:
            changes[key if key == "epochs" else f"students.{name}.{key}"] = value
    return Training(cell["recipe"], name, changes, len(settings["students"]) == 1)


def command(cell):
    """What to type for a cell; "" where there is nothing to run."""
    run = training(cell)
    if run and cell["dataset"] in TEST_SETS:
        return f"{run.command} && {evaluation(run.folder, cell)}"
    if run:
        return run.command
    tag = cell.get("timm") or (cell["metric"] == "teacher_top1" and cell["teacher"])
    if cell["table"] == DETECTION:  # the top-1 of a backbone, before the AP of its detector
        name = cell["id"].removesuffix("in1k") + "box"
        _, student = training(next(other for other in cells(DETECTION) if other["id"] == name)).settings
        tag = student["model"] if student["weights"] == "timm" else student["weights"]
    return evaluation(tag, cell) if tag else ""


def evaluation(checkpoint, cell):
    test_set = TEST_SETS.get(cell["dataset"], "imagenet")
    return f"python evaluate.py {checkpoint} --on {test_set}" + (" --v2 DIR" if test_set == "v2" else "")


# ---------------------------------------------------------------- from a cell to our number


def read_records(folder):
    """The results of all complete runs below a folder; RecipeError for a file that is not JSON."""
    for path in sorted(folder.rglob("*.json")):
        for record in records_of(recipe.read_json(path, MAX_BYTES)):
            if isinstance(record, dict) and isinstance(record.get("recipe"), dict):
                recipe.drop_removed(record["recipe"])
                if record.get("limit") is None:
                    yield record


def records_of(tree):
    """What a results file holds: one result.json of train.py, or several of them under "runs"."""
    runs = tree.get("runs") if isinstance(tree, dict) else None
    return runs if isinstance(runs, list) else [tree]  # in a recipe, "runs" is a number


def trained(records):
    """[(experiment, record, result)] of all students of records."""
    return [
        (experiment(record["recipe"], student), record, result)
        for record in records
        for student, result in zip(record["recipe"]["students"], record["students"], strict=True)
    ]


def experiment(tree, student):
    """All that decides a student's accuracy except the seed, from a recipe as JSON."""
    shared = {key: tree[key] for key in ("epochs", "batch_size", "batch_size_per_process", "schedule")}
    if "detector" in tree:  # its backbone is the last names of a folder
        weights = Path(student["weights"] or "").parts[-3:]
        shared |= {"detector": tree["detector"], "data": significant(tree["data"])}
        return shared | {"student": significant(student | {"weights": weights})}
    return shared | {
        "data": significant(defaults(recipe.Data) | tree["data"]),
        "student": significant(defaults(recipe.Student) | student),
        "teacher": teacher_of(tree["teacher"]) if student["soft"] else None,
    }


@functools.cache
def defaults(kind):
    """The keys that a section of a recipe may lack."""
    fields = [field for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING]
    return {field.name: field.default for field in fields} | BEFORE[kind]


def significant(section):
    """A section of a recipe as JSON, without the keys that do not matter."""
    return {key: value for key, value in section.items() if key not in ORIGIN | HARMLESS}


def teacher_of(teacher):
    """The name of a teacher's network; its weights may come from a file or from a recipe of this project."""
    path = ROOT / "recipes" / Path(teacher["recipe"] or "").name
    if path.is_file():
        return load(path.stem)["students"][0]["model"]
    return teacher["model"] or teacher["recipe"]


def reduction(done, wanted):
    """Compare two experiments: "" if equal, "30 of 240 epochs" if equal but for fewer epochs, else None."""
    if done == wanted:
        return ""
    if done["epochs"] >= wanted["epochs"] or without_epochs(done) != without_epochs(wanted):
        return None
    schedule, share = done["schedule"], done["epochs"] / wanted["epochs"]
    milestones = schedule.get("milestones", ())
    scaled = [milestone * share for milestone in wanted["schedule"].get("milestones", ())]
    reduced = f"{done['epochs']} of {wanted['epochs']} epochs"
    alike = schedule["kind"] == wanted["schedule"]["kind"] and len(milestones) == len(scaled)
    if alike and all(abs(a - b) <= 1 for a, b in zip(milestones, scaled, strict=True)):  # rounded somehow
        return reduced
    return f"{reduced}, {schedule['kind']} schedule"


def without_epochs(experiment):
    """An experiment without the settings that scale with its epochs."""
    student = dict(experiment["student"])
    if student.get("soft"):
        student["soft"] = student["soft"] | {"warmup_epochs": None}
    return experiment | {"epochs": None, "schedule": None, "student": student}


def measured(cell, students):
    """{reduction: Numbers} of the students (see `trained`) of a cell's experiment; a seed counts once."""
    if cell["kind"] == "delta":
        return gaps(cell, students)
    numbers, run = {}, training(cell)
    if run is None:
        return numbers
    wanted = experiment(*run.settings)
    for done, record, result in students:
        reduced, score = reduction(done, wanted), score_of(cell, record, result)
        if reduced is None or score is None:
            continue
        group = numbers.setdefault(reduced, Numbers({}, []))
        if record["seed"] not in group.scores:
            group.scores[record["seed"]] = score
            if done.get("teacher") and record.get("teacher"):
                group.teachers.append(record["teacher"]["top1"])
    return numbers


def score_of(cell, record, result):
    """What a student reached in training, or by evaluate.py, which is written down under "evaluations"."""
    if cell["dataset"] not in TEST_SETS:
        return result["last"].get(cell["metric"] if cell["table"] == DETECTION else "top1")
    wanted = result["name"], TEST_SETS[cell["dataset"]]
    evaluations = record.get("evaluations", [])
    return next((e["top1"] for e in evaluations if (e["student"], e["data"]) == wanted), None)


def gaps(cell, students):
    """{reduction: kd minus the best other method, by their means}, where all methods were run."""
    row = {key: cell[key] for key in ("student", "teacher", "strategy")}
    methods = {}
    for other in cells(cell["table"]):
        if other.get("method", "scratch") != "scratch" and row.items() <= other.items():
            methods[other["method"]] = measured(other, students)
    kd, others = methods.pop("kd", {}), methods.values()
    shared = [reduced for reduced in kd if all(reduced in numbers for numbers in others)]
    best = {reduced: max(numbers[reduced].mean for numbers in others) for reduced in shared}
    return {reduced: Numbers({None: kd[reduced].mean - best[reduced]}, []) for reduced in shared}


# ---------------------------------------------------------------- tables


def row(cell, students):
    """One line of a table, as text and numbers; students: see `trained`."""
    run, numbers, shown = training(cell), measured(cell, students), cell
    if run:
        tree, student = run.settings
        shown = cell | {"epochs": tree["epochs"]} | {key: student[key] for key in ("lr", "weight_decay")}
        if "method" in cell:
            shown["method"] = run.student
    keys = ("student", "teacher", "method", "epochs", "lr", "weight_decay")
    ours = numbers.pop("", None)
    can_be_run = command(cell) or cell.get("metric") == "kd_minus_best_other"
    return {
        "cell": cell["id"],
        **{key: shown.get(key, "") for key in keys},
        "label loss": cell["overrides"].get("hard_label_loss", cell.get("hard_label_loss", "")),
        "measure": cell["dataset"] if cell["kind"] in ACCURACIES else cell["metric"],
        "paper": printed(cell),
        "ours": f"{ours.mean:.2f}" if ours else "not run" if can_be_run else "",
        "±": ours.spread if ours else "",
        "seeds": len(ours.scores) if ours and cell["kind"] != "delta" else "",
        "difference": f"{ours.mean - cell['value']:+.2f}" if ours and "value" in cell else "",
        "our teacher": f"{statistics.fmean(ours.teachers):.2f}" if ours and ours.teachers else "",
        "reduced": "; ".join(describe(*item) for item in sorted(numbers.items())),
        "disputed": " ".join(dispute["id"] for dispute in disputes(cell["table"], cell)),
        "command": command(cell),
    }


def printed(cell):
    """The paper's number."""
    if "elsewhere" in cell:
        return f"{cell['elsewhere']:.2f} on ImageNet"
    value, digits = cell.get("value", "-"), 0 if cell["kind"] == "hours" else 2
    return f"{value:.{digits}f}" if isinstance(value, float) and cell["kind"] != "setting" else value


def describe(reduced, numbers):
    """'31.67 (3 of 240 epochs, 1 seed, teacher 33.77)'."""
    facts, seeds = [reduced], len(numbers.scores)
    if None not in numbers.scores:
        facts.append(f"{seeds} seed{'s' * (seeds > 1)}")
    if numbers.teachers:
        facts.append(f"teacher {statistics.fmean(numbers.teachers):.2f}")
    return f"{numbers.mean:.2f}{numbers.spread and f' ± {numbers.spread}'} ({', '.join(facts)})"


def disputes(table, cell=None):
    """The places where the paper, its code and its sources disagree about a table, or about a cell of it.

    Disputes without "cells", patterns of their names, concern whole tables.
    """
    known = [dispute for dispute in paper()["disagreements"] if table in dispute["tables"]]
    return [d for d in known if not cell or any(fnmatchcase(cell["id"], name) for name in d.get("cells", ()))]


def markdown(rows):
    """Rows as a Markdown table without its empty columns."""
    columns = [name for name in rows[0] if any(r[name] != "" for r in rows)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(r[name]) for name in columns)} |" for r in rows]
    return "\n".join(lines)


def table_text(table, rows):
    """A table as Markdown, with its heading and its disputes."""
    parts = [f"## Table {table}"]
    parts.append(markdown([r | {"command": r["command"] and f"`{r['command']}`"} for r in rows]))
    if disputed := disputes(table):
        scope = "the column names those of a cell; the others touch the whole table"
        parts.append(f"Disputed here, and what was chosen ({scope}):")
        lines = []
        for d in disputed:
            sides = f"the paper: {d['paper']}; against it: {d['other']}; here: {d['resolution']}"
            lines.append(f"- {d['id']} ({d['topic']}): {sides}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def tables_with_numbers(students):
    """{table: rows} of the tables with a number of ours."""
    tables = {name: [row(cell, students) for cell in cells(name)] for name in (*TABLES, STUDY)}
    return {name: rows for name, rows in tables.items() if any(r["seeds"] or r["reduced"] for r in rows)}


def docs_section(students):
    """Every table with a number of ours, without commands, and the names of the tables without one."""
    tables, parts = tables_with_numbers(students), []
    for name, rows in tables.items():
        parts += [f"### Table {name}", markdown([r | {"command": ""} for r in rows])]
    empty = ", ".join(name for name in (*TABLES, STUDY) if name not in tables)
    known = "`python tools/paper.py TABLE` prints any table with its commands and what is disputed."
    return "\n\n".join([*parts, (f"Nothing run yet of Tables {empty}.\n" if empty else "") + known])


def rewrite(path, name, section):
    """Put a section between the markers of a name in a file; RecipeError where they are not in it."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise recipe.RecipeError(f"{path}: expected the lines '{begin}' and '{end}' around the section")
    path.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, known = parser.add_argument, (*TABLES, STUDY, "all")
    add("table", metavar="TABLE", nargs="?", choices=known, help=", ".join(known))
    add("--docs", action="store_true", help="write what was run into docs/results.md instead")
    records = "folder of our records (default: results/)"
    add("--results", type=Path, default=ROOT / "results", metavar="DIR", help=records)
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results {args.results}: no such folder")
    if (args.table is None) != args.docs:
        parser.error("expected a TABLE, or --docs")
    try:
        students = trained(read_records(args.results))
        if args.docs:
            return rewrite(DOCS, "results", docs_section(students))
    except recipe.RecipeError as error:
        parser.error(str(error))
    for name in TABLES if args.table == "all" else [args.table]:
        print(table_text(name, [row(cell, students) for cell in cells(name)]))


if __name__ == "__main__":
    main()
