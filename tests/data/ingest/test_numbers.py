"""What counts as a count, over which genes a cell is judged, and which features are genes."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from distdiff import batch, config, experiment, heldout
from distdiff.config import Evaluation
from distdiff.data.counts import as_counts
from distdiff.data.ingest import scan
from distdiff.data.store.store import CountStore
from distdiff.imputers.targets import leiden
from distdiff.model import Model
from distdiff.tasks import Reader
from tests.data.conftest import build, make_adata, make_counts, save

MLP = {"kind": "mlp", "width": 8, "depth": 1}


def stored(path):
    """Counts of a store by cell and gene name."""
    store = CountStore.open(path)
    rows = store.rows("all")
    return pd.DataFrame(store.read(rows).toarray(), index=store.names(rows), columns=list(store.genes)), store


# -- decimals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["soup", "scaled", "whole"])
def test_a_law_of_molecules_refuses_measurements(tmp_path, values):
    x = make_counts(60, 12).toarray() + 1
    x = {"soup": x * 0.9, "scaled": x - x.mean(0), "whole": x}[values].astype(np.float32)
    build(save(make_adata(sp.csr_matrix(x)), tmp_path / "a.h5ad"), tmp_path / "s", counts=False)
    store = CountStore.open(tmp_path / "s")
    settings = {
        "data": {"store": str(tmp_path / "s")}, "denoiser": MLP, "tracking": {"enabled": False},
        "evaluate": {"enabled": False}, "train": {"out": str(tmp_path / "run"), "cells": 64},
    }  # fmt: skip
    said = r"holds measurements .*rounding='random'"
    for process in ("counts", "jump", "blackout", "masked"):
        with pytest.raises(ValueError, match=said):
            experiment.train(config.parse({**settings, "process": {"kind": process}}))
    assert not (tmp_path / "run" / "model").exists()
    model = Model.new(store.spec(), {"kind": "counts"}, MLP)
    with pytest.raises(ValueError, match=said):
        heldout.evaluate_model(model, store, Evaluation())
    for task, options in (("impute", {}), ("complete", {}), ("denoise", {}), ("deepen", {"times": 2.0})):
        with pytest.raises(ValueError, match=said):
            batch.run(task, model, tmp_path / "s", tmp_path / "out.zarr", progress=False, **options)
    Model.new(store.spec(), {"kind": "gaussian"}, MLP).check_store(store.manifest, "s")


def test_rounding_at_random_is_unbiased_and_told(tmp_path):
    n = 4000
    x = np.tile(np.array([0.25, 1.53, 3.0, 100.5, 7.999], np.float32), (n, 1))
    path = save(make_adata(sp.csr_matrix(x)), tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"0\.25 is not a whole number.*rounding='random'"):
        build(path, tmp_path / "no")
    made = build(path, tmp_path / "a", rounding="random", seed=3)
    got, store = stored(tmp_path / "a")
    assert made.rounding == store.manifest.rounding == "random, seed 3"
    assert store.manifest.dtype == "uint8"
    whole = got.to_numpy()
    low = np.floor(x[0])
    assert ((whole == low) | (whole == low + 1)).all()
    assert (whole[:, 2] == 3).all()
    share = x[0] - low
    assert np.abs(whole.mean(0) - x[0]).max() < 4 * np.sqrt(0.25 / n)
    assert np.abs((whole > low).mean(0)[[0, 1, 3]] - share[[0, 1, 3]]).max() < 4 * np.sqrt(0.25 / n)
    assert abs(np.corrcoef(whole[:, 0], whole[:, 1])[0, 1]) < 4 / np.sqrt(n)  # genes are rounded each by itself
    assert abs(np.corrcoef(whole[1:, 1], whole[:-1, 1])[0, 1]) < 4 / np.sqrt(n)
    assert build(path, tmp_path / "c", rounding="random", seed=4).fingerprint != made.fingerprint


def test_rounding_depends_on_the_entry_alone(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x = make_counts(90, 15)
    x.data = (x.data * rng.uniform(0.3, 1, x.nnz)).astype(np.float32)
    x = sp.csr_matrix(x + sp.csr_matrix(np.eye(90, 15, dtype=np.float32)))
    path = save(make_adata(x), tmp_path / "a.h5ad")
    twin = save(make_adata(x.tocsc()), tmp_path / "twin.h5ad")
    whole, _ = (build(path, tmp_path / "a", rounding="random"), stored(tmp_path / "a")[0])
    monkeypatch.setattr(scan, "READ_BYTES", 400)  # a few rows at a time
    assert build(path, tmp_path / "b", rounding="random").fingerprint == whole.fingerprint
    assert build(twin, tmp_path / "c", rounding="random").fingerprint == whole.fingerprint
    (tmp_path / "l.txt").write_text("g3\ng9\n")
    build(path, tmp_path / "d", rounding="random", genes=str(tmp_path / "l.txt"))
    few, all_of = stored(tmp_path / "d")[0], stored(tmp_path / "a")[0]
    assert (few == all_of.loc[few.index, ["g3", "g9"]]).all(axis=None)


@pytest.mark.parametrize(("value", "said"), [(-0.5, "is negative"), (np.nan, "is not finite")])
def test_rounding_makes_nothing_of_what_is_no_number_of_molecules(tmp_path, value, said):
    x = make_counts(20, 5).toarray() * 0.5 + 1
    x[3, 2] = value
    path = save(make_adata(sp.csr_matrix(x.astype(np.float32))), tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=said):
        build(path, tmp_path / "s", rounding="random")
    with pytest.raises(ValueError, match="exclude each other"):
        build(path, tmp_path / "s", rounding="random", counts=False)
    with pytest.raises(ValueError, match="'nearest': 'random' or None"):
        build(path, tmp_path / "s", rounding="nearest")


def test_a_number_close_to_a_whole_one_is_that_one(tmp_path):
    counts = make_counts(60, 12)
    counts = sp.csr_matrix(counts + sp.csr_matrix(np.eye(60, 12, dtype=np.float32)))
    near = counts.copy()
    near.data = np.expm1(np.log1p(near.data)).astype(np.float32)
    assert (near.data != counts.data).any()
    path = save(make_adata(near), tmp_path / "a.h5ad")
    build(path, tmp_path / "a")
    build(save(make_adata(counts), tmp_path / "b.h5ad"), tmp_path / "b")
    got, store = stored(tmp_path / "a")
    assert (got == stored(tmp_path / "b")[0]).all(axis=None)
    block = Reader(store.spec(), make_rows(near)).block(0, 60)
    assert (block.cells.counts.numpy() == counts.toarray()).all()
    assert (block.counts != counts).nnz == 0
    edge = sp.csr_matrix(np.array([[0.99991, 1.0002, 1e-9, 5000.4]]))
    assert as_counts(edge).toarray().tolist() == [[1.0, 1.0002, 1e-9, 5000.0]]


def make_rows(x, **columns):
    from distdiff.data.ingest.source import Source

    adata = make_adata(x)
    for key, values in columns.items():
        adata.var[key] = values
    return Source.from_anndata(adata)


# -- thresholds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("genes", ["all", "hvg:5", "list"])
@pytest.mark.parametrize("join", ["inner", "outer"])
def test_a_cell_is_judged_over_all_genes_of_its_file(tmp_path, genes, join):
    x = make_counts(200, 40, 3).toarray()
    x[:, 10:13] += 1
    x[:50, 0] = 500
    names = ["MT-ND1", *(f"g{i}" for i in range(1, 40))]
    first = save(make_adata(sp.csr_matrix(x[:120]), genes=names), tmp_path / "a.h5ad")
    second = save(make_adata(sp.csr_matrix(x[120:, :30]), genes=names[:30], names=[f"d{i}" for i in range(80)]),
                  tmp_path / "b.h5ad")  # fmt: skip
    x[120:, 30:] = 0
    if genes == "list":
        (tmp_path / "l.txt").write_text("\n".join(names[10:13]))
        genes = str(tmp_path / "l.txt")
    total, n = x.sum(1), (x > 0).sum(1)
    for options, right in (
        ({"min_genes": int(np.median(n))}, n >= int(np.median(n))),
        ({"min_counts": np.quantile(total, 0.4)}, total >= np.quantile(total, 0.4)),
        ({"max_mito": 20.0}, x[:, 0] <= 0.2 * total),
    ):
        assert 20 < right.sum() < 190
        build([first, second], tmp_path / "s", genes=genes, join=join, overwrite=True, **options)
        got, store = stored(tmp_path / "s")
        every = np.array([*(f"c{i}" for i in range(120)), *(f"d{i}" for i in range(80))])
        assert set(got.index) == set(every[right])
        at = pd.Index(every).get_indexer(got.index)
        molecules, found = store.quality(store.rows("all"))
        assert (molecules == total[at]).all()
        assert (found == n[at]).all()
        assert sum(s.failed for s in store.manifest.sources) == (~right).sum()


def test_thresholds_that_no_cell_passes_are_told(tmp_path):
    path = save(make_adata(make_counts(30, 8)), tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"no cell passes \{'min_genes': 9.0\}"):
        build(path, tmp_path / "s", min_genes=9)
    with pytest.raises(ValueError, match=r"a.h5ad: no gene's name starts with MT-"):
        build(path, tmp_path / "s", max_mito=5.0)


# -- kinds of features ---------------------------------------------------------------------------------------------

N, G, K = 60, 12, 5


def cite(protein=None, gene="Gene Expression", dense=False):
    """Genes and antibodies in one AnnData, mixed."""
    rng = np.random.default_rng(0)
    rna = make_counts(N, G).toarray() + np.eye(N, G)
    protein = rng.negative_binomial(1, 0.01, (N, K)) if protein is None else protein
    order = rng.permutation(G + K)
    x = np.hstack([rna, protein])[:, order].astype(np.float32)
    names = np.array([*(f"g{i}" for i in range(G)), *(f"ADT_{i}" for i in range(K))])[order]
    kinds = np.array([gene] * G + ["Antibody Capture"] * K)[order]
    adata = make_adata(x if dense else sp.csr_matrix(x), genes=names)
    adata.var["feature_types"] = pd.Categorical(kinds)
    return adata, pd.DataFrame(rna, index=adata.obs_names, columns=[f"g{i}" for i in range(G)])


@pytest.mark.parametrize("how", ["h5ad", "zarr", "GEX", "csc", "dense", "raw", "text"])
def test_only_gene_expression_is_sharded(tmp_path, capsys, how):
    adata, rna = cite(gene="GEX" if how == "GEX" else "Gene Expression", dense=how == "dense")
    if how == "text":
        adata.var["feature_types"] = adata.var["feature_types"].astype(str)
    if how == "csc":
        adata.X = adata.X.tocsc()
    if how == "raw":
        adata.raw = adata.copy()
        adata = adata[:, :3].copy()
    path = save(adata, tmp_path / f"a.{'zarr' if how == 'zarr' else 'h5ad'}")
    for genes in ("all", "hvg:4"):
        build(path, tmp_path / "s", genes=genes, layer="raw" if how == "raw" else None, overwrite=True, progress=True)
        got, store = stored(tmp_path / "s")
        assert "only Gene Expression is read, 5 other features were left out (5 Antibody Capture)" in (
            capsys.readouterr().out
        )
        assert not [g for g in store.genes if g.startswith("ADT")]
        assert (got == rna.loc[got.index, got.columns]).all(axis=None)
        assert (store.quality(store.rows("all"))[0] == rna.loc[got.index].sum(1)).all()


def test_h5ad_and_10x_give_the_same_store(tmp_path):
    adata, _ = cite()
    x = adata.X
    with h5py.File(tmp_path / "a.h5", "w") as f:
        group = f.create_group("matrix")
        group["barcodes"] = np.array(list(adata.obs_names), "S")
        group["data"], group["indices"], group["indptr"] = x.data.astype(np.int32), x.indices, x.indptr
        group["shape"] = np.array(x.shape[::-1], np.int32)
        features = group.create_group("features")
        features["id"] = features["name"] = np.array(list(adata.var_names), "S")
        features["feature_type"] = np.array(list(adata.var["feature_types"].astype(str)), "S")
    made = [build(p, tmp_path / f"{i}", genes="hvg:6").fingerprint
            for i, p in enumerate([tmp_path / "a.h5", save(adata, tmp_path / "a.h5ad")])]  # fmt: skip
    assert made[0] == made[1]


def test_a_file_without_gene_expression_is_read_whole(tmp_path, capsys):
    adata = make_adata(make_counts(30, 8))
    adata.var["feature_types"] = "Peaks"
    build(save(adata, tmp_path / "a.h5ad"), tmp_path / "s", progress=True)
    assert "has no Gene Expression, all of its features are read (8 Peaks)" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [("mean", "draws", "mask"), ("mean",)])
def test_features_that_are_no_genes_stay_as_they_are(tmp_path, layers):
    protein = np.random.default_rng(1).normal(size=(N, K)).astype(np.float32)  # centred log ratios
    adata, _ = cite(protein)
    genes = adata.var_names[adata.var["feature_types"] == "Gene Expression"]
    alone = adata[:, genes].copy()
    build(save(alone, tmp_path / "g.h5ad"), tmp_path / "s")
    spec = CountStore.open(tmp_path / "s").spec()
    model = Model.new(spec, {"kind": "counts"}, MLP)
    path = save(adata, tmp_path / "a.h5ad")
    mask = pd.DataFrame(np.random.default_rng(2).random((N, G)) < 0.3, index=alone.obs_names, columns=genes)
    adata.layers["hide"] = mask.reindex(columns=adata.var_names, fill_value=False).to_numpy()
    save(adata, path)
    batch.impute_file(model, path, tmp_path / "out.zarr", mask="hide", layers=layers, progress=False)
    batch.run("deepen", model, path, tmp_path / "deep.zarr", times=1.5, beyond="allow", progress=False)
    want = model.impute(alone, mask=mask)
    deep = model.deepen(alone, 1.5, beyond="allow")
    imputed = model.impute(adata, mask=mask)
    for got, like, layer in (
        (ad.read_zarr(tmp_path / "out.zarr"), want, "imputed_mean"),
        (ad.read_zarr(tmp_path / "deep.zarr"), deep, "deepened"),
        (imputed, want, "imputed"),
        *([(ad.read_zarr(tmp_path / "out.zarr"), want, "imputed")] if "draws" in layers else []),
    ):
        found = pd.DataFrame(toarray(got.layers[layer]), index=got.obs_names, columns=got.var_names)
        assert np.allclose(found[genes], toarray(like.layers[layer]), rtol=1e-5)
        assert np.allclose(found[[f"ADT_{i}" for i in range(K)]], protein)
    assert np.allclose(model.likelihood(adata)["nats"], model.likelihood(alone)["nats"])
    del adata.var["feature_types"]
    assert np.allclose(model.denoise(adata)[:, genes].layers["denoised"], model.denoise(alone).layers["denoised"])
    with pytest.raises(ValueError, match="which the model does not know, holds decimals"):
        batch.run("deepen", model, save(adata, path), tmp_path / "no.zarr", times=1.5, beyond="allow", progress=False)
    batch.impute_file(model, path, tmp_path / "mean.zarr", mask="hide", layers=("mean",), progress=False)
    adata.X = adata.X.toarray()
    adata.X[3, list(adata.var_names).index("g4")] = 0.5
    with pytest.raises(ValueError, match=r"gene 'g4': 0\.5 is not a whole number"):
        model.denoise(adata)


def test_an_antibody_named_as_a_gene_is_none(tmp_path):
    rows = make_rows(make_counts(20, 3), feature_types=["Gene Expression", "Antibody Capture", "Gene Expression"])
    build(save(make_adata(make_counts(20, 3) + sp.csr_matrix(np.eye(20, 3))), tmp_path / "a.h5ad"), tmp_path / "s")
    reader = Reader(CountStore.open(tmp_path / "s").spec(), rows)
    assert reader.columns.tolist() == [0, -1, 2]
    assert reader.measured.tolist() == [True, False, True]


@pytest.mark.slow  # numba compiles the neighbours
def test_clusters_are_of_gene_expression():
    protein = np.random.default_rng(1).normal(size=(N, K)).astype(np.float32)
    adata, _ = cite(protein)
    rows = make_rows(adata.X, feature_types=list(adata.var["feature_types"]))
    genes = np.flatnonzero(adata.var["feature_types"] == "Gene Expression")
    assert leiden(rows).tolist() == leiden(make_rows(adata.X[:, genes])).tolist()


def toarray(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)
