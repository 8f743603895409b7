"""The shape of the project: which file imports which, sizes, and that the documents name what exists."""

import ast
import re
import sys

import pytest
from conftest import ROOT

# Every file imports only from those above it, and these packages beside the standard library.
TABLE = """
losses: torch
recipe: pydantic
folders: PIL datasets pyarrow tqdm
class_names: folders timm
sources: recipe folders class_names PIL datasets fsspec huggingface_hub numpy pyarrow sklearn
rand_augment: PIL cv2 numpy timm torch
augment: sources rand_augment PIL cv2 numpy simplejpeg timm torch torchvision
resident: sources augment numpy torch
workers: sources torch
data: sources augment resident workers datasets numpy torch
cifar_resnet: timm torch
models: cifar_resnet timm torch
optim: timm torch
launch: recipe accelerate torch
rundir: recipe pydantic typing_extensions
evaluate: recipe folders class_names sources augment data models rundir accelerate datasets numpy
    pandas timm torch
distill: losses recipe models optim launch timm torch
checkpoint: recipe class_names models launch rundir accelerate deepspeed pydantic safetensors timm
    torch typing_extensions
log: sources launch rundir evaluate numpy pandas timm torch
finish: recipe cifar_resnet models launch rundir evaluate log accelerate datasets numpy timm torch
train: recipe class_names sources augment workers data models optim launch rundir evaluate distill
    checkpoint log finish accelerate torch tqdm
coco: recipe sources augment workers PIL numpy pycocotools pydantic torch tqdm typing_extensions
detectors: recipe models rundir huggingface_hub pydantic safetensors timm torch torchvision
detect: recipe class_names augment optim launch rundir evaluate distill checkpoint log finish train coco
    detectors accelerate numpy pydantic timm torch torchvision tqdm
"""
LINES = (line.split(": ") for line in TABLE.replace("\n    ", " ").strip().splitlines())
IMPORTS = {name: set(allowed.split()) for name, allowed in LINES}
ALONE = {"losses", "cifar_resnet"}  # copied into other projects: they import none of ours
PYTHON = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def imports(path):
    tree = ast.parse(path.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {n.split(".")[0] for n in names} - sys.stdlib_module_names


def test_the_files_are_those_of_the_table():
    assert {p.stem for p in ROOT.glob("*.py")} == set(IMPORTS)
    readme = re.findall(r"^\| \[(\w+)\.py\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert readme == list(IMPORTS)  # the same order, from the first to read to the last


@pytest.mark.parametrize("name", IMPORTS)
def test_every_import_points_up(name):
    allowed = IMPORTS[name] - (set(IMPORTS) if name in ALONE else set())
    assert imports(ROOT / f"{name}.py") <= allowed
    order = list(IMPORTS)
    assert all(order.index(other) < order.index(name) for other in allowed & set(order))


@pytest.mark.parametrize("name", ["train", "detect"])
def test_a_script_opens_with_its_loop(name):
    functions = [
        n.name for n in ast.parse((ROOT / f"{name}.py").read_text()).body if isinstance(n, ast.FunctionDef)
    ]
    assert functions[0] == "train"


def test_files_and_functions_are_short():
    for path in PYTHON:
        lines = path.read_text().splitlines()
        assert max(map(len, lines)) <= 110, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 55, (path.name, node.name)


def test_method_names_stay_in_losses():
    """No other file decides by the name of a method."""
    methods = {
        "kd",
        "dkd",
        "dist",
        "bkl",
        "cc",
        "rkd",
        "crd",
        "reviewkd",
        "cross_entropy",
        "binary_cross_entropy",
    }
    for name in set(IMPORTS) - {"losses"}:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        assert not methods & {
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in methods
        }


def test_nothing_unpickles():
    """torch.load is left to timm, which gets weights_only=True; no remote code, no eval, no shell."""
    for path in PYTHON:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            forbidden = (
                "eval",
                "exec",
                "pickle.load",
                "pickle.loads",
                "os.system",
                "__import__",
                "torch.load",
            )
            assert name not in forbidden, (path.name, name)
            assert "trust_remote_code" not in keywords and keywords.get("shell") != "True", path.name
            assert keywords.get("weights_only", "True") == "True", path.name
    assert (ROOT / "models.py").read_text().count("weights_only=True") == 1


# ---------------------------------------------------------------- documents

LAUNCHERS = {  # flags of accelerate, torchrun, srun, TensorBoard, pytest
    "--bind_all",
    "--config_file",
    "--dynamo_backend",
    "--help",
    "--logdir",
    "--machine_rank",
    "--main_process_ip",
    "--mixed_precision",
    "--multi_gpu",
    "--nodes",
    "--nproc_per_node",
    "--ntasks-per-node",
    "--num_cpu_threads_per_process",
    "--num_processes",
    "--standalone",
}
WRITTEN_LATER = {"results/NAME.json", "utils.py"}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    assert "pip install -r requirements.txt && accelerate launch train.py recipes/quickstart.json" in text
    assert [line for line in lines if line.endswith("python -m pytest")] == [
        "    pip install -r requirements-dev.txt && python -m pytest"
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_exists(path):
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    folder = r"(?:(?:recipes(?:/accelerate)?|results|tools|tests|docs)/)?"
    named = rf"(?<![\w/.-]){folder}[A-Za-z0-9_]+\.(?:py|json|yaml)\b"
    for name in set(re.findall(named, text)) - WRITTEN_LATER:
        if name.split("/")[0] in ("recipes", "results", "tools", "tests", "docs") or name.endswith(".py"):
            assert (ROOT / name).exists(), name
    code = "".join(file.read_text() for file in PYTHON)
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)) - LAUNCHERS:
        assert f'"{option}"' in code, option


def test_every_recipe_is_in_the_table():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert not [
        p.name for p in (ROOT / "recipes").glob("*.json") if p.name not in text and p.stem not in text
    ]
