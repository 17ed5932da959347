"""A folder has one owner: a lock that ends with the process that holds it, and a note that names this process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from distdiff import files, received

WAIT = 5.0
"""Seconds to wait for a lock: a process that was just killed may still be ending."""


class Owned(RuntimeError):
    """Another process holds the lock; the message names its host, its process and since when."""


def acquire(lock: Path, note: Path) -> BaseFileLock:
    """Hold ``lock`` and leave ``note``; the operating system releases the lock of a process that is killed.

    A file system without locks is used without.

    Raises
    ------
    Owned
        Another process holds the lock.
    OSError
        The folder cannot be written.
    """
    held = FileLock(lock, timeout=WAIT)
    try:
        with contextlib.suppress(NotImplementedError):
            held.acquire()
    except Timeout:
        raise Owned(_named_in(note)) from None
    try:
        with files.whole(note, overwrite=True) as temporary:
            me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            temporary.write_text(json.dumps(me))
    except BaseException:
        held.release()
        raise
    return held


def release(held: BaseFileLock, note: Path) -> None:
    """Remove the note and let go of the lock."""
    if held.is_locked:
        files.remove(note)
        held.release()


def _named_in(note: Path) -> str:
    try:
        owner = received.json_of(note, 4096)
        return f"host {owner['host']}, process {owner['pid']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which left no note"
