"""The paper's tables: every cell's number, ours where results/ has one, and the command that makes it.

    python tools/paper.py 3               # Table 3 as Markdown; 1a, 1b, 2 to 10, or all
    python tools/paper.py all --csv       # for a spreadsheet
    python tools/paper.py 4c              # Table 4 at the scale of CIFAR-100: recipes/study_ablation_cifar.json
    python tools/paper.py --readme        # what was run, between two comments of README.md

A cell is a recipe plus overrides (results/paper.json). Cells that are the same training name the same folder, and --resume
finishes it or leaves it alone, so their commands can be given in any order. Ours is the last epoch, mean and sample standard
deviation over the seeds of the records whose settings are the cell's. A record of the same settings with fewer epochs is
"reduced", says of how many, and is no number of the paper's. Beside a cell stand the disagreements that touch it.
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
sys.path.insert(0, str(ROOT))  # runnable from anywhere

import recipe  # noqa: E402

STUDY = "4c"
TABLES = ("1a", "1b", *map(str, range(2, 11)))  # Table 11 is detection, which this project does not train
NETWORKS = ("result", "reference", "not_reported")  # kinds of cells that are one network's accuracy
LABEL_LOSSES = {"bce": "binary_cross_entropy", "ce": "cross_entropy"}  # the paper's names
TEST_SETS = {"imagenet-real": "real", "imagenet-v2": "v2"}  # evaluate.py's names; other data is what training evaluates on
ORIGIN = {"source", "train_split", "test_split", "image", "label", "streaming", "shuffle_buffer"}  # where the same images lie
HARMLESS = {"name", "paper", "max_broken", "grad_checkpointing"}  # the same numbers with any value
HARMLESS |= {"resident"}  # other draws of the same distribution, and the same pixels for the same draw
README, BEGIN, END = ROOT / "README.md", "<!-- results: python tools/paper.py --readme -->", "<!-- /results -->"
HINTS = ("cc", "rkd", "crd", "reviewkd")
TOUCHES = {  # cells of a disagreement, by id; the others touch all of their tables
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
    "t3_t5": [*(f"t3.a2.beitl.{method}.300.1k" for method in ("kd", "dkd", "dist")), "t5.5e-3.*", "t9.beitl.*.300"],
    "t5_all": ["t5.3e-3.0.03.*"],
    "hint_inferior": [f"t3.a2.res152.{method}.300.{on}" for method in ("reviewkd", "cc", "dkd") for on in ("real", "v2")],
    "hint_time": [f"t3.*.{hint}.*hours" for hint in HINTS],
    "gpu_hours_teacher": ["t3.*.hours"],
    "t8_a1_300": ["t8.*.300", "t9.beitb.*.300", "t10.kd300"],
    "t8_students": ["t8.cnv2t.4800"],
    "vit_deit": ["t6.*deit-s*", "t7.vitt.*", "t8.vit*"],
    "vits_300": ["t6.*deit-s.*", "t8.vits.300"],
    "t5_bold": ["t5.5e-3.0.03.kd", "t5.6e-3.0.02.kd"],
    "t10_cost": ["t10.kd*.hours"],
}


class Training(typing.NamedTuple):
    """The run that makes a cell."""

    recipe_name: str
    student: str
    changes: dict  # {path in the recipe: value}, only what differs from the file
    alone: bool  # the recipe trains this student only

    @property
    def overrides(self):
        return tuple(f"{path}={value}" for path, value in self.changes.items())

    @property
    def folder(self):
        short = [f"{path.removeprefix(f'students.{self.student}.')}-{value}" for path, value in self.changes.items()]
        return ".".join(["runs/" + self.recipe_name, *([] if self.alone else [self.student]), *short])

    @property
    def command(self):
        students = [] if self.alone else ["--students", self.student]
        changes = ["--set", *self.overrides] if self.changes else []
        out = [] if self.alone and not changes else ["--out", self.folder]  # else it is train.py's default
        return shlex.join(
            ["accelerate", "launch", "train.py", f"recipes/{self.recipe_name}.json", *students, *changes, *out, "--resume"]
        )


class Numbers(typing.NamedTuple):
    """What was measured for a cell: top-1 by seed, and its teachers' top-1."""

    top1: dict
    teachers: list

    @property
    def mean(self):
        return statistics.fmean(self.top1.values())

    @property
    def spread(self):
        return f"{statistics.stdev(self.top1.values()):.2f}" if len(self.top1) > 1 else ""


def cells(table=None):
    if table == STUDY:
        return study()
    return [cell for cell in paper()["cells"] if cell["table"] in (TABLES if table is None else (table,))]


