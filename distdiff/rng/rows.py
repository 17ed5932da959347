"""Draws whose address is (seed, row, draw, call, gene): a cell's draw does not depend on its batch, rank or order.

The numbers are SplitMix64 (Steele, Lea & Flood 2014) evaluated at an address instead of in sequence: each (row, draw)
starts at a hash of its own, and call and gene count from there. Discrete laws are drawn by inversion where they are
small, which is nearly everywhere in counts, and by Hoermann's transformed rejection (1993) where they are large: both
exact. Whether an entry is small depends on that entry alone, and a rejected entry tries again at an address of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distdiff.rng.source import Rng, key
from distdiff.rng.splitmix import GOLDEN, MOST, NB_TAIL, SMALL, TRIES, Address, mix, signed


class Rows(Rng):
    """Draws for a batch whose rows are named.

    Parameters
    ----------
    seed, *address
        The run's seed and a stream name.
    rows, draws
        ``int64 [b]`` each: cell and draw of every row of the batch.
    fused
        Draw by one Triton kernel each (:mod:`~distdiff.rng.fused`), which does not wait for the GPU. Not so, every draw
        of counts there waits some ten times, as entries that are done are taken out.

    Examples
    --------
    >>> import torch
    >>> from distdiff.rng.rows import Rows
    >>> both = Rows(torch.tensor([4, 9]), torch.tensor([0, 0]), 0, "impute").uniform(2, 3)
    >>> alone = Rows(torch.tensor([9]), torch.tensor([0]), 0, "impute").uniform(1, 3)
    >>> bool((both[1] == alone[0]).all())  # row 9 has the same numbers in any batch
    True
    """

    def __init__(self, rows: Tensor, draws: Tensor, seed: int, *address: int | str, fused: bool = False):
        self.device, self.fused = rows.device, fused
        start = mix(rows.long() * GOLDEN + signed(key(seed, *address)))
        self.start = mix(start + draws.long() * GOLDEN).unsqueeze(1)
        self.call = 0
        self.columns: Tensor | None = None

    @contextmanager
    def only(self, row: Tensor, column: Tensor) -> Iterator[None]:
        """Within, draw for some entries alone, as a batch of shape ``[m, 1]``: each gets the numbers it would have had.

        Parameters
        ----------
        row, column
            ``int64 [m]``: place of each entry in the whole batch.
        """
        whole = self.start, self.columns
        self.start, self.columns = self.start[row], column.unsqueeze(1)
        try:
            yield
        finally:
            self.start, self.columns = whole

    def _bits(self, places: Tensor, starts: Tensor, attempt: int = 0) -> Tensor:
        """64 bits for each place (a column number) of the current call."""
        z = places + (((self.call << 8) + attempt) << 24) + 1
        z = z * GOLDEN
        return mix(starts + z)

    def _pair(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Two independent uniforms in (0, 1) from 64 bits: 23 bits and a half each, so that neither end is hit.

        (24 and a half would round up to 1 in float32, once in 17 million.)
        """
        low, high = bits & ((1 << 23) - 1), (bits >> 41) & ((1 << 23) - 1)
        return tuple((half.float() + 0.5) * 2**-23 for half in (high, low))  # type: ignore[return-value]

    def _begin(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The next call, for a batch of this shape: rows and columns."""
        rows, columns = shape[0], math.prod(shape[1:])
        if rows != len(self.start):
            raise ValueError(f"{rows} rows of noise were asked for, the generator names {len(self.start)}")
        if self.columns is not None and columns != 1:
            raise ValueError(f"draws for some entries have one column, {columns} were asked for")
        self.call += 1
        return rows, columns

    def _kernel(self, law: str, shape: tuple[int, ...], *given: Tensor) -> Tensor:
        """Draw by the kernel of a law."""
        from distdiff.rng import fused

        self._begin(shape)
        return getattr(fused, law)(Address(self.start, self.columns, self.call), *(given or shape))

    def _next(self, *shape: int) -> tuple[Tensor, Tensor]:
        _, columns = self._begin(shape)
        places = torch.arange(columns, device=self.device) if self.columns is None else self.columns
        u, v = self._pair(self._bits(places, self.start))
        return u.reshape(shape), v.reshape(shape)

    def uniform(self, *shape: int) -> Tensor:
        """See :class:`~distdiff.rng.Rng`; ``shape[0]`` is the number of rows."""
        return self._kernel("uniform", shape) if self.fused else self._next(*shape)[0]

    def normal(self, *shape: int) -> Tensor:
        """See :class:`~distdiff.rng.Rng` (Box & Muller)."""
        return self._kernel("normal", shape) if self.fused else _normal(*self._next(*shape))

    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        """See :class:`~distdiff.rng.Rng`."""
        p = p.expand_as(n)
        if self.fused:
            return self._kernel("binomial", n.shape, n, p)
        u, _ = self._next(*n.shape)
        flip = p > 0.5
        q = torch.where(flip, 1 - p, p)
        small = n * q < SMALL
        odds = q / (1 - q)
        out = _invert(
            u,
            torch.where(small, torch.exp(n * torch.log1p(-q)), 2.0),
            lambda k, n, odds: (n - k + 1) / k * odds,
            n,
            odds,
        )
        out = self._large(out.minimum(n), ~small, _btrs, n, q)  # a rounded CDF may end just below 1
        return torch.where(flip, n - out, out)

    def poisson(self, rate: Tensor) -> Tensor:
        """See :class:`~distdiff.rng.Rng`."""
        if self.fused:
            return self._kernel("poisson", rate.shape, rate)
        u, _ = self._next(*rate.shape)
        small = rate < SMALL
        out = _invert(u, torch.where(small, torch.exp(-rate), 2.0), lambda k, rate: rate / k, rate)
        return self._large(out, ~small, _ptrs, rate)

    def nb(self, mean: Tensor, log_size: Tensor) -> Tensor:
        """See :class:`~distdiff.rng.Rng`."""
        if self.fused:
            out = self._kernel("nb", mean.shape, mean, log_size)
            self.call += 2  # (as below)
            return out
        u, _ = self._next(*mean.shape)
        size = log_size.exp()
        small = (mean < SMALL) & (size > NB_TAIL * mean)
        none = torch.exp(-size * torch.log1p(mean / size))
        out = _invert(
            u, torch.where(small, none, 2.0), lambda k, size, q: (size + k - 1) / k * q, size, mean / (mean + size)
        )
        after = self.call + 2  # the same number of calls whatever the batch holds
        if bool((~small).any()):
            self.call += 1
            rate = self._large(torch.zeros_like(mean), ~small, _gamma, size) / size * mean
            out = torch.where(small, out, self.poisson(torch.where(small, 0.0, rate)))
        self.call = after
        return out

    def _large(
        self, out: Tensor, where: Tensor, draw: Callable[..., tuple[Tensor, Tensor]], *parameters: Tensor
    ) -> Tensor:
        """Fill ``out`` at ``where`` by rejection, in float64; entries that are rejected go round again."""
        row, column = where.nonzero(as_tuple=True)
        if not len(row):
            return out
        out = out.clone()
        given = [p[row, column].double() for p in parameters]
        for attempt in range(1, TRIES):
            starts, places = self.start[row, 0], column if self.columns is None else self.columns[row, 0]
            bits = [self._bits(places, starts, 2 * attempt + i) for i in (0, 1)]
            value, accepted = draw(*(half.double() for b in bits for half in self._pair(b)), *given)
            accepted &= value.isfinite()
            out[row[accepted], column[accepted]] = value[accepted].to(out.dtype)
            rejected = ~accepted
            row, column, given = row[rejected], column[rejected], [p[rejected] for p in given]
            if not len(row):
                return out
        raise ArithmeticError(f"no draw after {TRIES} tries at {[float(p[0]) for p in given]}: not finite?")


def _normal(u: Tensor, v: Tensor) -> Tensor:
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * math.pi * v)


def _invert(u: Tensor, first: Tensor, ratio: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Smallest ``k`` with ``CDF(k) > u``; ``first = pmf(0)``, ``pmf(k) = pmf(k - 1) ratio(k, *parameters)``.

    Only entries that are not done are touched again. An entry with ``first > 1`` is left at 0.
    """
    out = torch.zeros_like(u)
    flat = out.view(-1)
    index = (u >= first).view(-1).nonzero().squeeze(1)
    u, pmf = u.reshape(-1)[index], first.reshape(-1)[index]
    given = [p.expand_as(out).reshape(-1)[index] for p in parameters]
    cdf = pmf
    for k in range(1, MOST):
        if not len(index):
            break
        pmf = pmf * ratio(k, *given)
        cdf = cdf + pmf
        more = (u >= cdf) & (pmf > 1e-12)
        flat[index[~more]] = float(k)
        index, u, pmf, cdf, *given = (a[more] for a in (index, u, pmf, cdf, *given))
    flat[index] = float(MOST)
    return out


def _gamma(u: Tensor, v: Tensor, w: Tensor, z: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """``Gamma(size)`` by Marsaglia & Tsang (2000); below 1 as ``Gamma(size + 1) z^(1 / size)``."""
    d = torch.where(size < 1, size + 1, size) - 1 / 3
    x = _normal(u, v)
    cube = (1 + x / torch.sqrt(9 * d)).clamp_min(1e-12) ** 3
    accepted = (torch.log(w) < 0.5 * x * x + d - d * cube + d * torch.log(cube)) & (cube > 1e-30)
    return d * cube * torch.where(size < 1, z ** (1 / size), 1.0), accepted


def _ptrs(u: Tensor, v: Tensor, w: Tensor, z: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """``Poisson(rate)``, rate >= 10: Hoermann's PTRS (1993)."""
    root = rate.sqrt()
    b = 0.931 + 2.53 * root
    a = -0.059 + 0.02483 * b
    u = u - 0.5
    us = 0.5 - u.abs()
    k = torch.floor((2 * a / us + b) * u + rate + 0.43)
    bound = torch.log(v * (1.1239 + 1.1328 / (b - 3.4)) / (a / us.square() + b))
    inside = (k >= 0) & ~((us < 0.013) & (v > us))
    fast = (us >= 0.07) & (v <= 0.9277 - 3.6224 / (b - 2))
    return k, fast | (inside & (bound <= k * rate.log() - rate - torch.lgamma(k.clamp_min(0) + 1)))


def _btrs(u: Tensor, v: Tensor, w: Tensor, z: Tensor, n: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """``Binomial(n, p)``, ``n p >= 10`` and ``p <= 1/2``: Hoermann's BTRS (1993)."""
    spread = (n * p * (1 - p)).sqrt()
    b = 1.15 + 2.53 * spread
    a = -0.0873 + 0.0248 * b + 0.01 * p
    u = u - 0.5
    us = 0.5 - u.abs()
    k = torch.floor((2 * a / us + b) * u + n * p + 0.5)
    inside = (k >= 0) & (k <= n)
    fast = (us >= 0.07) & (v <= 0.92 - 4.2 / b) & inside
    mode = torch.floor((n + 1) * p)
    bound = torch.log(v * (2.83 + 5.1 / b) * spread / (a / us.square() + b))

    def ways(k: Tensor) -> Tensor:
        return torch.lgamma(k + 1) + torch.lgamma(n - k + 1)

    ratio = ways(mode) - ways(k.clamp_min(0).minimum(n)) + (k - mode) * torch.log(p / (1 - p))
    return k, fast | (inside & (bound <= ratio))
