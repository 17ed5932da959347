"""Measure loaders of cells, each under its own interpreter; one JSON line on stdout. Knows nothing of distdiff.

    PEER=PEER312/bin/python                      # annbatch, anndata, zarr, zarrs
    $PEER benchmarks/_peers_loader.py annbatch --data a.ann.zarr --seconds 3 [--chunk 512 --preload 32]
    SCVI/bin/python benchmarks/_peers_loader.py scdataset --data a.h5ad --seconds 3 --contract dense
    $PEER benchmarks/_peers_loader.py build --data a.h5ad --out a.ann.zarr

The contract is what a batch must be when it is handed over: ``csr`` (float32 CSR) or ``dense`` (float32 array). A run
opens the data (seconds to the first batch), warms up, is timed for ``--seconds``, then goes on a little with a clock
that reads the memory, which would cost CPU time in the timed part; ``start MB`` is what it was before opening.
``--cold`` times whole epochs instead, each begun by dropping the data's files from the page cache and opening them
anew. ``--overlap`` adds a part in which the consumer sleeps after each batch, as one that waits for a GPU does,
``--compute`` milliseconds or as long as a batch took to load.

CPU seconds are those of this process and its children, all threads. Memory is private: ``Pss_Anon + Pss_Shmem`` of
``/proc/PID/smaps_rollup`` over the process and its children, the highest sample.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from scipy import sparse


class Source(NamedTuple):
    """``opened()`` gives endless batches and, once closed, leaves no file open; ``cells`` is the size of an epoch."""

    opened: Callable[[], contextlib.AbstractContextManager[Iterator[Any]]]
    cells: int


# --- measuring ---------------------------------------------------------------------------------------------------


def tree(pid: int | None = None) -> list[psutil.Process]:
    """A process and its children, as far as they still live."""
    try:
        own = psutil.Process(pid)
        return [own, *own.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu() -> float:
    """CPU seconds of this process and its children, living and reaped."""
    used = sum(
        t.ru_utime + t.ru_stime for t in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    for child in tree()[1:]:
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            used += times.user + times.system
    return used


def megabytes(processes: list[psutil.Process]) -> tuple[float, float]:
    """Private and resident memory of processes in MB."""
    private = resident = 0
    for process in processes:
        with contextlib.suppress(OSError, psutil.Error):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
            private += kib.get("Pss_Anon", 0) + kib.get("Pss_Shmem", 0)
            resident += kib["Rss"]
    return private * 1024 / 1e6, resident * 1024 / 1e6


class Memory:
    """A thread that samples memory (and CPU seconds) of a process tree while it is not paused."""

    def __init__(self, pid: int | None = None, every: float = 0.1) -> None:
        self.private = self.resident = 0.0
        self.cpu: dict[int, float] = {}
        self._pid, self._every = pid, every
        self._run, self._end = threading.Event(), threading.Event()
        self._run.set()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._end.wait(self._every):
            self._run.wait()
            self.look()

    def look(self) -> None:
        processes = tree(self._pid)
        private, resident = megabytes(processes)
        self.private, self.resident = max(self.private, private), max(self.resident, resident)
        for process in processes if self._pid else ():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self.cpu[process.pid] = times.user + times.system

    def pause(self) -> None:
        self._run.clear()
        time.sleep(2 * self._every)

    def resume(self) -> None:
        self._run.set()

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._run.set()
        self._end.set()
        self._thread.join()


def data_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def drop(path: Path) -> None:
    """Take the files of a store out of the page cache (pages that are mapped somewhere stay)."""
    for file in data_files(path):
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def fill(path: Path) -> None:
    """Bring the files of a store into the page cache."""
    for file in data_files(path):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def cells_of(batch: Any) -> int:
    return batch.shape[0]


def consume(
    batches: Iterator[Any], seconds: float, *, cells: int | None = None, period: int = 1, sleep: float = 0.0
) -> dict[str, Any]:
    """Take batches until ``seconds`` passed, in whole periods (of a loader's pool), or until ``cells`` cells came."""
    waits: list[float] = []
    taken = 0
    began, used = time.perf_counter(), cpu()
    while taken < cells if cells else len(waits) % period or not waits or time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - asked)
        taken += cells_of(batch)
        if sleep:
            time.sleep(sleep)
    wall = time.perf_counter() - began
    return {"cells": taken, "wall s": wall, "cpu s": cpu() - used, "waits": waits}


