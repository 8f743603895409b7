"""data.py against bad images, labels, classes and workers: what is skipped, what stops a run, what it says. Real files."""

import io
import os
import resource
import shutil
import struct
import tarfile
import zlib

import datasets
import numpy as np
import pytest
import torch
from conftest import make_recipe
from PIL import Image

import data

N, SIZE = 40, 16
COLUMNS = dict(
    data__test_split="validation",
    data__classes=2,
    data__size=SIZE,
    data__crop={"kind": "resized", "scale": [0.5, 1.0], "ratio": [0.75, 1.33], "interpolation": "bilinear"},
    data__drop_last=True,
    data__max_broken=0.5,
)
STREAM = dict(data__streaming=True, data__train_size=N, data__shuffle_buffer=6)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8))


WHOLE = {i: encoded(photo(i)) for i in range(N)}
BROKEN = {3: WHOLE[3][:-100], 11: b"", 17: b"<html><body>404 Not Found</body></html>", 30: bytes(2000)}


def write_folder(root, files, split="train", name="{:03d}.jpg"):
    """Class folders: the first half are ants, the second half bees, so that an image's index is its number."""
    for i, content in files.items():
        path = root / split / ("ant" if i < N // 2 else "bee") / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_parquet(root, files, split="train", names=("ant", "bee"), shards=5, labels=None):
    root.mkdir(exist_ok=True)
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
    numbers = sorted(files)
    for shard in range(shards):
        own = numbers[shard * len(numbers) // shards : (shard + 1) * len(numbers) // shards]
        images = [None if files[i] is None else {"bytes": files[i], "path": f"{i:03d}.jpg"} for i in own]
        columns = {"image": images, "label": [labels[i] if labels else int(i >= N // 2) for i in own]}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(root / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    return root


def write_tar(root, files, split="train"):
    root.mkdir(exist_ok=True)
    with tarfile.open(root / f"{split}-0000.tar", "w") as tar:
        for i, (suffix, image) in files.items():
            for name, content in ((f"{i:03d}.cls", str(int(i >= N // 2)).encode()), (f"{i:03d}.{suffix}", image)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return root


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{"mapped": class folders, "stream": parquet files, "clean": the class folders with nothing broken}"""
    root = tmp_path_factory.mktemp("faults")
    return {
        "mapped": write_folder(root / "mapped", WHOLE | BROKEN),
        "stream": write_parquet(root / "stream", WHOLE | BROKEN),
        "clean": write_folder(root / "clean", WHOLE),
    }


def loader(source, kind="mapped", batch_size=4, rank=0, world=1, workers=0, **changes):
    section = make_recipe(
        batch_size=batch_size,
        batch_size_per_process=batch_size // world,
        data__source=str(source),
        **COLUMNS | (STREAM if kind == "stream" else {}) | changes,
    ).data
    sizes = dict(batch_size=batch_size, batch_size_per_process=batch_size // world)
    return data.TrainLoader(section, seed=1, **sizes, rank=rank, world=world, workers=workers)


def evaluation(source, workers=0, **changes):
    section = make_recipe(batch_size=4, batch_size_per_process=4, data__source=str(source), **COLUMNS | changes).data
    return data.test_loader(section, batch_size=4, workers=workers)


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


KINDS = pytest.mark.parametrize("kind", ["mapped", "stream"])
WORKERS = pytest.mark.parametrize("workers", [0, 2])


# ---------------------------------------------------------------- broken images in training


def test_broken_images_are_skipped_counted_and_named(sources):
    """All else is as if nothing were broken: a broken image's place goes to another crop of the next good one."""
    own = loader(sources["mapped"])
    batches, clean = list(own.batches(0, 10)), list(loader(sources["clean"]).batches(0, 10))
    places = 0
    for (images, labels, index), (whole, _, wanted) in zip(batches, clean, strict=True):
        assert images.shape == (4, 3, SIZE, SIZE) and labels.tolist() == [int(i >= N // 2) for i in index.tolist()]
        for place, i in enumerate(wanted.tolist()):
            if i not in BROKEN:
                assert index[place] == i and torch.equal(images[place], whole[place])
                continue
            following = next(j for j in wanted.roll(-place).tolist() if j not in BROKEN)
            assert index[place] == following and places < 4
            assert not any(torch.equal(images[place], crop) for crop in whole)  # not the same crop twice
            places += 1
    assert places == 4 and own.broken.keys() == BROKEN.keys()
    for i, label in ((3, "ant"), (11, "ant"), (17, "ant"), (30, "bee")):
        assert own.broken[i].startswith(f"image {i} ({sources['mapped']}/train/{label}/{i:03d}.jpg): cannot be decoded: ")
    assert "truncated" in own.broken[3] and "no image, 0 bytes" in own.broken[11] and "no image, 39 bytes" in own.broken[17]


@KINDS
@WORKERS
def test_a_resumed_run_with_broken_images_is_the_tail_of_the_whole(sources, kind, workers):
    """Also where an image's crops fall into two batches, and what was found broken."""
    whole = loader(sources[kind], kind, workers=workers, data__repeats=3)
    batches = list(whole.batches(0, 30))  # three epochs
    assert {images.shape[0] for images, _, _ in batches} == {4} and whole.broken
    for start in (1, 13):
        before = loader(sources[kind], kind, workers=workers, data__repeats=3)
        head = list(before.batches(0, start))
        after = loader(sources[kind], kind, workers=workers, data__repeats=3)
        after.broken = before.broken
        assert equal(head + list(after.batches(start, 30)), batches)
        assert after.broken == whole.broken


def test_broken_images_do_not_depend_on_the_number_of_workers(sources):
    results = []
    for workers in (0, 2):
        own = loader(sources["mapped"], workers=workers)
        batches = iter(own.batches(0, 10))
        head = [next(batches) for _ in range(3)]
        seen = dict(own.broken)  # workers are ahead; what they found there does not count yet
        results.append((head + list(batches), seen, own.broken))
    (alone, seen, broken), (helped, helped_seen, helped_broken) = results
    assert equal(alone, helped) and seen == helped_seen and broken == helped_broken and len(seen) < len(broken) == 4


@WORKERS
def test_a_stream_names_every_broken_image_once(sources, workers):
    own = loader(sources["stream"], "stream", workers=workers)
    batches = list(own.batches(0, 20))  # two epochs
    names = sorted(text.split("(")[1].split(")")[0] for text in own.broken.values())
    assert names == ["003.jpg", "011.jpg", "017.jpg", "030.jpg"]
    good = {zlib.crc32(WHOLE[i]) for i in WHOLE.keys() - BROKEN.keys()}
    assert all(set(index.tolist()) <= good and len(index) == 4 for _, _, index in batches)


@KINDS
def test_processes_keep_in_step_whoever_has_the_broken_images(sources, kind):
    broken = {}
    for rank in range(2):
        own = loader(sources[kind], kind, batch_size=8, rank=rank, world=2)
        assert [images.shape for images, _, _ in own.batches(0, 5)] == [(4, 3, SIZE, SIZE)] * 5
        assert not own.broken.keys() & broken.keys()
        broken |= own.broken
    assert len(broken) == 4


@pytest.mark.parametrize("share, allowed", [(0, 0), (0.001, 1), (0.06, 2)])
@KINDS
def test_more_broken_images_than_the_recipe_allows_stop_the_run(sources, kind, share, allowed):
    source = sources[kind]
    own = loader(source, kind, data__max_broken=share)
    said = rf"{source}, train: (\d) of 40 images are broken.*data.max_broken {float(share)} allows {allowed}: "
    with pytest.raises(data.DataError, match=said) as error:
        for _ in own.batches(0, 10):
            assert len(own.broken) <= allowed
    assert str(error.value).count(".jpg): cannot be decoded") == len(own.broken) > allowed


def test_the_cap_holds_over_resumptions_and_names_twenty(sources):
    own = loader(sources["mapped"])
    own.broken = {1000 + i: f"image {1000 + i} (before.jpg): gone" for i in range(20)}
    with pytest.raises(data.DataError, match="21 of 40 images are broken") as error:
        list(own.batches(0, 10))
    assert str(error.value).count("(before.jpg)") == 20 and str(error.value).endswith("and 1 more")


@KINDS
def test_a_batch_without_one_good_image_stops_the_run(sources, kind):
    with pytest.raises(data.DataError, match=r"none of the 1 images of a batch can be decoded\nimage \d+ \(.*\.jpg\): cannot"):
        list(loader(sources[kind], kind, batch_size=1).batches(0, N))


def test_empty_cells_and_empty_files_are_counted_apart(tmp_path):
    """Three empty files have the same bytes and so the same id."""
    source = write_parquet(tmp_path / "p", WHOLE | {4: b"", 5: b"", 6: b"", 7: None}, shards=1)
    for kind in ("mapped", "stream"):
        own = loader(source, kind)
        assert len(list(own.batches(0, 10))) == 10 and len(own.broken) == 4
        assert sum("no image, 0 bytes" in text for text in own.broken.values()) == 4


def test_control_characters_of_a_file_name_are_escaped(tmp_path):
    write_folder(tmp_path, WHOLE)
    (tmp_path / "train" / "ant" / "003.jpg").rename(tmp_path / "train" / "ant" / "003\x1b[31m\r.jpg")
    (tmp_path / "train" / "ant" / "003\x1b[31m\r.jpg").write_bytes(WHOLE[3][:400])
    own = loader(tmp_path)
    list(own.batches(0, 10))
    ((_, text),) = own.broken.items()
    assert r"003\x1b[31m\r.jpg): cannot be decoded" in text and text.isprintable()


def test_a_file_that_is_not_there_is_not_a_broken_image(tmp_path):
    """A disk or a network that is gone must not shrink the data set."""
    own = loader(write_folder(tmp_path, WHOLE))
    (tmp_path / "train" / "bee" / "025.jpg").unlink()
    with pytest.raises(data.DataError, match=r"image 25 \(.*025.jpg\) cannot be read: FileNotFoundError"):
        list(own.batches(0, 10))
    assert not own.broken


@pytest.mark.parametrize("streaming", [False, True])
@WORKERS
def test_evaluation_never_skips(tmp_path, streaming, workers):
    source = write_parquet(tmp_path / "p", WHOLE | {17: BROKEN[17]}, "validation", shards=2)
    with pytest.raises(data.DataError, match=r"image \d+ \(017.jpg\): cannot be decoded"):
        list(evaluation(source, workers, **STREAM if streaming else {}))


# ---------------------------------------------------------------- kinds of images


def png_of_zeros(width, height):
    """One bit a pixel, well compressed: 100 kB for 900 million pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(1), bytes((width + 7) // 8 + 1)
    pixels = b"".join(packer.compress(row * 500) for _ in range(height // 500)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side, reason", [(9500, "9500x9500 pixels, more than data.MAX_PIXELS"), (30000, "DecompressionBomb")])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, side, reason):
    own = loader(write_folder(tmp_path, WHOLE | {12: png_of_zeros(side, side)}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(own.batches(0, 10))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB; the smaller one unpacks to 90 MB
    assert own.broken.keys() == {12} and reason in own.broken[12]


def test_the_largest_allowed_image_is_read(monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 24 * 20)
    assert data.decode({"bytes": WHOLE[0], "path": None}).size == (24, 20)
    monkeypatch.setattr(data, "MAX_PIXELS", 24 * 20 - 1)
    with pytest.raises(ValueError, match="24x20 pixels, more than"):
        data.decode({"bytes": WHOLE[0], "path": None})


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
    ],
    ids=["rgb", "jpeg", "cmyk", "cmyk-tiff", "l", "la", "rgba", "p", "p-index", "p-alpha", "1", "gif", "webp"],
)
def test_every_mode_becomes_rgb(content, pixel):
    pixels = np.asarray(data.decode({"bytes": content, "path": None}))
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - pixel).max() <= 2


@pytest.mark.parametrize(
    "kind, values", [("PNG", GREY16), ("TIFF", GREY16), ("TIFF", GREY16.astype(">u2")), ("TIFF", np.int32(GREY16))]
)
def test_16_bit_greys_are_scaled_not_clipped(kind, values):
    pixels = np.asarray(data.decode({"bytes": encoded(Image.fromarray(values), kind), "path": None}))
    assert pixels.shape == (4, 5, 3) and pixels[2, :, 1].tolist() == [0, 0, 1, 156, 255]


@pytest.mark.parametrize("value", [-1, 65536])
def test_greys_of_unknown_range_are_refused(value):
    content = encoded(Image.fromarray(np.full((4, 4), value, dtype=np.int32)), "TIFF")
    with pytest.raises(ValueError, match=f"grey values {value}..{value}, expected 16 bits"):
        data.decode({"bytes": content, "path": None})


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(0), exif=exif)


def odd_images():
    """Suffix and content of images of which sources or readers could make different pixels."""
    damaged = rotated(6).replace(b"MM\x00*", b"MM\xff\xff").replace(b"II*\x00", b"II\xff\xff")
    assert damaged != rotated(6)
    images = [("jpg", rotated(i)) for i in range(1, 9)] + [("jpg", damaged)]
    images += [("png", encoded(Image.fromarray(np.tile(GREY16, (4, 4))), "PNG")), ("png", with_palette(0))]
    return images + [("jpg", encoded(Image.new("CMYK", (30, 30), (0, 128, 255, 0)))), ("jpg", WHOLE[0])]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_nothing(orientation):
    assert Image.open(io.BytesIO(rotated(orientation))).getexif()[0x0112] == orientation
    assert data.decode({"bytes": rotated(orientation), "path": None}).tobytes() == Image.open(io.BytesIO(WHOLE[0])).tobytes()


def test_folder_parquet_and_tar_agree_on_every_image(tmp_path):
    images = odd_images()
    for suffix in ("jpg", "png"):  # a tar file's column is called by its suffix
        own = {i: content for i, (s, content) in enumerate(images) if s == suffix} | {N - 1: images[-1][1]}
        folder = write_folder(tmp_path / f"folder {suffix}", own, "validation", name="{:03d}." + suffix)
        parquet = write_parquet(tmp_path / f"parquet {suffix}", own, "validation", shards=1)
        tar = write_tar(tmp_path / f"tar {suffix}", {i: (suffix, content) for i, content in own.items()}, "validation")
        inside = dict(data__image=suffix, data__label="cls")
        seen = [
            list(evaluation(folder)),
            list(evaluation(parquet)),
            list(evaluation(parquet, **STREAM)),
            list(evaluation(tar, **STREAM, **inside)),
        ]
        first = torch.cat([images for images, _, _ in seen[0]])
        assert len(first) == len(own)
        for other in seen[1:]:
            assert torch.equal(torch.cat([images for images, _, _ in other]), first)
        if suffix == "jpg":
            assert all(torch.equal(image, first[-1]) for image in first[:9])  # orientations 1 to 8, damaged EXIF


# ---------------------------------------------------------------- labels and classes


@KINDS
@pytest.mark.parametrize("bad", [-1, -100, 2, None])
def test_a_wrong_label_is_never_skipped(tmp_path, kind, bad):
    labels = {i: int(i >= N // 2) for i in range(N)} | {6: bad}
    source = write_parquet(tmp_path / "p", WHOLE, names=None, labels=labels)
    own = loader(source, kind, data__max_broken=1.0)
    with pytest.raises(data.DataError, match=rf"image \d+ \(006.jpg\): label {bad} is not in 0..1"):
        list(own.batches(0, 10))
    assert not own.broken


def test_labels_that_are_texts_are_refused():
    row = {"image": {"bytes": WHOLE[0], "path": "a.jpg"}, "label": "ant"}
    with pytest.raises(data.DataError, match=r"image 5 \(a.jpg\): label 'ant' is not in 0..1"):
        data._decoded(row, 5, make_recipe(**COLUMNS).data, None)


def test_a_label_without_a_name_is_refused():
    """Of ImageNet's 1,000 a source may name three; a fourth label then has no place among them."""
    row = {"image": {"bytes": WHOLE[0], "path": "a.jpg"}, "label": 3}
    with pytest.raises(data.DataError, match=r"label 3 is not in 0..2"):
        data._decoded(row, 5, make_recipe(**COLUMNS | {"data__classes": 1000}).data, [999, 3, 500])


def class_folders(root, **splits):
    for split, names in splits.items():
        for i, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for k in range(2):
                (root / split / name / f"{k}.jpg").write_bytes(WHOLE[2 * i + k])
    return root


@pytest.mark.parametrize(
    "train, val, said",
    [
        (["ant", "bee", "cat"], ["ant", "cat"], "train and validation have other classes: only in train: 'bee'$"),
        (["ant", "cat"], ["ant", "bee", "cat"], "train and validation have other classes: only in validation: 'bee'$"),
        (["ant", "bee"], ["ant", "cat"], "only in train: 'bee'; only in validation: 'cat'$"),
        (["ant", "bee", "cat"], ["Ant", "bee", "cat"], "4 classes found, the recipe's data.classes is 3"),
    ],
    ids=["val-empty", "train-empty", "other-names", "more"],
)
def test_class_folders_that_differ_are_refused_before_training(tmp_path, train, val, said):
    class_folders(tmp_path, train=train, val=val)
    (tmp_path / "val" / "bee").mkdir(exist_ok=True)  # an empty folder is no class
    with pytest.raises(data.DataError, match=said):
        loader(tmp_path, data__classes=3)


@KINDS
@pytest.mark.parametrize(
    "other, said",
    [(("bee", "ant"), "class 0 is 'ant' in train, 'bee' in validation"), (("ant", "cat"), "only in train: 'bee'; only in val")],
)
def test_parquet_files_that_name_other_classes_are_refused(tmp_path, kind, other, said):
    """`datasets` takes the names of one split for all, and the labels of the others as they are."""
    write_parquet(write_parquet(tmp_path / "p", WHOLE), WHOLE, "validation", names=other)
    with pytest.raises(data.DataError, match=said):
        loader(tmp_path / "p", kind)


@KINDS
def test_the_same_classes_are_accepted(tmp_path, kind):
    write_parquet(write_parquet(tmp_path / "p", WHOLE), {0: WHOLE[0]}, "validation", shards=1)  # its images are all ants
    assert loader(tmp_path / "p", kind).split.names == ["ant", "bee"]


@pytest.mark.parametrize(
    "names, expected",
    [
        ([str(i) for i in range(11)], [str(i) for i in range(11)]),  # 0 to K - 1 mean themselves
        (["0", "1", "2", "10"], ["0", "1", "10", "2"]),  # other numbers are names like any other
        (["1", "01"], ["01", "1"]),  # not one class
    ],
)
def test_numeric_class_folders_mean_the_same_in_both_splits(tmp_path, names, expected):
    class_folders(tmp_path, train=names, val=reversed(names))
    own = loader(tmp_path, data__classes=len(names))
    assert own.split.names == expected
    for split in ("train", "validation"):
        opened = data.open_split(own.data, split)
        for row in opened.rows:
            assert expected[opened.ids[row["label"]]] == row["image"]["path"].split("/")[-2]


# ---------------------------------------------------------------- too few images, shards, workers


def test_fewer_images_than_processes_and_workers(tmp_path):
    """3 images, 2 processes of 4 workers: equal steps, or an error with the numbers; evaluation sees each image once."""
    write_folder(tmp_path, {0: WHOLE[0], 1: WHOLE[1], 20: WHOLE[20]})
    write_folder(tmp_path, {0: WHOLE[0], 1: WHOLE[1], 20: WHOLE[20]}, "validation")
    for rank in range(2):
        own = loader(tmp_path, batch_size=2, rank=rank, world=2, workers=4)
        assert [len(labels) for _, labels, _ in own.batches(0, 2)] == [1, 1]
    for changes in (dict(batch_size=4), dict(batch_size=8, data__drop_last=False, world=8)):
        with pytest.raises(data.DataError, match=f"train: 3 images do not fill one step of {changes['batch_size']}"):
            loader(tmp_path, **changes)
    section, seen = make_recipe(data__source=str(tmp_path), **COLUMNS).data, []
    for rank in range(4):
        for _, _, index in data.test_loader(section, batch_size=2, rank=rank, world=4, workers=2):
            seen += index.tolist()
    assert sorted(seen) == [0, 1, 2]


def test_empty_shards(tmp_path, monkeypatch):
    """One does no harm; all of them are an error, where the numbers of images are known and where they are not."""
    source = write_parquet(tmp_path / "p", WHOLE)
    write_parquet(tmp_path / "e", {}, shards=5)
    shutil.copy(tmp_path / "e" / "train-00002-of-00005.parquet", source)
    own = loader(source, "stream", batch_size=4, data__train_size=32)
    assert len({i for _, _, index in own.batches(0, 8) for i in index.tolist()}) == 32
    with pytest.raises(data.DataError, match="0 images found, the recipe"):
        loader(tmp_path / "e", "stream")
    monkeypatch.setattr(data, "_shard_lengths", lambda split: None)
    with pytest.raises(data.DataError, match="the shards of reader 0 of process 0 are empty"):
        list(loader(tmp_path / "e", "stream").batches(0, 1))
    with pytest.raises(data.DataError, match="5 shards cannot feed 6 readers: fewer processes or --workers"):
        loader(source, "stream", batch_size=8, world=2, workers=3)


@KINDS
def test_a_worker_that_dies_is_an_error_with_advice(sources, kind, monkeypatch):
    own, decode, shared = loader(sources[kind], kind, workers=2), data.decode, set(os.listdir("/dev/shm"))

    def fatal(image):
        if torch.utils.data.get_worker_info().id == 1 and image["bytes"] != WHOLE[0]:
            os._exit(1)
        return decode(image)

    monkeypatch.setattr(data, "decode", fatal)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds it waits for dead workers
    with pytest.raises(data.DataError, match=r"a worker process that loads images died: DataLoader worker.*--workers 0"):
        list(own.batches(0, 10))
    assert set(os.listdir("/dev/shm")) <= shared


def test_other_errors_are_not_blamed_on_workers():
    assert data.dead_worker(RuntimeError("CUDA error: an illegal memory access was encountered")) is None
