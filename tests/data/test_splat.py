from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from distdiff.data.splat import (
    SETS,
    SETS_LIBRARY_LOC,
    biological,
    de_factors,
    dropout_probability,
    expected,
    gene_means,
    published,
    rates,
    splat,
)

SIZE = {"cells": 120, "genes": 90, "groups": 3}


def test_the_parts_of_a_set():
    a = splat(**SIZE, mid=1.0, seed=3)
    assert a.shape == (120, 90)
    for counts in (a.X, a.layers["true"]):
        assert sparse.isspmatrix_csr(counts)
        assert counts.dtype == np.float32
        assert (counts.data > 0).all()
        assert np.array_equal(counts.data, np.round(counts.data))
    assert list(a.obs["group"].cat.categories) == ["Group1", "Group2", "Group3"]
    assert (a.obs["group"].value_counts() == 40).all()
    assert a.varm["de_factor"].shape == (90, 3)
    assert a.uns["splat"] == {
        "cells": 120, "genes": 90, "groups": 3, "mid": 1.0, "shape": -1.0, "mean_shape": 0.6, "mean_rate": 0.3,
        "outlier_prob": 0.05, "outlier_loc": 4.0, "outlier_scale": 0.5, "library_loc": 11.0, "library_scale": 0.2,
        "de_prob": 0.1, "de_down": 0.5, "de_loc": 0.1, "de_scale": 0.4, "bcv": 0.1, "bcv_df": 60.0, "seed": 3,
    }  # fmt: skip


def test_a_set_comes_back_from_its_file(tmp_path):
    a = splat(**SIZE, mid=-np.inf)
    a.write_h5ad(tmp_path / "a.h5ad")
    b = ad.read_h5ad(tmp_path / "a.h5ad")
    assert (a.X != b.X).nnz == 0
    assert b.uns["splat"]["mid"] == -np.inf
    assert list(b.obs["group"]) == list(a.obs["group"])


def test_one_seed_is_one_set():
    a, b, c = (splat(**SIZE, seed=seed) for seed in (5, 5, 6))
    assert (a.X != b.X).nnz == 0
    assert (a.layers["true"] != b.layers["true"]).nnz == 0
    assert (a.layers["true"] != c.layers["true"]).nnz > 0


def test_dropout_only_removes_and_a_higher_midpoint_removes_more():
    none, low, high = (splat(**SIZE, mid=mid) for mid in (-np.inf, 0.0, 2.0))
    true = none.layers["true"].toarray()
    assert np.array_equal(none.X.toarray(), true)
    for a in (low, high):
        assert np.array_equal(a.layers["true"].toarray(), true)
        seen = a.X.toarray()
        assert ((seen == true) | (seen == 0)).all()
    assert ((high.X.toarray() > 0) <= (low.X.toarray() > 0)).all()
    assert rates(none)[0] == 0 < rates(low)[0] < rates(high)[0]
    assert rates(high)[1] == pytest.approx(1 - (high.X.toarray() > 0).mean())


def test_gene_means_are_gamma_with_log_normal_outliers():
    n = 200_000
    mean, outlier = gene_means(n, 0.6, 0.3, 0.05, 4.0, 0.5, np.random.default_rng(0))
    usual = mean[~outlier]
    assert usual.mean() == pytest.approx(2.0, rel=0.02)
    assert usual.var() == pytest.approx(0.6 / 0.3**2, rel=0.04)
    assert outlier.mean() == pytest.approx(0.05, abs=0.003)
    factor = np.log(mean[outlier] / np.median(usual))
    assert factor.mean() == pytest.approx(4.0, abs=0.05)
    assert factor.std() == pytest.approx(0.5, rel=0.03)


def test_library_sizes_and_group_levels():
    a = splat(cells=4000, genes=60, library_loc=7.0, bcv=0.0, bcv_df=np.inf, mid=-np.inf, seed=1)
    log = np.log(a.obs["expected_library"])
    assert log.mean() == pytest.approx(7.0, abs=5 * 0.2 / np.sqrt(4000))
    assert log.std() == pytest.approx(0.2, rel=0.06)
    assert a.X.sum(axis=1).mean() == pytest.approx(np.exp(7.0 + 0.02), rel=0.02)
    level = expected(a.var["mean"].to_numpy(), a.varm["de_factor"], np.array([0, 3]), np.array([100.0, 50.0]))
    assert level.sum(axis=1) == pytest.approx([100.0, 50.0])
    ratio = a.var["mean"].to_numpy() * a.varm["de_factor"][:, 3] / level[1]
    assert ratio == pytest.approx(np.full(60, ratio[0]))


def test_differential_factors_have_the_asked_share_and_sign():
    factors = de_factors(50_000, 2, 0.1, 0.3, 0.1, 0.4, np.random.default_rng(2))
    differential = factors != 1
    assert differential.mean(axis=0) == pytest.approx([0.1, 0.1], abs=0.007)
    assert (factors[differential] < 1).mean() == pytest.approx(0.3, abs=0.025)
    z = np.random.default_rng(3).normal(0.1, 0.4, 10**6)
    assert np.abs(np.log(factors[differential])).mean() == pytest.approx(np.abs(z).mean(), rel=0.04)


