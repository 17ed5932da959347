"""Who denoises best? Molecular cross-validation 90/10 (Batson et al. 2019) on real counts.

    python benchmarks/denoise.py --data-dir DIR [--sets pbmc3k baron mca_intestine] [--methods NAME ...] [--seed 0]
    python benchmarks/denoise.py --figure

Every molecule goes to training with probability p = 0.9, else to the test: `x_train ~ Binomial(x, p)`. The 2,000 genes
are those that a store's ``hvg:2000`` would choose from the training part; cells without training
molecules in them are dropped. A method sees the training part of all cells (no cell is held out: Open Problems' task)
and answers with the expected molecules at full depth, and, if it likes, with a read-out for the second score.

* ``nll``: Poisson negative log-likelihood of the held-out molecules, mean over entries of ``r - x_test log r`` with
  ``r = max((1 - p) rate, 1e-10)``. Open Problems computes this with its arguments exchanged. ``nll_floor_1e-6`` is the
  same with a floor of 1e-6, for methods that answer zero.
* ``mse``: as Open Problems computes it, mean over entries of the squared difference between ``log1p`` of the answer
  scaled to 10,000 molecules a cell and ``log1p`` of the test molecules scaled to 10,000. A method's read-out
  ``log1p_cp10k`` is compared as it is; ``mse_of_rate`` is that of its rate in any case. ``mse_poisson`` gives every
  method the matching read-out that its rate alone allows, ``E[log1p_cp10k]`` of Poisson molecules around it.
  ``mse_open_problems`` is the score of that benchmark to the letter: it takes molecules, scales them to 10,000 a cell
  and takes their log1p, so a mean of logarithms is blown up (``mse_inflated``) unless it is made for that score, as
  the read-out ``open_problems`` is.

``*_gain`` is the mean over cells of (gene mean x depth - method) with its standard error; positive is better. Tuned
methods try every option of a declared grid (`GRIDS`) on a second split of the training part, again 90/10, once for
each score: ``rate`` comes from the options of least inner nll, ``log1p_cp10k`` from those of least inner mse. Rows are
merged into an existing result of the same data, seed, p and genes; ``--chosen`` takes the options that stand there
(of whatever genes) instead of trying the grid again. Set OMP_NUM_THREADS to bound the threads of BLAS.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import _denoise_model
import numpy as np
import torch
from scipy import sparse

from distdiff import component
from distdiff.baselines import Baseline
from distdiff.data.ingest.choose import choose
from distdiff.readouts import readout
from distdiff.rng import numpy_generator

SETS = {
    "pbmc3k": ("pbmc3k_10x_human.h5ad", None),
    "baron": ("baron_pancreas_human.h5ad", None),
    "mca_intestine": ("mca_6tissue_mouse.h5ad", ("tissue", "SmallIntestine")),
}
FLOOR = 1e-10
RESULTS = Path(__file__).parent / "results"

Answer = dict[str, Any]
Method = Callable[[sparse.csr_matrix, float, int], Answer]


class Memory:
    """What `Baseline.fit` needs of a store, in memory."""

    def __init__(self, counts: sparse.csr_matrix) -> None:
        self.counts, self.genes = counts, tuple(str(i) for i in range(counts.shape[1]))

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        return self.counts[rows]

    def labels(self, rows: np.ndarray, keys: Sequence[str]) -> dict[str, np.ndarray]:
        return {}


def thin(counts: sparse.csr_matrix, p: float, seed: int, what: str) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Molecules that survive with probability ``p``, and the rest."""
    kept = counts.copy()
    kept.data = numpy_generator(seed, what).binomial(counts.data.astype(np.int64), p).astype(np.int32)
    rest = counts.astype(np.int32) - kept
    kept.eliminate_zeros()
    rest.eliminate_zeros()
    return kept.astype(np.int32), rest


