"""Mean of the nearest training cells, found on the observed genes alone.

A Poisson draw around this mean is the reference for draws: it needs no training and is hard to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from distdiff.baselines import CHUNK, Baseline, BoolArray, Cells, FloatArray, _tuning, depth

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore


class Knn(Baseline):
    """Impute ``s (sum of k neighbours + prior gene_mean) / (k + prior)``, ``s`` the depth of the evidence.

    Distances are Euclidean over the cell's observed genes, between ``log1p(scale x / s)`` of the cell (``s`` from its
    observed genes) and of each training cell (``s`` from all its genes). ``prior`` adds this many average cells to the
    pool, which keeps means above zero. Where several values are given, those with the least Poisson deviance are used,
    on a held-out fifth of at most 5,000 training cells with a share ``hide`` of entries hidden.

    Parameters
    ----------
    k, prior
        Neighbours and average cells in the pool: a number, or the values to choose from.
    scale
        Scale of ``log1p``; it is nearly linear below ``1 / scale`` molecules: a number, or several to choose from.
    hide
        Share of entries hidden while choosing.
    seed
        Seed of the choice.

    Raises
    ------
    ValueError
        ``k`` below 1 or ``prior`` below 0.

    Examples
    --------
    >>> from distdiff.baselines.knn import Knn
    >>> from distdiff.data.store.store import CountStore
    >>> store, baseline = CountStore.open("atlas.zarr"), Knn(k=10, prior=1.0, scale=(0.1, 1.0))
    >>> baseline.fit(store, store.rows("train"))
    >>> baseline.denoise(store.read(store.rows("test")), p=1.0).shape, sorted(baseline.chosen)
    ((20, 30), ['k', 'prior', 'scale'])
    """

    label = "kNN pool"
    denoises = True

    def __init__(
        self,
        k: int | Sequence[int] = 20,
        prior: float | Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0),
        *,
        scale: float | Sequence[float] = (0.03, 0.1, 0.3, 1.0),
        hide: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.k = (k,) if isinstance(k, int) else tuple(k)
        self.prior = (float(prior),) if isinstance(prior, int | float) else tuple(prior)
        self.scale = (float(scale),) if isinstance(scale, int | float) else tuple(scale)
        if min(self.k, default=0) < 1 or min(self.prior, default=-1.0) < 0 or min(self.scale, default=0.0) <= 0:
            raise ValueError(f"knn: k={k} must be 1 or more, prior={prior} 0 or more and scale={scale} above 0")
        self.hide, self.seed = hide, seed
        self.chosen: dict[str, float] = {}

    def n_trials(self) -> int:
        """All combinations."""
        return len(self.k) * len(self.prior) * len(self.scale)

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Choose the options, then keep all training cells (sparse)."""
        self.chosen = {"k": self.k[0], "prior": self.prior[0], "scale": self.scale[0]}
        if len(self.k) * len(self.prior) * len(self.scale) > 1 and len(rows) > 1:
            some = _tuning.sample(rows, 5_000, self.seed)
            kept, held = _tuning.hold_out(len(some))
            self.train = store.read(np.sort(some[kept]))
            self.chosen = self._choose(_tuning.dense(store, some[held]))
        self.train = store.read(rows)

    def _choose(self, held: FloatArray) -> dict[str, float]:
        observed = _tuning.random_mask(held.shape, self.hide, self.seed, "knn")
        counts = np.where(observed, held, 0.0).astype(np.float32)
        best, chosen = np.inf, self.chosen
        for scale in self.scale:
            near = self.neighbours(counts, observed, max(self.k), scale)
            for k in self.k:
                for prior in self.prior:
                    score = _tuning.deviance(held, observed, self.pool(counts, observed, near[:, :k], prior))
                    if score < best:
                        best, chosen = score, {"k": k, "prior": prior, "scale": scale}
        return chosen

    def neighbours(self, counts: FloatArray, observed: BoolArray, k: int, scale: float) -> np.ndarray:
        """The ``k`` nearest training cells of each cell, nearest first: ``int64 [b min(k, n)]``.

        Up to a constant of the cell the masked squared distance is ``m . t^2 - 2 (m y) . t``: two matrix products with
        4,096 training cells at a time.
        """
        m = observed.astype(np.float32)
        y = np.log1p(scale * counts / depth(counts, observed, self.gene_mean)).astype(np.float32) * m
        k = min(k, self.train.shape[0])
        best = np.empty((len(counts), 0), dtype=np.float32)
        at = np.empty((len(counts), 0), dtype=np.int64)
        for start in range(0, self.train.shape[0], CHUNK):
            t = self.train[start : start + CHUNK].toarray().astype(np.float32)
            t = np.log1p(scale * t / depth(t, np.ones_like(t, dtype=bool), self.gene_mean)).astype(np.float32)
            distance = m @ (t * t).T - 2.0 * (y @ t.T)
            best = np.concatenate([best, distance], axis=1)
            here = np.broadcast_to(np.arange(start, start + len(t)), distance.shape)
            at = np.concatenate([at, here], axis=1)
            if best.shape[1] > k:
                keep = np.argpartition(best, k - 1, axis=1)[:, :k]
                best, at = np.take_along_axis(best, keep, axis=1), np.take_along_axis(at, keep, axis=1)
        return np.take_along_axis(at, np.argsort(best, axis=1, kind="stable"), axis=1)

    def pool(self, counts: FloatArray, observed: BoolArray, near: np.ndarray, prior: float) -> FloatArray:
        """Expected molecules from the counts of the neighbours ``near`` (``int64 [b k]``): ``float64 [b g]``."""
        from scipy.sparse import csr_array

        b, k = near.shape
        pick = csr_array((np.ones(b * k), near.ravel(), np.arange(b + 1) * k), shape=(b, self.train.shape[0]))
        pool = ((pick @ self.train).toarray() + prior * self.gene_mean) / (k + prior)
        return depth(counts, observed, pool) * pool

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The pool of the nearest cells, scaled to the depth of the evidence."""
        near = self.neighbours(counts, observed, int(self.chosen["k"]), self.chosen["scale"])
        return self.pool(counts, observed, near, self.chosen["prior"])
