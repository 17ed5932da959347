"""Count diffusion: molecules are lost one by one and born again (CountsDiff; MATHS 2-4).

Each of ``x_0`` molecules survives with probability ``p``; ``d = x_0 - x_p`` is what was lost. The network answers with
a rate ``lambda = f / (1 - p)`` (MATHS 3.4), ``f`` being the expected number of lost molecules, and optionally with the
size of a negative binomial around it (MATHS 3.5). All functions are exact entry by entry, whatever p each gene has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distdiff.component import nearest
from distdiff.process import Process
from distdiff.process.schedule import Schedule, schedule, sigma_max
from distdiff.types import Float, Tensor

LOG_RATE = (-18.0, 16.0)  # molecules per cell: e^16 is 9 million, beyond any droplet
LOG_SIZE = (-6.0, 9.0)  # NB size: e^9 is Poisson for all purposes; below e^-6 a gene is silent in all cells but a few


@dataclass(frozen=True)
class Counts(Process):
    """Binomial thinning and its reversal.

    Parameters
    ----------
    schedule
        ``cosine``, ``fisher`` or a :class:`~distdiff.process.schedule.Schedule`.
    weight
        ``paper``: ``w = -p'`` (MATHS 3.2); ``nll``: ``w = -p' / (1 - p)`` (MATHS 3.3 with t uniform), the bound on
        ``-log p(x_0)``; ``none``: 1.
    head
        ``mean``: the network gives the rate alone. ``nb``: also a dispersion, learned by likelihood with the mean
        held fixed, while the mean is learned by (3.1) alone (MATHS 3.5).
    rounding
        How a step turns the real ``f`` into molecules when the head is ``mean``: ``random`` (MATHS 4.5) or
        ``nearest`` (which collapses small rates to 0; kept for comparison).
    """

    schedule: Any = "cosine"
    weight: str = "paper"
    head: str = "nb"
    rounding: str = "random"

    def __post_init__(self) -> None:
        for name, allowed in (("weight", WEIGHTS), ("head", HEADS), ("rounding", ROUNDINGS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"process counts: {name}={value!r}{nearest(value, allowed)}")
        if not isinstance(self.schedule, Schedule):
            object.__setattr__(self, "schedule", schedule(self.schedule))

    @property
    def outputs(self) -> int:
        """1 (log rate) or 2 (log rate, log size)."""
        return 2 if self.head == "nb" else 1

    def prior(self, shape: tuple[int, int], *, device: torch.device | str = "cpu") -> Float[Tensor, "b g"]:
        """No molecule is left at p = 0."""
        return torch.zeros(shape, device=device)

    def forward(
        self, x_s: Float[Tensor, "b g"], p_s: float | Tensor, p_t: float | Tensor, *, rng: torch.Generator
    ) -> Float[Tensor, "b g"]:
        """``x_t | x_s ~ Binomial(x_s, p_t / p_s)`` (MATHS 2.2 for ``p_s = 1``, else 2.3).

        Raises
        ------
        ValueError
            ``p_t`` above ``p_s`` or outside [0, 1].
        """
        p_s, p_t = _as(p_s, x_s), _as(p_t, x_s)
        if not bool(((p_t >= 0) & (p_t <= p_s) & (p_s <= 1)).all()):
            raise ValueError(
                f"thinning needs 0 <= p_t <= p_s <= 1, got p_t in [{p_t.min():g}, {p_t.max():g}], "
                f"p_s in [{p_s.min():g}, {p_s.max():g}]"
            )
        return thin(x_s, p_t / p_s.clamp_min(1e-38), rng=rng)

    def bridge(
        self,
        x_t: Float[Tensor, "b g"],
        x_0: Float[Tensor, "b g"],
        p_t: float | Tensor,
        p_s: float | Tensor,
        *,
        rng: torch.Generator,
    ) -> Float[Tensor, "b g"]:
        """``x_s | x_t, x_0 = x_t + Binomial(x_0 - x_t, (p_s - p_t) / (1 - p_t))`` (MATHS 2.4)."""
        beta = births_share(_as(p_t, x_t), _as(p_s, x_t), torch.zeros((), device=x_t.device))
        return x_t + thin(x_0 - x_t, beta, rng=rng)

    def encode(self, x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """``log(1 + x)``."""
        return torch.log1p(x)

    def natural(
        self, raw: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """Log rate (and log size), kept in a range that float32 holds: ``f = (1 - p) exp(eta_0)`` (MATHS 3.4)."""
        log_rate = raw[..., 0].float().clamp(*LOG_RATE)
        if self.head == "mean":
            return log_rate.unsqueeze(-1)
        return torch.stack((log_rate, raw[..., 1].float().clamp(*LOG_SIZE)), -1)

    def lost(self, eta: Float[Tensor, "b g k"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """``f = (1 - p) lambda``: expected molecules lost (MATHS 3.4)."""
        return (1 - _as(p, eta[..., 0])) * eta[..., 0].exp()

    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """``E[x_0 | x_p] = x_p + f``: one network call is the answer (MATHS 5.3)."""
        return x + self.lost(eta, p)

    def weights(self, p: Tensor) -> Tensor:
        """``w`` as a function of p, for t uniform (MATHS 3.2, 3.3).

        ``p = 0`` exactly is no point of a path but an atom of the training mixture (a gene that is hidden outright):
        it weighs 1, the mean of the ``paper`` weight over a path. ``nll`` is capped at ``p = 0.999``, where hardly a
        molecule is lost.
        """
        if self.weight == "none":
            return torch.ones_like(p)
        w = self.schedule.speed(p)
        if self.weight == "nll":
            w = w / (1 - p).clamp_min(1e-3)
        return torch.where(p == 0, torch.ones_like(p), w)

    def loss(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """``w (f - d log lambda)``: (3.1) less ``d log(1 - p)``, a constant; for ``head=nb`` plus ``w`` times (3.5).

        Its minimiser is the posterior mean for every ``w > 0``. 0 where ``p == 1``.
        """
        p = _as(p, x).expand_as(x)
        d = x_0 - x
        f = self.lost(eta, p)
        entry = f - d * eta[..., 0]
        if self.head == "nb":
            entry = entry + nb_nll(d, f.detach(), eta[..., 1])
        return torch.where(p < 1, self.weights(p) * entry, torch.zeros_like(entry))

    def divergence(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """``f - d + d log(d / f)``, the integrand of (3.3): half the Poisson deviance of the lost molecules."""
        d, f = x_0 - x, self.lost(eta, p)
        return f - d + torch.xlogy(d, d) - d * torch.where(d > 0, f, torch.ones_like(f)).log()

    def reverse(
        self,
        x: Float[Tensor, "b g"],
        eta: Float[Tensor, "b g k"],
        p_t: float | Tensor,
        p_s: float | Tensor,
        *,
        sigma: float | Tensor = 0.0,
        rng: torch.Generator,
    ) -> Float[Tensor, "b g"]:
        """One step with attrition (MATHS 4.2): deaths ``Binomial(x, sigma)``, then births.

        Births are ``Binomial(round(f), beta)`` (4.5) for ``head=mean``, and ``NB(mean beta f, size phi)`` (4.8), which
        is closed under thinning and so keeps the variance at any step size, for ``head=nb``.

        Raises
        ------
        ValueError
            ``sigma`` above ``sigma_max`` (MATHS 4.3) or negative.
        """
        p_t, p_s, sigma_ = _as(p_t, x), _as(p_s, x), _as(sigma, x)
        deaths: Tensor | float = 0.0
        if isinstance(sigma, Tensor) or sigma != 0:
            cap = sigma_max(p_t, p_s)
            if bool(((sigma_ > cap + 1e-6) | (sigma_ < 0)).any()):
                raise ValueError(
                    f"attrition sigma={sigma_.max():g} is outside [0, {cap.min():g}], its range for this step "
                    f"(p_t={p_t.max():g}, p_s={p_s.max():g})"
                )
            deaths = thin(x, sigma_.expand_as(x), rng=rng)
        beta = births_share(p_t, p_s, sigma_)
        f = self.lost(eta, p_t)
        if self.head == "nb":
            births = nb_draw(beta * f, eta[..., 1], rng=rng)
        else:
            births = thin(random_round(f, rng=rng) if self.rounding == "random" else f.round(), beta, rng=rng)
        return x - deaths + births


WEIGHTS, HEADS, ROUNDINGS = ("paper", "nll", "none"), ("mean", "nb"), ("random", "nearest")


def thin(n: Tensor, p: Tensor, *, rng: torch.Generator) -> Tensor:
    """``Binomial(n, p)``, entry by entry; ``n`` whole numbers in floating point."""
    return torch.binomial(n.contiguous(), p.expand_as(n).contiguous(), generator=rng)


def births_share(p_t: Tensor, p_s: Tensor, sigma: Tensor) -> Tensor:
    """``beta = (p_s - (1 - sigma) p_t) / (1 - p_t)`` (MATHS 4.2); 0 where nothing was lost (``p_t == 1``)."""
    beta = (p_s - (1 - sigma) * p_t) / (1 - p_t).clamp_min(1e-12)
    return torch.where(p_t < 1, beta.clamp(0, 1), torch.zeros_like(beta))


def random_round(f: Tensor, *, rng: torch.Generator) -> Tensor:
    """``floor(f) + Bernoulli(f - floor f)``: whole, with mean f (MATHS 4.5)."""
    low = f.floor()
    return low + (torch.rand(f.shape, generator=rng, device=f.device) < f - low)


def nb_nll(d: Tensor, mean: Tensor, log_size: Tensor) -> Tensor:
    """``-log NB(d; mean, size)`` in nats (MATHS 3.5), exact for ``mean = 0`` too."""
    size = log_size.exp()
    log_total = torch.log(size + mean)
    return (
        torch.lgamma(size)
        + torch.lgamma(d + 1)
        - torch.lgamma(d + size)
        - size * (log_size - log_total)
        - d * (torch.where(d > 0, mean, torch.ones_like(mean)).clamp_min(1e-30).log() - log_total)
    )


def nb_draw(mean: Tensor, log_size: Tensor, *, rng: torch.Generator) -> Tensor:
    """``NB(mean, size)`` as a Poisson with a Gamma rate (MATHS 4.8); 0 where the mean is 0."""
    size = log_size.exp()
    rate = torch._standard_gamma(size, generator=rng) / size * mean
    return torch.poisson(rate, generator=rng)


def _as(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
