"""tools/report.py: one page of runs that needs no network and trusts no file, and its pictures."""

import base64
import html.parser
import importlib
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT

import recipe

SVG = "{http://www.w3.org/2000/svg}"
PREFIX = "data:image/svg+xml;base64,"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("report")


def a_run(name, seed, top1, *overrides, **changes):
    """What train.py's write_result leaves of a run, as far as the page reads it."""
    path = ROOT / "recipes" / f"{name}.json"
    tree = json.loads(recipe.dump(recipe.load(path, [f"seed={seed}", *overrides])))
    names = [student["name"] for student in tree["students"]]
    scores = [{"last": {"top1": value, "n": 899}, "parameters": 2718} for value in top1]
    students = [{"name": name} | score for name, score in zip(names, scores, strict=True)]
    curves = {n: {"step": [10, 20], "hard": [2.5, 1.25 + seed], "soft": [1.0, None]} for n in names}
    facts = dict(
        seed=seed, limit=None, steps=20, commit="abc", hardware={"cpus": 2}, versions={"python": "3"}
    )
    facts |= dict(command=f"train.py recipes/{name}.json", recipe=tree, students=students)
    taught = any(student["soft"] for student in tree["students"])
    teacher = {"top1": 72.0, "n": 899, "parameters": 78042} if taught else None
    return facts | dict(curves=curves, accuracy={}, teacher=teacher) | changes


def a_map(**changes):
    matrix = [[1, 0.5, None], [0, 0.25, 1]]
    layers = [["a", "b"], ["c", "d", "e"]]
    return dict(models=["<b>first</b>", "second"], layers=layers, cka=matrix, images=8) | changes


