"""detect.py, coco.py, detectors.py: torchvision's losses, frozen stages, resume, AP, bad input."""

import copy
import json
import os
import random
import shutil
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pycocotools.mask
import pytest
import safetensors.torch
import timm
import torch
from conftest import (
    ROOT,
    SHARED,
    assert_same_run,
    exit_code,
    forked,
    needs_coco,
    newest,
    rows,
    run,
    run_until,
    stopped,
)
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_distributed import in_two_forks, launched, on_cpu
from torchvision.models.detection import faster_rcnn, roi_heads, rpn
from torchvision.ops import MultiScaleRoIAlign

import coco
import detect
import detectors
import launch
import models
import optim
import recipe
import rundir
import sources
import train

SAMPLE = SHARED / "coco_sample"
RECIPES = sorted((ROOT / "recipes").glob("coco_*.json"))
TINY = {"channels": [16, 16, 16, 16]}
SMALL = {
    "batch_size": 4,
    "batch_size_per_process": 2,
    "epochs": 2,
    "log_every": 2,
    "schedule.warmup_steps": 2,
    "schedule.milestones": [1],
    "data.short_sides": [64],
    "data.long_side": 96,
    "data.test_short_side": 64,
    "detector.width": 16,
    "detector.anchor_scale": 4.0,
    "detector.anchors": 32,
    "detector.proposals_of_level": [40, 40],
    "detector.proposals": [20, 20],
    "detector.rois": 16,
    "detector.mask_convs": [16],
}


@pytest.fixture(autouse=True)
def detector_command(monkeypatch):
    """What conftest runs is detect.py."""
    monkeypatch.setattr(train, "main", detect.main)


def settings_of(stem, *overrides):
    return recipe.load(ROOT / "recipes" / f"{stem}.json", overrides, detect.Recipe)


def small(folder, stem="coco_maskrcnn_res50_1x", students=("random",), **changes):
    """A recipe file with small sizes, of resnet18s that are thinner than timm's and have random weights."""
    tree = json.loads((ROOT / "recipes" / f"{stem}.json").read_text())
    cascade = len(tree["detector"]["stages"]) > 1
    heads = {"detector.box_layers": [32], "detector.box_convs": [16] if cascade else []}
    values = SMALL | heads | changes
    for path, value in values.items():
        node = tree
        *parents, last = path.split(".")
        for part in parents:
            node = node[part]
        node[last] = value
    like = dict(tree["students"][-1], model="resnet18", model_args=TINY, weights=None)
    like |= dict(optimizer="sgd", optimizer_args={"momentum": 0.9}, lr=0.01, frozen_stages=0)
    tree["students"] = [dict(like, name=name) if isinstance(name, str) else like | name for name in students]
    path = folder / "r.json"
    path.write_text(json.dumps(tree))
    return path


def made(folder, images=8, empty=True, seed=0):
    """A COCO folder of rectangles of two classes; a crowd, and an image without objects."""
    chance = random.Random(seed)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        tree = {"images": [], "annotations": [], "categories": []}
        tree["categories"] = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
        for i in range(1, images + 1 + empty):
            width, height = (64, 48) if i % 2 else (48, 64)
            image = Image.new("RGB", (width, height), (90, 90, 90))
            tree["images"].append(dict(id=i, file_name=f"{i}.png", width=width, height=height))
            for k in range(2 if i <= images else 0):
                x, y = chance.randint(0, width // 2), chance.randint(0, height // 2)
                w, h = chance.randint(12, width // 2 - 2), chance.randint(12, height // 2 - 2)
                ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), ("blue", "red")[k])
                ids = dict(id=10 * i + k, image_id=i, category_id=(3, 7)[k])
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                shape = dict(bbox=[x, y, w, h], area=w * h, iscrowd=0, segmentation=[polygon])
                tree["annotations"].append(ids | shape)
            image.save(folder / split / f"{i}.png")
        runs = {"size": [48, 64], "counts": [0, 48 * 20, 48 * 44]}
        crowd = dict(id=5, image_id=1, category_id=3, bbox=[0, 0, 20, 48], area=960, iscrowd=1)
        tree["annotations"].append(crowd | {"segmentation": runs})
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return made(tmp_path_factory.mktemp("coco") / "data")


# ---------------------------------------------------------------- 1 recipes and parameters


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_load_and_survive_a_round_trip(path, tmp_path):
    loaded = recipe.load(path, (), detect.Recipe)
    (tmp_path / "again.json").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "again.json", (), detect.Recipe) == loaded
    for student in loaded.students:
        models.check_name(student.model)
        if student.weights == "timm":
            models.pretrained_config(student.model)


