"""tools/cka.py: the measure against its formula and its identities, what counts as a layer, and the
command.
"""

import base64
import gc
import importlib.util
import io
import itertools
import json
import math
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import models
import sources

spec = importlib.util.spec_from_file_location("cka", ROOT / "tools" / "cka.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def features(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return layer


def chain(*modules):
    """The layers under test are the outputs of these modules."""
    return nn.Sequential(nn.Flatten(), *modules)


def by_loops(x, y):
    """HSIC_1 of Song et al. 2012 as the U-statistic that it is: a mean over all quadruples of different
    images.
    """
    k, m, n = (x @ x.T).tolist(), (y @ y.T).tolist(), len(x)
    quadruples = list(itertools.permutations(range(n), 4))
    return sum(k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q]) for i, j, q, r in quadruples) / len(quadruples)


def direct(pairs):
    """CKA of batches [(X, Y)] by the formula of Nguyen et al. 2021, equation 3, in float64."""

    def hsic(x, y):
        k, m = ((z.double() @ z.double().T).fill_diagonal_(0) for z in (x, y))
        n, one = len(k), torch.ones(len(k), dtype=torch.float64)
        trace, sums, cross = (k @ m).trace(), (one @ k @ one) * (one @ m @ one), one @ k @ m @ one
        return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))

    batches = [*pairs], [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs]
    xy, xx, yy = (sum(hsic(*p) for p in batch) for batch in batches)
    return (xy / (xx * yy).sqrt()).item()


# ---------------------------------------------------------------- the measure


@pytest.mark.parametrize("n", [4, 7])
def test_inner_products_of_centred_grams_are_the_unbiased_hsic(n):
    x, y = features(n, 5, 1, torch.float64), features(n, 3, 2, torch.float64) + 0.3
    k, m = tool.centered_gram(x), tool.centered_gram(y)
    for a, b, (p, q) in ((k, m, (x, y)), (k, k, (x, x)), (m, m, (y, y))):
        assert (a * b).sum().item() / (n * (n - 3)) == pytest.approx(by_loops(p, q), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("batch", [48, 16])
def test_minibatches_and_the_whole_set_against_the_formula(batch):
    x, first, second = features(48, 20), features(6, 20, 1), features(9, 20, 2)
    a, b = chain(linear(first), nn.Tanh()), chain(linear(second))
    names_a, names_b, found = tool.cka(a, b, x.split(batch))
    assert (names_a, names_b) == (["1", "2"], ["1"])
    for i, layer in enumerate((lambda z: z @ first.T, lambda z: (z @ first.T).tanh())):
        wanted = direct([(layer(part), part @ second.T) for part in x.split(batch)])
        assert found[i, 0].item() == pytest.approx(wanted, abs=1e-6)


def test_a_mean_far_from_zero_costs_no_digits():
    """After an offset of 1,000 the formula in float32 has none left."""
    x, weight = features(32, 12), features(4, 12, 1)
    other = chain(linear(features(5, 12, 2)))
    near = tool.cka(chain(linear(weight)), other, [x])[2]
    far = tool.cka(chain(linear(weight, torch.full((4,), 1000.0))), other, [x])[2]
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)


def test_one_for_rotations_and_scales_and_less_for_other_maps():
    x, weight = features(40, 16), features(8, 16, 1)
    rotation = torch.linalg.qr(features(8, 8, 2))[0]
    for like in (weight, rotation @ weight, 7.5 * weight, -0.01 * rotation @ weight):
        found = tool.cka(chain(linear(weight)), chain(linear(like)), x.split(20))[2]
        assert found.item() == pytest.approx(1, abs=1e-6)
    stretched = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1])) @ weight
    assert tool.cka(chain(linear(weight)), chain(linear(stretched)), x.split(20))[2].item() < 0.95


def test_symmetric():
    x = features(24, 10)
    a, b = chain(linear(features(6, 10, 1)), nn.ReLU()), chain(linear(features(3, 10, 2)))
    there, back = tool.cka(a, b, x.split(8))[2], tool.cka(b, a, x.split(8))[2]
    torch.testing.assert_close(there, back.T, rtol=0, atol=1e-12)


def test_independent_features_are_unlike_in_small_batches_too():
    """The biased estimate of these batches is 0.9: eight images in 64 dimensions always look alike."""
    x, eye = features(800, 128), torch.eye(128)
    found = tool.cka(chain(linear(eye[:64])), chain(linear(eye[64:])), x.split(8))[2].item()
    assert abs(found) < 0.05
    left, right = (z - z.mean(0) for z in (x[:8, :64], x[:8, 64:]))
    k, m = left @ left.T, right @ right.T
    assert (k * m).sum() / (k.norm() * m.norm()) > 0.7


