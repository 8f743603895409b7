"""checkpoint.py: what a checkpoint holds, damaged, forged and older ones, kills inside of a save."""

import hashlib
import json
import os
import shutil
import signal

import pytest
import safetensors.torch
import torch
from conftest import (
    STUDENT,
    assert_same_run,
    exit_code,
    final_state,
    forked,
    newest,
    rewrite,
    rows,
    run,
    run_until,
    saved,
    stopped,
    write,
)

import checkpoint
import recipe
import rundir

# ---------------------------------------------------------------- files


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


# ---------------------------------------------------------------- what a checkpoint is


def test_at_least_two_checkpoints_are_kept_and_hold_no_pickle(interrupted):
    path, whole, _ = interrupted
    folders = saved(whole)
    assert [folder.name for folder in folders] == ["step-00000012", "step-00000015"]
    names = {p.name for p in folders[-1].iterdir()}
    students = ("alone", "kd")
    assert names == {"manifest.json", "state.json"} | {
        f"{name}.{kind}" for name in students for kind in ("safetensors", "optimizer.safetensors")
    }
    manifest = json.loads((folders[-1] / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    expected = dict(schema=2, step=15, epoch=1.0, batch_size=64, processes=1)
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["settings_sha256"] == rundir.settings_digest(recipe.load(path))
    for folder in folders:
        assert checkpoint.problem_of(folder, recipe.load(path)) is None


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
        rewrite(folder, manifest.name, lambda m: m["files"].pop("kd.safetensors"))
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
    "not an object": "Input should be an object",
    "student not named": "manifest.json does not name kd.safetensors",
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
    (aside,) = (out / "checkpoints").glob(".bad-step-00000009-*")  # never deleted
    assert (aside / "state.json").exists()
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


def of_kd(**values):
    return lambda state: state["students"]["kd"].update(values)


@pytest.mark.parametrize(
    "file, forge, message",
    [
        (
            "state.json",
            lambda s: s.update(metrics_bytes=10**12),
            "at the newest checkpoint there were 1000000000000",
        ),
        ("state.json", lambda s: s.update(metrics_bytes=-1), "metrics_bytes: Input should be greater"),
        (
            "state.json",
            lambda s: s.update(step=10**9),
            "the folder's name says step 9, its files [9, 1000000000]",
        ),
        ("state.json", lambda s: s.update(seconds="x"), "seconds: Input should be a valid number"),
        ("state.json", lambda s: s.update(clock=None), "clock: Input should be an object"),
        ("state.json", lambda s: s.update(broken=[["a"]]), "broken.0"),
        ("state.json", lambda s: s.update(students={}), "does not hold what this run needs ('alone')"),
        ("state.json", of_kd(sums=[1.0]), "does not hold what this run needs (1 sums)"),
        ("state.json", of_kd(skipped="x"), "students.kd.skipped: Input should be a valid integer"),
        ("state.json", of_kd(last=[1]), "students.kd.last.Scores: Input should be an object"),
        (
            "state.json",
            of_kd(optimizer={"state": {"0": {}}, "param_groups": {}}),
            "does not hold what this run needs",
        ),
        ("manifest.json", lambda m: m.update(limit="x"), "limit: Input should be a valid integer"),
        ("manifest.json", lambda m: m.update(files=[]), "files: Input should be an object"),
    ],
    ids=range(13),
)
def test_forged_values_end_in_a_message(file, forge, message, copied, capsys):
    """A folder from others has right digests, whatever it says."""
    path, _, out = copied
    for folder in saved(out):
        rewrite(folder, file, forge)
    code, told = stopped(capsys, path, out, "--resume")
    assert code == 1 and message in told and "Traceback" not in told


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.unlink(), "0 bytes, at the newest checkpoint there were"),
        (
            lambda rows: rows.write_bytes(rows.read_bytes()[:50]),
            "50 bytes, at the newest checkpoint there were",
        ),
        (lambda rows: rows.write_bytes(b"\xff" * 10_000), "metrics.jsonl: damaged ("),
        (lambda rows: rows.write_text("[1]\n" * 9999), "metrics.jsonl: damaged ("),
    ],
    ids=["removed", "shortened", "garbage", "no rows"],
)
def test_a_log_that_is_not_the_runs_is_refused(change, message, copied, capsys):
    path, _, out = copied
    change(out / "metrics.jsonl")
    code, told = stopped(capsys, path, out, "--resume")
    assert code == 1 and message in told and "--overwrite" in told


def test_removed_checkpoints_are_noticed(copied, capsys):
    """`rm -r checkpoints` and --resume would throw away the log: the run has saved, so it does not start
    over.
    """
    path, _, out = copied
    shutil.rmtree(out / "checkpoints")
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
    run_until(3, path, out)
    folder = saved(out)[-1]
    file = folder / "kd.optimizer.safetensors"
    tensors = safetensors.torch.load_file(file)
    renamed = {k.replace("exp_avg_sq", "v").replace("exp_avg", "m"): v for k, v in tensors.items()}
    checkpoint.write_tensors(file, renamed)
    digest = {"bytes": file.stat().st_size, "sha256": rundir.sha256(file)}
    rewrite(folder, "manifest.json", lambda manifest: manifest["files"].update({file.name: digest}))
    as_schema_1(folder, {})
    code, message = stopped(capsys, path, out, "--resume")
    assert code == 1 and "student 'kd': the checkpoint is of an earlier version" in message
    assert "--overwrite" in message


# ---------------------------------------------------------------- killed while it saves


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """(recipe of one student without a teacher, folder of a run of it)."""
    folder = tmp_path_factory.mktemp("plain")
    path = write(folder / "r.json", save_every=3, epochs=1)
    run(path, folder / "whole")
    return path, folder / "whole"


@pytest.mark.parametrize(
    "moment",
    [
        "os.replace",
        pytest.param("os.fsync", marks=pytest.mark.slow),
        pytest.param("shutil.rmtree", marks=pytest.mark.slow),
        "safetensors.torch.save_file",
    ],
)
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


def test_resume_restores_any_optimizer(tmp_path):
    student, adamw = dict(STUDENT, soft=None, lr=5e-3, clip_grad=1.0), {"betas": [0.9, 0.95]}
    students = [
        dict(student, name=optimizer, optimizer=optimizer, optimizer_args=arguments)
        for optimizer, arguments in (("lamb", {}), ("adamw", adamw))
    ]
    path = write(tmp_path / "r.json", students=students, epochs=1)
    run(path, tmp_path / "whole")
    run_until(9, path, tmp_path / "parts")
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
