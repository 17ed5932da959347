"""Attention over genes: which tokens are keys, tokens of all genes or of some, one kernel for both.

A gene with ``p = 0`` was not measured. Its token is a query and never a key, so hidden, masked or absent genes cannot
change the outputs for other genes. One token a cell, the *cell token*, is always a key, so that a cell without any
measured gene has a key too.

Legend: ``b`` cells, ``n`` tokens, ``m`` keys, ``h`` heads, ``e`` channels of a head, ``d = h e`` width.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from distdiff.denoise.embed import AdaptiveNorm
from distdiff.types import Bool, Float, Int, Tensor

log = logging.getLogger("distdiff")

AWAY = -1e4
"""Logit of a key that was not measured: its weight underflows to exactly 0 in every dtype."""

GROUPS = 4
"""Number of groups of cells of similar length; without a variable-length kernel tokens are padded within a group."""


def attend(
    q: Float[Tensor, "b h n f"], k: Float[Tensor, "b h m f"], v: Float[Tensor, "b h m e"], seen: Bool[Tensor, "b m"]
) -> Float[Tensor, "b h n e"]:
    """``softmax(q k' / sqrt(e)) v`` over the keys that are seen; ``f = e - 1``.

    The mask is in the last channel, which ``q`` and ``k`` leave free: ``sqrt(e)`` in q, 0 or ``AWAY`` in k. So kernels
    that accept no mask, such as flash attention on CUDA, mask exactly, without an ``n x m`` matrix.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import attend
    >>> q = k = torch.zeros(1, 1, 2, 3)
    >>> v = torch.tensor([1.0, 5.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
    >>> attend(q, k, v, seen=torch.tensor([[True, False]]))[0, 0]  # the second key is hidden
    tensor([[1., 1., 1., 1.],
            [1., 1., 1., 1.]])
    """
    scale = v.shape[-1] ** 0.5
    hidden = torch.where(seen, 0.0, AWAY).to(k.dtype)[:, None, :, None].expand(*k.shape[:-1], 1)
    q, k = F.pad(q, (0, 1), value=scale), torch.cat((k, hidden), -1)
    _tell_kernel(q.device, q.dtype, v.shape[-1])
    return F.scaled_dot_product_attention(q, k, v)


@functools.cache
def _tell_kernel(device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Log, once for each device, dtype and size, why flash attention will not run there."""
    if device.type == "cuda":  # the CPU kernel of torch is a flash kernel of its own
        flash_built = torch.backends.cuda.is_flash_attention_available()
        if reason := no_flash(torch.cuda.get_device_capability(device), dtype, channels, flash_built):
            log.warning("attention: flash kernels cannot run (%s); torch takes another kernel, slower", reason)


def no_flash(capability: tuple[int, int], dtype: torch.dtype, channels: int, built: bool = True) -> str:
    """Why flash attention cannot run on a CUDA device, or ``""``.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import no_flash
    >>> no_flash((9, 0), torch.float32, 64)
    'float32, they need bfloat16 or float16: train.precision=bf16'
    >>> no_flash((9, 0), torch.bfloat16, 64)
    ''
    """
    if not built:
        return "this torch was built without them"
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}, they need 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')}, they need bfloat16 or float16: train.precision=bf16"
    if channels > 256 or channels % 8:
        return f"{channels} channels a head, they need a multiple of 8 up to 256"
    return ""


class Whole:
    """Every token of every cell, ``[b n d]``.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import Whole
    >>> tokens = Whole(torch.tensor([[True, True, False]]))
    >>> q = k = torch.zeros(1, 3, 2, 3)
    >>> tokens.attend(q, k, torch.ones(1, 3, 2, 4)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, seen: Bool[Tensor, "b n"]):
        self.seen = seen

    def spread(self, values: Float[Tensor, "b d"]) -> Float[Tensor, "b 1 d"]:
        """One vector a cell -> broadcastable to its tokens."""
        return values.unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "b n d"]:
        """``q``, ``k`` ``[b n h f]``, ``v`` ``[b n h e]``."""
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.seen)
        return out.transpose(1, 2).flatten(2)


class Packed:
    """Only some tokens of each cell, those of all cells one after the other, ``[n d]``: no padding in any layer.

    Parameters
    ----------
    cell
        ``int64 [n]``, ascending: the cell of each token.
    seen
        ``bool [n]``: which tokens are keys.
    cells
        Number of cells.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import Packed
    >>> tokens = Packed(torch.tensor([0, 0, 1]), torch.tensor([True, True, True]), cells=2)
    >>> q = k = torch.zeros(3, 1, 3)
    >>> v = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1).expand(3, 1, 4)
    >>> tokens.attend(q, k, v)[:, 0]  # means within cells
    tensor([2., 2., 8.])
    """

    def __init__(self, cell: Int[Tensor, " n"], seen: Bool[Tensor, " n"], cells: int):
        self.cell, self.keys = cell, seen.nonzero().squeeze(1)
        self.plan = Ragged(cell, cell[self.keys], cells)

    def spread(self, values: Float[Tensor, "b d"]) -> Float[Tensor, "n d"]:
        """One vector a cell -> one a token."""
        return values[self.cell]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "n d"]:
        """``q``, ``k`` ``[n h f]``, ``v`` ``[n h e]``."""
        return self.plan.attend(q, k[self.keys], v[self.keys]).flatten(1)


class Ragged:
    """Attention between queries and keys whose numbers differ from cell to cell.

    With a variable-length flash kernel (CUDA, half precision, torch >= 2.10) nothing is padded. Elsewhere cells are
    sorted by length and padded in ``GROUPS`` groups, one call a group.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import Ragged
    >>> q_cell, k_cell = torch.tensor([0, 1]), torch.tensor([0, 0, 1])
    >>> pairs = Ragged(q_cell, k_cell, cells=2)
    >>> pairs.attend(torch.zeros(2, 1, 3), torch.zeros(3, 1, 3), torch.ones(3, 1, 4)).shape
    torch.Size([2, 1, 4])
    """

    def __init__(self, q_cell: Int[Tensor, " n"], k_cell: Int[Tensor, " m"], cells: int):
        self.n_q, self.n_k = (torch.bincount(cell, minlength=cells) for cell in (q_cell, k_cell))
        self.q_cell, self.k_cell = q_cell, k_cell

    @functools.cached_property
    def groups(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Bool[Tensor, "c m"], int]]:
        """For each group: query tokens, their slots, key tokens, their slots, which key slots are filled, padded n."""
        found = []
        order = (self.n_q * self.n_k).argsort()
        for cells in order.tensor_split(min(GROUPS, len(order))):
            n, m = int(self.n_q[cells].max()), int(self.n_k[cells].max())
            row = torch.full_like(order, -1)
            row[cells] = torch.arange(len(cells), device=cells.device)
            q, q_slot = _slots(self.q_cell, self.n_q, row, n)
            k, k_slot = _slots(self.k_cell, self.n_k, row, m)
            filled = torch.zeros(len(cells) * m, dtype=torch.bool, device=cells.device)
            filled[k_slot] = True
            found.append((q, q_slot, k, k_slot, filled.view(len(cells), m), n))
        return found

    def attend(
        self, q: Float[Tensor, "n h f"], k: Float[Tensor, "m h f"], v: Float[Tensor, "m h e"]
    ) -> Float[Tensor, "n h e"]:
        """See :func:`attend`; each query attends to the keys of its own cell."""
        if q.is_cuda and v.dtype in (torch.float16, torch.bfloat16) and (varlen := _varlen()) is not None:
            starts = [F.pad(n.cumsum(0), (1, 0)).int() for n in (self.n_q, self.n_k)]
            longest = [int(n.max()) for n in (self.n_q, self.n_k)]
            q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1))
            return varlen(q.contiguous(), k.contiguous(), v.contiguous(), *starts, *longest)
        out = torch.zeros(len(q), *v.shape[1:], dtype=v.dtype, device=v.device)
        for q_at, q_slot, k_at, k_slot, filled, n in self.groups:
            cells, m = filled.shape
            asked = _padded(q[q_at], q_slot, cells, n)
            keys, values = _padded(k[k_at], k_slot, cells, m), _padded(v[k_at], k_slot, cells, m)
            answer = attend(asked, keys, values, filled).transpose(1, 2).flatten(0, 1)
            out = out.index_copy(0, q_at, answer[q_slot])
        return out


@functools.cache
def _varlen() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        log.warning("attention: torch %s has no variable-length kernel (2.10 has); cells are padded", torch.__version__)
        return None
    return cast(Callable[..., Tensor], varlen_attn)


def _slots(cell: Tensor, count: Tensor, row: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Tokens of the cells that have a row, and their positions when every row is padded to ``longest``."""
    at = (row[cell] >= 0).nonzero().squeeze(1)
    within = at - (count.cumsum(0) - count)[cell[at]]
    return at, row[cell[at]] * longest + within


def _padded(tokens: Float[Tensor, "t h e"], slot: Tensor, cells: int, longest: int) -> Float[Tensor, "b h n e"]:
    out = tokens.new_zeros(cells * longest, *tokens.shape[1:])
    return out.index_copy(0, slot, tokens).unflatten(0, (cells, longest)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of a layout.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import SelfAttention, Whole
    >>> SelfAttention(width=8, heads=2)(torch.zeros(1, 3, 8), Whole(torch.ones(1, 3, dtype=torch.bool))).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(width, 2 * (width - heads), bias=False)  # one channel a head is reserved for the mask
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, h: Tensor, tokens: Whole | Packed) -> Tensor:
        """``[b n d]`` or ``[n d]`` -> the same shape."""
        q, k = self.qk(h).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return self.out(tokens.attend(q, k, self.v(h).unflatten(-1, (self.heads, -1))))


class CrossAttention(nn.Module):
    """Multi-head attention from one set of tokens to another; ``look(q, k, v)`` computes it.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import CrossAttention
    >>> layer = CrossAttention(width=8, heads=2)
    >>> layer(torch.zeros(3, 8), torch.zeros(5, 8), lambda q, k, v: v[:3].flatten(1)).shape
    torch.Size([3, 8])
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width - heads, bias=False), nn.Linear(width, width - heads, bias=False)
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, h: Tensor, other: Tensor, look: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``h`` ``[... n d]``, ``other`` ``[... m d]``; ``look`` gets ``[... h f]`` and returns ``[... d]``."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f, x in ((self.q, h), (self.k, other), (self.v, other)))
        return self.out(look(q, k, v))


class Block(nn.Module):
    """Attention and a two-layer network, each a branch behind an adaptive norm.

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.attention import Block, SelfAttention, Whole
    >>> block = Block(8, SelfAttention(8, heads=2))
    >>> block(torch.zeros(1, 3, 8), torch.zeros(1, 8), Whole(torch.ones(1, 3, dtype=torch.bool))).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, width: int, attention: nn.Module):
        super().__init__()
        self.norm_attention, self.norm_mlp = AdaptiveNorm(width, width), AdaptiveNorm(width, width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, c: Float[Tensor, "b d"], tokens: Whole | Packed) -> Tensor:
        """``h`` ``[b n d]`` or ``[n d]``, as the layout says -> the same shape."""
        y, gate = self.norm_attention(h, c, tokens.spread)
        h = h + gate * self.attention(y, tokens)
        y, gate = self.norm_mlp(h, c, tokens.spread)
        return h + gate * self.mlp(y)


def check_heads(kind: str, width: int, heads: int) -> None:
    """Raise ``ValueError`` where ``heads`` does not divide ``width``, or a head would have a single channel.

    Examples
    --------
    >>> from distdiff.denoise.attention import check_heads
    >>> check_heads("transformer", width=64, heads=4)
    >>> check_heads("transformer", width=64, heads=5)
    Traceback (most recent call last):
        ...
    ValueError: denoiser transformer: heads=5 must divide width=64 and leave a head two channels at ...
    """
    if heads < 1 or width % heads or width < 2 * heads:
        raise ValueError(
            f"denoiser {kind}: heads={heads} must divide width={width} and leave a head two channels at least"
        )
