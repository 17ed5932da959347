"""Imputation by the two-level model: evidence seen whole, targets from nothing (MATHS 5.2, 5.3)."""

from __future__ import annotations

import torch

from distdiff.denoise import Denoiser
from distdiff.impute import Imputed, Imputer
from distdiff.process import Process
from distdiff.process.schedule import levels
from distdiff.rng import generator
from distdiff.sampling import predictor, sample
from distdiff.types import Bool, Cells, Tensor


class Conditional(Imputer):
    """Posterior mean in one network call; draws in ``steps`` calls (all draws of one step share its call).

    Parameters
    ----------
    process, denoiser
        The law and the trained network.
    steps
        Network calls of a draw. 1 draws from the head around the same call that gives the mean.
    guidance
        Weight w of MATHS 4.6; 1 keeps the predictive law calibrated.
    """

    def __init__(self, process: Process, denoiser: Denoiser, *, steps: int = 1, guidance: float = 1.0):
        if steps < 1:
            raise ValueError(f"an imputation needs at least 1 step, got steps={steps}")
        self.process, self.denoiser, self.steps, self.guidance = process, denoiser, steps, guidance

    @torch.no_grad()
    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.impute.Imputer`; draws never fall below the evidence (no attrition)."""
        rng = generator(seed, "impute", int(cells.rows[0]), device=cells.counts.device)
        p = observed.to(cells.counts.dtype)
        x = torch.where(observed, cells.counts, torch.zeros_like(cells.counts))
        predict = predictor(self.process, self.denoiser, cells.labels, guidance=self.guidance)
        eta = predict(x, p)
        mean = self.process.mean(eta, x, p)
        if draws == 0:
            return Imputed(mean)
        if self.steps == 1:
            drawn = [self.process.reverse(x, eta, p, 1.0, rng=rng) for _ in range(draws)]
            return Imputed(mean, torch.stack(drawn))
        many, p = x.repeat(draws, 1), p.repeat(draws, 1)
        grid = [torch.maximum(p, level) for level in levels(self.process.schedule, self.steps).to(p.device)]
        return Imputed(mean, sample(self.process, predict, many, grid, rng=rng).unflatten(0, (draws, len(x))))
