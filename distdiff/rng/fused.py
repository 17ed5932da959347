"""The laws of :class:`~distdiff.rng.rows.Rows` as Triton kernels: one launch a draw, and no wait for the GPU.

The same numbers at the same addresses: uniforms bit for bit, whole-number laws apart from entries that lie within a
rounding of a step of the CDF (exponentials and logarithms are of the device). A rejected entry tries again inside the
kernel, so nothing depends on what a batch holds. A parameter that is not finite gives NaN: to refuse it one would have
to wait. What each line means stands in ``rows.py``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from distdiff.rng import splitmix
from distdiff.rng.splitmix import Address

BLOCK = 256
GOLDEN, MIX_1, MIX_2 = (tl.constexpr(c) for c in (splitmix.GOLDEN, splitmix.MIX_1, splitmix.MIX_2))
SMALL, NB_TAIL, TRIES, MOST = (
    tl.constexpr(c) for c in (splitmix.SMALL, splitmix.NB_TAIL, splitmix.TRIES, splitmix.MOST)
)
ROOT_2_PI = tl.constexpr(0.5 * math.log(2 * math.pi))
TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def _mix(z):
    z = z ^ ((z >> 30) & ((1 << 34) - 1))
    z = z * MIX_1
    z = z ^ ((z >> 27) & ((1 << 37) - 1))
    z = z * MIX_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@triton.jit
def _pair(start, column, call, attempt):
    turn = tl.full(column.shape, 1 << 24, tl.int64) * (call * 256 + attempt)  # (a number alone would have 32 bits)
    bits = _mix(start + (column + turn + 1) * GOLDEN)
    low, high = bits & ((1 << 23) - 1), (bits >> 41) & ((1 << 23) - 1)
    scale = 1.1920928955078125e-07  # 2^-23
    return (high.to(tl.float32) + 0.5) * scale, (low.to(tl.float32) + 0.5) * scale


@triton.jit
def _any(where):
    return tl.max(where.to(tl.int32), 0) > 0


@triton.jit
def _log_factorial(k):
    """Log k! in float64 for k >= 0, by Stirling's series at k + 8 where k is small."""
    x = k + 1
    up = x < 8
    less = tl.where(up, tl.log(x * (x + 1) * (x + 2) * (x + 3) * (x + 4) * (x + 5) * (x + 6) * (x + 7)), 0.0)
    x = tl.where(up, x + 8, x)
    s = 1 / (x * x)
    series = (1 / 12.0 - s * (1 / 360.0 - s * (1 / 1260.0 - s * (1 / 1680.0 - s / 1188.0)))) / x
    return (x - 0.5) * tl.log(x) - x + ROOT_2_PI + series - less


@triton.jit
def _normal_of(u, v):
    return tl.sqrt(-2 * tl.log(u)) * tl.cos(v * TWO_PI)


@triton.jit
def _invert(u, first, a, b, LAW: tl.constexpr):
    """Rows' ``_invert``: the ratio of neighbouring terms is (a - k + 1) / k b, a / k, (a + k - 1) / k b by the law."""
    out = tl.zeros_like(u)
    more = u >= first
    pmf, cdf = first, first
    k = 1
    while _any(more) & (k < MOST):
        if LAW == 0:
            pmf = pmf * ((a - k + 1) / k * b)
        elif LAW == 1:
            pmf = pmf * (a / k)
        else:
            pmf = pmf * ((a + k - 1) / k * b)
        cdf = cdf + pmf
        still = more & (u >= cdf) & (pmf > 1e-12)
        out = tl.where(more & (still == 0), k * 1.0, out)
        more = still
        k += 1
    return tl.where(more, MOST * 1.0, out)


