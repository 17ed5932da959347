"""Handwritten digits by three diffusions in one network: CountsDiff, Gaussian (DDPM) and masked (MDLM).

python benchmarks/digits.py          # CPU, some minutes; needs: pip install 'distdiff[images]'

scikit-learn's 1,797 digits, 8 x 8 pixels of 0 to 16. All train the UNet of configs/digits.yaml on the same images for
the same number of steps, p of every pixel beside its intensity, and draw digits with the labels of held-out ones. A
classifier that saw the training images alone judges: Frechet distance of its 32 features to those of all held-out
digits, and how often it reads the label that was asked for. Writes the table as JSON, and a grid of digits.
``distdiff benchmark digits`` compares them by the scores of generated cells.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch
from sklearn.neural_network import MLPClassifier

from distdiff import config, experiment
from distdiff.data import images
from distdiff.data.ingest.shard import shard
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.process.gaussian import Gaussian

ROOT = Path(__file__).resolve().parents[1]
BRIGHTEST = 16
SPLIT = (0.6, 0.05, 0.35)


@dataclass(frozen=True)
class Intensities(Gaussian):
    """DDPM as images use it: the state is the intensity over ``scale``, not its logarithm."""

    predict: str = "eps"
    scale: float = BRIGHTEST / 2  # a step clamps what it predicts to 0 to LOG_MOST / scale, which is white

    def enter(self, counts, *, rng):
        return counts / self.scale

    def leave(self, x):
        return (self.scale * x).clamp(0, BRIGHTEST).round()

    def mean(self, eta, x, p):
        return (self.scale * eta[..., 0]).clamp(0, BRIGHTEST)


MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "CountsDiff": {},
    "Gaussian (DDPM)": {
        "process": {"kind": f"{Path(__file__).stem}:Intensities", "schedule": "cosine"},
        "denoiser": {"log": False},
    },
    "masked (MDLM)": {"process": {"kind": "masked", "schedule": "cosine", "classes": BRIGHTEST + 1}},
}
"""Name -> what its config has other than configs/digits.yaml."""


def prepare(folder: Path, seed: int) -> CountStore:
    """The digits as a store: training, validation and held-out images."""
    images.write(images.digits(), folder / "digits.h5ad")
    shard(
        folder / "digits.h5ad", folder / "digits.zarr", labels=("label",), genes=images.pixels(1, 8, 8), split=SPLIT,
        seed=seed, workers=0, progress=False,
    )  # fmt: skip
    return CountStore.open(folder / "digits.zarr")


def part(store: CountStore, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n 64]`` and their labels ``str [n]`` of a split."""
    rows = store.rows(split)
    names = np.array(store.manifest.labels["label"])
    return store.read(rows).toarray(), names[store.labels(rows, ["label"])["label"]]


