"""train.py: exact resume after stops and kills, students in company, teachers, recipes, errors before any
work.
"""

import copy
import functools
import json
import os
import random
import re
import shlex
import signal

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import (
    RECIPES,
    ROOT,
    SHARED,
    STREAM,
    STUDENT,
    assert_same_run,
    distilled,
    exit_code,
    final_state,
    forked,
    make_recipe,
    needs_imagenet,
    newest,
    photos,
    rows,
    run,
    run_until,
    saved,
    stopped,
    write,
)
from PIL import Image
from test_distill import ARGS, VIT, WEIGHTS, hint

import data
import distill
import evaluate
import launch
import models
import recipe
import sources
import train

MIX = dict(data__mixup=0.2, data__cutmix=1.0, data__drop_last=True, data__rand_augment="rand-m7-mstd0.5")

# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "changes, workers",
    [
        pytest.param(dict(epochs=1), 2, marks=pytest.mark.slow),
        (MIX | dict(batch_size_per_process=32, epochs=1), 0),
        (STREAM | {"epochs": 1}, 2),
    ],
    ids=["workers", "mixed and accumulated", "stream"],
)
def test_a_resumed_run_is_the_uninterrupted_one(changes, workers, tmp_path, teacher_file):
    """With dropout and three students, stopped inside an epoch, a log interval and a save interval."""
    path = write(tmp_path / "r.json", **distilled(teacher_file, save_every=7, **changes))
    whole = run(path, tmp_path / "whole", workers=workers)
    run_until(12, path, tmp_path / "parts", workers=workers)
    assert rows(tmp_path / "parts") != rows(tmp_path / "whole")  # the comparison can fail
    parts = run(path, tmp_path / "parts", "--resume", workers=workers)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for a, b in zip(parts["students"], whole["students"], strict=True):
        assert (a["last"], a["best"]) == (b["last"], b["best"])
    assert parts["steps"] == whole["steps"] and parts["limit"] is None


def test_a_finished_run_is_left_alone(tmp_path):
    path = write(tmp_path / "r.json", epochs=1)
    first = run(path, tmp_path / "out")
    again = run(path, tmp_path / "out", "--resume")
    assert first == again


def test_a_stream_is_resumed_with_as_many_readers(tmp_path, capsys):
    path, out = write(tmp_path / "r.json", **STREAM), tmp_path / "out"
    run_until(3, path, out, workers=2)
    code, message = stopped(capsys, path, out, "--resume")
    assert code == 2 and "the order of a stream depends on its readers: resume with --workers 2" in message


@pytest.mark.slow
def test_a_run_on_a_fraction_resumes_to_the_bit_and_says_so(tmp_path, teacher_file, capsys):
    changes = distilled(teacher_file, data__fraction=0.3, save_every=3)
    changes["students"] = [STUDENT, hint("crd")]  # a bank with a row for every image of the fraction
    path = write(tmp_path / "r.json", **changes)
    whole = run(path, tmp_path / "whole")
    assert whole["steps"] == 10
    assert "  data: 269 images (0.3 of each class) of digits" in capsys.readouterr().out
    run_until(4, path, tmp_path / "parts")
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    code, message = stopped(capsys, path, tmp_path / "parts", "--resume", "--set", "data.fraction=0.5")
    assert code == 2 and "data.fraction: 0.3 -> 0.5" in message


# ---------------------------------------------------------------- students


def test_a_student_learns_the_same_alone_and_in_company(tmp_path, teacher_file):
    changes, few = distilled(teacher_file, epochs=1), ("--limit", 4)
    changes["students"].append(hint("crd"))
    run(write(tmp_path / "r.json", **changes), tmp_path / "together", *few)
    names, reverse = ["alone", "kd", "dkd", "crd"], dict(changes, students=changes["students"][::-1])
    run(write(tmp_path / "reverse.json", **reverse), tmp_path / "reverse", *few)
    assert_same_run(tmp_path / "together", tmp_path / "reverse", students=names)
    for name in names:
        run(tmp_path / "r.json", tmp_path / name, "--students", name, *few)
        assert_same_run(tmp_path / "together", tmp_path / name, students=[name])


