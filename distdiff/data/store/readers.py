"""Blocks from disk into memory: one small interface, four ways.

``direct`` reads shards of a local folder itself (a shard's index once, then one read and one decompression a chunk,
into memory that is there already), ``tensorstore`` reads anything tensorstore can (local, S3, GCS, HTTP), ``zarr`` is
zarr-python, in Rust where ``zarrs`` is installed. All check the crc32c of what they read.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd

from distdiff import received
from distdiff.component import nearest
from distdiff.data.store import remote
from distdiff.data.store.coding import Slots
from distdiff.files import is_url

GONE = 2**64 - 1
"""Offset of a chunk that a shard does not hold."""


RESIDUE = 0x48674BC7
"""crc32c of bytes that end in their own crc32c."""


class Reader(ABC):
    """Reads blocks of one column group. Safe to use from several threads.

    Attributes
    ----------
    shapes
        Shape and dtype of its arrays, in the order of `Slots`.
    """

    shapes: list[tuple[tuple[int, ...], str]]

    @abstractmethod
    def __init__(self, url: str, group: str) -> None: ...

    @abstractmethod
    def read(self, blocks: Sequence[int], into: Slots, slots: Sequence[int]) -> None:
        """Read some blocks into some slots.

        Raises
        ------
        ValueError, OSError
            A chunk is damaged, truncated or gone; the store finds out which block it is.
        """


class TensorstoreReader(Reader):
    """Through tensorstore: its threads, its decoders, any place it reaches."""

    def __init__(self, url: str, group: str) -> None:
        self._url, context = url, remote.context(16 << 20)
        self._arrays = [remote.open_array(url, f"counts/{group}/{part}", context) for part in Slots._fields]
        self.shapes = [(tuple(a.shape), a.dtype.numpy_dtype.name) for a in self._arrays]

    def read(self, blocks: Sequence[int], into: Slots, slots: Sequence[int]) -> None:
        found = remote.read_together(self._url, self._arrays, np.asarray(blocks, np.int64))
        for part, out in zip(found, into, strict=True):
            out[np.asarray(slots)] = part


class ZarrReader(Reader):
    """Through zarr-python; decoded in Rust where ``zarrs`` is installed."""

    def __init__(self, url: str, group: str) -> None:
        import zarr

        rust = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"} if importlib.util.find_spec("zarrs") else {}
        with zarr.config.set(rust):
            try:
                opened: Any = zarr.open_group(url, mode="r", use_consolidated=False)
            except ImportError as error:
                raise ValueError(f"{url}: reader 'zarr' lacks a package ({error}); use reader 'tensorstore'") from error
            self._arrays = [opened[f"counts/{group}/{part}"] for part in Slots._fields]
        self.shapes = [(tuple(a.shape), a.dtype.name) for a in self._arrays]

    def read(self, blocks: Sequence[int], into: Slots, slots: Sequence[int]) -> None:
        order = np.argsort(blocks)
        numbers, to = np.asarray(blocks)[order], np.asarray(slots)[order]
        edges = np.flatnonzero(np.diff(numbers, prepend=-2, append=-2) != 1)
        for a, b in itertools.pairwise(edges):  # runs of neighbours: only slices are fast
            for array, out in zip(self._arrays, into, strict=True):
                out[to[a:b]] = array[int(numbers[a]) : int(numbers[b - 1]) + 1]


class DirectReader(Reader):
    """Reads shard files of a local store; it knows the two codec profiles and refuses any other."""

    def __init__(self, url: str, group: str) -> None:
        if is_url(url):
            raise ValueError(f"reader 'direct' reads local folders, not {url}; use reader 'tensorstore'")
        self._parts = [_Part(Path(url) / "counts" / group / part) for part in Slots._fields]
        self.shapes = [part.shape for part in self._parts]

    def read(self, blocks: Sequence[int], into: Slots, slots: Sequence[int]) -> None:
        shards: dict[int, list[tuple[int, int]]] = {}
        per_shard = self._parts[0].per_shard
        for block, slot in zip(blocks, slots, strict=True):
            shards.setdefault(block // per_shard, []).append((block % per_shard, slot))
        for shard, wanted in shards.items():
            for part, out in zip(self._parts, into, strict=True):
                part.read(shard, wanted, out)


class _Part:
    """One sharded array on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = received.json_of(folder / "zarr.json")
        (sharding,) = about["codecs"]
        inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        if inner not in (["bytes", "blosc", "crc32c"], ["bytes", "zstd", "crc32c"]):
            raise ValueError(f"{folder}: reader 'direct' does not know codecs {inner}; use reader 'tensorstore'")
        self.shape = (tuple(about["shape"]), about["data_type"])
        self._decompress = blosc.decompress if inner[1] == "blosc" else zstd.decompress
        self.per_shard = about["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._index: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, wanted: Sequence[tuple[int, int]], out: np.ndarray) -> None:
        """Chunks ``(number in the shard, slot)`` of one shard into rows of ``out``."""
        file = os.open(self.folder / "c" / str(shard) / "0", os.O_RDONLY)
        try:
            index = self._index_of(shard, file)
            for number, slot in wanted:
                offset, length = int(index[number, 0]), int(index[number, 1])
                if offset == GONE:
                    raise ValueError(f"chunk {number} of {self.folder.name} is not in its shard")
                raw = os.pread(file, length, offset)
                if len(raw) != length or length < 4:
                    raise ValueError(f"truncated: {len(raw)} of {length} bytes of chunk {number} of {self.folder.name}")
                _check(raw, f"chunk {number} of {self.folder.name}")
                room = out[slot]
                self._decompress(memoryview(raw)[:-4], room.view(np.uint8))
        finally:
            os.close(file)

    def _index_of(self, shard: int, file: int) -> np.ndarray:
        """Offsets and lengths of a shard's chunks, ``uint64 [per_shard, 2]``."""
        with self._lock:
            if (known := self._index.get(shard)) is not None:
                return known
        size = 16 * self.per_shard + 4
        end = os.fstat(file).st_size
        raw = os.pread(file, size, max(0, end - size))
        if len(raw) != size:
            raise ValueError(f"truncated: {end} bytes, less than the index of {self.folder.name}")
        _check(raw, f"the index of {self.folder.name}")
        index = np.frombuffer(raw[:-4], "<u8").reshape(-1, 2)
        with self._lock:
            self._index[shard] = index
        return index


def _check(raw: bytes, what: str) -> None:
    """The last four bytes are the crc32c of the others: then the crc32c of all is the same for any content."""
    if google_crc32c.value(raw) != RESIDUE:
        raise ValueError(f"checksum of {what} is wrong")


READERS: dict[str, type[Reader]] = {
    "direct": DirectReader,
    "tensorstore": TensorstoreReader,
    "zarr": ZarrReader,
}


def reader_class(name: str, url: str) -> type[Reader]:
    """The reader of that name; ``auto`` is ``direct`` for a local folder, else ``tensorstore``.

    Raises
    ------
    ValueError
        No such reader (the nearest is named).
    """
    if name == "auto":
        name = "tensorstore" if is_url(url) else "direct"
    if name not in READERS:
        raise ValueError(f"no reader {name!r}{nearest(name, [*READERS, 'auto'])}")
    return READERS[name]
