from __future__ import annotations

import errno
import importlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

import distdiff.data.ingest.scan as scanning
from distdiff import files
from distdiff.data.store.manifest import Manifest
from distdiff.data.store.store import CountStore
from tests.data.conftest import build, make_adata, make_counts, save
from tests.data.kills import ended


def everything(store: CountStore) -> np.ndarray:
    return store.read(store.rows("all")).toarray()


@pytest.fixture
def one(tmp_path, dense):
    return save(make_adata(sparse.csr_matrix(dense.astype(np.float32))), tmp_path / "one.h5ad")


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_what_goes_in_comes_out(tmp_path, dense, name, kind):
    x = dense.astype(np.float32)
    x = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[kind](x)
    made = build(save(make_adata(x), tmp_path / name), tmp_path / "out")
    store = CountStore.open(tmp_path / "out")
    assert np.array_equal(everything(store), dense)
    assert store.genes == tuple(f"g{i}" for i in range(40))
    assert store.names(store.rows("all")).tolist() == [f"c{i}" for i in range(150)]
    assert (made.dtype, [g.name for g in made.groups], len(made.shards), made.n_blocks) == ("uint8", ["all"], 5, 10)
    assert sum(s.nnz for s in made.shards) == np.count_nonzero(dense)
    store.verify()


def test_the_manifest_is_what_was_returned(folder):
    made = Manifest.read(folder)
    assert Manifest.from_json(made.to_json()) == made
    assert made.labels == {"kind": ("B", "NK", "T"), "donor": tuple(f"d{i}" for i in range(6))}
    assert made.split.n_cells == (120, 15, 15)
    assert made.sources[0].path == "a.h5ad"


def test_statistics_are_of_the_training_cells(folder, dense):
    store = CountStore.open(folder)
    train = dense[store.rows("train")]
    got = store.statistics()
    np.testing.assert_allclose(got["mean"], train.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got["var"], train.var(0), rtol=1e-9)
    np.testing.assert_array_equal(got["nnz"], (train > 0).sum(0))
    np.testing.assert_array_equal(got["max"], train.max(0))


def test_two_files_with_other_genes_clashing_cells_and_missing_labels(tmp_path, capsys):
    a, b = make_counts(40, 10, 1).toarray(), make_counts(30, 9, 2).toarray()
    a[3] = 0
    b[[0, 29]] = 0
    a, b = sparse.csr_matrix(a), sparse.csr_matrix(b)
    kind = np.array(["T", None], dtype=object)
    one = make_adata(a, names=[f"x{i}" for i in range(40)], kind=pd.Categorical(kind[np.arange(40) % 2]))
    genes = ["g7", "new", "g3", "g0", "g1", "g2", "g9", "g8", "g4"]
    two = make_adata(b, genes=genes, names=[f"x{i + 35}" for i in range(30)], kind=["A"] * 30)
    made = build(
        [save(one, tmp_path / "one.h5ad"), save(two, tmp_path / "two.zarr")],
        tmp_path / "out", labels=["kind"], progress=True,
    )  # fmt: skip
    store = CountStore.open(tmp_path / "out")
    shared = ["g0", "g1", "g2", "g3", "g4", "g7", "g8", "g9"]
    both = np.vstack([one[:, shared].X.toarray(), two[:, shared].X.toarray()])
    kept = np.flatnonzero(both.sum(1))
    assert list(store.genes) == [g for g, n in zip(shared, both.sum(0), strict=True) if n]
    assert np.array_equal(everything(store), both[kept][:, both.sum(0) > 0])
    file, row = store.origin(store.rows("all"))
    assert np.array_equal(np.where(file, row + 40, row), kept)
    clash = {f"x{i}" for i in range(35, 40)}
    names = [*one.obs_names, *two.obs_names]
    want = [f"{names[i]}-{int(i >= 40)}" if names[i] in clash else names[i] for i in kept]
    assert store.names(store.rows("all")).tolist() == want
    values = np.array([*made.labels["kind"], None], dtype=object)
    got = values[store.labels(store.rows("all"))["kind"]]
    assert got.tolist() == [("T", None)[i % 2] if i < 40 else "A" for i in kept]
    assert made.labels["kind"] == ("A", "T")
    empty = both.sum(1) == 0
    assert [s.empty for s in made.sources] == [empty[:40].sum(), empty[40:].sum()]
    assert [s.kept for s in made.sources] == [(~empty[:40]).sum(), (~empty[40:]).sum()]
    assert made.not_shared == 3
    said = capsys.readouterr().out
    assert "3 genes left out: some file lacks them; 8 are shared" in said
    assert f"{empty.sum()} without counts dropped" in said