def test_students_are_chosen_by_name(tmp_path, capsys, teacher_file):
    path = write(tmp_path / "r.json", **distilled(teacher_file, epochs=1))
    code, message = stopped(capsys, path, tmp_path / "no", "--students", "kdd")
    assert code == 2 and "no student 'kdd' (students: alone, kd, dkd)" in message
    result = run(path, tmp_path / "out", "--students", "alone", "--limit", 1)
    assert [s["name"] for s in result["students"]] == ["alone"] and result["teacher"] is None


def test_the_losses_on_features_train_beside_a_logit_loss_and_resume_to_the_bit(tmp_path, teacher_file):
    students = [STUDENT, *(hint(name) for name in WEIGHTS)]
    changes = distilled(teacher_file, students=students, save_every=7, epochs=1)
    path = write(tmp_path / "r.json", **changes)
    whole = run(path, tmp_path / "whole")
    run_until(9, path, tmp_path / "parts")
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    first, *_, last = [row for row in rows(tmp_path / "whole") if "soft/crd" in row]
    assert all(0 < last[f"soft/{name}"] < first[f"soft/{name}"] for name in ("cc", "rkd", "reviewkd"))
    tensors, _ = final_state(tmp_path / "whole")
    assert {"crd.safetensors:soft.bank_student", "cc.safetensors:soft.embed_teacher.weight"} <= tensors.keys()
    assert any(key.startswith("reviewkd.optimizer.safetensors") for key in tensors)
    bank = tensors["crd.safetensors:soft.bank_student"]
    assert bank.shape == (898, ARGS["crd"]["dim"])
    assert (bank.norm(dim=1) - 1).abs().max() < 1e-5  # every image has been seen
    for name in WEIGHTS:
        exported = safetensors.torch.load_file(tmp_path / "whole" / "students" / name / "model.safetensors")
        plain = timm.create_model("cifar_resnet8", num_classes=10, **STUDENT["model_args"])
        assert exported.keys() == plain.state_dict().keys()  # no projector, no bank
    assert [s["parameters"] for s in whole["students"]] == [2718] * 5


