"""evaluate.py: counts by hand, the package of that name, the command line, ImageNet's sets, class names."""

import io
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SHARED, make_recipe, needs_imagenet, photos, tree
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import nn

import augment
import class_names
import data
import evaluate
import models
import recipe
import sources

WNIDS = ImageNetInfo().label_names()


class Fixed(nn.Module):
    """Logits by a rule on the first pixel: class `pixel`, then its neighbours."""

    def forward(self, images):
        first = (images[:, 0, 0, 0] * 255).round().long()
        return -(torch.arange(10) - first[:, None]).abs().float()


def loader(pixels, labels, batch_size):
    images = torch.zeros(len(pixels), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(pixels)
    dataset = torch.utils.data.TensorDataset(images, torch.tensor(labels), torch.arange(len(pixels)))
    return torch.utils.data.DataLoader(dataset, batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_accuracy_equals_the_count_by_hand(batch_size):
    pixels, labels = (
        [0, 1, 2, 9, 5, 5, 5],
        [0, 1, 3, 0, 5, 7, 8],
    )  # right: 0, 1, 5; among 5: also 2->3 and 5->7
    (scores,) = evaluate.accuracy([Fixed()], loader(pixels, labels, batch_size), Accelerator())
    assert scores == {"top1": 42.8571, "top5": 71.4286, "n": 7}


def test_accuracy_leaves_the_network_as_it_was():
    network = models.build("cifar_resnet8", classes=10, size=8).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    settings = make_recipe().data
    (scores,) = evaluate.accuracy([network], data.test_loader(settings, batch_size=100), Accelerator())
    assert scores["n"] == 899 and network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert (
        evaluate.accuracy([network], data.test_loader(settings, batch_size=100), Accelerator(), limit=2)[0][
            "n"
        ]
        == 200
    )


def test_two_classes_have_a_top5_of_100():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert evaluate.accuracy([network], loader([0, 1, 2], [0, 1, 1], 2), Accelerator())[0]["top5"] == 100


def test_table_aligns():
    text = evaluate.table([{"name": "a", "top1": 1.0, "n": 10}, {"name": "bcd", "top1": 100.0, "n": 9}])
    assert text.splitlines() == ["name   top1  n", "   a   1.00 10", " bcd 100.00  9"]
    assert evaluate.table([{"class": "a\x1b"}]).splitlines()[1] == r"a\x1b"


SAME_NAME = """
import importlib, log
this = importlib.import_module("evaluate")
package = this.import_hf_evaluate()
print(log.accuracy is this.accuracy, this.__file__, package.__file__, package.Metric.__name__)
"""


@pytest.mark.slow  # in a process of its own: an order of imports is what can go wrong
def test_the_name_means_our_file_and_the_package_is_there():
    command = [sys.executable, "-c", SAME_NAME]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "True" and out[1] == str(ROOT / "evaluate.py") and out[3] == "Metric"
    assert out[2].endswith("evaluate/__init__.py") and str(ROOT / "evaluate") not in out[2]


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder as train.py leaves it."""
    network = models.build("cifar_resnet8", classes=10, size=8)
    folder = tmp_path / "run" / "students" / "alone"
    folder.parent.mkdir(parents=True)
    models.export(network, folder, model_args={}, size=8, crop_pct=1.0, interpolation="bilinear")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(tree()))
    torch.save(network.model.state_dict(), tmp_path / "bare.pth")
    return tmp_path / "run"


def test_command_line_on_a_run_and_on_a_student(run_folder, capsys):
    results = []
    for arguments in (
        [str(run_folder)],
        [str(run_folder / "students" / "alone")],
        [str(run_folder / "students" / "alone"), "--data", "digits"],
    ):
        evaluate.main([*arguments, "--json", "--workers", "0", "--batch-size", "100"])
        (row,) = json.loads(capsys.readouterr().out)
        results.append((row["top1"], row["top5"], row["n"], row["data"], row["split"]))
    assert len(set(results)) == 1 and results[0][2:] == (899, "digits", "test")
    evaluate.main([str(run_folder), "--workers", "0"])
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "checkpoint",
        "data",
        "split",
        "top1",
        "top5",
        "n",
    ]


def test_command_line_on_a_checkpoint_file(run_folder, capsys):
    evaluate.main(
        [
            str(run_folder.parent / "bare.pth"),
            "--model",
            "cifar_resnet8",
            "--data",
            "digits",
            "--json",
            "--workers",
            "0",
        ]
    )
    (row,) = json.loads(capsys.readouterr().out)
    assert row["n"] == 899 and 0 <= row["top1"] <= row["top5"] <= 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["nowhere"],
            "nowhere: expected a folder, a timm tag, or a file whose network is named with --model",
        ),
        (["a.pth"], "a.pth: expected a folder, a timm tag, or a file whose network is named with --model"),
        (["nowhere", "--model", "resnet1", "--data", "digits"], "timm has no model 'resnet1'"),
        (["nowhere", "--model", "cifar_resnet8", "--data", "digits"], "checkpoint nowhere: no such file"),
        (["nowhere", "--model", "cifar_resnet8"], "name it with --data"),
        (["nowhere", "--model", "cifar_resnet8", "--data", "/no/where"], "/no/where: not a folder"),
        (["."], "no finished student in this folder"),
    ],
    ids=range(7),
)
def test_bad_input_exits_with_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pth").touch()
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_class_counts_must_agree(run_folder, capsys):
    broken = tree(data__classes=11)
    (run_folder / "recipe.json").write_text(json.dumps(broken))
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(run_folder)])
    assert caught.value.code == 2 and "has 10 classes, digits has 11" in capsys.readouterr().err
    assert recipe.load(run_folder / "recipe.json").data.classes == 11


# ---------------------------------------------------------------- ImageNet


def jpeg(colour, size=(80, 60), mode="RGB"):
    """A gradient in red and green; blue tells images apart."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([across, down, np.full_like(across, colour)], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def class_folders(root, split, images):
    """images: [(class folder, file name, pixel value)]"""
    for folder, name, value in images:
        (root / split / folder).mkdir(parents=True, exist_ok=True)
        (root / split / folder / name).write_bytes(jpeg(value, size=(16, 16)))
    return root


class ByBlue(torch.nn.Module):
    """Answers with the class that the blue channel's mean names, then its neighbours."""

    def __init__(self):
        super().__init__()
        self.model = types.SimpleNamespace(num_classes=1000, pretrained_cfg={})
        self.statistics = {}

    def forward(self, images):
        named = (images[:, 2].mean((1, 2)) * 255).round().long()
        return -(torch.arange(1000) - named[:, None]).abs().float()


def test_the_three_imagenet_sets(tmp_path, monkeypatch, capsys):
    """A right answer, one that ReaL alone accepts, one among the first five, an image without ReaL labels."""
    real = RealLabelsImagenet([f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 50_001)]).real_labels
    number = {name: int(name[-13:-5]) for name in real}
    several = next(
        n
        for n, ids in real.items()
        if len(ids) > 1 and max(ids) < 240 and min(abs(ids[0] - i) for i in ids[1:]) > 5
    )
    single = next(n for n, ids in real.items() if len(ids) == 1 and 20 < ids[0] < 240 and n != several)
    without = next(n for n, ids in real.items() if not ids)
    a, b = real[several][:2]
    (c,) = real[single]
    images = [  # (class by ImageNet-1K, file, what the network answers)
        (WNIDS[a], several, b),  # wrong for ImageNet, the second of the right ones for ReaL
        (WNIDS[c], single, c + 1),  # second of the first five for both
        (WNIDS[11], without, 11),  # right for ImageNet, not counted by ReaL
    ]
    class_folders(tmp_path / "in1k", "val", images)
    v2 = [("2", "x.jpeg", 2), ("10", "y.jpeg", 10), ("100", "z.jpeg", 2)]  # by text, "10" would be class 0
    for folder, name, value in v2:
        (tmp_path / "v2" / folder).mkdir(parents=True)
        (tmp_path / "v2" / folder / name).write_bytes(jpeg(value, size=(16, 16)))

    config = dict(input_size=(3, 16, 16), crop_pct=1.0, interpolation="bilinear")

    def networks(path, model, choose):
        yield path, ByBlue(), choose(path, config, None)

    decoded, decode = [], augment.decode
    monkeypatch.setattr(evaluate, "open_networks", networks)
    monkeypatch.setattr(augment, "decode", lambda content: decoded.append(content) or decode(content))
    sets = ["--on", "imagenet", "real", "v2", "--data", str(tmp_path / "in1k"), "--v2", str(tmp_path / "v2")]
    evaluate.main(["one", "two", *sets, "--json", "--workers", "0"])
    rows = json.loads(capsys.readouterr().out)
    expected = {
        "imagenet": {"split": "validation", "top1": 33.3333, "top5": 66.6667, "n": 3},
        "real": {"split": "validation", "top1": 50.0, "top5": 100.0, "n": 2},
        "v2": {"split": "train", "top1": 66.6667, "top5": 66.6667, "n": 3},
    }
    assert rows == [
        {"checkpoint": name, "data": key, **row} for name in ("one", "two") for key, row in expected.items()
    ]
    assert len(decoded) == 6  # once for both checkpoints, and once for ImageNet and ReaL
    labels = evaluate.real_labels()
    assert number[without] in labels and labels[number[several]] == real[several]
    evaluate.main(["one", *sets, "--workers", "0"])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["one", "imagenet", "validation", "33.33", "66.67", "3"]


def test_sets_that_cannot_be_imagenets_are_refused(tmp_path, capsys):
    network = models.build("cifar_resnet8", classes=1000, size=8, model_args={"widths": [2, 2, 2, 2]})
    models.export(
        network,
        tmp_path / "s",
        model_args={"widths": [2, 2, 2, 2]},
        size=8,
        crop_pct=1.0,
        interpolation="bilinear",
    )
    pets = class_folders(tmp_path / "pets", "val", [("ant", "1.jpg", 1), ("bee", "2.jpg", 1)])
    for arguments, message in (
        (["--on", "imagenet", "--data", str(pets)], "2 classes found, the recipe's data.classes is 1000"),
        (["--on", "v2"], "ImageNet-V2: name its folder (or its name on the hub) with --v2"),
    ):
        with pytest.raises(SystemExit) as caught:
            evaluate.main([str(tmp_path / "s"), *arguments, "--workers", "0"])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    folder = class_folders(tmp_path / "d", "val", [(wnid, "first.JPEG", 1) for wnid in WNIDS[:2]])
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "s"), "--on", "real", "--data", str(folder), "--workers", "0"])
    message = f"by its file name, ILSVRC2012_val_00000001.JPEG; found image 0 ({folder}/"
    assert message in capsys.readouterr().err


