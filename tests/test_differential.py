"""`distdiff.de`: its error rate, its power, what it refuses, and scanpy's format."""

from __future__ import annotations

import importlib.util

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import distdiff
from distdiff.cli import app
from distdiff.differential import donor_sums, table
from distdiff.scoretest import Sums, fit_null, p_value, rubin, score_tests, shrink
from distdiff.tasks.made import generated_names


def made(n=(150, 150), genes=600, ratio=1.0, deep=2.0, dispersion=0.7, seed=0):
    """Cells of two sides, the second ``deep`` times as deep; a third of the genes ``ratio`` times as high in one."""
    rng = np.random.default_rng(seed)
    side = np.repeat([0, 1], n)
    depth = rng.lognormal(0, 0.5, len(side)) * np.where(side == 1, deep, 1.0)
    mean = rng.gamma(0.6, 1.0, genes) + 0.05
    factor = np.ones((2, genes))
    factor[0, -genes // 3 :] = ratio
    rate = rng.gamma(1 / dispersion, dispersion, (len(side), genes)) * mean * depth[:, None] * factor[side]
    obs = pd.DataFrame({"side": np.array(["one", "two"])[side]}, index=[f"c{i}" for i in range(len(side))])
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))
    adata.obs["depth"] = depth
    return adata


def p_of(adata, group="one"):
    frame = table(adata).query("group == @group").set_index("names")
    return frame.pvals.reindex(adata.var_names).to_numpy(), frame


@pytest.mark.parametrize("n", [(150, 150), (12, 300)])
def test_genes_without_a_difference_are_found_as_often_as_promised(n):
    adata = made(n, genes=1500)
    distdiff.de(adata, "side", depth="depth")
    p, _ = p_of(adata)
    assert 0.025 < (p < 0.05).mean() < 0.065
    assert (p < 0.001).mean() < 0.004  # a normal law gives .008 in the small group


def test_the_tail_of_a_small_group_is_not_taken_for_normal():
    adata = made((12, 300), genes=1500)
    counts, depth = adata.X.tocsc(), adata.obs["depth"].to_numpy()
    group = (adata.obs["side"] == "two").to_numpy().astype(int)
    found = score_tests(counts, depth, group, 2, fit_null(counts, depth))[0]
    normal = p_value(found.z, np.zeros_like(found.z), len(depth) - 2)
    assert (normal < 0.001).mean() > 2 * (found.p < 0.001).mean()


def test_a_difference_is_found_and_its_size_told():
    adata = made(ratio=2.0)
    distdiff.de(adata, "side", groups=["one"], reference="two", depth="depth")
    p, frame = p_of(adata)
    assert (p[-200:] < 0.05).mean() > 0.6 > 0.1 > (p[:-200] < 0.05).mean()
    sizes = frame.reindex([f"g{i}" for i in range(600)])
    high = np.asarray(adata.X.sum(0)).ravel() > 500
    at = high & (np.arange(600) >= 400)
    assert abs(sizes.logfoldchanges[at].median() - 1.0) < 0.25
    truth = np.where(np.arange(600) >= 400, 1.0, 0.0)
    assert ((sizes.logfoldchanges - truth) ** 2).mean() < ((sizes.logfoldchanges_raw - truth) ** 2).mean()


def test_the_offset_is_needed_where_depths_differ():
    adata = made(genes=300)
    adata.obs["one_depth"] = 1.0
    distdiff.de(adata, "side", depth="one_depth")
    assert (p_of(adata)[0] < 0.05).mean() > 0.5


def test_sums_by_table_are_the_sums():
    rng = np.random.default_rng(0)
    depth, group, a = rng.lognormal(0, 1, 500), rng.integers(0, 3, 500), np.geomspace(1e-9, 1e7, 60)
    for power in (1, 2):
        exact = np.array([[np.sum((depth / (1 + x * depth) ** power)[group == k]) for x in a] for k in range(3)])
        np.testing.assert_allclose(Sums(depth, group, 3, power)(a), exact, rtol=1e-5)


def test_scores_are_those_of_dense_arithmetic():
    adata = made(genes=5)
    x, d = adata.X.toarray().astype(float), adata.obs["depth"].to_numpy()
    one = (adata.obs["side"] == "one").to_numpy()
    null = fit_null(adata.X.tocsc(), d)
    found = score_tests(adata.X.tocsc(), d, (~one).astype(int), 2, null)[0]
    mu = d[:, None] * null.mean
    weight = 1 / (1 + null.dispersion * mu)
    np.testing.assert_allclose(((x - mu) * weight).sum(0), 0, atol=1e-3)
    np.testing.assert_allclose(((x - mu) ** 2 * weight / mu).sum(0), len(d) - 1, rtol=5e-3)
    share = (mu * weight)[one].sum(0) / (mu * weight).sum(0)
    variance = (mu * weight)[one].sum(0) * (1 - share)
    np.testing.assert_allclose(found.z, ((x - mu) * weight)[one].sum(0) / np.sqrt(variance), rtol=1e-3, atol=1e-3)


