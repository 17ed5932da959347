"""What the rows of the benchmark share: the same training cells, the same tuning budget, the same way to molecules."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from distdiff.baselines import Baseline, BoolArray, FloatArray, _tuning, depth
from distdiff.baselines._loglinear import FLOORS
from distdiff.rng import numpy_generator
from distdiff.types import Cells, Condition

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore


@dataclass(eq=False)
class Fitted(Baseline, ABC):
    """``rate = max(c_g r, floor s gene_mean)``: a row's own answer ``r``, calibrated and floored on validation cells.

    Every row of the benchmark is fitted alike. Validation cells are a held-out fifth of the training cells; each fit
    sees the other four fifths. An option that is a sequence is chosen: at most ``trials`` combinations are fitted, the
    first values first, and the one of least Poisson deviance on validation entries hidden at ``hide`` is kept. With
    each fit come two read-outs that cost nothing: gene factors ``c`` (total hidden molecules over total predicted ones,
    shrunk by 10 molecules towards that of all genes; or 1) and a floor, a share of the depth-scaled gene mean.

    Parameters
    ----------
    trials
        Most combinations of options to fit.
    hide
        Share of validation entries that are hidden.
    max_cells
        Most training cells to use, chosen at random (bounds memory: ``float32 [max_cells g]``).
    seed
        Seed of the sample, the masks and the fit.
    """

    trials: int = 4
    hide: float = 0.5
    max_cells: int = 10_000
    seed: int = 0

    refit: ClassVar[bool] = True
    denoises = True

    def __post_init__(self) -> None:
        """Refuse budgets out of range.

        Raises
        ------
        ValueError
            An option out of range, or a sequence without values.
        """
        if not 0 < self.hide < 1:
            raise ValueError(f"{self.label}: hide={self.hide} must lie strictly between 0 and 1")
        if self.trials < 1 or self.max_cells < 1:
            raise ValueError(f"{self.label}: trials={self.trials} and max_cells={self.max_cells} must be 1 or more")
        for name, values in self.options().items():
            if not values:
                raise ValueError(f"{self.label}: {name} is empty, give at least one value to choose from")
        self.chosen: dict[str, Any] = {}

    def options(self) -> dict[str, tuple[Any, ...]]:
        """Every option of the row with its values to choose from."""
        own = {f.name for f in fields(self) if f.init} - {f.name for f in fields(Fitted)}
        given = {name: getattr(self, name) for name in sorted(own)}
        return {k: tuple(v) if isinstance(v, tuple | list) else (v,) for k, v in given.items()}

    def n_trials(self) -> int:
        """The budget, or all combinations where they are fewer."""
        return min(self.trials, math.prod(len(values) for values in self.options().values()))

    @abstractmethod
    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Fit to training cells with one value for every option; ``held`` may decide when to stop."""

    @abstractmethod
    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The row's own answer ``r``, in molecules at the depth of the evidence: ``float [b g]``."""

    def keys(self) -> tuple[str, ...]:
        """Labels that the fit needs. Default: none."""
        return ()

    def mask(self, shape: tuple[int, ...], hide: float, seed: int, *address: int | str) -> BoolArray:
        """Which entries of validation cells are observed: ``bool [b g]``, by default each with probability 1 - hide."""
        return _tuning.random_mask(shape, hide, seed, *address)

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Fit at most ``trials`` combinations of options, keep the best, and fit it to all cells if ``refit``."""
        some = _tuning.sample(rows, self.max_cells, self.seed)
        labels = {k: torch.from_numpy(np.asarray(v)) for k, v in store.labels(some, self.keys()).items()}
        cells = Cells(torch.from_numpy(_tuning.dense(store, some)), Condition(labels), torch.from_numpy(some))
        kept, held = (cells[part] for part in _tuning.hold_out(len(cells)))
        best, last = np.inf, None
        for option in combinations(self.options(), self.trials, self.seed):
            self.solve(kept, held, option)
            score, read_out = self._read_out(held)
            last = option
            if score < best or not self.chosen:
                best, self.chosen, (self.factor, self.floor) = score, option, read_out
        if self.refit:
            self.solve(cells, held, self.chosen)
        elif last != self.chosen:
            self.solve(kept, held, self.chosen)

    def _read_out(self, held: Cells) -> tuple[float, tuple[FloatArray, float]]:
        """Deviance on validation cells with the best gene factors and floor."""
        truth = held.counts.numpy()
        answers = []
        for name in ("smear", "judge"):
            observed = self.mask(truth.shape, self.hide, self.seed, name)
            seen = np.where(observed, truth, 0.0).astype(np.float32)
            cells = Cells(torch.from_numpy(seen), held.labels, held.rows)
            answers.append((observed, seen, np.maximum(self.predict(seen, observed, cells), 0.0)))
        observed, _, answer = answers[0]
        expected: FloatArray = np.asarray(np.sum(answer, axis=0, where=~observed, dtype=np.float64))
        total: FloatArray = np.asarray(np.sum(truth, axis=0, where=~observed, dtype=np.float64))
        overall = total.sum() / expected.sum() if expected.sum() > 0 else 1.0
        factors: tuple[FloatArray, ...] = np.ones(len(total)), (total + 10.0 * overall) / (expected + 10.0)
        observed, seen, answer = answers[1]
        tried = [
            (_tuning.deviance(truth, observed, self._floored(seen, observed, factor * answer, floor)), (factor, floor))
            for factor, floor in itertools.product(factors, FLOORS)
        ]
        return min(tried, key=lambda trial: np.nan_to_num(trial[0], nan=np.inf))

    def _floored(self, counts: FloatArray, observed: BoolArray, rate: FloatArray, floor: float) -> FloatArray:
        return np.maximum(rate, floor * depth(counts, observed, self.gene_mean) * self.gene_mean)

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """The row's own answer times its gene factors, not below the floor."""
        if len(counts) == 0:
            return np.zeros(counts.shape)
        return self._floored(counts, observed, self.factor * self.predict(counts, observed, cells), self.floor)


def combinations(options: dict[str, tuple[Any, ...]], trials: int, seed: int) -> list[dict[str, Any]]:
    """At most ``trials`` combinations: the first value of every option, then others at random."""
    every = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    order = 1 + numpy_generator(seed, "baseline-trials").permutation(len(every) - 1)
    return [every[0], *(every[i] for i in order[: trials - 1])]
