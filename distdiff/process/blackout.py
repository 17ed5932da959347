"""Blackout diffusion (Santos et al. 2023): count diffusion on the Fisher schedule in discrete time, with its losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from distdiff.process.counts import Counts
from distdiff.process.schedule import Discrete
from distdiff.types import Tensor


@dataclass(frozen=True)
class Blackout(Counts):
    """Pure death at ``times`` times, uniform in logit p (docs/MATHS.md 1.4), mean alone, plain steps.

    Parameters
    ----------
    schedule
        A discrete one, such as ``fisher@1000``.
    weight
        ``instantaneous``: ``p_k log(p_{k-1} / p_k) / pi_k``, the birth rates at the end of each interval; ``finite``:
        ``(p_{k-1} - p_k) / pi_k``, the expected births of the interval; ``pi_k = 1 / times``. Both tend to ``-p'``.

    Examples
    --------
    >>> from distdiff.process.blackout import Blackout
    >>> law = Blackout()
    >>> law.schedule.times, law.outputs
    (1000, 1)
    """

    schedule: Any = "fisher@1000"
    weight: str = "instantaneous"
    head: str = "mean"

    ALLOWED: ClassVar[dict[str, tuple[str, ...]]] = Counts.ALLOWED | {
        "weight": ("instantaneous", "finite"), "head": ("mean",)
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.schedule, Discrete):
            raise ValueError(f"process blackout needs a schedule with times, such as fisher@1000, "
                             f"got {self.schedule}")  # fmt: skip

    def weights(self, p: Tensor) -> Tensor:
        """Weight of the loss at ``p = p_k``; 1 at the atom ``p = 0`` (see :meth:`Counts.weights`)."""
        if self.weight == "finite":
            w = self.schedule.speed(p)
        else:
            table, k = self.schedule.table(p), self.schedule.index(p)
            w = self.schedule.times * table[k] * torch.log(table[k - 1] / table[k].clamp_min(1e-38))
        return torch.where(p == 0, torch.ones_like(p), w)
