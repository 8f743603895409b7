"""A run's settings as frozen, strictly typed pydantic dataclasses, read from JSON and written to JSON.

    recipe = load("recipes/quickstart.json", ["epochs=5", "students.kd.lr=0.1"])

The dataclasses below are the whole format. Unknown keys are refused. Keys without effect on accuracy have a
default, all others must be given. All errors of a file are reported at once: the path, what was expected and
what was given. The names of models, optimizers and losses are checked by train.py before any work starts.
"""

import collections
import dataclasses
import difflib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

MAX_BYTES = 2**20  # a recipe is a page: a larger file is a mistake or an attack
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1

# Options of older recipes, and the value of each that changes nothing.
REMOVED = {("data", "rand_augment_on"): "cpu", ("teacher", "memo"): None}


class RecipeError(Exception):
    """Bad input: the message says where and what was expected. Scripts print it and exit with code 2."""


T = TypeVar("T")
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Whole = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Number = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Text = Annotated[str, Field(min_length=1)]
NonEmpty = Annotated[tuple[T, ...], Field(min_length=1)]
Pair = Annotated[tuple[T, ...], Field(min_length=2, max_length=2)]

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
section = dataclass(frozen=True, kw_only=True, config=_CONFIG)


@section
class Milestones:
    """lr * factor ** (number of milestones reached); milestones are epochs, counted from 0."""

    kind: Literal["milestones"]
    milestones: NonEmpty[Count]
    factor: Share


@section
class WarmMilestones(Milestones):
    """Milestones, and over the first steps a linear warm-up from lr * warmup_factor: mmdetection's "step"."""

    kind: Literal["warm_milestones"]
    warmup_steps: Whole
    warmup_factor: Share


@section
class Cosine:
    """Linear warm-up from warmup_lr, then a cosine over the whole run down to min_lr."""

    kind: Literal["cosine"]
    warmup_epochs: Whole
    warmup_lr: Number
    min_lr: Number
    per: Literal["epoch", "step"]  # how often the learning rate is set


@section
class PadCrop:
    """Zero-pad by `padding` pixels, then crop `size` at random: for images of the training size."""

    kind: Literal["pad"]
    padding: Whole


@section
class ResizedCrop:
    """Inception-style random crop: a share `scale` of the area, an aspect in `ratio`, resized to `size`."""

    kind: Literal["resized"]
    scale: Pair[Share]
    ratio: Pair[Number]
    interpolation: Literal["random", "bilinear", "bicubic"]


@section
class Data:
    source: Text  # "digits", a data set on the Hugging Face hub, or a folder; `--data DIR` sets it
    train_split: Text | None  # null: train, or the only split
    test_split: Text | None  # null: validation or test, else a tenth of each training class
    image: Text  # column
    label: Text  # column
    classes: Annotated[int, Field(ge=2, le=MAX_INTEGER)] | None  # null: as many as the source names
    train_size: Count | None  # images of the training split: compared with the data, needed for a stream
    streaming: bool
    shuffle_buffer: Whole  # images held to shuffle a stream; 0 for other data, which is shuffled whole
    size: Pixels  # square
    crop: Annotated[PadCrop | ResizedCrop, Field(discriminator="kind")]
    hflip: Share
    rand_augment: Text | None  # timm's notation, "rand-m7-mstd0.5"
    repeats: Count  # crops of an image in a step (repeated augmentation); epochs keep their length
    random_erasing: Share  # probability that noise covers a part of an image
    mixup: Number  # alpha of the Beta distribution; 0: off
    cutmix: Number  # likewise
    drop_last: bool
    crop_pct: Annotated[float, Field(ge=0.01, le=1)]  # evaluation: resize to size / crop_pct, centre crop
    interpolation: Literal["bilinear", "bicubic"]  # evaluation
    max_broken: Share = 0.001  # share of the training images that may be broken before the run stops
    fraction: Annotated[float, Field(ge=1e-4, le=1)] = 1.0  # of each class, the same images for all seeds
    pipeline: Literal["fast", "timm"] = "timm"  # of crop 'resized'. fast: same random numbers, other rounding
    resident: bool = False  # the whole set as one tensor on the device, cropped there; needs crop 'pad'


