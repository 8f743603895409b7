"""One image: bytes -> decoded -> crops -> uint8 views. Then a batch: erased, mixed.

    views = train_views(data, per_process=64)
    for view in views(content, seeds=[17, 18]): ...  # uint8 [3, size, size], one for each seed
    mix = mixer(data)                                # None where the recipe mixes nothing

What a view looks like depends on the bytes, the recipe and the seed alone. `data.pipeline` "timm" gives
timm's pixels to the byte; "fast" draws the same random numbers in the same order and computes with other
libraries.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import math
import random

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, RandAugment, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ToNumpy
from torchvision import transforms

from sources import DataError

# Formats that PIL decodes itself. Others start programs (EPS: Ghostscript) or are of no use in training.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 89_478_485  # PIL warns of a decompression bomb above it and refuses twice of it; we refuse both
BUFFER_BYTES = 12_000_000  # kept for a decoded image: memory fresh from the kernel takes a third of decoding


class BrokenImage(DataError):
    """The bytes of one image cannot be decoded. Training goes on without it, see data.TrainLoader."""


# ---------------------------------------------------------------- seeds


def seed_of(*key):
    """One seed, 32 bits, of several integers."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_torch(seed, device=None):
    """Seed torch's generators of the CPU and of `device`; torch.manual_seed looks for others, in 0.6 ms."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def seed_all(seed, device=None):
    """Seed random, numpy and torch: timm draws from all three."""
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed, device)


# ---------------------------------------------------------------- decoding


def decode(content):
    """Bytes of an image file -> RGB image. BrokenImage for other bytes, and for more than MAX_PIXELS.

    Images of folders, parquet and tar files are all decoded here. EXIF orientation is ignored, as in timm
    and torchvision. Transparency is dropped, and the colours under it stay. Of 16 bits of grey the upper 8
    are kept, as PIL does with colours.
    """
    with _broken_if_undecodable(content):
        return _rgb(_opened(content))


@contextlib.contextmanager
def _broken_if_undecodable(content):
    try:
        yield
    except MemoryError as error:
        raise DataError("needs more memory than there is") from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)  # PIL's text has an address in memory, another in each run
        raise BrokenImage(f"cannot be decoded: no image, {len(content)} bytes (known: {known})") from error
    except Exception as error:  # PIL raises anything from SyntaxError to struct.error on a broken file
        raise BrokenImage(f"cannot be decoded: {error!r}") from error


def _opened(content):
    """PIL image of which the header alone was read."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height} pixels"
        raise ValueError(f"{size}, more than augment.MAX_PIXELS, {MAX_PIXELS}")
    return image


def _rgb(image):
    if image.mode == "F":
        raise ValueError("floating-point pixels, expected integers")
    if image.mode.startswith("I"):
        image = _upper_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of the direct conversion
    return image.convert("RGB")


def _upper_bits(image):
    """16-bit grey to 8 bits; PIL's conversion makes 255 of everything above 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values {values.min()}..{values.max()}, expected 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


# ---------------------------------------------------------------- transforms of timm and torchvision


def train_transform(data):
    """PIL image -> uint8 array [3, size, size]; draws from the generators of torch, numpy and random."""
    if data.crop.kind == "resized":
        return create_transform(
            data.size,
            is_training=True,
            scale=data.crop.scale,
            ratio=data.crop.ratio,
            interpolation=data.crop.interpolation,
            hflip=data.hflip,
            color_jitter=None,
            auto_augment=data.rand_augment,
            re_prob=0.0,
            use_prefetcher=True,  # uint8 out
        )
    steps = [
        _ExactSize(data.size),
        transforms.RandomCrop(data.size, padding=data.crop.padding),
        transforms.RandomHorizontalFlip(data.hflip),
    ]
    if data.rand_augment:
        # what timm's create_transform gives to its RandAugment; the shifts scale with the image
        settings = {"translate_const": int(data.size * 0.45), "img_mean": FILL}
        steps.append(rand_augment_transform(data.rand_augment, settings))
    return transforms.Compose([*steps, ToNumpy()])


class _ExactSize:
    """Refuses images of another size, of which RandomCrop would silently take a corner."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        if image.size != (self.size, self.size):
            size = f"{image.width}x{image.height} pixels"
            raise DataError(f"{size}; data.crop 'pad' needs {self.size}x{self.size}, 'resized' any")
        return image


def test_transform(data):
    """PIL image -> uint8 array [3, size, size]: resized to size / crop_pct, centre crop. Nothing random."""
    return create_transform(
        data.size, crop_pct=data.crop_pct, interpolation=data.interpolation, use_prefetcher=True
    )


# ---------------------------------------------------------------- training views


