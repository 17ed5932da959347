"""Imputation by the two-level model: evidence seen whole, targets from nothing (docs/MATHS.md 5.2, 5.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distdiff.denoise import Denoiser
from distdiff.imputers import Imputed, Imputer, by_row
from distdiff.imputers.blend import Blend
from distdiff.process import Process
from distdiff.process.counts import of_molecules
from distdiff.process.schedule import levels
from distdiff.readouts import check, readout
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
        Weight w of docs/MATHS.md 4.6; 1 keeps the predictive law calibrated.
    spacing
        Where the steps of a longer walk lie (see :func:`~distdiff.process.schedule.levels`).
    solver
        Of :func:`~distdiff.sampling.sample`.
    readout
        The point estimate, in molecules (see :mod:`~distdiff.readouts`): ``mean``; ``log1p``, the molecules whose
        logarithm is ``E[log(1 + x)]``, best for squared error of log1p; ``median`` or a quantile such as ``q5``.
    statistics
        Others of the predictive law, of the same network call: ``sd`` (standard deviation, molecules) and read-outs.
    blend
        Estimators to blend with the network's rates (docs/MATHS.md 5.10), where one call gives the whole answer:
        ``steps=1``, no guidance, no labels. The sizes stay the network's.
    """

    def __init__(
        self,
        process: Process,
        denoiser: Denoiser,
        *,
        steps: int = 1,
        guidance: float = 1.0,
        spacing: str | Sequence[float] = "time",
        solver: str = "plain",
        readout: str = "mean",
        statistics: Sequence[str] = (),
        blend: Blend | None = None,
    ):
        for name in (readout, *(name for name in statistics if name != "sd")):
            check(name)
            if name != "mean":
                of_molecules(process, f"readout={name!r}")
            if name in ("log1p_cp10k", "open_problems"):
                raise ValueError(
                    f"readout={name!r} is no number of molecules: denoise reads it out, imputation does not"
                )
        if "sd" in statistics:
            of_molecules(process, "a standard deviation")
        self.statistics = tuple(statistics)
        self.readout = readout
        self.process, self.denoiser, self.guidance, self.solver = process, denoiser, guidance, solver
        self.levels = levels(process.schedule, steps, spacing)
        self.blend = blend if steps == 1 and guidance == 1 and solver == "plain" else None

    @torch.no_grad()
    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """The mean is ``f`` at p = 0, in one call (docs/MATHS.md 5.3); draws walk targets to p = 1 (docs/MATHS.md 5.2).

        See :class:`~distdiff.imputers.Imputer`; draws never fall below the evidence (no attrition).
        """
        many, p = max(1, draws), observed.to(cells.counts.dtype)
        counts = torch.where(observed, cells.counts, 0.0)
        rng = by_row(cells, many, seed, "impute")
        known = self.process.enter(counts.repeat(many, 1), rng=rng)
        prior = self.process.prior(tuple(known.shape), rng=rng)  # type: ignore[arg-type]
        x = torch.where(observed.repeat(many, 1), known, prior)
        predict = predictor(self.process, self.denoiser, cells.labels, guidance=self.guidance)
        eta = predict(x[: len(p)], p)
        if self.blend is not None:
            eta = self.blend.into(eta, counts, observed, cells.labels)
        mean = torch.where(observed, counts, self._read_out(self.readout, eta, x[: len(p)], p))
        statistics = {
            name: torch.where(observed, 0.0 if name == "sd" else counts, self._read_out(name, eta, x[: len(p)], p))
            for name in self.statistics
        }
        if draws == 0:
            return Imputed(mean, statistics=statistics)
        answers = [eta.repeat(many, 1, 1)] if many == 1 or not rng.call else []  # nothing was drawn yet: all alike

        def ahead(x: Tensor, p: Tensor) -> Tensor:  # draws that begin alike share their first call
            return answers.pop() if answers else predict(x, p)

        grid = [p.repeat(many, 1).clamp_min(level) for level in self.levels.tolist()]
        x = sample(self.process, ahead, x, grid, solver=self.solver, rng=rng, only=~observed.repeat(many, 1))
        drawn = torch.where(observed, counts, self.process.leave(x).unflatten(0, (many, -1)))
        return Imputed(mean, drawn, statistics)

    def _read_out(self, name: str, eta: Tensor, x: Tensor, p: Tensor) -> Tensor:
        if name == "mean":
            return self.process.mean(eta, x, p)
        process = of_molecules(self.process, "a read-out")
        lost, log_size = process.lost(eta, p), process.log_size(eta)
        if name == "sd":
            return (lost + lost.square() * torch.exp(-log_size)).sqrt()
        value = readout(name, x, lost, log_size)
        return torch.expm1(value) if name == "log1p" else value
