"""Read cells of a store in any order: coded blocks come into memory, compiled loops cut cells out of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from scipy import sparse

from distdiff import received
from distdiff.component import nearest
from distdiff.data.counts import LAST_EXACT, dense
from distdiff.data.store import coding, recycle, remote
from distdiff.data.store.audit import audit
from distdiff.data.store.coding import Coded, Slots
from distdiff.data.store.manifest import FILE, SPLITS, GroupInfo, Manifest
from distdiff.data.store.pool import Lease, Pool, cores
from distdiff.data.store.readers import Reader, reader_class
from distdiff.files import absolute, is_url
from distdiff.types import Cells, Condition, DataSpec

GROUP = 64
"""Blocks asked for at once."""

UPLOADING = "upload.json"
"""What lies at a URL until the whole store is there."""


@dataclass(frozen=True)
class Columns:
    """One column group as a store is looked at: where its genes go.

    Attributes
    ----------
    pool
        Its blocks in memory.
    column
        ``int32 [genes of the group]``, column of the view, -1 where the view does not have the gene.
    """

    pool: Pool
    column: np.ndarray


class CountStore:
    """A store that `distdiff.data.ingest.shard.shard` built, open for reading. Safe to use from several threads.

    Attributes
    ----------
    url, manifest
        Where it is and what it says about itself.

    Examples
    --------
    >>> from distdiff.data.store.store import CountStore
    >>> store = CountStore.open("atlas.zarr")
    >>> store.read(store.rows("test")[::-1]).shape  # CSR, rows in any order
    (20, 30)
    >>> store.panel(["gene4", "gene2"]).cells(store.rows("val")[:2]).counts.shape  # dense, two genes
    torch.Size([2, 2])
    """

    def __init__(self, url: str, manifest: Manifest, cache_bytes: int, reader: str, threads: int) -> None:
        self.url, self.manifest = url, manifest
        self._options: dict[str, Any] = {"cache_bytes": cache_bytes, "reader": reader, "threads": threads}
        self._small: dict[str, np.ndarray] = {}
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="distdiff-decode")
        room = cache_bytes // sum(self._slot_bytes(g.cap) for g in manifest.groups)
        self._pools = []
        for info in manifest.groups:
            opened = self._opened(reader_class(reader, url), info)
            slots = Slots.empty(min(room, manifest.n_blocks), info.cap, manifest.block, manifest.dtype)
            self._pools.append(Pool(slots, functools.partial(self._fetch, opened, slots, info.n_genes), self._threads))
        self._panel: np.ndarray | None = None
        self._wide = {"uint32": np.int64, "float32": np.float32}.get(manifest.dtype, np.int32)
        self.columns = self._columns()

    @classmethod
    def open(
        cls, path: str | Path, *, cache_bytes: int = 512 << 20, reader: str = "auto", threads: int | None = None
    ) -> CountStore:
        """Open a store.

        Parameters
        ----------
        path
            Folder of the store, or its URL (``s3://``, ``gs://``, ``http://``).
        cache_bytes
            Memory for coded blocks; two windows (of 64 blocks or so) should fit.
        reader
            ``direct``, ``tensorstore``, ``zarr``; ``auto`` is the first for a local folder, else the second.
        threads
            Threads that read and decompress; None is one a core, at most 4.

        Raises
        ------
        FileNotFoundError
            No finished store there, or a file of a shard is gone.
        ValueError
            A manifest that cannot be used, a damaged array, or no such reader.
        """
        url = remote.checked(str(path)) if is_url(path) else str(absolute(path))
        threads = threads or max(1, min(4, cores()))
        if is_url(url):
            return cls(url, _remote_manifest(url), cache_bytes, reader, threads)
        about = Manifest.read(Path(url))
        for shard, info, part in itertools.product(about.shards, about.groups, Slots._fields):
            file = Path(url) / "counts" / info.name / part / "c" / str(shard.index) / "0"
            if not file.is_file():
                raise FileNotFoundError(
                    f"{url}: shard {shard.index} (rows {shard.start} to {shard.stop}) is missing ({file}); "
                    "restore it or rebuild the store: distdiff shard --overwrite"
                )
        return cls(url, about, cache_bytes, reader, threads)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.url, self._options, None if self._panel is None else self.genes)

    def __repr__(self) -> str:
        return f"CountStore({self.url!r}, {self.n_cells} cells x {len(self.genes)} genes)"

    @property
    def path(self) -> PurePosixPath | Path:
        """Its folder; of a remote store the path in its URL."""
        return PurePosixPath(self.url.split("://", 1)[1]) if is_url(self.url) else Path(self.url)

    @property
    def n_cells(self) -> int:
        return self.manifest.n_cells

    @property
    def genes(self) -> tuple[str, ...]:
        if self._panel is None:
            return self.manifest.genes
        return tuple(self.manifest.genes[i] for i in self._panel)

    def panel(self, genes: Sequence[str] | None = None) -> CountStore:
        """Look at this store through some of its genes, in another order if need be; nothing is copied.

        Column groups that hold none of them are not read.

        Parameters
        ----------
        genes
            Names; None is the panel that the store was built with (all genes where it has none).

        Raises
        ------
        ValueError
            A gene that the store does not have, a gene named twice, no gene.
        """
        if genes is None:
            genes = self.manifest.genes[: self.manifest.groups[0].n_genes]
        column = {gene: i for i, gene in enumerate(self.manifest.genes)}
        for gene in genes:
            if gene not in column:
                raise ValueError(f"{self.url} has no gene {gene!r}{nearest(gene, column)}")
        if not genes or len(set(genes)) < len(genes):
            raise ValueError(f"a panel of {len(genes)} genes, {len(set(genes))} of them different: name each gene once")
        seen = object.__new__(CountStore)  # everything is shared: the memory, the files, the threads
        seen.__dict__.update(self.__dict__)
        seen._panel = np.array([column[gene] for gene in genes], dtype=np.int64)
        seen.columns = seen._columns()
        return seen

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Counts of some cells.

        Parameters
        ----------
        rows
            ``int64 [n]``, store rows in any order, repeats allowed.

        Returns
        -------
        csr_matrix [n, g]
            Molecules, int32 (int64 where the store holds uint32, float32 where it holds measurements), in the order
            asked; gene indices ascending.

        Raises
        ------
        ValueError
            Rows out of range, or a corrupt shard (named).
        """
        rows = self._checked(rows)
        if not len(rows):
            return sparse.csr_matrix((0, len(self.genes)), dtype=self._wide)
        ascending = bool((rows[1:] >= rows[:-1]).all())
        order = None if ascending else np.argsort(rows, kind="stable")
        pieces = [self._csr(held, self._wide) for _, _, held in self._held(rows if order is None else rows[order])]
        counts = pieces[0] if len(pieces) == 1 else sparse.vstack(pieces, format="csr")
        counts.has_canonical_format = True
        return counts if order is None else counts[np.argsort(order)]

    def cells(self, rows: np.ndarray, labels: Sequence[str] | None = None) -> Cells:
        """A batch on the CPU: dense ``float32 [n, g]`` counts, label codes, and the rows themselves.

        Parameters
        ----------
        rows
            ``int64 [n]`` store rows.
        labels
            Covariates wanted; None is all.

        Raises
        ------
        ValueError
            As `read` and `labels`.
        """
        rows = self._checked(rows)
        codes = self.labels(rows, labels)
        return Cells(
            torch.from_numpy(self._dense(rows)),
            Condition({k: torch.from_numpy(v) for k, v in codes.items()}),
            torch.from_numpy(rows),
        )

    def labels(self, rows: np.ndarray, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Label codes ``int64 [n]`` per covariate (None is all), -1 where missing.

        Raises
        ------
        ValueError
            Rows out of range, or no such covariate (the nearest one is named).
        """
        rows = self._checked(rows)
        return {k: self._array_of(f"labels/{k}")[rows].astype(np.int64) for k in self.label_keys(keys)}

    def rows(self, split: str = "all") -> np.ndarray:
        """Rows of ``"train"``, ``"val"``, ``"test"`` or ``"all"``, ascending ``int64``.

        Raises
        ------
        ValueError
            No such split.
        """
        if split == "all":
            return np.arange(self.n_cells, dtype=np.int64)
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}{nearest(split, [*SPLITS, 'all'])}")
        return np.flatnonzero(self._array_of("split") == SPLITS.index(split)).astype(np.int64)

    def names(self, rows: np.ndarray) -> np.ndarray:
        """Cell names, ``str [n]``."""
        rows = self._checked(rows)
        raw = self._values("names", self._open_array("names")[rows])
        return np.char.decode(np.ascontiguousarray(raw).view(f"S{raw.shape[1]}")[:, 0], "utf-8")

    def origin(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input file ``int32 [n]`` (place in ``manifest.sources``) and row there ``int64 [n]`` of some cells."""
        rows = self._checked(rows)
        return self._array_of("source/file")[rows], self._array_of("source/row")[rows]

    def splits(self, rows: np.ndarray) -> np.ndarray:
        """Split code of some cells ``uint8 [n]``: place in ``manifest.SPLITS``."""
        return self._array_of("split")[self._checked(rows)]

    def quality(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Molecules ``float64 [n]`` and genes ``int64 [n]`` of some cells, before genes were chosen."""
        rows = self._checked(rows)
        return self._array_of("cells/total")[rows], self._array_of("cells/nnz")[rows].astype(np.int64)

    def source_columns(self) -> np.ndarray:
        """Columns of this view in the order that the genes had in the sources, ``int64 [g]``."""
        return np.argsort(self._of_genes("source"))

    def statistics(self) -> dict[str, np.ndarray]:
        """Per gene over training cells, each ``float64 [g]``: ``mean``, ``var`` (molecules^2), ``nnz``, ``max``."""
        return {name: self._of_genes(name) for name in ("mean", "var", "nnz", "max")}

    def spec(self, labels: Sequence[str] | None = None) -> DataSpec:
        """What a model must know: genes, the values of some covariates (None is all), mean and largest counts."""
        values = {k: tuple(self.manifest.labels[k]) for k in self.label_keys(labels)}
        mean, largest = (self._of_genes(name).astype(np.float32) for name in ("mean", "max"))
        return DataSpec(self.genes, values, mean, largest)

    def describe(self) -> str:
        """What the store holds, in a few lines."""
        about = self.manifest
        nnz = sum(s.nnz for s in about.shards)
        lines = [
            f"{self.url}: {self.n_cells:,} cells x {len(about.genes):,} genes ({about.chosen_by}, {about.join}), "
            f"{nnz:,} counts ({nnz / max(1, self.n_cells * len(about.genes)):.1%}), largest {about.largest:g}",
            "split: " + ", ".join(f"{n:,} {name}" for name, n in zip(SPLITS, about.split.n_cells, strict=True))
            + (f", whole by {about.split.by}" if about.split.by else "") + f", seed {about.split.seed}",
            "order: " + ("shuffled" if about.order.shuffled else "as in the sources")
            + (f" within {about.order.strata}" if about.order.strata else ""),
            *(f"label {k}: {len(v)} values ({', '.join(v[:6])}{', ...' if len(v) > 6 else ''})"
              for k, v in about.labels.items()),
            *(f"genes {g.name}: {g.n_genes:,}, up to {g.cap:,} entries a block of {about.block} cells"
              for g in about.groups),
            f"{len(about.shards)} shards of {about.blocks_per_shard} blocks, {about.dtype} values, codec {about.codec}",
            *(f"source {s.path}: {s.kept:,} of {s.n_cells:,} cells, {s.empty:,} empty, {s.failed:,} under a threshold"
              + (f", {len(s.absent):,} genes absent" if s.absent else "") for s in about.sources),
            *([f"decimals rounded: {about.rounding}"] if about.rounding else []),
            f"fingerprint {about.fingerprint}",
        ]  # fmt: skip
        if not is_url(self.url):
            size = sum(f.stat().st_size for f in Path(self.url).rglob("*") if f.is_file())
            lines.insert(-1, f"{size:,} bytes on disk, {size / max(1, nnz):.2f} a count")
        return "\n".join(lines)

    def verify(self, progress: bool = False) -> None:
        """Read every array once and compare it with what the manifest says; see `distdiff.data.store.audit.audit`.

        Raises
        ------
        ValueError
            A shard or an array differs from what was built (it is named).
        """
        audit(self if self._panel is None else CountStore.open(self.url, **self._options), progress)

    def lease(self, rows: np.ndarray) -> list[Lease] | None:
        """Start to read the blocks of some rows and hold them, one lease a column group; None if there is no room."""
        blocks = np.unique(rows // self.manifest.block)
        leases: list[Lease] = []
        for columns in self.columns:
            if (lease := columns.pool.lease(blocks)) is None:
                for other in leases:
                    other.release()
                return None
            leases.append(lease)
        return leases

    def dense_of(self, rows: np.ndarray, leases: Sequence[Lease]) -> np.ndarray:
        """Counts float32 ``[n, g]`` of rows whose blocks are held."""
        out = recycle.empty((len(rows), len(self.genes)), np.float32)
        for first, (columns, lease) in enumerate(zip(self.columns, leases, strict=True)):
            slot = lease.slots()[np.searchsorted(lease.blocks, rows // self.manifest.block)]
            local = rows % self.manifest.block
            coding.add_dense(columns.pool.memory, slot, local, columns.column, out, clear=first == 0)
        return out

    def csr_of(self, rows: np.ndarray, leases: Sequence[Lease], dtype: str | np.dtype) -> sparse.csr_matrix:
        """Counts of rows whose blocks are held as CSR ``[n, g]``."""
        held = [
            (c.pool.memory, lease.slots()[np.searchsorted(lease.blocks, rows // self.manifest.block)],
             rows % self.manifest.block)
            for c, lease in zip(self.columns, leases, strict=True)
        ]  # fmt: skip
        return self._csr(held, dtype)

    def coded_of(self, rows: np.ndarray, leases: Sequence[Lease]) -> list[Coded]:
        """The same cells coded, for each column group of the view (its genes, not those of the view)."""
        return [
            coding.cut(
                columns.pool.memory, lease.slots()[np.searchsorted(lease.blocks, rows // self.manifest.block)],
                rows % self.manifest.block,
            )
            for columns, lease in zip(self.columns, leases, strict=True)
        ]  # fmt: skip

    def coded(self, rows: np.ndarray) -> list[Coded]:
        """Ascending rows coded, for each column group of the view."""
        pieces = [[coding.cut(*at) for at in held] for _, _, held in self._held(rows)]
        made = []
        for group in range(len(self.columns)):
            of = [piece[group] for piece in pieces]
            starts = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(c.starts) for c in of]))])
            made.append(Coded(np.concatenate([c.gaps for c in of]), np.concatenate([c.values for c in of]), starts))
        return made

    @property
    def narrowed(self) -> bool:
        """Whether this is a view of some genes."""
        return self._panel is not None

    @property
    def whole_groups(self) -> bool:
        """Whether this view has all genes of every column group that it reads."""
        return all(bool((c.column >= 0).all()) for c in self.columns)

    @property
    def cache_for_all(self) -> int:
        """``cache_bytes`` with which this view stays in memory whole."""
        return self.manifest.n_blocks * sum(self._slot_bytes(g.cap) for g in self.manifest.groups)

    @property
    def slots(self) -> int:
        """Blocks that this view has memory for."""
        return min(c.pool.size for c in self.columns)

    @property
    def coded_bytes(self) -> int:
        """Memory that all blocks of this view take, coded."""
        return self.manifest.n_blocks * sum(c.pool.memory.gaps.shape[1] for c in self.columns) * self._entry_bytes

    @property
    def exact(self) -> bool:
        """Whether float32 tells every count of the store apart."""
        return self.manifest.largest < LAST_EXACT

    def _dense(self, rows: np.ndarray) -> np.ndarray:
        if not self.exact:
            return dense(self.read(rows))
        out = recycle.empty((len(rows), len(self.genes)), np.float32)
        order = np.argsort(rows, kind="stable")
        for a, b, held in self._held(rows[order]):
            neighbours = bool((np.diff(order[a:b]) == 1).all())
            part = out[order[a] : order[a] + b - a] if neighbours else np.empty((b - a, len(self.genes)), np.float32)
            for first, (columns, at) in enumerate(zip(self.columns, held, strict=True)):
                coding.add_dense(*at, columns.column, part, clear=first == 0)
            if not neighbours:
                out[order[a:b]] = part
        return out

    def _csr(self, held: Sequence[tuple[Slots, np.ndarray, np.ndarray]], dtype: Any) -> sparse.csr_matrix:
        parts = [coding.csr(*at, c.column, len(self.genes), dtype) for c, at in zip(self.columns, held, strict=True)]
        return functools.reduce(lambda a, b: a + b, parts)

    def _held(self, rows: np.ndarray) -> Iterator[tuple[int, int, list[tuple[Slots, np.ndarray, np.ndarray]]]]:
        """Ascending rows in pieces: first and last, and for each column group the memory, slots and places in them."""
        blocks, first = np.unique(rows // self.manifest.block, return_index=True)
        step = min(GROUP, max(1, self.slots // 2))
        edges = [*first[::step].tolist(), len(rows)]
        groups = [blocks[i : i + step] for i in range(0, len(blocks), step)]
        ahead = [c.pool.lease(groups[0]) for c in self.columns]
        for i, (a, b) in enumerate(itertools.pairwise(edges)):
            leases = ahead
            ahead = [c.pool.lease(groups[i + 1]) for c in self.columns] if i + 1 < len(groups) else []
            local = rows[a:b] % self.manifest.block
            which = np.searchsorted(groups[i], rows[a:b] // self.manifest.block)
            try:
                held = []
                for columns, lease in zip(self.columns, leases, strict=True):
                    memory, slots = columns.pool.borrow(groups[i]) if lease is None else (
                        columns.pool.memory, lease.slots())  # fmt: skip
                    held.append((memory, slots[which], local))
                yield a, b, held
            except BaseException:
                _release(ahead)
                raise
            finally:
                _release(leases)

    def _fetch(self, reader: Reader, memory: Slots, n_genes: int, blocks: Sequence[int], slots: Sequence[int],
               into: Slots | None = None) -> None:  # fmt: skip
        """Read and check some blocks; a fault names the block."""
        memory = memory if into is None else into
        try:
            reader.read(blocks, memory, slots)
        except remote.Unreachable:
            raise
        except (ValueError, OSError, RuntimeError, IndexError) as error:
            shards = np.asarray(blocks) // self.manifest.blocks_per_shard  # first by shard: not all readers check a
            numbers = shards if shards.min() < shards.max() else np.asarray(blocks)  # block that they read alone
            for number in np.unique(numbers) if len(blocks) > 1 else ():
                part = np.flatnonzero(numbers == number)
                self._fetch(
                    reader, memory, n_genes, [blocks[int(i)] for i in part], [slots[int(i)] for i in part]
                )  # raises
            raise self.corrupt(blocks[0], str(error)) from error
        for block, slot in zip(blocks, slots, strict=True):
            n = min(self.manifest.block, self.n_cells - block * self.manifest.block)
            if why := coding.fault(memory, slot, n, n_genes):
                raise self.corrupt(block, why)

    def _columns(self) -> list[Columns]:
        """The column groups that this view needs."""
        groups = self.manifest.groups
        column = np.full(len(self.manifest.genes), -1, np.int32)
        seen = np.arange(len(column)) if self._panel is None else self._panel
        column[seen] = np.arange(len(seen), dtype=np.int32)
        parts = np.split(column, np.cumsum([g.n_genes for g in groups])[:-1])
        return [Columns(pool, part) for pool, part in zip(self._pools, parts, strict=True) if (part >= 0).any()]

    def _opened(self, kind: type[Reader], group: GroupInfo) -> Reader:
        n, dtype = self.manifest.n_blocks, self.manifest.dtype
        wanted = [((n, group.cap), "uint8"), ((n, group.cap), dtype), ((n, self.manifest.block + 1), "uint32")]
        try:
            opened = kind(self.url, group.name)
            if opened.shapes != wanted:
                raise ValueError(f"its arrays are {opened.shapes}, the manifest's are {wanted}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if "reader 'direct'" in str(error):
                raise
            raise ValueError(f"{self.url}: counts/{group.name} is damaged ({error}); {self._mend}") from error
        return opened

    @property
    def _entry_bytes(self) -> int:
        return 1 + np.dtype(self.manifest.dtype).itemsize

    def _slot_bytes(self, cap: int) -> int:
        return cap * self._entry_bytes + 4 * (self.manifest.block + 1)

    @property
    def _mend(self) -> str:
        """What helps a damaged store."""
        if is_url(self.url):
            return "upload it again: distdiff store upload --overwrite"
        return "rebuild the store: distdiff shard --overwrite"

    def corrupt(self, block: int, why: str) -> ValueError:
        """The error for a block that cannot be what was written."""
        shard = self.manifest.shards[block // self.manifest.blocks_per_shard]
        return ValueError(
            f"{self.url}: shard {shard.index} (rows {shard.start} to {shard.stop}) is corrupt in block {block} "
            f"({why}); {self._mend}"
        )

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise ValueError(f"rows: a vector of whole numbers is wanted, got {rows.dtype} of shape {rows.shape}")
        rows = rows.astype(np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.n_cells:
            wrong = rows[(rows < 0) | (rows >= self.n_cells)][0]
            raise ValueError(f"row {wrong} asked of {self.url}, it has rows 0 to {self.n_cells - 1}")
        return rows

    def label_keys(self, keys: Sequence[str] | None = None) -> list[str]:
        """Labels asked for (None is all), checked.

        Raises
        ------
        ValueError
            No such label (the nearest one is named).
        """
        known = self.manifest.labels
        for k in keys or ():
            if k not in known:
                raise ValueError(f"{self.url} has no label {k!r}{nearest(k, known)}")
        return list(known if keys is None else keys)

    def _open_array(self, name: str) -> Any:
        """Open one small array of the store."""
        try:
            if not is_url(self.url):
                received.check_regular(Path(self.url) / name)
            return remote.open_array(self.url, name)
        except (ValueError, OSError) as e:
            if isinstance(e, remote.Unreachable):
                raise
            raise self.damaged(name, str(e)) from e

    def column(self, name: str) -> np.ndarray:
        """One whole array of the store, read anew: ``names`` are ``uint8 [n, width]``."""
        return self._values(name, self._open_array(name))

    def damaged(self, name: str, why: str) -> ValueError:
        """The error for an array that cannot be what was written."""
        return ValueError(f"{self.url}: {name} is damaged ({why}); {self._mend}")

    def _array_of(self, name: str) -> np.ndarray:
        """A small array, read once and kept."""
        if name not in self._small:
            self._small[name] = self._values(name, self._open_array(name))
        return self._small[name]

    def _of_genes(self, name: str) -> np.ndarray:
        column = self._array_of(f"genes/{name}")
        return column.copy() if self._panel is None else column[self._panel]

    def _values(self, name: str, array: Any) -> np.ndarray:
        try:
            return remote.read_array(self.url, array)
        except (ValueError, OSError) as e:
            if isinstance(e, remote.Unreachable):
                raise
            raise ValueError(f"{self.url}: {name} cannot be read ({e}); {self._mend}") from e


def _release(leases: Sequence[Lease | None]) -> None:
    for lease in leases:
        if lease is not None:
            lease.release()


def _remote_manifest(url: str) -> Manifest:
    folder = remote.RemoteFolder(url)
    if (found := folder.read(FILE)) is None:
        raise FileNotFoundError(f"{url} {_absent(folder)}")
    return Manifest.from_json(found.decode(), f"{url}/{FILE}")


def _absent(folder: remote.RemoteFolder) -> str:
    """What a folder without a manifest is; a missing bucket raises its own error."""
    if not folder.url.startswith("http"):  # which has no lists
        if folder.read(UPLOADING) is not None:
            return "is a store that was not uploaded whole: run the same distdiff store upload again"
        folder.keys(FILE)
    return f"is not a distdiff store (no {FILE}); look for a mistake in its name, or upload it: distdiff store upload"


def _reopen(url: str, options: dict[str, Any], genes: tuple[str, ...] | None) -> CountStore:
    store = CountStore.open(url, **options)
    return store if genes is None else store.panel(genes)
