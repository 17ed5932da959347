"""What reads ``auto`` in ``train``: length by the data; batch by a search on the device, kept while the run goes on."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from distdiff import files, received
from distdiff.data.feed.loader import SHARE, memory_allowed, numbered
from distdiff.training import losses
from distdiff.training.noise import Noise
from distdiff.training.settings import VALIDATIONS, Recipe, Training, length
from distdiff.training.times import Times
from distdiff.training.trouble import OutOfMemory, ran_out
from distdiff.types import Condition, Tensor

GAIN = 1.05
"""A size that is not faster by this factor than the one of half as many cells is not worth having."""

FEWEST = 300
"""Steps that a run keeps however fast a larger batch would be: fewer teach little."""

RECORD = "batch.json"
"""Where a run's folder keeps the number."""

TRIES = 3
"""Steps timed at each size, after one that is not; the fastest counts."""


def settled(recipe: Recipe, accelerator: Accelerator) -> Training:
    """The recipe's settings with length and batch in numbers, the same on every process; no weight is touched.

    The batch is written to ``batch.json`` in the run's folder, where a run that goes on finds it again. A number that
    was given stays.

    Raises
    ------
    OutOfMemory
        Not even the smallest batch fits.
    """
    settings = _long(recipe.settings, len(recipe.store.rows("train")), accelerator)
    if settings.batch:
        return settings
    recipe = replace(recipe, settings=settings)
    known = _record(settings)
    found = [0]
    if accelerator.is_main_process:
        if settings.resume != "never" and known.exists():
            number = received.json_of(known).get("batch")
            if type(number) is not int or number < 1:
                raise ValueError(f"{known}: batch must be a number of cells, is {number!r}; remove the file")
            found, why = [number], f"as this run began with ({known})"
        else:
            with _margin(accelerator.device):
                speeds, why = _Trial(recipe, accelerator).search()
            found = [best(speeds) * settings.accumulate * accelerator.num_processes]
            with files.whole(Path(settings.out) / RECORD, overwrite=True) as temporary:
                temporary.write_text(json.dumps({"batch": found[0], "cells_per_second": speeds}, indent=1))
        accelerator.print(f"distdiff train: train.batch={found[0]}, {why}")
    broadcast_object_list(found)
    return replace(settings, batch=found[0])


def _long(settings: Training, cells: int, accelerator: Accelerator) -> Training:
    """The settings with the length of a run on so many training cells, which is told."""
    seen = settings.cells or length(cells)
    if not settings.cells:
        accelerator.print(
            f"distdiff train: train.cells={seen}, {seen / cells:.3g} passes over {cells:,} training cells"
        )
    return replace(settings, cells=seen, eval_cells=settings.eval_cells or max(1, seen // VALIDATIONS))


def search(seconds: Callable[[int], float], start: int, most: int) -> tuple[dict[int, float], str]:
    """Cells per second at ``start``, ``2 start``, ... cells, and why it went no further.

    Parameters
    ----------
    seconds
        Time of a step of so many cells; raises torch's out-of-memory errors.
    most
        The largest number of cells worth trying.

    Raises
    ------
    OutOfMemory
        ``start`` cells do not fit.
    """
    speeds: dict[int, float] = {}
    size, why = start, ""
    while not why:
        try:
            speeds[size] = size / seconds(size)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            why = f"{size} need more memory"
        if size // 2 in speeds and size in speeds and speeds[size] < GAIN * speeds[size // 2]:
            why = f"{size} gain nothing"
        size *= 2
        if not why and size > most:
            why = f"{size} would leave fewer than {FEWEST} steps, or are more than there are"
    if not speeds:
        raise OutOfMemory(
            f"train.batch=auto: not even {start} cells a pass (train.grain) fit: give a smaller train.grain, "
            "denoiser.checkpoint=true where the denoiser has it, or train.precision=bf16"
        )
    measured = ", ".join(f"{n}: {speed:,.0f}" for n, speed in speeds.items())
    return speeds, f"after a search (cells a pass: cells/s on one process: {measured}; {why})"


def best(speeds: dict[int, float]) -> int:
    """The smallest size that is about as fast as the fastest."""
    return min(n for n, speed in speeds.items() if speed * GAIN > max(speeds.values()))


class _Trial:
    """Whole training steps of any size on a copy of the network: noise, both passes, clipping, optimiser."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        settings, self.rows = recipe.settings, recipe.store.rows("train")
        passes = accelerator.num_processes * settings.accumulate
        self.most = max(settings.grain, min(settings.cells // FEWEST, len(self.rows)) // passes)
        self.denoiser = copy.deepcopy(recipe.denoiser).to(accelerator.device)
        self.optimizer = recipe.optim.build(self.denoiser)
        self.before = psutil.Process().memory_info().rss

    def search(self) -> tuple[dict[int, float], str]:
        """See :func:`search`."""
        return search(self.seconds, self.recipe.settings.grain, self.most)

    def seconds(self, cells: int) -> float:
        """The fastest of a few steps of so many cells."""
        device = self.accelerator.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            self._would_fit()
        recipe, settings = self.recipe, replace(self.recipe.settings, batch=cells)
        batch = recipe.store.cells(np.resize(self.rows, cells), recipe.labels).to(device)
        times = Times(recipe.survival.time, cells, settings.seed, device)
        noise = Noise(recipe.process, recipe.survival, times, settings)

        def network(x: Tensor, p: Tensor, cond: Condition) -> Tensor:
            with self.accelerator.autocast():
                return self.denoiser(x, p, cond).float()

        took = []
        for step in range(1 + TRIES):
            began = time.perf_counter()
            losses.of_cells(noise, network, batch, step, step * cells).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), recipe.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append(time.perf_counter() - began)
        return min(took[1:])

    def _would_fit(self) -> None:
        """A CPU's memory is promised without end and then the process is killed: so stop at what is there."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before
        if 2 * peak > psutil.virtual_memory().available:
            raise torch.OutOfMemoryError("not enough memory for twice the cells")


@contextlib.contextmanager
def _margin(device: torch.device) -> Iterator[None]:
    """Leave room on a GPU for the resident copy of the counts, and for what memory in pieces loses.

    A limit that was set before (``torch.cuda.set_per_process_memory_fraction``) stays one.
    """
    if device.type != "cuda":
        yield
        return
    device, allowed = numbered(device), memory_allowed(device)
    torch.cuda.set_per_process_memory_fraction(allowed * (0.95 - SHARE), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(allowed, device)
        torch.cuda.empty_cache()


def _record(settings: Training) -> Path:
    """Where the number of the run that would be continued stands."""
    elsewhere = settings.resume not in ("auto", "never")
    return (Path(settings.resume).parent.parent if elsewhere else Path(settings.out)) / RECORD
