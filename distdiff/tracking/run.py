"""An MLflow run as the training uses it: each call writes one line to the spool and returns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distdiff import received
from distdiff.tracking.address import load_mlflow, public_uri, tracking_uri
from distdiff.tracking.background import BackgroundSender
from distdiff.tracking.redact import redacted, short
from distdiff.tracking.registry import Compare
from distdiff.tracking.sender import Sender
from distdiff.tracking.spool import Spool, spools
from distdiff.tracking.versions import versions

log = logging.getLogger("distdiff")

LIMIT = {"FINISHED": 600.0, "KILLED": 10.0, "FAILED": 10.0}
"""Most seconds that the end of a run waits for a server that answers, by the run's status."""

LONGEST_NAME = 250
"""Most characters of a run's name (MLflow's limit for keys)."""


@dataclass(frozen=True)
class Dataset:
    """The store that a run is trained on.

    Parameters
    ----------
    name
        Name of its folder.
    uri
        Its path or URL.
    fingerprint
        SHA-256 of its content, as hexadecimal digits.
    profile
        Numbers that describe it: cells, genes, cells of each split.

    Examples
    --------
    >>> Dataset("atlas.zarr", "/data/atlas.zarr", "f" * 64, {"cells": 200}).profile
    {'cells': 200}
    """

    name: str
    uri: str
    fingerprint: str
    profile: dict[str, Any] = field(default_factory=dict)


