"""The reverse walk, as plain functions with a visible loop. Guidance wraps a predictor; a process needs none of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from distdiff.component import nearest
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.counts import Counts, of_molecules
from distdiff.process.gaussian import Gaussian
from distdiff.process.schedule import attrition
from distdiff.rng import Rng
from distdiff.rng.rows import Rows
from distdiff.types import Bool, Condition, Float, Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(x [b g], p broadcastable to [b g]) -> eta [b g k]``."""


def predictor(process: Process, denoiser: Denoiser, cond: Condition, *, guidance: float = 1.0) -> Predict:
    """Join a process and a denoiser into ``(x, p) -> eta``, with guidance.

    ``eta = eta_u + w (eta_c - eta_u)``, for counts with the total held (docs/MATHS.md 4.6). ``w = 1`` (conditional) and
    ``w = 0`` (unconditional) cost one network call; any other ``w`` stacks both branches into one call of twice the
    batch.

    Parameters
    ----------
    cond
        Covariates of the batch, repeated over its rows if the state has a multiple of them (several draws a cell).
    guidance
        ``w``.

    Raises
    ------
    ValueError
        The denoiser answers with another number of outputs than the process reads.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.mlp import MLP
    >>> from distdiff.process.counts import Counts
    >>> from distdiff.sampling import predictor
    >>> from distdiff.types import Condition, DataSpec
    >>> law = Counts()
    >>> network = MLP(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), law.outputs, width=8)
    >>> predict = predictor(law, network, Condition())
    >>> predict(torch.zeros(3, 2), torch.full((3, 2), 0.5)).shape  # log rate and log size of every gene
    torch.Size([3, 2, 2])
    """
    unknown = Condition({k: torch.full_like(v, -1) for k, v in cond.labels.items()})

    def call(x: Tensor, p: Tensor, c: Condition) -> Tensor:
        raw = denoiser(*process.encode(x, p), c)
        if raw.shape[-1] != process.outputs:
            raise ValueError(
                f"the denoiser gives {raw.shape[-1]} numbers a gene, process {type(process).__name__} reads "
                f"{process.outputs}; build it with outputs=process.outputs (Model.new does)"
            )
        eta = process.natural(raw, x, p)
        return eta if denoiser.largest is None else process.moderated(eta, denoiser.largest)

    def predict(x: Tensor, p: Tensor) -> Tensor:
        p = torch.as_tensor(p, dtype=x.dtype, device=x.device).expand_as(x)
        c, u = repeated(cond, len(x)), repeated(unknown, len(x))
        if guidance == 1 or not cond.labels:
            return call(x, p, c)
        if guidance == 0:
            return call(x, p, u)
        both = Condition({k: torch.cat((c.labels[k], u.labels[k])) for k in c.labels})
        eta_c, eta_u = call(torch.cat((x, x)), torch.cat((p, p)), both).chunk(2)
        return process.guided(eta_c, eta_u, guidance, p)

    return predict


def to_depth(process: Process, predict: Predict, depth: Float[Tensor, "b 1"]) -> Predict:
    """Scale the rates of every step so that molecules so far and the expected rest add up to ``depth``.

    ``lambda' = lambda (T - sum x)+ / ((1 - p) sum lambda)`` (docs/MATHS.md 4.12).

    Parameters
    ----------
    depth
        Molecules that each cell is to have, in the model's genes; above 0.

    Raises
    ------
    ValueError
        A process whose states are not molecules.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.counts import Counts
    >>> from distdiff.rng import generator
    >>> from distdiff.sampling import sample, to_depth
    >>> law, rng = Counts(head="mean"), generator(0, "example")
    >>> perfect = lambda x, p: torch.full((*x.shape, 1), 5.0).log()  # a rate of 5 for every gene
    >>> predict = to_depth(law, perfect, torch.tensor([[3000.0], [7000.0]]))
    >>> x = sample(law, predict, law.prior((2, 100), rng=rng), list(torch.linspace(0, 1, 33)), rng=rng)
    >>> [round(total, -2) for total in x.sum(1).tolist()]
    [3000.0, 7000.0]
    """
    law = of_molecules(process, "a walk to a given depth")

    def scaled(x: Tensor, p: Tensor) -> Tensor:
        eta = predict(x, p)
        rest = (depth - x.sum(1, keepdim=True)).clamp_min(0)
        return law.scaled(eta, rest.log() - law.log_total(eta, p))

    return scaled