def test_a_constant_layer_is_like_nothing_and_leaves_the_others_alone():
    x, weight = features(32, 10), features(4, 10, 1)
    rounding = linear(torch.full((4, 10), 1e-8), torch.full((4,), 30.0))
    for constant in (linear(torch.zeros(4, 10), torch.full((4,), 3.3)), linear(torch.zeros(4, 10)), rounding):
        other = chain(linear(weight), linear(torch.eye(4)), constant_after(constant))
        found = tool.cka(chain(linear(weight)), other, [x])[2]
        assert found[0, :2].tolist() == pytest.approx([1, 1], abs=1e-6) and math.isnan(found[0, 2])


def constant_after(layer):
    return linear(layer.weight[:, :4], layer.bias)


def test_features_that_are_not_finite_are_named():
    broken = chain(linear(features(4, 10)), linear(torch.full((2, 4), float("nan"))))
    with pytest.raises(models.ModelError, match=r"not finite at 2: the network has diverged"):
        tool.cka(chain(linear(features(4, 10))), broken, [features(8, 10)])


def test_three_images_are_too_few():
    a = chain(linear(features(4, 10)))
    with pytest.raises(models.ModelError, match="a batch of 3 images: the unbiased HSIC needs 4"):
        tool.cka(a, a, [features(3, 10)])


# ---------------------------------------------------------------- layers


