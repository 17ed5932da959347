"""What PCA regression and ridge share: a linear prediction on a log scale, and an unbiased way back to molecules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distdiff.baselines import Baseline, BoolArray, Cells, FloatArray, _tuning, depth
from distdiff.imputers.blend import log_linear

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

FLOORS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Shares of ``s gene_mean`` below which a rate may not fall; the best is chosen."""


class LogLinear(Baseline, ABC):
    """``rate = s max(c_g r_g, floor gene_mean_g)``, ``r = expm1(prediction) / scale``, ``s`` the depth of the evidence.

    Predictions are of ``y = log1p(scale x / s)``, ``s`` from the observed genes; ``r`` is kept between zero and the
    largest ``x / s`` of the gene in training (exponentials extrapolate badly). ``c_g`` is the gene's smearing factor
    (Duan 1983), total hidden molecules over total predicted ones, shrunk towards the factor of all genes by 10
    molecules. It corrects the bias of ``expm1`` of a mean.

    Options and ``floor`` are those of least Poisson deviance on a held-out fifth of the training cells under one random
    mask, with ``c`` from three other masks of the same fifth: first `choices` at the first scale, then the other scales
    with the best choice. The model is then solved again on all cells, with the ``c`` and ``floor`` of the winner.

    Parameters
    ----------
    scale
        Values of the scale of the logarithm to choose from, the most likely first.
    hide
        Share of entries hidden in those masks.
    max_cells
        Most training cells to use, chosen at random (bounds memory: ``float32 [max_cells g]``).
    seed
        Seed of the sample and the masks.
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
    def solve(self, y: FloatArray, option: dict[str, Any]) -> None:
        """Fit to training cells without masks, ``y`` of them ``float32 [n g]``."""

    @abstractmethod
    def predict(self, y: FloatArray, observed: BoolArray) -> FloatArray:
        """Predict every ``y`` of masked cells (``float32 [b g]``, 0 where hidden)."""

    def n_trials(self) -> int:
        """Choices at the first scale, then the other scales."""
        return len(self.choices()) + len(self.scales) - 1

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Choose the options, the smearing factors and the floor, then solve on all cells."""
        counts = _tuning.dense(store, _tuning.sample(rows, self.max_cells, self.seed))
        kept, held = _tuning.hold_out(len(counts))
        trials = [{"scale": self.scales[0], **option} for option in self.choices()]
        tried = [self._try(counts[kept], counts[held], option) for option in trials]
        best = min(tried, key=lambda trial: trial[0])
        tried = [self._try(counts[kept], counts[held], {**best[1], "scale": scale}) for scale in self.scales[1:]]
        _, self.chosen, self.smear = min([best, *tried], key=lambda trial: trial[0])
        self._solve(counts, self.chosen)

    def _solve(self, counts: FloatArray, option: dict[str, Any]) -> None:
        rates = (counts / depth(counts, np.ones(counts.shape, dtype=bool), self.gene_mean)).astype(np.float32)
        self.cap = rates.max(axis=0)
        self.solve(np.log1p(np.float32(option["scale"]) * rates), option)

    def _linear(self, counts: FloatArray, observed: BoolArray, scale: float) -> tuple[FloatArray, FloatArray]:
        x, seen, mean, cap = (torch.from_numpy(a) for a in (counts, observed, self.gene_mean, self.cap))
        s, rate = log_linear(x, seen, mean, cap, scale, lambda y: torch.from_numpy(self.predict(y.numpy(), observed)))
        return s.numpy(), rate.numpy()

    def _try(
        self, kept: FloatArray, held: FloatArray, option: dict[str, Any]
    ) -> tuple[float, dict[str, Any], FloatArray]:
        """Deviance on held-out cells, the option with its best floor, and its smearing factors ``[g]``."""
        self._solve(kept, option)
        true_total, expected_total = np.zeros(held.shape[1]), np.zeros(held.shape[1])
        for mask in range(3):
            observed = _tuning.random_mask(held.shape, self.hide, self.seed, "smear", mask)
            s, rate = self._linear(np.where(observed, held, 0.0), observed, option["scale"])
            true_total += np.sum(held, axis=0, where=~observed, dtype=np.float64)
            expected_total += np.sum(s * rate, axis=0, where=~observed, dtype=np.float64)
        overall = true_total.sum() / expected_total.sum() if expected_total.sum() > 0 else 1.0
        smear = (true_total + 10.0 * overall) / (expected_total + 10.0)
        observed = _tuning.random_mask(held.shape, self.hide, self.seed, "judge")
        s, rate = self._linear(np.where(observed, held, 0.0), observed, option["scale"])
        scores = [_tuning.deviance(held, observed, self._floored(s, smear * rate, floor)) for floor in FLOORS]
        at = int(np.argmin(np.nan_to_num(scores, nan=np.inf)))
        return float(np.nan_to_num(scores[at], nan=np.inf)), {**option, "floor": FLOORS[at]}, smear

    def _floored(self, s: FloatArray, rate: FloatArray, floor: float) -> FloatArray:
        return s * np.maximum(rate, floor * self.gene_mean)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The linear prediction, taken back to molecules."""
        s, rate = self._linear(counts, observed, self.chosen["scale"])
        return self._floored(s, self.smear * rate, self.chosen["floor"])
