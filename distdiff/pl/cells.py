"""Plots whose points are cells: UMAP of compared layers, and the depth of generated against real cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from distdiff.pl import layers as data
from distdiff.pl.canvas import ACCENT, GREY, INK, RED, canvas, marks
from distdiff.waits import waiting

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from distdiff.pl.layers import Layers

LEGEND = 30
"""Values of a label, at most, that a legend names."""


def umap(
    adata: AnnData, *, layers: Layers | None = None, color: str | None = None, training: str | None = None,
    name: str | None = None, max_cells: int = 3000, seed: int = 0, show: bool | None = None,
    save: str | Path | None = None, ax: Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Draw layers of the same cells in one UMAP of all of them together, one panel each.

    All layers are normalised to 10,000 molecules a cell and log1p; PCA, neighbours and UMAP are scanpy's, of the
    layers' cells together, so that a cell can be compared across the panels. Expectations have less noise than counts
    and lie apart from them for that reason alone; draws do not.

    Parameters
    ----------
    layers
        Layers to compare (``None``: ``X``; ``"raw"``), or a mapping from panel titles to them; by default ``X`` and the
        layer that distdiff wrote.
    color
        obs column: text or categories (named in a legend up to 30 values) or numbers.
    training
        obs column, true (or ``"train"``) in cells that the model was trained on: they are faint, and held-out cells
        have a dark edge.
    name
        Of the data, for the title.
    max_cells
        Cells drawn, at most: a random sample, always the same.
    show, save, ax
        See :mod:`distdiff.pl`.

    Returns
    -------
    list of matplotlib.axes.Axes
        One a layer.

    Raises
    ------
    ValueError
        No such layer or column, or fewer than 4 cells.
    """
    panels, rows = data.chosen(adata, layers), data.thinned(adata, max_cells)
    n = len(rows)
    if n < 4:
        raise ValueError(f"umap: at least 4 cells are needed, got {n}")
    label = data.column(adata, color, "color").iloc[rows] if color is not None else None
    trained = _trained(adata, training, rows)
    embedding = _embed([data.matrix(adata, layer, rows) for layer in panels.values()], seed)
    beside = 2.2 if label is not None else 0.4
    made = canvas(
        (1, len(panels)), (4.1 * len(panels) + beside, 4.7), show=show, save=save, ax=ax, sharex=True, sharey=True
    )
    for i, (axes, title) in enumerate(zip(made.axes, panels, strict=True)):
        axes.scatter(*embedding.T, s=np.clip(_size(n) / 4, 2, 8), color="#dfe6ea", linewidths=0, rasterized=True)
        _cells(axes, embedding[i * n : (i + 1) * n], label, trained, n)
        axes.set(title=title, xticks=[], yticks=[], xlabel="UMAP 1")
    made.axes[0].set_ylabel("UMAP 2")
    _legend(made, label, trained)
    marked = "" if trained is None else f"; {int((~trained).sum()):,} held out"
    made.title(f"{data.data_name(adata, name)}: n = {data.how_many(n, adata.n_obs)}{marked}")
    return made.done()


