"""docs/MATHS.md 2-4 for the count process: exact moments and chi-squared at fixed seeds, closed-form answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distdiff.process._laws import nb_mean_log1p, nb_nll, random_round
from distdiff.process.counts import Counts
from distdiff.process.schedule import levels, schedule, sigma_max
from distdiff.rng import generator
from distdiff.sampling import sample
from tests import laws

unit = st.floats(0.02, 0.98)
X0 = torch.tensor([[0.0, 1.0, 3.0, 40.0]])


@given(p=unit)
def test_marginal_is_binomial(p):  # docs/MATHS.md 2.2
    x = Counts().forward(torch.full((20_000, 1), 6.0), 1.0, p, rng=generator(0, "marginal", str(p)))
    seen = np.bincount(x.numpy().astype(int).ravel(), minlength=7)
    want = stats.binom.pmf(np.arange(7), 6, p) * len(x)
    order = np.argsort(-want)  # pool the rare counts, and as many others as it takes, into one bin of 5 or more
    bins = max(1, int((np.cumsum(want[order][::-1])[::-1] >= 5).sum()))
    seen, want = (np.append(a[order][: bins - 1], a[order][bins - 1 :].sum()) for a in (seen, want))
    assert len(want) == 1 or want.min() >= 5
    assert len(want) == 1 or stats.chisquare(seen, want).pvalue > 1e-6


@given(p_s=unit, share=unit)
def test_thinning_composes(p_s, share):  # docs/MATHS.md 2.3
    p_t = p_s * share
    laws.forward_composes(Counts(), X0, p_s, p_t, (X0 * p_t)[0], (X0 * p_t * (1 - p_t))[0])


@given(p_s=unit, share=unit)
def test_bridge_keeps_the_marginal(p_s, share):  # docs/MATHS.md 2.4
    process, p_t, rng = Counts(), p_s * share, generator(0, "bridge", str(p_s), str(share))
    x_0 = X0.expand(laws.N, -1)
    x_t = process.forward(x_0, 1.0, p_t, rng=rng)
    laws.moments_close(process.bridge(x_t, x_0, p_t, p_s, rng=rng), (X0 * p_s)[0], (X0 * p_s * (1 - p_s))[0])


@pytest.mark.parametrize("weight", ["paper", "nll", "none"])
@given(p=st.floats(0.05, 0.95), mean=st.floats(0.2, 8))
def test_loss_is_least_at_the_posterior_mean(weight, p, mean):  # docs/MATHS.md 3.1-3.3: a Bregman divergence
    process = Counts(head="mean", weight=weight)
    x_0 = generator(0, "loss", str(p), str(mean)).poisson(torch.full((4000, 1), mean))
    x = process.forward(x_0, 1.0, p, rng=generator(1, "loss", str(p)))
    best = ((x_0 - x).mean() / (1 - p)).clamp_min(1e-3)

    def value(rate):
        return process.loss(torch.full((4000, 1, 1), float(rate.log())), x_0, x, p).double().mean()

    assert value(best) < value(best * 1.05)
    assert value(best) < value(best * 0.95)
    gap = value(best * 2) - value(best)
    f, d = best * 2 * (1 - p), (x_0 - x).mean()
    exact = process.weights(torch.tensor(p)) * (f - d - d * np.log(2))
    assert float(gap) == pytest.approx(float(exact), rel=1e-3, abs=1e-6)


@given(t=unit)
def test_weights_are_the_ones_of_the_paper(t):  # docs/MATHS.md 3.2, 3.3
    time = torch.tensor(t, dtype=torch.float64)
    p = schedule("cosine").p(time)
    want = torch.pi / 2 * torch.sin(torch.pi * time)
    assert torch.allclose(Counts(weight="paper").weights(p), want, rtol=1e-6)
    assert torch.allclose(Counts(weight="nll").weights(p), torch.pi / torch.tan(torch.pi * time / 2), rtol=0.02)
    assert Counts(weight="none").weights(p) == 1


def test_nll_integral_does_not_depend_on_the_schedule():  # docs/MATHS.md 3.3
    """``int w_nll(t) l(p(t)) dt`` with the exact answer for Poisson data: a known number, for both schedules."""
    totals = []
    for name in ("cosine", "fisher"):
        process = Counts(schedule=name, weight="nll", head="mean")
        t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        p = process.schedule.p(t)
        totals.append(float((process.schedule.speed(p) * (1 - p)).mean()))  # l(p) = (1 - p)^2: smooth at both ends
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)
    assert totals[0] == pytest.approx(0.5, rel=1e-3)


def test_the_bound_integrates_half_the_poisson_deviance():  # docs/MATHS.md 3.3
    process = Counts(head="mean")
    d, f = torch.tensor([[0.0, 2.0, 5.0]]), torch.tensor([[0.7, 2.0, 1.5]])
    eta = (f / 0.5).log().unsqueeze(-1)
    got = process.bound(eta, d + 1, torch.ones_like(d), 0.5)
    want = (f - d + torch.xlogy(d, d / f)) / 0.5
    assert torch.allclose(got, want, atol=1e-6)


def test_nb_likelihood_is_scipys():  # docs/MATHS.md 3.5
    d = torch.tensor([0.0, 1.0, 7.0, 0.0])
    mean, log_size = torch.tensor([0.5, 2.0, 3.0, 0.0]), torch.tensor([0.0, 1.0, -1.0, 0.3])
    size = log_size.exp().double().numpy()
    want = -stats.nbinom.logpmf(d.numpy(), size, size / (size + mean.double().numpy()))
    assert np.allclose(nb_nll(d, mean, log_size).numpy(), want, atol=1e-5)


def test_dispersion_does_not_pull_the_mean():  # docs/MATHS.md 3.5: the likelihood sees the mean held fixed
    x_0, x = torch.tensor([[9.0, 0.0]]), torch.zeros(1, 2)
    grads = []
    for head in ("mean", "nb"):
        process = Counts(head=head)
        raw = torch.full((1, 2, process.outputs), 0.3, requires_grad=True)
        process.loss(process.natural(raw, x, 0.0), x_0, x, 0.0).sum().backward()
        grads.append(raw.grad[..., 0])
    assert torch.equal(*grads)


@given(p_t=unit, gap=unit, share=st.floats(0, 1))
def test_step_keeps_the_marginal_for_every_allowed_attrition(p_t, gap, share):  # docs/MATHS.md 4.2, 4.3
    p_s = p_t + gap * (1 - p_t)
    sigma = share * float(sigma_max(torch.tensor(p_t), torch.tensor(p_s)))
    beta = (p_s - (1 - sigma) * p_t) / (1 - p_t)
    assert -1e-6 <= beta <= 1 + 1e-6
    assert (1 - sigma) * p_t + (1 - p_t) * beta == pytest.approx(p_s, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_step_given_the_truth_has_the_binomial_law(share):  # docs/MATHS.md 4.2 with xhat_0 = x_0
    process, p_t, p_s, rng = Counts(head="mean"), 0.3, 0.6, generator(0, "step", str(share))
    x_0 = X0.expand(laws.N, -1)
    x_t = process.forward(x_0, 1.0, p_t, rng=rng)
    eta = ((x_0 - x_t) / (1 - p_t)).clamp_min(1e-30).log().clamp_min(-60).unsqueeze(-1)
    sigma = share * float(sigma_max(torch.tensor(p_t), torch.tensor(p_s)))
    x_s = process.reverse(x_t, eta, p_t, p_s, sigma=sigma, rng=rng)
    laws.moments_close(x_s, (X0 * p_s)[0], (X0 * p_s * (1 - p_s))[0])


@given(f=st.floats(0, 30))
def test_random_rounding_keeps_the_mean(f):  # docs/MATHS.md 4.5
    x = random_round(torch.full((laws.N,), f), rng=generator(0, "round", str(f)))
    low = np.floor(f)
    assert set(x.unique().tolist()) <= {low, low + 1}
    assert float(x.double().mean()) == pytest.approx(f, abs=5 * 0.5 / laws.N**0.5)


def test_rounding_to_nearest_collapses_small_rates():  # docs/MATHS.md 4.5, why random rounding
    eta = torch.full((100, 5, 1), 0.4).log()
    x = Counts(head="mean", rounding="nearest").reverse(torch.zeros(100, 5), eta, 0.0, 1.0, rng=generator(0))
    assert x.sum() == 0


@given(mean=st.floats(0.1, 20), log_size=st.floats(-1, 3))
def test_nb_draws_have_the_nb_moments(mean, log_size):  # docs/MATHS.md 4.8
    rng = generator(0, "nb", str(mean), str(log_size))
    x = rng.nb(torch.full((laws.N, 1), mean), torch.full((laws.N, 1), log_size))
    laws.moments_close(x, mean, mean + mean**2 / np.exp(log_size), sigmas=6)


def test_nb_is_closed_under_thinning():  # docs/MATHS.md 4.8
    rng, process = generator(0, "closed"), Counts()
    whole = rng.nb(torch.full((laws.N, 1), 6.0), torch.full((laws.N, 1), 0.5))
    thinned, r = process.forward(whole, 1.0, 0.3, rng=rng), 0.3
    laws.moments_close(thinned, r * 6, r * 6 + (r * 6) ** 2 / np.exp(0.5), sigmas=6)


def _gamma_poisson(mean, size, head):
    """Closed form for ``x_0 ~ NB(mean, size)``: rate | x_p ~ Gamma(size + x, size / mean + p); d given it Poisson."""

    def predict(x, p):
        rate = (size + x) / (size / mean + p)
        log_size = torch.log(size + x)
        return torch.stack((rate.log(), log_size), -1) if head == "nb" else rate.log().unsqueeze(-1)

    return predict


MEAN, SIZE = torch.tensor([2.0, 0.3, 9.0]), torch.tensor([0.7, 2.0, 5.0])
VAR = (MEAN + MEAN**2 / SIZE).double()


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_nb_leap_with_the_exact_answer_samples_the_law_at_any_step_count(steps):  # docs/MATHS.md 4.8
    grid = levels(schedule("cosine"), steps)
    x = laws.exact_answer_samples_the_law(
        Counts(), _gamma_poisson(MEAN, SIZE, "nb"), 3, grid, MEAN.double(), VAR, tolerance=0.08
    )
    zeros = (x == 0).double().mean(0)
    want = torch.from_numpy(stats.nbinom.pmf(0, SIZE.numpy(), (SIZE / (SIZE + MEAN)).numpy()))
    assert torch.allclose(zeros, want, atol=0.015)


@pytest.mark.parametrize("name", ["cosine", "fisher"])
def test_random_rounding_with_the_exact_answer_needs_many_steps(name):  # docs/MATHS.md 4.7: right in the limit
    grid = levels(schedule(name), 150)
    process = Counts(head="mean", schedule=name)
    laws.exact_answer_samples_the_law(
        process, _gamma_poisson(MEAN, SIZE, "mean"), 3, grid, MEAN.double(), VAR, tolerance=0.15
    )
    few = sample(
        process, _gamma_poisson(MEAN, SIZE, "mean"), torch.zeros(laws.N, 3),
        list(levels(schedule(name), 5)), rng=generator(0, "few"),
    )  # fmt: skip
    assert few.var(0)[0] < 0.75 * VAR[0]


def test_per_gene_survival():  # docs/MATHS.md 5: evidence at 1 never moves, targets walk, in one call
    process = Counts()
    x = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    eta = torch.zeros(2, 2, 2)
    p = torch.tensor([[1.0, 0.0]]).expand(2, 2)
    assert torch.allclose(process.mean(eta, x, p), torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    out = process.reverse(x, eta, p, 1.0, rng=generator(0))
    assert torch.equal(out[:, 0], x[:, 0])
    laws.entries_with_p_one_never_move(process, eta, x)
    laws.entries_with_p_one_never_move(Counts(head="mean"), eta[..., :1], x)


def test_rate_is_finite_at_both_ends():  # docs/MATHS.md 3.4
    process = Counts(head="mean")
    eta = torch.zeros(1, 2, 1)
    for p in (0.0, 1.0):
        assert process.loss(eta, torch.ones(1, 2), torch.ones(1, 2), p).isfinite().all()


def test_paint_then_mean_is_a_martingale():  # docs/MATHS.md 4.11: x_t + f keeps its mean along the walk
    process, predict = Counts(), _gamma_poisson(MEAN, SIZE, "nb")
    x, grid = torch.zeros(laws.N, 3), levels(schedule("cosine"), 4)
    rng = generator(0, "martingale")
    for p_t, p_s in itertools.pairwise(grid):
        x = process.reverse(x, predict(x, p_t), p_t, p_s, rng=rng)
        forecast = process.mean(predict(x, p_s), x, p_s).double().mean(0) if p_s < 1 else x.double().mean(0)
        assert torch.allclose(forecast, MEAN.double(), rtol=0.03)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Counts(weight="papr"), "did you mean 'paper'"),
        (lambda: Counts(head="zinb"), "did you mean 'nb'"),
        (lambda: Counts(schedule="cosinus"), "did you mean 'cosine'"),
        (lambda: Counts().forward(torch.ones(1, 1), 0.5, 0.6, rng=generator(0)), "0 <= p_t <= p_s <= 1"),
        (
            lambda: Counts(head="mean").reverse(
                torch.ones(1, 1), torch.zeros(1, 1, 1), 0.5, 0.9, sigma=0.3, rng=generator(0)
            ),
            r"sigma=0.3 is outside \[0, 0.2\]",
        ),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# -- loadings, x0, solvers ---------------------------------------------------------------------------------------------


def _loaded(scale=1.5, genes=6, k=3):
    process = Counts(head="loadings", loadings=k)
    raw = torch.randn(1, genes, 2 + k, generator=torch.Generator().manual_seed(2)) * scale
    raw[..., 0], raw[..., 1] = torch.linspace(-0.5, 2, genes), torch.linspace(-1, 1.5, genes)
    return process, process.natural(raw, torch.zeros(1, genes), 0.0)


def test_loadings_divide_the_dispersion_and_do_not_add_to_it():  # docs/MATHS.md 4.9: moments stay those of the NB
    process, eta = _loaded()
    loading, log_size = process.shared(eta)
    length = loading.square().sum(-1)
    whole = 1 + torch.exp(-process.log_size(eta))
    assert torch.allclose((1 + torch.exp(-log_size)) * length.exp(), whole, rtol=1e-4)
    assert (length > 0.1).all()  # they do share


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_correlated_births_have_the_moments_of_their_law(beta):  # docs/MATHS.md 4.9, closed under thinning
    process, eta = _loaded(scale=0.7)
    f = process.lost(eta, 0.0)
    n = 10 * laws.N
    births = process.births(eta.expand(n, -1, -1), f.expand(n, -1), torch.tensor(beta), rng=generator(0, "loaded"))
    mean, phi = (beta * f)[0].double(), process.log_size(eta).exp()[0].double()
    assert torch.allclose(births.double().mean(0), mean, rtol=0.03)
    assert torch.allclose(births.double().var(0), mean + mean**2 / phi, rtol=0.2)
    loading, _ = process.shared(eta)
    want = mean[:, None] * mean[None] * torch.expm1(loading[0] @ loading[0].T).double()
    got = torch.cov(births.double().T)
    off = ~torch.eye(6, dtype=torch.bool)
    error = (mean[:, None] * mean[None] / phi.sqrt()[:, None] / phi.sqrt()[None])[off]
    assert ((got - want)[off].abs() < 0.12 * error + 0.02).all()
    assert (want[off].abs() > 0.05 * error).any()


def test_low_rank_score_is_the_gaussian_log_density():
    from distdiff.process._laws import low_rank_score

    g = torch.Generator().manual_seed(0)
    e, u = torch.randn(3, 5, generator=g), torch.randn(3, 5, 2, generator=g)
    own, where = torch.rand(3, 5, generator=g) + 0.2, torch.ones(3, 5, dtype=torch.bool)
    where[:, 4], u[:, 4], e[:, 4] = False, 0.0, 0.0
    law = torch.distributions.MultivariateNormal(torch.zeros(5), torch.diag_embed(own) + u @ u.mT)
    got = low_rank_score(e, own, u, where).sum(1)
    assert torch.allclose(got, -law.log_prob(e) - 2.5 * np.log(2 * np.pi), atol=1e-4)


def test_loadings_are_learned_from_correlated_counts():  # and leave mean and dispersion alone
    n, rng = 4000, generator(0, "learn")
    z = rng.normal(n, 1)
    together = torch.exp(0.8 * z - 0.32) * torch.tensor([[1.0, 1.0, 0.0, 0.0]]) + torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    x_0 = rng.nb(6 * together, torch.full((n, 4), 1.0))
    process = Counts(head="loadings", loadings=2)
    raw = torch.zeros(1, 4, 4)
    raw[..., 0] = x_0.mean(0).log()
    excess = (x_0.var(0) - x_0.mean(0)).clamp_min(0.1) / x_0.mean(0) ** 2
    raw[..., 1] = -excess.log()
    raw[..., 2:] = 0.05 * torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(1))
    raw.requires_grad_()
    optimizer = torch.optim.Adam([raw], 0.05)
    x = torch.zeros(n, 4)
    for _ in range(200):
        eta = process.natural(raw.expand(n, -1, -1), x, 0.0)
        optimizer.zero_grad()
        process._covariance_score(eta, x_0, process.lost(eta, 0.0).detach(), torch.ones(n, 4) > 0).mean().backward()
        assert raw.grad[..., :2].abs().max() == 0
        optimizer.step()
    loading, _ = process.shared(process.natural(raw.detach(), x[:1], 0.0))
    shared = (loading[0] @ loading[0].T)[~torch.eye(4, dtype=torch.bool)].view(4, 3)
    assert float(shared[0, 0]) == pytest.approx(0.64, abs=0.15)  # genes 0 and 1 move together, by .8 each
    assert shared[0, 1:].abs().max() < 0.15
    assert shared[2:].abs().max() < 0.15


def test_x0_prediction_has_the_same_minimum_and_no_rate():
    process, x = Counts(head="mean", predict="x0"), torch.tensor([[2.0, 50.0]])
    raw = torch.tensor([[[9.0], [70.0]]]).log()
    eta = process.natural(raw, x, 0.4)
    assert torch.allclose(process.lost(eta, 0.4), torch.tensor([[7.0, 20.0]]), rtol=0.003)
    few = process.natural(torch.full((1, 1, 1), 0.01).log(), torch.zeros(1, 1), 0.4)
    assert float(process.lost(few, 0.4)) == pytest.approx(0.01, rel=1e-3)  # a rare gene stays rare
    above = process.natural(torch.full((1, 1, 1), 3.0).log(), torch.full((1, 1), 5.0), 0.4)
    assert 0 < float(process.lost(above, 0.4)) < 1e-3
    with pytest.raises(ValueError, match=r"process\.predict=rate"):
        process.rate(eta)


def test_trapezoidal_keeps_more_variance_than_plain_for_the_same_calls():  # docs/MATHS.md 4.10
    process, found = Counts(head="mean"), {}
    for solver, steps in (("plain", 15), ("trapezoidal", 8)):  # 15 calls each
        rng, calls = generator(0, solver), []

        def predict(x, p, calls=calls):
            calls.append(1)
            return _gamma_poisson(MEAN, SIZE, "mean")(x, p)

        x = sample(
            process, predict, torch.zeros(laws.N, 3), list(levels(process.schedule, steps)), solver=solver, rng=rng
        )
        assert len(calls) == 15
        found[solver] = (x.double().var(0) / VAR - 1).abs().max()
        assert torch.allclose(x.double().mean(0), MEAN.double(), rtol=0.05)
    assert found["trapezoidal"] < found["plain"]


@pytest.mark.parametrize("rounding", ["random", "poisson"])
def test_plain_births_keep_the_mean(rounding):
    process, eta = Counts(head="mean", rounding=rounding), torch.full((laws.N, 1, 1), 0.4).log()
    births = process.reverse(torch.zeros(laws.N, 1), eta, 0.0, 0.5, rng=generator(0, rounding))
    assert float(births.mean()) == pytest.approx(0.2, abs=0.01)


def test_one_set_of_weights_walks_every_way():
    """A model with loadings can be sampled plainly or by NB leaps: ``leap`` changes no output."""
    import dataclasses

    process, eta = _loaded()
    for leap in ("plain", "nb", "correlated"):
        other = dataclasses.replace(process, leap=leap)
        assert other.outputs == process.outputs
        assert other.reverse(torch.zeros(1, 6), eta, 0.0, 1.0, rng=generator(0)).shape == (1, 6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Counts(head="mean", leap="nb"), "leap='nb' needs head='nb', got 'mean'"),
        (lambda: Counts(leap="correlated"), "leap='correlated' needs head='loadings', got 'nb'"),
        (lambda: Counts(head="loadings", loadings=0), "loadings must be at least 1"),
        (
            lambda: Counts().bridge(torch.full((1, 2), 3.0), torch.tensor([[4.0, 2.0]]), 0.1, 0.5, rng=generator(0)),
            r"x_t\[0, 1\]=3 is above x_0\[0, 1\]=2",
        ),
    ],
)
def test_more_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# -- a gene's own count ------------------------------------------------------------------------------------------------


def _prior(x, p):
    """What a network would say that knows each gene's Gamma law and never looks at the cell."""
    return torch.stack((MEAN.log(), SIZE.log()), -1).expand(*x.shape, 2)


