"""Evaluation: hide entries of held-out cells, impute the same entries by every imputer, score all in the same way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from distdiff import metrics
from distdiff.component import build, nearest
from distdiff.data.masks import dropout_sites, expressed, gene_folds, mar_blocks, mcar, mnar
from distdiff.imputers import Imputer
from distdiff.report import Report, Row
from distdiff.rng import numpy_generator
from distdiff.types import Cells

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

ANSWERS = ("mean", "1 draw", "draws")

PROTOCOLS = ("mcar", "mar", "mnar_low", "mnar_high", "genes", "paper")

MMD_CELLS = 2000
"""Most cells for MMD, whose matrices are cells x cells; chosen at random, the same for every imputer."""


@dataclass(frozen=True)
class Contestant:
    """An imputer and its rows in the table: ``mean``, ``1 draw``, ``draws`` (an ensemble; its mean is the estimate).

    ``calls``: network calls of a draw, 0 without a network.

    Examples
    --------
    >>> from distdiff.baselines.zero import Zero
    >>> from distdiff.evaluation import Contestant
    >>> Contestant("no imputation", Zero(), ("mean", "1 draw")).answers
    ('mean', '1 draw')
    """

    name: str
    imputer: Imputer
    answers: tuple[str, ...] = ("mean",)
    calls: int = 0

    def __post_init__(self) -> None:
        for answer in self.answers:
            if answer not in ANSWERS:
                raise ValueError(f"contestant {self.name!r}: unknown answer {answer!r}{nearest(answer, ANSWERS)}")


def default_contestants(
    cell_type: str | None, *, extra: Sequence[Contestant] = (), rate: float = 0.5
) -> list[Contestant]:
    """``extra`` and then the baselines of every table.

    Parameters
    ----------
    cell_type
        Label of the cell-type means; ``None``: no such rows.
    extra
        The imputers to evaluate.
    rate
        Share of hidden entries; baselines choose their options at the same share.

    Examples
    --------
    >>> from distdiff.evaluation import default_contestants
    >>> [contestant.name for contestant in default_contestants(cell_type=None)]
    ['kNN pool', 'PCA regression', 'ridge', 'gene mean x depth', 'gene mean', 'none (zero)', 'constant 1', 'perfect']
    """
    from distdiff.baselines import Baseline

    rows: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"kind": "knn", "hide": rate}, ANSWERS),
        ({"kind": "pca", "hide": rate}, ("mean",)),
        ({"kind": "ridge", "hide": rate}, ("mean",)),
        ({"kind": "gene_mean", "depth": True}, ("mean",)),
        ({"kind": "gene_mean"}, ("mean",)),
    ]
    if cell_type is not None:
        rows += [({"kind": "type_mean", "key": cell_type, "depth": d}, ("mean",)) for d in (True, False)]
    rows += [({"kind": "zero"}, ("mean",)), ({"kind": "constant"}, ("mean",)), ({"kind": "perfect"}, ("mean",))]
    made = [(build(Baseline, options), answers) for options, answers in rows]
    return [*extra, *(Contestant(baseline.label, baseline, answers) for baseline, answers in made)]


CHEAP: tuple[dict[str, Any], ...] = (
    {"kind": "gene_mean", "depth": True},
    {"kind": "knn"},
    {"kind": "pca"},
    {"kind": "ridge"},
)
"""Baselines that take seconds to fit; a model that does not beat them is not worth its training."""


def cheap() -> dict[str, Imputer]:
    """The baselines of :data:`CHEAP` by label, not fitted.

    Examples
    --------
    >>> from distdiff.evaluation import cheap
    >>> list(cheap())
    ['gene mean x depth', 'kNN pool', 'PCA regression', 'ridge']
    """
    from distdiff.baselines import Baseline

    return {b.label: b for b in (build(Baseline, options) for options in CHEAP)}


def deviances(
    imputers: Mapping[str, Imputer], store: CountStore, cells: Cells, hidden: NDArray[np.bool_], *, batch: int = 256
) -> dict[str, float]:
    """Fit imputers on the training cells; mean Poisson deviance of each over the ``hidden`` entries of ``cells``.

    Examples
    --------
    >>> from distdiff.baselines.gene_mean import GeneMean
    >>> from distdiff.baselines.zero import Zero
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.evaluation import deviances
    >>> store = CountStore.open("atlas.zarr")
    >>> cells = store.cells(store.rows("test"))
    >>> found = deviances({"mean": GeneMean(), "zero": Zero()}, store, cells, hidden=cells.counts.numpy() >= 0)
    >>> found["mean"] < found["zero"]  # per entry, lower is better
    True
    """
    found = {}
    for name, imputer in imputers.items():
        imputer.fit(store, store.rows("train"))
        mean, _ = _fill(imputer, cells, ~hidden, 0, 0, batch)
        sums = metrics.poisson_deviance(cells.counts.numpy(), hidden, mean)
        found[name] = float(metrics.pooled(sums, hidden.sum(1), metrics.once(len(cells)))[0])
    return found


def evaluate(
    store: CountStore,
    rows: np.ndarray,
    contestants: Sequence[Contestant],
    *,
    rate: float = 0.5,
    protocol: str = "mcar",
    draws: int = 5,
    seed: int = 0,
    batch: int = 256,
    labels: Sequence[str] = (),
    groups: str | None = None,
    targets: str = "all",
    fold: int = 0,
    resamples: tuple[int, int] = (200, 40),
    before: NDArray[np.float32] | None = None,
    ours: str = "distdiff",
    progress: bool = True,
) -> Report:
    """Score imputers on cells ``rows`` of a store; each is fitted on the training cells first.

    Parameters
    ----------
    rate, protocol
        ``mcar``: every entry, zeros included, is hidden with probability ``rate`` and scored. ``mar``: blocks of genes
        in groups of cells. ``mnar_low``, ``mnar_high``: small or large counts more often. ``genes``: whole genes, a
        share ``rate`` of them, absent from every cell (panel completion; ``rate=0.1`` is the first of ten folds, and
        ``fold`` names the others). ``paper``: as ``mcar``, but zeros of a gene that another cell of the same ``groups``
        value expresses count as missing: they are neither evidence nor scored, so almost every target is a non-zero
        count.
    targets
        ``all`` hidden entries are scored, or ``nonzero`` ones alone (as most published tables do: zeros are easier);
        ``mnar_low`` and ``mnar_high`` then hide among non-zeros alone, and zeros are evidence.
    fold
        Which fold of genes is hidden by ``genes``.
    draws
        Number of draws in an ensemble.
    labels
        Labels of the cells that imputers get.
    groups
        Label whose values are the groups of the ``paper`` protocol.
    resamples
        Number of bootstrap replicates over cells, for per-cell scores and for scores of distributions.
    before
        ``float32 [n g]`` counts of ``rows`` before dropout, where they are known (simulations): then nothing else is
        hidden, ``paper``'s missing zeros are filled, and every entry of the completed matrix is scored against these.
    ours
        The contestant whose answers the report keeps.

    Raises
    ------
    ValueError
        No cells, a rate outside (0, 1), an unknown protocol, ``paper`` without groups, or no entry to score.

    Examples
    --------
    >>> from distdiff.baselines.gene_mean import GeneMean
    >>> from distdiff.baselines.zero import Zero
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.evaluation import Contestant, evaluate
    >>> store = CountStore.open("atlas.zarr")
    >>> contestants = [Contestant("gene mean", GeneMean()), Contestant("no imputation", Zero())]
    >>> report = evaluate(store, store.rows("test"), contestants, resamples=(20, 5), progress=False)
    >>> [row.name for row in sorted(report.rows, key=lambda row: row.values["deviance"])]
    ['gene mean', 'no imputation']
    """
    if not len(rows):
        raise ValueError("no cells to evaluate on")
    keys = tuple(dict.fromkeys([*labels, *([groups] if groups else []), *_label_keys(contestants)]))
    cells = store.cells(rows, keys)
    truth = cells.counts.numpy()
    hidden = _hidden(truth, rate, protocol, fold, seed, targets)
    if before is not None:
        hidden = np.zeros_like(hidden)
    observed, scored = _protocol(store, rows, protocol, groups, hidden)
    if before is not None:
        if protocol != "paper" or before.shape != truth.shape:
            raise ValueError(
                f"before= is counts {truth.shape} and protocol 'paper', got {before.shape} and {protocol!r}"
            )
        truth, scored = before, np.ones_like(scored)
    if targets not in ("all", "nonzero"):
        raise ValueError(f"unknown targets {targets!r}{nearest(targets, ('all', 'nonzero'))}")
    if targets == "nonzero":
        scored &= truth > 0
    if not scored.any():
        raise ValueError(f"protocol {protocol!r} at rate {rate} leaves no entry to score in {len(rows)} cells")
    score = _Score(truth, scored, seed, resamples)
    setting = {
        "store": store.path.name if hasattr(store, "path") else "", "data": store.manifest.fingerprint[:12],
        "cells": len(rows), "genes": truth.shape[1], "targets": int(scored.sum()),
        "zeros_among_targets": float((truth[scored] == 0).mean()), "protocol": protocol, "rate": rate,
        "draws": draws, "seed": seed,
    }  # fmt: skip
    report = Report([], setting, truth, scored, ours=ours)
    bar = tqdm(contestants, desc="evaluate", unit=" imputers", disable=not progress)
    for contestant in bar:
        bar.set_postfix_str(contestant.name)
        began, began_cpu = time.perf_counter(), time.process_time()
        contestant.imputer.fit(store, store.rows("train"))
        fitted, fitted_cpu = time.perf_counter(), time.process_time()
        wanted = draws if set(contestant.answers) & {"1 draw", "draws"} else 0

        def show(done: int, name: str = contestant.name) -> None:
            bar.set_postfix_str(f"{name}, {done:,} of {len(cells):,} cells")

        mean, drawn = _fill(contestant.imputer, cells, observed, wanted, seed, batch, show)
        seconds = {
            "fit_seconds": fitted - began, "fill_seconds": time.perf_counter() - fitted,
            "fit_cpu_seconds": fitted_cpu - began_cpu, "fill_cpu_seconds": time.process_time() - fitted_cpu,
        }  # fmt: skip
        report.rows += _rows(contestant, mean, drawn, score, seconds)
        if contestant.name == report.ours:
            report.mean, report.draws = mean, drawn
    return report


def _label_keys(contestants: Sequence[Contestant]) -> list[str]:
    return [key for c in contestants if (key := getattr(c.imputer, "key", ""))]


def _hidden(truth: np.ndarray, rate: float, protocol: str, fold: int, seed: int, targets: str) -> np.ndarray:
    """Which entries are hidden, ``bool [b g]``."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}{nearest(protocol, PROTOCOLS)}")
    rng = numpy_generator(seed, "evaluate")
    if protocol == "mar":
        return mar_blocks(truth.shape, rate, rng)
    if protocol in ("mnar_low", "mnar_high"):
        some = truth > 0 if targets == "nonzero" else None  # else the smallest counts would be zeros alone
        return mnar(truth, rate, rng, high=protocol == "mnar_high", valid=some)
    if protocol == "genes":
        folds = round(1 / rate) if 0 < rate <= 0.5 else 0
        if not 0 <= fold < folds:
            raise ValueError(
                f"protocol 'genes' at rate {rate} has {folds} folds, got fold {fold}; give a rate in (0, 0.5], one "
                "over the number of folds, and a fold from 0"
            )
        return np.broadcast_to(gene_folds(truth.shape[1], folds, rng) == fold, truth.shape).copy()
    return mcar(truth.shape, rate, rng)


