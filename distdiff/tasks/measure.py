"""What a trained model must know about itself, measured on held-out cells once training is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.counts import Counts, of_molecules
from distdiff.rng import generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.tasks.likelihood import nats
from distdiff.types import Cells

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

CELLS = 512
LEVELS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
SHARES = {"impute": 0.5, "generate": 1.0}
"""Share of the genes that is hidden where a task's excess variance is measured."""


@torch.no_grad()
def measure(
    process: Process, denoiser: Denoiser, store: CountStore, *, labels: tuple[str, ...] = (), seed: int = 0
) -> dict[str, Any]:
    """Measure ``info['depth']``, and for a process of counts ``info['excess']`` and ``info['nats']``.

    ``depth``: quantiles of molecules per training cell, the limit of deepening (docs/MATHS.md 5.5). ``excess``: where
    along a walk dispersion is at stake (docs/MATHS.md 4.11). ``nats``: quantiles of the likelihood bound on held-out
    cells, to tell whether another cell is out of distribution. At most 512 cells each (4,096 for the depth).
    """
    rng = numpy_generator(seed, "measure")
    train, held_out = (_some(store.rows(split), n, rng) for split, n in (("train", 4096), ("val", CELLS)))
    molecules = np.asarray(store.read(train).sum(1)).ravel()
    found: dict[str, Any] = {}
    found["depth"] = {f"q{round(q * 100):02d}": float(np.quantile(molecules, q)) for q in (0.01, 0.5, 0.99)}
    if not (isinstance(process, Counts) and process.molecules):
        return found
    cells = store.cells(held_out, labels).to(next(denoiser.parameters()).device)
    if len(held_out) < 2:  # no variance
        return found
    shares = {task: excess(process, denoiser, cells, share, seed) for task, share in SHARES.items()}
    found["excess"] = {"p": list(LEVELS), **shares}
    cost = nats(process, denoiser, cells, torch.ones_like(cells.counts, dtype=torch.bool), seed=seed).double()
    found["nats"] = {f"q{round(q * 100):02d}": float(cost.quantile(q)) for q in (0.01, 0.5, 0.99)}
    return found


@torch.no_grad()
def excess(process: Process, denoiser: Denoiser, cells: Cells, targets: float, seed: int) -> list[float]:
    """``(Var d - E d)+`` at each of :data:`LEVELS` (docs/MATHS.md 4.11), over each gene's variance, summed over genes.

    ``d`` are the lost molecules of a share ``targets`` of the genes, the others being seen whole; the variance is that
    around the network's own answer, so that what the network explains is not counted.
    """
    law, counts = of_molecules(process, "excess variance"), cells.counts
    scale = counts.var(0).clamp_min(1e-6)
    predict, found = predictor(law, denoiser, cells.labels), []
    for level in LEVELS:
        rng = generator(seed, "excess", str(level), str(targets), device=counts.device)
        p = torch.where(rng.uniform(*counts.shape) < targets, level, 1.0)
        x = law.forward(counts, 1.0, p, rng=rng)
        d, f = counts - x, law.lost(predict(x, p), p)
        found.append(float((((d - f).square() - d).mean(0) / scale).sum().clamp_min(0)))
    return found


def _some(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(rows)[:n])
