"""How far a run is, and which of its weights are the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Progress:
    """What a resumed run must know besides weights.

    ``judge`` names the validation number that chooses the best weights: the deviance of hidden entries; the loss for a
    mixture that hides none, or a process that cannot answer for them in one call (noise prediction). ``best_cells``
    holds that number for each validation cell at the best validation. ``bad`` counts the validations in a row that were
    worse than the best one by more than chance (:func:`worse`): a flat stretch is none, as it may come before the fall
    of the learning rate, which is worth most.
    """

    judge: str = "val/deviance"
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    best_cells: list[float] = field(default_factory=list)
    bad: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    times: dict[str, Any] = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether the weights of this step are the best so far."""
        return self.best_step == self.step > 0

    def record(self, numbers: Mapping[str, float], cells: int, scores: Sequence[float]) -> None:
        """Add the numbers of a validation after so many cells, and compare it with the best one.

        Parameters
        ----------
        scores
            The number ``judge`` of each validation cell; their mean is ``numbers[judge]``.
        """
        self.history.append({"cells": cells, **numbers})
        if numbers[self.judge] < self.best:
            self.best, self.best_step, self.best_cells, self.bad = numbers[self.judge], self.step, list(scores), 0
        else:
            self.bad = self.bad + 1 if not self.best_cells or worse(scores, self.best_cells) else 0


def worse(scores: Sequence[float], best: Sequence[float]) -> bool:
    """Whether cells score higher (worse) than they did, by more than the standard error of their mean difference.

    Both are of the same cells under the same masks, so what cells differ by from each other is no part of the noise.

    Examples
    --------
    >>> from distdiff.training.progress import worse
    >>> worse([1.2, 3.1, 2.2], best=[1.0, 3.0, 2.0])  # each cell a little
    True
    >>> worse([1.2, 2.9, 2.0], best=[1.0, 3.0, 2.0])  # one more, one less
    False
    """
    change = np.asarray(scores) - np.asarray(best)
    noise = change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else 0.0
    return not change.mean() <= noise  # nor is what is no number any better
