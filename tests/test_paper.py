"""The recipes against the paper (results/paper.json): settings, claimed cells, and a command for every cell
that is a run.
"""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import RECIPES, ROOT

import detect
import distill
import losses
import models  # noqa: F401  registers the CIFAR ResNets
import recipe
import train

spec = importlib.util.spec_from_file_location("paper", ROOT / "tools" / "paper.py")
paper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper)

PAPER = json.loads((ROOT / "results" / "paper.json").read_text())
LISTED = {r["stem"]: r for r in PAPER["recipes"] if r["family"] not in ("coco", "quoted")}
RUNS = [
    cell
    for cell in PAPER["cells"]
    if cell["table"] not in ("11", "fig1", "text")
    and cell["kind"] in ("result", "reference", "not_reported")
    and cell.get("recipe", "quoted_").split("_")[0] != "quoted"
]
HINTS = {"cc", "rkd", "crd", "reviewkd"}
# of every repository; the weights are those of vanillaKD, and for CIFAR-100 of RepDistiller and ReviewKD
HINT_ARGS = {
    "cc": {"dim": 128},
    "rkd": {"distance": 25.0, "angle": 50.0},
    "crd": {"dim": 128, "negatives": 16384, "temperature": 0.07, "momentum": 0.5},
    "reviewkd": {"mid": 512},
}
HINT_WEIGHTS = {
    "cc": (0.02, 0),
    "rkd": (1.0, 0),
    "crd": (1.0, 0),
    "reviewkd": (1.0, 1),
}  # and epochs of warm-up
LABELS = {"cross_entropy": "ce", "binary_cross_entropy": "bce"}
every_recipe = pytest.mark.parametrize("stem", LISTED)


def load(stem, *overrides):
    return recipe.load(ROOT / "recipes" / f"{stem}.json", overrides)


def said(cell):
    """What a cell fixes of its run: as printed, or as its overrides resolve it."""
    printed = {key: cell[key] for key in ("epochs", "lr", "weight_decay", "hard_label_loss") if key in cell}
    if printed.get("epochs") == 90:  # disagreement prev_epochs
        printed["epochs"] = 100
    return printed | {key: value for key, value in cell["overrides"].items() if key != "method"}


def done(settings, student):
    label_loss = LABELS[student.hard.loss] if student.hard.weight else "none"
    return dict(
        epochs=settings.epochs, lr=student.lr, weight_decay=student.weight_decay, hard_label_loss=label_loss
    )


def test_the_files_are_those_of_the_list():
    others = {"quickstart", "quickstart_teacher", "own_images", "own_images_teacher"}
    others |= {"own_images_small", "own_images_small_teacher"}
    others |= {"a2_res50_beitl_lr", "prev_cifar_res20_res56_hints", "prev_cifar_res8x4_res32x4_hints"}
    others |= {"study_fraction_weak", "study_fraction_strong", "study_ablation_cifar"}
    assert {p.stem for p in RECIPES} == set(LISTED) | others
    coco = {recipe["stem"] for recipe in PAPER["recipes"] if recipe["family"] == "coco"}
    assert {p.stem for p in (ROOT / "recipes").glob("coco_*.json")} == coco


# ---------------------------------------------------------------- settings


def family(stem):
    params = PAPER["families"][LISTED[stem]["family"]]["params"]
    return (PAPER["families"][params["like"]]["params"] if "like" in params else {}) | params


