"""SAVER (after Huang et al., Nat Methods 2018): a Poisson regression a gene, and a gamma posterior around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from distdiff.baselines import _tuning
from distdiff.baselines._deep import LARGEST, Deep
from distdiff.types import Cells, Tensor


class _Regressions(nn.Module):
    """``b + y W`` with a zero diagonal: no gene predicts itself."""

    off: Tensor

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(genes, genes))
        self.bias = nn.Parameter(torch.zeros(genes))
        self.register_buffer("off", 1 - torch.eye(genes))

    def forward(self, y: Tensor) -> Tensor:
        """Log rate relative to ``s gene_mean``."""
        return (y @ (self.weight * self.off) + self.bias).clamp(-LARGEST, LARGEST)


@dataclass(eq=False)
class Saver(Deep):
    """``log mu = log(s gene_mean) + b + (y - mean y) W``; where a gene is observed, ``(x + a) / (1 + a / mu)``.

    All regressions are fitted at once by stochastic gradients, with an L1 penalty (the published one is a lasso with
    its own penalty a gene). Hidden genes enter as their mean. The gamma prior of a gene has mean ``mu`` and size ``a``,
    by moments on validation cells, so draws are negative binomial: SAVER has a law of its own.

    Parameters
    ----------
    penalty
        Weight of the L1 penalty, per gene.

    Examples
    --------
    >>> from distdiff.baselines.saver import Saver
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), Saver(penalty=0.01, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.sizes.shape
    (30,)
    """

    penalty: float | Sequence[float] = (1e-3, 1e-2, 1e-4)

    label = "SAVER"

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Mean of each predictor, the regressions, then the size of each gene's prior."""
        self.profile, self.sizes = torch.from_numpy(self.gene_mean).float(), None
        _, y = self.scaled(kept.counts, torch.ones_like(kept.counts))
        self.centre, self.spread = y.mean(0), y.std(0, correction=0).clamp_min(1e-3)
        super().solve(kept, held, option)
        truth = held.counts.numpy()
        observed = _tuning.random_mask(truth.shape, self.hide, self.seed, "sizes")
        seen = np.where(observed, truth, 0.0).astype(np.float32)
        mean = self.predict(seen, observed, Cells(torch.from_numpy(seen), held.labels, held.rows))
        self.sizes = _tuning.sizes(truth, ~observed, mean)

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """One linear layer from all genes to all genes."""
        return _Regressions(genes)

    def expected(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """``mu`` of every entry from the other genes."""
        s, y = self.scaled(cells.counts, observed)
        return s * self.profile * network((y - self.centre) / self.spread * observed).exp()

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """Poisson likelihood of every entry, and the penalty."""
        mu = self.expected(network, cells, observed).clamp_min(1e-8)
        penalty = self.option["penalty"] * network.weight.abs().sum() / mu.shape[1]
        yield (mu - cells.counts * mu.log()).mean() + penalty

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The prior mean where hidden, the posterior mean where observed."""
        mu = self.expected(network, cells, observed)
        if self.sizes is None:
            return mu
        a = torch.from_numpy(self.sizes).float()
        return torch.where(observed > 0, (cells.counts + a) / (1 + a / mu.clamp_min(1e-8)), mu)
