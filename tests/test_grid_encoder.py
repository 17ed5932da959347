"""scFID by an encoder of scvi-tools: the same latents as its own, and nothing in the file is run."""

from __future__ import annotations

import collections
import copy
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from distdiff import grid
from distdiff.data.store.store import CountStore
from distdiff.grid import encoder
from distdiff.grid.spec import read

SMALL = {
    "resamples": [5, 5], "cells": 20, "draws": 2, "protocols": [{"protocol": "mcar", "rate": 0.3}], "answers": ["mean"],
    "scores": ["frechet"], "rows": [{"kind": "gene_mean", "depth": True}, {"kind": "zero"}],
}  # fmt: skip


def write(folder, **parts):
    folder.mkdir(exist_ok=True)
    torch.save(parts, folder / encoder.FILE)
    return str(folder)


class Ran:
    """A pickle that runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_file_is_run(tmp_path):
    folder = write(tmp_path / "evil", var_names=Ran(f"touch {tmp_path}/ran"))
    with pytest.raises(ValueError, match=r"model.pt holds (posix|nt).system, and only arrays and plain values"):
        encoder._read(encoder.checked(folder))
    assert not (tmp_path / "ran").exists()
    named = write(tmp_path / "other", var_names=collections.deque([1]))
    with pytest.raises(ValueError, match=r"holds collections.deque, and only arrays"):
        encoder._read(encoder.checked(named))


def test_arrays_and_plain_values_are_read(tmp_path):
    inner = collections.defaultdict(dict, {"X": {"names": np.array(["a", "b"], dtype=object)}})
    folder = write(tmp_path / "fine", of=inner, n=np.float64(2.5), at=np.arange(3), flag=np.bool_(True), text=b"x")
    found = encoder._read(encoder.checked(folder))
    assert found["of"]["X"]["names"].tolist() == ["a", "b"]
    assert type(found["of"]) is dict
    assert found["n"] == 2.5
    assert found["at"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04" + b"\0" * 40])
def test_a_damaged_file_is_one_sentence(content, tmp_path):
    (tmp_path / encoder.FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"model.pt cannot be read as a file of torch: [^\n]*$"):
        encoder._read(tmp_path / encoder.FILE)


def test_an_encoder_is_checked_before_anything_runs(tmp_path):
    spec = {**SMALL, "data": {"a": {"store": "a.zarr"}}}
    with pytest.raises(ValueError, match=r"holds no model\.pt; give the folder that scvi-tools"):
        read({**spec, "encoder": str(tmp_path)})
    with pytest.raises(ValueError, match="is of the score frechet; add it to scores"):
        read({**spec, "encoder": str(tmp_path), "scores": ["cells"]})


def test_without_the_library_the_score_says_how_to_get_it(atlas, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi.module", None)
    monkeypatch.setitem(sys.modules, "scvi", None)
    folder = write(tmp_path / "m", var_names=["a"])
    result = grid.run({**SMALL, "encoder": folder}, tmp_path / "out", data=[str(atlas)], progress=False)
    assert "- no score 'frechet': an encoder of scvi-tools needs scvi-tools: pip install" in result.markdown


@pytest.fixture(scope="module")
def saved(atlas, tmp_path_factory):
    """A trained SCVI of the training cells, its folder, and its own latents of them."""
    scvi = pytest.importorskip("scvi")
    import anndata

    from distdiff.baselines.scvi import _quiet

    store, folder = CountStore.open(str(atlas)), tmp_path_factory.mktemp("scvi") / "model"
    data = anndata.AnnData(store.read(store.rows("train")).astype(np.float32))
    data.var_names = list(store.genes)
    with _quiet(0):
        scvi.model.SCVI.setup_anndata(data)
        model = scvi.model.SCVI(data, n_latent=4, n_hidden=16)
        model.train(
            max_epochs=2, accelerator="cpu", devices=1, enable_progress_bar=False, logger=False,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        model.save(str(folder))
        return store, folder, model.get_latent_representation(data)


def test_latents_are_those_of_scvi_tools(saved):
    store, folder, wanted = saved
    counts = store.read(store.rows("train")).toarray().astype(np.float32)
    state = torch.random.get_rng_state()
    made = encoder.Scvi(str(folder), store.genes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert made(counts) == pytest.approx(wanted, abs=1e-5)
    order = np.random.default_rng(0).permutation(len(store.genes))[:20]  # a store with other genes in another order
    few = np.zeros_like(counts)
    few[:, order] = counts[:, order]
    moved = encoder.Scvi(str(folder), [*(store.genes[i] for i in order), "new"])
    assert moved(np.c_[counts[:, order], counts[:, :1]]) == pytest.approx(made(few), abs=1e-5)
    with pytest.raises(ValueError, match="the store has 1 of its 30 genes, at least 50% are wanted"):
        encoder.Scvi(str(folder), store.genes[:1])


def test_a_grid_scores_by_the_encoder_and_says_so(saved, atlas, tmp_path):
    _, folder, _ = saved
    shutil.copytree(folder, tmp_path / "m")
    with_it = {**SMALL, "encoder": str(tmp_path / "m")}
    result = grid.run(with_it, tmp_path / "out", data=[str(atlas)], progress=False)
    assert "| log scFID (scVI) |" in result.markdown
    assert "(PCA)" not in result.markdown
    found = result.table[result.table.metric == "log_frechet_scvi"].set_index("row")
    assert found.value["gene mean x depth"] < found.value["none (zero)"]
    assert (found.error > 0).all()
    weights = torch.load(tmp_path / "m" / encoder.FILE, weights_only=False)
    for change, said in (
        (lambda w: w["attr_dict"]["registry_"].update(model_name="LDVAE"), "is a model 'LDVAE' of scvi-tools"),
        (lambda w: w["attr_dict"]["init_params_"]["non_kwargs"].update(n_hidden=9), "builds no such encoder"),
        (lambda w: w["attr_dict"]["init_params_"]["non_kwargs"].update(encode_covariates=True), "takes batches"),
        (lambda w: w["attr_dict"].pop("init_params_"), "it lacks 'init_params_'"),
    ):
        broken = copy.deepcopy(weights)
        change(broken)
        torch.save(broken, tmp_path / "m" / encoder.FILE)  # another file: the cells are computed again
        result = grid.run(with_it, tmp_path / "out", data=[str(atlas)], progress=False)
        assert "- no score 'frechet': " in result.markdown
        assert said in result.markdown
