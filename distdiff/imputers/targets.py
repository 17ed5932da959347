"""Which entries of a data set are to be imputed, row block by row block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from distdiff.data.ingest.choose import choose
from distdiff.data.masks import dropout_sites, expressed
from distdiff.waits import waiting

Hidden = Callable[[int, int, sp.csr_matrix], np.ndarray | None]
"""``(start, stop, counts of these rows [n g])`` -> ``bool [n g]``, true where to be imputed; ``None``: nowhere."""


class Rows(Protocol):
    """Anything that gives counts by row range: a Source, or a store behind the same face."""

    n_cells: int
    genes: tuple[str, ...]

    def read(self, start: int, stop: int) -> sp.csr_matrix: ...

    def obs(self, key: str) -> np.ndarray: ...


def by_mask(mask: np.ndarray | sp.spmatrix) -> Hidden:
    """Targets are the true (non-zero) entries of ``mask`` ``[cells, genes]``; what stands there is not looked at.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.imputers.targets import by_mask
    >>> hidden = by_mask(np.array([[True, False], [False, True]]))
    >>> hidden(1, 2, None)  # the mask of row 1
    array([[False,  True]])
    """
    rows: Any = sp.csr_matrix(mask) if sp.issparse(mask) else mask

    def hidden(start: int, stop: int, counts: sp.csr_matrix) -> np.ndarray:
        part = rows[start:stop]
        part = part.toarray() if sp.issparse(part) else np.asarray(part)
        if part.dtype.kind == "f" and (wrong := part != np.round(part)).any():  # (NaN is not itself)
            cell, gene = np.unravel_index(wrong.argmax(), wrong.shape)
            raise ValueError(
                f"the mask holds {part[cell, gene]:g} in row {start + cell}, column {gene}; true and false are wanted, "
                "or 1 and 0"
            )
        # in C order, for the network's sums depend on how its input lies in memory
        return np.ascontiguousarray(part != 0)

    return hidden


def nothing(start: int, stop: int, counts: sp.csr_matrix) -> None:
    """No measured entry is a target: only genes absent from the input are (a panel)."""


def by_dropout(rows: Rows, groups: np.ndarray, *, block: int = 4096) -> Hidden:
    """Dropout sites: zeros of genes that some cell of the same group expresses (docs/MATHS.md 8.5).

    Parameters
    ----------
    groups
        ``int [cells]`` group codes; -1 belongs to no group and has no sites.
    """
    some = np.zeros((int(groups.max(initial=-1)) + 1, len(rows.genes)), dtype=bool)
    for start in range(0, rows.n_cells, block):
        part = groups[start : start + block]
        some |= expressed(rows.read(start, start + len(part)), part, n_groups=len(some))

    def hidden(start: int, stop: int, counts: sp.csr_matrix) -> np.ndarray:
        return dropout_sites(counts, groups[start:stop], some)

    return hidden


def leiden(rows: Rows, *, seed: int = 0, genes: int = 2000, progress: bool = True) -> np.ndarray:
    """Cluster cells as scanpy users would (log1p CP10k, PCA, neighbours, Leiden); ``int64 [cells]`` codes.

    Reads the whole input as one sparse matrix: for an atlas give an obs column instead.

    Raises
    ------
    ValueError
        igraph and leidenalg, of the extra ``leiden``, are not installed.
    """
    with waiting(f"clusters {rows.n_cells:,} cells (groups='leiden')", show=progress):
        return _leiden(rows, seed, genes)


def _leiden(rows: Rows, seed: int, genes: int) -> np.ndarray:
    import anndata as ad
    import scanpy as sc

    counts, expressed = rows.read(0, rows.n_cells), getattr(rows, "expressed", None)
    data = ad.AnnData((counts if expressed is None else counts[:, np.flatnonzero(expressed)]).astype(np.float32))
    some = np.arange(data.n_vars)
    if data.n_vars > genes:
        some = choose(data.X, f"hvg:{min(genes, int((data.X.sum(0) > 0).sum()))}")
    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    data = data[:, some].copy()
    sc.pp.pca(data, n_comps=min(50, min(data.shape) - 1), random_state=seed)
    sc.pp.neighbors(data, random_state=seed)
    try:
        sc.tl.leiden(data, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
    except ImportError:
        raise ValueError(
            "groups='leiden' needs igraph and leidenalg: pip install 'distdiff[leiden]', or name an obs column"
        ) from None
    return data.obs["leiden"].cat.codes.to_numpy().astype(np.int64)
