"""scIGANs (after Xu et al., Nucleic Acids Res 2020): neighbours among cells that a conditional GAN generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import one_hot

from distdiff.baselines import BoolArray, FloatArray
from distdiff.baselines._deep import LARGEST, Deep, mlp
from distdiff.baselines.knn import Knn
from distdiff.rng import borrowed
from distdiff.types import Cells, Tensor

BALANCE, STEP = 0.75, 1e-3


class _Network(nn.Module):
    equilibrium: Tensor

    def __init__(self, genes: int, groups: int, width: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.generator = mlp(latent + groups, width, width, genes)
        self.critic = mlp(genes + groups, width, latent, width, genes)
        self.register_buffer("equilibrium", torch.zeros(()))

    def generate(self, groups: Tensor) -> Tensor:
        """One cell of each group (``[b c]``), in [0, 1]."""
        return self.generator(torch.cat((torch.randn(len(groups), self.latent), groups), 1)).sigmoid()

    def error(self, y: Tensor, groups: Tensor) -> Tensor:
        """How badly the critic, an autoencoder, rebuilds ``y``."""
        return (self.critic(torch.cat((y, groups), 1)).sigmoid() - y).abs().mean()


@dataclass(eq=False)
class ScIGans(Deep):
    """A boundary-equilibrium GAN generates cells of each cluster; a cell is filled from the ``k`` most alike of them.

    Clusters are k-means on ``log(1 + x / s)`` of the training cells (published: given cell types or spectral clusters);
    a masked cell looks among the generated cells of all clusters, by its observed genes. Different from the paper:
    linear layers over genes in the place of convolutions over genes laid out as a square image, an order without
    meaning.

    Parameters
    ----------
    width, latent
        Width of the layers, numbers of the noise.
    clusters
        Groups of the training cells.
    generated
        Generated cells (published: 2,000 a group).
    k
        Generated cells that fill one cell (published: 10).

    Examples
    --------
    >>> from distdiff.baselines.scigans import ScIGans
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), ScIGans(width=8, clusters=2, generated=100, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.spent <= 20
    True
    """

    width: int | Sequence[int] = (128, 256)
    latent: int = 32
    clusters: int = 8
    generated: int = 4000
    k: int = 10

    label = "scIGANs"

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Cluster, train, generate."""
        from sklearn.cluster import KMeans

        self.profile = torch.from_numpy(self.gene_mean).float()
        _, y = self.scaled(kept.counts, torch.ones_like(kept.counts))
        self.most = y.amax(0).clamp_min(1e-3)
        different = max(1, min(option["clusters"], len(np.unique(y.numpy(), axis=0))))
        codes = KMeans(different, n_init=3, random_state=self.seed).fit_predict(y.numpy())
        self.share = np.bincount(codes) / len(codes)
        order = kept.rows.argsort()
        self.rows, self.codes = kept.rows[order], torch.from_numpy(codes).long()[order]
        super().solve(kept, held, option)

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """Generator and critic."""
        return _Network(genes, len(self.share), option["width"], option["latent"])

    def players(self, network: Any) -> list[nn.Module]:
        """Critic, then generator."""
        return [network.critic, network.generator]

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """The critic's loss with its equilibrium, then the generator's."""
        _, y = self.scaled(cells.counts, torch.ones_like(cells.counts))
        y = y / self.most
        groups = one_hot(self.codes[torch.searchsorted(self.rows, cells.rows)], len(self.share)).float()
        real, made = network.error(y, groups), network.error(network.generate(groups).detach(), groups)
        yield real - network.equilibrium * made
        failed = network.error(network.generate(groups), groups)
        balance = BALANCE * real.detach() - failed.detach()
        network.equilibrium.add_(STEP * balance).clamp_(0, 1)
        yield failed

    @torch.no_grad()
    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Generate with a fixed seed, then pool the nearest."""
        from scipy.sparse import csr_array

        self.network.eval()
        with borrowed(torch.device("cpu"), self.seed, "scigans"):
            codes = torch.multinomial(torch.from_numpy(self.share), self.option["generated"], replacement=True)
            made = self.network.generate(one_hot(codes, len(self.share)).float())
        near = Knn(k=self.option["k"], prior=0.0, scale=1.0)
        near.gene_mean = self.gene_mean
        near.train = csr_array(torch.expm1((made * self.most).clamp(0, LARGEST)).numpy())
        return near.pool(counts, observed, near.neighbours(counts, observed, self.option["k"], 1.0), 0.0)

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The filled cell."""
        return torch.from_numpy(self.predict(cells.counts.numpy(), observed.numpy() > 0, cells))
