"""One run at a time in a folder, and only what it saved is its model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket

import pytest

from distdiff import experiment
from distdiff.model import Model
from distdiff.training import loop, stop
from tests.training import processes
from tests.training.test_loop import assert_equal, final, make, of_twenty_cells
from tests.training.test_resume import SHORT, wait_for, walks


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_belongs_to_one_run_of_any_size_and_a_killed_one_lets_go(atlas, tmp_path, monkeypatch, world):
    monkeypatch.setattr("distdiff.owner.WAIT", 0.0)
    run, seen = tmp_path / "run", tmp_path / "seen"
    config = make(atlas, run, **SHORT)
    ranks = processes.start(config, tmp_path / "log", world=world, prepare=walks, given=seen)
    wait_for(run / "checkpoints" / "step-000000002")
    os.kill(ranks[0].pid, signal.SIGSTOP)  # asleep, not dead
    try:
        before = everything(run)
        for how in ({"resume": "never", "seed": 5}, {}):
            who = rf"host {socket.gethostname()}, process {ranks[0].pid}, since \d{{4}}-.* nothing was changed"
            with pytest.raises(RuntimeError, match=who):
                experiment.train(make(atlas, run, **{**SHORT, **how}))
        assert everything(run) == before
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)
    experiment.train(config)
    if world == 1:
        experiment.train(make(atlas, tmp_path / "whole", **SHORT))
        assert_equal(final(tmp_path / "whole"), final(run))
    assert not (run / ".owner.json").exists()


def test_a_refusal_reaches_all_processes(atlas, tmp_path, monkeypatch):
    """Also what the disk says: a process that failed alone would leave the others waiting."""
    from distdiff.training.owner import owned

    monkeypatch.setattr(
        "distdiff.training.owner.broadcast_object_list", lambda told: told.__setitem__(0, "as rank 0 said")
    )
    with pytest.raises(RuntimeError, match="as rank 0 said"), owned(tmp_path / "run", main=False):
        pass
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"train.out=.*cannot be written"):
        experiment.train(make(atlas, tmp_path / "file" / "run"))


@pytest.mark.parametrize("case", ["nan", "replaced"])
def test_a_model_that_this_run_did_not_save_is_not_registered(atlas, tmp_path, monkeypatch, case):
    first = experiment.train(make(atlas, tmp_path / "run", cells=320)).model
    shutil.copytree(first, tmp_path / "other")
    if case == "nan":
        monkeypatch.setattr(loop, "scores", lambda *_: of_twenty_cells(float("nan")))
        words = "no validation gave a number"
    else:
        real = loop.train

        def replaced(*args, **kwargs):
            progress = real(*args, **kwargs)
            shutil.rmtree(first)
            shutil.copytree(tmp_path / "other", first)
            return progress

        monkeypatch.setattr(experiment, "fit", replaced)
        words = "somebody else wrote there"
    with pytest.raises(RuntimeError, match=f"is not the model that this run saved.*{words}"):
        experiment.train(make(atlas, tmp_path / "run", resume="never", seed=1, cells=320))


def test_going_back_to_an_older_checkpoint_has_its_own_best_model(atlas, tmp_path, monkeypatch):
    """The model that stands there is of later steps, which this run does not have."""
    experiment.train(make(atlas, tmp_path / "run", checkpoint_cells=320, keep=9))
    middle = sorted((tmp_path / "run" / "checkpoints").iterdir())[0]
    monkeypatch.setattr(loop, "scores", lambda *_: of_twenty_cells(9.0))
    outcome = experiment.train(make(atlas, tmp_path / "run", resume=str(middle), cells=1280))
    assert outcome.progress.best == 9.0
    assert Model.load(outcome.model).info["validation"]["val/deviance"] == 9.0


def test_a_fine_tuning_goes_on_without_the_model_it_began_with(atlas, tmp_path, monkeypatch):
    start = experiment.train(make(atlas, tmp_path / "first", cells=320)).model
    config = {**SHORT, "start": str(start)}
    experiment.train(make(atlas, tmp_path / "whole", **config))
    with monkeypatch.context() as patch:
        calls = iter(range(1, 99))
        patch.setattr(stop.Stop, "agreed", lambda self: stop.LEAVE if next(calls) == 10 else stop.GO_ON)
        with pytest.raises(stop.Stopped):
            experiment.train(make(atlas, tmp_path / "run", **config))
    shutil.rmtree(start)
    experiment.train(make(atlas, tmp_path / "run", **config))
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "run"))
    with pytest.raises(ValueError, match="no model folder at"):
        experiment.train(make(atlas, tmp_path / "run", **config, resume="never"))
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text())["info"]["validation"]
