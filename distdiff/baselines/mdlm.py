"""MDLM and ReMDM (after Sahoo et al., NeurIPS 2024; Wang et al., 2025): counts as classes, masked and unmasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distdiff.baselines._engine import TransformerEngine
from distdiff.denoise import Denoiser
from distdiff.imputers import Imputed, Imputer, by_row
from distdiff.process import Process
from distdiff.process.masked import Masked
from distdiff.process.schedule import levels
from distdiff.sampling import predictor, sample
from distdiff.types import Bool, Cells, Tensor


class Unmask(Imputer):
    """Evidence is seen whole, hidden entries start masked; by ``sigma`` a share of the unmasked is masked again.

    Examples
    --------
    >>> from distdiff.baselines.mdlm import Unmask
    >>> Unmask(Masked(classes=4), None, steps=4, sigma=("none", 0.0)).levels
    tensor([0.0000, 0.1464, 0.5000, 0.8536, 1.0000])
    """

    def __init__(self, process: Process, denoiser: Any, *, steps: int, sigma: tuple[str, float]) -> None:
        self.process, self.denoiser, self.sigma = process, denoiser, sigma
        self.levels = levels(process.schedule, steps)

    @torch.no_grad()
    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.imputers.Imputer`."""
        many = max(1, draws)
        rng = by_row(cells, many, seed, "unmask")
        counts, seen = torch.where(observed, cells.counts, 0.0), observed.repeat(many, 1)
        known = self.process.enter(counts.repeat(many, 1), rng=rng)
        x = torch.where(seen, known, self.process.prior(tuple(known.shape), rng=rng))  # type: ignore[arg-type]
        grid = [seen.to(known).clamp_min(level) for level in self.levels.tolist()]
        predict = predictor(self.process, self.denoiser, cells.labels)
        x = sample(self.process, predict, x, grid, sigma=self.sigma, rng=rng)
        drawn = torch.where(observed, counts, self.process.leave(x).unflatten(0, (many, -1)))
        return Imputed(drawn.mean(0), drawn)


@dataclass(eq=False)
class Mdlm(TransformerEngine):
    """A transformer that gives every masked gene a law over classes ``0 ... classes - 1``.

    Larger counts are held at the last class. An entry is unmasked with probability ``(p_s - p_t) / (1 - p_t)`` at each
    step, as in the method (the published comparison draws every masked entry anew at every step).

    Parameters
    ----------
    remask
        Eta of the rescaled rule by which ReMDM masks entries again; 0: MDLM.
    classes
        Most classes; fewer if training counts are smaller.
    walk
        Reverse steps.
    width, depth, heads
        Of the transformer.

    Examples
    --------
    >>> from distdiff.baselines.mdlm import Mdlm
    >>> Mdlm().label, Mdlm(remask=0.02).label, Mdlm().process(9, {"classes": 64}).classes
    ('MDLM', 'ReMDM', 10)
    """

    remask: float = 0.0
    classes: int = 64

    label = "MDLM"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.label = "ReMDM" if self.remask else "MDLM"

    def process(self, most: int, option: dict[str, Any]) -> Process:
        """Masking of classes."""
        return Masked(classes=max(2, min(option["classes"], most + 1)), clamp=True)

    def imputer(self, network: Denoiser) -> Unmask:
        """Unmask, or unmask and remask."""
        sigma = ("rescale", self.remask) if self.remask else ("none", 0.0)
        return Unmask(self.law, network, steps=self.walk, sigma=sigma)
