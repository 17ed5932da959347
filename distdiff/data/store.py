"""CountStore: any cells of a store, by row number. The only file that knows tensorstore."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
from scipy import sparse

from distdiff.component import nearest
from distdiff.data.manifest import SPLITS, Manifest
from distdiff.types import Cells, Condition, DataSpec


class CountStore:
    """Counts, labels and splits of the cells of a store, read through tensorstore.

    Attributes
    ----------
    path, manifest
        The folder and what it says about itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> CountStore:
        """Open a store that ``distdiff shard`` made.

        Raises
        ------
        FileNotFoundError
            No store there, or a shard of it is missing (zarr would give zeros in its place).
        ValueError
            A newer format, or a manifest that cannot be read.
        """
        path = Path(path)
        store = cls(path, Manifest.read(path))
        for shard in store.manifest.shards:
            for name in ("data", "indices", "indptr"):
                file = path / "counts" / name / "c" / str(shard.index) / "0"
                if not file.exists():
                    raise FileNotFoundError(
                        f"{path}: shard {shard.index} (cells {shard.start} to {shard.stop - 1}) is missing, no {file}; "
                        "copy the store again or rebuild it with distdiff shard --overwrite"
                    )
        return store

    @property
    def n_cells(self) -> int:
        return self.manifest.n_cells

    @property
    def genes(self) -> tuple[str, ...]:
        return self.manifest.genes

    def rows(self, split: str) -> np.ndarray:
        """Sorted row numbers of ``train``, ``val``, ``test`` or ``all``: ``int64``.

        Raises
        ------
        ValueError
            No such split.
        """
        if split == "all":
            return np.arange(self.n_cells, dtype=np.int64)
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}{nearest(split, (*SPLITS, 'all'))}")
        return np.flatnonzero(self._column("split") == SPLITS.index(split)).astype(np.int64)

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Counts of cells, in the order asked for, repeats allowed: ``int32`` (``int64`` above 2^31) ``[n, g]``.

        Each block is read and checked once, whatever the number of its cells that are wanted.

        Raises
        ------
        ValueError
            Row numbers out of range, or a damaged shard (shard and cells named).
        """
        rows = np.asarray(rows, dtype=np.int64)
        self._check(rows)
        numbers, block_of = np.unique(rows // self.manifest.block, return_inverse=True)
        data, indices, indptr = self._blocks(numbers)
        inside = rows % self.manifest.block
        starts = indptr[block_of, inside].astype(np.int64)
        lengths = indptr[block_of, inside + 1].astype(np.int64) - starts
        out = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=out[1:])
        # entry j of row i lies at block_of[i] * cap + starts[i] + j
        take = np.arange(out[-1]) + np.repeat(block_of * self.manifest.cap + starts - out[:-1], lengths)
        wide = np.int32 if data.dtype == np.uint16 else np.int64
        return sparse.csr_matrix(
            (data.ravel()[take].astype(wide), indices.ravel()[take].astype(np.int32), out),
            shape=(len(rows), len(self.genes)),
        )

    def cells(self, rows: np.ndarray, labels: Sequence[str] = ()) -> Cells:
        """A dense batch on the CPU: counts ``float32 [n, g]`` and the codes of ``labels``."""
        codes = {k: torch.from_numpy(v) for k, v in self.labels(rows, labels).items()}
        counts = self.read(rows).astype(np.float32).toarray()
        return Cells(torch.from_numpy(counts), Condition(codes), torch.from_numpy(np.array(rows, dtype=np.int64)))

    def labels(self, rows: np.ndarray, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Label codes of cells, -1 where missing: name -> ``int64 [n]``; ``None``: all labels.

        Raises
        ------
        ValueError
            No such label.
        """
        known = self.manifest.labels
        for key in keys or ():
            if key not in known:
                raise ValueError(f"{self.path} has no label {key!r}{nearest(key, known)}; shard with --labels {key}")
        return {k: self._column(f"labels/{k}")[rows].astype(np.int64) for k in (known if keys is None else keys)}

    def names(self, rows: np.ndarray) -> np.ndarray:
        """Cell names: ``str [n]``."""
        padded = np.ascontiguousarray(self._column("names")[rows])
        return np.char.decode(padded.view(f"S{padded.shape[1]}").ravel(), "utf-8")

    def spec(self, labels: Sequence[str] = ()) -> DataSpec:
        """What a denoiser for this store must know: genes, the vocabularies of ``labels``, gene means of training."""
        self.labels(np.empty(0, dtype=np.int64), labels)
        vocabulary = {k: self.manifest.labels[k] for k in labels}
        return DataSpec(self.genes, vocabulary, self._column("genes/mean").astype(np.float32))

    def _check(self, rows: np.ndarray) -> None:
        bad = rows[(rows < 0) | (rows >= self.n_cells)]
        if len(bad):
            raise ValueError(f"{self.path} has rows 0 to {self.n_cells - 1}, row {bad[0]} was asked for")

    def _blocks(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decoded blocks: data and indices ``[k, cap]``, indptr ``[k, block + 1]``."""
        try:
            with ts.Batch() as batch:
                waiting = [a[numbers].read(batch=batch) for a in self._arrays]
            data, indices, indptr = (np.asarray(w.result()) for w in waiting)
        except Exception as error:
            raise ValueError(f"{self._damaged(numbers)}: {error}") from error
        full = np.diff(indptr.astype(np.int64), axis=1)
        filled = np.arange(self.manifest.cap) < indptr[:, -1:]
        wrong = (full < 0).any(1) | ((data > 0) != filled).any(1) | (indices >= len(self.genes)).any(1)
        if wrong.any():
            raise ValueError(f"{self._damaged(numbers[wrong])}: counts and row pointers do not agree")
        return data, indices, indptr

    def _damaged(self, numbers: np.ndarray) -> str:
        """Name the shard at fault: read the blocks one by one until one fails."""
        for number in numbers:
            try:
                for array in self._arrays:
                    array[int(number)].read().result()
            except Exception:
                numbers = np.array([number])
                break
        shard = self.manifest.shards[int(numbers[0]) // self.manifest.blocks_per_shard]
        return (
            f"{self.path}: shard {shard.index} (cells {shard.start} to {shard.stop - 1}) is damaged; copy the store "
            "again or rebuild it with distdiff shard --overwrite"
        )

    @cached_property
    def _arrays(self) -> tuple[Any, Any, Any]:
        return tuple(_open(self.path / "counts" / name) for name in ("data", "indices", "indptr"))  # type: ignore[return-value]

    def _column(self, name: str) -> np.ndarray:
        return _column(str(self.path.absolute()), name, self.manifest.fingerprint)


@lru_cache(maxsize=32)
def _column(path: str, name: str, fingerprint: str) -> np.ndarray:
    """One small array of a store, read once a process."""
    return np.asarray(_open(Path(path) / name).read().result())


@lru_cache(maxsize=1)
def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def _open(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute())}}
    return ts.open(spec, context=_context(), read=True, recheck_cached_data=False).result()