@triton.jit
def _poisson_of(rate, start, column, call):
    u, _ = _pair(start, column, call, 0)
    small = rate < SMALL
    out = _invert(u, tl.where(small, tl.exp(-rate), 2.0), rate, rate, 1)
    big, mean = small == 0, tl.where(small, SMALL * 1.0, rate).to(tl.float64)
    root = tl.sqrt(mean)
    b = 0.931 + 2.53 * root
    a = -0.059 + 0.02483 * b
    attempt = 1
    while _any(big) & (attempt < TRIES):
        first, second = _pair(start, column, call, 2 * attempt)
        h, v = first.to(tl.float64) - 0.5, second.to(tl.float64)
        us = 0.5 - tl.abs(h)
        k = tl.floor((2 * a / us + b) * h + mean + 0.43)
        bound = tl.log(v * (1.1239 + 1.1328 / (b - 3.4)) / (a / (us * us) + b))
        inside = (k >= 0) & (((us < 0.013) & (v > us)) == 0)
        fast = (us >= 0.07) & (v <= 0.9277 - 3.6224 / (b - 2))
        whole = tl.maximum(k, 0.0)
        accepted = (fast | (inside & (bound <= k * tl.log(mean) - mean - _log_factorial(whole)))) & (
            mean < float("inf")
        )
        out = tl.where(big & accepted, k.to(tl.float32), out)
        big = big & (accepted == 0)
        attempt += 1
    return tl.where(big, float("nan"), out)


