"""The frozen teacher, a student with its losses, and all that the student's training changes.

teacher = Teacher(network, settings.teacher, accelerator)
taught = teacher(images)  # (logits, features), once a batch, whatever the number of students
terms = student.forward(images, taught, target, index, soft_weight)  # {"loss", "hard", "soft"}
"""

import contextlib
import copy
import dataclasses
import itertools
import math

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import launch
import losses
import models
import optim
import recipe

TERMS = ("loss", "hard", "soft")  # the weighted sum, the label loss, the distillation loss


# ---------------------------------------------------------------- a student


class Distilled(nn.Module):
    """A student and everything its losses train, in one forward that returns scalars: what DDP wraps.

    net   images [B, 3, H, W] -> logits [B, K], or with `taps` (logits, features)
    hard  (logits, target) -> scalar
    soft  on logits: (logits, teacher_logits, target) -> scalar;
          with `taps` on features: a module with projectors,
          (features, teacher_features, target, index) -> scalar; None for labels alone

    Evaluation and export use `.net` alone.
    """

    def __init__(self, net, hard, soft, hard_weight, taps=None, preactivation=False):
        super().__init__()
        self.net, self.hard, self.soft, self.hard_weight = net, hard, soft, hard_weight
        self.taps, self.preactivation = taps, preactivation

    def no_weight_decay(self):
        """Names that timm's optimizers leave without decay: position embeddings and class tokens."""
        return {f"net.model.{name}" for name in getattr(self.net.model, "no_weight_decay", set)()}

    def forward(self, images, taught, target, index, soft_weight):
        """{"loss", "hard", "soft"}: float32 scalars, and with a `soft` on logits the detached "logits".

        taught: (teacher logits, teacher features or None); target: [B] ids or [B, K] probabilities;
        index: [B] image ids; soft_weight: a scalar tensor, because torch.compile would build a new graph for
        every value of a number. No scalar is detached: a compiled forward may return one tensor for two.
        """
        output = self.net(images, self.taps, self.preactivation)
        logits, features = output if self.taps else (output, None)
        # losses in float32, whatever the networks compute in
        with torch.autocast(images.device.type, enabled=False):
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
        """Norms over [B, K] of the gradients of the label and the distillation term, weighted, in the logits.

        Computed on detached logits, so nothing in training depends on it. Only for a `soft` on logits.
        """
        with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
            logits = logits.detach().requires_grad_()
            hard = self.hard_weight * self.hard(logits, target)
            soft = soft_weight * self.soft(logits, teacher_logits, target)
            return tuple(torch.autograd.grad(term, logits)[0].norm() for term in (hard, soft))


def build_network(settings, data, **more):
    """The Network of a recipe.Student or a recipe.Teacher; more: arguments of models.build."""
    more |= {key: getattr(settings, key) for key in ("model_args", "pretrained", "mean", "std")}
    return models.build(settings.model, classes=data.classes, size=data.size, **more)


def build_student(settings, student, teacher_shapes=None, labels=None, smallest_batch=2):
    """(Distilled, optimizer) with the initial weights of `settings.seed`; RecipeError names the student.

    A loss on features is built for the student's and the teacher's shapes (see `losses.py`), with the class
    ids `labels` of all training images. smallest_batch: images in the smallest batch of the run.
    """
    torch.manual_seed(settings.seed)  # every student starts from the same seed, alone or in company
    try:
        network = build_network(student, settings.data, weights=student.weights)
        if student.grad_checkpointing:
            checkpoint_activations(network.model, student.model)
        hard = losses.make_loss(student.hard.loss, losses.LABEL_LOSSES, smoothing=student.hard.smoothing)
        soft = losses.make_loss(student.soft.loss, **student.soft.args) if student.soft else None
        taps, shapes = None, None
        if compares_features(student):
            taps = student.taps or network.default_taps()
            shapes = network.shapes(settings.data.size, taps, student.preactivation), teacher_shapes
        try_losses(hard, soft, settings.data.classes, shapes, min(smallest_batch, 2))
        if shapes:
            soft = soft(*shapes, labels)
        module = Distilled(network, hard, soft, student.hard.weight, taps, student.preactivation)
        return module, optim.make_optimizer(module, student)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise recipe.RecipeError(f"student {student.name!r}: {error}") from error


