"""The ResNets for CIFAR's 32x32 images, as models of timm; one file, to be copied with a student.

import cifar_resnet, timm
network = timm.create_model("cifar_resnet20", num_classes=100)
student = timm.create_model("local-dir:FOLDER", pretrained=True)    # an exported CIFAR student
"""

import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn

WIDE = (32, 64, 128, 256)
VARIANTS = {
    "cifar_resnet8": dict(depth=8),
    "cifar_resnet20": dict(depth=20),
    "cifar_resnet32": dict(depth=32),
    "cifar_resnet56": dict(depth=56),
    "cifar_resnet110": dict(depth=110),
    "cifar_resnet8x4": dict(depth=8, widths=WIDE),
    "cifar_resnet32x4": dict(depth=32, widths=WIDE),
}
default_cfgs = {  # timm's registry reads a module's configurations from this name
    name: dict(
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        num_classes=100,
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        first_conv="conv1",
        classifier="fc",
    )
    for name in VARIANTS
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, in_chans, chans, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, chans, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chans)
        self.conv2 = nn.Conv2d(chans, chans, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(chans)
        self.downsample = None
        if stride != 1 or in_chans != chans:
            convolution = nn.Conv2d(in_chans, chans, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(chans))
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()  # named as in timm's ResNets, for hooks on them

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2016, section 4.2) with depth = 6 n + 2 layers.

    Layout, initialisation and state_dict keys are those of RepDistiller, mdistiller and DIST, so that their
    published CIFAR-100 teachers load strictly. `widths`: channels of the stem and the three stages.
    forward: [B, C, H, W] -> [B, K].
    """

    def __init__(self, depth=20, widths=(16, 16, 32, 64), num_classes=100, in_chans=3, drop_rate=0.0):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"cifar_resnet: depth must be 6 n + 2 with n >= 1, got {depth}")
        self.num_features, self.drop_rate = widths[3], drop_rate
        modules, reductions = ("bn1", "layer1", "layer2", "layer3"), (1, 1, 2, 4)
        levels = zip(widths, reductions, modules, strict=True)
        self.feature_info = [dict(num_chs=c, reduction=r, module=m) for c, r, m in levels]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage, stride in ((1, 1), (2, 2), (3, 2)):
            blocks = [BasicBlock(widths[stage - 1], widths[stage], stride)]
            blocks += [BasicBlock(widths[stage], widths[stage], 1) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes, global_pool=None):
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        """[B, 3, H, W] -> [B, C, H/4, W/4]"""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_intermediates(self, x, indices):
        """timm's interface to feature maps: (deepest map, [maps after the stem (0) and stages (1, 2, 3)])."""
        maps = [torch.relu(self.bn1(self.conv1(x)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return maps[-1], [maps[i] for i in indices]

    def forward_head(self, x, pre_logits=False):
        x = nn.functional.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def _register(name, defaults):
    def create(pretrained=False, **kwargs):
        return build_model_with_cfg(CifarResNet, name, pretrained, **(defaults | kwargs))

    create.__name__ = name  # timm's registry lists a model under its function's name
    register_model(create)


for _name, _defaults in VARIANTS.items():
    _register(_name, _defaults)
