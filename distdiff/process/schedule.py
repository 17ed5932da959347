"""Survival schedules p(t), the step grid, and the attrition cap shared by every process (MATHS 1, 4.3, 4.4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from distdiff.component import nearest
from distdiff.types import Float, Tensor


class Schedule(ABC):
    """``p : [0, 1] -> [0, 1]``, differentiable and decreasing, ``p(0) = 1`` (data), ``p(1) = 0`` (MATHS 1.1)."""

    @abstractmethod
    def p(self, t: Tensor) -> Tensor:
        """Survival probability at time ``t``."""

    @abstractmethod
    def speed(self, p: Tensor) -> Tensor:
        """``-p'(t)`` at the time where the survival probability is ``p``."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """``p = cos^2(pi t / 2)``; ``-p' = (pi/2) sin(pi t) = pi sqrt(p (1 - p))`` (MATHS 1.2)."""

    def p(self, t: Tensor) -> Tensor:
        """MATHS 1.2."""
        return torch.cos(t * (math.pi / 2)).square()

    def speed(self, p: Tensor) -> Tensor:
        """MATHS 1.2 written in p."""
        return math.pi * (p * (1 - p)).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Fisher(Schedule):
    """``p = sigmoid((1 - 2t) L)``, uniform in logit p; ``-p' = 2 L p (1 - p)`` (MATHS 1.3, Blackout's schedule).

    Its ends are ``1 - eps`` and ``eps``, ``L = log((1 - eps) / eps)``: :func:`levels` puts the first and the last
    level at exactly 0 and 1, so that the prior is empty and the last step ends on data.
    """

    log_eps: float = -15.0

    @property
    def span(self) -> float:
        """L of MATHS 1.3."""
        return math.log1p(-math.exp(self.log_eps)) - self.log_eps

    def p(self, t: Tensor) -> Tensor:
        """MATHS 1.3."""
        return torch.sigmoid((1 - 2 * t) * self.span)

    def speed(self, p: Tensor) -> Tensor:
        """MATHS 1.3 written in p."""
        return 2 * self.span * p * (1 - p)


SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "fisher": Fisher}


def schedule(name: str) -> Schedule:
    """The schedule called ``name``.

    Raises
    ------
    ValueError
        Unknown name; the nearest one is told.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}{nearest(name, SCHEDULES)}")
    return SCHEDULES[name]()


def levels(schedule: Schedule, steps: int) -> Float[Tensor, " n"]:
    """Survival levels of a reverse walk of ``steps`` steps, uniform in t: ``steps + 1`` numbers from 0 up to 1.

    Raises
    ------
    ValueError
        ``steps < 1``.
    """
    if steps < 1:
        raise ValueError(f"a walk needs at least 1 step, got steps={steps}")
    p = schedule.p(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    p[0], p[-1] = 0.0, 1.0
    return p.float()


def sigma_max(p_t: Tensor, p_s: Tensor) -> Tensor:
    """Largest attrition of a step ``p_t -> p_s``: ``min(1, (1 - p_s) / p_t)`` (MATHS 4.3)."""
    return ((1 - p_s) / p_t.clamp_min(1e-38)).clamp(0, 1)


def attrition(kind: str, eta: float, p_t: Tensor, p_s: Tensor) -> Tensor:
    """Attrition sigma of a step under a rule (MATHS 4.4): 0, sigma_max, min(eta, sigma_max) or eta sigma_max.

    Raises
    ------
    ValueError
        Unknown rule, or ``eta`` outside [0, 1].
    """
    rules = {
        "none": lambda cap: torch.zeros_like(cap),
        "max": lambda cap: cap,
        "cap": lambda cap: cap.clamp_max(eta),
        "rescale": lambda cap: cap * eta,
    }
    if kind not in rules:
        raise ValueError(f"unknown attrition rule {kind!r}{nearest(kind, rules)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"attrition eta must lie in [0, 1], got {eta}")
    return rules[kind](sigma_max(p_t, p_s))
