"""Is the default first? One table a data set: the shipped config against tuned peers, each with a negative binomial.

    python benchmarks/defaults.py --data baron.h5ad --genes 1000 --out benchmarks/results/defaults_baron.json

Half of the entries of held-out cells are hidden, zeros included. Peers are tuned on training cells and give a mean; the
size of a negative binomial around it is fitted for each gene on validation cells ("+ NB"). All laws are scored alike:
deviance, RMSE of the mean; log1p MSE of ``expm1 E[log(1 + x)]``; CRPS, energy distance and error of gene-gene
correlations of draws; log score. ``deciles``: molecules over predicted molecules of hidden entries, by tenths of the
predicted mean; ``genes``: by tenths of the genes, fewest training molecules first. ``giants``: draws above three times
the gene's training maximum, in 100,000 (expected under the law); ``real giants``: the same of the hidden counts.
``shares``: see :func:`shares`; the row ``network alone`` is the default without its blend (docs/MATHS.md 5.10).
``sigmas``: how many standard errors of the paired difference over cells a row is behind the first.

Genes are chosen by analytic Pearson residuals of all cells, so the rarest are those with luck in the held-out cells:
the row gene mean x depth shows by how much. ``--model LABEL=FOLDER`` scores a trained model of the same store too.

    python benchmarks/defaults.py page benchmarks/results/defaults_baron.json

prints the tables of results as Markdown: mean (standard deviation) over the seeds, and ``sigmas`` of each seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import anndata as ad
import numpy as np
import torch
from scipy import stats

from distdiff import component, config, experiment, metrics
from distdiff.baselines import Baseline
from distdiff.data.ingest.shard import shard
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.process._laws import nb_mean_log1p, nb_nll
from distdiff.rng import numpy_generator
from distdiff.sampling import predictor
from distdiff.types import Cells

PEERS: dict[str, dict[str, Any]] = {
    "gene mean x depth": {"kind": "gene_mean", "depth": True},
    "kNN": {"kind": "knn"},
    "PCA": {"kind": "pca"},
    "ridge": {"kind": "ridge"},
    "NMF": {"kind": "nmf"},
    "MAGIC": {"kind": "magic"},
    "scVI": {"kind": "scvi"},
}
SHOWN = ("deviance", "log1p MSE", "RMSE", "CRPS", "log score", "energy", "correlation")
BEHIND = ("deviance", "CRPS")
"""Scores whose ``sigmas`` a page shows."""

TAILS = ("deciles", "giants", "real giants")
"""What a page tells of the default alone."""

DRAWS = 10
SIZES = np.linspace(-5, 7, 49)
"""Logarithms of the sizes that a peer chooses from, for each gene."""

Law = tuple[np.ndarray, np.ndarray]
"""Mean and log size of every entry, ``[b g]``."""


def store_of(data: Path, genes: int, cells: int, seed: int, folder: Path) -> CountStore:
    """A store of at most so many cells, and of the most variable genes that ten cells have."""
    import scanpy as sc

    counts = ad.read_h5ad(data)
    some = np.random.default_rng(0).permutation(counts.n_obs)[:cells]
    counts = counts[np.sort(some)].copy()
    sc.pp.filter_genes(counts, min_cells=10)
    sc.experimental.pp.highly_variable_genes(counts, n_top_genes=genes, flavor="pearson_residuals")
    torch.set_num_threads(1)  # numba's parallel loops, which scanpy uses, raised it
    counts = counts[:, counts.var["highly_variable"]].copy()
    counts.write_h5ad(folder / data.name)
    store = folder / f"{data.stem}{seed}.zarr"
    shard([folder / data.name], store, seed=seed, workers=0, progress=False)
    return CountStore.open(store)


def trained(store: CountStore, folder: Path, words: list[str], seed: int) -> tuple[Model, float, int]:
    """The model of the config ``default``, the CPU seconds it took and the cells it saw."""
    own = [f"data.store={store.path}", f"train.out={folder}", f"train.seed={seed}"]
    quiet = ["evaluate.enabled=false", "tracking.enabled=false", "train.resume=never"]
    began = time.process_time()
    outcome = experiment.train(config.load("default", [*own, *quiet, *words]))
    return Model.load(outcome.model), time.process_time() - began, int(outcome.progress.history[-1]["cells"])


class Hidden:
    """Cells of a split, a share of their entries hidden."""

    def __init__(self, store: CountStore, split: str, seed: int, rate: float = 0.5) -> None:
        self.cells = store.cells(store.rows(split))
        self.truth = self.cells.counts.numpy()
        self.hidden = mcar(self.truth.shape, rate, numpy_generator(seed, "defaults", split))
        self.observed = torch.from_numpy(~self.hidden)
        self.erased = Cells(torch.where(self.observed, self.cells.counts, 0.0), self.cells.labels, self.cells.rows)

    @torch.no_grad()
    def law(self, model: Model, *, blend: bool = True) -> Law:
        """The model's, by one call; without the blend, the network's alone."""
        process: Any = model.process
        p = self.observed.float()
        eta = predictor(process, model.denoiser, self.cells.labels)(self.erased.counts, p)
        if blend and model.blend is not None:
            eta = model.blend.into(eta, self.erased.counts, self.observed, self.cells.labels)
        return process.lost(eta, p).numpy(), process.log_size(eta).numpy()

    def mean(self, peer: Baseline) -> np.ndarray:
        return np.maximum(peer.impute(self.erased, self.observed).mean.numpy(), 1e-6)


def sizes(mean: np.ndarray, of: Hidden) -> np.ndarray:
    """Log size of each gene ``[g]`` around a mean: the most likely one; all genes together count as one cell."""
    truth, found = torch.from_numpy(of.truth), []
    for size in SIZES:
        nll = nb_nll(truth, torch.from_numpy(mean), torch.tensor(size, dtype=torch.float32)).numpy()
        found.append(np.where(of.hidden, nll, 0.0).sum(0))
    total = np.array(found)
    return SIZES[(total + total.sum(1, keepdims=True) / total.shape[1] / len(of.truth)).argmin(0)].astype(np.float32)


def score(law: Law, of: Hidden, store: CountStore, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores of a law, and the parts of the cells of those that are means over cells."""
    (mean, log_size), truth, hidden = law, of.truth, of.hidden
    rng, one = np.random.default_rng(seed), metrics.once(len(truth))
    size = np.exp(log_size)
    rate = rng.gamma(np.broadcast_to(size, (DRAWS, *mean.shape))) * (mean / size)
    drawn = np.where(hidden, rng.poisson(rate), truth).astype(np.float32)
    m, k = torch.from_numpy(mean), torch.from_numpy(log_size)
    log1p = torch.expm1(nb_mean_log1p(torch.zeros(()), m, k, torch.ones(()))).numpy()
    filled, nll = np.where(hidden, mean, truth), nb_nll(*(torch.from_numpy(v) for v in (truth, mean, log_size))).numpy()
    cells = {
        "deviance": metrics.poisson_deviance(truth, hidden, filled),
        "log1p MSE": metrics.log1p_squared_error(truth, hidden, np.where(hidden, log1p, truth)),
        "MSE": metrics.squared_error(truth, hidden, filled),
        "CRPS": metrics.crps(truth, hidden, drawn),
        "log score": np.where(hidden, nll, 0.0).sum(1),
    }
    found: dict[str, Any] = {name: float(part.sum() / hidden.sum()) for name, part in cells.items()}
    found["RMSE"] = found.pop("MSE") ** 0.5
    energy = [metrics.energy_distance(truth, hidden, draw, one)[0] for draw in drawn[:3]]
    errors = [metrics.correlation_error(np.log1p(truth), np.log1p(draw), one)[0] for draw in drawn[:3]]
    found |= {"energy": float(np.mean(energy)), "correlation": float(np.mean(errors))}

    t, m = truth[hidden], mean[hidden]
    tenths = np.array_split(np.argsort(m, kind="stable"), 10)
    found["deciles"] = [round(float(t[i].sum() / m[i].sum()), 3) for i in tenths]
    found["molecules"] = [int(t[i].sum()) for i in tenths]
    genes = store.statistics()
    by_gene = [np.where(hidden, values, 0).sum(0) for values in (truth, mean)]
    tenths = np.array_split(np.argsort(genes["mean"], kind="stable"), 10)
    found["genes"] = [round(float(by_gene[0][i].sum() / by_gene[1][i].sum()), 3) for i in tenths]
    limit = np.broadcast_to(3 * np.maximum(genes["max"], 1), truth.shape)[hidden]
    s = size[hidden].astype(np.float64)
    found["giants"] = float(1e5 * stats.nbinom.sf(limit, s, s / (s + m)).mean())
    found["real giants"] = float(1e5 * (t > limit).mean())
    return found, cells


