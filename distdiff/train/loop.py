"""The training loop. Everything random is a function of (seed, step, place in the global batch)."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from distdiff.data.loader import Loading, loader
from distdiff.data.masks import mcar
from distdiff.data.store import CountStore
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.survival import Survival
from distdiff.rng import generator, numpy_generator
from distdiff.rng.stream import Streams
from distdiff.sampling import predictor
from distdiff.train import checkpoint
from distdiff.train.compiled import compile_denoiser
from distdiff.train.ema import Ema
from distdiff.train.optim import Optim
from distdiff.train.times import Times
from distdiff.types import Cells, Condition, Tensor


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
        Cells of a step over all processes.
    grain
        Cells that share a noise generator; it divides each process's share of the batch, so that any number of
        processes sees the same noise.
    eval_cells, checkpoint_cells
        Validate, and save, each time this many cells have been seen.
    patience
        Validations without a better score after which training stops.
    label_dropout
        Share of cells trained without their labels (guidance needs some; CD 3.4).
    precision
        ``auto``: bf16 where the device is a GPU that has it, else float32.
    compile
        ``torch.compile`` the network, where it can be (see :mod:`~distdiff.train.compiled`).
    start
        A trained model (folder, ``models:/`` address) whose weights to start from; those of genes follow their names.
    resume
        ``auto`` continues the newest checkpoint in ``out``; ``never``; or a checkpoint's path.
    """

    out: str = "runs/distdiff"
    cells: int = 50_000
    batch: int = 128
    grain: int = 32
    eval_cells: int = 5_000
    checkpoint_cells: int = 20_000
    patience: int = 5
    label_dropout: float = 0.2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    start: str = ""
    resume: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("cells", "batch", "grain", "eval_cells", "checkpoint_cells", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
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
    times: list[float] = field(default_factory=list)


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
    on_log: Callable[[int, dict[str, float]], None] = lambda seen, numbers: None,
    on_step: Callable[[int, Tensor], None] = lambda step, loss: None,
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
    on_log, on_step
        ``(cells seen, numbers)`` at each log, on the main process; ``(step, loss of this process's cells)``.

    Raises
    ------
    ValueError
        A batch that the processes cannot share out, no training or validation cell, a checkpoint of another run.
    FloatingPointError
        A loss that is not finite (step and rows named).
    """
    share = _share(settings, accelerator.num_processes)
    index, held_out = _splits(store)
    optimizer = optim.build(denoiser)
    ema = Ema(denoiser.to(accelerator.device), optim.ema)
    if settings.compile:
        compile_denoiser(denoiser, share, len(store.genes), labels)
    network, optimizer = accelerator.prepare(denoiser, optimizer)
    bare, total = accelerator.unwrap_model(network), settings.steps * settings.batch
    folder = Path(settings.out) / "checkpoints"
    imputes = survival.hidden + survival.two_level > 0 and process.relative
    progress = Progress("val/deviance" if imputes else "val/loss")
    accelerator.wait_for_everyone()
    if (found := checkpoint.find(settings.resume, folder)) is not None:
        state = checkpoint.load(found, bare, ema.model, optimizer.optimizer, identity)
        progress = Progress(**state["progress"])
        accelerator.print(f"continuing {found} at step {progress.step} of {settings.steps}")

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
    bar = tqdm(
        total=total, initial=progress.step * settings.batch, unit=" cells", unit_scale=True, desc="train",
        disable=not accelerator.is_main_process, mininterval=1.0,
    )  # fmt: skip
    times = Times(survival.time, settings.batch, settings.seed, accelerator.device)
    if progress.times:
        times.load(progress.times)
    window = _Window(progress.step)
    saved = progress.step
    with contextlib.closing(batches), bar:
        for step, cells in batches:
            if progress.bad >= settings.patience:
                break
            cells = cells.to(accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = optim.rate(step * settings.batch, total)
            first = step * settings.batch + accelerator.process_index * share
            loss = _loss(process, network, survival, times, cells, settings, step, first)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(network.parameters(), optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(bare, step)
            window.add(loss.detach(), norm, cells.rows)
            on_step(step, loss.detach())
            progress.step = step + 1
            bar.update(settings.batch)

            seen, done = progress.step * settings.batch, progress.step == settings.steps
            if done or seen // settings.eval_cells > window.start * settings.batch // settings.eval_cells:
                numbers = window.drain(accelerator, settings.batch)
                times.update(accelerator)
                numbers |= validate(store, held_out, process, ema.model, survival, accelerator, labels, settings)
                window = _Window(progress.step)
                _judge(progress, numbers, seen)
                if accelerator.is_main_process:
                    on_log(seen, numbers)
                    if progress.bad == 0:
                        save_best(ema.model, numbers)
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", val=f"{numbers[progress.judge]:.4f}")
            done = done or progress.bad >= settings.patience
            if done or (progress.step - saved) * settings.batch >= settings.checkpoint_cells:
                saved = progress.step
                times.update(accelerator)  # a resumed run has lost what was recorded since, so nobody may have it
                progress.times = times.state()
                if accelerator.is_main_process:
                    state = {**identity, "progress": vars(progress)}
                    checkpoint.save(folder, progress.step, bare, ema.model, optimizer.optimizer, state)
                accelerator.wait_for_everyone()
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
    if settings.batch % world or (settings.batch // world) % settings.grain:
        raise ValueError(
            f"train.batch={settings.batch} cannot be shared by {world} processes in groups of train.grain="
            f"{settings.grain} cells; use a multiple of {world * settings.grain}, or a smaller grain"
        )
    return settings.batch // world


def _loss(
    process: Process, network: torch.nn.Module, survival: Survival, times: Times, cells: Cells, settings: Training,
    step: int, first: int,
) -> Tensor:  # fmt: skip
    """Mean over cells of the mean over thinned genes; each group of ``grain`` cells has noise of its own."""
    n, grain, device = len(cells), settings.grain, cells.counts.device
    places = range(first, first + n, grain)
    rng = Streams([generator(settings.seed, "noise", place, device=device) for place in places], grain)
    t, weight = times.draw(step, first - step * settings.batch, n, rng=rng)
    p, timed = survival.draw(process.schedule, t, cells.counts.shape[1], rng=rng)
    x_0 = process.enter(cells.counts, rng=rng)
    x = process.forward(x_0, 1.0, p, rng=rng)
    labels = cells.labels.drop(rng.uniform(n) < settings.label_dropout)
    losses = _of_cells(process, network, x_0, x, p, labels)
    times.record(t, losses.detach(), timed.squeeze(1))
    return (losses * torch.where(timed, weight, 1.0).squeeze(1)).mean()


def _of_cells(process: Process, network: torch.nn.Module, x_0: Tensor, x: Tensor, p: Tensor, cond: Condition) -> Tensor:
    """Loss of each cell ``[b]``: the mean over its thinned genes."""
    entries = process.loss(process.natural(network(*process.encode(x, p), cond), x, p), x_0, x, p)
    return entries.sum(1) / (p < 1).sum(1).clamp_min(1)


class _Window:
    """Steps since the last log; :meth:`drain` is the one place where the device is waited for."""

    def __init__(self, start: int) -> None:
        self.start, self.began = start, time.perf_counter()
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, loss: Tensor, norm: Tensor, rows: Tensor) -> None:
        self.steps.append((loss, norm, rows))

    def drain(self, accelerator: Accelerator, batch: int) -> dict[str, float]:
        """Mean loss over processes and steps, mean gradient norm, cells per second."""
        losses = accelerator.reduce(torch.stack([step[0] for step in self.steps]), "mean")
        finite = losses.isfinite()
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise FloatingPointError(
                f"the loss is {losses[bad]:g} at step {self.start + bad}, rows {self.steps[bad][2][:8].tolist()}...; "
                "go back to the last checkpoint with a smaller optim.lr"
            )
        return {
            "loss": float(losses.mean()),
            "grad_norm": float(torch.stack([step[1] for step in self.steps]).mean()),
            "cells_per_second": len(self.steps) * batch / (time.perf_counter() - self.began),
        }


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
) -> dict[str, float]:
    """Score held-out cells, no labels withheld.

    ``val/deviance``: mean Poisson deviance of an entry when half of them are hidden outright (one call); ``val/loss``:
    the training loss under the mixture of ``survival``, times even. Masks and noise depend on the seed and the rows
    alone; blocks of rows go round the processes; sums are reduced, then divided.
    """
    rows = rows[:: max(1, -(-len(rows) // limit))]
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for number, start in enumerate(range(0, len(rows), block)):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        cells = store.cells(rows[start : start + block], labels)
        hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(settings.seed, "validate", start))
        cells, p = cells.to(accelerator.device), torch.from_numpy(~hidden).float().to(accelerator.device)
        rng = generator(settings.seed, "validate", start, device=accelerator.device)
        x_0, prior = process.enter(cells.counts, rng=rng), process.prior(tuple(p.shape), rng=rng)  # type: ignore[arg-type]
        x = torch.where(p == 1, x_0, prior)
        eta = predictor(process, denoiser, cells.labels)(x, p)
        target = p == 0
        mean = process.mean(eta, x, p)[target].clamp_min(1e-6).double()
        truth = cells.counts[target].double()
        deviance = 2 * (mean - truth + torch.xlogy(truth, truth / mean))
        t = ((torch.arange(len(cells), device=rng.device) + 0.5) / len(cells)).unsqueeze(1)
        p, _ = survival.draw(process.schedule, t, p.shape[1], rng=rng)
        losses = _of_cells(process, denoiser, x_0, process.forward(x_0, 1.0, p, rng=rng), p, cells.labels)
        n = torch.tensor(len(cells), device=rng.device)
        sums += torch.stack((deviance.sum(), target.sum(), losses.double().sum(), n))
    deviance, targets, loss, n = accelerator.reduce(sums, "sum").tolist()
    return {"val/deviance": deviance / targets, "val/loss": loss / n}


def _judge(progress: Progress, numbers: dict[str, float], seen: int) -> None:
    score = numbers[progress.judge]
    progress.history.append({"cells": seen, **numbers})
    if score < progress.best:
        progress.best, progress.best_step, progress.bad = score, progress.step, 0
    else:
        progress.bad += 1
