"""The blend of the network with a PCA regression and a Poisson factorisation (docs/MATHS.md 5.10)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

import distdiff
from distdiff import metrics, saved
from distdiff.baselines import _blend as blending
from distdiff.baselines import depth
from distdiff.baselines._blend import WEIGHTS, choose, fit_blend, fit_knots
from distdiff.baselines.nmf import Nmf
from distdiff.imputers import blend as module
from distdiff.imputers.blend import KNOTS, Blend, Factorisation, low_rank, right_on_average
from distdiff.model import Model
from distdiff.types import Cells, Condition, DataSpec
from tests.test_api import QUICK
from tests.test_saved import resaved

GENES, CELLS = 40, 900
OPTIONS = ({"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})


class Store:
    """Cells in memory: 600 of training, 150 of validation, 150 of test."""

    def __init__(self, counts):
        self.counts, self.genes = sp.csr_matrix(counts), tuple(f"g{i}" for i in range(counts.shape[1]))
        self.manifest = SimpleNamespace(labels={})

    def rows(self, split):
        return np.arange(*{"train": (0, 600), "val": (600, 750), "test": (750, CELLS)}[split])

    def read(self, rows):
        return self.counts[rows]

    def cells(self, rows, labels=()):
        return Cells(torch.from_numpy(self.counts[rows].toarray()), Condition(), torch.from_numpy(rows))

    def model(self):
        mean = self.counts[:600].mean(0).A1.astype(np.float32)
        return Model.new(DataSpec(self.genes, {"kind": ("a", "b")}, mean), *OPTIONS)


@pytest.fixture(scope="module")
def linear():
    """Dense counts, nearly linear in three factors on the log scale."""
    rng = np.random.default_rng(0)
    log_rate = 1.5 + 0.5 * rng.normal(size=(CELLS, 3)) @ rng.normal(size=(3, GENES))
    return Store(rng.poisson(np.exp(log_rate.clip(-3, 5))).astype(np.float32))


@pytest.fixture(scope="module")
def fitted(linear):
    model = linear.model()  # untrained: gene mean x depth
    blend, info = fit_blend(model.process, model.denoiser, linear)
    model.blend, model.info = blend, {"blend": info}
    return model


def hidden(store, seed=0):
    cells = store.cells(store.rows("test"))
    observed = torch.from_numpy(np.random.default_rng(seed).random(cells.counts.shape) < 0.5)
    return cells, observed


def deviance(model, store):
    cells, observed = hidden(store)
    mean = model.imputer().impute(cells, observed).mean
    return metrics.poisson_deviance(cells.counts.numpy(), ~observed.numpy(), mean.numpy()).sum() / int(
        (~observed).sum()
    )


def test_a_dense_nearly_linear_set_is_imputed_better(fitted, linear):
    info = fitted.info["blend"]
    assert info["weight"] == fitted.blend.weight > 0.5
    assert info["pca"] > 0.1 < info["nmf"]  # the fit of one alone leaves noise that the other's has not
    assert info["best"] <= min(info["network"], info["pca_alone"], info["nmf_alone"])
    alone = replace(fitted, blend=None)
    assert deviance(fitted, linear) < 0.7 * deviance(alone, linear)


def test_a_network_that_is_exact_stays_alone():
    """Genes without structure: the gene mean is the truth, and any component is noise."""
    rng = np.random.default_rng(1)
    store = Store(rng.poisson(rng.gamma(1.0, 2.0, GENES), (CELLS, GENES)).astype(np.float32))
    model = store.model()
    blend, info = fit_blend(model.process, model.denoiser, store)
    assert info["weight"] == 0
    assert blend is None or blend.knots[1].abs().max() < 0.2
    assert info["network"] - info["best"] <= info["error"]
    assert min(info["pca_alone"], info["nmf_alone"]) > info["network"]


def binned(rng, rate, truth):
    """As fit_blend makes them, of 400 cells x 200 entries whose rates are ``rate`` and true ones ``truth``."""
    x = torch.from_numpy(rng.poisson(truth).astype(np.float32))
    return blending._binned(x, torch.from_numpy(np.log(rate)).float(), torch.ones(x.shape, dtype=torch.bool))


def test_rates_that_are_off_by_their_size_become_right_and_others_stay():
    rng = np.random.default_rng(4)
    truth = np.exp(rng.normal(-1, 1.5, (400, 200)))
    knots, gain = fit_knots(binned(rng, np.where(truth < 0.2, truth / 1.5, truth), truth))
    assert knots.shape == (2, KNOTS)
    assert gain > 0
    change = right_on_average(torch.tensor([-9.0, -3.0, 1.0, 9.0]), knots) - torch.tensor([-9.0, -3.0, 1.0, 9.0])
    assert change[:2].tolist() == pytest.approx([np.log(1.5)] * 2, abs=0.1)
    assert change[2:].tolist() == pytest.approx([0.0] * 2, abs=0.02)
    lasting = sum(fit_knots(binned(rng, truth, truth))[0][1:].abs().sum().item() for _ in range(10)) / 10 / KNOTS
    assert lasting < 0.01  # of rates that are right, chance takes factors of a percent at most
    assert fit_knots(binned(rng, np.ones((400, 200)), truth))[0].numel() == 0  # all alike: no groups
    assert fit_knots(binned(rng, truth, np.zeros((400, 200))))[0][1].max() < -1  # nothing found where much was promised


def test_a_model_that_promises_too_little_is_put_right_and_saved_so(tmp_path, monkeypatch):
    """Where nothing is blended the factors alone are kept, and used; between groups they pass over, hence the fifth."""
    monkeypatch.setattr(blending, "choose", lambda deviance, squared: 0)
    rng = np.random.default_rng(1)
    store = Store(rng.poisson(rng.gamma(1.0, 2.0, GENES), (CELLS, GENES)).astype(np.float32))
    model = store.model()
    model.denoiser.expectation.mean[rare := model.denoiser.expectation.mean < 2] *= 0.5
    model.blend, info = fit_blend(model.process, model.denoiser, store)
    assert info["weight"] == 0
    assert info["calibrated"] > 0.001
    cells, observed = hidden(store)

    def off(model):
        mean, asked = model.imputer().impute(cells, observed).mean, ~observed & rare
        return float(cells.counts[asked].sum() / mean[asked].sum())

    assert off(model) == off(Model.load(model.save(tmp_path / "model"))) == pytest.approx(1, abs=0.2)
    assert off(replace(model, blend=None)) > 1.5


def test_hidden_entries_are_never_used(fitted, linear):
    cells, observed = hidden(linear)
    for garbage in (1e6, float("nan")):
        other = Cells(torch.where(observed, cells.counts, garbage), cells.labels, cells.rows)
        for one, two in zip(*(answers(fitted, these, observed) for these in (cells, other)), strict=True):
            assert torch.equal(one, two)


def answers(model, cells, observed):
    found = model.imputer(statistics=("sd",)).impute(cells, observed, draws=2)
    return found.mean, found.draws, found.statistics["sd"]


def test_a_cell_is_answered_alike_alone_and_in_a_batch(fitted, linear):
    cells, observed = hidden(linear)
    observed[:5] = torch.tensor([[False], [True], [False], [True], [False]])  # nothing seen, and all of it
    assert [of.NAME for of in fitted.blend.estimators] == ["PCA regression", "Poisson NMF"]
    for of in fitted.blend.estimators:
        whole = of.rate(cells.counts, observed)
        parts = [of.rate(cells.counts[i : i + 1], observed[i : i + 1]) for i in range(len(cells))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(whole).all()
        assert (whole >= 0).all()


def test_the_regression_is_the_least_squares_of_the_observed_genes(monkeypatch):
    rng, d = np.random.default_rng(2), 3
    v, mu, noise = rng.normal(size=(GENES, d)), rng.normal(size=GENES), np.array([0.5, 1.0, 2.0])
    y, observed = rng.normal(size=(6, GENES)), rng.random((6, GENES)) < [[0.5], [0.1], [0.9], [0.0], [1.0], [0.3]]
    for chunk in (4096, 7):
        monkeypatch.setattr(module, "GENES", chunk)
        found = low_rank(*(torch.from_numpy(a) for a in (y, observed, mu, v, noise))).numpy()
        for row, seen, answer in zip(y, observed, found, strict=True):
            stacked = np.r_[v[seen], np.diag(noise**0.5)], np.r_[(row - mu)[seen], np.zeros(d)]
            assert np.allclose(answer, mu + v @ np.linalg.lstsq(*stacked, rcond=None)[0])


def test_depth_is_that_of_the_baselines(linear):
    cells, observed = hidden(linear)
    observed[0], mean = False, linear.counts.mean(0).A1
    counts = torch.where(observed, cells.counts, 0.0)
    wanted = depth(counts.numpy(), observed.numpy(), mean)
    np.testing.assert_allclose(module.depth(cells.counts, observed, torch.from_numpy(mean)).numpy(), wanted, rtol=1e-5)


def test_walks_guidance_and_labels_leave_the_network_alone(fitted, linear):
    cells, observed = hidden(linear)
    alone = replace(fitted, blend=None)
    for options in ({"steps": 2}, {"guidance": 2.0}):
        one, two = (model.imputer(**options).impute(cells, observed, draws=1) for model in (fitted, alone))
        assert torch.equal(one.mean, two.mean)
        assert torch.equal(one.draws, two.draws)
    told = Cells(cells.counts, Condition({"kind": torch.arange(len(cells)) % 2 - 1}), cells.rows)  # every second cell
    one, two = (model.imputer().impute(told, observed).mean for model in (fitted, alone))
    same = (one == two).all(1)
    assert same[1::2].all()
    assert not same[::2].any()


def test_a_saved_blend_answers_the_same_and_is_part_of_the_identity(fitted, linear, tmp_path):
    loaded = Model.load(fitted.save(tmp_path / "model"))
    cells, observed = hidden(linear)
    for one, two in zip(answers(fitted, cells, observed), answers(loaded, cells, observed), strict=True):
        assert torch.equal(one, two)
    alone = replace(fitted, blend=None)
    assert loaded.fingerprint() == fitted.fingerprint() != alone.fingerprint()
    assert loaded.info["blend"] == fitted.info["blend"]
    old = Model.load(alone.save(tmp_path / "old"))
    assert old.blend is None
    assert old.fingerprint() == alone.fingerprint()


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("loadings", lambda t: t[:-1], "blend.loadings has shape"),
        ("precision", lambda t: -t, "no fit gives"),
        ("cap", lambda t: t.long(), "blend.cap has shape"),
        ("centre", lambda t: t * float("nan"), "not finite"),
        ("numbers", lambda t: t + torch.tensor([1.0, 0.0, 0.0]), "no fit gives"),
        ("smear", lambda t: None, "blend.smear is missing"),
        ("precision", lambda t: torch.ones(65), "at most 64 components"),
        ("nmf.programmes", lambda t: t[:, :0], r"blend.nmf.programmes has shape"),
        ("nmf.average", lambda t: None, "blend.nmf.average is missing"),
        ("nmf.average", lambda t: t[:0], "at most 64 components"),
        ("nmf.programmes", lambda t: -t, "no fit gives"),
        ("nmf.numbers", lambda t: t * torch.tensor([1.0, 1.0, 1e6]), "no fit gives"),
        ("nmf.numbers", lambda t: torch.tensor([1.0, *t[1:]]), "weights add to"),
        ("new", lambda t: torch.ones(1), "blend.new is unknown"),
    ],
)
def test_a_damaged_blend_is_refused(fitted, tmp_path, name, change, why):
    folder = fitted.save(tmp_path / "model")
    tensors = load_file(folder / "weights.safetensors")
    changed = change(tensors.pop(f"blend.{name}", None))
    resaved(folder, {**tensors, **({} if changed is None else {f"blend.{name}": changed.contiguous()})})
    with pytest.raises(ValueError, match=why):
        Model.load(folder)


def test_impute_and_complete_say_how_much_they_blend(fitted, linear):
    cells = linear.counts[linear.rows("test")][:20]
    adata = ad.AnnData(
        cells, obs=pd.DataFrame(index=[f"c{i}" for i in range(20)]), var=pd.DataFrame(index=linear.genes)
    )
    mask = np.zeros(cells.shape, dtype=bool)
    mask[:, :5] = True
    for options, weight in (({}, fitted.blend.weight), ({"steps": 3}, 0.0)):
        out = fitted.impute(adata, mask=mask, ood=0, device="cpu", **options)
        assert out.uns["distdiff"]["blend"] == weight
    panel = fitted.complete(adata[:, 5:].copy(), ood=0, device="cpu")
    assert panel.uns["distdiff"]["blend"] == fitted.blend.weight
    whole = fitted.impute(adata, mask=mask, ood=0, device="cpu").to_df("imputed_mean")
    pd.testing.assert_frame_equal(panel.to_df("imputed_mean")[list(linear.genes)], whole, rtol=1e-4)


def test_training_decides_and_a_run_can_go_without(counts, tmp_path):
    model = distdiff.train(counts, out=tmp_path / "run", **QUICK)
    info = model.info["blend"]
    assert info["cells"] > 0
    assert info["weight"] == pytest.approx(info["pca"] + info["nmf"])
    told = (tmp_path / "run" / "card" / "card.md").read_text()
    assert ("Imputation by one call is, in logarithms, " in told) == (info["weight"] > 0)
    assert (model.blend is None) == (info["weight"] == 0)
    model = distdiff.train(counts, out=tmp_path / "run", blend=False, **QUICK)  # nothing is left to train
    assert model.blend is None
    assert "blend" not in model.info


def test_names_of_blend_tensors_are_no_part_of_the_network():
    assert saved.network({"network.a": torch.ones(1), "blend.cap": torch.ones(1)}).keys() == {"a"}
    assert Blend.of({"network.a": torch.ones(1)}, 3) is None


def test_an_evaluation_with_cell_types_scores_the_blend_of_a_model_without_labels(counts, atlas, tmp_path):
    """The groups of a table are labels of its cells, and none that the network was told."""
    model = distdiff.train(counts, out=tmp_path / "run", **QUICK)
    store = distdiff.CountStore.open(atlas)
    model.blend = model.blend or fit_blend(model.process, model.denoiser, store)[0]
    assert model.blend is not None
    scored = [
        distdiff.evaluate(model, store, cell_type=label, repaint_steps=0, draws=2, keep_trained=True, progress=False)
        for label in (None, "cell_type")
    ]
    plain, grouped = (report.metrics()["test/deviance/distdiff mean"] for report in scored)
    assert plain == grouped


def test_a_factorisation_answers_as_the_baseline(linear):
    """What is written to a model gives the rates of the :class:`~distdiff.baselines.nmf.Nmf` it was taken from."""
    nmf = Nmf(4, floor=0.02)
    nmf.fit(linear, linear.rows("train"))
    cells, observed = hidden(linear)
    observed[0], observed[1] = False, True
    parts = {"mean": nmf.gene_mean, "programmes": nmf.programmes.T, "average": nmf.average, "shape": nmf.shape}
    numbers = {"weight": 1.0, "floor": 0.02, "steps": nmf.steps}
    found = Factorisation(numbers, {name: torch.tensor(part) for name, part in parts.items()})
    counts = torch.where(observed, cells.counts, 0.0).numpy()
    wanted = nmf.rate(counts, observed.numpy(), None)
    np.testing.assert_allclose(found.rate(cells.counts, observed).numpy(), wanted, rtol=1e-4)


def test_squared_error_has_a_veto():
    """Weights of less deviance are not taken where squared error would be worse by more than chance."""
    rng, n = np.random.default_rng(0), 200
    pca, nmf = np.array(WEIGHTS).T
    better = ((pca - 0.4) ** 2 + (nmf - 0.3) ** 2)[None] + 0.1 * rng.normal(size=(n, 1))
    assert WEIGHTS[choose(better, better)] == (0.4, 0.3)
    assert WEIGHTS[choose(better, np.broadcast_to(nmf, better.shape))] == (0.4, 0.0)
    assert WEIGHTS[choose(better, np.broadcast_to(np.maximum(nmf - 0.1, 0), better.shape))] == (0.4, 0.1)
    assert WEIGHTS[choose(better, np.broadcast_to(pca + nmf, better.shape))] == (0.0, 0.0)
    noise = rng.normal(size=better.shape)
    assert WEIGHTS[choose(0.02 * better + noise[:, :1] * (pca + nmf), better)] == (0.0, 0.0)  # a gain within its error
    assert choose(better[:1], better[:1]) == 0  # one cell shows nothing


def test_a_blend_of_a_model_made_before_programmes_is_read(fitted, linear, tmp_path):
    regression = replace(fitted.blend, estimators=fitted.blend.estimators[:1])
    folder = replace(fitted, blend=regression).save(tmp_path / "model")
    assert not any("nmf" in name for name in load_file(folder / "weights.safetensors"))
    loaded = Model.load(folder).blend
    assert loaded.weight == fitted.blend.estimators[0].weight
    cells, observed = hidden(linear)
    eta = torch.zeros(*cells.counts.shape, 2)
    both = (blend.into(eta, cells.counts, observed, Condition()) for blend in (regression, loaded))
    assert torch.equal(*both)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
def test_little_evidence_does_not_let_loadings_run_off(fitted, linear, share):
    """Without the prior, a molecule or two decided the loadings: worse than no structure at all."""
    cells = linear.cells(linear.rows("test"))
    observed = torch.from_numpy(np.random.default_rng(3).random(cells.counts.shape) < share)
    counts = torch.where(observed, cells.counts, 0.0)

    def lost(mean):
        return metrics.poisson_deviance(cells.counts.numpy(), ~observed.numpy(), mean).sum()

    with_prior, without = Nmf(8, floor=0.001), Nmf(8, floor=0.001, prior=0.0)
    for nmf in (with_prior, without):
        nmf.fit(linear, linear.rows("train"))
    mean = linear.counts[:600].mean(0).A1
    of_mean = lost(depth(counts.numpy(), observed.numpy(), mean) * mean)
    of_prior, of_none = (lost(nmf.rate(counts.numpy(), observed.numpy(), None)) for nmf in (with_prior, without))
    assert of_prior < of_mean
    if share < 0.2:
        assert of_prior < of_none
    if share > 0.05:  # of four genes seen and more
        both, alone = (
            model.imputer().impute(cells, observed).mean.numpy() for model in (fitted, replace(fitted, blend=None))
        )
        assert lost(both) < lost(alone)
