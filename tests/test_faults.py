"""What can go wrong while a run is left alone: kills, signals, full disks, broken images, infinite numbers.

Damaged checkpoints and locks are in test_checkpoint.py, the data's faults in test_data.py, those of
several processes in test_distributed.py. A longer soak:

    SOAK_SIGNALS=200 python -m pytest tests/test_faults.py -k soak -m ''
"""

import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    STREAM,
    STUDENT,
    assert_same_run,
    distilled,
    exit_code,
    final_state,
    forked,
    newest,
    run,
    run_until,
    saved,
    stopped,
    write,
)
from PIL import Image

import checkpoint
import distill
import launch
import log
import recipe

SIGNALS = int(os.environ.get("SOAK_SIGNALS", 8))


def small(teacher_file, **changes):
    students = [dict(STUDENT, name="alone", soft=None), STUDENT]
    return distilled(teacher_file, students=students, epochs=2, save_every=2, log_every=3) | changes


@pytest.fixture(scope="session")
def whole(tmp_path_factory, teacher_file):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run(write(folder / "r.json", **small(teacher_file)), folder / "out")
    return folder / "out"


def before_call(monkeypatch, owner, name, number, action):
    """`action(self)` happens before the call of a method with this number, counted from 1."""
    original, calls = getattr(owner, name), []

    def counted(self, *arguments, **named):
        calls.append(1)
        if len(calls) == number:
            action(self)
        return original(self, *arguments, **named)

    monkeypatch.setattr(owner, name, counted)


def send(number, times=1):
    def action(_):
        for _ in range(times):
            os.kill(os.getpid(), number)

    return action


# ---------------------------------------------------------------- kills


def being_saved(out):
    return any((out / "checkpoints").glob(".tmp-*"))


def in_a_group_of_its_own(*arguments, **named):
    os.setsid()
    run(*arguments, **named)


