"""The mean of each gene over the training cells, plain or scaled to the cell's depth."""

from __future__ import annotations

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray, depth


class GeneMean(Baseline):
    """Impute ``mean_g``, or ``s mean_g`` with ``s`` the depth of the cell's evidence (`distdiff.baselines.depth`).

    Examples
    --------
    >>> from distdiff.baselines.gene_mean import GeneMean
    >>> from distdiff.data.store.store import CountStore
    >>> store, baseline = CountStore.open("atlas.zarr"), GeneMean(depth=True)
    >>> baseline.fit(store, store.rows("train"))
    >>> baseline.denoise(store.read(store.rows("test")), p=1.0).shape
    (20, 30)
    """

    def __init__(self, depth: bool = False) -> None:
        self.depth = self.denoises = depth
        self.label = "gene mean x depth" if depth else "gene mean"

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Gene means, times the depth of the evidence if ``depth``."""
        if self.depth:
            return depth(counts, observed, self.gene_mean) * self.gene_mean
        return np.broadcast_to(self.gene_mean, counts.shape)
