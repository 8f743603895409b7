"""augment.py: decoding, timm's crops to the byte, the fast pipeline against them, mixing. Real and synthetic
images.
"""

import collections
import functools
import io
import random
import resource
import struct
import subprocess
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm.data
import torch
from conftest import SHARED, make_recipe
from PIL import Image
from test_sources import WHOLE, encoded, photo
from timm.data import Mixup, create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torchvision import transforms

import augment
import losses
import rand_augment
import sources

SIZE = 48
RESIZED = {"kind": "resized", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "random"}
CROP = dict(data__size=SIZE, data__classes=2, data__crop=RESIZED, data__hflip=0.5)
RAND = CROP | {"data__rand_augment": "rand-m7-mstd0.5"}
FAST = {"data__pipeline": "fast"}


def seeded(seed, function, *arguments):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return function(*arguments)


def picture(i, size=(90, 70)):
    """Smooth waves with noise on them: all frequencies, all values."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [127 + 120 * np.sin(x / (5 + i + c) + c) * np.cos(y / (7 + 2 * c + i)) for c in range(3)]
    noise = np.random.default_rng(i).normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray((np.stack(waves, axis=2) + noise).clip(0, 255).astype(np.uint8))


def picture_file(i, kind="JPEG", mode="RGB", size=(90, 70), **options):
    return encoded(picture(i, size).convert(mode), kind, **options)


def gradient(colour, size=(80, 60), mode="RGB"):
    """A JPEG whose red and green tell where a crop was taken, and whose blue tells images apart."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([across, down, np.full_like(across, colour)], axis=2).astype(np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode), quality=95)


def real_jpegs(n):
    files = sorted((SHARED / "imagenet_sample").glob("train*.parquet"))
    if not files:
        pytest.skip(f"ImageNet sample not found in {SHARED}")
    return [image["bytes"] for image in pq.read_table(files[0], columns=["image"])["image"].to_pylist()[:n]]


# ---------------------------------------------------------------- kinds of images


