"""Likelihood: how many nats a cell costs under the model; cells that cost too much are out of distribution."""

from __future__ import annotations

import torch

from distdiff.denoise import Denoiser
from distdiff.imputers import by_row
from distdiff.process import Process
from distdiff.sampling import predictor
from distdiff.types import Bool, Cells, Float, Tensor


def check_ood(ood: int) -> int:
    """Network calls of ``obs["distdiff_nats"]``, 0 for none.

    Raises
    ------
    ValueError
        It is below 0, or no whole number.
    """
    if ood != int(ood) or ood < 0:
        raise ValueError(f"ood={ood}: give the network calls of obs['distdiff_nats'], 1 or more, or 0 for none")
    return int(ood)


@torch.no_grad()
def nats(
    process: Process, denoiser: Denoiser, cells: Cells, measured: Bool[Tensor, "b g"], *, levels: int = 32,
    seed: int = 0,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Upper bound of ``-log p(x_0)`` of each cell in nats: docs/MATHS.md 3.3 integrated over p, whatever the schedule.

    With ``p = 1 - u^2`` the integral is a mean over ``levels`` strata of u, one thinning each at a random place of its
    stratum (drawn evenly in p itself, the few molecules lost near p = 1 would make its variance infinite). Genes that
    were not measured stay at p = 0 and count for nothing.

    Raises
    ------
    ValueError
        ``levels`` below 1.
    """
    if levels < 1:
        raise ValueError(f"the likelihood bound needs 1 network call or more, got levels={levels}")
    rng = by_row(cells, 1, seed, "likelihood")
    x_0 = process.enter(torch.where(measured, cells.counts, 0.0), rng=rng)
    predict = predictor(process, denoiser, cells.labels)
    total = torch.zeros(len(cells), device=x_0.device)
    for stratum in range(levels):
        u = (stratum + rng.uniform(len(cells), 1)) / levels
        p = torch.where(measured, (1 - u.square()).clamp_max(1 - 2**-20), 0.0)  # float32 tells it from 1
        x = process.forward(x_0, 1.0, p, rng=rng)
        entries = process.bound(predict(x, p), x_0, x, p)
        total += torch.where(measured, 2 * u * entries, 0.0).sum(1) / levels
    return total
