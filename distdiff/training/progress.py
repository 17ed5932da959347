"""How far a run is, and which of its weights are the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a resumed run must know besides weights.

    ``judge`` names the validation number that chooses the best weights: the deviance of hidden entries; the loss for a
    mixture that hides none, or a process that cannot answer for them in one call (noise prediction). ``bad`` counts
    validations since the best one.
    """

    judge: str = "val/deviance"
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    bad: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    times: dict[str, Any] = field(default_factory=dict)

    def record(self, numbers: Mapping[str, float], cells: int) -> None:
        """Add the numbers of a validation after so many cells, and compare them with the best ones."""
        self.history.append({"cells": cells, **numbers})
        if numbers[self.judge] < self.best:
            self.best, self.best_step, self.bad = numbers[self.judge], self.step, 0
        else:
            self.bad += 1
