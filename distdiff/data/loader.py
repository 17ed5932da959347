"""From a plan and a store to batches of cells, read ahead in one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

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
    labels: tuple[str, ...] = (),
    ahead: int = 2,
) -> Iterator[tuple[int, Cells]]:
    """Yield ``(step, cells)`` of one process for ``start <= step < stop``; the whole state is the step.

    Parameters
    ----------
    index
        ``int64 [plan.n_cells]``, store row of each position of the plan (the training split).
    stop
        One past the last step; ``None``: endless.
    labels
        Covariates to read.
    ahead
        Batches held ready.

    Raises
    ------
    ValueError
        ``index`` and plan do not fit, or the batch cannot be shared; and whatever reading raises.
    """
    if len(index) != plan.n_cells:
        raise ValueError(f"the plan orders {plan.n_cells} cells, the index has {len(index)}")
    plan.rank_rows(start, rank, world)
    return _stream(store, plan, index, start, stop, rank, world, labels, ahead)


def _stream(
    store: CountStore, plan: Plan, index: np.ndarray, start: int, stop: int | None, rank: int, world: int,
    labels: tuple[str, ...], ahead: int,
) -> Iterator[tuple[int, Cells]]:  # fmt: skip
    ready: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        step = start
        try:
            while not closed.is_set() and (stop is None or step < stop):
                rows = index[plan.rank_rows(step, rank, world)]
                put((step, store.cells(rows, labels)))
                step += 1
            put(None)
        except BaseException as error:  # the consumer raises it
            put(error)

    thread = threading.Thread(target=read, name="distdiff-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
