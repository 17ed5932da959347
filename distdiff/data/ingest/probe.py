"""The first look into an h5 file, in a process of its own: damaged files can hang the HDF5 library, or crash it."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distdiff import files
from distdiff.data.ingest.damage import InputError

SILENT = 60.0
"""Seconds without progress after which a look counts as hanging."""

LARGE = 100_000
"""Texts of a dataset up to which all of them are read."""


def looked_through(path: Path) -> None:
    """See to it that the library comes back from all objects and attributes of an h5 file, once a version of it.

    What it raises there is no concern here: whoever reads the file meets it again.

    Raises
    ------
    InputError
        The library hangs, or dies.
    """
    _looked_through(str(path), files.stamp(path))


@functools.lru_cache(maxsize=256)
def _looked_through(path: str, version: str) -> None:
    def look(beat: Callable[[], None]) -> None:
        import h5py

        def visit(name: str, item: Any) -> None:
            beat()
            with contextlib.suppress(Exception):
                dict(item.attrs)
            with contextlib.suppress(Exception):
                if isinstance(item, h5py.Dataset) and item.dtype.kind in "OSV" and item.size <= LARGE:
                    item[()]

        with contextlib.suppress(Exception), h5py.File(path, "r") as file:
            dict(file.attrs)
            file.visititems(visit)

    first(look, path)


def first(work: Callable[[Callable[[], None]], None], where: str) -> None:
    """Do ``work`` in a child process, where the system can fork one safely; else here.

    Parameters
    ----------
    work
        What is to be tried; it is given a function to call whenever it got on.
    where
        For the message.

    Raises
    ------
    InputError
        That of ``work``; it hangs, or its process dies.
    """
    if sys.platform != "linux":
        work(lambda: None)
        return
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: the child reads one file and ends
        pid = os.fork()
    if pid == 0:
        _child(work, send)
    os.close(send)
    text, part = b"", b""
    try:
        while select.select([receive], [], [], SILENT)[0]:
            if not (part := os.read(receive, 1 << 16)):
                break
            text += part.replace(b"\0", b"")
        else:
            raise InputError(
                f"{where} cannot be read (no progress for {SILENT:.0f} s): damaged, or its disk does not answer; copy "
                "the file again"
            )
    finally:
        os.close(receive)
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if text.endswith(b"\n"):
        if text != b"\n":
            raise InputError(text[:-1].decode())
        return
    raise InputError(f"{where} cannot be read (the HDF5 library died of it, {status}): damaged; copy the file again")


def _child(work: Callable[[Callable[[], None]], None], send: int) -> None:
    """Carry out the work, write its error and a line's end, and never return."""

    def beat() -> None:
        os.write(send, b"\0")

    with contextlib.suppress(BaseException):
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        answer = ""
        try:
            work(beat)
        except InputError as error:
            answer = str(error)
        except Exception:
            pass
        os.write(send, answer.encode(errors="replace") + b"\n")
    os._exit(0)
