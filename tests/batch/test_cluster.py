"""Workers of a dask cluster come and go while a job runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from distdiff.batch import cluster

started: list[int] = []
goes_on = threading.Event()


def share(kind, load, data, out, index, options):
    """Every worker's, which stays until it is told."""
    started.append(index)
    goes_on.wait(30)
    return index


def wait_for(ready):
    for _ in range(600):
        if ready():
            return
        threading.Event().wait(0.05)
    pytest.fail(f"only {started} began")


@pytest.fixture
def workers(monkeypatch):
    from dask.distributed import LocalCluster

    started.clear()
    goes_on.clear()
    monkeypatch.setattr(cluster, "_work", share)
    monkeypatch.setattr(cluster, "LOOK", 0.05)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as made:
        yield made
        goes_on.set()


@pytest.mark.distributed
def test_who_comes_late_takes_part_and_who_leaves_is_not_waited_for(workers):
    said = []
    with ThreadPoolExecutor(1) as user:
        job = user.submit(
            cluster.on_cluster, workers.scheduler_address, "impute", None, None, "x.zarr", say=said.append
        )
        wait_for(lambda: started == [0])
        workers.scale(2)
        wait_for(lambda: started == [0, 1])
        workers.sync(workers.scheduler.remove_worker, workers.workers[0].address, stimulus_id="test")
        wait_for(lambda: said[-1] == "1 workers")
        goes_on.set()
        assert job.result(30) == 1
    assert said == ["1 workers", "2 workers", "1 workers"]


@pytest.mark.distributed
def test_when_the_last_worker_has_left_the_user_is_told(workers, monkeypatch):
    monkeypatch.setattr("distdiff.cluster.ALONE", 0.2)
    with ThreadPoolExecutor(1) as user:
        job = user.submit(cluster.on_cluster, workers.scheduler_address, "impute", None, None, "x.zarr")
        wait_for(lambda: started == [0])
        workers.scale(0)
        with pytest.raises(OSError, match=r"no worker is left at .*the same command goes on"):
            job.result(30)