class Page(html.parser.HTMLParser):
    """The tags of a page, each closed by its own; its text; and its images {alternative text: [SVG]}."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text, self.images = [], [], [], {}
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        if tag == "img":
            assert attributes["src"].startswith(PREFIX)
            image = ElementTree.fromstring(base64.b64decode(attributes["src"].removeprefix(PREFIX)))
            self.images.setdefault(attributes["alt"], []).append(image)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        self.text.append(words)


def texts(image):
    return [node.text for node in image.iter(f"{SVG}text")]


def cells(source):
    """The texts of the first table, row by row."""
    rows = source.split("<table", 1)[1].split("</table>")[0].split("<tr>")[1:]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def written(report, tmp_path, **files):
    for name, tree in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    report.main([*(str(tmp_path / f"{name}.json") for name in files), "--out", str(tmp_path / "report.html")])
    return (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------- the page


def test_a_page_has_tables_curves_figures_and_what_made_them(report, tmp_path, capsys):
    runs = [a_run("study_fraction_weak", seed, (60 + seed, 70, 71, 72)) for seed in (0, 1)]
    runs.append(a_run("study_fraction_weak", 0, (50, 60, 63, 64), "data.fraction=0.25"))
    short = a_run("study_fraction_weak", 0, (1, 2, 3, 4), "epochs=2", "schedule.milestones=[1]")
    files = dict(runs={"runs": runs, "note": "on <two> cores"}, short=short, again=runs[0])
    bench = {"losses, kd": {"rows": [{"name": "ours", "ms": 1.5}], "commit": "abc"}}  # passed over
    source = written(report, tmp_path, **files, bench=bench, paper={"cells": []})
    page = Page(source)
    text = " ".join(page.text)
    assert "Finished runs: 4; trials: 0." in text and "on <two> cores" in text
    assert "Finished runs: 4;" in capsys.readouterr().out
    header, *rows = cells(source)
    assert header == ["run", "student", "top-1, %", "gain", "seeds", "n", "loss", "model", "parameters"]
    run = "runs: 240 epochs"
    assert [run, "alone", "60.50 ± 0.71", "", "2", "899", "labels alone", "cifar_resnet20", "2718"] in rows
    assert [run, "kd", "70.00 ± 0.00", "+9.50 ± 0.71", "2", "899", "kd", "cifar_resnet20", "2718"] in rows
    teacher, *_ = [row for row in rows if row[1] == "(teacher)"]
    assert teacher == [run, "(teacher)", "72.00", "", "1", "899", "", "cifar_resnet56", "78042"]
    assert {row[0] for row in rows} == {run, f"{run}, 25 % of the images", "short: 2 epochs"}
    assert "Table 1b of the paper" in text and "kd_minus_best_other" in text and "70.66" in text
    assert page.text.count("0; 1") == 1 and page.text.count("seed") == 3  # once a run, for both seeds
    assert "train.py recipes/study_fraction_weak.json" in text and "cpus 2" in text and "python 3" in text
    assert not {"nan", "None", "1.0", "2.0"} & set(page.text)  # an absent value is empty, a count is whole
    loss = "label loss: cross_entropy"
    assert len(page.images[loss]) == 3
    assert {"alone", "kd", "dkd", "dist", "step", loss} <= set(texts(page.images[loss][0]))
    assert not any("distillation loss" in title for title in page.images)  # they have one point


def test_every_result_below_a_folder_and_no_empty_section(report, tmp_path):
    """A run has the name of its folder."""
    runs = {"quickstart_teacher": a_run("quickstart_teacher", 0, [72.0])}
    runs["quickstart_teacher"]["students"][0]["parameters"] = 78042
    soft = {"step": [1, 2], "hard": [2, 1], "soft": [2, 1]}
    curves = dict(curves={"alone": {"step": [1, 2], "hard": [2, 1]}, "kd": soft, "dist": soft})
    for seed in (0, 1):
        runs[f"quickstart/seed{seed}"] = a_run("quickstart", seed, (60, 70, 65), **curves)
    for name, tree in runs.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "result.json").write_text(json.dumps(tree))
        (tmp_path / name / "recipe.json").write_text(json.dumps(tree["recipe"]))
    report.main([str(tmp_path), "--out", str(tmp_path / "report.html")])
    source = (tmp_path / "report.html").read_text()
    assert re.findall("<h2[^>]*>(.*?)</h2>", source) == ["Accuracy", "Training"]
    assert [row[:2] for row in cells(source)[1:]] == [
        *[["quickstart: 8 epochs", name] for name in ("alone", "kd", "dist", "(teacher)")],
        ["quickstart_teacher: 20 epochs", "teacher"],
    ]
    labels, kd = (
        Page(source).images[name] for name in ("label loss: cross_entropy", "distillation loss: kd")
    )
    names = {"alone", "kd", "dist"}  # losses of one kind in one chart
    assert [names & set(texts(image)) for image in [*labels[:1], *kd]] == [names, {"kd"}]


def test_a_page_needs_nothing_else_and_runs_nothing(report, tmp_path):
    evil = "<script>alert(1)</script>\x1b$\\frac$\ud800"
    run = a_run(
        "study_fraction_weak",
        0,
        (1, 2, 3, 4),
        command=evil,
        commit=evil,
        hardware={evil: evil},
        versions=[evil],
    )
    run["recipe"]["about"] = evil
    for student, own in zip(run["students"], run["recipe"]["students"], strict=True):
        student["name"] = own["name"] = own["model"] = evil
    run["curves"] = {evil: {"step": [1, 2], "hard": [1, 2]}}
    run |= dict(seconds=evil, steps=evil, precision=evil)
    source = written(report, tmp_path, run={"runs": [run], "note": evil})
    page = Page(source)
    assert "alert(1)" in " ".join(page.text) and "://" not in source
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "svg")
        assert attributes.get("href", "#").startswith("#") and not {"onload", "onclick"} & attributes.keys()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.tags
    images = [image for group in page.images.values() for image in group]
    assert len(images) == 1 and "<script>alert(1)</scrip…" in texts(images[0])
    for node in (node for image in images for node in image.iter()):
        assert node.tag != f"{SVG}script"


def test_every_file_of_results_is_read(report):
    """Also records from before a key existed, benchmarks, and what removed tools wrote."""
    runs = report.read([ROOT / "results"])
    assert len(runs) >= 15 and len(report.finished(runs)) == len(runs)
    options = [record["recipe"]["data"].keys() & {"rand_augment_on"} for _, record in runs]
    assert not any(options)  # removed options are dropped


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([], "expected a run's result (students, recipe), or several under 'runs', found none"),
        ({"cells": []}, "found none"),
        ({"epochs": 3}, "found none"),
        ({"recipe": {"detector": {}}, "students": []}, "found none"),  # of detect.py
        (
            {"students": [{"name": "kd"}], "recipe": {"students": []}},
            "Error: ",
        ),
        ({"runs": [{"students": None}]}, "Error: "),
        (a_run("study_fraction_weak", 0, [True] * 4), "expected a number, found true"),
        (a_run("study_fraction_weak", 0, [1] * 4) | {"seed": "0"}, 'expected a number, found "0"'),
        (a_run("study_fraction_weak", 0, [1] * 4, teacher=None), "Error: "),
        (a_run("prev_cifar_res20_scratch", 0, [1], teacher="72"), "Error: "),
        (
            a_run("study_fraction_weak", 0, [1] * 4, curves={"kd": {"step": [1, 2], "hard": [1]}}),
            "Error: ",
        ),
    ],
)
def test_a_file_that_is_no_result_is_an_error(tree, said, report, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        written(report, tmp_path, broken=tree)
    told = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said in told
        and "broken.json" in told
        and not (tmp_path / "report.html").exists()
    )


# ---------------------------------------------------------------- figures


def pixels(figure):
    """The drawn figure [height, width, 3], the first row at the bottom, as in matplotlib's coordinates."""
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3]


