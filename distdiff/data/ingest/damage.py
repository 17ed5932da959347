"""Files that cannot be read: whatever a file library raises becomes one sentence that names the file and what to do."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator


class InputError(ValueError):
    """An input that cannot be used; the message names the file, what is wrong in it, and what to do."""


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn any error of a file library into one about the file.

    Whatever is in a damaged file decides what a library raises (KeyError, TypeError, UnicodeDecodeError, MemoryError
    ...), so all of them are caught. What distdiff itself refuses is passed on: an `InputError`, and any error whose
    message names ``where`` already.

    Raises
    ------
    InputError
        Where, and what to do.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, ValueError | FileNotFoundError) and where in str(error):
            raise
        raise unreadable(where, error) from error


def unreadable(where: str, error: Exception) -> InputError:
    """The error for what a file library cannot read: its cause where the library names it, else damage."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if isinstance(error, PermissionError):
        advice = "it may not be read by you; ask whoever owns it"
    elif "unable to lock file" in text:
        advice = (
            "another process has it open for writing, a notebook perhaps; close it there (adata.file.close()), or set "
            "HDF5_USE_FILE_LOCKING=FALSE if the file system has no locks"
        )
    elif re.search(r"required filter|lib/plugin", text):  # of HDF5
        advice = "compressed by a filter that is not installed here; pip install hdf5plugin, or write it with gzip"
    elif isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE):
        advice = "the system could not read it now; run the command again"
    elif isinstance(error, MemoryError):
        advice = "it needs more memory than there is here, or is damaged: copy the file again"
    elif type(error).__name__ == "IORegistryError":  # of anndata
        advice = "damaged, or written by a newer anndata: copy the file again, or pip install -U anndata"
    else:
        advice = "truncated or damaged; copy the file again"
    return InputError(f"{where} cannot be read ({text}): {advice}")
