"""The records of a grid as a tidy table, Markdown, sentences on who is first, and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff.grid import generate, scores, sweep
from distdiff.report import COLUMNS as OF_ENTRIES
from distdiff.report import number

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {k: c for k, c in OF_ENTRIES.items() if not k.endswith("_seconds")} | scores.COLUMNS
COLUMNS |= generate.COLUMNS
"""Every metric of a grid."""

HEADLINES = {"deviance": "mean", "crps": "draws", "log1p_mse": "mean", "rmse": "mean", "energy": "1 draw"} | {
    "generate_energy": "cells", "generate_swd": "cells"
}  # fmt: skip
"""Metrics that have a figure and a sentence, and the answer that they are of."""

SPENT = ("fit CPU s", "fill CPU s", "peak MiB", "capacity", "trials")
"""What a row took."""


def tidy(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One line for each data set, protocol, row, seed, answer and metric; one without metric where a row did not run.

    Examples
    --------
    >>> from distdiff.grid.table import tidy
    >>> about = {"data": "a", "name": "mcar 50%", "rate": 0.5, "fold": 0, "row": "SAVER", "seed": 0, "ours": False}
    >>> tidy([{**about, "status": "failed", "reason": "no cells", "wanted": ["mean"]}]).loc[0, "reason"]
    'no cells'
    """
    import pandas as pd

    lines = []
    for r in records:
        about = {
            "data": r["data"], "protocol": r["name"], "rate": r["rate"], "fold": r["fold"], "row": r["row"],
            "seed": r["seed"], "ours": r["ours"], "status": r["status"], "reason": r["reason"],
            "capacity": r.get("capacity"), "n_trials": r.get("n_trials"),
            "peak_mib": r.get("peak_mib"), **_of_sweep(r),
        }  # fmt: skip
        if r["status"] != "done":
            empty = {"note": "", "metric": "", "value": math.nan, "error": math.nan}
            spent = {"fit_cpu_seconds": math.nan, "fill_cpu_seconds": math.nan}
            lines += [{**about, "answer": answer, **empty, **spent} for answer in r["wanted"]]
            continue
        for a in r["answers"]:
            spent = {name: a[name] for name in ("fit_cpu_seconds", "fill_cpu_seconds")}
            lines += [
                {**about, "answer": a["answer"], "note": a["note"], "metric": m, "value": v, "error": e, **spent}
                for m, (v, e) in a["numbers"].items()
            ]
    table = pd.DataFrame(lines)
    floats = ["value", "error", "capacity", "n_trials", "peak_mib"]
    table[floats] = table[floats].astype(float)
    return table


def _of_sweep(record: dict[str, Any]) -> dict[str, str]:
    row, key, value = record.get("swept") or (record["row"], "", "")
    return {"of": row, "swept": key, "at": sweep.text(value)}


def merged(table: pd.DataFrame) -> pd.DataFrame:
    """Seeds and folds as one: the mean, and the larger of the bootstrap error and the standard deviation over them.

    Examples
    --------
    >>> from distdiff.grid.table import merged, tidy
    >>> about = {"data": "a", "name": "mcar", "rate": 0.5, "fold": 0, "row": "x", "ours": False, "reason": ""}
    >>> def record(seed, value):
    ...     spent = {"fit_cpu_seconds": 1.0, "fill_cpu_seconds": 0.0, "note": "", "answer": "mean"}
    ...     answer = {**spent, "numbers": {"mae": [value, 0.1]}}
    ...     return {**about, "seed": seed, "status": "done", "answers": [answer]}
    >>> merged(tidy([record(0, 1.0), record(1, 2.0)]))[["value", "error"]].round(2).values.tolist()
    [[1.5, 0.71]]
    """
    keys = ["data", "protocol", "row", "answer", "metric"]
    found = table[table.status == "done"].groupby(keys, sort=False, dropna=False)
    out = found.agg(
        value=("value", "mean"), spread=("value", "std"), error=("error", lambda e: float(np.sqrt((e**2).mean()))),
        note=("note", "first"), ours=("ours", "first"), fit=("fit_cpu_seconds", "mean"),
        fill=("fill_cpu_seconds", "mean"), capacity=("capacity", "first"), of=("of", "first"),
        swept=("swept", "first"), at=("at", "first"), trials=("n_trials", "first"),
        fit_spread=("fit_cpu_seconds", "std"), fill_spread=("fill_cpu_seconds", "std"), peak=("peak_mib", "max"),
    ).reset_index()  # fmt: skip
    out["error"] = out[["error", "spread"]].max(axis=1)
    return out.drop(columns="spread")


