"""A process of its own at the price of a fork: one server for all tests of a process, which has imported everything.

It has run nothing, so it holds no thread and no lock. There is one server and one list of what it imports: a second
list would be read by nobody once the server runs.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

SERVER = multiprocessing.get_context("forkserver")
IMPORTED = [
    "anndata", "dask.distributed", "distdiff.batch.ranks", "distdiff.cli", "distdiff.data.ingest.scan",
    "distdiff.experiment", "distdiff.tasks.measure", "matplotlib.backends.backend_agg", "mlflow", "scipy.sparse",
    "torch._dynamo", "torch.distributed.tensor", "zarr",
]  # fmt: skip
if all(map(importlib.util.find_spec, ("deepspeed", "transformers"))):
    IMPORTED.append("deepspeed")


def start() -> None:
    """Start the server, if it does not run."""
    SERVER.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed looks when it is imported
        forkserver.ensure_running()


def process(target: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:
    """A process that will call ``target(*args)`` once it is started."""
    start()
    return SERVER.Process(target=target, args=args)
