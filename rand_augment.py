"""RandAugment on arrays: timm's code draws the operations, OpenCV and PyTorch compute them.

    steps, policy = with_recorded_operations(timm_transform)
    Painter(size)(image, policy([]))    # image: uint8 [size, size, 3], changed in place

It takes about half of the time of timm's operations on PIL images.
"""

import functools
import math
import random

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, RandAugment

# ---------------------------------------------------------------- what is drawn

# Beginnings of timm's names of operations
WARPS = ("Rotate", "Shear", "Translate")  # that move pixels
TABLES = ("Invert", "Posterize", "Solarize", "Brightness")  # that change each value by itself
COLOURS = ("Color", "Desaturate")  # that blend with the image in grey


def with_recorded_operations(transform):
    """(the other steps, timm's RandAugment or None) of a transform.

    timm's code then draws as ever, but its operations are applied to a list: each appends (name, value,
    whether bicubic) and leaves the work to `Painter`.
    """
    steps = [step for step in transform.transforms if not isinstance(step, RandAugment)]
    policy = next((step for step in transform.transforms if isinstance(step, RandAugment)), None)
    for operation in policy.ops if policy else []:
        operation.aug_fn = functools.partial(_record, operation.name)
    return steps, policy


def _record(name, operations, value=0.0, *, resample, fillcolor):
    cubic = name.startswith(WARPS) and drawn_kernel(resample) == "bicubic"  # timm draws only when it warps
    return [*operations, (name, value, cubic)]


def drawn_kernel(kernel):
    """ "bilinear" or "bicubic", of one or several members of PIL's or torchvision's enumeration."""
    kernel = random.choice(kernel) if isinstance(kernel, (tuple, list)) else kernel
    return getattr(kernel, "name", str(kernel)).lower()


# ---------------------------------------------------------------- its arithmetic

FILL = (124, 116, 104)  # ImageNet's mean colour, as in timm's create_transform
GREY = np.array([[19595, 38470, 7471]], np.float32) / 65536  # of red, green, blue in PIL's conversion to grey
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # all values

# Added before OpenCV rounds, because PIL truncates. Above -0.5: exact integers may come out slightly low.
TRUNCATE = -0.5 + 1 / 4096