@section
class Teacher:
    """One of: `recipe` (its only student), `checkpoint` of `model`, `pretrained` weights of `model`.

    With none of them `model` has random weights, which train.py accepts for a trial only.
    """

    model: Text | None = None
    model_args: dict | None = None
    size: Pixels | None = None  # batches are resized to it on the device. null: they are not resized
    taps: NonEmpty[Whole] | None = None  # indices of timm's forward_intermediates. null: see models.py
    preactivation: bool = False  # features from before the last activation of their stage (ResNets)
    pretrained: bool = False
    checkpoint: Text | None = None
    recipe: Text | None = None
    mean: NonEmpty[float] | None = None  # null: mean and std of the network's timm configuration
    std: NonEmpty[float] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # null: that of `accelerate launch`


@section
class Hard:
    loss: Text  # a name of losses.LABEL_LOSSES
    weight: Number
    smoothing: Share


@section
class Soft:
    loss: Text  # a name of losses.LOSSES
    weight: Number
    warmup_epochs: Whole  # weight * min((epoch + 1) / warmup_epochs, 1); 0: constant
    args: dict  # the loss's hyper-parameters by name


@section
class Student:
    name: Name
    model: Text
    model_args: dict  # passed to timm.create_model
    pretrained: bool  # begin with timm's weights
    weights: Text | None = None  # begin with those of a file or an exported folder; other classes: a new head
    mean: NonEmpty[float] | None = None  # as the teacher's
    std: NonEmpty[float] | None = None
    optimizer: Text  # timm's name
    optimizer_args: dict
    lr: Number
    weight_decay: Number
    decay_norm_and_bias: bool  # weight decay on 1-D parameters and biases too
    clip_grad: Number | None  # largest global norm of the gradient
    ema: Share | None  # decay of a running average of the weights, which is evaluated and exported too
    hard: Hard
    soft: Soft | None  # null: trained on labels alone
    taps: NonEmpty[Whole] | None = None  # as the teacher's
    preactivation: bool = False
    grad_checkpointing: bool = False  # recompute activations in backward: less memory, the same numbers
    paper: dict | None = None  # the table cell of the paper that this student reproduces, for tools/


@section
class Recipe:
    about: Text
    seed: Whole
    runs: Count = 1  # repeat with seeds seed, seed + 1, ... and report mean and spread
    epochs: Count
    batch_size: Count  # images per optimizer step, over all processes
    batch_size_per_process: Count  # what DIST, CC, RKD and CRD compare; the rest is gradient accumulation
    schedule: Annotated[Milestones | Cosine, Field(discriminator="kind")]
    data: Data
    teacher: Teacher | None
    students: NonEmpty[Student]
    log_every: Count = 50  # steps
    evaluate_every: Count = 1  # epochs
    save_every: Count | None = None  # steps; null: once an epoch

    def contradictions(self):
        """Yield the errors of a recipe whose fields are valid one by one."""
        per_process, schedule, data = self.batch_size_per_process, self.schedule, self.data
        if self.batch_size % per_process:
            yield f"batch_size {self.batch_size} is not a multiple of batch_size_per_process {per_process}"
        if isinstance(schedule, Cosine) and schedule.warmup_epochs > self.epochs:
            yield f"schedule.warmup_epochs: {schedule.warmup_epochs} is more than epochs, {self.epochs}"
        if isinstance(schedule, Milestones) and list(schedule.milestones) != sorted(set(schedule.milestones)):
            yield f"schedule.milestones: expected ascending epochs, got {_show(list(schedule.milestones))}"
        if (data.mixup or data.cutmix) and (per_process % 2 or not data.drop_last):
            yield "data: mixup and cutmix pair images: batch_size_per_process must be even and drop_last true"
        if isinstance(data.crop, ResizedCrop):
            for name, (low, high) in (("scale", data.crop.scale), ("ratio", data.crop.ratio)):
                if not 0 < low <= high:
                    yield f"data.crop.{name}: expected 0 < low <= high, got {[low, high]}"
        got = f"got crop {data.crop.kind!r} and rand_augment {_show(data.rand_augment)}"
        other_policy = not (data.rand_augment or "rand-").startswith("rand-")
        if data.pipeline == "fast" and (data.crop.kind != "resized" or other_policy):
            yield f"data.pipeline: 'fast' needs crop 'resized', RandAugment or none; {got}: set it to 'timm'"
        if data.resident and (data.crop.kind != "pad" or data.rand_augment):
            yield f"data.resident: it needs crop 'pad' and rand_augment null; {got}: set resident to false"

        if data.streaming and not (data.train_size and data.drop_last and data.shuffle_buffer):
            yield "data: a stream needs its train_size, drop_last true, and a shuffle_buffer of at least 1"
        if data.shuffle_buffer and not data.streaming:
            yield f"data.shuffle_buffer: expected 0 without streaming, got {data.shuffle_buffer}"
        if data.streaming and (data.resident or data.fraction < 1):
            yield "data: resident and fraction need all images: set streaming to false, shuffle_buffer to 0"
        yield from _contradictions_of_networks(self.teacher, self.students)


