"""Turn a matrix that is stored gene by gene, or as a list of entries, into row order on disk with bounded memory.

`slabs` cuts it into tasks, `turn` carries one out (in this process or on any worker that sees the files), and `Turned`
reads rows from what they wrote. A task writes one folder, which appears only when it is complete: a folder that is
there is finished, and tasks can be repeated or resumed in any order.

    folder/slab-000003/slab.json                 which part of which file this is, and how many slabs there are
    folder/slab-000003/{0,1,...}-rows.npy        [k] rows that have entries, ascending
    folder/slab-000003/{0,1,...}-starts.npy      [k + 1] where the entries of each of them start
    folder/slab-000003/{0,1,...}-columns.npy     [e]
    folder/slab-000003/{0,1,...}-values.npy      [e] in the narrowest dtype that holds them exactly
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distdiff import files, received
from distdiff.data.ingest import source, tenx
from distdiff.data.ingest.bygene import _PARTS, ByGene, by_row

ENTRY_BYTES = 64
"""Memory that one entry takes at most while it is turned."""


@dataclass(frozen=True)
class Slab:
    """One task: a part of a file to bring into row order.

    Attributes
    ----------
    path, layer
        As in `Source.open`.
    number, of
        Which one of how many.
    start, stop
        Its part ``start <= . < stop``: stored entries (CSC), bytes (mtx), entries (gzipped mtx, one slab for all).
    entries
        How many entries to hold in memory at once.
    stamp
        Which version of the file was cut.
    """

    path: str
    layer: str | None
    number: int
    of: int
    start: int
    stop: int
    entries: int
    stamp: str


def slabs(path: str | Path, layer: str | None, budget_bytes: int) -> list[Slab]:
    """Cut the matrix of a file into tasks for `turn`.

    Parameters
    ----------
    path, layer
        As in `Source.open`: an h5ad or AnnData zarr whose matrix is CSC, or a 10x mtx.
    budget_bytes
        Memory that one task may take, besides one number a gene: 64 bytes an entry, so 1 GiB is 16 million entries.

    Raises
    ------
    ValueError
        A budget below 64 bytes, a matrix that is stored cell by cell (read it as it is), or a damaged file.
    """
    if budget_bytes < ENTRY_BYTES:
        raise ValueError(f"budget_bytes={budget_bytes} is too little, one entry takes {ENTRY_BYTES}; give it more")
    entries = budget_bytes // ENTRY_BYTES
    with _opened(path, layer) as matrix:
        cuts = matrix.cuts(entries)
    version = files.stamp(path)
    return [Slab(str(path), layer, i, len(cuts), *cut, entries, version) for i, cut in enumerate(cuts)]


def turn(slab: Slab, folder: str | Path) -> int:
    """Bring one slab into row order: writes ``folder/slab-NUMBER``, or leaves it if it is finished already.

    Parameters
    ----------
    slab
        One of `slabs`.
    folder
        The same for all slabs of a file, and for no other file.

    Returns
    -------
    int
        Entries of the slab.

    Raises
    ------
    ValueError
        The file changed since it was cut or is damaged, or the finished slab is of another version or cut otherwise.
    OSError
        The disk is full.
    """
    target = Path(folder) / f"slab-{slab.number:06d}"
    done: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: it is turned anew
        done = received.json_of(target / "slab.json")
    if done.keys() >= {"nnz", *asdict(slab)}:
        if any(done[k] != v for k, v in asdict(slab).items() if k != "path"):
            raise ValueError(
                f"{target} was turned from another version of {slab.path}, or with another budget; delete {folder} and "
                "turn it all again"
            )
        return done["nnz"]
    if files.stamp(slab.path) != slab.stamp:
        raise ValueError(f"{slab.path} changed while it was being turned; delete {folder} and turn it all again")
    with _opened(slab.path, slab.layer) as matrix, files.whole(target, overwrite=True) as temporary:
        temporary.mkdir()
        pieces = nnz = 0
        for rows, columns, values in matrix.pieces(slab.start, slab.stop, slab.entries):
            _write(temporary / str(pieces), rows, columns, values, matrix.shape)
            pieces, nnz = pieces + 1, nnz + len(rows)
        record = {
            "pieces": pieces,
            "nnz": nnz,
            "promised": matrix.nnz,
            "shape": matrix.shape,
            "dtype": matrix.dtype.str,
        }
        (temporary / "slab.json").write_text(json.dumps(asdict(slab) | record, indent=1))
    return nnz


@contextlib.contextmanager
def _opened(path: str | Path, layer: str | None) -> Iterator[ByGene]:
    """The matrix alone: no names of cells, which may be many."""
    if mtx := tenx.mtx_of(Path(path)):
        source.refuse_layer(path, layer)
        yield tenx.Mtx(mtx)
        return
    opened = source.Source.open(path, layer)
    try:
        if opened.stored is None:
            raise ValueError(f"{opened.where} is stored cell by cell; there is nothing to turn, read it as it is")
        yield opened.stored
    finally:
        opened.close()


def _write(name: Path, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> None:
    """Sort one piece by row and save its parts."""
    rows, order = by_row(rows)
    new = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    starts = np.concatenate([new, [len(rows)]]).astype(np.min_scalar_type(len(rows)))
    parts = (rows[new].astype(np.min_scalar_type(shape[0])), starts)
    del rows, new
    for part, array in zip(_PARTS[:2], parts, strict=True):
        np.save(f"{name}-{part}.npy", array, allow_pickle=False)
    np.save(f"{name}-columns.npy", columns.astype(np.min_scalar_type(max(shape[1] - 1, 0)))[order], allow_pickle=False)
    np.save(f"{name}-values.npy", _narrow(values)[order], allow_pickle=False)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Whole numbers in the narrowest unsigned dtype, anything else as it is."""
    if values.dtype.kind not in "uif" or not values.size:
        return values
    largest = values.max()
    if not (values.min() >= 0 and largest < 2**32):  # false of nan, too
        return values
    narrow = values.astype(np.min_scalar_type(math.ceil(largest)))
    return narrow if narrow.itemsize < values.itemsize and (narrow == values).all() else values
