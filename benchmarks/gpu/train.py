"""Train: cells per second, share of the matrix peak, share waiting for data, memory; what each network is bound by.

``distdiff.training.loop.train`` itself runs twice ``steps`` steps on a made store: the first half warms up (and is
traced for a few steps), the second is measured. FLOPs a cell: torch's FlopCounterMode over one forward and backward
pass of the network. ``busy``: share of the traced steps in which a kernel ran; its kernels, by time, are listed.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _part import DEVICE, HALF, Part, made, peak_flops, release
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from distdiff import config
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.process.survival import Survival
from distdiff.rng import generator
from distdiff.training import loop
from distdiff.training.fit import settled
from distdiff.training.settings import Recipe
from distdiff.training.trace import NAME as TRACE
from distdiff.types import Condition

TRANSFORMER = {"kind": "transformer", "width": 512, "depth": 6, "heads": 8}
LATENT = {"kind": "latent", "width": 256, "heads": 4}
LSH = {"kind": "lsh", "width": 256, "depth": 4, "heads": 4}


@dataclass(frozen=True)
class Case:
    """One network under one set of conditions."""

    genes: int
    denoiser: dict[str, Any]
    batch: int
    steps: int
    needs: float = 8.0
    train: dict[str, Any] = field(default_factory=dict)
    resident: str = "yes"
    cap_gib: float = 0.0


CASES = {
    "mlp, 2,000 genes": Case(2000, {"kind": "mlp"}, 4096, 150),
    "transformer, 2,000 genes": Case(2000, TRANSFORMER, 64, 24, needs=15),
    "transformer, 2,000 genes, compiled": Case(2000, TRANSFORMER, 64, 24, needs=35, train={"compile": True}),
    "transformer, 2,000 genes, 12 GB, auto": Case(2000, TRANSFORMER, 0, 20, needs=15, cap_gib=12),
    "mlp, 20,000 genes, 12 GB, auto": Case(20_000, {"kind": "mlp"}, 0, 50, cap_gib=12),
    "latent, 20,000 genes, 12 GB, auto": Case(20_000, LATENT, 0, 20, cap_gib=12),
    "lsh, 20,000 genes, 12 GB, auto": Case(20_000, LSH, 0, 20, cap_gib=12),
    "mlp, 2,000 genes, compiled": Case(2000, {"kind": "mlp"}, 4096, 150, needs=20, train={"compile": True}),
    "mlp, 2,000 genes, no graph": Case(2000, {"kind": "mlp"}, 4096, 150, train={"graph": False}),
    "mlp, 20,000 genes": Case(20_000, {"kind": "mlp"}, 1024, 100),
    "latent, 20,000 genes": Case(20_000, LATENT, 64, 24),
    "lsh, 20,000 genes": Case(20_000, LSH, 8, 24),
    "mlp, 2,000 genes, from disk": Case(2000, {"kind": "mlp"}, 4096, 150, resident="no"),
    "mlp, 20,000 genes, from disk": Case(20_000, {"kind": "mlp"}, 1024, 100, resident="no"),
    "mlp, 2,000 genes, noise by address": Case(2000, {"kind": "mlp"}, 4096, 150, train={"noise": "rows"}),
}
REHEARSED = ("mlp, 2,000 genes", "transformer, 2,000 genes", "mlp, 20,000 genes", "latent, 20,000 genes",
             "lsh, 20,000 genes", "mlp, 2,000 genes, from disk")  # fmt: skip
"""What ``--dry`` runs: each network, and reading from disk. Compiling takes half a minute, and has tests."""
SMALL = {"mlp": {"width": 32, "depth": 1}, "transformer": {"width": 16, "depth": 1, "heads": 2},
         "latent": {"width": 16, "depth": 1, "heads": 2, "latents": 4},
         "lsh": {"width": 16, "depth": 1, "heads": 2, "bucket": 16}}  # fmt: skip


def flops_a_cell(model: Model, counts: torch.Tensor) -> float:
    """Operations of matrix products and attention, forwards and backwards, of one cell."""
    process, network = model.process, model.denoiser
    rng = generator(0, "flops", device=DEVICE)
    p, _ = Survival().draw(process.schedule, rng.uniform(len(counts), 1), counts.shape[1], rng=rng)
    with FlopCounterMode(display=False) as counter, torch.autocast(DEVICE.type, HALF):
        network(*process.encode(process.forward(counts, 1.0, p, rng=rng), p), Condition()).float().sum().backward()
    network.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(counts)


def traced(path: Path) -> dict[str, Any]:
    """What the device did in the traced steps: its busy share, and its kernels by time."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    kernels = [e for e in events if e.get("cat") in (("kernel", "gpu_memcpy", "gpu_memset") if DEVICE.type == "cuda"
               else ("cpu_op",))]  # fmt: skip
    if not kernels:
        return {}
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in kernels)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    by_name: Counter[str] = Counter()
    for e in kernels:
        by_name[e["name"][:90]] += e["dur"]
    total = sum(by_name.values())
    copies = sum(e["dur"] for e in kernels if e.get("cat") in ("gpu_memcpy", "gpu_memset"))
    waits = Counter(e["name"] for e in events if "Synchronize" in e["name"])
    return {
        "busy": busy / (end - spans[0][0]), "kernels a step": len(kernels) / 4, "copies' share": copies / total,
        "host waits a step": {name: n / 4 for name, n in waits.items()},
        "top kernels": [[name, round(us / total, 4)] for name, us in by_name.most_common(10)],
    }  # fmt: skip


