"""Draws from torch generators: one for a batch, or one for each group of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distdiff.rng.source import Rng


class Stream(Rng):
    """torch's own draws from one generator: fast, but a draw depends on all that came before it in the batch.

    Examples
    --------
    >>> import torch
    >>> from distdiff.rng.stream import Stream
    >>> Stream(torch.Generator().manual_seed(0)).uniform(2, 3).shape
    torch.Size([2, 3])
    """

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


class Streams(Rng):
    """A stream for every ``size`` rows of a batch: each group's draws are those it would have alone.

    So a batch is drawn at once, and its numbers do not depend on how groups were dealt out to processes.

    Parameters
    ----------
    streams
        One for each group of rows, in order.
    size
        Rows of a group; the last may have fewer.
    """

    def __init__(self, streams: Sequence[Stream], size: int):
        self.streams, self.size, self.device = streams, size, streams[0].device

    def uniform(self, *shape: int) -> Tensor:
        """See :class:`Rng`; ``shape[0]`` counts rows."""
        return self._fill(torch.Tensor.uniform_, *shape)

    def normal(self, *shape: int) -> Tensor:
        """See :class:`Rng`; ``shape[0]`` counts rows."""
        return self._fill(torch.Tensor.normal_, *shape)

    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        """See :class:`Rng`."""
        return self._draw(Stream.binomial, n, p.expand_as(n))

    def poisson(self, rate: Tensor) -> Tensor:
        """See :class:`Rng`."""
        return self._draw(Stream.poisson, rate)

    def nb(self, mean: Tensor, log_size: Tensor) -> Tensor:
        """See :class:`Rng`; 0 where the mean is 0."""
        return self._draw(Stream.nb, mean, log_size)

    def _fill(self, fill: Callable[..., Tensor], *shape: int) -> Tensor:
        out = torch.empty(shape, device=self.device)
        for rows, stream in zip(out.split(self.size), self.streams, strict=True):
            fill(rows, generator=stream.generator)
        return out

    def _draw(self, law: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
        groups = zip(self.streams, *(p.split(self.size) for p in parameters), strict=True)
        return torch.cat([law(stream, *rows) for stream, *rows in groups])
