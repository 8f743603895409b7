"""The README's first command, through the real launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import ROOT, STUDENT, write

import train


def launch(arguments, cwd=ROOT, **environment):
    launcher = Path(sys.executable).with_name("accelerate")
    env = os.environ | environment
    out = subprocess.run([launcher, *arguments], cwd=cwd, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout


def test_the_quickstart(tmp_path):
    """It ends with the table of teacher, student alone and students distilled, over three seeds, and distillation helps."""
    (command,) = set(re.findall(r"accelerate (launch train.py recipes/quickstart.json)", (ROOT / "README.md").read_text()))
    table = launch([*command.split(), "--out", str(tmp_path / "quickstart")]).strip().splitlines()[-5:]
    assert table[0].split()[:3] == ["network", "parameters", "top1"]
    assert [line.split()[0] for line in table[1:]] == ["teacher", "alone", "kd", "dist"]
    assert [line.split()[-2:] for line in table[1:]] == [["1", "899"], *[["3", "899"]] * 3]
    results = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("quickstart/seed*/result.json"))]
    means = {
        s["name"]: np.mean([r["students"][i]["last"]["top1"] for r in results]) for i, s in enumerate(results[0]["students"])
    }
    assert results[0]["teacher"]["top1"] > 97 and min(means.values()) > 90
    assert means["kd"] > means["alone"]


def test_two_processes_train_and_evaluate_together(tmp_path):
    """Two real processes make the steps of one: the same losses to rounding (no BatchNorm), each test image counted once."""
    vit = dict(
        model="vit_tiny_patch16_224", model_args={"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3}
    )
    path = write(tmp_path / "r.json", students=[dict(STUDENT, **vit, soft=None)], batch_size_per_process=32, epochs=1)
    run = ["train.py", str(path), "--workers", "0", "--out"]
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    train.main([*run[1:], str(tmp_path / "one")])
    two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    launch(["launch", *common, *two, *run, str(tmp_path / "two")], ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert (one["hardware"]["processes"], two["hardware"]["processes"]) == (1, 2)
    assert one["students"][0]["last"]["n"] == two["students"][0]["last"]["n"] == 899
    rows = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 4
    for a, b in zip(*rows, strict=True):
        if "loss/kd" in a:
            np.testing.assert_allclose(a["loss/kd"], b["loss/kd"], rtol=1e-5)
