"""ALRA (after Linderman et al., Nat Commun 2022): a low-rank approximation whose small values are set back to zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distdiff.baselines import BoolArray, FloatArray, depth
from distdiff.baselines._fitted import Fitted
from distdiff.types import Cells


@dataclass(eq=False)
class Alra(Fitted):
    """Rank-``k`` values of ``y = log(1 + x / s)``, thresholded by gene and scaled to the gene's non-zero values.

    ``y`` of a masked cell is regressed on the right singular vectors of the training cells by its observed genes alone
    (ridge of the noise over each singular value). A value below the largest magnitude of the gene's negative values in
    training counts as a biological zero; the rest are moved to mean and standard deviation of the gene's non-zero
    values, as published. Ranks are chosen on validation cells, besides 0: the published rule, the last singular
    value whose gap to the next is 6 standard deviations above the gaps of the noise.

    Parameters
    ----------
    rank
        Ranks to choose from (0: by the published rule).
    most
        Singular values computed for the rule.

    Examples
    --------
    >>> from distdiff.baselines.alra import Alra
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), Alra(rank=3)
    >>> row.fit(store, store.rows("train"))
    >>> row.loadings.shape
    (30, 3)
    """

    rank: int | Sequence[int] = (0, 5, 10, 20)
    most: int = 100

    label = "ALRA"

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Singular vectors, and threshold, mean and standard deviation of each gene."""
        from sklearn.utils.extmath import randomized_svd

        x = kept.counts.numpy()
        y = np.log1p(x / depth(x, np.ones(x.shape, dtype=bool), self.gene_mean)).astype(np.float32)
        d = max(1, min(option["rank"] or self.most, *y.shape))
        _, values, vectors = randomized_svd(y, d, random_state=self.seed)
        if option["rank"] == 0:
            d = spacing_rank(values)
        self.loadings = vectors[:d].T
        noise = max(float((y**2).sum(dtype=np.float64) - (values[:d] ** 2).sum(dtype=np.float64)), 1e-6) / y.shape[1]
        self.precision = noise / np.maximum(values[:d].astype(np.float64) ** 2, 1e-6)
        low = y @ self.loadings @ self.loadings.T
        self.threshold = np.abs(low.min(axis=0))
        self.threshold[low.min(axis=0) > 0] = 0.0
        self.kept_moments, self.true_moments = _moments(low, low > self.threshold), _moments(y, y > 0)

    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Regress, threshold, scale, and take back to molecules."""
        s = depth(counts, observed, self.gene_mean)
        y, v = np.log1p(counts / s), self.loadings
        m = observed.astype(np.float32)
        d = v.shape[1]
        gram = (m @ (v[:, :, None] * v[:, None, :]).reshape(len(v), d * d)).reshape(-1, d, d) + np.diag(self.precision)
        z = np.linalg.solve(gram.astype(np.float64), ((y * m) @ v)[:, :, None])[:, :, 0]
        low = z @ v.T
        (mean, sd), (true_mean, true_sd) = self.kept_moments, self.true_moments
        scaled = (low - mean) * np.where(sd > 0, true_sd / np.where(sd > 0, sd, 1.0), 1.0) + true_mean
        kept = np.where(low > self.threshold, np.where(scaled > 0, scaled, low), 0.0)
        return s * np.expm1(np.clip(kept, 0.0, 15.0))


def spacing_rank(values: FloatArray) -> int:
    """Number of singular values before the gaps become those of noise: the last gap 6 deviations above the tail's.

    The tail is the last fifth of the values, at least two of their gaps.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines.alra import spacing_rank
    >>> spacing_rank(np.concatenate([[90.0, 40.0], np.linspace(10.0, 9.0, 20)]))
    2
    """
    gaps = -np.diff(values)
    tail = gaps[-max(2, len(values) // 5) :]
    if len(tail) < 2:
        return len(values)
    wide = np.flatnonzero(gaps > tail.mean() + 6.0 * max(float(tail.std(ddof=1)), 1e-9))
    return int(wide[-1]) + 1 if len(wide) else 1


def _moments(values: FloatArray, where: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of each gene over ``where``; 0 without entries."""
    n = np.maximum(where.sum(axis=0), 1)
    mean = np.sum(values, axis=0, where=where, dtype=np.float64) / n
    square = np.sum((values - mean) ** 2, axis=0, where=where, dtype=np.float64) / n
    return mean, np.sqrt(square)
