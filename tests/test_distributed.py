"""Real processes under the real launcher: DDP, DeepSpeed, torch.compile, mixed precision. The long ones are marked slow."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, STUDENT, distilled, write

import models
import recipe
import train

VIT = dict(
    model="vit_tiny_patch16_224", model_args={"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3}
)
PLAIN = ["--num_machines", "1", "--main_process_port", "0"]
needs_deepspeed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("deepspeed", "transformers")),
    reason="DeepSpeed is not installed: pip install deepspeed transformers",
)


def student(name, loss=None, **changes):
    """Without BatchNorm, whose statistics are those of a process's share of the batch."""
    arguments = {
        "kd": {"temperature": 4.0},
        "bkl": {},
        "dkd": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0},
    }
    arguments |= {
        "dist": {"beta": 1.0, "gamma": 1.0, "temperature": 1.0},
        "cc": {"dim": 8},
        "rkd": {"distance": 25.0, "angle": 50.0},
    }
    arguments |= {"crd": {"dim": 8, "negatives": 32, "temperature": 0.07, "momentum": 0.5}}
    soft = loss and {
        "loss": loss,
        "weight": 0.02 if loss == "cc" else 1.0,
        "warmup_epochs": 3 * (loss == "dkd"),
        "args": arguments[loss],
    }
    return dict(STUDENT, **VIT, name=name, soft=soft, **changes)


def alone(path, out, *arguments):
    train.main([str(path), "--out", str(out), "--workers", "0", *arguments])


def launched(path, out, *arguments, launcher=(), **environment):
    """The reports of all processes of a run that `accelerate launch` started."""
    report = out.with_name(out.name + "-report")
    report.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "REPORT": str(report), "PYTHONWARNINGS": "ignore"} | environment
    command = [Path(sys.executable).with_name("accelerate"), "launch", *PLAIN, *launcher]
    command += [ROOT / "tests" / "launched.py", path, "--out", out, "--workers", "0", *arguments]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [json.loads(p.read_text()) for p in sorted(report.glob("*.json"))]


def on_cpu(n):
    """Without ACCELERATE_USE_CPU, two processes on a machine without GPUs would each train alone."""
    return dict(
        launcher=["--multi_gpu", "--num_processes", str(n), "--mixed_precision", "no", "--dynamo_backend", "no"],
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


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(out):
    folder = train.checkpoints(out)[-1]
    return {f"{p.name}:{k}": v for p in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(p).items()}


def distance(a, b):
    """The largest difference between the tensors of two runs' last checkpoints."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


# ---------------------------------------------------------------- data parallel


def test_two_processes_train_and_evaluate_as_one(tmp_path, teacher_file):
    """The same loss curves and weights to rounding, each test image counted once, equal weights everywhere, one writer."""
    students = [student(loss, loss, ema=0.9 if loss == "kd" else None) for loss in ("kd", "dkd", "bkl")]
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=students, batch_size_per_process=32, epochs=1))
    alone(path, tmp_path / "one")
    first, second = launched(path, tmp_path / "two", **on_cpu(2))
    assert (first["rank"], second["rank"], first["world"]) == (0, 1, 2)
    assert first["digests"] == second["digests"] and len(set(first["digests"].values())) == 3
    assert first["written"] and not second["written"]
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two")]
    assert [r["hardware"]["processes"] for r in results] == [1, 2]
    assert {s["last"]["n"] for r in results for s in r["students"]} == {899}
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert list(one) == list(two) == ["loss/bkl", "loss/dkd", "loss/kd"] and len(one["loss/kd"]) == 3
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4


@pytest.mark.slow
def test_losses_that_compare_images_see_one_process_and_share_their_memory(tmp_path, teacher_file):
    """DIST, CC and RKD under two processes equal two accumulated batches; CRD's banks are the same on every process."""
    students = [student(loss, loss) for loss in ("dist", "cc", "rkd", "crd")]
    changes = distilled(teacher_file, students=students, batch_size_per_process=32, epochs=1, data__drop_last=True)
    path = write(tmp_path / "r.json", **changes)
    alone(path, tmp_path / "one", "--students", "dist", "cc", "rkd")
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
    path = write(tmp_path / "r.json", students=[student("alone")], epochs=1, batch_size=48, batch_size_per_process=4)
    reports = launched(path, tmp_path / "out", **on_cpu(world))
    assert [r["rank"] for r in reports] == list(range(world)) and len({r["digests"]["alone"] for r in reports}) == 1
    assert json.loads((tmp_path / "out" / "result.json").read_text())["students"][0]["last"]["n"] == 899


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_and_goes_on_with_one(tmp_path, teacher_file):
    path = write(
        tmp_path / "r.json", **distilled(teacher_file, students=[student("kd", "kd")], batch_size_per_process=32, save_every=4)
    )
    launched(path, tmp_path / "whole", **on_cpu(2))
    for name in ("two", "one"):
        launched(path, tmp_path / name, "--limit", "10", **on_cpu(2))
    launched(path, tmp_path / "two", "--resume", **on_cpu(2))
    assert distance(tmp_path / "whole", tmp_path / "two") == 0
    alone(path, tmp_path / "one", "--resume")
    assert distance(tmp_path / "whole", tmp_path / "one") < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["raise", "kill"])
