"""Safe writing: every file and folder gets its name only when it is complete."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout


def is_url(path: object) -> bool:
    """Whether a path is a URL, also after `Path` has made one slash of two.

    Examples
    --------
    >>> from distdiff.files import is_url
    >>> is_url("s3://bucket/atlas.zarr"), is_url("data/atlas.zarr")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def local(path: str | Path) -> Path:
    """A path to write to.

    Raises
    ------
    ValueError
        It is a URL; only complete stores are sent to URLs.

    Examples
    --------
    >>> from distdiff.files import local
    >>> local("out/imputed.zarr").name
    'imputed.zarr'
    """
    if is_url(path):
        raise ValueError(
            f"{str(path).rpartition('@')[2]}: output is written to a local folder, not to a URL; copy it to the URL "
            "afterwards (a store: distdiff store upload FOLDER URL)"
        )
    return Path(path).expanduser()


def absolute(path: str | Path) -> Path:
    """A local path from the root, without ``..``, which readers of arrays refuse; links keep their names.

    Examples
    --------
    >>> from distdiff.files import absolute
    >>> absolute("runs/../atlas.zarr") == absolute("atlas.zarr")
    True
    """
    found = Path(path).expanduser().absolute()
    return found.parent.resolve() / found.name if ".." in found.parent.parts else found


@contextlib.contextmanager
def whole(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden path beside ``target`` to write a file or folder to; rename it to ``target`` at the end.

    After any error, Ctrl-C included, the hidden path is removed and an older ``target`` is unchanged. Remains of a
    killed process of this host are removed by the next process that writes the same target.

    Raises
    ------
    FileExistsError
        ``target`` exists and ``overwrite`` is false; it may have been made meanwhile.
    OSError
        The disk is full; the message says where, and that no remains are on the disk.
    ValueError
        ``target`` is a URL.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import whole
    >>> with whole("table.txt") as temporary:
    ...     temporary.write_text("ready")
    ...     Path("table.txt").exists()
    5
    False
    >>> Path("table.txt").read_text()
    'ready'
    """
    target = local(target)
    prefix = f".{target.stem}.tmp-{socket.gethostname()}-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        name = leftover.name.removeprefix(prefix)
        if _of_dead(name.removesuffix(".old").removesuffix(target.suffix)):
            if name.endswith(".old"):
                restore(target, leftover)
            remove(leftover)
    _refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{prefix}{os.getpid()}{target.suffix}")
    remove(temporary)
    try:
        yield temporary
        (publish if overwrite else _appear)(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk is full: {target} could not be written, and its remains were removed; free "
                "space or write elsewhere",
            ) from error  # fmt: skip
        raise
    finally:
        remove(temporary)


@contextlib.contextmanager
def scratch(target: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` for temporary files; it is removed at the end.

    Remains of a killed process of this host are removed by the next process with the same target.

    Examples
    --------
    >>> from distdiff.files import scratch
    >>> with scratch("imputed.zarr") as folder:
    ...     (folder / "piece").write_text("needed for a while")
    18
    >>> folder.exists()
    False
    """
    target = Path(target)
    prefix = f".{target.stem}.scratch-{socket.gethostname()}-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        if _of_dead(leftover.name.removeprefix(prefix).partition("-")[0]):
            remove(leftover)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
    try:
        yield folder
    finally:
        remove(folder)


def workplace(folder: Path) -> Path:
    """Refuse a work folder that is a symbolic link or contains one.

    The name of a work folder can be predicted. Through a link in it, distdiff would write or delete files elsewhere;
    distdiff itself makes no links.

    Raises
    ------
    FileExistsError
        It is a link, contains one (named), or is a file.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import workplace
    >>> Path("link").symlink_to("elsewhere")
    >>> workplace(Path("link"))
    Traceback (most recent call last):
        ...
    FileExistsError: link is a symbolic link, which distdiff does not make, and nothing was written through ...
    """
    if folder.is_file() and not folder.is_symlink():
        raise FileExistsError(f"{folder} is a file, a folder is wanted there; remove it, or give another output")
    found = [folder] if folder.is_symlink() else []
    for where, folders, names in () if found else os.walk(folder):
        found += [path for path in (Path(where, name) for name in (*folders, *names)) if path.is_symlink()]
    if found:
        raise FileExistsError(
            f"{found[0]} is a symbolic link, which distdiff does not make, and nothing was written through it; remove "
            "it, or give another name for the output"
        )
    return folder


class NoRoom(OSError):
    """The disk has too little room for the output; raised before anything is written.

    Examples
    --------
    >>> from distdiff.files import NoRoom
    >>> issubclass(NoRoom, OSError)
    True
    """


@contextlib.contextmanager
def explain_full_disk(target: Path, work: Path) -> Iterator[None]:
    """Add to the error of a full disk that the same command continues from ``work``.

    Raises
    ------
    OSError
        The disk is full.

    Examples
    --------
    >>> import errno
    >>> from pathlib import Path
    >>> from distdiff.files import explain_full_disk
    >>> with explain_full_disk(Path("imputed.zarr"), Path(".imputed.zarr.building")):
    ...     raise OSError(errno.ENOSPC, "no space")
    Traceback (most recent call last):
        ...
    OSError: [Errno 28] the disk is full: imputed.zarr is not finished; free space and run the same ...
    """
    try:
        yield
    except NoRoom:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk is full: {target} is not finished; free space and run the same command again, "
                f"it goes on from {work} (or remove that folder)",
            ) from error  # fmt: skip
        raise


