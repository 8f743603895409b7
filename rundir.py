"""The folder of a run: atomic files, its lock, what may be in it, and what a resume may change.

A folder may come from others. So what is read from its JSON files is checked against the types below, links
are refused, and no file of it can name another.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # noqa: UP035  pydantic needs it before Python 3.12

import recipe

MAX_STATE_BYTES = 16 << 20  # of the JSON files of a run
FOLDERS, FILES = ("checkpoints", "students"), ("metrics.jsonl", "recipe.json", "result.json")
# Keys of a recipe that a resume may change, because they cannot change a result. The data of `source` may
# have moved: `Checkpoints.check_data` compares what is there.
HARMLESS = {"about", "paper", "log_every", "evaluate_every", "save_every", "runs", "grad_checkpointing"}
HARMLESS |= {"max_broken", "source"}


# ---------------------------------------------------------------- files


def write_atomic(path, text):
    """Write a file so that a reader, or a crash at any moment, sees the old or the new text, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path):
    """Make renames inside a directory survive a power cut; a file system that cannot is no reason to fail."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- what JSON files of a run must hold


class Written(TypedDict):
    bytes: recipe.Whole
    sha256: str


class Manifest(TypedDict):
    schema: recipe.Whole
    step: recipe.Whole
    limit: NotRequired[recipe.Whole | None]
    settings_sha256: NotRequired[str]
    files: dict[str, Written]


class Score(TypedDict):
    top1: float
    top5: float
    n: recipe.Whole


class Scores(Score):
    step: recipe.Whole
    epoch: float
    ema: NotRequired[Score]


class Precision(TypedDict):
    """Of a detector; None where the images have no objects."""

    ap_box: float | None
    ap_mask: float | None
    n: recipe.Whole
    step: recipe.Whole
    epoch: float


class StudentResult(TypedDict):
    name: str
    parameters: recipe.Whole
    last: Scores | Precision


class TeacherResult(Score):
    parameters: recipe.Whole


class Result(TypedDict):
    students: list[StudentResult]
    teacher: TeacherResult | None
    steps: recipe.Whole
    limit: recipe.Whole | None


MANIFEST, RESULT = TypeAdapter(Manifest), TypeAdapter(Result)


def read_checked(path, kind):
    """The JSON in a file of a run; RecipeError, with the place in it, unless it is of a kind, like STATE."""
    tree = recipe.read_json(path, MAX_STATE_BYTES)
    try:
        kind.validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f"{part}: " for part in (".".join(map(str, fault["loc"])),) if part)
        raise recipe.RecipeError(f"{path}: {place}{fault['msg']}: not as it was written") from None
    return tree


# ---------------------------------------------------------------- the folder


def lock(folder):
    """Hold a run's folder for this process; RecipeError where another process holds it. Returns a file.

    The kernel releases the lock when the process ends, however it ends. It is a POSIX record lock, which
    loader workers do not inherit: they would keep a flock of a killed trainer.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise recipe.RecipeError(
            f"{error.filename}: the run's folder cannot be made or locked: {error.strerror}"
        ) from None
    file = open(descriptor, "r+", encoding="utf-8")  # noqa: SIM115  open as long as it is held
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise recipe.RecipeError(f"{folder}: another run holds it: {file.read().strip()}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def open_folder(folder, settings, options):
    """Prepare a run's folder, new, resumed or replaced, and write the recipe as it runs into it.

    Raises RecipeError as `check_folder`.
    """
    check_folder(folder, settings, options)
    if options.overwrite:
        for path in folder.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_atomic(folder / "recipe.json", recipe.dump(settings))


def check_folder(folder, settings, options):
    """RecipeError for a folder that is used already, is not a run's, or was begun with other settings.

    options: the command line, with resume, overwrite and limit (steps of a trial).
    """
    names = [student.name for student in settings.students]  # of their folders, which TensorBoard reads
    if taken := {*FOLDERS, *FILES}.intersection(names):
        raise recipe.RecipeError(
            f"students: a run's folder has {', '.join(sorted(taken))} of its own: choose other names"
        )
    left_by_a_failed_start = {"recipe.json", ".lock"}
    if not folder.exists() or {path.name for path in folder.iterdir()} <= left_by_a_failed_start:
        return
    written = folder / "recipe.json"
    if not os.path.lexists(written):
        raise recipe.RecipeError(
            f"{folder}: not empty, and not the folder of a run (no recipe.json): choose another --out"
        )
    if options.overwrite:
        return
    if not options.resume:
        raise recipe.RecipeError(
            f"{folder}: holds a run: continue it with --resume or replace it with --overwrite"
        )
    check_entries(folder, (*FOLDERS, *names))
    check_limit(folder, options.limit)
    if changes := differences(recipe.load(written, kind=type(settings)), settings):
        lines = "\n  ".join(changes)
        raise recipe.RecipeError(
            f"{folder}: --resume with other settings than the run began with:\n  {lines}"
        )


def check_entries(folder, folders):
    """RecipeError for what a run's folder cannot have, as a file with the name of one of its `folders`.

    Nor symbolic links: writing through one would change a file elsewhere.
    """
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise recipe.RecipeError(
                f"{path}: a symbolic link in a run's folder: replace it by what it points to"
            )
    for path in folder.iterdir():
        if path.name in (*folders, *FILES) and path.is_dir() != (path.name in folders):
            kind = "folder" if path.name in folders else "file"
            raise recipe.RecipeError(f"{path}: expected a {kind}: remove it, or start again with --overwrite")


def check_limit(folder, limit):
    """RecipeError for a trial (of `limit` steps) that would be continued as a run, or a run as a trial.

    The teacher of a trial may be a trial's, or untrained, so its steps are not those of the run.
    """
    begun = set()
    for path in checkpoints(folder):
        with contextlib.suppress(recipe.RecipeError):  # damaged, which restore deals with
            begun.add(read_checked(path / "manifest.json", MANIFEST).get("limit"))
    if (folder / "result.json").exists():
        begun.add(read_checked(folder / "result.json", RESULT)["limit"])
    for other in begun - {limit}:
        was, now = (f"a trial (--limit {n})" if n else "a run without --limit" for n in (other, limit))
        raise recipe.RecipeError(
            f"{folder}: holds {was}, which cannot be continued as {now}: choose another --out, or replace it "
            "with --overwrite"
        )


def checkpoints(folder):
    """Complete checkpoints in a run's folder, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


# ---------------------------------------------------------------- what a resume may change


def consequential(tree):
    """A recipe as JSON without the keys that cannot change a result, and without nulls.

    A key that recipes get later has the default null, and an older run goes on.
    """
    if isinstance(tree, dict):
        kept = {key: value for key, value in tree.items() if key not in HARMLESS and value is not None}
        return {key: consequential(value) for key, value in kept.items()}
    return [consequential(value) for value in tree] if isinstance(tree, list) else tree


def differences(old, new):
    """Lines 'a.b: old -> new' for the settings of two recipes that can change a result."""
    old, new = (dict(_leaves(consequential(json.loads(recipe.dump(r))))) for r in (old, new))
    changed = [path for path in new | old if old.get(path) != new.get(path)]
    return [f"{path}: {json.dumps(old.get(path))} -> {json.dumps(new.get(path))}" for path in changed]


def _leaves(tree, path=""):
    """Yield ("a.0.b", value) for every value in JSON that holds no others."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for key, child in tree.items():
        yield from _leaves(child, f"{path}.{key}" if path else key)


def settings_digest(settings):
    """sha256 of the settings that a resume may not change."""
    tree = consequential(json.loads(recipe.dump(settings)))
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
