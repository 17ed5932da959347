"""The training loop. Everything random is a function of (seed, step, place in the global batch)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from distdiff.data.feed.loader import Loading, loader
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.survival import Survival
from distdiff.rng import borrowed, generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.training import checkpoint, graphed, noise
from distdiff.training import engine as engines
from distdiff.training.compiled import Law, compile_denoiser, compile_law
from distdiff.training.ema import Ema
from distdiff.training.optim import Optim
from distdiff.training.peers import Peers
from distdiff.training.stop import LEAVE, Stop, Stopped
from distdiff.training.times import Times
from distdiff.training.trace import NAME as TRACE
from distdiff.training.trace import trace
from distdiff.training.trouble import memory_explained
from distdiff.training.window import Waited, Window, read
from distdiff.types import Cells, Condition, Tensor

MOST = 10**15
"""Cells of a run, at most: its steps are counted in 64 bits, and in the floating-point numbers of the schedule."""


@dataclass(frozen=True)
class Training:
    """What a run does, in cells.

    Parameters
    ----------
    out
        Folder of the run: checkpoints, the best model.
    cells
        Training cells to see in all (with repeats).
    batch
        Cells of a step over all processes; ``auto`` in YAML, 0 here: found by a search (see
        :mod:`~distdiff.training.fit`), and part of the config from then on.
    grain
        Cells that share a noise generator; it divides each process's share of the batch, so that any number of
        processes sees the same noise.
    accumulate
        Passes that a process's share of a step is cut into, to need less memory; the result is the same.
    eval_cells, checkpoint_cells
        Validate, and save, each time this many cells have been seen.
    checkpoint_minutes
        Save also when this many minutes have passed since the last save; training waits for a copy alone.
    keep
        Newest checkpoints that stay, besides the first one since the best validation.
    minutes
        Save and leave after so many minutes of training (0: a SLURM job leaves before its end, others never).
    patience
        Validations without a better score after which training stops; it and ``cells`` may change when a run is
        continued, and the learning rate then follows the new length.
    label_dropout
        Share of cells trained without their labels (guidance needs some; CountsDiff, section 3.4).
    precision
        ``auto``: bf16 where the device is a GPU that has it, else float32; ``fp16`` scales its losses; ``tf32`` is
        float32 whose matrix products a GPU may round to 10 bits.
    compile
        ``torch.compile`` the network and the loss, where it can be (see :mod:`~distdiff.training.compiled`).
    graph
        Replay the step as one CUDA graph (see :mod:`~distdiff.training.graphed`): one GPU, networks of one shape.
    noise
        ``streams``: torch's generators, one for ``grain`` cells. ``rows``: numbers by the cell's place in the run, the
        same for any ``grain``; on a GPU by one kernel a draw instead of one for ``grain`` cells (needs triton).
    trace
        Write a profiler's trace of a few steps of the main process to ``out`` (see :mod:`~distdiff.training.trace`).
    start
        A trained model (folder, ``models:/`` address) whose weights to start from; those of genes follow their names.
    resume
        ``auto`` continues the newest checkpoint in ``out``; ``never``; or the path of one, where ``optim`` may differ.
    """

    out: str = "runs/distdiff"
    cells: int = 50_000
    batch: int = 128
    grain: int = 32
    accumulate: int = 1
    eval_cells: int = 5_000
    checkpoint_cells: int = 20_000
    checkpoint_minutes: float = 10.0
    keep: int = 2
    minutes: float = 0.0
    patience: int = 5
    label_dropout: float = 0.2
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    compile: bool = False
    graph: bool = False
    noise: Literal["streams", "rows"] = "streams"
    trace: bool = False
    start: str = ""
    resume: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 0:
            raise ValueError(f"train.batch must be a number of cells or auto, got {self.batch}")
        for name in ("cells", "grain", "accumulate", "eval_cells", "checkpoint_cells", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not self.out or not self.resume:
            raise ValueError("train.out must be a folder, and train.resume auto, never or a checkpoint; got nothing")
        if self.cells > MOST or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"train.cells must be at most {MOST:,} and train.seed in [0, 2^63), got {self.cells} and {self.seed}"
            )
        if not (self.checkpoint_minutes > 0 and self.minutes >= 0):
            raise ValueError(
                f"train.checkpoint_minutes must be above 0 and train.minutes not below, got {self.checkpoint_minutes} "
                f"and {self.minutes}"
            )
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"train.label_dropout must lie in [0, 1], got {self.label_dropout}")

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.cells / self.batch)


@dataclass
class Progress:
    """What a resumed run must know besides weights.

    ``judge`` names the validation number that chooses the best weights: the deviance of hidden entries; the loss for a
    mixture that hides none, or a process that cannot answer for them in one call (noise prediction).
    """

    judge: str = "val/deviance"
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    bad: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    times: dict[str, Any] = field(default_factory=dict)


def train(
    store: CountStore,
    process: Process,
    denoiser: Denoiser,
    survival: Survival,
    optim: Optim,
    settings: Training,
    accelerator: Accelerator,
    *,
    identity: dict[str, Any],
    loading: Loading | None = None,
    labels: tuple[str, ...] = (),
    save_best: Callable[[Denoiser, dict[str, float]], None],
    standing: Mapping[str, float] = MappingProxyType({}),
    on_log: Callable[[int, dict[str, float]], None] = lambda seen, numbers: None,
    on_step: Callable[[int, Tensor], None] = lambda step, loss: None,
    peers: Peers | None = None,
) -> Progress:
    """Train until ``settings.cells`` or until validation stops improving.

    Parameters
    ----------
    identity
        What must be equal for a checkpoint to be continued (config, data fingerprint).
    loading
        How cells come in, and in which proportions.
    save_best
        Called on the main process with the averaged weights whenever validation improves.
    standing
        Validation numbers of the weights that stand where ``save_best`` puts them; empty: there are none. If they are
        not the best ones of a run that is continued (it goes on in another folder, or from an older checkpoint), its
        next validation counts as the best so far. The main process decides.
    on_log, on_step
        ``(cells seen, numbers)`` at each log, on the main process; ``(step, loss of this process's cells)``.
    peers
        Is told how far training is.

    Raises
    ------
    ValueError
        A batch that the processes cannot share out, no training or validation cell, a checkpoint of another run.
    FloatingPointError
        A loss or a gradient that is not finite (step, rows and the way back named).
    OutOfMemory
        A step does not fit (what would help is named).
    Stopped
        Asked to leave, and saved.
    """
    share = _share(settings, accelerator.num_processes)
    index, held_out = _splits(store)
    folder = Path(settings.out) / "checkpoints"
    found, launch = checkpoint.share(accelerator, folder, settings.resume)
    imputes = survival.hidden + survival.two_level > 0 and process.relative
    progress = Progress("val/deviance" if imputes else "val/loss")
    ema = Ema(denoiser.to(accelerator.device), optim.ema)
    like, changed = denoiser.state_dict(), settings.resume != "auto"
    saved = checkpoint.load(found, identity, changed=changed, like=like) if found else None
    if saved:
        denoiser.load_state_dict(saved.weights)
        ema.model.load_state_dict(saved.ema)
        progress = saved.progress(Progress)
        if not broadcast_object_list([standing.get(progress.judge) == progress.best])[0]:
            progress.best, progress.bad = math.inf, 0
        accelerator.print(f"continuing {found} at step {progress.step} of {settings.steps}")
    law: Law = partial(_law, process)
    if peers is not None:
        peers.where = lambda: (
            f"after step {progress.step} of {settings.steps}; the last checkpoint is "
            f"{checkpoint.latest(folder) or 'not written yet'}"
        )
    if settings.compile:
        shape = share // settings.accumulate, len(store.genes)
        compile_denoiser(denoiser, *shape, labels)
        law = compile_law(law, process.outputs, *shape, accelerator.device)
    if settings.graph:
        graphed.check(accelerator, denoiser, settings.accumulate)
    engine = engines.prepare(accelerator, denoiser, optim, share=share, accumulate=settings.accumulate)
    times = Times(survival.time, settings.batch, settings.seed, accelerator.device)
    if saved:
        engine.load(saved.optimizer)
        times.load(progress.times, accelerator)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved.state["scaler"])
    saved = None  # all in place: its tensors are not needed twice
    losses_of = partial(_of_cells, process, engine.network, law=law)
    graph = graphed.Step(engine, losses_of, labels) if settings.graph else None

    loading = loading or Loading()
    plan = loading.plan(store, index, settings.batch, settings.seed)
    store, resident, said = loading.keep(store, accelerator.device, _local_ranks())
    if said:
        accelerator.print(f"distdiff train: {said}")
    batches = loader(
        store, plan, index, start=progress.step, stop=settings.steps, rank=accelerator.process_index,
        world=accelerator.num_processes, labels=labels, ahead=loading.ahead, device=accelerator.device,
        resident=resident, scheduler=loading.scheduler,
    )  # fmt: skip
    total = settings.steps * settings.batch
    bar = tqdm(
        total=total, initial=progress.step * settings.batch, unit=" cells", unit_scale=True, desc="train",
        disable=not accelerator.is_main_process, mininterval=1.0,
    )  # fmt: skip
    stop = Stop(settings.checkpoint_minutes, settings.minutes)
    writer = checkpoint.Writer(
        folder, keep=settings.keep, process=accelerator.process_index, processes=accelerator.num_processes,
        launch=launch,
    )  # fmt: skip
    waited = Waited(batches, named=settings.trace)
    window, asked = Window(progress.step, accelerator.device), 0
    explained = memory_explained(settings, share, accelerator.device)
    traced = trace(
        Path(settings.out) / TRACE if settings.trace and accelerator.is_main_process else None, accelerator.device
    )
    with contextlib.closing(batches), bar, stop, writer, explained, traced as stepped:
        for step, cells in waited:
            if progress.bad >= settings.patience:
                break
            counts, named = cells.counts.to(accelerator.device, non_blocking=True), cells.labels.to(accelerator.device)
            cells = Cells(counts, named, cells.rows)  # which rows they are is asked on the CPU alone
            engine.rate(optim.rate(step * settings.batch, total))
            first = step * settings.batch + accelerator.process_index * share
            if graph is not None:
                noised = noise.draw(process, survival, times, cells, settings, step, first)
                losses, norm = graph(noised)
                losses = noised.weighted(losses, times)
            else:
                parts = []
                for start in range(0, share, share // settings.accumulate):
                    part = cells[start : start + share // settings.accumulate]
                    with engine.one_pass(), borrowed(cells.counts.device, settings.seed, "dropout", first + start):
                        loss = _loss(
                            process, engine.network, survival, times, part, settings, step, first + start, law=law
                        )
                        accelerator.backward(loss.mean())
                    parts.append(loss.detach())
                losses, norm = torch.cat(parts), engine.step()
            if ema.due(step):
                with engine.weights() as weights:
                    ema.update(weights, step)
            window.add(losses, norm, cells.rows)
            on_step(step, window.losses[-1].mean())
            progress.step = step + 1
            bar.update(settings.batch)
            stepped()

            done, asked = progress.step == settings.steps, stop.agreed()
            if done or _crossed(progress.step, settings.batch, settings.eval_cells):
                means = window.means(accelerator, waited.lap())
                times.update(accelerator)
                scores = validate(store, held_out, process, ema.model, survival, accelerator, labels, settings)
                numbers = read({**means, **scores})  # nowhere else between two logs the device is waited for
                if numbers.pop("bad"):
                    window.check(accelerator, folder)
                numbers["cells_per_second"] = window.speed(settings.batch)
                window = Window(progress.step, accelerator.device)
                _judge(progress, numbers, progress.step * settings.batch)
                if accelerator.is_main_process:
                    on_log(progress.step * settings.batch, numbers)
                    if progress.bad == 0:
                        save_best(ema.model, numbers)
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", val=f"{numbers[progress.judge]:.4f}")
            done = done or progress.bad >= settings.patience
            if done or asked or _crossed(progress.step, settings.batch, settings.checkpoint_cells):
                window.check(accelerator, folder)  # weights after a loss that is not finite are not worth keeping
                progress.times = times.state(accelerator)
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                writer.save(
                    progress.step, checkpoint.snapshot(engine, ema.model, writer),
                    {**identity, "progress": vars(progress), "scaler": scaler}, progress.best_step,
                )  # fmt: skip
                stop.saved()
            if asked == LEAVE:
                break
    accelerator.wait_for_everyone()
    if progress.bad >= settings.patience:
        accelerator.print(
            f"distdiff train: stopped early after step {progress.step} of {settings.steps}: {progress.judge} was not "
            f"better than {progress.best:.4f}, that of step {progress.best_step}, in {progress.bad} validations "
            f"(train.patience={settings.patience}; the same command with a larger one goes on)"
        )
    if asked == LEAVE:
        raise Stopped(
            f"stopped by {stop.reason or 'another process'} after step {progress.step} of {settings.steps}; saved in "
            f"{checkpoint.latest(folder)}, the same command goes on"
        )
    return progress


def _splits(store: CountStore) -> tuple[np.ndarray, np.ndarray]:
    index, held_out = store.rows("train"), store.rows("val")
    if not len(index) or not len(held_out):
        raise ValueError(f"{len(index)} training and {len(held_out)} validation cells: rebuild with another --split")
    return index, held_out


def _local_ranks() -> int:
    """Processes on this machine, as the launcher tells."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _share(settings: Training, world: int) -> int:
    if not settings.batch:
        raise ValueError("train.batch=auto must be settled before training (distdiff.training.fit.settled)")
    if settings.batch % (world * settings.accumulate * settings.grain):
        passes = f" in {settings.accumulate} passes" if settings.accumulate > 1 else ""
        raise ValueError(
            f"train.batch={settings.batch} cannot be shared by {world} processes{passes} in groups of train.grain="
            f"{settings.grain} cells; use a multiple of {world * settings.accumulate * settings.grain}, or a smaller "
            "grain"
        )
    return settings.batch // world


def _crossed(steps: int, batch: int, every: int) -> bool:
    """Whether the last of ``steps`` steps took the cells seen over a multiple of ``every``."""
    return steps * batch // every > (steps - 1) * batch // every


def _loss(
    process: Process, network: Callable[..., Tensor], survival: Survival, times: Times, cells: Cells,
    settings: Training, step: int, first: int, *, law: Law | None = None,
) -> Tensor:  # fmt: skip
    """Loss of each cell ``[b]``, weighted mean over thinned genes; each ``grain`` cells have noise of their own."""
    noised = noise.draw(process, survival, times, cells, settings, step, first)
    losses = _of_cells(process, network, noised.x_0, noised.x, noised.p, noised.cond, law=law)
    return noised.weighted(losses, times)


def _of_cells(
    process: Process, network: Callable[..., Tensor], x_0: Tensor, x: Tensor, p: Tensor, cond: Condition, *,
    law: Law | None = None,
) -> Tensor:  # fmt: skip
    """Loss of each cell ``[b]``: the mean over its thinned genes; ``law`` is `_law`, maybe compiled."""
    return (law or partial(_law, process))(network(*process.encode(x, p), cond), x_0, x, p)


def _law(process: Process, raw: Tensor, x_0: Tensor, x: Tensor, p: Tensor) -> Tensor:
    entries = process.loss(process.natural(raw, x, p), x_0, x, p)
    return entries.sum(1) / (p < 1).sum(1).clamp_min(1)


@torch.no_grad()
def validate(
    store: CountStore,
    rows: np.ndarray,
    process: Process,
    denoiser: Denoiser,
    survival: Survival,
    accelerator: Accelerator,
    labels: tuple[str, ...],
    settings: Training,
    *,
    block: int = 256,
    limit: int = 8192,
) -> dict[str, Tensor]:
    """Score held-out cells, no labels withheld.

    ``val/deviance``: mean Poisson deviance of an entry when half of them are hidden outright (one call); ``val/loss``:
    the training loss under the mixture of ``survival``, times even. Masks and noise depend on the seed and the rows
    alone; blocks of rows go round the processes; sums are reduced, then divided. The answer stays on the device.
    """
    rows = rows[:: max(1, -(-len(rows) // limit))]
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for turn, start in enumerate(range(0, len(rows), block)):
        if turn % accelerator.num_processes != accelerator.process_index:
            continue
        cells = store.cells(rows[start : start + block], labels)
        hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(settings.seed, "validate", start))
        device = accelerator.device
        cells, p = cells.to(device), torch.from_numpy(~hidden).to(device, non_blocking=True).float()
        rng = generator(settings.seed, "validate", start, device=device)
        x_0, prior = process.enter(cells.counts, rng=rng), process.prior(tuple(p.shape), rng=rng)  # type: ignore[arg-type]
        x = torch.where(p == 1, x_0, prior)
        eta = predictor(process, denoiser, cells.labels)(x, p)
        target = torch.from_numpy(np.flatnonzero(hidden)).to(device, non_blocking=True)
        mean = process.mean(eta, x, p).flatten()[target].clamp_min(1e-6).double()
        truth = cells.counts.flatten()[target].double()
        deviance = 2 * (mean - truth + torch.xlogy(truth, truth / mean))
        t = ((torch.arange(len(cells), device=rng.device) + 0.5) / len(cells)).unsqueeze(1)
        p, _ = survival.draw(process.schedule, t, p.shape[1], rng=rng)
        losses = _of_cells(process, denoiser, x_0, process.forward(x_0, 1.0, p, rng=rng), p, cells.labels)
        entries, n = (torch.full_like(sums[0], number) for number in (len(target), len(cells)))
        sums += torch.stack((deviance.sum(), entries, losses.double().sum(), n))
    deviance, targets, loss, n = accelerator.reduce(sums, "sum")
    return {"val/deviance": deviance / targets, "val/loss": loss / n}


def _judge(progress: Progress, numbers: dict[str, float], seen: int) -> None:
    score = numbers[progress.judge]
    progress.history.append({"cells": seen, **numbers})
    if score < progress.best:
        progress.best, progress.best_step, progress.bad = score, progress.step, 0
    else:
        progress.bad += 1
