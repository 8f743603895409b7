"""Every loss of the project, with torch and the standard library only.

Copy this file into another project, or one loss on logits together with `_check_logits`.

Distillation losses on logits are functions, `f(student_logits, teacher_logits, target, *, hyper=default)`,
and so are label losses, `f(logits, target, *, smoothing=0.0)`. Both return a scalar:

    logits   [B, K], any floating dtype; the teacher's are detached. The arithmetic is float32 (float64 stays
             float64), gradients have the dtype of the student's logits
    target   [B] class ids or [B, K] probabilities (mixup, cutmix); only label losses and `dkd` use it

Distillation losses on features are modules, because most have parameters, which are trained with the student
but are not part of it. `Loss(student_shapes, teacher_shapes, labels=None, *, hyper=default)` builds one, and
`loss(student_features, teacher_features, target, index)` returns a scalar:

    shapes          shapes of the features of one image, from shallow to deep, the pooled vector last:
                    [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (2048,)]
    features        tensors [B, *shape] in that order; dtypes and teacher as above; autocast is off inside
    labels, index   class id of every training image [n_data], and the ids of the images of the batch [B]

Bad shapes raise ValueError naming the shapes. Reductions differ between the repositories that these numbers
are compared with, and changing one silently changes a recipe: each docstring gives its own and its source.
"The paper" is Hao et al., "Revisit the Power of Vanilla Knowledge Distillation", NeurIPS 2023, and vanillaKD
its code, github.com/Hao840/vanillaKD.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- distillation losses on logits


def kd(student_logits, teacher_logits, target=None, *, temperature=1.0):
    """Vanilla knowledge distillation (Hinton et al. 2015; paper eq. 1, second term).

    T^2 * mean_B sum_K p_t (log p_t - log p_s), with p = softmax(z / T), as in vanillaKD, mdistiller,
    RepDistiller and timm.
    """
    student, teacher = _check_logits(student_logits, teacher_logits, temperature=temperature)
    log_p_student = F.log_softmax(student / temperature, dim=1)
    log_p_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)


def dkd(student_logits, teacher_logits, target, *, alpha=1.0, beta=2.0, temperature=1.0):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, eq. 7).

    T^2 * mean_B [alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)], where b = [p_y, 1 - p_y] and q is the
    softmax over the classes other than the target y. Soft targets [B, K] are reduced to their argmax, as
    vanillaKD and mdistiller do. alpha=1, beta=1-p_t(y) per sample gives `kd`. Raises ValueError at K = 1.
    """
    student, teacher = _check_logits(student_logits, teacher_logits, target, temperature)
    if student.shape[1] < 2:
        raise ValueError(f"dkd needs at least 2 classes, got logits of shape {tuple(student.shape)}")
    ids = (target if target.ndim == 1 else target.argmax(dim=1))[:, None]

    def decouple(logits):
        """Logits -> log-odds of the target [B, 1], log(p_y / (1 - p_y)); log q [B, K], 0 at the target."""
        z = logits / temperature
        others = z.scatter(1, ids, -torch.inf)  # the references add -1000, which fails at margins over 1000
        log_odds = z.gather(1, ids) - others.logsumexp(dim=1, keepdim=True)
        log_q = others.log_softmax(dim=1).scatter(1, ids, 0.0)  # in kl_div, -inf - -inf would be nan
        return log_odds, log_q

    odds_student, log_q_student = decouple(student)
    odds_teacher, log_q_teacher = decouple(teacher)

    # The references take the logarithm of summed probabilities: -inf in float32 from a margin of 104 on.
    p_teacher = odds_teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(odds_student, p_teacher)
    entropy = F.binary_cross_entropy_with_logits(odds_teacher, p_teacher)
    non_target = F.kl_div(log_q_student, log_q_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * (cross - entropy) + beta * non_target)