def label(row: str, answer: str) -> str:
    """How a line of the table is called.

    Examples
    --------
    >>> from distdiff.grid.table import label
    >>> label("ridge", "mean"), label("ridge", "draws")
    ('ridge', 'ridge, draws')
    """
    return row if answer in ("mean", "cells") else f"{row}, {answer}"


def best(part: pd.DataFrame, metric: str) -> pd.Series | None:
    """The line that is first in a metric, controls left out.

    Examples
    --------
    >>> import pandas as pd
    >>> from distdiff.grid.table import best
    >>> part = pd.DataFrame({"row": ["a", "b"], "metric": ["mae"] * 2, "value": [2.0, 1.0], "note": ["", ""]})
    >>> best(part, "mae").row
    'b'
    """
    some = part[(part.metric == metric) & (part.note != "control") & np.isfinite(part.value)]
    rule = COLUMNS[metric].best
    if some.empty or rule == "none":
        return None
    order = some.value.abs() if rule == "zero" else -some.value if rule == "high" else some.value
    return some.loc[order.idxmin()]


def claims(lines: pd.DataFrame) -> list[str]:
    """For every data set, protocol and headline metric: who is first, and where our own best row stands.

    Examples
    --------
    >>> import pandas as pd
    >>> from distdiff.grid.table import claims
    >>> lines = pd.DataFrame({
    ...     "data": ["a", "a"], "protocol": ["mcar", "mcar"], "row": ["ridge", "distdiff"], "answer": ["mean", "mean"],
    ...     "metric": ["rmse", "rmse"], "value": [1.0, 1.1], "error": [0.1, 0.2], "note": ["", ""],
    ...     "ours": [False, True],
    ... })
    >>> claims(lines)
    ['a, mcar, RMSE of the mean: ridge is first (1.00(10)); distdiff 1.10(20), within one standard error']
    """
    out = []
    for (data, protocol), part in lines.groupby(["data", "protocol"], sort=False):
        for metric, answer in HEADLINES.items():
            column = part[(part.metric == metric) & (part.answer == answer)]
            first = best(column, metric)
            if first is None:
                continue
            text = (
                f"{data}, {protocol}, {COLUMNS[metric].heading} of the {answer}: {first.row} is first "
                f"({number(first.value, first.error)}{', which peeks' if first.note == 'peeks' else ''})"
            )
            mine = best(column[column.ours.astype(bool)], metric)
            if mine is not None and not first.ours:
                within = "" if abs(mine.value - first.value) <= max(mine.error, first.error) else "not "
                text += f"; {mine.row} {number(mine.value, mine.error)}, {within}within one standard error"
            out.append(text)
    return out


