"""losses.py against reference implementations (golden values with gradients), invariants, and the contract."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"
CASES = json.loads((GOLDEN / "losses.json").read_text())["cases"] if GOLDEN.exists() else []
LOGIT_CASES = [c for c in CASES if c["method"] in losses.LOSSES or c["id"].startswith(("label.", "total."))]
LOGIT_CASES = [c for c in LOGIT_CASES if "logits_s" in c["inputs"] and "feat_s" not in c["inputs"]]
needs_golden = pytest.mark.skipif(not CASES, reason=f"reference values not found in {GOLDEN}")


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "losses.npz")


def objective(case):
    """The project's spelling of a golden case: a callable (student, teacher, target) -> scalar."""
    h, method = case["hparams"], case["method"]
    cfg = h.get("cfg", {})
    if method in ("kd", "dkd"):
        keys = ("temperature",) if method == "kd" else ("alpha", "beta", "temperature")
        return losses.make_loss(method, **{k: h[k] for k in keys})
    if method == "dist":
        return losses.make_loss("dist", beta=h["beta"], gamma=h["gamma"], temperature=h["tau"])
    if method == "bkl":
        return losses.bkl
    if method.startswith("label_"):
        # the stored target of *_soft_smooth already holds mixing and smoothing (timm's mixup does both)
        smoothing = 0.0 if "soft" in method else h.get("smoothing", 0.0)
        label = losses.cross_entropy if "_ce_" in method else losses.binary_cross_entropy
        return lambda s, t, y: label(s, y, smoothing=smoothing)
    if method == "total_paper_kd":
        return lambda s, t, y: losses.binary_cross_entropy(s, y) + losses.kd(s, t, temperature=h["temperature"])
    if method == "total_kd":
        w = cfg["LOSS"]
        return lambda s, t, y: (
            w["CE_WEIGHT"] * losses.cross_entropy(s, y) + w["KD_WEIGHT"] * losses.kd(s, t, temperature=cfg["TEMPERATURE"])
        )
    if method == "total_dkd":
        ramp = min(h["epoch"] / cfg["WARMUP"], 1)
        soft = losses.make_loss("dkd", alpha=cfg["ALPHA"], beta=cfg["BETA"], temperature=cfg["T"])
        return lambda s, t, y: cfg["CE_WEIGHT"] * losses.cross_entropy(s, y) + ramp * soft(s, t, y)
    if method == "total_dist":
        soft = losses.make_loss("dist", beta=h["beta"], gamma=h["gamma"], temperature=h["tau"])
        return lambda s, t, y: h["ori_loss_weight"] * losses.cross_entropy(s, y) + h["kd_loss_weight"] * soft(s, t, y)
    raise AssertionError(f"no spelling for golden case {case['id']}")


def evaluate_case(case, arrays, dtype):
    inputs = {k: torch.from_numpy(arrays[v["array"]]) for k, v in case["inputs"].items()}
    student = inputs["logits_s"].to(dtype).requires_grad_()
    teacher = inputs["logits_t"].to(dtype) if "logits_t" in inputs else None
    target = inputs.get("target")
    if target is not None and target.is_floating_point():
        target = target.to(dtype)
    loss = objective(case)(student, teacher, target)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss, gradient, torch.from_numpy(arrays[case["grads"]["logits_s"]["array"]])


@needs_golden
def test_every_logit_case_is_covered():
    assert len(LOGIT_CASES) == 60
    assert {c["method"] for c in CASES} - {c["method"] for c in LOGIT_CASES} == {"rkd", "cc", "crd", "reviewkd", "total_rkd"}


