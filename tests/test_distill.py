"""distill.py: the teacher, frozen and left as it was; students with their losses, alone and under
accelerate.
"""

import copy
import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    STUDENT,
    distilled,
    final_state,
    make_recipe,
    rows,
    run,
    run_until,
    stopped,
    write,
)
from test_optim import Reads
from torch import nn

import distill
import evaluate
import launch
import log
import losses
import models
import optim
import train

TEACHER = {"widths": [8, 8, 16, 16]}
WEIGHTS = {"cc": 0.02, "rkd": 1.0, "crd": 0.8, "reviewkd": 0.6}  # RepDistiller's and ReviewKD's for CIFAR
ARGS = {"cc": {"dim": 8}, "crd": {"dim": 8, "negatives": 32}}


def hint(name, **changes):
    """A student with a loss on features."""
    soft = {"loss": name, "weight": WEIGHTS[name], "warmup_epochs": 0, "args": ARGS.get(name, {})}
    return dict(STUDENT, name=name, soft=soft) | changes


def network_of(teacher_file):
    return models.build(
        "cifar_resnet8", classes=10, size=8, model_args=TEACHER, checkpoint=teacher_file
    ).eval()


# ---------------------------------------------------------------- the frozen teacher


def perturb(network):
    """Weights as after training: nothing is 0 or 1 that starts so."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_var", "weight")) and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.normal_(0, 0.1, generator=generator)
    return network


@pytest.mark.parametrize(
    "name, size, left",
    [
        ("cifar_resnet20", 32, 0),
        ("resnet26d", 64, 1),  # the one after its stem, which lies in another module
        ("resnetv2_50", 64, 17),  # BatchNorm before the convolution
        ("densenet121", 32, 62),
        ("regnety_002", 64, 0),  # BatchNorm with its activation inside
        ("convnext_atto", 64, 0),
        ("vit_tiny_patch16_224", 224, 0),
    ],
)
def test_a_frozen_network_gives_the_same_logits_with_less(name, size, left):
    network = perturb(models.build(name, classes=10, size=size))
    state = copy.deepcopy(network.state_dict())
    frozen, images = distill.freeze(network, size), torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), network(images), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) == left
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())  # a copy
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


class Twice(nn.Module):
    """A convolution whose output is read by a BatchNorm and by a sum that no module shows."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.num_classes = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 4

    def forward(self, x):
        x = self.conv(x)
        return (self.bn(x) + x).mean((2, 3))


def test_a_convolution_that_is_read_twice_is_not_folded():
    network = models.Network(perturb(Twice()), (0.5,) * 3, (0.5,) * 3)
    network.model.bn.running_var.fill_(4.0)
    frozen, images = distill.freeze(network, 32), torch.rand(2, 3, 32, 32)
    assert torch.equal(frozen(images), network(images))


def test_the_teacher_is_not_touched(tmp_path, teacher_file, monkeypatch):
    """A run leaves it in eval mode, without gradients, with its weights, and outside of the checkpoints."""
    original, seen = train.make_teacher, types.SimpleNamespace()

    def remember(*arguments):
        seen.network, seen.scores = original(*arguments)
        seen.before = copy.deepcopy(seen.network.state_dict())
        return seen.network, seen.scores

    monkeypatch.setattr(train, "make_teacher", remember)
    result = run(write(tmp_path / "r.json", **distilled(teacher_file, epochs=1)), tmp_path / "out")
    teacher = seen.network
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(v, seen.before[k]) for k, v in teacher.state_dict().items())
    assert seen.scores["n"] == 899 and seen.scores["top1"] > 50 and result["teacher"] == seen.scores
    assert not any("teacher" in name for name in final_state(tmp_path / "out")[0])


