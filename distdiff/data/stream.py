"""Batches made by dask workers: they read, decode, choose genes and cut; this process only unpacks.

For a store far from the GPUs, or when decoding should not cost the training host's cores. The plan is the same, so the
batches are, bit for bit. A worker that dies has its pieces made again by another.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from distdiff.data import coding
from distdiff.data.cluster import connect, explained
from distdiff.data.coding import Coded, Slots
from distdiff.data.plan import Order
from distdiff.data.store import CountStore
from distdiff.types import Cells, Condition

IN_FLIGHT = 512 << 20
"""Bytes of pieces that wait at the workers for one rank, at most (one piece always may)."""

PATIENCE = 60.0
"""Seconds without an answer after which to see whether any worker is left."""

Piece = tuple[Coded, dict[str, np.ndarray]]
"""Some cells, coded in the genes of the view, and their label codes."""


def stream(
    scheduler: str,
    store: CountStore,
    plan: Order,
    rows_of: Callable[[int], np.ndarray],
    steps: Iterable[int],
    *,
    labels: Sequence[str] | None,
    ahead: int,
) -> Generator[tuple[int, Cells], None, None]:
    """Batches of some steps through a dask cluster; see `distdiff.data.loader.loader`.

    Parameters
    ----------
    scheduler
        Its address; its workers must see the store under the same path or URL.
    rows_of
        Store rows of a step.
    ahead
        Pieces in flight; a piece is all steps within one stretch of the plan, so that its blocks are read once.

    Raises
    ------
    OSError
        No scheduler with workers answers there, it is lost, or all workers are.
    ValueError
        What reading raises.
    """
    from dask.distributed import TimeoutError as Late

    client = connect(scheduler)
    how = (store.url, store.manifest.fingerprint, store.genes if store.narrowed else None)
    pieces = _pieces(plan, rows_of, steps)
    waiting: deque[tuple[list[int], list[np.ndarray], Any]] = deque()
    size = 0

    def feed() -> None:
        while len(waiting) < (max(1, min(ahead, IN_FLIGHT // size)) if size else min(ahead, 2)):
            if (found := next(pieces, None)) is None:
                return
            numbers, rows = found
            waiting.append((numbers, rows, client.submit(make, how, np.concatenate(rows), labels, pure=False)))

    def answer(future: Any) -> Piece:
        while True:
            try:
                return future.result(timeout=PATIENCE)
            except (Late, TimeoutError):
                if not client.nthreads():
                    raise OSError(
                        f"no worker is left at {scheduler}; start some, or use another loader.reader"
                    ) from None

    def batches() -> Generator[tuple[int, Cells], None, None]:
        nonlocal size
        try:
            feed()
            while waiting:
                numbers, rows, future = waiting.popleft()
                with explained(scheduler):
                    coded, codes = answer(future)
                del future
                size = sum(a.nbytes for a in coded)
                feed()
                first = 0
                for step, some in zip(numbers, rows, strict=True):
                    yield step, _unpack(coded, codes, first, some, len(store.genes))
                    first += len(some)
        finally:
            waiting.clear()
            client.close()

    return batches()


def make(how: tuple[str, str, tuple[str, ...] | None], rows: np.ndarray, labels: Sequence[str] | None) -> Piece:
    """A worker's task: cells of a store, coded in the genes wanted, with their label codes."""
    store = _store(*how)
    counts = store.read(rows)
    return coding.encode(counts, store.manifest.dtype), store.labels(rows, labels)


def _unpack(coded: Coded, codes: dict[str, np.ndarray], first: int, rows: np.ndarray, n_genes: int) -> Cells:
    """Cells of one step out of a piece."""
    out = np.zeros((len(rows), n_genes), np.float32)
    slots = Slots(coded.gaps[None], coded.values[None], coded.starts[None])
    local = np.arange(first, first + len(rows))
    coding.add_dense(slots, np.zeros(len(rows), np.int64), local, np.arange(n_genes, dtype=np.int32), out)
    labels = {k: torch.from_numpy(v[first : first + len(rows)].copy()) for k, v in codes.items()}
    return Cells(torch.from_numpy(out), Condition(labels), torch.from_numpy(rows))


def _pieces(
    plan: Order, rows_of: Callable[[int], np.ndarray], steps: Iterable[int]
) -> Generator[tuple[list[int], list[np.ndarray]], None, None]:
    """Steps of one stretch of the plan together."""
    numbers: list[int] = []
    rows: list[np.ndarray] = []
    for step in steps:
        if numbers and plan.turn(step) != plan.turn(numbers[-1]):
            yield numbers, rows
            numbers, rows = [], []
        numbers.append(step)
        rows.append(rows_of(step))
    if numbers:
        yield numbers, rows


@functools.lru_cache(maxsize=4)
def _store(url: str, fingerprint: str, genes: tuple[str, ...] | None) -> CountStore:
    """One open store per worker process."""
    store = CountStore.open(url)
    if store.manifest.fingerprint != fingerprint:
        raise ValueError(
            f"{url} holds other data on this worker (fingerprint {store.manifest.fingerprint[:12]}, the training "
            f"process has {fingerprint[:12]}): give all machines the same store"
        )
    return store if genes is None else store.panel(genes)
