"""A run owns its folder: a lock that its first process holds, and a note that says who that is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from distdiff import files, received

WAIT = 5.0
"""Seconds that a start waits: a process that was just killed may still be ending."""

LOCK, NOTE = ".lock", ".owner.json"


@contextlib.contextmanager
def owned(folder: Path, *, main: bool) -> Iterator[None]:
    """Let no other run work in ``folder`` meanwhile; all processes of a run, on however many machines, are one owner.

    The operating system lets go of a lock whose holder was killed. A file system without locks is used without.

    Parameters
    ----------
    main
        Whether this is the process that holds the lock for all; the others hear of it.

    Raises
    ------
    RuntimeError
        Another run works there (host, process and time named), on all processes alike.
    """
    lock = FileLock(folder / LOCK, timeout=WAIT)
    refused = [_take(lock, folder) if main else ""]
    broadcast_object_list(refused)
    if refused[0]:
        raise RuntimeError(refused[0])
    try:
        yield
    finally:
        if main and lock.is_locked:
            files.remove(folder / NOTE)
            lock.release()


def _take(lock: FileLock, folder: Path) -> str:
    """Hold the lock and leave a note, or say why not."""
    note = folder / NOTE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
        with files.whole(note, overwrite=True) as temporary:
            me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            temporary.write_text(json.dumps(me))
    except Timeout:
        return (
            f"train.out={folder} belongs to another run, {_owner(note)}, and nothing was changed there: wait until it "
            f"ends, stop it, or give another train.out (if you are sure that it is gone, remove {folder / LOCK})"
        )
    except OSError as error:
        return f"train.out={folder} cannot be written: {error}"
    return ""


def _owner(note: Path) -> str:
    try:
        told = received.json_of(note, 4096)
        return f"host {told['host']}, process {told['pid']}, since {told['since']}"
    except (OSError, ValueError, KeyError):
        return "which left no note"