def test_accumulated_batches_equal_the_large_one(tmp_path, teacher_file):
    """Without BatchNorm (a ViT) and for per-sample losses, up to rounding."""
    changes = distilled(teacher_file, students=[dict(STUDENT, **VIT)], epochs=1, data__drop_last=True)
    run(write(tmp_path / "one.json", **changes), tmp_path / "one", "--limit", 5)
    run(write(tmp_path / "four.json", **changes, batch_size_per_process=16), tmp_path / "four", "--limit", 5)
    one, four = final_state(tmp_path / "one")[0], final_state(tmp_path / "four")[0]
    for key in one:
        torch.testing.assert_close(one[key], four[key], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- teachers


def test_a_dead_loader_process_is_told_wherever_it_shows(tmp_path, capsys, monkeypatch):
    def step(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(train, "train", step)
    code, message = stopped(capsys, write(tmp_path / "r.json"), tmp_path / "out")
    assert code == 2 and "a worker process that loads images died: DataLoader worker (pid 7)" in message


def test_a_teacher_at_chance_level_stops_the_run(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), tmp_path / "t.pth")
    teacher = {"model": "cifar_resnet8", "checkpoint": str(tmp_path / "t.pth")}
    path = write(tmp_path / "r.json", teacher=teacher, students=[STUDENT])
    code, message = stopped(capsys, path, tmp_path / "out")
    assert code == 2 and f"teacher {tmp_path / 't.pth'} is at chance level: top-1" in message
    result = run(path, tmp_path / "trial", "--limit", 2)
    assert result["limit"] == result["steps"] == 2 and "warning: teacher" in capsys.readouterr().out


def test_an_untrained_teacher_is_for_trials_only(tmp_path, capsys):
    teacher = {"model": "cifar_resnet8", "model_args": {"widths": [4, 4, 8, 8]}, "pretrained": False}
    path = write(tmp_path / "r.json", teacher=teacher, students=[STUDENT])
    code, message = stopped(capsys, path, tmp_path / "run")
    assert code == 2 and f"{path}: teacher: expected one of recipe, checkpoint, pretrained" in message
    assert "untrained, which only a trial with --limit accepts" in message
    run(path, tmp_path / "run", "--limit", 1)
    assert "warning: teacher cifar_resnet8 is at chance level" in capsys.readouterr().out


BIG = dict(STUDENT, name="big", soft=None, model_args={})


def test_a_teacher_given_as_a_recipe_is_trained_first_and_once(tmp_path, capsys):
    """Also for a loss that is built for its shapes, before it is trained, and for more seeds."""
    write(tmp_path / "t.json", students=[BIG], epochs=2)
    path = write(tmp_path / "r.json", teacher={"recipe": "t.json"}, students=[hint("cc")], epochs=1, runs=2)
    runs = tmp_path / "runs"
    train.main([str(path), "--out", str(runs / "r"), "--workers", "0"])
    result, teacher = (json.loads((runs / name / "result.json").read_text()) for name in ("r/seed1", "t"))
    assert result["teacher"]["top1"] == teacher["students"][0]["last"]["top1"]
    assert result["teacher"]["name"] == str(runs / "t" / "students" / "big")
    run(path, runs / "second", "--set", "runs=1")
    assert json.loads((runs / "t" / "result.json").read_text()) == teacher
    assert_same_run(runs / "r" / "seed1", runs / "second")
    capsys.readouterr()
    write(tmp_path / "t.json", students=[BIG], epochs=9)
    code, message = stopped(capsys, path, runs / "third", "--set", "runs=1")
    assert code == 2 and f"{runs / 't'}: this teacher was trained with other settings than" in message
    assert "epochs: 2 -> 9" in message and not (runs / "third").exists()
    advice = shlex.split(message.partition("that you want: ")[2])
    train.main([str(path), "--out", str(runs / "third"), "--dry-run", *advice])
    assert "  teacher: cifar_resnet8, " in capsys.readouterr().out


def test_a_teacher_of_other_data_is_refused(tmp_path, capsys):
    """Data of another name, although finished or only begun; another spelling of the same folder is the
    same.
    """
    few = dict(
        data__classes=2, data__test_split="validation", batch_size=4, batch_size_per_process=4, epochs=1
    )
    folder = photos(tmp_path / "here", ["cat", "dog"])
    photos(tmp_path / "other", ["cat", "dog"])
    write(tmp_path / "t.json", students=[BIG], **few)
    path = write(tmp_path / "r.json", teacher={"recipe": "t.json"}, students=[STUDENT], **few)
    with pytest.raises(SystemExit):  # at chance level, but trained
        run(path, tmp_path / "r", "--data", folder)
    capsys.readouterr()
    other = tmp_path / "other"
    for _ in range(2):
        code, message = stopped(capsys, path, tmp_path / "second", "--data", other)
        assert code == 2 and f'data.source: "{folder}" -> "{other}"' in message
        assert (
            f"Choose another --out, beside which a teacher is trained anew, or remove {tmp_path / 't'}"
            in message
        )
        (tmp_path / "t" / "result.json").unlink(missing_ok=True)
    code, message = stopped(capsys, path, tmp_path / "second", "--data", tmp_path / "other" / ".." / "here")
    assert "at chance level" in message


def test_a_teacher_of_other_classes_is_refused(tmp_path, capsys):
    """Before anything is trained, where its recipe names its own data; and as an exported student."""
    few = dict(
        data__classes=2, data__test_split="validation", batch_size=4, batch_size_per_process=4, epochs=1
    )
    zoo = str(photos(tmp_path / "zoo", ["cat", "emu"]))
    farm = str(photos(tmp_path / "farm", ["cat", "dog"]))
    write(tmp_path / "t.json", students=[BIG], **few, data__source=zoo)
    student = dict(teacher={"recipe": "t.json"}, students=[STUDENT])
    path = write(tmp_path / "r.json", **student, **few, data__source=farm)
    told = "the teacher and the data have other classes: only in the teacher: 'emu'; only in the data: 'dog'"
    code, message = stopped(capsys, path, tmp_path / "out")
    assert code == 2 and told in message and not (tmp_path / "t").exists()
    run(tmp_path / "t.json", tmp_path / "t")
    code, message = stopped(capsys, path, tmp_path / "out")
    assert code == 2 and told in message and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_teacher_that_was_interrupted_is_continued(tmp_path, monkeypatch):
    """By the command that began it; its run is the uninterrupted one."""
    write(tmp_path / "t.json", students=[BIG], epochs=2, save_every=4)
    path = write(tmp_path / "r.json", teacher={"recipe": "t.json"}, students=[STUDENT], epochs=1)
    run(path, tmp_path / "whole" / "r")
    calls, original = [], distill.Student.step

    def deadly(student):
        calls.append(student)
        if len(calls) == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        original(student)

    out = tmp_path / "killed" / "r"
    with monkeypatch.context() as patch:
        patch.setattr(distill.Student, "step", deadly)
        assert exit_code(forked(lambda: run(path, out))) == -signal.SIGKILL
    assert newest(out.parent / "t") == 8
    run(path, out)
    assert_same_run(tmp_path / "whole" / "t", out.parent / "t")
    assert_same_run(tmp_path / "whole" / "r", out)


def test_a_teacher_recipe_must_fit(tmp_path, capsys):
    path, out = write(tmp_path / "r.json", teacher={"recipe": "t.json"}, students=[STUDENT]), tmp_path / "out"
    assert "t.json: cannot be read" in stopped(capsys, path, out)[1]
    write(tmp_path / "t.json", runs=2)
    assert "must train one student, once, without a teacher" in stopped(capsys, path, out)[1]
    write(tmp_path / "t.json", data__classes=11)
    assert "has 11 classes, this recipe 10" in stopped(capsys, path, out)[1]
    write(tmp_path / "t.json", students__0__optimizer="lamp")
    assert "student 'alone': " in stopped(capsys, path, out)[1]
    said = stopped(capsys, write(tmp_path / "r.json"), out, "--data", "/no\x1b[31m")[1]
    assert r"error: /no\x1b[31m: not a folder" in said
    assert not out.exists() and not (tmp_path / "t").exists()


# ---------------------------------------------------------------- own images


def test_own_images_in_one_command(tmp_path, capsys, monkeypatch):
    """Class folders without splits: classes counted, a tenth held out, teacher, two students, cards; then by
    timm.
    """
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "all", ["cat", dog := "d|o`g\x1b\n", "emu"], 20)
    (tmp_path / "all" / "train").rename("photos")
    path = ROOT / "recipes" / "own_images_small.json"
    result = run(path, tmp_path / "runs" / "small", "--data", "photos", "--limit", 2)
    printed = capsys.readouterr().out
    assert (
        "tested on 10 % of the images of each class of train" in printed and "54 images of photos" in printed
    )
    assert [student["name"] for student in result["students"]] == ["alone", "kd"]
    assert {student["last"]["n"] for student in result["students"]} == {6}
    assert result["recipe"]["data"]["classes"] == 3 and result["recipe"]["data"]["test_split"] == "held out"
    kd = tmp_path / "runs" / "small" / "students" / "kd"
    card = (kd / "README.md").read_text()
    assert "cifar_resnet8, 77,587 parameters, for images of 64 pixels and 3 classes (cat, d" in card
    assert r"(cat, d\|o\`g\\x1b\\n, emu)" in card and "\x1b" not in card
    assert "Distilled with 1 kd {'temperature': 1.0} + 1 cross_entropy from" in card
    assert "import cifar_resnet" in card
    assert "Trained on labels alone" in (kd.parent / "alone" / "README.md").read_text()
    evaluate.main([str(tmp_path / "runs" / "small"), "--json", "--workers", "0"])
    scores = json.loads(capsys.readouterr().out)  # of the images that were held out
    assert [(row["split"], row["n"]) for row in scores] == [("held out", 6)] * 2
    assert [row["top1"] for row in scores] == [student["last"]["top1"] for student in result["students"]]
    net = timm.create_model(f"local-dir:{kd}", pretrained=True)
    assert list(net.pretrained_cfg["label_names"]) == ["cat", dog, "emu"]


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path, capsys):
    write(tmp_path / "t.json", students=[BIG], epochs=2)
    path = write(tmp_path / "r.json", teacher={"recipe": "t.json"}, students=[STUDENT], runs=2)
    train.main([str(path), "--out", str(tmp_path / "out"), "--workers", "0", "--dry-run"])
    printed = capsys.readouterr().out
    assert (
        f"{tmp_path / 't'}: 2 epochs of 15 steps" in printed and f"{tmp_path / 'out'}: 2 epochs of" in printed
    )
    assert f"would write {tmp_path / 'out' / 'seed1'}, {tmp_path / 'out' / 'seed2'}, each with" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "t.json"]
    (tmp_path / "out" / "seed2").mkdir(parents=True)
    (tmp_path / "out" / "seed2" / "mine.txt").touch()
    with pytest.raises(SystemExit):
        train.main([str(path), "--out", str(tmp_path / "out"), "--workers", "0", "--dry-run"])
    assert "seed2: not empty, and not the folder of a run" in capsys.readouterr().err


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(students__0__model="resnet5O"), "timm has no model 'resnet5O', did you mean 'resnet50'?"),
        (dict(students__0__optimizer="lamp"), "Optimizer lamp not found in registry, did you mean 'lamb'?"),
        (dict(students__0__optimizer_args={"momentun": 1}), "student 'alone': "),
        (dict(students__0__hard__loss="crossentropy"), "unknown loss 'crossentropy'; known: cross_entropy, "),
        (dict(students__0__model_args={"width": 3}), "unexpected keyword argument 'width'"),
        (dict(data__source="/no/where"), "/no/where: not a folder"),
        (dict(data__classes=7), "10 classes found, the recipe's data.classes is 7"),
        (dict(data__source="x" * 5000), "x: not a folder"),
        (dict(data__rand_augment="x"), "no training view can be made with size 8, rand_augment 'x'"),
        (dict(seed=10**30), "seed: expected a number <= 9.22337e+18"),
        (dict(students__0__optimizer_args={"foreach": "x"}), "optimizer 'sgd' cannot be built with {"),
        (dict(students__0__model_args={"widths": [1]}), "cannot be built with {'widths': [1]}"),
        (dict(students__0__model_args={"widths": [10**7] * 4}), "can't allocate memory"),
        (dict(students__0__model_args={"features_only": True}), "'features_only' is not accepted"),
        (dict(students__0__model_args={"drop_rate": "x"}), "cannot take images of 8x8"),
    ],
    ids=str,
)
def test_errors_come_before_any_work(changes, message, tmp_path, capsys):
    code, text = stopped(capsys, write(tmp_path / "r.json", **changes), tmp_path / "out")
    assert code == 2 and message in text and not (tmp_path / "out").exists()
    assert ("student 'alone': " in text) == any(key.startswith("students") for key in changes)


