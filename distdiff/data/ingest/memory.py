"""An AnnData object as a file that a build can read: counts, obs columns and genes, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdiff.component import nearest
from distdiff.data.ingest.source import Source

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK = 16_384
"""Cells that are held in memory at once."""


def written(adata: AnnData, path: Path, *, layer: str | None = None, columns: Sequence[str] = ()) -> Path:
    """Write the counts of an AnnData (in memory, backed or lazy) to an h5ad file, with some columns of obs.

    Parameters
    ----------
    path
        File to write.
    layer
        Where the counts are (as in `Source.open`); they become ``X``.
    columns
        obs columns to keep.

    Raises
    ------
    ValueError
        No such layer or column, or counts that cannot be read.
    """
    import h5py
    import pandas as pd
    from anndata.io import sparse_dataset, write_elem

    source = Source.from_anndata(adata, layer=layer)
    known = [str(c) for c in adata.obs.columns]
    for column in columns:
        if column not in known:
            raise ValueError(f"AnnData: obs has no column {column!r}{nearest(column, known)}")
    obs = pd.DataFrame({c: _column(adata.obs[c]) for c in columns}, index=pd.Index(adata.obs_names.astype(str)))
    var = pd.DataFrame(index=pd.Index(source.genes))
    table = adata.raw.var if source.var == "raw/var" else adata.var
    if "feature_types" in table.columns:
        var["feature_types"] = _column(table["feature_types"]).astype(str)
    with h5py.File(path, "w") as root:
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(root, "obs", obs)
        write_elem(root, "var", var)
        for start in range(0, max(source.n_cells, 1), BLOCK):
            counts = source.read(start, min(start + BLOCK, source.n_cells))
            if start == 0:
                write_elem(root, "X", counts)
            else:
                sparse_dataset(root["X"]).append(counts)
    return path


def _column(values: Any) -> Any:
    """A column of obs or var as pandas has it, also where it is lazy (xarray)."""
    import pandas as pd

    if isinstance(values, pd.Series):
        return values.array
    return values.to_series().array if hasattr(values, "to_series") else pd.Series(values).array
