"""Batches of a plan out of a store, read ahead by one thread; the whole state is the step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from distdiff.data.plan import Plan
from distdiff.data.store import CountStore
from distdiff.types import Cells


def loader(
    store: CountStore,
    plan: Plan,
    index: np.ndarray,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    labels: Sequence[str] | None = None,
    ahead: int = 2,
) -> Generator[tuple[int, Cells], None, None]:
    """One rank's batches from step ``start`` on.

    Resuming is calling it again with another ``start``; closing the iterator stops the thread.

    Parameters
    ----------
    store, plan
        Where the cells are, and when each is read.
    index
        ``int64 [plan.n_cells]``, store row of each position of the plan, for example ``store.rows("train")``.
    start, stop
        First step and one past the last (None is no end).
    rank, world
        Which slice of each global batch.
    labels
        Covariates wanted; None is all.
    ahead
        Batches read before they are asked for.

    Yields
    ------
    (int, Cells)
        The step, and ``plan.batch / world`` cells on the CPU.

    Raises
    ------
    ValueError
        Plan and index differ in size, the batch does not divide by ``world``, or whatever reading raises.
    """
    index = np.asarray(index)
    if plan.n_cells != len(index):
        raise ValueError(f"the plan orders {plan.n_cells} cells, the index has {len(index)}; build the plan from it")
    if ahead < 1:
        raise ValueError(f"ahead={ahead}: at least 1 batch must be read ahead")
    plan.rank_rows(start, rank, world)
    steps = itertools.count(start) if stop is None else range(start, stop)

    def read(step: int) -> Cells:
        return store.cells(index[plan.rank_rows(step, rank, world)], labels)

    def batches() -> Generator[tuple[int, Cells], None, None]:
        thread = ThreadPoolExecutor(1, thread_name_prefix="distdiff-loader")
        pending: deque[tuple[int, Future[Cells]]] = deque()
        try:
            for step in steps:
                pending.append((step, thread.submit(read, step)))
                if len(pending) > ahead:
                    done, batch = pending.popleft()
                    yield done, batch.result()
            for done, batch in pending:
                yield done, batch.result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

    return batches()
