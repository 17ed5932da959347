"""The true counts: the upper control of every table."""

from __future__ import annotations

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray
from distdiff.imputers import Imputed
from distdiff.types import Bool, Tensor


class Perfect(Baseline):
    """Impute the hidden counts themselves; it must be given the truth (``sees_hidden``).

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines.perfect import Perfect
    >>> Perfect().rate(np.array([[3.0, 0.0]]), observed=None, cells=None)
    array([[3., 0.]])
    """

    label = "perfect"
    peeks = True
    sees_hidden = True
    control = True

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The true counts, unchanged."""
        return counts

    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """Return the counts of ``cells``, hidden entries included; every draw is the truth."""
        return Imputed(cells.counts, cells.counts.expand(draws, -1, -1) if draws else None)
