"""Cells of a user for a certificate: read, half hidden, and filled by a model and by cheap methods."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from distdiff import metrics
from distdiff.baselines.with_nb import WithNb
from distdiff.data.counts import check_counts
from distdiff.data.ingest.source import Source
from distdiff.data.masks import mcar
from distdiff.data.store.moments import Moments
from distdiff.inmemory import FEWEST, GROUP, InMemory, groups_of
from distdiff.model import Model
from distdiff.report import Report
from distdiff.rng import numpy_generator
from distdiff.seen import counter
from distdiff.tasks import Reader
from distdiff.tasks.denoise import rates
from distdiff.tasks.likelihood import nats
from distdiff.types import Cells, Condition

FloatArray = NDArray[np.floating]

Answer = tuple[FloatArray, FloatArray, FloatArray]
Fill = Callable[[FloatArray, NDArray[np.bool_], int], Answer]
"""Counts ``[b g]`` in all genes, which are seen, and the row of the first cell -> mean and negative binomial size
``[b g]`` and draws ``[k b g]`` of the scored genes."""

RATE = 0.5
"""Share of entries that are hidden."""

BATCH = 256
"""Cells that are dense at once."""

RIVALS: dict[str, dict[str, Any]] = {
    "gene mean x depth": {"kind": "gene_mean", "depth": True},
    "cell-type mean": {"kind": "type_mean", "key": GROUP, "depth": True},
    "kNN + NB": {"kind": "knn", "hide": RATE},
    "PCA + NB": {"kind": "pca", "hide": RATE},
}
"""Cheap methods, each with a negative binomial around its mean."""


@dataclass
class Trial:
    """Cells of the user in the genes that the model knows: those that are scored, and others to learn from."""

    scored: sparse.csr_matrix
    reference: sparse.csr_matrix
    columns: NDArray[np.int64]  # of the model
    keep: NDArray[np.int64]  # genes that are scored, among these
    names: np.ndarray
    group: np.ndarray  # of the scored cells
    group_of_reference: np.ndarray
    batch: np.ndarray | None
    label: str
    about: dict[str, Any]
    notes: list[str]

    def dense(self, start: int) -> FloatArray:
        """Some scored cells, ``float32 [<=256 g]``."""
        return self.scored[start : start + BATCH].toarray()


def prepared(
    model: Model, data: Any, layer: str | None, groupby: str | None, sample: str | None, cells: int, genes: int,
    keep_trained: bool, seed: int,
) -> Trial:  # fmt: skip
    """Read cells, and choose which of them, and of their genes, are scored; options of `distdiff.certify`."""
    source = Source.open(data, layer) if isinstance(data, str | Path) else Source.from_anndata(data, layer)
    reader, rng = Reader(model.spec, source), numpy_generator(seed, "certify-cells")
    counts = source.read(0, source.n_cells)[:, np.flatnonzero(reader.known)]
    check_counts(counts, np.asarray(source.genes)[reader.known].tolist(), source.obs_names, f"certify: {source.where}")
    columns = reader.columns[reader.known]
    counts, columns = sparse.csr_matrix(counts[:, np.argsort(columns)], dtype=np.float32), np.sort(columns)
    some = np.asarray(counts.sum(1)).ravel() > 0
    _, unknown = counter(model.seen, columns, reader.absent)
    trained = np.zeros(len(some), dtype=bool)
    notes = [source.renamed] if source.renamed else []
    if unknown or model.seen is None:
        notes.append(f"whether the model was trained on these cells is not known: {unknown}")
    else:
        trained = model.seen.found(counts, columns)
    fresh = np.flatnonzero(some if keep_trained else some & ~trained)
    if len(fresh) < FEWEST:
        more = int((trained & some).sum())
        why = f" ({more} more were trained on; keep_trained=True scores them too)" if more and not keep_trained else ""
        raise ValueError(
            f"certify: {source.where} has {len(fresh)} cells with molecules to score, at least {FEWEST} are wanted{why}"
        )
    other = np.flatnonzero(some & trained) if not keep_trained else fresh[:0]
    fresh = rng.permutation(fresh)
    if len(other) < len(fresh) and len(fresh) < 2 * FEWEST:
        raise ValueError(
            f"certify: {source.where} has {len(fresh)} cells with molecules, at least {2 * FEWEST} are wanted: "
            "half are scored, and the cheap methods learn from the others"
        )
    if len(other) < len(fresh):  # too few to learn from
        other, fresh = np.concatenate([other, fresh[len(fresh) // 2 :]]), fresh[: len(fresh) // 2]
    rows, other = np.sort(fresh[:cells]), np.sort(rng.permutation(other)[: 2 * cells])
    moments = Moments.of(sparse.csr_matrix(counts[np.concatenate([rows, other])], dtype=np.int64))
    spread = np.where(moments.mean > 0, moments.var / np.maximum(moments.mean, 1e-12), -1.0)
    keep = np.sort(np.argsort(-spread, kind="stable")[:genes])
    keep = keep[moments.mean[keep] > 0]
    if len(keep) < 10:
        raise ValueError(f"certify: {source.where} has {len(keep)} genes that the model knows, at least 10 are wanted")
    both = np.concatenate([rows, other])
    group, label = _grouped(model, source, counts, both, groupby, seed)
    if len(np.unique(group)) == 1:
        notes.append("all cells are of one group: cell-type mean is the gene mean, and marker leakage is not tested")
    about = {
        "where": source.where, "cells": len(rows), "genes": len(keep), "trained_left_out": int(trained.sum()),
        "trained_kept": bool(keep_trained and trained.any()), "cheap_methods_learn_from": len(other), "groups": label,
        "genes_absent_from_input": reader.absent, "genes_unknown_to_model": reader.unknown,
        "molecules": float(np.median(np.asarray(counts[rows].sum(1)))), "data": _fingerprint(counts[rows]),
    }  # fmt: skip
    return Trial(
        counts[rows], counts[other], columns, keep, np.asarray(model.spec.genes)[columns[keep]], group[: len(rows)],
        group[len(rows) :], None if sample is None else source.obs(sample)[rows].astype(str), label, about, notes,
    )  # fmt: skip


def _grouped(
    model: Model, source: Source, counts: sparse.csr_matrix, rows: np.ndarray, groupby: str | None, seed: int
) -> tuple[np.ndarray, str]:  # fmt: skip
    """Name of each cell's group, and what to say of them."""
    key = groupby or next((label for label in model.spec.labels if _has(source, label, rows)), None)
    return groups_of(source, counts[rows], rows, key, seed)


