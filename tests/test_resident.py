"""The resident set against the loader of single images; the teacher's memo against a teacher that is asked every time."""

import itertools
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, STUDENT, distilled, make_recipe, needs_cifar, write
from scipy import stats
from test_data_faults import BROKEN, WHOLE, N, encoded, write_parquet
from test_distributed import distance, launched, on_cpu, student, tensors
from test_train import assert_same_run, forked, run
from torchvision import transforms

import data
import losses
import models
import recipe
import train

RESIDENT = dict(data__resident=True, data__hflip=0.5)


def section(**changes):
    return make_recipe(**RESIDENT | changes).data


def loader(data_section, seed=3, batch_size=64, world=1, **more):
    sizes = dict(batch_size=batch_size, world=world) | {"batch_size_per_process": batch_size // world} | more
    return data.TrainLoader(data_section, seed=seed, **sizes)


# ---------------------------------------------------------------- pixels, distribution, order


def one_by_one(index, view, data_section, monkeypatch):
    """The crops that the transform of single images makes, with its draws set to `view`."""
    side, rows, made = 2 * data_section.crop.padding + 1, data.open_split(data_section, data_section.train_split).rows, []
    for i, v in zip(index.tolist(), view.tolist(), strict=True):
        y, x = divmod(v // 2, side)
        drawn = staticmethod(lambda *_, y=y, x=x: (y, x, data_section.size, data_section.size))
        monkeypatch.setattr(transforms.RandomCrop, "get_params", drawn)
        monkeypatch.setattr(torch, "rand", lambda *_, v=v: torch.tensor(0.0 if v % 2 else 1.0))
        made.append(torch.as_tensor(data.train_transform(data_section)(data.decode(rows[i][data_section.image]))))
    monkeypatch.undo()
    return torch.stack(made)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_with_equal_draws_the_pixels_are_those_of_single_images(padding, monkeypatch):
    made = section(data__crop={"kind": "pad", "padding": padding})
    own = data.resident(made, "train", torch.device("cpu"))
    assert own.views == 2 * (2 * padding + 1) ** 2
    view, index = torch.arange(own.views), torch.arange(own.views) * 7
    crops = own.crops(index, view)
    assert torch.equal(crops, one_by_one(index, view, made, monkeypatch)) and crops.dtype == torch.uint8
    whole = own.crops(index, torch.full_like(view, own.whole))
    assert torch.equal(whole, own.images[index, :, padding : padding + 8, padding : padding + 8])


def test_a_fraction_is_resident_alone():
    cut, single = (loader(make_recipe(data__fraction=0.25, data__resident=on).data) for on in (True, False))
    assert len(cut.resident.images) == cut.size == single.size < loader(section()).size
    assert torch.equal(cut.resident.labels, single.labels())
    assert len(data.resident(cut.data, "test", torch.device("cpu")).images) == 899  # not cut


def drawn_views(data_section, epochs, **more):
    """{(epoch, image id): view} of an epoch's batches; without repeats an image comes once."""
    made = loader(data_section, **more)
    views = {}
    for step in range(epochs * made.steps_per_epoch):
        for *_, index, crops in made.batches(step, step + 1):  # each step by itself: nothing comes from before
            assert torch.equal(index, crops[0])
            views |= {(step // made.steps_per_epoch, i): v for i, v in zip(*crops.tolist(), strict=True)}
    return views


def test_crops_and_flips_have_the_distribution_of_torchvision():
    own = np.array(list(drawn_views(section(data__hflip=0.3), epochs=12).values()))
    image, crop, flip = transforms.ToPILImage()(torch.zeros(3, 10, 10)), transforms.RandomCrop(8), torch.rand
    torch.manual_seed(0)
    theirs = np.array(
        [2 * (3 * y + x) + int(flip(1) < 0.3) for y, x, *_ in (crop.get_params(image, (8, 8)) for _ in range(len(own)))]
    )
    counts = [np.bincount(views, minlength=18) for views in (own, theirs)]
    assert stats.chi2_contingency(counts).pvalue > 0.01
    expected = len(own) / 9 * np.tile([0.7, 0.3], 9)
    assert stats.chisquare(counts[0], expected).pvalue > 0.01 and stats.chisquare(counts[1], expected).pvalue > 0.01


def test_views_of_an_image_are_independent_between_epochs_and_repeats():
    epochs = drawn_views(section(), epochs=2)
    pairs = [(epochs[0, i], epochs[1, i]) for e, i in epochs if e == 0 and (1, i) in epochs]
    repeated = [*loader(section(data__repeats=2)).batches(0, 14)]
    views = torch.cat([crops[1].view(-1, 2) for *_, crops in repeated])
    assert all((crops[0].view(-1, 2)[:, 0] == crops[0].view(-1, 2)[:, 1]).all() for *_, crops in repeated)
    for table in (pairs, views.tolist()):
        positions = np.array(table) // 2  # 9 of them
        counts = np.zeros((9, 9))
        np.add.at(counts, tuple(positions.T), 1)
        assert stats.chi2_contingency(counts).pvalue > 0.01


def test_a_view_depends_on_seed_epoch_and_image_alone():
    expected = drawn_views(section(), epochs=2)
    assert len(expected) == 2 * 898
    assert drawn_views(section(), epochs=2, batch_size=32, batch_size_per_process=16, workers=2) == expected
    halves = [drawn_views(section(), epochs=2, world=2, rank=rank) for rank in range(2)]
    assert not halves[0].keys() & halves[1].keys() and halves[0] | halves[1] == expected
    assert drawn_views(section(), epochs=2, seed=4) != expected
    first, second = ({i: v for (e, i), v in expected.items() if e == epoch} for epoch in range(2))
    assert first != second


@pytest.mark.parametrize(
    "changes", [{}, {"data__repeats": 3}, {"data__drop_last": True}], ids=["plain", "repeats", "drop_last"]
)
@pytest.mark.parametrize("world, rank", [(1, 0), (2, 1)])
def test_order_and_labels_are_those_of_the_other_loader(changes, world, rank):
    place = dict(batch_size=128, batch_size_per_process=32, world=world, rank=rank)
    resident, single = (loader(section(**changes, data__resident=resident), **place) for resident in (True, False))
    ours, theirs = ([*made.batches(3, made.steps_per_epoch + 1)] for made in (resident, single))
    assert len(ours) == len(theirs) >= 10
    for (images, labels, index, crops), (others, their_labels, their_index) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, their_labels) and torch.equal(index, their_index) and torch.equal(crops[0], index)
        assert images.shape == others.shape and images.dtype == others.dtype == torch.uint8


def test_evaluation_is_that_of_the_other_loader():
    for rank in range(2):
        place = dict(batch_size=100, rank=rank, world=2)
        pairs = zip(*(data.test_loader(section(data__resident=r), **place) for r in (True, False)), strict=True)
        assert all(torch.equal(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


@needs_cifar
def test_real_cifar(monkeypatch):
    """Its test split, to save time."""
    changes = [f"data.source={SHARED / 'cifar100'}", "data.resident=true", "data.train_split=test", "data.train_size=10000"]
    made = recipe.load(ROOT / "recipes" / "prev_cifar_res20_res56.json", changes).data
    own = loader(made)
    assert own.resident.views == 162 and not own.broken
    images, labels, index, crops = next(own.batches(1000, 1001))
    assert torch.equal(images, one_by_one(*crops, made, monkeypatch))
    assert torch.equal(labels, own.labels()[index])


# ---------------------------------------------------------------- broken images, refusals


@pytest.fixture(scope="module")
def broken_source(tmp_path_factory):
    """16x16 images in parquet files, four of them broken; what test_data_faults.py has, in another size."""
    from PIL import Image

    pictures = {i: encoded(Image.open(data.io.BytesIO(raw)).resize((16, 16)), "PNG") for i, raw in WHOLE.items()}
    folder = write_parquet(tmp_path_factory.mktemp("resident") / "broken", pictures | BROKEN)
    write_parquet(folder, dict(itertools.islice(pictures.items(), 8)), split="test")
    return folder


def broken_section(folder, **changes):
    more = dict(data__source=str(folder), data__classes=2, data__size=16, data__max_broken=0.5, data__drop_last=True)
    return section(batch_size=8, batch_size_per_process=8, **more | changes)


@pytest.mark.parametrize("repeats", [1, 2])
def test_broken_images_are_those_of_the_other_loader(repeats, broken_source):
    sizes = dict(batch_size=8, batch_size_per_process=8)
    resident, single = (
        loader(broken_section(broken_source, data__resident=resident, data__repeats=repeats), **sizes)
        for resident in (True, False)
    )
    assert sorted(resident.broken) == sorted(BROKEN)  # before the first batch
    ours, theirs = ([*made.batches(0, 4 * made.steps_per_epoch)] for made in (resident, single))
    for (_, labels, index, crops), (_, their_labels, their_index) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, their_labels) and torch.equal(index, their_index) and torch.equal(crops[0], index)
    assert resident.broken == single.broken
    again = torch.cat([crops for *_, crops in resident.batches(0, 4 * resident.steps_per_epoch)], dim=1)
    assert torch.equal(again, torch.cat([crops for *_, crops in ours], dim=1))


def test_faults_are_told_before_the_first_batch(broken_source, tmp_path):
    def error(made=broken_section, **changes):
        with pytest.raises(data.DataError) as caught:
            loader(made(**changes), batch_size=8, batch_size_per_process=8)
        return str(caught.value)

    told = error(folder=broken_source, data__max_broken=0.05)
    assert told.startswith(
        f"{broken_source}, train: 4 of {N} images are broken so far, the recipe's data.max_broken 0.05 allows 2:"
    )
    assert error(folder=broken_source, data__size=17) == (
        f"{broken_source}: image 0: 16x16 pixels; data.resident needs 17x17: set data.resident to false, and data.crop to "
        "'resized' for other sizes"
    )
    labels = dict.fromkeys(range(N), 0) | {0: 2}
    for split in ("train", "test"):
        write_parquet(tmp_path / "labels", WHOLE, split, names=None, labels=labels)
    assert error(folder=tmp_path / "labels") == "image 0 (000.jpg): label 2 is not in 0..1"


def test_a_broken_test_image_is_an_error(broken_source):
    made = broken_section(broken_source, data__test_split="train", data__train_split="test")
    with pytest.raises(data.DataError, match=r"^image 3 \(003.jpg\): cannot be decoded"):
        data.test_loader(made, batch_size=8)


RESIZED = {"kind": "resized", "scale": [0.5, 1.0], "ratio": [0.75, 1.33], "interpolation": "bilinear"}
STREAM = dict(data__streaming=True, data__train_size=898, data__shuffle_buffer=4, data__drop_last=True)
UNLIKE = "teacher.memo: no image comes twice with data's {}: set memo to null"
REFUSED = [
    (dict(data__resident=True, **STREAM), "data.resident: a stream is never whole: set streaming to false and shuffle_buffer to 0, "
     "or resident to false"),
    (dict(data__resident=True, data__crop=RESIZED), "data.resident: crops are cut from padded images: set crop to {'kind': 'pad', "
     "...}, or resident to false"),
    (dict(data__resident=True, data__rand_augment="rand-m7"), "data.resident: rand_augment works on one image at a time: set "
     "rand_augment to null, or resident to false"),
    (dict(teacher__memo="device"), "teacher.memo: only the resident loader numbers the crops of an image: set data.resident to "
     "true, or memo to null"),
    (dict(teacher__memo="disk", data__resident=True, data__mixup=0.1, data__drop_last=True), UNLIKE.format("mixup")),
    (dict(teacher__memo="disk", data__resident=True, data__cutmix=1.0, data__drop_last=True), UNLIKE.format("cutmix")),
    (dict(teacher__memo="disk", data__resident=True, data__random_erasing=0.5), UNLIKE.format("random_erasing")),
    (dict(teacher__memo="disk", data__crop=RESIZED, data__rand_augment="rand-m7"), UNLIKE.format("rand_augment, crop 'resized'")),
    (dict(teacher__memo="cloud", data__resident=True), "teacher.memo: expected 'device' or 'disk', got 'cloud'"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refused_by_the_recipe(changes, message, tmp_path, teacher_file):
    path = write(tmp_path / "r.json", **distilled(teacher_file) | changes)
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.load(path)
    assert f"{path}: {message}" in str(caught.value).splitlines()


def test_a_memo_is_refused_where_features_are_compared(tmp_path, teacher_file, capsys):
    rkd = dict(
        STUDENT, name="rkd", soft={"loss": "rkd", "weight": 1.0, "warmup_epochs": 0, "args": {"distance": 25.0, "angle": 50.0}}
    )
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=[STUDENT, rkd], teacher__memo="device", **RESIDENT))
    assert isinstance(losses.LOSSES["rkd"], type)
    with pytest.raises(SystemExit, match="2"):
        run(path, tmp_path / "out")
    assert capsys.readouterr().err == (
        f"error: {path}: teacher.memo: it holds logits, and student 'rkd' compares features (rkd): set memo to null, or leave "
        "the student out with --students\n"
    )
    run(path, tmp_path / "out", "--students", "kd", "--limit", 1)


# ---------------------------------------------------------------- the memo


@pytest.mark.parametrize("kind", ["device", "disk"])
def test_without_a_memo_and_with_one_stopped_anywhere_the_run_is_the_same(kind, tmp_path, teacher_file, monkeypatch):
    """Weights, optimizer, metrics, bit for bit."""
    asked, teach = [], train.teach
    monkeypatch.setattr(train, "teach", lambda run, images: asked.append(len(images)) or teach(run, images))
    changes = distilled(teacher_file, save_every=7, epochs=3, students=[STUDENT], **RESIDENT)
    run(write(tmp_path / "r.json", **changes), tmp_path / "without")
    assert len(asked) == 45
    path = write(tmp_path / "m.json", **changes | {"teacher": changes["teacher"] | {"memo": kind}})
    run(path, tmp_path / "parts", "--limit", 12)
    run(path, tmp_path / "parts", "--limit", 33, "--resume")
    run(path, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "without", tmp_path / "parts")


def test_a_file_is_shared_by_later_runs_which_ask_no_more(tmp_path, teacher_file, monkeypatch):
    asked, teach = [], train.teach
    monkeypatch.setattr(train, "teach", lambda run, images: asked.append(len(images)) or teach(run, images))
    changes = distilled(teacher_file, epochs=6, students=[STUDENT], data__drop_last=True, evaluate_every=6, **RESIDENT)
    changes |= {"teacher": changes["teacher"] | {"memo": "disk"}, "data__crop": {"kind": "pad", "padding": 0}}
    path = write(tmp_path / "r.json", **changes)
    run(path, tmp_path / "first")
    checks = 2  # of whether an image's place matters
    assert 29 <= len(asked) - checks < 60 < 84  # 2 views of 898 images are 29 batches; the run has 84
    asked.clear()
    run(path, tmp_path / "second", "--set", "seed=2", "students.kd.soft.args.temperature=2.0")
    assert len(asked) - checks < 4 and len(list((tmp_path / "memo").iterdir())) == 1
    run(path, tmp_path / "third", "--limit", 2, "--set", "teacher.precision=bf16")  # answers otherwise
    run(path, tmp_path / "third", "--limit", 2, "--overwrite", "--set", "batch_size=32", "batch_size_per_process=32")
    assert len(list((tmp_path / "memo").iterdir())) == 3


def answers(places, classes=100):
    return torch.randn(1, classes, generator=torch.Generator().manual_seed(7)) + places[:, None].float()


def file_memo(path):
    return models.FileMemo(40, 18, 100, 16, torch.device("cpu"), path)


def fill(memo):
    chance = torch.Generator().manual_seed(os.getpid())
    while True:
        crops = torch.stack([torch.randint(40, (16,), generator=chance), torch.randint(18, (16,), generator=chance)])
        memo(crops, lambda crops: answers(crops[0] * 18 + crops[1]))
        memo.checks[torch.randint(720, (8,), generator=chance)] = 0  # so that writing never ends


def test_writers_that_are_killed_leave_no_wrong_row(tmp_path):
    path, places = tmp_path / "memo", torch.arange(720)
    for _ in range(6):
        writers = [forked(lambda: fill(file_memo(path))) for _ in range(2)]  # at the same time
        time.sleep(0.15)
        for pid in writers:
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        rows, known = file_memo(path).read(places)
        assert torch.equal(rows[known], answers(places[known]))
    assert known.sum() > 300


def test_a_row_that_is_not_what_was_written_is_unknown(tmp_path):
    memo, places = file_memo(tmp_path / "memo"), torch.arange(720)
    assert not memo.read(places)[1].any()  # an empty file
    memo.write(places, answers(places))
    assert memo.read(places)[1].all()
    memo.rows[3, 60:] = 0  # a page that did not reach the disk
    memo.rows.view(torch.int32)[4, 17] ^= 1  # a bit
    memo.checks[5] = 0  # the check did not
    memo.rows[6], memo.checks[6] = memo.rows[7], memo.checks[7]  # a good row in another's place
    memo.rows[8] = 0
    assert (~file_memo(tmp_path / "memo").read(places)[1]).nonzero().flatten().tolist() == [3, 4, 5, 6, 8]
    asked = []
    crops = torch.stack([torch.zeros(16, dtype=torch.int64), torch.arange(16)])
    rows = memo(crops, lambda crops: asked.append(crops) or answers(crops[0] * 18 + crops[1]))
    assert torch.equal(rows, answers(crops[1])) and asked[0][1, [3, 4, 5, 6, 8]].tolist() == [3, 4, 5, 6, 8]
    assert memo.read(places)[1].all()


@pytest.mark.parametrize("kind", ["device", "disk"])
def test_places_of_known_crops_go_to_unknown_ones(kind, tmp_path):
    """So that after 18 forwards of each image, of whatever crops it was asked for, nothing is unknown."""
    sizes = (16, 18, 10, 16, torch.device("cpu"))
    memo = models.Memo(*sizes) if kind == "device" else models.FileMemo(*sizes, tmp_path / "memo")
    asked = []

    def forward(crops):
        asked.append(crops)
        return answers(crops[0] * 18 + crops[1], 10)

    for step in itertools.count():
        view = torch.full((16,), step % 17)  # never the last one, which is filled in
        crops = torch.stack([torch.arange(16), view])
        assert torch.equal(memo(crops, forward), answers(torch.arange(16) * 18 + view, 10))
        if step == 40:
            break
        if len(asked) < 17:  # a part of it is known
            memo(torch.stack([torch.arange(16), torch.arange(16) % 3]), forward)
    assert all(c.shape == (2, 16) for c in asked) and len(asked) <= 18 + 2
    assert len({(i, v) for c in asked for i, v in zip(*c.tolist(), strict=True)}) == sum(c.shape[1] for c in asked)
    short = torch.tensor([[0, 1], [0, 17]])
    memo(short, forward)
    assert asked[-1] is short  # another length: the teacher is asked


def test_too_large_a_memo_is_told_before_it_is_made(tmp_path):
    sizes = (10**9, 162, 1000, 64, torch.device("cpu"))
    with pytest.raises(
        models.ModelError,
        match=r'^teacher.memo: 1,000,000,000 images x 162 views x 1000 classes need 649296.00 GB, cpu has \S+ GB free: set it to "disk" or null$',
    ):
        models.Memo(*sizes)
    with pytest.raises(
        models.ModelError, match=r"memo, 649296.00 GB, cannot be made: (No space left on device|File too large)$"
    ):
        models.FileMemo(*sizes, tmp_path / "memo")


def test_a_teacher_whose_rounding_depends_on_the_place_is_refused(tmp_path, teacher_file, monkeypatch, capsys):
    def uneven(run, images):
        return run.teacher(images) * (1 + 1e-6 * torch.arange(len(images))[:, None]), None

    monkeypatch.setattr(train, "teach", uneven)
    path = write(tmp_path / "r.json", **distilled(teacher_file, students=[STUDENT], teacher__memo="device", **RESIDENT))
    with pytest.raises(SystemExit, match="2"):
        run(path, tmp_path / "out")
    assert "teacher.memo: with batches of 64 the teacher's logits of an image depend on its place" in capsys.readouterr().err


def test_what_a_digest_depends_on():
    def digest(change=lambda network: None, **more):
        torch.manual_seed(0)
        network = models.build("cifar_resnet8", classes=10, size=8, model_args={"widths": [4, 4, 8, 8]}, **more)
        change(network)
        return models.digest(network)

    def one_bit(network):
        network.model.fc.bias.data.view(torch.int32)[0] ^= 1

    others = [digest(one_bit), digest(mean=(0, 0, 0), std=(1, 1, 1)), digest(resize=16)]
    assert digest() == digest() and len({digest(), *others}) == 4


@pytest.mark.slow
def test_two_processes_fill_one_file_and_train_as_without_it(tmp_path, teacher_file):
    students = [student("kd", "kd")]
    changes = distilled(teacher_file, students=students, batch_size_per_process=32, epochs=2, **RESIDENT)
    path = write(tmp_path / "r.json", **changes)
    launched(path, tmp_path / "without", **on_cpu(2))
    changes["teacher"] = changes["teacher"] | {"memo": "disk"}
    path = write(tmp_path / "m.json", **changes)
    launched(path, tmp_path / "with", "--limit", "10", **on_cpu(2))
    launched(path, tmp_path / "with", "--resume", **on_cpu(2))
    assert distance(tmp_path / "without", tmp_path / "with") == 0 and tensors(tmp_path / "with")
    assert len(list((tmp_path / "memo").iterdir())) == 1
    results = [json.loads((tmp_path / out / "result.json").read_text()) for out in ("without", "with")]
    assert results[0]["students"] == results[1]["students"]