@every_recipe
def test_schedule_and_data(stem):
    settings, want, kind = load(stem), family(stem), LISTED[stem]["family"]
    section, cifar = settings.data, kind.startswith("cifar")
    assert settings.seed == want.get("seed", 0) and settings.batch_size == want["batch_size"]
    asked = {
        cell["overrides"]["epochs"]
        for cell in RUNS
        if cell["recipe"] == stem and "epochs" in cell["overrides"]
    }
    assert settings.epochs == (want["epochs"] if want["epochs"] in asked or not asked else min(asked))
    if "milestones" in want:
        expected = recipe.Milestones(
            kind="milestones", milestones=tuple(want["milestones"]), factor=want["gamma"]
        )
    else:
        warmup = {key: want[key] for key in ("warmup_epochs", "warmup_lr", "min_lr")}
        expected = recipe.Cosine(kind="cosine", per="epoch", **warmup)
    assert settings.schedule == expected
    assert section.rand_augment == want.get("rand_augment") and section.hflip == 0.5
    assert (section.mixup, section.cutmix) == (want.get("mixup", 0), want.get("cutmix", 0))
    assert (section.repeats, section.random_erasing) == (
        want.get("repeated_aug", 1),
        want.get("random_erasing", 0),
    )
    if cifar:
        assert section.crop == recipe.PadCrop(kind="pad", padding=4)
        assert (section.classes, section.size, section.train_size, section.crop_pct) == (100, 32, 50000, 1.0)
        return
    crop = {"in1k_prev": "bilinear", "deit_scratch": "bicubic"}.get(kind, "random")
    assert section.crop == recipe.ResizedCrop(
        kind="resized", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=crop
    )
    assert section.interpolation == ("bilinear" if kind == "in1k_prev" else "bicubic")
    assert section.crop_pct == want.get("test_crop_pct", 0.875) and section.size == want.get(
        "train_resolution", 224
    )
    assert (section.classes, section.train_size, section.drop_last) == (1000, 1281167, True)
    assert section.streaming == all(
        student.name != "crd" for student in settings.students
    )  # it needs an id for each image
    assert settings.batch_size == 8 * settings.batch_size_per_process  # the paper's 8 GPUs: what dist sees


@every_recipe
def test_students_and_teacher(stem):
    settings, want, listed = load(stem), family(stem), LISTED[stem]
    teacher, cifar = settings.teacher, listed["family"].startswith("cifar")
    if listed["teacher"] is None:
        assert teacher is None
    elif cifar:
        assert load(teacher.recipe.removesuffix(".json")).students[0].model == listed["teacher"]
    else:
        assert teacher == recipe.Teacher(model=listed["teacher"], pretrained=True)
    for student in settings.students:
        own_recipe = (
            listed["family"] == "in1k_prev" and student.name == "dist"
        )  # DIST's own differs from mdistiller's
        momentum = (
            {"momentum": want.get("momentum"), "nesterov": own_recipe} if want["optimizer"] == "sgd" else {}
        )
        lr = 5e-4 * want["batch_size"] / 512 if want["lr"] == "5e-4*bs/512" else want["lr"]
        drop_path = {"drop_path_rate": want["drop_path"]} if "drop_path" in want else {}
        assert (student.model, student.model_args, student.pretrained) == (
            listed["student"],
            drop_path,
            False,
        )
        assert (student.optimizer, student.optimizer_args) == (want["optimizer"], momentum)
        assert (student.lr, student.weight_decay, student.clip_grad, student.ema) == (
            lr,
            want["weight_decay"],
            None,
            None,
        )
        assert student.decay_norm_and_bias == (want["optimizer"] == "sgd" and not own_recipe)
        hard_weight, soft = terms(stem, student.name, want)
        label_loss = "ce" if student.name in HINTS else want["hard_label_loss"]
        assert LABELS[student.hard.loss] == label_loss
        assert (student.hard.weight, student.hard.smoothing) == (hard_weight, want.get("label_smoothing", 0))
        assert student.soft == (
            hint_term(student.name, *HINT_WEIGHTS[student.name]) if student.name in HINTS else soft
        )


def hint_term(name, weight, warmup_epochs):
    return recipe.Soft(loss=name, weight=weight, warmup_epochs=warmup_epochs, args=HINT_ARGS[name])


