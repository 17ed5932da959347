"""``train.trace``: what a few training steps do, call by call, to be looked at in ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from distdiff import files

log = logging.getLogger("distdiff")

NAME = "trace.json"
SKIP, WARM, ACTIVE = 10, 2, 4
"""Steps that pass untouched, that the profiler warms up in, and that are written down."""


@contextlib.contextmanager
def trace(path: Path | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Write a trace of steps ``SKIP + WARM`` to ``SKIP + WARM + ACTIVE`` of what runs inside.

    Parameters
    ----------
    path
        File to write; ``None`` writes nothing and costs nothing.

    Yields
    ------
    callable
        To be called at the end of each step.
    """
    if path is None:
        yield lambda: None
        return

    def write(profiler: torch.profiler.profile) -> None:
        with files.whole(path, overwrite=True) as temporary:
            profiler.export_chrome_trace(str(temporary))
        written.append(path)
        log.info("train.trace: %s", path)

    written: list[Path] = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = torch.profiler.schedule(wait=SKIP, warmup=WARM, active=ACTIVE, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        log.warning("train.trace: the run took fewer than %d steps, so there is no trace of it", SKIP + WARM)
