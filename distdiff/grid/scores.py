"""Scores of a row's mean beyond the entries: what is done with the completed cells, by `distdiff.downstream`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distdiff import downstream, metrics
from distdiff.data.masks import rare
from distdiff.downstream import log_cp10k
from distdiff.evaluation import MMD_CELLS
from distdiff.grid.encoder import Scvi
from distdiff.report import Column
from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore
    from distdiff.report import Report

COLUMNS = {
    "nll": Column("held-out NLL", "low", "molecules"),
    "cp10k_mse": Column("log CP10k MSE", "low", "molecules"),
    "cp10k_mse_poisson": Column("log CP10k MSE, Poisson", "low", "molecules"),
    "r2": Column("R2", "high", "cells"),
    "cosine": Column("cosine", "high", "cells"),
    "cell_rmse": Column("RMSE a cell", "low", "cells"),
    "op_mse": Column("OP MSE", "low", "open_problems"),
    "op_poisson": Column("OP Poisson", "low", "open_problems"),
    "op_poisson_right": Column("OP Poisson, right", "low", "open_problems"),
    "rare_deviance": Column("rare deviance", "low", "rare"),
    "log_frechet": Column("log scFID (PCA)", "low", "frechet"),
    "log_frechet_scvi": Column("log scFID (scVI)", "low", "frechet"),
    "log_mmd": Column("log MMD^2 of counts", "low", "mmd"),
    "ari": Column("ARI", "high", "clustering"),
    "nmi": Column("NMI", "high", "clustering"),
    "purity": Column("purity", "high", "clustering"),
    "f": Column("F", "high", "clustering"),
    "probe_accuracy": Column("probe accuracy", "high", "probe"),
    "probe_f1": Column("probe F1", "high", "probe"),
    "de_recall": Column("DE recovered", "high", "de"),
    "de_false": Column("DE false", "low", "de"),
}
"""Columns by metric; the block is the score in the grid's ``scores:``, or the protocol, that adds it."""

TRAINING = 5000
"""Training cells of the PCA and of the probe, at most."""

Found = dict[str, tuple[float, float]]
"""Metric -> value and standard error (NaN where none is computed)."""


