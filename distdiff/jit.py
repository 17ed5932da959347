"""Loops compiled by numba, cached on disk if a folder can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

REORDERED = frozenset({"reassoc", "contract", "nsz"})
"""Freedoms of fast sums: their order, fused multiply-add, and the sign of zero; NaN and infinity stay as they are."""


def njit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a loop that runs without Python's lock, so that other threads run meanwhile.

    ``options`` are numba's, such as ``fastmath=set(REORDERED)`` for sums whose last digits may differ.

    The machine code is kept beside the source or in the user's cache folder (numba's rules; ``NUMBA_CACHE_DIR`` names
    another). In a read-only installation without a home folder it is compiled again by every process.

    Examples
    --------
    >>> from distdiff.jit import njit
    >>> def add(a, b):
    ...     return a + b
    >>> njit(add)(1, 2)
    3
    """
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # numba's "no locator available": no folder for the cache
        return numba.njit(nogil=True, **options)(function)
