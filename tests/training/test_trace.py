"""What is told of a run's time: a trace of some steps, the share waited for cells."""

from __future__ import annotations

import itertools
import json
import logging
import time

import torch

from distdiff import experiment
from distdiff.training import loop, trace
from tests.training.test_loop import make


def test_a_trace_holds_the_steps_that_were_asked_for(atlas, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(experiment.tracking.Run, "artifact", lambda self, path, folder=None: kept.append(path))
    experiment.train(make(atlas, tmp_path, trace=True))
    written = json.loads((tmp_path / trace.NAME).read_text())
    events = [event for event in written["traceEvents"] if event.get("ph") == "X"]
    steps = sorted(event["name"] for event in events if event["name"].startswith("ProfilerStep#"))
    first = trace.SKIP + trace.WARM
    assert steps == [f"ProfilerStep#{first + i}" for i in range(trace.ACTIVE)]
    count = {name: sum(event["name"] == name for event in events) for name in ("aten::binomial", "wait for cells")}
    grains = 32 // 8
    assert count == {"aten::binomial": grains * trace.ACTIVE, "wait for cells": trace.ACTIVE}
    assert tmp_path / trace.NAME in kept


def test_a_run_too_short_for_a_trace_says_so_and_no_trace_costs_nothing(atlas, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "distdiff"):
        experiment.train(make(atlas, tmp_path, trace=True, cells=160))
    assert "fewer than 12 steps" in caplog.text
    assert not (tmp_path / trace.NAME).exists()
    with trace.trace(None, torch.device("cpu")) as stepped:
        assert stepped() is None


def test_the_share_of_time_waited_for_cells_is_logged(atlas, tmp_path, monkeypatch):
    real = loop.loader

    def slow(*args, **kwargs):
        for batch in (batches := real(*args, **kwargs)):
            time.sleep(0.05)
            yield batch
        batches.close()

    fast = experiment.train(make(atlas, tmp_path / "fast", cells=640)).progress.history
    monkeypatch.setattr(loop, "loader", slow)
    waits = experiment.train(make(atlas, tmp_path / "slow", cells=640)).progress.history
    assert all(0 <= h["data_wait"] < 1 for h in itertools.chain(fast, waits))
    assert waits[-1]["data_wait"] > max(0.3, fast[-1]["data_wait"])
    assert waits[-1]["cells_per_second"] < 32 / 0.05


def test_tf32_is_for_the_time_of_a_run(atlas, tmp_path):
    seen = []
    real = experiment.fit

    def fit(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return real(*args, **kwargs)

    before = torch.get_float32_matmul_precision()
    for precision in ("tf32", "fp32"):
        experiment.fit = fit
        try:
            experiment.train(make(atlas, tmp_path / precision, precision=precision, cells=64, eval_cells=64))
        finally:
            experiment.fit = real
        assert torch.get_float32_matmul_precision() == before
    assert seen == ["high", "highest"]
