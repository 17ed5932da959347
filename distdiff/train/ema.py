"""Exponential moving average of weights, updated after the optimiser's step."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


EVERY = 4
"""Steps from one update to the next: the average moves slowly, and reading all weights is not free."""


class Ema(Generic[M]):
    """A copy of a model whose weights trail it: ``decay = min(ema, (1 + n) / (10 + n))`` a step, every fourth step."""

    def __init__(self, model: M, decay: float):
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after step ``step`` (counted from 0)."""
        if (step + 1) % EVERY:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) ** EVERY
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
