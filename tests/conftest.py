"""Shared by the tests: a tiny recipe on the embedded digits, and where the real data lies when it is there."""

import copy
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before `datasets` is imported: no test may wait for a network
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring, and two test runs do not fight

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_cifar = pytest.mark.skipif(not (SHARED / "cifar100").exists(), reason=f"CIFAR-100 not found in {SHARED}")
needs_imagenet = pytest.mark.skipif(not (SHARED / "imagenet_sample").exists(), reason=f"ImageNet sample not found in {SHARED}")

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


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A checkpoint of a small network that knows a little: 5 epochs of plain SGD on the digits."""
    import data
    import models
    from evaluate import to_float

    settings = make_recipe(students=[dict(STUDENT, soft=None)]).data
    torch.manual_seed(0)
    network = models.build("cifar_resnet8", classes=10, size=8, model_args={"widths": [8, 8, 16, 16]}).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    loader = data.TrainLoader(settings, seed=0, batch_size=64, batch_size_per_process=64)
    for images, labels, _ in loader.batches(0, 5 * loader.steps_per_epoch):
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
    import tempfile

    import recipe

    with tempfile.TemporaryDirectory() as folder:
        return recipe.load(write(Path(folder) / "r.json", **changes))


def write(path, **changes):
    path.write_text(json.dumps(tree(**changes)))
    return path


def distilled(teacher_file, **changes):
    """Changes that give RECIPE a teacher and three students: labels alone, kd, dkd."""
    dkd = {"loss": "dkd", "weight": 1.0, "warmup_epochs": 4, "args": {"alpha": 1.0, "beta": 2.0, "temperature": 4.0}}
    teacher = {"model": "cifar_resnet8", "model_args": {"widths": [8, 8, 16, 16]}, "checkpoint": str(teacher_file)}
    students = [dict(STUDENT, name="alone", soft=None), STUDENT, dict(STUDENT, name="dkd", soft=dkd, lr=0.02)]
    return {"teacher": teacher, "students": students} | changes
