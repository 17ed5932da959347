"""One input file of counts, read by row slices: h5ad, AnnData zarr, 10x h5 or mtx, or an AnnData in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from distdiff import files
from distdiff.component import nearest
from distdiff.data.ingest import legacy, tenx
from distdiff.data.ingest.bygene import ByGene, Csc, Turned, reading, unreadable

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, eq=False)
class Source:
    """Cells of one file, in file order.

    Build one with `Source.open` or `Source.from_anndata`. It holds an open file handle: send its path to another
    process, not the object.

    Attributes
    ----------
    where
        Path and layer, for messages.
    genes
        Gene names in column order.
    n_cells
        Number of rows.
    note
        What to know of how it is read (why the matrix sits in memory whole, what was left out), or empty.
    stored
        The matrix on disk where it is stored gene by gene or as a list of entries, else None.
    var
        Where its genes are in the AnnData: ``var``, or ``raw/var``.
    expressed
        ``bool [g]``, which columns are gene expression where some are not (antibodies, peaks ...), else None.
    """

    where: str
    genes: tuple[str, ...]
    n_cells: int
    note: str
    _matrix: Any = field(repr=False)
    _obs: Any = field(repr=False)
    _file: Any = field(default=None, repr=False)
    stored: ByGene | None = field(default=None, repr=False)
    var: str = "var"
    expressed: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls, path: str | Path, layer: str | None = None, turned: str | Path | None = None, *, every: bool = False
    ) -> Source:
        """Open an h5ad file, an AnnData zarr folder, a 10x h5 file, or a 10x mtx folder (or its .mtx itself).

        The matrix is not read yet. Of several kinds of features (of AnnData: ``var['feature_types']``) only Gene
        Expression is read. 10x: genes are named by symbol and cells by barcode, there is no column of obs. `note` tells
        what was left out or renamed.

        Parameters
        ----------
        path
            File or folder.
        layer
            Name in ``layers``; None is ``X``; ``"raw"`` is ``raw.X`` unless a layer has that name.
        turned
            Folder in which `turn.turn` brought the matrix into row order; None reads it as it is, and one that is
            stored `by_gene` is then loaded whole at the first `read`.
        every
            Read an AnnData's features of all kinds; `expressed` tells them apart.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            Not such a file, truncated, layer missing, duplicate gene names, or ``turned`` of another or unfinished.
        """
        path = Path(path)
        if mtx := tenx.mtx_of(path):
            refuse_layer(path, layer)
            matrix, features, barcodes = tenx.open_mtx(mtx)
            return cls._tenx(str(path), features, matrix, barcodes, turned=_turned(matrix, path, layer, turned))
        root = _open_zarr(path) if path.is_dir() else _open_h5(path)
        if not ("obs" in root and "var" in root):
            if not path.is_dir() and tenx.is_h5(root):
                refuse_layer(path, layer)
                group, shape, features, barcodes = tenx.open_h5(root, str(path))
                counts = _CsrRows(group, shape)
                return cls._tenx(str(path), features, counts, barcodes, root, _turned(None, path, layer, turned))
            hint = "; it is a distdiff store already" if (path / "manifest.json").exists() else ""
            raise ValueError(f"{path} is no AnnData: it has no obs or no var{hint}; give {_KINDS}")
        holder, var = _layer(root, layer, str(path))
        where = str(path) if layer is None else f"{path} (layer {layer!r})"
        with reading(where):
            matrix = rows_of(holder, where)
            genes = frame_index(root, var)
        stored = matrix if isinstance(matrix, ByGene) else None
        other = _turned(stored, path, layer, turned)
        notes = ["" if stored is None or other else f"{where}: stored gene by gene (CSC), {_WHOLE}"]
        keep, told = tenx.expression(_kinds(root[var]), where)
        rows: Any = other or matrix
        expressed = None
        if keep is not None and every:
            expressed = np.isin(np.arange(len(genes)), keep)
        elif keep is not None:
            rows, genes = _Columns(rows, keep, where), genes[keep]
        note = "; ".join(filter(None, [*notes, "" if every else told]))
        obs = legacy.frame(root, "obs") if legacy.compound(root["obs"]) else root["obs"]
        return cls._checked(where, genes, rows, note, obs, root, stored, var.replace(".", "/"), expressed)

    @classmethod
    def from_anndata(cls, adata: AnnData, layer: str | None = None) -> Source:
        """The same over an AnnData in memory (``layer`` as in `open`), with features of all kinds.

        Raises
        ------
        ValueError
            Layer missing or duplicate gene names.
        """
        where = "AnnData" if layer is None else f"AnnData (layer {layer!r})"
        x, var = in_memory(adata, layer)
        table, note = (adata if var == "var" else adata.raw).var, ""
        if sparse.issparse(x) and x.format != "csr":
            x, note = x.tocsr(), f"{where}: its {x.format} matrix was copied as CSR to read it by cell"
        keep, _ = tenx.expression(_kinds(table), where)
        expressed = None if keep is None else np.isin(np.arange(len(table)), keep)
        return cls._checked(where, np.asarray(table.index, dtype=str), x, note, adata.obs, var=var, expressed=expressed)

    @classmethod
    def _tenx(
        cls,
        where: str,
        features: tenx.Features,
        matrix: Any,
        barcodes: np.ndarray,
        file: Any = None,
        turned: Turned | None = None,
    ) -> Source:
        import pandas as pd

        stored = matrix if isinstance(matrix, ByGene) else None
        loaded = f"{where}: stored as a list of entries (mtx), {_WHOLE}" if stored and not turned else ""
        rows = turned or matrix
        if features.keep is not None:
            rows = _Columns(rows, features.keep, where)
        note = "; ".join(filter(None, (loaded, features.note)))
        return cls._checked(where, features.genes, rows, note, pd.DataFrame(index=barcodes), file, stored)

    @classmethod
    def _checked(
        cls,
        where: str,
        genes: np.ndarray,
        matrix: Any,
        note: str,
        obs: Any,
        file: Any = None,
        stored: ByGene | None = None,
        var: str = "var",
        expressed: np.ndarray | None = None,
    ) -> Source:
        if matrix.shape[1] != len(genes):
            raise ValueError(f"{where}: {matrix.shape[1]} columns but {len(genes)} genes in var; the file is damaged")
        if (twice := _first_duplicate(genes)) is not None:
            raise ValueError(f"{where}: gene {twice!r} occurs more than once; run adata.var_names_make_unique()")
        return cls(where, tuple(genes.tolist()), int(matrix.shape[0]), note, matrix, obs, file, stored, var, expressed)

    @property
    def by_gene(self) -> bool:
        """Whether rows need the matrix whole, unless it was turned before (`turn.slabs`, `turn.turn`)."""
        return self.stored is not None

    @cached_property
    def obs_names(self) -> np.ndarray:
        """Cell names, ``str [n_cells]``.

        Raises
        ------
        ValueError
            Two cells share a name, or there are not as many names as rows.
        """
        names = _index(self._obs)
        if len(names) != self.n_cells:
            raise ValueError(f"{self.where}: {self.n_cells} rows but {len(names)} cells in obs; the file is damaged")
        if (twice := _first_duplicate(names)) is not None:
            raise ValueError(f"{self.where}: cell {twice!r} occurs more than once; run adata.obs_names_make_unique()")
        return names

    def obs(self, key: str) -> np.ndarray:
        """One column of obs as text.

        Returns
        -------
        object [n_cells]
            ``str``, or None where the value is missing; a whole number is its digits, whether the file has it as
            integer or as floating point.

        Raises
        ------
        ValueError
            No such column; the nearest one is named.
        """
        import pandas as pd

        if isinstance(self._obs, pd.DataFrame):
            column = self._obs.get(key)
            known = list(self._obs.columns)
        else:
            known = [str(k) for k in self._obs.attrs["column-order"]]
            column = legacy.column(self._obs, key) if key in known else None
        if column is None:
            raise ValueError(f"{self.where}: obs has no column {key!r}{nearest(key, map(str, known))}")
        code, values = pd.factorize(pd.Series(column))
        return np.array([*map(_as_text, values), None], dtype=object)[code]

    @cached_property
    def bytes_per_cell(self) -> float:
        """Mean bytes that one cell takes in memory while it is read: how many to read at once."""
        item = np.dtype(self._matrix.dtype).itemsize
        if isinstance(self._matrix, np.ndarray) or not hasattr(self._matrix, "nnz"):
            return float(item * len(self.genes))
        return self._matrix.nnz / max(self.n_cells, 1) * (item + 8) + 8

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Rows ``start <= row < stop`` as CSR ``[stop - start, g]`` in the dtype of the file, values unchecked.

        Raises
        ------
        ValueError
            Rows out of range, or the file cannot be read there.
        """
        if not 0 <= start <= stop <= self.n_cells:
            raise ValueError(f"{self.where}: rows {start} to {stop} asked, it has {self.n_cells}")
        try:
            rows = self._matrix[start:stop]
        except (OSError, RuntimeError) as e:
            raise unreadable(f"{self.where}: rows {start} to {stop}", e) from e
        rows = sparse.csr_matrix(rows if sparse.issparse(rows) else np.asarray(rows))
        if rows.shape[0] != stop - start or (
            rows.nnz and not 0 <= rows.indices.min() <= rows.indices.max() < len(self.genes)
        ):
            raise ValueError(f"{self.where}: rows {start} to {stop} do not fit obs and var; the file is damaged")
        return rows

    def close(self) -> None:
        """Close the file, if there is one."""
        if hasattr(self._file, "close"):
            self._file.close()


