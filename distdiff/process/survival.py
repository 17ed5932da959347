"""The mixture of survival probabilities that a model is trained on: one p per gene of each cell (docs/MATHS.md 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from distdiff.process.schedule import Fisher, Schedule
from distdiff.rng import Rng
from distdiff.types import Bool, Float, Tensor

LOGIT = Fisher(log_eps=-7.0)
"""Levels of ``logit``."""


@dataclass(frozen=True)
class Survival:
    """Shares of training cells that meet each pattern of p per gene (docs/MATHS.md 5); they need not add up to 1.

    Parameters
    ----------
    hidden
        Evidence at p = 1, targets at exactly 0: the input of an imputation in one call (docs/MATHS.md 5.3, 5.6).
    two_level
        Evidence at p = 1, targets at p(t): the walk of an imputation (docs/MATHS.md 5.2).
    uniform
        All genes at p(t): generation, denoising, RePaint (docs/MATHS.md 5.1, 5.4, 6).
    target_share
        Range of the share of genes that are targets in the first two patterns, uniform per cell.
    levels
        Law of the p of ``uniform``. ``schedule``: p(t). ``logit``: of half of them, even in logit p from .0009 to .5
        (docs/MATHS.md 1.3), so that cells with hardly a molecule left, whose labels decide, are met often for rare
        labels too.
        ``auto``: ``logit`` for cells of counts with labels, if the loss weighs every p alike; else ``schedule``.
    time
        How t is drawn: ``uniform`` for each cell; ``stratified``: evenly over the global batch, with one random shift
        a step; ``learned``: stratified and denser where the loss is larger, weighted back, so that the gradient keeps
        its mean and loses variance.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import Linear
    >>> from distdiff.process.survival import Survival
    >>> from distdiff.rng import generator
    >>> imputation = Survival(hidden=1, two_level=0, uniform=0)
    >>> p, timed = imputation.draw(Linear(), torch.full((64, 1), 0.5), 20, rng=generator(0, "example"))
    >>> p.unique(), bool(timed.any())  # targets at 0, evidence at 1, whatever the time
    (tensor([0., 1.]), False)
    """

    hidden: float = 0.5
    two_level: float = 0.25
    uniform: float = 0.25
    target_share: tuple[float, float] = (0.1, 0.9)
    levels: Literal["auto", "schedule", "logit"] = "auto"
    time: Literal["uniform", "stratified", "learned"] = "uniform"

    def __post_init__(self) -> None:
        shares = (self.hidden, self.two_level, self.uniform)
        low, high = self.target_share
        if not all(0 <= share < math.inf for share in shares) or sum(shares) <= 0:
            raise ValueError(f"survival shares must be >= 0 and not all 0, got hidden, two_level, uniform = {shares}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"survival target_share must satisfy 0 <= low <= high <= 1, got {self.target_share}")

    def settled(self, near_zero: bool) -> Survival:
        """The same with ``levels: auto`` decided: ``logit`` where p near 0 matters."""
        return self if self.levels != "auto" else replace(self, levels="logit" if near_zero else "schedule")

    def draw(
        self, schedule: Schedule, t: Float[Tensor, "b 1"], genes: int, *, rng: Rng
    ) -> tuple[Float[Tensor, "b g"], Bool[Tensor, "b 1"]]:
        """Draw p for cells with times ``t``; the second result marks cells whose p depends on t (not ``hidden``)."""
        cells = len(t)
        pattern = rng.uniform(cells, 1) * (self.hidden + self.two_level + self.uniform)
        timed = pattern >= self.hidden
        uniform = pattern >= self.hidden + self.two_level
        level = torch.where(timed, schedule.p(t), 0.0)
        if self.levels == "logit":
            near_zero = pattern >= self.hidden + self.two_level + self.uniform / 2
            level = torch.where(near_zero, LOGIT.p((1 + t) / 2), level)
        low, high = self.target_share
        share = low + (high - low) * rng.uniform(cells, 1)
        target = rng.uniform(cells, genes) < share
        target |= uniform
        return torch.where(target, level, 1.0), timed
