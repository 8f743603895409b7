"""The paper's tables: the number of every cell, ours beside it, and the command that makes it.

    python tools/paper.py 3             # Table 3 as Markdown; 1a, 1b, 2 to 11, or all
    python tools/paper.py all --csv     # for a spreadsheet
    python tools/paper.py 4c            # Table 4 at the scale of CIFAR-100: study_ablation_cifar.json
    python tools/paper.py --docs        # the tables with our numbers, between two markers in docs/results.md

A cell of results/paper.json is a recipe plus overrides. Cells that are the same training have the same
folder, so their commands can be given in any order: --resume finishes a run or leaves it alone. Our number is
the top-1 of the last epoch: mean and sample standard deviation over the seeds of all records with the cell's
settings. Records with these settings and fewer epochs stand under "reduced"; they are no numbers of the
paper. "disputed" names the disagreements between the paper, its code and its sources about the cell.
"""

import argparse
import csv
import dataclasses
import fnmatch
import functools
import json
import shlex
import statistics
import sys
import typing
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
LABEL_LOSSES = {"bce": "binary_cross_entropy", "ce": "cross_entropy"}  # the paper's names
TEST_SETS = {
    "imagenet-real": "real",
    "imagenet-v2": "v2",
}  # evaluate.py's names; the trainer evaluates the others
# Keys of a recipe that two runs of one experiment may differ in: where the same images lie, ...
ORIGIN = {"source", "train_split", "test_split", "image", "label", "streaming", "shuffle_buffer"}
# ... and what does not change an accuracy (`resident`: other draws from the same distribution).
HARMLESS = {"name", "paper", "max_broken", "grad_checkpointing", "resident"}
# Values that runs had before a key was part of recipes, where the key has no default.
BEFORE = {recipe.Data: {"repeats": 1, "random_erasing": 0.0}, recipe.Student: {"ema": None}}
DOCS, BEGIN, END = ROOT / "docs" / "results.md", "<!-- results -->", "<!-- /results -->"
HINTS = ("cc", "rkd", "crd", "reviewkd")
TOUCHES = {  # {id of a disagreement: patterns of cells}; disagreements without an entry concern whole tables
    "wd_a2": ["t2.a2.weight_decay", "t3.a2.*", "t4.300.*", "t5.*", "t8.res50.300", "t9.*.300"],
    "hint_label_loss": ["t2.common.label_loss", *(f"t3.*.{hint}.*" for hint in HINTS)],
    "alpha": ["t1b.*.kd.*"],
    "label_reduction": ["t2.common.label_loss", "t4.*"],
    "bkl": ["t4.*.bkl"],
    "dkd_dist_weights": ["t1?.*.dkd.*", "t1?.*.dist.*"],
    "hint_weights": [f"t3.*.{hint}.*" for hint in HINTS],
    "crop_pct": ["t6.*deit-s*", "t7.vitt.*", "t8.vit*", "t8.cnv2t*", "t10.kd300", "t10.kd1200"],
    "warmup_lr": ["t2.common.warmup_epochs"],
    "randaug": ["t2.*.rand_augment"],
    "teacher_norm": ["t6.*deit-s*", "t7.vitt.*", "t8.vit*"],
    "vit_command": ["t6.*deit-s*", "t7.vitt.*", "t8.vit*", "t8.cnv2t*", "t10.kd300", "t10.kd1200"],
    "hint_teacher": [f"t3.*.beitl.{hint}.*" for hint in HINTS],
    "crd_command": ["t3.*.crd.*"],
    "preact": ["t3.*.reviewkd.*"],
    "model_names": ["t8.*.4800", "t8.cnv2t.1200"],
    "mbnet": ["t1a.res50-mbnetv2.*"],
    "dist_cifar_prev": ["t1b.*.dist.previous"],
    "kd_in1k_prev": ["t1a.*.kd.previous", "t1a.*.delta.previous"],
    "prev_epochs": ["t1a.*.previous", "t1a.*.scratch"],
    "res20_scratch": ["t1b.res56-res20.scratch"],
    "small_gap": ["t1b.*.delta.*"],
    "beitb_acc": ["t7.teacher.beitb"],
    "beit_chain": ["t7.teacher.*"],
    "res50_scratch": ["t3.a2.scratch", "t6.cnxl-res50.scratch"],
    "t3_t5": [*(f"t3.a2.beitl.{m}.300.1k" for m in ("kd", "dkd", "dist")), "t5.5e-3.*", "t9.beitl.*.300"],
    "t5_all": ["t5.3e-3.0.03.*"],
    "hint_inferior": [f"t3.a2.res152.{m}.300.{s}" for m in ("reviewkd", "cc", "dkd") for s in ("real", "v2")],
    "hint_time": [f"t3.*.{hint}.*hours" for hint in HINTS],
    "gpu_hours_teacher": ["t3.*.hours"],
    "t8_a1_300": ["t8.*.300", "t9.beitb.*.300", "t10.kd300"],
    "t8_students": ["t8.cnv2t.4800"],
    "vit_deit": ["t6.*deit-s*", "t7.vitt.*", "t8.vit*"],
    "vits_300": ["t6.*deit-s.*", "t8.vits.300"],
    "t5_bold": ["t5.5e-3.0.03.kd", "t5.6e-3.0.02.kd"],
    "t10_cost": ["t10.kd*.hours"],
    "coco_configs": ["t11a.*.2x.box", "t11a.*.2x.mask", "t11[bc].*.1x.box", "t11[bc].*.1x.mask"],
    "coco_prev": ["t11a.prev.*"],
}


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


