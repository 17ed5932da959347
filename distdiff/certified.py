"""A certificate: its items, their verdict, and how it is printed and written."""

from __future__ import annotations

import base64
import html
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdiff import files, metrics
from distdiff.report import Report, number, text_block

STATUSES = ("pass", "look", "fail")

FEW = 0.01
"""Share of the molecules below which a band of predicted expression is looked at, and does not fail a model."""

PLURAL = {"expression": "tenths of genes by expression", "depth": "fifths of cells by depth", "group": "groups of 50 "
          "cells or more", "batch": "batches of 50 cells or more"}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One thing that was tested.

    Attributes
    ----------
    part
        Question that it belongs to.
    name
        What was tested.
    status
        ``pass``, ``look`` (read the sentence before you rely on it) or ``fail``.
    value
        The number that decided.
    sentence
        What it means.
    rows
        Numbers behind it, for tables.

    Examples
    --------
    >>> from distdiff.certified import Item
    >>> Item("Are its numbers right on average?", "zeros", "pass", 0.01, "As many zeros as expected.").status
    'pass'
    """

    part: str
    name: str
    status: str
    value: float
    sentence: str
    rows: Iterable[dict[str, Any]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} of {self.name!r}: {', '.join(STATUSES)} are known")


@dataclass(frozen=True)
class Certificate:
    """What `distdiff.certify` found.

    Attributes
    ----------
    verdict
        The worst status, and a sentence.
    items
        Everything that was tested.
    scores
        Mean deviance, CRPS and log score of a hidden count: method -> score -> value.
    about
        Data, model, numbers of cells and genes, seed, cost, versions.
    notes
        What else is to be known.
    sample
        Hidden counts of some cells, for the figure.

    Examples
    --------
    >>> from distdiff.certified import Certificate, Item, verdict
    >>> items = [Item("", "zeros", "pass", 0.01, "")]
    >>> Certificate(verdict(items), items, {}, {}, []).status
    'pass'
    """

    verdict: str
    items: list[Item]
    scores: dict[str, dict[str, float]]
    about: dict[str, Any]
    notes: list[str]
    sample: Report | None = field(default=None, repr=False)

    @property
    def status(self) -> str:
        """The worst status of all items."""
        return worst(self.items)

    def to_text(self) -> str:
        """The verdict, every item in a sentence, and the table of scores."""
        lines = [f"verdict: {self.verdict}", self.setting(), *(f"note: {note}" for note in self.notes)]
        for part in dict.fromkeys(item.part for item in self.items):
            lines += ["", part]
            lines += [f"  {i.status:<4}  {i.name}: {i.sentence}" for i in self.items if i.part == part]
        head = ["a hidden count", "deviance", "CRPS", "log score"]
        body = [[name, *(number(v) for v in scores.values())] for name, scores in self.scores.items()]
        return "\n".join([*lines, "", text_block(head, body)]) + "\n"

    def setting(self) -> str:
        """One line on what was scored, and at what cost."""
        a = self.about
        trained = f"{a['trained_left_out']:,} trained on {'kept' if a['trained_kept'] else 'left out'}"
        return (
            f"{a['cells']:,} cells x {a['genes']:,} genes of {Path(a['where']).name} (data {a['data']}; {trained}), "
            f"half of the entries hidden, {a['draws']} draws; groups: {a['groups']}; model {a['weights']}; "
            f"seed {a['seed']}; {a['cpu_seconds']:.0f} CPU seconds"
        )

    def to_json(self, path: str | Path) -> None:
        """Everything but the figures, as JSON."""
        whole = {
            "verdict": self.verdict, "status": self.status, "about": self.about, "notes": self.notes,
            "scores": self.scores, "items": [{**vars(item), "rows": list(item.rows)} for item in self.items],
        }  # fmt: skip
        with files.whole(path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(_plain(whole), indent=1))

    def to_html(self) -> str:
        """A page that stands alone: no other file, no script, fit for a phone."""
        parts = [_items_html(self.items, part) for part in dict.fromkeys(item.part for item in self.items)]
        text = html.escape(self.to_text()[self.to_text().rfind("a hidden count") :])
        about = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
                        for k, v in self.about.items())  # fmt: skip
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        figures = "".join(
            f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            for alt, png in self.figures().items()
        )
        return PAGE.format(
            status=self.status, verdict=html.escape(self.verdict), setting=html.escape(self.setting()), notes=notes,
            figures=figures, parts="".join(parts), scores=text, about=about,
        )  # fmt: skip

    def figures(self) -> dict[str, bytes]:
        """PNG files: calibration, coverage in parts of the data."""
        from distdiff import pl

        found = {}
        with tempfile.TemporaryDirectory(prefix="distdiff-") as folder:
            if self.sample is not None:
                pl.calibration(self.sample, name=Path(self.about["where"]).name, save=f"{folder}/a.png")
                found["calibration on hidden counts of the first cells"] = Path(f"{folder}/a.png").read_bytes()
            _coverage_figure(self.items, f"{folder}/b.png")
            found["coverage of 95 % intervals in parts of the data"] = Path(f"{folder}/b.png").read_bytes()
        return found

    def write(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``certificate.html``, ``.json`` and ``.txt`` into ``folder``; it appears when complete."""
        with files.whole(folder, overwrite=overwrite) as temporary:
            temporary.mkdir()
            (temporary / "certificate.txt").write_text(self.to_text())
            (temporary / "certificate.html").write_text(self.to_html())
            self.to_json(temporary / "certificate.json")
        return Path(folder)


