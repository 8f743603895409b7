"""Networks: the CIFAR ResNets, any timm model by name, input normalisation inside the network, and `Distilled`.

    net = build("cifar_resnet20", classes=100)        # images [B, 3, H, W] in [0, 1] -> logits [B, 100]

Importing this file registers `cifar_resnet20` and its family with timm, so `timm.create_model("cifar_resnet20",
num_classes=100)` and `timm.create_model("local-dir:EXPORTED", pretrained=True)` work beside timm's own.
"""

import argparse
import collections
import contextlib
import copy
import difflib
import functools
import hashlib
import mmap
import os
import re
import shutil
import sys
from pathlib import Path

import timm
import torch
from timm.models import build_model_with_cfg, load_state_dict, register_model, save_for_hf
from torch import nn


class ModelError(ValueError):
    """A network cannot be built or loaded; the message says which, what was found and what was expected."""


# ---------------------------------------------------------------- CIFAR ResNets

default_cfgs = {
    f"cifar_resnet{depth}": dict(
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
    for depth in ("8", "20", "32", "56", "110", "8x4", "32x4")
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; 1x1 convolution on the shortcut where the shape changes (option B)."""

    def __init__(self, in_chans, chans, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, chans, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chans)
        self.conv2 = nn.Conv2d(chans, chans, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(chans)
        self.downsample = None
        if stride != 1 or in_chans != chans:
            self.downsample = nn.Sequential(nn.Conv2d(in_chans, chans, 1, stride, bias=False), nn.BatchNorm2d(chans))
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()  # named as in timm's ResNets, where features are tapped

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2016, section 4.2) with depth = 6 n + 2 layers.

    Layout, initialisation and state_dict keys are those of RepDistiller, mdistiller and DIST, so that their published
    CIFAR-100 teachers load strictly. `widths`: channels of the stem and the three stages. forward: [B, C, H, W] -> [B, K].
    """

    def __init__(self, depth=20, widths=(16, 16, 32, 64), num_classes=100, in_chans=3, drop_rate=0.0):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ModelError(f"cifar_resnet: depth must be 6 n + 2 with n >= 1, got {depth}")
        self.num_classes, self.num_features, self.drop_rate = num_classes, widths[3], drop_rate
        self.feature_info = [
            dict(num_chs=chans, reduction=reduction, module=module)
            for chans, reduction, module in zip(widths, (1, 1, 2, 4), ("bn1", "layer1", "layer2", "layer3"), strict=True)
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
        """timm's interface to feature maps: (deepest map, [maps after the stem (0) and the stages (1, 2, 3)])."""
        maps = [torch.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps[-1], [maps[i] for i in indices]

    def forward_head(self, x, pre_logits=False):
        x = nn.functional.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def _create(name, pretrained, defaults, kwargs):
    return build_model_with_cfg(CifarResNet, name, pretrained, **(defaults | kwargs))


# Plain functions and `default_cfgs`, because timm's registry finds a variant and its configuration by these names.
@register_model
def cifar_resnet8(pretrained=False, **kwargs):
    return _create("cifar_resnet8", pretrained, dict(depth=8), kwargs)


@register_model
def cifar_resnet20(pretrained=False, **kwargs):
    return _create("cifar_resnet20", pretrained, dict(depth=20), kwargs)


@register_model
def cifar_resnet32(pretrained=False, **kwargs):
    return _create("cifar_resnet32", pretrained, dict(depth=32), kwargs)


@register_model
def cifar_resnet56(pretrained=False, **kwargs):
    return _create("cifar_resnet56", pretrained, dict(depth=56), kwargs)


@register_model
def cifar_resnet110(pretrained=False, **kwargs):
    return _create("cifar_resnet110", pretrained, dict(depth=110), kwargs)


@register_model
def cifar_resnet8x4(pretrained=False, **kwargs):
    return _create("cifar_resnet8x4", pretrained, dict(depth=8, widths=(32, 64, 128, 256)), kwargs)


@register_model
def cifar_resnet32x4(pretrained=False, **kwargs):
    return _create("cifar_resnet32x4", pretrained, dict(depth=32, widths=(32, 64, 128, 256)), kwargs)


# ---------------------------------------------------------------- any network by name


class Network(nn.Module):
    """A classifier that normalises its own input: images [B, 3, H, W] in [0, 1] -> logits [B, K].

    With `size` it resizes its input, too (antialiased, `interpolation` "bilinear" or "bicubic"). A teacher and a student
    with different statistics or resolutions then share one batch. The weights are those of `model` alone.
    """

    def __init__(self, model, mean, std, size=None, interpolation="bicubic"):
        super().__init__()
        self.model, self.size, self.interpolation = model, size, interpolation
        self.statistics = {"mean": tuple(mean), "std": tuple(std)}
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # convolutions are about 1.3 times faster, on CPU and on tensor cores

    def forward(self, images, taps=None, preactivation=False):
        """With `taps`, indices of timm's forward_intermediates: (logits, features), features as `losses.py` wants them.

        That is the maps [B, C, H, W] at the taps, shallow to deep, and the pooled vector [B, C] that the classifier sees.
        `preactivation`: maps from before the last activation of their stage, for ResNets.
        """
        if self.size and images.shape[-1] != self.size:
            images = nn.functional.interpolate(images, self.size, mode=self.interpolation, antialias=True).clamp(0, 1)
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if taps is None:
            return self.model(images)
        with self._before_activation(taps if preactivation else ()) as before:
            deepest, maps = self.model.forward_intermediates(images, indices=list(taps))
        pooled = self.model.forward_head(deepest, pre_logits=True)
        maps = before or (_pyramid(maps) if self._is_isotropic() else maps)
        return self.model.forward_head(deepest), [*maps, pooled]

    @contextlib.contextmanager
    def _before_activation(self, taps):
        """A list that is filled with the inputs of the stages' last activations; copies, as timm's ReLUs write in place."""
        before, hooks = [], []
        for tap in taps:
            block = self.model.get_submodule(self.model.feature_info[tap]["module"])[-1]
            activation = block.act3 if hasattr(block, "act3") else block.act2
            hooks.append(activation.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0].clone())))
        try:
            yield before
        finally:
            for hook in hooks:
                hook.remove()

    def _is_isotropic(self):
        return len({level["reduction"] for level in self.model.feature_info}) == 1

    def default_taps(self):
        """The deepest map of each resolution, at most the last four; of a transformer's n blocks 1, 3, n - 3 and n - 1.

        The latter are vanillaKD's for BEiTv2-L. Raises ModelError where timm gives no intermediate maps.
        """
        reductions = [level["reduction"] for level in getattr(self.model, "feature_info", ())]
        if not hasattr(self.model, "forward_intermediates") or not reductions:
            raise ModelError(f"{type(self.model).__name__} gives no features: timm has no forward_intermediates for it")
        if self._is_isotropic():
            n = len(reductions)
            return tuple(sorted({min(1, n - 1), min(3, n - 1), max(n - 3, 0), n - 1}))
        return tuple({reduction: i for i, reduction in enumerate(reductions)}.values())[-4:]

    def shapes(self, size, taps, preactivation=False):
        """Shapes, without the batch, of the features of an image of `size` pixels: what projectors are built from."""
        training = self.training
        try:
            with torch.no_grad():
                _, features = self.eval()(torch.zeros(1, 3, size, size, device=self.mean.device), taps, preactivation)
        except (AssertionError, IndexError, AttributeError, TypeError) as error:
            kind = "preactivation features" if preactivation else "features"
            raise ModelError(f"{type(self.model).__name__} gives no {kind} at taps {list(taps)}: {error!r}") from error
        self.train(training)
        return [tuple(feature.shape[1:]) for feature in features]


@contextlib.contextmanager
def frozen_statistics(network):
    """BatchNorm keeps its running statistics: a checkpointed block runs again in backward and would move them twice."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _pyramid(maps):
    """A transformer's four square maps as a convolutional network's: sides of 4, 2, 1 and a half times their own.

    vanillaKD unfolds BEiTv2-L's tokens to these shapes, so that ReviewKD compares maps of equal size. Other maps stay.
    """
    if len(maps) != 4 or maps[0].shape[1] % 16:
        return maps
    unfold, halve = nn.functional.pixel_shuffle, nn.functional.avg_pool2d
    return [unfold(maps[0], 4), unfold(maps[1], 2), maps[2], halve(maps[3], 2)]


def build(model, *, classes, size, model_args=None, pretrained=False, checkpoint=None, mean=None, std=None, resize=None):
    """A `Network` by timm name, with random weights, timm's pretrained ones or those of a file or exported folder.

    `size`: pixels of the square images it will see; `resize`: pixels to which it resizes them, as its timm configuration
    interpolates. mean and std (per channel, for images in [0, 1]) default to that configuration's. Raises ModelError:
    unknown name or argument, weights that do not fit, other class count.
    """
    check_name(model)
    try:
        network = timm.create_model(model, pretrained=pretrained, num_classes=classes, **(model_args or {}))
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        hint = "; offline, give its weights as a file" if pretrained and isinstance(error, OSError) else ""
        raise ModelError(f"model {model!r} cannot be built with {model_args or {}}: {error}{hint}") from error
    if checkpoint is not None:
        load_weights(network, checkpoint)
    config = network.pretrained_cfg
    network = Network(network, mean or config["mean"], std or config["std"], resize, config["interpolation"])
    _check_forward(network, model, classes, size)
    return network


def pretrained_config(model):
    """timm's configuration of the pretrained weights called `model` ("resnet50.a1_in1k"); ModelError naming those there are."""
    check_name(model)
    known = timm.list_pretrained(model.split(".")[0] + ".*")
    try:
        config = timm.get_pretrained_cfg(model) if known else None
    except RuntimeError:  # an unknown tag
        config = None
    if config is None:
        raise ModelError(f"timm has no pretrained weights called {model!r} (it has: {', '.join(known) or 'none'})")
    return config.to_dict()


def check_pretrained(model, *, classes, size):
    """Raise ModelError unless timm's weights of this name answer for `classes` classes and were trained at `size` pixels.

    timm would give other classes a random head, and a network takes most sizes; both cost a teacher its accuracy only.
    """
    config = pretrained_config(model)
    if config["num_classes"] != classes:
        raise ModelError(f"{model} was trained for {config['num_classes']} classes, the data has {classes}")
    own = config["input_size"][-1]
    if own != size:
        raise ModelError(
            f"{model} was trained at {own} pixels and would see {size}: set teacher.size to {own} to resize for it"
        )


def check_name(model):
    """Raise ModelError, naming the nearest known model, unless timm (with the CIFAR ResNets) has a model of this name."""
    if ":" in model or not timm.is_model(model):  # no "hf-hub:" or "local-dir:" here: names come from untrusted recipes
        near = difflib.get_close_matches(model.split(".")[0], timm.list_models(), n=1)
        raise ModelError(f"timm has no model {model!r}" + (f", did you mean {near[0]!r}?" if near else ""))


def _check_forward(network, name, classes, size):
    """One image through the network: a wrong input size or class count shows before any work, not after an epoch."""
    network.eval()
    try:
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, 3, size, size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"model {name!r} cannot take images of {size}x{size}: {error}") from error
    if shape != (1, classes):
        raise ModelError(f"model {name!r} gives logits of shape {shape}, expected (1, {classes}) for {classes} classes")


