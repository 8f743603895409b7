"""recipe.py: every shipped recipe loads, errors by their exact text, and no edit of a recipe gives a
traceback.
"""

import contextlib
import copy
import dataclasses
import json
import pickle
import random
import subprocess
import sys

import pytest
from conftest import RECIPE, RECIPES, ROOT, STUDENT, make_recipe, tree, write

import recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path, tmp_path):
    loaded = recipe.load(path)
    (tmp_path / "again.json").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "again.json") == loaded


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_recipe().epochs = 3


def test_what_other_modules_do_with_a_recipe():
    settings = make_recipe(students=[STUDENT, dict(STUDENT, name="b")], teacher={"recipe": "t.json"})
    one = dataclasses.replace(settings, seed=3, runs=1, students=settings.students[1:], teacher=None)
    assert (one.seed, one.runs, [s.name for s in one.students]) == (3, 1, ["b"])
    assert one.students[0] is settings.students[1] and one.data is settings.data  # not copied
    assert one != settings and dataclasses.replace(
        one, seed=1, students=settings.students
    ) == dataclasses.replace(settings, teacher=None)
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(settings.data) == hash(dataclasses.replace(settings.data))
    with pytest.raises(TypeError, match="unhashable"):
        hash(settings.students[0])
    assert dataclasses.asdict(settings) == json.loads(recipe.dump(settings)) | {
        "students": tuple(dataclasses.asdict(s) for s in settings.students)
    }