def _trained(adata: AnnData, training: str | None, rows: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    if training is None:
        return None
    values = data.column(adata, training, "training").iloc[rows].to_numpy()
    return np.asarray(values, dtype=bool) if values.dtype.kind in "bui" else values.astype(str) == "train"


def _cells(axes: Any, embedding: NDArray[np.float64], label: Any, trained: NDArray[np.bool_] | None, n: int) -> None:
    """One panel's cells; those held out, where it is known, above the others and with a dark edge."""
    size = _size(n)
    training = np.ones(n, dtype=bool) if trained is None else trained
    for part, style in (
        (training, {"alpha": 0.45 if trained is not None else 0.9, "linewidths": 0}),
        (~training, {"alpha": 0.95, "edgecolors": INK, "linewidths": 0.6}),
    ):
        if not part.any():
            continue
        if label is None:
            axes.scatter(*embedding[part].T, s=size, color=ACCENT, rasterized=True, **style)
        elif _numbers(label):
            values = label.to_numpy(float)
            scale = {"cmap": "viridis", "vmin": np.nanmin(values), "vmax": np.nanmax(values)}
            axes.scatter(
                *embedding[part].T, s=size, c=values[part], rasterized=True, **scale, **style
            )  # fmt: skip
        else:
            text = _text(label)
            names = sorted(set(text))
            for value, (colour, marker) in zip(names, marks(len(names)), strict=True):
                here = embedding[part & (text == value)]
                axes.scatter(*here.T, s=size, color=colour, marker=marker, rasterized=True, **style)


def _size(n: int) -> float:
    """Area of the point of one of ``n`` cells, in square points."""
    return float(np.clip(9000 / n, 3, 26))


def _numbers(label: Any) -> bool:
    return label.dtype.kind in "fiu"


def _text(label: Any) -> NDArray[np.str_]:
    return np.array(["unlabelled" if v is None or v != v else str(v) for v in label.astype(object)])


def _legend(made: Any, label: Any, trained: NDArray[np.bool_] | None) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    if label is not None and _numbers(label):
        points = made.axes[-1].collections[-1]
        made.axes[-1].figure.colorbar(points, ax=made.axes, label=label.name, shrink=0.7)
    elif label is not None:
        names = sorted(set(_text(label)))
        if len(names) <= LEGEND:
            handles += [
                Line2D([], [], marker=marker, color=colour, ls="", label=value)
                for value, (colour, marker) in zip(names, marks(len(names)), strict=True)
            ]
    if len(made.axes) > 1:
        handles.append(Line2D([], [], marker="o", ms=3, color="#d5dde2", ls="", label="cells of the other panels"))
    if trained is not None:
        handles += [
            Line2D([], [], marker="o", color=GREY, alpha=0.45, ls="", label="training cell"),
            Line2D([], [], marker="o", color=GREY, mec=INK, mew=0.8, ls="", label="held-out cell"),
        ]
    if handles and made.figure is not None:
        made.figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    elif handles:
        made.axes[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def _embed(matrices: Sequence[Any], seed: int) -> NDArray[np.float64]:
    import warnings

    import anndata as ad
    import scanpy as sc

    if all(isinstance(values, np.ndarray) for values in matrices):
        joint: Any = np.concatenate([values.astype(np.float32) for values in matrices])
    else:
        joint = sp.vstack([sp.csr_matrix(values, dtype=np.float32) for values in matrices], format="csr")
    cells = ad.AnnData(joint)
    with waiting(f"computes a UMAP of {cells.n_obs:,} points"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's and umap's own; nothing a reader of the figure can act on
        sc.pp.normalize_total(cells, target_sum=1e4)
        sc.pp.log1p(cells)
        sc.pp.pca(cells, n_comps=min(30, min(cells.shape) - 1), random_state=seed)
        sc.pp.neighbors(cells, random_state=seed)
        sc.tl.umap(cells, random_state=seed)
    return cells.obsm["X_umap"]


def depth(
    real: AnnData, generated: AnnData, *, layer: str | None = None, name: str | None = None, bins: int | None = None,
    show: bool | None = None, save: str | Path | None = None, ax: Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Compare generated with real cells: molecules and detected genes of a cell, in the genes that both have.

    Parameters
    ----------
    real
        Counts of cells; ``layer`` names another embedding than ``X``.
    generated
        Cells of :meth:`Model.generate <distdiff.model.Model.generate>`, in ``X``.
    name
        Of the real data, for the title.
    bins
        Of each histogram, evenly spaced on a logarithmic axis; by default the root of the smaller number of cells,
        8 to 40.
    show, save, ax
        See :mod:`distdiff.pl`.

    Returns
    -------
    list of matplotlib.axes.Axes
        Molecules, genes.

    Raises
    ------
    ValueError
        No cell, or no gene in common.
    """
    genes = real.var_names.intersection(generated.var_names)
    if not len(genes) or not (real.n_obs and generated.n_obs):
        raise ValueError(
            f"depth: {real.n_obs} real and {generated.n_obs} generated cells share {len(genes)} genes; both must have "
            "cells, and genes of the same names"
        )
    if bins is None:
        bins = int(np.clip(np.sqrt(min(real.n_obs, generated.n_obs)), 8, 40))
    made = canvas((1, 2), (11, 4.2), show=show, save=save, ax=ax)
    sides = []
    for adata, where in ((real, layer), (generated, None)):
        counts = data.matrix(adata, where, np.arange(adata.n_obs))[:, data.columns_of(adata, genes)]
        sides.append((data.depths(counts), data.depths(counts > 0)))
    labels = (f"real, n = {real.n_obs:,}", f"generated, n = {generated.n_obs:,}")
    for axes, values, what in zip(
        made.axes, zip(*sides, strict=True), ("molecules of a cell", "genes detected in a cell"), strict=True
    ):
        _histograms(axes, values, labels, bins)
        axes.set(xlabel=what, ylabel="share of cells")
    made.axes[0].set_title("Depth")
    made.axes[1].set_title("Detected genes")
    made.title(
        f"{data.data_name(real, name)}: n = {real.n_obs:,} real and {generated.n_obs:,} generated cells, "
        f"{len(genes):,} genes"
    )
    return made.done()


def _histograms(axes: Axes, values: Sequence[NDArray[np.float64]], labels: Sequence[str], bins: int) -> None:
    """Histograms over one logarithmic axis, with the median of each; cells with nothing are in the first bin."""
    from matplotlib.ticker import LogLocator, NullFormatter

    both = np.concatenate(values)
    low = max(1.0, both[both > 0].min(initial=np.inf) if (both > 0).any() else 1.0)
    high = max(both.max(initial=1.0), 2 * low)
    edges = np.geomspace(low * 0.999, high * 1.001, bins + 1)
    for side, label, colour, style in zip(values, labels, (GREY, ACCENT), ("-", "--"), strict=True):
        share = np.histogram(np.maximum(side, low), edges)[0] / len(side)
        axes.stairs(share, edges, color=colour, fill=colour == GREY, alpha=0.55 if colour == GREY else 1, lw=1.8)
        middle = float(np.median(side))
        axes.axvline(max(middle, low), color=INK if colour == GREY else RED, ls=style, lw=1, ymax=0.78)
        axes.plot([], [], color=colour, lw=6 if colour == GREY else 1.8, label=f"{label}, median {middle:,.0f}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, axes.get_ylim()[1] * 1.28)  # room for the legend
    axes.legend(frameon=False, loc="upper left", fontsize=9)
