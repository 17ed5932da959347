"""Plots of the predictive law: calibration of hidden counts, and the score that more network calls buy."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from distdiff import metrics
from distdiff.pl import layers as data
from distdiff.pl.canvas import ACCENT, GREY, INK, PALE, canvas, marks
from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes


class Row(Protocol):
    """What is drawn of a line of a report's table (:class:`distdiff.report.Row`)."""

    name: str
    values: dict[str, float]
    errors: dict[str, float]
    note: str
    calls: int


class Report(Protocol):
    """What is drawn of a report (:class:`distdiff.report.Report`, which calls these plots)."""

    setting: dict[str, Any]

    @property
    def rows(self) -> Sequence[Row]:
        """Lines of the table."""

    @property
    def truth(self) -> NDArray[Any]:
        """Counts, ``[b g]``."""

    @property
    def targets(self) -> NDArray[np.bool_]:
        """Hidden entries, ``[b g]``."""

    @property
    def mean(self) -> NDArray[Any] | None:
        """Posterior mean, ``[b g]``."""

    @property
    def draws(self) -> NDArray[Any] | None:
        """Draws, ``[k b g]``."""


def calibration(
    result: Report | AnnData, *, mask: str | None = None, layer: str | None = None, name: str | None = None,
    seed: int = 0, show: bool | None = None, save: str | Path | None = None, ax: Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Draw whether the predictive law is honest: PIT histogram, interval coverage, mean against truth.

    The band around the uniform PIT is for independent entries; those of one cell share its depth, so it is narrow.

    Parameters
    ----------
    result
        A report of :func:`distdiff.evaluate`, or an AnnData whose counts were hidden and imputed: true counts in
        ``layer`` (None: ``X``), layers ``imputed_mean``, ``imputed``, ``imputed_draw2`` ... and ``mask``.
    mask
        Of an AnnData: the layer that is true where a count was hidden.
    name
        Of the data, for the title (of a report: its store).
    seed
        Of the random place of a truth among draws that equal it.
    show, save, ax
        See :mod:`distdiff.pl`.

    Returns
    -------
    list of matplotlib.axes.Axes
        PIT, coverage, means.

    Raises
    ------
    ValueError
        A report without draws, an AnnData without the layers, or no hidden entry.
    """
    truth, targets, mean, draws, what = _hidden(result, mask, layer, name)
    if not targets.any():
        raise ValueError("calibration: no count was hidden, so there is nothing to compare")
    made = canvas((1, 3), (13, 4.5), show=show, save=save, ax=ax)
    pit_axes, coverage_axes, reliability_axes = made.axes
    u = metrics.pit(truth, targets, draws, numpy_generator(seed, "pit"))
    _pit(pit_axes, u)
    expected = mean[targets]
    _coverage(coverage_axes, u, expected)
    _reliability(reliability_axes, truth[targets], expected)
    made.title(f"{what}: n = {int(targets.sum()):,} hidden counts of {len(truth):,} cells, {len(draws)} draws")
    return made.done()


def _hidden(result: Any, mask: str | None, layer: str | None, name: str | None) -> tuple[Any, Any, Any, Any, str]:
    """Truth and targets ``[b g]``, mean ``[b g]``, draws ``[k b g]``, and the name of the data."""
    if not hasattr(result, "layers"):
        if result.draws is None or result.mean is None:
            raise ValueError("calibration: this report holds no draws of the model")
        stored = result.setting.get("store") or "unnamed data"
        return result.truth, result.targets, result.mean, result.draws, name or stored
    drawn = ["imputed", *data.further_draws(result, "imputed")]
    for wanted in (mask, "imputed_mean", "imputed"):
        if wanted is None or wanted not in result.layers:
            raise ValueError(
                f"calibration: an AnnData needs layers imputed_mean and imputed, and mask= the layer that is true "
                f"where a count was hidden; {'mask is not given' if wanted is None else f'{wanted!r} is missing'}"
            )
    rows = np.arange(result.n_obs)

    def dense(wanted: str | None) -> NDArray[Any]:
        values = data.matrix(result, wanted, rows)
        return values.toarray() if sp.issparse(values) else values

    draws = np.stack([dense(wanted) for wanted in drawn])
    return dense(layer), dense(mask) != 0, dense("imputed_mean"), draws, data.data_name(result, name)


def _pit(axes: Any, u: np.ndarray) -> None:
    bins = 20
    share = np.histogram(u, bins, (0, 1))[0] / len(u) * bins
    spread = 2 * np.sqrt(bins / len(u))
    axes.axhspan(1 - spread, 1 + spread, color=PALE, label="2 s.e. around uniform, if independent")
    axes.stairs(share, np.linspace(0, 1, bins + 1), color=ACCENT, fill=True, alpha=0.7)
    axes.axhline(1, color=INK, lw=1)
    axes.set(
        title="PIT of hidden counts", xlabel="place of the truth among the draws", ylabel="density", ylim=(0, None)
    )
    axes.legend(loc="lower center", edgecolor="none", framealpha=0.9)


def _coverage(axes: Any, u: np.ndarray, expected: np.ndarray) -> None:
    levels = np.array([0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95])
    axes.plot([0, 1], [0, 1], color=INK, lw=1)
    edges = np.quantile(expected, [0, 1 / 3, 2 / 3, 1])
    for i, (name, shade) in enumerate((("lowest", "#9ecae1"), ("middle", "#4292c6"), ("highest", "#084594"))):
        part = (expected >= edges[i]) & ((expected < edges[i + 1]) | (i == 2))
        if part.any():
            axes.plot(levels, metrics.coverage(u[part], levels), "o-", color=shade, label=f"{name} third by mean")
    axes.set(title="Coverage of central intervals", xlabel="nominal", ylabel="actual", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")


def _reliability(axes: Any, truth: np.ndarray, expected: np.ndarray) -> None:
    order = np.argsort(expected, kind="stable")
    parts = [p for p in np.array_split(order, 20) if len(p)]
    x = np.array([expected[p].mean() for p in parts])
    y = np.array([truth[p].mean() for p in parts])
    error = np.array([truth[p].std() / np.sqrt(len(p)) for p in parts])
    low = max(1e-3, min(x.min(), y[y > 0].min(initial=1.0)) / 2)
    high = max(x.max(), y.max(), 2 * low) * 2
    axes.plot([low, high], [low, high], color=INK, lw=1)
    axes.errorbar(np.maximum(x, low), np.maximum(y, low), 2 * error, fmt="o", color=ACCENT, ms=4, lw=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(
        title="Predicted mean, in twentieths of entries",
        xlabel="predicted mean (molecules)",
        ylabel="observed mean (2 s.e.)",
    )


def score_by_calls(
    report: Report, *, name: str | None = None, show: bool | None = None, save: str | Path | None = None,
    ax: Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Draw what more network calls of a draw buy: CRPS of the draws, and energy distance of one draw, lower is better.

    Error bars are 2 standard errors by bootstrap over cells. The dashed line is the best estimator without a network.

    Parameters
    ----------
    report
        Of :func:`distdiff.evaluate`; its rows know the network calls of a draw.
    name
        Of the data, for the title (default: the report's store).
    show, save, ax
        See :mod:`distdiff.pl`.

    Returns
    -------
    list of matplotlib.axes.Axes
        CRPS, energy distance.

    Raises
    ------
    ValueError
        No row of the report has draws of a network.
    """
    known = [row for row in report.rows if row.calls and row.name.endswith((" draws", " draw"))]
    if not known:
        raise ValueError("score_by_calls: no row of this report has draws of a network (evaluate the model again)")
    made = canvas((1, 2), (11, 4.3), show=show, save=save, ax=ax)
    for axes, metric, ending, title in zip(
        made.axes, ("crps", "energy"), (" draws", " 1 draw"), ("CRPS of the draws", "Energy distance of one draw"),
        strict=True,
    ):  # fmt: skip
        _by_calls(axes, [row for row in known if row.name.endswith(ending)], metric)
        _without_network(axes, [row for row in report.rows if not row.calls], metric, ending)
        axes.set(title=title, xlabel="network calls of a draw", ylabel=f"{title.split(' of ')[0]}, lower is better")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.12, y=0.15)
        if made.figure is None:
            axes.legend(frameon=False, fontsize=8)
    if made.figure is not None:
        handles = dict(zip(*made.axes[0].get_legend_handles_labels()[::-1], strict=True))
        made.figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    s = report.setting
    made.title(
        f"{name or s.get('store') or 'unnamed data'}: n = {s['targets']:,} hidden counts of {s['cells']:,} cells, "
        f"{s['draws']} draws"
    )
    return made.done()


