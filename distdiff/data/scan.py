"""The tasks of a build: read rows of the sources, choose columns, count, and write one shard.

Each is a plain function of a small task and a shared `Job`, so it runs the same in this process and on a dask worker.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from distdiff.data.layout import Layout, write_shard
from distdiff.data.manifest import digest
from distdiff.data.source import Source, check_counts, first_bad

READ_BYTES = 128 << 20
"""Memory that one read of a source takes at most."""


@dataclass(frozen=True)
class Job:
    """What every task of a pass shares.

    Attributes
    ----------
    paths, layer
        Sources.
    columns
        For each source ``int32 [its genes]``: output column, or -1 for a gene that is not wanted.
    n_genes
        Output columns.
    root, layout
        The store under construction (only for `write`).
    """

    paths: tuple[str, ...]
    layer: str | None
    columns: tuple[np.ndarray, ...]
    n_genes: int
    root: str = ""
    layout: Layout | None = None


@dataclass(frozen=True)
class Span:
    """Rows ``start <= row < stop`` of source ``file``; ``keep`` (``bool [stop - start]``) picks among them."""

    file: int
    start: int
    stop: int
    keep: np.ndarray | None = None


@dataclass(frozen=True)
class Scanned:
    """``nnz`` ``int32 [rows]`` per cell, ``gene_nnz`` ``int64 [g]`` and the largest count of a span."""

    nnz: np.ndarray
    gene_nnz: np.ndarray
    largest: int


@dataclass(frozen=True)
class Moments:
    """Sums over training cells, each ``float64 [g]``, exact for whole numbers below 2^53."""

    n: int
    total: np.ndarray
    squares: np.ndarray
    nnz: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(cls, counts: sparse.csr_matrix) -> Moments:
        """Moments of the columns of canonical CSR counts."""
        g, values = counts.shape[1], counts.data.astype(np.float64)
        largest = np.zeros(g)
        np.maximum.at(largest, counts.indices, values)
        return cls(
            counts.shape[0],
            np.bincount(counts.indices, values, minlength=g),
            np.bincount(counts.indices, values * values, minlength=g),
            np.bincount(counts.indices, minlength=g).astype(np.float64),
            largest,
        )

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.n + other.n,
            self.total + other.total,
            self.squares + other.squares,
            self.nnz + other.nnz,
            np.maximum(self.largest, other.largest),
        )

    @property
    def mean(self) -> np.ndarray:
        """Molecules per cell, ``float64 [g]``."""
        return self.total / self.n

    @property
    def var(self) -> np.ndarray:
        """Population variance, molecules^2, ``float64 [g]``."""
        return np.maximum(self.squares / self.n - self.mean**2, 0.0)


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the spans that hold its cells in order, and which of its cells are for training."""

    shard: int
    spans: tuple[Span, ...]
    train: np.ndarray


@dataclass(frozen=True)
class Written:
    """What a written shard holds: stored counts, `digest` of them, moments over its training cells."""

    nnz: int
    sha256: str
    moments: Moments


def scan(span: Span, job: Job) -> Scanned:
    """Pass 1: check every entry of a span and count what the chosen genes hold.

    Raises
    ------
    ValueError
        An entry that is no count.
    """
    source = _source(job, span.file)
    nnz, gene_nnz, largest = [], np.zeros(job.n_genes, np.int64), 0
    for start, rows in _pieces(source, span):
        if first_bad(rows) is not None:
            check_counts(rows, source.genes, source.obs_names[start:], source.where)
        chosen = select(rows, job.columns[span.file], job.n_genes)
        nnz.append(np.diff(chosen.indptr).astype(np.int32))
        gene_nnz += np.bincount(chosen.indices, minlength=job.n_genes)
        largest = max(largest, int(chosen.data.max(initial=0)))
    return Scanned(np.concatenate(nnz), gene_nnz, largest)


def moments(span: Span, job: Job) -> Moments:
    """Gene sums over the rows that a span keeps (its training cells)."""
    zero = Moments.of(sparse.csr_matrix((0, job.n_genes)))
    return sum((Moments.of(m) for m in _chosen(span, job)), zero)


def write(task: ShardTask, job: Job) -> Written:
    """Pass 2: read the cells of one shard, write it whole, tell what it holds."""
    if job.layout is None:
        raise ValueError("write needs a job with a layout")
    counts = sparse.vstack([m for span in task.spans for m in _chosen(span, job)], format="csr")
    write_shard(Path(job.root), job.layout, task.shard, counts)
    return Written(counts.nnz, digest(counts), Moments.of(counts[np.flatnonzero(task.train)]))


def select(counts: sparse.csr_matrix, columns: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Canonical CSR of the chosen columns; the input is left as it is.

    Parameters
    ----------
    counts
        ``[n, genes of the file]``.
    columns
        ``int32 [genes of the file]``, output column or -1.
    n_genes
        Output columns.

    Returns
    -------
    csr_matrix [n, n_genes]
        Same dtype; indices ascending, duplicates summed, no stored zeros.
    """
    column = columns[counts.indices]
    keep = (column >= 0) & (counts.data != 0)
    indptr = np.concatenate([[0], np.cumsum(keep)])[counts.indptr]
    chosen = sparse.csr_matrix((counts.data[keep], column[keep], indptr), shape=(counts.shape[0], n_genes))
    chosen.sum_duplicates()
    return chosen


def _chosen(span: Span, job: Job) -> Iterator[sparse.csr_matrix]:
    """The kept rows of a span, chosen columns, as uint32, piece by piece."""
    for start, rows in _pieces(_source(job, span.file), span):
        if span.keep is not None:
            keep = span.keep[start - span.start : start - span.start + rows.shape[0]]
            rows = rows[np.flatnonzero(keep)]
        yield select(rows, job.columns[span.file], job.n_genes).astype(np.uint32)


def _pieces(source: Source, span: Span) -> Iterator[tuple[int, sparse.csr_matrix]]:
    step = max(1, int(READ_BYTES / source.bytes_per_cell))
    for start in range(span.start, span.stop, step):
        yield start, source.read(start, min(start + step, span.stop))


def _source(job: Job, file: int) -> Source:
    stat = os.stat(job.paths[file])
    return _open(job.paths[file], job.layer, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _open(path: str, layer: str | None, mtime: int, size: int) -> Source:
    """One open file per process and version of the file."""
    return Source.open(path, layer)


def forget() -> None:
    """Let go of the sources this process holds open."""
    _open.cache_clear()
