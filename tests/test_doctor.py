from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from distdiff import doctor

STATES = {"ok", "look", "missing"}


def _one(checks, name):
    return next(check for check in checks if check.name == name)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    return tmp_path


def test_all_is_examined_without_a_context_or_a_file():
    """In a process of its own: no CUDA context, no MLflow import (seconds), nothing written to the folder."""
    code = (
        "import os, sys, tempfile; os.chdir(tempfile.mkdtemp()); from distdiff import doctor; found = doctor.examine();"
        "import torch; assert not torch.cuda.is_initialized(); assert 'mlflow' not in sys.modules;"
        "assert 'scanpy' not in sys.modules; assert not os.listdir('.'), os.listdir('.');"
        "import json; print(json.dumps(doctor.as_dicts(found)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    found = json.loads(out)
    names = [check["name"] for check in found]
    assert {"distdiff", "packages", "extras", "processor", "torch", "flash attention", "gloo, NCCL", "disk here",
            "temporary files", "MLflow", "dask", "numba cache"} <= set(names)  # fmt: skip
    assert {check["state"] for check in found} <= STATES
    assert not [check for check in found if "could not be examined" in check["found"]]
    assert all(check["advice"] for check in found if check["state"] != "ok" and "not examined" not in check["found"])


def test_a_check_that_fails_is_a_line_of_the_table(monkeypatch):
    monkeypatch.setattr(doctor, "_dask", lambda: (_ for _ in ()).throw(RuntimeError("broken wheel")))
    line = next(check for check in doctor.examine() if "broken wheel" in check.found)
    assert line.state == "look"


def test_packages(monkeypatch):
    wanted = [Requirement("numpy>=1"), Requirement("torch>=99"), Requirement("no-such-package-here[x]>=2")]
    monkeypatch.setattr(doctor, "_requirements", lambda: wanted)
    missing, old = doctor._packages()
    assert (missing.state, missing.found) == ("missing", "no-such-package-here")
    assert missing.advice == "pip install 'no-such-package-here[x]>=2'"
    assert old.state == "look"
    assert "torch" in old.found
    assert ">=99" in old.found
    assert "numpy" not in old.found + missing.found


GPU = {"name": "NVIDIA A100", "free": 70 << 30, "total": 80 << 30, "capability": (8, 0), "driver": "550"}


@pytest.mark.parametrize(
    ("gpus", "available", "state", "words"),
    [
        ([], False, "look", "no GPU here"),
        ([GPU], True, "ok", "sees 1 GPU"),
        ([GPU], False, "missing", "is built for CPUs alone"),
    ],
)
def test_devices(monkeypatch, gpus, available, state, words):
    monkeypatch.setattr(doctor, "_nvidia", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="12.4" if available else None, hip=None))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = list(doctor._devices())
    assert (_one(found, "torch").state, words in _one(found, "torch").found) == (state, True)
    if gpus:
        assert _one(found, "GPU 0").found == "NVIDIA A100, 70.0 GiB of 80.0 GiB free, driver 550"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        if not available:
            assert "CUDA_VISIBLE_DEVICES=''" in _one(list(doctor._devices()), "torch").advice


def test_a_gpu_that_another_program_fills(monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia", lambda: [GPU | {"free": 2 << 30}])
    found = _one(list(doctor._devices()), "GPU 0")
    assert found.state == "look"
    assert "nvidia-smi" in found.advice


@pytest.mark.parametrize(("capability", "state"), [((7, 5), "look"), ((8, 0), "ok"), ((9, 0), "ok")])
def test_flash_attention(monkeypatch, capability, state):
    monkeypatch.setattr(doctor, "_nvidia", lambda: [GPU | {"capability": capability}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert [check.state for check in doctor._flash()] == [state]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert [check.state for check in doctor._flash()] == ["look"]


def test_a_host_without_an_address(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: (_ for _ in ()).throw(socket.gaierror("unknown")))
    assert _one(list(doctor._exchange()), "host name").state == "look"
    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    hang = threading.Event()
    monkeypatch.setattr(socket, "gethostbyname", lambda name: hang.wait(5))
    assert "has no address" in _one(list(doctor._exchange()), "host name").found
    hang.set()


def test_disk(monkeypatch, here):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30, total=1 << 40))
    found = _one(list(doctor._disk()), "disk here")
    assert (found.state, found.found) == ("look", f"{here}, 1.0 GiB free")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert _one(list(doctor._disk()), "disk here").state == "missing"


# -- MLflow ---------------------------------------------------------------------------------------------------------


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    made = HTTPServer(("127.0.0.1", 0), _Health)
    made.asked, made.status = [], 200
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (401, "ok"), (503, "look")])
def test_an_mlflow_server_is_named_without_its_password(server, status, state, monkeypatch):
    server.status = status
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{server.server_port}")
    (found,) = doctor._mlflow()
    assert found.state == state
    assert "secret" not in found.found + found.advice
    assert "ann" not in found.found + found.advice
    assert f"127.0.0.1:{server.server_port}" in found.found
    assert server.asked == [("/health", None)]


def test_an_mlflow_server_that_is_away(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{port}")
    (found,) = doctor._mlflow()
    assert found.state == "look"
    assert "is away" in found.found
    assert "distdiff mlflow sync" in found.advice
    assert "secret" not in found.found + found.advice


def test_an_mlflow_database(here, monkeypatch):
    assert "made by the first run" in doctor._mlflow().__next__().found
    with sqlite3.connect("mlflow.db") as database:
        database.execute("create table runs (name text)")
        database.execute("insert into runs values ('a')")
    assert next(doctor._mlflow()).found.endswith("mlflow.db, 1 runs")
    (here / "mlflow.db").write_bytes(b"no database, but long enough to be looked at " * 40)
    assert next(doctor._mlflow()).state == "look"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:secret@db/mlflow")
    found = next(doctor._mlflow())
    assert "secret" not in found.found
    assert "postgresql://db/mlflow" in found.found
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(here / "mlruns"))
    assert next(doctor._mlflow()).state == "ok"


def test_a_dask_scheduler(monkeypatch, server):
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", f"tcp://127.0.0.1:{server.server_port}")
    assert next(doctor._dask()).state == "ok"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", f"tcp://127.0.0.1:{port}")
    found = next(doctor._dask())
    assert (found.state, "does not answer" in found.found) == ("look", True)


def test_numba_without_a_cache_folder(monkeypatch):
    assert next(doctor._numba()).state == "ok"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert next(doctor._numba()).state == "look"


def test_text_shows_advice_below_its_line():
    checks = [doctor.Check("torch", "look", "no GPU", "buy one"), doctor.Check("numba cache", "ok", "fine")]
    assert doctor.text(checks).splitlines() == [
        "look     torch        no GPU",
        "                      -> buy one",
        "ok       numba cache  fine",
    ]
    assert doctor.needed(checks) == {"ok": 1, "look": 1, "missing": 0}