@pytest.mark.parametrize("precision, alike", [(None, False), ("fp32", True)])
def test_the_teacher_has_its_own_precision(precision, alike, tmp_path, teacher_file, monkeypatch):
    """The students in bfloat16; their teacher too, unless the recipe says float32."""
    seen, original = [], distill.Teacher.__call__

    def spied(teacher, images):
        taught = original(teacher, images)
        seen.append((teacher.network(images), taught[0]))
        return taught

    monkeypatch.setattr(launch, "precision", lambda accelerator: "bf16")
    monkeypatch.setattr(distill.Teacher, "__call__", spied)
    changes = distilled(teacher_file, students=[STUDENT], teacher__precision=precision)
    run(write(tmp_path / "r.json", **changes), tmp_path / "out", "--limit", 1)
    ((wanted, got),) = seen
    assert torch.equal(wanted, got.float()) == alike
    assert got.dtype == (torch.float32 if alike else torch.bfloat16)
    torch.testing.assert_close(wanted, got.float(), rtol=0.05, atol=0.3)


def test_chance_level_is_three_standard_deviations_wide():
    assert distill.at_chance({"top1": 10.0, "n": 899}, 10) and distill.at_chance({"top1": 12.9, "n": 899}, 10)
    assert not distill.at_chance({"top1": 13.1, "n": 899}, 10)
    assert not distill.at_chance({"top1": 0.2, "n": 50_000}, 1000)


# ---------------------------------------------------------------- a student and its losses


