"""The peers that benchmarks choose (MAGIC, Poisson NMF, scVI), and the second contract: `denoise`."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from distdiff import component
from distdiff.baselines import Baseline, _tuning, depth
from distdiff.baselines.gene_mean import GeneMean
from distdiff.baselines.magic import Magic
from distdiff.baselines.nmf import Nmf
from distdiff.types import Cells
from tests.baselines.test_baselines import Store

needs_scvi = pytest.mark.skipif(
    importlib.util.find_spec("scvi") is None, reason="scvi-tools is not installed: pip install 'distdiff[baselines]'"
)
SCVI = pytest.param({"kind": "scvi", "epochs": 250}, marks=[needs_scvi, pytest.mark.filterwarnings("ignore")])
PEERS = [
    {"kind": "magic", "knn": (3, 5), "t": (1, 2), "n_pca": (2, 5)},
    {"kind": "magic", "knn": 5, "t": 3, "n_pca": 4, "smear": False, "floor": 0.0},
    {"kind": "nmf", "components": (2, 5)},
    {"kind": "nmf", "components": 3, "floor": 0.01},
    SCVI,
]
DENOISERS = [*PEERS, {"kind": "gene_mean", "depth": True}, {"kind": "knn"}, {"kind": "pca", "components": (3, 6)}]
TRAIN, TEST = np.arange(320), np.arange(320, 400)


def name(options):
    return "-".join(str(v) for v in options.values())


def poisson_deviance(x, m):
    m = np.maximum(m, 1e-6)
    return np.mean(2 * (np.where(x > 0, x * np.log(np.maximum(x, 1) / m), 0) - x + m))


@pytest.fixture(scope="module")
def truth():
    """Rates of 400 cells x 40 genes from three programmes; gene 0 is never seen."""
    rng = np.random.default_rng(3)
    rate = rng.gamma(1.0, 1.0, (400, 3)) @ rng.gamma(0.8, 2.0, (3, 40))
    rate[:, 0] = 0
    return rate


@pytest.fixture(scope="module")
def store(truth):
    return Store(np.random.default_rng(4).poisson(truth), np.zeros(400, int))


@pytest.fixture(scope="module")
def batch(store):
    observed = torch.from_numpy(np.random.default_rng(1).random((80, 40)) < 0.5)
    observed[4] = False  # no evidence at all
    observed[5] = True  # nothing to do
    return store.cells(TEST), observed


@pytest.fixture(scope="module", params=PEERS, ids=name)
def fitted(request, store):
    baseline = component.build(Baseline, request.param)
    baseline.fit(store, TRAIN)
    return baseline


def test_hidden_counts_are_never_looked_at(fitted, batch):
    cells, observed = batch
    clean = fitted.impute(cells, observed, draws=3, seed=1)
    for poison in (torch.nan, 1e9, -7.0):
        poisoned = Cells(torch.where(observed, cells.counts, poison), cells.labels, cells.rows)
        again = fitted.impute(poisoned, observed, draws=3, seed=1)
        assert torch.equal(clean.mean, again.mean)
        assert torch.equal(clean.draws, again.draws)


def test_the_answer_keeps_evidence_and_is_counts(fitted, batch):
    cells, observed = batch
    given = cells.counts.clone()
    answer = fitted.impute(cells, observed, draws=4, seed=1)
    assert answer.mean.shape == cells.counts.shape
    assert answer.mean.dtype == answer.draws.dtype == torch.float32
    assert torch.equal(answer.mean[observed], cells.counts[observed])
    assert torch.isfinite(answer.mean).all()
    assert (answer.mean >= 0).all()
    assert torch.equal(answer.draws, answer.draws.round())
    assert torch.equal(cells.counts, given)
    assert torch.equal(answer.mean, fitted.impute(cells, observed).mean)


def test_an_answer_does_not_depend_on_the_rest_of_the_batch(fitted, batch):
    cells, observed = batch
    together = fitted.impute(cells, observed).mean
    alone = torch.cat([fitted.impute(cells[i : i + 1], observed[i : i + 1]).mean for i in range(10)])
    assert alone.numpy() == pytest.approx(together[:10].numpy(), rel=1e-3, abs=1e-4)


def test_odd_batches(fitted, batch):
    cells, observed = batch
    assert fitted.impute(cells[:0], observed[:0], draws=2).draws.shape == (2, 0, 40)
    empty = Cells(torch.zeros_like(cells.counts), cells.labels, cells.rows)
    answer = fitted.impute(empty, observed).mean
    assert torch.isfinite(answer).all()
    assert (answer >= 0).all()
    with pytest.raises(ValueError, match=r"must both be \[cells, 40\]"):
        fitted.impute(Cells(cells.counts[:, :9], cells.labels, cells.rows), observed[:, :9])
    with pytest.raises(ValueError, match="call fit"):
        type(fitted)().impute(cells, observed)


def test_the_same_fit_twice(fitted, request, store, batch):
    again = component.build(Baseline, request.node.callspec.params["fitted"])
    state = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    again.fit(store, TRAIN)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    assert torch.equal(fitted.impute(*batch).mean, again.impute(*batch).mean)


@pytest.mark.parametrize("options", PEERS[:4], ids=name)
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_handful_of_training_cells_is_enough(options, n, store, batch):
    baseline = component.build(Baseline, options)
    baseline.fit(store, TRAIN[:n])
    assert torch.isfinite(baseline.impute(*batch, draws=1).mean).all()
    assert np.isfinite(baseline.denoise(batch[0].counts.numpy(), 0.9)).all()
    with pytest.raises(ValueError, match="no training cells"):
        component.build(Baseline, options).fit(store, TRAIN[:0])


@pytest.mark.parametrize("options", PEERS[:4], ids=name)
def test_cells_without_any_count_are_no_obstacle(options, batch):
    baseline = component.build(Baseline, options)
    baseline.fit(Store(np.zeros((20, 40), int), np.zeros(20, int)), np.arange(20))
    assert (baseline.impute(*batch).mean[~batch[1]] == 0).all()


def test_imputing_beats_the_mean(fitted, store, batch):
    cells, observed = batch
    hidden = ~observed.numpy()
    mean = GeneMean(depth=True)
    mean.fit(store, TRAIN)
    x = cells.counts.numpy()[hidden]
    got = fitted.impute(cells, observed).mean.numpy()[hidden]
    # stock scVI never saw hidden entries in training
    wanted = 0.9 if fitted.label == "scVI" else 0.75
    wanted *= poisson_deviance(x, mean.impute(cells, observed).mean.numpy()[hidden])
    if getattr(fitted, "chosen", {}).get("smear", True):  # MAGIC as published does not keep means
        assert poisson_deviance(x, got) < wanted
        assert got.sum() == pytest.approx(x.sum(), rel=0.1)
    else:
        error = np.mean((np.sqrt(got) - np.sqrt(x)) ** 2)
        assert error < np.mean((np.sqrt(mean.impute(cells, observed).mean.numpy()[hidden]) - np.sqrt(x)) ** 2)


@pytest.mark.parametrize("options", DENOISERS, ids=name)
def test_denoising_thinned_counts_finds_the_full_rate(options, truth, store):
    p = 0.5
    full = store.counts.toarray()
    thinned = np.random.default_rng(5).binomial(full, p)
    thin = Store(thinned, store.codes)
    baseline = component.build(Baseline, options)
    baseline.fit(thin, np.arange(400))
    rate = baseline.denoise(thin.counts, p)
    assert rate.shape == full.shape
    assert rate.dtype == np.float32
    assert np.isfinite(rate).all()
    assert (rate >= 0).all()
    assert np.array_equal(rate, baseline.denoise(thinned.astype(np.float32), p))
    assert baseline.denoise(thin.counts, 1.0) == pytest.approx(p * rate, rel=1e-5)
    left = full - thinned
    plain = GeneMean(depth=True)
    plain.fit(thin, np.arange(400))
    if options.get("smear", True):
        assert rate.sum() == pytest.approx(truth.sum(), rel=0.1)
        if options["kind"] != "gene_mean":
            score = poisson_deviance(left, (1 - p) * rate)
            assert score < 0.9 * poisson_deviance(left, (1 - p) * plain.denoise(thin.counts, p))
            assert score < 0.9 * poisson_deviance(left, (1 - p) / p * thinned)
    one = baseline.denoise(thin.counts[:1], p)
    assert one[0] == pytest.approx(rate[0], rel=1e-3, abs=1e-4)
    empty = baseline.denoise(np.zeros((2, 40), np.float32), p)
    assert np.isfinite(empty).all()
    assert baseline.denoise(thin.counts[:0], p).shape == (0, 40)


def test_denoise_reads_in_chunks(store, monkeypatch):
    mean = GeneMean(depth=True)
    mean.fit(store, TRAIN)
    whole = mean.denoise(sp.csr_array(store.counts), 0.9)
    monkeypatch.setattr("distdiff.baselines.CHUNK", 7)
    assert whole == pytest.approx(mean.denoise(store.counts, 0.9), rel=1e-5)
    s = store.counts.sum(1).A1[:5, None] / mean.gene_mean.sum()
    assert whole[:5] == pytest.approx(s * mean.gene_mean / 0.9, rel=1e-5)


def test_denoise_says_what_is_wrong(store):
    mean = GeneMean(depth=True)
    counts = store.counts[:3].toarray()
    with pytest.raises(ValueError, match="call fit"):
        mean.denoise(counts, 0.9)
    mean.fit(store, TRAIN)
    for p in (0.0, 1.1, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            mean.denoise(counts, p)
    with pytest.raises(ValueError, match=r"\(3, 9\) must be \[cells, 40\]"):
        mean.denoise(counts[:, :9], 0.9)
    for bad in (-1.0, np.nan, np.inf):
        wrong = counts.astype(np.float32)
        wrong[1, 1] = bad
        with pytest.raises(ValueError, match="negative or not finite"):
            mean.denoise(wrong, 0.9)
    for kind in ("constant", "gene_mean", "type_mean"):
        other = component.build(Baseline, {"kind": kind})
        other.fit(store, TRAIN)
        with pytest.raises(ValueError, match="does not follow the depth"):
            other.denoise(counts, 0.9)


def test_magic_is_the_equations_of_a_loop(store):
    imputer = Magic(knn=4, t=2, n_pca=3, smear=False, floor=0.0)
    imputer.fit(store, TRAIN)
    order = _tuning.sample(TRAIN, len(TRAIN), imputer.seed)
    x = store.counts[order].toarray().astype(float)
    s = x.sum(1) / imputer.gene_mean.sum()
    y, z, n = np.sqrt(x / s[:, None]), imputer.train, len(TRAIN)
    distance = np.sqrt(((z[:, None] - z[None]) ** 2).sum(-1))
    k = np.zeros((n, n))
    for i in range(n):
        near = np.argsort(distance[i], kind="stable")
        assert near[0] == i
        sigma = distance[i, near[3]]
        for j in near[:12]:
            k[i, j] = np.exp(-distance[i, j] / sigma)
    k = (k + k.T) / 2
    markov = k / k.sum(1, keepdims=True)
    wanted = s[:, None] * (markov @ markov @ y) ** 2
    assert imputer.denoise(store.counts[order], 1.0) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_magic_scores_use_the_observed_genes_alone(store, batch):
    cells, observed = batch
    imputer = Magic(knn=4, t=1, n_pca=3, smear=False, floor=0.0)
    imputer.fit(store, TRAIN)
    x, seen = np.where(observed, cells.counts, 0).astype(np.float32), observed.numpy()
    got, v = imputer.scores(x, seen), imputer.pca.loadings
    y = np.sqrt(x / depth(x, seen, imputer.gene_mean))
    for cell in (0, 5, 9):
        m = seen[cell]
        a = np.concatenate([v[m], np.diag(np.sqrt(imputer.pca.precision))])
        b = np.concatenate([(y[cell] - imputer.pca.centre)[m], np.zeros(3)])
        assert got[cell] == pytest.approx(np.linalg.lstsq(a, b, rcond=None)[0], abs=1e-3)
    rows = imputer.affinity(got)
    assert rows.shape == (80, 320)
    assert rows.sum(1) == pytest.approx(1, abs=1e-5)
    assert rows.nnz < 80 * 60


def test_magic_smear_keeps_the_molecules_of_a_gene(store):
    imputer = Magic(knn=5, t=2, n_pca=5, smear=True, floor=0.0)
    imputer.fit(store, TRAIN)
    told, true = imputer.denoise(store.counts[TRAIN], 1.0).sum(0), store.counts[TRAIN].toarray().sum(0)
    assert told == pytest.approx(true, rel=0.02, abs=2)


@pytest.mark.parametrize("prior", [0.0, 1.0, 20.0])
def test_nmf_loadings_climb_the_likelihood_of_observed_genes(store, batch, prior):
    from scipy.optimize import minimize

    cells, observed = batch
    imputer = Nmf(components=3, floor=0.0, steps=2000, prior=prior)
    imputer.fit(store, TRAIN)
    x, seen = np.where(observed, cells.counts, 0).astype(np.float32), observed.numpy()
    w = imputer.loadings(x, seen)
    h, mode = imputer.programmes.astype(float), depth(x, seen, imputer.gene_mean) * imputer.average
    for cell in (0, 7):
        m = seen[cell]

        def loss(v, cell=cell, m=m):
            rate = v @ h[:, m] + 1e-12
            gamma = imputer.shape * (v / mode[cell] - np.log(v))  # its negative logarithm, with the mode at ``mode``
            return (rate - x[cell, m] * np.log(rate)).sum() + gamma.sum()

        best = minimize(loss, np.ones(3), bounds=[(1e-9, None)] * 3)
        assert loss(w[cell].astype(float)) == pytest.approx(best.fun, abs=1e-2)
    assert w[4] == pytest.approx(imputer.average, rel=1e-6)  # no evidence: the average training cell


def divergence(x, rate):
    return (rate - x * np.log(np.maximum(rate, 1e-12))).sum()


def test_nmf_is_as_likely_as_scikit_learns(store):
    from sklearn.decomposition import NMF

    x = store.counts[TRAIN].toarray().astype(np.float32)
    fit = NMF(3, init="nndsvda", solver="mu", beta_loss="kullback-leibler", max_iter=500, tol=1e-6)
    peer = divergence(x, fit.fit_transform(x) @ fit.components_)
    ours = Nmf(3, 0.0, iterations=500, tol=0.0, steps=500, prior=0.0)
    ours.fit(store, TRAIN)
    found = divergence(x, ours.loadings(x, np.ones(x.shape, bool)) @ ours.programmes)
    alone = divergence(x, x.sum(1, keepdims=True) * x.sum(0) / x.sum())
    assert found - peer < 0.02 * (alone - peer)
    assert ours.programmes.sum(1) == pytest.approx(1, abs=1e-4)


def test_nmf_stops_early_and_ends_the_search_at_the_first_worse_size(store, monkeypatch):
    from distdiff.baselines import nmf

    steps, sizes, loss, step, solve = [], [], [], nmf._step, Nmf.solve
    monkeypatch.setattr(nmf, "_step", lambda *a: steps.append(1) or loss.append((a[6], step(*a))) or loss[-1][1])
    ours = Nmf(3, 0.01, iterations=1000)
    ours.fit(store, TRAIN)
    assert 30 < len(steps) < 500
    seen = [value for look, value in loss if look]
    assert seen == sorted(seen, reverse=True)
    monkeypatch.setattr(Nmf, "solve", lambda self, x, size: sizes.append(size) or solve(self, x, size))
    monkeypatch.setattr(nmf._tuning, "deviance", lambda *a: {5: 2.0, 10: 1.0, 20: 1.5}[sizes[-1]])
    ours = Nmf((5, 10, 20, 40), 0.01)
    ours.fit(store, TRAIN)
    assert sizes == [5, 10, 20, 10]
    assert ours.n_trials() == 4


@pytest.mark.parametrize("kind", ["magic", "nmf"])
def test_memory_is_bounded(kind, store, monkeypatch):
    read = []
    monkeypatch.setattr(Store, "read", lambda self, rows: read.append(len(rows)) or self.counts[rows])
    options = {"n_pca": 3} if kind == "magic" else {"components": 3}
    component.build(Baseline, {"kind": kind, "max_cells": 50, **options}).fit(store, TRAIN)
    assert read == [320, 50]


def test_options_out_of_range_are_named():
    for options, said in (
        ({"knn": 0}, "knn=0"),
        ({"t": ()}, r"t=\(\)"),
        ({"n_pca": (5, 0)}, "n_pca"),
        ({"smear": ()}, "smear"),
        ({"floor": -1.0}, "floor=-1"),
        ({"decay": 0.0}, "decay=0"),
        ({"hide": 1.0}, "hide=1"),
    ):
        with pytest.raises(ValueError, match=said):
            Magic(**options)
    for options, said in (
        ({"components": 0}, "components=0"),
        ({"floor": ()}, r"floor=\(\)"),
        ({"steps": 0}, "steps=0"),
        ({"tol": 1.0}, "tol=1"),
        ({"hide": 0.0}, "hide=0"),
    ):
        with pytest.raises(ValueError, match=said):
            Nmf(**options)


@pytest.mark.skipif(importlib.util.find_spec("scvi") is not None, reason="scvi-tools is installed")
def test_scvi_says_what_to_install(store):
    with pytest.raises(ImportError, match=r"pip install 'distdiff\[baselines\]'"):
        component.build(Baseline, {"kind": "scvi"}).fit(store, TRAIN)
    with pytest.raises(ValueError, match="latent=0"):
        component.build(Baseline, {"kind": "scvi", "latent": 0})
