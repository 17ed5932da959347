"""What the rows for whole genes share: cells are matched on the genes that all of them have (panel completion)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from distdiff.baselines import BoolArray, FloatArray, depth
from distdiff.baselines._fitted import Fitted
from distdiff.downstream import log_cp10k
from distdiff.rng import numpy_generator
from distdiff.types import Cells


class Panel(Fitted, ABC):
    """``rate = s`` times a weighted mean of training cells that match a cell on the shared genes.

    For the protocol ``genes``: every cell of a query lacks the same genes. The query is compared as a whole with the
    training cells, so its cells come in one batch (``whole``), and validation cells, too, lack whole genes.
    """

    whole = True

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Keep the training cells: which genes are shared is told by the query."""
        self.train, self.option = kept.counts.numpy(), option

    @abstractmethod
    def matches(self, train: FloatArray, query: FloatArray) -> tuple[np.ndarray, FloatArray]:
        """Training cells of each cell of the query, ``int [b k]``, and their weights ``float [b k]`` with sum 1.

        Parameters
        ----------
        train, query
            ``float32 [n s]`` and ``[b s]``: ``log(1 + 10,000 x / depth)`` of the shared genes.
        """

    def mask(self, shape: tuple[int, ...], hide: float, seed: int, *address: int | str) -> BoolArray:
        """Validation cells without a share ``hide`` of the genes, at least one gene hidden and one left."""
        order = numpy_generator(seed, "baseline-genes", *address).permutation(shape[1])
        hidden = order[: min(max(1, round(hide * shape[1])), max(1, shape[1] - 1))]
        return np.broadcast_to(~np.isin(np.arange(shape[1]), hidden), shape).copy()

    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Match the query, then the mean of the matched cells at the query's depth.

        Raises
        ------
        ValueError
            Cells that lack different genes.
        """
        if (observed != observed[:1]).any():
            kinds = len(np.unique(observed, axis=0))
            raise ValueError(
                f"{self.label} completes whole genes that every cell lacks (protocol genes), and these {len(counts)} "
                f"cells lack {kinds} different sets of genes; take knn, pca or ridge for entries hidden one by one"
            )
        shared = observed[0]
        if not shared.any():
            return np.tile(self.gene_mean, (len(counts), 1))
        train, query = (log_cp10k(x[:, shared]) for x in (self.train, counts))
        at, weights = self.matches(train, query)
        b, k = at.shape
        pick = csr_array((weights.ravel(), at.ravel(), np.arange(b + 1) * k), shape=(b, len(self.train)))
        pool = pick @ self.train
        return depth(counts, observed, pool) * pool
