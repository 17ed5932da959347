"""Copy a store from a folder to an object store; its manifest comes last, so an incomplete copy cannot be opened."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from distdiff.data.store.manifest import FILE, Manifest
from distdiff.data.store.remote import RemoteFolder, checked
from distdiff.data.store.store import UPLOADING, CountStore
from distdiff.files import is_url

THREADS = 4
"""Files sent at the same time; each is in memory as a whole (a shard has 32 MiB or less by default)."""


def upload(folder: str | Path, url: str, *, overwrite: bool = False, progress: bool = True) -> tuple[Manifest, int]:
    """Copy a store to a URL; the same call continues an interrupted one.

    A file that exists at the URL with the same MD5 is not sent again. An incomplete copy cannot be opened:
    ``upload.json`` has the fingerprint of the store to come, and ``manifest.json`` is written last.

    Parameters
    ----------
    folder
        The store.
    url
        Target, ``s3://BUCKET/PATH`` or ``gs://BUCKET/PATH``; the bucket must exist.
    overwrite
        Replace another store at the URL. Processes that read that store meanwhile fail.
    progress
        Show a progress bar.

    Returns
    -------
    (Manifest, int)
        The manifest of the store, and the bytes that were sent.

    Raises
    ------
    FileExistsError
        The URL holds another store, a part of one, or other files.
    FileNotFoundError, ValueError
        ``folder`` is no complete store, or ``url`` cannot hold one.
    OSError
        The URL cannot be written.

    Examples
    --------
    >>> from distdiff.data.store.upload import upload
    >>> upload("atlas.zarr", "https://host/atlas.zarr")
    Traceback (most recent call last):
        ...
    ValueError: upload to https://host/atlas.zarr: a local folder, then s3://BUCKET/PATH or ...
    """
    url = checked(url)
    if is_url(folder) or url.startswith("http"):
        raise ValueError(f"upload to {url}: a local folder, then s3://BUCKET/PATH or gs://BUCKET/PATH is wanted")
    store, remote = CountStore.open(folder), RemoteFolder(url)
    root = Path(store.url)
    manifest = (root / FILE).read_bytes()
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}
    del files[FILE]
    found = remote.read(FILE)
    if found == manifest and not overwrite:
        remote.write(UPLOADING, None)
        return store.manifest, 0
    existing_keys = _claimed(remote, store.manifest.fingerprint, found is not None, overwrite)
    if found is not None:
        remote.write(FILE, None)
    for key in existing_keys - {*files, FILE, UPLOADING}:
        remote.write(key, None)
    sent = _send(remote, files, existing_keys, progress)
    remote.write(FILE, manifest)
    remote.write(UPLOADING, None)
    return store.manifest, sent


def _claimed(remote: RemoteFolder, fingerprint: str, whole: bool, overwrite: bool) -> set[str]:
    """Mark the URL with the fingerprint of the store to come; returns the names of the files that exist there.

    Raises
    ------
    FileExistsError
        It holds another store, or other files.
    """
    existing_keys, begun = remote.keys(), remote.read(UPLOADING)
    if existing_keys and not whole and begun is None:
        raise FileExistsError(f"{remote.url} holds files that are no distdiff store; nothing was written; "
                              "choose another URL")  # fmt: skip
    of = json.loads(begun)["fingerprint"] if begun else fingerprint
    if not overwrite and (whole or of != fingerprint):
        what = "another store" if whole else f"a part of another store (fingerprint {of[:12]})"
        raise FileExistsError(f"{remote.url} holds {what}; give overwrite=True to replace it, or another URL")
    remote.write(UPLOADING, json.dumps({"fingerprint": fingerprint}).encode())
    return existing_keys


def _send(remote: RemoteFolder, files: dict[str, Path], existing_keys: set[str], progress: bool) -> int:
    """Write the missing files, a few at the same time; returns the bytes sent."""

    def send(key: str) -> tuple[int, int]:
        content = files[key].read_bytes()
        if key in existing_keys and remote.holds(key, hashlib.md5(content, usedforsecurity=False).digest()):
            return len(content), 0
        remote.write(key, content)
        return len(content), len(content)

    total, sent = sum(file.stat().st_size for file in files.values()), 0
    with (
        ThreadPoolExecutor(THREADS, thread_name_prefix="distdiff-upload") as threads,
        tqdm(total=total, desc="upload", unit="B", unit_scale=True, disable=not progress, ascii=True) as bar,
    ):
        futures = [threads.submit(send, key) for key in files]
        try:
            for future in as_completed(futures):
                size, new = future.result()
                sent += new
                bar.update(size)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
    return sent
