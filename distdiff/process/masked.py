"""Masked diffusion of counts as classes (MDLM, ReMDM; docs/MATHS.md 9), on the same footing as count diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distdiff.process import Process, tensor
from distdiff.process.schedule import births_share, check_sigma, schedule, survivors
from distdiff.rng import Rng
from distdiff.types import Float, Tensor

MASK = -1.0


@dataclass(frozen=True)
class Masked(Process):
    """Each entry is seen whole with probability ``p`` and masked otherwise (docs/MATHS.md 9.1).

    Parameters
    ----------
    schedule
        As for ``Counts``; ``p`` is the share not yet masked (docs/MATHS.md 1.5).
    classes
        Counts ``0 ... classes - 1``.
    clamp
        Whether larger counts become the last class; otherwise they are refused.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.masked import Masked
    >>> law = Masked(classes=4)
    >>> encoded, seen = law.encode(torch.tensor([[3.0, -1.0]]), torch.full((1, 2), 0.5))  # -1 marks a masked entry
    >>> encoded, seen
    (tensor([[1.3863, 0.0000]]), tensor([[1., 0.]]))
    """

    schedule: Any = "cosine"
    classes: int = 64
    clamp: bool = False

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"process masked: classes must be at least 2, got {self.classes}")
        object.__setattr__(self, "schedule", schedule(self.schedule))

    @property
    def outputs(self) -> int:
        """One number a class: output 0 is the log rate of a Poisson law, the others correct its log probabilities."""
        return self.classes

    def enter(self, counts: Float[Tensor, "b g"], *, rng: Rng) -> Float[Tensor, "b g"]:
        """The class of each count.

        Raises
        ------
        ValueError
            A count that has no class (checked on the CPU only: the check stalls a GPU).
        """
        if not self.clamp and counts.device.type == "cpu" and bool((counts >= self.classes).any()):
            raise ValueError(
                f"a count of {counts.max():g} has no class: process masked has classes 0 to {self.classes - 1}; raise "
                "process.classes, or set process.clamp=true to hold larger counts at the last class"
            )
        return counts.clamp_max(self.classes - 1)

    def prior(self, shape: tuple[int, int], *, rng: Rng) -> Float[Tensor, "b g"]:
        """Everything masked."""
        return torch.full(shape, MASK, device=rng.device)

    def forward(
        self, x_s: Float[Tensor, "b g"], p_s: float | Tensor, p_t: float | Tensor, *, rng: Rng
    ) -> Float[Tensor, "b g"]:
        """An entry stays seen with probability ``p_t / p_s`` (docs/MATHS.md 9.1).

        Raises
        ------
        ValueError
            ``p_t`` above ``p_s`` or outside [0, 1].
        """
        kept = rng.uniform(*x_s.shape) < survivors(x_s, p_s, p_t)
        return torch.where(kept, x_s, MASK)

    def encode(
        self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"]
    ) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]]:
        """``log(1 + x)`` of the seen entries, and p as the network is given it: 1 where seen, 0 where masked."""
        return torch.log1p(x.clamp_min(0)), (x >= 0).to(x.dtype)

    def natural(
        self, raw: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """Log probabilities of the classes: a Poisson of log rate ``raw_0``, tilted by the other outputs."""
        raw = raw.float()
        k = torch.arange(self.classes, device=raw.device, dtype=raw.dtype)
        tilt = torch.cat((torch.zeros_like(raw[..., :1]), raw[..., 1:]), -1)
        return (k * raw[..., :1].clamp(-18, 12) - torch.lgamma(k + 1) + tilt).log_softmax(-1)

    def loss(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """``-p' / (1 - p) (-log P(x_0))`` of masked entries (docs/MATHS.md 9.2); weight 1 at ``p = 0``."""
        p = tensor(p, x).expand_as(x)
        weight = torch.where(p == 0, 1.0, self.schedule.speed(p) / (1 - p).clamp_min(1e-3))
        return weight * self._cross_entropy(eta, x_0, x)

    def _cross_entropy(self, eta: Tensor, x_0: Tensor, x: Tensor) -> Tensor:
        log_p = eta.log_softmax(-1).gather(-1, x_0.long().unsqueeze(-1)).squeeze(-1)
        return torch.where(x < 0, -log_p, torch.zeros_like(log_p))

    def bound(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """``-log P(x_0) / (1 - p)`` of masked entries: docs/MATHS.md 9.2 per unit of p."""
        return self._cross_entropy(eta, x_0, x) / (1 - tensor(p, x))

    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """Mean class of masked entries; seen entries unchanged."""
        k = torch.arange(self.classes, device=eta.device, dtype=eta.dtype)
        return torch.where(x < 0, eta.softmax(-1) @ k, x)

    def reverse(
        self,
        x: Float[Tensor, "b g"],
        eta: Float[Tensor, "b g k"],
        p_t: float | Tensor,
        p_s: float | Tensor,
        *,
        sigma: float | Tensor = 0.0,
        rng: Rng,
    ) -> Float[Tensor, "b g"]:
        """Unmask with probability beta, mask a seen entry with probability sigma (docs/MATHS.md 9.3).

        ``sigma = 0`` is MDLM, else ReMDM.

        Raises
        ------
        ValueError
            ``sigma`` above its cap (docs/MATHS.md 4.3) or negative.
        """
        p_t, p_s = tensor(p_t, x), tensor(p_s, x)
        sigma = check_sigma(sigma, p_t, p_s)
        cdf = eta.softmax(-1).cumsum(-1)
        drawn = (rng.uniform(*x.shape).unsqueeze(-1) * cdf[..., -1:] > cdf[..., :-1]).sum(-1).to(x.dtype)
        u = rng.uniform(*x.shape)
        unmasked = torch.where(u < births_share(p_t, p_s, sigma), drawn, x)
        return torch.where(x < 0, unmasked, torch.where(u < sigma, MASK, x))
