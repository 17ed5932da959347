from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse
from typer.testing import CliRunner

from distdiff.cli import app
from distdiff.data.store.export import export
from distdiff.data.store.store import CountStore
from tests.data.conftest import build, make_adata, make_counts, save


@pytest.fixture
def made(tmp_path):
    x = make_counts(200, 30, 3)
    kind = np.array(["a", "b", None], dtype=object)[np.arange(200) % 3]
    path = save(make_adata(x, kind=kind), tmp_path / "x.h5ad")
    build(path, tmp_path / "x.store", panel="hvg:5", labels=("kind",), shuffle=True)
    return x, kind, tmp_path


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("piece", [200, 1 << 20])
def test_what_went_in_comes_back(made, suffix, piece, monkeypatch):
    x, kind, folder = made
    monkeypatch.setattr("distdiff.data.store.export.PIECE", piece)
    store = CountStore.open(folder / "x.store")
    export(store, folder / f"back{suffix}", progress=False)
    back = (ad.read_h5ad if suffix == ".h5ad" else ad.read_zarr)(folder / f"back{suffix}")
    counted = np.flatnonzero(np.asarray(x.sum(1)).ravel())
    kept = [g for g in range(30) if x[:, g].nnz]
    assert back.obs_names.tolist() == [f"c{i}" for i in counted]
    assert back.var_names.tolist() == [f"g{i}" for i in kept]
    assert back.X.dtype == np.float32
    assert (x[counted][:, kept] != back.X).nnz == 0
    assert back.obs["kind"].astype(object).where(back.obs["kind"].notna(), None).tolist() == list(kind[counted])
    assert back.obs["distdiff_split"].value_counts().to_dict() == {"train": 160, "val": 20, "test": 20}
    assert np.array_equal(back.obs["n_counts"], np.asarray(x[counted].sum(1)).ravel())
    assert back.var["panel"].sum() == 5
    assert back.uns["distdiff"]["fingerprint"] == store.manifest.fingerprint
    sc.pp.normalize_total(back)  # scanpy takes it
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    export(store.panel(), folder / f"panel{suffix}", progress=False)
    small = (ad.read_h5ad if suffix == ".h5ad" else ad.read_zarr)(folder / f"panel{suffix}")
    assert small.var_names.tolist() == [g for g in back.var_names if back.var.loc[g, "panel"]]


def test_commands(made):
    _, _, folder = made
    path, run = str(folder / "x.store"), CliRunner()
    said = run.invoke(app, ["store", "info", path])
    assert said.exit_code == 0
    for words in ("200 cells x 30 genes", "genes panel: 5", "genes rest: 25", "label kind: 2 values", "codec local",
                  "bytes on disk"):  # fmt: skip
        assert words in said.output, words
    said = run.invoke(app, ["store", "verify", path])
    assert said.exit_code == 0
    assert "shards are as built, fingerprint" in said.output
    said = run.invoke(app, ["store", "export", path, "--out", str(folder / "y.h5ad"), "--panel"])
    assert said.exit_code == 0
    assert ad.read_h5ad(folder / "y.h5ad").n_vars == 5
    with pytest.raises(FileExistsError):
        export(CountStore.open(path), folder / "y.h5ad")
    with pytest.raises(ValueError, match=r"must end in .h5ad or .zarr"):
        export(CountStore.open(path), folder / "y.loom")


def test_large_counts_come_back_whole(tmp_path):
    x = sparse.csr_matrix(np.array([[2**31 + 3, 1], [0, 5]], dtype=np.float64))
    build(save(make_adata(x), tmp_path / "x.h5ad"), tmp_path / "x.store", split=(1, 0, 0), shuffle=True)
    export(CountStore.open(tmp_path / "x.store"), tmp_path / "y.h5ad", progress=False)
    assert ad.read_h5ad(tmp_path / "y.h5ad").X.toarray().tolist() == [[2**31 + 3, 1], [0, 5]]
