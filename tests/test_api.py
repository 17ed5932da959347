"""The Python interface: train, shard and evaluate from what scanpy users have."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import distdiff
from distdiff import batch, config
from distdiff.model import Model

QUICK = {
    "cells": 64, "batch": 32, "width": 8, "depth": 1, "eval_cells": 64, "progress": False,
    "evaluate": {"enabled": False}, "tracking": {"enabled": False},
}  # fmt: skip


def forms(counts: ad.AnnData, folder: Path) -> dict[str, object]:
    """The same counts as a user may hold them."""
    path = folder / "counts.h5ad"
    counts.write_h5ad(path)
    dense = counts.copy()
    dense.X = dense.X.toarray()
    in_layer = counts.copy()
    in_layer.layers["counts"] = counts.X.copy()
    in_layer.X = counts.X.log1p()
    return {
        "memory": counts, "dense": dense, "layer": in_layer, "path": path, "text": str(path),
        "backed": ad.read_h5ad(path, backed="r"), "lazy": ad.experimental.read_lazy(path), "list": [path],
        "view": counts[:, :],
    }  # fmt: skip


@pytest.mark.parametrize("form", ["memory", "dense", "layer", "path", "text", "backed", "lazy", "list", "view"])
def test_the_same_counts_in_any_form_make_the_same_store(form, counts, tmp_path):
    data = forms(counts, tmp_path)
    wanted = distdiff.shard(data["path"], tmp_path / "wanted.zarr", labels=["cell_type"], progress=False)
    layer = "counts" if form == "layer" else None
    found = distdiff.shard(data[form], tmp_path / "found.zarr", layer=layer, labels=["cell_type"], progress=False)
    assert found.fingerprint == wanted.fingerprint
    assert found.labels == {"cell_type": ["B", "T"]} or tuple(found.labels["cell_type"]) == ("B", "T")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["counts.h5ad", "found.zarr", "wanted.zarr"]


def test_several_objects_are_one_store(counts, tmp_path):
    parts = [counts[:120].copy(), counts[120:].copy()]
    found = distdiff.shard(parts, tmp_path / "atlas.zarr", progress=False)
    assert found.n_cells == 199  # one cell is empty
    with pytest.raises(ValueError, match="either AnnData objects or paths"):
        distdiff.shard([counts, tmp_path / "x.h5ad"], tmp_path / "mixed.zarr")


def test_train_from_an_anndata_goes_the_whole_way(counts, tmp_path):
    model = distdiff.train(counts, labels=["cell_type"], out=tmp_path / "run", **QUICK)
    assert model.spec.labels == {"cell_type": ("B", "T")}
    again = distdiff.load(tmp_path / "run" / "model")
    assert again.info["weights_sha256"] == model.info["weights_sha256"]
    assert again.info["name"] == "distdiff-run"  # in the registry: champions of other data do not mix
    assert model.denoise(counts).layers["denoised"].shape == counts.shape
    finished = distdiff.train(counts, labels=["cell_type"], out=tmp_path / "run", **QUICK)  # nothing is left to do
    assert finished.info["weights_sha256"] == model.info["weights_sha256"]


def test_train_without_a_folder_leaves_none(counts, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    model = distdiff.train(counts, **QUICK)
    assert model.spec.n_genes == 30
    assert model.info["name"] == f"distdiff-{model.info['data'][:8]}"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("distdiff")]


def test_train_on_a_store(atlas, tmp_path):
    for data in (atlas, str(atlas), distdiff.CountStore.open(atlas)):
        model = distdiff.train(data, out=tmp_path / "run", **QUICK)
        assert model.info["data"] == distdiff.CountStore.open(atlas).manifest.fingerprint
    assert not (tmp_path / "run" / "atlas.zarr").exists()


def test_a_store_of_ones_own_is_not_replaced(counts, atlas, tmp_path):
    with pytest.raises(FileExistsError):
        distdiff.train(counts, store=atlas, out=tmp_path / "run", **QUICK)


def test_keys_of_the_config_are_arguments(counts, tmp_path):
    latent = {**QUICK, "denoiser": {"kind": "latent"}, "width": 16, "seed": 3, "ema": 0.9}
    model = distdiff.train(counts, config={"optim": {"lr": 2e-3}}, out=tmp_path, **latent)
    used = model.info["config"]
    assert (used["optim"]["lr"], used["optim"]["ema"], used["train"]["seed"]) == (2e-3, 0.9, 3)
    assert (used["denoiser"]["kind"], used["denoiser"]["width"]) == ("latent", 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 1}, "unknown argument 'learning_rate'"),
        ({"epoch": 1}, "unknown argument 'epoch'"),
        ({"kind": "mlp"}, "key of several sections"),
        ({"optim": 3}, r"optim=3: a section of the config is given as a mapping"),
        ({"config": "defualt"}, "is no file and none of .*did you mean 'default'"),
        ({"labels": ["celltype"]}, "obs has no column 'celltype'.*cell_type"),
        ({"layer": "cuonts"}, "no layer 'cuonts'"),
        ({"lr": -1}, "optim.lr"),
    ],
)
def test_a_wrong_argument_is_named_before_any_work(settings, message, counts, tmp_path):
    with pytest.raises(ValueError, match=message):
        distdiff.train(counts, out=tmp_path / "run", **{**QUICK, **settings})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_evaluate_counts_and_stores(counts, atlas, tmp_path):
    model = distdiff.train(atlas, out=tmp_path / "run", **QUICK)
    for data in (atlas, counts):
        report = distdiff.evaluate(model, data, cells=10, draws=2, repaint_steps=0, progress=False)
        assert "distdiff" in report.to_text()


def test_configs_ship_by_name():
    assert {"default", "dev", "attention", "published"} <= set(config.shipped())
    for name in config.shipped():
        assert config.load(name).digest() == config.load(config.shipped()[name]).digest()


def test_measurements_are_refused(counts, tmp_path):
    log = counts.copy()
    log.X = sp.csr_matrix(np.log1p(counts.X.toarray()))
    with pytest.raises(ValueError, match="is not a whole number"):
        distdiff.train(log, out=tmp_path / "run", **QUICK)


def test_train_is_silent_on_request(counts, tmp_path, capfd):
    settings = {**QUICK, "evaluate": {"enabled": True, "repaint_steps": 0, "cells": 10, "draws": 2}}
    distdiff.train(counts, out=tmp_path / "a", **settings)
    assert capfd.readouterr() == ("", "")
    distdiff.train(counts, out=tmp_path / "b", **{**settings, "progress": True})
    told = capfd.readouterr()
    assert "distdiff train: 199 cells x 30 genes" in told.out
    assert "train:" in told.err
    assert "evaluate:" in told.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"genes": ["gene1"]}, r"train: genes=\.\.\. was decided when the store .* built"),
        ({"genes": "hvg:10"}, r"genes=hvg:10 was decided"), ({"layer": "counts"}, r"layer=counts was decided"),
        ({"split_by": "donor"}, "split_by=donor was decided"),
        ({"store": "other.zarr"}, "store=other.zarr was decided"),
    ],
)  # fmt: skip
def test_a_store_is_not_asked_again_what_it_was_built_with(given, message, atlas, tmp_path):
    for data in (atlas, distdiff.CountStore.open(atlas)):
        with pytest.raises(ValueError, match=message):
            distdiff.train(data, out=tmp_path / "run", **QUICK, **given)


def test_a_model_says_what_it_is(counts, tmp_path, caplog):
    model = distdiff.train(counts, labels=["cell_type"], out=tmp_path / "run", **QUICK)
    told = model.info["training"]
    assert told["cells"] == sum(told["labels"]["cell_type"].values()) == 159
    store = distdiff.CountStore.open(tmp_path / "run" / "atlas.zarr")
    depths = store.read(store.rows("train")).sum(1)
    assert (told["depth"][0], told["depth"][-1]) == (depths.min(), depths.max())
    assert told["depth"][4] == np.median(np.asarray(depths))
    text = repr(distdiff.load(tmp_path / "run" / "model"))
    most = max(told["labels"]["cell_type"], key=told["labels"]["cell_type"].get)
    assert f"cell_type (2, training cells of each): {most} {told['labels']['cell_type'][most]}" in text
    for word in ("30: gene0", "159 of training", "val/deviance", "atlas.zarr", str(tmp_path / "run" / "model")):
        assert word in text
    assert len(text.splitlines()) < 10
    model.info["training"]["labels"]["cell_type"]["T"] = 100
    model.info["training"]["labels"]["cell_type"]["B"] = 99
    model.generate(4, {"cell_type": ["B", "T", "B", "T"]}, steps=2)
    assert [m for m in caplog.messages if "generate" in m] == [
        "generate: cell_type 'B' had 99 training cells, fewer than 100; what is made of it is a guess"
    ]
    del model.info["training"]  # of an earlier version
    model.save(tmp_path / "old")
    old = distdiff.load(tmp_path / "old")
    assert "cell_type (2): B, T" in repr(old)
    old.generate(2, {"cell_type": "B"}, steps=2)


def test_latent_states_in_memory_and_on_files(counts, atlas, tmp_path):
    spec = distdiff.CountStore.open(atlas).spec(("cell_type",))
    model = Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1})
    given = counts.copy()
    given.obsm["pca"] = np.ones((200, 2))
    given.uns["distdiff"] = {"task": "generate"}
    out = model.latent(given, batch_size=64)
    assert "X_distdiff" not in given.obsm
    assert out.obsm["X_distdiff"].dtype == np.float32
    assert out.obsm["X_distdiff"].shape == (200, 16)
    assert (out.obsm["pca"] == 1).all()
    assert model.latent(given, copy=False, key_added="where") is None
    assert np.allclose(given.obsm["where"], out.obsm["X_distdiff"], atol=1e-5)
    assert given.uns["distdiff"] == {"task": "generate"}  # of X, which latent does not touch
    given.obsm["X_distdiff"] = np.zeros((200, 3))  # of another model
    given.write_h5ad(tmp_path / "a.h5ad")
    for name, read in (("b.h5ad", ad.read_h5ad), ("b.zarr", ad.read_zarr)):
        batch.run("latent", model, tmp_path / "a.h5ad", tmp_path / name, progress=False)
        found = read(tmp_path / name)
        assert np.allclose(found.obsm["X_distdiff"], out.obsm["X_distdiff"], atol=1e-5)
        assert (found.obsm["pca"] == 1).all()
        assert (found.X != counts.X).nnz == 0
        assert (found.uns["distdiff"]["task"], found.uns["distdiff_latent"]["task"]) == ("generate", "latent")
    batch.run("latent", model, atlas, tmp_path / "c.zarr", progress=False)
    assert ad.read_zarr(tmp_path / "c.zarr").obsm["X_distdiff"].shape == (199, 16)


def test_denoise_copies_the_input_once(counts, atlas, monkeypatch):
    spec = distdiff.CountStore.open(atlas).panel([f"gene{i}" for i in range(20)]).spec(())
    model = Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    copies, copy = [], ad.AnnData.copy
    monkeypatch.setattr(ad.AnnData, "copy", lambda self, *a: copies.append(self.shape) or copy(self, *a))
    assert model.denoise(counts).shape == (200, 20)
    assert copies == [(200, 20)]
    assert list(model.denoise(counts, genes=["gene3", "gene1"]).var_names) == ["gene3", "gene1"]
    got = model.impute(counts, mask=np.ones((200, 30), bool), genes=["gene3", "gene1"], mean_only=True)
    want = model.impute(counts, mask=np.ones((200, 30), bool), mean_only=True)[:, ["gene3", "gene1"]]
    assert (got.layers["imputed_mean"] == want.layers["imputed_mean"]).all()


def test_evaluate_knows_labels_by_their_values(counts, tmp_path):
    model = distdiff.train(counts, labels=["cell_type"], out=tmp_path / "run", label_dropout=0.0, **QUICK)
    other = counts[counts.obs["cell_type"] == "T"].copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(str)
    report = distdiff.evaluate(model, other, cells=10, draws=2, repaint_steps=0, progress=False)  # T is code 0 there
    assert "distdiff" in report.to_text()
    del other.obs["cell_type"]
    with pytest.raises(ValueError, match=r"has no label 'cell_type', without which this model has no answer"):
        distdiff.evaluate(model, other, cells=10, progress=False)
