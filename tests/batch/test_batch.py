"""The engine of tasks on files: what is written, who may write it, and what happens when anything dies."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from distdiff import batch, files
from distdiff.batch import frame, impute_file, job, output, plan
from distdiff.batch.layout import Field, Layout, cast
from distdiff.batch.output import Corrupt
from distdiff.batch.rows import StoreRows
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from tests import forkserver
from tests.batch import forks
from tests.batch.conftest import OPTIONS


@pytest.fixture(scope="module")
def model(atlas):
    return Model.new(CountStore.open(atlas).spec(("cell_type",)), *OPTIONS)


def as_anndata(atlas):
    """The store in its own order."""
    rows = StoreRows(CountStore.open(atlas))
    obs = pd.DataFrame({"cell_type": rows.obs("cell_type")}, index=rows.names(0, rows.n_cells))
    x = rows.read(0, rows.n_cells).astype(np.float32)
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=list(rows.genes)))


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def content(out):
    """Every file of a result but what tells of the run: seconds, memory, the command."""
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in sorted(Path(out).rglob("*"))
        if p.is_file() and p.name != "zarr.json" and "uns/distdiff" not in p.as_posix()
    }


SMALL = {"progress": False, "shard_cells": 80, "batch_size": 32}


# -- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False, None])
def test_the_result_is_that_of_the_model_in_memory(model, atlas, mask, tmp_path, sparse):
    out = tmp_path / "out.zarr"
    layers = ("mean", "draws", "mask", "ood", "sd", "q90")
    said = []
    filled = impute_file(
        model,
        atlas,
        out,
        mask=mask,
        draws=2,
        layers=layers,
        sparse=sparse,
        seed=3,
        command="it",
        notify=said.append,
        **SMALL,
    )
    given, hidden = as_anndata(atlas), np.load(mask)
    want = model.impute(given, mask=hidden, draws=2, seed=3)
    got = ad.read_zarr(out)
    assert (dense(got.X) == dense(given.X)).all()
    assert list(got.obs_names) == list(given.obs_names)
    assert list(got.obs["cell_type"]) == list(given.obs["cell_type"])
    some = np.where(hidden, 0, dense(given.X)).sum(1) > 0
    assert (dense(got.layers["imputed_mask"]) == (hidden & some[:, None])).all()
    assert np.allclose(dense(got.layers["imputed_mean"]), want.layers["imputed_mean"], rtol=1e-5)
    for name in ("imputed", "imputed_draw2"):
        assert got.layers[name].dtype == np.int32
        assert (dense(got.layers[name]) == want.layers[name]).all()
    if sparse is not None:
        assert all(sp.issparse(values) == sparse for values in got.layers.values())
    observed = dense(got.layers["imputed_mask"]) == 0
    assert (dense(got.layers["imputed_sd"])[observed] == 0).all()
    assert (dense(got.layers["imputed_sd"])[~observed] > 0).all()
    assert (dense(got.layers["imputed_q90"])[observed] == dense(given.X)[observed]).all()
    done = got.uns["distdiff"]
    assert (done["seed"], done["command"], done["input"], done["sites"]) == (3, "it", "atlas.zarr", "mask")
    assert done["model_sha256"] == model.fingerprint()
    assert done["targets"] == filled.targets == int((~observed).sum())
    assert filled.passes == 5.0  # the mean and both draws by one call, four of the likelihood
    assert "bytes a cell" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_the_standard_deviation_is_that_of_the_draws(model, atlas, mask, tmp_path):
    options = {"draws": 80, "layers": ("draws", "sd"), "sparse": False, "progress": False}
    impute_file(model, atlas, tmp_path / "out.zarr", mask=mask, **options)
    got = ad.read_zarr(tmp_path / "out.zarr")
    assert "imputed_mean" not in got.layers
    drawn = np.stack([dense(v) for k, v in got.layers.items() if k.startswith("imputed") and k != "imputed_sd"])
    sd = dense(got.layers["imputed_sd"])
    assert drawn.std(0)[sd > 0].mean() == pytest.approx(sd[sd > 0].mean(), rel=0.05)


def test_the_score_is_the_likelihood_bound(model, atlas, mask, tmp_path):
    batch.run("denoise", model, atlas, tmp_path / "out.zarr", ood=6, **SMALL)
    got = ad.read_zarr(tmp_path / "out.zarr")
    want = model.likelihood(as_anndata(atlas), levels=6)["nats"]
    assert np.allclose(got.obs["distdiff_nats"], want, rtol=1e-4)
    assert np.allclose(dense(got.layers["denoised"]), model.denoise(as_anndata(atlas)).layers["denoised"], rtol=1e-5)


def test_draws_do_not_depend_on_batch_and_shard(model, atlas, mask, tmp_path):
    cuts = [{"shard_cells": 48, "batch_size": 16}, {"shard_cells": 208, "batch_size": 199}, {}]
    for i, cut in enumerate(cuts):
        impute_file(model, atlas, tmp_path / f"{i}.zarr", mask=mask, layers=("draws",), steps=2, progress=False, **cut)
    first, *others = (dense(ad.read_zarr(tmp_path / f"{i}.zarr").layers["imputed"]) for i in range(len(cuts)))
    assert first.sum() > 0
    assert all((first == other).all() for other in others)


def test_deepen_generate_and_complete(model, atlas, tmp_path):
    given = as_anndata(atlas)
    batch.run("deepen", model, atlas, tmp_path / "deep.zarr", times=2.0, beyond="allow", seed=1, **SMALL)
    want = model.deepen(given, 2.0, beyond="allow", seed=1).layers["deepened"]
    got = ad.read_zarr(tmp_path / "deep.zarr").layers["deepened"]
    assert sp.issparse(got)
    assert (got != want).nnz == 0
    obs = {"cell_type": "B"}
    batch.generate_file(model, 100, tmp_path / "made.zarr", obs=obs, steps=3, seed=2, **SMALL)
    made = ad.read_zarr(tmp_path / "made.zarr")
    assert (dense(made.X) == dense(model.generate(100, obs, steps=3, seed=2).X)).all()
    assert list(made.obs_names[:2]) == ["generated0", "generated1"]
    deep = np.arange(10.0, 110.0)
    batch.generate_file(model, 100, tmp_path / "deep.h5ad", obs=obs, depth=deep, steps=3, seed=2, **SMALL)
    want = model.generate(100, obs, depth=deep, steps=3, seed=2).X
    assert (dense(ad.read_h5ad(tmp_path / "deep.h5ad").X) == dense(want)).all()
    assert set(made.obs["cell_type"]) == {"B"}
    panel = given[:, 5:].copy()
    panel.obsm["pca"] = np.ones((199, 2))
    panel.write_h5ad(tmp_path / "panel.h5ad")
    append = list(given.var_names[:2])
    batch.run("complete", model, tmp_path / "panel.h5ad", tmp_path / "whole.zarr", genes=append, **SMALL)
    whole = ad.read_zarr(tmp_path / "whole.zarr")
    assert list(whole.var_names) == [*panel.var_names, *append]
    assert whole.var["distdiff_added"].sum() == 2
    assert (whole.obsm["pca"] == 1).all()
    want = model.complete(panel, append)
    assert (dense(whole.X) == dense(want.X)).all()
    assert np.allclose(dense(whole.layers["imputed_mean"]), want.layers["imputed_mean"], rtol=1e-5)


def test_chosen_genes_and_widths(model, atlas, mask, tmp_path):
    keep = ["gene7", "gene2", "gene29"]
    impute_file(model, atlas, tmp_path / "a.zarr", mask=mask, genes=keep, dtype="float16", layers=("mean",), **SMALL)
    got, given = ad.read_zarr(tmp_path / "a.zarr"), as_anndata(atlas)
    assert list(got.var_names) == keep
    assert (dense(got.X) == dense(given[:, keep].X)).all()
    assert got.layers["imputed_mean"].dtype == np.float16
    want = model.impute(given, mask=np.load(mask))[:, keep].layers["imputed_mean"]
    assert np.allclose(got.layers["imputed_mean"], want, rtol=1e-3)
    with pytest.raises(ValueError, match="is no gene of the result"):
        impute_file(model, atlas, tmp_path / "b.zarr", mask=mask, genes=["gene77"], **SMALL)
    with pytest.raises(ValueError, match="no sparse float16"):
        impute_file(model, atlas, tmp_path / "b.zarr", mask=mask, dtype="float16", sparse=True, **SMALL)
    with pytest.raises(ValueError, match="unknown layer 'maen'"):
        impute_file(model, atlas, tmp_path / "b.zarr", mask=mask, layers=("maen",), **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_a_file_is_inherited_and_its_mask_read_by_rows(model, atlas, mask, tmp_path):
    given = as_anndata(atlas)
    given.layers["mask"], given.layers["raw"] = sp.csr_matrix(np.load(mask)), given.X.copy()
    given.obsp["near"], given.uns["note"] = sp.eye(199, format="csr"), {"a": [1, 2], "b": "c"}
    given.obs["score"], given.X = np.arange(199.0), given.X.multiply(0.5).tocsr()
    given.raw = given.copy()
    given.write_h5ad(tmp_path / "in.h5ad")
    for suffix in ("zarr", "h5ad"):
        out = tmp_path / f"out.{suffix}"
        impute_file(model, tmp_path / "in.h5ad", out, layer="raw", mask="mask", **SMALL)
        got = ad.read_zarr(out) if suffix == "zarr" else ad.read_h5ad(out)
        assert (dense(got.X) == dense(given.X)).all()
        assert (dense(got.obsp["near"]) == np.eye(199)).all()
        assert (dense(got.raw.X) == dense(given.X)).all()
        assert got.uns["note"]["b"] == "c"
        assert list(got.obs.columns) == ["cell_type", "score", "distdiff_nats"]
        assert (got.obs["score"] == given.obs["score"]).all()
        hidden = np.load(mask)
        assert (dense(got.layers["imputed"])[~hidden] == dense(given.layers["raw"])[~hidden]).all()


def test_read_lazily(model, atlas, mask, tmp_path):
    pytest.importorskip("xarray")
    impute_file(model, atlas, tmp_path / "out.zarr", mask=mask, **SMALL)
    lazy = ad.experimental.read_lazy(tmp_path / "out.zarr")
    whole = ad.read_zarr(tmp_path / "out.zarr")
    for name in whole.layers:
        assert (dense(lazy.layers[name].compute()) == dense(whole.layers[name])).all()
    assert (np.asarray(lazy.obs["distdiff_nats"]) == whole.obs["distdiff_nats"]).all()


def test_numbers_that_a_width_does_not_hold_are_refused():
    with pytest.raises(ValueError, match=r"holds 70000, float16 reaches to 65504: .*float32"):
        cast(np.array([70000.0]), Field("layers/x", "float16"))
    with pytest.raises(ValueError, match="uint16 reaches"):
        cast(np.array([-1.0]), Field("layers/x", "uint16"))
    assert cast(np.array([1.6]), Field("layers/x", "int16")).tolist() == [2]


@pytest.mark.parametrize("n", [1, 15, 16, 199, 256, 257, 5000, 10**6])
@pytest.mark.parametrize("width", [1, 30, 20_000])
def test_layouts_cover_all_rows_and_fit_chunks(n, width):
    for rows in (None, 1, 100, 10**6):
        layout = Layout.fit(n, [Field("layers/x", "float32", width)], rows)
        assert layout.rows % layout.chunk == 0
        spans = [layout.span(i) for i in range(layout.n_shards)]
        assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])]
        assert spans[-1][1] == n


# -- who may write -------------------------------------------------------------------------------------------------


def test_another_job_is_refused_and_named(model, atlas, mask, tmp_path, monkeypatch):
    out = tmp_path / "out.zarr"
    options = {"mask": mask, "layers": ("mean", "draws"), **SMALL}
    impute_file(model, atlas, out, seed=1, **options)
    before = content(out)
    again = impute_file(model, atlas, out, seed=1, **options)  # finished: nothing to do
    assert again.cells == 199
    with pytest.raises(FileExistsError, match=r"another job \(seed: 1 there, 2 here\); give overwrite=True"):
        impute_file(model, atlas, out, seed=2, **options)
    other = Model.new(model.spec, OPTIONS[0], OPTIONS[1], seed=9)
    with pytest.raises(FileExistsError, match=r"model: .* there, .* here"):
        impute_file(other, atlas, out, seed=1, **options)
    assert content(out) == before
    impute_file(model, atlas, out, seed=2, overwrite=True, **options)
    assert ad.read_zarr(out).uns["distdiff"]["seed"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]

    monkeypatch.setattr(output, "encode", _full(2))  # begun with seed 3, and left
    with pytest.raises(OSError, match="the disk is full"):
        impute_file(model, atlas, tmp_path / "b.zarr", seed=3, sparse=False, **options)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match=r"begun by another job.*seed: 3 there, 4 here"):
        impute_file(model, atlas, tmp_path / "b.zarr", seed=4, sparse=False, **options)
    impute_file(model, atlas, tmp_path / "b.zarr", seed=4, sparse=False, overwrite=True, **options)
    assert ad.read_zarr(tmp_path / "b.zarr").uns["distdiff"]["seed"] == 4


def test_what_is_no_result_is_not_replaced_unasked(model, atlas, mask, tmp_path):
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match=r"exists already; give overwrite=True"):
        impute_file(model, atlas, tmp_path / "out.zarr", mask=mask, **SMALL)
    assert (tmp_path / "out.zarr" / "precious").exists()


@pytest.mark.parametrize("link", [".", "lock", "owner.json", "job.json", "0123456789ab", "0123456789ab/000001"])
def test_a_work_folder_that_is_or_holds_a_link_is_refused(model, atlas, mask, tmp_path, link):
    victim, work = tmp_path / "victim", tmp_path / ".out.zarr.building"
    victim.mkdir()
    (victim / "precious").write_text("years of work")
    (work / link).parent.mkdir(parents=True, exist_ok=True)
    (work / link).symlink_to(victim)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is a symbolic link"):
            impute_file(model, atlas, tmp_path / "out.zarr", mask=mask, overwrite=overwrite, progress=False)
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        batch.verify(tmp_path / "out.zarr")
    assert [p.name for p in victim.iterdir()] == ["precious"]


def test_a_plan_that_is_none_is_removed_and_its_paths_stay_inside(model, atlas, mask, tmp_path):
    out, work = tmp_path / "out.zarr", tmp_path / ".out.zarr.building"
    impute_file(model, atlas, out, mask=mask, **SMALL)
    about = json.loads((out / "zarr.json").read_text())["attributes"]["distdiff"]["plan"]
    shutil.rmtree(out)
    fields = about["layout"]["fields"]
    odd = ["", "junk", "[]", "null", "{}", "[" * 100_000, json.dumps({**about, "zzz": 1})]
    for path in ("../../escaped", "/escaped", "X/../../escaped", "", "."):
        odd.append(json.dumps({**about, "layout": {**about["layout"], "fields": [{**fields[0], "path": path}]}}))
    for text in odd:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (work / "job.json").write_text(text)
        said = []
        impute_file(model, atlas, out, mask=mask, notify=said.append, **SMALL)
        assert f"{work}: removed, its plan was left by another version of distdiff or is damaged" in said[0]
        assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]
        shutil.rmtree(out)


@pytest.mark.parametrize("number", [-1, 0])
@pytest.mark.parametrize("name", ["batch_size", "shard_cells"])
def test_no_cells_at_a_time_would_never_end(model, atlas, mask, tmp_path, name, number):
    with pytest.raises(ValueError, match=f"{name} must be at least 1 cell, got {number}"):
        impute_file(model, atlas, tmp_path / "out.zarr", mask=mask, progress=False, **{name: number})
    assert not list(tmp_path.iterdir())


def test_the_work_folder_of_a_killed_build_is_removed(model, atlas, mask, tmp_path):
    work = tmp_path / ".out.zarr.building"
    (work / "store" / "counts").mkdir(parents=True)
    for name in ("lock", "identity"):
        (work / name).touch()
    said = []
    impute_file(model, atlas, tmp_path / "out.zarr", mask=mask, notify=said.append, **SMALL)
    assert said[0] == f"{work}: removed, it was left by a distdiff shard that was killed"
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]
    assert not (tmp_path / "out.zarr" / "counts").exists()


def test_genes_that_do_not_match(model, atlas, tmp_path):
    strange = as_anndata(atlas)
    strange.var_names = [f"ENSG{i}" for i in range(30)]
    strange.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(ValueError, match="none of the input's 30 genes is among the model's"):
        impute_file(model, tmp_path / "in.h5ad", tmp_path / "out.zarr", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["in.h5ad"]


def test_nothing_to_write_is_written(model, atlas, tmp_path):
    """CSR arrays of no value at all."""
    np.save(tmp_path / "mask.npy", np.zeros((199, 30), bool))
    out = tmp_path / "out.zarr"
    filled = impute_file(model, atlas, out, mask=str(tmp_path / "mask.npy"), sparse=True, genes=["gene1"], **SMALL)
    assert filled.targets == 0
    got = ad.read_zarr(out)
    assert got.layers["imputed_mask"].nnz == 0
    assert (dense(got.layers["imputed"]) == dense(got.X)).all()
    assert "as written" in batch.verify(out, progress=False)


def test_a_bad_count_is_named(model, atlas, mask, tmp_path):
    bad = as_anndata(atlas)
    bad.X = bad.X.toarray()
    bad.X[150, np.flatnonzero(~np.load(mask)[150])[0]] = 0.5
    bad.write_h5ad(tmp_path / "in.h5ad")
    with pytest.raises(ValueError, match=r"cell 'cell\d+'.*log-normalised"):
        impute_file(model, tmp_path / "in.h5ad", tmp_path / "out.zarr", mask=mask, **SMALL)


# -- disks ---------------------------------------------------------------------------------------------------------


def _full(after):
    """``output.encode`` on a disk that is full after some files."""
    real, done = output.encode, []

    def encode(*arguments):
        done.append(1)
        if len(done) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    return encode


def shards_of(out):
    """Names of the finished shards of an unfinished job."""
    return sorted(p.parent.name for p in Path(out).with_name(f".{Path(out).name}.building").glob("*/*/record.json"))


def test_no_space_left_then_on(model, atlas, mask, tmp_path, monkeypatch):
    options = {"mask": mask, "sparse": False, **SMALL}
    impute_file(model, atlas, tmp_path / "want.zarr", **options)
    monkeypatch.setattr(output, "encode", _full(10))
    with pytest.raises(OSError, match=r"the disk is full: .*run the same command again, it goes on") as told:
        impute_file(model, atlas, tmp_path / "out.zarr", **options)
    assert told.value.errno == errno.ENOSPC
    assert not (tmp_path / "out.zarr").exists()
    monkeypatch.undo()
    done = len(shards_of(tmp_path / "out.zarr"))
    assert 0 < done < 3
    computed = []
    real = output.write_shard
    monkeypatch.setattr(
        output, "write_shard", lambda layout, shard, *rest: computed.append(shard) or real(layout, shard, *rest)
    )
    impute_file(model, atlas, tmp_path / "out.zarr", **options)
    assert len(computed) == 3 - done
    assert content(tmp_path / "out.zarr") == content(tmp_path / "want.zarr")


def test_a_disk_that_cannot_hold_the_result(model, atlas, mask, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"1 kB free, the result needs .* bytes a cell.*dtype='float16'"):
        impute_file(model, atlas, tmp_path / "out.zarr", mask=mask, **SMALL)
    assert list(tmp_path.iterdir()) == []


def _harm(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


@pytest.mark.parametrize("which", ["layers/imputed/c/2/0", "layers/imputed_mean/data/c/0", "obs/_index/c/1"])
def test_a_damaged_shard_is_found_and_computed_again(model, atlas, mask, tmp_path, which):
    out = tmp_path / "out.zarr"
    sparse = "data" in which
    options = {"mask": mask, "sparse": sparse}
    impute_file(model, atlas, out, **options, **SMALL)
    assert "as written" in batch.verify(out, progress=False)
    want = content(out)
    _harm(out / which)
    with pytest.raises(Corrupt, match=f"{which}.*--repair"):
        batch.verify(out, progress=False)
    other = Model.new(model.spec, OPTIONS[0], OPTIONS[1], seed=9)
    with pytest.raises(ValueError, match="cannot be repaired by this one: model"):
        batch.check("impute", other, atlas, out, repair=True, progress=False, **options)
    assert "computed again" in batch.check("impute", model, atlas, out, repair=True, progress=False, **options)
    assert content(out) == want
    assert "as written" in batch.verify(out, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_a_part_that_is_damaged_before_the_end(model, atlas, mask, tmp_path, monkeypatch):
    options = {"mask": mask, "sparse": True, **SMALL}
    impute_file(model, atlas, tmp_path / "want.zarr", **options)
    out, work = tmp_path / "out.zarr", tmp_path / ".out.zarr.building"
    real = job.finish

    def finish(*arguments, **more):
        _harm(next(work.glob("*/000001/layers.imputed_mean.data")))
        return real(*arguments, **more)

    monkeypatch.setattr(job, "finish", finish)
    with pytest.raises(Corrupt, match=r"imputed_mean.data \(shard 1\) differs.*--verify --repair"):
        impute_file(model, atlas, out, **options)
    monkeypatch.undo()
    with pytest.raises(Corrupt, match="shard-000001 differ"):
        batch.verify(out, progress=False)
    assert "shard-000001 removed" in batch.verify(out, repair=True, progress=False)
    assert shards_of(out) == ["000000", "000002"]
    impute_file(model, atlas, out, **options)
    assert content(out) == content(tmp_path / "want.zarr")


def test_the_input_is_only_read(model, atlas, mask, tmp_path):
    store = tmp_path / "in.zarr"
    shutil.copytree(atlas, store)
    for path in [store, *store.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files.stamp(store)
    impute_file(model, store, tmp_path / "out.zarr", mask=mask, **SMALL)
    assert files.stamp(store) == before
    for path in [store, *store.rglob("*")]:
        path.chmod(0o755)


@pytest.mark.distributed
def test_memory_does_not_grow_with_the_cells(saved, tmp_path):
    queue = forkserver.SERVER.Queue()
    peaks = []
    for cells in (10_000, 100_000):
        task = forkserver.process(forks.peak, (str(saved), cells, str(tmp_path / f"{cells}.zarr"), queue))
        task.start()
        try:
            peaks.append(queue.get(timeout=90))
            task.join(20)
        finally:
            task.kill()
    assert peaks[1] < 1.1 * peaks[0]


def test_frames_of_any_kind_travel(tmp_path):
    adata = ad.AnnData(
        np.arange(12.0).reshape(4, 3),
        obs=pd.DataFrame(
            {"kind": pd.Categorical(["a", "b", None, "a"]), "text": list("wxyz"), "flag": [True, False, True, True],
             "whole": pd.array([1, None, 3, 4], dtype="Int64")}, index=list("abcd"),
        ),
        uns={"deep": {"er": np.arange(3)}, "none": "x"},
    )  # fmt: skip
    adata.layers["csc"] = sp.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "a.h5ad")
    import h5py

    with h5py.File(tmp_path / "a.h5ad") as source, frame.as_zarr(tmp_path / "a.zarr") as target:
        for key in source:
            frame.transfer(source, target, key)
        frame.describe(target, source.attrs)
    got = ad.read_zarr(tmp_path / "a.zarr")
    pd.testing.assert_frame_equal(got.obs, ad.read_h5ad(tmp_path / "a.h5ad").obs)
    assert (got.X == adata.X).all()
    assert got.layers["csc"].format == "csc"
    assert (got.uns["deep"]["er"] == np.arange(3)).all()
