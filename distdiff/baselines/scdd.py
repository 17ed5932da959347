"""SCDD (after Liu et al., Brief Bioinform 2022): fill from similar cells first (diffusion), then denoise the filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distdiff.baselines._deep import LARGEST, mlp
from distdiff.baselines._graph import OnGraph
from distdiff.types import Cells, Tensor


class _Network(nn.Module):
    """A graph convolution over the filled cell and its neighbours, and an autoencoder beside it."""

    def __init__(self, genes: int, width: int) -> None:
        super().__init__()
        self.encode, self.convolve = nn.Linear(genes, width), nn.Linear(genes, width)
        self.decode = mlp(width, width, genes)

    def forward(self, filled: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encode(filled).sigmoid()
        shared = self.convolve(torch.cat((filled[:, None], near), 1).mean(1)).relu()
        return self.decode(hidden + shared), hidden


@dataclass(eq=False)
class Scdd(OnGraph):
    """Hidden genes get the mean ``log(1 + x / s)`` of the neighbours, then a network denoises the filled cell.

    The network is a contractive autoencoder joined to a graph convolution. Its loss is the squared error of all entries
    of the training cells, and ``contraction`` times the squared Jacobian of the encoder (in closed form: one sigmoid
    layer). The decoder predicts what the diffusion got wrong. Different from the paper: neighbours as in the other
    graph rows, in the place of SC3's consensus.

    Parameters
    ----------
    width
        Width of the layers.
    contraction
        Weight of the contractive penalty.

    Examples
    --------
    >>> from distdiff.baselines.scdd import Scdd
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), Scdd(width=8, k=4, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.spent <= 20
    True
    """

    width: int | Sequence[int] = (64, 128)
    contraction: float | Sequence[float] = 1e-4

    label = "SCDD"

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """The network."""
        return _Network(genes, option["width"])

    def denoised(self, network: Any, cells: Cells, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Depth ``s``, the denoised ``log(1 + x / s)`` and the encoder's layer."""
        s, y = self.scaled(cells.counts, observed)
        near = self.neighbours(cells, observed)
        filled = torch.where(observed > 0, y, near.mean(1))
        correction, hidden = network(filled, near)
        return s, filled + correction, hidden

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """Squared error and contraction."""
        s, answer, hidden = self.denoised(network, cells, observed)
        slope = (hidden * (1 - hidden)).square()
        jacobian = (slope * network.encode.weight.square().sum(1)).sum(1).mean()
        yield (answer - torch.log1p(cells.counts / s)).square().mean() + self.option["contraction"] * jacobian

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The denoised logarithms, taken back to molecules."""
        s, answer, _ = self.denoised(network, cells, observed)
        return s * torch.expm1(answer.clamp(0, LARGEST))
