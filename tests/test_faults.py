"""What can go wrong while a run is left alone: kills, signals, full disks, damaged files, numbers that are not finite.

The rows are those of the design's table of 36 faults; the data's are in test_data_faults.py, the processes' in test_distributed.py.
A longer soak: SOAK_KILLS=200 python -m pytest tests/test_faults.py -k soak
"""

import ast
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
from conftest import ROOT, STUDENT, distilled, write
from PIL import Image
from test_train import assert_same_run, forked, newest, run

import models
import recipe
import train

KILLS = int(os.environ.get("SOAK_KILLS", 40))


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for_step(out, step, pid):
    while newest(out) < step:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.005)


def small(teacher_file, **changes):
    return distilled(teacher_file, epochs=2, save_every=2, log_every=3) | changes


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_file):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run(write(folder / "r.json", **small(teacher_file)), folder / "out")
    return folder / "out"


# ---------------------------------------------------------------- 1, 2, 33: kills


def test_a_soak_of_kills_ends_in_the_same_weights(tmp_path, teacher_file):
    """SIGKILL at random moments of start, steps, saves and evaluations; weights, state and metrics as if nothing had been."""
    epochs = 1 + KILLS // 10
    path = write(tmp_path / "r.json", **small(teacher_file, epochs=epochs, save_every=1, evaluate_every=4))
    run(path, tmp_path / "whole")
    out, chance, kills, unfinished = tmp_path / "killed", random.Random(0), 0, 0
    while not (out / "result.json").exists():
        start = newest(out)
        pid = forked(lambda: run(path, out, "--resume"))
        patience = time.monotonic() + (chance.random() * 2 if kills % 8 == 7 else 60)  # now and then before the first step
        while newest(out) == start and time.monotonic() < patience and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        if kills < KILLS:
            time.sleep(chance.random() * 0.15)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        unfinished += bool(list((out / "checkpoints").glob(".tmp-*")))
    print(f"{kills} kills, {unfinished} of them inside a save")
    assert kills >= min(KILLS, 20) and unfinished
    assert_same_run(tmp_path / "whole", out)
    assert not list((out / "checkpoints").glob(".*"))


# ---------------------------------------------------------------- 3, 4, 36: signals


@pytest.mark.parametrize("moment", ["teach", "log_accuracy", "write_checkpoint"])
def test_sigterm_saves_and_exits_with_143(moment, tmp_path, teacher_file, whole, monkeypatch):
    path, out = write(tmp_path / "r.json", **small(teacher_file, save_every=50)), tmp_path / "stopped"
    original, calls = getattr(train, moment), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 1 + 4 * (moment == "teach"):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, moment, interrupted)
        code = exit_code(forked(lambda: run(path, out)))
    if moment == "write_checkpoint":  # the last step's: nothing is left to stop
        assert code in (0, 143)
    else:
        assert code == 143 and not (out / "result.json").exists() and newest(out) == {"teach": 5, "log_accuracy": 15}[moment]
    run(path, out, "--resume")
    assert_same_run(whole, out)


def test_the_first_ctrl_c_saves_and_the_second_leaves_at_once(tmp_path, teacher_file, monkeypatch):
    path, original = write(tmp_path / "r.json", **small(teacher_file, save_every=50)), train.teach

    def interrupted(times):
        def teach(*arguments):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            return original(*arguments)

        return teach

    for times, saved in ((1, 1), (2, 0)):
        out = tmp_path / f"ctrl-c-{times}"
        with monkeypatch.context() as patch:
            patch.setattr(train, "teach", interrupted(times))
            code = exit_code(forked(lambda out=out: run(path, out)))
        assert newest(out) == saved and (code == 130) == bool(saved)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_hands_sigterm_on(processes, tmp_path, teacher_file):
    """With `accelerate launch` and one process it would not arrive (README); with torchrun it does, and nothing is left over."""
    changes = small(teacher_file, epochs=400, save_every=1000, batch_size_per_process=32)
    path, out = write(tmp_path / "r.json", **changes), tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [*command, str(ROOT / "train.py"), str(path), "--workers", "0", "--out", str(out)], env=environment
    )
    while not (out / "metrics.jsonl").exists():
        assert parent.poll() is None
        time.sleep(0.1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) != 0 and newest(out) > 0
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout
    assert not left


# ---------------------------------------------------------------- 5, 34: disks


