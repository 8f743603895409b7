"""finish.py: result.json and its curves, cards, the printed table."""

import json
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from conftest import (
    distilled,
    exit_code,
    forked,
    run,
    run_until,
    stopped,
    write,
)

import finish
import log


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the result


def test_a_result_has_its_curves(tmp_path, teacher_file):
    path, out = write(tmp_path / "r.json", **distilled(teacher_file, epochs=2, log_every=4)), tmp_path / "out"
    run_until(15, path, out)
    result = run(path, out, "--resume")  # of the whole run
    with_losses = [row for row in metrics(out) if "loss/kd" in row]
    terms = ("loss", "hard", "soft", "gradient_hard", "gradient_soft", "gradient_ratio")
    assert result["curves"]["kd"]["step"] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert list(result["curves"]["kd"]) == ["step", *terms]
    assert list(result["curves"]["alone"]) == ["step", "loss", "hard"]
    for term in terms:
        logged = [row.get(f"{term}/kd") for row in with_losses]
        assert result["curves"]["kd"][term] == [value and pytest.approx(value, rel=1e-5) for value in logged]
        assert (logged[-1] is None) == term.startswith("gradient")
    scores = [pytest.approx(row["top1/dkd"], rel=1e-5) for row in metrics(out) if "top1/dkd" in row]
    assert result["accuracy"]["dkd"] == {"epoch": [1.0, 2.0], "top1": scores}
    last = result["students"][2]["last"]["top1"]
    assert result["accuracy"]["dkd"]["top1"][-1] == pytest.approx(last, rel=1e-5)
    assert {"recipe", "seed", "commit", "versions", "hardware"} <= set(result) and "best" in result[
        "students"
    ][0]
    assert '"step": [ 4, 8,' in (out / "result.json").read_text()  # a curve is a line


def test_a_long_curve_is_thinned_evenly():
    rows = [{"step": i, "epoch": i / 10, "loss/kd": 1 / (i + 3)} for i in range(2001)]
    for row in rows[::2]:
        row["top1/kd"] = row["step"]
    curve = finish.curve(rows, "kd", "step", ("loss", "soft"))
    assert list(curve) == ["step", "loss"] and len(curve["step"]) == 300
    assert (curve["step"][0], curve["step"][-1]) == (0, 2000) and set(np.diff(curve["step"])) == {6, 7}
    assert finish.curve(rows, "kd", "epoch", ("top1",))["top1"][-1] == 2000
    assert finish.curve([], "kd", "step", ("loss",)) == {"step": []}


def test_a_clock_sums_by_name(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(times))
    clock = log.Clock(torch.device("cpu"))
    for name in (None, "data", "kd", None, "data"):  # what lies between two steps belongs to nothing
        clock.mark(name)
    clock.read()
    assert clock.window == clock.total == {"data": 5.0, "kd": 2.0}
    clock.window = {}
    clock.read()  # nothing twice
    assert clock.window == {} and clock.total == {"data": 5.0, "kd": 2.0}


def test_the_summary_is_the_mean_and_the_spread_of_the_last_epoch():
    def result(top1, teacher):
        student = {"name": "kd", "parameters": 5, "last": {"top1": top1, "top5": 90.0, "n": 10}}
        student["last"]["ema"] = {"top1": top1 + 1, "top5": 90.0, "n": 10}
        return {"teacher": teacher, "students": [student | {"best": {"top1": 99.0}}]}

    teacher = {"parameters": 7, "top1": 80.0, "top5": 95.0, "n": 10}
    header, *lines = [
        line.split() for line in finish.summary([result(70.0, teacher), result(72.0, teacher)]).splitlines()
    ]
    assert header == ["network", "parameters", "top1", "±", "top5", "±", "seeds", "n"]
    assert lines[-3:] == [
        ["teacher", "7", "80.00", "-", "95.00", "-", "1", "10"],
        ["kd", "5", "71.00", "1.41", "90.00", "0.00", "2", "10"],
        ["kd-ema", "5", "72.00", "1.41", "90.00", "0.00", "2", "10"],
    ]
    assert "teacher" not in finish.summary([result(70.0, None)])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    """Where the gradient still was: it is the loss that tells."""
    changes = dict(students__0__lr=1e30, students__0__clip_grad=None, schedule__warmup_epochs=0)
    code, message = stopped(capsys, write(tmp_path / "r.json", **changes), tmp_path / "out")
    assert code == 1 and "student 'alone': gradient not finite in" in message


def average_statistics():
    """In one of two processes: BatchNorm with other statistics in each, and four and three test images."""
    lead = Accelerator(cpu=True)
    norm = torch.nn.BatchNorm1d(12)
    norm.running_mean.fill_(lead.process_index)
    norm.running_var.fill_(1.0 + 2 * lead.process_index)
    net = torch.nn.Sequential(torch.nn.Flatten(), norm, torch.nn.Linear(12, 5))
    student = types.SimpleNamespace(name="a", net=net, ema=None, last=None, best=None)
    images = torch.zeros(3 + lead.process_index, 3, 2, 2, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.long)
    fields = dict(students=[student], lead=lead, test_loader=[(images, labels, labels)], limit=None)
    stand_in = types.SimpleNamespace(**fields, steps_per_epoch=1, write=lambda step, row: None)
    log.Log.accuracy(stand_in, 1)
    assert norm.running_mean.eq(0.5).all() and norm.running_var.eq(2.0).all(), norm.running_mean
    assert student.last["n"] == 7


def test_batchnorm_statistics_are_averaged_over_processes_before_evaluation():
    def launched():
        AcceleratorState._reset_state(reset_partial_state=True)
        debug_launcher(average_statistics, num_processes=2)

    assert exit_code(forked(launched)) == 0


def test_rows_are_written_by_the_main_process_alone(tmp_path):
    """The others go through the same calls."""
    lead = types.SimpleNamespace(is_main_process=False, device=torch.device("cpu"), log=lambda *_, **__: None)
    loader = types.SimpleNamespace(steps_per_epoch=2, broken={})
    watched = log.Log(tmp_path, None, lead, [], loader, None, 4)
    watched.write(1, {"x": 1})
    assert not watched.unwritten and not watched.path.exists() and watched.last_step() == 0
    lead.is_main_process = True
    watched.write(3, {"x": 1})
    assert watched.last_step() == 3 and watched.rows() == [{"step": 3, "epoch": 1.5, "x": 1}]
