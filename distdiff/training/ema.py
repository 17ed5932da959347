"""Exponential moving average of weights, updated after the optimiser's step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


EVERY = 4
"""Steps from one update to the next: the average moves slowly, and reading all weights is not free."""


class Ema(Generic[M]):
    """A copy of a model whose weights trail it: ``decay = min(ema, (1 + n) / (10 + n))`` a step, every fourth step.

    Examples
    --------
    >>> import torch
    >>> from distdiff.training.ema import Ema
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> average = Ema(model, decay=0.99)
    >>> [average.due(step) for step in range(4)]
    [False, False, False, True]
    """

    def __init__(self, model: M, decay: float):
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @staticmethod
    def due(step: int) -> bool:
        """Whether the average moves after step ``step`` (counted from 0)."""
        return (step + 1) % EVERY == 0

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        """Move towards ``weights`` (as ``model.parameters()``) after step ``step``, if it is due."""
        if self.due(step):
            decay = min(self.decay, (1 + step) / (10 + step)) ** EVERY
            torch._foreach_lerp_(list(self.model.parameters()), list(weights), 1 - decay)