def with_small_files(function, limit):
    """No file may grow beyond `limit` bytes: what a full disk does, without root and without filling one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    function()


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, teacher_file, whole):
    path, out = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "full"
    run(path, out, "--limit", "6")
    assert exit_code(forked(lambda: with_small_files(lambda: run(path, out, "--resume"), 9000))) == train.EXIT_UNSAVED
    assert newest(out) == 6 and train.problem_of(train.checkpoints(out)[-1]) is None
    assert not list((out / "checkpoints").glob(".tmp-*"))
    run(path, out, "--resume")
    assert_same_run(whole, out)


def test_a_disk_that_has_room_again_gets_everything(tmp_path, teacher_file, whole, monkeypatch, capsys):
    """Two saves and a log row fail, the third works: the run is the same, with every row once."""
    path, out, original, calls = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "out", train.write_tensors, []

    def full(*arguments):
        calls.append(1)
        if len(calls) in (8, 9):
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(train, "write_tensors", full)
    run(path, out)
    assert capsys.readouterr().out.count("the run goes on, older checkpoints are valid") == 2
    assert_same_run(whole, out)


def test_too_little_room_is_noticed_before_writing(tmp_path, teacher_file, monkeypatch, capsys):
    path, out = write(tmp_path / "r.json", **small(teacher_file)), tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(SystemExit) as stop:
        run(path, out)
    assert stop.value.code == train.EXIT_UNSAVED and newest(out) == 2
    assert "1,000 bytes are free" in capsys.readouterr().err


def test_a_folder_that_vanishes_stops_the_run(tmp_path, teacher_file, monkeypatch, capsys):
    path, out, original = write(tmp_path / "r.json", **small(teacher_file, epochs=3)), tmp_path / "out", train.teach

    def vanish(run_, images):
        if run_.step == 5:
            shutil.rmtree(out, ignore_errors=True)
        return original(run_, images)

    monkeypatch.setattr(train, "teach", vanish)
    with pytest.raises(SystemExit) as stop:
        run(path, out)
    assert stop.value.code == train.EXIT_UNSAVED and "3 in a row" in capsys.readouterr().err


def test_paths_with_spaces_and_other_letters(tmp_path):
    folder = tmp_path / "ein Ordner, größer"
    folder.mkdir()
    run(write(folder / "Rezept ü.json", epochs=1), folder / "Lauf 1")
    assert newest(folder / "Lauf 1") == 15


# ---------------------------------------------------------------- 6, 7: damaged checkpoints


def damage(folder, kind):
    file = folder / "kd.safetensors"
    whole = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(whole[:-100])
    elif kind == "flipped bit":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif kind == "zeros":
        file.write_bytes(bytes(len(whole)))
    elif kind == "missing file":
        (folder / "kd.optimizer.safetensors").unlink()
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    elif kind == "bad manifest":
        (folder / "manifest.json").write_text('{"files": [')
    elif kind == "escape":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["../../recipe.json"] = manifest["files"]["state.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif kind == "bomb":
        (folder / "manifest.json").write_text("[" * 100_000)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, teacher_file):
    """(recipe, folder of a whole run, folder of one that stopped at step 9)."""
    folder = tmp_path_factory.mktemp("interrupted")
    path = write(folder / "r.json", **small(teacher_file, epochs=1))
    run(path, folder / "whole")
    run(path, folder / "parts", "--limit", "9")
    return path, folder / "whole", folder / "parts"


DAMAGES = ["truncated", "flipped bit", "zeros", "missing file", "no manifest", "bad manifest", "escape", "bomb"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(kind, interrupted, tmp_path, capsys):
    path, whole, parts = interrupted
    shutil.copytree(parts, tmp_path / "out")
    assert newest(tmp_path / "out") == 9
    damage(tmp_path / "out" / "checkpoints" / "step-00000009", kind)
    run(path, tmp_path / "out", "--resume")
    printed = capsys.readouterr().out
    assert "step-00000009 is damaged" in printed and "going on from step-00000008" in printed and "resumed at step 8" in printed
    assert (tmp_path / "out" / "checkpoints" / ".bad-step-00000009").is_dir()  # never deleted
    assert_same_run(whole, tmp_path / "out")


def test_without_a_valid_checkpoint_the_run_does_not_start_over(interrupted, tmp_path, capsys):
    path, _, parts = interrupted
    shutil.copytree(parts, tmp_path / "out")
    for folder in train.checkpoints(tmp_path / "out"):
        damage(folder, "flipped bit")
    for _ in range(2):  # nor when it is tried again
        with pytest.raises(SystemExit) as stop:
            run(path, tmp_path / "out", "--resume")
        assert stop.value.code == 1 and "no valid checkpoint is left; --overwrite starts again" in capsys.readouterr().err
    assert (tmp_path / "out" / "metrics.jsonl").stat().st_size


def test_at_least_two_checkpoints_are_kept_and_hold_no_pickle(interrupted):
    _, whole, _ = interrupted
    folders = train.checkpoints(whole)
    assert len(folders) == 2
    names = {p.name for p in folders[-1].iterdir()}
    assert names == {"manifest.json", "state.json"} | {
        f"{n}.{e}" for n in ("alone", "kd", "dkd") for e in ("safetensors", "optimizer.safetensors")
    }
    manifest = json.loads((folders[-1] / "manifest.json").read_text())
    assert manifest["step"] == 15 and manifest["batch_size"] == 64 and set(manifest["files"]) == names - {"manifest.json"}


# ---------------------------------------------------------------- 8: broken images, in a run


def test_a_run_counts_its_broken_images(tmp_path, capsys):
    """Named once, in the log, the checkpoint and the result, over a resume, too; the run is the uninterrupted one."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(32):
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos/train/dog/7.png").write_bytes(b"<html>not found</html>")
    changes = dict(data__source=str(tmp_path / "photos"), data__test_split="validation", data__classes=2, data__max_broken=0.05)
    path = write(tmp_path / "r.json", **changes, batch_size=16, batch_size_per_process=16, save_every=3, log_every=4)
    whole = run(path, tmp_path / "whole", workers=2)
    assert capsys.readouterr().out.count("7.png") == 1
    run(path, tmp_path / "parts", "--limit", "6")
    parts = run(path, tmp_path / "parts", "--resume")
    assert whole["broken_images"] == parts["broken_images"] == 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(SystemExit) as stop:
        run(path, tmp_path / "strict", "--set", "data.max_broken=0")
    assert stop.value.code == 2 and "7.png" in capsys.readouterr().err


