"""PCA regression: principal components of the training cells, scores of a cell from its observed genes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray
from distdiff.baselines._log import Back, normalise
from distdiff.baselines._tuning import dense, hold_out, sample

if TYPE_CHECKING:
    from distdiff.data.store import CountStore

COMPONENTS = (10, 20, 40)
NOISE = (0.3, 1.0)


class Pca(Baseline):
    """Posterior-mean scores of probabilistic PCA given the observed genes, then all genes from the scores.

    scikit-learn's PCA of ``log1p(counts / depth)``; for a cell with evidence O the scores solve
    ``(L_O' L_O + n^2 S^-1) c = L_O' (z - mean)_O`` with loadings L, component variances S and noise variance n^2. The
    number of components and n^2 (as a multiple of PCA's own estimate) are picked on a held-out fifth of the training
    cells by Poisson deviance of hidden entries.
    """

    label = "PCA regression"

    def __init__(self, at_most: int = 20_000, seed: int = 0) -> None:
        self.at_most, self.seed = at_most, seed

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Fit PCA, pick its options, fit the way back to molecules."""
        from sklearn.decomposition import PCA

        counts = dense(store, sample(rows, self.at_most, self.seed))
        kept, held = hold_out(len(counts))
        z, _ = normalise(counts, np.ones(counts.shape, bool), self.gene_mean)
        most = min(max(COMPONENTS), len(z[kept]) - 1, z.shape[1] - 1)
        if most < 1:
            self.back = Back(lambda z, observed: np.zeros(z.shape), self.gene_mean, counts[held], self.seed)
            return
        fitted = PCA(most, random_state=0).fit(z[kept])
        tried = []
        for n in {min(n, most) for n in COMPONENTS}:
            loadings, variance = fitted.components_[:n].T.astype(np.float64), fitted.explained_variance_[:n]
            rest = max(float(((z[kept] - fitted.mean_) ** 2).sum() / len(z[kept]) - variance.sum()), 1e-6)
            for scale in NOISE:
                solve = _Scores(loadings, fitted.mean_, scale * rest / z.shape[1] / np.maximum(variance, 1e-9))
                tried.append(Back(solve, self.gene_mean, counts[held][:2000], self.seed))
        self.back = min(tried, key=lambda b: b.score)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Molecules of every entry."""
        return self.back(counts, observed)


class _Scores:
    def __init__(self, loadings: FloatArray, mean: FloatArray, ridge: FloatArray) -> None:
        self.loadings, self.mean, self.ridge = loadings, mean, ridge
        n = loadings.shape[1]
        self.products = (loadings[:, :, None] * loadings[:, None, :]).reshape(-1, n * n)

    def __call__(self, z: FloatArray, observed: BoolArray) -> FloatArray:
        n = self.loadings.shape[1]
        gram = (observed @ self.products).reshape(-1, n, n) + np.diag(self.ridge)
        right = np.where(observed, z - self.mean, 0.0) @ self.loadings
        return self.mean + np.linalg.solve(gram, right[:, :, None])[:, :, 0] @ self.loadings.T