@pytest.mark.parametrize(
    "loss, arguments, changes, message",
    [
        ("kd", {"temperature": 0}, {}, "temperature must be positive, got 0"),
        ("dkd", {"temperature": -1.0}, {}, "temperature must be positive, got -1.0"),
        ("dist", {"beta": [1, 2]}, {}, "loss 'dist': beta must be a number, got [1, 2]"),
        ("bkl", {"reduction": "x"}, {}, "bkl: reduction must be 'mean' or 'sum', got 'x'"),
        ("rkd", {}, dict(batch_size=1, batch_size_per_process=1), "it needs 2 or more"),
        ("reviewkd", {}, dict(batch_size=1, batch_size_per_process=1), "it needs 2 or more"),
        ("cc", {}, dict(batch_size=69, batch_size_per_process=69), "it needs 2 or more"),  # 898 = 13 * 69 + 1
        ("cc", {"dim": 0}, {}, "dim must be positive, got 0"),
        ("crd", {"negatives": 0}, {}, "negatives must be positive, got 0"),
    ],
)
def test_losses_that_cannot_work_are_refused(
    loss, arguments, changes, message, tmp_path, capsys, teacher_file
):
    """Before the teacher is trained or evaluated."""
    soft = {"loss": loss, "weight": 1.0, "warmup_epochs": 0, "args": arguments}
    changes = distilled(teacher_file, students=[dict(STUDENT, soft=soft)], **changes)
    code, text = stopped(capsys, write(tmp_path / "r.json", **changes), tmp_path / "out")
    assert code == 2 and "student 'kd': " in text and message in text
    assert not (tmp_path / "out").exists()


