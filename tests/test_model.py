"""Model.impute on AnnData and impute_file on files: observed counts bit-equal, targets right, bad input named."""

from __future__ import annotations

import hashlib
import sys

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import distdiff
from distdiff import batch, files
from distdiff.batch import impute_file
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.model import Model

OPTIONS = ({"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1})


@pytest.fixture(scope="module")
def model(atlas):
    return Model.new(CountStore.open(atlas).spec(("cell_type",)), *OPTIONS)


@pytest.fixture
def mask(counts):
    return mcar(counts.shape, 0.5, np.random.default_rng(0))


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def digest(adata):
    x = sp.csr_matrix(adata.X)
    return hashlib.sha256(x.data.tobytes() + x.indices.tobytes()).hexdigest(), list(adata.layers), list(adata.uns)


def test_observed_counts_come_back_and_the_input_is_untouched(model, counts, mask):
    before = digest(counts)
    out = model.impute(counts, mask=mask, draws=3)
    assert digest(counts) == before
    assert set(out.layers) == {"imputed_mean", "imputed", "imputed_draw2", "imputed_draw3", "imputed_mask"}
    assert np.isfinite(out.obs["distdiff_nats"]).all()
    x = dense(counts.X)
    empty = np.where(mask, 0, x).sum(1) == 0
    assert empty[7]
    assert (dense(out.X) == x).all()
    assert (dense(out.layers.pop("imputed_mask")) == (mask & ~empty[:, None])).all()
    for name, values in out.layers.items():
        assert (values[~mask] == x[~mask]).all()
        assert (values[empty] == np.where(mask, 0, x)[empty]).all()  # nobody sees what stands under a mask
        if name != "imputed_mean":
            assert (values == values.round()).all()
    assert not (out.layers["imputed"] == out.layers["imputed_draw2"]).all()
    done = out.uns["distdiff"]
    assert done["targets"] == mask[~empty].sum()
    assert done["cells_without_evidence"] == empty.sum()
    assert done["molecules_added"] == pytest.approx(out.layers["imputed_mean"][~empty][mask[~empty]].sum(), rel=1e-4)


def test_what_stands_at_a_target_is_not_looked_at(model, counts, mask):
    want = model.impute(counts, mask=mask).layers["imputed_mean"]
    poisoned = counts.copy()
    x = dense(counts.X).copy()
    x[mask] = -77.5
    poisoned.X = x
    got = model.impute(poisoned, mask=sp.csr_matrix(mask)).layers["imputed_mean"]
    keep = np.where(mask, 0, dense(counts.X)).sum(1) > 0
    assert (got[keep] == want[keep]).all()


def test_same_seed_same_draws_whatever_runs_before(model, counts, mask):
    a, b = (model.impute(counts, mask=mask, seed=3).layers["imputed"] for _ in range(2))
    c = model.impute(counts, mask=mask, seed=4).layers["imputed"]
    assert (a == b).all()
    assert not (a == c).all()


def test_dropout_sites_follow_algorithm_1(model, counts):  # docs/MATHS.md 8.5
    out = model.impute(counts, sites="dropout", groups="cell_type", mean_only=True)
    x = dense(counts.X)
    for kind in ("B", "T"):
        cells = (counts.obs["cell_type"] == kind).to_numpy()
        changed = out.layers["imputed_mean"][cells] != x[cells]
        expressed = x[cells].sum(0) > 0
        sites = (x[cells] == 0) & expressed
        sites[x[cells].sum(1) == 0] = False
        assert (changed == sites).all()


def test_leiden_names_its_extra(model, counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "igraph", None)
    monkeypatch.setitem(sys.modules, "leidenalg", None)
    with pytest.raises(ValueError, match=r"pip install 'distdiff\[leiden\]'"):
        model.impute(counts[np.asarray(counts.X.sum(1)).ravel() > 0], sites="dropout", groups="leiden", mean_only=True)


def test_leiden_groups(model, counts):
    some = (
        counts[counts.X.sum(1).A1 > 0]
        if hasattr(counts.X.sum(1), "A1")
        else counts[np.asarray(counts.X.sum(1)).ravel() > 0]
    )
    out = model.impute(some, sites="dropout", groups="leiden", mean_only=True)
    assert out.uns["distdiff"]["targets"] > 0


def test_a_panel_gains_the_genes_it_lacks(model, counts):
    panel = counts[:, 5:].copy()
    panel.var["note"] = "x"
    out = model.impute(panel, draws=2)
    assert list(out.var_names) == [*panel.var_names, *counts.var_names[:5]]
    assert out.var["distdiff_added"].sum() == 5
    assert (dense(out[:, panel.var_names].X) == dense(panel.X)).all()
    assert (out[:, panel.var_names].layers["imputed"] == dense(panel.X)).all()
    added = out.layers["imputed_mean"][:, -5:]
    kept = np.asarray(panel.X.sum(1)).ravel() > 0
    assert (added[kept] > 0).all()
    assert (added[~kept] == 0).all()


def test_genes_in_another_order_and_unknown_genes(model, counts, mask):
    want = model.impute(counts, mask=mask).layers["imputed_mean"]
    order = np.random.default_rng(1).permutation(counts.n_vars)
    got = model.impute(counts[:, order].copy(), mask=mask[:, order]).layers["imputed_mean"]
    assert np.allclose(got, want[:, order], rtol=1e-5)
    more = ad.concat(
        [counts, ad.AnnData(sp.csr_matrix(np.ones((200, 1), np.float32)), obs=counts.obs[[]], var={"n": [0]})], axis=1
    )
    more.var_names = [*counts.var_names, "newgene"]
    more.obs = counts.obs
    all_hidden = np.c_[mask, np.ones((200, 1), bool)]
    out = model.impute(more, mask=all_hidden)
    assert (out.layers["imputed_mean"][:, -1] == 1).all()
    assert out.uns["distdiff"]["genes_unknown_to_model"] == 1
    assert out.uns["distdiff"]["targets_of_unknown_genes"] == 200
    assert np.allclose(out.layers["imputed_mean"][:, :-1], want, rtol=1e-5)


SMALL_NETWORKS = [
    {"kind": "mlp", "width": 16, "depth": 1, "rank": 8},
    {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
    {"kind": "transformer", "width": 16, "depth": 1, "heads": 2, "pack": True},
    {"kind": "lsh", "width": 16, "depth": 1, "heads": 2, "bucket": 8},
    {"kind": "latent", "width": 16, "depth": 1, "heads": 2, "latents": 4},
    {"kind": "csdi", "width": 16, "depth": 1, "heads": 2, "gene_embedding": True},
]


@pytest.mark.parametrize("network", SMALL_NETWORKS, ids=lambda n: "-".join(map(str, n.values())))
def test_every_network_does_every_task_and_survives_its_file(network, atlas, counts, mask, tmp_path, caplog):
    """All tasks; genes in another order answer alike; unknown genes are told."""
    spec = CountStore.open(atlas).spec(())
    model = Model.new(spec, {"kind": "counts"}, network)
    rng = torch.Generator().manual_seed(0)
    for weight in model.denoiser.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=rng)
    model.save(tmp_path / "m")
    again = Model.load(tmp_path / "m")
    some = counts[:20].copy()
    want = model.impute(some, mask=mask[:20], steps=3)
    got = again.impute(some, mask=mask[:20], steps=3)
    for layer in ("imputed_mean", "imputed"):
        assert np.array_equal(got.layers[layer], want.layers[layer])
    order = np.random.default_rng(1).permutation(counts.n_vars)
    turned = model.impute(some[:, order].copy(), mask=mask[:20][:, order])
    assert np.allclose(turned.layers["imputed_mean"], want.layers["imputed_mean"][:, order], rtol=1e-4)
    assert model.generate(5, steps=3).shape == counts[:5].shape
    assert np.isfinite(model.likelihood(some, levels=4)["nats"]).all()
    assert (model.deepen(some, 1.5, beyond="allow").layers["deepened"] - some.X).min() >= 0
    assert "unknown" not in caplog.text
    some.var_names = [*some.var_names[:-3], "x1", "x2", "x3"]
    out = model.denoise(some)
    assert out.uns["distdiff"]["genes_unknown_to_model"] == 3
    assert out.uns["distdiff"]["genes_absent_from_input"] == 3
    assert "3 of the input's 30 genes are unknown to the model (x1...)" in caplog.text
    assert list(out.var_names) == list(some.var_names[:-3])
    kept = model.denoise(some, genes="all")
    assert np.array_equal(kept.layers["denoised"][:, :-3], out.layers["denoised"])
    assert not kept.layers["denoised"][:, -3:].any()
    assert list(kept.var["distdiff_known"]) == [True] * 27 + [False] * 3


def test_labels_condition_the_answer_where_they_are_asked_to(model, counts, mask, caplog):
    model = Model.new(model.spec, *OPTIONS)
    for weight in model.denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    bare, shuffled = counts.copy(), counts.copy()
    del bare.obs["cell_type"]
    shuffled.obs["cell_type"] = counts.obs["cell_type"].to_numpy()[::-1]
    tasks = {
        "impute": lambda a, **o: model.impute(a, mask=mask, mean_only=True, **o),
        "denoise": model.denoise,
        "deepen": lambda a, **o: model.deepen(a, 2, beyond="allow", **o),
        "likelihood": model.likelihood,
    }
    for name, task in tasks.items():
        plain, told = task(counts), task(counts, use_labels=True)
        for other in (bare, shuffled):
            assert same(task(other), plain), f"{name}: by default labels are not looked at"
        assert not same(told, plain)
        assert not same(task(shuffled, use_labels=True), told)
        if name != "likelihood":
            assert plain.uns["distdiff"]["conditioned_on"] == ""
            assert told.uns["distdiff"]["conditioned_on"] == "cell_type"
    assert caplog.text.count("conditioned on obs cell_type, as asked") == 8


def same(one, other):
    """Whether two answers hold the same numbers."""
    numbers = [a if hasattr(a, "iloc") else dense(a.layers[max(a.layers)]) for a in (one, other)]
    return np.allclose(*numbers, equal_nan=True)


def test_a_label_value_that_was_never_seen_counts_as_unknown_and_is_told(model, counts, mask, caplog):
    model = Model.new(model.spec, *OPTIONS)
    for weight in model.denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    odd, empty, misspelt = counts.copy(), counts.copy(), counts.copy()
    for adata, value in ((odd, "Bb"), (empty, None)):
        adata.obs["cell_type"] = [value, value, *counts.obs["cell_type"][2:]]
    ask = {"mask": mask, "mean_only": True, "use_labels": True}
    out = model.impute(odd, **ask)
    assert np.array_equal(out.layers["imputed_mean"], model.impute(empty, **ask).layers["imputed_mean"])
    assert (out.uns["distdiff"]["labels_unseen"], out.uns["distdiff"]["conditioned_on"]) == (2, "cell_type")
    assert "2 of 200 cells have a value that the model never saw, such as 'Bb'; did you mean 'B'" in caplog.text
    with pytest.raises(ValueError, match=r"'Bb', which the model never saw.*unseen='unknown'"):
        model.impute(odd, **ask, unseen="refuse")
    with pytest.raises(ValueError, match="unseen='refsue'; did you mean 'refuse'"):
        model.impute(odd, **ask, unseen="refsue")
    misspelt.obs = misspelt.obs.rename(columns={"cell_type": "celltype"})
    with pytest.raises(ValueError, match=r"no column 'cell_type'; did you mean 'celltype'.*rename the column"):
        model.impute(misspelt, **ask)


@pytest.mark.parametrize("kind", ["impute", "denoise", "deepen"])
def test_files_say_what_they_were_conditioned_on(model, counts, mask, tmp_path, kind):
    from distdiff import batch

    counts.write_h5ad(tmp_path / "in.h5ad")
    sp.save_npz(tmp_path / "mask.npz", sp.csr_matrix(mask))
    more = {"impute": {"mask": str(tmp_path / "mask.npz")}, "deepen": {"times": 2, "beyond": "allow"}}.get(kind, {})
    for use in (False, True):
        batch.run(kind, model, tmp_path / "in.h5ad", tmp_path / f"{use}.h5ad", use_labels=use, **more)
        told = ad.read_h5ad(tmp_path / f"{use}.h5ad").uns["distdiff"]
        assert (told["conditioned_on"], told["labels_unseen"]) == ("cell_type" if use else "", 0)


def test_a_model_that_never_went_without_labels_is_not_asked_without(model, counts, mask):
    told = Model(model.process, model.denoiser, model.spec, model.options, {"config": {"train": {"label_dropout": 0}}})
    tasks = (lambda **o: told.impute(counts, mask=mask, **o), lambda **o: told.denoise(counts, **o),
             lambda **o: told.likelihood(counts, **o))  # fmt: skip
    for task in tasks:
        with pytest.raises(ValueError, match=r"trained with cell_type in every cell.*use_labels=True"):
            task()
        task(use_labels=True)
    with pytest.raises(ValueError, match="guidance=2 weighs labels, which are not used"):
        model.impute(counts, mask=mask, guidance=2)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (None, {"draws": 0, "mask": "mask"}, "draws must be at least 1, got 0; .*mean_only=True"),
        (None, {}, "nothing to impute: the input has all of the model's genes"),
        (None, {"mask": "maks"}, "mask='maks' is no layer.*did you mean 'mask'"),
        (None, {"mask": np.ones((3, 3))}, r"the mask has shape \(3, 3\), the input \(200, 30\)"),
        (None, {"mask": "mask", "sites": "dropout"}, "either a mask or sites"),
        (None, {"sites": "dropout"}, "needs groups"),
        (None, {"sites": "dropuot", "groups": "cell_type"}, "did you mean 'dropout'"),
        (None, {"sites": "dropout", "groups": "celltype"}, "did you mean 'cell_type'"),
        (None, {"mask": "mask", "method": "repant"}, "did you mean 'repaint'"),
        (lambda a: setattr(a, "var_names", [f"E{i}" for i in range(30)]), {"mask": "mask"}, "none of the input's 30"),
        (lambda a: a.__setattr__("X", a.X * 0.5), {"mask": "mask"}, "gene.*log-normalised"),
        (lambda a: a.__setattr__("X", a.X * -1), {"mask": "mask"}, "cell 'cell.*-1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(model, counts, mask, change, options, words):
    adata = counts.copy()
    adata.layers["mask"] = mask
    if change:
        change(adata)
    with pytest.raises(ValueError, match=words):
        model.impute(adata, **options)


def test_saved_and_loaded_models_answer_alike(model, counts, mask, tmp_path):
    model.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.json", "weights.safetensors"]
    again = distdiff.load(tmp_path / "model")
    assert again.spec.genes == model.spec.genes
    assert again.info["weights_sha256"] == model.info["weights_sha256"]
    assert again.options["denoiser"]["linear"] == 0  # defaults are saved: a later default changes nothing
    a, b = (m.impute(counts, mask=mask).layers["imputed"] for m in (model, again))
    assert (a == b).all()


def test_damaged_models_are_named(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="no model folder at"):
        distdiff.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no distdiff model"):
        Model.load(tmp_path)
    with pytest.raises(ValueError, match=r"use distdiff\.load for models:/"):
        Model.load("models:/x@champion")
    card = (tmp_path / "model" / "model.json").read_text()
    (tmp_path / "model" / "model.json").write_text(card.replace('"format": 2', '"format": 99'))
    with pytest.raises(ValueError, match="model format 99"):
        Model.load(tmp_path / "model")
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="is damaged"):
        Model.load(tmp_path / "model")


@pytest.mark.parametrize(("given", "out"), [("h5ad", "h5ad"), ("zarr", "zarr"), ("h5ad", "zarr"), ("zarr", "h5ad")])
def test_files_hold_what_the_input_held_plus_layers(model, counts, mask, tmp_path, given, out):
    counts = counts.copy()
    counts.uns["note"], counts.obsm["pca"] = "kept", np.arange(400.0).reshape(200, 2)
    source, target = tmp_path / f"in.{given}", tmp_path / f"out.{out}"
    if given == "h5ad":
        counts.write_h5ad(source)
    else:
        batch.write_anndata(counts, source)
    sp.save_npz(tmp_path / "mask.npz", sp.csr_matrix(mask))
    filled = impute_file(model, source, target, mask=str(tmp_path / "mask.npz"), draws=2, progress=False)
    written = ad.read_h5ad(target) if out == "h5ad" else ad.read_zarr(target)
    want = model.impute(counts, mask=mask, draws=2)
    assert (dense(written.X) == dense(counts.X)).all()
    assert written.uns["note"] == "kept"
    assert (written.obsm["pca"] == counts.obsm["pca"]).all()
    for name in ("imputed_mean", "imputed", "imputed_draw2"):
        assert (written.layers[name] == want.layers[name]).all()
    assert written.uns["distdiff"]["targets"] == filled.targets
    assert written.uns["distdiff"]["input"] == source.name
    with pytest.raises(FileExistsError, match="overwrite=True"):
        impute_file(model, source, target, mask=str(tmp_path / "mask.npz"))
    impute_file(model, source, target, mask=str(tmp_path / "mask.npz"), overwrite=True, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"in.{given}", "mask.npz", f"out.{out}"])


def test_a_store_and_a_panel_as_files(model, counts, atlas, tmp_path):
    impute_file(model, atlas, tmp_path / "out.h5ad", sites="dropout", groups="cell_type", progress=False)
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    kept = counts[written.obs_names]
    assert len(written) == 199  # the empty cell never entered the store
    assert (dense(written.X) == dense(kept.X)).all()
    counts[:, 5:].write_h5ad(tmp_path / "panel.h5ad")
    impute_file(model, tmp_path / "panel.h5ad", tmp_path / "panel.zarr", progress=False)
    panel = ad.read_zarr(tmp_path / "panel.zarr")
    assert panel.shape == (200, 30)
    assert (panel.layers["imputed_mean"][:, -5:].sum(1) > 0).sum() == 199


def test_mean_only_writes_the_mean_only(model, counts, mask, tmp_path):
    counts.write_h5ad(tmp_path / "in.h5ad")
    options = {"sites": "dropout", "groups": "cell_type", "mean_only": True}
    impute_file(model, tmp_path / "in.h5ad", tmp_path / "out.h5ad", progress=False, layers=("mean",), **options)
    assert list(ad.read_h5ad(tmp_path / "out.h5ad").layers) == ["imputed_mean"]
    assert list(model.impute(counts, **options).layers) == ["imputed_mean", "imputed_mask"]
    assert list(model.impute(counts, layers=["mean"], **options).layers) == ["imputed_mean"]


def test_outputs_that_cannot_be(model, counts, tmp_path):
    counts.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(ValueError, match=r"must end in .h5ad or .zarr"):
        impute_file(model, tmp_path / "in.h5ad", tmp_path / "out.csv")
    with pytest.raises(ValueError, match="is the input itself"):
        impute_file(model, tmp_path / "in.h5ad", tmp_path / "in.h5ad", overwrite=True)
    (tmp_path / "broken.h5ad").write_bytes((tmp_path / "in.h5ad").read_bytes()[:3000])
    with pytest.raises(ValueError, match="truncated"):
        impute_file(model, tmp_path / "broken.h5ad", tmp_path / "out.h5ad")


def test_whole_keeps_the_old_until_the_new_is_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def interrupted():
        with files.whole(target, overwrite=True) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with files.whole(target, overwrite=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
