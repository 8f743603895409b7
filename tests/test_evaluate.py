"""evaluate.py: counts by hand, sizes that no batch divides, the name clash with the package, the command line."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, make_recipe, tree
from torch import nn

import data
import evaluate
import models
import recipe


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
    pixels, labels = [0, 1, 2, 9, 5, 5, 5], [0, 1, 3, 0, 5, 7, 8]  # right: 0, 1, 5; among 5: also 2->3 and 5->7
    (scores,) = evaluate.accuracy([Fixed()], loader(pixels, labels, batch_size), Accelerator())
    assert scores == {"top1": 42.8571, "top5": 71.4286, "n": 7}


def test_accuracy_leaves_the_network_as_it_was():
    network = models.build("cifar_resnet8", classes=10, size=8).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    settings = make_recipe().data
    (scores,) = evaluate.accuracy([network], data.test_loader(settings, batch_size=100), Accelerator())
    assert scores["n"] == 899 and network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert evaluate.accuracy([network], data.test_loader(settings, batch_size=100), Accelerator(), limit=2)[0]["n"] == 200


def test_two_classes_have_a_top5_of_100():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert evaluate.accuracy([network], loader([0, 1, 2], [0, 1, 1], 2), Accelerator())[0]["top5"] == 100


def test_table_aligns():
    text = evaluate.table([{"name": "a", "top1": 1.0, "n": 10}, {"name": "bcd", "top1": 100.0, "n": 9}])
    assert text.splitlines() == ["name    top1   n", "a       1.00  10", "bcd   100.00   9"]


def test_the_name_means_our_file_and_the_package_is_there():
    code = "import train, importlib, sys; own = importlib.import_module('evaluate');"
    code += "print(train.accuracy is own.accuracy, own.__file__, own.hf_evaluate.__file__, own.hf_evaluate.Metric.__name__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
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
    assert capsys.readouterr().out.splitlines()[0].split() == ["checkpoint", "data", "split", "top1", "top5", "n"]


def test_command_line_on_a_checkpoint_file(run_folder, capsys):
    evaluate.main(
        [str(run_folder.parent / "bare.pth"), "--model", "cifar_resnet8", "--data", "digits", "--json", "--workers", "0"]
    )
    (row,) = json.loads(capsys.readouterr().out)
    assert row["n"] == 899 and 0 <= row["top1"] <= row["top5"] <= 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere: not a folder, a file or a timm tag"),
        (["a.pth"], "a.pth: name the network in this file with --model"),
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
