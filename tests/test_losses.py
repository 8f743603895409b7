"""losses.py against reference implementations (golden values with gradients), invariants, and the contract.

Losses on logits come first, then losses on features: invariances, memory, CRD's banks and its sampler.
"""

import ast
import copy
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"
CASES = json.loads((GOLDEN / "losses.json").read_text())["cases"] if GOLDEN.exists() else []
LOGIT_CASES = [c for c in CASES if c["method"] in losses.LOSSES or c["id"].startswith(("label.", "total."))]
LOGIT_CASES = [c for c in LOGIT_CASES if "logits_s" in c["inputs"] and "feat_s" not in c["inputs"]]
FEATURE_METHODS = ("cc", "rkd", "crd", "reviewkd", "total_rkd")
FEATURE_CASES = {c["id"]: c for c in CASES if c["method"] in FEATURE_METHODS}
needs_golden = pytest.mark.skipif(not CASES, reason=f"reference values not found in {GOLDEN}")


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "losses.npz")


# ---------------------------------------------------------------- losses on logits: golden values


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
        return lambda s, t, y: (
            losses.binary_cross_entropy(s, y) + losses.kd(s, t, temperature=h["temperature"])
        )
    if method == "total_kd":
        w = cfg["LOSS"]
        return lambda s, t, y: (
            w["CE_WEIGHT"] * losses.cross_entropy(s, y)
            + w["KD_WEIGHT"] * losses.kd(s, t, temperature=cfg["TEMPERATURE"])
        )
    if method == "total_dkd":
        ramp = min(h["epoch"] / cfg["WARMUP"], 1)
        soft = losses.make_loss("dkd", alpha=cfg["ALPHA"], beta=cfg["BETA"], temperature=cfg["T"])
        return lambda s, t, y: cfg["CE_WEIGHT"] * losses.cross_entropy(s, y) + ramp * soft(s, t, y)
    if method == "total_dist":
        soft = losses.make_loss("dist", beta=h["beta"], gamma=h["gamma"], temperature=h["tau"])
        return lambda s, t, y: (
            h["ori_loss_weight"] * losses.cross_entropy(s, y) + h["kd_loss_weight"] * soft(s, t, y)
        )
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
def test_every_golden_case_is_covered():
    assert len(LOGIT_CASES) == 60
    counts = {
        method: sum(c["method"] == method for c in FEATURE_CASES.values()) for method in FEATURE_METHODS
    }
    assert counts == {"cc": 2, "rkd": 7, "crd": 4, "reviewkd": 3, "total_rkd": 1}
    assert {c["method"] for c in CASES} - {c["method"] for c in LOGIT_CASES} == set(FEATURE_METHODS)


@needs_golden
@pytest.mark.parametrize("case", LOGIT_CASES, ids=[c["id"] for c in LOGIT_CASES])
def test_golden_logits_float64(case, arrays):
    check_float64(case, arrays)


