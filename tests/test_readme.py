"""README.md and docs/reference/results.md hold the numbers of benchmarks/results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import loaded

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def page():
    return loaded(ROOT / "benchmarks" / "_readme_page.py")


def test_the_pages_are_those_of_the_results(page):
    assert set(page.PAGES) == {ROOT / "README.md", ROOT / "docs" / "reference" / "results.md"}
    for path, made in page.PAGES.items():
        assert made(path.read_text()) == path.read_text(), "run python benchmarks/readme.py"


def test_other_numbers_are_put_in(page):
    text = (ROOT / "README.md").read_text()
    other = text.replace("four minutes", "nine minutes").replace("| PCA regression | 0", "| PCA regression | 7")
    assert other != text
    assert page.readme(other) == text
    whole = (ROOT / "docs" / "reference" / "results.md").read_text()
    assert page.results(whole.replace("| ridge | 1", "| ridge | 8")) == whole


def test_the_best_of_a_column_is_bold(page):
    names = list(page.ROWS)
    rows = [
        {
            "imputer": name,
            "values": dict.fromkeys(page.METRICS, 1.0 + (i != 2)),
            "errors": dict.fromkeys(page.METRICS, 0.1),
        }
        for i, name in enumerate(names)
    ]
    lines = page.table({"table": {"rows": rows}}).splitlines()
    assert lines[4] == f"| {page.ROWS[names[2]]} | **1.00(10)** | **1.00(10)** | **1.00(10)** |"
    assert sum("**" in line for line in lines) == 1
    with pytest.raises(ValueError, match=r"quickstart\.json has no row 'distdiff mean'"):
        page.table({"table": {"rows": rows[1:]}})


def test_a_page_rewritten_by_hand_is_said(page):
    with pytest.raises(ValueError, match="0 places match"):
        page.readme("no table")
