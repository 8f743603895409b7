"""tools/report.py: one page of runs and heat maps that needs no network and believes no file."""

import html.parser
import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

import recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("report")


def a_run(name, seed, top1, *overrides, **changes):
    """What train.py's write_result leaves of a run, as far as the page reads it."""
    tree = json.loads(recipe.dump(recipe.load(ROOT / "recipes" / f"{name}.json", [f"seed={seed}", *overrides])))
    names = [student["name"] for student in tree["students"]]
    students = [{"name": n, "last": {"top1": value}} for n, value in zip(names, top1, strict=True)]
    curves = {n: {"step": [10, 20], "loss": [2.5, 1.25 + seed], "soft": [1.0, None]} for n in names}
    facts = dict(seed=seed, limit=None, steps=20, commit="abc", command=f"train.py recipes/{name}.json", hardware={"cpus": 2})
    facts["versions"] = {"python": "3"}
    return facts | dict(recipe=tree, students=students, curves=curves, accuracy={}, teacher={"top1": 72.0}) | changes


def a_map(**changes):
    names = ["<b>first</b>", "second"]
    return dict(models=names, layers=[["a", "b"], ["c", "d", "e"]], cka=[[1, 0.5, None], [0, 0.25, 1]], images=8) | changes


class Page(html.parser.HTMLParser):
    """The tags of a page, each closed by its own; and its text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text, self.titles = [], [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.text.append(words)
        if self.open[-1:] == ["title"]:
            self.titles.append(words)


def written(report, tmp_path, **files):
    for name, tree in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    report.main([*(str(tmp_path / f"{name}.json") for name in files), "--out", str(tmp_path / "report.html")])
    return (tmp_path / "report.html").read_text()


def test_a_page_has_tables_curves_figures_and_what_made_them(report, tmp_path, capsys):
    runs = [a_run("study_fraction_weak", seed, (60 + seed, 70, 71, 72)) for seed in (0, 1)]
    runs.append(a_run("study_fraction_weak", 0, (50, 60, 63, 64), "data.fraction=0.25"))
    short = a_run("study_fraction_weak", 0, (1, 2, 3, 4), "epochs=2", "schedule.milestones=[1]")
    bench = {"losses, kd": {"rows": [{"name": "ours", "ms": 1.5}], "commit": "abc"}}  # passed over, as the paper's numbers are
    files = dict(runs={"runs": runs, "note": "on <two> cores"}, short=short, again=runs[0], map=a_map(), bench=bench)
    source = written(report, tmp_path, **files, paper={"cells": []}, scale={"points": [], "figure_1": []})
    page = Page(source)
    text = " ".join(page.text)
    assert "4 finished runs, 1 heat map." in text and "on <two> cores" in text and "4 finished runs" in capsys.readouterr().out
    assert "60.50 ± 0.71" in text and "A reduced schedule: 2 epochs where the recipe has 240." in text
    assert (
        "Table 1b of the paper, measure cifar-100, lr 0.05, weight_decay 0.0005" in text and "70.66" in text
    )  # the paper's own number for kd, beside ours
    assert "train.py recipes/study_fraction_weak.json" in text and "study_fraction_weak: 240 epochs, 25 % of the images" in text
    assert "seed 1, steps 20" in text and "cpus 2" in text and "python 3" in text
    assert page.titles.count("Loss") == 3 and "CKA of <b>first</b> and second" in page.titles
    assert "Top-1 of DKD and DIST minus vanilla KD's" in text


def test_a_page_needs_nothing_else_and_runs_nothing(report, tmp_path):
    evil = "<script>alert(1)</script>"
    run = a_run("study_fraction_weak", 0, (1, 2, 3, 4), command=evil, commit=evil, hardware={evil: evil}, versions=[evil])
    run["recipe"]["about"] = evil
    for student, own in zip(run["students"], run["recipe"]["students"], strict=True):
        student["name"] = own["name"] = evil
    run["curves"] = {evil: {"step": [1, 2], "loss": [1, 2]}}
    run |= dict(seconds=evil, steps=evil, precision=evil)
    heat = a_map(models=[evil, evil], data=evil, images=evil, command=evil, layers=[[evil] * 2, [evil] * 3])
    source = written(report, tmp_path, run={"runs": [run], "note": evil}, map=heat)
    page = Page(source)
    assert "alert(1)" in " ".join(page.text) and "http" not in source.replace("http://www.w3.org/2000/svg", "")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        assert attributes.get("href", "#").startswith("#") and not {"src", "onload", "onclick"} & attributes.keys()


def test_a_heat_map_is_an_image_of_its_own(report):
    drawn = ElementTree.fromstring(report.heat_map(a_map()))
    cells = drawn.find("{*}svg")
    assert cells.get("viewBox") == "0 0 3 2"
    found = {path.get("fill"): path.get("d") for path in cells}
    assert drawn.find("{*}title").text == "CKA of <b>first</b> and second"
    assert found["#fcfdbf"] == "M0 1h1v1h-1zM2 0h1v1h-1z"  # 1: the first model's layers go up, the second's to the right
    assert found["#000004"] == "M0 0h1v1h-1z" and found["#888888"] == "M2 1h1v1h-1z"


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([], "expected a run's result (students, recipe), several under 'runs', or a heat map of tools/cka.py, found list"),
        ({"cells": []}, "found none"),
        ({"epochs": 3}, "found the keys epochs"),
        (a_map(layers=[["a"], ["c", "d", "e"]]), "a row of cka for each layer"),
        (a_map(cka=[[1, 0.5, None], [0, 0.25, "1"]]), 'expected a number, found "1"'),
        (a_map(cka=3), "expected a heat map as tools/cka.py writes it"),
        ({"students": [{"name": "kd"}], "recipe": {"students": []}}, "expected a result as train.py writes it"),
        ({"runs": [{"students": None}]}, "expected a result as train.py writes it"),
        (a_run("study_fraction_weak", 0, [True] * 4), "expected a number, found true"),
        (a_run("study_fraction_weak", 0, [1] * 4) | {"seed": "0"}, 'expected a number, found "0"'),
        (a_run("study_fraction_weak", 0, [1] * 4, teacher=None), "expected a result as train.py writes it"),
        (
            a_run("study_fraction_weak", 0, [1] * 4, curves={"kd": {"step": [1, 2], "loss": [1]}}),
            "expected a result as train.py",
        ),
    ],
)
def test_a_file_that_is_no_result_is_an_error(tree, said, report, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        written(report, tmp_path, broken=tree)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told and "broken.json" in told and not (tmp_path / "report.html").exists()
