"""The page and the picture of ``scaling.py``, made from its numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _record
import _scaling_model as model
import numpy as np

PARTS = {
    "waiting for cells": "#d9a441",
    "collectives": "#b5533c",
    "network": "#4f6d8f",
    "noise, optimiser, rest": "#b8c4d0",
}


def draw(found: dict[str, Any], tables: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    each = found["processes"]
    names = [f"{n} process(es)\n{p['cells_per_second'][0]:.0f} cells/s" for n, p in each.items()]
    at = np.zeros(len(each))
    for part, colour in PARTS.items():
        shares = np.array([p["percent"][part] for p in each.values()])
        left.barh(names, shares, left=at, label=part, color=colour)
        at += shares
    left.set_title("measured: share of a step, %", fontsize=10)
    left.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    for number, (name, rows) in enumerate(tables.items()):
        x, y = [r["gpus"] for r in rows], [100 * r["efficiency"] for r in rows]
        colour = "#4f6d8f" if name.startswith("small") else "#b5533c"
        right.plot(x, y, ("-", "--")[number % 2], marker="o", label=name, color=colour)
    right.set_xscale("log", base=2)
    right.set_ylim(0, 105)
    right.set_xlabel("GPUs", fontsize=9)
    right.set_title("predicted: speed of a GPU alone that is kept, %", fontsize=10)
    right.legend(fontsize=7)
    _record.save(figure, path)


def told(values: Sequence[float], digits: int = 0) -> str:
    """``median [quartiles]``."""
    middle, low, high = (f"{v:,.{digits}f}" for v in values)
    return f"{middle} [{low}, {high}]"


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join([row(*head), row("---", *["---:"] * (len(head) - 1)), *(row(*cells) for cells in rows)])


def page(
    found: dict[str, Any], checked: list[dict[str, Any]], tables: dict[str, list[dict[str, float]]], *,
    genes: int, batch: int, rounds: int,
) -> str:  # fmt: skip
    each, a = found["processes"], model.Assumed()
    measured = table(
        ["processes", "cells/s", "without exchange", *PARTS],
        [
            [n, told(p["cells_per_second"]), told(p["cells_per_second_without_exchange"])]
            + [f"{p['percent'][part]:.1f} %" for part in PARTS]
            for n, p in each.items()
        ],
    )
    check = table(
        ["the rest of a step takes", "predicted cells/s", "measured", "error, %"],
        [[c["way"], f"{c['predicted']:.0f}", f"{c['measured']:.0f}", told(c["error_percent"])] for c in checked],
    )
    predicted = "\n\n".join(
        f"**{name}**\n\n"
        + table(
            ["GPUs", "batch", "ms a step", "of them all-reduce", "cells/s", "kept", "loader cores a GPU"],
            [
                [f"{r['gpus']:.0f}", f"{r['batch']:,.0f}", f"{r['step_ms']:.2f}", f"{r['exchange_ms']:.2f}",
                 f"{r['cells_per_second']:,.0f}", f"{100 * r['efficiency']:.0f} %", f"{r['loader_cores_a_gpu']:.1f}"]
                for r in rows
            ],
        )
        for name, rows in tables.items()
    )  # fmt: skip
    return f"""# Scaling: what was measured, and what that predicts

Written by `python benchmarks/scaling.py --page benchmarks/SCALING.md` (every number, commit and hardware:
`results/scaling.json`). No GPU was at hand: 8, 64 and 512 GPUs are a model made of measured pieces and of assumptions,
both named below. On a machine with GPUs the same command measures its GPUs.

![shares and predictions](results/scaling.png)

## Measured on two CPU cores

The default MLP ({found["weights"]:,} weights) on made counts of {genes} genes, {batch} cells a step over all
processes, one thread each, gloo; medians of {rounds} rounds [quartiles]. Other people's work ran on the same two cores
(load average {found["load_average"]:.1f}), which slows two processes more than one: read shares and ratios, not speeds.

{measured}

Collectives: what is lost against processes that never exchange gradients, waiting for the slower one included. Pieces:

{pieces(found)}
{counted(found["work"])}

## Check of the way pieces are added up

A step of two processes, as "the rest of a step" plus a bare all-reduce of the gradients, against the measured one,
round by round:

{check}

The first row takes two processes not to disturb each other, as is true of GPUs and not of two cores that share memory
and other people's work; the second takes that from the measurement; the third adds that each step waits for the slower
process. None of them has the exchange's other costs (copies into DDP's buckets, gloo's threads on busy cores), and what
else the machine did while each piece was measured is in all of them.

