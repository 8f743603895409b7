"""Nothing is lost: atomic files, the lock and the folder of a run, checkpoints that appear complete or not
at all.

A checkpoint is checkpoints/step-N: tensors as safetensors, the rest as JSON, and manifest.json with the
sha256 of every file, because neither safetensors nor the file system notices a flipped bit. It holds whole
tensors, whoever wrote it: a run goes on with another number of processes, with DeepSpeed or without. A
resumed run equals the uninterrupted one bit for bit.
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

import safetensors
import safetensors.torch
import timm
import torch
from accelerate.utils import gather_object

import launch
import recipe

MAX_STATE_BYTES = 16 << 20  # of the JSON files of a run
KEEP_CHECKPOINTS = 2
MAX_FAILED_SAVES = 3  # in a row; then the run stops
COUNTERS = ("skipped", "skipped_in_a_row", "last", "best")  # of a Student, saved as JSON
# Keys of a recipe that a resume may change, because they cannot change a result.
HARMLESS = {
    "about",
    "paper",
    "log_every",
    "evaluate_every",
    "save_every",
    "runs",
    "max_broken",
    "grad_checkpointing",
}


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


def write_tensors(path, tensors):
    # copies, because DeepSpeed's weights are views of one flat tensor, and safetensors refuses shared memory
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---------------------------------------------------------------- the folder of a run


def lock(folder):
    """Hold a run's folder for this process; RecipeError where another process holds it. Returns a file.

    The kernel releases the lock when the process ends, however it ends. It is a POSIX record lock, which
    loader workers do not inherit: they would keep a flock of a killed trainer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise recipe.RecipeError(f"{folder / '.lock'}: cannot be opened: {error.strerror}") from None
    file = open(descriptor, "r+", encoding="utf-8")  # noqa: SIM115  open as long as it is held
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise recipe.RecipeError(f"{folder}: another run holds it: {file.read().strip()}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def open_folder(folder, settings, *, resume, overwrite):
    """Prepare a run's folder, new, resumed or replaced, and write the recipe as it runs into it.

    RecipeError for a folder that is used already, is not a run's, or was begun with other settings.
    """
    written = folder / "recipe.json"
    if {p.name for p in folder.iterdir()} - {
        "recipe.json",
        ".lock",
    }:  # these alone are left by a start that failed
        if not os.path.lexists(written):
            raise recipe.RecipeError(
                f"{folder}: not empty, and not the folder of a run (no recipe.json): choose another --out"
            )
        if overwrite:
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif not resume:
            raise recipe.RecipeError(
                f"{folder}: holds a run: continue it with --resume or replace it with --overwrite"
            )
        else:
            refuse_links(folder)
            if changes := differences(recipe.load(written), settings):
                lines = "\n  ".join(changes)
                raise recipe.RecipeError(
                    f"{folder}: --resume with other settings than the run began with:\n  {lines}"
                )
    write_atomic(written, recipe.dump(settings))


def refuse_links(folder):
    """RecipeError for a symbolic link in a run's folder: writing through it would change a file elsewhere."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(path := os.path.join(parent, name)):
                raise recipe.RecipeError(
                    f"{path}: a symbolic link in a run's folder: replace it by what it points to"
                )


def consequential(tree):
    """A recipe as JSON without the keys that cannot change a result."""
    if isinstance(tree, dict):
        return {key: consequential(value) for key, value in tree.items() if key not in HARMLESS}
    return [consequential(value) for value in tree] if isinstance(tree, list) else tree


def differences(old, new):
    """Lines 'a.b: old -> new' for the settings of two recipes that can change a result, not data.source."""
    return _changed(*(consequential(json.loads(recipe.dump(r))) for r in (old, new)), "")


def _changed(old, new, path):
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line for k in new | old for line in _changed(old.get(k), new.get(k), f"{path}.{k}" if path else k)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, pair in enumerate(zip(old, new, strict=True))
            for line in _changed(*pair, f"{path}.{i}")
        ]
    return [] if old == new or path == "data.source" else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def settings_digest(settings):
    """sha256 of the settings that a resume may not change."""
    tree = consequential(json.loads(recipe.dump(settings)))
    tree["data"].pop("source")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- checkpoints


def checkpoints(folder):
    """Complete checkpoints in a run's folder, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


class Checkpoints:
    """Saves and restores one run. settings: its recipe, of one seed; lead: an Accelerator of the launch."""

    def __init__(self, folder, settings, lead):
        self.run_folder, self.folder = folder, folder / "checkpoints"
        self.settings, self.lead = settings, lead
        self.failed = 0  # saves in a row

    def save(self, step, students, log, loader):
        """A checkpoint after `step` steps; every process calls this, the main one writes.

        One that cannot be written is a warning; the third in a row raises Unsaved.
        """
        sums = [self.lead.reduce(s.sums.clone(), "mean").tolist() if log.steps else 0.0 for s in students]
        optimizers = [optimizer_state(student) for student in students]
        broken = gather_object(list(loader.broken.items()))
        for student in students:
            check_weights(student, step)
        if not self.lead.is_main_process or (self.folder / f"step-{step:08d}").exists():
            return
        temporary = self.folder / f".tmp-{step}"
        try:
            self.check_space()
            temporary.mkdir()
            state = {"step": step, "workers": loader.workers, "broken": broken, **log.state(), "students": {}}
            for student, student_sums, optimizer in zip(students, sums, optimizers, strict=True):
                state["students"][student.name] = write_student(temporary, student, student_sums, optimizer)
            write_atomic(temporary / "state.json", json.dumps(state))
            manifest = self.manifest(temporary, step, log.steps_per_epoch)
            write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            sync_directory(temporary)
            os.replace(temporary, self.folder / f"step-{step:08d}")
            sync_directory(self.folder)
            self.failed = 0
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # what a full disk raises
            self.count_failure(step, error)
        finally:
            self.remove_old()

    def check_space(self):
        """Make the folder; OSError without room for 1.2 times the last checkpoint."""
        self.folder.mkdir(exist_ok=True)  # not its parents: a run's folder that was removed is an error
        self.remove_old()
        if saved := checkpoints(self.run_folder):
            needed = int(1.2 * sum(path.stat().st_size for path in saved[-1].iterdir()))
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(f"{free:,} bytes are free, {needed:,} are needed")

    def remove_old(self):
        """Remove all but the newest checkpoints, and what a killed save left behind."""
        for path in [*checkpoints(self.run_folder)[:-KEEP_CHECKPOINTS], *self.folder.glob(".tmp-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def count_failure(self, step, error):
        self.failed += 1
        message = f"{self.run_folder}: no checkpoint at step {step}: {error}"
        if self.failed == MAX_FAILED_SAVES:
            raise launch.Unsaved(
                f"{message}; {MAX_FAILED_SAVES} in a row. Older ones are valid: make room and --resume"
            ) from error
        self.lead.print(f"warning: {message}; the run goes on, older checkpoints are valid")

    def manifest(self, folder, step, steps_per_epoch):
        return {
            "schema": 2,  # 1 had recipe_sha256, of the whole recipe.json
            "step": step,
            "epoch": step / steps_per_epoch,
            "settings_sha256": settings_digest(self.settings),
            "processes": self.lead.num_processes,
            "batch_size": self.settings.batch_size,
            "versions": {module.__name__: module.__version__ for module in (torch, timm)},
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(folder.iterdir())
            },
        }

    def restore(self, students, log, loader):
        """Bring a run to its newest valid checkpoint; returns its step, 0 for a run that has never saved.

        Rows that were logged after it are cut off. Damaged checkpoints are renamed .bad-*, never deleted.
        TrainingError where a run has saved and no valid checkpoint is left: it does not start over by itself.
        """
        newest, damaged = self.newest_valid()
        self.lead.wait_for_everyone()
        if self.lead.is_main_process:
            for path in damaged:
                set_aside(path)
        if newest is None:
            self.check_never_saved(log)
            log.restore(None)
            return 0
        state = recipe.read_json(newest / "state.json", MAX_STATE_BYTES)
        if self.settings.data.streaming and state["workers"] != loader.workers:
            raise recipe.RecipeError(
                f"{self.run_folder}: the order of a stream depends on its readers: resume with "
                f"--workers {state['workers']}"
            )
        loader.broken = dict(state["broken"])
        log.restore(state)
        for student in students:
            restore_student(newest, student, state["students"][student.name], self.lead.device)
        return state["step"]

    def check_never_saved(self, log):
        """TrainingError if the log goes on after the step of a first checkpoint, which then was removed."""
        first = self.settings.save_every or log.steps_per_epoch
        if (last := log.last_step()) > first:
            raise launch.TrainingError(
                f"{log.path} reaches step {last}, but {self.folder} has no checkpoint: put it back, or start "
                "again with --overwrite"
            )

    def newest_valid(self):
        """(the newest checkpoint that is as it was written, or None; the damaged newer ones)."""
        problems = {}
        for path in reversed(checkpoints(self.run_folder)):
            if (problem := problem_of(path, self.settings)) is None:
                if problems:
                    self.lead.print(
                        "\n".join(f"warning: {line}, renamed .bad-*" for line in _damaged(problems))
                    )
                    self.lead.print(f"warning: going on from {path.name}")
                return path, list(problems)
            problems[path] = problem
        if problems or list(self.folder.glob(".bad-*")):
            advice = f"{self.run_folder}: no valid checkpoint is left; --overwrite starts again"
            raise launch.TrainingError("\n".join([*_damaged(problems), advice]))
        return None, []


def _damaged(problems):
    return [f"{path} is damaged ({problem})" for path, problem in problems.items()]


def set_aside(path):
    """Rename a damaged checkpoint."""
    aside = path.with_name(f".bad-{path.name}")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}+")
    os.replace(path, aside)


def problem_of(folder, settings):
    """What is wrong with a checkpoint of a run with these settings, or None."""
    try:
        manifest = recipe.read_json(folder / "manifest.json", MAX_STATE_BYTES)
        for name, written in manifest["files"].items():
            path = folder / name
            if path.name != name or path.is_symlink():
                return f"manifest.json names {name!r}, which is not a plain file of its folder"
            if path.stat().st_size != written["bytes"] or sha256(path) != written["sha256"]:
                return f"{name} is not what was written"
        needed = {"state.json"}
        for student in settings.students:
            needed |= {f"{student.name}.safetensors", f"{student.name}.optimizer.safetensors"}
            needed |= {f"{student.name}.ema.safetensors"} if student.ema is not None else set()
        if missing := sorted(needed - manifest["files"].keys()):
            return f"manifest.json does not name {missing[0]}"
        steps = {manifest["step"], recipe.read_json(folder / "state.json", MAX_STATE_BYTES)["step"]}
        named = int(folder.name.removeprefix("step-"))
        if steps != {named}:
            return f"the folder's name says step {named}, its files {sorted(steps)}"
        if manifest["schema"] > 1 and manifest["settings_sha256"] != settings_digest(settings):
            return "it belongs to a run with other settings"
        return None
    except (OSError, recipe.RecipeError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def check_weights(student, step):
    """TrainingError for weights that are not finite: they are never saved."""
    for name, tensor in student.distilled.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise launch.TrainingError(
                f"student {student.name!r}: {name} is not finite at step {step}: not saved"
            )


def write_student(folder, student, sums, optimizer):
    """Write the tensors of a student into a checkpoint; returns the rest of its state, for JSON."""
    tensors, rest = split_optimizer_state(optimizer)
    write_tensors(folder / f"{student.name}.safetensors", student.distilled.state_dict())
    write_tensors(folder / f"{student.name}.optimizer.safetensors", tensors)
    if student.ema:
        write_tensors(folder / f"{student.name}.ema.safetensors", student.ema.module.state_dict())
    scaler = student.accelerator.scaler
    counters = {key: getattr(student, key) for key in COUNTERS}
    return {"optimizer": rest, "scaler": scaler.state_dict() if scaler else None, "sums": sums, **counters}


def restore_student(folder, student, state, device):
    """Continue from what `write_student` wrote."""
    student.distilled.load_state_dict(safetensors.torch.load_file(folder / f"{student.name}.safetensors"))
    tensors = safetensors.torch.load_file(folder / f"{student.name}.optimizer.safetensors")
    load_optimizer_state(student, join_optimizer_state(tensors, state["optimizer"]))
    if student.ema:
        student.ema.module.load_state_dict(
            safetensors.torch.load_file(folder / f"{student.name}.ema.safetensors")
        )
    if state["scaler"]:
        student.accelerator.scaler.load_state_dict(state["scaler"])
    student.sums = torch.tensor(state["sums"], device=device)
    state.setdefault("skipped_in_a_row", state.get("barren"))  # its name before
    for key in COUNTERS:
        setattr(student, key, state[key])


# ---------------------------------------------------------------- the state of an optimizer


def optimizer_state(student):
    """The optimizer's state_dict, whole on every process, whether DeepSpeed splits it or not."""
    if not launch.partitions_optimizer(student.accelerator):
        return student.optimizer.state_dict()

    from deepspeed.utils import safe_get_full_optimizer_state  # an optional package

    zero, states, groups = student.optimizer.optimizer, {}, []
    for parameters, group in zip(zero.bit16_groups, zero.optimizer.param_groups, strict=True):
        (flat,) = group["params"]  # all tensors of the group, joined, this process's share
        first = len(states)
        for i, parameter in enumerate(parameters, first):
            states[i] = {}
            for key, value in zero.optimizer.state[flat].items():
                whole = torch.is_tensor(value) and value.shape == flat.shape
                states[i][key] = safe_get_full_optimizer_state(parameter, key) if whole else value
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append(rest | {"params": list(range(first, len(states)))})
    return {"state": states, "param_groups": groups}


def load_optimizer_state(student, state_dict):
    """Continue from what `optimizer_state` gave; the weights of the module are loaded already."""
    if launch.partitions_optimizer(student.accelerator):
        return load_partitions(student.optimizer.optimizer, state_dict)
    if student.settings.optimizer.startswith("lamb") and any(
        "m" in state for state in state_dict["state"].values()
    ):
        raise launch.TrainingError(
            f"student {student.name!r}: the checkpoint is of an earlier version, with another LAMB: finish "
            "this run with commit 9ac8abc, or start again with --overwrite"
        )
    student.optimizer.load_state_dict(state_dict)
    for parameter, values in student.optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                # in the parameter's memory layout, as it was: LAMB's norms sum in that order, to the last bit
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_partitions(zero, state_dict):
    """This process's share of a whole state, for DeepSpeed's optimizer.

    DeepSpeed's public functions can set an optimizer's state only after the first step. So each tensor of the
    state goes into the float32 weights, where they are laid out alike, is copied from there, and the weights
    are set again at the end.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    first = 0
    groups = zip(zero.bit16_groups, zero.optimizer.param_groups, state_dict["param_groups"], strict=True)
    for parameters, group, saved in groups:
        (flat,) = group["params"]
        states = [state_dict["state"].get(i, {}) for i in range(first, first + len(parameters))]
        group |= {key: value for key, value in saved.items() if key != "params"}
        for key, value in states[0].items():
            if torch.is_tensor(value) and value.shape == parameters[0].shape:
                for parameter, state in zip(parameters, states, strict=True):
                    safe_set_full_fp32_param(parameter, state[key].to(parameter.device))
                value = flat.detach().clone()
            zero.optimizer.state[flat][key] = value
        first += len(parameters)
    zero.refresh_fp32_params()


def split_optimizer_state(state_dict):
    """An optimizer's state_dict as (tensors by "state.index.name" or "param_groups.index.name", the rest)."""
    tensors, rest = {}, {}
    groups = dict(enumerate(state_dict["param_groups"]))
    for part, entries in (("state", state_dict["state"]), ("param_groups", groups)):
        rest[part] = {}
        for index, values in entries.items():
            rest[part][index] = {k: v for k, v in values.items() if not torch.is_tensor(v)}
            tensors |= {f"{part}.{index}.{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return tensors, rest


def join_optimizer_state(tensors, rest):
    """The inverse of `split_optimizer_state`, after both halves went through files."""
    joined = {
        part: {int(index): dict(values) for index, values in entries.items()}
        for part, entries in rest.items()
    }
    for key, value in tensors.items():
        part, index, name = key.split(".", 2)
        joined[part][int(index)][name] = value
    return {"state": joined["state"], "param_groups": list(joined["param_groups"].values())}
