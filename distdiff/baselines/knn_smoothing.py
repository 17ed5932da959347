"""kNN-smoothing (after Wagner, Yan & Yanai, bioRxiv 217737): pools of neighbours, grown in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from distdiff.baselines import BoolArray, FloatArray, depth
from distdiff.baselines._fitted import Fitted
from distdiff.types import Cells

PIECE = 1024
"""Cells whose distances to all training cells are in memory at once."""


@dataclass(eq=False)
class KnnSmoothing(Fitted):
    """``rate = s`` times the mean profile of the ``k`` nearest training cells, found on ever smoother counts.

    In step ``t`` every cell is pooled with its ``min(2^t - 1, k)`` nearest cells by Euclidean distance of
    Freeman-Tukey transforms ``sqrt(x) + sqrt(x + 1)`` of the pools of the step before, scaled to equal depth. A masked
    cell takes part with its observed genes alone, in distances and in its pool. As the first version of the method,
    distances use all genes, not principal components.

    Parameters
    ----------
    k
        Neighbours in the last step.

    Examples
    --------
    >>> from distdiff.baselines.knn_smoothing import KnnSmoothing
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), KnnSmoothing(k=(4, 8))
    >>> row.fit(store, store.rows("train"))
    >>> len(row.pools)  # of 1, 3, 7 neighbours and of all k
    4
    """

    k: int | Sequence[int] = (16, 32, 64, 128)

    label = "kNN-smoothing"

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Smooth the training cells step by step; every step's pools are kept for the cells to come."""
        self.train = kept.counts.numpy()
        k = min(option["k"], max(1, len(self.train) - 1))
        self.ks = sorted({min(2**t - 1, k) for t in range(1, int(np.log2(k + 1)) + 2)})
        everything = np.ones(self.train.shape, dtype=bool)
        pools, self.pools = self.train, []
        for size in self.ks:
            self.pools.append(self._transform(pools, everything))
            pools = self.train + self._pooled(pools, everything, size, own=True)

    def _transform(self, pools: FloatArray, observed: BoolArray) -> FloatArray:
        x = pools / depth(pools, observed, self.gene_mean)
        return ((np.sqrt(x) + np.sqrt(x + 1.0)) * observed).astype(np.float32)

    def _pooled(self, pools: FloatArray, observed: BoolArray, size: int, *, own: bool = False) -> FloatArray:
        """Sum of the raw counts of the ``size`` training cells nearest to each pool, ``float64 [b g]``."""
        train = self.pools[self.ks.index(size)]
        squares = (train * train).T
        out = np.empty(pools.shape)
        for start in range(0, len(pools), PIECE):
            part = slice(start, start + PIECE)
            seen = observed[part]
            distance = seen.astype(np.float32) @ squares - 2.0 * (self._transform(pools[part], seen) @ train.T)
            if own:  # a training cell is no neighbour of its own
                distance[np.arange(len(distance)), np.arange(start, start + len(distance))] = np.inf
            near = np.argpartition(distance, min(size, len(train)) - 1, axis=1)[:, :size]
            pick = csr_array(
                (np.ones(near.size), near.ravel(), np.arange(len(near) + 1) * near.shape[1]),
                shape=(len(near), len(train)),
            )
            out[part] = pick @ self.train
        return out

    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Grow the pool of each masked cell in the same steps; hidden genes come from the last pool alone."""
        pools = counts.astype(np.float64)
        for size in self.ks:
            neighbours = self._pooled(pools, observed, size)
            pools = counts + neighbours * observed
        s = depth(counts, observed, self.gene_mean)
        own = s * pools / depth(pools, observed, self.gene_mean)
        mean = neighbours / self.ks[-1]
        return np.where(observed, own, s * mean / depth(mean * observed, observed, self.gene_mean))
