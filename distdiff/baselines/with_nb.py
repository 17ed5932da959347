"""A negative binomial around any row's mean, so that rows that only give means can be drawn from and scored as laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff.baselines import Baseline, BoolArray, FloatArray, _tuning
from distdiff.component import build
from distdiff.types import Cells, Condition

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore


class WithNb(Baseline):
    """The mean of the row ``of``, with one negative binomial size a gene from validation cells.

    The row is fitted on four fifths of the training cells, its residuals on hidden entries of the last fifth give the
    sizes, and it is fitted again on all: residuals of cells that it was fitted on would be too small.

    Parameters
    ----------
    of
        The row, as ``kind`` and options.
    hide
        Share of validation entries that are hidden.
    seed
        Seed of the sample and the mask.

    Examples
    --------
    >>> from distdiff.baselines.with_nb import WithNb
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), WithNb({"kind": "gene_mean", "depth": True})
    >>> row.fit(store, store.rows("train"))
    >>> row.label, row.sizes.shape
    ('gene mean x depth + NB', (30,))
    """

    def __init__(self, of: Mapping[str, Any] | None = None, *, hide: float = 0.5, seed: int = 0) -> None:
        self.row: Baseline = build(Baseline, of or {"kind": "knn"})
        self.hide, self.seed = hide, seed
        if not 0 < hide < 1:
            raise ValueError(f"with_nb: hide={hide} must lie strictly between 0 and 1")
        self.label = f"{self.row.label} + NB"
        self.peeks, self.control, self.denoises = self.row.peeks, self.row.control, self.row.denoises
        self.whole, self.key = self.row.whole, getattr(self.row, "key", "")

    def n_trials(self) -> int:
        """Those of the row."""
        return self.row.n_trials()

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Fit the row twice, with the sizes in between."""
        some = _tuning.sample(rows, len(rows), self.seed)
        kept, held = (some[part] for part in _tuning.hold_out(len(some)))
        self.row.fit(store, np.sort(kept))
        truth = _tuning.dense(store, held[:5_000])
        mask = getattr(self.row, "mask", _tuning.random_mask)
        observed = mask(truth.shape, self.hide, self.seed, "sizes")
        labels = {}
        if self.key:
            labels = {k: torch.from_numpy(v) for k, v in store.labels(held[:5_000], (self.key,)).items()}
        cells = Cells(torch.from_numpy(truth), Condition(labels), torch.from_numpy(held[:5_000]))
        mean = self.row.impute(cells, torch.from_numpy(observed)).mean.numpy()
        self.sizes = _tuning.sizes(truth, ~observed, mean)
        self.row.fit(store, rows)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The row's own rate."""
        return self.row.rate(counts, observed, cells)