def test_one_process_that_fails_ends_all(failure, tmp_path, teacher_file):
    """In bounded time, with its error told, and the run goes on from its checkpoint."""
    changes = distilled(teacher_file, students=[student("kd", "kd")], batch_size_per_process=32, epochs=1, save_every=2)
    path, began = write(tmp_path / "r.json", **changes), time.monotonic()
    with pytest.raises(RuntimeError, match="has had enough" if failure == "raise" else "SIGKILL"):
        launched(path, tmp_path / "out", **on_cpu(2), FAIL=failure)
    assert time.monotonic() - began < 120
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "out")], capture_output=True, text=True).stdout
    assert [int(folder.name[5:]) for folder in train.checkpoints(tmp_path / "out")] == [2]
    launched(path, tmp_path / "out", "--resume", **on_cpu(2))
    launched(path, tmp_path / "whole", **on_cpu(2))
    assert distance(tmp_path / "whole", tmp_path / "out") == 0


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("teacher_precision, alike", [(None, False), ("fp32", True)])
def test_the_teacher_has_its_own_precision(teacher_precision, alike, tmp_path, teacher_file, monkeypatch):
    """The students in bfloat16; their teacher too, unless the recipe says float32."""
    seen = []
    changes = distilled(teacher_file, students=[student("kd", "kd")], teacher__precision=teacher_precision)
    path, forward = write(tmp_path / "r.json", **changes), train.teach
    monkeypatch.setattr(train, "precision", lambda accelerator: "bf16")
    monkeypatch.setattr(
        train, "teach", lambda run, images: seen.append((run.teacher(images), forward(run, images)[0])) or forward(run, images)
    )
    alone(path, tmp_path / "out", "--limit", "1")
    ((wanted, got),) = seen
    assert torch.equal(wanted, got.float()) == alike
    assert got.dtype == (torch.float32 if alike else torch.bfloat16)
    torch.testing.assert_close(wanted, got.float(), rtol=0.05, atol=0.3)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(tmp_path, teacher_file):
    """Every logged loss term of 28 steps within 3 % of float32's; weights, losses and checkpoints are float32 in both."""
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=[student("kd", "kd"), student("dist", "dist")]))
    alone(path, tmp_path / "fp32")
    launched(path, tmp_path / "bf16", launcher=["--cpu", "--mixed_precision", "bf16", "--dynamo_backend", "no"])
    assert json.loads((tmp_path / "bf16" / "result.json").read_text())["precision"] == "bf16"
    one, two = losses_of(tmp_path / "fp32"), losses_of(tmp_path / "bf16")
    assert one != two
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=0.03)
    assert {v.dtype for v in tensors(tmp_path / "bf16").values()} == {torch.float32}


