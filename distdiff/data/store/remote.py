"""Folders and URLs behind one interface, by tensorstore: ``s3://``, ``gs://``, ``http://`` and local paths.

Keys for S3 are found as by the AWS tools (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE with ``~/.aws``, the
machine's role); AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names a server other than Amazon's. A request that gets no
answer is repeated for some minutes; then `Unreachable` names the URL and says what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import tensorstore as ts

from distdiff.files import is_url

T = TypeVar("T")

RETRIES = {"max_retries": 10, "initial_delay": "1s", "max_delay": "16s"}
"""Retries of one request: 1 + 2 + 4 + 8 + 5 x 16 s, about a minute and a half, each with a second of jitter."""

FIRST, LATER = 150, 600
"""Most seconds for a small file, with all retries, and for the content of arrays: where packets are lost, a single try
takes five minutes."""

MUTE = 20
"""Seconds without a byte after which a request counts as failed; without it tensorstore waits for ever."""

FOR_S3 = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE"
KEYS = {"s3": FOR_S3, "gs": "GOOGLE_APPLICATION_CREDENTIALS"}


class Unreachable(OSError):
    """A URL that cannot be read or written now: no answer, no access, or no bucket. Its content is unknown.

    Examples
    --------
    >>> from distdiff.data.store.remote import Unreachable
    >>> issubclass(Unreachable, OSError)
    True
    """


def checked(url: str) -> str:
    """Check a URL and remove a slash at its end.

    Raises
    ------
    ValueError
        It names no host or bucket, or holds a password or a signature: URLs are printed and logged.

    Examples
    --------
    >>> from distdiff.data.store.remote import checked
    >>> checked("s3://bucket/atlas.zarr/")
    's3://bucket/atlas.zarr'
    >>> checked("https://user:password@host/atlas.zarr")
    Traceback (most recent call last):
        ...
    ValueError: https://host/atlas.zarr: a URL with a user, a password or a query is refused, as URLs ...
    """
    parts = urlsplit(url)
    if not parts.netloc and parts.scheme != "file":
        raise ValueError(f"{url}: s3://BUCKET/PATH, gs://BUCKET/PATH or http://HOST/PATH is wanted")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: a URL with a user, a password or a query "
            f"is refused, as URLs are printed and logged; give keys by {KEYS.get(parts.scheme, FOR_S3)}"
        )
    return url.rstrip("/")


def context(cache_bytes: int = 0) -> Any:
    """Tensorstore context of all requests: retries, keys, and ``cache_bytes`` of memory for what is read repeatedly.

    Examples
    --------
    >>> from distdiff.data.store.remote import context
    >>> sorted(context(cache_bytes=1 << 20).spec.to_json())[:2]
    ['aws_credentials', 'cache_pool']
    """
    os.environ.setdefault(
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(MUTE)
    )  # tensorstore has no other setting for it
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    about: dict[str, Any] = {f"{kind}_request_retries": RETRIES for kind in ("s3", "gcs", "http")}
    about["cache_pool"] = {"total_bytes_limit": cache_bytes}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # these come first anyway; the other ways log missing files
        about["aws_credentials"] = {"type": "environment"}
    else:  # without a name no profile is read (tensorstore 0.1.86)
        about["aws_credentials"] = {"type": "default", "profile": os.environ.get("AWS_PROFILE", "default")}
    return ts.Context(about)


def kvstore(url: str) -> dict[str, Any]:
    """The tensorstore specification of a folder: a local path or a URL.

    Raises
    ------
    ValueError
        A password in the URL or in that of the endpoint, or an unknown kind of URL.

    Examples
    --------
    >>> from distdiff.data.store.remote import kvstore
    >>> kvstore("gs://bucket/atlas.zarr")
    {'bucket': 'bucket', 'driver': 'gcs', 'path': 'atlas.zarr/'}
    >>> kvstore("/data/atlas.zarr")
    {'driver': 'file', 'path': '/data/atlas.zarr/'}
    """
    if not is_url(url):
        return {"driver": "file", "path": f"{url.rstrip('/')}/"}
    url = checked(url)
    if url.startswith("s3://"):
        bucket, _, path = url.removeprefix("s3://").partition("/")
        spec = {"driver": "s3", "bucket": bucket, "path": f"{path}/" if path else ""}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if not endpoint:
            return spec  # the region of the bucket is found by a request to Amazon
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return spec | {"endpoint": checked(endpoint), "aws_region": region}
    try:
        return ts.KvStore.Spec(f"{url}/").to_json()
    except ValueError as error:
        raise ValueError(f"{url}: s3://BUCKET/PATH, gs://BUCKET/PATH or http://HOST/PATH is wanted ({error})") from None


def run_request(url: str, request: Callable[[], T]) -> T:
    """Run a request and return its result; failures of the network become `Unreachable`.

    Raises
    ------
    Unreachable
        There was no answer, or no permission.
    ValueError
        The content is damaged.

    Examples
    --------
    >>> from distdiff.data.store.remote import run_request
    >>> run_request("s3://bucket/atlas.zarr", lambda: b"content")
    b'content'
    """
    try:
        return request()
    except TimeoutError as error:
        raise Unreachable(f"{url}: no answer in time; check the network, then run the same command again") from error
    except (ValueError, RuntimeError, OSError) as error:
        if (why := _unreachable(url, str(error))) is not None:
            raise Unreachable(why) from error
        raise


def _unreachable(url: str, text: str) -> str | None:
    """The message for an error of the network or of access; None for an error of the content."""
    if not is_url(url):
        return None
    code, _, rest = text.partition(": ")
    status = found[1] if (found := re.search(r"http_response_code='(\d+)'", text)) else ""
    reason = rest.split(" [")[0].strip()  # the rest may quote the request
    reason = (reason if reason not in ("", "Unknown") else code).rstrip(".") + (f", HTTP {status}" if status else "")
    if "NoSuchBucket" in text:
        return f"{url}: there is no such bucket ({reason}); make it first, or look for a mistake in the name"
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or "credential" in text or status in ("400", "401", "403"):
        scheme = urlsplit(url).scheme
        return f"{url}: access denied ({reason}); check {KEYS.get(scheme, 'who may read it')} and the bucket's policy"
    if "aws_region" in text:
        return f"{url}: no such bucket, or its region is unknown ({reason}); check the name, or set AWS_ENDPOINT_URL"
    if code in ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED") or status:
        where = "the network and AWS_ENDPOINT_URL" if url.startswith("s3://") else "the network"
        return f"{url}: no useful answer ({reason}); check {where}, then run the same command again"
    return None


class RemoteFolder:
    """Whole files under one URL or folder.

    Parameters
    ----------
    url
        Folder or URL. The first request is made by the first call of a method.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.data.store.remote import RemoteFolder
    >>> Path("bucket").mkdir()
    >>> folder = RemoteFolder(str(Path("bucket").absolute()))  # or s3://BUCKET/PATH
    >>> folder.write("note.txt", b"ready")
    >>> folder.keys(), folder.read("note.txt")
    ({'note.txt'}, b'ready')
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._store = run_request(url, lambda: ts.KvStore.open(kvstore(url), context=context()).result(FIRST))
        except ValueError as error:
            raise error if url in str(error) else ValueError(f"{url}: {error}") from None

    def read(self, key: str) -> bytes | None:
        """Content of one file, None if it does not exist."""
        found = run_request(self.url, lambda: self._store.read(key).result(FIRST))
        return found.value if found.state == "value" else None

    def holds(self, key: str, md5: bytes) -> bool:
        """Whether a file with this MD5 exists; false as well where the server gives no MD5."""
        stamp = b'\0"' + md5.hex().encode() + b'"'  # tensorstore's form of an entity tag
        answer = run_request(
            self.url, lambda: self._store.read(key, if_not_equal=stamp, byte_range=slice(0, 1)).result(FIRST)
        )  # fmt: skip
        return answer.state == "unspecified"

    def keys(self, prefix: str = "") -> set[str]:
        """Names of all files, or of those that begin with ``prefix``."""
        of = ts.KvStore.KeyRange(prefix, f"{prefix}\x7f" if prefix else "")
        return {key.decode() for key in run_request(self.url, lambda: self._store.list(of).result(LATER))}

    def write(self, key: str, content: bytes | None) -> None:
        """Write one file, or remove it (None)."""
        run_request(self.url, lambda: self._store.write(key, content).result(LATER))


