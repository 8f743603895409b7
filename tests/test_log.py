"""log.py: the rows of a run and TensorBoard, the plan before it, the result after it."""

import json
import re
import shutil

import pytest
import torch
from conftest import (
    STUDENT,
    assert_same_run,
    distilled,
    final_state,
    rows,
    run,
    run_until,
    write,
)

import distill
import launch
import log
import models
import train


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- rows


def test_metrics_and_tensorboard_say_the_same(tmp_path, teacher_file, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard import SummaryWriter

    path, out, bar = write(tmp_path / "r.json", **distilled(teacher_file)), tmp_path / "out", []
    monkeypatch.setattr(train.tqdm, "set_postfix", lambda _, shown: bar.append(shown))
    run_until(10, path, out)
    (first,) = (out / "kd").glob("events.*")
    with SummaryWriter(tmp_path / "stray") as writer:  # as if the run had been killed after its checkpoint
        writer.add_scalar("train/loss", 99.0, 13)
    next((tmp_path / "stray").iterdir()).rename(f"{first}.after")
    run(path, out, "--resume")
    written = metrics(out)
    losses = [row for row in written if "loss/kd" in row]
    means = [(row["loss/alone"] + row["loss/kd"] + row["loss/dkd"]) / 3 for row in losses]
    assert bar == [{"mean loss": pytest.approx(mean)} for mean in means]
    assert [row["step"] for row in losses] == [5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in written if "top1/kd" in row] == [15, 30]
    columns = (
        "loss/kd",
        "hard/kd",
        "soft/kd",
        "lr/kd",
        "loss/alone",
        "hard/alone",
        "speed/images_per_second",
    )
    assert all(key in losses[0] for key in columns) and "soft/alone" not in losses[0]
    assert losses[0]["loss/kd"] == pytest.approx(losses[0]["hard/kd"] + losses[0]["soft/kd"], rel=1e-5)
    assert {"seconds/kd", "seconds/teacher", "seconds/data"} <= losses[0].keys()

    assert {p.parent for p in out.rglob("events.*")} == {out, out / "alone", out / "kd", out / "dkd"}
    boards = {name: EventAccumulator(str(out / name)).Reload() for name in ("", "kd", "alone")}
    alone = {"test/top1", "test/top5", "train/loss", "train/hard", "train/lr", "wall_clock/seconds"}
    gradients = {"train/gradient_hard", "train/gradient_soft", "train/gradient_ratio"}
    assert set(boards["alone"].Tags()["scalars"]) == alone
    assert set(boards["kd"].Tags()["scalars"]) == alone | {"train/soft"} | gradients
    assert set(boards[""].Tags()["scalars"]) == set(log.RUN_BOARD.values())
    shown = boards["kd"].Scalars("train/loss")
    assert [e.step for e in shown] == [5, 10, 15, 20, 25, 30]
    assert [e.value for e in shown] == pytest.approx([row["loss/kd"] for row in losses])
    scores = [row["top1/kd"] for row in written if "top1/kd" in row]
    assert [e.value for e in boards["kd"].Scalars("test/top1")] == pytest.approx(scores)

    # HPARAMS: no summary of columns, because those of the first run would be those of all
    content = boards["kd"].PluginTagToContent("hparams")
    assert set(content) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    shown = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert shown["soft.loss"].string_value == "kd" and shown["soft.args.temperature"].number_value == 4
    assert shown["model_args.widths"].string_value == "[4, 4, 8, 8]" and shown["lr"].number_value == 0.05
    assert shown["seed"].number_value == 1 and shown["schedule.kind"].string_value == "cosine"
    assert not {"ema", "about", "students"} & set(
        shown
    )  # what is null, and what is no setting of the student


def test_gradient_norms_are_those_of_the_terms(tmp_path, teacher_file):
    """Against autograd by hand, through the row of a real run: weights and ramp included, nothing for other
    students.
    """
    changes = distilled(teacher_file, epochs=1, log_every=4)
    cc = {"loss": "cc", "weight": 0.02, "warmup_epochs": 0, "args": {"dim": 8}}
    bare = dict(STUDENT, name="bare", hard=STUDENT["hard"] | {"weight": 0.0})
    changes["students"] += [dict(STUDENT, name="cc", soft=cc), bare]
    seen = []
    original = distill.Distilled.gradient_norms

    def spied(module, logits, teacher_logits, target, soft_weight):
        seen.append((logits, teacher_logits, target, soft_weight))
        return original(module, logits, teacher_logits, target, soft_weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.Distilled, "gradient_norms", spied)
        run(write(tmp_path / "r.json", **changes), tmp_path / "out")
    logged = [row for row in metrics(tmp_path / "out") if any(key.startswith("gradient") for key in row)]
    assert [row["step"] for row in logged] == [4, 8, 12]  # not the 15th, the rest of an interval
    assert len(seen) == 9  # kd, dkd, bare: not at other steps, not for students without a term on logits
    for row in logged:
        names = {key.split("/")[1] for key in row if key.startswith("gradient")}
        assert names == {"kd", "dkd", "bare"}
        assert row["gradient_hard/bare"] == row["gradient_ratio/bare"] == 0
    for (logits, theirs, target, weight), row in zip(seen[::3], logged, strict=True):
        p, q = (logits / 4).softmax(1), (theirs / 4).softmax(1)
        soft = weight * 4 * (p - q) / len(p)  # of kd: T^2 KL, whose gradient is T (p - q)
        hard = (logits.softmax(1) - torch.nn.functional.one_hot(target, 10)) / len(p)
        assert row["gradient_hard/kd"] == pytest.approx(hard.norm().item(), rel=1e-5)
        assert row["gradient_soft/kd"] == pytest.approx(soft.norm().item(), rel=1e-5)
        assert row["gradient_ratio/kd"] == pytest.approx((hard.norm() / soft.norm()).item(), rel=1e-5)
    assert [float(weight) for *_, weight in seen[1::3]] == [0.25] * 3  # dkd's ramp


def test_looking_at_gradients_changes_nothing(tmp_path, teacher_file, monkeypatch):
    mixed = dict(data__mixup=0.2, data__drop_last=True, batch_size_per_process=32)  # and accumulated
    changes = distilled(teacher_file, epochs=1, log_every=1, **mixed)
    path = write(tmp_path / "r.json", **changes)
    run(path, tmp_path / "with", "--limit", 5)
    monkeypatch.setattr(distill.Student, "log_gradients", lambda student: {})
    run(path, tmp_path / "without", "--limit", 5)
    (tensors, state), (others, other_state) = (
        final_state(tmp_path / "with"),
        final_state(tmp_path / "without"),
    )
    assert all(torch.equal(tensors[key], others[key]) for key in tensors) and state == other_state


def test_rows_that_the_disk_did_not_take_are_written_later(tmp_path, monkeypatch, capsys):
    """Whole rows, in their order, each once; the result knows them all."""
    path, refusals = write(tmp_path / "r.json", log_every=2, epochs=1), []
    original = log.Log.flush

    def full(self):
        if self.folder.name == "full" and len(refusals) < 3:
            refusals.append(len(self.unwritten))
            raise OSError(28, "No space left on device")
        original(self)

    run(path, tmp_path / "whole")
    monkeypatch.setattr(log.Log, "flush", full)
    run(path, tmp_path / "full")
    assert refusals == [1, 2, 3] and rows(tmp_path / "full") == rows(tmp_path / "whole")
    assert "metrics.jsonl did not take 3 rows, which are kept for the next time" in capsys.readouterr().out


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's thread ends
def test_a_removed_folder_of_tensorboard_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """A warning; the result is written, and the next seed starts."""
    path, out = write(tmp_path / "r.json", epochs=1, runs=2, log_every=1), tmp_path / "out"
    run_in = out / "seed1"
    original = log.Log.accuracy

    def removing(self, step):
        if self.folder == run_in:
            shutil.rmtree(self.folder / "alone")
        original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(log.Log, "accuracy", removing)
        with pytest.raises(FileNotFoundError):  # of `run`, which looks for one seed's result
            run(path, out)
    assert "warning: TensorBoard" in capsys.readouterr().out
    results = [json.loads((out / name / "result.json").read_text()) for name in ("seed1", "seed2")]
    assert [(result["seed"], result["steps"]) for result in results] == [(1, 15), (2, 15)]
    run(write(tmp_path / "one.json", epochs=1, log_every=1), tmp_path / "one")
    assert_same_run(tmp_path / "one", run_in)


# ---------------------------------------------------------------- the plan


def test_the_plan_says_what_a_launch_will_cost(tmp_path, capsys):
    changes = dict(batch_size=32, batch_size_per_process=16, data__repeats=3, data__drop_last=True)
    run(write(tmp_path / "r.json", epochs=3, **changes), tmp_path / "run", "--limit", "2")
    plan = capsys.readouterr().out
    assert "3 epochs of 28 steps, of which this run makes 2 steps" in plan
    crops = "64 crops of 8 pixels from 22 images read (3 of each)"
    assert f"data: 898 images of digits, memory-mapped; {crops}" in plan
    assert "batch: 32 = 1 processes x 16 x 2 accumulated" in plan
    settings = "sgd lr 0.05, weight decay 0.0005, 1 cross_entropy"
    assert f"student alone: cifar_resnet8, 2,718 parameters, {settings}" in plan
    assert "MB of" not in plan  # below 10 MB memory is nothing to plan with


def test_the_plan_counts_memory_where_it_matters(tmp_path, teacher_file, capsys):
    """And a network's parameters in one way, also those of a teacher whose BatchNorm is folded."""
    changes = distilled(teacher_file, students__0__model_args={"widths": [64, 64, 128, 128]})
    run(write(tmp_path / "r.json", **changes), tmp_path / "run", "--limit", "1")
    plan = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"teacher: cifar_resnet8, {result['teacher']['parameters']:,} parameters, 8 pixels" in plan
    memory = re.findall(r"about ([\d.]+) MB of weights and state, ([\d.]+) MB of activations", plan)
    *students, process = [tuple(map(float, found)) for found in memory]
    weights = 12 * result["students"][0]["parameters"] / 1e6  # with gradients and momentum
    assert students[0][0] == pytest.approx(weights, abs=0.06) and students[0][1] > 10
    assert process[0] > sum(found[0] for found in students)  # and the teacher's
    assert process[1] == max(found[1] for found in students)


def test_the_estimate_of_activations_is_what_autograd_keeps():
    network = models.build("cifar_resnet8", classes=10, size=8)
    kept = log.activation_bytes(network, 8, launch.make_accelerator())
    stem = 4 * 16 * 8 * 8  # bytes of one map of one image
    assert 10 * stem < kept < 40 * stem
    assert not network.model.bn1.running_mean.any()  # the statistics did not move


def test_time_is_told_per_student(tmp_path, teacher_file):
    path, out = write(tmp_path / "r.json", **distilled(teacher_file, epochs=1)), tmp_path / "out"
    run_until(7, path, out)
    result = run(path, out, "--resume")
    parts = result["seconds_per_step"]
    assert set(parts) == {"data", "teacher", "alone", "kd", "dkd"} and all(
        value > 0 for value in parts.values()
    )
    assert sum(parts.values()) <= 1.05 * result["seconds"] / result["steps"] + 0.01
