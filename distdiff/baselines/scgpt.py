"""A masked autoencoder over genes in the manner of scGPT (Cui et al., Nat Methods 2024), trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from distdiff.baselines._deep import LARGEST, Deep
from distdiff.types import Cells, Tensor


class Attention(nn.Module):
    """Pre-norm attention and MLP; tokens that are not ``keys`` ask and are not asked.

    Examples
    --------
    >>> import torch
    >>> from distdiff.baselines.scgpt import Attention
    >>> Attention(8, 2)(torch.zeros(1, 3, 8), torch.tensor([[True, True, False]])).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        """``[b n d] -> [b n d]``; ``keys`` is ``bool [b n]``."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(tokens)).chunk(3, 2)
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


class _Network(nn.Module):
    def __init__(self, genes: int, width: int, depth: int, heads: int, bins: int) -> None:
        super().__init__()
        self.gene = nn.Parameter(torch.randn(genes, width))
        self.cell = nn.Parameter(torch.randn(1, 1, width))
        self.value = nn.Embedding(bins + 1, width)
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.end = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1))
        self.whole = nn.Linear(width, width, bias=False)

    def forward(self, bins: Tensor, observed: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Two predictions ``[b n]`` for the genes ``at``: by their own tokens, and by the cell's."""
        tokens = torch.cat((self.cell.expand(len(bins), -1, -1), self.gene[at] + self.value(bins)), 1)
        keys = nn.functional.pad(observed > 0, (1, 0), value=True)
        for block in self.blocks:
            tokens = block(tokens, keys)
        by_cell = (self.whole(tokens[:, :1]) * self.gene[at]).mean(2)
        return self.end(tokens[:, 1:])[..., 0], by_cell


@dataclass(eq=False)
class ScGpt(Deep):
    """Gene tokens with binned values; hidden genes ask with a mask value and are answered by attention to the seen.

    Values ``log(1 + x / s)`` are binned (published: by each cell's quantiles; here evenly up to the largest training
    value, so that an answer has a scale). The loss is the squared error of hidden genes' logarithms, by their own
    tokens and by the cell token, as published. A training step sees ``context`` random genes.

    Parameters
    ----------
    width, depth, heads
        Numbers of a token, blocks, attention heads.
    bins
        Bins of the values.
    context
        Most genes of a training step.

    Examples
    --------
    >>> from distdiff.baselines.scgpt import ScGpt
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), ScGpt(width=8, depth=1, heads=2, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.capacity > 0
    True
    """

    width: int | Sequence[int] = 64
    depth: int | Sequence[int] = 3
    heads: int = 4
    bins: int = 51
    context: int = 256
    lr: float | Sequence[float] = (1e-3, 3e-4)

    cells_at_once: ClassVar[int] = 16
    label = "masked autoencoder (scGPT)"

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Measure the range of the values, then train."""
        self.profile = torch.from_numpy(self.gene_mean).float()
        _, y = self.scaled(kept.counts, torch.ones_like(kept.counts))
        self.most = y.max().clamp_min(1e-3)
        super().solve(kept, held, option)

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """The network."""
        return _Network(genes, option["width"], option["depth"], option["heads"], option["bins"])

    def both(self, network: Any, y: Tensor, observed: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions of ``log(1 + x / s)``, relative to the average cell's."""
        last = self.option["bins"] - 1
        bins = (y[:, at] / self.most * last).ceil().long().clamp(0, last)
        seen = observed[:, at]
        return network(torch.where(seen > 0, bins, last + 1), seen, at)

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """Squared error of the hidden genes."""
        s, y = self.scaled(cells.counts, observed)
        at = torch.randperm(y.shape[1])[: self.option["context"]]
        target = torch.log1p(cells.counts[:, at] / s) - torch.log1p(self.profile[at])
        hidden = 1 - observed[:, at]
        errors = [(answer - target).square() for answer in self.both(network, y, observed, at)]
        yield sum((hidden * error).sum() for error in errors) / hidden.sum().clamp_min(1)

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The answers of the genes' own tokens."""
        s, y = self.scaled(cells.counts, observed)
        own, _ = self.both(network, y, observed, torch.arange(y.shape[1]))
        return s * torch.expm1((torch.log1p(self.profile) + own).clamp(0, LARGEST))
