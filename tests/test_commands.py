"""The README's commands: the quickstart through the real launcher, and how to run the tests."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def launch(arguments, cwd=ROOT, **environment):
    launcher = Path(sys.executable).with_name("accelerate")
    env = os.environ | environment
    out = subprocess.run([launcher, *arguments], cwd=cwd, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def quickstart(tmp_path, *arguments):
    """The table that the README's first command ends with."""
    (command,) = set(re.findall(r"accelerate (launch train.py recipes/quickstart.json)", README))
    printed = launch([*command.split(), "--out", str(tmp_path / "quickstart"), *arguments])
    table = [line.split() for line in printed.strip().splitlines()[-5:]]
    assert table[0][:3] == ["network", "parameters", "top1"]
    assert [row[0] for row in table[1:]] == ["teacher", "alone", "kd", "dist"]
    return table[1:]


def test_a_trial_of_the_quickstart(tmp_path):
    table = quickstart(tmp_path, "--limit", "3", "--set", "runs=1", "--workers", "0")
    assert [row[-2:] for row in table] == [["1", "96"]] * 4


@pytest.mark.slow
def test_the_quickstart(tmp_path):
    """Distillation helps."""
    table = quickstart(tmp_path)
    assert [row[-2:] for row in table] == [["1", "899"], *[["5", "899"]] * 3]
    results = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("quickstart/**/result.json"))]
    names = [student["name"] for student in results[0]["students"]]
    scores = [[student["last"]["top1"] for student in result["students"]] for result in results]
    means = dict(zip(names, np.mean(scores, axis=0), strict=True))
    assert results[0]["teacher"]["top1"] > 96 and min(means.values()) > 85
    assert means["kd"] > means["alone"] and means["dist"] > means["alone"]


def test_the_readmes_table_is_that_of_the_kept_result():
    _, *runs = json.loads((ROOT / "results" / "quickstart.json").read_text())["runs"]
    rows = re.findall(r"^\| (.+) \| ([\d,]+) \| ([\d.]+.*) \| (.*)\|$", README, re.MULTILINE)
    names = {"student, labels alone": "alone", "student, `kd`": "kd", "student, `dist`": "dist"}
    shown = {names.get(name, name): [value.strip() for value in values] for name, *values in rows}
    teacher, students = runs[0]["teacher"], runs[0]["students"]
    assert shown.pop("teacher") == [f"{teacher['parameters']:,}", f"{teacher['top1']:.2f} (one network)", ""]
    top1 = np.array([[student["last"]["top1"] for student in run["students"]] for run in runs])
    gain = top1 - top1[:, :1]
    for i, student in enumerate(students):
        accuracy = f"{top1[:, i].mean():.2f} ± {top1[:, i].std(ddof=1):.2f}"
        more = f"{gain[:, i].mean():+.2f} ± {gain[:, i].std(ddof=1):.2f}" if i else ""
        assert shown.pop(student["name"]) == [f"{student['parameters']:,}", accuracy, more]
    settings = json.loads((ROOT / "recipes" / "quickstart.json").read_text())
    assert (
        not shown
        and len(runs) == settings["runs"]
        and settings["students"]
        == [
            {key: student[key] for key in wanted}
            for student, wanted in zip(runs[0]["recipe"]["students"], settings["students"], strict=True)
        ]
    )


def test_the_documented_test_command():
    """.ci/run takes it from the README."""
    (line,) = re.findall(r"^command=.*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    script = f'bash -n .ci/run && {line} && echo "$command"'
    command = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert command == ["python", "-m", "pytest"]
    assert (ROOT / "requirements-dev.txt").exists()