def parameters(stem, classes, batch_norm):
    """The number of parameters of a recipe's detector, with or without those of BatchNorm."""
    settings = settings_of(stem)
    with torch.device("meta"):
        trunk = timm.create_model(settings.students[-1].model, num_classes=1000)
        network = models.Network(trunk, (0.5,) * 3, (0.5,) * 3)
        detector = detectors.Detector(network, settings.detector, classes)
    norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    left_out = {id(p) for norm in norms for p in norm.parameters()} if not batch_norm else set()
    return sum(p.numel() for p in detector.parameters() if id(p) not in left_out)


def test_parameters_are_those_that_were_published():
    assert parameters("coco_maskrcnn_res50_1x", 90, batch_norm=False) == 44_401_393
    assert parameters("coco_maskrcnn_cnv2t_3x", 80, batch_norm=True) == 48_146_101
    assert parameters("coco_cascade_cnv2t_3x", 80, batch_norm=True) == 85_990_017


# ---------------------------------------------------------------- 2 torchvision's values


@pytest.fixture
def inputs():
    """(features, proposals, sizes, targets) of two images of 64 pixels."""
    torch.manual_seed(0)
    shapes = {str(i): (2, 16, 16 >> i, 16 >> i) for i in range(4)} | {"pool": (2, 16, 1, 1)}
    features = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    corners = torch.rand(2, 30, 4) * 30
    corners[..., 2:] += corners[..., :2] + 2
    boxes = torch.tensor([[4.0, 4, 40, 44], [20, 10, 60, 60]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 8:40, 6:38] = masks[1, 12:50, 25:58] = 1
    target = dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=masks, to_mask=torch.tensor([1.0, 1, 0, 0]))
    return features, list(corners), [(64, 64)] * 2, [target, copy.deepcopy(target)]


def small_settings(stem="coco_maskrcnn_res50_1x", **changes):
    tree = {f"detector.{k}": v for k, v in {"box_layers": [32, 32], **changes}.items()}
    values = {k: v for k, v in SMALL.items() if k.startswith("detector.")} | tree
    return settings_of(stem, *(f"{k}={json.dumps(v)}" for k, v in values.items())).detector


def torchvision_heads(heads):
    """torchvision's RoIHeads with the weights of our one stage."""
    stage = heads.stages[0]
    box_head = faster_rcnn.TwoMLPHead(16 * 7 * 7, 32)
    box_head.fc6, box_head.fc7 = stage.box_head[1], stage.box_head[3]
    pools = [MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2) for side in (7, 14)]
    thresholds = (0.5, 0.5, 16, 0.25, (10.0, 10.0, 5.0, 5.0), stage.score_thresh, 0.5, 100)
    mask = pools[1], stage.mask_head, stage.mask_predictor
    return roi_heads.RoIHeads(pools[0], box_head, stage.box_predictor, *thresholds, *mask), pools


