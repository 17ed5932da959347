"""Which estimators belong beside the network? Weights of every mixture by validation cells, scored on test cells.

    python benchmarks/blends.py --data baron_pancreas_human.h5ad dense --out benchmarks/results/blends.json

The shipped config is trained twice, with two seeds, on one split. A mixture is a convex combination of log rates, whose
weights have the least Poisson deviance on validation cells with half of their entries hidden (docs/MATHS.md 5.10 has
the network, a PCA regression and Poisson NMF). ``sigmas``: standard errors of the paired difference over test cells by
which a mixture's deviance is above that of network and PCA. ``dense`` is the simulated set of benchmarks/small.py.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch
from defaults import PEERS, Hidden, in_errors, store_of, trained
from scipy.optimize import minimize
from small import arguments, splits

from distdiff import component, metrics
from distdiff.baselines import Baseline

ESTIMATORS = ("PCA", "ridge", "NMF", "gene mean x depth")
MIXTURES: tuple[tuple[str, ...], ...] = (
    ("network",),
    ("network", "PCA"),
    ("network", "ridge"),
    ("network", "NMF"),
    ("network", "PCA", "ridge", "gene mean x depth"),
    ("network", "PCA", "NMF"),
    ("two networks",),
    ("two networks", "PCA"),
    ("two networks", "PCA", "NMF"),
    *((name,) for name in ESTIMATORS),
)
BASE = MIXTURES[1]


def deviances(of: Hidden, log_rate: np.ndarray) -> np.ndarray:
    """Poisson deviance of each cell's hidden entries, ``[b]``."""
    return metrics.poisson_deviance(of.truth, of.hidden, np.where(of.hidden, np.exp(log_rate), of.truth))


def weights(parts: Sequence[np.ndarray], of: Hidden) -> np.ndarray:
    """Convex weights of log rates ``[b g]`` that have the least deviance, ``[parts]``."""
    if len(parts) == 1:
        return np.ones(1)

    def total(w: np.ndarray) -> float:
        return float(deviances(of, mixed(parts, np.append(1 - w.sum(), w))).sum() / of.hidden.sum())

    others = len(parts) - 1
    convex = {"type": "ineq", "fun": lambda w: 1 - w.sum()}
    found = minimize(total, np.full(others, 0.1), method="SLSQP", bounds=[(0, 1)] * others, constraints=[convex],
                     options={"maxiter": 40, "eps": 1e-3}).x  # fmt: skip
    return np.append(1 - found.sum(), found)


def mixed(parts: Sequence[np.ndarray], w: np.ndarray) -> np.ndarray:
    """The mixture."""
    return np.sum([share * part for share, part in zip(w, parts, strict=True)], 0)


def table(data: Path, genes: int, n_cells: int, seed: int) -> dict[str, Any]:
    """All mixtures of one data set and split."""
    with tempfile.TemporaryDirectory() as name:
        store = store_of(data, genes, n_cells, seed, Path(name))
        held_out, test = Hidden(store, "val", seed), Hidden(store, "test", seed)
        log: dict[str, list[np.ndarray]] = {}
        for i, label in enumerate(("network", "another")):
            words = ["train.blend=false", f"train.seed={seed + 100 * i}"]
            model, _, _ = trained(store, Path(name) / label, words, seed)
            log[label] = [np.log(np.maximum(of.law(model)[0], 1e-9)) for of in (held_out, test)]
        log["two networks"] = [(a + b) / 2 for a, b in zip(log["network"], log["another"], strict=True)]
        for label in ESTIMATORS:
            peer = component.build(Baseline, PEERS[label])
            with contextlib.redirect_stderr(None):
                peer.fit(store, store.rows("train"))
            log[label] = [np.log(of.mean(peer)) for of in (held_out, test)]
    rows: dict[str, Any] = {}
    found = {mixture: weights([log[part][0] for part in mixture], held_out) for mixture in MIXTURES}
    of_test = {mixture: mixed([log[part][1] for part in mixture], w) for mixture, w in found.items()}
    base = deviances(test, of_test[BASE])
    for mixture, w in found.items():
        cells = deviances(test, of_test[mixture])
        error = (np.exp(of_test[mixture]) - test.truth)[test.hidden]
        rows[" + ".join(mixture)] = {
            "weights": [round(float(share), 2) for share in w],
            "deviance": float(cells.sum() / test.hidden.sum()), "RMSE": float(np.sqrt(np.mean(error**2))),
            "sigmas": in_errors(cells - base),
        }  # fmt: skip
    return {"set": data.stem, "seed": seed, "rows": rows}


def main() -> None:
    a = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    began, sets = time.perf_counter(), []
    for path, seed in splits(a.data, a.seeds):
        sets.append(found := table(path, a.genes, a.cells, seed))
        print(f"\n{found['set']}, seed {seed}")
        for row, r in found["rows"].items():
            print(f"  {row:<52}{r['deviance']:9.4f}{r['RMSE']:10.4f}{r['sigmas']:8.2f}  {r['weights']}", flush=True)
        _record.write(a.out, began, {"sets": sets})


if __name__ == "__main__":
    main()
