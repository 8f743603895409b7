"""Every loss of the project, and nothing else: torch and the standard library, safe to copy into another project.

Distillation losses on logits share one contract, `f(student_logits, teacher_logits, target, *, hyper=default)`:

    student_logits, teacher_logits   [B, K], any floating dtype; the teacher is detached here
    target                           [B] class ids or [B, K] probabilities (mixup, cutmix); unused where it may be None
    returns                          a scalar; float32 arithmetic whatever the input (float64 stays float64),
                                     gradients in the dtype of `student_logits`

Label losses are `f(logits, target, *, smoothing=0.0)`. Distillation losses on features are modules, as most train something,
made by `Loss(student_shapes, teacher_shapes, labels=None, *, hyper=default)` and called by
`loss(student_features, teacher_features, target, index)`:

    shapes                           per-image shapes from shallow to deep, found by a dry forward, the pooled one last:
                                     [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (2048,)]
    features                         tensors [B, *shape] in that order; dtypes and teacher as above, autocast is off inside
    labels, index                    class id of every training image [n_data], and which of them the batch holds [B]

Their parameters are trained with the student and are no part of it. Bad shapes raise ValueError naming the shapes.

Reductions differ between the repositories these numbers are compared with; changing one silently changes a recipe:

    loss                   classes   batch   factor   as in
    kd, dkd                sum       mean    T^2      vanillaKD, mdistiller, RepDistiller, timm
    dist                   -         mean    T^2      DIST_KD, vanillaKD (rows: mean over B; columns: mean over K)
    bkl(reduction="mean")  mean      mean    1        vanillaKD losses/bkd.py: made the paper's Table 4
    bkl(reduction="sum")   sum       mean    1        the paper's equation (3)
    cross_entropy          sum       mean    1        everyone
    binary_cross_entropy   mean      mean    1        timm BinaryCrossEntropy, as vanillaKD uses it

    loss      reduction                                                as in
    cc        sum over D, mean over the B - 1 neighbours in the batch  RepDistiller; vanillaKD multiplies it by 0.02
    rkd       mean over B^2 pairs and B^3 triples, i = j included      vanillaKD, mdistiller, RepDistiller
    crd       sum over the negatives, mean over B                      vanillaKD, mdistiller, RepDistiller
    reviewkd  mean over B, C and places; sum over the levels           vanillaKD, mdistiller, ReviewKD

Paper: Hao et al., "Revisit the Power of Vanilla Knowledge Distillation", NeurIPS 2023. Reference code: Hao840/vanillaKD.
"""

import difflib
import functools
import inspect
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------- distillation losses on logits


