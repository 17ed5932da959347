"""Write a store as AnnData: cells in the order of their sources, counts unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from tqdm import tqdm

from distdiff import files
from distdiff.data.counts import LAST_EXACT
from distdiff.data.store import spill
from distdiff.data.store.manifest import SPLITS
from distdiff.data.store.store import CountStore

if TYPE_CHECKING:
    import pandas as pd

PIECE = 16 << 20
"""Counts in memory at one time."""

CHUNK = 1 << 20
"""Numbers in a chunk on disk."""


def export(store: CountStore, out: str | Path, *, overwrite: bool = False, progress: bool = True) -> None:
    """Write a store as AnnData, with bounded memory: shards are spilled by source row, then read in that order.

    ``X`` is CSR float32 (float64 for counts from 2^24 on); ``obs`` has the labels, and for each cell
    ``distdiff_split``, ``distdiff_source`` (the file), ``n_counts`` and ``n_genes`` (before genes were chosen); these
    get another name if a label has the same name. ``var`` says which genes are in the panel; ``uns['distdiff']`` has
    the fingerprint. Cells and genes that the build dropped are missing, and so are columns of obs that were not kept as
    labels.

    Parameters
    ----------
    store
        The store, whole or restricted to a panel.
    out
        ``.h5ad`` or ``.zarr``; the disk needs room for the coded counts as well, until it is written.

    Raises
    ------
    FileExistsError
        ``out`` exists and ``overwrite`` is false.
    ValueError
        Another suffix, or a corrupt shard (named).

    Examples
    --------
    >>> import anndata
    >>> from distdiff.data.store.export import export
    >>> from distdiff.data.store.store import CountStore
    >>> export(CountStore.open("atlas.zarr"), "back.h5ad", progress=False)
    >>> anndata.read_h5ad("back.h5ad").shape
    (199, 30)
    """
    out = named(out)
    if "://" not in store.url:
        files.refuse_nested(out, store.url)
    everyone = store.rows("all")
    file, row = store.origin(everyone)
    order = np.lexsort((row, file))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    columns = store.source_columns()
    dtype = np.float32 if store.manifest.dtype == "float32" or store.manifest.largest < LAST_EXACT else np.float64
    with files.whole(out, overwrite=overwrite) as temporary, files.scratch(out) as scratch:
        spills: list[Path] = []
        nnz = 0
        for shard in tqdm(store.manifest.shards, desc="read", unit="shard", disable=not progress, ascii=True):
            rows = np.arange(shard.start, shard.stop)
            spills.append(scratch / f"{shard.index:06d}")
            counts = store.read(rows)
            wide = counts.astype(np.float32 if counts.dtype.kind == "f" else np.uint32)
            spill.write(spills[-1], wide, rank[rows])
            nnz += counts.nnz
        with _opened(temporary) as root:
            notes = _frames(root, store, order, columns)
            if progress:
                print(notes, flush=True)
            matrix = CsrOnDisk(root, "X", (len(order), len(columns)), nnz, dtype)
            step = max(1, int(PIECE * len(order) / max(nnz, 1)))
            gene_column = np.arange(len(columns), dtype=np.int32)
            for a in tqdm(range(0, len(order), step), desc="write", unit="piece", disable=not progress, ascii=True):
                ranks, coded = spill.gather(spills, a, min(a + step, len(order)))
                counts = spill.cells(coded, np.argsort(ranks), gene_column, len(columns)).astype(dtype)
                if (np.diff(columns) < 0).any():
                    counts = counts[:, columns]
                    counts.sort_indices()
                matrix.append(counts)


def named(out: str | Path) -> Path:
    """Check the path of an AnnData to write.

    Raises
    ------
    ValueError
        It does not end in ``.h5ad`` or ``.zarr``, or is a URL.

    Examples
    --------
    >>> from distdiff.data.store.export import named
    >>> named("cells.loom")
    Traceback (most recent call last):
        ...
    ValueError: output cells.loom must end in .h5ad or .zarr
    """
    out = files.local(out)
    if out.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"output {out} must end in .h5ad or .zarr")
    return out


def _frames(root: Any, store: CountStore, order: np.ndarray, columns: np.ndarray) -> str:
    """Write everything but the counts; returns a sentence on the columns of obs."""
    import anndata as ad
    import pandas as pd

    about = store.manifest
    obs: pd.DataFrame = pd.DataFrame(index=pd.Index(store.names(order).astype(str)))
    for key, code in store.labels(order).items():
        obs[key] = pd.Categorical.from_codes(code, categories=list(about.labels[key]))
    file, _ = store.origin(order)
    molecules, genes = store.quality(order)
    labels, renamed = list(obs), []
    for name, values in {
        "distdiff_split": pd.Categorical.from_codes(store.splits(order), categories=list(SPLITS)),
        "distdiff_source": pd.Categorical([about.sources[f].path for f in file]),
        "n_counts": molecules,
        "n_genes": genes,
    }.items():
        free = name
        while free in labels:
            free = f"{free}_of_store" if free == name else f"{free}_"
        obs[free] = values
        renamed += [f"{name} of the store is in obs column {free}, because {name} is a label"] if free != name else []
    var = pd.DataFrame(index=pd.Index(np.array(store.genes, dtype=object)[columns].astype(str)))
    var["panel"] = columns < about.groups[0].n_genes if len(about.groups) > 1 else True
    uns = {"distdiff": {"fingerprint": about.fingerprint, "layer": about.layer or "X", "chosen_by": about.chosen_by}}
    adata = ad.AnnData(obs=obs, var=var, uns=uns)
    ad.io.write_elem(root, "/", adata)
    kept = f"obs has the labels of the store ({', '.join(labels) or 'none'}), not the other columns of its sources"
    return "; ".join([kept, *renamed])


class CsrOnDisk:
    """A CSR matrix on disk that is filled row by row (AnnData's own sparse append makes a chunk for every row).

    Parameters
    ----------
    root, name
        Group of h5py or zarr, and the name of the matrix in it; an older matrix of that name is replaced.
    shape, nnz, dtype
        Shape, number of counts and dtype of the whole matrix.

    Examples
    --------
    >>> import anndata, h5py, numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store.export import CsrOnDisk
    >>> with h5py.File("matrix.h5", "w") as file:
    ...     matrix = CsrOnDisk(file, "X", (2, 3), nnz=2, dtype="float32")
    ...     matrix.append(sparse.csr_matrix([[0, 1.0, 0]]))
    ...     matrix.append(sparse.csr_matrix([[0, 0, 2.0]]))
    ...     print(anndata.io.read_elem(file["X"]).toarray())
    [[0. 1. 0.]
     [0. 0. 2.]]
    """

    def __init__(self, root: Any, name: str, shape: tuple[int, int], nnz: int, dtype: Any) -> None:
        if name in root:
            del root[name]
        group = root.create_group(name)
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)})
        create = group.create_array if hasattr(group, "create_array") else group.create_dataset
        small = np.iinfo(np.int32).max
        self._data, self._indices, self._indptr = (
            create(name, shape=(length,), dtype=kind, chunks=(min(length, CHUNK) or 1,))
            for name, length, kind in (
                ("data", nnz, dtype),
                ("indices", nnz, np.int32),
                ("indptr", shape[0] + 1, np.int32 if nnz <= small else np.int64),
            )
        )
        self._rows = self._nnz = 0

    def append(self, counts: sparse.csr_matrix) -> None:
        """Write the next rows, ``[n, g]``."""
        rows, nnz = self._rows + counts.shape[0], self._nnz + counts.nnz
        self._data[self._nnz : nnz] = counts.data
        self._indices[self._nnz : nnz] = counts.indices
        self._indptr[self._rows + 1 : rows + 1] = counts.indptr[1:].astype(np.int64) + self._nnz
        self._rows, self._nnz = rows, nnz


@contextmanager
def zarr_v3() -> Iterator[None]:
    """In this context AnnData writes zarr v3, unsharded, and text with missing values.

    Examples
    --------
    >>> import anndata
    >>> from distdiff.data.store.export import zarr_v3
    >>> with zarr_v3():
    ...     print(anndata.settings.zarr_write_format)
    3
    """
    import anndata as ad

    options: dict[str, Any] = {"zarr_write_format": 3}
    if hasattr(ad.settings, "auto_shard_zarr_v3"):
        options["auto_shard_zarr_v3"] = False
    if hasattr(ad.settings, "allow_write_nullable_strings"):
        options["allow_write_nullable_strings"] = True
    with ad.settings.override(**options):
        yield


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix == ".h5ad":
        import h5py

        with h5py.File(path, "w") as file:
            yield file
        return
    import zarr

    with zarr_v3():
        yield zarr.open_group(str(path), mode="w", zarr_format=3)
