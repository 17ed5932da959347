"""Which training cell is read at which step: a pure function of (seed, step), without file, queue or rank.

An epoch reads every cell once: blocks of neighbouring cells are permuted, cut into windows of a few blocks, and the
cells of each window are permuted. Epochs follow each other without a gap, so a batch may contain cells of two windows
or two epochs. To resume, or to change the number of ranks, only the step is needed. `Mixed` does the same for each of
several strata, which it reads in given proportions.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distdiff.rng import numpy_generator

TURNS = 1 << 14
"""Length of the cycle of a `Mixed` plan: proportions are multiples of ``1 / TURNS``."""


class Order(ABC):
    """What a loader needs of a plan: ``batch`` cells a step, ``n_cells`` in all, ``window`` blocks shuffled together.

    Examples
    --------
    >>> from distdiff.data.feed.plan import Plan
    >>> plan = Plan(n_cells=100, batch=8)
    >>> halves = [plan.rank_rows(3, rank, world=2) for rank in (0, 1)]
    >>> bool((plan.rows(3) == [*halves[0], *halves[1]]).all())  # two ranks share the batch of one
    True
    """

    batch: int
    n_cells: int
    block: int
    window: int

    @abstractmethod
    def rows(self, step: int) -> np.ndarray:
        """The cells of a step.

        The choice of cells is random; within the step they are in ascending order, so that neighbours in the store are
        read by the same rank and each rank decodes few blocks.

        Returns
        -------
        int64 [batch]
            Positions ``0 .. n_cells - 1`` in the training set.

        Raises
        ------
        ValueError
            A negative step.
        """

    @property
    def steps_per_epoch(self) -> float:
        """Number of steps that read ``n_cells`` cells."""
        return self.n_cells / self.batch

    def rank_rows(self, step: int, rank: int, world: int) -> np.ndarray:
        """The contiguous slice of `rows` that one rank reads, ``int64 [batch / world]``.

        Raises
        ------
        ValueError
            The batch cannot be divided evenly (the message names the nearest numbers of ranks), or no such rank.
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

    def window_number(self, step: int) -> int:
        """Number of the window (``block * window`` cells) in which a step starts.

        Steps of one window read the same blocks, so a reader that takes them together reads each block once.
        """
        return step * self.batch // (self.block * self.window)


@dataclass(frozen=True)
class Plan(Order):
    """The reading order of a training set.

    Attributes
    ----------
    n_cells
        Training cells.
    batch
        Cells of a step, over all ranks.
    block, window
        Cells in a block and blocks in a window: ``block * window`` cells are shuffled together.
    seed
        Seed of the order.

    Raises
    ------
    ValueError
        A size below 1.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.feed.plan import Plan
    >>> plan = Plan(n_cells=100, batch=10, block=5, window=4)
    >>> epoch = np.concatenate([plan.rows(step) for step in range(10)])
    >>> bool((np.sort(epoch) == np.arange(100)).all())  # every cell once
    True
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

    def epoch(self, step: int) -> int:
        """Epoch of the first cell of a step."""
        return _start(step, self.batch) // self.n_cells

    def rows(self, step: int) -> np.ndarray:
        first = _start(step, self.batch)
        return np.sort(self.stretch(first, first + self.batch))

    def stretch(self, first: int, last: int) -> np.ndarray:
        """Cells number ``first`` to ``last`` (exclusive) of the reading order over all epochs, ``int64``."""
        at, parts = first, [np.empty(0, np.int64)]
        while at < last:
            epoch, offset = divmod(at, self.n_cells)
            start, cells = self._window_at(epoch, offset)
            part = cells[offset - start : offset - start + last - at]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts)

    def _window_at(self, epoch: int, offset: int) -> tuple[int, np.ndarray]:
        """Start (within its epoch) and cells, in reading order, of the window that covers ``offset``."""
        size = self.block * self.window
        missing = -self.n_cells % self.block  # cells by which the last block is short
        short = _short_block_window(self, epoch)
        number = offset // size
        if offset >= (number + 1) * size - (missing if short <= number else 0):
            number += 1
        return number * size - (missing if short < number else 0), _window(self, epoch, number)


class Mixed(Order):
    """Several strata in given proportions, each read like a `Plan` of its own: without replacement, epoch after epoch.

    The strata alternate in a fixed cycle. After any number of cells, the cells read of each stratum differ from its
    share by less than one; in a batch they differ by less than two.

    Parameters
    ----------
    strata
        For each stratum the positions of its cells in the training set, ``int64``; together every position once.
    weights
        Share of the cells read from each stratum; scaled to sum 1. None is equal shares.
    batch, block, window, seed
        As in `Plan`; the blocks of the window are divided among the strata.

    Raises
    ------
    ValueError
        An empty stratum, weights that are negative, not finite, all 0, or too many.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.feed.plan import Mixed
    >>> codes = np.repeat([0, 1], [90, 10])  # a common and a rare type
    >>> plan = Mixed.of(codes, ("T", "B"), weights=0.0, batch=10)
    >>> np.bincount(codes[plan.rows(0)])  # read alike
    array([5, 5])
    """

    def __init__(
        self, strata: Sequence[np.ndarray], weights: Sequence[float] | None = None, *, batch: int, block: int = 256,
        window: int = 64, seed: int = 0,
    ) -> None:  # fmt: skip
        if any(not len(s) for s in strata) or not strata:
            raise ValueError(f"strata of {[len(s) for s in strata]} cells: each needs at least 1")
        share = np.ones(len(strata)) if weights is None else np.asarray(weights, np.float64)
        if share.shape != (len(strata),) or not np.isfinite(share).all() or (share < 0).any() or not share.sum():
            raise ValueError(f"weights {share.tolist()} for {len(strata)} strata: one each, 0 or more, not all 0")
        self.strata = [np.asarray(s, np.int64) for s in strata]
        self.batch, self.block, self.window, self.seed = batch, block, window, seed
        self.n_cells = sum(map(len, self.strata))
        each = max(1, window // len(strata))
        self.plans = [Plan(len(s), batch, block, each, _seed(seed, i)) for i, s in enumerate(self.strata)]
        self._places = _cycle(share / share.sum())

    def rows(self, step: int) -> np.ndarray:
        first = _start(step, self.batch)
        parts = []
        for cells, plan, places in zip(self.strata, self.plans, self._places, strict=True):
            a, b = (n // TURNS * len(places) + int(np.searchsorted(places, n % TURNS)) for n in
                    (first, first + self.batch))  # fmt: skip
            parts.append(cells[plan.stretch(a, b)])
        return np.sort(np.concatenate(parts))

    @classmethod
    def of(
        cls, codes: np.ndarray, values: Sequence[str], weights: Mapping[str, float] | float, *, batch: int,
        block: int = 256, window: int = 64, seed: int = 0,
    ) -> Mixed:  # fmt: skip
        """Strata from label codes.

        Parameters
        ----------
        codes
            ``int64 [n_cells]``, label of each training cell; cells without a label (-1) form one stratum.
        values
            Name of each code.
        weights
            Share of each value, 1 if it is not named; or one power: a value with n cells has the weight n^power (1:
            proportions of the data, 0: equal).

        Raises
        ------
        ValueError
            A weight for a value that no cell has.
        """
        found, _, share = weighed(codes, values, weights)
        strata = [np.flatnonzero(codes == c) for c in found]
        return cls(strata, share, batch=batch, block=block, window=window, seed=seed)


def weighed(
    codes: np.ndarray, values: Sequence[str], weights: Mapping[str, float] | float
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Codes that are there, how many cells have each, and the weight of each; arguments and errors as of `Mixed.of`.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.feed.plan import weighed
    >>> weighed(np.repeat([0, 1], [90, 10]), ("T", "B"), {"B": 3.0})
    (array([0, 1]), array([90, 10]), [1.0, 3.0])
    """
    found, n = np.unique(codes, return_counts=True)
    names = {int(c): values[c] if c >= 0 else "" for c in found}
    if not isinstance(weights, Mapping):
        return found, n, [float(cells) ** weights for cells in n]
    if unknown := [w for w in weights if w not in names.values()]:
        raise ValueError(f"weights: no training cell has {unknown[0]!r}; known: {', '.join(names.values())}")
    return found, n, [float(weights.get(names[int(c)], 1.0)) for c in found]


