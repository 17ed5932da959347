"""Ridge regression of every gene on all the others, averaged over masks in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distdiff.baselines import BoolArray, FloatArray
from distdiff.baselines._loglinear import LogLinear


class Ridge(LogLinear):
    """Linear prediction of every gene from the observed others, hidden inputs filled with their gene's mean.

    Inputs of a masked cell are ``z = m (y - mu) / q``: zero where hidden, the rest enlarged by the observed share ``q``.
    For targets ``r`` (``y`` itself, or rates ``x / s``) the ridge solution over all masks of share ``q`` needs no
    masks drawn: ``E[z_i z_j] = S_ij``, ``E[z_i z_i] = S_ii / q`` and ``E[z_i r_j] = cov(y_i, r_j)`` (marginalised
    corruption, Chen et al. 2012), so with ``A = S + diag(S) (1/q - 1 + alpha)`` gene ``j`` has the coefficients
    ``A_{-j,-j}^{-1} cov(y_{-j}, r_j)``. Its own input is left out because it is never observed when it is a target.
    All genes share one inverse of ``A``: with ``T = A^{-1}`` and ``C`` the covariances with a zero diagonal,
    ``B = T C - T_{:,j} (T C)_jj / T_jj``.

    ``alpha`` and the target are chosen as `LogLinear` says. Memory and time grow as g^2 and g^3: for a few thousand
    genes. ``sklearn.linear_model.Ridge`` solves the same problem only with drawn masks and a fit for each gene.

    Parameters
    ----------
    alpha
        Ridge penalties to choose from, in units of each gene's variance.
    targets
        ``"log"`` (``y``, brought back by expm1) and ``"rate"`` to choose from.
    scale, hide, max_cells, seed
        As in `LogLinear`.
    """

    label = "ridge"

    def __init__(
        self,
        alpha: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0),
        targets: Sequence[str] = ("log", "rate"),
        *,
        scale: Sequence[float] = (1.0,),
        hide: float = 0.5,
        max_cells: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(tuple(scale), hide, max_cells, seed)
        self.alpha, self.targets = tuple(alpha), tuple(targets)
        if not set(self.targets) <= {"log", "rate"}:
            raise ValueError(f"ridge: targets={targets} must be among 'log' and 'rate'")

    def choices(self) -> list[dict[str, Any]]:
        """Alpha x target."""
        return [{"alpha": a, "target": t} for t in self.targets for a in self.alpha]

    def solve(self, y: FloatArray, rates: FloatArray, option: dict[str, Any]) -> None:
        """One Cholesky inverse and one matrix product, float64."""
        from scipy.linalg import cho_factor, cho_solve

        self.centre = y.mean(axis=0, dtype=np.float64)
        target = rates if option["target"] == "rate" else y
        self.offset = target.mean(axis=0, dtype=np.float64)
        x = y - self.centre
        a = x.T @ x / len(x)
        c = a.copy() if target is y else x.T @ (target - self.offset) / len(x)
        spread = np.diag(a).copy()
        spread[spread <= 0] = 1.0  # a gene that never varies: no covariance, any positive number
        q = 1.0 - self.hide
        a[np.diag_indices_from(a)] = spread * (1.0 / q + option["alpha"])
        np.fill_diagonal(c, 0.0)
        inverse = cho_solve(cho_factor(a, lower=True), np.eye(len(a)))
        b = inverse @ c
        b -= inverse * (np.diag(b) / np.diag(inverse))
        np.fill_diagonal(b, 0.0)
        self.coefficients = b.astype(np.float32)

    def predict(self, y: FloatArray, observed: BoolArray, option: dict[str, Any]) -> FloatArray:
        """``offset + z B``, back from the log scale if that is the target."""
        share = np.maximum(observed.mean(axis=1, keepdims=True), 1.0 / observed.shape[1])
        z = (np.where(observed, y - self.centre, 0.0) / share).astype(np.float32)
        linear = self.offset + z @ self.coefficients
        if option["target"] == "rate":
            return linear
        return np.expm1(np.minimum(linear, 30.0)) / option["scale"]
