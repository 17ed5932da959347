"""What PCA regression and ridge share: a linear prediction on a log scale, and an honest way back to molecules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray, _tuning, depth

if TYPE_CHECKING:
    from distdiff.data.store import CountStore

FLOORS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Shares of ``s gene_mean`` below which a rate may not fall; the best is chosen (never exactly zero: 1e-4 at least)."""


class LogLinear(Baseline, ABC):
    """``rate = s max(c_g max(link(prediction), 0), floor gene_mean_g)``, ``s`` the depth of the evidence.

    Inputs are ``y = log1p(scale x / s)`` with ``s`` from the observed genes. On the way back, ``c_g`` is the smearing
    factor of gene ``g`` (Duan 1983), total hidden molecules over total predicted ones, drawn towards the factor of all
    genes by 10 molecules: it repairs the bias of ``expm1`` of a mean.

    The options (`choices`, the scale among them) and ``floor`` are those of least Poisson deviance on a held-out fifth
    of the training cells, under one random mask, with ``c`` from three other masks of the same fifth; then the model is
    solved again on all cells with the ``c`` and ``floor`` of the winner.

    Parameters
    ----------
    scale
        Values of the scale of the logarithm to choose from.
    hide
        Share of entries hidden in those masks.
    max_cells
        At most so many training cells are used, chosen at random (bounds memory: ``float32 [max_cells g]``).
    seed
        Of the sample and the masks.
    """

    def __init__(self, scale: tuple[float, ...], hide: float, max_cells: int, seed: int) -> None:
        if not 0 < hide < 1:
            raise ValueError(f"{type(self).__name__}: hide={hide} must lie strictly between 0 and 1")
        self.scales, self.hide, self.max_cells, self.seed = scale, hide, max_cells, seed
        self.chosen: dict[str, Any] = {}

    @abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """Every combination of options to try, besides the scale."""

    @abstractmethod
    def solve(self, y: FloatArray, rates: FloatArray, option: dict[str, Any]) -> None:
        """Fit to training cells: ``y`` and ``rates = x / s``, both ``float32 [n g]``, without masks."""

    @abstractmethod
    def predict(self, y: FloatArray, observed: BoolArray, option: dict[str, Any]) -> FloatArray:
        """Rates at depth 1 (before smearing) of masked cells ``y`` (``float32 [b g]``, 0 where hidden)."""

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Choose the options, the smearing factors and the floor, then solve on all cells."""
        counts = _tuning.dense(store, _tuning.sample(rows, self.max_cells, self.seed))
        kept, held = _tuning.hold_out(len(counts))
        best = np.inf
        for scale in self.scales:
            for option in self.choices():
                option = {"scale": scale, **option}
                self.solve(*self._unmasked(counts[kept], scale), option)
                smear, floor, score = self._judge(counts[held], option)
                if not self.chosen or score < best:
                    best, self.smear, self.chosen = score, smear, {**option, "floor": floor}
        self.solve(*self._unmasked(counts, self.chosen["scale"]), self.chosen)

    def _unmasked(self, counts: FloatArray, scale: float) -> tuple[FloatArray, FloatArray]:
        rates = (counts / depth(counts, np.ones(counts.shape, dtype=bool), self.gene_mean)).astype(np.float32)
        return np.log1p(np.float32(scale) * rates), rates

    def _linear(self, counts: FloatArray, observed: BoolArray, option: dict[str, Any]) -> tuple[FloatArray, FloatArray]:
        s = depth(counts, observed, self.gene_mean)
        y = np.log1p(option["scale"] * counts / s).astype(np.float32)
        return s, np.maximum(self.predict(y, observed, option), 0.0)

    def _judge(self, held: FloatArray, option: dict[str, Any]) -> tuple[FloatArray, float, float]:
        """Smearing factors ``[g]``, best floor and its deviance on held-out cells."""
        true, told = np.zeros(held.shape[1]), np.zeros(held.shape[1])
        for mask in range(3):
            observed = _tuning.random_mask(held.shape, self.hide, self.seed, "smear", mask)
            s, rate = self._linear(np.where(observed, held, 0.0), observed, option)
            true += np.sum(held, axis=0, where=~observed, dtype=np.float64)
            told += np.sum(s * rate, axis=0, where=~observed, dtype=np.float64)
        overall = true.sum() / told.sum() if told.sum() > 0 else 1.0
        smear = (true + 10.0 * overall) / (told + 10.0)
        observed = _tuning.random_mask(held.shape, self.hide, self.seed, "judge")
        s, rate = self._linear(np.where(observed, held, 0.0), observed, option)
        scores = [_tuning.deviance(held, observed, self._floored(s, smear * rate, floor)) for floor in FLOORS]
        at = int(np.argmin(np.nan_to_num(scores, nan=np.inf)))
        return smear, FLOORS[at], float(np.nan_to_num(scores[at], nan=np.inf))

    def _floored(self, s: FloatArray, rate: FloatArray, floor: float) -> FloatArray:
        return s * np.maximum(rate, max(floor, 1e-4) * self.gene_mean)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The linear prediction, taken back to molecules."""
        s, rate = self._linear(counts, observed, self.chosen)
        return self._floored(s, self.smear * rate, self.chosen["floor"])