def test_one_stage_with_torchvisions_settings_is_torchvisions(inputs, monkeypatch):
    features, proposals, sizes, targets = inputs
    ours = detectors.Heads(small_settings(box_beta=1 / 9, min_score=0.3), classes=2)
    theirs, (ours.stages[0].box_roi_pool, ours.stages[0].mask_roi_pool) = torchvision_heads(ours)
    project = roi_heads.project_masks_on_boxes
    monkeypatch.setattr(detectors, "mask_targets", lambda target, *rest: project(target["masks"], *rest))

    def values(function):
        torch.manual_seed(1)
        losses = list(function().values())
        inputs = [*list(features.values())[:4], *ours.parameters()]
        return losses, torch.autograd.grad(sum(losses), inputs, allow_unused=True)

    mine = values(lambda: ours.losses(features, list(proposals), sizes, targets))
    other = values(lambda: theirs.train()(features, list(proposals), sizes, targets)[1])
    torch.testing.assert_close(mine, other, rtol=0, atol=0)
    with torch.no_grad():
        mine = ours.eval().detections(features, proposals, sizes)
        other, _ = theirs.eval()(features, proposals, sizes)
    assert len(mine[0]["scores"]) and [one.keys() for one in mine] == [one.keys() for one in other]
    for a, b in zip(mine, other, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_proposal_network_with_torchvisions_beta_is_torchvisions(inputs):
    features, _, sizes, targets = inputs
    ours = detectors.proposal_network(small_settings(rpn_beta=1 / 9))
    head = rpn.RPNHead(16, 3)
    head.load_state_dict(ours.head.state_dict())
    anchors = rpn.AnchorGenerator(ours.anchor_generator.sizes, ours.anchor_generator.aspect_ratios)
    counts = [dict(training=n, testing=n) for n in (40, 20)]
    theirs = rpn.RegionProposalNetwork(anchors, head, 0.7, 0.3, 32, 0.5, *counts, 0.7)
    images = detectors.ImageList(torch.zeros(2, 3, 64, 64), sizes)
    results = []
    for network in (ours, theirs):
        torch.manual_seed(1)
        results.append(network(images, features, targets))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_aligned_pool_differs_by_half_a_pixel(inputs):
    """On a map that grows by 1 per pixel, a box's mean is its centre less half a pixel of the map."""
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    features = {str(i): ramp for i in range(4)}
    pooled = detectors.RoIAlign(7)(features, [torch.tensor([[8.0, 8, 40, 40]])], None)
    assert pooled.mean().item() == pytest.approx((8 + 40) / 2 / 4 - 0.5)


@pytest.mark.parametrize("stem, bf16", [("coco_maskrcnn_res50_1x", True), ("coco_cascade_cnv2t_1x", False)])
def test_images_without_objects_give_finite_losses_and_every_gradient(stem, bf16, inputs):
    """DDP needs a gradient for every weight."""
    _, _, sizes, targets = inputs
    empty = {key: value[:0] for key, value in targets[0].items()} | {"to_mask": targets[0]["to_mask"]}
    net = models.build("resnet18", classes=10, size=64, model_args=TINY)
    detector = detectors.Detector(net, small_settings(stem, box_layers=[32]), classes=2).train()
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    for wanted in ([empty, targets[1]], [empty, copy.deepcopy(empty)]):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            terms = detector(images, sizes, wanted)
        assert tuple(terms) == detector.terms and all(term.isfinite() for term in terms.values())
        terms["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert terms["box"] == terms["mask"] == 0


# ---------------------------------------------------------------- 3 weights, frozen stages, norms


def test_weights_are_loaded_and_frozen_stages_stay(tmp_path, data):
    torch.manual_seed(5)
    network = models.build("resnet18", classes=10, size=64, model_args=TINY)
    for module in network.modules():  # statistics that an untrained network does not have
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    folder = tmp_path / "backbone"
    models.export(network, folder, model_args=TINY, size=64, crop_pct=1.0, interpolation="bilinear")
    student = dict(name="kd", weights=str(folder), frozen_stages=1, norm="batch")
    path = small(tmp_path, students=[student])
    settings = recipe.load(path, (), detect.Recipe)
    detector, backbone = detectors.build(settings.detector, settings.students[0], classes=2)
    exported = safetensors.torch.load_file(folder / "model.safetensors")
    loaded = detector.net.model.state_dict()
    assert loaded.keys() == {key for key in exported if not key.startswith("fc.")}
    assert all(torch.equal(loaded[key], exported[key]) for key in loaded)
    digest = rundir.sha256(folder / "model.safetensors")
    assert backbone == {"weights": str(folder), "sha256": digest}

    result = run(path, tmp_path / "out", "--data", data, "--limit", 5, "--set", "epochs=6", "batch_size=8")
    assert result["steps"] == 5 and result["students"][0]["backbone"] == backbone
    assert [row["step"] for row in rows(tmp_path / "out") if "ap_box/kd" in row] == [5]  # the last step alone
    trained, config = detectors.load_exported(tmp_path / "out" / "students" / "kd")
    state = trained.net.model.state_dict()
    frozen = {key for key in state if key.startswith(("conv1", "bn1", "layer1"))}
    assert all(torch.equal(state[key], exported[key]) for key in frozen)
    assert all(not torch.equal(state[key], exported[key]) for key in state if key.startswith("layer2"))
    assert config.classes == ("blue", "red") and config.category_ids == (3, 7)


def test_frozen_norms_keep_their_statistics_and_learn_their_weights(inputs):
    _, _, sizes, targets = inputs
    net = models.build("resnet18", classes=10, size=64, model_args=TINY)
    detector = detectors.Detector(net, small_settings(), classes=2, norm="frozen", frozen=2).eval().train()
    before = copy.deepcopy(net.model.state_dict())
    detector(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8), sizes, targets)["loss"].backward()
    assert all(torch.equal(value, before[key]) for key, value in net.model.state_dict().items())
    with_gradient = {name.split(".")[0] for name, p in net.model.named_parameters() if p.grad is not None}
    assert with_gradient == {"layer3", "layer4"} and net.model.layer3[0].bn1.weight.grad is not None


# ---------------------------------------------------------------- 4 overfit


@pytest.mark.slow
@needs_coco
@pytest.mark.parametrize("stem", ["coco_maskrcnn_res50_1x", "coco_cascade_cnv2t_1x"])
def test_four_images_are_learned(stem, tmp_path):
    """As training and as test images: box AP50 >= 90 %, box and mask AP >= 50 %."""
    folder = subset(tmp_path / "four", 4)
    student = dict(name="random", model_args={}, norm="frozen", optimizer="adamw", optimizer_args={}, lr=5e-4)
    sizes = {"data.short_sides": [128], "data.long_side": 192, "data.test_short_side": 128, "data.hflip": 0.0}
    sizes |= {"detector.width": 64, "detector.rois": 32, "detector.mask_convs": [64, 64], "data.crop": None}
    sizes |= {"detector.proposals_of_level": [200, 200], "detector.proposals": [100, 100]}
    sizes |= {"detector.anchors": 128, "detector.box_layers": [256], "epochs": 120, "save_every": 120}
    sizes["schedule.milestones"] = [100]
    path = small(tmp_path, stem, [student], **sizes)
    last = run(path, tmp_path / "out", "--data", folder, "--set", "log_every=40")["students"][0]["last"]
    assert last["ap50_box"] >= 90 and last["ap_box"] >= 50 and last["ap_mask"] >= 50, last


def subset(folder, n):
    """The n training images of the sample with the fewest objects, as training and as test images."""
    tree = json.loads((SAMPLE / "annotations" / "instances_train2017.json").read_text())
    objects = [a for a in tree["annotations"] if not a["iscrowd"]]
    count = {image["id"]: sum(a["image_id"] == image["id"] for a in objects) for image in tree["images"]}
    tree["images"] = sorted((i for i in tree["images"] if count[i["id"]]), key=lambda i: count[i["id"]])[:n]
    ids = {image["id"] for image in tree["images"]}
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] in ids]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
        for image in tree["images"]:
            shutil.copy(SAMPLE / "train2017" / image["file_name"], folder / split)
    return folder


