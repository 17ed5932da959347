from __future__ import annotations

import os

import pytest

import tests.typecheck  # noqa: F401 (named in the hook below)
from hypothesis import settings
from jaxtyping import install_import_hook

# shapes and types are checked while the tests run, and only then
install_import_hook(["distdiff.process", "distdiff.sampling", "distdiff.denoise"], "tests.typecheck.check")

settings.register_profile("distdiff", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("distdiff")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
