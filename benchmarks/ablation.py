"""What each part of the recipe is worth: heads, how they are fitted, weights, times, mixtures, offsets; all else equal.

    python benchmarks/ablation.py --seeds 3 --out benchmarks/results/ablation_pbmc68k.json [--data FILE --genes hvg:N]

One network per variant, the same training cells; half of the entries of held-out cells are hidden. ``dev``: Poisson
deviance of the mean from one call. ``log score``: nats of a hidden entry under the one-call law. ``crps``, ``energy``:
of draws in 1 and 16 calls. ``bias p``: relative bias of the expected lost molecules when all genes survive with
probability p; ``z2 p``: mean squared residual over its predicted variance there (1 is calibrated).
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

from distdiff import config, experiment, metrics, quickstart
from distdiff.data.ingest.shard import shard
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.evaluation import cheap, deviances
from distdiff.model import Model
from distdiff.process._laws import nb_nll
from distdiff.rng import generator, numpy_generator
from distdiff.sampling import predictor
from distdiff.types import Cells

LEVELS = (0.05, 0.3, 0.7, 0.95)
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "weight paper": {"process": {"weight": "paper"}},
    "weight nll": {"process": {"weight": "nll"}},
    "own count not weighed in": {"process": {"own": False}},
    "joint likelihood": {"process": {"fit": "joint"}},
    "mean alone": {"process": {"head": "mean"}},
    "loadings": {"process": {"head": "loadings"}},
    "x0-prediction": {"process": {"predict": "x0"}},
    "time uniform": {"survival": {"time": "uniform"}},
    "time stratified": {"survival": {"time": "stratified"}},
    "time learned": {"survival": {"time": "learned"}},
    "Fisher schedule": {"process": {"schedule": "fisher"}},
    "linear schedule": {"process": {"schedule": "linear"}},
    "all hidden": {"survival": {"hidden": 1.0, "two_level": 0.0, "uniform": 0.0}},
    "two-level only": {"survival": {"hidden": 0.0, "two_level": 1.0, "uniform": 0.0}},
    "more alike": {"survival": {"hidden": 0.3, "two_level": 0.2, "uniform": 0.5}},
    "low-rank path": {"denoiser": {"linear": 64}},
    "as before": {"denoiser": {"linear": 64}, "process": {"own": False, "weight": "paper"}},
}


def train(store: Path, out: Path, cells: int, seed: int, change: dict[str, dict[str, Any]]) -> Model:
    tree: Any = quickstart.settings(store, out, None, "ablation")
    for section, values in change.items():
        tree[section] = {**tree.get(section, {}), **values}
    tree.setdefault("process", {})["kind"] = "counts"
    tree["train"].update(cells=cells, seed=seed, eval_cells=cells // 8, checkpoint_cells=cells)
    tree["evaluate"], tree["tracking"] = {"enabled": False}, {"enabled": False}
    return Model.load(experiment.train(config.parse(tree)).model)


@torch.no_grad()
def measured(model: Model, cells: Cells, hidden: np.ndarray, seed: int) -> dict[str, float]:
    process: Any = model.process
    observed, truth, one = torch.from_numpy(~hidden), cells.counts.numpy(), metrics.once(len(cells))
    erased = Cells(torch.where(observed, cells.counts, 0.0), cells.labels, cells.rows)
    n = hidden.sum(1)
    out = {}
    for steps in (1, 16):
        answer = model.imputer(steps=steps).impute(erased, observed, draws=5, seed=seed)
        drawn = answer.draws.numpy()
        out[f"crps {steps}"] = float(metrics.pooled(metrics.crps(truth, hidden, drawn), n, one)[0])
        out[f"energy {steps}"] = float(metrics.energy_distance(truth, hidden, drawn[0], one)[0])
        out[f"bias {steps}"] = float(drawn[:, hidden].mean() / truth[hidden].mean() - 1)
    out["dev"] = float(metrics.pooled(metrics.poisson_deviance(truth, hidden, answer.mean.numpy()), n, one)[0])
    predict = predictor(process, model.denoiser, cells.labels)
    p = observed.float()
    eta = predict(erased.counts, p)
    score = nb_nll(cells.counts, process.lost(eta, p), process.log_size(eta))
    out["log score"] = float(score[~observed].mean())
    for level in LEVELS:
        x = process.forward(cells.counts, 1.0, level, rng=generator(seed, "ablation", str(level)))
        eta = predict(x, level)
        d, f = cells.counts - x, process.lost(eta, level)
        variance = f + f.square() * torch.exp(-process.log_size(eta))
        out[f"bias p={level}"] = float(f.sum() / d.sum() - 1)
        out[f"z2 p={level}"] = float((d - f).square().sum() / variance.sum())
    return out


def draw(table: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    keys = ("dev", "log score", "crps 1", "crps 16", "energy 1", "energy 16")
    figure = Figure(figsize=(15, 0.32 * len(table) + 1.6), layout="constrained")
    y = np.arange(len(table))
    for i, (axes, key) in enumerate(zip(figure.subplots(1, len(keys)), keys, strict=True)):
        mean = np.array([row[key]["mean"] for row in table.values()])
        axes.errorbar(mean, y, xerr=[row[key]["sd"] for row in table.values()], fmt="o", ms=4, color="#b5541c")
        axes.axvline(mean[0], color="grey", lw=0.8, ls=":")
        axes.set_yticks(y, list(table) if i == 0 else [""] * len(table))
        axes.invert_yaxis()
        if key.startswith(("crps", "energy")):  # a variant or two are far off
            axes.set_xscale("log")
        axes.set_title(key, fontsize=10)
    _record.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cells", type=int, default=51_200)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--genes", default="all")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began = time.perf_counter()
    runs: dict[str, list[dict[str, float]]] = {}
    baselines = []
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name), a.data
        if data is None:
            data = folder / "counts.h5ad"
            quickstart.demo_counts(data)
        for seed in range(a.seeds):
            store_at = folder / f"atlas{seed}.zarr"
            shard([data], store_at, genes=a.genes, seed=seed, workers=0, progress=False)
            store = CountStore.open(store_at)
            cells = store.cells(store.rows("test"))
            hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(seed, "ablation"))
            baselines.append(deviances(cheap(), store, cells, hidden))
            for variant in a.only or VARIANTS:
                model = train(store_at, folder / f"{variant} {seed}", a.cells, seed, VARIANTS[variant])
                runs.setdefault(variant, []).append(measured(model, cells, hidden, seed))
                print(seed, f"{variant:<18}", {k: round(v, 4) for k, v in runs[variant][-1].items()}, flush=True)
    table = {
        name: {
            key: {"mean": float(np.mean(v)), "sd": float(np.std(v))} for key in rows[0] if (v := [r[key] for r in rows])
        }
        for name, rows in runs.items()
    }
    _record.write(a.out, began, {"data": data.name, "baselines": baselines, "table": table, "runs": runs})
    draw(table, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