def png_of_zeros(width, height):
    """One bit a pixel, well compressed: 100 kB for 900 million pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    packer, row = zlib.compressobj(1), bytes((width + 7) // 8 + 1)
    pixels = b"".join(packer.compress(row * 500) for _ in range(height // 500)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pipeline", [{}, FAST], ids=["timm", "fast"])
@pytest.mark.parametrize(
    "side, reason", [(9500, "9500x9500 pixels, more than augment.MAX_PIXELS"), (30000, "DecompressionBomb")]
)
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(side, reason, pipeline):
    content, views = png_of_zeros(side, side), augment.train_views(make_recipe(**CROP | pipeline).data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(augment.BrokenImage, match=reason):
        list(views(content, [0]))
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    )  # kB; the smaller one unpacks to 90 MB


def test_the_largest_allowed_image_is_read(monkeypatch):
    monkeypatch.setattr(augment, "MAX_PIXELS", 24 * 20)
    assert augment.decode(WHOLE[0]).size == (24, 20)
    monkeypatch.setattr(augment, "MAX_PIXELS", 24 * 20 - 1)
    with pytest.raises(augment.BrokenImage, match="24x20 pixels, more than"):
        augment.decode(WHOLE[0])


GREY16 = np.uint16([[0, 255, 256, 40000, 65535]] * 4)
RED = Image.new("RGB", (6, 4), (200, 40, 20))


def with_palette(transparency):
    return encoded(RED.quantize(4), "PNG", **({} if transparency is None else {"transparency": transparency}))


def translucent(mode, pixel):
    return encoded(Image.new(mode, (6, 4), pixel), "PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content, pixel",
    [
        (encoded(RED, "PNG"), (200, 40, 20)),
        (encoded(RED), (200, 40, 20)),
        (encoded(Image.new("CMYK", (6, 4), (0, 128, 255, 0))), (255, 127, 0)),
        (encoded(Image.new("CMYK", (6, 4), (0, 128, 255, 0)), "TIFF"), (255, 127, 0)),
        (encoded(Image.new("L", (6, 4), 77)), (77, 77, 77)),
        (translucent("LA", (77, 0)), (77, 77, 77)),
        (translucent("RGBA", (200, 40, 20, 9)), (200, 40, 20)),
        (with_palette(None), (200, 40, 20)),
        (with_palette(0), (200, 40, 20)),
        (with_palette(b"\x09\x80"), (200, 40, 20)),
        (encoded(Image.new("1", (6, 4), 1), "PNG"), (255, 255, 255)),
        (encoded(RED, "GIF"), (200, 40, 20)),
        (encoded(RED, "WEBP", lossless=True), (200, 40, 20)),
        (encoded(RED, "BMP"), (200, 40, 20)),
        (encoded(RED, "PPM"), (200, 40, 20)),
        (encoded(RED, "MPO", save_all=True, append_images=[RED], quality=95), (200, 40, 20)),
    ],
    ids=["rgb", "jpeg", "cmyk", "cmyk-tiff", "l", "la", "rgba", "p", "p-index", "p-alpha", "1", "gif", "webp",
         "bmp", "ppm", "mpo"],
)  # fmt: skip
def test_every_mode_becomes_rgb(content, pixel):
    pixels = np.asarray(augment.decode(content))
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - pixel).max() <= 2


@pytest.mark.parametrize(
    "kind, values",
    [("PNG", GREY16), ("TIFF", GREY16), ("TIFF", GREY16.astype(">u2")), ("TIFF", np.int32(GREY16))],
)
def test_16_bit_greys_are_scaled_not_clipped(kind, values):
    pixels = np.asarray(augment.decode(encoded(Image.fromarray(values), kind)))
    assert pixels.shape == (4, 5, 3) and pixels[2, :, 1].tolist() == [0, 0, 1, 156, 255]


def test_floating_point_pixels_are_refused():
    """PIL would clip them to whole numbers: an image of 0 to 1 would be black."""
    content = encoded(Image.fromarray(np.random.default_rng(0).random((4, 4), np.float32)), "TIFF")
    with pytest.raises(augment.BrokenImage, match="floating-point pixels, expected integers"):
        augment.decode(content)


@pytest.mark.parametrize("value", [-1, 65536])
def test_greys_of_unknown_range_are_refused(value):
    content = encoded(Image.fromarray(np.full((4, 4), value, dtype=np.int32)), "TIFF")
    with pytest.raises(augment.BrokenImage, match=f"grey values {value}..{value}, expected 16 bits"):
        augment.decode(content)


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(0), exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_nothing(orientation):
    assert Image.open(io.BytesIO(rotated(orientation))).getexif()[0x0112] == orientation
    assert augment.decode(rotated(orientation)).tobytes() == Image.open(io.BytesIO(WHOLE[0])).tobytes()


@pytest.mark.parametrize("pipeline", [{}, FAST], ids=["timm", "fast"])
@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "SGI"])
def test_formats_that_start_programs_are_not_opened(kind, pipeline, monkeypatch):
    """PIL gives an EPS to Ghostscript, whatever the file is called."""
    content = encoded(picture(0), kind)
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(augment.BrokenImage, match=rf"no image, {len(content)} bytes \(known: JPEG, PNG, "):
        list(augment.train_views(make_recipe(**CROP | pipeline).data)(content, [0]))
    assert not started


def test_no_memory_is_no_broken_image(monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(augment, "_rgb", full)
    with pytest.raises(sources.DataError, match="needs more memory than there is") as error:
        augment.decode(WHOLE[0])
    assert type(error.value) is sources.DataError


# ---------------------------------------------------------------- timm's pipeline


def test_a_crop_is_timms_to_the_pixel(tmp_path):
    """What a view shows equals what timm's own data set serves, given the same generators."""
    for i in range(4):
        for folder, content in (
            ("a", gradient(60 * i, mode="L" if i == 3 else "RGB")),
            ("b", gradient(60 * i + 20)),
        ):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"{i}.jpg").write_bytes(content)
    upstreams = (
        create_transform(  # vanillaKD's train-kd.py, A1/A2: --aa rand-m7-mstd0.5 --color-jitter 0, prefetcher
            64,
            is_training=True,
            use_prefetcher=True,
            scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3),
            hflip=0.5,
            color_jitter=0,
            auto_augment="rand-m7-mstd0.5",
            interpolation="random",
        )
    )
    theirs = timm.data.ImageDataset(str(tmp_path), transform=upstreams)
    views = augment.train_views(make_recipe(**RAND | {"data__size": 64}).data)
    for i, (path, _) in enumerate(theirs.reader.samples):
        with open(theirs.reader.root + "/" + path if path[0] != "/" else path, "rb") as file:
            content = file.read()
        for seed, view in zip(range(3), views(content, range(3)), strict=True):
            augment.seed_all(seed)
            assert view.shape == (3, 64, 64) and torch.equal(view, torch.as_tensor(theirs[i][0]))