def load_weights(network, path):
    """Load a timm model strictly from a .safetensors or .pth file, or from an exported folder. Never unpickles objects.

    Takes a bare state_dict or one under "model" or "state_dict", as RepDistiller, mdistiller, vanillaKD and timm save
    them, and the names of a model's authors where timm can translate them (facebook's ConvNeXtV2).
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"checkpoint {file}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train.py saves its arguments; they hold no code
            state = load_state_dict(str(file), use_ema=False, weights_only=True)
        own = network.state_dict()
        translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if translate and state.keys() != own.keys():
            state = translate(state, network)
    except Exception as error:  # a torn zip, a bad header, a pickle with more than tensors, keys timm trips over: a dozen types
        raise ModelError(f"checkpoint {file}: cannot be loaded: {error!r}") from error
    problems = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    shapes = ((k, tuple(own[k].shape), tuple(getattr(state[k], "shape", ("not a tensor",)))) for k in own if k in state)
    problems += [f"{k} is {found}, expected {expected}" for k, expected, found in shapes if found != expected]
    if problems:
        shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        fits = len(own) - sum(not p.startswith("unexpected") for p in problems)
        raise ModelError(
            f"checkpoint {file} does not fit {type(network).__name__}: {fits} of {len(own)} tensors match; {shown}"
        )
    network.load_state_dict(state)


def load_exported(folder):
    """The `Network` in a folder that `export` (or timm's save_for_hf) wrote, and its timm configuration."""
    if not (Path(folder) / "model.safetensors").is_file():
        raise ModelError(f"{folder}: not an exported model (no model.safetensors)")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # an edited config.json can fail anywhere in timm
        raise ModelError(f"{folder}: cannot be loaded by timm: {error!r}") from error
    return Network(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]), model.pretrained_cfg