def test_every_student_has_its_own_gradient_scaler(tmp_path, teacher_file, monkeypatch):
    """float16's scaler needs no GPU to be tested: one overflow stops the step of that student alone, and scales differ.

    With clipping, which unscales: one Accelerator for two students would unscale the other's gradients, too.
    """
    students = [student("kd", "kd", clip_grad=1e3), student("dkd", "dkd", clip_grad=1e3)]
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=students, epochs=1))
    alone(path, tmp_path / "plain")
    make = train.make_run

    def with_scalers(*arguments):
        run = make(*arguments)
        monkeypatch.setattr(train.Accelerator, "mixed_precision", "fp16")  # as on a GPU: clipping unscales first
        for trainee, scale in zip(run.trainees, (2.0**10, 2.0**126), strict=True):  # the second overflows, again and again
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            trainee.accelerator.scaler, trainee.accelerator.native_amp = scaler, True
            wrapped = type(trainee.optimizer)(trainee.optimizer.optimizer, scaler=scaler)
            trainee.accelerator._optimizers = [wrapped]
            trainee.optimizer = wrapped
        return run

    monkeypatch.setattr(train, "make_run", with_scalers)
    monkeypatch.setattr(train, "precision", lambda accelerator: "no")
    alone(path, tmp_path / "scaled")
    state = json.loads((train.checkpoints(tmp_path / "scaled")[-1] / "state.json").read_text())["students"]
    assert (state["kd"]["skipped"], state["dkd"]["skipped"] >= 1) == (0, True)
    log = [row for row in rows(tmp_path / "scaled") if "lr/dkd" in row][-1]
    assert log["overflows/dkd"] >= 1 and not any(key.startswith("skipped") for key in log)  # told apart from NaNs
    assert rows(tmp_path / "scaled")[0]["lr/dkd"] == rows(tmp_path / "plain")[0]["lr/dkd"]
    assert state["kd"]["scaler"]["scale"] == 2.0**10 and state["dkd"]["scaler"]["scale"] < 2.0**126
    plain, scaled = tensors(tmp_path / "plain"), tensors(tmp_path / "scaled")
    for key, value in plain.items():
        if key.startswith("kd."):
            torch.testing.assert_close(value, scaled[key], rtol=1e-4, atol=1e-6)
        assert torch.isfinite(scaled[key]).all()


# ---------------------------------------------------------------- memory


def test_checkpointed_activations_change_memory_and_nothing_else():
    """Equal losses, gradients and BatchNorm statistics: recomputing a block must not count its batch twice."""

    def step(checkpointing):
        torch.manual_seed(0)
        network = models.build("resnet10t", classes=10, size=32).train()
        images = torch.rand(4, 3, 32, 32)
        network.model.set_grad_checkpointing(checkpointing)
        kept = train.activation_bytes(network, 32, train.make_accelerator())
        loss = network(images).square().mean()
        with models.frozen_statistics(network):
            loss.backward()
        return loss, {n: p.grad for n, p in network.named_parameters()}, dict(network.named_buffers()), kept

    (loss, gradients, buffers, kept), (again, gradients_again, buffers_again, less) = step(False), step(True)
    assert torch.equal(loss, again) and less < 0.8 * kept
    for name in gradients:
        torch.testing.assert_close(gradients[name], gradients_again[name], rtol=1e-5, atol=1e-7)
    for name in buffers:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(buffers[name], buffers_again[name]), name


def test_a_recipe_checkpoints_activations(tmp_path, capsys):
    """The whole run is the same run; a network without the feature is refused by name."""
    for name in ("plain", "saved"):
        alone(
            write(tmp_path / "r.json", students=[student("alone", grad_checkpointing=name == "saved")], epochs=1),
            tmp_path / name,
        )
    assert distance(tmp_path / "plain", tmp_path / "saved") < 1e-6
    with pytest.raises(SystemExit) as stop:
        alone(write(tmp_path / "r.json", students=[dict(STUDENT, soft=None, grad_checkpointing=True)]), tmp_path / "no")
    assert stop.value.code == 2 and "grad_checkpointing: cifar_resnet8 does not have it" in capsys.readouterr().err


