"""What all tests of a process share, and a test must leave as it found it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
LASTING = ("MLFLOW_", "TENSORSTORE_CURL_", "PYTORCH_NVML_", "PYTEST_")
"""Of the environment: what distdiff sets for its libraries once a process, and pytest for itself."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
LOGGERS = ("", "distdiff")


def world() -> dict[str, object]:
    """The state of now, by name."""
    return {
        "the environment": {k: v for k, v in os.environ.items() if not k.startswith(LASTING)},
        "the current directory": os.getcwd(),
        "files of the repository": {name for name in os.listdir(ROOT) if not name.startswith(".")} - {"build"},
        "torch": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), torch.distributed.is_initialized(),
        ),
        "numpy's errors": np.geterr(),
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "levels of logging": (logging.root.manager.disable, *(logging.getLogger(name).level for name in LOGGERS)),
    }  # fmt: skip


def put_back(before: dict[str, object], path: list[str]) -> None:
    """Bring back what the next test would see."""
    lasting = {k: v for k, v in os.environ.items() if k.startswith(LASTING)}
    os.environ.clear()
    os.environ.update(before["the environment"] | lasting)
    os.chdir(before["the current directory"])
    dtype, grad, exact, precision, _ = before["torch"]
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(exact)
    torch.set_float32_matmul_precision(precision)
    np.seterr(**before["numpy's errors"])
    for number, handler in zip(SIGNALS, before["signals"], strict=True):
        signal.signal(number, handler)
    disabled, *levels = before["levels of logging"]
    logging.disable(disabled)
    for name, level in zip(LOGGERS, levels, strict=True):
        logging.getLogger(name).setLevel(level)
    sys.path[:] = path


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put everything back in the end.

    Raises
    ------
    AssertionError
        Something is another than before; it says what.
    """
    before, path = world(), list(sys.path)  # which MLflow adds to when it loads a model
    yield
    try:
        after = world()
    except FileNotFoundError:
        after = {**before, "the current directory": "removed"}
    if odd := {name: (before[name], after[name]) for name in before if before[name] != after[name]}:
        put_back(before, path)
        raise AssertionError("a test left behind: " + "; ".join(map(_said, odd, odd.values())))
    sys.path[:] = path


def _said(name: str, pair: tuple[object, object]) -> str:
    before, after = pair
    if isinstance(before, dict) and isinstance(after, dict):
        before, after = (dict(sorted(set(a.items()) - set(b.items()))) for a, b in ((before, after), (after, before)))
    elif isinstance(before, set) and isinstance(after, set):
        before, after = before - after, after - before
    return f"{name}: {after}, before {before}"
