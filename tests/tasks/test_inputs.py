"""Inputs of the tasks in Python and on files: whatever holds the same counts gives the same answer."""

from __future__ import annotations

import logging

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import distdiff
from distdiff import batch
from distdiff.data.ingest import container
from distdiff.model import Model
from distdiff.types import DataSpec

N, G = 20, 10
GENES = tuple(f"gene{i}" for i in range(G))
QUIET = {"progress": False, "batch_size": 64, "precision": "float32", "device": "cpu"}

pytestmark = pytest.mark.filterwarnings("ignore:.*not unique")


@pytest.fixture(scope="module")
def model() -> Model:
    made = Model.new(
        DataSpec(GENES, {}, np.ones(G, dtype=np.float32)), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1}
    )
    made.info["depth"] = {"q01": 1.0, "q50": 100.0, "q99": 1e6}
    return made


def cells(genes=GENES) -> ad.AnnData:
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1.0, 2.0, (N, len(genes)))).astype(np.float32)
    x[:, 0] += 1
    obs = pd.DataFrame({"donor": [f"d{i % 2}" for i in range(N)]}, index=[f"cell{i}" for i in range(N)])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=list(genes)))


HIDDEN = np.random.default_rng(1).random((N, G)) < 0.3

TASKS = {
    "impute": lambda model, a: dense(model.impute(a, mask=HIDDEN[: a.n_obs, : a.n_vars]).layers["imputed"]),
    "complete": lambda model, a: dense(model.complete(a[:, : G - 2]).layers["imputed_mean"]),
    "denoise": lambda model, a: dense(model.denoise(a).layers["denoised"]),
    "deepen": lambda model, a: dense(model.deepen(a, 1.5).layers["deepened"]),
    "likelihood": lambda model, a: model.likelihood(a).to_numpy(),
}


def dense(x):
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def in_other_hands(kind: str, a: ad.AnnData, folder) -> ad.AnnData:
    """The same cells, held otherwise."""
    path = folder / "a.h5ad"
    if kind.startswith("backed"):
        a.write_h5ad(path)
        return ad.read_h5ad(path, backed=kind.removeprefix("backed "))
    if kind == "read_lazy":
        pytest.importorskip("xarray")
        a.write_h5ad(path)
        return ad.experimental.read_lazy(path)
    made = a.copy()
    if kind.startswith("dask"):
        da = pytest.importorskip("dask.array")
        made.X = da.from_array(a.X.toarray(), chunks=(7, -1))
        if kind == "dask of CSR":
            made.X = made.X.map_blocks(sp.csr_matrix)
        return made
    return ad.AnnData(dense(a.X).astype(kind), obs=a.obs, var=a.var)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "kind", ["backed r", "backed r+", "read_lazy", "dask", "dask of CSR", "float16", ">f4", ">i4", "uint8"]
)
def test_however_the_counts_are_held(model, tmp_path, task, kind):
    a = cells()
    held = in_other_hands(kind, a, tmp_path)
    assert np.array_equal(TASKS[task](model, held), TASKS[task](model, a))
    if kind.startswith("backed"):
        assert held.isbacked
        assert held.file.is_open, "the input was closed"
        held.file.close()


@pytest.mark.parametrize("dtype", [">f4", "float16"])
def test_sparse_matrices_in_dtypes_that_scipy_has_not(model, dtype):
    a = cells()
    x = sp.csr_matrix(a.X)
    x.data = x.data.astype(dtype)
    odd = ad.AnnData(a.X.copy(), obs=a.obs, var=a.var)
    odd._X = x
    assert np.array_equal(TASKS["denoise"](model, odd), TASKS["denoise"](model, a))


@pytest.mark.parametrize("task", TASKS)
def test_truth_values_are_zeros_and_ones(model, task):
    a = cells()
    one = ad.AnnData((a.X > 0).astype(np.float32), obs=a.obs, var=a.var)
    for x in (a.X > 0, dense(a.X) > 0):
        assert np.array_equal(TASKS[task](model, ad.AnnData(x, obs=a.obs, var=a.var)), TASKS[task](model, one))


@pytest.mark.parametrize("task", TASKS)
def test_no_cells_are_refused_and_one_gene_is_not(model, task):
    a = cells()
    with pytest.raises(ValueError, match="AnnData has no cells; give an input with at least one"):
        TASKS[task](model, a[:0].copy())
    assert len(TASKS[task](model, a[:, :1].copy())) == N


