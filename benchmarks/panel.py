"""Does the reliability that `distdiff.panel` expects of a completed gene come true in cells that nobody has seen?

    python benchmarks/panel.py --data-dir DIR --out benchmarks/results/panel.json [--sets baron pbmc3k] [--cells 100000]

A model is trained on the training cells of a store (60 % of the cells, 1,000 genes, ``--cells`` cells seen: minutes,
not the default's budget). Expected: from the validation cells (20 %), as `distdiff.panel` does. Real: from the test
cells (20 %), whose counts of the completed genes are known. Genes that fewer than 20 test cells show are left out of
rank correlations and means ("known" genes are left).

* ``10 folds``: one tenth of the genes after the other is what the panel lacks; every gene is completed once.
* ``10 folds, query at 30 %``: the molecules of the test cells are thinned to 30 %, and the expectation is made for
  that depth. ``not_thinned``: the same expectation from validation cells at their own depth.
* ``panel of 100``, ``panel of 300``: the genes with most molecules are the panel, all others are completed.

Agreement over genes: rank correlation of expected and real Pearson correlation, Spearman correlation and deviance
explained; mean of real less expected; share of test counts in their 95 % interval of 20 draws; and by verdict, what
became of the genes. ``halves``: rank correlation of the real scores in two random halves of the test cells, which says
how much of a disagreement is that a few hundred cells do not tell a gene's score better.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch
from anndata import read_h5ad
from scipy.stats import spearmanr

import distdiff
from distdiff.data.masks import gene_folds, thin
from distdiff.data.store.store import CountStore
from distdiff.heldout import answering
from distdiff.reliability import SCORES, agreed, agreement, gene_scores
from distdiff.rng import numpy_generator

SETS = {"baron": "baron_pancreas_human.h5ad", "pbmc3k": "pbmc3k_10x_human.h5ad"}
GENES, DRAWS = 1000, 20


def trained(folder: Path, file: Path, cells: int) -> tuple[CountStore, distdiff.Model, dict[str, Any]]:
    adata = read_h5ad(file)
    distdiff.shard(adata, folder / "atlas.zarr", genes=f"hvg:{GENES}", split=(0.6, 0.2, 0.2), progress=False)
    store, began = CountStore.open(folder / "atlas.zarr"), time.process_time()
    model = distdiff.train(
        store, out=folder / "run", cells=cells, evaluate={"enabled": False}, tracking={"enabled": False}, progress=False
    )
    about = {
        "cells": {name: len(store.rows(name)) for name in ("train", "val", "test")}, "genes": len(store.genes),
        "cells_seen": cells, "train_cpu_seconds": round(time.process_time() - began),
        "blend": 0.0 if model.blend is None else model.blend.weight,
    }  # fmt: skip
    return store, model, about


def rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: rounded(v) for k, v in tree.items()}
    return round(tree, 4) if isinstance(tree, float) else tree


def measure(file: Path, cells: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        store, model, about = trained(Path(name), file, cells)
        imputer, rng = answering(model, store, model.imputer()), numpy_generator(seed, "panel-benchmark")
        atlas, query = (store.read(store.rows(split)) for split in ("val", "test"))
        shallow = thin(query, np.full(query.shape[0], 0.3), rng)
        tenths = gene_folds(len(store.genes), 10, rng)
        order = np.argsort(-store.statistics()["mean"], kind="stable")
        settings = {"10 folds": (query, tenths), "10 folds, query at 30 %": (shallow, tenths)}
        for size in (100, 300):
            fold = np.zeros(len(order), dtype=np.int64)
            fold[order[:size]] = -1
            settings[f"panel of {size}"] = (query, fold)
        rows = {}
        for label, (cells_of, fold) in settings.items():
            began = time.process_time()
            table = agreement(imputer, store.genes, atlas, cells_of, fold, draws=DRAWS, seed=seed)
            row = agreed(table) | {"cpu_seconds": round(time.process_time() - began, 1)}
            row["halves"] = halves(imputer, cells_of, table, fold, seed)
            if "30 %" in label:
                row["not_thinned"] = not_thinned(imputer, atlas, table, fold, seed)
            rows[label] = rounded(row)
            print(file.name, label, rows[label], flush=True)
    return {**about, "settings": rows}


def halves(imputer: Any, query: Any, table: Any, fold: np.ndarray, seed: int) -> dict[str, float]:
    """Rank correlation over genes of the scores in two random halves of the cells."""
    order = numpy_generator(seed, "panel-halves").permutation(query.shape[0])
    both = [scored(imputer, query[np.sort(part)], fold, seed) for part in np.array_split(order, 2)]
    known = ((table["reliability"] != "unknown") & (table["cells"] >= 20)).to_numpy()
    return {name: float(spearmanr(*(part[name][known] for part in both), nan_policy="omit")[0]) for name in SCORES}


def scored(imputer: Any, counts: Any, fold: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Scores of all genes, in the order of the folds."""
    parts = [
        gene_scores(imputer, counts, fold != k, np.flatnonzero(fold == k), draws=2, resamples=1, seed=seed)
        for k in range(int(fold.max()) + 1)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in SCORES}


def not_thinned(imputer: Any, atlas: Any, table: Any, fold: np.ndarray, seed: int) -> dict[str, float]:
    """Mean of real less expected, where the expectation is from cells at their own depth."""
    before = scored(imputer, atlas, fold, seed)
    known = ((table["reliability"] != "unknown") & (table["cells"] >= 20)).to_numpy()
    return {name: float((table[name].to_numpy() - before[name])[known].mean()) for name in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the h5ad files of SETS")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--cells", type=int, default=100_000, help="cells that training sees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    sets = {name: measure(a.data_dir / SETS[name], a.cells, a.seed) for name in a.sets}
    _record.write(a.out, began, {"draws": DRAWS, "seed": a.seed, "sets": sets})


if __name__ == "__main__":
    main()