class Numbers(typing.NamedTuple):
    """What was measured for a cell: top-1 by seed, and the top-1 of the teachers."""

    top1: dict
    teachers: list

    @property
    def mean(self):
        return statistics.fmean(self.top1.values())

    @property
    def spread(self):
        return f"{statistics.stdev(self.top1.values()):.2f}" if len(self.top1) > 1 else ""


@functools.cache
def paper():
    return json.loads((ROOT / "results" / "paper.json").read_text())


@functools.cache
def load(name, overrides=()):
    return recipe.load(ROOT / "recipes" / f"{name}.json", overrides)


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
    student = student_of(settings, name)
    present = {
        "epochs": settings.epochs,
        "lr": student.lr,
        "weight_decay": student.weight_decay,
        "hard.loss": student.hard.loss,
        "hard.weight": student.hard.weight,
    }
    wanted = {k: v for k, v in cell["overrides"].items() if k not in ("method", "hard_label_loss")}
    label_loss = cell["overrides"].get("hard_label_loss")
    if label_loss == "none":
        wanted["hard.weight"] = 0
    elif label_loss:
        wanted["hard.loss"] = LABEL_LOSSES[label_loss]
    changes = {}
    for key, value in wanted.items():
        if value != present[key]:
            changes[key if key == "epochs" else f"students.{name}.{key}"] = value
    return Training(cell["recipe"], name, changes, len(settings.students) == 1)


def student_of(settings, name):
    return next(student for student in settings.students if student.name == name)


def command(cell):
    """What to type for a cell; "" where there is nothing to run."""
    run = training(cell)
    if run and cell["dataset"] in TEST_SETS:
        return f"{run.command} && {evaluation(run.folder, cell)}"
    if run:
        return run.command
    tag = cell.get("timm") or (cell["metric"] == "teacher_top1" and cell["teacher"])
    if cell["table"] == DETECTION:
        tag = backbone_of(cell)
    return evaluation(tag, cell) if tag else ""


def evaluation(checkpoint, cell):
    test_set = TEST_SETS.get(cell["dataset"], "imagenet")
    return f"python evaluate.py {checkpoint} --on {test_set}" + (" --v2 DIR" if test_set == "v2" else "")


def detection_student(run):
    """(recipe, student) of a run of detect.py as JSON."""
    tree = recipe.read_json(ROOT / "recipes" / f"{run.recipe_name}.json")
    return tree, next(student for student in tree["students"] if student["name"] == run.student)