def mean_total(batch: Any) -> float:
    return float(batch.sum(dtype=np.float64) if hasattr(batch, "tocsr") or isinstance(batch, np.ndarray)
                 else batch.double().sum()) / cells_of(batch)  # fmt: skip


def measure(source: Source, data: Path, a: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one run, see the head of this file."""
    found: dict[str, Any] = {"start MB": megabytes(tree())[0]}
    period = max(1, a.pool // a.batch)
    with Memory() as memory:
        fill(data)
        began = time.perf_counter()
        with source.opened() as batches:
            first = next(batches)
            found |= {"first batch s": time.perf_counter() - began, "batch": cells_of(first),
                      "kind": f"{type(first).__name__} {first.dtype}", "counts a cell": mean_total(first)}  # fmt: skip
            del first
            consume(batches, a.warm, period=period)
            memory.look()
            if not a.cold:
                memory.pause()
                timed = consume(batches, a.seconds, period=period)
                memory.resume()
            if a.overlap:
                took = timed["wall s"] / len(timed["waits"])
                compute = a.compute / 1000 or took
                memory.pause()
                slept = consume(batches, a.seconds, period=period, sleep=compute)
                memory.resume()
                step = slept["wall s"] / len(slept["waits"])
                found["overlap"] = {"load ms": took * 1e3, "compute ms": compute * 1e3, "step ms": step * 1e3,
                                    "step / compute": step / compute,
                                    "wait p99 ms": float(np.percentile(slept["waits"], 99)) * 1e3}  # fmt: skip
            if not a.cold:
                consume(batches, a.tail, period=period)
        if a.cold:
            memory.pause()
            rounds: list[dict[str, Any]] = []
            while not rounds or sum(r["wall s"] for r in rounds) < a.seconds:
                drop(data)
                began, used = time.perf_counter(), cpu()
                with source.opened() as batches:
                    opening = time.perf_counter() - began, cpu() - used
                    part = consume(batches, 0, cells=source.cells)
                part["wall s"] += opening[0]
                part["cpu s"] += opening[1]
                part["waits"][0] += opening[0]
                rounds.append(part)
            timed = {k: sum((r[k] for r in rounds), start=[] if k == "waits" else 0) for k in rounds[0]}
            found["epochs"] = len(rounds)
            found["first batch s"] = float(np.median([r["waits"][0] for r in rounds]))
        memory.look()
    waits = np.array(timed.pop("waits")) * 1e3
    return found | timed | {
        "batches": len(waits), "p50 ms": float(np.percentile(waits, 50)), "p99 ms": float(np.percentile(waits, 99)),
        "cells / s": timed["cells"] / timed["wall s"], "cells / cpu s": timed["cells"] / timed["cpu s"],
        "private MB": memory.private, "resident MB": memory.resident,
    }  # fmt: skip


def versions(*names: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- peers -------------------------------------------------------------------------------------------------------


def handed(a: argparse.Namespace) -> Callable[[Any], Any]:
    """From a scipy CSR batch to what the contract asks for, of the panel's genes alone if there is one."""
    columns = np.load(a.panel) if a.panel else None

    def hand(batch: Any) -> Any:
        if columns is not None:
            batch = batch[:, columns]
        if batch.dtype != np.float32:
            batch = batch.astype(np.float32)
        return batch.toarray() if a.contract == "dense" else batch

    return hand


def annbatch(a: argparse.Namespace) -> Source:
    """annbatch from its own store, X alone (labels cost it time, see its README)."""
    import anndata as ad
    import zarr
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    hand = handed(a)

    def only_x(group: zarr.Group) -> ad.AnnData:
        return ad.AnnData(X=ad.io.sparse_dataset(group["X"]))

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[Any]]:
        loader = Loader(batch_size=a.batch, chunk_size=a.chunk, preload_nchunks=a.preload, shuffle=True,
                        preload_to_gpu=False, to=None, drop_last=False,
                        rng=np.random.default_rng(0))  # fmt: skip
        loader.use_collection(DatasetCollection(a.data, mode="r"), load_adata=only_x)
        yield (hand(batch["X"]) for _ in itertools.count() for batch in loader)

    with opened():
        pass
    collection = DatasetCollection(a.data, mode="r")
    return Source(opened, sum(int(group["X"].attrs["shape"][0]) for group in collection))


