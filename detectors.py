"""Mask R-CNN and Cascade Mask R-CNN on a trunk of models.py: torchvision's parts, mmdetection 2's settings.

    detector = build(settings.detector, student, classes=80)
    losses = detector(images, sizes, targets)  # in training: {"loss", "objectness", "rpn_box", ...}
    detections = detector.eval()(images, sizes)  # [{"boxes", "scores", "labels", "masks"}] of each image

Images, sizes and targets are those of coco.py. Both detectors are the same classes with one or three stages
of heads (He et al., "Mask R-CNN", 2017; Cai and Vasconcelos, "Cascade R-CNN", 2018).
"""

import collections
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Annotated

import huggingface_hub
import safetensors.torch
import timm.layers
import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter
from torch import nn
from torchvision.models.detection import roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image, generalized_box_iou_loss, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

import models
import recipe
import rundir

STRIDES = (4, 8, 16, 32)  # of the trunk's four maps
TRUNK_PIXELS = 224  # of the image that tries a trunk
Widths = tuple[recipe.Count, ...]


@recipe.section
class Stage:
    iou: recipe.Share  # of a proposal with an object, from which on it counts as that object
    stds: Annotated[tuple[recipe.Number, ...], Field(min_length=4, max_length=4)]  # x, y, width, height
    weight: recipe.Number  # of the stage's losses


@recipe.section
class Settings:
    width: recipe.Count  # channels of the feature pyramid and of the proposal network
    norm_maps: bool  # a new LayerNorm on each of the trunk's four maps
    anchor_scale: recipe.Number  # side of an anchor in strides of its level
    anchors: recipe.Count  # that the loss of the proposal network samples in an image
    rpn_beta: recipe.Number  # of its smooth L1 loss of boxes; 0: L1
    proposals_of_level: recipe.Pair[recipe.Count]  # before non-maximum suppression: training, test
    proposals: recipe.Pair[recipe.Count]  # after it: training, test
    rois: recipe.Count  # proposals that the losses of the heads sample in an image
    stages: recipe.NonEmpty[Stage]
    box_convs: Widths  # 3x3 convolutions with BatchNorm of a box head
    box_layers: recipe.NonEmpty[recipe.Count]  # its fully connected layers
    box_beta: recipe.Number | None  # of the smooth L1 loss of boxes; 0: L1; null: GIoU of decoded boxes
    box_weight: recipe.Number
    mask_convs: recipe.NonEmpty[recipe.Count]
    min_score: recipe.Share  # of a detection
    nms_iou: recipe.Share
    detections: recipe.Count  # of an image, at most


# ---------------------------------------------------------------- the detector