def backbone_of(cell):
    """The checkpoint whose top-1 stands in Table 11 before the AP of its detector: a tag or a folder."""
    name = cell["id"].removesuffix("in1k") + "box"
    _, student = detection_student(training(next(other for other in cells(DETECTION) if other["id"] == name)))
    return student["model"] if student["weights"] == "timm" else student["weights"]


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


def experiment(tree, student):
    """All that decides a student's accuracy except the seed, from a recipe as JSON."""
    shared = {key: tree[key] for key in ("epochs", "batch_size", "batch_size_per_process", "schedule")}
    return shared | {
        "data": settings_of(recipe.Data, tree["data"]),
        "student": settings_of(recipe.Student, student),
        "teacher": teacher_of(tree["teacher"]) if student["soft"] else None,
    }


def settings_of(kind, tree):
    """A section of a recipe without the keys that do not matter, with defaults for those it lacks."""
    fields = [field for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING]
    defaults = {field.name: field.default for field in fields} | BEFORE[kind]
    return {key: value for key, value in (defaults | tree).items() if key not in ORIGIN | HARMLESS}


def teacher_of(teacher):
    """The name of a teacher's network; its weights may come from a file or from a recipe of this project."""
    path = ROOT / "recipes" / Path(teacher["recipe"] or "").name
    return load(path.stem).students[0].model if path.is_file() else teacher["model"] or teacher["recipe"]


def reduction(done, wanted):
    """Compare two experiments: "" if equal, "30 of 240 epochs" if equal but for fewer epochs, else None."""
    if done == wanted:
        return ""
    if done["epochs"] >= wanted["epochs"] or without_epochs(done) != without_epochs(wanted):
        return None
    share = done["epochs"] / wanted["epochs"]
    schedule, scaled = done["schedule"], [m * share for m in wanted["schedule"].get("milestones", ())]
    close = [abs(a - b) <= 1 for a, b in zip(schedule.get("milestones", ()), scaled, strict=False)]
    reduced = f"{done['epochs']} of {wanted['epochs']} epochs"
    if schedule["kind"] == wanted["schedule"]["kind"] and all(close) and len(close) == len(scaled):
        return reduced
    return f"{reduced}, {schedule['kind']} schedule"


def without_epochs(experiment):
    """An experiment without the settings that scale with its epochs."""
    student = dict(experiment["student"])
    if student["soft"]:
        student["soft"] = student["soft"] | {"warmup_epochs": None}
    return experiment | {"epochs": None, "schedule": None, "student": student}


def detected(cell, records):
    """{"": Numbers} of the detectors that were trained as the recipe of a cell of Table 11 says, or {}."""
    run = training(cell)
    found, wanted = {}, run and detection_experiment(*detection_student(run))
    for record in records if run else ():
        for student, result in zip(record["recipe"]["students"], record["students"], strict=True):
            if "detector" in record["recipe"] and detection_experiment(record["recipe"], student) == wanted:
                found.setdefault(record["seed"], result["last"][cell["metric"]])
    return {"": Numbers(found, [])} if found else {}


def detection_experiment(tree, student):
    """All that decides a detector's precision except the seed; a backbone is the last names of its folder."""
    shared = {
        key: tree[key] for key in ("epochs", "batch_size", "batch_size_per_process", "schedule", "detector")
    }
    data = {key: value for key, value in tree["data"].items() if key not in ORIGIN}
    student = {key: value for key, value in student.items() if key not in HARMLESS}
    return shared | student | {"data": data, "weights": Path(student["weights"] or "").parts[-3:]}


