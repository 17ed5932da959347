"""Any damage to a file that distdiff wrote is refused in one sentence that names the file; never other content."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import distdiff.data.ingest.build as builds
import distdiff.data.ingest.scan as scanning
from distdiff import config, experiment
from tests.data.conftest import build, make_adata, make_counts, save
from tests.trials import trial

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10**30, 10**400, float("nan"), float("inf"), "", "x", "../../x", "a:b", [], [[]],
    [None], [10**12], ["x"] * 3, {}, {"a": 1}, {"kind": "x"}, -0.0, 1e300, 2**63, "\x1b[31m", "日本",
)  # fmt: skip
"""Values that any place of a JSON file is given."""

SECONDS = 20
"""That one damaged folder may take."""

Damage = tuple[str, Callable[[Path], None]]


class Hang(BaseException):
    """A damaged folder took too long."""


def bytes_of(rng: random.Random, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Damaged forms of a file's content."""
    n = len(content)
    yield "emptied", b""
    yield "longer", content + b"\0"
    yield "twice", content + content
    for share in (0.001, 0.3, 0.9):
        yield f"cut at {share}", content[: int(n * share)]
    yield "cut by one", content[:-1]
    yield "other bytes", bytes(rng.randrange(256) for _ in range(min(n, 4096)))
    for _ in range(12):
        at, bit = rng.randrange(n), rng.randrange(8)
        yield f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    for _ in range(2):
        at = rng.randrange(n)
        zeros = min(512, n - at)
        yield f"{zeros} zeros at {at}", content[:at] + bytes(zeros) + content[at + zeros :]
    yield "deep", b'{"a": ' * 100_000
    yield "a long number", b'{"format": ' + b"9" * 5000 + b"}"


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values in a JSON tree."""
    if path:
        yield path
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from places(value, (*path, key))


def trees_of(rng: random.Random, tree: Any, number: int) -> Iterator[tuple[str, Any]]:
    """JSON trees with one other value, one key less, or one more."""
    every = list(places(tree))
    for _ in range(number):
        path, made, how = rng.choice(every), copy.deepcopy(tree), rng.random()
        node = made
        for key in path[:-1]:
            node = node[key]
        if how < 0.75:
            value = rng.choice(ODD)
            node[path[-1]] = value
            yield f"{'.'.join(map(str, path))[:50]}={str(value)[:20]!r}", made
        elif how < 0.9:
            del node[path[-1]]
            yield f"without {'.'.join(map(str, path))[:50]}", made
        elif isinstance(node, dict):
            node["zzz"] = rng.choice(ODD)
            yield f"more at {'.'.join(map(str, path[:-1]))}", made
    for value in ODD:
        yield f"only {str(value)[:20]!r}", value


def put(file: Path, body: bytes) -> Callable[[Path], None]:
    """Give a file another content."""

    def harm(folder: Path) -> None:
        (folder / file).write_bytes(body)

    return harm


def become(file: Path, how: str) -> Callable[[Path], None]:
    """Remove a file, or put what is no file in its place."""

    def harm(folder: Path) -> None:
        (folder / file).unlink()
        if how == "a folder":
            (folder / file).mkdir()
        elif how == "a pipe":
            os.mkfifo(folder / file)
        elif how == "a loop":
            (folder / file).symlink_to(file.name)

    return harm


def damages(folder: Path, rng: random.Random, json_values: int, most_files: int = 10**9) -> Iterator[Damage]:
    """Ways to harm one file of a folder."""
    every = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    top = [p for p in every if len(p.parts) == 1]
    below = [p for p in every if len(p.parts) > 1]
    every = top + (rng.sample(below, most_files) if len(below) > most_files else below)
    for file in every:
        content = (folder / file).read_bytes()
        for name, other in bytes_of(rng, content) if content else ():
            yield f"{file} {name}", put(file, other)
        for how in ("removed", "a folder", "a pipe", "a loop"):
            yield f"{file} {how}", become(file, how)
        if len(every) > 1:
            swap = rng.choice([p for p in every if p != file])
            yield f"{file} is {swap}", put(file, (folder / swap).read_bytes())
        if file.suffix == ".json":
            number = json_values if len(file.parts) == 1 else max(4, json_values // 20)
            for name, tree in trees_of(rng, json.loads(content), number):
                yield f"{file} {name}", put(file, json.dumps(tree).encode())


def judged(content_of: Callable[[Path], Any], whole: Any, home: Path, at: Path, damage: Damage) -> str:
    """What is wrong about the answer for a damaged copy; empty: it is refused properly, or nothing is lost."""
    name, harm = damage
    harm(at)
    before = listing(home)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = content_of(at)
    except (ValueError, OSError) as error:
        said = str(error)
        named = name.split(" ")[0]
        if "\n" in said or not said.isprintable() or len(said) > 1000:
            return f"{name}: more than one plain sentence: {said[:1500]!r}"
        if not any(part in said for part in (named, Path(named).name, *Path(named).parts[:-1])):
            return f"{name}: the file is not named: {said}"
    except BaseException as error:
        return f"{name}: {type(error).__name__}: {''.join(traceback.format_exception(error))[-900:]}"
    else:
        if not same(found, whole):
            return f"{name}: other content without a word"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "" if listing(home) == before else f"{name}: left {set(listing(home)) ^ set(before)}"


def listing(home: Path) -> list[str]:
    return sorted(str(p) for p in home.rglob("*"))


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays and values are equal, NaN to NaN."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return repr(a) == repr(b)


def all_judged(
    content_of: Callable[[Path], Any], folder: str, home: str, seed: int, json_values: int, most_files: int
) -> None:
    """Harm copies of a folder in every way, write what is wrong."""

    def late(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, late)
    at, faults, number = Path(home, Path(folder).name), [], 0
    shutil.copytree(folder, at)
    whole = content_of(at)
    for damage in damages(Path(folder), random.Random(seed), json_values, most_files):
        shutil.rmtree(at)
        shutil.copytree(folder, at)
        number += 1
        if fault := judged(content_of, whole, Path(home), at, damage):
            faults.append(fault)
            print(fault)
    Path(home, "found.json").write_text(json.dumps([number, faults]))


def check(
    content_of: Callable[[Path], Any], folder: Path, tmp_path: Path, *, json_values: int, least: int,
    most_files: int = 10**9, seed: int = 0, seconds: float = 250,
) -> None:  # fmt: skip
    """Refuse all faults of all damaged copies."""
    home = tmp_path / "home"
    home.mkdir()
    ended = trial(all_judged, content_of, str(folder), str(home), seed, json_values, most_files, seconds=seconds)
    assert ended.kind == "works", ended
    number, faults = json.loads((home / "found.json").read_text())
    assert not faults, f"{len(faults)} of {number}:\n" + "\n".join(faults)
    assert number >= least


def model_content(folder: Path) -> Any:
    """A model and its answer."""
    import distdiff

    model = distdiff.load(str(folder))
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (6, len(model.spec.genes))).astype(np.float32)
    adata = ad.AnnData(x, var=pd.DataFrame(index=list(model.spec.genes)))
    out = model.impute(adata, mask=rng.random(x.shape) < 0.5)
    return {
        "options": model.options, "info": dict(model.info), "genes": model.spec.genes,
        "labels": dict(model.spec.labels), "mean": np.asarray(model.spec.gene_mean),
        "layers": {k: np.asarray(out.layers[k]) for k in out.layers},
        "weights": {k: v.numpy() for k, v in model.denoiser.state_dict().items()},
    }  # fmt: skip


def store_content(folder: Path) -> Any:
    """All that a store answers, and its verification."""
    from distdiff.data.store.store import CountStore

    store = CountStore.open(folder)
    rows = store.rows("all")
    counts = store.read(rows)
    answer = {
        "counts": counts.toarray(), "labels": store.labels(rows), "names": store.names(rows),
        "origin": list(store.origin(rows)), "splits": store.splits(rows), "quality": list(store.quality(rows)),
        "statistics": store.statistics(), "columns": store.source_columns(), "genes": store.spec().genes,
        "values": dict(store.spec().labels), "mean": store.spec().gene_mean, "about": store.manifest.to_json(),
        "cells": store.cells(rows[:40]).counts.numpy(),
    }  # fmt: skip
    store.describe()
    store.verify()
    return answer


def checkpoint_content(folder: Path) -> Any:
    """What a run goes on with."""
    from distdiff.training import checkpoint
    from distdiff.training.loop import Progress

    found = checkpoint.load(folder, {})
    return {
        "state": found.state, "progress": vars(found.progress(Progress)),
        **{group: {k: v.numpy() for k, v in getattr(found, group).items()} for group in checkpoint.GROUPS},
    }  # fmt: skip


def interrupted(given: Path, out: Path) -> None:
    """A build that is stopped while it writes its third shard."""
    real, calls = scanning.write_shard, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    scanning.write_shard = stop
    try:
        build(given, out, labels=("kind",))
    except KeyboardInterrupt:
        return
    finally:
        scanning.write_shard = real
    raise AssertionError("the build was not stopped")


def harmed_builds(given: str, home: str, most: int, seed: int) -> None:
    """Harm what a stopped build left, and give the same command: at the latest the second time it ends as ever."""
    builds.SPAN_BYTES = 2000
    left, rng = Path(home, "left"), random.Random(seed)
    left.mkdir()
    interrupted(Path(given), left / "out")
    whole, faults, at = build(given, Path(home, "whole"), labels=("kind",)), [], Path(home, "at")
    wanted = store_content(Path(home, "whole"))
    every = list(damages(left / ".out.building", rng, 40))
    for name, harm in rng.sample(every, min(most, len(every))):
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(left, at)
        harm(at / ".out.building")
        for turn in range(2):
            try:
                made = build(given, at / "out", labels=("kind",))
            except (ValueError, OSError) as error:
                if turn or "\n" in str(error):
                    faults.append(f"{name}: {turn}: {error}")
                if isinstance(error, FileExistsError):  # of a link, which the user is to remove
                    faults.pop() if turn else None
                    break
                continue
            except BaseException as error:
                faults.append(f"{name}: {''.join(traceback.format_exception(error))[-900:]}")
                break
            if made != whole or not same(store_content(at / "out"), wanted):
                faults.append(f"{name}: another store")
            if [p.name for p in at.iterdir()] != ["out"]:
                faults.append(f"{name}: left {sorted(p.name for p in at.iterdir())}")
            break
    Path(home, "found.json").write_text(json.dumps([len(every), faults]))


@pytest.mark.parametrize("most", [20, pytest.param(10**9, marks=[pytest.mark.long, pytest.mark.timeout(1500)])])
def test_what_a_stopped_build_left(tmp_path, most):
    kind = np.array(["a", "b"])[np.arange(90) % 2]
    given = save(make_adata(make_counts(90, 12), kind=kind), tmp_path / "a.h5ad")
    (home := tmp_path / "home").mkdir()
    ended = trial(harmed_builds, str(given), str(home), most, 0, seconds=250 if most < 100 else 1200)
    assert ended.kind == "works", ended
    number, faults = json.loads((home / "found.json").read_text())
    assert not faults, f"{len(faults)} of {number}:\n" + "\n".join(faults)


@pytest.fixture(scope="module")
def run(atlas, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("fuzz") / "run"
    overrides = [
        f"data.store={atlas}", f"train.out={out}", "data.labels=cell_type", "denoiser.width=8", "denoiser.depth=1",
        "train.cells=64", "train.batch=32", "train.grain=16", "train.eval_cells=32", "train.checkpoint_cells=32",
        "evaluate.enabled=false", "tracking.enabled=false",
    ]  # fmt: skip
    experiment.train(config.load(None, overrides))
    return out


SLOW = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("values", [60, pytest.param(1000, marks=SLOW)])
def test_a_model_folder(run, tmp_path, values):
    check(model_content, run / "model", tmp_path, json_values=values, least=values + 50, seconds=max(200, values))


@pytest.mark.parametrize("values", [60, pytest.param(1000, marks=SLOW)])
def test_a_checkpoint(run, tmp_path, values):
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    check(checkpoint_content, last, tmp_path, json_values=values, least=values + 100, seconds=max(200, values))


@pytest.mark.parametrize(("values", "files"), [(25, 1), pytest.param(400, 100, marks=SLOW)])
def test_a_store(atlas, tmp_path, values, files):
    check(store_content, atlas, tmp_path, json_values=values, least=values + 50, most_files=files,
          seconds=max(200, 3 * values))  # fmt: skip
