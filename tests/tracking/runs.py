"""Runs, models and servers that several tests of this folder need."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from distdiff import tracking
from distdiff.tracking.sender import Sender

SMALL = {"kind": "mlp", "width": 8, "depth": 1}
GENES = tuple(f"gene{i}" for i in range(6))
PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "mlflow.md").read_text()


def a_run(folder="run", **more):
    settings = {"experiment": "e", "name": "n", "params": {"a": {"b": 1}}, "tags": {"data_fingerprint": "abc"}}
    return tracking.run(**{**settings, "folder": folder, **more})


def register(model, score, data="abc", **more):
    with a_run(f"run{score}", **more) as run:
        run.register("pbmc", model, score=score, data=data, description="# A card", step=64)
    return run


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


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def start(command, folder, url, **environment):
    """Start a server in a folder; return its process once the URL answers."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment = {**inherited, "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                assert answer.status == 200
                return process
        except OSError:
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
    kill(process)
    pytest.fail((folder / "server.log").read_text())


def serve(port, folder):
    """Start the ``mlflow server`` of docs/howto/mlflow.md on a port."""
    line = next(text for text in PAGE.splitlines() if text.startswith("mlflow server "))
    command = [sys.executable, "-m", *line.partition("#")[0].split(), "--port", str(port), "--workers", "1"]
    url = f"http://127.0.0.1:{port}/health"
    return start(command, folder, url, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
