"""Which entries are hidden or suspected: random masks, dropout sites, masks from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp


def mcar(shape: tuple[int, int], rate: float, rng: np.random.Generator) -> np.ndarray:
    """Hide each entry with probability ``rate``, zeros included: ``bool``, true = hidden.

    Raises
    ------
    ValueError
        ``rate`` outside (0, 1).
    """
    if not 0 < rate < 1:
        raise ValueError(f"the share of entries to hide must lie in (0, 1), got {rate}")
    return rng.random(shape, dtype=np.float32) < rate


def expressed(counts: sp.csr_matrix, groups: np.ndarray, *, n_groups: int | None = None) -> np.ndarray:
    """Whether some cell of a group has a count of a gene: ``bool [n_groups, g]``; OR it over blocks of rows.

    Parameters
    ----------
    counts
        ``[n, g]``.
    groups
        ``int [n]`` codes; -1 belongs to no group.
    """
    n_groups = int(groups.max(initial=-1)) + 1 if n_groups is None else n_groups
    member = np.flatnonzero(groups >= 0)
    indicator = sp.csr_matrix((np.ones(len(member)), (groups[member], member)), shape=(n_groups, counts.shape[0]))
    return (indicator @ (counts != 0)).toarray() > 0


def dropout_sites(counts: sp.csr_matrix, groups: np.ndarray, expressed: np.ndarray) -> np.ndarray:
    """Zeros of genes that some cell of the same group expresses (scIDPMs' Algorithm 1, MATHS 8.5): ``bool [n, g]``.

    Cells without a group (-1) have no sites.
    """
    sites = np.zeros(counts.shape, dtype=bool)
    member = groups >= 0
    sites[member] = expressed[groups[member]]
    rows, columns = counts.nonzero()
    sites[rows, columns] = False
    return sites


def load_mask(path: str | Path, shape: tuple[int, int]) -> np.ndarray | sp.csr_matrix:
    """Read a mask ``[cells, genes]`` from ``.npz`` (``scipy.sparse.save_npz``) or ``.npy``; nothing is unpickled.

    Raises
    ------
    ValueError
        No such file, another kind of file, or another shape.
    """
    path = Path(path)
    try:
        mask = sp.load_npz(path).tocsr() if path.suffix == ".npz" else np.load(path, allow_pickle=False, mmap_mode="r")
    except FileNotFoundError:
        raise ValueError(f"mask file {path} does not exist") from None
    except Exception as error:
        raise ValueError(
            f"mask file {path} is neither a scipy.sparse .npz nor a boolean .npy of shape {shape}: {error}"
        ) from error
    if mask.shape != shape:
        raise ValueError(f"mask file {path} has shape {mask.shape}, the data {shape} (cells, genes)")
    return mask
