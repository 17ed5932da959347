"""Loading cells: distdiff against annbatch, scDataset, a backed h5ad and RAM, in turn on the same made atlases.

    python benchmarks/loader.py --work WORK --out benchmarks/results/loader.json \\
        --annbatch PEER312/bin/python --scdataset SCVI/bin/python [--repeats 3 --seconds 3]
    python benchmarks/loader.py --work /tmp/trial --out /tmp/trial.json --cells 20000 --repeats 1 --seconds 1

    git archive REVISION | tar -x -C /tmp/old     # then a change is measured with --before /tmp/old

annbatch wants Python 3.12 (``pip install annbatch zarrs psutil``, no torch needed), scDataset wants torch; without an
interpreter for them they are left out. Atlases, stores and what building took stay in ``--work`` for the next run.

Atlas A is 300,000 cells x 2,000 genes, B is 100,000 x 20,000. Batches of 4,096 (B dense: 512) out of windows of 16,384
cells are handed over as float32 CSR (``csr``), as dense float32 (``dense``), or as dense float32 of 2,000 of the 20,000
genes (``panel``). ``warm`` has the files in the page cache and ends with a part in which the consumer sleeps as long as
a batch took to load (overlap); ``cold`` is one epoch or more, each from dropped files. Every run is a process of its
own; the candidates of a case follow each other within a repeat. Ratios are medians over the repeats of (candidate /
the better of annbatch's settings in that repeat's case), above 1 is better for speed, below 1 for p99, memory, bytes.
See ``_peers_loader.py`` for how each number is measured. It wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _atlas
import _peers_loader as peers
import numpy as np

HERE = Path(__file__).parent
POOL = 16_384
CACHE = 256 << 20  # bytes that distdiff may hold of coded blocks
CASES = {"A csr": 4096, "A dense": 4096, "B csr": 4096, "B dense": 512, "B panel": 512}
READERS = ("direct", "tensorstore", "zarr", "dask", "resident")
SPEED, COST = ("cells / cpu s", "cells / s"), ("p50 ms", "p99 ms", "first batch s", "private MB")


# --- distdiff's side of the API: all that has to change with it -------------------------------------------------------


def build_command(atlas: Path, out: Path, codec: str, panel: bool) -> list[str]:
    command = [sys.executable, "-m", "distdiff.cli", "shard", str(atlas), "--out", str(out), "--split", "1,0,0"]
    command += ["--codec", codec] if codec != "default" else []
    command += ["--panel", str(atlas.with_suffix(".panel.txt"))] if panel else []
    return command


def ours(a: argparse.Namespace) -> peers.Source:
    """distdiff as a `peers.Source`; X alone, as the others."""
    from distdiff.data.feed.loader import batches, loader
    from distdiff.data.feed.plan import Plan
    from distdiff.data.store.store import CountStore

    names = [f"gene{i}" for i in np.load(a.panel)] if a.panel else None

    def store_of() -> CountStore:
        options: dict[str, Any] = {} if a.reader in ("dask", "resident") else {"reader": a.reader}
        store = CountStore.open(a.data, cache_bytes=(1 << 40) if a.reader == "resident" else CACHE, **options)
        return store.panel(names) if names else store

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator[Any]]:
        with contextlib.ExitStack() as stack:
            scheduler = ""
            if a.reader == "dask":
                from dask.distributed import LocalCluster

                cluster = stack.enter_context(LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None))
                scheduler = cluster.scheduler_address
            store = store_of()
            index = store.rows("all")
            plan = Plan(len(index), a.batch, block=256, window=a.pool // 256, seed=0)
            if a.contract == "csr" and not scheduler:
                feed = ((step, index[plan.rows(step)]) for step in itertools.count())
                made: Any = batches(store, plan, feed, lambda rows, held: store.csr_of(rows, held, np.float32))
            else:
                made = loader(store, plan, index, labels=(), scheduler=scheduler)
            try:
                yield (x if a.contract == "csr" and not scheduler else x.counts for _, x in made)
            finally:
                made.close()

    return peers.Source(opened, len(CountStore.open(a.data).rows("all")))


def measure_ours() -> None:
    parser = argparse.ArgumentParser(prog="loader.py ours")
    parser.add_argument("--data", "--store", dest="data", type=Path, required=True)
    parser.add_argument("--reader", default="auto")
    peers.arguments(parser)
    a = parser.parse_args(sys.argv[2:])
    found = peers.measure(ours(a), a.data, a)
    found["versions"] = peers.versions("distdiff", "torch", "numpy", "scipy", "zarr", "tensorstore")
    print(json.dumps(found), flush=True)


# --- running ----------------------------------------------------------------------------------------------------------


def run(command: list[str], patience: float) -> dict[str, Any]:
    """The JSON line of a command, or a note why there is none; beside it what its whole process tree took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    builds = "build" in command or "shard" in command
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    with peers.Memory(child.pid, every=0.25) if builds else contextlib.nullcontext() as memory:
        try:
            out, err = child.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            for process in reversed(peers.tree(child.pid)):
                process.kill()
            child.communicate()
            return {"note": f"longer than {patience:.0f} s"}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines and not child.returncode else {}
    if child.returncode:
        said = [line.strip(" │|") for line in err.splitlines() if any(map(str.isalnum, line))]
        found["note"] = (said or [f"ended with {child.returncode}"])[-1][:300]
    if memory:
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        reaped = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        found |= {"wall s": time.perf_counter() - began, "cpu s": max(reaped, sum(memory.cpu.values())),
                  "private MB": memory.private, "resident MB": memory.resident}  # fmt: skip
    return found