def test_scanpy_reads_the_result_also_from_a_file(counts, tmp_path):
    import scanpy as sc

    adata = counts.copy()
    adata.layers["denoised"] = adata.X.toarray() + 0.1
    distdiff.de(adata, "cell_type")
    frame = sc.get.rank_genes_groups_df(adata, None)
    assert set(frame.columns) >= {"group", "names", "scores", "logfoldchanges", "pvals", "pvals_adj"}
    assert frame.query("group == 'B'").scores.is_monotonic_decreasing  # as scanpy: what is higher in the group first
    shown = adata.uns["rank_genes_groups"]["model_logfoldchanges"]["B"]
    assert np.isfinite(shown).all()
    path = tmp_path / "tested.h5ad"
    adata.write_h5ad(path)
    again = sc.get.rank_genes_groups_df(ad.read_h5ad(path), None)
    pd.testing.assert_frame_equal(frame, again, check_dtype=False)


def completed(draws, seed=0):
    """60 genes, the last 20 completed from a panel: draws of them that know nothing of the sides."""
    adata, rng = made(genes=60, ratio=3.0), np.random.default_rng(seed)
    adata.var["distdiff_added"] = np.arange(60) >= 40
    wide = adata.X.toarray()
    wide[:, 40:] = 0
    adata.X = sp.csr_matrix(wide)
    for k in range(draws):
        drawn = wide.copy()
        drawn[:, 40:] = rng.poisson(adata.obs["depth"].to_numpy()[:, None] * 0.7, (300, 20))
        adata.layers["imputed" if k == 0 else f"imputed_draw{k + 1}"] = sp.csr_matrix(drawn)
    return adata


def test_completed_genes_need_ten_draws_and_are_exploratory():
    with pytest.raises(ValueError, match=r"20 genes were completed .* 3 draws .* at least 10"):
        distdiff.de(completed(3), "side")
    adata = completed(10)
    distdiff.de(adata, "side", depth="depth")
    frame = table(adata).query("group == 'one'").set_index("names")
    assert frame.exploratory.reindex(adata.var_names).tolist() == [False] * 40 + [True] * 20
    assert not frame.exploratory.iloc[:40].any(), "measured genes stand first"
    assert (frame[frame.exploratory].pvals < 0.05).mean() < 0.2
    assert np.isfinite(frame[frame.exploratory].logfoldchanges).all()


def test_rubin_is_less_sure_than_any_single_draw():
    rng = np.random.default_rng(0)
    ratios, errors = rng.normal(0, 0.3, (10, 400)) + rng.normal(0, 0.1, 400), np.full((10, 400), 0.1)
    found = rubin(ratios, errors)
    assert (found.p < 0.05).mean() < 0.05 < (np.abs(ratios / errors) > 1.96).mean()
    same = rubin(np.ones((10, 1)), np.full((10, 1), 0.5))
    assert same.p[0] == pytest.approx(0.0455, abs=1e-3)


def test_shrinkage_finds_the_width_of_the_prior():
    rng = np.random.default_rng(1)
    error = rng.uniform(0.2, 1.0, 4000)
    truth = rng.normal(0, 0.4, 4000)
    found, width = shrink(truth + error * rng.normal(size=4000), error)
    assert width == pytest.approx(0.4, abs=0.05)
    assert ((found - truth) ** 2).mean() < 0.11


@pytest.mark.parametrize(
    "layer", ["denoised", "denoised_log1p", "imputed_mean", "imputed", "imputed_draw2", "deepened"]
)
def test_what_a_model_made_is_not_tested(counts, layer):
    adata = counts.copy()
    adata.layers[layer] = adata.X * 1.5
    with pytest.raises(ValueError, match=rf"layer {layer!r} holds .* test the raw counts"):
        distdiff.de(adata, "cell_type", layer=layer)
    distdiff.de(adata, "cell_type", layer=layer, allow_invalid=True)
    assert "at p < .05" in adata.uns["rank_genes_groups"]["params"]["invalid"]


