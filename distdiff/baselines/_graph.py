"""What rows on a graph of cells share: neighbours found on the evidence, and attention from a cell to them."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import nn

from distdiff.baselines._deep import Deep
from distdiff.baselines.knn import Knn
from distdiff.types import Cells, Float, Tensor


@dataclass(eq=False)
class OnGraph(Deep, ABC):
    """A network that sees a cell's evidence and the whole counts of its ``k`` nearest training cells.

    Neighbours are the nearest by `Knn.neighbours` on the observed genes; a training cell is no neighbour of its own.

    Parameters
    ----------
    k
        Neighbours.
    """

    k: int = 10

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Remember the training cells, then train."""
        self.profile = torch.from_numpy(self.gene_mean).float()
        self.near = Knn(k=option["k"], prior=0.0, scale=1.0)
        self.near.gene_mean, self.near.train = self.gene_mean, csr_array(kept.counts.numpy())
        self.near_rows = kept.rows.numpy()
        _, self.values = self.scaled(kept.counts, torch.ones_like(kept.counts))
        super().solve(kept, held, option)

    def neighbours(self, cells: Cells, observed: Float[Tensor, "b g"]) -> Float[Tensor, "b k g"]:
        """``log(1 + x / s)`` of the neighbours, all their genes."""
        seen = observed.numpy() > 0
        k = self.option["k"]
        near = self.near.neighbours((cells.counts * observed).numpy(), seen, k + 1, 1.0)
        own = self.near_rows[near] == cells.rows.numpy()[:, None]
        # a cell's own row goes last and is dropped with the surplus neighbour, unless the cell is alone
        order = np.argsort(own, axis=1, kind="stable")[:, : max(1, min(k, near.shape[1] - 1))]
        return self.values[torch.from_numpy(np.take_along_axis(near, order, axis=1))]


class GraphAttention(nn.Module):
    """One layer of graph attention (Velickovic et al., ICLR 2018): a cell's vector from itself and its neighbours."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.project, self.score = nn.Linear(width, out, bias=False), nn.Linear(2 * out, 1)

    def forward(self, own: Float[Tensor, "b d"], near: Float[Tensor, "b k d"]) -> Float[Tensor, "b e"]:
        """Weighted mean of the projections."""
        every = self.project(torch.cat((own[:, None], near), 1))
        pairs = torch.cat((every[:, :1].expand_as(every), every), 2)
        weight = nn.functional.leaky_relu(self.score(pairs), 0.2).softmax(1)
        return nn.functional.elu((weight * every).sum(1))
