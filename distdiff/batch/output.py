"""How a result lies on disk while it is made: one output shard has one writer, every file is whole or not there.

Values of fixed width (a dense layer, a column of obs) are written where they stay: an output shard is one zarr shard of
the final array, so its file can be made alone and renamed into place. Where CSR values go depends on how many there are
in all cells before, which nobody knows yet: each shard leaves them as a *part*, and once all are there the final arrays
are cut from the parts, each of *their* shards again by one writer with bounded memory. (A second pass over what is
sparse costs little; padding the arrays, or one file of arrays a shard, would be no CSR that anndata reads.)
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import scipy.sparse as sp
import torch

from distdiff import received
from distdiff.received import Record

CHUNK_BYTES = 4 << 20
"""A chunk that a reader decodes at once, dense layers."""

RUN = 1 << 18
"""CSR values a chunk; a shard of the final CSR arrays has :data:`RUNS` of them."""

RUNS = 8

RECORD = "record.json"
"""In the folder of a finished shard: its files and their checksums, and what computing it took."""

Values = dict[str, Any]
"""Path of a field -> what stands there for some rows: a tensor ``[n g]`` or ``[n]``, CSR, or an array of text."""


class Corrupt(ValueError):
    """A file of a result differs from what was written."""


@dataclass(frozen=True)
class Field:
    """One matrix or column of the result.

    Attributes
    ----------
    path
        Where it stands in the AnnData: ``X``, ``layers/imputed_mean``, ``obs/distdiff_nats``.
    dtype
        numpy's name of it, ``str`` for text.
    width
        Genes; 0: one value a cell.
    sparse
        CSR; ``None``: whatever takes less room.
    """

    path: str
    dtype: str
    width: int = 0
    sparse: bool | None = False

    def __post_init__(self) -> None:
        if not all(part.strip(".") for part in self.path.split("/")):
            raise ValueError(f"a field cannot stand at {self.path!r}, outside of the result")

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
    """Cells, fields, and where they are cut.

    Attributes
    ----------
    n_cells
        Cells of the result.
    fields
        What is written, each either sparse or not.
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


def write_checked(path: Path, content: bytes) -> Record:
    """Write a file, read it back and compare.

    Raises
    ------
    Corrupt
        The disk returned other bytes than were written.
    """
    record = (len(content), google_crc32c.value(content))
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if _record(path) != record:
        raise Corrupt(f"{path}: the disk returned other bytes than were written; check the disk")
    return record