def test_a_layer_by_another_name_carries_its_mark(counts):
    adata = counts.copy()
    adata.layers["mine"] = adata.X
    adata.uns["distdiff"] = {"valid_for_tests": False, "layer": "mine"}
    with pytest.raises(ValueError, match="layer 'mine' holds estimates"):
        distdiff.de(adata, "cell_type", layer="mine")
    distdiff.de(adata, "cell_type")  # the raw counts beside it


@pytest.mark.parametrize("options", [{}, {"index_unique": "-", "keys": ["real", "made"]}])
def test_generated_cells_are_known_among_others(counts, options):
    """Joining drops ``uns`` and the mark in it."""
    made = counts[:50].copy()
    made.obs_names = generated_names(0, 50)
    both = ad.concat([counts, made], **options)
    assert not both.uns
    with pytest.raises(ValueError, match="X holds 50 cells that a model generated, by their names"):
        distdiff.de(both, "cell_type")
    distdiff.de(both, "cell_type", allow_invalid=True)
    distdiff.de(both[: len(counts)].copy(), "cell_type")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groupby": "cell_typ"}, "obs has no column 'cell_typ'; .*cell_type"),
        ({"groupby": "same"}, "has 1 group, at least two"),
        ({"groupby": "cell_type", "groups": ["C"]}, "'C' is no group"),
        ({"groupby": "cell_type", "reference": "C"}, "reference 'C' is no group"),
        ({"groupby": "cell_type", "groups": ["B"], "reference": "B"}, "no group is left"),
        ({"groupby": "lone"}, "group 'x' has one cell"),
        ({"groupby": "cell_type", "depth": "cell_type"}, "holds no numbers"),
        ({"groupby": "cell_type", "sample": "same"}, "of 1 of the donors"),
        ({"groupby": "cell_type", "model_layer": "denoisd"}, "no layer"),
        ({"groupby": "cell_type", "layer": "log"}, "is not a whole number"),
    ],
)
def test_bad_input_is_one_sentence(counts, options, words):
    adata = counts.copy()
    adata.obs["same"] = "a"
    adata.obs["lone"] = ["x"] + ["y"] * 199
    adata.layers["log"] = adata.X.log1p()
    with pytest.raises(ValueError, match=words) as error:
        distdiff.de(adata, **options)
    assert "\n" not in str(error.value)


def test_the_command_writes_a_table_or_nothing(counts, tmp_path):
    counts.write_h5ad(tmp_path / "counts.h5ad")
    words = ["de", "--data", str(tmp_path / "counts.h5ad"), "--groupby", "cell_type", "--out"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "de.tsv")])
    assert done.exit_code == 0, done.output
    assert "30 genes at a false discovery rate of 5 %: B " in done.output
    assert pd.read_csv(tmp_path / "de.tsv", sep="\t").groupby("group").size().tolist() == [30, 30]
    failed = CliRunner().invoke(app, [*words, str(tmp_path / "other.csv"), "--groups", "Z"])
    assert isinstance(failed.exception, ValueError)
    assert not (tmp_path / "other.csv").exists()


def test_sums_of_donors():
    counts = sp.csr_matrix(np.arange(12).reshape(6, 2))
    donors = np.array(["a", "a", "b", None, "b", "a"], dtype=object)
    sums, side, donor = donor_sums(counts, donors, np.array([1, 0, 1, 1, 0, -1]), "x", "donor")
    assert sums.tolist() == [[2, 3], [8, 9], [0, 1], [4, 5]]
    assert side.tolist() == [0, 0, 1, 1]
    assert donor.tolist() == ["a", "b", "a", "b"]


def test_donors_as_replicates_keep_the_error_rate_that_cells_do_not():
    if importlib.util.find_spec("pydeseq2") is None:
        pytest.skip("needs pydeseq2 (pip install 'distdiff[de]')")
    rng = np.random.default_rng(0)
    genes, donors = 150, 8
    effect = np.exp(rng.normal(0, 0.5, (donors, genes)))  # of a donor, none of the side
    donor = np.repeat(np.arange(donors), 40)
    mean = rng.gamma(2.0, 1.0, genes) + 0.2
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(mean * effect[donor]).astype(np.float32)))
    adata.obs["donor"], adata.obs["side"] = [f"d{d}" for d in donor], np.where(donor < 4, "one", "two")
    distdiff.de(adata, "side", groups=["one"])
    cells = (p_of(adata)[0] < 0.05).mean()
    distdiff.de(adata, "side", groups=["one"], sample="donor")
    replicates = (p_of(adata)[0] < 0.05).mean()
    assert adata.uns["rank_genes_groups"]["params"]["method"] == "pydeseq2"
    assert cells > 0.4 > 0.15 > replicates
