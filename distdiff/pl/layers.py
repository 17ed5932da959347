"""The numbers of an AnnData that plots compare: which layers, of which cells, on which scale."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from distdiff.component import nearest
from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from anndata import AnnData

    Layers = Mapping[str, str | None] | Sequence[str | None]

WRITTEN = ("imputed", "imputed_mean", "denoised", "deepened")
"""Layers that distdiff writes, on the scale of counts; the first that is there is compared with the counts."""

MEANINGS = {
    "imputed": "imputed (one draw)",
    "imputed_mean": "imputed (posterior mean)",
    "denoised": "denoised (posterior mean)",
    "deepened": "deepened (one draw)",
}


def chosen(adata: AnnData, layers: Layers | None) -> dict[str, str | None]:
    """Title of a panel -> name of its layer (``None`` or ``"X"``: ``X``; ``"raw"``: ``raw.X``).

    Raises
    ------
    ValueError
        No such layer, or by default none that distdiff wrote.
    """
    if layers is None:
        here = next((name for name in WRITTEN if name in adata.layers), None)
        if here is None:
            raise ValueError(
                f"this AnnData has none of the layers {', '.join(WRITTEN)}: name two with layers=[None, ...]; it has "
                f"{', '.join(sorted(adata.layers)) or 'none'}"
            )
        layers = [None, here]
    if isinstance(layers, str):
        layers = [layers]
    if not isinstance(layers, Mapping):
        layers = {_title(adata, name): name for name in layers}
    found = {title: None if name == "X" else name for title, name in layers.items()}
    for name in found.values():
        if name is not None and name not in adata.layers and not (name == "raw" and adata.raw is not None):
            raise ValueError(f"layers: this AnnData has no layer {name!r}{nearest(name, list(adata.layers))}")
    if not found:
        raise ValueError("layers: name at least one layer (None is X)")
    return found


def _title(adata: AnnData, name: str | None) -> str:
    if name in (None, "X"):
        return "counts as given"
    return MEANINGS.get(str(name), str(name))


def column(adata: AnnData, key: str, argument: str) -> Any:
    """The obs column ``key``.

    Raises
    ------
    ValueError
        There is none.
    """
    if key not in adata.obs:
        raise ValueError(f"{argument}={key!r} is no column of obs{nearest(key, [str(k) for k in adata.obs.columns])}")
    return adata.obs[key]


def thinned(adata: AnnData, most: int) -> NDArray[np.int64]:
    """Indices of at most ``most`` cells, in their order: a random sample, always the same.

    Every k-th cell would follow the order of a file, as of samples of one size behind each other.
    """
    if most < 1:
        raise ValueError(f"max_cells must be at least 1, got {most}")
    if adata.n_obs <= most:
        return np.arange(adata.n_obs)
    return np.sort(numpy_generator(0, "plotted cells").choice(adata.n_obs, most, replace=False))


def columns_of(adata: AnnData, genes: Sequence[str], argument: str = "genes") -> NDArray[np.int64]:
    """Column of each gene.

    Raises
    ------
    ValueError
        A gene that the AnnData does not have.
    """
    at = adata.var_names.get_indexer(list(genes))
    if (at < 0).any():
        absent = list(genes)[int(np.argmax(at < 0))]
        raise ValueError(
            f"{argument}: {absent!r} is no gene of this AnnData{nearest(absent, map(str, adata.var_names))}"
        )
    return at.astype(np.int64)


def matrix(adata: AnnData, layer: str | None, rows: NDArray[np.int64]) -> Any:
    """``[cells, genes]`` of one layer, CSR or dense as it is stored; of backed and lazy files only the rows asked."""
    if layer == "raw" and "raw" not in adata.layers:
        raw = adata.raw[:, list(adata.var_names)].X  # genes of raw by name
        return raw[rows]
    values = adata.X if layer is None else adata.layers[layer]
    if values is None:
        raise ValueError("this AnnData has no X: name a layer, layers=[...]")
    values = values[rows] if len(rows) < adata.n_obs or not isinstance(values, np.ndarray) else values
    if hasattr(values, "compute"):
        values = values.compute()
    return values.tocsr() if sp.issparse(values) else np.asarray(values)


def depths(values: Any) -> NDArray[np.float64]:
    """Molecules of each cell, ``float64 [cells]``."""
    return np.asarray(values.sum(1), dtype=np.float64).ravel()


def log_cp10k(values: Any, at: NDArray[np.int64], depth: NDArray[np.float64]) -> NDArray[np.float64]:
    """``log(1 + 10,000 x / depth)`` of the columns ``at``, dense ``[cells, len(at)]``; 0 in cells without molecules."""
    part = values[:, at]
    part = part.toarray() if sp.issparse(part) else part
    scale = np.divide(1e4, depth, out=np.zeros_like(depth), where=depth > 0)
    return np.log1p(np.maximum(part, 0) * scale[:, None])


def further_draws(adata: AnnData, layer: str | None) -> list[str]:
    """Layers ``imputed_draw2`` ... in their order, for the layer ``imputed``."""
    if layer != "imputed":
        return []
    found = [(int(m[1]), name) for name in adata.layers if (m := re.fullmatch(r"imputed_draw(\d+)", name))]
    return [name for _, name in sorted(found)]


def bounds(adata: AnnData, layer: str | None) -> tuple[str, str] | None:
    """Layers of the 5 % and 95 % quantiles of the predictive law behind ``layer``, where both are there."""
    family = "denoised" if str(layer).startswith("denoised") else "imputed"
    names = f"{family}_q5", f"{family}_q95"
    given = str(layer).startswith(family) and all(name in adata.layers for name in names)
    return names if given else None


def data_name(adata: AnnData, name: str | None) -> str:
    """What titles call the data: ``name``, the file, ``uns['name']``, or the model that wrote the layers."""
    if name is not None:
        return name
    if adata.filename is not None:
        return Path(adata.filename).name
    if isinstance(given := adata.uns.get("name"), str):
        return given
    model = adata.uns.get("distdiff", {}).get("model") if isinstance(adata.uns.get("distdiff"), Mapping) else None
    return f"AnnData, model {model}" if model else "AnnData"


def how_many(n: int, of: int, what: str = "cells") -> str:
    """``700 cells``, or ``3,000 of 12,000 cells``."""
    what = what.removesuffix("s") if of == 1 else what
    return f"{n:,} {what}" if n == of else f"{n:,} of {of:,} {what}"
