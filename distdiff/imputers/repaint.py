"""Imputation by RePaint: an unconditional walk whose known entries are overwritten at every step (docs/MATHS.md 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distdiff.denoise import Denoiser
from distdiff.imputers import Imputed, Imputer, by_row
from distdiff.process import Process
from distdiff.process.schedule import levels
from distdiff.sampling import predictor, sample
from distdiff.types import Bool, Cells, Tensor


class RePaint(Imputer):
    """RePaint over any process: evidence is seen thinned to the level of the walk, never whole.

    Parameters
    ----------
    steps
        Reverse steps of one pass.
    jump, iters
        Every ``jump`` steps the walk goes back and repeats them, ``iters`` passes in all (docs/MATHS.md 6.2). It
        never goes back to p = 0, which would wipe the state and only cost time. ``iters = 1`` repeats nothing.
    sigma
        Attrition rule and eta (docs/MATHS.md 4.4).
    spacing, solver
        As for :class:`~distdiff.imputers.conditional.Conditional`.
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
        spacing: str | Sequence[float] = "time",
        solver: str = "plain",
    ):
        for name, value in (("steps", steps), ("jump", jump), ("iters", iters)):
            if value < 1:
                raise ValueError(f"RePaint needs {name} >= 1, got {value}")
        self.process, self.denoiser = process, denoiser
        self.steps, self.jump, self.iters, self.guidance, self.sigma = steps, jump, iters, guidance, sigma
        self.levels, self.solver = levels(process.schedule, steps, spacing), solver

    @torch.no_grad()
    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.imputers.Imputer`; the mean is the mean of the draws (of one, if none is asked for)."""
        many = max(1, draws)
        rng = by_row(cells, many, seed, "repaint")
        counts, seen = torch.where(observed, cells.counts, 0.0), observed.repeat(many, 1)
        known = self.process.enter(counts.repeat(many, 1), rng=rng)
        predict = predictor(self.process, self.denoiser, cells.labels, guidance=self.guidance)

        def overwrite(x: Tensor, p_s: Tensor) -> Tensor:  # Binomial(x_0, p_s) where x_0 is known: docs/MATHS.md 6.1
            return torch.where(seen, self.process.forward(known, 1.0, p_s, rng=rng), x)

        x = self.process.prior(tuple(known.shape), rng=rng)  # type: ignore[arg-type]
        grid = self.levels.to(known.device)
        for start in range(0, self.steps, self.jump):
            part = grid[start : start + self.jump + 1]
            for again in reversed(range(self.iters)):
                x = sample(self.process, predict, x, list(part), sigma=self.sigma, solver=self.solver, rng=rng,
                           on_step=overwrite)  # fmt: skip
                if again:  # Binomial(x_s, p_t / p_s): docs/MATHS.md 6.2
                    part = part[1:] if part[0] == 0 else part
                    x = overwrite(self.process.forward(x, part[-1], part[0], rng=rng), part[0])
        out = torch.where(observed, counts, self.process.leave(x).unflatten(0, (many, -1)))
        return Imputed(out.mean(0), out if draws else None)
