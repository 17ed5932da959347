"""What a store says about itself: genes, labels, splits, shards and one fingerprint of the content.

The manifest is the last file of a build, so a folder without one is not a store. The fingerprint depends on what is
stored (genes, labels, split, counts), not on how (codec, dtype, number of workers).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from distdiff import received
from distdiff.component import nearest

FORMAT = 2
"""Version of the layout that this code writes and reads."""

FILE = "manifest.json"
BLOCK = 256
"""Cells per block: the unit that is compressed, checked and read."""

SPLITS = ("train", "val", "test")
"""Split names in code order."""

OWN_HASH = "sha256"
"""Key of the manifest's hash of its other keys; as `Manifest` it is gone."""

DTYPES = ("uint8", "uint16", "uint32", "float32")
"""Stored values."""

CODECS = ("local", "compact")
"""Compression profiles: blosc-lz4 for a disk at hand, zstd for a small or far one."""


@dataclass(frozen=True)
class SourceInfo:
    """One input file of a store.

    Its base name, its cells, those kept, those without a count of the chosen genes, and those that fail the quality
    thresholds; ``absent`` are the genes of the store that the file lacks (zeros there say nothing).
    """

    path: str
    n_cells: int
    kept: int
    empty: int
    failed: int
    absent: tuple[str, ...]


@dataclass(frozen=True)
class GroupInfo:
    """One column group: name, genes, entries a block has room for."""

    name: str
    n_genes: int
    cap: int


@dataclass(frozen=True)
class OrderInfo:
    """How the rows lie: in source order, or by split, within it by ``strata`` (a label), within that shuffled."""

    shuffled: bool
    seed: int
    strata: str | None


@dataclass(frozen=True)
class ShardInfo:
    """One shard: store rows ``start <= row < stop``, stored counts, hash of its decoded content."""

    index: int
    start: int
    stop: int
    nnz: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """How the cells were split: shares asked for, column of whole groups (or None), seed, cells got."""

    shares: tuple[float, float, float]
    by: str | None
    seed: int
    n_cells: tuple[int, int, int]


