"""What chance does to a training batch: times, survival, thinning, withheld labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distdiff.process import Process
from distdiff.process.survival import Survival
from distdiff.rng import Rng, generator
from distdiff.rng.rows import Rows
from distdiff.rng.stream import Streams
from distdiff.training.times import Times
from distdiff.types import Cells, Condition, Tensor

if TYPE_CHECKING:
    from distdiff.training.loop import Training


@dataclass(frozen=True)
class Noised:
    """What a step's noise makes of its cells: clean and thinned states, survival, labels; times, loss weights ``[b]``,
    and whose p depends on t.
    """

    x_0: Tensor
    x: Tensor
    p: Tensor
    cond: Condition
    t: Tensor
    weight: Tensor
    timed: Tensor

    def weighted(self, losses: Tensor, times: Times) -> Tensor:
        """Losses ``[b]`` times their weights; ``times`` learns of them."""
        times.record(self.t, losses.detach(), self.timed)
        return losses * self.weight


def draw(
    process: Process, survival: Survival, times: Times, cells: Cells, settings: Training, step: int, first: int
) -> Noised:
    """Draw times, survival, thinned counts and withheld labels of cells from the run's place ``first`` on."""
    n = len(cells)
    rng = source(settings, first, n, cells.counts.device)
    t, weight = times.draw(step, first - step * settings.batch, n, rng=rng)
    p, timed = survival.draw(process.schedule, t, cells.counts.shape[1], rng=rng)
    x_0 = process.enter(cells.counts, rng=rng)
    x = process.forward(x_0, 1.0, p, rng=rng)
    labels = cells.labels.drop(rng.uniform(n) < settings.label_dropout)
    return Noised(x_0, x, p, labels, t, torch.where(timed, weight, 1.0).squeeze(1), timed.squeeze(1))


def source(settings: Training, first: int, cells: int, device: torch.device) -> Rng:
    """Noise of ``cells`` cells from the run's place ``first`` on."""
    if settings.noise == "rows":
        rows = torch.arange(first, first + cells, device=device)
        return Rows(rows, torch.zeros_like(rows), settings.seed, "noise", fused=device.type == "cuda")
    places = range(first, first + cells, settings.grain)
    streams = [generator(settings.seed, "noise", place, device=device) for place in places]
    return Streams(streams, settings.grain)
