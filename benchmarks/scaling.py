"""Cells per second on one and more processes, where the time goes, and what that predicts for many GPUs.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json --page benchmarks/SCALING.md [--rounds 5]

Each round starts one process, then two (gloo on CPUs; on GPUs nccl, and as many as there are), that train the same
global batch with distdiff's loop on made counts (gamma-Poisson). Two processes train twice: as they should, and without
ever exchanging gradients. What the exchange costs is the difference of the two, which leaves out how much two processes
that only share a machine disturb each other. Medians over rounds, with the quartiles. The written model (the page) is
made from these pieces by ``_scaling_model.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _record
import _scaling_model as model
import _scaling_page
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from step import made

from distdiff import config
from distdiff.data.feed.loader import loader
from distdiff.data.feed.plan import Plan
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.rng import generator
from distdiff.training import checkpoint, engine, fit, loop, losses
from distdiff.training.settings import Recipe

SIZES = (32, 64, 128, 256, 512)
"""Cells of the steps that are timed alone."""

NETWORKS = {"small": {}, "large": {"width": 1024, "depth": 4}}
"""MLPs whose steps are counted: distdiff's default, which is the one timed, and one of ten times its weights."""


# --- one process of a run ---------------------------------------------------------------------------------------------


class Bench:
    """A store, a config and an accelerator; measures one thing a method."""

    def __init__(self, folder: Path, name: str, batch: int, steps: int) -> None:
        self.folder, self.batch, self.steps, self.runs = folder, batch, steps, (f"{name}-{i}" for i in range(100))
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), mixed_precision="bf16" if torch.cuda.is_available() else "no"
        )
        self.store = CountStore.open(folder / "x.zarr")
        self.world, self.device = self.accelerator.num_processes, self.accelerator.device

    def model(self, **denoiser: Any) -> tuple[Model, config.Config]:
        settings = {
            "out": str(self.folder / next(self.runs)), "batch": self.batch, "cells": 2 * self.batch * self.steps,
            "eval_cells": self.batch * self.steps, "checkpoint_cells": 10**12, "checkpoint_minutes": 10**6,
            "resume": "never", "patience": 1000,
        }  # fmt: skip
        c = config.parse({"data": {"store": "-"}, "denoiser": {"kind": "mlp", **denoiser}, "train": settings})
        return Model.new(self.store.spec(()), c.process, c.denoiser), c

    def train(self) -> dict[str, float]:
        """Of the second half of the steps: cells per second, share of time waited for cells, seconds of a step (mean
        over processes, and of the slower of them)."""
        m, c = self.model()
        ends: list[float] = []
        recipe = Recipe(self.store, m.process, m.denoiser, c.survival, c.optim, c.train)
        hooks = loop.Hooks(lambda *_: None, on_step=lambda *_: ends.append(time.perf_counter()))
        done = loop.train(recipe, self.accelerator, hooks, identity={})
        took = np.array(gather_object([np.diff(ends[self.steps :]).tolist()]))
        means = {"step": float(took.mean()), "slowest": float(took.max(0).mean())}
        return {name: done.history[-1][name] for name in ("cells_per_second", "data_wait")} | means

    def network(self) -> float:
        """Seconds of both passes of this process's cells, noise drawn before."""
        m, c = self.model()
        network, cells = m.denoiser.to(self.device), self.batch // self.world
        x_0 = self.store.cells(np.arange(cells), ()).to(self.device)
        rng = generator(0, "scaling", device=self.device)
        p, _ = c.survival.draw(m.process.schedule, rng.uniform(cells, 1), len(self.store.genes), rng=rng)
        x = m.process.forward(x_0.counts, 1.0, p, rng=rng)

        def passes() -> None:
            with self.accelerator.autocast():
                found = losses.of_states(m.process, network, x_0.counts, x, p, x_0.labels)
            found.mean().backward()

        return self.timed(passes, 12)

    def all_reduce(self, size: int) -> float:
        """Seconds of an exchange of so many bytes."""
        tensor = torch.zeros(size // 4, device=self.device)
        return self.timed(lambda: dist.all_reduce(tensor), 12)

    def timed(self, call: Callable[[], Any], times: int) -> float:
        took = []
        for _ in range(times):
            if self.world > 1:
                dist.barrier()
            began = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            took.append(time.perf_counter() - began)
        return statistics.median(took[2:])

    def trial(self, **denoiser: Any) -> fit._Trial:
        m, c = self.model(**denoiser)
        return fit._Trial(Recipe(self.store, m.process, m.denoiser, c.survival, c.optim, c.train), self.accelerator)

    def loading(self, batch: int = 1024, batches: int = 30) -> float:
        """Cells that one core's second loads and decodes, as dense rows."""
        index = self.store.rows("train")
        feed = loader(self.store, Plan(len(index), batch, seed=0), index, labels=())
        with contextlib.closing(feed):
            for _ in range(5):
                next(feed)
            began = time.process_time()
            for _ in range(batches):
                next(feed)
            return batch * batches / (time.process_time() - began)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Processes that keep their gradients to themselves."""
    kept = engine.Engine.one_pass
    engine.Engine.one_pass = lambda self: self.network.no_sync()  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.Engine.one_pass = kept  # type: ignore[method-assign]


@contextlib.contextmanager
def saving() -> Iterator[dict[str, float]]:
    """How long training waits for the one checkpoint of a run."""
    kept, took = checkpoint.snapshot, {"seconds": 0.0}

    def snapshot(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return kept(*args)
        finally:
            took["seconds"] += time.perf_counter() - began

    checkpoint.snapshot = snapshot
    try:
        yield took
    finally:
        checkpoint.snapshot = kept


def worker(a: argparse.Namespace) -> None:
    """What a process measures; the main one writes it down."""
    torch.set_num_threads(1)
    bench = Bench(a.worker, a.out.stem, a.batch, a.steps)
    with saving() as saved:
        found: dict[str, Any] = {"train": [bench.train()]}
    found |= {"snapshot": saved["seconds"], "network": bench.network(), "weights": weights_of(bench)}
    if bench.world == 1:
        trial = bench.trial()
        found |= {"step": {cells: trial.seconds(cells) for cells in SIZES}, "loader": bench.loading()}
        if a.count:
            found["work"] = {
                name: asdict(model.count(bench.trial(**options).seconds, 1 + fit.TRIES, weights_of(bench, **options)))
                for name, options in NETWORKS.items()
            }
    else:
        with silent():
            found["silent"] = [bench.train(), bench.train()]
        found["train"].append(bench.train())  # before and after: what else the machine does changes with time
        gradients = 4 * found["weights"]
        found["all_reduce"] = {size: bench.all_reduce(size) for size in (4 << 10, 1 << 20, gradients, 4 * gradients)}
    if bench.accelerator.is_main_process:
        for how in {"train", "silent"} & set(found):
            found[how] = {name: statistics.mean(run[name] for run in found[how]) for name in found[how][0]}
        a.out.write_text(json.dumps(found))
    bench.accelerator.wait_for_everyone()
    bench.accelerator.end_training()


def weights_of(bench: Bench, **denoiser: Any) -> int:
    return sum(w.numel() for w in bench.model(**denoiser)[0].denoiser.parameters())


# --- all processes ----------------------------------------------------------------------------------------------------


def launch(processes: int, folder: Path, name: str, a: argparse.Namespace, *, count: bool) -> dict[str, Any]:
    """Run workers and read what they found; whatever is left of them is ended."""
    out = folder / f"{name}.json"
    words = [__file__, "--worker", str(folder), "--out", str(out), "--batch", str(a.batch), "--steps", str(a.steps)]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    started = subprocess.Popen(
        [sys.executable, *words, *(["--count"] if count else [])], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, errors = started.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    if started.returncode:
        raise SystemExit(f"{processes} process(es) failed:\n{errors[-3000:]}")
    return json.loads(out.read_text())


def quartiles(values: list[float]) -> list[float]:
    """Median and quartiles."""
    return np.percentile(values, (50, 25, 75)).tolist()


def summary(rounds: list[dict[int, dict[str, Any]]], batch: int) -> dict[str, Any]:
    """Medians over rounds, and where the time of a step goes."""
    worlds = list(rounds[0])

    def middle(world: int, pick: Callable[[dict[str, Any]], float]) -> list[float]:
        return quartiles([pick(r[world]) for r in rounds])

    processes = {}
    for world in worlds:
        speed = middle(world, lambda found: found["train"]["cells_per_second"])
        quiet = [r[world].get("silent", r[world]["train"])["cells_per_second"] for r in rounds]
        step = [batch / r[world]["train"]["cells_per_second"] for r in rounds]
        shares = {
            "waiting for cells": [r[world]["train"]["data_wait"] for r in rounds],
            "collectives": [max(0.0, 1 - batch / q / s) for q, s in zip(quiet, step, strict=True)],
            "network": [r[world]["network"] / s for r, s in zip(rounds, step, strict=True)],
        }
        found = {name: 100 * float(np.median(values)) for name, values in shares.items()}
        found["noise, optimiser, rest"] = 100 - sum(found.values())
        processes[world] = {
            "cells_per_second": speed, "cells_per_second_without_exchange": quartiles(quiet), "percent": found,
            "step_ms_without_exchange": [
                1000 * float(np.median([r[world].get("silent", r[world]["train"])[of] for r in rounds]))
                for of in ("step", "slowest")
            ],
            "snapshot_ms": middle(world, lambda found: 1000 * found["snapshot"]),
        }  # fmt: skip
    many = worlds[-1]
    sizes = list(rounds[0][many]["all_reduce"])
    steps = {n: middle(1, lambda found, n=n: 1000 * found["step"][n]) for n in rounds[0][1]["step"]}
    each, fixed = np.polyfit([int(n) for n in steps], [ms[0] for ms in steps.values()], 1)
    return {
        "processes": processes,
        "step_ms": steps, "step_ms_fixed": float(fixed), "step_ms_a_cell": float(each),
        "all_reduce_ms": {n: middle(many, lambda found, n=n: 1000 * found["all_reduce"][n]) for n in sizes},
        "loader_cells_a_core_second": middle(1, lambda found: found["loader"]),
        "weights": rounds[0][1]["weights"], "work": rounds[0][1]["work"],
    }  # fmt: skip


def checks(rounds: list[dict[int, dict[str, Any]]], batch: int) -> list[dict[str, Any]]:
    """The model's way of adding up pieces against the measured speed of the most processes, round by round; medians."""
    world = max(rounds[0])
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rounds:
        exchange = r[world]["all_reduce"][str(4 * r[1]["weights"])]
        each, fixed = np.polyfit([int(n) for n in r[1]["step"]], list(r[1]["step"].values()), 1)
        ways = {
            "as one process alone takes for its share": fixed + each * batch / world,
            "as two without exchange take": r[world]["silent"]["step"],
            "as the slower of these two takes, step by step": r[world]["silent"]["slowest"],
        }
        for way, seconds in ways.items():
            found.setdefault(way, []).append((batch / (seconds + exchange), r[world]["train"]["cells_per_second"]))
    return [
        {
            "way": way,
            "predicted": float(np.median([p for p, _ in pairs])),
            "measured": float(np.median([m for _, m in pairs])),
            "error_percent": quartiles([100 * (p / m - 1) for p, m in pairs]),
        }
        for way, pairs in found.items()
    ]


def predictions(found: dict[str, Any], a: model.Assumed) -> dict[str, list[dict[str, float]]]:
    """Tables for 1 to 512 GPUs: the same share a GPU, and the same global batch."""
    core, tables = found["loader_cells_a_core_second"][0], {}
    for name, work in found["work"].items():
        counted = model.work_of(work)
        gpus = (1, 8, 64, 512)
        tables[f"{name}, {SHARE} cells a GPU"] = [model.predict(counted, n, SHARE, a, core) for n in gpus]
        tables[f"{name}, {GLOBAL} cells in all"] = [model.predict(counted, n, GLOBAL / n, a, core) for n in gpus]
    return tables


SHARE, GLOBAL = 2048, 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="of each half of a run; the second half counts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="write the model's page (of a run on CPUs)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        return worker(a)
    began, many = time.perf_counter(), max(2, torch.cuda.device_count())
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        made(Path(name), 4096, a.genes)
        for i in range(a.rounds):
            rounds.append({n: launch(n, Path(name), f"r{i}p{n}", a, count=not i) for n in (1, many)})
            for n, found in rounds[-1].items():
                print(f"round {i}: {n} process(es): {found['train']['cells_per_second']:.0f} cells/s")
    found = {**summary(rounds, a.batch), "load_average": os.getloadavg()[2]}
    checked, tables = checks(rounds, a.batch), predictions(found, model.Assumed())
    for row in checked:
        print(f"{row['way']}: {row['predicted']:.0f} cells/s predicted, {row['measured']:.0f} measured")
    _record.write(a.out, began, {
        "genes": a.genes, "batch": a.batch, "rounds": a.rounds, **found, "checks": checked,
        "assumed": asdict(model.Assumed()), "predicted": tables,
    })  # fmt: skip
    _scaling_page.draw(found, tables, a.out.with_suffix(".png"))
    if a.page and not torch.cuda.is_available():
        a.page.write_text(_scaling_page.page(found, checked, tables, genes=a.genes, batch=a.batch, rounds=a.rounds))
    return None


if __name__ == "__main__":
    main()