# ---------------------------------------------------------------- 14, 15: numbers


def poisoned(monkeypatch, steps):
    """The loss of student kd is NaN at these of its forwards."""
    original, calls = models.Distilled.forward, []

    def forward(self, *arguments):
        terms = original(self, *arguments)
        if self.soft is not None:
            calls.append(1)
            if len(calls) in steps:
                terms["loss"] = terms["loss"] * float("nan")
        return terms

    monkeypatch.setattr(models.Distilled, "forward", forward)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tmp_path, teacher_file, monkeypatch, capsys):
    """Weights and momenta stay as they were, the other student goes on, the log has finite numbers, and a resume counts on."""
    students = [dict(STUDENT, name="alone", soft=None), STUDENT]
    path = write(tmp_path / "r.json", **small(teacher_file, students=students, epochs=1, save_every=1))
    run(path, tmp_path / "plain")
    with monkeypatch.context() as patch:
        poisoned(patch, {5})
        run(path, tmp_path / "before", "--limit", "4")
    with monkeypatch.context() as patch:
        poisoned(patch, {5})
        run(path, tmp_path / "after", "--limit", "5")
    kept = [
        train.safetensors.torch.load_file(train.checkpoints(tmp_path / n)[-1] / "kd.optimizer.safetensors")
        for n in ("before", "after")
    ]
    assert all(torch.equal(kept[0][k], kept[1][k]) for k in kept[0])
    before, after = (
        train.safetensors.torch.load_file(train.checkpoints(tmp_path / n)[-1] / "kd.safetensors") for n in ("before", "after")
    )
    assert all(torch.equal(before[k], after[k]) for k in before if "running" not in k and "num_batches" not in k)
    run(path, tmp_path / "after", "--resume")
    assert_same_run(tmp_path / "plain", tmp_path / "after", students=["alone"])
    state = json.loads((train.checkpoints(tmp_path / "after")[-1] / "state.json").read_text())["students"]
    assert (state["kd"]["skipped"], state["alone"]["skipped"]) == (1, 0)
    told = "student 'kd': gradient not finite in 1 of the last 3 steps, which were skipped; 1 skipped by step 6"
    assert told in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "after" / "metrics.jsonl").read_text()


