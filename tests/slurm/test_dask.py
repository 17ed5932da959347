"""``shard_dask.py`` and ``impute_dask.py`` with jobs of a real SLURM: the results are those made without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from distdiff.batch import impute_file
from distdiff.data.ingest.shard import shard
from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from tests.batch.test_batch import content, shards_of

pytest.importorskip("dask_jobqueue", reason="pip install 'distdiff[slurm]'")

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.distributed
LONG = (pytest.mark.slow, pytest.mark.long)


class Recipe:
    """``python launch/slurm/NAME.py --jobs 2 WORDS`` by a user on the login node (a context)."""

    def __init__(self, cluster, name, folder, *words):
        self.cluster, self.log = cluster, folder / f"{name}.log"
        command = (sys.executable, ROOT / "launch" / "slurm" / f"{name}.py", "--jobs", "2", "--cores", "1")
        options = ("--memory", "2GB", "--walltime", "00:10:00", "--interface", "lo")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options, *words], cwd=folder, stdout=log, stderr=log,
                env={**cluster.environment, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.cluster.run("scancel", "--user=root")

    def jobs(self):
        """Numbers of those that run."""
        return sorted(map(int, self.cluster.run("squeue", "--noheader", "--states=R", "--format=%i").split()))

    def wait_for(self, ready, what, seconds=60):
        def so():
            assert self.process.poll() is None, f"ended before {what}:\n{self.log.read_text()}"
            return ready()

        self.cluster.wait(so, what, seconds, self.log.read_text)

    def end(self, seconds=120):
        status = self.process.wait(seconds)
        said = self.log.read_text()
        assert status == 0, said
        self.cluster.wait(lambda: not self.jobs(), "the jobs to be let go")
        return said


def many(counts, folder, copies):
    """Several files with ``copies`` times the cells."""
    paths = []
    for i in range(4):
        x = sp.vstack([counts.X] * copies, format="csr")
        x.data[i] += 1
        names = [f"file{i}-cell{j}" for j in range(x.shape[0])]
        big = ad.AnnData(x, obs=pd.DataFrame(index=names), var=counts.var)
        paths.append(folder / f"{i}.h5ad")
        big.write_h5ad(paths[-1])
    return paths


@pytest.mark.parametrize(("copies", "cancel"), [(2, False), pytest.param(300, True, marks=LONG)])
def test_shard(cluster, counts, tmp_path, copies, cancel):
    paths = many(counts, tmp_path, copies)
    want = shard(paths, tmp_path / "want.zarr", workers=0, progress=False)
    with Recipe(cluster, "shard_dask", tmp_path, *map(str, paths), "--out", "got.zarr") as recipe:
        if cancel:
            recipe.wait_for(lambda: len(recipe.jobs()) == 2, "two jobs")
            recipe.wait_for(lambda: list(tmp_path.glob(".got.zarr*/*")), "the build to begin")
            cluster.run("scancel", str(recipe.jobs()[0]))
        recipe.end()
    got = CountStore.open(tmp_path / "got.zarr")
    assert got.manifest.fingerprint == want.fingerprint
    got.verify()
    rows = np.arange(got.n_cells)
    a, b = got.read(rows), CountStore.open(tmp_path / "want.zarr").read(rows)
    assert (a != b).nnz == 0


@pytest.mark.parametrize("cancel", [False, pytest.param(True, marks=LONG)])
def test_impute(cluster, atlas, tmp_path, cancel):
    """A job that is cancelled is replaced; the shard that it was at is computed by another one."""

    def model(seconds):
        network = {"kind": "tests.slurm.slow:Slow", "asked": seconds}
        return Model.new(CountStore.open(atlas).spec(("cell_type",)), {"kind": "counts"}, network)

    saved, out = model(0.6 if cancel else 0.0).save(tmp_path / "model"), tmp_path / "got.zarr"
    mask = str(tmp_path / "mask.npy")
    np.save(mask, mcar((199, 30), 0.2, np.random.default_rng(0)))
    small = {"shard_cells": 10, "batch_size": 10, "progress": False}
    impute_file(model(0.0), atlas, tmp_path / "want.zarr", mask=mask, **small)
    words = ["--model", saved, "--data", atlas, "--out", out, "--mask", mask, "--trust", "tests"]
    words += ["--shard-cells", "10", "--batch-size", "10"]
    jobs = "--cpu" if cancel else "--queue=main"  # the second asks for a GPU each, which here is but a name
    with Recipe(cluster, "impute_dask", tmp_path, jobs, *map(str, words)) as recipe:
        if cancel:
            recipe.wait_for(lambda: len(recipe.jobs()) == 2 and len(shards_of(out)) > 2, "some shards")
            first = recipe.jobs()[0]
            cluster.run("scancel", str(first))
            recipe.wait_for(lambda: len(recipe.jobs()) == 2 and first not in recipe.jobs(), "a job that replaces it")
        said = recipe.end(200)
    assert "199 cells" in said
    assert content(out) == content(tmp_path / "want.zarr")
