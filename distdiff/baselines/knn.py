"""Pool of the nearest training cells on the observed genes; its draws are Poisson around the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray
from distdiff.baselines._log import FLOORS, normalise
from distdiff.baselines._tuning import dense, deviance, hold_out, random_mask, sample

if TYPE_CHECKING:
    from distdiff.data.store import CountStore

NEIGHBOURS = (10, 20, 50)


class Knn(Baseline):
    """Mean rate of the ``k`` nearest training cells times the depth of the evidence.

    Distance is Euclidean in ``log1p(counts / depth)`` over the genes that the cell has observed, by matrix products.
    ``k`` and the floor (a share of gene mean x depth) are picked on a held-out fifth of the training cells with half of
    their entries hidden.

    Parameters
    ----------
    at_most
        Training cells kept (a random sample of more).
    """

    label = "kNN pool"

    def __init__(self, at_most: int = 20_000, seed: int = 0) -> None:
        self.at_most, self.seed = at_most, seed

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Keep the training cells, pick k and floor."""
        counts = dense(store, sample(rows, self.at_most, self.seed))
        kept, held = hold_out(len(counts))
        self._remember(counts[kept])
        test = counts[held][:1000]
        observed = random_mask(test.shape, 0.5, self.seed, "knn")
        scores = {}
        for k in NEIGHBOURS:
            pool, d = self._pool(test * observed, observed, k)
            for floor in FLOORS:
                rate = np.maximum(pool, floor * self.gene_mean) * d
                scores[k, floor] = deviance(test, observed, rate)
        self.k, self.floor = min(scores, key=lambda o: scores[o])
        self._remember(counts)

    def _remember(self, counts: FloatArray) -> None:
        every = np.ones(counts.shape, dtype=bool)
        self.log, d = normalise(counts, every, self.gene_mean)
        self.rates = (counts / d).astype(np.float32)
        self.squares = self.log**2

    def _pool(self, counts: FloatArray, observed: BoolArray, k: int) -> tuple[FloatArray, FloatArray]:
        z, d = normalise(counts, observed, self.gene_mean)
        k = min(k, len(self.log))
        far = self.squares @ observed.T.astype(np.float32) - 2 * (self.log @ z.T)
        near = np.argpartition(far, k - 1, axis=0)[:k].T
        pool = np.zeros(counts.shape, dtype=np.float64)
        for column in near.T:  # k small gathers, never [b k g] at once
            pool += self.rates[column]
        return pool / k, d

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Pool of the ``k`` nearest, scaled to the depth of the evidence."""
        pool, d = self._pool(counts, observed, self.k)
        return np.maximum(pool, self.floor * self.gene_mean) * d