def check_float64(case, arrays):
    loss, gradient, expected = evaluate_case(case, arrays, torch.float64)
    torch.testing.assert_close(loss.item(), case["outputs"]["loss"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-11)


@needs_golden
@pytest.mark.parametrize("case", LOGIT_CASES, ids=[c["id"] for c in LOGIT_CASES])
def test_golden_logits_float32_stress_included(case, arrays):
    loss, gradient, expected = evaluate_case(case, arrays, torch.float32)
    assert loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(loss.item(), case["outputs"]["loss"], rtol=2e-5, atol=1e-6)
    assert gradient.isfinite().all()
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


@needs_golden
@pytest.mark.parametrize("case", [c for c in LOGIT_CASES if c["method"] == "bkl"], ids=lambda c: c["id"])
def test_bkl_sum_is_equation_3(case, arrays):
    student, teacher = (
        torch.from_numpy(arrays[case["inputs"][k]["array"]]).double() for k in ("logits_s", "logits_t")
    )
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


COPIED = {  # the golden cases of each function, by the start of their id
    "kd": "kd.",
    "dkd": "dkd.",
    "dist": "dist.",
    "bkl": "bkl.",
    "cross_entropy": "label.ce_",
    "binary_cross_entropy": "label.bce_",
}


@needs_golden
@pytest.mark.parametrize("name", COPIED)
def test_a_function_and_one_helper_can_be_copied(name, arrays, monkeypatch):
    """The source of the loss and of the one function it calls is enough, in a namespace of torch and F."""
    tree = ast.parse((ROOT / "losses.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    used = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
    copied = [functions[name], *(functions[other] for other in used & functions.keys())]
    assert len(copied) <= 2
    namespace = {"torch": torch, "F": F}
    exec("\n".join(ast.unparse(node) for node in copied), namespace)

    known = losses.LABEL_LOSSES if name in losses.LABEL_LOSSES else losses.LOSSES
    monkeypatch.setitem(known, name, namespace[name])
    monkeypatch.setattr(losses, name, namespace[name])
    cases = [case for case in LOGIT_CASES if case["id"].startswith(COPIED[name])]
    assert cases
    for case in cases:
        check_float64(case, arrays)


# ---------------------------------------------------------------- losses on logits: invariants

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
each_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)


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
    torch.testing.assert_close(
        gradient, 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / len(student)
    )


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


def test_dist_is_symmetric_and_independent_of_batch_order():
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
    torch.testing.assert_close(
        ALL[name](student + shift, teacher - shift, target), ALL[name](student, teacher, target)
    )


@each_loss
def test_ids_and_one_hot_agree(loss):
    student, teacher, target = batch()
    torch.testing.assert_close(
        loss(student, teacher, target), loss(student, teacher, F.one_hot(target, 11).double())
    )


@each_loss
def test_no_gradient_to_the_teacher(loss):
    student, teacher, target = batch()
    student.requires_grad_(), teacher.requires_grad_()
    loss(student, teacher, target).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@each_loss
def test_logits_gradient_by_finite_differences(loss):
    student, teacher, target = batch(b=3, k=5)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, target), student.requires_grad_())


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher, target = batch(dtype=dtype)
    student.requires_grad_()
    value = loss(student, teacher, target)
    value.backward()
    assert value.dtype == torch.float32 and student.grad.dtype == dtype
    torch.testing.assert_close(value, loss(student.detach().float(), teacher.float(), target), rtol=0, atol=0)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_at_logits_of_200(loss, dtype):
    rows = [
        [200.0, -200.0, -200.0, 0.0],
        [-200.0, 200.0, 200.0, -200.0],
        [200.0] * 4,
        [-200.0, -200.0, -200.0, 200.0],
    ]
    student = torch.tensor(rows, dtype=dtype, requires_grad=True)
    teacher = torch.tensor(rows, dtype=dtype).flip(0)
    value = loss(student, teacher, torch.tensor([1, 0, 3, 0]))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_timm_label_losses_agree():
    timm_loss = pytest.importorskip("timm.loss")
    logits, _, target = batch(dtype=torch.float32)
    torch.testing.assert_close(
        losses.cross_entropy(logits, target, smoothing=0.1),
        timm_loss.LabelSmoothingCrossEntropy(0.1)(logits, target),
    )
    torch.testing.assert_close(
        losses.binary_cross_entropy(logits, target, smoothing=0.1),
        timm_loss.BinaryCrossEntropy(0.1)(logits, target),
    )


@each_loss
def test_autocast_changes_nothing(loss):
    student, teacher, target = batch(dtype=torch.float32)
    student.requires_grad_()
    expected = loss(student, teacher, target)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, target)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(x, student)[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.slow  # the import of the compiler takes 15 seconds
@each_loss
@pytest.mark.parametrize("k", [2, 11])
def test_compiled_losses_are_the_same(loss, k):
    student, teacher, target = batch(k=k, dtype=torch.float32)
    student.requires_grad_()
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value = function(student, teacher, target)
        results.append((value, torch.autograd.grad(value, student)[0]))
    assert results[0][1].isfinite().all()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 3, 11])
