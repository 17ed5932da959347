"""Matrices whose cells can be read a few at a time: CSR on disk, some columns of a matrix, arrays of dask."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from distdiff.data.ingest.damage import InputError


class CsrRows:
    """Row slices of a CSR group on disk (h5py or zarr): ``matrix[start:stop]`` is CSR.

    Raises
    ------
    InputError
        Its parts do not fit each other.
    """

    def __init__(self, group: Any, shape: tuple[int, int], where: str) -> None:
        self.shape, self.where = (int(shape[0]), int(shape[1])), where
        self._data, self._indices, self._indptr = group["data"], group["indices"], group["indptr"]
        self.dtype, self.nnz = number_dtype(self._data.dtype, where), int(self._data.shape[0])
        starts = int(self._indptr.shape[0])
        if starts != self.shape[0] + 1:
            raise InputError(f"{where}: {starts} row starts for {self.shape[0]} cells; the file is damaged")
        first, last, n_indices = int(self._indptr[0]), int(self._indptr[-1]), int(self._indices.shape[0])
        if first != 0 or not last == self.nnz == n_indices:
            raise InputError(
                f"{where}: {last - first} entries promised, {n_indices} indices and {self.nnz} values found; truncated "
                "or damaged: copy the file again"
            )

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        indptr = np.asarray(self._indptr[rows.start : rows.stop + 1]).astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        if first < 0 or last > self.nnz or (np.diff(indptr) < 0).any():
            raise InputError(
                f"{self.where}: rows {rows.start} to {rows.stop} cannot be read (their starts do not ascend): "
                "truncated or damaged; copy the file again"
            )
        data, indices = as_numbers(self._data[first:last], self.where), np.asarray(self._indices[first:last])
        return sparse.csr_matrix((data, indices, indptr - first), shape=(rows.stop - rows.start, self.shape[1]))


class Columns:
    """The same rows, some of the columns (``keep``, ascending) of ``matrix``."""

    def __init__(self, matrix: Any, keep: np.ndarray, where: str) -> None:
        self._matrix, self._keep, self.where = matrix, keep, where
        self.shape, self.dtype = (matrix.shape[0], len(keep)), matrix.dtype
        self.nnz = getattr(matrix, "nnz", matrix.shape[0] * len(keep))
        if len(matrix.shape) != 2 or int(keep[-1]) >= matrix.shape[1]:
            raise InputError(f"{where}: {matrix.shape} is not cells and the features of var; the file is damaged")

    def __getitem__(self, rows: slice) -> Any:
        counts = self._matrix[rows]
        if not sparse.issparse(counts):
            return np.asarray(counts)[:, self._keep]
        if counts.nnz and not 0 <= counts.indices.min() <= counts.indices.max() < counts.shape[1]:
            raise InputError(
                f"{self.where}: an entry of feature {counts.indices.max()}, there are {counts.shape[1]}; the file is "
                "damaged: copy it again"
            )
        return counts[:, self._keep]


class LazyRows:
    """An array of dask, dense or of CSR blocks, by row slices, each computed when it is read."""

    def __init__(self, array: Any) -> None:
        self._array, self.shape, self.dtype = array, tuple(map(int, array.shape)), np.dtype(array.dtype)

    def __getitem__(self, rows: slice) -> Any:
        return self._array[rows].compute(scheduler="threads")


def number_dtype(dtype: Any, where: str) -> np.dtype[Any]:
    """The dtype in which numbers of a file's dtype are held here: native byte order, no booleans, no float16.

    scipy has no sparse float16, and sums of booleans are booleans.

    Raises
    ------
    InputError
        They are no real numbers.

    Examples
    --------
    >>> number_dtype(">f4", "a.h5ad"), number_dtype("float16", "a.h5ad"), number_dtype(bool, "a.h5ad")
    (dtype('float32'), dtype('float32'), dtype('uint8'))
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "biuf":
        raise InputError(f"{where}: its values are of dtype {dtype}, not numbers; choose another layer with layer=")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


def as_numbers(values: Any, where: str) -> np.ndarray:
    """Values of a file as an array in the dtype of `number_dtype`; a copy only where that is another one."""
    values = np.asarray(values)
    return values.astype(number_dtype(values.dtype, where), copy=False)
