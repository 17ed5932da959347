"""Limits on MLflow's HTTP requests: bytes, seconds, and how long a request has been silent.

``MLFLOW_HTTP_REQUEST_TIMEOUT`` limits the wait for the next bytes of an answer, not the whole answer: a server that
sends one byte a second is never cut off, and an endless answer fills the memory. MLflow also waits as long as the
``Retry-After`` header of a 429 answer says. The adapter below limits all three.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter

MOST_BYTES = 64 << 20
"""Bytes of an answer that is held in memory, at most. Files are written to disk as they come and have no such limit."""

MOST_SECONDS = 30.0
"""Seconds that the body of an answer may take; that of a file may take longer while it comes at :data:`SLOWEST`."""

SLOWEST = 1024.0
"""Bytes a second that a file must arrive with, on average."""

LONGEST_PAUSE = 10.0
"""Most seconds before a request that a busy server refused is sent again."""

_silent_since: dict[int, float] = {}
_lock = threading.Lock()


def silent_seconds() -> float:
    """Return the seconds since the request that is longest without an answer was made, or last sent bytes.

    Zero where no request is under way.

    Examples
    --------
    >>> silent_seconds()
    0.0
    """
    with _lock:
        return max((time.monotonic() - since for since in _silent_since.values()), default=0.0)


class Upload:
    """The body of a request that is a file; reading from it shows that the request goes on."""

    def __init__(self, file: Any, on_read: Callable[[], None]) -> None:
        self._file, self._on_read = file, on_read

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes of the file."""
        self._on_read()
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Answer:
    """The body of a response, read with limits.

    It has no method ``stream``, so that ``requests`` reads it by :meth:`read`.
    """

    def __init__(self, raw: Any, *, in_memory: bool) -> None:
        self._raw, self._in_memory = raw, in_memory
        self._size, self._started = 0, time.monotonic()

    def read(self, size: int | None = None) -> bytes:
        """Return the next bytes, decoded; none at the end.

        Raises
        ------
        requests.ConnectionError
            The answer is longer than :data:`MOST_BYTES` or slower than :data:`MOST_SECONDS` and :data:`SLOWEST` allow.
        """
        data = self._raw.read1(size or 1 << 16, decode_content=True) or b""
        self._size += len(data)
        seconds = time.monotonic() - self._started
        slow = self._in_memory or self._size < SLOWEST * seconds
        if data and seconds > MOST_SECONDS and slow:
            self._refuse(f"sent {self._size:,} bytes in {seconds:.0f} seconds and has not ended")
        if self._in_memory and self._size > MOST_BYTES:
            self._refuse(f"has more than {MOST_BYTES:,} bytes")
        return data

    def _refuse(self, fault: str) -> None:
        self._raw.close()
        raise requests.ConnectionError(f"the answer {fault}; is an MLflow server at this address?")

    def __getattr__(self, name: str) -> Any:
        if name == "stream":
            raise AttributeError(name)
        return getattr(self._raw, name)


class LimitedAdapter(HTTPAdapter):
    """Sends requests as another adapter does, limits their answers, and repeats a request that a busy server refused.

    urllib3 repeats such a request too (MLFLOW_HTTP_REQUEST_MAX_RETRIES), but first reads the whole answer and waits as
    long as the answer says.
    """

    def __init__(self, adapter: HTTPAdapter) -> None:
        super().__init__()
        retries = adapter.max_retries
        self._busy = frozenset(retries.status_forcelist or ())
        self._pauses = [min(retries.backoff_factor * 2**i, LONGEST_PAUSE) for i in range(int(retries.total or 0))]
        self._adapter = adapter
        adapter.max_retries = retries.new(status_forcelist=(), respect_retry_after_header=False)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:  # type: ignore[override]
        """Send a request and read its answer; ``stream=True``: the caller reads it."""
        key = id(request)

        def show_activity() -> None:
            with _lock:
                _silent_since[key] = time.monotonic()

        pauses = self._pauses
        if hasattr(request.body, "read"):
            request.body, pauses = Upload(request.body, show_activity), []  # type: ignore[assignment]
        show_activity()
        try:
            response = self._send_once(request, *args, **kwargs)
            for pause in pauses:
                if response.status_code not in self._busy:
                    break
                response.close()
                time.sleep(pause)
                response = self._send_once(request, *args, **kwargs)
            return response
        finally:
            with _lock:
                _silent_since.pop(key, None)

    def _send_once(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        response = self._adapter.send(request, *args, **kwargs)
        response.raw = Answer(response.raw, in_memory=not kwargs.get("stream"))
        if not kwargs.get("stream"):
            _ = response.content  # requests keeps it
        return response

    def close(self) -> None:
        """Close the connections of the other adapter."""
        self._adapter.close()


def limit_requests() -> None:
    """Put a :class:`LimitedAdapter` into every HTTP session that MLflow makes from here on; once is enough.

    MLflow has no setting for that. A version of MLflow that makes its sessions elsewhere works without the limits.
    """
    from mlflow.utils import request_utils

    get_session = getattr(request_utils, "_get_request_session", None)
    if get_session is None or getattr(get_session, "limited", False):
        return

    def limited(*args: Any, **kwargs: Any) -> requests.Session:
        session = get_session(*args, **kwargs)
        with _lock:  # MLflow shares a session among threads
            adapters = {adapter for adapter in session.adapters.values() if not isinstance(adapter, LimitedAdapter)}
            for adapter in adapters:  # one may serve http and https
                limited_adapter = LimitedAdapter(adapter)
                for prefix in [prefix for prefix, found in session.adapters.items() if found is adapter]:
                    session.mount(prefix, limited_adapter)
        return session

    limited.limited = True  # type: ignore[attr-defined]
    request_utils._get_request_session = limited