def _protocol(
    store: CountStore, rows: np.ndarray, protocol: str, groups: str | None, hidden: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which entries are evidence and which are scored: ``bool [b g]`` each."""
    if protocol != "paper":
        return ~hidden, hidden.copy()
    if groups is None:
        raise ValueError("protocol 'paper' needs the label of the cell groups (cell_type=)")
    everyone = store.rows("all")
    code = store.labels(everyone, [groups])[groups]
    some = np.zeros((int(code.max()) + 1, hidden.shape[1]), dtype=bool)
    for start in range(0, len(everyone), 4096):
        part = everyone[start : start + 4096]
        some |= expressed(store.read(part), code[part], n_groups=len(some))
    missing = dropout_sites(store.read(rows), code[rows], some)
    return ~hidden & ~missing, hidden & ~missing


def _fill(
    imputer: Imputer,
    cells: Cells,
    observed: np.ndarray,
    draws: int,
    seed: int,
    batch: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Impute batch by batch, or all at once for a baseline that wants the query ``whole``.

    Hidden counts are erased first, except for the control ``perfect``, which returns them.
    """
    means, drawn, device = [], [], _device(imputer)
    batch = len(cells) if getattr(imputer, "whole", False) else batch
    for start in range(0, len(cells), batch):
        part, seen = cells[start : start + batch], torch.from_numpy(observed[start : start + batch])
        if not getattr(imputer, "sees_hidden", False):
            part = Cells(torch.where(seen, part.counts, torch.zeros(())), part.labels, part.rows)
        answer = imputer.impute(part.to(device), seen.to(device), draws=draws, seed=seed)
        means.append(answer.mean.cpu().numpy())
        if answer.draws is not None:
            drawn.append(answer.draws.cpu().numpy())
        on_batch(start + len(part))
    return np.concatenate(means), np.concatenate(drawn, 1) if drawn else None


def _device(imputer: Imputer) -> torch.device:
    network = getattr(imputer, "denoiser", None)
    return next(network.parameters()).device if isinstance(network, torch.nn.Module) else torch.device("cpu")


def _rows(
    contestant: Contestant, mean: np.ndarray, drawn: np.ndarray | None, score: _Score, seconds: dict[str, float]
) -> list[Row]:
    imputer, out = contestant.imputer, []
    note = "control" if getattr(imputer, "control", False) else "peeks" if getattr(imputer, "peeks", False) else ""
    for answer in contestant.answers:
        if answer == "mean":
            estimate, law = mean, None
        else:
            if drawn is None:
                raise ValueError(
                    f"contestant {contestant.name!r}: answer {answer!r} needs draws, its imputer gave none"
                )
            estimate, law = (drawn[0], None) if answer == "1 draw" else (drawn.mean(0), drawn)
        suffix = answer if answer != "draws" else f"{len(law) if law is not None else 0} draws"
        name = contestant.name if contestant.answers == ("mean",) else f"{contestant.name} {suffix}"
        values, errors, replicates = score(estimate, law)
        out.append(Row(name, values | seconds, errors, replicates, note, contestant.calls))
    return out


class _Score:
    """All metrics of one imputation, with the same bootstrap resamples and directions for every imputer.

    Completed cells are the true cells with the targets replaced, as in the papers: entries that are neither evidence
    nor target (``paper`` protocol) keep their true counts.
    """

    def __init__(self, truth: np.ndarray, targets: np.ndarray, seed: int, resamples: tuple[int, int]) -> None:
        n, genes = truth.shape
        rng = numpy_generator(seed, "bootstrap")
        self.truth, self.targets = truth, targets
        self.many = np.concatenate((metrics.once(n), metrics.bootstrap_weights(n, resamples[0], rng)))
        self.few = self.many[: 1 + resamples[1]]
        self.log_truth = np.log1p(truth)
        self.directions = metrics.unit_directions(genes, 500, rng)
        self.count = targets.sum(1)
        self.some = np.sort(rng.permutation(n)[:MMD_CELLS])

    def __call__(
        self, estimate: np.ndarray, law: np.ndarray | None
    ) -> tuple[dict[str, float], dict[str, float], dict[str, NDArray[np.float64]]]:
        t, m = self.truth, self.targets

        def pooled(sums: NDArray[np.floating]) -> NDArray[np.floating]:
            return metrics.pooled(sums, self.count, self.many)

        log_point = np.where(m, np.log1p(np.maximum(estimate, 0)), self.log_truth)  # only targets may differ
        found: dict[str, Any] = {
            "deviance": pooled(metrics.poisson_deviance(t, m, estimate)),
            "log1p_mse": pooled(metrics.log1p_squared_error(t, m, estimate)),
            "rmse": np.sqrt(pooled(metrics.squared_error(t, m, estimate))),
            "mae": pooled(metrics.absolute_error(t, m, estimate)),
            "bias": pooled(metrics.error(t, m, estimate)),
            "pearson": metrics.cell_mean(metrics.pearson(t, m, estimate), self.many),
            "spearman": metrics.cell_mean(metrics.spearman(t, m, estimate), self.many),
            "crps": pooled(metrics.crps(t, m, law if law is not None else estimate[None])),
            "energy": metrics.energy_distance(t, m, estimate, self.few),
            "mmd": self._mmd(log_point),
            "swd": metrics.sliced_wasserstein(self.log_truth, log_point, self.few, self.directions),
            "correlation": metrics.correlation_error(self.log_truth, log_point, self.few),
        }
        values = {k: float(v[0]) for k, v in found.items()}
        replicates = {k: np.asarray(v[1:], dtype=np.float64) for k, v in found.items()}
        errors = {k: float(np.nanstd(v)) if np.isfinite(v).any() else math.nan for k, v in replicates.items()}
        return values, errors, replicates

    def _mmd(self, log_point: NDArray[np.floating]) -> NDArray[np.floating]:
        if len(self.some) < 2:
            return np.full(len(self.few), np.nan)
        return 1000 * metrics.mmd(self.log_truth[self.some], log_point[self.some], self.few[:, self.some])
