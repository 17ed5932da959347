"""Training on a GPU: near the CPU's result, bf16 near float32, and exact enough to be killed and continued."""

from __future__ import annotations

import signal

import pytest
import torch

from distdiff import experiment
from tests.training import processes
from tests.training.test_loop import final, make
from tests.training.test_resume import wait_for, walks

pytestmark = pytest.mark.gpu

SHORT = {"cells": 1280, "eval_cells": 320, "checkpoint_cells": 64, "precision": "fp32"}


def scores(atlas, out, **train) -> list[float]:
    history = experiment.train(make(atlas, out, **SHORT | train)).progress.history
    return [h["val/deviance"] for h in history]


def test_it_learns_what_a_cpu_learns(atlas, tmp_path, gpu, monkeypatch):
    """Noise is another device's, masks of validation are not: scores agree to a few percent."""
    there = scores(atlas, tmp_path / "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = scores(atlas, tmp_path / "here")
    assert there == pytest.approx(here, rel=0.1)


def test_bf16_is_near_float32(atlas, tmp_path, gpu):
    assert scores(atlas, tmp_path / "a", precision="bf16") == pytest.approx(scores(atlas, tmp_path / "b"), rel=0.03)


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_how_cells_come_changes_nothing(atlas, tmp_path, gpu, resident):
    from dataclasses import replace

    config = make(atlas, tmp_path / resident, **SHORT)
    config = replace(config, loader=replace(config.loader, resident=resident))
    got = [h["loss"] for h in experiment.train(config).progress.history]
    want = [h["loss"] for h in experiment.train(make(atlas, tmp_path / "auto", **SHORT)).progress.history]
    assert got == pytest.approx(want, rel=1e-4)


def test_killed_and_continued(atlas, tmp_path, gpu):
    processes.run(make(atlas, tmp_path / "whole", **SHORT), tmp_path / "log")
    config = make(atlas, tmp_path / "run", **SHORT)
    (child,) = processes.start(config, tmp_path / "log", prepare=walks, given=tmp_path / "seen")
    wait_for(tmp_path / "run" / "checkpoints" / "step-000000006")
    child.kill()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    processes.run(config, tmp_path / "log")
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "run")
    assert whole.keys() == parts.keys()
    away = [k for k in whole if not torch.allclose(whole[k], parts[k], rtol=1e-3, atol=1e-5)]
    assert away == []