class Detector(nn.Module):
    """A trunk (models.Network), a feature pyramid, a proposal network and heads.

    frozen: the trunk's first stages, with the stem, that neither learn nor move their statistics; 0: none.
    norm: "frozen" keeps the statistics of every BatchNorm; its weights learn. Raises ModelError for a trunk
    without maps of the strides 4, 8, 16 and 32.
    """

    terms = ("loss", "objectness", "rpn_box", "class", "box", "mask")  # the sum, and what it sums

    def __init__(self, net, settings, classes, *, norm="batch", frozen=0):
        super().__init__()
        self.net, self.norm = net, norm
        self.taps = pyramid_taps(net)
        levels = [net.model.feature_info[tap] for tap in self.taps]
        channels = [level["num_chs"] for level in levels]
        self.frozen = modules_up_to(net.model, levels[frozen - 1]["module"]) if frozen else []
        for name in self.frozen:
            net.model.get_submodule(name).requires_grad_(False)
        net.model.prune_intermediate_layers(list(self.taps), prune_norm=True, prune_head=True)

        norms = (
            map(timm.layers.LayerNorm2d, channels) if settings.norm_maps else [nn.Identity()] * len(channels)
        )
        self.norms = nn.ModuleList(norms)
        self.fpn = FeaturePyramidNetwork(channels, settings.width, LastLevelMaxPool())
        self.rpn = proposal_network(settings)
        self.heads = Heads(settings, classes)

    def train(self, mode=True):
        super().train(mode)
        for name in self.frozen:
            self.net.model.get_submodule(name).eval()
        if self.norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def features(self, images, sizes):
        """Five maps [B, width, H / stride, W / stride] of strides 4 to 64, by name."""
        images = (images.float() / 255 - self.net.mean) / self.net.std
        for image, (height, width) in zip(images, sizes, strict=True):
            image[:, height:] = 0  # padding is zero after the normalisation, as in mmdetection
            image[:, :, width:] = 0
        images = images.contiguous(memory_format=self.net.memory_format)
        trunk = self.net.model.forward_intermediates
        maps = trunk(images, indices=list(self.taps), intermediates_only=True)
        named = ((str(i), norm(m)) for i, (norm, m) in enumerate(zip(self.norms, maps, strict=True)))
        return self.fpn(collections.OrderedDict(named))

    def forward(self, images, sizes, targets=None):
        """In training scalars by the names of `terms`, else [{"boxes", "scores", "labels", "masks"}].

        Boxes [N, 4] are in pixels of `images`, masks are [N, 1, 28, 28] in [0, 1], to be drawn into the box.
        """
        features = self.features(images, sizes)
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        if not self.training:
            return self.heads.detections(features, proposals, sizes)
        terms = {"objectness": losses["loss_objectness"], "rpn_box": losses["loss_rpn_box_reg"]}
        terms |= self.heads.losses(features, proposals, sizes, targets)
        return {"loss": sum(terms.values())} | terms

    def group_matcher(self, coarse=False):
        """Layer of a parameter by its name, for timm's layer decay: mmdetection's for ConvNeXt.

        0 the stem, 1 and 2 the first stages, from 3 on three blocks of the third stage each, then the fourth
        stage, then all that is not the trunk's. ModelError for other trunks.
        """
        if not isinstance(self.net.model, timm.models.ConvNeXt):
            raise models.ModelError(f"layer_decay: for ConvNeXt, not for {type(self.net.model).__name__}")
        fourth = 3 + -(-len(self.net.model.stages[2].blocks) // 3)

        def layer(name):
            part = re.match(r"net\.model\.(?:stem|stages\.(\d)\.(?:downsample|blocks\.(\d+)))", name)
            if part is None:
                return fourth + 1
            stage, block = part[1], int(part[2] or 0)
            return {None: 0, "0": 1, "1": 2, "2": 3 + block // 3, "3": fourth}[stage]

        return layer


def pyramid_taps(net):
    """Indices of the trunk's maps of strides 4, 8, 16 and 32; ModelError for a trunk without them."""
    taps = net.default_taps()
    strides = tuple(net.model.feature_info[tap]["reduction"] for tap in taps)
    if strides != STRIDES or net._is_isotropic():
        raise models.ModelError(
            f"{type(net.model).__name__} has maps of strides {', '.join(map(str, strides))}, a detector "
            "needs 4, 8, 16 and 32: take a network such as resnet50 or convnextv2_tiny"
        )
    return taps


def modules_up_to(model, last):
    """Names of the modules before the module `last` in the order of definition, and `last`."""
    names = []
    for name, module in model.named_modules():
        if name == last:
            return [*names, last]
        if not any(module.children()):
            names.append(name)
    raise models.ModelError(f"{type(model).__name__} has no module {last}")


# ---------------------------------------------------------------- the proposal network


class _Anchors(AnchorGenerator):
    """torchvision's in float32: in bfloat16 an anchor at 1,000 pixels would be 4 off."""

    def forward(self, images, maps):
        return super().forward(images, [m.new_empty(m.shape[-2:], dtype=torch.float32) for m in maps])


class _ProposalHead(rpn.RPNHead):
    """torchvision's with float32 out."""

    def forward(self, maps):
        return tuple([value.float() for value in values] for values in super().forward(maps))


class _ProposalNetwork(rpn.RegionProposalNetwork):
    """torchvision's with `beta` of the smooth L1 loss; 0 is L1."""

    beta = 1 / 9

    def compute_loss(self, objectness, deltas, labels, targets):
        positive, negative = (torch.where(torch.cat(picked))[0] for picked in self.fg_bg_sampler(labels))
        sampled, labels, targets = torch.cat([positive, negative]), torch.cat(labels), torch.cat(targets)
        box = F.smooth_l1_loss(deltas[positive], targets[positive], beta=self.beta, reduction="sum")
        objectness = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], labels[sampled])
        return objectness, box / sampled.numel()


