from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest
import torch

from distdiff.model import Model
from distdiff.types import DataSpec
from tests.tracking.runs import GENES, SMALL


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """An MLflow database whose schema is made once for the session (it takes seconds)."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with contextlib.chdir(path.parent):  # where experiment 0 keeps its files
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def here(migrated, tmp_path, monkeypatch):
    """An empty working directory with its own database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small untrained model's folder."""
    spec = DataSpec(GENES, {"cell_type": ("B", "T")}, np.ones(len(GENES), np.float32))
    made = Model.new(spec, {"kind": "counts"}, SMALL)
    generator = torch.Generator().manual_seed(0)
    for weights in made.denoiser.parameters():
        weights.data.normal_(0, 0.3, generator=generator)
    made.info = {"name": "pbmc", "data": "abc", "config": {}}
    return made.save(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture(scope="session")
def packed(model, tmp_path_factory):
    from distdiff.tracking.pack import pack

    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/unused.db")
        pack(model, folder / "model", card="# A card")
    return folder / "model"


@pytest.fixture(scope="session")
def imputes(packed):
    import mlflow

    return mlflow.pyfunc.load_model(str(packed))
