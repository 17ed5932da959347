"""Denoise: the rate behind the counts of a cell, in one network call (docs/MATHS.md 5.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from distdiff import readouts
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.counts import of_molecules
from distdiff.sampling import predictor
from distdiff.types import Bool, Cells, Float, Tensor

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

NEAR = 0.999
"""Survival of the evidence: the limit p -> 1 (docs/MATHS.md 5.4), from the side on which the network was trained."""

WEIGHTS = np.concatenate((np.geomspace(0.01, 1e4, 25), [np.inf]))


@torch.no_grad()
def rates(
    process: Process, denoiser: Denoiser, cells: Cells, measured: Bool[Tensor, "b g"], *, p: float = NEAR,
    shrink: Float[Tensor, " g"] | None = None,
) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]]:  # fmt: skip
    """Rates ``lambda = f / (1 - p)`` as p -> 1 (docs/MATHS.md 5.4), in molecules at full depth, and log sizes.

    Parameters
    ----------
    measured
        Genes that were looked for; the others are at p = 0.
    shrink
        k per gene, as fitted on validation cells (:func:`fit_shrink`), to weigh the network's rate with the gene's own
        count: ``(x + k) / (p + k / lambda)``, the mean of a Gamma of shape k around the rate, given the count
        (docs/MATHS.md 3.6); ``None`` for the network's rate alone.

    Raises
    ------
    ValueError
        The process has no rates.
    """
    law = of_molecules(process, "denoising")
    x = torch.where(measured, cells.counts, 0.0)
    survival = p * measured.to(x.dtype)
    eta = predictor(law, denoiser, cells.labels)(x, survival)
    rate = law.rate(eta)
    if shrink is not None:
        k = shrink.to(rate)
        with_own = (x + k) / (survival + k / rate.clamp_min(1e-12))
        rate = torch.where(measured & k.isfinite(), with_own, rate)
    return rate, law.log_size(eta)


@torch.no_grad()
def denoise(
    process: Process, denoiser: Denoiser, cells: Cells, measured: Bool[Tensor, "b g"], *, readout: str = "mean",
    depth: float = 1.0, shrink: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, "b g"]:  # fmt: skip
    """Read out what another measurement of the same cells, ``depth`` times as deep, would hold.

    ``mean`` is the rate times ``depth``. For the read-outs see :func:`~distdiff.readouts.readout`, for ``shrink``
    :func:`rates`.
    """
    readouts.check(readout)
    if not depth > 0:
        raise ValueError(f"denoise: depth must be positive, got {depth}")
    rate, log_size = rates(process, denoiser, cells, measured, shrink=shrink)
    return readouts.readout(readout, torch.zeros_like(rate), depth * rate, log_size)


@torch.no_grad()
def fit_shrink(
    process: Process, denoiser: Denoiser, store: CountStore, rows: np.ndarray, *, p: float = 0.9, repeats: int = 4,
    seed: int = 0, labels: tuple[str, ...] = (), block: int = 256,
) -> Tensor:  # fmt: skip
    """Fit k of :func:`rates` per gene: the best Poisson likelihood of the molecules held back (docs/MATHS.md 5.7).

    Each gene's likelihood at each of 26 weights (infinite: the network alone) is averaged with that of all genes
    together, at the weight of 200 molecules, so that a gene that is hardly seen follows the others.

    Returns
    -------
    torch.Tensor
        ``float32 [g]``; infinite where the network needs no help.
    """
    from distdiff.rng import generator

    k = torch.as_tensor(WEIGHTS, dtype=torch.float32).view(-1, 1, 1)
    device = next(denoiser.parameters()).device
    loss = torch.zeros(len(WEIGHTS), len(store.genes), dtype=torch.float64)
    held_back = torch.zeros(len(store.genes), dtype=torch.float64)
    for repeat in range(repeats):
        for start in range(0, len(rows), block):
            whole = store.cells(rows[start : start + block], labels)
            x = generator(seed, "shrink", repeat, start).binomial(whole.counts, torch.tensor(p))
            cells = Cells(x, whole.labels, whole.rows).to(device)
            measured = torch.ones(x.shape, dtype=torch.bool, device=device)
            rate, _ = rates(process, denoiser, cells, measured, p=p)
            rate, d = rate.cpu().clamp_min(1e-10), whole.counts - x
            with_own = torch.where(k.isfinite(), (x + k) / (p + k / rate), rate).clamp_min(1e-10)
            f = (1 - p) * with_own
            loss += (f - d * f.log()).sum(1).double()
            held_back += d.sum(0)
    gain = loss - loss[-1]  # against the network alone
    pooled = gain.sum(1, keepdim=True) / held_back.sum().clamp_min(1)
    best = (gain + 200 * pooled).argmin(0)
    return torch.as_tensor(WEIGHTS, dtype=torch.float32)[best]
