"""MAGIC (van Dijk et al., Cell 2018): diffuse square roots over a graph of cells, from the observed genes alone.

Written from the equations of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray, _tuning, depth
from distdiff.baselines._loglinear import FLOORS
from distdiff.baselines.pca import Pca

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from distdiff.data.store.store import CountStore

ROWS = 1024
"""Cells whose distances to all training cells are in memory at once."""

WIDTH = 3
"""The kernel of a cell covers its ``WIDTH * knn`` nearest cells (k = 3 ka in the paper)."""


class Magic(Baseline):
    """``rate = s max(c_g v_g^2, floor gene_mean_g)``, ``v = M^t Y`` and ``s`` the depth of the evidence.

    * ``Y = sqrt(x / s)`` of the training cells.
    * Distances are between scores on ``n_pca`` principal components of ``Y``; a masked cell's scores are the regression
      of its observed genes on the components (`distdiff.baselines.pca.Pca`), so hidden entries do not act as zeros.
    * ``K_ij`` is the mean of ``exp(-(d_ij / sigma_i)^decay)`` if ``j`` is among the ``3 knn`` nearest training cells of
      ``i``, else 0, and of the same with ``i`` and ``j`` exchanged; ``sigma_i`` is the distance to the ``knn``-th
      nearest training cell, where a training cell is its own nearest. ``M`` is ``K`` with rows that sum to 1.
    * A cell to impute has a row in ``M`` and no column: its ``v`` is ``M_cell M_train^(t-1) Y``. So no result depends
      on the other cells of the batch, and a training cell with all genes observed gets exactly its row of
      ``M_train^t Y``.
    * ``c_g`` is 1 as published or, with ``smear``, total molecules over total ``s v^2`` of the training cells, shrunk
      towards the factor of all genes by 10 molecules: the square of a mean of roots is below the mean. ``floor`` keeps
      the rate of a gene that no near cell expresses above zero.

    Where several values of an option are given, those with the least Poisson deviance are used, on a held-out fifth of
    at most 5,000 training cells with a share ``hide`` of entries hidden.

    Parameters
    ----------
    knn, t, n_pca
        Neighbours at distance ``sigma``, steps of the diffusion, components: a number, or the values to choose from.
    smear, floor
        As above: a value, or several. ``smear=False, floor=0`` is the published method.
    decay
        Exponent of the kernel.
    hide
        Share of entries hidden while choosing.
    max_cells
        Most training cells to use, chosen at random (bounds memory: four times ``float32 [max_cells g]``).
    seed
        Seed of the sample and the mask.

    Raises
    ------
    ValueError
        An empty choice, or an option out of range.

    Examples
    --------
    >>> from distdiff.baselines.magic import Magic
    >>> from distdiff.data.store.store import CountStore
    >>> store, published = CountStore.open("atlas.zarr"), Magic(knn=5, t=2, n_pca=5, smear=False, floor=0.0)
    >>> published.fit(store, store.rows("train"))
    >>> published.denoise(store.read(store.rows("test")), p=1.0).shape
    (20, 30)
    """

    label = "MAGIC"
    denoises = True

    def __init__(
        self,
        knn: int | Sequence[int] = (5, 10, 20),
        t: int | Sequence[int] = (1, 2, 3),
        n_pca: int | Sequence[int] = (20, 50),
        *,
        smear: bool | Sequence[bool] = (True, False),
        floor: float | Sequence[float] = FLOORS,
        decay: float = 1.0,
        hide: float = 0.5,
        max_cells: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.knn, self.t, self.n_pca = ((v,) if isinstance(v, int) else tuple(v) for v in (knn, t, n_pca))
        self.smear = (smear,) if isinstance(smear, bool) else tuple(smear)
        self.floor = (float(floor),) if isinstance(floor, int | float) else tuple(floor)
        if min(*self.knn, *self.t, *self.n_pca, len(self.knn), len(self.t), len(self.n_pca)) < 1:
            raise ValueError(f"magic: knn={knn}, t={t} and n_pca={n_pca} must each be 1 or more")
        if not self.smear or min(self.floor, default=-1.0) < 0:
            raise ValueError(f"magic: smear={smear} must hold a choice, and floor={floor} be 0 or more")
        if not decay > 0 or max_cells < 1:
            raise ValueError(f"magic: decay={decay} must be above 0 and max_cells={max_cells} 1 or more")
        if not 0 < hide < 1:
            raise ValueError(f"magic: hide={hide} must lie strictly between 0 and 1")
        self.decay, self.hide, self.max_cells, self.seed = float(decay), hide, max_cells, seed
        self.chosen: dict[str, Any] = {}

    def n_trials(self) -> int:
        """All combinations."""
        return len(self.knn) * len(self.t) * len(self.n_pca) * len(self.smear) * len(self.floor)

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Choose the options, then diffuse all training cells."""
        counts = _tuning.dense(store, _tuning.sample(rows, self.max_cells, self.seed))
        grid = list(product(self.n_pca, self.knn, self.t, self.smear, self.floor))
        self.chosen = dict(zip(("n_pca", "knn", "t", "smear", "floor"), grid[0], strict=True))
        if len(grid) > 1 and len(counts) > 1:
            some = counts[:5_000]
            kept, held = _tuning.hold_out(len(some))
            self.chosen = self._choose(some[kept], some[held])
        self.embed(counts, self.chosen["n_pca"])
        self.connect(self.chosen["knn"])
        self.smoothed = self.roots
        for _ in range(self.chosen["t"] - 1):
            self.smoothed = self.markov @ self.smoothed
        self.factor = self.factors(self.markov @ self.smoothed) if self.chosen["smear"] else 1.0
        del self.markov, self.roots, self.depths, self.totals

    def _choose(self, kept: FloatArray, held: FloatArray) -> dict[str, Any]:
        observed = _tuning.random_mask(held.shape, self.hide, self.seed, "magic")
        counts = np.where(observed, held, 0.0).astype(np.float32)
        s = depth(counts, observed, self.gene_mean)
        best, chosen = np.inf, self.chosen
        for n_pca in self.n_pca:
            self.embed(kept, n_pca)
            scores = self.scores(counts, observed)
            for knn in self.knn:
                self.connect(knn)
                row = self.affinity(scores)
                smoothed = self.roots
                for t in range(1, max(self.t) + 1):
                    value = row @ smoothed
                    smoothed = self.markov @ smoothed
                    if t not in self.t:
                        continue
                    for smear in self.smear:
                        factor = self.factors(smoothed) if smear else 1.0
                        for floor in self.floor:
                            score = _tuning.deviance(held, observed, self.molecules(s, value, factor, floor))
                            if score < best:
                                best = score
                                chosen = {"n_pca": n_pca, "knn": knn, "t": t, "smear": smear, "floor": floor}
        return chosen

    def embed(self, counts: FloatArray, n_pca: int) -> None:
        """Square roots, components and scores of the training cells, ``counts`` of them ``float32 [n g]``."""
        self.depths = depth(counts, np.ones(counts.shape, dtype=bool), self.gene_mean)
        self.totals = counts.sum(axis=0, dtype=np.float64)
        self.roots = np.sqrt(counts / self.depths).astype(np.float32)
        self.pca = Pca()
        self.pca.solve(self.roots, {"components": n_pca, "ridge": 1.0})
        # every gene observed: the regression of `Pca.predict` in closed form, as the components are orthonormal
        z = (self.roots - self.pca.centre) @ self.pca.loadings / (1.0 + self.pca.precision)
        self.train = z.astype(np.float64)

    def scores(self, counts: FloatArray, observed: BoolArray) -> FloatArray:
        """Scores of masked cells by regression on the observed genes: ``float64 [b d]``."""
        y = np.sqrt(counts / depth(counts, observed, self.gene_mean)).astype(np.float32)
        if observed.all():
            return ((y - self.pca.centre) @ self.pca.loadings / (1.0 + self.pca.precision)).astype(np.float64)
        return (self.pca.predict(y, observed) - self.pca.centre) @ self.pca.loadings.astype(np.float64)

    def connect(self, knn: int) -> None:
        """Bandwidth and reach of every training cell (``float64 [n]``), and the Markov matrix among them."""
        self.knn_at = min(knn, len(self.train)) - 1, min(WIDTH * knn, len(self.train)) - 1
        parts = [self._widths(self._distances(z)) for z in self._pieces(self.train)]
        self.sigma, self.reach = (np.concatenate(p) for p in zip(*parts, strict=True))
        self.markov = self.affinity(self.train)

    def affinity(self, scores: FloatArray) -> csr_array:
        """Rows of the Markov matrix towards the training cells, sparse ``float32 [b n]``, each of sum 1."""
        from scipy.sparse import csr_array, vstack

        if len(scores) == 0:
            return csr_array((0, len(self.train)), dtype=np.float32)
        return vstack([self._kernel(self._distances(z)) for z in self._pieces(scores)], format="csr")

    def _kernel(self, distance: FloatArray) -> csr_array:
        from scipy.sparse import csr_array

        sigma, reach = self._widths(distance)
        out, back = distance <= reach[:, None], distance <= self.reach
        i, j = np.nonzero(out | back)
        d = distance[i, j]
        k = out[i, j] * np.exp(-((d / sigma[i]) ** self.decay)) + back[i, j] * np.exp(
            -((d / self.sigma[j]) ** self.decay)
        )
        k /= np.bincount(i, k, minlength=len(distance))[i]
        start = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=len(distance)))])
        return csr_array((k.astype(np.float32), j, start), shape=distance.shape)

    def _widths(self, distance: FloatArray) -> tuple[FloatArray, FloatArray]:
        near = np.partition(distance, self.knn_at, axis=1)
        # the last bits of a distance depend on how many rows are computed together: cells at the edge are included
        return np.maximum(near[:, self.knn_at[0]], 1e-6), near[:, self.knn_at[1]] * (1 + 1e-6) + 1e-6

    def _distances(self, scores: FloatArray) -> FloatArray:
        squares = (scores**2).sum(axis=1)[:, None] + (self.train**2).sum(axis=1) - 2.0 * (scores @ self.train.T)
        return np.sqrt(np.maximum(squares, 0.0))

    @staticmethod
    def _pieces(scores: FloatArray) -> list[FloatArray]:
        return [scores[start : start + ROWS] for start in range(0, len(scores), ROWS)]

    def factors(self, values: FloatArray) -> FloatArray:
        """Factors ``[g]`` that make the squared smoothed roots ``[n g]`` of the training cells sum to their counts."""
        squares_total = (self.depths[:, 0].astype(np.float32) @ (values * values)).astype(np.float64)
        overall = self.totals.sum() / squares_total.sum() if squares_total.sum() > 0 else 1.0
        return (self.totals + 10.0 * overall) / (squares_total + 10.0)

    def molecules(self, s: FloatArray, value: FloatArray, factor: FloatArray | float, floor: float) -> FloatArray:
        """From smoothed roots ``[b g]`` back to molecules at depth ``s`` (``[b 1]``): ``float64 [b g]``."""
        return s * np.maximum(factor * value**2, floor * self.gene_mean)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The diffused square roots of near cells, squared and scaled to the depth of the evidence."""
        value = self.affinity(self.scores(counts, observed)) @ self.smoothed
        return self.molecules(depth(counts, observed, self.gene_mean), value, self.factor, self.chosen["floor"])
