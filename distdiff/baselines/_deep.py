"""The one training loop of all rows that are networks: random masks, early stopping on validation cells, one budget."""

from __future__ import annotations

import copy
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from distdiff.baselines import BoolArray, FloatArray, _tuning
from distdiff.baselines._fitted import Fitted
from distdiff.rng import borrowed, numpy_generator
from distdiff.types import Cells, Float, Tensor

LARGEST = 15.0
"""Largest exponent of a mean relative to the gene's: e^15 is three million."""


@dataclass(eq=False)
class Deep(Fitted, ABC):
    """A row that trains a network on cells whose entries are hidden at random, a share of .1 to .9 of each cell.

    Training stops when the deviance of hidden entries of the validation cells has not fallen for ``patience``
    validations; the best weights are kept. ``capacity`` is the number of weights, ``spent`` the steps taken.

    Parameters
    ----------
    steps, batch
        Most training steps, and cells in each.
    lr
        Learning rate of Adam.
    patience
        Validations without a better score after which training stops; there are 20 in ``steps``.
    minutes
        CPU minutes of the process after which training stops, shared by the combinations of options that are tried; 0:
        no limit. Where it decides, numbers depend on the machine.
    """

    steps: int = 2000
    batch: int = 64
    lr: float | Sequence[float] = 1e-3
    patience: int = 5
    minutes: float = 0.0

    network: Any = field(init=False, repr=False)
    capacity: int = field(init=False, default=0, repr=False)
    spent: int = field(init=False, default=0, repr=False)

    refit: ClassVar[bool] = False
    cells_at_once: ClassVar[int] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.batch, self.patience) < 1:
            raise ValueError(
                f"{self.label}: steps={self.steps}, batch={self.batch} and patience={self.patience} must be 1 or more"
            )
        if not 0 <= self.minutes < np.inf:
            raise ValueError(f"{self.label}: minutes={self.minutes} must be a number of minutes, or 0 for no limit")

    @abstractmethod
    def build(self, genes: int, option: dict[str, Any]) -> nn.Module:
        """The network (torch's own generator is seeded)."""

    @abstractmethod
    def losses(self, network: Any, cells: Cells, observed: Float[Tensor, "b g"]) -> Iterator[Tensor]:
        """One loss for each of `players`, in order; each is stepped before the next is computed."""

    @abstractmethod
    def answer(self, network: Any, cells: Cells, observed: Float[Tensor, "b g"]) -> Tensor:
        """The row's answer ``[b g]`` in molecules; ``cells`` hold 0 where hidden."""

    def players(self, network: Any) -> list[nn.Module]:
        """Parts of the network with losses of their own. Default: the whole network."""
        return [network]

    def scaled(
        self, x: Float[Tensor, "b g"], observed: Float[Tensor, "b g"]
    ) -> tuple[Float[Tensor, "b 1"], Float[Tensor, "b g"]]:
        """Depth ``s`` of the evidence and ``log(1 + x / s)``, 0 where hidden."""
        expected = observed @ self.profile
        some = expected > 0
        s = torch.where(some, (x * observed).sum(1).clamp_min(0.5) / torch.where(some, expected, 1.0), 1.0)[:, None]
        return s, torch.log1p(x * observed / s)

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Train.

        Raises
        ------
        ValueError
            A loss that is not finite.
        """
        self.option = option
        self.profile = torch.from_numpy(self.gene_mean.astype(np.float32))
        every, best, since = max(1, self.steps // 20), np.inf, 0
        until = time.process_time() + 60 * self.minutes / self.fits() if self.minutes else np.inf
        rng = numpy_generator(self.seed, "baseline-batches")
        with borrowed(torch.device("cpu"), self.seed, type(self).__name__):
            network = self.build(len(self.gene_mean), option)
            self.network, state = network, copy.deepcopy(network.state_dict())
            self.capacity = sum(weights.numel() for weights in network.parameters())
            players = self.players(network)
            optimizers = [torch.optim.Adam(player.parameters(), lr=option["lr"]) for player in players]
            for step in range(1, self.steps + 1):
                network.train()
                cells = kept[torch.from_numpy(rng.integers(len(kept), size=self.batch))]
                observed = torch.from_numpy(random_masks(cells.counts.shape, rng))
                for player, optimizer, loss in zip(
                    players, optimizers, self.losses(network, cells, observed), strict=True
                ):
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(player.parameters(), 1.0)
                    optimizer.step()
                over = time.process_time() > until
                if step % every and step < self.steps and not over:
                    continue
                if not np.isfinite(last := loss.item()):
                    raise ValueError(f"{self.label}: the loss is {last} after {step} steps; take a smaller lr")
                self.spent, score = step, self.validate(held)
                if score < best:
                    best, since, state = score, 0, copy.deepcopy(network.state_dict())
                else:
                    since += 1
                if over or since >= self.patience:
                    break
            network.load_state_dict(state)

    def fits(self) -> int:
        """Networks that are trained: one for each combination, and the best again unless it was the last."""
        return self.n_trials() + (self.n_trials() > 1)

    def validate(self, held: Cells) -> float:
        """Poisson deviance of hidden entries of the validation cells, not below a hundredth of the gene mean."""
        truth = held.counts.numpy()
        observed = _tuning.random_mask(truth.shape, self.hide, self.seed, "stop")
        seen = np.where(observed, truth, 0.0).astype(np.float32)
        answer = self.predict(seen, observed, Cells(torch.from_numpy(seen), held.labels, held.rows))
        return _tuning.deviance(truth, observed, self._floored(seen, observed, answer, 0.01))

    @torch.no_grad()
    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The network's answer, a few hundred cells at a time."""
        self.network.eval()
        parts = [slice(start, start + self.cells_at_once) for start in range(0, len(cells), self.cells_at_once)]
        seen = torch.from_numpy(observed.astype(np.float32))
        return torch.cat([self.answer(self.network, cells[part], seen[part]) for part in parts]).numpy()


def random_masks(shape: Sequence[int], rng: np.random.Generator) -> FloatArray:
    """``float32 [b g]``, 1 where observed; the hidden share of each cell is uniform in (.1, .9)."""
    share = rng.uniform(0.1, 0.9, (shape[0], 1))
    return (rng.random(tuple(shape), dtype=np.float32) >= share).astype(np.float32)


def mlp(*widths: int, end: bool = False) -> nn.Sequential:
    """Linear layers with layer norms and ReLU between them; after the last one too if ``end``."""
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        parts.append(nn.Linear(a, b))
        if end or i < len(widths) - 2:
            parts += [nn.LayerNorm(b), nn.ReLU()]
    return nn.Sequential(*parts)


def nb_nll(x: Tensor, mean: Tensor, log_size: Tensor) -> Tensor:
    """``-log NB(x; mean, size)`` of every entry, variance ``mean + mean^2 / size``."""
    size = log_size.clamp(-6, 9).exp()
    total = (size + mean).log()
    return (
        torch.lgamma(size) + torch.lgamma(x + 1) - torch.lgamma(x + size)
        - size * (log_size.clamp(-6, 9) - total) - x * (mean.clamp_min(1e-8).log() - total)
    )  # fmt: skip


def zinb_nll(x: Tensor, mean: Tensor, log_size: Tensor, logit: Tensor) -> Tensor:
    """``-log`` of ``pi [x = 0] + (1 - pi) NB(x)``, ``pi = sigmoid(logit)``."""
    count = -nb_nll(x, mean, log_size) + nn.functional.logsigmoid(-logit)
    return -torch.where(x > 0, count, torch.logaddexp(nn.functional.logsigmoid(logit), count))
