from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from distdiff.data.feed.loader import loader
from distdiff.data.feed.plan import Plan
from distdiff.data.store import remote
from distdiff.data.store.coding import Slots
from distdiff.data.store.manifest import Manifest
from distdiff.data.store.readers import READERS
from distdiff.data.store.store import CountStore

PARTS = Slots._fields


@pytest.fixture
def store(folder):
    return CountStore.open(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("cache", [0, 3000, 1 << 20])
def test_rows_in_the_order_asked(folder, dense, cache, reader):
    store, rng = CountStore.open(folder, cache_bytes=cache, reader=reader), np.random.default_rng(0)
    asked = [rng.integers(0, 150, n) for n in (1, 7, 200)]
    asked += [np.arange(150), np.arange(149, -1, -1), np.array([5, 5, 7]), np.arange(30, 50), np.empty(0, int)]
    for rows in [*asked, *asked]:
        got = store.read(rows)
        assert got.shape == (len(rows), 40)
        assert got.dtype == np.int32
        assert got.has_canonical_format
        assert all((np.diff(got[i].indices) > 0).all() for i in range(len(rows)))
        assert np.array_equal(got.toarray(), dense[rows])


def test_large_reads_go_in_groups(folder, dense, monkeypatch):
    monkeypatch.setattr("distdiff.data.store.store.GROUP", 3)
    assert np.array_equal(CountStore.open(folder, cache_bytes=0).read(np.arange(150)).toarray(), dense)


def test_cells_labels_names_and_spec(store, dense):
    rows = np.array([3, 149, 2, 3])
    cells = store.cells(rows)
    assert cells.counts.dtype == torch.float32
    assert np.array_equal(cells.counts.numpy(), dense[rows])
    assert cells.rows.tolist() == rows.tolist()
    assert cells.labels.labels["kind"].tolist() == [1, 0, -1, 1]
    assert cells.labels.labels["kind"].dtype == torch.int64
    assert list(store.cells(rows, ()).labels.labels) == []
    assert store.labels(rows, ["donor"])["donor"].tolist() == [0, 5, 0, 0]
    assert store.names(rows).tolist() == ["c3", "c149", "c2", "c3"]
    spec = store.spec()
    assert (spec.genes, list(spec.labels), spec.labels["kind"]) == (store.genes, ["kind", "donor"], ("B", "NK", "T"))
    assert spec.gene_mean.dtype == np.float32
    np.testing.assert_allclose(spec.gene_mean, dense[store.rows("train")].mean(0), rtol=1e-6)
    assert list(store.spec(["donor"]).labels) == ["donor"]


def test_splits_are_the_cells(store):
    parts = [store.rows(s) for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [120, 15, 15]
    assert np.array_equal(np.sort(np.concatenate(parts)), store.rows("all"))
    assert all((np.diff(p) > 0).all() for p in parts)


def test_questions_it_cannot_answer(store):
    with pytest.raises(ValueError, match=r"row 150 asked of .*, it has rows 0 to 149"):
        store.read(np.array([3, 150]))
    with pytest.raises(ValueError, match="row -1 asked"):
        store.cells(np.array([-1]))
    with pytest.raises(ValueError, match="a vector of whole numbers is wanted, got float64"):
        store.read(np.array([1.0]))
    with pytest.raises(ValueError, match=r"no split 'tran'; did you mean 'train'\?"):
        store.rows("tran")
    with pytest.raises(ValueError, match="has no label 'kinds'; did you mean 'kind'"):
        store.labels(np.array([1]), ["kinds"])
    with pytest.raises(ValueError, match="has no label 'doner'; did you mean 'donor'"):
        store.spec(["doner"])


def test_a_panel_is_the_store_seen_through_some_genes(store, dense):
    at = [4, 0, 7]
    panel = store.panel([store.genes[i] for i in at])
    rows = np.array([5, 2, 2, 9])
    counts = panel.read(rows)
    assert counts.has_sorted_indices
    assert np.array_equal(counts.toarray(), dense[rows][:, at])
    assert panel.genes == tuple(store.genes[i] for i in at)
    assert np.array_equal(panel.spec(()).gene_mean, store.spec(()).gene_mean[at])
    assert np.array_equal(panel.statistics()["nnz"], store.statistics()["nnz"][at])
    assert panel.read(np.array([], dtype=np.int64)).shape == (0, 3)
    panel.verify()
    again = pickle.loads(pickle.dumps(panel))
    assert np.array_equal(again.read(rows).toarray(), dense[rows][:, at])
    assert len(store.genes) > 3
    with pytest.raises(ValueError, match="has no gene 'nothing'"):
        store.panel(["nothing"])
    with pytest.raises(ValueError, match="a panel of 2 genes, 1 of them different"):
        store.panel([store.genes[0]] * 2)
    with pytest.raises(ValueError, match="a panel of 0 genes"):
        store.panel([])


def test_it_travels_to_another_process(store, dense):
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read(np.arange(9)).toarray(), dense[:9])


def test_threads_may_share_it(folder, dense):
    store, wrong = CountStore.open(folder, cache_bytes=3000), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            rows = rng.integers(0, 150, 20)
            if not np.array_equal(store.read(rows).toarray(), dense[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_no_store_there(tmp_path, copy):
    with pytest.raises(
        FileNotFoundError, match=r"is not a distdiff store, or a build that did not finish.*distdiff shard"
    ):
        CountStore.open(tmp_path / "nowhere")
    os.remove(copy / "manifest.json")
    with pytest.raises(FileNotFoundError, match="a build that did not finish"):
        CountStore.open(copy)


@pytest.mark.skipif(sys.platform != "linux", reason="only there a full queue of connections is silent")
def test_a_url_from_which_nothing_comes_back(monkeypatch):
    """Connections are not even refused, as behind a firewall: each try would take minutes."""
    monkeypatch.setattr("distdiff.data.store.remote.FIRST", 1)
    with socket.socket() as deaf, contextlib.ExitStack() as waiting:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/atlas.zarr"
        with pytest.raises(remote.Unreachable, match=f"{url}: no answer in time; check the network"):
            CountStore.open(url)


def swapped(values):
    return [values[1], values[0], *values[2:]]


CHANGES = {  # by key of the manifest: what becomes of its value
    "genes": [swapped, lambda v: ["XIST", *v[1:]], lambda v: [v[1], *v[1:]], lambda v: v[1:], lambda v: [],
              lambda v: None, lambda v: list(range(len(v)))],
    "labels": [lambda v: v | {"kind": swapped(v["kind"])}, lambda v: v | {"kind": v["kind"][1:]}, lambda v: None],
    "n_cells": [lambda v: v - 1, lambda v: v + 1, lambda v: 10**12, lambda v: -1, lambda v: "x", lambda v: float(v)],
    "block": [lambda v: v // 2, lambda v: 0, lambda v: 10**9],
    "blocks_per_shard": [lambda v: 0, lambda v: 2 * v],
    "groups": [lambda v: [v[0] | {"cap": 0}], lambda v: [v[0] | {"cap": 64}], lambda v: [v[0] | {"cap": 10**12}],
               lambda v: [v[0] | {"n_genes": 39}], lambda v: [v[0] | {"name": "../../x"}], lambda v: []],
    "shards": [lambda v: [], lambda v: None, lambda v: [v[0] | {"stop": 10}, *v[1:]], lambda v: v[::-1],
               lambda v: [v[0] | {"index": -1}, *v[1:]], lambda v: [v[0] | {"sha256": "0" * 64}, *v[1:]]],
    "dtype": [lambda v: "uint32", lambda v: "float32", lambda v: "object", lambda v: "zzz", lambda v: None],
    "codec": [lambda v: "zzz"],
    "split": [lambda v: v | {"n_cells": [1, 1, 1]}, lambda v: v | {"n_cells": [1, 1]}, lambda v: None],
    "fingerprint": [lambda v: "0" * 64],
    "largest": [lambda v: "x", lambda v: float("nan")],
    "order": [lambda v: None],
}  # fmt: skip


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("key", CHANGES)
def test_a_manifest_that_was_changed_opens_nothing(folder, tmp_path, key, hashed):
    copy = shutil.copytree(folder, tmp_path / "copy")
    raw = json.loads((copy / "manifest.json").read_text())
    if not hashed:  # a store of a version that wrote none
        del raw["sha256"], raw["columns"]
        (copy / "manifest.json").write_text(json.dumps(raw))
        CountStore.open(copy).verify()
    for change in CHANGES[key]:
        (copy / "manifest.json").write_text(json.dumps(raw | {key: change(raw[key])}))
        with pytest.raises(ValueError, match=r"copy.*(was changed or damaged after|is damaged|expected the keys)"):
            CountStore.open(copy)


def test_any_value_of_a_manifest_is_under_its_hash(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    assert Manifest.from_json(json.dumps(raw)) == Manifest.read(folder)
    for key in raw.keys() - {"format", "sha256"}:
        with pytest.raises(ValueError, match="not that of its own hash"):
            Manifest.from_json(json.dumps(raw | {key: "another"}))


@pytest.mark.parametrize("hashed", [True, False])
def test_verify_reads_every_array(folder, tmp_path, hashed):
    """One value of each array becomes another, with the checksums of its chunks made anew."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    raw = json.loads((copy / "manifest.json").read_text())
    if not hashed:
        del raw["sha256"], raw["columns"]
        (copy / "manifest.json").write_text(json.dumps(raw))
    root = zarr.open_group(str(copy), mode="r+", use_consolidated=False)
    about = [file for file in copy.rglob("zarr.json") if json.loads(file.read_text())["node_type"] == "array"]
    arrays = [file.parent.relative_to(copy).as_posix() for file in about]
    assert len(arrays) == 3 + 11 + 2  # counts, columns, labels
    if hashed:
        assert {*raw["columns"]} == {name for name in arrays if not name.startswith("counts/")}
    for name in arrays:
        if not hashed and name in ("names", "source/file", "source/row", "cells/total", "cells/nnz", "genes/source"):
            continue  # nothing says what these were
        array = root[name].with_config({"write_empty_chunks": True})
        was = array[:]
        other = was.copy()
        other.flat[0] += 1
        array[:] = other
        with pytest.raises(ValueError, match=r"copy.*(is damaged|corrupt)"):
            CountStore.open(copy).verify()
        array[:] = was
        CountStore.open(copy).verify()
    for name in ("names", "source/row", "genes/source"):
        (chunk := next(f for f in (copy / name / "c").rglob("0") if f.is_file())).rename(tmp_path / "kept")
        chunk.write_bytes(b"junk")
        with pytest.raises(ValueError, match=f"{name} (is damaged|cannot be read)"):
            CountStore.open(copy).verify()
        (tmp_path / "kept").rename(chunk)


def test_verify_knows_the_largest_count_and_the_splits(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    raw = json.loads((copy / "manifest.json").read_text())
    del raw["sha256"]
    for change, said in (
        ({"largest": 1.0}, "the largest is 1.0 by the manifest"),
        ({"split": raw["split"] | {"n_cells": [100, 35, 15]}}, "split is damaged"),
        ({"shards": [raw["shards"][0] | {"nnz": 1}, *raw["shards"][1:]]}, "shard 0 .* is corrupt"),
    ):
        (copy / "manifest.json").write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=said):
            CountStore.open(copy).verify()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 3}, "format 3, this distdiff reads format 2: upgrade distdiff"),
        ({"format": 1}, "format 1, this distdiff reads format 2: rebuild the store"),
        ({"format": None}, "no format version"),
        ({"genes": ...}, "lacks genes"),
        ({"gene": []}, r"unknown key 'gene'; did you mean 'genes'\?"),
        ({"split": 3}, "split: expected the keys by, n_cells, seed, shares, found int"),
        ({"shards": [{"index": 0}]}, "shards lacks nnz, sha256, start, stop"),
    ],
)
def test_manifests_it_refuses(folder, change, said):
    raw = json.loads((folder / "manifest.json").read_text()) | change
    raw = {k: v for k, v in raw.items() if v is not ... and k != "sha256"}
    with pytest.raises(ValueError, match=said):
        Manifest.from_json(json.dumps(raw))
    with pytest.raises(ValueError, match=r"x.json is not JSON"):
        Manifest.from_json(json.dumps(raw)[:-9], "x.json")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", PARTS)
def test_a_missing_shard(copy, part, reader):
    file = copy / "counts" / "all" / part / "c" / "3" / "0"
    store = CountStore.open(copy, cache_bytes=0, reader=reader)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard 3 \(rows 96 to 128\) is missing .*distdiff shard --overwrite"):
        CountStore.open(copy)
    store.read(np.arange(96))
    with pytest.raises(ValueError, match=r"shard 3 \(rows 96 to 128\) is corrupt in block 6"):  # zarr would read zeros
        store.read(np.arange(150))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", PARTS)
def test_every_flipped_byte_is_found(copy, part, reader):
    file = copy / "counts" / "all" / part / "c" / "1" / "0"
    whole = file.read_bytes()
    for at in np.linspace(0, len(whole) - 1, 40).astype(int):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"shard 1 \(rows 32 to 64\) is corrupt in block [23] .*rebuild the store"):
            CountStore.open(copy, reader=reader).read(np.arange(150))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"shard 1 .* is corrupt"):
        CountStore.open(copy, reader=reader).read(np.arange(40, 50))
    file.write_bytes(whole)
    CountStore.open(copy).verify()


def test_exchanged_shards_fail_verification(copy):
    for part in PARTS:
        shards = copy / "counts" / "all" / part / "c"
        os.rename(shards / "0", shards / "x")
        os.rename(shards / "1", shards / "0")
        os.rename(shards / "x", shards / "1")
    with pytest.raises(ValueError, match=r"shard 0 .* differs from the manifest's hash"):
        CountStore.open(copy).verify()


@pytest.mark.parametrize("name", ["split", "names", "labels/kind"])
def test_damaged_columns(copy, name):
    def ask(store):
        rows = np.arange(5)
        return {"split": lambda: store.rows("val"), "names": lambda: store.names(rows)}.get(
            name, lambda: store.labels(rows)
        )()

    ask(CountStore.open(copy))
    chunk = next(p for p in sorted((copy / name / "c").rglob("*")) if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{name} cannot be read.*rebuild the store"):
        ask(CountStore.open(copy))
    shutil.rmtree(copy / name)
    with pytest.raises(ValueError, match=f"{name} is damaged.*rebuild the store"):
        ask(CountStore.open(copy))


def batches(store, rank=0, world=1, **options):
    index = store.rows("train")
    plan = Plan(len(index), 24, block=16, window=2, seed=3)
    return loader(store, plan, index, **{"stop": 12, "rank": rank, "world": world} | options)


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("distdiff-loader")]


def test_two_ranks_read_what_one_reads(store, dense):
    whole = list(batches(store))
    assert [s for s, _ in whole] == list(range(12))
    for (step, cells), (_, a), (_, b) in zip(whole, batches(store, 0, 2), batches(store, 1, 2), strict=True):
        assert torch.equal(cells.rows, torch.cat([a.rows, b.rows]))
        assert torch.equal(cells.counts, torch.cat([a.counts, b.counts]))
        assert torch.equal(cells.labels.labels["kind"], torch.cat([a.labels.labels["kind"], b.labels.labels["kind"]]))
        assert np.array_equal(cells.counts.numpy(), dense[cells.rows.numpy()]), step
    epoch = np.concatenate([c.rows.numpy() for _, c in whole[:5]])
    assert np.array_equal(np.sort(epoch), store.rows("train"))
    assert not loader_threads()


def test_resuming_at_a_step_is_having_been_there(store):
    whole = list(batches(store))
    for (s, a), (t, b) in zip(whole[7:], batches(store, start=7, labels=("donor",), ahead=5), strict=True):
        assert s == t
        assert torch.equal(a.counts, b.counts)
        assert list(b.labels.labels) == ["donor"]


def test_leaving_early_leaks_no_thread(store):
    endless = batches(store, stop=None)
    assert not loader_threads()
    assert next(endless)[0] == 0
    assert len(loader_threads()) == 1
    endless.close()
    assert not loader_threads()
    for step, _ in batches(store, stop=None):
        if step == 3:
            break
    assert not loader_threads()


def test_what_goes_wrong_in_the_thread_is_raised_here(copy):
    store = CountStore.open(copy)
    for part in PARTS:
        (copy / "counts" / "all" / part / "c" / "2" / "0").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"shard 2 .* is corrupt"):
        list(batches(store))
    assert not loader_threads()


def test_a_loader_that_cannot_start(store):
    with pytest.raises(ValueError, match="the plan orders 10 cells, the index has 120"):
        loader(store, Plan(10, 2), store.rows("train"))
    with pytest.raises(ValueError, match="batch 24 is no multiple of 5 ranks"):
        batches(store, 0, 5)
    with pytest.raises(ValueError, match="ahead=0"):
        batches(store, ahead=0)


def test_the_store_stays_light_to_import():
    code = (
        "import sys, distdiff.data.store.store, distdiff.data.feed.loader; "
        "print([m for m in ('anndata', 'dask', 'pandas', 'scanpy', 'zarr', 'h5py') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class _Served(SimpleHTTPRequestHandler):
    """Files over http, in ranges as object stores give them."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        whole, asked = path.read_bytes(), self.headers.get("Range")
        first, last = asked.removeprefix("bytes=").split("-") if asked else ("0", "")
        start = int(first) if first else len(whole) - int(last)
        stop = min(int(last) + 1, len(whole)) if first and last else len(whole)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(whole)}")
        self.end_headers()
        self.wfile.write(whole[start:stop])
        return None

    def log_message(self, *args):
        pass


def test_a_store_over_http(folder, dense):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Served, directory=folder.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            store = CountStore.open(f"{url}/{folder.name}")
            rows = np.random.default_rng(0).permutation(150)
            assert np.array_equal(store.read(rows).toarray(), dense[rows])
            assert store.manifest == CountStore.open(folder).manifest
            assert np.array_equal(store.rows("train"), CountStore.open(folder).rows("train"))
            assert store.labels(rows).keys() == {"kind", "donor"}
            with pytest.raises(FileNotFoundError, match="is not a distdiff store"):
                CountStore.open(f"{url}/nowhere")
            with pytest.raises(ValueError, match="reader 'direct' reads local folders"):
                CountStore.open(f"{url}/{folder.name}", reader="direct")
        finally:
            server.shutdown()


@pytest.mark.parametrize("reader", READERS)
def test_another_process_deletes_it(folder, dense, tmp_path, reader):
    """Whoever opens or reads it meanwhile gets right counts, or an error that names it."""

    def use():
        for _ in range(1000):
            store = CountStore.open(copy, cache_bytes=0, reader=reader)
            assert np.array_equal(store.read(np.arange(0, 150, 7)).toarray(), dense[::7])

    for turn in range(4):
        copy = shutil.copytree(folder, tmp_path / str(turn))
        remover = subprocess.Popen(["sh", "-c", f"sleep 0.0{turn}; rm -rf '{copy}'"])
        try:
            with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(copy))):
                use()
        finally:
            remover.wait(20)
