"""When a training cell is looked at: its diffusion time t, uniform, stratified over the global batch, or learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from distdiff.rng import Rng, numpy_generator
from distdiff.types import Float, Tensor

BINS = 32
FLOOR = 0.1
"""Share of cells whose time stays uniform, so that no weight exceeds ``1 / FLOOR``."""


class Times:
    """Times of a batch, as a pure function of (seed, step, position in the global batch) and of the learned density.

    ``learned`` keeps the mean square of the loss in 32 bins of t and draws t with the density that minimises the
    variance of the estimate, its root (Nichol & Dhariwal 2021); the loss is weighted by one over it. The density moves
    at each log, when the device is waited for anyway.
    """

    def __init__(self, kind: str, batch: int, seed: int, device: torch.device):
        self.kind, self.batch, self.seed = kind, batch, seed
        self.density = torch.ones(BINS, device=device)
        self.sums = torch.zeros(2, BINS, device=device)

    def draw(
        self, step: int, position: int, cells: int, *, rng: Rng
    ) -> tuple[Float[Tensor, "b 1"], Float[Tensor, "b 1"]]:
        """Times and loss weights of ``cells`` cells from ``position`` in the global batch on."""
        if self.kind == "uniform":
            u = rng.uniform(cells, 1)
            return u, torch.ones_like(u)
        shift = numpy_generator(self.seed, "time", step).random()
        positions = torch.arange(position, position + cells, device=rng.device, dtype=torch.float64)
        u = ((positions / self.batch + shift) % 1).float().unsqueeze(1)
        if self.kind == "stratified":
            return u, torch.ones_like(u)
        edges = torch.cat((self.density.new_zeros(1), self.density.cumsum(0) / BINS))
        k = (torch.searchsorted(edges, u, right=True) - 1).clamp(0, BINS - 1)
        t = (k + (u - edges[k]) / (edges[k + 1] - edges[k])) / BINS
        return t.clamp(0, 1), 1 / self.density[k]

    def record(self, t: Tensor, losses: Tensor, where: Tensor) -> None:
        """Add the (unweighted) losses ``[b]`` of the cells in ``where`` to their bins; no wait for the device."""
        if self.kind == "learned":
            k = (t.squeeze(1) * BINS).long().clamp(0, BINS - 1)
            self.sums[0].index_add_(0, k, losses.square() * where)
            self.sums[1].index_add_(0, k, where.to(losses.dtype))

    def update(self, accelerator: Accelerator) -> None:
        """Move the density to what all processes saw since the last update; a bin that nobody saw keeps its place."""
        if self.kind != "learned":
            return
        squares, seen = accelerator.reduce(self.sums, "sum")
        root = torch.where(seen > 0, (squares / seen.clamp_min(1)).sqrt(), math.nan)
        some = root.isfinite().any()
        root = torch.where(root.isfinite(), root, root.nanmean())
        new = FLOOR + (1 - FLOOR) * root / root.mean().clamp_min(1e-12)
        new = (0.5 * self.density + 0.5 * new).mul(1e4).round().div(1e4)
        self.density = torch.where(some, new / new.mean(), self.density)
        self.sums.zero_()

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What a checkpoint keeps: the density, and what each process has recorded since it moved (all must ask)."""
        sums = accelerator.gather(self.sums.unsqueeze(0)).tolist() if self.kind == "learned" else []
        return {"density": self.density.tolist(), "sums": sums}

    def load(self, state: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Put :meth:`state` back; under another number of processes the first one takes all records.

        Raises
        ------
        ValueError
            It is no state of one.
        """
        try:
            density = torch.tensor(state["density"], dtype=torch.float32, device=self.density.device)
            sums = torch.tensor(state["sums"], dtype=torch.float32, device=self.sums.device)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's times cannot be read: {error}") from None
        if density.shape != self.density.shape or not (sums.numel() == 0 or sums.shape[1:] == self.sums.shape):
            raise ValueError(f"the checkpoint's times have shapes {list(density.shape)} and {list(sums.shape)}")
        self.density = density
        if len(sums) == accelerator.num_processes:
            self.sums = sums[accelerator.process_index]
        elif len(sums) and accelerator.is_main_process:
            self.sums = sums.sum(0)
