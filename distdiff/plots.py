"""Figures of calibration, UMAPs and training curves: matplotlib objects without pyplot state, written as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff import files, metrics
from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, ACCENT, PALE = "#22303c", "#1f77b4", "#c9d6df"


def calibration(
    truth: np.ndarray, targets: np.ndarray, mean: np.ndarray, draws: np.ndarray, path: str | Path, *, seed: int = 0
) -> None:
    """Draw the calibration of the predictive law: PIT histogram, interval coverage, mean against truth.

    Parameters
    ----------
    truth, mean
        ``[b g]`` molecules.
    targets
        ``bool [b g]`` scored entries.
    draws
        ``[k b g]``.

    Notes
    -----
    The band around the uniform PIT assumes independent entries; entries of one cell share its depth, so it is too
    narrow.
    """
    figure = _figure(13, 4.2)
    pit_axes, coverage_axes, reliability_axes = figure.subplots(1, 3)
    u = metrics.pit(truth, targets, draws, numpy_generator(seed, "pit"))
    _pit(pit_axes, u)
    expected = mean[targets]
    _coverage(coverage_axes, u, expected)
    _reliability(reliability_axes, truth[targets], expected)
    _save(figure, path)


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
    axes.legend(frameon=False, loc="lower center")


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


def umap(
    before: np.ndarray,
    after: np.ndarray,
    truth: np.ndarray,
    labels: Sequence[Any] | np.ndarray | None,
    path: str | Path,
    *,
    seed: int = 0,
) -> None:
    """Draw true, half-hidden and imputed counts, one panel each, in one UMAP of all three.

    Parameters
    ----------
    before, after, truth
        ``[b g]`` counts: hidden entries as zeros, imputed, true.
    labels
        Value of each cell that sets its colour, or ``None``. More than 30 values get no legend.
    """
    embedding = _embed(np.concatenate((truth, before, after)), seed)
    figure = _figure(14, 4.6)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    n = len(truth)
    text = np.array(["" if v is None else str(v) for v in labels]) if labels is not None else np.array([""] * n)
    names = sorted(set(text))
    colours = _colours(len(names))
    for axes, title, start in zip(
        panels, ("true counts", "half hidden (zeros)", "imputed (one draw)"), (0, n, 2 * n), strict=True
    ):
        axes.scatter(*embedding.T, s=2, color="#e8edf0", rasterized=True)
        for name, colour in zip(names, colours, strict=True):
            part = embedding[start : start + n][text == name]
            axes.scatter(*part.T, s=7, color=colour, label=name or "unlabelled", rasterized=True)
        axes.set(title=title, xticks=[], yticks=[], xlabel="UMAP 1")
    panels[0].set_ylabel("UMAP 2")
    if labels is not None and len(names) <= 30:
        handles, entries = panels[0].get_legend_handles_labels()
        figure.legend(handles, entries, loc="outside right center", frameon=False, markerscale=2.5, fontsize=8)
    _save(figure, path)


def _embed(counts: np.ndarray, seed: int) -> np.ndarray:
    import warnings

    import anndata as ad
    import scanpy as sc
    import scipy.sparse as sp

    data = ad.AnnData(sp.csr_matrix(counts, dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from scanpy and umap; of no use to the reader of the figure
        sc.pp.normalize_total(data, target_sum=1e4)
        sc.pp.log1p(data)
        sc.pp.pca(data, n_comps=min(30, min(data.shape) - 1), random_state=seed)
        sc.pp.neighbors(data, random_state=seed)
        sc.tl.umap(data, random_state=seed)
    return data.obsm["X_umap"]


def training_curve(history: Sequence[Mapping[str, float]], path: str | Path, *, judge: str = "val/deviance") -> None:
    """Draw training loss and the validation number that chooses the best weights, ``judge``, against cells seen.

    Examples
    --------
    >>> from distdiff.plots import training_curve
    >>> history = [{"cells": n, "loss": 900 / n, "val/deviance": 1 + 100 / n} for n in (1000, 2000, 4000)]
    >>> training_curve(history, "curve.png")
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    seen = [h["cells"] for h in history]
    axes.plot(seen, [h["loss"] for h in history], "o-", color="#8a9aa6", ms=3, label="training loss (left)")
    axes.set(xlabel="cells seen", ylabel="training loss")
    other = axes.twinx()
    what = ("validation deviance", "Poisson deviance of a hidden entry")
    if judge != "val/deviance":
        what = ("validation loss", "loss of held-out cells, times even")
    score = [h[judge] for h in history]
    other.plot(seen, score, "o-", color=ACCENT, ms=3, label=f"{what[0]} (right)")
    best = int(np.argmin(score))
    other.plot(seen[best], score[best], "o", mfc="none", mec="#d62728", ms=10, label=f"kept: {score[best]:.4f}")
    other.set_ylabel(what[1])
    handles = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, loc="upper right")
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    names = ["tab10"] if n <= 10 else ["tab20", "tab20b", "tab20c"]
    colours = [colormaps[name](i) for name in names for i in range(colormaps[name].N)]
    return [colours[i % len(colours)] for i in range(n)]


def _save(figure: Figure, path: str | Path) -> None:
    with files.whole(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
