"""distdiff's training loop against a plain PyTorch loop of the same network on tensors in memory.

    python benchmarks/train_step.py --out benchmarks/results/train_step.json [--genes 2000 --batch 128 --kind mlp]

Three contestants take turns of ``--steps`` steps within one process, each with weights and optimiser of its own:

- ``distdiff``: ``distdiff.training.loop.train`` itself on a store of sharded, coded counts: loader, plan, noise by
  address (the same for any number of processes), gradient clipping, weight average, progress bar. Validation and
  checkpoints, which happen once in thousands of cells, are left out.
- ``plain``: what one would write by hand: dense counts in memory, a random batch, one generator for its times,
  survival and thinning, network, loss, backward pass, clipping, fused AdamW.
- ``network``: the same without picking and thinning: one batch, thinned once, again and again.

A round is a turn of each; ratios are medians over rounds of (seconds of the other / seconds of distdiff), with the
quartiles. ``cpu`` is the same in seconds of the processor (all threads), which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _record
import numpy as np
import torch
from accelerate import Accelerator
from step import made

from distdiff import config
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.rng import generator
from distdiff.training import loop
from distdiff.training.compiled import compile_denoiser
from distdiff.training.settings import Recipe
from distdiff.types import Condition

Turn = Callable[[], None]


def by_hand(store: CountStore, c: config.Config, device: torch.device, *, thins: bool) -> Turn:
    """One step of the plain loop."""
    model = Model.new(store.spec(()), c.process, c.denoiser)
    process, network = model.process, model.denoiser.to(device)
    if c.train.compile:
        compile_denoiser(network, c.train.batch, len(store.genes))
    optimizer = c.optim.build(network)
    everything = store.cells(store.rows("train"), ()).counts.to(device)
    rng, none = generator(0, "plain", device=device), Condition()

    def thinned() -> tuple[torch.Tensor, ...]:
        rows = torch.randint(len(everything), (c.train.batch,), generator=rng.generator, device=device)
        x_0 = everything[rows]
        p, _ = c.survival.draw(process.schedule, rng.uniform(len(x_0), 1), x_0.shape[1], rng=rng)
        return x_0, process.forward(x_0, 1.0, p, rng=rng), p

    kept = thinned()

    def step() -> None:
        x_0, x, p = thinned() if thins else kept
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            raw = network(*process.encode(x, p), none)
        entries = process.loss(process.natural(raw, x, p), x_0, x, p)
        (entries.sum(1) / (p < 1).sum(1).clamp_min(1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), c.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Clock:
    """Seconds on the wall and of the processor, once the device has done what it was told."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = self._now()

    def lap(self) -> np.ndarray:
        """Seconds since the last lap."""
        before, self.last = self.last, self._now()
        return self.last - before

    def _now(self) -> np.ndarray:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return np.array([time.perf_counter(), time.process_time()])


def race(store: CountStore, c: config.Config, steps: int, rounds: int) -> dict[str, np.ndarray]:
    """Seconds a step ``[rounds 2]`` (wall, processor) of each contestant; the first tenth of the rounds is warm-up."""
    accelerator = Accelerator(
        mixed_precision="bf16" if torch.cuda.is_available() else "no", cpu=not torch.cuda.is_available()
    )
    device = accelerator.device
    others = {name: by_hand(store, c, device, thins=name == "plain") for name in ("plain", "network")}
    took: dict[str, list[np.ndarray]] = {name: [] for name in ("distdiff", *others)}
    clock = Clock(device)

    def on_step(step: int, loss: torch.Tensor) -> None:
        """Called by distdiff's loop at the end of each of its steps: the others take their turns inside."""
        if (step + 1) % steps:
            return
        took["distdiff"].append(clock.lap() / steps)
        for name, one in others.items():
            for _ in range(steps):
                one()
            took[name].append(clock.lap() / steps)

    model = Model.new(store.spec(()), c.process, c.denoiser)
    recipe = Recipe(store, model.process, model.denoiser, c.survival, c.optim, c.train)
    loop.train(recipe, accelerator, loop.Hooks(lambda *_: None, on_step=on_step), identity={})
    return {name: np.array(values[max(1, rounds // 10) : rounds]) for name, values in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--grain", type=int, default=32)
    parser.add_argument("--kind", default="mlp")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        store = made(Path(name), 4096, a.genes)
        never = 10**12
        settings = {
            "out": name, "batch": a.batch, "grain": a.grain, "cells": a.batch * a.steps * a.rounds,
            "compile": a.compile, "eval_cells": never, "checkpoint_cells": never, "checkpoint_minutes": 10**6,
        }  # fmt: skip
        c = config.parse({"data": {"store": "-"}, "denoiser": {"kind": a.kind}, "train": settings})
        seconds = race(store, c, a.steps, a.rounds)
    result: dict[str, dict[str, object]] = {}
    for column, clock in enumerate(("wall", "cpu")):
        ms = {who: float(np.median(values[:, column])) * 1000 for who, values in seconds.items()}
        ratios = {
            who: np.percentile(seconds[who][:, column] / seconds["distdiff"][:, column], (50, 25, 75)).tolist()
            for who in ("plain", "network")
        }
        result[clock] = {"ms_a_step": ms, "speed_against": ratios}
        for who, (middle, low, high) in ratios.items():
            print(f"{clock}: {100 * middle:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of the speed of {who}; "
                  f"{ms['distdiff']:.1f} ms a step against {ms[who]:.1f}")  # fmt: skip
    _record.write(a.out, began, {
        "genes": a.genes, "batch": a.batch, "grain": a.grain, "denoiser": a.kind, "compiled": a.compile,
        "device": "cuda" if torch.cuda.is_available() else "cpu", "steps_a_turn": a.steps, "rounds": a.rounds, **result,
    })  # fmt: skip


if __name__ == "__main__":
    main()
