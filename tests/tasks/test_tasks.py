"""One set of weights, every task of docs/MATHS.md 5: on a model that trains in seconds and on closed forms."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from distdiff import config, experiment
from distdiff.denoise import Denoiser
from distdiff.model import Model
from distdiff.process.counts import Counts
from distdiff.readouts import readout
from distdiff.tasks import denoise as denoising
from distdiff.tasks.likelihood import nats
from distdiff.types import Cells, Condition, DataSpec


@pytest.fixture(scope="module")
def model(atlas, tmp_path_factory):
    """A model trained for some seconds, with labels."""
    raw = {
        "data": {"store": str(atlas), "labels": ["cell_type"]},
        "denoiser": {"width": 32, "depth": 1, "linear": 8},
        "optim": {"lr": 3e-3, "ema": 0.98, "warmup_cells": 200},
        "train": {
            "out": str(tmp_path_factory.mktemp("run")), "cells": 20000, "batch": 64, "grain": 32, "eval_cells": 5000,
        },
        "survival": {"hidden": 0.3, "two_level": 0.3, "uniform": 0.4, "time": "stratified"},
        "evaluate": {"enabled": False},
        "tracking": {"enabled": False},
    }  # fmt: skip
    return Model.load(experiment.train(config.parse(raw)).model)


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generated_cells_follow_their_label(model, counts):
    out = model.generate(400, {"cell_type": "B"}, steps=8, seed=1)
    assert out.shape == (400, 30)
    assert list(out.var_names) == list(model.spec.genes)
    assert set(out.obs["cell_type"]) == {"B"}
    x = dense(out.X)
    assert (x == x.round()).all()
    assert (x >= 0).all()
    types = counts.obs["cell_type"].to_numpy()
    b, t = (dense(counts.X)[types == k].mean(0) for k in ("B", "T"))
    assert np.abs(x.mean(0) - b).mean() < 0.5 * np.abs(x.mean(0) - t).mean()


def test_a_generated_cell_depends_on_the_seed_and_its_number_alone(model):
    one = dense(model.generate(50, seed=3, steps=4).X)
    assert np.array_equal(one, dense(model.generate(50, seed=3, steps=4, batch_size=7).X))
    assert np.array_equal(one[:20], dense(model.generate(20, seed=3, steps=4).X))
    assert not np.array_equal(one, dense(model.generate(50, seed=4, steps=4).X))


def test_generated_cells_are_as_deep_as_their_label(model, counts):
    molecules = np.asarray(counts[counts.obs["cell_type"] == "B"].X.sum(1)).ravel()
    made = {name: dense(model.generate(400, {"cell_type": "B"}, depth=d, steps=16, seed=1).X).sum(1)
            for name, d in (("drawn", None), ("free", "free"))}  # fmt: skip
    assert made["drawn"].mean() == pytest.approx(molecules.mean(), rel=0.1)
    assert made["drawn"].std() == pytest.approx(molecules.std(), rel=0.2)
    asked = dense(model.generate(200, {"cell_type": "B"}, depth=50, steps=16, seed=1).X).sum(1)
    assert asked.mean() == pytest.approx(50, rel=0.1)
    assert asked.std() < 0.5 * made["free"].std()
    guided = model.generate(400, {"cell_type": "B"}, steps=16, seed=1, guidance=3.0)
    assert dense(guided.X).sum(1).mean() == pytest.approx(made["drawn"].mean(), rel=0.05)


def test_labels_decide_the_order_and_the_levels_of_training(model):
    settled = model.info["config"]
    assert settled["loader"]["strata"] == "cell_type"
    assert settled["loader"]["weights"] == 0.5
    assert settled["survival"]["levels"] == "logit"


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 2.0}, {"sigma": ("rescale", 0.1)}, {"spacing": "logit"}, {"spacing": "variance"},
        {"solver": "trapezoidal"}, {"spacing": [0, 0.2, 0.5, 0.9, 1]}, {"spacing": "time", "depth": "free"},
    ],
)  # fmt: skip
def test_every_way_to_walk_generates(model, options):
    x = dense(model.generate(60, {"cell_type": ["B", "T"] * 30}, steps=4, **options).X)
    assert (x >= 0).all()
    assert x.sum() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"obs": {"celltype": "B"}}, "not trained with label 'celltype'; did you mean 'cell_type'"),
        ({"obs": {"cell_type": "Bb"}}, "never saw cell_type 'Bb'; did you mean 'B'"),
        ({"obs": {"cell_type": ["B"]}}, "1 values for 5 cells"),
        ({"steps": 0}, "a walk has 1 to 100,000 steps"),
        ({"spacing": [0, 0.5, 0.9], "steps": 2}, "must end at p = 1"),
        ({"solver": "heun"}, "unknown solver 'heun'"),
        ({"sigma": ("cap", 3.0)}, r"eta must lie in \[0, 1\]"),
    ],
)
def test_bad_generation_is_named(model, options, words):
    with pytest.raises(ValueError, match=words):
        model.generate(**{"n": 5, **options})


def test_guidance_needs_label_dropout(model):
    bare = Model(model.process, model.denoiser, DataSpec(model.spec.genes, {}, model.spec.gene_mean), model.options)
    with pytest.raises(ValueError, match="needs a model trained with labels"):
        bare.generate(2, guidance=2.0)
    told = Model(model.process, model.denoiser, model.spec, model.options, {"config": {"train": {"label_dropout": 0}}})
    for call in (lambda: told.generate(2, guidance=0.5), lambda: told.imputer(guidance=0.5)):
        with pytest.raises(ValueError, match=r"train\.label_dropout > 0"):
            call()


# -- denoise -----------------------------------------------------------------------------------------------------------


class Rate(Denoiser):
    """Answers a known rate and size, whatever it sees."""

    def __init__(self, rate, size):
        super().__init__()
        self.register_buffer("answer", torch.tensor(np.log([rate, size])).T.float())
        self.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))

    def forward(self, x, p, cond):
        return self.answer.expand(*x.shape, 2)


def known(rate, size, **options):
    genes = tuple(f"g{i}" for i in range(len(rate)))
    spec = DataSpec(genes, {}, np.asarray(rate, np.float32))
    return Model(Counts(own=False, **options), Rate(rate, size), spec, {})


def cells_of(x):
    x = torch.as_tensor(x, dtype=torch.float32)
    return Cells(x, Condition(), torch.arange(len(x))), torch.ones(x.shape, dtype=torch.bool)


def test_denoised_is_the_rate():
    model = known([2.0, 5.0], [1.0, 1.0])
    cells, seen = cells_of([[0.0, 9.0]])
    assert torch.allclose(denoising.denoise(model.process, model.denoiser, cells, seen), torch.tensor([[2.0, 5.0]]))


# a panel of two genes in a frame of three: g0 (rate 2) and g1 (rate 5) are the model's
FRAME = [[1.0, 4.0, 15.0], [2.0, 6.0, 0.0], [0.0, 0.0, 0.0]]


def in_frame(**obs):
    names = pd.DataFrame(index=["g0", "g1", "other"])
    frame = pd.DataFrame(obs, index=[f"c{i}" for i in range(3)])
    return ad.AnnData(sp.csr_matrix(np.array(FRAME, np.float32)), obs=frame, var=names)


def log_of(library):
    """E[log1p_cp10k] of the two rates, size 1, in cells of these libraries."""
    column = torch.tensor(library, dtype=torch.float32).view(-1, 1)
    mean, size = torch.tensor([[2.0, 5.0]]).expand(len(column), 2), torch.zeros(len(column), 2)
    return readout("log1p_cp10k", torch.zeros_like(mean), mean, size, column).numpy()


@pytest.mark.parametrize(
    ("library", "molecules", "name"),
    [(None, [20, 8, 7], "cell"), ("cell", [20, 8, 7], "cell"), ("panel", [7, 7, 7], "panel"),
     ("depth", [30, 9, 1], "depth")],
)  # fmt: skip
def test_the_log_scale_is_that_of_the_library(library, molecules, name, tmp_path):
    from distdiff import batch

    model, adata = known([2.0, 5.0], [1.0, 1.0]), in_frame(depth=[30, 9, 1])
    options = {"readout": "log1p_cp10k", "library": library}
    out = model.denoise(adata, **options)
    assert np.allclose(out.layers["denoised_log1p_cp10k"], log_of(molecules), atol=1e-5)  # the last cell has none
    assert out.uns["distdiff"]["library"] == name
    adata.write_h5ad(tmp_path / "a.h5ad")
    batch.run("denoise", model, tmp_path / "a.h5ad", tmp_path / "o.h5ad", progress=False, **options)
    found = ad.read_h5ad(tmp_path / "o.h5ad")
    assert np.allclose(dense(found.layers["denoised_log1p_cp10k"]), log_of(molecules), atol=1e-5)
    assert found.uns["distdiff"]["library"] == name
    alone = model.denoise(adata[:, :2].copy(), readout="log1p_cp10k")
    assert alone.uns["distdiff"]["library"] == "panel"  # nothing else was measured
    assert np.allclose(alone.layers["denoised_log1p_cp10k"], log_of([7, 7, 7]), atol=1e-5)


def test_a_library_that_cannot_be_used_is_named():
    model, adata = known([2.0, 5.0], [1.0, 1.0]), in_frame(depth=[30, 0, 1], words=["a", "b", "c"])
    for library, message in {
        "dept": "library='dept' is none of panel, cell, and .*did you mean 'depth'",
        "depth": r"obs\['depth'\] holds '0' \(cell 1\), a positive number",
        "words": r"obs\['words'\] holds 'a' \(cell 0\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            model.denoise(adata, readout="log1p_cp10k", library=library)
    with pytest.raises(ValueError, match="library='cell' is for readout='log1p_cp10k'; 'mean' is"):
        model.denoise(adata, library="cell")
    adata.X[0, 2] = -1.5
    with pytest.raises(ValueError, match="'other' holds numbers below 0"):
        model.denoise(adata, readout="log1p_cp10k")
    assert model.denoise(adata, readout="log1p_cp10k", library="panel").shape == (3, 2)


def test_no_raw_count_stands_in_a_layer_of_logarithms(tmp_path):  # of a gene that the model does not know
    from distdiff import batch

    model, adata = known([2.0, 5.0], [1.0, 1.0]), in_frame()
    assert list(model.denoise(adata, readout="log1p_cp10k").var_names) == ["g0", "g1"]
    made = [model.denoise(adata, readout="log1p_cp10k", genes="all"), adata.copy()]
    model.denoise(made[1], readout="log1p_cp10k", copy=False)
    adata.write_h5ad(tmp_path / "a.h5ad")
    batch.run("denoise", model, tmp_path / "a.h5ad", tmp_path / "o.h5ad", genes="all", readout="log1p_cp10k",
              progress=False)  # fmt: skip
    for out in (*made, ad.read_h5ad(tmp_path / "o.h5ad")):
        values = dense(out.layers["denoised_log1p_cp10k"])
        assert (values[:, :2] > 1).all()
        assert not values[:, 2].any()
    assert made[0].var["distdiff_known"].tolist() == [True, True, False]


def test_an_entry_for_open_problems_has_the_logarithms_that_its_pipeline_would_inflate():  # docs/MATHS.md 5.9
    model = known(np.r_[np.full(10, 40.0), np.full(90, 0.1)], np.ones(100))
    cells, seen = cells_of(np.zeros((2, 100)))
    log, entry = (
        denoising.denoise(model.process, model.denoiser, cells, seen, readout=name, depth=0.1).double()
        for name in ("log1p_cp10k", "open_problems")
    )
    assert torch.expm1(log).sum(1).max() < 8000  # what the pipeline would scale up to 10,000
    assert torch.allclose(entry.sum(1), torch.full((2,), 1e4).double(), rtol=1e-4)
    assert torch.allclose(torch.log1p(entry[:, 10:]), log[:, 10:], atol=1e-4)
    assert torch.allclose((entry / torch.expm1(log))[:, :10].std(1), torch.zeros(2).double(), atol=1e-3)
    with pytest.raises(ValueError, match="readout='open_problems' is no number of molecules"):
        model.imputer(readout="open_problems")


@pytest.mark.parametrize(
    ("mean", "size"), [(0.05, 0.3), (1.0, 2.0), (8.0, 0.5), (300.0, 2.0), (900.0, 400.0), (6.0, 0.05)]
)
def test_read_outs_are_those_of_scipys_law(mean, size):  # docs/MATHS.md 5.8
    law, k = stats.nbinom(size, size / (size + mean)), np.arange(60_000)
    pmf = law.pmf(k)
    one = torch.ones(1, 1)
    args = (2 * one, mean * one, float(np.log(size)) * one)
    assert float(readout("mean", *args)) == pytest.approx(2 + mean)
    assert float(readout("log1p", *args)) == pytest.approx((pmf * np.log1p(k + 2)).sum(), rel=1e-5)
    cp10k = float(readout("log1p_cp10k", *args, library=500 * one))
    assert cp10k == pytest.approx((pmf * np.log1p(20.0 * (k + 2))).sum(), rel=1e-5)
    assert float(readout("median", *args)) == 2 + law.ppf(0.5)
    assert float(readout("q97.5", *args)) == 2 + law.ppf(0.975)


@pytest.mark.parametrize("name", ["men", "q0", "q100", "qq"])
def test_unknown_read_outs_are_named(model, counts, name):
    with pytest.raises(ValueError, match="unknown readout"):
        model.denoise(counts, readout=name)
    with pytest.raises(ValueError, match="unknown readout"):
        model.imputer(readout=name)


def test_denoising_on_anndata(model, counts):
    out = model.denoise(counts, progress=True)
    assert np.array_equal(dense(out.X), dense(counts.X))
    rate = out.layers["denoised"]
    assert rate.shape == counts.shape
    assert (rate >= 0).all()
    assert not counts.layers
    x = dense(counts.X)
    types = counts.obs["cell_type"].to_numpy()
    truth = np.stack([x[types == t].mean(0) / x[types == t].mean() for t in types]) * x.mean(1, keepdims=True)
    fine = x.sum(1) > 0
    assert ((rate - truth)[fine] ** 2).mean() < 0.7 * ((x - truth)[fine] ** 2).mean()
    log = model.denoise(counts, readout="log1p_cp10k").layers["denoised_log1p_cp10k"]
    assert log.max() < np.log1p(1e4) + 1e-3
    assert out.uns["distdiff"]["task"] == "denoise"


def test_denoising_refuses_what_has_no_rate(model, counts):
    gaussian = Model.new(model.spec, {"kind": "gaussian"}, {"kind": "mlp", "width": 8, "depth": 1})
    with pytest.raises(ValueError, match="denoising needs a process whose states are molecules, got Gaussian"):
        gaussian.denoise(counts)
    with pytest.raises(ValueError, match="depth must be positive, got 0"):
        model.denoise(counts, depth=0)
    with pytest.raises(ValueError, match="readout='log1p' needs a process whose states are molecules"):
        gaussian.imputer(readout="log1p")
    with pytest.raises(ValueError, match="no number of molecules"):
        model.imputer(readout="log1p_cp10k")


# -- deepen, complete ------------------------------------------------------------------------------------------------


def test_deepened_cells_keep_their_molecules_and_reach_the_depth(model, counts):
    out = model.deepen(counts, 3, steps=4, beyond="allow", progress=True)
    x, deep = dense(counts.X), dense(out.layers["deepened"])
    assert (deep >= x).all()
    assert (deep == deep.round()).all()
    assert deep.sum() == pytest.approx(3 * x.sum(), rel=0.25)
    assert np.array_equal(
        deep, dense(model.deepen(counts, 3, steps=4, beyond="allow", batch_size=17).layers["deepened"])
    )
    assert np.array_equal(dense(model.deepen(counts, 1, beyond="allow").layers["deepened"]), x)


@pytest.mark.parametrize("number", [-1, 0])
def test_no_cells_at_a_time_are_no_answer(model, counts, number):
    for task in (lambda **o: model.generate(5, **o), lambda **o: model.deepen(counts, 2, beyond="allow", **o)):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1 cell, got {number}"):
            task(batch_size=number)


def test_walks_have_an_end(model):
    with pytest.raises(ValueError, match="a walk has 1 to 100,000 steps, got steps=1,000,000,000"):
        model.generate(5, steps=10**9)


def test_deepening_stops_at_the_depth_of_the_atlas(model, counts):
    with pytest.raises(ValueError, match="99 % of the training cells have at most"):
        model.deepen(counts, 50)
    for times in (1e9, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"times must be between 1 and 1,000, got"):
            model.deepen(counts, times, beyond="allow")
    with pytest.raises(ValueError, match=r"times must be between 1 and 1,000, got 0\.5"):
        model.deepen(counts, 0.5)
    blind = Model(model.process, model.denoiser, model.spec, model.options)
    with pytest.raises(ValueError, match="does not say how deep"):
        blind.deepen(counts, 2)
    thin = counts[dense(counts.X).sum(1) < model.info["depth"]["q99"] / 2.5].copy()
    assert model.deepen(thin, 2).layers["deepened"].sum() > thin.X.sum()


def test_completed_panels_hold_the_genes_that_were_asked(model, counts):
    panel = counts[:, :20].copy()
    out = model.complete(panel, ["gene25", "gene22"], draws=2)
    assert list(out.var_names[20:]) == ["gene25", "gene22"]
    everything = model.complete(panel, mean_only=True)
    assert everything.n_vars == 30
    where = [list(everything.var_names).index(g) for g in ("gene25", "gene22")]
    assert np.allclose(everything.layers["imputed_mean"][:, where], out.layers["imputed_mean"][:, 20:])
    for genes, words in ((["nope"], "does not know gene 'nope'"), (["gene3"], "'gene3' is measured")):
        with pytest.raises(ValueError, match=words):
            model.complete(panel, genes)


def test_read_outs_of_imputation_stand_in_their_own_layer(model, counts):
    mask = np.random.default_rng(0).random(counts.shape) < 0.3
    layers = {r: model.impute(counts, mask=mask, readout=r, mean_only=True).layers for r in ("log1p", "median", "q90")}
    log, median, high = (layers[r][f"imputed_{r}"] for r in layers)
    mean = model.impute(counts, mask=mask, mean_only=True).layers["imputed_mean"]
    some = mask & (mean > 0.05)
    assert (log <= mean + 1e-4)[some].all()  # Jensen
    assert (high >= median)[some].all()
    assert np.array_equal(log[~mask], dense(counts.X)[~mask])


def test_imputed_draws_do_not_depend_on_the_batch(model, counts):
    mask = np.random.default_rng(0).random(counts.shape) < 0.5
    for options in ({}, {"steps": 3}, {"method": "repaint", "steps": 4}):
        a, b = (model.impute(counts, mask=mask, draws=2, batch_size=n, **options) for n in (200, 33))
        for layer in ("imputed", "imputed_draw2"):
            assert np.array_equal(a.layers[layer], b.layers[layer])


# -- likelihood --------------------------------------------------------------------------------------------------------


def test_the_bound_of_the_exact_rate_is_the_entropy():  # docs/MATHS.md 3.3: Poisson data, exact answer
    rate = [0.3, 2.0, 7.0]
    model = known(rate, [1.0, 1.0, 1.0], head="nb")
    x = np.random.default_rng(0).poisson(rate, (4000, 3))
    cells, seen = cells_of(x)
    cost = nats(model.process, model.denoiser, cells, seen, levels=32)
    want = -stats.poisson(rate).logpmf(x).sum(1)
    assert float(cost.mean()) == pytest.approx(want.mean(), rel=0.02)
    fine = nats(
        model.process, model.denoiser, cells, seen, levels=512
    )  # one thinning a stratum: a cell's own bound needs more of them
    assert np.corrcoef(fine, want)[0, 1] > 0.9
    part = seen.clone()
    part[:, 2] = False
    two = -stats.poisson(rate).logpmf(x)[:, :2].sum(1).mean()
    assert float(nats(model.process, model.denoiser, cells, part).mean()) == pytest.approx(two, rel=0.02)


def test_strange_cells_cost_more(model, counts):
    strange = counts.copy()
    strange.X = sp.csr_matrix(dense(counts.X)[:, ::-1])  # the same molecules in the wrong genes
    a, b = model.likelihood(counts), model.likelihood(strange)
    assert list(a.columns) == ["nats", "molecules", "bits_per_molecule"]
    assert list(a.index) == list(counts.obs_names)
    full = a["molecules"] > 20
    assert (b["nats"] > a["nats"])[full].mean() > 0.9
    assert np.isnan(a["bits_per_molecule"].iloc[7])
    assert a["nats"].median() == pytest.approx(model.info["nats"]["q50"], rel=0.3)
    gaussian = Model.new(model.spec, {"kind": "gaussian"}, {"kind": "mlp", "width": 8, "depth": 1})
    with pytest.raises(ValueError, match="has no likelihood of counts"):
        gaussian.likelihood(counts)


def test_what_a_model_knows_of_itself_travels_with_it(model, tmp_path):
    again = Model.load(model.save(tmp_path / "m"))
    assert again.info["depth"]["q99"] > again.info["depth"]["q50"] > 0
    assert len(again.info["excess"]["p"]) == len(again.info["excess"]["generate"])
    blind = Model(model.process, model.denoiser, model.spec, model.options)
    with pytest.raises(ValueError, match="spacing='variance' needs"):
        blind.imputer(spacing="variance", steps=3)


def test_a_denoiser_of_another_width_is_named(model, counts):
    wrong = Model(Counts(head="mean"), model.denoiser, model.spec, model.options)
    with pytest.raises(ValueError, match="gives 2 numbers a gene, process Counts reads 1"):
        wrong.denoise(counts)


@pytest.mark.parametrize("kind", ["gaussian", "masked", "jump", "blackout"])
def test_every_process_imputes_and_generates_through_the_model(model, counts, kind):
    """A rival is a config key: untrained it starts from gene mean x depth, keeps evidence, and draws what it can."""
    options = {"masked": {"classes": 200}, "jump": {"scale": 20.0}}.get(kind, {})
    rival = Model.new(model.spec, {"kind": kind, **options}, {"kind": "mlp", "width": 16, "depth": 1})
    mask = np.random.default_rng(1).random(counts.shape) < 0.4
    x = dense(counts.X)
    for method in ({"steps": 1}, {"steps": 3}, {"method": "repaint", "steps": 3}):
        out = rival.impute(counts, mask=mask, draws=2, **method)
        drawn = out.layers["imputed_draw2"]
        assert np.array_equal(drawn[~mask], x[~mask])
        assert np.isfinite(drawn).all()
        assert (drawn >= 0).all()
    mean = rival.impute(counts, mask=mask, mean_only=True).layers["imputed_mean"]
    fine = np.where(mask, 0, x).sum(1) > 0
    if kind != "jump":  # its molecules are made, so its depth is not the data's before training
        assert np.corrcoef(mean[fine][mask[fine]], x[fine][mask[fine]])[0, 1] > 0.3
    assert dense(rival.generate(10, steps=3).X).shape == (10, 30)
    if kind == "jump":
        with pytest.raises(ValueError, match="deepening needs a process whose states are molecules, got Jump"):
            rival.deepen(counts, 2)
