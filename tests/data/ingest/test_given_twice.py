"""Inputs that name things twice, otherwise, elsewhere or not at all."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from distdiff import batch
from distdiff.data.ingest.source import Source
from distdiff.data.masks import load_mask
from distdiff.data.store.export import export
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from tests.data.conftest import build, make_adata, make_counts, save

N, G = 40, 10


def cells(seed=0, names=None, **obs):
    x = make_counts(N, G, seed) + sp.csr_matrix(np.eye(N, G, dtype=np.float32)) + sp.csr_matrix(np.ones((N, G)))
    return make_adata(sp.csr_matrix(x.astype(np.float32)), names=names, **obs)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A file, its store and a model of it."""
    root = tmp_path_factory.mktemp("given")
    adata = cells(kind=pd.Categorical(["a", "b"] * 20), score=np.arange(N) * 1.0)
    adata.obsm["pca"] = np.ones((N, 2))
    path = save(adata, root / "a.h5ad")
    build(path, root / "s.zarr", labels=("kind",))
    spec = CountStore.open(root / "s.zarr").spec()
    return adata, root, Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})


# -- labels --------------------------------------------------------------------------------------------------------


def test_a_cluster_is_one_label_in_whatever_type(tmp_path):
    number = np.arange(N) % 3
    made = [number.astype(np.int64), number.astype(np.float32), np.where(number == 2, np.nan, number),
            pd.Categorical(number), pd.Categorical(number * 1.0), number.astype(str),
            pd.array(number, dtype="Int64")]  # fmt: skip
    paths = [save(cells(i, [f"c{i}_{j}" for j in range(N)], cluster=c), tmp_path / f"{i}.h5ad")
             for i, c in enumerate(made)]  # fmt: skip
    for path in paths:
        seen = Source.open(path).obs("cluster")
        assert {*seen} - {None} == ({"0", "1"} if path.name == "2.h5ad" else {"0", "1", "2"})
    assert list(Source.open(paths[2]).obs("cluster")[:4]) == ["0", "1", None, "0"]
    assert build(paths, tmp_path / "s", labels=("cluster",)).labels == {"cluster": ("0", "1", "2")}
    half = Source.from_anndata(cells(score=number + 0.5, big=number * 1e16, flag=number > 0))
    assert list(half.obs("score")[:3]) == ["0.5", "1.5", "2.5"]
    assert list(half.obs("big")[:2]) == ["0", "10000000000000000"]
    assert list(half.obs("flag")[:2]) == ["False", "True"]


# -- the same cells ------------------------------------------------------------------------------------------------


