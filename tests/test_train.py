"""train.py: exact resume after stops and kills, students in company, schedules, folders, teachers, results."""

import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import time

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, SHARED, STUDENT, distilled, make_recipe, needs_imagenet, tree, write
from timm.scheduler import CosineLRScheduler

import models
import recipe
import train

MIX = dict(data__mixup=0.2, data__cutmix=1.0, data__drop_last=True, data__rand_augment="rand-m7-mstd0.5")


def run(path, out, *arguments, workers=0):
    train.main([str(path), "--out", str(out), "--workers", str(workers), *map(str, arguments)])
    return json.loads((out / "result.json").read_text())


def rows(out):
    """The metrics, without what a clock says."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("speed/", "seconds/"))} for line in lines]


def final_state(out):
    """Every tensor and number of the last checkpoint: weights, optimizer, sums, best."""
    folder = train.checkpoints(out)[-1]
    tensors = {f"{p.name}:{k}": v for p in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(p).items()}
    return tensors, json.loads((folder / "state.json").read_text())["students"]


def assert_same_run(a, b, students=None):
    (tensors, state), (others, other_state) = final_state(a), final_state(b)
    for key in tensors if students is None else [k for k in tensors if k.split(".")[0] in students]:
        assert torch.equal(tensors[key], others[key]), key
    for name in students or state:
        assert state[name] == other_state[name]
    if students is None:
        assert tensors.keys() == others.keys() and rows(a) == rows(b)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "changes, workers",
    [
        (dict(save_every=7), 2),  # dropout, 2 workers, three students, checkpoints inside an epoch and a log interval
        (dict(save_every=7, **MIX), 0),
        (dict(save_every=7, batch_size_per_process=32), 0),  # accumulation
        (dict(save_every=7, data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=64), 2),
    ],
    ids=["workers", "mix", "accumulate", "stream"],
)
def test_a_resumed_run_is_the_uninterrupted_one(changes, workers, tmp_path, teacher_file):
    path = write(tmp_path / "r.json", **distilled(teacher_file, **changes))
    whole = run(path, tmp_path / "whole", workers=workers)
    run(path, tmp_path / "parts", "--limit", 12, workers=workers)  # inside an epoch, a log and a save interval
    assert rows(tmp_path / "parts") != rows(tmp_path / "whole")  # the comparison can fail
    parts = run(path, tmp_path / "parts", "--resume", workers=workers)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [(s["last"], s["best"]) for s in parts["students"]] == [(s["last"], s["best"]) for s in whole["students"]]
    assert parts["steps"] == whole["steps"] and parts["limit"] is None


@pytest.mark.parametrize("optimizer, arguments", [("lamb", {}), ("adamw", {"betas": [0.9, 0.95]})])
def test_resume_restores_any_optimizer(optimizer, arguments, tmp_path):
    student = dict(STUDENT, soft=None, optimizer=optimizer, optimizer_args=arguments, lr=5e-3, clip_grad=1.0)
    path = write(tmp_path / "r.json", students=[student])
    run(path, tmp_path / "whole")
    run(path, tmp_path / "parts", "--limit", 20)
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def forked(function):
    """`function()` in a child process with everything imported already: a fresh one would spend its life importing."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        code = 1
        try:
            function()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    return pid


def newest(out):
    return max([int(p.name[5:]) for p in train.checkpoints(out)], default=0)