def behind(cells: dict[str, dict[str, np.ndarray]], entries: int) -> dict[str, dict[str, float]]:
    """Row -> score -> standard errors of the paired difference by which it is behind the first row."""
    found: dict[str, dict[str, float]] = {row: {} for row in cells}
    for name in next(iter(cells.values())):
        first = min(cells, key=lambda row: cells[row][name].sum())
        for row, parts in cells.items():
            found[row][name] = in_errors(parts[name] - cells[first][name])
    return found


def in_errors(change: np.ndarray) -> float:
    """Mean of a paired difference over cells ``[b]`` in its standard errors."""
    noise = change.std(ddof=1) / len(change) ** 0.5
    return round(float(change.mean() / noise), 2) if noise > 0 else 0.0


def shares(model: Model, store: CountStore, seed: int) -> dict[str, Any]:
    """By the share of hidden entries: deviance with and without the blend, and by how many errors it is better."""
    found = {}
    for rate in (0.1, 0.5, 0.9, 0.98):
        test = Hidden(store, "test", seed, rate)
        means = [test.law(model, blend=blend)[0] for blend in (True, False)]
        own, alone = (
            metrics.poisson_deviance(test.truth, test.hidden, np.where(test.hidden, mean, test.truth)) for mean in means
        )
        gain, n = alone - own, test.hidden.sum()
        error = gain.std(ddof=1) / len(gain) ** 0.5
        found[str(rate)] = [float(own.sum() / n), float(alone.sum() / n), float(gain.mean() / max(error, 1e-12))]
    return found