@torch.no_grad()
def try_losses(hard, soft, classes, shapes, batch):
    """Call losses once on zeros, so that arguments that cannot work show before any training.

    soft: what losses.make_loss gives, or None; shapes: (student's, teacher's) of the features, None for a
    loss on logits. Raises ValueError or RuntimeError.
    """
    logits, target = torch.zeros(batch, classes), torch.zeros(batch, dtype=torch.long)
    values = [hard(logits, target)]
    if shapes:
        with torch.random.fork_rng(devices=[]):  # a small one: CRD's banks have a row for every image
            module = soft(*shapes, torch.tensor([0, 1]))
            features = [[torch.zeros(batch, *shape) for shape in side] for side in shapes]
            values.append(module(*features, target, torch.arange(batch)))
    elif soft:
        values.append(soft(logits, logits, target))
    if not torch.stack(values).isfinite().all():
        raise ValueError(f"on equal logits, the losses are {[value.item() for value in values]}")


def checkpoint_activations(model, name):
    """timm's activation checkpointing; ValueError for a network without it."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ValueError(f"grad_checkpointing: {name} does not have it") from None


def compares_features(student):
    """Whether a student's distillation loss is a module on features rather than a function of logits."""
    return bool(student.soft) and isinstance(losses.LOSSES.get(student.soft.loss), type)


@dataclasses.dataclass
class Student:
    """A student in training, with all that its training changes."""

    settings: recipe.Student
    accelerator: object  # one for each student: its own gradient scaler and count of accumulated batches
    module: nn.Module  # a prepared Distilled
    optimizer: torch.optim.Optimizer  # prepared
    ema: ModelEmaV3 | None
    terms: tuple = TERMS  # names of the scalars that the module returns
    # Vectors of the terms and a 1 stay on the device until a log row: reading would stop it.
    parts: list = dataclasses.field(default_factory=list)  # of the batches of this step
    last_part: torch.Tensor | None = None
    latest: tuple = (None,)  # arguments of `gradient_norms` for the newest batch
    sums: torch.Tensor | float = 0.0  # since the last log row, without the steps that were skipped
    skipped: int = 0  # steps with a gradient that was not finite, up to the last log row
    skipped_in_a_row: int = 0  # how many of them were the last ones before that row
    last: dict | None = None  # the newest scores, with their step
    best: dict | None = None

    @property
    def name(self):
        return self.settings.name

    @property
    def distilled(self):
        """The module without what DDP, DeepSpeed and torch.compile put around it."""
        return self.accelerator.unwrap_model(self.module, keep_torch_compile=False)

    @property
    def net(self):
        return self.distilled.net

    def forward(self, images, taught, target, index, soft_weight):
        """The terms of Distilled.forward for one batch; soft_weight a number."""
        weight = torch.full((), soft_weight, device=images.device)
        terms = self.module(images, taught, target, index, weight)
        self.latest = (terms.pop("logits", None), taught and taught[0], target, soft_weight)
        return terms

    def backward(self, terms):
        """Backward of terms["loss"]; with DeepSpeed it also clips and steps."""
        with frozen_statistics(self.module) if self.settings.grad_checkpointing else contextlib.nullcontext():
            self.accelerator.backward(terms["loss"])
        values = [term.detach() for term in terms.values()]
        self.parts.append(torch.stack([*values, torch.ones_like(values[0])]))

    def step(self):
        """Clip, step, average; then add the loss terms to the sums, unless the gradient was not finite."""
        if launch.uses_deepspeed(self.accelerator):  # it has stepped already, so only the loss can tell
            finite = self.accelerator.reduce(self.parts[-1][0].clone(), "sum").isfinite()
        else:
            finite = optim.clip_and_step(self.accelerator, self.optimizer, self.settings.clip_grad)
        if self.ema:
            self.ema.update(self.net)
        for part in self.parts:
            self.sums = self.sums + torch.where(finite, part, 0.0)
        self.last_part, self.parts = self.parts[-1], []

    def read_sums(self, steps, accumulate):
        """({term: mean} since the last log row, how many of these `steps` were skipped), of all processes."""
        *sums, batches = self.accelerator.reduce(self.sums.clone(), "mean").tolist()
        self.sums = 0.0
        taken = round(batches) // accumulate
        named = zip(self.terms, sums, strict=False)
        return {name: total / batches for name, total in named} if taken else {}, steps - taken

    def log_gradients(self):
        """{"gradient_hard", "gradient_soft", "gradient_ratio"} of the newest batch.

        {} for a student without a distillation loss on logits. The mean over processes, each with its batch.
        """
        if self.latest[0] is None:
            return {}
        norms = self.distilled.gradient_norms(*self.latest)
        norms = [self.accelerator.reduce(norm, "mean").item() for norm in norms]
        row = {"gradient_hard": norms[0], "gradient_soft": norms[1]}
        if norms[1]:
            row["gradient_ratio"] = norms[0] / norms[1]
        return {name: value for name, value in row.items() if math.isfinite(value)}