## The model

    T(N, b)   = max(operations x launch, bytes / memory + FLOP / matrix units)    b cells on one GPU
              + all-reduce(4 bytes x weights, N)                                  nothing of it hidden
    all-reduce = ring within a machine + ring among machines of 1/{model.MACHINE} of the bytes, a port a GPU
    ring(S, n) = 2 (n - 1) (S / n / rate + latency)
    cells/s = N b / T, times what checkpoints leave;   loader cores = cells/s a GPU / (cells a core's second decodes)

Assumed, not measured:

{assumed(a)}
- No overlap of exchange and backward pass: DDP's buckets hold 25 MB, and the last waits for the first layer's gradient.
  Right for the small network, which is one bucket; pessimistic for the large one.
- Cells are decoded on CPUs; with a copy on the GPU (`loader.resident`) no core is needed.

## Predicted

Kept: speed of a GPU against one alone with as many cells.

{predicted}

{reading(found, tables, a)}
"""


def item(text: str) -> str:
    return textwrap.fill(text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def pieces(found: dict[str, Any]) -> str:
    each = found["processes"]
    steps = ", ".join(f"{n}: {told(ms)}" for n, ms in found["step_ms"].items())
    reduced = ", ".join(f"{int(n) / 2**20:.3g} MiB: {told(ms, 1)}" for n, ms in found["all_reduce_ms"].items())
    return "\n".join(map(item, (
        f"A step of one process alone, ms by cells: {steps}; through them t(b) = {found['step_ms_fixed']:.1f} ms + "
        f"{found['step_ms_a_cell']:.3f} ms b.",
        f"All-reduce between the processes, ms: {reduced}; gradients are {4 * found['weights'] / 2**20:.1f} MiB.",
        f"One core's second decodes {told(found['loader_cells_a_core_second'])} cells to dense rows (store in the page "
        "cache).",
        f"A checkpoint stops training for {told(each[min(each)]['snapshot_ms'], 1)} ms: a copy of 16 bytes a weight; "
        "files are written beside the training.",
    )))  # fmt: skip


def counted(work: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, w in work.items():
        (c0, c1), (b0, b1), (f0, f1) = w["calls"], w["bytes"], w["flops"]
        lines.append(
            f"A step of the {name} MLP ({w['weights']:,} weights), counted: {c0:.0f} + {c1:.2f} b operations, "
            f"{b0 / 1e6:.0f} + {b1 / 1e6:.2f} b MB in and out of them, {f0 / 1e6:.0f} + {f1 / 1e6:.0f} b MFLOP of "
            "matrix products."
        )
    return "\n".join(map(item, lines))


def assumed(a: model.Assumed) -> str:
    def percent(share: float) -> str:
        return f"{100 * share:.0f} %"

    def us(seconds: float) -> str:
        return f"{1e6 * seconds:.0f} us"

    gpu = (
        f"GPU: {a.flops / 1e12:.0f} TFLOP/s dense bf16, {a.memory / 1e12:.1f} TB/s (H200 SXM, vendor's datasheet), of "
        f"which {percent(a.flops_reached)} and {percent(a.memory_reached)} are reached; {us(a.launch)} of the host for "
        "an operation; the operations counted on the CPU are those of the GPU, each a kernel of its own, in float32 "
        "through memory (no torch.compile)."
    )
    links = (
        f"Links: NVLink {a.nvlink / 1e9:.0f} GB/s one way, InfiniBand {8 * a.fabric / 1e9:.0f} Gb/s a GPU, "
        f"{percent(a.links_reached)} reached; {us(a.nvlink_latency)} and {us(a.fabric_latency)} for a step of a ring; "
        f"{model.MACHINE} GPUs a machine. Rings, where NCCL would take trees: pessimistic at 512."
    )
    rest = (
        f"Checkpoints every {a.every / 60:.0f} minutes at {a.to_host / 1e9:.0f} GB/s to the host. No slow machines, no "
        "failures, no waiting for the file system."
    )
    return "\n".join(map(item, (gpu, links, rest)))


def reading(found: dict[str, Any], tables: dict[str, list[dict[str, float]]], a: model.Assumed) -> str:
    """What the tables say, in words."""
    lines = []
    for name, rows in tables.items():
        fastest = max(rows, key=lambda r: r["cells_per_second"])
        work = model.work_of(found["work"][name.split(",")[0]])
        calls, *_ = work.at(rows[1]["cells_a_gpu"])
        host = calls * a.launch >= model.step_on_gpu(work, rows[1]["cells_a_gpu"], a)
        bound = "the host's launches (remedies: `train.grain=256`, `train.compile`)" if host else "the GPU"
        lines.append(f"{name}: fastest with {fastest['gpus']:.0f} GPUs; on 8 a step is bound by {bound}.")
    return "\n".join(map(item, lines))