def test_a_heat_map_has_the_first_models_layers_upwards(report):
    figure = report.figures.heat_map(a_map())
    drawn, axes = pixels(figure), figure.axes[0]
    found = {}
    for row in range(2):
        for column in range(3):
            x, y = axes.transData.transform((column, row)).round().astype(int)
            found[row, column] = drawn[y, x].tolist()
    assert found[0, 0] == found[1, 2] == pytest.approx([252, 253, 191], abs=2)  # 1 in magma
    assert found[1, 0] == pytest.approx([0, 0, 4], abs=2)
    assert found[0, 2] == [136, 136, 136]  # a layer without a similarity
    (_, low), (_, high) = axes.transData.transform([(0, 0), (0, 1)])
    assert low < high
    assert axes.get_ylabel() == "layers of <b>first</b>" and axes.get_xlabel() == "layers of second"
    image = ElementTree.fromstring(report.figures.svg(figure, "CKA of <b>first</b>"))
    assert image.find(f"{SVG}title").text == "CKA of <b>first</b>"


def test_seeds_are_a_mean_with_a_band(report):
    curves = {"kd": [{1: 10.0, 2: 20.0}, {1: 20.0, 2: 40.0}], "alone": [{1: 5.0, 2: 6.0}]}
    axes = report.figures.chart("Top-1", curves, "epoch", teacher=50.0).axes[0]
    mean, alone, teacher = (line.get_ydata() for line in axes.lines)
    assert list(mean) == [15, 30] and list(alone) == [5, 6] and list(teacher) == [50, 50]
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.round(3).tolist()}
    assert {
        (1, 7.929),
        (1, 22.071),
        (2, 15.858),
        (2, 44.142),
    } <= corners  # plus and minus 5 and 10 times sqrt(2)
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["kd", "alone", "teacher"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "Top-1")


def test_one_accuracy_a_seed_is_a_dot_with_its_spread(report):
    axes = report.figures.dots({"kd": [10.0, 20.0], "teacher": [50.0]}, "top-1, %").axes[0]
    (dots,) = axes.containers
    assert list(dots[0].get_xdata()) == [15, 50] and list(dots[0].get_ydata()) == [0, 1]
    bar, none = dots[2][0].get_segments()
    assert bar[:, 0] == pytest.approx([15 - 50**0.5, 15 + 50**0.5]) and not len(none)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["kd", "teacher"]
    assert axes.yaxis_inverted() and axes.get_xlabel() == "top-1, %"


def test_the_picture_of_accuracies(report, tmp_path, capsys):
    accuracy = {
        "kd": {"epoch": [1.0, 2.0], "top1": [50.0, 60.0]},
        "dist": {"epoch": [1.0, 2.0], "top1": [40.0, 70.0]},
    }
    runs = [a_run("prev_cifar_res20_res56", seed, (60, 61, 62), accuracy=accuracy) for seed in (0, 1)]
    scores = {"scratch": accuracy["kd"]}  # a teacher's own run is not drawn
    runs.append(a_run("prev_cifar_res56_scratch", 0, (72,), accuracy=scores, teacher=None))
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs}))
    out = tmp_path / "curves.svg"
    report.main(["curves", str(tmp_path / "runs.json"), "--out", str(out)])
    image = ElementTree.parse(out)
    label = "epoch (mean and standard deviation of 2 seeds)"
    assert {"kd", "dist", "teacher", "top-1, %", label} <= set(texts(image)) and "scratch" not in texts(image)
    assert image.find(f"{SVG}title").text == f"top-1, %, by {label}"
    first = out.read_text()
    report.main(["curves", str(tmp_path / "runs.json"), "--out", str(out)])
    assert out.read_text() == first  # the same picture is the same file
    (tmp_path / "runs.json").write_text(json.dumps(a_run("prev_cifar_res20_res56", 0, (60, 61, 62))))
    with pytest.raises(SystemExit, match="2"):
        report.main(["curves", str(tmp_path / "runs.json"), "--out", str(tmp_path / "none.svg")])
    assert (
        "set evaluate_every of its recipe" in capsys.readouterr().err and not (tmp_path / "none.svg").exists()
    )


# ---------------------------------------------------------------- the data-scale study


def study_run(augmentation, fraction, seed, top1, *overrides):
    return a_run(f"study_fraction_{augmentation}", seed, top1, f"data.fraction={fraction}", *overrides)


def drawn_scale(report, tmp_path, *options):
    """{(augmentation, epochs, share, method): point}, the paper's bars and the picture of the runs in a
    folder.
    """
    files = map(str, sorted(tmp_path.glob("runs*.json")))
    report.main(["scale", *files, "--out", str(tmp_path / "f.svg"), *options])
    tree = json.loads((tmp_path / "f.json").read_text())
    points = {(p["augmentation"], p["epochs"], p["fraction"], p["method"]): p for p in tree["points"]}
    return points, tree["figure_1"], ElementTree.parse(tmp_path / "f.svg")


