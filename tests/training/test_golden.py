"""Losses and answers that a refactor must keep: 10 steps of three laws, and one imputation, from fixed seeds.

The tolerance, 1e-5, is for other processors and versions of torch; a change of code that is meant to keep all numbers
keeps these to the last digit. Numbers that change on purpose stand in CHANGELOG.md under Numbers, and here:
``python -m tests.training.test_golden`` prints new ones.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from distdiff import config, experiment
from distdiff.data.ingest.shard import shard
from distdiff.model import Model

LAWS = {
    "counts": {"process": {"kind": "counts"}, "survival": {"time": "stratified"}, "train": {"accumulate": 2}},
    "gaussian": {"process": {"kind": "gaussian"}, "train": {"noise": "rows"}},
    "masked": {"process": {"kind": "masked"}},
}

GOLDEN: dict[str, dict[str, list[float]]] = {
    "counts": {
        "loss": [
            0.37501138, 1.3674655, 0.87752891, 0.99013817, 0.96678346, 0.80783981, 1.3018008, 0.92736185, 1.1462091,
            1.366842,
        ],
        "grad_norm": [
            1.1739949, 0.95829976, 0.76181537, 1.0943347, 1.4013267, 1.2238412, 1.2446579, 1.4334378, 1.5665417,
            1.7701406,
        ],
        "validation": [6.1780363, 1.3803961],
        "mean": [2.6583341],
        "draws": [2.6683333],
    },
    "gaussian": {
        "loss": [
            1.2123235, 1.1507478, 1.147709, 1.0868995, 1.1614617, 1.014684, 0.98494291, 1.1286541, 1.0121572,
            1.1045272,
        ],
        "grad_norm": [
            0.66611701, 0.72149074, 0.74678218, 0.78682196, 0.5887264, 0.64509386, 0.51332921, 0.61858147,
            0.47190028, 0.65008348,
        ],
        "validation": [6.1547572, 1.1410988],
        "mean": [2.6468108],
        "draws": [2.6045833],
    },
    "masked": {
        "loss": [
            4.2962751, 4.0080652, 2.6823783, 4.2373362, 5.075654, 3.0318286, 4.0901933, 3.0044377, 3.6611781,
            3.8671923,
        ],
        "grad_norm": [
            2.2072041, 2.5132563, 1.5152102, 2.4691927, 2.9570465, 1.7878038, 2.8644238, 1.9286067, 2.1873362,
            1.9057578,
        ],
        "validation": [6.1657084, 3.2084785],
        "mean": [2.6597898],
        "draws": [2.6566667],
    },
}  # fmt: skip


def cells() -> ad.AnnData:
    """120 cells of 20 genes from numpy's Philox, whose numbers are the same everywhere."""
    rng = np.random.Generator(np.random.Philox(3))
    x = np.floor(rng.random((120, 20)) ** 4 * rng.integers(5, 30, 20)).astype(np.float32)
    data = ad.AnnData(x)
    data.obs["kind"] = np.array(["B", "T"])[rng.integers(0, 2, 120)]
    return data


def numbers(law: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of each step, validation after the last; mean and draws of an imputation."""
    data = cells()
    data.write_h5ad(folder / "cells.h5ad")
    shard([folder / "cells.h5ad"], folder / "cells.zarr", labels=("kind",), workers=0, progress=False)
    tree = {
        "data": {"store": str(folder / "cells.zarr"), "labels": ["kind"]},
        "denoiser": {"kind": "mlp", "width": 16, "depth": 1},
        "optim": {"warmup_cells": 64},
        "loader": {"strata": ""},  # as before labels chose an order of their own
        **law,
        "survival": {"levels": "schedule", **law.get("survival", {})},
        "evaluate": {"enabled": False},
        "tracking": {"enabled": False},
        "train": {"out": str(folder / "run"), "cells": 160, "batch": 16, "grain": 4, "eval_cells": 16, "patience": 99,
                  "checkpoint_cells": 10**9, "precision": "fp32", **law.get("train", {})},
    }  # fmt: skip
    outcome = experiment.train(config.parse(tree))
    history = outcome.progress.history
    mask = np.random.Generator(np.random.Philox(4)).random(data.shape) < 0.5
    imputed = Model.load(outcome.model).impute(data, mask=mask, steps=2, seed=5, device="cpu")
    return {
        "loss": [log["loss"] for log in history],
        "grad_norm": [log["grad_norm"] for log in history],
        "validation": [history[-1]["val/deviance"], history[-1]["val/loss"]],
        "mean": [float(imputed.layers["imputed_mean"].mean(dtype=np.float64))],
        "draws": [float(imputed.layers["imputed"].mean(dtype=np.float64))],
    }


@pytest.mark.parametrize("law", LAWS)
def test_losses_and_answers_are_those_of_record(law, tmp_path):
    found = numbers(LAWS[law], tmp_path)
    assert found.keys() == GOLDEN[law].keys()
    for name, values in found.items():
        rounding = 1e-3 if name == "draws" else 1e-5  # another processor may draw one molecule more, of thousands
        assert values == pytest.approx(GOLDEN[law][name], rel=rounding), name


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    for name, law in LAWS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: numbers(law, Path(folder))}))