def table(
    data: Path, genes: int, cells: int, seed: int, words: list[str], models: dict[str, str], peers: list[str]
) -> dict[str, Any]:
    """All rows of one data set and seed."""
    with tempfile.TemporaryDirectory() as name:
        store = store_of(data, genes, cells, seed, Path(name))
        test, held_out = Hidden(store, "test", seed), Hidden(store, "val", seed)
        laws: dict[str, Law] = {}
        model, seconds, seen = trained(store, Path(name) / "run", words, seed)
        laws["default"] = test.law(model)
        laws["network alone"] = test.law(model, blend=False)
        laws |= {label: test.law(Model.load(folder.format(data=data.stem))) for label, folder in models.items()}
        for label in peers:
            peer = component.build(Baseline, PEERS[label])
            with contextlib.redirect_stderr(None):
                peer.fit(store, store.rows("train"))
            mean = test.mean(peer)
            laws[f"{label} + NB"] = mean, np.broadcast_to(sizes(held_out.mean(peer), held_out), mean.shape).copy()
        scored = {row: score(law, test, store, seed) for row, law in laws.items()}
        about: dict[str, Any] = {
            "cells": store.n_cells,
            "genes": len(store.genes),
            "cpu_seconds": round(seconds),
            "cells_seen": seen,
        }
        about |= {"blend": model.info.get("blend", {}), "shares": shares(model, store, seed)}
    sigmas = behind({row: parts for row, (_, parts) in scored.items()}, int(test.hidden.sum()))
    return {**about, "rows": {row: {**found, "sigmas": sigmas[row]} for row, (found, _) in scored.items()}}


