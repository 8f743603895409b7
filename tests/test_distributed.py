"""Real processes under the real launcher: DDP, DeepSpeed, torch.compile, mixed precision; most are slow."""

import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from conftest import ROOT, STUDENT, distilled, exit_code, final_state, forked, run, saved, write

import checkpoint

VIT = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3},
}
PLAIN = ["--num_machines", "1", "--main_process_port", "0"]
needs_deepspeed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("deepspeed", "transformers")),
    reason="DeepSpeed is not installed: pip install deepspeed transformers",
)
ARGUMENTS = {
    "kd": {"temperature": 4.0},
    "bkl": {},
    "dkd": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0},
    "dist": {"beta": 1.0, "gamma": 1.0, "temperature": 1.0},
    "cc": {"dim": 8},
    "rkd": {"distance": 25.0, "angle": 50.0},
    "crd": {"dim": 8, "negatives": 32, "temperature": 0.07, "momentum": 0.5},
}


def student(name, loss=None, **changes):
    """Without BatchNorm, whose statistics are those of a process's share of the batch."""
    soft = loss and {
        "loss": loss,
        "weight": 0.02 if loss == "cc" else 1.0,
        "warmup_epochs": 3 * (loss == "dkd"),
        "args": ARGUMENTS[loss],
    }
    return dict(STUDENT, **VIT, name=name, soft=soft, **changes)


def launched(path, out, *arguments, launcher=(), **environment):
    """The reports of all processes of a run that `accelerate launch` started."""
    report = reports_of(out)
    env = (
        os.environ | {"OMP_NUM_THREADS": "1", "REPORT": str(report), "PYTHONWARNINGS": "ignore"} | environment
    )
    command = [Path(sys.executable).with_name("accelerate"), "launch", *PLAIN, *launcher]
    command += [ROOT / "tests" / "launched.py", path, "--out", out, "--workers", "0", *arguments]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [json.loads(p.read_text()) for p in sorted(report.glob("*.json"))]


def reports_of(out):
    """What the processes of launched.py have seen; makes the folder for it."""
    report = out.with_name(out.name + "-report")
    report.mkdir(exist_ok=True)
    return report


def in_two_forks(path, out):
    """As `launched` with two processes, but forked from this one, whose imports are done."""
    report, script = reports_of(out), ROOT / "tests" / "launched.py"

    def two_processes():
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["REPORT"] = str(report)
        sys.argv = list(map(str, (script, path, "--out", out, "--workers", "0")))
        debug_launcher(runpy.run_path, args=(str(script), None, "__main__"), num_processes=2)

    assert exit_code(forked(two_processes)) == 0
    return [json.loads(p.read_text()) for p in sorted(report.glob("*.json"))]


def on_cpu(n):
    """Without ACCELERATE_USE_CPU, two processes on a machine without GPUs would each train alone."""
    return dict(
        launcher=[
            "--multi_gpu",
            "--num_processes",
            str(n),
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ],
        ACCELERATE_USE_CPU="true",
    )


def with_deepspeed(stage, tmp_path, n=2, **changes):
    file = tmp_path / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}} | changes))
    options = ["--use_deepspeed", "--deepspeed_config_file", str(file), "--num_processes", str(n)]
    return dict(launcher=[*options, "--mixed_precision", "no", "--dynamo_backend", "no"])


def losses_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        k: [line[k] for line in lines if k in line]
        for k in sorted({k for line in lines for k in line if k.startswith("loss/")})
    }


def tensors(out):
    folder = saved(out)[-1]
    return {
        f"{p.name}:{k}": v
        for p in folder.glob("*.safetensors")
        for k, v in safetensors.torch.load_file(p).items()
    }


