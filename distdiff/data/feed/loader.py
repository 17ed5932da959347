"""Batches from a store in the order of a plan, read ahead by threads; the step is the whole state.

The plan alone decides which cells a batch holds, so every way of loading gives the same batches: from disk by threads
of this process, from memory of this process or of the GPU (`distdiff.data.feed.resident`), or through dask workers on
other machines (`distdiff.data.feed.stream`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Full, Queue
from typing import Literal, TypeVar

import numpy as np
import psutil
import torch

from distdiff.data.feed.plan import Mixed, Order, Plan, weighed
from distdiff.data.feed.resident import Resident, Uploader
from distdiff.data.store.pool import Lease
from distdiff.data.store.store import CountStore
from distdiff.types import Cells, Condition, Tensor

B = TypeVar("B")

BUNDLE = 4096
"""Cells whose blocks are looked up together."""

SHARE = 0.25
"""Share of the free memory that a resident copy may use."""


SCATTERED = 200_000
"""Cells of a store that may be read by label though they do not lie so: beyond, most blocks are read for few cells."""


STEEPEST = 10
"""Power of the number of cells by which strata are weighed, at most."""

MOST = 10**9
"""MiB, blocks or batches of a setting, at most: a larger number is a slip of the pen."""


@dataclass(frozen=True)
class Loading:
    """Settings of reading training cells.

    Parameters
    ----------
    reader
        ``direct``, ``tensorstore``, ``zarr``; ``auto`` is ``direct`` for a local store, else ``tensorstore``. With
        ``dask``, workers read and decode cells and make the batches.
    scheduler
        For ``dask``: address of the scheduler, tcp://...
    cache_mb
        Memory for coded blocks, MiB.
    resident
        ``yes`` keeps the coded counts of the training genes in memory (of the GPU, if there is one); ``auto`` does so
        if they need less than a quarter of the free memory; ``no`` never.
    window
        Blocks (of 256 cells) that are shuffled together; the larger the atlas, the larger it should be.
    ahead
        Batches to prepare in advance; for ``dask``, requests in flight.
    strata
        Label whose values are read in given proportions; fastest on a store that was built with this ``--strata``.
        ``auto``: the first label that the model is conditioned on, if the store was built so or has at most 200,000
        cells; empty: none.
    weights
        A power of the number of cells of a value (1: proportions of the data, 0: equal), or a weight for each value.
        ``auto``: 0.5, at which rare labels are learned; 1 without strata.
    natural
        Whether imputation is learned in the proportions of the data all the same: the losses of cells with evidence are
        weighed by share in the data / share of the cells read. ``auto``: where ``weights`` is ``auto``, and the model
        has the label of the strata.

    Raises
    ------
    ValueError
        A size below 1, ``dask`` without a scheduler, or a scheduler without ``dask``.

    Examples
    --------
    >>> from distdiff.data.feed.loader import Loading
    >>> loading = Loading(window=8, strata="cell_type", weights=0.0)  # as many cells of every type
    >>> store = loading.open("atlas.zarr")
    >>> loading.plan(store, store.rows("train"), batch=64, seed=0).rows(0).shape
    (64,)
    """

    reader: Literal["auto", "direct", "tensorstore", "zarr", "dask"] = "auto"
    scheduler: str = ""
    cache_mb: int = 512
    resident: Literal["auto", "yes", "no"] = "auto"
    window: int = 64
    ahead: int = 2
    strata: str = "auto"
    weights: float | dict[str, float] | Literal["auto"] = "auto"
    natural: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("cache_mb", "window", "ahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"loader.{name} must be at least 1, got {getattr(self, name)}")
        given = 1.0 if self.weights == "auto" else self.weights
        weights = given.values() if isinstance(given, dict) else [given]
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"loader.weights must be finite, got {self.weights}")
        if isinstance(self.weights, dict) and any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"loader.weights must not be negative, got {self.weights}")
        if not isinstance(given, dict) and abs(given) > STEEPEST:
            raise ValueError(f"loader.weights, as a power, must lie in [-{STEEPEST}, {STEEPEST}], got {self.weights}")
        if max(self.cache_mb, self.window, self.ahead) > MOST:
            raise ValueError(
                f"loader.cache_mb, window and ahead must be at most {MOST:,}, got {self.cache_mb}, {self.window} and "
                f"{self.ahead}"
            )
        if (self.reader == "dask") != bool(self.scheduler):
            raise ValueError(
                f"loader.reader={self.reader!r} with loader.scheduler={self.scheduler!r}: reader 'dask' wants the "
                "address of a scheduler (tcp://...), and no other reader has one"
            )

    def open(self, path: str | Path) -> CountStore:
        """Open the store at ``path`` with these settings."""
        reader = "auto" if self.reader == "dask" else self.reader
        return CountStore.open(path, cache_bytes=self.cache_mb << 20, reader=reader)

    def plan(self, store: CountStore, index: np.ndarray, batch: int, seed: int) -> Order:
        """The order in which cells ``index`` of a store are read.

        Raises
        ------
        ValueError
            ``strata`` is no label of the store, or ``weights`` do not fit it.
        """
        settled = self.settled(store)
        if not (strata := settled.strata):
            return Plan(len(index), batch, block=store.manifest.block, window=self.window, seed=seed)
        codes, weights = store.labels(index, [strata])[strata], settled.weights
        return Mixed.of(codes, store.manifest.labels[strata], weights, batch=batch,  # type: ignore[arg-type]
                        block=store.manifest.block, window=self.window, seed=seed)  # fmt: skip

    def settled(self, store: CountStore, labels: Sequence[str] = ()) -> Loading:
        """The same with ``auto`` of ``strata`` and ``weights`` decided, for a model with these labels.

        Examples
        --------
        >>> from distdiff.data.feed.loader import Loading
        >>> from distdiff.data.store.store import CountStore
        >>> found = Loading().settled(CountStore.open("atlas.zarr"), ["cell_type"])
        >>> found.strata, found.weights
        ('cell_type', 0.5)
        """
        strata, weights = self.strata, self.weights
        if strata == "auto":
            near = store.n_cells <= SCATTERED or (bool(labels) and store.manifest.order.strata == labels[0])
            strata = labels[0] if labels and near else ""
        natural = (weights == "auto" and strata in labels) if self.natural == "auto" else self.natural
        weights = (0.5 if strata else 1.0) if weights == "auto" else weights
        return replace(self, strata=strata, weights=weights, natural=natural)

    def shares(self, store: CountStore, index: np.ndarray, labels: Sequence[str]) -> tuple[str, Tensor] | None:
        """The label of the strata, and share in the data / share of the cells read of each of its codes.

        Returns
        -------
        tuple or None
            ``float32 [values + 1]``, of cells without a value last; ``None`` where ``natural`` is off.

        Raises
        ------
        ValueError
            ``natural`` is asked for, and the model has no such label.

        Examples
        --------
        >>> from distdiff.data.feed.loader import Loading
        >>> from distdiff.data.store.store import CountStore
        >>> store = CountStore.open("atlas.zarr")
        >>> label, shares = Loading().shares(store, store.rows("train"), ["cell_type"])
        >>> label, len(shares)  # two types, and cells without one
        ('cell_type', 3)
        """
        settled = self.settled(store, labels)
        if not settled.natural or not settled.strata:
            return None
        if settled.strata not in labels:
            raise ValueError(
                f"loader.natural=true needs loader.strata={settled.strata!r} among the model's labels ({list(labels)})"
            )
        codes, values = store.labels(index, [settled.strata])[settled.strata], store.manifest.labels[settled.strata]
        present, n, weights = weighed(codes, values, settled.weights)  # type: ignore[arg-type]
        read = np.asarray(weights) / sum(weights)
        found = np.ones(len(values) + 1, np.float32)
        found[present] = np.where(read > 0, n / len(index) / np.where(read > 0, read, 1), 1)
        return settled.strata, torch.from_numpy(found)

    def keep(self, store: CountStore, device: torch.device, ranks: int = 1) -> tuple[CountStore, Resident | None, str]:
        """Keep the store in memory if ``resident`` says so and it fits.

        Parameters
        ----------
        store
            The store, restricted to the genes of the model.
        device
            Device of the batches.
        ranks
            Processes on this machine that share its memory.

        Returns
        -------
        (CountStore, Resident or None, str)
            The store to read from, its copy on the GPU, and a message for the log.
        """
        need = store.coded_bytes
        if self.resident == "no" or self.reader == "dask":
            return store, None, ""
        free = _free_on(device) if device.type == "cuda" else psutil.virtual_memory().available // ranks
        if self.resident == "auto" and need > SHARE * free:
            return store, None, f"streaming: {_mib(need)} of coded counts, {_mib(free)} free"
        if device.type == "cuda":
            return store, Resident.load(store, device), f"resident: {_mib(need)} of coded counts on {device}"
        if store.slots < store.manifest.n_blocks:
            whole = CountStore.open(store.url, cache_bytes=store.cache_for_all, reader=self.reader)
            store = whole.panel(store.genes) if store.genes != whole.genes else whole
        return store, None, f"resident: {_mib(need)} of coded counts stay in memory"


@dataclass(eq=False)
class _Bundle:
    """Consecutive steps whose blocks are kept in memory together."""

    steps: list[int]
    rows: list[np.ndarray]
    leases: list[Lease] | None = None
    steps_left: int = 0
    blocks: set[int] = field(default_factory=set)


def loader(
    store: CountStore,
    plan: Order,
    index: np.ndarray,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world: int = 1,
    labels: Sequence[str] | None = None,
    ahead: int = 2,
    device: torch.device | None = None,
    resident: Resident | None = None,
    scheduler: str = "",
) -> Generator[tuple[int, Cells], None, None]:
    """One rank's batches from step ``start`` on.

    To resume, call it with another ``start``. Closing the iterator stops its threads.

    Parameters
    ----------
    store, plan
        Source of the cells, and the order in which they are read.
    index
        ``int64 [plan.n_cells]``, store row of each position of the plan, for example ``store.rows("train")``.
    start, stop
        First step and one past the last (None is no end).
    rank, world
        This process and the number of processes: which slice of each global batch to read.
    labels
        Covariates to return; None is all.
    ahead
        Batches to prepare in advance (for dask: requests in flight).
    device
        Device of the batches; a GPU receives coded counts through pinned memory and decodes them on a stream of its
        own.
    resident
        Copy in memory to take batches from, instead of reading.
    scheduler
        Address of a dask scheduler whose workers read the cells.

    Yields
    ------
    (int, Cells)
        The step, and ``plan.batch / world`` cells.

    Raises
    ------
    ValueError
        Plan and index differ in size, the batch cannot be divided by ``world``, or an error of reading.

    Examples
    --------
    >>> from distdiff.data.feed.loader import loader
    >>> from distdiff.data.feed.plan import Plan
    >>> from distdiff.data.store.store import CountStore
    >>> store = CountStore.open("atlas.zarr")
    >>> train = store.rows("train")
    >>> for step, cells in loader(store, Plan(len(train), batch=32), train, start=5, stop=7):
    ...     print(step, tuple(cells.counts.shape))
    5 (32, 30)
    6 (32, 30)
    """
    index = np.asarray(index)
    if plan.n_cells != len(index):
        raise ValueError(f"the plan orders {plan.n_cells} cells, the index has {len(index)}; build the plan from it")
    if ahead < 1:
        raise ValueError(f"ahead={ahead}: at least 1 batch must be read ahead")
    plan.rank_rows(start, rank, world)
    steps = itertools.count(start) if stop is None else range(start, stop)

    def rows_of(step: int) -> np.ndarray:
        return index[plan.rank_rows(step, rank, world)]

    if resident is not None:
        return ((step, resident.cells(rows_of(step), labels)) for step in steps)
    if scheduler:
        from distdiff.data.feed.stream import stream

        return stream(scheduler, store, plan, rows_of, steps, labels=labels, ahead=ahead)
    uploader = Uploader(store, device, ahead + 2) if device is not None and device.type == "cuda" else None

    def cells(rows: np.ndarray, leases: list[Lease] | None) -> Cells:
        if leases is None:
            found = store.cells(rows, labels)
            if device is None:
                return found
            return Cells(found.counts.to(device), found.labels.to(device), found.rows)
        if uploader is not None:
            return uploader.cells(rows, leases, labels)
        codes = {k: torch.from_numpy(v) for k, v in store.labels(rows, labels).items()}
        return Cells(torch.from_numpy(store.dense_of(rows, leases)), Condition(codes), torch.from_numpy(rows))

    return batches(store, plan, ((step, rows_of(step)) for step in steps), cells, ahead)


def batches(
    store: CountStore, plan: Order, feed: Iterator[tuple[int, np.ndarray]],
    make: Callable[[np.ndarray, list[Lease] | None], B], ahead: int = 2,
) -> Generator[tuple[int, B], None, None]:  # fmt: skip
    """Batches of any form: one thread makes them from blocks that the store's threads read in advance.

    Parameters
    ----------
    store, plan
        As of `loader`.
    feed
        Steps and the store rows of each.
    make
        Function from store rows and leases on their blocks to a batch; the leases are None where memory had no room.
    ahead
        Batches to prepare in advance.

    Examples
    --------
    >>> from distdiff.data.feed.loader import batches
    >>> from distdiff.data.feed.plan import Plan
    >>> from distdiff.data.store.store import CountStore
    >>> store = CountStore.open("atlas.zarr")
    >>> train = store.rows("train")
    >>> plan = Plan(len(train), batch=32)
    >>> feed = ((step, train[plan.rows(step)]) for step in range(2))
    >>> [(step, counts.shape) for step, counts in batches(store, plan, feed, lambda rows, leases: store.read(rows))]
    [(0, (32, 30)), (1, (32, 30))]
    """
    done: Queue[tuple[int, B] | BaseException | None] = Queue(ahead)
    closed = threading.Event()

    def put(what: tuple[int, B] | BaseException | None) -> None:
        while not closed.is_set():
            with contextlib.suppress(Full):
                done.put(what, timeout=0.1)
                return

    def produce() -> None:
        scout = _Scout(store, feed, 3 * plan.window + 2)
        try:
            for step, rows, bundle in scout:
                put((step, make(rows, bundle.leases)))
                bundle.steps_left -= 1
                if not bundle.steps_left:
                    scout.release(bundle)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where the batch is awaited
            put(error)
        finally:
            scout.close()

    thread = threading.Thread(target=produce, name="distdiff-loader", daemon=True)
    thread.start()
    try:
        while (found := done.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        closed.set()
        thread.join()


class _Scout:
    """Reads, in advance, the blocks that the next steps need, as far as memory has room."""

    def __init__(self, store: CountStore, feed: Iterator[tuple[int, np.ndarray]], room: int) -> None:
        self.store, self.feed = store, feed
        self.room = min(room, store.slots)
        self.far = max(2, room * store.manifest.block // BUNDLE)
        self.coming: deque[_Bundle] = deque()
        self.held: list[_Bundle] = []
        self.next: _Bundle | None = None

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, _Bundle]]:
        while True:
            self._look()
            if not self.coming:
                return
            bundle = self.coming.popleft()
            for step, rows in zip(bundle.steps, bundle.rows, strict=True):
                yield step, rows, bundle

    def _look(self) -> None:
        """Lease blocks for one bundle after the other until memory is full; the next bundle is added in any case."""
        while len(self.coming) < self.far:
            bundle = self.next or self._bundle()
            self.next = bundle
            if bundle is None:
                return
            live = set().union(*(b.blocks for b in list(self.held)))
            # counts that float32 cannot hold take the path that checks them
            fits = len(live | bundle.blocks) <= self.room and self.store.exact
            bundle.leases = self.store.lease(np.concatenate(bundle.rows)) if fits else None
            if bundle.leases is None and (self.coming or (fits and self.held)):
                return
            self.coming.append(bundle)
            if bundle.leases is not None:
                self.held.append(bundle)
            self.next = None
            if bundle.leases is None:
                return

    def _bundle(self) -> _Bundle | None:
        steps, rows, n = [], [], 0
        while n < BUNDLE:
            if (found := next(self.feed, None)) is None:
                break
            steps.append(found[0])
            rows.append(found[1])
            n += max(1, len(found[1]))
        if not steps:
            return None
        blocks = set((np.unique(np.concatenate(rows) // self.store.manifest.block)).tolist())
        return _Bundle(steps, rows, None, len(steps), blocks)

    def release(self, bundle: _Bundle) -> None:
        """Release the blocks of a bundle."""
        if bundle in self.held:
            self.held.remove(bundle)
        for lease in bundle.leases or ():
            lease.release()
        bundle.leases = None

    def close(self) -> None:
        """Release all blocks."""
        for bundle in list(self.held):
            self.release(bundle)


def memory_allowed(device: torch.device) -> float:
    """Share of a GPU's memory that this process may use (``torch.cuda.set_per_process_memory_fraction``)."""
    read_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.8 and newer
    return 1.0 if read_fraction is None else float(read_fraction(numbered(device)))


def numbered(device: torch.device) -> torch.device:
    """The GPU with its number: a plain ``cuda`` is the current one, and some functions of torch refuse it."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _free_on(device: torch.device) -> int:
    """Bytes of a GPU that this process may still allocate."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free, int(memory_allowed(device) * total) - torch.cuda.memory_allocated(device))


def _mib(n: float) -> str:
    return f"{n / 2**20:,.0f} MiB"
