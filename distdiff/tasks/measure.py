"""What a trained model must know about itself, measured on held-out cells once training is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff.process.counts import Counts, of_molecules
from distdiff.rng import generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.tasks.denoise import fit_shrink
from distdiff.tasks.likelihood import nats

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore
    from distdiff.model import Model

CELLS = 512
LEVELS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)


@torch.no_grad()
def measure(model: Model, store: CountStore, *, labels: tuple[str, ...] = (), seed: int = 0) -> None:
    """Fill in ``info['depth']``, and for a process of counts ``info['excess']``, ``info['nats']`` and ``shrink``.

    ``depth``: quantiles of molecules per training cell, the limit of deepening (docs/MATHS.md 5.5). ``excess``: where
    along a walk dispersion is at stake (docs/MATHS.md 4.11). ``nats``: quantiles of the likelihood bound on held-out
    cells, to tell whether another cell is out of distribution. At most 512 cells each (4,096 for the depth).
    """
    rng = numpy_generator(seed, "measure")
    train, held_out = (_some(store.rows(split), n, rng) for split, n in (("train", 4096), ("val", CELLS)))
    molecules = np.asarray(store.read(train).sum(1)).ravel()
    model.info["depth"] = {f"q{round(q * 100):02d}": float(np.quantile(molecules, q)) for q in (0.01, 0.5, 0.99)}
    if not (isinstance(model.process, Counts) and model.process.molecules):
        return
    model.info["excess"] = {"p": list(LEVELS), "impute": excess(model, store, held_out, 0.5, labels, seed)}
    model.info["excess"]["generate"] = excess(model, store, held_out, 1.0, labels, seed)
    cells = store.cells(held_out, labels).to(_device(model))
    cost = nats(model, cells, torch.ones_like(cells.counts, dtype=torch.bool), seed=seed).double()
    model.info["nats"] = {f"q{round(q * 100):02d}": float(cost.quantile(q)) for q in (0.01, 0.5, 0.99)}
    if model.process.predict == "rate":
        model.shrink = fit_shrink(model, store, held_out, seed=seed, labels=labels)


@torch.no_grad()
def excess(
    model: Model, store: CountStore, rows: np.ndarray, targets: float, labels: tuple[str, ...], seed: int
) -> list[float]:
    """``(Var d - E d)+`` at each of :data:`LEVELS` (docs/MATHS.md 4.11), over each gene's variance, summed over genes.

    ``d`` are the lost molecules of a share ``targets`` of the genes, the others being seen whole; the variance is that
    around the network's own answer, so that what the network explains is not counted.
    """
    process, device = of_molecules(model.process, "excess variance"), _device(model)
    cells = store.cells(rows, labels).to(device)
    counts = cells.counts
    scale = counts.var(0).clamp_min(1e-6)
    predict, found = predictor(process, model.denoiser, cells.labels), []
    for level in LEVELS:
        rng = generator(seed, "excess", str(level), str(targets), device=device)
        p = torch.where(rng.uniform(*counts.shape) < targets, level, 1.0)
        x = process.forward(counts, 1.0, p, rng=rng)
        d, f = counts - x, process.lost(predict(x, p), p)
        found.append(float((((d - f).square() - d).mean(0) / scale).sum().clamp_min(0)))
    return found


def _some(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(rows)[:n])


def _device(model: Model) -> Any:
    return next(model.denoiser.parameters()).device
