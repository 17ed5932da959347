"""The steps of a build: open the sources, scatter their cells, choose genes, write shards, describe.

`Build` says what to do and in which order; who runs the tasks is a function that it is given.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from scipy import sparse

from distdiff import files
from distdiff.data.ingest import foreign
from distdiff.data.ingest import split as splits
from distdiff.data.ingest import turn as turning
from distdiff.data.ingest.choose import Choice, Of
from distdiff.data.ingest.scan import BuildSettings, Scanned, ShardTask, Span, Written, measure, scatter, summed, write
from distdiff.data.ingest.source import Source, codes
from distdiff.data.store import manifest as about
from distdiff.data.store.coding import narrowest
from distdiff.data.store.layout import Layout, create, encode_names, write_column
from distdiff.data.store.manifest import Manifest, OrderInfo, ShardInfo, SourceInfo, SplitInfo
from distdiff.data.store.moments import Moments
from distdiff.rng import numpy_generator
from distdiff.version import __version__

T = TypeVar("T")
R = TypeVar("R")

SPAN_BYTES = 48 << 20
"""Memory that the cells of one scattering task take at least, if there are so many; three times this while it runs."""

SPANS = 512
"""Scattering tasks aimed at: a shard takes a slice from each."""

SLAB_BYTES = 512 << 20
"""Memory that turning a part of a matrix stored gene by gene takes."""

SPILLED = 3
"""Version of what a spill holds and of how genes are chosen: a build that another version began is not continued."""

GROUPS = ("panel", "rest")
"""Names of the column groups; a store without a panel has one, ``all``."""


class Run(Protocol):
    """Runs a task function on every task of a pass; results come in the order of the tasks."""

    def __call__(
        self, fn: Callable[[T, BuildSettings], R], tasks: Sequence[T], job: BuildSettings, what: str
    ) -> list[R]: ...


@dataclass(frozen=True)
class Wanted:
    """What a build is asked for; see `distdiff.data.ingest.shard.shard`."""

    layer: str | None
    genes: str | Sequence[str]
    panel: str | Sequence[str] | None
    join: str
    labels: tuple[str, ...]
    split: tuple[float, float, float]
    split_by: str | None
    strata: str | None
    shuffle: bool
    seed: int
    quality: Mapping[str, float]
    counts: bool
    rounding: str | None
    codec: str
    block: int
    blocks_per_shard: int | None


class Build:
    """The sources of one build and the steps from them to a store."""

    def __init__(self, paths: Sequence[str | Path], wanted: Wanted, notify: Callable[[str], None]) -> None:
        if not paths:
            raise ValueError(f"no input files; give {foreign.KINDS}")
        if len(set(wanted.labels)) < len(wanted.labels):
            raise ValueError(f"labels {list(wanted.labels)}: one is named twice")
        if wanted.join not in ("inner", "outer"):
            raise ValueError(f"join {wanted.join!r}: 'inner' (genes in every file) or 'outer' (in any) is wanted")
        self.wanted, self.notify = wanted, notify
        self.paths = tuple(str(files.absolute(p)) for p in paths)
        self.sources = [Source.open(p, wanted.layer) for p in paths]
        self.stamps = tuple(files.stamp(p) for p in self.paths)
        self.n_cells = sum(s.n_cells for s in self.sources)
        self.n_bytes = sum(s.n_cells * s.bytes_per_cell for s in self.sources)
        if not self.n_cells:
            raise ValueError(f"{', '.join(s.where for s in self.sources)}: no cells at all; give a file that has some")
        self.known = _joined(self.sources, wanted.join)
        self.not_shared = len(set().union(*(s.genes for s in self.sources))) - len(self.known)
        self.genes = Choice.parse(wanted.genes, self.known, "genes")
        self.panel = None if wanted.panel is None else Choice.parse(wanted.panel, self.known, "panel")
        for choice in (self.genes, self.panel):
            if choice is not None and choice.measure == "hvg" and not wanted.counts:
                raise ValueError(
                    f"genes {choice.how!r}: the law of counts that it rests on does not hold for measurements; "
                    "take cv:N, fano:N or seurat_v3:N"
                )
        self.names = _unique_names([s.obs_names for s in self.sources])
        self.alike = _alike(self.sources)
        extra = [k for k in (wanted.split_by, wanted.strata) if k]
        self.obs = {
            k: np.concatenate([s.obs(k) for s in self.sources]) for k in dict.fromkeys([*wanted.labels, *extra])
        }
        self.file = np.repeat(np.arange(len(self.sources), dtype=np.int32), [s.n_cells for s in self.sources])
        self.row = np.concatenate([np.arange(s.n_cells, dtype=np.int64) for s in self.sources])

    def identity(self) -> str:
        """What must be equal for a build to be continued: this version, the sources as they are, what is wanted."""
        content = [__version__, about.FORMAT, SPILLED, self.paths, self.stamps, dataclasses.asdict(self.wanted),
                   self.genes.names, self.panel and self.panel.names]  # fmt: skip
        return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()

    def tell(self) -> None:
        """Say what will surprise."""
        for note in filter(None, (note for s in self.sources for note in (s.note, s.renamed))):
            self.notify(note)
        if self.not_shared:
            self.notify(f"{self.not_shared} genes left out: some file lacks them; {len(self.known)} are shared")
        for a, b, shared in self.alike:
            of = min(self.sources[a].n_cells, self.sources[b].n_cells)
            self.notify(
                f"warning: {self.sources[a].where} and {self.sources[b].where} share {shared} cell names of {of}; if "
                "these are the same cells they count twice, and one in training may be among the test cells"
            )
        for s in self.sources:
            if lacks := len(self.known) - len(set(self.known).intersection(s.genes)):
                self.notify(f"{s.where} lacks {lacks} of the {len(self.known)} genes: its cells get zeros there")

    def run(self, work: Path, run: Run, memory: int) -> Manifest:
        """Scatter, choose, write into ``work/store``; the manifest comes last.

        Parameters
        ----------
        work
            Folder of the build; what an earlier run of the same build finished there is not done again.
        run
            Runs a pass.
        memory
            Bytes that a worker has.
        """
        for folder in ("spill", "done", "turned"):
            (work / folder).mkdir(exist_ok=True)
        memory = _as_before(work / "memory", memory)
        job = self.job(work, self.turn(work, run, memory))
        code = self.split_codes()
        order = self.order(code)
        rank = np.empty(self.n_cells, np.int64)
        rank[order] = np.arange(self.n_cells)
        spans = self.spans(rank, code == 0, memory)
        found = run(scatter, spans, job, "scatter")
        if all((f.nnz < 0).all() for f in found):
            raise ValueError(
                f"{', '.join(s.where for s in self.sources)}: no cell passes {dict(self.wanted.quality)}; each is over "
                "all genes of its file"
            )
        if not any(f.gene_nnz.any() for f in found):
            raise ValueError(f"{', '.join(s.where for s in self.sources)}: no counts at all in the {job.n_genes} genes")
        job = self.with_genes(job, found, run)
        measured = run(measure, range(len(spans)), job, "measure")
        entries = np.zeros((len(job_groups(job)), self.n_cells), np.int32)
        for m in measured:
            entries[:, m.rank] = m.entries
        kept = np.flatnonzero(entries.sum(0))  # by rank
        cells = order[kept]  # by place in the sources
        if not (code[cells] == 0).any():
            raise ValueError("no training cell has a count of the chosen genes; choose more genes or another split")
        failed = np.concatenate([f.nnz for f in found]) == -1
        self.notify(
            f"{len(kept)} cells kept, {self.n_cells - len(kept) - int(failed.sum())} without counts dropped"
            + (f", {int(failed.sum())} under a threshold dropped" if self.wanted.quality else "")
        )
        names, sizes = zip(*job_groups(job), strict=True)
        layout = Layout.fit(
            list(entries[:, kept]), names, sizes, block=self.wanted.block,
            blocks_per_shard=self.wanted.blocks_per_shard,
            dtype=job.dtype, codec=self.wanted.codec,
        )  # fmt: skip
        job = replace(job, layout=layout)
        self.check_room(work, found, layout)
        create(job.store, layout)
        written = run(write, shard_tasks(layout, kept, len(spans)), job, "write")
        made = self.describe(job, found, cells, code[cells], written)
        made = replace(made, columns=self.write_columns(job, made, cells, code[cells], found))
        (job.store / about.FILE).write_text(made.to_json(), encoding="utf-8")
        return made

    def turn(self, work: Path, run: Run, memory: int) -> tuple[str | None, ...]:
        """Bring matrices that are stored gene by gene into row order; the folder of each, None where no need is."""
        turned: list[str | None] = []
        for number, source in enumerate(self.sources):
            folder = work / "turned" / str(number)
            turned.append(str(folder) if source.by_gene else None)
            if source.by_gene:
                folder.mkdir(exist_ok=True)
                tasks = turning.slabs(self.paths[number], self.wanted.layer, min(memory // 4, SLAB_BYTES))
                run(partial(_turn, folder=str(folder)), tasks, self.job(work, (None,) * len(self.sources)), "turn")
        return tuple(turned)

    def job(self, work: Path, turned: tuple[str | None, ...]) -> BuildSettings:
        """What the tasks share: spills hold the genes that can be chosen."""
        known = self.genes.names or self.known
        at = {g: i for i, g in enumerate(known)}
        columns = tuple(np.array([at.get(g, -1) for g in s.genes], dtype=np.int32) for s in self.sources)
        mito = tuple(np.char.startswith(np.char.upper(np.array(s.genes, dtype=str)), "MT-") for s in self.sources)
        for source, here in zip(self.sources, mito, strict=True):
            if "max_mito" in self.wanted.quality and not here.any():
                raise ValueError(
                    f"max_mito: {source.where}: no gene's name starts with MT-; mitochondrial genes cannot be told, "
                    "leave it out"
                )
        return BuildSettings(
            str(work), self.paths, self.wanted.layer, self.stamps, turned, columns, len(known), self.wanted.quality,
            mito, self.wanted.counts, self.wanted.seed if self.wanted.rounding else None,
        )  # fmt: skip

    def spans(self, rank: np.ndarray, train: np.ndarray, memory: int) -> list[Span]:
        """All rows of all sources, cut into scattering tasks."""
        budget = max(min(SPAN_BYTES, memory // 6), min(int(self.n_bytes / SPANS), memory // 6))
        spans: list[Span] = []
        first = 0
        for f, s in enumerate(self.sources):
            step = max(1, int(budget / max(s.bytes_per_cell, 1)))
            for start in range(0, s.n_cells, step):
                stop = min(start + step, s.n_cells)
                at = slice(first + start, first + stop)
                spans.append(Span(len(spans), f, start, stop, rank[at], train[at]))
            first += s.n_cells
        return spans

    def split_codes(self) -> np.ndarray:
        """Split code of every cell ``uint8 [n_cells]``."""
        w = self.wanted
        if w.split_by is None:
            return splits.by_cell(self.n_cells, w.split, w.seed)
        return splits.by_group(self.obs[w.split_by], w.split, w.seed, w.split_by)

    def order(self, code: np.ndarray) -> np.ndarray:
        """Cells in store order ``int64 [n_cells]``: by split, within it by stratum, within that at random."""
        if not self.wanted.shuffle:
            return np.arange(self.n_cells)
        lot = numpy_generator(self.wanted.seed, "order").permutation(self.n_cells)
        strata = () if self.wanted.strata is None else (codes(self.obs[self.wanted.strata]),)
        return np.lexsort((lot, *strata, code))

    def with_genes(self, job: BuildSettings, found: Sequence[Scanned], run: Run) -> BuildSettings:
        """The job once genes are chosen: where each gene of the spills goes, and how wide values are."""
        known = self.genes.names or self.known
        gene_nnz = reduce(add, [f.gene_nnz for f in found])
        moments = reduce(add, [f.moments for f in found])

        def again(of: Of) -> Any:
            return reduce(add, run(partial(summed, of=of), range(len(found)), job, "variance"))

        enough = gene_nnz >= max(1, self.wanted.quality.get("min_cells", 1))
        genes = self.genes.pick(known, enough, moments, again)
        among = np.zeros(len(known), bool)
        among[genes] = True
        if self.panel and (lost := [g for g in self.panel.names or () if g not in {known[i] for i in genes}]):
            raise ValueError(
                f"panel: gene {lost[0]!r} is not among the genes of the store (never counted, or not chosen)"
            )
        panel = genes if self.panel is None else self.panel.pick(known, among, moments, again)
        if len(panel) == len(genes):
            panel = genes
        column, group = np.full(len(known), -1, np.int32), np.zeros(len(known), np.int8)
        rest = np.setdiff1d(genes, panel)
        for number, columns in enumerate((panel, rest)):
            column[columns], group[columns] = np.arange(len(columns)), number
        self.notify(f"{len(genes)} genes kept" + (f", {len(panel)} of them in the panel" if len(rest) else ""))
        if never := int((gene_nnz == 0).sum()) if self.genes.names is None else 0:
            self.notify(f"{never} genes dropped: never counted")
        sums = [sum(f.needed[i] for f in found) for i in range(2)]
        largest = max(f.largest for f in found)
        width = "float32"
        if self.wanted.counts:
            width = narrowest(int(gene_nnz.sum()), dict(zip(("uint8", "uint16"), sums, strict=True)), largest)
        return replace(job, column=column, group=group, dtype=width)

    def check_room(self, work: Path, found: Sequence[Scanned], layout: Layout) -> None:
        """Refuse to write what the disk cannot hold."""
        nnz = sum(int(f.gene_nnz.sum()) for f in found)
        least = int(
            0.3 * nnz * (1 + np.dtype(layout.dtype).itemsize)
        )  # smaller than any count matrix was compressed to
        if (free := shutil.disk_usage(work).free) < least:
            raise OSError(
                28, f"the disk is full: {work.parent} has {free >> 20} MiB, the store needs {least >> 20} or more"
            )

    def describe(
        self,
        job: BuildSettings,
        found: Sequence[Scanned],
        cells: np.ndarray,
        code: np.ndarray,
        written: Sequence[Written],
    ) -> Manifest:
        """The manifest of what was written; ``cells`` are the kept cells' places in the sources."""
        w, layout = self.wanted, job.layout
        if layout is None:
            raise ValueError("describe needs a job with a layout")
        known = np.array(self.genes.names or self.known, dtype=object)
        genes = tuple(known[columns_of(job)].tolist())
        values = {k: tuple(sorted({v for v in self.obs[k][cells] if v is not None})) for k in w.labels}
        columns = [*(self.codes(values[k], k, cells) for k in sorted(w.labels)), code]
        shards = []
        for number, one in enumerate(written):
            start, stop = layout.rows(number)
            sha = about.combine(one.sha256, [c[start:stop] for c in columns])
            shards.append(ShardInfo(number, start, stop, int(one.nnz), sha))
        n_kept = np.bincount(self.file[cells], minlength=len(self.sources))
        n_failed = np.bincount(self.file[np.concatenate([f.nnz for f in found]) == -1], minlength=len(self.sources))
        sources = tuple(
            SourceInfo(Path(p).name, s.n_cells, int(n), s.n_cells - int(n) - int(bad), int(bad),
                       tuple(sorted(set(genes) - set(s.genes))))
            for p, s, n, bad in zip(self.paths, self.sources, n_kept, n_failed, strict=True)
        )  # fmt: skip
        train, val, test = (int(n) for n in np.bincount(code, minlength=3))
        gene_nnz = reduce(add, [f.gene_nnz for f in found])
        return Manifest(
            format=about.FORMAT, n_cells=layout.n_cells, genes=genes, labels=values, block=layout.block,
            blocks_per_shard=layout.blocks_per_shard, groups=layout.groups, dtype=layout.dtype, codec=layout.codec,
            largest=float(max(f.largest for f in found)),
            order=OrderInfo(w.shuffle, w.seed, w.strata),
            split=SplitInfo(w.split, w.split_by, w.seed, (train, val, test)),
            sources=sources, shards=tuple(shards), chosen_by=self.genes.how,
            panel_by=self.panel.how if self.panel else None,
            join=w.join, quality=dict(w.quality), layer=w.layer,
            never_counted=() if self.genes.names else tuple(known[gene_nnz == 0].tolist()), not_shared=self.not_shared,
            rounding=w.rounding and f"{w.rounding}, seed {w.seed}",
            fingerprint=about.fingerprint(genes, values, shards),
        )  # fmt: skip

    def codes(self, values: Sequence[str], key: str, cells: np.ndarray) -> np.ndarray:
        """Label codes ``int32 [len(cells)]`` of one obs column, -1 where missing."""
        return codes(self.obs[key][cells], values).astype(np.int32)

    def write_columns(
        self, job: BuildSettings, made: Manifest, cells: np.ndarray, code: np.ndarray, found: Sequence[Scanned]
    ) -> dict[str, str]:
        """Everything a cell or a gene has one of; the hash of each."""
        every, genes = reduce(add, [f.moments for f in found]), columns_of(job)
        of = (every.total, every.squares, every.nnz, every.largest)  # a cell that was dropped has none of these genes
        sums = Moments(int((code == 0).sum()), *(sums[genes] for sums in of))
        columns: dict[str, np.ndarray] = {
            **{f"labels/{key}": self.codes(values, key, cells) for key, values in made.labels.items()},
            "split": code,
            "source/file": self.file[cells],
            "source/row": self.row[cells],
            "names": encode_names(self.names[cells]),
            "cells/total": np.concatenate([f.total for f in found])[cells],
            "cells/nnz": np.concatenate([f.nnz for f in found])[cells],
            "genes/mean": sums.mean,
            "genes/var": sums.var,
            "genes/nnz": sums.nnz,
            "genes/max": sums.largest,
            "genes/source": genes,
        }
        for name, value in columns.items():
            write_column(job.store, name, value)
        return {name: about.hash_of(value) for name, value in columns.items()}


