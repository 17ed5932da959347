"""A project folder that was moved after its runs were logged."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from distdiff import tracking
from distdiff.model import Model
from distdiff.tracking.moved import missing_project
from distdiff.tracking.sender import Sender
from tests.tracking.runs import GENES, a_run, register


def move(here, monkeypatch, rebuilt):
    """Move a project that has a run and a model; ``rebuilt``: a new, empty folder stands where it was."""
    old, new = here / "old place", here / "moved" / "it's new"
    new.parent.mkdir()
    os.rename(old, new)
    if rebuilt:
        old.mkdir()
    monkeypatch.chdir(new)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it; the next command is another process
    return new


@pytest.fixture
def project(here, monkeypatch, model):
    """The working directory of a project with a run and a champion."""
    folder = here / "old place"
    folder.mkdir()
    os.rename(here / "mlflow.db", folder / "mlflow.db")
    monkeypatch.chdir(folder)
    assert register(model, 1.0).registered == "pbmc version 1, now 'champion'"
    return folder


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_moved_project_is_named_and_the_command_of_the_message_mends_it(
    here, project, model, monkeypatch, caplog, rebuilt
):
    import mlflow

    new = move(here, monkeypatch, rebuilt)
    with pytest.raises(ValueError, match=r"cannot be had from the registry .* the project folder was moved") as error:
        tracking.fetch("models:/pbmc@champion")
    assert str(project) in str(error.value)
    with a_run("later") as run:
        run.metrics({"loss": 1.0}, 1)
    assert "the project folder was moved" in caplog.text
    assert not any(project.rglob("*")), "nothing is written to the old place"
    with pytest.raises(RuntimeError, match=r"project folder was moved .* entries stay in "):
        tracking.sync("later")
    command = str(error.value).rpartition("new folder (")[2].removesuffix(")")
    assert shlex.split(command)[-1].startswith(str(project))
    subprocess.run(command, shell=True, check=True)
    assert Model.load(tracking.fetch("models:/pbmc@champion")).spec.genes == GENES
    assert "entries sent" in tracking.sync("later")[0]
    assert mlflow.get_run(Sender(run.spool).run_id).data.metrics["loss"] == 1.0
    assert [path.name for path in (new / "mlruns").rglob("config.yaml")] == ["config.yaml"] * 2


def test_a_moved_project_is_named_when_a_run_is_continued(here, project, monkeypatch, caplog):
    move(here, monkeypatch, False)
    with a_run("run1.0", resume=True) as run:
        run.metrics({"loss": 1.0}, 1)
    assert "the project folder was moved" in caplog.text
    assert run.spool.n_unsent
    assert not project.exists()


def test_a_run_that_was_not_sent_before_the_move_is_sent_to_the_moved_database(here, project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", lambda self: 0)
        with a_run("unsent") as run:
            run.metrics({"loss": 1.0}, 1)
    new = move(here, monkeypatch, False)
    with pytest.raises(ValueError, match=r"which does not exist, .* moved from .*old place, give uri=sqlite:///"):
        tracking.sync("unsent")
    project.symlink_to(new)
    assert "entries sent" in tracking.sync("unsent", uri=f"sqlite:///{new}/mlflow.db")[0]


def test_a_project_that_was_not_moved_is_not_named(here, project):
    with pytest.raises(ValueError, match="cannot be had from the registry") as error:
        tracking.fetch("models:/other@champion")
    assert "moved" not in str(error.value)
    assert missing_project(str(here / "old place/mlruns/99"), Path("mlflow.db").absolute()) is None