def interrupt(group, how):
    """End a run, at once or after it stood still."""
    if how == "stop and kill":
        os.kill(group, signal.SIGSTOP)
        time.sleep(0.1)
    if how == "stop, go on and kill":
        os.killpg(group, signal.SIGSTOP)
        time.sleep(0.1)
        os.killpg(group, signal.SIGCONT)
    if how == "terminate the group":
        os.killpg(group, signal.SIGTERM)
    if "kill" in how:
        os.kill(group, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("changes, workers", [({}, 0), (STREAM, 2)], ids=["mapped", "streamed"])
def test_a_soak_of_signals_ends_in_the_same_weights(changes, workers, tmp_path, teacher_file):
    """At random moments of start, steps, saves and evaluations: weights, state and metrics as without."""
    epochs = 2 + SIGNALS // 4
    changes = small(teacher_file, students=[STUDENT], epochs=epochs, save_every=1, evaluate_every=4) | changes
    path = write(tmp_path / "r.json", **changes)
    run(path, tmp_path / "whole", workers=workers)
    out, chance, sent, ends, unfinished = tmp_path / "interrupted", random.Random(0), [], set(), 0
    while not (out / "result.json").exists():
        start = newest(out)
        pid = forked(lambda: in_a_group_of_its_own(path, out, "--resume", workers=workers))
        # now and then before the first step, and now and then inside of a save
        early, inside = len(sent) % 8 == 7, len(sent) % 4 == 2
        patience = time.monotonic() + (chance.random() * 2 if early else 60)
        while newest(out) == start and time.monotonic() < patience and not (inside and being_saved(out)):
            time.sleep(0.001)
        if len(sent) < SIGNALS:
            time.sleep(0 if being_saved(out) else chance.random() * 0.15)
            hows = ["kill", "stop and kill", "stop, go on and kill", "terminate the group"]
            how = "kill" if inside else chance.choice(hows)
            with contextlib.suppress(ProcessLookupError):  # it may not have its group yet, or be through
                interrupt(pid, how)
                sent.append(how)
        ends.add(exit_code(pid))
        unfinished += being_saved(out)
    print(f"{collections.Counter(sent)}, {unfinished} inside a save, exit codes {ends}")
    assert len(sent) >= min(SIGNALS, 6) and unfinished and ends <= {0, 143, -signal.SIGTERM, -signal.SIGKILL}
    assert_same_run(tmp_path / "whole", out)
    assert not list((out / "checkpoints").glob(".*"))


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "owner, name, number, expected",
    [
        (distill.Teacher, "__call__", 5, 5),
        pytest.param(log.Log, "accuracy", 1, 15, marks=pytest.mark.slow),
        # inside of the only save, after the last step: nothing is left to stop
        pytest.param(log.Log, "state", 1, 30, marks=pytest.mark.slow),
    ],
    ids=["teacher", "evaluation", "save"],
)
def test_sigterm_saves_and_exits_with_143(
    owner, name, number, expected, tmp_path, teacher_file, whole, monkeypatch
):
    path, out = write(tmp_path / "r.json", **small(teacher_file, save_every=50)), tmp_path / "stopped"
    with monkeypatch.context() as patch:
        before_call(patch, owner, name, number, send(signal.SIGTERM))
        code = exit_code(forked(lambda: run(path, out)))
    assert code == 143 and not (out / "result.json").exists() and newest(out) == expected
    run(path, out, "--resume")
    assert_same_run(whole, out)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param(STREAM, marks=pytest.mark.slow)], ids=["mapped", "streamed"]
)
def test_sigterm_to_the_process_group_saves_and_exits_with_143(changes, tmp_path, teacher_file, monkeypatch):
    """What batch systems, `timeout` and systemd send: the loader's workers leave it to the trainer."""
    path = write(tmp_path / "r.json", **small(teacher_file, epochs=1, save_every=50) | changes)
    run(path, tmp_path / "whole", workers=2)
    with monkeypatch.context() as patch:
        before_call(patch, distill.Teacher, "__call__", 5, lambda _: os.killpg(0, signal.SIGTERM))
        code = exit_code(forked(lambda: in_a_group_of_its_own(path, tmp_path / "parts", workers=2)))
    assert code == 143 and newest(tmp_path / "parts") == 5
    run(path, tmp_path / "parts", "--resume", workers=2)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("times, step, code", [(1, 1, 130), (2, 0, 1)])
