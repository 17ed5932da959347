"""A job by the workers of a dask cluster: one task a shard, then one that makes the result.

The client owns the output, hands out the shards that are missing, and publishes the result. Dask knows which workers
are alive: the task of one that died goes to another, one that joins later takes part. A worker loads the model once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distdiff.batch.compute import ShardComputer
from distdiff.batch.job import Described, OneProcess, carry_out, check_options
from distdiff.batch.plan import Plan
from distdiff.batch.summary import Summary
from distdiff.batch.tasks import make_task
from distdiff.cluster import WorkerWatch, connect, explained
from distdiff.data.store.export import named
from distdiff.files import absolute, is_url
from distdiff.model import Model

LOOK = 0.2
"""Seconds between two looks at what is finished and which workers are there."""


@dataclass(frozen=True)
class Order:
    """What a worker needs to compute parts of a job: how to load the model, the input, and the task's options."""

    kind: str
    load: Callable[[], Model]
    data: str | None
    out: str
    precision: str
    options: dict[str, Any]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)


def on_cluster(
    scheduler: str | None, kind: str, load: Callable[[], Model], data: str | Path | None, out: str | Path, *,
    workers: int | None = None, overwrite: bool = False, progress: bool = True, batch_size: int | None = None,
    shard_cells: int | None = None, precision: str = "auto", command: str = "",
    notify: Callable[[str], None] = lambda message: None, **options: Any,
) -> Summary:  # fmt: skip
    """Do a task on files on a dask cluster, one worker a GPU; the client and all workers must see the same folders.

    Parameters
    ----------
    scheduler
        Address, ``tcp://...``; ``None``: workers are started on this machine.
    load
        Called once by every worker for its model, ``functools.partial(distdiff.load, "models:/NAME@champion")``.
    workers
        How many to start on this machine; one a GPU where there are GPUs (``pip install 'distdiff[dask-cuda]'``).
    **options
        Of :func:`distdiff.batch.run`.

    Raises
    ------
    OSError
        No scheduler with workers answers there, it is lost, or its workers left and none came for ten minutes.
    RuntimeError
        Workers died again and again at one shard.
    ValueError
        Neither an address nor a number of workers, or both; what the task refuses.
    """
    out = named(absolute(out))
    check_options(precision, batch_size, shard_cells)
    if (scheduler is None) == (workers is None):
        raise ValueError("give either the address of a dask scheduler or a number of workers to start here")
    data = None if data is None else str(data) if is_url(data) else str(absolute(data))
    order = Order(kind, load, data, str(out), precision, options)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(local_workers(workers)) if scheduler is None else scheduler
        stack.enter_context(explained(address))
        engine = Cluster(stack.enter_context(connect(address, notify)), order, notify)
        return carry_out(
            engine, out, overwrite=overwrite, progress=progress, batch_size=batch_size, shard_cells=shard_cells,
            command=command, notify=notify,
        )  # fmt: skip


@contextlib.contextmanager
def local_workers(workers: int | None) -> Iterator[str]:
    """Worker processes on this machine, each with a GPU of its own where dask-cuda is installed; yields their address.

    Raises
    ------
    ValueError
        Fewer than one worker.
    """
    import torch
    from dask.distributed import LocalCluster

    if workers is None or workers < 1:
        raise ValueError(f"workers={workers}: at least 1 is wanted")
    kind: Any = LocalCluster
    if torch.cuda.is_available() and importlib.util.find_spec("dask_cuda") is not None:
        from dask_cuda import LocalCUDACluster

        kind = LocalCUDACluster
    with kind(
        n_workers=workers, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL
    ) as cluster:
        yield cluster.scheduler_address


