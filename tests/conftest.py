from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (named in the hook below)

# shapes and types are checked while the tests run, and only then
install_import_hook(["distdiff.process", "distdiff.sampling", "distdiff.denoise"], "tests.typecheck.check")

settings.register_profile("distdiff", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("distdiff")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


LONGEST = (
    "test_walk.py", "slurm/test_train.py", "hosts/test_training.py", "training/test_engines.py", "test_cli.py",
    "batch/test_engines.py", "data/ingest/test_shard.py", "batch/test_faults.py", "training/test_resume.py",
    "test_examples.py", "test_recipes.py", "training/test_compiled.py", "test_fuzz_inputs.py", "hosts/test_dask.py",
    "slurm/test_dask.py", "test_fuzz_saved.py", "data/store/test_remote.py", "tracking/test_transport.py",
)  # fmt: skip
"""Files that take longest, in this order."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own order puts files of many tests first


def pytest_collection_modifyitems(config, items):
    """Processes of ``-n 2 --dist loadfile`` begin with the longest files, so that none is left alone with one."""
    if hasattr(config, "workerinput"):
        place = {f"tests/{name}": at for at, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture(autouse=True)
def _kept():
    """No test sees what another left behind; the one that did fails."""
    from tests.isolation import kept

    with kept():
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_tracking_server():
    """No test sees the tracking server of another: ``mlflow.set_tracking_uri`` sets the environment too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield
        if "mlflow" in sys.modules:
            import mlflow

            mlflow.set_tracking_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture
def forked_workers():
    """Workers of a dask cluster of this machine begin at the price of a fork."""
    import dask.distributed  # its defaults must be there before they are changed

    from tests import forkserver

    forkserver.start()
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture
def gpu():
    """The device of tests marked ``gpu``: CUDA, or what DISTDIFF_TEST_DEVICE names (cpu: a rehearsal without a GPU)."""
    import torch

    device = os.environ.get("DISTDIFF_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
    if not device:
        pytest.skip("needs a CUDA device (DISTDIFF_TEST_DEVICE=cpu rehearses the test on a CPU)")
    return torch.device(device)


@pytest.fixture(scope="session")
def counts():
    """A made data set with structure: 200 cells x 30 genes, two cell types, gamma-Poisson, one empty cell."""
    import anndata as ad
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 200)
    profile = rng.gamma(0.6, 2.0, (2, 30))
    depth = rng.lognormal(0, 0.4, 200)
    x = rng.poisson(rng.gamma(2.0, profile[kind] * depth[:, None] / 2.0)).astype(np.float32)
    x[7] = 0
    obs = pd.DataFrame({"cell_type": np.array(["B", "T"])[kind]}, index=[f"cell{i}" for i in range(200)])
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(30)]))


@pytest.fixture(scope="session")
def atlas(counts, tmp_path_factory):
    """The store of :func:`counts`."""
    from distdiff.data.ingest.shard import shard

    folder = tmp_path_factory.mktemp("atlas")
    counts.write_h5ad(folder / "counts.h5ad")
    shard([folder / "counts.h5ad"], folder / "atlas.zarr", labels=("cell_type",), workers=0, progress=False)
    return folder / "atlas.zarr"