def export(network, folder, *, model_args, size, crop_pct, interpolation, label_names=None):
    """Write a student as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

    Its weights alone, as safetensors, with the preprocessing it was trained for; appears complete or not at all.
    """
    folder = Path(folder)
    model = copy.deepcopy(network.model).cpu()
    for tensor in (*model.parameters(), *model.buffers()):  # safetensors wants plain ones; DeepSpeed's are views of a flat one
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):  # of an export that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    preprocessing = dict(input_size=(3, size, size), crop_pct=crop_pct, interpolation=interpolation, **network.statistics)
    model.pretrained_cfg = dict(model.pretrained_cfg, **preprocessing)
    config = {"label_names": label_names} if label_names else None
    save_for_hf(model, temporary, model_config=config, model_args=model_args, safe_serialization=True)
    for file in temporary.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- what a teacher has answered


class Memo:
    """A frozen teacher's logits for every view of every image, float32 [images, views, classes], filled as they are asked for.

    Every forward is of exactly `batch` views. Those of a batch that are known give their places to views of the same
    images that are not yet: nothing is computed twice, and a long run comes to know all. A network's logits of an image
    must not depend on what else is in the batch; then nothing depends on what is known already. A batch of another length
    passes by, because other lengths can round otherwise.
    """

    def __init__(self, images, views, classes, batch, device):
        """Raises ModelError where they would not fit into the device's memory."""
        self.views, self.batch, self.device = views, batch, device
        needed, free = memo_bytes(images, views, classes), _free_memory(device)
        if needed > free:
            raise ModelError(
                f"teacher.memo: {images:,} images x {views} views x {classes} classes need {needed / 1e9:.2f} GB, {device} "
                f'has {free / 1e9:.2f} GB free: set it to "disk" or null'
            )
        self.checks = torch.zeros(images * views, dtype=torch.int64)  # on the host: looking at it waits for no device
        self.rows = torch.empty(images * views, classes, device=device)

    def __call__(self, crops, forward):
        """Logits [B, K] of crops, int64 [2, B] on the host: (image ids, views). forward: crops -> logits."""
        index, view = crops
        if len(index) != self.batch:
            return forward(crops)
        rows, known = self.read(index * self.views + view)
        if known.all():
            return rows
        unknown = self.checks.view(-1, self.views)[index] == 0
        view = torch.where(known, unknown.int().argmax(1), view)  # the first one; view 0 again where none is left
        logits = forward(torch.stack([index, view])).float()
        self.write(index * self.views + view, logits)
        return torch.where(known.to(self.device, non_blocking=True)[:, None], rows, logits)

    def read(self, places):
        """(rows, which of them are known) at places int64 [B] on the host; the latter on the host."""
        return self.rows[places.to(self.device, non_blocking=True)], self.checks[places] != 0

    def write(self, places, logits):
        self.rows[places.to(self.device, non_blocking=True)] = logits
        self.checks[places] = 1


