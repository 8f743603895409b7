"""data.pipeline "fast" and RandAugment on the device, against timm's own transforms: draws, pixels, files, determinism."""

import collections
import functools
import io
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SHARED, make_recipe
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

import data
import recipe

SIZE = 48
CROP = dict(
    data__size=SIZE,
    data__classes=2,
    data__crop={"kind": "resized", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "random"},
    data__hflip=0.5,
    data__drop_last=True,
)
RAND = CROP | {"data__rand_augment": "rand-m7-mstd0.5"}
FAST, DEVICE = {"data__pipeline": "fast"}, {"data__rand_augment_on": "device"}


def picture(i, size=(90, 70)):
    """Smooth waves with noise on them: all frequencies, all values."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [127 + 120 * np.sin(x / (5 + i + c) + c) * np.cos(y / (7 + 2 * c + i)) for c in range(3)]
    noise = np.random.default_rng(i).normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray((np.stack(waves, axis=2) + noise).clip(0, 255).astype(np.uint8))


def encoded(i, kind="JPEG", mode="RGB", size=(90, 70), **options):
    buffer = io.BytesIO()
    picture(i, size).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def real_jpegs(n):
    files = sorted((SHARED / "imagenet_sample").glob("train*.parquet"))
    if not files:
        pytest.skip(f"ImageNet sample not found in {SHARED}")
    return [image["bytes"] for image in pq.read_table(files[0], columns=["image"])["image"].to_pylist()[:n]]


SAMPLINGS = [dict(subsampling=s, quality=q) for s in (0, 1, 2) for q in (60, 95)] + [
    dict(restart_marker_blocks=3),
    dict(optimize=True),
    dict(keep_rgb=True),
    dict(comment=b"\xff\xd9 is no end here"),
]


def folder_of(tmp_path, files):
    """{name: bytes} as class folders a and b, in turn."""
    for split in ("train", "test"):
        for i, (name, raw) in enumerate(files.items()):
            path = tmp_path / split / "ab"[i % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
    return {"data__source": str(tmp_path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("jpegs"), {f"{i:02d}.jpg": encoded(i, quality=92) for i in range(12)})


def loader(folder, workers=0, batch_size=12, per_process=None, rank=0, world=1, **changes):
    changes = {"batch_size": batch_size, "batch_size_per_process": per_process or batch_size} | folder | changes
    sizes = dict(batch_size=batch_size, batch_size_per_process=per_process or batch_size // world)
    return data.TrainLoader(make_recipe(**changes).data, seed=3, **sizes, workers=workers, rank=rank, world=world)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@pytest.fixture
def horizontally_first(monkeypatch):
    """PIL as it was before Pillow 13, which resizes some crops vertically first and cuts other values at 0 and 255."""
    functional, resize = transforms.functional, transforms.functional.resize

    def in_two(image, size, *a, **k):
        return resize(resize(image, (image.height, size[1]), *a, **k), size, *a, **k)

    monkeypatch.setattr(functional, "resize", in_two)


# ---------------------------------------------------------------- decoding


def test_rows_decoded_are_pils():
    files = [encoded(i, size=(90 + i, 61 + 7 * i), **options) for i, options in enumerate(SAMPLINGS)]
    for raw in files:
        _is_pils(raw)
    assert data._Jpeg.of(files[0]).pixels((0, 0, 9, 1), b"")[0].shape[0] < 61  # the rest stays undecoded


def test_rows_decoded_of_real_photographs_are_pils():
    assert sum(_is_pils(raw) for raw in real_jpegs(40)) >= 30


def _is_pils(raw):
    image, jpeg = np.asarray(data.decode({"bytes": raw, "path": None})), data._Jpeg.of(raw)
    if jpeg is None:
        return False
    assert jpeg.size == (image.shape[1], image.shape[0])
    for bottom in (1, 8, 16, 17, image.shape[0] // 2, image.shape[0] - 1, image.shape[0]):
        rows, corner = jpeg.pixels((0, 0, jpeg.size[0], bottom), np.empty(image.size, np.uint8))
        assert np.array_equal(rows[:bottom], image[:bottom]) and corner == (0, 0)
    return True


def odd_files():
    """{name: bytes}: what is no plain JPEG, and what is none at all."""
    good = encoded(3, quality=90)
    scan = good.index(b"\xff\xda")
    half = scan + (len(good) - scan) // 2
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: not heeded
    garbled = bytearray(good)
    garbled[half : half + 40] = bytes(range(40))
    return {
        "grey.jpg": encoded(1, mode="L"),
        "cmyk.jpg": encoded(2, mode="CMYK"),
        "progressive.jpg": encoded(4, progressive=True),
        "rotated.jpg": encoded(5, exif=exif),
        "png.jpg": encoded(6, "PNG"),
        "palette.png": encoded(7, "PNG", mode="P"),
        "webp.webp": encoded(8, "WEBP"),
        "trailing.jpg": good + b"behind the end",
        "garbled.jpg": bytes(garbled),
        "marker.jpg": good[:half] + b"\xff\xc4\x00\x08abcdef" + good[half:],
        "truncated.jpg": good[:half],
        "no_end.jpg": good[:-2],
        "empty.jpg": b"",
        "text.jpg": b"<html>",
        "header.jpg": good[: scan + 4],
        "end_early.jpg": good[:half] + b"\xff\xd9",
        "no_height.jpg": good.replace(bytes([8, 0, 70, 0, 90]), bytes([8, 0, 0, 0, 90])),
    }


def test_odd_files_are_what_timms_pipeline_makes_of_them(tmp_path, horizontally_first):
    """Decoded by PIL, or decoded to the same pixels, or broken, with the same words."""
    odd = odd_files()
    fill = {f"good{i}.jpg": encoded(i) for i in range(12)}
    changes = folder_of(tmp_path, odd | fill) | CROP | {"data__max_broken": 1.0, "batch_size": len(odd | fill)}
    size = changes.pop("batch_size")
    ours, timms = (loader(changes, batch_size=size - size % 2, **more) for more in (FAST, {}))
    both = [(list(own.batches(0, 2)), own.broken) for own in (ours, timms)]
    assert both[0][1] == both[1][1] and len(both[0][1]) >= 5
    for (images, *rest), (theirs, *others) in zip(both[0][0], both[1][0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        assert (images.int() - theirs.int()).abs().max() <= 2


# ---------------------------------------------------------------- draws


def test_crops_flips_and_pixels_are_timms(folder, horizontally_first):
    """The same draws: the same crop, kernel and flip; PyTorch's resampling is within two levels of PIL's."""
    ours, timms = (list(loader(folder | CROP, **more).batches(0, 12)) for more in (FAST, {}))
    differ = 0
    for (images, *rest), (theirs, *others) in zip(ours, timms, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        gap = (images.int() - theirs.int()).abs()
        differ += (gap > 0).float().mean() / len(ours)
        assert gap.max() <= 2 and images.dtype == torch.uint8
    assert differ < 0.02  # of waves and noise, the worst there is


def test_crops_of_real_photographs_are_within_two_levels_of_timms(horizontally_first):
    section = make_recipe(**CROP | FAST).data
    fast, timms = data._FastViews(section, 1), data.train_transform(section)
    for i, raw in enumerate(real_jpegs(25)):
        ((view,),) = fast({"bytes": raw, "path": None}, i, [i], functools.partial(data._broken, "image", {"bytes": raw}))
        data.seed_all(i)
        theirs = np.asarray(timms(data.decode({"bytes": raw, "path": None})))
        assert np.abs(view.numpy().transpose(2, 0, 1).astype(int) - theirs).max() <= 2


def test_what_is_drawn_is_what_timm_draws(monkeypatch):
    """Crop, kernel, flip, operations, values, and the kernels of warps, one by one, for 300 seeds."""
    section = make_recipe(**RAND | FAST).data
    fast, timms, seen = data._FastViews(section, 1), data.train_transform(section), []
    crop, params = timms.transforms[0], RandomResizedCropAndInterpolation.get_params
    monkeypatch.setattr(crop, "get_params", lambda *a: seen.append(params(*a)) or seen[-1])
    for op in timms.transforms[2].ops:
        op.aug_fn = functools.partial(_watched, seen, op.name, op.aug_fn)
    resized = data.transforms.functional.resize
    monkeypatch.setattr(
        data.transforms.functional,
        "resize",
        lambda image, size, mode, **k: seen.append(mode.value) or resized(image, size, mode, **k),
    )
    flip = transforms.functional.hflip
    monkeypatch.setattr(transforms.functional, "hflip", lambda image: seen.append("flipped") or flip(image))
    image, found = picture(0), collections.Counter()
    for seed in range(300):
        seen.clear()
        data.seed_all(seed)
        timms(image)
        box, mode, flipped, ops = fast._draw(seed, *image.size)
        drawn = [x for x in seen if x not in ("bilinear", "bicubic", "flipped")]
        assert drawn == [box, *((name, value, cubic) for name, value, cubic in ops)]
        assert ("flipped" in seen) == flipped and mode == next((x for x in seen if x in ("bilinear", "bicubic")), mode)
        found.update(name for name, *_ in ops)
    assert len(found) == 15 and 250 < sum(found.values()) < 350  # 2 of 15, each with probability 0.5


def _watched(seen, name, aug_fn, image, *values, **options):
    """timm's operation, with what it is to do noted; the kernel is what PIL is given."""
    kernel = []
    if name in data.WARPS:
        transform = image.transform
        image.transform = lambda *a, **k: kernel.append(k.get("resample", a[3] if len(a) > 3 else None)) or transform(*a, **k)
    result = aug_fn(image, *values, **options)
    cubic = bool(kernel) and kernel[0] == Image.Resampling.BICUBIC
    seen.append((name, values[0] if values else 0.0, cubic))
    return result


