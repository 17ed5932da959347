"""The Python interface: train, shard and evaluate from what scanpy users have."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import distdiff
from distdiff import config

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
    assert model.denoise(counts).layers["denoised"].shape == counts.shape
    finished = distdiff.train(counts, labels=["cell_type"], out=tmp_path / "run", **QUICK)  # nothing is left to do
    assert finished.info["weights_sha256"] == model.info["weights_sha256"]


def test_train_without_a_folder_leaves_none(counts, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    assert distdiff.train(counts, **QUICK).spec.n_genes == 30
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
