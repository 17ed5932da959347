from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import mean_poisson_deviance

from distdiff import metrics


@pytest.fixture
def made():
    """Counts ``[12 40]``, targets, means and draws with many ties."""
    rng = np.random.default_rng(1)
    rate = rng.gamma(0.5, 3.0, (12, 40))
    truth = rng.poisson(rate).astype(np.float32)
    targets = rng.random((12, 40)) < 0.5
    return truth, targets, rate.astype(np.float32), rng.poisson(rate, (6, 12, 40)).astype(np.float32)


def test_deviance_is_that_of_sklearn(made):
    truth, targets, mean, _ = made
    per_cell = metrics.poisson_deviance(truth, targets, mean)
    assert per_cell.sum() / targets.sum() == pytest.approx(mean_poisson_deviance(truth[targets], mean[targets]))
    assert per_cell[3] == pytest.approx(
        mean_poisson_deviance(truth[3][targets[3]], mean[3][targets[3]]) * targets[3].sum()
    )


def test_deviance_at_the_floor_is_known():
    truth, all_of_it = np.array([[0.0, 3.0]]), np.ones((1, 2), dtype=bool)
    got = metrics.poisson_deviance(truth, all_of_it, np.zeros((1, 2)), floor=1e-6)
    assert got[0] == pytest.approx(2e-6 + 2 * (3 * np.log(3e6) - 3 + 1e-6))
    assert metrics.poisson_deviance(truth, all_of_it, truth, floor=1e-300)[0] == pytest.approx(0)
    with pytest.raises(ValueError, match="floor=0"):
        metrics.poisson_deviance(truth, all_of_it, truth, floor=0)


def test_deviance_is_least_at_the_mean():
    truth = np.random.default_rng(0).negative_binomial(2, 0.4, (1, 20_000)).astype(float)
    targets, centre = np.ones_like(truth, dtype=bool), truth.mean()
    at = [metrics.poisson_deviance(truth, targets, np.full_like(truth, centre * f))[0] for f in (0.8, 1.0, 1.2)]
    assert at[1] < min(at[0], at[2])


def test_point_errors_are_known_answers():
    truth, answer = np.array([[1.0, 2.0, 100.0], [0.0, 4.0, 5.0]]), np.array([[2.0, 0.0, 0.0], [0.0, 5.0, 9.0]])
    targets = np.array([[True, True, False], [True, True, True]])
    assert metrics.error(truth, targets, answer).tolist() == [-1, 5]
    assert metrics.absolute_error(truth, targets, answer).tolist() == [3, 5]
    assert metrics.squared_error(truth, targets, answer).tolist() == [5, 17]
    wanted = (np.log1p(answer) - np.log1p(truth)) ** 2
    assert metrics.log1p_squared_error(truth, targets, answer) == pytest.approx((wanted * targets).sum(1))
    assert metrics.log1p_squared_error(truth, targets, answer - 50)[1] == pytest.approx((np.log1p(truth[1]) ** 2).sum())


def test_crps_is_the_fair_pair_estimate(made):
    truth, targets, _, draws = made
    k = len(draws)
    first = np.abs(draws - truth).mean(0)
    pairs = np.abs(draws[:, None] - draws[None, :]).sum((0, 1)) / (2 * k * (k - 1))
    assert metrics.crps(truth, targets, draws) == pytest.approx(((first - pairs) * targets).sum(1))
    assert metrics.crps(truth, targets, draws[:1]) == pytest.approx(metrics.absolute_error(truth, targets, draws[0]))


def test_crps_prefers_the_true_law_whatever_the_number_of_draws():
    rng = np.random.default_rng(0)
    truth, targets = rng.poisson(4.0, (1, 20_000)), np.ones((1, 20_000), dtype=bool)

    def score(k, rate):
        return metrics.crps(truth, targets, rng.poisson(rate, (k, 1, 20_000)))[0] / 20_000

    for k in (2, 5):
        right = score(k, 4.0)
        assert right < score(k, 5.0)
        assert right < score(k, 3.0)
        assert right < metrics.crps(truth, targets, np.full((1, 1, 20_000), 4.0))[0] / 20_000
    assert score(2, 4.0) == pytest.approx(score(10, 4.0), abs=0.03)  # fair: no gain from more draws


def test_correlations_are_those_of_scipy(made):
    truth, targets, mean, draws = made
    for answer in (mean, draws[0]):
        got_r, got_s = metrics.pearson(truth, targets, answer), metrics.spearman(truth, targets, answer)
        for cell, (t, x, y) in enumerate(zip(targets, truth, answer, strict=True)):
            assert got_r[cell] == pytest.approx(scipy.stats.pearsonr(x[t], y[t])[0])
            assert got_s[cell] == pytest.approx(scipy.stats.spearmanr(x[t], y[t])[0])