def h5ad_shape(path: Path) -> tuple[int, int]:
    import h5py

    with h5py.File(path) as file:
        cells, genes = file["X"].attrs["shape"]
        return int(cells), int(genes)


def scdataset(a: argparse.Namespace) -> Source:
    """scDataset on a backed h5ad, in this process; CSR until the batch is handed over."""
    import anndata as ad
    from scdataset import BlockShuffling, scDataset

    hand = handed(a)

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[Any]]:
        atlas = ad.read_h5ad(a.data, backed="r")
        x = atlas.X
        data = scDataset(atlas, BlockShuffling(block_size=a.block), batch_size=a.batch, fetch_factor=a.fetch, seed=0,
                         fetch_callback=lambda _, rows: x[rows])  # fmt: skip
        try:
            yield (hand(batch) for _ in itertools.count() for batch in data)
        finally:
            atlas.file.close()

    return Source(opened, h5ad_shape(a.data)[0])


def h5ad(a: argparse.Namespace) -> Source:
    """Random rows of a backed h5ad, sorted within the batch."""
    import anndata as ad

    hand, (cells, _) = handed(a), h5ad_shape(a.data)

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[Any]]:
        atlas = ad.read_h5ad(a.data, backed="r")
        try:
            yield (hand(atlas.X[np.sort(rows)]) for rows in shuffled(cells, a.batch))
        finally:
            atlas.file.close()

    return Source(opened, cells)


def shuffled(cells: int, batch: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(cells)
        yield from (order[at : at + batch] for at in range(0, cells, batch))


def memory(a: argparse.Namespace) -> Source:
    """The ceiling: the matrix as uint16 CSR in RAM, random rows gathered by compiled threads (needs numba)."""
    import h5py
    import numba

    @numba.njit(nogil=True)
    def gather(data, indices, indptr, rows, starts, out_data, out_indices):  # type: ignore[no-untyped-def]
        for i in range(len(rows)):
            at, first, last = starts[i], indptr[rows[i]], indptr[rows[i] + 1]
            to, values = out_data[at : at + last - first], data[first:last]  # slices: the loops become vectors
            for j in range(len(values)):
                to[j] = values[j]
            to, values = out_indices[at : at + last - first], indices[first:last]
            for j in range(len(values)):
                to[j] = values[j]

    @numba.njit(nogil=True)
    def scatter(data, indices, indptr, rows, out):  # type: ignore[no-untyped-def]
        for i in range(len(rows)):
            first, last = indptr[rows[i]], indptr[rows[i] + 1]
            to, values, columns = out[i], data[first:last], indices[first:last]
            for j in range(len(values)):
                to[columns[j]] = values[j]

    cells, genes = h5ad_shape(a.data)
    with h5py.File(a.data) as file:
        x = file["X"]
        indptr = x["indptr"][:].astype(np.int64)
        data, indices = np.empty(indptr[-1], np.uint16), np.empty(indptr[-1], np.uint16)
        for at in range(0, len(data), 1 << 22):
            data[at : at + (1 << 22)] = x["data"][at : at + (1 << 22)]
            indices[at : at + (1 << 22)] = x["indices"][at : at + (1 << 22)]
    pool = ThreadPoolExecutor(a.threads)
    hand = handed(a) if a.panel else lambda batch: batch
    kinds = (np.uint16, np.uint16) if a.contract == "native" else (np.float32, np.int32)

    def split(call: Any, rows: np.ndarray, *per_row: Any) -> None:
        cut = [np.array_split(part, a.threads) for part in (rows, *per_row)]
        list(pool.map(functools.partial(call, data, indices, indptr), *cut))

    def csr(rows: np.ndarray) -> Any:
        starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(indptr[rows + 1] - indptr[rows], out=starts[1:])
        values, columns = np.empty(starts[-1], kinds[0]), np.empty(starts[-1], kinds[1])
        split(lambda *parts: gather(*parts, values, columns), rows, starts[:-1])  # type: ignore[call-arg]
        if a.contract == "native":  # scipy would copy uint16 indices
            return Native((len(rows), genes), values.dtype, values, columns, starts)
        return sparse.csr_matrix((values, columns, starts), (len(rows), genes))

    def dense(rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(rows), genes), np.float32)
        split(scatter, rows, out)
        return out

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[Any]]:
        call = dense if a.contract == "dense" and not a.panel else csr
        yield (hand(call(rows)) for rows in shuffled(cells, a.batch))

    return Source(opened, cells)


