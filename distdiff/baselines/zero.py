"""No imputation: every hidden entry is zero. The lower control of every table."""

from __future__ import annotations

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray


class Zero(Baseline):
    """Impute zero: a cell's own counts as they are, which is also its answer where counts are denoised.

    Its Poisson deviance is set by the floor of the score: a mean of 0 would be infinitely wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines.zero import Zero
    >>> Zero().rate(np.array([[2.0, 0.0, 0.0]]), observed=None, cells=None)  # the last one may be hidden
    array([[2., 0., 0.]])
    """

    label = "none (zero)"
    control = True
    denoises = True

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The counts of the evidence, which are zero where hidden."""
        return counts.copy()
