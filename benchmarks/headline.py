"""Are the quickstart's headlines luck? The same experiment over several seeds (split, weights, masks, draws).

    python benchmarks/headline.py --seeds 5 --out benchmarks/results/headline.json [--data FILE.h5ad --cell-type KEY]

For each seed: shard with that split, train, evaluate on the held-out cells. Prints and stores, for the three headline
metrics, every row's mean over seeds, and how often each row was first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from distdiff import config, experiment, quickstart
from distdiff.data.shard import shard

HEADLINES = ("deviance", "crps", "energy")


def one(data: Path, cell_type: str | None, genes: str, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    store = folder / f"atlas{seed}.zarr"
    labels = (cell_type,) if cell_type else ()
    shard([data], store, genes=genes, labels=labels, seed=seed, workers=0, progress=False)
    tree = quickstart.settings(store, folder / f"run{seed}", cell_type, "headline")
    tree["train"]["seed"] = seed
    tree["tracking"]["enabled"] = False
    report = experiment.train(config.parse(tree)).report
    return {r.name: {m: r.values[m] for m in HEADLINES} for r in report.rows if r.note != "control"}


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    out = {}
    for metric in HEADLINES:
        value = {name: np.array([run[name][metric] for run in runs]) for name in runs[0]}
        best = np.min(list(value.values()), axis=0)
        out[metric] = {
            name: {"mean": float(v.mean()), "sd": float(v.std()), "first": int((v == best).sum())}
            for name, v in sorted(value.items(), key=lambda item: item[1].mean())
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cell-type")
    parser.add_argument("--genes", default="all")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder, data, cell_type = Path(name), a.data, a.cell_type
        if data is None:
            data, cell_type = folder / "counts.h5ad", "bulk_labels"
            quickstart.demo_counts(data)
        runs = [one(data, cell_type, a.genes, seed, folder) for seed in range(a.seeds)]
    table = summary(runs)
    for metric, rows in table.items():
        print(f"\n{metric}: mean over {a.seeds} seeds (sd), times first")
        for row, numbers in list(rows.items())[:8]:
            print(f"  {row:<32} {numbers['mean']:.4f} ({numbers['sd']:.4f})  {numbers['first']}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    result = {
        "command": "python benchmarks/headline.py "
        + " ".join(Path(w).name if os.sep in w else w for w in sys.argv[1:]),
        "commit": commit.stdout.strip(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - began),
        "data": data.name,
        "summary": table,
        "runs": runs,
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
