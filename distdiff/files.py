"""Whole or invisible: everything distdiff writes appears under its name only once it is complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary sibling path to write a file or folder to; rename it to ``target`` at the end.

    On any error, Ctrl-C included, the temporary is removed and an older ``target`` stays as it was.

    Raises
    ------
    FileExistsError
        ``target`` exists and ``overwrite`` is false.
    OSError
        The disk is full: says where, and that nothing was left behind.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; give --overwrite to replace it, or another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.tmp-{os.getpid()}{target.suffix}")
    remove(temporary)
    try:
        yield temporary
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.is_dir():
            target.rename(old)
        os.replace(temporary, target)
        remove(old)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk is full: {target} could not be written and nothing of it was left; free space "
                "or give another --out", str(target),
            ) from error  # fmt: skip
        raise
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
