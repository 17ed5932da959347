"""Which denoiser when: held-out scores against seconds of training, and cells per second against genes.

    python benchmarks/denoisers.py --data F.h5ad --genes hvg:1000 --seconds 240 --out benchmarks/results/denoisers.json

Scores: every network has the same seconds of training on one thread (as many cells as it then sees; the schedule of the
learning rate spans them; validation is not counted), the same law, mixture, optimiser and seed; two networks run at a
time. Half of the entries of held-out cells are hidden: ``log score`` in nats of a hidden entry under the one-call law,
``deviance`` and ``rmse`` of the mean. Speed: made counts (90 % zeros), one thread: cells per second
of a training step (draw, forward, loss, backward, optimiser) and of the posterior mean, half of the genes hidden; MiB
by which a training step raises the process's peak memory. What takes longer than ``--patience`` seconds is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch

SMALL = {"width": 64, "depth": 2, "heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "mlp, rank 64": {"kind": "mlp", "rank": 64},
    "latent": {"kind": "latent"},
    "latent, tokens alone": {"kind": "latent", "shortcut": False},
    "lsh": {"kind": "lsh", **SMALL, "bucket": 32},
    "transformer": {"kind": "transformer", **SMALL},
    "transformer, tokens alone": {"kind": "transformer", **SMALL, "shortcut": False},
    "transformer, packed": {"kind": "transformer", **SMALL, "pack": True},
    "csdi": {"kind": "csdi"},
    "csdi, gene embedding": {"kind": "csdi", "gene_embedding": True},
}
POINTS = 8  # of a curve


def settings(denoiser: dict[str, Any], store: str, seed: int, cells: int, points: int, batch: int) -> dict[str, Any]:
    return {
        "data": {"store": store}, "process": {"kind": "counts"}, "denoiser": denoiser,
        "optim": {"warmup_cells": max(1, min(10_000, cells // 20))},
        "train": {"out": tempfile.mkdtemp(), "cells": cells, "batch": batch, "seed": seed,
                  "eval_cells": max(1, cells // points), "checkpoint_cells": 10**9, "patience": 10**6,
                  "resume": "never"},
    }  # fmt: skip


def trained(
    denoiser: dict[str, Any], store_path: str, seconds: float, seed: int, *, batch: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Curve of one network: seconds of training, cells seen, scores of the best weights so far."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from distdiff import config
    from distdiff.data.masks import mcar
    from distdiff.data.store.store import CountStore
    from distdiff.model import Model
    from distdiff.process._laws import nb_nll
    from distdiff.rng import numpy_generator
    from distdiff.sampling import predictor
    from distdiff.training.loop import Hooks, train
    from distdiff.training.settings import Recipe

    store, device = CountStore.open(store_path), torch.device(device)
    batch = batch or (128 if denoiser["kind"] == "mlp" else 32)
    rows = store.rows("test")
    cells = store.cells(rows, ()).to(device)
    shape = tuple(cells.counts.shape)
    hidden = torch.from_numpy(mcar(shape, 0.5, numpy_generator(seed, "denoisers"))).to(device)

    def score(process: Any, network: Any) -> dict[str, float]:
        nats, dev, square = [], [], []
        with torch.no_grad():
            for start in range(0, len(rows), 64):
                truth, target = cells.counts[start : start + 64], hidden[start : start + 64]
                x, p = torch.where(target, 0.0, truth), (~target).float()
                eta = predictor(process, network, cells.labels[start : start + 64])(x, p)
                mean, size = process.mean(eta, x, p), process.log_size(eta)
                nats.append(nb_nll(truth, process.lost(eta, p), size)[target])
                mean, truth = mean[target].clamp_min(1e-6).double(), truth[target].double()
                dev.append(2 * (mean - truth + torch.xlogy(truth, truth / mean)))
                square.append((mean - truth).square())
        n, d, s = (torch.cat(parts).mean().item() for parts in (nats, dev, square))
        return {"log score": n, "deviance": d, "rmse": s**0.5}

    def run(cells_to_see: int, points: int = 1) -> tuple[list[dict[str, float]], Any]:
        curve: list[dict[str, float]] = []
        parsed = config.parse(settings(denoiser, store_path, seed, cells_to_see, points, batch))
        model = Model.new(store.spec(()), parsed.process, parsed.denoiser, seed=seed)

        def log(seen: int, numbers: dict[str, float]) -> None:
            before = curve[-1] if curve else {"seconds": 0.0, "cells": 0, "log score": float("nan")}
            spent = before["seconds"] + (seen - before["cells"]) / numbers["cells_per_second"]
            curve.append({**before, "seconds": spent, "cells": seen, "val": numbers["val/deviance"]})

        def best(network: Any, numbers: dict[str, float]) -> None:
            curve[-1] |= score(model.process, network)

        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no" if device.type == "cpu" else "bf16")
        recipe = Recipe(store, model.process, model.denoiser, parsed.survival, parsed.optim, parsed.train)
        train(recipe, accelerator, Hooks(best, on_log=log), identity={})
        return curve, model

    rate = batch * 2 / run(batch * 2)[0][-1]["seconds"]  # the first steps are slow ones
    steps = max(3, int(4 * rate / batch))
    rate = steps * batch / run(steps * batch)[0][-1]["seconds"]
    curve, model = run(max(POINTS * batch, int(seconds * rate)), POINTS)
    return {"weights": sum(w.numel() for w in model.denoiser.parameters()), "curve": curve}


def speed(name: str, genes: int, seed: int) -> dict[str, Any]:
    """Cells per second of a training step and of the posterior mean; peak MiB of a step."""
    from distdiff.model import Model
    from distdiff.process.survival import Survival
    from distdiff.rng import generator
    from distdiff.training.optim import Optim
    from distdiff.types import Condition, DataSpec

    kind = VARIANTS[name]["kind"]
    cells = 128 if kind == "mlp" else max(1, min(32, 40_000 // genes))
    chance = np.random.default_rng(seed)
    mean = chance.gamma(0.25, 0.6, genes).astype(np.float32)
    spec = DataSpec(tuple(map(str, range(genes))), {}, mean)
    model = Model.new(spec, {"kind": "counts"}, VARIANTS[name], seed=seed)
    process, network, optimizer = model.process, model.denoiser, Optim().build(model.denoiser)
    counts = torch.from_numpy(chance.poisson(chance.gamma(2.0, mean / 2, (cells, genes))).astype(np.float32))
    survival, none = Survival(), Condition()

    def step(number: int) -> None:
        rng = generator(seed, "speed", number)
        p, _ = survival.draw(process.schedule, rng.uniform(cells, 1), genes, rng=rng)
        x = process.forward(counts, 1.0, p, rng=rng)
        entries = process.loss(process.natural(network(*process.encode(x, p), none), x, p), counts, x, p)
        (entries.sum(1) / (p < 1).sum(1).clamp_min(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def mean_of(number: int) -> None:
        p = (generator(seed, "ask", number).uniform(cells, genes) < 0.5).float()
        x = counts * p
        with torch.no_grad():
            process.mean(process.natural(network(*process.encode(x, p), none), x, p), x, p)

    def median(call: Any) -> float:
        took = []
        while len(took) < 5 and (not took or sum(took) < 20):
            began = time.perf_counter()
            call(len(took))
            took.append(time.perf_counter() - began)
        return float(np.median(took[1:] or took))

    with _record.Peak() as peak:
        trains = median(step)
    network.eval()
    return {"genes": genes, "batch": cells, "train cells/s": cells / trains, "mean cells/s": cells / median(mean_of),
            "peak MiB": peak.mib, "zeros": float((counts == 0).float().mean())}  # fmt: skip


def child(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, "--child", *words], stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str], patience: float | None = None) -> Any:
    try:
        out, _ = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def draw(scores: dict[str, Any], speeds: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = [("nats of a hidden count", "seconds", "log score"), ("RMSE of hidden counts", "seconds", "rmse")]
    panels = panels if scores else []
    if speeds:
        panels += [
            ("cells per second of training", "genes", "train cells/s"),
            ("peak MiB a cell", "genes", "MiB a cell"),
        ]
    figure = Figure(figsize=(4.6 * len(panels), 4), layout="constrained")
    for axes, (title, x, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(VARIANTS):
            rows = speeds.get(name, []) if x == "genes" else scores.get(name, {}).get("curve", [])
            rows = [r | {"MiB a cell": r["peak MiB"] / r["batch"]} if "batch" in r else r for r in rows]
            if rows:
                axes.plot([r[x] for r in rows], [r[y] for r in rows], color=f"C{number}", marker="o", ms=3, label=name)
        if x == "genes":
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("seconds of training" if x == "seconds" else x, fontsize=9)
    figure.axes[0].legend(fontsize=7)
    _record.save(figure, path)


def table(scores: dict[str, Any], speeds: dict[str, Any]) -> str:
    """Both halves as Markdown."""
    lines = ["| denoiser | weights | cells seen | log score | deviance | RMSE |", "| --- |" + " ---: |" * 5]
    for name, found in scores.items():
        last = found["curve"][-1]
        lines.append(f"| {name} | {found['weights']:,} | {last['cells']:,} | {last['log score']:.4f} | "
                     f"{last['deviance']:.3f} | {last['rmse']:.2f} |")  # fmt: skip
    if not speeds:
        return "\n".join(lines)
    genes = sorted({row["genes"] for rows in speeds.values() for row in rows})
    heads = [f"{n:,} genes: train, mean, MiB a cell" for n in genes]
    lines += ["", "| denoiser | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(genes)]
    for name, rows in speeds.items():
        by_genes = {r["genes"]: r for r in rows}
        cells = [
            f"{r['train cells/s']:.3g}, {r['mean cells/s']:.3g}, {r['peak MiB'] / r['batch']:.2g}"
            if (r := by_genes.get(n))
            else "-"
            for n in genes
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--genes", default="hvg:1000")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--speed-genes", type=int, nargs="*", default=[200, 1000, 5000, 20_000])
    parser.add_argument("--patience", type=float, default=120)
    parser.add_argument("--kinds", nargs="*", default=list(VARIANTS), help="some of: " + "; ".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="*")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.child:
        what, *words = a.child
        found = trained(
            VARIANTS[words[0]], words[1], float(words[2]), int(words[3])
        ) if what == "train" else speed(
            words[0], int(words[1]), int(words[2])
        )  # fmt: skip
        print(json.dumps(found))
        return

    from distdiff.data.ingest.shard import shard

    began = time.perf_counter()
    previous = json.loads(a.out.read_text()) if a.out.exists() else {}
    scores, speeds = previous.get("scores", {}), {}
    if a.data:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "x.zarr"
            shard([a.data], store, genes=a.genes, workers=0, progress=False)
            names = a.kinds
            for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
                running = {n: child("train", n, str(store), str(a.seconds), str(a.seed)) for n in pair}
                for name, process in running.items():
                    scores[name] = answer(process)
                    last = scores[name]["curve"][-1]
                    print(f"{name:<22} {scores[name]['weights']:>10,} weights {last['cells']:>8} cells "
                          f"log score {last['log score']:.4f} deviance {last['deviance']:.4f} rmse {last['rmse']:.3f}",
                          flush=True)  # fmt: skip
    for name in a.kinds if a.speed_genes else ():
        for genes in a.speed_genes:
            found = answer(child("speed", name, str(genes), str(a.seed)), a.patience)
            if found is None:
                print(f"{name:<22} {genes:>6} genes: longer than {a.patience:.0f} s")
                break
            speeds.setdefault(name, []).append(found)
            print(f"{name:<22} {genes:>6} genes {found['train cells/s']:>9.1f} cells/s training "
                  f"{found['mean cells/s']:>9.1f} mean {found['peak MiB']:>7.0f} MiB", flush=True)  # fmt: skip
    speeds = speeds or previous.get("speeds", {})
    data = {"data": a.data.name, "genes": a.genes, "seconds": a.seconds} if a.data else previous.get("setting", {})
    _record.write(a.out, began, {"setting": data, "variants": VARIANTS, "scores": scores, "speeds": speeds})
    draw(scores, speeds, a.out.with_suffix(".png"))
    print(table(scores, speeds))


if __name__ == "__main__":
    main()
