"""Killed at any moment, or asked to leave: the same command ends with the same weights, bit for bit on a CPU."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from distdiff import experiment
from distdiff.training import checkpoint, engine, machine, stop
from tests.training import processes
from tests.training.test_loop import assert_equal, final, make

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


def wait_for(path: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not path.exists():
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(atlas, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    experiment.train(make(atlas, folder, **SHORT))
    return folder


def frail(given: tuple[Path, int]) -> None:
    """Walk, and die while saving."""
    walks(given[0])
    dies_while_saving(given[1])


@pytest.mark.distributed
@pytest.mark.parametrize(("kills", "steps"), [(4, 20), pytest.param(20, 60, marks=pytest.mark.long)])
def test_killed_at_random_moments_also_while_saving(atlas, tmp_path, kills, steps):
    """By turns inside a save, between two steps, and whenever it may be from the start of the process on.

    Each life gets three steps further at most, so that all of them end by the kill.
    """
    chance, settings = random.Random(kills), {**SHORT, "cells": 32 * steps}
    experiment.train(make(atlas, tmp_path / "whole", **settings))
    config, seen = make(atlas, tmp_path / "run", **settings), tmp_path / "seen"
    for kill in range(kills):
        seen.unlink(missing_ok=True)
        kind = ("saving", "training", "whenever")[kill % 3]
        calls = chance.randint(1, 24) if kind == "saving" else 10**9
        (child,) = processes.start(config, tmp_path / "log", prepare=frail, given=(seen, calls))
        if kind == "saving":
            child.join(60)
        elif kind == "training":
            wait_for(seen)
        time.sleep(chance.uniform(0, {"saving": 0, "training": 0.1, "whenever": 0.5}[kind]))
        child.kill()
        child.join(10)
        assert child.exitcode == -signal.SIGKILL
    processes.run(config, tmp_path / "log")
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # nothing half-written is left


def test_the_loss_scale_of_fp16_goes_on_too(atlas, tmp_path, monkeypatch):
    """A scaler on the CPU (accelerate has one on GPUs alone) whose scale doubles every seventh step."""

    class Scaled(machine.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=7)

    monkeypatch.setattr(machine, "Accelerator", Scaled)
    experiment.train(make(atlas, tmp_path / "whole", **SHORT))
    with monkeypatch.context() as patch:
        calls = iter(range(1, 99))
        patch.setattr(stop.Stop, "agreed", lambda self: stop.LEAVE if next(calls) == 10 else stop.GO_ON)
        with pytest.raises(stop.Stopped):
            experiment.train(make(atlas, tmp_path / "parts", **SHORT))
    experiment.train(make(atlas, tmp_path / "parts", **SHORT))
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))
    ends = [checkpoint.load(checkpoint.latest(tmp_path / n / "checkpoints"), {}).state for n in ("whole", "parts")]
    assert ends[0]["scaler"] == ends[1]["scaler"]
    assert (ends[0]["scaler"]["scale"], ends[0]["scaler"]["_growth_tracker"]) == (2.0**10, 6)


@pytest.mark.distributed
def test_one_of_two_processes_is_killed_the_other_ends_and_both_go_on_bit_for_bit(atlas, tmp_path):
    """Every step is saved, by both; the survivor notices at its next exchange and says why it ends."""
    processes.run(make(atlas, tmp_path / "whole", **SHORT), tmp_path / "log", world=2)
    config = make(atlas, tmp_path / "run", **SHORT)
    ranks = processes.start(config, tmp_path / "log", world=2, prepare=walks, given=tmp_path / "seen")
    wait_for(tmp_path / "run" / "checkpoints" / "step-000000005")
    ranks[1].kill()
    began = time.monotonic()
    assert processes.finish(ranks) == [75, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    said = (tmp_path / "log.0.txt").read_text().splitlines()[-1]
    assert re.match(r"the exchange with another process failed \(torch: .*peer.*\) after step \d+ of 20; the", said)
    processes.run(config, tmp_path / "log", world=2)
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "run"))


@pytest.mark.distributed
def test_one_of_two_processes_is_asked_to_leave_both_save_and_one_process_goes_on(atlas, whole, tmp_path):
    config = make(atlas, tmp_path / "run", **SHORT | {"checkpoint_cells": 10**6})
    ranks = processes.start(config, tmp_path / "log", world=2, prepare=walks, given=tmp_path / "seen")
    wait_for(tmp_path / "seen")
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