def dist(student_logits, teacher_logits, target=None, *, beta=1.0, gamma=1.0, temperature=1.0):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022, eq. 10).

    T^2 * [beta * (1 - mean_B corr(rows)) + gamma * (1 - mean_K corr(columns))], with Pearson correlations
    between softmax(z / T) of the student and of the teacher. The column term compares classes across the
    batch *of this process*: it changes with the batch size, and at B = 1 it is the constant gamma * T^2. As
    in vanillaKD and DIST_KD.
    """
    student, teacher = _check_logits(student_logits, teacher_logits, temperature=temperature)
    p_student = (student / temperature).softmax(dim=1)
    p_teacher = (teacher / temperature).softmax(dim=1)

    def correlation(dim):
        """Mean correlation along `dim`; 0 without gradient where the student is constant up to rounding."""
        mean = p_student.mean(dim, keepdim=True)
        a = p_student - mean
        b = p_teacher - p_teacher.mean(dim, keepdim=True)
        norm_a, norm_b = a.norm(dim=dim), b.norm(dim=dim)
        r = (a * b).sum(dim) / (norm_a * norm_b + 1e-8)  # eps added to the product, as in the references

        # The references' gradient for a constant row (a student with a zero classifier) is b / eps: 1e7, inf
        # in float16. Deviations of the size of the mean's rounding give no direction to learn from.
        rounding = 4 * torch.finfo(a.dtype).eps * a.shape[dim] ** 0.5 * mean.squeeze(dim)
        return r.masked_fill(norm_a <= rounding, 0.0).mean()

    return temperature**2 * (beta * (1 - correlation(1)) + gamma * (1 - correlation(0)))


def bkl(student_logits, teacher_logits, target=None, *, reduction="mean"):
    """Binary KL divergence (paper eq. 3): a binary problem per class, p_s = sigmoid(z_s), p_t = softmax(z_t).

    reduction="mean", over batch and classes, is vanillaKD's binary cross-entropy, which made Table 4. "sum",
    over classes, mean over the batch, is equation 3, with the teacher's entropy subtracted: 0 at p_s = p_t.
    The gradients differ by the factor K only. Raises ValueError for any other.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"bkl: reduction must be 'mean' or 'sum', got {reduction!r}")
    student, teacher = _check_logits(student_logits, teacher_logits)
    p_teacher = teacher.softmax(dim=1)
    cross = F.binary_cross_entropy_with_logits(student, p_teacher, reduction=reduction)
    if reduction == "mean":
        return cross

    rest = (1 - p_teacher).clamp_min(0.0)  # rounding below 0 would be nan
    entropy = -(torch.xlogy(p_teacher, p_teacher) + torch.xlogy(rest, rest)).sum()
    return (cross - entropy) / len(student)


# ---------------------------------------------------------------- label losses


def cross_entropy(logits, target, *, smoothing=0.0):
    """Softmax cross-entropy, sum over classes, mean over the batch, as in timm and torch.

    The target is (1 - smoothing) * target + smoothing / K.
    """
    logits, _ = _check_logits(logits, logits, target)
    target = target.long() if target.ndim == 1 else target.to(logits.dtype)
    no_label = torch.iinfo(torch.long).min  # by default, images labelled -100 would be left out
    return F.cross_entropy(logits, target, label_smoothing=smoothing, ignore_index=no_label)


def binary_cross_entropy(logits, target, *, smoothing=0.0):
    """Sigmoid cross-entropy, **mean over batch and classes** as timm's BinaryCrossEntropy: 1/K of the sum.

    At K = 1000 its gradient is a few per cent of that of `kd`: it has little effect in the recipes A1 and A2.
    """
    logits, _ = _check_logits(logits, logits, target)
    if target.ndim == 1:
        target = torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)
    target = (1 - smoothing) * target.to(logits.dtype) + smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, target)


