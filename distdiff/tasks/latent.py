"""Latent: where a cell lies in the network, the last hidden state before its answers, for neighbours and UMAP."""

from __future__ import annotations

import torch

from distdiff.denoise import Denoiser
from distdiff.imputers import by_row
from distdiff.process import Process
from distdiff.tasks.denoise import NEAR
from distdiff.types import Bool, Cells, Float, Tensor

KEY = "X_distdiff"
"""Entry of ``obsm``."""

NOTE = "distdiff_latent"
"""Entry of ``uns``: no layer is written, so what ``uns["distdiff"]`` says of layers stays."""


@torch.no_grad()
def latent(
    process: Process, denoiser: Denoiser, cells: Cells, measured: Bool[Tensor, "b g"], *, seed: int = 0
) -> Float[Tensor, "b d"]:
    """The denoiser's hidden state of cells that are seen almost whole (the p at which counts are denoised).

    Parameters
    ----------
    measured
        Genes that were looked for; the others are at p = 0.
    seed
        Of the state of a process that enters its data by chance (``jump``).

    Raises
    ------
    ValueError
        The denoiser has no hidden state of a cell.
    """
    x = process.enter(torch.where(measured, cells.counts, 0.0), rng=by_row(cells, 1, seed, "latent"))
    return denoiser.hidden(*process.encode(x, NEAR * measured.to(x.dtype)), cells.labels).float()
