"""Counts on disk: coded blocks of cells in plain zarr v3, one inner chunk a block (docs/STORE.md).

One task writes one whole shard: two writers in one shard would lose data without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy import sparse
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from distdiff import files
from distdiff.data.store.coding import Slots, encode
from distdiff.data.store.manifest import CODECS, GroupInfo

CHUNK = 1 << 18
"""Cells in a chunk of the per-cell arrays."""

SHARD_BYTES = 32 << 20
"""Bytes of coded counts in a shard by default, before compression."""


@dataclass(frozen=True)
class Layout:
    """Shape of the counts on disk; the fields are those of `Manifest`.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.store.layout import Layout
    >>> entries = np.full(1000, 30)  # entries of each cell
    >>> layout = Layout.fit([entries], ["all"], [2000], block=256, blocks_per_shard=2, dtype="uint8", codec="local")
    >>> layout.n_blocks, layout.n_shards, layout.rows(1)
    (4, 2, (512, 1000))
    """

    n_cells: int
    groups: tuple[GroupInfo, ...]
    block: int
    blocks_per_shard: int
    dtype: str
    codec: str

    @classmethod
    def fit(
        cls,
        entries: Sequence[np.ndarray],
        names: Sequence[str],
        n_genes: Sequence[int],
        *,
        block: int,
        blocks_per_shard: int | None,
        dtype: str,
        codec: str,
    ) -> Layout:
        """The narrowest layout for these cells.

        Parameters
        ----------
        entries
            For each column group ``int [n_cells]``, entries of each cell in store order.
        names, n_genes
            Name and number of genes of each group.
        block, blocks_per_shard
            Cells in a block; blocks in a shard (None: about 32 MiB of coded counts).
        dtype, codec
            Dtype of the values; ``local`` or ``compact``.
        """
        caps = []
        for each in entries:
            per_block = np.add.reduceat(each.astype(np.int64), np.arange(0, len(each), block))
            caps.append(max(64, -(-int(per_block.max()) // 64) * 64))
        n_blocks = -(-len(entries[0]) // block)
        if blocks_per_shard is None:
            bytes_a_block = sum(caps) * (1 + np.dtype(dtype).itemsize)
            blocks_per_shard = max(1, min(n_blocks, SHARD_BYTES // bytes_a_block))
        groups = tuple(GroupInfo(*of) for of in zip(names, n_genes, caps, strict=True))
        return cls(len(entries[0]), groups, block, blocks_per_shard, dtype, codec)

    @property
    def n_blocks(self) -> int:
        return -(-self.n_cells // self.block)

    @property
    def n_shards(self) -> int:
        return -(-self.n_blocks // self.blocks_per_shard)

    def rows(self, shard: int) -> tuple[int, int]:
        """First store row of a shard, and one past its last."""
        per_shard = self.blocks_per_shard * self.block
        return shard * per_shard, min((shard + 1) * per_shard, self.n_cells)


def create(root: Path, layout: Layout) -> None:
    """Make the group and the empty arrays of counts under ``root``; existing arrays are kept.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np, zarr
    >>> from distdiff.data.store.layout import Layout, create
    >>> layout = Layout.fit([np.ones(8)], ["all"], [3], block=4, blocks_per_shard=2, dtype="uint8", codec="local")
    >>> create(Path("empty.zarr"), layout)
    >>> sorted(zarr.open_group("empty.zarr", mode="r")["counts/all"])
    ['gaps', 'starts', 'values']
    """
    for about in list(root.rglob("zarr.json")):  # of a build that was killed, whose disk may have damaged it
        files.remove(about)
    group = zarr.open_group(str(root), mode="a", zarr_format=3, use_consolidated=False)
    for info in layout.groups:
        attributes = {"encoding": "gap-coded counts", "block": layout.block, "n_genes": info.n_genes}
        counts = group.require_group(f"counts/{info.name}")
        counts.update_attributes(attributes)
        widths = {"gaps": info.cap, "values": info.cap, "starts": layout.block + 1}
        dtypes = {"gaps": "uint8", "values": layout.dtype, "starts": "uint32"}
        for name, width in widths.items():
            if name not in counts:
                counts.create_array(
                    name,
                    shape=(layout.n_blocks, width),
                    dtype=dtypes[name],
                    chunks=(1, width),
                    shards=(layout.blocks_per_shard, width),
                    compressors=_codecs(layout.codec, dtypes[name], name),
                    fill_value=0
                    if name != "starts"
                    else np.iinfo(np.uint32).max,  # start offsets of a missing chunk are then invalid
                )


def write_shard(root: Path, layout: Layout, shard: int, pieces: Iterable[Sequence[sparse.csr_matrix]]) -> None:
    """Write one whole shard; a repetition gives the same files.

    Parameters
    ----------
    root, layout
        Folder that `create` made, and its layout.
    shard
        Number of the shard.
    pieces
        Its cells in store order, whole blocks at a time (the last may be short); for each column group
        ``[n, n_genes]``, canonical.

    Raises
    ------
    ValueError
        The number of cells differs from that of the shard, or a block has more entries than the cap.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np, zarr
    >>> from scipy import sparse
    >>> from distdiff.data.store.layout import Layout, create, write_shard
    >>> layout = Layout.fit([np.ones(2)], ["all"], [3], block=4, blocks_per_shard=1, dtype="uint8", codec="local")
    >>> create(Path("one.zarr"), layout)
    >>> write_shard(Path("one.zarr"), layout, 0, [[sparse.csr_matrix([[0, 7, 0], [0, 0, 9]])]])
    >>> zarr.open_group("one.zarr", mode="r")["counts/all/values"][0, :2]
    array([7, 9], dtype=uint8)
    """
    start, stop = layout.rows(shard)
    first, k = start // layout.block, -(-(stop - start) // layout.block)
    whole = [Slots.zeros(k, g.cap, layout.block, layout.dtype) for g in layout.groups]
    cells = 0
    for parts in pieces:
        b = cells // layout.block
        for slots, part in zip(whole, parts, strict=True):
            _fill(Slots(*(array[b:] for array in slots)), part, layout)
        cells += parts[0].shape[0]
    if cells != stop - start:
        raise ValueError(f"shard {shard} has {stop - start} cells, {cells} were given")
    group = zarr.open_group(str(root), mode="r+", use_consolidated=False)
    for info, slots in zip(layout.groups, whole, strict=True):
        for name, blocks in zip(Slots._fields, slots, strict=True):
            array: Any = group[f"counts/{info.name}/{name}"]
            array = array.with_config({"write_empty_chunks": True})  # so that a missing shard is always an error
            array[first : first + k] = blocks


def _fill(slots: Slots, counts: sparse.csr_matrix, layout: Layout) -> None:
    """Cut CSR rows into coded blocks, each padded with zeros."""
    coded = encode(counts, layout.dtype)
    k = -(-counts.shape[0] // layout.block)
    at = np.minimum(np.arange(k)[:, None] * layout.block + np.arange(layout.block + 1), counts.shape[0])
    starts = coded.starts[at]
    lengths, cap = starts[:, -1] - starts[:, 0], slots.gaps.shape[1]
    if (widest := int(lengths.max())) > cap:
        raise ValueError(f"a block holds {widest} entries, the store was laid out for {cap}; a source changed")
    for b, (first, n) in enumerate(zip(starts[:, 0], lengths, strict=True)):
        slots.gaps[b, :n] = coded.gaps[first : first + n]
        slots.values[b, :n] = coded.values[first : first + n]
    slots.starts[:k] = starts - starts[:, :1]


def write_column(root: Path, name: str, values: np.ndarray) -> None:
    """Write one small array (one value or row per cell or gene) under ``root``; replaces an older one.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np, zarr
    >>> from distdiff.data.store.layout import write_column
    >>> _ = zarr.open_group("columns.zarr", mode="w")
    >>> write_column(Path("columns.zarr"), "labels/cell_type", np.array([0, 1, 1]))
    >>> zarr.open_group("columns.zarr", mode="r")["labels/cell_type"][:]
    array([0, 1, 1])
    """
    group = zarr.open_group(str(root), mode="r+", use_consolidated=False)
    parent, _, leaf = name.rpartition("/")
    if parent:
        group = group.require_group(parent)
    chunks = (max(1, min(CHUNK, len(values))), *(max(1, n) for n in values.shape[1:]))
    array = group.create_array(
        leaf, shape=values.shape, dtype=values.dtype, chunks=chunks, overwrite=True,
        compressors=_codecs("local", str(values.dtype)),
    )  # fmt: skip
    array[:] = values


def encode_names(names: np.ndarray) -> np.ndarray:
    """Text ``str [n]`` as UTF-8 rows ``uint8 [n, width]``, padded with zero bytes.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.store.layout import encode_names
    >>> encode_names(np.array(["a", "bc"]))
    array([[97,  0],
           [98, 99]], dtype=uint8)
    """
    fixed = np.char.encode(names, "utf-8")
    width = max(1, fixed.dtype.itemsize)
    return fixed.astype(f"S{width}").view(np.uint8).reshape(len(names), width)


def _codecs(codec: str, dtype: str, part: str = "") -> list[Any]:
    """Compression of one array, then a checksum of every chunk."""
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r}: {' or '.join(CODECS)} is wanted")
    if codec == "compact":
        return [ZstdCodec(level=1), Crc32cCodec()]
    if part == "values" and np.dtype(dtype).itemsize == 1:  # small numbers have runs of zero bits
        return [BloscCodec(cname="lz4", clevel=3, shuffle="bitshuffle", blocksize=1 << 17), Crc32cCodec()]
    shuffle = "noshuffle" if np.dtype(dtype).itemsize == 1 else "shuffle"
    return [BloscCodec(cname="lz4", clevel=3, shuffle=shuffle, blocksize=1 << 20), Crc32cCodec()]  # type: ignore[arg-type]
