"""rundir.py: atomic files, a run's folder and its lock, hostile folders, what may change on resume."""

import json
import os
import shutil
import signal
import time

import pytest
from conftest import (
    STUDENT,
    assert_same_run,
    exit_code,
    forked,
    make_recipe,
    newest,
    photos,
    run,
    run_until,
    saved,
    stopped,
    write,
)

import rundir

# ---------------------------------------------------------------- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Also where the process dies before the new text is in place; nothing else is left in the folder."""
    file = tmp_path / "größe.json"
    rundir.write_atomic(file, "old ü")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGKILL))
        assert exit_code(forked(lambda: rundir.write_atomic(file, "new"))) == -signal.SIGKILL
    assert file.read_text(encoding="utf-8") == "old ü"
    rundir.write_atomic(file, "new")
    assert file.read_text() == "new"
    with pytest.raises(FileNotFoundError):
        rundir.write_atomic(tmp_path / "no" / "file", "x")


# ---------------------------------------------------------------- the folder of a run


def test_a_folder_is_one_runs_until_its_process_ends(tmp_path, capsys):
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"

    def hold():
        held = rundir.lock(out)
        (tmp_path / "held").touch()
        time.sleep(60)
        held.close()

    holder = forked(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    code, message = stopped(capsys, path, out, "--overwrite")
    assert code == 2 and f"another run holds it: process {holder} on" in message
    os.kill(holder, signal.SIGKILL)
    exit_code(holder)
    run(path, out, "--limit", 1)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, capsys):
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"
    first = run(path, out)
    code, message = stopped(capsys, path, out)
    assert (
        code == 2
        and f"{out}: holds a run: continue it with --resume or replace it with --overwrite" in message
    )
    assert json.loads((out / "result.json").read_text()) == first
    changed = write(tmp_path / "changed.json", epochs=1, seed=5, students__0__lr=0.07)
    code, message = stopped(capsys, changed, out, "--resume")
    assert code == 2 and "seed: 1 -> 5" in message and "students.0.lr: 0.05 -> 0.07" in message
    assert run(changed, out, "--overwrite")["seed"] == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for flag in ("--overwrite", "--resume"):
        code, message = stopped(capsys, path, tmp_path / "mine", flag)
        assert code == 2 and "not empty, and not the folder of a run (no recipe.json)" in message
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "checkpoints", "kd", "students/kd", "recipe.json"]
)
def test_a_symbolic_link_in_a_resumed_folder_is_refused(name, copied, tmp_path, capsys):
    """It could lead anywhere: whoever made the folder would have a file of the user's written to."""
    path, _, out = copied
    target, link = tmp_path / "elsewhere", out / name
    (out / "students" / "kd").mkdir(parents=True)
    if link.is_dir():
        shutil.copytree(link, target)
        shutil.rmtree(link)
    else:
        target.write_bytes(link.read_bytes())
        link.unlink()
    link.symlink_to(target)
    before = {p: p.read_bytes() for p in [target, *target.rglob("*")] if p.is_file()}
    code, message = stopped(capsys, path, out, "--resume")
    assert code == 2 and str(link) in message and ("symbolic link" in message or name == ".lock")
    assert {p: p.read_bytes() for p in [target, *target.rglob("*")] if p.is_file()} == before


def test_a_link_inside_of_a_checkpoint_is_refused_too(copied, tmp_path, capsys):
    path, _, out = copied
    file = saved(out)[-1] / "kd.safetensors"
    shutil.move(file, tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    code, message = stopped(capsys, path, out, "--resume")
    assert code == 2 and f"{file}: a symbolic link" in message


def test_the_folder_itself_may_be_a_link(copied, tmp_path):
    """runs/ on a larger disk."""
    path, whole, out = copied
    (tmp_path / "link").symlink_to(out)
    run(path, tmp_path / "link", "--resume")
    assert_same_run(whole, out)


def test_overwrite_removes_links_and_not_what_they_point_to(tmp_path):
    path, out, mine = write(tmp_path / "r.json", epochs=1), tmp_path / "out", tmp_path / "mine"
    run(path, out, "--limit", 1)
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    (out / "link").symlink_to(mine)
    run(path, out, "--overwrite", "--limit", 1)
    assert (mine / "thesis.tex").exists() and not (out / "link").is_symlink()


@pytest.mark.parametrize("name", ["kd", "checkpoints", "students", "metrics.jsonl", "result.json"])
def test_files_and_folders_are_not_taken_for_each_other(name, copied, capsys):
    path, _, out = copied
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir() if "." in name else (out / name).write_text("x")
    code, told = stopped(capsys, path, out, "--resume")
    assert code == 2 and f"{out / name}: expected a {'file' if '.' in name else 'folder'}" in told


@pytest.mark.parametrize("name", ["checkpoints", "result.json"])
def test_a_student_has_no_name_of_the_folder(name, tmp_path, capsys):
    code, told = stopped(capsys, write(tmp_path / "r.json", students__0__name=name), tmp_path / "out")
    assert code == 2 and f"students: a run's folder has {name} of its own: choose other names" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"limit": null, "steps": 15, "students": [1], "teacher": null}']
)
def test_a_forged_result_is_refused(text, copied, capsys):
    path, _, out = copied
    (out / "result.json").write_text(text)
    code, told = stopped(capsys, path, out, "--resume")
    assert code == 2 and f"{out / 'result.json'}: " in told and "not as it was written" in told


