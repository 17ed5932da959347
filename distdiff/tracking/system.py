"""MLflow's system metrics as entries of the spool, so that none is lost while the server cannot be reached.

MLflow's own thread (``SystemMetricsMonitor``) connects to the server when it is made, requests the run before each
sample and ends at the first failure; only its sensors are used here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_NODE_ID, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

from distdiff.tracking.spool import Spool

log = logging.getLogger("distdiff")

INTERVAL = 10.0
"""Seconds between samples, unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise."""


def sample(spool: Spool, stop: threading.Event) -> None:
    """Append samples to a spool until ``stop`` is set; the step is the number of seconds since the run was begun."""
    began = next(spool.read(0))[0]["time"] / 1000
    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # no such GPU, or its library is missing
            monitors.append(kind())
    node = MLFLOW_SYSTEM_METRICS_NODE_ID.get()
    prefix = f"system/{node}/" if node else "system/"
    while True:
        try:
            numbers: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                numbers |= {prefix + k: float(v) for k, v in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        except Exception as error:  # a driver that fails does not stop a training
            log.warning("no system metrics: %s", error)
            return
        spool.append("metrics", numbers=numbers, step=int(time.time() - began))
        if stop.wait(MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or INTERVAL):
            return
