"""Which cells a model was trained on: a filter of their hashes that travels in the model's folder (docs/MATHS.md 15).

The filter answers "was a cell with exactly these counts among the training cells?" with no wrong "no" and, once in a
million, a wrong "yes". It holds no counts. Who has the filter and a cell can ask about that cell; with a salt
(`SALT`), only who has the salt too. A cell that was thinned, or normalised, is another cell.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from scipy import sparse

from distdiff import received
from distdiff.data.counts import mixed

FILE = "seen.safetensors"
"""Name of the filter in a model's folder."""

SALT = "DISTDIFF_SALT"
"""Environment variable with the salt of ``train.manifest: salted``."""

BITS, HASHES = 29, 20
"""Bits of the filter a cell, and how many of them a cell sets: wrongly found is one cell in a million."""

LEAST = 8
"""Expressed genes that a cell needs: two cells with fewer may well be equal by chance, so none is claimed."""

CELLS = 8192
"""Cells that are hashed at once."""

_GENE, _COUNT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True, eq=False)
class Seen:
    """Filter of the training cells of a model (docs/MATHS.md 15.2).

    Attributes
    ----------
    cells
        Training cells in it.
    bits
        ``uint8 [ceil(29 cells / 8)]``.
    salted
        First digits of the SHA-256 of the salt, or empty.

    Examples
    --------
    >>> from distdiff import CountStore
    >>> from distdiff.seen import Seen
    >>> store = CountStore.open("atlas.zarr")
    >>> seen = Seen.of(len(store.rows("train")), (store.read(store.rows("train")),))
    >>> trained, fresh = (seen.found(store.read(store.rows(split))) for split in ("train", "test"))
    >>> bool(trained.mean() > 0.9), int(fresh.sum())  # a few cells have less than 8 genes
    (True, 0)
    """

    cells: int
    bits: np.ndarray
    salted: str = ""

    @classmethod
    def of(cls, cells: int, blocks: Iterable[sparse.csr_matrix], *, salt: str = "") -> Seen:
        """Make the filter of so many cells.

        Parameters
        ----------
        cells
            Number of cells in all blocks.
        blocks
            Counts ``[n g]``, the genes of the model in its order.
        salt
            A secret; empty: none.
        """
        size = _size(cells)
        bits, key = np.zeros(size, dtype=np.uint8), _key(salt)
        for block in blocks:
            hashes, enough = cell_hashes(block, key=key)
            at = _places(hashes[enough], size)
            np.bitwise_or.at(bits, at >> 3, np.uint8(1) << (at & 7).astype(np.uint8))
        return cls(cells, bits, _digest(salt))

    def found(self, counts: sparse.csr_matrix, columns: np.ndarray | None = None) -> np.ndarray:
        """Which cells were trained on, ``bool [n]``.

        Parameters
        ----------
        counts
            ``[n g_in]``; a number that is not finite counts as 0.
        columns
            ``int [g_in]``, where each gene is among the model's, -1 for genes that it does not know; None: as they are.

        Raises
        ------
        ValueError
            The filter has a salt, and the environment has another or none.
        """
        if why := self.closed():
            raise ValueError(why)
        hashes, enough = cell_hashes(counts, columns, key=_key(os.environ.get(SALT, "") if self.salted else ""))
        at = _places(hashes, len(self.bits))
        return enough & ((self.bits[at >> 3] >> (at & 7).astype(np.uint8)) & 1).all(1)

    def closed(self) -> str:
        """Why nothing can be asked here, or nothing."""
        if self.salted and _digest(os.environ.get(SALT, "")) != self.salted:
            return f"the filter of the training cells has a salt, and {SALT} is not that; ask who trained the model"
        return ""

    def to_bytes(self) -> bytes:
        """The file."""
        return save({"bits": self.bits})

    def about(self) -> dict[str, Any]:
        """What ``model.json`` says of it, besides the SHA-256 of the file."""
        return {"cells": self.cells, "salted": self.salted}

    @classmethod
    def read(cls, folder: Path, about: Mapping[str, Any]) -> Seen:
        """The filter in a model's folder, checked against ``model.json``.

        Raises
        ------
        ValueError
            It is missing, is not the file that was saved, or has another size than its number of cells asks for.
        """
        path, cells, salted = folder / FILE, about.get("cells"), about.get("salted")
        if not isinstance(cells, int) or isinstance(cells, bool) or cells < 0 or not isinstance(salted, str):
            raise ValueError("model.json: info.seen must hold a number of cells and a text salted")
        try:
            same = received.sha256(path) == about.get("sha256")
            tensors = received.tensors_of(path) if same else {}
        except OSError:
            raise ValueError(f"{FILE}, the filter of the training cells, is missing; copy the folder again") from None
        if not same:
            raise ValueError(
                f"{FILE} is not the file that was saved with model.json (another sha256); copy the folder again from "
                "where it was made"
            )
        bits = tensors["bits"].numpy() if "bits" in tensors else np.zeros(0)
        if bits.dtype != np.uint8 or bits.shape != (_size(cells),):
            raise ValueError(f"{FILE} holds {bits.shape} bytes, {_size(cells)} are wanted for {cells} cells")
        return cls(cells, bits, salted)