def test_the_terms_of_a_student(teacher_file):
    """loss = hard_weight * hard + soft_weight * soft in float32, the label loss alone without a teacher."""
    weighted = dict(STUDENT, hard=dict(STUDENT["hard"], weight=0.25))
    settings = make_recipe(
        **distilled(teacher_file, students=[weighted, dict(STUDENT, name="alone", soft=None)])
    )
    images, target = torch.rand(8, 3, 8, 8), torch.arange(8)
    taught = torch.randn(8, 10), None
    both, alone = (distill.build_student(settings, student)[0].eval() for student in settings.students)
    logits = both.net(images)
    terms = both(images, taught, target, None, torch.tensor(0.5))
    torch.testing.assert_close(terms["hard"], losses.cross_entropy(logits, target))
    torch.testing.assert_close(terms["soft"], losses.kd(logits, taught[0], temperature=4.0))
    torch.testing.assert_close(terms["loss"], 0.25 * terms["hard"] + 0.5 * terms["soft"])
    assert torch.equal(terms["logits"], logits) and not terms["logits"].requires_grad
    terms = alone(images, None, target, None, torch.tensor(0.0))
    assert terms.keys() == {"loss", "hard"} and torch.equal(terms["loss"], terms["hard"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = both(images, taught, target, None, torch.tensor(0.5))
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_a_student_starts_from_the_seed_alone(teacher_file):
    """Not from the generator's state, from its place or from the other students."""
    settings = make_recipe(**distilled(teacher_file))
    first = distill.build_student(settings, settings.students[1])[0].state_dict()
    for student in settings.students:  # of one shape
        state = distill.build_student(settings, student)[0].state_dict()
        assert all(torch.equal(first[key], value) for key, value in state.items())
    other = dataclasses.replace(settings, seed=2)
    state = distill.build_student(other, settings.students[1])[0].state_dict()
    assert not torch.equal(first["net.model.conv1.weight"], state["net.model.conv1.weight"])


def test_one_batch_can_be_learnt_by_heart(teacher_file):
    """With labels the loss falls to 0; with the teacher alone its probabilities become the student's."""
    plain = dict(
        STUDENT,
        model_args={"widths": [8, 8, 16, 16]},
        optimizer="adamw",
        optimizer_args={},
        lr=5e-3,
        weight_decay=0.0,
    )
    labels = dict(plain, name="labels", soft=None)
    taught = dict(plain, name="taught", hard=dict(STUDENT["hard"], weight=0.0))
    taught["soft"] = {"loss": "kd", "weight": 1.0, "warmup_epochs": 0, "args": {"temperature": 1.0}}
    settings = make_recipe(**distilled(teacher_file, students=[labels, taught]))
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.arange(16) % 10
    with torch.no_grad():
        logits = network_of(teacher_file)(images)
    for settings_of_one in settings.students:
        accelerator = Accelerator()
        module, optimizer = accelerator.prepare(*distill.build_student(settings, settings_of_one))
        student = distill.Student(settings_of_one, accelerator, module.train(), optimizer, None)
        soft_weight = optim.soft_weight_at(0, settings_of_one.soft)
        for _ in range(200):
            student.sums = 0.0
            student.backward(student.forward(images, (logits, None), target, None, soft_weight))
            student.step()
        if student.name == "labels":
            assert student.sums[distill.TERMS.index("hard")] < 0.01
        else:
            assert (student.net(images).softmax(1) - logits.softmax(1)).abs().max() < 0.03


def test_ema_is_the_running_average(tmp_path, capsys):
    """After one, two and three steps; BatchNorm's statistics too. It is evaluated and exported beside the
    student.
    """
    changes = dict(students=[dict(STUDENT, soft=None, ema=0.8)], save_every=1, epochs=1)
    path, out = write(tmp_path / "r.json", **changes), tmp_path / "run"
    settings = make_recipe(students=[dict(STUDENT, soft=None)])
    start = distill.build_student(settings, settings.students[0])[0].net.state_dict()
    average = {k: v.double() for k, v in start.items() if "num_batches" not in k}
    for steps in (1, 2, 3):
        run_until(steps, path, out, "--resume")
        tensors, _ = final_state(out)
        for key in average:
            average[key] = 0.8 * average[key] + 0.2 * tensors[f"kd.safetensors:net.{key}"].double()
            ema = tensors[f"kd.ema.safetensors:{key}"].double()
            torch.testing.assert_close(ema, average[key], rtol=1e-5, atol=1e-7)
    result = run(path, out, "--resume")
    assert result["students"][0]["last"]["ema"]["n"] == 899
    exported = models.load_exported(out / "students" / "kd-ema")[0].model.state_dict()
    last = final_state(out)[0]
    assert all(torch.equal(v, last[f"kd.ema.safetensors:model.{k}"]) for k, v in exported.items())
    assert "top1_ema/kd" in rows(out)[-1]
    capsys.readouterr()
    evaluate.main([str(out), "--json", "--workers", "0"])
    found = json.loads(capsys.readouterr().out)
    assert {row["checkpoint"].split("/")[-1] for row in found} == {"kd", "kd-ema"}


# ---------------------------------------------------------------- losses on features


def test_bank_of_the_papers_pair_has_its_size():
    """ReviewKD from BEiTv2-L to ResNet-50 adds the 18,665,096 parameters that were measured in vanillaKD."""
    student = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (2048,)]
    teacher = [(64, 56, 56), (256, 28, 28), (1024, 14, 14), (1024, 7, 7), (1024,)]
    module = losses.ReviewKD(student, teacher)
    assert sum(p.numel() for p in module.parameters()) == 18_665_096


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_reaches_the_student_and_its_projectors_are_optimized(name, teacher_file):
    students = [hint(name, hard=dict(STUDENT["hard"], weight=0.0))]
    settings = make_recipe(**distilled(teacher_file, students=students))
    teacher = models.build("cifar_resnet8", classes=10, size=8, model_args=TEACHER).eval()
    taps = distill.teacher_taps(settings, teacher)
    labels = torch.arange(898) % 10
    module, optimizer = distill.build_student(settings, settings.students[0], teacher.shapes(8, taps), labels)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters()} == optimized
    images = torch.rand(16, 3, 8, 8)
    with torch.no_grad():
        taught = teacher(images, taps)
    module.train()(images, taught, torch.arange(16) % 10, torch.arange(16), 1.0)["loss"].backward()
    # the classifier comes after the features
    trained = {n: p for n, p in module.named_parameters() if not n.startswith("net.model.fc.")}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert (len(trained) > len([n for n in trained if n.startswith("net.")])) == (name != "rkd")


def test_taps_cost_nothing_when_no_loss_asks(teacher_file, monkeypatch):
    settings = make_recipe(**distilled(teacher_file))
    assert distill.teacher_taps(settings, None) is None
    student, _ = distill.build_student(settings, settings.students[1])
    monkeypatch.setattr(type(student.net.model), "forward_intermediates", None)  # would fail when called
    student(torch.rand(4, 3, 8, 8), (torch.randn(4, 10), None), torch.arange(4), None, 1.0)


def test_crd_refuses_a_stream_before_any_work(tmp_path, teacher_file, capsys):
    stream = dict(data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=10)
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=[hint("crd")], **stream))
    code, message = stopped(capsys, path, tmp_path / "out")
    assert code == 2 and "student 'crd': crd draws negatives by class" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- memory and time


