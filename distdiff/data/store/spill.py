"""Temporary files that bring cells into another order: rows are written as they come and read by their new rank.

Pass 1 of a build writes one spill for each piece of a source; pass 2 reads the cells of one shard from all spills. A
spill is a folder of ``.npy`` files that gets its name when it is complete, so a repeated task finds it finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse

from distdiff import files, received
from distdiff.data.store.coding import Coded, Slots, csr, encode

SUMS = "sums.json"
"""In a spill: bytes and CRC-32C of each array's file. A disk may damage what a killed build left."""


def write(
    folder: Path, counts: sparse.csr_matrix, rank: np.ndarray, *, rows: np.ndarray | None = None,
    largest: float | None = None, **more: np.ndarray,
) -> None:  # fmt: skip
    """Write coded cells, and other arrays about them.

    Parameters
    ----------
    folder
        Folder to make; its parent must exist.
    counts
        ``[n, g]`` canonical; whole numbers in any dtype, or float32 for measurements if ``largest`` is None.
    rank
        ``int64 [m]``, rank of each cell in the new order, all different.
    rows
        ``int64 [m]``, their rows in ``counts``; None is all.
    largest
        Largest count, if they are whole numbers in floating point.
    **more
        Other arrays to write, for `load`.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store import spill
    >>> spill.write(Path("spill"), sparse.csr_matrix([[1, 0], [0, 2]]), rank=np.array([5, 3]))
    >>> spill.load(Path("spill"), "rank")
    memmap([3, 5])
    """
    order = np.argsort(rank)
    coded = encode(counts, _dtype(counts.data, largest), order if rows is None else rows[order])
    publish(folder, {
        "rank": rank[order], "starts": coded.starts, "gaps": coded.gaps, "values": coded.values, **more
    })  # fmt: skip


def publish(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a folder that appears when it is complete; if it exists already, it is kept.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from distdiff.data.store import spill
    >>> spill.publish(Path("moments"), {"total": np.array([1.0, 2.0])})
    >>> spill.load(Path("moments"), "total")
    memmap([1., 2.])
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    sums = {}
    for name, array in arrays.items():
        np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        sums[f"{name}.npy"] = received.record(temporary / f"{name}.npy")
    (temporary / SUMS).write_text(json.dumps(sums))
    try:
        os.rename(temporary, folder)
    except OSError:  # another run of this task was faster, with the same content
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def whole(folder: Path) -> bool:
    """Whether a folder of an earlier run is as it was written; what is left of one that is not is removed."""
    if not os.path.lexists(folder):
        return False
    try:
        sums = received.json_of(folder / SUMS)
        if sums and all(list(received.record(folder / name)) == wanted for name, wanted in sums.items()):
            return True
    except (OSError, ValueError):
        pass
    files.remove(folder)
    return False


def load(folder: Path, name: str) -> np.ndarray:
    """One array of a spill, memory-mapped.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from distdiff.data.store import spill
    >>> spill.publish(Path("ranks"), {"rank": np.arange(3)})
    >>> spill.load(Path("ranks"), "rank")
    memmap([0, 1, 2])
    """
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def coded(folder: Path, first: int | None = None, last: int | None = None) -> tuple[np.ndarray, Coded]:
    """Cells with ``first <= rank < last`` (None is all): their ranks, ascending, and the coded cells.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store import spill
    >>> spill.write(Path("spilled"), sparse.csr_matrix([[1, 0], [0, 2]]), rank=np.array([5, 3]))
    >>> rank, coded = spill.coded(Path("spilled"), first=4)
    >>> rank, coded.values
    (array([5]), array([1], dtype=uint8))
    """
    rank = load(folder, "rank")
    a = 0 if first is None else int(np.searchsorted(rank, first))
    b = len(rank) if last is None else int(np.searchsorted(rank, last))
    starts = np.array(load(folder, "starts")[a : b + 1])
    gaps, values = (np.array(load(folder, name)[starts[0] : starts[-1]]) for name in ("gaps", "values"))
    return np.array(rank[a:b]), Coded(gaps, values, starts - starts[0])


def gather(folders: Sequence[Path], first: int, last: int) -> tuple[np.ndarray, Coded]:
    """Cells with ``first <= rank < last`` of all spills, one spill after the other: their ranks, and the coded cells.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store import spill
    >>> spill.write(Path("first"), sparse.csr_matrix([[1, 0]]), rank=np.array([1]))
    >>> spill.write(Path("second"), sparse.csr_matrix([[0, 2]]), rank=np.array([0]))
    >>> spill.gather([Path("first"), Path("second")], 0, 2)[0]
    array([1, 0])
    """
    found = [coded(folder, first, last) for folder in folders]
    lengths = np.concatenate([np.diff(c.starts) for _, c in found])
    return np.concatenate([rank for rank, _ in found]), Coded(
        np.concatenate([c.gaps for _, c in found]),
        np.concatenate([c.values for _, c in found]),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def cells(of: Coded, which: np.ndarray, gene_column: np.ndarray, n_genes: int) -> sparse.csr_matrix:
    """Some coded cells as canonical CSR: uint32, or float32 for measurements (``gene_column`` as in `coding.csr`).

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.store import coding, spill
    >>> coded = coding.encode(sparse.csr_matrix([[1, 0], [0, 2]]), "uint8")
    >>> spill.cells(coded, np.array([1]), np.arange(2), n_genes=2).toarray()
    array([[0, 2]], dtype=uint32)
    """
    slots = Slots(of.gaps[None], of.values[None], of.starts[None])
    dtype = np.float32 if of.values.dtype.kind == "f" else np.uint32
    return csr(slots, np.zeros(len(which), np.int64), which, gene_column, n_genes, dtype)


def _dtype(data: np.ndarray, largest: float | None) -> str:
    if data.dtype.kind == "f" and largest is None:
        return "float32"
    largest = int(data.max(initial=0)) if largest is None else largest
    return next(d for d in ("uint8", "uint16", "uint32") if largest <= np.iinfo(d).max)
