"""Batches from dask workers: they read cells and choose genes; this process only decodes.

For a store far from the GPUs, or to keep the cores of the training host free. The plan is the same, so the batches are
the same, bit for bit. If a worker dies, another one repeats its work.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from distdiff.cluster import connect, explained, within_reach
from distdiff.data.counts import check_exact
from distdiff.data.feed.plan import Order
from distdiff.data.store import coding, recycle
from distdiff.data.store.coding import Coded, Slots
from distdiff.data.store.store import CountStore
from distdiff.types import Cells, Condition

IN_FLIGHT = 512 << 20
"""Most bytes of finished pieces that wait at the workers for one rank (one piece is always allowed)."""

PATIENCE = 60.0
"""Seconds without a result after which to check that the scheduler still has a worker."""

Piece = tuple[list[Coded], bool, dict[str, np.ndarray]]
"""Coded cells (one part for each column group, or one part in the genes of the view); whether they are coded as in the
store; their label codes."""


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
    """Batches of some steps through a dask cluster; see `distdiff.data.feed.loader.loader`.

    Parameters
    ----------
    scheduler
        Address of the scheduler; its workers must be able to open the store at the same path or URL.
    rows_of
        Store rows of a step.
    ahead
        Pieces in flight; a piece holds all steps of one window of the plan, so that its blocks are read once.

    Raises
    ------
    OSError
        No scheduler with workers answers at this address, or the connection to it or all workers are lost.
    ValueError
        An error of reading, on a worker.
    """
    from dask.distributed import TimeoutError as Late

    client = connect(scheduler)
    client.direct_to_workers = within_reach(
        list(client.nthreads())[:1]
    )  # otherwise results travel through the scheduler
    columns = gene_columns(store)
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
                    coded, as_stored, codes = answer(future)
                del future
                size = sum(a.nbytes for part in coded for a in part)
                feed()
                first = 0
                for step, some in zip(numbers, rows, strict=True):
                    yield step, _unpack(coded, columns[as_stored], codes, first, some)
                    first += len(some)
        finally:
            waiting.clear()
            client.close()

    return batches()


def make(how: tuple[str, str, tuple[str, ...] | None], rows: np.ndarray, labels: Sequence[str] | None) -> Piece:
    """The task of a worker: coded cells of a store with their label codes.

    Where the view has all genes of its column groups, cells are cut out of their blocks without decoding.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.feed.stream import make
    >>> from distdiff.data.store.store import CountStore
    >>> store = CountStore.open("atlas.zarr")
    >>> coded, as_stored, codes = make((store.url, store.manifest.fingerprint, None), np.array([0, 1]), ["cell_type"])
    >>> len(coded), as_stored, codes["cell_type"].shape
    (1, True, (2,))
    """
    store = _store(*how)
    codes = store.labels(rows, labels)
    if store.exact and store.whole_groups and (leases := store.lease(rows)) is not None:
        try:
            return store.coded_of(rows, leases), True, codes
        finally:
            for lease in leases:
                lease.release()
    counts = store.read(rows)
    check_exact(counts)
    return [coding.encode(counts, store.manifest.dtype)], False, codes


def gene_columns(store: CountStore) -> dict[bool, list[np.ndarray]]:
    """Column of each gene in each part of a piece: coded as in the store (True), or in the genes of the view (False).

    Examples
    --------
    >>> from distdiff.data.feed.stream import gene_columns
    >>> from distdiff.data.store.store import CountStore
    >>> view = CountStore.open("atlas.zarr").panel(["gene2", "gene0"])
    >>> gene_columns(view)[True][0][:4]  # gene0 is the view's column 1; -1: not in the view
    array([ 1, -1,  0, -1], dtype=int32)
    """
    return {True: [c.column for c in store.columns], False: [np.arange(len(store.genes), dtype=np.int32)]}


def _unpack(
    coded: list[Coded], columns: list[np.ndarray], codes: dict[str, np.ndarray], first: int, rows: np.ndarray
) -> Cells:
    """Cells of one step from a piece; ``columns`` has the column of each gene in each part."""
    n_genes = sum(int((gene_column >= 0).sum()) for gene_column in columns)
    out = recycle.empty((len(rows), n_genes), np.float32)
    local, alone = np.arange(first, first + len(rows)), np.zeros(len(rows), np.int64)
    for part, (of, gene_column) in enumerate(zip(coded, columns, strict=True)):
        coding.add_dense(Slots(*(a[None] for a in of)), alone, local, gene_column, out, clear=part == 0)
    labels = {k: torch.from_numpy(v[first : first + len(rows)].copy()) for k, v in codes.items()}
    return Cells(torch.from_numpy(out), Condition(labels), torch.from_numpy(rows))


def _pieces(
    plan: Order, rows_of: Callable[[int], np.ndarray], steps: Iterable[int]
) -> Generator[tuple[list[int], list[np.ndarray]], None, None]:
    """Group steps by the window of the plan that they start in."""
    numbers: list[int] = []
    rows: list[np.ndarray] = []
    for step in steps:
        if numbers and plan.window_number(step) != plan.window_number(numbers[-1]):
            yield numbers, rows
            numbers, rows = [], []
        numbers.append(step)
        rows.append(rows_of(step))
    if numbers:
        yield numbers, rows


@functools.lru_cache(maxsize=4)
def _store(url: str, fingerprint: str, genes: tuple[str, ...] | None) -> CountStore:
    """The open store, cached in the worker process."""
    store = CountStore.open(url)
    if store.manifest.fingerprint != fingerprint:
        raise ValueError(
            f"{url} holds other data on this worker (fingerprint {store.manifest.fingerprint[:12]}, the training "
            f"process has {fingerprint[:12]}): give all machines the same store"
        )
    return store if genes is None else store.panel(genes)