def corners(transform, n, seed):
    """Left edge, top edge, width and height of n crops, read from the gradient in the red and green
    channels.
    """
    image, found = Image.open(io.BytesIO(gradient(0, size=(256, 192)))), []
    for i in range(n):
        crop = np.asarray(seeded(seed + i, transform, image), dtype=float)
        left, right = sorted((crop[0, :, 0].mean(), crop[0, :, -1].mean()))  # a flip exchanges them
        found.append((left, crop[1, 0].mean(), right - left, crop[1, -1].mean() - crop[1, 0].mean()))
    return np.array(found)


def test_crops_are_distributed_as_timms():
    ours = corners(augment.train_transform(make_recipe(**CROP | {"data__size": 64}).data), 500, 0)
    timms = create_transform(
        64, is_training=True, use_prefetcher=True, color_jitter=0, interpolation="random"
    )
    theirs = corners(timms, 500, 10_000)
    for a, b in zip(ours.T, theirs.T, strict=True):  # Kolmogorov-Smirnov, p = 0.001 at 1.95 * sqrt(2 / n)
        grid = np.sort(np.concatenate([a, b]))
        distance = np.abs(
            np.searchsorted(np.sort(a), grid) / 500 - np.searchsorted(np.sort(b), grid) / 500
        ).max()
        assert distance < 1.95 * np.sqrt(2 / 500)
    share = (ours[:, 2] * ours[:, 3]) / 255**2
    assert 0.06 < share.min() < 0.12 and share.max() > 0.9  # scale 0.08 to 1


def test_crop_and_flip_are_the_classic_ones():
    """All 9 x 9 shifts of the zero-padded image and their mirror images, nothing else, each about as
    often.
    """
    section = make_recipe(data__size=32, data__crop={"kind": "pad", "padding": 4}, data__hflip=0.5).data
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    views = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y : y + 32, x : x + 32]
            for flip in (crop, crop[:, ::-1]):
                views[flip.transpose(2, 0, 1).tobytes()] = 0
    transform = augment.train_transform(section)
    torch.manual_seed(0)
    for _ in range(162 * 20):
        views[np.asarray(transform(Image.fromarray(image))).tobytes()] += (
            1  # KeyError: a view that is not one of the 162
        )
    assert len(views) == 162 and min(views.values()) > 3 and max(views.values()) < 50


def test_photographs_are_not_cropped_as_if_they_were_small():
    views = augment.train_views(make_recipe(data__size=16, data__crop={"kind": "pad", "padding": 4}).data)
    with pytest.raises(sources.DataError, match=r"24x20 pixels; data.crop 'pad' needs 16x16, 'resized' any"):
        list(views(WHOLE[0], [0]))


# ---------------------------------------------------------------- the fast pipeline


def decoded_fast(content):
    return augment._FastViews(make_recipe(**CROP | FAST).data)._pixels(content)


def test_decoded_pixels_are_pils():
    options = [dict(subsampling=s, quality=q) for s in (0, 1, 2) for q in (60, 95)]
    options += [
        dict(restart_marker_blocks=3),
        dict(optimize=True),
        dict(keep_rgb=True),
        dict(progressive=True),
    ]
    options += [dict(comment=b"\xff\xd9 is no end here")]
    for i, more in enumerate(options):
        content = picture_file(i, size=(90 + i, 61 + 7 * i), **more)
        assert np.array_equal(decoded_fast(content), np.asarray(augment.decode(content))), more


def test_decoded_pixels_of_real_photographs_are_pils():
    for content in real_jpegs(40):
        assert np.array_equal(decoded_fast(content), np.asarray(augment.decode(content)))


def test_plain_jpegs_are_not_decoded_by_pil(monkeypatch):
    monkeypatch.setattr(augment, "_rgb", None)
    for content in real_jpegs(4):
        decoded_fast(content)


