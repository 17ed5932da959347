"""What a result holds and how its values are encoded: fields, output shards, zarr arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from distdiff import received

CHUNK_BYTES = 4 << 20
"""A chunk that a reader decodes at once, dense layers."""

RUN = 1 << 18
"""CSR values a chunk; a shard of the final CSR arrays has :data:`RUNS` of them."""

RUNS = 8

Values = dict[str, Any]
"""Path of a field -> its values for some rows: a tensor ``[n g]`` or ``[n]``, CSR, or an array of text."""


@dataclass(frozen=True)
class Field:
    """One matrix or column of the result.

    Attributes
    ----------
    path
        Its path in the AnnData: ``X``, ``layers/imputed_mean``, ``obs/distdiff_nats``.
    dtype
        Its name in numpy; ``str`` for text.
    width
        Genes; 0: one value a cell.
    sparse
        Whether it is CSR; ``None``: whatever takes less room.
    """

    path: str
    dtype: str
    width: int = 0
    sparse: bool | None = False

    def __post_init__(self) -> None:
        if not all(part.strip(".") for part in self.path.split("/")):
            raise ValueError(f"a field cannot have the path {self.path!r}, outside of the result")

    @property
    def name(self) -> str:
        """The path as one word."""
        return self.path.replace("/", ".")

    def pays(self, density: float) -> bool:
        """Whether CSR takes less room than a dense array of which a share ``density`` is not zero."""
        size = np.dtype(self.dtype).itemsize
        if self.dtype == "float16":  # scipy has no such CSR
            return False
        return bool(density * (size + 4) < 0.7 * size)


@dataclass(frozen=True)
class Layout:
    """Cells and fields of a result, and the cells of a shard.

    Attributes
    ----------
    n_cells
        Cells of the result.
    fields
        What is written; ``sparse`` is decided for each.
    rows, chunk
        Cells of an output shard, and of a chunk in it; the second divides the first.
    """

    n_cells: int
    fields: tuple[Field, ...]
    rows: int
    chunk: int

    @classmethod
    def fit(cls, n_cells: int, fields: Sequence[Field], rows: int | None = None) -> Layout:
        """Shards of at most 64 MiB of dense values; 64 or more of them where they would still hold 1,024 cells."""
        row_bytes = sum(np.dtype(f.dtype).itemsize * f.width for f in fields if not f.sparse)
        widest = max((np.dtype(f.dtype).itemsize * f.width for f in fields if not f.sparse), default=0)
        chunk = 256
        while chunk > 16 and chunk * widest > CHUNK_BYTES:
            chunk //= 2
        if rows is None:
            rows = max(256, min(8192, (64 << 20) // max(1, row_bytes), max(1024, -(-n_cells // 64))))
        chunk = min(chunk, *(-(-n // 16) * 16 for n in (rows, n_cells)))
        return cls(n_cells, tuple(fields), -(-rows // chunk) * chunk, chunk)

    @property
    def n_shards(self) -> int:
        return -(-self.n_cells // self.rows)

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and one past its last."""
        return shard * self.rows, min((shard + 1) * self.rows, self.n_cells)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; back with :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Layout:
        """What :meth:`to_dict` gave."""
        return cls(**{**tree, "fields": tuple(Field(**f) for f in tree["fields"])})


def array_of(field: Field, layout: Layout, n: int, keep: dict[str, Any]) -> Any:
    """An array of ``n`` rows as ``field`` has it in the result, in memory: its files are left in ``keep``."""
    if not field.width:
        return _array(keep, (n,), (layout.rows,), None, field.dtype)
    return _array(keep, (n, field.width), (layout.chunk, field.width), (layout.rows, field.width), field.dtype)


def _array(
    keep: dict[str, Any], shape: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...] | None, dtype: str
) -> Any:
    import zarr
    from zarr.codecs import BloscCodec

    text = dtype == "str"
    encoding = "string-array" if text else "array"
    shuffle = "noshuffle" if text or np.dtype(dtype).itemsize == 1 else "shuffle"
    return zarr.create_array(
        zarr.storage.MemoryStore(keep), shape=shape, chunks=chunks, shards=shards, dtype=str if text else dtype,
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle=shuffle)],  # type: ignore[arg-type]
        fill_value="" if text else 0, config={"write_empty_chunks": True}, zarr_format=3,
        attributes={"encoding-type": encoding, "encoding-version": "0.2.0"},
    )  # fmt: skip


def encode(field: Field, layout: Layout, values: np.ndarray) -> bytes:
    """One shard of a dense layer or of a column of obs, as its file in the result."""
    keep: dict[str, Any] = {}
    array = array_of(field, layout, layout.rows, keep)
    array[: len(values)] = cast(values, field)
    return keep["c/0/0" if field.width else "c/0"].to_bytes()


def final_path(field: Field, shard: int) -> str:
    """Path in the result of one shard of a dense layer or of a column of obs."""
    return f"{field.path}/c/{shard}/0" if field.width else f"{field.path}/c/{shard}"


def runs(total: int) -> tuple[int, int]:
    """CSR values of a chunk, and of a shard, of arrays of ``total`` values."""
    run = max(1, min(RUN, total))
    return run, run * min(RUNS, max(1, -(-total // run)))


def csr_array(part: str, field: Field, total: int, n: int, keep: dict[str, Any]) -> Any:
    """``data`` or ``indices`` (``n`` of ``total`` values) of a sparse field, in memory."""
    run, shard = runs(total)
    return _array(keep, (n,), (run,), (shard,), field.dtype if part == "data" else "int32")


def cast(values: np.ndarray, field: Field) -> np.ndarray:
    """Values in a field's dtype; to whole numbers by rounding.

    Raises
    ------
    ValueError
        A value that the dtype does not reach.
    """
    if field.dtype in ("str", "bool", str(values.dtype)):
        return values
    dtype = np.dtype(field.dtype)
    if values.dtype.kind == "f" and dtype.kind in "iu":
        values = np.rint(values)
    if dtype.itemsize < 4 and values.size:
        most, least = (np.finfo if dtype.kind == "f" else np.iinfo)(dtype).max, values.min()
        if values.max() > most or (dtype.kind == "u" and least < 0):
            raise ValueError(
                f"{field.path} holds {values.max():g}, {field.dtype} reaches to {most:g}: write it with dtype='float32'"
            )
    return values.astype(dtype)


def csr_of(values: Any, field: Field) -> sp.csr_matrix:
    """Values of a sparse field as canonical CSR of its dtype."""
    if not sp.issparse(values):
        row, column = np.nonzero(values)
        indptr = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=len(values)))))
        values = sp.csr_matrix((values[row, column], column.astype(np.int32), indptr), values.shape)
    return sp.csr_matrix((cast(values.data, field), values.indices, values.indptr), values.shape)


def fetched(values: Any, field: Field, first: int = 0) -> Any:
    """Values of one batch, whose first row is ``first``, on the CPU: CSR or an array, in the field's dtype.

    Raises
    ------
    FloatingPointError
        A value is not a finite number.
    """
    if isinstance(values, torch.Tensor):
        values = values.cpu().numpy()
    received.check_answer(values, field.path, first)
    return csr_of(values, field) if field.sparse else cast(values, field)