def prepare_student(student, module, optimizer, loader, **tracking):
    """The Student of a recipe.Student and of what `build_student` gave, with an Accelerator made for it.

    loader: the training loader, for its batch sizes; tracking: arguments of the Accelerator.
    """
    accelerator = launch.make_accelerator(gradient_accumulation_steps=loader.accumulate, **tracking)
    if compares_features(student):
        share_memory(module, accelerator)
    if launch.uses_deepspeed(accelerator):
        launch.configure_deepspeed(accelerator, loader, student.clip_grad)
        # it flattens weights, and its broadcast fails on other layouts
        module.to(memory_format=torch.contiguous_format)
    module, optimizer = accelerator.prepare(module, optimizer)
    if accelerator.scaler is not None:
        optim.start_momentum(optimizer.optimizer)
    module.train()  # DeepSpeed's returns None
    terms = TERMS if student.soft else TERMS[:2]
    prepared = Student(student, accelerator, module, optimizer, None, terms)
    if student.ema is not None:
        prepared.ema = ModelEmaV3(prepared.net, decay=student.ema)
    return prepared


def share_memory(module, accelerator):
    """A loss's memory of past batches (CRD) is updated alike on every process, from what all of them saw.

    DDP would instead copy the main process's memory to all of them before every forward: 1.3 GB on ImageNet.
    """
    if hasattr(module.soft, "gather"):
        module.soft.gather = accelerator.gather
    buffers = [f"soft.{name}" for name, _ in module.soft.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)


@contextlib.contextmanager
def frozen_statistics(network):
    """BatchNorm keeps its running statistics: a block that runs again in backward would move them."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


# ---------------------------------------------------------------- the teacher


class Teacher:
    """A frozen network, called once a batch, whatever the number of students.

    settings: recipe.Teacher; taps: where its features are taken, None where no student compares features.
    """

    def __init__(self, network, settings, accelerator, taps=None):
        self.network, self.taps, self.preactivation = network, taps, settings.preactivation
        self.device_type = accelerator.device.type
        self.dtype = launch.DTYPES[settings.precision or launch.precision(accelerator)]

    def __call__(self, images):
        """Images [B, 3, H, W] in [0, 1] -> (logits [B, K], features as `losses.py` wants them, or None)."""
        autocast = torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not torch.float32)
        with torch.inference_mode(), autocast:
            output = self.network(images, self.taps, self.preactivation)
        logits, features = output if self.taps else (output, None)
        # copies, because autograd refuses to keep tensors that were made in inference mode
        return logits.clone(), features and [feature.clone() for feature in features]


def build_teacher(settings, data):
    """The Network of a recipe.Teacher for a recipe.Data, pretrained, with a file's weights, or untrained."""
    if settings.pretrained:
        models.check_pretrained(settings.model, classes=data.classes, size=settings.size or data.size)
    return build_network(settings, data, resize=settings.size, checkpoint=settings.checkpoint)


def teacher_taps(settings, network):
    """Where the teacher's features are taken; None where no student of the recipe compares features."""
    if any(compares_features(student) for student in settings.students):
        return settings.teacher.taps or network.default_taps()
    return None


def at_chance(scores, classes):
    """Whether a top-1 is within three standard deviations of guessing among `classes`."""
    chance = 1 / classes
    return scores["top1"] <= 100 * (chance + 3 * math.sqrt(chance * (1 - chance) / scores["n"]))


@torch.no_grad()
def freeze(network, size):
    """A trained Network for forwards alone: eval mode, no gradients, BatchNorm folded into convolutions.

    Folding gives equal logits up to rounding, and maps are read and written once less. A convolution next to
    a BatchNorm in a module is folded; where the logits then differ, because the network has something
    between the two, the result is the network itself, else a copy. size: pixels of the images.
    """
    network.eval().requires_grad_(False)
    frozen = copy.deepcopy(network)
    for module in list(frozen.modules()):
        for (name, convolution), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if norm.track_running_stats and norm.num_features == convolution.out_channels:
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                # timm's BatchNormAct2d holds its activation
                rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
                setattr(module, norm_name, rest)
    frozen.to(memory_format=frozen.memory_format)
    images = torch.rand(2, 3, size, size, device=network.mean.device)
    return frozen if torch.allclose(frozen(images), network(images), rtol=1e-3, atol=1e-3) else network
