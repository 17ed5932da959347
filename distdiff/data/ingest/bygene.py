"""Matrices on disk whose entries lie gene by gene or as a list: parts of them, and their rows once they were turned."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from distdiff.data.ingest.bycell import as_numbers, number_dtype
from distdiff.data.ingest.damage import InputError, reading

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns and values of some entries, each ``[e]``."""


class ByGene(ABC):
    """A matrix on disk in which the entries of a cell are scattered: parts of it, or rows once it is loaded whole.

    Attributes
    ----------
    where
        For messages.
    shape
        Cells, genes.
    dtype
        Of the values.
    nnz
        Stored entries.
    """

    where: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    nnz: int
    _whole: sparse.csr_matrix | None = None

    @abstractmethod
    def cuts(self, entries: int) -> list[tuple[int, int]]:
        """Starts and stops of parts of about ``entries`` entries, in file order; at least one."""

    @abstractmethod
    def pieces(self, start: int, stop: int, entries: int) -> Iterator[Triplets]:
        """The entries of one part in file order, checked, at most ``entries`` at once; the next ones overwrite them."""

    def load(self) -> sparse.csr_matrix:
        """All of it by row."""
        cuts = self.cuts(max(self.nnz, 1))
        parts = list(self.pieces(cuts[0][0], cuts[-1][1], max(self.nnz, 1)))
        if not parts:
            return sparse.csr_matrix(self.shape, dtype=self.dtype)
        rows, columns, values = (p[0] if len(p) == 1 else np.concatenate(p) for p in zip(*parts, strict=True))
        rows, order = by_row(rows)
        indptr = np.searchsorted(rows, np.arange(self.shape[0] + 1))
        return sparse.csr_matrix((values[order], columns[order], indptr), shape=self.shape)

    def check(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """Refuse entries outside of the matrix.

        Raises
        ------
        ValueError
            The first one is named.
        """
        n, g = self.shape
        for what, index, size in (("cell", rows, n), ("gene", columns, g)):
            if index.size and not 0 <= index.min() <= index.max() < size:
                at = int(np.argmax((index < 0) | (index >= size)))
                raise InputError(
                    f"{self.where}: an entry is of {what} {int(index[at]) + 1}, counted from 1, but there are {size}; "
                    "the file is damaged: copy or write it again"
                )

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        if self._whole is None:
            self._whole = self.load()
        return self._whole[rows]


class Csc(ByGene):
    """A CSC group of h5py or zarr, ``[cells, genes]``; nothing is read before it is asked for."""

    def __init__(self, group: Any, shape: tuple[int, int], where: str) -> None:
        self.where, self.shape = where, shape
        self._data, self._indices, self._indptr = group["data"], group["indices"], group["indptr"]
        self.dtype, self.nnz = number_dtype(self._data.dtype, where), int(self._data.shape[0])

    def cuts(self, entries: int) -> list[tuple[int, int]]:
        self.starts()
        return [(at, min(at + entries, self.nnz)) for at in range(0, self.nnz, entries)] or [(0, 0)]

    def pieces(self, start: int, stop: int, entries: int) -> Iterator[Triplets]:
        indptr = self.starts()
        for at in range(start, stop, entries):
            end = min(at + entries, stop)
            columns = np.repeat(np.arange(self.shape[1], dtype=np.int32), np.diff(indptr.clip(at, end)))
            with reading(self.where):
                rows, values = np.asarray(self._indices[at:end]), as_numbers(self._data[at:end], self.where)
            self.check(rows, columns)
            yield rows, columns, values

    def load(self) -> sparse.csr_matrix:
        indptr = self.starts()
        with reading(self.where):
            rows, values = np.asarray(self._indices[:]), as_numbers(self._data[:], self.where)
        self.check(rows, rows[:0])
        return sparse.csc_matrix((values, rows, indptr), shape=self.shape).tocsr()

    def starts(self) -> np.ndarray:
        """Where the entries of each gene start, ``int64 [g + 1]``; refused if they do not fit the matrix."""
        with reading(self.where):
            indptr, indices = np.asarray(self._indptr[:]).astype(np.int64), int(self._indices.shape[0])
        if len(indptr) != self.shape[1] + 1 or indptr[0] or (np.diff(indptr) < 0).any():
            raise InputError(f"{self.where}: indptr does not fit {self.shape[1]} genes; the file is damaged")
        if not indptr[-1] == indices == self.nnz:
            raise InputError(
                f"{self.where}: {indptr[-1]} entries promised, {indices} indices and {self.nnz} values found; "
                "truncated or damaged: copy the file again"
            )
        return indptr


class Turned:
    """Rows of a turned matrix: ``turned[start:stop]`` is CSR with ascending columns, duplicates as in the file.

    Parameters
    ----------
    folder
        What every `turn` wrote to.
    shape
        Cells, genes.

    Attributes
    ----------
    shape, dtype, nnz
        Of the matrix; dtype is that of the file.
    stamp, layer
        Which version of the file was turned, and which layer.

    Raises
    ------
    ValueError
        Slabs are missing, or are not of one file of this shape.
    """

    def __init__(self, folder: str | Path, shape: tuple[int, int]) -> None:
        folder = Path(folder)
        found = sorted(folder.glob("slab-*/slab.json"))
        slabs = [json.loads(f.read_text()) for f in found]
        of = slabs[0]["of"] if slabs else 1
        if [s["number"] for s in slabs] != list(range(of)):
            raise ValueError(f"{folder} holds {len(slabs)} of {of} slabs; carry out `turn` on the others first")
        first = slabs[0]
        if any(s[k] != first[k] for s in slabs for k in ("of", "stamp", "layer", "shape", "dtype")):
            raise ValueError(f"{folder} holds slabs of several files or layers; delete it and turn the file again")
        if tuple(first["shape"]) != tuple(shape):
            raise ValueError(f"{folder} holds {first['shape']} cells and genes, {list(shape)} wanted; delete it")
        self.shape, self.dtype = tuple(shape), np.dtype(first["dtype"])
        self.stamp, self.layer, self.nnz = first["stamp"], first["layer"], sum(s["nnz"] for s in slabs)
        if self.nnz != first["promised"]:
            raise ValueError(
                f"{first['path']}: {first['promised']} entries promised, {self.nnz} found; truncated or damaged: copy "
                f"the file again and delete {folder}"
            )
        names = [f.parent / str(i) for f, s in zip(found, slabs, strict=True) for i in range(s["pieces"])]
        self._pieces = [tuple(_load(f"{name}-{part}.npy") for part in _PARTS) for name in names]

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        start, stop, _ = rows.indices(self.shape[0])
        n = max(stop - start, 0)
        found = []
        for piece_rows, starts, columns, values in self._pieces:
            first, last = np.searchsorted(piece_rows, np.array([start, start + n], piece_rows.dtype))
            ends = starts[first : last + 1].astype(np.int64)
            if last > first:
                at = slice(ends[0], ends[-1])
                found.append((piece_rows[first:last].astype(np.int64) - start, np.diff(ends), columns[at], values[at]))
        indptr = np.zeros(n + 1, np.int64)
        for row, counts, _, _ in found:
            indptr[row + 1] += counts
        indptr = np.cumsum(indptr)
        indices, data = np.empty(indptr[-1], _index_dtype(self.shape[1])), np.empty(indptr[-1], self.dtype)
        free = indptr[:-1].copy()
        for row, counts, columns, values in found:
            to = np.repeat(free[row] - (np.cumsum(counts) - counts), counts) + np.arange(len(columns))
            indices[to], data[to] = columns, values
            free[row] += counts
        counts = sparse.csr_matrix((data, indices, indptr), shape=(n, self.shape[1]))
        return counts if counts.has_sorted_indices else _sorted(counts)


def by_row(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in ascending order and the stable order that brings them there, both ``int64 [e]``."""
    bits = max(len(rows) - 1, 1).bit_length()
    keys = rows.astype(np.int64)
    if int(keys.max(initial=0)) >= 2 ** (63 - bits):
        order = np.argsort(keys, kind="stable")
        return keys[order], order
    keys <<= bits
    keys += np.arange(len(rows))
    keys.sort()  # of row and place at once: several times faster than a stable argsort
    order = keys & ((1 << bits) - 1)
    keys >>= bits
    return keys, order


_PARTS = ("rows", "starts", "columns", "values")


def _load(name: str) -> np.ndarray:
    try:
        return np.load(name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as e:
        raise ValueError(f"{name} cannot be read ({e}); delete its folder and turn the file again") from e


def _index_dtype(size: int) -> type[np.signedinteger[Any]]:
    return np.int32 if size < 2**31 else np.int64


def _sorted(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Columns ascending within each row; duplicates stay in their order."""
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    _, order = by_row(row * counts.shape[1] + counts.indices)
    return sparse.csr_matrix((counts.data[order], counts.indices[order], counts.indptr), shape=counts.shape)