def test_masks_of_every_kind(model):
    a = cells()
    want = dense(model.impute(a, mask=HIDDEN).layers["imputed_mean"])
    numbers = HIDDEN.astype(int)
    for mask in (HIDDEN.tolist(), tuple(map(tuple, numbers)), np.asarray(numbers, float), sp.csr_array(HIDDEN)):
        assert np.array_equal(dense(model.impute(a, mask=mask).layers["imputed_mean"]), want)
    for bad in ([[True], [True, False]], [["a"] * G] * N, {"a": 1}):
        with pytest.raises(ValueError, match=r"mask: .* is no matrix of true and false"):
            model.impute(a, mask=bad)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_is_no_number_in_a_gene_that_is_unknown_stops_nothing(model, tmp_path, suffix, caplog):
    a = cells()
    b = cells((*GENES, "CD3_protein"))
    x = np.c_[dense(a.X), np.arange(N) * 0.5].astype(np.float64)
    x[3, G], x[4, G], x[5, G] = np.nan, np.inf, 1e300
    b.X = x
    for task in ("denoise", "deepen"):
        with caplog.at_level(logging.WARNING, logger="distdiff"):
            got = dense({"denoise": model.denoise, "deepen": lambda c: model.deepen(c, 1.5)}[task](b).layers[f"{task}d"
                        if task == "denoise" else "deepened"])  # fmt: skip
        assert "gene 'CD3_protein' holds numbers that are not finite" in caplog.text
        assert np.array_equal(got[:, :G], TASKS[task](model, a))
        if task == "denoise":
            assert got.shape[1] == G, "the answer holds the genes that the model knows"
        else:
            assert np.array_equal(got[:, G], np.where(np.isin(np.arange(N), (3, 4, 5)), 0, x[:, G]).astype(np.float32))
    assert np.array_equal(TASKS["likelihood"](model, b), TASKS["likelihood"](model, a))
    path = tmp_path / f"b{suffix}"
    batch.write_anndata(b, path)
    with pytest.raises(ValueError, match="'CD3_protein' is no gene that both the model and the input know"):
        batch.run("denoise", model, path, tmp_path / f"none{suffix}", genes=[*GENES[:3], "CD3_protein"], **QUIET)
    for genes in ("all", GENES[:3]):
        out = tmp_path / f"o{genes == 'all'}{suffix}"
        batch.run("denoise", model, path, out, genes=genes, **QUIET)
        found = ad.read_zarr(out) if suffix == ".zarr" else ad.read_h5ad(out)
        assert np.array_equal(dense(found[:, GENES[:3]].layers["denoised"]), TASKS["denoise"](model, a)[:, :3])
        if genes == "all":
            assert not dense(found[:, "CD3_protein"].layers["denoised"]).any()
            assert np.array_equal(dense(found.X), x, equal_nan=True), "the input's own X is kept as it is"
    a.X[2, 1] = np.nan
    with pytest.raises(ValueError, match="cell 'cell2', gene 'gene1': nan is not finite"):
        model.denoise(a)


