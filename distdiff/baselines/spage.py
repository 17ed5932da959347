"""SpaGE (after Abdelaal et al., NAR 2020): principal vectors of the shared genes, then weighted cosine neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distdiff.baselines import FloatArray
from distdiff.baselines._panel import Panel


@dataclass(eq=False)
class Spage(Panel):
    """``rate = s sum_j w_j x_j`` over the ``k`` nearest training cells by cosine distance along principal vectors.

    Shared genes are standardised within each set. With ``F`` and ``H`` the orthonormal principal components of training
    and query cells (``[d s]``), ``F H' = U diag(cos) V'`` and the principal vectors of the training cells are ``U' F``;
    those with a cosine above ``cosine`` are kept and both sets projected on them. Neighbours at a distance ``d_j`` of
    1 or more do not count; the others have weights ``w_j = (1 - d_j / sum d) / (k - 1)``.

    Different from the paper: counts are averaged, not log values, and scaled to the query's depth.

    Parameters
    ----------
    components
        Principal components of each set.
    k
        Neighbours.
    cosine
        Smallest cosine of a principal vector that is kept.

    Examples
    --------
    >>> from distdiff.baselines.spage import Spage
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), Spage(components=5, k=10, hide=0.1)
    >>> row.fit(store, store.rows("train"))
    >>> cells = store.cells(store.rows("test"))
    >>> observed = (cells.counts >= 0) & (cells.counts.new_ones(30).cumsum(0) > 3)  # three genes of every cell hidden
    >>> row.impute(cells, observed).mean.shape
    torch.Size([20, 30])
    """

    components: int | Sequence[int] = (30, 50)
    k: int | Sequence[int] = (50, 20)
    cosine: float = 0.3

    label = "SpaGE"

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.options()
        if min(min(options["components"]), min(options["k"])) < 1 or not 0 <= self.cosine < 1:
            raise ValueError(
                f"{self.label}: components={self.components} and k={self.k} must each be 1 or more, and "
                f"cosine={self.cosine} lie in [0, 1)"
            )

    def matches(self, train: FloatArray, query: FloatArray) -> tuple[np.ndarray, FloatArray]:
        """Neighbours along the principal vectors, with weights that fall with the distance."""
        from sklearn.neighbors import NearestNeighbors

        x, y = _standard(train), _standard(query)
        source, target = (_components(z, self.option["components"], self.seed) for z in (x, y))
        u, cosines, _ = np.linalg.svd(source @ target.T)
        kept = max(1, int((cosines > self.option["cosine"]).sum()))
        vectors = u.T[:kept] @ source
        k = min(self.option["k"], len(train))
        near = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x @ vectors.T)
        distance, at = near.kneighbors(y @ vectors.T)
        return at, falling(distance)


def falling(distance: FloatArray) -> FloatArray:
    """Weights of neighbours at cosine distances, ``float64 [b k]`` with sum 1.

    ``(1 - d_j / sum d) / (k - 1)`` over the ``k`` with ``d < 1``; a single one has weight 1, and all are alike where
    none is that near.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines.spage import falling
    >>> falling(np.array([[0.1, 0.3, 1.2], [0.5, 1.0, 1.1], [1.2, 1.3, 1.4]])).round(2)
    array([[0.75, 0.25, 0.  ],
           [1.  , 0.  , 0.  ],
           [0.33, 0.33, 0.33]])
    """
    some = (distance < 1).any(axis=1, keepdims=True)
    near = (distance < 1) | ~some
    n = near.sum(axis=1, keepdims=True)
    total: FloatArray = np.sum(distance, axis=1, where=near, keepdims=True, dtype=np.float64)
    share = np.divide(distance, total, out=np.repeat(1.0 / n, near.shape[1], axis=1), where=some & (total > 0))
    far = np.where(n > 1, (1.0 - share) / np.maximum(n - 1, 1), 1.0)
    weights = np.where(near, np.maximum(far, 0.0), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _standard(values: FloatArray) -> FloatArray:
    """Columns of mean 0 and standard deviation 1; one that is the same in all cells is 0."""
    spread = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(spread > 1e-6, spread, np.inf)


def _components(values: FloatArray, most: int, seed: int) -> FloatArray:
    """Orthonormal principal components ``[d s]``; of one cell, or of cells that are all alike, one arbitrary axis."""
    from sklearn.decomposition import PCA

    if len(values) < 2 or not values.any():
        return np.eye(1, values.shape[1], dtype=np.float32)
    d = max(1, min(most, min(values.shape) - 1))
    return PCA(d, svd_solver="randomized", random_state=seed).fit(values).components_