def train_views(data, per_process):
    """A function (content, seeds) -> iterator of views, uint8 [3, size, size], one for each seed.

    It raises BrokenImage before the first view. The fast pipeline uses its memory again: a view is
    overwritten when `per_process` others were made.
    """
    if data.pipeline == "fast":
        return _FastViews(data, per_process)
    return functools.partial(_timm_views, train_transform(data))


def try_views(data):
    """Make one training view of a black image, so that settings that cannot work show before any work.

    Raises DataError.
    """
    content = io.BytesIO()
    try:
        Image.new("RGB", (data.size, data.size)).save(content, "png")
        list(train_views(data, 1)(content.getvalue(), [0]))
    except Exception as error:  # timm's parser raises anything
        settings = f"size {data.size}, rand_augment {data.rand_augment!r}"
        raise DataError(f"data: no training view can be made with {settings}: {error!r}") from error


def _timm_views(transform, content, seeds):
    image = decode(content)
    for seed in seeds:
        seed_all(seed)
        yield torch.from_numpy(np.ascontiguousarray(transform(image)))


class _FastViews:
    """The crops of one image: timm's random numbers in timm's order, other arithmetic.

    A crop is resized by PyTorch, horizontally and then vertically, as PIL did before Pillow 13, and within
    2 levels of that. Pillow 13 resizes some crops vertically first (its issue 9549): they differ from
    Pillow 12's and from ours by at most 13 levels, near black and white, in 200 crops of photographs (65
    dB). RandAugment is `_Painter`'s. Views are channels-last in memory.
    """

    def __init__(self, data, per_process):
        self.size = data.size
        (self.crop, *others), self.policy = _with_recorded_operations(train_transform(data))
        flips = [step.p for step in others if isinstance(step, transforms.RandomHorizontalFlip)]
        self.flip = flips[0] if flips else 0
        self.painter = _Painter(data.size)
        self.decoded, self.cropped = np.empty(BUFFER_BYTES, np.uint8), np.empty(BUFFER_BYTES, np.uint8)
        self.views = itertools.cycle(np.empty((per_process, data.size, data.size, 3), np.uint8))

    def __call__(self, content, seeds):
        pixels = self._pixels(content)
        height, width, _ = pixels.shape
        for seed in seeds:
            (top, left, rows, columns), mode, flipped, operations = self._draw(seed, width, height)
            resized = self._resized(pixels[top : top + rows, left : left + columns], mode)
            view = next(self.views)
            if flipped:
                cv2.flip(resized, 1, dst=view)
            else:
                np.copyto(view, resized)
            self.painter(view, operations)
            yield torch.from_numpy(view).permute(2, 0, 1)

    def _pixels(self, content):
        """uint8 [H, W, 3].

        simplejpeg gives PIL's pixels in less time. Where libjpeg warns it raises ValueError, and PIL decides
        whether that is an image.
        """
        with _broken_if_undecodable(content):
            image = _opened(content)
            if image.format in ("JPEG", "MPO") and image.mode == "RGB":
                buffer = self.decoded if 3 * image.width * image.height <= BUFFER_BYTES else None
                with contextlib.suppress(ValueError):
                    return simplejpeg.decode_jpeg(content, buffer=buffer)
            return np.asarray(_rgb(image))

    def _draw(self, seed, width, height):
        """(crop's top, left, height, width), kernel, whether flipped, RandAugment's operations."""
        seed_all(seed)
        shape = torch.empty((3, height, width), device="meta")
        box = self.crop.get_params(shape, self.crop.scale, self.crop.ratio)
        kernel = self.crop.interpolation
        kernel = random.choice(kernel) if isinstance(kernel, (tuple, list)) else kernel
        flipped = self.flip > 0 and bool(torch.rand(1) < self.flip)
        return box, _kernel_name(kernel), flipped, self.policy([]) if self.policy else []

    def _resized(self, pixels, kernel):
        """uint8 [size, size, 3]."""
        buffer = (
            self.cropped[: pixels.size] if pixels.size <= BUFFER_BYTES else np.empty(pixels.size, np.uint8)
        )
        crop = buffer.reshape(pixels.shape)
        np.copyto(crop, pixels)
        # [None] first: with it last, PyTorch would take the tensor as channels-first, and copy it
        crop = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(crop, (self.size, self.size), mode=kernel, antialias=True)
        return resized[0].permute(1, 2, 0).numpy()


def _kernel_name(kernel):
    """ "bilinear" or "bicubic", of a member of PIL's or torchvision's enumeration."""
    return getattr(kernel, "name", str(kernel)).lower()


# ---------------------------------------------------------------- RandAugment: what is drawn

WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
TABLES = (  # operations on single values
    "Invert",
    "Posterize",
    "PosterizeIncreasing",
    "PosterizeOriginal",
    "Solarize",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "Brightness",
    "BrightnessIncreasing",
)
COLOURS = ("Color", "ColorIncreasing", "Desaturate")