@pytest.mark.parametrize(
    "stem, reviewkd", [("prev_cifar_res20_res56", 0.6), ("prev_cifar_res8x4_res32x4", 5.0)]
)
def test_the_classic_recipes_of_the_hint_losses(stem, reviewkd):
    """All but the losses is the classic recipe of the same pair."""
    settings, classic = load(f"{stem}_hints"), load(stem)
    weights = {"cc": (0.02, 0), "rkd": (1.0, 0), "crd": (0.8, 0), "reviewkd": (reviewkd, 20)}
    assert (
        dataclasses.replace(settings.students[0], paper=classic.students[0].paper) == classic.students[0]
    )  # kd, to compare
    for student in settings.students[1:]:
        assert student.soft == hint_term(student.name, *weights[student.name])
        assert student.hard == recipe.Hard(loss="cross_entropy", weight=1.0, smoothing=0.0)
        like = dict(
            name="kd",
            soft=classic.students[0].soft,
            hard=classic.students[0].hard,
            paper=classic.students[0].paper,
        )
        assert dataclasses.replace(student, **like) == classic.students[0]
    assert [student.name for student in settings.students] == ["kd", *weights]
    same = dict(about=classic.about, teacher=classic.teacher, students=classic.students)
    assert dataclasses.replace(settings, **same) == classic
    assert settings.teacher == dataclasses.replace(
        classic.teacher, preactivation=True
    )  # mdistiller and ReviewKD


def terms(stem, name, want):
    """(weight of the label term, distillation term) as a family writes them."""
    if name == "scratch" or name in HINTS:
        return 1.0, None
    own = want.get(name)
    if not isinstance(own, dict):  # A1 and A2: vanillaKD's defaults
        args = {
            "kd": {},
            "dkd": dict(zip(("alpha", "beta"), want["dkd"], strict=True)),
            "bkl": {"reduction": "mean"},
        }
        args["dist"] = dict(zip(("beta", "gamma"), want["dist"], strict=True))
        temperature = {} if name == "bkl" else {"temperature": want["temperature"]}
        term = recipe.Soft(
            loss=name, weight=want["kd_weight"], warmup_epochs=0, args=args[name] | temperature
        )
        return want["hard_label_weight"], term
    args = {"temperature": own["T"]}
    if name == "dkd":
        pair = {"res20_res56": "res56-res20", "res8x4_res32x4": "res32x4-res8x4", "res18_res34": "R34-R18"}
        pair = pair.get("_".join(stem.split("_")[-2:]), "R50-MBV1")
        args |= {"alpha": own["alpha"], "beta": float(re.search(rf"([\d.]+) \({pair}\)", own["beta"])[1])}
    elif name == "dist":
        args |= {"beta": 1.0, "gamma": 1.0}
    weight = own.get("kl", own.get("w", 1))
    return own["ce"], recipe.Soft(
        loss=name, weight=weight, warmup_epochs=own.get("warmup_epochs", 0), args=args
    )


@pytest.mark.parametrize("stem", [stem for stem, r in LISTED.items() if r["family"] in ("A1", "A2")])
def test_table_2(stem):
    """Its cells, as printed, against the files; `amp` belongs to `accelerate launch`."""
    settings = load(stem)
    section, schedule = settings.data, settings.schedule
    for student in settings.students:
        ours = {
            "teacher_resolution": (settings.teacher and settings.teacher.size) or section.size,
            "student_resolution": section.size,
            "batch_size": settings.batch_size,
            "optimizer": student.optimizer,
            "lr": student.lr,
            "lr_decay": schedule.kind,
            "warmup_epochs": schedule.warmup_epochs,
            "amp": True,
            "ema": student.ema is not None,
            "label_loss": "bce"
            if student.name in HINTS
            else LABELS[student.hard.loss],  # disagreement hint_label_loss
            "weight_decay": student.weight_decay,
            "label_smoothing": student.hard.smoothing,
            "drop_path": student.model_args["drop_path_rate"],
            "repeated_aug": section.repeats,
            "hflip": section.hflip == 0.5,
            "random_resized_crop": section.crop.kind == "resized",
            "rand_augment": section.rand_augment.removeprefix("rand-m").replace("-mstd", "/"),
            "mixup_alpha": section.mixup,
            "cutmix_alpha": section.cutmix,
        }
        strategies = ("common", LISTED[stem]["strategy"])
        printed = {
            c["metric"]: c["value"]
            for c in PAPER["cells"]
            if c["table"] == "2" and c["strategy"] in strategies
        }
        assert ours == printed


