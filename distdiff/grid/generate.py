"""Protocol ``generate``: a row draws as many cells as there are test cells, with their types; both are compared.

The scores are those of `distdiff.realism`, over all test cells at once, with the sliced Wasserstein distance beside
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from distdiff import metrics
from distdiff.baselines import Baseline
from distdiff.baselines._engine import Engine
from distdiff.component import build
from distdiff.data.store.store import CountStore
from distdiff.grid.scores import plain, with_error
from distdiff.grid.spec import CannotError, Ours, Peer
from distdiff.model import Model
from distdiff.realism import LEARNED, classifier, correlation, depths, independent, log_cp10k
from distdiff.report import Column
from distdiff.rng import numpy_generator
from distdiff.tasks.generate import walk, walk_levels
from distdiff.types import Cells, Condition

COLUMNS = {
    "generate_energy": Column("energy dist.", "low", "generate"),
    "generate_swd": Column("sliced W2", "low", "generate"),
    "generate_correlation": Column("corr. err.", "low", "generate"),
    "generate_recognised": Column("recognised", "high", "generate"),
    "generate_depth": Column("depth", "none", "generate"),
    "generate_depth_sd": Column("sd of depth", "none", "generate"),
    "generate_mean": Column("mean err.", "low", "generate"),
    "generate_variance": Column("variance err.", "low", "generate"),
    "generate_zeros": Column("zeros err.", "low", "generate"),
    "generate_nearest": Column("nearest", "none", "generate"),
}
"""Scores of generated cells against test cells.

Energy distance and sliced Wasserstein-2 of log(1 + counts); correlations and the share recognised as
`distdiff.realism.COLUMNS` has them; mean and standard deviation of depth over those of the test cells; average over
genes of the absolute difference of log(1 + mean), of log(1 + variance) and of the share of zeros; median distance to
the nearest training cell over that of test cells.
"""

DIRECTIONS = 500


@dataclass(eq=False)
class Real:
    """Counts of training and test cells ``[n g]``, and their codes of the label of types (-1: none).

    Examples
    --------
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.grid.generate import Real
    >>> store = CountStore.open("atlas.zarr")
    >>> real = Real.of(store, tuple(store.rows("test")), "cell_type", seed=0)
    >>> real.test.shape[0] == len(store.rows("test"))
    True
    """

    train: sp.csr_matrix
    codes: NDArray[np.int64]
    test: sp.csr_matrix
    wanted: NDArray[np.int64]
    seed: int

    @classmethod
    def of(cls, store: CountStore, rows: tuple[int, ...], cell_type: str | None, seed: int) -> Real:
        """Read them: the test cells ``rows``, and at most 20,000 training cells."""
        train = store.rows("train")
        train = np.sort(numpy_generator(seed, "grid-generate").permutation(train)[:LEARNED])
        test = np.array(rows)
        codes = [
            store.labels(some, [cell_type])[cell_type] if cell_type else np.full(len(some), -1)
            for some in (train, test)
        ]
        counts = [store.read(some).astype(np.float32) for some in (train, test)]
        return cls(counts[0], codes[0], counts[1], codes[1], seed)

    def alike(self, code: int) -> sp.csr_matrix:
        """Training cells of a type; all of them for a type that has none."""
        some = self.codes == code
        return self.train[some] if code >= 0 and some.any() else self.train

    @cached_property
    def classifier(self) -> Any:
        """Logistic regression of types on log CP10k; ``None`` where fewer than two types are known."""
        known = self.codes >= 0
        if len(np.unique(self.codes[known])) < 2:
            return None
        return classifier(log_cp10k(self.train[known]), self.codes[known])

    def recognised(self, counts: sp.csr_matrix) -> NDArray[np.bool_] | None:
        """Which cells the classifier takes for the type of their test cell."""
        if self.classifier is None or (self.wanted < 0).all():
            return None
        return self.classifier.predict(log_cp10k(counts)) == self.wanted

    @cached_property
    def neighbours(self) -> Any:
        """Training cells to look for the nearest in."""
        from sklearn.neighbors import NearestNeighbors

        return NearestNeighbors(n_neighbors=1, algorithm="brute").fit(log_cp10k(self.train))

    def nearest(self, counts: sp.csr_matrix) -> NDArray[np.float64]:
        """Distance of log CP10k to the nearest training cell ``[n]``."""
        return self.neighbours.kneighbors(log_cp10k(counts))[0][:, 0]

    @cached_property
    def near(self) -> NDArray[np.float64]:
        """That of the test cells."""
        return self.nearest(self.test)

    @cached_property
    def within(self) -> NDArray[np.float64]:
        """Distances between the test cells' log(1 + counts)."""
        return _distances(self.shown, self.shown)

    @cached_property
    def shown(self) -> NDArray[np.float32]:
        """The test cells' log(1 + counts)."""
        return np.log1p(self.test.toarray())