class FileMemo(Memo):
    """The same in a file, for later runs and for other processes at the same time.

    A row is known if its check is the hash of its bits and its place. So a row that was half written when a process was
    killed, or whose pages a power cut kept from the disk, is unknown, in whatever order the pages were written; and
    writers need no lock: they write the same bytes, since the file's name holds all that the bytes depend on.
    """

    def __init__(self, images, views, classes, batch, device, path):
        """Raises ModelError where the file cannot be made: its whole size is reserved, so that no later write fails."""
        self.views, self.batch, self.device = views, batch, device
        n, size = images * views, memo_bytes(images, views, classes)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ModelError(f"teacher.memo: {path}, {size / 1e9:.2f} GB, cannot be made: {error.strerror}") from error
        self.checks = torch.frombuffer(mapped, dtype=torch.int64, count=n)
        self.rows = torch.frombuffer(mapped, dtype=torch.float32, offset=8 * n).view(n, classes)
        # a multilinear hash modulo 2**64: one wrong word always shows, because odd numbers have inverses
        self.factors = torch.randint(2**62, (classes + 1,), generator=torch.Generator().manual_seed(0)) * 2 + 1

    def read(self, places):
        rows = self.rows[places]
        return rows.to(self.device, non_blocking=True), self.checks[places] == self.hash(rows, places)

    def write(self, places, logits):
        rows = logits.cpu()
        self.rows[places] = rows
        self.checks[places] = self.hash(rows, places)

    def hash(self, rows, places):
        words = torch.cat([rows.view(torch.int32), places[:, None] + 1], dim=1)  # + 1: a row of zeros at place 0 is not known
        return (words * self.factors).sum(1)


def memo_bytes(images, views, classes):
    return images * views * (4 * classes + 8)


