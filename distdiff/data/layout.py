"""How counts lie on disk: block-aligned CSR in plain zarr v3, one inner chunk a block of cells.

::

    counts/data      uint16|uint32 [n_blocks, cap]     counts of a block, its cells one after the other, then zeros
    counts/indices   uint16|uint32 [n_blocks, cap]     their gene numbers, ascending within a cell
    counts/indptr    uint32 [n_blocks, block + 1]      where each cell of the block starts
    labels/<key>     int32 [n_cells]                   codes, -1 where missing
    split            uint8 [n_cells]                   0 train, 1 val, 2 test
    source/file      int32 [n_cells]                   input file of a cell
    source/row       int64 [n_cells]                   its row there
    names            uint8 [n_cells, width]            cell names, UTF-8, padded with zero bytes
    genes/<stat>     float64 [n_genes]                 mean, var, nnz, max over training cells
    manifest.json    written last

A block holds ``block`` cells in row order of the sources; the last may be short. Every inner chunk and every shard
index ends in a crc32c, so a flipped byte is an error and not a count. Two writers in one shard lose data in silence:
one task writes one shard, whole.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy import sparse
from zarr.codecs import BloscCodec, Crc32cCodec

CHUNK = 1 << 18
"""Cells a chunk of the per-cell arrays."""

SHARD_BYTES = 64 << 20
"""Raw bytes of counts and indices that a shard holds by default."""


@dataclass(frozen=True)
class Layout:
    """Shape of the counts on disk; the fields are those of `Manifest`."""

    n_cells: int
    n_genes: int
    block: int
    cap: int
    blocks_per_shard: int
    dtype: str
    index_dtype: str

    @classmethod
    def fit(cls, nnz: np.ndarray, n_genes: int, largest: int, block: int, blocks_per_shard: int | None) -> Layout:
        """The narrowest layout for these cells.

        Parameters
        ----------
        nnz
            ``int [n_cells]``, stored counts of each cell.
        n_genes, largest
            Number of genes; largest count.
        block
            Cells a block.
        blocks_per_shard
            Blocks a shard; None aims at 64 MiB of raw counts.
        """
        dtype = "uint16" if largest <= np.iinfo(np.uint16).max else "uint32"
        index_dtype = "uint16" if n_genes <= 1 << 16 else "uint32"
        per_block = np.add.reduceat(nnz.astype(np.int64), np.arange(0, len(nnz), block))
        cap = -(-int(per_block.max()) // 64) * 64
        if blocks_per_shard is None:
            entry = np.dtype(dtype).itemsize + np.dtype(index_dtype).itemsize
            blocks_per_shard = max(1, min(len(per_block), SHARD_BYTES // (cap * entry)))
        return cls(len(nnz), n_genes, block, cap, blocks_per_shard, dtype, index_dtype)

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
    """Make the group and the three empty arrays of counts under ``root``."""
    group = zarr.create_group(str(root), zarr_format=3)
    counts = group.create_group("counts", attributes={"encoding": "block-aligned CSR", "block": layout.block})
    widths = {"data": layout.cap, "indices": layout.cap, "indptr": layout.block + 1}
    dtypes = {"data": layout.dtype, "indices": layout.index_dtype, "indptr": "uint32"}
    for name, width in widths.items():
        counts.create_array(
            name,
            shape=(layout.n_blocks, width),
            dtype=dtypes[name],
            chunks=(1, width),
            shards=(layout.blocks_per_shard, width),
            compressors=_codecs(),
            fill_value=0,
        )


def write_shard(root: Path, layout: Layout, shard: int, counts: sparse.csr_matrix) -> None:
    """Write one whole shard; doing it again gives the same files.

    Parameters
    ----------
    root, layout
        Folder that `create` made, and its layout.
    shard
        Number of the shard.
    counts
        ``[n, n_genes]``, its cells in store order, canonical.

    Raises
    ------
    ValueError
        Another number of cells than the shard has, or a block over the cap.
    """
    start, stop = layout.rows(shard)
    if counts.shape[0] != stop - start:
        raise ValueError(f"shard {shard} has {stop - start} cells, {counts.shape[0]} were given")
    group = zarr.open_group(str(root), mode="r+", use_consolidated=False)
    first = start // layout.block
    for name, blocks in encode(counts, layout).items():
        array: Any = group[f"counts/{name}"]
        array = array.with_config({"write_empty_chunks": True})  # a shard that is absent is then always a fault
        array[first : first + len(blocks)] = blocks


def encode(counts: sparse.csr_matrix, layout: Layout) -> dict[str, np.ndarray]:
    """Cut CSR rows into padded blocks: ``data`` and ``indices`` ``[k, cap]``, ``indptr`` ``[k, block + 1]``."""
    edges = np.minimum(np.arange(0, counts.shape[0] + layout.block, layout.block), counts.shape[0])
    starts = counts.indptr[edges].astype(np.int64)
    k = len(edges) - 1
    if (widest := int(np.diff(starts).max())) > layout.cap:
        raise ValueError(f"a block holds {widest} counts, the store was laid out for {layout.cap}; a source changed")
    data = np.zeros((k, layout.cap), layout.dtype)
    indices = np.zeros((k, layout.cap), layout.index_dtype)
    for b, (lo, hi) in enumerate(itertools.pairwise(starts)):
        data[b, : hi - lo] = counts.data[lo:hi]
        indices[b, : hi - lo] = counts.indices[lo:hi]
    at = np.minimum(np.arange(k)[:, None] * layout.block + np.arange(layout.block + 1), counts.shape[0])
    indptr = (counts.indptr[at] - starts[:-1, None]).astype(np.uint32)
    return {"data": data, "indices": indices, "indptr": indptr}


def write_column(root: Path, name: str, values: np.ndarray) -> None:
    """Write one small array (a value or a row a cell or gene) under ``root``."""
    group = zarr.open_group(str(root), mode="r+", use_consolidated=False)
    parent, _, leaf = name.rpartition("/")
    if parent:
        group = group.require_group(parent)
    chunks = (max(1, min(CHUNK, len(values))), *values.shape[1:])
    array = group.create_array(leaf, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=_codecs())
    array[:] = values


def encode_names(names: np.ndarray) -> np.ndarray:
    """Text ``str [n]`` as UTF-8 rows ``uint8 [n, width]``, padded with zero bytes."""
    fixed = np.char.encode(names, "utf-8")
    width = max(1, fixed.dtype.itemsize)
    return fixed.astype(f"S{width}").view(np.uint8).reshape(len(names), width)


def _codecs() -> list[Any]:
    return [BloscCodec(cname="lz4", clevel=3, shuffle="shuffle"), Crc32cCodec()]
