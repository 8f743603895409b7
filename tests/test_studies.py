"""The studies: data.fraction, the recipes that use it, and what is measured on them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, STUDENT, distilled, make_recipe, needs_cifar, write
from test_data import equal, loader, read
from test_train import assert_same_run, run

import data
import losses
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
