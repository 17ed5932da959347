"""Processes: laws on data. A process owns no weights, no device and no file; its fields are its hyper-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from distdiff.types import Float, Tensor


class Process(ABC):
    """A corruption of data with a survival probability ``p`` (1 = clean, 0 = nothing left), and its reversal.

    ``p`` broadcasts against ``[b g]`` everywhere, so each gene of each cell may have its own (MATHS 5).
    ``eta`` is the network's answer in natural parameters, ``[b g k]``, in which guidance is linear.
    """

    schedule: Any
    """A :class:`~distdiff.process.schedule.Schedule`; constructors also take its name."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers per gene that the network must return (``k``)."""

    @abstractmethod
    def prior(self, shape: tuple[int, int], *, device: torch.device | str = "cpu") -> Float[Tensor, "b g"]:
        """The state at p = 0."""

    @abstractmethod
    def forward(
        self, x_s: Float[Tensor, "b g"], p_s: float | Tensor, p_t: float | Tensor, *, rng: torch.Generator
    ) -> Float[Tensor, "b g"]:
        """Draw ``x_t | x_s`` for ``p_t <= p_s``."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """What the network sees of the state."""

    @abstractmethod
    def natural(
        self, raw: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """Raw network output -> natural parameters."""

    @abstractmethod
    def loss(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """Weighted loss of every entry, never reduced; exactly 0 where ``p == 1``."""

    @abstractmethod
    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """Posterior mean ``E[x_0 | x_p]``."""

    @abstractmethod
    def reverse(
        self,
        x: Float[Tensor, "b g"],
        eta: Float[Tensor, "b g k"],
        p_t: float | Tensor,
        p_s: float | Tensor,
        *,
        sigma: float | Tensor = 0.0,
        rng: torch.Generator,
    ) -> Float[Tensor, "b g"]:
        """One reverse step ``p_t -> p_s >= p_t``; raises ``ValueError`` where ``sigma`` is above its cap."""
