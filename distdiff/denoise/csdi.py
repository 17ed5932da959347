"""The network of scIDPMs (CSDI with genes in the place of time; its figure 2), to compare with, not to prefer."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from distdiff.component import nearest
from distdiff.denoise import Denoiser, layers
from distdiff.denoise.attention import Whole, check_heads
from distdiff.denoise.embed import Expectation, add_labels, start
from distdiff.denoise.lsh import HashedAttention
from distdiff.types import Bool, Condition, DataSpec, Float, Tensor

STEPS, EMBEDDING, POSITION, FEATURE = 300, 128, 32, 16


class CSDI(Denoiser):
    """1x1 convolutions, gated residual blocks, attention over genes; the step as 128 numbers (docs/MATHS.md 8.4).

    Evidence (``p = 1``) and state (``p < 1``) are two input channels. The side information of a gene is a sinusoid of
    its *position*, a constant, and whether it is evidence; as published, there is no gene embedding and no label.
    With the defaults, one output and no labels it has the published 527,825 weights less the 151,296 of a feature
    attention that is never called there.

    Different from the paper: the step is ``t = 300 (1 - p)`` with p the mean over the targets; tokens at exactly p = 0,
    pure noise, are no keys; labels, if any, are added to the step embedding.

    Parameters
    ----------
    width
        Channels.
    depth
        Residual blocks (published code: 6, paper: 4).
    heads
        Attention heads; they must divide ``width``.
    attention
        ``full``, or ``lsh`` over genes (the published code intends it but does not apply it).
    bucket
        Keys in a chunk of the hashed attention.
    rounds
        Independent hashes of the hashed attention.
    dropout
        Within the attention layers.
    gene_embedding
        Add a learned embedding of each gene, which the published network lacks.

    Raises
    ------
    ValueError
        Unknown ``attention``, ``heads`` that do not divide ``width``.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.csdi import CSDI
    >>> from distdiff.types import Condition, DataSpec
    >>> network = CSDI(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), 1, width=8, depth=1, heads=2).eval()
    >>> network(torch.zeros(3, 2), torch.ones(3, 2), Condition()).shape
    torch.Size([3, 2, 1])
    """

    label_tables = "tables"

    position: Tensor
    table: Tensor

    def __init__(
        self, spec: DataSpec, outputs: int, *, width: int = 64, depth: int = 6, heads: int = 8,
        attention: str = "full", bucket: int = 16, rounds: int = 8, dropout: float = 0.1,
        gene_embedding: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.gene_axes = {"gene": 0, "position": 0}
        check_heads("csdi", width, heads)
        if attention not in ("full", "lsh"):
            raise ValueError(f"denoiser csdi: attention={attention!r}{nearest(attention, ('full', 'lsh'))}")
        self.expectation = Expectation(spec)
        self.register_buffer("table", _steps(), persistent=False)
        self.register_buffer("position", _positions(spec.n_genes))
        self.step = nn.Sequential(
            nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING), nn.SiLU()
        )
        self.feature = nn.Parameter(torch.randn(FEATURE))
        self.gene = nn.Parameter(torch.randn(spec.n_genes, width) * 0.02) if gene_embedding else None
        self.names = tuple(spec.labels)
        self.tables = nn.ModuleList(nn.Embedding(len(spec.labels[name]), EMBEDDING) for name in self.names)
        self.enter = _conv(2, width)
        self.blocks = nn.ModuleList()
        for _ in layers(depth):
            hashed = None
            if attention == "lsh":
                hashed = HashedAttention(width, heads, spec.n_genes, bucket=bucket, rounds=rounds)
            self.blocks.append(_Residual(width, heads, dropout, hashed))
        self.skip, self.answer = _conv(width, width), _conv(width, outputs)
        nn.init.zeros_(self.answer.weight)
        with torch.no_grad():
            start(self.answer.bias.unsqueeze(0))

    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """See :class:`~distdiff.denoise.Denoiser`; output 0 is relative to gene mean x depth for laws of counts."""
        raw = self.answer(self._trunk(x, p, cond)).float()
        return self.expectation.add_to(raw, self.expectation(x, p)[0]) if self.relative else raw

    def hidden(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b d"]:
        """The channels before the last convolution, their mean over genes."""
        return self._trunk(torch.where(p > 0, x, 0.0), p, cond).mean(1)

    def _trunk(self, x: Tensor, p: Tensor, cond: Condition) -> Float[Tensor, "b g d"]:
        """The channels of each gene before the last convolution."""
        known, seen = (p == 1).to(x.dtype), p > 0
        asked = (1 - known).sum(1).clamp_min(1)
        level = ((1 - known) * p).sum(1) / asked
        step = self.step(self.table[(STEPS * (1 - level)).round().long().clamp(0, STEPS)])
        step = add_labels(step, self.names, self.tables, cond)
        h = F.relu(self.enter(torch.stack((known * x, (1 - known) * x), -1)))
        if isinstance(self.gene, nn.Parameter):
            h = h + self.gene
        side = torch.cat((self.position, self.feature.expand(len(self.position), -1)), 1)
        side = torch.cat((side.expand(len(x), -1, -1), known.unsqueeze(-1)), -1)
        skips = torch.zeros_like(h)
        for block in self.blocks:
            h, skip = block(h, side, step, seen)
            skips = skips + skip
        return F.relu(self.skip(skips / math.sqrt(len(self.blocks))))


class _Residual(nn.Module):
    """``(x + residual) / sqrt(2)`` and a skip, from attention over genes and a gate under the side information."""

    def __init__(self, width: int, heads: int, dropout: float, hashed: HashedAttention | None):
        super().__init__()
        self.step = nn.Linear(EMBEDDING, width)
        self.encoder = _Encoder(width, heads, dropout, hashed)
        self.middle, self.side = _conv(width, 2 * width), _conv(POSITION + FEATURE + 1, 2 * width)
        self.out = _conv(width, 2 * width)

    def forward(
        self, h: Float[Tensor, "b g d"], side: Float[Tensor, "b g s"], step: Float[Tensor, "b e"],
        seen: Bool[Tensor, "b g"],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y = self.encoder(h + self.step(step).unsqueeze(1), seen)
        gate, filtered = (self.middle(y) + self.side(side)).chunk(2, -1)
        residual, skip = self.out(torch.sigmoid(gate) * torch.tanh(filtered)).chunk(2, -1)
        return (h + residual) / math.sqrt(2), skip


class _Encoder(nn.Module):
    """Post-norm encoder layer, feed-forward as wide as the model (``nn.TransformerEncoderLayer`` but for the mask)."""

    def __init__(self, width: int, heads: int, dropout: float, hashed: HashedAttention | None):
        super().__init__()
        self.heads, self.dropout, self.hashed = heads, dropout, hashed
        if hashed is None:
            self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.narrow, self.widen = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_attention, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, h: Float[Tensor, "b g d"], seen: Bool[Tensor, "b g"]) -> Float[Tensor, "b g d"]:
        seen = seen | ~seen.any(
            1, keepdim=True
        )  # of a cell of which nothing is seen, every token is as good as another
        drop = self.dropout if self.training else 0.0
        if self.hashed is not None:
            attended = self.hashed(h, Whole(seen))
        else:
            q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None], dropout_p=drop)
            attended = self.project(attended.transpose(1, 2).flatten(2))
        h = self.norm_attention(h + F.dropout(attended, drop))
        return self.norm_out(h + F.dropout(self.widen(F.dropout(F.gelu(self.narrow(h)), drop)), drop))


def _conv(i: int, o: int) -> nn.Linear:
    """A convolution of width 1 over genes, channels last."""
    layer = nn.Linear(i, o)
    nn.init.kaiming_normal_(layer.weight)
    return layer


def _steps() -> Float[Tensor, "t e"]:
    """``sin, cos(t 10^{4j/63})``, t = 0..300, j = 0..63 (docs/MATHS.md 8.4)."""
    half = EMBEDDING // 2
    angle = torch.arange(STEPS + 1, dtype=torch.float64)[:, None] * 10 ** (torch.arange(half) / (half - 1) * 4)
    return torch.cat((angle.sin(), angle.cos()), 1).float()


def _positions(n: int) -> Float[Tensor, "g e"]:
    """Sinusoids of a gene's column number, base 10,000."""
    angle = torch.arange(n)[:, None] / 1e4 ** (torch.arange(0, POSITION, 2) / POSITION)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).float()
