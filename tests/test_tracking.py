from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from distdiff import tracking
from distdiff.model import Model
from distdiff.tracking.sender import Sender
from distdiff.tracking.spool import Spool, spools
from distdiff.types import DataSpec

SMALL = {"kind": "mlp", "width": 8, "depth": 1}
GENES = tuple(f"gene{i}" for i in range(6))


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


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small untrained model's folder."""
    spec = DataSpec(GENES, {"cell_type": ("B", "T")}, np.ones(len(GENES), np.float32))
    made = Model.new(spec, {"kind": "counts"}, SMALL)
    generator = torch.Generator().manual_seed(0)
    for weights in made.denoiser.parameters():
        weights.data.normal_(0, 0.3, generator=generator)
    made.info = {"name": "pbmc", "data": "abc", "config": {}}
    return made.save(tmp_path_factory.mktemp("made") / "model")


def a_run(folder="run", **more):
    settings = {"experiment": "e", "name": "n", "params": {"a": {"b": 1}}, "tags": {"data_fingerprint": "abc"}}
    return tracking.run(**{**settings, "folder": folder, **more})


def register(model, score, data="abc", **more):
    with a_run(f"run{score}", **more) as run:
        run.register("pbmc", model, score=score, data=data, description="# A card", step=64)
    return run


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


def test_the_alias_moves_only_to_a_better_score(here, model):
    assert register(model, 2.0).registered == "pbmc version 1, now 'champion'"
    assert "stays at version 1 (validation 2.0000 against 3.0000)" in register(model, 3.0).registered
    assert "stays at version 1" in register(model, float("nan")).registered
    assert register(model, 1.0).registered == "pbmc version 4, now 'champion'"


def test_a_champion_of_other_data_is_scored_again_on_the_new_data(here, model):
    register(model, 2.0)
    assert "stays at version 1, which was trained on other data" in register(model, 0.1, "other").registered

    def judge(new, champion):
        assert Model.load(new).spec.genes == Model.load(champion).spec.genes
        return scores

    scores = (5.0, 4.0)
    said = register(model, 0.2, "other", judge=judge).registered
    assert "stays at version 1 (on the new model's validation cells 4.0000 against 5.0000)" in said
    scores = (3.0, 4.0)
    assert register(model, 9.0, "other", judge=judge).registered == "pbmc version 4, now 'champion'"
    assert "stays at version 4 (validation 9.0000" in register(model, 10.0, "other", judge=judge).registered


def test_models_of_different_data_are_scored_on_the_same_cells(atlas, tmp_path):
    from distdiff.data.store.store import CountStore
    from distdiff.denoise import adopt
    from distdiff.experiment import compare

    store = CountStore.open(atlas)

    def saved(name, genes, labels, data=store.manifest.fingerprint):
        made = Model.new(DataSpec(genes, labels, np.full(len(genes), 0.5, np.float32)), {"kind": "counts"}, SMALL)
        made.info = {"data": data, "config": {"data": {"store": str(atlas)}}}
        return made.save(tmp_path / name)

    new = saved("new", store.genes, {"cell_type": ("B", "T")})
    champion = saved("champion", ("stranger", *store.genes[4::-1]), {"cell_type": ("T", "B", "Q")})
    ours, theirs = compare(new, champion)
    assert 0 < ours < 100
    assert ours == pytest.approx(theirs), "untrained networks say the same of the same genes"
    genes = list(store.genes)
    rng = np.random.default_rng(0)
    for order in (genes[::-1], rng.permutation(genes).tolist(), genes):
        taught = Model.load(new)
        for weights in taught.denoiser.parameters():
            weights.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        one = taught.save(tmp_path / "one")
        twin = Model.new(DataSpec(tuple(order), taught.spec.labels, np.full(len(order), 0.5, np.float32)),
                         {"kind": "counts"}, SMALL)  # fmt: skip
        adopt(twin.denoiser, twin.spec.genes, taught.denoiser.state_dict(), taught.spec.genes)
        twin.info = dict(taught.info)
        other = twin.save(tmp_path / "other")
        for pair in ((one, other), (other, one)):
            assert compare(*pair)[0] == pytest.approx(compare(*pair)[1], rel=1e-4), "the same network by name"
    with pytest.raises(ValueError, match="is not what the model was trained on any more"):
        compare(saved("old", store.genes, {}, "another"), champion)


