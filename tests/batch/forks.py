"""Commands in processes of their own (tests/forkserver.py), and what happens to them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from tests.forkserver import process


class Command:
    """A task on files in a process of its own (a context): ``before`` is called there first, by its name here."""

    def __init__(self, log, kind, model, data, out, *, rank=None, world=1, port=0, before=None, **options):
        self.log = Path(log)
        launch = None if rank is None else (rank, world, port)
        self.process = process(_command, (str(log), kind, str(model), data, str(out), launch, before, options))
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.join(20)

    @property
    def pid(self):
        return self.process.pid

    def wait_until_stopped(self, seconds=60):
        """Until it has stopped itself by SIGSTOP."""
        wait_for(lambda: _state(self.pid) == "T", self.words, seconds)

    def wake(self):
        os.kill(self.pid, signal.SIGCONT)

    def end(self, seconds=60):
        """Its exit code; fails where it does not end."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.words()}"
        return self.process.exitcode

    def words(self):
        return self.log.read_text() if self.log.exists() else ""


def wait_for(ready, words=lambda: "", seconds=60):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, words()
        time.sleep(0.02)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def _command(log, kind, model, data, out, launch, before, options):
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from distdiff import batch
    from distdiff.model import Model

    torch.set_num_threads(1)
    if launch is not None:
        rank, world, port = launch
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    if before is not None:
        name, *arguments = before if isinstance(before, tuple) else (before,)
        globals()[name](*arguments)
    try:
        batch.run(kind, Model.load(model), data, out, progress=False, **options)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(2)  # as the interpreter's own end, without waiting for the other ranks
    sys.stdout.flush()


# -- what happens to a command -------------------------------------------------------------------------------------


def stop_at(where, nth=1):
    """Suspend the process before the nth call of a function, ``module:function``."""
    import importlib

    module, _, name = where.partition(":")
    holder = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    real, calls = getattr(holder, name), []

    def wrapped(*arguments, **more):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*arguments, **more)

    setattr(holder, name, wrapped)


def kill_at(nth):
    """Killed just before the nth operation that changes files (tests.data.kills)."""
    from tests.data.kills import OPERATIONS

    left = nth

    def count(event, arguments):
        nonlocal left
        if event not in OPERATIONS:
            return
        if event == "open" and not str(arguments[1]).startswith(("w", "a", "x", "None")):
            return  # read only
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def slow_network(seconds):
    """Every batch takes longer."""
    from distdiff.batch.tasks import Impute

    real = Impute.compute

    def compute(self, block):
        time.sleep(seconds)
        return real(self, block)

    Impute.compute = compute


def log_shards():
    """Write down which shards this process computes."""
    from distdiff.batch import output

    real = output.write_shard

    def write_shard(layout, shard, *rest):
        print(f"shard {shard}", flush=True)
        return real(layout, shard, *rest)

    output.write_shard = write_shard


def log_lock():
    """Write down when this process wants the lock, which must be another's by then."""
    from distdiff import owner

    real, tries = owner.acquire, []

    def acquire(lock, note):
        if not tries:
            wait_for(note.exists)
        tries.append(1)
        print("locking", flush=True)
        return real(lock, note)

    owner.acquire, owner.WAIT = acquire, 30.0


def step_clock(seconds):
    """The clock jumps between any two looks: the wall clock, and the time since which the machine runs."""
    import psutil._pslinux as linux

    real_time, real_boot, looks = time.time, linux.boot_time, []

    def jump():
        looks.append(1)
        return seconds if len(looks) % 2 else -seconds

    time.time = lambda: real_time() + jump()
    linux.boot_time = lambda: real_boot() + jump()


def fail_on_rank(rank):
    """The shards of one rank cannot be computed."""
    from distdiff.batch.tasks import Impute

    if os.environ["RANK"] == str(rank):

        def compute(self, block):
            if block.start:
                raise ValueError("this block is bad")
            return real(self, block)

        real = Impute.compute
        Impute.compute = compute


def hasty(patience, rank):
    """Ranks give up soon; one of them stops before its first shard."""
    from distdiff.batch import ranks

    ranks.PATIENCE = patience
    if os.environ["RANK"] == str(rank):
        stop_at("distdiff.batch.compute:ShardComputer.compute")


class Made:
    """Rows that are made when they are read."""

    frame, labels, fingerprint, where = None, {}, "made", "made"

    def __init__(self, n_cells, genes):
        self.n_cells, self.genes = n_cells, genes

    def read(self, start, stop):
        rng = np.random.default_rng(start)
        return sp.csr_matrix(rng.poisson(0.3, (stop - start, len(self.genes))).astype(np.int32))

    def names(self, start, stop):
        return np.array([f"cell{i}" for i in range(start, stop)])

    def obs(self, key):
        raise ValueError(key)


def peak(model, cells, out, queue):
    """Peak memory of an imputation of so many cells."""
    import torch

    from distdiff.batch import local
    from distdiff.batch.summary import peak_mib
    from distdiff.batch.tasks import Impute
    from distdiff.model import Model

    torch.set_num_threads(1)
    model = Model.load(model)
    rows = Made(cells, model.spec.genes[:-5])
    task = Impute(model, rows, data="", layers=("mean", "draws"), dtype="float16")
    local.run(task, out, progress=False, shard_cells=1024, batch_size=256)
    queue.put(peak_mib())
