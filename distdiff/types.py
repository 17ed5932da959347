"""Types that all packages share: a batch of cells, its labels, and the description of the data.

Shape legend used everywhere: ``b`` cells, ``g`` genes, ``k`` numbers per gene (outputs) or draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Bool", "Cells", "Condition", "DataSpec", "Float", "Int", "Tensor"]

UNKNOWN = -1
"""Label code of a cell whose label is missing, never seen in training, or withheld."""


@dataclass(frozen=True)
class DataSpec:
    """What a model needs to know of its data: genes, label values, mean and largest counts.

    Attributes
    ----------
    genes
        Gene names in column order.
    labels
        Covariate name -> its values in code order (code ``i`` is value ``i``).
    gene_mean
        ``float32 [g]``, mean molecules per training cell.
    gene_max
        ``float32 [g]``, most molecules of a training cell; ``None``: not known.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.types import DataSpec
    >>> DataSpec(("CD3E", "MS4A1"), {"cell_type": ("B", "T")}, np.array([0.5, 2.0], np.float32)).n_genes
    2
    """

    genes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]
    gene_mean: np.ndarray
    gene_max: np.ndarray | None = None

    @property
    def n_genes(self) -> int:
        return len(self.genes)


@dataclass(frozen=True)
class Condition:
    """Covariates of a batch: name -> ``int64 [b]`` codes, ``UNKNOWN`` (-1) where missing.

    Examples
    --------
    >>> import torch
    >>> from distdiff.types import Condition
    >>> labels = Condition({"cell_type": torch.tensor([0, 1, 1])})
    >>> labels.drop(torch.tensor([False, True, False])).labels["cell_type"]  # -1: withheld
    tensor([ 0, -1,  1])
    """

    labels: Mapping[str, Int[Tensor, " b"]] = field(default_factory=dict)

    def drop(self, where: Bool[Tensor, " b"]) -> Condition:
        """Set every label of the cells in ``where`` to unknown (label dropout; CountsDiff, section 3.4)."""
        return Condition({k: v.masked_fill(where, UNKNOWN) for k, v in self.labels.items()})

    def to(self, device: torch.device | str) -> Condition:
        return Condition({k: v.to(device, non_blocking=True) for k, v in self.labels.items()})

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        return Condition({k: v[rows] for k, v in self.labels.items()})


@dataclass(frozen=True)
class Cells:
    """A batch of cells.

    Attributes
    ----------
    counts
        ``float32 [b g]`` molecules (whole numbers).
    labels
        The batch's covariates.
    rows
        ``int64 [b]`` row of each cell in the store.

    Examples
    --------
    >>> import torch
    >>> from distdiff.types import Cells, Condition
    >>> batch = Cells(torch.zeros(3, 2), Condition({"cell_type": torch.tensor([0, 1, 1])}), torch.tensor([7, 8, 12]))
    >>> batch[1:].rows, batch[1:].labels.labels["cell_type"]
    (tensor([ 8, 12]), tensor([1, 1]))
    """

    counts: Float[Tensor, "b g"]
    labels: Condition
    rows: Int[Tensor, " b"]

    def __len__(self) -> int:
        return self.counts.shape[0]

    def to(self, device: torch.device | str) -> Cells:
        return Cells(
            self.counts.to(device, non_blocking=True), self.labels.to(device), self.rows.to(device, non_blocking=True)
        )

    def __getitem__(self, rows: slice | Tensor) -> Cells:
        return Cells(self.counts[rows], self.labels[rows], self.rows[rows])
