"""Coded blocks in memory: each is read once into a slot and shared by all threads that need it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from distdiff.data.store.coding import Slots

TASK = 8
"""Blocks that one decoding task reads."""


class Lease:
    """Blocks that stay in memory until they are released.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.store.store import CountStore
    >>> store = CountStore.open("atlas.zarr")
    >>> (lease,) = store.lease(np.array([0, 1]))
    >>> with lease:
    ...     print(lease.slots().shape)  # one block, in memory until it is released
    (1,)
    """

    def __init__(self, pool: Pool, blocks: np.ndarray) -> None:
        self.pool, self.blocks = pool, blocks
        self._slots: np.ndarray | None = None

    def slots(self) -> np.ndarray:
        """Slots of the ``blocks``, ``int64``; waits until all are read.

        Raises
        ------
        ValueError, OSError
            An error of reading one of them.
        """
        if self._slots is None:
            self._slots = self.pool._wait(self.blocks)
        return self._slots

    def release(self) -> None:
        """Release the blocks; they stay in memory until their slot is needed."""
        self.pool._release(self.blocks)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _Held:
    """A block in a slot: the future of its reading, and the number of leases on it."""

    __slots__ = ("future", "holders", "slot")

    def __init__(self, slot: int) -> None:
        self.slot, self.holders = slot, 1
        self.future: Future[None] | None = None


class Pool:
    """A fixed number of slots for the blocks of one column group; the block unused for longest is replaced first.

    Parameters
    ----------
    slots
        The memory.
    read
        Function ``(blocks, slots, memory=None)`` that reads and checks blocks into slots of the pool, or of ``memory``.
    threads
        Threads for reading and decompressing.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.store.store import CountStore
    >>> pool = CountStore.open("atlas.zarr").columns[0].pool
    >>> memory, slots = pool.borrow(np.array([0]))
    >>> slots, memory.gaps.dtype
    (array([0]), dtype('uint8'))
    """

    def __init__(self, slots: Slots, read: Callable[..., None], threads: ThreadPoolExecutor) -> None:
        self.memory, self._read, self._threads = slots, read, threads
        self._held: dict[int, _Held] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # blocks without a lease, oldest first
        self._free = list(range(len(slots.gaps)))[::-1]
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Number of slots."""
        return len(self.memory.gaps)

    def lease(self, blocks: np.ndarray) -> Lease | None:
        """Lease some blocks and start to read those that are not in memory; None if there is no room for them.

        Parameters
        ----------
        blocks
            ``int64``, each block once.
        """
        numbers = blocks.tolist()
        with self._lock:
            known = [n for n in numbers if n in self._held]
            missing = [n for n in numbers if n not in self._held]
            reusable = len(self._idle) - sum(n in self._idle for n in known)
            if len(missing) > len(self._free) + reusable:
                return None
            for n in known:
                self._held[n].holders += 1
                self._idle.pop(n, None)
            for n in missing:
                if not self._free:
                    old, _ = self._idle.popitem(last=False)
                    self._free.append(self._held.pop(old).slot)
                self._held[n] = _Held(self._free.pop())
            for at in range(0, len(missing), TASK):
                part = missing[at : at + TASK]
                future = self._threads.submit(self._read, part, [self._held[n].slot for n in part])
                for n in part:
                    self._held[n].future = future
        return Lease(self, blocks)

    def borrow(self, blocks: np.ndarray) -> tuple[Slots, np.ndarray]:
        """Read blocks into memory of their own, when the pool has no room: that memory, and the slot of each block."""
        memory = Slots.empty(len(blocks), self.memory.gaps.shape[1], self.memory.starts.shape[1] - 1,
                             str(self.memory.values.dtype))  # fmt: skip
        slots = np.arange(len(blocks))
        self._read(blocks.tolist(), slots.tolist(), memory)
        return memory, slots

    def _wait(self, blocks: np.ndarray) -> np.ndarray:
        with self._lock:
            held = [self._held[n] for n in blocks.tolist()]
        for one in held:
            if one.future is not None:
                one.future.result()
        return np.array([one.slot for one in held], np.int64)

    def _release(self, blocks: np.ndarray) -> None:
        with self._lock:
            for n in blocks.tolist():
                one = self._held[n]
                one.holders -= 1
                if one.holders:
                    continue
                future = one.future
                if future is not None and (not future.done() or future.exception() is not None):
                    self._forget(n, future)
                else:
                    one.future = None
                    self._idle[n] = None

    def _forget(self, block: int, future: Future[None]) -> None:
        """Drop a block that failed to be read or that no lease awaits; its slot is free once the task has ended."""
        slot = self._held.pop(block).slot
        if future.done():
            self._free.append(slot)
        else:
            future.add_done_callback(lambda _: self._free.append(slot))


def cores() -> int:
    """Cores that this process may use.

    Examples
    --------
    >>> from distdiff.data.store.pool import cores
    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
