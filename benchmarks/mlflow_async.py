"""What MLflow's own asynchronous logging keeps when its server fails, and what distdiff's spool keeps.

    python benchmarks/mlflow_async.py --out benchmarks/results/mlflow_async.json [--steps 200 --cap 150]

A real ``mlflow server`` (SQLite) stands behind a TCP proxy. A client logs one metric a step and one file at the end. At
half of the steps the proxy changes to the scenario's mode, and stays so until the client has ended:

- ``up``: nothing happens.
- ``refuses``: connections are closed and refused.
- ``stalls``: connections are taken, and nothing is ever answered.
- ``returns``: connections are refused for five seconds, then served again.
- ``killed``: the server stalls, and the client is killed (SIGKILL) after its last step.

Three contestants: ``mlflow`` (``mlflow.config.enable_async_logging()``, MLflow's default timeouts and retries),
``mlflow, short`` (the same with ``MLFLOW_HTTP_REQUEST_TIMEOUT=30`` and ``MLFLOW_HTTP_REQUEST_MAX_RETRIES=1``), and
``distdiff`` (:func:`distdiff.tracking.run`). For each: the slowest call of a step (ms), the seconds from the last step
to the end of the process, its exit status, and how many steps the server holds, before and after ``distdiff mlflow
sync``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import _record

CONTESTANTS = ("mlflow", "mlflow, short", "distdiff")
SCENARIOS = ("up", "refuses", "stalls", "returns", "killed")
SHORT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}

CLIENT = """
import contextlib, json, os, pathlib, signal, sys, time
kind, steps, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
(folder / "table.txt").write_text("a table")

@contextlib.contextmanager
def own():
    import mlflow
    mlflow.config.enable_async_logging()
    mlflow.set_experiment("e")
    with mlflow.start_run() as run:
        print(json.dumps({"run": run.info.run_id}), flush=True)
        yield (lambda step: mlflow.log_metric("loss", step, step)), (lambda: mlflow.log_artifact(folder / "table.txt"))

@contextlib.contextmanager
def spool():
    from distdiff import tracking
    with tracking.run(experiment="e", name="n", params={}, tags={}, folder=folder) as run:
        while run.run_id is None:
            time.sleep(0.05)
        print(json.dumps({"run": run.run_id}), flush=True)
        yield (lambda step: run.metrics({"loss": step}, step)), (lambda: run.artifact(folder / "table.txt"))

worst = 0.0
with (spool if kind == "distdiff" else own)() as (log, artifact):
    for step in range(steps):
        if step == steps // 2:
            print(json.dumps({"half": True}), flush=True)
            sys.stdin.readline()
        began = time.perf_counter()
        log(step)
        worst = max(worst, time.perf_counter() - began)
        time.sleep(0.02)
    print(json.dumps({"worst": worst}), flush=True)
    artifact()
"""


class Proxy:
    """Passes bytes on to a server, or stalls, or refuses."""

    def __init__(self, server: int) -> None:
        self.server, self.mode, self.pairs = server, "up", []
        self.port = _free_port()
        self.listener: socket.socket | None = None
        self.set("up")

    def set(self, mode: str) -> None:
        """Change the mode; refusing closes what is open."""
        self.mode = mode
        if mode == "refuses" and self.listener:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
            for one in self.pairs:
                one.close()
            self.pairs = []
        if mode != "refuses" and self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if self.mode == "stalls":
                self.pairs.append(client)
                continue
            server = socket.create_connection(("127.0.0.1", self.server))
            self.pairs += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                while self.mode == "stalls":
                    time.sleep(0.1)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server; return once it answers."""
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db", "--workers", "1",
               "--artifacts-destination", "./mlartifacts", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return process, port
        except OSError:
            time.sleep(0.2)


def measure(kind: str, scenario: str, proxy: Proxy, folder: Path, steps: int, cap: float) -> dict[str, Any]:
    """One client in one scenario."""
    from mlflow import MlflowClient

    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    uri = f"http://127.0.0.1:{proxy.port}"
    environment |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false", **(SHORT if "short" in kind else {})}  # fmt: skip
    folder.mkdir()
    with (folder / "client.log").open("wb") as log:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, kind, str(steps), str(folder)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log, env=environment, text=True,
        )  # fmt: skip
    assert client.stdin is not None
    assert client.stdout is not None
    printed: dict[str, Any] = {}
    for line in client.stdout:
        printed |= json.loads(line)
        if "worst" in printed:
            break
        if "half" in printed:
            proxy.set({"returns": "refuses", "killed": "stalls"}.get(scenario, scenario))
            if scenario == "returns":
                threading.Timer(5, proxy.set, ("up",)).start()
            client.stdin.write("\n")
            client.stdin.flush()
    began = time.monotonic()
    if scenario == "killed":
        client.send_signal(signal.SIGKILL)
    try:
        ended = client.wait(cap)
    except subprocess.TimeoutExpired:
        client.kill()
        ended = None
    seconds = time.monotonic() - began
    time.sleep(5 if scenario == "returns" else 0)
    proxy.set("refuses")
    proxy.set("up")
    reader = MlflowClient(f"http://127.0.0.1:{proxy.server}")

    def held() -> int:
        return len({m.step for m in reader.get_metric_history(printed["run"], "loss")})

    found = {
        "contestant": kind, "scenario": scenario, "slowest_call_ms": round(1000 * printed["worst"], 1),
        "end_seconds": round(seconds, 1), "ended_within_cap": ended is not None, "exit": ended, "steps_held": held(),
    }  # fmt: skip
    if kind == "distdiff":
        sync = [sys.executable, "-c", "from distdiff.cli import main; main()", "mlflow", "sync", str(folder)]
        subprocess.run(sync, env=environment, check=True, capture_output=True)
        found["steps_held_after_sync"] = held()
    return found


def main() -> None:
    """Measure all, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cap", type=float, default=150, help="seconds to wait for a client's end")
    options = parser.parse_args()
    rows, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        server, port = serve(Path(scratch))
        try:
            proxy = Proxy(port)
            for number, (scenario, kind) in enumerate((s, k) for s in SCENARIOS for k in CONTESTANTS):
                rows.append(measure(kind, scenario, proxy, Path(scratch) / str(number), options.steps, options.cap))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    import mlflow

    content = {"steps": options.steps, "cap_seconds": options.cap, "mlflow": mlflow.__version__, "rows": rows}
    _record.write(options.out, began, content)


if __name__ == "__main__":
    main()
