"""Certificates in MLflow: the run of the model, a new run, the card, and a server that is away."""

from __future__ import annotations

import json
import shutil

import pytest

from distdiff import tracking
from distdiff.model import Model
from distdiff.tracking.certificates import with_line
from tests.tracking.runs import a_run, register

NUMBERS = {"zeros": 0.01, "deviance of kNN + NB": 1.25, "nothing": float("nan")}


@pytest.fixture
def files_of_it(tmp_path):
    folder = tmp_path / "certificate"
    folder.mkdir()
    for name in ("certificate.html", "certificate.json", "certificate.txt"):
        (folder / name).write_text(name)
    return folder


def log(folder, model, **changed):
    what = {"data": "4f2a", "name": "b.h5ad", "status": "look", "numbers": NUMBERS, "sentence": "20 of 21 items pass"}
    weights = Model.load(tracking.fetch(str(model))).info["weights_sha256"]
    return tracking.log_certificate(folder, model=str(model), weights=weights, **(what | changed))


def check(run_id, status="look"):
    import mlflow

    client, run = mlflow.MlflowClient(), mlflow.get_run(run_id)
    assert run.data.metrics["certificate/zeros"] == 0.01
    assert run.data.metrics["certificate/deviance of kNN  NB"] == 1.25
    assert "certificate/nothing" not in run.data.metrics
    assert run.data.tags["certificate"] == status
    assert run.info.status == "FINISHED"
    paths = [f.path for f in client.list_artifacts(run_id, "certificates/4f2a")]
    assert paths == [f"certificates/4f2a/certificate.{kind}" for kind in ("html", "json", "txt")]
    return client


@pytest.mark.parametrize("address", ["models:/pbmc@champion", "models:/pbmc/1", "folder"])
def test_it_goes_to_the_run_that_registered_the_weights_and_into_the_card(here, model, files_of_it, address):
    run = register(model, 1.0)
    words = log(files_of_it, model if address == "folder" else address)
    assert words.endswith(f"run {run.run_id} of sqlite:///{here}/mlflow.db, linked from pbmc version 1")
    client = check(run.run_id)
    text = client.get_model_version("pbmc", "1").description
    assert text.startswith("# A card")
    assert "- b.h5ad (data 4f2a): **look**, 20 of 21 items pass (run `" in text
    log(files_of_it, model, status="pass")
    log(files_of_it, model, data="other", status="fail")
    text = client.get_model_version("pbmc", "1").description
    assert text.count("(data ") == 2, "the same cells once"
    assert "**pass**" in text
    assert "**fail**" in text


def test_a_model_that_was_not_registered_is_known_by_its_folder(here, model, files_of_it):
    with a_run("mine") as run:
        run.metrics({"loss": 1.0}, 1)
    shutil.copytree(model, "mine/model")
    words = log(files_of_it, "mine/model")
    assert f"logged to run {run.run_id}" in words
    check(run.run_id)


def test_the_card_beside_the_folder_gets_a_line(here, model, files_of_it):
    shutil.copytree(model, "mine/model")
    card = tracking.card(here / "mine" / "model", profile={"cells": 9}, score=("val/loss", 1.0))
    tracking.write_card(card, here / "mine" / "card")
    before = (here / "mine" / "card" / "card.md").read_text()
    for status in ("look", "pass"):
        assert "; linked from" in log(files_of_it, "mine/model", status=status)
    text = (here / "mine" / "card" / "card.md").read_text()
    assert text.index("## Certificates") < text.index("- b.h5ad (data 4f2a): **pass**") < text.index("## Data")
    assert [line for line in before.splitlines() if line] == [
        line for line in text.splitlines() if line and "ertificate" not in line
    ]
    (line,) = json.loads((here / "mine" / "card" / "card.json").read_text())["certificates"]
    assert line in text


def test_a_model_of_no_run_gets_a_new_one(here, model, files_of_it, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "trust")
    words = log(files_of_it, model)
    run_id = words.partition("a new run ")[2].split()[0]
    client = check(run_id)
    assert client.get_experiment(client.get_run(run_id).info.experiment_id).name == "trust"
    assert client.get_run(run_id).data.tags["weights"] == Model.load(model).info["weights_sha256"]


def test_a_server_that_is_away_is_told_of_and_stops_nothing(here, model, files_of_it, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    words = log(files_of_it, model)
    assert words.startswith("not logged to MLflow (")
    assert "the certificate was not logged" in caplog.text
    assert "secret" not in caplog.text + words


@pytest.mark.parametrize("text", ["", "# A card", "# A\n\n## Data\n\nb\n"])
def test_lines_of_a_card(text):
    one, two = "- a (data 1): **look**", "- b (data 2): **pass**"
    both = with_line(with_line(text, one), two)
    assert both.count("## Certificates") == 1
    assert with_line(both, one.replace("look", "fail")) == both.replace("look", "fail")
    assert both.endswith(text[text.find("## Data") :] if "## Data" in text else one)
