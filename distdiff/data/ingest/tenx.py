"""What Cell Ranger and its likes write: h5 files (v2, v3) and folders with a matrix.mtx, features x barcodes."""

from __future__ import annotations

import gzip
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distdiff.data.ingest import foreign
from distdiff.data.ingest.bygene import ByGene, Triplets
from distdiff.data.ingest.damage import InputError, reading

EXPRESSION = "Gene Expression"
"""The feature type that is read where there is any."""

TEXT = (1 << 16, 1 << 24)
"""Bytes of text to parse at once, at least and at most."""


@dataclass(frozen=True)
class Features:
    """What names a 10x matrix.

    Attributes
    ----------
    genes
        ``str [g]``, unique; the names of the features that are kept, in their order.
    keep
        ``int64 [g]``, which features of the file these are; None is all of them.
    note
        What was left out or renamed, or empty.
    """

    genes: np.ndarray
    keep: np.ndarray | None
    note: str


def is_h5(root: Any) -> bool:
    """Whether an open h5 file is a 10x matrix."""
    return bool(_genomes(root))


def open_h5(root: Any, where: str) -> tuple[Any, tuple[int, int], Features, np.ndarray]:
    """What an open 10x h5 file holds; its CSC of features x barcodes is a CSR of cells x genes.

    Returns
    -------
    group, shape, features, barcodes
        Group with ``data``, ``indices``, ``indptr``; (cells, features); names; ``str [cells]``.

    Raises
    ------
    ValueError
        Several genomes, or parts of the file are missing or do not fit each other.
    """
    genomes = _genomes(root)
    if len(genomes) > 1:
        raise ValueError(
            f"{where} holds several genomes: {', '.join(genomes)}; write one to an h5ad file with "
            "scanpy.read_10x_h5(path, genome=NAME).write_h5ad(...) and give that"
        )
    with reading(where):
        group = root[genomes[0]]
        n_features, n = (int(i) for i in group["shape"][:])
        v3 = "features" in group
        names = _text(group["features/name"] if v3 else group["gene_names"])
        kinds = _text(group["features/feature_type"]) if v3 and "feature_type" in group["features"] else None
        barcodes = _text(group["barcodes"])
    _fit(where, len(names), len(barcodes), (n_features, n))
    return group, (n, n_features), _features(names, kinds, where), barcodes


def mtx_of(path: Path) -> Path | None:
    """The matrix.mtx that a path is or that its folder holds, or None.

    Raises
    ------
    ValueError
        The folder holds several.
    """
    if not path.is_dir():
        return path if path.name.endswith((".mtx", ".mtx.gz")) else None
    found = sorted(f for f in path.iterdir() if f.name.endswith(("matrix.mtx", "matrix.mtx.gz")) and f.name[0] != ".")
    if len(found) > 1:
        raise ValueError(f"{path} holds several matrices: {', '.join(f.name for f in found)}; give the path of one")
    return found[0] if found else None


def open_mtx(path: Path) -> tuple[Mtx, Features, np.ndarray]:
    """A matrix.mtx with the barcodes and features (or genes) beside it; each may be gzipped.

    The others are looked for under the same prefix: ``S1_matrix.mtx`` goes with ``S1_barcodes.tsv``.

    Returns
    -------
    matrix, features, barcodes
        Cells x features; names; ``str [cells]``.

    Raises
    ------
    FileNotFoundError
        One of the three is missing.
    ValueError
        Not such files, or they do not fit each other.
    """
    matrix = Mtx(path)
    stem = path.name.removesuffix(".gz").removesuffix("matrix.mtx")
    prefix = "" if stem.endswith(".mtx") else stem
    barcodes = _table(_beside(path, prefix, "barcodes"))[0]
    table = _table(_beside(path, prefix, "features", "genes"))
    _fit(str(path), len(table), len(barcodes), matrix.shape[::-1])
    names = table[1 if 1 in table else 0].to_numpy(str)
    kinds = table[2].to_numpy(str) if 2 in table else None
    return matrix, _features(names, kinds, str(path)), barcodes.to_numpy(str)