def test_checkpointed_activations_change_memory_and_nothing_else():
    """Equal losses, gradients and BatchNorm statistics: a recomputed block must not count its batch twice."""

    def step(checkpointing):
        torch.manual_seed(0)
        network = models.build("resnet10t", classes=10, size=32).train()
        images = torch.rand(4, 3, 32, 32)
        network.model.set_grad_checkpointing(checkpointing)
        kept = log.activation_bytes(network, 32, launch.make_accelerator())
        loss = network(images).square().mean()
        with distill.frozen_statistics(network):
            loss.backward()
        return loss, {n: p.grad for n, p in network.named_parameters()}, dict(network.named_buffers()), kept

    (loss, gradients, buffers, kept), (again, same, same_buffers, less) = step(False), step(True)
    assert torch.equal(loss, again) and less < 0.8 * kept
    for name in gradients:
        torch.testing.assert_close(gradients[name], same[name], rtol=1e-5, atol=1e-7)
    for name in buffers:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(buffers[name], same_buffers[name]), name


VIT = dict(
    model="vit_tiny_patch16_224",
    model_args={"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3},
)


def test_a_recipe_checkpoints_activations(tmp_path, capsys):
    """The whole run is the same run; a network without the feature is refused by name."""
    for name in ("plain", "saved"):
        students = [dict(STUDENT, **VIT, name="alone", soft=None, grad_checkpointing=name == "saved")]
        run(write(tmp_path / "r.json", students=students), tmp_path / name, "--limit", 4)
    plain, saved = (final_state(tmp_path / name)[0] for name in ("plain", "saved"))
    for key, value in plain.items():
        torch.testing.assert_close(value, saved[key], rtol=0, atol=1e-6)
    refused = write(tmp_path / "r.json", students=[dict(STUDENT, soft=None, grad_checkpointing=True)])
    code, message = stopped(capsys, refused, tmp_path / "no")
    assert code == 2 and "grad_checkpointing: cifar_resnet8 does not have it" in message


def with_soft(name, loss, **changes):
    arguments = {"kd": {"temperature": 4.0}, "dkd": dict(alpha=1.0, beta=2.0, temperature=4.0), "bkl": {}}
    arguments |= {"dist": dict(beta=1.0, gamma=1.0, temperature=1.0)}
    soft = {"loss": loss, "weight": 1.0, "warmup_epochs": 0, "args": arguments[loss]}
    return dict(STUDENT, name=name, soft=soft, **changes)


def test_the_host_never_waits_for_a_step(tmp_path, teacher_file, monkeypatch):
    """Between log rows nothing is read back: fused optimizers, clipping, EMA, mixing and every logit loss."""
    students = [
        with_soft("kd", "kd", ema=0.99),
        with_soft("dkd", "dkd", optimizer="adamw", optimizer_args={}, clip_grad=1.0),
        with_soft("dist", "dist", optimizer="momentum"),
        with_soft("bkl", "bkl", hard={"loss": "binary_cross_entropy", "weight": 1.0, "smoothing": 0.1}),
    ]
    mixing = dict(data__mixup=0.2, data__cutmix=1.0, data__drop_last=True)
    changes = dict(students=students, log_every=1000, save_every=1000, **mixing)
    original, reads, counter = train.train, [], Reads()

    def watched(settings, loader, teacher, students, log_, checkpoints, signals, step, stop):
        batches = list(loader.batches(settings.seed, 0, 7))  # augmentation reads what it draws, on the CPU
        monkeypatch.setattr(loader, "batches", lambda *_: iter(batches))

        def agreed():
            reads.append(len(counter.seen))
            if len(reads) == 6:
                raise InterruptedError
            return 0

        monkeypatch.setattr(signals, "agreed", agreed)
        with counter:  # a step more than are made, because the last one is saved
            original(settings, loader, teacher, students, log_, checkpoints, signals, step, stop)

    monkeypatch.setattr(train, "train", watched)
    with pytest.raises(InterruptedError):
        run(write(tmp_path / "r.json", **distilled(teacher_file, **changes)), tmp_path / "out", "--limit", 7)
    assert reads == [0] * 6, counter.seen


# ---------------------------------------------------------------- gradients that are not finite


def test_every_student_has_its_own_gradient_scaler(tmp_path, teacher_file, monkeypatch):
    """float16's scaler can be tested without a GPU: one overflow stops the step of that student alone.

    With clipping, which unscales: one Accelerator for two would unscale the other's gradients, too.
    """
    students = [with_soft("kd", "kd", clip_grad=1e3), with_soft("dkd", "dkd", clip_grad=1e3)]
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=students, epochs=1))
    run(path, tmp_path / "plain")
    make, original = launch.make_accelerator, train.train
    scales = iter((2.0**10, 2.0**126))  # the second one overflows

    def with_a_scaler(**settings):
        accelerator = make(**settings)
        if "gradient_accumulation_steps" in settings:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=next(scales))
        return accelerator

    def as_on_a_gpu(settings, loader, teacher, students, *rest):
        monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # clipping unscales first
        for student in students:
            student.accelerator.native_amp = True
        original(settings, loader, teacher, students, *rest)

    monkeypatch.setattr(launch, "make_accelerator", with_a_scaler)
    monkeypatch.setattr(train, "train", as_on_a_gpu)
    monkeypatch.setattr(launch, "precision", lambda accelerator: "no")
    run(path, tmp_path / "scaled")
    scaled, state = final_state(tmp_path / "scaled")
    assert (state["kd"]["skipped"], state["dkd"]["skipped"] >= 1) == (0, True)
    last = [row for row in rows(tmp_path / "scaled") if "lr/dkd" in row][-1]
    assert last["overflows/dkd"] >= 1 and not any(key.startswith("skipped") for key in last)
    assert rows(tmp_path / "scaled")[0]["lr/dkd"] == rows(tmp_path / "plain")[0]["lr/dkd"]
    assert state["kd"]["scaler"]["scale"] == 2.0**10 and state["dkd"]["scaler"]["scale"] < 2.0**126
    for key, value in final_state(tmp_path / "plain")[0].items():
        if key.startswith("kd."):
            torch.testing.assert_close(value, scaled[key], rtol=1e-4, atol=1e-6)
        assert torch.isfinite(scaled[key]).all()