def page(results: dict[str, Any]) -> str:
    """Tables of results, a row a method, as Markdown."""
    lines = []
    for name, runs in results["sets"].items():
        heads = [head for score in SHOWN for head in (score, "behind")[: 1 + (score in BEHIND)]]
        lines += [f"| {name}, {runs[0]['cells']:,} cells | " + " | ".join(heads) + " |"]
        lines += ["| --- |" + " ---: |" * len(heads)]
        for row in runs[0]["rows"]:
            found = [run["rows"][row] for run in runs]
            cells = []
            for score in SHOWN:
                values = [r[score] for r in found]
                digits = 3 if np.mean(values) > 1 else 4
                spread = f" ({np.std(values, ddof=1):.{digits}f})" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.{digits}f}{spread}")
                if score in BEHIND:
                    cells.append(" ".join(f"{r['sigmas'][score]:.1f}" for r in found))
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        seconds = ", ".join(str(run["cpu_seconds"]) for run in runs)
        weights = "; ".join(" + ".join(f"{run['blend'].get(of, 0):.2f} {of}" for of in ("pca", "nmf")) for run in runs)
        lines += ["", f"CPU seconds of training: {seconds}. In the blend: {weights}.", ""]
        lines += [*(f"{of}: {[run['rows']['default'][of] for run in runs]}" for of in TAILS), "", *tenths(runs)]
    return "\n".join(lines)


def tenths(runs: list[dict[str, Any]]) -> list[str]:
    """Molecules over predicted molecules by tenths of the predicted mean, over all seeds; and how many are in tenths
    that are off by more than 5 %."""  # fmt: skip
    lines = [
        "| | lowest tenth | "
        + " | ".join(str(i) for i in range(2, 10))
        + " | highest | molecules in tenths off by > 5 % |"
    ]
    lines += ["| --- |" + " ---: |" * 11]
    for row in runs[0]["rows"]:
        found = np.array([run["rows"][row]["molecules"] for run in runs], dtype=float)
        predicted = found / [run["rows"][row]["deciles"] for run in runs]
        ratio = found.sum(0) / predicted.sum(0)
        off = found.sum(0)[np.abs(ratio - 1) > 0.05].sum() / found.sum()
        lines.append(f"| {row} | " + " | ".join(f"{r:.2f}" for r in ratio) + f" | {off:.1%} |")
    chance = 1 / np.sqrt(np.sum([run["rows"]["default"]["molecules"] for run in runs], axis=0))
    return [*lines, "| chance alone, default | " + " | ".join(f"± {c:.2f}" for c in chance) + " | |", ""]


def main() -> None:
    if sys.argv[1:2] == ["page"]:
        print("\n".join(page(json.loads(Path(file).read_text())) for file in sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="h5ad files with raw counts")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--cells", type=int, default=10_000, help="cells of a larger file that are taken, by chance")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], help="changes of the config: key=value")
    parser.add_argument(
        "--model", nargs="*", default=[], help="LABEL=FOLDER of a trained model; {data}: the file's name"
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)  # what the numbers of seconds mean; libraries of the peers may have changed it
    began, found = time.perf_counter(), {}
    models = {word.partition("=")[0]: word.partition("=")[2] for word in a.model}
    for data in a.data:
        seeds = range(a.first_seed, a.first_seed + a.seeds)
        runs = [table(data, a.genes, a.cells, seed, a.set, models, a.peers) for seed in seeds]
        found[data.stem] = runs
        for run in runs:
            print(
                f"\n{data.stem}: {run['cells']} cells x {run['genes']} genes, default took {run['cpu_seconds']} CPU s"
            )
            for row, r in run["rows"].items():
                numbers = " ".join(f"{r[score]:8.4f}" for score in SHOWN)
                print(f"  {row:<24}{numbers}  giants {r['giants']:.2f} ({r['real giants']:.2f})  {r['deciles']}")
        _record.write(a.out, began, {"sets": found})


if __name__ == "__main__":
    main()
