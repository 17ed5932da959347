"""Scores of generated cells: right answers on cells whose law is known, and the report of a trained model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import spearmanr

import distdiff
from distdiff import config, experiment
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.realism import COPIES, OURS, REAL, correlation, energy, evaluate_generated, independent


@pytest.fixture(scope="module")
def model(atlas, tmp_path_factory):
    raw = {
        "data": {"store": str(atlas), "labels": ["cell_type"]},
        "denoiser": {"width": 32, "depth": 1},
        "survival": {"hidden": 0.2, "two_level": 0.0, "uniform": 0.8},
        "optim": {"lr": 6e-3, "ema": 0.95, "warmup_cells": 200},
        "train": {"out": str(tmp_path_factory.mktemp("run")), "cells": 12800, "batch": 64, "eval_cells": 6400},
        "evaluate": {"enabled": False},
        "tracking": {"enabled": False},
    }
    return Model.load(experiment.train(config.parse(raw)).model)


@pytest.fixture(scope="module")
def report(model, atlas):
    return evaluate_generated(model, CountStore.open(atlas), cells=60, steps=8, progress=False, scvi=False)


def test_each_row_scores_what_it_is(report):
    rows = report.rows
    assert set(rows) == {OURS, REAL, COPIES, "NB of the label's mean", "Poisson of the label's mean"}
    for value in ("B", "T"):
        assert rows[COPIES][value]["nearest"] < 1e-3  # copies are seen
        assert rows[REAL][value]["nearest"] == 1
        assert 0.5 < rows[OURS][value]["nearest"] < 2
        assert rows["Poisson of the label's mean"][value]["depth_sd"] < 0.5 < rows[COPIES][value]["depth_sd"]
        assert rows[OURS][value]["recognised"] > 0.8
        assert rows[OURS][value]["depth_sd"] == pytest.approx(1, abs=0.3)
        assert math.isnan(rows[REAL][value]["energy"])
    want = np.mean([rows[OURS][v]["energy"] for v in ("B", "T")])
    assert rows[OURS][""]["energy"] == pytest.approx(want)


def test_each_value_has_chances_of_its_own(report):
    """One seed for all would draw the same depths of both, so a mean over values would hold the luck of one."""
    depth = np.asarray(report.generated.X.sum(1)).ravel()
    assert abs(spearmanr(depth[:60], depth[60:120]).statistic) < 0.5


def test_a_report_is_text_table_json_and_figure(report, tmp_path):
    for value in ("B", "T"):
        report.rows[OURS][value]["recognised"] = report.rows[REAL][value]["recognised"]
    text = report.to_text()
    assert "60 generated cells a value of 'cell_type' x 30 genes, 8 steps" in text
    assert "2 of 2 labels with 15 training cells or more are recognised at least 90 %" in text
    assert report.metrics()["generate/recognised/B"] == report.rows[OURS]["B"]["recognised"]
    assert len(report.table) == 5 * 3 * 8
    report.write(tmp_path / "r")
    told = json.loads((tmp_path / "r" / "generate.json").read_text())
    assert told["rows"][REAL]["B"]["energy"] is None  # JSON has no NaN
    assert (tmp_path / "r" / "depth.png").exists()
    report.rows[OURS]["B"]["recognised"] = 0.1
    assert "1 of 2 labels" in report.claims()[0]


def test_generation_is_evaluated_from_python_too(model, atlas):
    found = distdiff.evaluate(model, atlas, task="generate", cells=4, steps=1, scvi=False, progress=False)
    assert found.setting["cells"] == 4
    with pytest.raises(ValueError, match="needs a label that both the model and the store have, got 'donor'"):
        distdiff.evaluate(model, atlas, task="generate", cell_type="donor", progress=False)
    with pytest.raises(ValueError, match="cells must be at least 2"):
        distdiff.evaluate(model, atlas, task="generate", cells=1, progress=False)
    with pytest.raises(ValueError, match="the tasks are impute and generate"):
        distdiff.evaluate(model, atlas, task="genrate", progress=False)


def test_distances_of_known_samples():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 3)), rng.normal(size=(400, 3))
    assert abs(energy(a, b)) < 0.02
    assert energy(a, b + 1) > 0.3
    assert math.isnan(energy(a, b[:1]))
    assert correlation(a, b) < 0.15
    assert math.isnan(correlation(a, b[:2]))


def test_controls_keep_mean_and_dispersion():
    rng = np.random.default_rng(0)
    real = sp.csr_matrix(rng.negative_binomial(2.0, 2.0 / (2.0 + 5.0), (4000, 5)).astype(np.float32))
    for poisson, variance in ((False, 5 + 25 / 2), (True, 5)):
        made = independent(real, 20_000, rng, poisson=poisson).toarray()
        assert made.mean() == pytest.approx(5, rel=0.05)
        assert made.var(0).mean() == pytest.approx(variance, rel=0.1)
