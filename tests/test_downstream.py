from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from sklearn import metrics as reference

from distdiff import downstream


def test_frechet_distance_is_that_of_the_matrix_root():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 5)), rng.normal(1.0, 2.0, (60, 5)) @ rng.normal(size=(5, 5))
    s, t = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s @ t)
    want = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s + t - 2 * np.real(root))
    assert downstream.frechet(x, y) == pytest.approx(want)
    assert downstream.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert downstream.frechet(x[:, :1], y[:, :1]) > 0
    for wrong in (x[:1], x[:, :3]):
        with pytest.raises(ValueError, match="two cells or more in the same dimensions"):
            downstream.frechet(x, wrong)


def test_clustering_scores_are_those_of_sklearn_and_of_pairs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 120)
    clusters = np.where(rng.random(120) < 0.7, labels, rng.integers(0, 6, 120))
    got = downstream.clustering(labels, clusters)
    assert got["ari"] == pytest.approx(reference.adjusted_rand_score(labels, clusters))
    assert got["nmi"] == pytest.approx(reference.normalized_mutual_info_score(labels, clusters))
    (_, wrong), (missed, right) = reference.pair_confusion_matrix(labels, clusters)
    assert got["f"] == pytest.approx(2 * right / (2 * right + wrong + missed))
    commonest = sum(np.bincount(labels[clusters == c]).max() for c in np.unique(clusters))
    assert got["purity"] == pytest.approx(commonest / 120)
    with pytest.raises(ValueError, match="3 labels and 2 clusters"):
        downstream.clustering(np.zeros(3, int), np.zeros(2, int))


def test_differential_expression_is_a_rank_sum_test_with_adjusted_p():
    rng = np.random.default_rng(0)
    values, inside = rng.poisson(2.0, (70, 12)).astype(float), np.arange(70) < 30
    values[:30, :3] += 2
    values[:, 5] = 1.0
    got = downstream.differential(values, inside)
    p = np.array(
        [scipy.stats.ranksums(values[inside, g], values[~inside, g]).pvalue if g != 5 else 1 for g in range(12)]
    )
    assert (got[:3] < 0.01).all()
    assert got[5] == 1
    assert (got >= p * 0.9).all()
    assert np.array_equal(np.argsort(got[:3]), np.argsort(p[:3]))
    with pytest.raises(ValueError, match="1 cells against 69"):
        downstream.differential(values, np.arange(70) < 1)


def test_the_rank_sum_test_is_scipys_with_many_ties():
    rng = np.random.default_rng(1)
    values = rng.poisson(0.4, (50, 9)).astype(float)
    values[:20, 0] += 3
    values[:, 1] = 0
    inside = np.arange(50) < 20
    p = scipy.stats.mannwhitneyu(values[inside], values[~inside], axis=0, method="asymptotic").pvalue
    want = scipy.stats.false_discovery_control(np.nan_to_num(p, nan=1.0))
    assert downstream.differential(values, inside) == pytest.approx(want, rel=1e-9)


def test_genes_of_types_are_recovered_or_false():
    rng = np.random.default_rng(0)
    types = np.repeat([0, 1, 2, 3, -1], [40, 40, 40, 1, 5])
    truth = rng.normal(size=(len(types), 10))
    for one in range(3):
        truth[types == one, 2 * one : 2 * one + 2] += 3
    same = downstream.recovered(truth, truth, types)
    assert len(same["recall"]) == 3  # a type of one cell is left out
    assert (same["recall"] == 1).all()
    assert (same["false"] == 0).all()
    half = truth.copy()
    half[:, 0] = 0  # lost
    half[types == 0, 9] += 3  # invented, for type 0
    found, wanted = downstream.recovered(truth, half, types), downstream.differential(truth, types == 0) < 0.05
    assert found["recall"][0] == pytest.approx(1 - 1 / wanted.sum())
    assert found["false"][0] > 0
    with pytest.raises(ValueError, match="a type with two cells or more"):
        downstream.recovered(truth, truth, np.arange(len(types)))
    with pytest.raises(ValueError, match="no gene tells a type"):
        downstream.recovered(0 * truth, truth, types)


def test_open_problems_swaps_its_arguments_and_we_tell_both():
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.4, 1.0, (60, 80))
    held = rng.poisson(0.1 * rate).astype(float)
    true, sharp, flat = (downstream.open_problems(held, a) for a in (rate, rate**3, rate * 0 + 1))
    assert true["poisson_right"] < flat["poisson_right"]
    assert true["poisson_right"] < sharp["poisson_right"]
    scaled = 10 * rate
    assert downstream.open_problems(held, scaled)["mse"] == pytest.approx(true["mse"])
    y = rate * held.sum() / rate.sum()
    assert true["poisson_right"] == pytest.approx(np.mean(y - held * np.log(y + 1e-6)))
    assert true["poisson"] == pytest.approx(np.mean(held - y * np.log(held + 1e-6)))
    a, b = (np.log1p(1e4 * v / np.maximum(v.sum(1, keepdims=True), 1e-300)) for v in (held, rate))
    assert true["mse"] == pytest.approx(reference.mean_squared_error(a, b))
    for wrong, message in ((rate[:3], "must be the same"), (-rate, "at least 0"), (0 * rate, "positive sum")):
        with pytest.raises(ValueError, match=message):
            downstream.open_problems(held, wrong)


def test_the_probe_says_what_is_missing():
    cells = np.random.default_rng(0).normal(size=(40, 3))
    types = (np.arange(40) % 2) * 4
    cells[types == 4] += 5
    with pytest.raises(ValueError, match=r"1 type\(s\)"):
        downstream.probe(cells, 0 * types, cells)
    with pytest.raises(ValueError, match="0 given"):
        downstream.probe(cells, types, cells[:0])
    if importlib.util.find_spec("xgboost") is None:
        with pytest.raises(ImportError, match="pip install xgboost"):
            downstream.probe(cells, types, cells)
    else:
        assert downstream.agreement(types, downstream.probe(cells, types, cells))["accuracy"] > 0.9