def proposal_network(settings):
    sizes = tuple((settings.anchor_scale * stride,) for stride in (*STRIDES, 64))
    anchors = _Anchors(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head = _ProposalHead(settings.width, anchors.num_anchors_per_location()[0])
    before, after = (
        dict(zip(("training", "testing"), pair, strict=True))
        for pair in (settings.proposals_of_level, settings.proposals)
    )
    network = _ProposalNetwork(anchors, head, 0.7, 0.3, settings.anchors, 0.5, before, after, 0.7)
    network.beta = settings.rpn_beta
    return network


# ---------------------------------------------------------------- the heads


class RoIAlign(nn.Module):
    """Maps [N, C, side, side] of boxes, each from one of four levels by its size, with aligned pixels.

    torchvision's MultiScaleRoIAlign has neither the half-pixel shift nor mmdetection's number of samples,
    which grows with the box.
    """

    def __init__(self, side):
        super().__init__()
        self.side, self.level = side, LevelMapper(2, 5)

    def forward(self, features, boxes, sizes):
        maps = list(features.values())[: len(STRIDES)]
        numbers = torch.cat([torch.full_like(one[:, :1], i) for i, one in enumerate(boxes)])
        rois, levels = torch.cat([numbers, torch.cat(boxes)], 1), self.level(boxes)
        result = maps[0].new_zeros(len(rois), maps[0].shape[1], self.side, self.side)
        for level, (stride, m) in enumerate(zip(STRIDES, maps, strict=True)):
            here = torch.where(levels == level)[0]
            result[here] = roi_align(m, rois[here], self.side, 1 / stride, aligned=True).to(result.dtype)
        return result


class Heads(nn.Module):
    """Box and mask heads of one stage (Mask R-CNN) or several (Cascade), each torchvision's RoIHeads.

    A stage gets the boxes of the stage before. Detections have the mean scores and masks of all stages and
    the boxes of the last one.
    """

    def __init__(self, settings, classes):
        super().__init__()
        self.settings = settings
        self.stages = nn.ModuleList(_stage(settings, stage, classes + 1) for stage in settings.stages)

    def losses(self, features, proposals, sizes, targets):
        """{"class", "box", "mask"}: scalars, summed over the stages."""
        sums = dict.fromkeys(("class", "box", "mask"), 0.0)
        for stage, settings in zip(self.stages, self.settings.stages, strict=True):
            # with the true boxes among the proposals, so that none is without an object
            proposals, matched, labels, wanted = stage.select_training_samples(proposals, targets)
            logits, deltas = _predicted(stage, features, proposals, sizes)
            sums["class"] += settings.weight * F.cross_entropy(logits, torch.cat(labels))
            sums["box"] += settings.weight * self.box_loss(stage, deltas, proposals, labels, wanted)
            mask = mask_loss(stage, features, proposals, sizes, labels, matched, targets)
            sums["mask"] += settings.weight * mask
            if stage is not self.stages[-1]:
                proposals = refined(stage, logits, deltas, proposals, sizes, torch.cat(labels))
                # without the true boxes, which the next stage adds again
                proposals = [p[w.ne(0).any(1)] for p, w in zip(proposals, wanted, strict=True)]
        return sums

    def box_loss(self, stage, deltas, proposals, labels, wanted):
        labels, wanted = torch.cat(labels), torch.cat(wanted)
        positive = torch.where(labels > 0)[0]
        deltas = deltas.view(len(deltas), -1, 4)[positive, labels[positive]]
        if self.settings.box_beta is None:
            rois, decode = torch.cat(proposals)[positive], stage.box_coder.decode_single
            loss = generalized_box_iou_loss(decode(deltas, rois), decode(wanted[positive], rois), "sum")
        else:
            beta = self.settings.box_beta
            loss = F.smooth_l1_loss(deltas, wanted[positive], beta=beta, reduction="sum")
        return self.settings.box_weight * loss / len(labels)

    def detections(self, features, proposals, sizes):
        scores = []
        for stage in self.stages:
            logits, deltas = _predicted(stage, features, proposals, sizes)
            scores.append(logits.softmax(1))
            if stage is not self.stages[-1]:
                proposals = refined(stage, logits, deltas, proposals, sizes)
        if len(scores) > 1:
            logits = torch.stack(scores).mean(0).log()
        found = stage.postprocess_detections(logits, deltas, proposals, sizes)
        boxes, _, labels = found
        masks = [
            roi_heads.maskrcnn_inference(_mask_logits(stage, features, boxes, sizes), labels)
            for stage in self.stages
        ]
        means = [torch.stack(of_image).mean(0) for of_image in zip(*masks, strict=True)]
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, image, strict=True)) for image in zip(*found, means, strict=True)]


