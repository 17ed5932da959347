"""Read cells of a store in any order: blocks through tensorstore, cells out of blocks by arithmetic."""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
import torch
from scipy import sparse

from distdiff.component import nearest
from distdiff.data.manifest import SPLITS, Manifest, combine, digest
from distdiff.data.source import dense
from distdiff.types import Cells, Condition, DataSpec

GROUP = 64
"""Blocks fetched in one request."""

PARTS = ("data", "indices", "indptr")


class _Block(NamedTuple):
    """One decoded block: counts and gene numbers ``[nnz]``, starts of its cells ``int64 [block + 1]``."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self)


class CountStore:
    """A store that `distdiff.data.shard.shard` built, open for reading. Safe to use from several threads.

    Attributes
    ----------
    path, manifest
        Where it is and what it says about itself.
    """

    def __init__(self, path: Path, manifest: Manifest, cache_bytes: int) -> None:
        self.path, self.manifest = path, manifest
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 16 << 20}})
        self._counts = {part: self._array(f"counts/{part}") for part in PARTS}
        self._columns: dict[str, np.ndarray] = {}
        self._cache: OrderedDict[int, _Block] = OrderedDict()
        self._room, self._cache_bytes = cache_bytes, cache_bytes
        self._lock = threading.Lock()
        self._panel: np.ndarray | None = None
        self._wide = np.int64 if manifest.dtype == "uint32" else np.int32

    @classmethod
    def open(cls, path: str | Path, *, cache_bytes: int = 512 << 20) -> CountStore:
        """Open a store.

        Parameters
        ----------
        path
            Folder of the store.
        cache_bytes
            Memory for decoded blocks; a training window (64 blocks or so) should fit.

        Raises
        ------
        FileNotFoundError
            No finished store there, or a file of a shard is gone.
        ValueError
            A manifest that cannot be used, or a damaged array.
        """
        path = Path(path).absolute()
        manifest = Manifest.read(path)
        for shard, part in itertools.product(manifest.shards, PARTS):
            file = path / "counts" / part / "c" / str(shard.index) / "0"
            if not file.exists():
                raise FileNotFoundError(
                    f"{path}: shard {shard.index} (rows {shard.start} to {shard.stop}) is missing ({file}); "
                    "restore it or rebuild the store: distdiff shard --overwrite"
                )
        return cls(path, manifest, cache_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self._cache_bytes, None if self._panel is None else self.genes)

    def __repr__(self) -> str:
        return f"CountStore({str(self.path)!r}, {self.n_cells} cells x {len(self.genes)} genes)"

    @property
    def n_cells(self) -> int:
        return self.manifest.n_cells

    @property
    def genes(self) -> tuple[str, ...]:
        if self._panel is None:
            return self.manifest.genes
        return tuple(self.manifest.genes[i] for i in self._panel)

    def panel(self, genes: Sequence[str]) -> CountStore:
        """Look at this store through some of its genes, in another order if need be; nothing is copied.

        Raises
        ------
        ValueError
            A gene that the store does not have, a gene named twice, no gene.
        """
        place = {gene: i for i, gene in enumerate(self.manifest.genes)}
        for gene in genes:
            if gene not in place:
                raise ValueError(f"{self.path} has no gene {gene!r}{nearest(gene, place)}")
        if not genes or len(set(genes)) < len(genes):
            raise ValueError(f"a panel of {len(genes)} genes, {len(set(genes))} of them different: name each gene once")
        seen = copy.copy(self)
        seen._panel = np.array([place[gene] for gene in genes], dtype=np.int64)
        return seen

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Counts of some cells.

        Parameters
        ----------
        rows
            ``int64 [n]``, store rows in any order, repeats allowed.

        Returns
        -------
        csr_matrix [n, g]
            Molecules, int32 (int64 where the store holds uint32), in the order asked; gene indices ascending.

        Raises
        ------
        ValueError
            Rows out of range, or a corrupt shard (named).
        """
        counts = self._read(self._checked(rows))
        if self._panel is None:
            return counts
        counts = counts[:, self._panel]
        counts.sort_indices()
        return counts

    def _read(self, rows: np.ndarray) -> sparse.csr_matrix:
        if not len(rows):
            return sparse.csr_matrix((0, len(self.manifest.genes)), dtype=self._wide)
        ascending = bool((rows[1:] >= rows[:-1]).all())
        order = None if ascending else np.argsort(rows, kind="stable")
        pieces = list(self._pieces(rows if order is None else rows[order]))
        counts = sparse.csr_matrix(
            (
                np.concatenate([p[0] for p in pieces], dtype=self._wide),
                np.concatenate([p[1] for p in pieces], dtype=np.int32),
                np.concatenate([[0], np.cumsum(np.concatenate([p[2] for p in pieces]))]),
            ),
            shape=(len(rows), len(self.manifest.genes)),
        )
        counts.has_canonical_format = True
        return counts if order is None else counts[np.argsort(order)]

    def cells(self, rows: np.ndarray, labels: Sequence[str] | None = None) -> Cells:
        """A batch on the CPU: dense ``float32 [n, g]`` counts, label codes, and the rows themselves.

        Parameters
        ----------
        rows
            ``int64 [n]`` store rows.
        labels
            Covariates wanted; None is all.

        Raises
        ------
        ValueError
            As `read` and `labels`.
        """
        rows = self._checked(rows)
        codes = self.labels(rows, labels)
        counts = torch.from_numpy(dense(self.read(rows)))
        return Cells(counts, Condition({k: torch.from_numpy(v) for k, v in codes.items()}), torch.from_numpy(rows))

    def labels(self, rows: np.ndarray, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Label codes ``int64 [n]`` per covariate (None is all), -1 where missing.

        Raises
        ------
        ValueError
            Rows out of range, or no such covariate (the nearest one is named).
        """
        rows = self._checked(rows)
        return {k: self._column(f"labels/{k}")[rows].astype(np.int64) for k in self._label_keys(keys)}

    def rows(self, split: str = "all") -> np.ndarray:
        """Rows of ``"train"``, ``"val"``, ``"test"`` or ``"all"``, ascending ``int64``.

        Raises
        ------
        ValueError
            No such split.
        """
        if split == "all":
            return np.arange(self.n_cells, dtype=np.int64)
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}{nearest(split, [*SPLITS, 'all'])}")
        return np.flatnonzero(self._column("split") == SPLITS.index(split)).astype(np.int64)

    def names(self, rows: np.ndarray) -> np.ndarray:
        """Cell names, ``str [n]``."""
        rows = self._checked(rows)
        raw = self._values("names", self._array("names")[rows])
        return np.char.decode(np.ascontiguousarray(raw).view(f"S{raw.shape[1]}")[:, 0], "utf-8")

    def origin(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input file ``int32 [n]`` (place in ``manifest.sources``) and row there ``int64 [n]`` of some cells."""
        rows = self._checked(rows)
        return self._column("source/file")[rows], self._column("source/row")[rows]

    def statistics(self) -> dict[str, np.ndarray]:
        """Per gene over training cells, each ``float64 [g]``: ``mean``, ``var`` (molecules^2), ``nnz``, ``max``."""
        return {name: self._of_genes(name) for name in ("mean", "var", "nnz", "max")}

    def spec(self, labels: Sequence[str] | None = None) -> DataSpec:
        """What a denoiser must know: genes, the values of some covariates (None is all), mean counts."""
        values = {k: tuple(self.manifest.labels[k]) for k in self._label_keys(labels)}
        return DataSpec(self.genes, values, self._of_genes("mean").astype(np.float32))

    def verify(self) -> None:
        """Read everything once and compare it with the manifest's hashes.

        Raises
        ------
        ValueError
            A shard differs from what was built (it is named).
        """
        for shard in self.manifest.shards:
            rows = np.arange(shard.start, shard.stop)
            codes = [*(self._column(f"labels/{k}")[rows] for k in sorted(self.manifest.labels))]
            if combine(digest(self._read(rows)), [*codes, self._column("split")[rows]]) != shard.sha256:
                raise self._corrupt(shard.start // self.manifest.block, "its content differs from the manifest's hash")

    def _pieces(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Counts, gene numbers and row lengths of ascending rows, block by block."""
        numbers, first = np.unique(rows // self.manifest.block, return_index=True)
        last = [*first[1:], len(rows)]
        for lo in range(0, len(numbers), GROUP):
            group = numbers[lo : lo + GROUP].tolist()
            for number, block, a, b in zip(group, self._blocks(group), first[lo:], last[lo:], strict=False):
                local = rows[a:b] - number * self.manifest.block
                starts = block.indptr[local]
                lengths = block.indptr[local + 1] - starts
                if (np.diff(local) == 1).all():
                    run = slice(int(starts[0]), int(starts[0] + lengths.sum()))
                    yield block.data[run], block.indices[run], lengths
                else:
                    ends = np.cumsum(lengths)
                    at = np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])
                    yield block.data[at], block.indices[at], lengths

    def _blocks(self, numbers: Sequence[int]) -> list[_Block]:
        """Decoded blocks, from the cache or the disk."""
        with self._lock:
            found = {n: self._cache[n] for n in numbers if n in self._cache}
            for n in found:
                self._cache.move_to_end(n)
        missing = [n for n in numbers if n not in found]
        if missing:
            found |= self._fetch(missing)
            with self._lock:
                for n in missing:
                    if n not in self._cache:
                        self._cache[n] = found[n]
                        self._room -= found[n].nbytes
                while self._room < 0 and self._cache:
                    self._room += self._cache.popitem(last=False)[1].nbytes
        return [found[n] for n in numbers]

    def _fetch(self, numbers: Sequence[int]) -> dict[int, _Block]:
        """Read and check blocks from the disk, all in one batch of requests."""
        try:
            data, indices, indptr = self._request(numbers)
        except ValueError as e:
            for n in numbers if len(numbers) > 1 else ():
                self._fetch([n])  # raises for the block that is at fault
            raise self._corrupt(numbers[0], str(e)) from e
        return {n: self._trim(n, data[i], indices[i], indptr[i]) for i, n in enumerate(numbers)}

    def _request(self, numbers: Sequence[int]) -> list[np.ndarray]:
        at = np.asarray(numbers, np.int64)
        with ts.Batch() as batch:
            futures = [self._counts[part][at].read(batch=batch) for part in PARTS]
        return [f.result() for f in futures]

    def _trim(self, number: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> _Block:
        """A block without its padding, checked: zarr reads a chunk that is not there as zeros."""
        starts = indptr.astype(np.int64)
        nnz, n = int(starts[-1]), min(self.manifest.block, self.n_cells - number * self.manifest.block)
        lengths = np.diff(starts)
        if starts[0] != 0 or nnz > len(data) or (lengths[:n] < 1).any() or (lengths[n:] != 0).any():
            raise self._corrupt(number, "its row starts make no sense")
        if not data[:nnz].all() or data[nnz:].any():
            raise self._corrupt(number, "its counts do not fit its row starts")
        ascending = indices[1:nnz] > indices[: nnz - 1]
        ascending[starts[1:n] - 1] = True  # a cell's first gene may be below the last one of the cell before
        if not ascending.all() or int(indices[:nnz].max()) >= len(self.manifest.genes):
            raise self._corrupt(number, "its gene numbers make no sense")
        return _Block(data[:nnz].copy(), indices[:nnz].copy(), starts)

    def _corrupt(self, block: int, why: str) -> ValueError:
        shard = self.manifest.shards[block // self.manifest.blocks_per_shard]
        return ValueError(
            f"{self.path}: shard {shard.index} (rows {shard.start} to {shard.stop}) is corrupt in block {block} "
            f"({why}); rebuild the store: distdiff shard --overwrite"
        )

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise ValueError(f"rows: a vector of whole numbers is wanted, got {rows.dtype} of shape {rows.shape}")
        rows = rows.astype(np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.n_cells:
            wrong = rows[(rows < 0) | (rows >= self.n_cells)][0]
            raise ValueError(f"row {wrong} asked of {self.path}, it has rows 0 to {self.n_cells - 1}")
        return rows

    def _label_keys(self, keys: Sequence[str] | None) -> list[str]:
        known = self.manifest.labels
        for k in keys or ():
            if k not in known:
                raise ValueError(f"{self.path} has no label {k!r}{nearest(k, known)}")
        return list(known if keys is None else keys)

    def _array(self, name: str) -> Any:
        """Open one array of the store."""
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.path / name}/"}}
        try:
            return ts.open(
                spec | {"recheck_cached_data": False, "recheck_cached_metadata": False},
                context=self._context,
                open=True,
                read=True,
            ).result()
        except ValueError as e:
            raise ValueError(
                f"{self.path}: {name} is damaged ({e}); rebuild the store: distdiff shard --overwrite"
            ) from e

    def _column(self, name: str) -> np.ndarray:
        """A small array, read once and kept."""
        if name not in self._columns:
            self._columns[name] = self._values(name, self._array(name))
        return self._columns[name]

    def _of_genes(self, name: str) -> np.ndarray:
        column = self._column(f"genes/{name}")
        return column.copy() if self._panel is None else column[self._panel]

    def _values(self, name: str, array: Any) -> np.ndarray:
        try:
            return array.read().result()
        except ValueError as e:
            raise ValueError(
                f"{self.path}: {name} cannot be read ({e}); rebuild the store: distdiff shard --overwrite"
            ) from e


def _reopen(path: str, cache_bytes: int, genes: tuple[str, ...] | None) -> CountStore:
    store = CountStore.open(path, cache_bytes=cache_bytes)
    return store if genes is None else store.panel(genes)
