"""optim.py: learning rates against timm and RepDistiller, optimizers against formulas, gradients that are
not finite.
"""

import pytest
import timm
import torch
from conftest import STUDENT, make_recipe
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import distill
import launch
import optim
import recipe

# ---------------------------------------------------------------- schedules


def test_cosine_per_epoch_is_timms():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=5e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=30, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-6)
    ours = recipe.Cosine(kind="cosine", warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6, per="epoch")
    for epoch in range(30):
        for step in (10 * epoch, 10 * epoch + 9):
            rate = optimizer.param_groups[0]["lr"]
            assert optim.lr_at(step, 10, 30, ours, 5e-3) == pytest.approx(rate, rel=1e-12)
        theirs.step(epoch + 1)


def test_cosine_per_step_moves_every_step_and_ends_at_the_floor():
    schedule = recipe.Cosine(kind="cosine", warmup_epochs=1, warmup_lr=0.0, min_lr=0.01, per="step")
    rates = [optim.lr_at(step, 10, 5, schedule, 1.0) for step in range(50)]
    assert rates[0] == 0 and rates[5] == 0.5
    assert rates[10] == pytest.approx(0.01 + 0.99 * (1 + 0.8090169943749475) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.01 < rates[-1] < 0.02


def test_milestones_are_those_of_repdistiller():
    """RepDistiller counts epochs from 1 and decays for epoch > 150: from 0, epoch 150 is the first at a
    tenth.
    """
    schedule = recipe.Milestones(kind="milestones", milestones=(150, 180, 210), factor=0.1)
    epochs = (0, 149, 150, 179, 180, 210, 239)
    rates = {epoch: optim.lr_at(782 * epoch, 782, 240, schedule, 0.05) for epoch in epochs}
    expected = {0: 0.05, 149: 0.05, 150: 5e-3, 179: 5e-3, 180: 5e-4, 210: 5e-5, 239: 5e-5}
    assert rates == pytest.approx(expected)
    assert optim.lr_at(782 * 150 - 1, 782, 240, schedule, 0.05) == 0.05


def test_dkd_is_ramped_up_as_in_mdistiller():
    soft = recipe.Soft(loss="dkd", weight=2.0, warmup_epochs=20, args={})
    assert [optim.soft_weight_at(e, soft) for e in (0, 4, 19, 100)] == [0.1, 0.5, 2.0, 2.0]
    constant = recipe.Soft(loss="kd", weight=0.9, warmup_epochs=0, args={})
    assert optim.soft_weight_at(0, constant) == 0.9
    assert optim.soft_weight_at(0, None) == 0.0


def test_layer_decay_keeps_its_factors():
    """timm gives groups of layer decay an lr_scale, which a new learning rate must not undo."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert {0.25, 0.5, 1.0} <= scales
    optim.set_lr(optimizer, 0.1)
    assert all(group["lr"] == 0.1 * group["lr_scale"] for group in optimizer.param_groups)


# ---------------------------------------------------------------- optimizers


def built(student, **changes):
    settings = make_recipe(students=[student], **changes)
    return distill.build_student(settings, settings.students[0])


def lamb_by_hand(parameters, gradients, moments, step, lr, decay, eps=1e-6):
    """You et al. 2020 with timm's and upstream's choices: gradients clipped to norm 1, L2 into the ratio."""
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().clamp(min=1.0)
    for name, p in parameters.items():
        g = gradients[name] / norm
        m, v = moments[name]
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g * g)
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + eps)
        if p.ndim > 1:  # biases and norms: no decay, no trust ratio
            update = update + decay * p
            update = update * (p.norm() / update.norm() if p.norm() > 0 and update.norm() > 0 else 1.0)
        p.sub_(lr * update)


def test_lamb_is_the_papers():
    """The optimizer that build_student gives, against the formulas, five steps in float64."""
    module, optimizer = built(
        dict(STUDENT, soft=None, optimizer="lamb", optimizer_args={}, lr=5e-3, weight_decay=0.03)
    )
    module.double()
    names = dict(module.named_parameters())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {n for n, p in names.items() if id(p) in decayed} == {n for n, p in names.items() if p.ndim > 1}
    expected = {n: p.detach().clone() for n, p in names.items()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in expected.items()}
    torch.manual_seed(0)
    for step in range(1, 6):
        gradients = {n: torch.randn_like(p) * 10 ** (step - 3) for n, p in expected.items()}
        for n, p in names.items():
            p.grad = gradients[n].clone()
        optimizer.step()
        lamb_by_hand(expected, gradients, moments, step, 5e-3, 0.03)
    for n, p in names.items():
        torch.testing.assert_close(p.detach(), expected[n], rtol=1e-9, atol=1e-12)


def test_lamb_in_float32_is_that_of_float64():
    """Bias corrections in float32 would change each step by 6e-6; rounding alone leaves less than 1e-6."""
    moved = []
    for kind in (torch.float32, torch.float64):
        module, optimizer = built(dict(STUDENT, soft=None, optimizer="lamb", optimizer_args={}, lr=0.5))
        module.to(kind)
        start = [p.detach().clone() for p in module.parameters()]
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            for p in module.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(kind)
            optimizer.step()
        gaps = [(p - q).double().flatten() for p, q in zip(module.parameters(), start, strict=True)]
        moved.append(torch.cat(gaps).detach())
    assert (moved[0] - moved[1]).norm() < 1e-6 * moved[1].norm()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_upstreams_optimizer_groups_are_ours(name):
    """As create_optimizer_v2 of timm groups the bare model."""
    model = timm.create_model(name, num_classes=10)
    theirs = create_optimizer_v2(model, "lamb", lr=1e-3, weight_decay=0.1)
    bare = {id(p): n for n, p in model.named_parameters()}
    plain = {bare[id(p)] for g in theirs.param_groups if not g["weight_decay"] for p in g["params"]}
    student = dict(STUDENT, soft=None, model=name, model_args={}, optimizer="lamb", optimizer_args={})
    module, optimizer = built(dict(student, weight_decay=0.1), data__size=224)
    names = {id(p): n.removeprefix("net.model.") for n, p in module.named_parameters()}
    groups = [group for group in optimizer.param_groups if not group["weight_decay"]]
    assert {names[id(p)] for group in groups for p in group["params"]} == plain


# ---------------------------------------------------------------- one step


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: a tensor's value, or a shape that depends on values."""

    waits = (
        *("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"),
        *("_unique2", "bincount"),
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in self.waits:
            self.seen.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


SHAPES = [(8, 3, 3, 3), (8,), (5, 8), (4,)]


class Steps:
    """Four tensors with a prepared optimizer of a recipe's name."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.module = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
        momentum = {"momentum": 0.9} if name in ("sgd", "momentum") else {}
        fields = dict(optimizer=name, optimizer_args=momentum, lr=0.1, weight_decay=0.05)
        student = type("Student", (), fields | dict(decay_norm_and_bias=False))
        self.accelerator = launch.make_accelerator()
        optimizer = optim.make_optimizer(self.module, student)
        self.optimizer = self.accelerator.prepare(optimizer)

    def step(self, gradients, clip_grad=None):
        for parameter, gradient in zip(self.module, gradients, strict=True):
            parameter.grad = gradient.clone()
        return optim.clip_and_step(self.accelerator, self.optimizer, clip_grad)

    def everything(self):
        state = self.optimizer.optimizer.state
        return [*self.module, *(v for p in self.module for v in state[p].values() if torch.is_tensor(v))]


def gradients_of(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


OPTIMIZERS = ["sgd", "momentum", "adamw", "lamb", "nadamw"]


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_counts_as_zero(name, value, first, clip_grad):
    """As the same optimizer given zero gradients: one bad number, in the first step or in a later one."""
    bad, zero = Steps(name), Steps(name)
    for step in range(4):
        gradients = gradients_of(step)
        if step != (0 if first else 2):
            assert bool(bad.step(gradients, clip_grad)) and bool(zero.step(gradients, clip_grad))
            continue
        before = [p.detach().clone() for p in bad.module]
        for parameter in zero.module:
            parameter.grad = torch.zeros_like(parameter)
        with Reads() as of_the_optimizer:  # of step counts, which some optimizers keep on the CPU
            zero.optimizer.optimizer.step()
        gradients[2][1, 3] = value
        with Reads() as reads:
            finite = bad.step(gradients, clip_grad)
        assert finite.dtype is torch.bool and finite.shape == () and not finite
        assert reads.seen == of_the_optimizer.seen and not (reads.seen and name in optim.FUSED)
        moved = [not torch.equal(a, b) for a, b in zip(before, bad.module, strict=True)]
        assert moved[0] and (first or all(moved))  # weight decay acts, and what momentum there is
    for a, b in zip(bad.everything(), zero.everything(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_is_torchs(name):
    """To the global norm, where it is larger; the gradients are dropped."""
    ours, theirs = Steps(name), Steps(name)
    for step in range(3):
        gradients = [g * 10 ** (step - 1) for g in gradients_of(step)]
        assert ours.step(gradients, 5.0)
        assert all(parameter.grad is None for parameter in ours.module)
        for parameter, gradient in zip(theirs.module, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_(theirs.module, 5.0)
        assert (norm > 5) == (step > 0)
        theirs.optimizer.step()
    for a, b in zip(ours.everything(), theirs.everything(), strict=True):
        assert torch.equal(a, b)
