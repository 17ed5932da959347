"""An AnnData object as a file that a build can read: counts, obs columns and genes, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distdiff.component import nearest
from distdiff.data.ingest.source import Source, frame_of
from distdiff.data.store.export import zarr_v3

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
    given = frame_of(adata.obs)
    known = [str(c) for c in given.columns]
    for column in columns:
        if column not in known:
            raise ValueError(f"AnnData: obs has no column {column!r}{nearest(column, known)}")
    obs = pd.DataFrame({c: given[c].array for c in columns}, index=pd.Index(source.obs_names))
    var = pd.DataFrame(index=pd.Index(source.genes))
    table = frame_of(adata.raw.var if source.var == "raw/var" else adata.var)
    if "feature_types" in table.columns:
        var["feature_types"] = table["feature_types"].astype(str).array
    with zarr_v3(), h5py.File(path, "w") as root:  # (text with missing values, too)
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