class Cluster:
    """The engine that is a dask cluster; see :class:`~distdiff.batch.job.Engine`."""

    def __init__(self, client: Any, order: Order, notify: Callable[[str], None]) -> None:
        self.client, self.order = client, order
        self.watch = WorkerWatch(client, notify)

    def describe(self) -> Described:
        """See :class:`~distdiff.batch.job.Engine`."""
        return self._one(_describe)

    def make_plan(self, batch_size: int | None, shard_cells: int | None) -> Plan:
        """See :class:`~distdiff.batch.job.Engine`."""
        return self._one(_make_plan, batch_size, shard_cells)

    def compute(self, plan: Plan, work: Path, shards: Sequence[int], look: Callable[[], None]) -> None:
        """See :class:`~distdiff.batch.job.Engine`."""
        shared = self.client.submit(_as_given, (self.order, plan, work), pure=False)
        tasks = {self.client.submit(_compute, shared, shard, pure=False): f"shard {shard}" for shard in shards}
        self._wait(tasks, look)

    def finish(self, plan: Plan, work: Path, suffix: str, command: str) -> Path:
        """See :class:`~distdiff.batch.job.Engine`."""
        result = self._one(_finish, plan, work, suffix, command)
        if not result.exists():
            raise OSError(f"{result} was made by a worker, and is not seen here: {_SHARED}")
        return result

    def _one(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one task."""
        task = self.client.submit(function, self.order, *arguments, pure=False)
        self._wait({task: function.__name__.strip("_")})
        return task.result()

    def _wait(self, tasks: dict[Any, str], look: Callable[[], None] = lambda: None) -> None:
        """Wait until all tasks (future -> what it does) are done; the first that fails ends the job."""
        from dask.distributed import KilledWorker

        waiting = dict(tasks)
        while waiting:
            self.watch.workers()
            look()
            done = [task for task in waiting if task.done()]
            for task in done:
                what = waiting.pop(task)
                try:
                    task.result()
                except KilledWorker as error:
                    raise RuntimeError(
                        f"workers died again and again at {what} ({error}), most likely of memory; give them more, or "
                        "a smaller shard_cells= or batch_size=; the same command continues the job"
                    ) from error
            if not done:
                time.sleep(LOOK)


_SHARED = "the output must lie in a folder that the client and all workers share"


# -- on a worker ---------------------------------------------------------------------------------------------------


class _Session:
    """What a worker keeps between tasks of one command: the engine with its model, and its computer of shards."""

    def __init__(self, order: Order) -> None:
        options = dict(order.options)
        if options.get("device", "auto") == "auto":
            options["device"] = _device()
        task = make_task(order.kind, order.load(), order.data, Path(order.out), **options)
        name = "" if order.data is None else Path(order.data).name
        self.name, self.engine = order.name, OneProcess(task, name, order.precision)
        self.computer: ShardComputer | None = None

    def computer_of(self, plan: Plan, work: Path) -> ShardComputer:
        """The computer of this job's shards."""
        if self.computer is None or self.computer.plan.token != plan.token:
            self.close()
            self.computer = ShardComputer(self.engine.task, plan, work / plan.token).__enter__()
        return self.computer

    def close(self) -> None:
        """End the threads of the computer."""
        if self.computer is not None:
            self.computer.__exit__()


_SESSIONS: dict[str, _Session] = {}
_LOCK = threading.Lock()


def _session(order: Order) -> _Session:
    """The session of a command in this process; an earlier one's is closed. Called with :data:`_LOCK` held."""
    if order.name not in _SESSIONS:
        for name in list(_SESSIONS):
            _SESSIONS.pop(name).close()
        _SESSIONS[order.name] = _Session(order)
    return _SESSIONS[order.name]


def _describe(order: Order) -> Described:
    with _LOCK:
        return _session(order).engine.describe()


def _make_plan(order: Order, batch_size: int | None, shard_cells: int | None) -> Plan:
    with _LOCK:
        return _session(order).engine.make_plan(batch_size, shard_cells)


def _as_given(shared: Any) -> Any:
    return shared


def _compute(shared: tuple[Order, Plan, Path], shard: int) -> None:
    order, plan, work = shared
    if not (work / plan.token).is_dir():
        raise OSError(f"a worker on {os.uname().nodename} does not see {work / plan.token}: {_SHARED}")
    with _LOCK:
        computer = _session(order).computer_of(plan, work)
    computer.compute([shard])


def _finish(order: Order, plan: Plan, work: Path, suffix: str, command: str) -> Path:
    with _LOCK:
        engine = _session(order).engine
    return engine.finish(plan, work, suffix, command)


def _device() -> str:
    """A GPU for this worker: where a host has several, that of its place among the workers of the host."""
    import torch
    from dask.distributed import get_client, get_worker

    if not torch.cuda.is_available():
        return "cpu"
    if torch.cuda.device_count() == 1:
        return "cuda:0"
    mine = get_worker().address
    host = mine.rpartition(":")[0]
    workers = get_client().scheduler_info(n_workers=-1)["workers"]
    return f"cuda:{sorted(a for a in workers if a.rpartition(':')[0] == host).index(mine) % torch.cuda.device_count()}"