def _free_memory(device):
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1])
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def digest(network):
    """sha256 of what a network computes: its structure, its tensors, its normalisation and size."""
    result = hashlib.sha256(f"{network} {network.statistics} {network.size} {network.interpolation}".encode())
    for name, tensor in network.state_dict().items():
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


# ---------------------------------------------------------------- what is trained


class Distilled(nn.Module):
    """A student with everything its loss trains, in one forward that returns scalars: what DDP and the optimizer see.

    net   images [B, 3, H, W] -> logits [B, K], or with `taps` (logits, features)
    hard  (logits, target) -> scalar
    soft  on logits: (logits, teacher_logits, target) -> scalar; with `taps` on features: a module that owns its projectors,
          (features, teacher_features, target, index) -> scalar; None for labels alone

    Evaluation and export use `.net` alone.
    """

    def __init__(self, net, hard, soft, hard_weight, taps=None, preactivation=False):
        super().__init__()
        self.net, self.hard, self.soft, self.hard_weight = net, hard, soft, hard_weight
        self.taps, self.preactivation = taps, preactivation

    def no_weight_decay(self):
        """timm's optimizers ask this of the module that they get: position embeddings and class tokens do not decay."""
        return {f"net.model.{name}" for name in getattr(self.net.model, "no_weight_decay", set)()}

    def forward(self, images, taught, target, index, soft_weight):
        """taught (teacher logits, teacher features or None), target [B] ids or [B, K] probabilities, index [B] image ids,
        soft_weight a scalar tensor: as a number, torch.compile would build a new graph for each of its values.

        -> {"loss", "hard", "soft"}: float32 scalars, of which none is detached: compiled, "loss" and "hard" can be one tensor;
        and with a `soft` on logits the student's "logits", detached, for `gradient_norms`.
        """
        logits, features = self.net(images, self.taps, self.preactivation) if self.taps else (self.net(images), None)
        with torch.autocast(images.device.type, enabled=False):  # losses in float32, whatever the networks run in
            hard = self.hard(logits, target)
            if self.soft is None:
                return {"loss": self.hard_weight * hard, "hard": hard}
            teacher_logits, teacher_features = taught
            if self.taps:
                soft = self.soft(features, teacher_features, target, index)
            else:
                soft = self.soft(logits, teacher_logits, target)
        terms = {"loss": self.hard_weight * hard + soft_weight * soft, "hard": hard, "soft": soft}
        return terms if self.taps else terms | {"logits": logits.detach().float()}

    def gradient_norms(self, logits, teacher_logits, target, soft_weight):
        """(label term, distillation term): the norms over [B, K] of their gradients in the logits, weights included.

        Beside training: of detached logits, so nothing that the step computes or draws depends on it. Not for losses on
        features, which have no gradient in the logits.
        """
        with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
            logits = logits.detach().requires_grad_()
            hard = self.hard_weight * self.hard(logits, target)
            soft = soft_weight * self.soft(logits, teacher_logits, target)
            return tuple(torch.autograd.grad(term, logits)[0].norm() for term in (hard, soft))


# ---------------------------------------------------------------- what makes a frozen teacher cheap


@torch.no_grad()
def freeze(network, size):
    """A copy of a trained Network for forwards alone: eval mode, no gradients, constants computed once.

    BatchNorm after a convolution is folded into it: equal up to rounding, and the maps are read and written once less.
    Attention that gathers a bias by relative position (BEiT, Swin) keeps what it gathered. `size`: pixels of the images.
    """
    network.eval().requires_grad_(False)
    frozen = copy.deepcopy(network)
    for convolution, parent, name in _convolution_norm_pairs(frozen, size):
        norm = getattr(parent, name)
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        fused = nn.utils.fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        convolution.weight, convolution.bias = (nn.Parameter(p.detach().clone(), requires_grad=False) for p in fused)
        # timm's BatchNormAct2d holds its activation
        setattr(parent, name, nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity())
    for module in frozen.modules():
        if callable(gather := getattr(module, "_get_rel_pos_bias", None)):
            module._get_rel_pos_bias = functools.partial(_constant, gather())
    frozen.to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, size, size, device=network.mean.device)
    # a network that does more with a convolution's output than its modules show must not be folded
    return frozen if torch.allclose(frozen(images), network(images), rtol=1e-3, atol=1e-3) else network


def _constant(tensor):
    return tensor