class Run:
    """An MLflow run that is under way, or an inactive one whose calls do nothing (tracking is off).

    Examples
    --------
    >>> run = Run()
    >>> run.metrics({"loss": 1.5}, step=64)
    >>> bool(run), run.run_id, run.registered
    (False, None, '')
    """

    def __init__(self, spool: Spool | None = None) -> None:
        self.spool, self._model_name, self.logged = spool, "", False

    def __bool__(self) -> bool:
        return self.spool is not None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the server was reached."""
        return self.spool.state.get("run_id") if self.spool else None

    @property
    def registered(self) -> str:
        """A line on the outcome of :meth:`register`, once the run was closed."""
        if self.spool is None or not self._model_name:
            return ""
        if self.spool.n_unsent:
            return f"not yet, MLflow cannot be reached; later: distdiff mlflow sync {self.spool.run_folder}"
        return str(self.spool.state.get("registered", f"{self._model_name} was not registered, see the log"))

    def metrics(self, numbers: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at ``step`` (cells seen); characters that MLflow refuses in names are left out."""
        finite = {metric_name(k): float(v) for k, v in numbers.items() if abs(v) < float("inf")}
        if self.spool and finite:
            self.logged = True
            self.spool.append("metrics", numbers=finite, step=step)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file, or all files of a folder, that lies in the run's folder or beside it.

        A file in the run's folder is sent as it is when it is sent. A file beside it is copied into the run's folder
        now, as nothing is sent from elsewhere.

        Parameters
        ----------
        path
            The file or folder.
        folder
            Folder of MLflow's artifacts; by default none for a file and its own name for a folder.
        """
        if self.spool is None:
            return
        path = Path(path)
        beside = path.exists() and path.resolve().is_relative_to(self.spool.run_folder.resolve().parent)
        if beside and self.spool.resolve_inside(path.absolute()) is None:
            copy = self.spool.path.with_suffix(f".{time.time_ns()}.files") / path.name
            shutil.copytree(path, copy) if path.is_dir() else _copy_file(path, copy)
            path = copy
        self.spool.append("artifact", path=self._relative(path), folder=folder)

    def register(
        self, name: str, model: str | Path, *, score: float, data: str, description: str = "", step: int = 0
    ) -> None:
        """Log a model folder as a pyfunc and register it as a new version of ``name``.

        Parameters
        ----------
        name
            Name of the registered model.
        model
            Folder written by :meth:`Model.save <distdiff.model.Model.save>`; it is packed now.
        score
            Validation score, lower is better.
        data
            Fingerprint of the data and kind of the score; scores are compared where this is equal.
        description
            Model card (markdown).
        step
            Cells seen when the weights were saved.
        """
        if self.spool is None:
            return
        from distdiff.tracking.pack import pack

        self._model_name, packed = name, self.spool.path.with_suffix(f".{time.time_ns()}.model")
        try:
            weights = pack(Path(model), packed, card=description)
        except Exception as error:  # the training has succeeded, whatever MLflow does
            log.warning("MLflow: %s could not be packed (%s); registered later by: distdiff mlflow sync %s", model,
                        redacted(error), self.spool.run_folder)  # fmt: skip
            try:
                weights = str(received.json_of(Path(model) / "model.json")["info"]["weights_sha256"])
            except (OSError, ValueError, KeyError, TypeError):
                return
        self.spool.append(
            "model", name=name, path=self._relative(packed), score=score, data=data, description=description,
            step=step, weights=weights,
        )  # fmt: skip

    def _relative(self, path: str | Path) -> str:
        if self.spool is None:
            raise ValueError("an inactive run has no folder")
        return os.path.relpath(path, self.spool.run_folder)


@contextlib.contextmanager
def run(
    *,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    folder: str | Path,
    dataset: Dataset | None = None,
    compare: Compare | None = None,
    resume: bool = False,
    enabled: bool = True,
) -> Iterator[Run]:
    """Open a run for the time of a ``with`` block; it ends FINISHED, KILLED (Ctrl-C, a signal) or FAILED.

    Nothing in the block waits for MLflow. The end of the block waits while the server answers (:data:`LIMIT`); what a
    server did not take stays in the folder, and the next run there or :func:`sync` sends it. Where MLFLOW_RUN_ID is
    set, a new run goes on with that one, as MLflow's own ``start_run`` does.

    Parameters
    ----------
    experiment, name
        MLflow's experiment, and the name of the run in it.
    params
        The resolved config, nested; logged flat as ``section.key``.
    tags
        For example the data fingerprint; git commit and versions are added.
    folder
        Folder of the run; spools lie in its subfolder ``mlflow``.
    dataset
        Logged as the run's input.
    compare
        Scores a new model and a champion that was trained on other data.
    resume
        The training is continued: go on with the folder's newest run.
    enabled
        ``False`` on all processes but the main one, and when tracking is off.

    Examples
    --------
    >>> with run(experiment="e", name="n", params={}, tags={}, folder="runs/a", enabled=False) as current:
    ...     current.metrics({"loss": 1.5}, step=64)
    """
    if not enabled:
        yield Run()
        return
    try:
        load_mlflow()
    except Exception as error:
        log.warning("MLflow does not start: %s", short(error))
    spool, status_before = _open_spool(experiment, name, params, {**versions(), **tags}, folder, dataset, resume)
    earlier = [found for found in spools(folder) if found.path != spool.path and found.pending]
    sender = Sender(spool, tracking_uri(), compare)
    spool, background = sender.spool, BackgroundSender(sender, earlier)
    background.start()
    status, current = "FAILED", Run(spool)
    try:
        with _system_metrics(spool):
            yield current
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        # a start that was refused (another config ...) leaves the run that was to be continued as it was
        spool.append("end", status=status_before if status == "FAILED" and not current.logged else status)
        background.close(LIMIT[status])
        if n_unsent := spool.n_unsent:
            log.warning("MLflow: %d entries were not sent (%s); later: distdiff mlflow sync %s", n_unsent,
                        background.failure or "too slow", folder)  # fmt: skip


def _open_spool(
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    folder: str | Path,
    dataset: Dataset | None,
    resume: bool,
) -> tuple[Spool, str]:
    """The spool of a new or a continued run with its first entries, and the status that the run had before."""
    if resume and (spool := Spool.latest(folder)) is not None:
        status = "KILLED"
        for entry, _ in spool.read(0):
            status = entry["status"] if entry["kind"] == "end" else status
        spool.append("again", tags=tags)
        return spool, status
    spool = Spool.create(folder)
    spool.append("start", uri=public_uri(tracking_uri()), experiment=experiment, name=name[:LONGEST_NAME],
                 run_id=os.environ.pop("MLFLOW_RUN_ID", None), params=flatten(params), config=dict(params),
                 tags=tags)  # fmt: skip
    if dataset is not None:
        described = {**dataset.profile, "fingerprint": dataset.fingerprint}
        spool.append("dataset", **{**dataclasses.asdict(dataset), "profile": json.dumps(described)})
    return spool, "FAILED"


def attach(folder: str | Path, path: str | Path) -> None:
    """Log a file to the newest run of a folder after the run has ended.

    Where the server did not take all of the run, the file stays in the folder too, and :func:`sync` sends it.

    Parameters
    ----------
    folder
        Folder of the run.
    path
        The file, in the folder or beside it.
    """
    spool = Spool.latest(folder)
    if spool is None:
        return
    sender = Sender(spool, tracking_uri())
    reachable = not sender.spool.n_unsent
    Run(sender.spool).artifact(path)
    if reachable:
        background = BackgroundSender(sender, [])
        background.start()
        background.close(LIMIT["FINISHED"])


def metric_name(name: str) -> str:
    """A metric's name without the characters that MLflow refuses.

    Examples
    --------
    >>> metric_name("test/x/distdiff, 8 calls")
    'test/x/distdiff 8 calls'
    """
    return re.sub(r"[^\w\-. :/]", "", name)


def _copy_file(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    shutil.copyfile(path, target)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one with keys joined by dots.

    Examples
    --------
    >>> flatten({"a": {"b": 1}})
    {'a.b': 1}
    """
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        if isinstance(v, Mapping):
            flat |= flatten(v, f"{prefix}{k}.")
        else:
            flat[prefix + k] = v
    return flat


@contextlib.contextmanager
def _system_metrics(spool: Spool) -> Iterator[None]:
    """Add MLflow's system metrics (processors, memory, disk, network, GPUs) to the spool while the block runs."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        yield
        return
    from distdiff.tracking.system import sample

    stop = threading.Event()
    thread = threading.Thread(target=sample, args=(spool, stop), name="distdiff-system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)