def salt_of(manifest: str) -> str:
    """The salt that ``train.manifest`` asks for: that of the environment, or none.

    Raises
    ------
    ValueError
        ``salted``, and there is none.

    Examples
    --------
    >>> from distdiff.seen import salt_of
    >>> salt_of("cells")
    ''
    """
    if manifest != "salted":
        return ""
    if not (salt := os.environ.get(SALT, "")):
        raise ValueError(f"train.manifest=salted: set {SALT} to a secret, or take cells (no salt) or none (no filter)")
    return salt


def counter(seen: Seen | None, columns: np.ndarray, absent: int) -> tuple[Callable[[sparse.csr_matrix], int], str]:
    """How to count the training cells in blocks of an input, and why that cannot be told, or nothing.

    Parameters
    ----------
    columns
        As in `Seen.found`.
    absent
        Genes of the model that the input lacks.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.seen import counter
    >>> counter(None, np.arange(30), 0)[1]
    'the model holds no filter of its training cells'
    """
    why = "the model holds no filter of its training cells" if seen is None else seen.closed()
    if not why and absent:
        why = f"the input lacks {absent} of the model's genes"
    if why or seen is None:
        return lambda counts: 0, why
    return lambda counts: int(seen.found(counts, columns).sum()), ""


def cell_hashes(
    counts: sparse.csr_matrix, columns: np.ndarray | None = None, *, key: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Hash of each cell, whatever the order of its entries (docs/MATHS.md 15.1), and whether it has enough genes.

    Parameters
    ----------
    counts, columns
        As in `Seen.found`.
    key
        Of the salt.

    Returns
    -------
    hashes : uint64 [n]
        A sum over expressed genes, modulo 2^64.
    enough : bool [n]
        Whether at least 8 genes are expressed.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> from distdiff.seen import cell_hashes
    >>> cell = sp.csr_matrix(np.arange(12.0)[None])
    >>> backwards = sp.csr_matrix(np.arange(12.0)[None, ::-1])
    >>> (cell_hashes(cell)[0] == cell_hashes(backwards, np.arange(12)[::-1])[0]).item()
    True
    """
    column = counts.indices if columns is None else columns[counts.indices]
    value = (
        np.nan_to_num(counts.data, nan=0.0, posinf=0.0, neginf=0.0) if counts.data.dtype.kind == "f" else counts.data
    )
    use = (column >= 0) & (value > 0)
    where = mixed(np.where(use, column, 0).astype(np.uint64) * _GENE + np.uint64(key))
    each = mixed(where ^ (np.where(use, value, 0).astype(np.uint64) * _COUNT))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(np.where(use, each, 0).astype(np.uint64))])
    expressed = np.concatenate([[0], np.cumsum(use)])
    first, last = counts.indptr[:-1], counts.indptr[1:]
    return sums[last] - sums[first], expressed[last] - expressed[first] >= LEAST


def _places(hashes: np.ndarray, size: int) -> np.ndarray:
    """Bits of each cell in a filter of ``size`` bytes, ``int64 [n 20]``."""
    several = hashes[:, None] + np.arange(1, HASHES + 1, dtype=np.uint64) * _GENE
    return (mixed(several) % np.uint64(8 * size)).astype(np.int64)


def _size(cells: int) -> int:
    """Bytes of the filter of so many cells."""
    return max(-(-BITS * cells // 8), 64)


def _key(salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little") if salt else 0


def _digest(salt: str) -> str:
    return hashlib.sha256(f"distdiff {salt}".encode()).hexdigest()[:8] if salt else ""
