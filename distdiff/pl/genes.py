"""Plots of genes before and after: marker genes by group (dots, violins with intervals), and gene against gene."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from distdiff import metrics
from distdiff.pl import layers as data
from distdiff.pl.canvas import ACCENT, GREY, INK, SERIES, Canvas, canvas

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from distdiff.pl.layers import Layers

UNIT = "log1p of counts per 10,000"
FEW = 10
"""Cells of a group from which its density is drawn."""

DOT = 150.0
"""Area of the dot of a gene that every cell of a group has, in square points."""


def markers(adata: AnnData, groupby: str, *, layer: str | None = None, n: int = 2, most: int = 20) -> list[str]:
    """Genes that mark the groups of an obs column: of each the first ``n`` by scanpy's t-test, ``most`` in all.

    Each gene once; groups of one cell have none. Chosen on the counts of ``layer`` (log1p CP10k).
    """
    import warnings

    import anndata as ad
    import scanpy as sc

    rows = data.thinned(adata, 20_000)
    groups = _groups(adata, groupby, rows)
    sizes = groups.value_counts()
    usable = [str(g) for g in groups.cat.categories if sizes[g] > 1]
    if len(usable) < 2:
        raise ValueError(
            f"groupby={groupby!r} needs two groups of at least two cells to choose genes; give genes=[...]"
        )
    counts = data.matrix(adata, layer, rows)
    cells = ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), var=adata.var[[]])
    cells.obs["group"] = groups.to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups without variance
        sc.pp.normalize_total(cells, target_sum=1e4)
        sc.pp.log1p(cells)
        cells.obs["group"] = cells.obs["group"].astype("category")
        sc.tl.rank_genes_groups(cells, "group", groups=usable, n_genes=n)
    ranked = cells.uns["rank_genes_groups"]["names"]
    return list(dict.fromkeys(str(gene) for group in usable for gene in ranked[group]))[:most]


def _groups(adata: AnnData, groupby: str, rows: NDArray[np.int64]) -> Any:
    """Group of each of ``rows``, as categories of text; cells without one are ``unlabelled``."""
    import pandas as pd

    values = data.column(adata, groupby, "groupby").iloc[rows]
    text = values.astype(object).where(values.notna(), "unlabelled").astype(str)
    order = [str(c) for c in values.cat.categories] if hasattr(values, "cat") else sorted(set(text))
    here = set(text)
    return pd.Series(pd.Categorical(text, [c for c in dict.fromkeys([*order, "unlabelled"]) if c in here]))


def _by_group(groups: Any) -> tuple[list[str], NDArray[np.int64], Any]:
    """Names and sizes of groups, and the ``[groups, cells]`` matrix that averages over them."""
    codes = groups.cat.codes.to_numpy()
    names, n = list(groups.cat.categories), len(codes)
    sizes = np.bincount(codes, minlength=len(names))
    average = sp.csr_matrix((1.0 / sizes[codes], (codes, np.arange(n))), shape=(len(names), n))
    return names, sizes, average


def dotplot(
    adata: AnnData, genes: Sequence[str] | None = None, groupby: str = "cell_type", *, layers: Layers | None = None,
    name: str | None = None, max_cells: int = 20_000, show: bool | None = None, save: str | Path | None = None,
    ax: Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Draw marker genes by group, a panel a layer: colour is mean expression, area the share of cells with the gene.

    The colour is the mean of log1p counts per 10,000, one scale a gene over all panels (0 to its largest group mean).
    The share of cells is of counts above 0; a layer of expectations m, which are never 0, shows the share of cells
    that one more measurement would find the gene in, ``1 - exp(-m)`` on average. Genes that the input lacks are left
    out of the panel of the counts.

    Parameters
    ----------
    genes
        By default the first two of each group (see :func:`markers`), chosen on the first layer.
    groupby
        obs column.
    layers, name, max_cells, show, save, ax
        As for :func:`~distdiff.pl.cells.umap`.

    Returns
    -------
    list of matplotlib.axes.Axes
        One a layer.

    Raises
    ------
    ValueError
        No such gene, layer or column.
    """
    panels, rows = data.chosen(adata, layers), data.thinned(adata, max_cells)
    genes = (
        [genes] if isinstance(genes, str) else list(genes) if genes is not None
        else markers(adata, groupby, layer=next(iter(panels.values())))
    )  # fmt: skip
    at = data.columns_of(adata, genes)
    names, sizes, average = _by_group(_groups(adata, groupby, rows))
    found = []
    for layer in panels.values():
        values = data.matrix(adata, layer, rows)
        found.append((average @ data.log_cp10k(values, at, data.depths(values)), average @ _detected(values, at)))
    top = np.max([mean.max(0) for mean, _ in found], 0)
    width, tall = max(2.5, 0.27 * len(genes) + 0.8), 0.27 * len(names) + 1.1
    grid = (1, len(panels)) if width * len(panels) <= 12 else (len(panels), 1)
    size = (width * grid[1] + 3.6, max(3.4, tall * grid[0] + 0.5))
    made = canvas(grid, size, show=show, save=save, ax=ax, sharex=True, sharey=True)
    unseen = _added(adata)[at]
    for axes, (title, layer), (mean, share) in zip(made.axes, panels.items(), found, strict=True):
        hide = unseen if layer is None else np.zeros(len(genes), dtype=bool)
        _dots(axes, np.where(hide, np.nan, mean / np.where(top > 0, top, 1)), share, genes, names, sizes)
        axes.set_title(title, fontsize=10)
    _dot_legend(made)
    made.title(f"{data.data_name(adata, name)}: n = {data.how_many(len(rows), adata.n_obs)}, {len(names)} groups")
    return made.done()


