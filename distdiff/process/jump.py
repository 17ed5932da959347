"""Continuous non-negative data as counts: thicken to Poisson counts, diffuse those, divide (JUMP; docs/MATHS.md 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distdiff.process.counts import Counts
from distdiff.rng import Rng
from distdiff.types import Float, Tensor


@dataclass(frozen=True)
class Jump(Counts):
    """Count diffusion of ``y ~ Poisson(scale x)`` (docs/MATHS.md 7.1); the answer is ``y / scale`` (docs/MATHS.md 7.2).

    Parameters
    ----------
    scale
        Molecules per unit of the data (the paper's lambda). The relative noise of the round trip is
        ``1 / sqrt(scale x)``; a larger scale needs walks of more steps, not larger networks.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.jump import Jump
    >>> law = Jump(scale=100)
    >>> law.leave(torch.tensor([[250.0]]))  # 250 Poisson counts stand for a measurement of 2.5
    tensor([[2.5000]])
    """

    scale: float = 100.0

    molecules: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"process jump: scale must be positive, got {self.scale}")

    def enter(self, counts: Float[Tensor, "b g"], *, rng: Rng) -> Float[Tensor, "b g"]:
        """``Poisson(scale x)`` (docs/MATHS.md 7.1).

        Raises
        ------
        ValueError
            A negative value.
        """
        if counts.device.type == "cpu" and bool((counts < 0).any()):
            raise ValueError(f"process jump needs data >= 0, got {counts.min():g}")
        return rng.poisson(self.scale * counts)

    def leave(self, x: Float[Tensor, "b g"]) -> Float[Tensor, "b g"]:
        """``y / scale`` (docs/MATHS.md 7.2)."""
        return x / self.scale

    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """Posterior mean of the data: that of the Poisson counts, divided by ``scale``."""
        return self.leave(super().mean(eta, x, p))

    def rate(self, eta: Float[Tensor, "b g k"]) -> Float[Tensor, "b g"]:
        """Rate of the Poisson counts, divided by ``scale``."""
        return self.leave(super().rate(eta))
