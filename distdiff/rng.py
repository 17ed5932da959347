"""Every random number has an address: ``(seed, stream, step, row ...)`` names its generator.

Nothing in distdiff touches global random state. Two calls with the same address give the same numbers on the same
device, whatever ran before, so a resumed run, another number of ranks and another batch order see the same noise.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, *address: int | str) -> int:
    """Hash an address to 63 bits.

    Parameters
    ----------
    seed
        The run's seed.
    *address
        Stream name and counters, for example ``("thin", step, group)``.
    """
    text = "/".join([str(int(seed)), *map(str, address)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on ``device`` for this address."""
    return torch.Generator(device=device).manual_seed(key(seed, *address))


def numpy_generator(seed: int, *address: int | str) -> np.random.Generator:
    """A numpy (Philox) generator for this address."""
    return np.random.Generator(np.random.Philox(key(seed, *address)))
