"""Networks: the CIFAR ResNets, any timm model, normalised input, features, weights in, exported folders out.

    network = build("cifar_resnet20", classes=100, size=32)
    logits = network(images)    # [B, 3, 32, 32] in [0, 1] -> [B, 100]

Importing this file registers `cifar_resnet20` and its family with timm. Then also
`timm.create_model("cifar_resnet20", num_classes=100)` and, for an exported CIFAR student,
`timm.create_model("local-dir:FOLDER", pretrained=True)` work.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo
from timm.models import PretrainedCfg, build_model_with_cfg, load_state_dict, register_model, save_for_hf
from torch import nn

MAX_CONFIG_BYTES = 2**24  # of a config.json: names and descriptions of ImageNet-21k's classes need 3 MB


class ModelError(ValueError):
    """A network cannot be built or loaded; the message says which, what was found and what was expected."""


# ---------------------------------------------------------------- CIFAR ResNets

WIDE = (32, 64, 128, 256)
VARIANTS = {
    "cifar_resnet8": dict(depth=8),
    "cifar_resnet20": dict(depth=20),
    "cifar_resnet32": dict(depth=32),
    "cifar_resnet56": dict(depth=56),
    "cifar_resnet110": dict(depth=110),
    "cifar_resnet8x4": dict(depth=8, widths=WIDE),
    "cifar_resnet32x4": dict(depth=32, widths=WIDE),
}
default_cfgs = {  # timm's registry reads a module's configurations from this name
    name: dict(
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        num_classes=100,
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        first_conv="conv1",
        classifier="fc",
    )
    for name in VARIANTS
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, in_chans, chans, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, chans, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chans)
        self.conv2 = nn.Conv2d(chans, chans, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(chans)
        self.downsample = None
        if stride != 1 or in_chans != chans:
            convolution = nn.Conv2d(in_chans, chans, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(chans))
        self.act1, self.act2 = (
            nn.ReLU(),
            nn.ReLU(),
        )  # named as in timm's ResNets, see Network._before_activation

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2016, section 4.2) with depth = 6 n + 2 layers.

    Layout, initialisation and state_dict keys are those of RepDistiller, mdistiller and DIST, so that their
    published CIFAR-100 teachers load strictly. `widths`: channels of the stem and the three stages.
    forward: [B, C, H, W] -> [B, K].
    """

    def __init__(self, depth=20, widths=(16, 16, 32, 64), num_classes=100, in_chans=3, drop_rate=0.0):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ModelError(f"cifar_resnet: depth must be 6 n + 2 with n >= 1, got {depth}")
        self.num_classes, self.num_features, self.drop_rate = num_classes, widths[3], drop_rate
        levels = zip(widths, (1, 1, 2, 4), ("bn1", "layer1", "layer2", "layer3"), strict=True)
        self.feature_info = [
            dict(num_chs=chans, reduction=reduction, module=module) for chans, reduction, module in levels
        ]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            blocks = [BasicBlock(widths[stage - 1], widths[stage], stride)]
            blocks += [BasicBlock(widths[stage], widths[stage], 1) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[3], num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes, global_pool=None):
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        """[B, 3, H, W] -> [B, C, H/4, W/4]"""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_intermediates(self, x, indices):
        """timm's interface to feature maps: (deepest map, [maps after the stem (0) and stages (1, 2, 3)])."""
        maps = [torch.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps[-1], [maps[i] for i in indices]

    def forward_head(self, x, pre_logits=False):
        x = nn.functional.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def _register(name, defaults):
    def create(pretrained=False, **kwargs):
        return build_model_with_cfg(CifarResNet, name, pretrained, **(defaults | kwargs))

    create.__name__ = name  # timm's registry lists a model under its function's name
    register_model(create)


for _name, _defaults in VARIANTS.items():
    _register(_name, _defaults)


# ---------------------------------------------------------------- any network by name


def memory_format_for(model):
    """channels_last, 1.3 times as fast on CPUs and tensor cores; contiguous where PyTorch would fail.

    PyTorch 2.15 writes outside of its memory on some CPUs in the backward pass of channels_last 1x1
    convolutions with a stride and few input channels (seen with 4 and 8; 16 and more are used here).
    """
    for module in model.modules():
        strided = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1)
        if strided and module.in_channels < 16:
            return torch.contiguous_format
    return torch.channels_last


