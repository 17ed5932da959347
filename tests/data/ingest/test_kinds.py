"""Matrices, tables and names that users have: each gives what anndata and scipy say is in it."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

from distdiff.data.ingest import foreign, probe
from distdiff.data.ingest.bycell import number_dtype
from distdiff.data.ingest.choose import file_of
from distdiff.data.ingest.damage import InputError, reading
from distdiff.data.ingest.source import Source
from distdiff.data.store.export import export
from distdiff.data.store.store import CountStore
from tests.data.conftest import build, make_adata, make_counts, save

N, G = 30, 12


def counts(dtype) -> np.ndarray:
    x = np.minimum(make_counts(N, G).toarray() + 1, 120)
    return (x > 2 if np.dtype(dtype).kind == "b" else x).astype(dtype)


def with_csr(path, x) -> None:
    """A file whose X is CSR of any dtype, also of one that scipy has not."""
    save(make_adata(sparse.csr_matrix((N, G), dtype=np.float32)), path)
    row, column = np.nonzero(x)
    with h5py.File(path, "r+") as file:
        del file["X"]
        group = file.create_group("X")
        group["data"], group["indices"] = x[row, column], column.astype(np.int32)
        group["indptr"] = np.r_[0, np.cumsum(np.bincount(row, minlength=N))].astype(np.int32)
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": x.shape})


def stored(path, tmp_path) -> pd.DataFrame:
    """The store of a file, as anndata reads its export."""
    build(path, tmp_path / "s.store", overwrite=True)
    export(CountStore.open(tmp_path / "s.store"), tmp_path / "s.h5ad", progress=False, overwrite=True)
    return ad.read_h5ad(tmp_path / "s.h5ad").to_df()


@pytest.mark.parametrize("kind", ["dense", "csr", "memory"])
@pytest.mark.parametrize("dtype", [bool, "int8", "uint8", "float16", ">f4", ">i4", ">u2", "float64", "uint64"])
def test_values_of_every_dtype(tmp_path, dtype, kind):
    x, path = counts(dtype), tmp_path / "a.h5ad"
    if kind == "csr":
        with_csr(path, x)
    elif kind == "dense":
        save(make_adata(x), path)
    source = Source.from_anndata(make_adata(x)) if kind == "memory" else Source.open(path)
    got = source.read(3, 20)
    assert got.dtype == number_dtype(dtype, "")
    assert got.dtype.isnative
    np.testing.assert_array_equal(got.toarray(), x[3:20].astype(np.float64))
    if kind != "memory":
        found, seen = stored(path, tmp_path), x.any(1)
        np.testing.assert_array_equal(found[[f"g{i}" for i in range(G) if x[:, i].any()]], x[seen][:, x.any(0)])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "float32"])
def test_entries_that_are_written_twice_are_added_up(tmp_path, dtype):
    """Also where the sum is more than the dtype of the file holds."""
    x, most = counts("float32"), min(np.iinfo(dtype).max if dtype != "float32" else 1000, 60_000)
    with_csr(tmp_path / "a.h5ad", np.minimum(x, most).astype(dtype))
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        parts = {k: file["X"][k][:] for k in ("data", "indices", "indptr")}
        file["X"].attrs["shape"] = (N, G)
        for k, values in {
            "data": np.r_[[most, most], parts["data"]].astype(dtype),
            "indices": np.r_[parts["indices"][[0, 0]], parts["indices"]],
            "indptr": np.r_[0, parts["indptr"][1:] + 2],
        }.items():
            del file["X"][k]
            file["X"][k] = values
    x[0, parts["indices"][0]] += 2 * most
    seen = x.any(0)
    found = stored(tmp_path / "a.h5ad", tmp_path)
    np.testing.assert_array_equal(found[[f"g{i}" for i in np.flatnonzero(seen)]], x[x.any(1)][:, seen])


def test_what_is_no_number_is_refused(tmp_path):
    with pytest.raises(InputError, match="its values are of dtype complex64, not numbers"):
        Source.from_anndata(make_adata(counts("float32").astype(np.complex64)))


def test_arrays_of_dask_and_files_that_stay_on_disk(tmp_path):
    da = pytest.importorskip("dask.array")
    a = make_adata(make_counts(N, G), kind=["T"] * N)
    a.layers["csc"], a.layers["dense"] = a.X.tocsc(), a.X.toarray()
    path, want = save(a, tmp_path / "a.h5ad"), a.X.toarray()
    lazy = a.copy()
    lazy.X = da.from_array(want, chunks=(7, 5))
    with h5py.File(path) as file:
        lazy.layers["csr"] = ad.experimental.read_elem_lazy(file["X"], chunks=(7, G))
        for layer in (None, "csr"):
            np.testing.assert_array_equal(Source.from_anndata(lazy, layer).read(2, 19).toarray(), want[2:19])
    for mode in ("r", "r+"):
        backed = ad.read_h5ad(path, backed=mode)
        np.testing.assert_array_equal(Source.from_anndata(backed).read(2, 19).toarray(), want[2:19])
        np.testing.assert_array_equal(Source.from_anndata(backed[3:9]).read(0, 6).toarray(), want[3:9])
        backed.file.close()


def test_the_whole_of_a_lazily_read_file(tmp_path):
    pytest.importorskip("xarray")
    a = make_adata(make_counts(N, G), kind=["T", "B"] * (N // 2))
    source = Source.from_anndata(ad.experimental.read_lazy(save(a, tmp_path / "a.h5ad")))
    np.testing.assert_array_equal(source.read(0, N).toarray(), a.X.toarray())
    assert source.obs("kind").tolist() == a.obs["kind"].tolist()
    assert source.obs_names.tolist() == a.obs_names.tolist()


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_nullable_columns(tmp_path, suffix):
    a = make_adata(make_counts(N, G))
    a.obs["text"] = pd.array(["s1", None, "s2"] * 10, dtype="string")
    a.obs["age"] = pd.array([31, None, 40] * 10, dtype="Int64")
    a.obs["smoker"] = pd.array([True, None, False] * 10, dtype="boolean")
    a.obs.index = a.obs.index.astype("string")
    with ad.settings.override(allow_write_nullable_strings=True):
        path = save(a, tmp_path / f"a{suffix}")
    source = Source.open(path)
    assert source.obs_names.tolist() == a.obs_names.tolist()
    for key, want in {"text": ["s1", None, "s2"], "age": ["31", None, "40"], "smoker": ["True", None, "False"]}.items():
        assert source.obs(key).tolist()[:3] == want


@pytest.mark.filterwarnings("ignore:.*not unique")
def test_cells_of_one_name_keep_their_counts(tmp_path, capsys):
    x = make_counts(N, G).toarray() + 1
    path = save(make_adata(sparse.csr_matrix(x), names=["c", "d", "e"] * 10), tmp_path / "a.h5ad")
    build(path, tmp_path / "s.store", progress=True)
    assert "27 cells have the name of one before them, such as 'c', and got a number" in capsys.readouterr().out
    store = CountStore.open(tmp_path / "s.store")
    rows = store.rows("all")
    assert len(set(store.names(rows))) == N
    np.testing.assert_array_equal(store.read(rows).toarray(), x[store.origin(rows)[1]])


def test_one_gene_and_no_cells(tmp_path):
    x = make_counts(N, 1).toarray() + 1
    found = stored(save(make_adata(sparse.csr_matrix(x)), tmp_path / "one.h5ad"), tmp_path)
    np.testing.assert_array_equal(found.to_numpy(), x)
    for shape, said in (((0, G), "no cells at all; give a file that has some"), ((N, 0), "no genes at all")):
        none = save(make_adata(sparse.csr_matrix(shape, dtype=np.float32)), tmp_path / "none.h5ad")
        assert Source.open(none).read(0, 0).shape == (0, shape[1])
        with pytest.raises(ValueError, match=said):
            build(none, tmp_path / "none.store")


def test_names_of_more_genes_than_a_path_is_long(tmp_path):
    genes = [f"quite_a_long_name_of_gene_{i}" for i in range(40)]
    path = save(make_adata(make_counts(N, 40), genes=genes), tmp_path / "a.h5ad")
    made = build(path, tmp_path / "s.store", genes=",".join(genes[::-1]), min_cells=0)
    assert list(made.genes) == genes[::-1]
    assert file_of(",".join(genes)) is None
    with pytest.raises(FileNotFoundError, match="nor a text file of gene names"):
        build(path, tmp_path / "t.store", genes="x" * 5000)
    with pytest.raises(ValueError, match=r"1 of 2 genes are not in every input: no_gene"):
        build(path, tmp_path / "t.store", genes=f"{genes[0]},no_gene")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(make_adata(make_counts(N, G)), tmp_path / "a.h5ad")
    assert Source.open("~/a.h5ad").n_cells == N
    build("~/a.h5ad", "~/s.store")
    store = CountStore.open("~/s.store")
    export(store, "~/back.h5ad", progress=False)
    assert (tmp_path / "back.h5ad").exists()


def test_what_other_programs_write_is_named(tmp_path):
    x, names = make_counts(N, G), [f"c{i}" for i in range(N)]

    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            io.mmwrite(tmp_path / name / file, x) if file.endswith(".mtx") else (tmp_path / name / file).touch()
        return tmp_path / name

    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = x.toarray().T
        file.create_group("row_attrs"), file.create_group("col_attrs")
    with h5py.File(tmp_path / "a.h5mu", "w") as file:
        file.create_group("mod/rna"), file.create_group("mod/prot")
    pd.DataFrame(x.toarray(), index=names).to_csv(tmp_path / "a.csv")
    for path, said in {
        folder("parse", "count_matrix.mtx", "all_genes.csv"): "Parse split-pipe .* anndata.h5ad",
        folder("parse1", "DGE.mtx", "all_genes.csv"): "Parse split-pipe .* anndata.h5ad",
        folder("kallisto", "cells_x_genes.mtx"): "kallisto bustools .* --h5ad",
        folder("alevin", "quants_mat.mtx"): "alevin",
        folder("velocyto", "spliced.mtx"): "path of one matrix",
        tmp_path / "a.loom": "loom file; .*read_loom",
        tmp_path / "a.h5mu": r"MuData \(prot, rna\)",
        tmp_path / "a.csv": "table of text",
        tmp_path: "give .*parse",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            Source.open(path)
    assert foreign.by_content(tmp_path / "parse1").startswith("it is of Parse")


def test_folders_of_starsolo(tmp_path):
    x, raw = make_counts(N, G), tmp_path / "Solo.out" / "Gene" / "raw"
    raw.mkdir(parents=True)
    io.mmwrite(raw / "matrix.mtx", x.T.astype(int))
    io.mmwrite(raw / "UniqueAndMult-EM.mtx", x.T)
    (raw / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(N)))
    (raw / "features.tsv").write_text("".join(f"E{i}\tg{i}\tGene Expression\n" for i in range(G)))
    source = Source.open(raw)
    assert source.genes == tuple(f"g{i}" for i in range(G))
    np.testing.assert_array_equal(source.read(0, N).toarray(), x.toarray())
    with pytest.raises(ValueError, match=r"give .*Solo.out/Gene/raw"):
        Source.open(tmp_path / "Solo.out")


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), TypeError("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), MemoryError("x"),
     OverflowError("x"), RuntimeError("x\ny"), IndexError(), NotImplementedError(), OSError(5, "x"), ValueError("x")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_any_error_of_a_library_becomes_one_sentence(error):
    with pytest.raises(InputError, match=r"^a.h5ad cannot be read \(.+\): .+$") as found, reading("a.h5ad"):
        raise error
    assert "\n" not in str(found.value)
    assert found.value.__cause__ is error


def test_what_is_a_sentence_already_is_passed_on():
    for error in (InputError("b"), ValueError("a.h5ad: c"), FileNotFoundError("a.h5ad: d")):
        with pytest.raises(type(error)) as found, reading("a.h5ad"):
            raise error
        assert found.value is error


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_look_that_hangs_or_dies_is_told(monkeypatch):
    import os
    import signal
    import time

    monkeypatch.setattr(probe, "SILENT", 0.5)
    probe.first(lambda beat: None, "a.h5ad")
    probe.first(lambda beat: [(beat(), time.sleep(0.2)) for _ in range(5)] and None, "a.h5ad")  # slow, not hanging
    with pytest.raises(InputError, match=r"a.h5ad cannot be read \(no progress for 0 s\)"):
        probe.first(lambda beat: time.sleep(30), "a.h5ad")
    with pytest.raises(InputError, match=r"the HDF5 library died of it, -11"):
        probe.first(lambda beat: os.kill(os.getpid(), signal.SIGSEGV), "a.h5ad")

    def refuse(beat):
        raise InputError("that is it")

    with pytest.raises(InputError, match=r"^that is it$"):
        probe.first(refuse, "a.h5ad")
