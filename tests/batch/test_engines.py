"""One process, the ranks of a launcher and the workers of a dask cluster make the same result, and share unfinished
work."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from distdiff import batch
from distdiff.batch import cluster
from distdiff.batch.workplace import finished_shards, read_plan
from distdiff.model import Model
from tests.batch import forks
from tests.batch.forks import Command, wait_for
from tests.batch.test_batch import as_anndata, content, shards_of

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SMALL = {"shard_cells": 16, "batch_size": 16}


@pytest.fixture(scope="module")
def workers():
    """Two workers; their model is loaded from a file."""
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as made:
        yield made.scheduler_address


@pytest.fixture(scope="module")
def inputs(atlas, mask, tmp_path_factory):
    """The store as h5ad and zarr with the mask as a layer, and without five genes."""
    folder = tmp_path_factory.mktemp("inputs")
    given = as_anndata(atlas)
    given.layers["mask"] = np.load(mask).astype(np.float32)
    given.obsm["pca"] = np.ones((199, 2))
    batch.write_anndata(given, folder / "x.h5ad")
    batch.write_anndata(given, folder / "x.zarr")
    batch.write_anndata(given[:, 5:].copy(), folder / "panel.h5ad")
    return {"h5ad": folder / "x.h5ad", "zarr": folder / "x.zarr", "store": atlas, "panel": folder / "panel.h5ad"}


def of(out):
    """What a result holds, by file or by dataset, but for what tells of the run."""
    if out.suffix == ".zarr":
        return content(out)
    import h5py

    found = {}
    with h5py.File(out) as file:
        file.visititems(
            lambda name, item: found.__setitem__(name, np.asarray(item[()]).tolist() if hasattr(item, "dtype") else 0)
        )
    return {name: values for name, values in found.items() if not name.startswith("uns/distdiff")}


@contextlib.contextmanager
def ranks(number, folder, *arguments, **options):
    """The processes of a launch."""
    port = forks.free_port()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Command(folder / f"rank{r}.log", *arguments, rank=r, world=number, port=port, **options)
            )
            for r in range(number)
        ]


JOBS = {
    "impute": ("store", {"draws": 2, "layers": ("mean", "draws", "mask", "ood", "sd", "q90")}),
    "complete": ("panel", {"append": ["gene0", "gene3"]}),
    "denoise": ("zarr", {"ood": 2, "sparse": False}),
    "deepen": ("h5ad", {"times": 1.5, "beyond": "allow", "steps": 2}),
    "generate": (None, {"n": 120, "obs": {"cell_type": "B"}, "steps": 2}),
}


SUFFIXES = {"impute": "zarr", "complete": "h5ad", "denoise": "zarr", "deepen": "h5ad", "generate": "zarr"}


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        pytest.param(kind, suffix, marks=[pytest.mark.long] if suffix != SUFFIXES[kind] else [])
        for kind in JOBS
        for suffix in ("zarr", "h5ad")
    ],
)
def test_all_engines_make_the_same_result(saved, inputs, mask, workers, tmp_path, kind, suffix):
    given, options = JOBS[kind]
    data = None if given is None else str(inputs[given])
    options = {**options, **({"mask": mask} if kind == "impute" else {}), **SMALL}
    alone = tmp_path / f"alone.{suffix}"
    want = batch.run(kind, Model.load(saved), data, alone, progress=False, **options)
    by_ranks, by_workers = tmp_path / f"ranks.{suffix}", tmp_path / f"workers.{suffix}"
    with ranks(2, tmp_path, kind, saved, data, by_ranks, **options) as processes:
        assert [process.end() for process in processes] == [0, 0], [process.words() for process in processes]
    load = functools.partial(Model.load, str(saved))
    got = batch.on_cluster(workers, kind, load, data, by_workers, progress=False, **options)
    assert (got.cells, got.targets, got.network_calls) == (want.cells, want.targets, want.network_calls)
    assert of(by_ranks) == of(alone)
    assert of(by_workers) == of(alone)
    assert not list(tmp_path.glob(".*"))


def test_a_job_goes_on_under_another_engine(saved, atlas, mask, workers, tmp_path):
    """Killed in one process, then among ranks, then among workers: no finished shard is computed again."""
    out, options = tmp_path / "out.zarr", {"mask": mask, **SMALL}
    batch.run("impute", Model.load(saved), atlas, tmp_path / "want.zarr", progress=False, **options)
    with Command(
        tmp_path / "log", "impute", saved, str(atlas), out, before=("slow_network", 0.1), **options
    ) as command:
        wait_for(lambda: len(shards_of(out)) >= 2, command.words)
        command.process.kill()
    first = shards_of(out)
    with ranks(2, tmp_path, "impute", saved, str(atlas), out, before=("slow_network", 0.1), **options) as processes:
        wait_for(lambda: len(shards_of(out)) >= len(first) + 2, processes[0].words)
    second, work = shards_of(out), tmp_path / ".out.zarr.building"
    assert set(first) < set(second)
    assert len(second) < 13
    before = {path: path.stat().st_mtime_ns for path in work.glob("*/*/record.json")}
    kept = []
    real = cluster.Cluster.finish

    def finish(self, plan, work, suffix, command):
        kept.extend(path for path in before if path.stat().st_mtime_ns == before[path])
        return real(self, plan, work, suffix, command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.Cluster, "finish", finish)
        load = functools.partial(Model.load, str(saved))
        batch.on_cluster(workers, "impute", load, atlas, out, progress=False, **options)
    assert len(kept) == len(second)
    assert content(out) == content(tmp_path / "want.zarr")


def test_ranks_share_what_is_missing_evenly(saved, atlas, mask, tmp_path):
    """The first six of 13 shards are finished: the others are shared out, not the whole."""
    out, options = tmp_path / "out.zarr", {"mask": mask, **SMALL}
    with Command(
        tmp_path / "log", "impute", saved, str(atlas), out, before=("stop_at", "distdiff.batch.output:write_shard", 7),
        **options,
    ) as command:  # fmt: skip
        command.wait_until_stopped()
    missing = sorted(set(range(13)) - {int(name) for name in shards_of(out)})
    assert 5 <= len(missing) <= 8
    with ranks(2, tmp_path, "impute", saved, str(atlas), out, before="log_shards", **options) as processes:
        assert [process.end() for process in processes] == [0, 0], [process.words() for process in processes]
    computed = [
        [int(line.split()[1]) for line in process.words().splitlines() if line.startswith("shard ")]
        for process in processes
    ]
    assert computed == [missing[::2], missing[1::2]]


def test_a_rank_that_fails_ends_the_others_with_a_sentence(saved, atlas, mask, tmp_path):
    options = {"mask": mask, **SMALL}
    with ranks(
        2, tmp_path, "impute", saved, str(atlas), tmp_path / "out.zarr", before=("fail_on_rank", 1), **options
    ) as processes:
        assert [process.end() for process in processes] == [2, 2]
    assert "ValueError: this block is bad" in processes[1].words()
    assert "the exchange with another process failed" in processes[0].words()
    assert "the same command goes on" in processes[0].words()
    with Command(tmp_path / "log", "impute", saved, str(atlas), tmp_path / "out.zarr", **options) as command:
        assert command.end() == 0


def test_a_refusal_is_that_of_all_ranks(saved, atlas, mask, tmp_path):
    (tmp_path / "out.zarr").mkdir()
    options = {"mask": mask, **SMALL}
    with ranks(2, tmp_path, "impute", saved, str(atlas), tmp_path / "out.zarr", **options) as processes:
        assert [process.end() for process in processes] == [2, 2]
    assert all("exists already; give overwrite=True" in process.words() for process in processes)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_suspended_is_not_waited_for_for_ever(saved, atlas, mask, tmp_path, late):
    options = {"mask": mask, **SMALL}
    out = tmp_path / "out.zarr"
    with ranks(2, tmp_path, "impute", saved, str(atlas), out, before=("hasty", 1.0, late), **options) as processes:
        processes[late].wait_until_stopped()
        assert processes[1 - late].end() == 2
        assert f"no shard was finished for 1 s; ranks [{late}] have not computed their share" in (
            processes[1 - late].words()
        )
        processes[late].wake()
        assert processes[late].end() == 2
    with Command(tmp_path / "log", "impute", saved, str(atlas), out, **options) as command:
        assert command.end() == 0, command.words()


@pytest.mark.slow
def test_the_launchers_command(saved, atlas, mask, tmp_path):
    """``accelerate launch launch/impute.py`` on two CPUs; docs/howto/dask.md, which is walked, has ``--workers 2``."""
    words = ["--model", saved, "--data", atlas, "--mask", mask, "--shard-cells", "16", "--batch-size", "16"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu2.yaml"]
    command = [*launch, "--main_process_port", str(forks.free_port()), "launch/impute.py", *words]
    done = subprocess.run(
        [*map(str, (*command, "--out", tmp_path / "ranks.zarr"))],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("199 cells x 30 genes") == 1
    batch.run("impute", Model.load(saved), atlas, tmp_path / "alone.zarr", mask=mask, progress=False, **SMALL)
    assert content(tmp_path / "ranks.zarr") == content(tmp_path / "alone.zarr")


# -- workers of a cluster ------------------------------------------------------------------------------------------


def load_counted(path, log):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    return Model.load(path)


def load_slow(path, seconds):
    forks.slow_network(seconds)
    return Model.load(path)


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_loads_the_model_once(saved, atlas, mask, tmp_path):
    load = functools.partial(load_counted, str(saved), str(tmp_path / "log"))
    options = {"mask": mask, "progress": False, **SMALL}
    batch.on_cluster(None, "impute", load, atlas, tmp_path / "out.zarr", workers=2, **options)
    pids = (tmp_path / "log").read_text().split()
    assert len(pids) == len(set(pids)) <= 2
    assert len(ad.read_zarr(tmp_path / "out.zarr")) == 199


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("how", [signal.SIGKILL, "retired"])
def test_a_worker_that_dies_costs_its_task_alone(saved, atlas, mask, tmp_path, how):
    from dask.distributed import Client, LocalCluster

    out, options = tmp_path / "out.zarr", {"mask": mask, "progress": False, **SMALL}
    batch.run("impute", Model.load(saved), atlas, tmp_path / "want.zarr", **options)
    load = functools.partial(load_slow, str(saved), 0.2)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as made,
        Client(made) as client,
    ):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as user:
            job = user.submit(batch.on_cluster, made.scheduler_address, "impute", load, atlas, out, **options)
            wait_for(lambda: len(shards_of(out)) >= 2 or job.done())
            if how == "retired":
                client.retire_workers(list(client.scheduler_info()["workers"])[:1])
            else:
                os.kill(next(iter(client.run(os.getpid).values())), how)
            assert job.result(120).cells == 199
    assert content(out) == content(tmp_path / "want.zarr")


@pytest.mark.usefixtures("forked_workers")
def test_without_any_worker_the_command_ends(saved, atlas, mask, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from dask.distributed import LocalCluster

    monkeypatch.setattr("distdiff.cluster.ALONE", 0.2)
    load = functools.partial(load_slow, str(saved), 0.2)
    out, options = tmp_path / "out.zarr", {"mask": mask, "progress": False, **SMALL}
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as made,
        ThreadPoolExecutor(1) as user,
    ):
        job = user.submit(batch.on_cluster, made.scheduler_address, "impute", load, atlas, out, **options)
        wait_for(lambda: shards_of(out) or job.done())
        made.scale(0)
        with pytest.raises(OSError, match=r"no worker is left at .*the same command goes on"):
            job.result(60)
    work = tmp_path / ".out.zarr.building"
    assert finished_shards(work / read_plan(work).token)


@pytest.mark.parametrize(
    ("address", "number", "words"),
    [(None, None, "give either"), ("tcp://127.0.0.1:1", 2, "give either"), (None, 0, "workers=0: at least 1")],
)
def test_where_the_workers_are_is_said_once(saved, atlas, tmp_path, address, number, words):
    with pytest.raises(ValueError, match=words):
        batch.on_cluster(address, "impute", Model.load, atlas, tmp_path / "x.zarr", workers=number)
