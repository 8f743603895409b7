"""A part cut out of a JPEG's bytes against the whole image decoded; tools/prepare.py on real files, with the real jpegtran."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SHARED, make_recipe, needs_imagenet
from PIL import Image

import data

sys.path.insert(0, str(ROOT / "tools"))
import prepare

needs_jpegtran = pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not there (libjpeg-turbo-progs)")


def picture(width, height, mode="RGB", seed=0):
    """Waves and noise: every block has another content."""
    chance = np.random.default_rng(seed)
    y, x, c = np.mgrid[:height, :width, : len(mode)]
    pixels = 120 + 60 * np.sin(x / 9 + c) + 50 * np.cos(y / 7 - c) + chance.normal(0, 12, x.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze(), mode)


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def pixels(jpeg):
    return np.asarray(data.decode({"bytes": jpeg, "path": None}))


def boxes(width, height, n, seed=0):
    chance = np.random.default_rng(seed)
    for _ in range(n):
        left, upper = chance.integers(width), chance.integers(height)
        yield left, upper, chance.integers(left, width) + 1, chance.integers(upper, height) + 1


def assert_same_in(box, jpeg, whole):
    part, (x, y) = data.cut(jpeg, box)
    left, upper, right, lower = box
    assert np.array_equal(pixels(part)[upper - y : lower - y, left - x : right - x], whole[upper:lower, left:right]), box
    return part


@pytest.mark.parametrize("size", [(256, 192), (255, 190), (64, 300), (16, 16)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey"])
def test_a_part_has_the_pixels_of_the_whole(subsampling, size):
    image = picture(*size, mode="L" if subsampling == "grey" else "RGB")
    options = {} if subsampling == "grey" else {"subsampling": subsampling}
    plain = saved(image, **options)
    n = prepare.interval(plain)
    jpeg = prepare.with_index(saved(image, restart_marker_blocks=n, **options))
    whole = pixels(plain)
    assert np.array_equal(pixels(jpeg), whole)
    lengths = [
        len(assert_same_in(box, jpeg, whole)) for box in [*boxes(*size, 40), (0, 0, *size), (*(s - 1 for s in size), *size)]
    ]
    assert min(lengths) < len(jpeg) or size == (16, 16)


@pytest.mark.parametrize("width", [256, 250, 31 * 8, 37 * 8])
def test_every_row_of_mcus_begins_with_a_marker(width):
    jpeg = saved(picture(width, 64), subsampling="4:4:4")
    n, row = prepare.interval(jpeg), -(-width // 8)
    assert row % n == 0 and (n == row or 32 <= 8 * n <= 128)


def test_without_an_index_of_its_own_nothing_is_cut():
    image = picture(256, 192)
    jpeg = saved(image, restart_marker_blocks=4, subsampling="4:2:0")
    indexed = prepare.with_index(jpeg)
    box = (100, 60, 180, 150)
    assert data.cut(jpeg, box) is None and data.cut(indexed, box) is not None
    at = indexed.index(data.RESTART_INDEX) + len(data.RESTART_INDEX)
    size = 2 + int.from_bytes(indexed[4:6], "big")
    shifted = indexed[: at + 40] + bytes([indexed[at + 40] ^ 1]) + indexed[at + 41 :]
    other = prepare.with_index(saved(picture(256, 192, seed=1), restart_marker_blocks=4, subsampling="4:2:0"))
    late = indexed[:at] + indexed[at + 4 : 2 + size] + indexed[size - 2 : 2 + size] + indexed[2 + size :]  # all are markers
    for wrong in (
        shifted,
        late,
        other[: 2 + size] + jpeg[2:],
        indexed[:-3000],
        prepare.with_index(saved(image, progressive=True, restart_marker_blocks=4)),
    ):
        assert data.cut(wrong, (0, 0, 256, 192)) is None
    with pytest.raises(ValueError, match="no JPEG whose"):
        data.jpeg_frame(b"\x89PNG\r\n")


def test_an_image_with_too_many_markers_is_not_listed():
    with pytest.raises(ValueError, match="more markers"):
        prepare.with_index(saved(picture(2000, 600), restart_marker_blocks=1, subsampling="4:4:4"))


def table(images):
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": jpeg, "path": f"{i}.jpg"} for i, jpeg in enumerate(images)]
    return pa.table({"image": pa.array(rows, struct), "label": list(range(len(images))), "more": ["x"] * len(images)})


def run(*arguments):
    command = [sys.executable, ROOT / "tools" / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@needs_jpegtran
def test_all_that_is_no_common_jpeg_is_kept_as_it_was(tmp_path):
    (tmp_path / "in" / "data").mkdir(parents=True)
    png = io.BytesIO()
    picture(40, 30).save(png, "PNG")
    common = saved(picture(200, 150), quality=90)
    progressive = saved(picture(200, 150, seed=2), progressive=True, quality=90)
    cmyk = saved(picture(120, 90).convert("CMYK"))
    images = [common, progressive, cmyk, png.getvalue(), common[:-200], b"", None, saved(picture(120, 90, "L"))]
    pq.write_table(table(images), tmp_path / "in" / "data" / "train-0.parquet")
    before = (tmp_path / "in" / "data" / "train-0.parquet").read_bytes()
    done = run(tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "in" / "data" / "train-0.parquet").read_bytes() == before
    made = pq.read_table(tmp_path / "out" / "data" / "train-0.parquet")
    assert made.drop_columns("image").equals(table(images).drop_columns("image"))
    kept = [row["bytes"] for row in made["image"].to_pylist()]
    assert [a == b for a, b in zip(images, kept, strict=True)] == [False, False, False, True, True, True, True, False]
    for i in (0, 1, 7):
        assert np.array_equal(pixels(kept[i]), pixels(images[i])) and data.cut(kept[i], (50, 40, 60, 50))
    assert np.array_equal(pixels(kept[2]), pixels(cmyk))
    assert list((tmp_path / "out" / "data").iterdir()) == [tmp_path / "out" / "data" / "train-0.parquet"]

    again = run(tmp_path / "in", tmp_path / "out")
    assert "1 files left out" in again.stdout
    pq.write_table(table(images[:3]), tmp_path / "in" / "data" / "train-0.parquet")
    other = run(tmp_path / "in", tmp_path / "out")
    assert other.returncode and "was not made of" in other.stderr


@needs_jpegtran
@needs_imagenet
def test_real_images(tmp_path):
    (tmp_path / "in").mkdir()
    rows = pq.read_table(SHARED / "imagenet_sample")
    pq.write_table(rows.slice(0, 24), tmp_path / "in" / "train-0.parquet")
    done = run(tmp_path / "in", tmp_path / "out", "--jobs", 2)
    assert "24 prepared" in done.stdout, done.stdout + done.stderr
    made = pq.read_table(tmp_path / "out" / "train-0.parquet")
    assert made.schema.field("image") == rows.schema.field("image") and b"huggingface" in made.schema.metadata
    for i, (before, after) in enumerate(zip(rows["image"].to_pylist(), made["image"].to_pylist(), strict=False)):
        whole = pixels(before["bytes"])
        assert np.array_equal(pixels(after["bytes"]), whole) and after["path"] == before["path"]
        for box in boxes(whole.shape[1], whole.shape[0], 4, seed=i):
            assert_same_in(box, after["bytes"], whole)


@needs_jpegtran
def test_the_fast_pipeline_makes_the_same_crops_of_prepared_files(tmp_path, monkeypatch):
    """Parts cut out of the bytes are what whole images give, at every crop that is drawn."""
    images = []
    for i in range(16):
        buffer = io.BytesIO()
        picture(150 + 20 * (i % 4), 130 + 10 * (i % 3), seed=i).save(buffer, "JPEG", quality=90, subsampling=2 * (i % 2))
        images.append({"image": {"bytes": buffer.getvalue(), "path": f"{i}.jpg"}, "label": i % 2})
    (tmp_path / "in").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(images), tmp_path / "in" / f"{split}-0.parquet")
    assert run(tmp_path / "in", tmp_path / "out").returncode == 0
    parts, cut = [], data.cut
    monkeypatch.setattr(data, "cut", lambda *a: parts.append(cut(*a)) or parts[-1])
    crop = {"kind": "resized", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "random"}
    batches = {}
    for folder in ("in", "out"):
        changes = dict(source=str(tmp_path / folder), size=32, classes=2, crop=crop, pipeline="fast", drop_last=True)
        settings = make_recipe(batch_size=16, batch_size_per_process=16, **{f"data__{k}": v for k, v in changes.items()})
        loader = data.TrainLoader(settings.data, seed=0, batch_size=16, batch_size_per_process=16, workers=0, rank=0, world=1)
        batches[folder] = list(loader.batches(0, 4))
    assert sum(part is not None for part in parts) > 32  # of 64 crops: small ones are cut out, not all images decoded whole
    for before, after in zip(*batches.values(), strict=True):
        assert all(map(torch.equal, before, after))


def test_bad_calls_say_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(prepare.shutil, "which", lambda name: "/usr/bin/jpegtran")
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "empty"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"no \.parquet files"):
        prepare.main()
    pq.write_table(table([b""]).rename_columns(["picture", "label", "more"]), tmp_path / "empty" / "a.parquet")
    with pytest.raises(SystemExit, match=r"no column 'image' .columns: picture"):
        prepare.main()
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / "empty"), str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="only read"):
        prepare.main()
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="libjpeg-turbo-progs"):
        prepare.main()