def _contradictions_of_networks(teacher, students):
    names = [student.name for student in students]
    names += [f"{student.name}-ema" for student in students if student.ema is not None]
    if len(set(names)) < len(names):
        yield f"students: names must differ, also from NAME-ema of a student with ema; got {_show(names)}"
    distilled = [student.name for student in students if student.soft]
    if distilled and not teacher:
        yield f"students {_show(distilled)} have a distillation loss ('soft') but teacher is null"

    networks = {f"students[{i}]": student for i, student in enumerate(students)}
    if teacher:
        networks["teacher"] = teacher
        if not distilled:
            yield "teacher: no student has a distillation loss ('soft'): set teacher to null"
        if (teacher.model is None) != (teacher.recipe is not None):
            yield "teacher: expected recipe, or a model with checkpoint or pretrained"
        if teacher.recipe and (teacher.model_args or teacher.size or teacher.mean or teacher.std):
            yield "teacher: with recipe, model_args, size, mean and std come from that recipe"
    origins = ("recipe", "checkpoint", "pretrained", "weights")
    for path, network in networks.items():
        given = [name for name in origins if getattr(network, name, None)]
        if len(given) > 1:
            yield f"{path}: expected one origin of the weights, got {' and '.join(given)}"
        if (network.mean is None) != (network.std is None):
            yield f"{path}: give both mean and std, or neither"


# ---------------------------------------------------------------- JSON in, JSON out


def load(path, overrides=(), kind=Recipe):
    """Recipe from a JSON file, with `path=value` overrides (JSON values, else text) through the same checks.

    kind: the dataclass of its format. Raises RecipeError with all errors of the file.
    """
    tree = read_json(path)
    drop_removed(tree)
    problems = [(override, _apply(tree, override)) for override in overrides]
    errors = [f"--set {printable(override)}: {problem}" for override, problem in problems if problem]
    try:
        # from JSON text, because strict pydantic takes no list for a tuple
        recipe = TypeAdapter(kind).validate_json(json.dumps(tree, ensure_ascii=False).encode())
        errors += recipe.contradictions()
    except UnicodeEncodeError as error:
        excerpt = error.object[max(error.start - 40, 0) : error.end]
        errors.append(f"expected text that UTF-8 can encode, got {excerpt!r}")
    except ValidationError as error:
        errors += [_explain(fault, kind) for fault in error.errors() if not _follows(fault)]
    if errors:
        raise RecipeError("\n".join(f"{printable(path)}: {error}" for error in errors))
    return recipe


def dump(recipe):
    """The recipe as JSON text; `load` of it gives an equal recipe."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def drop_removed(tree):
    """Delete removed options from a recipe as JSON, in place, where their value changes nothing."""
    for (name, key), harmless in REMOVED.items():
        fields = tree.get(name) if isinstance(tree, dict) else None
        if isinstance(fields, dict) and fields.get(key, ...) == harmless:
            del fields[key]


def nearest(word, known):
    """ ", did you mean 'x'?" for the known word that is most like `word`, "" if none is like it."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


# ---------------------------------------------------------------- strict JSON


