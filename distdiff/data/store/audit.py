"""A store read whole and held against what its manifest says of it."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Protocol

import numpy as np
from scipy import sparse
from tqdm import tqdm

from distdiff.data.store.manifest import SPLITS, Manifest, combine, combine_digests, digest, hash_of
from distdiff.data.store.moments import Moments

EVERY = (
    "split", "source/file", "source/row", "names", "cells/total", "cells/nnz", "genes/mean", "genes/var", "genes/nnz",
    "genes/max", "genes/source",
)  # fmt: skip
"""Arrays of any store beside its labels and counts."""


class Readable(Protocol):
    """What `audit` needs of a store; :class:`~distdiff.data.store.store.CountStore` has it."""

    @property
    def manifest(self) -> Manifest: ...
    def column(self, name: str) -> np.ndarray: ...
    def read(self, rows: np.ndarray) -> sparse.csr_matrix: ...
    def damaged(self, name: str, why: str) -> ValueError: ...
    def corrupt(self, block: int, why: str) -> ValueError: ...


def audit(store: Readable, progress: bool = False) -> None:
    """Read every array of a store once.

    Counts, labels and splits have hashes in every store; the other arrays in those that say so (``columns`` of the
    manifest). In older ones the statistics of genes are computed again, and the rest is read.

    Parameters
    ----------
    store
        Not a view of some genes.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        A shard or an array differs from what was built (it is named).
    """
    about = store.manifest
    arrays = {name: store.column(name) for name in (*(f"labels/{k}" for k in sorted(about.labels)), *EVERY)}
    for name, values in arrays.items():
        n = len(about.genes) if name.startswith("genes/") else about.n_cells
        if len(values) != n:
            raise store.damaged(name, f"{len(values)} values, {n} are wanted")
        if about.columns is not None and hash_of(values) != about.columns.get(name):
            raise store.damaged(name, "its content differs from the manifest's hash")
    split = arrays["split"]
    if split.max() >= len(SPLITS) or tuple(np.bincount(split, minlength=len(SPLITS)).tolist()) != about.split.n_cells:
        raise store.damaged("split", f"its cells are not {about.split.n_cells}, as the manifest says")
    codes = [*(arrays[f"labels/{k}"] for k in sorted(about.labels)), split]
    parts = []
    for shard in tqdm(about.shards, desc="verify", unit="shard", disable=not progress, ascii=True):
        rows = np.arange(shard.start, shard.stop)
        counts, first = store.read(rows), shard.start // about.block
        found = combine(combine_digests(digest(counts, about.block)), [code[rows] for code in codes])
        if (found, counts.nnz) != (shard.sha256, shard.nnz):
            raise store.corrupt(first, "its content differs from the manifest's hash")
        if counts.nnz and counts.data.max() > about.largest:
            raise store.corrupt(first, f"it holds {counts.data.max()}, the largest is {about.largest} by the manifest")
        parts.append(Moments.of(counts[split[rows] == 0]))
    sums = reduce(add, parts)
    for name, wanted in {"mean": sums.mean, "var": sums.var, "nnz": sums.nnz, "max": sums.largest}.items():
        if not np.allclose(arrays[f"genes/{name}"], wanted, rtol=1e-6, atol=1e-9):
            raise store.damaged(f"genes/{name}", "it is not that of the training cells")
