"""GAIN (after Yoon et al., ICML 2018): a generator fills, a discriminator guesses which entries were filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from distdiff.baselines._deep import Deep
from distdiff.types import Cells, Tensor

NOISE, HINT = 0.01, 0.9


@dataclass(eq=False)
class Gain(Deep):
    """Both nets have three layers; each gene is scaled to [0, 1] by its largest ``log(1 + x / s)`` in training.

    The generator sees the evidence with noise up to .01 in hidden entries (its mean at use) and the mask; the
    discriminator sees the filled cell and a hint: nine tenths of the mask, .5 elsewhere. The generator's loss is the
    discriminator's failure on hidden entries plus ``alpha`` times the squared error on observed ones: hidden counts of
    training cells enter no loss, as published.

    Parameters
    ----------
    alpha
        Weight of the reconstruction (published: 100).
    width
        Width of the hidden layers (0: the number of genes, as published).

    Examples
    --------
    >>> from distdiff.baselines.gain import Gain
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), Gain(steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.impute(store.cells([0]), store.cells([0]).counts > 0).mean.shape
    torch.Size([1, 30])
    """

    alpha: float | Sequence[float] = (100.0, 10.0)
    width: int | Sequence[int] = 0

    label = "GAIN"

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Measure the largest value of each gene, then train."""
        self.profile = torch.from_numpy(self.gene_mean).float()
        _, y = self.scaled(kept.counts, torch.ones_like(kept.counts))
        self.most = y.amax(0).clamp_min(1e-3)
        super().solve(kept, held, option)

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """Generator and discriminator."""
        w = option["width"] or genes

        def net() -> nn.Module:
            return nn.Sequential(
                nn.Linear(2 * genes, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, genes)
            )  # fmt: skip

        return nn.ModuleList([net(), net()])

    def players(self, network: Any) -> list[nn.Module]:
        """Discriminator, then generator."""
        return [network[1], network[0]]

    def fill(self, network: Any, y: Tensor, observed: Tensor, noise: Tensor | float) -> Tensor:
        """The generator's output for every entry, in [0, 1]."""
        return network[0](torch.cat((y * observed + noise * (1 - observed), observed), 1)).sigmoid()

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """The discriminator's cross entropy, then the generator's two terms."""
        _, y = self.scaled(cells.counts, observed)
        y = y / self.most
        filled = self.fill(network, y, observed, NOISE * torch.rand_like(y))
        whole = observed * y + (1 - observed) * filled
        hint = torch.where(torch.rand_like(y) < HINT, observed, 0.5)
        yield binary_cross_entropy_with_logits(network[1](torch.cat((whole.detach(), hint), 1)), observed)
        fooled = nn.functional.logsigmoid(network[1](torch.cat((whole, hint), 1)))
        hidden = (1 - observed).sum().clamp_min(1)
        error = mse_loss(filled * observed, y * observed, reduction="sum") / observed.sum().clamp_min(1)
        yield -((1 - observed) * fooled).sum() / hidden + self.option["alpha"] * error

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The generator's output, taken back to molecules."""
        s, y = self.scaled(cells.counts, observed)
        return s * torch.expm1(self.most * self.fill(network, y / self.most, observed, NOISE / 2))
