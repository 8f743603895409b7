"""The README's first command, through the real launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT


def launch(arguments, cwd=ROOT, **environment):
    launcher = Path(sys.executable).with_name("accelerate")
    env = os.environ | environment
    out = subprocess.run([launcher, *arguments], cwd=cwd, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_quickstart(seeds, tmp_path):
    """It ends with the table of teacher, student alone and students distilled, over its seeds, and distillation helps."""
    (command,) = set(re.findall(r"accelerate (launch train.py recipes/quickstart.json)", (ROOT / "README.md").read_text()))
    table = (
        launch([*command.split(), "--out", str(tmp_path / "quickstart"), "--set", f"runs={seeds}"]).strip().splitlines()[-5:]
    )
    assert table[0].split()[:3] == ["network", "parameters", "top1"]
    assert [line.split()[0] for line in table[1:]] == ["teacher", "alone", "kd", "dist"]
    assert [line.split()[-2:] for line in table[1:]] == [["1", "899"], *[[str(seeds), "899"]] * 3]
    results = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("quickstart/**/result.json"))]
    means = {
        s["name"]: np.mean([r["students"][i]["last"]["top1"] for r in results]) for i, s in enumerate(results[0]["students"])
    }
    assert results[0]["teacher"]["top1"] > 97 and min(means.values()) > 90
    assert means["kd"] > means["alone"]
