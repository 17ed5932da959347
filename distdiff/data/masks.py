"""Which entries are imputation targets: at random, in blocks, by value, likely dropouts, whole genes, from a file."""

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


BLOCKS = {0.1: ((0.05, 0.4), (0.2, 0.25), (0.3, 0.1)), 0.25: ((0.05, 0.6), (0.1, 0.5), (0.2, 0.4), (0.3, 0.3))}
"""Shares of cells and of genes of each block of `mar_blocks`, by the share of all entries (CountsDiff's own)."""


def mar_blocks(shape: tuple[int, int], rate: float, rng: np.random.Generator) -> np.ndarray:
    """Hide blocks of genes in groups of cells: which entries, has nothing to do with what they hold (MAR).

    CountsDiff's blocks at rates .1 and .25; at other rates those of .25 with more or fewer genes. Cells are in groups
    at random, and each group misses random genes of its own.

    Returns
    -------
    bool [n, g]
        True where hidden; the share differs from ``rate`` by whole cells and genes only.

    Raises
    ------
    ValueError
        A rate for which a group would miss every gene (above .41), or none.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.masks import mar_blocks
    >>> hidden = mar_blocks((200, 100), 0.25, np.random.default_rng(0))
    >>> float(hidden.mean()), sorted(set(hidden.sum(1).tolist()))  # genes that a cell misses
    (0.25, [0, 30, 40, 50, 60])
    """
    blocks = BLOCKS.get(rate, tuple((cells, genes * rate / 0.25) for cells, genes in BLOCKS[0.25]))
    if not rate > 0 or max(genes for _, genes in blocks) >= 1:
        raise ValueError(f"blocks hide a share of entries in (0, 0.41], got {rate}; take mcar for a larger one")
    n, g = shape
    order, start = rng.permutation(n), 0
    hidden = np.zeros(shape, bool)
    for share, genes in blocks:
        cells = order[start : start + round(share * n)]
        start += len(cells)
        hidden[np.ix_(cells, rng.permutation(g)[: round(genes * g)])] = True
    return hidden


def mnar(
    counts: np.ndarray,
    rate: float,
    rng: np.random.Generator,
    *,
    high: bool = False,
    valid: np.ndarray | None = None,
    spare: int | None = None,
) -> np.ndarray:
    """Hide small (or large) counts more often than others: missing not at random, gene by gene.

    Of a gene's ``m`` valid entries ``n = floor(rate m)`` are hidden, at random among its ``n + spare`` smallest
    (largest) ones; ties are broken at random.

    Parameters
    ----------
    counts
        ``[n, g]`` molecules, dense.
    rate
        Share of valid entries to hide.
    high
        Hide large counts.
    valid
        ``bool [n, g]`` entries that may be hidden; None is all of them.
    spare
        Candidates beyond ``n`` (published: 5,000, which is every entry of a small set); None: as many as are hidden.

    Returns
    -------
    bool [n, g]
        True where hidden.

    Raises
    ------
    ValueError
        A rate outside (0, 1), a negative ``spare``, or another shape of ``valid``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.masks import mnar
    >>> counts = np.arange(10)[:, None]
    >>> hidden = mnar(counts, 0.3, np.random.default_rng(0), spare=0)
    >>> counts[hidden]  # without spare candidates: the smallest
    array([0, 1, 2])
    """
    if not 0 < rate < 1:
        raise ValueError(f"the share of entries to hide must lie in (0, 1), got {rate}")
    if spare is not None and spare < 0:
        raise ValueError(f"spare={spare} candidates are wanted to be 0 or more")
    valid = np.ones(counts.shape, bool) if valid is None else np.asarray(valid)
    if valid.shape != counts.shape:
        raise ValueError(f"valid has shape {valid.shape}, counts {counts.shape}: they must be the same")
    n = np.floor(rate * valid.sum(0)).astype(np.int64)
    by_value = (-counts if high else counts) + rng.random(counts.shape)  # counts are whole: this only breaks ties
    candidates = valid & (_ranks(np.where(valid, by_value, np.inf)) < n + (n if spare is None else spare))
    return candidates & (_ranks(np.where(candidates, rng.random(counts.shape), np.inf)) < n)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each entry in its column, 0 for the smallest."""
    order = np.argsort(values, axis=0, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(len(values))[:, None], axis=0)
    return ranks


def gene_folds(n_genes: int, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold of each gene for a hold-out of whole genes (panel completion): ``int64 [g]``, sizes differ by at most one.

    Genes of fold ``k`` are hidden in every cell of the query, genes of the others are seen.

    Raises
    ------
    ValueError
        Fewer than two folds, or more folds than genes.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.masks import gene_folds
    >>> fold = gene_folds(25, 10, np.random.default_rng(0))
    >>> np.bincount(fold)
    array([3, 3, 3, 3, 3, 2, 2, 2, 2, 2])
    """
    if not 2 <= folds <= n_genes:
        raise ValueError(f"{folds} folds of {n_genes} genes: wanted 2 to {n_genes}, so that each fold holds a gene")
    return rng.permutation(np.arange(n_genes) % folds)