def _with_recorded_operations(transform):
    """(the other steps, timm's RandAugment or None) of a transform.

    timm's code then draws as ever, but its operations are applied to a list: each appends (name, value,
    whether bicubic) and leaves the work to `_Painter`.
    """
    steps = [step for step in transform.transforms if not isinstance(step, RandAugment)]
    policy = next((step for step in transform.transforms if isinstance(step, RandAugment)), None)
    for operation in policy.ops if policy else []:
        operation.aug_fn = functools.partial(_record, operation.name)
    return steps, policy


def _record(name, operations, value=0.0, *, resample, fillcolor):
    cubic = False
    if name in WARPS:  # timm draws a warp's kernel only when it warps
        kernel = random.choice(resample) if isinstance(resample, (tuple, list)) else resample
        cubic = _kernel_name(kernel) == "bicubic"
    return [*operations, (name, value, cubic)]


# ---------------------------------------------------------------- RandAugment: its arithmetic

FILL = (124, 116, 104)  # ImageNet's mean colour, as in timm's create_transform
GREY = np.array([[19595, 38470, 7471]], np.float32) / 65536  # of red, green, blue in PIL's conversion to grey
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # all values

# Added before OpenCV rounds, because PIL truncates. Above -0.5: exact integers may come out slightly low.
TRUNCATE = -0.5 + 1 / 4096


class _Painter:
    """timm's RandAugment on uint8 arrays [size, size, 3], in place.

    Compared with timm's operations on PIL images of the same array: equal where a table of 256 values does
    it (TABLES, contrast, autocontrast, equalize); within 1 level for colour, sharpness, shears,
    translations and bilinear rotation. Bicubic rotation and blurs are left to PIL. Buffers are kept: memory
    fresh from the kernel costs more than the arithmetic.
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
            if name in TABLES:
                cv2.LUT(image, _table(name, value), dst=image)
            elif name.startswith("Contrast"):
                mean = cv2.mean(cv2.transform(image, GREY, dst=self.grey))[0]
                cv2.LUT(image, _contrast_table(mean, value), dst=image)
            elif name == "AutoContrast":
                bounds = [cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]
                self._look_up(image, [_autocontrast_table(*pair) for pair in bounds])
            elif name == "Equalize":
                counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
                self._look_up(image, [_equalize_table(count.astype(np.int64)) for count in counts])
            elif name in COLOURS:
                cv2.cvtColor(cv2.transform(image, GREY, dst=self.grey), cv2.COLOR_GRAY2RGB, dst=self.other)
                self._blend(image, min(max(1 - value, 0.0), 1.0) if name == "Desaturate" else value)
            elif name.startswith("Sharpness"):
                cv2.filter2D(image, -1, SMOOTH, dst=self.other)
                for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
                    self.other[edge] = image[edge]
                self._blend(image, value)
            elif name == "Rotate" and not cubic:
                self._rotate(image, value)
            elif name in WARPS and name != "Rotate":
                shift = _shift(name, value, self.size)
                self._slide(image, shift, cubic, vertically="Y" in name, uniform="Translate" in name)
            else:
                kernel = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
                painted = _timm_operation(
                    name, Image.fromarray(image), value, resample=kernel, fillcolor=FILL
                )
                np.copyto(image, np.asarray(painted))

    def _look_up(self, image, tables):
        """A table for each channel."""
        cv2.LUT(image, np.stack(tables, axis=1)[None], dst=image)

    def _blend(self, image, factor):
        """image * factor + other * (1 - factor)."""
        cv2.addWeighted(image, factor, self.other, 1 - factor, TRUNCATE, dst=image)

    def _slide(self, image, shift, cubic, *, vertically, uniform):
        """Each row (vertically: column) resampled `shift` pixels further on; uniform: all by as many."""
        n = self.size
        source = cv2.transpose(image, dst=self.other) if vertically else image
        self.wide[:, n : 2 * n] = source
        self.wide[:, n - 3 : n], self.wide[:, 2 * n : 2 * n + 3] = source[:, :1], source[:, -1:]

        whole = np.floor(shift)
        first = np.clip(whole.astype(np.int64), 2 - n, n - 4) + n - 1
        weights = np.stack(_weights(shift - whole, cubic)).astype(np.float32)
        result = self.other if vertically else image
        if uniform:
            rows = self.wide[:, first[0] : first[0] + n + 3]
            cv2.filter2D(rows, -1, weights[:, :1].T, dst=self.strip, anchor=(0, 0), delta=TRUNCATE)
            np.copyto(result, self.strip[:, :n])
        else:
            self.taps.copy_(torch.from_numpy(self.windows[np.arange(n), first]))
            self.sums.zero_()
            for i in range(4) if cubic else (1, 2):
                self.sums.addcmul_(self.taps[:, 3 * i : 3 * (i + n)], torch.from_numpy(weights[i])[:, None])
            cv2.add(self.sums.numpy(), TRUNCATE, dst=result.reshape(n, -1), dtype=cv2.CV_8U)

        at = np.arange(n)
        outside = (at < np.ceil(-shift - 0.5)[:, None]) | (at >= np.ceil(n - 0.5 - shift)[:, None])
        cv2.copyTo(self.fill, outside.view(np.uint8), result)
        if vertically:
            cv2.transpose(result, dst=image)

    def _rotate(self, image, degrees):
        """Bilinear."""
        n = self.size
        a, b, c, d, e, f = _rotation(degrees, n)
        to_source = np.array([[a, b, (a + b) / 2 + c - 0.5], [d, e, (d + e) / 2 + f - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        border = cv2.BORDER_REPLICATE
        np.copyto(self.floats, image)
        cv2.warpAffine(self.floats, to_source, (n, n), dst=self.turned, flags=flags, borderMode=border)
        cv2.add(self.turned.reshape(n, -1), TRUNCATE, dst=image.reshape(n, -1), dtype=cv2.CV_8U)

        at = np.arange(n) + 0.5
        x, y = a * at + (b * at + c)[:, None], d * at + (e * at + f)[:, None]
        outside = (x < 0) | (x >= n) | (y < 0) | (y >= n)
        cv2.copyTo(self.fill, outside.view(np.uint8), image)


def _timm_operation(name, image, value, **options):
    """PIL image, changed by timm."""
    return NAME_TO_OP[name](image, *([] if LEVEL_TO_ARG[name] is None else [value]), **options)


def _table(name, value):
    """uint8 [256]: what timm's operation on single values makes of each."""
    return np.asarray(_timm_operation(name, RAMP, value))[0]


