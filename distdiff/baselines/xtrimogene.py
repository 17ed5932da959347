"""An asymmetric masked autoencoder in the manner of xTrimoGene (Gong et al., NeurIPS 2023), trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from distdiff.baselines._deep import LARGEST, Deep
from distdiff.baselines.scgpt import Attention
from distdiff.types import Cells, Tensor


class _Linear(nn.Module):
    """Attention of linear cost (a kernel of ``elu + 1``, in the place of a Performer's random features), and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(tokens)).chunk(3, 2)
        q, k = nn.functional.elu(q) + 1, (nn.functional.elu(k) + 1) * keys[..., None]
        total = (q @ k.sum(1)[:, :, None]).clamp_min(1e-6)
        tokens = tokens + self.out(q @ (k.mT @ v) / total)
        return tokens + self.mlp(tokens)


class _Network(nn.Module):
    def __init__(self, genes: int, width: int, depth: int, heads: int, bins: int) -> None:
        super().__init__()
        self.gene = nn.Parameter(torch.randn(genes, width))
        self.weights = nn.Sequential(nn.Linear(1, bins), nn.LeakyReLU(), nn.Linear(bins, bins))
        self.bins = nn.Parameter(torch.randn(bins, width))
        self.special = nn.Parameter(torch.randn(3, width))  # the cell, an observed zero, a hidden gene
        self.encoder = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.decoder = _Linear(width)
        self.end = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, y: Tensor, observed: Tensor) -> Tensor:
        """Answers ``[b g]``: tokens of non-zero evidence are encoded, then all genes are decoded."""
        found = (y > 0) & (observed > 0)
        longest = max(1, int(found.sum(1).max()))
        order = found.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        keys = found.gather(1, order)
        value = y.gather(1, order)[..., None]
        tokens = self.gene[order] + self.weights(value).softmax(2) @ self.bins
        cell = self.special[:1].expand(len(y), 1, -1)
        tokens, keys = torch.cat((cell, tokens), 1), nn.functional.pad(keys, (1, 0), value=True)
        for block in self.encoder:
            tokens = block(tokens, keys)
        state = torch.where(observed[..., None] > 0, self.special[1], self.special[2]) + self.gene
        encoded = torch.where(
            keys[:, 1:, None], tokens[:, 1:], state.gather(1, order[..., None].expand(-1, -1, state.shape[2]))
        )
        state = state.scatter(1, order[..., None].expand(-1, -1, state.shape[2]), encoded)
        state = state + tokens[:, :1]
        return self.end(self.decoder(state, observed))[..., 0]


@dataclass(eq=False)
class XTrimoGene(Deep):
    """The encoder sees tokens of non-zero evidence alone, a light decoder all genes; values are soft mixtures of bins.

    The loss is the squared error of the hidden genes' ``log(1 + x / s)``, zeros included.

    Parameters
    ----------
    width, depth, heads
        Numbers of a token, blocks of the encoder, attention heads.
    bins
        Learned bins that a value is a soft mixture of.

    Examples
    --------
    >>> from distdiff.baselines.xtrimogene import XTrimoGene
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), XTrimoGene(width=8, depth=1, heads=2, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.spent <= 20
    True
    """

    width: int | Sequence[int] = 64
    depth: int | Sequence[int] = 3
    heads: int = 4
    bins: int = 32
    lr: float | Sequence[float] = (1e-3, 3e-4)

    cells_at_once: ClassVar[int] = 16
    label = "masked autoencoder (xTrimoGene)"

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """The network."""
        return _Network(genes, option["width"], option["depth"], option["heads"], option["bins"])

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """Squared error of the hidden genes."""
        s, y = self.scaled(cells.counts, observed)
        target = torch.log1p(cells.counts / s) - torch.log1p(self.profile)
        hidden = 1 - observed
        yield (hidden * (network(y, observed) - target).square()).sum() / hidden.sum().clamp_min(1)

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The decoded logarithms, taken back to molecules."""
        s, y = self.scaled(cells.counts, observed)
        return s * torch.expm1((torch.log1p(self.profile) + network(y, observed)).clamp(0, LARGEST))
