"""Count diffusion: molecules are lost one by one and born again (CountsDiff; docs/MATHS.md 2-4).

Each of ``x_0`` molecules survives with probability ``p``; ``d = x_0 - x_p`` is what was lost. The network predicts
a rate ``lambda = f / (1 - p)`` (docs/MATHS.md 3.4), ``f`` being the expected number of lost molecules, and optionally
with the size of a negative binomial around it (docs/MATHS.md 3.5) and the directions in which genes vary together
(docs/MATHS.md 4.9). All functions are exact entry by entry, whatever p each gene has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import softplus

from distdiff.component import nearest
from distdiff.process import Process, tensor
from distdiff.process._laws import low_rank_score, nb_nll, random_round
from distdiff.process.schedule import births_share, check_sigma, schedule, survivors
from distdiff.rng import Rng
from distdiff.types import Float, Tensor

LOG_RATE = (-18.0, 16.0)  # log molecules per cell: e^16 is 9 million, more than any droplet holds
SHARP = 16.0  # steepness of the softplus that keeps xhat_0 - x positive
LOG_SIZE = (-6.0, 9.0)  # log NB size: e^9 is practically Poisson; below e^-6 nearly all cells have no molecule


@dataclass(frozen=True)
class Counts(Process):
    """Binomial thinning and its reversal.

    Parameters
    ----------
    schedule
        ``cosine``, ``fisher``, ``linear``, a list of values, or ``{kind: ..., times: ...}`` for discrete time; see
        :func:`~distdiff.process.schedule.schedule`.
    weight
        ``paper``: ``w = -p'`` (docs/MATHS.md 3.2); ``nll``: ``w = -p' / (1 - p)`` (docs/MATHS.md 3.3 with t uniform),
        the bound on ``-log p(x_0)``; ``none``: 1, so that small p, where a short walk takes its largest step, counts as
        much as large p (benchmarks/toy.py, benchmarks/ablation.py).
    head
        ``mean``: the network gives the rate alone. ``nb``: also a dispersion (docs/MATHS.md 3.5). ``loadings``: also
        how much of that dispersion genes share, as ``loadings`` directions per gene (docs/MATHS.md 4.9).
    fit
        How mean and dispersion are learned. ``held``: the mean by docs/MATHS.md 3.1 alone, the dispersion by
        likelihood with the mean held fixed; ``joint``: both by likelihood, which is proper too but lets dispersed
        genes pull the mean.
    predict
        ``rate``: output 0 of the network is ``log lambda``. ``x0``: it is ``log xhat_0``, and f is ``xhat_0 - x``, kept
        positive by a softplus that scales with ``xhat_0`` (the published ``softplus(xhat_0 - x)`` is .69 molecules
        where ``xhat_0 = x``). With ``x0`` there is no rate at p = 1, so a model cannot denoise.
    own
        Whether each gene's own observed count enters by Bayes' rule. The network's rate and size are then a Gamma
        prior, and ``eta`` holds the posterior after ``x`` molecules were seen: rate ``(x + k) / (p + k / lambda)``,
        size ``k + x`` (docs/MATHS.md 3.6, at every p). Without it the network would have to learn this response for
        every gene separately, which a narrow hidden layer cannot; the draws of a walk with many steps are then too
        little dispersed.
    leap
        How a reverse step draws its births: ``plain`` (docs/MATHS.md 4.2), ``nb`` (docs/MATHS.md 4.8),
        ``correlated`` (docs/MATHS.md 4.9); empty: the richest one for which the head has the parameters.
    rounding
        How a plain step turns the real ``f`` into molecules: ``random`` (docs/MATHS.md 4.5), ``nearest`` (which
        collapses small rates to 0; kept for comparison), ``poisson`` (births ``Poisson(beta f)``).
    loadings
        Directions per gene of the head ``loadings``.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.counts import Counts
    >>> from distdiff.rng import generator
    >>> law, cells = Counts(head="mean"), torch.full((2, 50_000), 8.0)
    >>> thinned = law.forward(cells, 1.0, 0.25, rng=generator(0, "example"))  # a quarter of the molecules survive
    >>> round(thinned.mean().item(), 1)
    2.0
    >>> eta = torch.full((2, 50_000, 1), 8.0).log()  # output of a perfect network: a rate of 8
    >>> law.lost(eta, 0.25)[0, 0].item()
    6.0
    """

    schedule: Any = "cosine"
    weight: str = "none"
    head: str = "nb"
    fit: str = "held"
    predict: str = "rate"
    own: bool = True
    leap: str = ""
    rounding: str = "random"
    loadings: int = 8

    molecules: ClassVar[bool] = True
    """Whether the counts of a state are molecules of the data (not so for :class:`~distdiff.process.jump.Jump`)."""

    ALLOWED: ClassVar[dict[str, tuple[str, ...]]] = {
        "weight": ("paper", "nll", "none"),
        "head": ("mean", "nb", "loadings"),
        "fit": ("held", "joint"),
        "predict": ("rate", "x0"),
        "leap": ("", "plain", "nb", "correlated"),
        "rounding": ("random", "nearest", "poisson"),
    }

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        for field, allowed in self.ALLOWED.items():
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"process {name}: {field}={value!r}{nearest(value, allowed)}")
        heads = ("mean", "nb", "loadings")
        if (needed := {"nb": 1, "correlated": 2}.get(self.leap, 0)) > heads.index(self.head):
            raise ValueError(f"process {name}: leap={self.leap!r} needs head={heads[needed]!r}, got {self.head!r}")
        if self.head == "loadings" and self.loadings < 1:
            raise ValueError(f"process {name}: loadings must be at least 1, got {self.loadings}")
        object.__setattr__(self, "schedule", schedule(self.schedule))

    @property
    def outputs(self) -> int:
        """1 (log rate), 2 (and log size), or 2 + loadings."""
        return {"mean": 1, "nb": 2, "loadings": 2 + self.loadings}[self.head]

    @property
    def entrywise(self) -> bool:
        """See :class:`~distdiff.process.Process`: not with loadings, by which the genes of a cell vary together."""
        return self._leap != "correlated"

    @property
    def _leap(self) -> str:
        return self.leap or {"mean": "plain", "nb": "nb", "loadings": "correlated"}[self.head]

    def prior(self, shape: tuple[int, int], *, rng: Rng) -> Float[Tensor, "b g"]:
        """No molecule is left at p = 0."""
        return torch.zeros(shape, device=rng.device)

    def forward(
        self, x_s: Float[Tensor, "b g"], p_s: float | Tensor, p_t: float | Tensor, *, rng: Rng
    ) -> Float[Tensor, "b g"]:
        """``x_t | x_s ~ Binomial(x_s, p_t / p_s)`` (docs/MATHS.md 2.3; for ``p_s = 1`` it is docs/MATHS.md 2.2).

        Raises
        ------
        ValueError
            ``p_t`` above ``p_s`` or outside [0, 1].
        """
        return rng.binomial(x_s, survivors(x_s, p_s, p_t))

    def bridge(
        self,
        x_t: Float[Tensor, "b g"],
        x_0: Float[Tensor, "b g"],
        p_t: float | Tensor,
        p_s: float | Tensor,
        *,
        rng: Rng,
    ) -> Float[Tensor, "b g"]:
        """``x_s | x_t, x_0 = x_t + Binomial(x_0 - x_t, (p_s - p_t) / (1 - p_t))`` (docs/MATHS.md 2.4).

        Raises
        ------
        ValueError
            An entry of ``x_t`` above ``x_0``.
        """
        if bool((x_t > x_0).any()):
            row, gene = (x_t > x_0).nonzero()[0].tolist()
            raise ValueError(
                f"x_t[{row}, {gene}]={x_t[row, gene]:g} is above x_0[{row}, {gene}]={x_0[row, gene]:g}: thinning only "
                "removes molecules"
            )
        beta = births_share(tensor(p_t, x_t), tensor(p_s, x_t), torch.zeros((), device=x_t.device))
        return x_t + rng.binomial(x_0 - x_t, beta)

    def encode(
        self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"]
    ) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]]:
        """``log(1 + x)`` of the thinned counts, not rescaled by p."""
        return torch.log1p(x), p

    def natural(
        self, raw: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """Log rate (log size, loadings), as float32 can hold them: ``f = (1 - p) exp(eta_0)`` (docs/MATHS.md 3.4)."""
        first, *further = raw.unbind(-1)  # not slices: the gradient of each slice would be as large as raw
        log_rate = first.float()
        if self.predict == "x0":
            whole = log_rate.clamp(*LOG_RATE).exp()
            f = whole * softplus(SHARP * (1 - x / whole)) / SHARP
            log_rate = f.clamp_min(1e-12).log() - (1 - tensor(p, x)).clamp_min(1e-6).log()
        log_rate = log_rate.clamp(*LOG_RATE)
        if self.head == "mean":
            return log_rate.unsqueeze(-1)
        log_size = further[0].float().clamp(*LOG_SIZE)
        if self.own and self.predict == "rate":
            log_rate, log_size = _with_own(log_rate, log_size, x, tensor(p, x))
        # memory order [b k g]: later code reads one of the k numbers for all genes at a time
        return torch.stack((log_rate, log_size, *(answer.float() for answer in further[1:])), 1).movedim(1, -1)

    def moderated(self, eta: Float[Tensor, "b g k"], largest: Float[Tensor, " g"]) -> Float[Tensor, "b g k"]:
        """Size ``phi + lambda / largest``: the tail of a gene's own counts as a prior (docs/MATHS.md 3.8).

        Trained networks are used so; training itself is free.
        """
        if self.head == "mean":
            return eta
        log_rate, log_size, *further = eta.unbind(-1)
        log_size = torch.logaddexp(log_size, log_rate - largest.clamp_min(1).log())
        return torch.stack((log_rate, log_size, *further), 1).movedim(1, -1)

    def rate(self, eta: Float[Tensor, "b g k"]) -> Float[Tensor, "b g"]:
        """``lambda = f / (1 - p)``: expected molecules of a cell at full depth (docs/MATHS.md 3.4, 5.4).

        Raises
        ------
        ValueError
            ``predict: x0``, which has no rate where nothing was lost.
        """
        if self.predict != "rate":
            raise ValueError("a network that predicts x0 has no rate at p = 1; train with process.predict=rate")
        return eta[..., 0].exp()

    def lost(self, eta: Float[Tensor, "b g k"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """Expected lost molecules ``f = (1 - p) lambda`` (docs/MATHS.md 3.1, 3.4)."""
        return (1 - tensor(p, eta)) * eta[..., 0].clamp_max(LOG_RATE[1]).exp()

    def log_total(self, eta: Float[Tensor, "b g k"], p: float | Tensor) -> Float[Tensor, "b 1"]:
        """Log of all molecules that a cell is expected to have lost; ``-inf`` where none can be (p = 1 throughout)."""
        return torch.logsumexp(eta[..., 0] + torch.log1p(-tensor(p, eta)), 1, keepdim=True)

    def scaled(self, eta: Float[Tensor, "b g k"], log_factor: Float[Tensor, "b 1"]) -> Float[Tensor, "b g k"]:
        """All rates of a cell times one factor, which leaves their shares and the sizes as they are."""
        return torch.cat((eta[..., :1] + log_factor.unsqueeze(-1), eta[..., 1:]), -1)

    def guided(
        self, eta_c: Float[Tensor, "b g k"], eta_u: Float[Tensor, "b g k"], weight: float, p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """Guidance of the genes' shares; a cell's total is that of the labelled answer (docs/MATHS.md 4.6).

        Mixed log rates alone would have a larger sum, the exponential being convex.
        """
        mixed = super().guided(eta_c, eta_u, weight, p)
        wanted = torch.lerp(self.log_total(eta_u, p), self.log_total(eta_c, p), min(max(weight, 0.0), 1.0))
        found = self.log_total(mixed, p)
        return self.scaled(mixed, torch.where(found.isfinite(), wanted - found, 0.0))

    def log_size(self, eta: Float[Tensor, "b g k"]) -> Float[Tensor, "b g"]:
        """Log size of the lost molecules' negative binomial; practically Poisson where the head gives no size."""
        if self.head == "mean":
            return torch.full_like(eta[..., 0], LOG_SIZE[1])
        return eta[..., 1].clamp(LOG_SIZE[0], LOG_RATE[1])  # guidance extrapolates; the size grows with the own count

    def shared(self, eta: Float[Tensor, "b g k"]) -> tuple[Float[Tensor, "b g l"], Float[Tensor, "b g"]]:
        """Loadings ``L`` (docs/MATHS.md 4.9) and the log size of the remaining dispersion, given a cell's ``z``.

        The loadings divide the dispersion and do not add to it: ``1 + 1 / rest = (1 + 1 / size) exp(-|L|^2)`` with
        ``|L|^2 < log(1 + 1 / size)``, so that mean and variance of every gene are those of the head's negative binomial
        whatever the loadings.
        """
        log_size = self.log_size(eta)
        whole = torch.log1p(torch.exp(-log_size))
        raw = eta[..., 2:]
        length = raw.square().sum(-1, keepdim=True)
        loading = raw * torch.sqrt(0.98 * whole.unsqueeze(-1) / (1 + length))
        rest = torch.expm1(whole - loading.square().sum(-1)).clamp_min(1e-9)  # 1 / remaining size
        return loading, -rest.log()

    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """``E[x_0 | x_p] = x_p + f`` (docs/MATHS.md 4.11)."""
        return x + self.lost(eta, p)

    def weights(self, p: Tensor) -> Tensor:
        """``w = -p'`` (docs/MATHS.md 3.2) or ``-p' / (1 - p)`` (docs/MATHS.md 3.3): the loss weight of an entry at p.

        ``p = 0`` exactly belongs to no walk: it marks the imputation targets of the training mixture, which get weight
        1, the mean of the ``paper`` weight over t. ``nll`` is capped at ``p = 0.999``, where hardly a molecule is lost.
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
        """``w (f - d log f)`` up to a constant (docs/MATHS.md 3.1), plus ``w`` times ``-log NB`` (docs/MATHS.md 3.5).

        Its minimiser is the posterior mean for every ``w > 0``. Loadings are learned by the Dawid-Sebastiani score of
        the residuals with mean and variance held fixed. 0 where ``p == 1``.
        """
        p = tensor(p, x).expand_as(x)
        d, f = x_0 - x, self.lost(eta, p)
        if self.head == "mean":
            entry = f - d * eta[..., 0]
        elif self.fit == "joint":
            entry = nb_nll(d, f, eta[..., 1])
        else:
            entry = f - d * eta[..., 0] + nb_nll(d, f.detach(), eta[..., 1])
        if self.head == "loadings":
            entry = entry + torch.where(p < 1, self._covariance_score(eta, d, f.detach(), p < 1), 0.0)
        return entry if self.weight == "none" else self.weights(p) * entry  # f = d = 0, hence 0, where p == 1

    def _covariance_score(self, eta: Tensor, d: Tensor, f: Tensor, lost: Tensor) -> Tensor:
        """Score (docs/MATHS.md 3.7) of ``d - f`` under the covariance ``f f' (exp(L L') - 1)`` of docs/MATHS.md 4.9.

        To first order off the diagonal.
        """
        held = torch.cat((eta[..., :2].detach(), eta[..., 2:]), -1)
        loading, _ = self.shared(held)
        length = loading.square().sum(-1)
        swell = (torch.expm1(length) / length.clamp_min(1e-9)).sqrt()
        total = f + f.square() * torch.exp(-self.log_size(held))
        own = total - f.square() * torch.expm1(length) + 1e-6
        return low_rank_score(d - f, own, loading * (f * swell).unsqueeze(-1), lost)

    def bound(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """``(f - d + d log(d / f)) / (1 - p)``: the integrand of docs/MATHS.md 3.3 in p, free of any schedule."""
        d, f = x_0 - x, self.lost(eta, p)
        half_deviance = f - d + torch.xlogy(d, d) - d * torch.where(d > 0, f, torch.ones_like(f)).log()
        return half_deviance / (1 - tensor(p, x))

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
        """``x_s = x - Binomial(x, sigma) + births``, these as ``leap`` says (docs/MATHS.md 4.2).

        Plain births know the mean of the lost molecules alone (docs/MATHS.md 4.7). The others are closed under
        thinning and so keep the variance at any step size.

        Raises
        ------
        ValueError
            ``sigma`` above ``sigma_max`` (docs/MATHS.md 4.3) or negative.
        """
        p_t, p_s = tensor(p_t, x), tensor(p_s, x)
        some = isinstance(sigma, Tensor) or sigma != 0
        sigma = check_sigma(sigma, p_t, p_s)
        deaths = rng.binomial(x, sigma.expand_as(x)) if some else 0.0
        beta = births_share(p_t, p_s, sigma)
        return x - deaths + self.births(eta, self.lost(eta, p_t), beta, rng=rng)

    def births(
        self, eta: Float[Tensor, "b g k"], f: Float[Tensor, "b g"], beta: Tensor, *, rng: Rng
    ) -> Float[Tensor, "b g"]:
        """A share ``beta`` of the lost molecules of expected number ``f``.

        ``NB(beta f, size)`` (docs/MATHS.md 4.8); the same around ``beta f exp(L z - |L|^2 / 2)`` (docs/MATHS.md 4.9);
        or plain, which drops ``beta^2 Var(d)`` (docs/MATHS.md 4.7): ``Binomial(f rounded at random, beta)``.
        """
        if self._leap == "nb":
            return rng.nb(beta * f, self.log_size(eta))
        if self._leap == "correlated":
            loading, log_size = self.shared(eta)
            z = rng.normal(len(f), loading.shape[-1])
            together = (loading @ z.unsqueeze(-1)).squeeze(-1) - loading.square().sum(-1) / 2
            return rng.nb(beta * f * together.exp(), log_size)
        if self.rounding == "poisson":
            return rng.poisson(beta * f)
        return rng.binomial(random_round(f, rng=rng) if self.rounding == "random" else f.round(), beta.expand_as(f))


def of_molecules(process: Process, task: str) -> Counts:
    """Return ``process`` if its states are molecules of the data.

    Raises
    ------
    ValueError
        They are not; the message names the ``task``.

    Examples
    --------
    >>> from distdiff.process.counts import Counts, of_molecules
    >>> of_molecules(Counts(), "denoising").molecules
    True
    """
    if isinstance(process, Counts) and process.molecules:
        return process
    raise ValueError(f"{task} needs a process whose states are molecules, got {type(process).__name__}; use counts")


def _with_own(log_rate: Tensor, log_size: Tensor, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma prior of a rate (log mean, log size) -> its posterior after ``x ~ Poisson(p rate)`` molecules were seen.

    ``(x + k) / (p + k / lambda_0)`` and ``k + x`` (docs/MATHS.md 3.6).
    """
    size = log_size.exp()
    after = torch.log(size + x)
    return after - torch.log(p + torch.exp(log_size - log_rate)), after