def repeated(cond: Condition, rows: int) -> Condition:
    """Tile a batch's covariates to ``rows`` rows (draw-major: all cells of draw 1, then of draw 2 ...).

    Examples
    --------
    >>> import torch
    >>> from distdiff.sampling import repeated
    >>> from distdiff.types import Condition
    >>> repeated(Condition({"donor": torch.tensor([0, 1])}), 4).labels["donor"]  # two draws of two cells
    tensor([0, 1, 0, 1])
    """
    return Condition({k: v.repeat(rows // max(1, len(v))) for k, v in cond.labels.items()})


def sample(
    process: Process,
    predict: Predict,
    x: Float[Tensor, "b g"],
    grid: Sequence[Tensor],
    *,
    sigma: tuple[str, float] = ("none", 0.0),
    solver: str = "plain",
    rng: Rng,
    on_step: Callable[[Tensor, Tensor], Tensor] | None = None,
    only: Bool[Tensor, "b g"] | None = None,
) -> Float[Tensor, "b g"]:
    """Walk ``x`` from survival ``grid[0]`` to ``grid[-1]``.

    Parameters
    ----------
    x
        State at ``grid[0]``.
    grid
        Non-decreasing survival probabilities, each broadcastable to ``[b g]``: scalars for a plain walk, ``[b g]``
        where evidence stays at 1 (docs/MATHS.md 5.2).
    sigma
        Attrition rule and its eta (docs/MATHS.md 4.4); ``none`` never removes a molecule.
    solver
        ``plain``: the process's own step, one network call each. ``trapezoidal``: second order for count processes,
        two calls a step but the last (docs/MATHS.md 4.10). ``multistep``: DPM-Solver++ 2M for the Gaussian
        process, one call a step (docs/MATHS.md 8.8).
    on_step
        Called with ``(x, p_s)`` after each step; what it returns goes on (RePaint overwrites evidence here).
    only
        Entries to draw; the others stay as they are (which they do anyway where ``grid`` is 1 throughout). Saves their
        random numbers where the law draws entry by entry; the draws are the same.

    Raises
    ------
    ValueError
        An unknown solver, or one that the process has no rates for.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.counts import Counts
    >>> from distdiff.rng import generator
    >>> from distdiff.sampling import sample
    >>> law, rng = Counts(head="mean"), generator(0, "example")
    >>> perfect = lambda x, p: torch.full((*x.shape, 1), 5.0).log()  # a rate of 5 for every gene
    >>> grid = list(torch.tensor([0.0, 0.5, 1.0]))
    >>> x = sample(law, perfect, law.prior((2, 50_000), rng=rng), grid, rng=rng)
    >>> round(x.mean().item(), 1)
    5.0
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}{nearest(solver, SOLVERS)}")
    step = SOLVERS[solver](process, predict)
    by_entry = isinstance(rng, Rows) and not rng.fused  # (a kernel gains nothing, and finding entries waits for a GPU)
    if only is not None and solver == "plain" and sigma[0] == "none" and process.entrywise and by_entry:
        step = _some(process, predict, only)
    for p_t, p_s in itertools.pairwise(grid):
        s = attrition(sigma[0], sigma[1], p_t, p_s) if sigma[0] != "none" else 0.0
        x = step(x, p_t, p_s, s, rng)
        if on_step is not None:
            x = on_step(x, p_s)
    return x


Step = Callable[[Tensor, Tensor, Tensor, Any, Rng], Tensor]


def _plain(process: Process, predict: Predict) -> Step:
    def step(x: Tensor, p_t: Tensor, p_s: Tensor, sigma: Any, rng: Rng) -> Tensor:
        return process.reverse(x, predict(x, p_t), p_t, p_s, sigma=sigma, rng=rng)

    return step


def _some(process: Process, predict: Predict, only: Tensor) -> Step:
    """The plain step for some entries, taken out of the batch as ``[m, 1]``."""
    row, column = only.nonzero(as_tuple=True)

    def step(x: Tensor, p_t: Tensor, p_s: Tensor, sigma: Any, rng: Rng) -> Tensor:
        eta = predict(x, p_t)
        p_t, p_s = (p.expand_as(x)[row, column].unsqueeze(1) for p in (p_t, p_s))
        with rng.only(row, column):  # type: ignore[attr-defined]
            drawn = process.reverse(x[row, column].unsqueeze(1), eta[row, column].unsqueeze(1), p_t, p_s, rng=rng)
        return x.index_put((row, column), drawn.squeeze(1))

    return step


def _trapezoidal(process: Process, predict: Predict, theta: float = 0.5) -> Step:
    """Trapezoidal leaps (Ren et al. 2025) in hazard time ``H = -log((1 - p_s) / (1 - p_t))`` (docs/MATHS.md 4.10).

    In hazard time the birth rate is ``f`` itself: leap ``theta H`` at the first rate, then the rest at
    ``(a_1 f_mid - a_2 f)+``, ``a_1 = 1 / (2 theta (1 - theta))``, ``a_2 = a_1 - 1``. The last step, of infinite hazard,
    is the process's own.
    """
    if not isinstance(process, Counts):
        raise ValueError(f"solver 'trapezoidal' leaps birth rates, which process {type(process).__name__} has not")
    a_1 = 1 / (2 * theta * (1 - theta))

    def step(x: Tensor, p_t: Tensor, p_s: Tensor, sigma: Any, rng: Rng) -> Tensor:
        if isinstance(sigma, Tensor) or sigma != 0:
            raise ValueError("solver 'trapezoidal' takes no attrition; use solver='plain'")
        eta = predict(x, p_t)
        if bool(((p_s == 1) & (p_t < 1)).any()):  # (waits for a GPU: the last step is another one, of one call less)
            return process.reverse(x, eta, p_t, p_s, rng=rng)
        hazard = torch.where(p_t < 1, ((1 - p_t) / (1 - p_s).clamp_min(1e-12)).log(), 0.0)
        f = process.lost(eta, p_t)
        x = x + rng.poisson((f * theta * hazard).expand_as(x))
        p_mid = torch.where(p_t < 1, 1 - (1 - p_t) * torch.exp(-theta * hazard), p_t)
        rate = (a_1 * process.lost(predict(x, p_mid), p_mid) - (a_1 - 1) * f).clamp_min(0)
        return x + rng.poisson((rate * (1 - theta) * hazard).expand_as(x))

    return step


class _Multistep:
    """DPM-Solver++ 2M (Lu et al. 2022): a DDIM step towards ``xhat_0`` extrapolated from the last two answers.

    ``D = xhat_i + (xhat_i - xhat_{i-1}) / (2 r)`` (docs/MATHS.md 8.8), r the ratio of the last two steps in half
    log signal-to-noise. The first step and the last are of first order.
    """

    def __init__(self, process: Process, predict: Predict) -> None:
        if not isinstance(process, Gaussian):
            raise ValueError(f"solver 'multistep' walks Gaussian processes, not {type(process).__name__}")
        self.process, self.predict = process, predict
        self.previous: tuple[Tensor, Tensor] | None = None
        """Network answer and width (in log signal-to-noise) of the last step."""

    def __call__(self, x: Tensor, p_t: Tensor, p_s: Tensor, sigma: Any, rng: Rng) -> Tensor:
        eta = self.predict(x, p_t)
        width = torch.logit(p_s.double()) - torch.logit(p_t.double())
        ahead = eta
        if self.previous is not None:
            eta_before, width_before = self.previous
            share = torch.where(width.isfinite() & width_before.isfinite(), width / (2 * width_before), 0.0)
            ahead = eta + share.to(eta.dtype).expand_as(x).unsqueeze(-1) * (eta - eta_before)
        self.previous = eta, width
        return self.process.reverse(x, ahead, p_t, p_s, sigma=sigma, rng=rng)


SOLVERS: dict[str, Callable[[Process, Predict], Step]] = {
    "plain": _plain,
    "trapezoidal": _trapezoidal,
    "multistep": _Multistep,
}
