"""A token for every gene, attention among genes through torch's scaled_dot_product_attention (flash on CUDA)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distdiff.denoise import Denoiser, layers
from distdiff.denoise.attention import Block, Packed, SelfAttention, Whole, check_heads
from distdiff.denoise.embed import SHORTCUT_AXES, AdaptiveNorm, Conditioning, Expectation, Shortcut, start
from distdiff.types import Condition, DataSpec, Float, Tensor


class Transformer(Denoiser):
    """Gene token = gene embedding + projection of (surprise, count, p, seen at all); pre-norm blocks with adaLN.

    Tokens of genes with ``p = 0`` are queries and no keys (see :mod:`~distdiff.denoise.attention`).

    Parameters
    ----------
    width
        Numbers of a token.
    depth
        Number of blocks.
    heads
        Attention heads; they must divide ``width``.
    shortcut
        One matrix from all evidence to the cell's vector and one from the cell token to all outputs, in parallel to the
        tokens.
    pack
        Compute only tokens of genes to predict (``p < 1``) and of evidence that is not 0. Saves most where few genes
        are predicted; does not help with ``train.compile``.
    checkpoint
        Recompute each block in the backward pass instead of keeping its activations: memory for about a third more
        time.

    Raises
    ------
    ValueError
        ``heads`` does not divide ``width``.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.transformer import Transformer
    >>> from distdiff.types import Condition, DataSpec
    >>> network = Transformer(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), 2, width=8, depth=1, heads=2)
    >>> network(torch.zeros(3, 2), torch.ones(3, 2), Condition()).shape
    torch.Size([3, 2, 2])
    """

    def __init__(
        self, spec: DataSpec, outputs: int, *, width: int = 64, depth: int = 3, heads: int = 4,
        shortcut: bool = True, pack: bool = False, checkpoint: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.gene_axes = {"gene": 0, "bias": 0, **SHORTCUT_AXES}
        check_heads(type(self).__name__.lower(), width, heads)
        self.pack, self.checkpoint = pack, checkpoint
        if pack:
            self.ragged = "denoiser.pack computes a number of tokens that depends on the cells"
        self.expectation = Expectation(spec)
        self.condition = Conditioning(spec, width)
        self.shortcut = Shortcut(spec, outputs, width) if shortcut else None
        self.cell = nn.Parameter(torch.randn(1, width) * 0.02)
        self.gene = nn.Parameter(torch.randn(spec.n_genes, width) * 0.02)
        self.value = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, self.attention(spec, width, heads)) for _ in layers(depth))
        self.norm = AdaptiveNorm(width, width)
        self.answer = nn.Linear(width, outputs, bias=False)
        self.bias = nn.Parameter(torch.empty(spec.n_genes, outputs))
        with torch.no_grad():
            start(self.bias)
        nn.init.zeros_(self.answer.weight)

    def attention(self, spec: DataSpec, width: int, heads: int) -> nn.Module:
        """The attention of a block: ``(tokens [b n d] or [n d], layout) -> the same shape``."""
        return SelfAttention(width, heads)

    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """See :class:`~distdiff.denoise.Denoiser`; output 0 is relative to gene mean x depth."""
        h, log_depth, at = self._trunk(x, p, cond)
        raw = self.answer(h).float()
        if at is not None:
            raw = raw.new_zeros(len(x), 1 + x.shape[1], raw.shape[-1]).index_put(at, raw)
        raw = raw[:, 1:] + self.bias
        if self.shortcut is not None:
            raw = raw + self.shortcut.answers(_cell_tokens(h, at))
        return self.expectation.add_to(raw, log_depth) if self.relative else raw

    def hidden(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b d"]:
        """The cell token after the last norm; the mean of all tokens where nothing is read from it (no shortcut)."""
        h, _, at = self._trunk(torch.where(p > 0, x, 0.0), p, cond)
        if self.shortcut is not None:
            return _cell_tokens(h, at)
        if at is None:
            return h.mean(1)
        total = h.new_zeros(len(x), h.shape[-1]).index_add(0, at[0], h)
        return total / torch.bincount(at[0], minlength=len(x)).unsqueeze(1)

    def _trunk(self, x: Tensor, p: Tensor, cond: Condition) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens after the last norm (``[b 1+g d]``, packed: ``[n d]``), log depth, cell and token of packed ones."""
        log_depth, surprise = self.expectation(x, p)
        c = self.condition(log_depth, p, cond)
        if self.shortcut is not None:
            c = c + self.shortcut.evidence(surprise)
        values = F.pad(
            torch.stack((surprise, x, p, (p > 0).to(x.dtype)), -1), (0, 0, 1, 0)
        )  # token 0 is the cell token
        identity, at = torch.cat((self.cell, self.gene)), None
        seen = F.pad(p > 0, (1, 0), value=True)
        if self.pack:
            cell, token = F.pad((p < 1) | (x != 0), (1, 0), value=True).nonzero(as_tuple=True)
            at = cell, token
            tokens: Whole | Packed = Packed(cell, seen[cell, token], len(x))
            h = self.value(values[cell, token]) + identity[token]
        else:
            tokens = Whole(seen)
            h = self.value(values) + identity
        for block in self.blocks:
            h = checkpoint(block, h, c, tokens, use_reentrant=False) if self._recompute() else block(h, c, tokens)
        return self.norm(h, c, tokens.spread)[0], log_depth, at

    def _recompute(self) -> bool:
        return self.checkpoint and torch.is_grad_enabled()


def _cell_tokens(h: Tensor, at: tuple[Tensor, Tensor] | None) -> Float[Tensor, "b d"]:
    """Token 0 of every cell."""
    return h[:, 0] if at is None else h[at[1] == 0]