def test_losses_are_tried_without_a_trace(teacher_file):
    """CRD's memory and the order of random numbers are as without."""
    settings = make_recipe(**distilled(teacher_file, students=[hint("crd"), STUDENT]))
    loader = data.TrainLoader(settings.data, batch_size=64, batch_size_per_process=64)
    teacher = distill.build_teacher(settings.teacher, settings.data)
    states = []
    for tried in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not tried:
                patch.setattr(distill, "try_losses", lambda *_: None)
            built = train.build_students(settings, teacher, loader)
        states.append([module.state_dict() for module, _ in built])
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workers", "-1"], "argument --workers: expected a whole number, 0 or more, got '-1'"),
        (["--limit", "0"], "argument --limit: expected a whole number, 1 or more, got '0'"),
        (["--limit", "1.5"], "argument --limit: expected a whole number, 1 or more, got '1.5'"),
    ],
)
def test_numbers_of_the_command_line(flags, message, tmp_path, capsys):
    code, text = stopped(capsys, write(tmp_path / "r.json"), tmp_path / "out", *flags)
    assert code == 2 and message in text


def test_files_that_are_no_recipes_are_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        code, text = stopped(capsys, path, tmp_path / "out")
        assert code == 2 and f"{path}: not a file" in text
    for key, section in [("recipe", {}), ("checkpoint", {"model": "cifar_resnet8"})]:
        path = write(tmp_path / "r.json", teacher={key: "x" * 5000} | section, students=[STUDENT])
        code, text = stopped(capsys, path, tmp_path / "out")
        assert code == 2 and ("File name too long" if key == "recipe" else "no such file") in text


