"""Killed at any moment, or asked to leave: the same command ends with the same weights, bit for bit on a CPU."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from distdiff import experiment
from distdiff.train import checkpoint, engine
from tests.train import processes
from tests.train.test_loop import assert_equal, final, make

SHORT = {"cells": 640, "eval_cells": 160, "checkpoint_cells": 32}
"""20 steps, each of them saved."""


def dies_while_saving(calls: int) -> None:
    """Kill this process, as if the power failed, at its ``calls``-th write, flush or rename of a checkpoint."""
    left = iter(range(calls, 0, -1))

    def counted(real):
        def call(*args):
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    os.fsync, os.replace, checkpoint.save_file = map(counted, (os.fsync, os.replace, checkpoint.save_file))


def walks(seen: Path) -> None:
    """Take time for each step, and tell that there was one."""
    real = engine.Engine.step

    def step(self):
        seen.touch()
        time.sleep(0.05)
        return real(self)

    engine.Engine.step = step


@pytest.fixture(scope="module")
def whole(atlas, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    experiment.train(make(atlas, folder, **SHORT))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_also_while_saving(atlas, whole, tmp_path, kills):
    """Every other kill hits inside a save; the others come whenever the clock says."""
    chance, config = random.Random(kills), make(atlas, tmp_path / "run", **SHORT)
    died = 0
    for kill in range(kills):
        inside = chance.randint(1, 24) if kill % 2 else 10**9
        (child,) = processes.start(config, tmp_path / "log", prepare=dies_while_saving, given=inside)
        child.join(60 if kill % 2 else chance.uniform(0, 2))
        child.kill()
        child.join(10)
        died += child.exitcode == -signal.SIGKILL
    assert died > kills // 2
    processes.run(config, tmp_path / "log")
    assert_equal(final(whole), final(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # nothing half-written is left


@pytest.mark.distributed
def test_one_of_two_processes_is_asked_to_leave_both_save_and_one_process_goes_on(atlas, whole, tmp_path):
    config = make(atlas, tmp_path / "run", **SHORT | {"checkpoint_cells": 10**6})
    seen, until = tmp_path / "seen", time.monotonic() + 60
    ranks = processes.start(config, tmp_path / "log", world=2, prepare=walks, given=seen)
    while time.monotonic() < until and not seen.exists():
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGUSR1)
    codes = processes.finish(ranks)
    words = [(tmp_path / f"log.{i}.txt").read_text() for i in range(2)]
    assert codes == [75, 75], "\n".join(words)
    assert "stopped by another process after step" in words[0]
    assert "stopped by SIGUSR1 after step" in words[1]
    stopped = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert 0 < int(stopped.name[5:]) < 20
    processes.run(config, tmp_path / "log")
    one, two = final(whole), final(tmp_path / "run")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k], two[k], rtol=1e-3, atol=1e-5) for k in one)