def load(folder: Path, name: str, p: float, seed: int, genes: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Training and test molecules ``int32 [n genes]`` of one set."""
    import anndata

    file, only = SETS[name]
    path = folder / file
    if not path.is_file():
        sys.exit(f"benchmarks/denoise.py: {path} is not there; give --data-dir the folder that holds {file}")
    data = anndata.read_h5ad(path)
    if only is not None:
        data = data[(data.obs[only[0]] == only[1]).to_numpy()]
    train, test = thin(sparse.csr_matrix(data.X).astype(np.int32), p, seed, "mcv")
    best = choose(train, f"hvg:{genes}")
    train, test = train[:, best], test[:, best]
    some = np.asarray(train.sum(axis=1)).ravel() > 0
    return train[some], test[some]


def log1p_cp10k(rate: np.ndarray) -> np.ndarray:
    """``log1p`` of molecules scaled to 10,000 a cell (a cell without any stays zero)."""
    total = rate.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.log1p(np.divide(1e4, total, out=np.zeros_like(total), where=total > 0) * rate).astype(np.float32)


def nll(test: sparse.csr_matrix, rate: np.ndarray, p: float, floor: float = FLOOR) -> np.ndarray:
    """Poisson negative log-likelihood of each cell, nats an entry: ``float64 [n]``."""
    r = np.maximum((1 - p) * rate.astype(np.float64), floor)
    return (r - test.toarray() * np.log(r)).mean(axis=1)


def mse(test: sparse.csr_matrix, readout: np.ndarray) -> np.ndarray:
    """Squared error of ``log1p_cp10k`` of each cell: ``float64 [n]``."""
    return ((readout.astype(np.float64) - log1p_cp10k(test.toarray())) ** 2).mean(axis=1)


def poisson_readout(rate: np.ndarray, p: float) -> np.ndarray:
    """``E[log1p_cp10k]`` of Poisson molecules around a rate: the matching read-out that any method can have."""
    out = np.zeros(rate.shape, np.float32)
    for start in range(0, len(rate), 256):
        mean = torch.from_numpy((1 - p) * rate[start : start + 256].astype(np.float32))
        out[start : start + 256] = readout("log1p_cp10k", torch.zeros_like(mean), mean, torch.full_like(mean, 9.0))
    return out


def baseline(options: Mapping[str, Any], counts: sparse.csr_matrix, p: float, seed: int) -> np.ndarray:
    """Fit one baseline to the thinned counts and denoise them."""
    if options["kind"] != "gene_mean":
        options = {**options, "seed": seed}
    fitted = component.build(Baseline, options)
    fitted.fit(Memory(counts), np.arange(counts.shape[0]))
    return fitted.denoise(counts, p)


def plain(**options: Any) -> Method:
    return lambda counts, p, seed: {"rate": baseline(options, counts, p, seed)}


def raw(counts: sparse.csr_matrix, p: float, seed: int) -> Answer:
    return {"rate": (counts.toarray() / p).astype(np.float32)}


def tuned(grid: Sequence[Mapping[str, Any]]) -> Method:
    """Best options of a grid on a second split, once for each score."""

    def method(counts: sparse.csr_matrix, p: float, seed: int) -> Answer:
        inner, held = thin(counts, 0.9, seed, "mcv-inner")
        scores = []
        for options in grid:
            rate = baseline(options, inner, 0.9, seed)
            scores.append((nll(held, rate, 0.9).mean(), mse(held, log1p_cp10k(rate)).mean()))
        by_nll, by_mse = (grid[int(i)] for i in np.argmin(scores, axis=0))
        return chosen({"nll": by_nll, "mse": by_mse})(counts, p, seed)

    return method


def chosen(options: Mapping[str, Mapping[str, Any]]) -> Method:
    """The options that a grid search has found, one for each score."""

    def method(counts: sparse.csr_matrix, p: float, seed: int) -> Answer:
        rate = baseline(options["nll"], counts, p, seed)
        other = rate if options["mse"] == options["nll"] else baseline(options["mse"], counts, p, seed)
        return {"rate": rate, "log1p_cp10k": log1p_cp10k(other), "options": options}

    return method


def grid(kind: str, *fixed: Mapping[str, Any], **values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of ``values``, with each of ``fixed``."""
    combinations = [dict(zip(values, v, strict=True)) for v in product(*values.values())]
    return [{"kind": kind, **c, **f} for f in fixed or ({},) for c in combinations]


GRIDS = {
    "kNN pool": grid("knn", k=(3, 5, 10, 20, 40), prior=(0.1, 1.0), scale=(0.1, 0.3, 1.0)),
    "PCA regression": [{"kind": "pca", "components": (d,), "hide": 0.1} for d in (5, 10, 20, 40, 80)],
    "Poisson NMF": grid("nmf", components=(5, 10, 20, 40, 80), floor=(0.0, 0.01, 0.1)),
    # the first is the method as published, the second keeps each gene's molecules
    "MAGIC": grid(
        "magic",
        {"smear": False, "floor": 0.0},
        {"smear": True, "floor": 0.03},
        knn=(3, 5, 10, 20),
        t=(1, 2, 3, 5),
        n_pca=(20, 50, 100, 200),
    ),
    "scVI": grid("scvi", epochs=(100, 400)),
}

METHODS: dict[str, Method] = {
    "no denoising": raw,
    "gene mean x depth": plain(kind="gene_mean", depth=True),
    **{name: tuned(options) for name, options in GRIDS.items()},
    **_denoise_model.METHODS,
}


def gain(reference: np.ndarray, score: np.ndarray) -> list[float]:
    """Mean over cells of how much lower a score is than the reference's, and its standard error."""
    d = reference - score
    return [float(d.mean()), float(d.std(ddof=1) / np.sqrt(len(d)))]


def rows(train: sparse.csr_matrix, test: sparse.csr_matrix, p: float, seed: int, names: Sequence[str]) -> dict:
    """One scored row a method."""
    reference = METHODS["gene mean x depth"](train, p, seed)["rate"]
    out = {}
    for name in names:
        began = time.perf_counter()
        answer = METHODS[name](train, p, seed)
        seconds = time.perf_counter() - began
        rate = answer["rate"]
        by_nll, of_rate = nll(test, rate, p), mse(test, log1p_cp10k(rate))
        by_mse = mse(test, answer["log1p_cp10k"]) if "log1p_cp10k" in answer else of_rate
        out[name] = {
            "nll": float(by_nll.mean()),
            "nll_gain": gain(nll(test, reference, p), by_nll),
            "nll_floor_1e-6": float(nll(test, rate, p, 1e-6).mean()),
            "mse": float(by_mse.mean()),
            "mse_gain": gain(mse(test, log1p_cp10k(reference)), by_mse),
            "mse_of_rate": float(of_rate.mean()),
            "mse_open_problems": float(by_mse.mean()),
            **open_problems(test, answer),
            "mse_poisson": float(mse(test, poisson_readout(rate, p)).mean()),
            "seconds": round(seconds, 1),
            **({"options": answer["options"]} if "options" in answer else {}),
            **about(),
        }
        shown = "  ".join(f"{k} {out[name][k]:.4f}" for k in ("nll", "mse", "mse_poisson", "mse_open_problems"))
        print(f"  {name:<24} {shown}  {seconds:.0f} s", flush=True)
    return out


def open_problems(test: sparse.csr_matrix, answer: Answer) -> dict[str, float]:
    """Open Problems' scores of a method whose read-out is no log1p of a rate: of its entry, and of what it inflates."""
    if "open_problems" not in answer:
        return {}
    entries = {"mse_open_problems": answer["open_problems"], "mse_inflated": np.expm1(answer["log1p_cp10k"])}
    return {name: float(mse(test, log1p_cp10k(entry)).mean()) for name, entry in entries.items()}


@functools.cache
def about() -> dict[str, str]:
    """What makes the rows of this run, asked when it starts."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    words = " ".join(Path(w).name if os.sep in w else (repr(w) if " " in w else w) for w in sys.argv[1:])
    return {
        "command": f"python benchmarks/denoise.py {words}",
        "commit": commit.stdout.strip(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s)",
    }


def draw(folder: Path) -> None:
    """Bars of the scores for every result in ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [(n, json.loads(f.read_text())) for n in SETS if (f := folder / f"denoise_{n}.json").is_file()]
    if not found:
        sys.exit(f"benchmarks/denoise.py: {folder} holds no denoise_*.json to draw; run with --data-dir first")
    names = list(dict.fromkeys([*METHODS, *(m for _, r in found for m in r["rows"])]))
    names = [m for m in names if any(m in r["rows"] for _, r in found)]
    figure, axes = plt.subplots(3, len(found), figsize=(4.6 * len(found), 9.6), squeeze=False, sharey=True)
    y = np.arange(len(names))[::-1]
    for column, (name, result) in enumerate(found):
        titles = (
            "Poisson NLL above the best row (nats an entry)",
            "MSE of log1p CP10k, each method's own answer",
            "MSE of log1p CP10k, E[log1p] under Poisson(rate) for all",
        )
        for axis, score, title in zip(axes[:, column], ("nll", "mse", "mse_poisson"), titles, strict=True):
            told = np.array([result["rows"].get(m, {}).get(score, np.nan) for m in names])
            length = told - np.nanmin(told) if score == "nll" else told
            far = min(np.nanmax(length), 4 * np.nanmedian(length[length > 0])) if np.nanmax(length) > 0 else 1.0
            best = told == np.nanmin(told)
            axis.barh(y, np.minimum(length, far), color=np.where(best, "#b5541c", "#7a8ca3"))
            for at, value, long in zip(y, told, length, strict=True):
                if np.isfinite(value):
                    cut = " (bar cut)" if long > far else ""
                    axis.text(
                        min(long, far) + 0.02 * far,
                        at,
                        f"{value:.4f}{cut}",
                        va="center",
                        fontsize=8,
                        weight="bold" if value == np.nanmin(told) else "normal",
                    )
            axis.set_xlim(0, 1.6 * far)
            axis.locator_params(axis="x", nbins=4)
            axis.set_yticks(y, names)
            axis.set_xlabel(title, fontsize=9)
            axis.set_title(f"{name}: {result['cells']:,} cells x {result['genes']:,} genes", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Molecular cross-validation 90/10; shorter is better", fontsize=11)
    figure.tight_layout()
    figure.savefig(folder / "denoise.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with the h5ad files of SETS")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--chosen", action="store_true", help="the options of the result in --out, no grid search")
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--figure", action="store_true", help="only draw what is in --out")
    a = parser.parse_args()
    if a.figure:
        return draw(a.out)
    if a.data_dir is None:
        sys.exit("benchmarks/denoise.py: give --data-dir, the folder with " + ", ".join(f for f, _ in SETS.values()))
    torch.set_num_threads(1)
    about()
    names = list(a.methods)
    if "scVI" in names and importlib.util.find_spec("scvi") is None:
        names.remove("scVI")
        print("scVI left out: scvi-tools is not installed (pip install 'distdiff[baselines]')")
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.sets:
        train, test = load(a.data_dir, name, a.p, a.seed, a.genes)
        print(f"{name}: {train.shape[0]} cells x {train.shape[1]} genes, {train.sum()} + {test.sum()} molecules")
        result = {
            "data": SETS[name][0] + (f", {'='.join(SETS[name][1])}" if SETS[name][1] else ""),
            "p": a.p,
            "seed": a.seed,
            "cells": train.shape[0],
            "genes": train.shape[1],
            "molecules": [int(train.sum()), int(test.sum())],
            "floor": FLOOR,
        }
        file = a.out / f"denoise_{name}.json"
        old = json.loads(file.read_text()) if file.is_file() else {}
        kept = old.get("rows", {}) if {k: old.get(k) for k in result} == result else {}
        if a.chosen:
            found = {m: row["options"] for m, row in old.get("rows", {}).items() if "options" in row}
            METHODS.update({m: chosen(found[m]) for m in names if m in found})
        made = rows(train, test, a.p, a.seed, names)
        every = {**kept, **made}
        result["grids"] = GRIDS
        result["rows"] = {m: every[m] for m in [*METHODS, *every] if m in every}
        file.write_text(json.dumps(result, indent=1))
    return draw(a.out)


if __name__ == "__main__":
    main()
