"""Baselines: the imputers and controls that every table compares distdiff's models with, one a file.

A baseline computes a *rate*: the expected molecules of the hidden entries, from the observed entries alone. This file
does the rest in the same way for all: hidden counts are erased before the baseline gets them, observed counts are
copied back unchanged, and draws are Poisson around the rate, or negative binomial where a baseline sets its sizes. A
baseline whose rate follows the depth of the cell can also `Baseline.denoise` thinned counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from distdiff.imputers import Imputed, Imputer
from distdiff.rng import numpy_generator
from distdiff.types import Bool, Cells, Condition, Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array, csr_matrix

    from distdiff.data.store.store import CountStore

__all__ = ["Baseline", "chunks", "depth"]

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]

CHUNK = 4096
"""Training cells that are dense in memory at once."""


class Baseline(Imputer, ABC):
    """An imputer that computes a rate for every entry.

    Attributes
    ----------
    label
        Its name in tables.
    peeks
        Whether it uses something made from the hidden entries (cell-type labels, or the truth itself).
    sees_hidden
        Whether `distdiff.evaluation` gives it the true counts: only ``perfect``.
    control
        Whether it is a control (zero, constant, perfect) and not a method to beat.
    whole
        Whether it compares a query as a whole with the training cells: `distdiff.evaluation` gives it all at once.
    denoises
        Whether its rate follows the depth of the evidence, so that `denoise` is defined.
    gene_mean
        ``float64 [g]`` molecules of the average training cell, set by `fit`.
    sizes
        ``float64 [g]`` negative binomial sizes of the draws, variance ``m + m^2 / size``; ``None``: Poisson.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines import Baseline
    >>> from distdiff.data.store.store import CountStore
    >>> class Half(Baseline):
    ...     label = "half the mean"
    ...     def rate(self, counts, observed, cells):
    ...         return np.broadcast_to(self.gene_mean / 2, counts.shape)
    >>> store, half = CountStore.open("atlas.zarr"), Half()
    >>> half.fit(store, store.rows("train"))
    >>> cells = store.cells(store.rows("test")[:3])
    >>> half.impute(cells, cells.counts > 0, draws=2).draws.shape  # zeros hidden, two draws of each
    torch.Size([2, 3, 30])
    """

    label: str = ""
    peeks: bool = False
    sees_hidden: bool = False
    control: bool = False
    whole: bool = False
    denoises: bool = False
    gene_mean: FloatArray
    sizes: FloatArray | None = None

    def fit(self, store: CountStore, rows: np.ndarray) -> None:
        """Compute the gene means of the training cells ``rows``, then call `learn`.

        Raises
        ------
        ValueError
            No training cells.
        """
        if len(rows) == 0:
            raise ValueError(f"{type(self).__name__}.fit: no training cells were given, wanted at least one")
        total = np.zeros(len(store.genes))
        for _, counts in chunks(store, rows):
            total += counts.sum(axis=0, dtype=np.float64)
        self.gene_mean = total / len(rows)
        self.learn(store, np.asarray(rows))

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Fit what the baseline needs besides the gene means. Default: nothing."""

    def n_trials(self) -> int:
        """Combinations of options that `fit` compares at most; 1: there is nothing to choose."""
        return 1

    @abstractmethod
    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Expected molecules of every entry.

        Parameters
        ----------
        counts
            ``float32 [b g]``, zero where hidden.
        observed
            ``bool [b g]``.
        cells
            The batch with its labels; its counts are erased where hidden.

        Returns
        -------
        numpy.ndarray
            ``float [b g]``, not negative; only hidden entries are used.
        """

    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """Fill hidden entries with the rate, and with Poisson or negative binomial draws around it.

        Raises
        ------
        ValueError
            `fit` was not called, the batch has another number of genes, or the baseline answered with another shape or
            with numbers that are not finite.
        """
        erased = self.evidence(cells, observed)
        seen = observed.numpy()
        rate = self.checked(self.rate(erased.counts.numpy(), seen, erased), seen)
        mean = torch.where(observed, cells.counts, torch.from_numpy(rate.astype(np.float32)))
        if draws == 0 or len(cells) == 0:
            return Imputed(mean, mean.new_zeros((draws, *mean.shape)) if draws else None)
        rng = numpy_generator(seed, "draw", int(cells.rows[0]))
        answer = cells.counts.expand(draws, -1, -1).clone()
        hidden = ~seen
        expected = rate[hidden]
        sizes = None if self.sizes is None else np.broadcast_to(self.sizes, seen.shape)[hidden]
        for k in range(draws):
            drawn = expected if sizes is None else expected * (rng.gamma(sizes) / sizes)
            answer[k][~observed] = torch.from_numpy(rng.poisson(drawn).astype(np.float32))
        return Imputed(mean, answer)

    def evidence(self, cells: Cells, observed: Bool[Tensor, "b g"]) -> Cells:
        """The batch without its hidden counts (0 there): all that a baseline ever gets to see.

        Raises
        ------
        ValueError
            `fit` was not called, or the batch has another number of genes.
        """
        if not hasattr(self, "gene_mean"):
            raise ValueError(f"{type(self).__name__}.impute: call fit(store, rows) first")
        if tuple(cells.counts.shape) != tuple(observed.shape) or cells.counts.shape[1] != len(self.gene_mean):
            raise ValueError(
                f"{type(self).__name__}.impute: counts {tuple(cells.counts.shape)} and observed "
                f"{tuple(observed.shape)} must both be [cells, {len(self.gene_mean)}], the genes of the fit"
            )
        erased = torch.where(observed, cells.counts, torch.zeros((), dtype=cells.counts.dtype))
        return Cells(erased, cells.labels, cells.rows)

    def checked(self, rate: FloatArray, observed: BoolArray) -> FloatArray:
        """The rate as ``float64``, not negative.

        Raises
        ------
        ValueError
            Another shape than that of the batch, or a hidden entry whose rate is not finite.
        """
        if rate.shape != observed.shape:
            raise ValueError(
                f"{self.label or type(self).__name__} answered with shape {rate.shape} for cells x genes "
                f"{observed.shape}; a baseline's rate needs one number for every entry"
            )
        rate = np.maximum(rate, 0.0, dtype=np.float64)
        wrong = int(np.count_nonzero(~np.isfinite(rate[~observed])))
        if wrong:
            raise ValueError(
                f"{self.label or type(self).__name__} answered with {wrong} numbers that are not finite, of "
                f"{int(np.count_nonzero(~observed))} hidden entries; its row cannot be scored"
            )
        return rate

    def denoise(self, counts: FloatArray | csr_matrix | csr_array, p: float) -> FloatArray:
        """Expected molecules of every gene at full depth, from counts that each survived with probability ``p``.

        Every gene is observed; the rate at the evidence's depth is divided by ``p``. A cell may be a training cell
        (molecular cross-validation fits on the thinned counts themselves): it is then one of its own neighbours in kNN
        and MAGIC.

        Parameters
        ----------
        counts
            ``[b g]`` molecules, dense or CSR; at most 4,096 cells are dense at once, besides the result.
        p
            Share of each cell's molecules that ``counts`` holds, in (0, 1]; 1 returns the rate at the given depth.

        Returns
        -------
        numpy.ndarray
            ``float32 [b g]`` molecules, not negative.

        Raises
        ------
        ValueError
            This baseline does not denoise, `fit` was not called, ``p`` is out of range, the number of genes differs
            from the fit, or a count is negative or not finite.
        """
        name = type(self).__name__
        if not self.denoises:
            raise ValueError(
                f"{name}.denoise: this baseline's rate does not follow the depth of the cell; take gene_mean with "
                "depth=True, knn, pca, nmf, magic or scvi"
            )
        if not hasattr(self, "gene_mean"):
            raise ValueError(f"{name}.denoise: call fit(store, rows) first")
        if not 0 < p <= 1:
            raise ValueError(f"{name}.denoise: p={p} must lie in (0, 1], the share of molecules that survived")
        if counts.ndim != 2 or counts.shape[1] != len(self.gene_mean):
            raise ValueError(
                f"{name}.denoise: counts {tuple(counts.shape)} must be [cells, {len(self.gene_mean)}], the genes of "
                "the fit"
            )
        out = np.empty(counts.shape, dtype=np.float32)
        for start in range(0, len(out), CHUNK):
            part = counts[start : start + CHUNK]
            x = np.ascontiguousarray(part if isinstance(part, np.ndarray) else part.toarray(), dtype=np.float32)
            if not np.isfinite(x).all() or x.min(initial=0.0) < 0:
                raise ValueError(f"{name}.denoise: a count is negative or not finite; give raw counts")
            rows = torch.arange(start, start + len(x))
            cells = Cells(torch.from_numpy(x), Condition(), rows)
            out[start : start + CHUNK] = np.maximum(self.rate(x, np.ones(x.shape, dtype=bool), cells), 0.0) / p
        return out


def chunks(store: CountStore, rows: np.ndarray, size: int = CHUNK) -> Iterator[tuple[slice, FloatArray]]:
    """Read cells a few thousand at a time: pairs of the slice of ``rows`` and dense ``float32 [<=size g]`` counts.

    Examples
    --------
    >>> from distdiff.baselines import chunks
    >>> from distdiff.data.store.store import CountStore
    >>> store = CountStore.open("atlas.zarr")
    >>> [counts.shape for _, counts in chunks(store, store.rows("train"), size=100)]
    [(100, 30), (59, 30)]
    """
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part, store.read(rows[part]).toarray().astype(np.float32)


def depth(counts: FloatArray, observed: BoolArray, profile: FloatArray) -> FloatArray:
    """Depth of the evidence, ``sum_obs x / sum_obs profile``: ``float64 [b 1]``, dimensionless.

    A cell without molecules counts as half a molecule; a cell without observed genes (or with an expectation of 0) has
    depth 1.

    Parameters
    ----------
    counts
        ``float [b g]``, zero where hidden.
    observed
        ``bool [b g]``.
    profile
        ``float [g]`` or ``[b g]`` expected molecules at depth 1.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines import depth
    >>> counts, observed = np.array([[6.0, 0.0]]), np.array([[True, False]])
    >>> depth(counts, observed, profile=np.array([2.0, 5.0]))  # three times the profile, on the observed gene
    array([[3.]])
    """
    seen = counts.sum(axis=1, dtype=np.float64)
    if profile.ndim == 1:
        expected = observed.astype(np.float32) @ profile.astype(np.float32)
    else:
        expected = np.sum(profile, axis=1, where=observed, dtype=np.float64)
    some = expected > 0
    return np.where(some, np.maximum(seen, 0.5) / np.where(some, expected, 1.0), 1.0)[:, None]