ANSWER = re.compile(r"(, \d+ calls)? (1 draw|\d+ draws)$")
"""What follows the name of a method in the name of a row."""


def _bars(rows: Sequence[Row], metric: str) -> NDArray[np.float64]:
    """Lengths of error bars below and above, ``[2, rows]``; a distance is never below 0."""
    error = np.array([2 * row.errors.get(metric, math.nan) for row in rows])
    return np.stack((np.minimum(error, [row.values[metric] for row in rows]), error)).clip(0)


def _by_calls(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(ANSWER.sub("", row.name), []).append(row)
    for (method, found), (colour, marker) in zip(methods.items(), marks(len(methods)), strict=True):
        found = sorted(found, key=lambda row: row.calls)
        axes.errorbar(
            [row.calls for row in found], [row.values[metric] for row in found],
            _bars(found, metric), fmt=f"{marker}-", color=colour, ms=5, lw=1.4,
            capsize=3, label=method,
        )  # fmt: skip


def _without_network(axes: Axes, rows: Sequence[Row], metric: str, ending: str) -> None:
    rivals = [r for r in rows if not r.note and r.name.endswith(ending) and math.isfinite(r.values[metric])]
    if rivals:
        best = min(rivals, key=lambda row: row.values[metric])
        axes.axhline(best.values[metric], color=GREY, ls="--", lw=1.2, label=f"{ANSWER.sub('', best.name)}, no network")
