"""Parts that all denoisers share: expected counts, the conditioning vector, the adaptive norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from distdiff.types import UNKNOWN, Condition, DataSpec, Float, Tensor


class Expectation(nn.Module):
    """Expected counts of a cell: gene mean x depth, with the depth estimated from the thinned cell alone.

    ``depth = (sum x + c) / (sum p mu + c)`` divides the observed molecules by those expected of the same genes in the
    average cell; a prior of ``c`` molecules keeps nearly empty cells near depth 1. A denoiser whose output is relative
    to ``log(mu depth)`` starts as good as this baseline and learns only the difference.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.embed import Expectation
    >>> from distdiff.types import DataSpec
    >>> expect = Expectation(DataSpec(("A", "B"), {}, np.array([10.0, 30.0], np.float32)), prior=0.0)
    >>> log_depth, surprise = expect(torch.tensor([[20.0, 60.0]]).log1p(), torch.ones(1, 2))  # twice the average cell
    >>> log_depth.exp(), surprise.abs().max() < 1e-5
    (tensor([[2.0000]]), tensor(True))
    """

    mean: Tensor

    def __init__(self, spec: DataSpec, prior: float = 10.0):
        super().__init__()
        if not spec.n_genes:
            raise ValueError("a denoiser of no genes: the data's list of genes is empty")
        mean = torch.as_tensor(spec.gene_mean, dtype=torch.float32)
        self.register_buffer("mean", mean.clamp_min(1e-4))
        self.prior = prior

    def forward(
        self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"]
    ) -> tuple[Float[Tensor, "b 1"], Float[Tensor, "b g"]]:
        """Return log depth ``[b 1]`` and the surprise ``log(1 + x) - log(1 + p mu depth)`` ``[b g]``.

        The surprise of a gene that was not measured (``p = 0``) is exactly 0, whatever its ``x``.
        """
        x = torch.where(p > 0, x, 0.0)
        seen = p * self.mean
        molecules = torch.expm1(x).sum(1, keepdim=True).clamp_min(0)  # the sum of a Gaussian state may be negative
        depth = (molecules + self.prior) / (seen.sum(1, keepdim=True) + self.prior)
        return depth.log(), x - torch.log1p(seen * depth)

    def log_rate(self, log_depth: Float[Tensor, "b 1"]) -> Float[Tensor, "b g"]:
        """``log(mu depth)``."""
        return self.mean.log() + log_depth

    def add_to(self, raw: Float[Tensor, "b g k"], log_depth: Float[Tensor, "b 1"]) -> Float[Tensor, "b g k"]:
        """Outputs with ``log(mu depth)`` added to number 0."""
        return torch.cat((raw[..., :1] + self.log_rate(log_depth).unsqueeze(-1), raw[..., 1:]), -1)


def start(bias: Tensor) -> None:
    """Set the initial bias ``[g k]`` of the outputs: 0, but small random numbers from the third output on.

    The third output and those after it are loadings or classes; at loadings of 0 their gradient is 0 (a saddle).

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.embed import start
    >>> bias = torch.full((4, 2), 7.0)
    >>> start(bias)
    >>> bias.unique()
    tensor([0.])
    """
    nn.init.zeros_(bias)
    if bias.shape[1] > 2:
        nn.init.normal_(bias[:, 2:], std=0.05)


APART = 0.5
"""Standard deviation of the first embeddings of labels: values that start alike are told apart too late where they are
many (109 cell types in docs/ANSWERS.md)."""


class Conditioning(nn.Module):
    """Covariates, depth and the level of thinning -> one vector per cell ``[b d]``.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.embed import Conditioning
    >>> from distdiff.types import Condition, DataSpec
    >>> spec = DataSpec(("A", "B"), {"cell_type": ("B", "T")}, np.ones(2, np.float32))
    >>> labels = Condition({"cell_type": torch.tensor([0, 1, -1])})
    >>> Conditioning(spec, width=8)(torch.zeros(3, 1), torch.ones(3, 2), labels).shape
    torch.Size([3, 8])
    """

    freqs: Tensor

    def __init__(self, spec: DataSpec, width: int, n_freqs: int = 8):
        super().__init__()
        self.names = tuple(spec.labels)
        self.tables = nn.ModuleList(nn.Embedding(len(spec.labels[name]), width) for name in self.names)
        for table in self.tables:
            nn.init.normal_(table.weight, std=APART)  # type: ignore[arg-type]
        self.register_buffer("freqs", math.pi * 2.0 ** torch.arange(n_freqs, dtype=torch.float32) / 4)
        self.project = nn.Sequential(nn.Linear(2 * n_freqs + 3, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, log_depth: Float[Tensor, "b 1"], p: Float[Tensor, "b g"], cond: Condition) -> Tensor:
        """Sinusoids of the mean p, the shares of genes seen whole and not at all, log depth; plus label embeddings."""
        level = p.mean(1, keepdim=True)
        whole, none = (p == 1).float().mean(1, keepdim=True), (p == 0).float().mean(1, keepdim=True)
        angle = level * self.freqs
        out = self.project(torch.cat((angle.sin(), angle.cos(), log_depth, whole, none), 1))
        return add_labels(out, self.names, self.tables, cond)


def add_labels(out: Float[Tensor, "b d"], names: Sequence[str], tables: nn.ModuleList, cond: Condition) -> Tensor:
    """``out`` plus the embedding of every given label; code -1 (unknown or withheld) adds nothing.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from distdiff.denoise.embed import add_labels
    >>> from distdiff.types import Condition
    >>> tables = nn.ModuleList([nn.Embedding.from_pretrained(torch.tensor([[1.0], [2.0]]))])
    >>> add_labels(torch.zeros(3, 1), ["cell_type"], tables, Condition({"cell_type": torch.tensor([0, 1, -1])}))
    tensor([[1.],
            [2.],
            [0.]])
    """
    for name, table in zip(names, tables, strict=True):
        if name in cond.labels:
            code = cond.labels[name]
            out = out + table(code.clamp_min(0)) * (code != UNKNOWN).unsqueeze(1)
    return out


class Shortcut(nn.Module):
    """Two matrices: from all evidence to one vector a cell, and from one vector a cell to all outputs.

    A token network reads all genes out by one matrix, so it learns gene-specific effects slowly. With this in parallel
    it learns as fast as the MLP (docs/ANSWERS.md). The cost is that of two layers of the MLP.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.embed import Shortcut
    >>> from distdiff.types import DataSpec
    >>> shortcut = Shortcut(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), outputs=3, width=8)
    >>> shortcut.answers(shortcut.evidence(torch.ones(5, 2))).shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, spec: DataSpec, outputs: int, width: int):
        super().__init__()
        self.outputs = outputs
        self.evidence = nn.Linear(spec.n_genes, width, bias=False)
        self.answer = nn.Linear(width, spec.n_genes * outputs, bias=False)
        nn.init.zeros_(self.answer.weight)

    def answers(self, h: Float[Tensor, "b d"]) -> Float[Tensor, "b g k"]:
        """Outputs for every gene from one vector a cell; 0 at the start of training."""
        return self.answer(h).float().unflatten(1, (self.outputs, -1)).transpose(1, 2)