class Mtx(ByGene):
    """A Matrix Market file of features x barcodes as cells x features; only its head is read before it is asked for.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        No Matrix Market file of real or whole numbers, listed by entry.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a matrix.mtx, its folder, or an h5ad file")
        self.path, self.where = path, str(path)
        with reading(self.where), self._open() as f:
            head = f.readline().decode("latin-1").lower().split()
            sizes = f.readline()
            while sizes.startswith(b"%") or (sizes and not sizes.strip()):
                sizes = f.readline()
            self._body = f.tell()
        if head[:3] != ["%%matrixmarket", "matrix", "coordinate"] or head[4:] != ["general"]:
            raise ValueError(
                f"{path} starts with {' '.join(head)[:80]!r}; a 10x matrix starts with '%%MatrixMarket matrix "
                "coordinate integer general'"
            )
        if head[3] not in ("integer", "real"):
            raise ValueError(f"{path}: its entries are {head[3]!r}, not whole or real numbers; counts are needed")
        numbers = sizes.split()
        if len(numbers) != 3 or not all(i.isdigit() for i in numbers):
            raise ValueError(f"{path}: {sizes[:80]!r} is not rows, columns and entries; the file is damaged")
        features, cells, self.nnz = (int(i) for i in numbers)
        self.shape = (cells, features)
        self.dtype = np.dtype(np.int64 if head[3] == "integer" else np.float64)

    def cuts(self, entries: int) -> list[tuple[int, int]]:
        """Ranges of bytes, a line belongs to where it starts; of entries if gzipped: that can only be read through."""
        if self._gzipped:
            return [(0, self.nnz)]
        size = self.path.stat().st_size
        step = max(-((self._body - size) // max(-(-self.nnz // entries), 1)), 1)
        return [(at, min(at + step, size)) for at in range(self._body, size, step)] or [(size, size)]

    def pieces(self, start: int, stop: int, entries: int) -> Iterator[Triplets]:
        end, found = None if self._gzipped else stop, 0
        index = np.int32 if max(self.shape) < 2**31 else np.int64
        rows, columns, values = np.empty(entries, index), np.empty(entries, index), np.empty(entries, self.dtype)
        for block in self._blocks(None if self._gzipped else start, end, min(max(entries, TEXT[0]), TEXT[1])):
            for part in range(0, len(block[0]), entries):
                r, c, v = (i[part : part + entries] for i in block)
                if found + len(r) > entries:
                    yield rows[:found], columns[:found], values[:found]
                    found = 0
                to = slice(found, found + len(r))
                self.check(r, c)
                rows[to], columns[to], values[to] = r, c, v
                found += len(r)
        if found:
            yield rows[:found], columns[:found], values[:found]

    def load(self) -> Any:
        whole = super().load()
        if whole.nnz != self.nnz:
            raise ValueError(f"{self.where}: {self.nnz} entries promised, {whole.nnz} found; truncated or damaged: "
                             "copy the file again")  # fmt: skip
        return whole

    def _blocks(self, start: int | None, stop: int | None, text_bytes: int) -> Iterator[Triplets]:
        """Cells, features (both from 0) and values of some lines at a time."""
        with self._open() as f:
            with reading(self.where):
                at = self._body if start is None else start
                if at > self._body:
                    f.seek(at - 1)
                    at += len(f.readline()) - 1
                else:
                    f.seek(self._body)
            while stop is None or at < stop:
                with reading(self.where):
                    text = f.read(text_bytes if stop is None else min(text_bytes, stop - at))
                    if text[-1:] != b"\n":
                        text += f.readline()
                if not text:
                    return
                at += len(text)
                if not text.isspace():
                    yield self._parse(text)

    def _parse(self, text: bytes) -> Triplets:
        import pandas as pd

        kinds = {0: np.int64, 1: np.int64, 2: self.dtype}
        try:
            table = pd.read_csv(io.BytesIO(text), sep=r"\s+", header=None, dtype=kinds, float_precision="round_trip")
            if table.shape[1] != 3:
                raise ValueError(f"{table.shape[1]} numbers a line")
        except ValueError as e:
            raise ValueError(
                f"{self.where}: not every line is a feature, a barcode and a count ({e}); truncated or damaged: copy "
                "the file again"
            ) from e
        values = table[2].to_numpy()
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise ValueError(f"{self.where}: an entry has no value; truncated or damaged: copy the file again")
        return table[1].to_numpy() - 1, table[0].to_numpy() - 1, values

    @property
    def _gzipped(self) -> bool:
        return self.path.name.endswith(".gz")

    def _open(self) -> io.BufferedIOBase:
        return gzip.open(self.path, "rb") if self._gzipped else open(self.path, "rb")


def _genomes(root: Any) -> list[str]:
    """Groups that hold a 10x matrix: ``matrix`` since v3, one a genome before."""
    v3 = {"barcodes", "data", "indices", "indptr", "shape", "features"}
    v2 = {"barcodes", "data", "indices", "indptr", "shape", "gene_names"}
    groups = [k for k in root if hasattr(root[k], "keys") and (v3 <= set(root[k]) or v2 <= set(root[k]))]
    return ["matrix"] if "matrix" in groups else groups


def expression(kinds: np.ndarray | None, where: str) -> tuple[np.ndarray | None, str]:
    """Which features are gene expression where some are not (``int64``, ascending; else None), and what to tell.

    Parameters
    ----------
    kinds
        ``str [features]``, as Cell Ranger names them (GEX is understood, too); None is not known.
    """
    if kinds is None or not (other := ~np.isin(kinds, (EXPRESSION, "GEX"))).any():
        return None, ""
    found, n = np.unique(kinds[other], return_counts=True)
    counts_by_kind = ", ".join(f"{i} {what}" for what, i in zip(found, n, strict=True))
    if other.all():
        return None, f"{where}: has no {EXPRESSION}, all of its features are read ({counts_by_kind})"
    return np.flatnonzero(~other), (
        f"{where}: only {EXPRESSION} is read, {other.sum()} other features were left out ({counts_by_kind})"
    )


def _features(names: np.ndarray, kinds: np.ndarray | None, where: str) -> Features:
    if (names == "").any():
        at = int(np.argmax(names == "")) + 1
        raise InputError(f"{where}: feature {at}, counted from 1, has no name; the file is damaged: copy it again")
    keep, note = expression(kinds, where)
    notes = [note] if note else []
    if keep is not None:
        names = names[keep]
    once = unique(names)
    if (renamed := np.flatnonzero(once != names)).size:
        first = renamed[0]
        notes.append(
            f"{where}: {renamed.size} genes have the symbol of one before them and got a number, "
            f"{str(names[first])!r} became {str(once[first])!r}"
        )
    return Features(once, keep, "; ".join(notes))


def unique(names: np.ndarray) -> np.ndarray:
    """Names, each once: one that occurs again gets ``-1``, ``-2`` ..."""
    import pandas as pd
    from anndata.utils import make_index_unique

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a made name that exists already: it takes the next number
        return np.asarray(make_index_unique(pd.Index(names.astype(object))), dtype=str)


def _text(dataset: Any) -> np.ndarray:
    values = dataset[:]
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else dataset.asstr()[:].astype(str)


def _table(path: Path) -> Any:
    """A file of tab-separated text; nothing in it is a number, a quote or missing."""
    import csv

    import pandas as pd

    with reading(str(path)):
        try:
            return pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
        except pd.errors.EmptyDataError:
            return pd.DataFrame({0: np.empty(0, dtype=str), 1: np.empty(0, dtype=str)})
        except pd.errors.ParserError as e:
            raise InputError(f"{path} is no table of tab-separated text ({e}); copy it again") from e


def _beside(path: Path, prefix: str, *names: str) -> Path:
    wanted = [f"{prefix}{name}.tsv{gz}" for name in names for gz in ("", ".gz")]
    for name in wanted:
        if (path.parent / name).exists():
            return path.parent / name
    what = foreign.by_content(path.parent)
    raise FileNotFoundError(f"{path.parent} has no {' or '.join(wanted)}; {what or f'put it beside {path.name}'}")


def _fit(where: str, features: int, barcodes: int, shape: tuple[int, ...]) -> None:
    if (features, barcodes) != shape:
        why = "it lists cells x genes: transpose it" if (barcodes, features) == shape else (
            "the files do not belong together, or one is truncated")  # fmt: skip
        raise ValueError(
            f"{where} is {shape[0]} x {shape[1]} but has {features} features and {barcodes} barcodes; {why}"
        )
