"""Quality of imputed draws against network calls: every head, sampler and spacing, and the published recipe.

    python benchmarks/quality.py --data FILE.h5ad --genes hvg:1000 --out benchmarks/results/quality_NAME.json
    python benchmarks/quality.py --data splat --out benchmarks/results/quality_splat.json

Two models of one network see the same cells in training: the published recipe (cosine, mean alone, all genes thinned
alike; imputes by RePaint with random rounding) and ours (mixture of survival patterns; imputes conditionally). Half of
the entries of held-out cells are hidden, zeros included; one draw fills them. Lower is better everywhere but in the
variance ratio, which should be 1. Writes JSON and, beside it, a figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch

from distdiff import config, experiment, metrics
from distdiff.data.ingest.shard import shard
from distdiff.data.masks import mcar
from distdiff.data.splat import published
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.rng import numpy_generator
from distdiff.types import Cells

SCORES = ("energy", "swd", "variance_ratio", "correlation")
CALLS = (1, 2, 4, 8, 16, 32, 100)
PUBLISHED = "CountsDiff, RePaint"


def train(
    store: Path, out: Path, cells: int, seed: int, process: dict[str, Any], survival: dict[str, Any],
    labels: tuple[str, ...] = (),
) -> Model:  # fmt: skip
    settings = {
        "data": {"store": str(store), "labels": list(labels)},
        "process": {"kind": "counts", **process},
        "denoiser": {"kind": "mlp", "width": 256, "depth": 3},
        "survival": survival,
        "train": {"out": str(out), "cells": cells, "eval_cells": cells // 10, "patience": 1000, "seed": seed,
                  "checkpoint_cells": cells},
        "evaluate": {"enabled": False},
        "tracking": {"enabled": False},
    }  # fmt: skip
    return Model.load(experiment.train(config.parse(settings)).model)


def walks(published_: Model, ours: dict[str, Model]) -> dict[str, Any]:
    """Name -> function of the number of calls that gives an imputer, or None where there is no such walk."""

    def conditional(model: Model, **options: Any) -> Any:
        leap = options.pop("leap", None)
        if leap is not None:
            model = Model(dataclasses.replace(model.process, leap=leap), model.denoiser, model.spec, {}, model.info)
        if options.get("solver") == "trapezoidal":  # two calls a step, one the last
            return lambda calls: model.imputer(steps=(calls + 1) // 2, **options)
        return lambda calls: model.imputer(steps=calls, **options) if calls < 100 else None

    found: dict[str, Any] = {
        PUBLISHED: lambda calls: published_.imputer("repaint", steps=calls),
        "same network, conditional, plain": conditional(ours["nb"], leap="plain"),
        "theta-trapezoidal": conditional(ours["nb"], leap="plain", solver="trapezoidal"),
        "NB leap": conditional(ours["nb"]),
        "NB leap, even in logit p": conditional(ours["nb"], spacing="logit"),
        "NB leap, placed": lambda calls: ours["nb"].imputer(steps=calls, spacing="variance") if calls < 17 else None,
        "NB leap, RePaint": lambda calls: ours["nb"].imputer("repaint", steps=calls),
    }
    if "loadings" in ours:
        found["correlated leap"] = conditional(ours["loadings"])
        found["correlated leap, even in logit p"] = conditional(ours["loadings"], spacing="logit")
    return found


def score(imputer: Any, cells: Cells, hidden: np.ndarray, seed: int) -> dict[str, float]:
    observed = torch.from_numpy(~hidden)
    erased = Cells(torch.where(observed, cells.counts, 0.0), cells.labels, cells.rows)
    drawn = imputer.impute(erased, observed, draws=1, seed=seed).draws[0].numpy()
    truth = cells.counts.numpy()
    a, b = np.log1p(truth), np.log1p(drawn)
    one = metrics.once(len(a))
    directions = metrics.unit_directions(a.shape[1], 500, numpy_generator(seed, "quality"))
    top = np.argsort(-truth.mean(0))[:200]
    return {
        "energy": float(metrics.energy_distance(truth, hidden, drawn, one)[0]),
        "swd": float(metrics.sliced_wasserstein(a, b, one, directions)[0]),
        "variance_ratio": float(np.median(b[:, top].var(0) / a[:, top].var(0))),
        "correlation": float(metrics.correlation_error(a, b, one)[0]),
    }


def draw(table: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    titles = ("energy distance of the targets", "sliced Wasserstein, log1p", "variance ratio, median gene",
              "gene-gene correlation error")  # fmt: skip
    for ax, key, title in zip(axes.flat, SCORES, titles, strict=True):
        for i, (name, rows) in enumerate(table.items()):
            calls = sorted(map(int, rows))
            style = {"color": "black", "lw": 2.2} if name == PUBLISHED else {"color": colormaps["tab10"](i % 10)}
            ax.plot(calls, [rows[str(c)][key] for c in calls], "o-", ms=4, label=name, **style)
        if key == "variance_ratio":
            ax.axhline(1, color="grey", lw=0.8)
        else:
            ax.axhline(table[PUBLISHED]["100"][key], color="black", lw=0.8, ls=":")
            ax.set_yscale("log")
        ax.set(xscale="log", title=title, xlabel="network calls a draw")
        ax.set_xticks(CALLS, [str(c) for c in CALLS])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    _record.save(figure, path)


def verdict(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Each of our walks at 4 calls against the published recipe at 100, in all four scores."""

    def badness(numbers: dict[str, float], key: str) -> float:
        return abs(np.log(numbers[key])) if key == "variance_ratio" else numbers[key]

    bar = {key: badness(table[PUBLISHED]["100"], key) for key in SCORES}
    return {
        name: {key: round(float(badness(rows["4"], key) / bar[key]), 3) for key in SCORES}
        for name, rows in table.items()
        if name != PUBLISHED and "4" in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an h5ad file with raw counts, or 'splat'")
    parser.add_argument("--genes", default="hvg:1000")
    parser.add_argument("--cells", type=int, default=102_400, help="training cells seen by each model")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--weight", default="none")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began, runs = time.perf_counter(), []
    for seed in range(a.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder, data = Path(name), Path(a.data)
            if a.data == "splat":
                data = folder / "splat.h5ad"
                published("splat30", seed).write_h5ad(data)
            store_at = folder / "atlas.zarr"
            genes = "all" if a.data == "splat" else a.genes
            shard([data], store_at, genes=genes, seed=seed, workers=0, progress=False)
            alike = {"hidden": 0, "two_level": 0, "uniform": 1}
            mixture = {"hidden": 0.4, "two_level": 0.3, "uniform": 0.3, "time": "stratified"}
            as_published = train(store_at, folder / "p", a.cells, seed, {"head": "mean", "weight": "paper"}, alike)
            ours = {
                head: train(store_at, folder / head, a.cells, seed, {"head": head, "weight": a.weight}, mixture)
                for head in ("nb", "loadings")
            }
            store = CountStore.open(store_at)
            cells = store.cells(store.rows("test"))
            hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(seed, "quality", "mask"))
            run: dict[str, dict[str, dict[str, float]]] = {}
            for walk, make in walks(as_published, ours).items():
                for calls in CALLS:
                    if (imputer := make(calls)) is not None:
                        run.setdefault(walk, {})[str(calls)] = score(imputer, cells, hidden, seed)
                print(walk, {c: {k: round(v, 4) for k, v in r.items()} for c, r in run[walk].items()}, flush=True)
            runs.append(run)
    table = {
        walk: {
            calls: {key: float(np.mean([run[walk][calls][key] for run in runs])) for key in SCORES} for calls in rows
        }
        for walk, rows in runs[0].items()
    }
    ratios = verdict(table)
    print("at 4 calls, over CountsDiff's recipe at 100 (below 1 is better):")
    for walk, row in ratios.items():
        print(f"  {walk:<36}", row)
    _record.write(
        a.out, began, {"data": Path(a.data).name, "four_calls_over_published_100": ratios, "table": table, "runs": runs}
    )
    draw(table, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