def split_molecules(
    counts: sparse.csr_matrix, share: float, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Molecular cross-validation (docs/MATHS.md 5.7): a molecule is evidence with probability ``share``, else held out.

    Returns
    -------
    evidence, held
        CSR ``[n, g]``; their sum is ``counts``.

    Raises
    ------
    ValueError
        A share outside (0, 1), or counts that are no whole numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.masks import split_molecules
    >>> counts = sparse.csr_matrix([[40, 0], [3, 20]])
    >>> evidence, held = split_molecules(counts, 0.9, np.random.default_rng(0))
    >>> (evidence + held - counts).nnz
    0
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of molecules that are evidence must lie in (0, 1), got {share}")
    counts = sparse.csr_matrix(counts)
    whole = counts.data.astype(np.int64)
    if len(whole) and (whole.min() < 0 or (whole != counts.data).any()):
        raise ValueError("molecules can be split where counts are whole numbers of at least 0; give raw counts")
    seen = rng.binomial(whole, share)
    pair = []
    for values in (seen, whole - seen):
        part = sparse.csr_matrix((values.astype(counts.dtype), counts.indices, counts.indptr), shape=counts.shape)
        part = part.copy()
        part.eliminate_zeros()
        pair.append(part)
    return pair[0], pair[1]


def thin(counts: sparse.csr_matrix, share: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Keep each molecule of cell ``c`` with probability ``share[c]``: what a shallower measurement would have shown.

    Parameters
    ----------
    counts
        CSR ``[n g]`` whole numbers.
    share
        ``float [n]`` in [0, 1].

    Returns
    -------
    csr_matrix [n g]
        ``float32``.

    Raises
    ------
    ValueError
        A share outside [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.data.masks import thin
    >>> thin(sparse.csr_matrix([[40, 0], [3, 20]]), np.array([0.0, 1.0]), np.random.default_rng(0)).toarray()
    array([[ 0.,  0.],
           [ 3., 20.]], dtype=float32)
    """
    if len(share) and not (share.min() >= 0 and share.max() <= 1):
        raise ValueError(f"thin: shares must lie in [0, 1], got {share.min():g} to {share.max():g}")
    counts = sparse.csr_matrix(counts)
    kept = rng.binomial(counts.data.astype(np.int64), np.repeat(share, np.diff(counts.indptr)))
    out = sparse.csr_matrix((kept.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape).copy()
    out.eliminate_zeros()
    return out


def rare(train: np.ndarray, codes: np.ndarray, *, at_most: int = 30) -> np.ndarray:
    """Which cells are of a rare type: one with 1 to ``at_most`` training cells.

    Parameters
    ----------
    train, codes
        Type codes of the training cells and of the cells asked about, ``int``; -1 is no type.
    at_most
        Most training cells of a rare type.

    Returns
    -------
    bool [n]

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.masks import rare
    >>> rare(np.repeat([0, 1], [500, 20]), np.array([0, 1, -1, 7]))  # 7 was never seen in training
    array([False,  True, False, False])
    """
    size = np.bincount(train[train >= 0], minlength=int(max(codes.max(initial=-1), 0)) + 1)
    cells = size[np.maximum(codes, 0)]
    return (codes >= 0) & (cells > 0) & (cells <= at_most)


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