class Painter:
    """timm's RandAugment on uint8 arrays [size, size, 3], in place.

    Equal to timm's operations on PIL images, or within 1 level for colour, sharpness, shears, translations
    and bilinear rotation. What gains less is left to PIL. Buffers are kept: memory fresh from the kernel
    costs more than the arithmetic.
    """

    def __init__(self, size):
        self.size = size
        shape = (size, size, 3)
        self.grey = np.empty((size, size), np.uint8)
        self.other = np.empty(shape, np.uint8)  # a second image, to blend with or to warp into
        self.fill = np.full(shape, FILL, np.uint8)
        self.floats, self.turned = np.empty(shape, np.float32), np.empty(shape, np.float32)

        # the image between copies of its edges: windows[y, x] is row y from pixel x on, size + 3 pixels long
        self.wide = np.zeros((size, 3 * size, 3), np.uint8)
        length = (size + 3) * 3
        strides = (self.wide.strides[0], 3, 1)
        self.windows = np.lib.stride_tricks.as_strided(self.wide, (size, 2 * size - 2, length), strides)
        self.strip = np.empty((size, size + 3, 3), np.uint8)
        self.taps, self.sums = torch.empty(size, length), torch.empty(size, size * 3)

    def __call__(self, image, operations):
        for name, value, cubic in operations:
            if name.startswith(TABLES):
                cv2.LUT(image, np.asarray(_timm_operation(name, RAMP, value))[0], dst=image)
            elif name.startswith(COLOURS):
                cv2.cvtColor(cv2.transform(image, GREY, dst=self.grey), cv2.COLOR_GRAY2RGB, dst=self.other)
                self._blend(image, min(max(1 - value, 0.0), 1.0) if name == "Desaturate" else value)
            elif name.startswith("Sharpness"):
                cv2.filter2D(image, -1, SMOOTH, dst=self.other)
                for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
                    self.other[edge] = image[edge]
                self._blend(image, value)
            elif name == "Rotate" and not cubic:
                self._rotate(image, value)
            elif name.startswith(("Shear", "Translate")):
                self._slide(image, name, value, cubic)
            else:
                options = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}
                np.copyto(image, _timm_operation(name, Image.fromarray(image), value, **options))

    def _blend(self, image, factor):
        """image * factor + other * (1 - factor)."""
        cv2.addWeighted(image, factor, self.other, 1 - factor, TRUNCATE, dst=image)

    def _slide(self, image, name, value, cubic):
        """Each row (of Y: column) resampled `shift` pixels further to the right (of Y: below)."""
        n, vertically, shears = self.size, "Y" in name, "Shear" in name
        distance = value * n if "Rel" in name else value
        shift = value * (np.arange(n) + 0.5) if shears else np.full(n, distance, np.float64)
        source = cv2.transpose(image, dst=self.other) if vertically else image
        self.wide[:, n : 2 * n] = source
        self.wide[:, n - 3 : n], self.wide[:, 2 * n : 2 * n + 3] = source[:, :1], source[:, -1:]

        whole = np.floor(shift)
        first = np.clip(whole.astype(np.int64), 2 - n, n - 4) + n - 1
        weights = np.stack(_weights(shift - whole, cubic)).astype(np.float32)
        result = self.other if vertically else image
        at = np.arange(n)
        if shears:
            self.taps.copy_(torch.from_numpy(self.windows[at, first]))
            self.sums.zero_()
            for i in range(4) if cubic else (1, 2):
                self.sums.addcmul_(self.taps[:, 3 * i : 3 * (i + n)], torch.from_numpy(weights[i])[:, None])
            cv2.add(self.sums.numpy(), TRUNCATE, dst=result.reshape(n, -1), dtype=cv2.CV_8U)
        else:
            rows = self.wide[:, first[0] : first[0] + n + 3]
            cv2.filter2D(rows, -1, weights[:, :1].T, dst=self.strip, anchor=(0, 0), delta=TRUNCATE)
            np.copyto(result, self.strip[:, :n])

        outside = (at < np.ceil(-shift - 0.5)[:, None]) | (at >= np.ceil(n - 0.5 - shift)[:, None])
        cv2.copyTo(self.fill, outside.view(np.uint8), result)
        if vertically:
            cv2.transpose(result, dst=image)

    def _rotate(self, image, degrees):
        """Bilinear, by the map from an output pixel to its source that PIL's Image.rotate computes."""
        n, middle, angle = self.size, self.size / 2, -math.radians(degrees % 360.0)
        cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
        left = cosine * -middle + sine * -middle + middle
        top = -sine * -middle + cosine * -middle + middle
        to_source = [[cosine, sine, (cosine + sine) / 2 + left - 0.5]]
        to_source += [[-sine, cosine, (cosine - sine) / 2 + top - 0.5]]
        options = dict(flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
        np.copyto(self.floats, image)
        cv2.warpAffine(self.floats, np.array(to_source), (n, n), dst=self.turned, **options)
        cv2.add(self.turned.reshape(n, -1), TRUNCATE, dst=image.reshape(n, -1), dtype=cv2.CV_8U)

        at = np.arange(n) + 0.5
        x = cosine * at + (sine * at + left)[:, None]
        y = -sine * at + (cosine * at + top)[:, None]
        outside = (x < 0) | (x >= n) | (y < 0) | (y >= n)
        cv2.copyTo(self.fill, outside.view(np.uint8), image)


def _timm_operation(name, image, value, **options):
    """PIL image, changed by timm."""
    return NAME_TO_OP[name](image, *([] if LEVEL_TO_ARG[name] is None else [value]), **options)


def _weights(d, cubic):
    """PIL's kernel at n + d, 0 <= d < 1: weights of pixels n - 1 .. n + 2; cubic with a = -1, else linear."""
    if cubic:
        return -d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2
    return 0 * d, 1 - d, d, 0 * d