def kd(student_logits, teacher_logits, target=None, *, temperature=1.0):
    """Vanilla knowledge distillation (Hinton et al. 2015; paper eq. 1, second term).

    T^2 * mean_B sum_K p_t (log p_t - log p_s), with p = softmax(z / T).
    With log p = z / T - lse, lse = log sum_K exp(z / T), the sum is sum_K p_t (z_t - z_s) / T + lse_s - lse_t; as
    T dlse/dz = p, T times it has the gradient p_s - p_t by z_s.
    Reference: vanillaKD losses/kd.py, `kl_div(reduction="batchmean")` times T^2.
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        (z_student, p_student, lse_student), (z_teacher, p_teacher, lse_teacher) = (
            _softmax(z, z, temperature) for z in (student, teacher)
        )
        kl = z_teacher.sub_(z_student).mul_(p_teacher).sum() + temperature * (lse_student - lse_teacher).sum()
        gradient = p_student.sub_(p_teacher)
    return temperature / len(student) * _KnownGradient.apply(student, kl, gradient)


def dkd(student_logits, teacher_logits, target, *, alpha=1.0, beta=2.0, temperature=1.0):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, eq. 7).

    T^2 * mean_B [alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)], where b = [p_y, 1 - p_y] and q is the softmax over the
    classes other than the target y. Soft targets `[B, K]` are reduced to their argmax, as vanillaKD does.
    With the margin m = z_y / T - lse over the others, p_y is sigmoid(m), so that KL(b_t || b_s) has the gradient
    d = p_y,s - p_y,t by m_s, and T dm/dz is 1 at y and -q elsewhere. KL(q_t || q_s) is `kd` of the others. T times the
    bracket has the gradient alpha * d at y and beta * (q_s - q_t) - alpha * d * q_s elsewhere.
    alpha=1, beta=1-p_t(y) per sample gives `kd`. Reference: mdistiller DKD.py, vanillaKD losses/dkd.py.
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    _check_target(target, student)
    if student.shape[1] < 2:
        raise ValueError(f"dkd needs at least 2 classes, got logits of shape {tuple(student.shape)}")
    ids = (target if target.ndim == 1 else target.argmax(dim=1))[:, None]
    with torch.no_grad():
        # a true -inf: the references' `1000 * mask` fails at margins over 1000
        others = (_softmax(z, z.scatter(1, ids, -torch.inf), temperature) for z in (student, teacher))
        (z_student, q_student, lse_student), (z_teacher, q_teacher, lse_teacher) = others  # q is 0 at y
        # The references take log(softmax(...)[others].sum()): inf as soon as the sum underflows, which a logit margin of 104
        # does in float32. The margin itself has no such limit.
        m_student = z_student.gather(1, ids) / temperature - lse_student
        m_teacher = z_teacher.gather(1, ids) / temperature - lse_teacher
        p_teacher = m_teacher.sigmoid()
        cross, entropy = (F.binary_cross_entropy_with_logits(m, p_teacher, reduction="sum") for m in (m_student, m_teacher))
        non_target_kl = z_teacher.sub_(z_student).mul_(q_teacher).sum() + temperature * (lse_student - lse_teacher).sum()
        kl = alpha * temperature * (cross - entropy) + beta * non_target_kl
        of_target = alpha * (m_student.sigmoid() - p_teacher)
        gradient = q_student.mul_(beta - of_target).sub_(q_teacher, alpha=beta).scatter_(1, ids, of_target)
    return temperature / len(student) * _KnownGradient.apply(student, kl, gradient)


def dist(student_logits, teacher_logits, target=None, *, beta=1.0, gamma=1.0, temperature=1.0):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022, eq. 10).

    T^2 * [beta * (1 - mean_B corr(rows)) + gamma * (1 - mean_K corr(columns))], Pearson correlations of softmax(z / T).
    The column term compares classes across the batch *of this process*: it changes with the batch size, and at B = 1 it
    is the constant gamma * T^2. Reference: DIST_KD, vanillaKD losses/dist.py (eps is added to the product of the norms).
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    p_student, p_teacher = (_scaled(z, temperature).softmax(dim=1) for z in (student, teacher))
    with torch.no_grad():
        buffers = p_student.new_empty(2, *p_student.shape)
        centred = p_teacher - p_teacher.mean(1, keepdim=True)
        rows, by_rows = _correlation(p_student, centred, 1, beta / student.shape[0], buffers)
        centred = p_teacher.sub_(p_teacher.mean(0, keepdim=True))
        columns, by_columns = _correlation(p_student, centred, 0, gamma / student.shape[1], buffers)
        gradient = by_rows.add_(by_columns)
    return temperature**2 * (beta + gamma - _KnownGradient.apply(p_student, rows + columns, gradient))


def _correlation(p, b, dim, weight, buffers, eps=1e-8):
    """(sum, gradient by p) of weight * the Pearson correlations r along `dim` of probabilities p and of q, centred: b.

    For a, which is p centred, r = <a, b> / n with n = |a| |b| + eps, so dr/dp = b / n - (r |b| / (n |a|)) a.
    r and the gradient are 0 where p does not vary. In such a row (a student with a zero classifier) the reference's
    gradient is b / eps, 1e7 and inf in float16; what varies within rounding only has no direction to learn from.
    Overwrites b, with the gradient, and `buffers` [2, *p.shape]: on a CPU, fresh memory costs as much as arithmetic in it.
    """
    a, product = buffers
    size, mean = p.shape[dim], p.mean(dim, keepdim=True)
    torch.sub(p, mean, out=a)
    square_a, square_b, dot = (torch.mul(x, y, out=product).sum(dim, keepdim=True) for x, y in ((a, a), (b, b), (a, b)))
    norm_a, norm_b = square_a.sqrt(), square_b.sqrt()
    still = norm_a <= 4 * torch.finfo(p.dtype).eps * size**0.5 * mean  # the norm of what varies <= rounding of its mean's
    n = norm_a * norm_b + eps
    of_b = (weight / n).masked_fill(still, 0.0)
    r = dot * of_b  # with its weight
    of_a = (r * norm_b / (n * norm_a)).masked_fill(still, 0.0)
    return r.sum(), b.mul_(of_b).addcmul_(a, of_a, value=-1)


def bkl(student_logits, teacher_logits, target=None, *, reduction="mean"):
    """Binary KL divergence (paper eq. 3): every class is a binary problem, p_s = sigmoid(z_s), p_t = softmax(z_t).

    reduction="mean"  binary cross-entropy, mean over batch and classes, teacher entropy not subtracted:
                      vanillaKD losses/bkd.py, which made the published Table 4.
    reduction="sum"   equation 3: sum over classes, teacher entropy subtracted (0 where p_s = p_t), mean over the batch.
    The gradients differ by the factor K only.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"bkl: reduction must be 'mean' or 'sum', got {reduction!r}")
    student, teacher = _prepare(student_logits, teacher_logits, 1.0)
    p_teacher = teacher.softmax(dim=1)
    cross = F.binary_cross_entropy_with_logits(student, p_teacher, reduction=reduction)
    if reduction == "mean":
        return cross
    return (cross + _x_log_x(p_teacher).sum() + _x_log_x(1 - p_teacher).sum()) / len(student)


