"""The input of a job by row ranges: a store, a file of AnnData or 10x, or cells that are yet to be generated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from distdiff import files
from distdiff.component import nearest
from distdiff.data.ingest import container, legacy
from distdiff.data.ingest.damage import reading
from distdiff.data.ingest.source import Source
from distdiff.data.store.store import CountStore
from distdiff.tasks.made import generated_names

CACHE = 8 << 20
"""Bytes of coded blocks kept in memory; rows are read in order, each once."""


class StoreRows:
    """A distdiff store, with the methods of a Source."""

    def __init__(self, store: CountStore) -> None:
        self.store, self.n_cells, self.genes, self.where = store, store.n_cells, store.genes, store.url
        self.fingerprint = store.manifest.fingerprint
        self.labels: Mapping[str, Sequence[str]] = store.manifest.labels
        self.frame: Path | None = None

    @cached_property
    def obs_names(self) -> np.ndarray:
        """Names of all cells; :meth:`names` reads some."""
        return self.names(0, self.n_cells)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of a row range."""
        return self.store.read(np.arange(start, stop))

    def obs(self, key: str) -> np.ndarray:
        """Values of a label, ``None`` where missing."""
        if key not in self.labels:
            raise ValueError(f"the store has no label {key!r}{nearest(key, self.labels)}; shard it with labels={key}")
        values = np.array([*self.labels[key], None], dtype=object)
        return values[self.codes(key, 0, self.n_cells)]

    def names(self, start: int, stop: int) -> np.ndarray:
        """Names of a row range, ``str [n]``."""
        return self.store.names(np.arange(start, stop))

    def codes(self, key: str, start: int, stop: int) -> np.ndarray:
        """Codes of a label in a row range, -1 where missing."""
        return self.store.labels(np.arange(start, stop), [key])[key]


class FileRows:
    """A file of AnnData or 10x: its counts, and what an output takes over from it."""

    def __init__(self, path: Path, layer: str | None) -> None:
        path = path.expanduser()
        self.source = Source.open(path, layer=layer, every=True)
        self.n_cells, self.genes, self.where = self.source.n_cells, self.source.genes, self.source.where
        self.read, self.obs = self.source.read, self.source.obs
        self.fingerprint, self.expressed = files.stamp(path), self.source.expressed
        self.labels: Mapping[str, Sequence[str]] = {}
        self.frame = path if _is_anndata(path) else None
        """The AnnData file whose obs an output inherits, where the input is one."""
        self.var = self.source.var
        """Where in that file the genes of the counts are."""
        self.layer = layer
        if self.frame is not None and not from_table(self.frame):
            container.check(self.frame)

    def whole(self, genes: Sequence[str]) -> bool:
        """Whether everything in the file with a value a gene fits a result of these genes as it is."""
        if self.frame is None or tuple(genes) != tuple(self.genes):
            return False
        if self.var == "var":
            return True
        with opened_anndata(self.frame) as root:
            return tuple(container.names_of(root, "var", self.where).tolist()) == tuple(genes)

    def left_out(self) -> list[str]:
        """Names of what a result of other genes cannot keep.

        X where counts of a layer take its place; whatever has a value for each gene of X where the counts are those of
        ``raw``; and what is neither a matrix nor a table.
        """
        if self.frame is None:
            return []
        with opened_anndata(self.frame) as root:
            names = ["X"] if self.layer is not None and "X" in root else []
            for key in ("layers", "varm", "varp"):
                for name in root.get(key, ()):
                    if self.var != "var" or not by_columns(root[key][name]):
                        names.append(f"{key}/{name}")
        return names

    @property
    def obs_names(self) -> np.ndarray:
        """Names of all cells."""
        return self.source.obs_names

    def names(self, start: int, stop: int) -> np.ndarray:
        """Names of a row range, ``str [n]``."""
        return self.source.obs_names[start:stop]


class NewRows:
    """Cells that do not exist yet, with the labels that they are to have.

    Parameters
    ----------
    codes
        Label -> ``int64 [n]`` codes.
    vocabularies
        Label -> its values in code order.
    """

    def __init__(
        self, n: int, genes: tuple[str, ...], codes: Mapping[str, np.ndarray], vocabularies: Mapping[str, Sequence[str]]
    ) -> None:
        self.n_cells, self.genes, self.where, self.fingerprint = n, genes, "generated", ""
        self._codes, self.labels = codes, {k: vocabularies[k] for k in codes}
        self.frame: Path | None = None

    def names(self, start: int, stop: int) -> np.ndarray:
        """Names of a row range, ``str [n]``."""
        return generated_names(start, stop)

    def codes(self, key: str, start: int, stop: int) -> np.ndarray:
        """Codes of a label in a row range."""
        return self._codes[key][start:stop]


def by_columns(elem: Any) -> bool:
    """Whether an element of a file is one of which columns or rows can be taken: a matrix of numbers, or a table."""
    if hasattr(elem, "keys"):
        return elem.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix", "dataframe")
    return elem.ndim == 2 and elem.dtype.kind in "biuf"


@contextlib.contextmanager
def opened_anndata(path: Path) -> Iterator[Any]:
    """An h5ad file or an AnnData zarr folder, open for reading; one from before anndata 0.7 as it is written today."""
    with container.opened(path) as root:
        if "obs" not in root or not legacy.compound(root["obs"]):
            yield root
            return
    with legacy.anew(path) as root:
        yield root


def from_table(path: Path) -> bool:
    """Whether an AnnData file is from before anndata 0.7."""
    with container.opened(path) as root, reading(str(path)):
        return legacy.compound(root["obs"])


def _is_anndata(path: Path) -> bool:
    if path.is_dir() and not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
        return False  # 10x mtx
    if path.is_file() and not _is_hdf5(path):
        return False
    with container.opened(path) as root, reading(str(path)):
        return "obs" in root and "var" in root


def _is_hdf5(path: Path) -> bool:
    import h5py

    return bool(h5py.is_hdf5(path))


def is_store(path: Path | str) -> bool:
    """Whether there is a distdiff store (or the URL of one)."""
    return files.is_url(path) or (Path(path) / "manifest.json").exists()


def open_rows(path: Path | str, layer: str | None = None) -> Any:
    """Open the input of a job.

    Raises
    ------
    ValueError
        A layer of a store, or what `Source.open` and `CountStore.open` refuse.
    """
    if not is_store(path):
        return FileRows(Path(path), layer)
    if layer is not None:
        raise ValueError(f"layer={layer!r}: a store has no layers; leave layer= out")
    return StoreRows(CountStore.open(path, cache_bytes=CACHE))