@lru_cache(maxsize=1)
def _real(url: str, fingerprint: str, rows: tuple[int, ...], cell_type: str | None, seed: int) -> Real:
    return Real.of(CountStore.open(url), rows, cell_type, seed)


def scored(
    options: Mapping[str, Any] | Ours | Peer, store: CountStore, rows: NDArray[np.int64], *, model: Model | None,
    cell_type: str | None, seed: int, few: int, fit_cpu: float,
) -> dict[str, Any]:  # fmt: skip
    """Draw the cells of a row and compare them with test cells: answers, setting, capacity and trials.

    Parameters
    ----------
    model
        Of a row of ours.
    few
        Bootstraps.
    fit_cpu
        CPU seconds of the training of ``model``.

    Raises
    ------
    CannotError
        The row draws no cells.
    ImportError
        Its library is not installed.
    ValueError
        It drew numbers that are not finite, or a label is missing.
    """
    real = _real(store.url, store.manifest.fingerprint, tuple(rows.tolist()), cell_type, seed)
    began, asked = time.process_time(), True
    if isinstance(options, Ours):
        if model is None:
            raise ValueError("a row of ours draws cells by its model, and none was given")
        made, tried = _ours(model, options, store, rows, seed), 1
        capacity = sum(p.numel() for p in model.denoiser.parameters())
        spent, asked = (fit_cpu, time.process_time() - began), cell_type in model.spec.labels
    elif isinstance(options, Peer):
        draw, capacity, tried = _peer(options, real, seed), None, 1
        fitted = time.process_time()
        made = _by_type(draw, real.wanted)
        spent = fitted - began, time.process_time() - fitted
    else:
        row = _engine(options)
        row.fit(store, store.rows("train"))
        fitted = time.process_time()
        made, capacity, tried = _walked(row, store, rows, seed), row.capacity, row.n_trials()
        spent, asked = (fitted - began, time.process_time() - fitted), cell_type in row.keys()  # noqa: SIM118
    if made.shape != real.test.shape or not np.isfinite(made.data).all():
        raise ValueError(
            f"it drew cells of shape {made.shape} with {(~np.isfinite(made.data)).sum()} values that are not finite; "
            f"{real.test.shape} finite counts are wanted"
        )
    numbers = compared(made, real, few, asked=asked)
    note = "control" if isinstance(options, Peer) and options.generator == "resampled" else ""
    seen = real.recognised(real.test)
    share = math.nan if seen is None else seen[real.wanted >= 0].mean()
    reading = "" if seen is None else f" The classifier recognises {share:.1%} of the test cells."
    types = f" and of its {cell_type}" if cell_type else ""
    return {
        "answers": [{
            "answer": "cells", "note": note, "reasons": [], "fit_cpu_seconds": spent[0], "fill_cpu_seconds": spent[1],
            "numbers": {name: [plain(number) for number in pair] for name, pair in numbers.items()},
        }],
        "setting": {
            "cells": len(rows), "genes": made.shape[1], "data": store.manifest.fingerprint[:12],
            "said": f"Generated cells, one for each of {len(rows)} test cells{types}, x {made.shape[1]} genes "
            f"({store.manifest.fingerprint[:12]}), against the test cells; depth, its standard deviation and the "
            f"distance to the nearest training cell as multiples of theirs.{reading}",
        },
        "capacity": capacity, "n_trials": tried,
    }  # fmt: skip


