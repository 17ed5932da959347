"""What stands around an answer in memory: a copy of the input in the genes that were read, and those appended."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from distdiff.data.ingest.source import ADDED, in_memory, layer_names, native

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

log = logging.getLogger("distdiff")


def framed(
    adata: AnnData, layer: str | None, added: Sequence[str] = (), *, keep: Sequence[str] | None = None
) -> tuple[AnnData, list[str]]:
    """A copy of the input whose columns are the genes of an answer.

    Where these are ``adata.var_names``, it is a plain copy. Else ``X`` is the counts that were read, 0 in appended
    genes (``var['distdiff_added']``); layers and varp of the input get zeros there, varm what is missing; obs, obsm,
    obsp, uns and raw are kept. Nothing of ``layers``, ``varm``, ``varp`` fits the genes of ``raw``.

    Parameters
    ----------
    layer
        As in `Source.open`.
    added
        Genes to append.
    keep
        Genes of the answer, of the input's and those that are appended (default: all).

    Returns
    -------
    AnnData, list of str
        The copy, and the names of what could not be kept.
    """
    import anndata as ad

    x, var = in_memory(adata, layer)
    raw = var != "var" and list(adata.raw.var_names) != list(adata.var_names)
    if not added and not raw:
        if keep is None:
            return copied(adata), []
        return (copied(adata) if _lazy(adata) else adata)[:, list(keep)].copy(), []
    adata = copied(adata) if _lazy(adata) else adata
    x, _ = in_memory(adata, layer)
    table, left_out = (adata.raw.var, by_gene(adata)) if raw else (adata.var, [])
    if not raw and layer is not None and adata.X is not None:
        left_out = [*left_out, "X"]
    at = np.r_[np.arange(len(table)), np.full(len(added), -1)]
    genes = [*table.index, *added]
    if keep is not None:
        column_of = dict(zip(genes, at, strict=True))
        genes = list(keep)
        at = np.array([column_of[gene] for gene in genes])
    frame = var_of(table, genes)
    if added:
        frame[ADDED] = (at < 0) | were_added(frame)
    source = adata.raw if raw else adata
    layers = {k: adata.layers[k] for k in layer_names(adata)}
    if not raw:
        left_out += [f"{key}/{k}" for key, found in (("layers", layers), ("varm", adata.varm), ("varp", adata.varp))
                     for k, v in found.items() if not by_columns(v)]  # fmt: skip
    kept = {} if raw else {
        "layers": {k: reindex_genes(v, at, (1,)) for k, v in layers.items() if by_columns(v)},
        "varp": {k: reindex_genes(v, at, (0, 1)) for k, v in adata.varp.items() if by_columns(v)},
    }  # fmt: skip
    varm = {k: reindex_genes(v, at, (0,), np.nan, genes) for k, v in source.varm.items() if by_columns(v)}
    around = ad.AnnData(obs=adata.obs, obsm=adata.obsm, obsp=adata.obsp, uns=adata.uns).copy()
    out = ad.AnnData(
        reindex_genes(x, at, (1,)), obs=around.obs, var=frame, obsm=around.obsm, obsp=around.obsp, uns=around.uns,
        varm=varm, **kept,
    )  # fmt: skip
    if adata.raw is not None:
        out.raw = adata.raw.to_adata()
    return out, left_out


def copied(adata: AnnData) -> AnnData:
    """A copy of an AnnData in memory; one that is on disk or of dask is read, and its file stays open."""
    import anndata as ad

    if not _lazy(adata):
        return adata.copy()
    parts = {
        key: {k: _loaded(v) for k, v in getattr(adata, key).items() if k is not None}
        for key in ("layers", "obsm", "varm", "obsp", "varp")
    }
    raw = adata.raw and {"X": _loaded(adata.raw.X), "var": _loaded(adata.raw.var), "varm": dict(adata.raw.varm)}
    return ad.AnnData(
        _loaded(adata.X), obs=_loaded(adata.obs), var=_loaded(adata.var), uns=_loaded(adata.uns), raw=raw, **parts
    )


def _lazy(adata: AnnData) -> bool:
    """Whether some of it is on disk (``backed="r"``), of dask, or in a dtype in which anndata cannot copy it."""
    parts = [adata.X, adata.obs, adata.var, adata.raw and adata.raw.X]
    parts += [v for key in ("layers", "obsm", "varm", "obsp", "varp") for v in getattr(adata, key).values()]
    return adata.isbacked or any(
        hasattr(part, "dask") or hasattr(part, "to_memory") or (sp.issparse(part) and native(part) is not part)
        for part in parts
    )


def _loaded(value: Any) -> Any:
    """The same in memory, as an object of its own."""
    if isinstance(value, Mapping):
        return {k: _loaded(v) for k, v in value.items()}
    if hasattr(value, "to_memory"):
        return value.to_memory()
    if hasattr(value, "dask"):
        return value.compute(scheduler="threads")
    if hasattr(value, "file") and hasattr(value, "shape"):  # of h5py
        return value[()]
    return native(value).copy() if sp.issparse(value) else copy.copy(value)


def by_gene(adata: AnnData) -> list[str]:
    """Names of everything that has a value a gene of ``var``."""
    some = [f"{key}/{name}" for key in ("layers", "varm", "varp") for name in getattr(adata, key)]
    return ["X", *some] if adata.X is not None else some


def by_columns(values: Any) -> bool:
    """Whether columns or rows can be taken of it: a matrix of numbers, or a table."""
    import pandas as pd

    if isinstance(values, np.ndarray):
        return values.ndim == 2 and values.dtype.kind in "biuf"
    return isinstance(values, pd.DataFrame) or sp.issparse(values)


def were_added(table: DataFrame) -> np.ndarray:
    """Genes that an earlier completion appended, ``bool [g]``."""
    if ADDED not in table:
        return np.zeros(len(table), dtype=bool)
    return np.asarray(table[ADDED].astype(object).fillna(False).astype(bool))


def warn_left_out(names: Sequence[str], where: str) -> dict[str, list[str]]:
    """Warn of the elements of the input that the result does not hold, and return their entry of ``uns``."""
    if not names:
        return {}
    log.warning("%s: not in the result, which has other genes or another X: %s", where, ", ".join(names))
    return {"left_out": list(names)}


def var_of(table: DataFrame, genes: Sequence[str]) -> DataFrame:
    """Rows ``genes`` of a table of genes; a missing row for those that it does not have, in dtypes that files hold.

    True and false stay so, for scanpy takes no third value: false for a gene that the table does not have, which is
    warned of.
    """
    import pandas as pd

    if pd.Index(genes).isin(table.index).all():
        return table.loc[list(genes)].copy()
    flags = [k for k in table.columns if table[k].dtype == bool]
    wide = {k: "category" for k in table.columns if table[k].dtype == object or table[k].dtype == "string"}
    wider, name = table.astype(wide).reindex(list(genes)), table.index.name
    for flag in flags:
        wider[flag] = table[flag].reindex(list(genes), fill_value=False)
    if flags:
        log.warning(
            "var: %s of %d added genes is False, for nothing is known; set it where that is wrong",
            ", ".join(map(repr, flags)), len(genes) - int(pd.Index(genes).isin(table.index).sum()),
        )  # fmt: skip
    if name in table.columns:  # files hold such a column only where it repeats the names
        if (table[name].astype(str) == table.index.astype(str)).all():
            wider[name] = list(genes)
        else:
            wider.index.name = None
    return wider


def reindex_genes(values: Any, at: np.ndarray, axes: Sequence[int], fill: float = 0, genes: Sequence[str] = ()) -> Any:
    """A copy of a matrix or table in the genes of a result.

    Parameters
    ----------
    values
        Array, sparse matrix or DataFrame.
    at
        ``int [g]``, where each gene of the result is in it, -1 where nowhere.
    axes
        Axes along which genes lie.
    fill
        What stands where there is none; sparse matrices have 0 in any case.
    genes
        Names ``[g]``, for a DataFrame.
    """
    import pandas as pd

    if isinstance(values, pd.DataFrame):
        return var_of(values.set_axis(values.index.astype(str)), genes)
    if sp.issparse(values):
        here = np.flatnonzero(at >= 0)
        choose = sp.csr_matrix(
            (np.ones(len(here), values.dtype), (here, at[here])), shape=(len(at), values.shape[axes[0]])
        )
        for axis in axes:
            values = choose @ values if axis == 0 else values @ choose.T
        return values.tocsr()
    values, absent = np.asarray(values), at < 0
    for axis in axes:
        values = values.take(at.clip(0), axis)
        if absent.any():
            values = values if fill == 0 or values.dtype.kind == "f" else values.astype(np.float64)
            values[(slice(None),) * axis + (absent,)] = fill
    return values
