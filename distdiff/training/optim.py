"""AdamW with warm-up and cosine decay, measured in cells seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Optim:
    """Optimiser settings.

    Parameters
    ----------
    lr
        AdamW's largest learning rate.
    weight_decay
        AdamW's, on matrices only, not on biases, gains and embeddings.
    betas
        AdamW's decays of the averages of gradient and squared gradient.
    warmup_cells
        Cells over which the learning rate rises linearly; then it falls as a cosine to 0 at the end of training.
    clip
        Largest norm of the gradient.
    ema
        Decay of the weight average, ``min(ema, (1 + n) / (10 + n))`` after step n.

    Examples
    --------
    >>> from distdiff.training.optim import Optim
    >>> optim = Optim(lr=1.0, warmup_cells=100)
    >>> [round(optim.rate(seen, total=1000), 2) for seen in (0, 99, 500, 1000)]
    [0.01, 0.98, 0.5, 0.0]
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_cells: int = 10_000
    clip: float = 1.0
    ema: float = 0.995

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"optim.lr must be above 0 and optim.weight_decay not below, got {self.lr} and {self.weight_decay}"
            )
        if not all(0 <= beta < 1 for beta in (*self.betas, self.ema)):
            raise ValueError(f"optim.betas and optim.ema must lie in [0, 1), got {list(self.betas)} and {self.ema}")
        if not self.clip > 0 or self.warmup_cells < 0:
            raise ValueError(
                f"optim.clip must be above 0 and optim.warmup_cells not below, got {self.clip} and {self.warmup_cells}"
            )

    def rate(self, seen: int, total: int) -> float:
        """Learning rate after ``seen`` of ``total`` cells."""
        warm = min(1.0, (seen + 1) / max(1, self.warmup_cells))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, seen / max(1, total))))

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over two groups: matrices of linear layers, and the rest."""
        decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in model.parameters():
            groups[id(parameter) not in decayed].append(parameter)
        return torch.optim.AdamW(
            [
                {"params": groups[0], "weight_decay": self.weight_decay},
                {"params": groups[1], "weight_decay": 0.0},
            ],
            lr=self.lr,
            betas=self.betas,
            fused=True,
        )
