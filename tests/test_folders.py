"""folders.py: class folders as people have them, listed without a cache."""

import shutil

import pytest
from conftest import make_recipe, photos

import folders
import sources


def section(source, **changes):
    changes = dict(data__train_split=None, data__test_split=None, data__classes=None) | changes
    return make_recipe(data__source=str(source), **changes).data


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "testing"])
def test_splits_and_classes_come_from_the_folders(name, tmp_path):
    source = photos(tmp_path / "p", ["cat", "dog"])
    (source / "val").rename(source / name)
    (source / "train").rename(source / "Training")
    found = sources.resolved(section(source))
    assert (found.train_split, found.classes) == ("train", 2)
    assert found.test_split == ("test" if name.startswith("test") else "validation")
    split = sources.open_split(found, found.test_split)
    assert split.names == ["cat", "dog"] and split.rows["label"] == [0] * 6 + [1] * 6
    assert split.rows[7]["image"]["path"] == str(source / name / "dog" / "1.png")


def test_what_a_recipe_says_is_not_looked_up():
    data = make_recipe(data__source="/no/where").data
    assert sources.resolved(data) is data


def test_images_may_lie_deeper_than_their_class(tmp_path):
    """Tiny-ImageNet's train/CLASS/images/."""
    source = photos(tmp_path / "p", ["cat", "dog"])
    for place in [*source.glob("*/cat"), *source.glob("*/dog")]:
        images = place.with_name("images")
        place.rename(images)
        place.mkdir()
        images.rename(place / "images")
    found = sources.resolved(section(source))
    sources.check_classes(found, sources.open_split(found, "train"))
    assert sources.open_split(found, "train").names == ["cat", "dog"]


def test_without_a_test_split_a_tenth_of_each_class_is_held_out(tmp_path):
    source = photos(tmp_path / "p", ["cat", "dog"], 30) / "train"
    found = sources.resolved(section(source))
    assert found.test_split == sources.HELD_OUT and found.classes == 2
    train, held = (sources.open_split(found, name) for name in ("train", sources.HELD_OUT))
    paths = [[row["image"]["path"] for row in split.rows] for split in (train, held)]
    assert len(paths[0]) == 54 and not set(paths[0]) & set(paths[1])
    assert sorted(held.rows["label"]) == [0] * 3 + [1] * 3
    again = sources.open_split(found, sources.HELD_OUT)
    assert [row["image"]["path"] for row in again.rows] == paths[1]
    kind = dict(data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=8)
    streamed = make_recipe(data__test_split=sources.HELD_OUT, **kind).data
    with pytest.raises(sources.DataError, match="held out of a memory-mapped training split only"):
        sources.open_split(streamed, sources.HELD_OUT)


def test_a_flat_validation_folder_is_told(tmp_path):
    source = photos(tmp_path / "p", ["cat", "dog"])
    flat = source / "val" / "images"
    flat.mkdir()
    for i, image in enumerate(sorted((source / "val").glob("*/*.png"))):
        image.rename(flat / f"{i}.png")
    (source / "val" / "val_annotations.txt").write_text("0.png cat")
    (source / "labels.csv").write_text("0.png,cat")
    with pytest.raises(sources.DataError, match=r"val: its images .* folders, as images/0.png: .*val/CLASS/"):
        sources.resolved(section(source))
    (source / "val").rename(source / "test")
    folders.open_splits.cache_clear()  # it lists a folder once in a process
    with pytest.raises(sources.DataError, match=r"test: its images do not lie in class folders"):
        sources.resolved(section(source))
    shutil.copytree(source / "train", source / "val")
    folders.open_splits.cache_clear()
    assert sources.resolved(section(source)).test_split == "validation"  # the labels of test/ are not needed


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("train/emu/", "train/emu: no images in this class folder .1 of 3 have none; HEIC"),
        ("train/emu/1.HEIC", "train/emu: no images in this class folder"),
        ("loose.jpg", "p: its images do not lie in class folders, as loose.jpg"),
        ("train/loose.jpg", "train: its images do not lie in class folders, as loose.jpg"),
    ],
)
def test_what_is_no_class_folder_is_told(wrong, said, tmp_path):
    path = photos(tmp_path / "p", ["cat", "dog"], 1) / wrong
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if wrong.endswith("/") else path.touch()
    with pytest.raises(sources.DataError, match=said):
        sources.resolved(section(tmp_path / "p"))


def test_too_few_classes_or_images_are_told(tmp_path):
    """One folder too high, an archive, a class with one image."""
    source = photos(tmp_path / "p", ["cat", "dog"], 2)
    with pytest.raises(sources.DataError, match=f"one class found, 'p', .*give --data {source}$"):
        sources.resolved(section(tmp_path))
    (source / "train" / "cat" / "0.png").unlink()
    found = sources.resolved(section(source / "train"))
    with pytest.raises(sources.DataError, match="class 'cat' has one image: no test image can be held out"):
        sources.open_split(found, "train")
    (tmp_path / "p.zip").touch()
    with pytest.raises(sources.DataError, match="not 'digits'; an archive must be unpacked"):
        sources.resolved(section(tmp_path / "p.zip"))


def test_other_folders_are_left_to_datasets(tmp_path):
    (tmp_path / "empty").mkdir()
    tables = photos(tmp_path / "tables", ["cat"])
    (tables / "train" / "metadata.csv").write_text("file_name,label")
    for folder in (tmp_path / "empty", tables):
        assert folders.open_splits(folder) is None


def test_hidden_files_and_other_files_are_no_images(tmp_path):
    source = photos(tmp_path / "p", ["cat", "dog"])
    (source / "train" / "cat" / ".DS_Store").write_text("x")
    (source / "train" / "cat" / "notes.txt").write_text("x")
    (source / "train" / ".cache").mkdir()
    rows, files, classes = (part["train"] for part in folders.open_splits(source))
    assert len(rows) == len(files) == 12 and classes == ["cat", "dog"]


def test_a_source_with_a_test_split_alone_is_not_tested_on_what_it_trains_on(tmp_path):
    source = photos(tmp_path / "p", ["cat", "dog"], 30)
    shutil.rmtree(source / "train")
    (source / "val").rename(source / "test")
    found = sources.resolved(section(source))
    assert (found.train_split, found.test_split) == ("test", sources.HELD_OUT)
    shutil.copytree(source / "test", source / "val")
    folders.open_splits.cache_clear()  # it lists a folder once in a process
    with pytest.raises(sources.DataError, match="no split 'train'"):
        sources.resolved(section(source, data__classes=2))


def test_two_folders_of_one_split_are_told(tmp_path):
    source = photos(tmp_path / "p", ["cat", "dog"])
    shutil.copytree(source / "val", source / "valid")
    with pytest.raises(sources.DataError, match=r"val/ and .*valid/ are both the split validation"):
        sources.resolved(section(source))
