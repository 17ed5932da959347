"""PCA regression: fit principal components to the observed genes, predict the hidden genes from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distdiff.baselines import BoolArray, FloatArray
from distdiff.baselines._loglinear import LogLinear
from distdiff.imputers.blend import low_rank


class Pca(LogLinear):
    """Ridge regression of each cell's observed genes on the training loadings ``V`` (``[g d]``).

    ``z = argmin_z sum_obs (y - mu - V z)^2 / noise + sum_j z_j^2 / lambda_j``, the posterior mean of probabilistic PCA
    (Tipping & Bishop 1999) with the spectrum's ``lambda`` and noise; the prediction is ``mu + V z``. See `LogLinear`
    for the scale, the way back to molecules and how ``components`` and ``ridge`` are chosen.

    Parameters
    ----------
    components
        Numbers of components to choose from (lowered to what the data allow).
    ridge
        Multiples of the noise variance to choose from.
    scale, hide, max_cells, seed
        As in `LogLinear`.

    Examples
    --------
    >>> from distdiff.baselines.pca import Pca
    >>> from distdiff.data.store.store import CountStore
    >>> store, baseline = CountStore.open("atlas.zarr"), Pca(components=(2, 4), scale=(1.0,))
    >>> baseline.fit(store, store.rows("train"))
    >>> baseline.chosen["components"] in (2, 4), baseline.loadings.shape[0]
    (True, 30)
    """

    label = "PCA regression"
    denoises = True

    def __init__(
        self,
        components: Sequence[int] = (5, 10, 20, 40),
        ridge: Sequence[float] = (1.0,),
        *,
        scale: Sequence[float] = (0.3, 0.1, 1.0, 3.0),
        hide: float = 0.5,
        max_cells: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(tuple(scale), hide, max_cells, seed)
        self.components, self.ridge = tuple(components), tuple(ridge)

    def choices(self) -> list[dict[str, Any]]:
        """Components x ridge."""
        return [{"components": d, "ridge": r} for d in self.components for r in self.ridge]

    def solve(self, y: FloatArray, option: dict[str, Any]) -> None:
        """``sklearn.decomposition.PCA`` of ``y`` (randomised solver, fixed state)."""
        from sklearn.decomposition import PCA

        d = max(1, min(option["components"], min(y.shape) - 1))
        self.centre = y.mean(axis=0)
        if len(y) < 2 or not np.any(y != y[0]):
            self.loadings, self.precision = np.zeros((y.shape[1], 1), np.float32), np.ones(1, np.float32)
            return
        fit = PCA(d, svd_solver="randomized", random_state=0).fit(y)
        noise = max(float(y.var(axis=0, dtype=np.float64).sum() - fit.explained_variance_.sum()), 0.0) / y.shape[1]
        self.loadings = fit.components_.T.astype(np.float32)
        spectrum = np.maximum(fit.explained_variance_, 1e-12)
        self.precision = (option["ridge"] * max(noise, 1e-6 * spectrum[0]) / spectrum).astype(np.float32)

    def predict(self, y: FloatArray, observed: BoolArray) -> FloatArray:
        """Solve ``(V_o' V_o + diag(noise / lambda)) z = V_o' (y - mu)`` for all cells at once."""
        arrays = (y, observed, self.centre, self.loadings, self.precision)
        return low_rank(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)).numpy()
