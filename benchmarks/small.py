"""What helps a network that sees few cells? The default recipe against one change at a time.

    python benchmarks/small.py --data pbmc3k.h5ad baron.h5ad --out benchmarks/results/small.json [--only thinned]

Changes that are no option of the package are made here, by replacing one method while a network trains. ``dense`` in
place of a file is a simulated set: 1,600 cells x 1,000 genes, 12 molecules an entry, rates linear in 12 programmes.
Scores are those of benchmarks/defaults.py, with and without the blend (docs/MATHS.md 5.10). ``sigmas``: standard errors
of the paired difference over cells by which a change is worse than the default (negative: better). ``another seed`` is
the default again, its weights and batches drawn anew: the noise that a change has to be larger than. ``snapshots`` and
``two networks`` train nothing: means of the answers of the default's averaged weights at four checks of the second half
of its training, and of the default and the other seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import _record
import anndata as ad
import numpy as np
import torch
from defaults import SHOWN, Hidden, Law, in_errors, score, store_of, trained
from scipy import sparse
from torch import nn

from distdiff.denoise import mlp
from distdiff.model import Model
from distdiff.training import loop
from distdiff.training.noise import Noise
from distdiff.training.optim import Optim

SCORES = tuple(name for name in SHOWN if name not in ("RMSE", "energy", "correlation"))
"""Those that are means over cells."""


def thinned() -> Any:
    """Half of the cells as if sequenced less deeply: 30 to 100 % of their molecules, evidence and targets alike."""
    draw = Noise.draw

    def of_fewer(self: Noise, cells: Any, step: int, first: int) -> Any:
        rng = torch.Generator().manual_seed(first)
        share, some = 0.3 + 0.7 * torch.rand(len(cells), 1, generator=rng), torch.rand(len(cells), 1, generator=rng)
        share = torch.where(some < 0.5, share, 1.0).expand_as(cells.counts).contiguous()
        fewer = torch.binomial(cells.counts, share, generator=rng)
        return draw(self, dataclasses.replace(cells, counts=fewer), step, first)

    return mock.patch.object(Noise, "draw", of_fewer)


def dropout(rate: float = 0.1) -> Any:
    """Dropout of the residual branches."""

    def forward(self: Any, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        y, gate = self.norm(h, c)
        return h + nn.functional.dropout(gate * self.branch(y), rate, self.training)

    return mock.patch.object(mlp._Block, "forward", forward)


def input_dropout(rate: float = 0.2) -> Any:
    """Dropout of the evidence, beyond what is hidden."""
    embedded = mlp.Expectation.forward

    def forward(self: Any, x: torch.Tensor, p: torch.Tensor) -> Any:
        log_depth, surprise = embedded(self, x, p)
        return log_depth, nn.functional.dropout(surprise, rate, self.training)

    return mock.patch.object(mlp.Expectation, "forward", forward)


def stable_then_decay(share: float = 0.25) -> Any:
    """Learning rate: warm-up, constant, and linear to 0 in the last quarter."""

    def rate(self: Optim, seen: int, total: int) -> float:
        warm = min(1.0, (seen + 1) / max(1, self.warmup_cells))
        return self.lr * warm * min(1.0, max(0.0, (1 - seen / max(1, total)) / share))

    return mock.patch.object(Optim, "rate", rate)


VARIANTS: dict[str, tuple[Any, list[str]]] = {
    "thinned": (thinned, []),
    "dropout": (dropout, []),
    "input dropout": (input_dropout, []),
    "stable, then decay": (stable_then_decay, []),
    "weight decay .3": (contextlib.nullcontext, ["optim.weight_decay=0.3"]),
    "width 128": (contextlib.nullcontext, ["denoiser.width=128"]),
    "width 512": (contextlib.nullcontext, ["denoiser.width=512"]),
    "learning rate .003": (contextlib.nullcontext, ["optim.lr=0.003"]),
}


def dense(path: Path, cells: int = 1600, genes: int = 1000, programmes: int = 12, mean: float = 12.0) -> None:
    """Counts whose rates are linear in a few programmes, negative binomial with size 8."""
    rng = np.random.default_rng(0)
    of_cells = rng.gamma(0.6, size=(cells, programmes))
    rate = of_cells @ (rng.gamma(0.5, size=(programmes, genes)) * rng.lognormal(0, 1.0, genes))
    rate *= rng.lognormal(0, 0.35, (cells, 1)) / rate.mean() * mean
    counts = ad.AnnData(sparse.csr_matrix(rng.poisson(rng.gamma(8, rate / 8)).astype(np.float32)))
    counts.var_names, counts.obs_names = [f"gene{i}" for i in range(genes)], [f"cell{i}" for i in range(cells)]
    counts.write_h5ad(path)


@contextlib.contextmanager
def remembered(kept: list[dict[str, torch.Tensor]]) -> Iterator[None]:
    """While it lasts, the averaged weights of every check of a training are added to ``kept``, up to the best ones."""
    check, best = loop.validate, 0

    def checked(run: loop.Run) -> None:
        nonlocal best
        check(run)
        kept.append({name: weight.detach().clone() for name, weight in run.ema.model.state_dict().items()})
        best = len(kept) if run.progress.improved else best

    with mock.patch.object(loop, "validate", checked):
        yield
    del kept[best:]


Laws = dict[str, Law]
"""The answer with the blend (the name is empty) and the network's alone."""


