from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from distdiff import tracking
from distdiff.model import Model
from distdiff.tracking.sender import Sender
from tests import forkserver
from tests.tracking.runs import GENES, a_run


def test_a_run_holds_config_metrics_tags_input_and_the_registered_model(here, model):
    dataset = tracking.Dataset("atlas.zarr", str(here / "atlas.zarr"), "f" * 64, {"cells": 200})
    with a_run(dataset=dataset) as run:
        run.metrics({"loss": 1.5, "bad": float("nan"), "test/x/distdiff, 8 calls": 2.0}, step=64)
        run.metrics({"loss": 1.25}, step=128)
        Path("table.md").write_text("| |")
        run.artifact("table.md", "evaluation")
        run.register("pbmc", model, score=2.0, data="abc", description="# A card")
    assert run.registered == "pbmc version 1, now 'champion'"
    import mlflow

    client, stored = mlflow.MlflowClient(), mlflow.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"a.b": "1"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "loss")] == [(64, 1.5), (128, 1.25)]
    assert stored.data.metrics["test/x/distdiff 8 calls"] == 2.0
    assert stored.data.metrics["system/system_memory_usage_percentage"] > 0
    assert "bad" not in stored.data.metrics
    assert {"data_fingerprint", "distdiff", "torch", "python"} <= stored.data.tags.keys()
    (given,) = stored.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("atlas.zarr", "f" * 32)
    assert json.loads(given.dataset.profile) == {"cells": 200, "fingerprint": "f" * 64}
    assert mlflow.data.get_source(given).uri == str(here / "atlas.zarr")
    assert [f.path for f in client.list_artifacts(run.run_id, "evaluation")] == ["evaluation/table.md"]
    version = client.get_model_version_by_alias("pbmc", "champion")
    assert version.description == "# A card"
    assert [output.model_id for output in stored.outputs.model_outputs] == [version.tags["model_id"]]
    for address in ("models:/pbmc@champion", "models:/pbmc/1", f"runs:/{run.run_id}/model", str(model)):
        assert Model.load(tracking.fetch(address)).spec.genes == GENES
    assert not list(Path("run").rglob("*.model")), "what was sent is not kept twice"
    assert (here / "mlflow.db").exists()
    tracking.attach("run", "table.md")
    assert "table.md" in [f.path for f in client.list_artifacts(run.run_id)]


def test_gpus_are_watched(here, monkeypatch):
    """As MLflow watches them; NVIDIA's library is stood in for."""
    from types import SimpleNamespace

    from mlflow.system_metrics.metrics import gpu_monitor

    nvml = SimpleNamespace(
        NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetPowerUsage=lambda h: 50_000,
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(used=3e9, total=12e9),
        nvmlDeviceGetUtilizationRates=lambda h: SimpleNamespace(gpu=97),
        nvmlDeviceGetEnforcedPowerLimit=lambda h: 100_000,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    with a_run() as run:
        deadline = time.monotonic() + 20
        while "gpu_0" not in run.spool.path.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    entries = [entry["numbers"] for entry, _ in run.spool.read(0) if entry["kind"] == "metrics"]
    assert entries[0]["system/gpu_0_utilization_percentage"] == 97
    assert entries[0]["system/gpu_0_memory_usage_megabytes"] == 3000


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_a_run_that_dies_is_marked(here, error, status):
    import mlflow

    with pytest.raises(error), a_run() as run:
        raise error
    assert mlflow.get_run(run.run_id).info.status == status


def test_a_continued_training_goes_on_with_its_run(here, model):
    import mlflow

    with a_run() as first:
        first.metrics({"loss": 3.0}, 10)
        first.register("pbmc", model, score=1.0, data="abc")
    with a_run(resume=True) as second:
        second.metrics({"loss": 2.0}, 20)
        second.register("pbmc", model, score=1.0, data="abc")
    assert first.registered == second.registered == "pbmc version 1, now 'champion'"
    assert first.run_id == second.run_id
    with pytest.raises(ValueError, match="another config"), a_run(resume=True):
        raise ValueError("made with another config")
    with a_run() as other:
        pass
    assert other.run_id != first.run_id
    history = mlflow.MlflowClient().get_metric_history(first.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(10, 3.0), (20, 2.0)]
    assert mlflow.get_run(first.run_id).info.status == "FINISHED"


def test_an_interrupted_first_use_leaves_no_half_made_database(here, monkeypatch):
    import mlflow

    os.remove("mlflow.db")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "search_experiments", interrupted)
        with pytest.raises(KeyboardInterrupt), a_run():
            pass
    assert list(here.iterdir()) == []