def test_never_counted_genes_go_unless_they_are_named(tmp_path):
    x = make_counts(60, 6).tolil()
    x[:, 0], x[:, 2] = 1, 0
    path = save(make_adata(x.tocsr()), tmp_path / "a.h5ad")
    made = build(path, tmp_path / "all")
    assert made.never_counted == ("g2",)
    assert made.genes == ("g0", "g1", "g3", "g4", "g5")
    (tmp_path / "list.txt").write_text("g5\n\n g2 \ng0\n")
    named = build(path, tmp_path / "named", genes=str(tmp_path / "list.txt"))
    assert (named.genes, named.never_counted, named.chosen_by) == (("g5", "g2", "g0"), (), "list.txt")
    assert np.array_equal(everything(CountStore.open(tmp_path / "named")), x.toarray()[:, [5, 2, 0]])


def test_variable_genes_are_those_of_the_training_cells(tmp_path):
    x = make_counts(200, 50, 3).toarray()
    x[:, 10] = 1
    path = save(make_adata(sparse.csr_matrix(x)), tmp_path / "a.h5ad")
    made = build(path, tmp_path / "fano", genes="fano:12")
    full = build(path, tmp_path / "all")
    train = x[CountStore.open(tmp_path / "all").rows("train")]
    assert full.n_cells == 200
    with np.errstate(invalid="ignore"):
        fano = np.nan_to_num(train.var(0) / train.mean(0))
    want = np.sort(np.argsort(-fano)[:12])
    assert made.genes == tuple(f"g{i}" for i in want)
    assert np.array_equal(everything(CountStore.open(tmp_path / "fano")), x[x[:, want].sum(1) > 0][:, want])


def test_large_counts_take_wider_integers(tmp_path):
    x = make_counts(20, 5).astype(np.float64).tolil()
    x[:, 0] = 1
    x[3, 1], x[4, 1] = 70_000, 2**32 - 1
    path = save(make_adata(x.tocsr()), tmp_path / "a.h5ad")
    assert build(path, tmp_path / "out").dtype == "uint32"
    got = CountStore.open(tmp_path / "out").read(np.array([4, 3]))
    assert got.dtype == np.int64
    assert got[:, 1].toarray().ravel().tolist() == [2**32 - 1, 70_000]
    x[4, 1] = 2**32
    with pytest.raises(ValueError, match="above the largest count a store holds, 4294967295"):
        build(save(make_adata(x.tocsr()), tmp_path / "b.h5ad"), tmp_path / "more")


def test_shards_whose_bytes_are_all_zero_are_written(tmp_path):
    x = np.zeros((70, 3), np.float32)  # only gene 0: every stored index is 0, zarr's fill value
    x[:, 0] = 2
    x[0] = 1
    build(save(make_adata(sparse.csr_matrix(x)), tmp_path / "a.h5ad"), tmp_path / "out")
    assert np.array_equal(everything(CountStore.open(tmp_path / "out")), x)


def test_anyone_can_read_it_with_zarr(folder, dense):
    counts = zarr.open_group(str(folder), mode="r")["counts/all"]
    block = 4
    gaps, values, starts = (counts[k][block].astype(np.int64) for k in ("gaps", "values", "starts"))
    got = np.zeros((16, 40), np.int64)
    for cell in range(16):  # docs/STORE.md
        entries = slice(starts[cell], starts[cell + 1])
        np.add.at(got[cell], gaps[entries].cumsum(), values[entries])
    assert np.array_equal(got, dense[64:80])
    assert counts["gaps"].shards == (2, counts["gaps"].shape[1])


def test_split_by_donor_keeps_donors_whole(tmp_path):
    donor = np.repeat(["a", "b", "c", "d", "e"], 12)
    path = save(make_adata(make_counts(60, 20), donor=donor), tmp_path / "a.h5ad")
    build(path, tmp_path / "out", split=(0.6, 0.2, 0.2), split_by="donor")
    store = CountStore.open(tmp_path / "out")
    of = {s: set(donor[store.origin(store.rows(s))[1]]) for s in ("train", "val", "test")}
    assert [len(v) for v in of.values()] == [3, 1, 1]
    assert not of["train"] & of["val"]
    with pytest.raises(ValueError, match="obs has no column 'doner'; did you mean 'donor'"):
        build(path, tmp_path / "no", split_by="doner")