class Network(nn.Module):
    """A classifier that normalises its own input: images [B, 3, H, W] in [0, 1] -> logits [B, K].

    With `size` it also resizes its input (antialiased, `interpolation` "bilinear" or "bicubic"), so that a
    teacher and a student of different statistics and resolutions can share a batch.
    """

    def __init__(self, model, mean, std, size=None, interpolation="bicubic"):
        super().__init__()
        self.model, self.size, self.interpolation = model, size, interpolation
        self.statistics = {"mean": tuple(mean), "std": tuple(std)}
        for name, values in self.statistics.items():
            numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
            if not numbers or (name == "std" and min(values) < 1e-6):
                raise ModelError(f"{name} {list(values)}: expected finite numbers, for std positive ones")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.memory_format = memory_format_for(model)
        self.to(memory_format=self.memory_format)

    def forward(self, images, taps=None, preactivation=False):
        """Logits [B, K]; with `taps`, indices of timm's forward_intermediates, (logits, features).

        The features, as `losses.py` wants them, are the maps [B, C, H, W] at the taps, shallow to deep, and
        the pooled vector [B, C] that the classifier gets. `preactivation`: maps from before the last
        activation of their stage, for ResNets.
        """
        if self.size and images.shape[-1] != self.size:
            images = nn.functional.interpolate(images, self.size, mode=self.interpolation, antialias=True)
            images = images.clamp(0, 1)
        images = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        if taps is None:
            return self.model(images)

        with self._before_activation(taps if preactivation else ()) as before:
            deepest, maps = self.model.forward_intermediates(images, indices=list(taps))
        pooled = self.model.forward_head(deepest, pre_logits=True)
        if before:
            maps = before
        elif self._is_isotropic():
            maps = _pyramid(maps)
        return self.model.forward_head(deepest), [*maps, pooled]

    @contextlib.contextmanager
    def _before_activation(self, taps):
        """A list for the inputs of the stages' last activations; copies, as timm's ReLUs write in place."""
        before, hooks = [], []
        for tap in taps:
            block = self.model.get_submodule(self.model.feature_info[tap]["module"])[-1]
            activation = block.act3 if hasattr(block, "act3") else block.act2
            hooks.append(
                activation.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0].clone()))
            )
        try:
            yield before
        finally:
            for hook in hooks:
                hook.remove()

    def _is_isotropic(self):
        return len({level["reduction"] for level in self.model.feature_info}) == 1

    def default_taps(self):
        """The deepest map of each resolution, at most the last four.

        Of a transformer's n blocks 1, 3, n - 3 and n - 1, which are vanillaKD's for BEiTv2-L. Raises
        ModelError where timm gives no intermediate maps.
        """
        reductions = [level["reduction"] for level in getattr(self.model, "feature_info", ())]
        if not hasattr(self.model, "forward_intermediates") or not reductions:
            name = type(self.model).__name__
            raise ModelError(f"{name} gives no features: timm has no forward_intermediates for it")
        if self._is_isotropic():
            n = len(reductions)
            return tuple(sorted({min(1, n - 1), min(3, n - 1), max(n - 3, 0), n - 1}))
        return tuple({reduction: i for i, reduction in enumerate(reductions)}.values())[-4:]

    def shapes(self, size, taps, preactivation=False):
        """Shapes, without the batch, of the features of an image of `size` pixels; projectors need them.

        Raises ModelError for taps that the network does not have.
        """
        training = self.training
        images = torch.zeros(1, 3, size, size, device=self.mean.device)
        try:
            with torch.no_grad():
                _, features = self.eval()(images, taps, preactivation)
        except (AssertionError, IndexError, AttributeError, TypeError) as error:
            kind = "preactivation features" if preactivation else "features"
            name = type(self.model).__name__
            raise ModelError(f"{name} gives no {kind} at taps {list(taps)}: {error!r}") from error
        self.train(training)
        return [tuple(feature.shape[1:]) for feature in features]


