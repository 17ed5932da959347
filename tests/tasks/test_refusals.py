"""What a user may get wrong is answered by a sentence that names it; what cannot be answered well is warned of."""

from __future__ import annotations

import inspect
import logging
import typing

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import distdiff
from distdiff import batch
from distdiff.data.ingest.shard import shard
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.training import loop
from distdiff.types import DataSpec

N, G = 20, 10
GENES = tuple(f"gene{i}" for i in range(G))
HIDDEN = np.random.default_rng(1).random((N, G)) < 0.3


@pytest.fixture(scope="module")
def model() -> Model:
    spec = DataSpec(GENES, {"day": ("0", "1")}, np.ones(G, dtype=np.float32))
    made = Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    made.info["depth"] = {"q01": 8.0, "q50": 100.0, "q99": 1e6}
    return made


@pytest.fixture
def cells() -> ad.AnnData:
    x = np.random.default_rng(0).poisson(3.0, (N, G)).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(x), var=pd.DataFrame(index=list(GENES)))


CALLS = {
    "impute": lambda model, cells, **given: model.impute(cells, mask=HIDDEN, **given),
    "complete": lambda model, cells, **given: model.complete(cells[:, : G - 2].copy(), **given),
    "denoise": lambda model, cells, **given: model.denoise(cells, **given),
    "deepen": lambda model, cells, **given: model.deepen(cells, 1.5, **given),
    "latent": lambda model, cells, **given: model.latent(cells, **given),
    "likelihood": lambda model, cells, **given: model.likelihood(cells, **given),
    "generate": lambda model, cells, **given: model.generate(3, **given),
}
WORDS = [
    (task, name)
    for task in CALLS
    for name, hint in inspect.get_annotations(getattr(Model, task), eval_str=False).items()
    if "Literal[" in str(hint)
]


@pytest.mark.parametrize("task", CALLS)
def test_each_task_is_called_right(model, cells, task):
    CALLS[task](model, cells)


@pytest.mark.parametrize(("task", "name"), WORDS)
def test_a_misspelt_word_is_named(model, cells, task, name):
    with pytest.raises(ValueError, match="alow"):
        CALLS[task](model, cells, **{name: "alow"})


def test_words_are_found():
    assert {("deepen", "beyond"), ("impute", "method"), ("latent", "unseen")} <= set(WORDS)
    assert typing.get_origin(typing.Literal["a"]) is typing.Literal


WRONG = [
    ("impute", {"ood": -1}, "ood=-1: give the network calls"),
    ("denoise", {"ood": -1}, "ood=-1: give the network calls"),
    ("deepen", {"ood": 0.5}, "ood=0.5: give the network calls"),
    ("likelihood", {"levels": 0}, "got levels=0"),
    ("likelihood", {"levels": -1}, "got levels=-1"),
    ("impute", {"jump": 3}, r"jump= is an option of method='repaint', not of 'conditional'"),
    ("impute", {"method": "repaint", "readout": "log1p"}, r"readout= is an option of method='conditional'"),
    ("impute", {"draws": 1.5}, r"draws=1\.5: a whole number is wanted"),
    ("impute", {"draws": "3"}, "draws='3': a whole number is wanted"),
    *((task, {"seed": 1.5}, r"seed=1\.5: a whole number is wanted") for task in ("impute", "deepen", "generate")),
    ("impute", {"layers": ["qq"]}, "unknown layer 'qq'"),
    ("impute", {"layers": "mean"}, r"layers='mean': a list of names is wanted"),
    *((task, {"batch_size": 2.5}, r"batch_size=2\.5: a whole number of cells") for task in CALLS),
    *((task, {"device": "gpu"}, r"device='gpu' is not to be had here; choose one of auto, cpu") for task in CALLS),
    *((task, {"device": "cuda:99"}, r"device='cuda:99' is not to be had here") for task in CALLS),
    ("generate", {"guidance": float("nan")}, "guidance=nan: a weight is a finite number"),
    ("generate", {"obs": {"day": 7}}, "the model never saw day '7'"),
    ("generate", {"obs": {"weekday": 1}}, "not trained with label 'weekday'"),
]


@pytest.mark.parametrize(("task", "given", "said"), WRONG)
def test_what_is_wrong_is_said(model, cells, task, given, said):
    with pytest.raises(ValueError, match=said):
        CALLS[task](model, cells, **given)


@pytest.mark.parametrize("value", [1, 1.0, np.int64(1), "1", [1, 1, "1"]])
def test_labels_that_are_numbers_are_asked_for_as_numbers(model, value):
    assert list(model.generate(3, {"day": value}).obs["day"]) == ["1"] * 3


@pytest.mark.parametrize("thing", ["a.h5ad", None, np.ones((2, G)), pd.DataFrame(np.ones((2, G)))])
def test_what_is_no_anndata_is_named(model, thing):
    for call in (model.denoise, model.latent, lambda x: model.impute(x, mask=HIDDEN[:2])):
        with pytest.raises(TypeError, match=f"an AnnData is wanted, got {type(thing).__name__}"):
            call(thing)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_mask_of_fractions_is_refused(model, cells, value):
    mask = HIDDEN.astype(float)
    mask[3, 4] = value
    for given in (mask, sp.csr_matrix(mask)):
        with pytest.raises(ValueError, match=rf"the mask holds {value:g} in row 3, column 4"):
            model.impute(cells, mask=given)


