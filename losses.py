"""Every loss of the project, and nothing else: torch and the standard library, safe to copy into another project.

Distillation losses on logits share one contract, `f(student_logits, teacher_logits, target, *, hyper=default)`:

    student_logits, teacher_logits   [B, K], any floating dtype; the teacher is detached here
    target                           [B] class ids or [B, K] probabilities (mixup, cutmix); unused where it may be None
    returns                          a scalar; float32 arithmetic whatever the input (float64 stays float64),
                                     gradients in the dtype of `student_logits`

Label losses are `f(logits, target, *, smoothing=0.0)`. Bad shapes raise ValueError naming the shapes.

Reductions differ between the repositories these numbers are compared with; changing one silently changes a recipe:

    loss                   classes   batch   factor   as in
    kd, dkd                sum       mean    T^2      vanillaKD, mdistiller, RepDistiller, timm
    dist                   -         mean    T^2      DIST_KD, vanillaKD (rows: mean over B; columns: mean over K)
    bkl(reduction="mean")  mean      mean    1        vanillaKD losses/bkd.py: made the paper's Table 4
    bkl(reduction="sum")   sum       mean    1        the paper's equation (3)
    cross_entropy          sum       mean    1        everyone
    binary_cross_entropy   mean      mean    1        timm BinaryCrossEntropy, as vanillaKD uses it

Paper: Hao et al., "Revisit the Power of Vanilla Knowledge Distillation", NeurIPS 2023. Reference code: Hao840/vanillaKD.
"""

import difflib
import functools
import inspect

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- distillation losses on logits


