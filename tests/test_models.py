"""models.py: the published CIFAR layouts, features, normalisation, building, loading, export, class names."""

import argparse
import json
import multiprocessing
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from timm.data import ImageNetInfo

import class_names
import models
import sources

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
    """RepDistiller's key layout: a shortcut where the stride or the channels change (option B)."""
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


def test_weights_of_other_classes_get_a_new_head(tmp_path):
    original = timm.create_model("cifar_resnet20", num_classes=100)
    torch.save(original.state_dict(), tmp_path / "w.pth")
    for classes in (100, 7):
        state = models.build(
            "cifar_resnet20", classes=classes, size=32, weights=tmp_path / "w.pth"
        ).model.state_dict()
        same = {key for key, tensor in original.state_dict().items() if torch.equal(tensor, state[key])}
        assert state.keys() - same == (set() if classes == 100 else {"fc.weight", "fc.bias"})
    with pytest.raises(models.ModelError, match=r"does not fit CifarResNet: Missing key"):
        models.build("cifar_resnet56", classes=7, size=32, weights=tmp_path / "w.pth")


def test_a_published_teacher_loads_strictly(tmp_path):
    """RepDistiller's files {"epoch", "model", "accuracy", "optimizer"}, also with DataParallel's prefix."""
    original = timm.create_model("cifar_resnet20", num_classes=100)
    for prefix in ("", "module."):
        state = {prefix + k: v for k, v in original.state_dict().items()}
        optimizer = torch.optim.SGD(original.parameters(), 0.1).state_dict()
        torch.save(
            {"epoch": 240, "model": state, "accuracy": torch.tensor(72.3), "optimizer": optimizer},
            tmp_path / "t.pth",
        )
        loaded = models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / "t.pth")
        assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in original.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("fc.bias"), r"fit CifarResNet: Missing key\(s\) in state_dict: \"fc.bias\"\.$"),
        (
            lambda s: s.update({"extra": torch.zeros(1)}),
            r"fit CifarResNet: Unexpected key\(s\) in state_dict: \"extra\"\.$",
        ),
        (
            lambda s: s.update({"fc.weight": torch.zeros(10, 64)}),
            r"size mismatch for fc.weight: .*\[10, 64\].*\[100, 64\]",
        ),
        (lambda s: s.update({"fc.weight": 3}), "fc.weight is not a dense tensor of real numbers"),
        (lambda s: s.update({"fc.bias": s["fc.bias"].to_sparse()}), "fc.bias is not a dense tensor"),
        (lambda s: s.update({"fc.bias": s["fc.bias"].to("meta")}), "fc.bias is not a dense tensor"),
        (lambda s: s.update({"fc.bias": s["fc.bias"] * 1j}), "fc.bias is not a dense tensor"),
        (
            lambda s: s.update({"fc.bias": torch.quantize_per_tensor(s["fc.bias"], 1, 0, torch.qint8)}),
            "fc.bias is not a dense tensor",
        ),
        (
            lambda s: [s.update({"net." + k: s.pop(k)}) for k in list(s)],
            r"fit CifarResNet: Missing key\(s\) in state_dict: \"conv1.weight\"",
        ),
    ],
    ids=["missing", "unexpected", "shape", "type", "sparse", "meta", "complex", "quantized", "prefix"],
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
    with pytest.raises(
        models.ModelError, match=r"it holds more than weights, which may run a program: io\.open"
    ):
        models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / "t.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    with pytest.raises(models.ModelError):
        models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / "raw.pth")
    assert not (tmp_path / "marker").exists()


