"""Attention over genes by locality-sensitive hashing (Reformer; MATHS 10.1): time and memory linear in genes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distdiff.denoise.attention import Packed, Whole
from distdiff.denoise.transformer import Transformer
from distdiff.types import Bool, DataSpec, Float, Int, Tensor

ITSELF = -1e5
"""Logit of a token on itself (queries and keys are shared, so it would look at nothing else): the last resort."""

WORKSPACE = 1 << 24
"""Logits computed at once: 64 MiB of float32."""

ONE_HASH = 64
"""Buckets up to which one rotation hashes; beyond, two of the square root, so that hashing stays near linear."""


class LSH(Transformer):
    """The transformer with hashed attention: each gene looks at about ``2 bucket`` genes a round, those most like it.

    Parameters
    ----------
    width, depth, heads, checkpoint
        As for the transformer.
    bucket
        Keys in a chunk; a query looks at its chunk and the one before. More than the number of genes: full attention,
        exactly.
    rounds
        Independent hashes, whose answers are joined by their normalisers.

    Raises
    ------
    ValueError
        ``bucket`` or ``rounds`` below 1; ``heads`` does not divide ``width``.
    """

    def __init__(
        self, spec: DataSpec, outputs: int, *, width: int = 64, depth: int = 3, heads: int = 4, bucket: int = 64,
        rounds: int = 2, checkpoint: bool = False,
    ):  # fmt: skip
        for name, value in (("bucket", bucket), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"denoiser lsh: {name} must be at least 1, got {value}")
        self._hashing = {"bucket": bucket, "rounds": rounds}
        super().__init__(spec, outputs, width=width, depth=depth, heads=heads, checkpoint=checkpoint)

    def attention(self, spec: DataSpec, width: int, heads: int) -> nn.Module:
        return HashedAttention(width, heads, spec.n_genes + 1, **self._hashing)


class HashedAttention(nn.Module):
    """Multi-head :func:`lsh_attention` over ``n`` tokens, its rotations drawn once and saved with the weights."""

    rotations: Tensor

    def __init__(self, width: int, heads: int, n: int, *, bucket: int, rounds: int):
        super().__init__()
        self.heads, self.bucket = heads, bucket
        self.qk, self.v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.register_buffer("rotations", rotations(width // heads, n, bucket, rounds))

    def forward(self, h: Float[Tensor, "b n d"], tokens: Whole | Packed) -> Float[Tensor, "b n d"]:
        """See :class:`~distdiff.denoise.attention.SelfAttention`."""
        assert isinstance(tokens, Whole)
        qk, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.qk, self.v))
        out = lsh_attention(qk, v, tokens.seen, self.rotations, self.bucket)
        return self.out(out.transpose(1, 2).flatten(2))


def rotations(
    channels: int, n: int, bucket: int, rounds: int, *, rng: torch.Generator | None = None
) -> Float[Tensor, "r s e k"]:
    """Random rotations R of (10.1): ``rounds`` of them, in one or two factors, for ``n`` tokens."""
    chunks = -(-n // bucket)
    factors = 1 if chunks <= ONE_HASH else 2
    half = max(1, math.ceil(chunks ** (1 / factors) / 2))
    return torch.randn(rounds, factors, channels, half, generator=rng)


def places(qk: Float[Tensor, "l n e"], rotation: Float[Tensor, "s e k"]) -> Float[Tensor, "l n"]:
    """Where a token is sorted to: its bucket ``h(v) = argmax[v R; -v R]`` (10.1), within it by how far it points there.

    Two factors give the two digits of a bucket's number. Nothing depends on the order of the tokens. ``float64``.
    """
    code = strength = torch.zeros(qk.shape[:-1], dtype=torch.float64, device=qk.device)
    for factor in rotation:
        turned = qk @ factor.to(qk)
        strength, bucket = torch.cat((turned, -turned), -1).max(-1)
        code = code * (2 * factor.shape[-1]) + bucket
    return code + (0.5 + torch.atan(strength.double()) / torch.pi) * 0.999


def lsh_attention(
    qk: Float[Tensor, "b h n e"], v: Float[Tensor, "b h n e"], seen: Bool[Tensor, "b n"],
    rotations: Float[Tensor, "r s e k"], bucket: int,
) -> Float[Tensor, "b h n e"]:  # fmt: skip
    """Shared-QK attention within hashed neighbourhoods (10.1), over tokens of one cell, not causal.

    In each round the tokens that are seen are sorted by bucket and cut into chunks of ``bucket`` keys. A query looks at
    the chunk where its own bucket lies and the one before (the last before the first). Tokens that are not seen only
    ask: neither sort nor chunks depend on them. Rounds are joined by their normalisers: a key met in two rounds counts
    twice, in one softmax. At most ``bucket`` seen tokens: full attention, exactly.

    Nothing of n x n is made, and no logits are kept: the backward pass makes them again, chunk by chunk.

    Parameters
    ----------
    qk, v
        Shared queries and keys (keys are normalised here); values.
    seen
        Which tokens are keys; at least one a cell.
    rotations
        Of :func:`rotations`.
    bucket
        Keys of a chunk.
    """
    b, heads, n, e = qk.shape
    q, k = qk.reshape(b * heads, n, e), F.normalize(qk, dim=-1).reshape(b * heads, n, e)
    visible = seen.repeat_interleave(heads, 0)
    with torch.no_grad():
        rounds = [meetings(places(q, rotation), visible, bucket) for rotation in rotations]
    out: Tensor = _Hashed.apply(q * e**-0.5, k, v.reshape(b * heads, n, e), rounds)
    return out.view(b, heads, n, e)


@dataclass(frozen=True)
class Meetings:
    """Who meets whom in one round: blocks of queries, each before two chunks of keys.

    Attributes
    ----------
    key
        ``int64 [l c s]``: token at each place of each chunk; ``n``: the place is empty.
    query
        ``int64 [l B s]``: token at each place of each block; ``n``: the place is empty.
    slot
        ``int64 [l n]``: each token's place among the queries ``[B s]``.
    chunk, before
        ``int64 [l B]``: a block's chunk and the one before; equal where there is but one.
    """

    key: Tensor
    query: Tensor
    slot: Tensor
    chunk: Tensor
    before: Tensor

    def parts(self) -> Iterator[tuple[slice, Meetings]]:
        """Pieces of the ``l`` (cell, head) pairs whose logits fit the workspace."""
        pairs, blocks, size = self.query.shape
        some = max(1, WORKSPACE // (blocks * size * 2 * size))
        for first in range(0, pairs, some):
            at = slice(first, first + some)
            yield at, Meetings(self.key[at], self.query[at], self.slot[at], self.chunk[at], self.before[at])

    def keys(self) -> Int[Tensor, "l B t"]:
        """The tokens that each block looks at; ``n``: none."""
        pairs = torch.arange(len(self.key), device=self.key.device).unsqueeze(1)
        second = self.key[pairs, self.before].masked_fill((self.before == self.chunk).unsqueeze(-1), self.slot.shape[1])
        return torch.cat((self.key[pairs, self.chunk], second), -1)

    def back(self, values: Float[Tensor, "l B s e"]) -> Float[Tensor, "l n e"]:
        """From the blocks' places to the tokens."""
        return _take(values.flatten(1, 2), self.slot)


