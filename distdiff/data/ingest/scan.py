"""The tasks of a build: read rows of the sources, choose columns, count, and write one shard.

Each is a plain function of a small task and the build's `BuildSettings`, so it runs the same in this process and on a
dask worker, and running it twice leaves what running it once leaves.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from distdiff import files, received
from distdiff.data.counts import as_counts, check_counts, first_bad, round_at_random
from distdiff.data.ingest.choose import Of
from distdiff.data.ingest.source import Source
from distdiff.data.store import coding, spill
from distdiff.data.store.layout import Layout, write_shard
from distdiff.data.store.manifest import combine_digests, digest
from distdiff.data.store.moments import Moments
from distdiff.files import stamp

READ_BYTES = 128 << 20
"""Memory that one read of a source takes at most."""

PIECE = 4 << 20
"""Counts of a shard that are decoded at a time."""


@dataclass(frozen=True)
class BuildSettings:
    """What every task of a pass shares.

    Attributes
    ----------
    work
        Folder of the build: spills, and the store under construction.
    paths, layer, stamps
        Sources; version (`files.stamp`) of each when the build began.
    turned
        For each source the folder that holds it row by row, or None.
    columns
        For each source ``int32 [its genes]``: gene in the spills, or -1 for one that is not wanted.
    n_genes
        Genes in the spills.
    quality
        Thresholds of a cell: ``min_counts``, ``min_genes``, ``max_mito`` (percent).
    mito
        For each source ``bool [its genes]``, mitochondrial genes.
    counts
        False takes any finite number.
    rounding
        Seed with which counts with decimals are rounded at random; None refuses them.
    column, group
        For each gene of the spills its column in the store's group (-1: dropped), and the group (for `measure`,
        `write`).
    dtype
        Of the values (for `measure`).
    layout
        Of the store (for `write`).
    """

    work: str
    paths: tuple[str, ...]
    layer: str | None
    stamps: tuple[str, ...]
    turned: tuple[str | None, ...]
    columns: tuple[np.ndarray, ...]
    n_genes: int
    quality: Mapping[str, float]
    mito: tuple[np.ndarray, ...]
    counts: bool
    rounding: int | None = None
    column: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    dtype: str = "uint8"
    layout: Layout | None = None

    @property
    def store(self) -> Path:
        return Path(self.work) / "store"

    def spill(self, number: int) -> Path:
        """Folder of one span's cells."""
        return Path(self.work) / "spill" / f"{number:06d}"

    def groups(self, of: coding.Coded, which: np.ndarray) -> list[sparse.csr_matrix]:
        """Some cells of the spills, a matrix for each of the store's column groups."""
        columns_by_group = [
            np.where(self.group == g, self.column, -1).astype(np.int32) for g in range(int(self.group.max()) + 1)
        ]
        return [spill.cells(of, which, column, int((column >= 0).sum())) for column in columns_by_group]


@dataclass(frozen=True)
class Span:
    """Rows ``start <= row < stop`` of source ``file``.

    Attributes
    ----------
    rank
        ``int64 [stop - start]``, position of each cell in the new order.
    train
        ``bool [stop - start]``, training cells.
    """

    number: int
    file: int
    start: int
    stop: int
    rank: np.ndarray
    train: np.ndarray


@dataclass(frozen=True)
class Scanned:
    """What pass 1 found in a span.

    Attributes
    ----------
    nnz, total
        ``int32``, ``float64 [rows]`` per cell over all genes of its source; nnz is -1 for a cell under a threshold.
    moments
        Over its training cells.
    gene_nnz
        ``int64 [g]`` over all its kept cells.
    needed
        Entries that its counts need in values of one and of two bytes.
    largest
        Largest count.
    """

    nnz: np.ndarray
    total: np.ndarray
    moments: Moments
    gene_nnz: np.ndarray
    needed: tuple[int, int]
    largest: float


