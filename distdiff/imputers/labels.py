"""Whether an imputer is given the labels of its cells."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distdiff.imputers import Imputed, Imputer
from distdiff.types import Bool, Cells, Condition, Tensor


class WithLabels(Imputer):
    """Run ``imputer`` with the labels of the cells, or with none.

    With them it peeks: the labels of cells that are scored were made, by people or clustering, from their full counts.

    Parameters
    ----------
    recode
        Label -> ``int64 [values]``, the imputer's code of each value as the cells are coded (-1: it never saw it).
        Labels that are not named are withheld.
    """

    def __init__(self, imputer: Imputer, use_labels: bool, recode: Mapping[str, Tensor]):
        self.imputer, self.peeks, self.recode = imputer, use_labels, recode
        self.denoiser = getattr(imputer, "denoiser", None)

    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.imputers.Imputer`."""
        known = {k: self._coded(k, v) for k, v in cells.labels.labels.items() if self.peeks and k in self.recode}
        given = Cells(cells.counts, Condition(known), cells.rows)
        return self.imputer.impute(given, observed, draws=draws, seed=seed)

    def _coded(self, label: str, codes: Tensor) -> Tensor:
        return torch.where(codes < 0, codes, self.recode[label].to(codes.device)[codes.clamp_min(0)])
