from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from distdiff import component
from distdiff.baselines import Baseline, depth
from distdiff.baselines.gene_mean import GeneMean
from distdiff.baselines.knn import Knn
from distdiff.baselines.pca import Pca
from distdiff.baselines.ridge import Ridge
from distdiff.baselines.type_mean import TypeMean
from distdiff.types import Cells, Condition

ALL = [
    {"kind": "constant", "value": 2.0},
    {"kind": "gene_mean"},
    {"kind": "gene_mean", "depth": True},
    {"kind": "knn", "k": (3, 10)},
    {"kind": "knn", "k": 5, "prior": 0.1, "scale": 1.0},
    {"kind": "pca", "components": (2, 5)},
    {"kind": "ridge", "alpha": (1.0, 10.0), "scale": (1.0,)},
    {"kind": "type_mean"},
    {"kind": "type_mean", "depth": True},
    {"kind": "zero"},
]


class Store:
    """A store in memory."""

    def __init__(self, counts, codes, names=("B", "T", "never")):
        self.counts, self.codes = sp.csr_matrix(counts.astype(np.int32)), np.asarray(codes, dtype=np.int64)
        self.genes = tuple(f"g{i}" for i in range(counts.shape[1]))
        self.manifest = SimpleNamespace(labels={"cell_type": names})

    def read(self, rows):
        return self.counts[rows]

    def labels(self, rows, keys):
        return dict.fromkeys(keys, self.codes[rows])

    def cells(self, rows, keys=("cell_type",)):
        labels = {k: torch.from_numpy(v) for k, v in self.labels(rows, keys).items()}
        counts = torch.from_numpy(self.counts[rows].toarray().astype(np.float32))
        return Cells(counts, Condition(labels), torch.from_numpy(np.asarray(rows)))