class Candidate(NamedTuple):
    """A loader with its settings, where its data are, and what it is called."""

    name: str
    command: list[str]
    data: Path


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in peers.data_files(path))


def made(name: str, work: Path, cells: int | None, genes: int | None) -> Path:
    path = work / f"{name.lower()}.h5ad"
    if not path.exists():
        sizes: dict[str, Any] = _atlas.ATLASES[name] | {k: v for k, v in (("cells", cells), ("genes", genes)) if v}
        print(path.name, _atlas.write(path, **sizes), flush=True)
    return path


def built(atlas: Path, a: argparse.Namespace, panel: bool) -> dict[str, dict[str, Any]]:
    """Every store of an atlas, built where it is missing, and what building took (kept beside the store)."""
    part = atlas.with_suffix("")
    work: dict[str, tuple[Path, list[str]]] = {}
    if a.annbatch:
        command = [a.annbatch, str(HERE / "_peers_loader.py"), "build", "--data", str(atlas), "--out"]
        work["annbatch"] = (Path(f"{part}.ann.zarr"), command)
        work["annbatch 512MB"] = (Path(f"{part}.ann512.zarr"), command)
        if panel:
            work["annbatch panel"] = (Path(f"{part}.annpanel.zarr"), command)
    for codec in a.codecs:
        work[f"distdiff {codec}"] = (Path(f"{part}.{codec}.zarr"), [])
    if panel and a.codecs:
        work[f"distdiff {a.codecs[0]} panel"] = (Path(f"{part}.{a.codecs[0]}-panel.zarr"), [])
    found: dict[str, dict[str, Any]] = {}
    for name, (out, command) in work.items():
        record = out.with_suffix(".build.json")
        if not record.exists() or not out.exists():
            shutil.rmtree(out, ignore_errors=True)
            if command:
                command = [*command, str(out)]
                command += ["--dataset-size", "512MB"] if name.endswith("512MB") else []
                command += ["--panel", str(atlas.with_suffix(".panel.npy"))] if name.endswith("panel") else []
            else:
                command = build_command(atlas, out, name.split()[1], name.endswith("panel"))
            peers.fill(atlas)
            row = run(command, a.patience * 10)
            if "note" not in row:
                facts = json.loads(atlas.with_suffix(".json").read_text())
                row |= {"bytes": size(out), "cells / cpu s": facts["cells"] / row["cpu s"],
                        "cells / s": facts["cells"] / row["wall s"]}  # fmt: skip
            print(atlas.stem, name, show(row), flush=True)
            record.write_text(json.dumps(row))
        found[name] = json.loads(record.read_text()) | {"path": str(out)}
        if "note" in found[name]:
            record.unlink()  # another run tries again
    return found


