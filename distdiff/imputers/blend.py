"""Two cheap estimators blended with the network's answer, and rates right on average (docs/MATHS.md 5.10, 5.11)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from distdiff.process.counts import LOG_RATE
from distdiff.types import Bool, Condition, Float, Tensor

MOST = 64
"""Components of a regression, at most; a cell needs a matrix of their square."""

GENES = 4096
"""Genes whose pairs of loadings are in memory at once."""

STEPS = 1000
"""Of expectation-maximisation for a cell's loadings, at most."""

KNOTS = 10
"""Of the factor by the size of the rate; each stands for as many hidden entries."""

TINY = 1e-12
"""Smallest number in a denominator."""

PREFIX = "blend."
"""Of a blend's tensors in the file of a model's weights."""


def depth(counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"], mean: Tensor) -> Tensor:
    """``sum_obs x / sum_obs mean``, as :func:`distdiff.baselines.depth` has it: ``float64 [b 1]``."""
    seen = torch.where(observed, counts, 0.0).sum(1, dtype=torch.float64).clamp_min(0.5)
    expected = torch.where(observed, mean, 0.0).sum(1, dtype=torch.float64)
    return torch.where(expected > 0, seen / expected.clamp_min(1e-300), 1.0).unsqueeze(1)


def log_linear(
    counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"], mean: Tensor, cap: Tensor, scale: float,
    predict: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Depth ``s`` of the evidence, ``[b 1]``, and rates at depth 1 from a prediction of ``y = log1p(scale x / s)``.

    The rate is ``expm1(prediction) / scale``, between 0 and ``cap`` (``[g]``, the largest ``x / s`` in training).
    """
    s = depth(counts, observed, mean)
    y = torch.log1p(scale * torch.where(observed, counts, 0.0) / s).float()
    return s, torch.expm1(predict(y).clamp_min(0).minimum(torch.log1p(scale * cap))) / scale


def low_rank(
    y: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"], centre: Tensor, loadings: Tensor, precision: Tensor
) -> Tensor:
    """``mu + V z`` with ``(V_o' V_o + diag(precision)) z = V_o' (y - mu)_o``, ``o`` the observed genes.

    The answer of docs/MATHS.md 5.10 to a cell, on the logarithmic scale.

    Parameters
    ----------
    centre, loadings, precision
        ``mu [g]``, ``V [g d]`` and ``[d]``.
    """
    m, d = observed.to(y.dtype), loadings.shape[1]
    gram = precision.diag().double().expand(len(y), d, d)
    for start in range(0, len(loadings), GENES):
        v = loadings[start : start + GENES]
        pairs = (v.unsqueeze(2) * v.unsqueeze(1)).flatten(1)
        gram = gram + (m[:, start : start + GENES] @ pairs).unflatten(1, (d, d)).double()
    right = (torch.where(observed, y - centre, 0.0) @ loadings).double().unsqueeze(2)
    factor, _ = torch.linalg.cholesky_ex(gram)  # positive definite: the precision is
    return centre + torch.cholesky_solve(right, factor).squeeze(2).to(y.dtype) @ loadings.T


def right_on_average(log_rate: Tensor, knots: Float[Tensor, "2 k"]) -> Tensor:
    """``log_rate`` plus the logarithm of a factor, linear between the knots (docs/MATHS.md 5.11).

    Parameters
    ----------
    knots
        Log rates, ascending, and the factor's logarithm at each; beyond the ends it stays.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers.blend import right_on_average
    >>> right_on_average(torch.tensor([-5.0, 0.5, 9.0]), torch.tensor([[0.0, 1.0], [0.2, 0.0]]))
    tensor([-4.8000,  0.6000,  9.0000])
    """
    at, factor = knots
    right = torch.bucketize(log_rate.contiguous(), at).clamp(1, len(at) - 1)
    share = ((log_rate - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return log_rate + torch.lerp(factor[right - 1], factor[right], share)


def programme_loadings(
    counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"], start: Tensor, shape: Tensor, programmes: Tensor,
    steps: int,
) -> Tensor:  # fmt: skip
    """Loadings ``w`` of cells, ``[b d]``, a few steps of expectation-maximisation away from ``start``.

    Each step makes the observed counts likelier under Poisson rates ``w H`` and a Gamma prior, its mode at ``start``
    (docs/MATHS.md 5.10); a cell without evidence stays there.

    Parameters
    ----------
    counts, observed
        Molecules and where they are known, ``[b g]``.
    start, shape, programmes
        Loadings ``[b d]``, shapes of the prior ``[d]`` (0: none) and ``H'``, ``[g d]``.
    steps
        Updates.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers.blend import programme_loadings
    >>> counts, observed, one = torch.tensor([[6.0, 0.0]]), torch.tensor([[True, False]]), torch.ones(1, 1)
    >>> programme_loadings(counts, observed, one, torch.zeros(1), torch.tensor([[1.0], [0.5]]), steps=1)
    tensor([[6.]])
    """
    seen = observed.to(start.dtype) @ programmes
    evidence, w = torch.where(observed, counts, 0.0).to(start.dtype), start
    share, ratio = (seen + shape / start.clamp_min(TINY)).clamp_min(TINY), torch.empty_like(evidence)
    for _ in range(steps):  # in place: the memory of new tensors takes longer than the products
        torch.mm(w, programmes.T, out=ratio)
        torch.div(evidence, ratio.clamp_min_(TINY), out=ratio)
        w = (w * (ratio @ programmes) + shape) / share
    return torch.where(seen > 0, w, start)


def beside(rate: Float[Tensor, "b g"], log_rate: Float[Tensor, "b g"]) -> Float[Tensor, "b g"]:
    """Logarithm of ``rate`` minus ``log_rate``, 0 where the rate is 0."""
    return torch.where(rate > 0, rate.log().clamp(*LOG_RATE) - log_rate, 0.0)


@dataclass(frozen=True)
class Estimator(ABC):
    """What a blend takes from one cheap estimator: numbers, and tensors ``float32 [g]``, ``[d]`` and ``[g d]``.

    Parameters
    ----------
    numbers
        The weight in the blend, in [0, 1], then those of ``NUMBERS``.
    parts
        Tensors by name.
    """

    numbers: Mapping[str, float]
    parts: Mapping[str, Tensor]

    NAME: ClassVar[str]
    FOLDER: ClassVar[str] = ""
    NUMBERS: ClassVar[tuple[str, ...]]
    SHAPES: ClassVar[Mapping[str, str]]
    SIGNED: ClassVar[tuple[str, ...]] = ()

    @property
    def weight(self) -> float:
        """In the blend."""
        return self.numbers["weight"]

    def weighted(self, weight: float) -> Self:
        """The same with another weight."""
        return replace(self, numbers={**self.numbers, "weight": weight})

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it stands in a model's file."""
        numbers = torch.tensor([self.numbers[name] for name in self.NUMBERS], dtype=torch.float64)
        parts = {**self.parts, "numbers": numbers}
        return {PREFIX + self.FOLDER + name: part.cpu().contiguous() for name, part in parts.items()}

    @classmethod
    def take(cls, found: dict[str, Tensor], n_genes: int) -> Self | None:
        """Take the tensors of such an estimator out of a model's; ``None`` where there are none.

        Raises
        ------
        ValueError
            A tensor is missing, of another shape, or holds what no fit gives.
        """
        names, prefix = (*cls.SHAPES, "numbers"), PREFIX + cls.FOLDER
        parts = {name: found.pop(prefix + name) for name in names if prefix + name in found}
        if not parts:
            return None
        if missing := [name for name in names if name not in parts]:
            raise ValueError(f"tensor {prefix}{missing[0]} is missing")
        d = parts[next(name for name, shape in cls.SHAPES.items() if shape == "d")].numel()
        sizes = {"g": n_genes, "d": min(max(d, 1), MOST)}
        for name, part in parts.items():
            shape = [sizes[axis] for axis in cls.SHAPES[name]] if name in cls.SHAPES else [len(cls.NUMBERS)]
            if list(part.shape) != shape or not part.is_floating_point():
                raise ValueError(
                    f"tensor {prefix}{name} has shape {list(part.shape)} of {part.dtype}, {shape} real numbers are "
                    f"wanted (at most {MOST} components)"
                )
        numbers = dict(zip(cls.NUMBERS, parts.pop("numbers").tolist(), strict=True))
        plain = all(bool((part >= 0).all()) for name, part in parts.items() if name not in cls.SIGNED)
        if not (0 <= numbers["weight"] <= 1 and min(numbers.values()) >= 0 and plain and cls.sound(numbers, parts)):
            raise ValueError(f"tensors {prefix}* hold numbers that no fit gives ({numbers})")
        return cls(numbers, {name: part.float() for name, part in parts.items()})

    @classmethod
    def sound(cls, numbers: Mapping[str, float], parts: Mapping[str, Tensor]) -> bool:
        """Whether a fit can give these."""
        return True

    def to(self, device: torch.device) -> Self:
        """A copy on another device."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    @abstractmethod
    def rate(self, counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"]) -> Float[Tensor, "b g"]:
        """Molecules expected of every gene, from the observed entries alone (docs/MATHS.md 5.10)."""


class Regression(Estimator):
    """A PCA regression (:class:`~distdiff.baselines.pca.Pca`): ``numbers`` are its weight, scale and floor.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers.blend import Regression
    >>> parts = {name: torch.ones(2) for name in ("mean", "cap", "smear")} | {"centre": torch.full((2,), 0.5)}
    >>> parts |= {"loadings": torch.zeros(2, 1), "precision": torch.ones(1)}
    >>> found = Regression({"weight": 0.5, "scale": 1.0, "floor": 0.01}, parts)
    >>> counts, observed = torch.tensor([[4.0, 0.0]]), torch.tensor([[True, False]])
    >>> found.rate(counts, observed)[0, 1]  # four times as deep as the average cell, times expm1(0.5)
    tensor(2.5949)
    """

    NAME = "PCA regression"
    NUMBERS = ("weight", "scale", "floor")
    SHAPES: ClassVar = {
        "mean": "g", "centre": "g", "cap": "g", "smear": "g", "loadings": "gd", "precision": "d"
    }  # fmt: skip
    SIGNED = ("centre", "loadings")

    @classmethod
    def sound(cls, numbers: Mapping[str, float], parts: Mapping[str, Tensor]) -> bool:
        return numbers["scale"] > 0 and numbers["floor"] > 0 and bool((parts["precision"] > 0).all())

    def rate(self, counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"]) -> Float[Tensor, "b g"]:
        g = self.parts

        def predict(y: Tensor) -> Tensor:
            return low_rank(y, observed, g["centre"], g["loadings"], g["precision"])

        s, rate = log_linear(counts, observed, g["mean"], g["cap"], self.numbers["scale"], predict)
        return s.float() * torch.maximum(g["smear"] * rate, self.numbers["floor"] * g["mean"])


class Factorisation(Estimator):
    """A Poisson factorisation (:class:`~distdiff.baselines.nmf.Nmf`): ``numbers`` are its weight, floor and steps.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers.blend import Factorisation
    >>> parts = {"mean": torch.ones(2), "programmes": torch.tensor([[0.6], [0.4]]), "average": torch.tensor([2.0])}
    >>> parts["shape"] = torch.zeros(1)
    >>> found = Factorisation({"weight": 0.5, "floor": 0.01, "steps": 20}, parts)
    >>> found.rate(torch.tensor([[6.0, 0.0]]), torch.tensor([[True, False]]))
    tensor([[6., 4.]])
    """

    NAME = "Poisson NMF"
    FOLDER = "nmf."
    NUMBERS = ("weight", "floor", "steps")
    SHAPES: ClassVar = {"mean": "g", "programmes": "gd", "average": "d", "shape": "d"}

    @classmethod
    def sound(cls, numbers: Mapping[str, float], parts: Mapping[str, Tensor]) -> bool:
        return numbers["steps"] in range(1, STEPS + 1)

    def rate(self, counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"]) -> Float[Tensor, "b g"]:
        g, steps = self.parts, int(self.numbers["steps"])
        s = depth(counts, observed, g["mean"]).float()
        w = programme_loadings(counts, observed, s * g["average"], g["shape"], g["programmes"], steps)
        return torch.maximum(w @ g["programmes"].T, self.numbers["floor"] * s * g["mean"])


@dataclass(frozen=True)
class Blend:
    """What validation cells teach about the log rates of one call (docs/MATHS.md 5.10, 5.11).

    Cheap estimators, each in one proportion for all genes, then a factor by the size of the rate.

    Parameters
    ----------
    estimators
        With their weights, whose sum is at most 1; the network has the rest.
    knots
        Of :func:`right_on_average`, ``float32 [2 k]``; without a column: none.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers.blend import Blend, Factorisation
    >>> from distdiff.types import Condition
    >>> parts = {"mean": torch.ones(2), "programmes": torch.tensor([[0.6], [0.4]]), "average": torch.tensor([2.0])}
    >>> parts["shape"] = torch.zeros(1)
    >>> blend = Blend((Factorisation({"weight": 0.5, "floor": 0.01, "steps": 20}, parts),))
    >>> counts, observed = torch.tensor([[6.0, 0.0]]), torch.tensor([[True, False]])
    >>> blend.into(torch.zeros(1, 2, 1), counts, observed, Condition())[0, 1].exp()  # half way from 1 to 4
    tensor([2.])
    """

    estimators: tuple[Estimator, ...] = ()
    knots: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    _on: dict[torch.device, Blend] = field(default_factory=dict, repr=False, compare=False)

    @property
    def weight(self) -> float:
        """Of all estimators beside the network."""
        return round(sum(of.weight for of in self.estimators), 4)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it stands in a model's file."""
        knots = {PREFIX + "knots": self.knots.cpu().contiguous()} if self.knots.numel() else {}
        return {name: part for of in self.estimators for name, part in of.tensors().items()} | knots

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], n_genes: int) -> Blend | None:
        """The blend in a model's file, whose numbers are finite; ``None`` where there is none.

        Raises
        ------
        ValueError
            A tensor is missing, unknown, of another shape, or holds what no fit gives.
        """
        found = {name: part for name, part in tensors.items() if name.startswith(PREFIX)}
        if not found:
            return None
        knots = found.pop(PREFIX + "knots", torch.empty(2, 0)).float()
        if list(knots.shape) not in ([2, 0], [2, KNOTS]) or not bool((knots[:1].diff() > 0).all()):
            raise ValueError(f"tensor {PREFIX}knots has shape {list(knots.shape)}, [2, {KNOTS}] ascending is wanted")
        estimators = tuple(of for kind in (Regression, Factorisation) if (of := kind.take(found, n_genes)))
        if found:
            raise ValueError(f"tensor {min(found)} is unknown")
        blend = cls(estimators, knots)
        if blend.weight > 1:
            raise ValueError(f"tensors {PREFIX}* hold numbers that no fit gives (weights add to {blend.weight:g})")
        return blend

    def on(self, device: torch.device) -> Blend:
        """The same on another device, which keeps its copy."""
        if self.knots.device == device:
            return self
        if device not in self._on:
            estimators = tuple(of.to(device) for of in self.estimators)
            self._on[device] = replace(self, estimators=estimators, knots=self.knots.to(device), _on={})
        return self._on[device]

    def into(
        self, eta: Float[Tensor, "b g k"], counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"],
        labels: Condition,
    ) -> Float[Tensor, "b g k"]:  # fmt: skip
        """``eta`` with blended log rates of the targets, right on average (docs/MATHS.md 5.10, 5.11).

        That of cells with a label stays: nothing was fitted with labels told.
        """
        mine, target, network = self.on(eta.device), ~observed, eta[..., 0]
        for codes in labels.labels.values():
            target = target & (codes < 0).unsqueeze(1)
        first = network
        for of in mine.estimators:
            if of.weight:
                first = first + of.weight * beside(of.rate(counts, observed), network)
        if self.knots.numel():
            first = right_on_average(first, mine.knots)
        return torch.cat((torch.where(target, first, network).unsqueeze(-1), eta[..., 1:]), -1)
