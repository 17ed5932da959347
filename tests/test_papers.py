"""docs/papers.md: made from the results, with every row and a word on each published one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import loaded

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made():
    return loaded(ROOT / "benchmarks" / "_papers_page.py")


def test_the_page_is_that_of_the_results(made):
    assert made.page() == (ROOT / "docs" / "papers.md").read_text(), "run python benchmarks/papers.py page"


def test_the_page_holds_every_row_of_the_results(made):
    page = made.page()
    paths = sorted((ROOT / "benchmarks" / "results").glob("papers_*.json"))
    assert paths
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            assert f"| {row['row']}" in page or f"- {row['row']}: {row.get('status')}" in page, (path.name, row["row"])
    for facts in (made.PARTICULAR, made.PARTICULAR_SCIDPMS):
        assert all(f"- **{name}**: " in page for name in facts)


def test_a_row_is_first_by_its_column_and_no_control_is(made):
    def row(name, rmse, bias, note="", ours=False):
        scores = {"rmse": [rmse, 0.1], "bias": [bias, None]}
        return {"row": name, "answer": "mean", "note": note, "ours": ours, "scores": scores}

    rows = [row("zero", 0.5, 0.0, "control"), row("a", 1.0, -0.2), row("distdiff", 1.05, 0.1, ours=True)]
    assert made.best(rows, "rmse")["row"] == "a"
    assert made.best(rows, "bias")["row"] == "distdiff"
    assert made.verdicts(rows) == [
        "RMSE of the mean: a is first (1.00(10)); distdiff 1.05(10), within one standard error."
    ]
    assert made.verdicts([row("a", 1.0, 0.0), row("distdiff", 2.0, 0.0, ours=True)])[0].endswith(
        "not within one standard error."
    )
