"""Which test keeps its error rate? Genes without any difference between two real cell types, and with a known one.

    python benchmarks/de.py --data-dir DIR [--sets baron pbmc3k] [--pairs 2] [--seeds 3] [--denoised] [--donors]

**Null genes.** Cells of two types are sorted by depth and cut into blocks of 40; each block keeps as many cells of both
types as leaves the share of a type the same in every block. Then each gene is permuted by itself within each block: it
keeps its own law and its relation to depth, and has lost the type. ``ratio`` 0.6 thins all molecules of the first type
to 60 % (binomially), so that depths differ and rates do not. ``depth`` thins every cell. Genes with at least 20
molecules are counted.

**Genes with a difference.** A tenth of the genes is thinned by 1.5, and a tenth by 2, by turns in one type and in the
other, none of them above a thousandth of all molecules: the depths of the types stay as they are.

* ``ours``: `distdiff.de`. ``t``: scanpy's t-test on log1p CP10k; ``wilcoxon``: scanpy's on the same; ``wilcoxon_raw``:
  on the counts.
* ``--denoised``: Wilcoxon on the denoised means of a model that was trained on the same cells with half of the 2,000
  largest genes permuted (full depth, one seed).
* ``--donors``: pancreas of four donors; type against type with `distdiff.de(sample="donor")` and with cells as
  replicates, where null genes keep their donor: each gene is permuted between the cells of a donor.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path
from typing import Any

import _record
import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp

import distdiff

SETS = {
    "baron": ("baron_pancreas_human.h5ad", [("beta", "alpha"), ("ductal", "alpha")]),
    "pbmc3k": ("pbmc3k_10x_human.h5ad", [("CD4 T cells", "CD14+ Monocytes"), ("B cells", "CD14+ Monocytes")]),
}
BLOCK, LEAST = 40, 20


def null_cells(counts: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Counts without a difference between the types, and which cells are of the first."""
    order, share, rows, ends = np.argsort(counts.sum(1), kind="stable"), first.mean(), [], [0]
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        one, two = block[first[block]], block[~first[block]]
        most = min(len(one) / share, len(two) / (1 - share))
        chosen = [rng.permutation(one)[: round(most * share)], rng.permutation(two)[: round(most * (1 - share))]]
        rows += chosen
        ends.append(ends[-1] + sum(map(len, chosen)))
    at = np.concatenate(rows)
    found = counts[at]
    for start, stop in itertools.pairwise(ends):
        found[start:stop] = rng.permuted(found[start:stop], axis=0)
    return found, first[at]


