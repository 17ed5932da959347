"""Build a store: a few files of counts in, one folder that any cell can be read from out.

Pass 1 scans the sources, pass 2 writes; each is a list of independent tasks that run in this process, on worker
processes of this machine, or on any dask cluster that sees the same files. The result does not depend on which.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from distdiff.component import nearest
from distdiff.data import manifest as about
from distdiff.data import split as splits
from distdiff.data.layout import Layout, create, encode_names, write_column
from distdiff.data.manifest import Manifest, ShardInfo, SourceInfo, SplitInfo
from distdiff.data.scan import Job, Moments, ShardTask, Span, Written, forget, moments, scan, write
from distdiff.data.source import Source

T = TypeVar("T")
R = TypeVar("R")
Map = Callable[[Callable[[T, Job], R], Sequence[T], Job, str], list[R]]

SCAN_CELLS = 1 << 16
"""Cells a scanning task reads at most."""


def shard(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    layer: str | None = None,
    genes: str | Sequence[str] = "all",
    labels: Sequence[str] = (),
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    split_by: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    block: int = about.BLOCK,
    blocks_per_shard: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Turn files of counts into a store that `CountStore` reads.

    Cells stay in the order of the sources; those without a count of the chosen genes are dropped. Files that differ in
    their genes are joined on the genes they share, in the order of the first. The store appears under its name only
    when it is whole.

    Parameters
    ----------
    inputs
        h5ad files or AnnData zarr folders.
    out
        Folder to make.
    layer
        Where the raw counts are: None is ``X``, ``"raw"`` is ``raw.X``, else a layer.
    genes
        ``"all"`` that have a count; ``"hvg:N"``, the N with the largest variance / mean (Fano factor of the raw
        molecules over training cells; 1 for Poisson noise); a text file with one gene a line; or the names.
    labels
        obs columns to keep as covariates.
    split, split_by, seed
        Shares of train, val and test; the obs column whose values stay whole (None splits by cell); seed. By cell the
        shares are exact over the cells that have a count of any shared (or named) gene; ``hvg`` may then drop a few.
    workers
        Worker processes; None is one a core, 0 is this process without dask. Scripts that start workers need the
        ``if __name__ == "__main__"`` guard.
    scheduler
        Address of a running dask scheduler instead.
    overwrite
        Replace a store of that name, once the new one is whole.
    block, blocks_per_shard
        Cells a block; blocks a shard (None aims at 64 MiB of raw counts).
    progress
        Show a bar and what was left out.

    Returns
    -------
    Manifest
        Of the store that was written.

    Raises
    ------
    FileExistsError
        ``out`` exists.
    ValueError, FileNotFoundError
        Inputs, layer, genes, labels or split cannot be used; something is no count.
    OSError
        The disk is full.
    """
    shares = splits.shares(split)
    if block < 1 or (blocks_per_shard is not None and blocks_per_shard < 1):
        raise ValueError(f"block={block}, blocks_per_shard={blocks_per_shard}: both must be at least 1")
    paths = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    out = Path(out).absolute()
    _refuse_existing(out, overwrite)
    build = _Build(paths, layer, genes, labels, shares, split_by, seed, block, blocks_per_shard, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(out) as root, _runner(workers, scheduler, progress, build.n_cells) as run:
        result = build.run(root, run)
        _publish(root, out)
    return result


class _Build:
    """The sources of one build and the steps from them to a store."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        layer: str | None,
        genes: str | Sequence[str],
        labels: Sequence[str],
        shares: tuple[float, float, float],
        split_by: str | None,
        seed: int,
        block: int,
        blocks_per_shard: int | None,
        progress: bool,
    ) -> None:
        if not paths:
            raise ValueError("no input files; give at least one h5ad file or AnnData zarr folder")
        if len(set(labels)) < len(labels):
            raise ValueError(f"labels {list(labels)}: one is named twice")
        self.layer, self.labels, self.progress = layer, tuple(labels), progress
        self.shares, self.split_by, self.seed = shares, split_by, seed
        self.block, self.blocks_per_shard = block, blocks_per_shard
        self.sources = [Source.open(p, layer) for p in paths]
        self.paths = tuple(str(Path(p).absolute()) for p in paths)
        self.n_cells = sum(s.n_cells for s in self.sources)
        self.shared = _shared_genes(self.sources)
        self.not_shared = len(set().union(*(s.genes for s in self.sources))) - len(self.shared)
        self.chosen_by, self.top, self.named = _parse_genes(genes, self.shared)
        self.names = _unique_names([s.obs_names for s in self.sources])
        keys = dict.fromkeys([*self.labels, *([split_by] if split_by else [])])
        self.obs = {k: np.concatenate([s.obs(k) for s in self.sources]) for k in keys}
        self.file = np.repeat(np.arange(len(self.sources), dtype=np.int32), [s.n_cells for s in self.sources])
        self.row = np.concatenate([np.arange(s.n_cells, dtype=np.int64) for s in self.sources])
        for note in (s.note for s in self.sources):
            self.say(note)
        if self.not_shared:
            self.say(f"{self.not_shared} genes left out: some file lacks them; {len(self.shared)} are shared")

    def say(self, text: str) -> None:
        """Tell the user, unless asked to be silent."""
        if self.progress and text:
            print(text, flush=True)

    def run(self, root: Path, run: Map) -> Manifest:
        """Scan, split, choose, write into ``root``; the manifest comes last."""
        genes = self.named or self.shared
        nnz, gene_nnz, largest = self.scan(run, genes, "scan")
        if not nnz.any():
            raise ValueError(f"{', '.join(s.where for s in self.sources)}: no counts at all in the {len(genes)} genes")
        code = self.split_codes(np.flatnonzero(nnz))
        never = () if self.named else tuple(g for g, n in zip(genes, gene_nnz, strict=True) if n == 0)
        if self.top is not None:
            genes = self.most_variable(run, genes, gene_nnz, code)
            nnz, _, largest = self.scan(run, genes, "count")
        elif never:
            genes = tuple(g for g, n in zip(genes, gene_nnz, strict=True) if n > 0)
        kept = np.flatnonzero(nnz)
        code = code[kept]
        if not (code == 0).any():
            raise ValueError("no training cell has a count of the chosen genes; choose more genes or another split")
        self.say(f"{len(kept)} cells kept, {self.n_cells - len(kept)} without counts dropped; {len(genes)} genes kept")
        if never:
            self.say(f"{len(never)} genes dropped: never counted")
        layout = Layout.fit(nnz[kept], len(genes), largest, self.block, self.blocks_per_shard)
        create(root, layout)
        job = replace(self.job(genes), root=str(root), layout=layout)
        written = run(write, self.shard_tasks(layout, kept, code), job, "write")
        made = self.describe(layout, genes, kept, code, written, never)
        self.write_columns(root, made, kept, code, written)
        (root / about.FILE).write_text(made.to_json(), encoding="utf-8")
        return made

    def job(self, genes: Sequence[str]) -> Job:
        """The job whose output columns are ``genes``."""
        at = {g: i for i, g in enumerate(genes)}
        columns = tuple(np.array([at.get(g, -1) for g in s.genes], dtype=np.int32) for s in self.sources)
        return Job(self.paths, self.layer, columns, len(genes))

    def spans(self) -> list[Span]:
        """All rows of all sources, cut for scanning."""
        return [
            Span(f, start, min(start + SCAN_CELLS, s.n_cells))
            for f, s in enumerate(self.sources)
            for start in range(0, s.n_cells, SCAN_CELLS)
        ]

    def scan(self, run: Map, genes: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Stored counts per cell ``[n_cells]`` and per gene ``[g]``, and the largest count."""
        found = run(scan, self.spans(), self.job(genes), what)
        if not found:
            return np.zeros(0, np.int32), np.zeros(len(genes), np.int64), 0
        nnz = np.concatenate([s.nnz for s in found])
        return nnz, reduce(add, [s.gene_nnz for s in found]), max(s.largest for s in found)

    def split_codes(self, counted: np.ndarray) -> np.ndarray:
        """Split code of every cell ``uint8 [n_cells]``; those not in ``counted`` get no share of the cells."""
        code = np.full(self.n_cells, len(about.SPLITS), np.uint8)
        if self.split_by is None:
            code[counted] = splits.by_cell(len(counted), self.shares, self.seed)
        else:
            code[counted] = splits.by_group(self.obs[self.split_by][counted], self.shares, self.seed, self.split_by)
        return code

    def most_variable(self, run: Map, genes: Sequence[str], gene_nnz: np.ndarray, code: np.ndarray) -> tuple[str, ...]:
        """The ``top`` genes by variance / mean over training cells, in source order."""
        counted = int((gene_nnz > 0).sum())
        top = self.top or 0
        if top > counted:
            raise ValueError(f"genes 'hvg:{top}': only {counted} genes have a count; ask for at most that many")
        first = np.cumsum([0, *(s.n_cells for s in self.sources)])
        spans = [replace(s, keep=code[first[s.file] + s.start : first[s.file] + s.stop] == 0) for s in self.spans()]
        sums = reduce(add, run(moments, spans, self.job(genes), "variance"))
        fano = np.divide(sums.var, sums.mean, out=np.full(len(genes), -1.0), where=sums.mean > 0)
        fano[gene_nnz == 0] = -2.0
        best = np.sort(np.argsort(-fano, kind="stable")[:top])
        return tuple(genes[i] for i in best)

    def shard_tasks(self, layout: Layout, kept: np.ndarray, code: np.ndarray) -> list[ShardTask]:
        """One task a shard: the spans of source rows that hold its cells."""
        tasks = []
        for number in range(layout.n_shards):
            start, stop = layout.rows(number)
            cells = kept[start:stop]
            spans = []
            for f in np.unique(self.file[cells]):
                rows = self.row[cells[self.file[cells] == f]]
                lo, hi = int(rows[0]), int(rows[-1]) + 1
                keep = None
                if hi - lo > len(rows):
                    keep = np.zeros(hi - lo, bool)
                    keep[rows - lo] = True
                spans.append(Span(int(f), lo, hi, keep))
            tasks.append(ShardTask(number, tuple(spans), code[start:stop] == 0))
        return tasks

    def codes(self, values: Sequence[str], key: str, kept: np.ndarray) -> np.ndarray:
        """Label codes ``int32 [len(kept)]`` of one obs column, -1 where missing."""
        at: dict[str | None, int] = {v: i for i, v in enumerate(values)}
        return np.array([at.get(v, -1) for v in self.obs[key][kept]], dtype=np.int32)

    def describe(
        self,
        layout: Layout,
        genes: tuple[str, ...],
        kept: np.ndarray,
        code: np.ndarray,
        written: Sequence[Written],
        never: tuple[str, ...],
    ) -> Manifest:
        """The manifest of what was written."""
        values = {k: tuple(sorted({v for v in self.obs[k][kept] if v is not None})) for k in self.labels}
        codes = [*(self.codes(values[k], k, kept) for k in sorted(self.labels)), code]
        shards = []
        for number, w in enumerate(written):
            start, stop = layout.rows(number)
            sha = about.combine(w.sha256, [c[start:stop] for c in codes])
            shards.append(ShardInfo(number, start, stop, int(w.nnz), sha))
        n_kept = np.bincount(self.file[kept], minlength=len(self.sources))
        sources = tuple(
            SourceInfo(Path(p).name, s.n_cells, int(n), s.n_cells - int(n))
            for p, s, n in zip(self.paths, self.sources, n_kept, strict=True)
        )
        train, val, test = (int(n) for n in np.bincount(code, minlength=3))
        return Manifest(
            format=about.FORMAT,
            n_cells=layout.n_cells,
            genes=genes,
            labels=values,
            block=layout.block,
            cap=layout.cap,
            blocks_per_shard=layout.blocks_per_shard,
            dtype=layout.dtype,
            index_dtype=layout.index_dtype,
            split=SplitInfo(self.shares, self.split_by, self.seed, (train, val, test)),
            sources=sources,
            shards=tuple(shards),
            chosen_by=self.chosen_by,
            layer=self.layer,
            never_counted=never,
            not_shared=self.not_shared,
            fingerprint=about.fingerprint(genes, values, shards),
        )

    def write_columns(
        self, root: Path, made: Manifest, kept: np.ndarray, code: np.ndarray, written: Sequence[Written]
    ) -> None:
        """Everything a cell or a gene has one of."""
        for key, values in made.labels.items():
            write_column(root, f"labels/{key}", self.codes(values, key, kept))
        write_column(root, "split", code)
        write_column(root, "source/file", self.file[kept])
        write_column(root, "source/row", self.row[kept])
        write_column(root, "names", encode_names(self.names[kept]))
        sums: Moments = reduce(add, [w.moments for w in written])
        for name, value in {"mean": sums.mean, "var": sums.var, "nnz": sums.nnz, "max": sums.largest}.items():
            write_column(root, f"genes/{name}", value)


def _shared_genes(sources: Sequence[Source]) -> tuple[str, ...]:
    common = set(sources[0].genes).intersection(*(s.genes for s in sources[1:]))
    if not common:
        raise ValueError(
            f"{', '.join(s.where for s in sources)}: no gene is in all {len(sources)} files; "
            "are some named by symbol and some by Ensembl id?"
        )
    return tuple(g for g in sources[0].genes if g in common)


def _parse_genes(genes: str | Sequence[str], shared: Sequence[str]) -> tuple[str, int | None, tuple[str, ...] | None]:
    """How genes are chosen (for the manifest), N of ``hvg:N`` if that, names if they are given."""
    if genes == "all":
        return "all", None, None
    if isinstance(genes, str) and genes.startswith("hvg:"):
        if not genes[4:].isdigit() or int(genes[4:]) < 1:
            raise ValueError(f"genes {genes!r}: a whole number of genes is wanted after 'hvg:', for example hvg:2000")
        return genes, int(genes[4:]), None
    if isinstance(genes, str | Path):
        file = Path(genes)
        if not file.is_file():
            raise FileNotFoundError(f"genes {str(genes)!r} is neither 'all', 'hvg:N' nor a text file of gene names")
        how, where = file.name, str(file)
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        how, where, names = "names", "genes", list(genes)
    if not names:
        raise ValueError(f"{where} names no gene; write one a line")
    if len(set(names)) < len(names):
        raise ValueError(f"{where} names gene {next(g for g in names if names.count(g) > 1)!r} more than once")
    known = set(shared)
    if unknown := [g for g in names if g not in known]:
        near = nearest(unknown[0], shared) if len(shared) <= 100_000 else ""
        near = near if near.startswith("; did") else ""
        raise ValueError(
            f"{where}: {len(unknown)} of {len(names)} genes are not in every input: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}{near}"
        )
    return how, None, tuple(names)


def _unique_names(names: Sequence[np.ndarray]) -> np.ndarray:
    """All cell names; one that several files have gets ``-<file number>``."""
    every = np.concatenate(names)
    if len(names) == 1:
        return every
    values, which, times = np.unique(every, return_inverse=True, return_counts=True)
    clash = times[which] > 1
    if clash.any():
        file = np.repeat(np.arange(len(names)), [len(n) for n in names])
        every = every.astype(object)
        every[clash] = [f"{n}-{f}" for n, f in zip(every[clash], file[clash], strict=True)]
        every = every.astype(str)
        values, times = np.unique(every, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"cell {str(values[times.argmax()])!r} still clashes after '-<file>' was added; rename it")
    return every


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists; choose another name, or replace it with --overwrite")
    if not (out / about.FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not a distdiff store, so --overwrite leaves it alone; remove it")


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A hidden sibling folder to build in, removed whatever happens; leftovers of killed builds go first."""
    prefix = f".{out.name}.tmp-{socket.gethostname()}-"
    for old in out.parent.glob(f"{prefix}*"):
        pid = old.name.removeprefix(prefix)
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    root = out.parent / f"{prefix}{os.getpid()}"
    shutil.rmtree(root, ignore_errors=True)
    try:
        yield root
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"the disk of {out.parent} is full; nothing of {out.name} was kept: free space and rerun"
            ) from e
        raise
    finally:
        forget()
        shutil.rmtree(root, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _publish(root: Path, out: Path) -> None:
    """Give the whole store its name; an old one of that name goes only then."""
    old = root.with_name(root.name + ".old")
    if os.path.lexists(out):
        os.replace(out, old)
    try:
        os.replace(root, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _runner(workers: int | None, scheduler: str | None, progress: bool, n_cells: int) -> Iterator[Map]:
    """What runs a pass: this process, worker processes here, or a cluster elsewhere."""
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers}: 0 is this process, 1 or more are worker processes")
    if scheduler is None and (workers == 0 or (workers is None and n_cells <= SCAN_CELLS)):
        yield lambda fn, tasks, job, what: [fn(t, job) for t in _bar(tasks, what, progress)]
        return
    from dask.distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=30)
            client.wait_for_workers(1, timeout=60)
        except (OSError, TimeoutError) as e:
            raise OSError(f"no dask scheduler with workers answers at {scheduler} ({e}); start one first") from e
        with client:
            yield lambda fn, tasks, job, what: _run_dask(client, fn, tasks, job, what, progress)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with (
        LocalCluster(
            n_workers=workers or max(1, min(cores, -(-n_cells // SCAN_CELLS))),
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        if progress:
            print(f"{len(cluster.workers)} worker processes; dashboard: {client.dashboard_link}", flush=True)
        yield lambda fn, tasks, job, what: _run_dask(client, fn, tasks, job, what, progress)


def _run_dask(
    client: Any, fn: Callable[[T, Job], R], tasks: Sequence[T], job: Job, what: str, progress: bool
) -> list[R]:
    """Run one pass on a cluster, a few tasks ahead of the workers, results in order of the tasks."""
    from dask.distributed import KilledWorker, as_completed

    shared = client.submit(_itself, job, pure=False)  # a task, so dask makes it again if its worker dies
    results: dict[int, R] = {}
    number: dict[str, int] = {}
    todo = iter(enumerate(tasks))
    done = as_completed()

    def feed(n: int) -> None:
        for i, task in itertools.islice(todo, n):
            future = client.submit(fn, task, shared, pure=False)
            number[future.key] = i
            done.add(future)

    feed(2 * max(1, sum(client.nthreads().values())))
    with _bar(tasks, what, progress) as bar:
        for future in done:
            try:
                results[number.pop(future.key)] = future.result()
            except KilledWorker as e:
                raise RuntimeError(
                    f"{what}: workers died again and again, most likely of memory; use fewer --workers"
                ) from e
            bar.update()
            feed(1)
    return [results[i] for i in range(len(tasks))]


def _itself(job: Job) -> Job:
    return job


def _bar(tasks: Sequence[T], what: str, progress: bool) -> Any:
    return tqdm(tasks, desc=what, unit="task", disable=not progress, ascii=True)