def test_the_same_cells_given_twice_are_told(tmp_path, capsys):
    paths = [save(cells(i, [f"c{i}_{j}" for j in range(N)]), tmp_path / f"{i}.h5ad") for i in range(2)]
    names = [f"c0_{j}" if j < N // 2 else f"d{j}" for j in range(N)]
    half = save(cells(2, names), tmp_path / "half.h5ad")
    few = save(cells(3, [f"c0_{j}" if j < N // 4 else f"e{j}" for j in range(N)]), tmp_path / "few.h5ad")
    build([*paths, few], tmp_path / "s", progress=True)
    assert "share" not in capsys.readouterr().out.replace("are shared", "")
    build([paths[0], paths[1], paths[0], half], tmp_path / "t", progress=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(said) == 3
    assert f"{paths[0]} and {paths[0]} share {N} cell names of {N}" in said[0]
    assert f"{half} share {N // 2} cell names" in said[1]


# -- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_export_keeps_labels_of_any_name(tmp_path, capsys, suffix):
    mine = {"n_counts": ["few", "many"] * 20, "n_genes": ["x", "y"] * 20, "distdiff_split": ["old", "new"] * 20,
            "distdiff_source": ["s", "t"] * 20, "n_counts_of_store": ["u", "v"] * 20}  # fmt: skip
    adata = cells(**mine, lost=range(N))
    build(save(adata, tmp_path / "a.h5ad"), tmp_path / "s", labels=tuple(mine))
    export(CountStore.open(tmp_path / "s"), tmp_path / f"out.{suffix}", progress=True)
    got = ad.read_h5ad(tmp_path / "out.h5ad") if suffix == "h5ad" else ad.read_zarr(tmp_path / "out.zarr")
    for key, values in mine.items():
        assert list(got.obs[key]) == values
    assert (got.obs["n_counts_of_store_"] == adata.X.sum(1).A1).all()
    assert (got.obs["n_genes_of_store"] == np.diff(adata.X.indptr)).all()
    assert set(got.obs["distdiff_split_of_store"]) == {"train", "val", "test"}
    assert set(got.obs["distdiff_source_of_store"]) == {"a.h5ad"}
    said = capsys.readouterr().out
    assert "n_counts of the store is in obs column n_counts_of_store_, because n_counts is a label" in said
    assert "not the other columns of its sources" in said


# -- names of files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.hdf5", "a.H5AD", "a", "a.h5", "a.backup"])
def test_an_anndata_is_one_whatever_it_is_called(given, tmp_path, name):
    adata, root, model = given
    (tmp_path / name).write_bytes((root / "a.h5ad").read_bytes())
    batch.run("denoise", model, tmp_path / name, tmp_path / "out.h5ad", progress=False)
    got = ad.read_h5ad(tmp_path / "out.h5ad")
    pd.testing.assert_frame_equal(got.obs, adata.obs)
    assert (got.obsm["pca"] == 1).all()


# -- earlier results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_nothing_of_an_earlier_imputation_stays(given, tmp_path, suffix):
    adata, _, model = given
    start = adata.copy()
    start.layers["hide"] = np.random.default_rng(0).random((N, G)) < 0.3
    start.layers["imputed_by_magic"] = start.X.copy()
    path = save(start, tmp_path / f"in.{suffix}")
    first, second, third = (tmp_path / f"{i}.{suffix}" for i in range(3))
    every = ("mean", "draws", "mask", "ood", "sd", "q5")
    batch.impute_file(model, path, first, mask="hide", draws=3, layers=every, progress=False)
    batch.impute_file(model, first, second, mask="hide", layers=("draws",), progress=False, seed=1)
    keep = list(start.var_names[:4])
    batch.impute_file(model, first, third, mask="hide", layers=("draws",), progress=False, genes=keep)
    read = ad.read_h5ad if suffix == "h5ad" else ad.read_zarr
    assert {"imputed_draw3", "imputed_sd", "imputed_q5"} <= set(read(first).layers)
    assert "distdiff_nats" in read(first).obs
    for out in (second, third):
        assert set(read(out).layers) == {"hide", "imputed_by_magic", "imputed"}
        assert list(read(out).obs) == ["kind", "score"]
    again = model.impute(read(first), mask="hide", draws=1)
    assert set(again.layers) == {"hide", "imputed_by_magic", "imputed_mean", "imputed", "imputed_mask"}
    assert "distdiff_nats" not in model.impute(read(first), mask="hide", layers=["mean"]).obs


# -- masks ---------------------------------------------------------------------------------------------------------


def test_a_mask_with_names_is_taken_by_them(given):
    adata, _, model = given
    hide = np.random.default_rng(0).random((N, G)) < 0.3
    want = model.impute(adata, mask=hide).layers["imputed_mean"]
    frame = pd.DataFrame(hide, index=adata.obs_names, columns=adata.var_names)
    mixed = frame.sample(frac=1, random_state=0).sample(frac=1, axis=1, random_state=1)
    assert (model.impute(adata, mask=mixed).layers["imputed_mean"] == want).all()
    assert (model.impute(adata, mask=np.asfortranarray(hide)).layers["imputed_mean"] == want).all()
    part = hide.copy()
    part[:, 6:] = False
    part[30:] = False
    some = model.impute(adata, mask=frame.iloc[:30, :6]).layers["imputed_mean"]
    assert (some == model.impute(adata, mask=part).layers["imputed_mean"]).all()
    with pytest.raises(ValueError, match="mask: gene 'other' is not among the input's genes"):
        model.impute(adata, mask=frame.rename(columns={"g3": "other"}))
    with pytest.raises(ValueError, match=r"mask: cell 'c3' .*named twice"):
        model.impute(adata, mask=frame.rename(index={"c2": "c3"}))


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_a_mask_layer_goes_with_counts_of_raw_by_name(given, tmp_path, suffix):
    adata, _, model = given
    hide = np.random.default_rng(0).random((N, G)) < 0.3
    other = adata.copy()
    other.raw = adata.copy()
    other.layers["hide"] = hide
    other = other[:, ::-1][:, 1:].copy()  # without the last gene
    hide[:, -1] = False
    want = model.impute(adata, mask=hide)
    path = save(other, tmp_path / f"in.{suffix}")
    batch.impute_file(model, path, tmp_path / "out.h5ad", layer="raw", mask="hide", progress=False)
    for got in (ad.read_h5ad(tmp_path / "out.h5ad"), model.impute(other, layer="raw", mask="hide")):
        assert list(got.var_names) == list(adata.var_names)
        assert np.allclose(sp.csr_matrix(got.layers["imputed_mean"]).toarray(), want.layers["imputed_mean"], rtol=1e-5)


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("index", [-1, 99])
def test_a_mask_with_entries_outside_of_it_is_refused(given, tmp_path, form, index):
    adata, _, model = given
    mask = sp.csr_matrix(np.eye(N, G, dtype=bool)).asformat(form)
    mask.indices[3] = index
    sp.save_npz(tmp_path / "m.npz", mask)
    with pytest.raises(ValueError, match="entries outside of its shape"):
        load_mask(tmp_path / "m.npz", (N, G))
    with pytest.raises(ValueError, match="entries outside of its shape"):
        model.impute(adata, mask=mask)


# -- genes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("genes", "said"), [([], "no gene is named"), (["g1", "g2", "g1"], "'g1' is named more")])
def test_genes_are_named_and_each_once(given, tmp_path, genes, said):
    adata, root, model = given
    for task, options in (
        ("denoise", {"genes": genes}),
        ("deepen", {"genes": genes, "times": 1.5}),
        ("impute", {"genes": genes}),
        ("complete", {"genes": genes}),
    ):
        with pytest.raises(ValueError, match=said):
            batch.run(task, model, root / "a.h5ad", tmp_path / "out.zarr", progress=False, **options)
    with pytest.raises(ValueError, match=said):
        model.complete(adata[:, 3:].copy(), genes)
    assert not list(tmp_path.iterdir())


# -- places --------------------------------------------------------------------------------------------------------


def test_nothing_is_written_into_or_around_an_input(given, tmp_path):
    adata, root, model = given
    inner = tmp_path / "box" / "in.zarr"
    inner.parent.mkdir()
    save(adata, inner)
    build(root / "a.h5ad", tmp_path / "box" / "store")
    before = sorted(tmp_path.rglob("*"))
    for data in (inner, tmp_path / "box" / "store"):
        for out in (data / "out.zarr", data / "layers" / "out.h5ad"):
            with pytest.raises(ValueError, match="lies inside the input"):
                batch.run("denoise", model, data, out, progress=False)
    (tmp_path / "link").symlink_to(inner)
    with pytest.raises(ValueError, match="lies inside the input"):
        build(inner, tmp_path / "link" / "s")
    (tmp_path / "link").unlink()
    with pytest.raises(ValueError, match="is the input itself"):
        build(inner, inner, overwrite=True)
    with pytest.raises(ValueError, match="holds the input"):
        build(inner, tmp_path / "box", overwrite=True)
    with pytest.raises(ValueError, match="lies inside the input"):
        export(CountStore.open(tmp_path / "box" / "store"), tmp_path / "box" / "store" / "x.h5ad", progress=False)
    assert sorted(tmp_path.rglob("*")) == before