def test_there_are_46837_images_with_real_labels():
    labels = evaluate.real_labels()
    assert len(labels) == 50_000 and sum(bool(ids) for ids in labels.values()) == 46_837


# ---------------------------------------------------------------- classes by name


ANIMALS = ["cat", "dog", "frog"]


@pytest.fixture
def student(tmp_path):
    """An exported student of cat, dog and frog that answers by brightness: below 85 cat, above 170 frog."""
    network = models.build("cifar_resnet8", classes=3, size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    preprocessing = dict(size=16, crop_pct=1.0, interpolation="bilinear")
    models.export(network, tmp_path / "student", model_args={}, label_names=ANIMALS, **preprocessing)
    return tmp_path / "student"


def by_brightness(images):
    return -(images.mean((1, 2, 3))[:, None] * 255 - torch.tensor([0.0, 127.0, 255.0])).abs()


def pictures(root, classes):
    """One grey image a class: cat is black, dog grey, frog white."""
    for name in classes:
        (root / "test" / name).mkdir(parents=True)
        value = {"cat": 0, "dog": 127, "frog": 255}.get(name, 0)
        Image.new("RGB", (16, 16), (value,) * 3).save(root / "test" / name / "1.png")
    return root


def main_with(monkeypatch, capsys, *arguments):
    """(exit code, rows, error output) of a command on a student whose answers are by_brightness."""
    monkeypatch.setattr(models.Network, "forward", lambda self, images: by_brightness(images))
    try:
        evaluate.main([*map(str, arguments), "--json", "--workers", "0"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, json.loads(captured.out or "[]"), captured.err


def test_a_part_of_the_students_classes_is_matched_by_name(student, tmp_path, monkeypatch, capsys):
    folder = pictures(tmp_path / "part", ["dog", "frog"])
    code, rows, notes = main_with(monkeypatch, capsys, student, "--data", folder)
    assert code == 0 and rows[0]["top1"] == 100 and rows[0]["n"] == 2
    assert (
        f"{folder} has 2 of the network's 3 classes, matched by name; the network may answer with any"
        in notes
    )
    code, rows, notes = main_with(monkeypatch, capsys, student, "--data", pictures(tmp_path / "all", ANIMALS))
    assert code == 0 and rows[0]["top1"] == 100 and rows[0]["n"] == 3 and "matched by name" not in notes


def test_a_part_of_the_classes_with_a_recipe(student, tmp_path, monkeypatch, capsys):
    """The recipe beside the student says three classes; a folder named with --data may have two of them."""
    (tmp_path / "run" / "students").mkdir(parents=True)
    moved = student.rename(tmp_path / "run" / "students" / "student")
    changes = dict(data__source=str(pictures(tmp_path / "all", ANIMALS)), data__classes=3, data__size=16)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(tree(**changes)))
    code, rows, _ = main_with(monkeypatch, capsys, moved)
    assert code == 0 and rows[0]["top1"] == 100 and rows[0]["n"] == 3
    code, rows, notes = main_with(
        monkeypatch, capsys, moved, "--data", pictures(tmp_path / "part", ["cat", "frog"])
    )
    assert (
        code == 0 and rows[0]["top1"] == 100 and rows[0]["n"] == 2 and "2 of the network's 3 classes" in notes
    )


@pytest.mark.parametrize(
    "classes, message",
    [
        (["dog", "frog", "zebra"], "only in the network: 'cat'; only in the data: 'zebra'"),
        (
            ["bee", "cat", "dog", "frog"],
            "the network and the data have other classes: only in the data: 'bee'",
        ),
    ],
)
def test_other_classes_are_refused(classes, message, student, tmp_path, monkeypatch, capsys):
    code, _, error = main_with(monkeypatch, capsys, student, "--data", pictures(tmp_path / "other", classes))
    assert code == 2 and message in error and str(student) in error


def test_imagenets_sets_want_a_network_of_imagenets_classes(tmp_path, monkeypatch, capsys):
    small = dict(model_args={"widths": [2, 2, 2, 2]})
    network = models.build("cifar_resnet8", classes=1000, size=16, **small)
    preprocessing = dict(size=16, crop_pct=1.0, interpolation="bilinear")
    things = [f"thing {i}" for i in range(1000)]
    described = [f"{text.split(',')[0]}, another synonym" for text in ImageNetInfo().label_descriptions()]
    models.export(network, tmp_path / "things", label_names=things, **small, **preprocessing)
    models.export(network, tmp_path / "imagenet", label_names=described, **small, **preprocessing)
    images = [(WNIDS[i], f"ILSVRC2012_val_{i:08d}.JPEG", 9) for i in (5, 7)]
    folder = class_folders(tmp_path / "data", "val", images)
    command = ["--on", "imagenet", "--data", str(folder), "--json", "--workers", "0"]
    evaluate.main([str(tmp_path / "imagenet"), *command])
    assert json.loads(capsys.readouterr().out)[0]["n"] == 2
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "things"), *command])
    assert "only in the data: 'n01440764'" in capsys.readouterr().err