def test_codec_and_shard_count_do_not_matter_content_does(tmp_path, one, dense, monkeypatch):
    base = build(one, tmp_path / "a").fingerprint
    assert build(one, tmp_path / "b", codec="compact").fingerprint == base
    with monkeypatch.context() as m:
        m.setattr(scanning, "READ_BYTES", 1000)  # many small reads
        m.setattr(scanning, "PIECE", 100)
        m.setattr("distdiff.data.ingest.build.SPAN_BYTES", 3000)
        assert build(one, tmp_path / "c").fingerprint == base
    assert np.array_equal(everything(CountStore.open(tmp_path / "b")), dense)
    assert build(one, tmp_path / "d", seed=1).fingerprint != base  # another split: not the data a model was trained on
    other = dense.copy()
    other[149, 39] += 1
    path = save(make_adata(sparse.csr_matrix(other.astype(np.float32))), tmp_path / "other.h5ad")
    assert build(path, tmp_path / "e").fingerprint != base


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_worker_processes_give_the_same_store(tmp_path, one, dense, capfd, monkeypatch):
    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 8000)
    alone = build(one, tmp_path / "alone", genes="hvg:30")
    made = build(one, tmp_path / "many", genes="hvg:30", workers=2, progress=True)
    assert made == alone
    assert np.array_equal(
        everything(CountStore.open(tmp_path / "many")), everything(CountStore.open(tmp_path / "alone"))
    )
    said = capfd.readouterr()
    assert "2 worker processes; dashboard: http://127.0.0.1:" in said.out
    assert "Traceback" not in said.err
    # an error on a worker is the error of the build, and a running cluster can be used
    bad = dense.astype(np.float32)
    bad[77, 5] = 0.5
    path = save(make_adata(sparse.csr_matrix(bad)), tmp_path / "bad.h5ad")
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        again = build(one, tmp_path / "there", genes="hvg:30", workers=None, scheduler=cluster.scheduler_address)
        assert again == alone
        with pytest.raises(ValueError, match=r"cell 'c77', gene 'g5': 0.5 is not a whole number"):
            build(path, tmp_path / "bad", scheduler=cluster.scheduler_address)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "bad.h5ad", "many", "one.h5ad", "there"]


@pytest.mark.distributed
def test_a_cluster_whose_workers_all_leave_is_not_waited_for_without_end(tmp_path, one, monkeypatch, capsys):
    from dask.distributed import LocalCluster

    monkeypatch.setattr("distdiff.cluster.ALONE", 1)
    real = scanning.write_shard
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:

        def leave(*args):
            cluster.sync(cluster.scheduler.remove_worker, cluster.workers[0].address, stimulus_id="test")
            return real(*args)

        monkeypatch.setattr("distdiff.data.ingest.scan.write_shard", leave)
        with pytest.raises(OSError, match=r"no worker is left at .*, and none came for 1 s: .* goes on"):
            build(one, tmp_path / "out", scheduler=cluster.scheduler_address, progress=True)
    assert "no worker is left; waiting 1 s for one" in capsys.readouterr().out
    monkeypatch.undo()
    assert build(one, tmp_path / "out") == build(one, tmp_path / "again")


def test_an_output_that_exists(tmp_path, one):
    first = build(one, tmp_path / "out")
    with pytest.raises(
        FileExistsError, match=r"out exists already; give overwrite=True to replace it, or another name"
    ):
        build(one, tmp_path / "out")
    assert build(one, tmp_path / "out", overwrite=True, seed=3).fingerprint != first.fingerprint
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="is not a distdiff store, so it is left alone"):
        build(one, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("where", ["distdiff.data.store.spill.publish", "distdiff.data.ingest.scan.write_shard"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), RuntimeError("x")])
