"""SplitMix64 at an address, and the limits of the laws: what :mod:`~distdiff.rng.rows` and its kernels share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SMALL = 10.0
"""Laws of a mean below this are drawn by inversion."""

NB_TAIL = 0.07
"""... of a negative binomial: only if also ``size / mean`` is above this, so that 256 terms reach the last of 2^23."""

MOST = 512
"""Largest count that inversion reaches."""

TRIES = 64
"""A rejected entry tries again at most so often; the chance that one is rejected each time is below 1e-30."""


def signed(value: int) -> int:
    """The 64 bits of a whole number as ``int64``."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


GOLDEN, MIX_1, MIX_2 = (signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Address(NamedTuple):
    """Where the numbers of one call begin.

    Attributes
    ----------
    start
        ``int64 [b 1]``, the hash of each row and draw; ``[m 1]`` of each entry where only some are drawn.
    columns
        ``int64 [m 1]``, the column of each entry in the whole batch, or ``None``: entries lie in a batch.
    call
        Number of the call of this generator.
    """

    start: Tensor
    columns: Tensor | None
    call: int


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on ``int64`` (wrapping products; shifts made logical by a mask). Works in place."""
    z = z ^ ((z >> 30) & ((1 << 34) - 1))
    z *= MIX_1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= MIX_2
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z
