"""Which cell is read when: arithmetic on (seed, step), no I/O, no state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distdiff.rng import numpy_generator


@dataclass(frozen=True)
class Plan:
    """The order of training cells, for the whole world of processes.

    The order is an endless chain of epochs; in each epoch every cell occurs exactly once. Blocks of ``block``
    neighbouring cells are permuted, cut into windows of ``window`` blocks, and the cells of a window are permuted: a
    reader needs one window in memory. A batch may straddle two windows or two epochs, so no cell is ever left out.

    Parameters
    ----------
    n_cells
        Number of training cells.
    batch
        Cells of a step over all processes.
    block, window
        Cells a block, blocks a window.
    seed
        Seed of the order.
    """

    n_cells: int
    batch: int
    block: int = 256
    window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_cells", "batch", "block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"Plan: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every cell occurs once."""
        return self.n_cells / self.batch

    def epoch(self, step: int) -> int:
        """Epoch of the first cell of ``step``."""
        return step * self.batch // self.n_cells

    def rows(self, step: int) -> np.ndarray:
        """Cells of a step, all processes together: ``int64 [batch]`` positions in ``0 .. n_cells - 1``."""
        return self._slice(step * self.batch, (step + 1) * self.batch)

    def rank_rows(self, step: int, rank: int, world: int) -> np.ndarray:
        """Cells of one process: ``int64 [batch / world]``, a contiguous part of :meth:`rows`.

        Raises
        ------
        ValueError
            ``world`` does not divide the batch, or there is no such rank.
        """
        if self.batch % world:
            divisors = [w for w in range(1, self.batch + 1) if self.batch % w == 0]
            close = sorted(divisors, key=lambda w: abs(w - world))[:2]
            raise ValueError(f"{world} processes cannot share a batch of {self.batch}; nearest that can: {close}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not among 0 .. {world - 1}")
        share = self.batch // world
        first = step * self.batch + rank * share
        return self._slice(first, first + share)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        """Places ``start <= i < stop`` of the endless order."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.n_cells)
            number = int(np.searchsorted(_window_starts(self, epoch), place, side="right")) - 1
            first = int(_window_starts(self, epoch)[number])
            window = _window(self, epoch, number)
            part = window[place - first : place - first + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)


@lru_cache(maxsize=4)
def _blocks(plan: Plan, epoch: int) -> np.ndarray:
    n_blocks = -(-plan.n_cells // plan.block)
    return numpy_generator(plan.seed, "blocks", epoch).permutation(n_blocks)


@lru_cache(maxsize=4)
def _window_starts(plan: Plan, epoch: int) -> np.ndarray:
    """Place in the epoch at which each window begins (only the block that holds the tail is short)."""
    size = np.full(len(_blocks(plan, epoch)), plan.block, dtype=np.int64)
    size[_blocks(plan, epoch) == len(size) - 1] = plan.n_cells - (len(size) - 1) * plan.block
    return np.concatenate(([0], np.cumsum(size)))[: -1 : plan.window]


@lru_cache(maxsize=4)
def _window(plan: Plan, epoch: int, number: int) -> np.ndarray:
    blocks = _blocks(plan, epoch)[number * plan.window : (number + 1) * plan.window]
    rows = (blocks[:, None] * plan.block + np.arange(plan.block)).ravel()
    return numpy_generator(plan.seed, "window", epoch, number).permutation(rows[rows < plan.n_cells])
