"""Depths of generated cells: the law that a model keeps, and who draws from it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from distdiff.data.store.store import CountStore
from distdiff.denoise.mlp import MLP
from distdiff.process.counts import Counts
from distdiff.process.masked import Masked
from distdiff.tasks.depths import depths_of, label_depths, levels
from distdiff.types import DataSpec

SPEC = DataSpec(("a", "b"), {"type": ("B", "T"), "donor": ("x", "y")}, np.ones(2, np.float32))
FLAT = {"": {"": [7.0] * 5}, "type": {"B": [100.0] * 5, "T": [400.0] * 5}, "donor": {"x": [900.0] * 5}}


def drawn(depth=None, *, n=4, known=FLAT, seed=0, process=None, **labels):
    codes = {k: torch.full((n,), -1) for k in SPEC.labels} | {k: torch.tensor(v) for k, v in labels.items()}
    law = process or Counts()
    info = {"training": {"label_depth": known}} if known else {}
    return depths_of(law, MLP(SPEC, law.outputs, width=4, depth=1), SPEC, info, codes, n, depth, seed=seed)


def test_the_model_keeps_the_quantiles_of_its_training_cells(atlas):
    store = CountStore.open(atlas)
    found, rows = label_depths(store, ["cell_type"]), store.rows("train")
    molecules = np.asarray(store.read(rows).sum(1)).ravel()
    codes = store.labels(rows, ["cell_type"])["cell_type"]
    for value, law in found["cell_type"].items():
        mine = molecules[codes == store.manifest.labels["cell_type"].index(value)]
        assert law == pytest.approx(np.quantile(mine, levels(len(law))), abs=0.01)
    assert found[""][""][0] == molecules.min()


def test_depths_are_drawn_from_the_law_of_the_label():
    train = np.random.default_rng(0).lognormal(7, 0.6, 500)
    known = FLAT | {"type": {"B": np.quantile(train, levels(41)).tolist()}}
    found = drawn(n=20_000, type=[0] * 20_000, known=known).numpy()
    assert found.mean() == pytest.approx(train.mean(), rel=0.02)
    assert found.std() == pytest.approx(train.std(), rel=0.05)
    assert np.array_equal(found[:50], drawn(n=50, type=[0] * 50, known=known).numpy())  # cell i: seed and i alone
    assert not np.array_equal(found[:50], drawn(n=50, type=[0] * 50, known=known, seed=1).numpy())


def test_labels_together_open_and_unseen():
    found = drawn(type=[0, 0, -1, -1], donor=[0, 1, 0, -1])  # donor y has no training cell
    assert found.tolist() == pytest.approx([300.0, 100.0, 900.0, 7.0])  # both: geometric mean; none: all cells


def test_depths_that_are_asked_for():
    assert drawn("free") is None
    assert drawn(500).tolist() == [500.0] * 4
    assert drawn(np.arange(1, 5)).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_models_without_depths(caplog):
    with caplog.at_level(logging.WARNING, "distdiff"):
        assert drawn(known=None, process=Masked()) is None  # has no molecules
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "distdiff"):
        assert drawn(known=None) is None
    assert "does not hold the depths of its training cells" in caplog.text


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        (0, "above 0, got 0"),
        ([1.0, 2.0, -3.0, 4.0], "above 0, got -3"),
        (float("nan"), "above 0, got nan"),
        ([1.0, 2.0], r"one for each of 4 cells is wanted, got shape \[2\]"),
        ("deep", "depth='deep': 'free'"),
    ],
)
def test_bad_depths_are_named(depth, words):
    with pytest.raises(ValueError, match=words):
        drawn(depth)


def test_no_depth_without_molecules():
    with pytest.raises(ValueError, match="depth=5 needs a process whose states are molecules, got Masked"):
        drawn(5, process=Masked())
