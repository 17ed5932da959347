"""Which entries are imputation targets: hidden at random, likely dropouts, or given by a file."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from scipy import sparse


def mcar(shape: tuple[int, ...], rate: float, rng: np.random.Generator) -> np.ndarray:
    """Hide each entry with probability ``rate``, whatever it holds (missing completely at random; docs/MATHS.md 8.6).

    Returns
    -------
    bool [*shape]
        True where hidden.

    Raises
    ------
    ValueError
        A rate that hides no entry or every entry.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.masks import mcar
    >>> hidden = mcar((1000, 50), 0.3, np.random.default_rng(0))
    >>> hidden.dtype, float(hidden.mean().round(2))
    (dtype('bool'), 0.3)
    """
    if not 0 < rate < 1:
        raise ValueError(f"the share of entries to hide must lie in (0, 1), got {rate}")
    return rng.random(shape, dtype=np.float32) < rate


def expressed(counts: sparse.csr_matrix, groups: np.ndarray, n_groups: int | None = None) -> np.ndarray:
    """Which genes some cell of each group expresses (first half of scIDPMs, algorithm 1; docs/MATHS.md 8.5).

    For a matrix that is read in pieces, give ``n_groups`` and join the results with ``|``.

    Parameters
    ----------
    counts
        ``[n, g]`` molecules.
    groups
        ``int [n]``, group code of each cell; -1 is no group.
    n_groups
        Number of groups; None is the largest code + 1.

    Returns
    -------
    bool [n_groups, g]

    Raises
    ------
    ValueError
        Not one code for each cell, or a code that is no group.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.masks import expressed
    >>> counts = sparse.csr_matrix([[3, 0], [0, 0], [0, 1]])
    >>> expressed(counts, groups=np.array([0, 0, 1]))
    array([[ True, False],
           [False,  True]])
    """
    groups = np.asarray(groups)
    n_groups = int(groups.max(initial=-1)) + 1 if n_groups is None else n_groups
    _check_groups(counts.shape[0], groups, n_groups)
    cells = np.flatnonzero(groups >= 0)
    member = sparse.csr_matrix(
        (np.ones(len(cells), np.int64), (groups[cells], cells)), shape=(n_groups, counts.shape[0])
    )
    return (member @ (counts > 0).astype(np.int64)).toarray() > 0


def dropout_sites(counts: sparse.csr_matrix | np.ndarray, groups: np.ndarray, expressed: np.ndarray) -> np.ndarray:
    """Zeros of genes that some cell of the same group expresses (scIDPMs, algorithm 1; docs/MATHS.md 8.5).

    Parameters
    ----------
    counts
        ``[n, g]`` molecules, CSR or dense.
    groups
        ``int [n]``, group code of each cell; a cell of group -1 has no sites.
    expressed
        ``bool [n_groups, g]`` from `expressed`, over all cells of the groups.

    Returns
    -------
    bool [n, g]
        True at a dropout site.

    Raises
    ------
    ValueError
        Shapes that do not fit, or a code that is no group.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.masks import dropout_sites
    >>> counts, groups = np.array([[3, 0], [0, 0], [0, 1]]), np.array([0, 0, 1])
    >>> expressed = np.array([[True, False], [False, True]])  # group 0 expresses the first gene
    >>> dropout_sites(counts, groups, expressed)
    array([[False, False],
           [ True, False],
           [False, False]])
    """
    groups = np.asarray(groups)
    if expressed.ndim != 2 or expressed.shape[1] != counts.shape[1]:
        raise ValueError(f"expressed has shape {expressed.shape}, counts {counts.shape}: the genes must be the same")
    _check_groups(counts.shape[0], groups, len(expressed))
    positive = counts > 0 if isinstance(counts, np.ndarray) else (counts > 0).toarray()
    sites = np.zeros(counts.shape, bool)
    grouped = groups >= 0
    sites[grouped] = expressed[groups[grouped]] & ~positive[grouped]
    return sites


def load_mask(path: str | Path, shape: tuple[int, int]) -> np.ndarray | sparse.csr_matrix:
    """Read a mask, True where hidden, without unpickling.

    Parameters
    ----------
    path
        ``.npz`` of ``scipy.sparse.save_npz`` or ``.npy`` of a boolean array.
    shape
        Number of cells and genes that the mask must have.

    Returns
    -------
    bool [n, g]
        CSR from ``.npz``; from ``.npy`` an array whose rows are read from disk when they are indexed.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Another kind of file, another shape, or values other than true and false.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.masks import load_mask
    >>> np.save("mask.npy", np.array([[True, False]]))
    >>> load_mask("mask.npy", shape=(1, 2))
    memmap([[ True, False]])
    """
    path = Path(path)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"mask {path}: .npz (scipy.sparse.save_npz) or .npy (boolean) is wanted")
    if not path.is_file():
        raise FileNotFoundError(f"mask {path} does not exist")
    try:
        raw = sparse.load_npz(path) if path.suffix == ".npz" else np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, KeyError, EOFError, BadZipFile) as e:
        raise ValueError(f"mask {path} cannot be read ({e}); save it with scipy.sparse.save_npz or numpy.save") from e
    if raw.shape != tuple(shape):
        raise ValueError(f"mask {path} has shape {raw.shape}, the data have {tuple(shape)} (cells, genes)")
    if isinstance(raw, np.ndarray):
        if raw.dtype != bool:
            raise ValueError(f"mask {path} holds {raw.dtype}, booleans are wanted: save mask.astype(bool)")
        return raw
    check_indices(raw, f"mask {path}")
    if not np.isin(raw.data, (0, 1)).all():
        raise ValueError(f"mask {path} holds values other than 0 and 1; True marks a hidden entry")
    mask = sparse.csr_matrix(raw).astype(bool)
    mask.eliminate_zeros()
    return mask


def check_indices(mask: sparse.spmatrix, where: str) -> None:
    """Refuse a sparse mask with entries outside of its shape.

    Raises
    ------
    ValueError
        There is such an entry.

    Examples
    --------
    >>> from scipy import sparse
    >>> from distdiff.data.masks import check_indices
    >>> check_indices(sparse.csr_matrix([[True, False]]), "mask.npz")
    """
    try:
        if hasattr(mask, "check_format"):
            mask.check_format(full_check=True)
    except ValueError as e:
        raise ValueError(f"{where} has entries outside of its shape {mask.shape} ({e}); make it again") from e


def _check_groups(n: int, groups: np.ndarray, n_groups: int) -> None:
    if groups.shape != (n,):
        raise ValueError(f"groups have shape {groups.shape} for {n} cells; one code a cell is wanted")
    if len(groups) and not -1 <= groups.min() <= groups.max() < n_groups:
        raise ValueError(f"group codes {groups.min()} to {groups.max()} for {n_groups} groups (-1 is no group)")