def _x_log_x(x):
    """x log x, 0 at 0 (where a saturated teacher's probabilities are); `torch.xlogy` takes three times as long on a CPU."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log_().mul_(x)


# ---------------------------------------------------------------- distillation losses on features


class CC(nn.Module):
    """Correlation congruence (Peng et al., ICCV 2019) as RepDistiller had it from its authors, not the paper's kernels.

    e = W f + b for the pooled features of either side, d = |e_s - e_t| [B, D]: mean over n < B of <d_n, d_{n+1}>.
    It depends on the order of the batch; and as both embeddings are trained, they can lower it without the student.
    vanillaKD's class multiplies it by 0.02, RepDistiller leaves that to `-b 0.02`: here it is the recipe's weight.
    Parameters: `embed_student`, `embed_teacher`; vanillaKD's `embed_s.linear`, `embed_t.linear`. Raises ValueError at B = 1.
    """

    def __init__(self, student_shapes, teacher_shapes, labels=None, *, dim=128):
        super().__init__()
        self.shapes = _shapes(student_shapes, teacher_shapes, 1)
        self.embed_student, self.embed_teacher = (nn.Linear(math.prod(shape), dim) for (shape,) in self.shapes)

    def forward(self, student_features, teacher_features, target=None, index=None):
        student, teacher = _pooled(student_features, teacher_features, self.shapes, least=2)
        with torch.autocast(student.device.type, enabled=False):
            apart = (self.embed_student(student) - self.embed_teacher(teacher)).abs()
            return (apart[:-1] * apart[1:]).sum(dim=1).mean()


class RKD(nn.Module):
    """Relational knowledge distillation (Park et al., CVPR 2019) on the pooled features [B, D]; nothing to train.

    distance * L(d_ij / mean d) + angle * L(cos_ijk): d_ij = |f_i - f_j|, cos_ijk the angle at i between j and k, L smooth L1
    between student and teacher, mean over all B^2 pairs and B^3 triples. `squared` takes d^2 for d in the first term.
    Blind to moving, scaling and rotating the features, and to the order of the batch. Raises ValueError at B = 1.
    Reference: vanillaKD losses/rkd.py, mdistiller RKD.py; both build [B, B, D] tensors, 4 x 512 MB at B = 256, D = 2048.
    """

    block = 2**20  # cosines held at a time: 4 MB, which a CPU caches; all of B^3 would be 64 MB at B = 256, 4 GB at B = 1024

    def __init__(self, student_shapes, teacher_shapes, labels=None, *, distance=25.0, angle=50.0, squared=False):
        super().__init__()
        self.shapes = _shapes(student_shapes, teacher_shapes, 1)
        self.distance, self.angle, self.squared = distance, angle, squared

    def forward(self, student_features, teacher_features, target=None, index=None):
        student, teacher = _pooled(student_features, teacher_features, self.shapes, least=2)
        with torch.autocast(student.device.type, enabled=False):
            squares = [_square_distances(x) for x in (student, teacher)]
            roots = [_root(x) for x in squares]
            loss = self.distance * F.smooth_l1_loss(*(_relative(x**2 if self.squared else x) for x in roots))
            if self.angle:
                # The law of cosines gives every angle from the distances alone. Sides of no length get no angle, and with it
                # no gradient: the references divide by 1e-12 there, a gradient of 4e10 for two equal student rows.
                halves = [(0.5**0.5 / root).masked_fill(square == 0, 0.0) for root, square in zip(roots, squares, strict=True)]
                step = max(1, self.block // len(student) ** 2)
                for rows in (slice(i, i + step) for i in range(0, len(student), step)):
                    # recomputed in backward: autograd would keep all B^3 cosines until then
                    gap = checkpoint(_angle_gap, rows, *squares, *halves, use_reentrant=False, preserve_rng_state=False)
                    loss = loss + self.angle * gap / len(student) ** 3
            return loss


def _square_distances(x):
    """Rows x [B, D] -> squared distances [B, B] from the Gram matrix; 0 for rows that are equal within rounding."""
    x = x - x.detach().mean(dim=0)  # a common offset has no part in a distance, but would take the digits of the products
    gram = x @ x.T
    total = gram.diagonal()[:, None] + gram.diagonal()
    square = total - 2 * gram
    rounding = 16 * torch.finfo(x.dtype).eps * total.detach()
    return square.masked_fill(square <= rounding, 0.0)


def _root(square):
    """Squared distances -> distances, at least 1e-6 as in the references; no gradient where the rows are equal."""
    return square.clamp_min(1e-12).sqrt()


def _relative(distances):
    """[B, B] distances divided by the mean of those off the diagonal, with a diagonal of 0."""
    distances = distances - distances.diag().diag()
    return distances / (distances.sum() / (len(distances) * (len(distances) - 1)))


def _angle_gap(rows, *sides):
    """Sum of smooth L1 between the cosines of student and teacher at the corners `rows`, [len(rows), B, B] each."""

    def cosines(square, half):
        numerator = square[rows, :, None] + square[rows, None, :] - square
        return numerator * (half[rows, :, None] * half[rows, None, :])

    square_student, square_teacher, half_student, half_teacher = sides
    return F.smooth_l1_loss(cosines(square_student, half_student), cosines(square_teacher, half_teacher), reduction="sum")


class CRD(nn.Module):
    """Contrastive representation distillation (Tian et al., ICLR 2020) on the pooled features.

    v = W f + b at length 1; two banks hold a running v of every training image. Over the image itself (j = 0) and K
    `negatives` of other classes, for the student (and likewise for the teacher, with the banks exchanged),
        x_j = exp(<v_student, bank_teacher[j]> / temperature) / z,    c = K / n_data
        -mean_B [log x_0 / (x_0 + c) + sum_{j>0} log c / (x_j + c)]
    and then bank[i] = unit(momentum * bank[i] + (1 - momentum) * v_i). z is the mean of n_data * exp over the first batch.
    Reference: RepDistiller crd/, vanillaKD losses/crd.py (its images bring their negatives from a table of 5 GB).

    labels [n_data] class ids, in the order of the ids that forward gets as `index` [B]; ValueError without them.
    Parameters: `embed_student`, `embed_teacher`, vanillaKD's `embed_s.linear`, `embed_t.linear`; buffers `bank_student`,
    `bank_teacher` [n_data, dim], vanillaKD's `contrast.memory_v1`, `contrast.memory_v2`, and `z` [2], 0 until it is set,
    its `contrast.params[2:4]`. Memory: `bank_bytes`; for the length of a step also [B, n_data] on a GPU, else [B, 16 (K + 1)].
    """

    gather = staticmethod(lambda tensor: tensor)  # train.py sets it to accelerator.gather: [B, ...] -> that of all processes

    def __init__(
        self, student_shapes, teacher_shapes, labels=None, *, dim=128, negatives=16384, temperature=0.07, momentum=0.5
    ):
        super().__init__()
        self.shapes = _shapes(student_shapes, teacher_shapes, 1)
        if labels is None:
            raise ValueError(
                "crd draws negatives by class from a bank with a row for every training image: it needs the labels of all "
                "images, in the order of their ids. A stream has neither: use data that is read by index (streaming: false)"
            )
        if labels.ndim != 1 or labels.is_floating_point() or labels.numel() == 0 or labels.min() < 0:
            raise ValueError(f"labels must be class ids [n_data] from 0, got {labels.dtype} of shape {tuple(labels.shape)}")
        labels = labels.long()
        counts = labels.bincount()
        if counts.max() == len(labels):
            raise ValueError(f"crd draws negatives from other classes, but all {len(labels)} labels are {labels[0].item()}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.embed_student, self.embed_teacher = (nn.Linear(math.prod(shape), dim) for (shape,) in self.shapes)

        def draw(seed):  # the same banks on every process, whatever it drew before: uniform, of 2^16 values
            generator, bound = torch.Generator().manual_seed(seed), (3 / dim) ** 0.5
            bits = torch.empty(-(-len(labels) * dim // 4), dtype=torch.long).random_(-(2**63), None, generator=generator)
            bank = bits.view(torch.int16)[: len(labels) * dim].view(len(labels), dim).float()
            return bank.add_(0.5).mul_(bound / 2**15)

        with ThreadPoolExecutor() as threads:  # PyTorch draws with one: four numbers of 64 bits at a time, a thread a bank
            self.bank_student, self.bank_teacher = map(nn.Buffer, threads.map(draw, range(2)))
        self.register_buffer("z", torch.zeros(2))
        # ids sorted by class: a class is one block, so a draw from the others is a draw from the rest that jumps over it
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("own_size", counts[labels], persistent=False)
        self.register_buffer("own_start", (counts.cumsum(0) - counts)[labels], persistent=False)

    @staticmethod
    def bank_bytes(n_data, dim=128):
        """Memory of the two banks in bytes: 1.31 GB for the 1,281,167 images of ImageNet, in every process."""
        return 2 * n_data * dim * 4

    def forward(self, student_features, teacher_features, target=None, index=None):
        student, teacher = _pooled(student_features, teacher_features, self.shapes)
        if index is None or index.shape != student.shape[:1]:
            found = None if index is None else tuple(index.shape)
            raise ValueError(f"crd needs index [B], the ids of the images of features {tuple(student.shape)}, got {found}")
        with torch.autocast(student.device.type, enabled=False):
            v_student, v_teacher = _unit(self.embed_student(student)), _unit(self.embed_teacher(teacher))
            return self.contrast(v_student, v_teacher, index, self.sample(index))

    def sample(self, index):
        """index [B] -> ids [B, 1 + negatives]: its own, then a uniform draw with replacement from those of other classes."""
        size, start = self.own_size[index, None], self.own_start[index, None]
        # integers: a float32 draw has 2^24 values, which 1.2 million ids cannot share evenly
        place = torch.randint(2**62, (len(index), self.negatives), device=index.device) % (len(self.by_class) - size)
        return torch.cat([index[:, None], self.by_class[place + size * (place >= start)]], dim=1)

    def contrast(self, v_student, v_teacher, index, sampled):
        """Loss of unit rows v [B, D] against the bank rows of `sampled` [B, 1 + K], the positive first; updates the banks."""
        v, banks = torch.stack([v_student, v_teacher]), (self.bank_teacher, self.bank_student)
        n_data, negatives = len(self.by_class), sampled.shape[1] - 1
        with torch.no_grad():  # autograd would keep the scores, and on a CPU the [B, 1 + K, D] rows, for backward
            scores = torch.stack([_products(x, bank, sampled) for x, bank in zip(v, banks, strict=True)]) / self.temperature
            # the estimate costs little; to ask the device whether it is needed would stall every step
            estimate = scores.exp().mean(dim=(1, 2)) * n_data
            self.z.copy_(torch.where(self.z > 0, self.z, self.gather(estimate[None]).mean(dim=0)))

            noise = negatives / n_data
            logits = scores - (self.z.log() + math.log(noise + 1e-7))[:, None, None]  # of x_j / (x_j + c)
            signed = torch.cat([logits[..., :1], -logits[..., 1:]], dim=-1)
            # the references' 1e-7 is in the denominators alone, which leaves a constant
            value = -F.logsigmoid(signed).sum() / len(index) + 2 * negatives * math.log1p(1e-7 / noise)
            slopes = (-signed).sigmoid()  # of logsigmoid
            slopes[..., :1].neg_()  # by the score: -logsigmoid of it for the image itself, of minus it for the negatives
            slopes /= self.temperature * len(index)
            gradient = torch.stack([_weighted_rows(x, bank, sampled) for x, bank in zip(slopes, banks, strict=True)])
        loss = _KnownGradient.apply(v, value, gradient)
        if self.training:
            self._update(v_student.detach(), v_teacher.detach(), index)
        return loss

    @torch.no_grad()
    def _update(self, v_student, v_teacher, index):
        """Move the rows of the images of all processes, so that every process holds the same banks."""
        index, v_student, v_teacher = self.gather(index), self.gather(v_student), self.gather(v_teacher)
        # An id can come twice (repeated augmentation, a padded last batch), and the order of writing is not defined: the
        # embedding in its last place is written from every place.
        order = index.argsort(stable=True)
        last = order[torch.searchsorted(index[order], index, right=True) - 1]

        for bank, v in ((self.bank_student, v_student), (self.bank_teacher, v_teacher)):
            bank.index_copy_(0, index, _unit(self.momentum * bank[index] + (1 - self.momentum) * v[last]))


def _products(v, bank, ids):
    """v [B, D], ids [B, N] of rows of the bank [n, D] -> <v_i, bank[ids_ij]> [B, N]."""
    if _all_rows(bank, ids):
        return (v @ bank.T).gather(1, ids)
    # [B, N, D] at once would be 2 GB; index_select takes a third of the time of bank[rows]
    return torch.stack([bank.index_select(0, rows) @ x for x, rows in zip(v, ids, strict=True)])


def _weighted_rows(weight, bank, ids):
    """weight, ids [B, N] -> sum_j weight_ij bank[ids_ij] [B, D]."""
    if _all_rows(bank, ids):
        return weight.new_zeros(len(ids), len(bank)).scatter_add_(1, ids, weight) @ bank
    return F.embedding_bag(ids, bank, per_sample_weights=weight, mode="sum")


def _all_rows(bank, ids):
    """Whether to multiply by the whole bank and then choose: n products in place of N copied rows, which cost 16 each.

    On CIFAR (n = 3 N) that is ten times as fast, on ImageNet (n = 78 N) a CPU core takes a third of the time by the rows. A
    GPU has the products for nothing, and would be kept waiting for its launches by a loop over the images.
    """
    return bank.is_cuda or len(bank) <= 16 * ids.shape[1]


def _unit(x, eps=1e-6):
    """Rows of x [B, D] at length 1. A row shorter than eps has no direction: 0 without gradient, nan in the references."""
    norm = x.norm(dim=1, keepdim=True)
    return (x / norm.clamp_min(eps)).masked_fill(norm <= eps, 0.0)


class ReviewKD(nn.Module):
    """Distilling knowledge via knowledge review (Chen et al., CVPR 2021): fusion of the student's levels, deepest first.

    Level i: x = conv1(f_i); with a = sigmoid(attention([x, deeper])) [B, 2, H, W] and the level below resized to x,
    x = a_0 x + a_1 deeper; conv2(x), at the teacher's size, is compared with the teacher's level, and x goes on to the next.
    A comparison is the mean squared error of the maps and of their averages over 4x4, 2x2 and 1x1 places (of those smaller
    than the map; a side shorter than that stays), with weights 1, 1/2, 1/4.. divided by their sum. The levels are summed.

    All features count, the pooled vector as a 1x1 map; student and teacher are matched from the deepest, what one side has
    more is left out. Sizes are those of the features at hand: any resolution, square or not. Batch statistics are those of
    this process: raises ValueError at B = 1. x is as wide as the student's deepest level, at most `mid`.
    Parameters: `levels.I.conv1`, `.conv2`, `.attention`; vanillaKD's `abfs.I.conv1`, `.conv2`, `.att_conv.0`, 0 the deepest.
    """

    def __init__(self, student_shapes, teacher_shapes, labels=None, *, mid=512):
        super().__init__()
        self.shapes = _shapes(student_shapes, teacher_shapes, min(len(student_shapes), len(teacher_shapes)))
        widths = [(s[0], t[0]) for s, t in zip(*self.shapes, strict=True)]
        mid = min(mid, widths[-1][0])
        self.levels = nn.ModuleList(_Level(s, mid, t, deepest=i == 0) for i, (s, t) in enumerate(reversed(widths)))

    def forward(self, student_features, teacher_features, target=None, index=None):
        pairs = _features(student_features, teacher_features, self.shapes, least=2)
        student, teacher = ([x[:, :, None, None] if x.ndim == 2 else x for x in reversed(side)] for side in pairs)
        loss, deeper = 0.0, None
        with torch.autocast(student[0].device.type, enabled=False):
            for level, x, y in zip(self.levels, student, teacher, strict=True):
                x, deeper = level(x, deeper, y.shape[2:])
                loss = loss + _hierarchical_error(x, y)
        return loss


class _Level(nn.Module):
    """One attention-based fusion: [B, width, h, w] and the level below [B, mid, .., ..] -> [B, out, H, W], [B, mid, H, W]."""

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
            error = error + weight * F.mse_loss(F.adaptive_avg_pool2d(x, places), F.adaptive_avg_pool2d(y, places))
            total += weight
    return error / total


# ---------------------------------------------------------------- label losses


def cross_entropy(logits, target, *, smoothing=0.0):
    """Softmax cross-entropy, sum over classes, mean over the batch. logits [B, K]; target [B] ids or [B, K] probabilities.

    `smoothing` mixes the target with the uniform distribution: (1 - s) * target + s / K, as timm and torch do.
    """
    logits = _float(logits)
    _check_target(target, logits)
    target = target.long() if target.ndim == 1 else target.to(logits.dtype)
    no_label = torch.iinfo(torch.long).min  # PyTorch would leave out images labelled -100
    return F.cross_entropy(logits, target, label_smoothing=smoothing, ignore_index=no_label)


def binary_cross_entropy(logits, target, *, smoothing=0.0):
    """Sigmoid cross-entropy, **mean over batch and classes** as timm's BinaryCrossEntropy: 1/K of the summed one.

    With K = 1000 its gradient is a few per cent of `kd`'s, so it hardly counts in A1/A2 (the paper's Table 4 shows it).
    logits [B, K]; target [B] ids or [B, K] probabilities; smoothing as in `cross_entropy`.
    """
    logits = _float(logits)
    return F.binary_cross_entropy_with_logits(logits, _probabilities(target, logits, smoothing))


# ---------------------------------------------------------------- shared pieces


def _float32(x):
    """Half precision overflows at 65504 and resolves probabilities to 3 digits: all arithmetic is float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


