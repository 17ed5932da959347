"""How a baseline chooses its options: by Poisson deviance of hidden entries in a held-out fifth of training cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distdiff import metrics
from distdiff.baselines import BoolArray, FloatArray
from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore


def sample(rows: np.ndarray, at_most: int, seed: int) -> np.ndarray:
    """``rows``, or ``at_most`` of them chosen at random, in a random order that ``seed`` fixes."""
    return numpy_generator(seed, "baseline-sample").permutation(rows)[:at_most]


def hold_out(n: int) -> tuple[slice, slice]:
    """Slices of the kept four fifths and the held-out fifth of ``n`` shuffled cells (of a single cell both hold it)."""
    held = n // 5 or min(1, n - 1)
    return (slice(held, n), slice(0, held)) if held else (slice(0, n), slice(0, n))


def random_mask(shape: tuple[int, ...], hide: float, seed: int, *address: int | str) -> BoolArray:
    """Which entries stay observed when each is hidden with probability ``hide``: ``bool [b g]``."""
    return numpy_generator(seed, "baseline-mask", *address).random(shape, dtype=np.float32) >= hide


def deviance(counts: FloatArray, observed: BoolArray, rate: FloatArray) -> float:
    """Mean Poisson deviance over the hidden entries (NaN if there are none)."""
    n = np.count_nonzero(~observed)
    return float(metrics.poisson_deviance(counts, ~observed, rate).sum() / n) if n else float("nan")


def dense(store: CountStore, rows: np.ndarray) -> FloatArray:
    """Counts of ``rows`` in their given order, ``float32 [n g]``, read in ascending order."""
    order = np.argsort(rows, kind="stable")
    out = np.empty((len(rows), len(store.genes)), dtype=np.float32)
    out[order] = store.read(rows[order]).toarray()
    return out


def sizes(counts: FloatArray, hidden: BoolArray, mean: FloatArray) -> FloatArray:
    """Negative binomial size of each gene by moments over hidden entries: ``float64 [g]`` in [0.01, 10,000].

    ``sum (x - m)^2 - m = sum m^2 / size``; both sums are shrunk towards those of all genes by the weight of ten
    entries, so that a gene with few molecules has the size of the average gene.
    """
    m = np.maximum(mean.astype(np.float64), 1e-6)
    excess = np.sum((counts - m) ** 2 - m, axis=0, where=hidden)
    square = np.sum(m**2, axis=0, where=hidden)
    whole = square.sum() / max(excess.sum(), 1e-4 * square.sum(), 1e-12)
    pseudo = 10.0 * square.sum() / max(1, np.count_nonzero(hidden))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (square + pseudo) / np.maximum(excess + pseudo / max(whole, 1e-2), 1e-12)
    return np.clip(np.nan_to_num(found, nan=1e4, posinf=1e4), 1e-2, 1e4)
