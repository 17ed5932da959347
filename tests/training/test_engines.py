"""Any engine, any number of processes or passes: the same losses, and each goes on where another stopped."""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file

from distdiff.training import checkpoint, stop
from tests.training import processes
from tests.training.test_loop import make
from tests.training.test_resume import wait_for, walks

RTOL = 1e-5
"""float32, 20 steps of Adam; seen: 2e-7."""


def zero(stage: int, **more: str):
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    return {"world": 2, "environment": {**deepspeed, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), **more}}


OFFLOAD = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
ENGINES = {
    "one": {},
    "ddp": {"world": 2},
    "fsdp": {"world": 2, "environment": {"ACCELERATE_USE_FSDP": "true"}},
    "zero1": zero(1),
    "zero2": zero(2),
    "zero2 offload": zero(2, **OFFLOAD),
    "zero3": zero(3),
    "zero3 offload": zero(3, **OFFLOAD, ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu"),
}
pytestmark = pytest.mark.distributed


def settings(atlas: Path, out: Path, engine: str, **train):
    if "zero" in engine and not all(map(importlib.util.find_spec, ("deepspeed", "transformers"))):
        pytest.skip("needs pip install 'distdiff[deepspeed]'")
    return make(atlas, out, **{"cells": 640, "eval_cells": 160, "checkpoint_cells": 10**6, **train})


def seldom(*values):
    """A case whose ways the others go too; `-m long` has it."""
    return pytest.param(*values, marks=pytest.mark.long)


def leaves_after(steps: int) -> None:
    """Ask to leave after so many steps."""
    calls = iter(range(1, 10**6))
    stop.Stop.agreed = lambda self: stop.LEAVE if next(calls) == steps else stop.GO_ON


@pytest.fixture(scope="module")
def one(atlas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return processes.run(settings(atlas, folder / "run", "one"), folder / "log")[0]


def assert_same(ranks, one, steps=20):
    """The mean over processes of each step's loss, and what all of them measured on validation cells."""
    losses = np.array([losses for losses, _ in ranks]).mean(0)
    np.testing.assert_allclose(losses, one[0][-steps:], rtol=RTOL)
    assert len({json.dumps([h["val/deviance"] for h in history]) for _, history in ranks}) == 1
    for mine, theirs in zip(ranks[0][1], one[1], strict=True):
        for name in ("val/deviance", "val/loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=RTOL)
    if steps == 20:
        assert ranks[0][1][0]["grad_norm"] == pytest.approx(one[1][0]["grad_norm"], rel=1e-4)
        assert ranks[0][1][0]["loss"] == pytest.approx(one[1][0]["loss"], rel=RTOL)


@pytest.mark.parametrize(
    ("engine", "passes"),
    [("one", 2), ("ddp", 1), ("fsdp", 2), ("zero1", 1), seldom("zero2", 1), ("zero2 offload", 2), ("zero3", 2),
     seldom("zero3 offload", 1)],
)  # fmt: skip
def test_losses_do_not_depend_on_engine_processes_or_passes(atlas, tmp_path, one, engine, passes):
    config = settings(atlas, tmp_path / "run", engine, accumulate=passes)
    ranks = processes.run(config, tmp_path / "log", **ENGINES[engine])
    assert len(ranks) == ENGINES[engine].get("world", 1)
    assert len(ranks) == 1 or ranks[0][0] != ranks[1][0]  # each has its own cells
    assert_same(ranks, one)


@pytest.mark.parametrize(
    ("first", "then"), [("fsdp", "one"), seldom("ddp", "fsdp"), ("zero2", "ddp"), ("one", "zero1"),
                        seldom("fsdp", "zero3"), ("zero3", "zero2 offload"), seldom("zero2 offload", "zero3 offload")]
)  # fmt: skip
def test_one_engine_goes_on_where_another_stopped(atlas, tmp_path, one, first, then):
    settings(atlas, tmp_path / "run", then)
    config = settings(atlas, tmp_path / "run", first)
    ranks = processes.start(config, tmp_path / "log", prepare=leaves_after, given=13, **ENGINES[first])
    assert set(processes.finish(ranks)) == {75}, (tmp_path / "log.0.txt").read_text()
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-000000013"
    assert_same(processes.run(config, tmp_path / "log", **ENGINES[then]), one, steps=7)


@pytest.mark.parametrize("engine", ["fsdp", seldom("zero1"), seldom("zero2"), "zero3"])
def test_one_of_two_processes_is_killed_the_other_ends_and_both_go_on(atlas, tmp_path, one, engine):
    """As under DDP (test_resume.py); the losses after the last checkpoint are those of one process, never stopped."""
    config = settings(atlas, tmp_path / "run", engine, checkpoint_cells=160)
    ranks = processes.start(config, tmp_path / "log", prepare=walks, given=tmp_path / "seen", **ENGINES[engine])
    wait_for(tmp_path / "run" / "checkpoints" / "step-000000005")
    ranks[1].kill()
    began = time.monotonic()
    survivor, killed = processes.finish(ranks)
    assert killed == -signal.SIGKILL
    assert survivor not in (0, None), (tmp_path / "log.0.txt").read_text()
    assert time.monotonic() - began < 60
    left = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert int(left.name[5:]) in (5, 10)
    assert_same(processes.run(config, tmp_path / "log", **ENGINES[engine]), one, steps=20 - int(left.name[5:]))


LAUNCH = Path(__file__).parents[2] / "launch" / "accelerate"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_what_accelerate_reads(path):
    """Every key is known to it, and precision and accumulation are left to the config."""
    read = load_config_from_file(str(path))
    assert read.mixed_precision == "no"
    assert "gradient_accumulation_steps" not in (getattr(read, "deepspeed_config", None) or {})
    assert path.name in (LAUNCH.parents[1] / "docs" / "howto" / "deepspeed.md").read_text()
