"""Calls that may crash, hang, or take all memory, each in a process of its own that is forked ready to work."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.forkserver import process

MEMORY = 12 << 30
"""Bytes of address space of a trial: what asks for more is refused by the system, as on a full machine."""


@dataclass(frozen=True)
class Ended:
    """How a trial ended: exit code (None: it hung and was killed), what it printed, seconds."""

    code: int | None
    said: str
    seconds: float

    @property
    def kind(self) -> str:
        """``works``, ``refused`` (one sentence, exit code 2), or what is wrong: ``hang``, ``traceback``, ``died``."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.said:
            return "traceback"
        if self.code == 0:
            return "works"
        return "refused" if self.code == 2 and self.sentence else f"died {self.code}"

    @property
    def sentence(self) -> str:
        """What the command line printed of an error, if that is its one last line."""
        lines = self.said.strip().splitlines()
        last = lines[-1] if lines else ""
        alone = sum("distdiff: error: " in line for line in lines) == 1
        return last.partition("distdiff: error: ")[2] if alone and "distdiff: error: " in last else ""


def _work(work: Callable[..., None], given: tuple, log: str, memory: int) -> None:
    with open(log, "w", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        work(*given)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def started(work: Callable[..., None], *given: object, memory: int = MEMORY) -> tuple[Any, str]:
    """A process that does ``work(*given)``, and the file of what it prints."""
    handle, log = tempfile.mkstemp(suffix=".txt")
    os.close(handle)
    made = process(_work, (work, given, log, memory))
    made.start()
    return made, log


def trial(work: Callable[..., None], *given: object, seconds: float = 60, memory: int = MEMORY) -> Ended:
    """How ``work(*given)`` ends in a process of its own."""
    began = time.monotonic()
    begun, log = started(work, *given, memory=memory)
    begun.join(seconds)
    code = begun.exitcode
    if code is None:
        begun.kill()
        begun.join(10)
    said = Path(log).read_text(errors="replace").replace("\r", "\n")
    os.unlink(log)
    return Ended(code, said, time.monotonic() - began)


def command(words: list[str], folder: str) -> None:
    """A command of the command line, in a folder."""
    from distdiff.cli import main

    os.chdir(folder)
    sys.argv = ["distdiff", *words]
    main(words)