class Judge:
    """A classifier of the training digits: its last hidden layer gives features, its answer a reading."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        self.net = MLPClassifier((128, 32), max_iter=100, alpha=1e-3, random_state=seed)
        rng = np.random.default_rng(seed)
        moved = [x, *(shifted(x, *step) for step in ((0, 1), (0, -1), (1, 0), (-1, 0)))]
        many = np.concatenate(moved) / BRIGHTEST
        self.net.fit(many + rng.normal(0, 0.05, many.shape), np.tile(y, len(moved)))

    def read(self, x: np.ndarray) -> np.ndarray:
        return self.net.predict(x / BRIGHTEST)

    def features(self, x: np.ndarray) -> np.ndarray:
        h = x / BRIGHTEST
        for weight, bias in zip(self.net.coefs_[:-1], self.net.intercepts_[:-1], strict=True):
            h = np.maximum(h @ weight + bias, 0)
        return h


def shifted(x: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images moved by a pixel, dark where nothing comes in."""
    out = np.zeros_like(x).reshape(-1, 8, 8)
    to = [slice(max(d, 0), 8 + min(d, 0)) for d in (down, right)]
    of = [slice(max(-d, 0), 8 + min(-d, 0)) for d in (down, right)]
    out[:, to[0], to[1]] = x.reshape(-1, 8, 8)[:, of[0], of[1]]
    return out.reshape(len(x), -1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`` of two samples ``[n d]`` (Heusel et al. 2017)."""
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(s_a @ s_b).real.clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s_a) + np.trace(s_b) - 2 * root)


def score(judge: Judge, made: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return {
        "frechet": frechet(judge.features(made), judge.features(truth)),
        "read_as_asked": float((judge.read(made) == labels).mean()),
        "mean_ratio": float(made.mean() / truth.mean()),
        "variance_ratio": float(made.var(0).sum() / truth.var(0).sum()),
        "above_16": float((made > BRIGHTEST).mean()),
    }


def train(store: Path, out: Path, changes: dict[str, dict[str, Any]], cells: int, seed: int) -> Model:
    settings = config.load(ROOT / "configs" / "digits.yaml").as_dict()
    for section, values in changes.items():
        settings[section] = values if "kind" in values else {**settings[section], **values}
    settings["data"]["store"], settings["denoiser"]["levels"] = str(store), True
    settings["tracking"]["enabled"] = False
    settings["train"] |= {"out": str(out), "cells": cells, "seed": seed, "eval_cells": cells, "checkpoint_cells": cells}
    return Model.load(experiment.train(config.parse(settings)).model, trust=[Path(__file__).stem])


def shuffled(x: np.ndarray, y: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    """For each label, every pixel from another digit of that label: right pixels, no shapes."""
    rng = np.random.default_rng(seed)
    pools = {label: np.flatnonzero(y == label) for label in np.unique(y)}
    rows = np.stack([rng.choice(pools[label], x.shape[1]) for label in asked])
    return np.take_along_axis(x, rows, 0)


def grid(rows: dict[str, np.ndarray], path: Path, per_digit: int = 2) -> None:
    """Two of each digit of every contestant, a block a contestant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.66 * len(rows)), layout="constrained")
    for axes, (name, made) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        tiles = np.pad(made.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
        axes.imshow(np.concatenate(tiles[: 10 * per_digit], 1), cmap="gray", vmin=0, vmax=BRIGHTEST)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_axis_off()
    _record.save(figure, path)


def compare(a: argparse.Namespace, folder: Path, began: float) -> dict[str, dict[str, Any]]:
    """Train and score them one after the other; table and picture are written after each."""
    store = prepare(folder, 0)
    (x, y), (truth, labels) = part(store, "train"), part(store, "test")
    judge = Judge(x, y, 0)
    data = {"train": len(x), "held_out": len(truth), "read_right": float((judge.read(truth) == labels).mean())}
    rank = np.argsort(labels, kind="stable")
    two = np.concatenate([rank[labels[rank] == label][:2] for label in np.unique(labels)])
    chosen = np.concatenate((two, np.setdiff1d(np.arange(len(labels)), two)))[: a.draws]  # those of the picture first
    asked, pictures = labels[chosen], {"held-out digits": truth[chosen]}
    again = np.random.default_rng(0).choice(len(x), len(asked), replace=False)
    table = {
        "training digits": score(judge, x[again], y[again], truth),
        "pixels of other digits of the label": score(judge, shuffled(x, y, asked, 0), asked, truth),
    }
    for name, seed in itertools.product(a.only, range(a.seeds)):
        cpu = time.process_time()
        model = train(folder / "digits.zarr", folder / f"{name}{seed}", MODELS[name], a.cells, seed)
        trained = round(time.process_time() - cpu, 1)
        for weight in a.guidance:
            cpu = time.process_time()
            walk = partial(model.generate, steps=a.steps, guidance=weight, seed=seed, batch_size=128)
            made = np.asarray(walk(len(asked), {"label": list(asked)}).X.todense())
            row = f"{name}, guidance {weight:g}" + (f", seed {seed}" if seed else "")
            spent = {"train_cpu_s": trained, "draw_cpu_s": round(time.process_time() - cpu, 1)}
            weights = sum(p.numel() for p in model.denoiser.parameters())
            table[row] = {**score(judge, made, asked, truth), **spent, "weights": weights}
            if not seed:
                pictures[row] = made
            print(row, {k: round(v, 3) for k, v in table[row].items()}, file=sys.stderr, flush=True)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        grid(pictures, a.out.with_suffix(".png"))
        told = {"cells": a.cells, "steps": a.steps, "draws": len(asked)}
        _record.write(a.out, began, {"data": data, **told, "table": table})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=64_000, help="images that each training sees, with repeats")
    parser.add_argument("--steps", type=int, default=20, help="steps of every walk")
    parser.add_argument("--draws", type=int, default=629, help="digits drawn from each; 20 or more")
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 1.5], help="weights of the label")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each; the picture is of the first")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits.json")
    a = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = compare(a, Path(folder), began)
    for name, row in table.items():
        print(f"{name:<40} Frechet {row['frechet']:8.2f}  read as asked {row['read_as_asked']:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
