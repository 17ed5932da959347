"""The training loop. Everything random is a function of (seed, step, position in the global batch)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from distdiff.data.feed.loader import loader
from distdiff.denoise import Denoiser
from distdiff.rng import borrowed
from distdiff.training import checkpoint, engine, graphed, losses
from distdiff.training.compiled import compile_denoiser, compile_law
from distdiff.training.ema import Ema
from distdiff.training.engine import Engine
from distdiff.training.losses import Law
from distdiff.training.noise import Noise
from distdiff.training.peers import Peers
from distdiff.training.progress import Progress
from distdiff.training.settings import Recipe
from distdiff.training.stop import GO_ON, LEAVE, Stop, Stopped
from distdiff.training.times import Times
from distdiff.training.trace import NAME as TRACE
from distdiff.training.trace import trace
from distdiff.training.trouble import memory_explained
from distdiff.training.validation import scores
from distdiff.training.window import Waited, Window, read
from distdiff.types import Cells, Tensor
from distdiff.waits import Pace, print_line


@dataclass(frozen=True)
class Hooks:
    """What a run calls, and what it finds where the best model goes.

    Parameters
    ----------
    save_best
        Called on the main process with the averaged weights whenever validation improves.
    existing_scores
        Validation numbers of the weights that ``save_best`` would replace; empty: there are none. If they are not the
        best ones of a run that is continued (in another folder, or from an older checkpoint), its next validation
        counts as the best so far. Those of the main process count.
    show
        Whether a bar is shown, and the time that the run will take.
    on_log, on_step
        ``(cells seen, numbers)`` at each log, on the main process; ``(step, loss of this process's cells)``.
    peers
        Watches the other machines; its message when one is lost names the step and the last checkpoint.
    """

    save_best: Callable[[Denoiser, dict[str, float]], None]
    existing_scores: Mapping[str, float] = field(default_factory=dict)
    on_log: Callable[[int, dict[str, float]], None] = lambda seen, numbers: None
    on_step: Callable[[int, Tensor], None] = lambda step, loss: None
    peers: Peers | None = None
    show: bool = True


@dataclass
class Run:
    """A run between its first step and its last: network, optimiser, batches, and what is measured on the way."""

    recipe: Recipe
    accelerator: Accelerator
    hooks: Hooks
    identity: Mapping[str, Any]
    held_out: np.ndarray
    progress: Progress
    ema: Ema
    engine: Engine
    noise: Noise
    law: Law
    graph: graphed.Step | None
    waited: Waited
    writer: checkpoint.Writer
    stop: Stop
    window: Window
    bar: tqdm[Any]
    pace: Pace

    def print_line(self, text: str) -> None:
        """A line above the bar, of the main process."""
        if self.hooks.show and self.accelerator.is_main_process:
            print_line(text)

    @property
    def cells_seen(self) -> int:
        """Training cells seen so far, by all processes."""
        return self.progress.step * self.recipe.settings.batch

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[], None]]:
        """Watch signals, write checkpoints and the trace, explain errors; yields what ends a step in the trace."""
        settings, device = self.recipe.settings, self.accelerator.device
        path = Path(settings.out) / TRACE if settings.trace and self.accelerator.is_main_process else None
        explained = memory_explained(settings, settings.share(self.accelerator.num_processes), device)
        batches, traced = contextlib.closing(self.waited.batches), trace(path, device)
        with batches, self.bar, self.stop, self.writer, explained, traced as end_of_step:
            yield end_of_step


def train(recipe: Recipe, accelerator: Accelerator, hooks: Hooks, *, identity: Mapping[str, Any]) -> Progress:
    """Train until ``settings.cells``, or until validation cells score worse than they did.

    Parameters
    ----------
    recipe
        Cells, law, network and settings.
    hooks
        What to call on the way.
    identity
        What must be equal for a checkpoint to be continued (config, data fingerprint).

    Raises
    ------
    ValueError
        A batch that the processes cannot share out, no training or validation cell, a checkpoint of another run.
    FloatingPointError
        A loss or a gradient that is not finite (step, rows and the way back named).
    OutOfMemory
        A step does not fit (what would help is named).
    Stopped
        Stopped by a signal or a time limit, and saved.
    """
    settings, run = recipe.settings, prepare(recipe, accelerator, hooks, identity)
    progress, request = run.progress, GO_ON
    with run.running() as end_of_step:
        for number, cells in run.waited:
            if progress.bad >= settings.patience:
                break
            loss, norm = step(run, number, cells)
            run.window.add(loss, norm, cells.rows)
            hooks.on_step(number, loss.mean())
            progress.step = number + 1
            run.bar.update(settings.batch)
            if expected := run.pace.after(progress.step):
                run.print_line(f"distdiff train: {expected}")
            end_of_step()

            request, last = run.stop.agreed(), progress.step == settings.steps
            if last or settings.crosses(progress.step, settings.eval_cells):
                validate(run)
            last = last or progress.bad >= settings.patience
            if last or request != GO_ON or settings.crosses(progress.step, settings.checkpoint_cells):
                save(run)
            if request == LEAVE:
                break
    accelerator.wait_for_everyone()
    _report_end(run, request)
    return progress


def prepare(recipe: Recipe, accelerator: Accelerator, hooks: Hooks, identity: Mapping[str, Any]) -> Run:
    """Put network, optimiser and batches where the newest checkpoint left them, or where a run begins."""
    settings, optim = recipe.settings, recipe.optim
    share = settings.share(accelerator.num_processes)
    index, held_out = _splits(recipe)
    folder = Path(settings.out) / "checkpoints"
    found, launch = checkpoint.share(accelerator, folder, settings.resume)
    ema = Ema(recipe.denoiser.to(accelerator.device), optim.ema)
    saved, progress = _restore(recipe, accelerator, hooks, identity, found, ema)
    if hooks.peers is not None:
        hooks.peers.where = partial(_progress_text, progress, settings.steps, folder)
    law = _compiled(recipe, accelerator, share)
    graph = graphed.wanted(settings.graph, accelerator, recipe.denoiser, settings.accumulate)
    prepared = engine.prepare(accelerator, recipe.denoiser, optim, share=share, accumulate=settings.accumulate)
    times = Times(recipe.survival.time, settings.batch, settings.seed, accelerator.device)
    if saved:
        prepared.load(saved.optimizer)
        times.load(progress.times, accelerator)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved.state["scaler"])
    saved = None  # all in place: its tensors are not needed twice
    if shares := recipe.loading.shares(recipe.store, index, recipe.labels):
        shares = shares[0], shares[1].to(accelerator.device)
    of_states = partial(losses.of_states, recipe.process, prepared.network, law=law)
    return Run(
        recipe, accelerator, hooks, identity, held_out, progress, ema, prepared,
        noise=Noise(recipe.process, recipe.survival, times, settings, shares), law=law,
        graph=graphed.Step(prepared, of_states, recipe.labels, must=settings.graph is True) if graph else None,
        waited=Waited(_batches(recipe, accelerator, index, progress.step), named=settings.trace),
        writer=checkpoint.Writer(
            folder, keep=settings.keep, process=accelerator.process_index, processes=accelerator.num_processes,
            launch=launch,
        ),
        stop=Stop(settings.checkpoint_minutes, settings.minutes),
        window=Window(progress.step, accelerator.device),
        bar=tqdm(
            total=settings.steps * settings.batch, initial=progress.step * settings.batch, unit=" cells",
            unit_scale=True, desc="train", disable=not (hooks.show and accelerator.is_main_process), mininterval=1.0,
        ),
        pace=Pace(settings.steps, settings.batch),
    )  # fmt: skip


def step(run: Run, number: int, cells: Cells) -> tuple[Tensor, Tensor]:
    """Take step ``number`` on this process's cells: their weighted losses ``[b]``, and the gradient's norm."""
    recipe, settings, accelerator = run.recipe, run.recipe.settings, run.accelerator
    counts, labels = cells.counts.to(accelerator.device, non_blocking=True), cells.labels.to(accelerator.device)
    cells = Cells(counts, labels, cells.rows)  # (row numbers are needed on the CPU alone)
    run.engine.rate(recipe.optim.rate(number * settings.batch, settings.steps * settings.batch))
    first = number * settings.batch + accelerator.process_index * len(cells)
    if run.graph is not None:
        noised = run.noise.draw(cells, number, first)
        unweighted, norm = run.graph(noised)
        loss = noised.weighted(unweighted, run.noise.times)
    else:
        parts, size = [], len(cells) // settings.accumulate
        for start in range(0, len(cells), size):
            part, position = cells[start : start + size], first + start
            with run.engine.one_pass(), borrowed(counts.device, settings.seed, "dropout", position):
                loss = losses.of_cells(run.noise, run.engine.network, part, number, position, law=run.law)
                accelerator.backward(loss.mean())
            parts.append(loss.detach())
        loss, norm = torch.cat(parts), run.engine.step()
    if run.ema.due(number):
        with run.engine.weights() as weights:
            run.ema.update(weights, number)
    return loss, norm


def validate(run: Run) -> None:
    """Score the averaged weights on held-out cells, log all numbers since the last log, keep the best weights."""
    progress, accelerator = run.progress, run.accelerator
    means = run.window.means(accelerator, run.waited.lap())
    run.noise.times.update(accelerator)
    scored = scores(run.recipe, run.held_out, run.ema.model, accelerator)
    averages = {**means, **{name: cells.mean() for name, cells in scored.items()}}
    numbers, by_cell = read(averages, scored[progress.judge])  # the only wait for the device
    if numbers.pop("bad"):
        run.window.check(accelerator, run.writer)
    numbers["cells_per_second"] = run.window.speed(run.recipe.settings.batch)
    run.window = Window(progress.step, accelerator.device)
    progress.record(numbers, run.cells_seen, by_cell)
    if accelerator.is_main_process:
        run.hooks.on_log(run.cells_seen, numbers)
        if progress.improved:
            run.hooks.save_best(run.ema.model, numbers)
    run.bar.set_postfix(loss=f"{numbers['loss']:.4f}", val=f"{numbers[progress.judge]:.4f}")


def save(run: Run) -> None:
    """Write a checkpoint, unless a loss or a gradient since the last log is not finite."""
    accelerator, progress = run.accelerator, run.progress
    run.window.check(accelerator, run.writer)
    progress.times = run.noise.times.state(accelerator)
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    run.writer.save(
        progress.step, checkpoint.snapshot(run.engine, run.ema.model, run.writer),
        {**run.identity, "progress": vars(progress), "scaler": scaler}, progress.best_step,
    )  # fmt: skip
    run.stop.saved()


HELD = 20
"""Numbers of 32 bits that a step keeps for every entry of its cells, at least."""


def check(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse what :func:`train` would, before anything is written.

    Raises
    ------
    ValueError
        A batch that the processes cannot share out or that the memory cannot hold, strata or weights that do not fit
        the store, no training or validation cell, a graph of what can be none, or a checkpoint that is not there.
    """
    store, settings, processes = recipe.store, recipe.settings, accelerator.num_processes
    index, _ = _splits(recipe)
    share = settings.share(processes) if settings.batch else settings.grain
    copies = HELD if accelerator.device.type == "cpu" else 1
    need, free = 4 * copies * share * len(store.genes), psutil.virtual_memory().available
    if need > free:
        raise ValueError(
            f"train.{'batch' if settings.batch else 'grain'}: {share:,} cells of {len(store.genes):,} genes need "
            f"{need / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB are free; choose a smaller number"
        )
    recipe.loading.plan(store, index, share * processes, settings.seed)
    graphed.wanted(settings.graph, accelerator, recipe.denoiser, settings.accumulate)
    if settings.resume not in ("auto", "never"):
        checkpoint.find(settings.resume, Path(settings.out))


def _splits(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    index, held_out = recipe.store.rows("train"), recipe.store.rows("val")
    if not len(index) or not len(held_out):
        raise ValueError(
            f"{len(index)} training and {len(held_out)} validation cells: rebuild the store with another split="
        )
    return index, held_out


def _restore(
    recipe: Recipe, accelerator: Accelerator, hooks: Hooks, identity: Mapping[str, Any], found: Path | None, ema: Ema
) -> tuple[checkpoint.Saved | None, Progress]:
    """Read the checkpoint that is continued, if there is one, and take its weights and its progress."""
    imputes = recipe.survival.hidden + recipe.survival.two_level > 0 and recipe.process.relative
    if found is None:
        return None, Progress("val/deviance" if imputes else "val/loss")
    like, changed = recipe.denoiser.state_dict(), recipe.settings.resume != "auto"
    saved = checkpoint.load(found, identity, changed=changed, like=like)
    recipe.denoiser.load_state_dict(saved.weights)
    ema.model.load_state_dict(saved.ema)
    progress = saved.progress(Progress)
    if not broadcast_object_list([hooks.existing_scores.get(progress.judge) == progress.best])[0]:
        progress.best, progress.bad = math.inf, 0
    accelerator.print(f"continuing {found} at step {progress.step} of {recipe.settings.steps}")
    return saved, progress


def _compiled(recipe: Recipe, accelerator: Accelerator, share: int) -> Law:
    """The process's loss; it and the network are compiled where the settings want it."""
    law = losses.law_of(recipe.process)
    if not recipe.settings.compile:
        return law
    shape = share // recipe.settings.accumulate, len(recipe.store.genes)
    compile_denoiser(recipe.denoiser, *shape, recipe.labels)
    return compile_law(law, recipe.process.outputs, *shape, accelerator.device)


def _batches(
    recipe: Recipe, accelerator: Accelerator, index: np.ndarray, start: int
) -> Generator[tuple[int, Cells], None, None]:
    """The cells of this process at each step from ``start`` on."""
    settings, loading = recipe.settings, recipe.loading
    plan = loading.plan(recipe.store, index, settings.batch, settings.seed)
    processes_here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # (the launcher sets it)
    store, resident, message = loading.keep(recipe.store, accelerator.device, processes_here)
    if message:
        accelerator.print(f"distdiff train: {message}")
    return loader(
        store, plan, index, start=start, stop=settings.steps, rank=accelerator.process_index,
        world=accelerator.num_processes, labels=recipe.labels, ahead=loading.ahead, device=accelerator.device,
        resident=resident, scheduler=loading.scheduler,
    )  # fmt: skip


def _progress_text(progress: Progress, steps: int, folder: Path) -> str:
    return (
        f"after step {progress.step} of {steps}; the last checkpoint is "
        f"{checkpoint.latest(folder) or 'not written yet'}"
    )


def _report_end(run: Run, request: int) -> None:
    """Say why training ended before its last step."""
    progress, settings = run.progress, run.recipe.settings
    if progress.bad >= settings.patience and progress.step < settings.steps:
        run.accelerator.print(
            f"distdiff train: stopped early after step {progress.step} of {settings.steps}: {progress.judge} was worse "
            f"than {progress.best:.4f}, that of step {progress.best_step}, by more than chance in {progress.bad} "
            f"validations in a row "
            f"(train.patience={settings.patience}; the same command with a larger one goes on)"
        )
    if request == LEAVE:
        raise Stopped(
            f"stopped by {run.stop.reason or 'another process'} after step {progress.step} of {settings.steps}; saved "
            f"in {checkpoint.latest(run.writer.folder)}, the same command goes on"
        )
