"""A dask cluster that somebody else has started."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dask.distributed import Client

CONNECT = 30
"""Seconds in which a scheduler must answer."""


def connect(scheduler: str, *, direct_to_workers: bool = False) -> Client:
    """A client of the dask scheduler at an address, once it has a worker.

    Parameters
    ----------
    direct_to_workers
        Fetch results from the workers themselves where they can be reached, and not through the scheduler.

    Raises
    ------
    OSError
        No scheduler with workers answers there.
    """
    from dask.distributed import Client

    try:
        client = Client(scheduler, timeout=CONNECT, set_as_default=False, direct_to_workers=direct_to_workers)
        client.wait_for_workers(1, timeout=2 * CONNECT)
    except (OSError, TimeoutError) as error:
        raise OSError(f"no dask scheduler with workers answers at {scheduler} ({error}); start one first") from error
    return client