class Block(nn.Module):
    """A residual block whose activation, in place, runs twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.drop, self.skip = nn.Dropout(0.5), nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.act(self.drop(self.fc(self.act(x.clone()))))


def test_a_layer_for_every_tensor_in_order_of_execution():
    net = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Block(), nn.Identity()), nn.ReLU(inplace=True))
    names, grams, sizes = tool.layers(net.eval(), features(8, 4))
    assert names == ["0", "1.0.act", "1.0.fc", "1.0.act", "1.0", "2"]
    assert grams.shape == (6, 8, 8) and sizes.shape == (6,)
    x = net[0](features(8, 4))
    torch.testing.assert_close(grams[0], tool.centered_gram(x))  # not what the ReLUs in place made of it
    torch.testing.assert_close(grams[4], tool.centered_gram(net[1][0](x)))


def test_hooks_go():
    net, other = chain(linear(features(4, 10)), nn.Dropout(0.5)), chain(linear(features(4, 10, 1)), nn.Tanh())
    with pytest.raises(RuntimeError):
        tool.cka(net, other, [features(8, 3)])
    assert not torch.nn.modules.module._global_forward_hooks


def test_memory_grows_neither_with_images_nor_with_the_width_of_features():
    """Live tensor elements when a batch is asked for, and at the last layer: Gram matrices, not sets of
    features.
    """
    width, net = 50_000, chain(*(nn.Tanh() for _ in range(12)))
    seen = {"between": [], "last": []}

    def live(when):
        seen[when].append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))

    def batches(n):
        for i in range(n):
            live("between")
            yield features(8, width, i)

    net[-1].register_forward_pre_hook(lambda *_: live("last"))
    small = chain(linear(torch.eye(4, width)))
    gc.freeze()  # get_objects leaves out what is there before, and takes a tenth of the time
    tool.cka(net, small, batches(3))
    gc.unfreeze()
    feature = 8 * width
    assert max(seen["between"]) < 2 * feature and len(set(seen["between"][1:])) == 1
    assert max(seen["last"]) < 6 * feature  # of 12 layers


def test_a_transformer_against_a_cifar_resnet():
    args = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2)
    vit = models.build("vit_tiny_patch16_224", classes=10, size=32, model_args=args)
    cnn = models.build("cifar_resnet8", classes=10, size=32)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names_a, names_b, found = tool.cka(cnn, vit, images.split(8))
    assert names_a[0] == "conv1" and names_a[-1] == names_b[-1].replace("head", "fc") == "fc"
    assert names_b[0].startswith("patch_embed")
    assert {"blocks.0", "blocks.1", "blocks.0.attn.qkv", "blocks.1.mlp.act"} <= set(names_b)
    assert "blocks.0.attn.q_norm" not in names_b and "" not in names_b  # identities, and the network itself
    assert found.shape == (len(names_a), len(names_b))
    assert found.isfinite().all() and found.abs().max() <= 1 + 1e-9
    itself = tool.cka(vit, vit, images.split(8))[2]
    torch.testing.assert_close(itself.diagonal(), torch.ones(len(itself), dtype=torch.float64))


# ---------------------------------------------------------------- models, images, command


def export(folder, name="kd", seed=0, model="cifar_resnet8"):
    torch.manual_seed(seed)
    net = models.build(model, classes=10, size=8)
    preprocessing = dict(size=8, crop_pct=1.0, interpolation="bilinear")
    (folder / "students").mkdir(parents=True, exist_ok=True)
    models.export(net, folder / "students" / name, model_args={}, **preprocessing)
    return net


def test_the_ways_to_name_a_model(tmp_path):
    section = type("Section", (), dict(classes=10, size=8))
    net = export(tmp_path / "run")
    images = torch.rand(2, 3, 8, 8)
    wanted, run = net.eval()(images), tmp_path / "run"
    for name in (run, run / "students" / "kd"):
        network, told = tool.load(str(name), section)
        assert torch.equal(network.eval()(images), wanted)
        assert told == "cifar_resnet8 (run/students/kd)"
    export(tmp_path / "run", "dkd")
    several = r"several students: name one of .*students/dkd, .*students/kd"
    with pytest.raises(models.ModelError, match=several):
        tool.load(str(run), section)
    for unknown in ("resnet999", "cifar_resnet8"):
        with pytest.raises(
            models.ModelError, match=rf"timm has no (model|pretrained weights called) '{unknown}'"
        ):
            tool.load(unknown, section)


def test_a_network_of_another_size_resizes_for_itself(tmp_path):
    export(tmp_path / "run")
    network, _ = tool.load(str(tmp_path / "run"), type("Section", (), dict(classes=10, size=16)))
    images = torch.rand(2, 3, 16, 16)
    assert network.size == 8 and network(images).shape == (2, 10)


def test_which_images():
    """Those of --recipe, or of --data; never streamed."""
    imagenet = str(ROOT / "recipes" / "a1_res50_beitb.json")
    for data, source in ((None, "ILSVRC/imagenet-1k"), ("DIR", "DIR")):
        section = tool.section_of(SimpleNamespace(recipe=imagenet, data=data))
        assert (section.source, section.size, section.streaming) == (source, 224, False)


def digits():
    prepared = dict(source="digits", size=8, crop_pct=1.0, interpolation="bilinear", streaming=False)
    return type("Section", (), sources.evaluation_fields("digits") | prepared)


def test_images_are_drawn_once_each_in_whole_batches_the_same_every_time():
    loaders = [tool.image_loader(digits(), 100, 32, 0) for _ in range(2)]
    ids = [[index.tolist() for _, _, index in loader] for loader in loaders]
    assert ids[0] == ids[1] and [len(batch) for batch in ids[0]] == [32, 32, 32]
    flat = list(itertools.chain(*ids[0]))
    assert len(set(flat)) == 96 and flat != sorted(flat)
    with pytest.raises(
        sources.DataError, match="digits: 20 images do not fill one batch of 32: lower --batch"
    ):
        tool.image_loader(digits(), 20, 32, 0)


def test_the_command_writes_the_matrix_and_its_picture(tmp_path, capsys):
    a, b = export(tmp_path / "teacher", "scratch"), export(tmp_path / "run", seed=1, model="cifar_resnet20")
    names = [str(tmp_path / "teacher"), str(tmp_path / "run" / "students" / "kd")]
    out = tmp_path / "new" / "cka_r8_r20"
    recipe = str(ROOT / "recipes" / "quickstart.json")
    options = ["--recipe", recipe, "--images", "64", "--batch", "32", "--workers", "0"]
    tool.main([*names, *options, "--out", str(out)])
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["models"] == [
        "cifar_resnet8 (teacher/students/scratch)",
        "cifar_resnet20 (run/students/kd)",
    ]
    assert {"commit", "versions", "hardware", "precision"} <= set(result)
    assert (result["images"], result["batch"], result["split"]) == (64, 32, "test")
    assert result["command"].startswith("tools/cka.py ") and result["data"] == "digits"
    loader = tool.image_loader(digits(), 64, 32, 0)
    batches = (tool.evaluate.to_float(pixels, "cpu") for pixels, _, _ in loader)
    names_a, names_b, wanted = tool.cka(a, b, batches)
    assert result["layers"] == [names_a, names_b]
    assert f"{len(names_a)} x {len(names_b)} layers, 64 images; mean over the rows" in capsys.readouterr().out
    torch.testing.assert_close(torch.tensor(result["cka"], dtype=torch.float64), wanted, rtol=0, atol=1e-4)
    picture = ET.parse(out.with_suffix(".svg")).getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    images = picture.iter("{http://www.w3.org/2000/svg}image")
    links = [image.get("{http://www.w3.org/1999/xlink}href") for image in images]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    pictures = [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) for link in links]
    assert (len(names_b), len(names_a)) in [image.size for image in pictures]  # a pixel for a pair of layers


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nope", "nope", "--recipe", "quickstart"], "error: timm has no model 'nope'"),
        (["nope", "nope"], "the following arguments are required: --recipe"),
        (["nope", "nope", "--recipe", "none.json"], "none.json: cannot be read"),
    ],
)
def test_the_commands_errors(tmp_path, capsys, arguments, message):
    arguments = [str(ROOT / "recipes" / "quickstart.json") if a == "quickstart" else a for a in arguments]
    with pytest.raises(SystemExit, match="2"):
        tool.main([*arguments, "--out", str(tmp_path / "x")])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