@pytest.mark.parametrize("common", [0.0, 0.1, 0.5])
def test_the_trend_of_biological_variation(common):
    mean = np.tile([0.5, 2.0, 10.0, 200.0], (100_000, 1))
    level = biological(mean, common, np.inf, np.random.default_rng(4))
    cv = common + 1 / np.sqrt(mean[0])
    assert level.mean(axis=0) == pytest.approx(mean[0], rel=0.03)
    assert level.std(axis=0) / level.mean(axis=0) == pytest.approx(cv, rel=0.03)


def test_the_scatter_of_biological_variation_is_inverse_chi_squared_per_gene():
    df, cells, genes = 20.0, 400, 3000
    level = biological(np.full((cells, genes), 400.0), 0.05, df, np.random.default_rng(5))
    square = level.var(axis=0, ddof=1) / 400.0**2
    assert square.mean() == pytest.approx(0.1**2 * df / (df - 2), rel=0.03)
    relative = np.var(square) / np.mean(square) ** 2  # 2 / (df - 4) between genes, and of the estimate: 2 / cells
    assert relative == pytest.approx(2 / (df - 4) + 2 / cells, rel=0.25)


def test_true_counts_have_the_variance_of_a_gamma_poisson():
    a = splat(cells=6000, genes=200, groups=1, de_prob=0, library_scale=0, library_loc=8.0, bcv_df=np.inf, mid=-np.inf)
    mean = np.exp(8.0) * a.var["mean"].to_numpy() / a.var["mean"].sum()
    x = a.layers["true"].toarray().astype(np.float64)
    want = mean + ((0.1 + 1 / np.sqrt(mean)) * mean) ** 2
    counted = mean > 0.5
    assert counted.sum() > 100
    error = (x.mean(axis=0) - mean) / np.sqrt(want / len(x))
    assert np.abs(error).max() < 5
    assert error.std() == pytest.approx(1, abs=0.25)
    ratio = (x.var(axis=0) / want)[counted]
    assert np.median(ratio) == pytest.approx(1, abs=0.02)
    assert np.abs(ratio - 1).max() < 0.3


def test_the_dropout_rate_is_the_logistic():
    p = dropout_probability(np.exp(np.array([-1.0, 2.0, 5.0])), -1.5, 2.0)
    assert p == pytest.approx([1 / (1 + np.exp(-4.5)), 0.5, 1 / (1 + np.exp(4.5))])
    assert np.array_equal(dropout_probability(np.array([0.0, 3.0]), -1.0, -np.inf), [0.0, 0.0])
    # nothing differs between cells and means are far above 1: an entry's level is near its gene's mean
    quiet = {"groups": 1, "de_prob": 0, "library_scale": 0, "outlier_prob": 0, "bcv": 0.0, "bcv_df": np.inf}
    a = splat(cells=3000, genes=40, **quiet, mean_shape=2.0, library_loc=14.0, mid=10.0, shape=-2.0, seed=7)
    true, seen = a.layers["true"].toarray(), a.X.toarray()
    assert (true > 0).all()
    share = (seen == 0).mean(axis=0)
    p = dropout_probability(np.exp(14.0) * a.var["mean"].to_numpy() / a.var["mean"].sum(), -2.0, 10.0)
    assert p.min() < 0.3
    assert p.max() > 0.8
    assert np.abs(share - p).max() < 5 * np.sqrt(0.25 / 3000)


@pytest.mark.parametrize("name", SETS)
def test_published_sets_have_about_their_published_rates(name):
    for seed in (0, 1):
        a = published(name, seed)
        assert a.shape == (500, 1000)
        assert (a.obs["group"].value_counts() == 125).all()
        assert a.uns["splat"]["library_loc"] == SETS_LIBRARY_LOC
        dropout, zeros = rates(a)
        assert dropout == pytest.approx(SETS[name].dropout, abs=0.015)
        assert zeros == pytest.approx(SETS[name].zeros, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cells": 0}, "cells=0 must be a whole number"),
        ({"genes": 2.5}, "genes=2.5 must be a whole number"),
        ({"groups": 501}, "groups=501 must be a whole number, 1 to 500"),
        ({"mid": np.inf}, "mid=inf must be finite"),
        ({"mid": np.nan}, "mid=nan must be finite"),
        ({"shape": 1.0}, "shape=1.0 must be finite and negative"),
        ({"mean_rate": 0}, "mean_rate=0 must be positive"),
        ({"mean_shape": np.inf}, "mean_shape=inf must be positive"),
        ({"outlier_prob": 1.1}, r"outlier_prob=1.1 must be a share in \[0, 1\]"),
        ({"de_down": -0.1}, "de_down=-0.1 must be a share"),
        ({"library_loc": -np.inf}, "library_loc=-inf must be finite"),
        ({"library_scale": -1}, "library_scale=-1 must be finite, 0 or more"),
        ({"bcv": -0.1}, "bcv=-0.1 must be finite, 0 or more"),
        ({"bcv_df": 0}, "bcv_df=0 must be positive"),
        ({"library_loc": 800.0}, "lower library_loc or a scale"),
    ],
)
def test_values_that_no_simulation_can_have(changes, said):
    with pytest.raises(ValueError, match=said):
        splat(**changes)


def test_a_name_that_no_set_has():
    with pytest.raises(ValueError, match="no set is called 'splat50'; choose one of splat55, splat47"):
        published("splat50")