def read_json(path, max_bytes=MAX_BYTES):
    """The JSON in a file; RecipeError if it cannot be read, is too large, too deep or not strict JSON."""
    path, name = Path(path), printable(path)
    try:
        if os.path.exists(path) and not path.is_file():  # a FIFO would be waited for
            raise RecipeError(f"{name}: not a file")
        with open(path, "rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        beside = Path(__file__).parent / "recipes" / path.name
        hint = nearest(path.name, [other.name for other in path.parent.glob("*.json")])
        hint = f", did you mean {os.path.relpath(beside)}?" if os.path.isfile(beside) else hint
        raise RecipeError(f"{name}: cannot be read: {error.strerror}{hint}") from None
    except ValueError as error:  # a NUL or half a surrogate pair in the path
        raise RecipeError(f"{name}: cannot be read: {error}") from None

    if len(raw) > max_bytes:
        raise RecipeError(f"{name}: larger than {max_bytes} bytes")
    try:
        return _parse(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"{name}: not a JSON file: {reason}") from None


def _parse(text):
    tree = json.loads(text, object_pairs_hook=_object)
    _check(tree)
    return tree


def _object(pairs):
    """A JSON object; ValueError for a repeated key, of which json.loads alone would take the last."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"duplicate key {_show(counts.most_common(1)[0][0])}")
    return tree


def _check(node, depth=1):
    """ValueError for JSON that is nested too deeply, or with a number that is not finite."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{node} is not a finite number")
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check(child, depth + 1)


def _apply(tree, override):
    """Set one `a.0.b=value` in the parsed JSON; returns what is wrong with it, or None."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        return "expected path=value, for example students.kd.lr=0.1"
    try:
        value = _parse(text)
    except (ValueError, RecursionError):
        value = text  # 5e-3 is JSON, lamb is not

    node = tree
    for part in path.split("."):
        if isinstance(node, list):  # an item is called by its index or its "name"
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            keys = {str(i): i for i in range(len(node))}
            keys |= {name: i for i, name in enumerate(names) if isinstance(name, str)}
            if part not in keys:
                return f"{part!r} is not one of {_show(list(keys))}"
            part = keys[part]
        elif not isinstance(node, dict):
            return f"nothing called {part!r} can be set in {_show(node)}"
        parent, key = node, part
        node = node[part] if isinstance(node, list) else node.get(part)
    parent[key] = value
    return None


# ---------------------------------------------------------------- pydantic's errors in a user's words

_WORDS = {  # where pydantic's own words do not fit
    "greater_than_equal": "a number >= {ge:g}",
    "less_than_equal": "a number <= {le:g}",
    "string_pattern_mismatch": "a name of a-z, 0-9, '.', '_', '-' (at most 64, first a letter or digit)",
    "string_too_short": "a text that is not empty",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "union_tag_invalid": '"kind" to be one of {expected_tags}',
    "union_tag_not_found": 'an object with "kind"',
}


def _follows(fault):
    """pydantic also calls a list too short if its items are invalid; their errors are reported already."""
    return fault["type"] == "too_short" and len(fault["input"]) >= fault["ctx"]["min_length"]


def _explain(fault, recipe_kind):
    """One error of pydantic as "path: expected ..., got ..."."""
    kind = fault["type"]
    section, path = _section_of(fault["loc"], recipe_kind)

    if path in REMOVED:
        return _at(path, "this option was removed: leave the key out")
    if kind == "missing":
        return _at(path[:-1], f"missing key {path[-1]!r}")
    if kind == "unexpected_keyword_argument":
        hint = nearest(path[-1], [field.name for field in dataclasses.fields(section)])
        return _at(path[:-1], f"unknown key {_show(path[-1])}{hint}")

    expected = fault["msg"].removeprefix("Input should be ")
    if kind in _WORDS:
        expected = _WORDS[kind].format(**fault.get("ctx", {}))
    return _at(path, f"expected {expected}, got {_show(fault['input'])}")


def _section_of(loc, section):
    """(dataclass that the last key of a place belongs to, the place without the values of "kind" in it)."""
    path, tagged = [], {}
    for part in loc:
        if part in tagged:
            section, tagged = tagged[part], {}
            continue
        path.append(part)
        inside = _dataclasses_in(get_type_hints(section).get(part))
        section = inside[0] if inside else section
        tagged = {tag: one for one in inside for tag in get_args(get_type_hints(one).get("kind"))}
    return section, tuple(path)


def _dataclasses_in(hint):
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for part in get_args(hint) for found in _dataclasses_in(part)]


def _at(loc, message):
    """(("students", 0, "lr"), "x") -> "students[0].lr: x"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in loc)
    return "".join(parts).removeprefix(".") + ": " * bool(loc) + message


def _show(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text):
    """A path, key or name of others for a terminal: control characters and half surrogate pairs escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
