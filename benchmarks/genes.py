"""Which rule chooses genes best? Eight rules on real counts, by four measures.

    python benchmarks/genes.py --data-dir DIR --out benchmarks/results/genes.json

Every rule sees the same 90 % of the molecules of all cells (binomial thinning, as in benchmarks/denoise.py). Of its
1,000 and 2,000 genes are told:

* ``markers``: how many of a declared list (`SETS`) are among them, and which are not;
* ``few_cells``: genes that stand on one or two cells: without their two largest counts, variance / mean is below 1.1;
* ``ari``: Leiden clusters (log1p CP10k of the cell's whole depth, 50 principal components, 15 neighbours, resolution 1)
  against the data's cell types, mean over three seeds;
* ``explained``: the other 10 % of the molecules of *all* genes, predicted for each cell by the molecules of its 15
  neighbours in these components, shrunk to the gene's mean: share of the Poisson deviance of gene mean x depth that is
  gone. It asks what the chosen genes know of the cell, and needs no label.

``ari`` and ``explained`` are of 1,000 genes, on at most ``--cells`` cells.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _record
import numpy as np
import scanpy as sc
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from distdiff.data.ingest.choose import choose
from distdiff.data.store.moments import Moments
from distdiff.rng import numpy_generator

SETS = {
    "pbmc3k": (
        "pbmc3k_10x_human.h5ad",
        "CD3E MS4A1 CD14 IL7R CD8A CCR7 LDHB CD79A LYZ S100A8 GNLY NKG7 FCGR3A MS4A7 FCER1A CST3 PPBP",
    ),
    "baron": (
        "baron_pancreas_human.h5ad",
        "INS GCG SST PPY GHRL IAPP ARX PDX1 MAFA HHEX KRT19 SPP1 CPA1 PRSS1 REG1A COL1A1 PDGFRB RGS5 VWF PECAM1 PLVAP "
        "CD68 C1QA TPSAB1 CPA3 CD3D TRAC PLP1 SOX10",
    ),
    "mca": (
        "mca_6tissue_mouse.h5ad",
        "Sftpc Ager Scgb1a1 Cd79a Cd3e Cd8b1 Jchain Ear2 C1qa S100a8 Fabp1 Fabp6 Mki67 Stmn2 Fabp7 Alb Hba-a1 Pecam1 "
        "Col1a1 Umod Slc34a1 Prl3d1 Spp1 Gjb3 Siglech Dcn Neurod6 Olfm4 Muc2 Chga",
    ),
}
WEIGHTS = (5, 15, 50, 150)
"""Cells of mean depth that the gene's mean counts as, beside 15 neighbours; each rule gets its best."""

Score = Callable[[sparse.csr_matrix], np.ndarray]


def fano(counts: sparse.csr_matrix, leave_out: int = 0) -> np.ndarray:
    """Variance / mean without each gene's largest counts."""
    by_gene = counts.tocsc()
    gene = np.repeat(np.arange(counts.shape[1]), np.diff(by_gene.indptr))
    order = np.lexsort((-by_gene.data, gene))
    rank = np.arange(len(gene)) - by_gene.indptr[gene]
    x = np.where(rank < leave_out, 0, by_gene.data[order].astype(np.float64))
    n = counts.shape[0] - leave_out
    mean, square = (np.bincount(gene, v, minlength=counts.shape[1]) / n for v in (x, x * x))
    return np.divide(square - mean**2, mean, out=np.full(len(mean), -1.0), where=mean > 0)


def clipped_fano(counts: sparse.csr_matrix) -> np.ndarray:
    """Variance / mean of counts cut sqrt(n) standard deviations of a Poisson law above the mean."""
    sums = Moments.of(counts)
    cut = counts.astype(np.float64)
    cut.data = np.minimum(cut.data, (sums.mean + np.sqrt(sums.n * sums.mean))[cut.indices])
    return fano(cut)


def pearson(counts: sparse.csr_matrix) -> np.ndarray:
    """Variance of analytic Pearson residuals clipped at sqrt(n), as published (Lause et al. 2021), by scanpy."""
    some = np.asarray(counts.sum(0)).ravel() > 0
    found = sc.experimental.pp.highly_variable_genes(
        AnnData(counts[:, some].astype(np.float32)),
        flavor="pearson_residuals",
        theta=100.0,
        n_top_genes=1,
        inplace=False,
    )
    out = np.full(counts.shape[1], -1.0)
    out[some] = found["residual_variances"]
    return out


def deviance(counts: sparse.csr_matrix) -> np.ndarray:
    """Binomial deviance from a constant share of each cell's molecules (Townes et al. 2019)."""
    depth, total = (np.asarray(counts.sum(axis), np.float64).ravel() for axis in (1, 0))
    x, n = counts.data.astype(np.float64), np.repeat(depth, np.diff(counts.indptr))
    rest = np.maximum(n - x, 1e-300)
    terms = x * np.log(x / n) + np.where(n > x, rest * np.log(rest / n), 0.0)
    share = np.where(total > 0, total / total.sum(), 0.5)
    return (
        2
        * (
            np.bincount(counts.indices, terms, minlength=len(total))
            - total * np.log(share)
            - (depth.sum() - total) * np.log1p(-share)
        )
        * (total > 0)
    )


