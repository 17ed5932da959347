"""Whether an imputer is given the labels of its cells."""

from __future__ import annotations

from distdiff.imputers import Imputed, Imputer
from distdiff.types import Bool, Cells, Condition, Tensor


class WithLabels(Imputer):
    """Run ``imputer`` with the labels of the cells, or with none.

    With them it peeks: the labels of cells that are scored were made, by people or clustering, from their full counts.
    """

    def __init__(self, imputer: Imputer, use_labels: bool):
        self.imputer, self.peeks = imputer, use_labels
        self.denoiser = getattr(imputer, "denoiser", None)

    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.imputers.Imputer`."""
        known = cells if self.peeks else Cells(cells.counts, Condition(), cells.rows)
        return self.imputer.impute(known, observed, draws=draws, seed=seed)