def test_dkd_has_no_nan_at_the_masked_target(k, dtype):
    """Nor on the way there: anomaly detection raises if any function returns nan in the backward pass."""
    student, teacher, target = batch(k=k, dtype=dtype)
    student[0, target[0]], teacher[1, target[1]] = 2000.0, 2000.0  # sure of the target
    student[2, target[2]], teacher[3, target[3]] = -2000.0, -2000.0  # sure of another
    student.requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        for mixed in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                value = losses.dkd(student, teacher, target, temperature=0.5)
            (gradient,) = torch.autograd.grad(value, student)
            assert value.isfinite() and gradient.isfinite().all()
            # the target term alone reaches the target
            alone = losses.dkd(student, teacher, target, beta=0.0, temperature=0.5)
            of_target = torch.autograd.grad(alone, student)[0].gather(1, target[:, None])
            torch.testing.assert_close(gradient.gather(1, target[:, None]), of_target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_one_hot_teacher_gives_the_label_losses(dtype):
    student, _, target = batch(dtype=dtype)
    teacher = torch.zeros_like(student).scatter_(1, target[:, None], 5000.0)
    torch.testing.assert_close(losses.kd(student, teacher), losses.cross_entropy(student, target))
    torch.testing.assert_close(
        losses.dkd(student, teacher, target, beta=0.0), losses.cross_entropy(student, target)
    )
    torch.testing.assert_close(losses.bkl(student, teacher), losses.binary_cross_entropy(student, target))
    torch.testing.assert_close(
        losses.bkl(student, teacher, reduction="sum"), 11 * losses.binary_cross_entropy(student, target)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constant", [0.0, 3.7, -30.0])
def test_dist_of_constant_rows_has_no_gradient(constant, dtype):
    student, teacher, _ = batch(dtype=dtype)
    whole = torch.full_like(student, constant).requires_grad_()
    value = losses.dist(whole, teacher, beta=2.0, gamma=3.0, temperature=4.0)
    (gradient,) = torch.autograd.grad(value, whole)
    torch.testing.assert_close(value.item(), 80.0)
    assert not gradient.any()

    usual = torch.autograd.grad(losses.dist(student.requires_grad_(), teacher, gamma=0.0), student)[0]
    some = student.detach().clone()
    some[2] = constant
    (gradient,) = torch.autograd.grad(losses.dist(some.requires_grad_(), teacher, gamma=0.0), some)
    rest = [0, 1, 3, 4, 5]
    assert not gradient[2].any()
    torch.testing.assert_close(gradient[rest], usual[rest])


# ---------------------------------------------------------------- losses on logits: errors and the contract


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: losses.kd(torch.zeros(4, 10), torch.zeros(4, 1)),
            r"of one shape \[B, K\], got torch.float32 \(4, 10\) and torch.float32 \(4, 1\)",
        ),
        (lambda: losses.kd(torch.zeros(0, 10), torch.zeros(0, 10)), r"got torch.float32 \(0, 10\)"),
        (
            lambda: losses.kd(torch.zeros(4, 10).long(), torch.zeros(4, 10)),
            r"expected floating-point logits of one shape \[B, K\], got torch.int64 ",
        ),
        (
            lambda: losses.kd(torch.zeros(4, 10), torch.zeros(4, 10), temperature=0.0),
            "temperature must be positive, got 0.0",
        ),
        (
            lambda: losses.cross_entropy(torch.zeros(4, 10), torch.zeros(3).long()),
            r"logits \(4, 10\), got torch.int64 \(3,\)",
        ),
        (
            lambda: losses.cross_entropy(torch.zeros(4, 10), torch.zeros(4)),
            r"be \[B\] integer ids .*, got torch.float32 \(4,\)",
        ),
        (
            lambda: losses.binary_cross_entropy(torch.zeros(4, 10), torch.zeros(4, 9)),
            r"be \[B\] integer ids or \[B, K\] .* for logits \(4, 10\), got torch.float32 \(4, 9\)",
        ),
        (
            lambda: losses.dkd(torch.zeros(4, 10), torch.zeros(4, 10), torch.zeros(3).long()),
            r"be \[B\] integer ids or \[B, K\] .* for logits \(4, 10\), got torch.int64 \(3,\)",
        ),
        (
            lambda: losses.dkd(torch.zeros(4, 10), torch.zeros(4, 10), torch.zeros(4)),
            r"be \[B\] integer ids .*, got torch.float32 \(4,\)",
        ),
        (
            lambda: losses.dist(torch.zeros(4, 10), torch.zeros(10)),
            r"expected floating-point logits of one shape \[B, K\], got .* and torch.float32 \(10,\)",
        ),
        (
            lambda: losses.dkd(torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4).long()),
            "dkd needs at least 2 classes",
        ),
        (
            lambda: losses.bkl(torch.zeros(4, 2), torch.zeros(4, 2), reduction="batchmean"),
            "must be 'mean' or 'sum', got 'batchmean'",
        ),
        (lambda: losses.make_loss("kdd"), "unknown loss 'kdd'; known: kd, dkd, "),
        (
            lambda: losses.make_loss("kd", temprature=4),
            "loss 'kd' has no argument 'temprature'; known: temperature",
        ),
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
    for loss in losses.LABEL_LOSSES.values():
        with pytest.raises((RuntimeError, IndexError)):
            loss(torch.zeros(2, 10), torch.tensor([bad, 1]))


def test_file_stands_alone(tmp_path):
    """Copied elsewhere it imports torch and the standard library and works."""
    tree = ast.parse((ROOT / "losses.py").read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} - {"torch"} <= sys.stdlib_module_names
    copied = shutil.copy(ROOT / "losses.py", tmp_path / "copied.py")
    assert runpy.run_path(str(copied))["kd"](torch.zeros(2, 3), torch.zeros(2, 3)) == 0


# ---------------------------------------------------------------- losses on features: golden values

NAMES = {  # vanillaKD's parameter names, and mdistiller's for reviewkd -> ours
    "embed_s.linear": "embed_student",
    "embed_t.linear": "embed_teacher",
    "contrast.memory_v1": "bank_student",
    "contrast.memory_v2": "bank_teacher",
    "abfs.": "levels.",
    "att_conv.0": "attention",
}


def our_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def stored(entries, arrays):
    return {our_name(k): torch.from_numpy(arrays[v["array"]]) for k, v in entries.items()}


def sides(case, arrays, dtype):
    """The features of a golden case: two lists from shallow to deep, the student's with gradients."""
    inputs = stored(case["inputs"], arrays)
    student = [inputs[k].to(dtype).requires_grad_() for k in sorted(inputs) if k.startswith("feat_s")]
    return student, [inputs[k].to(dtype) for k in sorted(inputs) if k.startswith("feat_t")]


