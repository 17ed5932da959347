"""`distdiff.check`: the verdict on sets whose right answer is known, what it says in passing, what it refuses."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import distdiff
from distdiff import checkup, inmemory
from distdiff.baselines.knn import Knn
from distdiff.cli import app
from distdiff.inmemory import InMemory, groups_of


def flat(n=150, genes=60, seed=0):
    """Cells that differ in depth alone."""
    rng = np.random.default_rng(seed)
    return made(rng.poisson(rng.lognormal(0, 0.4, (n, 1)) * rng.gamma(1.0, 1.5, genes)))


def typed(n=240, genes=60, deep=40.0, seed=0):
    """Cells of three types, deep, with a rate of each cell's own around that of its type."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    rate = rng.gamma(0.7, deep, (3, genes))[kind] * rng.gamma(20.0, 1 / 20, (n, genes))
    return made(rng.poisson(rate), kind)


def made(counts, kind=None):
    n = len(counts)
    obs = pd.DataFrame({"kind": ["all"] * n if kind is None else [f"type{k}" for k in kind]})
    obs.index = [f"c{i}" for i in range(n)]
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def thinned(adata, p):
    out = adata.copy()
    out.X = sp.csr_matrix(np.random.default_rng(1).binomial(adata.X.toarray().astype(int), p).astype(np.float32))
    return out


def permuted(adata):
    out = adata.copy()
    out.X = sp.csr_matrix(np.random.default_rng(2).permuted(adata.X.toarray(), axis=0))
    return out


@pytest.fixture(scope="module")
def shallow():
    return distdiff.check(thinned(typed(), 0.05), groupby="kind")


def test_a_deep_set_thinned_to_a_twentieth_is_to_be_denoised(shallow):
    assert shallow.use in ("kNN", "PCA", "MAGIC")
    assert shallow.verdict.startswith(f"denoise with {shallow.use}")
    best = next(r for r in shallow.rows if r.method == shallow.use and r.group == r.band == "all")
    assert best.better


@pytest.mark.parametrize(
    "adata", [flat(), flat(100, seed=3), permuted(thinned(typed(), 0.05))], ids=["flat", "100", "permuted"]
)
def test_where_there_is_nothing_to_share_the_verdict_is_do_not(adata):
    found = distdiff.check(adata, groupby="kind")
    assert found.use is None
    assert found.verdict.startswith("do not denoise: no method is surely better than ")


def test_rows_by_depth_group_and_band_and_the_json(shallow, tmp_path):
    rows = shallow.rows
    assert {r.depth for r in rows} == set(checkup.DEPTHS)
    assert {r.group for r in rows} == {"all", "type0", "type1", "type2"}
    assert {r.method for r in rows} == {checkup.RAW, checkup.MEAN, "kNN", checkup.OWN, "PCA", "MAGIC"}
    assert {r.band for r in rows} > {"all", "middle"}
    whole = json.loads(shallow.write(tmp_path / "check.json").read_text())
    assert whole["use"] == shallow.use
    assert len(whole["rows"]) == len(rows)
    text = shallow.to_text()
    assert text.startswith("verdict: denoise with")
    assert "90% of the molecules seen" in text
    assert "type1: " in text