def laws(model: Model, test: Hidden) -> Laws:
    return {"": test.law(model), ", network alone": test.law(model, blend=False)}


def mean_of(several: list[Laws]) -> Laws:
    """Means of means, and geometric means of sizes."""
    return {
        answer: tuple(np.mean([of[answer][part] for of in several], 0) for part in range(2)) for answer in several[0]
    }


def of_snapshots(model: Model, kept: list[dict[str, torch.Tensor]], test: Hidden, number: int = 4) -> Laws:
    """Of a model whose weights are those of several checks of the second half, in turn."""
    found = []
    for i in np.unique(np.linspace(len(kept) // 2, len(kept) - 1, number).round().astype(int)):
        model.denoiser.load_state_dict(kept[i])
        found.append(laws(model, test))
    return mean_of(found)


def compared(data: Path, seed: int, only: list[str], genes: int, n_cells: int) -> Iterator[dict[str, Any]]:
    """A record for each change and answer, the default first."""
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(data, genes, n_cells, seed, Path(folder))
        test, base, kept = Hidden(store, "test", seed), {}, []

        def rows(label: str, found: Laws, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
            for answer, law in found.items():
                scores, cells = score(law, test, store, seed)
                first = base.setdefault(answer, cells)
                sigmas = {name: in_errors(cells[name] - first[name]) for name in SCORES}
                yield {"set": data.stem, "seed": seed, "row": label + answer, **about, **scores, "sigmas": sigmas}

        networks = {}
        for label in ("default", *only, "another seed"):
            change, words = VARIANTS.get(label, (contextlib.nullcontext, []))
            if label == "another seed":
                words = [f"train.seed={seed + 100}"]
            with remembered(kept) if label == "default" else contextlib.nullcontext(), change():
                model, seconds, seen = trained(store, Path(folder) / label, words, seed)
            networks[label] = laws(model, test)
            about = {"cpu_seconds": round(seconds), "cells_seen": seen, "blend": model.info["blend"]["weight"]}
            yield from rows(label, networks[label], about)
            if label == "default":
                yield from rows("snapshots", of_snapshots(model, kept, test), about | {"checks": len(kept)})
        both = [networks["default"], networks["another seed"]]
        yield from rows("two networks", mean_of(both), {"cpu_seconds": 2 * round(seconds)})


def arguments(text: str | None) -> argparse.ArgumentParser:
    """Data sets, genes, cells, seeds and where the results go."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="h5ad files with raw counts, or dense")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--cells", type=int, default=2400, help="cells of a larger file that are taken, by chance")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def splits(data: list[str], seeds: int) -> Iterator[tuple[Path, int]]:
    """Each file with each seed; ``dense`` is made while it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        for word in data:
            path = Path(word)
            if word == "dense":
                dense(path := Path(folder) / "dense.h5ad")
            yield from ((path, seed) for seed in range(seeds))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    for path, seed in splits(a.data, a.seeds):
        for row in compared(path, seed, a.only, a.genes, a.cells):
            rows.append(row)
            print(
                f"{row['set']:<22}{seed} {row['row']:<36}{row['cpu_seconds']:>4} s "
                + " ".join(f"{row[name]:8.4f}" for name in SHOWN)
                + f"  {row['sigmas']}",
                flush=True,
            )
            _record.write(a.out, began, {"rows": rows})


if __name__ == "__main__":
    main()
