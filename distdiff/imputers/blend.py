"""A PCA regression blended with the network's answer, and rates right on average (docs/MATHS.md 5.10, 5.11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from distdiff.process.counts import LOG_RATE
from distdiff.types import Bool, Condition, Float, Tensor

MOST = 64
"""Components of a regression, at most; a cell needs a matrix of their square."""

GENES = 4096
"""Genes whose pairs of loadings are in memory at once."""

KNOTS = 10
"""Of the factor by the size of the rate; each stands for as many hidden entries."""

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


@dataclass(frozen=True)
class Blend:
    """What validation cells teach about the log rates of one call (docs/MATHS.md 5.10, 5.11).

    A PCA regression in one proportion for all genes, then a factor by the size of the rate.

    Parameters
    ----------
    weight
        Of the regression, in [0, 1].
    scale, floor
        Of the logarithm; share of ``s mean`` below which the regression's rate may not fall.
    genes
        ``mean``, ``centre``, ``cap``, ``smear``: ``float32 [g]`` (:class:`~distdiff.baselines.pca.Pca`).
    loadings, precision
        ``float32 [g d]``, ``[d]``.
    knots
        Of :func:`right_on_average`, ``float32 [2 k]``; without a column: none.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers.blend import Blend
    >>> from distdiff.types import Condition
    >>> one = {name: torch.ones(2) for name in ("mean", "cap", "smear")} | {"centre": torch.full((2,), 0.5)}
    >>> blend = Blend(0.5, 1.0, 0.01, one, torch.zeros(2, 1), torch.ones(1))
    >>> counts, observed = torch.tensor([[4.0, 0.0]]), torch.tensor([[True, False]])
    >>> blend.rate(counts, observed)[0, 1]  # four times as deep as the average cell, times expm1(0.5)
    tensor(2.5949)
    >>> blend.into(torch.zeros(1, 2, 1), counts, observed, Condition())[0, 1].exp()  # half way from 1, in logarithms
    tensor([1.6109])
    """

    weight: float
    scale: float
    floor: float
    genes: Mapping[str, Tensor]
    loadings: Tensor
    precision: Tensor
    knots: Tensor = field(default_factory=lambda: torch.empty(2, 0))
    _on: dict[torch.device, Blend] = field(default_factory=dict, repr=False, compare=False)

    GENES: ClassVar[tuple[str, ...]] = ("mean", "centre", "cap", "smear")

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as it stands in a model's file."""
        numbers = torch.tensor([self.weight, self.scale, self.floor], dtype=torch.float64)
        parts = {**self.genes, "loadings": self.loadings, "precision": self.precision, "numbers": numbers}
        parts |= {"knots": self.knots} if self.knots.numel() else {}
        return {PREFIX + name: part.cpu().contiguous() for name, part in parts.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], n_genes: int) -> Blend | None:
        """The blend in a model's file, whose numbers are finite; ``None`` where there is none.

        Raises
        ------
        ValueError
            A tensor is missing, unknown, of another shape, or holds what no fit gives.
        """
        found = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        if not found:
            return None
        knots = found.pop("knots", torch.empty(2, 0)).float()
        if list(knots.shape) not in ([2, 0], [2, KNOTS]) or not bool((knots[:1].diff() > 0).all()):
            raise ValueError(f"tensor {PREFIX}knots has shape {list(knots.shape)}, [2, {KNOTS}] ascending is wanted")
        names = (*cls.GENES, "loadings", "precision", "numbers")
        if wrong := sorted(set(names) ^ set(found)):
            raise ValueError(f"tensor {PREFIX}{wrong[0]} is {'missing' if wrong[0] in names else 'unknown'}")
        d = found["precision"].numel()
        shapes = {**{name: [n_genes] for name in cls.GENES}, "loadings": [n_genes, d], "precision": [d], "numbers": [3]}
        for name, shape in shapes.items():
            part = found[name]
            if list(part.shape) != shape or not part.is_floating_point() or not 1 <= d <= MOST:
                raise ValueError(
                    f"tensor {PREFIX}{name} has shape {list(part.shape)} of {part.dtype}, {shape} real numbers are "
                    f"wanted (at most {MOST} components)"
                )
        weight, scale, floor = found["numbers"].tolist()
        plain = all(bool((found[name] >= 0).all()) for name in ("mean", "cap", "smear"))
        if not (0 <= weight <= 1 and scale > 0 and floor > 0 and plain and bool((found["precision"] > 0).all())):
            raise ValueError(f"tensors {PREFIX}* hold numbers that no fit gives (weight {weight:g}, scale {scale:g})")
        floats = {name: part.float() for name, part in found.items()}
        genes = {name: floats[name] for name in cls.GENES}
        return cls(weight, scale, floor, genes, floats["loadings"], floats["precision"], knots)

    def on(self, device: torch.device) -> Blend:
        """The same on another device, which keeps its copy."""
        if self.loadings.device == device:
            return self
        if device not in self._on:
            parts = {name: getattr(self, name).to(device) for name in ("loadings", "precision", "knots")}
            genes = {name: part.to(device) for name, part in self.genes.items()}
            self._on[device] = replace(self, genes=genes, **parts, _on={})
        return self._on[device]

    def rate(self, counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"]) -> Float[Tensor, "b g"]:
        """Molecules that the regression expects of every gene, from the observed entries alone (docs/MATHS.md 5.10)."""
        g = self.genes

        def predict(y: Tensor) -> Tensor:
            return low_rank(y, observed, g["centre"], self.loadings, self.precision)

        s, rate = log_linear(counts, observed, g["mean"], g["cap"], self.scale, predict)
        return s.float() * torch.maximum(g["smear"] * rate, self.floor * g["mean"])

    def into(
        self, eta: Float[Tensor, "b g k"], counts: Float[Tensor, "b g"], observed: Bool[Tensor, "b g"],
        labels: Condition,
    ) -> Float[Tensor, "b g k"]:  # fmt: skip
        """``eta`` with blended log rates of the targets, right on average (docs/MATHS.md 5.10, 5.11).

        That of cells with a label stays: nothing was fitted with labels told.
        """
        mine, target, first = self.on(eta.device), ~observed, eta[..., 0]
        for codes in labels.labels.values():
            target = target & (codes < 0).unsqueeze(1)
        if self.weight:
            rate = mine.rate(counts, observed)
            first = torch.where(rate > 0, torch.lerp(first, rate.log().clamp(*LOG_RATE), self.weight), first)
        if self.knots.numel():
            first = right_on_average(first, mine.knots)
        return torch.cat((torch.where(target, first, eta[..., 0]).unsqueeze(-1), eta[..., 1:]), -1)