@dataclass(frozen=True)
class Measured:
    """Entries of a span's cells in each column group ``int64 [groups, n]``, and the cells' ranks ``int64 [n]``."""

    rank: np.ndarray
    entries: np.ndarray


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: ranks of its cells, ascending (``int64 [n]``), and how many spills there are."""

    shard: int
    rank: np.ndarray
    spills: int


@dataclass(frozen=True)
class Written:
    """What a written shard holds: stored counts, and the hash of them."""

    nnz: int
    sha256: str


def scatter(span: Span, job: BuildSettings) -> Scanned:
    """Pass 1: check every entry of a span, write its cells to a spill, sum up what they hold.

    Raises
    ------
    ValueError
        An entry that is no count; a source that changed since the build began.
    """
    folder = job.spill(span.number)
    if not spill.whole(folder):
        _scatter(span, job, folder)
    return _scanned(folder)


def _scatter(span: Span, job: BuildSettings, folder: Path) -> None:
    source = _source(job, span.file)
    parts, every = [], []
    for start, rows in _pieces(source, span):
        if job.counts:
            rows = as_counts(rows)
        if job.rounding is not None:
            rows = round_at_random(rows, start, job.rounding, span.file)
        check(rows, source, start, job.counts)
        whole = select(rows, np.arange(rows.shape[1], dtype=np.int32), rows.shape[1])
        every.append(_quality(whole, job, span.file))
        chosen = select(whole, job.columns[span.file], job.n_genes)
        parts.append(chosen if job.counts else chosen.astype(np.float32))
    same(job, span.file)  # nobody wrote to it while we read
    cells = parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")
    del parts
    nnz, total, good = (np.concatenate(part) for part in zip(*every, strict=True))
    kept = np.flatnonzero(good & (np.diff(cells.indptr) > 0))
    train = span.train[kept]
    moments, gene_nnz, (one, two, largest) = coding.sums(cells, kept, train)
    spill.write(
        folder, cells, span.rank[kept], rows=kept, largest=largest if job.counts else None,
        train=train[np.argsort(span.rank[kept])], nnz=np.where(good, nnz, -1), total=total, moments=moments,
        gene_nnz=gene_nnz, numbers=np.array([train.sum(), one, two, largest], np.float64),
    )  # fmt: skip


def _scanned(folder: Path) -> Scanned:
    n, one, two, largest = spill.load(folder, "numbers").tolist()
    moments = Moments(int(n), *np.array(spill.load(folder, "moments")))
    nnz, total, gene_nnz = (np.array(spill.load(folder, name)) for name in ("nnz", "total", "gene_nnz"))
    return Scanned(nnz, total, moments, gene_nnz, (int(one), int(two)), largest)


def _quality(counts: sparse.csr_matrix, job: BuildSettings, file: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genes and molecules of cells over all genes of their source, and whether they pass the thresholds, ``[n]``."""
    nnz, total = np.diff(counts.indptr).astype(np.int32), coding.totals(counts)
    good = (total >= job.quality.get("min_counts", -np.inf)) & (nnz >= job.quality.get("min_genes", 0))
    if (most := job.quality.get("max_mito", 100.0)) < 100:
        good &= counts @ job.mito[file].astype(np.float64) <= most / 100 * total
    return nnz, total, good


def check(rows: sparse.csr_matrix, source: Source, start: int, counts: bool) -> None:
    """Refuse what is no count, or for measurements what is not finite."""
    if counts:
        if first_bad(rows) is not None:
            check_counts(rows, source.genes, source.obs_names[start:], source.where)
        return
    bad = ~np.isfinite(rows.data)
    if bad.any():
        at = int(np.argmax(bad))
        row = int(np.searchsorted(rows.indptr, at, side="right")) - 1
        raise ValueError(
            f"{source.where}: cell {str(source.obs_names[start + row])!r}, gene {source.genes[rows.indices[at]]!r}: "
            f"{rows.data[at]!r} is not finite; repair the file"
        )


def summed(number: int, job: BuildSettings, of: Of) -> Any:
    """``of`` the training cells of a spill."""
    folder = job.spill(number)
    _, coded = spill.coded(folder)
    everything = np.arange(job.n_genes, dtype=np.int32)
    return of(spill.cells(coded, np.flatnonzero(spill.load(folder, "train")), everything, job.n_genes))


def measure(number: int, job: BuildSettings) -> Measured:
    """Between the passes: how many entries each cell of a spill takes in each column group."""
    rank, of = spill.coded(job.spill(number))
    return Measured(rank, coding.recoded(of, job.column, job.group, job.dtype))


def write(task: ShardTask, job: BuildSettings) -> Written:
    """Pass 2: gather the cells of one shard from all spills, write it whole, tell what it holds."""
    if job.layout is None:
        raise ValueError("write needs a job with a layout")
    done = Path(job.work) / "done" / f"{task.shard:06d}"
    about = json.loads(bytes(spill.load(done, "about")).decode()) if spill.whole(done) else {}
    if not about or about["files"] != _records(job, job.layout, task.shard):
        for remains in (done, *_files(job, job.layout, task.shard).values()):
            files.remove(remains)
        _write(task, job, job.layout, done)
        about = json.loads(bytes(spill.load(done, "about")).decode())
    return Written(about["nnz"], about["sha256"])