@contextlib.contextmanager
def resumable(
    target: str | Path, identity: str, *, overwrite: bool = False, notify: Callable[[str], None] = lambda text: None
) -> Iterator[Path | None]:
    """Yield a hidden folder beside ``target`` in which an interrupted command is continued by the same command.

    The caller makes the result in its subfolder ``store``, which becomes ``target`` at the end. The folder stays after
    a kill or an interruption, and is removed after an error of the input (ValueError). Only one process at a time may
    work there. Yields None if a killed process had already finished the same work: ``target`` is then complete.

    Parameters
    ----------
    target
        Folder to make.
    identity
        Inputs, options and version: work is continued only if this text is equal, otherwise it is removed.
    notify
        Called with a sentence on each thing that is removed.

    Raises
    ------
    FileExistsError
        ``target`` exists and ``overwrite`` is false, another process is writing it, or the folder is or contains
        a link.
    OSError
        The disk is full; the message says that the same command continues where this one stopped.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import resumable
    >>> with resumable("built", identity="inputs and options") as work:
    ...     (work / "store").mkdir()
    >>> Path("built").is_dir(), work.exists()
    (True, False)
    """
    target = Path(target)
    tidy(target, notify)
    work = workplace(target.with_name(f".{target.name}.building"))
    if not work.is_dir():
        _refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    lock = _locked(target, work)
    try:
        with explain_full_disk(target, work):
            restore(target, work / "old")
            if _finished(work, target, identity, overwrite):
                yield None
            else:
                if os.path.lexists(target) and not (work / IDENTITY).exists():  # remains of finished work
                    _clear(work)
                _refuse_existing(target, overwrite)
                _begin(work, identity, notify)
                yield work
                _mark(work / READY, f"{identity}\n{stamp(work / 'store')}")
                remove(work / IDENTITY)
                publish(work / "store", target, work / "old")
    except ValueError:
        _clear(work)
        raise
    else:
        _clear(work)
    finally:
        if not any(leftover.name != "lock" for leftover in work.glob("*")):
            remove(work)
        lock.release()


IDENTITY = "identity"
"""File in a work folder with the identity of its work. It is removed first, so no part of the rest is ever reused."""

READY = "ready"
"""File in a work folder with the identity of a complete result and its `stamp`, which is the same after the rename."""


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists already; give overwrite=True to replace it, or another name")


def _begin(work: Path, identity: str, notify: Callable[[str], None]) -> None:
    """Keep the content of the work folder if its identity is this one, else remove it."""
    mark = work / IDENTITY
    if (work / READY).exists() or not mark.is_file() or mark.read_text(encoding="utf-8") != identity:
        if any(leftover.name != "lock" for leftover in work.iterdir()):
            notify(f"{work}: removed, it was left by other work (other inputs, options or version of distdiff)")
        _clear(work)
        _mark(mark, identity)


def _finished(work: Path, target: Path, identity: str, overwrite: bool) -> bool:
    """Whether a killed process had completed this result; if so, it gets its name now."""
    try:
        whose, _, version = (work / READY).read_text(encoding="utf-8").partition("\n")
    except FileNotFoundError:
        return False
    if whose != identity:
        return False
    if target.is_dir() and stamp(target) == version:
        return True
    whole_one = work / "store"
    if not whole_one.is_dir() or stamp(whole_one) != version or (os.path.lexists(target) and not overwrite):
        return False
    remove(work / IDENTITY)
    publish(whole_one, target, work / "old")
    return True