def _cycle(share: np.ndarray) -> list[np.ndarray]:
    """Positions of each stratum in a cycle of length `TURNS`, ascending: as many as its share (largest remainders).

    Tijdeman's rule (The chairman assignment problem, 1980): among the strata that are far enough behind their share,
    the next position goes to the one that would first be a whole position behind; none ever is.
    """
    exact = share * TURNS
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: TURNS - int(quota.sum())]] += 1
    quota[(quota == 0) & (share > 0)] += 1  # every positive share gets a position, at the cost of the largest
    quota[np.argmax(quota)] -= int(quota.sum()) - TURNS
    present = np.flatnonzero(quota)
    rate = quota[present] / TURNS
    slack = 1 / max(1, 2 * len(present) - 2)
    lag, stratum = np.zeros(len(present)), np.empty(TURNS, np.int64)
    for position in range(TURNS):
        lag += rate
        deadline = np.where(lag >= slack - 1e-9, (1 - slack - lag) / rate, np.inf)
        first = int(np.argmin(deadline))
        stratum[position] = present[first]
        lag[first] -= 1
    return [np.flatnonzero(stratum == i) for i in range(len(quota))]


def _seed(seed: int, stratum: int) -> int:
    return int(numpy_generator(seed, "stratum", stratum).integers(2**62))


def _start(step: int, batch: int) -> int:
    if step < 0:
        raise ValueError(f"step {step}: 0 or more is wanted")
    return step * batch


@functools.lru_cache(maxsize=128)
def _blocks(plan: Plan, epoch: int) -> np.ndarray:
    """Order of the blocks in an epoch, ``int64 [n_blocks]``."""
    return numpy_generator(plan.seed, "blocks", epoch).permutation(-(-plan.n_cells // plan.block))


@functools.lru_cache(maxsize=128)
def _short_block_window(plan: Plan, epoch: int) -> int:
    """Number of the window that holds the last block, which may be short."""
    order = _blocks(plan, epoch)
    return int(np.argmax(order == len(order) - 1)) // plan.window


@functools.lru_cache(maxsize=128)
def _window(plan: Plan, epoch: int, number: int) -> np.ndarray:
    """Cells of one window in reading order, ``int64 [<= block * window]``."""
    blocks = _blocks(plan, epoch)[number * plan.window : (number + 1) * plan.window]
    cells = (blocks[:, None] * plan.block + np.arange(plan.block)).ravel()
    cells = cells[cells < plan.n_cells]
    shuffled = numpy_generator(plan.seed, "window", epoch, number).permutation(cells)
    shuffled.flags.writeable = False
    return shuffled
