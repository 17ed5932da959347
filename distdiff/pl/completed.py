"""Plot of what is expected of the genes that a panel lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff.pl.canvas import ACCENT, GREY, INK, PALE, RED, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

COLOURS = {"reliable": ACCENT, "weak": "#E69F00", "not reliable": RED, "unknown": GREY}
"""Of the verdicts on a gene."""


def panel(
    table: DataFrame, *, name: str = "", show: bool | None = None, save: str | Path | None = None,
    ax: Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Draw the expected reliability of every gene that a panel lacks: by rank, and by expression.

    Parameters
    ----------
    table
        Of :class:`distdiff.reliability.PanelReport`.
    name
        Of the query, for the title.
    show, save, ax
        See :mod:`distdiff.pl`.

    Returns
    -------
    list of matplotlib.axes.Axes
        Correlation by rank with its interval; by molecules a cell, with the highest that counts allow.

    Examples
    --------
    >>> import pandas as pd
    >>> from distdiff import pl
    >>> scores = {"correlation": 0.6, "correlation_low": 0.5, "correlation_high": 0.7, "mean": 1.2, "ceiling": 0.8}
    >>> len(pl.panel(pd.DataFrame({**scores, "reliability": ["reliable"]}, index=["CD3E"]), save="panel.png"))
    2
    """
    made = canvas((1, 2), (11, 4.6), show=show, save=save, ax=ax)
    ranked, expressed = made.axes
    known = table[table["correlation"].notna()].sort_values("correlation", ascending=False)
    rank = np.arange(1, len(known) + 1)
    ranked.fill_between(rank, known["correlation_low"], known["correlation_high"], color=PALE, label="95 % interval")
    order = np.argsort(known["mean"].to_numpy())
    expressed.plot(known["mean"].to_numpy()[order], known["ceiling"].to_numpy()[order], ".", color=PALE, ms=3,
                   label="the most that Poisson counts allow")  # fmt: skip
    for verdict, colour in COLOURS.items():
        these = (known["reliability"] == verdict).to_numpy()
        if these.any():
            label = f"{verdict} ({these.sum():,})"
            ranked.plot(rank[these], known["correlation"][these], ".", color=colour, ms=4, label=label)
            expressed.plot(known["mean"][these], known["correlation"][these], ".", color=colour, ms=4)
    for axes in made.axes:
        axes.axhline(0, color=INK, lw=0.7)
        axes.set_ylim(min(-0.1, float(known["correlation_low"].min()) if len(known) else 0), 1)
    ranked.set(xlabel="genes that the panel lacks, by rank", ylabel="expected correlation with counts")
    expressed.set(xlabel="molecules a cell at this depth", xscale="log" if len(known) else "linear")
    ranked.legend(frameon=False, fontsize=8)
    expressed.legend(frameon=False, fontsize=8)
    made.title(f"{name or 'panel'}: n = {len(table):,} genes that it lacks, and what is expected of them")
    return made.done()
