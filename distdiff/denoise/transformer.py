"""A token for every gene, attention among genes through torch's scaled_dot_product_attention (flash on CUDA)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from distdiff.denoise import Denoiser
from distdiff.denoise.embed import AdaptiveNorm, Conditioning, Expectation, start
from distdiff.types import Condition, DataSpec, Float, Tensor


class Transformer(Denoiser):
    """Gene token = gene embedding + projection of (surprise, count, p, seen at all); pre-norm blocks with adaLN.

    Parameters
    ----------
    width, depth, heads
        Token width, number of blocks, attention heads; ``heads`` must divide ``width``.

    Raises
    ------
    ValueError
        ``heads`` does not divide ``width``.
    """

    def __init__(self, spec: DataSpec, outputs: int, *, width: int = 64, depth: int = 3, heads: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"denoiser transformer: heads={heads} must divide width={width}")
        self.outputs = outputs
        self.expectation = Expectation(spec)
        self.condition = Conditioning(spec, width)
        self.gene = nn.Parameter(torch.randn(spec.n_genes, width) * 0.02)
        self.value = nn.Linear(4, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = AdaptiveNorm(width, width)
        self.answer = nn.Linear(width, outputs, bias=False)
        self.bias = nn.Parameter(torch.empty(spec.n_genes, outputs))
        with torch.no_grad():
            start(self.bias)
        nn.init.zeros_(self.answer.weight)

    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """See :class:`~distdiff.denoise.Denoiser`; answer 0 is relative to gene mean x depth."""
        log_depth, surprise = self.expectation(x, p)
        c = self.condition(log_depth, p, cond)
        h = self.value(torch.stack((surprise, x, p, (p > 0).to(x.dtype)), -1)) + self.gene
        for block in self.blocks:
            h = block(h, c)
        h, _ = self.norm(h, c)
        raw = self.answer(h).float() + self.bias
        if not self.relative:
            return raw
        offset = self.expectation.log_rate(log_depth).unsqueeze(-1)
        return torch.cat((raw[..., :1] + offset, raw[..., 1:]), -1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = AdaptiveNorm(width, width), AdaptiveNorm(width, width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Float[Tensor, "b g d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b g d"]:
        y, gate = self.norm_attention(h, c)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y, gate = self.norm_mlp(h, c)
        return h + gate * self.mlp(y)