def odd_files():
    """{name: bytes}: what is no plain JPEG, and what is none at all."""
    good = picture_file(3, quality=90)
    scan = good.index(b"\xff\xda")
    half = scan + (len(good) - scan) // 2
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: not heeded
    garbled = bytearray(good)
    garbled[half : half + 40] = bytes(range(40))
    progressive = picture_file(4, progressive=True)
    scans = [i for i in range(len(progressive) - 1) if progressive[i : i + 2] == b"\xff\xda"]
    return {
        "grey": picture_file(1, mode="L"),
        "cmyk": picture_file(2, mode="CMYK"),
        "progressive": progressive,
        "progressive, truncated": progressive[: len(progressive) // 2],
        "progressive, a scan missing": progressive[: scans[3]] + b"\xff\xd9",
        "rotated": picture_file(5, exif=exif),
        "png": picture_file(6, "PNG"),
        "palette": picture_file(7, "PNG", mode="P"),
        "webp": picture_file(8, "WEBP"),
        "trailing": good + b"behind the end",
        "garbled": bytes(garbled),
        "marker": good[:half] + b"\xff\xc4\x00\x08abcdef" + good[half:],
        "marker of nothing": good[:half] + b"\xff\x01" + good[half:],
        "truncated": good[:half],
        "truncated by a byte": good[:-3],
        "no end": good[:-2],
        "empty": b"",
        "text": b"<html>",
        "header alone": good[: scan + 4],
        "early end": good[:half] + b"\xff\xd9",
        "no height": good.replace(bytes([8, 0, 70, 0, 90]), bytes([8, 0, 0, 0, 90])),
        "12 bits": good.replace(bytes([8, 0, 70, 0, 90]), bytes([12, 0, 70, 0, 90])),
        "short JFIF": good[:2] + b"\xff\xe0\x00\x07JFIF\0" + good[20:],
    }


@pytest.fixture
def horizontally_first(monkeypatch):
    """PIL as it was before Pillow 13, which resizes some crops vertically first and cuts other values at 0
    and 255.
    """
    resize = transforms.functional.resize

    def in_two(image, size, *a, **k):
        return resize(resize(image, (image.height, size[1]), *a, **k), size, *a, **k)

    monkeypatch.setattr(transforms.functional, "resize", in_two)


def views_or_reason(views, content, seeds):
    try:
        return torch.stack([view.clone() for view in views(content, seeds)]).int()
    except augment.BrokenImage as error:
        return str(error)


@pytest.mark.parametrize("name", odd_files())
def test_an_odd_file_is_what_timms_pipeline_makes_of_it(name, horizontally_first):
    """The same pixels, or broken with the same words."""
    content = odd_files()[name]
    fast, timms = (
        views_or_reason(augment.train_views(make_recipe(**CROP | more).data), content, range(4))
        for more in (FAST, {})
    )
    if isinstance(timms, str):
        assert fast == timms
    else:
        assert np.array_equal(decoded_fast(content), np.asarray(augment.decode(content)))
        assert (fast - timms).abs().max() <= 2


def test_crops_flips_and_pixels_are_timms(horizontally_first):
    """The same draws: the same crop, kernel and flip; PyTorch's resampling is within two levels of PIL's."""
    fast, timms = (augment.train_views(make_recipe(**CROP | more).data) for more in (FAST, {}))
    differ = []
    for i in range(12):
        content, seeds = picture_file(i, quality=92), range(12 * i, 12 * i + 12)
        gap = views_or_reason(fast, content, seeds) - views_or_reason(timms, content, seeds)
        differ.append((gap != 0).float().mean())
        assert gap.abs().max() <= 2
    assert np.mean(differ) < 0.02  # of waves and noise, the worst there is


def test_crops_of_real_photographs_are_within_two_levels_of_timms(horizontally_first):
    fast, timms = (augment.train_views(make_recipe(**CROP | more).data) for more in (FAST, {}))
    for i, content in enumerate(real_jpegs(25)):
        gap = views_or_reason(fast, content, [i]) - views_or_reason(timms, content, [i])
        assert gap.abs().max() <= 2


def test_what_is_drawn_is_what_timm_draws(monkeypatch):
    """Crop, kernel, flip, operations, values, and the kernels of warps, one by one, for 300 seeds."""
    section = make_recipe(**RAND | FAST).data
    fast, timms, seen = augment._FastViews(section), augment.train_transform(section), []
    crop, params = timms.transforms[0], RandomResizedCropAndInterpolation.get_params
    monkeypatch.setattr(crop, "get_params", lambda *a: seen.append(params(*a)) or seen[-1])
    for op in timms.transforms[2].ops:
        op.aug_fn = functools.partial(_watched, seen, op.name, op.aug_fn)
    resized, flip = transforms.functional.resize, transforms.functional.hflip

    def resize(image, size, mode, **options):
        seen.append(mode.value)
        return resized(image, size, mode, **options)

    monkeypatch.setattr(transforms.functional, "resize", resize)
    monkeypatch.setattr(transforms.functional, "hflip", lambda image: seen.append("flipped") or flip(image))
    image, found = picture(0), collections.Counter()
    for seed in range(300):
        seen.clear()
        augment.seed_all(seed)
        timms(image)
        box, mode, flipped, ops = fast._draw(seed, *image.size)
        drawn = [x for x in seen if x not in ("bilinear", "bicubic", "flipped")]
        assert drawn == [box, *((name, value, cubic) for name, value, cubic in ops)]
        assert ("flipped" in seen) == flipped and mode == next(
            (x for x in seen if x in ("bilinear", "bicubic")), mode
        )
        found.update(name for name, *_ in ops)
    assert len(found) == 15 and 250 < sum(found.values()) < 350  # 2 of 15, each with probability 0.5


def _watched(seen, name, aug_fn, image, *values, **options):
    """timm's operation, with what it is to do noted; the kernel is what PIL is given."""
    kernel = []
    if name.startswith(rand_augment.WARPS):
        transform = image.transform
        image.transform = lambda *a, **k: (
            kernel.append(k.get("resample", a[3] if len(a) > 3 else None)) or transform(*a, **k)
        )
    result = aug_fn(image, *values, **options)
    cubic = bool(kernel) and kernel[0] == Image.Resampling.BICUBIC
    seen.append((name, values[0] if values else 0.0, cubic))
    return result


def test_a_view_depends_on_its_seed_alone():
    for pipeline in ({}, FAST):
        views = augment.train_views(make_recipe(**RAND | pipeline).data)
        contents = [picture_file(i) for i in range(3)]
        together = [views_or_reason(views, content, range(8)) for content in contents]
        assert len({view.numpy().tobytes() for view in together[0]}) == 8
        for noise, (content, expected) in enumerate(zip(contents, together, strict=True)):
            seeded(noise, random.random)
            for seed in (5, 0):
                assert torch.equal(views_or_reason(views, content, [seed])[0], expected[seed])


def test_the_decoded_image_is_not_painted_on():
    """Where the crop is the image itself, at its own size."""
    whole = RESIZED | {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    views = augment.train_views(make_recipe(**RAND | FAST | {"data__crop": whole}).data)
    content = picture_file(0, size=(SIZE, SIZE))
    for first, again in (views_or_reason(views, content, [seed, seed]) for seed in range(6)):
        assert torch.equal(first, again)


# ---------------------------------------------------------------- RandAugment's arithmetic

WITHIN_A_LEVEL = ("Color", "Desaturate", "Sharpness", "Shear", "Translate")  # and bilinear rotation
OPERATIONS = sorted(NAME_TO_OP.keys() - {"GaussianBlurRand"})  # a blur that draws


def cases(size=64):
    """(operation, whether bicubic, the image, [its values], PIL's result for each)."""
    rng = random.Random(0)
    image = picture(1, (size, size)).point(lambda v: 20 + 0.7 * v)  # AutoContrast has something to stretch
    for name in OPERATIONS:
        for cubic in (False, True) if name.startswith(rand_augment.WARPS) else (False,):
            level, values = LEVEL_TO_ARG[name], [0.0]
            if level:
                levels = [rng.gauss(7, 0.5) if "Posterize" in name else rng.uniform(0, 10) for _ in range(5)]
                values = [level(v, {"translate_const": size // 2})[0] for v in levels]
            kernel = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
            options = dict(resample=kernel, fillcolor=rand_augment.FILL)
            theirs = [NAME_TO_OP[name](image, *([v] if level else []), **options) for v in values]
            yield name, cubic, np.asarray(image), values, np.stack([np.asarray(x) for x in theirs])


def test_operations_are_pils_or_within_a_level():
    painter = rand_augment.Painter(64)
    for name, cubic, image, values, theirs in cases():
        for value, expected in zip(values, theirs, strict=True):
            ours = image.copy()
            painter(ours, [(name, value, cubic)])
            gap = np.abs(ours.astype(int) - expected)
            near = name.startswith(WITHIN_A_LEVEL) or (name == "Rotate" and not cubic)
            assert gap.max() <= near, (name, value, cubic)
            assert not np.array_equal(expected, image) or gap.max() == 0


def test_rand_augment_changes_views():
    for pipeline in ({}, FAST):
        plain, painted = (augment.train_views(make_recipe(**more | pipeline).data) for more in (CROP, RAND))
        gaps = [
            (
                views_or_reason(plain, picture_file(i), range(8))
                - views_or_reason(painted, picture_file(i), range(8))
            )
            for i in range(4)
        ]
        assert torch.stack(gaps).abs().float().mean() > 5


# ---------------------------------------------------------------- mixing


def test_mixing_keeps_probabilities_and_is_seeded():
    mix = augment.mixer(make_recipe(data__mixup=0.2, data__cutmix=1.0, data__drop_last=True).data)
    kinds = set()
    for seed in range(20):
        results = []
        for _ in range(2):
            augment.seed_all(augment.seed_of(seed))
            results.append(
                mix(torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8))
            )
        (images, target), again = results
        assert torch.equal(images, again[0]) and torch.equal(target, again[1])
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        original = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        weight = target[0, 0].item()  # of the image itself, the rest is of its mirror in the batch
        torch.testing.assert_close(target[0, 7].item(), 1 - weight, rtol=0, atol=1e-6)
        kept = (images == original).float().mean().item()
        if abs(kept - weight) < 1e-3:
            kinds.add("cutmix")
        else:
            torch.testing.assert_close(
                images, weight * original + (1 - weight) * original.flip(0), rtol=0, atol=1e-5
            )
            kinds.add("mixup")
    assert kinds == {"mixup", "cutmix"}
    assert augment.mixer(make_recipe().data) is None


@pytest.mark.parametrize("labels", [torch.arange(16) % 10, torch.randint(0, 10, (16,))])
def test_mixing_and_then_smoothing_is_timms_smoothed_mixing(labels):
    """A1: mixup 0.2, cutmix 1.0, smoothing 0.1. Ours smooths for each student; the loss of timm's mixed
    target is the same.
    """
    mix = augment.mixer(make_recipe(data__mixup=0.2, data__cutmix=1.0, data__drop_last=True).data)
    timms = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    images, logits = torch.rand(16, 3, 8, 8), torch.randn(16, 10)
    for seed in range(20):
        ours, target = seeded(seed, mix, images.clone(), labels)
        theirs, smoothed = seeded(seed, timms, images.clone(), labels)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(target.sum(dim=1), torch.ones(16))
        for loss, reference in (
            (losses.binary_cross_entropy, BinaryCrossEntropy()),
            (losses.cross_entropy, SoftTargetCrossEntropy()),
        ):
            torch.testing.assert_close(loss(logits, target, smoothing=0.1), reference(logits, smoothed))


def test_random_erasing_covers_with_noise_of_the_datas_own_spread():
    erase = augment.mixer(make_recipe(data__random_erasing=1.0).data)
    images, labels = torch.full((64, 3, 32, 32), 0.25), torch.arange(64)
    erased, same = seeded(0, erase, images.clone(), labels)
    changed = (erased - 0.25).abs() > 1e-6
    assert same is labels and 0.02 < changed.float().mean() < 0.34  # timm: 2 % to a third of the area
    noise = erased[:, 0][changed[:, 0]]
    assert (
        abs(noise.mean() - 0.485) < 0.01 and abs(noise.std() - 0.229) < 0.01
    )  # unit variance for a normalised image
    quiet = augment.mixer(make_recipe(data__random_erasing=0.25).data)
    share = (seeded(1, quiet, images.clone(), labels)[0] - 0.25).abs().amax((1, 2, 3)) > 1e-6
    assert 4 < share.sum() < 30
