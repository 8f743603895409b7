"""checkpoint.py: atomic files, a run's folder and its lock, what may change on resume, damaged and older checkpoints."""

import hashlib
import json
import os
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch
from conftest import (
    STUDENT,
    assert_same_run,
    distilled,
    exit_code,
    final_state,
    forked,
    make_recipe,
    newest,
    rows,
    run,
    saved,
    stopped,
    write,
)

import checkpoint
import recipe


def small(teacher_file, **changes):
    return distilled(teacher_file, epochs=1, save_every=2, log_every=3) | changes


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, teacher_file):
    """(recipe, folder of a whole run, folder of one that stopped at step 9)."""
    folder = tmp_path_factory.mktemp("interrupted")
    path = write(folder / "r.json", **small(teacher_file))
    run(path, folder / "whole")
    run(path, folder / "parts", "--limit", "9")
    return path, folder / "whole", folder / "parts"


@pytest.fixture
def copied(interrupted, tmp_path):
    """(recipe, folder of the whole run, a copy of the folder of the one that stopped)."""
    path, whole, parts = interrupted
    shutil.copytree(parts, tmp_path / "out")
    return path, whole, tmp_path / "out"


# ---------------------------------------------------------------- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Also where the process dies before the new text is in place; nothing else is left in the folder."""
    file = tmp_path / "größe.json"
    checkpoint.write_atomic(file, "old ü")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGKILL))
        assert exit_code(forked(lambda: checkpoint.write_atomic(file, "new"))) == -signal.SIGKILL
    assert file.read_text(encoding="utf-8") == "old ü"
    checkpoint.write_atomic(file, "new")
    assert file.read_text() == "new"
    with pytest.raises(FileNotFoundError):
        checkpoint.write_atomic(tmp_path / "no" / "file", "x")


def test_tensors_that_share_memory_are_written_each(tmp_path):
    """As DeepSpeed's weights, views of one flat tensor; in any memory layout."""
    flat = torch.arange(48.0)
    tensors = {"a": flat[:24].view(2, 3, 2, 2), "b": flat[24:], "c": flat}
    tensors["a"] = tensors["a"].to(memory_format=torch.channels_last)
    checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    loaded = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], v) for k, v in tensors.items())


def test_the_state_of_an_optimizer_survives_files(tmp_path):
    """Tensors in the state and in the groups, numbers, and numbers as keys."""
    state = {
        "state": {
            0: {"exp_avg": torch.rand(3), "step": torch.tensor(2.0), "n": 5},
            11: {"exp_avg": torch.rand(2)},
        },
        "param_groups": [
            {"lr": 0.1, "step": torch.tensor(7), "params": [0]},
            {"lr": 0.2, "betas": [0.9, 0.99], "params": [11]},
        ],
    }
    tensors, rest = checkpoint.split_optimizer_state(state)
    checkpoint.write_tensors(tmp_path / "t.safetensors", tensors)
    loaded = safetensors.torch.load_file(tmp_path / "t.safetensors")
    again = checkpoint.join_optimizer_state(loaded, json.loads(json.dumps(rest)))
    pairs = [(state["state"][i], again["state"][i]) for i in (0, 11)]
    pairs += zip(state["param_groups"], again["param_groups"], strict=True)
    assert again["state"].keys() == {0, 11}
    for before, after in pairs:
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key]) if torch.is_tensor(value) else value == after[key]


# ---------------------------------------------------------------- the folder of a run


def test_a_folder_is_one_runs_until_its_process_ends(tmp_path, capsys):
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"

    def hold():
        held = checkpoint.lock(out)
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
    "name", [".lock", "metrics.jsonl", "checkpoints", "tensorboard", "students/kd", "recipe.json"]
)
def test_a_symbolic_link_in_a_resumed_folder_is_refused(name, copied, tmp_path, capsys):
    """It could lead anywhere: whoever made the folder would have a file of the user's written to."""
    path, _, out = copied
    target, link = tmp_path / "elsewhere", out / name
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
    lines = checkpoint.differences(old, new)
    assert bool(lines) != allowed and (allowed or " -> " in lines[0])
    assert (checkpoint.settings_digest(old) == checkpoint.settings_digest(new)) == allowed


def test_a_run_from_before_a_key_existed_goes_on(tmp_path):
    """What a key's default says is what the run did: no difference. Keys that were removed since are dropped."""
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"
    run(path, out, "--limit", 3)
    begun = json.loads((out / "recipe.json").read_text())
    del begun["data"]["fraction"], begun["students"][0]["grad_checkpointing"]
    begun["data"]["rand_augment_on"] = "cpu"
    (out / "recipe.json").write_text(json.dumps(begun))
    assert run(path, out, "--resume")["steps"] == 15


# ---------------------------------------------------------------- what a checkpoint is


