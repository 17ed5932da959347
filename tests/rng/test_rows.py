"""Draws by address: the right laws, and the same numbers whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from distdiff.rng import generator
from distdiff.rng.rows import Rows

N = 20_000


def rows(n=N, seed=0, draw=0):
    return Rows(torch.arange(n), torch.full((n,), draw), seed, "test")


def follows(x, law, *, floor=5.0):
    """Chi-squared of whole-number draws against a scipy law, cut at its quantiles into bins of equal weight or more."""
    x = x.numpy().astype(np.int64).ravel()
    edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 25)))
    want = np.diff(np.concatenate(([0.0], law.cdf(edges), [1.0]))) * len(x)
    seen = np.bincount(np.searchsorted(edges, x, side="left"), minlength=len(want))
    keep = want >= floor
    seen, want = np.append(seen[keep], seen[~keep].sum()), np.append(want[keep], want[~keep].sum())
    seen, want = seen[want > 0], want[want > 0]
    assert len(want) > 1
    assert stats.chisquare(seen, want * seen.sum() / want.sum()).pvalue > 1e-6, (seen, want)


def test_uniforms_and_normals_have_their_laws():
    rng = rows()
    u = rng.uniform(N, 5)
    assert stats.kstest(u.numpy().ravel(), "uniform").pvalue > 1e-6
    assert stats.kstest(rng.normal(N, 3).numpy().ravel(), "norm").pvalue > 1e-6
    assert abs(np.corrcoef(u.numpy().T)[np.triu_indices(5, 1)]).max() < 0.04
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.04  # neighbouring rows


@pytest.mark.parametrize("rate", [0.05, 1.0, 9.99, 10.0, 37.0, 3000.0, 2e6])
def test_poisson(rate):
    follows(rows().poisson(torch.full((N, 2), rate)), stats.poisson(rate))


@pytest.mark.parametrize(("n", "p"), [(1, 0.3), (7, 0.9), (40, 0.2), (40, 0.5), (100, 0.1), (5000, 0.3), (10**6, 0.97)])
def test_binomial(n, p):
    follows(rows().binomial(torch.full((N, 2), float(n)), torch.tensor(p)), stats.binom(n, p))


@pytest.mark.parametrize(
    ("mean", "size"), [(0.1, 0.5), (3.0, 2.0), (9.0, 100.0), (5.0, 0.1), (0.5, 0.01), (40.0, 3.0), (5e4, 0.7)]
)
def test_nb(mean, size):
    x = rows().nb(torch.full((N, 2), mean), torch.full((N, 2), float(np.log(size))))
    follows(x, stats.nbinom(size, size / (size + mean)))


def test_uniforms_never_reach_an_end(monkeypatch):
    rng = rows(1)
    for bits in (0, -1):
        monkeypatch.setattr(
            rng, "_bits", lambda places, starts, attempt=0, bits=bits: torch.full_like(places + starts, bits)
        )
        assert 0 < rng.uniform(1, 1) < 1
        assert rng.binomial(torch.zeros(1, 1), torch.tensor(0.4)) == 0
        assert rng.normal(1, 1).isfinite()
        for n in (1.0, 2.0, 9.0, 15.0):
            for p in torch.linspace(0, 1, 40):
                assert 0 <= rng.binomial(torch.full((1, 1), n), p) <= n


def test_edges_are_exact():
    rng, n = rows(4), torch.tensor([[0.0, 3.0, 1e6, 5.0]]).expand(4, 4)
    assert torch.equal(rng.binomial(n, torch.zeros(4, 4)), torch.zeros(4, 4))
    assert torch.equal(rng.binomial(n, torch.ones(4, 4)), n)
    assert torch.equal(rng.poisson(torch.zeros(4, 4)), torch.zeros(4, 4))
    assert torch.equal(rng.nb(torch.zeros(4, 4), torch.zeros(4, 4)), torch.zeros(4, 4))


def draws(index):
    """All laws, small and large parameters mixed, for the cells ``index`` in that order."""
    generator_ = Rows(index, torch.ones_like(index), 3, "order")
    scale = torch.tensor([0.1, 5.0, 40.0, 1e4])[index % 4].unsqueeze(1).expand(-1, 6)
    return torch.cat(
        [
            generator_.nb(scale, torch.full_like(scale, -1.0)),
            generator_.poisson(scale),
            generator_.binomial(scale.ceil(), torch.tensor(0.4)),
            generator_.nb(scale, torch.full_like(scale, 3.0)),
            generator_.normal(*scale.shape),
        ],
        1,
    )


def test_a_draw_does_not_depend_on_its_batch():
    whole = draws(torch.arange(40))
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws(shuffled), whole[shuffled])
    assert torch.equal(draws(torch.tensor([17])), whole[17:18])
    assert torch.equal(draws(torch.arange(0, 40, 4)), whole[::4])  # a batch without one large entry


def test_rows_draws_seeds_and_calls_differ():
    a, b, c = rows(100), rows(100, seed=1), rows(100, draw=1)
    first = a.uniform(100, 8)
    assert first.unique().numel() == 800
    for other in (a.uniform(100, 8), b.uniform(100, 8), c.uniform(100, 8)):
        assert not torch.equal(first, other)
    assert torch.equal(first, rows(100).uniform(100, 8))


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match="3 rows of noise were asked for, the generator names 4"):
        rows(4).uniform(3, 2)


def test_a_parameter_that_is_not_finite_is_refused():
    with pytest.raises(ArithmeticError, match="no draw after"):
        rows(1).poisson(torch.full((1, 1), float("inf")))


@pytest.mark.parametrize(("mean", "size"), [(3.0, 2.0), (40.0, 3.0)])
def test_the_stream_has_the_same_laws(mean, size):
    rng, shape = generator(0, "laws"), (N, 2)
    follows(
        rng.nb(torch.full(shape, mean), torch.full(shape, float(np.log(size)))),
        stats.nbinom(size, size / (size + mean)),
    )
    follows(rng.poisson(torch.full(shape, mean)), stats.poisson(mean))
    follows(rng.binomial(torch.full(shape, 30.0), torch.tensor(0.2)), stats.binom(30, 0.2))
