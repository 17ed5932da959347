"""Reuse of the memory of large arrays.

The system provides a large array page by page when it is first written, which takes longer than decoding cells into
it. So the memory of an array from `empty` is kept for the next one, once the last view of it is deleted (torch tensors
included).
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

SMALL = 1 << 18
"""Arrays of fewer bytes are allocated as usual: the system reuses their memory itself."""

KEEP = 512 << 20
"""Most bytes that are kept for reuse."""


class _Shelf:
    """Memory for reuse, by size (a power of two)."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._kept = 0
        self._lock = threading.RLock()  # a __del__ may run inside of take

    def take(self, size: int) -> np.ndarray:
        with self._lock:
            if free := self._free.get(size):
                self._kept -= size
                return free.pop()
        return np.empty(size, np.uint8)

    def put(self, memory: np.ndarray) -> None:
        with self._lock:
            if self._kept + len(memory) <= KEEP:
                self._kept += len(memory)
                self._free.setdefault(len(memory), []).append(memory)


_shelf = _Shelf()


class _Lent:
    """Owner of an array's memory; numpy keeps it alive as long as any view exists."""

    def __init__(self, memory: np.ndarray, shelf: _Shelf) -> None:
        self._memory, self._shelf = memory, shelf
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._shelf.put(self._memory)


def empty(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array, as from `numpy.empty`, in reused memory if it is large.

    Examples
    --------
    >>> from distdiff.data.store.recycle import empty
    >>> batch = empty((256, 2000), "float32")
    >>> batch.shape, batch.dtype
    ((256, 2000), dtype('float32'))
    """
    shape = (shape,) if isinstance(shape, int) else shape
    n = math.prod(shape) * np.dtype(dtype).itemsize
    if n < SMALL:
        return np.empty(shape, dtype)
    memory = _shelf.take(1 << (n - 1).bit_length())
    return np.asarray(_Lent(memory, _shelf))[:n].view(dtype).reshape(shape)
