from __future__ import annotations

import gc

import numpy as np
import torch

from distdiff.data.store import recycle


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_view_is_gone(monkeypatch):
    monkeypatch.setattr(recycle, "_shelf", recycle._Shelf())
    a = recycle.empty((300, 1000), np.float32)
    a[:] = 7
    where, row, tensor = address(a), a[3], torch.from_numpy(a[5:])
    del a
    other = recycle.empty((300, 1000), np.float32)
    assert address(other) != where
    assert (row == 7).all()
    assert (tensor == 7).all()
    del row, tensor, other
    gc.collect()
    there = {address(x) for x in [recycle.empty(1_100_000, np.uint8), recycle.empty(300_000, np.float32)]}
    assert where in there
    assert len(there) == 2


def test_small_arrays_and_a_full_shelf(monkeypatch):
    shelf = recycle._Shelf()
    monkeypatch.setattr(recycle, "_shelf", shelf)
    assert recycle.empty(10, np.int32).base is None
    monkeypatch.setattr(recycle, "KEEP", 1 << 20)
    many = [recycle.empty(1 << 20, np.uint8) for _ in range(3)]
    del many
    gc.collect()
    assert shelf._kept == 1 << 20
