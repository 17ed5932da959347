"""Attention over genes by locality-sensitive hashing (docs/MATHS.md 10.1): time and memory linear in genes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from distdiff.denoise.attention import Packed, Whole
from distdiff.denoise.transformer import Transformer
from distdiff.types import Bool, DataSpec, Float, Int, Tensor

ITSELF = -1e5
"""Logit of a token with itself. Queries and keys are shared, so it would else attend to itself only."""

WORKSPACE = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Logits computed at once: what fits the cache of a CPU core (2 MiB), or keeps a GPU busy."""

ONE_HASH = 64
"""Most buckets for one rotation; more buckets take two rotations of the square root, which keeps hashing cheap."""


class LSH(Transformer):
    """The transformer with hashed attention: each gene attends to about ``2 bucket`` similar genes a round.

    Parameters
    ----------
    width, depth, heads, shortcut, checkpoint
        As for the transformer.
    bucket
        Keys in a chunk; a query attends to its chunk and the one before. At or above the number of genes this is exact
        full attention.
    rounds
        Independent hashes, joined in one softmax.

    Raises
    ------
    ValueError
        ``bucket`` or ``rounds`` below 1; ``heads`` does not divide ``width``.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.lsh import LSH
    >>> from distdiff.types import Condition, DataSpec
    >>> genes = tuple(f"gene{i}" for i in range(40))
    >>> network = LSH(DataSpec(genes, {}, np.ones(40, np.float32)), 2, width=8, depth=1, heads=2, bucket=8)
    >>> network(torch.zeros(3, 40), torch.ones(3, 40), Condition()).shape
    torch.Size([3, 40, 2])
    """

    ragged = "its queries fill as many blocks as their hashes need"

    def __init__(
        self, spec: DataSpec, outputs: int, *, width: int = 64, depth: int = 3, heads: int = 4, bucket: int = 64,
        rounds: int = 2, shortcut: bool = True, checkpoint: bool = False,
    ):  # fmt: skip
        for name, value in (("bucket", bucket), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"denoiser lsh: {name} must be at least 1, got {value}")
        self._hashing = {"bucket": bucket, "rounds": rounds}
        super().__init__(spec, outputs, width=width, depth=depth, heads=heads, shortcut=shortcut, checkpoint=checkpoint)

    def attention(self, spec: DataSpec, width: int, heads: int) -> nn.Module:
        return HashedAttention(width, heads, spec.n_genes + 1, **self._hashing)