def best(score: Score, counts: sparse.csr_matrix, top: int) -> np.ndarray:
    return np.sort(np.argsort(-score(counts), kind="stable")[:top])


def named(measure: str, counts: sparse.csr_matrix, top: int) -> np.ndarray:
    return choose(counts, f"{measure}:{top}")


RULES: dict[str, Callable[[sparse.csr_matrix, int], np.ndarray]] = {
    "fano": partial(named, "fano"),
    "fano without 3 cells": partial(best, partial(fano, leave_out=3)),
    "fano, clipped": partial(best, clipped_fano),
    "Pearson residuals": partial(best, pearson),
    "Pearson residuals without 2 cells (hvg)": partial(named, "hvg"),
    "binomial deviance": partial(best, deviance),
    "seurat_v3": partial(named, "seurat_v3"),
    "top": partial(named, "top"),
}


def embed(counts: sparse.csr_matrix, genes: np.ndarray) -> AnnData:
    """Principal components and neighbours of log1p CP10k of some genes."""
    data = AnnData(counts.astype(np.float32))
    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    data = data[:, genes].copy()
    sc.pp.pca(data, n_comps=50, random_state=0)
    sc.pp.neighbors(data, n_neighbors=15, random_state=0)
    return data


def ari(data: AnnData, labels: np.ndarray) -> float:
    """Adjusted Rand index of Leiden clusters, mean over three seeds."""
    known, found = labels != "", []
    for seed in range(3):
        sc.tl.leiden(data, resolution=1.0, flavor="igraph", n_iterations=2, directed=False, random_state=seed)
        found.append(adjusted_rand_score(labels[known], data.obs["leiden"][known]))
    return float(np.mean(found))


def explained(data: AnnData, train: sparse.csr_matrix, test: sparse.csr_matrix) -> float:
    """Share of the deviance of held-out molecules that the neighbours' molecules explain."""
    graph = (data.obsp["distances"] > 0).astype(np.float64).tocsr()
    depth, mean = (np.asarray(train.sum(axis), np.float64).ravel() for axis in (1, 0))
    share, pooled, held = mean / mean.sum(), graph @ train, np.asarray(test.sum(1), np.float64).ravel()
    losses = np.zeros(1 + len(WEIGHTS))
    for start in range(0, len(depth), 512):
        rows = slice(start, start + 512)
        near, truth = pooled[rows].toarray(), test[rows].tocoo()
        where, of = (truth.row, truth.col), truth.data
        x_log_x = 2 * (of * np.log(of)).sum()  # the sums of truth and of what is expected are the same
        for which, weight in enumerate((np.inf, *WEIGHTS)):
            part = share if np.isinf(weight) else (near + weight * depth.mean() * share)
            part = np.broadcast_to(part / part.sum(-1, keepdims=True), near.shape)
            losses[which] += x_log_x - 2 * (of * np.log(held[rows][truth.row] * part[where])).sum()
    return float(1 - losses[1:].min() / losses[0])


def measure(folder: Path, name: str, cells: int, rules: list[str]) -> dict[str, Any]:
    """One row a rule and number of genes."""
    file, markers = SETS[name]
    data = read_h5ad(folder / file)
    whole = sparse.csr_matrix(data.X).astype(np.int64)
    train = whole.copy()
    train.data = numpy_generator(0, "genes").binomial(whole.data, 0.9)
    test = whole - train
    train.eliminate_zeros()
    names, wanted = np.array(data.var_names), markers.split()
    rows = np.sort(numpy_generator(0, "cells").permutation(whole.shape[0])[:cells])
    rows = rows[np.asarray(train[rows].sum(1)).ravel() > 0]
    labels = data.obs["cell_type"].astype(str).replace("nan", "").to_numpy()[rows]
    noise = fano(train, 2) < 1.1
    seen = np.asarray(train[rows].sum(0)).ravel() > 0  # a molecule in 10 % and none in 90 %: nobody could say
    out: dict[str, Any] = {}
    for rule in rules:
        for top in (1000, 2000):
            began = time.process_time()
            genes = RULES[rule](train, top)
            seconds = time.process_time() - began
            out[f"{rule}, {top}"] = row = {
                "markers": len(set(wanted) & set(names[genes])),
                "of": len(wanted),
                "missing": [m for m in wanted if m not in set(names[genes])],
                "few_cells": int(noise[genes].sum()),
                "molecules": round(float(train[:, genes].sum() / train.sum()), 3),
                "seconds": round(seconds, 2),
            }
            if top == 1000:
                near = embed(train[rows], genes)
                row["ari"] = round(ari(near, labels), 4)
                row["explained"] = round(explained(near, train[rows][:, seen], test[rows][:, seen]), 5)
            print(name, rule, top, row, flush=True)
    return {"cells": whole.shape[0], "cells_scored": len(rows), "rows": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the h5ad files of SETS")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    began = time.perf_counter()
    sets = {name: measure(a.data_dir, name, a.cells, a.rules) for name in a.sets}
    _record.write(a.out, began, {"sets": sets})


if __name__ == "__main__":
    main()
