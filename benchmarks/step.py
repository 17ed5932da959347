"""Where a training step's time goes, and what thinning and the first layer cost in other ways.

    python benchmarks/step.py --out benchmarks/results/step.json [--genes 2000 --batch 128 --kind mlp --compile]

Made counts (gamma-Poisson, about 85 % zeros) in a store in a temporary folder, one thread. Every part of the step is
timed alone, the parts in turn within each round, so that a busy machine slows all alike; medians of the rounds, on the
wall and in seconds of the processor. ``operations`` counts torch's calls in each part, which on a GPU are launches, and
``work`` the bytes that they read and write and their products, by type, under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _record
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from distdiff import config
from distdiff.data.feed.loader import loader
from distdiff.data.feed.plan import Plan
from distdiff.data.ingest.shard import shard
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.rng import generator, numpy_generator
from distdiff.rng.rows import Rows
from distdiff.training.compiled import compile_denoiser, compile_law
from distdiff.training.ema import Ema
from distdiff.training.losses import law_of
from distdiff.training.noise import Noise
from distdiff.training.settings import Training
from distdiff.training.times import Times


def made(folder: Path, cells: int, genes: int) -> CountStore:
    import anndata as ad
    from scipy import sparse

    rng = numpy_generator(0, "step")
    mean = rng.gamma(0.25, 1.6, genes)
    parts = [sparse.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2, (256, genes))), dtype=np.float32)
             for _ in range(0, cells, 256)]  # fmt: skip
    ad.AnnData(sparse.vstack(parts, format="csr")).write_h5ad(folder / "x.h5ad")
    shard([folder / "x.h5ad"], folder / "x.zarr", workers=0, progress=False)
    return CountStore.open(folder / "x.zarr")


def parts(store: CountStore, kind: str, batch: int, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Each part of ``train.loop``'s step as a call without arguments."""
    raw = {"data": {"store": "-"}, "denoiser": {"kind": kind}}
    settings = config.parse(raw)
    model = Model.new(store.spec(()), settings.process, settings.denoiser)
    process, network, survival = model.process, model.denoiser, settings.survival
    law: Any = law_of(process)
    if compiled:
        if not compile_denoiser(network, batch, len(store.genes)):
            raise SystemExit("torch.compile cannot run here")
        law = compile_law(law, process.outputs, batch, len(store.genes), torch.device("cpu"))
    times = Times(survival.time, batch, 0, torch.device("cpu"))
    optimizer, ema = settings.optim.build(network), Ema(network, settings.optim.ema)
    index = store.rows("train")
    plan = Plan(n_cells=len(index), batch=batch, seed=0)
    feed = loader(store, plan, index, start=0, stop=100_000, rank=0, world=1, labels=())
    state: dict[str, Any] = {"step": 0}

    def read() -> None:
        state["step"], state["cells"] = next(feed)

    def thinned(source: Any) -> None:
        noise, step = Noise(process, survival, times, Training(batch=batch, noise=source)), state["step"]
        state["noised"] = noise.draw(state["cells"], step, step * batch)

    def forward() -> None:
        noised = state["noised"]
        with torch.autocast("cpu", torch.bfloat16, enabled=state.get("half", False)):
            state["raw"] = network(*process.encode(noised.x, noised.p), noised.cond).float()

    def loss() -> None:
        raw, noised = state["raw"].detach().requires_grad_(), state["noised"]
        law(raw, noised.x_0, noised.x, noised.p).mean().backward()
        state["grad"] = raw.grad

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        state["raw"].backward(state["grad"])

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    def average() -> None:
        ema.update(list(network.parameters()), state["step"])

    def half() -> None:
        state["half"] = True

    return {"loader": read, ROWS: partial(thinned, "rows"), "noise": partial(thinned, "streams"),
            "network forward": forward, "loss": loss, "network backward": backward, "optimiser": step,
            "average": average, HALF: half}  # fmt: skip


ROWS, HALF = "noise, train.noise=rows", "half"


