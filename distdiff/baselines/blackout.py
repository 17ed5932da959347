"""Blackout diffusion (after Santos et al., ICML 2023): pure death on the Fisher schedule, imputing by RePaint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distdiff.baselines._engine import Engine
from distdiff.denoise import Denoiser
from distdiff.imputers.repaint import RePaint
from distdiff.process import Process
from distdiff.process.blackout import Blackout as Law


@dataclass(eq=False)
class Blackout(Engine):
    """CountsDiff's table calls it so: its own network on 1,000 discrete times, neither guidance nor attrition.

    Parameters
    ----------
    walk
        Reverse steps.
    width, depth, heads
        Of the transformer.

    Examples
    --------
    >>> from distdiff.baselines.blackout import Blackout
    >>> Blackout().process(10, {}).schedule.times
    1000
    """

    walk: int = 20
    width: int = 64
    depth: int = 3
    heads: int = 4
    lr: float = 2e-4

    label = "Blackout"

    def process(self, most: int, option: dict[str, Any]) -> Process:
        """Discrete pure death."""
        return Law(own=False)

    def denoiser(self, option: dict[str, Any]) -> dict[str, Any]:
        """The transformer of `CountsDiff`."""
        sizes = {name: option[name] for name in ("width", "depth", "heads")}
        return {"kind": "transformer", "shortcut": False, **sizes}

    def imputer(self, network: Denoiser) -> RePaint:
        """RePaint without repeats."""
        return RePaint(self.law, network, steps=self.walk)
