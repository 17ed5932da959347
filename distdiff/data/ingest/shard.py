"""Build a store: a few files of counts in, one folder that any cell can be read from out.

Pass 1 scatters the cells of the sources, pass 2 gathers and writes them, shard by shard; each is a list of independent
tasks that run in this process, on worker processes of this machine, or on any dask cluster that sees the same files.
The result does not depend on which.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
from tqdm import tqdm

from distdiff import files
from distdiff.cluster import WorkerWatch, connect, explained
from distdiff.component import name_list
from distdiff.data.ingest.build import Build, Run, Wanted
from distdiff.data.ingest.scan import BuildSettings, forget
from distdiff.data.ingest.split import shares as checked_shares
from distdiff.data.store import manifest as about
from distdiff.data.store.manifest import Manifest
from distdiff.data.store.pool import cores
from distdiff.waits import print_line

ALONE = 1 << 16
"""Cells up to which this process builds a store faster than workers start."""

MODEST = 16 << 30
"""Bytes of counts up to which threads of this process do it: the work holds no interpreter lock for long."""

SOON, LOOK = 0.01, 0.5
"""Seconds between looks at what is done on a cluster, and at who is there."""

T = TypeVar("T")
R = TypeVar("R")


def shard(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    layer: str | None = None,
    genes: str | Sequence[str] = "all",
    panel: str | Sequence[str] | None = None,
    join: str = "inner",
    labels: Sequence[str] = (),
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    split_by: str | None = None,
    strata: str | None = None,
    shuffle: bool = True,
    seed: int = 0,
    min_counts: float = 0,
    min_genes: int = 0,
    min_cells: int = 0,
    max_mito: float = 100.0,
    counts: bool = True,
    rounding: Literal["random"] | None = None,
    codec: str = "local",
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    block: int = about.BLOCK,
    blocks_per_shard: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Turn files of counts into a store that `CountStore` reads.

    Cells are shuffled, training cells first; those without a count of the chosen genes are dropped. The store appears
    under its name only when it is whole. A build that was killed or interrupted goes on when it is called again with
    the same arguments.

    Parameters
    ----------
    inputs
        h5ad files, AnnData zarr folders, 10x h5 files or mtx folders.
    out
        Folder to make.
    layer
        Where the raw counts are: None is ``X``, ``"raw"`` is ``raw.X``, else a layer.
    genes
        ``"all"`` that have a count; ``"hvg:N"``, the N that vary most over training cells (docs/MATHS.md 12.1);
        ``"top:N"``, with most molecules; ``"cv:N"``, with the largest coefficient of variation (CountsDiff);
        ``"fano:N"``, variance / mean; ``"seurat_v3:N"``; a text file with one gene a line; or the names.
    panel
        Genes to store apart from the rest (same choices), so that training on them reads nothing else.
    join
        ``"inner"``: genes that every file has, in the order of the first; ``"outer"``: genes of any, zero where a file
        lacks one.
    labels
        obs columns to keep as covariates.
    split, split_by, seed
        Shares of train, val and test; the obs column whose values stay whole (None splits by cell); seed of split and
        order. By cell the shares are exact over all cells, before any is dropped.
    strata
        obs column (kept as a label) whose values lie together, for training in given proportions.
    shuffle
        False keeps the cells in the order of the sources.
    min_counts, min_genes, max_mito
        Cells with fewer molecules, fewer genes, or a larger percentage of molecules from genes named ``MT-`` are
        dropped; each is over all genes of the cell's file, whichever are chosen.
    min_cells
        Genes that fewer cells have are dropped (not those chosen by name).
    counts
        False takes any finite numbers and keeps them as float32, for models of measurements that are no counts.
    rounding
        ``"random"`` makes whole counts of those with decimals (SoupX, EM): each becomes one of the two whole numbers
        beside it, with ``seed``, so that its expected value is kept; the manifest tells. None refuses them. Numbers
        within 1e-4 of a whole one, relative to it, are that number in any case.
    codec
        ``"local"`` (lz4, fastest) or ``"compact"`` (zstd, smallest).
    workers
        Worker processes of a LocalCluster, which goes on if one is killed; 0 is this process; None is threads of this
        process up to 16 GiB of counts, where starting workers takes longer than it saves, else one process a core.
        Scripts that start workers need the ``if __name__ == "__main__"`` guard.
    scheduler
        Address of a running dask scheduler instead; its workers must see the inputs and the folder of ``out``.
    overwrite
        Replace a store of that name, once the new one is whole.
    block, blocks_per_shard
        Cells a block; blocks a shard (None aims at 32 MiB of coded counts).
    progress
        Show a bar and what was left out.

    Returns
    -------
    Manifest
        Of the store that was written.

    Raises
    ------
    FileExistsError
        ``out`` exists, or another process is building it.
    ValueError, FileNotFoundError
        Inputs, layer, genes, labels or split cannot be used; something is no count; a source changed meanwhile;
        ``out`` is a URL (`distdiff.data.store.upload` sends a store there).
    OSError
        The disk is full.
    """
    shares = checked_shares(split)
    if block < 1 or (blocks_per_shard is not None and blocks_per_shard < 1):
        raise ValueError(f"block={block}, blocks_per_shard={blocks_per_shard}: both must be at least 1")
    if codec not in about.CODECS:
        raise ValueError(f"codec {codec!r}: {' or '.join(about.CODECS)} is wanted")
    if rounding not in (None, "random"):
        raise ValueError(f"rounding {rounding!r}: 'random' or None is wanted")
    if rounding and not counts:
        raise ValueError("rounding and measurements (counts=False) exclude each other: these keep their decimals")
    paths = [Path(path).expanduser() for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    out = files.absolute(files.local(out))
    for path in paths:
        files.refuse_nested(out, path)
    _refuse_foreign(out)
    notify = partial(print, flush=True) if progress else lambda text: None
    kept_labels = name_list("labels", labels) + ((strata,) if strata and strata not in labels else ())
    bounds = {"min_counts": (min_counts, 0), "min_genes": (min_genes, 0), "min_cells": (min_cells, 0),
              "max_mito": (max_mito, 100.0)}  # fmt: skip
    quality = {name: float(value) for name, (value, off) in bounds.items() if value != off}
    wanted = Wanted(
        layer, genes, panel, join, kept_labels, shares, split_by, strata, shuffle, seed, quality, counts, rounding,
        codec, block, blocks_per_shard,
    )  # fmt: skip
    build = Build(paths, wanted, notify)
    with files.resumable(out, build.identity(), overwrite=overwrite, notify=notify) as work:
        if work is None:
            notify(f"{out} is whole: the command that was killed had finished it")
            return Manifest.read(out)
        with _runner(workers, scheduler, progress, build.n_cells, build.n_bytes) as runner:
            if (work / "spill").is_dir():
                notify(f"going on with the build in {work}")
            build.tell()
            try:
                return build.run(work, *runner)
            finally:
                forget()


def _refuse_foreign(out: Path) -> None:
    """Nothing but a store, or an empty folder, is ever replaced by one."""
    if os.path.lexists(out) and not (out / about.FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a distdiff store, so it is left alone; choose another name")


@contextmanager
def _runner(
    workers: int | None, scheduler: str | None, progress: bool, n_cells: int, n_bytes: float
) -> Iterator[tuple[Run, int]]:
    """What runs a pass (this process, worker processes here, or a cluster elsewhere), and the bytes a worker has."""
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers}: 0 is this process, 1 or more are worker processes")
    if scheduler is None and (workers == 0 or (workers is None and n_cells <= ALONE)):
        memory = psutil.virtual_memory().available
        yield lambda fn, tasks, job, what: [fn(t, job) for t in _bar(tasks, what, progress)], memory
        return
    if scheduler is None and workers is None and n_bytes <= MODEST:
        with ThreadPoolExecutor(cores(), thread_name_prefix="distdiff-build") as threads:
            memory = psutil.virtual_memory().available // cores()
            yield lambda fn, tasks, job, what: _run_threads(threads, fn, tasks, job, what, progress), memory
        return
    from dask.distributed import Client, LocalCluster

    if scheduler is not None:
        with (
            explained(scheduler),
            connect(scheduler, print_line if progress else lambda text: None) as client,
            client.as_current(),
        ):
            yield lambda fn, tasks, job, what: _run_dask(client, fn, tasks, job, what, progress), _memory(client)
        return
    with (
        LocalCluster(
            n_workers=workers or max(1, min(cores(), -(-n_cells // ALONE))),
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        explained(f"{cluster.scheduler_address} (of workers=)"),
        Client(cluster) as client,
    ):
        if progress:
            hint = "" if importlib.util.find_spec("bokeh") else " (pip install bokeh to see it)"
            print(f"{len(cluster.workers)} worker processes; dashboard: {client.dashboard_link}{hint}", flush=True)
        yield lambda fn, tasks, job, what: _run_dask(client, fn, tasks, job, what, progress), _memory(client)


def _memory(client: Any) -> int:
    """Bytes that the smallest worker has."""
    limits = [w["memory_limit"] for w in client.scheduler_info(n_workers=-1)["workers"].values()]
    return min([int(limit) for limit in limits if limit] or [psutil.virtual_memory().available])


def _run_threads(
    threads: ThreadPoolExecutor,
    fn: Callable[[T, BuildSettings], R],
    tasks: Sequence[T],
    job: BuildSettings,
    what: str,
    progress: bool,
) -> list[R]:
    """Run one pass on threads; the first error ends it."""
    futures = [threads.submit(fn, task, job) for task in tasks]
    try:
        with _bar(tasks, what, progress) as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [future.result() for future in futures]


def _run_dask(
    client: Any,
    fn: Callable[[T, BuildSettings], R],
    tasks: Sequence[T],
    job: BuildSettings,
    what: str,
    progress: bool,
) -> list[R]:
    """Run one pass on a cluster, a few tasks ahead of the workers, results in order of the tasks."""
    from dask.distributed import KilledWorker
    from dask.distributed import as_completed as finished

    shared = client.submit(_itself, job, pure=False)  # a task, so dask makes it again if its worker dies
    results: dict[int, R] = {}
    number: dict[str, int] = {}
    todo = iter(enumerate(tasks))
    done = finished()

    def feed(n: int) -> None:
        for i, task in itertools.islice(todo, n):
            future = client.submit(fn, task, shared, pure=False)
            number[future.key] = i
            done.add(future)

    def room() -> int:
        return 2 * max(1, sum(client.nthreads().values())) - len(number)  # workers come and go

    watch = WorkerWatch(client, partial(print, flush=True) if progress else lambda text: None)
    looked = time.monotonic()
    feed(room())
    with _bar(tasks, what, progress) as bar:
        while number:
            if not done.has_ready():
                if time.monotonic() - looked > LOOK:
                    watch.workers()
                    looked = time.monotonic()
                time.sleep(SOON)
                continue
            future = next(done)
            try:
                results[number.pop(future.key)] = future.result()
            except KilledWorker as e:
                raise RuntimeError(
                    f"{what}: workers died again and again, most likely of memory; use fewer (workers=)"
                ) from e
            bar.update()
            feed(max(1, room()))
    return [results[i] for i in range(len(tasks))]


def _itself(job: BuildSettings) -> BuildSettings:
    return job


def _bar(tasks: Sequence[T], what: str, progress: bool) -> Any:
    return tqdm(tasks, desc=what, unit="task", disable=not progress, ascii=True)