def medians(
    calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            took[name].append(clock() - began)
    return {name: float(np.median(values[rounds // 5 :])) for name, values in took.items()}


class Work(TorchDispatchMode):
    """Counts torch's calls that are no views: how many, bytes read and written, floating-point operations, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes, self.flops = 0, collections.Counter[str](), collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(of) if isinstance(t, torch.Tensor)] for of in ((args, kwargs), answer))
        if func.is_view or not (made or given):
            return answer
        dtype = str((made or given)[0].dtype).removeprefix("torch.")
        self.calls += 1
        self.bytes[dtype] += sum(t.numel() * t.element_size() for t in {id(t): t for t in (*given, *made)}.values())
        if func.overloadpacket in flop_registry:
            self.flops[dtype] += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=answer)
        return answer


def operations(calls: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """torch's calls in each part, in the second of two rounds."""
    found = {}
    for _ in range(2):
        for name, call in calls.items():
            with Work() as work:
                call()
            found[name] = work.calls
    return found


def work_of(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Megabytes and billions of operations of network and loss, by type, under autocast."""
    calls[HALF]()
    found = {}
    for name in ("network forward", "loss", "network backward"):
        with Work() as work:
            calls[name]()
        found[name] = {
            "megabytes": {k: v / 1e6 for k, v in work.bytes.items()},
            "gflop": {k: v / 1e9 for k, v in work.flops.items()},
        }
    return found


def thinning(counts: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Ways to draw ``Binomial(counts, p)``, p one number a cell, all exact."""
    p = torch.linspace(0.05, 0.95, len(counts)).unsqueeze(1).expand_as(counts).contiguous()
    rng, rows = generator(0, "thin"), Rows(torch.arange(len(counts)), torch.zeros(len(counts)).long(), 0)
    chance = np.random.default_rng(0)
    n, q = counts.numpy().astype(np.int64), p.numpy()

    def seen_only() -> torch.Tensor:
        out, at = torch.zeros_like(counts), counts.nonzero(as_tuple=True)
        out[at] = rng.binomial(counts[at], p[at])
        return out

    def molecules() -> np.ndarray:
        at = np.repeat(np.arange(n.size), n.ravel())
        kept = at[chance.random(len(at)) < q.ravel()[at]]
        return np.bincount(kept, minlength=n.size)

    return {
        "torch.binomial (the stream)": lambda: rng.binomial(counts, p),
        "torch.binomial, non-zero entries": seen_only,
        "by row (inversion, BTRS)": lambda: rows.binomial(counts, p),
        "numpy binomial": lambda: chance.binomial(n, q),
        "one coin a molecule": molecules,
    }


def first_layer(cells: int, genes: int, nonzero: float, width: int = 256) -> dict[str, Callable[[], Any]]:
    """Ways through the MLP's first layer and back to its weights, for rows of which a share is not zero."""
    chance = torch.Generator().manual_seed(0)
    x = torch.rand(cells, genes, generator=chance) + 0.7
    x = torch.where(torch.rand(cells, genes, generator=chance) < nonzero, x, 0.0)
    across, along = torch.randn(width, genes).requires_grad_(), torch.randn(genes, width).requires_grad_()
    above = torch.ones(cells, width)

    def dense() -> None:
        torch.autograd.grad(F.linear(x, across), across, above)

    def bag() -> None:
        cell, gene = x.nonzero(as_tuple=True)
        starts = torch.bincount(cell, minlength=cells).cumsum(0)
        starts = F.pad(starts, (1, 0))[:-1]
        summed = F.embedding_bag(gene, along, starts, mode="sum", per_sample_weights=x[cell, gene])
        torch.autograd.grad(summed, along, above)

    return {f"dense, {genes} genes": dense, f"non-zero entries, {genes} genes": bag}


def draw(shares: dict[str, float], ways: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, data, title in zip(
        figure.subplots(1, 2), (shares, ways), ("share of a training step, %", "thinning, ns an entry"), strict=True
    ):
        axes.barh(list(data), list(data.values()), color="#7a8ca3")
        for i, value in enumerate(data.values()):
            axes.text(value, i, f" {value:.1f}", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
    _record.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kind", default="mlp")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        store = made(Path(name), 4096, a.genes)
        calls = parts(store, a.kind, a.batch, a.compile)
        timed = {name: call for name, call in calls.items() if name != HALF}
        took, cpu = medians(timed, a.rounds), medians(timed, a.rounds, time.process_time)
        plain = {} if a.compile else calls
        counted, work = (operations(timed), work_of(plain)) if plain else ({}, {})
        counts = store.cells(np.arange(min(a.batch, 1024))).counts
        ways = medians(thinning(counts), 15, time.process_time)
    by_rows = took.pop(ROWS), cpu.pop(ROWS)
    layers: dict[str, float] = {}
    for genes, nonzero in ((2000, 0.1), (5000, 0.08), (20_000, 0.03)):
        layers |= medians(first_layer(a.batch, genes, nonzero), 15)
    total = sum(took.values())
    shares = {part: 100 * seconds / total for part, seconds in took.items()}
    outside = 100 - shares["loader"] - shares["network forward"] - shares["network backward"]
    print(f"noise by train.noise=rows: {1000 * by_rows[0]:.2f} ms, {1000 * by_rows[1]:.2f} ms of the processor")
    print(f"operations: {counted}\nwork: {work}")
    ways = {way: seconds / counts.numel() * 1e9 for way, seconds in ways.items()}
    for part, share in shares.items():
        print(f"{part:<18} {1000 * took[part]:8.2f} ms {share:6.1f} %")
    print(f"outside network and loader: {outside:.1f} %; {a.batch / total:.0f} cells/s")
    for way, ns in ways.items():
        print(f"thinning, {way:<34} {ns:6.1f} ns an entry")
    for way, seconds in layers.items():
        print(f"first layer and its gradient, {way:<30} {1000 * seconds:6.1f} ms")
    _record.write(a.out, began, {
        "genes": a.genes, "batch": a.batch, "denoiser": a.kind, "compiled": a.compile,
        "zeros": float((counts == 0).float().mean()),
        "milliseconds": {k: 1000 * v for k, v in took.items()}, "percent": shares, "outside_percent": outside,
        "cpu_milliseconds": {k: 1000 * v for k, v in cpu.items()},
        "noise_by_rows_ms": {"wall": 1000 * by_rows[0], "cpu": 1000 * by_rows[1]}, "operations": counted, "work": work,
        "thinning_ns_an_entry": ways,
        "first_layer_ms": {k: 1000 * v for k, v in layers.items()},
    })  # fmt: skip
    draw(shares, ways, a.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