def _float(x):
    """Logits [B, K], checked, in float32 or better."""
    if not (x.is_floating_point() and x.ndim == 2 and x.numel()):
        raise ValueError(f"expected floating-point logits of shape [B, K], got {x.dtype} of shape {tuple(x.shape)}")
    return _float32(x)


def _shapes(student_shapes, teacher_shapes, count):
    """The `count` deepest of the per-image shapes of either side, checked."""
    sides = [[tuple(shape) for shape in shapes[-count:]] for shapes in (student_shapes, teacher_shapes)]
    if not all(sides) or any(len(shape) not in (1, 3) or min(shape) < 1 for side in sides for shape in side):
        found = f"{student_shapes} of the student and {teacher_shapes} of the teacher"
        raise ValueError(f"expected per-image shapes (C, H, W) that end in the pooled (C,), got {found}")
    return sides


def _features(student_features, teacher_features, shapes, least=1):
    """The deepest features, as many as there are shapes, in float32, the teacher's detached; checked against the shapes."""
    found = [features[-len(side) :] for features, side in zip((student_features, teacher_features), shapes, strict=True)]
    batch = len(found[0][0]) if found[0] else 0
    for name, features, side in zip(("student", "teacher"), found, shapes, strict=True):
        # height and width are free: an image size other than that of the dry forward is no error
        fits = [x.ndim == len(shape) + 1 and x.shape[:2] == (batch, shape[0]) for x, shape in zip(features, side, strict=False)]
        if len(fits) < len(side) or not all(fits):
            sizes = [tuple(x.shape) for x in features]
            raise ValueError(f"{name} features {sizes} are not a batch of {batch} of the shapes {side} this loss was built for")
    if batch < least:
        raise ValueError(f"this loss compares the images of a batch, it needs {least} or more, got {tuple(found[0][-1].shape)}")
    return [_float32(x) for x in found[0]], [_float32(x.detach()) for x in found[1]]


