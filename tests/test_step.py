"""What makes a step fast changes no result: folded teachers, optimizers that skip on the device, nothing read by the host."""

import copy
import dataclasses

import pytest
import timm
import torch
from conftest import STUDENT, distilled, make_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
import train


def perturb(network):
    """Weights as after training: nothing is 0 or 1 that starts so."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_var", "weight")) and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif (tensor.is_floating_point() and tensor.dim() == 1) or "bias_table" in name:
                tensor.normal_(0, 0.1, generator=generator)
    return network


@pytest.mark.parametrize(
    "name, size, left",
    [
        ("cifar_resnet20", 32, 0),
        ("resnet26d", 64, 0),
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
    frozen, images = models.freeze(network, size), torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), network(images), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) == left
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())  # a copy
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


def test_a_frozen_beit_gathers_its_position_bias_once(monkeypatch):
    network = perturb(models.build("beit_base_patch16_224", classes=10, size=32, model_args={"img_size": 32, "depth": 2}))
    frozen, images = models.freeze(network, 32), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        for module in frozen.modules():
            if getattr(module, "relative_position_bias_table", None) is not None:
                module.relative_position_bias_table.fill_(torch.nan)
        assert torch.equal(frozen(images), before)


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
    frozen, images = models.freeze(network, 32), torch.rand(2, 3, 32, 32)
    assert torch.equal(frozen(images), network(images))


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(8, 3, 3, 3), (8,), (5, 8), (4,)]]


def groups(tensors):
    return [{"params": tensors[::2], "weight_decay": 0.05}, {"params": tensors[1::2], "weight_decay": 0.0}]


@pytest.mark.parametrize("arguments", [{}, {"betas": (0.8, 0.9), "eps": 1e-3}, {"max_grad_norm": None}])
def test_lamb_is_timms(arguments):
    """Over 20 steps with gradients far above and below the clipping norm, and one tensor that is zero."""
    ours, theirs = parameters(), parameters()
    for tensors in (ours, theirs):
        tensors[3].data.zero_()
    timms = timm.optim.Lamb(groups(theirs), lr=0.02, **arguments)
    own = models.Lamb.like(timm.optim.Lamb(groups(ours), lr=0.02, **arguments))
    for step in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape) * 10 ** (step % 4 - 2)
        own.step()
        timms.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb"])
def test_a_step_is_skipped_on_the_device(name, first):
    """As if it had not been: weights, moments and step count, also where it is the very first."""

    def run(bad):
        torch.manual_seed(1)
        module = nn.ParameterList(parameters())
        student = type("Student", (), dict(optimizer=name, lr=0.1, weight_decay=0.05, decay_norm_and_bias=False))
        student.optimizer_args = {"momentum": 0.9} if name in ("sgd", "momentum") else {}
        optimizer = train.make_optimizer(module, student)
        train.start_momentum(optimizer)
        good = 0
        while good < 4:
            skip = good in bad
            bad = bad - {good}
            for p in module:
                p.grad = torch.full_like(p, torch.nan) if skip else torch.randn(p.shape)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(skip))
            optimizer.step()
            good += not skip
        state = [v for values in optimizer.state.values() for v in values.values()]
        return [p.detach() for p in module], state

    (plain, plain_state), (skipped, state) = run(set()), run({0} if first else {2})
    assert len(state) == len(plain_state)
    assert all(torch.equal(a, b) for a, b in zip(plain + plain_state, skipped + state, strict=True))


def test_lamb_refuses_what_only_timms_has():
    with pytest.raises(ValueError, match="lamb takes lr, betas, eps, weight_decay, max_grad_norm, found trust_clip"):
        models.Lamb.like(timm.optim.Lamb(groups(parameters()), trust_clip=True))


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: a tensor's value, or a shape that depends on values."""

    waits = ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in self.waits:
            self.found.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


def student(name, soft=None, **changes):
    arguments = {"kd": {"temperature": 4.0}, "dkd": dict(alpha=1.0, beta=2.0, temperature=4.0), "bkl": {}}
    arguments |= {"dist": dict(beta=1.0, gamma=1.0, temperature=1.0)}
    soft = soft and {"loss": soft, "weight": 1.0, "warmup_epochs": 0, "args": arguments[soft]}
    return dict(STUDENT, name=name, soft=soft, **changes)


def test_the_host_never_waits_for_a_step(tmp_path, teacher_file):
    """Between log rows nothing is read back, for the fused optimizers, LAMB, clipping, EMA, mixing and every logit loss."""
    students = [
        student("kd", "kd", ema=0.99),
        student("dkd", "dkd", optimizer="adamw", optimizer_args={}, clip_grad=1.0),
        student("dist", "dist", optimizer="lamb", optimizer_args={}),
        student("bkl", "bkl", hard={"loss": "binary_cross_entropy", "weight": 1.0, "smoothing": 0.1}),
    ]
    changes = dict(students=students, data__mixup=0.2, data__cutmix=1.0, data__drop_last=True, log_every=1000, save_every=1000)
    settings = make_recipe(**distilled(teacher_file, **changes))
    options = train.Options(None, None, 6, False, False, 0)
    teacher, _ = train.make_teacher(settings, tmp_path / "r.json", tmp_path / "out", options, train.Accelerator())
    (tmp_path / "out").mkdir()
    made = train.make_run(dataclasses.replace(settings, epochs=1), tmp_path / "out", teacher, options)
    made.limit = 7  # a step more, so that nothing is saved in these
    batches = list(made.loader.batches(0, 7))  # augmentation reads its own draws, on the CPU
    made.loader.batches = lambda *_: iter(batches)
    reads = []

    def watched(agreed=made.signals.agreed):
        reads.append(len(counter.found))
        if made.step == 6:
            raise InterruptedError
        return agreed()

    made.signals.agreed = watched
    with pytest.raises(InterruptedError), Reads() as counter:
        train.train(made)
    assert reads == [0] * 6, counter.found