def test_no_message_advises_to_unpickle(tmp_path):
    (tmp_path / "t.pth").write_bytes(b"garbage" * 100)
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("t.pth", "list.pth"):
        with pytest.raises(models.ModelError, match="it is not a file of weights") as error:
            models.build("cifar_resnet20", classes=100, size=32, checkpoint=tmp_path / name)
        assert "weights_only" not in str(error.value)


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
        (
            dict(model="cifar_resnet20", model_args={"width": 4}),
            "cannot be built with .*unexpected keyword argument 'width'",
        ),
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
    vit = models.build(
        "vit_tiny_patch16_224", classes=5, size=32, model_args={"img_size": 32, "patch_size": 8}
    ).eval()
    torch.testing.assert_close(vit(images), vit.model(images * 2 - 1))  # timm's ViTs use 0.5 and 0.5
    own = models.build("cifar_resnet20", classes=100, size=32, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    torch.testing.assert_close(own(images), own.model(images))


LOAD_IN_TIMM = """
import cifar_resnet, json, sys, timm, torch
results = [list(timm.create_model("cifar_resnet20", num_classes=7)(torch.rand(2, 3, 32, 32)).shape)]
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    config = timm.data.resolve_data_config(model=model)
    values = [config[key] for key in ("mean", "std", "crop_pct", "input_size", "interpolation")]
    results.append([model(torch.load(folder + ".pt")).tolist(), *values])
print(json.dumps(results))
"""


def test_exported_students_load_in_timm(tmp_path):
    """In a folder that has cifar_resnet.py alone; in one process, because its imports take seconds."""
    shutil.copy(ROOT / "cifar_resnet.py", tmp_path)
    students = {
        "cifar_resnet8": {"widths": [4, 4, 8, 16]},
        "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    }
    preprocessing = dict(size=32, crop_pct=0.9, interpolation="bicubic", label_names=list("abcdefg"))
    images, expected = torch.rand(2, 3, 32, 32), []
    for name, arguments in students.items():
        statistics = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
        network = models.build(name, classes=7, size=32, model_args=arguments, **statistics).eval()
        for _ in range(2):  # the second replaces the first
            models.export(network, tmp_path / "s" / name, model_args=arguments, **preprocessing)
        written = sorted(p.name for p in (tmp_path / "s" / name).iterdir())
        assert written == ["config.json", "model.safetensors"]
        torch.save((images - network.mean) / network.std, tmp_path / "s" / f"{name}.pt")
        expected.append(network(images))
        again, _ = models.load_exported(tmp_path / "s" / name)
        torch.testing.assert_close(again.eval()(images), expected[-1])

    folders = [str(tmp_path / "s" / name) for name in students]
    command = [sys.executable, "-c", LOAD_IN_TIMM, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    shape, *loaded = json.loads(done.stdout)
    assert shape == [2, 7]
    for (logits, *config), wanted in zip(loaded, expected, strict=True):
        torch.testing.assert_close(torch.tensor(logits), wanted)
        assert config == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 0.9, [3, 32, 32], "bicubic"]


def test_a_student_goes_to_onnx_and_torch_export(tmp_path):
    """By the README's lines; to 1e-5."""
    import onnxruntime

    student = models.build("cifar_resnet8", classes=10, size=8)
    models.export(student, tmp_path / "kd", model_args={}, size=8, crop_pct=1.0, interpolation="bilinear")
    net = timm.create_model(f"local-dir:{tmp_path / 'kd'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    image = transform(Image.fromarray(pixels))[None]
    logits = net(image)
    torch.testing.assert_close(student.eval()(image * student.std + student.mean), logits, rtol=0, atol=1e-5)
    torch.onnx.export(net, image, tmp_path / "kd.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "kd.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), logits, rtol=0, atol=1e-5)
    exported = torch.export.export(net, (image,)).module()
    torch.testing.assert_close(exported(image), logits, rtol=0, atol=1e-5)


def test_an_export_that_was_killed_does_not_block_the_next(tmp_path):
    network = models.build("cifar_resnet8", classes=7, size=8)
    for leftover in (".s.old", ".s.tmp", "s"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "part").write_text("x")
    models.export(network, tmp_path / "s", model_args={}, size=8, crop_pct=1.0, interpolation="bilinear")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------- features


@pytest.mark.parametrize(
    "name, size, arguments, expected",
    [
        ("cifar_resnet20", 32, {}, [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64,)]),
        ("resnet18", 64, {}, [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512,)]),
        ("mobilenetv2_050", 64, {}, [(16, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280,)]),
        ("convnextv2_atto", 64, {}, [(40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2), (320,)]),
        (
            "beitv2_base_patch16_224",
            64,
            dict(img_size=64, depth=5, embed_dim=32, num_heads=2),
            [(2, 16, 16), (8, 8, 8), (32, 4, 4), (32, 2, 2), (32,)],
        ),
        ("vit_tiny_patch16_224", 64, dict(img_size=64, depth=2), [(192, 4, 4), (192, 4, 4), (192,)]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_taps_give_maps_and_leave_the_logits(name, size, arguments, expected):
    network = models.build(name, classes=7, size=size, model_args=arguments).eval()
    images = torch.rand(2, 3, size, size)
    taps = network.default_taps()
    with torch.no_grad():
        logits, features = network(images, taps)
        assert torch.equal(logits, network(images))
    assert [tuple(f.shape[1:]) for f in features] == expected == network.shapes(size, taps)
    classifier = network.model.get_classifier()
    torch.testing.assert_close(classifier(features[-1]), logits)


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", "resnet26"])
def test_preactivation_features_are_those_before_the_relu(name):
    """vanillaKD's "pre-activation" maps share storage with timm's in-place ReLU, and are its output."""
    network = models.build(name, classes=7, size=32).eval()
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        (
            torch.nn.init.normal_(norm.weight),
            torch.nn.init.normal_(norm.bias),
        )  # some timm blocks begin as the identity
    images, taps = torch.rand(2, 3, 32, 32), network.default_taps()
    with torch.no_grad():
        (logits, after), (same, before) = network(images, taps), network(images, taps, True)
    assert torch.equal(logits, same)
    for a, b in zip(after[:-1], before[:-1], strict=True):
        assert b.min() < 0 and torch.equal(a, b.relu())
    assert torch.equal(after[-1], before[-1])


def test_taps_that_are_not_there_are_refused():
    network = models.build("cifar_resnet8", classes=7, size=32)
    with pytest.raises(models.ModelError, match=r"CifarResNet gives no features at taps \[1, 9\]"):
        network.shapes(32, (1, 9))
    mobile = models.build("mobilenetv2_050", classes=7, size=32)
    with pytest.raises(models.ModelError, match="EfficientNet gives no preactivation features"):
        mobile.shapes(32, mobile.default_taps(), preactivation=True)


# ---------------------------------------------------------------- other people's weights


def facebook_names(state):
    """timm's ConvNeXtV2 keys as facebookresearch/ConvNeXt-V2 and vanillaKD's released student have them."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        renamed[key] = value.view(1, 1, 1, -1) if "grn" in key else value
    return renamed


def test_upstreams_student_checkpoints_load(tmp_path):
    """vanillaKD releases timm's files, with a run's arguments, and ConvNeXtV2 under facebook's names."""
    torch.manual_seed(0)
    small = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    model = timm.create_model("convnextv2_atto", num_classes=10, **small).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save({"model": facebook_names(model.state_dict())}, tmp_path / "facebook.pth")
    saved = {
        "epoch": 3,
        "arch": "x",
        "state_dict": model.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "metric": 80.0,
    }
    torch.save(saved, tmp_path / "timm.pth.tar")
    images = torch.rand(2, 3, 32, 32)
    for file in ("facebook.pth", "timm.pth.tar"):
        loaded = models.build(
            "convnextv2_atto", classes=10, size=32, model_args=small, checkpoint=tmp_path / file
        ).eval()
        mean, std = (torch.tensor(loaded.statistics[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        torch.testing.assert_close(loaded(images), model((images - mean) / std))
    del saved["state_dict"]["head.fc.bias"]
    torch.save(saved, tmp_path / "torn.pth")
    with pytest.raises(models.ModelError, match=r"Missing key.*head.fc.bias"):
        models.build(
            "convnextv2_atto", classes=10, size=32, model_args=small, checkpoint=tmp_path / "torn.pth"
        )


@pytest.mark.parametrize(
    "tag, mean, size, interpolation",
    [
        ("beitv2_large_patch16_224.in1k_ft_in22k_in1k", 0.485, 224, "bicubic"),
        ("beitv2_base_patch16_224.in1k_ft_in22k_in1k", 0.485, 224, "bicubic"),
        ("beitv2_base_patch16_224.in1k_ft_in1k", 0.485, 224, "bicubic"),
        ("convnext_xlarge.fb_in22k_ft_in1k", 0.485, 224, "bicubic"),
        ("resnet152.a1h_in1k", 0.485, 224, "bicubic"),
        ("resnet50.tv_in1k", 0.485, 224, "bilinear"),
        ("resnet34.tv_in1k", 0.485, 224, "bilinear"),
        ("vit_small_patch16_224", 0.5, 224, "bicubic"),
        ("deit_small_patch16_224", 0.485, 224, "bicubic"),
    ],
)
def test_tags_bring_their_own_preprocessing(tag, mean, size, interpolation):
    config = timm.get_pretrained_cfg(tag)
    assert (config.mean[0], config.input_size[-1], config.interpolation) == (mean, size, interpolation)
    models.check_pretrained(tag, classes=1000, size=224)


def test_a_teacher_that_does_not_answer_for_the_data_is_refused():
    with pytest.raises(models.ModelError, match="was trained for 21841 classes, the data has 1000"):
        models.check_pretrained("beitv2_base_patch16_224.in1k_ft_in22k", classes=1000, size=224)
    with pytest.raises(
        models.ModelError, match=r"was trained at 384 pixels and would see 224: set teacher.size to 384"
    ):
        models.check_pretrained("convnext_xlarge.fb_in22k_ft_in1k_384", classes=1000, size=224)
    with pytest.raises(
        models.ModelError, match=r"no pretrained weights called 'resnet50.a9_in1k' \(it has: resnet50.a1_in1k"
    ):
        models.check_pretrained("resnet50.a9_in1k", classes=1000, size=224)


def test_a_teacher_resizes_its_input():
    small = dict(model_args={"widths": [4, 4, 8, 8]}, classes=10)
    plain = models.build("cifar_resnet8", size=32, **small)
    resizing = models.build("cifar_resnet8", size=16, resize=32, **small)
    resizing.model.load_state_dict(plain.model.state_dict())
    images = torch.rand(2, 3, 16, 16)
    larger = torch.nn.functional.interpolate(images, 32, mode="bilinear", antialias=True).clamp(0, 1)
    assert torch.equal(resizing(images), plain(larger)) and not torch.equal(resizing(images), plain(images))


# ---------------------------------------------------------------- recipes and folders from strangers


@pytest.mark.parametrize(
    "key, value",
    [
        ("pretrained_cfg", {"url": "http://127.0.0.1:1/weights.pth"}),
        ("pretrained_cfg_overlay", {"file": "/etc/passwd"}),
        ("pretrained_strict", False),
        ("checkpoint_path", "weights.pth"),
        ("cache_dir", "/tmp/elsewhere"),
        ("hf_hub_id", "someone/something"),
        ("url", "http://127.0.0.1:1/weights.pth"),
        ("file", "weights.pth"),
        ("weights", "weights.pth"),
        ("scriptable", True),
        ("exportable", True),
        ("no_jit", True),
        ("features_only", True),
        ("kwargs_filter", ["depth"]),
        ("model_name", "resnet50"),
        ("widths", {"stem": 4}),
        ("widths", [4, [4, {}]]),
    ],
)
def test_model_args_can_only_shape_the_network(key, value):
    with pytest.raises(models.ModelError, match=f"model_args: '{key}' is"):
        models.build("cifar_resnet8", classes=10, size=8, model_args={key: value})


def test_model_args_of_recipes_are_accepted():
    """Those that the recipes here use, and one of each kind of value."""
    recipes = [json.loads(path.read_text()) for path in (ROOT / "recipes").glob("*.json")]
    used = [student.get("model_args", {}) for recipe in recipes for student in recipe.get("students", ())]
    assert any(used)
    for arguments in used:
        models.check_model_args(arguments)
    models.check_model_args(
        {"a": 1, "b": 0.5, "c": "gelu", "d": True, "e": None, "f": [[1, 2], (3,)], "weight_init": ""}
    )


@pytest.fixture
def exported(tmp_path):
    """An exported student, and a function that changes its config.json."""
    network = models.build("cifar_resnet8", classes=3, size=8, model_args={"widths": [2, 2, 2, 2]})
    preprocessing = dict(size=8, crop_pct=1.0, interpolation="bilinear")
    folder = tmp_path / "student"
    names = ["cat", "dog", "frog"]
    models.export(network, folder, model_args={"widths": [2, 2, 2, 2]}, label_names=names, **preprocessing)

    def edit(change):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return network, edit


def test_a_config_cannot_name_other_weights(exported, tmp_path):
    """The weights are those of the folder, whatever its config.json and the other files in it say."""
    network, edit = exported
    other = timm.create_model("cifar_resnet8", num_classes=3, widths=[2, 2, 2, 2]).state_dict()
    torch.save(other, tmp_path / "other.pth")
    torch.save(other, tmp_path / "student" / "pytorch_model.bin")
    places = {
        "url": "http://127.0.0.1:1/x.pth",
        "file": str(tmp_path / "other.pth"),
        "hf_hub_id": "a/b",
        "custom_load": True,
    }
    folder = edit(
        lambda config: config["pretrained_cfg"].update(places, state_dict={"fc.weight": 1}, source="file")
    )
    loaded, config = models.load_exported(folder)
    for key, value in network.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    assert (
        not {"url", "file", "hf_hub_id", "state_dict", "source"} & config.keys() and not config["custom_load"]
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(models.ModelError, match=r"no model\.safetensors"):
        models.load_exported(folder)


def load_watched(folder):
    """(the error, files and sockets opened) of load_exported; in a process that ends, as audit hooks stay."""
    opened = []

    def watch(event, arguments):
        if event == "open" or event.startswith("socket."):
            opened.append(str(arguments[0]) if event == "open" else event)

    sys.addaudithook(watch)
    try:
        models.load_exported(folder)
        return None, opened
    except models.ModelError as error:
        return str(error), opened


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "{}/other.pth"},
        {"pretrained_cfg_overlay": {"source": "", "file": "{}/other.pth"}},
        {
            "pretrained_cfg_overlay": {"source": "", "file": "", "url": "http://127.0.0.1:1/x.pth"},
            "cache_dir": "{}/cache",
        },
    ],
)
def test_model_args_of_a_config_open_nothing(arguments, exported, tmp_path):
    network, edit = exported
    torch.save(network.model.state_dict(), tmp_path / "other.pth")
    text = json.dumps(arguments).replace("{}", str(tmp_path))
    folder = edit(lambda config: config["model_args"].update(json.loads(text)))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        message, opened = pool.apply(load_watched, (folder,))
    assert f"config.json: model_args: '{next(iter(arguments))}' is not accepted" in message
    assert [path for path in opened if "socket" in path or str(tmp_path) in path] == [
        str(folder / "config.json")
    ]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c.update(architecture="hf-hub:someone/something"),
            "timm has no model 'hf-hub:someone/something'",
        ),
        (lambda c: c.update(architecture=["resnet50"]), r"timm has no model \['resnet50'\]"),
        (lambda c: c.pop("architecture"), "not what timm's save_for_hf writes: KeyError"),
        (lambda c: c.update(pretrained_cfg=[]), "not what timm's save_for_hf writes: TypeError"),
        (lambda c: c.update(model_args=[1]), "not what timm's save_for_hf writes: AttributeError"),
        (lambda c: c["model_args"].update(depth="8"), "not what timm's save_for_hf writes: TypeError"),
        (lambda c: c["pretrained_cfg"].update(mean="dark"), "not what timm's save_for_hf writes: "),
        (lambda c: c["pretrained_cfg"].update(std=[0, 0, 0]), "std .* for std positive ones"),
        # timm alone would give the student a random classifier
        (
            lambda c: c["model_args"].update(num_classes=5),
            r"size mismatch for fc.weight: .*\[3, 2\].*\[5, 2\]",
        ),
    ],
    ids=range(9),
)
def test_an_edited_config_is_refused(change, message, exported):
    with pytest.raises(models.ModelError, match=message):
        models.load_exported(exported[1](change))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_an_exported_folder_are_refused(name, exported, tmp_path):
    folder = exported[1](lambda config: None)
    (folder / name).rename(folder / "inside")
    (folder / name).symlink_to("inside")
    models.load_exported(folder)
    (folder / "inside").rename(tmp_path / "outside")
    (folder / name).unlink()
    (folder / name).symlink_to("../outside")
    with pytest.raises(models.ModelError, match=f"{name}: a link out of its folder, to .*outside"):
        models.load_exported(folder)
    if name == "model.safetensors":
        with pytest.raises(models.ModelError, match="a link out of its folder"):
            models.build(
                "cifar_resnet8", classes=3, size=8, model_args={"widths": [2, 2, 2, 2]}, checkpoint=folder
            )


# ---------------------------------------------------------------- classes by name


def test_an_exported_student_knows_its_classes(exported):
    _, edit = exported
    loaded, _ = models.load_exported(edit(lambda config: None))
    assert class_names.of_network(loaded) == ["cat", "dog", "frog"]
    for names, expected in (
        ({"0": "cat", "1": "dog", "2": "frog"}, ["cat", "dog", "frog"]),  # timm's other form
        ({"0": "cat", "7": "dog", "2": "frog"}, None),
        (["cat", "dog"], None),
        (["cat", "dog", 3], None),
        (None, None),
    ):
        folder = edit(lambda config, names=names: config.update(label_names=names))
        assert class_names.of_network(models.load_exported(folder)[0]) == expected
    assert class_names.of_network(models.build("cifar_resnet8", classes=3, size=8)) is None


def test_classes_are_matched_by_name():
    known = ["cat", "dog", "frog"]
    assert class_names.match(known, ["cat", "dog", "frog"]) == [0, 1, 2]
    assert class_names.match(known, ("frog", "cat")) == [2, 0]
    with pytest.raises(sources.DataError) as caught:
        class_names.match(known, ["dog", "frog", "zebra"])
    told = (
        "the network and the data have other classes: only in the network: 'cat'; only in the data: 'zebra'"
    )
    assert str(caught.value) == told
    with pytest.raises(
        sources.DataError, match=r"other classes: only in the data: '10', '11', .* and 80 more$"
    ):
        class_names.match([str(i) for i in range(10)], [str(i) for i in range(100)])
    with pytest.raises(sources.DataError, match="class 1 is 'crane' in the network, None in the data"):
        class_names.match(["crane", "crane"], ["crane"])


def test_imagenets_classes_match_however_they_are_written():
    imagenet = ImageNetInfo()
    wnids, described = imagenet.label_names(), imagenet.label_descriptions()
    described = [
        text.split(",")[0] + ", another synonym" for text in described
    ]  # as on the hub, other synonyms
    numbers = [str(i) for i in range(1000)]
    for known in (wnids, described, numbers):
        for wanted in (wnids, described, numbers):
            assert class_names.match(known, wanted) == list(range(1000))
    assert class_names.match(described, [wnids[7], wnids[3]]) == [7, 3]
    with pytest.raises(
        sources.DataError, match=r"only in the network: 'thing 0', .*; only in the data: 'n01440764'"
    ):
        class_names.match([f"thing {i}" for i in range(1000)], wnids)
