"""What a model made stays marked through later tasks, in memory and on files; appended genes are never evidence."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import distdiff
from distdiff import batch
from distdiff.data.ingest.source import Source
from distdiff.differential import invalid
from distdiff.model import Model
from distdiff.tasks import Reader
from distdiff.tasks.made import made_by


@pytest.fixture(scope="module")
def model(atlas):
    spec = distdiff.CountStore.open(atlas).spec(("cell_type",))
    return Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})


LATER = {
    "denoise": lambda m, a: m.denoise(a, copy=False) or a,
    "denoise, a copy": lambda m, a: m.denoise(a),
    "denoise, some genes": lambda m, a: m.denoise(a, genes=["gene1", "gene2"]),
    "impute": lambda m, a: m.impute(a, mask=np.ones(a.shape, bool), mean_only=True),
    "complete": lambda m, a: m.complete(a[:, :20].copy(), mean_only=True),
    "deepen": lambda m, a: m.deepen(a, 2.0, beyond="allow"),
    "latent": lambda m, a: m.latent(a),
}


@pytest.mark.parametrize("later", LATER)
def test_generated_cells_stay_marked_whatever_is_done_to_them(model, later, tmp_path):
    made = model.generate(20, {"cell_type": "B"}, steps=2)
    made.obs["half"] = ["a", "b"] * 10
    made.layers["copy"] = made.X.copy()
    out = LATER["denoise, a copy"](model, LATER[later](model, made))
    out.write_h5ad(tmp_path / "a.h5ad")
    for found in (out, ad.read_h5ad(tmp_path / "a.h5ad")):
        for layer in (None, "copy"):
            with pytest.raises(ValueError, match="holds cells that a model generated"):
                distdiff.de(found, "half", layer=layer)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_they_stay_marked_on_files(model, suffix, tmp_path):
    read = ad.read_h5ad if suffix == ".h5ad" else ad.read_zarr
    batch.run("generate", model, None, tmp_path / f"a{suffix}", n=20, steps=2, progress=False)
    given = f"a{suffix}"
    steps = {
        "latent": {}, "denoise": {"genes": "all"}, "deepen": {"times": 2.0, "beyond": "allow"},
        "complete": {}, "impute": {"sites": "dropout", "groups": "leiden"},
    }  # fmt: skip
    for i, (kind, options) in enumerate(steps.items()):
        if kind == "complete":
            some = read(tmp_path / given)[:, :20].copy()
            given = f"some{suffix}"
            batch.write_anndata(some, tmp_path / given)
        if kind == "impute":
            options = {"mask": str(tmp_path / "mask.npy")}
            np.save(tmp_path / "mask.npy", np.ones(read(tmp_path / given).shape, bool))
        batch.run(kind, model, tmp_path / given, tmp_path / f"{i}{suffix}", progress=False, **options)
        given = f"{i}{suffix}"
        found = read(tmp_path / given)
        assert made_by(found.uns)[0] == "generate", kind
        assert "generated" in invalid(found, None)
    assert found.uns["distdiff"]["task"] == "impute"
    assert {"denoised", "deepened"} <= made_by(found.uns)[1].keys() <= set(found.layers)


def test_a_layer_of_a_name_of_ones_own_stays_marked(model, counts):
    out = model.denoise(counts, key_added="mine")
    for _ in range(2):
        assert "layer 'mine' holds estimates" in invalid(out, "mine")
        assert invalid(out, None) == ""
        out = model.deepen(out, 2.0, beyond="allow")
    assert made_by(out.uns) == ("", {"mine": "denoise", "deepened": "deepen"})
    del out.layers["mine"]
    assert made_by(model.latent(model.denoise(out)).uns)[1] == {"deepened": "deepen", "denoised": "denoise"}


def test_results_of_earlier_versions_are_understood(counts):
    adata = counts.copy()
    adata.uns["distdiff"] = {"task": "denoise", "layer": "mine", "valid_for_tests": False}
    adata.layers["mine"] = adata.X
    assert "estimates" in invalid(adata, "mine")
    for uns in ({}, {"distdiff": "text", "distdiff_made": 3}, {"distdiff_made": {"layers": "x"}}):
        assert made_by(uns) == ("", {})


@pytest.mark.parametrize("file", [False, True])
def test_appended_genes_are_not_evidence_of_a_later_task(model, counts, tmp_path, file):
    """Their counts in X are 0 for want of any: read as measured zeros they would deceive the network."""
    panel = counts[:, :20].copy()
    full = model.complete(panel, mean_only=True)
    if file:
        full.write_h5ad(tmp_path / "full.h5ad")
        source = Source.open(tmp_path / "full.h5ad", every=True)
    else:
        source = Source.from_anndata(full)
    reader = Reader(model.spec, source)
    assert (reader.measured.sum(), reader.absent, reader.unknown) == (20, 10, 10)
    assert Source.from_anndata(full, "imputed_mean").expressed is None
    if file:
        batch.run("denoise", model, tmp_path / "full.h5ad", tmp_path / "d.h5ad", progress=False)
        found = ad.read_h5ad(tmp_path / "d.h5ad")
    else:
        found = model.denoise(full)
    want = model.denoise(panel)
    assert list(found.var_names) == list(panel.var_names)
    assert np.allclose(np.asarray(found.layers["denoised"]), np.asarray(want.layers["denoised"]), rtol=1e-4)


@pytest.mark.parametrize("file", [False, True])
def test_genes_of_two_completions_are_all_marked(model, counts, tmp_path, file):
    panel = counts[:, :20].copy()
    names = [gene for gene in model.spec.genes if gene not in set(panel.var_names)]
    first, second = names[:4], names[4:]
    once = model.complete(panel, first, mean_only=True)
    if file:
        once.write_h5ad(tmp_path / "once.h5ad")
        out = tmp_path / "twice.h5ad"
        batch.run("complete", model, tmp_path / "once.h5ad", out, genes=second, mean_only=True, progress=False)
        twice = ad.read_h5ad(out)
    else:
        twice = model.complete(once, second, mean_only=True)
    assert list(twice.var_names[twice.var["distdiff_added"]]) == [*first, *second]
    want = model.complete(panel, second, mean_only=True)[:, second].layers["imputed_mean"]
    assert np.allclose(np.asarray(twice[:, second].layers["imputed_mean"]), np.asarray(want), rtol=1e-4)
