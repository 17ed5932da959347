"""Ten negative-binomial dimensions (CountsDiff's toy data): which generator keeps means, variances and the joint law?

    python benchmarks/toy.py --out benchmarks/results/toy.json [--seeds 1 --only NAME ...]

Writes the JSON and, beside it, a figure. A contestant is ``(train float32 [n 10], n_samples, seed) -> (samples
[n_samples 10], network calls)``; `contestants` names them. Means and variances are compared with the exact moments,
everything else with 4000 held-out samples; "truth again" is a fresh sample of the truth, the best that anyone can do.
``distdiff benchmark toy`` compares full networks and peers on fewer samples, without exact moments.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _record
import _toy_models
import numpy as np
import torch
from scipy.stats import wasserstein_distance

from distdiff import metrics
from distdiff.data.toy import DIMENSIONS, exact_moments, parameters, toy
from distdiff.rng import numpy_generator

Contestant = Callable[[torch.Tensor, int, int], tuple[Any, int]]

TRAIN, TEST = 20_000, 4_000
MMD_POINTS, DIRECTIONS = 2_000, 500
MARKERS = "os^DvPX<>*"
SCORES = {
    "swd": "sliced Wasserstein",
    "w1": "marginal W1",
    "mmd_log1p": "MMD², log1p",
    "mmd_raw": "MMD², raw counts",
}


def mmd_squared(x: np.ndarray, y: np.ndarray, gamma: float = 1.0) -> float:
    """Squared maximum mean discrepancy, biased V-statistic, kernel ``exp(-gamma |x - y|^2)``; ``x, y``: ``[n d]``."""

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        square = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("nd,nd->n", b, b)[None, :] - 2.0 * (a @ b.T)
        return float(np.exp(-gamma * np.maximum(square, 0.0)).mean())

    return mean_kernel(x, x) + mean_kernel(y, y) - 2.0 * mean_kernel(x, y)


def scores(
    truth: np.ndarray,
    sample: np.ndarray,
    rng: np.random.Generator,
    moments: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Compare a sample with the truth.

    Parameters
    ----------
    truth, sample
        ``[n d]`` counts, equally many rows.
    rng
        Chooses the projections and the (at most 2000) rows of the MMD; give every contestant the same address.
    moments
        Mean and variance ``[d]`` to compare with; None takes those of ``truth``.

    Returns
    -------
    dict
        ``variance_ratio`` and ``mean_ratio`` (lists of ``d``, sample over truth), ``swd``, ``w1``, ``mmd_log1p``,
        ``mmd_raw``.

    Raises
    ------
    ValueError
        Shapes that differ, or values that are not finite.
    """
    truth, sample = np.asarray(truth, np.float64), np.asarray(sample, np.float64)
    if truth.ndim != 2 or truth.shape != sample.shape:
        raise ValueError(
            f"scores: sample has shape {sample.shape}, truth {truth.shape}; draw as many rows as the truth"
        )
    if not np.isfinite(sample).all():
        raise ValueError(f"scores: {(~np.isfinite(sample)).sum()} values of the sample are not finite")
    mean, variance = moments or (truth.mean(axis=0), truth.var(axis=0))
    directions = metrics.unit_directions(truth.shape[1], DIRECTIONS, rng)
    rows = [rng.choice(len(truth), min(len(truth), MMD_POINTS), replace=False) for _ in range(2)]
    x, y = truth[rows[0]], sample[rows[1]]
    return {
        "variance_ratio": (sample.var(axis=0) / variance).tolist(),
        "mean_ratio": (sample.mean(axis=0) / mean).tolist(),
        "swd": float(metrics.sliced_wasserstein(truth, sample, metrics.once(len(truth)), directions)[0]),
        "w1": float(np.mean([wasserstein_distance(a, b) for a, b in zip(truth.T, sample.T, strict=True)])),
        "mmd_log1p": mmd_squared(np.log1p(np.maximum(x, 0.0)), np.log1p(np.maximum(y, 0.0))),
        "mmd_raw": mmd_squared(x, y),
    }


def truth_again(train: torch.Tensor, n: int, seed: int) -> tuple[np.ndarray, int]:
    return toy(n, numpy_generator(seed, "toy", "truth again")), 0


def independent_marginals(train: torch.Tensor, n: int, seed: int) -> tuple[np.ndarray, int]:
    """Each dimension of the training data in its own order: right marginals, no dependence."""
    rows = numpy_generator(seed, "toy", "marginals").random(train.shape).argsort(axis=0)[:n]
    return np.take_along_axis(train.numpy(), rows, axis=0), 0


def poisson(train: torch.Tensor, n: int, seed: int) -> tuple[np.ndarray, int]:
    return numpy_generator(seed, "toy", "poisson").poisson(exact_moments()[0], (n, train.shape[1])), 0


def contestants() -> dict[str, Contestant]:
    """Name -> contestant, in the order of the table and the figure; controls first."""
    return {
        "truth again": truth_again,
        "independent marginals": independent_marginals,
        "Poisson with the true means": poisson,
        **_toy_models.contestants(),
    }