def in_memory(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    """The matrix of a layer (as in `Source.open`) of an AnnData in memory, and where its genes are.

    Raises
    ------
    ValueError
        There is none.
    """
    if layer is None:
        if adata.X is None:
            raise ValueError("AnnData has no X; choose a raw-count layer with layer=")
        return adata.X, "var"
    if layer in adata.layers:
        return adata.layers[layer], "var"
    if layer == "raw" and adata.raw is not None:
        return adata.raw.X, "raw/var"
    known = [*layer_names(adata), *(["raw"] if adata.raw is not None else [])]
    raise ValueError(f"AnnData has no layer {layer!r}{nearest(layer, known)}")


def refuse_layer(path: str | Path, layer: str | None) -> None:
    """Refuse a layer of a 10x matrix.

    Raises
    ------
    ValueError
        There is one.
    """
    if layer is not None:
        raise ValueError(f"{path} is a 10x matrix and has no layers, {layer!r} was asked; leave --layer out")


def layer_names(adata: AnnData) -> list[str]:
    """Names of an AnnData's layers; anndata 0.13 lists X among them, under None."""
    return [name for name in adata.layers if name is not None]


def codes(values: np.ndarray, vocabulary: Sequence[str] | None = None) -> np.ndarray:
    """Code an obs column as `Source.obs` gives it: ``int64 [n]``, -1 where missing or not in the vocabulary.

    Parameters
    ----------
    values
        ``object [n]``, ``str`` or None.
    vocabulary
        Values in code order; None is the sorted values that occur.
    """
    import pandas as pd

    return pd.Categorical(pd.Series(values, dtype=object), categories=vocabulary).codes.astype(np.int64)


_KINDS = "an h5ad file, an AnnData zarr folder, a 10x h5 file or a folder with a matrix.mtx"
_WHOLE = "so it is brought into the order of its cells first, on disk"


class _Columns:
    """The same rows, some of the columns (``keep``, ascending) of ``matrix``."""

    def __init__(self, matrix: Any, keep: np.ndarray, where: str) -> None:
        self._matrix, self._keep = matrix, keep
        self.shape, self.dtype = (matrix.shape[0], len(keep)), matrix.dtype
        self.nnz = getattr(matrix, "nnz", matrix.shape[0] * len(keep))
        if len(matrix.shape) != 2 or int(keep[-1]) >= matrix.shape[1]:
            raise ValueError(f"{where}: {matrix.shape} is not cells and the features of var; the file is damaged")

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        counts = self._matrix[rows]
        if not sparse.issparse(counts):
            return np.asarray(counts)[:, self._keep]
        if counts.nnz and not 0 <= counts.indices.min() <= counts.indices.max() < counts.shape[1]:
            raise OSError(f"an entry of feature {counts.indices.max()}, there are {counts.shape[1]}")
        return counts[:, self._keep]


class _CsrRows:
    """Row slices of a CSR group on disk (h5py or zarr): ``matrix[start:stop]``."""

    def __init__(self, group: Any, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._data, self._indices, self._indptr = group["data"], group["indices"], group["indptr"]
        self.dtype, self.nnz = self._data.dtype, int(self._data.shape[0])

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        indptr = np.asarray(self._indptr[rows.start : rows.stop + 1]).astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        data, indices = np.asarray(self._data[first:last]), np.asarray(self._indices[first:last])
        if len(data) != last - first or (np.diff(indptr) < 0).any():
            raise OSError(f"{last - first} entries promised, {len(data)} found")
        return sparse.csr_matrix((data, indices, indptr - first), shape=(rows.stop - rows.start, self.shape[1]))


def _open_h5(path: Path) -> Any:
    import h5py

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give {_KINDS}")
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401 (its import makes its filters known)
    try:
        return h5py.File(path, "r")
    except OSError as e:
        if isinstance(e, PermissionError) or "unable to lock file" in str(e):
            raise unreadable(str(path), e) from e
        raise ValueError(f"{path} cannot be opened as h5ad ({e}): truncated, or not an h5ad file; give {_KINDS}") from e


def _open_zarr(path: Path) -> Any:
    import zarr

    try:
        return zarr.open_group(str(path), mode="r", use_consolidated=False)
    except (FileNotFoundError, ValueError, KeyError) as e:
        raise ValueError(f"{path} cannot be opened as a zarr folder ({e}); give {_KINDS}") from e


def _layer(root: Any, layer: str | None, path: str) -> tuple[Any, str]:
    """The element that holds the matrix, and where its genes are."""
    layers = list(root["layers"]) if "layers" in root else []
    if layer is None:
        if "X" not in root or _encoding(root["X"]) == "null":
            raise ValueError(f"{path} has no X; choose one of its layers with --layer: {', '.join(layers) or 'none'}")
        return root["X"], "var"
    if layer in layers:
        return root["layers"][layer], "var"
    has_raw = ("raw" in root and "X" in root["raw"]) or "raw.X" in root
    if layer == "raw" and has_raw:
        return (root["raw.X"], "raw.var") if "raw.X" in root else (root["raw"]["X"], "raw/var")
    raise ValueError(f"{path} has no layer {layer!r}{nearest(layer, [*layers, *(['raw'] if has_raw else [])])}")


def _encoding(element: Any) -> str:
    return str(element.attrs.get("encoding-type", ""))


def rows_of(element: Any, where: str) -> Any:
    """A matrix on disk (group or array of h5py or zarr) by row: something whose ``[start:stop]`` gives rows."""
    from anndata.io import sparse_dataset

    if not (_encoding(element).endswith("_matrix") or "h5sparse_format" in element.attrs):
        if len(getattr(element, "shape", ())) != 2:
            raise ValueError(f"{where}: encoding {_encoding(element)!r} is neither a sparse nor a dense matrix")
        return element
    backed = sparse_dataset(element)
    return _CsrRows(element, backed.shape) if backed.format == "csr" else Csc(element, backed.shape, where)


def _turned(stored: ByGene | None, path: Path, layer: str | None, folder: str | Path | None) -> Turned | None:
    """The rows of a matrix that was turned, if it was turned from this one."""
    if folder is None:
        return None
    if stored is None:
        raise ValueError(f"{path} is stored cell by cell, it cannot have been turned in {folder}; leave turned= out")
    turned = Turned(folder, stored.shape)
    if (turned.stamp, turned.layer, turned.nnz, turned.dtype) != (files.stamp(path), layer, stored.nnz, stored.dtype):
        raise ValueError(f"{folder} was turned from another file, layer or version than {path}; delete it")
    return turned


def _as_text(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float | np.floating) and float(value).is_integer() else str(value)


def _kinds(var: Any) -> np.ndarray | None:
    """``feature_types`` of a var (a DataFrame, or its group on disk), if it has them."""
    if legacy.compound(var) or "feature_types" not in var:
        return None
    column = var["feature_types"] if hasattr(var, "index") else legacy.column(var, "feature_types")
    return np.asarray(column).astype(str)


def frame_index(root: Any, key: str) -> np.ndarray:
    """Row names of the obs or var ``key`` of an AnnData on disk."""
    return _index(legacy.frame(root, key) if legacy.compound(root[key]) else root[key])


def _index(frame: Any) -> np.ndarray:
    """Row names of a DataFrame, or of its group on disk."""
    from anndata.io import read_elem

    if hasattr(frame, "index"):
        return np.asarray(frame.index, dtype=str)
    return np.asarray(read_elem(frame[frame.attrs["_index"]]), dtype=object).astype(str)


def _first_duplicate(names: np.ndarray) -> str | None:
    import pandas as pd

    twice = pd.Index(names).duplicated()
    return str(names[int(np.argmax(twice))]) if twice.any() else None
