"""Shared by the tests: a tiny recipe on the embedded digits, runs of it, and where the real data lies."""

import copy
import hashlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before `datasets` is imported: no test may wait for a network
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# Before torch is: the tensors are tiny, so threads cost more than they bring, and test runs share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# recipes of train.py; those of detect.py are another format
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.json") if not path.stem.startswith("coco_"))
SHARED = ROOT.parent / "shared" / "data"
needs_cifar = pytest.mark.skipif(
    not (SHARED / "cifar100").exists(), reason=f"CIFAR-100 not found in {SHARED}"
)
needs_imagenet = pytest.mark.skipif(
    not (SHARED / "imagenet_sample").exists(), reason=f"ImageNet sample not found in {SHARED}"
)
needs_coco = pytest.mark.skipif(
    not (SHARED / "coco_sample").exists(), reason=f"COCO sample not found in {SHARED}"
)

STUDENT = {
    "name": "kd",
    "model": "cifar_resnet8",
    "model_args": {"widths": [4, 4, 8, 8], "drop_rate": 0.2},
    "pretrained": False,
    "optimizer": "sgd",
    "optimizer_args": {"momentum": 0.9, "nesterov": False},
    "lr": 0.05,
    "weight_decay": 5e-4,
    "decay_norm_and_bias": False,
    "clip_grad": None,
    "ema": None,
    "hard": {"loss": "cross_entropy", "weight": 1.0, "smoothing": 0.0},
    "soft": {"loss": "kd", "weight": 1.0, "warmup_epochs": 0, "args": {"temperature": 4.0}},
}
RECIPE = {
    "about": "A test.",
    "seed": 1,
    "epochs": 2,
    "batch_size": 64,
    "batch_size_per_process": 64,
    "schedule": {"kind": "cosine", "warmup_epochs": 1, "warmup_lr": 0.0, "min_lr": 0.0, "per": "step"},
    "data": {
        "source": "digits",
        "train_split": "train",
        "test_split": "test",
        "image": "image",
        "label": "label",
        "classes": 10,
        "train_size": None,
        "streaming": False,
        "shuffle_buffer": 0,
        "size": 8,
        "crop": {"kind": "pad", "padding": 1},
        "hflip": 0.0,
        "rand_augment": None,
        "repeats": 1,
        "random_erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_last": False,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    },
    "teacher": None,
    "students": [dict(STUDENT, name="alone", soft=None)],
    "log_every": 5,
}
STREAM = dict(data__streaming=True, data__train_size=898, data__drop_last=True, data__shuffle_buffer=64)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A checkpoint of a small network that knows a little: 5 epochs of plain SGD on the digits."""
    import torch

    import data
    import models
    from evaluate import to_float

    settings = make_recipe(students=[dict(STUDENT, soft=None)]).data
    torch.manual_seed(0)
    network = models.build("cifar_resnet8", classes=10, size=8, model_args={"widths": [8, 8, 16, 16]}).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    loader = data.TrainLoader(settings, batch_size=64, batch_size_per_process=64)
    for images, labels, _ in loader.batches(0, 0, 5 * loader.steps_per_epoch):
        torch.nn.functional.cross_entropy(network(to_float(images, "cpu")), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"epoch": 5, "model": network.model.state_dict(), "accuracy": 0.9}, path)
    return path


def tree(**changes):
    """RECIPE as a dictionary, with `a__b=value` for nested keys."""
    result = copy.deepcopy(RECIPE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = result
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = copy.deepcopy(value)
    return result


def make_recipe(**changes):
    """A recipe.Recipe of RECIPE with changes."""
    import recipe

    with tempfile.TemporaryDirectory() as folder:
        return recipe.load(write(Path(folder) / "r.json", **changes))


def write(path, **changes):
    path.write_text(json.dumps(tree(**changes)))
    return path


def distilled(teacher_file, **changes):
    """Changes that give RECIPE a teacher and three students: labels alone, kd, dkd."""
    arguments = {"alpha": 1.0, "beta": 2.0, "temperature": 4.0}
    dkd = {"loss": "dkd", "weight": 1.0, "warmup_epochs": 4, "args": arguments}
    widths = {"widths": [8, 8, 16, 16]}
    teacher = {"model": "cifar_resnet8", "model_args": widths, "checkpoint": str(teacher_file)}
    students = [dict(STUDENT, name="alone", soft=None), STUDENT, dict(STUDENT, name="dkd", soft=dkd, lr=0.02)]
    return {"teacher": teacher, "students": students} | changes


def photos(folder, classes, images=6):
    """A folder of class folders, train/ and val/, with plain pictures of 8 pixels; returns its path."""
    for place in (folder / split / name for split in ("train", "val") for name in classes):
        place.mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(place / f"{i}.png")
    return folder


# ---------------------------------------------------------------- runs of train.py


def run(path, out, *arguments, workers=0):
    """Train a recipe in this process; returns its result.json."""
    import train

    train.main([str(path), "--out", str(out), "--workers", str(workers), *map(str, arguments)])
    return json.loads((out / "result.json").read_text())


def run_until(step, path, out, *arguments, workers=0):
    """Train a recipe in this process until SIGTERM arrives in this optimizer step, which ends in a
    checkpoint.
    """
    import launch

    steps, agreed = itertools.count(newest(out) + 1), launch.Signals.agreed

    def with_signal(signals):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(signals)

    code = 0
    with mock.patch.object(launch.Signals, "agreed", with_signal):
        try:
            run(path, out, *arguments, workers=workers)
        except SystemExit as end:  # not pytest.raises, which keeps the frames and with them the folder's lock
            code = end.code
    assert code == 128 + signal.SIGTERM and newest(out) == step


def stopped(capsys, path, out, *arguments):
    """(exit code, what was written to stderr) of a run that must not get through."""
    with pytest.raises(SystemExit) as stop:
        run(path, out, *arguments)
    return stop.value.code, capsys.readouterr().err


def rows(out):
    """The metrics, without what a clock says."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "seconds/"))} for line in lines]