def markdown(table: pd.DataFrame, setting: dict[str, str]) -> str:
    """Tables by data set and protocol, the first of each column bold, standard errors in brackets; then the sentences.

    Parameters
    ----------
    table
        Of :func:`tidy`.
    setting
        Data set and protocol -> a line on them.
    """
    lines = merged(table)
    parts = []
    for (data, protocol), whole in table.groupby(["data", "protocol"], sort=False):
        part = lines[(lines.data == data) & (lines.protocol == protocol)]
        missing = whole[whole.status != "done"].drop_duplicates(["row", "answer"])
        metrics = [m for m in COLUMNS if m in set(part.metric)]
        head = ["row", *(COLUMNS[m].heading for m in metrics), *SPENT]
        first = {m: best(part, m) for m in metrics}
        body = []
        lead = "deviance" if "deviance" in metrics else "generate_energy"
        order = part[part.metric == lead].sort_values("value", kind="stable")
        for control in (False, True):
            for _, at in order[(order.note == "control") == control].iterrows():
                own = part[(part.row == at.row) & (part.answer == at.answer)].set_index("metric")
                cells = [_cell(own, m, first[m]) for m in metrics]
                seconds = [number(*pair) for pair in ((at.fit, at.fit_spread), (at.fill, at.fill_spread))]
                spent = [*seconds, *(_whole(value) for value in (at.peak, at.capacity, at.trials))]
                body.append([label(at.row, at.answer) + (" +" if at.note == "peeks" else ""), *cells, *spent])
        body += [
            [label(r.row, r.answer), r.status, *["-"] * (len(head) - 2)] for r in missing.itertuples()
        ]  # fmt: skip
        parts.append(f"## {data}, {protocol}\n\n{setting.get(f'{data}, {protocol}', '')}\n\n{_block(head, body)}")
        reasons = dict.fromkeys(f"- {r.row}: {r.status}: {r.reason}" for r in missing.itertuples())
        if reasons:
            parts.append("Rows that did not run:\n\n" + "\n".join(reasons))
    sentences = claims(lines)
    notes = (
        "`+` peeks: labels were made from the full counts. CPU seconds are of the process that computes; those of "
        "a `+ NB` row hold its fits of the row. Peak MiB: most memory of that process. Capacity: weights of a network. "
        "Trials: most combinations of options that are compared."
    )
    return "\n\n".join(["# Results of the grid", *parts, "\n".join(f"- {s}" for s in sentences), notes]) + "\n"


def _cell(own: pd.DataFrame, metric: str, first: Any) -> str:
    if metric not in own.index:
        return "-"
    at = own.loc[metric]
    text = number(at.value, at.error)
    return f"**{text}**" if first is not None and (at.row, at.answer) == (first.row, first.answer) else text


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def _block(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def figure(lines: pd.DataFrame, metric: str, save: Path) -> bool:
    """A headline metric with standard errors, a panel for each data set and protocol; ``False``: nothing to draw.

    Controls are left out; so are rows more than ten times as far from the best as the median one, which would hide the
    rest (their values stand in the table).
    """
    from matplotlib.figure import Figure

    from distdiff.pl.canvas import ACCENT, GREY, Canvas

    part = lines[(lines.metric == metric) & (lines.answer == HEADLINES[metric]) & (lines.note != "control")]
    part = part[np.isfinite(part.value)]
    panels = list(part.groupby(["data", "protocol"], sort=False))
    if not panels:
        return False
    most = max(len(rows) for _, rows in panels)
    fig = Figure(figsize=(5.2 * len(panels), 1.2 + 0.26 * most), layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, ((data, protocol), rows) in zip(axes, panels, strict=True):
        rows = rows.sort_values("value", ascending=False)
        away = rows.value - rows.value.min()
        rows = rows[away <= 10 * max(away.median(), 1e-12)]
        names = [label(r.row, r.answer) for r in rows.itertuples()]
        ax.errorbar(
            rows.value, np.arange(len(rows)), xerr=rows.error.fillna(0), fmt="none", ecolor=GREY, elinewidth=1.2
        )
        colours = [ACCENT if mine else GREY for mine in rows.ours]
        ax.scatter(rows.value, np.arange(len(rows)), c=colours, s=28, zorder=3)
        ax.set_yticks(np.arange(len(rows)), names, fontsize="small")
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(f"{data}, {protocol}", fontsize="medium")
        ax.set_xlabel(f"{COLUMNS[metric].heading} of the {HEADLINES[metric]}")
    Canvas(list(axes), fig, False, save).done()
    return True