def test_a_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    path, file = write(tmp_path / "r.json", epochs=1), tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", tmp_path / ("x" * 300), "/proc/x"):
        code, told = stopped(capsys, path, out)
        assert code == 2 and f"{out}: the run's folder cannot be made or locked: " in told
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    code, told = stopped(capsys, path, tmp_path / "run")
    assert code == 2 and ".lock: the run's folder cannot be made or locked: Is a directory" in told
    assert file.read_text() == "mine"


# ---------------------------------------------------------------- resume with another recipe


def two_students():
    teacher = {"model": "cifar_resnet8", "checkpoint": "x.pth"}
    return dict(students=[dict(STUDENT, name="alone", soft=None), STUDENT], teacher=teacher)


@pytest.mark.parametrize(
    "changes, allowed",
    [
        (dict(log_every=7), True),
        (dict(save_every=9, evaluate_every=2), True),
        (dict(about="Said better."), True),
        (dict(data__max_broken=0.5), True),
        (dict(data__source="/elsewhere/digits"), True),
        (dict(students__1__grad_checkpointing=True), True),
        (dict(students__1__paper={"table": "9"}), True),
        (dict(epochs=9), False),
        (dict(seed=2), False),
        (dict(batch_size=32, batch_size_per_process=32), False),
        (dict(students__1__lr=0.5), False),
        (dict(students__1__soft__args__temperature=2.0), False),
        (dict(students__1__model_args={"widths": [4, 4, 8, 16]}), False),
        (dict(data__classes=11), False),
        (dict(data__hflip=0.5), False),
        (dict(data__fraction=0.5), False),
        (dict(teacher__checkpoint="y.pth"), False),
    ],
    ids=str,
)
def test_what_may_change_on_resume(changes, allowed):
    """The message names the key, the old value and the new one; the digest in a manifest agrees."""
    old, new = make_recipe(**two_students()), make_recipe(**two_students() | changes)
    lines = rundir.differences(old, new)
    assert bool(lines) != allowed and (allowed or " -> " in lines[0])
    assert (rundir.settings_digest(old) == rundir.settings_digest(new)) == allowed


def test_a_run_from_before_a_key_existed_goes_on(tmp_path):
    """What a key's default says is what the run did: no difference. Keys that were removed since are
    dropped.
    """
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"
    run_until(3, path, out)
    begun = json.loads((out / "recipe.json").read_text())
    del begun["data"]["fraction"], begun["students"][0]["grad_checkpointing"]
    begun["data"]["rand_augment_on"] = "cpu"
    (out / "recipe.json").write_text(json.dumps(begun))
    assert run(path, out, "--resume")["steps"] == 15
    # nor in the digest of the settings that its checkpoints have
    assert (
        "weights" not in rundir.consequential(begun["students"][0])
        and begun["students"][0]["weights"] is None
    )


def test_a_trial_is_never_continued_as_a_run(tmp_path, capsys):
    """Nor as a trial of other length, nor a run as a trial; where it is found, in the result or a
    checkpoint.
    """
    path, trial, begun = write(tmp_path / "r.json", epochs=1), tmp_path / "trial", tmp_path / "run"
    first = run(path, trial, "--limit", 2)
    run_until(2, path, begun)
    assert run(path, trial, "--limit", 2, "--resume") == first
    for removed in ("result.json", "nothing more"):
        for arguments in ((), ("--limit", 3)):
            code, message = stopped(capsys, path, trial, "--resume", *arguments)
            assert code == 2 and f"{trial}: holds a trial (--limit 2), which cannot be continued" in message
        (trial / removed).unlink(missing_ok=True)
    code, message = stopped(capsys, path, begun, "--resume", "--limit", "2")
    assert code == 2 and "a run without --limit, which cannot be continued as a trial (--limit 2)" in message
    assert run(path, begun, "--resume")["limit"] is None and newest(trial) == 2


def test_a_trial_is_stopped_and_goes_on_as_the_same_trial(tmp_path):
    path = write(tmp_path / "r.json", epochs=1)
    run(path, tmp_path / "whole", "--limit", 6)
    run_until(3, path, tmp_path / "parts", "--limit", 6)
    run(path, tmp_path / "parts", "--limit", 6, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_goes_on_with_the_data_it_began_with(tmp_path, capsys):
    """A folder may move; other classes, another order of them, or other images are refused."""

    here = dict(data__source=str(photos(tmp_path / "here", ["cat", "dog"])), data__classes=2, epochs=4)
    here |= dict(data__test_split="validation", batch_size=4, batch_size_per_process=4)
    path, out = write(tmp_path / "r.json", **here), tmp_path / "out"
    run_until(5, path, out)
    for folder, told in [
        (
            photos(tmp_path / "others", ["cat", "emu"]),
            "; only in the data: 'emu'",
        ),
        (photos(tmp_path / "more", ["cat", "dog"], 7), "began with 12 images, now there are 14"),
    ]:
        code, message = stopped(capsys, path, out, "--resume", "--data", folder)
        assert code == 2 and f"{out}" in message and told in message and newest(out) == 5
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert run(path, out, "--resume", "--data", tmp_path / "there")["steps"] == 12