def hyper(case):
    h = case["hparams"]
    match case["method"]:
        case "cc":
            return {"dim": h["feat_dim"]}
        case "rkd":
            return {"distance": h["distance_weight"], "angle": h["angle_weight"], "squared": h["squared"]}
        case "total_rkd":
            return {"distance": h["cfg"]["DISTANCE_WEIGHT"], "angle": h["cfg"]["ANGLE_WEIGHT"]}
        case "crd":
            keys = {"dim": "feat_dim", "negatives": "nce_k", "temperature": "nce_t", "momentum": "nce_m"}
            return {ours: h[theirs] for ours, theirs in keys.items()}
        case "reviewkd":
            return {"mid": h["max_mid_channel"]}


def shapes(features):
    return [tuple(f.shape[1:]) for f in features]


def build(case, arrays, dtype):
    """The module of a golden case with its weights, banks and Z; every stored tensor must find its place."""
    student, teacher = sides(case, arrays, dtype)
    first = FEATURE_CASES[case["hparams"].get("previous_step") or case["id"]]
    labels = stored(first["inputs"], arrays).get("labels_all")
    name = case["method"].removeprefix("total_")
    module = losses.make_loss(name, **hyper(case))(shapes(student), shapes(teacher), labels).to(dtype)
    state = stored(first.get("state_before", {}), arrays)
    if first is not case:
        state |= stored(first["state_after"], arrays)
        state["z"] = torch.tensor([case["outputs"][f"Z_v{i}_before"] for i in (1, 2)], dtype=torch.float64)
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(k == "z" or k.endswith("num_batches_tracked") for k in missing)
    return module, student, teacher


def close(found, expected, share):
    assert (found - expected).abs().max() <= share * expected.abs().max().clamp_min(1e-300)


@needs_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", FEATURE_CASES.values(), ids=FEATURE_CASES)
def test_golden_features(case, arrays, dtype):
    module, student, teacher = build(case, arrays, dtype)
    inputs, h = stored(case["inputs"], arrays), case["hparams"]
    if case["method"] == "crd":
        module.sample = lambda index: inputs["contrast_idx"]
    loss = module(student, teacher, inputs.get("target"), inputs.get("index"))
    assert loss.shape == () and loss.dtype == dtype
    named = dict(module.named_parameters())
    if case["method"] == "total_rkd":
        named["logits_s"] = inputs["logits_s"].to(dtype).requires_grad_()
        loss = losses.cross_entropy(named["logits_s"], inputs["target"]) + loss
    # vanillaKD's class has this weight inside; ReviewKD's ramp is the recipe's
    loss = loss * h.get("scale", 1.0) * h.get("weight_from_warmup", 1.0)
    loss.backward()

    fine = dtype == torch.float64
    torch.testing.assert_close(
        loss.item(), case["outputs"]["loss"], rtol=1e-9 if fine else 2e-5, atol=1e-12 if fine else 1e-6
    )
    named |= {f"feat_s{i}": x for i, x in enumerate(student)} | {"feat_s": student[-1]}
    expected = stored(case["grads"], arrays)
    assert expected.keys() >= dict(module.named_parameters()).keys()
    for name, gradient in expected.items():
        close(named[name].grad, gradient, 1e-7 if fine else 2e-5)
    after = dict(module.named_buffers())
    for name, value in stored(case.get("state_after", {}), arrays).items():
        close(after[name], value, 1e-9 if fine else 2e-5)
    if case["method"] == "crd":
        close(
            module.z,
            torch.tensor([case["outputs"][f"Z_v{i}_after"] for i in (1, 2)], dtype=torch.float64),
            1e-9 if fine else 2e-5,
        )


# ---------------------------------------------------------------- losses on features: all of them

STUDENT = [(6, 8, 8), (8, 4, 4), (10, 2, 2), (10,)]
TEACHER = [(5, 8, 8), (7, 4, 4), (9, 2, 2), (12,)]
LABELS = torch.arange(40) % 4
INDEX = torch.arange(8) * 5
HYPER = {"cc": {"dim": 6}, "rkd": {}, "crd": {"dim": 6, "negatives": 7}, "reviewkd": {"mid": 4}}
each_module = pytest.mark.parametrize("name", HYPER)


def random(sizes, b=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, *size, generator=g).to(dtype) for size in sizes]


def make(name, student=STUDENT, teacher=TEACHER, labels=LABELS, **hyper):
    torch.manual_seed(0)
    return losses.make_loss(name, **HYPER[name] | hyper)(student, teacher, labels)


def value(module, student, teacher, index=INDEX):
    torch.manual_seed(1)  # CRD's negatives
    return module(student, teacher, None, index)


@each_module
def test_teacher_gets_no_gradient_and_everything_else_does(name):
    module, student, teacher = make(name), random(STUDENT), random(TEACHER, seed=1)
    for x in student + teacher:
        x.requires_grad_()
    value(module, student, teacher).backward()
    assert all(x.grad is None for x in teacher)
    used = student if name == "reviewkd" else student[-1:]
    assert all(x.grad.abs().sum() > 0 for x in used)
    assert all(p.grad is not None for p in module.parameters())


