"""The paper's tables: every cell's number, ours where results/ has one, and the command that makes it.

    python tools/paper.py 3               # Table 3 as Markdown; 1a, 1b, 2 to 10, or all
    python tools/paper.py all --csv       # for a spreadsheet

A cell is a recipe plus overrides (results/paper.json). Cells that are the same training name the same folder, and --resume
finishes it or leaves it alone, so their commands can be given in any order. Ours is the last epoch, mean and sample standard
deviation over the records whose settings are the cell's.
"""

import argparse
import csv
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

TABLES = ("1a", "1b", *map(str, range(2, 11)))  # Table 11 is detection, which this project does not train
NETWORKS = ("result", "reference", "not_reported")  # kinds of cells that are one network's accuracy
LABEL_LOSSES = {"bce": "binary_cross_entropy", "ce": "cross_entropy"}  # the paper's names
TEST_SETS = {"imagenet-real": "real", "imagenet-v2": "v2"}  # evaluate.py's names; other data is what training evaluates on
ORIGIN = {"source", "train_split", "test_split", "image", "label", "streaming", "shuffle_buffer"}  # where the same images lie


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


def cells(table=None):
    return [cell for cell in paper()["cells"] if cell["table"] in (TABLES if table is None else (table,))]


@functools.cache
def paper():
    return json.loads((ROOT / "results" / "paper.json").read_text())


@functools.cache
def load(name, overrides=()):
    return recipe.load(ROOT / "recipes" / f"{name}.json", overrides)


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
        for record in tree.get("runs", [tree]) if isinstance(tree, dict) else []:
            if isinstance(record, dict) and isinstance(record.get("recipe"), dict) and record.get("limit") is None:
                yield record


def experiment(tree, student):
    """All that decides a student's accuracy but the seed, of a recipe as JSON: equal for all runs of a cell."""
    return {
        **{key: tree[key] for key in ("epochs", "batch_size", "batch_size_per_process", "schedule")},
        # the defaults: records from before these keys existed are of runs without them
        "data": {"repeats": 1, "random_erasing": 0.0} | {k: v for k, v in tree["data"].items() if k not in ORIGIN},
        "student": {"ema": None} | {k: v for k, v in student.items() if k not in ("name", "paper")},
        "teacher": taught_by(tree["teacher"]) if student["soft"] else None,
    }


def taught_by(teacher):
    """A teacher's network: its weights may come from a file, or from the recipe of this project that trains it."""
    path = ROOT / "recipes" / Path(teacher["recipe"] or "").name
    return load(path.stem).students[0].model if path.is_file() else teacher["model"] or teacher["recipe"]


def measured(wanted, test_set, found):
    """Top-1 of every record of an experiment."""
    for record in found:
        for student, result in zip(record["recipe"]["students"], record["students"], strict=True):
            if experiment(record["recipe"], student) != wanted:
                continue
            if test_set is None:
                yield result["last"]["top1"]
            for e in record.get("evaluations", []):  # what evaluate.py told of the exported student, written down beside
                if (e["student"], e["data"]) == (student["name"], test_set):
                    yield e["top1"]


# ---------------------------------------------------------------- printing


def row(cell, found):
    """One line of a table."""
    shown, values, run = cell, [], training(cell) if is_training(cell) else None
    if run:
        tree = json.loads(recipe.dump(load(run.recipe_name, run.overrides)))
        student = next(s for s in tree["students"] if s["name"] == run.student)
        shown = cell | {"epochs": tree["epochs"], "lr": student["lr"], "weight_decay": student["weight_decay"]}
        values = list(measured(experiment(tree, student), TEST_SETS.get(cell["dataset"]), found))
    mean = statistics.fmean(values) if values else None
    return {
        "cell": cell["id"],
        **{key: shown.get(key, "") for key in ("student", "teacher", "method", "epochs", "lr", "weight_decay")},
        "label loss": cell["overrides"].get("hard_label_loss", cell.get("hard_label_loss", "")),
        "measure": cell["dataset"] if cell["kind"] in NETWORKS else cell["metric"],
        "paper": printed(cell.get("value", "-"), cell),
        "ours": f"{mean:.2f}" if values else "not run" if command(cell) else "",
        "±": f"{statistics.stdev(values):.2f}" if len(values) > 1 else "",
        "seeds": len(values) or "",
        "difference": f"{mean - cell['value']:+.2f}" if values and "value" in cell else "",
        "command": command(cell),
    }


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
    disputed = [d for d in paper()["disagreements"] if table in d["tables"]]
    if disputed:
        lines += ["Disputed here, and what was chosen:", ""]
        lines += [*(f"- {d['id']} ({d['topic']}): {d['resolution']}" for d in disputed), ""]
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", metavar="TABLE", choices=(*TABLES, "all"), help=f"{', '.join(TABLES)} or all")
    parser.add_argument("--csv", action="store_true", help="print CSV instead of Markdown")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="our records (default: results/)")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results {args.results}: no such folder")
    found = list(records(args.results))
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
