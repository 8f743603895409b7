"""Checkpoints of a run: one appears complete or not at all, and a resumed run equals the uninterrupted one.

A checkpoint is checkpoints/step-N: tensors as safetensors, the rest as JSON, and manifest.json with the
sha256 of every file, because neither safetensors nor the file system notices a flipped bit. It holds whole
tensors, whoever wrote it: a run goes on with another number of processes, with DeepSpeed or without.
"""

import json
import os
import shutil
import tempfile

import safetensors
import safetensors.torch
import timm
import torch
from accelerate.utils import gather_object
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict  # noqa: UP035  pydantic needs it before Python 3.12

import class_names
import launch
import recipe
import rundir

KEEP_CHECKPOINTS = 2
MAX_FAILED_SAVES = 3  # in a row; then the run stops
COUNTERS = ("skipped", "skipped_in_a_row", "last", "best")  # of a Student, saved as JSON


# ---------------------------------------------------------------- what state.json must hold


class StudentState(TypedDict):
    optimizer: dict
    scaler: dict | None
    sums: list[float] | float
    skipped: recipe.Whole
    skipped_in_a_row: NotRequired[recipe.Whole]  # once called barren
    barren: NotRequired[recipe.Whole]
    last: rundir.Scores | rundir.Precision | None
    best: rundir.Scores | None


class State(TypedDict):
    step: recipe.Whole
    workers: recipe.Whole
    broken: list[tuple[int, str]]
    images: NotRequired[recipe.Whole]  # older checkpoints lack these two
    classes: NotRequired[list[str] | None]
    seconds: float
    timed: tuple[recipe.Whole, float]
    clock: dict[str, dict[str, float]]
    metrics_bytes: recipe.Whole
    students: dict[str, StudentState]


STATE = TypeAdapter(State)


# ---------------------------------------------------------------- checkpoints


