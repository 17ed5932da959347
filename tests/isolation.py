"""What all tests of a process share, and a test must leave as it found it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
WATCHED = re.compile(
    "(ACCELERATE|AWS|CUDA|DASK|DISTDIFF|DS|FSDP|GLOO|GROUP|LOCAL|MASTER|MLFLOW_(TRACKING|RUN|EXPERIMENT)|SLURM|WORLD)_"
    "|(HOME|PATH|PYTHONPATH|RANK|TMPDIR|TZ)$"
)
"""Of the environment: what users, launchers and tests set. Libraries set others, once a process."""
DASK = ("MALLOC_TRIM_THRESHOLD_", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "__DASK_PARENT_PID")
"""What dask sets for workers that are processes, and leaves: put back without a word."""
WRITTEN = ("distdiff-quickstart", "mlflow.db", "mlruns", "runs")
"""What distdiff writes into the current directory."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOGGERS = ("", "distdiff")


def world() -> dict[str, Any]:
    """The state of now, by name."""
    return {
        "the environment": {k: v for k, v in os.environ.items() if WATCHED.match(k)},
        "the current directory": os.getcwd(),
        "files of the repository": {name: "is there" for name in WRITTEN if (ROOT / name).exists()},
        "torch": {
            "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
            "precision": torch.get_float32_matmul_precision(), "group": torch.distributed.is_initialized(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "numpy's errors": np.geterr(),
        "signals": {number.name: signal.getsignal(number) for number in SIGNALS},
        "levels of logging": {name: logging.getLogger(name).level for name in LOGGERS},
        "logging is disabled up to": logging.root.manager.disable,
    }  # fmt: skip


def put_back(before: dict[str, Any]) -> None:
    """Bring back what the next test would see."""
    for name in filter(WATCHED.match, {*os.environ}):
        del os.environ[name]
    os.environ.update(before["the environment"])
    os.chdir(before["the current directory"])
    torch.set_default_dtype(before["torch"]["dtype"])
    torch.set_grad_enabled(before["torch"]["grad"])
    torch.set_float32_matmul_precision(before["torch"]["precision"])
    torch.use_deterministic_algorithms(before["torch"]["deterministic"])
    np.seterr(**before["numpy's errors"])
    for number in SIGNALS:
        signal.signal(number, before["signals"][number.name])
    for name, level in before["levels of logging"].items():
        logging.getLogger(name).setLevel(level)
    logging.disable(before["logging is disabled up to"])


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put everything back in the end.

    Raises
    ------
    AssertionError
        Something is another than before; it says what.
    """
    before, path = world(), list(sys.path)  # MLflow adds to it when it loads a model
    unset = [name for name in DASK if name not in os.environ]
    yield
    sys.path[:] = path
    for name in unset:
        os.environ.pop(name, None)
    try:
        after = world()
    except FileNotFoundError:
        os.chdir(ROOT)
        after = {**world(), "the current directory": "removed"}
    if odd := [f"{name}: {_said(before[name], after[name])}" for name in before if before[name] != after[name]]:
        put_back(before)
        raise AssertionError("a test left behind: " + "; ".join(odd))


def _said(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        return ", ".join(
            f"{k}={after.get(k, 'gone')!r}, before {before.get(k, 'nothing')!r}"
            for k in sorted({*before, *after})
            if before.get(k, "nothing") != after.get(k, "nothing")
        )
    return f"{after}, before {before}"