def saved(out):
    """The complete checkpoints of a run, oldest first."""
    import rundir

    return rundir.checkpoints(out)


def newest(out):
    """The step of the newest checkpoint; 0 without one."""
    return max([int(folder.name.removeprefix("step-")) for folder in saved(out)], default=0)


def final_state(out):
    """Every tensor and number of the last checkpoint: weights, optimizer, sums, best."""
    import safetensors.torch

    tensors = {}
    for path in saved(out)[-1].glob("*.safetensors"):
        tensors |= {f"{path.name}:{k}": v for k, v in safetensors.torch.load_file(path).items()}
    return tensors, json.loads((saved(out)[-1] / "state.json").read_text())["students"]


def assert_same_run(a, b, students=None):
    """Two runs ended with the same tensors, scores and rows, bit for bit; or these students of them did."""
    import torch

    (tensors, state), (others, other_state) = final_state(a), final_state(b)
    for key in tensors if students is None else [k for k in tensors if k.split(".")[0] in students]:
        assert torch.equal(tensors[key], others[key]), key
    for name in students or state:
        assert state[name] == other_state[name]
    if students is None:
        assert tensors.keys() == others.keys() and rows(a) == rows(b)


def forked(function):
    """`function()` in a child process, everything imported already, which saves seconds; returns its id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        code = 1
        try:
            function()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory, teacher_file):
    """(recipe, folder of a whole run, folder of one that stopped at step 9)."""
    folder = tmp_path_factory.mktemp("interrupted")
    changes = distilled(teacher_file, epochs=1, save_every=4, log_every=3)
    path = write(folder / "r.json", **changes | {"students": changes["students"][:2]})
    run(path, folder / "whole")
    run_until(9, path, folder / "parts")
    return path, folder / "whole", folder / "parts"


@pytest.fixture
def copied(interrupted, tmp_path):
    """(recipe, folder of the whole run, a copy of the folder of the one that stopped)."""
    path, whole, parts = interrupted
    shutil.copytree(parts, tmp_path / "out")
    return path, whole, tmp_path / "out"


def rewrite(folder, name, change):
    """Change a JSON file of a checkpoint, and its digest in the manifest."""
    tree = json.loads((folder / name).read_text())
    change(tree)
    (folder / name).write_text(json.dumps(tree))
    if name != "manifest.json":
        content = (folder / name).read_bytes()
        digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        rewrite(folder, "manifest.json", lambda manifest: manifest["files"].update({name: digest}))
