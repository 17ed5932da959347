"""scImpute (after Li & Li, Nat Commun 2018): likely dropouts are filled by regression on similar cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special, stats

from distdiff.baselines import BoolArray, FloatArray, depth
from distdiff.baselines._fitted import Fitted
from distdiff.baselines.knn import Knn
from distdiff.types import Cells

SHIFT = 1.01
"""Added to normalised counts before the logarithm, as published."""

PIECE = 128
"""Cells whose neighbours' values are in memory at once."""


@dataclass(eq=False)
class ScImpute(Fitted):
    """A cell's hidden genes from the non-negative combination of similar cells that fits its trusted genes.

    Values are ``log10(10 x / s + 1.01)``. Each gene's values are a mixture of a gamma (dropouts, near ``log10 1.01``)
    and a normal distribution, by expectation maximisation over the training cells; an observed value is trusted where
    its dropout probability is below ``trust``. Similar cells are the ``k`` nearest training cells on the observed genes
    (published: those of the same spectral cluster); weights come from multiplicative updates for all cells at once. No
    value is above the gene's largest in training: weights that sum to more than 1 would be an exponent.

    Parameters
    ----------
    k
        Similar cells.
    trust
        Largest dropout probability of a trusted value (published: .5).
    steps, updates
        Steps of expectation maximisation, and updates of the weights.

    Examples
    --------
    >>> from distdiff.baselines.scimpute import ScImpute
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), ScImpute(k=8)
    >>> row.fit(store, store.rows("train"))
    >>> row.impute(store.cells([0]), store.cells([0]).counts > 0).mean.shape
    torch.Size([1, 30])
    """

    k: int | Sequence[int] = (30, 60)
    trust: float | Sequence[float] = (0.5, 1.1)
    steps: int = 20
    updates: int = 50

    label = "scImpute"

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """The mixture of each gene, and the training cells."""
        from scipy.sparse import csr_array

        x = kept.counts.numpy()
        self.option, self.near = option, Knn(k=option["k"], prior=0.0, scale=1.0)
        self.near.gene_mean, self.near.train = self.gene_mean, csr_array(x)
        self.values = self._values(x, np.ones(x.shape, dtype=bool))
        self._mixture(self.values)

    def _values(self, x: FloatArray, observed: BoolArray) -> FloatArray:
        return np.log10(10.0 * x / depth(x, observed, self.gene_mean) + SHIFT).astype(np.float32)

    def _mixture(self, values: FloatArray) -> None:
        """Expectation maximisation for all genes at once: share, shape and rate of the gamma, mean and deviation."""
        v = np.maximum(values.astype(np.float64), 1e-3)
        zero = np.log10(SHIFT)
        r = np.clip((v <= zero + 1e-6).astype(float), 0.05, 0.95)
        for _ in range(self.steps):
            n = r.sum(axis=0)
            share = np.clip(n / len(v), 1e-3, 1 - 1e-3)
            first = (r * v).sum(axis=0) / np.maximum(n, 1e-9)
            gap = np.maximum(np.log(first) - (r * np.log(v)).sum(axis=0) / np.maximum(n, 1e-9), 1e-6)
            shape = np.clip((3 - gap + np.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap), 1e-2, 1e5)
            weight = np.maximum((1 - r).sum(axis=0), 1e-9)
            mean = ((1 - r) * v).sum(axis=0) / weight
            sd = np.sqrt(((1 - r) * (v - mean) ** 2).sum(axis=0) / weight).clip(1e-2)
            self.law = share, shape, first / shape, mean, sd
            r = self.dropout(v)

    def dropout(self, values: FloatArray) -> FloatArray:
        """Probability that each value is a dropout: ``float64 [b g]``."""
        share, shape, scale, mean, sd = self.law
        v = np.maximum(values, 1e-3)
        gamma = np.log(share) + stats.gamma.logpdf(v, shape, scale=scale)
        return special.expit(gamma - np.log1p(-share) - stats.norm.logpdf(v, mean, sd))

    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Weights of the similar cells on the trusted genes; their combination everywhere."""
        values = self._values(counts, observed)
        trusted = observed & (self.dropout(values) < self.option["trust"])
        trusted[~trusted.any(axis=1)] = observed[~trusted.any(axis=1)]
        near = self.near.neighbours(counts, observed, self.option["k"], 1.0)
        parts = [slice(start, start + PIECE) for start in range(0, len(counts), PIECE)]
        combined = np.concatenate([self._combine(self.values[near[p]], values[p], trusted[p]) for p in parts])
        combined = np.minimum(combined, self.values.max(axis=0))
        return depth(counts, observed, self.gene_mean) * (10.0**combined - SHIFT) / 10.0

    def _combine(self, similar: FloatArray, values: FloatArray, trusted: BoolArray) -> FloatArray:
        """Non-negative least squares of ``values`` on ``similar [b k g]`` over trusted genes, applied to all genes."""
        a, m = torch.from_numpy(similar), torch.from_numpy(trusted).float()
        seen = a * m[:, None]
        gram, target = seen @ seen.mT, seen @ torch.from_numpy(values)[:, :, None]
        w = torch.full_like(target, 1.0 / max(1, similar.shape[1]))
        for _ in range(self.updates):
            w = w * target / (gram @ w).clamp_min(1e-9)
        w = torch.where(m.any(1)[:, None, None], w, 1.0 / max(1, similar.shape[1]))
        return (w.mT @ a)[:, 0].clamp_min(0).numpy()
