"""One image: bytes -> decoded -> crops -> uint8 views. Then a batch: erased, mixed.

    views = train_views(data)
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
import random

import cv2
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ToNumpy
from torchvision import transforms

from rand_augment import FILL, Painter, drawn_kernel, with_recorded_operations
from sources import DataError

# Formats that PIL decodes itself. Others start programs (EPS: Ghostscript) or are of no use in training.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 89_478_485  # PIL warns of a decompression bomb above it and refuses twice of it; we refuse both


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

    EXIF orientation is ignored, as in timm and torchvision. Transparency is dropped, and the colours under it
    stay. Of 16 bits of grey the upper 8 are kept, as PIL does with colours.
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
    if image.mode.startswith("I"):  # PIL's conversion makes 255 of everything above 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values {values.min()}..{values.max()}, expected 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of the direct conversion
    return image.convert("RGB")


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
        functools.partial(of_size, data.size),  # RandomCrop would silently take a corner of a larger image
        transforms.RandomCrop(data.size, padding=data.crop.padding),
        transforms.RandomHorizontalFlip(data.hflip),
    ]
    if data.rand_augment:
        # what timm's create_transform gives to its RandAugment; the shifts scale with the image
        settings = {"translate_const": int(data.size * 0.45), "img_mean": FILL}
        steps.append(rand_augment_transform(data.rand_augment, settings))
    return transforms.Compose([*steps, ToNumpy()])


def of_size(size, image):
    """The PIL image; DataError if it is not of size x size pixels."""
    if image.size != (size, size):
        found = f"{image.width}x{image.height} pixels"
        raise DataError(f"{found}; data.crop 'pad' needs {size}x{size}, 'resized' any")
    return image


def test_transform(data):
    """PIL image -> uint8 array [3, size, size]: resized to size / crop_pct, centre crop. Nothing random."""
    return create_transform(
        data.size, crop_pct=data.crop_pct, interpolation=data.interpolation, use_prefetcher=True
    )


# ---------------------------------------------------------------- training views


def train_views(data):
    """(content, seeds) -> views, uint8 [3, size, size], one for each seed; BrokenImage before the first."""
    if data.pipeline == "fast":
        return _FastViews(data)
    return functools.partial(_timm_views, train_transform(data))


def try_views(data):
    """Make a training view of a black image; DataError for settings that cannot work."""
    content = io.BytesIO()
    try:
        Image.new("RGB", (data.size, data.size)).save(content, "png")
        list(train_views(data)(content.getvalue(), [0]))
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
    2 levels of that. Pillow 13 resizes some crops vertically first (its issue 9549): they differed by at most
    13 levels, near black and white, in 200 crops of photographs. Views are channels-last in memory.
    """

    def __init__(self, data):
        self.size, self.flip, self.painter = data.size, data.hflip, Painter(data.size)
        (self.crop, *_), self.policy = with_recorded_operations(train_transform(data))

    def __call__(self, content, seeds):
        pixels = self._pixels(content)
        height, width, _ = pixels.shape
        for seed in seeds:
            (top, left, rows, columns), mode, flipped, operations = self._draw(seed, width, height)
            # [None] first: with it last, PyTorch would take the tensor as channels-first, and copy it
            crop = torch.from_numpy(pixels[top : top + rows, left : left + columns])[None].permute(0, 3, 1, 2)
            resized = F.interpolate(crop, (self.size, self.size), mode=mode, antialias=True)
            view = resized[0].permute(1, 2, 0).numpy()
            if flipped:
                view = cv2.flip(view, 1)
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
                with contextlib.suppress(ValueError):
                    return simplejpeg.decode_jpeg(content)
            return np.array(_rgb(image))

    def _draw(self, seed, width, height):
        """(crop's top, left, height, width), kernel, whether flipped, RandAugment's operations."""
        seed_all(seed)
        shape = torch.empty((3, height, width), device="meta")
        box = self.crop.get_params(shape, self.crop.scale, self.crop.ratio)
        kernel = drawn_kernel(self.crop.interpolation)
        flipped = self.flip > 0 and bool(torch.rand(1) < self.flip)
        return box, kernel, flipped, self.policy([]) if self.policy else []


# ---------------------------------------------------------------- a batch


def mixer(data):
    """(images [B, 3, H, W] float in [0, 1], labels [B]) -> (images, target): random erasing, mixup, cutmix.

    None where the recipe has none of them. target: [B, K] with rows that sum to 1, or the labels where
    nothing is mixed. By timm, which draws from the global generators, and once for a batch of Mixup, as
    upstream. No label smoothing here: each student smooths, which gives the same loss.
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
