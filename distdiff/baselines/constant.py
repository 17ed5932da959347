"""One number for every hidden entry: a control that scores well where a protocol hides no zeros."""

from __future__ import annotations

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray


class Constant(Baseline):
    """Impute ``value`` molecules everywhere.

    Raises
    ------
    ValueError
        ``value`` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines.constant import Constant
    >>> Constant(2.0).rate(np.zeros((1, 3)), observed=None, cells=None)
    array([[2., 2., 2.]])
    """

    control = True

    def __init__(self, value: float = 1.0) -> None:
        if not value >= 0:
            raise ValueError(f"constant: value={value} must be 0 or more molecules")
        self.value = value
        self.label = f"constant {value:g}"

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """``value`` everywhere."""
        return np.full_like(counts, self.value)