def _mark(file: Path, text: str) -> None:
    """Write a small file that appears when it is complete."""
    partial = file.with_name(f"{file.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _clear(work: Path) -> None:
    """Empty a work folder, its identity first, so that an interruption leaves nothing that could be reused."""
    remove(work / IDENTITY)
    remove(work / "job.json")  # the same for a task on files (distdiff.batch.workplace)
    for leftover in work.iterdir():
        if leftover.name not in ("lock", READY):
            remove(leftover)
    remove(work / READY)


def _locked(target: Path, work: Path) -> BaseFileLock:
    """Acquire the lock of a work folder.

    Raises
    ------
    FileExistsError
        Another process holds it, or has just removed the folder.
    """
    lock = FileLock(work / "lock", timeout=0)
    with contextlib.suppress(Timeout, FileNotFoundError):
        lock.acquire()
        if (work / "lock").exists():
            return lock
        lock.release()
    raise FileExistsError(f"{target} is being written by another process now; wait for it, or choose another name")


def tidy(target: Path, notify: Callable[[str], None]) -> None:
    """Remove work folders of a target that a killed process of an earlier version had renamed but not removed.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import tidy
    >>> Path(".out.zarr.building-999999999").mkdir()  # left by process 999999999, which has ended
    >>> tidy(Path("out.zarr"), notify=print)
    .out.zarr.building-999999999: removed, it was left by a process that was killed
    """
    prefix = f".{target.name}.building-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        if _of_dead(leftover.name.removeprefix(prefix)):
            notify(f"{leftover}: removed, it was left by a process that was killed")
            remove(leftover)


def restore(target: Path, old: Path) -> None:
    """Restore an older folder if a process was killed between the two renames of `publish`.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import restore
    >>> Path("before").mkdir()
    >>> restore(Path("result"), old=Path("before"))
    >>> Path("result").is_dir()
    True
    """
    if old.is_dir() and not os.path.lexists(target):
        os.replace(old, target)


def publish(temporary: Path, target: Path, old: Path | None = None) -> None:
    """Rename a new file or folder to ``target``; an old folder of that name is removed afterwards.

    On Linux ``target`` exists at every moment, even if the process is killed; on other systems it is missing briefly.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import publish
    >>> for name in ("new", "published"):
    ...     Path(name).mkdir()
    >>> (Path("new") / "content").touch()
    >>> publish(Path("new"), Path("published"))
    >>> (Path("published") / "content").exists(), Path("new").exists()
    (True, False)
    """
    if not target.is_dir():
        os.replace(temporary, target)
        return
    if _exchange(temporary, target):
        remove(temporary)
        return
    old = old or temporary.with_name(f"{temporary.name}.old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    remove(old)


def _appear(temporary: Path, target: Path) -> None:
    """Rename a new file or folder to ``target``, unless ``target`` was made meanwhile."""
    try:
        if temporary.is_file():
            os.link(temporary, target)
            return
    except OSError:  # it exists, or the file system has no links
        pass
    if not os.path.lexists(target):
        os.rename(temporary, target)
        return
    raise FileExistsError(f"{target} was made by another process meanwhile and was not replaced; give another name")


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two paths atomically; false where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(cwd, os.fsencode(one), cwd, os.fsencode(other), exchange) == 0


def _of_dead(pid: str) -> bool:
    """Whether ``pid`` is the number of a process that has ended on this host."""
    return pid.isdigit() and not _alive(int(pid))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process of another user
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import remove
    >>> remove(Path("nothing"))  # no error
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_nested(out: str | Path, given: str | Path, name: str = "out") -> None:
    """Refuse an output that is an input, lies inside of it, or contains it.

    Raises
    ------
    ValueError
        ``out`` is the input, lies in it, or contains it.

    Examples
    --------
    >>> from distdiff.files import refuse_nested
    >>> refuse_nested("atlas/imputed.zarr", "atlas")
    Traceback (most recent call last):
        ...
    ValueError: out=atlas/imputed.zarr lies inside the input atlas; the input is never changed, give ...
    """
    out_path, given_path = Path(out).resolve(), Path(given).resolve()
    if out_path == given_path:
        raise ValueError(f"{name}={out} is the input itself; the input is never changed, give another name")
    if out_path.is_relative_to(given_path) or given_path.is_relative_to(out_path):
        where = "lies inside" if out_path.is_relative_to(given_path) else "holds"
        raise ValueError(f"{name}={out} {where} the input {given}; the input is never changed, give another folder")


def stamp(path: str | Path) -> str:
    """A text that changes with a file or folder: total size and latest time of change.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.files import stamp
    >>> before = stamp("counts.h5ad")
    >>> before == stamp("counts.h5ad")
    True
    """
    path = Path(path)
    found = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    stats = [f.stat() for f in found]
    return f"{sum(s.st_size for s in stats)}-{max((s.st_mtime_ns for s in stats), default=0)}"
