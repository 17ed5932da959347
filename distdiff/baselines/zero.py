"""No imputation: every hidden entry is zero. The lower control of every table."""

from __future__ import annotations

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray


class Zero(Baseline):
    """Impute zero. Its Poisson deviance is set by the floor of the score: a mean of 0 would be infinitely wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines.zero import Zero
    >>> Zero().rate(np.ones((1, 3)), observed=None, cells=None)
    array([[0., 0., 0.]])
    """

    label = "none (zero)"
    control = True

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Zero everywhere."""
        return np.zeros_like(counts)
