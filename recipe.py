"""A run's settings: strict, typed, frozen; JSON in, JSON out. Standard library only.

    recipe = load("recipes/quickstart.json", ["epochs=5", "students.kd.lr=0.1"])

The dataclasses below are the whole format. Every key must be there and nothing else may be: only what cannot change
accuracy has a default. A file's errors are reported all at once, each with its path, what was found and what was
expected. Which models, optimizers and losses exist is known elsewhere and checked by train.py before any work starts.
"""

import collections
import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

MAX_BYTES, MAX_DEPTH = 2**20, 32  # a recipe is a page: anything larger is a mistake or an attack


class RecipeError(Exception):
    """Bad input from the user: the message says what, where, what was expected. Scripts print it and exit with code 2."""


@dataclass(frozen=True)
class Bounds:
    low: float
    high: float = math.inf

    def __str__(self):
        return f">= {self.low:g}" if self.high == math.inf else f"from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Matches:
    pattern: str
    words: str


Count = Annotated[int, Bounds(1)]
Whole = Annotated[int, Bounds(0)]
Number = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Name = Annotated[
    str, Matches(r"[a-z0-9][a-z0-9._-]{0,63}", "a name of a-z, 0-9, '.', '_', '-' (at most 64, first a letter or digit)")
]
Text = Annotated[str, Matches(r"(?s).+", "a text that is not empty")]


@dataclass(frozen=True, kw_only=True)
class Milestones:
    """lr * factor ** (number of milestones reached); milestones are epochs, counted from 0."""

    kind: Literal["milestones"]
    milestones: tuple[Count, ...]
    factor: Share


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up from warmup_lr, then a cosine over the whole run down to min_lr, moved once per epoch or per step."""

    kind: Literal["cosine"]
    warmup_epochs: Whole
    warmup_lr: Number
    min_lr: Number
    per: Literal["epoch", "step"]


@dataclass(frozen=True, kw_only=True)
class PadCrop:
    """Zero-pad by `padding` pixels, crop `size` at random: images that already have the training size (CIFAR, digits)."""

    kind: Literal["pad"]
    padding: Whole


@dataclass(frozen=True, kw_only=True)
class ResizedCrop:
    """Inception-style random resized crop: a share `scale` of the area, an aspect in `ratio`, resized to `size`."""

    kind: Literal["resized"]
    scale: tuple[Share, Share]
    ratio: tuple[Number, Number]
    interpolation: Literal["random", "bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Data:
    source: Text  # "digits", a data set's name on the hub, or a folder; `--data DIR` sets it
    train_split: Text
    test_split: Text
    image: Text  # column
    label: Text  # column
    classes: Annotated[int, Bounds(2)]
    train_size: Count | None  # images in the training split: checked where known, needed where streamed
    streaming: bool
    shuffle_buffer: Whole  # images held back to shuffle a stream; 0 for memory-mapped data, which is shuffled whole
    size: Count  # pixels, square
    crop: PadCrop | ResizedCrop
    hflip: Share
    rand_augment: Text | None  # timm's notation, "rand-m7-mstd0.5"
    repeats: Count  # crops of one image in a step (repeated augmentation); an epoch keeps its length and sees fewer images
    random_erasing: Share  # probability that noise covers a part of an image
    mixup: Number  # alpha of the Beta distribution; 0: off
    cutmix: Number
    drop_last: bool
    crop_pct: Annotated[float, Bounds(0.01, 1)]  # evaluation: resize to size / crop_pct, centre crop
    interpolation: Literal["bilinear", "bicubic"]  # evaluation
    max_broken: Share = 0.001  # share of the training images that may be broken before the run stops
    fraction: Annotated[float, Bounds(1e-4, 1)] = 1.0  # of each class: train on so many of its images, the same for all seeds
    resident: bool = False  # the whole set on the device as one tensor, cropped and flipped there; small images, crop 'pad'


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One of: `recipe` (the student which that recipe trains), `checkpoint` of `model`, `pretrained` weights of `model`.

    With none of them `model` is untrained, which train.py accepts for a trial only.
    """

    model: Text | None = None
    model_args: dict | None = None
    size: Count | None = None  # pixels; the batch is resized to it on the device. null: it sees the batch as it is
    taps: tuple[Whole, ...] | None = (
        None  # for losses on features: indices of timm's forward_intermediates. null: see models.py
    )
    preactivation: bool = False  # features from before the last activation of their stage (ResNets)
    pretrained: bool = False
    checkpoint: Text | None = None
    recipe: Text | None = None
    mean: tuple[float, ...] | None = None  # null: the network's own, from its timm configuration
    std: tuple[float, ...] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # of its forward; null: as `accelerate launch` says
    memo: Literal["device", "disk"] | None = None  # where its logits for each crop of each image are remembered; needs resident


