"""Draws from one torch generator."""

from __future__ import annotations

import torch
from torch import Tensor

from distdiff.rng import Rng


class Stream(Rng):
    """torch's own draws from one generator: fast, but a draw depends on all that came before it in the batch."""

    def __init__(self, generator: torch.Generator):
        self.generator, self.device = generator, generator.device

    def uniform(self, *shape: int) -> Tensor:
        """See :class:`Rng`."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """See :class:`Rng`."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        """See :class:`Rng`; exact for small and large counts."""
        return torch.binomial(n.contiguous(), p.expand_as(n).contiguous(), generator=self.generator)

    def poisson(self, rate: Tensor) -> Tensor:
        """See :class:`Rng`."""
        return torch.poisson(rate, generator=self.generator)

    def nb(self, mean: Tensor, log_size: Tensor) -> Tensor:
        """See :class:`Rng`; 0 where the mean is 0."""
        size = log_size.exp()
        return self.poisson(torch._standard_gamma(size, generator=self.generator) / size * mean)