# ---------------------------------------------------------------- 5, 6 resume, company, processes


@pytest.fixture(scope="session")
def whole(tmp_path_factory, data):
    """(recipe, folder of a whole run of two students)."""
    folder = tmp_path_factory.mktemp("whole")
    students = ["random", dict(name="other", lr=0.02, norm="batch")]
    changes = {"save_every": 3, "evaluate_every": 1, "data.source": str(data)}
    path = small(folder, students=students, **changes)
    with mock.patch.object(train, "main", detect.main):
        run(path, folder / "whole")
    return path, folder / "whole"


def killed(path, out):
    """A run that gets SIGKILL in its fourth step, after the checkpoint of step 3."""

    def lr_at(step, *rest, original=optim.lr_at):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(step, *rest)

    with mock.patch.object(optim, "lr_at", lr_at):
        assert exit_code(forked(lambda: run(path, out))) == -signal.SIGKILL
    assert newest(out) == 3


def stopped_by_a_signal(path, out):
    run_until(3, path, out, workers=1)


@pytest.mark.parametrize("stop", [stopped_by_a_signal, pytest.param(killed, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_uninterrupted_one(stop, whole, tmp_path):
    """Two students, stopped inside an epoch and a log interval, with random flips."""
    path, out = whole
    stop(path, tmp_path / "parts")
    run(path, tmp_path / "parts", "--resume", workers=1)
    assert_same_run(out, tmp_path / "parts")
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "parts"))
    assert first["students"] == second["students"]
    found = "students/other/predictions.json"
    assert (out / found).read_text() == (tmp_path / "parts" / found).read_text()


def test_a_student_learns_the_same_alone(whole, tmp_path):
    path, out = whole
    run(path, tmp_path / "alone", "--students", "other")
    assert_same_run(out, tmp_path / "alone", students=["other"])


def test_what_a_run_leaves_behind(whole, data):
    _, out = whole
    result = json.loads((out / "result.json").read_text())
    last = result["students"][0]["last"]
    assert list(last) == [*coco.METRICS, "n", "step", "epoch"] and (last["n"], last["step"]) == (9, 4)
    assert result["command"].startswith("detect.py") and result["steps"] == 4 and result["teacher"] is None
    terms = {key.split("/")[0] for key in rows(out)[0]}
    assert {*detectors.Detector.terms, "lr"} <= terms
    evaluated = [row["step"] for row in rows(out) if "ap_box/random" in row]
    assert evaluated == [2, 4]
    assert recipe.load(out / "recipe.json", (), detect.Recipe).seed == 0
    board = EventAccumulator(str(out / "random")).Reload().Tags()
    assert {"train/loss", "train/mask", "test/ap_box", "test/aps_mask"} <= {*board["scalars"]}
    assert board["images"] == [f"test/{i}.png" for i in range(1, 5)]


def test_detections_are_drawn_where_they_are():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[:, 20:30, 30:40] = True  # two that overlap
    boxes = torch.tensor([[10.0, 5, 50, 35]] * 2)
    found = dict(boxes=boxes, masks=masks, labels=torch.tensor([2, 1]), scores=torch.tensor([0.9, 0.8]))
    drawn = detect.with_detections(image, found, ["cat", "dog"]).sum(0) > 0
    assert drawn[20:30, 30:40].all() and not drawn[22:28, 42:48].any()  # the masks, and no more than them
    assert drawn[35, 10:50].all() and not drawn[38:].any()  # the lower edge of the boxes


def by_the_launcher(path, out):
    return launched(path, out, **on_cpu(2))


@pytest.mark.slow
@pytest.mark.parametrize("two", [in_two_forks, by_the_launcher])
def test_two_processes_train_equal_weights_and_score_as_one(two, tmp_path, data, monkeypatch):
    monkeypatch.setenv("SCRIPT", "detect")
    path = small(tmp_path, students=[dict(name="random", norm="frozen")], **{"data.source": str(data)})
    first, second = two(path, tmp_path / "out")
    assert (first["world"], second["rank"]) == (2, 1) and first["digests"] == second["digests"]
    assert second["written"] == []
    (two,) = json.loads((tmp_path / "out" / "result.json").read_text())["students"]
    found = json.loads((tmp_path / "out" / "students" / "random" / "predictions.json").read_text())
    (tmp_path / "out" / "result.json").unlink()
    (one,) = run(path, tmp_path / "out", "--resume")["students"]  # evaluates the last checkpoint
    assert one["last"] == two["last"] and one["last"]["n"] == 9
    again = json.loads((tmp_path / "out" / "students" / "random" / "predictions.json").read_text())
    assert sorted(map(str, found)) == sorted(map(str, again)) and found


def test_the_order_is_that_of_one_process_and_each_image_comes_once(data):
    split = coco.Split(data, "train2017", training=True)
    settings = SimpleNamespace(batch_size=4, batch_size_per_process=1)
    loaders = [
        coco.TrainLoader(split, settings, rank=rank, world=world, workers=0)
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    alone, first, second = ([sorted(keys) for keys in loader.order(3, 2, 6)] for loader in loaders)
    assert sorted(alone) == sorted(first + second) and alone[0::2] == first and alone[1::2] == second
    assert sorted(i for (key,) in alone[:8] for i in key[1:]) == list(range(8))  # epoch 1
    assert alone[:8] != alone[8:]


def test_batches_are_of_one_shape_of_images():
    is_wide = np.array([True] * 13 + [False] * 9)
    batches = coco.batches_of_epoch(is_wide, 4, seed=0, epoch=0)
    used = [i for batch in batches for i in batch]
    assert len(batches) == 5 and len(set(used)) == 20
    assert all(len({bool(is_wide[i]) for i in batch}) == 1 for batch in batches)
    assert batches != coco.batches_of_epoch(is_wide, 4, seed=0, epoch=1)


# ---------------------------------------------------------------- 7 average precision


def truth_as_predictions(split, noise=None):
    """Its objects as a detector would give them; with noise moved, with other scores, some missing."""
    chance, found = random.Random(noise), []
    for annotation in split.truth.dataset["annotations"]:
        if annotation["iscrowd"] or (noise is not None and chance.random() < 0.2):
            continue
        image = split.truth.imgs[annotation["image_id"]]
        mask = coco.rasterized(annotation["segmentation"], image["height"], image["width"])
        bbox, score = list(annotation["bbox"]), 1.0
        if noise is not None:
            mask = np.roll(mask, chance.randint(-3, 3), 1)
            bbox = [bbox[0] + chance.uniform(-4, 4), bbox[1], bbox[2] * chance.uniform(0.8, 1.2), bbox[3]]
            score = chance.random()
        runs = pycocotools.mask.encode(np.asfortranarray(mask))
        runs["counts"] = runs["counts"].decode()
        ids = {key: annotation[key] for key in ("image_id", "category_id")}
        found.append(ids | dict(bbox=bbox, score=score, segmentation=runs))
    return found


@pytest.fixture(scope="session")
def sample():
    return coco.Split(SAMPLE, "val2017", training=False)


@needs_coco
def test_the_truth_has_an_average_precision_of_100(sample):
    scores = coco.average_precision(sample.truth, truth_as_predictions(sample), sample.truth.imgs)
    assert scores == pytest.approx(dict.fromkeys(coco.METRICS, 100.0))


@needs_coco
def test_noisy_predictions_score_as_pycocotools_says(sample, tmp_path):
    found = truth_as_predictions(sample, noise=1)
    scores = coco.average_precision(sample.truth, found, sample.truth.imgs)
    assert 20 < scores["ap_box"] < 90 and 20 < scores["ap_mask"] < 90
    truth, expected = COCO(SAMPLE / "annotations" / "instances_val2017.json"), []
    for kind in ("bbox", "segm"):  # as its own example: from files, masks without boxes
        written = [{k: v for k, v in one.items() if kind == "bbox" or k != "bbox"} for one in found]
        (tmp_path / "found.json").write_text(json.dumps(written))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected += (100 * evaluation.stats[:6]).tolist()
    assert list(scores.values()) == expected


def test_crowds_are_ignored_and_missing_sizes_are_null(data):
    split = coco.Split(data, "val2017", training=False)
    found = truth_as_predictions(split)
    crowd = {"size": [48, 64], "counts": [0, 48 * 20, 48 * 44]}
    runs = pycocotools.mask.frPyObjects(crowd, 48, 64)
    inside = dict(image_id=1, category_id=3, bbox=[0, 0, 20, 48], score=1.0, segmentation=runs)
    scores = coco.average_precision(split.truth, [*found, inside], split.truth.imgs)
    assert scores["ap_box"] == scores["ap_mask"] == pytest.approx(100) and scores["apl_box"] is None
    inside = inside | {"image_id": 3}  # there it is a false detection of the highest score
    assert coco.average_precision(split.truth, [*found, inside], split.truth.imgs)["ap_box"] < 99
    assert coco.average_precision(split.truth, [], [1, 2])["ap_mask"] == 0


# ---------------------------------------------------------------- 8 augmentation, schedule, layers


def test_flips_and_crops_move_boxes_and_masks_alike(data):
    """Every box holds its colour in the image, and its mask, cut as the loss cuts it, is full."""
    split = coco.Split(data, "train2017", training=True)
    section = settings_of("coco_maskrcnn_cnv2t_1x").data
    crop = coco.Crop(share=0.5, short_sides=(40, 56), window=(24, 40))
    section = detect.dataclasses.replace(section, short_sides=(48, 96), long_side=160, crop=crop)
    seen, cropped = set(), 0
    for seed in range(40):
        i = seed % len(split)
        image, target = coco.training_sample(split, i, section, seed)
        again, _ = coco.training_sample(split, i, section, seed)
        assert torch.equal(image, again)
        height, width = image.shape[1:]
        cropped += len(target["boxes"]) < 2 or not torch.equal(target["to_mask"][2:], torch.zeros(2))
        cut = detectors.mask_targets(target, target["boxes"], torch.arange(len(target["boxes"])), 28)
        boxes, labels = target["boxes"], target["labels"].tolist()
        assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert cut.mean((1, 2)).gt(0.8).all()
        for (x, y, right, bottom), label in zip(boxes.tolist(), labels, strict=True):
            seen.add(label)
            if label == 2 and min(right - x, bottom - y) > 8:  # red lies above blue
                middle = image[:, int((y + bottom) / 2), int((x + right) / 2)]
                assert middle.tolist() == [255, 0, 0]
    assert cropped > 5 and seen == {1, 2}


def test_a_flip_mirrors_boxes_masks_and_pixels(data):
    split = coco.Split(data, "train2017", training=True)
    section = settings_of("coco_maskrcnn_res50_1x", "data.short_sides=[48]", "data.hflip=0").data
    plain, target = coco.training_sample(split, 0, section, 1)
    mirrored, other = coco.training_sample(split, 0, detect.dataclasses.replace(section, hflip=1.0), 1)
    assert torch.equal(plain.flip(2), mirrored) and torch.equal(target["masks"].flip(2), other["masks"])
    x, right = 64 - target["boxes"][:, 2], 64 - target["boxes"][:, 0]
    expected = torch.stack([x, target["boxes"][:, 1], right, target["boxes"][:, 3]], 1)
    torch.testing.assert_close(other["boxes"], expected)


def test_the_sizes_are_mmdetections():
    assert coco.resized(640, 480, 800, 1333) == (1067, 800)
    assert coco.resized(640, 300, 800, 1333) == (1333, 625)


def test_training_leaves_out_what_cannot_be_learned(data):
    split = coco.Split(data, "train2017", training=True)
    assert len(split) == 8 and sum(len(split.objects(i)) for i in range(8)) == 16  # no crowd, no empty image
    test = coco.Split(data, "val2017", training=False)
    assert len(test) == 9 and len(test.truth.dataset["annotations"]) == 17


def test_the_schedule_is_mmdetections():
    """mmcv's StepLrUpdaterHook with a linear warm-up, here written as there."""
    schedule = settings_of("coco_maskrcnn_res50_1x").schedule
    for step in (0, 1, 250, 499, 500, 3664 * 8 - 1, 3664 * 8, 3664 * 11):
        regular = 0.04 * 0.1 ** sum(step // 3664 >= milestone for milestone in (8, 11))
        k = (1 - step / 500) * (1 - 0.001)
        expected = regular * (1 - k) if step < 500 else regular
        assert optim.lr_at(step, 3664, 12, schedule, 0.04) == pytest.approx(expected, rel=1e-12)


def test_layer_decay_is_mmdetections():
    settings = settings_of("coco_cascade_cnv2t_3x")
    with torch.device("meta"):
        trunk = timm.create_model("convnextv2_tiny")
        network = models.Network(trunk, (0.5,) * 3, (0.5,) * 3)
        detector = detectors.Detector(network, settings.detector, 80)
    layer = detector.group_matcher()
    stages = {"stem.0.weight": 0, "stages.0.blocks.2.norm.bias": 1, "stages.1.downsample.1.weight": 2}
    stages |= {"stages.2.downsample.0.weight": 3, "stages.2.blocks.0.mlp.fc1.weight": 3}
    stages |= {"stages.2.blocks.3.norm.bias": 4, "stages.2.blocks.8.conv_dw.bias": 5}
    stages |= {"stages.3.downsample.0.bias": 6, "stages.3.blocks.1.mlp.grn.weight": 6}
    assert {name: layer(f"net.model.{name}") for name in stages} == stages
    assert {layer(name) for name, _ in detector.named_parameters() if not name.startswith("net.")} == {7}
    optimizer = optim.make_optimizer(detector, settings.students[0])
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0 if group["params"][0].ndim <= 1 else 0.05)
    assert {round(group["lr_scale"], 9) for group in optimizer.param_groups} == {
        round(0.7 ** (7 - i), 9) for i in range(8)
    }


# ---------------------------------------------------------------- 9 bad input


@pytest.fixture(scope="session")
def spoiled(tmp_path_factory):
    return made(tmp_path_factory.mktemp("spoiled") / "data", images=4)


def edit(folder, change):
    file = folder / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def with_image(**change):
    return lambda folder: edit(folder, lambda tree: tree["images"][2].update(change))


def with_object(number=1, **change):
    return lambda folder: edit(folder, lambda tree: tree["annotations"][number].update(change))


def with_crowd(**change):
    return lambda folder: edit(folder, lambda tree: tree["annotations"][-1]["segmentation"].update(change))


JSON_FILE = "annotations/instances_train2017.json"
BAD_DATA = [
    (
        lambda f: shutil.rmtree(f / "val2017"),
        "val2017: not found; expected COCO's layout: train2017/ and val",
    ),
    (lambda f: (f / "annotations/instances_val2017.json").unlink(), "instances_val2017.json: not found;"),
    (lambda f: (f / JSON_FILE).write_text("{"), "expected COCO's instances_*.json"),
    (lambda f: (f / JSON_FILE).write_text("[]"), "expected COCO's instances_*.json"),
    (lambda f: edit(f, lambda t: t.pop("categories")), "categories: Field required: expected COCO's"),
    (lambda f: edit(f, lambda t: t["annotations"][2].pop("bbox")), "annotations.2.bbox: Field required"),
    (lambda f: edit(f, lambda t: t["images"].append(t["images"][0])), "image id 1 stands there twice"),
    (with_image(file_name="../x.png"), "'../x.png' is not the name of a file"),
    (with_object(image_id=99), "annotation 11: image id 99 is not among the images"),
    (with_object(category_id=9), "annotation 11: category id 9 is not among the categories"),
    (lambda f: edit(f, lambda t: t["annotations"][1].pop("segmentation")), "annotation 11: no segmentation"),
    (with_object(segmentation=[[1.0, 2.0]]), "annotation 11: segmentation: expected polygons"),
    (with_object(bbox=[0, 0, 5, float("nan")]), "annotations.1.bbox.3: Input should be a finite number"),
    (with_object(segmentation=[["a"] * 6]), "annotations.1.segmentation."),
    (with_crowd(size=[1, 2]), "annotation 5: segmentation: size is [1, 2]"),
    (with_crowd(counts=[1]), "annotation 5: segmentation: counts are not"),
    (with_crowd(counts=["a"]), "annotations.8.segmentation."),
    (with_crowd(counts="oooooooo1"), "annotation 5: segmentation: counts are not"),
    (with_image(width=65), "3.png: 64x48 pixels, "),
    (lambda f: (f / "train2017" / "2.png").write_bytes(b"no image"), "2.png: cannot be decoded"),
    (lambda f: (f / "train2017" / "2.png").unlink(), "2.png: not found;"),
]


@pytest.mark.parametrize("spoil, message", BAD_DATA, ids=[message for _, message in BAD_DATA])
def test_a_folder_that_is_not_cocos_is_refused(spoil, message, spoiled, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(spoiled, folder)
    spoil(folder)
    with pytest.raises(sources.DataError) as caught:
        for name in ("train2017", "val2017"):
            coco.Split(folder, name, training=name == "train2017")
    assert message in str(caught.value) and str(folder) in str(caught.value)


def test_bad_input_ends_with_exit_code_2_before_the_folder_is_made(data, tmp_path, capsys):
    pickle = tmp_path / "weights.pth"
    torch.save({"layer9.weight": torch.zeros(3)}, pickle)

    def changed(*values):
        return ["--set", *(f"students.random.{value}" for value in values)]

    cases = [
        (["--data", tmp_path / "no"], "train2017: not found; expected COCO's layout"),
        (["--students", "kd"], "no student 'kd' (students: random)"),
        (["--set", "detector.widht=3"], "detector: unknown key 'widht', did you mean 'width'?"),
        (["--set", "schedule.milestones=[2,1]"], "schedule.milestones: expected ascending epochs"),
        (["--set", "batch_size=6", "batch_size_per_process=4"], "batch_size 6 is not a multiple of 1 proc"),
        (["--set", "batch_size=16"], "8 images with objects are less than batch_size, 16"),
        (changed("norm=synk"), "expected 'sync', 'batch' or 'frozen', got 'synk'"),
        (changed("weights=timm", "model=resnet18.a1_in1k", "model_args={}"), "offline, give its weights"),
        (changed("weights=timm"), "random: timm has several weights: give model a tag"),
        (changed("weights=runs/no"), "weights runs/no: not found; train this backbone first"),
        (changed(f"weights={pickle}"), "does not fit ResNet: Missing key"),
        (changed("model=cifar_resnet20", "model_args={}"), "CifarResNet has maps of strides 1, 2, 4,"),
        (changed("model=vit_tiny_patch16_224", "model_args={}"), "has maps of strides 16, 16, 16, 16"),
        (changed('optimizer_args={"layer_decay": 0.9}'), "layer_decay: for ConvNeXt, not for ResNet"),
    ]
    path = small(tmp_path)
    for arguments, message in cases:
        code, printed = stopped(capsys, path, tmp_path / "out", *(["--data", data] + arguments))
        assert code == 2 and message in printed, (arguments, printed)
    assert not (tmp_path / "out").exists()


def test_norm_over_several_cpu_processes_is_refused():
    settings = settings_of("coco_maskrcnn_res50_1x")
    lead = SimpleNamespace(num_processes=2, device=torch.device("cpu"), mixed_precision="no")
    lead.distributed_type = launch.DistributedType.NO
    with mock.patch.dict(os.environ, WORLD_SIZE="2"), pytest.raises(recipe.RecipeError) as caught:
        detect.check_launch(settings, lead)
    assert "norm is 'sync'" in str(caught.value) and "--set students.kd.norm=frozen" in str(caught.value)


def test_an_image_that_breaks_later_names_its_file(spoiled, tmp_path, capsys):
    """A header is checked before the work, the pixels when they are read."""
    folder = tmp_path / "data"
    shutil.copytree(spoiled, folder)
    file = folder / "val2017" / "3.png"
    file.write_bytes(file.read_bytes()[:60])
    code, printed = stopped(capsys, small(tmp_path), tmp_path / "out", "--data", folder, "--set", "epochs=1")
    assert code == 2 and f"error: {file}: cannot be decoded" in printed
