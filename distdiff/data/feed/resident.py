"""Batches decoded on the device: from a copy of the whole store in its memory, or from coded blocks sent to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from distdiff.data.store.pool import Lease
from distdiff.data.store.store import CountStore
from distdiff.types import Cells, Condition, Tensor

READ = 1 << 14
"""Cells read at a time while a copy is made."""


class Resident:
    """A coded copy of a store (restricted to the genes of its view) on one device.

    Batches are decoded there, so training does not wait for data; 10M cells x 2,000 genes take a few GB.

    Build one with `Resident.load`.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.data.feed.resident import Resident
    >>> from distdiff.data.store.store import CountStore
    >>> store = CountStore.open("atlas.zarr")
    >>> copy, rows = Resident.load(store, torch.device("cpu")), np.array([3, 0])
    >>> bool((copy.cells(rows).counts == store.cells(rows).counts).all())
    True
    """

    def __init__(self, store: CountStore, device: torch.device, parts: list[tuple[Tensor, Tensor, np.ndarray]]) -> None:
        self.store, self.device, self._parts = store, device, parts
        self._gene_columns = _gene_columns(store, device)
        self._labels: dict[str, Tensor] = {}

    @classmethod
    def load(cls, store: CountStore, device: torch.device) -> Resident:
        """Read the whole store once.

        Raises
        ------
        ValueError
            A corrupt shard, or counts that float32 cannot hold.
        """
        if not store.exact:
            raise ValueError(f"{store.url} holds counts that float32 does not tell apart; use loader.resident=no")
        parts = []
        pieces = [store.coded(np.arange(a, min(a + READ, store.n_cells))) for a in range(0, store.n_cells, READ)]
        for group in range(len(store.columns)):
            of = [piece[group] for piece in pieces]
            lengths = np.concatenate([np.diff(c.starts) for c in of])
            arrays = np.concatenate([c.gaps for c in of]), np.concatenate([c.values for c in of])
            gaps, values = (torch.from_numpy(a).to(device) for a in arrays)
            parts.append((gaps, values, np.concatenate([[0], np.cumsum(lengths)])))
        return cls(store, device, parts)

    def cells(self, rows: np.ndarray, labels: Sequence[str] | None = None) -> Cells:
        """A batch on the device; arguments and errors as of `CountStore.cells`."""
        counts: list[Tensor] = []
        for (gaps, values, starts), gene_column in zip(self._parts, self._gene_columns, strict=True):
            lengths = starts[rows + 1] - starts[rows]
            begin = np.concatenate(
                [[0], np.cumsum(lengths)]
            )  # on the host: reading its last value from the device would stall it
            offset, long, begun = self._send(starts[rows] - begin[:-1], lengths, begin)
            entry = torch.repeat_interleave(offset, long, output_size=int(begin[-1]))
            entry = entry + torch.arange(len(entry), device=self.device)
            counts.append(to_dense(gaps[entry], _picked(values, entry), begun, gene_column, len(self.store.genes)))
        (at,) = self._send(rows)
        codes = {k: self._codes(k)[at] for k in self.store.label_keys(labels)}
        return Cells(_sum(counts), Condition(codes), torch.from_numpy(rows))

    def _send(self, *arrays: np.ndarray) -> list[Tensor]:
        """Copy small arrays to the device without waiting."""
        return [torch.from_numpy(a.astype(np.int64)).to(self.device, non_blocking=True) for a in arrays]

    def _codes(self, label: str) -> Tensor:
        if label not in self._labels:
            everyone = self.store.labels(self.store.rows("all"), [label])[label]
            self._labels[label] = torch.from_numpy(everyone).to(self.device)
        return self._labels[label]


class Uploader:
    """Sends coded cells to a GPU through a ring of pinned buffers; a separate stream copies and decodes them."""

    def __init__(self, store: CountStore, device: torch.device, slots: int) -> None:
        self.store, self.device, self._gene_columns = store, device, _gene_columns(store, device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ring: list[dict[str, Tensor]] = [{} for _ in range(slots)]
        self._used: list[torch.cuda.Event | None] = [None] * slots
        self._turn = 0

    def cells(self, rows: np.ndarray, leases: Sequence[Lease], labels: Sequence[str] | None) -> Cells:
        """A batch on the GPU; the caller's next kernels wait for it, the host does not."""
        slot, self._turn = self._turn, (self._turn + 1) % len(self._ring)
        if (event := self._used[slot]) is not None:
            event.synchronize()  # the copy that used these buffers is done
        parts: list[Tensor] = []
        with torch.cuda.stream(self.stream):
            groups = zip(self.store.coded_of(rows, leases), self._gene_columns, strict=True)
            for number, (coded, gene_column) in enumerate(groups):
                gaps, values, starts = (
                    self._send(slot, f"{number}{name}", array) for name, array in coded._asdict().items()
                )
                parts.append(to_dense(gaps, values, starts, gene_column, len(self.store.genes)))
            counts = _sum(parts)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)  # type: ignore[no-untyped-call]
        self._used[slot] = event
        codes = {k: torch.from_numpy(v) for k, v in self.store.labels(rows, labels).items()}
        torch.cuda.default_stream(self.device).wait_event(event)  # type: ignore[no-untyped-call]
        counts.record_stream(torch.cuda.default_stream(self.device))
        return Cells(counts, Condition(codes).to(self.device), torch.from_numpy(rows))

    def _send(self, slot: int, name: str, array: np.ndarray) -> Tensor:
        """Copy one array through its pinned buffer of this slot, which grows as needed."""
        buffer = self._ring[slot].get(name)
        if buffer is None or len(buffer) < len(array):
            like = torch.from_numpy(array[:0])
            buffer = torch.empty(len(array) * 5 // 4 + 1, dtype=like.dtype, pin_memory=True)
            self._ring[slot][name] = buffer
        buffer[: len(array)].copy_(torch.from_numpy(array))
        return buffer[: len(array)].to(self.device, non_blocking=True)


def to_dense(gaps: Tensor, values: Tensor, starts: Tensor, gene_column: Tensor, n_genes: int) -> Tensor:
    """Coded cells as float32 ``[n, n_genes]``, on the device of the inputs, with torch alone.

    Parameters
    ----------
    gaps, values
        ``uint8 [e]`` and ``[e]``.
    starts
        ``int64 [n + 1]``.
    gene_column
        ``int64 [genes of the blocks]``: output column of each gene, ``n_genes`` for a gene that is not wanted.
    n_genes
        Number of columns of the result.

    Examples
    --------
    >>> import torch
    >>> from distdiff.data.feed.resident import to_dense
    >>> gaps, values = torch.tensor([0, 2, 1], dtype=torch.uint8), torch.tensor([5, 1, 7], dtype=torch.uint8)
    >>> to_dense(gaps, values, torch.tensor([0, 2, 3]), torch.arange(3), n_genes=3)  # genes 0 and 2; gene 1
    tensor([[5., 0., 1.],
            [0., 7., 0.]])
    """
    n = len(starts) - 1
    run = gaps.cumsum(0, dtype=torch.int64)
    before = torch.cat([run.new_zeros(1), run])[starts[:-1]]
    row = torch.repeat_interleave(torch.arange(n, device=gaps.device), starts.diff(), output_size=len(gaps))
    column = gene_column[run - before[row]]
    out = torch.zeros(n * (n_genes + 1), device=gaps.device)
    wide = values.to(torch.float32) if values.dtype != torch.uint32 else values.to(torch.int64).to(torch.float32)
    out.index_add_(0, row * (n_genes + 1) + column, wide)
    return out.view(n, n_genes + 1)[:, :n_genes]


def _picked(values: Tensor, at: Tensor) -> Tensor:
    """``values[at]``; CUDA indexes no unsigned integers beyond uint8, so these are read as signed ones on the way."""
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(values.dtype)
    return values[at] if signed is None else values.view(signed)[at].view(values.dtype)


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _gene_columns(store: CountStore, device: torch.device) -> list[Tensor]:
    """For each column group the column of each gene; one past the last column for a gene that is not wanted."""
    n = len(store.genes)
    return [torch.from_numpy(np.where(c.column < 0, n, c.column).astype(np.int64)).to(device) for c in store.columns]
