"""Losses on features, from taps to exported student: any network's maps, training, resume, two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, STUDENT, distilled, make_recipe, write
from test_train import assert_same_run, final_state, rows, run

import losses
import models
import train

WEIGHTS = {"cc": 0.02, "rkd": 1.0, "crd": 0.8, "reviewkd": 0.6}  # RepDistiller's and ReviewKD's for CIFAR
ARGS = {"cc": {"dim": 8}, "crd": {"dim": 8, "negatives": 32}}


def hint(name, **changes):
    soft = {"loss": name, "weight": WEIGHTS[name], "warmup_epochs": 0, "args": ARGS.get(name, {})}
    return dict(STUDENT, name=name, soft=soft) | changes


def test_bank_of_the_papers_pair_has_its_size():
    """ReviewKD from BEiTv2-L to ResNet-50 adds the 18,665,096 parameters that were measured in vanillaKD."""
    student = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (2048,)]
    teacher = [(64, 56, 56), (256, 28, 28), (1024, 14, 14), (1024, 7, 7), (1024,)]
    module = losses.ReviewKD(student, teacher)
    assert sum(p.numel() for p in module.parameters()) == 18_665_096


# ---------------------------------------------------------------- training


def test_the_four_train_beside_a_logit_loss_and_resume_to_the_bit(tmp_path, teacher_file):
    students = [STUDENT, *(hint(name) for name in WEIGHTS)]
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=students, save_every=7, epochs=1))
    whole = run(path, tmp_path / "whole")
    run(path, tmp_path / "parts", "--limit", 9)
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    first, *_, last = [row for row in rows(tmp_path / "whole") if "soft/crd" in row]
    assert all(0 < last[f"soft/{name}"] < first[f"soft/{name}"] for name in ("cc", "rkd", "reviewkd"))
    tensors, _ = final_state(tmp_path / "whole")
    assert {"crd.safetensors:soft.bank_student", "cc.safetensors:soft.embed_teacher.weight"} <= tensors.keys()
    assert any(key.startswith("reviewkd.optimizer.safetensors") for key in tensors)
    bank = tensors["crd.safetensors:soft.bank_student"]
    assert bank.shape == (898, 8) and (bank.norm(dim=1) - 1).abs().max() < 1e-5  # every image has been seen
    for name in WEIGHTS:
        exported = safetensors.torch.load_file(tmp_path / "whole" / "students" / name / "model.safetensors")
        plain = timm.create_model("cifar_resnet8", num_classes=10, **STUDENT["model_args"])
        assert exported.keys() == plain.state_dict().keys()  # no projector, no bank
    assert [s["parameters"] for s in whole["students"]] == [2718] * 5

    alone = write(tmp_path / "a.json", **distilled(teacher_file, students=[hint("crd")], save_every=7, epochs=1))
    run(alone, tmp_path / "alone")
    assert_same_run(tmp_path / "alone", tmp_path / "whole", ["crd"])


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_reaches_the_student_and_its_projectors_are_optimized(name, teacher_file):
    students = [hint(name, hard=dict(STUDENT["hard"], weight=0.0))]
    settings = make_recipe(**distilled(teacher_file, students=students))
    teacher = models.build("cifar_resnet8", classes=10, size=8, model_args={"widths": [8, 8, 16, 16]}).eval()
    module, optimizer = train.make_student(settings, settings.students[0], teacher, torch.arange(898) % 10)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters()} == optimized
    images = torch.rand(16, 3, 8, 8)
    with torch.no_grad():
        taught = teacher(images, train.teacher_taps(settings, teacher))
    module.train()(images, taught, torch.arange(16) % 10, torch.arange(16), 1.0)["loss"].backward()
    trained = {n: p for n, p in module.named_parameters() if not n.startswith("net.model.fc.")}  # features come before it
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert (len(trained) > len([n for n in trained if n.startswith("net.")])) == (name != "rkd")


def test_taps_cost_nothing_when_no_loss_asks(teacher_file, monkeypatch):
    settings = make_recipe(**distilled(teacher_file))
    assert train.teacher_taps(settings, None) is None
    student, _ = train.make_student(settings, settings.students[1])
    monkeypatch.setattr(type(student.net.model), "forward_intermediates", None)  # would fail when called
    student(torch.rand(4, 3, 8, 8), (torch.randn(4, 10), None), torch.arange(4), None, 1.0)


def test_crd_refuses_a_stream_before_any_work(tmp_path, teacher_file, capsys):
    stream = dict(data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=10)
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=[hint("crd")], **stream))
    with pytest.raises(SystemExit):
        run(path, tmp_path / "out")
    assert "student 'crd': crd draws negatives by class" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_processes_keep_one_bank(tmp_path, teacher_file):
    """The real launcher, two processes: the losses of RKD and CRD see half a batch each, the banks see all of it."""
    students = [hint("crd"), hint("reviewkd")]
    path = write(
        tmp_path / "r.json",
        **distilled(teacher_file, students=students, batch_size_per_process=32, epochs=1, data__drop_last=True, log_every=1),
    )
    launcher = Path(sys.executable).with_name("accelerate")
    code = "import torch, train, accelerate; old = train.save\n"
    code += "def save(run):\n    for t in run.trainees:\n        for k, v in t.accelerator.unwrap_model(t.module).state_dict().items():\n"
    code += "            if 'bank' in k or 'net.' in k and 'running' not in k:\n"
    code += "                a = run.lead.gather(v.float().flatten()[None] if v.ndim else v[None].float()[None])\n"
    code += "                assert torch.equal(a[0], a[1]), k\n    old(run)\n"
    code += "train.save = save\ntrain.main()\n"
    (tmp_path / "checked.py").write_text(code)
    common = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2"]
    command = [launcher, "launch", *common, "--main_process_port", "0", tmp_path / "checked.py", path, "--workers", "0"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "two")], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tensors, _ = final_state(tmp_path / "two")
    bank = tensors["crd.safetensors:soft.bank_student"]
    assert ((bank.norm(dim=1) - 1).abs() < 1e-5).sum() == 14 * 64  # the images of both processes
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["hardware"]["processes"] == 2