def worst(items: Sequence[Item]) -> str:
    """The worst status of some items.

    Examples
    --------
    >>> from distdiff.certified import Item, worst
    >>> worst([Item("", "a", "pass", 0.0, ""), Item("", "b", "look", 0.0, "")])
    'look'
    """
    return max((item.status for item in items), key=STATUSES.index)


def verdict(items: Sequence[Item]) -> str:
    """The worst status, and which items have it.

    Examples
    --------
    >>> from distdiff.certified import Item, verdict
    >>> verdict([Item("", "zeros", "fail", 0.3, ""), Item("", "tails", "pass", 0.0, "")])
    'fail: 1 of 2 items failed (zeros); do not rely on this model for these cells'
    """
    bad = worst(items)
    names = ", ".join(item.name for item in items if item.status == bad)
    n = sum(item.status == bad for item in items)
    if bad == "fail":
        return f"fail: {n} of {len(items)} items failed ({names}); do not rely on this model for these cells"
    if bad == "look":
        return f"look: nothing failed, {n} of {len(items)} items are to be looked at ({names})"
    return f"pass: all {len(items)} items"


def status(value: float, good: float, bad: float, condition: bool = True) -> str:
    """``pass`` up to ``good`` (where ``condition`` holds), ``fail`` beyond ``bad`` or without a number, else ``look``.

    Examples
    --------
    >>> from distdiff.certified import status
    >>> [status(value, 0.1, 0.3) for value in (0.05, 0.2, 0.4, float("nan"))]
    ['pass', 'look', 'fail', 'fail']
    """
    if not value <= bad:
        return "fail"
    return "pass" if value <= good and condition else "look"