@pytest.mark.parametrize(
    "wrong", [{"epochs": "3"}, {"epochs": 3.0}, {"students": ()}, {"data": {}}, {"teacher": 3}], ids=str
)
def test_a_change_in_code_is_checked_too(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(make_recipe(), **wrong)


def test_integers_become_floats(tmp_path):
    loaded = recipe.load(
        write(tmp_path / "r.json", students__0__lr=1, students__0__model_args={"a": [1, 2.5, {"b": None}]})
    )
    assert type(loaded.students[0].lr) is float
    assert (
        repr(loaded.students[0].model_args) == "{'a': [1, 2.5, {'b': None}]}"
    )  # free values stay as they are
    lr = 0.1 + 0.2
    assert recipe.load(write(tmp_path / "r.json", students__0__lr=lr)).students[0].lr == lr  # to the last bit


ERRORS = [  # (change, what the error says after the file's name)
    (dict(epoch=5), "unknown key 'epoch', did you mean 'epochs'?"),
    (dict(students__0__lr="5e-3"), "students[0].lr: expected a valid number, got '5e-3'"),
    (dict(students__0__lr=True), "students[0].lr: expected a valid number, got True"),
    (dict(students__0__lr=-0.1), "students[0].lr: expected a number >= 0, got -0.1"),
    (dict(students__0__weigth_decay=0),
        "students[0]: unknown key 'weigth_decay', did you mean 'weight_decay'?"),
    (dict(students__0__name="../x"),
        "students[0].name: expected a name of a-z, 0-9, '.', '_', '-' (at most 64, first a letter "
     "or digit), got '../x'"),
    (dict(students__0__hard__smoothing=1.5),
        "students[0].hard.smoothing: expected a number <= 1, got 1.5"),
    (dict(students__0__hard="ce"), "students[0].hard: expected an object, got 'ce'"),
    (dict(students__0__soft={"loss": "kd"}), "students[0].soft: missing key 'weight'"),
    (dict(students=[]), "students: expected a list of at least 1, got []"),
    (dict(students={}), "students: expected a valid array, got {}"),
    (dict(epochs=0), "epochs: expected a number >= 1, got 0"),
    (dict(epochs=240.0), "epochs: expected a valid integer, got 240.0"),
    (dict(epochs=None), "epochs: expected a valid integer, got None"),
    (dict(about=""), "about: expected a text that is not empty, got ''"),
    (dict(about=3), "about: expected a valid string, got 3"),
    (dict(data__streaming="off"), "data.streaming: expected a valid boolean, got 'off'"),
    (dict(data__hflip=2), "data.hflip: expected a number <= 1, got 2"),
    (dict(data__crop={"kind": "padd", "padding": 4}),
        "data.crop: expected \"kind\" to be one of 'pad', 'resized', "
     "got {'kind': 'padd', 'padding': 4}"),
    (dict(data__crop=None), "data.crop: expected an object, got None"),
    (dict(data__interpolation="bicubc"),
        "data.interpolation: expected 'bilinear' or 'bicubic', got 'bicubc'"),
    (dict(schedule__per=1), "schedule.per: expected 'epoch' or 'step', got 1"),
    (dict(batch_size=100), "batch_size 100 is not a multiple of batch_size_per_process 64"),
    (dict(schedule__warmup_epochs=3), "schedule.warmup_epochs: 3 is more than epochs, 2"),
    (dict(schedule={"kind": "milestones", "milestones": [3, 2], "factor": 0.1}),
        "schedule.milestones: expected ascending epochs, "
     "got [3, 2]"),
    (dict(data__mixup=0.1),
        "data: mixup and cutmix pair images: batch_size_per_process must be even and drop_last true"),
    (dict(data__streaming=True),
        "data: a stream needs its train_size, drop_last true, and a shuffle_buffer of at least 1"),
    (dict(data__shuffle_buffer=5), "data.shuffle_buffer: expected 0 without streaming, got 5"),
    (dict(data__crop={"kind": "resized", "scale": [1, 0.1], "ratio": [1, 1], "interpolation": "random"}),
     "data.crop.scale: expected 0 < low <= high, got [1.0, 0.1]"),
    (dict(students=[STUDENT]), "students ['kd'] have a distillation loss ('soft') but teacher is null"),
    (dict(teacher={"recipe": "x.json"}),
        "teacher: no student has a distillation loss ('soft'): set teacher to null"),
    (dict(students__0__pretrained=True, students__0__weights="b"),
        "students[0]: expected one origin of the weights, got pretrained and weights"),
    (dict(students=[STUDENT], teacher={"model": "a", "pretrained": True, "checkpoint": "b"}),
        "teacher: expected one origin of the weights, got checkpoint and pretrained"),
    (dict(students=[dict(STUDENT, ema=0.9), dict(STUDENT, name="kd-ema")]),
        "students: names must differ, also from NAME-ema of a student with ema; got ['kd', 'kd-ema', "
        "'kd-ema']"),
    (dict(students=[STUDENT], teacher={"checkpoint": "x"}),
        "teacher: expected recipe, or a model with checkpoint or pretrained"),
    (dict(students__0__mean=[0.5, 0.5, 0.5]), "students[0]: give both mean and std, or neither"),
    (dict(students__0__mean=[]), "students[0].mean: expected a list of at least 1, got []"),
    (dict(students__0__mean=[0.5, "x"]), "students[0].mean[1]: expected a valid number, got 'x'"),
    (dict(data__crop={"padding": 4}), "data.crop: expected an object with \"kind\", got {'padding': 4}"),
    (dict(data__crop={"kind": ["pad"], "padding": 4}),
        "data.crop: expected \"kind\" to be one of 'pad', 'resized', "
     "got {'kind': ['pad'], 'padding': 4}"),
    (dict(data__crop={"kind": "pad", "padding": -1}),
        "data.crop.padding: expected a number >= 0, got -1"),
    (dict(data__crop={"kind": "pad", "pading": 1}),
        "data.crop: unknown key 'pading', did you mean 'padding'?"),
    (dict(data__crop={"kind": "resized", "scale": [1], "ratio": [1, 1], "interpolation": "random"}),
     "data.crop.scale: expected a list of at least 2, got [1]"),
    (dict(data__crop={"kind": "resized", "scale": [1, 1], "ratio": [1, 1, 1], "interpolation": "random"}),
     "data.crop.ratio: expected a list of at most 2, got [1, 1, 1]"),
    (dict(data__crop={"kind": "resized", "scale": [1, 1], "ratio": [1, -1], "interpolation": "random"}),
     "data.crop.ratio[1]: expected a number >= 0, got -1"),
    (dict(schedule={"kind": "milestones", "milestones": [3, 0], "factor": 0.1}),
        "schedule.milestones[1]: expected a number >= 1, got 0"),
    (dict(data__pipeline="fast"),
        "data.pipeline: 'fast' needs crop 'resized', RandAugment or none; got crop 'pad' and rand_augment "
     "None: set it to 'timm'"),
    (dict(data__pipeline="fast", data__rand_augment="augmix-m3", data__crop={"kind": "resized",
        "scale": [1, 1], "ratio": [1, 1], "interpolation": "random"}),
        "data.pipeline: 'fast' needs crop 'resized', RandAugment or none; got crop 'resized' and "
        "rand_augment 'augmix-m3': set it to 'timm'"),
    (dict(data__resident=True, data__rand_augment="rand-m7"),
        "data.resident: it needs crop 'pad' and rand_augment null; got crop 'pad' and rand_augment "
        "'rand-m7': set resident to false"),
    (dict(data__resident=True, data__crop={"kind": "resized", "scale": [1, 1], "ratio": [1, 1],
        "interpolation": "random"}),
        "data.resident: it needs crop 'pad' and rand_augment null; got crop 'resized' and rand_augment "
        "None: set resident to false"),
    (dict(data__resident=True, data__streaming=True),
        "data: resident and fraction need all images: set streaming to false, shuffle_buffer to 0"),
    (dict(data__streaming=True, data__fraction=0.5),
        "data: resident and fraction need all images: set streaming to false, shuffle_buffer to 0"),
    (dict(teacher={"recipe": "x.json", "size": 3}, students=[STUDENT]),
        "teacher: with recipe, model_args, size, mean and std come from that recipe"),
    (dict(students=[dict(STUDENT, soft=None)] * 2),
        "students: names must differ, also from NAME-ema of a student with ema; got ['kd', 'kd']"),
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
        recipe.load(path, ["epochs"])
    assert sorted(str(caught.value).splitlines()) == [
        f"{path}: --set epochs: expected path=value, for example students.kd.lr=0.1",
        f"{path}: data.size: expected a number >= 1, got 0",
        f"{path}: seed: expected a valid integer, got 'x'",
        f"{path}: students[0].lr: expected a number >= 0, got -1",
        f"{path}: unknown key 'epoch', did you mean 'epochs'?",
    ]


REMOVED = [("data", "rand_augment_on", "cpu", "device"), ("teacher", "memo", None, "disk")]


@pytest.mark.parametrize("section, key, harmless, other", REMOVED, ids=["rand_augment_on", "memo"])
def test_removed_options(section, key, harmless, other, tmp_path):
    path, old = tmp_path / "r.json", tree(teacher={"recipe": "t.json"}, students=[STUDENT])
    path.write_text(json.dumps(old))
    without = recipe.load(path)

    old[section][key] = harmless
    path.write_text(json.dumps(old))
    assert recipe.load(path) == without
    assert key not in recipe.dump(recipe.load(path))
    recipe.drop_removed(old)
    assert key not in old[section]

    message = f"{path}: {section}.{key}: this option was removed: leave the key out"
    for value in (other, 0, False):
        old[section][key] = value
        path.write_text(json.dumps(old))
        with pytest.raises(recipe.RecipeError) as caught:
            recipe.load(path)
        assert str(caught.value) == message
    path.write_text(recipe.dump(without))
    for value in (harmless, other):
        with pytest.raises(recipe.RecipeError) as caught:
            recipe.load(path, [f"{section}.{key}={json.dumps(value)}"])
        assert str(caught.value) == message


@pytest.mark.parametrize(
    "text, message",
    [
        (b'{"epochs": 1, "epochs": 2}', "duplicate key 'epochs'"),
        (b'{"seed": NaN}', "nan is not a finite number"),
        (b'{"seed": 1e999}', "inf is not a finite number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not a JSON file"),
        (b"[" * 100000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested deeper than 32 levels"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[1, 2]", "expected an object, got [1, 2]"),
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
        recipe.RecipeError,
        match=r"quickstrat.json: cannot be read: No such file.*did you mean 'quickstart.json'",
    ):
        recipe.load(ROOT / "recipes" / "quickstrat.json")
    with pytest.raises(recipe.RecipeError, match=r"No such file .*, did you mean .*recipes/quickstart"):
        recipe.load("quickstart.json")


def test_overrides_go_through_the_same_checks(tmp_path):
    path = write(tmp_path / "r.json")
    changed = recipe.load(
        path,
        ["epochs=7", "students.0.lr=3e-3", "students.0.optimizer=lamb", "data.rand_augment=rand-m7-mstd0.5"],
    )
    assert (changed.epochs, changed.students[0].lr, changed.students[0].optimizer) == (7, 3e-3, "lamb")
    two = write(
        tmp_path / "two.json", teacher={"recipe": "t.json"}, students=[STUDENT, dict(STUDENT, name="b")]
    )
    assert [s.lr for s in recipe.load(two, ["students.kd.lr=1", "students.b.lr=2"]).students] == [1, 2]
    assert [s.name for s in recipe.load(two, ["students.1.name=c"]).students] == ["kd", "c"]
    with pytest.raises(recipe.RecipeError, match=r"students\[0\].name: expected a valid string, got \[\]"):
        recipe.load(two, ["students.0.name=[]", "students.b.lr=2"])
    for override, message in [
        ("epochs=seven", "epochs: expected a valid integer, got 'seven'"),
        ("students.1.lr=1", "--set students.1.lr=1: '1' is not one of ['0', 'alone']"),
        ("students.0.lrr=1", "students[0]: unknown key 'lrr', did you mean 'lr'?"),
        (
            "students.0.soft.weight=1",
            "--set students.0.soft.weight=1: nothing called 'weight' can be set in None",
        ),
        ("epochs", "--set epochs: expected path=value, for example students.kd.lr=0.1"),
        ("epochs.x=1", "--set epochs.x=1: nothing called 'x' can be set in 2"),
    ]:
        with pytest.raises(recipe.RecipeError) as caught:
            recipe.load(path, [override])
        assert str(caught.value) == f"{path}: {message}"


HOSTILE = [  # (text of the file, what the error says): none gives a traceback or prints a control character
    (json.dumps(tree(seed=10**400)), "seed: expected a number <= 9.22337e+18, got 1000"),
    (json.dumps(tree(data__train_size=10**400)),
        "data.train_size: expected a number <= 9.22337e+18, got 1000"),
    (json.dumps(tree(data__mixup=10**400)), "data.mixup: expected a finite number, got 1000"),
    (json.dumps(tree(about="\ud800")), r"""expected text that UTF-8 can encode, got '{"about": "\ud800'"""),
    (json.dumps(tree(students__0__model_args={"\udfff": 1})), r"expected text that UTF-8 can encode"),
    (json.dumps(tree(students__0__name="a\x1b[31m")), r"got 'a\x1b[31m'"),
    (json.dumps(tree(students__0__name="a\n")), r"got 'a\n'"),
    (json.dumps(tree() | {"\x1b[31m": 1}), r"unknown key '\x1b[31m'"),
    (json.dumps(tree() | {"x" * 10000: 1}), "unknown key 'xxx"),
    (json.dumps(tree(students__0__model_args={"\x1b": 7})).replace("7", '{"a": 1, "a": 2}'),
        "not a JSON file: duplicate key 'a'"),
    (json.dumps(tree() | {"data": [[]] * 9000}), "data: expected an object, got [[], [], "),
    (json.dumps(tree(schedule={"kind": {"kind": {}}})),
        "schedule: expected \"kind\" to be one of 'milestones', 'cosine'"),
    (json.dumps(tree(schedule={"kind": "{x}"})), "schedule: expected \"kind\" to be one of"),
    (json.dumps(tree(students__0__optimizer_args={"a": 1})).replace('"a": 1', '"a": 1e999'),
        "inf is not a finite number"),
    (json.dumps(tree(teacher={"model": {}, "pipeline": "{}"})), "teacher: unknown key 'pipeline'"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files(text, message, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load(tmp_path / "r.json")
    assert message in str(caught.value)
    assert all(line.isprintable() and len(line) < 400 for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    "override, message",
    [
        ("students." + "9" * 5000 + ".lr=1", "is not one of ['0', 'alone']"),
        ("epochs=" + "9" * 5000, "epochs: expected a valid integer, got '999"),
        ("about=\udcff", "expected text that UTF-8 can encode"),
        ("teacher=" + "[" * 100000, "teacher: expected an object, got '[[["),
        ("data.crop=[1]", "data.crop: expected an object, got [1]"),
        ("data.\x1b.a=1", r"--set data.\x1b.a=1: nothing called 'a' can be set in None"),
        ('data.crop={"kind": "pad", "padding": 1, "padding": 2}', "data.crop: expected an object, got "),
    ],
    ids=range(7),
)
def test_hostile_overrides(override, message, tmp_path):
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load(write(tmp_path / "r.json"), [override])
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a\0b.json", "\ud800.json", "a\x1b.json", "x" * 5000, "."], ids=ascii)
def test_hostile_paths(name, tmp_path):
    with pytest.raises(recipe.RecipeError, match=r"cannot be read|not a file") as caught:
        recipe.load(tmp_path / name)
    assert str(caught.value).isprintable()


def test_nearest():
    assert recipe.nearest("epoch", ["seed", "epochs"]) == ", did you mean 'epochs'?"
    assert recipe.nearest("xyz", ["seed", "epochs"]) == recipe.nearest("", []) == ""


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
            edited = json.loads(chance.choice(RECIPES).read_text())
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


@pytest.mark.slow
def test_bad_input_exits_with_2_and_no_traceback(tmp_path):
    """In a process of its own; in this one, `stopped` of conftest.py looks at exit codes and messages."""
    path = write(tmp_path / "r.json", epoch=5)
    out = subprocess.run(
        [sys.executable, ROOT / "train.py", path], capture_output=True, text=True, cwd=tmp_path
    )
    assert out.returncode == 2
    assert out.stderr.strip().endswith(f"error: {path}: unknown key 'epoch', did you mean 'epochs'?")
    assert "Traceback" not in out.stderr
