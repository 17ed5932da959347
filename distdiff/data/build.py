"""The steps of a build: open the sources, scan, split, choose genes, write shards, describe.

`Build` says what to do and in which order; who runs the tasks is a function that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from distdiff.component import nearest
from distdiff.data import manifest as about
from distdiff.data import split as splits
from distdiff.data.layout import Layout, create, encode_names, write_column
from distdiff.data.manifest import Manifest, ShardInfo, SourceInfo, SplitInfo
from distdiff.data.scan import Job, Moments, ShardTask, Span, Written, moments, scan, write
from distdiff.data.source import Source, codes

T = TypeVar("T")
R = TypeVar("R")

SCAN_CELLS = 1 << 16
"""Cells a scanning task reads at most."""


class Run(Protocol):
    """Runs a task function on every task of a pass; results come in the order of the tasks."""

    def __call__(self, fn: Callable[[T, Job], R], tasks: Sequence[T], job: Job, what: str) -> list[R]: ...


@dataclass(frozen=True)
class Wanted:
    """What a build is asked for; see `distdiff.data.shard.shard`."""

    layer: str | None
    genes: str | Sequence[str]
    labels: tuple[str, ...]
    split: tuple[float, float, float]
    split_by: str | None
    seed: int
    block: int
    blocks_per_shard: int | None
    say: Callable[[str], None]


class Build:
    """The sources of one build and the steps from them to a store."""

    def __init__(self, paths: Sequence[str | Path], wanted: Wanted) -> None:
        if not paths:
            raise ValueError("no input files; give at least one h5ad file or AnnData zarr folder")
        if len(set(wanted.labels)) < len(wanted.labels):
            raise ValueError(f"labels {list(wanted.labels)}: one is named twice")
        self.wanted, self.say = wanted, wanted.say
        self.sources = [Source.open(p, wanted.layer) for p in paths]
        self.paths = tuple(str(Path(p).absolute()) for p in paths)
        self.n_cells = sum(s.n_cells for s in self.sources)
        self.shared = _shared_genes(self.sources)
        self.not_shared = len(set().union(*(s.genes for s in self.sources))) - len(self.shared)
        self.chosen_by, self.top, self.named = _parse_genes(wanted.genes, self.shared)
        self.names = _unique_names([s.obs_names for s in self.sources])
        keys = dict.fromkeys([*wanted.labels, *([wanted.split_by] if wanted.split_by else [])])
        self.obs = {k: np.concatenate([s.obs(k) for s in self.sources]) for k in keys}
        self.file = np.repeat(np.arange(len(self.sources), dtype=np.int32), [s.n_cells for s in self.sources])
        self.row = np.concatenate([np.arange(s.n_cells, dtype=np.int64) for s in self.sources])
        for note in filter(None, (s.note for s in self.sources)):
            self.say(note)
        if self.not_shared:
            self.say(f"{self.not_shared} genes left out: some file lacks them; {len(self.shared)} are shared")

    def run(self, root: Path, run: Run) -> Manifest:
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
        layout = Layout.fit(nnz[kept], len(genes), largest, self.wanted.block, self.wanted.blocks_per_shard)
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
        return Job(self.paths, self.wanted.layer, columns, len(genes))

    def spans(self) -> list[Span]:
        """All rows of all sources, cut for scanning."""
        return [
            Span(f, start, min(start + SCAN_CELLS, s.n_cells))
            for f, s in enumerate(self.sources)
            for start in range(0, s.n_cells, SCAN_CELLS)
        ]

    def scan(self, run: Run, genes: Sequence[str], what: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Stored counts per cell ``[n_cells]`` and per gene ``[g]``, and the largest count."""
        found = run(scan, self.spans(), self.job(genes), what)
        if not found:
            return np.zeros(0, np.int32), np.zeros(len(genes), np.int64), 0
        nnz = np.concatenate([s.nnz for s in found])
        return nnz, reduce(add, [s.gene_nnz for s in found]), max(s.largest for s in found)

    def split_codes(self, counted: np.ndarray) -> np.ndarray:
        """Split code of every cell ``uint8 [n_cells]``; those not in ``counted`` get no share of the cells."""
        code = np.full(self.n_cells, len(about.SPLITS), np.uint8)
        if self.wanted.split_by is None:
            code[counted] = splits.by_cell(len(counted), self.wanted.split, self.wanted.seed)
        else:
            code[counted] = splits.by_group(
                self.obs[self.wanted.split_by][counted], self.wanted.split, self.wanted.seed, self.wanted.split_by
            )
        return code

    def most_variable(self, run: Run, genes: Sequence[str], gene_nnz: np.ndarray, code: np.ndarray) -> tuple[str, ...]:
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
        return codes(self.obs[key][kept], values).astype(np.int32)

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
        values = {k: tuple(sorted({v for v in self.obs[k][kept] if v is not None})) for k in self.wanted.labels}
        columns = [*(self.codes(values[k], k, kept) for k in sorted(self.wanted.labels)), code]
        shards = []
        for number, w in enumerate(written):
            start, stop = layout.rows(number)
            sha = about.combine(w.sha256, [c[start:stop] for c in columns])
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
            split=SplitInfo(self.wanted.split, self.wanted.split_by, self.wanted.seed, (train, val, test)),
            sources=sources,
            shards=tuple(shards),
            chosen_by=self.chosen_by,
            layer=self.wanted.layer,
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
