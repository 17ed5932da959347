"""What goes wrong is said once, with the way out, and ends the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distdiff import config as configs
from distdiff import experiment
from distdiff.data.feed.loader import Loading
from distdiff.data.store.store import CountStore
from distdiff.training import checkpoint, losses
from tests.training import processes
from tests.training.test_loop import make

ROOT = Path(__file__).parents[2]


def poisons(step: int) -> None:
    """Make one loss of the second process nan."""
    real = losses.of_cells

    def loss(*args, **law):
        found = real(*args, **law)
        if os.environ["RANK"] == "1" and args[-2] == step:
            found = found.masked_fill(torch.arange(len(found)) == 3, float("nan"))
        return found

    losses.of_cells = loss


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_on_one_process_stops_all_with_the_cell_and_the_way_back(atlas, tmp_path):
    config = make(atlas, tmp_path / "run", checkpoint_cells=128)
    ranks = processes.start(config, tmp_path / "log", world=2, prepare=poisons, given=6)
    assert processes.finish(ranks) == [1, 1]
    words = {(tmp_path / f"log.{i}.txt").read_text().strip().splitlines()[-1] for i in range(2)}
    assert len(words) == 1
    store = CountStore.open(atlas)
    rows = store.rows("train")
    bad = rows[Loading().settled(store, config.data.labels).plan(store, rows, 32, 0).rank_rows(6, 1, 2)[3]]
    back = tmp_path / "run" / "checkpoints" / "step-000000004"  # step 8 would have been poisoned
    assert f"not finite at step 6, rows {bad} of the store" in (said := words.pop())
    assert f"go back with train.resume={back} and a smaller optim.lr" in said
    assert [p.name for p in back.parent.iterdir()] == [back.name]


def test_the_way_back_is_the_checkpoint_that_is_still_being_written(atlas, tmp_path, monkeypatch):
    real, write = losses.of_cells, checkpoint.Writer._write

    def poisoned(*args, **law):
        return real(*args, **law) * (float("nan") if args[-2] == 6 else 1.0)

    def slow(self, *args):
        time.sleep(1)
        write(self, *args)

    monkeypatch.setattr(losses, "of_cells", poisoned)
    monkeypatch.setattr(checkpoint.Writer, "_write", slow)
    with pytest.raises(FloatingPointError, match=r"step 6, .* go back with train\.resume=.*step-000000004 and"):
        experiment.train(make(atlas, tmp_path / "run", checkpoint_cells=128))


def test_after_a_loss_that_is_not_finite_a_smaller_rate_goes_on_from_the_checkpoint(atlas, tmp_path):
    experiment.train(config := make(atlas, tmp_path / "run", cells=640))
    back = tmp_path / "run" / "checkpoints" / "step-000000020"
    tree = config.as_dict()
    tree["optim"]["lr"] = 1e-5
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.001, is 1e-05"):
        experiment.train(configs.parse(tree))
    tree["train"]["resume"] = str(back)
    assert experiment.train(configs.parse(tree)).progress.step == 20


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 20.00 GiB", None])
def test_out_of_memory_says_what_would_help(atlas, tmp_path, monkeypatch, words):
    def full(*args, **law):
        if words:
            raise torch.OutOfMemoryError(words)
        return torch.empty(1 << 60)  # what a CPU says

    monkeypatch.setattr(losses, "of_cells", full)
    with pytest.raises(RuntimeError, match=r"32 cells a pass; train\.accumulate=2 \(16 cells\) goes on from the last"):
        experiment.train(make(atlas, tmp_path / "a"))
    with pytest.raises(RuntimeError, match=r"a pass cannot be smaller than train\.grain=8 cells"):
        experiment.train(make(atlas, tmp_path / "b", accumulate=4))


def test_other_errors_keep_their_words(atlas, tmp_path, monkeypatch):
    def wrong(*args, **law):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(losses, "of_cells", wrong)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        experiment.train(make(atlas, tmp_path / "a"))


DIES = """
import os, signal, sys
from torch.distributed.elastic.multiprocessing.errors import record
from distdiff.cli import main
from distdiff.training import losses
real = losses.of_cells
def loss(*args, **law):
    if os.environ["RANK"] == "1" and args[-2] == 3:
        raise RuntimeError("the cat sat on the cable")
    return real(*args, **law)
losses.of_cells = loss
record(main)(["train", *sys.argv[1:]])
"""


@pytest.mark.distributed
def test_a_process_that_dies_ends_the_job_with_its_traceback_first(atlas, tmp_path):
    """The launch file of two CPU processes, started as a user does."""
    (tmp_path / "dies.py").write_text(DIES)
    (tmp_path / "config.yaml").write_text(json.dumps(make(atlas, tmp_path / "run").as_dict()))  # JSON is YAML
    launch = ["accelerate.commands.launch", "--config_file", f"{ROOT}/launch/accelerate/cpu2.yaml"]
    command = [sys.executable, "-m", *launch, str(tmp_path / "dies.py"), "--config", str(tmp_path / "config.yaml")]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert time.monotonic() - began < 60 + 30  # a minute, and what a busy machine takes to start
    assert "2 process(es) on cpu" in done.stdout
    first = done.stderr[done.stderr.index("Traceback") :].split("\n\n")[0]
    assert "in loss" in first
    assert "RuntimeError: the cat sat on the cable" in first
