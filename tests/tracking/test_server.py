from __future__ import annotations

import time

import pytest

from distdiff import tracking
from distdiff.model import Model
from tests.tracking.runs import free_port, kill, serve


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
            while run.spool.n_unsent and time.monotonic() < deadline:
                time.sleep(0.05)
            kill(server)

    monkeypatch.setattr(tracking.Run, "metrics", killing)
    experiment_of = [
        f"data.store={atlas}", "denoiser={kind: mlp, width: 8, depth: 1}", "evaluate.enabled=false", "train.batch=32",
        "train.cells=320", "train.eval_cells=64", "train.out=run", "tracking.model=small",
    ]  # fmt: skip
    try:
        outcome = experiment.train(config.load(None, experiment_of))
        assert outcome.registered == "not yet, MLflow cannot be reached; later: distdiff mlflow sync run"
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