def test_ranks_are_those_of_scipy(made):
    truth, targets, _, _ = made
    got = metrics.ranks(truth, targets)
    for cell, t in enumerate(targets):
        assert got[cell][t] == pytest.approx(scipy.stats.rankdata(truth[cell][t]))
        assert (got[cell][~t] == 0).all()


def test_correlation_of_a_constant_or_of_nothing_is_undefined():
    truth = np.array([[1.0, 2, 3], [5, 5, 5], [0.1, 0.1, 0.1], [1, 2, 3], [1, 2, 3]])
    answer = np.array([[3.0, 2, 1], [1, 2, 3], [1, 2, 3], [7, 7, 7], [1, 2, 3]])
    targets = np.ones((5, 3), dtype=bool)
    targets[4] = False
    for score in (metrics.pearson, metrics.spearman):
        got = score(truth, targets, answer)
        assert got[0] == pytest.approx(-1)
        assert np.isnan(got[1:]).all()
        assert metrics.cell_mean(got, metrics.once(5)) == pytest.approx(-1)


def test_weighted_averages_are_those_of_the_resample(made):
    truth, targets, mean, _ = made
    weights = metrics.bootstrap_weights(12, 5, np.random.default_rng(0))
    sums, n = metrics.squared_error(truth, targets, mean), targets.sum(1)
    got, rank = metrics.pooled(sums, n, weights), metrics.spearman(truth, targets, mean)
    rank[2] = np.nan
    averages = metrics.cell_mean(rank, weights)
    assert weights.sum(1).tolist() == [12] * 5
    for r, w in enumerate(weights):
        cells = np.repeat(np.arange(12), w)
        assert got[r] == pytest.approx(sums[cells].sum() / n[cells].sum())
        assert averages[r] == pytest.approx(np.nanmean(rank[cells]))
    assert np.isnan(metrics.pooled(sums, np.zeros(12, dtype=int), weights)).all()


def test_bootstrap_error_is_that_of_theory():
    x = np.random.default_rng(0).normal(size=2_000)
    weights = metrics.bootstrap_weights(2_000, 400, np.random.default_rng(1))
    assert metrics.cell_mean(x, weights).std() == pytest.approx(x.std() / np.sqrt(2_000), rel=0.15)


def _resampled(weights, *arrays):
    for w in weights:
        cells = np.repeat(np.arange(len(w)), w)
        yield tuple(a[cells] for a in arrays)


@pytest.mark.parametrize("which", ["mean", "draw"])
def test_energy_distance_is_that_of_scipy(made, which):
    truth, targets, mean, draws = made
    answer = mean if which == "mean" else draws[0]
    weights = np.concatenate([metrics.once(12), metrics.bootstrap_weights(12, 11, np.random.default_rng(0))])
    got = metrics.energy_distance(truth, targets, answer, weights)
    for value, (x, t, y) in zip(got, _resampled(weights, truth, targets, answer), strict=True):
        assert value == pytest.approx(scipy.stats.energy_distance(x[t], y[t]), abs=1e-9)
    assert metrics.energy_distance(truth, targets, truth, weights) == pytest.approx(np.zeros(12))


def test_mmd_is_the_pair_loop(made):
    truth, _, mean, _ = made
    weights = np.concatenate([metrics.once(12), metrics.bootstrap_weights(12, 3, np.random.default_rng(0))])
    got = metrics.mmd(truth, mean, weights)
    unit = np.median([np.sum((truth[i] - truth[j]) ** 2) for i in range(12) for j in range(i)])

    def k(a, b):
        d = np.sum((a.astype(float) - b) ** 2)
        return np.mean([np.exp(-d / (2 * unit * s)) for s in (0.25, 0.5, 1, 2, 4)])

    for r, w in enumerate(weights):
        top, bottom = 0.0, 0
        for i in range(12):
            for j in range(12):
                if i != j:
                    h = k(truth[i], truth[j]) + k(mean[i], mean[j]) - k(truth[i], mean[j]) - k(truth[j], mean[i])
                    top, bottom = top + w[i] * w[j] * h, bottom + w[i] * w[j]
        assert got[r] == pytest.approx(top / bottom)
        own = sum(w[i] ** 2 * (2 - 2 * k(truth[i], mean[i])) for i in range(12))
        assert metrics.mmd(truth, mean, weights, biased=True)[r] == pytest.approx((top + own) / w.sum() ** 2)


