"""Cells of a user in memory, as the checks of a file and of a model take them: with a store's face, and in groups."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from distdiff.imputers.targets import leiden

if TYPE_CHECKING:
    from distdiff.data.ingest.source import Source

FEWEST = 50
"""Cells below which nothing is said."""

GROUP = "group"
"""Label that holds the groups of `InMemory`."""


class InMemory:
    """What a baseline needs of a store, over counts in memory.

    Parameters
    ----------
    counts
        CSR ``[n g]``.
    group
        ``[n]`` names, which become the label `GROUP`; None: no label.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.baselines.gene_mean import GeneMean
    >>> from distdiff.inmemory import InMemory
    >>> mean = GeneMean()
    >>> mean.fit(InMemory(sparse.csr_matrix([[1.0, 3.0], [3.0, 3.0]])), np.arange(2))
    >>> InMemory(sparse.eye(2, format="csr"), np.array(["T", "B"])).labels(np.arange(2), ["group"])["group"].tolist()
    [1, 0]
    """

    def __init__(self, counts: sparse.csr_matrix, group: np.ndarray | None = None) -> None:
        self.counts, self.genes = counts, tuple(str(i) for i in range(counts.shape[1]))
        names, self._code = np.unique(np.asarray([] if group is None else group, dtype=str), return_inverse=True)
        self.manifest = SimpleNamespace(labels={} if group is None else {GROUP: tuple(names)})

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Counts of some cells."""
        return self.counts[rows]

    def labels(self, rows: np.ndarray, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Code of each cell's group, ``int64 [n]``."""
        return {key: self._code[rows] for key in keys if key in self.manifest.labels}


def groups_of(
    source: Source, counts: sparse.csr_matrix, rows: np.ndarray, groupby: str | None, seed: int
) -> tuple[np.ndarray, str]:  # fmt: skip
    """Name of each cell's group, ``object [n]``, and what to say of them.

    Parameters
    ----------
    source, rows
        Where the cells are from, and which they are.
    counts
        CSR ``[n g]`` of these cells, for Leiden clusters where no column is named.
    groupby
        Column of obs; a cell without a value is ``missing``.

    Raises
    ------
    ValueError
        No such column, or an empty one.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.ingest.source import Source
    >>> from distdiff.inmemory import groups_of
    >>> source = Source.open("counts.h5ad")
    >>> names, words = groups_of(source, source.read(0, 3), np.arange(3), "cell_type", 0)
    >>> names.tolist(), words
    (['T', 'T', 'T'], "obs['cell_type']")
    """
    if groupby is not None:
        values = source.obs(groupby)[rows]
        if not set(values) - {None}:
            raise ValueError(f"{source.where}: obs[{groupby!r}] is empty; name another column")
        return np.array(["missing" if v is None else v for v in values], dtype=object), f"obs[{groupby!r}]"

    class Rows:
        n_cells, genes = counts.shape[0], source.genes

        def read(self, start: int, stop: int) -> sparse.csr_matrix:
            return sparse.csr_matrix(counts[start:stop])

        def obs(self, key: str) -> np.ndarray:
            return source.obs(key)[rows]

    code = leiden(Rows(), seed=seed)
    names = np.array([f"cluster {c}" for c in code], dtype=object)
    return names, "Leiden clusters of the same counts (no groupby given)"
