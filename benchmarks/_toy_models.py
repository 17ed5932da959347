"""The diffusion contestants of toy.py: the paper's three models in its own small network, and ours in the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.counts import Counts
from distdiff.process.gaussian import Gaussian
from distdiff.process.masked import Masked
from distdiff.process.schedule import Fisher, levels
from distdiff.rng import generator
from distdiff.sampling import predictor, sample
from distdiff.types import Condition


class TimeMLP(Denoiser):
    """CountsDiff's toy network (appendix D.1): ``Linear(10, h)``, SiLU, plus a time MLP on 64 sinusoids, ``Linear(h)``.

    Time is read off p by the cosine schedule. ``lost``: the output is ``softplus`` and stands for the expected lost
    molecules, as published; else it is the log rate (docs/MATHS.md 3.4).
    """

    relative = False

    def __init__(self, genes: int, outputs: int, *, hidden: int = 48, lost: bool = False):
        super().__init__()
        self.outputs, self.lost = outputs, lost
        self.register_buffer("freqs", 2 * math.pi * torch.logspace(-4, 0, 32))
        self.value = nn.Sequential(nn.Linear(genes, hidden), nn.SiLU())
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.answer = nn.Linear(hidden, genes * outputs)

    def forward(self, x, p, cond):
        p = p[:, :1]
        t = torch.acos(p.clamp(0, 1).sqrt()) * 2 / math.pi * 1000
        angle = t * self.freqs
        h = self.value(x) + self.time(torch.cat((angle.sin(), angle.cos()), 1))
        raw = self.answer(h).unflatten(1, (-1, self.outputs))
        if not self.lost:
            return raw
        return nn.functional.softplus(raw).clamp_min(1e-8).log() - (1 - p).clamp_min(1e-6).log().unsqueeze(-1)


def fit(
    process: Process, network: Denoiser, train: torch.Tensor, seed: int, *, steps: int, batch: int, lr: float,
    decay: bool, corrupt: Any = None,
) -> None:  # fmt: skip
    """Adam, one time a sample.

    ``decay``: the learning rate falls to 0 along a cosine. ``corrupt``: another schedule for the corruption than for
    the weights, as was published.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr)
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = lr * math.cos(math.pi / 2 * step / steps) ** 2
        rng = generator(seed, "toy", step)
        rows = (rng.uniform(batch) * len(train)).long()
        t = rng.uniform(batch, 1)
        x_0 = process.enter(train[rows], rng=rng)
        p = (corrupt or process.schedule).p(t).expand_as(x_0)
        x = process.forward(x_0, 1.0, p, rng=rng)
        eta = process.natural(network(*process.encode(x, p), Condition()), x, p)
        told = process.schedule.p(t).expand_as(x_0)
        loss = process.loss(eta, x_0, x, p)
        if corrupt is not None:
            loss = loss * process.schedule.speed(told) / corrupt.speed(p)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()


class Data:
    """Training cells as a key of the cache."""

    def __init__(self, train: torch.Tensor):
        self.train = train

    def __hash__(self) -> int:
        return hash(tuple(self.train[:8].flatten().tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Data) and torch.equal(self.train, other.train)


class Budget(NamedTuple):
    """Optimiser steps, batch, learning rate, and whether it falls to 0 along a cosine."""

    steps: int = 400
    batch: int = 256
    lr: float = 2e-3
    decay: bool = False


@cache
def trained(data: Data, seed: int, process: Process, hidden: int, lost: bool, corrupt: Any, budget: Budget) -> Denoiser:
    """One training a seed and recipe, whatever the number of walks from it."""
    train = data.train
    torch.manual_seed(seed)
    network = TimeMLP(train.shape[1], process.outputs, hidden=hidden, lost=lost)
    fit(process, network, train, seed, corrupt=corrupt, **budget._asdict())
    return network


SHORT, LONG = Budget(), Budget(8000, 512, 5e-3, True)


def run(
    train: torch.Tensor, n: int, seed: int, *, process: Process, calls: int, budget: Budget = SHORT,
    hidden: int = 48, lost: bool = False, corrupt: Any = None, **walk: Any,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """Train and sample one contestant."""
    network = trained(Data(train), seed, process, hidden, lost, corrupt, budget)
    rng = generator(seed, "toy", "sample")
    with torch.no_grad():
        x = process.prior((n, train.shape[1]), rng=rng)
        grid = list(levels(process.schedule, calls))
        x = sample(process, predictor(process, network, Condition()), x, grid, rng=rng, **walk)
    return process.leave(x), calls


class Published(Counts):
    """Fisher's corruption under the cosine's weights, and a cosine walk (``fit`` turns one weight into the other)."""

    def weights(self, p):
        return Fisher().speed(p)


def contestants() -> dict[str, Callable[..., tuple[Any, int]]]:
    """Name -> contestant: the paper's three as it trained them, then count diffusion with the same, longer training."""
    plain = Counts(head="mean", weight="paper")
    found = {
        "CountsDiff as published, 200": partial(
            run,
            process=Published(head="mean", weight="paper"),
            calls=200,
            lost=True,
            corrupt=Fisher(),
            sigma=("rescale", 0.005),
        ),
        "CountsDiff, one schedule, 200": partial(run, process=plain, calls=200, lost=True),
        "Gaussian DDPM, 200": partial(run, process=Gaussian(predict="eps"), calls=200),
        "masked, 50": partial(run, process=Masked(classes=80, clamp=True), calls=50, hidden=4),
    }
    for name, process, walks in (
        ("CountsDiff", plain, (20, 200)),
        ("NB leap", Counts(weight="none"), (1, 4, 20)),
        ("correlated leap", Counts(head="loadings", loadings=4, weight="none"), (1, 4, 20)),
    ):
        for calls in walks:
            found[f"{name}, trained longer, {calls}"] = partial(run, process=process, calls=calls, budget=LONG)
    return found
