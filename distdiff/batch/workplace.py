"""The hidden folder beside an output in which it is made: a lock, the plan, and one folder for each finished shard.

``.X.zarr.building/`` holds ``lock`` and ``owner.json`` (see :mod:`distdiff.owner`), ``job.json`` (the plan), and a
folder named by the plan's ``token`` with the finished shards. A process that was suspended while its job was finished,
or replaced, by another command writes under its own token, which is gone by then, so it can change no later job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock

from distdiff import files, owner
from distdiff.batch.output import RECORD
from distdiff.batch.plan import Plan

PLAN, LOCK, NOTE = "job.json", "lock", "owner.json"

ATTEMPTS = 20
"""How often a folder is made again that other commands remove as they end."""

FIRST = (PLAN, "identity")
"""What is removed first, so that a process killed while it removes the rest leaves nothing that could be continued;
the second is the mark of an unfinished ``distdiff shard``, which uses a folder of the same name."""


def folder_of(out: Path) -> Path:
    """Work folder of an output."""
    return out.with_name(f".{out.name}.building")


@contextlib.contextmanager
def owned(out: Path, notify: Callable[[str], None]) -> Iterator[Path]:
    """Own the work folder of an output meanwhile; it stays afterwards if it holds work to continue.

    Raises
    ------
    FileExistsError
        Another process owns it (named), it is a file, or it is or holds a symbolic link.
    """
    work = files.workplace(folder_of(out))
    files.tidy(out, notify)
    lock = _acquired(out, work)
    try:
        files.restore(out, work / "old")
        yield work
    finally:
        files.remove(work / NOTE)
        if not any((work / name).exists() for name in FIRST):
            clear(work)
            files.remove(work / LOCK)
            with contextlib.suppress(OSError):  # another command has just begun there
                work.rmdir()
        lock.release()


def _acquired(out: Path, work: Path) -> BaseFileLock:
    """The lock of a work folder, held; the folder is made again where another command ends and removes it meanwhile."""
    work.mkdir(parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        try:
            return owner.acquire(work / LOCK, work / NOTE)
        except FileNotFoundError:
            work.mkdir(parents=True, exist_ok=True)
        except owner.Owned as other:
            raise FileExistsError(
                f"{out} is being written by another command, {other}; wait until it ends, stop it, or give another name"
            ) from None
    raise FileExistsError(f"{out}: other commands begin and end there all the time; give another name")


def read_plan(work: Path) -> Plan | None:
    """The plan of an unfinished job; ``None`` where none was begun.

    Raises
    ------
    ValueError
        It cannot be read: damaged, or of another version of distdiff.
    """
    try:
        return Plan.from_json((work / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_plan(work: Path, plan: Plan) -> None:
    """Begin a job: its plan, and the folder for its shards."""
    (work / plan.token).mkdir()
    with files.whole(work / PLAN, overwrite=True) as temporary:
        temporary.write_text(plan.to_json(), encoding="utf-8")


def clear(work: Path) -> None:
    """Remove all but the lock, the plan first."""
    for name in FIRST:
        files.remove(work / name)
    for path in work.iterdir():
        if path.name not in (LOCK, NOTE):
            files.remove(path)


def shard_folder(shards: Path, shard: int) -> Path:
    """Folder of one finished shard."""
    return shards / f"{shard:06d}"


def finished_shards(shards: Path) -> set[int]:
    """Numbers of the shards that are finished."""
    try:
        return {int(name) for name in os.listdir(shards) if name.isdigit() and (shards / name / RECORD).exists()}
    except FileNotFoundError:
        return set()