def _added(adata: AnnData) -> NDArray[np.bool_]:
    """Genes that the input lacked."""
    added = adata.var.get("distdiff_added")
    return np.zeros(adata.n_vars, dtype=bool) if added is None else added.to_numpy(dtype=bool)


def _detected(values: Any, at: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whether each gene was found in each cell; of expectations, the chance to find it."""
    part = values[:, at]
    part = np.asarray(part.toarray() if sp.issparse(part) else part, dtype=np.float64)
    whole = (part == np.rint(part)).all()
    return (part > 0).astype(np.float64) if whole else -np.expm1(-np.maximum(part, 0))


def _dots(
    axes: Axes, colour: NDArray[np.float64], share: NDArray[np.float64], genes: Sequence[str], names: Sequence[str],
    sizes: NDArray[np.int64],
) -> None:  # fmt: skip
    y, x = np.mgrid[: len(names), : len(genes)]
    known = np.isfinite(colour).ravel()
    axes.scatter(
        x.ravel()[known], y.ravel()[known], s=DOT * share.ravel()[known], c=colour.ravel()[known], cmap="Blues",
        vmin=0, vmax=1, edgecolors=INK, linewidths=0.4,
    )  # fmt: skip
    axes.set_xticks(range(len(genes)), genes, rotation=90)
    axes.set_yticks(range(len(names)), [f"{name} (n = {n:,})" for name, n in zip(names, sizes, strict=True)])
    axes.tick_params(labelsize=8)
    axes.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(names) - 0.3, -0.7))


def _dot_legend(made: Canvas) -> None:
    from matplotlib.lines import Line2D

    last = made.axes[-1]
    bar = last.figure.colorbar(last.collections[0], ax=made.axes, shrink=0.6, aspect=14)
    bar.set_label("mean log1p CP10k, of the gene's largest", fontsize=8)
    handles = [
        Line2D([], [], marker="o", ls="", color=GREY, ms=math.sqrt(DOT * share), label=f"{share:.0%}")
        for share in (0.1, 0.5, 1.0)
    ]
    options: dict[str, Any] = {"title": "cells with\nthe gene", "frameon": False, "fontsize": 8, "title_fontsize": 8}
    if made.figure is not None:
        made.figure.legend(handles=handles, loc="outside right upper", labelspacing=1.1, **options)
    else:
        last.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), labelspacing=1.1, **options)


def violin(
    adata: AnnData, genes: Sequence[str] | None = None, groupby: str = "cell_type", *, layers: Layers | None = None,
    name: str | None = None, max_cells: int = 20_000, show: bool | None = None, save: str | Path | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Draw the distribution of genes in each group, a row of axes a gene, with the interval of the group's mean.

    Groups of fewer than 10 cells show the cells. The bar is the mean and 2 standard errors over the group's cells.
    Where several draws are there (``imputed_draw2`` ...), it is the mean of all, and its error is by Rubin's rules
    (Rubin 1987): the variance over cells, plus ``1 + 1/m`` times that between the ``m`` draws. Where quantile layers
    are there (``imputed_q5``, ``imputed_q95``), the thin line is the average 5 % to 95 % interval of one cell. An
    interval of expectations is too narrow: they vary less than counts.

    Parameters
    ----------
    genes
        By default the first of each group, four at most (see :func:`markers`).
    groupby, layers, name, max_cells, show, save, ax
        As for :func:`dotplot`.

    Returns
    -------
    matplotlib.axes.Axes or list of them
        One a gene.

    Raises
    ------
    ValueError
        No such gene, layer or column.
    """
    panels, rows = data.chosen(adata, layers), data.thinned(adata, max_cells)
    genes = (
        [genes] if isinstance(genes, str) else list(genes) if genes is not None
        else markers(adata, groupby, layer=next(iter(panels.values())), n=1, most=4)
    )  # fmt: skip
    at = data.columns_of(adata, genes)
    groups = _groups(adata, groupby, rows)
    names, sizes, average = _by_group(groups)
    members = [np.flatnonzero(groups.cat.codes.to_numpy() == g) for g in range(len(names))]
    wide = max(5.0, 0.32 * len(names) * len(panels) + 1.5)
    below = 0.075 * max(len(name) for name in names) + 1.2  # room for the names of groups, upright
    made = canvas((len(genes), 1), (wide, 1.9 * len(genes) + below), show=show, save=save, ax=ax, sharex=True)
    handles, step = [], 0.84 / len(panels)
    for k, ((title, layer), colour) in enumerate(zip(panels.items(), _series(len(panels)), strict=True)):
        values = data.matrix(adata, layer, rows)
        depth = data.depths(values)
        expression = data.log_cp10k(values, at, depth)
        mean, error = _means(adata, layer, rows, at, expression, sizes, average)
        cell = _cell_interval(adata, layer, rows, at, depth, average)
        where = np.arange(len(names)) + (k - (len(panels) - 1) / 2) * step
        for g, axes in enumerate(made.axes):
            if layer is None and _added(adata)[at[g]]:
                continue
            _bodies(axes, [expression[part, g] for part in members], where, step, colour)
            if cell is not None:
                axes.vlines(where, cell[0][:, g], cell[1][:, g], color=INK, lw=0.7)
            axes.errorbar(where, mean[:, g], 2 * error[:, g], fmt="_", color=INK, ms=5, lw=2, mew=1.4)
        handles.append((title, colour, len(data.further_draws(adata, layer)), cell is not None))
    for gene, axes in zip(genes, made.axes, strict=True):
        axes.set(ylabel=gene, xlim=(-0.6, len(names) - 0.4))
        axes.set_ylim(bottom=0)
    made.axes[-1].set_xticks(
        range(len(names)),
        [f"{name}\n(n = {n:,})" for name, n in zip(names, sizes, strict=True)],
        rotation=90,
        fontsize=8,
    )
    _violin_legend(made, handles)
    made.title(f"{data.data_name(adata, name)}: n = {data.how_many(len(rows), adata.n_obs)}; {UNIT}")
    return made.done()


def _series(n: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(n)]


def _bodies(axes: Axes, values: Sequence[NDArray[np.float64]], where: NDArray[Any], width: float, colour: str) -> None:
    """The density of each group; of few cells the cells themselves."""
    for few, at in zip(values, where, strict=True):
        if len(few) < FEW:
            axes.scatter(np.full(len(few), at), few, s=12, color=colour, alpha=0.65, linewidths=0)
    many = [k for k, group in enumerate(values) if len(group) >= FEW]
    if many:
        drawn = axes.violinplot(
            [values[k] for k in many], where[many], widths=0.92 * width, showextrema=False, points=60
        )
        bodies: Any = drawn["bodies"]
        for body in bodies:
            body.set(facecolor=colour, edgecolor="none", alpha=0.65)


def _means(
    adata: AnnData, layer: str | None, rows: NDArray[np.int64], at: NDArray[np.int64], first: NDArray[np.float64],
    sizes: NDArray[np.int64], average: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """Mean of each group and its standard error, ``[groups, genes]``; of several draws by Rubin's rules."""
    means, within = [], []
    for draw in [layer, *data.further_draws(adata, layer)]:
        values = first if draw == layer else None
        if values is None:
            counts = data.matrix(adata, draw, rows)
            values = data.log_cp10k(counts, at, data.depths(counts))
        mean = average @ values
        spread = np.maximum(average @ np.square(values) - np.square(mean), 0)
        means.append(mean)
        within.append(spread / np.where(sizes > 1, sizes - 1, np.nan)[:, None])  # one cell has no error
    m = len(means)
    between = np.var(means, 0, ddof=1) if m > 1 else 0.0
    return np.mean(means, 0), np.sqrt(np.mean(within, 0) + (1 + 1 / m) * between)


def _cell_interval(
    adata: AnnData, layer: str | None, rows: NDArray[np.int64], at: NDArray[np.int64], depth: NDArray[np.float64],
    average: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:  # fmt: skip
    """Average of the cells' 5 % and of their 95 % quantiles, at the depth of the layer that they belong to."""
    names = data.bounds(adata, layer)
    if names is None:
        return None
    low, high = (average @ data.log_cp10k(data.matrix(adata, name, rows), at, depth) for name in names)
    return low, high


def _violin_legend(made: Canvas, handles: Sequence[tuple[str, str, int, bool]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown: list[Any] = [Patch(color=colour, alpha=0.65, label=title) for title, colour, _, _ in handles]
    draws = max(more for _, _, more, _ in handles) + 1
    by = f" ({draws} draws, Rubin's rules)" if draws > 1 else ""
    shown.append(Line2D([], [], color=INK, lw=2, label=f"group mean, 2 s.e.{by}"))
    if any(interval for *_, interval in handles):
        shown.append(Line2D([], [], color=INK, lw=0.7, label="5 % to 95 % of one cell"))
    if made.figure is not None:
        made.figure.legend(handles=shown, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    else:
        made.axes[0].legend(handles=shown, frameon=False, fontsize=8)


def scatter(
    adata: AnnData, x: str, y: str, *, layers: Layers | None = None, name: str | None = None, max_cells: int = 20_000,
    show: bool | None = None, save: str | Path | None = None, ax: Sequence[Axes] | None = None,
) -> Any:  # fmt: skip
    """Draw gene ``y`` against gene ``x``, a panel a layer, with Spearman's rank correlation and the share at (0, 0).

    Expectations of one network correlate more than the counts of a cell would; test relations on draws.

    Parameters
    ----------
    x, y
        Names of genes.
    layers, name, max_cells, show, save, ax
        As for :func:`~distdiff.pl.cells.umap`.

    Returns
    -------
    list of matplotlib.axes.Axes
        One a layer.

    Raises
    ------
    ValueError
        No such gene or layer.
    """
    panels, rows = data.chosen(adata, layers), data.thinned(adata, max_cells)
    at = np.r_[data.columns_of(adata, [x], "x"), data.columns_of(adata, [y], "y")]
    made = canvas(
        (1, len(panels)), (3.9 * len(panels) + 0.4, 4.4), show=show, save=save, ax=ax, sharex=True, sharey=True
    )
    for axes, (title, layer) in zip(made.axes, panels.items(), strict=True):
        counts = data.matrix(adata, layer, rows)
        values = data.log_cp10k(counts, at, data.depths(counts))
        axes.set(title=title, xlabel=f"{x}, {UNIT}")
        if layer is None and _added(adata)[at].any():
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
            continue
        size, alpha = float(np.clip(8000 / len(rows), 3, 32)), float(np.clip(200 / len(rows), 0.35, 0.8))
        axes.scatter(*values.T, s=size, color=ACCENT, alpha=alpha, linewidths=0, rasterized=True)
        everything = np.ones((1, len(values)), dtype=bool)
        rho = float(metrics.spearman(values[:, 0][None], everything, values[:, 1][None])[0])
        shown = f"{rho:.2f}" if math.isfinite(rho) else "undefined"
        axes.set_title(f"{title}\nrank correlation {shown}, {(values == 0).all(1).mean():.0%} at (0, 0)", fontsize=10)
    made.axes[0].set_ylabel(f"{y}, {UNIT}")
    made.title(f"{data.data_name(adata, name)}: n = {data.how_many(len(rows), adata.n_obs)}")
    return made.done()
