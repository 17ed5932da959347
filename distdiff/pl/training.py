"""The curve of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distdiff.pl.canvas import ACCENT, GREY, RED, canvas
from distdiff.pl.layers import how_many

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = {
    "val/deviance": ("validation deviance", "Poisson deviance of a hidden entry"),
    "val/loss": ("validation loss", "loss of held-out cells, times even"),
}
POINTS = 1000
"""Validations that a model keeps of its run, at most."""


class Trained(Protocol):
    """What is drawn of a model (:class:`distdiff.model.Model`)."""

    info: dict[str, Any]


def training_curve(
    run: Trained | Sequence[Mapping[str, float]], *, judge: str = "val/deviance", name: str | None = None,
    show: bool | None = None, save: str | Path | None = None, ax: Axes | None = None,
) -> Any:  # fmt: skip
    """Draw training loss, and the validation score that chooses the best weights, against cells seen.

    Parameters
    ----------
    run
        A model, whose ``info["history"]`` holds the curve, or the numbers of each validation: ``cells`` seen, ``loss``,
        and ``judge``.
    judge
        Name of the score; of a model, the one that chose its weights.
    name
        Of the data, for the title (of a model: its store).
    show, save, ax
        See :mod:`distdiff.pl`.

    Returns
    -------
    matplotlib.axes.Axes
        Of the loss; the score stands on a twin of it.

    Raises
    ------
    ValueError
        No validation: a model trained before curves were kept, or an empty list.
    """
    history: list[Mapping[str, float]]
    if not isinstance(run, Sequence):
        info = run.info
        history = list(of_model(info.get("history")))
        judge, name = info.get("judge", judge), name or info.get("store")
    else:
        history = list(run)
    if not history:
        raise ValueError("training_curve: there is no validation to draw (a model of an older distdiff keeps none)")
    seen = np.array([h["cells"] for h in history])
    score = np.array([h[judge] for h in history], dtype=float)
    made = canvas((1, 1), (7, 4), show=show, save=save, ax=ax)
    axes = made.axes[0]
    axes.plot(seen, [h["loss"] for h in history], "s--", color=GREY, ms=3, label="training loss (left)")
    axes.set(xlabel="cells seen", ylabel="training loss")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    right = axes.twinx()
    short, long = SCORES.get(judge, (judge, judge))
    right.plot(seen, score, "o-", color=ACCENT, ms=3, label=f"{short} (right)")
    if np.isfinite(score).any():
        best = int(np.nanargmin(score))
        right.plot(
            seen[best], score[best], "o", mfc="none", mec=RED, ms=10,
            label=f"kept: {score[best]:.4f} at {seen[best]:,.0f} cells",
        )  # fmt: skip
    right.set_ylabel(long)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles=handles, frameon=False, loc="upper right")  # the twin is drawn last
    number = how_many(len(seen), len(seen), "validations")
    made.title(f"Training on {name or 'unnamed data'}: n = {number}, {seen[-1]:,.0f} cells seen")
    return made.done()


def kept(history: Sequence[Mapping[str, float]], judge: str) -> dict[str, list[float]]:
    """The columns of a history that :func:`training_curve` draws, of at most ``POINTS`` validations and the best one.

    Examples
    --------
    >>> kept([{"cells": 64, "loss": 2.0, "val/deviance": 1.0, "lr": 0.1}], "val/deviance")
    {'cells': [64], 'loss': [2.0], 'val/deviance': [1.0]}
    """
    step = max(1, -(-len(history) // POINTS))
    at = set(range(len(history) - 1, -1, -step))
    if history:
        at.add(int(np.nanargmin([h[judge] if np.isfinite(h[judge]) else np.inf for h in history])))
    return {key: [history[i][key] for i in sorted(at)] for key in ("cells", "loss", judge)}


def of_model(columns: Mapping[str, Sequence[float]] | None) -> list[dict[str, float]]:
    """What :func:`kept` made, as one mapping a validation."""
    if not columns:
        return []
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