@dataclass(frozen=True)
class Manifest:
    """Everything about a store but its arrays.

    Attributes
    ----------
    format
        Layout version.
    n_cells, genes
        Shape of the counts; genes in column order, group after group.
    labels
        Covariate -> its values in code order (sorted, over all files).
    block, blocks_per_shard, groups
        Cells a block, blocks a shard, column groups.
    dtype
        Stored dtype of the values; float32 for a store of measurements that are no counts.
    codec
        Compression profile.
    largest
        Largest count.
    order, split, sources, shards
        See the classes of those names.
    chosen_by, panel_by
        The ``genes`` and ``panel`` choice of the build: ``all``, ``hvg:N`` or a file's base name; None is no panel.
    join
        ``inner``: genes in every file; ``outer``: in any.
    quality
        Thresholds a cell or gene had to pass.
    layer
        The layer read, None for X.
    never_counted
        Genes of the files left out because no kept cell has a count of them.
    not_shared
        Number of genes left out because some file lacks them.
    fingerprint
        sha256 of the content, see `fingerprint`.
    rounding
        How counts with decimals were made whole (``random, seed 0``); None: there were none, or they are kept.
    columns
        Array of the store that has a value (or a row) a cell or gene -> `hash_of` it; None in stores of versions that
        did not write it down.
    """

    format: int
    n_cells: int
    genes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]
    block: int
    blocks_per_shard: int
    groups: tuple[GroupInfo, ...]
    dtype: str
    codec: str
    largest: float
    order: OrderInfo
    split: SplitInfo
    sources: tuple[SourceInfo, ...]
    shards: tuple[ShardInfo, ...]
    chosen_by: str
    panel_by: str | None
    join: str
    quality: Mapping[str, float]
    layer: str | None
    never_counted: tuple[str, ...]
    not_shared: int
    fingerprint: str
    rounding: str | None = None
    columns: Mapping[str, str] | None = None

    @property
    def n_blocks(self) -> int:
        return -(-self.n_cells // self.block)

    def to_json(self) -> str:
        """The manifest as JSON text, one key a line; the last is the hash of the others."""
        tree = dataclasses.asdict(self)
        for key in ("rounding", "columns"):
            if tree[key] is None:
                del tree[key]
        return json.dumps(tree | {OWN_HASH: _own_hash(tree)}, indent=1)

    def refuse_measurements(self, law: str, where: str) -> None:
        """Refuse a store of measurements for a law of whole counts.

        Raises
        ------
        ValueError
            It is one.
        """
        if self.dtype == "float32":
            raise ValueError(
                f"{where} holds measurements (it was built with counts=False), {law} is a law of whole counts, in "
                "which decimals would be cut off and negative numbers mean nothing: build the store of counts, of "
                "those with decimals with rounding='random'"
            )

    @classmethod
    def from_json(cls, text: str, where: str = FILE) -> Manifest:
        """Parse JSON text.

        Parameters
        ----------
        text
            What `to_json` returned.
        where
            File named in error messages.

        Raises
        ------
        ValueError
            Not JSON, a newer format, missing or unknown keys (named), another content than was written (by its own
            hash and the fingerprint; stores of versions that wrote no hash have the second), or one that no store has.
        """
        try:
            raw = received.parsed(text)
        except ValueError as e:
            raise ValueError(f"{where} is not JSON ({e}); rebuild the store: distdiff shard --overwrite") from e
        version = raw.get("format")
        if type(version) is not int:
            raise ValueError(f"{where} has no format version; it is not the manifest of a distdiff store")
        if version != FORMAT:
            what = (
                "upgrade distdiff, or rebuild the store with this version" if version > FORMAT else "rebuild the store"
            )
            raise ValueError(
                f"{where} has format {version}, this distdiff reads format {FORMAT}: {what} "
                "(distdiff shard --overwrite)"
            )
        if (recorded := raw.pop(OWN_HASH, None)) is not None and recorded != _own_hash(raw):
            raise _changed(where, "its content is not that of its own hash")
        top = _checked(raw, cls, where)
        try:
            made = cls._of(raw, top, where)
            wrong = made._fault()
        except (TypeError, AttributeError, KeyError, ValueError, ArithmeticError) as error:
            raise _changed(where, str(error)) from error
        if wrong:
            raise _changed(where, wrong)
        return made

    @classmethod
    def _of(cls, raw: Any, top: dict[str, Any], where: str) -> Manifest:
        """From the parsed JSON and its keys."""
        top["genes"] = tuple(raw["genes"])
        top["labels"] = {k: tuple(v) for k, v in raw["labels"].items()}
        top["never_counted"] = tuple(raw["never_counted"])
        top["sources"] = tuple(
            SourceInfo(**_checked(s, SourceInfo, f"{where}: sources") | {"absent": tuple(s["absent"])})
            for s in raw["sources"]
        )
        top["groups"] = tuple(GroupInfo(**_checked(g, GroupInfo, f"{where}: groups")) for g in raw["groups"])
        top["order"] = OrderInfo(**_checked(raw["order"], OrderInfo, f"{where}: order"))
        top["shards"] = tuple(ShardInfo(**_checked(s, ShardInfo, f"{where}: shards")) for s in raw["shards"])
        split = _checked(raw["split"], SplitInfo, f"{where}: split")
        top["split"] = SplitInfo(**split | {k: tuple(split[k]) for k in ("shares", "n_cells")})
        return cls(**top)

    def _fault(self) -> str | None:
        """What cannot be so in any store, None where nothing is."""
        whole = (self.n_cells, self.block, self.blocks_per_shard, *(g.n_genes for g in self.groups),
                 *(g.cap for g in self.groups))  # fmt: skip
        if any(type(n) is not int or n < 1 for n in whole):
            return f"n_cells, block, blocks_per_shard, n_genes and cap must be whole numbers from 1: {whole}"
        names = [g.name for g in self.groups]
        if len(set(names)) < len(names) or not all(re.fullmatch("[a-z]+", name) for name in names):
            return f"groups of the names {names}"
        if sum(g.n_genes for g in self.groups) != len(self.genes):
            return f"{len(self.genes)} genes, {sum(g.n_genes for g in self.groups)} in the groups"
        for what, values in {"genes": self.genes, **{f"labels of {k}": v for k, v in self.labels.items()}}.items():
            if not all(isinstance(value, str) for value in values) or len(set(values)) < len(values):
                return f"{what}: names that differ are wanted"
        if self.dtype not in DTYPES or self.codec not in CODECS:
            return f"dtype {self.dtype!r}, codec {self.codec!r}: {', '.join(DTYPES)}; {', '.join(CODECS)} are wanted"
        rows = self.block * self.blocks_per_shard
        if len(self.shards) != -(-self.n_cells // rows):
            return f"{len(self.shards)} shards of {rows} cells are not {self.n_cells} cells"
        for n, shard in enumerate(self.shards):
            if (shard.index, shard.start, shard.stop) != (n, n * rows, min(n * rows + rows, self.n_cells)):
                return f"shard {n} is number {shard.index}, rows {shard.start} to {shard.stop}"
        if not math.isfinite(self.largest) or len(self.split.n_cells) != 3 or sum(self.split.n_cells) != self.n_cells:
            return f"largest count {self.largest}, cells {self.split.n_cells} of {self.n_cells} in the splits"
        if fingerprint(self.genes, self.labels, self.shards) != self.fingerprint:
            return "genes, label values and shards are not those of the fingerprint"
        return None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the store in ``folder``.

        Raises
        ------
        FileNotFoundError
            There is none.
        ValueError
            It cannot be used, see `from_json`.
        """
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is not a distdiff store, or a build that did not finish (no {FILE}): run distdiff shard"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise _changed(str(path), f"it is no text: {error}") from None
        return cls.from_json(text, str(path))


def _own_hash(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _changed(where: str, why: str) -> ValueError:
    return ValueError(
        f"{where} was changed or damaged after it was written ({why}): restore it, or rebuild the store: distdiff "
        "shard --overwrite"
    )


def hash_of(values: np.ndarray) -> str:
    """sha256 of an array: dtype, shape and content."""
    content = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode())
    content.update(np.ascontiguousarray(values).data)
    return content.hexdigest()


def _checked(raw: Any, cls: type, where: str) -> dict[str, Any]:
    """The mapping ``raw`` if its keys are the fields of ``cls``."""
    fields = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected the keys {', '.join(sorted(fields))}, found {type(raw).__name__}")
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if missing := sorted(needed - raw.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}; rebuild the store: distdiff shard --overwrite")
    if unknown := sorted(raw.keys() - fields):
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}{nearest(unknown[0], fields)}")
    return dict(raw)


def digest(counts: sparse.csr_matrix, block: int) -> list[str]:
    """sha256 of the canonical CSR content of every block of cells.

    Over row lengths, gene indices and counts as little-endian uint32 (or float32).

    Parameters
    ----------
    counts
        ``[n, g]``, sorted indices, no duplicates, no stored zeros; any integer dtype, or float for measurements.
    block
        Cells a block; the first row begins one.
    """
    lengths, indices = _four_bytes(np.diff(counts.indptr)), _four_bytes(counts.indices)
    data = _four_bytes(counts.data)
    made = []
    for first in range(0, counts.shape[0], block):
        last = min(first + block, counts.shape[0])
        a, b = counts.indptr[first], counts.indptr[last]
        content = hashlib.sha256(lengths[first:last].data)
        content.update(indices[a:b].data)
        content.update(data[a:b].data)
        made.append(content.hexdigest())
    return made


def _four_bytes(numbers: np.ndarray) -> np.ndarray:
    """Little-endian uint32 or float32; no copy where the bytes are these already."""
    if numbers.dtype.kind != "f" and numbers.dtype.itemsize == 4:
        return numbers.view(np.uint32).astype("<u4", copy=False)
    return np.ascontiguousarray(numbers, "<f4" if numbers.dtype.kind == "f" else "<u4")


def combine_digests(digests: Sequence[str]) -> str:
    """sha256 of a shard's counts, from those of its blocks."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def combine(counts_sha: str, codes: Sequence[np.ndarray]) -> str:
    """sha256 of one shard: its counts' `combine_digests` and its cells' codes (labels in key order, then split)."""
    content = hashlib.sha256(counts_sha.encode())
    for code in codes:
        content.update(np.ascontiguousarray(code, "<i4").data)
    return content.hexdigest()


def fingerprint(genes: Sequence[str], labels: Mapping[str, Sequence[str]], shards: Sequence[ShardInfo]) -> str:
    """sha256 over genes, label values and shard hashes: equal for equal content, whatever codec or workers."""
    content = [list(genes), {k: list(labels[k]) for k in sorted(labels)}, [(s.start, s.stop, s.sha256) for s in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
