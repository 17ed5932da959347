"""Processes forked from one that has imported everything, so that a rank starts in a blink."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp


def context():
    """A clean server to fork from: it has run nothing, so it holds no thread and no lock."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.batch.forks", "distdiff.batch", "zarr", "anndata", "scipy.sparse"])
    return found


class Watched:
    """A task that is slow, and writes down every batch that it computes although its shard was finished."""

    def __init__(self, task, out, log, nap):
        self.__dict__.update(task=task, work=Path(out).with_name(f".{Path(out).name}.building"), log=log, nap=nap)

    def __getattr__(self, name):
        return getattr(self.task, name)

    def compute(self, block):
        if (self.work / "job.json").exists():
            rows = json.loads((self.work / "job.json").read_text())["layout"]["rows"]
            again = (self.work / "done" / f"shard-{block.start // rows:06d}.json").exists()
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {block.start} {'again' if again else 'first'}\n")
            time.sleep(self.nap)
        return self.task.compute(block)


def rank(model, data, out, log, nap, options):
    """What one process of a launcher does."""
    import torch

    from distdiff import batch
    from distdiff.batch import job
    from distdiff.model import Model

    torch.set_num_threads(1)
    task = batch.make_task("impute", Model.load(model), data, Path(out), **options)
    job.run(Watched(task, out, log, nap), out, data="atlas", progress=False, shard_cells=16, batch_size=16)


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

    from distdiff.batch import job
    from distdiff.batch.summary import peak_mib
    from distdiff.batch.tasks import Impute
    from distdiff.model import Model

    torch.set_num_threads(1)
    model = Model.load(model)
    rows = Made(cells, model.spec.genes[:-5])
    task = Impute(model, rows, data="", layers=("mean", "draws"), dtype="float16")
    job.run(task, out, progress=False, shard_cells=1024, batch_size=256)
    queue.put(peak_mib())