def distance(a, b):
    """The largest difference between the tensors of two runs' last checkpoints."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


# ---------------------------------------------------------------- data parallel


@pytest.mark.parametrize(
    "two", [in_two_forks, pytest.param(functools.partial(launched, **on_cpu(2)), marks=pytest.mark.slow)]
)
def test_two_processes_train_and_evaluate_as_one(two, tmp_path, teacher_file):
    """Losses and weights equal to rounding, each test image counted once, equal weights, one writer."""
    students = [student(loss, loss, ema=0.9 if loss == "kd" else None) for loss in ("kd", "dkd")]
    changes = distilled(teacher_file, students=students, epochs=1, batch_size=128, batch_size_per_process=64)
    path = write(tmp_path / "r.json", **changes)
    run(path, tmp_path / "one")
    first, second = two(path, tmp_path / "two")
    assert (first["rank"], second["rank"], first["world"]) == (0, 1, 2)
    assert first["digests"] == second["digests"] and len(set(first["digests"].values())) == 2
    assert first["written"] and not second["written"]
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert [r["hardware"]["processes"] for r in results] == [1, 2]
    assert {s["last"]["n"] for r in results for s in r["students"]} == {899}
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert list(one) == list(two) == ["loss/dkd", "loss/kd"] and len(one["loss/kd"]) == 2
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4


@pytest.mark.slow
def test_losses_that_compare_images_see_one_process_and_share_their_memory(tmp_path, teacher_file):
    """DIST, CC and RKD equal those of two accumulated batches; CRD's banks are the same on every process."""
    students = [student(loss, loss) for loss in ("dist", "cc", "rkd", "crd")]
    changes = distilled(
        teacher_file, students=students, batch_size_per_process=32, epochs=1, data__drop_last=True
    )
    path = write(tmp_path / "r.json", **changes)
    run(path, tmp_path / "one", "--students", "dist", "cc", "rkd")
    first, second = launched(path, tmp_path / "two", **on_cpu(2))
    assert first["digests"] == second["digests"]  # of all buffers, the banks included
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4)
    banks = {k: v for k, v in tensors(tmp_path / "two").items() if k.startswith("crd.safetensors:soft.bank")}
    assert len(banks) == 2 and all(torch.isfinite(v).all() for v in banks.values())


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_any_number_of_processes_counts_every_image_once(world, tmp_path):
    path = write(
        tmp_path / "r.json", students=[student("alone")], epochs=1, batch_size=48, batch_size_per_process=4
    )
    reports = launched(path, tmp_path / "out", **on_cpu(world))
    assert [r["rank"] for r in reports] == list(range(world)) and len(
        {r["digests"]["alone"] for r in reports}
    ) == 1
    assert json.loads((tmp_path / "out" / "result.json").read_text())["students"][0]["last"]["n"] == 899


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_and_goes_on_with_one(tmp_path, teacher_file):
    path = write(
        tmp_path / "r.json",
        **distilled(teacher_file, students=[student("kd", "kd")], batch_size_per_process=32, save_every=4),
    )
    launched(path, tmp_path / "whole", **on_cpu(2))
    for name in ("two", "one"):
        launched(path, tmp_path / name, **on_cpu(2), STOP_AFTER="10")
    launched(path, tmp_path / "two", "--resume", **on_cpu(2))
    assert distance(tmp_path / "whole", tmp_path / "two") == 0
    run(path, tmp_path / "one", "--resume")
    assert distance(tmp_path / "whole", tmp_path / "one") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["raise", "kill"])
def test_one_process_that_fails_ends_all(failure, tmp_path, teacher_file):
    """In bounded time, with its error told, and the run goes on from its checkpoint."""
    changes = distilled(
        teacher_file, students=[student("kd", "kd")], batch_size_per_process=32, epochs=1, save_every=2
    )
    path, began = write(tmp_path / "r.json", **changes), time.monotonic()
    with pytest.raises(RuntimeError, match="has had enough" if failure == "raise" else "SIGKILL"):
        launched(path, tmp_path / "out", **on_cpu(2), FAIL=failure)
    assert time.monotonic() - began < 120
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "out")], capture_output=True, text=True).stdout
    assert [int(folder.name[5:]) for folder in saved(tmp_path / "out")] == [2]
    launched(path, tmp_path / "out", "--resume", **on_cpu(2))
    launched(path, tmp_path / "whole", **on_cpu(2))
    assert distance(tmp_path / "whole", tmp_path / "out") == 0


