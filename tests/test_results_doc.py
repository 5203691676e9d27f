"""README.md and docs/results.md show what the grid left, number by number."""

import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_table_of_the_commands_is_made_of_the_results(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shown = (ROOT / page).read_text()
    assert "| int2, the paper's way | " in shown
    assert importlib.import_module("grid_summary").pages()[page] == shown


def test_another_result_would_be_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    summary = importlib.import_module("grid_summary")
    way = {"recipe": "paper", "seeds": [0, 1], "test_wer": 0.05, "comparisons": {}, "archive_version": 3}
    way["bytes"] = {"archive": 100, "float32": 1000}
    worse = {**way, "test_wer": 0.0501}
    assert summary.row("int2", way, False, ("test WER", "archive")) == "| int2, the paper's way | two | 5.00% | 10.0% |"
    assert summary.row("int2", worse, False, ("test WER",)) == "| int2, the paper's way | two | 5.01% |"


@pytest.fixture
def cells():
    """Two rows of one cell, the second with an archive of today's version, and a control."""
    row = {"dev_wer": 0.06, "bits_per_weight": 2.0, "bytes": {"packed": 12, "archive": 8, "tflite": 30, "float32": 100}}
    new = {**row, "dev_wer": 0.05, "archive_version": 3, "bytes": {**row["bytes"], "archive": 7}}
    return {(2, None, "paper"): [row, new], (2, None, "mse"): [row], (None, None, "paper"): [row]}


def test_the_plot_has_a_point_for_every_recipe_and_marks_ours_and_the_papers(cells, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    plot = importlib.import_module("grid_plot")
    files = {"dev_wer": 0.2, "bytes": {"archive": 6, "float32": 100}, "archive_version": 3}
    untrained = {(2, None): {"chosen": files}, (4, None): {"chosen": {"wer": 0.1}}}  # the second without files
    found = plot.points(cells, lambda *cell: (*cell, "mse"), untrained)
    assert [(point["way"], point["share"], point["errors"], point["old"]) for point in found] == [
        (plot.UNTRAINED, 6, [20], False),
        (plot.PAPER, 7, [6, 5], False),
        (plot.OURS, 8, [6], True),
    ]


def test_the_sizes_of_a_cell_are_of_every_way_and_old_archives_are_marked(cells, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sizes = importlib.import_module("grid_sizes")
    new, old = sizes.sizes_of(cells[2, None, "paper"]), sizes.sizes_of(cells[2, None, "mse"])
    untrained = {"plain": {"way": "absmax", **new}, "chosen": {"way": "compensated"}}
    cell = {"untrained": untrained, "paper": {"recipe": "paper", **new}, "ours": {"recipe": "mse", **old}}
    lines = sizes.size_lines([{"bits": 2, "pattern": None, **cell}])[-3:]
    assert lines == [
        "| int2 dense | no training, absmax | 2.00 | 12 (12.0%) | 7 (7.0%) | - | 30 (30.0%) |",
        "| int2 dense | the paper's way | 2.00 | 12 (12.0%) | 7 (7.0%) | - | 30 (30.0%) |",
        "| int2 dense | mse | 2.00 | 12 (12.0%) | 8 (8.0%) † | - | 30 (30.0%) |",
    ]