def measure(case: Case, part: Part, peak: float, number: int, gflop: float) -> dict[str, Any]:
    """One case; ``gflop`` a cell where it is known already (a compiled network cannot be counted)."""
    genes, denoiser, steps = case.genes, case.denoiser, case.steps
    if part.dry:
        genes, denoiser, steps = 200, {"kind": denoiser["kind"], **SMALL[denoiser["kind"]]}, 20
    store = CountStore.open(made(part.work, 2048 if part.dry else 40_000 if genes < 5000 else 16_000, genes))
    batch = min(case.batch, 64) if part.dry else case.batch
    grain = max(1, min(256, (batch or 64) // 8))
    out = part.work / f"train{number}"
    before = torch.cuda.get_per_process_memory_fraction() if DEVICE.type == "cuda" else 1.0
    if case.cap_gib and DEVICE.type == "cuda":
        share = case.cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    try:
        return _measured(case, peak, gflop, store, denoiser, batch, grain, steps, out)
    finally:
        if case.cap_gib and DEVICE.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(before)
        if number == 0 and (out / TRACE).exists():
            with (out / TRACE).open("rb") as plain, gzip.open(part.work / "trace.json.gz", "wb") as packed:
                shutil.copyfileobj(plain, packed)
        shutil.rmtree(out, ignore_errors=True)
        release()


def _measured(
    case: Case, peak: float, gflop: float, store: CountStore, denoiser: dict[str, Any], batch: int, grain: int,
    steps: int, out: Path,
) -> dict[str, Any]:  # fmt: skip
    never, most = 10**12, 10**7 if DEVICE.type == "cuda" else 20_000
    c = config.parse({
        "data": {"store": str(store.url)}, "denoiser": denoiser, "loader": {"resident": case.resident},
        "train": {"out": str(out), "batch": batch or "auto", "grain": grain, "cells": most if not batch else 1,
                  "eval_cells": never, "checkpoint_cells": never, "checkpoint_minutes": 10**6, "trace": True,
                  "resume": "never", "patience": 10**6, **case.train},
    })  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=DEVICE.type == "cpu")
    model = Model.new(store.spec(()), c.process, c.denoiser)
    found: dict[str, Any] = {"weights": sum(w.numel() for w in model.denoiser.parameters())}
    flops = gflop * 1e9
    if not flops:
        model.denoiser.to(DEVICE)
        some = store.cells(store.rows("train")[:4], ()).counts.to(DEVICE)
        flops = flops_a_cell(model, some)
    recipe = Recipe(store, model.process, model.denoiser, c.survival, c.optim, c.train, c.loader)
    train = settled(recipe, accelerator)
    train = replace(train, cells=2 * steps * train.batch, eval_cells=steps * train.batch)
    logs: list[dict[str, float]] = []
    release()
    hooks = loop.Hooks(lambda *_: None, on_log=lambda seen, numbers: logs.append(numbers))
    loop.train(replace(recipe, settings=train), accelerator, hooks, identity={})
    rate = logs[-1]["cells_per_second"]
    found |= {
        "batch": train.batch, "cells/s": rate, "ms a step": 1000 * train.batch / rate,
        "data_wait": logs[-1]["data_wait"],
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None,
        "loss": logs[-1]["loss"],
    }  # fmt: skip
    if flops:
        found |= {"GFLOP a cell": flops / 1e9, "share of peak": flops * rate / peak}
    if not np.isfinite(logs[-1]["loss"]):
        found["error"] = "the loss is not finite"
    if (trace := out / TRACE).exists():
        found |= traced(trace)
    return found


def main() -> None:
    part = Part(__doc__)
    peak = peak_flops()
    part.add("peak bf16 FLOP/s", peak)
    eager: dict[str, float] = {}
    wanted = os.environ.get("DISTDIFF_GPU_CASES", "")
    for number, (name, case) in enumerate(CASES.items()):
        if wanted and name not in wanted.split(";"):
            continue
        if part.dry and name not in REHEARSED:
            continue

        def one(case: Case = case, number: int = number, name: str = name) -> dict[str, Any]:
            return measure(case, part, peak, number, eager.get(", ".join(name.split(", ")[:2]), 0.0))

        eager[name] = part.case(name, case.needs, one).get("GFLOP a cell", 0.0)


if __name__ == "__main__":
    main()