def test_the_figure_has_gaps_of_equal_seeds(report, tmp_path):
    short = ("epochs=24", "schedule.milestones=[15,18,21]")
    runs = [study_run("weak", 0.1, seed, (50, 55 + seed, 56 + 2 * seed, 54), *short) for seed in (0, 1)]
    runs += [
        study_run("weak", 1.0, 0, (69, 70.5, 72, 71), *short),
        study_run("strong", 1.0, 0, (68, 70, 71, 72.5)),
    ]
    runs.append(study_run("weak", 0.1, 2, (1, 2, 3, 4), *short, "data.hflip=0.0"))  # another experiment
    alone = study_run("weak", 0.25, 0, (50, 1, 60, 60))
    alone["students"], alone["recipe"]["students"] = (
        alone["students"][2:],
        alone["recipe"]["students"][2:],
    )  # no kd, no gap
    trial = study_run("weak", 0.5, 0, (50, 1, 60, 60)) | {"limit": 5}
    (tmp_path / "runs.json").write_text(json.dumps({"runs": [*runs, alone, trial]}))
    points, bars, image = drawn_scale(report, tmp_path)
    weak = points["weak", "24 of 240 epochs", 0.1, "dkd"]
    assert (weak["mean"], weak["gaps"], weak["teacher"]) == (1.5, {"0": 1.0, "1": 2.0}, [72.0])
    assert weak["spread"] == pytest.approx(0.5**0.5)
    assert points["weak", "24 of 240 epochs", 0.1, "dist"]["gaps"] == {"0": -1.0, "1": -2.0}
    assert points["strong", "240 epochs", 1.0, "dist"]["mean"] == 2.5 and len(points) == 6
    assert {(b["dataset"], b["method"]): b["mean"] for b in bars}["cifar-100", "dist"] == 2.17
    shown = {"dkd, weak, 24 of 240 epochs", "dist, strong, 240 epochs", "2.17", "-0.46", "10 %", "100 %"}
    assert shown <= set(texts(image))

    equal_steps = ("epochs=48", "schedule.milestones=[30,36,42]")
    run = study_run("weak", 0.5, 0, (50, 60, 61, 62), *equal_steps)
    (tmp_path / "runs_half.json").write_text(json.dumps(run))
    points, _, _ = drawn_scale(report, tmp_path, "--along", "steps")
    found = [
        (line, share, p["mean"])
        for (data, line, share, method), p in points.items()
        if (data, method) == ("weak", "dkd")
    ]
    assert found == [
        ("steps of 2 of 240 epochs", 0.1, 1.5),
        ("steps of 24 of 240 epochs", 0.5, 1),
        ("steps of 24 of 240 epochs", 1.0, 1.5),
    ]


def test_the_points_are_drawn_where_they_are(report):
    gap = dict(augmentation="weak", epochs="240 epochs", spread=None, gaps={}, teacher=[])
    points = [
        gap | dict(fraction=share, method="dkd", mean=mean) for share, mean in ((0.1, 1.0), (1.0, -2.0))
    ]
    points.append(gap | dict(fraction=1.0, method="dist", mean=3.0, spread=0.5))
    left, right = report.figures.scale_figure(points, report.figure_1()).axes
    lines = {tuple(line.get_ydata()) for line in left.lines}
    assert {(1.0, -2.0), (3.0,)} <= lines and left.get_ylim() == right.get_ylim()
    assert (2.5,) in lines and (3.5,) in lines  # the ends of the error bar
    assert sorted(round(bar.get_height(), 2) for bar in right.patches)[::7] == [-0.46, 2.17]


def test_no_run_of_the_study_is_an_error(report, tmp_path, capsys):
    (tmp_path / "runs.json").write_text(json.dumps(a_run("prev_cifar_res20_scratch", 0, [60], teacher=None)))
    with pytest.raises(SystemExit, match="2"):
        report.main(["scale", str(tmp_path / "runs.json"), "--out", str(tmp_path / "g.svg")])
    assert "no finished run of recipes/study_fraction_*.json" in capsys.readouterr().err
    assert not (tmp_path / "g.svg").exists()


def test_the_points_that_are_kept_are_those_of_the_records(report, tmp_path):
    files = map(str, sorted((ROOT / "results").glob("cifar100_*.json")))
    report.main(["scale", *files, "--out", str(tmp_path / "scale.svg"), "--along", "steps"])
    kept = (ROOT / "results" / "scale.json").read_text()
    assert json.loads((tmp_path / "scale.json").read_text()) == json.loads(kept)