def _pyramid(maps):
    """A transformer's four square maps as those of a convolutional network: sides times 4, 2, 1 and a half.

    vanillaKD unfolds BEiTv2-L's tokens to these shapes, so that ReviewKD compares maps of equal size. Other
    numbers of maps are returned unchanged.
    """
    if len(maps) != 4 or maps[0].shape[1] % 16:
        return maps
    unfold, halve = nn.functional.pixel_shuffle, nn.functional.avg_pool2d
    return [unfold(maps[0], 4), unfold(maps[1], 2), maps[2], halve(maps[3], 2)]


def build(
    model,
    *,
    classes,
    size,
    model_args=None,
    pretrained=False,
    checkpoint=None,
    mean=None,
    std=None,
    resize=None,
):
    """A `Network` by timm name, with random weights, timm's pretrained ones, or those of a file or folder.

    checkpoint: see `load_weights`. size: pixels of the square images it gets; resize: pixels to which it
    resizes them, interpolated as its timm configuration says. mean and std (per channel, for images in
    [0, 1]) default to that configuration's. Raises ModelError: unknown name or argument, unfitting weights.
    """
    check_name(model)
    check_model_args(model_args or {})
    try:
        network = timm.create_model(model, pretrained=pretrained, num_classes=classes, **(model_args or {}))
    except Exception as error:  # the constructors of a thousand networks raise anything
        hint = "; offline, give its weights as a file" if pretrained and isinstance(error, OSError) else ""
        raise ModelError(f"model {model!r} cannot be built with {model_args or {}}: {error}{hint}") from error
    if checkpoint is not None:
        load_weights(network, checkpoint)
    config = network.pretrained_cfg
    network = Network(network, mean or config["mean"], std or config["std"], resize, config["interpolation"])
    check_forward(network, model, classes, size)
    return network


def check_name(model):
    """Raise ModelError, naming the nearest known model, unless timm or this file has a model of this name."""
    # Names come from recipes and folders of strangers: no "hf-hub:" or "local-dir:" here.
    if not isinstance(model, str) or ":" in model or not timm.is_model(model):
        near = difflib.get_close_matches(str(model).split(".")[0], timm.list_models(), n=1)
        raise ModelError(f"timm has no model {model!r}" + (f", did you mean {near[0]!r}?" if near else ""))


# Arguments of timm's factory, not of the constructor: they name files and URLs or change what is returned.
FACTORY_ARGUMENTS = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *("pruned", "features_only", "out_indices", "feature_cls", "device", "dtype"),
}
FACTORY_PREFIXES = ("pretrained", "checkpoint", "cache", "hf_", "url", "file", "weights")


def check_model_args(arguments):
    """Raise ModelError unless `arguments` only shape a network: recipes and folders may come from strangers.

    What is no argument of timm's factory goes to the constructor, which refuses names that it does not know.
    """
    for key, value in arguments.items():
        if key in FACTORY_ARGUMENTS or key.startswith(FACTORY_PREFIXES):
            raise ModelError(
                f"model_args: {key!r} is not accepted: expected only what shapes the network, such as "
                "drop_path_rate; weights are named by a recipe's `checkpoint` and `pretrained`"
            )
        if not _is_plain(value):
            expected = "expected a number, a text, true, false, null or a list of these"
            raise ModelError(f"model_args: {key!r} is {value!r}: {expected}")


def _is_plain(value):
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def check_forward(network, name, classes, size):
    """One image through the network, so that a wrong input size or class count shows before any work."""
    network.eval()
    try:
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, 3, size, size)).shape)
    except Exception as error:  # as in `build`
        raise ModelError(f"model {name!r} cannot take images of {size}x{size}: {error}") from error
    if shape != (1, classes):
        raise ModelError(f"model {name!r} gives logits of shape {shape}, expected (1, {classes})")


# ---------------------------------------------------------------- pretrained weights, checkpoint files


def pretrained_config(model):
    """timm's configuration of weights by name ("resnet50.a1_in1k"); ModelError naming those there are."""
    check_name(model)
    known = timm.list_pretrained(model.split(".")[0] + ".*")
    try:
        config = timm.get_pretrained_cfg(model) if known else None
    except RuntimeError:  # an unknown tag
        config = None
    if config is None:
        raise ModelError(
            f"timm has no pretrained weights called {model!r} (it has: {', '.join(known) or 'none'})"
        )
    return config.to_dict()