def test_networks_losses_and_optimizers_exist():
    pretrained, built = set(timm.list_pretrained()), set()
    for settings in map(load, LISTED):
        if settings.teacher and settings.teacher.pretrained:
            config = timm.get_pretrained_cfg(settings.teacher.model)
            assert settings.teacher.model in pretrained
            assert (config.num_classes, config.input_size[-1]) == (settings.data.classes, settings.data.size)
        for student in settings.students:
            losses.make_loss(student.hard.loss, losses.LABEL_LOSSES, smoothing=student.hard.smoothing)
            if student.soft:
                losses.make_loss(student.soft.loss, **student.soft.args)
            timm.optim.get_optimizer_class(student.optimizer)
            if (key := (student.model, *student.model_args.items())) not in built:
                built.add(key)
                with torch.device("meta"):
                    timm.create_model(student.model, num_classes=settings.data.classes, **student.model_args)
    tags = [
        shlex.split(paper.command(cell))[2]
        for cell in paper.cells()
        if cell["table"] != "11" and paper.command(cell).startswith("python evaluate.py")
    ]
    assert len(tags) == 11 and set(tags) <= pretrained


# ---------------------------------------------------------------- cells


@every_recipe
def test_the_cells_a_file_reaches_as_it_stands(stem):
    settings = load(stem)
    for student in settings.students:
        own = [
            c
            for c in RUNS
            if c["recipe"] == stem and c.get("method", "scratch") == student.name and "value" in c
        ]
        reached = {c["id"]: c["value"] for c in own if said(c).items() <= done(settings, student).items()}
        assert (student.paper or {}) == reached
    claimed = [cell for student in settings.students for cell in student.paper or ()]
    assert claimed, f"{stem} reaches no cell of the paper as it stands"


@every_recipe
def test_the_about_names_the_tables(stem):
    named = re.match(r"Paper Tables? ([0-9ab, and]+)", load(stem).about)[1]
    covered = {key.split()[0] for key in LISTED[stem]["covers"] if not key.startswith("fig")}
    assert set(re.findall(r"\d+[ab]?", named)) == covered


def test_every_cell_that_is_a_run_has_its_command(monkeypatch):
    """The command, through train.py's own parser, gives the settings that the cell says."""
    monkeypatch.chdir(ROOT)
    parsed, folders = [], {}
    monkeypatch.setattr(train, "run_recipe", lambda *arguments: parsed.append(arguments))
    for cell in RUNS:
        training, *evaluation = paper.command(cell).split(" && ")
        launcher, arguments = training.split(" train.py ")
        assert launcher == "accelerate launch"
        train.main(shlex.split(arguments))
        path, overrides, out, options = parsed.pop()
        settings = train.load(path, overrides, options)
        (student,) = settings.students
        assert path.stem == cell["recipe"] and options.resume and not options.limit
        assert said(cell).items() <= done(settings, student).items(), cell["id"]
        assert student.name == cell.get("method", "scratch")
        assert student.soft is None if student.name == "scratch" else student.soft.loss == student.name
        assert student.model == cell.get("student", cell.get("teacher"))
        on = {"imagenet-real": " --on real", "imagenet-v2": " --on v2 --v2 DIR"}.get(cell["dataset"])
        assert evaluation == ([f"python evaluate.py {out}{on}"] if on else [])
        assert folders.setdefault(out, settings) == settings  # a folder is one run
    assert len(folders) == len(
        {recipe.dump(settings) for settings in folders.values()}
    )  # and a run one folder


# ---------------------------------------------------------------- tools/paper.py


def show(capsys, *arguments):
    paper.main([str(a) for a in arguments])
    return capsys.readouterr().out


