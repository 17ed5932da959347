"""Scores of held-out cells: the numbers that choose a run's best weights."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator

from distdiff.data.masks import mcar
from distdiff.denoise import Denoiser
from distdiff.rng import generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.training import losses
from distdiff.training.settings import Recipe
from distdiff.types import Cells, Condition, Tensor

BLOCK, LIMIT = 256, 8192
"""Cells of a network call, and most cells that are scored."""


@torch.no_grad()
def scores(recipe: Recipe, rows: np.ndarray, denoiser: Denoiser, accelerator: Accelerator) -> dict[str, Tensor]:
    """Score held-out cells ``rows``, no labels withheld: for each score the part of each cell, ``float64 [n]``.

    The mean over cells is the score. ``val/deviance``: mean Poisson deviance of an entry when half of them are hidden
    outright (one call); ``val/loss``: the training loss under the mixture of ``survival``, times even. Masks and noise
    depend on the seed and the rows alone; blocks of rows go round the processes. The network has the precision of the
    training. All stays on the device.
    """
    rows = rows[:: max(1, -(-len(rows) // LIMIT))]
    found = torch.zeros(3, len(rows), dtype=torch.float64, device=accelerator.device)
    for turn, start in enumerate(range(0, len(rows), BLOCK)):
        if turn % accelerator.num_processes == accelerator.process_index:
            cells = recipe.store.cells(rows[start : start + BLOCK], recipe.labels)
            found[:, start : start + len(cells)] = _of_block(recipe, denoiser, cells, start, accelerator)
    deviance, targets, loss = accelerator.reduce(found, "sum")
    return {"val/deviance": deviance / targets.mean(), "val/loss": loss}


def _of_block(recipe: Recipe, denoiser: Denoiser, cells: Cells, start: int, accelerator: Accelerator) -> Tensor:
    """Of each cell of a block: summed deviance, hidden entries, loss; ``float64 [3 b]``."""
    process, seed, device = recipe.process, recipe.settings.seed, accelerator.device

    def network(x: Tensor, p: Tensor, cond: Condition) -> Tensor:
        with accelerator.autocast():
            return denoiser(x, p, cond).float()

    hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(seed, "validate", start))
    cells, p = cells.to(device), torch.from_numpy(~hidden).to(device, non_blocking=True).float()
    rng = generator(seed, "validate", start, device=device)
    x_0, prior = process.enter(cells.counts, rng=rng), process.prior(tuple(p.shape), rng=rng)  # type: ignore[arg-type]
    x = torch.where(p == 1, x_0, prior)
    with accelerator.autocast():
        eta = predictor(process, denoiser, cells.labels)(x, p).float()
    target, truth = p == 0, cells.counts.double()
    mean = process.mean(eta, x, p).clamp_min(1e-6).double()
    deviance = torch.where(target, 2 * (mean - truth + torch.xlogy(truth, truth / mean)), 0.0).sum(1)
    t = ((torch.arange(len(cells), device=rng.device) + 0.5) / len(cells)).unsqueeze(1)
    p, _ = recipe.survival.draw(process.schedule, t, p.shape[1], rng=rng)
    x = process.forward(x_0, 1.0, p, rng=rng)
    loss = losses.of_states(process, network, x_0, x, p, cells.labels).double()
    return torch.stack((deviance, target.double().sum(1), loss))
