"""What ``scaling.py`` predicts for many GPUs: every number is a measured piece or a named assumption."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

MACHINE = 8
"""GPUs of one machine."""


@dataclass(frozen=True)
class Assumed:
    """What was not measured. Datasheet rates are ceilings; the shares of them that are reached are guesses.

    Attributes
    ----------
    flops, memory
        Of one GPU: dense bf16 FLOP/s and bytes/s (H200, SXM, vendor's datasheet).
    flops_reached, memory_reached
        Shares of these.
    launch
        Seconds the host takes to send one operation.
    nvlink, fabric
        Bytes/s a GPU sends within its machine (NVLink 4: 450 GB/s one way) and to others (one 400 Gb/s InfiniBand
        port a GPU).
    links_reached
        Share of these.
    nvlink_latency, fabric_latency
        Seconds of one step of a ring.
    to_host
        Bytes/s from a GPU to its machine's memory, at which training waits for a checkpoint's copy.
    every
        Seconds between checkpoints (``train.checkpoint_minutes``).
    """

    flops: float = 990e12
    flops_reached: float = 0.3
    memory: float = 4.8e12
    memory_reached: float = 0.6
    launch: float = 6e-6
    nvlink: float = 450e9
    fabric: float = 50e9
    links_reached: float = 0.7
    nvlink_latency: float = 3e-6
    fabric_latency: float = 6e-6
    to_host: float = 20e9
    every: float = 600.0


@dataclass(frozen=True)
class Work:
    """One training step as counted, each number as (fixed, for each cell): operations that are no views, bytes in and
    out of them, FLOP of matrix products."""

    weights: int
    calls: tuple[float, float]
    bytes: tuple[float, float]
    flops: tuple[float, float]

    def at(self, cells: float) -> tuple[float, float, float]:
        """Operations, bytes and FLOP of a step of so many cells."""
        calls, moved, flops = (fixed + cells * each for fixed, each in (self.calls, self.bytes, self.flops))
        return calls, moved, flops


def work_of(written: Mapping[str, Any]) -> Work:
    """:class:`Work` out of JSON."""
    return Work(**{k: tuple(v) if isinstance(v, list) else v for k, v in written.items()})


class _Counter(TorchDispatchMode):
    """Counts operations that make new tensors, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.calls += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def count(run: Callable[[int], Any], steps: int, weights: int, low: int = 64, high: int = 128) -> Work:
    """Count the ``steps`` steps of ``run``, of ``low`` and of ``high`` cells; beyond, all is taken as linear."""
    found = []
    for cells in (low, high):
        run(cells)
        with _Counter() as counter, FlopCounterMode(display=False) as flops:
            run(cells)
        found.append([n / steps for n in (counter.calls, counter.bytes, flops.get_total_flops())])
    lines = []
    for a, b in zip(*found, strict=True):
        each = (b - a) / (high - low)
        lines.append((max(0.0, a - low * each), each))
    return Work(weights, *lines)


def step_on_gpu(work: Work, cells: float, a: Assumed) -> float:
    """Seconds of a step's arithmetic on one GPU: what the host sends, or what memory and matrix units do."""
    calls, moved, flops = work.at(cells)
    device = moved / (a.memory * a.memory_reached) + flops / (a.flops * a.flops_reached)
    return max(calls * a.launch, device)


def ring(size: float, n: int, rate: float, latency: float) -> float:
    """Seconds of a ring's all-reduce of ``size`` bytes among ``n``."""
    return 2 * (n - 1) * (size / n / rate + latency) if n > 1 else 0.0


def all_reduce(size: float, gpus: int, a: Assumed) -> float:
    """Seconds of a two-level all-reduce: rings within machines, then each GPU's part among machines on its own port."""
    inside = min(gpus, MACHINE)
    within = ring(size, inside, a.nvlink * a.links_reached, a.nvlink_latency)
    return within + ring(size / inside, math.ceil(gpus / MACHINE), a.fabric * a.links_reached, a.fabric_latency)


def predict(work: Work, gpus: int, cells: float, a: Assumed, loader: float) -> dict[str, float]:
    """A step of ``cells`` cells a GPU on ``gpus`` GPUs.

    Parameters
    ----------
    loader
        Cells per second that one CPU core loads (measured).
    """
    alone = step_on_gpu(work, cells, a)
    exchange = all_reduce(4 * work.weights, gpus, a)
    step = alone + exchange  # nothing overlaps: DDP's last bucket of 25 MB waits for the first layer's gradient
    save = 16 * work.weights / a.to_host  # weights, their average, two moments; float32
    step *= 1 + save / a.every
    return {
        "gpus": gpus, "cells_a_gpu": cells, "batch": cells * gpus,
        "step_ms": 1000 * step, "exchange_ms": 1000 * exchange, "cells_per_second": gpus * cells / step,
        "efficiency": alone / step, "loader_cores_a_gpu": cells / step / loader,
        "checkpoint_wait_percent": 100 * save / a.every,
    }  # fmt: skip
