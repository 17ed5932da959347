from __future__ import annotations

import gzip
import os
import pickle
import tracemalloc
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

from distdiff.data.ingest import bygene
from distdiff.data.ingest import turn as module
from distdiff.data.ingest.bygene import Turned
from distdiff.data.ingest.source import Source
from distdiff.data.ingest.turn import ENTRY_BYTES, slabs, turn
from tests.data.conftest import make_adata, make_counts, save

from .test_tenx import MIXED, PLAIN, write_mtx

N, G = 60, 14
KINDS = ["csc.h5ad", "csc.zarr", "mtx", "mtx.gz", "legacy.h5ad"]


@pytest.fixture
def counts():
    x = make_counts(N, G).toarray()
    x[:, 3] = 1
    x[7] = 0
    x[4, 5] = 70_000
    return sparse.csr_matrix(x)


def make(kind, x, folder) -> Path:
    if kind.startswith("mtx"):
        return write_mtx(folder / "m", x, version=3 if kind.endswith("gz") else 2)
    path = save(make_adata(x.tocsc()), folder / kind)
    if kind == "legacy.h5ad":
        with h5py.File(path, "r+") as f:
            for k in ("encoding-type", "encoding-version", "shape"):
                del f["X"].attrs[k]
            f["X"].attrs["h5sparse_format"], f["X"].attrs["h5sparse_shape"] = "csc", x.shape
    return path


def turned(path, folder, budget, layer=None):
    for slab in slabs(path, layer, budget):
        turn(pickle.loads(pickle.dumps(slab)), folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [1, 7, 40, 10**6])
def test_rows_are_those_of_the_matrix(counts, tmp_path, kind, entries):
    path = make(kind, counts, tmp_path)
    folder = turned(path, tmp_path / "t", entries * ENTRY_BYTES)
    whole, source = Source.open(path), Source.open(path, turned=folder)
    assert source.by_gene
    assert whole.by_gene
    assert whole.note
    assert not source.note
    assert source.bytes_per_cell == whole.bytes_per_cell
    for start, stop in [(0, N), (3, 17), (7, 8), (N - 1, N), (5, 5), (N, N)]:
        got, want = source.read(start, stop), whole.read(start, stop)
        assert got.dtype == want.dtype == (np.int64 if kind.startswith("mtx") else np.float32)
        for part in ("indptr", "indices", "data"):
            np.testing.assert_array_equal(getattr(got, part), getattr(want, part))
        np.testing.assert_array_equal(got.toarray(), counts[start:stop].toarray())


@pytest.mark.parametrize("kind", ["csc.h5ad", "mtx", "mtx.gz"])
def test_an_empty_matrix(tmp_path, kind):
    path = make(kind, sparse.csr_matrix((5, G), dtype=np.float32), tmp_path)
    assert len(slabs(path, None, 1000)) == 1
    source = Source.open(path, turned=turned(path, tmp_path / "t", 1000))
    assert source.read(0, 5).nnz == Source.open(path).read(0, 5).nnz == 0


def test_a_layer_and_raw(counts, tmp_path):
    a = make_adata(counts)
    a.layers["counts"] = (counts * 2).tocsc()
    a.raw = make_adata(sparse.csc_matrix(counts * 3), names=a.obs_names)
    path = save(a, tmp_path / "a.h5ad")
    for layer, factor in (("counts", 2), ("raw", 3)):
        folder = turned(path, tmp_path / layer, 2000, layer)
        got = Source.open(path, layer, turned=folder)
        np.testing.assert_array_equal(got.read(5, 50).toarray(), factor * counts[5:50].toarray())
    with pytest.raises(ValueError, match="counts was turned from another file, layer or version"):
        Source.open(path, "raw", turned=tmp_path / "counts")
    with pytest.raises(ValueError, match="is stored cell by cell; there is nothing to turn"):
        slabs(path, None, 2000)
    with pytest.raises(ValueError, match="is stored cell by cell, it cannot have been turned"):
        Source.open(path, turned=tmp_path / "counts")


