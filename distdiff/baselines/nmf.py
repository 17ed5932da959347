"""Poisson factorisation: non-negative programmes of the training cells, loaded on the observed genes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_array

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray, _tuning, depth
from distdiff.baselines._loglinear import FLOORS
from distdiff.imputers.blend import programme_loadings
from distdiff.jit import REORDERED, njit

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

TINY = np.float32(1e-12)
"""Smallest number in a denominator."""

SHAPES = (1e-3, 1e3)
"""Limits of the shape of loadings."""

EVERY = 10
"""Updates between two looks at the loss."""


class Nmf(Baseline):
    """``rate = max(w H, floor s gene_mean)``, ``s`` the depth of the evidence; ``H`` (``[d g]``) from training cells.

    ``H`` minimises the Kullback-Leibler divergence of ``W H`` from the training counts, which is Poisson maximum
    likelihood (Lee & Seung 1999). With rows of ``H`` that sum to 1, one pass over the counts that are not zero is a
    step of expectation-maximisation for both factors, which never lowers the likelihood: ``w_k <- w_k sum_g H_kg x_g /
    (w H)_g`` and ``H_kg`` in proportion to ``H_kg sum_c w_ck x_cg / (W H)_cg``. It starts from the positive parts of
    singular vectors (Boutsidis & Gallopoulos 2008, zeros at a hundredth of the mean) and stops early when ten steps
    win less than ``tol`` of the likelihood gained since the first ten.

    A cell's loadings ``w`` (``[d]``) start at ``w0``, ``s`` times those of the average training cell, and climb the
    Poisson likelihood of its observed genes times a Gamma prior with its mode at ``w0``: ``w_k <- (w_k sum_obs(H_kg x_g
    / (w H)_g) + a_k) / (sum_obs H_kg + a_k / w0_k)``, a fixed number of steps, so that no result depends on the other
    cells of the batch. ``a_k`` is the shape of the training cells' loadings, their squared mean over their variance at
    equal depth. So loadings of few molecules stay near those of the average cell; a cell without evidence has these.
    ``components`` and ``floor`` are those of least Poisson deviance on a held-out fifth of the training cells with
    entries hidden at ``hide``; sizes are tried as they are given, and the first that is worse than the one before ends
    the search.

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
        Most updates of the factorisation.
    tol
        Share of the likelihood gained below which the updates stop.
    prior
        Factor of the shapes ``a_k``; 0: the most likely loadings.
    hide
        Share of entries hidden while choosing.
    max_cells
        Most training cells to use, chosen at random (bounds memory: ``float32 [max_cells g]`` and the counts as CSR).
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
        steps: int = 20,
        iterations: int = 200,
        tol: float = 1e-2,
        prior: float = 1.0,
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
        if not 0 <= tol < 1:
            raise ValueError(f"nmf: tol={tol} must be 0 or more and below 1")
        if not 0 <= prior < np.inf:
            raise ValueError(f"nmf: prior={prior} must be 0 or more and finite")
        if not 0 < hide < 1:
            raise ValueError(f"nmf: hide={hide} must lie strictly between 0 and 1")
        self.steps, self.iterations, self.tol, self.prior = steps, iterations, tol, prior
        self.hide, self.max_cells, self.seed = hide, max_cells, seed
        self.chosen: dict[str, float] = {}

    def n_trials(self) -> int:
        """All combinations."""
        return len(self.components) * len(self.floor)

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
            rate, before = self.loadings(counts, observed) @ self.programmes, best
            for floor in self.floor:
                score = _tuning.deviance(held, observed, self._floored(rate, counts, observed, floor))
                if score < best:
                    best, chosen = score, {"components": components, "floor": floor}
            if best == before:
                break
        return chosen

    def solve(self, counts: FloatArray, components: int) -> None:
        """Factorise training counts ``float32 [n g]``."""
        d = max(1, min(components, *counts.shape))
        if not counts.any():
            self.programmes, self.average = np.zeros((d, counts.shape[1]), np.float32), np.ones(d, np.float32)
            self.shape = np.ones(d, np.float32)
            return
        x = csr_array(counts)
        w, h = self._start(x, d)
        up, gained = np.empty_like(h), [_step(x.indptr, x.indices, x.data, w, h, np.empty_like(h), True)]
        for i in range(1, self.iterations + 1):
            look = i % EVERY == 0
            loss = _step(x.indptr, x.indices, x.data, w, h, up, look)
            h *= up
            h /= np.maximum(h.sum(0), TINY)
            if look:
                gained.append(loss)
                if len(gained) > 2 and gained[-2] - loss < self.tol * (gained[1] - loss):
                    break
        self.programmes = np.ascontiguousarray(h.T)
        self.average = w.mean(axis=0, dtype=np.float64).astype(np.float32)
        at_depth = w / depth(counts, np.ones(counts.shape, bool), self.gene_mean)
        shape = at_depth.mean(0) ** 2 / np.maximum(at_depth.var(0), TINY)
        self.shape = (self.prior * np.clip(shape, *SHAPES)).astype(np.float32)

    def _start(self, x: csr_array, d: int) -> tuple[FloatArray, FloatArray]:
        """Loadings ``[n d]`` and programmes ``[g d]`` with columns that sum to 1, from singular vectors."""
        from sklearn.utils.extmath import randomized_svd

        of_cells, _, of_genes = randomized_svd(x, d, random_state=self.seed % 2**32)
        w, h = np.empty((x.shape[0], d), np.float32), np.empty((x.shape[1], d), np.float32)
        for k in range(d):
            sides = [(np.maximum(s * of_cells[:, k], 0), np.maximum(s * of_genes[k], 0)) for s in (1, -1)]
            w[:, k], h[:, k] = max(sides, key=lambda side: np.linalg.norm(side[0]) * np.linalg.norm(side[1]))
        for factor in (w, h):
            np.maximum(factor, 0.01 * factor.mean(0) + TINY, out=factor)
            factor /= factor.sum(0)
        w *= np.asarray(x.sum(1)).reshape(-1, 1) / w.sum(1, keepdims=True)
        return w, h

    def loadings(self, counts: FloatArray, observed: BoolArray) -> FloatArray:
        """Loadings of masked cells, ``float32 [b d]``."""
        start = (depth(counts, observed, self.gene_mean) * self.average).astype(np.float32)
        arrays = (counts, observed, start, self.shape, self.programmes.T)
        x, o, w, shape, h = (torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        return programme_loadings(x, o, w, shape, h, self.steps).numpy()

    def _floored(self, rate: FloatArray, counts: FloatArray, observed: BoolArray, floor: float) -> FloatArray:
        return np.maximum(rate, floor * depth(counts, observed, self.gene_mean) * self.gene_mean)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The programmes at the cell's loadings, not below the floor."""
        rate = self.loadings(counts.astype(np.float32, copy=False), observed) @ self.programmes
        return self._floored(rate, counts, observed, self.chosen["floor"])


def _step(indptr: Any, indices: Any, data: Any, w: Any, h: Any, up: Any, look: bool) -> float:
    """Update loadings ``w [n d]`` in place and sum what updates ``h [g d]`` into ``up``; the loss if ``look``."""
    d = w.shape[1]
    tiny, loss, more = np.float32(1e-12), 0.0, np.empty(d, np.float32)
    up[:] = 0
    for i in range(w.shape[0]):
        more[:] = 0
        for at in range(indptr[i], indptr[i + 1]):
            j, expected = indices[at], tiny
            for k in range(d):
                expected += w[i, k] * h[j, k]
            if look:
                loss -= data[at] * np.log(expected)
            ratio = data[at] / expected
            for k in range(d):
                more[k] += ratio * h[j, k]
                up[j, k] += ratio * w[i, k]
        for k in range(d):
            w[i, k] = max(w[i, k] * more[k], tiny)  # denormal numbers (below 1e-38) are slow
    return loss


_step = njit(_step, fastmath=set(REORDERED))