def test_nobody_sees_what_stands_under_a_mask(model, cells, caplog):
    """Of a cell that is masked whole there is nothing to go by; its counts are no answer."""
    mask = HIDDEN.copy()
    mask[5] = True
    with caplog.at_level(logging.WARNING, logger="distdiff"):
        out = model.impute(cells, mask=mask, layers=["mean", "draws", "mask", "sd", "q5"])
    assert "1 cells without evidence" in caplog.text
    assert not out.layers["imputed_mask"][5].nnz
    for name in ("imputed_mean", "imputed", "imputed_sd", "imputed_q5"):
        assert not out.layers[name][5].any()
    assert cells.X[5].sum() > 0


@pytest.mark.parametrize(("task", "blind", "few"), [("denoise", 10, 10), ("impute", 15, 5)])
def test_shallow_cells_are_warned_of(model, cells, caplog, task, blind, few):
    """A molecule in each of the first ten cells; in the imputation the last five genes are hidden."""
    alone = ad.AnnData(sp.csr_matrix(np.eye(N, G, dtype=np.float32)), var=cells.var)
    given = {"mask": np.arange(G) >= np.full((N, 1), 5)} if task == "impute" else {}
    with caplog.at_level(logging.WARNING, logger="distdiff"):
        out = getattr(model, task)(alone, **given)
    assert f"{task}: {blind} cells without evidence" in caplog.text
    assert f"{task}: {few} of 20 cells show fewer molecules than 99 % of the training cells" in caplog.text
    assert out.uns["distdiff"]["cells_shallower_than_trained"] == few
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="distdiff"):
        getattr(model, task)(cells, **given)
    assert not caplog.text


def test_a_path_with_dots_is_the_same_store(atlas, tmp_path, monkeypatch):
    link = tmp_path / "atlas.zarr"
    link.symlink_to(atlas)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    store = CountStore.open("../atlas.zarr")
    assert store.path == link  # links keep their names
    assert store.labels(store.rows("test"))["cell_type"].tolist() == CountStore.open(atlas).labels(store.rows("test"))[
        "cell_type"].tolist()  # fmt: skip


def test_labels_are_a_list(cells, tmp_path):
    cells.obs["cell_type"] = "B"
    for call in (
        lambda: distdiff.train(cells, labels="cell_type", progress=False),
        lambda: distdiff.shard(cells, tmp_path / "a.zarr", labels="cell_type"),
        lambda: shard(["a.h5ad"], tmp_path / "a.zarr", labels="cell_type"),
    ):
        with pytest.raises(ValueError, match=r"labels='cell_type': a list of names is wanted"):
            call()


def test_counts_in_memory_are_called_so(cells, tmp_path):
    cells.X[2, 3] = -1
    with pytest.raises(ValueError, match="AnnData: cell") as error:
        distdiff.shard(cells, tmp_path / "a.zarr", progress=False)
    assert ".counts-" not in str(error.value)


def test_a_missing_file_of_genes_is_called_missing(tmp_path):
    from distdiff.cli import _genes

    with pytest.raises(FileNotFoundError, match=r"reliable\.txt does not exist; a file of gene names"):
        _genes("report/reliable.txt")
    assert _genes("CD3E,MS4A1") == ["CD3E", "MS4A1"]


def test_a_model_of_ten_cells_is_whole(tmp_path):
    """One validation cell has no variance: what needs it is not measured, and the model can be read."""
    x = np.random.default_rng(0).poisson(3.0, (10, 8)).astype(np.float32)
    quiet = {"evaluate": {"enabled": False}, "tracking": {"enabled": False}, "progress": False}
    distdiff.train(ad.AnnData(x), out=tmp_path / "ten", cells=64, batch=8, grain=8, width=8, **quiet)
    model = distdiff.load(tmp_path / "ten" / "model")
    with pytest.raises(ValueError, match=r"spacing='variance' needs info\['excess'\]"):
        model.generate(2, spacing="variance")


def test_a_batch_beyond_the_memory_is_refused(monkeypatch, tmp_path):
    x = np.random.default_rng(0).poisson(3.0, (40, 8)).astype(np.float32)
    quiet = {"evaluate": {"enabled": False}, "tracking": {"enabled": False}, "progress": False}
    free = type("Memory", (), {"available": 20 * 4 * 1023 * 8})
    monkeypatch.setattr(loop.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ValueError, match=r"train\.batch: 1,024 cells of 8 genes need"):
        distdiff.train(ad.AnnData(x), out=tmp_path / "run", cells=64, batch=1024, width=8, **quiet)


def test_a_label_that_was_left_out_is_told_of(atlas, tmp_path, capsys):
    quiet = {"evaluate": {"enabled": False}, "tracking": {"enabled": False}}
    model = distdiff.train(str(atlas), out=tmp_path / "run", cells=64, batch=32, width=8, **quiet)
    assert "the store's labels cell_type" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"not trained with label 'cell_type'; train one with data\.labels=\[cell_type\]"
    ):
        model.generate(2, {"cell_type": "B"})


def test_zero_cells_are_not_the_default(model, atlas):
    with pytest.raises(ValueError, match=r"evaluate\.cells must be at least 1"):
        distdiff.evaluate(model, str(atlas), cells=0, progress=False)


def test_the_command_names_what_is_wrong(model, cells, tmp_path):
    cells.write_h5ad(tmp_path / "a.h5ad")
    for given, said in (({"beyond": "alow", "times": 2.0}, "beyond='alow'"), ({"ood": -1, "times": 2.0}, "ood=-1")):
        with pytest.raises(ValueError, match=said):
            batch.run("deepen", model, tmp_path / "a.h5ad", tmp_path / "b.h5ad", progress=False, **given)
        assert not (tmp_path / "b.h5ad").exists()