@pytest.mark.parametrize("workers", [2])  # without any: the soak of test_faults.py
def test_a_killed_run_resumes_to_the_same_weights(workers, tmp_path, teacher_file):
    """SIGKILL at random moments, each time resumed, until it gets through."""
    path, out = write(tmp_path / "r.json", **distilled(teacher_file, save_every=2, epochs=3, log_every=3)), tmp_path / "killed"
    run(path, tmp_path / "whole")
    chance, kills = random.Random(workers), 0
    while not (out / "result.json").exists():
        pid, goal = forked(lambda: run(path, out, "--resume", workers=workers)), newest(out) + chance.randint(2, 8)
        while newest(out) < goal and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.2)  # somewhere in a step, a save, an evaluation
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it may be through
            os.kill(pid, signal.SIGKILL)
            kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert kills >= 4
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("moment", ["os.replace", "os.fsync", "shutil.rmtree", "safetensors.torch.save_file"])
def test_a_run_killed_inside_a_save_resumes(moment, tmp_path, monkeypatch):
    path, out = write(tmp_path / "r.json", save_every=5), tmp_path / "killed"
    run(path, tmp_path / "whole")
    owner, name = {"os": os, "shutil": shutil, "safetensors": safetensors.torch}[moment.split(".")[0]], moment.split(".")[-1]
    original, calls = getattr(owner, name), []

    def deadly(*arguments, **named):
        calls.append(len(train.checkpoints(out)) >= 2)
        if sum(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        assert os.waitpid(forked(lambda: run(path, out)), 0)[1] == signal.SIGKILL
    run(path, out, "--resume")
    assert_same_run(tmp_path / "whole", out)
    assert not [p.name for p in (out / "checkpoints").iterdir() if not p.name.startswith("step-")]  # no litter


def test_a_finished_run_is_left_alone(tmp_path):
    path = write(tmp_path / "r.json", epochs=1)
    first = run(path, tmp_path / "out")
    again = run(path, tmp_path / "out", "--resume")
    assert first == again


# ---------------------------------------------------------------- students


def test_a_student_learns_the_same_alone_and_in_company(tmp_path, teacher_file):
    changes = distilled(teacher_file, epochs=1)
    run(write(tmp_path / "r.json", **changes), tmp_path / "together")
    reverse = dict(changes, students=changes["students"][::-1])
    run(write(tmp_path / "reverse.json", **reverse), tmp_path / "reverse")
    assert_same_run(tmp_path / "together", tmp_path / "reverse", students=["alone", "kd", "dkd"])
    for name in ("alone", "kd", "dkd"):
        run(tmp_path / "r.json", tmp_path / name, "--students", name)
        assert_same_run(tmp_path / "together", tmp_path / name, students=[name])


def test_accumulated_batches_equal_the_large_one(tmp_path, teacher_file):
    """Without BatchNorm (a ViT) and for per-sample losses, up to rounding."""
    vit = dict(
        model="vit_tiny_patch16_224", model_args={"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3}
    )
    students = [dict(STUDENT, **vit, optimizer="sgd")]
    changes = distilled(teacher_file, students=students, epochs=1, data__drop_last=True)
    run(write(tmp_path / "one.json", **changes), tmp_path / "one")
    run(write(tmp_path / "four.json", **changes, batch_size_per_process=16), tmp_path / "four")
    one, four = final_state(tmp_path / "one")[0], final_state(tmp_path / "four")[0]
    for key in one:
        torch.testing.assert_close(one[key], four[key], rtol=1e-4, atol=1e-5)


def test_one_batch_can_be_learnt_by_heart(tmp_path, teacher_file):
    """With labels the loss falls to nothing; with the teacher alone the student's probabilities become the teacher's."""
    teacher = models.build("cifar_resnet8", classes=10, size=8, model_args={"widths": [8, 8, 16, 16]}, checkpoint=teacher_file)
    labels = dict(
        STUDENT, name="labels", model_args={}, optimizer="adamw", optimizer_args={}, lr=5e-3, weight_decay=0.0, soft=None
    )
    taught = dict(labels, name="taught", hard=dict(STUDENT["hard"], weight=0.0))
    taught["soft"] = {"loss": "kd", "weight": 1.0, "warmup_epochs": 0, "args": {"temperature": 1.0}}
    settings = make_recipe(**distilled(teacher_file, students=[labels, taught]))
    images, target = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    with torch.no_grad():
        logits = teacher.eval()(images)
    for student in settings.students:
        accelerator = train.Accelerator()
        module, optimizer = accelerator.prepare(*train.make_student(settings, student))
        trainee = train.Trainee(student, accelerator, module.train(), optimizer, None)
        for _ in range(300):
            trainee.sums = 0.0
            train.learn(trainee, images, (logits, None), target, None, student.lr, train.soft_weight_at(0, student.soft))
        if student.name == "labels":
            assert trainee.sums[train.TERMS.index("hard")] < 0.01
        else:
            assert (module.net(images).softmax(1) - logits.softmax(1)).abs().max() < 0.03


def test_the_teacher_is_not_touched(tmp_path, teacher_file):
    settings = make_recipe(**distilled(teacher_file))
    options = train.Options(None, None, None, False, False, 0)
    teacher, scores = train.make_teacher(settings, tmp_path / "r.json", tmp_path / "out", options, train.Accelerator())
    before = copy.deepcopy(teacher.state_dict())
    made = train.make_run(dataclasses.replace(settings, epochs=1), make(tmp_path / "out"), teacher, options)
    train.train(made)
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert scores["n"] == 899 and scores["top1"] > 50
    names = {k for p in train.checkpoints(tmp_path / "out")[-1].glob("*.safetensors") for k in safetensors.torch.load_file(p)}
    assert not any("teacher" in name for name in names)


def make(folder):
    folder.mkdir()
    return folder


# ---------------------------------------------------------------- schedules


def test_cosine_per_epoch_is_timms():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=5e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=30, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-6)
    ours = recipe.Cosine(kind="cosine", warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6, per="epoch")
    for epoch in range(30):
        for step in (10 * epoch, 10 * epoch + 9):
            assert train.lr_at(step, 10, 30, ours, 5e-3) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        theirs.step(epoch + 1)


def test_cosine_per_step_moves_every_step_and_ends_at_the_floor():
    schedule = recipe.Cosine(kind="cosine", warmup_epochs=1, warmup_lr=0.0, min_lr=0.01, per="step")
    rates = [train.lr_at(step, 10, 5, schedule, 1.0) for step in range(50)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == pytest.approx(0.01 + 0.99 * (1 + 0.8090169943749475) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.01 < rates[-1] < 0.02


def test_milestones_are_those_of_repdistiller():
    """RepDistiller counts epochs from 1 and decays for epoch > 150: from 0, epoch 150 is the first at a tenth."""
    schedule = recipe.Milestones(kind="milestones", milestones=(150, 180, 210), factor=0.1)
    rates = {epoch: train.lr_at(782 * epoch, 782, 240, schedule, 0.05) for epoch in (0, 149, 150, 179, 180, 210, 239)}
    expected = {0: 0.05, 149: 0.05, 150: 5e-3, 179: 5e-3, 180: 5e-4, 210: 5e-5, 239: 5e-5}
    assert rates == pytest.approx(expected)
    assert train.lr_at(782 * 150 - 1, 782, 240, schedule, 0.05) == 0.05


def test_dkd_is_ramped_up_as_in_mdistiller():
    soft = recipe.Soft(loss="dkd", weight=2.0, warmup_epochs=20, args={})
    assert [train.soft_weight_at(e, soft) for e in (0, 4, 19, 100)] == [0.1, 0.5, 2.0, 2.0]
    assert train.soft_weight_at(0, recipe.Soft(loss="kd", weight=0.9, warmup_epochs=0, args={})) == 0.9


# ---------------------------------------------------------------- folders, teachers, errors


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        train.main([str(a) for a in arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, capsys):
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"
    first = run(path, out)
    assert "holds a run already: continue it with --resume or replace it with --overwrite" in refused(
        capsys, path, "--out", out
    )
    assert json.loads((out / "result.json").read_text()) == first
    changed = write(tmp_path / "changed.json", epochs=1, seed=5, students__0__lr=0.07)
    message = refused(capsys, changed, "--out", out, "--resume")
    assert "seed: 1 -> 5" in message and "students.0.lr: 0.05 -> 0.07" in message
    assert run(changed, out, "--overwrite")["seed"] == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for flag in ("--overwrite", "--resume"):
        assert "not the folder of a run" in refused(capsys, path, "--out", tmp_path / "mine", flag)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(students__0__model="resnet5O"), "student 'alone': timm has no model 'resnet5O', did you mean 'resnet50'?"),
        (dict(students__0__optimizer="lamp"), "student 'alone': "),
        (dict(students__0__optimizer_args={"momentun": 1}), "student 'alone': "),
        (dict(students__0__hard__loss="crossentropy"), "unknown loss 'crossentropy', did you mean 'cross_entropy'?"),
        (dict(students__0__model_args={"width": 3}), "unexpected keyword argument 'width'"),
        (dict(data__source="/no/where"), "/no/where: not a folder"),
        (dict(data__classes=7), "10 classes found, the recipe's data.classes is 7"),
    ],
    ids=range(7),
)
def test_errors_come_before_any_work(changes, message, tmp_path, capsys):
    path = write(tmp_path / "r.json", **changes)
    assert message in refused(capsys, path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "loss, message", [("kdd", "unknown loss 'kdd', did you mean 'kd'?"), ("dkd", "loss 'dkd' has no argument 'temp'")]
)
def test_unknown_losses_and_arguments_are_refused_by_name(loss, message, tmp_path, capsys, teacher_file):
    student = dict(STUDENT, soft={"loss": loss, "weight": 1.0, "warmup_epochs": 0, "args": {"temp": 4.0}})
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=[student]))
    assert message in refused(capsys, path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_at_chance_level_stops_the_run(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), tmp_path / "t.pth")
    teacher = {"model": "cifar_resnet8", "checkpoint": str(tmp_path / "t.pth")}
    path = write(tmp_path / "r.json", teacher=teacher, students=[STUDENT])
    assert "is at chance level: top-1" in refused(capsys, path, "--out", tmp_path / "out")
    result = run(path, tmp_path / "trial", "--limit", 2)
    assert result["limit"] == result["steps"] == 2 and "warning: teacher" in capsys.readouterr().out


