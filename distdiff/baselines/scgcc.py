"""scGCC (after Tian et al., IEEE JBHI 2023): graph attention trained by contrast of two views, with a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from distdiff.baselines._deep import LARGEST, mlp, random_masks
from distdiff.baselines._graph import GraphAttention, OnGraph
from distdiff.types import Cells, Tensor

TEMPERATURE = 0.2


class _Network(nn.Module):
    def __init__(self, genes: int, width: int, latent: int) -> None:
        super().__init__()
        self.own, self.near = nn.Linear(2 * genes, width), nn.Linear(genes, width)
        self.attention = GraphAttention(width, latent)
        self.contrast = mlp(latent, latent, latent)
        self.decode = mlp(latent + width, width, genes)

    def forward(self, seen: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        own = self.own(seen).relu()
        z = self.attention(own, self.near(near).relu())
        return self.decode(torch.cat((z, own), 1)), normalize(self.contrast(z), dim=1)


@dataclass(eq=False)
class ScGcc(OnGraph):
    """Two views of a cell, each with other genes hidden and other neighbours, must be closest to each other (InfoNCE).

    The published method clusters by these embeddings and has no decoder; here one decodes them to counts (Poisson), as
    a table of imputation needs. Different from the paper: the other cells of the batch are the negatives (published:
    a queue of momentum embeddings).

    Parameters
    ----------
    width, latent
        Width of the layers, numbers of the embedding.
    weight
        Weight of the contrast against the likelihood.

    Examples
    --------
    >>> from distdiff.baselines.scgcc import ScGcc
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), ScGcc(width=8, latent=4, k=4, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.spent <= 20
    True
    """

    width: int | Sequence[int] = (64, 128)
    latent: int = 32
    weight: float | Sequence[float] = 0.1

    label = "scGCC"

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """The network."""
        return _Network(genes, option["width"], option["latent"])

    def view(self, network: Any, cells: Cells, observed: Tensor, keep: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Depth, log rate relative to ``s gene_mean`` and embedding; ``keep`` neighbours at random (0: all)."""
        s, y = self.scaled(cells.counts, observed)
        near = self.neighbours(cells, observed)
        if keep:
            near = near[:, torch.randperm(near.shape[1])[:keep]]
        raw, z = network(torch.cat((y, observed), 1), near)
        return s, raw.clamp(-LARGEST, LARGEST), z

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """Poisson likelihood of every entry of the first view, and the contrast of both."""
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        keep = max(1, self.option["k"] // 2)
        s, raw, one = self.view(network, cells, observed, keep)
        _, _, two = self.view(network, cells, torch.from_numpy(random_masks(cells.counts.shape, rng)), keep)
        contrast = cross_entropy(one @ two.T / TEMPERATURE, torch.arange(len(one)))
        log_rate = (s * self.profile).clamp_min(1e-6).log() + raw
        yield (log_rate.exp() - cells.counts * log_rate).mean() + self.option["weight"] * contrast

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The decoded rate."""
        s, raw, _ = self.view(network, cells, observed)
        return s * self.profile * raw.exp()