def test_only_expression_of_a_turned_mtx(counts, tmp_path):
    path = write_mtx(tmp_path / "m", counts, kinds=MIXED)
    keep = np.flatnonzero(np.array(MIXED) == "Gene Expression")
    source = Source.open(path, turned=turned(path, tmp_path / "t", 2000))
    np.testing.assert_array_equal(source.read(2, 40).toarray(), counts[2:40, keep].toarray())
    assert "5 other features were left out" in source.note


@pytest.mark.parametrize("gz", [False, True])
def test_entries_in_any_order_and_duplicates(tmp_path, gz):
    """Columns come out ascending; an entry that is there twice stays twice, in the order of the file."""
    rng = np.random.default_rng(0)
    cell, gene = rng.integers(0, 6, 300), rng.integers(0, G, 300)
    value = np.arange(1, 301)
    path = write_mtx(tmp_path / "m", make_counts(6, G), version=3 if gz else 2)
    lines = "".join(f"{g + 1}\t{c + 1}   {v}\r\n" for c, g, v in zip(cell, gene, value, strict=True))
    text = f"%%MatrixMarket matrix coordinate integer general\n%\n{G} 6 300\n\n{lines}".encode()
    (path / f"matrix.mtx{'.gz' if gz else ''}").write_bytes(gzip.compress(text) if gz else text)
    source = Source.open(path, turned=turned(path, tmp_path / "t", 31 * ENTRY_BYTES))
    order = np.lexsort((value, gene, cell))
    got = source.read(0, 6)
    np.testing.assert_array_equal(np.diff(got.indptr), np.bincount(cell, minlength=6))
    np.testing.assert_array_equal(got.indices, gene[order])
    np.testing.assert_array_equal(got.data, value[order])
    loaded = Source.open(path).read(0, 6)
    assert loaded.nnz == 300
    np.testing.assert_array_equal(loaded.toarray(), got.toarray())


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0.0, 1, 255], "u1"), ([1.0, 256, 3], "u2"), ([1.0, 65536, 3], "f4"), ([1.5, 2, 3], "f4"),
        ([-1.0, 2, 3], "f4"), ([np.nan, 2, 3], "f4"), ([np.inf, 2, 3], "f4"), ([1e30, 2, 3], "f4"),
    ],
)  # fmt: skip
def test_values_are_narrow_on_disk_and_exact(tmp_path, values, kept):
    x = sparse.csc_matrix((np.array(values, np.float32), [0, 1, 2], [0, 3]), shape=(3, 1))
    path = save(make_adata(x), tmp_path / "a.h5ad")
    folder = turned(path, tmp_path / "t", 1 << 20)
    assert np.load(folder / "slab-000000" / "0-values.npy").dtype == kept
    got = Source.open(path, turned=folder).read(0, 3)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.data, np.array(values, np.float32))