@pytest.mark.parametrize(
    "loss, message",
    [("kdd", "unknown loss 'kdd'; known: kd, dkd, "), ("dkd", "loss 'dkd' has no argument 'temp'")],
)
def test_unknown_losses_and_arguments_are_refused_by_name(loss, message, tmp_path, capsys, teacher_file):
    student = dict(STUDENT, soft={"loss": loss, "weight": 1.0, "warmup_epochs": 0, "args": {"temp": 4.0}})
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=[student]))
    code, text = stopped(capsys, path, tmp_path / "out")
    assert code == 2 and f"student 'kd': {message}" in text and not (tmp_path / "out").exists()


def test_the_command_line_is_frozen(capsys):
    """What belongs to a launch; everything that decides a result is in the recipe."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    usage = capsys.readouterr().out
    flags = [
        "--set",
        "--data",
        "--students",
        "--out",
        "--resume",
        "--overwrite",
        "--limit",
        "--dry-run",
        "--workers",
    ]
    assert all(flag in usage for flag in flags)
    assert usage.split("options:")[1].count("\n  --") == len(flags)


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(SystemExit) as caught:
        train.main([str(write(tmp_path / "r.json")), "--resume", "--overwrite"])
    assert caught.value.code == 2 and os.environ.get("WORLD_SIZE") is None


DIST = {"beta": 1.0, "gamma": 1.0, "temperature": 1.0}
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**30,
    0.0,
    1.0,
    -0.5,
    1e-9,
    1e300,
    "",
    "x",
    "kd",
    "sgd",
    "a\nb",
    "../x",
]
VALUES += [
    "/dev/zero",
    "https://example.com/x.json",
    "hf-hub:a/b",
    "cifar_resnet8",
    "é" * 5000,
    [],
    [0],
    [1, 2],
    {},
]
VALUES += [{"x": 1}, {"pretrained_cfg": {"url": "https://example.com/x"}}, {"widths": [1]}, [[]], {"": {}}]


def branches(tree, path=()):
    """The paths of all values in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from branches(value, (*path, key))