@triton.jit
def _entry(start, COLUMNS: tl.constexpr, columns, wide, size, BLOCK: tl.constexpr):
    """Flat places of a block's entries, which are in range, and the start and column of each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = at < size
    column = at % wide
    if COLUMNS:
        column = tl.load(columns + at, within, 0)
    return at, within, tl.load(start + at // wide, within, 0), column


@triton.jit(do_not_specialize=["call"])
def _uniform(out, start, columns, wide, size, call, COLUMNS: tl.constexpr, LAW: tl.constexpr, BLOCK: tl.constexpr):
    at, within, start, column = _entry(start, COLUMNS, columns, wide, size, BLOCK)
    u, v = _pair(start, column, call, 0)
    if LAW == 1:
        u = _normal_of(u, v)
    tl.store(out + at, u, within)


@triton.jit(do_not_specialize=["call"])
def _binomial(out, n, p, start, columns, wide, size, call, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    at, within, start, column = _entry(start, COLUMNS, columns, wide, size, BLOCK)
    n, p = tl.load(n + at, within, 0.0), tl.load(p + at, within, 0.0)
    u, _ = _pair(start, column, call, 0)
    flip = p > 0.5
    q = tl.where(flip, 1 - p, p)
    small = n * q < SMALL
    wide_q = tl.where(small, q, 0.0).to(tl.float64)
    none = tl.exp(n.to(tl.float64) * tl.log(1 - wide_q)).to(tl.float32)
    x = tl.minimum(_invert(u, tl.where(small, none, 2.0), n, q / (1 - q), 0), n)
    big = small == 0
    m, r = tl.where(big, n, 40.0).to(tl.float64), tl.where(big, q, 0.5).to(tl.float64)
    spread = tl.sqrt(m * r * (1 - r))
    b = 1.15 + 2.53 * spread
    a = -0.0873 + 0.0248 * b + 0.01 * r
    mode = tl.floor((m + 1) * r)
    top = _log_factorial(mode) + _log_factorial(m - mode)
    attempt = 1
    while _any(big) & (attempt < TRIES):
        first, second = _pair(start, column, call, 2 * attempt)
        h, v = first.to(tl.float64) - 0.5, second.to(tl.float64)
        us = 0.5 - tl.abs(h)
        k = tl.floor((2 * a / us + b) * h + m * r + 0.5)
        inside = (k >= 0) & (k <= m)
        fast = (us >= 0.07) & (v <= 0.92 - 4.2 / b) & inside
        bound = tl.log(v * (2.83 + 5.1 / b) * spread / (a / (us * us) + b))
        held = tl.minimum(tl.maximum(k, 0.0), m)
        ratio = top - _log_factorial(held) - _log_factorial(m - held) + (k - mode) * tl.log(r / (1 - r))
        accepted = (fast | (inside & (bound <= ratio))) & (m < float("inf"))
        x = tl.where(big & accepted, k.to(tl.float32), x)
        big = big & (accepted == 0)
        attempt += 1
    x = tl.where(big, float("nan"), x)
    tl.store(out + at, tl.where(flip, n - x, x), within)


@triton.jit(do_not_specialize=["call"])
def _poisson(out, rate, start, columns, wide, size, call, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    at, within, start, column = _entry(start, COLUMNS, columns, wide, size, BLOCK)
    tl.store(out + at, _poisson_of(tl.load(rate + at, within, 0.0), start, column, call), within)


@triton.jit(do_not_specialize=["call"])
def _nb(out, mean, log_size, start, columns, wide, size, call, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    at, within, start, column = _entry(start, COLUMNS, columns, wide, size, BLOCK)
    mean, r = tl.load(mean + at, within, 0.0), tl.exp(tl.load(log_size + at, within, 0.0))
    u, _ = _pair(start, column, call, 0)
    small = (mean < SMALL) & (r > mean * NB_TAIL)
    none = tl.exp(-r.to(tl.float64) * tl.log(1 + (mean / r).to(tl.float64))).to(tl.float32)
    x = _invert(u, tl.where(small, none, 2.0), r, mean / (mean + r), 2)
    big = small == 0
    s = tl.where(big, r, 1.0).to(tl.float64)
    d = tl.where(s < 1, s + 1, s) - 1 / 3
    rate = tl.zeros_like(mean)
    attempt = 1
    while _any(big) & (attempt < TRIES):
        g, h = _pair(start, column, call + 1, 2 * attempt)
        w, z = _pair(start, column, call + 1, 2 * attempt + 1)
        y = _normal_of(g.to(tl.float64), h.to(tl.float64))
        cube = tl.maximum(1 + y / tl.sqrt(9 * d), 1e-12)
        cube = cube * cube * cube
        slow = tl.log(w.to(tl.float64)) < 0.5 * y * y + d - d * cube + d * tl.log(cube)
        gamma = d * cube * tl.where(s < 1, tl.exp(tl.log(z.to(tl.float64)) / s), 1.0)
        accepted = slow & (cube > 1e-30) & (gamma < float("inf"))
        rate = tl.where(big & accepted, gamma.to(tl.float32) / r * mean, rate)
        big = big & (accepted == 0)
        attempt += 1
    rate = tl.where(big, float("nan"), rate)
    if _any(small == 0):
        x = tl.where(small, x, _poisson_of(rate, start, column, call + 2))
    tl.store(out + at, x, within)


def _launch(kernel, given: tuple[Tensor, ...], shape: tuple[int, ...], address: Address, **laws: int) -> Tensor:
    """Run a kernel over all entries of ``shape``, at an address."""
    out = torch.empty(shape, device=address.start.device)
    if not out.numel():
        return out
    given = tuple(g.expand(shape).contiguous() for g in given)
    columns = address.start if address.columns is None else address.columns
    wide = out.numel() // len(out)
    kernel[(triton.cdiv(out.numel(), BLOCK),)](
        out,
        *given,
        address.start,
        columns,
        wide,
        out.numel(),
        address.call,
        COLUMNS=address.columns is not None,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
        **laws,
    )
    return out


def uniform(address: Address, *shape: int) -> Tensor:
    """See :meth:`Rows.uniform <distdiff.rng.rows.Rows.uniform>`; the same bits."""
    return _launch(_uniform, (), shape, address, LAW=0)


def normal(address: Address, *shape: int) -> Tensor:
    """See :meth:`Rows.normal <distdiff.rng.rows.Rows.normal>`."""
    return _launch(_uniform, (), shape, address, LAW=1)


def binomial(address: Address, n: Tensor, p: Tensor) -> Tensor:
    """See :meth:`Rows.binomial <distdiff.rng.rows.Rows.binomial>`."""
    return _launch(_binomial, (n, p), tuple(n.shape), address)


def poisson(address: Address, rate: Tensor) -> Tensor:
    """See :meth:`Rows.poisson <distdiff.rng.rows.Rows.poisson>`."""
    return _launch(_poisson, (rate,), tuple(rate.shape), address)


def nb(address: Address, mean: Tensor, log_size: Tensor) -> Tensor:
    """See :meth:`Rows.nb <distdiff.rng.rows.Rows.nb>`."""
    return _launch(_nb, (mean, log_size), tuple(mean.shape), address)