def _files(job: BuildSettings, layout: Layout, shard: int) -> dict[str, Path]:
    """The files of a shard."""
    names = [(group.name, part) for group in layout.groups for part in coding.Slots._fields]
    counts = job.store / "counts"
    return {f"{group}/{part}": counts / group / part / "c" / str(shard) / "0" for group, part in names}


def _records(job: BuildSettings, layout: Layout, shard: int) -> dict[str, list[int]]:
    """Bytes and CRC-32C of each file of a shard that is there."""
    found = {}
    for name, file in _files(job, layout, shard).items():
        with contextlib.suppress(OSError):
            found[name] = list(received.record(file))
    return found


def _write(task: ShardTask, job: BuildSettings, layout: Layout, done: Path) -> None:
    rank, of = spill.gather([job.spill(n) for n in range(task.spills)], int(task.rank[0]), int(task.rank[-1]) + 1)
    order = np.argsort(rank)
    which = order[np.searchsorted(rank[order], task.rank)]
    if not np.array_equal(rank[which], task.rank):
        raise ValueError(f"shard {task.shard}: cells are missing from {job.work}/spill; remove {job.work}, start again")
    step = max(1, int(PIECE * len(which) // max(1, len(of.gaps)) // layout.block)) * layout.block
    digests: list[str] = []
    nnz = 0

    def pieces() -> Iterator[list[sparse.csr_matrix]]:
        nonlocal nnz
        for a in range(0, len(which), step):
            parts = job.groups(of, which[a : a + step])
            whole = parts[0] if len(parts) == 1 else sparse.hstack(parts, format="csr")
            nnz += int(whole.nnz)
            digests.extend(digest(whole, layout.block))
            yield parts

    write_shard(job.store, layout, task.shard, pieces())
    about = {"nnz": nnz, "sha256": combine_digests(digests), "files": _records(job, layout, task.shard)}
    spill.publish(done, {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})


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
        Same dtype (int64 where whole numbers were summed); indices ascending, duplicates summed, no stored zeros.
    """
    if len(columns) == n_genes and _same(columns) and counts.data.all() and counts.has_canonical_format:
        return counts
    column = columns[counts.indices]
    keep = (column >= 0) & (counts.data != 0)
    if keep.all():
        chosen = sparse.csr_matrix((counts.data, column, counts.indptr), shape=(counts.shape[0], n_genes))
    else:
        indptr = np.concatenate([[0], np.cumsum(keep)])[counts.indptr]
        chosen = sparse.csr_matrix((counts.data[keep], column[keep], indptr), shape=(counts.shape[0], n_genes))
    chosen.sort_indices()
    if not chosen.has_canonical_format and chosen.dtype.kind in "iu":
        chosen = chosen.astype(np.int64)  # a sum of entries can be more than their dtype holds
    chosen.sum_duplicates()
    return chosen


def _same(columns: np.ndarray) -> bool:
    """Whether the genes of the file are the genes wanted, in the same order."""
    return bool(np.array_equal(columns, np.arange(len(columns))))


def _pieces(source: Source, span: Span) -> Iterator[tuple[int, sparse.csr_matrix]]:
    step = max(1, int(READ_BYTES / source.bytes_per_cell))
    for start in range(span.start, span.stop, step):
        yield start, source.read(start, min(start + step, span.stop))


def same(job: BuildSettings, file: int) -> None:
    """Refuse a source that is not what it was when the build began."""
    if stamp(job.paths[file]) != job.stamps[file]:
        raise ValueError(
            f"{job.paths[file]} changed while the store was built: wait until it is written, then run the command again"
        )


def _source(job: BuildSettings, file: int) -> Source:
    same(job, file)
    return _open(job.paths[file], job.layer, job.turned[file], job.stamps[file])


@functools.lru_cache(maxsize=8)
def _open(path: str, layer: str | None, turned: str | None, version: str) -> Source:
    """One open file per process and version of the file."""
    return Source.open(path, layer) if turned is None else Source.open(path, layer, turned=turned)


def forget() -> None:
    """Let go of the sources this process holds open."""
    _open.cache_clear()
