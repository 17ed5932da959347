from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from distdiff import tracking
from distdiff.model import Model
from distdiff.tracking.sender import Sender
from distdiff.tracking.spool import Spool, spools
from tests.tracking.runs import GENES, a_run, unsent


def test_an_entry_that_is_refused_does_not_hold_up_the_others(here, caplog):
    import mlflow

    secret = here.parent / "secret"
    secret.write_text("not of this run")

    with a_run() as run:
        run.spool.append("metrics", numbers={"a" * 300: 1.0}, step=1)  # names may have 250 signs
        run.metrics({"loss": 1.0}, 2)
        for path in ("gone.md", "../../secret"):
            run.artifact(Path("run") / path)
    assert mlflow.get_run(run.run_id).data.metrics["loss"] == 1.0
    assert "refused a metrics entry" in caplog.text
    assert "gone.md is gone" in caplog.text
    assert [f.path for f in mlflow.MlflowClient().list_artifacts(run.run_id)] == ["config.yaml"]


def test_no_password_lies_in_the_run(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with a_run():
        pass
    assert "secret" not in spools("run")[0].path.read_text()


def test_a_server_that_never_answers_holds_nothing_up(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with a_run() as run:
            time.sleep(0.2)  # the sender waits for an answer by now
            began = time.monotonic()
            for step in range(1000):
                run.metrics({"loss": 1.0}, step)
            inside = time.monotonic() - began
        assert inside < 2
        assert time.monotonic() - began < 30
    assert run.run_id is None
    assert run.spool.n_unsent > 1000
    with pytest.raises(RuntimeError, match=r"cannot be reached .*entries stay in .*run the same command again"):
        tracking.sync("run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match=r"there is no mlflow/\*.jsonl"):
        tracking.sync(here / "nowhere")


def test_a_run_that_another_process_sends_is_taken_over(here):
    with a_run() as first:
        pass
    with contextlib.ExitStack() as held:
        assert held.enter_context(Sender(first.spool).lock())
        with a_run(resume=True) as run:
            run.metrics({"loss": 1.0}, 1)
            time.sleep(0.2)
            assert run.spool.n_unsent
            held.close()
    assert not run.spool.n_unsent


def test_a_run_that_is_alive_is_left_to_its_process(here):
    with a_run() as run:
        deadline = time.monotonic() + 20
        while run.run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "another process is sending it" in tracking.sync("run")[0]
    assert tracking.sync("run") == []


def test_the_next_run_sends_what_a_killed_one_left(here, monkeypatch):
    import mlflow

    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", lambda self: 0)
        with a_run() as first:
            first.metrics({"loss": 1.0}, 1)
    text = first.spool.path.read_text().splitlines(keepends=True)
    first.spool.path.write_text("".join(line for line in text if '"end"' not in line))
    with a_run() as second:
        pass
    runs = {r.info.run_id: r for r in mlflow.search_runs(search_all_experiments=True, output_format="list")}
    assert {first.run_id, second.run_id} == runs.keys()
    assert runs[first.run_id].data.metrics["loss"] == 1.0
    assert runs[first.run_id].info.status == "KILLED"


def test_a_run_that_its_server_has_forgotten_is_begun_anew_only_when_asked(here, monkeypatch):
    import mlflow
    from typer.testing import CliRunner

    from distdiff import cli

    with a_run() as run:
        run.metrics({"early": 3.0}, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", lambda self: 0)
        with a_run(resume=True) as run:
            run.metrics({"loss": 1.0}, 2)
    client, state = mlflow.MlflowClient(), run.spool.state
    client.set_tag(run.run_id, "distdiff.spool", "of a server that was lost")
    run.spool.state = {**state, "run_id": "a" * 32}
    with pytest.raises(RuntimeError, match=r"is not on this server; .*anew=True.*entries stay"):
        tracking.sync("run")
    assert "entries sent" in CliRunner().invoke(cli.app, ["mlflow", "sync", "run", "--anew"]).output
    assert run.run_id not in (state["run_id"], "a" * 32)
    stored = client.get_run(run.run_id)
    assert (stored.data.metrics["early"], stored.data.metrics["loss"]) == (3.0, 1.0)
    assert tracking.sync("run", anew=True) == []


def test_a_second_server_gets_everything_once_and_the_first_is_left_alone(here, migrated, model):
    import mlflow

    shutil.copy(migrated, here / "other.db")
    shutil.copytree(model, here / "run" / "model")
    with a_run() as run:
        run.metrics({"loss": 1.0}, 1)
        run.register("pbmc", "run/model", score=1.0, data="abc", description="# A card")
    assert not list(Path("run").rglob("*.model"))
    there = f"sqlite:///{here}/other.db"
    assert "now 'champion'" in tracking.sync("run", uri=there)[0]
    assert tracking.sync("run", uri=there) == tracking.sync("run", uri=f"{there}/") == []
    for spool in spools("run"):
        for state in spool.path.parent.glob("*.sent-*.json"):
            state.unlink()  # what was sent is found again on the server
        assert "entries sent" in tracking.sync("run", uri=there)[0]
    for uri in (there, f"sqlite:///{here}/mlflow.db"):
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        (stored,) = client.search_runs(["1"])
        assert stored.data.metrics["loss"] == 1.0
        assert stored.info.status == "FINISHED"
        (version,) = client.search_model_versions("name = 'pbmc'")
        assert Model.load(tracking.address.download(version.source, uri)).spec.genes == GENES
    assert tracking.sync("run") == []


def test_a_model_that_could_not_be_packed_is_registered_later(here, model, monkeypatch, caplog):
    """The temporary folder is full when training ends."""
    import errno

    import mlflow

    shutil.copytree(model, here / "run" / "model")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.pyfunc, "save_model", full)
        with a_run() as run:
            run.register("pbmc", "run/model", score=1.0, data="abc", description="# A card")
    assert run.registered.startswith("not yet")
    assert "could not be packed (" in caplog.text
    assert "pbmc version 1, now 'champion'" in tracking.sync("run")[0]
    made = Model.load("run/model")
    made.info["other"] = 1
    for weights in made.denoiser.parameters():
        weights.data += 1.0
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.pyfunc, "save_model", full)
        with a_run("run") as run:
            run.register("pbmc", "run/model", score=1.0, data="abc")
    made.save("run/model")
    tracking.sync("run")
    assert "holds other weights by now" in caplog.text
    assert len(mlflow.MlflowClient().search_model_versions("name = 'pbmc'")) == 1


@pytest.mark.parametrize("by", ["launch", "sync"])
def test_a_killed_run_that_was_sent_does_not_stay_running(here, monkeypatch, by):
    import mlflow

    with monkeypatch.context() as patch:
        real = Spool.append
        patch.setattr(Spool, "append", lambda self, kind, **what: kind == "end" or real(self, kind, **what))
        with a_run() as killed:
            killed.metrics({"loss": 1.0}, 1)
    assert not killed.spool.n_unsent
    assert mlflow.get_run(killed.run_id).info.status == "RUNNING"
    if by == "launch":
        with a_run() as other:
            pass
        assert other.run_id != killed.run_id
    else:
        assert tracking.sync(".") == [f"run {killed.run_id}: its process ended without closing it, now KILLED"]
    assert mlflow.get_run(killed.run_id).info.status == "KILLED"


def test_a_server_that_only_the_folder_knows_is_told_and_waits_for_a_word(here, migrated, monkeypatch):
    import mlflow
    from typer.testing import CliRunner

    from distdiff import cli

    spool = unsent(here, monkeypatch, "one", f"sqlite:///{here}/mlflow.db")
    there = f"sqlite:///{here}/one.db"
    spool.path.write_text(spool.path.read_text().replace(f"{here}/mlflow.db", f"{here}/one.db"))
    os.remove("mlflow.db")
    for state in ({}, {"offset": spool.path.stat().st_size, "run_id": "a" * 32}):  # all sent, but not ended yet
        spool.state = state
        with pytest.raises(ValueError, match=r"says that its server is .*one\.db, and nothing was sent.*uri=sqlite"):
            tracking.sync("runs")
    assert not os.path.exists("mlflow.db")
    assert not os.path.exists("one.db")
    spool.state = {}
    shutil.copy(migrated, here / "one.db")
    done = CliRunner().invoke(cli.app, ["mlflow", "sync", "runs", "--uri", there])
    assert "entries sent" in done.output
    (stored,) = mlflow.MlflowClient(there).search_runs(["1"])
    assert stored.data.metrics["loss"] == 1.0
    assert "all was sent before" in CliRunner().invoke(cli.app, ["mlflow", "sync", "runs"]).output