@functools.cache
def paper():
    return json.loads((ROOT / "results" / "paper.json").read_text())


@functools.cache
def load(name, overrides=()):
    return recipe.load(ROOT / "recipes" / f"{name}.json", overrides)


def study():
    """Table 4's first six cells at the scale of CIFAR-100, in its words; `elsewhere` is the paper's number on ImageNet."""
    run = dict(table=STUDY, kind="result", recipe="study_ablation_cifar", dataset="cifar-100", metric="top1", overrides={})
    run |= dict(student="cifar_resnet20", teacher="cifar_resnet56")
    found = []
    for cell in cells("4"):
        _, epochs, hard, soft = cell["id"].split(".")
        if epochs == "300":
            name = f"{hard}_{soft}"
            found.append({"id": f"4c.{name}", "method": name, "hard_label_loss": hard, "elsewhere": cell["value"]} | run)
    return found


# ---------------------------------------------------------------- from a cell to a command


def is_training(cell):
    """Whether this project trains the cell's network: not so for what is quoted, derived, or a setting."""
    return cell["kind"] in NETWORKS and (ROOT / f"recipes/{cell.get('recipe')}.json").exists()


def training(cell):
    """The cell's Training; None where its recipe has no student of its method (yet)."""
    file, name = load(cell["recipe"]), cell.get("method", "scratch")
    student = next((s for s in file.students if s.name == name), None)
    if student is None:
        return None
    present = {
        "epochs": file.epochs,
        "lr": student.lr,
        "weight_decay": student.weight_decay,
        "hard.loss": student.hard.loss,
        "hard.weight": student.hard.weight,
    }
    wanted = {key: value for key, value in cell["overrides"].items() if key not in ("method", "hard_label_loss")}
    label_loss = cell["overrides"].get("hard_label_loss")
    if label_loss == "none":
        wanted["hard.weight"] = 0
    elif label_loss:
        wanted["hard.loss"] = LABEL_LOSSES[label_loss]
    changed = {key: value for key, value in wanted.items() if value != present[key]}
    paths = {key if key == "epochs" else f"students.{name}.{key}": value for key, value in changed.items()}
    return Training(cell["recipe"], name, paths, len(file.students) == 1)


def command(cell):
    """What to type for a cell, "" where there is nothing to do."""
    if is_training(cell):
        run = training(cell)
        if run is None:
            return f"not trainable yet: no student {cell['method']} in recipes/{cell['recipe']}.json"
        return run.command + (f" && {evaluation(run.folder, cell)}" if cell["dataset"] in TEST_SETS else "")
    tag = cell.get("timm") or (cell["metric"] == "teacher_top1" and cell["teacher"])
    return evaluation(tag, cell) if tag else ""


def evaluation(checkpoint, cell):
    test_set = TEST_SETS.get(cell["dataset"], "imagenet")
    return f"python evaluate.py {checkpoint} --on {test_set}" + (" --v2 DIR" if test_set == "v2" else "")


# ---------------------------------------------------------------- from a cell to our number


def records(folder):
    """Every complete run's result below a folder: train.py's result.json, or several of them under "runs"."""
    for path in sorted(folder.rglob("*.json")):
        tree = json.loads(path.read_text())
        several = tree.get("runs") if isinstance(tree, dict) else []
        for record in several if isinstance(several, list) else [tree]:  # a recipe has a number of runs
            if isinstance(record, dict) and isinstance(record.get("recipe"), dict) and record.get("limit") is None:
                yield record


def experiment(tree, student):
    """All that decides a student's accuracy but the seed, of a recipe as JSON: equal for all runs of a cell."""
    return {
        **{key: tree[key] for key in ("epochs", "batch_size", "batch_size_per_process", "schedule")},
        "data": settings(recipe.Data, tree["data"]),
        "student": settings(recipe.Student, student),
        "teacher": taught_by(tree["teacher"]) if student["soft"] else None,
    }


def settings(kind, tree):
    """A section of a recipe, with what runs did without for the keys that its record does not have yet."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    defaults |= {recipe.Data: {"repeats": 1, "random_erasing": 0.0}, recipe.Student: {"ema": None}}[kind]
    return {key: value for key, value in (defaults | tree).items() if key not in ORIGIN | HARMLESS}


def taught_by(teacher):
    """A teacher's network: its weights may come from a file, or from the recipe of this project that trains it."""
    path = ROOT / "recipes" / Path(teacher["recipe"] or "").name
    return load(path.stem).students[0].model if path.is_file() else teacher["model"] or teacher["recipe"]


