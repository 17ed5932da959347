"""DCA (after Eraslan et al., Nat Commun 2019): an autoencoder with a zero-inflated negative binomial likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distdiff.baselines._deep import LARGEST, Deep, mlp, zinb_nll
from distdiff.types import Cells, Tensor


@dataclass(eq=False)
class Dca(Deep):
    """``rate = s gene_mean exp(mean head)``: the mean of the count part, as the method imputes it.

    Layers of ``width``, ``width / 2`` and ``width`` (published: 64, 32, 64) between ``log(1 + x / s)`` with the mask
    and three heads a gene: mean, dispersion, zero inflation. Different from the paper: layer norms for batch norms (an
    answer does not depend on the other cells), entries hidden in training as at use.

    Parameters
    ----------
    width
        Width of the outer layers.

    Examples
    --------
    >>> from distdiff.baselines.dca import Dca
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), Dca(width=8, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.spent <= 20, row.chosen["width"]
    (True, 8)
    """

    width: int | Sequence[int] = (64, 128)

    label = "DCA"

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """Encoder, bottleneck, decoder and the three heads."""
        w = option["width"]
        return nn.Sequential(mlp(2 * genes, w, max(1, w // 2), w, end=True), nn.Linear(w, 3 * genes))

    def heads(self, network: Any, cells: Cells, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean in molecules, log size and logit of the zero inflation, each ``[b g]``."""
        s, y = self.scaled(cells.counts, observed)
        mean, log_size, logit = network(torch.cat((y, observed), 1)).chunk(3, 1)
        return s * self.profile * mean.clamp(-LARGEST, LARGEST).exp(), log_size, logit - 2.0

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """The likelihood of every entry of the training cells, hidden or not."""
        yield zinb_nll(cells.counts, *self.heads(network, cells, observed)).mean()

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The mean of the count part."""
        return self.heads(network, cells, observed)[0]