@pytest.fixture(scope="module")
def store():
    """150 cells x 25 genes of two types; gene 0 is never seen, gene 1 never varies in training, some without label."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 150)
    profile = rng.gamma(0.7, 3.0, (2, 25))
    counts = rng.poisson(profile[kind] * rng.lognormal(0, 0.4, (150, 1)))
    counts[:, 0], counts[:, 1] = 0, 1
    return Store(counts, np.where(rng.random(150) < 0.1, -1, kind))


TRAIN, TEST = np.arange(120), np.arange(120, 150)


@pytest.fixture(scope="module")
def batch(store):
    cells = store.cells(TEST)
    observed = torch.from_numpy(np.random.default_rng(1).random((30, 25)) < 0.5)
    observed[4] = False  # no evidence at all
    observed[5] = True  # nothing to do
    return cells, observed


@pytest.fixture(scope="module", params=ALL, ids=lambda o: "-".join(str(v) for v in o.values()))
def fitted(request, store):
    baseline = component.build(Baseline, request.param)
    baseline.fit(store, TRAIN)
    return baseline


def test_every_file_is_found():
    files = {path.stem for path in Path(inspect.getfile(Baseline)).parent.glob("[!_]*.py")}
    assert set(component.kinds(Baseline)) == files
    with pytest.raises(ValueError, match="did you mean 'ridge'"):
        component.build(Baseline, {"kind": "rigde"})


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
    assert answer.draws.shape == (4, *cells.counts.shape)
    assert torch.equal(answer.mean[observed], cells.counts[observed])
    assert torch.equal(answer.draws[:, observed], cells.counts[observed].expand(4, -1))
    assert torch.isfinite(answer.mean).all()
    assert (answer.mean >= 0).all()
    assert torch.equal(answer.draws, answer.draws.round())
    assert (answer.draws >= 0).all()
    assert torch.equal(cells.counts, given)
    assert fitted.impute(cells, observed).draws is None


def test_draws_have_an_address_and_the_right_mean(fitted, batch):
    cells, observed = batch
    many = fitted.impute(cells, observed, draws=400, seed=1)
    assert torch.equal(many.draws[:2], fitted.impute(cells, observed, draws=2, seed=1).draws)
    hidden = ~observed
    if many.mean[hidden].sum() > 0:
        assert not torch.equal(many.draws[:2], fitted.impute(cells, observed, draws=2, seed=2).draws)
    gap = (many.draws.mean(0) - many.mean)[hidden]
    assert (gap.abs() < 6 * (many.mean[hidden] / 400).sqrt() + 1e-6).all()


def test_odd_batches(fitted, batch):
    cells, observed = batch
    assert fitted.impute(cells[:0], observed[:0], draws=2).draws.shape == (2, 0, 25)
    empty = Cells(torch.zeros_like(cells.counts), cells.labels, cells.rows)
    assert torch.isfinite(fitted.impute(empty, observed).mean).all()
    with pytest.raises(ValueError, match=r"must both be \[cells, 25\]"):
        fitted.impute(Cells(cells.counts[:, :9], cells.labels, cells.rows), observed[:, :9])
    with pytest.raises(ValueError, match="call fit"):
        type(fitted)().impute(cells, observed)


@pytest.mark.parametrize("options", ALL, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_handful_of_training_cells_is_enough(options, n, store, batch):
    baseline = component.build(Baseline, options)
    baseline.fit(store, TRAIN[:n])
    answer = baseline.impute(*batch, draws=1)
    assert torch.isfinite(answer.mean).all()
    with pytest.raises(ValueError, match="no training cells"):
        component.build(Baseline, options).fit(store, TRAIN[:0])


def test_perfect_is_the_truth_and_says_so(store, batch):
    cells, observed = batch
    perfect = component.build(Baseline, {"kind": "perfect"})
    perfect.fit(store, TRAIN)
    answer = perfect.impute(cells, observed, draws=2)
    assert torch.equal(answer.mean, cells.counts)
    assert torch.equal(answer.draws, cells.counts.expand(2, -1, -1))
    assert perfect.sees_hidden
    assert perfect.peeks
    assert perfect.control


def test_gene_mean_and_depth_are_known_answers(store, batch):
    cells, observed = batch
    x, seen = cells.counts.numpy(), observed.numpy()
    mean = store.counts[TRAIN].toarray().mean(0)
    plain, scaled = GeneMean(), GeneMean(depth=True)
    for imputer in (plain, scaled):
        imputer.fit(store, TRAIN)
    assert plain.impute(cells, observed).mean.numpy()[~seen] == pytest.approx(np.tile(mean, (30, 1))[~seen], rel=1e-6)
    got = scaled.impute(cells, observed).mean.numpy()
    s = x[0][seen[0]].sum() / mean[seen[0]].sum()
    assert got[0][~seen[0]] == pytest.approx(s * mean[~seen[0]], rel=1e-5)
    assert got[4] == pytest.approx(mean, rel=1e-6)  # no evidence: an average cell


def test_depth_without_molecules_or_without_expectation():
    counts = np.zeros((3, 2), dtype=np.float32)
    observed = np.array([[True, True], [False, True], [False, False]])
    assert depth(counts, observed, np.array([2.0, 0.0])).ravel().tolist() == [0.25, 1.0, 1.0]


def test_type_mean_falls_back_to_the_gene_mean(store, batch):
    cells, observed = batch
    counts, codes = store.counts[TRAIN].toarray(), store.codes[TRAIN]
    labels = Condition({"cell_type": torch.tensor([0, 1, 2, -1, 99] + [0] * 25)})
    imputer = TypeMean()
    imputer.fit(store, TRAIN)
    got = imputer.impute(Cells(cells.counts, labels, cells.rows), torch.zeros_like(observed)).mean.numpy()
    assert imputer.peeks
    assert got[0] == pytest.approx(counts[codes == 0].mean(0), rel=1e-6)
    assert got[1] == pytest.approx(counts[codes == 1].mean(0), rel=1e-6)
    for unknown in (2, 3, 4):  # missing in training, without a label, a code out of range
        assert got[unknown] == pytest.approx(counts.mean(0), rel=1e-6)
    with pytest.raises(ValueError, match="the store has no label 'colour'; it has: cell_type"):
        TypeMean("colour").fit(store, TRAIN)
    with pytest.raises(ValueError, match="the batch has no label 'cell_type'"):
        imputer.impute(Cells(cells.counts, Condition(), cells.rows), observed)


def test_knn_finds_the_neighbours_of_a_loop(store, batch, monkeypatch):
    cells, observed = batch
    imputer = Knn(k=7, prior=0.5, scale=1.0)
    imputer.fit(store, TRAIN)
    seen, train = observed.numpy(), store.counts[TRAIN].toarray().astype(float)
    x = np.where(seen, cells.counts.numpy(), 0).astype(np.float32)
    t = np.log1p(train / (train.sum(1) / imputer.gene_mean.sum())[:, None])
    whole = imputer.neighbours(x, seen, 7, 1.0)
    monkeypatch.setattr("distdiff.baselines.knn.CHUNK", 16)
    pieces = imputer.neighbours(x, seen, 7, 1.0)
    rate = imputer.rate(x, seen, cells)
    for cell in (0, 1, 2, 3, 10, 20):
        m = seen[cell]
        y = np.log1p(x[cell] / (x[cell].sum() / imputer.gene_mean[m].sum()))
        distance = ((y - t)[:, m] ** 2).sum(1)
        wanted = np.sort(distance)[:7]
        assert distance[whole[cell]] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert distance[pieces[cell]] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        pool = (train[whole[cell]].sum(0) + 0.5 * imputer.gene_mean) / 7.5
        assert rate[cell][~m] == pytest.approx(pool[~m] * x[cell].sum() / pool[m].sum(), rel=1e-4)
    with pytest.raises(ValueError, match="k=0"):
        Knn(k=0)


def test_pca_is_the_ridge_regression_on_loadings(store, batch):
    _, observed = batch
    imputer = Pca(components=(4,))
    imputer.fit(store, TRAIN)
    y = np.random.default_rng(0).random((30, 25)).astype(np.float32)
    got = imputer.predict(y, observed.numpy())
    for cell in (0, 4, 7):
        m, v = observed.numpy()[cell], imputer.loadings
        a = np.concatenate([v[m], np.diag(np.sqrt(imputer.precision))])
        b = np.concatenate([(y - imputer.centre)[cell][m], np.zeros(v.shape[1])])
        z = np.linalg.lstsq(a, b, rcond=None)[0]
        assert got[cell] == pytest.approx(imputer.centre + v @ z, abs=1e-4)


def test_ridge_is_the_expectation_over_masks(store):
    from sklearn.linear_model import Ridge as Reference

    rng = np.random.default_rng(0)
    imputer = Ridge(hide=0.3)
    y = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 8)) + 0.3 * rng.normal(size=(60, 8))
    imputer.solve(y, {"alpha": 0.5, "scale": 1.0})
    assert (np.diag(imputer.coefficients) == 0).all()
    target, others = 3, [0, 1, 2, 4, 5, 6, 7]
    centred, spread = y - y.mean(0), y.var(0)
    n = 3_000
    mask = rng.random((n * 60, 8)) < 0.7
    z = np.tile(centred, (n, 1)) * mask / 0.7
    unit = np.sqrt(spread[others])
    fit = Reference(alpha=0.5 * len(z), fit_intercept=False).fit(z[:, others] / unit, np.tile(centred[:, target], n))
    assert imputer.coefficients[others, target] == pytest.approx(fit.coef_ / unit, abs=0.01)


@pytest.mark.parametrize("kind", ["pca", "ridge", "knn"])
def test_regressions_beat_the_mean_and_are_calibrated(kind, store):
    rng = np.random.default_rng(3)
    factor = rng.gamma(1.0, 1.0, (400, 3))
    counts = rng.poisson(factor @ rng.gamma(0.8, 2.0, (3, 40)))
    made = Store(counts, np.zeros(400))
    observed = torch.from_numpy(rng.random((80, 40)) < 0.5)
    hidden = ~observed.numpy()
    score = {}
    for name in (kind, "gene_mean"):
        imputer = component.build(Baseline, {"kind": name} | ({"depth": True} if name == "gene_mean" else {}))
        imputer.fit(made, np.arange(320))
        mean = imputer.impute(made.cells(np.arange(320, 400)), observed).mean.numpy()
        truth = counts[320:]
        m, x = np.maximum(mean[hidden], 1e-6), truth[hidden]
        score[name] = np.mean(2 * (np.where(x > 0, x * np.log(np.maximum(x, 1) / m), 0) - x + m))
        assert m.sum() == pytest.approx(x.sum(), rel=0.1)
    assert score[kind] < 0.7 * score["gene_mean"]


def test_tuning_uses_at_most_max_cells(store, monkeypatch):
    read = []
    monkeypatch.setattr(Store, "read", lambda self, rows: read.append(len(rows)) or self.counts[rows])
    Pca(components=(2,), max_cells=50).fit(store, TRAIN)
    assert read == [120, 50]
    with pytest.raises(ValueError, match="hide=1"):
        Pca(hide=1.0)
