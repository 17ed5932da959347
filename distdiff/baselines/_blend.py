"""How much of cheap estimators belongs into a network's answer, and which rates are off: by validation cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff.baselines.nmf import Nmf
from distdiff.baselines.pca import Pca
from distdiff.denoise import Denoiser
from distdiff.imputers.blend import KNOTS, Blend, Factorisation, Regression, beside, right_on_average
from distdiff.process import Process
from distdiff.process.counts import of_molecules
from distdiff.rng import generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.types import Tensor

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

TRAIN, ENTRIES = 10_000, 20_000_000
"""Most training cells, and most of their entries, that the estimators are fitted to."""

HELD_OUT = 2048
"""Most validation cells that the weights are fitted to."""

WEIGHTS = [(i / 20, k / 20) for i in range(21) for k in range(21 - i)]
"""Of the PCA regression and of the Poisson factorisation, to choose from; the first leaves the network alone."""

EDGES = torch.linspace(-18, 12, 601, dtype=torch.float64)
"""Between intervals of the log rate; the first and the last have no end."""

MIDDLE = torch.cat((EDGES[:1], (EDGES[:-1] + EDGES[1:]) / 2, EDGES[-1:]))

PRIOR = 10.0
"""Molecules, as predicted, that each group of entries is given besides, against chance."""


@torch.no_grad()
def fit_blend(
    process: Process, denoiser: Denoiser, store: CountStore, *, seed: int = 0, batch: int = 256
) -> tuple[Blend | None, dict[str, Any]]:
    """Fit cheap estimators to training cells, weights and factors to validation cells (docs/MATHS.md 5.10, 5.11).

    Half of the entries of the validation cells are hidden, and no label is told. The weights are chosen by
    :func:`choose`.

    Returns
    -------
    blend
        ``None`` where nothing is blended and there are no factors.
    info
        Weights ``pca`` and ``nmf``, and their sum ``weight``; deviance per entry of the ``network``, of ``pca_alone``
        and ``nmf_alone``, and of what was chosen, ``best``; ``error``, the standard error of what it gains; ``cells``
        of validation; ``calibrated``, deviance per entry that the factors take away.
    """
    law, device = of_molecules(process, "a blend"), next(denoiser.parameters()).device
    rng = numpy_generator(seed, "blend")
    most = min(TRAIN, max(1000, ENTRIES // len(store.genes)))
    train, held_out = (rng.permutation(store.rows(split))[:n] for split, n in (("train", most), ("val", HELD_OUT)))
    estimators = [of.to(device) for of in _fitted(store, np.sort(train), seed)]

    def answers() -> Iterator[tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
        """Counts, what is hidden, log rates of the network and what each adds to them, of some cells at a time."""
        for start in range(0, len(held_out), batch):
            cells = store.cells(np.sort(held_out[start : start + batch]), ()).to(device)
            x = cells.counts
            observed = generator(seed, "blend", start, device=device).uniform(*x.shape) < 0.5
            counts, p = torch.where(observed, x, 0.0), observed.to(x.dtype)
            network = predictor(law, denoiser, cells.labels)(counts, p)[..., 0]
            yield x, ~observed, network, [beside(of.rate(counts, observed), network) for of in estimators]

    parts, entries = [], 0
    for x, hidden, network, changes in answers():
        parts.append(np.stack([_losses(x, _mixed(network, changes, w), hidden) for w in WEIGHTS], 1))
        entries += int(hidden.sum())
    deviance, squared = np.moveaxis(np.concatenate(parts), 2, 0)  # [cells, weights] each
    weights = WEIGHTS[at := choose(deviance, squared)]
    bins = [_binned(x, _mixed(network, changes, weights), hidden) for x, hidden, network, changes in answers()]
    knots, calibrated = fit_knots(np.concatenate(bins))
    each, n = deviance.sum(0) / max(1, entries), len(deviance)
    info = {
        **dict(zip(("pca", "nmf"), weights, strict=True)), "weight": round(sum(weights), 2), "network": float(each[0]),
        "pca_alone": float(each[WEIGHTS.index((1.0, 0.0))]), "nmf_alone": float(each[WEIGHTS.index((0.0, 1.0))]),
        "best": float(each[at]), "error": _error(deviance[:, at] - deviance[:, 0]) * n / max(1, entries), "cells": n,
        "calibrated": calibrated / max(1, entries),
    }  # fmt: skip
    cpu = torch.device("cpu")
    used = tuple(of.weighted(w).to(cpu) for of, w in zip(estimators, weights, strict=True) if w)
    return (Blend(used, knots) if used or knots.numel() else None), info


def choose(deviance: np.ndarray, squared: np.ndarray) -> int:
    """Which of ``WEIGHTS`` a blend takes, by its scores on validation cells (docs/MATHS.md 5.10).

    From the network alone to the regression beside it, then to both estimators: each time the weights of least
    deviance among those whose squared error is not larger by more than its standard error over cells, and only where
    the deviance gains more than its own.

    Parameters
    ----------
    deviance, squared
        Sums over the hidden entries of each cell, ``float64 [b weights]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines._blend import WEIGHTS, choose
    >>> wanted = np.array([(a - 0.3) ** 2 + (b - 0.2) ** 2 for a, b in WEIGHTS])
    >>> cells = wanted + np.random.default_rng(0).normal(size=(100, 1))
    >>> WEIGHTS[choose(cells, cells)], WEIGHTS[choose(cells, -cells)]
    ((0.3, 0.2), (0.0, 0.0))
    """
    at = 0
    for candidates in ([i for i, (_, nmf) in enumerate(WEIGHTS) if not nmf], list(range(len(WEIGHTS)))):
        harm = squared - squared[:, [at]]
        allowed = [i for i in candidates if i == at or harm[:, i].mean() <= _error(harm[:, i])]
        best = min(allowed, key=lambda i: deviance[:, i].sum())
        gain = deviance[:, at] - deviance[:, best]
        at = best if gain.mean() > _error(gain) else at
    return at


def _error(change: np.ndarray) -> float:
    """Standard error of a mean over cells; of one cell: infinite."""
    return float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else float("inf")


def _fitted(store: CountStore, rows: np.ndarray, seed: int) -> tuple[Regression, Factorisation]:
    """Both estimators, with the options they choose on these cells and a weight of 1."""
    pca = Pca((10, 20, 40), scale=(0.3, 1.0), max_cells=len(rows), seed=seed)
    nmf = Nmf((10, 20, 40), max_cells=len(rows), seed=seed)
    for of in (pca, nmf):
        of.fit(store, rows)
    regression = {"mean": pca.gene_mean, "centre": pca.centre, "cap": pca.cap, "smear": pca.smear}
    regression |= {"loadings": pca.loadings, "precision": pca.precision}
    programmes = {"mean": nmf.gene_mean, "programmes": nmf.programmes.T, "average": nmf.average, "shape": nmf.shape}
    numbers = {"weight": 1.0, "scale": pca.chosen["scale"], "floor": pca.chosen["floor"]}
    return (
        Regression(numbers, _tensors(regression)),
        Factorisation({"weight": 1.0, "floor": nmf.chosen["floor"], "steps": nmf.steps}, _tensors(programmes)),
    )


def _tensors(parts: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(part, np.float32, order="C")) for name, part in parts.items()}


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
    interval = (len(MIDDLE) * cell + torch.bucketize(log_rate.contiguous(), EDGES.to(log_rate)))[hidden]
    values = torch.stack((torch.ones_like(x), x, log_rate.exp()), -1)[hidden].double()
    return values.new_zeros(len(x) * len(MIDDLE), 3).index_add_(0, interval, values).view(len(x), -1, 3).cpu().numpy()


def _mixed(network: Tensor, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Log rates of the network and of the estimators in these proportions."""
    for change, weight in zip(changes, weights, strict=True):
        network = network + weight * change if weight else network
    return network


def _losses(x: Tensor, log_mean: Tensor, hidden: Tensor) -> np.ndarray:
    """Poisson deviance and squared error of each cell's hidden entries, ``float64 [b 2]``."""
    mean = log_mean.exp()
    deviance = 2 * (torch.xlogy(x, x) - x * log_mean - x + mean)
    both = torch.where(hidden, torch.stack((deviance, (x - mean).square())), 0.0)
    return both.sum(2, dtype=torch.float64).T.cpu().numpy()
