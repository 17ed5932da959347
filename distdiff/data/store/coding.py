"""Counts in two bytes, the gap to the next gene and the count, and compiled loops that write and read them.

A cell is a run of entries ``(gap, value)``. Its gene numbers are the running sums of its gaps from 0, and its counts
are the sums of the values that fall on one gene: an entry ``(255, 0)`` only advances the gene number, an entry ``(0,
value)`` adds to the gene before. So any count fits any width of value without loss, and a reader only has to add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from distdiff.data.store import recycle
from distdiff.jit import njit

GAP = 255
"""Largest gap of one entry."""

RUN = 64
"""Counts that are coded together in a fast loop, if each of them takes one entry."""


class Coded(NamedTuple):
    """Coded cells: ``gaps`` uint8 ``[e]``, ``values`` ``[e]``, ``starts`` of the cells in them, int64 ``[n + 1]``.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import encode
    >>> coded = encode(sparse.csr_matrix([[2, 0, 0, 9], [0, 1, 0, 0]]), "uint8")
    >>> coded.gaps, coded.values, coded.starts
    (array([0, 3, 1], dtype=uint8), array([2, 9, 1], dtype=uint8), array([0, 2, 3]))
    """

    gaps: np.ndarray
    values: np.ndarray
    starts: np.ndarray


class Slots(NamedTuple):
    """Blocks of coded cells: ``gaps``, ``values`` ``[slots, cap]``, ``starts`` uint32 ``[slots, R + 1]``.

    Examples
    --------
    >>> from distdiff.data.store.coding import Slots
    >>> slots = Slots.zeros(2, cap=64, block=16, dtype="uint8")
    >>> slots.gaps.shape, slots.starts.shape
    ((2, 64), (2, 17))
    """

    gaps: np.ndarray
    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def zeros(cls, n: int, cap: int, block: int, dtype: str) -> Slots:
        """Memory of ``n`` blocks, all zero."""
        return cls(np.zeros((n, cap), np.uint8), np.zeros((n, cap), dtype), np.zeros((n, block + 1), np.uint32))

    @classmethod
    def empty(cls, n: int, cap: int, block: int, dtype: str) -> Slots:
        """Memory for ``n`` blocks, not initialised; the system provides it when it is first written."""
        return cls(np.empty((n, cap), np.uint8), np.empty((n, cap), dtype), np.empty((n, block + 1), np.uint32))


def encode(counts: sparse.csr_matrix, dtype: Any, order: np.ndarray | None = None) -> Coded:
    """Code the cells of canonical CSR (genes ascending, none twice, no zeros stored).

    Parameters
    ----------
    counts
        ``[n, g]``; whole numbers of 1 or more, or any float for a float ``dtype``.
    dtype
        Of the values: uint8, uint16, uint32, or float32.
    order
        ``int64 [m]``, the rows to code, in this order; None is all rows.

    Examples
    --------
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import encode
    >>> encode(sparse.csr_matrix([[300]]), "uint8").values  # 300 = 255 + 45, in two entries
    array([255,  45], dtype=uint8)
    """
    top = _top(dtype)
    order = np.arange(counts.shape[0]) if order is None else order
    starts = np.zeros(len(order) + 1, np.int64)
    _lengths(counts.indptr, counts.indices, counts.data, order, top, starts)
    np.cumsum(starts, out=starts)
    coded = Coded(np.empty(starts[-1], np.uint8), np.empty(starts[-1], dtype), starts)
    _encode(counts.indptr, counts.indices, counts.data, order, top, coded.gaps, coded.values)
    return coded


def recoded(of: Coded, gene_column: np.ndarray, group: np.ndarray, dtype: Any) -> np.ndarray:
    """Entries that each cell takes after its genes were moved to other columns, ``int64 [groups, n]``.

    Parameters
    ----------
    of
        The coded cells.
    gene_column, group
        ``int [g]`` each: column of every gene within its column group (ascending within a group; -1: dropped), and
        the number of that group.
    dtype
        Of the values.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import encode, recoded
    >>> coded = encode(sparse.csr_matrix([[2, 0, 9]]), "uint8")
    >>> recoded(coded, np.array([0, -1, 1]), np.zeros(3, np.int64), "uint8")  # without the middle gene
    array([[2]])
    """
    if _same(gene_column) and not group.any() and np.dtype(dtype) == of.values.dtype:
        return np.diff(of.starts)[None]
    out = np.zeros((int(group.max(initial=0)) + 1, len(of.starts) - 1), np.int64)
    _recoded(of.gaps, of.values, of.starts, gene_column, group, _top(dtype), _top(of.values.dtype), out)
    return out


def decode(coded: Coded, n_genes: int, dtype: Any) -> sparse.csr_matrix:
    """Canonical CSR ``[n, n_genes]`` of `dtype`: the inverse of `encode`.

    Examples
    --------
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import decode, encode
    >>> decode(encode(sparse.csr_matrix([[2, 0, 300]]), "uint8"), 3, "int32").toarray()
    array([[  2,   0, 300]], dtype=int32)
    """
    n = len(coded.starts) - 1
    slots = Slots(coded.gaps[None], coded.values[None], coded.starts[None])
    return csr(slots, np.zeros(n, np.int64), np.arange(n), np.arange(n_genes, dtype=np.int32), n_genes, dtype)


def csr(
    slots: Slots, slot: np.ndarray, local: np.ndarray, gene_column: np.ndarray, n_genes: int, dtype: Any
) -> sparse.csr_matrix:
    """Some cells of some blocks as canonical CSR.

    Parameters
    ----------
    slots
        The blocks, checked by `fault`.
    slot, local
        ``int64 [n]``: block of each cell, and its row within that block.
    gene_column
        ``int32 [genes of the blocks]``: output column of each gene, -1 for a gene that is not wanted.
    n_genes, dtype
        Number of columns and dtype of the result.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import Slots, csr, encode
    >>> slots = Slots(*(array[None] for array in encode(sparse.csr_matrix([[2, 0, 9], [0, 4, 0]]), "uint8")))
    >>> csr(slots, np.array([0]), np.array([1]), np.array([-1, 0, -1]), 1, "int32").toarray()  # row 1, gene 1
    array([[4]], dtype=int32)
    """
    room, same = int(_room(slots.starts, slot, local)), _same(gene_column)
    indptr = np.zeros(len(slot) + 1, np.int32 if room < 2**31 else np.int64)
    indices, data = recycle.empty(room, np.int32), recycle.empty(room, dtype)
    nnz = _csr(slots.gaps, slots.values, slots.starts, slot, local, gene_column, same, indptr, indices, data)
    indices, data = indices[:nnz], data[:nnz]
    made = sparse.csr_matrix((len(slot), n_genes), dtype=dtype)
    made.data, made.indices, made.indptr = data, indices, indptr  # set directly: scipy would check them once more
    if same or (np.diff(gene_column[gene_column >= 0]) > 0).all():
        made.has_canonical_format = True
    else:
        made.sort_indices()
    return made


def add_dense(
    slots: Slots, slot: np.ndarray, local: np.ndarray, gene_column: np.ndarray, out: np.ndarray, *, clear: bool = False
) -> None:
    """Add some cells of some blocks to ``out``, ``float32 [n, g]``; ``clear`` zeroes it first. The rest as in `csr`.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import Slots, add_dense, encode
    >>> slots = Slots(*(array[None] for array in encode(sparse.csr_matrix([[2, 0, 9]]), "uint8")))
    >>> out = np.ones((1, 3), np.float32)
    >>> add_dense(slots, np.array([0]), np.array([0]), np.arange(3), out)
    >>> out
    array([[ 3.,  1., 10.]], dtype=float32)
    """
    _dense(slots.gaps, slots.values, slots.starts, slot, local, gene_column, _same(gene_column), clear, out)


def cut(slots: Slots, slot: np.ndarray, local: np.ndarray, into: tuple[np.ndarray, np.ndarray] | None = None) -> Coded:
    """Some cells of some blocks, coded, one after the other.

    Parameters
    ----------
    into
        Buffers for ``gaps`` and ``values``, used if they are long enough; so pinned memory is reused.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import Slots, cut, encode
    >>> slots = Slots(*(array[None] for array in encode(sparse.csr_matrix([[2, 0, 9], [0, 4, 0]]), "uint8")))
    >>> cut(slots, np.array([0]), np.array([1])).values
    array([4], dtype=uint8)
    """
    lengths = slots.starts[slot, local + 1].astype(np.int64) - slots.starts[slot, local]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    if into is None or len(into[0]) < total:
        into = recycle.empty(total, np.uint8), recycle.empty(total, slots.values.dtype)
    gaps, values = into[0][:total], into[1][:total]
    _cut(slots.gaps, slots.values, slots.starts, slot, local, starts, gaps, values)
    return Coded(gaps, values, starts)


def fault(slots: Slots, slot: int, n: int, n_genes: int) -> str:
    """Why a block cannot be what a build wrote, or ``""``.

    It finds missing chunks, which zarr reads as their fill value, and gene numbers out of range. Other damage is found
    by checksums.

    Parameters
    ----------
    slot
        Which of ``slots``.
    n
        Cells the block holds; those after them must be empty.
    n_genes
        Genes of the blocks.

    Examples
    --------
    >>> from distdiff.data.store.coding import Slots, fault
    >>> slots = Slots.zeros(1, cap=64, block=4, dtype="uint8")
    >>> slots.starts[0, 1:] = 1
    >>> fault(slots, 0, n=4, n_genes=10)
    'its entries are all 0'
    """
    kind = _fault(slots.gaps[slot], slots.values[slot], slots.starts[slot], n, n_genes)
    return ("", "its cell starts make no sense", "its gene numbers make no sense", "its entries are all 0")[kind]


def narrowest(nnz: int, sums: dict[str, int], largest: float) -> str:
    """The dtype of values that takes the fewest bytes.

    Parameters
    ----------
    nnz
        Counts stored.
    sums
        ``uint8``, ``uint16`` -> number of entries that each would need.
    largest
        Largest count; one count may take 64 entries at most.

    Examples
    --------
    >>> from distdiff.data.store.coding import narrowest
    >>> narrowest(nnz=1000, sums={"uint8": 1010, "uint16": 1000}, largest=400.0)
    'uint8'
    """
    needed = {**sums, "uint32": nnz}
    fits = [d for d in needed if largest <= 64 * np.iinfo(d).max]
    return min(fits, key=lambda d: needed[d] * (1 + np.dtype(d).itemsize))


def sums(
    counts: sparse.csr_matrix, rows: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, float]]:
    """All sums that a build needs, in one pass over some rows.

    Parameters
    ----------
    counts
        ``[n, g]`` canonical.
    rows, train
        ``int64 [m]`` rows, and whether each is a training cell ``bool [m]``.

    Returns
    -------
    float64 [4, g], int64 [g], (int, int, float)
        Sum, sum of squares, number and largest of the training cells' counts of each gene; number over all rows;
        entries needed in values of one and of two bytes, and the largest count.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import sums
    >>> moments, nnz, _ = sums(sparse.csr_matrix([[2, 0], [4, 1]]), np.arange(2), np.array([True, True]))
    >>> moments[0], moments[1], nnz  # sums, sums of squares, cells that have the gene
    (array([6., 1.]), array([20.,  1.]), array([2, 1]))
    """
    g = counts.shape[1]
    moments, nnz, numbers = np.zeros((g, 4)), np.zeros(g, np.int64), np.zeros(3)
    _sums(counts.indptr, counts.indices, counts.data, rows, train, moments, nnz, numbers)
    return np.ascontiguousarray(moments.T), nnz, (int(numbers[0]), int(numbers[1]), float(numbers[2]))


def totals(counts: sparse.csr_matrix) -> np.ndarray:
    """Sum of each row, ``float64 [n]``.

    Examples
    --------
    >>> from scipy import sparse
    >>> from distdiff.data.store.coding import totals
    >>> totals(sparse.csr_matrix([[2, 0, 9], [0, 4, 0]]))
    array([11.,  4.])
    """
    out = np.zeros(counts.shape[0])
    _totals(counts.indptr, counts.data, out)
    return out


def _same(gene_column: np.ndarray) -> bool:
    """Whether gene i of the blocks is column i of the result."""
    return bool(np.array_equal(gene_column, np.arange(len(gene_column))))


def _top(dtype: Any) -> int:
    """Largest value of one entry; 0 for floats, which have no limit."""
    return 0 if np.dtype(dtype).kind == "f" else int(np.iinfo(dtype).max)


@njit
def _sums(indptr, indices, data, rows, train, moments, nnz, numbers):  # type: ignore[no-untyped-def]
    one, two, largest = 0, 0, 0.0
    for i in range(len(rows)):
        a, b = indptr[rows[i]], indptr[rows[i] + 1]
        gene, value = indices[a:b], data[a:b]
        n, top = len(gene), 0.0
        for j in range(n):
            top = max(top, float(value[j]))
        largest = max(largest, top)
        one += n
        two += n
        if top > 255:
            for j in range(n):
                if value[j] > 255:
                    one += int((value[j] - 1) // 255)
                    two += int((value[j] - 1) // 65535)
        for j in range(n):
            nnz[gene[j]] += 1
        if train[i]:
            for j in range(n):
                x, of = float(value[j]), moments[gene[j]]
                of[0] += x
                of[1] += x * x
                of[2] += 1
                of[3] = max(of[3], x)
    numbers[0], numbers[1], numbers[2] = one, two, largest


@njit
def _totals(indptr, data, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        for j in range(indptr[i], indptr[i + 1]):
            out[i] += data[j]


@njit
def _recoded(gaps, values, starts, gene_column, group, top, full, out):  # type: ignore[no-untyped-def]
    last = np.zeros(len(out), np.int64)
    for i in range(len(starts) - 1):
        last[:] = 0
        gene, e = 0, starts[i]
        while e < starts[i + 1]:
            gene += gaps[e]
            value = values[e]
            e += 1
            if value == 0:
                continue
            count = np.int64(1)
            if full > 0 and value == full:  # more of this count may follow
                count = np.int64(value)
                while e < starts[i + 1] and gaps[e] == 0:
                    count += np.int64(values[e])
                    e += 1
            elif full > 0:
                count = np.int64(value)
            at, g = gene_column[gene], group[gene]
            if at < 0:
                continue
            gap = at - last[g]
            last[g] = at
            if gap > GAP:
                out[g, i] += (gap - 1) // GAP
            out[g, i] += 1
            if top > 0 and count > top:
                out[g, i] += (count - 1) // top


@njit
def _plain(indices, data, last, top):  # type: ignore[no-untyped-def]
    """Whether some counts of a cell take one entry each: no gap and no count is too large."""
    wide = (indices[0] - last > GAP) | (top > 0 and data[0] > top)
    for j in range(1, len(indices)):
        wide |= (indices[j] - indices[j - 1] > GAP) | ((data[j] > top) & (top > 0))
    return not wide


@njit
def _lengths(indptr, indices, data, order, top, out):  # type: ignore[no-untyped-def]
    for i in range(len(order)):
        last, k, stop = 0, 0, indptr[order[i] + 1]
        for a in range(indptr[order[i]], stop, RUN):
            b = min(a + RUN, stop)
            k += b - a
            if not _plain(indices[a:b], data[a:b], last, top):
                before = last
                for j in range(a, b):
                    k += max(0, indices[j] - before - 1) // GAP
                    before = indices[j]
                    if top > 0 and data[j] > top:
                        k += (np.int64(data[j]) - 1) // top
            last = indices[b - 1]
        out[i + 1] = k


@njit
def _encode(indptr, indices, data, order, top, gaps, values):  # type: ignore[no-untyped-def]
    k = 0
    for i in range(len(order)):
        last, stop = 0, indptr[order[i] + 1]
        for a in range(indptr[order[i]], stop, RUN):
            b = min(a + RUN, stop)
            if _plain(indices[a:b], data[a:b], last, top):  # simple loops: the compiler makes them fast
                gene, value, gap, out = indices[a:b], data[a:b], gaps[k : k + b - a], values[k : k + b - a]
                gap[0] = gene[0] - last
                for j in range(1, len(gene)):
                    gap[j] = gene[j] - gene[j - 1]
                for j in range(len(value)):
                    out[j] = value[j]
                k += b - a
            else:
                k = _encode_wide(indices[a:b], data[a:b], last, top, gaps, values, k)
            last = indices[b - 1]


@njit
def _encode_wide(indices, data, last, top, gaps, values, k):  # type: ignore[no-untyped-def]
    for j in range(len(indices)):
        gap = indices[j] - last
        last = indices[j]
        while gap > GAP:
            gaps[k] = GAP
            values[k] = 0
            gap -= GAP
            k += 1
        if top > 0 and data[j] > top:
            rest = np.int64(data[j])
            while rest > top:
                gaps[k] = gap
                values[k] = top
                gap = 0
                rest -= top
                k += 1
            gaps[k] = gap
            values[k] = rest
        else:
            gaps[k] = gap
            values[k] = data[j]
        k += 1
    return k


@njit
def _room(starts, slot, local):  # type: ignore[no-untyped-def]
    total = 0
    for i in range(len(slot)):
        total += np.int64(starts[slot[i], local[i] + 1]) - np.int64(starts[slot[i], local[i]])
    return total


@njit
def _extra_entries(gap, value):  # type: ignore[no-untyped-def]
    """Number of entries that are no count of their own: gaps without a count, and additions to the entry before."""
    extra_entries = 0
    for j in range(len(gap)):
        extra_entries += (gap[j] == 0) | (value[j] == 0)
    if len(gap) > 0 and gap[0] == 0 and value[0] != 0:
        extra_entries -= 1
    return extra_entries


@njit
def _csr(gaps, values, starts, slot, local, gene_column, same, indptr, indices, data):  # type: ignore[no-untyped-def]
    k = 0
    for i in range(len(slot)):
        s = slot[i]
        a, b = starts[s, local[i]], starts[s, local[i] + 1]
        gap, value = gaps[s, a:b], values[s, a:b]
        n = len(gap)
        if same and _extra_entries(gap, value) == 0:  # simple loops, one thing each: the compiler makes them fast
            some, counts = indices[k : k + n], data[k : k + n]
            for j in range(n):
                counts[j] = value[j]
            run = np.int32(0)
            for j in range(n):
                run += np.int32(gap[j])
                some[j] = run
            k += n
        else:
            gene, last = 0, -1
            for j in range(n):
                gene += gap[j]
                if value[j] == 0:
                    continue
                at = gene_column[gene]
                if at >= 0:
                    if gene == last:
                        data[k - 1] += value[j]
                    else:
                        indices[k] = at
                        data[k] = value[j]
                        k += 1
                last = gene
        indptr[i + 1] = k
    return k


@njit
def _dense(gaps, values, starts, slot, local, gene_column, same, clear, out):  # type: ignore[no-untyped-def]
    for i in range(len(slot)):
        s = slot[i]
        a, b = starts[s, local[i]], starts[s, local[i] + 1]
        gap, value, row = gaps[s, a:b], values[s, a:b], out[i]
        if clear:  # here, where the row is about to be in the cache
            row[:] = 0
        gene = np.uint64(0)
        if same:
            for j in range(len(gap)):
                gene += np.uint64(gap[j])
                row[gene] += value[j]
        else:
            for j in range(len(gap)):
                gene += np.uint64(gap[j])
                at = gene_column[gene]
                if at >= 0:
                    row[at] += value[j]


@njit
def _cut(gaps, values, starts, slot, local, to, out_gaps, out_values):  # type: ignore[no-untyped-def]
    for i in range(len(slot)):
        a, b = starts[slot[i], local[i]], starts[slot[i], local[i] + 1]
        out_gaps[to[i] : to[i + 1]] = gaps[slot[i], a:b]
        out_values[to[i] : to[i + 1]] = values[slot[i], a:b]


@njit
def _fault(gaps, values, starts, n, n_genes):  # type: ignore[no-untyped-def]
    if starts[0] != 0 or starts[len(starts) - 1] > len(gaps):
        return 1
    for i in range(len(starts) - 1):
        if starts[i + 1] < starts[i] or (i >= n and starts[i + 1] != starts[i]):
            return 1
    for i in range(n):
        gene = 0
        for gap in gaps[starts[i] : starts[i + 1]]:
            gene += gap
        if gene >= n_genes and starts[i + 1] > starts[i]:
            return 2
    used = starts[len(starts) - 1]
    if used > 0 and not values[:used].any():
        return 3
    if used > n and not gaps[:used].any():
        return 3
    return 0
