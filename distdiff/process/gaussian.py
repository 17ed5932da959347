"""Gaussian diffusion of log counts: DDPM and its walks (docs/MATHS.md 8), on the same footing as count diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import softplus

from distdiff.component import nearest
from distdiff.process import Process, tensor
from distdiff.process.schedule import check_sigma, schedule, survivors
from distdiff.rng import Rng
from distdiff.types import Float, Tensor

LOG_MOST = 16.0  # e^16 molecules


@dataclass(frozen=True)
class Gaussian(Process):
    """``x_t = sqrt(p) x_0 + sqrt(1 - p) eps``, ``x_0 = log(1 + counts) / scale``, p = abar (docs/MATHS.md 8.1, 1.5).

    Parameters
    ----------
    schedule
        As for ``Counts``; ``p`` is the ``abar`` of the papers.
    predict
        ``x0``: the network predicts the clean value. ``eps``: it predicts the noise, as in the papers; its output is
        then not relative to the gene mean, and carries no information near p = 0 (p below 0.001 counts as 0.001), so
        such a model cannot impute in one call.
    noise
        0: the deterministic walk (DDIM). 1: the ancestral one (DDPM, docs/MATHS.md 8.3).
    scale
        Log molecules per unit of the state.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.gaussian import Gaussian
    >>> from distdiff.rng import generator
    >>> law, cells = Gaussian(), torch.tensor([[0.0, 7.0]])
    >>> state = law.enter(cells, rng=generator(0, "example"))
    >>> state
    tensor([[0.0000, 2.0794]])
    >>> law.leave(state)
    tensor([[0., 7.]])
    """

    whole: ClassVar[bool] = False
    schedule: Any = "cosine"
    predict: str = "x0"
    noise: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.predict not in ("x0", "eps"):
            raise ValueError(f"process gaussian: predict={self.predict!r}{nearest(self.predict, ('x0', 'eps'))}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"process gaussian: noise must lie in [0, 1], got {self.noise}")
        if not self.scale > 0:
            raise ValueError(f"process gaussian: scale must be positive, got {self.scale}")
        object.__setattr__(self, "schedule", schedule(self.schedule))
        object.__setattr__(self, "relative", self.predict == "x0")

    @property
    def outputs(self) -> int:
        """1: log of the expected molecules, or the noise."""
        return 1

    def enter(self, counts: Float[Tensor, "b g"], *, rng: Rng) -> Float[Tensor, "b g"]:
        """``log(1 + counts) / scale``."""
        return torch.log1p(counts) / self.scale

    def leave(self, x: Float[Tensor, "b g"]) -> Float[Tensor, "b g"]:
        """``exp(scale x) - 1`` in whole molecules, not below 0."""
        return torch.expm1((self.scale * x).clamp(0, LOG_MOST)).round()

    def prior(self, shape: tuple[int, int], *, rng: Rng) -> Float[Tensor, "b g"]:
        """Standard normal."""
        return rng.normal(*shape)

    def forward(
        self, x_s: Float[Tensor, "b g"], p_s: float | Tensor, p_t: float | Tensor, *, rng: Rng
    ) -> Float[Tensor, "b g"]:
        """``x_t | x_s ~ N(sqrt(p_t / p_s) x_s, 1 - p_t / p_s)`` (docs/MATHS.md 8.1 for ``p_s = 1``).

        Raises
        ------
        ValueError
            ``p_t`` above ``p_s`` or outside [0, 1].
        """
        kept = survivors(x_s, p_s, p_t).clamp(0, 1)
        return kept.sqrt() * x_s + (1 - kept).sqrt() * rng.normal(*x_s.shape)

    def encode(
        self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"]
    ) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]]:
        """``sqrt(p) x`` in log molecules: the data where p = 1, 0 where p = 0; ``x`` itself if noise is predicted."""
        return (p.sqrt() * x if self.predict == "x0" else x) * self.scale, p

    def natural(
        self, raw: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """The clean value ``xhat_0``: ``log(1 + exp(raw)) / scale``, or from the noise by docs/MATHS.md 8.1."""
        raw = raw.float()
        if self.predict == "x0":
            return softplus(raw) / self.scale
        p = tensor(p, x).expand_as(x).clamp_min(1e-3)
        return ((x - (1 - p).sqrt() * raw[..., 0]) / p.sqrt()).unsqueeze(-1)

    def loss(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """``(eps - eps_theta)^2 = p / (1 - p) (x_0 - xhat_0)^2`` (docs/MATHS.md 8.2); no factor for ``predict: x0``."""
        p = tensor(p, x).expand_as(x)
        error = (x_0 - eta[..., 0]).square()
        if self.predict == "eps":
            error = p.clamp_min(1e-3) / (1 - p).clamp_min(1e-6) * error
        return torch.where(p < 1, error, torch.zeros_like(error))

    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """``exp(scale xhat_0) - 1``: the exponential of a mean logarithm, which is below the mean of the molecules."""
        clean = torch.where(tensor(p, x).expand_as(x) == 1, x, eta[..., 0])
        return torch.expm1((self.scale * clean).clamp(0, LOG_MOST))

    def reverse(
        self,
        x: Float[Tensor, "b g"],
        eta: Float[Tensor, "b g k"],
        p_t: float | Tensor,
        p_s: float | Tensor,
        *,
        sigma: float | Tensor = 0.0,
        rng: Rng,
    ) -> Float[Tensor, "b g"]:
        """``x_s = sqrt(p_s) xhat_0 + c (x_t - sqrt(p_t) xhat_0) + v z`` (docs/MATHS.md 8.3, DDIM).

        ``c^2 (1 - p_t) + v^2 = 1 - p_s`` keeps the marginal; ``noise`` sets v between 0 and the ancestral step's, and
        attrition replaces a further share ``sigma`` of the noise carried over: ``c <- (1 - sigma) c``.

        Raises
        ------
        ValueError
            ``sigma`` above its cap (docs/MATHS.md 4.3) or negative.
        """
        p_t, p_s = tensor(p_t, x), tensor(p_s, x)
        sigma = check_sigma(sigma, p_t, p_s)
        gone = (1 - p_t).clamp_min(1e-12)
        fresh = self.noise**2 * (1 - p_s) / gone * (1 - p_t / p_s.clamp_min(1e-38))
        carried = (1 - sigma) * ((1 - p_s - fresh).clamp_min(0) / gone).sqrt()
        v = (1 - p_s - carried.square() * (1 - p_t)).clamp_min(0).sqrt()
        clean = eta[..., 0]
        if self.predict == "eps":  # at small p a small error of the noise is a large error of the data
            clean = clean.clamp(0, LOG_MOST / self.scale)
        z = rng.normal(*x.shape)
        out = p_s.sqrt() * clean + carried * (x - p_t.sqrt() * clean) + v * z
        return torch.where((p_t < 1).expand_as(x), out, x)