def job_groups(job: BuildSettings) -> list[tuple[str, int]]:
    """Name and number of genes of each column group."""
    sizes = [int(((job.group == g) & (job.column >= 0)).sum()) for g in range(2)]
    return list(zip(GROUPS, sizes, strict=True)) if sizes[1] else [("all", sizes[0])]


def columns_of(job: BuildSettings) -> np.ndarray:
    """Genes of the spills in store order, ``int64 [n_genes]``: group after group."""
    kept = np.flatnonzero(job.column >= 0)
    return kept[np.lexsort((job.column[kept], job.group[kept]))]


def shard_tasks(layout: Layout, rank: np.ndarray, spills: int) -> list[ShardTask]:
    """One task a shard."""
    rows = [layout.rows(number) for number in range(layout.n_shards)]
    return [ShardTask(n, rank[a:b], spills) for n, (a, b) in enumerate(rows)]


def _as_before(file: Path, memory: int) -> int:
    """The memory that the first run of a build had: tasks are cut by it, and must be cut alike when it goes on."""
    if not file.is_file():
        partial_file = file.with_suffix(".part")
        partial_file.write_text(str(memory))
        partial_file.replace(file)
    if not (text := file.read_text(errors="replace")).isdigit():
        raise ValueError(f"{file} is damaged; what the earlier build left is removed now: run the same command again")
    return int(text)