def _has(source: Source, label: str, rows: np.ndarray) -> bool:
    """Whether obs has a column of that name, with a value for some of the cells."""
    try:
        return any(value is not None for value in source.obs(label)[rows])
    except ValueError:
        return False


def _fingerprint(counts: sparse.csr_matrix) -> str:
    counts = counts.sorted_indices()
    found = hashlib.sha256(np.asarray(counts.shape).tobytes())
    for part in (counts.indptr, counts.indices, counts.data):
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:12]


class Asked:
    """The model, asked about cells in the genes that it knows."""

    def __init__(self, model: Model, read: Trial, draws: int, seed: int) -> None:
        self.model, self.read, self.draws, self.seed = model, read, draws, seed
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model.denoiser.to(self.device).eval()
        self.imputer = model.imputer(statistics=("sd",))

    def _given(self, counts: FloatArray, observed: NDArray[np.bool_], start: int) -> tuple[Cells, torch.Tensor]:
        shape = (len(counts), self.model.spec.n_genes)
        x, seen = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        x[:, self.read.columns], seen[:, self.read.columns] = np.where(observed, counts, 0), observed
        cells = Cells(torch.from_numpy(x), Condition(), torch.arange(start, start + len(x)))
        return cells.to(self.device), torch.from_numpy(seen).to(self.device)

    def fill(self, counts: FloatArray, observed: NDArray[np.bool_], start: int) -> Answer:
        """Mean, negative binomial size and draws of the scored genes: ``[b g]``, ``[b g]``, ``[k b g]``."""
        answer = self.imputer.impute(*self._given(counts, observed, start), draws=self.draws, seed=self.seed)
        at = self.read.columns[self.read.keep]
        mean = answer.mean.cpu().numpy()[:, at].astype(np.float64)
        sd = answer.statistics["sd"].cpu().numpy()[:, at].astype(np.float64)
        size = mean**2 / np.maximum(sd**2 - mean, 1e-6 * np.maximum(mean**2, 1e-12))
        if answer.draws is None:
            raise ValueError("certify: this model's imputer gives no draws")
        return mean, size.clip(1e-3, 1e6), answer.draws.cpu().numpy()[..., at]

    def denoise(self, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Rates of the scored genes and the weight of each count in its own rate, ``float32 [n g]``."""
        found, own = [], []
        at = self.read.columns[self.read.keep]
        for start in range(0, len(counts), BATCH):
            part = counts[start : start + BATCH]
            cells, seen = self._given(part, np.ones(part.shape, dtype=bool), start)
            rate, log_size = rates(self.model.process, self.model.denoiser, cells, seen)
            found.append(rate.cpu().numpy()[:, at])
            own.append((rate / log_size.exp()).clamp(0, 1).cpu().numpy()[:, at])
        return np.concatenate(found), np.concatenate(own)

    def nats(self, counts: FloatArray) -> FloatArray:
        """Likelihood bound of each cell, ``[n]``."""
        found = []
        for start in range(0, len(counts), BATCH):
            part = counts[start : start + BATCH]
            given = self._given(part, np.ones(part.shape, dtype=bool), start)
            found.append(nats(self.model.process, self.model.denoiser, *given, levels=32, seed=self.seed).cpu().numpy())
        return np.concatenate(found)


def rival(options: dict[str, Any], read: Trial, draws: int, seed: int) -> Fill:
    """A cheap method, fitted on the other cells."""
    store, imputer = InMemory(read.reference[:, read.keep], read.group_of_reference), WithNb(options, hide=RATE)
    imputer.fit(store, np.arange(read.reference.shape[0]))  # type: ignore[arg-type]
    code_of = {name: i for i, name in enumerate(store.manifest.labels[GROUP])}
    code = torch.tensor([code_of.get(str(name), -1) for name in read.group])

    def fill(counts: FloatArray, observed: NDArray[np.bool_], start: int) -> Answer:
        rows = torch.arange(start, start + len(counts))
        cells = Cells(torch.from_numpy(counts[:, read.keep]), Condition({GROUP: code[rows]}), rows)
        answer = imputer.impute(cells, torch.from_numpy(observed[:, read.keep]), draws=draws, seed=seed)
        if answer.draws is None or imputer.sizes is None:
            raise ValueError(f"certify: {imputer.label} gave no draws")
        return answer.mean.numpy(), imputer.sizes, answer.draws.numpy()

    return fill


SCORES = {"deviance": "deviance", "crps": "CRPS", "log_score": "log score"}


@dataclass
class Answers:
    """Scores of an imputer, sums over each cell's hidden entries; of ours, every hidden entry."""

    sums: dict[str, NDArray[np.float64]]
    count: NDArray[np.int64]
    entries: dict[str, np.ndarray]
    sample: Report | None = None


def scored(
    fill: Fill, trial: Trial, draws: int, seed: int, *, watch: bool = False,
    most: FloatArray | None = None,
) -> Answers:  # fmt: skip
    """Hide half of the entries of the scored cells, the same ones whatever fills them, and score what is put there.

    ``watch`` keeps every entry: its cell, gene, truth, mean, place among the draws (`distdiff.metrics.pit`), share of
    draws that are zero and, with ``most`` ``[g]``, above that.
    """
    sums: dict[str, list[Any]] = {name: [] for name in (*SCORES, "count")}
    entries: dict[str, list[Any]] = {name: [] for name in ("cell", "gene", "truth", "mean", "u", "zero", "above")}
    first = None
    for start in range(0, trial.scored.shape[0], BATCH):
        counts = trial.dense(start)
        hidden = mcar(counts.shape, RATE, numpy_generator(seed, "certify-mask", start))
        mean, size, drawn = fill(counts, ~hidden, start)
        truth, targets = counts[:, trial.keep], hidden[:, trial.keep]
        sums["deviance"].append(metrics.poisson_deviance(truth, targets, mean))
        sums["crps"].append(metrics.crps(truth, targets, drawn))
        sums["log_score"].append(metrics.negative_binomial_score(truth, targets, mean, size))
        sums["count"].append(targets.sum(1))
        if watch:
            cell, gene = np.nonzero(targets)
            several = drawn[:, targets]
            entries["u"].append(metrics.pit(truth, targets, drawn, numpy_generator(seed, "certify-pit", start)))
            entries["zero"].append((several == 0).mean(0))
            if most is not None:
                entries["above"].append((several > most[gene]).mean(0))
            entries["truth"].append(truth[targets])
            entries["mean"].append(mean[targets])
            entries["cell"].append(cell + start)
            entries["gene"].append(gene)
            first = first or Report(
                [], {"store": trial.about["where"]}, truth, targets, mean.astype(np.float32), drawn.astype(np.float32)
            )
    whole = {name: np.concatenate(parts) for name, parts in sums.items()}
    count = whole.pop("count")
    return Answers(whole, count, {k: np.concatenate(v) for k, v in entries.items() if v}, first)