def test_scores_compare_where_they_mean_the_same():
    from distdiff.config import load

    def of(judge, *overrides):
        return load(None, ["data.store=x.zarr", *overrides]).comparable(judge)

    assert of("val/deviance") == of("val/deviance", "process.weight=nll", "optim.lr=1e-5")
    assert of("val/deviance") != of("val/deviance", "data.genes=panel")
    assert of("val/loss") == of("val/loss", "optim.lr=1e-5")
    assert of("val/loss") != of("val/loss", "process.weight=nll")
    assert of("val/loss") != of("val/loss", "survival.hidden=0.9")


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
    with a_run(again=True) as second:
        second.metrics({"loss": 2.0}, 20)
        second.register("pbmc", model, score=1.0, data="abc")
    assert first.registered == second.registered == "pbmc version 1, now 'champion'"
    assert first.run_id == second.run_id
    with pytest.raises(ValueError, match="another config"), a_run(again=True):
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
    import multiprocessing

    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    launches = [context.Process(target=first_launch, args=(tmp_path, ready)) for _ in range(3)]
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


# -- what is kept on disk ------------------------------------------------------------------------------------------


def test_an_entry_cut_short_by_a_kill_costs_no_other(tmp_path, caplog):
    spool = Spool.of(tmp_path)
    spool.append("metrics", numbers={"a": 1.0}, step=1)
    with spool.path.open("ab") as file:
        file.write(b'{"kind": "metr')
    assert [entry["step"] for entry, _ in Spool(spool.path).read(0)] == [1]
    again = Spool.of(tmp_path, again=True)
    assert again.path == spool.path
    again.append("metrics", numbers={"a": 2.0}, step=2)
    found = list(again.read(0))
    assert [entry["step"] for entry, _ in found] == [1, 2]
    assert "cut short" in caplog.text
    again.state = {"offset": found[0][1]}
    assert again.left == 1


def test_a_spool_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "mlflow").write_text("a file where the folder should be")
    spool = Spool(tmp_path / "mlflow" / "x.jsonl")
    spool.append("metrics", numbers={}, step=1)
    spool.append("metrics", numbers={}, step=2)
    assert caplog.text.count("cannot be written") == 1


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
    assert run.spool.left > 1000
    with pytest.raises(RuntimeError, match=r"is away .*entries stay in .*run the same command again"):
        tracking.sync("run")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match=r"there is no mlflow/\*.jsonl"):
        tracking.sync(here / "nowhere")


def test_a_run_that_another_process_sends_is_taken_over(here):
    with a_run() as first:
        pass
    with contextlib.ExitStack() as held:
        assert held.enter_context(Sender(first.spool).alone())
        with a_run(again=True) as run:
            run.metrics({"loss": 1.0}, 1)
            time.sleep(0.2)
            assert run.spool.left
            held.close()
    assert not run.spool.left


def test_a_run_that_is_alive_is_left_to_its_process(here):
    with a_run() as run:
        deadline = time.monotonic() + 20
        while run.run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "being sent by another process" in tracking.sync("run")[0]
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
        with a_run(again=True) as run:
            run.metrics({"loss": 1.0}, 2)
    client, state = mlflow.MlflowClient(), run.spool.state
    client.set_tag(run.run_id, "distdiff.spool", "of a server that was lost")
    run.spool.state = {**state, "run_id": "a" * 32}
    with pytest.raises(RuntimeError, match=r"is not on this server; .*--anew.*entries stay"):
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
    assert not killed.spool.left
    assert mlflow.get_run(killed.run_id).info.status == "RUNNING"
    if by == "launch":
        with a_run() as other:
            pass
        assert other.run_id != killed.run_id
    else:
        assert tracking.sync(".") == [f"run {killed.run_id}: its process was gone, now KILLED"]
    assert mlflow.get_run(killed.run_id).info.status == "KILLED"


