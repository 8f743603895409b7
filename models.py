"""Networks: any timm model by name, normalised input, features, weights in, exported folders out.

network = build("cifar_resnet20", classes=100, size=32)
logits = network(images)    # [B, 3, 32, 32] in [0, 1] -> [B, 100]
"""

import argparse
import copy
import dataclasses
import difflib
import inspect
import json
import math
import os
import shutil
import sys
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, load_state_dict, save_for_hf
from torch import nn

import cifar_resnet  # noqa: F401  registers its networks with timm

MAX_CONFIG_BYTES = 2**24  # of a config.json: names and descriptions of ImageNet-21k's classes need 3 MB


class ModelError(ValueError):
    """A network cannot be built or loaded; the message says which, what was found and what was expected."""


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
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), False)
        if not (all(map(math.isfinite, (*mean, *std))) and min(std) >= 1e-6):
            raise ModelError(f"mean {mean}, std {std}: expected finite numbers, for std positive ones")
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

        before, hooks = [], []
        for tap in taps if preactivation else ():
            block = self.model.get_submodule(self.model.feature_info[tap]["module"])[-1]
            last = block.act3 if hasattr(block, "act3") else block.act2
            # copies, as timm's ReLUs write in place
            hooks.append(last.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0].clone())))
        deepest, maps = self.model.forward_intermediates(images, indices=list(taps))
        for hook in hooks:
            hook.remove()

        pooled = self.model.forward_head(deepest, pre_logits=True)
        if before:
            maps = before
        elif self._is_isotropic():
            maps = _pyramid(maps)
        return self.model.forward_head(deepest), [*maps, pooled]

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
    weights=None,
    checkpoint=None,
    mean=None,
    std=None,
    resize=None,
):
    """A `Network` by timm name, with random weights, timm's pretrained ones, or those of a file or folder.

    checkpoint: a file or folder with weights for these classes; weights: one for any; see `load_weights`.
    size: pixels of the square images it gets; resize: pixels to which it resizes them, interpolated as its
    timm configuration says. mean and std (per channel, for images in [0, 1]) default to that
    configuration's. Raises ModelError: unknown name or argument, unfitting weights.
    """
    check_name(model)
    check_model_args(model_args or {})
    try:
        network = timm.create_model(model, pretrained=pretrained, num_classes=classes, **(model_args or {}))
    except Exception as error:  # the constructors of a thousand networks raise anything
        hint = "; offline, give its weights as a file" if pretrained and isinstance(error, OSError) else ""
        raise ModelError(f"model {model!r} cannot be built with {model_args or {}}: {error}{hint}") from error
    if weights is not None:
        load_weights(network, weights, any_head=True)
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
    if not known or ("." in model and model not in known):
        has = ", ".join(known) or "none"
        raise ModelError(f"timm has no pretrained weights called {model!r} (it has: {has})")
    return timm.get_pretrained_cfg(model).to_dict()


def check_pretrained(model, *, classes, size):
    """Raise ModelError unless timm's weights of this name are for `classes` classes and `size` pixels.

    timm would give other classes a random head, and most networks take any size: the accuracy would be lower.
    """
    config = pretrained_config(model)
    if config["num_classes"] != classes:
        raise ModelError(f"{model} was trained for {config['num_classes']} classes, the data has {classes}")
    trained = config["input_size"][-1]
    if trained != size:
        hint = f"set teacher.size to {trained} to resize for it"
        raise ModelError(f"{model} was trained at {trained} pixels and would see {size}: {hint}")


def load_weights(network, path, *, any_head=False):
    """Load a timm model strictly from a .safetensors or .pth file or exported folder; unpickles no objects.

    Takes a bare state_dict or one under "model" or "state_dict", as RepDistiller, mdistiller, vanillaKD and
    timm save them, and the names of a model's authors where timm can translate them (facebook's ConvNeXtV2).
    any_head: a classifier of another number of classes is left out, and the network keeps its own.
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
        if any_head:
            state |= _unfitting_head(network, state, expected)
    # a torn zip, a bad header, a pickle with more than tensors, keys timm trips over
    except Exception as error:
        raise ModelError(f"checkpoint {file}: cannot be loaded: {_reason(file, error)}") from error
    if wrong := [key for key, value in state.items() if not isinstance(key, str) or not _is_dense(value)]:
        raise ModelError(f"checkpoint {file}: {wrong[0]} is not a dense tensor of real numbers")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # lines with missing and unexpected keys and with other shapes
        told = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ")
        raise ModelError(f"checkpoint {file} does not fit {told[:500]}") from error


def _unfitting_head(network, state, expected):
    """The network's own classifier, as a state_dict, where that of `state` has other shapes; else {}."""
    heads = network.pretrained_cfg.get("classifier") or ()  # a module's name, or several
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    own = {key: tensor for key, tensor in expected.items() if key.startswith(heads)}
    fits = all(getattr(state.get(key), "shape", None) == tensor.shape for key, tensor in own.items())
    return {} if fits else own


def _reason(file, error):
    """Why a file was not loaded, without torch's advice to load it with weights_only=False."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except Exception:  # not a file of torch's
        names = []
    if names:
        return f"it holds more than weights, which may run a program: {', '.join(names)}"
    return f"it is not a file of weights ({type(error).__name__})"


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
    file = _inside(folder, "config.json")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{file}: larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        name, arguments = written["architecture"], written.get("model_args", {})
        check_name(name)
        check_model_args(arguments)
        # timm, too, takes names and number of classes from outside
        config = {k: v for k, v in (written["pretrained_cfg"] | written).items() if k in CONFIG_FIELDS}
        model = timm.create_model(name, pretrained_cfg=config, **arguments)
        load_weights(model, folder)
        return Network(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]), model.pretrained_cfg
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except Exception as error:  # an edited config.json can fail anywhere in timm
        raise ModelError(f"{file}: not what timm's save_for_hf writes: {error!r}") from error


def _inside(folder, name):
    """The file of this name in an exported folder; ModelError where it is missing or a link out of it."""
    file = Path(folder) / name
    if not file.is_file():
        raise ModelError(f"{folder}: not an exported model (no {name})")
    if not file.resolve().is_relative_to(Path(folder).resolve()):
        raise ModelError(f"{file}: a link out of its folder, to {file.resolve()}: put the file itself here")
    return file
