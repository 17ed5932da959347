"""Connections to a dask cluster that is already running."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from distdiff.waits import print_line, waiting

if TYPE_CHECKING:
    from dask.distributed import Client

CONNECT = 30
"""Seconds in which a scheduler must answer."""

ALONE = 600
"""Seconds without any worker after which waiting ends."""

REACH = 3
"""Seconds in which a worker must accept a connection."""


def connect(scheduler: str, notify: Callable[[str], None] = print_line) -> Client:
    """Connect to the dask scheduler at an address, and wait until it has a worker; ``notify`` is told of a long wait.

    Raises
    ------
    OSError
        No scheduler with workers answers at this address.
    """
    from dask.distributed import Client

    try:
        with waiting(f"waits for a dask scheduler with workers at {scheduler}, {3 * CONNECT} s at most", to=notify):
            client = Client(scheduler, timeout=CONNECT, set_as_default=False)
            client.wait_for_workers(1, timeout=2 * CONNECT)
    except (OSError, TimeoutError) as error:
        raise OSError(f"no dask scheduler with workers answers at {scheduler} ({error}); start one first") from error
    return client


class WorkerWatch:
    """Watches whether a scheduler has workers; without any, its tasks would wait for ever.

    Parameters
    ----------
    client
        Client of the scheduler.
    notify
        Called with one sentence when the last worker has gone.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from distdiff.cluster import WorkerWatch
    >>> client = SimpleNamespace(scheduler_info=lambda n_workers: {"workers": {}})  # a scheduler without workers
    >>> WorkerWatch(client, notify=print).workers()
    no worker is left; waiting 600 s for one
    set()
    """

    def __init__(self, client: Client, notify: Callable[[str], None]) -> None:
        self.client, self.notify = client, notify
        self._since: float | None = None

    def workers(self) -> set[str]:
        """Addresses of the workers.

        Raises
        ------
        OSError
            There has been no worker for ten minutes.
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
    """Turn dask's errors of a lost connection into one sentence.

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
    except (CancelledError, OSError) as error:  # dask cancels the tasks of a scheduler that closes the connection
        silent = str(error).startswith("Timed out trying to connect")
        if not (silent or isinstance(error, CancelledError | CommClosedError)):
            raise  # an error of a worker, about a file
        raise OSError(
            f"the dask scheduler at {scheduler} is lost; once one is back there, with workers, the same command goes on"
        ) from error


def within_reach(workers: Iterable[str]) -> bool:
    """Whether this host can connect to workers (``tcp://HOST:PORT``) directly, not only through their scheduler.

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
