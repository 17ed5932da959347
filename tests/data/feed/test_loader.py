"""Every way of loading gives the same batches."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distdiff.data.feed import loader as loading
from distdiff.data.feed.loader import Loading, loader
from distdiff.data.feed.plan import Mixed, Plan
from distdiff.data.feed.resident import Resident
from distdiff.data.store.store import CountStore
from tests.data.conftest import build, make_adata, make_counts, save


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """900 cells x 60 genes in 57 blocks of 16, a panel of 20 genes, labels ``kind`` (strata) and ``donor``."""
    root = tmp_path_factory.mktemp("atlas")
    x = make_counts(900, 60, 5).tolil()
    x[:, 0] = 1
    x[7, 3] = 70_000
    kind = np.array(["a", "b", "b", "c", "c", "c"], dtype=object)[np.arange(900) % 6]
    path = save(make_adata(x.tocsr(), kind=kind, donor=np.arange(900) // 100), root / "x.h5ad")
    build(path, root / "x.store", panel="hvg:20", strata="kind", labels=("donor",), shuffle=True, split=(0.8, 0.1, 0.1))
    return root / "x.store"


def taken(store, plan, index, **options):
    made = loader(store, plan, index, **{"stop": 30} | options)
    return [(step, cells) for step, cells in made]


def same(a, b):
    assert [s for s, _ in a] == [s for s, _ in b]
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert torch.equal(x.rows, y.rows)
        assert torch.equal(x.counts, y.counts)
        assert {k: v.tolist() for k, v in x.labels.labels.items()} == {
            k: v.tolist() for k, v in y.labels.labels.items()
        }


@pytest.fixture
def usual(atlas):
    store = CountStore.open(atlas)
    index = store.rows("train")
    plan = Plan(len(index), 24, block=16, window=4, seed=1)
    return store, index, plan, taken(store, plan, index)


@pytest.mark.parametrize("reader", ["direct", "tensorstore", "zarr"])
@pytest.mark.parametrize("cache", [0, 4000, 1 << 20])
@pytest.mark.parametrize("bundle", [1, 4096])
def test_readers_and_memory_do_not_matter(atlas, usual, reader, cache, bundle, monkeypatch):
    monkeypatch.setattr(loading, "BUNDLE", bundle)
    _, index, plan, want = usual
    same(taken(CountStore.open(atlas, reader=reader, cache_bytes=cache, threads=1), plan, index, ahead=1), want)


def test_resident_on_a_device_is_the_same(usual):
    store, index, plan, want = usual
    same(taken(store, plan, index, resident=Resident.load(store, torch.device("cpu"))), want)
    panel = store.panel(store.genes[5:30][::-1])
    resident = Resident.load(panel, torch.device("cpu"))
    same(taken(panel, plan, index, resident=resident), taken(panel, plan, index))


def test_a_panel_reads_nothing_else(atlas, usual, tmp_path):
    import shutil

    _, index, plan, want = usual
    copy = shutil.copytree(atlas, tmp_path / "copy")
    store = CountStore.open(copy)
    shutil.rmtree(copy / "counts" / "rest")
    got = taken(store.panel(), plan, index)
    assert store.panel().genes == store.genes[:20]
    for (_, x), (_, y) in zip(got, want, strict=True):
        assert torch.equal(x.counts, y.counts[:, :20])
    with pytest.raises(ValueError, match="is corrupt"):
        store.read(np.arange(3))


def test_an_endless_plan_over_few_blocks(usual):
    """The scout must stop although every coming block is in memory already."""
    store, index, _, _ = usual
    endless = loader(store, Plan(len(index), 24, block=16, window=64), index, stop=None)
    assert [next(endless)[0] for _ in range(100)] == list(range(100))
    endless.close()


def test_slots_are_given_back(usual):
    store, _, _, _ = usual
    for columns in store.columns:
        assert all(one.holders == 0 for one in columns.pool._held.values())


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_dask_workers_feed_two_ranks_and_one_may_die(atlas, usual):
    """A worker killed in mid-stream costs time, not cells."""
    from dask.distributed import LocalCluster

    store, index, plan, want = usual
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster:
        address = cluster.scheduler_address
        got: dict[int, list] = {0: [], 1: []}

        def consume(rank: int) -> None:
            for step, cells in loader(store, plan, index, stop=30, rank=rank, world=2, scheduler=address, ahead=2):
                got[rank].append((step, cells))
                time.sleep(0.05)
                if rank == 0 and step == 9:
                    os.kill(cluster.workers[0].process.pid, signal.SIGKILL)

        ranks = [threading.Thread(target=consume, args=(rank,)) for rank in (0, 1)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(180)
        assert [len(got[r]) for r in (0, 1)] == [30, 30]
        for (_, whole), (_, a), (_, b) in zip(want, got[0], got[1], strict=True):
            assert torch.equal(whole.rows, torch.cat([a.rows, b.rows]))
            assert torch.equal(whole.counts, torch.cat([a.counts, b.counts]))
            assert torch.equal(
                whole.labels.labels["donor"], torch.cat([a.labels.labels["donor"], b.labels.labels["donor"]])
            )
        panel = store.panel(["g5", "g0", "g41"])
        same(taken(panel, plan, index, scheduler=address, stop=5), taken(panel, plan, index, stop=5))


@pytest.mark.parametrize("cache", [0, 1 << 20])
@pytest.mark.parametrize("genes", ["all", "panel", "turned", "some"])
def test_a_piece_is_the_batch_coded(atlas, usual, monkeypatch, cache, genes):
    """What a worker sends and the receiver decodes, for every kind of view, with room for the blocks and without."""
    from distdiff.data.feed import stream

    store, index, plan, _ = usual
    view = {"all": lambda s: s, "panel": lambda s: s.panel(), "turned": lambda s: s.panel(s.genes[::-1]),
            "some": lambda s: s.panel(s.genes[30:4:-3])}[genes]  # fmt: skip
    worker = view(CountStore.open(atlas, cache_bytes=cache))
    monkeypatch.setattr(stream, "_store", lambda *how: worker)
    rows = index[plan.rows(3)]
    coded, as_stored, codes = stream.make(("", "", None), rows, ["donor"])
    assert as_stored == (cache > 0 and genes != "some")
    places = stream.gene_columns(view(store))[as_stored]
    for some in (slice(0, 7), slice(7, len(rows))):
        got, want = (
            stream._unpack(coded, places, codes, some.start, rows[some]),
            view(store).cells(rows[some], ["donor"]),
        )
        assert torch.equal(got.counts, want.counts)
        assert torch.equal(got.labels.labels["donor"], want.labels.labels["donor"])


def test_workers_out_of_reach():
    import socket

    from distdiff.cluster import within_reach

    with socket.create_server(("127.0.0.1", 0)) as there:
        assert within_reach([f"tcp://127.0.0.1:{there.getsockname()[1]}"])
    assert not within_reach(["tcp://127.0.0.1:9"])


def test_no_scheduler_there(usual, monkeypatch):
    monkeypatch.setattr("distdiff.cluster.CONNECT", 1)
    store, index, plan, _ = usual
    with pytest.raises(OSError, match=r"no dask scheduler with workers answers at tcp://127.0.0.1:9"):
        next(loader(store, plan, index, scheduler="tcp://127.0.0.1:9"))


def test_settings(atlas, usual):
    store, index, _, _ = usual
    for wrong, said in [
        ({"cache_mb": 0}, "loader.cache_mb must be at least 1, got 0"),
        ({"reader": "dask"}, "reader 'dask' wants the address of a scheduler"),
        ({"scheduler": "tcp://x"}, "wants the address"),
    ]:
        with pytest.raises(ValueError, match=said):
            Loading(**wrong)
    plan = Loading(strata="kind", weights=0.0, window=8).plan(store, index, 24, 0)
    assert isinstance(plan, Mixed)
    codes = store.labels(index, ["kind"])["kind"]
    seen = np.concatenate([codes[plan.rows(step)] for step in range(40)])
    assert np.abs(np.bincount(seen) / len(seen) - 1 / 3).max() < 0.01
    with pytest.raises(ValueError, match="has no label 'kynd'; did you mean 'kind'"):
        Loading(strata="kynd").plan(store, index, 24, 0)
    with pytest.raises(ValueError, match="no training cell has 'd'"):
        Loading(strata="kind", weights={"d": 2.0}).plan(store, index, 24, 0)


def test_what_fits_stays_in_memory(atlas, usual):
    _, index, plan, want = usual
    store = CountStore.open(atlas, cache_bytes=5000)
    assert Loading(resident="no").keep(store, torch.device("cpu")) == (store, None, "")
    kept, resident, said = Loading().keep(store, torch.device("cpu"))
    assert resident is None
    assert kept.slots == kept.manifest.n_blocks > store.slots
    assert said.startswith("resident: ")
    same(taken(kept, plan, index), want)
    panel, _, _ = Loading().keep(store.panel(["g3", "g1"]), torch.device("cpu"))
    assert panel.genes == ("g3", "g1")


def test_counts_that_float32_does_not_hold_are_told(tmp_path):
    x = sparse.csr_matrix(np.array([[1.0, 2**24 + 1]] + [[1.0, 2.0]] * 40))
    build(save(make_adata(x), tmp_path / "x.h5ad"), tmp_path / "x.store", split=(1, 0, 0))
    store = CountStore.open(tmp_path / "x.store")
    assert store.read(np.arange(1)).toarray().tolist() == [[1, 2**24 + 1]]
    with pytest.raises(ValueError, match="overflows float32"):
        taken(store, Plan(41, 10, block=16, window=4), store.rows("all"), stop=5)
    with pytest.raises(ValueError, match=r"loader.resident=no"):
        Resident.load(store, torch.device("cpu"))


class AsOnCuda(TorchDispatchMode):
    """Refuses what CUDA has no kernels for: anything but views and copies of integers wider than uint8, unsigned."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in ("view", "_to_copy", "copy_", "slice", "detach", "as_strided", "alias", "empty"):
            for x in tree_leaves((arguments, options or {})):
                if isinstance(x, torch.Tensor):
                    assert x.dtype not in (torch.uint16, torch.uint32), name
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("largest", [70_000, 300, 3])
def test_a_copy_asks_nothing_of_unsigned_integers(largest, tmp_path):
    x = make_counts(100, 20, 5).minimum(9).tolil()
    x[7, 3] = largest
    build(save(make_adata(x.tocsr()), tmp_path / "x.h5ad"), tmp_path / "x.store")
    store = CountStore.open(tmp_path / "x.store")
    rows = np.array([7, 3, 99, 7])
    copy = Resident.load(store, torch.device("cpu"))
    with AsOnCuda():
        got = copy.cells(rows).counts
    assert torch.equal(got, store.cells(rows).counts)


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [False, True])
def test_on_a_gpu_it_is_the_same(usual, resident, gpu):
    store, index, plan, want = usual
    copy = Resident.load(store, gpu) if resident else None
    for (_, x), (_, y) in zip(taken(store, plan, index, device=gpu, resident=copy), want, strict=True):
        assert x.counts.device.type == gpu.type
        assert torch.equal(x.counts.cpu(), y.counts)