def test_the_own_count_counts_where_cells_are_unlike_their_neighbours():
    """Rates that no other cell tells of: neighbours alone are worse than with the cell's own count."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(1.0, 5.0, (200, 40))
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    knn = Knn(k=20, prior=1.0, scale=1.0)
    knn.fit(InMemory(counts), np.arange(200))
    alone, both = knn.denoise(counts, 1.0), checkup.with_own_count(knn, counts)
    x = counts.toarray()
    assert np.square(both - rate).mean() < 0.6 * np.square(alone - rate).mean()
    assert np.square(both - rate).mean() < np.square(x - rate).mean()
    assert (knn.neighbours(x, np.ones(x.shape, bool), 1, 1.0)[:, 0] == np.arange(200)).all(), "its own neighbour"
    pools = []
    pool = knn.pool
    knn.pool = lambda counts, observed, near, prior: pools.append(near) or pool(counts, observed, near, prior)
    checkup.with_own_count(knn, counts)
    assert pools[0].shape == (200, 20)
    assert not (pools[0] == np.arange(200)[:, None]).any(), "which is left out"


def test_scores_are_those_of_the_page():
    """With the arguments the right way round the true rate has the least loss, and its read-out the least error."""
    rng = np.random.default_rng(0)
    truth = rng.gamma(1.0, 2.0, (400, 30)).astype(np.float32)
    held = sp.csr_matrix(rng.poisson(truth))
    answers = {checkup.RAW: truth, checkup.MEAN: truth * 0.0 + truth.mean(0), "low": truth * 0.7, "high": truth * 1.4}
    group = np.array(["a"] * 400, dtype=object)
    rows = checkup._rows({**answers, "true": truth}, held, 0.9, group, truth.mean(0), 0)
    whole = {r.method: r for r in rows if r.group == r.band == "all"}
    assert min(whole, key=lambda name: whole[name].mse) in ("true", checkup.RAW)
    assert whole["true"].nll < min(whole[name].nll for name in ("low", "high", checkup.MEAN))
    low, high = whole["low"].nll_gain[checkup.MEAN][1:]
    assert low < whole["low"].nll_gain[checkup.MEAN][0] < high


def test_the_mean_of_log1p_is_that_of_draws():
    rng = np.random.default_rng(0)
    for rate in (0.05, 1.0, 9.0, 300.0):
        drawn = np.log1p(rng.poisson(rate, 200_000)).mean()
        assert checkup.mean_log1p(np.array([rate]))[0] == pytest.approx(drawn, rel=0.02)


def test_what_is_seen_in_passing():
    adata = typed(120)
    wide = 2 * np.vstack([adata.X.toarray(), adata.X[:5].toarray()])
    kind = np.r_[adata.obs["kind"], adata.obs["kind"][:5]]
    wide[:, 0] = np.where(kind == "type0", 40_000, 2)
    twice = made(wide)
    twice.obs["kind"] = kind
    names = [*adata.obs_names[:-1], adata.obs_names[0], *[f"d{i}" for i in range(5)]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata's, of names that occur twice
        twice.obs_names = names
    source = checkup.Source.from_anndata(twice)
    counts = sp.csr_matrix(twice.X, dtype=np.int64)
    depth = np.asarray(counts.sum(1)).ravel()
    notes = " ".join(checkup._notes(source, counts, depth, twice.obs["kind"].to_numpy(), np.asarray(twice.var_names)))
    assert "have the name of one before them" in notes
    assert "5 cells have exactly the counts of another" in notes
    assert "every count is a multiple of 2" in notes
    assert "ambient-looking genes" in notes
    assert ": g0" in notes
    clean = checkup._notes(checkup.Source.from_anndata(flat()), sp.csr_matrix(flat().X, dtype=np.int64),
                           np.asarray(flat().X.sum(1)).ravel(), np.array(["a"] * 150), np.arange(60))  # fmt: skip
    assert clean == []


def test_groups_are_clusters_where_none_are_given_and_it_says_so(monkeypatch):
    adata = typed(120)
    kind = adata.obs["kind"].to_numpy()

    def clusters(rows, seed):
        assert rows.read(0, rows.n_cells).shape == adata.shape
        return np.unique(kind, return_inverse=True)[1]

    monkeypatch.setattr(inmemory, "leiden", clusters)
    source = checkup.Source.from_anndata(adata)
    group, label = groups_of(source, sp.csr_matrix(adata.X), np.arange(120), None, 0)
    assert label.startswith("Leiden clusters of the same counts")
    assert set(group) == {"cluster 0", "cluster 1", "cluster 2"}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda a: a[:40].copy(), {}, "40 cells with molecules, at least 50"),
        (lambda a: a[:, :5].copy(), {}, "5 genes with molecules, at least 10"),
        (lambda a: ad.AnnData(a.X.log1p(), a.obs, a.var), {}, "is not a whole number"),
        (lambda a: a, {"groupby": "kinds"}, "no column 'kinds'"),
        (lambda a: a, {"layer": "raws"}, "no layer 'raws'"),
    ],
)
def test_bad_input_is_one_sentence(change, options, words):
    with pytest.raises(ValueError, match=words) as error:
        distdiff.check(change(flat()), **options)
    assert "\n" not in str(error.value)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(checkup, "DEPTHS", (0.9,))
    flat(60, 30).write_h5ad(tmp_path / "mine.h5ad")
    words = ["check", str(tmp_path / "mine.h5ad"), "--groupby", "kind", "--out", str(tmp_path / "check.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "verdict: do not denoise" in done.output
    assert json.loads((tmp_path / "check.json").read_text())["use"] is None


@pytest.mark.long
def test_a_model_takes_part_and_helps_on_enough_cells():
    found = distdiff.check(thinned(typed(900, 150), 0.05), groupby="kind", model=True)
    assert "distdiff" in {row.method for row in found.rows if row.depth == checkup.DEPTHS[0]}
    assert found.use is not None