@pytest.mark.parametrize("kind", ["csc.h5ad", "mtx", "mtx.gz"])
def test_memory_is_that_of_the_budget(tmp_path, kind):
    """50 GB if it were dense; a task holds less than its budget, a few numbers a gene and what opening takes."""
    n, g = 250_000, 50_000
    nnz, budget = (2_000_000, 4 << 20) if kind == "csc.h5ad" else (500_000, 1 << 20)
    rng = np.random.default_rng(0)
    flat = np.unique(rng.integers(0, n * g, nnz))
    gene, cell = np.divmod(flat, n)
    gene[: nnz // 4] = 7  # one gene that is larger than the budget
    order = np.lexsort((cell, gene))
    gene, cell = gene[order], cell[order]
    value = rng.integers(1, 200, len(flat)).astype(np.float32)
    if kind == "csc.h5ad":
        path = tmp_path / "a.h5ad"
        empty = make_adata(sparse.csc_matrix((n, g), dtype=np.float32))
        empty.write_h5ad(path)
        with h5py.File(path, "r+") as f:
            indptr = np.searchsorted(gene, np.arange(g + 1)).astype(np.int64)
            for k, v in {"data": value, "indices": cell.astype(np.int32), "indptr": indptr}.items():
                del f["X"][k]
                f["X"][k] = v
        del empty
    else:
        path = write_mtx(tmp_path / "m", sparse.csr_matrix((3, 2)), ["a", "b"], PLAIN[:2], 3 if kind == "mtx.gz" else 2)
        lines = np.char.add(np.char.add((gene + 1).astype("U"), " "), np.char.add((cell + 1).astype("U"), " 3\n"))
        text = f"%%MatrixMarket matrix coordinate integer general\n{g} {n} {len(flat)}\n{''.join(lines)}"
        value[:] = 3
        gz = ".gz" if kind == "mtx.gz" else ""
        write = gzip.compress if gz else bytes
        (path / f"matrix.mtx{gz}").write_bytes(write(text.encode()))
        (path / f"barcodes.tsv{gz}").write_bytes(write("".join(f"c{i}\n" for i in range(n)).encode()))
        name = "features" if gz else "genes"
        (path / f"{name}.tsv{gz}").write_bytes(write("".join(f"E{i}\tg{i}\n" for i in range(g)).encode()))
        del lines, text
    tasks = slabs(path, None, budget)
    assert len(tasks) == (1 if kind == "mtx.gz" else -(-len(flat) // (budget // ENTRY_BYTES)))
    turn(tasks[0], tmp_path / "first")  # imports
    for slab in tasks[:3]:
        peak = _peak(lambda slab=slab: turn(slab, tmp_path / "t"))
        print(f"{kind}: {peak / 2**20:.2f} MiB of {budget / 2**20:.2f}")
        allowed = budget + (64 * g if kind == "csc.h5ad" else 1 << 19)
        assert peak < allowed, f"{peak / 2**20:.1f} MiB"
    for slab in tasks:
        turn(slab, tmp_path / "t")
    source = Source.open(path, turned=tmp_path / "t")
    rows = np.flatnonzero((cell >= 100_000) & (cell < 100_500))
    rows = rows[np.lexsort((gene[rows], cell[rows]))]
    got = source.read(100_000, 100_500)
    np.testing.assert_array_equal(got.indices, gene[rows])
    np.testing.assert_array_equal(got.data, value[rows])
    np.testing.assert_array_equal(np.diff(got.indptr), np.bincount(cell[rows] - 100_000, minlength=500))
    assert _peak(lambda: source.read(150_000, 150_500)) < 2_000_000


def _peak(call) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_opening_loads_no_matrix(counts, tmp_path, monkeypatch):
    path = make("csc.h5ad", counts, tmp_path)
    monkeypatch.setattr(bygene.Csc, "load", lambda self: pytest.fail("loaded"))
    source = Source.open(path)
    assert len(source.obs_names) == N
    assert source.bytes_per_cell > 0
    assert "CSC" in source.note


def test_a_task_done_twice(counts, tmp_path):
    path = make("csc.h5ad", counts, tmp_path)
    for name in "ab":
        turned(path, tmp_path / name, 1000)
    files = [sorted(p.relative_to(tmp_path / k) for p in (tmp_path / k).rglob("*.npy")) for k in "ab"]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files[0])
    tasks = slabs(path, None, 1000)
    before = os.stat(tmp_path / "a" / "slab-000000").st_mtime_ns
    assert turn(tasks[0], tmp_path / "a") == tasks[0].stop
    assert os.stat(tmp_path / "a" / "slab-000000").st_mtime_ns == before


def test_a_killed_task_leaves_nothing_that_counts(counts, tmp_path, monkeypatch):
    path = make("csc.h5ad", counts, tmp_path)
    tasks = slabs(path, None, 4000)
    assert len(tasks) > 2
    for task in tasks[:2]:
        turn(task, tmp_path / "t")
    pid = os.fork()
    if not pid:  # killed where it writes its last file
        monkeypatch.setattr(module, "_narrow", lambda values: os._exit(9))
        turn(tasks[2], tmp_path / "t")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert sorted(p.name for p in (tmp_path / "t").glob("[!.]*")) == ["slab-000000", "slab-000001"]
    with pytest.raises(ValueError, match=rf"t holds 2 of {len(tasks)} slabs; carry out `turn` on the others first"):
        Source.open(path, turned=tmp_path / "t")
    for task in tasks:
        turn(task, tmp_path / "t")
    assert not list((tmp_path / "t").glob(".*"))
    np.testing.assert_array_equal(Source.open(path, turned=tmp_path / "t").read(0, N).toarray(), counts.toarray())


def test_another_version_or_budget(counts, tmp_path):
    path = make("csc.h5ad", counts, tmp_path)
    folder = turned(path, tmp_path / "t", 4000)
    with pytest.raises(ValueError, match=r"was turned from another version of .*, or with another budget; delete"):
        turn(slabs(path, None, 2000)[0], folder)
    tasks = slabs(path, None, 4000)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"csc.h5ad changed while it was being turned"):
        turn(tasks[0], tmp_path / "new")
    with pytest.raises(ValueError, match="was turned from another file, layer or version than"):
        Source.open(path, turned=folder)
    with pytest.raises(ValueError, match=r"budget_bytes=63 is too little"):
        slabs(path, None, 63)
    with pytest.raises(ValueError, match=r"nowhere holds 0 of 1 slabs"):
        Turned(tmp_path / "nowhere", (N, G))
    with pytest.raises(ValueError, match=r"t holds \[60, 14\] cells and genes, \[60, 15\] wanted"):
        Turned(folder, (N, 15))


@pytest.mark.parametrize("turning", [True, False])
def test_damaged_csc(counts, tmp_path, turning):
    path = make("csc.h5ad", counts, tmp_path)

    def go():
        if turning:
            turned(path, tmp_path / "t", 4000)
        else:
            Source.open(path).read(0, 1)

    with h5py.File(path, "r+") as f:
        indices = f["X/indices"][:]
        f["X/indices"][-3] = N
    with pytest.raises(ValueError, match=r"csc.h5ad: an entry is of cell 61, counted from 1, but there are 60"):
        go()
    with h5py.File(path, "r+") as f:
        f["X/indices"][:] = indices
        f["X/indptr"][4] = 10**6
    with pytest.raises(ValueError, match=r"csc.h5ad: indptr does not fit 14 genes"):
        go()
    with h5py.File(path, "r+") as f:
        f["X/indptr"][4] = f["X/indptr"][3]
        del f["X/indices"]
        f["X/indices"] = indices[:-5]
    with pytest.raises(ValueError, match=r"csc.h5ad: \d+ entries promised, \d+ indices .* truncated or damaged"):
        go()


@pytest.mark.parametrize("kind", ["mtx", "mtx.gz"])
def test_truncated_mtx(counts, tmp_path, kind):
    path = make(kind, counts, tmp_path)
    matrix = next(path.glob("matrix*"))
    whole = matrix.read_bytes()
    if kind == "mtx":  # whole lines are missing: each task is content, the sum is not
        matrix.write_bytes(b"\n".join(whole.split(b"\n")[:-6]) + b"\n")
        folder = turned(path, tmp_path / "t", 3000)
        with pytest.raises(
            ValueError, match=r"m: \d+ entries promised, \d+ found; truncated or damaged: copy the file"
        ):
            Source.open(path, turned=folder)
    else:
        matrix.write_bytes(whole[:-30])
        with pytest.raises(ValueError, match=r"matrix.mtx.gz cannot be read .*truncated or damaged"):
            turned(path, tmp_path / "t", 3000)
        assert not list((tmp_path / "t").glob("*"))


def test_damaged_pieces(counts, tmp_path):
    path = make("csc.h5ad", counts, tmp_path)
    folder = turned(path, tmp_path / "t", 10**6)
    (folder / "slab-000000" / "0-values.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"0-values.npy cannot be read .*; delete its folder and turn the file again"):
        Source.open(path, turned=folder)


def test_anndata_in_memory_is_not_by_gene(counts):
    assert not Source.from_anndata(ad.AnnData(counts.tocsc())).by_gene
