"""What imputation costs: cells a second and memory, network alone and end to end, against the published recipe's shape.

    python benchmarks/impute.py --out benchmarks/results/impute.json [--cells 20000 --genes 1000 2000 20000]

Untrained weights on made counts (gamma-Poisson), one thread, a mask of 10 % of the entries. Rates are cells per second
of CPU time of the process, all its threads together. ``parts``: reading, network and draws, writing, each alone, in
turn within each round (medians). ``end to end``: one job from a store to a finished .zarr, planning, joining and
finishing included. Memory: the peak of a process of its own for each number of cells. Quality is not measured here but
quoted from ``quality.py``, which compares draws with the published recipe's after equal training.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import numpy as np
import scipy.sparse as sp
import torch

from distdiff import batch, files
from distdiff.batch import local, output
from distdiff.batch.layout import Layout, fetched
from distdiff.batch.summary import peak_mib
from distdiff.data.ingest.shard import shard
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.rng import numpy_generator
from distdiff.types import DataSpec

TASKS = {"mean": {"layers": ("mean",)}, "1 draw": {"draws": 1, "layers": ("mean", "draws")},
         "5 draws": {"draws": 5, "layers": ("mean", "draws")}}  # fmt: skip
DENOISERS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"}, "mlp, rank 64": {"kind": "mlp", "rank": 64}, "latent": {"kind": "latent"},
    "lsh": {"kind": "lsh"}, "transformer": {"kind": "transformer"},
}  # fmt: skip
PUBLISHED = {"kind": "transformer", "width": 64, "depth": 3, "heads": 4, "shortcut": False}
PASSES = 114  # network calls a cell: 19 steps x 3 passes of RePaint x 2 branches of guidance, the published defaults
MEASURED = 0.50  # cells per CPU-second of CountsDiff's published code at 1,000 genes, on one thread of such a machine


def spec_of(genes: int) -> DataSpec:
    mean = numpy_generator(0, "impute", genes).gamma(0.25, 1.6, genes).clip(0.01).astype(np.float32)
    return DataSpec(tuple(f"g{i}" for i in range(genes)), {}, mean)


def counts_of(spec: DataSpec, cells: int, part: int) -> sp.csr_matrix:
    rng = numpy_generator(1, "impute", part)
    rate = rng.gamma(2.0, 0.5, (cells, 1)) * spec.gene_mean
    return sp.csr_matrix(rng.poisson(rate).astype(np.float32))


def made(folder: Path, spec: DataSpec, cells: int) -> Path:
    """A store of made cells, in pieces so that it needs little memory."""
    import anndata as ad
    import pandas as pd

    inputs = []
    for part, start in enumerate(range(0, cells, 20_000)):
        n = min(20_000, cells - start)
        obs = pd.DataFrame(index=[f"c{start + i}" for i in range(n)])
        path = folder / f"{part}.h5ad"
        ad.AnnData(counts_of(spec, n, part), obs=obs, var=pd.DataFrame(index=list(spec.genes))).write_h5ad(path)
        inputs.append(path)
    store = folder / f"x{cells}_{spec.n_genes}.zarr"
    shard(inputs, store, workers=0, progress=False)
    for path in inputs:
        path.unlink()
    return store


class Mask:
    """A tenth of the entries, made when they are asked for: a file would be as large as the atlas."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.block = numpy_generator(0, "impute", "mask").random((1024, shape[1]), dtype=np.float32) < 0.1

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.block[np.arange(rows.start, rows.stop) % 1024]


def task_of(model: Model, store: Path, out: Path, options: dict[str, Any]) -> Any:
    from distdiff.batch import tasks

    real, tasks._mask = tasks._mask, lambda rows, *_: Mask((rows.n_cells, len(rows.genes)))
    try:
        return batch.make_task("impute", model, store, out, mask="made", **options)
    finally:
        tasks._mask = real


