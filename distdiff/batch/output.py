"""Files of a job: folders of finished shards, and the files of the result that are made of them.

A dense layer, or a column of obs, lies in the folder of each finished shard as the zarr shard that the result will have
there. Where CSR values stand in the result depends on how many all cells before have, which is known once all shards
are finished: each shard keeps its own CSR values as plain arrays, and the arrays of the result are cut from these, one
zarr shard at a time. Memory is bounded by an output shard.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import scipy.sparse as sp

from distdiff import received
from distdiff.batch.layout import RUN, Field, Layout, Values, array_of, csr_array, encode, final_path, runs
from distdiff.received import Record

RECORD = "record.json"
"""In the folder of a finished shard: its files and their checksums, and what computing it took."""


class Corrupt(ValueError):
    """A file of a result differs from what was written."""


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


def csr_files(field: Field, values: sp.csr_matrix) -> dict[str, bytes]:
    """One shard's CSR values, which :func:`join` puts together: name of a file -> content."""
    arrays = {
        "data": values.data.astype(field.dtype, copy=False),
        "indices": values.indices.astype("int32", copy=False),
        "counts": np.diff(values.indptr).astype("int32", copy=False),
    }
    return {f"{field.name}.{part}": array.tobytes() for part, array in arrays.items()}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished shard."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def link_shard(shards: Path, store: Path, layout: Layout, shard: int) -> dict[str, Record]:
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


def metadata(store: Path, field: Field, layout: Layout) -> None:
    """Write the description of a field of fixed width; writing it again changes nothing."""
    keep: dict[str, Any] = {}
    array_of(field, layout, layout.n_cells, keep)
    put(store / field.path / "zarr.json", keep["zarr.json"].to_bytes())


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


def unrecorded(root: Path, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Record]:
    """Records of all files under ``root`` that no record names yet; the root's own description may still change."""
    named = {name for records in known.values() for name in records} | {"zarr.json"}
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name not in named and (record := _record(path)) is not None:
            found[name] = record
    return found