def _ours(
    model: Model, options: Ours, store: CountStore, rows: NDArray[np.int64], seed: int
) -> sp.csr_matrix:  # fmt: skip
    """A cell of the model for each test cell, with the labels that both have; none for cells that lack one."""
    at = {gene: i for i, gene in enumerate(model.spec.genes)}
    if unknown := [gene for gene in store.genes if gene not in at]:
        raise ValueError(f"the model does not know {len(unknown)} of the {len(store.genes)} genes ({unknown[0]}, ...)")
    codes = store.labels(rows, [label for label in model.spec.labels if label in store.manifest.labels])
    known = np.all([c >= 0 for c in codes.values()], axis=0) if codes else np.zeros(len(rows), dtype=bool)
    given: dict[str, Any] = {"steps": options.steps} if options.steps else {}
    given |= {name: value for name in ("spacing", "depth") if (value := getattr(options, name))}
    given["sigma"] = ("rescale", options.attrition) if options.attrition else ("none", 0.0)
    parts, order = [], []
    for some, labels in ((np.flatnonzero(known), codes), (np.flatnonzero(~known), {})):
        if len(some):
            names = {k: [store.manifest.labels[k][code] for code in c[some]] for k, c in labels.items()}
            parts.append(model.generate(len(some), names, guidance=options.guidance, seed=seed, **given).X)
            order.append(some)
    whole = sp.vstack(parts, format="csr")[np.argsort(np.concatenate(order))]
    return whole[:, [at[gene] for gene in store.genes]]


def _by_type(draw: Callable[[int, int], sp.csr_matrix], wanted: NDArray[np.int64]) -> sp.csr_matrix:
    """``draw(code, n)`` for each type, in the order of the test cells."""
    places = [np.flatnonzero(wanted == code) for code in np.unique(wanted)]
    parts = [draw(int(wanted[some[0]]), len(some)) for some in places]
    return sp.vstack(parts, format="csr")[np.argsort(np.concatenate(places))]


def _peer(options: Peer, real: Real, seed: int) -> Callable[[int, int], sp.csr_matrix]:
    rng, kind = numpy_generator(seed, "grid-generate", options.generator), options.generator
    if kind == "scvi":
        from distdiff.baselines.scvi import prior_sampler

        sample = prior_sampler(real.train, np.maximum(real.codes, 0), seed=seed)
        return lambda code, n: sample(max(code, 0), rng.choice(depths(real.alike(code)), n))
    if kind in ("nb", "poisson"):
        return lambda code, n: independent(real.alike(code), n, rng, poisson=kind == "poisson")

    def again(code: int, n: int) -> sp.csr_matrix:
        counts = real.alike(code)
        if kind == "resampled":
            return counts[rng.integers(0, counts.shape[0], n)]
        rows = rng.integers(0, counts.shape[0], (n, counts.shape[1]))
        return sp.csr_matrix(np.take_along_axis(counts.toarray(), rows, 0))

    return again


def _engine(options: Mapping[str, Any]) -> Engine:
    """The row, if it can draw cells from nothing."""
    row = build(Baseline, options)
    if not isinstance(row, Engine):
        raise CannotError(f"{row.label} fills entries of cells that are there, and draws no new cells")
    if row.survival() is not row.alike:
        raise CannotError(f"{row.label} learns to fill entries beside others that it sees, and draws no new cells")
    return row


@torch.no_grad()
def _walked(row: Engine, store: CountStore, rows: NDArray[np.int64], seed: int) -> sp.csr_matrix:
    """Cells of a diffusion row, along the levels and with the rule of its imputer, one pass."""
    imputer: Any = row.imputer(row.network)
    codes = store.labels(rows, row.keys())
    row.network.eval()
    levels = getattr(imputer, "levels", None)
    if levels is None:
        levels = walk_levels(row.law, row.network, getattr(row, "walk", 20), "time")
    made = []
    for start in range(0, len(rows), row.cells_at_once):
        at = np.arange(start, min(start + row.cells_at_once, len(rows)))
        labels = Condition({k: torch.from_numpy(c[at]) for k, c in codes.items()})
        cells = Cells(torch.zeros(len(at), 0), labels, torch.from_numpy(at))
        drawn = walk(
            row.law, row.network, cells, len(store.genes), list(levels), depth=None, seed=seed,
            sigma=getattr(imputer, "sigma", ("none", 0.0)), solver=getattr(imputer, "solver", "plain"),
            guidance=getattr(imputer, "guidance", 1.0),
        )  # fmt: skip
        drawn = torch.minimum(drawn, row.most) if row.bounded else drawn
        made.append(sp.csr_matrix(drawn.round().numpy()))
    return sp.vstack(made, format="csr")


