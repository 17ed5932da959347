"""A run owns its folder: a lock that its first process holds, and a note that says who that is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import BaseFileLock

from distdiff import owner

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
    held: BaseFileLock | None = None
    refused = [""]
    if main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = owner.acquire(folder / LOCK, folder / NOTE)
        except owner.Owned as other:
            refused = [
                f"train.out={folder} belongs to another run, {other}, and nothing was changed there: wait until it "
                f"ends, stop it, or give another train.out (if you are sure that it is gone, remove {folder / LOCK})"
            ]
        except OSError as error:
            refused = [f"train.out={folder} cannot be written: {error}"]
    broadcast_object_list(refused)
    if refused[0]:
        raise RuntimeError(refused[0])
    try:
        yield
    finally:
        if held is not None:
            owner.release(held, folder / NOTE)