def candidates(case: str, atlas: Path, stores: dict[str, dict[str, Any]], a: argparse.Namespace) -> list[Candidate]:
    """Who runs in a case. The case's options are added by `options`."""
    contract = case.split()[1]
    panel, batch, found = contract == "panel", CASES[case], []
    script, columns = str(HERE / "_peers_loader.py"), ["--panel", str(atlas.with_suffix(".panel.npy"))]

    def add(label: str, command: list[str], data: Path, pool: int = POOL) -> None:
        found.append(Candidate(label, [*command, "--data", str(data), "--pool", str(max(pool, batch))], data))

    def of(store: str) -> Path | None:
        row = stores.get(store, {"note": ""})
        return None if "note" in row else Path(row["path"])

    if a.annbatch:
        for chunk, preload in ((512, 32), (32, 256), (256, 64)):
            settings = ["--chunk", str(chunk), "--preload", str(preload)]
            for suffix in ("", " panel store") if panel else ("",):
                if path := of("annbatch panel" if suffix else "annbatch"):
                    command = [a.annbatch, script, "annbatch", *settings]
                    add(f"annbatch {chunk}x{preload}{suffix}", command + (columns if panel and not suffix else []),
                        path, chunk * preload)  # fmt: skip
        if not panel:
            add("h5ad, sorted rows", [a.annbatch, script, "h5ad"], atlas, batch)
    if a.scdataset and not panel:
        add("scDataset", [a.scdataset, script, "scdataset", "--fetch", str(POOL // batch)], atlas)
    add("RAM CSR u16", [sys.executable, script, "memory", *(columns if panel else [])], atlas, batch)
    if contract == "csr":
        add("RAM CSR u16, u16 out", [sys.executable, script, "memory", "--contract", "native"], atlas, batch)
    for codec in a.codecs:
        for reader in a.readers if codec == a.codecs[0] else a.readers[:1]:
            if reader == "dask" and contract == "csr":
                continue  # dask hands over dense batches
            for suffix in ("", " panel store") if panel and codec == a.codecs[0] else ("",):
                if path := of(f"distdiff {codec}{suffix[:6]}"):
                    command = [sys.executable, str(HERE / "loader.py"), "ours", "--reader", reader]
                    add(f"distdiff {codec} {reader}{suffix}", command + (columns if panel else []), path)
                    if a.before:
                        other = [
                            "env",
                            f"PYTHONPATH={a.before}",
                            sys.executable,
                            str(a.before / "benchmarks/loader.py"),
                        ]
                        add(f"before, {codec} {reader}{suffix}", other + command[2:] + (columns if panel else []), path)
    return [c for c in found if not a.only or any(word in c.name for word in a.only)]


def options(candidate: Candidate, case: str, mode: str, a: argparse.Namespace) -> list[str]:
    contract = case.split()[1]
    command = [*candidate.command, "--batch", str(CASES[case]), "--seconds", str(a.seconds), "--warm", str(a.warm)]
    if "--contract" not in command:
        command += ["--contract", "csr" if contract == "csr" else "dense"]
    return [*command, "--cold" if mode == "cold" else "--overlap"]


# --- results ----------------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> str:
    wanted = ("note", "cells / cpu s", "cells / s", "p99 ms", "first batch s", "private MB", "bytes")
    text = [f"{k} {row[k]:,.4g}" if isinstance(row[k], float) else f"{k} {row[k]}" for k in wanted if k in row]
    return "  ".join(text + ([f"step/compute {row['overlap']['step / compute']:.2f}"] if "overlap" in row else []))


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each candidate over annbatch's best setting of the same case, mode and repeat; medians and extremes.

    The best setting is the one with the best median in that metric; a panel's base subsets on the fly.
    """
    found = []
    rows = [row for row in rows if "note" not in row]
    for case, mode in dict.fromkeys((r["case"], r["mode"]) for r in rows):
        here = [r for r in rows if (r["case"], r["mode"]) == (case, mode)]
        names = list(dict.fromkeys(r["candidate"] for r in here))
        base = [n for n in names if n.startswith("annbatch") and not n.endswith("panel store")]
        table = {n: {"case": case, "mode": mode, "candidate": n} for n in names}
        for metric in (*SPEED, *COST):
            value = {(r["candidate"], r["repeat"]): r[metric] for r in here}
            middle = {n: float(np.median([v for (c, _), v in value.items() if c == n])) for n in names}
            if not base:
                continue
            best = (max if metric in SPEED else min)(base, key=middle.__getitem__)
            for n in names:
                both = [r for c, r in value if c == n and (best, r) in value]
                shares = [value[n, r] / value[best, r] for r in both]
                if shares:
                    table[n][metric] = {"median": float(np.median(shares)), "least": min(shares), "most": max(shares),
                                        "of": best}  # fmt: skip
        for n in names:
            steps = [r["overlap"]["step / compute"] for r in here if r["candidate"] == n and "overlap" in r]
            if steps:
                table[n]["step / compute"] = float(np.median(steps))
        found += list(table.values())
    return found


def store_ratios(stores: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Builds over annbatch's with its defaults: cells per CPU second and wall second, memory, bytes."""
    found = []
    for atlas, rows in stores.items():
        for name, row in ((n, r) for n, r in rows.items() if "note" not in r):
            base = rows.get("annbatch panel" if name.startswith("annbatch") and "panel" in name else "annbatch", {})
            keys = [k for k in (*SPEED, "private MB", "resident MB", "bytes") if k in row and k in base]
            found.append({"atlas": atlas, "store": name, **{k: row[k] / base[k] for k in keys}})
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of each case: medians, and every repeat as a dot."""
    import _record
    from matplotlib.figure import Figure

    rows = [row for row in rows if "note" not in row]
    cases = list(dict.fromkeys((r["case"], r["mode"]) for r in rows))
    metrics = ("cells / cpu s", "cells / s", "p99 ms", "private MB")
    tall = [len({r["candidate"] for r in rows if (r["case"], r["mode"]) == c}) for c in cases]
    figure = Figure(figsize=(16, 0.24 * sum(tall) + 0.8 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), len(metrics), squeeze=False, height_ratios=[n + 1 for n in tall])
    for (case, mode), line in zip(cases, grid, strict=True):
        here = [r for r in rows if (r["case"], r["mode"]) == (case, mode)]
        names = list(dict.fromkeys(r["candidate"] for r in here))[::-1]
        colors = ["C0" if n.startswith("distdiff") else "C1" if n.startswith("annbatch") else "0.6" for n in names]
        for axes, metric in zip(line, metrics, strict=True):
            values = [[r[metric] for r in here if r["candidate"] == n] for n in names]
            bars = axes.barh(names, [np.median(v) for v in values], color=colors)
            axes.bar_label(bars, [f"{np.median(v):,.3g}" for v in values], fontsize=7, padding=3)
            for y, v in enumerate(values):
                axes.plot(v, [y] * len(v), "k.", ms=3)
            axes.margins(x=0.12)
            axes.ticklabel_format(axis="x", scilimits=(-3, 4))
            axes.tick_params(labelsize=7, labelleft=axes is line[0])
            axes.set_title(f"{case}, {mode}: {metric}", fontsize=8)
    _record.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for atlases and stores")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--annbatch", help="interpreter that has annbatch and zarrs")
    parser.add_argument("--scdataset", help="interpreter that has scDataset")
    parser.add_argument("--before", type=Path, help="folder of another distdiff, to run beside this one")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--modes", nargs="*", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--codecs", nargs="*", default=["local", "compact"], help="of distdiff's stores")
    parser.add_argument("--readers", nargs="*", default=list(READERS), help="of the first codec; the others get one")
    parser.add_argument("--only", nargs="*", help="candidates with one of these words in their name")
    parser.add_argument("--cells", type=int)
    parser.add_argument("--genes", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warm", type=float, default=1.0)
    parser.add_argument("--patience", type=float, default=180.0, help="seconds that a run may take")
    a = parser.parse_args()
    import _record

    began = time.perf_counter()
    names = list(dict.fromkeys(case.split()[0] for case in a.cases))
    atlases = {name: made(name, a.work, a.cells, a.genes) for name in names}
    panels = {case.split()[0] for case in a.cases if case.endswith("panel")}
    stores = {name: built(atlases[name], a, name in panels) for name in names}
    rows: list[dict[str, Any]] = []
    for repeat, case, mode in itertools.product(range(a.repeats), a.cases, a.modes):
        if mode == "cold" and not case.endswith("csr"):
            continue
        who = candidates(case, atlases[case.split()[0]], stores[case.split()[0]], a)
        if mode == "cold":
            who = [c for c in who if not c.name.startswith("RAM")]
        turn = repeat * len(who) // max(a.repeats, 1)
        for candidate in who[turn:] + who[:turn]:
            row = {"case": case, "mode": mode, "candidate": candidate.name, "repeat": repeat,
                   "load": os.getloadavg()[0]}  # fmt: skip
            row |= run(options(candidate, case, mode, a), a.patience)
            rows.append(row)
            print(f"{repeat} {case:8} {mode:5} {candidate.name:34} {show(row)}", flush=True)
        facts = {name: json.loads(path.with_suffix(".json").read_text()) for name, path in atlases.items()}
        content = {"atlases": facts, "stores": named(stores), "store ratios": store_ratios(stores),
                   "ratios": ratios(rows), "rows": rows}  # fmt: skip
        _record.write(a.out, began, content)
    for line in ratios(rows):
        shares = [f"{k} {v['median']:.2f}" for k, v in line.items() if isinstance(v, dict)]
        overlap = [f"step/compute {line['step / compute']:.2f}"] if "step / compute" in line else []
        print(f"{line['case']:8} {line['mode']:5} {line['candidate']:34}", "  ".join(shares + overlap))
    if any("note" not in row for row in rows):
        draw(rows, a.out.with_suffix(".png"))


def named(stores: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Stores without the folders of this machine."""
    return {k: {n: row | {"path": Path(row["path"]).name} for n, row in rows.items()} for k, rows in stores.items()}


if __name__ == "__main__":
    measure_ours() if sys.argv[1:2] == ["ours"] else main()
