"""Count diffusion of pixels, which have a brightest value: CountsDiff's images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distdiff.process import tensor
from distdiff.process.counts import Counts
from distdiff.rng import Rng
from distdiff.types import Float, Tensor


@dataclass(frozen=True)
class Pixels(Counts):
    """:class:`~distdiff.process.counts.Counts` whose walk never makes a pixel brighter than white, as published.

    A step takes at most ``brightest - x`` for the lost molecules ``f`` (docs/MATHS.md 4.2), after guidance. Training is
    that of ``Counts``.

    Parameters
    ----------
    brightest
        Intensity of white: 255 of a byte, 16 of scikit-learn's digits.

    Raises
    ------
    ValueError
        ``brightest`` below 1 or above 2^24.

    Examples
    --------
    >>> import torch
    >>> from distdiff.process.pixels import Pixels
    >>> from distdiff.rng import generator
    >>> law, dark = Pixels(brightest=16, head="mean"), torch.zeros(1, 4)
    >>> law.reverse(dark, torch.full((1, 4, 1), 99.0).log(), 0.0, 1.0, rng=generator(0, "example"))  # 99 are predicted
    tensor([[16., 16., 16., 16.]])
    """

    head: str = "mean"
    brightest: int = 255

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.brightest <= 2**24:  # whole numbers up to it are exact as float32
            raise ValueError(f"process pixels: brightest must lie between 1 and {2**24:,}, got {self.brightest}")

    def mean(self, eta: Float[Tensor, "b g k"], x: Float[Tensor, "b g"], p: float | Tensor) -> Float[Tensor, "b g"]:
        """``E[x_0 | x_p]``, at most white."""
        return super().mean(eta, x, p).clamp_max(self.brightest)

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
        """The step of ``Counts`` with at most ``brightest - x`` lost molecules.

        Raises
        ------
        ValueError
            ``sigma`` above ``sigma_max`` (docs/MATHS.md 4.3) or negative.
        """
        dark = (self.brightest - x).clamp_min(0) / (1 - tensor(p_t, x)).clamp_min(1e-12)
        first = torch.minimum(eta[..., 0], dark.clamp_min(1e-12).log()).unsqueeze(-1)
        drawn = super().reverse(x, torch.cat((first, eta[..., 1:]), -1), p_t, p_s, sigma=sigma, rng=rng)
        return drawn.clamp_max(self.brightest)