def measured(cell, records):
    """{reduction: Numbers} of all records of a cell's experiment; a seed counts once."""
    if cell["table"] == DETECTION:
        return detected(cell, records)
    if cell["kind"] == "delta":
        return gaps(cell, records)
    run = training(cell)
    if run is None:
        return {}
    tree = json.loads(recipe.dump(load(run.recipe_name, run.overrides)))
    wanted = experiment(tree, next(s for s in tree["students"] if s["name"] == run.student))
    test_set, numbers = TEST_SETS.get(cell["dataset"]), {}
    for record in records:
        if "detector" in record["recipe"]:
            continue
        for student, result in zip(record["recipe"]["students"], record["students"], strict=True):
            reduced = reduction(experiment(record["recipe"], student), wanted)
            top1 = top1_on(test_set, record, result)
            if reduced is None or top1 is None:
                continue
            group = numbers.setdefault(reduced, Numbers({}, []))
            if record["seed"] not in group.top1:
                group.top1[record["seed"]] = top1
                if student["soft"] and record.get("teacher"):
                    group.teachers.append(record["teacher"]["top1"])
    return numbers


def top1_on(test_set, record, result):
    """Top-1 of a student: of training (None), or what evaluate.py gave, written down under "evaluations"."""
    if test_set is None:
        return result["last"]["top1"]
    wanted = (result["name"], test_set)
    evaluations = record.get("evaluations", [])
    return next((e["top1"] for e in evaluations if (e["student"], e["data"]) == wanted), None)


def gaps(cell, records):
    """{reduction: kd minus the best other method, by their means}, where all methods were run."""
    row = {key: cell[key] for key in ("student", "teacher", "strategy")}
    methods = {}
    for other in cells(cell["table"]):
        if other.get("method", "scratch") != "scratch" and row.items() <= other.items():
            methods[other["method"]] = measured(other, records)
    kd = methods.pop("kd", {})
    shared = [reduced for reduced in kd if all(reduced in numbers for numbers in methods.values())]
    best = {reduced: max(numbers[reduced].mean for numbers in methods.values()) for reduced in shared}
    return {reduced: Numbers({None: kd[reduced].mean - best[reduced]}, []) for reduced in shared}


# ---------------------------------------------------------------- tables


def row(cell, records):
    """One line of a table, as text and numbers."""
    run, numbers, shown = training(cell), measured(cell, records), cell
    if run and cell["table"] == DETECTION:
        tree, student = detection_student(run)
        shown = cell | {key: student[key] for key in ("lr", "weight_decay")}
        shown |= {"epochs": tree["epochs"], "method": run.student}
    elif run:
        settings = load(run.recipe_name, run.overrides)
        student = student_of(settings, run.student)
        shown = cell | {"epochs": settings.epochs, "lr": student.lr, "weight_decay": student.weight_decay}
    keys = ("student", "teacher", "method", "epochs", "lr", "weight_decay")
    ours = numbers.pop("", None)
    is_gap = cell.get("metric") == "kd_minus_best_other"
    ours_or_not = f"{ours.mean:.2f}" if ours else "not run" if command(cell) or is_gap else ""
    return {
        "cell": cell["id"],
        **{key: shown.get(key, "") for key in keys},
        "label loss": cell["overrides"].get("hard_label_loss", cell.get("hard_label_loss", "")),
        "measure": cell["dataset"] if cell["kind"] in ACCURACIES else cell["metric"],
        "paper": printed(cell),
        "ours": ours_or_not,
        "±": ours.spread if ours else "",
        "seeds": len(ours.top1) if ours and cell["kind"] != "delta" else "",
        "difference": f"{ours.mean - cell['value']:+.2f}" if ours and "value" in cell else "",
        "our teacher": f"{statistics.fmean(ours.teachers):.2f}" if ours and ours.teachers else "",
        "reduced": "; ".join(describe(*item) for item in sorted(numbers.items())),
        "disputed": " ".join(d["id"] for d in disputes(cell["table"]) if touches(d, cell)),
        "command": command(cell),
    }


def printed(cell):
    """The paper's number."""
    if "elsewhere" in cell:
        return f"{cell['elsewhere']:.2f} on ImageNet"
    value = cell.get("value", "-")
    if not isinstance(value, float) or cell["kind"] == "setting":
        return value
    return f"{value:.0f}" if cell["kind"] == "hours" else f"{value:.2f}"


