"""What `accelerate launch` (or torchrun) gave this process: accelerators, precision, signals.

A recipe says what is trained; processes, devices, mixed precision and DeepSpeed belong to the launch. A
launch that would silently train something other than the recipe is refused here, before any work.
"""

import os
import signal

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs

import recipe

EXIT_UNSAVED = 74  # EX_IOERR of sysexits.h
DTYPES = {"fp32": torch.float32, "no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Optimizers, by timm's names, whose update of a number depends on that number's gradient alone.
ELEMENTWISE = {"sgd", "momentum", "adam", "adamw", "nadam", "nadamw", "lion", "rmsprop"}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and why."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(TrainingError):
    """A signal stopped the run, after a checkpoint."""

    def __init__(self, message, signal_number):
        super().__init__(message, 128 + signal_number)


class Signals:
    """SIGTERM and the first Ctrl-C wait for the end of a step; the second Ctrl-C raises."""

    def __init__(self, processes):
        self.received = 0
        # gloo, whatever the gradients use: the processes agree without waiting for their GPUs
        self.group = torch.distributed.new_group(backend="gloo") if processes > 1 else None

    def __enter__(self):
        self.before = {n: signal.signal(n, self.remember) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number, _):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self):
        """The number of the signal that any process received, the same on all of them; 0 for none."""
        if self.group is None:
            return self.received
        received = torch.tensor(self.received)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(received)


def make_accelerator(**settings):
    """An Accelerator of this launch. Without a GPU, DeepSpeed's processes can only talk over gloo."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available():
        settings["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(**settings)


def uses_deepspeed(accelerator):
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def partitions_optimizer(accelerator):
    """Whether each process holds only a piece of the optimizer's state: DeepSpeed ZeRO from stage 1 on."""
    return uses_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage > 0


def precision(accelerator):
    """ "no", "bf16" or "fp16": what autocast computes in. DeepSpeed has its own setting, `torch_autocast`."""
    if not uses_deepspeed(accelerator):
        return accelerator.mixed_precision
    autocast = accelerator.state.deepspeed_plugin.deepspeed_config.get("torch_autocast", {})
    return {"bfloat16": "bf16", "float16": "fp16"}[autocast["dtype"]] if autocast.get("enabled") else "no"


def check_launch(settings, accelerator):
    """Raise RecipeError for a launch that would silently train something other than the recipe."""
    for problem in _problems(settings, accelerator):
        raise recipe.RecipeError(problem)


def _problems(settings, accelerator):
    """Yield what keeps a launch from training the recipe."""
    launched, seen = int(os.environ.get("WORLD_SIZE", 1)), accelerator.num_processes
    if launched != seen:  # on a machine without GPUs every process would train alone
        yield (
            f"{launched} processes were launched, accelerate sees {seen}; for several processes on CPUs set "
            "ACCELERATE_USE_CPU=true: see docs/launch.md"
        )
    kind, mixed = accelerator.distributed_type, accelerator.mixed_precision
    if mixed == "fp16" and accelerator.device.type == "cpu":
        yield "--mixed_precision fp16 on a CPU: accelerate would train in float32; use bf16 or no"
    if mixed == "fp8" or kind in (DistributedType.FSDP, DistributedType.MEGATRON_LM):
        yield (
            f"{kind.value}, --mixed_precision {mixed}: not supported; a student fits on one GPU: use "
            "multi-GPU or DeepSpeed stages 0 to 2, with bf16, fp16 or no"
        )
    if uses_deepspeed(accelerator):
        yield from _deepspeed_problems(settings, accelerator)


def _deepspeed_problems(settings, accelerator):
    """Yield what in DeepSpeed's configuration would change the training."""
    plugin = accelerator.state.deepspeed_plugin
    config, stage = plugin.deepspeed_config, plugin.zero_stage
    if stage > 2:
        yield (
            f"DeepSpeed ZeRO stage {stage}: it splits the weights, which evaluation, EMA and export need "
            "whole: use stage 0, 1 or 2"
        )
    halves = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled") not in (None, False)]
    halves += [accelerator.mixed_precision] * (accelerator.mixed_precision != "no")
    if halves:
        yield (
            f"DeepSpeed with {' and '.join(halves)}: it would cast the weights, also those of BatchNorm; use "
            "--mixed_precision no and in its JSON file "
            '"torch_autocast": {"enabled": true, "dtype": "bfloat16"}'
        )
    if precision(accelerator) == "fp16":
        yield "DeepSpeed with float16: its loss scale cannot be saved without pickle; use bfloat16 or DDP"
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        yield "DeepSpeed with offload_optimizer: it would replace the optimizer of the recipe"
    others = [f"{s.optimizer} ({s.name})" for s in settings.students if s.optimizer not in ELEMENTWISE]
    if stage and others:
        yield (
            f"DeepSpeed ZeRO stage {stage} with optimizer {', '.join(others)}: the stage joins all tensors "
            "and splits the result, but each is needed whole (LAMB's trust ratio is per tensor): use stage 0 "
            f"or DDP, or one of {', '.join(sorted(ELEMENTWISE))}"
        )


def configure_deepspeed(accelerator, loader, clip_grad):
    """Give DeepSpeed the batch and the clipping of the recipe; it would clip at 1.0 if it were not told."""
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": loader.per_process,
        "gradient_accumulation_steps": loader.accumulate,
        "train_batch_size": loader.batch_size,
        "gradient_clipping": clip_grad or 0.0,
    }
