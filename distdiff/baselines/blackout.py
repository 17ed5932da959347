"""Blackout diffusion (after Santos et al., ICML 2023): pure death on the Fisher schedule, imputing by RePaint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distdiff.baselines._engine import TransformerEngine
from distdiff.process import Process
from distdiff.process.blackout import Blackout as Law


@dataclass(eq=False)
class Blackout(TransformerEngine):
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

    label = "Blackout"

    def process(self, most: int, option: dict[str, Any]) -> Process:
        """Discrete pure death."""
        return Law(own=False)
