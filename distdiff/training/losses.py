"""The training loss of each cell: what a process makes of the network's raw outputs, as a mean over thinned genes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from distdiff.process import Process
from distdiff.training.noise import Noise
from distdiff.types import Cells, Condition, Tensor

Network = Callable[..., Tensor]
"""``(*process.encode(x, p), labels) -> raw [b g k]``."""

Law = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(raw [b g k], x_0, x, p [b g]) -> losses [b]``: a process's loss of a network's outputs."""


def law_of(process: Process) -> Law:
    """Mean loss of each cell ``[b]`` over its thinned genes (p < 1)."""
    return partial(_law, process)


def _law(process: Process, raw: Tensor, x_0: Tensor, x: Tensor, p: Tensor) -> Tensor:
    entries = process.loss(process.natural(raw, x, p), x_0, x, p)
    return entries.sum(1) / (p < 1).sum(1).clamp_min(1)


def of_states(
    process: Process, network: Network, x_0: Tensor, x: Tensor, p: Tensor, cond: Condition, *, law: Law | None = None
) -> Tensor:
    """Loss of each cell ``[b]`` whose noise is drawn; ``law`` is :func:`law_of` the process, maybe compiled."""
    return (law or law_of(process))(network(*process.encode(x, p), cond), x_0, x, p)


def of_cells(noise: Noise, network: Network, cells: Cells, step: int, first: int, *, law: Law | None = None) -> Tensor:
    """Weighted loss of each cell ``[b]`` from the run's place ``first`` on; each ``grain`` has noise of its own."""
    noised = noise.draw(cells, step, first)
    losses = of_states(noise.process, network, noised.x_0, noised.x, noised.p, noised.cond, law=law)
    return noised.weighted(losses, noise.times)
