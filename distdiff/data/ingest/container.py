"""An AnnData in a file, h5ad or zarr: opened, and its tables and matrices read, each checked as it is read."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distdiff.component import nearest
from distdiff.data.ingest import foreign, legacy, probe
from distdiff.data.ingest.bycell import CsrRows, number_dtype
from distdiff.data.ingest.bygene import Csc
from distdiff.data.ingest.damage import InputError, reading, unreadable

SQUEEZED = 20_000
"""Times that a compressor makes numbers smaller at most."""

SMALL = 64 << 20
"""Bytes of an element up to which `check` reads all of it."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An h5ad file or zarr folder, open for reading; closed at the end."""
    root = open_root(path)
    try:
        yield root
    finally:
        if hasattr(root, "close"):
            root.close()


def open_root(path: Path) -> Any:
    """The root group of an h5ad file or zarr folder.

    Raises
    ------
    FileNotFoundError
        There is none.
    InputError
        It is of another kind, truncated or damaged.
    """
    return _open_zarr(path) if path.is_dir() else _open_h5(path)


def _open_h5(path: Path) -> Any:
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give {foreign.KINDS}")
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401 (its import makes its filters known)
    if h5py.is_hdf5(path):
        probe.looked_through(path)
    try:
        return h5py.File(path, "r")
    except OSError as e:
        if isinstance(e, PermissionError) or "unable to lock file" in str(e):
            raise unreadable(str(path), e) from e
        what = foreign.by_name(path) or f"truncated, or not an h5ad file; give {foreign.KINDS}"
        raise InputError(f"{path} cannot be opened as h5ad ({e}): {what}") from e
    except Exception as e:
        raise unreadable(str(path), e) from e


def _open_zarr(path: Path) -> Any:
    import zarr

    try:
        return zarr.open_group(str(path), mode="r", use_consolidated=False)
    except Exception as e:
        is_zarr = any((path / name).exists() for name in ("zarr.json", ".zgroup"))
        if not is_zarr and (what := foreign.by_content(path)):
            raise InputError(f"{path} is no AnnData: {what}") from e
        text = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be opened as a zarr folder ({text}); give {foreign.KINDS}") from e


def matrix_of(root: Any, layer: str | None, path: str) -> tuple[Any, str]:
    """The element that holds the counts of a layer (as in `Source.open`), and where its genes are.

    Raises
    ------
    InputError
        There is none.
    """
    layers = list(root["layers"]) if "layers" in root else []
    if layer is None:
        if "X" not in root or encoding(root["X"]) == "null":
            raise InputError(f"{path} has no X; choose one of its layers with layer=: {', '.join(layers) or 'none'}")
        return root["X"], "var"
    if layer in layers:
        return root["layers"][layer], "var"
    has_raw = ("raw" in root and "X" in root["raw"]) or "raw.X" in root
    if layer == "raw" and has_raw:
        return (root["raw.X"], "raw.var") if "raw.X" in root else (root["raw"]["X"], "raw/var")
    raise InputError(f"{path} has no layer {layer!r}{nearest(layer, [*layers, *(['raw'] if has_raw else [])])}")


def encoding(element: Any) -> str:
    """Which kind of element it is, as anndata wrote it."""
    return str(element.attrs.get("encoding-type", ""))


def rows_of(element: Any, where: str) -> Any:
    """A matrix on disk (group or array of h5py or zarr) by row: something whose ``[start:stop]`` gives rows.

    Raises
    ------
    InputError
        It is no matrix of numbers, or its parts do not fit each other.
    """
    from anndata.io import sparse_dataset

    with reading(where):
        if not (encoding(element).endswith("_matrix") or "h5sparse_format" in element.attrs):
            if len(getattr(element, "shape", ())) != 2:
                raise InputError(f"{where}: encoding {encoding(element)!r} is neither a sparse nor a dense matrix")
            number_dtype(element.dtype, where)
            return element
        backed = sparse_dataset(element)
        n, g = (int(size) for size in backed.shape)
        if min(n, g) < 0:
            raise InputError(f"{where}: its shape is {n} x {g}; the file is damaged")
        return CsrRows(element, (n, g), where) if backed.format == "csr" else Csc(element, (n, g), where)


def row_count(root: Any, key: str, where: str) -> int:
    """How many rows the obs or var ``key`` has; its names are not read.

    Raises
    ------
    InputError
        It cannot be read.
    """
    with reading(f"{where}: {key}"):
        table = root[key]
        return int(table.shape[0]) if legacy.compound(table) else _length(table[_index_of(table)])