@each_module
def test_arithmetic_is_float32_under_autocast_and_for_half_precision(name):
    student, teacher = random(STUDENT, dtype=torch.bfloat16), random(TEACHER, seed=1, dtype=torch.bfloat16)
    expected = value(make(name), [x.float() for x in student], [x.float() for x in teacher])
    student[-1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = value(make(name), student, teacher)
    found.backward()
    assert found.dtype == torch.float32 and student[-1].grad.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_module
def test_features_gradient_by_finite_differences(name):
    module = make(name).double()
    teacher = random(TEACHER, b=4, seed=1, dtype=torch.float64)
    value(
        module, random(STUDENT, b=4, dtype=torch.float64), teacher, INDEX[:4]
    )  # sets CRD's z, whose estimate has no gradient
    module.eval()  # banks and batch statistics stay
    student = [x.requires_grad_() for x in random(STUDENT, b=4, seed=2, dtype=torch.float64)]
    if name != "reviewkd":  # the maps are not read
        student = student[-1:]
    assert torch.autograd.gradcheck(
        lambda *s: value(module, s, teacher, INDEX[:4]), student, eps=1e-6, fast_mode=True
    )


@each_module
def test_errors_name_the_shapes(name):
    student, teacher = random(STUDENT), random(TEACHER)
    with pytest.raises(
        ValueError,
        match=r"expected per-image shapes \(C, H, W\) that end in the pooled \(C,\), got \[\] of the",
    ):
        make(name, student=[])
    with pytest.raises(ValueError, match=r"got .* of the student and \[\(3, 4\)\] of the teacher"):
        make(name, teacher=[(3, 4)])
    with pytest.raises(
        ValueError,
        match=r"student features .*\(8, 11\)\] are not a batch of 8 of the shapes .*\(10,\)\] this loss",
    ):
        value(make(name), student[:-1] + [torch.zeros(8, 11)], teacher)
    with pytest.raises(
        ValueError,
        match=r"teacher features .*\(7, 12\)\] are not a batch of 8 of the shapes .*\(12,\)\] this loss",
    ):
        value(make(name), student, [x[:7] for x in teacher])
    with pytest.raises(ValueError, match=r"student features \[\] are not a batch of 0"):
        value(make(name), [], teacher)
    if name != "crd":
        with pytest.raises(
            ValueError, match=r"compares the images of a batch, it needs 2 or more, got \(1, 10\)"
        ):
            value(make(name), [x[:1] for x in student], [x[:1] for x in teacher])


def test_make_loss_checks_the_hyper_parameters():
    with pytest.raises(ValueError, match="loss 'rkd' has no argument 'angel'; known: distance, angle"):
        losses.make_loss("rkd", angel=1.0)
    with pytest.raises(ValueError, match="loss 'rkd': squared must be true or false, got 1"):
        losses.make_loss("rkd", squared=1)
    with pytest.raises(ValueError, match="loss 'crd': dim must be a number, got True"):
        losses.make_loss("crd", dim=True)
    assert make("rkd", squared=True).squared


# ---------------------------------------------------------------- CC


def test_cc_is_that_of_neighbours():
    module = make("cc")
    student, teacher = random(STUDENT), random(TEACHER, seed=1)
    apart = (module.embed_student(student[-1]) - module.embed_teacher(teacher[-1])).abs()
    expected = sum((apart[n] * apart[n + 1]).sum() for n in range(7)) / 7
    torch.testing.assert_close(value(module, student, teacher), expected)
    order = torch.tensor([3, 1, 4, 0, 5, 2, 7, 6])
    assert not torch.isclose(
        value(module, [x[order] for x in student], [x[order] for x in teacher]), expected
    )


# ---------------------------------------------------------------- RKD


def rkd(student, teacher, **hyper):
    """RKD and its gradient for pooled features [B, D]."""
    student = student.clone().requires_grad_()
    loss = make("rkd", [(student.shape[1],)], [(teacher.shape[1],)], **hyper)([student], [teacher])
    return loss, torch.autograd.grad(loss, student)[0]


def pair(b=24, seed=0, dtype=torch.float64):
    return random([(16,)], b, seed)[0].to(dtype), random([(20,)], b, seed + 1)[0].to(dtype)


def literal_rkd(student, teacher):
    """The definition, pair by pair and angle by angle."""
    relations = []
    for x in (student, teacher):
        gaps = x[:, None] - x
        distance = gaps.norm(dim=2)
        unit = F.normalize(gaps, dim=2)
        relations.append(
            (distance / (distance.sum() / (len(x) * (len(x) - 1))), torch.einsum("ijd,ikd->ijk", unit, unit))
        )
    return sum(w * F.smooth_l1_loss(a, b) for w, a, b in zip((25.0, 50.0), *relations, strict=True))


def test_rkd_is_its_definition_in_any_number_of_blocks(monkeypatch):
    student, teacher = pair()
    expected = literal_rkd(student, teacher)
    gradients = []
    for block in (1, 5 * 24**2, 2**20):
        monkeypatch.setattr(losses.RKD, "block", block)
        loss, gradient = rkd(student, teacher)
        torch.testing.assert_close(loss, expected)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_rkd_is_invariant_to_translation_scale_rotation_and_order():
    student, teacher = pair()
    expected, gradient = rkd(student, teacher)
    rotation = torch.linalg.qr(random([(16,)], 16, seed=5)[0].double())[0]
    moved = rkd(3.0 * student @ rotation + 7.0, 0.1 * teacher - 2.0)
    torch.testing.assert_close(moved[0], expected)
    torch.testing.assert_close(moved[1] @ rotation.T * 3.0, gradient)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    permuted = rkd(student[order], teacher[order])
    torch.testing.assert_close(permuted[0], expected)
    torch.testing.assert_close(permuted[1], gradient[order])
    assert rkd(teacher, teacher)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ["two equal", "two zero", "many zero", "all equal", "all zero"])
