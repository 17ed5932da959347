"""GNNImpute (after Xu et al., BMC Bioinformatics 2021): an autoencoder with attention to similar cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distdiff.baselines._deep import LARGEST, mlp
from distdiff.baselines._graph import GraphAttention, OnGraph
from distdiff.types import Cells, Tensor


class _Network(nn.Module):
    def __init__(self, genes: int, width: int) -> None:
        super().__init__()
        self.own, self.near = nn.Linear(2 * genes, width), nn.Linear(genes, width)
        self.attention = nn.ModuleList(GraphAttention(width, width) for _ in range(2))
        self.end = mlp(3 * width, width, genes)

    def forward(self, seen: Tensor, near: Tensor) -> Tensor:
        own, near = self.own(seen).relu(), self.near(near).relu()
        heads = [attention(own, near) for attention in self.attention]
        return self.end(torch.cat((own, *heads), 1))


@dataclass(eq=False)
class GnnImpute(OnGraph):
    """Two heads of graph attention from a cell to its neighbours, then a decoder; squared error of hidden logarithms.

    Different from the paper: neighbours are found on the evidence of each cell among training cells (published: on
    principal components of one matrix that holds the cells to impute), and one layer of attention reaches them.

    Parameters
    ----------
    width
        Width of the layers.

    Examples
    --------
    >>> from distdiff.baselines.gnnimpute import GnnImpute
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), GnnImpute(width=8, k=4, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.spent <= 20
    True
    """

    width: int | Sequence[int] = (64, 128)

    label = "GNNImpute"

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """The network."""
        return _Network(genes, option["width"])

    def decoded(self, network: Any, cells: Cells, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Depth ``s`` and the predicted ``log(1 + x / s)``."""
        s, y = self.scaled(cells.counts, observed)
        raw = network(torch.cat((y, observed), 1), self.neighbours(cells, observed))
        return s, torch.log1p(self.profile) + raw

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """Squared error of the hidden entries."""
        s, answer = self.decoded(network, cells, observed)
        error = (answer - torch.log1p(cells.counts / s)).square() * (1 - observed)
        yield error.sum() / (1 - observed).sum().clamp_min(1)

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The logarithms, taken back to molecules."""
        s, answer = self.decoded(network, cells, observed)
        return s * torch.expm1(answer.clamp(0, LARGEST))