def check_pretrained(model, *, classes, size):
    """Raise ModelError unless timm's weights of this name are for `classes` classes and `size` pixels.

    timm would give other classes a random head, and most networks take any size: the accuracy would be lower.
    """
    config = pretrained_config(model)
    if config["num_classes"] != classes:
        raise ModelError(f"{model} was trained for {config['num_classes']} classes, the data has {classes}")
    trained = config["input_size"][-1]
    if trained != size:
        raise ModelError(
            f"{model} was trained at {trained} pixels and would see {size}: "
            f"set teacher.size to {trained} to resize for it"
        )


def load_weights(network, path):
    """Load a timm model strictly from a .safetensors or .pth file or exported folder; unpickles no objects.

    Takes a bare state_dict or one under "model" or "state_dict", as RepDistiller, mdistiller, vanillaKD and
    timm save them, and the names of a model's authors where timm can translate them (facebook's ConvNeXtV2).
    Raises ModelError for what cannot be read or does not fit.
    """
    path = Path(path)
    file = _inside(path, "model.safetensors") if os.path.isdir(path) else path
    if not os.path.isfile(file):  # False, unlike pathlib's, for a name that is too long
        raise ModelError(f"checkpoint {file}: no such file")
    expected = network.state_dict()
    try:
        # timm's train.py saves its arguments in a Namespace, which holds no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_state_dict(str(file), use_ema=False, weights_only=True)
        translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if translate and state.keys() != expected.keys():
            state = translate(state, network)
    # a torn zip, a bad header, a pickle with more than tensors, keys timm trips over
    except Exception as error:
        raise ModelError(f"checkpoint {file}: cannot be loaded: {_reason(file, error)}") from error
    problems = _misfits(state, expected)
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        fits = len(expected) - sum(not problem.startswith("unexpected") for problem in problems)
        name = type(network).__name__
        raise ModelError(
            f"checkpoint {file} does not fit {name}: {fits} of {len(expected)} tensors match; {shown}"
        )
    network.load_state_dict(state)


def _reason(file, error):
    """Why a file was not loaded, without torch's advice to load it with weights_only=False."""
    if isinstance(error, (EOFError, AttributeError)):
        return "it is not a file of weights"
    if "weights_only" not in str(error):
        return repr(error)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # not a file of torch's
        names = []
    if not names:
        return "it is not a file of weights"
    return f"it holds more than weights, which may run a program: {', '.join(names)}"


def _misfits(state, expected):
    """What keeps a state_dict from being the expected one, a line for each key."""
    missing = [f"missing {key}" for key in expected if key not in state]
    unexpected = [f"unexpected {key}" for key in state if key not in expected]
    shapes = {
        key: tuple(tensor.shape) if _is_dense(tensor) else "not a dense tensor of real numbers"
        for key, tensor in state.items()
    }
    other = [
        f"{key} is {shapes[key]}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and shapes[key] != tuple(tensor.shape)
    ]
    return missing + unexpected + other


def _is_dense(tensor):
    if not torch.is_tensor(tensor) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_quantized or tensor.is_meta or tensor.is_complex())


# ---------------------------------------------------------------- exported folders

# timm's fields of a config.json that are read: all but those that say where weights lie.
CONFIG_FIELDS = {field.name for field in dataclasses.fields(PretrainedCfg)} - {
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
}


def export(network, folder, *, model_args, size, crop_pct, interpolation, label_names=None):
    """Write a student as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    It holds the weights as safetensors and the preprocessing of the training; appears complete or not at all.
    """
    folder = Path(folder)
    model = copy.deepcopy(network.model).cpu()
    # safetensors refuses DeepSpeed's tensors, which are views of a flat one
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)

    preprocessing = dict(input_size=(3, size, size), crop_pct=crop_pct, interpolation=interpolation)
    model.pretrained_cfg = dict(model.pretrained_cfg, **preprocessing, **network.statistics)
    config = {"label_names": label_names} if label_names else None
    save_for_hf(model, temporary, model_config=config, model_args=model_args, safe_serialization=True)
    for file in temporary.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())

    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_exported(folder):
    """(`Network`, timm configuration) of a folder that `export` or timm's save_for_hf wrote.

    Opens its config.json and model.safetensors and nothing else, so that the folder may come from strangers.
    Raises ModelError for other folders.
    """
    config, arguments = _read_config(_inside(folder, "config.json"))
    try:
        model = timm.create_model(config["architecture"], pretrained_cfg=config, **arguments)
        load_weights(model, folder)
        return Network(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]), model.pretrained_cfg
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    except Exception as error:  # an edited config.json can fail anywhere in timm
        raise ModelError(f"{folder}: cannot be loaded by timm: {error!r}") from error