class HashedAttention(nn.Module):
    """Multi-head :func:`lsh_attention` over ``n`` tokens, its rotations drawn once and saved with the weights.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import Whole
    >>> from distdiff.denoise.lsh import HashedAttention
    >>> layer = HashedAttention(width=8, heads=2, n=40, bucket=8, rounds=2)
    >>> layer(torch.zeros(1, 40, 8), Whole(torch.ones(1, 40, dtype=torch.bool))).shape
    torch.Size([1, 40, 8])
    """

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
    """Random rotations R (docs/MATHS.md 10.1): ``rounds`` of them, in one or two factors, for ``n`` tokens.

    Examples
    --------
    >>> from distdiff.denoise.lsh import rotations
    >>> rotations(channels=8, n=1000, bucket=64, rounds=2).shape
    torch.Size([2, 1, 8, 8])
    """
    chunks = -(-n // bucket)
    factors = 1 if chunks <= ONE_HASH else 2
    half = max(1, math.ceil(chunks ** (1 / factors) / 2))
    return torch.randn(rounds, factors, channels, half, generator=rng)


def places(qk: Float[Tensor, "l n e"], rotation: Float[Tensor, "s e k"]) -> Float[Tensor, "l n"]:
    """Sort key of a token: its bucket ``h(v) = argmax[v R; -v R]`` (docs/MATHS.md 10.1) plus a fraction below 1.

    The fraction is larger the further the token points in the bucket's direction. Two factors give the two digits of a
    bucket's number. Nothing depends on the order of the tokens. ``float64``.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.lsh import places
    >>> one = torch.eye(2).unsqueeze(0)  # two tokens, at a right angle
    >>> places(one, torch.eye(2).unsqueeze(0)).floor()  # each in a bucket of its own
    tensor([[0., 1.]], dtype=torch.float64)
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
    """Shared-QK attention within hashed neighbourhoods (docs/MATHS.md 10.1), over tokens of one cell, not causal.

    In each round the seen tokens are sorted by bucket and cut into chunks of ``bucket`` keys. A query attends to the
    chunk of its own bucket and the one before (for the first chunk, the last). Tokens that are not seen are queries
    only; neither the order nor the chunks depend on them. All rounds share one softmax, in which a key that is met in
    two rounds counts twice. With at most ``bucket`` seen tokens this is exact full attention.

    No ``n x n`` matrix is made and no logits are kept; the backward pass computes them again, chunk by chunk.

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

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.lsh import lsh_attention, rotations
    >>> qk, v, seen = torch.zeros(1, 1, 6, 4), torch.ones(1, 1, 6, 4), torch.ones(1, 6, dtype=torch.bool)
    >>> lsh_attention(qk, v, seen, rotations(4, 6, bucket=2, rounds=2), bucket=2).unique()
    tensor([1.])
    """
    b, heads, n, e = qk.shape
    k = F.normalize(qk.float(), dim=-1).to(qk.dtype)  # autocast on CUDA would leave it float32, on a CPU not
    q, k = qk.reshape(b * heads, n, e), k.reshape(b * heads, n, e)
    visible = seen.repeat_interleave(heads, 0)
    with torch.no_grad():
        rounds = [meetings(places(q, rotation), visible, bucket) for rotation in rotations]
    out: Tensor = _Hashed.apply(q * e**-0.5, k, v.reshape(b * heads, n, e), rounds)
    return out.view(b, heads, n, e)


@dataclass(frozen=True)
class Meetings:
    """Which queries meet which keys in one round: blocks of queries, each with two chunks of keys.

    Attributes
    ----------
    key
        ``int64 [l c s]``: token in each slot of each chunk; ``n``: the slot is empty.
    query
        ``int64 [l B s]``: token in each slot of each block; ``n``: the slot is empty.
    itself
        ``int64 [l B s]``: where a query meets its own key, among the ``2 s`` keys; -1: nowhere.
    slot
        ``int64 [l n]``: slot of each token among the queries ``[B s]``.
    chunk, before
        ``int64 [l B]``: a block's chunk and the one before; equal where there is only one.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.lsh import meetings
    >>> pairs = meetings(torch.tensor([[0.3, 2.1, 1.2]]), torch.ones(1, 3, dtype=torch.bool), bucket=2)
    >>> pairs.key  # two chunks of two tokens, sorted by bucket; 3 marks an empty slot
    tensor([[[0, 2],
             [1, 3]]])
    """

    key: Tensor
    query: Tensor
    itself: Tensor
    slot: Tensor
    chunk: Tensor
    before: Tensor

    def parts(self) -> Iterator[tuple[slice, Meetings]]:
        """Parts of the ``l`` (cell, head) pairs, each small enough for its logits to fit the workspace."""
        pairs, blocks, size = self.query.shape
        room = WORKSPACE.get(self.query.device.type, WORKSPACE["cuda"])
        some = max(1, room // (blocks * size * 2 * size))
        for first in range(0, pairs, some):
            at = slice(first, first + some)
            yield at, Meetings(*(getattr(self, field.name)[at] for field in fields(self)))

    def keys(self) -> Int[Tensor, "l B t"]:
        """The tokens that each block attends to; ``n``: none."""
        pairs = torch.arange(len(self.key), device=self.key.device).unsqueeze(1)
        second = self.key[pairs, self.before].masked_fill((self.before == self.chunk).unsqueeze(-1), self.slot.shape[1])
        return torch.cat((self.key[pairs, self.chunk], second), -1)

    def logits(
        self, q: Float[Tensor, "l n e"], k: Float[Tensor, "l n e"], keys: Int[Tensor, "l B t"]
    ) -> Float[Tensor, "l B s t"]:
        """``q k'`` of all meetings, ``-inf`` at empty slots, ``ITSELF`` where a query meets its own key."""
        empty = torch.where(keys == self.slot.shape[1], -torch.inf, 0.0).to(q.dtype).flatten(0, 1).unsqueeze(1)
        asked, met = _take(q, self.query).flatten(0, 1), _take(k, keys).flatten(0, 1)
        logits = torch.baddbmm(empty, asked, met.transpose(1, 2)).unflatten(0, keys.shape[:2]).float()
        return self.at_itself(logits, ITSELF)

    def at_itself(self, matrix: Float[Tensor, "l B s t"], value: float) -> Float[Tensor, "l B s t"]:
        """Overwrite, in place, the entries where a query meets its own key."""
        where = self.itself.clamp_min(0).unsqueeze(-1)
        overwritten = matrix.gather(-1, where).masked_fill_((self.itself >= 0).unsqueeze(-1), value)
        return matrix.scatter_(-1, where, overwritten)

    def back(self, values: Float[Tensor, "l B s e"]) -> Float[Tensor, "l n e"]:
        """From the slots of the blocks back to the tokens."""
        return _take(values.flatten(1, 2), self.slot)


def meetings(at: Float[Tensor, "l n"], seen: Bool[Tensor, "l n"], bucket: int) -> Meetings:
    """Sort and cut tokens into one round of :func:`lsh_attention`; ``at`` comes from :func:`places`.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.lsh import meetings
    >>> seen = torch.tensor([[True, True, False]])
    >>> meetings(torch.tensor([[0.3, 2.1, 1.2]]), seen, bucket=2).key  # the unseen token is no key
    tensor([[[0, 1],
             [3, 3]]])
    """
    pairs, n = at.shape
    size = min(bucket, n)
    chunks = -(-n // size)
    line, order = torch.where(seen, at, torch.inf).sort(dim=1, stable=True)
    n_seen = seen.sum(1, keepdim=True)
    position = torch.arange(n, device=at.device).repeat(pairs, 1)
    key = F.pad(torch.where(position < n_seen, order, n), (0, chunks * size - n), value=n).view(pairs, chunks, size)

    # a seen token has its rank among the seen; an unseen one the rank it would have
    own = torch.empty_like(position).scatter_(1, order, position)
    chunk = torch.where(seen, own, torch.minimum(torch.searchsorted(line, at), n_seen - 1)) // size

    # the queries of a chunk fill as many blocks as they need
    count = torch.zeros(pairs, chunks, dtype=torch.long, device=at.device).scatter_add_(
        1, chunk, torch.ones_like(chunk)
    )
    blocks = -(-count // size)
    ends = blocks.cumsum(1)
    by_chunk, asker = chunk.sort(dim=1, stable=True)
    within = position - (count.cumsum(1) - count).gather(1, by_chunk)
    put = (ends - blocks).gather(1, by_chunk) * size + within
    total = int(ends[:, -1].max())
    query = position.new_full((pairs, total * size), n).scatter_(1, put, asker)
    itself = torch.where(seen, own % size, -1).gather(1, asker)
    itself = position.new_full((pairs, total * size), -1).scatter_(1, put, itself)
    slot = torch.empty_like(position).scatter_(1, asker, put)
    number = torch.arange(total, device=at.device).repeat(pairs, 1)
    chunk = torch.searchsorted(ends, number, right=True).clamp(max=chunks - 1)
    before = (chunk - 1) % (-(-n_seen // size))
    blocked = (pairs, total, size)
    return Meetings(key, query.view(blocked), itself.view(blocked), slot, chunk, before)


class _Hashed(torch.autograd.Function):
    """One softmax over all rounds: online in the forward pass, from the normaliser in the backward pass.

    Arrays over tokens get one more row of zeros, which empty slots read and write.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rounds: list[Meetings]) -> Tensor:
        q, k, v = (_row_behind(x) for x in (q, k, v))
        top = q.new_full((len(q), q.shape[1] - 1, 1), -torch.inf, dtype=torch.float32)
        total, out = torch.zeros_like(top), top.new_zeros(*top.shape[:2], v.shape[-1])
        for at, met in _parts(rounds):
            keys = met.keys()
            weight = met.logits(q[at], k[at], keys)
            high = weight.amax(-1, keepdim=True)
            weight.sub_(high).exp_()
            part = met.back((weight.to(v.dtype) @ _take(v[at], keys)).float())
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
        inner = _row_behind((grad.float() * out).sum(-1, keepdim=True))
        grad, normaliser = _row_behind(grad.to(v.dtype)), _row_behind(normaliser, torch.inf)
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        for at, met in _parts(ctx.rounds):
            keys = met.keys()
            weight = met.logits(q[at], k[at], keys).sub_(_take(normaliser[at], met.query)).exp_()
            above = _take(grad[at], met.query)
            _add(d_v[at], keys, weight.to(v.dtype).transpose(-1, -2) @ above)
            slope = (above @ _take(v[at], keys).transpose(-1, -2)).float().sub_(_take(inner[at], met.query))
            slope = met.at_itself(slope.mul_(weight), 0.0).to(q.dtype)
            d_q[at, :-1] += met.back((slope @ _take(k[at], keys)).float())
            _add(d_k[at], keys, slope.transpose(-1, -2) @ _take(q[at], met.query))
        return d_q[:, :-1].to(q.dtype), d_k[:, :-1].to(k.dtype), d_v[:, :-1].to(v.dtype), None


def _parts(rounds: list[Meetings]) -> Iterator[tuple[slice, Meetings]]:
    return (part for met in rounds for part in met.parts())


def _row_behind(x: Float[Tensor, "l n e"], value: float = 0.0) -> Float[Tensor, "l m e"]:
    return F.pad(x, (0, 0, 0, 1), value=value)


def _flat(at: Int[Tensor, "l ..."], n: int) -> Int[Tensor, " places"]:
    pairs = torch.arange(len(at), device=at.device).view(-1, *[1] * (at.dim() - 1))
    return (at + n * pairs).flatten()


def _take(values: Float[Tensor, "l n e"], at: Int[Tensor, "l ..."]) -> Float[Tensor, "l ... e"]:
    """Values of the tokens ``at``."""
    flat = _flat(at, values.shape[1])
    return values.flatten(0, 1).index_select(0, flat).view(*at.shape, values.shape[-1])


def _add(to: Float[Tensor, "l n e"], at: Int[Tensor, "l B t"], values: Float[Tensor, "l B t e"]) -> None:
    """Add values to the tokens ``at``."""
    to.view(-1, to.shape[-1]).index_add_(0, _flat(at, to.shape[1]), values.flatten(0, 2).float())
