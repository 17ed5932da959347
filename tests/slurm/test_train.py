"""``sbatch launch/slurm/train.sbatch`` on a real SLURM: time limit, preemption and dead nodes cost nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.training.test_loop import assert_equal, final

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
STEPS = 200

pytestmark = pytest.mark.distributed


class Training:
    """A run that batch jobs of two nodes do, and what they say."""

    def __init__(self, cluster, atlas, folder, steps=STEPS):
        folder.mkdir(exist_ok=True)
        self.cluster, self.out, self.log = cluster, folder / "run", folder / "log"
        config = {
            "data": {"store": str(atlas)},
            "denoiser": {"kind": "tests.slurm.slow:Slow"},
            "train": {
                "out": str(self.out), "cells": 32 * steps, "batch": 32, "grain": 8, "eval_cells": 1600,
                "checkpoint_cells": 1600, "patience": 1000,
            },
            "evaluate": {"enabled": False},
            "tracking": {"enabled": False},
        }  # fmt: skip
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def submit(self, *options, **environment):
        """Queue the job, as a user does who stands in the repository."""
        self.number = self.cluster.submit(
            "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=1G", f"--output={self.log}", *options, SCRIPT,
            "--config", self.config, cwd=ROOT, environment={
                "ACCELERATE_CONFIG": "launch/accelerate/cpu2.yaml", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                **environment,
            },
        )  # fmt: skip

    def wait_for(self, ready, what, seconds=120):
        self.cluster.wait(ready, what, seconds, lambda: f"{self.cluster.job(self.number)}\n{self.said()}")

    def wait_for_checkpoint(self, step=50):
        path = self.out / "checkpoints" / f"step-{step:09d}"
        self.wait_for(path.exists, str(path))

    def end(self, seconds=120):
        """What SLURM knows of the job at its end."""
        return self.cluster.wait_for_job(self.number, seconds=seconds, told=self.said)

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def stops(self):
        """Steps after which the run was asked to leave."""
        return [int(n) for n in dict.fromkeys(re.findall(r"stopped by \S+ after step (\d+)", self.said()))]


@pytest.fixture(scope="module")
def whole(cluster, atlas, tmp_path_factory):
    """The end of a run that nothing interrupted."""
    training = Training(cluster, atlas, tmp_path_factory.mktemp("whole"))
    training.submit()
    assert training.end()["JobState"] == "COMPLETED", training.said()
    assert "2 process(es) on cpu" in training.said()
    return final(training.out)


@pytest.fixture
def training(cluster, atlas, tmp_path):
    return Training(cluster, atlas, tmp_path)


def test_told_that_its_time_is_up_the_job_saves_queues_itself_and_ends_bit_equal(cluster, training, whole):
    training.submit()
    training.wait_for_checkpoint()
    cluster.run("scancel", "--batch", "--signal=USR1", str(training.number))  # as --signal=B:USR1@180 does
    job = training.end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), training.said()
    (stop,) = training.stops()
    assert 50 <= stop < STEPS
    assert_equal(whole, final(training.out))


@pytest.mark.slow
@pytest.mark.long
def test_the_time_limit_of_slurm_itself_is_no_end(cluster, atlas, tmp_path):
    """Of two minutes: SLURM looks every half minute, so the signal may come that much earlier than asked.

    Newer SLURMs tell the end to the processes too. They must not leave by themselves: that would look like a failure.
    """
    steps = 5000
    training = Training(cluster, atlas, tmp_path, steps)
    training.submit("--time=2", "--signal=B:USR1@40", "--export=ALL,SLURM_JOB_END_TIME=1", GRACE="30")
    job = training.end(900)
    assert job["JobState"] == "COMPLETED", training.said()
    stops = training.stops()
    assert int(job["Restarts"]) == len(stops) >= 1
    assert stops == sorted(stops)
    assert len(set(stops)) == len(stops)
    straight = Training(cluster, atlas, tmp_path / "straight", steps)
    straight.submit()
    assert straight.end(900)["Restarts"] == "0"
    assert_equal(final(straight.out), final(training.out))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("partition", ["main", "abrupt"])
def test_a_better_job_takes_the_nodes_and_the_run_saves_and_goes_on(cluster, training, whole, partition):
    """With time to leave (GraceTime), and without: then SLURM queues the job again, and kills it after KillWait."""
    training.submit(f"--partition={partition}")
    training.wait_for_checkpoint()
    other = cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--output=none", "--wrap=sleep 1", cwd="/")
    job = training.end()
    assert cluster.job(other)["JobState"] == "COMPLETED"
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), training.said()
    (stop,) = training.stops()
    assert 50 <= stop < STEPS
    assert_equal(whole, final(training.out))


@pytest.mark.slow
@pytest.mark.long
def test_a_job_that_is_broken_or_cancelled_is_not_queued_again(cluster, training):
    training.submit()
    training.wait_for_checkpoint()
    cluster.run("scancel", str(training.number))
    job = training.end()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), training.said()
    assert training.stops(), "what is cancelled has KillWait seconds, and saves"
    training.config.write_text(training.config.read_text().replace("grain: 8", "grain: 7"))
    training.submit()
    job = training.end()
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), training.said()
    assert "train.grain=7" in training.said()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("node", [0, 1])
def test_a_node_dies_and_the_job_goes_on_elsewhere(cluster, training, whole, node):
    """The first node has the batch script and the process that saves."""
    training.submit()
    training.wait_for_checkpoint()
    names = cluster.run("scontrol", "show", "hostnames", cluster.job(training.number)["NodeList"]).split()
    cluster.kill_node(names[node])
    try:
        job = training.end()
    finally:
        cluster.start_node(names[node])
    assert job["JobState"] == "COMPLETED", training.said()
    assert int(job["Restarts"]) >= 1
    assert_equal(whole, final(training.out))