@dataclass(frozen=True, kw_only=True)
class Hard:
    loss: Text  # losses.LABEL_LOSSES
    weight: Number
    smoothing: Share


@dataclass(frozen=True, kw_only=True)
class Soft:
    loss: Text  # losses.LOSSES
    weight: Number
    warmup_epochs: Whole  # weight * min((epoch + 1) / warmup_epochs, 1); 0: constant
    args: dict  # the loss's hyper-parameters by name


@dataclass(frozen=True, kw_only=True)
class Student:
    name: Name
    model: Text
    model_args: dict  # passed to timm.create_model
    pretrained: bool
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    optimizer: Text  # timm's name
    optimizer_args: dict
    lr: Number
    weight_decay: Number
    decay_norm_and_bias: bool  # weight decay on 1-D parameters and biases too
    clip_grad: Number | None  # global norm
    ema: Share | None  # decay of a running average of the weights, evaluated and exported beside them
    hard: Hard
    soft: Soft | None  # null: labels alone
    taps: tuple[Whole, ...] | None = None  # as the teacher's
    preactivation: bool = False
    grad_checkpointing: bool = False  # blocks run again in backward instead of keeping activations: less memory, same numbers
    paper: dict | None = None  # the table cell that this student reproduces, for tools/ and the reader


@dataclass(frozen=True, kw_only=True)
class Recipe:
    about: Text
    seed: Whole
    runs: Count = 1  # repeat with seeds seed, seed + 1, ... and report mean and spread
    epochs: Count
    batch_size: Count  # images per optimizer step, over all processes
    batch_size_per_process: Count  # what DIST, CC, RKD and CRD see; the rest is gradient accumulation
    schedule: Milestones | Cosine
    data: Data
    teacher: Teacher | None
    students: tuple[Student, ...]
    log_every: Count = 50  # steps
    evaluate_every: Count = 1  # epochs
    save_every: Count | None = None  # steps; null: once an epoch


def load(path, overrides=()):
    """Recipe from a JSON file, with `path=value` overrides (values are JSON, or else text) through the same checks.

    Raises RecipeError naming the file, the path in it, what was found, what was expected and the nearest known key.
    """
    where, errors = str(path), []
    tree = read_json(path)
    for override in overrides:
        problem = _apply(tree, override)
        if problem:
            errors.append(f"--set {override}: {problem}")
    recipe = _build(Recipe, tree, "", errors)
    if not errors:
        errors = list(_contradictions(recipe))
    if errors:
        raise RecipeError("\n".join(f"{where}: {error}" for error in errors))
    return recipe


def dump(recipe):
    """The recipe as JSON text; `load` of it gives an equal recipe."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def write_atomic(path, text):
    """Write a file so that a reader, or a crash at any moment, sees the old text or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path):
    """Make renames inside a directory survive a power cut; not every file system can, and none must fail for it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------- JSON, without its liberties


class _Object(dict):
    """A JSON object that remembers which keys came twice: json.loads would keep the last in silence."""

    def __init__(self, pairs):
        super().__init__(pairs)
        self.repeated = sorted(key for key, n in collections.Counter(key for key, _ in pairs).items() if n > 1)


def _parse(text):
    def number(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not a finite number")
        return value

    tree = json.loads(text, object_pairs_hook=_Object, parse_constant=number, parse_float=number)
    _check_depth(tree, MAX_DEPTH)
    return tree


def _check_depth(tree, left):
    if left == 0:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _check_depth(value, left - 1)


def read_json(path, max_bytes=MAX_BYTES):
    """The JSON in a file of this project; RecipeError for one that cannot be read, is too large, too deep or not JSON."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json")], n=1)
        raise RecipeError(f"{path}: cannot be read: {error.strerror}{_did_you_mean(near)}") from None
    except ValueError as error:  # a NUL in the path
        raise RecipeError(f"{str(path)!r}: cannot be read: {error}") from None
    if len(raw) > max_bytes:
        raise RecipeError(f"{path}: larger than {max_bytes} bytes")
    try:
        return _parse(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"{path}: not a JSON file: {reason}") from None