def _read_config(file):
    """(timm configuration, model_args) in a config.json, without what could open other files."""
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{file}: larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        config = (
            written["pretrained_cfg"] | written
        )  # timm, too, takes names and number of classes from outside
        arguments = written.get("model_args", {})
        check_name(config["architecture"])
        check_model_args(arguments)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: not what timm's save_for_hf writes: {error!r}") from error
    return {key: value for key, value in config.items() if key in CONFIG_FIELDS}, arguments


def _inside(folder, name):
    """The file of this name in an exported folder; ModelError where it is missing or a link out of it."""
    file = Path(folder) / name
    if not file.is_file():
        raise ModelError(f"{folder}: not an exported model (no {name})")
    if not file.resolve().is_relative_to(Path(folder).resolve()):
        raise ModelError(f"{file}: a link out of its folder, to {file.resolve()}: put the file itself here")
    return file


# ---------------------------------------------------------------- classes by name


def label_names(network):
    """The class names of an exported network, by class id; None where its folder does not name them all."""
    names = network.model.pretrained_cfg.get("label_names")
    if not isinstance(names, (dict, list, tuple)):
        return None
    if isinstance(names, dict):  # timm also takes {id: name}
        names = [names.get(str(i)) for i in range(len(names))]
    if not names or len(names) != network.model.num_classes:
        return None
    return list(names) if all(isinstance(name, str) for name in names) else None


def match_classes(known, wanted):
    """For each name in `wanted` its class id in a network with the class names `known`, a list by class id.

    ImageNet's 1,000 classes are the same by WNID, by description and by number (ImageNet-V2). Raises
    ModelError, which lists the differences, where the network lacks a class.
    """
    known, wanted = _as_wnids(known), _as_wnids(wanted)
    if known == wanted:
        return list(range(len(known)))
    ids = {name: i for i, name in enumerate(known)}
    missing = [name for name in wanted if name not in ids]
    if not missing and len(ids) == len(known):
        return [ids[name] for name in wanted]

    found = f"the network has {len(known)} classes, the data {len(wanted)}"
    if len(ids) < len(known):
        raise ModelError(f"{found}, and they cannot be matched by name: the network has a name twice")
    extra = sorted(set(known) - set(wanted))
    raise ModelError(f"{found}; only in the data: {_listed(missing)}; only in the network: {_listed(extra)}")


def check_same_classes(known, wanted, owner):
    """ModelError unless `wanted`, the data's class names, are those that `owner` knows, in the same order."""
    try:
        ids = match_classes(known, wanted)
    except ModelError as error:
        raise ModelError(f"{owner} and the data have different classes: {error}") from error
    for i, other in enumerate(ids):
        if i != other:
            raise ModelError(
                f"{owner} and the data have their classes in different orders: {wanted[i]!r} is number {i} "
                f"in the data, {other} in {owner}"
            )


def _as_wnids(names):
    """ImageNet's 1,000 classes in their order as WNIDs, however they are written; other names unchanged."""
    if len(names) != 1000:
        return list(names)
    imagenet = ImageNetInfo()
    pairs = zip(names, imagenet.label_descriptions(), strict=True)
    described = sum(_first_term(name) == _first_term(expected) for name, expected in pairs)
    numbered = list(names) == [str(i) for i in range(1000)]
    return list(imagenet.label_names()) if numbered or described > 900 else list(names)


def _first_term(description):
    """ "crane" of "crane (bird)" and of "crane, bird": other people's lists add other synonyms."""
    return re.split(r",| \(", description)[0]


def _listed(names):
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(map(repr, names[:10])) or "none") + more
