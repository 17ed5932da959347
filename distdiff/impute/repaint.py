"""Imputation by RePaint: an unconditional walk whose known entries are overwritten at every step (CD 3.6, MATHS 6)."""

from __future__ import annotations

import torch

from distdiff.denoise import Denoiser
from distdiff.impute import Imputed, Imputer
from distdiff.process import Process
from distdiff.process.schedule import levels
from distdiff.rng import generator
from distdiff.sampling import predictor, sample
from distdiff.types import Bool, Cells, Tensor


class RePaint(Imputer):
    """RePaint over any process: evidence is seen thinned to the level of the walk, never whole.

    Parameters
    ----------
    steps
        Reverse steps of one pass.
    jump, iters
        Every ``jump`` steps the walk goes back and repeats them, ``iters`` passes in all (MATHS 6.2). It never goes
        back to p = 0, which would wipe the state and only cost time. ``iters = 1`` repeats nothing.
    sigma
        Attrition rule and eta (MATHS 4.4).
    """

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        *,
        steps: int = 100,
        jump: int = 10,
        iters: int = 1,
        guidance: float = 1.0,
        sigma: tuple[str, float] = ("none", 0.0),
    ):
        for name, value in (("steps", steps), ("jump", jump), ("iters", iters)):
            if value < 1:
                raise ValueError(f"RePaint needs {name} >= 1, got {value}")
        self.process, self.denoiser = process, denoiser
        self.steps, self.jump, self.iters, self.guidance, self.sigma = steps, jump, iters, guidance, sigma

    @torch.no_grad()
    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.impute.Imputer`; the mean is the mean of the draws (of one, if none is asked for)."""
        rng = generator(seed, "repaint", int(cells.rows[0]), device=cells.counts.device)
        k = max(1, draws)
        known = torch.where(observed, cells.counts, torch.zeros_like(cells.counts)).repeat(k, 1)
        observed = observed.repeat(k, 1)
        predict = predictor(self.process, self.denoiser, cells.labels, guidance=self.guidance)

        def overwrite(x: Tensor, p_s: Tensor) -> Tensor:  # MATHS 6.1
            return torch.where(observed, self.process.forward(known, 1.0, p_s, rng=rng), x)

        x = self.process.prior(tuple(known.shape), device=known.device)  # type: ignore[arg-type]
        grid = levels(self.process.schedule, self.steps).to(known.device)
        for start in range(0, self.steps, self.jump):
            part = grid[start : start + self.jump + 1]
            for again in reversed(range(self.iters)):
                x = sample(self.process, predict, x, list(part), sigma=self.sigma, rng=rng, on_step=overwrite)
                if again:  # MATHS 6.2
                    part = part[1:] if part[0] == 0 else part
                    x = overwrite(self.process.forward(x, part[-1], part[0], rng=rng), part[0])
        out = x.unflatten(0, (k, len(cells)))
        return Imputed(out.mean(0), out if draws else None)
