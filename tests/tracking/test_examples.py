from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module", ["address", "background", "moved", "redact", "run", "spool", "transport", "versions"]
)  # fmt: skip
def test_the_examples_of_the_docstrings_run(module, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    result = doctest.testmod(importlib.import_module(f"distdiff.tracking.{module}"))
    assert result.attempted
    assert not result.failed
