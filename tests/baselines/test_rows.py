"""What holds for every row of the benchmark; a new file in distdiff/baselines/ is picked up, with small budgets."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from distdiff import component, metrics
from distdiff.baselines import Baseline, _tuning, depth
from distdiff.baselines._deep import Deep, nb_nll, zinb_nll
from distdiff.baselines._fitted import Fitted, combinations
from distdiff.baselines.alra import Alra, spacing_rank
from distdiff.baselines.countsdiff import CountsDiff
from distdiff.baselines.dca import Dca
from distdiff.baselines.gene_mean import GeneMean
from distdiff.baselines.saver import Saver
from distdiff.baselines.scimpute import ScImpute
from distdiff.baselines.spage import Spage
from distdiff.baselines.with_nb import WithNb
from distdiff.baselines.zero import Zero
from distdiff.evaluation import _fill
from distdiff.types import Cells, Condition
from tests.baselines.test_baselines import Store

SMALL = {"steps": 30, "lr": 0.01, "width": 12, "depth": 1, "heads": 2, "walk": 4, "samples": 2, "k": 6, "latent": 4,
         "mixtures": 2, "generated": 100, "clusters": 2, "bins": 8, "levels": 2, "copies": 1, "trials": 1, "batch": 16,
         "updates": 20, "rounds": 2}  # fmt: skip
"""Budgets of these tests, for the rows that have the option."""

MORE = {"scidpms": {"steps": 200, "walk": 20, "samples": 4}}
"""Predicted noise has to be learned before it says anything of the data."""

OTHERS = [
    {"kind": "hivae", "law": "gaussian"}, {"kind": "mdlm", "remask": 0.02},
    {"kind": "scidpms", "attention": "lsh"}, {"kind": "forest", "bins": 256},
    {"kind": "countsdiff", "rounding": "random", "attrition": 0.02, "key": "cell_type"},
    {"kind": "with_nb", "of": {"kind": "gene_mean", "depth": True}},
    {"kind": "with_nb", "of": {"kind": "spage", "k": 6, "components": 5}},
]  # fmt: skip
NEEDS = {"forest": "ForestDiffusion", "harmony": "harmonypy"}
TRAIN, TEST = np.arange(200), np.arange(200, 230)


def small(options):
    """The options with small budgets."""
    cls = component.resolve(Baseline, options["kind"])
    budget = SMALL | MORE.get(options["kind"], {})
    own = {k: v for k, v in budget.items() if k in inspect.signature(cls).parameters}
    return {**(own if issubclass(cls, Fitted) else {}), **options}


NEEDED = {
    kind: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason="its package is not installed")
    for kind, name in NEEDS.items()
}

ROWS = [
    pytest.param(
        small(options), id="-".join(str(v) for v in options.values()),
        marks=[
            *([NEEDED[options["kind"]]] if options["kind"] in NEEDS else []),
            *([pytest.mark.long] if options.get("attention") == "lsh" or options["kind"] == "forest" else []),
        ],
    )
    for options in [
        *({"kind": kind} for kind in component.kinds(Baseline)
          if issubclass(component.resolve(Baseline, kind), Fitted)),
        *OTHERS,
    ]
]  # fmt: skip


@pytest.fixture(scope="module")
def store():
    """230 cells x 24 genes, two programmes and two labels; gene 0 is never seen."""
    rng = np.random.default_rng(3)
    kind = rng.integers(0, 2, 230)
    rate = rng.gamma(0.8, 3.0, (2, 24))[kind] * rng.lognormal(0, 0.4, (230, 1))
    rate[:, 0] = 0
    return Store(rng.poisson(rate), kind, names=("B", "T"))


@pytest.fixture(scope="module")
def batch(store):
    observed = torch.from_numpy(np.random.default_rng(1).random((30, 24)) < 0.5)
    observed[4], observed[5] = False, True  # no evidence at all; nothing to do
    return store.cells(TEST), observed


def asked(row, batch):
    """The batch, where a row completes whole genes with the same genes hidden in all cells."""
    cells, observed = batch
    return cells, observed[6].expand_as(observed).contiguous() if row.whole else observed


@pytest.fixture(scope="module", params=ROWS)
def fitted(request, store):
    row = component.build(Baseline, request.param)
    row.fit(store, TRAIN)
    return row, request.param


def test_every_file_is_a_row_with_a_label():
    kinds = component.kinds(Baseline)
    assert len(kinds) >= 31
    labels = [component.build(Baseline, {"kind": kind}).label for kind in kinds]
    assert all(labels)
    assert len(set(labels)) == len(labels)


def test_a_row_beats_no_imputation_and_answers_in_counts(fitted, store, batch):
    row, _ = fitted
    cells, observed = asked(row, batch)
    zero = Zero()
    zero.fit(store, TRAIN)
    answer, nothing = row.impute(cells, observed, draws=2, seed=1), zero.impute(cells, observed)
    truth, hidden = cells.counts.numpy(), ~observed.numpy()
    for score in (metrics.poisson_deviance, metrics.squared_error):
        got, bar = (score(truth, hidden, a.mean.numpy()).sum() for a in (answer, nothing))
        assert got < 0.9 * bar
    assert answer.mean.dtype == answer.draws.dtype == torch.float32
    assert answer.draws.shape == (2, *cells.counts.shape)
    assert torch.equal(answer.mean[observed], cells.counts[observed])
    assert torch.equal(answer.draws[:, observed], cells.counts[observed].expand(2, -1))
    assert torch.isfinite(answer.mean).all()
    assert answer.mean.min() >= 0
    assert answer.draws.min() >= 0
    assert torch.equal(answer.draws, answer.draws.round())


def test_hidden_counts_are_never_looked_at(fitted, batch):
    row, _ = fitted
    cells, observed = asked(row, batch)
    clean = row.impute(cells, observed, draws=2, seed=1)
    for poison in (torch.nan, 1e9, -7.0):
        poisoned = Cells(torch.where(observed, cells.counts, poison), cells.labels, cells.rows)
        again = row.impute(poisoned, observed, draws=2, seed=1)
        assert torch.equal(clean.mean, again.mean)
        assert torch.equal(clean.draws, again.draws)


def test_denoising_follows_the_depth(fitted, store):
    row, _ = fitted
    counts = store.counts[TEST]
    if not row.denoises:
        with pytest.raises(ValueError, match="does not follow the depth"):
            row.denoise(counts, 0.5)
        return
    rate = row.denoise(counts, 0.5)
    assert np.isfinite(rate).all()
    assert rate.min() >= 0
    assert rate.sum() == pytest.approx(2 * counts.sum(), rel=0.35)
    assert row.denoise(counts, 1.0) == pytest.approx(0.5 * rate, rel=1e-4)


def test_the_same_seed_gives_the_same_answers(fitted, store, batch):
    row, options = fitted
    state = torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    again = component.build(Baseline, options)
    again.fit(store, TRAIN)
    batch = asked(row, batch)
    assert torch.equal(row.impute(*batch, draws=1, seed=2).draws, again.impute(*batch, draws=1, seed=2).draws)
    assert torch.equal(torch.random.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_odd_batches_and_bad_input(fitted, batch):
    row, options = fitted
    cells, observed = asked(row, batch)
    assert row.impute(cells[:0], observed[:0], draws=2).draws.shape == (2, 0, 24)
    empty = Cells(torch.zeros_like(cells.counts), cells.labels, cells.rows)
    assert torch.isfinite(row.impute(empty, observed).mean).all()
    with pytest.raises(ValueError, match=r"must both be \[cells, 24\]"):
        row.impute(Cells(cells.counts[:, :9], cells.labels, cells.rows), observed[:, :9])
    with pytest.raises(ValueError, match="call fit"):
        component.build(Baseline, options).impute(cells, observed)
    with pytest.raises(ValueError, match="no training cells"):
        component.build(Baseline, options).fit(None, TRAIN[:0])


@pytest.mark.parametrize("options", ROWS)
@pytest.mark.parametrize("n", [1])
def test_a_handful_of_training_cells_is_enough(options, n, store, batch):
    row = component.build(Baseline, {**options, **({"steps": 2} if "steps" in options else {})})
    row.fit(store, TRAIN[:n])
    assert torch.isfinite(row.impute(*asked(row, batch)).mean).all()


@pytest.mark.parametrize("kind", ["spage", pytest.param("harmony", marks=NEEDED["harmony"])])
def test_rows_for_whole_genes(kind, store, batch):
    row = component.build(Baseline, {"kind": kind, "k": 6, "components": 5, "hide": 0.1})
    row.fit(store, TRAIN)
    cells, observed = batch
    with pytest.raises(ValueError, match="these 30 cells lack 30 different sets of genes; take knn"):
        row.impute(cells, observed)
    cells, observed = asked(row, batch)
    for n in (1, 2, 30):  # a query of one cell has no components of its own
        assert torch.isfinite(row.impute(cells[:n], observed[:n]).mean).all()
    nothing = row.impute(cells, torch.zeros_like(observed)).mean.numpy()
    assert (nothing > 0)[:, 1:].all()
    mean = GeneMean(depth=True)
    mean.fit(store, TRAIN)
    truth, hidden = cells.counts.numpy(), ~observed.numpy()
    scores = [
        metrics.poisson_deviance(truth, hidden, r.impute(cells, observed).mean.numpy()).sum() for r in (row, mean)
    ]
    assert scores[0] < 0.7 * scores[1]


@pytest.mark.parametrize("kind", ["spage", pytest.param("harmony", marks=NEEDED["harmony"])])
def test_a_query_of_another_protocol_is_matched(kind):
    rng = np.random.default_rng(0)
    of = rng.integers(0, 4, 700)
    rate = rng.gamma(0.8, 3.0, (4, 60))[of] * rng.lognormal(0, 0.3, (700, 1))
    rate[500:, :40] *= rng.lognormal(0, 1.0, 40)  # of the query, and of shared genes alone
    made = Store(rng.poisson(rate), of)
    cells, observed = made.cells(np.arange(500, 700)), (torch.arange(60) < 40).expand(200, 60).contiguous()
    scores = []
    for options in ({"kind": kind, "components": 10, "hide": 0.1}, {"kind": "knn", "hide": 0.1}):
        row = component.build(Baseline, options)
        row.fit(made, np.arange(500))
        mean = row.impute(cells, observed).mean.numpy()
        scores.append(metrics.poisson_deviance(cells.counts.numpy(), ~observed.numpy(), mean).sum())
    assert scores[0] < 0.97 * scores[1]


def test_a_query_comes_whole_to_a_row_that_wants_it(store, batch):
    cells, observed = batch
    sizes = []

    class Counted(GeneMean):
        def rate(self, counts, observed, cells):
            sizes.append(len(cells))
            return super().rate(counts, observed, cells)

    for whole in (True, False):
        row = Counted()
        row.whole = whole
        row.fit(store, TRAIN)
        _fill(row, cells, observed.numpy(), 0, 0, 20)
    assert sizes == [30, 20, 10]


def test_only_vectors_that_both_sets_share_are_kept():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(260, 1)) * 4
    train, query = rng.normal(size=(200, 8)) * 0.3, rng.normal(size=(60, 8)) * 0.3
    train[:, :3] += shared[:200]
    query[:, :3] += shared[200:]
    train[:, 3:5] += 9 * rng.normal(size=(200, 1))  # of the training cells alone
    row = Spage(components=2, k=5, cosine=0.6)
    row.option = {"components": 2, "k": 5, "cosine": 0.6}
    at, weights = row.matches(train.astype(np.float32), query.astype(np.float32))
    assert weights.sum(1) == pytest.approx(np.ones(60))
    same = np.sign(shared[at[:, 0], 0]) == np.sign(shared[200:, 0])
    assert same.mean() > 0.9


def test_cells_without_any_count_are_no_obstacle(batch):
    nothing = Store(np.zeros((12, 24), int), np.arange(12) % 2, names=("B", "T"))
    for kind in ("alra", "dca", "knn_smoothing", "saver", "scimpute"):
        row = component.build(
            Baseline, small({"kind": kind, "steps": 2} if kind in ("dca", "saver") else {"kind": kind})
        )
        row.fit(nothing, np.arange(12))
        assert torch.isfinite(row.impute(*batch).mean).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{"kind": "dca"}, {"kind": "gain"}, {"kind": "hivae"}, {"kind": "saver", "penalty": 1e-4}, {"kind": "gnnimpute"},
     {"kind": "scdd"}, {"kind": "scgcc"}, {"kind": "scgpt", "width": 32, "depth": 1, "patience": 20},
     {"kind": "xtrimogene", "width": 32, "depth": 1, "patience": 20}],
    ids=lambda options: options["kind"],
)  # fmt: skip
def test_a_network_learns_more_than_the_mean(options):
    rng = np.random.default_rng(3)
    rate = rng.gamma(1.0, 1.0, (400, 3)) @ rng.gamma(0.8, 2.0, (3, 40))
    made = Store(rng.poisson(rate), np.zeros(400, int))
    observed = torch.from_numpy(rng.random((80, 40)) < 0.5)
    cells, scores = made.cells(np.arange(320, 400)), []
    for row in (component.build(Baseline, {"steps": 1000, "lr": 2e-3, "trials": 1, **options}), GeneMean(depth=True)):
        row.fit(made, np.arange(320))
        mean = row.impute(cells, observed).mean.numpy()
        scores.append(metrics.poisson_deviance(cells.counts.numpy(), ~observed.numpy(), mean).sum())
    assert scores[0] < 0.85 * scores[1]


def test_at_most_so_many_fits_are_tried(store):
    tried = []

    class Counted(Alra):
        def solve(self, kept, held, option):
            tried.append((len(kept), option["rank"]))
            super().solve(kept, held, option)

    Counted(rank=(3, 1, 2, 4, 5), trials=3).fit(store, TRAIN)
    assert len(tried) == 4  # three trials on four fifths, and the best on all
    assert tried[0] == (160, 3)
    assert [n for n, _ in tried] == [160, 160, 160, 200]
    every = combinations({"a": (1, 2), "b": (3, 4)}, 99, 0)
    assert len(every) == 4
    assert every[0] == {"a": 1, "b": 3}


def test_training_stops_early_and_keeps_the_best_weights(store, monkeypatch):
    scores = iter([3.0, 1.0, *([2.0] * 98)])
    seen = []
    monkeypatch.setattr(
        Dca, "validate", lambda self, held: seen.append(self.network[1].weight.detach().clone()) or next(scores)
    )
    row = Dca(width=8, steps=60, trials=1, patience=4)
    row.fit(store, TRAIN)
    assert len(seen) == 6
    assert row.spent == 18  # a validation every 3 steps
    assert torch.equal(row.network[1].weight, seen[1])
    assert row.capacity == sum(w.numel() for w in row.network.parameters())


def test_training_ends_with_its_minutes(store):
    row = Dca(width=8, steps=100_000, trials=2, lr=(1e-3, 1e-2), patience=100_000, minutes=0.02)
    began = time.process_time()
    row.fit(store, TRAIN)
    assert 0 < row.spent < 100_000
    assert row.fits() == 3  # two values of lr, and the better one again
    assert time.process_time() - began < 0.02 * 60 + 10
    with pytest.raises(ValueError, match="minutes=-1 must be"):
        Dca(minutes=-1)


def test_a_row_that_diverges_says_so(store, monkeypatch):
    monkeypatch.setattr(Dca, "losses", lambda self, network, cells, m: iter([network[1].weight.sum() * torch.nan]))
    with pytest.raises(ValueError, match=r"DCA: the loss is nan after 1 steps; take a smaller lr"):
        Dca(width=8, steps=20, trials=1).fit(store, TRAIN)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda x: x * np.nan, "numbers that are not finite"), (lambda x: x[:, :3], r"shape \(30, 3\)")],
)
def test_a_row_that_answers_nonsense_is_named(answer, message, store, batch):
    class Broken(Baseline):
        label = "broken"

        def rate(self, counts, observed, cells):
            return answer(counts + 1)

    row = Broken()
    row.fit(store, TRAIN)
    with pytest.raises(ValueError, match=f"broken answered with .*{message}"):
        row.impute(*batch)


def test_missing_labels_are_named(store, batch):
    with pytest.raises(ValueError, match="CountsDiff as published: the store has no label 'colour'; it has: cell_type"):
        CountsDiff(key="colour").fit(store, TRAIN)
    row = CountsDiff(**{k: v for k, v in small({"kind": "countsdiff"}).items() if k != "kind"}, key="cell_type")
    assert row.peeks
    assert row.key == "cell_type"
    assert not CountsDiff().peeks
    row.fit(store, TRAIN)
    cells = batch[0]
    with pytest.raises(ValueError, match="the batch has no label 'cell_type'; it has: none"):
        row.impute(Cells(cells.counts, type(cells.labels)(), cells.rows), batch[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "dca", "width": ()}, "width is empty"), ({"kind": "dca", "trials": 0}, "trials=0"),
     ({"kind": "gain", "steps": 0}, "steps=0"), ({"kind": "alra", "hide": 1.0}, "hide=1"),
     ({"kind": "hivae", "law": "normal"}, "law='normal'"),
     ({"kind": "scidpms", "attention": "ful"}, "did you mean 'full'"),
     ({"kind": "countsdiff", "rounding": "up"}, "rounding='up'"), ({"kind": "mdlm", "samples": 0}, "samples=0"),
     ({"kind": "forest", "trees": 0}, "trees=0"), ({"kind": "forest", "bins": 1}, "bins=1 must be 2"),
     ({"kind": "harmony", "k": 0}, "k=0"), ({"kind": "spage", "cosine": 1.0}, "cosine=1.0"),
     ({"kind": "with_nb", "hide": 0.0}, "hide=0"),
     ({"kind": "with_nb", "of": {"kind": "ridg"}}, "did you mean 'ridge'")],
)  # fmt: skip
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        component.build(Baseline, options)


@pytest.mark.parametrize("kind", ["forest", "harmony"])
def test_absent_libraries_are_named(kind, store, monkeypatch):
    monkeypatch.setitem(sys.modules, NEEDS[kind], None)
    wanted = {
        "forest": "pip install ForestDiffusion xgboost catboost lightgbm",
        "harmony": "pip install 'harmonypy>=2'",
    }
    with pytest.raises(ImportError, match=wanted[kind]):
        component.build(Baseline, {"kind": kind}).fit(store, TRAIN)


def test_nb_is_a_law_around_the_mean_with_the_right_size():
    rng = np.random.default_rng(0)
    size = np.array([0.5, 2.0, 8.0, 1e4])
    counts = rng.poisson(20.0 * rng.gamma(size, 1 / size, (20_000, 4)))
    made = Store(counts, np.zeros(20_000, int))
    row, plain = WithNb({"kind": "gene_mean"}), GeneMean()
    for one in (row, plain):
        one.fit(made, np.arange(19_500))
    assert row.sizes[:3] == pytest.approx(size[:3], rel=0.25)
    assert row.sizes[3] > 100
    cells, observed = made.cells(np.arange(19_500, 20_000)), torch.zeros(500, 4, dtype=torch.bool)
    answer = row.impute(cells, observed, draws=20)
    assert torch.equal(answer.mean, plain.impute(cells, observed).mean)
    spread = answer.draws.flatten(0, 1).var(0).numpy()
    assert spread == pytest.approx(20 + 400 / size, rel=0.25)
    assert row.label == "gene mean + NB"


def test_sizes_of_genes_without_molecules_are_those_of_the_average_gene():
    rng = np.random.default_rng(0)
    counts = rng.poisson(5.0 * rng.gamma(2.0, 0.5, (3000, 5))).astype(float)
    counts[:, 2] = 0
    mean = np.tile(np.where(np.arange(5) == 2, 0.0, 5.0), (3000, 1))
    found = _tuning.sizes(counts, np.ones(counts.shape, bool), mean)
    assert found == pytest.approx(2.0, rel=0.2)
    assert np.isfinite(_tuning.sizes(counts[:1] * 0, np.ones((1, 5), bool), mean[:1] * 0)).all()


def test_likelihoods_are_those_of_scipy():
    import scipy.stats

    x = torch.arange(12.0)[:, None]
    mean, log_size, logit = torch.tensor([[3.0, 0.4]]), torch.tensor([[0.5, -1.0]]), torch.tensor([[-1.0, 2.0]])
    r = log_size.exp().numpy()
    pmf = scipy.stats.nbinom.pmf(x.numpy(), r, r / (r + mean.numpy()))
    assert nb_nll(x, mean, log_size).numpy() == pytest.approx(-np.log(pmf), rel=1e-4)
    pi = torch.sigmoid(logit).numpy()
    want = -np.log(pi * (x.numpy() == 0) + (1 - pi) * pmf)
    assert zinb_nll(x, mean, log_size, logit).numpy() == pytest.approx(want, rel=1e-4)


def test_scimpute_combines_similar_cells_as_nnls_does(store):
    from scipy.optimize import nnls

    row = ScImpute(k=4, updates=4000, trust=1.1, trials=1)
    rng = np.random.default_rng(0)
    similar, weights = rng.random((3, 4, 30)).astype(np.float32), np.array([[0.2, 0.8, 0, 0.1]] * 3)
    values = np.einsum("bk,bkg->bg", weights, similar).astype(np.float32)
    trusted = rng.random((3, 30)) < 0.6
    got = row._combine(similar, np.where(trusted, values, 9.0).astype(np.float32), trusted)
    for cell in range(3):
        w, _ = nnls(similar[cell][:, trusted[cell]].T, values[cell][trusted[cell]])
        assert got[cell] == pytest.approx(w @ similar[cell], abs=0.01)


def test_scimpute_fills_nothing_above_the_largest_training_value(store):
    row = ScImpute(k=4, trust=0.5, trials=1)
    row.fit(store, TRAIN)
    rare = 1 + row.gene_mean[1:20].argmin()
    counts, observed = np.zeros((1, 24), np.float32), np.arange(24)[None] < 20
    counts[0, rare] = 500  # a cell of one rare gene: weights that reach its value sum to more than 1
    cells = Cells(torch.from_numpy(counts), Condition(), torch.zeros(1, dtype=torch.int64))
    answer = row.predict(counts, observed, cells)
    largest = depth(counts, observed, row.gene_mean) * (10.0 ** row.values.max(0) - 1.01) / 10
    assert answer.max() > 0
    assert (answer <= largest * (1 + 1e-4)).all()


def test_alra_keeps_zeros_and_finds_the_rank():
    rng = np.random.default_rng(0)
    values = np.concatenate([[90.0, 60.0, 40.0], 10 + np.sort(rng.random(60))[::-1]])
    assert spacing_rank(values) == 3
    kind = rng.integers(0, 2, 400)
    rate = np.array([[9.0, 9, 9, 9, 0, 0, 3, 3], [0, 0, 9, 9, 9, 9, 3, 3]])[kind]
    made = Store(rng.poisson(rate), kind)
    row = Alra(rank=2)
    row.fit(made, np.arange(350))
    cells = made.cells(np.arange(350, 400))
    observed = torch.from_numpy(rng.random((50, 8)) < 0.7)
    low = row.predict(np.where(observed, cells.counts, 0).astype(np.float32), observed.numpy(), cells)
    never = (rate[350:] == 0) & ~observed.numpy()
    assert (low[never] == 0).mean() > 0.7
    assert (low[(rate[350:] == 9) & ~observed.numpy()] > 4).mean() > 0.9


def test_saver_is_its_posterior_where_observed(store):
    row = Saver(penalty=1e-3, steps=40, trials=1)
    row.fit(store, TRAIN)
    cells = store.cells(TEST)
    x, seen = cells.counts.numpy(), np.ones((30, 24), bool)
    rate = row.predict(x, seen, cells)
    mu = row.expected(row.network.eval(), cells, torch.ones(30, 24)).detach().numpy()
    want = (x + row.sizes) / (1 + row.sizes / np.maximum(mu, 1e-8))
    assert rate == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert (np.diag((row.network.weight * row.network.off).detach().numpy()) == 0).all()


def test_a_row_of_a_deep_kind_is_told_how_much_it_may_spend():
    for kind in component.kinds(Baseline):
        cls = component.resolve(Baseline, kind)
        if issubclass(cls, Deep):
            assert {"steps", "batch", "patience", "trials"} <= set(inspect.signature(cls).parameters), kind


def test_sparse_stores_are_read_once(store, monkeypatch):
    read = []
    monkeypatch.setattr(Store, "read", lambda self, rows: read.append(len(rows)) or sp.csr_matrix(self.counts[rows]))
    Alra(rank=2, max_cells=50).fit(store, TRAIN)
    assert read == [200, 50]
