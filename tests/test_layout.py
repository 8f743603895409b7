"""The shape of the project: what may import what, which files there are, and that the README names what exists."""

import ast
import re
import sys

import pytest
from conftest import ROOT

ALLOWED = {  # beside the standard library
    "losses": {"torch"},
    "recipe": set(),
    "data": {"torch", "torchvision", "timm", "datasets", "fsspec", "pyarrow", "numpy", "PIL", "sklearn", "cv2", "simplejpeg"},
    "models": {"torch", "timm"},
    "evaluate": {"data", "models", "recipe", "torch", "timm", "numpy", "datasets", "accelerate"},
    "train": {
        "data",
        "models",
        "recipe",
        "losses",
        "evaluate",
        "torch",
        "timm",
        "numpy",
        "datasets",
        "accelerate",
        "safetensors",
        "tqdm",
    },
}


def imports(path):
    tree = ast.parse(path.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {n.split(".")[0] for n in names}


@pytest.mark.parametrize("name", ALLOWED)
def test_import_table(name):
    assert imports(ROOT / f"{name}.py") - sys.stdlib_module_names <= ALLOWED[name]


def test_six_files_and_no_more():
    assert {p.stem for p in ROOT.glob("*.py")} == set(ALLOWED)


def test_nothing_unpickles():
    """torch.load is left to timm's loader, which gets weights_only=True; nothing else may read pickles or run code."""
    forbidden = re.compile(r"torch\.load\(|import pickle|pickle\.|trust_remote_code|weights_only=False|\beval\(|\bexec\(")
    for path in ROOT.glob("*.py"):
        found = [line for line in path.read_text().splitlines() if forbidden.search(line.replace(".eval()", ""))]
        assert not found, f"{path.name}: {found}"
    assert (ROOT / "models.py").read_text().count("weights_only=True") == 1


def test_method_names_stay_in_losses():
    for name in ("train", "models", "data", "evaluate", "recipe"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not strings & {"kd", "dkd", "dist", "bkl", "cross_entropy", "binary_cross_entropy"}


LAUNCHERS = {
    "--multi_gpu",
    "--num_processes",
    "--mixed_precision",
    "--num_cpu_threads_per_process",
    "--logdir",
    "--dynamo_backend",
    "--machine_rank",
    "--main_process_ip",
    "--nodes",
    "--ntasks-per-node",
    "--config_file",
    "--standalone",
    "--nproc_per_node",
}


def test_the_readme_names_what_exists():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(
        r"\brecipes/(?:accelerate/)?[a-z0-9_]+\.(?:json|yaml)|\bresults/[a-z0-9_]+\.json|(?<![\w/])(?:tools/)?[a-z]+\.py\b",
        text,
    ):
        assert (ROOT / name).exists(), name
    own = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")))
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)) - LAUNCHERS:
        assert f'"{option}"' in own, option
