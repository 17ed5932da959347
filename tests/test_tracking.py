from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from distdiff import tracking


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """An MLflow database whose schema is made once for the session (it takes seconds)."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    mlflow.search_experiments()
    return path


@pytest.fixture
def here(migrated, tmp_path, monkeypatch):
    """An empty working directory with its own database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return tmp_path


def register(score, data="abc"):
    with tracking.run(experiment="e", name="n", params={"a": {"b": 1}}, tags={"data_fingerprint": data}) as run:
        folder = Path("model")
        folder.mkdir(exist_ok=True)
        (folder / "model.json").write_text(str(score))
        run.metrics({"loss": 1.5, "bad": float("nan"), "test/x/distdiff, 8 calls": 2.0}, step=64)
        run.artifact(folder, "model")
        return run, run.register("pbmc", "model", score=score, data=data)


def test_a_run_holds_config_metrics_tags_and_the_registered_model(here):
    run, line = register(2.0)
    assert line == "pbmc version 1, now 'champion'"
    import mlflow

    stored = mlflow.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"a.b": "1"}
    assert stored.data.metrics["loss"] == 1.5
    assert "bad" not in stored.data.metrics
    assert stored.data.tags["data_fingerprint"] == "abc"
    assert stored.data.tags["distdiff"]
    for address in ("models:/pbmc@champion", "models:/pbmc/1", f"runs:/{run.run_id}/model"):
        assert (tracking.fetch(address) / "model.json").read_text() == "2.0"
    assert (here / "mlflow.db").exists()


def test_the_alias_moves_only_to_a_better_score_or_other_data(here):
    register(2.0)
    assert "stays at version 1 (validation 2.0000 against 3.0000)" in register(3.0)[1]
    assert "now 'champion'" in register(1.0)[1]
    assert "now 'champion'" in register(9.0, data="other")[1]


def test_a_run_that_dies_is_marked(here):
    import mlflow

    for error, status in ((KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")):
        with pytest.raises(error), tracking.run(experiment="e", name="n", params={}, tags={}) as run:
            raise error
        assert mlflow.get_run(run.run_id).info.status == status


def test_an_interrupted_first_use_leaves_no_half_made_database(here, monkeypatch):
    import mlflow

    os.remove("mlflow.db")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "search_experiments", interrupted)
        with pytest.raises(KeyboardInterrupt):
            register(1.0)
    assert list(here.iterdir()) == []
    assert "now 'champion'" in register(1.0)[1]
    assert (here / "mlflow.db").exists()


def test_tracking_off_is_silent(here):
    os.remove("mlflow.db")
    with tracking.run(experiment="e", name="n", params={}, tags={}, enabled=False) as run:
        assert not run
        run.metrics({"a": 1.0})
        run.artifact("nowhere")
        assert run.register("x", "model", score=0.0, data="") == ""
    assert not os.path.exists("mlflow.db")


def test_the_users_server_is_honoured(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/other.db")
    assert tracking.where().endswith("other.db")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("models:/nobody@champion", "cannot be had from the registry at sqlite"),
        ("models:/nobody", "names no version; write models:/nobody@champion"),
        ("nowhere", "no model folder at nowhere"),
    ],
)
def test_models_that_are_not_there(here, address, words):
    with pytest.raises(ValueError, match=words):
        tracking.fetch(address)