def test_a_build_that_stops_goes_on_with_the_same_command(tmp_path, one, monkeypatch, error, where, capsys):
    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 8000)
    first = build(one, tmp_path / "out")
    module, name = where.rsplit(".", 1)
    real, calls = getattr(importlib.import_module(module), name), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        real(*args)

    with monkeypatch.context() as m:
        m.setattr(where, fail)
        with pytest.raises(type(error)) as e:
            build(one, tmp_path / "out", overwrite=True, seed=1)
    if isinstance(error, OSError):
        assert "the disk is full" in str(e.value)
        assert "run the same command again, it goes on from" in str(e.value)
    assert CountStore.open(tmp_path / "out").manifest.fingerprint == first.fingerprint  # the old one is as it was
    calls.clear()
    monkeypatch.setattr(where, lambda *args: (calls.append(args), real(*args)))
    made = build(one, tmp_path / "out", overwrite=True, seed=1, progress=True)
    assert "going on with the build in" in capsys.readouterr().out
    fresh = len(calls)
    assert made == build(one, tmp_path / "again", seed=1)
    assert fresh == len(calls) - fresh - 2  # the two that were finished were not done again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "one.h5ad", "out"]


def test_work_of_another_command_is_not_taken_up(tmp_path, one, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(scanning, "write_shard", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(one, tmp_path / "out", seed=1)
    assert build(one, tmp_path / "out", seed=2) == build(one, tmp_path / "fresh", seed=2)


def killed_build(one, out, where):
    """A build in another process that is killed when it comes to ``where``."""
    module, name = where.rsplit(".", 1)
    code = (
        f"import sys, time, {module} as m; from distdiff.data.ingest.shard import shard\n"
        "import distdiff.data.ingest.build as b\n"
        f"b.SPAN_BYTES = 8000; real, n = m.{name}, []\n"
        "def slow(*a):\n"
        "    n.append(0)\n"
        "    if len(n) == 3: print('there', flush=True); time.sleep(60)\n"
        "    return real(*a)\n"
        f"m.{name} = slow\n"
        f"shard({str(one)!r}, {str(out)!r}, workers=0, progress=False, block=16, blocks_per_shard=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("where", ["distdiff.data.store.spill.publish", "distdiff.data.ingest.scan.write_shard"])
def test_a_killed_build_is_invisible_and_goes_on(tmp_path, one, where, monkeypatch):
    process = killed_build(one, tmp_path / "out", where)
    with pytest.raises(FileExistsError, match="out is being written by another process now"):  # two on one output
        build(one, tmp_path / "out", shuffle=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 8000)
    assert build(one, tmp_path / "out", shuffle=True) == build(one, tmp_path / "fresh", shuffle=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "one.h5ad", "out"]


@pytest.fixture
def two(tmp_path, dense):
    """Two inputs with other counts in each."""
    x = dense[:40].astype(np.float32)
    return [save(make_adata(sparse.csr_matrix(x * k)), tmp_path / f"{k}.h5ad") for k in (1, 3)]


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.long)])
def test_a_build_killed_at_any_file_operation_around_publishing(tmp_path, two, monkeypatch, there, swaps, step):
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    new = {"overwrite": there, "blocks_per_shard": 1}
    whole = {build(two[0], tmp_path / "a").fingerprint, build(two[1], tmp_path / "b", **new).fingerprint}
    wanted = build(two[1], tmp_path / "c", **new)

    def begins(start):
        real = files.stamp
        monkeypatch.setattr(files, "stamp", lambda path: (str(path).endswith("store") and start(), real(path))[1])

    nth, over = 0, False
    while not over:
        home = tmp_path / f"home{nth}"
        home.mkdir()
        out = home / "out"
        if there:
            shutil.copytree(tmp_path / "a", out)
        over = ended(lambda out=out: build(two[1], out, **new), nth, begins)
        if out.exists():  # without the exchange of names there is a moment in which it does not
            found = CountStore.open(out)
            found.verify()
            assert found.manifest.fingerprint in whole
        else:
            assert not (there and swaps)
        try:
            assert build(two[1], out, **new) == wanted
        except FileExistsError:
            assert (there, found.manifest) == (False, wanted)  # it was finished
        found = CountStore.open(out)
        found.verify()
        assert found.manifest == wanted
        assert [p.name for p in home.iterdir()] == ["out"]
        shutil.rmtree(home)
        nth += 1 if nth < 8 else step
    assert nth > 8 + step


