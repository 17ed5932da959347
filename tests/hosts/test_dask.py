"""A dask scheduler on one host, its worker on the other: sharding, training and imputing give what they give alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from distdiff import batch, experiment
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.training import checkpoint
from tests.batch.test_batch import content
from tests.hosts.network import wait_for
from tests.training.test_loop import assert_equal, final, make

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def cluster(scheduling, working, folder):
    """A scheduler on one host, a worker on another; its address, and what waits until both are there."""
    address, log = f"tcp://{scheduling.address}:8786", folder / "worker.txt"
    scheduling.start(
        "dask", "scheduler", "--host", scheduling.address, "--no-dashboard", log=folder / "scheduler.txt"
    )  # fmt: skip
    working.start("dask", "worker", address, "--nthreads", 2, "--no-dashboard", log=log)

    def ready():
        wait_for(lambda: "Registered to" in log.read_text(), 180, log.read_text)
        assert f"tcp://{working.address}:" in log.read_text()

    return address, ready


def config_of(store, out, address, **train):
    tree = make(store, out, **train).as_dict()
    tree["loader"] |= {"reader": "dask", "scheduler": address, "window": 64}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def test_sharding_training_and_imputing_with_a_worker_on_another_host(hosts, counts, atlas, tmp_path):
    here, there = hosts
    address, ready = cluster(here, there, tmp_path)
    # meanwhile, what it is in this process alone
    config = make(atlas, tmp_path / "alone", cells=640)
    experiment.train(replace(config, loader=replace(config.loader, window=64)))
    model, mask = tmp_path / "alone" / "model", tmp_path / "mask.npy"
    np.save(mask, np.random.default_rng(0).random((199, 30)) < 0.3)
    batch.run("impute", Model.load(model), atlas, tmp_path / "alone.zarr", mask=str(mask), progress=False)
    counts.write_h5ad(tmp_path / "counts.h5ad")
    out, far = tmp_path / "atlas.zarr", tmp_path / "far"
    ready()
    commands = {
        "shard": [tmp_path / "counts.h5ad", "--out", out, "--labels", "cell_type", "--scheduler", address],
        "train": ["--config", config_of(atlas, far, address, cells=640)],
        "impute": ["--model", model, "--data", atlas, "--out", tmp_path / "far.zarr", "--mask", mask, "--scheduler",
                   address],
    }  # fmt: skip
    logs = {name: tmp_path / f"{name}.txt" for name in commands}
    started = {name: here.start("distdiff", name, *words, log=logs[name]) for name, words in commands.items()}
    for name, process in started.items():
        assert process.wait(240) == 0, logs[name].read_text()[-3000:]
    made, alone = CountStore.open(out), CountStore.open(atlas)
    assert made.manifest == alone.manifest
    made.verify()
    assert_equal(final(tmp_path / "alone"), final(far))
    assert content(tmp_path / "far.zarr") == content(tmp_path / "alone.zarr")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_host_with_scheduler_and_worker_is_lost(hosts, atlas, tmp_path, how):
    """Training ends with a sentence, and the same command goes on once they are back."""
    here, there = hosts
    address, ready = cluster(there, there, tmp_path)
    ready()
    config, log, saved = (
        config_of(atlas, tmp_path / "run", address, cells=32 * 2000),
        tmp_path / "log",
        tmp_path / "run",
    )
    training = here.start("distdiff", "train", "--config", config, log=log)
    wait_for(lambda: checkpoint.latest(saved / "checkpoints") or training.poll() is not None, 180, log.read_text)
    there.kill() if how == "killed" else there.plug("down")
    assert training.wait(300) == 2  # dask itself tries again for up to 2 minutes
    line = log.read_text().splitlines()[-1]
    assert line == (
        f"distdiff: error: the dask scheduler at {address} is lost; once one is back there, with workers, the same "
        "command goes on"
    )
    there.kill()
    there.plug("up")
    (tmp_path / "worker.txt").unlink()
    _, ready = cluster(there, there, tmp_path)
    ready()
    here.run("distdiff", "train", "--config", config, log=log, seconds=150)
    assert "continuing " in log.read_text()
