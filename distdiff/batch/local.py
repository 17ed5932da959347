"""A job on this machine: in this process, or in all processes of its launcher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distdiff.batch import ranks
from distdiff.batch.job import Notify, OneProcess, carry_out, check_options
from distdiff.batch.summary import Summary
from distdiff.batch.task import Task
from distdiff.data.store.export import named


def run(
    task: Task, out: str | Path, *, data: str = "", overwrite: bool = False, progress: bool = True,
    batch_size: int | None = None, shard_cells: int | None = None, precision: str = "auto", command: str = "",
    notify: Notify = lambda message: None,
) -> Summary:  # fmt: skip
    """Do a job in this process; under ``accelerate launch`` or ``torchrun``, in all its processes together.

    Parameters
    ----------
    task
        What to do.
    out
        ``.zarr``, or ``.h5ad`` for what fits one process.
    data
        Name of the input, for provenance.
    overwrite
        Replace a result of another job, and begin anew where another was stopped.
    batch_size, shard_cells
        Cells of a network call and of an output shard; ``None``: found by a trial. An unfinished job keeps its own.
    precision
        ``float32``, ``bfloat16``; ``auto``: the second on a GPU.
    command, notify
        For provenance; receives messages about what is written.

    Raises
    ------
    FileExistsError
        Another job is being, or was, written there: the message names its process, or what differs.
    OSError
        The disk cannot hold the result, or is full: the message says how to continue.
    ValueError
        Another suffix, or what the task refuses.
    """
    out = named(out)
    check_options(precision, batch_size, shard_cells)
    options: dict[str, Any] = {
        "overwrite": overwrite, "progress": progress, "batch_size": batch_size, "shard_cells": shard_cells,
        "command": command, "notify": notify,
    }  # fmt: skip
    engine = OneProcess(task, data, precision)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return ranks.run(engine, out, **options)
    return carry_out(engine, out, **options)
