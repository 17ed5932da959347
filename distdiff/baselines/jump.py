"""JUMP (after Chen & Zhou, ICML 2023): counts thickened to Poisson counts, diffused, and divided again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distdiff.baselines._engine import TransformerEngine
from distdiff.process import Process
from distdiff.process.jump import Jump as Law


@dataclass(eq=False)
class Jump(TransformerEngine):
    """Thickening by ``scale`` adds the relative noise ``1 / sqrt(scale x)``; draws are rounded to whole molecules.

    Births are Poisson, as in the method's own sampler. The published code has no imputation in this mode; here RePaint.

    Parameters
    ----------
    scale
        Poisson counts for each molecule.
    walk
        Reverse steps.
    width, depth, heads
        Of the transformer.

    Examples
    --------
    >>> from distdiff.baselines.jump import Jump
    >>> Jump(scale=5.0).process(10, {}).scale
    5.0
    """

    scale: float = 10.0

    label = "JUMP"

    def process(self, most: int, option: dict[str, Any]) -> Process:
        """Thickened counts, Poisson births."""
        return Law(scale=self.scale, head="mean", own=False, leap="plain", rounding="poisson")
