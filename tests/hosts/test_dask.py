"""A dask scheduler on one host, its worker on the other: sharding, training and imputing give what they give alone."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest
import yaml

from distdiff import experiment
from distdiff.batch import run as run_batch
from distdiff.data.store import CountStore
from distdiff.model import Model
from tests.batch.test_batch import content
from tests.hosts.network import wait_for
from tests.train.test_loop import assert_equal, final, make

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def test_sharding_training_and_imputing_with_a_worker_on_another_host(hosts, counts, atlas, tmp_path):
    here, there = hosts
    address, log = f"tcp://{here.address}:8786", tmp_path / "worker.txt"
    here.start("dask", "scheduler", "--host", here.address, "--no-dashboard", log=tmp_path / "scheduler.txt")
    there.start("dask", "worker", address, "--nthreads", 1, "--no-dashboard", "--name", "far", log=log)

    # reference, in this process, while the cluster starts
    want = make(atlas, tmp_path / "alone", cells=640)
    experiment.train(want)
    model = tmp_path / "alone" / "model"
    mask = np.random.default_rng(0).random((199, 30)) < 0.3
    np.save(tmp_path / "mask.npy", mask)
    run_batch("impute", Model.load(model), atlas, tmp_path / "alone.zarr", mask=str(tmp_path / "mask.npy"), command="x")
    wait_for(lambda: "Registered to" in log.read_text(), 60, log.read_text)

    counts.write_h5ad(tmp_path / "counts.h5ad")
    out = tmp_path / "atlas.zarr"
    here.run(
        "distdiff", "shard", tmp_path / "counts.h5ad", "--out", out, "--labels", "cell_type", "--scheduler", address,
        log=tmp_path / "shard.txt",
    )  # fmt: skip
    made, alone = CountStore.open(out), CountStore.open(atlas)
    assert made.manifest == alone.manifest
    rows = np.arange(made.n_cells)
    assert (made.read(rows) != alone.read(rows)).nnz == 0

    far = make(out, tmp_path / "far", cells=640).as_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(far))
    here.run(
        "distdiff", "train", "--config", tmp_path / "config.yaml", "loader.reader=dask", f"loader.scheduler={address}",
        log=tmp_path / "train.txt",
    )  # fmt: skip
    assert_equal(final(tmp_path / "alone"), final(tmp_path / "far"))

    here.run(
        "distdiff", "impute", "--model", model, "--data", out, "--out", tmp_path / "far.zarr", "--mask",
        tmp_path / "mask.npy", "--scheduler", address, log=tmp_path / "impute.txt",
    )  # fmt: skip
    assert content(tmp_path / "far.zarr") == content(tmp_path / "alone.zarr")