@dataclass
class Scored:
    """What extra scores need: the report with its arrays, the store, and the label of types.

    Examples
    --------
    >>> from distdiff.baselines.gene_mean import GeneMean
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.evaluation import Contestant, evaluate
    >>> from distdiff.grid.scores import Scored
    >>> store = CountStore.open("atlas.zarr")
    >>> rows = store.rows("test")
    >>> report = evaluate(
    ...     store, rows, [Contestant("mean", GeneMean())], resamples=(5, 5), ours="mean", progress=False
    ... )
    >>> sorted(Scored(report, store, rows, "cell_type", seed=0).cells())
    ['cell_rmse', 'cosine', 'r2']
    """

    report: Report
    store: CountStore
    rows: NDArray[np.int64]
    cell_type: str | None
    seed: int
    replicates: int = 200
    few: int = 40
    encoder: str = ""

    @cached_property
    def completed(self) -> NDArray[np.float32]:
        """The true cells with the row's mean in the targets."""
        mean, truth = self.report.mean, self.report.truth
        if mean is None:
            raise ValueError("extra scores need the row's mean, and the report holds none")
        return np.where(self.report.targets, np.maximum(mean, 0), truth)

    @cached_property
    def weights(self) -> NDArray[np.int64]:
        """Cells once, then bootstraps."""
        n = len(self.rows)
        drawn = metrics.bootstrap_weights(n, self.replicates, numpy_generator(self.seed, "grid"))
        return np.concatenate((metrics.once(n), drawn))

    def resampled(self, score: Callable[[NDArray[np.int64]], dict[str, float]], n: int) -> Found:
        """A score of cells ``0 ... n - 1``, and its standard deviation over ``few`` bootstraps of them."""
        found, again = score(np.arange(n)), []
        for weights in metrics.bootstrap_weights(n, self.few, numpy_generator(self.seed, "grid-few", n)):
            with contextlib.suppress(ValueError):  # a resample without what the score needs, such as a second type
                again.append(score(np.repeat(np.arange(n), weights)))
        return {k: with_error(np.array([value, *(each[k] for each in again)])) for k, value in found.items()}

    @cached_property
    def training(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log CP10k and type codes of training cells."""
        rows = self.store.rows("train")
        rows = rows[:: max(1, -(-len(rows) // TRAINING))]
        return log_cp10k(self.store.read(rows).toarray()), self.types(rows)

    def types(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Codes of cell types, -1 where a cell has none.

        Raises
        ------
        ValueError
            No label of types was named, or the store has none of that name.
        """
        if self.cell_type is None:
            return np.full(len(rows), -1)
        return self.store.labels(rows, [self.cell_type])[self.cell_type]

    def typed(self) -> NDArray[np.int64]:
        """The types of the scored cells.

        Raises
        ------
        ValueError
            There are none, or fewer than two.
        """
        codes = self.types(self.rows)
        if len(np.unique(codes[codes >= 0])) < 2:
            raise ValueError("scores by type need cell_type: a label with two types or more among the test cells")
        return codes

    def cells(self) -> Found:
        """R2, cosine and RMSE of each cell, averaged over cells."""
        t, m, mean = self.report.truth, self.report.targets, self.completed
        found = {f.__name__: f(t, m, mean) for f in (metrics.r2, metrics.cosine, metrics.cell_rmse)}
        return {name: with_error(metrics.cell_mean(each, self.weights)) for name, each in found.items()}

    def open_problems(self) -> Found:
        """The denoising pair of Open Problems on the targets alone, and the second the right way round."""
        truth, answer = (np.where(self.report.targets, a, 0) for a in (self.report.truth, self.completed))
        pair = self.resampled(lambda some: downstream.open_problems(truth[some], answer[some]), len(truth))
        return {f"op_{name}": found for name, found in pair.items()}

    def rare(self) -> Found:
        """Deviance over the cells of types with at most 30 training cells."""
        some = rare(self.types(self.store.rows("train")), self.typed())
        if some.sum() < 2:
            raise ValueError(
                f"rare: {some.sum()} test cells are of a type with at most 30 training cells; 2 are wanted"
            )
        t, m = self.report.truth[some], self.report.targets[some]
        sums = metrics.poisson_deviance(t, m, self.completed[some])
        weights = metrics.bootstrap_weights(len(t), self.replicates, numpy_generator(self.seed, "grid-rare"))
        both = np.concatenate((metrics.once(len(t)), weights))
        return {"rare_deviance": with_error(metrics.pooled(sums, m.sum(1), both))}

    def frechet(self) -> Found:
        """Log Fréchet distance between true and completed cells, as a PCA of training cells or the grid's encoder sees.

        An encoder of scvi-tools takes counts, the PCA log CP10k.
        """
        name, encode = ("log_frechet_scvi", Scvi(self.encoder, self.store.genes)) if self.encoder else self._pca()
        truth, answer = (encode(x) for x in (self.report.truth, self.completed))

        def log_frechet(some: NDArray[np.int64]) -> dict[str, float]:
            return {name: float(np.log(max(downstream.frechet(truth[some], answer[some]), 1e-12)))}

        return self.resampled(log_frechet, len(truth))

    def _pca(self) -> tuple[str, Callable[[NDArray[np.floating]], NDArray[np.float32]]]:
        from sklearn.decomposition import PCA

        train, _ = self.training
        fit = PCA(min(50, min(train.shape) - 1), random_state=self.seed).fit(train)
        return "log_frechet", lambda counts: fit.transform(log_cp10k(counts))

    def mmd(self) -> Found:
        """Log of the squared MMD (five bandwidths) between true and completed counts, as CountsDiff's tables have it.

        Of the estimate that is never negative; below 1e-12 it counts as that.
        """
        some = numpy_generator(self.seed, "grid-mmd").permutation(len(self.rows))[:MMD_CELLS]
        weights = self.weights[: 1 + self.few, some]
        found = metrics.mmd(self.report.truth[some], self.completed[some], weights, biased=True)
        return {"log_mmd": with_error(np.log(np.maximum(found, 1e-12)))}

    def de(self) -> Found:
        """Genes that tell a type from the others (Wilcoxon): share recovered, share false; errors over types."""
        truth, answer = (log_cp10k(x) for x in (self.report.truth, self.completed))
        found = downstream.recovered(truth, answer, self.typed())
        spread = {k: float(v.std(ddof=1) / np.sqrt(len(v))) if len(v) > 1 else np.nan for k, v in found.items()}
        return {f"de_{name}": (float(value.mean()), spread[name]) for name, value in found.items()}

    def clustering(self) -> Found:
        """Leiden clusters of the completed cells against their types."""
        from scipy.sparse import csr_matrix

        from distdiff.imputers.targets import leiden

        codes, completed, genes = self.typed(), self.completed, self.store.genes

        class Rows:
            n_cells = len(completed)

            def __init__(self) -> None:
                self.genes = genes

            def read(self, start: int, stop: int) -> csr_matrix:
                return csr_matrix(completed[start:stop])

            def obs(self, key: str) -> NDArray[np.object_]:
                raise ValueError(key)

        clusters, known = leiden(Rows(), seed=self.seed, progress=False), codes >= 0
        codes, clusters = codes[known], clusters[known]
        return self.resampled(lambda some: downstream.clustering(codes[some], clusters[some]), len(codes))

    def probe(self) -> Found:
        """Types of the completed cells as XGBoost tells them."""
        train, codes = self.training
        wanted, known = self.typed(), codes >= 0
        have = wanted >= 0
        answer = downstream.probe(train[known], codes[known], log_cp10k(self.completed)[have], seed=self.seed)
        wanted = wanted[have]
        found = self.resampled(lambda some: downstream.agreement(wanted[some], answer[some]), len(wanted))
        return {f"probe_{name}": value for name, value in found.items()}


def extra(names: tuple[str, ...], scored: Scored) -> tuple[Found, list[str]]:
    """The scores that are asked for, and a sentence on each that this row or data set cannot have.

    Examples
    --------
    >>> from distdiff.grid.scores import extra
    >>> extra((), None)
    ({}, [])
    """
    found: Found = {}
    reasons = []
    for name in names:
        score: Callable[[], Found] = getattr(scored, name)
        try:
            found |= score()
        except (ValueError, ImportError) as error:
            reasons.append(f"no score {name!r}: {error}")
    return found, reasons


def with_error(replicates: NDArray[np.floating]) -> tuple[float, float]:
    """The first number, and the standard deviation of the others (NaN where there are none).

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.grid.scores import with_error
    >>> with_error(np.array([1.0, 0.5, 1.5]))
    (1.0, 0.5)
    """
    some = replicates[1:][np.isfinite(replicates[1:])]
    return float(replicates[0]), float(some.std()) if len(some) else np.nan


def plain(number: float) -> float | None:
    """A number as JSON has it: none for what is not finite.

    Examples
    --------
    >>> from distdiff.grid.scores import plain
    >>> plain(0.5), plain(float("nan"))
    (0.5, None)
    """
    return float(number) if np.isfinite(number) else None
