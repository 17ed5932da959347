from __future__ import annotations

import numpy as np
import pytest

from distdiff.data.masks import mcar
from distdiff.data.store.store import CountStore
from distdiff.model import Model

OPTIONS = ({"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1})


@pytest.fixture(scope="module")
def saved(atlas, tmp_path_factory):
    """Folder of a small model of the store."""
    model = Model.new(CountStore.open(atlas).spec(("cell_type",)), *OPTIONS)
    return model.save(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def mask(atlas, tmp_path_factory):
    """In the order of the store, as a file."""
    path = tmp_path_factory.mktemp("mask") / "mask.npy"
    np.save(path, mcar((199, 30), 0.2, np.random.default_rng(0)))
    return str(path)
