"""The reverse walk, as plain functions with a visible loop. Guidance wraps a predictor; a process needs none of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.schedule import attrition
from distdiff.types import Condition, Float, Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(x [b g], p broadcastable to [b g]) -> eta [b g k]``."""


def predictor(process: Process, denoiser: Denoiser, cond: Condition, *, guidance: float = 1.0) -> Predict:
    """Join a process and a denoiser into ``(x, p) -> eta``, with guidance (MATHS 4.6).

    ``eta = eta_u + w (eta_c - eta_u)``. ``w = 1`` (conditional) and ``w = 0`` (unconditional) cost one network call;
    any other ``w`` stacks both branches into one call of twice the batch.

    Parameters
    ----------
    cond
        Covariates of the batch, repeated over its rows if the state has a multiple of them (several draws a cell).
    guidance
        ``w``.
    """
    unknown = Condition({k: torch.full_like(v, -1) for k, v in cond.labels.items()})

    def call(x: Tensor, p: Tensor, c: Condition) -> Tensor:
        return process.natural(denoiser(process.encode(x, p), p, c), x, p)

    def predict(x: Tensor, p: Tensor) -> Tensor:
        p = torch.as_tensor(p, dtype=x.dtype, device=x.device).expand_as(x)
        c, u = repeated(cond, len(x)), repeated(unknown, len(x))
        if guidance == 1 or not cond.labels:
            return call(x, p, c)
        if guidance == 0:
            return call(x, p, u)
        both = Condition({k: torch.cat((c.labels[k], u.labels[k])) for k in c.labels})
        eta_c, eta_u = call(torch.cat((x, x)), torch.cat((p, p)), both).chunk(2)
        return eta_u + guidance * (eta_c - eta_u)

    return predict


def repeated(cond: Condition, rows: int) -> Condition:
    """Tile a batch's covariates to ``rows`` rows (draw-major: all cells of draw 1, then of draw 2 ...)."""
    return Condition({k: v.repeat(rows // max(1, len(v))) for k, v in cond.labels.items()})


def sample(
    process: Process,
    predict: Predict,
    x: Float[Tensor, "b g"],
    grid: Sequence[Tensor],
    *,
    sigma: tuple[str, float] = ("none", 0.0),
    rng: torch.Generator,
    on_step: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Float[Tensor, "b g"]:
    """Walk ``x`` from survival ``grid[0]`` to ``grid[-1]``; one network call a step.

    Parameters
    ----------
    x
        State at ``grid[0]``.
    grid
        Non-decreasing survival probabilities, each broadcastable to ``[b g]``: scalars for a plain walk, ``[b g]``
        where evidence stays at 1 (MATHS 5.2).
    sigma
        Attrition rule and its eta (MATHS 4.4); ``none`` never removes a molecule.
    on_step
        Called with ``(x, p_s)`` after each step; what it returns goes on (RePaint overwrites evidence here).
    """
    for p_t, p_s in itertools.pairwise(grid):
        eta = predict(x, p_t)
        s = attrition(sigma[0], sigma[1], p_t, p_s) if sigma[0] != "none" else 0.0
        x = process.reverse(x, eta, p_t, p_s, sigma=s, rng=rng)
        if on_step is not None:
            x = on_step(x, p_s)
    return x