def _stage(settings, stage, classes):
    """RoIHeads with its own layers, initialised as mmdetection's."""
    box_head = FastRCNNConvFCHead(
        (settings.width, 7, 7), settings.box_convs, settings.box_layers, norm_layer=nn.BatchNorm2d
    )
    predictor = FastRCNNPredictor(settings.box_layers[-1], classes)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    for layer in box_head:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    width = settings.mask_convs[-1]
    return roi_heads.RoIHeads(
        RoIAlign(7),
        box_head,
        predictor,
        fg_iou_thresh=stage.iou,
        bg_iou_thresh=stage.iou,
        batch_size_per_image=settings.rois,
        positive_fraction=0.25,
        bbox_reg_weights=tuple(1 / std for std in stage.stds),
        score_thresh=settings.min_score,
        nms_thresh=settings.nms_iou,
        detections_per_img=settings.detections,
        mask_roi_pool=RoIAlign(14),
        mask_head=MaskRCNNHeads(settings.width, settings.mask_convs, 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
    )


def _predicted(stage, features, proposals, sizes):
    """float32 logits [N, classes], 0 the background, and box deltas [N, 4 * classes]."""
    pooled = stage.box_roi_pool(features, proposals, sizes)
    return tuple(value.float() for value in stage.box_predictor(stage.box_head(pooled)))


def _mask_logits(stage, features, boxes, sizes):
    """float32 [N, classes, 28, 28]."""
    pooled = stage.mask_roi_pool(features, boxes, sizes)
    return stage.mask_predictor(stage.mask_head(pooled)).float()


def refined(stage, logits, deltas, proposals, sizes, labels=None):
    """The boxes that a stage makes of its proposals, for the class of their object, else the likeliest."""
    classes = logits[:, 1:].argmax(1) + 1
    if labels is not None:
        classes = torch.where(labels > 0, labels, classes)
    boxes = stage.box_coder.decode(deltas.detach(), proposals)
    boxes = boxes[torch.arange(len(classes), device=classes.device), classes]
    boxes = boxes.split([len(one) for one in proposals])
    return [clip_boxes_to_image(one, size) for one, size in zip(boxes, sizes, strict=True)]


def mask_loss(stage, features, proposals, sizes, labels, matched, targets):
    """Binary cross-entropy of the masks of the proposals with an object; 0 where there is none."""
    positive = [torch.where(of_image > 0)[0] for of_image in labels]
    boxes, matched, classes = (
        [value[chosen] for value, chosen in zip(values, positive, strict=True)]
        for values in (proposals, matched, labels)
    )
    logits, classes = _mask_logits(stage, features, boxes, sizes), torch.cat(classes)
    if not len(classes):
        return logits.sum() * 0
    side = logits.shape[-1]
    wanted = [mask_targets(*one, side) for one in zip(targets, boxes, matched, strict=True)]
    logits = logits[torch.arange(len(classes), device=classes.device), classes]
    return F.binary_cross_entropy_with_logits(logits, torch.cat(wanted))


def mask_targets(target, boxes, matched, side):
    """0 or 1, float32 [N, side, side]: what boxes cut from the masks of their objects."""
    boxes = boxes * target["to_mask"][:2].repeat(2) + target["to_mask"][2:].repeat(2)
    rois = torch.cat([matched[:, None].to(boxes), boxes], 1)
    masks = target["masks"][:, None].to(boxes)
    return (roi_align(masks, rois, side, aligned=True)[:, 0] >= 0.5).to(boxes)


# ---------------------------------------------------------------- weights in, detector out


def build(settings, student, classes):
    """(Detector, {"weights", "sha256"} of its trunk) of a recipe's student, for `classes` kinds of objects.

    `student.weights`: an exported folder, a file, "timm" (then `model` is a name with a tag) or None: random.
    The sha256 is that of the file. Raises ModelError: weights that are missing or do not fit, another trunk.
    """
    arguments = dict(classes=1000, size=TRUNK_PIXELS, model_args=student.model_args)
    weights, file = student.weights, None
    if weights == "timm":
        config = models.pretrained_config(student.model)
        arguments |= dict(classes=config["num_classes"], pretrained=True)
    elif weights is not None:
        arguments["checkpoint"], file = weights, Path(weights)
        if not os.path.exists(file):
            raise models.ModelError(
                f"weights {weights}: not found; train this backbone first, or name another folder or file "
                f"with --set students.{student.name}.weights=PATH"
            )
        if os.path.isdir(file):
            exported, config = models.load_exported(file)
            arguments |= dict(classes=config["num_classes"], **exported.statistics)
            file = file / "model.safetensors"
    net = models.build(student.model, **arguments)
    if weights == "timm" and (name := net.model.pretrained_cfg.get("hf_hub_id")):
        cached = huggingface_hub.try_to_load_from_cache(name, "model.safetensors")
        file = Path(cached) if isinstance(cached, str) else None
    detector = Detector(net, settings, classes, norm=student.norm, frozen=student.frozen_stages)
    return detector, {"weights": weights, "sha256": rundir.sha256(file) if file else None}


@recipe.section
class Exported:
    """What config.json of an exported detector holds, beside model.safetensors."""

    model: recipe.Text
    model_args: dict
    mean: recipe.NonEmpty[float]
    std: recipe.NonEmpty[float]
    detector: Settings
    classes: recipe.NonEmpty[recipe.Text]  # names of the labels 1, 2, ...
    category_ids: recipe.NonEmpty[recipe.Whole]  # their ids in COCO
    short_side: recipe.Pixels  # of an image, at which it was evaluated
    long_side: recipe.Pixels


def export(detector, folder, exported):
    """Write model.safetensors and config.json; `load_exported` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"
    tensors = {key: value.cpu().contiguous() for key, value in detector.state_dict().items()}
    safetensors.torch.save_file(tensors, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / "model.safetensors")
    rundir.write_atomic(folder / "config.json", json.dumps(dataclasses.asdict(exported), indent=2) + "\n")


def load_exported(folder):
    """(Detector in eval mode, Exported) of a folder that `export` wrote; else ModelError or RecipeError."""
    tree = recipe.read_json(Path(folder) / "config.json", rundir.MAX_STATE_BYTES)
    try:
        exported = TypeAdapter(Exported).validate_json(json.dumps(tree))
        net = models.build(
            exported.model,
            classes=1000,
            size=TRUNK_PIXELS,
            model_args=exported.model_args,
            mean=exported.mean,
            std=exported.std,
        )
        detector = Detector(net, exported.detector, len(exported.classes))
        detector.load_state_dict(safetensors.torch.load_file(Path(folder) / "model.safetensors"))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise models.ModelError(f"{folder}: not an exported detector: {error}") from error
    return detector.eval(), exported
