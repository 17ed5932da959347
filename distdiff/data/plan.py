"""Which training cell is read when: a pure function of (seed, step), with no file, queue or rank in it.

An epoch reads every cell once: blocks of neighbouring cells are permuted, cut into windows of a few blocks, and the
cells of each window are permuted. Epochs follow each other without a gap, so a batch may straddle two windows or two
epochs. Resuming, and any number of ranks, need only the step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from distdiff.rng import numpy_generator


@dataclass(frozen=True)
class Plan:
    """The reading order of a training set.

    Attributes
    ----------
    n_cells
        Training cells.
    batch
        Cells a step takes in the whole world, over all ranks.
    block, window
        Cells a block and blocks a window: ``block * window`` cells are shuffled together.
    seed
        Another seed is another order.

    Raises
    ------
    ValueError
        A size below 1.
    """

    n_cells: int
    batch: int
    block: int = 256
    window: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_cells", "batch", "block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"Plan {name}={getattr(self, name)}: at least 1 is wanted")

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every cell is read once on average."""
        return self.n_cells / self.batch

    def epoch(self, step: int) -> int:
        """Epoch of the first cell of a step."""
        return self._start(step) // self.n_cells

    def rows(self, step: int) -> np.ndarray:
        """The cells of a step.

        Which cells these are is random; within the step they are ascending, so that neighbours in the store go to the
        same rank and each rank decodes few blocks.

        Returns
        -------
        int64 [batch]
            Positions ``0 .. n_cells - 1`` in the training set.

        Raises
        ------
        ValueError
            A negative step.
        """
        at, parts, wanted = self._start(step), [], self.batch
        while wanted:
            epoch, offset = divmod(at, self.n_cells)
            start, cells = self._window_at(epoch, offset)
            part = cells[offset - start : offset - start + wanted]
            parts.append(part)
            at, wanted = at + len(part), wanted - len(part)
        return np.sort(np.concatenate(parts))

    def rank_rows(self, step: int, rank: int, world: int) -> np.ndarray:
        """The contiguous slice of `rows` that one rank reads, ``int64 [batch / world]``.

        Raises
        ------
        ValueError
            The batch cannot be dealt evenly (the nearest numbers of ranks that divide it are named), or no such rank.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: 0 to {world - 1} is wanted")
        if self.batch % world:
            fits = [w for w in range(1, self.batch + 1) if self.batch % w == 0]
            near = [max(w for w in fits if w < world), *[w for w in fits if w > world][:1]]
            raise ValueError(
                f"batch {self.batch} is no multiple of {world} ranks; use {' or '.join(map(str, near))} ranks, "
                f"or a batch of {-(-self.batch // world) * world}"
            )
        share = self.batch // world
        return self.rows(step)[rank * share : (rank + 1) * share]

    def _start(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"step {step}: 0 or more is wanted")
        return step * self.batch

    def _window_at(self, epoch: int, offset: int) -> tuple[int, np.ndarray]:
        """Where in its epoch the window that covers ``offset`` starts, and its cells in reading order."""
        size = self.block * self.window
        missing = -self.n_cells % self.block  # cells that the last block, wherever it is permuted to, lacks
        short = _short_block_window(self, epoch)
        number = offset // size
        if offset >= (number + 1) * size - (missing if short <= number else 0):
            number += 1
        return number * size - (missing if short < number else 0), _window(self, epoch, number)


@functools.lru_cache(maxsize=4)
def _blocks(plan: Plan, epoch: int) -> np.ndarray:
    """Order of the blocks in an epoch, ``int64 [n_blocks]``."""
    return numpy_generator(plan.seed, "blocks", epoch).permutation(-(-plan.n_cells // plan.block))


@functools.lru_cache(maxsize=4)
def _short_block_window(plan: Plan, epoch: int) -> int:
    """Number of the window that holds the last block, the one that may be short."""
    order = _blocks(plan, epoch)
    return int(np.argmax(order == len(order) - 1)) // plan.window


@functools.lru_cache(maxsize=4)
def _window(plan: Plan, epoch: int, number: int) -> np.ndarray:
    """Cells of one window in reading order, ``int64 [<= block * window]``."""
    blocks = _blocks(plan, epoch)[number * plan.window : (number + 1) * plan.window]
    cells = (blocks[:, None] * plan.block + np.arange(plan.block)).ravel()
    cells = cells[cells < plan.n_cells]
    shuffled = numpy_generator(plan.seed, "window", epoch, number).permutation(cells)
    shuffled.flags.writeable = False
    return shuffled