def _apply(tree, override):
    """Set one `a.0.b=value` in the parsed JSON; returns what is wrong, or None."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        return "expected path=value, for example students.kd.lr=0.1"
    try:
        value = _parse(text)
    except (ValueError, RecursionError):
        value = text  # 5e-3 is JSON, lamb is not
    *parents, last = path.split(".")
    node = tree
    for part in [*parents, last]:
        if isinstance(node, list):
            named = {
                item["name"]: i for i, item in enumerate(node) if isinstance(item, dict) and isinstance(item.get("name"), str)
            }
            if part not in named and not (part.isascii() and part.isdigit() and int(part) < len(node)):
                return f"{part!r} is not {f'one of {list(named)}' if named else f'an index of a list of {len(node)}'}"
            part = named[part] if part in named else int(part)
        elif not isinstance(node, dict):
            return f"nothing called {part!r} can be set in {_show(node)}"
        parent, key, node = node, part, node[part] if isinstance(node, list) else node.get(part)
    parent[key] = value
    return None


# ---------------------------------------------------------------- JSON -> dataclasses


def _build(kind, value, path, errors):
    """`value` as a `kind`; what does not fit is appended to `errors` as 'path: expected ..., got ...'."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        kind, rule = typing.get_args(kind)
        value = _build(kind, value, path, before := [])
        errors += before
        if not before and isinstance(rule, Bounds) and not rule.low <= value <= rule.high:
            errors.append(_expected(path, f"a {'whole ' * (kind is int)}number {rule}", value))
        if not before and isinstance(rule, Matches) and not re.fullmatch(rule.pattern, value):
            errors.append(_expected(path, rule.words, value))
        return value
    if origin in (typing.Union, types.UnionType):
        return _build_union(typing.get_args(kind), value, path, errors)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices or isinstance(value, bool):
            near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
            errors.append(_expected(path, " or ".join(map(repr, choices)), value) + _did_you_mean(near))
        return value
    if origin is tuple:
        return _build_tuple(typing.get_args(kind), value, path, errors)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path, errors)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if kind is dict and isinstance(value, dict):
        errors += [f"{path}: duplicate key {key!r}" for key in getattr(value, "repeated", ())]
        return dict(value)
    if type(value) is not kind:
        words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", dict: "an object"}
        errors.append(_expected(path, words[kind], value))
    return value


def _build_union(members, value, path, errors):
    if type(None) in members and value is None:
        return None
    members = [m for m in members if m is not type(None)]
    if len(members) == 1:
        return _build(members[0], value, path, errors)
    kinds = {typing.get_args(typing.get_type_hints(m)["kind"])[0]: m for m in members}  # told apart by their "kind"
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        choices = " or ".join(f'"kind": "{k}"' for k in kinds)
        near = difflib.get_close_matches(kind, kinds, n=1) if isinstance(kind, str) else []
        errors.append(_expected(path, f"an object with {choices}", value) + _did_you_mean(near))
        return value
    return _build(kinds[kind], value, path, errors)


def _build_tuple(members, value, path, errors):
    many = members[-1] is Ellipsis
    if not isinstance(value, (list, tuple)) or (not value if many else len(value) != len(members)):
        errors.append(_expected(path, "a list that is not empty" if many else f"a list of {len(members)}", value))
        return value
    members = [members[0]] * len(value) if many else members
    return tuple(_build(m, v, f"{path}[{i}]", errors) for i, (m, v) in enumerate(zip(members, value, strict=True)))


def _build_dataclass(kind, value, path, errors):
    if not isinstance(value, dict):
        errors.append(_expected(path, "an object", value))
        return value
    hints = typing.get_type_hints(kind, include_extras=True)
    prefix = f"{path}: " if path else ""
    errors += [f"{prefix}duplicate key {key!r}" for key in getattr(value, "repeated", ())]
    for key in sorted(value.keys() - hints.keys()):
        errors.append(f"{prefix}unknown key {key!r}" + _did_you_mean(difflib.get_close_matches(key, hints, n=1)))
    fields = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            inner = f"{path}.{field.name}" if path else field.name
            fields[field.name] = _build(hints[field.name], value[field.name], inner, errors)
        elif field.default is dataclasses.MISSING:
            errors.append(f"{prefix}missing key {field.name!r}")
            fields[field.name] = None
    return kind(**fields)


def _expected(path, words, value):
    return f"{path or 'the recipe'}: expected {words}, got {_show(value)}"


def _show(value):
    text = repr(dict(value)) if isinstance(value, dict) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(matches):
    return f", did you mean {matches[0]!r}?" if matches else ""


# ---------------------------------------------------------------- fields that contradict each other


