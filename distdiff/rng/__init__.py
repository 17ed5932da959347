"""Every random number has an address: ``(seed, stream, step, row ...)`` names its generator.

Nothing in distdiff touches global random state. Two calls with the same address give the same numbers on the same
device, whatever ran before, so a resumed run, another number of ranks and another batch order see the same noise.

A law asks a :class:`Rng` for draws and does not know where they come from: :class:`~distdiff.rng.stream.Stream` is
a torch generator, the fastest source, for training; :class:`~distdiff.rng.rows.Rows` gives each (row, draw) numbers of
its own, for sampling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from distdiff.rng.source import Rng, key

if TYPE_CHECKING:
    import torch

    from distdiff.rng.stream import Stream

__all__ = ["Rng", "borrowed", "generator", "key", "numpy_generator"]


def generator(seed: int, *address: int | str, device: torch.device | str = "cpu") -> Stream:
    """The torch stream on ``device`` for this address.

    Examples
    --------
    >>> from distdiff.rng import generator
    >>> one, two = (generator(7, "noise", 3) for _ in range(2))  # seed 7, stream "noise", step 3
    >>> bool((one.normal(4) == two.normal(4)).all())
    True
    """
    import torch

    from distdiff.rng.stream import Stream

    return Stream(torch.Generator(device=device).manual_seed(key(seed, *address)))


def numpy_generator(seed: int, *address: int | str) -> np.random.Generator:
    """A numpy (Philox) generator for this address.

    Examples
    --------
    >>> from distdiff.rng import numpy_generator
    >>> numpy_generator(7, "mask").random() == numpy_generator(7, "mask").random()
    True
    >>> numpy_generator(7, "mask").random() == numpy_generator(8, "mask").random()
    False
    """
    return np.random.Generator(np.random.Philox(key(seed, *address)))


@contextlib.contextmanager
def borrowed(device: torch.device, seed: int, *address: int | str) -> Iterator[None]:
    """Set torch's own generators of the CPU and of ``device`` to this address, and give them back as they were.

    Dropout draws from them and takes no other.

    Examples
    --------
    >>> import torch
    >>> from distdiff.rng import borrowed
    >>> state = torch.get_rng_state()
    >>> with borrowed(torch.device("cpu"), 0, "dropout"):
    ...     _ = torch.rand(3)
    >>> bool((torch.get_rng_state() == state).all())
    True
    """
    import torch

    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [own.get_state() for own in generators]
    try:
        for own in generators:
            own.manual_seed(key(seed, *address))
        yield
    finally:
        for own, state in zip(generators, states, strict=True):
            own.set_state(state)