# ---------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_networks_give_the_same_losses_without_recompiling(backend, tmp_path, teacher_file):
    """A graph per student and loss; none for a step, though dkd's weight changes every epoch."""
    students = [student("kd", "kd", ema=0.9), student("dkd", "dkd"), student("alone")]
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=students, epochs=3, data__drop_last=True, log_every=1))
    alone(path, tmp_path / "eager")
    launcher = ["--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", backend]
    environment = dict(TORCH_LOGS="recompiles", TORCH_LOGS_OUT=str(tmp_path / "recompiles"))
    launched(path, tmp_path / "compiled", launcher=launcher, **environment)
    eager, compiled = losses_of(tmp_path / "eager"), losses_of(tmp_path / "compiled")
    assert len(eager["loss/kd"]) == 42
    for name in eager:
        np.testing.assert_allclose(eager[name], compiled[name], rtol=1e-4)
    log = tmp_path / "recompiles"
    assert (log.read_text().count("Recompiling function") if log.exists() else 0) <= 2  # the losses of students 2 and 3
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
        tmp_path / "r.json", **distilled(teacher_file, students=students, batch_size_per_process=16, epochs=1, save_every=4)
    )
    alone(path, tmp_path / "one")
    first, second = launched(path, tmp_path / "whole", **with_deepspeed(stage, tmp_path))
    assert first["kind"] == "DEEPSPEED" and first["world"] == 2 and first["digests"] == second["digests"]
    assert distance(tmp_path / "one", tmp_path / "whole") < 1e-4
    launched(path, tmp_path / "parts", "--limit", "6", **with_deepspeed(stage, tmp_path))
    launched(path, tmp_path / "parts", "--resume", **with_deepspeed(stage, tmp_path))
    assert distance(tmp_path / "whole", tmp_path / "parts") == 0


@needs_deepspeed
@pytest.mark.slow
def test_a_deepspeed_checkpoint_is_for_any_stage_and_number_of_processes(tmp_path, teacher_file):
    adamw = student("kd", "kd", optimizer="adamw", optimizer_args={})
    path = write(
        tmp_path / "r.json", **distilled(teacher_file, students=[adamw | {"lr": 1e-3}], batch_size_per_process=16, epochs=1)
    )
    alone(path, tmp_path / "one")
    launched(path, tmp_path / "parts", "--limit", "5", **with_deepspeed(1, tmp_path, n=2))
    launched(path, tmp_path / "parts", "--limit", "10", "--resume", **with_deepspeed(2, tmp_path, n=1))
    alone(path, tmp_path / "parts", "--resume")
    assert distance(tmp_path / "one", tmp_path / "parts") < 1e-4


@needs_deepspeed
@pytest.mark.slow
def test_flat_partitions_break_lamb_so_it_is_refused_with_them(tmp_path, teacher_file):
    """Its trust ratio is per tensor: stage 0 leaves the tensors whole, stage 1 gives it one flat one, even on one process."""
    path = write(
        tmp_path / "r.json",
        **distilled(teacher_file, students=[student("kd", "kd", optimizer="lamb", optimizer_args={})], epochs=1),
    )
    alone(path, tmp_path / "one")
    launched(path, tmp_path / "zero0", **with_deepspeed(0, tmp_path, n=1))
    assert distance(tmp_path / "one", tmp_path / "zero0") < 1e-4
    launched(path, tmp_path / "zero1", **with_deepspeed(1, tmp_path, n=1), ALSO_ELEMENTWISE="lamb")
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "zero1")
    assert max((a[k] - b[k]).abs().max() for k in a if k.startswith("kd.safetensors:net")) > 0.01
    with pytest.raises(RuntimeError, match="LAMB's trust ratio is per tensor"):
        launched(path, tmp_path / "refused", **with_deepspeed(1, tmp_path, n=1))


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_in_bfloat16_keeps_float32_weights(tmp_path, teacher_file):
    changes = dict(students=[student("kd", "kd")], epochs=1, batch_size_per_process=32)
    path = write(tmp_path / "r.json", **distilled(teacher_file, **changes))
    alone(path, tmp_path / "one")
    launched(path, tmp_path / "bf16", **with_deepspeed(1, tmp_path, torch_autocast={"enabled": True, "dtype": "bfloat16"}))
    assert json.loads((tmp_path / "bf16" / "result.json").read_text())["precision"] == "bf16"
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "bf16")
    assert one != two
    np.testing.assert_allclose(one["loss/kd"], two["loss/kd"], rtol=0.03)