def table(name, folder=ROOT / "results"):
    students = paper.trained(paper.read_records(folder))
    cells = paper.cells(None if name == "all" else name)
    return {cell["id"]: {k: str(v) for k, v in paper.row(cell, students).items()} for cell in cells}


def test_a_table(capsys):
    text = show(capsys, "3")
    name, out = "t3.a1.res152.kd.1200.real", "runs/a1_res50_res152.kd.epochs-1200"
    line = (
        f"| {name} | resnet50 | resnet152.a1h_in1k | kd | 1200 | 0.005 | 0.01 | bce | imagenet-real | 86.86 "
        f"| not run |  | "
    )
    line += "`accelerate launch train.py recipes/a1_res50_res152.json --students kd --set epochs=1200 "
    line += f"--out {out} --resume && python evaluate.py {out} --on real` |"
    assert line in text.splitlines()
    assert "- hint_label_loss (" in text and "- bkl (" not in text
    assert "| t2.a2.rand_augment | rand_augment | 7/0.5 |" in show(capsys, "2")


def test_all_tables():
    rows = table("all")
    assert list(rows) == [cell["id"] for cell in PAPER["cells"] if cell["table"] not in ("fig1", "text")]
    assert rows["t8.vitt.300"]["paper"] == "-" and "--set epochs=300" in rows["t8.vitt.300"]["command"]
    without = {c["kind"] for c in PAPER["cells"] if c["id"] in rows and not rows[c["id"]]["command"]}
    assert without == {"setting", "hours", "delta", "not_reported"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["12"], "invalid choice: '12' (choose from"), (["3", "--results", "no"], "no such")],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        paper.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def record(stem, top1, seed=0, overrides=(), **more):
    """What train.py's write_result leaves of a run."""
    settings = json.loads(
        recipe.dump(recipe.load(ROOT / "recipes" / f"{stem}.json", [f"seed={seed}", *overrides]))
    )
    students = [{"name": s["name"], "last": {"top1": top1 + i}} for i, s in enumerate(settings["students"])]
    return {"seed": seed, "limit": None, "recipe": settings, "students": students} | more


def test_our_numbers_are_found_by_their_settings(tmp_path):
    stem = "prev_cifar_res20_res56"
    published = 'teacher={"model": "cifar_resnet56", "checkpoint": "resnet56_vanilla/ckpt_epoch_240.pth"}'
    old, elsewhere = record(stem, 71.0, 1), ["data.source=/data/cifar", "log_every=7", published]
    for key in ("repeats", "random_erasing"):  # as recipes were before these keys
        del old["recipe"]["data"][key]
    for student in old["recipe"]["students"]:
        del student["ema"]
    runs = [record(stem, 70.0, overrides=elsewhere), old]
    runs.append(record(stem, 1.0, limit=5))
    for seed, change in enumerate(
        ("epochs=241", "students.kd.lr=0.1", published.replace("resnet56", "resnet110")), 2
    ):
        runs.append(record(stem, 2.0, seed, overrides=[change]))
    (tmp_path / "cifar.json").write_text(
        json.dumps({"note": "two seeds of the cell, and four runs that are not", "runs": runs})
    )
    rows = table("1b", tmp_path)
    kd = rows["t1b.res56-res20.kd.previous"]
    assert (kd["ours"], kd["±"], kd["seeds"], kd["difference"]) == ("70.50", "0.71", "2", "-0.16")
    assert (
        rows["t1b.res56-res20.dkd.previous"]["seeds"] == "3"
    )  # the run with another lr for kd is one for dkd
    assert rows["t1b.res56-res20.kd.stronger"]["ours"] == "not run"


def test_our_numbers_on_other_test_sets(tmp_path):
    (tmp_path / "run").mkdir()
    run = record("a2_res50_res152", 80.0, evaluations=[{"student": "kd", "data": "real", "top1": 86.5}])
    (tmp_path / "run" / "result.json").write_text(json.dumps(run))
    rows = table("3", tmp_path)
    assert [rows[f"t3.a2.res152.kd.300.{on}"]["ours"] for on in ("1k", "real", "v2")] == [
        "80.00",
        "86.50",
        "not run",
    ]