def _contrast_table(mean, factor):
    """As PIL's ImageEnhance.Contrast, of an image whose mean grey is `mean`, float in 0..255."""
    return np.asarray(Image.blend(Image.new("L", RAMP.size, int(mean + 0.5)), RAMP, factor))[0]


def _autocontrast_table(low, high):
    """As PIL's ImageOps.autocontrast, of a channel with values low..high."""
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return np.clip(np.trunc(np.arange(256) * scale - low * scale), 0, 255).astype(np.uint8)


def _equalize_table(counts):
    """As PIL's ImageOps.equalize, of a channel with int counts [256]."""
    used = counts[counts > 0]
    step = (used.sum() - used[-1]) // 255
    if len(used) <= 1 or not step:
        return np.arange(256, dtype=np.uint8)
    return np.minimum((step // 2 + np.cumsum(counts) - counts) // step, 255).astype(np.uint8)


def _shift(name, value, size):
    """Pixels by which each row (of X) or column (of Y) reads further to the right (below), float64 [size]."""
    if name.startswith("Shear"):
        return value * (np.arange(size) + 0.5)
    return np.full(size, value * size if name.endswith("Rel") else value, np.float64)


def _weights(d, cubic):
    """PIL's kernel at n + d, 0 <= d < 1: weights of pixels n - 1 .. n + 2; cubic with a = -1, else linear."""
    if cubic:
        return -d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2
    return 0 * d, 1 - d, d, 0 * d


def _rotation(degrees, size):
    """The affine map from an output pixel to its source, six numbers, as PIL's Image.rotate computes them."""
    angle, middle = -math.radians(degrees % 360.0), size / 2
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    c = cosine * -middle + sine * -middle + middle
    f = -sine * -middle + cosine * -middle + middle
    return cosine, sine, c, -sine, cosine, f


# ---------------------------------------------------------------- a batch


def mixer(data):
    """(images [B, 3, H, W] float in [0, 1], labels [B]) -> (images, target): random erasing, mixup, cutmix.

    None where the recipe has none of them. target: [B, K] with rows that sum to 1, or the labels where
    nothing is mixed. timm's RandomErasing and Mixup, drawing from the global generators; Mixup draws once
    for the whole batch, as upstream. No label smoothing here: each student smooths, which gives the same
    loss.
    """
    mix = None
    if data.mixup or data.cutmix:
        settings = dict(mixup_alpha=data.mixup, cutmix_alpha=data.cutmix, label_smoothing=0.0)
        mix = Mixup(**settings, num_classes=data.classes)
    if not data.random_erasing:
        return mix

    def erase_and_mix(images, labels):
        images = _erased(images, data.random_erasing)
        return mix(images, labels) if mix else (images, labels)

    return erase_and_mix


def _erased(images, probability):
    """timm's RandomErasing, on images normalised with ImageNet's values: its noise has unit variance."""
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    erasing = RandomErasing(probability, mode="pixel", device=images.device)
    return erasing((images - mean) / std) * std + mean
