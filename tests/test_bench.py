"""tools/bench.py: every section runs in small sizes and writes its JSON, and JSON files become the table."""

import json
import sys

import pytest
import torch
from conftest import ROOT, needs_cifar, needs_coco, needs_imagenet

import losses

sys.path.insert(0, str(ROOT / "tools"))
import bench
import harness


@pytest.mark.parametrize(
    "sections",
    [
        ["losses", "overhead", "folders"],
        pytest.param(["detection"], marks=[pytest.mark.slow, needs_coco]),
        pytest.param(["input"], marks=[pytest.mark.slow, needs_cifar, needs_imagenet]),
        pytest.param(["step", "startup"], marks=pytest.mark.slow),
    ],
    ids=["quick", "detection", "input", "others"],
)
def test_sections_write_their_json_and_become_the_table(sections, tmp_path):
    for section in sections:
        bench.main([section, "--small", "--rounds", "1", "--json", str(tmp_path / "bench.json")])
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results) == sections
    for section in sections:
        check_result(results[section])
    for section in {"input", "step"} & set(sections):
        assert all(row["images_per_second"] > 0 for row in rows(results, section))
    if "losses" in sections:
        assert all(row["peak_mb"] > 0 for row in rows(results, "losses"))
        assert [row["name"] for row in rows(results, "overhead")] == ["a plain loop", "ours"]

    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- bench -->\nan old table\n<!-- /bench -->\nafter\n")
    bench.main(["table", "--json", str(tmp_path / "bench.json"), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- bench -->") and text.endswith("<!-- /bench -->\nafter\n")
    assert "an old table" not in text
    for section in sections:
        assert f"- {section}: `{results[section]['command']}`" in text
        assert all(f"| {row['name']} |" in text for row in rows(results, section))


def check_result(result):
    for fact in ("command", "commit", "versions", "hardware", "threads"):
        assert fact in result
    assert (result["rounds"], result["device"]) == (1, "cpu")
    for comparison in result["comparisons"]:
        first, *others = comparison["rows"]
        assert (first["ratio"], first["difference"]) == (1, 0) and others
        for row in comparison["rows"]:
            assert row["seconds"] > 0
            assert row["ratio"] == pytest.approx(first["seconds"] / row["seconds"])


def rows(results, section):
    return [row for comparison in results[section]["comparisons"] for row in comparison["rows"]]


def test_the_table(tmp_path, capsys):
    rounds = [{"first": 1.0, "second": 0.25}]
    rows = [harness.row_of(way, rounds) | {"peak_mb": 3.0} for way in rounds[0]]
    facts = {"command": "bench", "commit": "abc", "versions": {"torch": "2"}, "hardware": {"device": "a CPU"}}
    comparison = {"title": "loss", "clock": "cpu", "rows": rows}
    result = facts | {"threads": 1, "rounds": 1, "comparisons": [comparison]}
    (tmp_path / "a.json").write_text(json.dumps({"losses": result}))
    bench.main(["table", "--json", str(tmp_path / "a.json")])
    assert capsys.readouterr().out.splitlines() == [
        "| what | way | time | ratio | difference | peak memory |",
        "|---|---|---|---|---|---|",
        "| loss (cpu time) | first | 1 s | 1.00 (1.00 to 1.00) | 0 us | 3 MB |",
        "|  | second | 250 ms | 4.00 (4.00 to 4.00) | -750 ms | 3 MB |",
        "",
        "- losses: `bench`; a CPU, 1 threads, 1 rounds; torch 2; commit abc",
    ]


def test_bad_input_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no table here")
    for arguments, message in (
        (["table", "--write", str(page)], "expected the lines '<!-- bench -->' and '<!-- /bench -->'"),
        (["input", "--data", str(tmp_path)], "imagenet_sample: no such folder: name the one around"),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.main(arguments)
        assert message in capsys.readouterr().err
    assert page.read_text() == "no table here"


def test_a_ratio_is_the_median_of_the_ratios_within_a_round():
    rounds = [  # the machine is busy in the second round, for both ways
        {"first": 1.0, "second": 0.5},
        {"first": 8.0, "second": 4.0},
        {"first": 1.0, "second": 4.0},
    ]
    row = harness.row_of("second", rounds, images=8)
    assert (row["seconds"], row["ratio"], row["ratio_range"]) == (4.0, 2.0, [0.25, 2.0])
    assert (row["images_per_second"], row["difference"]) == (2.0, -0.5)


def test_a_way_that_fails_is_named(tmp_path, capfd):
    def broken():
        raise ValueError("no such way")
        yield

    args = bench.argparse.Namespace(threads=1, small=True, device="cpu", rounds=1)
    with pytest.raises(SystemExit, match="the process of 'a bad way' ended; its traceback is above"):
        harness.compare(harness.Comparison("one", {"a bad way": broken()}), args)
    assert "ValueError: no such way" in capfd.readouterr().err


def test_rkd_is_compared_with_its_definition():
    student, teacher = (torch.randn(6, 5, dtype=torch.float64) for _ in range(2))
    ours = losses.RKD([(5,)], [(5,)])([student], [teacher], None, None)
    torch.testing.assert_close(ours, bench.defined_rkd([student], [teacher], None, None))