def names_of(root: Any, key: str, where: str) -> np.ndarray:
    """Row names of the obs or var ``key``, ``str [n]``.

    Raises
    ------
    InputError
        They cannot be read.
    """
    from anndata.io import read_elem

    with reading(f"{where}: {key}"):
        table = root[key]
        if legacy.compound(table):
            return np.asarray(legacy.frame(root, key).index, dtype=str)
        name = _index_of(table)
        _check_length(table[name], _length(table[name]), f"{where}: {key}/{name}")
        return np.asarray(read_elem(table[name]), dtype=object).astype(str)


def column_of(table: Any, key: str, n: int, where: str) -> Any:
    """One column of an obs or var group that has ``n`` rows, or None where it has no such column.

    Raises
    ------
    InputError
        It cannot be read, or has another length.
    """
    with reading(f"{where}: {key!r}"):
        if key not in columns_of(table):
            return None
        _check_length(table[key], n, f"{where}: {key!r}")
        return legacy.column(table, key)


def columns_of(table: Any) -> list[str]:
    """Names of the columns of an obs or var group."""
    return [str(name) for name in table.attrs["column-order"]]


def table_of(root: Any, key: str, where: str) -> Any:
    """The obs or var ``key`` as a DataFrame.

    Raises
    ------
    InputError
        It cannot be read, or a column has another length than its names.
    """
    n = row_count(root, key, where)
    with reading(f"{where}: {key}"):
        table = root[key]
        for name in () if legacy.compound(table) else columns_of(table):
            _check_length(table[name], n, f"{where}: {key}/{name}")
        return legacy.frame(root, key)


def check(path: Path) -> None:
    """Read whatever an AnnData file holds, so that damage is found before work on it begins.

    Elements of more than 64 MiB are looked at, not read: their shapes, their parts, their first and last rows.

    Raises
    ------
    InputError
        The element that cannot be read is named.
    """

    def work(beat: Callable[[], None]) -> None:
        with opened(path) as root:
            _check(root, str(path), beat)
        if path.is_file() and path.stat().st_size <= SMALL:
            _check_writable(path)

    if path.is_dir():
        work(lambda: None)
    else:
        probe.first(work, str(path))


def _check_writable(path: Path) -> None:
    """Add something to a copy of an h5ad file in memory: results begin as copies, and damage may show only then."""
    import h5py

    with reading(str(path)), h5py.File(io.BytesIO(path.read_bytes()), "r+") as file:
        before = _names(file)
        for key in ("obs", "uns", *_AXES):
            file.require_group(key)["distdiff probe"] = np.zeros(1)
        file["obs"].attrs["column-order"] = np.array([*columns_of(file["obs"]), "distdiff probe"], dtype=object)
        file.flush()
        found = _names(file)
        if lost := sorted(name for name in before if name not in found or name not in file):
            raise InputError(f"{path}: nothing can be added without losing {lost[0]}: damaged; copy the file again")


def _names(file: Any) -> set[str]:
    found: set[str] = set()
    file.visit(found.add)
    return found


def _check(root: Any, where: str, beat: Callable[[], None]) -> None:
    with reading(where):
        sizes = {"obs": row_count(root, "obs", where), "var": row_count(root, "var", where)}
        for key in ("obs", "var"):
            table_of(root, key, where)
        dict(root.attrs)
        _check_kind(root, where)
        keys = [key for key in root if key not in ("obs", "var")]
    for key in keys:
        with reading(f"{where}: {key}"):
            _check_kind(root[key], f"{where}: {key}")
            if key == "raw":
                _check_raw(root, sizes["obs"], where)
                continue
            members = list(root[key]) if key in _AXES else [""]
        for name in members:
            path = f"{key}/{name}" if name else key
            beat()
            with reading(f"{where}: {path}"):
                element = root[path]
                shape = tuple(sizes[axis] for axis in _AXES.get(key, ("obs", "var") if key == "X" else ()))
                _check_element(element, shape, f"{where}: {path}")


_AXES = {"layers": ("obs", "var"), "obsm": ("obs",), "varm": ("var",), "obsp": ("obs", "obs"), "varp": ("var", "var")}


def _check_raw(root: Any, n: int, where: str) -> None:
    raw = root["raw"]
    genes = row_count(root, "raw/var", where) if "var" in raw else 0
    if "var" in raw:
        table_of(root, "raw/var", where)
    for name in raw:
        path = f"{where}: raw/{name}"
        with reading(path):
            _check_kind(raw[name], path)
            if name == "varm":
                for key in raw[name]:
                    _check_element(raw[name][key], (genes,), f"{path}/{key}")
            elif name != "var":
                _check_element(raw[name], (n, genes) if name == "X" else (), path)


