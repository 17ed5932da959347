"""What every process must obey; a test module calls these with its own process (tests/process/test_*.py)."""

from __future__ import annotations

import torch

from distdiff.rng import generator
from distdiff.sampling import sample

N = 40_000


def moments_close(x, mean, var, *, sigmas=5.0):
    """Sample mean and variance within ``sigmas`` standard errors of the truth (normal approximation, N large)."""
    x, n = x.double(), x.shape[0]
    mean, var = torch.as_tensor(mean, dtype=x.dtype), torch.as_tensor(var, dtype=x.dtype)
    assert ((x.mean(0) - mean).abs() < sigmas * (var / n).sqrt() + 1e-9).all(), (x.mean(0), mean)
    fourth = ((x - x.mean(0)) ** 4).mean(0)
    spread = ((fourth - x.var(0) ** 2).clamp_min(0) / n).sqrt()
    slack = 50 * var / n  # a fair coin's variance has no first-order error
    assert ((x.var(0) - var).abs() < sigmas * spread + slack + 1e-9).all(), (x.var(0), var)


def forward_composes(process, x_0, p_s, p_t, mean, var):
    """``x_0 -> p_s -> p_t`` has the law of ``x_0 -> p_t`` at once; both match the exact moments."""
    rng = generator(0, "composes", p_s, p_t)
    x_0 = x_0.expand(N, -1)
    once = process.forward(x_0, 1.0, p_t, rng=rng)
    twice = process.forward(process.forward(x_0, 1.0, p_s, rng=rng), p_s, p_t, rng=rng)
    moments_close(once, mean, var)
    moments_close(twice, mean, var)


def entries_with_p_one_never_move(process, eta, x):
    rng = generator(0, "still")
    p = torch.ones_like(x)
    assert torch.equal(process.forward(x, 1.0, p, rng=rng), x)
    assert torch.allclose(process.mean(eta, x, p), process.leave(x))
    assert torch.equal(process.loss(eta, x, x, p), torch.zeros_like(x))
    assert torch.equal(process.reverse(x, eta, p, p, rng=rng), x)


def exact_answer_samples_the_law(process, predict, genes, levels, mean, var, *, tolerance, solver="plain"):
    """A walk with the closed-form answer ends on the data's law: mean, and variance within ``tolerance`` (relative)."""
    rng = generator(1, "walk")
    x = sample(process, predict, process.prior((N, genes), rng=rng), list(levels), solver=solver, rng=rng)
    error = 5 * (x.double().var(0) / N).sqrt()
    assert ((x.double().mean(0) - mean).abs() < error + 0.01 * mean).all(), (x.mean(0), mean)
    assert ((x.double().var(0) / var - 1).abs() < tolerance).all(), (x.var(0), var)
    return x