def test_at_least_two_checkpoints_are_kept_and_hold_no_pickle(interrupted):
    path, whole, _ = interrupted
    folders = saved(whole)
    assert [folder.name for folder in folders] == ["step-00000014", "step-00000015"]
    names = {p.name for p in folders[-1].iterdir()}
    students = ("alone", "kd", "dkd")
    assert names == {"manifest.json", "state.json"} | {
        f"{name}.{kind}" for name in students for kind in ("safetensors", "optimizer.safetensors")
    }
    manifest = json.loads((folders[-1] / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    expected = dict(schema=2, step=15, epoch=1.0, batch_size=64, processes=1)
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["settings_sha256"] == checkpoint.settings_digest(recipe.load(path))
    for folder in folders:
        assert checkpoint.problem_of(folder, recipe.load(path)) is None


def rewrite(folder, name, change):
    """Change a JSON file of a checkpoint, and its digest in the manifest."""
    tree = json.loads((folder / name).read_text())
    change(tree)
    (folder / name).write_text(json.dumps(tree))
    if name != "manifest.json":
        content = (folder / name).read_bytes()
        digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        rewrite(folder, "manifest.json", lambda manifest: manifest["files"].update({name: digest}))


def damage(folder, kind):
    file, manifest = folder / "kd.safetensors", folder / "manifest.json"
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[:-100])
    elif kind == "flipped bit":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "zeros":
        file.write_bytes(bytes(len(content)))
    elif kind == "missing file":
        (folder / "kd.optimizer.safetensors").unlink()
    elif kind == "no manifest":
        manifest.unlink()
    elif kind == "bad manifest":
        manifest.write_text('{"files": [')
    elif kind == "escape":
        rewrite(
            folder,
            manifest.name,
            lambda m: m["files"].update({"../../recipe.json": m["files"]["state.json"]}),
        )
    elif kind == "bomb":
        manifest.write_text("[" * 100_000)
    elif kind == "not an object":
        manifest.write_text("[1, 2]")
    elif kind == "student not named":
        rewrite(folder, manifest.name, lambda m: m["files"].pop("dkd.safetensors"))
    elif kind == "state not named":
        rewrite(folder, manifest.name, lambda m: m["files"].pop("state.json"))
    elif kind == "other step in the manifest":
        rewrite(folder, manifest.name, lambda m: m.update(step=8))
    elif kind == "other step in the state":
        rewrite(folder, "state.json", lambda state: state.update(step=8))
    elif kind == "other settings":
        rewrite(folder, manifest.name, lambda m: m.update(settings_sha256="0" * 64))


DAMAGES = {
    "truncated": "kd.safetensors is not what was written",
    "flipped bit": "kd.safetensors is not what was written",
    "zeros": "kd.safetensors is not what was written",
    "missing file": "FileNotFoundError: .*kd.optimizer.safetensors",
    "no manifest": "manifest.json: cannot be read",
    "bad manifest": "manifest.json: not a JSON file",
    "escape": "manifest.json names '../../recipe.json', which is not a plain file of its folder",
    "bomb": "nested too deeply",
    "not an object": "TypeError",
    "student not named": "manifest.json does not name dkd.safetensors",
    "state not named": "manifest.json does not name state.json",
    "other step in the manifest": r"the folder's name says step 9, its files \[8, 9\]",
    "other step in the state": r"the folder's name says step 9, its files \[8, 9\]",
    "other settings": "it belongs to a run with other settings",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_wrong_with_a_checkpoint(kind, copied):
    path, _, out = copied
    folder, settings = saved(out)[-1], recipe.load(path)
    assert checkpoint.problem_of(folder, settings) is None
    damage(folder, kind)
    with pytest.raises(AssertionError, match=DAMAGES[kind]):
        raise AssertionError(checkpoint.problem_of(folder, settings))


def test_a_checkpoint_of_another_seed_or_under_another_name_is_not_taken(copied):
    """Folders that were copied by hand between runs of the same shape."""
    path, _, out = copied
    assert "other settings" in checkpoint.problem_of(saved(out)[-1], recipe.load(path, ["seed=7"]))
    renamed = saved(out)[-1].rename(out / "checkpoints" / "step-00000013")
    assert "the folder's name says step 13" in checkpoint.problem_of(renamed, recipe.load(path))


@pytest.mark.parametrize("kind", ["flipped bit", "missing file", "other step in the state", "other settings"])
def test_a_damaged_checkpoint_is_set_aside(kind, copied, capsys):
    path, whole, out = copied
    assert newest(out) == 9
    damage(saved(out)[-1], kind)
    run(path, out, "--resume")
    printed = capsys.readouterr().out
    assert "step-00000009 is damaged" in printed and "going on from step-00000008" in printed
    assert "resumed at step 8" in printed
    assert (out / "checkpoints" / ".bad-step-00000009").is_dir()  # never deleted
    assert_same_run(whole, out)


def test_without_a_valid_checkpoint_the_run_does_not_start_over(copied, capsys):
    path, _, out = copied
    for folder in saved(out):
        damage(folder, "flipped bit")
    before = (out / "metrics.jsonl").read_bytes()
    for _ in range(2):  # nor when it is tried again
        code, message = stopped(capsys, path, out, "--resume")
        assert code == 1 and "no valid checkpoint is left; --overwrite starts again" in message
    assert (out / "metrics.jsonl").read_bytes() == before


def test_removed_checkpoints_are_noticed(copied, capsys):
    """`rm -r checkpoints` and --resume would throw away the log: the run has saved, so it does not start over."""
    path, _, out = copied
    shutil.rmtree(out / "checkpoints")
    (out / "result.json").unlink()
    before = (out / "metrics.jsonl").read_bytes()
    code, message = stopped(capsys, path, out, "--resume")
    assert code == 1 and "reaches step 9, but" in message and "checkpoints has no checkpoint" in message
    assert (out / "metrics.jsonl").read_bytes() == before
    assert run(path, out, "--overwrite", "--limit", 1)["steps"] == 1


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    path, out = write(tmp_path / "r.json", log_every=1, save_every=5, epochs=1), tmp_path / "out"
    run(path, tmp_path / "whole")

    def deadly(self, step, *_):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", deadly)
        assert exit_code(forked(lambda: run(path, out))) == -signal.SIGKILL
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5] and not newest(out)
    run(path, out, "--resume")
    assert_same_run(tmp_path / "whole", out)


# ---------------------------------------------------------------- checkpoints of earlier versions


def as_schema_1(folder, tree):
    """Turn a checkpoint into what was written before schema 2: other names, a digest of the whole recipe."""

    def state_before(state):
        for student in state["students"].values():
            student["barren"] = student.pop("skipped_in_a_row")

    def manifest_before(manifest):
        manifest["schema"] = 1
        del manifest["settings_sha256"]
        manifest["recipe_sha256"] = hashlib.sha256(json.dumps(tree).encode()).hexdigest()

    rewrite(folder, "state.json", state_before)
    rewrite(folder, "manifest.json", manifest_before)


def test_a_run_of_an_earlier_version_goes_on_to_the_same_bits(copied):
    path, whole, out = copied
    begun = json.loads((out / "recipe.json").read_text())
    begun["data"]["rand_augment_on"], begun["teacher"]["memo"] = "cpu", None
    (out / "recipe.json").write_text(json.dumps(begun))
    for folder in saved(out):
        as_schema_1(folder, begun)
    run(path, out, "--resume")
    assert not list((out / "checkpoints").glob(".bad-*"))
    assert_same_run(whole, out)
    assert all("barren" not in student for student in final_state(out)[1].values())


def test_an_earlier_versions_own_lamb_is_refused(tmp_path, capsys):
    """Its moments had other names; timm's LAMB would start from nothing without a word."""
    student = dict(STUDENT, soft=None, optimizer="lamb", optimizer_args={}, lr=5e-3)
    path, out = write(tmp_path / "r.json", students=[student]), tmp_path / "out"
    run(path, out, "--limit", 3)
    folder = saved(out)[-1]
    file = folder / "kd.optimizer.safetensors"
    tensors = safetensors.torch.load_file(file)
    renamed = {k.replace("exp_avg_sq", "v").replace("exp_avg", "m"): v for k, v in tensors.items()}
    checkpoint.write_tensors(file, renamed)
    digest = {"bytes": file.stat().st_size, "sha256": checkpoint.sha256(file)}
    rewrite(folder, "manifest.json", lambda manifest: manifest["files"].update({file.name: digest}))
    as_schema_1(folder, {})
    code, message = stopped(capsys, path, out, "--resume")
    assert code == 1 and "student 'kd': the checkpoint is of an earlier version" in message
    assert "--overwrite" in message


# ---------------------------------------------------------------- killed while it saves


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(recipe of one student without a teacher, folder of a run of it)."""
    folder = tmp_path_factory.mktemp("plain")
    path = write(folder / "r.json", save_every=5)
    run(path, folder / "whole")
    return path, folder / "whole"


@pytest.mark.parametrize("moment", ["os.replace", "os.fsync", "shutil.rmtree", "safetensors.torch.save_file"])
def test_a_run_killed_inside_a_save_resumes(moment, plain, tmp_path, monkeypatch):
    path, whole = plain
    out = tmp_path / "killed"
    owner = {"os": os, "shutil": shutil, "safetensors": safetensors.torch}[moment.split(".")[0]]
    name = moment.split(".")[-1]
    original, calls = getattr(owner, name), []

    def deadly(*arguments, **named):
        calls.append(len(saved(out)) >= 2)
        if sum(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        assert exit_code(forked(lambda: run(path, out))) == -signal.SIGKILL
    run(path, out, "--resume")
    assert_same_run(whole, out)
    # nothing else is left over
    assert not [p.name for p in (out / "checkpoints").iterdir() if not p.name.startswith("step-")]


@pytest.mark.parametrize("optimizer, arguments", [("lamb", {}), ("adamw", {"betas": [0.9, 0.95]})])
def test_resume_restores_any_optimizer(optimizer, arguments, tmp_path):
    student = dict(STUDENT, soft=None, optimizer=optimizer, optimizer_args=arguments, lr=5e-3, clip_grad=1.0)
    path = write(tmp_path / "r.json", students=[student])
    run(path, tmp_path / "whole")
    run(path, tmp_path / "parts", "--limit", 20)
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
