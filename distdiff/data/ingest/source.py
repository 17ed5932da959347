"""One input file of counts, read by row slices: h5ad, AnnData zarr, 10x h5 or mtx, or an AnnData in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from distdiff import files
from distdiff.component import nearest
from distdiff.data.ingest import container, foreign, legacy, tenx
from distdiff.data.ingest.bycell import Columns, CsrRows, LazyRows, as_numbers, number_dtype
from distdiff.data.ingest.bygene import ByGene, Turned
from distdiff.data.ingest.damage import InputError, reading

if TYPE_CHECKING:
    from anndata import AnnData


ADDED = "distdiff_added"
"""Column of var: genes that an imputation appended, whose counts in X are 0 for want of any."""


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
        path = Path(path).expanduser()
        if mtx := tenx.mtx_of(path):
            refuse_layer(path, layer)
            matrix, features, barcodes = tenx.open_mtx(mtx)
            return cls._tenx(str(path), features, matrix, barcodes, turned=_turned(matrix, path, layer, turned))
        root = container.open_root(path)
        try:
            with reading(str(path)):
                return cls._of_root(root, path, layer, turned, every=every)
        except BaseException:
            _close(root)
            raise

    @classmethod
    def _of_root(
        cls, root: Any, path: Path, layer: str | None, turned: str | Path | None, *, every: bool
    ) -> Source:  # fmt: skip
        """The source over an open h5 file or zarr folder."""
        if not ("obs" in root and "var" in root):
            if not path.is_dir() and tenx.is_h5(root):
                refuse_layer(path, layer)
                group, shape, features, barcodes = tenx.open_h5(root, str(path))
                counts = CsrRows(group, shape, str(path))
                return cls._tenx(str(path), features, counts, barcodes, root, _turned(None, path, layer, turned))
            is_store = (path / "manifest.json").exists()
            hint = "it is a distdiff store already" if is_store else foreign.by_groups(root)
            hint = hint or (foreign.by_content(path) if path.is_dir() else "")
            raise InputError(
                f"{path} is no AnnData: it has no obs or no var; {f'{hint}; ' if hint else ''}give {foreign.KINDS}"
            )
        holder, var = container.matrix_of(root, layer, str(path))
        where = str(path) if layer is None else f"{path} (layer {layer!r})"
        matrix = container.rows_of(holder, where)
        genes = container.names_of(root, var, where)
        stored = matrix if isinstance(matrix, ByGene) else None
        other = _turned(stored, path, layer, turned)
        notes = ["" if stored is None or other else f"{where}: stored gene by gene (CSC), {_WHOLE}"]
        keep, note = tenx.expression(_kinds(root[var], len(genes), where, layer), where)
        rows: Any = other or matrix
        expressed = None
        if keep is not None and every:
            expressed = np.isin(np.arange(len(genes)), keep)
        elif keep is not None:
            rows, genes = Columns(rows, keep, where), genes[keep]
        note = "; ".join(filter(None, [*notes, "" if every else note]))
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
        table = frame_of((adata if var == "var" else adata.raw).var)
        x, note = _rows_in_memory(x, where)
        keep, _ = tenx.expression(_kinds(table, len(table), where, layer), where)
        expressed = None if keep is None else np.isin(np.arange(len(table)), keep)
        genes, stored = np.asarray(table.index, dtype=str), x if isinstance(x, ByGene) else None
        return cls._checked(where, genes, x, note, frame_of(adata.obs), None, stored, var, expressed)

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
            rows = Columns(rows, features.keep, where)
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
        if len(matrix.shape) != 2 or matrix.shape[1] != len(genes):
            raise InputError(
                f"{where}: {tuple(matrix.shape)[1:]} columns but {len(genes)} genes in var; the file is damaged"
            )
        number_dtype(matrix.dtype, where)
        n = len(obs) if hasattr(obs, "index") else container.row_count({"obs": obs}, "obs", where)
        if n != matrix.shape[0]:
            raise InputError(f"{where}: {matrix.shape[0]} rows but {n} cells in obs; the file is damaged")
        if (twice := _first_duplicate(genes)) is not None:
            raise InputError(f"{where}: gene {twice!r} occurs more than once; run adata.var_names_make_unique()")
        return cls(where, tuple(genes.tolist()), int(matrix.shape[0]), note, matrix, obs, file, stored, var, expressed)

    @property
    def by_gene(self) -> bool:
        """Whether rows need the matrix whole, unless it was turned before (`turn.slabs`, `turn.turn`)."""
        return self.stored is not None

    @cached_property
    def _names(self) -> tuple[np.ndarray, str]:
        """Cell names, each once, and what was renamed."""
        obs = self._obs
        names = (
            np.asarray(obs.index, dtype=str)
            if hasattr(obs, "index")
            else container.names_of({"obs": obs}, "obs", self.where)
        )
        if len(names) != self.n_cells:
            raise InputError(f"{self.where}: {self.n_cells} rows but {len(names)} cells in obs; the file is damaged")
        if (twice := _first_duplicate(names)) is None:
            return names, ""
        unique = tenx.unique(names)
        n = int((unique != names).sum())
        return unique, f"{self.where}: {n} cells have the name of one before them, such as {twice!r}, and got a number"

    @property
    def obs_names(self) -> np.ndarray:
        """Cell names, ``str [n_cells]``; one that occurs again gets ``-1``, ``-2`` ... (`renamed` tells).

        Raises
        ------
        ValueError
            There are not as many names as rows, or they cannot be read.
        """
        return self._names[0]

    @property
    def renamed(self) -> str:
        """What to know of cells whose names occur several times, or empty; reads the names."""
        return self._names[1]

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

        with reading(f"{self.where}: obs"):
            if isinstance(self._obs, pd.DataFrame):
                known = [str(name) for name in self._obs.columns]
                column = self._obs.get(key)
            else:
                known = container.columns_of(self._obs)
                column = container.column_of(self._obs, key, self.n_cells, f"{self.where}: obs")
            if column is None:
                raise InputError(f"{self.where}: obs has no column {key!r}{nearest(key, known)}")
            code, values = pd.factorize(pd.Series(column))
            return np.array([*map(as_text, values), None], dtype=object)[code]

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
        with reading(f"{self.where}: rows {start} to {stop}"):
            rows = self._matrix[start:stop]
            if sparse.issparse(rows):
                values = as_numbers(rows.data, self.where)
                rows = (
                    rows if values is rows.data else type(rows)((values, rows.indices, rows.indptr), shape=rows.shape)
                )
            rows = sparse.csr_matrix(rows if sparse.issparse(rows) else as_numbers(rows, self.where))
            if rows.shape != (stop - start, len(self.genes)) or (
                rows.nnz and not 0 <= rows.indices.min() <= rows.indices.max() < len(self.genes)
            ):
                raise InputError(f"{self.where}: rows {start} to {stop} do not fit obs and var; the file is damaged")
            return rows

    def close(self) -> None:
        """Close the file, if there is one."""
        _close(self._file)


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
        raise ValueError(f"{path} is a 10x matrix and has no layers, {layer!r} was given; leave layer= out")


def frame_of(table: Any) -> Any:
    """An obs or var as a DataFrame: that of an AnnData which `anndata.experimental.read_lazy` opened is read."""
    return table.to_memory() if hasattr(table, "to_memory") else table


def native(x: Any) -> Any:
    """A sparse matrix in a dtype that scipy computes with; itself if it is.

    Raises
    ------
    InputError
        It holds no numbers.
    """
    if x.dtype.kind == "b" or number_dtype(x.dtype, "AnnData") == x.dtype:
        return x
    if x.format not in ("csr", "csc"):
        return x.astype(number_dtype(x.dtype, "AnnData"))
    return type(x)((as_numbers(x.data, "AnnData"), x.indices, x.indptr), shape=x.shape)


def _rows_in_memory(x: Any, where: str) -> tuple[Any, str]:
    """A matrix of an AnnData, in memory, of dask or backed by a file, by row; and what to know of that."""
    if hasattr(x, "group") and hasattr(x, "backend"):  # backed: the group of a file
        rows = container.rows_of(x.group, where)
        return rows, f"{where}: stored gene by gene (CSC), it is read whole" if isinstance(rows, ByGene) else ""
    if hasattr(x, "dask"):
        return LazyRows(x), ""
    if sparse.issparse(x):
        x = native(x)
    if sparse.issparse(x) and x.format != "csr":
        return x.tocsr(), f"{where}: its {x.format} matrix was copied as CSR to read it by cell"
    return x, ""


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


_WHOLE = "so it is brought into the order of its cells first, on disk"


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


def as_text(value: Any) -> str:
    """The name of a label's value: whole numbers without decimals.

    Examples
    --------
    >>> from distdiff.data.ingest.source import as_text
    >>> as_text(3.0), as_text(True), as_text("B")
    ('3', 'True', 'B')
    """
    return f"{value:.0f}" if isinstance(value, float | np.floating) and float(value).is_integer() else str(value)


def _kinds(var: Any, n: int, where: str, layer: str | None) -> np.ndarray | None:
    """``feature_types`` of a var (a DataFrame, or its group on disk), if it has them.

    Genes that distdiff appended (`ADDED`) are a kind of their own, for they were not measured; the layers that it wrote
    (``imputed_mean`` ...) hold them.
    """

    def column(key: str) -> np.ndarray | None:
        if legacy.compound(var) or key not in var:
            return None
        found = var[key] if hasattr(var, "index") else container.column_of(var, key, n, f"{where}: var")
        return None if found is None else np.asarray(found)

    kinds, added = column("feature_types"), column(ADDED)
    kinds = None if kinds is None else kinds.astype(str)
    if added is None or (layer or "").startswith("imputed"):
        return kinds
    return np.where(added.astype(str) == "True", "completed by distdiff", tenx.EXPRESSION if kinds is None else kinds)


def _close(file: Any) -> None:
    if hasattr(file, "close"):
        file.close()


def _first_duplicate(names: np.ndarray) -> str | None:
    import pandas as pd

    twice = pd.Index(names).duplicated()
    return str(names[int(np.argmax(twice))]) if twice.any() else None
