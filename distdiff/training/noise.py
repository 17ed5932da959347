"""What chance does to a training batch: times, survival, thinning, withheld labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distdiff.process import Process
from distdiff.process.survival import Survival
from distdiff.rng import Rng, generator
from distdiff.rng.rows import Rows
from distdiff.rng.stream import Streams
from distdiff.training.settings import Training
from distdiff.training.times import Times
from distdiff.types import Cells, Condition, Tensor

WITHHELD = 0.6
"""Share of imputation's cells that go without their labels, at least: a user's cells do, unless they are to be used."""


@dataclass(frozen=True)
class Noised:
    """What a step's noise makes of its cells.

    Clean and thinned states, survival, labels; times, loss weights ``[b]``, and whose p depends on t.
    """

    x_0: Tensor
    x: Tensor
    p: Tensor
    cond: Condition
    t: Tensor
    weight: Tensor
    timed: Tensor

    def weighted(self, losses: Tensor, times: Times) -> Tensor:
        """Losses ``[b]`` times their weights; ``times`` records them."""
        times.record(self.t, losses.detach(), self.timed)
        return losses * self.weight


@dataclass(frozen=True)
class Noise:
    """The noise of a run.

    Parameters
    ----------
    process, survival, times
        The law of thinning, the mixture of survival probabilities, the law of diffusion times.
    settings
        Its ``seed``, ``batch``, ``grain``, ``noise`` and ``label_dropout``.
    shares
        Of `distdiff.data.feed.loader.Loading.shares`, on the device: weights of cells that have evidence.
    """

    process: Process
    survival: Survival
    times: Times
    settings: Training
    shares: tuple[str, Tensor] | None = None

    def draw(self, cells: Cells, step: int, first: int) -> Noised:
        """Draw times, survival, thinned counts and withheld labels of cells from the run's place ``first`` on."""
        n = len(cells)
        rng = source(self.settings, first, n, cells.counts.device)
        t, weight = self.times.draw(step, first - step * self.settings.batch, n, rng=rng)
        p, timed = self.survival.draw(self.process.schedule, t, cells.counts.shape[1], rng=rng)
        x_0 = self.process.enter(cells.counts, rng=rng)
        x = self.process.forward(x_0, 1.0, p, rng=rng)
        imputed = (p == 1).any(1)
        withheld = self.settings.label_dropout
        labels = cells.labels.drop(
            rng.uniform(n) < torch.where(imputed, withheld and max(withheld, WITHHELD), withheld)
        )
        weight = torch.where(timed, weight, 1.0).squeeze(1)
        if self.shares is not None:
            label, shares = self.shares
            weight = torch.where(imputed, weight * shares[cells.labels.labels[label]], weight)
        return Noised(x_0, x, p, labels, t, weight, timed.squeeze(1))


def source(settings: Training, first: int, cells: int, device: torch.device) -> Rng:
    """Noise of ``cells`` cells from the run's place ``first`` on."""
    if settings.noise == "rows":
        rows = torch.arange(first, first + cells, device=device)
        return Rows(rows, torch.zeros_like(rows), settings.seed, "noise", fused=device.type == "cuda")
    groups = range(first, first + cells, settings.grain)
    streams = [generator(settings.seed, "noise", group, device=device) for group in groups]
    return Streams(streams, settings.grain)