class Checkpoints:
    """Saves and restores one run. settings: its recipe, of one seed; lead: an Accelerator of the launch."""

    def __init__(self, folder, settings, lead):
        self.run_folder, self.folder = folder, folder / "checkpoints"
        self.settings, self.lead = settings, lead
        self.failed = 0  # saves in a row

    def save(self, step, students, log, loader):
        """A checkpoint after `step` steps; every process calls this, the main one writes.

        One that cannot be written is a warning; the third in a row raises TrainingError.
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
            state = {"step": step, "workers": loader.workers, "broken": broken, **log.state()}
            state |= {"images": loader.size, "classes": loader.split.names, "students": {}}
            for student, student_sums, optimizer in zip(students, sums, optimizers, strict=True):
                state["students"][student.name] = write_student(temporary, student, student_sums, optimizer)
            rundir.write_atomic(temporary / "state.json", json.dumps(state))
            manifest = self.manifest(temporary, step, log)
            rundir.write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            rundir.sync_directory(temporary)
            os.replace(temporary, self.folder / f"step-{step:08d}")
            rundir.sync_directory(self.folder)
            self.failed = 0
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # what a full disk raises
            self.failed += 1
            message = f"{self.run_folder}: no checkpoint at step {step}: {error}"
            if self.failed == MAX_FAILED_SAVES:
                message += f"; {MAX_FAILED_SAVES} in a row. Older ones are valid: make room and --resume"
                raise launch.TrainingError(message, launch.EXIT_UNSAVED) from error
            self.lead.print(f"warning: {message}; the run goes on, older checkpoints are valid")
        finally:
            self.remove_old()

    def check_space(self):
        """Make the folder; OSError without room for 1.2 times the last checkpoint."""
        self.folder.mkdir(exist_ok=True)  # not its parents: a run's folder that was removed is an error
        self.remove_old()
        if saved := rundir.checkpoints(self.run_folder):
            needed = int(1.2 * sum(path.stat().st_size for path in saved[-1].iterdir()))
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(f"{free:,} bytes are free, {needed:,} are needed")

    def remove_old(self):
        """Remove all but the newest checkpoints, and what a killed save left behind."""
        for path in [*rundir.checkpoints(self.run_folder)[:-KEEP_CHECKPOINTS], *self.folder.glob(".tmp-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def manifest(self, folder, step, log):
        return {
            "schema": 2,  # 1 had recipe_sha256, of the whole recipe.json
            "step": step,
            "epoch": step / log.steps_per_epoch,
            "limit": log.limit,  # not None: a trial
            "settings_sha256": rundir.settings_digest(self.settings),
            "processes": self.lead.num_processes,
            "batch_size": self.settings.batch_size,
            "versions": {module.__name__: module.__version__ for module in (torch, timm)},
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": rundir.sha256(path)}
                for path in sorted(folder.iterdir())
            },
        }

    def restore(self, students, log, loader):
        """Bring a run to its newest valid checkpoint; returns its step, 0 for a run that has never saved.

        Rows that were logged after it are cut off. Damaged checkpoints are renamed .bad-*, never deleted.
        TrainingError where a run has saved and no valid checkpoint is left: it does not start over by itself.
        """
        newest = self.newest_valid(log)
        if newest is None:
            log.restore(None)
            return 0
        state = recipe.read_json(newest / "state.json", rundir.MAX_STATE_BYTES)
        self.check_data(state, loader)
        loader.broken = dict(state["broken"])
        log.restore(state)
        try:
            for student in students:
                restore_student(newest, student, state["students"][student.name], self.lead.device)
        except launch.TrainingError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise launch.TrainingError(
                f"{newest}: does not hold what this run needs ({error}), although its digests are right: it "
                "was written by another program; start again with --overwrite"
            ) from error
        return state["step"]

    def newest_valid(self, log):
        """The newest checkpoint that is as it was written; newer ones are set aside. None: never saved."""
        newest, damaged = None, {}
        for path in reversed(rundir.checkpoints(self.run_folder)):
            problem = problem_of(path, self.settings)
            if problem is None:
                newest = path
                break
            damaged[path] = f"{path} is damaged ({problem})"
        if newest is None:
            if damaged or list(self.folder.glob(".bad-*")):
                advice = f"{self.run_folder}: no valid checkpoint is left; --overwrite starts again"
                raise launch.TrainingError("\n".join([*damaged.values(), advice]))
            if log.last_step() > (self.settings.save_every or log.steps_per_epoch):
                raise launch.TrainingError(
                    f"{log.path} reaches step {log.last_step()}, but {self.folder} has no checkpoint: put it "
                    "back, or start again with --overwrite"
                )
        self.lead.wait_for_everyone()
        for path, message in damaged.items():
            self.lead.print(f"warning: {message}, renamed .bad-*; going on from {newest.name}")
            if self.lead.is_main_process:
                os.replace(path, tempfile.mkdtemp(prefix=f".bad-{path.name}-", dir=self.folder))
        return newest

    def check_data(self, state, loader):
        """RecipeError if a resumed run has other images, classes or readers than at the checkpoint's time."""
        images, classes, names = state.get("images"), state.get("classes"), loader.split.names
        if images not in (None, loader.size):
            raise recipe.RecipeError(
                f"{self.run_folder}: began with {images:,} images, now there are {loader.size:,}"
            )
        if classes and names:
            class_names.check_same(classes, names, f"the run in {self.run_folder}")
        if self.settings.data.streaming and state["workers"] != loader.workers:
            raise recipe.RecipeError(
                f"{self.run_folder}: the order of a stream depends on its readers: resume with "
                f"--workers {state['workers']}"
            )


