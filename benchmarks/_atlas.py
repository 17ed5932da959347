"""Made atlases for the loader benchmark: negative binomial counts in an h5ad, written piece by piece.

    python benchmarks/_atlas.py A WORK/a.h5ad [--cells 20000 --genes 2000]

Depths are log-normal, gene means fall as a power of their rank, 12 cell types differ in all genes, 50 samples follow
each other (as studies do in an atlas) and differ in depth and in their mixture of types. ``X`` is float32 CSR without
compression, in the chunks that scanpy would give it. A piece depends on the seed and its number only. Genes with a mean
above ``SPARSE`` are gamma-Poisson entry by entry; below that the gamma would change nothing, so molecules are thrown
at genes, which costs as much as there are molecules. Beside the file: its panel of 2,000 genes with the largest
variance / mean (``.panel.npy``, ``.panel.txt``), and facts (``.json``).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import optimize, sparse

ATLASES = {"A": {"cells": 300_000, "genes": 2_000, "density": 0.093}, "B": {"cells": 100_000, "genes": 20_000,
           "density": 0.088}}  # fmt: skip
SAMPLES, TYPES, SHAPE, SPARSE, PIECE, PANEL = 50, 12, 2.0, 0.03, 1_000, 2_000


def design(genes: int, density: float, seed: int) -> dict[str, np.ndarray]:
    """Means of each type at depth 1 ``[TYPES, genes]``, log depths and mixtures of the samples, panel of genes."""
    rng = np.random.default_rng([seed, 1])
    base = (np.arange(genes) + genes / 100) ** -1.2
    means = rng.permutation(base) * np.exp(rng.normal(0, 0.7, (TYPES, genes)))
    means /= means.sum(1, keepdims=True)
    depth, spread = rng.normal(0, 0.25, SAMPLES), 0.45
    mixture = rng.dirichlet(np.full(TYPES, 0.7), SAMPLES)
    trial = np.exp(rng.normal(0, np.hypot(0.25, spread), 200))[:, None] * means[rng.integers(0, TYPES, 200)]

    def excess(log_depth: float) -> float:
        return float(1 - ((SHAPE / (SHAPE + np.exp(log_depth) * trial)) ** SHAPE).mean() - density)

    whole = optimize.brentq(excess, 0, 15)
    means *= np.exp(whole)
    first, second = np.exp(np.array([0.5, 2]) * (0.25**2 + spread**2))  # moments of the depth
    fano = (1 + 1 / SHAPE) * second * (means**2).mean(0) / (first * means.mean(0)) - first * means.mean(0)
    panel = np.sort(np.argsort(-fano)[:PANEL])  # the 2,000 of largest variance / mean
    return {"means": means, "depth": depth, "spread": np.array(spread), "mixture": mixture, "panel": panel}


def piece(made: dict[str, np.ndarray], samples: np.ndarray, seed: int, number: int) -> tuple[Any, np.ndarray]:
    """Counts of the cells of one piece, float32 CSR, and their types."""
    rng = np.random.default_rng([seed, 2, number])
    means, n = made["means"], len(samples)
    kind = (rng.random(n)[:, None] > np.cumsum(made["mixture"], 1)[samples]).sum(1).clip(max=TYPES - 1)
    depth = np.exp(made["depth"][samples] + rng.normal(0, float(made["spread"]), n))
    many = np.flatnonzero(means.mean(0) > SPARSE)
    rate = rng.standard_gamma(SHAPE, (n, len(many))) * (means[:, many][kind] * (depth / SHAPE)[:, None])
    high = rng.poisson(rate)
    row, column = np.nonzero(high)
    rows, columns, values = [row], [many[column]], [high[row, column]]
    few = np.setdiff1d(np.arange(means.shape[1]), many)
    for k in range(TYPES if len(few) else 0):
        cells = np.flatnonzero(kind == k)
        ends = np.cumsum(means[k, few])
        thrown = rng.poisson(depth[cells] * ends[-1])
        rows.append(np.repeat(cells, thrown))
        hit = np.searchsorted(ends, rng.random(thrown.sum()) * ends[-1])
        columns.append(few[np.minimum(hit, len(few) - 1)])
        values.append(np.ones(thrown.sum(), np.int64))
    place = np.concatenate(rows), np.concatenate(columns)
    counts = sparse.coo_matrix((np.concatenate(values).astype(np.float32), place), (n, means.shape[1])).tocsr()
    counts.sort_indices()
    return counts, kind


def write(path: Path, cells: int, genes: int, density: float, seed: int = 0) -> dict[str, Any]:
    """Write an atlas (whole or not at all) with its panel of genes beside it; facts about it."""
    began = time.perf_counter()
    made = design(genes, density, seed)
    samples = np.arange(cells) * SAMPLES // cells
    indptr, kinds, at, total = np.zeros(cells + 1, np.int64), np.empty(cells, np.int64), 0, 0.0
    temporary = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(temporary, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = file.create_group("X")
        shape = np.array([cells, genes])
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        expected = int(cells * genes * density)  # h5py derives the chunks from it
        data = x.create_dataset("data", (expected,), np.float32, maxshape=(None,))
        indices = x.create_dataset("indices", (expected,), np.int32, maxshape=(None,))
        for number, first in enumerate(range(0, cells, PIECE)):
            last = min(first + PIECE, cells)
            counts, kinds[first:last] = piece(made, samples[first:last], seed, number)
            end = at + counts.nnz
            if end > len(data):
                data.resize(end, 0)
                indices.resize(end, 0)
            data[at:end], indices[at:end] = counts.data, counts.indices
            indptr[first + 1 : last + 1] = at + counts.indptr[1:]
            at, total = end, total + float(counts.data.sum(dtype=np.float64))
        data.resize(at, 0)
        indices.resize(at, 0)
        x.create_dataset("indptr", data=indptr.astype(np.int32 if at < 2**31 else np.int64), maxshape=(None,))
        names = [f"gene{i}" for i in range(genes)]
        obs = pd.DataFrame({
            "sample": pd.Categorical.from_codes(samples, [f"sample{i:02}" for i in range(SAMPLES)]),
            "cell_type": pd.Categorical.from_codes(kinds, [f"type{i:02}" for i in range(TYPES)]),
        }, index=[f"cell{i}" for i in range(cells)])  # fmt: skip
        ad.io.write_elem(file, "obs", obs)
        ad.io.write_elem(file, "var", pd.DataFrame(index=names))
        for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            ad.io.write_elem(file, name, {})
    temporary.rename(path)
    np.save(path.with_suffix(".panel.npy"), made["panel"])
    path.with_suffix(".panel.txt").write_text("".join(f"gene{i}\n" for i in made["panel"]))
    facts = {"cells": cells, "genes": genes, "seed": seed, "density": at / cells / genes, "nnz": at,
             "counts a cell": total / cells, "bytes": path.stat().st_size,
             "seconds": time.perf_counter() - began}  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ATLASES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--cells", type=int)
    parser.add_argument("--genes", type=int)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    sizes = ATLASES[a.name] | {k: v for k, v in (("cells", a.cells), ("genes", a.genes)) if v}
    print(json.dumps(write(a.path, seed=a.seed, **sizes)))


if __name__ == "__main__":
    main()
