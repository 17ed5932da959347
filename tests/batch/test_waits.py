"""A batch of a task on files waits for the GPU nowhere while it is computed (what the count sees: tests.waits)."""

from __future__ import annotations

import pytest
import torch

from distdiff.batch.rows import StoreRows
from distdiff.batch.tasks import Deepen, Denoise, Generate, Impute
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.rng.rows import Rows
from tests.waits import DEVICE, Waits

TASKS = {
    "impute": lambda m, r: Impute(m, r, data="", sites="dropout", groups="cell_type", draws=2,
                                  layers=("mean", "draws", "mask", "sd", "ood")),
    "impute in steps": lambda m, r: Impute(m, r, data="", sites="dropout", groups="cell_type",
                                           layers=("draws",), steps=4),
    "denoise": lambda m, r: Denoise(m, r, ood=2),
    "deepen": lambda m, r: Deepen(m, r, times=2.0, beyond="allow"),
    "generate": lambda m, r: Generate(m, 50, steps=3, device=str(DEVICE)),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_waits_for_nothing_until_it_is_fetched(atlas, monkeypatch, name):
    store = CountStore.open(atlas)
    model = Model.new(store.spec(("cell_type",)), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    task = TASKS[name](model, StoreRows(store))
    task.device = DEVICE
    block = task.read(0, 50)
    model.denoiser.to(DEVICE).eval()
    real = Rows.__init__
    monkeypatch.setattr(Rows, "__init__", lambda self, *a, **k: real(self, *a, **{**k, "fused": True}))
    monkeypatch.setattr(
        Rows, "_kernel", lambda self, law, shape, *given: torch.empty(shape, device=DEVICE) + self._begin(shape)[0]
    )
    with Waits() as waits:
        values, filled = task.compute(block)
    assert waits.seen == []
    assert all(v.device == DEVICE for k, v in values.items() if k != "X" or name == "generate")
    with waits:
        filled()
    assert len(waits.seen) == (1 if name.startswith(("impute", "denoise")) else 0)  # numbers of what was done


@pytest.mark.parametrize("name", ["impute", "generate"])
def test_without_the_kernels_it_waits(atlas, name):
    """So the kernels are what takes the waits away: the count above cannot be blind to them."""
    store = CountStore.open(atlas)
    model = Model.new(store.spec(("cell_type",)), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    task = TASKS[name](model, StoreRows(store))
    task.device = DEVICE
    block = task.read(0, 50)
    model.denoiser.to(DEVICE).eval()
    with Waits() as waits:
        task.compute(block)
    assert any("rows.py" in where for where in waits.seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["impute", "impute in steps", "denoise"])
def test_on_a_gpu_a_batch_waits_for_nothing(atlas, name):
    store = CountStore.open(atlas)
    model = Model.new(store.spec(("cell_type",)), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    task = TASKS[name](model, StoreRows(store))
    model.denoiser.to(task.device).eval()
    task.compute(task.read(0, 50))  # kernels are compiled
    block = task.read(50, 100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, filled = task.compute(block)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    filled()
