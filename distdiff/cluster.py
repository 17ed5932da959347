"""A dask cluster that somebody else has started."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from dask.distributed import Client

CONNECT = 30
"""Seconds in which a scheduler must answer."""

ALONE = 600
"""Seconds without any worker after which none is believed to come."""

REACH = 3
"""Seconds in which a worker must take a connection."""


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


class WorkerWatch:
    """Watches that a scheduler has workers: without any, what was asked of it waits for ever.

    Parameters
    ----------
    client
        Of the scheduler.
    notify
        Called with one sentence when the last worker has gone.
    """

    def __init__(self, client: Client, notify: Callable[[str], None]) -> None:
        self.client, self.notify = client, notify
        self._since: float | None = None

    def workers(self) -> set[str]:
        """Addresses of the workers.

        Raises
        ------
        OSError
            There has been none for ten minutes of looks.
        """
        here, now = set(self.client.scheduler_info(n_workers=-1)["workers"]), time.monotonic()
        if here:
            self._since = None
        elif self._since is None:
            self._since = now
            self.notify(f"no worker is left; waiting {ALONE} s for one")
        elif now - self._since > ALONE:
            raise OSError(
                f"no worker is left at {self.client.scheduler.address}, and none came for {ALONE} s: start some; the "
                "same command goes on with what is done"
            )
        return here


@contextlib.contextmanager
def explained(scheduler: str) -> Iterator[None]:
    """Say in one sentence that a scheduler is gone, for as long as it is asked.

    Raises
    ------
    OSError
        The connection to it was lost.

    Examples
    --------
    >>> from distdiff.cluster import explained
    >>> with explained("tcp://10.0.0.1:8786"):
    ...     raise OSError("Timed out trying to connect")
    Traceback (most recent call last):
        ...
    OSError: the dask scheduler at tcp://10.0.0.1:8786 is lost; once one is back there, with ...
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


def within_reach(workers: Iterable[str]) -> bool:
    """Whether some workers can be spoken to from here (``tcp://HOST:PORT``), not only through their scheduler.

    Examples
    --------
    >>> from distdiff.cluster import within_reach
    >>> within_reach(["tcp://127.0.0.1:9"])  # nothing listens there
    False
    """
    for address in workers:
        parts = urlsplit(address)
        try:
            socket.create_connection((parts.hostname or "", parts.port or 0), timeout=REACH).close()
        except OSError:
            return False
    return True
