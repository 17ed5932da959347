"""Numbers that are nearly counts: what arithmetic left of a whole one, and decimals that are rounded at random."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from distdiff.data.source import first_bad
from distdiff.rng import key

NEAR = 1e-4
"""A number this close to a whole one, relative to it, is that one: what logarithm and back, or a sum, leave of it."""


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
    z = _mixed(row * _GOLDEN + np.uint64(key(seed, "round", file)))
    lot = (_mixed(z + counts.indices.astype(np.uint64) * _GOLDEN) >> np.uint64(11)) * 2.0**-53
    below = np.floor(counts.data)
    whole = below + (lot < counts.data - below)
    data = np.where(counts.data > 0, whole, counts.data).astype(counts.data.dtype)
    return sparse.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, as `distdiff.rng.rows.mix`."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