def kd(student_logits, teacher_logits, target=None, *, temperature=1.0):
    """Vanilla knowledge distillation (Hinton et al. 2015; paper eq. 1, second term).

    T^2 * mean_B sum_K p_t (log p_t - log p_s), with p = softmax(z / T).
    Reference: vanillaKD losses/kd.py, `kl_div(reduction="batchmean")` times T^2.
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    log_p_student, log_p_teacher = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    return temperature**2 * F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)


def dkd(student_logits, teacher_logits, target, *, alpha=1.0, beta=2.0, temperature=1.0):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, eq. 7).

    T^2 * mean_B [alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)], where b = [p_y, 1 - p_y] and q is the softmax over the
    classes other than the target y. Soft targets `[B, K]` are reduced to their argmax, as vanillaKD does.
    alpha=1, beta=1-p_t(y) per sample gives `kd`. Reference: mdistiller DKD.py, vanillaKD losses/dkd.py.
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    _check_target(target, student)
    if student.shape[1] < 2:
        raise ValueError(f"dkd needs at least 2 classes, got logits of shape {tuple(student.shape)}")
    ids = target if target.ndim == 1 else target.argmax(dim=1)
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, ids[:, None], True)  # [B, K]

    # The references take log(softmax(...)[others].sum()): inf as soon as the sum underflows, which a logit margin of 104
    # does in float32. Log-probabilities that never leave log space are finite at any margin.
    (log_b_student, log_q_student), (log_b_teacher, log_q_teacher) = (_decouple(z, ids, is_target) for z in (student, teacher))
    target_kl = F.kl_div(log_b_student, log_b_teacher, reduction="batchmean", log_target=True)
    # q_t is zero at the target, but 0 * (-inf - -inf) is nan: the entries leave before the product.
    q_teacher = log_q_teacher.exp()
    non_target_kl = (q_teacher * (log_q_teacher - log_q_student).masked_fill(is_target, 0.0)).sum(dim=1).mean()
    return temperature**2 * (alpha * target_kl + beta * non_target_kl)


def _decouple(z, ids, is_target):
    """z [B, K] -> log of [p(target), p(any other)] [B, 2], and the log-softmax over the others [B, K] (-inf at the target)."""
    others = z.masked_fill(is_target, -torch.inf)  # a true mask: the references' `1000 * mask` fails at margins over 1000
    log_sum_others = others.logsumexp(dim=1, keepdim=True)  # [B, 1]
    return F.log_softmax(torch.cat([z.gather(1, ids[:, None]), log_sum_others], dim=1), dim=1), others - log_sum_others


def dist(student_logits, teacher_logits, target=None, *, beta=1.0, gamma=1.0, temperature=1.0):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022, eq. 10).

    T^2 * [beta * (1 - mean_B corr(rows)) + gamma * (1 - mean_K corr(columns))], Pearson correlations of softmax(z / T).
    The column term compares classes across the batch *of this process*: it changes with the batch size, and at B = 1 it
    is the constant gamma * T^2. Reference: DIST_KD, vanillaKD losses/dist.py (eps is added to the product of the norms).
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    p_student, p_teacher = student.softmax(dim=1), teacher.softmax(dim=1)
    inter = 1 - _correlation(p_student, p_teacher, dim=1).mean()
    intra = 1 - _correlation(p_student, p_teacher, dim=0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _correlation(a, b, dim, eps=1e-8):
    """Pearson correlation along `dim`, eps added to the product of the norms; 0 where `a` does not vary.

    In such a row (a student with a zero classifier) the reference's gradient is b / eps, 1e7 and inf in float16; what
    varies within rounding only has no direction to learn from, and gets no gradient here.
    """
    rounding = 4 * torch.finfo(a.dtype).eps * a.norm(dim=dim)
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norm = a.norm(dim=dim)
    return ((a * b).sum(dim) / (norm * b.norm(dim=dim) + eps)).masked_fill(norm <= rounding, 0.0)


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
    cross = F.binary_cross_entropy_with_logits(student, p_teacher, reduction="none")
    if reduction == "mean":
        return cross.mean()
    # xlogy(0, 0) = 0, where log(1 - p) alone would be -inf for a saturated teacher
    entropy = -torch.xlogy(p_teacher, p_teacher) - torch.xlogy(1 - p_teacher, 1 - p_teacher)
    return (cross - entropy).sum(dim=1).mean()


# ---------------------------------------------------------------- label losses


def cross_entropy(logits, target, *, smoothing=0.0):
    """Softmax cross-entropy, sum over classes, mean over the batch. logits [B, K]; target [B] ids or [B, K] probabilities.

    `smoothing` mixes the target with the uniform distribution: (1 - s) * target + s / K, as timm and torch do.
    """
    logits = _float(logits)
    target = _probabilities(target, logits, smoothing)
    return -(target * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def binary_cross_entropy(logits, target, *, smoothing=0.0):
    """Sigmoid cross-entropy, **mean over batch and classes** as timm's BinaryCrossEntropy: 1/K of the summed one.

    With K = 1000 its gradient is a few per cent of `kd`'s, so it hardly counts in A1/A2 (the paper's Table 4 shows it).
    logits [B, K]; target [B] ids or [B, K] probabilities; smoothing as in `cross_entropy`.
    """
    logits = _float(logits)
    return F.binary_cross_entropy_with_logits(logits, _probabilities(target, logits, smoothing))


# ---------------------------------------------------------------- shared pieces


def _float(x):
    """Half precision overflows at 65504 and resolves probabilities to 3 digits: all arithmetic is float32 or better."""
    if not (x.is_floating_point() and x.ndim == 2 and x.numel()):
        raise ValueError(f"expected floating-point logits of shape [B, K], got {x.dtype} of shape {tuple(x.shape)}")
    return x if x.dtype == torch.float64 else x.float()


def _prepare(student_logits, teacher_logits, temperature):
    """Check the two logits and return them in float32, divided by the temperature, the teacher detached."""
    student, teacher = _float(student_logits), _float(teacher_logits.detach())
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ in shape")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return student / temperature, teacher / temperature


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

LOSSES = {"kd": kd, "dkd": dkd, "dist": dist, "bkl": bkl}
LABEL_LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def make_loss(name, known=LOSSES, **hyper):
    """`make_loss("kd", temperature=4.0)` -> a callable (student_logits, teacher_logits, target) -> scalar.

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
        if isinstance(value, bool) or isinstance(value, str) != isinstance(accepted[key], str):
            kind = "text" if isinstance(accepted[key], str) else "a number"
            raise ValueError(f"loss {name!r}: {key} must be {kind}, got {value!r}")
    return functools.partial(known[name], **hyper)


def _nearest(word, known):
    match = difflib.get_close_matches(str(word), known, n=1)
    return f", did you mean {match[0]!r}?" if match else ""