def _turn(slab: turning.Slab, job: Any, folder: str) -> int:
    return turning.turn(slab, folder)


def _joined(sources: Sequence[Source], join: str) -> tuple[str, ...]:
    """Genes of all sources, or those that all have, in the order of the first (then of the others)."""
    if join == "outer":
        return tuple(dict.fromkeys(g for s in sources for g in s.genes))
    if empty := [s.where for s in sources if not s.genes]:
        raise ValueError(f"{empty[0]}: no genes at all; give a file that has some")
    common = set(sources[0].genes).intersection(*(s.genes for s in sources[1:]))
    if not common:
        raise ValueError(
            f"{', '.join(s.where for s in sources)}: no gene is in all {len(sources)} files; "
            "are some named by symbol and some by Ensembl id?"
        )
    return tuple(g for g in sources[0].genes if g in common)


def _alike(sources: Sequence[Source]) -> list[tuple[int, int, int]]:
    """Pairs of sources that share half of the smaller one's cell names, and how many: lanes of one kit share few."""
    n = [s.n_cells for s in sources]
    _, which = np.unique(np.concatenate([s.obs_names for s in sources]), return_inverse=True)
    file = np.repeat(np.arange(len(n)), n)
    has = sparse.csr_matrix((np.ones(len(which), np.int64), (file, which)))
    shared = sparse.triu(has @ has.T, k=1)
    pairs = zip(shared.row.tolist(), shared.col.tolist(), shared.data.tolist(), strict=True)
    return [(a, b, m) for a, b, m in sorted(pairs) if 2 * m >= min(n[a], n[b])]


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
