"""A store from a folder to an object store: whole or invisible there too, as its manifest goes last."""

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
"""Files on their way at once; each is in memory meanwhile (a shard has 32 MiB or less by default)."""


def upload(folder: str | Path, url: str, *, overwrite: bool = False, progress: bool = True) -> tuple[Manifest, int]:
    """Copy a store to a URL; the same call goes on with one that was cut.

    A file that is there already with the same MD5 is not sent again. Until the last file is there nothing opens the
    copy: ``upload.json`` says whose it will be, and ``manifest.json`` comes last.

    Parameters
    ----------
    folder
        The store.
    url
        Where to, ``s3://BUCKET/PATH`` or ``gs://BUCKET/PATH``; the bucket must exist.
    overwrite
        Replace another store there. Whoever reads that one meanwhile fails.
    progress
        Show a bar.

    Returns
    -------
    (Manifest, int)
        Of the store, and the bytes that were sent.

    Raises
    ------
    FileExistsError
        Another store, a part of one, or other files are there.
    FileNotFoundError, ValueError
        ``folder`` is no whole store, or ``url`` cannot be one.
    OSError
        The place cannot be written.
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
    """Write down whose the place will be; the keys that are there.

    Raises
    ------
    FileExistsError
        It is someone else's.
    """
    existing_keys, begun = remote.keys(), remote.read(UPLOADING)
    if existing_keys and not whole and begun is None:
        raise FileExistsError(f"{remote.url} holds files that are no distdiff store, so they are left alone; "
                              "choose another place")  # fmt: skip
    of = json.loads(begun)["fingerprint"] if begun else fingerprint
    if not overwrite and (whole or of != fingerprint):
        what = "another store" if whole else f"a part of another store (fingerprint {of[:12]})"
        raise FileExistsError(f"{remote.url} holds {what}; give --overwrite to replace it, or another place")
    remote.write(UPLOADING, json.dumps({"fingerprint": fingerprint}).encode())
    return existing_keys


def _send(remote: RemoteFolder, files: dict[str, Path], existing_keys: set[str], progress: bool) -> int:
    """Write the files that are not there yet, a few at once; bytes sent."""

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