def one(contestant: Contestant, seed: int) -> dict[str, Any]:
    """Train on one draw, score against another; ``seed`` addresses the data, the contestant's noise and the scores."""
    train = torch.from_numpy(toy(TRAIN, numpy_generator(seed, "toy", "train")).astype(np.float32))
    test = toy(TEST, numpy_generator(seed, "toy", "test"))
    began = time.perf_counter()
    sample, calls = contestant(train, len(test), seed)
    seconds = time.perf_counter() - began
    out = scores(test, np.asarray(sample), numpy_generator(seed, "toy", "scores"), exact_moments())
    return {**out, "network_calls": int(calls), "seconds": round(seconds, 2)}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation over seeds of every number."""
    return {
        key: {"mean": np.mean(values, axis=0).tolist(), "sd": np.std(values, axis=0).tolist()}
        for key in runs[0]
        if (values := [run[key] for run in runs])
    }


def draw(table: Mapping[str, Mapping[str, Any]], path: Path, n_seeds: int = 1) -> None:
    """Variance ratio of each dimension (left) and the distances (right), one colour a contestant."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    names, place = list(table), np.arange(len(table))
    colours = [colormaps["tab10" if len(names) <= 10 else "tab20"](i % 20) for i in place]
    figure = Figure(figsize=(13, 4.8 + 0.3 * max(0, len(names) - 4)), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[1.2, 1.2, 0.8, 0.8])
    left = figure.add_subplot(grid[:, :2])
    left.axhspan(0.9, 1.1, color="#c9d6df", alpha=0.6, lw=0, label="±10 %")
    left.axhline(1.0, color="#22303c", lw=1)
    mean, variance = exact_moments()
    order = np.argsort(mean)
    ratios = np.array([row["variance_ratio"]["mean"] for row in table.values()])[:, order]
    spread = np.array([row["variance_ratio"]["sd"] for row in table.values()])[:, order] if n_seeds > 1 else None
    offsets = np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else [0.0]
    for i, name in enumerate(names):
        error = None if spread is None else spread[i]
        x = np.arange(DIMENSIONS) + offsets[i]
        left.errorbar(x, ratios[i], error, fmt=MARKERS[i % len(MARKERS)], color=colours[i], ms=5.5, lw=1, label=name)
    low, high = min(0.5, ratios[ratios > 0].min(initial=1.0) / 1.15), max(1.6, ratios.max() * 1.15)
    left.set(
        yscale="log", ylim=(low, high), xticks=range(DIMENSIONS), ylabel="variance of samples / exact variance",
        xlabel="dimension: number, exact mean, exact variance", title="Is the variance of each dimension kept?",
    )  # fmt: skip
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if low <= t <= high]
    left.set_yticks(ticks, [f"{t:g}" for t in ticks])
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_xticklabels([f"{d}\n{mean[d]:.2f}\n{variance[d]:.2f}" for d in order])
    if n_seeds > 1:
        left.set_title(f"Is the variance of each dimension kept? Mean ± s.d. of {n_seeds} seeds")
    for i, (key, title) in enumerate(SCORES.items()):
        axes = figure.add_subplot(grid[i // 2, 2 + i % 2])
        values = np.array([row[key]["mean"] for row in table.values()])
        error = np.array([row[key]["sd"] for row in table.values()]) if n_seeds > 1 else np.zeros(len(names))
        axes.barh(place, values, xerr=error if n_seeds > 1 else None, color=colours, height=0.7, ecolor="#22303c")
        for y, value, reach in zip(place, values, values + error, strict=True):
            axes.annotate(f"{value:.2g}", (reach, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set(xlim=(0, max((values + error).max(), 1e-12) * 1.3), yticks=place)
        axes.set_title(title, fontsize=10)
        axes.set_yticklabels(names if i % 2 == 0 else [""] * len(names), fontsize=8.5)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(names) + 1), frameon=False
    )
    _record.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, default=1, help="repeat with other data and noise; the table is their mean"
    )
    parser.add_argument("--only", nargs="*", help="names of contestants; all of them otherwise")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "toy.json")
    a = parser.parse_args()
    began = time.perf_counter()
    entered = contestants()
    if unknown := set(a.only or ()) - set(entered):
        parser.error(f"no contestant is called {', '.join(sorted(unknown))}; choose from {', '.join(entered)}")
    runs = {}
    for name in a.only or entered:
        runs[name] = [one(entered[name], seed) for seed in range(a.seeds)]
        print(f"{name}: {sum(run['seconds'] for run in runs[name]):.1f} s", file=sys.stderr)
    table = {name: summary(rows) for name, rows in runs.items()}
    print(
        f"{'':<30} {'var ratio min..max':>20} {'mean ratio':>14} " + " ".join(f"{key:>10}" for key in SCORES), "  calls"
    )
    for name, row in table.items():
        spread, level = np.array(row["variance_ratio"]["mean"]), np.array(row["mean_ratio"]["mean"])
        print(
            f"{name:<30} {spread.min():>13.3f}..{spread.max():.3f}  {level.min():>7.3f}..{level.max():.3f} "
            + " ".join(f"{row[key]['mean']:>10.4g}" for key in SCORES)
            + f" {row['network_calls']['mean']:>8.0f}"
        )
    mu, alpha = parameters()
    mean, variance = exact_moments()
    test = toy(TEST, numpy_generator(0, "toy", "test"))
    _record.write(a.out, began, {
        "data": {
            "train": TRAIN, "test": TEST, "mu": mu.tolist(), "alpha": alpha.tolist(), "exact_mean": mean.tolist(),
            "exact_variance": variance.tolist(), "zeros": float((test == 0).mean()), "max": int(test.max()),
            "sd": float(test.std()),
        },
        "summary": table,
        "runs": runs,
    })  # fmt: skip
    draw(table, a.out.with_suffix(".png"), a.seeds)


if __name__ == "__main__":
    main()
