"""Attention from 256 to 65,536 genes: time, memory and share of the device's peak, forwards and backwards.

    python benchmarks/attention.py --out benchmarks/results/attention_cpu.json [--tokens 256 1024 --heads 4]

``naive`` makes the matrix of n x n; ``sdpa`` is torch's kernel (a flash kernel on CPU and, in half precision, on CUDA);
``masked`` is distdiff's, half of the tokens not seen; ``flex`` is FlexAttention, compiled; ``lsh`` is Reformer's over
genes (bucket 64, 2 rounds); ``latent`` is what the latent denoiser does in its place: 64 latents read all tokens, all
tokens read the latents. One cell, each measurement in a process of its own; best of the repeats. FLOP/s counts the
arithmetic that the method asks for (4 m d a query of m keys; twice that and a half backwards), the peak is that of a
large matrix product on the same device in the same run. On a GPU the networks of ``--networks`` are trained too: cells
per second, peak memory, share of peak, and what fits into 12 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distdiff.denoise.attention import attend
from distdiff.denoise.lsh import lsh_attention, rotations

METHODS = ("naive", "sdpa", "masked", "flex", "lsh", "latent")
LATENTS, BUCKET, ROUNDS = 64, 64, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], enough: float, *first: float) -> float:
    """Best of up to seven calls, none begun after ``enough`` seconds; ``first``: what earlier ones took."""
    took = list(first)
    while len(took) < 7 and (not took or sum(took) < enough):
        wait()
        began = time.perf_counter()
        call()
        wait()
        took.append(time.perf_counter() - began)
    return min(took)


def method(name: str, n: int, heads: int, channels: int) -> tuple[Callable[[], Tensor], list[Tensor], float]:
    """A call, the tensors that want gradients, floating-point operations of the forward pass."""
    rng = torch.Generator(DEVICE).manual_seed(0)

    def made(tokens: int, e: int = channels) -> Tensor:
        x = torch.randn(1, heads, tokens, e, generator=rng, device=DEVICE, dtype=HALF)
        return x.requires_grad_(name != "flex" or DEVICE == "cuda")

    q, k, v = made(n), made(n), made(n)
    width = heads * channels
    if name == "naive":
        return lambda: (q @ k.transpose(-1, -2) * channels**-0.5).softmax(-1) @ v, [q, k, v], 4.0 * n * n * width
    if name == "sdpa":
        return lambda: F.scaled_dot_product_attention(q, k, v), [q, k, v], 4.0 * n * n * width
    if name == "masked":
        q, k = made(n, channels - 1), made(n, channels - 1)
        seen = torch.arange(n, device=DEVICE).unsqueeze(0) % 2 == 0
        return lambda: attend(q, k, v, seen), [q, k, v], 4.0 * n * n * width
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention)
        return lambda: compiled(q, k, v), [q, k, v], 4.0 * n * n * width
    if name == "lsh":
        turns = rotations(channels, n, BUCKET, ROUNDS, rng=torch.Generator().manual_seed(0)).to(DEVICE)
        seen = torch.ones(1, n, dtype=torch.bool, device=DEVICE)
        met = min(n, 2 * BUCKET)
        return lambda: lsh_attention(q, v, seen, turns, BUCKET), [q, v], 4.0 * n * met * width * ROUNDS
    z = made(LATENTS)

    def latent() -> Tensor:
        told = F.scaled_dot_product_attention(z, k, v)
        return F.scaled_dot_product_attention(q, told, told)

    return latent, [q, k, v, z], 8.0 * n * LATENTS * width


def measure(name: str, n: int, heads: int, channels: int, enough: float) -> dict[str, Any]:
    call, wanted, work = method(name, n, heads, channels)
    found: dict[str, Any] = {"method": name, "tokens": n}
    with torch.no_grad():
        if name == "flex":  # compile
            call()
        with _record.Peak() as peak:
            first = seconds(call, 0)
        found |= {"forward s": seconds(call, enough, first), "forward MiB": peak.mib}
    found["forward FLOP/s"] = work / found["forward s"]
    if name == "flex" and DEVICE == "cpu":
        return found | {"note": "no backward pass on CPU in torch"}

    def both() -> None:
        torch.autograd.grad(call().sum(), wanted)

    both()  # the first backward pass loads its kernels
    with _record.Peak() as peak:
        first = seconds(both, 0)
    found |= {"both s": seconds(both, enough, first), "both MiB": peak.mib}
    found["both FLOP/s"] = 3.5 * work / found["both s"]
    return found


def peak_flops() -> float:
    size = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=HALF) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, 5)


def network(kind: str, genes: int, batch: int, cap_gib: float, options: dict[str, Any]) -> dict[str, Any]:
    """A training step of a whole denoiser: cells/s, MiB, FLOP/s by 3 x (24 d^2 + 4 n d) a token and block."""
    from distdiff.model import Model
    from distdiff.types import Condition, DataSpec

    if DEVICE == "cuda" and cap_gib:
        share = cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    spec = DataSpec(tuple(map(str, range(genes))), {}, np.full(genes, 0.2, np.float32))
    model = Model.new(spec, {"kind": "counts"}, {"kind": kind, **options})
    net, process = model.denoiser.to(DEVICE), model.process
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    x = torch.poisson(torch.full((batch, genes), 0.2, device=DEVICE))
    p = (torch.rand(batch, genes, device=DEVICE) < 0.5).float()

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            raw = net(torch.log1p(x * p), p, Condition())
        process.loss(process.natural(raw, x * p, p), x, x * p, p).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with _record.Peak() as peak:
        step()
    took = seconds(step, 10)
    width, depth = options.get("width", 64), options.get("depth", 3)
    work = 3.0 * batch * (genes + 1) * depth * (24 * width**2 + 4 * (genes + 1) * width)
    found = {"kind": kind, "genes": genes, "batch": batch, "cap GiB": cap_gib, **options, "cells/s": batch / took,
             "MiB": peak.mib}  # fmt: skip
    return found | ({"FLOP/s": work / took} if kind == "transformer" and not options.get("pack") else {})


def child(what: dict[str, Any], patience: float) -> dict[str, Any]:
    """Run one measurement in a process of its own; why it failed, if it did."""
    command = [sys.executable, __file__, "--child", json.dumps(what)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return what | {"note": f"longer than {patience:.0f} s"}
    if done.returncode:
        return what | {"note": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 3), ("forward s", "both s", "both MiB"),
        ("forward, s", "forward and backward, s", "forward and backward, MiB"), strict=True,
    ):  # fmt: skip
        for number, name in enumerate(METHODS):
            points = [(r["tokens"], r[key]) for r in rows if r["method"] == name and r.get(key, 0) > 0]
            if points:
                axes.loglog(*zip(*points, strict=True), color=f"C{number}", marker="o", ms=3, label=name)
        axes.set_title(f"{title}, by tokens", fontsize=10)
    figure.axes[0].legend(fontsize=8)
    _record.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024, 4096, 16_384, 20_000, 32_768, 65_536])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64 if DEVICE == "cuda" else 16)
    parser.add_argument("--networks", action="store_true", default=DEVICE == "cuda")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--enough", type=float, default=2.0, help="seconds of repeats")
    parser.add_argument("--patience", type=float, default=180.0)
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that a measurement may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=json.loads)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.child:
        print(json.dumps(network(**a.child) if "kind" in a.child else measure(**a.child)))
        return
    began, peak = time.perf_counter(), peak_flops()
    rows: list[dict[str, Any]] = []
    for n in a.tokens:
        for name in METHODS:
            matrix = 3 * n * n * a.heads * (2 if DEVICE == "cuda" else 4) / 2**30
            if name == "naive" and matrix > a.memory:
                row: dict[str, Any] = {"method": name, "tokens": n, "note": f"needs about {matrix:.0f} GiB"}
            else:
                what = {"name": name, "n": n, "heads": a.heads, "channels": a.channels, "enough": a.enough}
                row = {"method": name, "tokens": n} | child(what, a.patience)
            for key in [k for k in row if k.endswith("FLOP/s")]:
                row[key.replace("FLOP/s", "share of peak")] = row[key] / peak
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
    trained = []
    if a.networks:
        large = {"width": 256, "depth": 4, "heads": 4}
        asked = [(kind, batch, 0.0, large) for kind in ("transformer", "lsh", "latent") for batch in (2, 8)]
        asked += [(kind, 8, 12.0, large | {"checkpoint": True}) for kind in ("transformer", "lsh")]
        asked += [("transformer", 8, 0.0, large | {"pack": True}), ("mlp", 128, 12.0, {})]
        for kind, batch, cap, options in asked:
            what = {"kind": kind, "genes": a.genes, "batch": batch, "cap_gib": cap, "options": options}
            trained.append(child(what, a.patience))
            if "FLOP/s" in trained[-1]:
                trained[-1]["share of peak"] = trained[-1]["FLOP/s"] / peak
            print(trained[-1], flush=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "one CPU thread"
    _record.write(a.out, began, {
        "device": device, "dtype": str(HALF), "heads": a.heads, "channels": a.channels, "peak FLOP/s": peak,
        "rows": rows, "networks": trained,
    })  # fmt: skip
    draw(rows, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
