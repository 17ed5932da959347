"""A task on files before and after a change of its engine: CPU and wall seconds, one process and two.

    git worktree add /tmp/before e8b3cfd
    python benchmarks/batch_engines.py --before /tmp/before --out benchmarks/results/batch_engines.json

Made counts (gamma-Poisson), a small model trained for some steps, one mean and one draw for a tenth of the entries.
Every run is a command of its own with one thread a process: ``one process``; ``2 ranks`` of ``accelerate launch`` on
CPUs; ``2 workers`` of a dask cluster on this machine. Both versions run in turn, within each round, on the same store,
model, mask, batch and shard size. CPU seconds are those of the command and of all processes that it started, start and
imports included. The files of all results are compared byte by byte.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINES = ("one process", "2 ranks", "2 workers")
HERE = Path(__file__).parents[1]
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2.yaml")
FIXED = ("--layers", "mean,draws,mask,ood", "--batch-size", "512", "--shard-cells", "2048")


def prepare(folder: Path, cells: int, genes: int) -> None:
    """A store, a mask and a model that was trained for some steps, all of this version."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp
    import yaml

    from distdiff import experiment
    from distdiff.config import load
    from distdiff.data.ingest.shard import shard

    rng = np.random.default_rng(0)
    mean = rng.gamma(0.25, 1.6, genes).clip(0.01)
    parts = [
        sp.csr_matrix(rng.poisson(rng.gamma(2.0, 0.5, (min(5000, cells - start), 1)) * mean).astype(np.float32))
        for start in range(0, cells, 5000)
    ]
    obs = pd.DataFrame(index=[f"c{i}" for i in range(cells)])
    counts = ad.AnnData(
        sp.vstack(parts, format="csr"), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    )
    counts.write_h5ad(folder / "counts.h5ad")
    manifest = shard(folder / "counts.h5ad", folder / "atlas.zarr", workers=0, progress=False)
    mask = sp.random(manifest.n_cells, genes, 0.1, "csr", random_state=rng).astype(bool)
    sp.save_npz(folder / "mask.npz", mask)
    config = {
        "data": {"store": str(folder / "atlas.zarr"), "labels": []},
        "denoiser": {"kind": "mlp", "width": 64, "depth": 2},
        "train": {"out": str(folder / "run"), "cells": 5120, "batch": 256, "eval_cells": 5120,
                  "checkpoint_cells": 5120},
        "evaluate": {"enabled": False}, "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    experiment.train(load(folder / "train.yaml", []))


def on_workers(arguments: list[str]) -> None:
    """What the command of ``2 workers`` does: a cluster of this machine, and the job on it, in either version."""
    from dask.distributed import LocalCluster

    import distdiff
    from distdiff import batch

    model, data, mask, out = arguments
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        batch.on_cluster(
            cluster.scheduler_address, "impute", functools.partial(distdiff.load, model), data, out, mask=mask,
            layers=("mean", "draws", "mask", "ood"), batch_size=512, shard_cells=2048,
        )  # fmt: skip


def measured(engine: str, root: Path, folder: Path, out: Path) -> dict[str, float]:
    """Wall and CPU seconds of one command with the package in ``root``."""
    given = [str(folder / name) for name in ("run/model", "atlas.zarr", "mask.npz")]
    words = ["--model", given[0], "--data", given[1], "--mask", given[2], "--out", str(out), *FIXED]
    command = {
        "one process": ["-m", "distdiff.cli", "impute", *words],
        "2 ranks": [*LAUNCH, "launch/impute.py", *words],
        "2 workers": [__file__, "--on-workers", *given, str(out)],
    }[engine]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    environment = {**os.environ, "PYTHONPATH": str(root), **threads}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *command], cwd=root, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{engine} in {root.name} failed: {log.read().decode()[-3000:]}")
    return {"wall": time.perf_counter() - began, "cpu": used.ru_utime + used.ru_stime}


def content(out: Path) -> str:
    """One checksum of all files of a result, but for those that tell of the run itself."""
    found = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and name != "zarr.json" and not name.startswith("uns/distdiff"):
            found.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def commit(root: Path) -> str:
    """The commit of a working tree."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=root).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a working tree of the version to compare with")
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--on-workers", nargs=4, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.on_workers:
        on_workers(a.on_workers)
        return
    import _record

    began = time.perf_counter()
    roots = {"before": a.before.resolve(), "after": HERE}
    runs: dict[str, dict[str, list[dict[str, float]]]] = {e: {name: [] for name in roots} for e in ENGINES}
    checksums = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, a.cells, a.genes)
        for engine in ENGINES * a.rounds:
            for version, root in roots.items():
                out = folder / "out.zarr"
                runs[engine][version].append(measured(engine, root, folder, out))
                checksums.add(content(out))
                shutil.rmtree(out)
                print(engine, version, {k: round(v, 1) for k, v in runs[engine][version][-1].items()}, flush=True)
    least: dict[str, Any] = {
        engine: {v: {k: min(run[k] for run in found) for k in ("wall", "cpu")} for v, found in by_version.items()}
        for engine, by_version in runs.items()
    }
    _record.write(a.out, began, {
        "commits": {name: commit(root) for name, root in roots.items()}, "load": os.getloadavg(), "cells": a.cells,
        "genes": a.genes, "same_bytes": len(checksums) == 1, "least_seconds": least, "seconds_of_each_run": runs,
    })  # fmt: skip
    print(json.dumps(least, indent=1), "same bytes:", len(checksums) == 1)


if __name__ == "__main__":
    main()