# ---------------------------------------------------------------- mixed precision


@pytest.mark.slow
def test_bfloat16_stays_near_float32(tmp_path, teacher_file):
    """Every loss of 28 steps within 3 % of float32's; weights, losses and checkpoints are float32 in both."""
    path = write(
        tmp_path / "r.json",
        **distilled(teacher_file, students=[student("kd", "kd"), student("dist", "dist")]),
    )
    run(path, tmp_path / "fp32")
    launched(
        path, tmp_path / "bf16", launcher=["--cpu", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    )
    assert json.loads((tmp_path / "bf16" / "result.json").read_text())["precision"] == "bf16"
    one, two = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert one != two
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=0.03)
    assert {v.dtype for v in tensors(tmp_path / "bf16").values()} == {torch.float32}


# ---------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_networks_give_the_same_losses_without_recompiling(backend, tmp_path, teacher_file):
    """A graph per student and loss; none for a step, though dkd's weight changes every epoch."""
    students = [student("kd", "kd", ema=0.9), student("dkd", "dkd"), student("alone")]
    path = write(
        tmp_path / "r.json",
        **distilled(teacher_file, students=students, epochs=3, data__drop_last=True, log_every=1),
    )
    run(path, tmp_path / "eager")
    launcher = ["--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", backend]
    environment = dict(TORCH_LOGS="recompiles", TORCH_LOGS_OUT=str(tmp_path / "recompiles"))
    launched(path, tmp_path / "compiled", launcher=launcher, **environment)
    eager, compiled = losses_of(tmp_path / "eager"), losses_of(tmp_path / "compiled")
    assert len(eager["loss/kd"]) == 42
    for name in eager:
        np.testing.assert_allclose(eager[name], compiled[name], rtol=1e-4)
    log = tmp_path / "recompiles"
    assert (
        log.read_text().count("Recompiling function") if log.exists() else 0
    ) <= 2  # the losses of students 2 and 3
    assert not [key for key in tensors(tmp_path / "compiled") if "_orig_mod" in key]


# ---------------------------------------------------------------- DeepSpeed


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_trains_what_one_process_does(stage, tmp_path, teacher_file):
    """Three students, two processes, accumulation, clipping, EMA; a resumed run is the same bit for bit."""
    students = [
        student("kd", "kd", ema=0.9),
        student("dkd", "dkd", optimizer="adamw", optimizer_args={}, clip_grad=0.1),
        student("alone"),
    ]
    students[1]["lr"] = 1e-3
    path = write(
        tmp_path / "r.json",
        **distilled(teacher_file, students=students, batch_size_per_process=16, epochs=1, save_every=4),
    )
    run(path, tmp_path / "one")
    first, second = launched(path, tmp_path / "whole", **with_deepspeed(stage, tmp_path))
    assert first["kind"] == "DEEPSPEED" and first["world"] == 2 and first["digests"] == second["digests"]
    assert distance(tmp_path / "one", tmp_path / "whole") < 1e-4
    launched(path, tmp_path / "parts", **with_deepspeed(stage, tmp_path), STOP_AFTER="6")
    launched(path, tmp_path / "parts", "--resume", **with_deepspeed(stage, tmp_path))
    assert distance(tmp_path / "whole", tmp_path / "parts") == 0


@needs_deepspeed
@pytest.mark.slow
def test_a_deepspeed_checkpoint_is_for_any_stage_and_number_of_processes(tmp_path, teacher_file):
    adamw = student("kd", "kd", optimizer="adamw", optimizer_args={})
    path = write(
        tmp_path / "r.json",
        **distilled(teacher_file, students=[adamw | {"lr": 1e-3}], batch_size_per_process=16, epochs=1),
    )
    run(path, tmp_path / "one")
    launched(path, tmp_path / "parts", **with_deepspeed(1, tmp_path, n=2), STOP_AFTER="5")
    launched(path, tmp_path / "parts", "--resume", **with_deepspeed(2, tmp_path, n=1), STOP_AFTER="5")
    run(path, tmp_path / "parts", "--resume")
    assert distance(tmp_path / "one", tmp_path / "parts") < 1e-4


