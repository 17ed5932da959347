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
    d are 0 where nothing was lost, which is in most entries. On a CPU only the others are touched (a log-gamma and its
    derivative cost more than all else); on a GPU finding them would wait for the device.
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
    """What molecules add to ``-log NB``: ``-log (size)_d / d! + d log((size + mean) / mean)``."""
    rising = torch.lgamma(d + size) - torch.lgamma(size) - torch.lgamma(d + 1)
    return d * (torch.log(size + mean) - mean.clamp_min(1e-30).log()) - rising


def nb_pmf(k: Tensor, mean: Tensor, log_size: Tensor) -> Tensor:
    """``NB(k; mean, size)``."""
    return torch.exp(-nb_nll(k, mean, log_size))


def low_rank_score(e: Tensor, own: Tensor, shared: Tensor, where: Tensor) -> Tensor:
    """Dawid-Sebastiani score of residuals with covariance ``diag(own) + U U'``, entry by entry ``[b g]``.

    ``(e' S^-1 e + log det S) / 2`` (docs/MATHS.md 3.7), proper for the covariance whatever the law of ``e``; by
    Woodbury's identity its cost is ``g k^2``. What belongs to no entry (the small matrix's ``log det``) is shared out
    among those in ``where``.

    Parameters
    ----------
    e, own
        ``[b g]`` residuals and variances of their own (> 0).
    shared
        ``[b g k]``, U; 0 outside ``where``.
    """
    weighted = shared / own.unsqueeze(-1)
    small = torch.eye(shared.shape[-1], device=e.device) + shared.mT @ weighted
    # whether it succeeded is looked at on the CPU only, as that waits for a GPU; what failed there is not finite
    root, _ = torch.linalg.cholesky_ex(small, check_errors=small.device.type == "cpu")
    along = torch.cholesky_solve((weighted.mT @ e.unsqueeze(-1)), root)
    fitted = (shared @ along).squeeze(-1)
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    log_det = torch.where(where, log_det / where.sum(1, keepdim=True).clamp_min(1), 0.0)
    return 0.5 * (e * (e - fitted) / own + own.log() + log_det)


TERMS = 128
"""Laws whose upper tail ends below this are summed term by term; wider ones on 65 points."""


def nb_mean_log1p(base: Tensor, mean: Tensor, log_size: Tensor, scale: Tensor) -> Tensor:
    """``E[log(1 + scale (base + d))]`` for ``d ~ NB(mean, size)``, entry by entry (docs/MATHS.md 5.8).

    Exact to 1e-6 where the law is summed term by term; to about 1e-3 where it is wide. (Waits for a GPU once a term:
    entries that are done are taken out, and few need many.)

    Parameters
    ----------
    base, mean, log_size, scale
        Broadcastable to one shape; molecules, molecules, log of the size, dimensionless.
    """
    base, mean, log_size, scale = (a.contiguous() for a in torch.broadcast_tensors(base, mean, log_size, scale))
    shape = mean.shape
    base, mean, log_size, scale = (a.reshape(-1) for a in (base, mean, log_size, scale))
    size = log_size.exp()
    tail = mean + 12 * (mean + mean.square() / size).sqrt()
    large = tail >= TERMS
    pmf = torch.exp(-size * torch.log1p(mean / size))
    out = pmf * torch.log1p(scale * base)
    index = ((pmf < 1 - 1e-6) & ~large).nonzero().squeeze(1)
    q, size, pmf = (mean / (mean + size))[index], size[index], pmf[index]
    cdf = pmf
    for k in range(1, 4 * TERMS):
        if not len(index):
            break
        pmf = pmf * (size + k - 1) / k * q
        cdf = cdf + pmf
        out[index] += pmf * torch.log1p(scale[index] * (base[index] + k))
        more = (cdf < 1 - 1e-6) & (pmf > 1e-9)
        index, q, size, pmf, cdf = (a[more] for a in (index, q, size, pmf, cdf))
    if bool(large.any()):
        at, weight = _points(mean[large], log_size[large], tail[large])
        out[large] = (weight * torch.log1p(scale[large, None] * (base[large, None] + at))).sum(1)
    return out.reshape(shape)


def _points(mean: Tensor, log_size: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights ``[n 65]`` of wide laws: even around a bell; else 0 ... 31, then evenly in the logarithm."""
    spread = (tail - mean) / 12
    low = mean - 8 * spread
    even = low[:, None] + torch.linspace(0, 1, 65, device=mean.device) * (16 * spread)[:, None]
    grown = torch.exp(torch.linspace(0, 1, 34, device=mean.device)[1:] * (tail / 31).log()[:, None]) * 31
    skew = torch.cat((torch.arange(32, device=mean.device).expand(len(mean), 32), grown), 1)
    at = torch.where(low[:, None] > 0, even, skew)
    width = (torch.diff(at, dim=1, append=at[:, -1:]) + torch.diff(at, dim=1, prepend=at[:, :1])) / 2
    width[:, 0] = torch.where(low > 0, width[:, 0], 1.0)  # P(0) is a whole term
    weight = width * nb_pmf(at, mean[:, None], log_size[:, None])
    return at, weight / weight.sum(1, keepdim=True)


def nb_quantile(q: float, mean: Tensor, log_size: Tensor) -> Tensor:
    """Smallest ``k`` with ``P(NB(mean, size) <= k) >= q``, by scipy: exact, on the CPU."""
    from scipy import stats

    size = log_size.double().exp().cpu().numpy()
    found = stats.nbinom.ppf(q, size, size / (size + mean.double().cpu().numpy()))
    return torch.as_tensor(found, dtype=mean.dtype, device=mean.device)