def test_rkd_gradient_is_bounded_for_equal_rows(rows, dtype):
    student, teacher = pair(dtype=dtype)
    usual = rkd(student, teacher)[1].abs().max()
    match rows:
        case "two equal":
            student[3] = student[11]
        case "two zero":
            student[[3, 11]] = 0.0
        case "many zero":
            student[5:] = 0.0
        case "all equal":
            student[:] = student[0].clone()
        case "all zero":
            student[:] = 0.0
    loss, gradient = rkd(student, teacher)
    assert loss.isfinite() and gradient.abs().max() <= 5 * usual
    if rows.startswith("all"):
        assert not gradient.any()
    elif rows != "many zero":  # equal rows are pulled by the others alike, not torn apart
        assert gradient.abs().sum() > 0
    close(gradient, rkd(student.double(), teacher.double())[1], 2e-5)


def test_rkd_gradient_is_bounded_for_rows_that_differ_by_rounding():
    """Their squared distance is the rounding error of two lengths, of either sign and far above the truth."""
    student, teacher = (x[0] for x in (random([(2048,)], 24), random([(20,)], 24, seed=1)))
    usual = rkd(student, teacher)[1].abs().max()
    student[1::2] = student[::2] * (1 + 3e-7)
    loss, gradient = rkd(student, teacher)
    assert loss.isfinite() and gradient.abs().max() <= 5 * usual