def reduction(own, wanted):
    """ "" for the experiment that is wanted, "30 of 240 epochs" for the same in fewer epochs, None for another one."""
    if own == wanted:
        return ""
    if own["epochs"] >= wanted["epochs"] or _untimed(own) != _untimed(wanted):
        return None
    said = f"{own['epochs']} of {wanted['epochs']} epochs"
    scaled = [m * own["epochs"] / wanted["epochs"] for m in wanted["schedule"].get("milestones", ())]
    shape = [abs(a - b) <= 1 for a, b in zip(own["schedule"].get("milestones", ()), scaled, strict=False)]
    same = own["schedule"]["kind"] == wanted["schedule"]["kind"] and all(shape) and len(shape) == len(scaled)
    return said if same else f"{said}, {own['schedule']['kind']} schedule"


def _untimed(experiment):
    """An experiment without what scales with its epochs."""
    student = dict(experiment["student"])
    if student["soft"]:
        student["soft"] = student["soft"] | {"warmup_epochs": None}
    return experiment | {"epochs": None, "schedule": None, "student": student}


def measured(cell, found):
    """{reduction: Numbers} over every record of a cell's experiment; a seed counts once. {} for what is not trained."""
    if cell["kind"] == "delta":
        return gaps(cell, found)
    run = training(cell) if is_training(cell) else None
    if run is None:
        return {}
    test_set, tree = TEST_SETS.get(cell["dataset"]), json.loads(recipe.dump(load(run.recipe_name, run.overrides)))
    wanted = experiment(tree, next(s for s in tree["students"] if s["name"] == run.student))
    numbers = {}
    for record in found:
        for student, result in zip(record["recipe"]["students"], record["students"], strict=True):
            reduced = reduction(experiment(record["recipe"], student), wanted)
            if reduced is None:
                continue
            values = [result["last"]["top1"]] if test_set is None else []
            # what evaluate.py told of the exported student, written down beside
            values += [
                e["top1"] for e in record.get("evaluations", []) if (e["student"], e["data"]) == (student["name"], test_set)
            ]
            for value in values:
                own = numbers.setdefault(reduced, Numbers({}, []))
                if record["seed"] in own.top1:
                    continue
                own.top1[record["seed"]] = value
                if student["soft"] and record.get("teacher"):
                    own.teachers.append(record["teacher"]["top1"])
    return numbers


def gaps(cell, found):
    """{reduction: vanilla KD minus the best other method}, by the means, where all that the row compares were run."""
    row = ("student", "teacher", "strategy")
    others = [c for c in cells(cell["table"]) if "method" in c and all(c.get(key) == cell[key] for key in row)]
    others = {c["method"]: measured(c, found) for c in others if c["method"] != "scratch"}
    shared = set.intersection(*(set(numbers) for numbers in others.values())) if "kd" in others else ()
    means = {reduced: {method: numbers[reduced].mean for method, numbers in others.items()} for reduced in shared}
    return {r: Numbers({None: m["kd"] - max(v for k, v in m.items() if k != "kd")}, []) for r, m in means.items()}


# ---------------------------------------------------------------- printing


def row(cell, found):
    """One line of a table."""
    shown, run, numbers = cell, training(cell) if is_training(cell) else None, measured(cell, found)
    if run:
        tree = load(run.recipe_name, run.overrides)
        student = next(s for s in tree.students if s.name == run.student)
        shown = cell | {"epochs": tree.epochs, "lr": student.lr, "weight_decay": student.weight_decay}
    ours, runs = numbers.pop("", None), command(cell) or cell.get("metric") == "kd_minus_best_other"
    return {
        "cell": cell["id"],
        **{key: shown.get(key, "") for key in ("student", "teacher", "method", "epochs", "lr", "weight_decay")},
        "label loss": cell["overrides"].get("hard_label_loss", cell.get("hard_label_loss", "")),
        "measure": cell["dataset"] if cell["kind"] in NETWORKS else cell["metric"],
        "paper": f"{cell['elsewhere']:.2f} on ImageNet" if "elsewhere" in cell else printed(cell.get("value", "-"), cell),
        "ours": f"{ours.mean:.2f}" if ours else "not run" if runs else "",
        "±": ours.spread if ours else "",
        "seeds": len(ours.top1) if ours and cell["kind"] != "delta" else "",
        "difference": f"{ours.mean - cell['value']:+.2f}" if ours and "value" in cell else "",
        "our teacher": f"{statistics.fmean(ours.teachers):.2f}" if ours and ours.teachers else "",
        "reduced": "; ".join(shortened(*item) for item in sorted(numbers.items())),
        "disputed": " ".join(d["id"] for d in disputes(cell["table"]) if touches(d, cell)),
        "command": command(cell),
    }