def unsent(here, monkeypatch, name, uri, *entries):
    """A run that was begun with a server and sent nothing to it."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setattr(Sender, "send", lambda self: 0)
        with a_run(f"runs/{name}") as run:
            run.metrics({"loss": 1.0}, 1)
            for kind, what in entries:
                run.spool.append(kind, **what)
    return run.spool


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
        with pytest.raises(ValueError, match=r"says that its server is .*one\.db, and nothing was sent.*--uri sqlite"):
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


def links(folder, *pairs):
    for name, target in pairs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)


def test_of_a_run_that_somebody_sent_nothing_outside_its_folder_is_read_or_removed(here, monkeypatch):
    import mlflow

    home, beside = here / "home", here / "runs" / "thesis"
    for folder in (home, beside):
        folder.mkdir(parents=True)
        (folder / "precious").write_text("years of work")
    sent = here / "runs" / "gift"
    model = {"name": "m", "score": 1.0, "data": "d", "description": "", "step": 1, "weights": "w"}
    paths = ("../thesis/precious", "../thesis", "../../home/precious", str(home / "precious"), "link",
             "linked/precious", "holds", "deep", "..", "../gift/../thesis",
             "\0", 3, None, "round", "circles")  # fmt: skip
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db",
                   *(("artifact", {"path": path, "folder": None}) for path in paths),
                   *(("model", {**model, "path": path}) for path in paths))  # fmt: skip
    links(sent, ("link", home / "precious"), ("linked", home), ("holds/a", home / "precious"), ("deep/er/b", home),
          ("round", "round"), ("circles/round", "round"))  # fmt: skip
    (sent / "own").mkdir()
    (sent / "own" / "kept").write_text("of this run")
    (sent / "own" / "fine").symlink_to("kept")
    for path in ("own", "own/kept", "mlflow", "."):
        spool.append("model", **model, path=path)
        spool.append("model", **{**model, "weights": "other"}, path=path)
    spool.append("artifact", path="own", folder=None)
    spool.state = {"weights": "m w"}  # "sent before": each model's folder is to be removed
    tracking.sync("runs")
    assert (home / "precious").exists()
    assert (beside / "precious").exists()
    assert (sent / "own" / "kept").exists()
    assert spool.path.exists()
    stored = {f.name for f in (here / "mlruns").rglob("*") if f.is_file()}
    assert "precious" not in stored
    assert "kept" in stored
    assert mlflow.MlflowClient().search_runs(["1"])[0].data.metrics["loss"] == 1.0


def test_only_a_packed_model_of_the_run_is_removed_once_it_is_sent(here, monkeypatch):
    entry = {"name": "m", "score": 1.0, "data": "d", "description": "", "step": 1, "weights": "w"}
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db")
    mine, other = spool.path.with_suffix(".1.model"), spool.path.with_name("other.1.model")
    for folder in (mine, other):
        folder.mkdir()
        spool.append("model", **entry, path=f"mlflow/{folder.name}")
    spool.state = {"weights": "m w"}
    tracking.sync("runs")
    assert not mine.exists()
    assert other.exists()


@pytest.mark.parametrize("name", ["mlflow", "x.jsonl", "x.sent.json", "x.sent.part", "x.jsonl.lock"])
def test_a_spool_whose_files_are_links_is_refused(here, monkeypatch, name):
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db")
    victim = here / "victim"
    if name == "mlflow":
        spool.path.parent.rename(victim)
        links(here / "runs" / "gift", ("mlflow", victim))
    else:
        path = spool.path.with_name(name.replace("x", spool.path.stem, 1))
        victim.write_bytes(path.read_bytes() if path.exists() else b"precious")
        path.unlink(missing_ok=True)
        links(path.parent, (path.name, victim))
    before = victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())
    with pytest.raises(ValueError, match="is a symbolic link"):
        tracking.sync("runs/gift")
    with pytest.raises(ValueError, match="is a symbolic link"), a_run("runs/gift", again=True):
        pass
    assert before == (victim.read_bytes() if victim.is_file() else sorted(victim.iterdir()))


def test_entries_that_are_no_entries_are_left_out(here, monkeypatch, caplog):
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db")
    odd = [b"[]", b"3", b"null", b"{}", b'{"kind": 3}', b'{"kind": "nosuch"}', b'{"kind": "artifact", "path": 3}',
           b"[" * 100_000, b'{"kind": "metrics", "numbers": 3, "step": [], "time": 0}', b"\xff"]  # fmt: skip
    with spool.path.open("ab") as file:
        file.write(b"\n".join(odd) + b"\n")
    spool.append("metrics", numbers={"after": 2.0}, step=2)
    for offset in (-1, "x", None, [0], 1.5):
        spool._state.write_text(json.dumps({"offset": offset}))
        assert spool.state == {}
    tracking.sync("runs")
    import mlflow

    assert mlflow.MlflowClient().search_runs(["1"])[0].data.metrics["after"] == 2.0


# -- the model as a pyfunc -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def packed(model, tmp_path_factory):
    from distdiff.tracking.pack import pack

    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/unused.db")
        pack(model, folder / "model", card="# A card")
    return folder / "model"


@pytest.fixture(scope="session")
def imputes(packed):
    import mlflow

    return mlflow.pyfunc.load_model(str(packed))


def test_a_packed_model_holds_nothing_that_is_unpickled(packed):
    kinds = {path.suffix for path in packed.rglob("*") if path.is_file()}
    assert kinds <= {"", ".py", ".json", ".yaml", ".txt", ".md", ".safetensors"}
    assert {p.name for p in (packed / "artifacts" / "model").iterdir()} == {"model.json", "weights.safetensors"}
    assert "torch==" in (packed / "requirements.txt").read_text()
    assert "+cpu" not in (packed / "requirements.txt").read_text()


def test_signature_and_example(imputes, packed):
    signature = imputes.metadata.signature
    assert {"path", "cell_type", *GENES} == set(signature.inputs.input_names())
    assert signature.inputs.required_input_names() == []
    assert "readout" in [p.name for p in signature.params]
    out = imputes.predict(imputes.input_example)
    assert not out.isna().any(axis=None)
    served = json.loads((packed / "serving_input_example.json").read_text())
    assert not imputes.predict(served["inputs"]).isna().any(axis=None)


def test_a_frame_comes_back_with_its_gaps_filled(imputes, model):
    frame = pd.DataFrame(
        [[3, np.nan, 1, 7], [0, 2, 0, np.nan], [0, np.nan, 0, 1]], index=["x", "y", "z"],
        columns=["gene3", "gene1", "gene0", "stranger"],
    )  # fmt: skip
    out = imputes.predict(frame)
    assert list(out.columns) == ["gene3", "gene1", "gene0", "stranger", "gene2", "gene4", "gene5"]
    assert list(out.index) == ["x", "y", "z"]
    given = frame.notna().to_numpy()
    assert (out.iloc[:, :4].to_numpy()[given] == frame.to_numpy()[given]).all()
    assert out.isna().to_numpy().nonzero()[0].tolist() == [1, 2, 2, 2, 2]  # unknown gene; cell without any molecule
    import anndata as ad

    cells = ad.AnnData(frame.fillna(0)[["gene3", "gene1", "gene0"]].iloc[:2].astype("float32"))
    direct = Model.load(model).impute(cells, mean_only=True, mask=None, genes=["gene2", "gene4", "gene5"])
    whole = imputes.predict(frame.iloc[1:2].drop(columns="stranger"))  # nothing hidden in this cell
    np.testing.assert_allclose(whole[["gene2", "gene4", "gene5"]].to_numpy()[0],
                               direct.layers["imputed_mean"][1, 3:], rtol=1e-5)  # fmt: skip


def test_whole_numbers_labels_records_and_repeated_names_are_taken(imputes):
    counts = pd.DataFrame({"gene0": [1, 2], "gene1": [0, 4]}, index=["same", "same"])
    plain = imputes.predict(counts)
    assert list(plain.index) == ["same", "same"]
    named = counts.assign(cell_type=["B", "T"])
    np.testing.assert_array_equal(imputes.predict(named), plain)
    labelled = imputes.predict(named, params={"use_labels": True})
    assert labelled.shape == plain.shape
    assert not np.allclose(labelled, plain)
    with pytest.raises(ValueError, match="no column 'cell_type'"):
        imputes.predict(counts, params={"use_labels": True})
    records = imputes.predict([{"gene0": 1, "gene1": 0}, {"gene0": 2, "gene1": 4}])
    np.testing.assert_array_equal(records, plain)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pd.DataFrame({"gene0": ["many"]}), "must hold counts, a gene a column"),
        (pd.DataFrame({"gene0": [0.5]}), "0.5 is not a whole number"),
        (pd.DataFrame({"stranger": [1]}), "none of the frame's 1 columns"),
    ],
)
def test_frames_that_are_no_counts_are_refused(imputes, frame, words):
    with pytest.raises(ValueError, match=words):
        imputes.predict(frame)


def test_files_are_imputed(imputes, model, tmp_path):
    import anndata as ad

    x = np.array([[1, 0, 3], [2, 5, 0]], dtype=np.float32)
    cells = ad.AnnData(x, obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=list(GENES[:3])))
    cells.layers["hide"] = np.array([[0, 0, 1], [1, 0, 0]], dtype=np.float32)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    out = imputes.predict(str(tmp_path / "cells.h5ad"))
    assert out.shape == (2, 6)
    assert list(out.index) == ["a", "b"]
    expected = Model.load(model).impute(cells, mean_only=True).layers["imputed_mean"]
    np.testing.assert_array_equal(out.to_numpy(), expected)
    pd.testing.assert_frame_equal(imputes.predict(cells), out)
    frame = pd.DataFrame({"path": [str(tmp_path / "cells.h5ad")] * 2})
    twice = imputes.predict(frame, params={"mask": "hide"})
    assert twice.shape == (4, 3)
    assert (twice.to_numpy()[0, :2] == [1, 0]).all()
    assert twice.to_numpy()[0, 2] != 3


@pytest.mark.distributed
def test_a_packed_model_runs_its_own_code_where_distdiff_is_not_at_hand(packed, tmp_path):
    code = (
        "import sys, mlflow; model = mlflow.pyfunc.load_model(sys.argv[1]); out = model.predict(model.input_example);"
        "import distdiff; print(distdiff.__file__, out.shape)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(packed)], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{packed}/code/distdiff/__init__.py (3, 6)"


# -- a server of its own, and its death ----------------------------------------------------------------------------

README = (Path(__file__).parents[1] / "README.md").read_text()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def serve(port, folder):
    """The README's line, on a port of ours; returns once it answers."""
    line = next(text for text in README.splitlines() if text.startswith("mlflow server "))
    command = [sys.executable, "-m", *line.partition("#")[0].split(), "--port", str(port), "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                assert answer.status == 200
                return process
        except OSError:
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
    kill(process)
    pytest.fail((folder / "server.log").read_text())


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.mark.distributed
def test_training_outlives_its_server_and_all_is_sent_later(here, atlas, monkeypatch):
    import mlflow
    from typer.testing import CliRunner

    from distdiff import cli, config, experiment

    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    server, steps, metrics = serve(port, here), [], tracking.Run.metrics

    def killing(run, numbers, step=0):
        metrics(run, numbers, step)
        if "loss" in numbers:
            steps.append(step)
        if len(steps) == 2 and server.poll() is None:
            deadline = time.monotonic() + 30
            while run.spool.left and time.monotonic() < deadline:
                time.sleep(0.05)
            kill(server)

    monkeypatch.setattr(tracking.Run, "metrics", killing)
    experiment_of = [
        f"data.store={atlas}", "denoiser={kind: mlp, width: 8, depth: 1}", "evaluate.enabled=false", "train.batch=32",
        "train.cells=320", "train.eval_cells=64", "train.out=run", "tracking.model=small",
    ]  # fmt: skip
    try:
        outcome = experiment.train(config.load(None, experiment_of))
        assert outcome.registered == "not yet, MLflow is away; later: distdiff mlflow sync run"
        assert steps == [64, 128, 192, 256, 320]
        away = CliRunner().invoke(cli.app, ["mlflow", "sync", "run"])
        assert isinstance(away.exception, RuntimeError)
        server = serve(port, here)
        done = CliRunner().invoke(cli.app, ["mlflow", "sync", "run"])
        assert "small version 1, now 'champion'" in done.output
        assert "all was sent before" in CliRunner().invoke(cli.app, ["mlflow", "sync", "run"]).output

        (stored,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        history = mlflow.MlflowClient().get_metric_history(stored.info.run_id, "loss")
        assert [m.step for m in history] == steps
        assert stored.info.status == "FINISHED"
        assert stored.inputs.dataset_inputs[0].dataset.name == "atlas.zarr"
        version = mlflow.MlflowClient().get_model_version_by_alias("small", "champion")
        assert "## Limits" in version.description
        assert Model.load(tracking.fetch("models:/small@champion")).info["data"] == stored.data.tags["data_fingerprint"]
        imputes = mlflow.pyfunc.load_model("models:/small@champion")
        assert imputes.predict(imputes.input_example).shape == (3, 30)
    finally:
        kill(server)
