"""The mean of each gene over the training cells of the same label, plain or scaled to the cell's depth.

It peeks: the labels of test cells were made from their full counts, hidden entries included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray, chunks, depth

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore


class TypeMean(Baseline):
    """Impute the mean of the cell's label; cells without one, or with one unseen in training, get the gene mean.

    Parameters
    ----------
    key
        The covariate whose values are the types.
    depth
        Scale to the depth of the cell's evidence against its type's profile.

    Examples
    --------
    >>> from distdiff.baselines.type_mean import TypeMean
    >>> from distdiff.data.store.store import CountStore
    >>> store, baseline = CountStore.open("atlas.zarr"), TypeMean(key="cell_type")
    >>> baseline.fit(store, store.rows("train"))
    >>> baseline.mean.shape  # two types, and the gene mean for cells without one
    (3, 30)
    """

    peeks = True

    def __init__(self, key: str = "cell_type", depth: bool = False) -> None:
        self.key = key
        self.depth = depth
        self.label = "cell-type mean x depth" if depth else "cell-type mean"

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Mean counts of each label value, ``float64 [values + 1, g]``; the last row is the gene mean.

        Raises
        ------
        ValueError
            The store has no label ``key``.
        """
        if self.key not in store.manifest.labels:
            have = ", ".join(store.manifest.labels) or "none"
            raise ValueError(f"type_mean: the store has no label {self.key!r}; it has: {have}")
        codes = store.labels(rows, (self.key,))[self.key]
        n = len(store.manifest.labels[self.key])
        total, size = np.zeros((n, len(store.genes))), np.bincount(codes[codes >= 0], minlength=n)
        for part, counts in chunks(store, rows):
            known = codes[part] >= 0
            np.add.at(total, codes[part][known], counts[known])
        mean = np.where(size[:, None] > 0, total / np.maximum(size, 1)[:, None], self.gene_mean)
        self.mean = np.concatenate([mean, self.gene_mean[None]])

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The profile of each cell's label (code -1 is the last row), times the depth of the evidence if ``depth``.

        Raises
        ------
        ValueError
            The batch carries no label ``key``.
        """
        if self.key not in cells.labels.labels:
            raise ValueError(
                f"type_mean: the batch has no label {self.key!r}; it has: {', '.join(cells.labels.labels)}"
            )
        codes = cells.labels.labels[self.key].numpy()
        profile = self.mean[np.where(codes < len(self.mean) - 1, codes, -1)]
        return depth(counts, observed, profile) * profile if self.depth else profile
