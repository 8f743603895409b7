"""The losses on features: golden values with gradients, what must not matter, memory, and CRD's banks and sampler."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses

GOLDEN = ROOT.parent / "shared" / "golden"
CASES = json.loads((GOLDEN / "losses.json").read_text())["cases"] if GOLDEN.exists() else []
CASES = {c["id"]: c for c in CASES if c["method"] in ("cc", "rkd", "crd", "reviewkd", "total_rkd")}
needs_golden = pytest.mark.skipif(not CASES, reason=f"reference values not found in {GOLDEN}")

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


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "losses.npz")


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
    first = CASES[case["hparams"].get("previous_step") or case["id"]]
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
def test_every_hint_case_is_here():
    counts = {m: sum(c["method"] == m for c in CASES.values()) for m in ("cc", "rkd", "crd", "reviewkd", "total_rkd")}
    assert counts == {"cc": 2, "rkd": 7, "crd": 4, "reviewkd": 3, "total_rkd": 1}


@needs_golden
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_golden(case, arrays, dtype):
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
    torch.testing.assert_close(loss.item(), case["outputs"]["loss"], rtol=1e-9 if fine else 2e-5, atol=1e-12 if fine else 1e-6)
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


# ---------------------------------------------------------------- all of them

STUDENT = [(6, 8, 8), (8, 4, 4), (10, 2, 2), (10,)]
TEACHER = [(5, 8, 8), (7, 4, 4), (9, 2, 2), (12,)]
LABELS = torch.arange(40) % 4
INDEX = torch.arange(8) * 5
HYPER = {"cc": {"dim": 6}, "rkd": {}, "crd": {"dim": 6, "negatives": 7}, "reviewkd": {"mid": 4}}
each = pytest.mark.parametrize("name", HYPER)


def random(sizes, b=8, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, *size, generator=g).to(dtype) for size in sizes]


def make(name, student=STUDENT, teacher=TEACHER, labels=LABELS, **hyper):
    torch.manual_seed(0)
    return losses.make_loss(name, **HYPER[name] | hyper)(student, teacher, labels)


def value(module, student, teacher, index=INDEX):
    torch.manual_seed(1)  # CRD's negatives
    return module(student, teacher, None, index)


@each
def test_teacher_gets_no_gradient_and_everything_else_does(name):
    module, student, teacher = make(name), random(STUDENT), random(TEACHER, seed=1)
    for x in student + teacher:
        x.requires_grad_()
    value(module, student, teacher).backward()
    assert all(x.grad is None for x in teacher)
    used = student if name == "reviewkd" else student[-1:]
    assert all(x.grad.abs().sum() > 0 for x in used)
    assert all(p.grad is not None for p in module.parameters())


@each
def test_arithmetic_is_float32_under_autocast_and_for_half_precision(name):
    student, teacher = random(STUDENT, dtype=torch.bfloat16), random(TEACHER, seed=1, dtype=torch.bfloat16)
    expected = value(make(name), [x.float() for x in student], [x.float() for x in teacher])
    student[-1].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = value(make(name), student, teacher)
    found.backward()
    assert found.dtype == torch.float32 and student[-1].grad.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each
def test_gradient_by_finite_differences(name):
    module = make(name).double()
    teacher = random(TEACHER, b=4, seed=1, dtype=torch.float64)
    value(module, random(STUDENT, b=4, dtype=torch.float64), teacher, INDEX[:4])  # sets CRD's z, whose estimate has no gradient
    module.eval()  # banks and batch statistics stay
    student = [x.requires_grad_() for x in random(STUDENT, b=4, seed=2, dtype=torch.float64)]
    if name != "reviewkd":  # the maps are not read
        student = student[-1:]
    assert torch.autograd.gradcheck(lambda *s: value(module, s, teacher, INDEX[:4]), student, eps=1e-6, fast_mode=True)


@each
def test_errors_name_the_shapes(name):
    student, teacher = random(STUDENT), random(TEACHER)
    with pytest.raises(
        ValueError, match=r"expected per-image shapes \(C, H, W\) that end in the pooled \(C,\), got \[\] of the"
    ):
        make(name, student=[])
    with pytest.raises(ValueError, match=r"got .* of the student and \[\(3, 4\)\] of the teacher"):
        make(name, teacher=[(3, 4)])
    with pytest.raises(
        ValueError, match=r"student features .*\(8, 11\)\] are not a batch of 8 of the shapes .*\(10,\)\] this loss"
    ):
        value(make(name), student[:-1] + [torch.zeros(8, 11)], teacher)
    with pytest.raises(
        ValueError, match=r"teacher features .*\(7, 12\)\] are not a batch of 8 of the shapes .*\(12,\)\] this loss"
    ):
        value(make(name), student, [x[:7] for x in teacher])
    with pytest.raises(ValueError, match=r"student features \[\] are not a batch of 0"):
        value(make(name), [], teacher)
    if name != "crd":
        with pytest.raises(ValueError, match=r"compares the images of a batch, it needs 2 or more, got \(1, 10\)"):
            value(make(name), [x[:1] for x in student], [x[:1] for x in teacher])


def test_make_loss_checks_the_hyper_parameters():
    with pytest.raises(ValueError, match="loss 'rkd' has no argument 'angel', did you mean 'angle'"):
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
    assert not torch.isclose(value(module, [x[order] for x in student], [x[order] for x in teacher]), expected)


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
        relations.append((distance / (distance.sum() / (len(x) * (len(x) - 1))), torch.einsum("ijd,ikd->ijk", unit, unit)))
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


def test_rkd_is_blind_to_moving_scaling_rotating_and_order():
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
    """Their squared distance is the rounding of two lengths: of either sign, and 1e6 times what it should be."""
    student, teacher = (x[0] for x in (random([(2048,)], 24), random([(20,)], 24, seed=1)))
    usual = rkd(student, teacher)[1].abs().max()
    student[1::2] = student[::2] * (1 + 3e-7)
    loss, gradient = rkd(student, teacher)
    assert loss.isfinite() and gradient.abs().max() <= 5 * usual


def test_rkd_of_clustered_features_in_float32():
    """Spread 0.01 around a common vector of length 50: the products of the features themselves keep no digit of it."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        F.normalize(torch.randn(d, generator=g), dim=0) * 50 + 0.01 * torch.randn(32, d, generator=g) for d in (64, 512)
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
        self.numel = max([self.numel] + [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
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
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
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
        assert chi_square < len(others) - 1 + 5 * (2 * (len(others) - 1)) ** 0.5  # mean + 5 standard deviations


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
    assert torch.equal(first.bank_student, second.bank_student) and torch.equal(first.bank_teacher, second.bank_teacher)
    assert not torch.equal(first.bank_student, first.bank_teacher)
    assert first.bank_student.abs().max() <= (3 / 128) ** 0.5 < first.bank_student.abs().max() * 1.01
    assert losses.CRD.bank_bytes(40) == sum(b.numel() * b.element_size() for b in (first.bank_student, first.bank_teacher))


class Ranks:
    """`gather` for modules that run one after the other: the first round records, later rounds hand out all ranks' tensors.

    The rounds repeat until what every rank sends no longer changes (Z is sent before it is used).
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
    write = torch.Tensor.index_copy  # a GPU writes in any order: here backwards
    monkeypatch.setattr(torch.Tensor, "index_copy", lambda bank, dim, i, rows: write(bank, dim, i.flip(0), rows.flip(0)))
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
        ValueError, match=r"needs the labels of all images, .* use data that is read by index \(streaming: false\)"
    ):
        make("crd", labels=None)
    with pytest.raises(ValueError, match=r"class ids \[n_data\] from 0, got torch.float32 of shape \(40,\)"):
        make("crd", labels=LABELS.float())
    with pytest.raises(ValueError, match=r"class ids \[n_data\] from 0, got torch.int64 of shape \(40,\)"):
        make("crd", labels=LABELS - 1)
    with pytest.raises(ValueError, match=r"negatives from other classes, but all 40 labels are 3"):
        make("crd", labels=torch.full((40,), 3))
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0"):
        make("crd", temperature=0)
    for index, found in ((None, "None"), (INDEX[:3], r"\(3,\)")):
        with pytest.raises(ValueError, match=rf"needs index \[B\], the ids of the images of features \(8, 10\), got {found}"):
            value(make("crd"), random(STUDENT), random(TEACHER), index)


# ---------------------------------------------------------------- ReviewKD


def test_hierarchical_error_of_equal_maps_is_zero_and_of_a_constant_its_square():
    x = random([(3, 7, 5)])[0]
    assert losses._hierarchical_error(x, x) == 0
    for size in ((1, 1), (2, 2), (3, 3), (4, 4), (7, 5), (2, 9), (1, 6)):  # whatever is pooled, the weights sum to 1
        torch.testing.assert_close(
            losses._hierarchical_error(torch.full((2, 3, *size), 3.0), torch.ones(2, 3, *size)), torch.tensor(4.0)
        )


def test_hierarchical_error_pools_the_long_side_of_a_narrow_map():
    x, y = random([(2, 8, 3)])[0], random([(2, 8, 3)], seed=1)[0]
    d = x - y
    halves = d.unflatten(2, (2, 4)).mean(3)
    pooled = [d.unflatten(2, (4, 2)).mean(3), torch.stack([halves[..., :2].mean(3), halves[..., 1:].mean(3)]), d.mean((2, 3))]
    expected = (d.square().mean() + sum(w * p.square().mean() for w, p in zip((0.5, 0.25, 0.125), pooled, strict=True))) / 1.875
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
    assert sum(p.numel() for p in module.parameters()) == 30_171_656  # vanillaKD's for ResNet-50 and ResNet-152
