"""How much of a PCA regression belongs into a trained network's answer: fitted on validation cells."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff.baselines.pca import Pca
from distdiff.denoise import Denoiser
from distdiff.imputers.blend import Blend
from distdiff.process import Process
from distdiff.process.counts import of_molecules
from distdiff.rng import generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.types import Condition

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

TRAIN, ENTRIES = 10_000, 20_000_000
"""Most training cells, and most of their entries, that the regression is fitted to."""

HELD_OUT = 2048
"""Most validation cells that the weight is fitted to."""

WEIGHTS = torch.linspace(0, 1, 21)


@torch.no_grad()
def fit_blend(
    process: Process, denoiser: Denoiser, store: CountStore, *, seed: int = 0, batch: int = 256
) -> tuple[Blend | None, dict[str, Any]]:
    """Fit a PCA regression to training cells and its weight to validation cells (docs/MATHS.md 5.10).

    Half of the entries of the validation cells are hidden, and no label is told. The weight is that of least Poisson
    deviance, and 0 unless it gains more than the standard error of its gain over cells.

    Returns
    -------
    blend
        ``None`` for a weight of 0.
    info
        ``weight``; deviance per entry at 0 (``network``), 1 (``pca``) and at the best weight (``best``), which is
        ``fitted``; ``error``, the standard error of what it gains; ``cells`` of validation.
    """
    law, device = of_molecules(process, "a blend"), next(denoiser.parameters()).device
    rng = numpy_generator(seed, "blend")
    most = min(TRAIN, max(1000, ENTRIES // len(store.genes)))
    train, held_out = (rng.permutation(store.rows(split))[:n] for split, n in (("train", most), ("val", HELD_OUT)))
    pca = Pca((10, 20, 40), scale=(0.3, 1.0), max_cells=most, seed=seed)
    pca.fit(store, np.sort(train))
    genes = {"mean": pca.gene_mean, "centre": pca.centre, "cap": pca.cap, "smear": pca.smear}
    tensors = {name: torch.as_tensor(np.asarray(part, np.float32)) for name, part in genes.items()}
    loadings, precision = torch.from_numpy(pca.loadings), torch.from_numpy(pca.precision)
    blend = Blend(1.0, pca.chosen["scale"], pca.chosen["floor"], tensors, loadings, precision)
    parts, entries = [], 0
    for start in range(0, len(held_out), batch):
        cells = store.cells(np.sort(held_out[start : start + batch]), ()).to(device)
        x = cells.counts
        observed = generator(seed, "blend", start, device=device).uniform(*x.shape) < 0.5
        counts, p = torch.where(observed, x, 0.0), observed.to(x.dtype)
        eta = predictor(law, denoiser, cells.labels)(counts, p)
        log_net, log_pca = eta[..., 0], blend.into(eta, counts, observed, Condition())[..., 0]
        for_all = [_deviance(x, torch.lerp(log_net, log_pca, float(w)), ~observed) for w in WEIGHTS]
        parts.append(torch.stack(for_all, 1).cpu())
        entries += int((~observed).sum())
    of_cells = torch.cat(parts)  # [cells, weights]
    at = int(of_cells.sum(0).argmin())
    gain = of_cells[:, 0] - of_cells[:, at]
    error = float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else float("inf")
    weight = float(WEIGHTS[at]) if float(gain.mean()) > error else 0.0
    each = of_cells.sum(0) / max(1, entries)
    info = {
        "weight": round(weight, 2), "fitted": round(float(WEIGHTS[at]), 2), "network": float(each[0]),
        "pca": float(each[-1]), "best": float(each[at]), "error": error * len(gain) / max(1, entries),
        "cells": len(gain),
    }  # fmt: skip
    return (replace(blend, weight=weight) if weight else None), info


def _deviance(x: torch.Tensor, log_mean: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Poisson deviance of each cell's hidden entries, ``float64 [b]``."""
    loss = torch.xlogy(x, x) - x * log_mean - x + log_mean.exp()
    return 2 * torch.where(hidden, loss, 0.0).sum(1, dtype=torch.float64)
