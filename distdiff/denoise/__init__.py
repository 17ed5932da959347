"""Denoisers: networks that answer for every gene of a thinned cell. They own weights and know no law."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from distdiff.types import Condition, Float, Tensor


class Denoiser(nn.Module, ABC):
    """``[b g]`` encoded counts and their survival probabilities -> ``[b g k]`` raw answers.

    Built as ``Denoiser(spec, outputs, **options)`` from a :class:`~distdiff.types.DataSpec`.
    """

    relative: bool = True
    """Whether answer 0 is added to the log of the cheap expectation (:class:`~distdiff.denoise.embed.Expectation`)."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """Answer for every gene; ``x`` is ``log(1 + counts)``, ``p`` lies in [0, 1]."""
