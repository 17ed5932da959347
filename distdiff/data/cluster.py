"""A dask cluster that somebody else has started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dask.distributed import Client

CONNECT = 30
"""Seconds in which a scheduler must answer."""


def connect(scheduler: str) -> Client:
    """A client of the dask scheduler at an address, once it has a worker.

    Raises
    ------
    OSError
        No scheduler with workers answers there.
    """
    from dask.distributed import Client

    try:
        client = Client(scheduler, timeout=CONNECT, set_as_default=False)
        client.wait_for_workers(1, timeout=2 * CONNECT)
    except (OSError, TimeoutError) as error:
        raise OSError(f"no dask scheduler with workers answers at {scheduler} ({error}); start one first") from error
    return client


@contextlib.contextmanager
def explained(scheduler: str) -> Iterator[None]:
    """Say in one sentence that a scheduler is gone, for as long as it is asked.

    Raises
    ------
    OSError
        The connection to it was lost.
    """
    from distributed.comm import CommClosedError

    try:
        yield
    except (CancelledError, OSError) as error:  # dask cancels what was asked of a scheduler that hangs up
        silent = str(error).startswith("Timed out trying to connect")
        if not (silent or isinstance(error, CancelledError | CommClosedError)):
            raise  # a worker's own, of a file
        raise OSError(
            f"the dask scheduler at {scheduler} is lost; once one is back there, with workers, the same command goes on"
        ) from error