def bands(values: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """Which of ``n`` equally large bands each value is in, from 0.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.certified import bands
    >>> bands(np.array([5.0, 1.0, 9.0, 2.0]), 2)
    array([1, 0, 1, 0])
    """
    order = np.empty(len(values), dtype=np.int64)
    order[np.argsort(values, kind="stable")] = np.arange(len(values))
    return order * n // max(len(values), 1)


def coverage_rows(
    stratum: np.ndarray, u: NDArray[np.floating], cell: NDArray[np.int64], levels: NDArray[np.floating]
) -> list[dict[str, Any]]:  # fmt: skip
    """Coverage of central intervals in each stratum of hidden entries that has 50 cells or more.

    Parameters
    ----------
    stratum, u, cell
        ``[n]`` of each entry: its stratum, its PIT (`distdiff.metrics.pit`) and its cell.
    levels
        Nominal levels.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.certified import coverage_rows
    >>> u = np.linspace(0, 1, 1001)
    >>> coverage_rows(np.repeat("B", 1001), u, np.arange(1001), np.array([0.95]))[0]["95 %"].round(2)
    np.float64(0.95)
    """
    rows = []
    for name in np.unique(stratum):
        at = stratum == name
        if (cells := len(np.unique(cell[at]))) >= 50:
            found = metrics.coverage(u[at], levels)
            of = f"{int(name) + 1} of {len(np.unique(stratum))}" if isinstance(name, np.integer) else str(name)
            rows.append({"of": of, "cells": cells, **{f"{p:.0%}".replace("%", " %"): v for p, v in
                                                      zip(levels, found, strict=True)}})  # fmt: skip
    return rows


def mean_rows(mean: NDArray[np.floating], truth: NDArray[np.floating], n: int = 10) -> list[dict[str, float]]:
    """Molecules expected and seen in bands of the predicted mean, with the standard error of those seen.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.certified import mean_rows
    >>> [row["ratio"] for row in mean_rows(np.array([1.0, 1.0, 4.0, 4.0]), np.array([1.0, 1.0, 8.0, 8.0]), 2)]
    [1.0, 2.0]
    """
    rows = []
    for i, at in enumerate(np.array_split(np.argsort(mean, kind="stable"), n)):
        if len(at):
            expected, seen = float(mean[at].sum(dtype=np.float64)), float(truth[at].sum(dtype=np.float64))
            error = float(np.sqrt(np.maximum((truth[at] - mean[at]) ** 2, mean[at]).sum(dtype=np.float64)))
            rows.append({"band": i + 1, "expected": expected, "seen": seen, "error": error,
                         "ratio": seen / max(expected, 1e-12)})  # fmt: skip
    return rows


def furthest_off(rows: list[dict[str, float]]) -> tuple[float, float]:
    """The largest factor between molecules seen and expected that is more than chance, of all bands and of full ones.

    Full are bands with at least ``FEW`` of the molecules of all; ``rows`` are those of :func:`mean_rows`.

    Examples
    --------
    >>> from distdiff.certified import furthest_off
    >>> few = {"expected": 2.0, "seen": 12.0, "error": 2.0, "ratio": 6.0}
    >>> furthest_off([few, {"expected": 5000.0, "seen": 4000.0, "error": 90.0, "ratio": 0.8}])
    (6.0, 1.25)
    """
    off = [row for row in rows if abs(row["seen"] - row["expected"]) > 3 * row["error"]]
    least = FEW * sum(row["seen"] for row in rows)
    full = [row for row in off if max(row["seen"], row["expected"]) >= least]

    def furthest(bands: list[dict[str, float]]) -> float:
        return max((max(row["ratio"], 1 / max(row["ratio"], 1e-9)) for row in bands), default=1.0)

    return furthest(off), furthest(full)


def _plain(tree: Any) -> Any:
    """The same in the types that JSON has; numbers that it has not are null."""
    if isinstance(tree, dict):
        return {k: _plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(v) for v in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _items_html(items: Sequence[Item], part: str) -> str:
    found = [f"<h2>{html.escape(part)}</h2>"]
    for item in (i for i in items if i.part == part):
        found.append(
            f'<div class="item {item.status}"><b>{html.escape(item.name)}</b> <span>{item.status}</span>'
            f"<p>{html.escape(item.sentence)}</p>{_table(list(item.rows))}</div>"
        )
    return "".join(found)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = ["".join(f"<th>{html.escape(str(k))}</th>" for k in rows[0])]
    lines += [
        "".join(f"<td>{f'{v:.4g}' if isinstance(v, float) else html.escape(str(v))}</td>" for v in row.values())
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<details><summary>numbers</summary><div class='wide'><table>{body}</table></div></details>"


def _coverage_figure(items: Sequence[Item], path: str) -> None:
    """Coverage of 95 % intervals of every part of the data, one point each."""
    from distdiff.pl.canvas import ACCENT, INK, PALE, canvas

    shown = [i for i in items if i.name.startswith("coverage by")]
    names, values, edges = [], [], []
    for item in shown:
        kind = item.name.removeprefix("coverage by ")
        names += [f"{kind}: {row['of']}" for row in item.rows]
        values += [row["95 %"] for row in item.rows]
        edges.append(len(names))
    made = canvas((1, 1), (7, 1.2 + 0.24 * max(len(names), 1)), show=False, save=path, ax=None)
    axes = made.axes[0]
    axes.axvspan(0.90, 0.99, color=PALE, label="allowed")
    axes.axvline(0.95, color=INK, lw=1)
    axes.plot(values, np.arange(len(names)), "o", color=ACCENT)
    for edge in edges[:-1]:
        axes.axhline(edge - 0.5, color=INK, lw=0.5)
    axes.set(
        yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5), xlim=(min([0.85, *values]) - 0.01, 1.0),
        xlabel="share of hidden counts in their 95 % interval",
    )  # fmt: skip
    axes.set_yticklabels(names, fontsize=8)
    made.title("Coverage of 95 % intervals in parts of the data")
    made.done()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>distdiff certificate: {status}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #22303c; max-width: 46rem; margin: 1rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }} img {{ max-width: 100%; height: auto }}
.item {{ border-left: 6px solid #8a9aa6; padding: .1rem .8rem; margin: .8rem 0 }} .item p {{ margin: .2rem 0 }}
.pass {{ border-color: #009E73 }} .look {{ border-color: #E69F00 }} .fail {{ border-color: #D55E00 }}
.item span {{ font-variant: small-caps; font-weight: bold }} .wide, pre {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .85rem }} td, th {{ padding: .1rem .6rem; text-align: left }}
</style></head><body>
<h1 class="item {status}">{verdict}</h1><p>{setting}</p>{notes}{figures}{parts}
<h2>Scores</h2><pre>{scores}</pre><h2>About</h2><div class="wide"><table>{about}</table></div>
</body></html>
"""
