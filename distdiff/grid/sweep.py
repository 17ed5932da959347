"""Sweeps of a grid: one row for each value of an option, and a figure of the scores against the values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff.configtext import shown

if TYPE_CHECKING:
    import pandas as pd

FIGURED = {
    "rmse": "1 draw", "spearman": "1 draw", "energy": "1 draw", "swd": "1 draw", "crps": "draws", "deviance": "mean",
    "generate_energy": "cells", "generate_swd": "cells", "generate_correlation": "cells",
    "generate_recognised": "cells", "generate_depth_sd": "cells",
}  # fmt: skip
"""Metrics of the figures, and the answer that they are of."""


def unfolded(item: Mapping[str, Any], where: str) -> list[tuple[str, str | float, dict[str, Any]]]:
    """Key, value and row for each value of ``sweep``, one key at a time: the others stay as the row has them.

    Raises
    ------
    ValueError
        ``sweep`` is no mapping from options to lists of numbers or words, or a value stands twice.

    Examples
    --------
    >>> from distdiff.grid.sweep import unfolded
    >>> unfolded({"train": "quick", "sweep": {"steps": [1, 8]}}, "rows[0]")
    [('steps', 1, {'train': 'quick', 'steps': 1}), ('steps', 8, {'train': 'quick', 'steps': 8})]
    """
    sweep = item["sweep"]
    row = {key: value for key, value in item.items() if key != "sweep"}
    if not isinstance(sweep, Mapping) or not sweep:
        raise ValueError(f"{where}: sweep must map options to values, as in {{steps: [1, 8]}}, got {shown(sweep)}")
    found: list[tuple[str, str | float, dict[str, Any]]] = []
    for key, values in sweep.items():
        if not isinstance(values, list) or not values or not all(isinstance(v, str | int | float) for v in values):
            raise ValueError(f"{where}: sweep of {key} must be a list of numbers or words, got {shown(values)}")
        if len(set(values)) < len(values):
            raise ValueError(f"{where}: sweep of {key} holds a value twice: {shown(values)}")
        found += [(str(key), value, {**row, str(key): value}) for value in values]
    return found


def named(row: str, key: str, value: str | float) -> str:
    """How the row of a value is called.

    Examples
    --------
    >>> from distdiff.grid.sweep import named
    >>> named("distdiff", "steps", 8), named("distdiff", "guidance", 0.5)
    ('distdiff, steps=8', 'distdiff, guidance=0.5')
    """
    return f"{row}, {key}={text(value)}"


def text(value: str | float) -> str:
    """A value of a sweep as words.

    Examples
    --------
    >>> from distdiff.grid.sweep import text
    >>> text(8), text(0.5), text("random")
    ('8', '0.5', 'random')
    """
    return value if isinstance(value, str) else format(value, "g")


def _place(value: str) -> tuple[bool, float, str]:
    """Numbers in rising order, then words."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def figures(lines: pd.DataFrame, headings: Mapping[str, str], folder: Path) -> list[Path]:
    """For each swept option a figure: columns are metrics, rows data sets and protocols, a line for each row swept.

    Values are evenly spaced, in rising order; bars are standard errors.

    Parameters
    ----------
    lines
        Of `distdiff.grid.table.merged`: ``of`` is the row that is swept, ``swept`` the option, ``at`` its value.
    headings
        Of the metrics.
    folder
        Where ``sweep_OPTION.png`` is written.
    """
    from matplotlib.figure import Figure

    from distdiff.pl.canvas import MARKERS, OKABE_ITO, Canvas

    written = []
    swept = lines[(lines.swept != "") & np.isfinite(lines.value)]
    swept = swept[(swept.metric.map(FIGURED) == swept.answer).to_numpy(dtype=bool)]
    for key, part in swept.groupby("swept", sort=False):
        panels = list(part.groupby(["data", "protocol"], sort=False))
        metrics = [m for m in FIGURED if m in set(part.metric)]
        fig = Figure(figsize=(3.1 * len(metrics), 0.7 + 2.7 * len(panels)), layout="constrained")
        axes = fig.subplots(len(panels), len(metrics), squeeze=False)
        rows = list(dict.fromkeys(part.of))
        for across, ((data, protocol), cells) in zip(axes, panels, strict=True):
            values = sorted(set(cells["at"]), key=_place)
            for ax, metric in zip(across, metrics, strict=True):
                for i, row in enumerate(rows):
                    own = cells[(cells.of == row) & (cells.metric == metric)]
                    x = [values.index(value) for value in own["at"]]
                    order = np.argsort(x)
                    ax.errorbar(
                        np.array(x)[order], own.value.to_numpy()[order], own.error.fillna(0).to_numpy()[order],
                        fmt=f"{MARKERS[i % len(MARKERS)]}-", color=OKABE_ITO[i % len(OKABE_ITO)], ms=4, lw=1.2,
                        elinewidth=0.8, label=row,
                    )  # fmt: skip
                ax.set_xticks(range(len(values)), values)
                ax.tick_params(labelsize="small")
                ax.grid(axis="y", alpha=0.3)
                ax.set_xlabel(str(key), fontsize="small")
                ax.set_title(f"{headings[metric]}, {FIGURED[metric]}", fontsize="medium")
            across[0].set_ylabel(f"{data}, {protocol}")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(3, len(rows)), frameon=False)
        path = folder / f"sweep_{key}.png"
        Canvas(list(axes.ravel()), fig, False, path).done()
        written.append(path)
    return written