def test_mmd_is_unbiased_and_sees_a_shift():
    rng, once = np.random.default_rng(0), metrics.once(60)
    null = [metrics.mmd(rng.normal(size=(60, 5)), rng.normal(size=(60, 5)), once)[0] for _ in range(60)]
    assert abs(np.mean(null)) < 3 * np.std(null) / np.sqrt(60)
    assert metrics.mmd(rng.normal(size=(60, 5)), rng.normal(0.7, 1, (60, 5)), once)[0] > 5 * np.std(null)
    same = rng.normal(size=(60, 5))
    assert metrics.mmd(same, same, once)[0] == pytest.approx(0, abs=1e-12)
    assert metrics.mmd(np.ones((4, 2)), np.ones((4, 2)), metrics.once(4))[0] == 0
    with pytest.raises(ValueError, match="two cells"):
        metrics.mmd(same[:1], same[:1], metrics.once(1))


def test_sliced_wasserstein_is_the_sorted_difference(made):
    truth, _, mean, _ = made
    directions = metrics.unit_directions(40, 30, np.random.default_rng(0))
    assert np.linalg.norm(directions, axis=0) == pytest.approx(np.ones(30))
    weights = np.concatenate([metrics.once(12), metrics.bootstrap_weights(12, 4, np.random.default_rng(0))])
    got = metrics.sliced_wasserstein(truth, mean, weights, directions)
    for value, (x, y) in zip(got, _resampled(weights, truth, mean), strict=True):
        gap = np.sort(x @ directions, axis=0) - np.sort(y @ directions, axis=0)
        assert value == pytest.approx(np.sqrt(np.mean(gap**2)))
    shift = metrics.sliced_wasserstein(truth, truth + 1.0, metrics.once(12), directions)
    assert shift[0] == pytest.approx(np.sqrt(np.mean(directions.sum(0) ** 2)))


def test_correlation_error_is_that_of_corrcoef(made):
    truth, _, mean, _ = made
    truth, mean = truth.copy(), mean.copy()
    mean[:, 3] = 0.1  # constant: left out
    weights = np.concatenate([metrics.once(12), metrics.bootstrap_weights(12, 3, np.random.default_rng(0))])
    got = metrics.correlation_error(truth, mean, weights, top=15)
    genes = np.argsort(-truth.mean(0), kind="stable")[:15]
    for value, (x, y) in zip(got, _resampled(weights, truth[:, genes], mean[:, genes]), strict=True):
        kept = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
        gap = np.abs(np.corrcoef(x[:, kept].T) - np.corrcoef(y[:, kept].T))
        assert value == pytest.approx(gap[np.triu_indices(kept.sum(), 1)].mean())
    assert np.isnan(metrics.correlation_error(truth, np.ones_like(truth), metrics.once(12))[0])


@pytest.mark.parametrize("k", [2, 7])
def test_pit_is_uniform_and_coverage_nominal_for_the_true_law(k):
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 2.0, (50, 400))
    targets = np.ones((50, 400), dtype=bool)
    u = metrics.pit(rng.poisson(rate), targets, rng.poisson(rate, (k, 50, 400)), rng)
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    assert metrics.coverage(u, np.array([0.5, 0.8, 0.95])) == pytest.approx([0.5, 0.8, 0.95], abs=0.015)
    narrow = metrics.pit(rng.poisson(rate), targets, np.broadcast_to(rate.round(), (k, 50, 400)), rng)
    assert metrics.coverage(narrow, np.array([0.5]))[0] < 0.45


def test_negative_binomial_score_is_that_of_scipy(made):
    truth, targets, mean, _ = made
    size = np.random.default_rng(0).gamma(2.0, 1.0, 40)
    got = metrics.negative_binomial_score(truth, targets, mean, size)
    m = np.maximum(mean.astype(float), 1e-6)
    want = -scipy.stats.nbinom.logpmf(truth, size, size / (size + m))
    assert got == pytest.approx((want * targets).sum(1))
    zero = metrics.negative_binomial_score(truth, targets, np.zeros_like(mean), size)
    assert np.isfinite(zero).all()
    assert zero.sum() > got.sum()


def test_scores_of_a_cell_are_those_of_sklearn(made):
    from sklearn.metrics import r2_score, root_mean_squared_error
    from sklearn.metrics.pairwise import cosine_similarity

    truth, targets, mean, _ = made
    targets, truth = targets.copy(), truth.copy()
    targets[3], truth[4] = False, 2.0
    got = [score(truth, targets, mean) for score in (metrics.r2, metrics.cell_rmse, metrics.cosine)]
    for cell, t in enumerate(targets):
        if cell == 3:
            assert all(np.isnan(score[cell]) for score in got)
            continue
        x, y = truth[cell][t], mean[cell][t]
        assert got[0][cell] == pytest.approx(r2_score(x, y), rel=1e-4) or (cell == 4 and np.isnan(got[0][cell]))
        assert got[1][cell] == pytest.approx(root_mean_squared_error(x, y))
        assert got[2][cell] == pytest.approx(cosine_similarity(x[None], y[None])[0, 0])
