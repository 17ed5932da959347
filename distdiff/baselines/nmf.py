"""Poisson factorisation: non-negative programmes of the training cells, loaded on the observed genes alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray, _tuning, depth
from distdiff.baselines._loglinear import FLOORS

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

TINY = np.float32(1e-12)
"""Smallest number in a denominator."""


class Nmf(Baseline):
    """``rate = max(w H, floor s gene_mean)``, ``s`` the depth of the evidence; ``H`` (``[d g]``) from training cells.

    ``H`` minimises the Kullback-Leibler divergence of ``W H`` from the training counts, which is Poisson maximum
    likelihood (Lee & Seung 1999; `sklearn.decomposition.NMF`, ``solver="mu"``). A cell's loadings ``w`` (``[d]``) start
    at ``s`` times those of the average training cell and climb the Poisson likelihood of its observed genes alone,
    ``w_k <- w_k sum_obs(H_kg x_g / (w H)_g) / sum_obs H_kg``, a fixed number of steps: no result depends on the other
    cells of the batch. A cell without evidence keeps its start values. ``components`` and ``floor`` are those of least
    Poisson deviance on a held-out fifth of the training cells with entries hidden at ``hide``.

    Parameters
    ----------
    components
        Numbers of programmes to choose from (lowered to what the data allow).
    floor
        Shares of ``s gene_mean`` below which a rate may not fall, to choose from: programmes have zeros, and
        one molecule at a rate of zero has infinite deviance.
    steps
        Updates of the loadings.
    iterations
        Updates of the factorisation.
    hide
        Share of entries hidden while choosing.
    max_cells
        Most training cells to use, chosen at random (bounds memory: about four times ``float32
        [max_cells g]``; scikit-learn's updates are five times slower on CSR counts a fifth of which are not zero).
    seed
        Seed of the sample, the mask and the randomised singular vectors.

    Raises
    ------
    ValueError
        An empty choice, or an option out of range.

    Examples
    --------
    >>> from distdiff.baselines.nmf import Nmf
    >>> from distdiff.data.store.store import CountStore
    >>> store, baseline = CountStore.open("atlas.zarr"), Nmf(components=2, floor=0.03, iterations=20)
    >>> baseline.fit(store, store.rows("train"))
    >>> baseline.programmes.shape
    (2, 30)
    """

    label = "Poisson NMF"
    denoises = True

    def __init__(
        self,
        components: int | Sequence[int] = (5, 10, 20, 40),
        floor: float | Sequence[float] = FLOORS,
        *,
        steps: int = 100,
        iterations: int = 200,
        hide: float = 0.5,
        max_cells: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.components = (components,) if isinstance(components, int) else tuple(components)
        self.floor = (float(floor),) if isinstance(floor, int | float) else tuple(floor)
        if min(self.components, default=0) < 1 or min(self.floor, default=-1.0) < 0:
            raise ValueError(f"nmf: components={components} must be 1 or more and floor={floor} 0 or more")
        if steps < 1 or iterations < 1 or max_cells < 1:
            raise ValueError(f"nmf: steps={steps}, iterations={iterations} and max_cells={max_cells} must be 1 or more")
        if not 0 < hide < 1:
            raise ValueError(f"nmf: hide={hide} must lie strictly between 0 and 1")
        self.steps, self.iterations = steps, iterations
        self.hide, self.max_cells, self.seed = hide, max_cells, seed
        self.chosen: dict[str, float] = {}

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Choose the options, then factorise all training cells."""
        counts = _tuning.dense(store, _tuning.sample(rows, self.max_cells, self.seed))
        self.chosen = {"components": self.components[0], "floor": self.floor[0]}
        if len(self.components) * len(self.floor) > 1 and len(counts) > 1:
            kept, held = _tuning.hold_out(len(counts))
            self.chosen = self._choose(counts[kept], counts[held])
        self.solve(counts, int(self.chosen["components"]))

    def _choose(self, kept: FloatArray, held: FloatArray) -> dict[str, float]:
        observed = _tuning.random_mask(held.shape, self.hide, self.seed, "nmf")
        counts = np.where(observed, held, 0.0).astype(np.float32)
        best, chosen = np.inf, self.chosen
        for components in self.components:
            self.solve(kept, components)
            rate = self.loadings(counts, observed) @ self.programmes
            for floor in self.floor:
                score = _tuning.deviance(held, observed, self._floored(rate, counts, observed, floor))
                if score < best:
                    best, chosen = score, {"components": components, "floor": floor}
        return chosen

    def solve(self, counts: FloatArray, components: int) -> None:
        """Factorise training counts ``float32 [n g]`` (from their singular vectors, at most ``iterations`` updates)."""
        from sklearn.decomposition import NMF
        from sklearn.exceptions import ConvergenceWarning

        d = max(1, min(components, *counts.shape))
        if not counts.any():
            self.programmes, self.average = np.zeros((d, counts.shape[1]), np.float32), np.ones(d, np.float32)
            return
        fit = NMF(
            d, init="nndsvda", solver="mu", beta_loss="kullback-leibler", max_iter=self.iterations, tol=1e-5,
            random_state=self.seed,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            w = fit.fit_transform(counts)
        self.programmes = fit.components_.astype(np.float32)
        self.average = w.mean(axis=0, dtype=np.float64).astype(np.float32)

    def loadings(self, counts: FloatArray, observed: BoolArray) -> FloatArray:
        """Loadings of masked cells, ``float32 [b d]``; ``counts`` are 0 where hidden."""
        h = self.programmes
        m = observed.astype(np.float32)
        share = m @ h.T
        start = depth(counts, observed, self.gene_mean) * self.average
        w = start.astype(np.float32)
        for _ in range(self.steps):
            expected = w @ h
            np.maximum(expected, TINY, out=expected)
            w *= (np.divide(counts, expected, out=expected) @ h.T) / np.maximum(share, TINY)
            np.maximum(w, TINY, out=w)  # denormal numbers (below 1e-38) are slow
        return np.where(share > 0, w, start.astype(np.float32))

    def _floored(self, rate: FloatArray, counts: FloatArray, observed: BoolArray, floor: float) -> FloatArray:
        return np.maximum(rate, floor * depth(counts, observed, self.gene_mean) * self.gene_mean)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The programmes at the cell's loadings, not below the floor."""
        rate = self.loadings(counts.astype(np.float32, copy=False), observed) @ self.programmes
        return self._floored(rate, counts, observed, self.chosen["floor"])