def _contradictions(recipe):
    data, per_process = recipe.data, recipe.batch_size_per_process
    if recipe.batch_size % per_process:
        yield f"batch_size {recipe.batch_size} is not a multiple of batch_size_per_process {per_process}"
    if isinstance(recipe.schedule, Cosine) and recipe.schedule.warmup_epochs > recipe.epochs:
        yield f"schedule.warmup_epochs: {recipe.schedule.warmup_epochs} is more than epochs, {recipe.epochs}"
    if isinstance(recipe.schedule, Milestones) and list(recipe.schedule.milestones) != sorted(set(recipe.schedule.milestones)):
        yield f"schedule.milestones: expected ascending epochs, got {list(recipe.schedule.milestones)}"
    if isinstance(data.crop, ResizedCrop):
        for name in ("scale", "ratio"):
            low, high = getattr(data.crop, name)
            if not 0 < low <= high:
                yield f"data.crop.{name}: expected 0 < low <= high, got {[low, high]}"
    if (data.mixup or data.cutmix) and (per_process % 2 or not data.drop_last):
        yield "data: mixup and cutmix pair the images of a batch: batch_size_per_process must be even and drop_last true"
    if data.streaming and not (data.train_size and data.drop_last):
        yield "data: a stream has no length: give train_size, and set drop_last to true"
    if data.streaming != (data.shuffle_buffer > 0):
        expected = "at least 1 with" if data.streaming else "0 without"
        yield f"data.shuffle_buffer: expected {expected} streaming, got {data.shuffle_buffer}"
    if data.resident:
        yield from _contradictions_of_resident(data)
    if data.streaming and data.fraction < 1:
        yield "data.fraction: a stream's classes are not known beforehand: set streaming to false and shuffle_buffer to 0"
    if data.train_size and data.drop_last and data.train_size * data.fraction < recipe.batch_size:
        kept = f"{data.train_size * data.fraction:.0f} images"
        yield f"data: {kept} do not fill one batch of {recipe.batch_size}, and drop_last is true"
    names = [s.name for s in recipe.students] + [f"{s.name}-ema" for s in recipe.students if s.ema is not None]
    if len(set(names)) < len(names):
        yield f"students: names must differ, also from NAME-ema of a student with ema; got {names}"
    distilled = [s.name for s in recipe.students if s.soft]
    if distilled and not recipe.teacher:
        yield f"students {distilled} have a distillation loss ('soft') but teacher is null"
    if recipe.teacher and not distilled:
        yield "teacher: no student has a distillation loss ('soft'): set teacher to null"
    yield from _contradictions_of_networks(recipe)


def _contradictions_of_resident(data):
    if data.streaming:
        yield "data.resident: a stream is never whole: set streaming to false and shuffle_buffer to 0, or resident to false"
    if not isinstance(data.crop, PadCrop):
        yield "data.resident: crops are cut from padded images: set crop to {'kind': 'pad', ...}, or resident to false"
    if data.rand_augment:
        yield "data.resident: rand_augment works on one image at a time: set rand_augment to null, or resident to false"


def _contradictions_of_memo(data):
    if not data.resident:
        yield "teacher.memo: only the resident loader numbers the crops of an image: set data.resident to true, or memo to null"
    unlike = [n for n in ("rand_augment", "random_erasing", "mixup", "cutmix") if getattr(data, n)]
    unlike += ["crop 'resized'"] * isinstance(data.crop, ResizedCrop)
    if unlike:
        yield f"teacher.memo: no image comes twice with data's {', '.join(unlike)}: set memo to null"


def _contradictions_of_networks(recipe):
    teacher = recipe.teacher
    if teacher and teacher.memo:
        yield from _contradictions_of_memo(recipe.data)
    if teacher:
        origins = [n for n in ("recipe", "checkpoint", "pretrained") if getattr(teacher, n)]
        if len(origins) > 1:
            yield f"teacher: expected one of recipe, checkpoint, pretrained; got {' and '.join(origins)}"
        if (teacher.model is None) != (teacher.recipe is not None):
            yield "teacher: expected recipe, or a model with checkpoint or pretrained"
        if teacher.recipe and (teacher.model_args or teacher.size or teacher.mean or teacher.std):
            yield "teacher: with recipe, model_args, size, mean and std come from that recipe"
    for path, network in [("teacher", teacher), *((f"students[{i}]", s) for i, s in enumerate(recipe.students))]:
        if network and (network.mean is None) != (network.std is None):
            yield f"{path}: give both mean and std, or neither"
        if network and network.std and min(network.std) <= 0:
            yield f"{path}.std: expected positive numbers, got {list(network.std)}"
