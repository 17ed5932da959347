"""What every source of draws is: an address hashed to a key, and the laws that it can draw from."""

from __future__ import annotations

import hashlib
import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def key(seed: int, *address: int | str) -> int:
    """Hash an address to 63 bits.

    Parameters
    ----------
    seed
        The run's seed.
    *address
        Stream name and counters, for example ``("thin", step, group)``.

    Raises
    ------
    ValueError
        ``seed`` is no whole number.

    Examples
    --------
    >>> from distdiff.rng import key
    >>> key(0, "noise", 1) == key(0, "noise", 1), key(0, "noise", 1) == key(0, "noise", 2)
    (True, False)
    """
    try:
        text = "/".join([str(operator.index(seed)), *map(str, address)])
    except TypeError:
        raise ValueError(f"seed={seed!r}: a whole number is wanted") from None
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Rng(ABC):
    """A source of draws; every method moves it on.

    Parameters of laws are float tensors of the shape of the answer; counts come as whole numbers in floating point.

    Examples
    --------
    >>> import torch
    >>> from distdiff.rng import generator
    >>> rng = generator(0, "example")
    >>> thinned = rng.binomial(torch.full((100_000,), 10.0), torch.full((100_000,), 0.3))
    >>> round(thinned.mean().item(), 1)
    3.0
    """

    device: torch.device

    @abstractmethod
    def uniform(self, *shape: int) -> Tensor:
        """``float32`` in [0, 1)."""

    @abstractmethod
    def normal(self, *shape: int) -> Tensor:
        """Standard normal, ``float32``."""

    @abstractmethod
    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        """``Binomial(n, p)``; ``n`` whole numbers."""

    @abstractmethod
    def poisson(self, rate: Tensor) -> Tensor:
        """``Poisson(rate)``."""

    @abstractmethod
    def nb(self, mean: Tensor, log_size: Tensor) -> Tensor:
        """Negative binomial of this mean and size (variance ``mean + mean^2 / size``): a Poisson with a Gamma rate."""
