"""Negative binomial and rounding: the laws that count processes share."""

from __future__ import annotations

import torch

from distdiff.rng import Rng
from distdiff.types import Tensor


def random_round(f: Tensor, *, rng: Rng) -> Tensor:
    """``floor(f) + Bernoulli(f - floor f)``: whole, with mean f (docs/MATHS.md 4.5)."""
    low = f.floor()
    return low + (rng.uniform(*f.shape) < f - low)


def nb_nll(d: Tensor, mean: Tensor, log_size: Tensor) -> Tensor:
    """``-log NB(d; mean, size)`` in nats (docs/MATHS.md 3.5), exact for ``mean = 0`` too.

    ``size log(1 + mean / size) + d log((size + mean) / mean) - log(Gamma(d + size) / (Gamma(size) d!))``. The terms in
    d are 0 where nothing was lost, which is in most entries. On a CPU only entries with ``d > 0`` are computed, because
    log-gamma is the slowest part; a GPU computes all, because finding those entries would stall it.
    """
    size = log_size.exp()
    none = size * torch.log1p(mean / size)
    if d.device.type != "cpu":
        return none + torch.where(d > 0, _some(d, mean, size), 0.0)
    shape = torch.broadcast_shapes(d.shape, none.shape)
    at = d.expand(shape).reshape(-1).nonzero().squeeze(1)
    k, m, s = (a.expand(shape).reshape(-1)[at] for a in (d, mean, size))
    return none.expand(shape).reshape(-1).index_add(0, at, _some(k, m, s)).view(shape)


def _some(d: Tensor, mean: Tensor, size: Tensor) -> Tensor:
    """Terms of ``-log NB`` for ``d > 0``: ``-log (size)_d / d! + d log((size + mean) / mean)``.

    Log-gammas of large sizes cancel (at 1e6, float32 keeps one digit of their difference): there, Stirling's series.
    """
    log_mean = mean.clamp_min(1e-30).log()
    rising = torch.lgamma(d + size) - torch.lgamma(size) - torch.lgamma(d + 1)
    near = d * (torch.log(size + mean) - log_mean) - rising
    least = size.clamp_min(LARGE)
    series = (1 / (least + d) - 1 / least) / 12
    far = d * (torch.log1p(mean / least) - log_mean + 1) - (least + d - 0.5) * torch.log1p(d / least) - series
    return torch.where(size > LARGE, far + torch.lgamma(d + 1), near)


LARGE = 1e4
"""Sizes from here on take Stirling's series for their log-gammas (its error is below 1e-14 nats)."""


def nb_pmf(k: Tensor, mean: Tensor, log_size: Tensor) -> Tensor:
    """``NB(k; mean, size)``."""
    return torch.exp(-nb_nll(k, mean, log_size))


def low_rank_score(e: Tensor, own: Tensor, shared: Tensor, where: Tensor) -> Tensor:
    """Dawid-Sebastiani score of residuals with covariance ``diag(own) + U U'``, entry by entry ``[b g]``.

    ``(e' S^-1 e + log det S) / 2`` (docs/MATHS.md 3.7), proper for the covariance whatever the law of ``e``; by
    Woodbury's identity its cost is ``g k^2``. The small matrix's ``log det`` belongs to no single entry; it is divided
    equally among the entries in ``where``.

    Parameters
    ----------
    e, own
        ``[b g]`` residuals and variances of their own (> 0).
    shared
        ``[b g k]``, U; 0 outside ``where``.
    """
    weighted = shared / own.unsqueeze(-1)
    small = torch.eye(shared.shape[-1], device=e.device) + shared.mT @ weighted
    # success is checked on the CPU only, because the check stalls a GPU; a failed factor there gives non-finite numbers
    root, _ = torch.linalg.cholesky_ex(small, check_errors=small.device.type == "cpu")
    along = torch.cholesky_solve((weighted.mT @ e.unsqueeze(-1)), root)
    fitted = (shared @ along).squeeze(-1)
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    log_det = torch.where(where, log_det / where.sum(1, keepdim=True).clamp_min(1), 0.0)
    return 0.5 * (e * (e - fitted) / own + own.log() + log_det)


POINTS = 40
"""Points of the integral in `nb_mean_log1p`; its relative error is 1e-6 for sizes of 1e-2 to 1e6."""


def nb_mean_log1p(base: Tensor, mean: Tensor, log_size: Tensor, scale: Tensor) -> Tensor:
    """``E[log(1 + scale (base + d))]`` for ``d ~ NB(mean, size)``, entry by entry (docs/MATHS.md 5.8).

    ``log(1 + y)`` is the integral of ``(1 - e^(-ty)) e^-t / t`` over ``t > 0``, and the expected ``e^(-t scale d)`` has
    a closed form, so one integral serves laws of any width:
    ``int e^-t (1 - exp(-t scale base - size log(1 + (1 - e^(-t scale)) mean / size))) dt / t``. By the trapezoid rule
    on a grid of ``log t`` its error falls exponentially with the number of points. What lies below the grid, where the
    integrand is proportional to t, is a geometric series. Nothing stalls a GPU.

    Parameters
    ----------
    base, mean, log_size, scale
        Broadcastable to one shape; molecules, molecules, log of the size, dimensionless.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process._laws import nb_mean_log1p
    >>> nb_mean_log1p(torch.tensor(0.0), torch.tensor(30.0), torch.tensor(100.0).log(), torch.tensor(1.0)).item()
    3.413...
    """
    base, mean, log_size, scale = torch.broadcast_tensors(base, mean, log_size, scale)
    size = log_size.exp()
    ratio = mean / size
    slope = scale * (base + mean)  # of the integrand at t = 0
    low, high = -9.0 - torch.log1p(scale * (1 + base + mean + ratio)), 3.0  # log t: e^(-e^3) is 2e-9
    step = (high - low) / (POINTS - 1)
    total = slope * low.exp() / torch.expm1(step)
    for number in range(POINTS):
        t = torch.exp(low + number * step)
        exponent = t * scale * base + size * torch.log1p(ratio * -torch.expm1(-t * scale))
        total = total + torch.exp(-t) * -torch.expm1(-exponent)
    return step * total


def nb_quantile(q: float, mean: Tensor, log_size: Tensor) -> Tensor:
    """Smallest ``k`` with ``P(NB(mean, size) <= k) >= q``, by scipy: exact, on the CPU."""
    from scipy import stats

    size = log_size.double().exp().cpu().numpy()
    found = stats.nbinom.ppf(q, size, size / (size + mean.double().cpu().numpy()))
    return torch.as_tensor(found, dtype=mean.dtype, device=mean.device)