def shortened(reduced, numbers):
    """'31.67 (3 of 240 epochs, 1 seed, teacher 33.77)'."""
    said = [reduced]
    if None not in numbers.top1:
        said.append(f"{len(numbers.top1)} seed{'s' * (len(numbers.top1) > 1)}")
    if numbers.teachers:
        said.append(f"teacher {statistics.fmean(numbers.teachers):.2f}")
    return f"{numbers.mean:.2f}{numbers.spread and f' ± {numbers.spread}'} ({', '.join(said)})"


def disputes(table):
    """The places where the paper, its code and its sources disagree about a table."""
    return [d for d in paper()["disagreements"] if table in d["tables"]]


def touches(dispute, cell):
    return any(fnmatch.fnmatchcase(cell["id"], pattern) for pattern in TOUCHES.get(dispute["id"], ()))


def printed(value, cell):
    if not isinstance(value, float) or cell["kind"] == "setting":
        return value
    return f"{value:.0f}" if cell["kind"] == "hours" else f"{value:.2f}"


def markdown(table, rows):
    """A heading, the table without its empty columns, and what to know about it."""
    columns = [name for name in rows[0] if any(r[name] != "" for r in rows)]
    lines = [f"## Table {table}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for r in rows:
        shown = r | {"command": f"`{r['command']}`" if " --" in r["command"] else r["command"]}
        lines.append(f"| {' | '.join(str(shown[name]) for name in columns)} |")
    lines.append("")
    missing = dict.fromkeys(c["method"] for c in cells(table) if is_training(c) and training(c) is None)
    if missing:
        lines += [f"Not trainable yet: students {', '.join(missing)}.", ""]
    if any("--students" in r["command"] for r in rows):
        lines += ["Students of one recipe with equal other overrides can share a run: `--students A B C --out DIR`.", ""]
    if disputed := disputes(table):
        lines += [
            "Disputed here, and what was chosen (the column names those of a cell; the others touch the whole table):",
            "",
        ]
        lines += [
            f"- {d['id']} ({d['topic']}): the paper: {d['paper']}; against it: {d['other']}; here: {d['resolution']}"
            for d in disputed
        ]
        lines.append("")
    return "\n".join(lines)


def readme(found):
    """The results section: every table with a number of ours, and which ones have none."""
    lines, empty = [], []
    for table in (*TABLES, STUDY):
        rows = [row(cell, found) for cell in cells(table)]
        if not any(r["reduced"] or r["ours"] not in ("", "not run") for r in rows):
            empty.append(table)
            continue
        text = markdown(table, [r | {"command": ""} for r in rows])
        lines.append(text.replace("## ", "### ", 1).split("\nDisputed here")[0].rstrip() + "\n")
    if empty:
        lines.append(f"Nothing run yet of Tables {', '.join(empty)}.")
    lines.append("`python tools/paper.py TABLE` prints any table with its commands and what is disputed.")
    return "\n".join(lines)


def rewrite(path, section):
    """Put a section between the two comments of a file; RecipeError where they are not."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise recipe.RecipeError(f"{path}: expected the lines '{BEGIN}' and '{END}' around the section to rewrite")
    recipe.write_atomic(path, f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*TABLES, STUDY, "all")
    parser.add_argument("table", metavar="TABLE", nargs="?", choices=known, help=f"{', '.join(known)}")
    parser.add_argument("--readme", action="store_true", help="write what was run into README.md instead")
    parser.add_argument("--csv", action="store_true", help="print CSV instead of Markdown")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="our records (default: results/)")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results {args.results}: no such folder")
    if (args.table is None) != args.readme:
        parser.error("expected a TABLE, or --readme")
    found = list(records(args.results))
    if args.readme:
        try:
            return rewrite(README, readme(found))
        except recipe.RecipeError as error:
            parser.error(str(error))
    tables = {table: [row(cell, found) for cell in cells(table)] for table in (TABLES if args.table == "all" else [args.table])}
    if args.csv:
        writer = csv.DictWriter(sys.stdout, fieldnames=list(next(iter(tables.values()))[0]), lineterminator="\n")
        writer.writeheader()
        for rows in tables.values():
            writer.writerows(rows)
    else:
        print("\n".join(markdown(table, rows) for table, rows in tables.items()))


if __name__ == "__main__":
    main()
