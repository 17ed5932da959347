"""What the log-scale baselines share: depth-normalised log1p counts of the evidence, and the way back to molecules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distdiff.baselines import BoolArray, FloatArray, depth
from distdiff.baselines._tuning import deviance, random_mask

FLOORS = (0.003, 0.01, 0.03, 0.1)
"""Shares of gene mean x depth below which no answer falls; a baseline picks the best on held-out cells."""

Answer = Callable[[FloatArray, BoolArray], FloatArray]


def normalise(counts: FloatArray, observed: BoolArray, gene_mean: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``log1p(counts / depth)`` where observed, else 0: ``float32 [b g]``; and the depth, ``float64 [b 1]``."""
    d = depth(counts, observed, gene_mean)
    return np.where(observed, np.log1p(counts / d), 0.0).astype(np.float32), d


class Back:
    """From predicted ``log1p(counts / depth)`` to molecules: ``expm1``, a smearing factor a gene, a floor.

    ``expm1`` of a mean of logs is below the mean; the factor of a gene is the ratio of its held-out sums of counts and
    answers, shrunk to the ratio over all genes where the gene has few counts (50 molecules' worth).
    """

    def __init__(self, predict: Answer, gene_mean: FloatArray, counts: FloatArray, seed: int) -> None:
        self.predict, self.gene_mean = predict, gene_mean
        self.factor, self.floor = np.ones(len(gene_mean)), FLOORS[0]
        observed = random_mask(counts.shape, 0.5, seed, "smear")
        rate = self(counts * observed, observed)
        truth, answer = (np.sum(a, axis=0, where=~observed, dtype=np.float64) for a in (counts, rate))
        overall = truth.sum() / max(answer.sum(), 1e-12)
        self.factor = (truth + 50 * overall) / (answer + 50)
        scores = {}
        for floor in FLOORS:
            self.floor = floor
            scores[floor] = deviance(counts, observed, self(counts * observed, observed))
        self.floor = min(scores, key=lambda f: scores[f])
        self.score = scores[self.floor]

    def __call__(self, counts: FloatArray, observed: BoolArray) -> FloatArray:
        """Molecules of every entry ``float64 [b g]``."""
        z, d = normalise(counts, observed, self.gene_mean)
        rate = np.expm1(np.minimum(self.predict(z, observed), 15.0)) * self.factor
        return np.maximum(rate, self.floor * self.gene_mean) * d