def differing(
    counts: np.ndarray, first: np.ndarray, shares: dict[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Counts with genes thinned by a factor in one of the types, and the factor of each gene."""
    by = rng.choice([1.0, *shares], counts.shape[1], p=[1 - sum(shares.values()), *shares.values()])
    by[counts.sum(0) > 1e-3 * counts.sum()] = 1.0
    in_first = rng.random(len(by)) < 0.5
    p = np.where(first[:, None] == in_first, 1 / by, 1.0)
    return rng.binomial(counts, p), by


def tests(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """P-values of each test, in the order of the genes."""
    distdiff.de(adata, "side", groups=["one"], reference="two")
    found = {"ours": _p(adata)}
    log = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, copy=True), copy=True)
    for name, data, method in (
        ("t", log, "t-test"), ("wilcoxon", log, "wilcoxon"), ("wilcoxon_raw", adata, "wilcoxon"),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sc.tl.rank_genes_groups(data, "side", groups=["one"], reference="two", method=method)
        found[name] = _p(data)
    return found


def _p(adata: ad.AnnData) -> np.ndarray:
    table = sc.get.rank_genes_groups_df(adata, "one").set_index("names")
    return table.pvals.reindex(adata.var_names).fillna(1.0).to_numpy()


def made(counts: np.ndarray, first: np.ndarray) -> ad.AnnData:
    obs = pd.DataFrame(
        {"side": pd.Categorical(np.where(first, "one", "two"))}, index=[f"c{i}" for i in range(len(first))]
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def measure(cells: ad.AnnData, pair: tuple[str, str], depth: float, ratio: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, round(100 * depth), round(100 * ratio)])
    use = cells.obs.cell_type.isin(pair).to_numpy()
    counts, first = null_cells(
        cells.X[use].toarray().astype(np.int64), (cells.obs.cell_type[use] == pair[0]).to_numpy(), rng
    )
    counts = rng.binomial(counts, (depth * np.where(first, ratio, 1.0))[:, None])
    enough = counts.sum(0) >= LEAST
    counts, by = differing(counts, first, {1.5: 0.1, 2.0: 0.1}, rng)
    counts, by = counts[:, enough], by[enough]
    some = counts.sum(1) > 0
    adata = made(counts[some], first[some])
    began = time.process_time()
    found = tests(adata)
    row: dict[str, Any] = {
        "pair": pair, "depth": depth, "ratio": ratio, "seed": seed, "cells": [int(first.sum()), int((~first).sum())],
        "genes": int(enough.sum()), "cpu_s": round(time.process_time() - began, 2),
    }  # fmt: skip
    for name, p in found.items():
        row[name] = {
            "null": round(float((p[by == 1] < 0.05).mean()), 4),
            "null_p001": round(float((p[by == 1] < 0.001).mean()), 5),
            "power_1.5": round(float((p[by == 1.5] < 0.05).mean()), 3),
            "power_2": round(float((p[by == 2] < 0.05).mean()), 3),
        }
    return row


def denoised(cells: ad.AnnData, pair: tuple[str, str], seed: int) -> dict[str, Any]:
    """Wilcoxon and t on denoised means where half of the genes are permuted."""
    rng = np.random.default_rng(seed)
    use = cells.obs.cell_type.isin(pair).to_numpy()
    counts, first = cells.X[use].toarray().astype(np.int64), (cells.obs.cell_type[use] == pair[0]).to_numpy()
    counts = counts[:, np.argsort(-counts.sum(0))[:2000]]
    order = np.argsort(counts.sum(1), kind="stable")
    null = rng.permutation(2000) < 1000
    permuted, side = null_cells(counts, first, rng)
    # the genes that are not permuted come from cells of the same type and the same place in the order of depth
    mixed = permuted.copy()
    for value in (True, False):
        to = np.flatnonzero(side == value)[np.argsort(permuted[side == value].sum(1))]
        have = order[first[order] == value]
        mixed[np.ix_(to, ~null)] = counts[have[np.linspace(0, len(have) - 1, len(to)).round().astype(int)]][:, ~null]
    adata = made(mixed, side)
    model = distdiff.train(
        adata, cells=60_000, width=128, evaluate={"enabled": False}, tracking={"enabled": False}, progress=False
    )
    out = model.denoise(adata)
    scaled = ad.AnnData(out.layers["denoised"], obs=out.obs, var=out.var)
    at = null[[int(name[1:]) for name in out.var_names]]
    found = {"pair": pair, "ours": float((tests(adata)["ours"][null] < 0.05).mean())}
    sc.pp.normalize_total(scaled, target_sum=1e4)
    sc.pp.log1p(scaled)
    for method in ("wilcoxon", "t-test"):
        sc.tl.rank_genes_groups(scaled, "side", groups=["one"], reference="two", method=method)
        found[f"denoised {method}"] = float((_p(scaled)[at] < 0.05).mean())
    return found


def donors(cells: ad.AnnData, pair: tuple[str, str], depth: float, seed: int) -> dict[str, Any]:
    """Null genes that keep their donor, tested between types within donors."""
    rng = np.random.default_rng([seed, round(100 * depth)])
    use = cells.obs.cell_type.isin(pair).to_numpy()
    counts, first = cells.X[use].toarray().astype(np.int64), (cells.obs.cell_type[use] == pair[0]).to_numpy()
    donor = cells.obs.donor[use].to_numpy().astype(str)
    parts = [(*null_cells(counts[donor == d], first[donor == d], rng), d) for d in np.unique(donor)]
    side = np.concatenate([part[1] for part in parts])
    counts = rng.binomial(np.concatenate([part[0] for part in parts]), depth)
    enough = counts.sum(0) >= LEAST
    counts, by = differing(counts, side, {2.0: 0.1}, rng)
    counts = counts[:, enough]
    adata = made(counts, side)
    adata.obs["donor"] = np.concatenate([[part[2]] * len(part[1]) for part in parts])
    row: dict[str, Any] = {"pair": pair, "depth": depth, "seed": seed, "genes": int(enough.sum())}
    for name, options in (("donors", {"sample": "donor"}), ("cells", {})):
        distdiff.de(adata, "side", groups=["one"], reference="two", **options)
        p = _p(adata)
        row[name] = {
            "null": round(float((p[by[enough] == 1] < 0.05).mean()), 4),
            "power_2": round(float((p[by[enough] == 2] < 0.05).mean()), 3),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--denoised", action="store_true")
    parser.add_argument("--donors", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "de.json")
    given = parser.parse_args()
    began, rows, models, between = time.perf_counter(), [], [], []
    for name in given.sets:
        file, pairs = SETS[name][0], SETS[name][1][: given.pairs]
        cells = ad.read_h5ad(given.data_dir / file)
        for pair, depth, ratio, seed in itertools.product(pairs, (1.0, 0.3, 0.1), (1.0, 0.6), range(given.seeds)):
            rows.append({"set": name, **measure(cells, pair, depth, ratio, seed)})
            print(rows[-1], flush=True)
        if given.denoised:
            models.append({"set": name, **denoised(cells, pairs[0], 0)})
            print(models[-1], flush=True)
        if given.donors and "donor" in cells.obs:
            for pair, depth, seed in itertools.product(pairs, (1.0, 0.3), range(given.seeds)):
                between.append({"set": name, **donors(cells, pair, depth, seed)})
                print(between[-1], flush=True)
    summary = []
    for name, depth in itertools.product(given.sets, (1.0, 0.3, 0.1)):
        part = [row for row in rows if row["set"] == name and row["depth"] == depth]
        for test in ("ours", "t", "wilcoxon", "wilcoxon_raw"):
            null = [row[test]["null"] for row in part]
            summary.append({
                "set": name, "depth": depth, "test": test, "null": round(float(np.mean(null)), 4),
                "least": min(null), "most": max(null),
                **{k: round(float(np.mean([row[test][k] for row in part])), 3) for k in ("power_1.5", "power_2")},
            })  # fmt: skip
            print(summary[-1])
    _record.write(given.out, began, {"summary": summary, "denoised": models, "donors": between, "rows": rows})


if __name__ == "__main__":
    main()