def describe(reduced, numbers):
    """'31.67 (3 of 240 epochs, 1 seed, teacher 33.77)'."""
    facts = [reduced]
    if None not in numbers.top1:
        facts.append(f"{len(numbers.top1)} seed{'s' * (len(numbers.top1) > 1)}")
    if numbers.teachers:
        facts.append(f"teacher {statistics.fmean(numbers.teachers):.2f}")
    return f"{numbers.mean:.2f}{numbers.spread and f' ± {numbers.spread}'} ({', '.join(facts)})"


def disputes(table):
    """The places where the paper, its code and its sources disagree about a table."""
    return [dispute for dispute in paper()["disagreements"] if table in dispute["tables"]]


def touches(dispute, cell):
    patterns = TOUCHES.get(dispute["id"], ())
    return any(fnmatch.fnmatchcase(cell["id"], pattern) for pattern in patterns)


def markdown(rows):
    """Rows as a Markdown table without its empty columns."""
    columns = [name for name in rows[0] if any(r[name] != "" for r in rows)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for r in rows:
        code = f"`{r['command']}`" if " --" in r["command"] else r["command"]
        shown = r | {"command": code}
        lines.append(f"| {' | '.join(str(shown[name]) for name in columns)} |")
    return "\n".join(lines)


def table_text(table, rows):
    """A table as Markdown, with its heading and with what to know about it."""
    parts = [f"## Table {table}", markdown(rows)]
    if any("--students" in r["command"] for r in rows):
        sharing = "Students of one recipe with equal other overrides can share a run"
        parts.append(f"{sharing}: `--students A B C --out DIR`.")
    if disputed := disputes(table):
        scope = "the column names those of a cell; the others touch the whole table"
        parts.append(f"Disputed here, and what was chosen ({scope}):")
        lines = []
        for d in disputed:
            sides = f"the paper: {d['paper']}; against it: {d['other']}; here: {d['resolution']}"
            lines.append(f"- {d['id']} ({d['topic']}): {sides}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def docs_section(records):
    """Every table with a number of ours, without commands, and the names of the tables without one."""
    parts, empty = [], []
    for table in (*TABLES, STUDY):
        rows = [row(cell, records) for cell in cells(table)]
        if any(r["reduced"] or r["ours"] not in ("", "not run") for r in rows):
            parts += [f"### Table {table}", markdown([r | {"command": ""} for r in rows])]
        else:
            empty.append(table)
    lines = [f"Nothing run yet of Tables {', '.join(empty)}."] if empty else []
    lines.append("`python tools/paper.py TABLE` prints any table with its commands and what is disputed.")
    return "\n\n".join([*parts, "\n".join(lines)])


def rewrite(path, section):
    """Put a section between the two markers in a file; RecipeError where they are not in it."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise recipe.RecipeError(f"{path}: expected the lines '{BEGIN}' and '{END}' around the section")
    path.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}", encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, known = parser.add_argument, (*TABLES, STUDY, "all")
    add("table", metavar="TABLE", nargs="?", choices=known, help=", ".join(known))
    add("--docs", action="store_true", help="write what was run into docs/results.md instead")
    add("--csv", action="store_true", help="print CSV instead of Markdown")
    records = "folder of our records (default: results/)"
    add("--results", type=Path, default=ROOT / "results", metavar="DIR", help=records)
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results {args.results}: no such folder")
    if (args.table is None) != args.docs:
        parser.error("expected a TABLE, or --docs")
    try:
        records = list(read_records(args.results))
        if args.docs:
            return rewrite(DOCS, docs_section(records))
    except recipe.RecipeError as error:
        parser.error(str(error))
    names = TABLES if args.table == "all" else [args.table]
    tables = {name: [row(cell, records) for cell in cells(name)] for name in names}
    if not args.csv:
        return print("\n".join(table_text(name, rows) for name, rows in tables.items()))
    writer = csv.DictWriter(sys.stdout, next(iter(tables.values()))[0], lineterminator="\n")
    writer.writeheader()
    for rows in tables.values():
        writer.writerows(rows)


if __name__ == "__main__":
    main()
