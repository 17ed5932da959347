"""launch/accelerate/multi_node.yaml on two hosts: as one process; a host that is lost is named, and all go on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from distdiff import experiment
from distdiff.training import checkpoint
from tests.hosts.network import wait_for
from tests.training import processes
from tests.training.test_engines import RTOL
from tests.training.test_loop import assert_equal, final, make

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TRAIN = {"cells": 32 * 80, "eval_cells": 32 * 8, "checkpoint_cells": 32 * 4}
"""80 steps, some seconds; every fourth is saved."""


class Run:
    """A training run on two hosts, started by the same command as often as wanted."""

    def __init__(self, hosts, atlas: Path, folder: Path, **train) -> None:
        self.hosts, self.folder, self.out = hosts, folder, folder / "run"
        self.config = make(atlas, self.out, **{**TRAIN, **train})
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config.as_dict()))

    def start(self, odd=None, *more: str) -> list:
        """The command on both hosts, with ``more`` words on an odd one."""
        first, both = self.hosts[0].address, enumerate(self.hosts)
        return [
            host.start(
                "accelerate", "launch", "--config_file", "launch/accelerate/multi_node.yaml", "--num_machines", 2,
                "--machine_rank", rank, "--num_processes", 2, "--main_process_ip", first, "launch/train.py", "--config",
                self.folder / "config.yaml", *(more if host is odd else ()), log=self.log(host),
            )
            for rank, host in both
        ]  # fmt: skip

    def log(self, host) -> Path:
        return self.folder / f"{host.name}.txt"

    def said(self) -> str:
        return "\n".join(f"== {h.name}\n{self.log(h).read_text()[-3000:]}" for h in self.hosts)

    def under_way(self) -> list:
        """Start, and wait for the first checkpoint."""
        launchers = self.start()
        saved = self.out / "checkpoints"
        wait_for(lambda: checkpoint.latest(saved) or any(p.poll() is not None for p in launchers), 180, self.said)
        assert [p.poll() for p in launchers] == [None, None], self.said()
        return launchers

    def goes_on(self) -> None:
        """To the end, by the same command."""
        assert [p.wait(180) for p in self.start()] == [0, 0], self.said()
        assert "continuing " in self.log(self.hosts[0]).read_text()

    def lost(self, by, host, why: str) -> None:
        """One sentence of host ``by`` names the other, what was seen, the step, the checkpoint and the way on."""
        text = self.log(by).read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("distdiff: "))
        number = self.hosts.index(host) + 1
        assert line.startswith(f"distdiff: host {number} of 2 ({host.name}, {host.address}) is lost ({why}"), line
        assert " of 80; the last checkpoint is " in line
        named = Path(line.split("the last checkpoint is ")[1].split(";")[0])
        assert named == checkpoint.latest(self.out / "checkpoints")
        assert line.endswith("; the same command on all hosts goes on")
        assert 'launch/train.py", line' not in text  # no traceback of ours


def test_a_host_is_killed_the_other_says_so_and_both_go_on(hosts, atlas, tmp_path):
    """The first host, which also holds what the processes found each other by."""
    run = Run(hosts, atlas, tmp_path)
    launchers = run.under_way()
    hosts[0].kill()
    began = time.monotonic()
    assert launchers[1].wait(60) == 1
    assert time.monotonic() - began < 60
    run.lost(hosts[1], hosts[0], "torch: ")
    run.goes_on()

    processes.run(make(atlas, tmp_path / "local", **TRAIN), tmp_path / "local-log", world=2)
    assert_equal(final(run.out), final(tmp_path / "local"))
    one = experiment.train(make(atlas, tmp_path / "one", **TRAIN)).progress.history
    state = json.loads((checkpoint.latest(run.out / "checkpoints") / "state.json").read_text())
    history = state["progress"]["history"]
    assert len(history) == len(one) == 10
    for mine, theirs in zip(history, one, strict=True):
        for name in ("cells", "val/deviance", "val/loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=RTOL)


@pytest.mark.slow
@pytest.mark.long
def test_the_other_host_is_killed(hosts, atlas, tmp_path):
    run = Run(hosts, atlas, tmp_path)
    launchers = run.under_way()
    hosts[1].kill()
    assert launchers[0].wait(60) == 1
    run.lost(hosts[0], hosts[1], "torch: ")
    run.goes_on()


@pytest.mark.slow
@pytest.mark.long
def test_the_network_goes_silent_and_both_hosts_end(hosts, atlas, tmp_path):
    """No connection is closed: only time tells."""
    run = Run(hosts, atlas, tmp_path)
    launchers = run.under_way()
    hosts[1].plug("down")
    began = time.monotonic()
    assert [p.wait(180) for p in launchers] == [1, 1]
    assert 40 < time.monotonic() - began < 60
    for host, other in (hosts, reversed(hosts)):
        run.lost(host, other, "no sign of life for 45 s)")
    hosts[1].plug("up")
    run.goes_on()


@pytest.mark.slow
@pytest.mark.long
def test_a_network_that_comes_back_in_time_costs_nothing(hosts, atlas, tmp_path):
    run = Run(hosts, atlas, tmp_path)
    launchers = run.under_way()
    hosts[1].plug("down")
    time.sleep(8)
    hosts[1].plug("up")
    assert [p.wait(120) for p in launchers] == [0, 0], run.said()
    assert checkpoint.latest(run.out / "checkpoints").name == "step-000000080"


@pytest.mark.slow
@pytest.mark.long
def test_a_host_that_ends_by_an_error_does_not_leave_the_other_waiting(hosts, atlas, tmp_path):
    """The store is not where the second host looks for it, and the first waits for it to come."""
    run = Run(hosts, atlas, tmp_path)
    launchers = run.start(run.hosts[1], "data.store=/not/mounted.zarr")
    assert [p.wait(60) for p in launchers] == [1, 1]
    assert "(it ended: " in run.log(hosts[0]).read_text()
    assert "/not/mounted.zarr" in run.log(hosts[0]).read_text()
