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