@needs_golden
@pytest.mark.parametrize("case", LOGIT_CASES, ids=[c["id"] for c in LOGIT_CASES])
def test_golden_float64(case, arrays):
    loss, gradient, expected = evaluate_case(case, arrays, torch.float64)
    torch.testing.assert_close(loss.item(), case["outputs"]["loss"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-11)


@needs_golden
@pytest.mark.parametrize("case", LOGIT_CASES, ids=[c["id"] for c in LOGIT_CASES])
def test_golden_float32_stress_included(case, arrays):
    loss, gradient, expected = evaluate_case(case, arrays, torch.float32)
    assert loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(loss.item(), case["outputs"]["loss"], rtol=2e-5, atol=1e-6)
    assert gradient.isfinite().all()
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


@needs_golden
@pytest.mark.parametrize("case", [c for c in LOGIT_CASES if c["method"] == "bkl"], ids=lambda c: c["id"])
def test_bkl_sum_is_equation_3(case, arrays):
    student, teacher = (torch.from_numpy(arrays[case["inputs"][k]["array"]]).double() for k in ("logits_s", "logits_t"))
    p, q = teacher.softmax(1), student.sigmoid()
    if "eq3_sum_classes_mean_batch" in case["outputs"]:  # not stored for the stress cases
        torch.testing.assert_close(
            losses.bkl(student, teacher, reduction="sum").item(),
            case["outputs"]["eq3_sum_classes_mean_batch"],
            rtol=1e-9,
            atol=0,
        )
        literal = (-p * (q / p).log() - (1 - p) * ((1 - q) / (1 - p)).log()).sum(1).mean()
        torch.testing.assert_close(losses.bkl(student, teacher, reduction="sum"), literal)
    gradients = []
    for reduction in ("mean", "sum"):
        x = student.clone().requires_grad_()
        gradients.append(torch.autograd.grad(losses.bkl(x, teacher, reduction=reduction), x)[0])
    torch.testing.assert_close(gradients[1], student.shape[1] * gradients[0])


# ---------------------------------------------------------------- invariants

ALL = {
    "kd": lambda s, t, y: losses.kd(s, t, y, temperature=4.0),
    "dkd": lambda s, t, y: losses.dkd(s, t, y, alpha=1.0, beta=8.0, temperature=4.0),
    "dkd_T1": lambda s, t, y: losses.dkd(s, t, y),
    "dist": lambda s, t, y: losses.dist(s, t, y, temperature=4.0),
    "bkl": losses.bkl,
    "bkl_sum": lambda s, t, y: losses.bkl(s, t, y, reduction="sum"),
    "ce": lambda s, t, y: losses.cross_entropy(s, y, smoothing=0.1),
    "bce": lambda s, t, y: losses.binary_cross_entropy(s, y, smoothing=0.1),
}
each = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)


def batch(b=6, k=11, seed=0, dtype=torch.float64, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return (
        *(scale * torch.randn(b, k, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)),
        torch.randint(k, (b,), generator=g),
    )


def test_kd_of_equal_logits_is_zero_and_otherwise_positive():
    student, teacher, _ = batch()
    assert losses.kd(student, student).abs() < 1e-15
    assert losses.kd(student, teacher) > 0.1


def test_kd_gradient_in_closed_form():
    student, teacher, _ = batch()
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.kd(student, teacher, temperature=4.0), student)
    torch.testing.assert_close(gradient, 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / len(student))


def test_dkd_with_beta_one_minus_target_probability_is_kd():
    student, teacher, target = batch(b=1)
    beta = 1 - (teacher / 4.0).softmax(1)[0, target[0]].item()
    torch.testing.assert_close(
        losses.dkd(student, teacher, target, alpha=1.0, beta=beta, temperature=4.0),
        losses.kd(student, teacher, temperature=4.0),
    )


def test_dkd_two_classes_has_no_non_target_term():
    student, teacher, target = batch(k=2)
    torch.testing.assert_close(losses.dkd(student, teacher, target, beta=123.0), losses.kd(student, teacher))


def test_dkd_mask_holds_at_margins_over_1000():
    student, teacher, _ = batch(b=2)
    student[:, 3], target = 5000.0, torch.tensor([3, 3])
    others = [i for i in range(11) if i != 3]
    expected = losses.kd(student[:, others], teacher[:, others])
    torch.testing.assert_close(losses.dkd(student, teacher, target, alpha=0.0, beta=1.0), expected)


def test_dist_is_symmetric_and_blind_to_batch_order():
    student, teacher, _ = batch()
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(losses.dist(student, teacher), losses.dist(teacher, student))
    torch.testing.assert_close(losses.dist(student, teacher), losses.dist(student[order], teacher[order]))
    assert 0 <= losses.dist(student, student) < 1e-6  # the eps in the denominator keeps it from 0


def test_dist_of_one_sample_has_a_constant_column_term():
    student, teacher, _ = batch(b=1)
    torch.testing.assert_close(losses.dist(student, teacher, beta=0.0, gamma=3.0).item(), 3.0)


@pytest.mark.parametrize("name", ["kd", "dkd", "dkd_T1", "dist", "ce"])
def test_a_constant_per_row_changes_nothing(name):
    student, teacher, target = batch()
    shift = torch.linspace(-50, 50, len(student), dtype=student.dtype)[:, None]
    torch.testing.assert_close(ALL[name](student + shift, teacher - shift, target), ALL[name](student, teacher, target))


