"""Multi-output ridge regression from masked cells to whole cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray
from distdiff.baselines._log import Back, normalise
from distdiff.baselines._tuning import dense, hold_out, random_mask, sample

if TYPE_CHECKING:
    from distdiff.data.store import CountStore

ALPHAS = (1e3, 3e3, 1e4, 3e4)
MASKS = 4


class RidgeRegression(Baseline):
    """scikit-learn's Ridge from the evidence to ``log1p(counts / depth)`` of all genes.

    Inputs are centred on the gene's mean, 0 where hidden, and divided by the share of genes observed. It is trained on
    four random maskings (half hidden) of every training cell; ``alpha`` is picked on a held-out fifth of the cells by
    Poisson deviance of hidden entries.
    """

    label = "ridge"

    def __init__(self, at_most: int = 20_000, seed: int = 0) -> None:
        self.at_most, self.seed = at_most, seed

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Fit one ridge for each alpha, keep the best with its way back to molecules."""
        from sklearn.linear_model import Ridge

        counts = dense(store, sample(rows, self.at_most, self.seed))
        kept, held = hold_out(len(counts))
        whole, _ = normalise(counts[kept], np.ones(counts[kept].shape, bool), self.gene_mean)
        self.mean = whole.mean(0)
        inputs, outputs = [], []
        for i in range(MASKS):
            observed = random_mask(whole.shape, 0.5, self.seed, "ridge", i)
            z, _ = normalise(counts[kept] * observed, observed, self.gene_mean)
            inputs.append(self._inputs(z, observed))
            outputs.append(whole - self.mean)
        x, y = np.concatenate(inputs), np.concatenate(outputs)
        tried = []
        for alpha in ALPHAS:
            fitted = Ridge(alpha=alpha, fit_intercept=False).fit(x, y)
            predict = _Linear(self, np.atleast_2d(fitted.coef_).T)
            tried.append(Back(predict, self.gene_mean, counts[held][:2000], self.seed))
        self.back = min(tried, key=lambda b: b.score)

    def _inputs(self, z: FloatArray, observed: BoolArray) -> FloatArray:
        share = np.maximum(observed.mean(1, keepdims=True), 1 / observed.shape[1]).astype(np.float32)
        return np.where(observed, z - self.mean, 0.0).astype(np.float32) / share

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Molecules of every entry."""
        return self.back(counts, observed)


class _Linear:
    def __init__(self, owner: RidgeRegression, weights: FloatArray) -> None:
        self.owner, self.weights = owner, weights

    def __call__(self, z: FloatArray, observed: BoolArray) -> FloatArray:
        return self.owner.mean + self.owner._inputs(z, observed) @ self.weights