@pytest.mark.parametrize("into", [".h5ad", ".zarr"])
@pytest.mark.parametrize("given", [".h5ad", ".zarr"])
def test_tables_with_missing_values_and_odd_names_come_through(model, tmp_path, given, into):
    """Genes are appended: every column of var meets a missing value."""
    a = cells()[:, : G - 2].copy()
    a.obs["text"] = pd.array(["s", None] * (N // 2), dtype="string")
    a.obs["age"] = pd.array([3, None] * (N // 2), dtype="Int64")
    a.obs["smoker"] = pd.array([True, None] * (N // 2), dtype="boolean")
    a.obs["barcode"] = list(a.obs_names)
    a.obs = a.obs.set_index("barcode", drop=False)
    a.var["gene"] = list(a.var_names)
    a.var = a.var.set_index("gene", drop=False)
    a.var["mt"], a.var["ids"] = np.arange(a.n_vars) < 2, [f"E{i}" for i in range(a.n_vars)]
    a.var["symbol"] = pd.array([None, *a.var_names[1:]], dtype="string")
    a.var["kind"] = pd.Categorical(["Gene Expression"] * a.n_vars)
    a.var["length"] = pd.array(range(a.n_vars), dtype="Int64")
    with ad.settings.override(allow_write_nullable_strings=True):
        batch.write_anndata(a, tmp_path / f"a{given}")
    out = tmp_path / f"o{into}"
    batch.run("complete", model, tmp_path / f"a{given}", out, layers=("mean",), mean_only=True, **QUIET)
    found = ad.read_zarr(out) if into == ".zarr" else ad.read_h5ad(out)
    assert found.n_vars == G
    for name in ("text", "age", "smoker", "barcode", "donor"):
        same(found.obs[name], a.obs[name])
    for name in a.var.columns:
        same(found.var[name].iloc[: a.n_vars], a.var[name])
        added = found.var[name].iloc[a.n_vars :]
        if name == "mt":  # scanpy takes no third value
            assert added.dtype == bool
            assert not added.any()
        else:
            assert added.tolist() == list(GENES[-2:]) if name == "gene" else added.isna().all()
    memory = model.complete(a)
    assert list(memory.var.columns) == list(found.var.columns)
    del memory.obs["text"]  # anndata's default is to write no such text
    memory.write_h5ad(tmp_path / "memory.h5ad")


def same(found: pd.Series, wanted: pd.Series) -> None:
    """Equal values; missing where missing."""
    assert found.isna().tolist() == wanted.isna().tolist(), found.name
    assert [str(v) for v in found.dropna()] == [str(v) for v in wanted.dropna()], found.name


@pytest.mark.parametrize("into", [".h5ad", ".zarr"])
@pytest.mark.parametrize("keep", [None, list(GENES[:3])])
def test_ragged_arrays_come_through_where_awkward_is_not_installed(model, tmp_path, into, keep):
    a = cells()
    a.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        group = file["obsm"].create_group("airr")
        group.attrs.update({"encoding-type": "awkward-array", "encoding-version": "0.1.0", "length": N, "form": "{}"})
        group["node0-offsets"] = np.arange(N + 1)
    batch.run("denoise", model, tmp_path / "a.h5ad", tmp_path / f"o{into}", genes=keep, **QUIET)
    with container.opened(tmp_path / f"o{into}") as found:
        assert found["obsm/airr"].attrs["form"] == "{}"
        assert found["obsm/airr/node0-offsets"][:].tolist() == list(range(N + 1))


def test_cells_of_one_name(model, tmp_path):
    a = cells()
    want = TASKS["denoise"](model, a)
    a.obs_names = ["c", "d"] * (N // 2)
    assert np.array_equal(TASKS["denoise"](model, a), want)
    a.write_h5ad(tmp_path / "a.h5ad")
    batch.run("denoise", model, tmp_path / "a.h5ad", tmp_path / "o.h5ad", **QUIET)
    found = ad.read_h5ad(tmp_path / "o.h5ad")
    assert np.array_equal(dense(found.layers["denoised"]), want)
    assert found.obs_names.tolist() == a.obs_names.tolist()


DAMAGE = {
    "obs column": lambda f: f["obs"].__setitem__("donor2", np.arange(3)),
    "codes": lambda f: f["obs/kind/codes"].__setitem__(0, 99),
    "column that is gone": lambda f: f["obs"].__delitem__("donor"),
    "column of var": lambda f: f["var"].__delitem__("symbol"),
    "column order": lambda f: f["obs"].attrs.__delitem__("column-order"),
    "index": lambda f: f["obs"].attrs.__setitem__("_index", "nothing"),
    "layer": lambda f: f["layers/counts/indices"].__setitem__(0, 1000),
    "starts": lambda f: f["layers/counts/indptr"].__setitem__(3, 0),
    "uns": lambda f: f["uns/note"].attrs.__setitem__("encoding-type", "unheard"),
    "obsm": lambda f: (f["obsm"].__delitem__("pca"), f["obsm"].__setitem__("pca", np.zeros((3, 2)))),
    "promises": lambda f: f["uns"].create_dataset("big", (1 << 40,), "f8", chunks=(1 << 16,)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_met_before_the_work(model, tmp_path, name, monkeypatch):
    a = cells()
    a.obs["kind"] = pd.Categorical(["a", "b"] * (N // 2))
    a.var["symbol"], a.layers["counts"] = list(a.var_names), a.X.copy()
    a.obsm["pca"], a.uns["note"] = np.zeros((N, 2)), "x"
    a.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        DAMAGE[name](file)
        if name == "obs column":
            file["obs"].attrs["column-order"] = np.array([*file["obs"].attrs["column-order"], "donor2"], dtype=object)
    begun = []
    monkeypatch.setattr(batch.local, "run", lambda *args, **options: begun.append(args))
    with pytest.raises(ValueError, match=r"a.h5ad") as found:
        batch.run("denoise", model, tmp_path / "a.h5ad", tmp_path / "o.h5ad", **QUIET)
    assert "\n" not in str(found.value)
    assert not begun
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


@pytest.mark.parametrize("kind", ["backed r", "read_lazy", "dask of CSR", ">f4"])
def test_a_store_of_an_object_holds_its_counts(tmp_path, kind):
    a = cells()
    a.obs["text"] = pd.array(["s", None] * (N // 2), dtype="string")
    with ad.settings.override(allow_write_nullable_strings=True):
        held = in_other_hands(kind, a, tmp_path)
    distdiff.shard(held, tmp_path / "s.store", labels=("text",), shuffle=False, workers=0, progress=False)
    store = distdiff.CountStore.open(tmp_path / "s.store")
    rows = store.rows("all")
    place = [GENES.index(g) for g in store.genes]
    assert np.array_equal(store.read(rows).toarray(), dense(a.X)[store.origin(rows)[1]][:, place])
    assert store.manifest.labels["text"] == ("s",)