def mutated(tree, chance):
    """A copy of a recipe with one to three values replaced, removed, renamed or copied from elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.randint(1, 3)):
        paths = list(branches(tree))
        *parents, key = chance.choice(paths)
        node = functools.reduce(lambda node, step: node[step], parents, tree)
        elsewhere = functools.reduce(lambda node, step: node[step], chance.choice(paths), tree)
        how = chance.random()
        if how < 0.6:
            node[key] = chance.choice(VALUES)
        elif how < 0.8:
            node[key] = copy.deepcopy(elsewhere)
        elif how < 0.9 or not isinstance(node, dict):
            del node[key]
        else:
            node[f"{key}x"] = node.pop(key)
    return tree


def test_mutated_recipes_never_end_in_a_traceback(tmp_path, teacher_file):
    """The whole dry run: loading, data, networks, losses, optimizers. Either all is built or one line says
    why not.
    """
    chance, lead, built = random.Random(0), launch.make_accelerator(), 0
    options = train.make_parser("").parse_args(["r.json", "--workers", "0"])
    students = [
        STUDENT,
        hint("crd"),
        dict(STUDENT, name="dist", soft={**STUDENT["soft"], "loss": "dist", "args": DIST}),
    ]
    whole = json.loads(write(tmp_path / "r.json", **distilled(teacher_file, students=students)).read_text())
    for i in range(int(os.environ.get("FUZZ_RECIPES", 300))):
        path = tmp_path / "r.json"
        path.write_text(json.dumps(mutated(whole, chance)))
        try:
            train.prepare(path, [], tmp_path / "out", options, lead)
            built += 1
        except (recipe.RecipeError, sources.DataError, models.ModelError) as error:
            assert len(str(error).splitlines()) < 100
        except Exception as error:
            pytest.fail(f"recipe {i}: {type(error).__name__}: {error}\n{path.read_text()}")
    assert built >= 5 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what a run leaves behind


def test_what_a_run_leaves_behind(tmp_path, teacher_file, capsys):
    changes = distilled(teacher_file, runs=2, save_every=3, epochs=1)
    path, out = write(tmp_path / "r.json", **changes), tmp_path / "out"
    train.main([str(path), "--out", str(out), "--workers", "0"])
    summary = capsys.readouterr().out.strip().splitlines()[-5:]
    assert summary[0].split() == ["network", "parameters", "top1", "±", "top5", "±", "seeds", "n"]
    assert [line.split()[0] for line in summary[1:]] == ["teacher", "alone", "kd", "dkd"]
    assert [line.split()[-2] for line in summary[1:]] == ["1", "2", "2", "2"]
    assert sorted(p.name for p in out.iterdir()) == ["seed1", "seed2"]

    one = out / "seed1"
    files = {".lock", "checkpoints", "metrics.jsonl", "recipe.json", "result.json", "students"}
    names = {p.name for p in one.iterdir() if not p.name.startswith("events.")}
    assert names == files | {"alone", "kd", "dkd"}  # the last for TensorBoard
    assert [p.name for p in saved(one)] == ["step-00000012", "step-00000015"]
    result = json.loads((one / "result.json").read_text())
    facts = "command commit versions hardware precision seed steps epochs seconds images_per_second recipe"
    assert set(facts.split()) <= result.keys()
    assert result["steps"] == 15 and result["students"][1]["last"]["n"] == 899
    network, _ = models.load_exported(one / "students" / "kd")
    trained = safetensors.torch.load_file(saved(one)[-1] / "kd.safetensors")
    assert all(torch.equal(v, trained["net.model." + k]) for k, v in network.model.state_dict().items())
    assert not list(one.rglob("*.pkl")) and not list(one.rglob("*.bin"))
    assert recipe.load(one / "recipe.json").seed == 1


def test_a_seed_of_several_is_that_seed_alone(tmp_path, teacher_file):
    """One loader serves the seeds."""
    path, out = write(tmp_path / "r.json", **distilled(teacher_file)), tmp_path / "two"
    train.main([str(path), "--out", str(out), "--workers", "0", "--limit", "3", "--set", "runs=2"])
    run(path, tmp_path / "alone", "--limit", 3, "--set", "seed=2")
    assert_same_run(tmp_path / "alone", out / "seed2")


# ---------------------------------------------------------------- recipes


LOADED = {path: recipe.load(path) for path in RECIPES}
SMALL = [path for path, settings in LOADED.items() if (settings.data.classes or 3) < 1000]
IMAGENET = [path for path, settings in LOADED.items() if settings.data.source.startswith("ILSVRC")]


def generated(folder, section):
    """24 images of noise a split, of the recipe's size, columns and number of classes (else 3)."""
    chance = np.random.default_rng(0)
    names = [f"c{i}" for i in range(section.classes or 3)]
    kinds = {section.image: datasets.Image(), section.label: datasets.ClassLabel(names=names)}
    folder.mkdir()
    for split in (section.train_split or "train", section.test_split or "validation"):
        pixels = chance.integers(0, 256, (24, section.size, section.size, 3), dtype=np.uint8)
        labels = chance.integers(0, len(names), 24).tolist()
        columns = {section.image: list(map(Image.fromarray, pixels)), section.label: labels}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def slow_if_like_another(path):
    """Like another recipe with other networks of its family, losses, augmentation or without a teacher."""
    others = "res8x4|res32x4|res56_scratch|fraction_weak|ablation|own_images$|teacher"
    twin = re.search(others, path.stem)
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if twin else [])