def shortened(tmp_path):
    """A folder with two real runs of results/: the teacher of Table 1b in 5 epochs, its students in 2."""
    for name in ("cifar100_res56_5ep", "cifar100_weak_100pct_2ep"):
        shutil.copy(ROOT / "results" / f"{name}.json", tmp_path)
    return tmp_path


def test_a_shortened_run_is_no_result_of_the_paper(tmp_path):
    rows = table("1b", shortened(tmp_path))
    kd, teacher = rows["t1b.res56-res20.kd.previous"], rows["t1b.res56-res20.teacher"]
    assert (kd["ours"], kd["difference"], kd["seeds"]) == ("not run", "", "")
    assert kd["reduced"] == "30.78 (2 of 240 epochs, cosine schedule, 1 seed, teacher 37.37)"
    assert (
        teacher["ours"] == "not run"
        and teacher["reduced"] == "37.35 (5 of 240 epochs, milestones schedule, 1 seed)"
    )
    assert rows["t1b.res56-res20.delta.previous"]["reduced"] == "-4.53 (2 of 240 epochs, cosine schedule)"


def test_records_from_before_a_key_and_with_what_changes_nothing(tmp_path):
    """Every key with a default may be missing; what cannot change accuracy may be anything; the rest may
    not.
    """
    stem, cell = "prev_cifar_res20_res56", "t1b.res56-res20.kd.previous"
    old = record(stem, 70.0, 0)
    for section, kind in (
        (old["recipe"]["data"], recipe.Data),
        (old["recipe"]["students"][0], recipe.Student),
    ):
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                del section[field.name]
    harmless = ["students.kd.grad_checkpointing=true", "data.max_broken=0.5", "teacher.precision=bf16"]
    runs = [old, record(stem, 71.0, 1), record(stem, 99.0, 1)]  # a seed counts once
    runs.append(record(stem, 72.0, 2, harmless))
    for seed, change in enumerate(("data.fraction=0.5", "data.hflip=0.0", "students.kd.hard.weight=0.2"), 3):
        runs.append(record(stem, 1.0, seed, [change]))
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs}))
    row = table("1b", tmp_path)[cell]
    assert (row["ours"], row["seeds"], row["reduced"]) == ("71.00", "3", "")


def test_records_with_removed_options(tmp_path):
    """A run with the only value of a removed option that changed nothing counts; one with another does
    not.
    """
    stem, cell = "prev_cifar_res20_res56", "t1b.res56-res20.kd.previous"
    harmless, other = record(stem, 70.0, 0), record(stem, 1.0, 1)
    harmless["recipe"]["data"]["rand_augment_on"], harmless["recipe"]["teacher"]["memo"] = "cpu", None
    other["recipe"]["data"]["rand_augment_on"] = "device"
    (tmp_path / "runs.json").write_text(json.dumps({"runs": [harmless, other]}))
    row = table("1b", tmp_path)[cell]
    assert (row["ours"], row["seeds"]) == ("70.00", "1")


def test_a_file_that_is_no_json_is_an_error(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit) as caught:
        paper.main(["3", "--results", str(tmp_path)])
    assert caught.value.code == 2 and "broken.json: not a JSON file" in capsys.readouterr().err


def test_reduced_runs_say_so(tmp_path):
    short = ["epochs=24", "schedule.milestones=[15,18,21]", "students.dkd.soft.warmup_epochs=2"]
    runs = [
        record("prev_cifar_res20_res56", top1, seed, short, teacher={"top1": 71.0})
        for seed, top1 in ((0, 60), (1, 61))
    ]
    runs.append(
        record("study_fraction_weak", 70.0, 5, teacher={"top1": 72.0})
    )  # alone 70, kd 71, dkd 72, dist 73
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs}))
    rows = table("1b", tmp_path)
    kd, delta = rows["t1b.res56-res20.kd.previous"], rows["t1b.res56-res20.delta.previous"]
    assert kd["reduced"] == "60.50 ± 0.71 (24 of 240 epochs, 2 seeds, teacher 71.00)"
    assert (kd["ours"], kd["our teacher"], kd["seeds"], kd["difference"]) == ("71.00", "72.00", "1", "+0.34")
    assert (delta["ours"], delta["difference"], delta["reduced"]) == (
        "-2.00",
        "-0.69",
        "-2.00 (24 of 240 epochs)",
    )
    assert rows["t1b.res56-res20.scratch"]["ours"] == "70.00"  # the same training under another name
    assert rows["t1b.res56-res20.dkd.previous"]["reduced"].startswith("61.50")  # its ramp may be scaled, too