def test_a_teacher_given_as_a_recipe_is_trained_first_and_once(tmp_path, capsys):
    write(tmp_path / "t.json", students=[dict(STUDENT, name="big", soft=None, model_args={})], epochs=3)
    path = write(tmp_path / "r.json", teacher={"recipe": "t.json"}, students=[STUDENT], epochs=1)
    result = run(path, tmp_path / "runs" / "r")
    teacher = json.loads((tmp_path / "runs" / "t" / "result.json").read_text())
    assert result["teacher"]["top1"] == teacher["students"][0]["last"]["top1"]
    assert result["teacher"]["name"] == str(tmp_path / "runs" / "t" / "students" / "big")
    run(path, tmp_path / "runs" / "second", "--students", "kd")
    assert json.loads((tmp_path / "runs" / "t" / "result.json").read_text()) == teacher
    write(tmp_path / "t.json", students=[dict(STUDENT, name="big", soft=None, model_args={})], epochs=9)
    run(path, tmp_path / "runs" / "third")
    assert "t.json: epochs: 3 -> 9" in capsys.readouterr().out


def test_a_teacher_recipe_must_fit(tmp_path, capsys):
    path = write(tmp_path / "r.json", teacher={"recipe": "t.json"}, students=[STUDENT])
    assert "t.json: cannot be read" in refused(capsys, path, "--out", tmp_path / "out")
    write(tmp_path / "t.json", runs=2)
    assert "must train one student, once, without a teacher" in refused(capsys, path, "--out", tmp_path / "out")
    write(tmp_path / "t.json", data__classes=11)
    assert "has 11 classes, this recipe 10" in refused(capsys, path, "--out", tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    path = write(tmp_path / "r.json", students__0__lr=1e30, students__0__clip_grad=None, schedule__warmup_epochs=0)
    with pytest.raises(SystemExit) as caught:
        train.main([str(path), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert caught.value.code == 1
    assert "student 'alone': the gradient is not finite at step" in capsys.readouterr().err


# ---------------------------------------------------------------- what a run leaves behind


def test_what_a_run_leaves_behind(tmp_path, teacher_file, capsys):
    path = write(tmp_path / "r.json", **distilled(teacher_file, runs=2, save_every=3))
    train.main([str(path), "--out", str(tmp_path / "out"), "--workers", "0"])
    summary = capsys.readouterr().out.strip().splitlines()[-5:]
    assert summary[0].split() == ["network", "parameters", "top1", "±", "top5", "±", "seeds", "n"]
    assert [line.split()[0] for line in summary[1:]] == ["teacher", "alone", "kd", "dkd"]
    assert [line.split()[-2] for line in summary[1:]] == ["1", "2", "2", "2"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["seed1", "seed2"]
    one = tmp_path / "out" / "seed1"
    expected = [".lock", "checkpoints", "metrics.jsonl", "recipe.json", "result.json", "students", "tensorboard"]
    assert sorted(p.name for p in one.iterdir()) == expected
    assert [p.name for p in train.checkpoints(one)] == ["step-00000027", "step-00000030"]
    result = json.loads((one / "result.json").read_text())
    assert {"command", "commit", "versions", "hardware", "seed", "steps", "seconds", "images_per_second"} <= result.keys()
    assert result["steps"] == 30 and result["students"][1]["last"]["n"] == 899
    network, _ = models.load_exported(one / "students" / "kd")
    trained = safetensors.torch.load_file(train.checkpoints(one)[-1] / "kd.safetensors")
    assert all(torch.equal(v, trained["net.model." + k]) for k, v in network.model.state_dict().items())
    assert not list(one.rglob("*.pkl")) and not list(one.rglob("*.bin"))
    assert recipe.load(one / "recipe.json").seed == 1


def test_metrics_and_tensorboard_say_the_same(tmp_path, teacher_file):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = write(tmp_path / "r.json", **distilled(teacher_file))
    run(path, tmp_path / "out", "--limit", 10)
    run(path, tmp_path / "out", "--resume")
    written = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in written if "loss/kd" in row]
    assert [row["step"] for row in losses] == [5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in written if "top1/kd" in row] == [15, 30]
    groups = ("loss/kd", "hard/kd", "soft/kd", "lr/kd", "loss/alone", "hard/alone", "speed/images_per_second")
    assert all(key in losses[0] for key in groups) and "soft/alone" not in losses[0]
    assert losses[0]["loss/kd"] == pytest.approx(losses[0]["hard/kd"] + losses[0]["soft/kd"], rel=1e-5)
    boards = {name: EventAccumulator(str(tmp_path / "out" / "tensorboard" / name)).Reload() for name in ("run", "kd", "alone")}
    assert set(boards["kd"].Tags()["scalars"]) == {
        "train/loss",
        "train/hard",
        "train/soft",
        "train/lr",
        "train/seconds",
        "train/gradient_hard",
        "train/gradient_soft",
        "train/gradient_ratio",
        "test/top1",
        "test/top5",
    }
    assert set(boards["alone"].Tags()["scalars"]) == {
        "train/loss",
        "train/hard",
        "train/lr",
        "train/seconds",
        "test/top1",
        "test/top5",
    }
    assert set(boards["run"].Tags()["scalars"]) == {"epoch", "speed/images_per_second", "seconds/data", "seconds/teacher"}
    assert [e.step for e in boards["kd"].Scalars("train/loss")] == [5, 10, 15, 20, 25, 30]
    assert [e.value for e in boards["kd"].Scalars("train/loss")] == pytest.approx([row["loss/kd"] for row in losses])
    stopped, *rest = boards["kd"].Scalars("test/top1")  # the trial's own last evaluation stays on the board, and only there
    assert stopped.step == 10
    assert [e.value for e in rest] == pytest.approx([r["top1/kd"] for r in written if "top1/kd" in r])


SMALL = [p for p in sorted((ROOT / "recipes").glob("*.json")) if recipe.load(p).data.classes < 1000]


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_every_recipe_runs_two_steps(path, tmp_path):
    """On generated images of the recipe's size, columns and class names; its teacher too."""
    settings = recipe.load(path)
    arguments = ["--limit", "2", "--set", "batch_size=8", "batch_size_per_process=8", "data.train_size=null"]
    arguments += [f"students.{i}.pretrained=false" for i in range(len(settings.students))]  # no hub in a test
    source = "digits"
    if settings.data.source != "digits":
        source = str(generated(tmp_path / "data", settings.data))
    if settings.teacher:
        teacher = dict(model="cifar_resnet8", checkpoint=str(tmp_path / "t.pth"))
        torch.save(timm.create_model("cifar_resnet8", num_classes=settings.data.classes).state_dict(), tmp_path / "t.pth")
        arguments.append("teacher=" + json.dumps(teacher))
    result = run(path, tmp_path / "out", "--data", source, *arguments, *(["runs=1"] if settings.runs > 1 else []))
    assert result["steps"] == 2 and len(result["students"]) == len(settings.students)
    assert all(line["loss/" + s.name] > 0 for line in rows(tmp_path / "out")[:1] for s in settings.students)


IMAGENET = sorted(
    p for p in (ROOT / "recipes").glob("*.json") if json.loads(p.read_text())["data"]["source"].startswith("ILSVRC")
)


@pytest.mark.slow
@needs_imagenet
@pytest.mark.parametrize("path", IMAGENET, ids=lambda p: p.stem)
def test_every_imagenet_recipe_runs_a_step_with_its_own_networks(path, tmp_path):
    """The whole path on real JPEGs: stream, repeated augmentation, mixing, the untrained teacher, one step, evaluation."""
    settings = recipe.load(path)
    small = ["batch_size=4", "batch_size_per_process=4", "data.train_size=200"]
    small += ["teacher.pretrained=false"] if settings.teacher else []
    result = run(path, tmp_path / "out", "--data", SHARED / "imagenet_sample", "--limit", 1, "--set", *small)
    assert result["steps"] == 1 and [s["name"] for s in result["students"]] == [s.name for s in settings.students]
    assert all(s["last"]["n"] == 4 for s in result["students"])
    (losses_, scores) = rows(tmp_path / "out")
    assert all(0 < losses_[f"loss/{s.name}"] < float("inf") and 0 <= scores[f"top5/{s.name}"] <= 100 for s in settings.students)
    state = train.checkpoints(tmp_path / "out")[-1]
    assert all((state / f"{s.name}.safetensors").exists() for s in settings.students)


def generated(folder, section):
    import datasets
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    features = datasets.Features(
        {section.image: datasets.Image(), section.label: datasets.ClassLabel(names=[f"c{i}" for i in range(section.classes)])}
    )
    folder.mkdir()
    for split in (section.train_split, section.test_split):
        images = [Image.fromarray(chance.integers(0, 256, (section.size, section.size, 3), dtype=np.uint8)) for _ in range(24)]
        labels = chance.integers(0, section.classes, 24).tolist()
        table = datasets.Dataset.from_dict({section.image: images, section.label: labels}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_command_line_is_frozen(capsys):
    """What belongs to a launch; everything that decides a result is in the recipe."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    usage = capsys.readouterr().out
    for option in ("--set", "--data", "--students", "--out", "--resume", "--overwrite", "--limit", "--workers"):
        assert option in usage
    assert usage.split("options:")[1].count("\n  --") == 8


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(SystemExit) as caught:
        train.main([str(write(tmp_path / "r.json")), "--resume", "--overwrite"])
    assert caught.value.code == 2 and os.environ.get("WORLD_SIZE") is None


def test_students_are_chosen_by_name(tmp_path, capsys, teacher_file):
    path = write(tmp_path / "r.json", **distilled(teacher_file, epochs=1))
    assert "no student 'kdd' (students: alone, kd, dkd)" in refused(capsys, path, "--students", "kdd", "--out", tmp_path / "o")
    result = run(path, tmp_path / "out", "--students", "alone")
    assert [s["name"] for s in result["students"]] == ["alone"] and result["teacher"] is None
    assert tree()["students"][0]["name"] == "alone"