def test_the_first_ctrl_c_saves_and_the_second_leaves_at_once(
    times, step, code, tmp_path, teacher_file, monkeypatch
):
    path, out = write(tmp_path / "r.json", **small(teacher_file, save_every=50)), tmp_path / "out"
    before_call(monkeypatch, distill.Teacher, "__call__", 1, send(signal.SIGINT, times))
    assert exit_code(forked(lambda: run(path, out))) == code
    assert newest(out) == step


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_hands_sigterm_on(processes, tmp_path, teacher_file):
    """With `accelerate launch` and one process it would not arrive; with torchrun it does, and nothing is
    left over.
    """
    changes = small(teacher_file, epochs=400, save_every=1000, batch_size_per_process=32)
    path, out = write(tmp_path / "r.json", **changes), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    command += [str(ROOT / "train.py"), str(path), "--workers", "0", "--out", str(out)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(command, env=environment)
    while not (out / "metrics.jsonl").exists():
        assert parent.poll() is None
        time.sleep(0.1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) != 0 and newest(out) > 0
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout
    assert not left


# ---------------------------------------------------------------- disks


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, teacher_file, whole):
    path, out = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "full"

    def with_small_files():
        """No file may grow beyond 9000 bytes: what a full disk does, without root and without filling one."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        run(path, out, "--resume")

    run_until(6, path, out)
    assert exit_code(forked(with_small_files)) == launch.EXIT_UNSAVED
    assert newest(out) == 6 and checkpoint.problem_of(saved(out)[-1], recipe.load(path)) is None
    assert not list((out / "checkpoints").glob(".tmp-*"))
    run(path, out, "--resume")
    assert_same_run(whole, out)


def test_a_disk_that_has_room_again_gets_everything(tmp_path, teacher_file, whole, monkeypatch, capsys):
    """Two saves fail, the third works: the run is the same, with every row once."""
    path, out = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "out"
    original, calls = checkpoint.write_tensors, []

    def full(*arguments):
        calls.append(1)
        if len(calls) in (8, 9):
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    run(path, out)
    assert capsys.readouterr().out.count("the run goes on, older checkpoints are valid") == 2
    assert_same_run(whole, out)


def test_too_little_room_is_noticed_before_writing(tmp_path, teacher_file, monkeypatch, capsys):
    path, out = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    code, message = stopped(capsys, path, out)
    assert code == launch.EXIT_UNSAVED and newest(out) == 2
    assert "no checkpoint at step 8: 1,000 bytes are free" in message and "3 in a row" in message


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's thread ends
def test_a_folder_that_vanishes_stops_the_run(tmp_path, teacher_file, monkeypatch, capsys):
    path, out = write(tmp_path / "r.json", **small(teacher_file, epochs=3)), tmp_path / "out"

    def vanish(_):
        shutil.rmtree(out, ignore_errors=True)

    before_call(monkeypatch, distill.Teacher, "__call__", 6, vanish)
    code, message = stopped(capsys, path, out)
    assert code == launch.EXIT_UNSAVED and "3 in a row" in message


def test_paths_with_spaces_and_other_letters(tmp_path):
    folder = tmp_path / "ein Ordner, größer"
    folder.mkdir()
    run(write(folder / "Rezept ü.json", epochs=1), folder / "Lauf 1")
    assert newest(folder / "Lauf 1") == 15


# ---------------------------------------------------------------- broken images


def test_a_run_counts_its_broken_images(tmp_path, capsys):
    """Named once, in the log, the checkpoint and the result, over a resume, too; the run is the
    uninterrupted one.
    """
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(32):
                pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "photos/train/dog/7.png").write_bytes(b"<html>not found</html>")
    changes = dict(
        data__test_split="validation", data__classes=2, data__max_broken=0.05, save_every=3, log_every=4
    )
    changes |= dict(data__source=str(tmp_path / "photos"), batch_size=16, batch_size_per_process=16)
    path = write(tmp_path / "r.json", **changes)
    whole = run(path, tmp_path / "whole", workers=2)
    assert capsys.readouterr().out.count("7.png") == 1
    run_until(6, path, tmp_path / "parts")
    parts = run(path, tmp_path / "parts", "--resume")
    assert whole["broken_images"] == parts["broken_images"] == 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    code, message = stopped(capsys, path, tmp_path / "strict", "--set", "data.max_broken=0")
    assert code == 2 and "7.png" in message


# ---------------------------------------------------------------- numbers that are not finite


def poisoned(monkeypatch, steps):
    """The loss of student kd is NaN at these of its forwards."""
    original, calls = distill.Distilled.forward, []

    def forward(self, *arguments):
        terms = original(self, *arguments)
        if self.soft is not None:
            calls.append(1)
            if len(calls) in steps:
                terms["loss"] = terms["loss"] * float("nan")
        return terms

    monkeypatch.setattr(distill.Distilled, "forward", forward)


def test_a_loss_that_is_not_finite_stops_the_run_although_its_gradient_is(tmp_path, capsys, monkeypatch):
    """Results hold finite numbers."""
    original = distill.Distilled.forward

    def infinite(*arguments):
        terms = original(*arguments)
        return terms | {"loss": terms["loss"] + torch.inf}

    monkeypatch.setattr(distill.Distilled, "forward", infinite)
    code, message = stopped(capsys, write(tmp_path / "r.json"), tmp_path / "out", "--limit", 5)
    assert code == 1 and "student 'alone': the loss is inf by step 5, its gradients are finite" in message


def test_a_step_without_a_finite_gradient_counts_as_one_of_zeros(tmp_path, teacher_file, monkeypatch, capsys):
    """Momentum and weight decay act as by hand; the other student and the log go on; a resume counts on."""
    path = write(tmp_path / "r.json", **small(teacher_file, epochs=1, save_every=1))
    run(path, tmp_path / "plain")
    for steps in (4, 5):
        with monkeypatch.context() as patch:
            poisoned(patch, {5})
            run_until(steps, path, tmp_path / str(steps))
    (before, _), (after, state) = final_state(tmp_path / "4"), final_state(tmp_path / "5")
    settings = recipe.load(path)
    module, _ = distill.build_student(settings, settings.students[1])
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = state["kd"]["optimizer"]["param_groups"].values()
    optimizer = distill.optim.make_optimizer(module, settings.students[1])
    index = 0
    for group, built in zip(groups, optimizer.param_groups, strict=True):
        for parameter in built["params"]:
            weight = f"kd.safetensors:{names[id(parameter)]}"
            momentum = f"kd.optimizer.safetensors:state.{index}.momentum_buffer"
            expected = 0.9 * before[momentum] + group["weight_decay"] * before[weight]
            torch.testing.assert_close(after[momentum], expected, rtol=1e-5, atol=1e-8)
            expected = before[weight] - group["lr"] * expected
            torch.testing.assert_close(after[weight], expected, rtol=1e-5, atol=1e-8)
            index += 1
    assert index == len(names)

    run(path, tmp_path / "5", "--resume")
    assert_same_run(tmp_path / "plain", tmp_path / "5", students=["alone"])
    state = final_state(tmp_path / "5")[1]
    assert (state["kd"]["skipped"], state["alone"]["skipped"]) == (1, 0)
    told = (
        "student 'kd': gradient not finite in 1 of the last 3 steps, where it was replaced by zeros; 1 such "
        "steps by step 6"
    )
    assert told in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "5" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "steps",
    [range(7, 1000), pytest.param(range(2, 1000, 2), marks=pytest.mark.slow)],
    ids=["ten in a row", "more than 1 %"],
)
def test_too_many_of_them_stop_the_run_with_a_dump(steps, tmp_path, teacher_file, monkeypatch, capsys):
    path, out = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "out"
    poisoned(monkeypatch, steps)
    code, message = stopped(capsys, path, out)
    (dump,) = out.glob("not-finite-*.json")
    assert code == 1 and "student 'kd': gradient not finite in" in message and f"see {dump}" in message
    facts = json.loads(dump.read_text())
    assert facts["student"] == "kd" and facts["skipped"] >= log.MAX_SKIPPED_STEPS
    assert facts["step"] == (18 if steps[0] == 7 else 24) and facts["lr"] > 0
    assert facts["terms of the last batch"].keys() == {"loss", "hard", "soft"}
    assert len(facts["images of the last batch"]) in (2, 64)
    assert checkpoint.problem_of(saved(out)[-1], recipe.load(path)) is None


def test_weights_that_are_not_finite_are_never_saved(tmp_path, teacher_file, monkeypatch, capsys):
    path, out = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "out"

    def poison(log_):
        log_.students[1].net.model.bn1.running_var[0] = float("inf")

    before_call(monkeypatch, log.Log, "count_step", 5, poison)
    code, message = stopped(capsys, path, out)
    assert (
        code == 1 and "student 'kd': net.model.bn1.running_var is not finite at step 6: not saved" in message
    )
    assert newest(out) == 4


# ---------------------------------------------------------------- untrusted files, secrets


def test_tokens_of_the_environment_are_in_no_file(tmp_path, teacher_file, monkeypatch, capsys):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary-5e1f")
    run(write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "out", "--limit", 3)
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) > 10 and not [p for p in files if b"canary-5e1f" in p.read_bytes()]
    assert "canary-5e1f" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "text, message",
    [("[" * 100_000, "nested too deeply"), ('{"limit": null' + " " * (17 << 20), "larger than")],
)
def test_a_bomb_in_a_runs_folder_is_refused(text, message, tmp_path, capsys):
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"
    run(path, out, "--limit", 1)
    (out / "result.json").write_text(text)
    code, told = stopped(capsys, path, out, "--resume", "--limit", 1)
    assert code == 2 and message in told