# ---------------------------------------------------------------- RandAugment's arithmetic


def cases(size=64):
    """(operation, whether bicubic, the image, [its values], PIL's result for each)."""
    rng = random.Random(0)
    image = picture(1, (size, size)).point(lambda v: 20 + 0.7 * v)  # AutoContrast has something to stretch
    for name in data.OPS:
        for cubic in (False, True) if name in data.WARPS else (False,):
            level, values = LEVEL_TO_ARG[name], [0.0]
            if level:
                levels = [rng.gauss(7, 0.5) if "Posterize" in name else rng.uniform(0, 10) for _ in range(5)]
                values = [level(v, {"translate_const": size // 2})[0] for v in levels]
            options = dict(resample=Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR, fillcolor=data.FILL)
            theirs = [NAME_TO_OP[name](image, *([v] if level else []), **options) for v in values]
            yield name, cubic, np.asarray(image), values, np.stack([np.asarray(x) for x in theirs])


BY_TABLE = {*data.TABLES, "Contrast", "ContrastIncreasing", "AutoContrast", "Equalize"}


def test_operations_are_pils_or_within_a_level():
    painter = data._Painter(64)
    for name, cubic, image, values, theirs in cases():
        for value, expected in zip(values, theirs, strict=True):
            ours = image.copy()
            painter(ours, [(name, value, cubic)])
            gap = np.abs(ours.astype(int) - expected)
            exact = name in BY_TABLE or (name == "Rotate" and cubic)
            assert gap.max() <= (0 if exact else 1), (name, value, cubic)
            assert not np.array_equal(expected, image) or gap.max() == 0


def test_operations_on_the_device_are_pils_or_within_a_level():
    for name, cubic, image, values, theirs in cases():
        images = torch.from_numpy(np.stack([image] * len(values))).permute(0, 3, 1, 2)
        drawn = torch.stack([data._as_numbers([(name, value, cubic)], 2) for value in values])
        gap = np.abs(data.rand_augment(images, drawn).permute(0, 2, 3, 1).numpy().astype(int) - theirs)
        assert gap.max() <= (0 if name in BY_TABLE else 1), name


def test_flat_images_are_pils():
    """Nothing to stretch or to equalize; one value alone, and almost."""
    painter, flat = data._Painter(16), np.full((16, 16, 3), 77, np.uint8)
    almost = flat.copy()
    almost[3, 4] = (0, 200, 78)
    for image in (flat, almost):
        for name in ("AutoContrast", "Equalize", "Contrast"):
            theirs, ours = np.asarray(NAME_TO_OP[name](Image.fromarray(image), *[0.4] * (name == "Contrast"))), image.copy()
            painter(ours, [(name, 0.4, False)])
            on_device = data.rand_augment(
                torch.from_numpy(image).permute(2, 0, 1)[None], data._as_numbers([(name, 0.4, False)], 1)[None]
            )
            assert np.array_equal(ours, theirs) and np.array_equal(on_device[0].permute(1, 2, 0).numpy(), theirs)


def test_an_image_on_the_device_does_not_depend_on_its_batch():
    rng, ops = random.Random(1), [name for name in data.OPS if "Posterize" not in name]
    images = torch.from_numpy(np.stack([np.asarray(picture(i, (SIZE, SIZE))) for i in range(24)])).permute(0, 3, 1, 2)
    chosen = [
        [(rng.choice(ops), rng.uniform(0.1, 0.9), rng.random() < 0.5) for _ in range(rng.randint(0, 2))] for _ in range(24)
    ]
    drawn = torch.stack([data._as_numbers(own, 2) for own in chosen])
    whole = data.rand_augment(images, drawn)
    alone = torch.cat([data.rand_augment(images[i : i + 1], drawn[i : i + 1]) for i in range(24)])
    assert torch.equal(whole, alone)
    untouched = [i for i in range(24) if not chosen[i]]
    assert untouched and torch.equal(whole[untouched], images[untouched])


@pytest.mark.parametrize("pipeline", ["fast", "timm"])
def test_the_device_does_what_the_cpu_would(folder, pipeline):
    """The same draws, so the same images but for a level in warps, which some operations make more of."""
    here, there = (list(loader(folder | RAND, data__pipeline=pipeline, **more).batches(0, 8)) for more in ({}, DEVICE))
    gaps = torch.cat(
        [(a.int() - b.int()).abs().float().flatten(1).mean(1) for (a, *_), (b, *_) in zip(here, there, strict=True)]
    )
    assert gaps.median() < 0.05 and gaps.max() < 3
    plain = torch.cat([images for images, *_ in loader(folder | CROP, data__pipeline=pipeline).batches(0, 8)])
    assert (plain.int() - torch.cat([images for images, *_ in here]).int()).abs().float().mean() > 5  # it did something


def test_operations_unknown_to_the_device_are_refused(folder):
    with pytest.raises(data.DataError, match="GaussianBlur, which the device cannot do"):
        loader(folder | RAND | DEVICE | {"data__rand_augment": "rand-m7-t3a"})


@pytest.mark.parametrize(
    "changes, told",
    [
        (FAST, "'fast' is for crop 'resized'"),
        (CROP | DEVICE, "there is no rand_augment"),
        (CROP | FAST | {"data__rand_augment": "augmix-m3"}, "knows RandAugment only"),
    ],
)
def test_contradictions(changes, told):
    with pytest.raises(recipe.RecipeError, match=told):
        make_recipe(**changes)


# ---------------------------------------------------------------- determinism, repeats


@pytest.mark.parametrize("more", [FAST, FAST | DEVICE, DEVICE], ids=["fast", "fast, device", "timm, device"])
def test_results_do_not_depend_on_workers_processes_or_resuming(folder, more):
    changes = folder | RAND | more | {"data__repeats": 3}
    everything = list(loader(changes).batches(0, 4))
    assert same(everything, list(loader(changes, workers=2).batches(0, 4)))
    assert same(everything[2:], list(loader(changes).batches(2, 4)))
    parts = [list(loader(changes, rank=rank, world=2).batches(0, 4)) for rank in range(2)]
    for whole, *shares in zip(everything, *parts, strict=True):
        for rank, share in enumerate(shares):
            assert all(torch.equal(a[rank::2], b) for a, b in zip(whole, share, strict=True))


def test_a_batch_outlives_the_next(folder):
    """Views are painted into memory that is used again; batches must not be."""
    batches = loader(folder | RAND | FAST).batches(0, 2)
    first = next(batches)[0]
    kept = first.clone()
    next(batches)
    assert torch.equal(first, kept)


def test_repeats_are_decoded_once(folder, monkeypatch):
    decoded, decode = [], data.simplejpeg.decode_jpeg
    monkeypatch.setattr(data.simplejpeg, "decode_jpeg", lambda raw, **k: decoded.append(1) or decode(raw, **k))
    (images, _, index), *_ = loader(folder | CROP | FAST | {"data__repeats": 3}).batches(0, 1)
    assert len(decoded) == len(set(index.tolist())) == 4 and len(images) == 12
    assert len({image.numpy().tobytes() for image in images}) == 12
