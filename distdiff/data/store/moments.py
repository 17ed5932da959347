"""Sums over cells that give the mean and variance of each gene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Moments:
    """Sums over training cells, each ``float64 [g]``, exact for whole numbers below 2^53; ``+`` adds cells.

    Examples
    --------
    >>> from scipy import sparse
    >>> from distdiff.data.store.moments import Moments
    >>> half, rest = (Moments.of(sparse.csr_matrix(x)) for x in ([[2, 0]], [[4, 1]]))
    >>> (half + rest).mean, (half + rest).var
    (array([3. , 0.5]), array([1.  , 0.25]))
    """

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
        return self.total / max(self.n, 1)

    @property
    def var(self) -> np.ndarray:
        """Population variance, molecules^2, ``float64 [g]``."""
        return np.maximum(self.squares / max(self.n, 1) - self.mean**2, 0.0)