class Native(NamedTuple):
    """CSR of small integers that scipy has no class for."""

    shape: tuple[int, int]
    dtype: np.dtype
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray

    def tocsr(self) -> Any:
        return sparse.csr_matrix((self.data, self.indices, self.indptr), self.shape)

    def sum(self, dtype: Any) -> Any:
        return self.data.sum(dtype=dtype)


def build(a: argparse.Namespace) -> dict[str, Any]:
    """annbatch's store out of an h5ad, by its own writer with its defaults (of which ``--dataset-size`` is one)."""
    import anndata as ad
    import zarr
    from annbatch import DatasetCollection

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    names = None
    if a.panel:
        with contextlib.closing(ad.read_h5ad(a.data, backed="r").file) as file:
            names = [n.decode() for n in file["var/_index"][:][np.load(a.panel)]]
    began, used = time.perf_counter(), cpu()
    DatasetCollection(str(a.out)).add_adatas([str(a.data)], dataset_size=a.dataset_size, var_subset=names,
                                             rng=np.random.default_rng(0))  # fmt: skip
    return {"inner wall s": time.perf_counter() - began, "inner cpu s": cpu() - used}


PEERS: dict[str, Callable[[argparse.Namespace], Source]] = {
    "annbatch": annbatch, "scdataset": scdataset, "h5ad": h5ad, "memory": memory
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """What a measured run can be told; ours too."""
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--pool", type=int, default=16_384, help="cells that are shuffled together; timed in wholes")
    parser.add_argument("--contract", choices=("csr", "dense", "native"), default="csr")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the timed part")
    parser.add_argument("--warm", type=float, default=1.0, help="seconds before")
    parser.add_argument("--tail", type=float, default=1.0, help="seconds after, in which memory is read")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--compute", type=float, default=0.0, help="milliseconds a step; 0 is what loading took")
    parser.add_argument("--panel", type=Path, help="npy with the columns wanted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=(*PEERS, "build"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--preload", type=int, default=32)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--fetch", type=int, default=16, help="batches that scDataset reads at once")
    parser.add_argument("--threads", type=int, default=2, help="that gather in memory")
    parser.add_argument("--dataset-size", default="20GB", help="what annbatch's writer shuffles in RAM")
    arguments(parser)
    a = parser.parse_args()
    if a.cold and a.overlap:
        parser.error("--overlap is for warm runs")
    found = build(a) if a.peer == "build" else measure(PEERS[a.peer](a), a.data, a)
    packages = {"annbatch": ("annbatch", "anndata", "zarr", "zarrs"), "build": ("annbatch", "anndata", "zarr", "zarrs"),
                "scdataset": ("scDataset", "anndata", "torch"), "h5ad": ("anndata", "h5py")}  # fmt: skip
    found["versions"] = versions(*packages.get(a.peer, ("numba",)), "numpy", "scipy")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