def test_disagreements_stand_beside_the_cells_they_touch(capsys):
    for dispute in PAPER["disagreements"]:
        for pattern in dispute.get("cells", ()):
            touched = {c["table"] for c in PAPER["cells"] if paper.fnmatchcase(c["id"], pattern)}
            assert touched and touched <= {*dispute["tables"]}, (dispute["id"], pattern)
    rows = table("4")
    assert (
        rows["t4.300.ce.bkl"]["disputed"] == "wd_a2 label_reduction bkl"
        and rows["t4.600.bce.kl"]["disputed"] == "label_reduction"
    )
    assert "- mbnet (MBNetV2 in Table 1a): the paper: Table 1a and section 2.2: MobileNetV2" in show(
        capsys, "1a"
    )


def test_table_4_at_the_scale_of_cifar(tmp_path):
    run = record("study_ablation_cifar", 60.0, teacher={"top1": 72.0})
    (tmp_path / "r.json").write_text(json.dumps(run))
    rows = table("4c", tmp_path)
    assert [(r["label loss"], r["ours"], r["paper"]) for r in rows.values()][4:] == [
        ("bce", "64.00", "79.36 on ImageNet"),
        ("none", "65.00", "80.82 on ImageNet"),
    ]
    assert len(rows) == 6 and {r["difference"] for r in rows.values()} == {""}


