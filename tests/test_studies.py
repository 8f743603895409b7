"""The studies: data.fraction, the recipes that use it, and what is measured on them."""

import dataclasses
import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, STUDENT, distilled, make_recipe, needs_cifar, write
from test_data import equal, loader, read
from test_train import assert_same_run, final_state, run

import data
import losses
import models
import recipe
import train

# ---------------------------------------------------------------- data.fraction


def test_a_cut_is_balanced_nested_and_of_any_order_of_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
    cuts = {f: data.share_of_each_class(labels, f).tolist() for f in (0.004, 0.1, 0.25, 0.5, 1.0)}
    counts = {f: np.bincount(labels[cut], minlength=10).tolist() for f, cut in cuts.items()}
    assert counts == {0.004: [1] * 10, 0.1: [5] * 10, 0.25: [12] * 10, 0.5: [25] * 10, 1.0: [50] * 10}
    for smaller, larger in zip(list(cuts)[:-1], list(cuts)[1:], strict=True):
        assert set(cuts[smaller]) < set(cuts[larger]) and cuts[smaller] == sorted(cuts[smaller])
    uneven = np.repeat([7, 2], [40, 4])  # classes of their own sizes keep their shares
    assert np.bincount(uneven[data.share_of_each_class(uneven, 0.5)]).tolist() == [0, 0, 2, 0, 0, 0, 0, 20]