def _check_kind(element: Any, where: str) -> None:
    """Find anndata's reader for an element, without a call, and each of its members by its name."""
    import anndata as ad

    members = list(element) if hasattr(element, "keys") else []
    not_text = [name for name in members if not isinstance(name, str) or name not in element]
    if not_text or len(set(members)) < len(members):
        raise InputError(f"{where}: its list of members {members!r:.200} is damaged; copy the file again")
    ad.experimental.read_dispatched(element, lambda *args, **kwargs: None)


def _check_element(element: Any, shape: tuple[int, ...], where: str) -> None:
    """Read an element if it is small, else look at its shape and its ends; its first sizes must be ``shape``."""
    from anndata.io import read_elem

    _check_kind(element, where)
    kind = encoding(element)
    if kind == "awkward-array" and importlib.util.find_spec("awkward") is None:
        for name in element:
            _check_element(element[name], (), f"{where}/{name}")
        return
    matrix = kind.endswith("_matrix") or "h5sparse_format" in element.attrs
    if shape and (matrix or not hasattr(element, "keys")) and kind != "null":
        size = rows_of(element, where).shape if matrix else element.shape
        if tuple(int(s) for s in size[: len(shape)]) != shape:
            raise InputError(f"{where} has shape {tuple(size)}, but obs and var need {shape}; the file is damaged")
    needed = sum(_sizes(element, where))
    if matrix:
        rows = rows_of(element, where)
        if rows.dtype != (given := element["data"].dtype) and given.kind != "b":
            raise InputError(
                f"{where}: its values are {given}, which anndata cannot read in a sparse matrix; give the store that "
                "distdiff shard makes of it, or write it as float32"
            )
        n = int(rows.shape[0])
        for start, stop in [(0, n)] if needed <= SMALL else [(0, min(1, n)), (max(n - 1, 0), n)]:
            _check_rows(rows, start, stop, where)
    elif needed <= SMALL:
        read_elem(element)
    elif hasattr(element, "keys"):
        for name in element:
            _check_element(element[name], (), f"{where}/{name}")
    else:
        element[:1], element[-1:]


def _check_rows(rows: Any, start: int, stop: int, where: str) -> None:
    if isinstance(rows, Csc):
        rows.starts()
        if rows.nnz * 16 <= SMALL:
            rows.load()
        return
    counts = rows[start:stop]
    if counts.nnz and not 0 <= counts.indices.min() <= counts.indices.max() < rows.shape[1]:
        raise InputError(f"{where}: rows {start} to {stop} hold columns beyond {rows.shape[1]}; the file is damaged")


def _sizes(element: Any, where: str) -> Iterator[int]:
    """Bytes of all arrays of an element, by the shapes that it declares.

    Raises
    ------
    InputError
        One promises far more than is stored.
    """
    if hasattr(element, "keys"):
        dict(element.attrs)
        _check_kind(element, where)
        for name in element:
            yield from _sizes(element[name], where)
        return
    size = _bytes(element)
    if size > SMALL and size > _most(element):
        raise InputError(
            f"{where} declares {size >> 20} MiB, far more than is stored; the file is damaged: copy it again"
        )
    yield size


def _bytes(array: Any) -> int:
    shape = array.shape or ()  # None: an empty one of HDF5
    return int(np.prod([int(size) for size in shape], dtype=object)) * max(int(array.dtype.itemsize), 1)


def _most(array: Any) -> int:
    """Bytes that what is stored of an array can be at most."""
    stored = array.id.get_storage_size() if hasattr(array, "id") else 1 << 28  # zarr stores no chunks of zeros
    return int(stored) * SQUEEZED


def _index_of(table: Any) -> str:
    return str(table.attrs["_index"])


def _length(element: Any) -> int:
    """Rows of a column, whatever its kind, by the shape that it declares."""
    if not hasattr(element, "keys"):
        return int(element.shape[0])
    return int(element["codes" if "codes" in element else "values"].shape[0])


def _check_length(element: Any, n: int, where: str) -> None:
    group = hasattr(element, "keys")
    for part in [element[k] for k in ("codes", "values", "mask") if k in element] if group else [element]:
        if tuple(part.shape) != (n,):
            raise InputError(f"{where} has shape {tuple(part.shape)}, {n} rows are wanted; the file is damaged")
