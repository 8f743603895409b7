"""models.py: the published CIFAR layouts, loading and export, normalisation, Distilled."""

import json
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT

import losses
import models

PARAMETERS = {
    "cifar_resnet20": (278_324, 128),
    "cifar_resnet56": (861_620, 344),
    "cifar_resnet8x4": (1_233_540, 62),
    "cifar_resnet32x4": (7_433_860, 206),
    "cifar_resnet32": (472_756, 200),
    "cifar_resnet110": (1_736_564, 668),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_cifar_resnets_have_the_published_sizes(name):
    network = timm.create_model(name, num_classes=100)
    assert (sum(p.numel() for p in network.parameters()), len(network.state_dict())) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet8x4"])
def test_cifar_resnets_have_the_published_keys(name):
    """RepDistiller's key layout, spelled out: a shortcut where the stride or the channels change (option B)."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{n}" for n in norm}
    blocks, shortcuts = (3, {2, 3}) if name == "cifar_resnet20" else (1, {1, 2, 3})
    for stage in (1, 2, 3):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            expected |= {f"{prefix}.conv1.weight", f"{prefix}.conv2.weight"}
            expected |= {f"{prefix}.bn{i}.{n}" for i in (1, 2) for n in norm}
            if block == 0 and stage in shortcuts:
                expected |= {f"{prefix}.downsample.0.weight"} | {f"{prefix}.downsample.1.{n}" for n in norm}
    assert set(timm.create_model(name, num_classes=100).state_dict()) == expected


def test_cifar_resnet_initialisation_and_timm_conventions():
    network = timm.create_model("cifar_resnet20", num_classes=100)
    weight = network.layer2[1].conv1.weight  # kaiming_normal_, fan_out = 32 channels x 9
    assert abs(weight.std().item() - (2 / (32 * 9)) ** 0.5) < 0.003
    x = torch.rand(2, 3, 32, 32)
    assert network.forward_features(x).shape == (2, 64, 8, 8)
    assert network.forward_head(network.forward_features(x), pre_logits=True).shape == (2, 64)
    network.reset_classifier(7)
    assert network(x).shape == (2, 7) and network.get_classifier() is network.fc


def test_a_published_teacher_loads_strictly(tmp_path):
    """RepDistiller's files: {"epoch", "model", "accuracy", "optimizer"}; DataParallel's prefix is tolerated."""
    original = timm.create_model("cifar_resnet20", num_classes=100)
    for prefix in ("", "module."):
        state = {prefix + k: v for k, v in original.state_dict().items()}
        optimizer = torch.optim.SGD(original.parameters(), 0.1).state_dict()
        torch.save({"epoch": 240, "model": state, "accuracy": torch.tensor(72.3), "optimizer": optimizer}, tmp_path / "t.pth")
        loaded = models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / "t.pth")
        assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in original.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("fc.bias"), r"127 of 128 tensors match; missing fc.bias"),
        (lambda s: s.update({"extra": torch.zeros(1)}), r"128 of 128 tensors match; unexpected extra"),
        (lambda s: s.update({"fc.weight": torch.zeros(10, 64)}), r"fc.weight is \(10, 64\), expected \(100, 64\)"),
        (lambda s: s.update({"fc.weight": 3}), r"fc.weight is \('not a tensor',\)"),
        (lambda s: [s.update({"net." + k: s.pop(k)}) for k in list(s)], r"0 of 128 tensors match; missing conv1.weight"),
    ],
    ids=["missing", "unexpected", "shape", "type", "prefix"],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    state = dict(timm.create_model("cifar_resnet20", num_classes=100).state_dict())
    change(state)
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(models.ModelError, match=message):
        models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / "t.pth")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_a_foreign_pickle_is_refused_and_not_executed(tmp_path):
    torch.save({"model": {}, "args": Evil(tmp_path / "marker")}, tmp_path / "t.pth")
    with pytest.raises(models.ModelError, match="Unsupported globals"):
        models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / "t.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    with pytest.raises(models.ModelError):
        models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / "raw.pth")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torn_files_are_refused(content, suffix, tmp_path):
    (tmp_path / f"t.{suffix}").write_bytes(content)
    with pytest.raises(models.ModelError, match=f"t.{suffix}"):
        models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / f"t.{suffix}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(model="resnet5O"), "timm has no model 'resnet5O', did you mean 'resnet50'?"),
        (dict(model="hf-hub:someone/something"), "timm has no model 'hf-hub:someone/something'"),
        (dict(model="local-dir:/tmp/x"), "timm has no model 'local-dir:/tmp/x'"),
        (dict(model="cifar_resnet20", model_args={"width": 4}), "cannot be built with .*unexpected keyword argument 'width'"),
        (dict(model="cifar_resnet20", model_args={"depth": 21}), "depth must be 6 n"),
        (dict(model="vit_tiny_patch16_224"), "cannot take images of 32x32"),
        (dict(model="cifar_resnet20", checkpoint="nowhere.pth"), "nowhere.pth: no such file"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_networks_that_cannot_be_built(arguments, message):
    with pytest.raises(models.ModelError, match=message):
        models.build(**{"classes": 10, "size": 32} | arguments)


def test_each_network_normalises_its_own_input():
    images = torch.rand(2, 3, 32, 32)
    network = models.build("cifar_resnet20", classes=100, size=32).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)))
    torch.testing.assert_close(network(images), network.model((images - mean) / std))
    vit = models.build("vit_tiny_patch16_224", classes=5, size=32, model_args={"img_size": 32, "patch_size": 8}).eval()
    torch.testing.assert_close(vit(images), vit.model(images * 2 - 1))  # timm's ViTs use 0.5 and 0.5
    own = models.build("cifar_resnet20", classes=100, size=32, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    torch.testing.assert_close(own(images), own.model(images))


@pytest.mark.parametrize(
    "name, arguments",
    [("cifar_resnet8", {"widths": [4, 4, 8, 16]}), ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2})],
)
def test_exported_students_load_in_timm(name, arguments, tmp_path):
    network = models.build(name, classes=7, size=32, model_args=arguments, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()
    for _ in range(2):  # the second replaces the first
        models.export(
            network,
            tmp_path / "s",
            model_args=arguments,
            size=32,
            crop_pct=0.9,
            interpolation="bicubic",
            label_names=list("abcdefg"),
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]
    images = torch.rand(2, 3, 32, 32)
    code = "import json, models, timm, torch, sys; m = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval();"
    code += "c = timm.data.resolve_data_config(model=m); x = torch.load(sys.argv[2]);"
    code += "print(json.dumps([m(x).tolist(), c['mean'], c['std'], c['crop_pct'], c['input_size'], c['interpolation']]))"
    torch.save((images - network.mean) / network.std, tmp_path / "x.pt")
    command = [sys.executable, "-c", code, str(tmp_path / "s"), str(tmp_path / "x.pt")]
    logits, *config = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    torch.testing.assert_close(torch.tensor(logits), network(images))
    assert config == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 0.9, [3, 32, 32], "bicubic"]
    again, _ = models.load_exported(tmp_path / "s")
    torch.testing.assert_close(again.eval()(images), network(images))


def test_an_export_that_was_killed_does_not_block_the_next(tmp_path):
    network = models.build("cifar_resnet8", classes=7, size=8)
    for leftover in (".s.old", ".s.tmp", "s"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "part").write_text("x")
    models.export(network, tmp_path / "s", model_args={}, size=8, crop_pct=1.0, interpolation="bilinear")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]


def test_distilled_combines_the_terms():
    network = models.build("cifar_resnet8", classes=10, size=8)
    images, taught, target = torch.rand(4, 3, 8, 8), torch.randn(4, 10), torch.arange(4)
    module = models.Distilled(network, losses.cross_entropy, losses.make_loss("kd", temperature=4.0), hard_weight=0.1)
    terms = module(images, (taught, None), target, None, 0.9)
    torch.testing.assert_close(terms["loss"], 0.1 * terms["hard"] + 0.9 * terms["soft"])
    assert terms["loss"].requires_grad
    alone = models.Distilled(network, losses.cross_entropy, None, hard_weight=1.0)(images, None, target, None, 0.0)
    assert set(alone) == {"loss", "hard"} and alone["loss"] == alone["hard"]


def test_losses_are_float32_under_autocast():
    network = models.build("cifar_resnet8", classes=10, size=8)
    module = models.Distilled(network, losses.cross_entropy, losses.kd, hard_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.rand(4, 3, 8, 8)).dtype == torch.bfloat16
        terms = module(torch.rand(4, 3, 8, 8), (torch.randn(4, 10).bfloat16(), None), torch.arange(4), None, 1.0)
    assert {t.dtype for t in terms.values()} == {torch.float32}