def test_an_epoch_is_the_cut_whatever_seed_processes_and_workers():
    full, cut = loader(), loader(data__fraction=0.25, data__train_size=898)
    rows = data.share_of_each_class(full.labels().numpy(), 0.25)
    assert cut.size == len(rows) == len(cut.labels()) and cut.steps_per_epoch == 4  # of 224 images; 898 is the full set's
    batches, ids = read(cut, 0, 4)
    assert sorted(ids) == list(range(224))  # places in the cut: what CRD's banks are indexed by
    assert torch.equal(cut.labels(), full.labels()[rows])
    for _, labels, index in batches:
        assert torch.equal(cut.labels()[index], labels)
    pictures = [cut.split.rows[i]["image"]["bytes"] for i in range(224)]
    assert pictures == [full.split.rows[int(i)]["image"]["bytes"] for i in rows]
    assert equal(batches, read(loader(data__fraction=0.25, workers=2), 0, 4)[0])
    other = loader(data__fraction=0.25, seed=4)
    assert [row["label"] for row in other.split.rows] == [row["label"] for row in cut.split.rows]
    assert read(other, 0, 4)[1] != ids
    halves = [read(loader(data__fraction=0.25, rank=rank, world=2), 0, 3)[1] for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(ids[:192])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__fraction=0.0), "data.fraction: expected a number from 0.0001 to 1, got 0.0"),
        (dict(data__fraction=1.5), "data.fraction: expected a number from 0.0001 to 1, got 1.5"),
        (
            dict(data__fraction=0.5, data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=9),
            "data.fraction: a stream's classes are not known beforehand: set streaming to false and shuffle_buffer to 0",
        ),
        (dict(data__fraction=0.05, data__train_size=898, data__drop_last=True), "data: 45 images do not fill one batch of 64"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(changes, message):
    with pytest.raises(recipe.RecipeError, match=message):
        make_recipe(**changes)


def test_the_size_that_is_checked_is_the_whole_sets():
    with pytest.raises(data.DataError, match=r"898 images found, the recipe's data.train_size is 224"):
        loader(data__fraction=0.25, data__train_size=224)


CRD = {"loss": "crd", "weight": 1.0, "warmup_epochs": 0, "args": {"dim": 8, "negatives": 16}}


def test_a_run_on_a_cut_resumes_to_the_bit_and_says_so(tmp_path, teacher_file, capsys):
    changes = distilled(teacher_file, data__fraction=0.3, save_every=3)
    changes["students"] = [STUDENT, dict(STUDENT, name="crd", soft=CRD)]  # a bank with a row for every image of the cut
    path = write(tmp_path / "r.json", **changes)
    whole = run(path, tmp_path / "whole")
    assert whole["steps"] == 10 and "  data: 269 images (0.3 of each class) of digits" in capsys.readouterr().out
    run(path, tmp_path / "parts", "--limit", 4)
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(SystemExit):
        run(path, tmp_path / "parts", "--resume", "--set", "data.fraction=0.5")
    assert "data.fraction: 0.3 -> 0.5" in capsys.readouterr().err


def test_a_run_from_before_a_key_existed_goes_on(tmp_path):
    """What a key's default says is what the run did: no difference."""
    path, out = write(tmp_path / "r.json", epochs=1), tmp_path / "out"
    run(path, out, "--limit", 3)
    begun = json.loads((out / "recipe.json").read_text())
    del begun["data"]["fraction"], begun["students"][0]["grad_checkpointing"]
    (out / "recipe.json").write_text(json.dumps(begun))
    assert run(path, out, "--resume")["steps"] == 15


@needs_cifar
def test_a_tenth_of_cifar100():
    section = dataclasses.replace(load("study_fraction_weak", "data.fraction=0.1").data, source=str(CIFAR))
    own = data.TrainLoader(section, seed=0, batch_size=64, batch_size_per_process=64)
    assert own.size == 5000 and own.steps_per_epoch == 79 and own.labels().bincount().tolist() == [50] * 100


# ---------------------------------------------------------------- gradients of the terms, and curves


def test_gradient_norms_are_those_of_the_terms(tmp_path, teacher_file):
    """Against autograd by hand, through the row of a real run: weights and ramp included, nothing for other students."""
    changes = distilled(teacher_file, epochs=1, log_every=4)
    features = dict(STUDENT, name="cc", soft={"loss": "cc", "weight": 0.02, "warmup_epochs": 0, "args": {"dim": 8}})
    bare = dict(STUDENT, name="bare", hard=STUDENT["hard"] | {"weight": 0.0})
    changes["students"] += [features, bare]
    seen = []
    original = models.Distilled.gradient_norms

    def spied(module, logits, teacher_logits, target, soft_weight):
        seen.append((logits, teacher_logits, target, soft_weight))
        return original(module, logits, teacher_logits, target, soft_weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.Distilled, "gradient_norms", spied)
        run(write(tmp_path / "r.json", **changes), tmp_path / "out")
    logged = [row for row in metrics(tmp_path / "out") if any(key.startswith("gradient") for key in row)]
    assert [row["step"] for row in logged] == [4, 8, 12]  # not the 15th, the rest of an interval
    assert len(seen) == 9  # kd, dkd, bare: not at other steps, not for the students without a term on logits
    for row in logged:
        names = {key.split("/")[1] for key in row if key.startswith("gradient")}
        assert names == {"kd", "dkd", "bare"} and row["gradient_hard/bare"] == row["gradient_ratio/bare"] == 0
    for (logits, theirs, target, weight), row in zip(seen[::3], logged, strict=True):
        p, q = (logits / 4).softmax(1), (theirs / 4).softmax(1)
        soft = weight * 4 * (p - q) / len(p)  # of kd: T^2 KL, whose gradient is T (p - q)
        hard = (logits.softmax(1) - torch.nn.functional.one_hot(target, 10)) / len(p)
        assert row["gradient_hard/kd"] == pytest.approx(hard.norm().item(), rel=1e-5)
        assert row["gradient_soft/kd"] == pytest.approx(soft.norm().item(), rel=1e-5)
        assert row["gradient_ratio/kd"] == pytest.approx((hard.norm() / soft.norm()).item(), rel=1e-5)
    assert [float(weight) for *_, weight in seen[1::3]] == [0.25] * 3  # dkd's ramp


def test_looking_at_gradients_changes_nothing(tmp_path, teacher_file, monkeypatch):
    mixed = dict(data__mixup=0.2, data__drop_last=True, batch_size_per_process=32)  # and accumulated
    path = write(tmp_path / "r.json", **distilled(teacher_file, epochs=1, log_every=1, **mixed))
    run(path, tmp_path / "with")
    monkeypatch.setattr(train, "log_gradients", lambda trainee: {})
    run(path, tmp_path / "without")
    (tensors, state), (others, other_state) = final_state(tmp_path / "with"), final_state(tmp_path / "without")
    assert all(torch.equal(tensors[key], others[key]) for key in tensors) and state == other_state


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_result_has_its_curves(tmp_path, teacher_file):
    path, out = write(tmp_path / "r.json", **distilled(teacher_file, epochs=2, log_every=4)), tmp_path / "out"
    run(path, out, "--limit", 15)
    result = run(path, out, "--resume")  # of the whole run
    rows = [row for row in metrics(out) if "loss/kd" in row]
    terms = ("loss", "hard", "soft", "gradient_hard", "gradient_soft", "gradient_ratio")
    assert result["curves"]["kd"]["step"] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert list(result["curves"]["kd"]) == ["step", *terms] and list(result["curves"]["alone"]) == ["step", "loss", "hard"]
    for term in terms:
        logged = [row.get(f"{term}/kd") for row in rows]
        assert result["curves"]["kd"][term] == [value and pytest.approx(value, rel=1e-5) for value in logged]
        assert (logged[-1] is None) == term.startswith("gradient")
    scores = [row["top1/dkd"] for row in metrics(out) if "top1/dkd" in row]
    assert result["accuracy"]["dkd"] == {"epoch": [1.0, 2.0], "top1": [pytest.approx(score, rel=1e-5) for score in scores]}
    assert result["accuracy"]["dkd"]["top1"][-1] == pytest.approx(result["students"][2]["last"]["top1"], rel=1e-5)
    assert {"recipe", "seed", "commit", "versions", "hardware"} <= set(result) and "best" in result["students"][0]
    assert '"step": [ 4, 8,' in (out / "result.json").read_text()  # a curve is a line


def test_a_long_curve_is_thinned_evenly():
    rows = [{"step": i, "epoch": i / 10, "loss/kd": 1 / (i + 3)} | ({} if i % 2 else {"top1/kd": i}) for i in range(2001)]
    curve = train.curve(rows, "kd", "step", ("loss", "soft"))
    assert list(curve) == ["step", "loss"] and len(curve["step"]) == 300
    assert (curve["step"][0], curve["step"][-1]) == (0, 2000) and set(np.diff(curve["step"])) == {6, 7}
    assert train.curve(rows, "kd", "epoch", ("top1",))["top1"][-1] == 2000 and train.curve([], "kd", "step", ("loss",)) == {
        "step": []
    }


# ---------------------------------------------------------------- recipes

CIFAR = ROOT.parent / "shared" / "data" / "cifar100"
STUDIES = {p.stem: p for p in (ROOT / "recipes").glob("study_*.json")}


def load(stem, *overrides):
    return recipe.load(ROOT / "recipes" / f"{stem}.json", overrides)


def test_the_fraction_recipes_are_table_1bs():
    """At a fraction of 1: 'previous', and 'stronger' but for its epochs; beside them the student alone."""
    for name, like, changes in (
        ("weak", "prev", []),
        ("strong", "strong", ["epochs=240", "schedule.milestones=[150,180,210]"]),
    ):
        own, other = load(f"study_fraction_{name}"), load(f"{like}_cifar_res20_res56", *changes)
        assert [s.name for s in own.students] == ["alone", "kd", "dkd", "dist"] and own.data.fraction == 1.0
        bare = [dataclasses.replace(s, paper=None) for s in other.students]
        assert own.students[1:] == tuple(bare) and own.students[0].soft is None
        assert dataclasses.replace(own, about=other.about, students=other.students) == other
    alone = dataclasses.replace(load("prev_cifar_res20_scratch").students[0], name="alone", paper=None)
    assert load("study_fraction_weak").students[0] == load("study_fraction_strong").students[0] == alone


def test_the_ablation_is_table_4s():
    own, a2 = load("study_ablation_cifar"), load("a2_res50_beitl")
    terms = {name: s for name in ("kd", "bkl") for s in a2.students if s.name == name}
    wanted = [(f"{hard}_{soft}", hard, terms[name].soft) for soft, name in (("kl", "kd"), ("bkl", "bkl")) for hard in HARD]
    assert [(s.name, s.soft) for s in own.students] == [(name, soft) for name, _, soft in wanted]
    for student, (_, hard, _) in zip(own.students, wanted, strict=True):
        assert (student.hard.loss, student.hard.weight) == HARD[hard]
        same = dataclasses.replace(own.students[0], name=student.name, hard=student.hard, soft=student.soft)
        assert student == same
    first, like = own.students[0], terms["kd"]
    for key in ("optimizer", "optimizer_args", "weight_decay", "decay_norm_and_bias", "clip_grad", "ema"):
        assert getattr(first, key) == getattr(like, key)
    assert own.schedule == a2.schedule
    assert own.data == load("strong_cifar_res20_res56").data and own.data.rand_augment == a2.data.rand_augment


HARD = {"ce": ("cross_entropy", 1.0), "bce": ("binary_cross_entropy", 1.0), "none": ("cross_entropy", 0.0)}


@pytest.mark.parametrize("stem", STUDIES)
def test_a_study_can_start(stem):
    """Its networks and losses build, and its teacher's recipe is one."""
    settings = load(stem)
    for student in settings.students:
        module, _ = train.make_student(settings, student)
        assert module.net.model.num_classes == 100
        losses.make_loss(student.hard.loss, losses.LABEL_LOSSES, smoothing=0.0)
    assert load(Path(settings.teacher.recipe).stem).students[0].model == "cifar_resnet56"


# ---------------------------------------------------------------- the data-scale figure


def tool(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


def study_run(augmentation, fraction, seed, top1, *overrides):
    """What train.py's write_result leaves of a run; top1 of alone, kd, dkd, dist."""
    settings = load(f"study_fraction_{augmentation}", f"data.fraction={fraction}", f"seed={seed}", *overrides)
    students = [{"name": s.name, "last": {"top1": value}} for s, value in zip(settings.students, top1, strict=True)]
    tree = json.loads(recipe.dump(settings))
    return {"seed": seed, "limit": None, "recipe": tree, "teacher": {"top1": 72.0}, "students": students}


def test_the_figure_has_gaps_of_equal_seeds(tmp_path, monkeypatch, capsys):
    scale = tool("scale", monkeypatch)
    short = ("epochs=24", "schedule.milestones=[15,18,21]")
    runs = [study_run("weak", 0.1, seed, (50, 55 + seed, 56 + 2 * seed, 54), *short) for seed in (0, 1)]
    runs += [study_run("weak", 1.0, 0, (69, 70.5, 72, 71), *short), study_run("strong", 1.0, 0, (68, 70, 71, 72.5))]
    runs.append(study_run("weak", 0.1, 2, (1, 2, 3, 4), *short, "data.hflip=0.0"))  # another experiment
    alone = study_run("weak", 0.25, 0, (50, 1, 60, 60))
    alone["students"], alone["recipe"]["students"] = alone["students"][2:], alone["recipe"]["students"][2:]  # no kd, no gap
    runs.append(alone)
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs}))
    scale.main([str(tmp_path), "--out", str(tmp_path / "f.svg")])
    found = json.loads((tmp_path / "f.json").read_text())
    rows = {(p["augmentation"], p["epochs"], p["fraction"], p["method"]): p for p in found["points"]}
    weak = rows["weak", "24 of 240 epochs", 0.1, "dkd"]
    assert (weak["mean"], weak["gaps"], weak["teacher"]) == (1.5, {"0": 1.0, "1": 2.0}, [72.0])
    assert weak["spread"] == pytest.approx(0.5**0.5)
    assert rows["weak", "24 of 240 epochs", 0.1, "dist"]["gaps"] == {"0": -1.0, "1": -2.0}
    assert rows["strong", "240 epochs", 1.0, "dist"]["mean"] == 2.5 and len(rows) == 6
    assert {(b["dataset"], b["method"]): b["mean"] for b in found["figure_1"]}["cifar-100", "dist"] == 2.17
    svg = ElementTree.parse(tmp_path / "f.svg")
    assert len(svg.findall(".//{*}circle")) == 6 and len(svg.findall(".//{*}rect")) == 1 + 8
    said = [node.text for node in svg.findall(".//{*}text")]
    assert "dkd, weak, 24 ep." in said and "2.17" in said and "10 %" in said
    assert "weak 24 of 240 epochs fraction 0.1: dkd - kd = +1.50 ± 0.71, seeds 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scale.main([str(tmp_path / "no"), "--out", str(tmp_path / "g.svg")])
    assert "no finished run of recipes/study_fraction_weak.json" in capsys.readouterr().err