def test_too_many_of_them_stop_the_run_with_a_dump(tmp_path, teacher_file, monkeypatch, capsys):
    path = write(tmp_path / "r.json", **small(teacher_file))
    poisoned(monkeypatch, range(7, 1000))
    with pytest.raises(SystemExit) as stop:
        run(path, tmp_path / "out")
    assert stop.value.code == 1 and "the gradient is not finite at step" in capsys.readouterr().err
    (dump,) = (tmp_path / "out").glob("not-finite-*.json")
    told = json.loads(dump.read_text())
    assert (
        told["skipped"] >= train.MAX_SKIPPED_STEPS
        and len(told["images of the last batch"]) == 2
        and told["student"] in ("kd", "dkd")
    )
    assert train.problem_of(train.checkpoints(tmp_path / "out")[-1]) is None


def test_weights_that_are_not_finite_are_never_saved(tmp_path, teacher_file, monkeypatch, capsys):
    path, original = write(tmp_path / "r.json", **small(teacher_file)), train.teach

    def poison(run_, images):
        if run_.step == 5:
            run_.trainees[1].net.model.bn1.running_var[0] = float("inf")
        return original(run_, images)

    monkeypatch.setattr(train, "teach", poison)
    with pytest.raises(SystemExit):
        run(path, tmp_path / "out")
    assert "student 'kd': net.model.bn1.running_var is not finite at step 6: not saved" in capsys.readouterr().err
    assert newest(tmp_path / "out") == 4


# ---------------------------------------------------------------- 21: resume with another recipe


@pytest.mark.parametrize(
    "changes, allowed",
    [
        (dict(log_every=7), True),
        (dict(save_every=9, evaluate_every=2), True),
        (dict(about="Said better."), True),
        (dict(data__max_broken=0.5), True),
        (dict(epochs=9), False),
        (dict(seed=2), False),
        (dict(batch_size=32, batch_size_per_process=32), False),
        (dict(students__1__lr=0.5), False),
        (dict(students__1__soft__args__temperature=2.0), False),
        (dict(students__1__model_args={"widths": [4, 4, 8, 16]}), False),
        (dict(data__classes=11), False),
        (dict(data__hflip=0.5), False),
        (dict(data__fraction=0.5), False),
    ],
    ids=str,
)
def test_what_may_change_on_resume(changes, allowed, tmp_path):
    old, new = (
        json.loads(recipe.dump(recipe.load(write(tmp_path / "r.json", **c))))
        for c in (two_students(), two_students() | changes)
    )
    lines = train.differences(old, new)
    assert bool(lines) != allowed and (allowed or " -> " in lines[0])


def two_students():
    return dict(
        students=[dict(STUDENT, name="alone", soft=None), STUDENT], teacher={"model": "cifar_resnet8", "checkpoint": "x.pth"}
    )


# ---------------------------------------------------------------- 23: two runs, one folder


def test_a_folder_is_one_runs_until_its_process_ends(tmp_path, capsys):
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"

    def hold():
        held = train.lock(out)
        (tmp_path / "held").touch()
        time.sleep(60)
        held.close()

    holder = forked(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(SystemExit) as stop:
        run(path, out, "--overwrite")
    assert stop.value.code == 2 and f"another run holds it: process {holder} on" in capsys.readouterr().err
    os.kill(holder, signal.SIGKILL)
    exit_code(holder)
    run(path, out)


# ---------------------------------------------------------------- 29 to 32: untrusted files, secrets


def test_nothing_is_unpickled():
    """Our files call no torch.load and no pickle; timm's loader is called with weights_only=True; no remote code, no eval."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func)
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system", "__import__"), (path, name)
            assert "trust_remote_code" not in keywords and keywords.get("shell") != "True"
            if name.endswith(("torch.load", "load_state_dict")) and "weights_only" in keywords:
                assert keywords["weights_only"] == "True"
            assert name != "torch.load" or keywords.get("weights_only") == "True", path
    assert "weights_only=True" in (ROOT / "models.py").read_text()


def test_tokens_of_the_environment_are_in_no_file(tmp_path, teacher_file, monkeypatch, capsys):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "canary-5e1f")
    run(write(tmp_path / "r.json", **small(teacher_file, epochs=1)), tmp_path / "out")
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(files) > 10 and not [p for p in files if b"canary-5e1f" in p.read_bytes()]
    assert "canary-5e1f" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "text, message", [("[" * 100_000, "nested too deeply"), ('{"limit": null' + " " * (17 << 20), "larger than")]
)
def test_a_bomb_in_a_runs_folder_is_refused(text, message, tmp_path, capsys):
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"
    run(path, out)
    (out / "result.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run(path, out, "--resume")
    assert stop.value.code == 2 and message in capsys.readouterr().err
