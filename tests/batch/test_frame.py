"""What a result keeps of its input, and under which names: counts of raw, chosen genes, appended ones."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from distdiff import batch
from distdiff.data.store.store import CountStore
from distdiff.model import Model

OPTIONS = ({"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
QUIET = {"progress": False, "batch_size": 64}


@pytest.fixture(scope="module")
def model(atlas):
    return Model.new(CountStore.open(atlas).spec(("cell_type",)), *OPTIONS)


@pytest.fixture(params=["h5ad", "zarr"])
def suffix(request):
    return request.param


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def table(adata, layer=None):
    """A matrix by names."""
    values = adata.X if layer is None else adata.layers[layer]
    return pd.DataFrame(dense(values).astype(np.float64), index=adata.obs_names, columns=adata.var_names)


def written(adata, path):
    batch.write_anndata(adata, path)
    return path


def opened(path):
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


def rich(counts):
    """Counts with one of everything that an AnnData holds."""
    full = counts.copy()
    n, g = full.shape
    rng = np.random.default_rng(0)
    full.layers["counts"], full.layers["scaled"] = full.X.copy(), rng.normal(size=(n, g)).astype(np.float32)
    full.layers["seen"], full.layers["by_gene"] = full.X > 1, full.X.tocsc()
    full.obsm["pca"], full.obsp["near"] = rng.normal(size=(n, 2)), sp.eye(n, format="csr")
    full.varm["loadings"], full.varm["ranks"] = rng.normal(size=(g, 2)), np.arange(g)
    full.varm["table"] = pd.DataFrame({"a": np.arange(g) * 1.0}, index=full.var_names)
    full.varp["near"], full.varp["dense"] = sp.eye(g, format="csr") * 3, rng.normal(size=(g, g))
    full.var["ids"], full.var["variable"], full.var["n"] = [f"E{i}" for i in range(g)], np.arange(g) % 2 == 0, range(g)
    full.uns["note"] = {"a": "b"}
    full.raw = full[:, ::-1].copy()
    return full


def other_genes(counts, case):
    """Counts in raw; X has them log-normalised, in another order, or some of them."""
    full = rich(counts)
    full.raw = counts.copy()
    full.raw.var["ids"] = [f"R{i}" for i in range(counts.n_vars)]
    full.X = sp.csr_matrix(np.log1p(dense(full.X)))
    return full[:, {"reversed": slice(None, None, -1), "some": slice(3, 20)}[case]].copy()


TASKS = {
    "denoise": ({}, "denoised"),
    "deepen": ({"times": 1.5, "beyond": "allow"}, "deepened"),
    "impute": ({"mask": None}, "imputed_mean"),
}


@pytest.mark.parametrize(("suffix", "case"), [("h5ad", "reversed"), ("zarr", "some")])
@pytest.mark.parametrize("task", sorted(TASKS))
def test_counts_of_raw_keep_their_genes(model, counts, tmp_path, suffix, case, task):
    given, (options, layer) = other_genes(counts, case), TASKS[task]
    mask = np.random.default_rng(1).random(counts.shape) < 0.3
    options = dict(options)
    if "mask" in options:
        np.save(tmp_path / "mask.npy", mask)
        options["mask"] = str(tmp_path / "mask.npy")
    path = written(given, tmp_path / f"in.{suffix}")
    out = tmp_path / f"out.{suffix}"
    batch.run(task, model, path, out, layer="raw", **options, **QUIET)
    if "mask" in options:
        options["mask"] = mask
    want = table(getattr(model, task)(counts, **options), layer)
    for got in (opened(out), getattr(model, task)(given, layer="raw", **options)):
        assert list(got.var_names) == list(counts.var_names)
        assert list(got.var["ids"]) == [f"R{i}" for i in range(counts.n_vars)]
        pd.testing.assert_frame_equal(table(got, layer), want, rtol=1e-5)
        pd.testing.assert_frame_equal(table(got), table(counts))
        assert (got.obsm["pca"] == given.obsm["pca"]).all()
        assert dense(got.obsp["near"]).trace() == counts.n_obs
        assert (dense(got.raw.X) == dense(counts.X)).all()
        assert {"X", "layers/counts", "varm/loadings", "varp/near"} <= set(got.uns["distdiff"]["left_out"])
        assert set(got.layers) <= {layer, "imputed", "imputed_mask"}
    model.likelihood(given, layer="raw")


def test_raw_in_the_order_of_x_loses_nothing(model, counts, tmp_path, suffix):
    given = rich(counts)
    given.raw = counts.copy()
    given.X = sp.csr_matrix(np.log1p(dense(given.X)))
    batch.run("denoise", model, written(given, tmp_path / f"in.{suffix}"), tmp_path / f"out.{suffix}", layer="raw",
              **QUIET)  # fmt: skip
    want = table(model.denoise(counts), "denoised")
    for got in (opened(tmp_path / f"out.{suffix}"), model.denoise(given, layer="raw")):
        pd.testing.assert_frame_equal(table(got, "denoised"), want, rtol=1e-5)
        pd.testing.assert_frame_equal(table(got), table(given))
        assert "left_out" not in got.uns["distdiff"]
        assert set(given.layers) <= set(got.layers)


@pytest.mark.parametrize("layer", [None, "counts"])
def test_completion_keeps_what_fits(model, counts, tmp_path, suffix, layer):
    given = rich(counts[:, 5:].copy())
    if layer:
        given.X = sp.csr_matrix(np.log1p(dense(given.X)))
    append = ["gene2", "gene0"]
    path = written(given, tmp_path / f"in.{suffix}")
    batch.run("complete", model, path, tmp_path / f"out.{suffix}", layer=layer, genes=append, **QUIET)
    for got in (opened(tmp_path / f"out.{suffix}"), model.complete(given, append, layer=layer)):
        kept(got, given, np.r_[np.arange(25), -1, -1], [*given.var_names, *append])
        assert (dense(got[:, given.var_names].X) == dense(counts[:, 5:].X)).all()
        assert not dense(got[:, append].X).any()
        assert list(got.var["distdiff_added"]) == [False] * 25 + [True] * 2
        assert list(got.uns["distdiff"].get("left_out", [])) == (["X"] if layer else [])


def test_chosen_genes_keep_what_fits(model, counts, tmp_path, suffix):
    given = rich(counts)
    keep = ["gene7", "gene2", "gene29"]
    batch.run("denoise", model, written(given, tmp_path / f"in.{suffix}"), tmp_path / f"out.{suffix}", genes=keep,
              **QUIET)  # fmt: skip
    got = opened(tmp_path / f"out.{suffix}")
    kept(got, given, np.array([7, 2, 29]), keep)
    assert (dense(got.X) == dense(counts[:, keep].X)).all()
    assert "left_out" not in got.uns["distdiff"]


def kept(got, given, at, genes):
    """Everything of ``given``, in the genes ``at`` of it; -1: a gene that it lacks."""
    assert list(got.var_names) == list(genes)
    old, new = at[at >= 0], at < 0
    assert list(got.var["ids"].astype(object)[~new]) == [f"E{i}" for i in old]
    assert got.var["ids"].isna().to_numpy()[new].all()
    assert list(got.var["variable"][~new].astype(bool)) == [i % 2 == 0 for i in old]
    for name, values in given.layers.items():
        assert (dense(got.layers[name])[:, ~new] == dense(values)[:, old]).all()
        assert not dense(got.layers[name])[:, new].any()
        assert sp.issparse(got.layers[name]) == sp.issparse(values)
    assert (got.varm["loadings"][~new] == given.varm["loadings"][old]).all()
    assert (np.ravel(got.varm["ranks"])[~new] == old).all()
    assert (got.varm["table"]["a"].to_numpy()[~new] == old).all()
    assert np.isnan(got.varm["loadings"][new]).all()
    for name in given.varp:
        assert (dense(got.varp[name])[~new][:, ~new] == dense(given.varp[name])[old][:, old]).all()
        assert not dense(got.varp[name])[new].any()
    assert (got.obsm["pca"] == given.obsm["pca"]).all()
    assert (dense(got.obsp["near"]) == dense(given.obsp["near"])).all()
    assert list(got.raw.var_names) == list(given.raw.var_names)
    assert (dense(got.raw.X) == dense(given.raw.X)).all()
    assert got.uns["note"]["a"] == "b"


def test_what_has_no_columns_is_named(model, counts, tmp_path, suffix):
    given = counts[:, 5:].copy()
    given.varm["words"] = np.array([["a", "b"]] * 25, dtype=object)
    given.varm["cube"] = np.zeros((25, 2, 2))
    path = written(given, tmp_path / f"in.{suffix}")
    batch.run("complete", model, path, tmp_path / f"out.{suffix}", genes=["gene0"], ood=0, **QUIET)
    for got in (opened(tmp_path / f"out.{suffix}"), model.complete(given, ["gene0"])):
        assert sorted(got.uns["distdiff"]["left_out"]) == ["varm/cube", "varm/words"]
        assert not len(got.varm)
