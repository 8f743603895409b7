"""launch.py: launches that are refused, precision, DeepSpeed's settings, signals."""

import os
import signal
import types

import pytest
import torch
from conftest import STUDENT, make_recipe
from timm.optim import create_optimizer_v2

import launch
import recipe

# ---------------------------------------------------------------- launches that are refused


class Launch:
    """An Accelerator's answers, for launches that this machine cannot make."""

    def __init__(self, kind="NO", processes=1, precision="no", device="cpu", config=None, stage=0):
        self.distributed_type = launch.DistributedType[kind]
        self.num_processes, self.mixed_precision = processes, precision
        self.device = torch.device(device)
        self.state = type("State", (), {})()
        plugin = {"deepspeed_config": config or {}, "zero_stage": stage}
        self.state.deepspeed_plugin = type("Plugin", (), plugin)()


FLOAT16 = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    "launched, message",
    [
        (dict(precision="fp16"), "fp16 on a CPU: accelerate would train in float32; use bf16 or no"),
        (dict(precision="fp8"), "not supported"),
        (dict(kind="FSDP"), "FSDP"),
        (dict(kind="DEEPSPEED", stage=3), "stage 3: it splits the weights, .* use stage 0, 1 or 2"),
        (dict(kind="DEEPSPEED", precision="bf16"),
            "with bf16: it would cast the weights, also those of BatchNorm"),
        (dict(kind="DEEPSPEED", config={"fp16": {"enabled": True}}), "with fp16: it would cast the weights"),
        (dict(kind="DEEPSPEED", config={"bf16": {"enabled": "auto"}}),
            "with bf16: it would cast the weights"),
        (dict(kind="DEEPSPEED", config=FLOAT16), "loss scale cannot be saved"),
        (dict(kind="DEEPSPEED", config=OFFLOADED), "offload_optimizer: it would replace the optimizer"),
        (dict(kind="DEEPSPEED", stage=1),
            r"stage 1 with optimizer lamb \(alone\): .* each is needed whole"),
        (dict(processes=1, world=2), "2 processes were launched, accelerate sees 1"),
    ],
)  # fmt: skip
def test_launches_that_would_train_something_else_are_refused(launched, message, monkeypatch):
    lamb = dict(STUDENT, name="alone", soft=None, optimizer="lamb", optimizer_args={})
    monkeypatch.setenv("WORLD_SIZE", str(launched.pop("world", 1)))
    with pytest.raises(recipe.RecipeError, match=message):
        launch.check_launch(make_recipe(students=[lamb]), Launch(**launched))


@pytest.mark.parametrize(
    "launched",
    [
        dict(),
        dict(precision="bf16"),
        dict(precision="fp16", device="cuda"),
        dict(kind="MULTI_GPU", precision="bf16", device="cuda"),
        dict(kind="DEEPSPEED", stage=2),
        dict(kind="DEEPSPEED", stage=1, config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    ],
    ids=str,
)
def test_the_other_launches_are_not_refused(launched, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    launch.check_launch(make_recipe(), Launch(**launched))


@pytest.mark.parametrize(
    "launched, expected",
    [
        (dict(precision="bf16"), "bf16"),
        (dict(kind="DEEPSPEED"), "no"),
        (dict(kind="DEEPSPEED", config={"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}), "no"),
        (dict(kind="DEEPSPEED", config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), "bf16"),
    ],
    ids=str,
)
def test_the_precision_of_a_launch(launched, expected):
    assert launch.precision(Launch(**launched)) == expected


def test_deepspeed_is_told_the_batch_and_the_clipping_of_the_recipe():
    accelerator = Launch(kind="DEEPSPEED", config={"zero_optimization": {"stage": 1}})
    for clip_grad, expected in ((0.5, 0.5), (None, 0.0)):  # 0 is off; unset, it would clip at 1
        loader = types.SimpleNamespace(per_process=16, accumulate=2, batch_size=64)
        launch.configure_deepspeed(accelerator, loader, clip_grad)
        assert accelerator.state.deepspeed_plugin.deepspeed_config == {
            "zero_optimization": {"stage": 1},
            "train_micro_batch_size_per_gpu": 16,
            "gradient_accumulation_steps": 2,
            "train_batch_size": 64,
            "gradient_clipping": expected,
        }


def test_elementwise_optimizers_do_not_see_where_a_tensor_ends():
    """What ZeRO needs of them: the same update of a flat tensor and of its pieces. LAMB's differs."""

    def update(name, pieces):
        torch.manual_seed(0)
        values, gradients = torch.randn(3, 24)[0], torch.randn(5, 24)
        module = torch.nn.ParameterList([piece.clone() for piece in values.split(24 // pieces)])
        optimizer = create_optimizer_v2(module, opt=name, lr=0.1, weight_decay=0.1, filter_bias_and_bn=False)
        for gradient in gradients:
            for parameter, piece in zip(module, gradient.split(24 // pieces), strict=True):
                parameter.grad = piece.clone()
            optimizer.step()
        return torch.cat([p.detach() for p in module])

    for name in launch.ELEMENTWISE:
        torch.testing.assert_close(update(name, 1), update(name, 3), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(update("lamb", 1), update("lamb", 3), rtol=1e-3)


# ---------------------------------------------------------------- signals


def test_signals_wait_for_the_end_of_a_step_and_a_second_ctrl_c_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with launch.Signals(1) as signals:
        assert signals.agreed() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with launch.Signals(1) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signals.agreed()


def test_exit_codes():
    """What a batch system sees: an error, EX_IOERR where checkpoints are lost, 128 + signal."""
    errors = [launch.TrainingError("x"), launch.Stopped("x", signal.SIGTERM)]
    assert [error.exit_code for error in errors] == [1, 143] and launch.EXIT_UNSAVED == 74
