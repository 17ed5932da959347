"""Results of an evaluation: a tidy table, aligned text, Markdown, JSON, and sentences on which imputer is first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distdiff import files, metrics

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Column:
    """One metric: its heading, which value is best (``low``, ``high``, ``zero`` or ``none``), and its block.

    Examples
    --------
    >>> from distdiff.report import COLUMNS
    >>> COLUMNS["crps"]
    Column(heading='CRPS', best='low', block='laws')
    """

    heading: str
    best: str
    block: str


COLUMNS = {
    "deviance": Column("deviance", "low", "means"),
    "log1p_mse": Column("log1p MSE", "low", "means"),
    "rmse": Column("RMSE", "low", "means"),
    "mae": Column("MAE", "low", "means"),
    "bias": Column("bias", "zero", "means"),
    "pearson": Column("Pearson", "high", "means"),
    "spearman": Column("Spearman", "high", "means"),
    "crps": Column("CRPS", "low", "laws"),
    "energy": Column("energy dist.", "low", "laws"),
    "mmd": Column("MMD^2 x 1000", "low", "laws"),
    "swd": Column("sliced W2", "low", "laws"),
    "correlation": Column("corr. error", "low", "laws"),
    "fit_seconds": Column("fit s", "none", "laws"),
    "fill_seconds": Column("fill s", "none", "laws"),
}
BLOCKS = {
    "means": "Scores of the answer as a point (Poisson deviance is the headline for means)",
    "laws": "Scores of the answer as a law (CRPS is the headline for draws)",
}


@dataclass
class Row:
    """One line of the table.

    Attributes
    ----------
    values, errors
        Metric -> value, and its standard error by bootstrap over cells.
    replicates
        Metric -> ``float64 [R]``; the same resamples for every row, so differences are paired.
    note
        ``control``, ``peeks`` (it uses something made from the hidden entries) or nothing.
    calls
        Network calls of a draw; 0 without a network.

    Examples
    --------
    >>> from distdiff.report import Row
    >>> Row("gene mean", {"deviance": 0.91}, {"deviance": 0.01}, {}, note="").values["deviance"]
    0.91
    """

    name: str
    values: dict[str, float]
    errors: dict[str, float]
    replicates: dict[str, NDArray[np.float64]]
    note: str = ""
    calls: int = 0


@dataclass
class Report:
    """The table, and the arrays that its figures need.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.report import COLUMNS, Report, Row
    >>> row = Row("gene mean", dict.fromkeys(COLUMNS, 0.5), {}, {})
    >>> setting = {"cells": 2, "genes": 3, "store": "", "data": "4f2a", "protocol": "mcar", "rate": 0.5, "targets": 3,
    ...            "zeros_among_targets": 0.0, "seed": 0, "draws": 5}  # fmt: skip
    >>> report = Report([row], setting, np.zeros((2, 3), np.float32), np.ones((2, 3), dtype=bool))
    >>> print(report.to_text().splitlines()[0][:45])
    2 held-out cells x 3 genes of a store (4f2a),
    """

    rows: list[Row]
    setting: dict[str, Any]
    truth: NDArray[np.float32]
    targets: NDArray[np.bool_]
    mean: NDArray[np.float32] | None = None
    draws: NDArray[np.float32] | None = None
    ours: str = "distdiff"
    genes: DataFrame | None = None
    """Of hidden genes: what was expected of each, and what came true (`distdiff.reliability.agreement`)."""

    @property
    def table(self) -> Any:
        """Tidy ``pandas.DataFrame``: imputer, metric, value, error, note."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"imputer": r.name, "metric": m, "value": r.values[m], "error": r.errors.get(m), "note": r.note}
                for r in self.rows
                for m in COLUMNS
            ]
        )

    def claims(self) -> list[str]:
        """Sentences on the main metrics: which imputer is first, and whether the order is stable under resampling."""
        k = self.setting["draws"]
        wanted = (("deviance", "mean"), ("crps", f"{k} draws"), ("energy", "1 draw"))
        names = {"deviance": "Poisson deviance", "crps": "CRPS", "energy": "energy distance"}
        out = []
        for metric, suffix in wanted:
            mine = next((r for r in self.rows if r.name == f"{self.ours} {suffix}"), None)
            rivals = [r for r in self.rows if not r.note.startswith("control") and not r.name.startswith(self.ours)]
            rivals = [r for r in rivals if math.isfinite(r.values[metric])]
            if mine is None or not rivals:
                continue
            rival = min(rivals, key=lambda r: r.values[metric])
            low, high = np.nanquantile(rival.replicates[metric] - mine.replicates[metric], [0.025, 0.975])
            ahead = mine.values[metric] < rival.values[metric]
            sure = low > 0 if ahead else high < 0
            known = ", which peeks" if rival.note == "peeks" else ""
            out.append(
                f"{mine.name} is {'first' if ahead else 'NOT first'} in {names[metric]}: "
                f"{mine.values[metric]:.4g} against {rival.values[metric]:.4g} of {rival.name}{known} (95 % of "
                f"resamples: difference {low:.3g} to {high:.3g}"
                f"{'' if sure else '; not a safe order'})"
            )
        if found := self.setting.get("reliability"):
            ranked = found["rank_correlation"]
            out.append(
                f"reliability of {found['genes_known']:,} genes, expected from validation cells and real, "
                f"{found['folds']} folds: rank correlation {ranked['correlation']:.2f} (of correlations), "
                f"{ranked['deviance_explained']:.2f} (of deviance explained); 95 % intervals hold "
                f"{found['coverage']:.1%} of hidden counts"
            )
        return out

    def to_text(self) -> str:
        """Aligned text; ``*`` marks the best of a column, brackets hold the standard error of the last digits."""
        return self._render(text_block)

    def to_markdown(self) -> str:
        """The same as Markdown tables."""
        return self._render(_markdown_block)

    def metrics(self) -> dict[str, float]:
        """Metrics of the rows of ``ours``, for tracking: ``test/<metric>/<row>``."""
        mine = (r for r in self.rows if r.name.startswith(self.ours))
        return {f"test/{m}/{r.name}": r.values[m] for r in mine for m in COLUMNS}

    def to_json(self, path: str | Path) -> None:
        """Setting, rows and claims as JSON."""
        rows = [{"imputer": r.name, "note": r.note, "values": r.values, "errors": r.errors} for r in self.rows]
        text = json.dumps({"setting": self.setting, "rows": rows, "claims": self.claims()}, indent=1)
        with files.whole(path, overwrite=True) as temporary:
            temporary.write_text(text)

    def write(self, folder: str | Path) -> Path:
        """Write ``table.md``, ``table.json``, of hidden genes ``genes.csv``, and the figures into ``folder``.

        It appears when complete.
        """
        from distdiff import pl

        with files.whole(folder, overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / "table.md").write_text(self.to_markdown())
            self.to_json(temporary / "table.json")
            if self.genes is not None:
                self.genes.to_csv(temporary / "genes.csv")
            if self.draws is not None and self.mean is not None:
                pl.calibration(self, save=temporary / "calibration.png")
            if any(row.calls for row in self.rows):
                pl.score_by_calls(self, save=temporary / "score_by_calls.png")
        return Path(folder)

    def _render(self, block: Callable[[list[str], list[list[str]]], str]) -> str:
        competing = sorted((r for r in self.rows if not r.note.startswith("control")), key=_by_deviance)
        controls = sorted((r for r in self.rows if r.note.startswith("control")), key=_by_deviance)
        parts = [_describe(self.setting)]
        for name, title in BLOCKS.items():
            keys = [m for m, c in COLUMNS.items() if c.block == name]
            best = {m: _best(competing, m) for m in keys}
            body = [
                [f"{r.name}{' +' if r.note == 'peeks' else ''}", *(_cell(r, m, best[m]) for m in keys)]
                for r in [*competing, *controls]
            ]
            parts.append(f"{title}\n\n{block(['imputer', *(COLUMNS[m].heading for m in keys)], body)}")
        parts.append("\n".join(["+ peeks: the labels were made from the full counts", *self.claims()]))
        return "\n\n".join(parts) + "\n"


