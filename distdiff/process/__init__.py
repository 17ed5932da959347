"""Processes: how molecules are removed from cells, and drawn back. A process owns no weights, no device, no file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from distdiff.rng import Rng
from distdiff.types import Float, Tensor


class Process(ABC):
    """A corruption of data with a survival probability ``p`` (1 = clean, 0 = nothing left), and its reversal.

    ``p`` broadcasts against ``[b g]`` everywhere, so each gene of each cell may have its own (docs/MATHS.md 5).
    Data are molecules. A *state* is what the process changes step by step, from :meth:`prior` (p = 0) to :meth:`enter`
    of the data (p = 1). ``eta`` (``[b g k]``) is the network's output as natural parameters: those in which guidance is
    a weighted sum. A process is a frozen dataclass; its fields are its hyper-parameters.

    Examples
    --------
    >>> from distdiff.component import build
    >>> from distdiff.process import Process
    >>> law = build(Process, {"kind": "counts", "head": "mean"})  # the class in distdiff/process/counts.py
    >>> law.outputs, law.entrywise
    (1, True)
    """

    schedule: Any
    """A :class:`~distdiff.process.schedule.Schedule`; a constructor also accepts a name or a mapping of options."""

    relative: bool = True
    """Whether output 0 of the network is a log rate, which the denoiser gives relative to gene mean x depth."""

    whole: ClassVar[bool] = True
    """Whether the law holds for whole counts only; it then trains on a store of counts and refuses measurements."""

    @property
    def entrywise(self) -> bool:
        """Whether :meth:`reverse` draws entries independently, so that a caller may draw only some of them."""
        return False

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers per gene that the network must return (``k``)."""

    def enter(self, counts: Float[Tensor, "b g"], *, rng: Rng) -> Float[Tensor, "b g"]:
        """Data -> state at p = 1. Default: the counts themselves."""
        return counts

    def leave(self, x: Float[Tensor, "b g"]) -> Float[Tensor, "b g"]:
        """State at p = 1 -> data. Default: the state itself."""
        return x

    @abstractmethod
    def prior(self, shape: tuple[int, int], *, rng: Rng) -> Float[Tensor, "b g"]:
        """A state at p = 0."""

    @abstractmethod
    def forward(
        self, x_s: Float[Tensor, "b g"], p_s: float | Tensor, p_t: float | Tensor, *, rng: Rng
    ) -> Float[Tensor, "b g"]:
        """Draw ``x_t | x_s`` for ``p_t <= p_s``."""

    @abstractmethod
    def encode(
        self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"]
    ) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]]:
        """Network inputs: the state on the scale of ``log(1 + molecules)``, and the p that the network is given."""

    @abstractmethod
    def natural(
        self, raw: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """Raw network output -> natural parameters."""

    def moderated(self, eta: Float[Tensor, "b g k"], largest: Float[Tensor, " g"]) -> Float[Tensor, "b g k"]:
        """``eta`` with its tails held back, given each gene's largest count in training. Default: as it is."""
        return eta

    @abstractmethod
    def loss(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """Weighted loss of every entry, not summed or averaged; exactly 0 where ``p == 1``. ``x_0``: state at p = 1."""

    @abstractmethod
    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """Posterior mean of the data, in molecules; where ``p == 1`` the data themselves."""

    @abstractmethod
    def reverse(
        self,
        x: Float[Tensor, "b g"],
        eta: Float[Tensor, "b g k"],
        p_t: float | Tensor,
        p_s: float | Tensor,
        *,
        sigma: float | Tensor = 0.0,
        rng: Rng,
    ) -> Float[Tensor, "b g"]:
        """One reverse step ``p_t -> p_s >= p_t``; raises where ``sigma`` is above its cap (docs/MATHS.md 4.3)."""

    def guided(
        self, eta_c: Float[Tensor, "b g k"], eta_u: Float[Tensor, "b g k"], weight: float, p: float | Tensor
    ) -> Float[Tensor, "b g k"]:
        """``eta_u + w (eta_c - eta_u)``: answers with and without labels, mixed (docs/MATHS.md 4.6)."""
        return eta_u + weight * (eta_c - eta_u)

    def bound(
        self, eta: Float[Tensor, "b g k"], x_0: Float[Tensor, "b g"], x: Float[Tensor, "b g"], p: float | Tensor
    ) -> Float[Tensor, "b g"]:
        """Nats per unit of p: its integral over p in (0, 1) bounds ``-log p(x_0)`` from above.

        Raises
        ------
        ValueError
            The process has no likelihood of counts.
        """
        raise ValueError(f"process {type(self).__name__} has no likelihood of counts; use counts, blackout or masked")


def tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` as a tensor with the dtype and device of ``like``.

    A number is filled in on the device: copying it from the host would stall a GPU.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process import tensor
    >>> tensor(0.5, torch.zeros(3))
    tensor(0.5000)
    """
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.full((), value, dtype=like.dtype, device=like.device)
