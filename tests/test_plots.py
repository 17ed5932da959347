from __future__ import annotations

import numpy as np
import pytest

from distdiff import plots

PNG = b"\x89PNG\r\n\x1a\n"


def _size(path):
    data = path.read_bytes()
    assert data[:8] == PNG
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 3.0, (40, 30)).astype(np.float32)
    truth = rng.poisson(rate).astype(np.float32)
    targets = rng.random(truth.shape) < 0.5
    return truth, targets, rate, rng.poisson(rate, (3, *rate.shape)).astype(np.float32)


def test_calibration(made, tmp_path):
    plots.calibration(*made, tmp_path / "deep" / "cal.png")
    assert _size(tmp_path / "deep" / "cal.png") == (1950, 630)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["cal.png"]
    first = (tmp_path / "deep" / "cal.png").read_bytes()
    plots.calibration(*made, tmp_path / "deep" / "cal.png")
    assert (tmp_path / "deep" / "cal.png").read_bytes() == first  # same seed, same picture


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_calibration_of_an_imputer_that_says_one_thing(made, tmp_path, mean):
    truth, targets, _, draws = made
    plots.calibration(truth, targets, np.full_like(truth, mean), np.full_like(draws, mean), tmp_path / "cal.png")
    assert _size(tmp_path / "cal.png") == (1950, 630)


def test_training_curve(tmp_path):
    history = [{"cells": 64 * i, "loss": 3 / i, "val/deviance": 2 / i} for i in range(1, 9)]
    for n in (1, 8):
        plots.training_curve(history[:n], tmp_path / "train.png")
        assert _size(tmp_path / "train.png") == (1050, 600)


@pytest.mark.parametrize("n_labels", [0, 3, 25])
def test_umap(made, tmp_path, monkeypatch, n_labels):
    truth, targets, _, draws = made
    seen = []
    monkeypatch.setattr(plots, "_embed", lambda x, seed: seen.append(x) or x[:, :2])
    before, after = np.where(targets, 0, truth), np.where(targets, draws[0], truth)
    labels = np.array([None if i == 0 else f"type {i % n_labels}" for i in range(40)]) if n_labels else None
    plots.umap(before, after, truth, labels, tmp_path / "umap.png")
    assert (seen[0] == np.concatenate([truth, before, after])).all()
    assert _size(tmp_path / "umap.png") == (2100, 690)


def test_embedding_is_joint_and_repeats(made):
    truth, targets, _, _ = made
    both = np.concatenate([truth, np.where(targets, 0, truth), np.zeros((1, 30))])
    place = plots._embed(both, 0)
    assert place.shape == (81, 2)
    assert np.isfinite(place).all()
    assert (place == plots._embed(both, 0)).all()


def test_colours_are_distinct():
    for n in (1, 10, 25, 60):
        assert len(set(plots._colours(n))) == n
    assert len(plots._colours(75)) == 75


def test_a_picture_that_fails_leaves_nothing(made, tmp_path):
    (tmp_path / "cal.png").write_bytes(b"older")
    with pytest.raises(IndexError):
        plots.calibration(made[0], made[1][:3], *made[2:], tmp_path / "cal.png")
    assert (tmp_path / "cal.png").read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["cal.png"]