def _pooled(student_features, teacher_features, shapes, least=1):
    """The last features as [B, D_s] and [B, D_t]; a map counts flattened."""
    (student,), (teacher,) = _features(student_features, teacher_features, shapes, least)
    return student.flatten(1), teacher.flatten(1)


def _prepare(student_logits, teacher_logits, temperature):
    """Check the two logits and the temperature; return the logits in float32, the teacher detached."""
    student, teacher = _float(student_logits), _float(teacher_logits.detach())
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ in shape")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return student, teacher


def _scaled(z, temperature):
    return z if temperature == 1 else z / temperature


def _softmax(z, among, temperature):
    """z, `among` [B, K] -> (z less a constant a row, p = softmax(among / T), log-sum-exp of among / T, less the same [B, 1]).

    The constant is the maximum of `among`: differences of what is left are exact where the logits lie far from 0. For use
    without gradient.
    """
    peak, p = among.amax(dim=1, keepdim=True), _scaled(among, temperature).softmax(dim=1)
    return z - peak, p, -p.amax(dim=1, keepdim=True).log()  # log max p = 0 - lse: no second exponential


class _KnownGradient(torch.autograd.Function):
    """apply(x, value, gradient): the scalar `value`, which has `gradient` (of x's shape) by x.

    Autograd would keep the intermediate tensors of a loss until backward and walk back through each; this keeps one.
    """

    @staticmethod
    def forward(ctx, x, value, gradient):  # with a setup_context, `apply` would inspect signatures for 40 us
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # second derivatives are not known: an error, not a silent zero
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def _check_target(target, logits):
    if target.shape not in (logits.shape, logits.shape[:1]):
        expected = f"[B] ids or [B, K] probabilities for logits {tuple(logits.shape)}"
        raise ValueError(f"target must be {expected}, got {tuple(target.shape)}")
    if target.ndim == 1 and target.is_floating_point():
        raise ValueError(f"class ids must be integers, got {target.dtype}")


