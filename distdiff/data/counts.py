"""What a count is: a whole number of molecules. Checks, numbers that are nearly whole, and rounding at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from distdiff.jit import njit
from distdiff.rng import key

MAX_COUNT = 2**32 - 1
"""Largest count a store holds."""

LAST_EXACT = 2**24
"""From here on float32 does not hold every whole number."""

NEAR = 1e-4
"""A number this close to a whole one, relative to it, is that one: what logarithm and back, or a sum, leave of it."""


def first_bad(counts: sparse.csr_matrix) -> tuple[int, int, float] | None:
    """Row, column and value of the first entry that is no count, or None: one vectorised pass."""
    data = counts.data
    if data.dtype.kind in "bu" and data.dtype.itemsize <= 4:
        return None
    at = -1 if data.dtype.kind in "fiu" and data.dtype.itemsize > 2 and not any_bad(data, MAX_COUNT) else _search(data)
    if at < 0:
        return None
    row = int(np.searchsorted(counts.indptr, at, side="right")) - 1
    return row, int(counts.indices[at]), float(data[at])


def _search(data: np.ndarray) -> int:
    """Place of the first entry that is no count, or -1."""
    bad = (data < 0) | (data.astype(np.float64) > MAX_COUNT)
    if data.dtype.kind == "f":
        bad |= ~np.isfinite(data) | (data != np.floor(data))
    return int(np.argmax(bad)) if bad.any() else -1


def check_counts(
    counts: sparse.csr_matrix, genes: Sequence[str], cell_names: Sequence[str] | np.ndarray, where: str
) -> None:
    """Refuse whatever is not a count.

    Parameters
    ----------
    counts
        ``[n, g]``, any dtype.
    genes, cell_names
        Names of its columns ``[g]`` and rows ``[n]``.
    where
        File and layer, for the message.

    Raises
    ------
    ValueError
        A negative, fractional or non-finite entry, or one above 2^32 - 1; cell, gene and value are named.
    """
    if (bad := first_bad(counts)) is None:
        return
    row, column, value = bad
    if not np.isfinite(value):
        what = "is not finite; whole counts are needed: repair the file or choose a raw-count layer with layer="
    elif value < 0:
        what = "is negative: was this scaled? choose a raw-count layer with layer="
    elif value > MAX_COUNT:
        what = f"is above the largest count a store holds, {MAX_COUNT}"
    else:
        what = (
            "is not a whole number: was this log-normalised? choose a raw-count layer with layer=; counts corrected "
            "for ambient RNA or estimated by EM (SoupX, kallisto, alevin, RSEM) have decimals: shard them with "
            "rounding='random', which makes whole counts of them, and give the store"
        )
    raise ValueError(f"{where}: cell {str(cell_names[row])!r}, gene {str(genes[column])!r}: {value!r} {what}")


def dense(counts: sparse.csr_matrix) -> np.ndarray:
    """Counts as networks see them, ``float32 [n g]``.

    Raises
    ------
    ValueError
        As `check_exact`.
    """
    check_exact(counts)
    return counts.astype(np.float32).toarray()


def check_exact(counts: sparse.csr_matrix) -> None:
    """See to it that float32 can hold some counts.

    Raises
    ------
    ValueError
        A count of 2^24 or more, from where on float32 no longer tells one molecule.
    """
    if counts.nnz and (most := counts.data.max()) >= LAST_EXACT:
        raise ValueError(
            f"a count of {most:.0f} overflows float32, which tells molecules apart up to {LAST_EXACT - 1}; no cell "
            "holds so many of one gene: were bulk samples or reads summed? leave that gene out (genes=)"
        )


def as_counts(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """The same; where an entry is no count but within `NEAR` of a whole number, that number."""
    if counts.data.dtype.kind != "f" or first_bad(counts) is None:
        return counts
    with np.errstate(invalid="ignore"):
        whole = np.rint(counts.data)
        data = np.where(np.abs(counts.data - whole) <= NEAR * whole, whole, counts.data)
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def round_at_random(counts: sparse.csr_matrix, first: int, seed: int, file: int) -> sparse.csr_matrix:
    """Each entry as one of the two whole numbers beside it, such that its expected value is the entry itself.

    Which one depends on the seed, the file, the row and the gene, not on how the file is cut.

    Parameters
    ----------
    counts
        ``[n, g]``; negative entries stay as they are.
    first
        Row of the first cell in its file.
    seed, file
        Of the build; number of the source.
    """
    if counts.data.dtype.kind != "f":
        return counts
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    row = first + np.repeat(np.arange(counts.shape[0], dtype=np.uint64), np.diff(counts.indptr))
    z = mixed(row * _GOLDEN + np.uint64(key(seed, "round", file)))
    lot = (mixed(z + counts.indices.astype(np.uint64) * _GOLDEN) >> np.uint64(11)) * 2.0**-53
    below = np.floor(counts.data)
    whole = below + (lot < counts.data - below)
    data = np.where(counts.data > 0, whole, counts.data).astype(counts.data.dtype)
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, as `distdiff.rng.rows.mix`."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def any_bad(data: np.ndarray, most: int) -> bool:
    """Whether any number is no count: negative, fractional, not finite, or above ``most``."""
    return bool(_any_bad(data, most))


@njit
def _any_bad(data, most):  # type: ignore[no-untyped-def]
    for x in data:  # noqa: SIM110, numba has no generators
        if not (0 <= x <= most) or x != np.floor(x):
            return True
    return False
