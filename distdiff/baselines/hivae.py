"""HI-VAE (after Nazabal et al., Pattern Recognition 2020): a VAE of incomplete data with a mixture prior."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gumbel_softmax, one_hot, softplus

from distdiff.baselines._deep import LARGEST, Deep
from distdiff.types import Cells, Tensor


class _Network(nn.Module):
    """q(s | x), q(z | x, s), p(z | s), the homogeneous layer y(z), and two numbers a gene from its own part of y."""

    def __init__(self, genes: int, mixtures: int, latent: int, own: int) -> None:
        super().__init__()
        self.latent, self.own, self.genes = latent, own, genes
        self.component = nn.Linear(2 * genes, mixtures)
        self.encoder = nn.Linear(2 * genes + mixtures, 2 * latent)
        self.prior = nn.Linear(mixtures, latent, bias=False)
        self.shared = nn.Linear(latent, own * genes)
        self.heads = nn.Parameter(torch.randn(2, genes, own + mixtures) * 0.05)
        self.bias = nn.Parameter(torch.zeros(2, genes))

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both numbers ``[2 b g]`` of every gene, and KL of z and of s, each ``[b]``."""
        logits = self.component(seen)
        q = logits.softmax(1)
        s = gumbel_softmax(logits, tau=0.5) if self.training else one_hot(logits.argmax(1), q.shape[1]).to(q)
        mean, log_sd = self.encoder(torch.cat((seen, s), 1)).chunk(2, 1)
        log_sd = log_sd.clamp(-5, 3)
        z = mean + log_sd.exp() * torch.randn_like(mean) if self.training else mean
        kl_z = 0.5 * ((mean - self.prior(s)).square() + (2 * log_sd).exp() - 2 * log_sd - 1).sum(1)
        kl_s = (q * (q.clamp_min(1e-8) * q.shape[1]).log()).sum(1)
        y = self.shared(z).unflatten(1, (self.genes, self.own))
        part = torch.cat((y, s[:, None].expand(-1, self.genes, -1)), 2)
        return torch.einsum("bgk,hgk->hbg", part, self.heads) + self.bias[:, None], kl_z, kl_s


@dataclass(eq=False)
class HiVae(Deep):
    """The evidence lower bound of every entry of the training cells; the encoder sees the evidence alone.

    Parameters
    ----------
    law
        ``poisson``: counts of rate ``s gene_mean exp(.)``. ``gaussian``: ``log(1 + x / s)`` with a mean and a variance
        of each gene.
    latent, mixtures, own
        Dimensions of z, components of its prior, numbers of the homogeneous layer that each gene has for itself.

    Examples
    --------
    >>> from distdiff.baselines.hivae import HiVae
    >>> from distdiff.data.store.store import CountStore
    >>> store, row = CountStore.open("atlas.zarr"), HiVae(law="gaussian", latent=2, steps=20)
    >>> row.fit(store, store.rows("train"))
    >>> row.label
    'HI-VAE, Gaussian'
    """

    law: str = "poisson"
    latent: int | Sequence[int] = (10, 20)
    mixtures: int = 10
    own: int = 2

    label = "HI-VAE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.law not in ("poisson", "gaussian"):
            raise ValueError(f"hivae: law={self.law!r} must be 'poisson' or 'gaussian'")
        self.label = f"HI-VAE, {self.law.capitalize()}"

    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """The network."""
        return _Network(genes, option["mixtures"], option["latent"], option["own"])

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """The negative bound, per gene."""
        s, y = self.scaled(cells.counts, observed)
        (a, b), kl_z, kl_s = network(torch.cat((y, observed), 1))
        if self.law == "poisson":
            log_rate = (s * self.profile).clamp_min(1e-6).log() + a.clamp(-LARGEST, LARGEST)
            nll = log_rate.exp() - cells.counts * log_rate
        else:
            spread = softplus(b) + 1e-2
            nll = 0.5 * ((torch.log1p(cells.counts / s) - self.centred(a)) / spread).square() + spread.log()
        yield (nll.sum(1) + kl_z + kl_s).mean() / nll.shape[1]

    def centred(self, a: Tensor) -> Tensor:
        """Means of ``log(1 + x / s)``, relative to those of the average cell."""
        return torch.log1p(self.profile) + a

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The mean at the posterior mean of z in the likeliest component."""
        s, y = self.scaled(cells.counts, observed)
        (a, _), _, _ = network(torch.cat((y, observed), 1))
        if self.law == "poisson":
            return s * self.profile * a.clamp(-LARGEST, LARGEST).exp()
        return s * torch.expm1(self.centred(a).clamp(0, LARGEST))
