"""What the training cells of a model were: how many of each label value, and how deep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distdiff.data.store.store import CountStore
from distdiff.rng import numpy_generator

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Of the molecules of a training cell."""

MOST = 1 << 16
"""Cells whose depth is read, at most; the quantiles of so many are those of all to 0.2 % of the cells."""

BLOCK = 4096
"""Cells that are read at one time."""


def training_cells(store: CountStore, labels: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Number of training cells, in all and of each value of ``labels``, and quantiles of their depth.

    Stands in ``info["training"]`` of a model: ``cells``, ``labels`` (label -> value -> number; cells without a value
    count in none), ``depth`` (molecules in the store's genes at :data:`QUANTILES`; of :data:`MOST` cells at random
    where there are more).

    Examples
    --------
    >>> from distdiff import CountStore
    >>> from distdiff.training.cells import training_cells
    >>> found = training_cells(CountStore.open("atlas.zarr"), ["cell_type"])
    >>> found["cells"] == sum(found["labels"]["cell_type"].values())
    True
    """
    rows = store.rows("train")
    codes = store.labels(rows, labels)
    counted = {
        label: np.bincount(codes[label][codes[label] >= 0], minlength=len(store.manifest.labels[label])).tolist()
        for label in labels
    }
    some = np.sort(numpy_generator(seed, "training cells").permutation(rows)[:MOST])
    molecules = [
        np.asarray(store.read(some[start : start + BLOCK]).sum(1)).ravel() for start in range(0, len(some), BLOCK)
    ]
    return {
        "cells": len(rows),
        "labels": {label: dict(zip(store.manifest.labels[label], n, strict=True)) for label, n in counted.items()},
        "depth": np.quantile(np.concatenate(molecules), QUANTILES).tolist(),
    }
