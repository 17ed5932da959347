"""Imputers: everything that fills hidden entries, diffusion models and baselines alike, behind one small contract."""

from __future__ import annotations

import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from distdiff.rng.rows import Rows
from distdiff.types import Bool, Cells, Float, Tensor

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

log = logging.getLogger("distdiff")


@dataclass(frozen=True)
class Imputed:
    """The answer for one batch. Observed entries hold the observed counts, unchanged.

    Attributes
    ----------
    mean
        ``float32 [b g]`` expected molecules.
    draws
        ``float32 [k b g]`` whole-number draws from the predictive law, or ``None`` for a point estimate.
    statistics
        Others of the predictive law, by name (``sd``, ``q5`` ...), each ``float32 [b g]``.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers import Imputed
    >>> Imputed(torch.ones(2, 3), torch.zeros(5, 2, 3)).draws.shape  # 5 draws of 2 cells x 3 genes
    torch.Size([5, 2, 3])
    """

    mean: Float[Tensor, "b g"]
    draws: Float[Tensor, "k b g"] | None = None
    statistics: Mapping[str, Float[Tensor, "b g"]] = field(default_factory=dict)


class Imputer(ABC):
    """Fills hidden entries of cells.

    ``impute`` may look at ``cells.counts`` only where ``observed`` is true; a test feeds garbage elsewhere.

    Attributes
    ----------
    readout
        What :attr:`Imputed.mean` holds (see :mod:`~distdiff.readouts`).
    statistics
        Names of :attr:`Imputed.statistics`, in order.

    Examples
    --------
    >>> import torch
    >>> from distdiff.imputers import Imputed, Imputer
    >>> from distdiff.types import Cells, Condition
    >>> class One(Imputer):
    ...     def impute(self, cells, observed, *, draws=0, seed=0):
    ...         return Imputed(torch.where(observed, cells.counts, 1.0))
    >>> cells = Cells(torch.tensor([[4.0, 0.0]]), Condition(), torch.tensor([0]))
    >>> One().impute(cells, torch.tensor([[True, False]])).mean
    tensor([[4., 1.]])
    """

    readout: str = "mean"
    statistics: tuple[str, ...] = ()

    def fit(self, store: CountStore, rows: np.ndarray) -> None:  # noqa: B027 (many imputers need no fit)
        """Learn from the training cells ``rows`` (``int64``) of ``store``. Default: nothing to learn."""

    @abstractmethod
    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """Fill the entries where ``observed`` is false; with ``draws=0`` only the mean is asked for."""


def fused_draws(device: torch.device) -> bool:
    """Whether noise is drawn by kernels of our own (:mod:`distdiff.rng.fused`): on a GPU where Triton compiles them.

    ``DISTDIFF_FUSED=0`` in the environment switches them off.
    """
    return device.type == "cuda" and os.environ.get("DISTDIFF_FUSED") != "0" and _kernels_run(device)


@functools.cache
def _kernels_run(device: torch.device) -> bool:
    """Draw one number by a kernel; what stops it (no triton, no C compiler) is told once, draws are slower then."""
    try:
        one = torch.zeros(1, dtype=torch.long, device=device)
        Rows(one, one, 0, fused=True).uniform(1, 1)
    except Exception as error:  # whatever a compiler may raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("draws are not made by fused kernels on %s (%s); about a quarter slower", device, first)
        return False
    return True


def by_row(cells: Cells, draws: int, seed: int, stream: str) -> Rows:
    """Noise for ``draws`` draws of every cell, draw-major ``[draws * b]``; each (row, draw) has its own.

    See :func:`fused_draws` for how a GPU draws it.
    """
    fused = fused_draws(cells.rows.device)
    draw = torch.arange(draws, device=cells.rows.device).repeat_interleave(len(cells))
    return Rows(cells.rows.repeat(draws), draw, seed, stream, fused=fused)
