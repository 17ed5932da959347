"""Residual MLP over the whole gene vector: the default up to some 5,000 genes."""

from __future__ import annotations

import torch
from torch import nn

from distdiff.denoise import Denoiser, layers
from distdiff.denoise.embed import AdaptiveNorm, Conditioning, Expectation, start
from distdiff.types import Condition, DataSpec, Float, Tensor


class MLP(Denoiser):
    """Gene vector -> ``width`` -> residual blocks with adaptive norm -> outputs for all genes.

    Parameters
    ----------
    spec, outputs
        Genes, label vocabularies, gene means; numbers per gene.
    width
        Width of the trunk.
    depth
        Number of residual blocks.
    rank
        Factorise the two input layers through one embedding of this many numbers a gene (0: full layers). Useful with
        many genes, when these layers hold most weights. (A sum over non-zero entries is no faster: on a CPU the dense
        product is as fast up to 20,000 genes at 3 % non-zero; docs/ANSWERS.md.)
    linear
        Rank of a linear path around the trunk, from the evidence to the log rates, as in PCA and ridge regression (0:
        none). It is scaled by the share of molecules seen, as in a regression on masked inputs. With ``own: true`` in
        the process it only adds a bias at middle p; it is of use without (benchmarks/ablation.py).

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.denoise.mlp import MLP
    >>> from distdiff.types import Condition, DataSpec
    >>> network = MLP(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), 2, width=8, depth=1)
    >>> network(torch.zeros(3, 2), torch.ones(3, 2), Condition()).shape
    torch.Size([3, 2, 2])
    """

    light = True

    def __init__(
        self, spec: DataSpec, outputs: int, *, width: int = 256, depth: int = 3, rank: int = 0, linear: int = 0
    ):
        super().__init__()
        inputs = {"embed.weight": 1} if rank else {"evidence.weight": 1, "survival.weight": 1}
        self.gene_axes = inputs | {"answer.weight": 0, "answer.bias": 0, "linear.0.weight": 1, "linear.1.weight": 0}
        self.outputs = outputs
        self.expectation = Expectation(spec)
        self.condition = Conditioning(spec, width)
        self.embed = nn.Linear(spec.n_genes, rank, bias=False) if rank else nn.Identity()
        self.evidence = nn.Linear(rank or spec.n_genes, width)
        self.survival = nn.Linear(rank or spec.n_genes, width, bias=False)
        self.blocks = nn.ModuleList(_Block(width) for _ in layers(depth))
        self.norm = AdaptiveNorm(width, width)
        self.answer = nn.Linear(width, spec.n_genes * outputs)
        nn.init.normal_(self.survival.weight, std=spec.n_genes**-0.5 / 3 if not rank else rank**-0.5 / 3)
        nn.init.zeros_(self.answer.weight)
        with torch.no_grad():
            start(self.answer.bias.unflatten(0, (outputs, -1)).T)
        self.linear = nn.ModuleList()
        if linear:
            down, up = nn.Linear(spec.n_genes, linear, bias=False), nn.Linear(linear, spec.n_genes, bias=False)
            nn.init.zeros_(up.weight)
            self.linear.extend((down, up))

    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """See :class:`~distdiff.denoise.Denoiser`; output 0 is relative to gene mean x depth."""
        h, log_depth, surprise = self._trunk(x, p, cond)
        first, *further = self.answer(h).float().unflatten(1, (self.outputs, -1)).unbind(1)
        offset: Tensor | float = self.expectation.log_rate(log_depth) if self.relative else 0.0
        if self.linear:
            down, up = self.linear
            offset = offset + up(down(surprise) / (p.mean(1, keepdim=True) + 0.05))
        return torch.stack((first + offset, *further), 1).transpose(1, 2)

    def hidden(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b d"]:
        """The trunk after its last norm."""
        return self._trunk(x, p, cond)[0]

    def _trunk(self, x: Tensor, p: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """The last hidden state ``[b d]``, log depth ``[b 1]`` and surprise ``[b g]``."""
        log_depth, surprise = self.expectation(x, p)
        c = self.condition(log_depth, p, cond)
        h = self.evidence(self.embed(surprise)) + self.survival(self.embed(p - 0.5))
        for block in self.blocks:
            h = block(h, c)
        return self.norm(h, c)[0], log_depth, surprise


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = AdaptiveNorm(width, width)
        self.branch = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.branch[2].weight)  # type: ignore[arg-type]

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        y, gate = self.norm(h, c)
        return h + gate * self.branch(y)
