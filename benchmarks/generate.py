"""Generated cells before and after: depth drawn, levels dense near 0, rare labels met more often.

    python benchmarks/generate.py --data FILE.h5ad --label cell_type --out benchmarks/results/generate_NAME.json
    python benchmarks/generate.py --data FILE.h5ad --walks after --seeds 3 --out ...

Models of one network and one budget. ``before``: cells in the proportions of the data, cosine levels in training and in
the walk, the depth that the walk gives. ``after``: the defaults. Steps in between have rows of their own. All are
scored as ``distdiff evaluate --task generate`` does, guidance by what it does to the mean depth, and imputation by
Poisson deviance (half of the entries of test cells hidden), which must not suffer. A seed is another split, training
and draw. Writes JSON.
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

from distdiff import config, experiment
from distdiff.data.ingest.shard import shard
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.evaluation import deviances
from distdiff.imputers.labels import WithLabels
from distdiff.model import Model
from distdiff.realism import FEW, OURS, REAL, evaluate_generated
from distdiff.rng import numpy_generator

BEFORE = {"loader.strata": '""', "loader.weights": "1.0", "survival.levels": "schedule"}
WALKS: dict[str, tuple[str, dict[str, Any]]] = {
    "before": ("before", {"spacing": "time", "depth": "free"}),
    "+ geometric levels": ("before", {"depth": "free"}),
    "+ depth drawn": ("before", {}),
    "after": ("after", {}),
    "after, 8 steps": ("after", {"steps": 8}),
    "after, depth free": ("after", {"depth": "free"}),
    "after, guidance 1.5": ("after", {"guidance": 1.5}),
    "after, guidance 3": ("after", {"guidance": 3.0}),
    "after, guidance 3, depth free": ("after", {"guidance": 3.0, "depth": "free"}),
}
MODELS: dict[str, dict[str, str]] = {"before": BEFORE, "after": {}}


def trained(store: Path, label: str, folder: Path, cells: int, seed: int, changes: dict[str, str]) -> Model:
    """The model in ``folder``; trained there unless it is there."""
    if not (folder / "model" / "model.json").exists():
        given = {
            "data.store": str(store), "data.labels": f"[{label}]", "train.out": str(folder), "train.cells": str(cells),
            "train.eval_cells": str(cells // 10), "train.patience": "100", "evaluate.enabled": "false",
            "tracking.enabled": "false", "train.seed": str(seed), **changes,
        }  # fmt: skip
        experiment.train(config.load("default", [f"{key}={value}" for key, value in given.items()]))
    return Model.load(folder / "model")


def summary(
    model: Model, store: CountStore, label: str, cells: int, options: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Scores by label of every contestant, and the mean depth of all generated cells."""
    found = evaluate_generated(model, store, label=label, cells=cells, seed=seed, progress=False, scvi=False, **options)
    rows = {
        name: {value: {m: round(score, 4) for m, score in scores.items()} for value, scores in scored.items()}
        for name, scored in found.rows.items()
    }
    learned = [v for v in found.values if found.training[v] >= FEW and found.held_out[v]]
    ours, real = rows[OURS], rows[REAL]
    return {
        "labels_of_15": len(learned),
        "short_of_90_percent": [v for v in learned if ours[v]["recognised"] < 0.9 * real[v]["recognised"]],
        "worst_sd_of_depth": max((abs(ours[v]["depth_sd"] - 1), v) for v in learned),
        "molecules": round(float(np.asarray(found.generated.X.sum(1)).mean()), 1),
        "training_cells": found.training, "held_out_cells": found.held_out, "rows": rows,
    }  # fmt: skip


def imputation(model: Model, store: CountStore) -> dict[str, float]:
    """Deviance of a call with labels and of one without, on half of the entries of test cells."""
    cells = store.cells(store.rows("test"), tuple(model.spec.labels))
    hidden = mcar(tuple(cells.counts.shape), 0.5, numpy_generator(0, "benchmark"))
    codes = {label: torch.arange(len(values)) for label, values in model.spec.labels.items()}
    told = (("labels told", True), ("no labels", False))
    rows = {name: WithLabels(model.imputer(), used, codes) for name, used in told}
    return {name: round(v, 5) for name, v in deviances(rows, store, cells, hidden).items()}


def run(given: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """All walks of one seed."""
    address = given.data
    if given.data.suffix == ".h5ad":
        address = folder / f"atlas{seed}.zarr"
        if not address.exists():
            shard([given.data], address, genes=given.genes, labels=(given.label,), split=(0.8, 0.05, 0.15), seed=seed,
                  workers=0, progress=False)  # fmt: skip
    store = CountStore.open(address)
    wanted = {WALKS[walk][0] for walk in given.walks}
    models = {
        name: trained(address, given.label, folder / f"{name}{seed}", given.train_cells, seed, changes)
        for name, changes in MODELS.items()
        if name in wanted
    }
    walks = {}
    for name in given.walks:
        which, options = WALKS[name]
        walks[name] = found = summary(models[which], store, given.label, given.cells, options, seed)
        scores = " ".join(f"{k} {v:.3f}" for k, v in found["rows"][OURS][""].items())
        short = f"{len(found['short_of_90_percent'])} of {found['labels_of_15']} labels short"
        print(f"seed {seed}, {name}: {found['molecules']} molecules; {scores}; {short}", flush=True)
    return {
        "seed": seed, "walks": walks,
        "imputation": {name: imputation(model, store) for name, model in models.items()},
    }  # fmt: skip


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, required=True, help="raw counts, h5ad, or a store")
    words.add_argument("--label", default="cell_type")
    words.add_argument("--genes", default="seurat_v3:1000")
    words.add_argument("--train-cells", type=int, default=150_000, help="cells of a training")
    words.add_argument("--cells", type=int, default=200, help="cells to generate of a label value")
    words.add_argument("--walks", nargs="*", default=list(WALKS), choices=list(WALKS))
    words.add_argument("--seeds", type=int, default=1)
    words.add_argument("--models", type=Path, help="folder in which trained models stay")
    words.add_argument("--out", type=Path, required=True)
    given = words.parse_args()
    began, runs = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(given.seeds):
            runs.append(run(given, given.models or Path(temporary), seed))
            content = {"genes": given.genes, "train_cells": given.train_cells, "runs": runs}
            _record.write(given.out, began, content)


if __name__ == "__main__":
    main()