def test_the_section_in_the_docs(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.md"
    file.write_text("# Title\n\nBefore.\n\n<!-- results -->\nold\n<!-- /results -->\n\nAfter.\n")
    monkeypatch.setattr(paper, "DOCS", file)
    paper.main(["--docs", "--results", str(shortened(tmp_path))])
    text = file.read_text()
    assert text.startswith("# Title\n\nBefore.\n\n<!-- results -->\n\n### Table 1b\n")
    assert text.endswith("<!-- /results -->\n\nAfter.\n")
    assert (
        "30.78 (2 of 240 epochs, cosine schedule" in text
        and "old" not in text
        and "accelerate launch" not in text
    )
    assert "Nothing run yet of Tables 1a, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 4c." in text
    paper.main(["--docs", "--results", str(tmp_path)])
    assert file.read_text() == text
    file.write_text("no comments")
    with pytest.raises(SystemExit):
        paper.main(["--docs", "--results", str(tmp_path)])
    assert "expected the lines '<!-- results" in capsys.readouterr().err and file.read_text() == "no comments"


def test_the_docs_have_the_markers():
    assert paper.DOCS == ROOT / "docs" / "results.md"
    text = paper.DOCS.read_text()
    assert 0 < text.find("<!-- results -->") < text.find("<!-- /results -->")


def test_table_11(tmp_path, capsys, monkeypatch):
    """54 cells, each with its command; through detect.py's parser it gives the recipe of the cell."""
    monkeypatch.chdir(ROOT)
    rows, parsed = table("11"), []
    assert len(rows) == 54 and all(row["command"] for row in rows.values())
    monkeypatch.setattr(detect, "run", lambda *arguments: parsed.append(arguments))
    for name, row in rows.items():
        if name.endswith(".in1k"):
            assert row["command"].startswith("python evaluate.py ") and row["command"].endswith(
                " --on imagenet"
            )
            continue
        detect.main(shlex.split(row["command"].split(" detect.py ")[1]))
        path, overrides, _, options = parsed.pop()
        settings = detect.load(path, overrides, options)
        (student,) = settings.students
        assert student.paper[name] == float(row["paper"]) and options.resume and options.data == "COCO"
        assert (
            str(settings.epochs)
            == {"1": "12", "2": "24", "3": "36"}[name.split("x.")[0][-1]]
            == row["epochs"]
        )
    assert rows["t11a.ours.83.1.1x.in1k"]["command"].split()[2] == (
        "runs/a1_res50_beitb.kd.epochs-4800/students/kd"
    )  # what the command of Table 8 leaves
    folder = rows["t11a.ours.83.1.1x.in1k"]["command"].split()[2].removesuffix("/students/kd")
    assert f"--out {folder} " in table("8")["t8.res50.4800"]["command"]
    assert rows["t11a.prev.77.1.2x.box"]["disputed"] == "coco_configs coco_prev"
    text = show(capsys, "11")
    assert "- coco_configs (COCO schedules)" in text and "- coco_prev (Table 11a 'prev.' rows)" in text


def test_our_detectors_are_found_by_their_settings(tmp_path):
    tree = json.loads((ROOT / "recipes" / "coco_maskrcnn_res50_1x.json").read_text())
    names = [student["name"] for student in tree["students"]]

    def run(seed, ap, **changes):
        last = [{"name": name, "last": {"ap_box": ap + i, "ap_mask": ap - i}} for i, name in enumerate(names)]
        return {"seed": seed, "limit": None, "recipe": tree | changes, "students": last}

    runs = [run(0, 38.0), run(1, 40.0, log_every=3, about="again"), run(2, 1.0, epochs=1)]
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs}))
    rows = table("11", tmp_path)
    box, mask = rows["t11a.prev.80.4.1x.box"], rows["t11a.prev.80.4.1x.mask"]
    assert (box["ours"], box["seeds"], box["difference"]) == ("40.00", "2", "+1.30")
    assert mask["ours"] == "38.00" and rows["t11a.prev.80.4.2x.box"]["ours"] == "not run"
    assert table("1b", tmp_path)["t1b.res56-res20.kd.previous"]["ours"] == "not run"


# ---------------------------------------------------------------- the recipes of the studies


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
    hard_losses = {
        "ce": ("cross_entropy", 1.0),
        "bce": ("binary_cross_entropy", 1.0),
        "none": ("cross_entropy", 0.0),
    }
    terms = {name: s for name in ("kd", "bkl") for s in a2.students if s.name == name}
    wanted = [
        (f"{hard}_{soft}", hard, terms[name].soft)
        for soft, name in (("kl", "kd"), ("bkl", "bkl"))
        for hard in hard_losses
    ]
    assert [(s.name, s.soft) for s in own.students] == [(name, soft) for name, _, soft in wanted]
    for student, (_, hard, _) in zip(own.students, wanted, strict=True):
        assert (student.hard.loss, student.hard.weight) == hard_losses[hard]
        same = dataclasses.replace(own.students[0], name=student.name, hard=student.hard, soft=student.soft)
        assert student == same
    first, like = own.students[0], terms["kd"]
    for key in ("optimizer", "optimizer_args", "weight_decay", "decay_norm_and_bias", "clip_grad", "ema"):
        assert getattr(first, key) == getattr(like, key)
    assert own.schedule == a2.schedule
    assert own.data == load("strong_cifar_res20_res56").data and own.data.rand_augment == a2.data.rand_augment


@pytest.mark.parametrize("stem", sorted(p.stem for p in (ROOT / "recipes").glob("study_*.json")))
def test_a_study_can_start(stem):
    """Its networks and losses build, and its teacher's recipe is one."""
    settings = load(stem)
    for student in settings.students:
        module, _ = distill.build_student(settings, student)
        assert module.net.model.num_classes == 100
        losses.make_loss(student.hard.loss, losses.LABEL_LOSSES, smoothing=0.0)
    assert load(Path(settings.teacher.recipe).stem).students[0].model == "cifar_resnet56"