# ---------------------------------------------------------------- launches that are refused


class Launch:
    """An Accelerator's answers, for launches that this machine cannot make."""

    def __init__(self, kind="NO", processes=1, precision="no", device="cpu", config=None, stage=0):
        self.distributed_type, self.num_processes, self.mixed_precision = train.DistributedType[kind], processes, precision
        self.device = torch.device(device)
        self.state = type("State", (), {})()
        self.state.deepspeed_plugin = type("Plugin", (), {"deepspeed_config": config or {}, "zero_stage": stage})()


@pytest.mark.parametrize(
    "launch, message",
    [
        (dict(precision="fp16"), "fp16 on a CPU: accelerate would train in float32"),
        (dict(precision="fp8"), "not supported"),
        (dict(kind="FSDP"), "FSDP"),
        (dict(kind="DEEPSPEED", stage=3), "stage 3: weights in pieces"),
        (dict(kind="DEEPSPEED", precision="bf16"), "BatchNorm"),
        (dict(kind="DEEPSPEED", config={"fp16": {"enabled": True}}), "with fp16: it would cast the weights"),
        (dict(kind="DEEPSPEED", config={"torch_autocast": {"enabled": True, "dtype": "float16"}}), "loss scale"),
        (dict(kind="DEEPSPEED", config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}), "offload"),
        (dict(kind="DEEPSPEED", stage=1), "optimizer 'lamb': the stage cuts all tensors into flat pieces"),
        (dict(processes=1, world=2), "2 processes were launched, accelerate sees 1"),
    ],
)  # fmt: skip
def test_launches_that_would_train_something_else_are_refused(launch, message, tmp_path, monkeypatch):
    settings = recipe.load(write(tmp_path / "r.json", students=[student("alone", optimizer="lamb", optimizer_args={})]))
    monkeypatch.setenv("WORLD_SIZE", str(launch.pop("world", 1)))
    with pytest.raises(recipe.RecipeError, match=message):
        train.check_launch(settings, Launch(**launch))


def test_elementwise_optimizers_do_not_see_where_a_tensor_ends():
    """What ZeRO needs of them: the same update of a flat tensor and of its pieces. LAMB's differs."""

    def update(name, pieces):
        torch.manual_seed(0)
        values, gradients = torch.randn(3, 24)[0], torch.randn(5, 24)
        module = torch.nn.ParameterList([piece.clone() for piece in values.split(24 // pieces)])
        optimizer = train.create_optimizer_v2(module, opt=name, lr=0.1, weight_decay=0.1, filter_bias_and_bn=False)
        for gradient in gradients:
            for parameter, own in zip(module, gradient.split(24 // pieces), strict=True):
                parameter.grad = own.clone()
            optimizer.step()
        return torch.cat([p.detach() for p in module])

    for name in train.ELEMENTWISE:
        torch.testing.assert_close(update(name, 1), update(name, 3), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(update("lamb", 1), update("lamb", 3), rtol=1e-3)


# ---------------------------------------------------------------- what is told


def test_time_and_memory_are_told_per_student(tmp_path, teacher_file, capsys):
    path = write(tmp_path / "r.json", **distilled(teacher_file, epochs=1))
    alone(path, tmp_path / "out", "--limit", "7")
    alone(path, tmp_path / "out", "--resume")
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "out" / "result.json").read_text())
    assert printed.count("GB of weights, gradients and optimizer") == 2 * 4  # each student and all of them, twice
    parts = result["seconds_per_step"]
    assert set(parts) == {"data", "teacher", "alone", "kd", "dkd"} and all(value > 0 for value in parts.values())
    assert sum(parts.values()) <= 1.05 * result["seconds"] / result["steps"] + 0.01
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"seconds/kd", "seconds/teacher", "seconds/data"} <= lines[0].keys()