def put(path: Path, content: bytes) -> Record:
    """Write a file of a result with :func:`write_checked`, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_checked(path, content)


def check(root: Path, files: Mapping[str, Sequence[int]]) -> list[str]:
    """Those of ``files`` (path under ``root`` -> record) that are gone or differ."""
    return [name for name, record in files.items() if _record(root / name) != tuple(record)]


def _record(path: Path) -> Record | None:
    try:
        return received.record(path)
    except OSError:
        return None


# -- values of fixed width -----------------------------------------------------------------------------------------


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


def metadata(store: Path, field: Field, layout: Layout) -> None:
    """Write the description of a field of fixed width; writing it again changes nothing."""
    keep: dict[str, Any] = {}
    array_of(field, layout, layout.n_cells, keep)
    put(store / field.path / "zarr.json", keep["zarr.json"].to_bytes())


def encode(field: Field, layout: Layout, values: np.ndarray) -> bytes:
    """One shard of a dense layer or of a column of obs, as its file in the result."""
    keep: dict[str, Any] = {}
    array = array_of(field, layout, layout.rows, keep)
    array[: len(values)] = cast(values, field)
    return keep["c/0/0" if field.width else "c/0"].to_bytes()


def final_path(field: Field, shard: int) -> str:
    """Path in the result of one shard of a dense layer or of a column of obs."""
    return f"{field.path}/c/{shard}/0" if field.width else f"{field.path}/c/{shard}"


# -- CSR -------------------------------------------------------------------------------------------------------------


def runs(total: int) -> tuple[int, int]:
    """CSR values of a chunk, and of a shard, of arrays of ``total`` values."""
    run = max(1, min(RUN, total))
    return run, run * min(RUNS, max(1, -(-total // run)))


def csr_array(part: str, field: Field, total: int, n: int, keep: dict[str, Any]) -> Any:
    """``data`` or ``indices`` (``n`` of ``total`` values) of a sparse field, in memory."""
    run, shard = runs(total)
    return _array(keep, (n,), (run,), (shard,), field.dtype if part == "data" else "int32")


def join(shards: Path, store: Path, field: Field, nnz: Sequence[int], number: int) -> dict[str, Record]:
    """Write shard ``number`` of the final ``data`` and ``indices``, cut from the parts.

    Parameters
    ----------
    nnz
        Values of each part, in order.
    """
    total = sum(nnz)
    _, size = runs(total)
    start, stop = number * size, min((number + 1) * size, total)
    files = {}
    for part, dtype in (("data", field.dtype), ("indices", "int32")):
        keep: dict[str, Any] = {}
        array = csr_array(part, field, total, size, keep)
        pieces = [
            np.fromfile(
                shards / f"{shard:06d}" / f"{field.name}.{part}",
                dtype,
                count=b - a,
                offset=a * np.dtype(dtype).itemsize,
            )
            for shard, a, b in cut_from(nnz, number)
        ]
        array[: stop - start] = np.concatenate(pieces)
        path = f"{field.path}/{part}/c/{number}"
        files[path] = put(store / path, keep["c/0"].to_bytes())
    return files


def cut_from(nnz: Sequence[int], number: int) -> Iterator[tuple[int, int, int]]:
    """Parts that shard ``number`` of the final arrays is cut from: number, first and last value within the part."""
    ends, (_, size) = list(itertools.accumulate(nnz)), runs(sum(nnz))
    start, stop = number * size, (number + 1) * size
    for shard, (n, end) in enumerate(zip(nnz, ends, strict=True)):
        a, b = max(start, end - n), min(stop, end)
        if a < b:
            yield shard, a - (end - n), b - (end - n)


def finish_csr(root: Any, shards: Path, store: Path, field: Field, layout: Layout, nnz: Sequence[int]) -> None:
    """Describe the arrays of a sparse field whose shards are joined, and write its ``indptr``."""
    total = sum(nnz)
    for part in ("data", "indices"):
        keep: dict[str, Any] = {}
        csr_array(part, field, total, total, keep)
        about = json.loads(keep["zarr.json"].to_bytes())
        about["attributes"] = {}
        put(store / field.path / part / "zarr.json", json.dumps(about, indent=2).encode())
    group = root.require_group(field.path)
    group.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [layout.n_cells, field.width]}
    )
    indptr = group.create_array(
        "indptr",
        shape=(layout.n_cells + 1,),
        dtype="int64",
        chunks=(max(1, min(RUN, layout.n_cells + 1)),),
        overwrite=True,
    )
    indptr[0] = last = 0
    for shard in range(layout.n_shards):
        start, stop = layout.span(shard)
        ends = last + np.cumsum(np.fromfile(shards / f"{shard:06d}" / f"{field.name}.counts", "int32"), dtype=np.int64)
        indptr[start + 1 : stop + 1] = ends
        last = int(ends[-1])


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
                f"{field.path} holds {values.max():g}, {field.dtype} reaches to {most:g}: write it with --dtype float32"
            )
    return values.astype(dtype)


def csr_of(values: Any, field: Field) -> sp.csr_matrix:
    """Values of a sparse field as canonical CSR of its dtype."""
    if not sp.issparse(values):
        row, column = np.nonzero(values)
        indptr = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=len(values)))))
        values = sp.csr_matrix((values[row, column], column.astype(np.int32), indptr), values.shape)
    return sp.csr_matrix((cast(values.data, field), values.indices, values.indptr), values.shape)


def unrecorded(root: Path, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Record]:
    """Records of all files under ``root`` that no record names yet; the root's own description may still change."""
    named = {name for records in known.values() for name in records} | {"zarr.json"}
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name not in named and (record := _record(path)) is not None:
            found[name] = record
    return found


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


def write_shard(
    layout: Layout, shard: int, batches: Sequence[Values], labels: Values, folder: Path, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a whole shard as ``folder``, which appears at once; a shard that is there already is left as it is.

    Parameters
    ----------
    batches, labels
        Values of the fields batch by batch, and those that are read in one piece.
    about
        What else the record of the shard holds.

    Returns
    -------
    dict
        The record (``record.json``): ``files`` (name -> bytes and checksum), ``nnz`` (path -> CSR values), ``about``.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        record: dict[str, Any] = {"files": {}, "nnz": {}, **about}
        for field in layout.fields:
            pieces = [labels[field.path]] if field.path in labels else [batch[field.path] for batch in batches]
            if field.sparse:
                values = sp.vstack(pieces, format="csr")
                record["nnz"][field.path] = int(values.nnz)
                contents = csr_files(field, values)
            else:
                contents = {field.name: encode(field, layout, np.concatenate(pieces))}
            record["files"] |= {name: write_checked(temporary / name, content) for name, content in contents.items()}
        write_checked(temporary / RECORD, json.dumps(record).encode())
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished shard."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def csr_files(field: Field, values: sp.csr_matrix) -> dict[str, bytes]:
    """One shard's CSR values, which :func:`join` puts together: name of a file -> content."""
    arrays = {
        "data": values.data.astype(field.dtype, copy=False),
        "indices": values.indices.astype("int32", copy=False),
        "counts": np.diff(values.indptr).astype("int32", copy=False),
    }
    return {f"{field.name}.{part}": array.tobytes() for part, array in arrays.items()}


def place(shards: Path, store: Path, layout: Layout, shard: int) -> dict[str, Record]:
    """Give the files of fixed width of a finished shard their places in a result, without copying where links work."""
    files = read_record(shards / f"{shard:06d}")["files"]
    placed = {}
    for field in (field for field in layout.fields if not field.sparse):
        source, path = shards / f"{shard:06d}" / field.name, final_path(field, shard)
        (store / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, store / path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.copyfile(source, store / path)
        placed[path] = tuple(files[field.name])
    return placed