def test_own_count_is_weighed_in_by_bayes_rule():
    process, x = Counts(), torch.tensor([[0.0, 3.0, 20.0]])
    for p in (0.0, 0.4, 1.0):
        x_p = x if p else torch.zeros_like(x)
        eta = process.natural(_prior(x_p, p), x_p, p)
        want = _gamma_poisson(MEAN, SIZE, "nb")(x_p, torch.tensor(p))
        assert torch.allclose(eta, want, rtol=1e-5, atol=1e-6)
    plain = Counts(own=False).natural(_prior(x, 0.4), x, 0.4)
    assert torch.equal(plain, _prior(x, 0.4))


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_births_reinforce_themselves_at_any_number_of_steps(steps):
    """With ``own`` a network blind to the cell samples the NB law in any number of steps; without, variance is lost."""
    found = {}
    for own in (True, False):
        process = Counts(own=own)

        def predict(x, p, process=process):
            return process.natural(_prior(x, p), x, p)

        rng = generator(0, "own", steps)
        x = sample(process, predict, torch.zeros(laws.N, 3), list(levels(process.schedule, steps)), rng=rng)
        assert torch.allclose(x.double().mean(0), MEAN.double(), rtol=0.03)
        found[own] = x.double().var(0) / VAR
    assert ((found[True] - 1).abs() < 0.1).all()
    if steps > 1:
        assert found[False][0] < 0.8