def _probabilities(target, logits, smoothing):
    """[B] ids or [B, K] probabilities -> smoothed probabilities [B, K]. Ids outside [0, K) raise, -100 included."""
    _check_target(target, logits)
    if target.ndim == 1:
        target = torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)
    target = target.to(logits.dtype)
    return target if smoothing == 0 else (1 - smoothing) * target + smoothing / logits.shape[1]


# ---------------------------------------------------------------- by name

LOSSES = {"kd": kd, "dkd": dkd, "dist": dist, "bkl": bkl, "cc": CC, "rkd": RKD, "crd": CRD, "reviewkd": ReviewKD}
LABEL_LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def make_loss(name, known=LOSSES, **hyper):
    """`make_loss("kd", temperature=4.0)` -> a callable (student_logits, teacher_logits, target) -> scalar.

    Losses on features: `make_loss("rkd", angle=50.0)` -> (student_shapes, teacher_shapes, labels=None) -> the module.
    Label losses: `make_loss("cross_entropy", LABEL_LOSSES, smoothing=0.1)` -> (logits, target) -> scalar.
    Raises ValueError for an unknown name or hyper-parameter, naming it and the known ones.
    """
    if name not in known:
        raise ValueError(f"unknown loss {name!r}{_nearest(name, known)}; known: {', '.join(known)}")
    parameters = inspect.signature(known[name]).parameters.values()
    accepted = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key, value in hyper.items():
        if key not in accepted:
            raise ValueError(f"loss {name!r} has no argument {key!r}{_nearest(key, accepted)}; known: {', '.join(accepted)}")
        if _kind(value) != _kind(accepted[key]):
            raise ValueError(f"loss {name!r}: {key} must be {_kind(accepted[key])}, got {value!r}")
    return functools.partial(known[name], **hyper)


def _kind(value):
    return "true or false" if isinstance(value, bool) else "text" if isinstance(value, str) else "a number"


def _nearest(word, known):
    match = difflib.get_close_matches(str(word), known, n=1)
    return f", did you mean {match[0]!r}?" if match else ""
