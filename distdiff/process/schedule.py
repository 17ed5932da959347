"""Survival schedules p(t), the step grid, and the attrition cap shared by every process (docs/MATHS.md 1, 4.3, 4.4)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distdiff.component import load, nearest
from distdiff.process import tensor
from distdiff.types import Float, Tensor


class Schedule(ABC):
    """``p : [0, 1] -> [0, 1]``, differentiable and falling, ``p(0) = 1`` (data), ``p(1) = 0`` (docs/MATHS.md 1.1).

    Examples
    --------
    >>> from distdiff.process.schedule import Schedule, levels
    >>> class Square(Schedule):
    ...     def p(self, t):
    ...         return (1 - t) ** 2
    ...     def speed(self, p):
    ...         return 2 * p.sqrt()
    >>> levels(Square(), 2)
    tensor([0.0000, 0.2500, 1.0000])
    """

    @abstractmethod
    def p(self, t: Tensor) -> Tensor:
        """Survival probability at time ``t``."""

    @abstractmethod
    def speed(self, p: Tensor) -> Tensor:
        """``-p'(t)`` at the time where the survival probability is ``p``."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """``p = cos^2(pi t / 2)``; ``-p' = (pi/2) sin(pi t) = pi sqrt(p (1 - p))`` (docs/MATHS.md 1.2).

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import Cosine
    >>> Cosine().p(torch.tensor([0.5])), Cosine().speed(torch.tensor([0.5]))
    (tensor([0.5000]), tensor([1.5708]))
    """

    def p(self, t: Tensor) -> Tensor:
        """``cos^2(pi t / 2)`` (docs/MATHS.md 1.2)."""
        return torch.cos(t * (math.pi / 2)).square()

    def speed(self, p: Tensor) -> Tensor:
        """``pi sqrt(p (1 - p))`` (docs/MATHS.md 1.2)."""
        return math.pi * (p * (1 - p)).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Fisher(Schedule):
    """``p = sigmoid((1 - 2t) L)``, uniform in logit p; ``-p' = 2 L p (1 - p)`` (docs/MATHS.md 1.3).

    It is Blackout's. Its ends are ``1 - eps`` and ``eps``, ``L = log((1 - eps) / eps)``: :func:`levels` puts the first
    and the last level at exactly 0 and 1, so that the prior is empty and the last step ends on data.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import Fisher
    >>> Fisher().p(torch.tensor([0.25, 0.5]))
    tensor([0.9994, 0.5000])
    """

    log_eps: float = -15.0

    def __post_init__(self) -> None:
        if not isinstance(self.log_eps, (int, float)) or not -700 < self.log_eps < 0:
            raise ValueError(f"schedule fisher: log_eps must lie between -700 and 0, got {self.log_eps!r}")

    @property
    def span(self) -> float:
        """``L = log((1 - eps) / eps)`` (docs/MATHS.md 1.3)."""
        return math.log1p(-math.exp(self.log_eps)) - self.log_eps

    def p(self, t: Tensor) -> Tensor:
        """``sigmoid((1 - 2t) L)`` (docs/MATHS.md 1.3)."""
        return torch.sigmoid((1 - 2 * t) * self.span)

    def speed(self, p: Tensor) -> Tensor:
        """``2 L p (1 - p)`` (docs/MATHS.md 1.3)."""
        return 2 * self.span * p * (1 - p)


@dataclass(frozen=True)
class Linear(Schedule):
    """``p = 1 - t``: every survival probability is as likely as any other (docs/MATHS.md 1.6).

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import Linear
    >>> Linear().p(torch.tensor([0.0, 0.25, 1.0]))
    tensor([1.0000, 0.7500, 0.0000])
    """

    def p(self, t: Tensor) -> Tensor:
        """``1 - t``."""
        return 1 - t

    def speed(self, p: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(p)


@functools.lru_cache(maxsize=32)
def _on(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constants as a tensor on a device, cached: each copy from the host would stall a GPU."""
    return torch.tensor(values, dtype=torch.float64).to(dtype).to(device)


