"""CountsDiff as published (arXiv 2604.03779): an unconditional model of thinned counts that imputes by RePaint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distdiff.baselines._engine import TransformerEngine
from distdiff.denoise import Denoiser
from distdiff.imputers.repaint import RePaint
from distdiff.process import Process
from distdiff.process.counts import Counts


@dataclass(eq=False)
class CountsDiff(TransformerEngine):
    """The published recipe on our engine: cosine schedule, mean head, weight ``-p'``, 19 steps and 3 passes of RePaint.

    With a label and guidance .5 each step takes two network calls, 114 as published; here 110, as the walk never goes
    back to p = 0, where nothing would be kept. The network is the published transformer's shape (64 numbers, 4 heads, 3
    blocks) with our tokens. One softplus, not two.

    Parameters
    ----------
    rounding
        How the expected births become molecules: ``nearest``, or ``random`` (unbiased).
    attrition
        Eta of the rescaled rule (published for imputation: .02); 0: none.
    walk, jump, passes
        Reverse steps of one pass, steps of a group, passes over each group.
    guidance
        Weight of the label (published: .5); used with a label only.
    width, depth, heads
        Of the transformer.

    Examples
    --------
    >>> from distdiff.baselines.countsdiff import CountsDiff
    >>> CountsDiff(rounding="random", attrition=0.02).label, CountsDiff().calls, CountsDiff(key="cell_type").calls
    ('CountsDiff, random rounding, attrition .02', 55, 110)
    """

    rounding: str = "nearest"
    attrition: float = 0.0
    walk: int = 19
    jump: int = 20
    passes: int = 3
    guidance: float = 0.5

    label = "CountsDiff as published"

    def __post_init__(self) -> None:
        super().__post_init__()
        Counts(head="mean", rounding=self.rounding)  # an unknown rounding is named here, not after the training
        if self.rounding != "nearest" or self.attrition:
            eta = f", attrition {self.attrition:g}".replace("0.", ".") if self.attrition else ""
            self.label = f"CountsDiff, {self.rounding} rounding{eta}"

    @property
    def calls(self) -> int:
        """Network calls of one draw."""
        groups = -(-self.walk // self.jump)
        steps = self.walk * self.passes - (self.passes - 1 if groups else 0)
        return steps * (2 if self.peeks and self.guidance not in (0, 1) else 1)

    def process(self, most: int, option: dict[str, Any]) -> Process:
        """Binomial thinning with the published weight."""
        return Counts(head="mean", weight="paper", own=False, leap="plain", rounding=self.rounding)

    def imputer(self, network: Denoiser) -> RePaint:
        """RePaint with its passes."""
        sigma = ("rescale", self.attrition) if self.attrition else ("none", 0.0)
        return RePaint(
            self.law, network, steps=self.walk, jump=self.jump, iters=self.passes, sigma=sigma,
            guidance=self.guidance if self.peeks else 1.0,
        )  # fmt: skip
