"""The guard of tests/isolation.py, which watches every test, sees what it is there for."""

from __future__ import annotations

import logging
import os
import signal
import sys

import numpy as np
import pytest
import torch

from tests.conftest import LONGEST
from tests.isolation import ROOT, kept, world


def untidy(path):
    (ROOT / "mlflow.db").touch()


LEAKS = {
    "the environment: RANK='3', before 'nothing'": lambda path: os.environ.__setitem__("RANK", "3"),
    "the environment: PATH='gone'": lambda path: os.environ.pop("PATH"),
    "the current directory": lambda path: os.chdir(path),
    "the current directory: removed": lambda path: (os.chdir(path), path.rmdir()),
    "files of the repository: mlflow.db": untidy,
    "torch: dtype=torch.float64": lambda path: torch.set_default_dtype(torch.float64),
    "numpy's errors": lambda path: np.seterr(all="raise"),
    "signals: SIGUSR1": lambda path: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    "logging is disabled": lambda path: logging.disable(),
    "levels of logging: distdiff": lambda path: logging.getLogger("distdiff").setLevel(logging.CRITICAL),
}


@pytest.mark.parametrize("told", LEAKS)
def test_what_a_test_leaves_behind_is_told_and_put_back(told, tmp_path):
    before = world()
    try:
        with pytest.raises(AssertionError) as error, kept():
            LEAKS[told](tmp_path)
    finally:
        (ROOT / "mlflow.db").unlink(missing_ok=True)
    assert f"left behind: {told}" in str(error.value)
    assert world() == before


def test_modules_of_a_model_that_was_loaded_are_found_by_that_test_alone():
    before = list(sys.path)
    with kept():
        sys.path.insert(0, "/elsewhere")
    assert sys.path == before


def test_the_longest_files_are_there():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).exists()] == []