def test_rkd_of_clustered_features_in_float32():
    """Spread 0.01 around a common vector of length 50: the uncentred products would keep no digit of it."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        F.normalize(torch.randn(d, generator=g), dim=0) * 50 + 0.01 * torch.randn(32, d, generator=g)
        for d in (64, 512)
    )
    loss, gradient = rkd(student, teacher)
    expected, expected_gradient = rkd(student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    close(gradient, expected_gradient, 2e-5)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel] + [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        )
        return result


def test_rkd_builds_nothing_of_size_b_b_d_nor_b_b_b(monkeypatch):
    monkeypatch.setattr(losses.RKD, "block", 2**13)
    student, teacher = random([(96,)], 64)[0], random([(128,)], 64, seed=1)[0]
    with Largest() as forward_and_backward:
        rkd(student, teacher)
    assert forward_and_backward.numel == 2**13  # 64 * 64 * 96 = 393,216
    with Largest() as check:
        literal_rkd(student, teacher)
    assert check.numel == 64 * 64 * 128


def test_rkd_keeps_nothing_of_size_b_b_b_for_backward(monkeypatch):
    monkeypatch.setattr(losses.RKD, "block", 2**13)
    student, teacher = random([(96,)], 64)[0].requires_grad_(), random([(128,)], 64, seed=1)[0]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x
    ):
        make("rkd", [(96,)], [(128,)])([student], [teacher])
    assert sum(kept.values()) < 32 * 64 * 64 + 4 * 64 * 128


# ---------------------------------------------------------------- CRD


def test_crd_draws_from_other_classes_uniformly():
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 2, 1, 0, 2, 5, 2])  # uneven, unsorted, with empty classes
    module = make("crd", labels=labels, negatives=4000)
    torch.manual_seed(0)
    index = torch.arange(len(labels)).repeat(3)
    sampled = module.sample(index)
    assert sampled.shape == (36, 4001) and torch.equal(sampled[:, 0], index)
    for i in range(len(labels)):
        drawn = sampled[index == i, 1:].flatten()
        others = (labels != labels[i]).nonzero().flatten()
        counts = drawn.bincount(minlength=len(labels))
        assert counts.sum() == counts[others].sum() == 12000
        expected = 12000 / len(others)
        chi_square = ((counts[others] - expected) ** 2 / expected).sum()
        assert (
            chi_square < len(others) - 1 + 5 * (2 * (len(others) - 1)) ** 0.5
        )  # mean + 5 standard deviations


def test_crd_draw_is_that_of_the_seed():
    module = make("crd")
    torch.manual_seed(3)
    first = module.sample(INDEX)
    assert not torch.equal(module.sample(INDEX), first)
    torch.manual_seed(3)
    assert torch.equal(module.sample(INDEX), first)


def test_crd_banks_start_the_same_whatever_was_drawn_before():
    torch.manual_seed(0)
    first = losses.CRD(STUDENT, TEACHER, LABELS)
    torch.manual_seed(1)
    second = losses.CRD(STUDENT, TEACHER, LABELS)
    assert torch.equal(first.bank_student, second.bank_student) and torch.equal(
        first.bank_teacher, second.bank_teacher
    )
    assert not torch.equal(first.bank_student, first.bank_teacher)
    assert first.bank_student.abs().max() <= (3 / 128) ** 0.5 < first.bank_student.abs().max() * 1.01


class Ranks:
    """`gather` for modules that run one after the other.

    The first round records what each rank sends, later rounds return the tensors of all ranks. The rounds
    repeat until what every rank sends no longer changes (Z is sent before it is used).
    """

    def __init__(self, modules):
        self.modules, self.sent = modules, {}

    def run(self, step):
        before = [copy.deepcopy(m.state_dict()) for m in self.modules]
        for _ in range(2):
            for rank, module in enumerate(self.modules):
                module.load_state_dict(before[rank])
                calls = iter(range(99))
                module.gather = lambda x, rank=rank, calls=calls: self.gather(x, rank, next(calls))
                step(rank, module)
        self.sent = {}

    def gather(self, x, rank, call):
        self.sent[rank, call] = x.clone()
        return torch.cat([self.sent.get((r, call), x) for r in range(len(self.modules))])


def test_crd_banks_are_the_same_on_every_rank_and_hold_all_batches():
    ranks = [make("crd"), make("crd")]
    start = ranks[0].bank_student.clone()
    batches = [(random(STUDENT, seed=r), random(TEACHER, seed=9 + r), INDEX + r) for r in range(2)]
    together = Ranks(ranks)
    for _ in range(2):
        together.run(lambda rank, module: value(module, *batches[rank]))
    for name, buffer in ranks[0].named_buffers():
        assert torch.equal(buffer, dict(ranks[1].named_buffers())[name]), name
    moved = (ranks[0].bank_student != start).any(dim=1).nonzero().flatten()
    assert torch.equal(moved, torch.cat([INDEX, INDEX + 1]).sort().values)
    alone = [make("crd"), make("crd")]
    for module, batch in zip(alone, batches, strict=True):
        value(module, *batch)
    torch.testing.assert_close(ranks[0].z, (alone[0].z + alone[1].z) / 2)


def test_crd_an_id_twice_in_a_batch_takes_its_last_place(monkeypatch):
    module = make("crd")
    index = torch.tensor([5, 9, 5, 7, 9, 5])
    v_student, v_teacher = (F.normalize(x) for x in random([(6,), (6,)], 6))
    expected = module.bank_student.clone()
    for i in (4, 5, 3):  # the last 9, the last 5, the only 7
        expected[index[i]] = F.normalize(0.5 * expected[index[i]] + 0.5 * v_student[i], dim=0)
    write = torch.Tensor.index_copy_  # a GPU writes in any order: here backwards
    monkeypatch.setattr(
        torch.Tensor, "index_copy_", lambda bank, dim, i, rows: write(bank, dim, i.flip(0), rows.flip(0))
    )
    module.contrast(v_student, v_teacher, index, module.sample(index))
    torch.testing.assert_close(module.bank_student, expected)


def test_crd_resumes_from_its_state():
    """Banks and z travel in the state_dict, nothing that follows from the labels does."""
    first = make("crd")
    student, teacher = random(STUDENT), random(TEACHER, seed=1)
    value(first, student, teacher)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert {"bank_student", "bank_teacher", "z"} == {k for k in state if not k.startswith("embed")}
    second = make("crd")
    second.load_state_dict(state)
    assert torch.equal(value(first, student, teacher), value(second, student, teacher))
    assert torch.equal(first.z, state["z"]) and torch.equal(first.bank_teacher, second.bank_teacher)
    assert not torch.equal(first.bank_teacher, state["bank_teacher"])


def test_crd_does_not_change_in_eval_and_backward_uses_the_banks_of_its_forward():
    module, student, teacher = make("crd"), random(STUDENT), random(TEACHER, seed=1)
    student[-1].requires_grad_()
    module.eval()
    bank = module.bank_student.clone()
    (alone,) = torch.autograd.grad(value(module, student, teacher), student[-1])
    assert torch.equal(module.bank_student, bank)
    module.train()
    loss = value(module, student, teacher)
    value(module, student, teacher)  # moves the banks again
    torch.testing.assert_close(torch.autograd.grad(loss, student[-1])[0], alone, rtol=0, atol=0)


def test_crd_falls_when_the_positive_pair_is_aligned():
    module = make("crd").eval()
    v_student, v_teacher = (F.normalize(x) for x in random([(6,), (6,)]))
    sampled = module.sample(INDEX)
    apart = module.contrast(v_student, v_teacher, INDEX, sampled)
    aligned = [F.normalize(bank[INDEX]) for bank in (module.bank_teacher, module.bank_student)]
    assert module.contrast(*aligned, INDEX, sampled) < apart - 1


def test_crd_copies_rows_or_multiplies_by_the_whole_bank_alike(monkeypatch):
    results = []
    for whole in (True, False):
        monkeypatch.setattr(losses, "_whole_bank", lambda bank, ids, whole=whole: whole)
        module, student = make("crd").double(), random(STUDENT, dtype=torch.float64)
        student[-1].requires_grad_()
        loss = value(module, student, random(TEACHER, seed=1, dtype=torch.float64))
        loss.backward()
        results.append((loss, student[-1].grad, module.embed_teacher.weight.grad))
    torch.testing.assert_close(results[0], results[1])


def test_crd_keeps_neither_scores_nor_rows_for_backward():
    module = make("crd", labels=torch.arange(4000) % 4, negatives=1000)
    student, teacher, kept = random(STUDENT), random(TEACHER, seed=1), {}
    student[-1].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x
    ):
        value(module, student, teacher)
    assert max(kept.values()) < 8 * 1001  # the scores of one side


def test_crd_of_a_zero_embedding_has_no_gradient():
    module, student, teacher = make("crd"), random(STUDENT), random(TEACHER, seed=1)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    student[-1].requires_grad_()
    loss = value(module, student, teacher)
    loss.backward()
    assert loss.isfinite() and module.bank_student.isfinite().all()
    assert not any(p.grad.any() for p in [*module.parameters(), student[-1]])


def test_crd_errors_say_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"needs the labels of all training images, .* read by index \(streaming: false\)",
    ):
        make("crd", labels=None)
    for labels, found in (
        (LABELS.float(), "torch.float32, 0.0 to 3.0"),
        (LABELS - 1, "torch.int64, -1 to 2"),
        (torch.full((40,), 3), "torch.int64, 3 to 3"),
    ):
        with pytest.raises(ValueError, match=rf"class ids \[n_data\] from 0, of two or .* got {found}"):
            make("crd", labels=labels)
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0"):
        make("crd", temperature=0)
    for index, found in ((None, "None"), (INDEX[:3], r"\(3,\)")):
        with pytest.raises(
            ValueError, match=rf"needs index \[B\], the ids of the images of features \(8, 10\), got {found}"
        ):
            value(make("crd"), random(STUDENT), random(TEACHER), index)


# ---------------------------------------------------------------- ReviewKD


def test_hierarchical_error_of_equal_maps_is_zero_and_of_a_constant_its_square():
    x = random([(3, 7, 5)])[0]
    assert losses._hierarchical_error(x, x) == 0
    for size in (
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (7, 5),
        (2, 9),
        (1, 6),
    ):  # whatever is pooled, the weights sum to 1
        torch.testing.assert_close(
            losses._hierarchical_error(torch.full((2, 3, *size), 3.0), torch.ones(2, 3, *size)),
            torch.tensor(4.0),
        )


def test_hierarchical_error_pools_the_long_side_of_a_narrow_map():
    x, y = random([(2, 8, 3)])[0], random([(2, 8, 3)], seed=1)[0]
    d = x - y
    halves = d.unflatten(2, (2, 4)).mean(3)
    pooled = [
        d.unflatten(2, (4, 2)).mean(3),
        torch.stack([halves[..., :2].mean(3), halves[..., 1:].mean(3)]),
        d.mean((2, 3)),
    ]
    expected = (
        d.square().mean()
        + sum(w * p.square().mean() for w, p in zip((0.5, 0.25, 0.125), pooled, strict=True))
    ) / 1.875
    torch.testing.assert_close(losses._hierarchical_error(x, y), expected)


@pytest.mark.parametrize("height, width", [(8, 8), (12, 20), (14, 7), (3, 1)])
def test_reviewkd_takes_any_resolution(height, width):
    """Built at one size, called at others: non-square maps, and stages that do not halve the one before."""
    student = [(6, height, width), (8, -(-height // 2), -(-width // 2)), (10, 2, 1), (10,)]
    teacher = [(5, 2 * height, width), (7, height, -(-width // 2)), (9, 1, 3), (12,)]
    loss = value(make("reviewkd"), random(student), random(teacher))
    assert loss.isfinite() and loss > 0


def test_reviewkd_matches_levels_from_the_deepest():
    module, short = make("reviewkd", teacher=TEACHER[1:]), make("reviewkd", STUDENT[1:], TEACHER[1:])
    short.load_state_dict(module.state_dict())
    student, teacher = random(STUDENT), random(TEACHER, seed=1)
    assert torch.equal(value(module, student, teacher[1:]), value(short, student[1:], teacher[1:]))
    assert len(module.levels) == 3 and module.levels[0].attention is None


def test_reviewkd_width_between_the_levels():
    widths = [make("reviewkd", mid=mid).levels[0].conv1[0].out_channels for mid in (4, 512)]
    assert widths == [4, 10]
    resnets = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (2048,)]
    with torch.device("meta"):
        module = losses.ReviewKD(resnets, resnets)
    assert (
        sum(p.numel() for p in module.parameters()) == 30_171_656
    )  # vanillaKD's for ResNet-50 and ResNet-152
