"""Storms of kills: a command that is killed at random moments, again and again, ends bit-equal and leaves nothing."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.trials import Ended, command, started, trial

KILLS = 20

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


def content(path: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by name; times and machine are no part of what a command makes."""
    found = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        body = file.read_bytes()
        if file.suffix == ".json":
            body = json.dumps(timeless(json.loads(body)), sort_keys=True).encode()
        found[str(file.relative_to(path))] = hashlib.sha256(body).hexdigest()
    return found


def timeless(tree):
    """JSON without what depends on the clock."""
    if isinstance(tree, dict):
        return {k: timeless(v) for k, v in tree.items() if k not in TIMED}
    return [timeless(v) for v in tree] if isinstance(tree, list) else tree


TIMED = {"seconds", "cells_per_second", "data_wait", "step_seconds", "started", "finished", "host", "crc32c", "sha256",
         "command"}  # fmt: skip
"""Entries that a clock or a machine fills in (and the hashes over them)."""


def storm(words: list[str], home: Path, whole: float, kills: int, chance: random.Random) -> tuple[int, Ended]:
    """Kill a command so many times at random moments within the time that it takes; then let it end.

    Returns how many of the kills found it at work, and its last end. One that ends before its kill is started again
    with ``--overwrite`` (its output is there).
    """
    hit = 0
    again = list(words)
    for _ in range(3 * kills):
        if hit == kills:
            break
        child, log = started(command, again, str(home))
        began = time.monotonic()
        child.join(chance.uniform(0.02, 1.0) * whole)
        if child.exitcode is None:
            child.kill()
            child.join(20)
            hit += 1
        else:
            assert child.exitcode == 0, Path(log).read_text()[-3000:]
            whole = min(whole, time.monotonic() - began)
            if words[0] != "train":
                again = [*words, *([] if "--overwrite" in words else ["--overwrite"])]
        Path(log).unlink()
    return hit, trial(command, again, str(home), seconds=300)


def data(folder: Path, cells: int, times: int = 1) -> Path:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, cells)
    x = rng.poisson(rng.gamma(0.6, 1.0, (3, 40))[kind]).astype(np.float32) * times
    x[:, 0] += 1
    obs = pd.DataFrame({"cell_type": np.array(["a", "b", "c"])[kind]}, index=[f"c{i}" for i in range(cells)])
    made = ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(40)]))
    made.layers["hidden"] = sp.csr_matrix((rng.random(x.shape) < 0.2).astype(np.float32))
    path = folder / f"{cells}-{times}.h5ad"
    made.write_h5ad(path)
    return path


def timed(words: list[str], home: Path) -> float:
    """Seconds that a command takes undisturbed."""
    trial(time.sleep, 0, seconds=120)  # the server that forks has imported everything then
    began = time.monotonic()
    ended = trial(command, words, str(home), seconds=300)
    assert ended.kind == "works", ended
    return time.monotonic() - began


@pytest.mark.parametrize("overwrite", [False, True])
def test_shard(tmp_path, overwrite):
    (home := tmp_path / "home").mkdir()
    new = data(tmp_path, 4000, 3)
    words = ["shard", str(new), "--workers", "0", "--labels", "cell_type", "--out"]
    seconds = timed([*words, str(tmp_path / "whole.zarr")], tmp_path)
    if overwrite:
        timed(["shard", str(data(tmp_path, 3000)), "--workers", "0", "--out", "out.zarr"], home)
    storming = [*words, "out.zarr", *(["--overwrite"] if overwrite else [])]
    hit, ended = storm(storming, home, seconds, KILLS, random.Random(int(overwrite)))
    assert ended.kind == "works", ended
    assert hit == KILLS
    assert [p.name for p in home.iterdir()] == ["out.zarr"]
    assert content(home / "out.zarr") == content(tmp_path / "whole.zarr")
    assert trial(command, ["store", "verify", "out.zarr"], str(home)).kind == "works"


CONFIG = """
data: {store: STORE, labels: [cell_type]}
denoiser: {kind: mlp, width: 16, depth: 1}
train: {cells: 3200, batch: 32, grain: 16, eval_cells: 320, checkpoint_cells: 64, patience: 50}
evaluate: {enabled: false}
tracking: {enabled: false}
"""


def trained(tmp_path: Path) -> tuple[Path, list[str]]:
    """An undisturbed run in ``tmp_path/whole``, and the command for another."""
    words = ["shard", str(data(tmp_path, 600)), "--workers", "0", "--labels", "cell_type", "--out", "a.store"]
    timed(words, tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.replace("STORE", str(tmp_path / "a.store")))
    return tmp_path / "whole", ["train", "--config", str(tmp_path / "c.yaml"), "train.out="]


def of_run(folder: Path) -> dict[str, str]:
    """What a run leaves that must not depend on kills: weights of the last checkpoint and of the best model."""
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    files = [last / f"{group}.safetensors" for group in ("weights", "ema", "optimizer")]
    files.append(folder / "model" / "weights.safetensors")
    return {f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_train(tmp_path):
    whole, words = trained(tmp_path)
    seconds = timed([*words[:-1], f"train.out={whole}"], tmp_path)
    (home := tmp_path / "home").mkdir()
    hit, ended = storm([*words[:-1], "train.out=run"], home, seconds, KILLS, random.Random(2))
    assert ended.kind == "works", ended
    assert of_run(home / "run") == of_run(whole)
    assert hit == KILLS
    assert [p.name for p in home.iterdir()] == ["run"]
    names = [sorted(p.name for p in folder.rglob("*") if not p.name.startswith("step-")) for folder in
             (home / "run", whole)]  # fmt: skip
    assert names[0] == names[1]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["o.zarr", "o.h5ad"])
def test_impute(tmp_path, out, overwrite):
    whole, words = trained(tmp_path)
    timed([*words[:-1], f"train.out={whole}", "train.cells=640"], tmp_path)
    given = data(tmp_path, 5000)
    words = ["impute", "--model", str(whole / "model"), "--data", str(given), "--mask", "hidden", "--layers",
             "mean,draws", "--shard-cells", "500", "--out"]  # fmt: skip
    (home := tmp_path / "home").mkdir()
    (alone := tmp_path / "alone").mkdir()
    seconds = timed([*words, out], alone)
    if overwrite:
        timed([*words, out, "--seed", "7"], home)
    storming = [*words, out, *(["--overwrite"] if overwrite else [])]
    hit, ended = storm(storming, home, seconds, KILLS, random.Random(3 + overwrite))
    assert ended.kind == "works", ended
    assert hit == KILLS
    assert [p.name for p in home.iterdir()] == [out]
    if out.endswith(".zarr"):
        assert trial(command, [*words, out, "--verify"], str(home)).kind == "works"
    read = ad.read_zarr if out.endswith(".zarr") else ad.read_h5ad
    found, wanted = read(home / out), read(alone / out)
    assert set(found.layers) == set(wanted.layers)
    for name in wanted.layers:
        a, b = (sp.csr_matrix(x.layers[name]).sorted_indices() for x in (found, wanted))
        assert (a != b).nnz == 0, name
        assert np.array_equal(a.data.view(np.uint8), b.data.view(np.uint8))
    shutil.rmtree(tmp_path / "home")