def compared(made: sp.csr_matrix, real: Real, few: int, *, asked: bool = True) -> dict[str, tuple[float, float]]:
    """Score -> value and standard error over ``few`` bootstraps of cells, generated and test alike.

    Parameters
    ----------
    made
        Generated cells ``[n g]``, cell ``i`` of the type of test cell ``i``.
    asked
        Whether they were drawn for these types; else no share recognised is computed.

    Examples
    --------
    >>> import numpy as np
    >>> import scipy.sparse as sp
    >>> from distdiff.grid.generate import Real, compared
    >>> rng = np.random.default_rng(0)
    >>> cells = [sp.csr_matrix(rng.poisson(3.0, (60, 5)).astype(np.float32)) for _ in range(3)]
    >>> none = np.full(60, -1)
    >>> found = compared(cells[2], Real(cells[0], none, cells[1], none, seed=0), few=5)
    >>> abs(found["generate_energy"][0]) < 0.2, abs(found["generate_depth"][0] - 1) < 0.2
    (True, True)
    """
    n, genes = made.shape
    weights = np.concatenate(
        (metrics.once(n), metrics.bootstrap_weights(n, few, numpy_generator(real.seed, "grid-generate-few", n)))
    )
    truth, counts = real.test.toarray(), made.toarray()
    shown, near = np.log1p(counts), real.nearest(made)
    like = real.recognised(made) if asked else None
    depth = depths(made), depths(real.test)
    known = real.wanted >= 0

    def of_cells(some: NDArray[np.int64]) -> dict[str, float]:
        a, b = counts[some].astype(np.float64), truth[some].astype(np.float64)
        found = {
            "generate_correlation": correlation(shown[some], real.shown[some]),
            "generate_depth": float(depth[0][some].mean() / depth[1][some].mean()),
            "generate_depth_sd": float(depth[0][some].std() / depth[1][some].std()),
            "generate_mean": _gap(np.log1p(a.mean(0)), np.log1p(b.mean(0))),
            "generate_variance": _gap(np.log1p(a.var(0)), np.log1p(b.var(0))),
            "generate_zeros": _gap((a == 0).mean(0), (b == 0).mean(0)),
            "generate_nearest": float(np.median(near[some]) / np.median(real.near[some])),
        }
        if like is not None:
            found["generate_recognised"] = float(like[some][known[some]].mean())
        return found

    with np.errstate(divide="ignore", invalid="ignore"):
        each = [of_cells(np.repeat(np.arange(n), w)) for w in weights]
    directions = metrics.unit_directions(genes, DIRECTIONS, numpy_generator(real.seed, "grid-generate-swd"))
    found = {name: np.array([of[name] for of in each]) for name in each[0]}
    found["generate_energy"] = _energy(shown, real, weights)
    found["generate_swd"] = metrics.sliced_wasserstein(real.shown, shown, weights, directions)
    return {name: with_error(found[name]) for name in COLUMNS if name in found}


def _gap(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    return float(np.abs(a - b).mean())


def _distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    from sklearn.metrics.pairwise import euclidean_distances

    return euclidean_distances(a.astype(np.float64), b.astype(np.float64))


def _energy(shown: NDArray[np.floating], real: Real, weights: NDArray[np.integer]) -> NDArray[np.float64]:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` of resamples, pairs of a cell with itself left out: ``[R]``."""
    across, own = _distances(shown, real.shown), _distances(shown, shown)
    out = np.empty(len(weights))
    for r, w in enumerate(weights.astype(np.float64)):
        pairs = w.sum() ** 2 - (w**2).sum()
        out[r] = 2 * (w @ across @ w) / w.sum() ** 2 - (w @ own @ w + w @ real.within @ w) / pairs
    return out