def problem_of(folder, settings):
    """What is wrong with a checkpoint of a run with these settings, or None."""
    try:
        manifest = rundir.read_checked(folder / "manifest.json", rundir.MANIFEST)
        for name, written in manifest["files"].items():
            path = folder / name
            if path.name != name or path.is_symlink():
                return f"manifest.json names {name!r}, which is not a plain file of its folder"
            if path.stat().st_size != written["bytes"] or rundir.sha256(path) != written["sha256"]:
                return f"{name} is not what was written"
        needed = {"state.json"} | {name for student in settings.students for name in files_of(student)}
        if missing := sorted(needed - manifest["files"].keys()):
            return f"manifest.json does not name {missing[0]}"
        steps = {manifest["step"], rundir.read_checked(folder / "state.json", STATE)["step"]}
        named = int(folder.name.removeprefix("step-"))
        if steps != {named}:
            return f"the folder's name says step {named}, its files {sorted(steps)}"
        if manifest["schema"] > 1 and manifest["settings_sha256"] != rundir.settings_digest(settings):
            return "it belongs to a run with other settings"
        return None
    except (OSError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    except recipe.RecipeError as error:
        return str(error)


def check_weights(student, step):
    """TrainingError for weights that are not finite: they are never saved."""
    for name, tensor in student.distilled.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise launch.TrainingError(
                f"student {student.name!r}: {name} is not finite at step {step}: not saved"
            )


def write_tensors(path, tensors):
    # copies, because DeepSpeed's weights are views of one flat tensor, and safetensors refuses shared memory
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def files_of(student):
    """Names of the files of a recipe.Student in a checkpoint: weights, optimizer, perhaps the average."""
    kinds = ["", ".optimizer"] if student.ema is None else ["", ".optimizer", ".ema"]
    return [f"{student.name}{kind}.safetensors" for kind in kinds]


def write_student(folder, student, sums, optimizer):
    """Write the tensors of a student into a checkpoint; returns the rest of its state, for JSON."""
    tensors, rest = split_optimizer_state(optimizer)
    contents = [student.distilled.state_dict(), tensors]
    contents += [student.ema.module.state_dict()] if student.ema else []
    for name, content in zip(files_of(student.settings), contents, strict=True):
        write_tensors(folder / name, content)
    scaler = student.accelerator.scaler
    counters = {key: getattr(student, key) for key in COUNTERS}
    return {"optimizer": rest, "scaler": scaler.state_dict() if scaler else None, "sums": sums, **counters}


def restore_student(folder, student, state, device):
    """Continue from what `write_student` wrote."""
    weights, tensors, *average = (
        safetensors.torch.load_file(folder / name) for name in files_of(student.settings)
    )
    student.distilled.load_state_dict(weights)
    load_optimizer_state(student, join_optimizer_state(tensors, state["optimizer"]))
    if average:
        student.ema.module.load_state_dict(average[0])
    if state["scaler"]:
        student.accelerator.scaler.load_state_dict(state["scaler"])
    student.sums = torch.tensor(state["sums"], device=device)
    if student.sums.ndim and len(student.sums) != len(student.terms) + 1:
        raise ValueError(f"{len(student.sums)} sums")
    state.setdefault("skipped_in_a_row", state.get("barren"))  # its name before
    for key in COUNTERS:
        setattr(student, key, state[key])


# ---------------------------------------------------------------- the state of an optimizer


def optimizer_state(student):
    """The optimizer's state_dict, whole on every process, whether DeepSpeed splits it or not."""
    if not launch.partitions_optimizer(student.accelerator):
        return student.optimizer.state_dict()

    from deepspeed.utils import safe_get_full_fp32_param  # an optional package

    zero, states, groups = student.optimizer.optimizer, [], []
    for parameters, group in zip(zero.bit16_groups, zero.optimizer.param_groups, strict=True):
        (flat,) = group["params"]  # all tensors of the group, joined, this process's share
        indices, weights = range(len(states), len(states) + len(parameters)), flat.detach().clone()
        states += [{} for _ in parameters]
        for key, value in zero.optimizer.state[flat].items():
            partitioned = torch.is_tensor(value) and value.shape == flat.shape
            if partitioned:
                # DeepSpeed gathers weights, which lie as the state does; its function for the state knows
                # only the tensors that were there at the first step
                flat.data.copy_(value)
            for i, parameter in zip(indices, parameters, strict=True):
                states[i][key] = safe_get_full_fp32_param(parameter) if partitioned else value
        flat.data.copy_(weights)
        groups.append(group | {"params": list(indices)})
    return {"state": dict(enumerate(states)), "param_groups": groups}


def load_optimizer_state(student, state_dict):
    """Continue from what `optimizer_state` gave; the weights of the module are loaded already."""
    if launch.partitions_optimizer(student.accelerator):
        return load_partitions(student.optimizer.optimizer, state_dict)
    lamb = student.settings.optimizer.startswith("lamb")
    if lamb and any("m" in state for state in state_dict["state"].values()):
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
        group |= saved | {"params": group["params"]}
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
    """The inverse of `split_optimizer_state`, after both halves went through files; changes `rest`."""
    for key, value in tensors.items():
        part, index, name = key.split(".", 2)
        rest[part][index][name] = value
    state = {int(index): values for index, values in rest["state"].items()}
    return {"state": state, "param_groups": list(rest["param_groups"].values())}