SHORTCUT_AXES = {"shortcut.evidence.weight": 1, "shortcut.answer.weight": 0}


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale, shift and gate come from the conditioning vector, zero at start (adaLN-Zero).

    Examples
    --------
    >>> import torch
    >>> from distdiff.denoise.embed import AdaptiveNorm
    >>> h, gate = AdaptiveNorm(width=2, cond_width=4)(torch.tensor([[1.0, 3.0]]), torch.ones(1, 4))
    >>> h.detach().round(), gate.detach()  # before training: a plain layer norm, and a gate of 1
    (tensor([[-1.,  1.]]), tensor([[1., 1.]]))
    """

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(cond_width, 3 * width))
        nn.init.zeros_(self.modulate[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.modulate[1].bias)  # type: ignore[arg-type]

    def forward(
        self, h: Tensor, c: Float[Tensor, "b d"], spread: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised ``h`` and the gate of its branch (``1 + gate`` multiplies what the branch adds).

        ``spread`` broadcasts one vector a cell to the tokens of ``h`` (see `distdiff.denoise.attention.Whole`).
        """
        scale, shift, gate = self.modulate(c).chunk(3, -1)
        if spread is not None:
            scale, shift, gate = spread(scale), spread(shift), spread(gate)
        return self.norm(h) * (1 + scale) + shift, 1 + gate
