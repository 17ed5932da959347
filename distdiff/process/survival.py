"""The mixture of survival probabilities that one model is trained on: one p per gene of each cell (MATHS 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distdiff.process.schedule import Schedule
from distdiff.types import Float, Tensor


@dataclass(frozen=True)
class Survival:
    """Shares of training cells that meet each pattern of p; they need not add up to 1.

    Parameters
    ----------
    hidden
        Evidence at p = 1, targets at exactly 0: what the posterior mean in one call is asked (MATHS 5.3, 5.6).
    two_level
        Evidence at p = 1, targets at p(t): the walk of an imputation (MATHS 5.2).
    uniform
        All genes at p(t): generation, denoising, RePaint (MATHS 5.1, 5.4, 6).
    target_share
        Range of the share of genes that are targets in the first two patterns, uniform per cell.
    """

    hidden: float = 0.5
    two_level: float = 0.25
    uniform: float = 0.25
    target_share: tuple[float, float] = (0.1, 0.9)

    def __post_init__(self) -> None:
        shares = (self.hidden, self.two_level, self.uniform)
        low, high = self.target_share
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"survival shares must be >= 0 and not all 0, got {shares}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"survival target_share must satisfy 0 <= low <= high <= 1, got {self.target_share}")

    def draw(self, schedule: Schedule, cells: int, genes: int, *, rng: torch.Generator) -> Float[Tensor, "b g"]:
        """Draw p for a batch: ``float32 [cells, genes]`` on the generator's device."""
        device = rng.device
        total = self.hidden + self.two_level + self.uniform
        pattern = torch.rand(cells, 1, generator=rng, device=device) * total
        level = schedule.p(torch.rand(cells, 1, generator=rng, device=device))
        level = torch.where(pattern < self.hidden, torch.zeros_like(level), level)
        low, high = self.target_share
        share = low + (high - low) * torch.rand(cells, 1, generator=rng, device=device)
        target = torch.rand(cells, genes, generator=rng, device=device) < share
        target |= pattern >= self.hidden + self.two_level
        return torch.where(target, level, torch.ones_like(level))
