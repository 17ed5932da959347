"""Steps, guidance and attrition of imputation, as in the paper's appendix E.5, on one trained model.

    python benchmarks/sweeps.py --out benchmarks/results/sweeps.json [--data FILE.h5ad --cell-type KEY --genes hvg:1000]

The published recipe (cosine, mean alone, RePaint) and ours (conditional; attrition is RePaint's alone, as evidence is
never thinned) on held-out cells with 40 % of all entries hidden, zeros included. Writes JSON and, beside it, a figure.
``distdiff benchmark sweeps`` is the same as a grid, on any store, with standard errors.
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
from quality import train

from distdiff import metrics, quickstart
from distdiff.data.ingest.shard import shard
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.rng import numpy_generator
from distdiff.types import Cells

SWEEPS: dict[str, tuple[Any, ...]] = {
    "steps": (1, 2, 5, 10, 20, 30),
    "guidance": (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0),
    "attrition": (0.0, 0.005, 0.01, 0.02, 0.05),
}
SCORES = ("rmse", "spearman", "energy", "swd", "crps")


def score(imputer: Any, cells: Cells, hidden: np.ndarray, seed: int) -> dict[str, float]:
    observed, truth = torch.from_numpy(~hidden), cells.counts.numpy()
    erased = Cells(torch.where(observed, cells.counts, 0.0), cells.labels, cells.rows)
    drawn = imputer.impute(erased, observed, draws=2, seed=seed).draws.numpy()
    one, n = metrics.once(len(cells)), hidden.sum(1)
    directions = metrics.unit_directions(truth.shape[1], 500, numpy_generator(seed, "sweeps"))
    return {
        "rmse": float(np.sqrt(metrics.pooled(metrics.squared_error(truth, hidden, drawn[0]), n, one)[0])),
        "spearman": float(metrics.cell_mean(metrics.spearman(truth, hidden, drawn[0]), one)[0]),
        "energy": float(metrics.energy_distance(truth, hidden, drawn[0], one)[0]),
        "swd": float(metrics.sliced_wasserstein(np.log1p(truth), np.log1p(drawn[0]), one, directions)[0]),
        "crps": float(metrics.pooled(metrics.crps(truth, hidden, drawn), n, one)[0]),
    }


def draw(table: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    axes = figure.subplots(len(SWEEPS), len(SCORES))
    for row, sweep in zip(axes, SWEEPS, strict=True):
        for ax, key in zip(row, SCORES, strict=True):
            for name, sweeps in table.items():
                if sweep in sweeps:
                    rows = sweeps[sweep]
                    ax.plot([str(v) for v in rows], [r[key] for r in rows.values()], "o-", ms=3, label=name)
            ax.set_title(f"{key} by {sweep}", fontsize=9)
            ax.tick_params(labelsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _record.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cell-type", default="bulk_labels")
    parser.add_argument("--genes", default="all")
    parser.add_argument("--cells", type=int, default=51_200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), a.data
        if data is None:
            data = folder / "counts.h5ad"
            quickstart.demo_counts(data)
        shard(
            [data], folder / "atlas.zarr", genes=a.genes, labels=(a.cell_type,), seed=a.seed, workers=0, progress=False
        )
        common = {"store": folder / "atlas.zarr", "cells": a.cells, "seed": a.seed, "labels": (a.cell_type,)}
        alike = {"hidden": 0, "two_level": 0, "uniform": 1}
        published = train(out=folder / "p", process={"head": "mean"}, survival=alike, **common)
        ours = train(out=folder / "o", process={}, survival={}, **common)
        store = CountStore.open(folder / "atlas.zarr")
        cells = store.cells(store.rows("test"), (a.cell_type,))
        hidden = mcar(tuple(cells.counts.shape), 0.4, numpy_generator(a.seed, "sweeps"))
        makers = {
            "CountsDiff, RePaint (20 steps, guidance 1, no attrition unless swept)": {
                "steps": lambda v: published.imputer("repaint", steps=v),
                "guidance": lambda v: published.imputer("repaint", steps=20, guidance=v),
                "attrition": lambda v: published.imputer("repaint", steps=20, sigma=("rescale", v)),
            },
            "ours, conditional (1 step, guidance 1 unless swept)": {
                "steps": lambda v: ours.imputer(steps=v),
                "guidance": lambda v: ours.imputer(guidance=v),
            },
        }
        table: dict[str, Any] = {}
        for name_, sweeps in makers.items():
            for sweep, make in sweeps.items():
                rows = {str(v): score(make(v), cells, hidden, a.seed) for v in SWEEPS[sweep]}
                table.setdefault(name_, {})[sweep] = rows
                for value, row in rows.items():
                    print(f"{name_[:12]} {sweep} {value:<6}", {k: round(v, 4) for k, v in row.items()}, flush=True)
    _record.write(a.out, began, {"data": data.name, "table": table})
    draw(table, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