@needs_imagenet
def test_the_hubs_names_of_imagenets_classes_are_known():
    source = str(SHARED / "imagenet_sample")
    section = types.SimpleNamespace(source=source, **sources.evaluation_fields(source))
    names = sources.open_split(section, section.test_split).names
    assert names != WNIDS and class_names.match(names, WNIDS) == list(range(1000))


# ---------------------------------------------------------------- preprocessing


def test_a_file_scores_like_its_exported_student(tmp_path, capsys):
    """The same weights, as an exported folder and as a file whose preprocessing is given by hand."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    network = models.build("resnet10t", classes=10, size=32)
    preprocessing = dict(size=32, crop_pct=1.0, interpolation="bilinear")
    models.export(network, tmp_path / "student", model_args={}, **preprocessing)
    torch.save(network.model.state_dict(), tmp_path / "weights.pth")
    command = ["--data", "digits", "--json", "--workers", "0"]
    evaluate.main([str(tmp_path / "student"), *command])
    exported = capsys.readouterr()
    flags = ["--size", "32", "--crop-pct", "1", "--interpolation", "bilinear"]
    evaluate.main([str(tmp_path / "weights.pth"), "--model", "resnet10t", *command, *flags])
    file = capsys.readouterr()
    assert [json.loads(out)[0]["top1"] for out in (exported.out, file.out)] == [
        json.loads(file.out)[0]["top1"]
    ] * 2
    lines = [captured.err.split(": ", 1)[1] for captured in (exported, file)]
    assert lines[0] == lines[1].replace("crop_pct 1,", "crop_pct 1.0,")
    assert lines[0].startswith(
        "digits prepared with size 32, crop_pct 1.0, interpolation bilinear, mean (0.485, "
    )


def test_images_are_prepared_as_the_recipe_of_the_run_says(run_folder, capsys):
    (run_folder / "recipe.json").write_text(json.dumps(tree(data__size=16, data__crop_pct=0.5)))
    evaluate.main([str(run_folder), "--json", "--workers", "0"])
    assert "digits prepared with size 16, crop_pct 0.5, interpolation bilinear" in capsys.readouterr().err


def test_the_flags_change_what_an_exported_student_gets(run_folder, capsys):
    evaluate.main([str(run_folder), "--json", "--workers", "0", "--size", "16", "--crop-pct", "0.5"])
    captured = capsys.readouterr()
    assert "digits prepared with size 16, crop_pct 0.5, interpolation bilinear" in captured.err
    assert json.loads(captured.out)[0]["n"] == 899


def test_a_transformer_of_another_size(tmp_path, capsys):
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 1}
    network = models.build("vit_tiny_patch16_224", classes=10, size=32, model_args=arguments)
    preprocessing = dict(size=32, crop_pct=1.0, interpolation="bilinear")
    models.export(network, tmp_path / "student", model_args=arguments, **preprocessing)
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "student"), "--data", "digits", "--workers", "0", "--size", "64"])
    assert "student' cannot take images of 64x64" in capsys.readouterr().err
    whole = models.build("vit_tiny_patch16_224", classes=10, size=32, model_args={"img_size": 32})
    torch.save(whole.model.state_dict(), tmp_path / "vit.pth")
    command = [
        str(tmp_path / "vit.pth"),
        "--model",
        "vit_tiny_patch16_224",
        "--data",
        "digits",
        "--workers",
        "0",
    ]
    evaluate.main([*command, "--json", "--size", "32"])
    assert json.loads(capsys.readouterr().out)[0]["n"] == 899


@pytest.mark.parametrize(
    "flags", [["--size", "0"], ["--crop-pct", "0"], ["--crop-pct", "1.5"]], ids=lambda flags: " ".join(flags)
)
def test_flags_out_of_range_are_refused(flags, run_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(run_folder), *flags])
    assert (
        caught.value.code == 2
        and "expected 1 to 4096 pixels, a crop_pct in (0, 1]" in capsys.readouterr().err
    )


def test_a_config_with_another_kind_of_preprocessing_is_refused(student, capsys):
    config = json.loads((student / "config.json").read_text())
    config["pretrained_cfg"]["interpolation"] = "random"
    (student / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(student), "--data", "digits"])
    assert caught.value.code == 2 and "images cannot be prepared with" in capsys.readouterr().err


# ---------------------------------------------------------------- images, classes


@pytest.fixture
def zoo(tmp_path):
    """(folder of pictures, folder of a student that knows cat, dog and emu)."""
    network = models.build("cifar_resnet8", classes=3, size=8)
    folder = tmp_path / "student"
    names = ["cat", "dog", "emu"]
    models.export(
        network, folder, model_args={}, size=8, crop_pct=1.0, interpolation="bilinear", label_names=names
    )
    return photos(tmp_path / "zoo", names), folder


def test_images_are_classified(zoo, capsys):
    pictures, student = zoo
    one = pictures / "val" / "dog" / "3.png"
    evaluate.main([str(student), "--images", str(one), str(pictures / "val" / "cat"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == [
        str(one),
        *(str(pictures / f"val/cat/{i}.png") for i in range(6)),
    ]
    network, _ = models.load_exported(student)
    pixels = torch.as_tensor(np.array(Image.open(one))).permute(2, 0, 1)[None] / 255
    shares = network.eval()(pixels).softmax(1)[0]
    best = shares.argmax().item()
    assert rows[0]["1"] == f"{['cat', 'dog', 'emu'][best]} {100 * shares[best]:.1f} %"
    assert list(rows[0]) == ["checkpoint", "image", "1", "2", "3"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "nowhere.jpg"], "--images nowhere.jpg: no such file"),
        (["--images", "tests"], "--images tests: no images there"),
        (["--images", "README.md"], "README.md: cannot be decoded"),
    ],
)
def test_images_that_are_not_there_are_told(arguments, message, zoo, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        evaluate.main([str(zoo[1]), *arguments])
    assert message in capsys.readouterr().err


def test_classes_one_by_one_and_what_they_are_taken_for(zoo, tmp_path, capsys):
    pictures, student = zoo
    table = tmp_path / "confusion.csv"
    flags = ["--per-class", "--confusion", str(table), "--json", "--workers", "0"]
    evaluate.main([str(student), "--data", str(pictures), *flags])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["class"], row["n"]) for row in rows] == [("cat", 6), ("dog", 6), ("emu", 6)]
    lines = [line.split(",") for line in table.read_text().splitlines()]
    assert lines[0] == ["checkpoint", "data", "class", "cat", "dog", "emu"]
    assert [line[:3] for line in lines[1:]] == [
        [str(student), str(pictures), c] for c in ("cat", "dog", "emu")
    ]
    counts = np.array([[int(cell) for cell in line[3:]] for line in lines[1:]])
    assert (counts.sum(axis=1) == 6).all()
    assert [row["top1"] for row in rows] == pytest.approx(100 * np.diag(counts) / 6)
    evaluate.main([str(student), "--data", str(pictures), "--json", "--workers", "0"])
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["top1"] == pytest.approx(100 * np.trace(counts) / 18, abs=1e-3)

    second = shutil.copytree(student, student.with_name("second"))
    evaluate.main([str(student), str(second), "--data", str(pictures), *flags])
    assert len(json.loads(capsys.readouterr().out)) == 6
    assert [line.split(",")[0] for line in table.read_text().splitlines()[1:]] == [str(student)] * 3 + [
        str(second)
    ] * 3