def _convolution_norm_pairs(network, size):
    """[(convolution, parent and name of the BatchNorm that alone reads its output)], as one forward shows them.

    Not by names: timm's families name the two differently, and neighbours in a module need not be neighbours in a forward.
    """
    convolution_of, readers, outputs, hooks, calls = {}, {}, [], [], collections.Counter()

    def write(module, _, output):
        outputs.append(output)  # kept, so that no other tensor gets its id
        convolution_of[id(output)], readers[id(output)] = module, []

    def read(module, inputs):
        calls[module] += 1
        for tensor in inputs:
            readers.setdefault(id(tensor), []).append(module)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(write))
        if isinstance(module, nn.BatchNorm2d) or not any(module.children()):
            hooks.append(module.register_forward_pre_hook(read))
    network(torch.zeros(1, 3, size, size, device=network.mean.device))
    for hook in hooks:
        hook.remove()
    place = {child: (parent, name) for parent in network.modules() for name, child in parent.named_children()}
    return [
        (convolution, *place[norms[0]])
        for key, convolution in convolution_of.items()
        if len(norms := readers[key]) == 1
        and isinstance(norms[0], nn.BatchNorm2d)
        and norms[0].track_running_stats
        and calls[norms[0]] == calls[convolution] == 1
    ]


# ---------------------------------------------------------------- LAMB


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962) in timm's variant, which can skip a step without the host knowing.

    timm's keeps the number of steps on the host. Here it is on the device, so that `found_inf`, PyTorch's protocol between
    gradient scalers and fused optimizers, can leave weights, moments and step count as they are where it is 1.
    Gradients are clipped to `max_grad_norm` over all parameters; groups without weight decay have no trust ratio.
    """

    _step_supports_amp_scaling = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        super().__init__(params, defaults)

    @classmethod
    def like(cls, optimizer):
        """For the parameters and settings of a timm.optim.Lamb; ValueError for a setting that only timm's has."""
        known = cls([torch.zeros(1)]).defaults
        default = timm.optim.Lamb([torch.zeros(1)], lr=optimizer.defaults["lr"]).defaults
        if other := [k for k, v in optimizer.defaults.items() if k not in known and v != default[k]]:
            raise ValueError(f"optimizer_args: lamb takes {', '.join(known)}, found {', '.join(other)}")
        groups = [{k: v for k, v in g.items() if k in known or k in ("params", "lr_scale")} for g in optimizer.param_groups]
        return cls(groups, **{k: optimizer.defaults[k] for k in known})

    @torch.no_grad()
    def step(self):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        skip = getattr(self, "found_inf", None)
        skip = parameters[0].new_zeros(()) if skip is None else skip.to(parameters[0].dtype)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        for group in self.param_groups:
            if own := [p for p in group["params"] if p.grad is not None]:
                self._update(group, own, norm, skip)

    def _update(self, group, parameters, norm, skip):
        (beta1, beta2), decay, kept = group["betas"], group["weight_decay"], skip > 0
        for p in parameters:
            if not self.state[p]:  # not "step", which load_state_dict leaves on the host
                self.state[p] = {"steps": norm.new_zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        steps, m, v = ([self.state[p][key] for p in parameters] for key in ("steps", "m", "v"))
        torch._foreach_add_(steps, [1 - skip] * len(steps))
        bias1, bias2 = 1 - beta1 ** steps[0], 1 - beta2 ** steps[0]

        gradients = [torch.where(kept, 0.0, p.grad) for p in parameters]  # not times 0, which leaves NaN
        if group["max_grad_norm"]:
            torch._foreach_mul_(gradients, torch.where(kept, 0.0, (group["max_grad_norm"] / norm).clamp(max=1.0)))
        torch._foreach_mul_(m, 1 - (1 - beta1) * (1 - skip))
        torch._foreach_add_(m, gradients, alpha=1 - beta1)
        torch._foreach_mul_(v, 1 - (1 - beta2) * (1 - skip))
        torch._foreach_addcmul_(v, gradients, gradients, value=1 - beta2)

        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, bias2.sqrt())
        torch._foreach_add_(root, group["eps"])
        change = torch._foreach_div(m, bias1)
        torch._foreach_div_(change, root)
        trust = norm.new_ones(len(parameters))
        if decay:
            torch._foreach_add_(change, parameters, alpha=decay)
            weights, changes = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(change))
            trust = torch.where((weights > 0) & (changes > 0), weights / changes, 1.0)
        torch._foreach_mul_(change, list((-group["lr"] * trust).unbind()))
        for p, c in zip(parameters, change, strict=True):
            p.add_(torch.where(kept, 0.0, c))  # after a first step that is skipped, c is 0 / 0