def _by_deviance(row: Row) -> float:
    return row.values["deviance"]


def _best(rows: Sequence[Row], metric: str) -> float:
    values = [r.values[metric] for r in rows if math.isfinite(r.values[metric])]
    rule = COLUMNS[metric].best
    if not values or rule == "none":
        return math.nan
    if rule == "zero":
        return min(values, key=abs)
    return max(values) if rule == "high" else min(values)


def _cell(row: Row, metric: str, best: float) -> str:
    value, error = row.values[metric], row.errors.get(metric, math.nan)
    star = "*" if value == best and not row.note.startswith("control") else ""
    return number(value, error) + star


def number(value: float, error: float = math.nan) -> str:
    """``0.9502(31)``: the value and, in brackets, two digits of its standard error in units of the last digits.

    Examples
    --------
    >>> from distdiff.report import number
    >>> number(0.95023, 0.0031), number(1234.5, 31.0), number(float("nan"))
    ('0.9502(31)', '1234(31)', '-')
    """
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(error) or error <= 1e-12 or error < 1e-6 * abs(value):
        return f"{value:.3g}"
    places = 1 - math.floor(math.log10(float(f"{error:.1e}")))  # rounded first: .00999 is shown as .010
    if places <= 0:
        return f"{value:.0f}({error:.0f})"
    return f"{value:.{places}f}({round(error * 10**places)})"


def _describe(s: dict[str, Any]) -> str:
    trained = s.get("trained_on", 0)
    seen = f" Cells that the model was trained on: {trained}" if trained else ""
    seen += f", {'kept' if s.get('trained_on_kept') else 'left out'}." if isinstance(trained, int) and trained else ""
    return (
        f"{s['cells']} held-out cells x {s['genes']} genes of {s['store'] or 'a store'} ({s['data']}), protocol "
        f"{s['protocol']}, {s['rate']:.0%} hidden: {s['targets']:,} entries scored, {s['zeros_among_targets']:.0%} of "
        f"them zero; seed {s['seed']}. MMD, sliced W2 and correlations on log1p counts of completed cells; "
        f"deviance takes means below {metrics.DEVIANCE_FLOOR:g} as that.{seen}"
    )


def text_block(head: list[str], body: list[list[str]]) -> str:
    """Lines of aligned text: the heading, a rule, the rows.

    Examples
    --------
    >>> from distdiff.report import text_block
    >>> print(text_block(["imputer", "MAE"], [["zero", "2.5"]]))
    imputer  MAE
    ------------
    zero     2.5
    """
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join([line[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(line[1:], width[1:], strict=True))])
        for line in [head, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _markdown_block(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("*", "**★**")