@each
def test_ids_and_one_hot_agree(loss):
    student, teacher, target = batch()
    torch.testing.assert_close(loss(student, teacher, target), loss(student, teacher, F.one_hot(target, 11).double()))


@each
def test_no_gradient_to_the_teacher(loss):
    student, teacher, target = batch()
    student.requires_grad_(), teacher.requires_grad_()
    loss(student, teacher, target).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@each
def test_gradient_by_finite_differences(loss):
    student, teacher, target = batch(b=3, k=5)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, target), student.requires_grad_())


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher, target = batch(dtype=dtype)
    student.requires_grad_()
    value = loss(student, teacher, target)
    value.backward()
    assert value.dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(value, loss(student.detach().float(), teacher.float(), target), rtol=0, atol=0)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_at_logits_of_200(loss, dtype):
    rows = [[200.0, -200.0, -200.0, 0.0], [-200.0, 200.0, 200.0, -200.0], [200.0] * 4, [-200.0, -200.0, -200.0, 200.0]]
    student = torch.tensor(rows, dtype=dtype, requires_grad=True)
    teacher = torch.tensor(rows, dtype=dtype).flip(0)
    value = loss(student, teacher, torch.tensor([1, 0, 3, 0]))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_timm_label_losses_agree():
    timm_loss = pytest.importorskip("timm.loss")
    logits, _, target = batch(dtype=torch.float32)
    torch.testing.assert_close(
        losses.cross_entropy(logits, target, smoothing=0.1), timm_loss.LabelSmoothingCrossEntropy(0.1)(logits, target)
    )
    torch.testing.assert_close(
        losses.binary_cross_entropy(logits, target, smoothing=0.1), timm_loss.BinaryCrossEntropy(0.1)(logits, target)
    )


# ---------------------------------------------------------------- errors and the contract


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: losses.kd(torch.zeros(4, 10), torch.zeros(4, 1)),
            r"student logits \(4, 10\) and teacher logits \(4, 1\) differ",
        ),
        (lambda: losses.kd(torch.zeros(0, 10), torch.zeros(0, 10)), r"got torch.float32 of shape \(0, 10\)"),
        (
            lambda: losses.kd(torch.zeros(4, 10).long(), torch.zeros(4, 10)),
            r"expected floating-point logits of shape \[B, K\], got torch.int64",
        ),
        (lambda: losses.kd(torch.zeros(4, 10), torch.zeros(4, 10), temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: losses.cross_entropy(torch.zeros(4, 10), torch.zeros(3).long()), r"logits \(4, 10\), got \(3,\)"),
        (lambda: losses.cross_entropy(torch.zeros(4, 10), torch.zeros(4)), "class ids must be integers, got torch.float32"),
        (lambda: losses.dkd(torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4).long()), "dkd needs at least 2 classes"),
        (
            lambda: losses.bkl(torch.zeros(4, 2), torch.zeros(4, 2), reduction="batchmean"),
            "must be 'mean' or 'sum', got 'batchmean'",
        ),
        (lambda: losses.make_loss("kdd"), "unknown loss 'kdd', did you mean 'kd'"),
        (lambda: losses.make_loss("kd", temprature=4), "loss 'kd' has no argument 'temprature', did you mean 'temperature'"),
        (lambda: losses.make_loss("kd", temperature="4"), "temperature must be a number, got '4'"),
        (lambda: losses.make_loss("kd", temperature=True), "temperature must be a number, got True"),
        (lambda: losses.make_loss("kd", losses.LABEL_LOSSES), "unknown loss 'kd'; known: cross_entropy"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [-100, -1, 10])
def test_labels_out_of_range_are_not_ignored(bad):
    with pytest.raises((RuntimeError, IndexError)):
        losses.cross_entropy(torch.zeros(2, 10), torch.tensor([bad, 1]))


def test_file_stands_alone(tmp_path):
    """Copied elsewhere, in a fresh interpreter, it imports torch and the standard library and works."""
    tree = ast.parse((ROOT / "losses.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} - {"torch"} <= sys.stdlib_module_names
    (tmp_path / "losses.py").write_text((ROOT / "losses.py").read_text())
    code = "import losses, torch, sys; z = torch.zeros(2, 3); print(losses.kd(z, z).item(), 'timm' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["0.0", "False"]
