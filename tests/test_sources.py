"""sources.py: splits, classes, shares, and what a row may open. Real parquet, tar and JPEG files."""

import io
import os
import tarfile

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_recipe
from PIL import Image
from timm.data import ImageNetInfo

import class_names
import sources

WNIDS = ImageNetInfo().label_names()
N = 40  # images of the small data sets below, half of them ants, half bees
COLUMNS = dict(
    data__test_split="validation",
    data__classes=2,
    data__size=16,
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
    """Class folders: the first half are ants, the second half bees, so that an image's index is its
    number.
    """
    for i, content in files.items():
        path = root / split / ("ant" if i < N // 2 else "bee") / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_parquet(root, files, split="train", names=("ant", "bee"), shards=5, labels=None):
    """Content None: an empty cell; content str: a cell without bytes, with this path."""
    root.mkdir(exist_ok=True)
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
    numbers = sorted(files)
    for shard in range(shards):
        part = numbers[shard * len(numbers) // shards : (shard + 1) * len(numbers) // shards]
        images = []
        for i in part:
            cell = {"bytes": files[i], "path": f"{i:03d}.jpg"}
            if isinstance(files[i], str):
                cell = {"bytes": None, "path": files[i]}
            images.append(None if files[i] is None else cell)
        columns = {"image": images, "label": [labels[i] if labels else int(i >= N // 2) for i in part]}
        table = datasets.Dataset.from_dict(columns, features=features)
        # not to_parquet, which opens the paths; an empty table gets no row group, as from `datasets`
        path = root / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        with pq.ParquetWriter(path, table.data.table.schema) as writer:
            if part:
                writer.write_table(table.data.table)
    return root


def write_tar(root, samples, split="train", shards=1):
    """samples: [(name, class id, suffix, bytes of the image)]"""
    root.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as tar:
            for name, label, suffix, image in samples[shard::shards]:
                for member, content in ((f"{name}.cls", str(label).encode()), (f"{name}.{suffix}", image)):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return root


def class_folders(root, **splits):
    """Two images in each class folder; train=["ant", "bee"]."""
    for split, names in splits.items():
        for i, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for k in range(2):
                (root / split / name / f"{k}.jpg").write_bytes(WHOLE[(2 * i + k) % N])
    return root


def section(source="digits", **changes):
    return make_recipe(batch_size=4, batch_size_per_process=4, data__source=str(source), **changes).data


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__source="digit"), "digit: not a folder, not a data set's name on the hub"),
        (dict(data__source="/no/where"), "/no/where: not a folder"),
        (
            dict(data__train_split="training"),
            r"digits: no split 'training', did you mean 'train'\? \(splits: train, test\)",
        ),
        (dict(data__image="img"), r"digits: no column 'img'.*\(columns: image, label\)"),
        (dict(data__label="labels"), r"digits: no column 'labels', did you mean 'label'"),
        (dict(data__classes=100), "digits: 10 classes found, the recipe's data.classes is 100"),
    ],
    ids=range(6),
)
def test_what_is_not_there_is_told_with_what_is(changes, message):
    wanted = make_recipe(**changes).data
    with pytest.raises(sources.DataError, match=message):
        sources.open_split(wanted, wanted.train_split)


def test_the_digits_are_scikit_learns_halves():
    split = sources.open_split(section(), "test")
    assert (len(split.rows), split.files, split.beside) == (899, [], {}) and split.names == list("0123456789")
    stream = sources.open_split(
        section(data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=9),
        "train",
    )
    assert stream.rows.num_shards == 8 and sum(sources.shard_lengths(stream)) == 898


def test_lengths_of_shards_come_from_footers_and_headers(tmp_path):
    write_parquet(tmp_path / "p", WHOLE, shards=3)
    split = sources.open_split(section(tmp_path / "p", **COLUMNS | STREAM), "train")
    assert sources.shard_lengths(split) == [13, 13, 14]
    write_tar(tmp_path / "t", [(f"a.b/{i}", 0, "jpg", WHOLE[i]) for i in range(7)], shards=2)
    columns = dict(data__image="jpg", data__label="cls")
    split = sources.open_split(section(tmp_path / "t", **COLUMNS | STREAM | columns), "train")
    assert sources.shard_lengths(split) == [4, 3]


def test_what_a_source_offers_for_evaluation(tmp_path):
    write_folder(write_folder(tmp_path / "photos", WHOLE), WHOLE, "val")
    named = {"test_split": "validation", "image": "image", "label": "label", "classes": 2, "streaming": False}
    assert sources.evaluation_fields(tmp_path / "photos") == named
    write_parquet(tmp_path / "p", WHOLE, "all")
    assert sources.evaluation_fields(tmp_path / "p") == named | {"test_split": "train", "streaming": True}
    write_tar(tmp_path / "t", [("1", 0, "jpg", WHOLE[0])], "test")
    found = {"test_split": "test", "image": "jpg", "label": "cls", "classes": None, "streaming": True}
    assert sources.evaluation_fields(tmp_path / "t") == found
    write_parquet(
        write_parquet(tmp_path / "q", WHOLE, shards=1), {0: WHOLE[0]}, "validation", names=None, shards=1
    )
    with pytest.raises(
        sources.DataError, match=r"no split called validation or test \(splits: train, extra\)"
    ):
        for file in (tmp_path / "q").glob("validation*"):
            file.rename(str(file).replace("validation-", "extra-"))
        (tmp_path / "q" / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train*\n"
            "  - split: extra\n    path: extra*\n---\n"
        )
        sources.evaluation_fields(tmp_path / "q")


# ---------------------------------------------------------------- labels and classes


@pytest.mark.parametrize("label", [-1, 2, None, "ant", 1.0])
def test_a_wrong_label_is_refused(label):
    row = {"image": {"bytes": WHOLE[0], "path": "a.jpg"}, "label": label}
    split = sources.Split(None, None, None, [], {}, {}, frozenset())
    with pytest.raises(sources.DataError, match=rf"^image 5 \(a.jpg\): label {label!r} is not in 0..1$"):
        sources.encoded(row, 5, section(**COLUMNS), split)


def test_a_label_without_a_name_is_refused():
    """Of ImageNet's 1,000 a source may name three; a fourth label then has no place among them."""
    row = {"image": {"bytes": WHOLE[0], "path": "a.jpg"}, "label": 2}
    split = sources.Split(None, [999, 3, 500], None, [], {}, {}, frozenset())
    settings = section(**COLUMNS | {"data__classes": 1000})
    assert sources.encoded(row, 5, settings, split).label == 500
    with pytest.raises(sources.DataError, match=r"label 3 is not in 0..2"):
        sources.encoded(row | {"label": 3}, 5, settings, split)


def test_class_ids():
    class_ids, in_order = class_names.class_ids, list(range(1000))
    assert class_ids(WNIDS, 1000) == in_order
    assert class_ids([WNIDS[7], WNIDS[3]], 1000) == [7, 3]
    by_text = sorted(in_order, key=str)
    assert class_ids([str(i) for i in by_text], 1000) == by_text
    assert class_ids(["ant", "bee"], 2) == [0, 1]
    assert class_ids(["10", "9"], 2) == [0, 1]  # names that happen to be numbers, but not 0 to K - 1
    assert class_ids(["9" * 5000, "9"], 2) == [0, 1]
    described = ImageNetInfo().label_descriptions()
    assert class_ids(described, 1000) == in_order
    assert class_ids(["Tinca tinca", *described[1:]], 1000) == in_order  # a list with other words
    assert class_ids([f"thing {i}" for i in in_order], 1000) == in_order
    swapped = [described[1], described[0], *described[2:]]
    with pytest.raises(
        sources.DataError, match="class 0 is 'goldfish', ImageNet's is 'tench': not the order"
    ):
        class_ids(swapped, 1000)
    with pytest.raises(sources.DataError, match="not among ImageNet's 1,000 classes: 'n00000000'"):
        class_ids([WNIDS[0], "n00000000"], 1000)
    with pytest.raises(sources.DataError, match=r"2 classes found, the recipe's data\.classes is 3"):
        class_ids(["0", "1"], 3)


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
    settings = section(tmp_path, **COLUMNS | {"data__classes": len(names)})
    for name in ("train", "validation"):
        split = sources.open_split(settings, name)
        assert split.names == expected and sources.is_image_folder(split.files)
        for row in split.rows:
            assert expected[split.ids[row["label"]]] == row["image"]["path"].split("/")[-2]


def test_an_empty_class_in_one_split_does_not_shift_the_labels(tmp_path):
    class_folders(tmp_path, train=["ant", "bee", "cat"], val=["ant", "cat"])
    split = sources.open_split(section(tmp_path, **COLUMNS | {"data__classes": 3}), "validation")
    assert split.names == ["ant", "bee", "cat"] and sorted(set(split.rows["label"])) == [0, 2]


def check(source, **changes):
    settings = section(source, **COLUMNS | changes)
    sources.check_classes(settings, sources.open_split(settings, "train"))


@pytest.mark.parametrize(
    "train, val, said",
    [
        (
            ["ant", "bee", "cat"],
            ["ant", "cat"],
            "train and validation have other classes: only in train: 'bee'$",
        ),
        (
            ["ant", "cat"],
            ["ant", "bee", "cat"],
            "train and validation have other classes: only in validation: 'bee'$",
        ),
        (["ant", "bee"], ["ant", "cat"], "only in train: 'bee'; only in validation: 'cat'$"),
        (["ant", "bee", "cat"], ["Ant", "bee", "cat"], "4 classes found, the recipe's data.classes is 3"),
    ],
    ids=["val-empty", "train-empty", "other-names", "more"],
)
def test_class_folders_that_differ_are_refused(tmp_path, train, val, said):
    class_folders(tmp_path, train=train, val=val)
    with pytest.raises(sources.DataError, match=said):
        check(tmp_path, data__classes=3)


@pytest.mark.parametrize("kind", [{}, STREAM], ids=["mapped", "stream"])
def test_parquet_files_that_name_other_classes_are_refused(tmp_path, kind):
    """`datasets` takes the names of one split for all, and the labels of the others as they are."""
    write_parquet(tmp_path / "p", WHOLE)
    write_parquet(tmp_path / "p", {0: WHOLE[0]}, "validation", shards=1)  # its images are all ants
    check(tmp_path / "p", **kind)
    write_parquet(tmp_path / "q", WHOLE)
    write_parquet(tmp_path / "q", WHOLE, "validation", names=("bee", "ant"))
    with pytest.raises(sources.DataError, match="class 0 is 'ant' in train, 'bee' in validation"):
        check(tmp_path / "q", **kind)
    write_parquet(tmp_path / "r", WHOLE)
    write_parquet(tmp_path / "r", WHOLE, "validation", names=("ant", "cat"))
    with pytest.raises(sources.DataError, match="only in train: 'bee'; only in validation: 'cat'"):
        check(tmp_path / "r", **kind)


# ---------------------------------------------------------------- a share of each class


def test_a_share_is_balanced_nested_and_of_any_order_of_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
    shares = {f: sources.share_of_each_class(labels, f).tolist() for f in (0.004, 0.1, 0.25, 0.5, 1.0)}
    counts = {f: np.bincount(labels[share], minlength=10).tolist() for f, share in shares.items()}
    assert counts == {0.004: [1] * 10, 0.1: [5] * 10, 0.25: [12] * 10, 0.5: [25] * 10, 1.0: [50] * 10}
    for smaller, larger in zip(list(shares)[:-1], list(shares)[1:], strict=True):
        assert set(shares[smaller]) < set(shares[larger]) and shares[smaller] == sorted(shares[smaller])
    uneven = np.repeat([7, 2], [40, 4])  # classes of different sizes keep their shares
    assert np.bincount(uneven[sources.share_of_each_class(uneven, 0.5)]).tolist() == [0, 0, 2, 0, 0, 0, 0, 20]


# ---------------------------------------------------------------- which files a row may open


def rows_of(source, settings=COLUMNS, split="train"):
    """The images of a split, read."""
    data = section(source, **settings)
    split = sources.open_split(data, split)
    return [sources.encoded(row, i, data, split) for i, row in enumerate(split.rows)]


def test_images_of_folders_are_read(tmp_path, monkeypatch):
    """By absolute and relative path, memory-mapped and streamed; also from a zip archive, with a table of
    labels.
    """
    write_folder(tmp_path / "photos", WHOLE)
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "photos", tmp_path / "photos" / ".." / "photos"):
        for kind in ({}, STREAM):
            images = rows_of(source, COLUMNS | kind)
            assert [image.content for image in images] == list(WHOLE.values())
            assert [image.label for image in images] == [0] * (N // 2) + [1] * (N // 2)


def test_images_in_a_listed_archive_are_read(tmp_path):
    import zipfile

    (tmp_path / "zips").mkdir()
    with zipfile.ZipFile(tmp_path / "zips" / "train.zip", "w") as archive:
        archive.writestr("a.jpg", WHOLE[0])
        archive.writestr("b.jpg", WHOLE[1])
        archive.writestr(
            "metadata.jsonl", '{"file_name": "a.jpg", "label": 0}\n{"file_name": "b.jpg", "label": 1}\n'
        )
    assert [image.content for image in rows_of(tmp_path / "zips")] == [WHOLE[0], WHOLE[1]]


def test_downloaded_images_of_the_hub_are_read(tmp_path, monkeypatch):
    """`datasets` names the files of a memory-mapped image folder on the hub by where it has put them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    path = tmp_path / "datasets--owner--pets" / "snapshots" / "0a1b" / "train" / "ant" / "1.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(WHOLE[0])
    files = ["hf://datasets/owner/pets@0a1b/train/ant/1.jpg"]
    split = sources.Split(None, None, None, files, {}, {}, sources._openable(files))
    row = {"image": {"bytes": None, "path": str(path)}, "label": 0}
    assert sources.encoded(row, 0, section(**COLUMNS), split).content == WHOLE[0]
    row["image"]["path"] = str(path.with_name("2.jpg"))
    with pytest.raises(sources.DataError, match="not one of the files"):
        sources.encoded(row, 0, section(**COLUMNS), split)


@pytest.mark.parametrize(
    "path",
    ["{0}/secret.jpg", "file://{0}/secret.jpg", "simplecache::file://{0}/secret.jpg",
        "http://127.0.0.1:9/x.jpg",
     "zip://secret.jpg::{0}/secret.zip", "/dev/zero", "{0}/p/train-00000-of-00005.parquet", "secret.jpg"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [{}, STREAM], ids=["mapped", "stream"])
def test_a_table_cannot_make_the_trainer_open_files_and_addresses(tmp_path, monkeypatch, kind, path):
    (tmp_path / "secret.jpg").write_bytes(WHOLE[5])
    monkeypatch.chdir(tmp_path)
    path = path.format(tmp_path)
    write_parquet(tmp_path / "p", WHOLE | {6: path})
    opened = []
    monkeypatch.setattr(sources.fsspec, "open", lambda *a, **k: opened.append(a))
    monkeypatch.setattr(sources, "open", lambda *a: opened.append(a), raising=False)
    with pytest.raises(sources.DataError, match="a table must contain the bytes of its images") as error:
        rows_of(tmp_path / "p", COLUMNS | kind)
    assert type(error.value) is sources.DataError  # no broken image, without which training would go on
    assert str(error.value).startswith(f"image 6 ({path}): ") and not opened


def test_a_folder_cannot_name_files_outside_of_it(tmp_path):
    """Where `datasets` lets it: its releases since 5.2 refuse the path themselves."""
    (tmp_path / "secret.jpg").write_bytes(WHOLE[5])
    (tmp_path / "photos" / "train").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / "train" / name).write_bytes(WHOLE[0])
    row = '{"file_name": "%s", "label": 0}\n'
    (tmp_path / "photos" / "train" / "metadata.jsonl").write_text(row % "a.jpg" + row % "../../secret.jpg")
    with pytest.raises(ValueError):
        rows_of(tmp_path / "photos")


def test_a_file_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos", WHOLE)
    monkeypatch.setattr(sources, "MAX_BYTES", 100_000)
    os.unlink(tmp_path / "photos" / "train" / "ant" / "004.jpg")
    os.symlink("/dev/zero", tmp_path / "photos" / "train" / "ant" / "004.jpg")
    data = section(tmp_path / "photos", **COLUMNS)
    path = str(tmp_path / "photos" / "train" / "ant" / "004.jpg")
    split = sources.Split(None, None, None, [path], {}, {}, frozenset([path]))
    row = {"image": {"bytes": None, "path": path}, "label": 0}
    with pytest.raises(sources.DataError, match=r"image 4 \(.*004.jpg\) has more than 100,000 bytes"):
        sources.encoded(row, 4, data, split)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    write_folder(tmp_path, WHOLE)
    rows_of(tmp_path)
    data = section(tmp_path, **COLUMNS)
    split = sources.open_split(data, "train")
    (tmp_path / "train" / "bee" / "025.jpg").unlink()
    with pytest.raises(sources.DataError, match=r"image 25 \(.*025.jpg\) cannot be read: FileNotFoundError"):
        sources.encoded(split.rows[25], 25, data, split)


def test_control_characters_of_a_file_name_are_escaped(tmp_path):
    write_folder(tmp_path, {0: WHOLE[0], 20: WHOLE[20]})
    folder = tmp_path / "train" / "ant"
    (folder / "000.jpg").rename(folder / "000\x1b[31m\r.jpg")
    name = rows_of(tmp_path)[0].name
    assert r"000\x1b[31m\r.jpg)" in name and name.isprintable()


def test_a_line_break_in_a_file_name_loses_no_image(tmp_path):
    """`datasets` would leave the image out without a word."""
    class_folders(tmp_path, train=["ant", "bee"], validation=["ant", "bee"])
    (tmp_path / "train" / "bee" / "1.jpg").rename(tmp_path / "train" / "bee" / "1\n2.jpg")
    assert len(sources.open_split(section(tmp_path, **COLUMNS), "train").rows) == 4


def test_a_folders_own_script_is_not_run(tmp_path):
    write_parquet(tmp_path / "p", WHOLE)
    (tmp_path / "p" / "p.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(sources.DataError, match="cannot be loaded as images: Dataset scripts are no longer"):
        sources.open_split(section(tmp_path / "p", **COLUMNS), "train")
    assert not (tmp_path / "ran").exists()