def meetings(at: Float[Tensor, "l n"], seen: Bool[Tensor, "l n"], bucket: int) -> Meetings:
    """Sort and cut one round (see :func:`lsh_attention`) of tokens that belong at those :func:`places`."""
    pairs, n = at.shape
    size = min(bucket, n)
    chunks = -(-n // size)
    line, order = torch.where(seen, at, torch.inf).sort(dim=1, stable=True)
    n_seen = seen.sum(1, keepdim=True)
    place = torch.arange(n, device=at.device).repeat(pairs, 1)
    key = F.pad(torch.where(place < n_seen, order, n), (0, chunks * size - n), value=n).view(pairs, chunks, size)

    # a seen token stands in the line, another where it would
    own = torch.empty_like(place).scatter_(1, order, place)
    chunk = torch.where(seen, own, torch.minimum(torch.searchsorted(line, at), n_seen - 1)) // size

    # the queries of a chunk fill as many blocks as they need
    count = torch.zeros(pairs, chunks, dtype=torch.long, device=at.device).scatter_add_(
        1, chunk, torch.ones_like(chunk)
    )
    blocks = -(-count // size)
    ends = blocks.cumsum(1)
    by_chunk, asker = chunk.sort(dim=1, stable=True)
    within = place - (count.cumsum(1) - count).gather(1, by_chunk)
    put = (ends - blocks).gather(1, by_chunk) * size + within
    total = int(ends[:, -1].max())
    query = place.new_full((pairs, total * size), n).scatter_(1, put, asker).view(pairs, total, size)
    slot = torch.empty_like(place).scatter_(1, asker, put)
    number = torch.arange(total, device=at.device).repeat(pairs, 1)
    of_block = torch.searchsorted(ends, number, right=True).clamp(max=chunks - 1)
    return Meetings(key, query, slot, of_block, (of_block - 1) % (-(-n_seen // size)))


class _Hashed(torch.autograd.Function):
    """One softmax over all meetings of all rounds: forwards online, backwards from the normaliser alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rounds: list[Meetings]) -> Tensor:
        top = q.new_full((*q.shape[:2], 1), -torch.inf, dtype=torch.float32)
        total, out = torch.zeros_like(top), torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        for at, met in _parts(rounds):
            weight, _ = _logits(q[at], k[at], met)
            high = weight.amax(-1, keepdim=True)
            weight.sub_(high).exp_()
            part = met.back((weight.to(v.dtype) @ _take(v[at], met.keys())).float())
            share, high = met.back(weight.sum(-1, keepdim=True)), met.back(high)
            most = torch.maximum(top[at], high)
            down, up = (top[at] - most).exp(), (high - most).exp()
            out[at] = out[at] * down + part * up
            total[at] = total[at] * down + share * up
            top[at] = most
        out /= total
        ctx.rounds = rounds
        ctx.save_for_backward(q, k, v, out, top + total.log())
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, out, normaliser = ctx.saved_tensors
        grad = grad.to(v.dtype)
        inner = (grad.float() * out).sum(-1, keepdim=True)
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        for at, met in _parts(ctx.rounds):
            keys = met.keys()
            weight, itself = _logits(q[at], k[at], met)
            weight.sub_(_take(normaliser[at], met.query)).exp_()
            above = _take(grad[at], met.query)
            _add(d_v[at], keys, weight.to(v.dtype).transpose(-1, -2) @ above)
            slope = (above @ _take(v[at], keys).transpose(-1, -2)).float() - _take(inner[at], met.query)
            slope = slope.mul_(weight).masked_fill_(itself, 0).to(q.dtype)
            d_q[at] += met.back((slope @ _take(k[at], keys)).float())
            _add(d_k[at], keys, slope.transpose(-1, -2) @ _take(q[at], met.query))
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None


def _parts(rounds: list[Meetings]) -> Iterator[tuple[slice, Meetings]]:
    return (part for met in rounds for part in met.parts())


def _logits(q: Tensor, k: Tensor, met: Meetings) -> tuple[Float[Tensor, "l B s t"], Bool[Tensor, "l B s t"]]:
    keys = met.keys()
    logits = (_take(q, met.query) @ _take(k, keys).transpose(-1, -2)).float()
    itself = met.query.unsqueeze(-1) == keys.unsqueeze(-2)
    logits.masked_fill_(itself, ITSELF).masked_fill_((keys == q.shape[1]).unsqueeze(-2), -torch.inf)
    return logits, itself


def _take(values: Float[Tensor, "l n e"], at: Int[Tensor, "l ..."]) -> Float[Tensor, "l ... e"]:
    """Values at those places; 0 at the place behind the last."""
    pairs, n, e = values.shape
    flat = (at.clamp(max=n - 1) + n * torch.arange(pairs, device=at.device).view(-1, *[1] * (at.dim() - 1))).flatten()
    taken = values.reshape(pairs * n, e).index_select(0, flat).view(*at.shape, e)
    return taken.masked_fill_((at == n).unsqueeze(-1), 0) if at.dim() > 2 else taken


def _add(to: Float[Tensor, "l n e"], at: Int[Tensor, "l B t"], values: Float[Tensor, "l B t e"]) -> None:
    """Add values at those places; what belongs behind the last is dropped (it is 0)."""
    pairs, n, e = to.shape
    flat = (at.clamp(max=n - 1) + n * torch.arange(pairs, device=at.device).view(-1, 1, 1)).flatten()
    to.view(pairs * n, e).index_add_(0, flat, values.reshape(-1, e).float())
