"""Rows of our own engine: a process and a denoiser trained by the loop of all rows, and an imputer that walks back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from distdiff.baselines import BoolArray, FloatArray
from distdiff.baselines._deep import Deep
from distdiff.component import build
from distdiff.denoise import Denoiser
from distdiff.imputers import Imputed, Imputer
from distdiff.imputers.repaint import RePaint
from distdiff.process import Process
from distdiff.process.survival import Survival
from distdiff.rng import generator
from distdiff.training.losses import of_states
from distdiff.types import Bool, Cells, DataSpec, Tensor


@dataclass(eq=False)
class Engine(Deep, ABC):
    """A diffusion row. Training stops by its own loss on validation cells with fixed noise.

    A mean is that of ``samples`` draws, or of the draws that are asked for if they are more; draws are the walk's own,
    and no gene factor or floor touches either.

    Parameters
    ----------
    samples
        Draws in a mean.
    key
        Label that the network is given (such a row peeks: labels are made from whole counts); empty: none.
    """

    samples: int = 5
    key: str = ""

    law: Process = field(init=False, repr=False)

    denoises = False
    bounded: ClassVar[bool] = False
    alike: ClassVar[Survival] = Survival(hidden=0, two_level=0, uniform=1)
    cells_at_once: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"{self.label}: samples={self.samples} must be 1 or more")
        self.peeks = bool(self.key)

    @abstractmethod
    def process(self, most: int, option: dict[str, Any]) -> Process:
        """The law; ``most`` is the largest count in training."""

    @abstractmethod
    def denoiser(self, option: dict[str, Any]) -> dict[str, Any]:
        """Kind and options of the network."""

    @abstractmethod
    def imputer(self, network: Denoiser) -> Imputer:
        """The walk."""

    def survival(self) -> Survival:
        """The p that training draws. Default: all genes alike, an unconditional model."""
        return self.alike

    def keys(self) -> tuple[str, ...]:
        """The label, if the row has one."""
        return (self.key,) if self.peeks else ()

    def learn(self, store: Any, rows: np.ndarray) -> None:
        """Describe the data, then as every row.

        Raises
        ------
        ValueError
            The store has no label ``key``.
        """
        for key in self.keys():
            if key not in store.manifest.labels:
                have = ", ".join(store.manifest.labels) or "none"
                raise ValueError(f"{self.label}: the store has no label {key!r}; it has: {have}")
        labels = {key: tuple(store.manifest.labels[key]) for key in self.keys()}
        self.spec = DataSpec(tuple(store.genes), labels, self.gene_mean.astype(np.float32))
        super().learn(store, rows)

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Make the law for these counts, then train."""
        self.most = kept.counts.amax(0)
        self.law = self.process(int(kept.counts.max()), option)
        self.noise = generator(self.seed, "baseline-noise")
        super().solve(kept, held, option)

    def build(self, genes: int, option: dict[str, Any]) -> Denoiser:
        """The network, told whether its output is relative to the gene mean."""
        network = build(Denoiser, self.denoiser(option), self.spec, self.law.outputs)
        network.relative = self.law.relative
        return network

    def loss_of(self, network: Any, cells: Cells, rng: Any, withheld: float) -> Tensor:
        """Loss of each cell ``[b]``."""
        n = len(cells)
        p, _ = self.survival().draw(self.law.schedule, rng.uniform(n, 1), cells.counts.shape[1], rng=rng)
        x_0 = self.law.enter(cells.counts, rng=rng)
        x = self.law.forward(x_0, 1.0, p, rng=rng)
        labels = cells.labels.drop(rng.uniform(n) < withheld)
        return of_states(self.law, network, x_0, x, p, labels)

    def losses(self, network: Any, cells: Cells, observed: Tensor) -> Iterator[Tensor]:
        """The process's own loss; labels are withheld from a fifth of the cells."""
        yield self.loss_of(network, cells, self.noise, 0.2).mean()

    @torch.no_grad()
    def validate(self, held: Cells) -> float:
        """Mean loss of the validation cells with the same noise every time."""
        self.network.eval()
        rng = generator(self.seed, "baseline-validation")
        parts = [held[start : start + 64] for start in range(0, min(len(held), 512), 64)]
        return float(torch.cat([self.loss_of(self.network, part, rng, 0.0) for part in parts]).mean())

    def _read_out(self, held: Cells) -> tuple[float, tuple[FloatArray, float]]:
        return self.validate(held), (np.ones(len(self.gene_mean)), 0.0)

    def answer(self, network: Any, cells: Cells, observed: Tensor) -> Tensor:
        """The mean of ``samples`` draws."""
        return self.impute(cells, observed > 0).mean

    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The same for arrays."""
        return self.impute(cells, torch.from_numpy(observed)).mean.numpy()

    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """Walk, a few cells at a time (each cell has noise of its own).

        Raises
        ------
        ValueError
            As for every baseline; or the batch has no label ``key``.
        """
        erased = self.evidence(cells, observed)
        for key in self.keys():
            if key not in cells.labels.labels:
                have = ", ".join(cells.labels.labels) or "none"
                raise ValueError(f"{self.label}: the batch has no label {key!r}; it has: {have}")
        only = replace(erased, labels=type(erased.labels)({k: cells.labels.labels[k] for k in self.keys()}))
        if len(cells) == 0:
            return Imputed(cells.counts, cells.counts.expand(draws, -1, -1) if draws else None)
        self.network.eval()
        walk, parts = self.imputer(self.network), []
        for start in range(0, len(cells), self.cells_at_once):
            part = slice(start, start + self.cells_at_once)
            found = walk.impute(only[part], observed[part], draws=max(draws, self.samples), seed=seed).draws
            parts.append(found)
        drawn = torch.cat([found for found in parts if found is not None], 1).float()
        drawn = torch.minimum(drawn, self.most) if self.bounded else drawn
        mean = torch.where(observed, cells.counts, drawn.mean(0))
        self.checked(mean.numpy(), observed.numpy())
        whole = torch.where(observed, cells.counts, drawn[:draws].round())
        return Imputed(mean, whole if draws else None)


@dataclass(eq=False)
class TransformerEngine(Engine, ABC):
    """A row with the transformer of `CountsDiff`, imputing by RePaint without repeats.

    Parameters
    ----------
    walk
        Reverse steps.
    width, depth, heads
        Of the transformer.
    """

    walk: int = 20
    width: int = 64
    depth: int = 3
    heads: int = 4
    lr: float = 2e-4

    def denoiser(self, option: dict[str, Any]) -> dict[str, Any]:
        """The published shape."""
        sizes = {name: option[name] for name in ("width", "depth", "heads")}
        return {"kind": "transformer", "shortcut": False, **sizes}

    def imputer(self, network: Denoiser) -> Imputer:
        """RePaint without repeats."""
        return RePaint(self.law, network, steps=self.walk)
