"""Non-zero entries -> a few latents -> all genes: cost O(nnz m + G m), for 20,000 genes and more (ours)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from distdiff.denoise import Denoiser, layers
from distdiff.denoise.attention import Block, CrossAttention, Ragged, SelfAttention, Whole, check_heads
from distdiff.denoise.embed import SHORTCUT_AXES, AdaptiveNorm, Conditioning, Expectation, Shortcut, start
from distdiff.types import Condition, DataSpec, Float, Tensor


class Latent(Denoiser):
    """A few latents attend to the tokens of the non-zero entries of x_p, and every gene attends to the latents.

    Most entries of a thinned cell are 0, so an encoder over non-zero entries is cheap where attention among all genes
    is not. Measured zeros reach the latents through the depth, the mean p and the shortcut.

    Parameters
    ----------
    width
        Numbers of a token and of a latent.
    depth
        Blocks of the trunk among latents.
    heads
        Attention heads; they must divide ``width``.
    latents
        Number of latents.
    shortcut
        One matrix from all evidence to the latents and one from their mean to all outputs, in parallel to the tokens.

    Raises
    ------
    ValueError
        ``heads`` does not divide ``width``, or ``latents`` is below 1.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.latent import Latent
    >>> from distdiff.types import Condition, DataSpec
    >>> network = Latent(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), 2, width=8, depth=1, heads=2, latents=4)
    >>> network(torch.ones(3, 2), torch.ones(3, 2), Condition()).shape
    torch.Size([3, 2, 2])
    """

    ragged = "it reads as many tokens as there are non-zero entries"

    def __init__(
        self, spec: DataSpec, outputs: int, *, width: int = 64, depth: int = 3, heads: int = 4, latents: int = 32,
        shortcut: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.gene_axes = {"gene": 0, "ask": 0, "bias": 0, **SHORTCUT_AXES}
        check_heads("latent", width, heads)
        if latents < 1:
            raise ValueError(f"denoiser latent: latents must be at least 1, got {latents}")
        self.expectation = Expectation(spec)
        self.condition = Conditioning(spec, width)
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.shortcut = Shortcut(spec, outputs, width) if shortcut else None
        self.gene = nn.Parameter(torch.randn(spec.n_genes, width) * width**-0.5)
        self.ask = nn.Parameter(torch.randn(spec.n_genes, width))
        self.cell = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.value, self.own = nn.Linear(4, width), nn.Linear(4, width)
        self.norm_in, self.read = AdaptiveNorm(width, width), CrossAttention(width, heads)
        self.norm_tell, self.tell = AdaptiveNorm(width, width), nn.Linear(width, 2 * width, bias=False)
        self.heads = heads
        self.blocks = nn.ModuleList(Block(width, SelfAttention(width, heads)) for _ in layers(depth))
        self.norm_out = AdaptiveNorm(width, width)
        self.answer = nn.Linear(width, outputs, bias=False)
        self.bias = nn.Parameter(torch.empty(spec.n_genes, outputs))
        with torch.no_grad():
            start(self.bias)
        nn.init.zeros_(self.answer.weight)

    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """See :class:`~distdiff.denoise.Denoiser`; output 0 is relative to gene mean x depth."""
        h, c, log_depth, values, tokens = self._trunk(x, p, cond)
        # the query of a gene is its embedding, the same in all cells; its own count is added after the attention
        h, _ = self.norm_tell(h, c, tokens.spread)
        k, v = self.tell(h).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.ask.to(k.dtype).unflatten(-1, (self.heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y, _ = self.norm_out(read + self.own(values), c, tokens.spread)
        raw = self.answer(F.gelu(y)).float() + self.bias
        if self.shortcut is not None:
            raw = raw + self.shortcut.answers(h.mean(1))
        return self.expectation.add_to(raw, log_depth) if self.relative else raw

    def hidden(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b d"]:
        """The mean of the latents after the last block."""
        return self._trunk(x, p, cond)[0].mean(1)

    def _trunk(self, x: Tensor, p: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor, Tensor, Whole]:
        """Latents ``[b m d]``, conditioning ``[b d]``, log depth, what is known of each entry, layout of latents."""
        log_depth, surprise = self.expectation(x, p)
        c = self.condition(log_depth, p, cond)
        if self.shortcut is not None:
            c = c + self.shortcut.evidence(surprise)
        values = torch.stack((surprise, x, p, (p > 0).to(x.dtype)), -1)
        h = self._encode(values, x, p, c)
        tokens = Whole(h.new_ones(h.shape[:2], dtype=torch.bool))
        for block in self.blocks:
            h = block(h, c, tokens)
        return h, c, log_depth, values, tokens

    def _encode(self, values: Tensor, x: Tensor, p: Tensor, c: Float[Tensor, "b d"]) -> Float[Tensor, "b m d"]:
        """The latents of each cell after they attended to its non-zero entries (and the cell token)."""
        cell, token = F.pad((x != 0) & (p > 0), (1, 0), value=True).nonzero(as_tuple=True)
        found = F.pad(values, (0, 0, 1, 0))[cell, token]
        entries = self.value(found) + torch.cat((self.cell, self.gene))[token]
        h = self.latents + c.unsqueeze(1)
        m = len(self.latents)
        pairs = Ragged(torch.arange(len(x), device=x.device).repeat_interleave(m), cell, len(x))

        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return pairs.attend(q.flatten(0, 1), k, v).flatten(1).unflatten(0, (-1, m))

        y, gate = self.norm_in(h, c, _each)
        return h + gate * self.read(y, entries, look)


def _each(values: Float[Tensor, "b d"]) -> Float[Tensor, "b 1 d"]:
    return values.unsqueeze(1)