@dataclass(frozen=True)
class Table(Schedule):
    """A schedule given by its values at equally spaced times, linear in between.

    Parameters
    ----------
    values
        Decreasing, from 1 (``t = 0``) to 0 (``t = 1``).

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import Table
    >>> Table((1.0, 0.5, 0.0)).p(torch.tensor([0.25, 0.75]))
    tensor([0.7500, 0.2500])
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(p, (int, float)) for p in self.values):
            raise ValueError(f"a schedule's table must be numbers that fall from 1 to 0, got {list(self.values)}")
        v = tuple(float(p) for p in self.values)
        if len(v) < 2 or v[0] != 1 or v[-1] != 0 or any(not b < a for a, b in itertools.pairwise(v)):
            raise ValueError(f"a schedule's table must fall from 1 to 0, got {list(v)}")
        object.__setattr__(self, "values", v)

    def p(self, t: Tensor) -> Tensor:
        """Linear interpolation."""
        v, n = _on(self.values, t.dtype, t.device), len(self.values) - 1
        k = (t * n).floor().clamp(0, n - 1)
        low = v[k.long()]
        return low + (v[k.long() + 1] - low) * (t * n - k)

    def speed(self, p: Tensor) -> Tensor:
        """``-slope`` of the linear piece that contains ``p``."""
        v, n = _on(self.values, p.dtype, p.device), len(self.values) - 1
        piece = n - torch.searchsorted(v.flip(0), p.contiguous(), right=False).clamp(1, n)
        return (v[piece] - v[piece + 1]) * n


MOST_TIMES = 1_000_000


@dataclass(frozen=True)
class Discrete(Schedule):
    """A schedule at ``times`` points: discrete-time training (docs/MATHS.md 1.4); Fisher at 1000 points is Blackout's.

    ``p_k = p(k / times)``, ``k = 1 ... times``, and ``p_0 = 1``; a uniform time falls on each k with the same
    probability.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import Discrete, Linear
    >>> coarse = Discrete(Linear(), 4)
    >>> coarse.p(torch.tensor([0.1, 0.3])), coarse.index(torch.tensor([0.75]))
    (tensor([0.7500, 0.5000]), tensor([1]))
    """

    base: Schedule
    times: int

    def __post_init__(self) -> None:
        if type(self.times) is not int or self.times < 2:
            raise ValueError(f"a discrete schedule needs times >= 2, got {self.times!r}")
        if self.times > MOST_TIMES:
            raise ValueError(f"a discrete schedule takes {MOST_TIMES:,} times at most, got {self.times}")
        p = self.base.p(torch.arange(self.times + 1, dtype=torch.float64) / self.times).tolist()
        object.__setattr__(self, "_values", (1.0, *p[1:]))

    def table(self, like: Tensor) -> Tensor:
        """``p_0 ... p_times`` with the device and dtype of ``like``."""
        return _on(self._values, like.dtype, like.device)  # type: ignore[attr-defined]

    def p(self, t: Tensor) -> Tensor:
        """``p_k`` of the next of the ``times`` times at or after ``t``."""
        return self.table(t)[(t * self.times).ceil().long().clamp(1, self.times)]

    def index(self, p: Tensor) -> Tensor:
        """The ``k`` of 1 ... times with the ``p_k`` nearest to ``p``."""
        table = self.table(p)
        middle = (table[1:-1] + table[2:]).flip(0) / 2
        return self.times - torch.searchsorted(middle, p.contiguous())

    def speed(self, p: Tensor) -> Tensor:
        """``times (p_{k-1} - p_k)``: the weight of Blackout's finite-time loss, ``-p'`` in the limit."""
        table, k = self.table(p), self.index(p)
        return self.times * (table[k - 1] - table[k])


SCHEDULES: dict[str, type[Schedule]] = {"cosine": Cosine, "fisher": Fisher, "linear": Linear, "table": Table}


def schedule(given: Any) -> Schedule:
    """A schedule from a config: a name, a list of values, or a mapping with ``kind`` and options.

    ``{kind: fisher, times: 1000}``, or ``fisher@1000`` for short, is the discrete-time form of any kind;
    ``kind: module:Class`` is a class of your own.

    Raises
    ------
    ValueError
        Unknown name or option (the message names the nearest), or a table that does not fall from 1 to 0.

    Examples
    --------
    >>> from distdiff.process.schedule import schedule
    >>> schedule("fisher@1000")
    Discrete(base=Fisher(log_eps=-15.0), times=1000)
    >>> schedule([1.0, 0.4, 0.0])
    Table(values=(1.0, 0.4, 0.0))
    >>> schedule({"kind": "fisher", "log_eps": -10.0})
    Fisher(log_eps=-10.0)
    """
    if isinstance(given, Schedule):
        return given
    if isinstance(given, str):
        name, at, times = given.partition("@")
        if at and not times.isdigit():
            raise ValueError(f"schedule {given!r}: the number of times is wanted after @, for example fisher@1000")
        given = {"kind": name, "times": int(times)} if at else {"kind": name}
    elif not isinstance(given, (Mapping, Sequence)):
        raise ValueError(f"schedule must be a name, a list of numbers or a mapping, got {given!r}")
    elif not isinstance(given, Mapping):
        given = {"kind": "table", "values": tuple(given)}
    options = dict(given)
    kind, points = options.pop("kind", "?"), options.pop("times", None)
    if not isinstance(kind, str):
        raise ValueError(f"schedule: kind must be a name, got {kind!r}")
    base: type = Schedule
    try:
        cls = load(base, kind) if ":" in kind else SCHEDULES.get(kind)
    except ValueError as error:
        raise ValueError(f"schedule: {error}") from None
    if cls is None:
        raise ValueError(f"unknown schedule {kind!r}{nearest(kind, SCHEDULES)}")
    allowed = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else list(options)
    if unknown := [name for name in options if name not in allowed]:
        raise ValueError(f"schedule {kind}: unknown option {unknown[0]!r}{nearest(unknown[0], [*allowed, 'times'])}")
    made = cls(**options)
    return made if points is None else Discrete(made, points)


SPACINGS = ("time", "logit", "geometric", "variance")
"""Ways to place the levels of a walk (``variance``: by what a trained model measured, docs/MATHS.md 4.11)."""


LOGIT_SPAN = math.log(999)
"""Half the range of ``logit p`` in a walk with ``logit`` spacing: p from .001 to .999, the ends then set to 0 and 1."""


FIRST = 1e-3
"""First level above 0 of a walk with ``geometric`` spacing: a cell of 2,000 molecules then has two."""


LONGEST = 100_000
"""Most steps of a walk."""


def levels(schedule: Schedule, steps: int, spacing: str | Sequence[float] = "time") -> Float[Tensor, " n"]:
    """Survival levels of a reverse walk: ``steps + 1`` numbers from 0 up to 1.

    Parameters
    ----------
    spacing
        ``time``: uniform in t. ``logit``: uniform in ``log(p / (1 - p))``. ``geometric``: 0, then from .001 to 1 by
        equal factors, so that each step multiplies the molecules alike (docs/MATHS.md 5.1). Or the levels themselves,
        for example from :func:`placed`.

    Raises
    ------
    ValueError
        ``steps`` below 1 or above 100,000, an unknown spacing, levels that do not rise from 0 to 1 in ``steps`` steps.

    Examples
    --------
    >>> from distdiff.process.schedule import Linear, levels
    >>> levels(Linear(), 4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
    >>> levels(Linear(), 2, "logit")
    tensor([0.0000, 0.5000, 1.0000])
    >>> levels(Linear(), 4, "geometric")
    tensor([0.0000, 0.0010, 0.0100, 0.1000, 1.0000])
    """
    if not 1 <= steps <= LONGEST:
        raise ValueError(f"a walk has 1 to {LONGEST:,} steps, got steps={steps:,}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if not isinstance(spacing, str):
        p = torch.as_tensor(spacing, dtype=torch.float64)
        check_grid(p.tolist())
        if p[0] != 0 or len(p) != steps + 1:
            raise ValueError(f"{steps} steps need {steps + 1} levels from 0 to 1, got {len(p)} from {float(p[0]):g}")
        return p.float()
    if spacing == "time":
        p = schedule.p(t)
    elif spacing == "logit":
        p = torch.sigmoid((1 - 2 * t) * LOGIT_SPAN)
    elif spacing == "geometric":
        p = torch.cat((t.new_zeros(1), torch.logspace(math.log10(FIRST), 0, steps, dtype=torch.float64)))
    else:
        raise ValueError(f"unknown spacing {spacing!r}{nearest(spacing, SPACINGS)}")
    p[0], p[-1] = 0.0, 1.0
    return p.float()


def check_grid(grid: Sequence[float]) -> None:
    """Check that levels rise and end at 1.

    Raises
    ------
    ValueError
        They do not; the message names the first level that is wrong.

    Examples
    --------
    >>> from distdiff.process.schedule import check_grid
    >>> check_grid([0.0, 0.5, 1.0])
    >>> check_grid([0.5, 0.2, 1.0])
    Traceback (most recent call last):
        ...
    ValueError: a grid must rise within [0, 1], got 0.5 before 0.2
    """
    if not grid or grid[-1] != 1:
        raise ValueError(f"a grid must end at p = 1 (whole cells), this one ends at {grid[-1] if grid else 'nothing'}")
    for a, b in itertools.pairwise(grid):
        if not 0 <= a < b <= 1:
            raise ValueError(f"a grid must rise within [0, 1], got {a:g} before {b:g}")


def placed(p: Sequence[float], excess: Sequence[float], steps: int, start: float = 0.0) -> list[float]:
    """Levels where a walk loses least variance: they minimise ``sum r^2 (Var d - E d)+`` (docs/MATHS.md 4.11).

    Parameters
    ----------
    p, excess
        Levels in [0, 1) at which the excess variance of the lost molecules was measured (any unit), rising.
    steps
        Number of steps; the exact minimum over the levels ``p``, by dynamic programming.
    start
        First level (0, or the level of the evidence when cells are deepened).

    Raises
    ------
    ValueError
        More steps than levels.

    Examples
    --------
    >>> from distdiff.process.schedule import placed
    >>> placed([0.0, 0.25, 0.5, 0.75], [8.0, 4.0, 1.0, 0.2], steps=2)
    [0.0, 0.5, 1.0]
    """
    v = np.maximum(np.interp([start, *(q for q in p if q > start)], p, excess), 0.0)
    grid = np.array([start, *(q for q in p if q > start), 1.0])
    n = len(grid)
    if steps > n - 1:
        raise ValueError(f"{steps} steps cannot be placed on {n - 1} measured levels")
    gap = (grid[None, :] - grid[:, None]) / (1 - grid[:, None]).clip(1e-12)
    cost = np.where(gap > 0, gap**2 * np.append(v, 0.0)[:, None], np.inf)
    best, predecessors = cost[0], []
    for _ in range(steps - 1):
        totals = best[:, None] + cost
        predecessors.append(totals.argmin(0))
        best = totals.min(0)
    node, path = n - 1, [n - 1]
    for predecessor in reversed(predecessors):
        node = int(predecessor[node])
        path.append(node)
    return [float(grid[i]) for i in [0, *reversed(path)]]


def sigma_max(p_t: Tensor, p_s: Tensor) -> Tensor:
    """Largest attrition of a step ``p_t -> p_s``: ``min(1, (1 - p_s) / p_t)`` (docs/MATHS.md 4.3).

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import sigma_max
    >>> sigma_max(torch.tensor(0.5), torch.tensor(0.75))
    tensor(0.5000)
    """
    return ((1 - p_s) / p_t.clamp_min(1e-38)).clamp(0, 1)


def attrition(kind: str, eta: float, p_t: Tensor, p_s: Tensor) -> Tensor:
    """Attrition sigma of a step under a rule (docs/MATHS.md 4.4): 0, sigma_max, min(eta, sigma_max) or eta sigma_max.

    Raises
    ------
    ValueError
        Unknown rule, or ``eta`` outside [0, 1].

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import attrition
    >>> attrition("cap", 0.1, torch.tensor([0.5, 0.9]), torch.tensor([0.75, 1.0]))
    tensor([0.1000, 0.0000])
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


def check_sigma(sigma: float | Tensor, p_t: Tensor, p_s: Tensor) -> Tensor:
    """``sigma`` as a tensor, checked to be in the range of this step (on the CPU only, as in `survivors`).

    Raises
    ------
    ValueError
        ``sigma`` negative or above ``sigma_max`` (docs/MATHS.md 4.3): a larger one would need more births than there
        are lost molecules.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import check_sigma
    >>> check_sigma(0.2, torch.tensor(0.5), torch.tensor(0.75))
    tensor(0.2000)
    >>> check_sigma(0.9, torch.tensor(0.5), torch.tensor(0.75))
    Traceback (most recent call last):
        ...
    ValueError: attrition sigma=0.9 is outside [0, 0.5], its range for this step (p_t=0.5, p_s=0.75)
    """
    none = not isinstance(sigma, Tensor) and sigma == 0
    sigma = tensor(sigma, p_t)
    if none or p_t.device.type != "cpu":
        return sigma
    cap = sigma_max(p_t, p_s)
    if bool(((sigma > cap + 1e-6) | (sigma < 0)).any()):
        raise ValueError(
            f"attrition sigma={sigma.max():g} is outside [0, {cap.min():g}], its range for this step "
            f"(p_t={p_t.max():g}, p_s={p_s.max():g})"
        )
    return sigma


def births_share(p_t: Tensor, p_s: Tensor, sigma: Tensor) -> Tensor:
    """``beta = (p_s - (1 - sigma) p_t) / (1 - p_t)`` (docs/MATHS.md 4.2, 9.3); 0 where ``p_t == 1``.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import births_share
    >>> births_share(torch.tensor(0.5), torch.tensor(0.75), torch.tensor(0.0))
    tensor(0.5000)
    """
    beta = (p_s - (1 - sigma) * p_t) / (1 - p_t).clamp_min(1e-12)
    return torch.where(p_t < 1, beta.clamp(0, 1), torch.zeros_like(beta))


def survivors(x: Tensor, p_s: float | Tensor, p_t: float | Tensor) -> Tensor:
    """Share ``p_t / p_s`` of the molecules present at ``p_s`` that are kept at ``p_t`` (docs/MATHS.md 2.3).

    The range is checked on the CPU only, because each check stalls a GPU. The result broadcasts against ``x``.

    Raises
    ------
    ValueError
        Not ``0 <= p_t <= p_s <= 1``.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.schedule import survivors
    >>> survivors(torch.zeros(1, 2), 0.8, 0.2)
    tensor(0.2500)
    """
    whole = not isinstance(p_s, torch.Tensor) and p_s == 1
    p_s, p_t = tensor(p_s, x), tensor(p_t, x)
    if x.device.type == "cpu" and not bool((p_t >= 0).all() and (p_t <= p_s).all() and (p_s <= 1).all()):
        raise ValueError(
            f"thinning needs 0 <= p_t <= p_s <= 1, got p_t in [{p_t.min():g}, {p_t.max():g}], "
            f"p_s in [{p_s.min():g}, {p_s.max():g}]"
        )
    return p_t if whole else p_t / p_s.clamp_min(1e-38)