def test_a_database_that_came_meanwhile_is_not_replaced(here, monkeypatch):
    """By another launch, or by ``mlflow ui``, while ours was being made."""
    import mlflow

    os.rename("mlflow.db", "theirs.db")
    real = mlflow.search_experiments

    def meanwhile(*args, **more):
        if not os.path.exists("mlflow.db"):
            os.rename("theirs.db", "mlflow.db")
            mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db").create_experiment("theirs")
        return real(*args, **more)

    monkeypatch.setattr(mlflow, "search_experiments", meanwhile)
    with a_run():
        pass
    names = {e.name for e in mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db").search_experiments()}
    assert names >= {"theirs", "e"}
    assert [p.name for p in here.iterdir() if p.name.startswith(".")] == []


def first_launch(folder, ready):
    os.chdir(folder)
    ready.wait(60)
    with tracking.run(experiment="e", name="n", params={}, tags={}, folder=f"run{os.getpid()}") as run:
        run.metrics({"loss": 1.0}, 1)


@pytest.mark.distributed
def test_first_launches_side_by_side_lose_no_run(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ready = forkserver.SERVER.Barrier(3)
    launches = [forkserver.process(first_launch, (tmp_path, ready)) for _ in range(3)]
    for launch in launches:
        launch.start()
    for launch in launches:
        launch.join(120)
    assert [launch.exitcode for launch in launches] == [0, 0, 0]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert [r.data.metrics["loss"] for r in runs] == [1.0] * 3


def test_tracking_off_is_silent(here, model):
    os.remove("mlflow.db")
    with a_run(enabled=False) as run:
        assert not run
        run.metrics({"a": 1.0})
        run.artifact("nowhere")
        run.register("x", model, score=0.0, data="")
        assert run.registered == ""
    assert list(here.iterdir()) == []


def test_the_users_server_is_honoured(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/other.db")
    assert tracking.tracking_uri().endswith("other.db")


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


def test_the_experiment_and_the_run_of_the_environment_are_used(here, monkeypatch, caplog):
    import mlflow

    from distdiff.config import load

    client = mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db")
    started = client.create_run(client.create_experiment("theirs"), run_name="begun elsewhere")
    client.log_param(started.info.run_id, "a.b", "another value")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    assert load(None, ["data.store=a.zarr"]).tracking.experiment == "of the environment"
    assert load(None, ["data.store=a.zarr", "tracking.experiment=own"]).tracking.experiment == "own"
    monkeypatch.setenv("MLFLOW_RUN_ID", started.info.run_id)
    with a_run(params={"a": {"b": 1, "c": 2}}) as run:
        run.metrics({"loss": 1.0}, 1)
    assert run.run_id == started.info.run_id
    stored = client.get_run(run.run_id)
    assert stored.data.metrics["loss"] == 1.0
    assert stored.data.params == {"a.b": "another value", "a.c": "2"}
    assert "refused the parameter a.b" in caplog.text
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "begun elsewhere")
    with a_run() as second:  # MLflow's start_run uses the variable once too
        pass
    assert second.run_id not in (None, run.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with a_run() as third:
        pass
    assert f"MLFLOW_RUN_ID is {'0' * 32}, which is no active run" in caplog.text
    assert third.run_id not in (None, run.run_id, second.run_id)


def test_a_run_of_the_environment_is_found_again_on_its_server_and_made_on_another(here, migrated, monkeypatch):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db")
    started = client.create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", started.info.run_id)
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", lambda self: 0)
        with a_run() as run:
            run.metrics({"loss": 1.0}, 1)
    tracking.sync("run")
    assert client.get_run(started.info.run_id).data.metrics["loss"] == 1.0
    shutil.copy(migrated, here / "other.db")
    assert "entries sent" in tracking.sync("run", uri=f"sqlite:///{here}/other.db")[0]
    (stored,) = mlflow.MlflowClient(f"sqlite:///{here}/other.db").search_runs(["1"])
    assert stored.data.metrics["loss"] == 1.0


def test_runs_of_a_sweep_differ_in_name():
    from distdiff.config import load, parse

    def name(*overrides):
        return load(None, ["data.store=a.zarr", "tracking.model=pbmc", *overrides]).run_name()

    names = [name(f"optim.lr={lr}", f"train.out=runs/{lr}") for lr in ("1e-3", "1e-4")]
    assert names == ["pbmc data.store=a.zarr optim.lr=1e-3", "pbmc data.store=a.zarr optim.lr=1e-4"]
    long = [name(*[f"data.labels={'x' * 300}", f"optim.lr={lr}"]) for lr in ("1e-3", "1e-4")]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 250
    whole = load(None, ["data.store=a.zarr", "optim.lr=1e-3"])
    assert whole.digest() == parse({"data": {"store": "a.zarr"}, "optim": {"lr": 1e-3}}).digest()
    assert "overrides" not in whole.as_dict()
    with pytest.raises(ValueError, match="unknown key 'overrides'"):
        parse({"data": {"store": "a.zarr"}, "overrides": ["a=b"]})
