"""Attention: flash, masked, LSH and latent attention among 4,096, 20,000 and 60,000 genes (benchmarks/attention.py)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from _part import DEVICE, Part, beside, peak_flops

TOKENS = (4096, 20_000, 60_000)
METHODS = ("sdpa", "masked", "lsh", "latent")


def crossover(rows: dict[str, dict[str, Any]], key: str) -> float | None:
    """Tokens from which LSH is faster than flash, on straight lines between the points (both axes logarithmic)."""
    points = [(n, math.log(rows[f"lsh, {n}"][key] / rows[f"sdpa, {n}"][key])) for n in TOKENS
              if all(key in rows.get(f"{m}, {n}", {}) for m in ("lsh", "sdpa"))]  # fmt: skip
    if points and points[0][1] <= 0:
        return float(points[0][0])
    for (n, before), (m, after) in itertools.pairwise(points):
        if before > 0 >= after:
            return math.exp(math.log(n) + before / (before - after) * math.log(m / n))
    return None


def main() -> None:
    methods = beside("attention")
    part = Part(__doc__)
    peak = peak_flops()
    part.add("peak bf16 FLOP/s", peak)
    tokens, heads, channels = ((128, 256), 2, 16) if part.dry else (TOKENS, 8, 64)
    for n in tokens:
        for name in METHODS:

            def one(name: str = name, n: int = n) -> dict[str, Any]:
                found = methods.measure(name, n, heads, channels, 0.5)
                return found | {k.replace("FLOP/s", "share of peak"): v / peak for k, v in found.items() if "FLOP" in k}

            part.case(f"{name}, {n}", 3.0, one)
    for key in ("forward s", "both s"):
        part.add(f"LSH faster than flash from tokens on, {key}", crossover(part.found, key))
    if DEVICE.type == "cuda":
        part.add("memory GiB", torch.cuda.get_device_properties(0).total_memory / 2**30)


if __name__ == "__main__":
    main()
