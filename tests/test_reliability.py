"""`distdiff.panel`: scores a gene against other ways to compute them, expectations that come true, and refusals."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats
from typer.testing import CliRunner

import distdiff
from distdiff import batch, metrics, reliability
from distdiff.cli import app
from distdiff.data.masks import thin
from distdiff.imputers import Imputed, Imputer
from distdiff.imputers.panel import OnPanel
from tests.test_certificate import cells, trained


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    distdiff.shard(
        cells(1600), folder / "atlas.zarr", labels=["kind"], split=(0.7, 0.15, 0.15), workers=0, progress=False
    )
    return folder / "atlas.zarr"


@pytest.fixture(scope="module")
def model(atlas, tmp_path_factory):
    return trained(atlas, 38_400)


@pytest.fixture(scope="module")
def query():
    """Other cells of the same law, a quarter as deep, in 40 of the 60 genes and one that the model does not know."""
    fresh = cells(500, seed=1)
    fresh.X = thin(fresh.X, np.full(500, 0.25), np.random.default_rng(0))
    some = fresh[:, :40].copy()
    other = ad.AnnData(sp.csr_matrix(np.ones((500, 1), np.float32)), obs=some.obs, var=pd.DataFrame(index=["new"]))
    return ad.concat([some, other], axis=1, merge="first"), fresh


@pytest.fixture(scope="module")
def report(model, atlas, query):
    return model.panel(query[0], atlas, groupby="kind")


class Knows(Imputer):
    """Answers with given rates, and draws from Poisson laws around ``draw_rate``."""

    def __init__(self, rate, draw_rate):
        self.rate, self.draw_rate = torch.from_numpy(rate), torch.from_numpy(draw_rate)

    def impute(self, cells, observed, *, draws=0, seed=0):
        rate, law = self.rate[cells.rows], self.draw_rate[cells.rows]
        generator = torch.Generator().manual_seed(int(cells.rows[0]))
        drawn = torch.poisson(law.expand(draws, -1, -1), generator) if draws else None
        return Imputed(torch.where(observed, cells.counts, rate), drawn)


def test_scores_are_those_of_the_plain_formulas():
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(0, 1, (400, 12))).astype(np.float32)
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    panel, targets, group = np.arange(12) < 6, np.arange(6, 12), rng.choice(["a", "b"], 400)
    found = reliability.gene_scores(Knows(rate, rate), counts, panel, targets, group=group)
    x, m = counts.toarray()[:, 6:].astype(float), rate[:, 6:].astype(float)
    depth = counts.toarray()[:, :6].sum(1).clip(0.5)
    every = np.ones((1, 400), bool)
    for i in range(6):
        assert found["correlation"][i] == pytest.approx(stats.pearsonr(x[:, i], m[:, i])[0])
        assert found["spearman"][i] == pytest.approx(stats.spearmanr(x[:, i], m[:, i])[0])
        trivial = x[:, i].sum() / depth.sum() * depth
        d = [metrics.poisson_deviance(x[None, :, i], every, a[None])[0] for a in (m[:, i], trivial)]
        assert found["deviance_explained"][i] == pytest.approx(1 - d[0] / d[1])
        centred = [values - pd.Series(values).groupby(group).transform("mean") for values in (x[:, i], m[:, i])]
        assert found["correlation_within"][i] == pytest.approx(np.corrcoef(*centred)[0, 1])
        assert found["ceiling"][i] == pytest.approx(np.corrcoef(rate[:, 6 + i], x[:, i])[0, 1], abs=0.1)
    assert np.allclose(found["mean"], x.mean(0))
    assert (found["cells"] == (x > 0).sum(0)).all()
    assert found["coverage"].mean() == pytest.approx(0.95, abs=0.01)
    narrow = reliability.gene_scores(Knows(rate, 3 * rate), counts, panel, targets)
    assert narrow["coverage"].mean() < 0.9, "draws of another law do not cover"


def test_intervals_are_those_of_a_bootstrap_over_cells():
    rng = np.random.default_rng(1)
    x, m = (rng.gamma(2.0, 1.0, (300, 3)) for _ in range(2))
    weights = metrics.bootstrap_weights(300, 50, rng)
    found = reliability.correlations(x, m, weights)
    for r in (0, 7):
        at = np.repeat(np.arange(300), weights[r])
        assert np.allclose(found[r], [np.corrcoef(x[at, i], m[at, i])[0, 1] for i in range(3)])
    depth = rng.gamma(2.0, 1.0, 300)
    explained = reliability.deviance_explained(x, m, depth, weights)
    at = np.repeat(np.arange(300), weights[3])
    once = reliability.deviance_explained(x[at], m[at], depth[at], np.ones((1, 300)))
    assert np.allclose(explained[3], once[0])
    none, one = np.zeros((9, 1)), np.ones((9, 1))
    assert np.isnan(reliability.correlations(none, one, one.T)).all()
    assert np.isnan(reliability.deviance_explained(none, one, np.ones(9), one.T)).all()


def test_the_mean_times_depth_explains_nothing():
    rng = np.random.default_rng(2)
    depth = rng.gamma(2.0, 1.0, 500)
    x = rng.poisson(depth[:, None] * np.array([0.5, 3.0])).astype(float)
    m = depth[:, None] * x.sum(0) / depth.sum()
    assert np.allclose(reliability.deviance_explained(x, m, depth, np.ones((1, 500))), 0)
    assert np.allclose(reliability.deviance_explained(x, m, 7 * depth, np.ones((1, 500))), 0), "on any scale"


def test_cells_are_as_deep_as_the_query_and_keep_their_order():
    rng = np.random.default_rng(3)
    depth, query = rng.lognormal(8, 0.5, 2000), rng.lognormal(6, 0.3, 700)
    share = reliability.depth_shares(depth, query)
    assert np.allclose(np.quantile(share * depth, [0.1, 0.5, 0.9]), np.quantile(query, [0.1, 0.5, 0.9]), rtol=0.02)
    assert stats.spearmanr(share * depth, depth)[0] > 0.999
    assert (reliability.depth_shares(query, depth) == 1).all(), "cells cannot be made deeper"
    counts = sp.csr_matrix(rng.poisson(50.0, (2000, 20)))
    assert thin(counts, share, rng).sum(1).mean() == pytest.approx(1000 * share.mean(), rel=0.02)
    with pytest.raises(ValueError, match=r"shares must lie in \[0, 1\]"):
        thin(counts, share + 1, rng)


def test_what_is_expected_comes_true(model, atlas, query, report):
    """In other cells, at their depth: correlations, deviance explained and coverage of 20 hidden genes."""
    given, fresh = query
    store = distdiff.CountStore.open(atlas)
    names = list(model.spec.genes)
    counts = fresh[:, names].X.tocsr()
    panel = np.isin(names, given.var_names)
    assert panel.sum() == 40
    after = reliability.gene_scores(model.imputer(), counts, panel, np.flatnonzero(~panel))
    real = pd.DataFrame(after, index=np.array(names)[~panel]).loc[report.table.index]
    for name, most in (("correlation", 0.12), ("spearman", 0.08), ("deviance_explained", 0.08)):
        assert stats.spearmanr(real[name], report.table[name])[0] > 0.7, name
        assert np.abs(real[name] - report.table[name]).median() < most, (
            name
        )  # a few large counts decide some of the first
    assert 0.93 < real["coverage"].mean() < 0.97
    inside = (real["correlation"] >= report.table["correlation_low"] - 0.05) & (
        real["correlation"] <= report.table["correlation_high"] + 0.05
    )
    assert inside.mean() > 0.7
    assert report.about["cells"] == len(store.rows("val")) + len(store.rows("test"))
    assert report.about["depth"] == pytest.approx(report.about["query_depth"], rel=0.1)
    assert 0.15 < report.about["molecules_kept"] < 0.35
    deep = model.panel([*given.var_names[:40]], atlas)
    assert deep.about["molecules_kept"] == 1
    assert (deep.table["correlation"] - report.table["correlation"].reindex(deep.table.index)).mean() > 0.05
    assert (report.table["correlation_within"] - report.table["correlation"]).mean() < -0.01


def test_a_gene_that_no_gene_predicts_is_not_reliable(model, atlas, query):
    """Genes dealt anew to the cells of the atlas: nothing can predict them, and the report says so."""
    given, _ = query
    mixed = cells(600, seed=5)
    x, rng = mixed.X.toarray(), np.random.default_rng(0)
    for i in range(50, 60):
        x[:, i] = rng.permutation(x[:, i])
    mixed.X = sp.csr_matrix(x)
    table = model.panel(given, mixed).table
    dealt = [f"g{i}" for i in range(50, 60)]
    told = table.loc[dealt, "reliability"]
    assert (told == "not reliable").sum() >= 9  # (one may beat gene mean x depth, where depth tells nothing)
    assert "reliable" not in told.tolist()
    assert table.loc[told[told == "not reliable"].index, "in_words"].str.startswith("NOT RELIABLE").all()
    assert (table.drop(index=dealt)["reliability"] == "reliable").sum() >= 5
    assert list(table["reliability"]) == sorted(table["reliability"], key=list(reliability.WORDS).index)


def test_report_goes_into_var_in_memory_and_on_files(model, atlas, query, report, tmp_path):
    given, _ = query
    report.write(tmp_path / "report")
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "genes.csv", "reliable.txt", "panel.txt", "panel.json", "panel.png"
    }  # fmt: skip
    assert (tmp_path / "report" / "reliable.txt").read_text().split() == report.reliable
    assert "NOT RELIABLE" in report.to_text()
    out = model.complete(given, report=report)
    var = out.var
    assert list(var["reliability"][:41]) == ["measured"] * 41
    assert set(var["reliability"][41:]) <= set(reliability.WORDS)
    assert var["expected_correlation"].notna().sum() == len(report.table) == 20
    assert var.loc[report.table.index, "expected_correlation"].tolist() == report.table["correlation"].tolist()
    again = model.complete(given, report=tmp_path / "report")
    assert np.allclose(again.var["expected_correlation"], var["expected_correlation"], equal_nan=True)
    assert (again.var["reliability"] == var["reliability"]).all()
    some = model.complete(given, report.reliable[:2], report=report)
    assert list(some.var_names[41:]) == report.reliable[:2]
    given.write_h5ad(tmp_path / "query.h5ad")
    for name, read in (("full.h5ad", ad.read_h5ad), ("full.zarr", ad.read_zarr)):
        batch.run(
            "complete", model, tmp_path / "query.h5ad", tmp_path / name, report=tmp_path / "report", progress=False
        )
        found = read(tmp_path / name).var
        assert (found["reliability"].astype(str) == var["reliability"].astype(str)).all()
        assert np.allclose(found["expected_correlation"], var["expected_correlation"], equal_nan=True)


def test_a_report_of_another_panel_or_model_is_refused(model, atlas, query, report, tmp_path):
    given, _ = query
    with pytest.raises(ValueError, match=r"made for a panel of 40 genes .* has other ones \(30\); make one"):
        model.complete(given[:, :30].copy(), report=report)
    report.about["weights_sha256"], before = "0" * 64, report.about["weights_sha256"]
    with pytest.raises(ValueError, match="made with another model"):
        model.complete(given, report=report)
    report.about["weights_sha256"] = before
    with pytest.raises(ValueError, match=r"report='.*nowhere': no report of distdiff.panel is there"):
        model.complete(given, report=str(tmp_path / "nowhere"))


def test_refusals_are_one_sentence(model, atlas, query, tmp_path):
    given, fresh = query
    for data, options, words in (
        (fresh, {}, "the query has all of the model's genes"),
        (given, {"genes": ["g1"]}, "genes: 'g1': the query has it"),
        (given, {"genes": ["g599"]}, "genes: 'g599': the model does not know it"),
        (given, {"draws": 1}, "draws must be at least 2"),
        (["a", "b"], {}, "none of the input's 2 genes is among the model's"),
        ([], {}, "no gene is named"),
    ):
        with pytest.raises(ValueError, match=words):
            model.panel(data, atlas, **options)
    with pytest.raises(ValueError, match="none of the genes that the panel lacks"):
        model.panel(given, cells(300, seed=3)[:, :40].copy())
    with pytest.raises(ValueError, match="has 60 cells, at least 100 are wanted"):
        model.panel(given, cells(60, seed=3))
    empty = given.copy()
    empty.X = sp.csr_matrix(empty.shape, dtype=np.float32)
    with pytest.raises(ValueError, match="holds no molecules in the genes of the panel"):
        model.panel(empty, atlas)


def test_cells_of_training_are_not_asked(model, atlas, query):
    given, _ = query
    both = ad.concat([cells(1600), cells(300, seed=2)])
    found = model.panel(given, both)
    assert found.about["cells"] == 1900 - round(0.7 * 1600)
    assert found.about["cells_from"] == "cells that the model was not trained on"
    assert model.panel(given, atlas).about["cells_from"] == "validation and test cells of the model's own store"


def test_notes_tell_what_the_atlas_lacks(model, query, atlas):
    given, _ = query
    other = cells(300, seed=4)[:, 5:55].copy()
    notes = " ".join(model.panel(given, other).notes)
    assert "5 genes of the panel are not in the atlas" in notes
    assert "5 genes that the panel lacks are not in the atlas" in notes
    deep = given.copy()
    deep.X = deep.X * 40
    assert "the query is deeper than the atlas" in " ".join(model.panel(deep, atlas).notes)


def test_the_command_line_writes_a_report(model, atlas, query, tmp_path):
    given, _ = query
    model.save(tmp_path / "model")
    given.write_h5ad(tmp_path / "query.h5ad")
    (tmp_path / "genes.txt").write_text("\n".join(given.var_names[:40]))
    base = ["panel", "--model", str(tmp_path / "model"), "--atlas", str(atlas), "--draws", "2"]
    for data, out in (("query.h5ad", "a"), ("genes.txt", "b")):
        done = CliRunner().invoke(app, [*base, "--data", str(tmp_path / data), "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
        assert "panel of 40 genes that the model knows, 20 genes that it lacks" in done.output
        about = json.loads((tmp_path / out / "panel.json").read_text())["about"]
        assert about["panel_genes"] == 40
    full = ["complete", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "query.h5ad"), "--out"]
    more = [str(tmp_path / "full.h5ad"), "--report", str(tmp_path / "a")]
    done = CliRunner().invoke(app, [*full, *more, "--genes", str(tmp_path / "a" / "reliable.txt")])
    assert done.exit_code == 0, done.output
    var = ad.read_h5ad(tmp_path / "full.h5ad").var
    assert set(var["reliability"]) == {"measured", "reliable"}


def test_gene_hold_out_tells_whether_expectations_come_true(model, atlas, tmp_path):
    found = distdiff.evaluate(
        model, atlas, protocol="genes", rate=0.1, draws=5, repaint_steps=0, progress=False
    )  # fmt: skip
    about = found.setting["reliability"]
    assert about["folds"] == 10
    assert about["genes"] == 60 == len(found.genes)
    assert about["rank_correlation"]["correlation"] > 0.75
    assert 0.93 < about["coverage"] < 0.97
    assert "rank correlation" in found.to_text()
    found.write(tmp_path / "scores")
    assert pd.read_csv(tmp_path / "scores" / "genes.csv", index_col=0).shape[0] == 60
    assert "reliability" not in distdiff.evaluate(model, atlas, repaint_steps=0, draws=2, progress=False).setting


def test_the_panel_of_agreement_may_hold_genes_that_no_fold_hides(model, atlas):
    store = distdiff.CountStore.open(atlas)
    fold = np.where(np.arange(60) < 45, -1, 0)
    counts = [store.read(store.rows(split)) for split in ("val", "test")]
    imputer = OnPanel(model.imputer(), model.spec.genes, store.genes)
    table = reliability.agreement(imputer, store.genes, *counts, fold, draws=2)
    assert list(table.index) == list(store.genes[45:])