@needs_deepspeed
@pytest.mark.slow
def test_flat_partitions_break_lamb_so_it_is_refused_with_them(tmp_path, teacher_file):
    """Its trust ratio is per tensor: stage 0 leaves tensors whole, stage 1 makes one of all."""
    path = write(
        tmp_path / "r.json",
        **distilled(
            teacher_file, students=[student("kd", "kd", optimizer="lamb", optimizer_args={})], epochs=1
        ),
    )
    run(path, tmp_path / "one")
    launched(path, tmp_path / "zero0", **with_deepspeed(0, tmp_path, n=1))
    assert distance(tmp_path / "one", tmp_path / "zero0") < 1e-4
    launched(path, tmp_path / "zero1", **with_deepspeed(1, tmp_path, n=1), ALSO_ELEMENTWISE="lamb")
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "zero1")
    assert max((a[k] - b[k]).abs().max() for k in a if k.startswith("kd.safetensors:net")) > 0.01
    with pytest.raises(RuntimeError, match="trust ratio is per tensor"):
        launched(path, tmp_path / "refused", **with_deepspeed(1, tmp_path, n=1))


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_in_bfloat16_keeps_float32_weights(tmp_path, teacher_file):
    changes = dict(students=[student("kd", "kd")], epochs=1, batch_size_per_process=32)
    path = write(tmp_path / "r.json", **distilled(teacher_file, **changes))
    run(path, tmp_path / "one")
    launched(
        path,
        tmp_path / "bf16",
        **with_deepspeed(1, tmp_path, torch_autocast={"enabled": True, "dtype": "bfloat16"}),
    )
    assert json.loads((tmp_path / "bf16" / "result.json").read_text())["precision"] == "bf16"
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "bf16")
    assert one != two
    np.testing.assert_allclose(one["loss/kd"], two["loss/kd"], rtol=0.03)


# ---------------------------------------------------------------- a loss with a memory


@pytest.mark.slow
def test_two_processes_keep_one_bank(tmp_path, teacher_file, monkeypatch):
    """The losses of CRD and ReviewKD see half a batch in each process, CRD's banks all of it."""
    crd = student("crd", "crd") | {key: STUDENT[key] for key in ("model", "model_args")}
    review = {"loss": "reviewkd", "weight": 0.6, "warmup_epochs": 0, "args": {}}
    students = [crd, dict(STUDENT, name="reviewkd", soft=review)]
    changes = dict(students=students, batch_size_per_process=32, epochs=1, data__drop_last=True, log_every=1)
    path, out = write(tmp_path / "r.json", **distilled(teacher_file, **changes)), tmp_path / "two"
    save = checkpoint.Checkpoints.save

    def compared(checkpoints, step, students, log, loader):
        for trained in students:
            for key, value in trained.distilled.state_dict().items():
                if "bank" in key or ("net." in key and "running" not in key):
                    both = log.lead.gather(value.float().flatten()[None])
                    assert torch.equal(both[0], both[1]), key
        save(checkpoints, step, students, log, loader)

    def two_processes():
        AcceleratorState._reset_state(reset_partial_state=True)
        debug_launcher(run, args=(path, out), num_processes=2)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", compared)
    assert exit_code(forked(two_processes)) == 0
    bank = final_state(out)[0]["crd.safetensors:soft.bank_student"]
    assert ((bank.norm(dim=1) - 1).abs() < 1e-5).sum() == 14 * 64  # the images of both processes
    assert json.loads((out / "result.json").read_text())["hardware"]["processes"] == 2
