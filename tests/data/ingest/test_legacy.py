"""Files of anndata 0.6 and 0.7: what they hold is what anndata reads, under its names."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from distdiff import batch
from distdiff.data.ingest.source import Source
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from tests.data.conftest import build, make_counts
from tests.data.old_files import write

FILES = [("0.7", "h5ad"), ("0.6", "h5ad"), ("0.7", "zarr")]


def made(first: int = 0) -> ad.AnnData:
    """60 cells x 20 genes; every third cell type is missing; ``first`` shifts the donors."""
    n, g = 60, 20
    kind = np.array(["T cell", None, "B cell"], dtype=object)[np.arange(n) % 3]
    donor = [f"d{first + i % 2}" for i in range(n)]
    obs = pd.DataFrame({"kind": pd.Categorical(kind), "donor": pd.Categorical(donor), "n": np.arange(n)},
                       index=[f"c{first}_{i}" for i in range(n)])  # fmt: skip
    var = pd.DataFrame({"ids": pd.Series([f"E{i}" for i in range(g)], dtype=object).to_numpy()},
                       index=[f"g{i}" for i in range(g)])  # fmt: skip
    x = make_counts(n, g, first)
    x = sp.csr_matrix(x + sp.csr_matrix((np.ones(n, np.float32), (np.arange(n), np.arange(n) % g)), shape=(n, g)))
    adata = ad.AnnData(x, obs=obs, var=var, obsm={"X_pca": np.ones((n, 2))})
    adata.raw = adata[:, ::-1].copy()
    return adata


def read(path):
    return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("version", "suffix"), FILES)
def test_labels_are_the_names_of_the_categories(tmp_path, version, suffix):
    paths = [write(made(i), tmp_path / f"{i}.{suffix}", version) for i in (0, 5)]
    assert read(paths[0]).obs["kind"].isna().sum() == 20  # the file is one that anndata reads
    source = Source.open(paths[0])
    assert source.obs("kind").tolist()[:4] == ["T cell", None, "B cell", "T cell"]
    assert source.obs("n").tolist()[:2] == ["0", "1"]
    assert source.obs_names[0] == "c0_0"
    build(paths, tmp_path / "s", labels=("kind", "donor"))
    store = CountStore.open(tmp_path / "s")
    assert store.manifest.labels == {"kind": ("B cell", "T cell"), "donor": ("d0", "d1", "d5", "d6")}
    rows = store.rows("all")
    assert np.bincount(store.labels(rows)["kind"] + 1).tolist() == [40, 40, 40]
    assert np.bincount(store.labels(rows)["donor"]).tolist() == [30, 30, 30, 30]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("version", "suffix"), FILES)
@pytest.mark.parametrize("layer", [None, "raw"])
def test_results_hold_what_anndata_reads(tmp_path, version, suffix, layer):
    given = made()
    path = write(given, tmp_path / f"in.{suffix}", version)
    build(path, tmp_path / "s", labels=("kind",))
    model = Model.new(CountStore.open(tmp_path / "s").spec(("kind",)), {"kind": "counts"}, {"kind": "mlp", "width": 8})
    want = model.denoise(given, layer=layer)
    assert list(want.var_names) == [f"g{i}" for i in (range(20) if layer is None else range(19, -1, -1))]
    for kind in ("h5ad", "zarr"):
        out = tmp_path / f"out.{kind}"
        batch.run("denoise", model, path, out, layer=layer, ood=2, progress=False, batch_size=60)
        got = read(out)
        pd.testing.assert_frame_equal(got.obs[["kind", "donor"]], given.obs[["kind", "donor"]], check_names=False)
        assert list(got.obs["n"]) == list(range(60))
        assert got.obs["distdiff_nats"].notna().all()
        assert list(got.var_names) == list(want.var_names)
        assert list(got.var["ids"]) == list(want.var["ids"])
        np.testing.assert_allclose(np.asarray(got.layers["denoised"]), want.layers["denoised"], rtol=1e-5)
        assert (got.X != want.X).nnz == 0
        assert (got.raw.X != given.raw.X).nnz == 0
        assert list(got.raw.var["ids"]) == [f"E{i}" for i in range(19, -1, -1)]
        assert (got.obsm["X_pca"] == 1).all()