def counted(skips, steps, stop, scale=None):
    """A student after windows of `steps` steps, of which these many were skipped; returns it and the
    warnings.
    """
    scaler = scale and types.SimpleNamespace(get_scale=lambda: scale)
    accelerator = types.SimpleNamespace(scaler=scaler, distributed_type=launch.DistributedType.NO)
    optimizer = types.SimpleNamespace(param_groups=[{"lr": 0.1}])
    student = distill.Student(types.SimpleNamespace(name="a"), accelerator, None, optimizer, None)
    student.last_part, warnings = torch.tensor([float("nan"), 1.0, 1.0]), []
    lead = types.SimpleNamespace(is_main_process=False, print=warnings.append)
    fields = dict(lead=lead, folder=Path("out"), index=torch.arange(2), steps=steps, stop=stop)
    for i, skipped in enumerate(skips):
        log.Log.check_finite(types.SimpleNamespace(**fields), student, skipped, (i + 1) * steps)
    return student, warnings


def test_skipped_steps_are_counted():
    student, warnings = counted([0, 5, 2, 0], 5, 5000)
    assert (student.skipped, student.skipped_in_a_row) == (7, 0) and len(warnings) == 2
    expected = (
        "warning: student 'a': gradient not finite in 2 of the last 5 steps, where it was replaced by zeros; "
        "7 such steps by step 15"
    )
    assert warnings[1] == expected
    counted([1, 1, 1] * 16, 5, 5000)  # 1 % of 5000 is 50
    for skips in ([5, 5], [1] * 51):  # ten in a row; more than 1 %
        told = f"student 'a': gradient not finite in .*; {sum(skips)} such steps by step .*: see out/"
        with pytest.raises(launch.TrainingError, match=told):
            counted(skips, 5, 5000)
    student, warnings = counted([5, 5, 5], 5, 5000, scale=2.0**10)  # float16's scaler may need some
    assert warnings == [] and student.skipped == 15
    told = "by step 5; float16's gradient scale is 0.0005: try --mixed_precision bf16"
    with pytest.raises(launch.TrainingError, match=told):
        counted([5], 5, 5000, scale=5e-4)