LOCK = """
import sys, h5py
with h5py.File(sys.argv[1], "r+"):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_file_that_a_notebook_has_open_is_not_called_damaged(tmp_path, one):
    notebook = subprocess.Popen([sys.executable, "-c", LOCK, one], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert notebook.stdout.readline() == b"open\n"
        with pytest.raises(ValueError, match="another process has it open for writing, a notebook perhaps") as error:
            build(one, tmp_path / "out")
        assert "damaged" not in str(error.value)
    finally:
        notebook.communicate()
    build(one, tmp_path / "out")


@pytest.mark.parametrize("kind", ["csr", "dense"])
def test_filters_of_hdf5plugin_are_read_where_it_is_installed_and_named_where_not(tmp_path, dense, kind):
    hdf5plugin = pytest.importorskip("hdf5plugin")
    x = dense.astype(np.float32)
    filters = hdf5plugin.FILTERS
    make_adata(sparse.csr_matrix(x) if kind == "csr" else x).write_h5ad(
        tmp_path / "a.h5ad", compression=filters["zstd"], compression_opts=hdf5plugin.Zstd().filter_options
    )
    build(tmp_path / "a.h5ad", tmp_path / "out")
    assert np.array_equal(everything(CountStore.open(tmp_path / "out")), dense)
    code = (
        "import sys; sys.modules['hdf5plugin'] = None\n"
        "from distdiff.data.ingest.shard import shard; shard(sys.argv[1], sys.argv[2], workers=0, progress=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.h5ad", tmp_path / "b"], capture_output=True, text=True
    )
    assert "pip install hdf5plugin" in done.stderr.splitlines()[-1]
    assert "damaged" not in done.stderr.splitlines()[-1]


def test_what_is_said_of_a_matrix_by_gene_is_so(tmp_path, dense, capsys):
    path = save(make_adata(sparse.csc_matrix(dense.astype(np.float32))), tmp_path / "a.h5ad")
    build(path, tmp_path / "out", progress=True)
    said = capsys.readouterr().out
    assert "stored gene by gene (CSC), so it is brought into the order of its cells first, on disk" in said
    assert "whole into memory" not in said


def test_inputs_that_cannot_be_used(tmp_path, one):
    nothing = save(make_adata(sparse.csr_matrix((9, 4), dtype=np.float32)), tmp_path / "nothing.h5ad")
    other = save(make_adata(make_counts(9, 3), genes=["ENSG1", "ENSG2", "ENSG3"]), tmp_path / "other.h5ad")
    log = make_counts(9, 4)
    log.data = np.log1p(log.data)
    log = save(make_adata(log), tmp_path / "log.h5ad")
    (tmp_path / "genes.txt").write_text("g1\ng2\nG3\n")
    (tmp_path / "twice.txt").write_text("g1\ng2\ng1\n")
    cases = [
        (nothing, {}, ValueError, "no counts at all in the 4 genes"),
        (log, {}, ValueError, r"log.h5ad: cell '.*', gene '.*': .* is not a whole number: was this log-normalised\?"),
        ([one, other], {}, ValueError, r"no gene is in all 2 files; are some named by symbol"),
        ([], {}, ValueError, "no input files"),
        (one, {"genes": "hgv:20"}, FileNotFoundError, "neither 'all', 'hvg:N', 'top:N', .* nor a text file"),
        (one, {"genes": "hvg:many"}, ValueError, "a whole number of genes is wanted after 'hvg:'"),
        (one, {"genes": "hvg:900"}, ValueError, "only 40 genes have a count"),
        (one, {"genes": str(tmp_path / "genes.txt")}, ValueError, r"1 of 3 genes are not in every input: G3"),
        (one, {"genes": str(tmp_path / "twice.txt")}, ValueError, "names gene 'g1' more than once"),
        (one, {"labels": ["kind"]}, ValueError, "obs has no column 'kind'; known: none"),
        (one, {"split": (0.5, 0.1, 0.1)}, ValueError, "three shares"),
        (one, {"layer": "counts"}, ValueError, "no layer 'counts'"),
        (one, {"workers": -1}, ValueError, "workers=-1"),
        (one, {"block": 0}, ValueError, "block=0"),
    ]
    for inputs, options, error, said in cases:
        with pytest.raises(error, match=said):
            build(inputs, tmp_path / "out", **options)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_a_source_of_unfiltered_droplets(tmp_path):
    x = make_counts(2000, 8, 4).tolil()
    keep = np.random.default_rng(0).random(2000) < 0.05
    x[~keep] = 0
    x[keep, 0] = 1
    made = build(save(make_adata(x.tocsr()), tmp_path / "a.h5ad"), tmp_path / "out")
    assert made.sources[0].empty == 2000 - keep.sum()
    assert np.array_equal(everything(CountStore.open(tmp_path / "out")), x.toarray()[keep][:, x.toarray().sum(0) > 0])


def test_it_is_quick(tmp_path):
    start = time.perf_counter()
    build(save(make_adata(make_counts(4000, 300)), tmp_path / "a.h5ad"), tmp_path / "out", block=256)
    assert time.perf_counter() - start < 20


def by_source(store: CountStore) -> np.ndarray:
    """Counts in the order of the sources, and columns in that of the files."""
    file, row = store.origin(store.rows("all"))
    return store.read(np.lexsort((row, file))).toarray()[:, store.source_columns()]


def test_shuffling_moves_cells_and_nothing_else(tmp_path, one, dense):
    made = build(one, tmp_path / "out", shuffle=True, seed=4)
    store = CountStore.open(tmp_path / "out")
    assert np.array_equal(by_source(store), dense)
    assert [store.rows(s)[0] for s in ("train", "val", "test")] == [0, 120, 135]  # each split lies together
    _, row = store.origin(store.rows("all"))
    assert np.array_equal(store.names(store.rows("all")), [f"c{i}" for i in row])
    assert abs(np.corrcoef(np.arange(120), row[:120])[0, 1]) < 0.35
    assert build(one, tmp_path / "again", shuffle=True, seed=4) == made
    assert build(one, tmp_path / "other", shuffle=True, seed=5).fingerprint != made.fingerprint


def test_strata_lie_together(tmp_path, dense):
    kind = np.array(["b", "a", None, "c", "b"], dtype=object)[np.arange(150) % 5]
    path = save(make_adata(sparse.csr_matrix(dense.astype(np.float32)), kind=kind), tmp_path / "a.h5ad")
    made = build(path, tmp_path / "out", shuffle=True, strata="kind")
    store = CountStore.open(tmp_path / "out")
    assert made.order.strata == "kind"
    for split in ("train", "val", "test"):
        code = store.labels(store.rows(split))["kind"]
        assert (np.diff(code) >= 0).all()
    assert np.array_equal(by_source(store), dense)


def test_a_panel_lies_apart(tmp_path, one, dense):
    whole = build(one, tmp_path / "whole")
    made = build(one, tmp_path / "out", panel="hvg:7", shuffle=True)
    store = CountStore.open(tmp_path / "out")
    assert [(g.name, g.n_genes) for g in made.groups] == [("panel", 7), ("rest", 33)]
    assert set(store.panel().genes) == set(build(one, tmp_path / "seven", genes="hvg:7").genes)
    assert sorted(made.genes) == sorted(whole.genes)
    assert np.array_equal(by_source(store), dense)
    store.verify()
    columns = [int(g[1:]) for g in store.panel().genes]
    _, row = store.origin(store.rows("all"))
    assert np.array_equal(store.panel().read(store.rows("all")).toarray(), dense[row][:, columns])
    (tmp_path / "list.txt").write_text("g3\ng1\n")
    assert build(one, tmp_path / "named", panel=str(tmp_path / "list.txt")).genes[:2] == ("g3", "g1")
    with pytest.raises(ValueError, match="panel: gene 'g3' is not among the genes of the store"):
        build(one, tmp_path / "no", genes=["g1", "g2"], panel=["g3"])


def test_genes_by_coefficient_of_variation(tmp_path, one, dense):
    made = build(one, tmp_path / "out", genes="cv:9")
    build(one, tmp_path / "whole")
    train = dense[CountStore.open(tmp_path / "whole").rows("train")].astype(float)
    cv = train.std(0) / np.maximum(train.mean(0), 1e-300)
    chosen = np.isin(np.arange(40), [int(g[1:]) for g in made.genes])
    assert chosen.sum() == 9
    assert cv[chosen].min() >= cv[~chosen].max() - 1e-9


def test_genes_as_seurat_v3_chooses_them(tmp_path, one, dense):
    pytest.importorskip("skmisc", reason="scikit-misc is not installed")
    import scanpy as sc

    made = build(one, tmp_path / "out", genes="seurat_v3:12", split=(1, 0, 0))
    found = sc.pp.highly_variable_genes(
        make_adata(sparse.csr_matrix(dense.astype(np.float32))), flavor="seurat_v3", n_top_genes=12, inplace=False
    )
    assert set(made.genes) == {f"g{i}" for i in np.flatnonzero(found["highly_variable"])}


def test_thresholds(tmp_path, capsys):
    x = make_counts(80, 30).toarray()
    x[:, 29] = 0
    x[:3, 29] = 1
    genes = [f"g{i}" for i in range(28)] + ["MT-1", "rare"]
    path = save(make_adata(sparse.csr_matrix(x), genes=genes), tmp_path / "a.h5ad")
    total, n, mito = x.sum(1), (x > 0).sum(1), x[:, 28] / np.maximum(x.sum(1), 1)
    least, few, most = np.quantile(total, 0.2), int(np.quantile(n, 0.1)), float(np.quantile(mito, 0.9) * 100)
    made = build(path, tmp_path / "out", min_counts=least, min_genes=few, max_mito=most, min_cells=4, progress=True)
    good = (total >= least) & (n >= few) & (x[:, 28] <= most / 100 * total)
    store = CountStore.open(tmp_path / "out")
    assert np.array_equal(store.origin(store.rows("all"))[1], np.flatnonzero(good))
    assert made.sources[0].failed == (~good).sum()
    assert "rare" not in made.genes
    assert "under a threshold dropped" in capsys.readouterr().out
    assert np.array_equal(store.quality(store.rows("all"))[0], total[good])
    build(path, tmp_path / "few", genes=["g1", "g2"], max_mito=most)  # over all genes of the file
    store = CountStore.open(tmp_path / "few")
    kept = np.flatnonzero((x[:, 28] <= most / 100 * total) & (x[:, 1:3].sum(1) > 0))
    assert np.array_equal(store.origin(store.rows("all"))[1], kept)
    with pytest.raises(ValueError, match=r"max_mito: .*no gene's name starts with MT-"):
        build(save(make_adata(make_counts(9, 4)), tmp_path / "b.h5ad"), tmp_path / "no", max_mito=5)


def test_genes_of_any_file(tmp_path, capsys):
    a, b, empty = make_counts(40, 6, 1), make_counts(30, 5, 2), sparse.csr_matrix((0, 6), dtype=np.float32)
    paths = [
        save(make_adata(a, genes=list("abcdef")), tmp_path / "a.h5ad"),
        save(make_adata(empty, genes=list("abcdef")), tmp_path / "empty.h5ad"),  # an empty file among many
        save(make_adata(b, genes=list("fexba")), tmp_path / "b.h5ad"),
    ]
    made = build(paths, tmp_path / "out", join="outer", progress=True)
    store = CountStore.open(tmp_path / "out")
    assert made.genes == tuple("abcdefx")
    file, row = store.origin(store.rows("all"))
    want = np.zeros((len(file), 7))
    want[file == 0, :6] = a.toarray()[row[file == 0]]
    want[file == 2] = b.toarray()[row[file == 2]][:, [4, 3, 0, 0, 1, 0, 2]] * [1, 1, 0, 0, 1, 1, 1]
    assert np.array_equal(everything(store), want)
    assert [s.absent for s in made.sources] == [("x",), ("x",), ("c", "d")]
    assert "b.h5ad lacks 2 of the 7 genes: its cells get zeros there" in capsys.readouterr().out
    assert build(paths, tmp_path / "inner").genes == tuple("abef")
    with pytest.raises(ValueError, match="join 'left'"):
        build(paths, tmp_path / "no", join="left")


def test_measurements_are_kept_as_they_are(tmp_path):
    x = np.log1p(make_counts(60, 20).toarray()) - 0.5 * (make_counts(60, 20, 3).toarray() > 1)
    path = save(make_adata(sparse.csr_matrix(x.astype(np.float32))), tmp_path / "a.h5ad")
    made = build(path, tmp_path / "out", counts=False)
    store = CountStore.open(tmp_path / "out")
    assert made.dtype == "float32"
    kept = x[x.any(1)][:, x.any(0)].astype(np.float32)
    assert np.array_equal(everything(store), kept)
    assert np.array_equal(store.cells(np.arange(len(kept))).counts.numpy(), kept)
    store.verify()
    x[5, 3] = np.inf
    save(make_adata(sparse.csr_matrix(x.astype(np.float32))), path)
    with pytest.raises(ValueError, match=r"cell 'c5', gene 'g3': .*inf.* is not finite"):
        build(path, tmp_path / "no", counts=False)


@pytest.mark.parametrize("when", ["distdiff.data.ingest.scan._scatter", "distdiff.data.ingest.scan._write"])
def test_a_source_that_changes_between_the_passes(tmp_path, one, dense, monkeypatch, when):
    """It is told; what was spilled before it changed is never mixed with what came after."""
    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 8000)
    module, name = when.rsplit(".", 1)
    real, calls = getattr(importlib.import_module(module), name), []

    def change(*args):
        calls.append(args)
        if len(calls) == 2:
            changed = dense.copy()
            changed[:, 1] += 1
            save(make_adata(sparse.csr_matrix(changed.astype(np.float32))), tmp_path / "new.h5ad").replace(one)
        return real(*args)

    monkeypatch.setattr(when, change)
    if name == "_scatter":
        with pytest.raises(ValueError, match=r"one.h5ad changed while the store was built"):
            build(one, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:  # pass 2 reads spills alone
        build(one, tmp_path / "out")
        assert np.array_equal(everything(CountStore.open(tmp_path / "out")), dense)


def test_a_source_that_changed_while_the_build_was_down(tmp_path, one, dense, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(scanning, "write_shard", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(one, tmp_path / "out")
    save(make_adata(sparse.csr_matrix(dense.astype(np.float32)[:100])), one)
    assert build(one, tmp_path / "out").n_cells == 100  # begins anew


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
@pytest.mark.parametrize("where", ["distdiff.data.ingest.scan._scatter", "distdiff.data.ingest.scan._write"])
def test_a_worker_killed_in_either_pass_costs_its_task(tmp_path, one, where, monkeypatch):
    alone = build(one, tmp_path / "alone", shuffle=True)
    preload = tmp_path / "deadly.py"
    module, name = where.rsplit(".", 1)
    preload.write_text(
        f"import os, signal, pathlib, {module} as m\n"
        f"flag = pathlib.Path({str(tmp_path / 'killed')!r})\n"
        f"def once(*a, real=m.{name}):\n"
        "    if not flag.exists():\n"
        "        flag.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*a)\n"
        f"if m.{name}.__name__ != 'once':  # dask loads a preload twice\n"
        f"    m.{name} = once\n"
    )
    import dask.distributed  # its defaults must be there before they are changed

    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 8000)
    with dask.config.set({"distributed.worker.preload": [str(preload)]}):
        made = build(one, tmp_path / "out", shuffle=True, workers=2)
    assert (tmp_path / "killed").exists()
    assert made == alone


def test_a_full_disk_is_told_before_writing(tmp_path, one, monkeypatch):
    import collections
    import shutil

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OSError, match="the disk is full"):
        build(one, tmp_path / "out")
    monkeypatch.undo()
    build(one, tmp_path / "out")


def test_threads_give_the_same_store(tmp_path, one, monkeypatch):
    alone = build(one, tmp_path / "alone", shuffle=True)
    monkeypatch.setattr("distdiff.data.ingest.shard.ALONE", 0)
    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 8000)
    assert build(one, tmp_path / "many", shuffle=True, workers=None) == alone


def test_a_matrix_by_gene_takes_little_memory(tmp_path):
    """Its dense shape is 50 GB; what is read is bounded by the tasks, not by the shape."""
    rng, n, g, nnz = np.random.default_rng(0), 250_000, 50_000, 400_000
    x = sparse.csc_matrix((np.ones(nnz, np.float32), (rng.integers(0, n, nnz), rng.integers(0, g, nnz))), shape=(n, g))
    path = save(make_adata(x), tmp_path / "x.h5ad")
    made = build(path, tmp_path / "out", block=256, blocks_per_shard=None, shuffle=True)
    store = CountStore.open(tmp_path / "out")
    assert sum(s.nnz for s in made.shards) == x.nnz
    _, row = store.origin(np.arange(500))
    columns = [int(name[1:]) for name in store.genes]
    assert (store.read(np.arange(500)) != x.tocsr()[row][:, columns]).nnz == 0


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_the_scheduler_of_worker_processes_that_dies_is_one_sentence(tmp_path, one, monkeypatch):
    """And what is done is there for the same command."""
    import distdiff.data.ingest.shard as sharding

    monkeypatch.setattr("distdiff.data.ingest.build.SPAN_BYTES", 8000)
    real = sharding._run_dask

    def dies(client, fn, tasks, job, what, progress):
        if what == "write":
            cluster = client.cluster
            cluster.sync(cluster.scheduler.close)
        return real(client, fn, tasks, job, what, progress)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "_run_dask", dies)
        with pytest.raises(OSError, match=r"the dask scheduler at .* \(of workers=\) is lost; .* the same command"):
            build(one, tmp_path / "out", workers=1)
    assert build(one, tmp_path / "out") == build(one, tmp_path / "again")
