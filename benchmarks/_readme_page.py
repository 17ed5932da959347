"""The measured parts of README.md and of docs/reference/results.md, from benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distdiff.report import COLUMNS, number

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

ROWS = {
    "distdiff mean": "distdiff, posterior mean",
    "distdiff, log1p read-out": "distdiff, log1p read-out",
    "distdiff 5 draws": "distdiff, 5 draws",
    "PCA regression": "PCA regression",
    "kNN pool mean": "kNN pool, mean",
    "RePaint, same network 5 draws": "RePaint on the same network, 5 draws",
}
"""Rows of the evaluation that README.md shows, and how it calls them."""

METRICS = {"deviance": "Poisson deviance", "log1p_mse": "log1p MSE", "crps": "CRPS"}
TIMES = {1: "a minute", 2: "two minutes", 3: "three minutes", 4: "four minutes", 5: "five minutes", 6: "six minutes"}


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(found: dict[str, Any]) -> str:
    """The table of the quickstart: the rows of :data:`ROWS`, the best of them in each column bold."""
    rows = {row["imputer"]: row for row in found["table"]["rows"]}
    if missing := [name for name in ROWS if name not in rows]:
        raise ValueError(f"quickstart.json has no row {missing[0]!r}; it has {', '.join(rows)}")
    first = {m: min(ROWS, key=lambda name: rows[name]["values"][m]) for m in METRICS if COLUMNS[m].best == "low"}
    lines = [["imputer", *METRICS.values()], ["---", *["---:"] * len(METRICS)]]
    for name, shown in ROWS.items():
        values, errors = rows[name]["values"], rows[name]["errors"]
        cells = {m: number(values[m], errors[m]) for m in METRICS}
        lines.append([shown, *(f"**{text}**" if first[m] == name else text for m, text in cells.items())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def setting(found: dict[str, Any]) -> str:
    """The line before the table."""
    return f"Half of the entries of {found['table']['setting']['cells']}\nheld-out cells are hidden;"


def million(found: dict[str, Any]) -> str:
    """What a million cells take, scaled up."""
    mean, peak = found["end_to_end_mlp_1000_genes"]["mean"], max(found["peak_mib_by_cells"].values())
    minutes = round(1e6 / mean["cells_per_cpu_second"] / 60)
    return (
        f"The posterior means of a million cells x 1,000 genes take about {TIMES.get(minutes, f'{minutes} minutes')} "
        f"on one CPU core (scaled up from {mean['cells']:,} cells)\nand {peak / 1024:.1f} GiB of memory "
    )


def readme(text: str) -> str:
    """README.md with the numbers of the results."""
    quickstart = result("quickstart")
    text = replaced(text, r"\| imputer \|.*\n(?:\|.*\n)+", table(quickstart) + "\n")
    text = replaced(text, r"Half of the entries of \d+\nheld-out cells are hidden;", setting(quickstart))
    return replaced(
        text, r"The posterior means of a million cells [^(]*\([^)]*\)\nand [\d.]+ GiB of memory ",
        million(result("impute_1000")),
    )  # fmt: skip


def section(found: dict[str, Any]) -> str:
    """The first section of docs/reference/results.md: how it was made, all rows, and who is first."""
    whole, _, last = "\n".join(found["markdown"]).strip().partition("\n+ peeks: ")
    peeks, *claims = last.split("\n")
    lines = [
        f"Made by `distdiff quickstart` ({found['hardware']}; {found['quickstart_cpu_seconds']} s of CPU time) and "
        "`python benchmarks/readme.py`.\nThreads and processors round differently. `★` is the best of a column, "
        "brackets hold the bootstrap\nstandard error of the last digits.",
        whole.strip(), f"`+` peeks: {peeks}", "\n".join(f"- {claim}" for claim in claims),
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n\n"


def results(text: str) -> str:
    """docs/reference/results.md with the quickstart's numbers."""
    return replaced(text, r"(?<=## The table of the quickstart\n\n).*?(?=On two idle cores the quickstart)",
                    section(result("quickstart")))  # fmt: skip


def replaced(text: str, pattern: str, by: str) -> str:
    """``text`` with what ``pattern`` finds, which must stand there once, as ``by``."""
    found = re.findall(pattern, text, re.S if "(?=" in pattern else 0)
    if len(found) != 1:
        raise ValueError(f"{len(found)} places match {pattern!r}, and one is wanted; the page was rewritten by hand")
    return re.sub(pattern, lambda _: by, text, flags=re.S if "(?=" in pattern else 0)


PAGES = {ROOT / "README.md": readme, ROOT / "docs" / "reference" / "results.md": results}