@pytest.mark.parametrize("path", [slow_if_like_another(path) for path in SMALL])
def test_every_recipe_runs_two_steps(path, tmp_path):
    """On generated images, with an untrained teacher of another shape."""
    settings = LOADED[path]
    size = min(settings.data.size, 32)
    changes = [
        "batch_size=8",
        "batch_size_per_process=8",
        "data.train_size=null",
        "runs=1",
        f"data.size={size}",
    ]
    changes += [f"students.{i}.pretrained=false" for i in range(len(settings.students))]  # no hub in a test
    if settings.teacher:
        model, file = (
            timm.create_model("cifar_resnet8", num_classes=settings.data.classes or 3),
            tmp_path / "t.pth",
        )
        torch.save(model.state_dict(), file)
        changes.append("teacher=" + json.dumps(dict(model="cifar_resnet8", checkpoint=str(file))))
    source = "digits" if settings.data.source == "digits" else generated(tmp_path / "data", settings.data)
    result = run(path, tmp_path / "out", "--data", source, "--limit", 2, "--set", *changes)
    assert result["steps"] == 2 and len(result["students"]) == len(settings.students)
    first = rows(tmp_path / "out")[0]
    assert all(first[f"loss/{student.name}"] > 0 for student in settings.students)


@pytest.mark.slow
@needs_imagenet
@pytest.mark.parametrize("path", IMAGENET, ids=lambda p: p.stem)
def test_every_imagenet_recipe_runs_a_step_with_its_own_networks(path, tmp_path):
    """The whole path on real JPEGs: stream, repeats, mixing, the untrained teacher, one step, evaluation."""
    settings, out = LOADED[path], tmp_path / "out"
    changes = ["batch_size=4", "batch_size_per_process=4", "data.train_size=200"]
    changes += ["teacher.pretrained=false"] if settings.teacher else []
    result = run(path, out, "--data", SHARED / "imagenet_sample", "--limit", 1, "--set", *changes)
    names = [student.name for student in settings.students]
    assert result["steps"] == 1 and [s["name"] for s in result["students"]] == names
    assert all(s["last"]["n"] == 4 for s in result["students"])
    terms, scores = rows(out)
    assert all(0 < terms[f"loss/{name}"] < float("inf") for name in names)
    assert all(0 <= scores[f"top5/{name}"] <= 100 for name in names)
    assert all((saved(out)[-1] / f"{name}.safetensors").exists() for name in names)