def _check_logits(student_logits, teacher_logits, target=None, temperature=1.0):
    """Both logits in float32 or better, the teacher's detached; a label loss passes its logits twice."""
    both = (student_logits, teacher_logits.detach())
    shape = tuple(student_logits.shape)
    if any(not z.is_floating_point() or z.ndim != 2 or not z.numel() or z.shape != shape for z in both):
        got = " and ".join(f"{z.dtype} {tuple(z.shape)}" for z in both)
        raise ValueError(f"expected floating-point logits of one shape [B, K], got {got}")
    ids = target is not None and target.shape == shape[:1] and not target.is_floating_point()
    if not (target is None or target.shape == shape or ids):
        expected = f"[B] integer ids or [B, K] probabilities for logits {shape}"
        raise ValueError(f"target must be {expected}, got {target.dtype} {tuple(target.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    # float16 overflows at 65504 and resolves probabilities to 3 digits
    return [z if z.dtype == torch.float64 else z.float() for z in both]


# ---------------------------------------------------------------- distillation losses on features


class CC(nn.Module):
    """Correlation congruence (Peng et al., ICCV 2019) as in RepDistiller, not with the kernels of the paper.

    e = W f + b for the pooled features of student and teacher, d = |e_s - e_t| [B, D]: mean over n < B of
    <d_n, d_{n+1}>. It depends on the order of the batch; and as both embeddings are trained, they can lower
    it without the student. vanillaKD's factor of 0.02 is in the recipe's weight. Raises ValueError at B = 1.
    """

    def __init__(self, student_shapes, teacher_shapes, labels=None, *, dim=128):
        super().__init__()
        self.shapes = _deepest_shapes(student_shapes, teacher_shapes, 1)
        _check_positive(dim=dim)
        (student,), (teacher,) = self.shapes
        self.embed_student = nn.Linear(math.prod(student), dim)
        self.embed_teacher = nn.Linear(math.prod(teacher), dim)

    def forward(self, student_features, teacher_features, target=None, index=None):
        student, teacher = _pooled(student_features, teacher_features, self.shapes)
        with torch.autocast(student.device.type, enabled=False):
            difference = (self.embed_student(student) - self.embed_teacher(teacher)).abs()
            return (difference[:-1] * difference[1:]).sum(dim=1).mean()


class RKD(nn.Module):
    """Relational knowledge distillation (Park et al., CVPR 2019) on the pooled features [B, D].

    distance * L(d_ij / mean d) + angle * L(cos_ijk): d_ij = |f_i - f_j|, cos_ijk the cosine of the angle at i
    between j and k, L the smooth L1 loss between student and teacher, mean over all B^2 pairs and B^3
    triples, i = j included. `squared` takes d^2 for d in the first term. Raises ValueError at B = 1.

    vanillaKD, mdistiller and RepDistiller build [B, B, D] tensors (4 x 512 MB at B = 256, D = 2048). Here
    distances come from the Gram matrix, and the cosines are computed in blocks.
    """

    block = 2**20  # cosines held at a time: 4 MB, which fits the cache of a CPU; all B^3 are 4 GB at B = 1024

    def __init__(
        self, student_shapes, teacher_shapes, labels=None, *, distance=25.0, angle=50.0, squared=False
    ):
        super().__init__()
        self.shapes = _deepest_shapes(student_shapes, teacher_shapes, 1)
        self.distance, self.angle, self.squared = distance, angle, squared

    def forward(self, student_features, teacher_features, target=None, index=None):
        student, teacher = _pooled(student_features, teacher_features, self.shapes)
        with torch.autocast(student.device.type, enabled=False):
            squares = [_square_distances(x) for x in (student, teacher)]
            roots = [square.clamp_min(1e-12).sqrt() for square in squares]  # 1e-12 as in the references
            loss = self.distance * F.smooth_l1_loss(*(_relative(x**2 if self.squared else x) for x in roots))
            if self.angle:
                loss = loss + self.angle * self._angle_loss(squares, roots)
            return loss

    def _angle_loss(self, squares, roots):
        """Mean smooth L1 of the B^3 cosines, by the law of cosines from d^2 and d of student and teacher."""
        # A pair at distance 0 has no angle and no gradient. The references divide by 1e-12 there: a gradient
        # of 4e10 for two equal student rows.
        sides = [(s, (0.5**0.5 / r).masked_fill(s == 0, 0.0)) for s, r in zip(squares, roots, strict=True)]
        size = len(squares[0])

        def block(rows):
            """Sum over the cosines [len(rows), B, B] at the corners `rows`."""
            cosines = [
                (square[rows, :, None] + square[rows, None, :] - square)
                * (half[rows, :, None] * half[rows, None, :])  # 1 / (2 d_ij d_ik)
                for square, half in sides
            ]
            return F.smooth_l1_loss(*cosines, reduction="sum")

        step = max(1, self.block // size**2)
        blocks = (slice(start, start + step) for start in range(0, size, step))
        # recomputed in the backward pass: autograd would keep all B^3 cosines until then
        parts = (checkpoint(block, rows, use_reentrant=False, preserve_rng_state=False) for rows in blocks)
        return sum(part / size**3 for part in parts)


def _square_distances(x):
    """Rows x [B, D] -> squared distances [B, B] from the Gram matrix; 0 for rows equal up to rounding."""
    x = x - x.detach().mean(dim=0)  # else an offset common to all rows would dominate the rounding errors
    gram = x @ x.T
    total = gram.diagonal()[:, None] + gram.diagonal()
    square = total - 2 * gram
    rounding = 16 * torch.finfo(x.dtype).eps * total.detach()
    return square.masked_fill(square <= rounding, 0.0)


def _relative(distances):
    """[B, B] distances divided by the mean of those off the diagonal, with a diagonal of 0."""
    distances = distances - distances.diag().diag()
    return distances / (distances.sum() / (len(distances) * (len(distances) - 1)))


class CRD(nn.Module):
    """Contrastive representation distillation (Tian et al., ICLR 2020) on the pooled features.

    v = W f + b at length 1; two banks hold a running average of v for every training image. Over the image
    itself (j = 0) and K `negatives` of other classes, for the student (for the teacher with the banks
    exchanged),

        x_j = exp(<v_student, bank_teacher[j]> / temperature) / z,    c = K / n_data
        -mean_B [log x_0 / (x_0 + c) + sum_{j>0} log c / (x_j + c)]

    and then bank[i] = unit(momentum * bank[i] + (1 - momentum) * v_i). z is the mean of n_data * exp over the
    first batch. As in RepDistiller. Raises ValueError without `labels`.

    Buffers: `bank_student`, `bank_teacher` [n_data, dim], 1.31 GB for ImageNet; `z` [2], 0 until it is set.
    During a step also [B, n_data] on a GPU, else [B, 16 (K + 1)].
    """

    def __init__(
        self,
        student_shapes,
        teacher_shapes,
        labels=None,
        *,
        dim=128,
        negatives=16384,
        temperature=0.07,
        momentum=0.5,
    ):
        super().__init__()
        self.shapes = _deepest_shapes(student_shapes, teacher_shapes, 1)
        if labels is None:
            raise ValueError(
                "crd draws negatives by class: it needs the labels of all training images, in the order of "
                "their ids. A stream has neither: use data that is read by index (streaming: false)"
            )
        if labels.is_floating_point() or labels.min() < 0 or labels.min() == labels.max():
            got = f"{labels.dtype}, {labels.min()} to {labels.max()}"
            raise ValueError(f"crd needs class ids [n_data] from 0, of two or more classes, got {got}")
        _check_positive(dim=dim, negatives=negatives, temperature=temperature)
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        (student,), (teacher,) = self.shapes
        self.embed_student = nn.Linear(math.prod(student), dim)
        self.embed_teacher = nn.Linear(math.prod(teacher), dim)

        self.register_buffer("bank_student", _first_bank(len(labels), dim, seed=0))
        self.register_buffer("bank_teacher", _first_bank(len(labels), dim, seed=1))
        self.register_buffer("z", torch.zeros(2))
        # Ids sorted by class: each class is one block, which a uniform draw of negatives skips.
        labels = labels.long()
        sizes = labels.bincount()
        starts = sizes.cumsum(0) - sizes
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("class_size", sizes[labels], persistent=False)
        self.register_buffer("class_start", starts[labels], persistent=False)

    # [B, ...] of this process -> that of all; with several processes, set it to `accelerator.gather`
    gather = staticmethod(lambda tensor: tensor)

    def forward(self, student_features, teacher_features, target=None, index=None):
        student, teacher = _pooled(student_features, teacher_features, self.shapes, least=1)
        if index is None or index.shape != student.shape[:1]:
            got = f"{tuple(student.shape)}, got {None if index is None else tuple(index.shape)}"
            raise ValueError(f"crd needs index [B], the ids of the images of features {got}")
        with torch.autocast(student.device.type, enabled=False):
            v_student, v_teacher = _unit(self.embed_student(student)), _unit(self.embed_teacher(teacher))
            return self.contrast(v_student, v_teacher, index, self.sample(index))

    def sample(self, index):
        """index [B] -> ids [B, 1 + negatives]: `index`, then draws from other classes with replacement."""
        size, start = self.class_size[index, None], self.class_start[index, None]
        # integers: a float32 draw has 2^24 values, which do not divide evenly among 1.2 million ids
        draw = torch.randint(2**62, (len(index), self.negatives), device=index.device)
        place = draw % (len(self.by_class) - size)
        return torch.cat([index[:, None], self.by_class[place + size * (place >= start)]], dim=1)

    def contrast(self, v_student, v_teacher, index, sampled):
        """Loss of unit rows v [B, D] against the bank rows `sampled` [B, 1 + K], the positive first.

        Updates the banks in training mode. The gradient is computed here: autograd would keep the scores, and
        on a CPU the rows [B, 1 + K, D], until the backward pass.
        """
        v, banks = torch.stack([v_student, v_teacher]), (self.bank_teacher, self.bank_student)
        with torch.no_grad():
            scores = torch.stack([_products(x, bank, sampled) for x, bank in zip(v, banks, strict=True)])
            value, slopes = self._value_and_slopes(scores / self.temperature)
            gradient = [_weighted_rows(x, bank, sampled) for x, bank in zip(slopes, banks, strict=True)]
            gradient = torch.stack(gradient) / self.temperature
        pull = (v * gradient).sum()
        loss = value + (pull - pull.detach())  # `value`, with `gradient` by v
        if self.training:
            self._update(v_student.detach(), v_teacher.detach(), index)
        return loss

    def _value_and_slopes(self, scores):
        """Scores <v, bank[j]> / temperature [2, B, 1 + K] -> the loss, its derivative; sets z if it is 0."""
        n_data, batch, negatives = len(self.by_class), scores.shape[1], scores.shape[2] - 1
        # the estimate costs little; asking the device whether it is needed would stall every step
        estimate = scores.exp().mean(dim=(1, 2)) * n_data
        self.z.copy_(torch.where(self.z > 0, self.z, self.gather(estimate[None]).mean(dim=0)))

        noise = negatives / n_data
        logits = scores - (self.z.log() + math.log(noise + 1e-7))[:, None, None]  # of x_j / (x_j + c)
        signed = torch.cat([logits[..., :1], -logits[..., 1:]], dim=-1)
        # the references add 1e-7 in the denominators only, which leaves a constant
        value = -F.logsigmoid(signed).sum() / batch + 2 * negatives * math.log1p(1e-7 / noise)

        # -logsigmoid falls as the score of the positive rises, and rises with those of the negatives
        slopes = (-signed).sigmoid() / batch
        slopes[..., :1].neg_()
        return value, slopes

    @torch.no_grad()
    def _update(self, v_student, v_teacher, index):
        """Move the rows of the images of all processes, so that every process holds the same banks."""
        index, v_student, v_teacher = self.gather(index), self.gather(v_student), self.gather(v_teacher)
        # An id can come twice (repeated augmentation, a padded last batch), and the order of writing is not
        # defined: every place of an id writes the embedding of its last place.
        order = index.argsort(stable=True)
        last = order[torch.searchsorted(index[order], index, right=True) - 1]

        for bank, v in ((self.bank_student, v_student), (self.bank_teacher, v_teacher)):
            bank.index_copy_(0, index, _unit(self.momentum * bank[index] + (1 - self.momentum) * v[last]))


def _first_bank(n_data, dim, seed):
    """[n_data, dim], uniform within sqrt(3 / dim): the same in every process, whatever it drew before."""
    # Four numbers of 16 bits from each draw of 64 bits: a float32 each would take longer.
    generator = torch.Generator().manual_seed(seed)
    bits = torch.empty(-(-n_data * dim // 4), dtype=torch.long).random_(-(2**63), None, generator=generator)
    bank = bits.view(torch.int16)[: n_data * dim].view(n_data, dim).float()
    return bank.add_(0.5).mul_((3 / dim) ** 0.5 / 2**15)


def _products(v, bank, ids):
    """v [B, D], ids [B, N] of rows of the bank [n, D] -> <v_i, bank[ids_ij]> [B, N]."""
    if _whole_bank(bank, ids):
        return (v @ bank.T).gather(1, ids)
    # [B, N, D] at once would be 2 GB; index_select takes a third of the time of bank[rows]
    return torch.stack([bank.index_select(0, rows) @ x for x, rows in zip(v, ids, strict=True)])


def _weighted_rows(weight, bank, ids):
    """weight, ids [B, N] -> sum_j weight_ij bank[ids_ij] [B, D]."""
    if _whole_bank(bank, ids):
        return weight.new_zeros(len(ids), len(bank)).scatter_add_(1, ids, weight) @ bank
    return F.embedding_bag(ids, bank, per_sample_weights=weight, mode="sum")


def _whole_bank(bank, ids):
    """Whether to multiply by all n rows of the bank instead of copying the N sampled rows of each image.

    On a CPU copying a row takes as long as 16 products with one: products win on CIFAR (n = 3 N), copies on
    ImageNet (n = 78 N). On a GPU a loop over the images would be bound by the launches of its kernels.
    """
    return bank.is_cuda or len(bank) <= 16 * ids.shape[1]


def _unit(x, eps=1e-6):
    """Rows of x [B, D] at length 1; a row shorter than eps becomes 0 without gradient (references: nan)."""
    norm = x.norm(dim=1, keepdim=True)
    return (x / norm.clamp_min(eps)).masked_fill(norm <= eps, 0.0)


class ReviewKD(nn.Module):
    """Knowledge review (Chen et al., CVPR 2021): fuses the student's levels, deepest first, as in ReviewKD.

    Level i: x = conv1(f_i); with a = sigmoid(attention([x, deeper])) [B, 2, H, W] and the level below resized
    to x, x = a_0 x + a_1 deeper; conv2(x), at the teacher's size, is compared with the teacher's level, and x
    goes on to the next level. A comparison is the mean squared error of the maps and of their averages over
    4x4, 2x2 and 1x1 places (of those smaller than the map; a side shorter than that stays), with weights 1,
    1/2, 1/4.. divided by their sum. The levels are summed. x is as wide as the student's deepest level, at
    most `mid`.

    All features count, the pooled vector as a 1x1 map, matched from the deepest, at any resolution. Batch
    statistics are those of this process. Raises ValueError at B = 1.
    """

    def __init__(self, student_shapes, teacher_shapes, labels=None, *, mid=512):
        super().__init__()
        _check_positive(mid=mid)
        count = min(len(student_shapes), len(teacher_shapes))
        self.shapes = _deepest_shapes(student_shapes, teacher_shapes, count)
        widths = [(student[0], teacher[0]) for student, teacher in zip(*self.shapes, strict=True)][::-1]
        mid = min(mid, widths[0][0])
        levels = (_Level(width, mid, out, deepest=i == 0) for i, (width, out) in enumerate(widths))
        self.levels = nn.ModuleList(levels)

    def forward(self, student_features, teacher_features, target=None, index=None):
        student, teacher = _check_features(student_features, teacher_features, self.shapes)
        pairs = zip(reversed(student), reversed(teacher), strict=True)
        loss, deeper = 0.0, None
        with torch.autocast(student[0].device.type, enabled=False):
            for level, pair in zip(self.levels, pairs, strict=True):
                x, y = (side[:, :, None, None] if side.ndim == 2 else side for side in pair)
                x, deeper = level(x, deeper, y.shape[2:])
                loss = loss + _hierarchical_error(x, y)
        return loss


class _Level(nn.Module):
    """Attention-based fusion: [B, width, h, w], deeper [B, mid, ..] -> [B, out, H, W], [B, mid, H, W]."""

    def __init__(self, width, mid, out, deepest):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(width, mid, 1, bias=False), nn.BatchNorm2d(mid))
        self.conv2 = nn.Sequential(nn.Conv2d(mid, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.attention = None if deepest else nn.Conv2d(2 * mid, 2, 1)
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x, deeper, size):
        x = self.conv1(x)
        if self.attention is not None:
            deeper = F.interpolate(deeper, x.shape[2:])
            attention = self.attention(torch.cat([x, deeper], dim=1)).sigmoid()
            x = attention[:, :1] * x + attention[:, 1:] * deeper
        x = x if x.shape[2:] == size else F.interpolate(x, size)
        return self.conv2(x), x


def _hierarchical_error(x, y):
    """Hierarchical context loss between maps [B, C, H, W]: see ReviewKD."""
    height, width = x.shape[2:]
    error, weight, total = F.mse_loss(x, y), 1.0, 1.0
    for size in (4, 2, 1):
        if size < max(height, width):
            places, weight = (min(size, height), min(size, width)), weight / 2
            pooled = F.mse_loss(F.adaptive_avg_pool2d(x, places), F.adaptive_avg_pool2d(y, places))
            error = error + weight * pooled
            total += weight
    return error / total


def _deepest_shapes(student_shapes, teacher_shapes, count):
    """The `count` deepest shapes of student and teacher; raises ValueError for any but (C,) and (C, H, W)."""
    sides = [[tuple(shape) for shape in shapes[-count:]] for shapes in (student_shapes, teacher_shapes)]
    if not all(sides) or any(len(shape) not in (1, 3) or min(shape) < 1 for side in sides for shape in side):
        got = f"{student_shapes} of the student and {teacher_shapes} of the teacher"
        raise ValueError(f"expected per-image shapes (C, H, W) that end in the pooled (C,), got {got}")
    return sides


def _check_positive(**hyper):
    for name, value in hyper.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _check_features(student_features, teacher_features, shapes, least=2):
    """The deepest features, as many as there are shapes, in float32 or better, the teacher's detached.

    Raises ValueError if they do not have the shapes, and for a batch of fewer than `least` images. Height and
    width are not compared: the images may have another size than those that gave the shapes.
    """
    both = student_features[-len(shapes[0]) :], [x.detach() for x in teacher_features[-len(shapes[1]) :]]
    batch = len(both[0][-1]) if both[0] else 0
    for name, features, side in zip(("student", "teacher"), both, shapes, strict=True):
        expected = [(len(shape) + 1, batch, shape[0]) for shape in side]
        if [(x.ndim, *x.shape[:2]) for x in features] != expected:
            sizes = [tuple(x.shape) for x in features]
            wanted = f"a batch of {batch} of the shapes {side} this loss was built for"
            raise ValueError(f"{name} features {sizes} are not {wanted}")
    if batch < least:
        got = tuple(both[0][-1].shape)
        raise ValueError(f"this loss compares the images of a batch, it needs {least} or more, got {got}")
    return [[x if x.dtype == torch.float64 else x.float() for x in features] for features in both]


def _pooled(student_features, teacher_features, shapes, least=2):
    """The last features as [B, D_s] and [B, D_t]; a map counts flattened."""
    (student,), (teacher,) = _check_features(student_features, teacher_features, shapes, least)
    return student.flatten(1), teacher.flatten(1)


# ---------------------------------------------------------------- by name

LOSSES = {loss.__name__.lower(): loss for loss in (kd, dkd, dist, bkl, CC, RKD, CRD, ReviewKD)}
LABEL_LOSSES = {loss.__name__: loss for loss in (cross_entropy, binary_cross_entropy)}


def make_loss(name, known=LOSSES, **hyper):
    """`make_loss("kd", temperature=4.0)` -> a callable (student_logits, teacher_logits, target) -> scalar.

    Losses on features: `make_loss("rkd", angle=50.0)` -> (student_shapes, teacher_shapes, labels) -> module.
    Label losses: `make_loss("cross_entropy", LABEL_LOSSES, smoothing=0.1)` -> (logits, target) -> scalar.
    Raises ValueError for an unknown name or hyper-parameter, naming it and the known ones.
    """
    if name not in known:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(known)}")
    parameters = inspect.signature(known[name]).parameters.values()
    accepted = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    kinds = {bool: "true or false", str: "text", int: "a number", float: "a number"}
    for key, value in hyper.items():
        if key not in accepted:
            raise ValueError(f"loss {name!r} has no argument {key!r}; known: {', '.join(accepted)}")
        expected = kinds[type(accepted[key])]
        if kinds.get(type(value)) != expected:
            raise ValueError(f"loss {name!r}: {key} must be {expected}, got {value!r}")
    return functools.partial(known[name], **hyper)
