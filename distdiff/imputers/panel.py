"""An imputer of a model's genes for cells measured on another list: other order, some missing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distdiff.imputers import Imputed, Imputer
from distdiff.types import Bool, Cells, Tensor


class OnPanel(Imputer):
    """Ask ``imputer``, which knows ``genes``, about cells in the order of ``panel``, all of which it knows.

    Genes that are not on the panel were not looked for (p = 0).
    """

    def __init__(self, imputer: Imputer, genes: Sequence[str], panel: Sequence[str]):
        column_of = {gene: i for i, gene in enumerate(genes)}
        self.imputer, self.n_genes = imputer, len(genes)
        self.denoiser = getattr(imputer, "denoiser", None)  # whoever asks sends cells to its device
        self.peeks = getattr(imputer, "peeks", False)
        self.at = torch.tensor([column_of[gene] for gene in panel])

    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.imputers.Imputer`."""
        at = self.at.to(observed.device)
        counts = cells.counts.new_zeros(len(cells), self.n_genes).index_copy(1, at, cells.counts)
        known = torch.zeros(counts.shape, dtype=torch.bool, device=at.device).index_copy(1, at, observed)
        whole = self.imputer.impute(Cells(counts, cells.labels, cells.rows), known, draws=draws, seed=seed)
        drawn = None if whole.draws is None else whole.draws[..., at]
        return Imputed(whole.mean[:, at], drawn)
