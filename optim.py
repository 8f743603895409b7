"""One optimizer step: its learning rate, the optimizer by name, clipping, and gradients that are not finite.

The learning rate and the weight of the distillation loss are pure functions of the step: no scheduler is
saved or restored.
"""

import difflib
import math

import torch
from timm.optim import create_optimizer_v2, list_optimizers

FUSED = {"sgd", "momentum", "adam", "adamw"}  # timm's names of the optimizers that PyTorch has fused


def lr_at(step, steps_per_epoch, epochs, schedule, lr):
    """Learning rate of optimizer step `step`, counted from 0.

    `schedule` is a recipe.Milestones, WarmMilestones or Cosine; `lr` the peak. The cosine with per="epoch"
    equals timm's CosineLRScheduler stepped once an epoch.
    """
    epoch = step // steps_per_epoch
    if schedule.kind != "cosine":
        lr *= schedule.factor ** sum(m <= epoch for m in schedule.milestones)
        if schedule.kind == "warm_milestones" and step < schedule.warmup_steps:
            lr *= 1 - (1 - step / schedule.warmup_steps) * (1 - schedule.warmup_factor)
        return lr

    t = epoch if schedule.per == "epoch" else step / steps_per_epoch
    if t < schedule.warmup_epochs:
        return schedule.warmup_lr + (lr - schedule.warmup_lr) * t / schedule.warmup_epochs
    return schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * t / epochs)) / 2


def soft_weight_at(epoch, soft):
    """Weight of the distillation loss in an epoch, counted from 0; 0 where `soft` (recipe.Soft) is None.

    It rises linearly and reaches its value in the last of the `warmup_epochs`: mdistiller's DKD.
    """
    if soft is None:
        return 0.0
    return soft.weight * min((epoch + 1) / soft.warmup_epochs, 1) if soft.warmup_epochs else soft.weight


def make_optimizer(module, student):
    """timm's optimizer called `student.optimizer` for `module`; fused where PyTorch has it fused.

    Raises ValueError for a name or an argument that timm does not have.
    """
    name = student.optimizer
    arguments = ({"fused": True} if name in FUSED else {}) | student.optimizer_args
    try:
        return create_optimizer_v2(
            module,
            opt=name,
            lr=student.lr,
            weight_decay=student.weight_decay,
            filter_bias_and_bn=not student.decay_norm_and_bias,
            **arguments,
        )
    except Exception as error:  # the constructors of a hundred optimizers raise anything
        known = list_optimizers()
        near = [] if name in known else difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer {name!r} cannot be built with {arguments}: {error}{hint}") from error


def start_momentum(optimizer):
    """Zero the momentum of SGD before its first step.

    PyTorch's fused SGD leaves it without a value where a float16 scaler leaves the first step out.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_lr(optimizer, lr):
    """Set every parameter group to `lr`, times the group's factor where timm's layer decay gave it one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_and_step(accelerator, optimizer, clip_grad):
    """Clip to the global norm `clip_grad` (None: no clipping), step, drop the gradients.

    Returns a bool scalar on the device: whether the gradient was finite. One that is not is replaced by
    zeros, for all parameters: the host does not look at it, which would stop the device, and momentum and
    weight decay still act. A float16 scaler leaves the step out.
    """
    accelerator.unscale_gradients(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)

    finite = norm.isfinite()
    not_finite = finite.logical_not()
    for parameter in parameters:
        parameter.grad.masked_fill_(not_finite, 0.0)

    # accelerate's wrapper is for the scaler alone; it searches for a package in every step, for 150 us
    (optimizer if accelerator.scaler is not None else optimizer.optimizer).step()
    for parameter in parameters:
        parameter.grad = None
    return finite
