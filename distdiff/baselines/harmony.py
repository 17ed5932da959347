"""Harmony (Korsunsky et al., Nat Methods 2019), as harmonypy ships it, then the nearest training cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distdiff.baselines import FloatArray
from distdiff.baselines._panel import Panel


@dataclass(eq=False)
class Harmony(Panel):
    """``rate = s mean of the k nearest training cells``, in principal components that Harmony has corrected.

    Query and training cells are joined on the genes that both have: principal components of their log CP10k, corrected
    by `harmonypy.run_harmony` with the two sets as batches, then Euclidean neighbours.

    Parameters
    ----------
    components
        Principal components.
    k
        Neighbours.

    Examples
    --------
    >>> from distdiff.baselines.harmony import Harmony
    >>> Harmony(components=0)
    Traceback (most recent call last):
        ...
    ValueError: Harmony + kNN: components=0 and k=(20, 50) must each be 1 or more
    """

    components: int | Sequence[int] = (30, 50)
    k: int | Sequence[int] = (20, 50)

    label = "Harmony + kNN"

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.options()
        if min(min(options["components"]), min(options["k"])) < 1:
            raise ValueError(f"{self.label}: components={self.components} and k={self.k} must each be 1 or more")

    def matches(self, train: FloatArray, query: FloatArray) -> tuple[np.ndarray, FloatArray]:
        """Neighbours in the corrected components, all of the same weight.

        Raises
        ------
        ImportError
            harmonypy is not installed.
        """
        try:
            from harmonypy import run_harmony
        except ImportError as error:
            raise ImportError("the harmony baseline needs harmonypy: pip install 'harmonypy>=2'") from error
        import pandas as pd
        from sklearn.decomposition import PCA
        from sklearn.neighbors import NearestNeighbors

        both = np.concatenate((train, query))
        d = max(1, min(self.option["components"], min(both.shape) - 1))
        z = np.zeros((len(both), 1))
        if np.ptp(both, axis=0).any():
            z = PCA(d, svd_solver="randomized", random_state=self.seed).fit_transform(both)
        if len(query) and np.ptp(z, axis=0).all():
            batch = pd.DataFrame({"cells": np.repeat(["training", "query"], (len(train), len(query)))})
            clusters = int(np.clip(len(both) // 30, 1, 100))
            fit = run_harmony(z, batch, "cells", nclust=clusters, random_state=self.seed, ncores=1, verbose=False)
            z = fit.Z_corr
        k = min(self.option["k"], len(train))
        near = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(z[: len(train)])
        at = near.kneighbors(z[len(train) :], return_distance=False)
        return at, np.full(at.shape, 1.0 / k)
