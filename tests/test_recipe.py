"""recipe.py: every shipped recipe loads, errors by their exact text, and no edit of a recipe gives a traceback."""

import contextlib
import copy
import dataclasses
import json
import random
import subprocess
import sys

import pytest
from conftest import RECIPE, ROOT, STUDENT, make_recipe, tree, write

import recipe

SHIPPED = sorted((ROOT / "recipes").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path, tmp_path):
    loaded = recipe.load(path)
    (tmp_path / "again.json").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "again.json") == loaded


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_recipe().epochs = 3


ERRORS = [  # (change, what the error says after the file's name)
    (dict(epoch=5), "unknown key 'epoch', did you mean 'epochs'?"),
    (dict(students__0__lr="5e-3"), "students[0].lr: expected a number, got '5e-3'"),
    (dict(students__0__lr=True), "students[0].lr: expected a number, got True"),
    (dict(students__0__lr=-0.1), "students[0].lr: expected a number >= 0, got -0.1"),
    (dict(students__0__weigth_decay=0), "students[0]: unknown key 'weigth_decay', did you mean 'weight_decay'?"),
    (dict(students__0__name="../x"), "students[0].name: expected a name of a-z, 0-9, '.', '_', '-' (at most 64, first a letter "
     "or digit), got '../x'"),
    (dict(students__0__hard__smoothing=1.5), "students[0].hard.smoothing: expected a number from 0 to 1, got 1.5"),
    (dict(students__0__hard="ce"), "students[0].hard: expected an object, got 'ce'"),
    (dict(students__0__soft={"loss": "kd"}), "students[0].soft: missing key 'weight'"),
    (dict(students=[]), "students: expected a list that is not empty, got []"),
    (dict(students={}), "students: expected a list that is not empty, got {}"),
    (dict(epochs=0), "epochs: expected a whole number >= 1, got 0"),
    (dict(epochs=240.0), "epochs: expected a whole number, got 240.0"),
    (dict(epochs=None), "epochs: expected a whole number, got None"),
    (dict(about=""), "about: expected a text that is not empty, got ''"),
    (dict(about=3), "about: expected a text, got 3"),
    (dict(data__streaming="off"), "data.streaming: expected true or false, got 'off'"),
    (dict(data__hflip=2), "data.hflip: expected a number from 0 to 1, got 2.0"),
    (dict(data__crop={"kind": "padd", "padding": 4}), "data.crop: expected an object with \"kind\": \"pad\" or \"kind\": \"resized\", "
     "got {'kind': 'padd', 'padding': 4}, did you mean 'pad'?"),
    (dict(data__crop=None), 'data.crop: expected an object with "kind": "pad" or "kind": "resized", got None'),
    (dict(data__interpolation="bicubc"), "data.interpolation: expected 'bilinear' or 'bicubic', got 'bicubc', did you mean 'bicubic'?"),
    (dict(schedule__per=1), "schedule.per: expected 'epoch' or 'step', got 1"),
    (dict(batch_size=100), "batch_size 100 is not a multiple of batch_size_per_process 64"),
    (dict(schedule__warmup_epochs=3), "schedule.warmup_epochs: 3 is more than epochs, 2"),
    (dict(schedule={"kind": "milestones", "milestones": [3, 2], "factor": 0.1}), "schedule.milestones: expected ascending epochs, "
     "got [3, 2]"),
    (dict(data__mixup=0.1), "data: mixup and cutmix pair the images of a batch: batch_size_per_process must be even and drop_last true"),
    (dict(data__streaming=True), "data: a stream has no length: give train_size, and set drop_last to true"),
    (dict(data__shuffle_buffer=5), "data.shuffle_buffer: expected 0 without streaming, got 5"),
    (dict(data__crop={"kind": "resized", "scale": [1, 0.1], "ratio": [1, 1], "interpolation": "random"}),
     "data.crop.scale: expected 0 < low <= high, got [1.0, 0.1]"),
    (dict(students=[STUDENT]), "students ['kd'] have a distillation loss ('soft') but teacher is null"),
    (dict(teacher={"recipe": "x.json"}), "teacher: no student has a distillation loss ('soft'): set teacher to null"),
    (dict(students=[STUDENT], teacher={"model": "a", "pretrained": True, "checkpoint": "b"}), "teacher: expected one of recipe, checkpoint, pretrained; got checkpoint and pretrained"),
    (dict(students=[dict(STUDENT, ema=0.9), dict(STUDENT, name="kd-ema")]), "students: names must differ, also from NAME-ema of a student with ema; got ['kd', 'kd-ema', 'kd-ema']"),
    (dict(students=[STUDENT], teacher={"checkpoint": "x"}), "teacher: expected recipe, or a model with checkpoint or pretrained"),
    (dict(students__0__mean=[0.5, 0.5, 0.5]), "students[0]: give both mean and std, or neither"),
    (dict(students=[dict(STUDENT, soft=None)] * 2), "students: names must differ, also from NAME-ema of a student with ema; got ['kd', 'kd']"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_errors_by_exact_text(change, message, tmp_path):
    path = write(tmp_path / "r.json", **change)
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load(path)
    assert f"{path}: {message}" in str(caught.value).splitlines()


def test_all_errors_of_a_file_at_once(tmp_path):
    path = write(tmp_path / "r.json", epoch=5, seed="x", students__0__lr=-1, data__size=0)
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load(path)
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    "text, message",
    [
        (b'{"epochs": 1, "epochs": 2}', "duplicate key 'epochs'"),
        (b'{"seed": NaN}', "NaN is not a finite number"),
        (b'{"seed": 1e999}', "1e999 is not a finite number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not a JSON file"),
        (b"[" * 100000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested deeper than 32 levels"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[1, 2]", "the recipe: expected an object, got [1, 2]"),
        (b"", "not a JSON file"),
        (b"learning_rate: 5e-3", "not a JSON file"),
        (b" " * (2**20 + 1), "larger than 1048576 bytes"),
    ],
    ids=range(11),
)
def test_not_quite_json(text, message, tmp_path):
    (tmp_path / "r.json").write_bytes(text)
    with pytest.raises(recipe.RecipeError, match=message.replace("[", r"\[")):
        recipe.load(tmp_path / "r.json")


def test_missing_file_names_the_nearest():
    with pytest.raises(
        recipe.RecipeError, match=r"quickstrat.json: cannot be read: No such file.*did you mean 'quickstart.json'"
    ):
        recipe.load(ROOT / "recipes" / "quickstrat.json")


def test_overrides_go_through_the_same_checks(tmp_path):
    path = write(tmp_path / "r.json")
    changed = recipe.load(
        path, ["epochs=7", "students.0.lr=3e-3", "students.0.optimizer=lamb", "data.rand_augment=rand-m7-mstd0.5"]
    )
    assert (changed.epochs, changed.students[0].lr, changed.students[0].optimizer) == (7, 3e-3, "lamb")
    for override, message in [
        ("epochs=seven", "epochs: expected a whole number, got 'seven'"),
        ("students.1.lr=1", "--set students.1.lr=1: '1' is not one of ['alone']"),
        ("students.0.lrr=1", "students[0]: unknown key 'lrr', did you mean 'lr'?"),
        ("students.0.soft.weight=1", "--set students.0.soft.weight=1: nothing called 'weight' can be set in None"),
        ("epochs", "--set epochs: expected path=value, for example students.kd.lr=0.1"),
        ("epochs.x=1", "--set epochs.x=1: nothing called 'x' can be set in 2"),
    ]:
        with pytest.raises(recipe.RecipeError) as caught:
            recipe.load(path, [override])
        assert str(caught.value) == f"{path}: {message}"


def mutate(node, chance):
    """One random edit somewhere in a JSON tree."""
    junk = [
        None,
        True,
        -1,
        0,
        10**30,
        1.5,
        "",
        "x",
        "../..",
        [],
        {},
        [[]],
        {"a": 1},
        "\x00",
        "rand-m7",
        float("1e308"),
        [None] * 3,
    ]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = chance.choice(keys)
    if isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.7:
        return mutate(node[key], chance)
    action = chance.random()
    if action < 0.6:
        node[key] = copy.deepcopy(chance.choice(junk))
    elif action < 0.8:
        del node[key]
    elif isinstance(node, dict):
        node[str(key) + chance.choice("xs_ ")] = node.pop(key)
    else:
        node.append(copy.deepcopy(node[key]))


def test_no_random_edit_gives_a_traceback(tmp_path):
    """Loaded or refused with a RecipeError: nothing else may come out."""
    chance, path, refused = random.Random(0), tmp_path / "r.json", 0
    for i in range(1500):
        if i % 3 == 0:
            edited = json.loads(chance.choice(SHIPPED).read_text())
        else:
            edited = tree(students=[STUDENT, dict(STUDENT, name="b")], teacher={"recipe": "t.json"})
        for _ in range(chance.randint(1, 3)):
            mutate(edited, chance)
        path.write_text(json.dumps(edited))
        try:
            assert isinstance(recipe.load(path), recipe.Recipe)
        except recipe.RecipeError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > 1000  # the edits do bite


def test_no_random_bytes_give_a_traceback(tmp_path):
    chance, path, good = random.Random(1), tmp_path / "r.json", json.dumps(RECIPE).encode()
    for _ in range(500):
        raw = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            position = chance.randrange(len(raw))
            raw[position : position + chance.randrange(3)] = bytes([chance.randrange(256)])
        path.write_bytes(raw)
        with contextlib.suppress(recipe.RecipeError):
            recipe.load(path)


def test_bad_input_exits_with_2_and_no_traceback(tmp_path):
    path = write(tmp_path / "r.json", epoch=5)
    out = subprocess.run([sys.executable, ROOT / "train.py", path], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 2
    assert out.stderr.strip().endswith(f"error: {path}: unknown key 'epoch', did you mean 'epochs'?")
    assert "Traceback" not in out.stderr


def test_write_atomic_leaves_the_old_text_when_it_fails(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        recipe.write_atomic(tmp_path / "f", "new \ud800")
    assert (tmp_path / "f").read_text() == "old"