def open_array(url: str, name: str, context_: Any = None) -> Any:
    """Open one zarr v3 array of a store.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.data.store.remote import open_array
    >>> open_array(str(Path("atlas.zarr").absolute()), "split").shape
    (199,)
    """
    kv_spec = kvstore(url)
    kv_spec["path"] += f"{name}/"
    spec = {"driver": "zarr3", "kvstore": kv_spec, "recheck_cached_data": False, "recheck_cached_metadata": False}
    return run_request(url, lambda: ts.open(spec, context=context_ or context(), open=True, read=True).result(FIRST))


def read_array(url: str, array: Any) -> np.ndarray:
    """Read an array, or a part of one.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.data.store.remote import open_array, read_array
    >>> url = str(Path("atlas.zarr").absolute())  # or s3://BUCKET/PATH
    >>> read_array(url, open_array(url, "source/row")[:3]).shape
    (3,)
    """
    return run_request(url, lambda: array.read().result(LATER))


def read_together(url: str, arrays: Sequence[Any], rows: np.ndarray) -> list[np.ndarray]:
    """Read the same rows of several arrays; neighbours on disk share a request.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from distdiff.data.store.remote import open_array, read_together
    >>> url = str(Path("atlas.zarr").absolute())  # or s3://BUCKET/PATH
    >>> arrays = [open_array(url, name) for name in ("split", "source/row")]
    >>> [values.shape for values in read_together(url, arrays, np.array([0, 5]))]
    [(2,), (2,)]
    """

    def read() -> list[np.ndarray]:
        with ts.Batch() as batch:
            futures = [array[rows].read(batch=batch) for array in arrays]
        return [future.result(LATER) for future in futures]

    try:
        return run_request(url, read)
    except Unreachable:
        raise
    except ValueError:
        if not is_url(url):
            raise
        return run_request(url, read)  # damage on the network does not repeat
