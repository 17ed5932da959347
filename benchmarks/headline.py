"""Are the quickstart's headlines luck? The same experiment over several seeds (split, weights, masks, draws).

    python benchmarks/headline.py --seeds 5 --out benchmarks/results/headline.json [--data FILE.h5ad --cell-type KEY]
    python benchmarks/headline.py page benchmarks/results/headline_baron.json

For each seed: shard with that split, train, evaluate on the held-out cells. Prints and stores, for the three headline
metrics, every row's mean over seeds, and how often each row was first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import _record
import numpy as np

from distdiff import component, config, experiment, heldout, quickstart
from distdiff.baselines import Baseline
from distdiff.data.ingest.shard import shard
from distdiff.data.store.store import CountStore
from distdiff.evaluation import Contestant
from distdiff.model import Model

HEADLINES = {
    "deviance": "Poisson deviance", "log1p_mse": "log1p MSE", "rmse": "RMSE", "crps": "CRPS",
    "energy": "energy distance",
}  # fmt: skip


def one(
    data: Path, cell_type: str | None, genes: str, seed: int, folder: Path, peers: list[str]
) -> dict[str, dict[str, float]]:
    store = folder / f"atlas{seed}.zarr"
    labels = (cell_type,) if cell_type else ()
    shard([data], store, genes=genes, labels=labels, seed=seed, workers=0, progress=False)
    tree = quickstart.settings(store, folder / f"run{seed}", cell_type, "headline")
    tree["train"]["seed"] = seed
    tree["tracking"]["enabled"] = False
    tree["evaluate"]["enabled"] = False
    settings = config.parse(tree)
    model = Model.load(experiment.train(settings).model)
    made = [component.build(Baseline, {"kind": kind}) for kind in peers]
    extra = [Contestant(peer.label, peer) for peer in made]
    report = heldout.evaluate_model(model, CountStore.open(store), settings.evaluate, seed=seed, extra=extra)
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


def page(results: dict[str, Any], best: int = 5) -> str:
    """The best rows of each score, as Markdown."""
    seeds, lines = len(results["runs"]), ["| | best rows |", "| --- | --- |"]
    for metric, rows in results["summary"].items():
        said = (f"{row} {n['mean']:.4f} ({n['sd']:.4f}), first {n['first']} of {seeds}" for row, n in rows.items())
        lines.append(f"| {HEADLINES[metric]} | {'; '.join(islice(said, best))} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["page"]:
        print("\n\n".join(page(json.loads(Path(file).read_text())) for file in sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cell-type")
    parser.add_argument("--genes", default="all")
    parser.add_argument("--peers", nargs="*", default=[], help="more baselines: magic nmf scvi")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder, data, cell_type = Path(name), a.data, a.cell_type
        if data is None:
            data, cell_type = folder / "counts.h5ad", "bulk_labels"
            quickstart.demo_counts(data)
        runs = [one(data, cell_type, a.genes, seed, folder, a.peers) for seed in range(a.seeds)]
    table = summary(runs)
    for metric, rows in table.items():
        print(f"\n{metric}: mean over {a.seeds} seeds (sd), times first")
        for row, numbers in list(rows.items())[:8]:
            print(f"  {row:<32} {numbers['mean']:.4f} ({numbers['sd']:.4f})  {numbers['first']}")
    _record.write(a.out, began, {"data": data.name, "summary": table, "runs": runs})


if __name__ == "__main__":
    main()
