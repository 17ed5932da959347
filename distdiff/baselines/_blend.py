"""How much of a PCA regression belongs into a network's answer, and which rates are off: by validation cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff.baselines.pca import Pca
from distdiff.denoise import Denoiser
from distdiff.imputers.blend import KNOTS, Blend, right_on_average
from distdiff.process import Process
from distdiff.process.counts import of_molecules
from distdiff.rng import generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.types import Condition, Tensor

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

TRAIN, ENTRIES = 10_000, 20_000_000
"""Most training cells, and most of their entries, that the regression is fitted to."""

HELD_OUT = 2048
"""Most validation cells that the weight is fitted to."""

WEIGHTS = torch.linspace(0, 1, 21)

EDGES = torch.linspace(-18, 12, 601, dtype=torch.float64)
"""Between intervals of the log rate; the first and the last have no end."""

MIDDLE = torch.cat((EDGES[:1], (EDGES[:-1] + EDGES[1:]) / 2, EDGES[-1:]))

PRIOR = 10.0
"""Molecules, as predicted, that each group of entries is given besides, against chance."""


@torch.no_grad()
def fit_blend(
    process: Process, denoiser: Denoiser, store: CountStore, *, seed: int = 0, batch: int = 256
) -> tuple[Blend | None, dict[str, Any]]:
    """Fit a PCA regression to training cells, its weight and factors to validation cells (docs/MATHS.md 5.10, 5.11).

    Half of the entries of the validation cells are hidden, and no label is told. The weight is that of least Poisson
    deviance, and 0 unless it gains more than the standard error of its gain over cells.

    Returns
    -------
    blend
        ``None`` for a weight of 0 and no factors.
    info
        ``weight``; deviance per entry at 0 (``network``), 1 (``pca``) and at the best weight (``best``), which is
        ``fitted``; ``error``, the standard error of what it gains; ``cells`` of validation; ``calibrated``, deviance
        per entry that the factors take away.
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

    def answers() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Counts, what is hidden, log rates of the network and of the regression, of some cells at a time."""
        for start in range(0, len(held_out), batch):
            cells = store.cells(np.sort(held_out[start : start + batch]), ()).to(device)
            x = cells.counts
            observed = generator(seed, "blend", start, device=device).uniform(*x.shape) < 0.5
            counts, p = torch.where(observed, x, 0.0), observed.to(x.dtype)
            eta = predictor(law, denoiser, cells.labels)(counts, p)
            yield x, ~observed, eta[..., 0], blend.into(eta, counts, observed, Condition())[..., 0]

    parts, entries = [], 0
    for x, hidden, log_net, log_pca in answers():
        for_all = [_deviance(x, torch.lerp(log_net, log_pca, float(w)), hidden) for w in WEIGHTS]
        parts.append(torch.stack(for_all, 1).cpu())
        entries += int(hidden.sum())
    of_cells = torch.cat(parts)  # [cells, weights]
    at = int(of_cells.sum(0).argmin())
    gain = of_cells[:, 0] - of_cells[:, at]
    error = float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else float("inf")
    weight = float(WEIGHTS[at]) if float(gain.mean()) > error else 0.0
    bins = [_binned(x, torch.lerp(log_net, log_pca, weight), hidden) for x, hidden, log_net, log_pca in answers()]
    knots, calibrated = fit_knots(np.concatenate(bins))
    each = of_cells.sum(0) / max(1, entries)
    info = {
        "weight": round(weight, 2), "fitted": round(float(WEIGHTS[at]), 2), "network": float(each[0]),
        "pca": float(each[-1]), "best": float(each[at]), "error": error * len(gain) / max(1, entries),
        "cells": len(gain), "calibrated": calibrated / max(1, entries),
    }  # fmt: skip
    if not weight:  # of the regression nothing is needed
        blend = replace(blend, loadings=loadings[:, :1], precision=precision[:1])
    return (replace(blend, weight=weight, knots=knots) if weight or knots.numel() else None), info


def fit_knots(bins: np.ndarray) -> tuple[Tensor, float]:
    """Factors that make rates of every size right on average (docs/MATHS.md 5.11).

    Parameters
    ----------
    bins
        Of each cell: hidden entries, their molecules and those predicted, by intervals of the log rate (``EDGES``);
        ``float64 [b intervals 3]``.

    Returns
    -------
    knots
        For :func:`~distdiff.imputers.blend.right_on_average`; without a column where no factor is larger than chance,
        or rates are so alike that there are no ``KNOTS`` groups of as many entries.
    gain
        Deviance of these cells that the factors take away in all.
    """
    none, entries = torch.empty(2, 0), bins[..., 0].sum(0)
    group = (KNOTS * (entries.cumsum() - entries / 2) / max(entries.sum(), 1)).astype(int)
    of_cells = np.stack([bins[:, group == k].sum(1) for k in range(KNOTS)])  # [k b 3]
    n, seen, predicted = of_cells.sum(1).T
    if not (predicted > 0).all() or not (np.diff(at := np.log(predicted / n)) > 0).all():
        return none, 0.0
    factor = np.log((seen + PRIOR) / (predicted + PRIOR))
    beside = of_cells[..., 1] - np.exp(factor)[:, None] * of_cells[..., 2]
    error = np.sqrt((beside**2).sum(1)) / (seen + PRIOR)
    factor *= np.maximum(0, 1 - error**2 / np.maximum(factor**2, 1e-30))  # towards 0, as James and Stein have it
    if not factor.any():
        return none, 0.0
    knots = torch.from_numpy(np.stack((at, factor)))
    change = (right_on_average(MIDDLE, knots) - MIDDLE).numpy()
    total = bins.sum(0)
    return knots.float(), 2 * float((total[:, 1] * change - total[:, 2] * np.expm1(change)).sum())


def _binned(x: Tensor, log_rate: Tensor, hidden: Tensor) -> np.ndarray:
    """Of each cell: hidden entries, their molecules and those predicted, by intervals of the log rate."""
    cell = torch.arange(len(x), device=x.device).unsqueeze(1)
    interval = (len(MIDDLE) * cell + torch.bucketize(log_rate, EDGES.to(log_rate)))[hidden]
    values = torch.stack((torch.ones_like(x), x, log_rate.exp()), -1)[hidden].double()
    return values.new_zeros(len(x) * len(MIDDLE), 3).index_add_(0, interval, values).view(len(x), -1, 3).cpu().numpy()


def _deviance(x: Tensor, log_mean: Tensor, hidden: Tensor) -> Tensor:
    """Poisson deviance of each cell's hidden entries, ``float64 [b]``."""
    loss = torch.xlogy(x, x) - x * log_mean - x + log_mean.exp()
    return 2 * torch.where(hidden, loss, 0.0).sum(1, dtype=torch.float64)
