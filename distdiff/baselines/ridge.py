"""Ridge regression of every gene on all other genes, averaged over random masks in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distdiff.baselines import BoolArray, FloatArray
from distdiff.baselines._loglinear import LogLinear


class Ridge(LogLinear):
    """Linear prediction of every gene from the other genes; hidden inputs are set to their gene's mean.

    Inputs of a masked cell are ``z = m (y - mu) / q``: zero where hidden, the rest divided by ``q``, the observed
    share. The ridge solution over all masks of share ``q`` needs no drawn masks: ``E[z_i z_j] = S_ij``,
    ``E[z_i z_i] = S_ii / q`` and ``E[z_i y_j] = S_ij``, with ``S`` the covariance of ``y`` (marginalised corruption,
    Chen et al. 2012). So with ``A = S + diag(S) (1/q - 1 + alpha)``, gene ``j`` has the coefficients
    ``A_{-j,-j}^{-1} S_{-j,j}``; its own input is excluded because it is never observed when it is a target. All genes
    share one inverse: with ``T = A^{-1}`` and ``C`` equal to ``S`` off its diagonal and zero on it,
    ``B = T C - T_{:,j} (T C)_jj / T_jj``.

    Memory and time grow as g^2 and g^3: for a few thousand genes. ``sklearn.linear_model.Ridge`` solves the same
    problem only with drawn masks and a fit for each gene. See `LogLinear` for the scale, the way back to molecules and
    how ``alpha`` is chosen.

    Parameters
    ----------
    alpha
        Ridge penalties to choose from, in units of each gene's variance.
    scale, hide, max_cells, seed
        As in `LogLinear`.

    Examples
    --------
    >>> from distdiff.baselines.ridge import Ridge
    >>> from distdiff.data.store.store import CountStore
    >>> store, baseline = CountStore.open("atlas.zarr"), Ridge(alpha=(3.0,), scale=(1.0,))
    >>> baseline.fit(store, store.rows("train"))
    >>> baseline.coefficients.shape, bool(baseline.coefficients.diagonal().any())  # no gene predicts itself
    ((30, 30), False)
    """

    label = "ridge"

    def __init__(
        self,
        alpha: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0),
        *,
        scale: Sequence[float] = (0.3, 0.1, 1.0, 3.0),
        hide: float = 0.5,
        max_cells: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(tuple(scale), hide, max_cells, seed)
        self.alpha = tuple(alpha)

    def choices(self) -> list[dict[str, Any]]:
        """The penalties."""
        return [{"alpha": a} for a in self.alpha]

    def solve(self, y: FloatArray, option: dict[str, Any]) -> None:
        """One Cholesky inverse and one matrix product, float64."""
        from scipy.linalg import cho_factor, cho_solve

        self.centre = y.mean(axis=0, dtype=np.float64)
        x = y - self.centre
        a = x.T @ x / len(x)
        c = a.copy()
        spread = np.diag(a).copy()
        spread[spread <= 0] = 1.0  # a gene that never varies has no covariance: any positive number will do
        a[np.diag_indices_from(a)] = spread * (1.0 / (1.0 - self.hide) + option["alpha"])
        np.fill_diagonal(c, 0.0)
        inverse = cho_solve(cho_factor(a, lower=True), np.eye(len(a)))
        b = inverse @ c
        b -= inverse * (np.diag(b) / np.diag(inverse))
        np.fill_diagonal(b, 0.0)
        self.coefficients = b.astype(np.float32)

    def predict(self, y: FloatArray, observed: BoolArray) -> FloatArray:
        """``mu + z B``."""
        share = np.maximum(observed.mean(axis=1, keepdims=True), 1.0 / observed.shape[1])
        z = (np.where(observed, y - self.centre, 0.0) / share).astype(np.float32)
        return self.centre + z @ self.coefficients