def test_negative_binomial_scores_of_large_sizes():
    """Against scipy: a difference of log-gammas keeps no digit of float32 at size 1e7."""
    for log_size in (-2.0, 3.0, 9.0, 9.5, 13.0, 16.0):
        size = np.exp(log_size)
        for mean in (0.01, 1.0, 100.0, 1e4):
            k = np.unique(stats.nbinom.ppf([0.001, 0.5, 0.999], size, size / (size + mean)))
            found = nb_nll(torch.tensor(k, dtype=torch.float32), torch.tensor(mean), torch.tensor(log_size))
            wanted = -stats.nbinom.logpmf(k, size, size / (size + mean))
            assert found.numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-2 if mean < 1e4 else 1e-1)


def test_expected_logarithms_of_laws_of_any_width():
    """Against the sum over all terms: means of 1e-4 to 1e5, sizes of 1e-2 to 1e6, as counts and per ten thousand."""
    means, sizes = np.meshgrid(np.geomspace(1e-4, 1e5, 10), np.geomspace(1e-2, 1e6, 5))
    for base, scale in ((0.0, 1.0), (3.0, 1.0), (0.0, 10.0), (2.0, 200.0)):
        found = nb_mean_log1p(
            torch.tensor(base), torch.tensor(means, dtype=torch.float32), torch.tensor(np.log(sizes)).float(),
            torch.tensor(scale),
        )  # fmt: skip
        for mean, size, value in zip(means.flat, sizes.flat, found.flatten().tolist(), strict=True):
            chance = size / (size + mean)
            most = stats.nbinom.ppf(1 - 1e-13, size, chance)
            if most < 1e6:
                k = np.arange(most + 10)
                wanted = (stats.nbinom.pmf(k, size, chance) * np.log1p(scale * (base + k))).sum()
                assert value == pytest.approx(wanted, rel=5e-6), (mean, size, base, scale)
