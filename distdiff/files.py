"""Whole or invisible: everything distdiff writes appears under its name only once it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden temporary sibling path to write a file or folder to; rename it to ``target`` at the end.

    On any error, Ctrl-C included, the temporary is removed and an older ``target`` stays as it was. What a killed
    process of this host left behind is removed by the next one that writes the same target.

    Raises
    ------
    FileExistsError
        ``target`` exists and ``overwrite`` is false.
    OSError
        The disk is full: says where, and that nothing was left behind.
    """
    target = Path(target)
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists already; give --overwrite to replace it, or another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.stem}.tmp-{socket.gethostname()}-"
    for left in target.parent.glob(f"{prefix}*{target.suffix}"):
        pid = left.name.removeprefix(prefix).removesuffix(target.suffix)
        if pid.isdigit() and not _alive(int(pid)):
            _remove(left)
    temporary = target.with_name(f"{prefix}{os.getpid()}{target.suffix}")
    _remove(temporary)
    try:
        yield temporary
        _publish(temporary, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk is full: {target} could not be written and nothing of it was left; free space "
                "or write elsewhere",
            ) from error  # fmt: skip
        raise
    finally:
        _remove(temporary)


def _publish(temporary: Path, target: Path) -> None:
    """Give the new one its name; an old folder of that name goes only then."""
    if not target.is_dir():
        os.replace(temporary, target)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    _remove(old)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