def cpu(call: Any) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def parts(
    model: Model, store: Path, folder: Path, options: dict[str, Any], patience: float, size: int
) -> dict[str, float]:
    """Microseconds of CPU time a cell of each part of a job."""
    task = task_of(model, store, folder / "x.zarr", options)
    task.model.denoiser.eval()
    block = task.read(0, size)
    evidence = model.process.encode(block.cells.counts, block.observed.float())
    fields = [f if f.sparse is not None else type(f)(f.path, f.dtype, f.width, False) for f in task.fields]
    with torch.no_grad():
        values, _ = task.compute(block)
    layout = Layout.fit(size, fields, size)
    done = {f.path: fetched(values[f.path], f) for f in fields if f.path in values}
    labels = task.labels(0, size)
    calls = {
        "network": lambda: model.denoiser(*evidence, block.cells.labels),
        "read": lambda: task.read(0, size),
        "compute": lambda: task.compute(block),
        "write": lambda: output.write_shard(layout, 0, [done], labels, folder / "shard", {}),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    with torch.no_grad():
        while len(took["write"]) < 3 or (len(took["write"]) < 15 and time.perf_counter() - began < patience):
            for name, call in calls.items():
                files.remove(folder / "shard")
                took[name].append(cpu(call) / size * 1e6)
            if time.perf_counter() - began > 4 * patience:
                break
    found = {name: statistics.median(values) for name, values in took.items()}
    steady = found["read"] + found["compute"] + found["write"]
    return {
        **found,
        "cells_per_cpu_second": 1e6 / steady,
        "compute_alone": 1e6 / found["compute"],
    }


def end_to_end(model: Model, store: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    task = task_of(model, store, out, options)
    wall, used = time.perf_counter(), time.process_time()
    filled = local.run(task, out, progress=False)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return {
        "cells": filled.cells, "wall_seconds": wall, "cpu_seconds": used, "cells_per_second": filled.cells / wall,
        "cells_per_cpu_second": filled.cells / used, "bytes_per_cell": size / filled.cells,
    }  # fmt: skip


def _peak(model: str, store: str, out: str, answer: Any) -> None:
    torch.set_num_threads(1)
    task = task_of(Model.load(model), Path(store), Path(out), {"layers": ("mean",)})
    local.run(task, out, progress=False, shard_cells=1024, batch_size=256)
    answer.put(peak_mib())


def peak(model: Path, store: Path, out: Path) -> float:
    """Peak memory of a process that does nothing else, MiB."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak, args=(str(model), str(store), str(out), answer))
    process.start()
    found = answer.get(timeout=600)
    process.join()
    return found


def quality() -> dict[str, Any]:
    """Our draw of one call and of four over the published recipe's of 100, from the results of quality.py."""
    found = {}
    for path in sorted((Path(__file__).parent / "results").glob("quality_*.json")):
        table = json.loads(path.read_text())["table"]
        ours, theirs = table["NB leap"], table["CountsDiff, RePaint"]["100"]
        found[path.name] = {
            calls: {key: ours[calls][key] / theirs[key] for key in ("energy", "swd")} for calls in ("1", "4")
        }
    return found


def draw(table: dict[str, Any], published: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, task in zip(axes, TASKS, strict=True):
        for name in DENOISERS:
            genes = [g for g in table if name in table[g]]
            rates = [table[g][name][task]["cells_per_cpu_second"] for g in genes]
            ax.plot([int(g) for g in genes], rates, "o-", label=name)
        ax.axhline(published["measured_by_reference"], color="black", ls=":", lw=1)
        ax.text(1000, published["measured_by_reference"] * 1.15, "CountsDiff's code, 1,000 genes", fontsize=8)
        ax.set(xscale="log", yscale="log", title=task, xlabel="genes")
    axes[0].set_ylabel("cells per CPU-second, reading and writing included")
    axes[-1].legend(frameon=False, fontsize=8)
    _record.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000, help="of the job end to end")
    parser.add_argument("--genes", type=int, nargs="+", default=[1000, 2000, 20_000])
    parser.add_argument("--patience", type=float, default=4.0, help="seconds for each entry of the table")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for genes in a.genes:
            spec, table[str(genes)] = spec_of(genes), {}
            store = made(folder, spec, 2048)
            genes_spec = CountStore.open(store).spec(())
            for kind, options in DENOISERS.items():
                if genes > 5000 and kind == "transformer":
                    continue
                model = Model.new(genes_spec, {"kind": "counts"}, options)
                size = 512 if kind.startswith("mlp") else 16
                size = size if genes < 5000 else max(4, size // 4)
                row = table[str(genes)][kind] = {}
                for task, asked in TASKS.items():
                    row[task] = parts(model, store, folder, asked, a.patience, size)
                    rate, alone = row[task]["cells_per_cpu_second"], 1e6 / row[task]["network"]
                    said = f"{rate:,.1f} cells per CPU-second, network alone {alone:,.1f}"
                    print(f"{genes}, {kind}, {task}: {said}", flush=True)
        spec = spec_of(1000)
        store = made(folder, spec, 512)
        like_theirs = Model.new(CountStore.open(store).spec(()), {"kind": "counts", "head": "mean"}, PUBLISHED)
        shape = parts(like_theirs, store, folder, TASKS["mean"], a.patience, 16)
        small = Model.new(CountStore.open(store).spec(()), {"kind": "counts"}, PUBLISHED)
        ours = {
            task: parts(small, store, folder, asked, a.patience, 16)
            for task, asked in TASKS.items()
            if task != "5 draws"
        }
        published = {
            "measured_by_reference": MEASURED, "passes": PASSES,
            "their_shape_their_passes": 1e6 / (shape["network"] * PASSES),
            **{f"their_shape_our_{task}": row["cells_per_cpu_second"] for task, row in ours.items()},
        }  # fmt: skip
        published |= {f"ratio_{task}": published[f"their_shape_our_{task}"] / published["their_shape_their_passes"]
                      for task in ours}  # fmt: skip
        print(published, flush=True)
        whole, memory = {}, {}
        store = made(folder, spec, a.cells)
        model = Model.new(CountStore.open(store).spec(()), {"kind": "counts"}, DENOISERS["mlp"])
        model.save(folder / "m")
        end_to_end(model, store, folder / "warm.zarr", TASKS["mean"])  # imports, compiled loops
        for task, asked in TASKS.items():
            whole[task] = end_to_end(model, store, folder / f"{task}.zarr", asked)
            whole[task]["extrapolated_seconds_for_1_000_000_cells"] = 1e6 / whole[task]["cells_per_second"]
            print(f"end to end, {task}:", {k: round(v, 1) for k, v in whole[task].items()}, flush=True)
        for cells in (10_000, 100_000):
            memory[str(cells)] = peak(folder / "m", made(folder, spec, cells), folder / f"peak{cells}.zarr")
        print("peak MiB by cells:", memory, flush=True)
    _record.write(a.out, began, {
        "load": os.getloadavg(), "mask": "10 % of entries", "parts_us_a_cell": table, "published": published,
        "end_to_end_mlp_1000_genes": whole, "peak_mib_by_cells": memory, "draw_over_published_100_steps": quality(),
    })  # fmt: skip
    draw(table, published, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
