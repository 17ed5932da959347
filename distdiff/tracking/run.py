"""A run as the training sees it: every call writes a line to the spool and returns."""

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
from distdiff.tracking.address import library, public, where
from distdiff.tracking.courier import Courier
from distdiff.tracking.registry import Judge
from distdiff.tracking.sender import Sender
from distdiff.tracking.spool import Spool, spools
from distdiff.tracking.versions import versions

log = logging.getLogger("distdiff")

LIMIT = {"FINISHED": 600.0, "KILLED": 10.0, "FAILED": 10.0}
"""Most seconds that the end of a run waits for a server that answers; one that does not is not waited for."""


@dataclass(frozen=True)
class Dataset:
    """What a run is trained on: name, address and fingerprint of a store, and numbers that describe it."""

    name: str
    uri: str
    fingerprint: str
    profile: dict[str, Any] = field(default_factory=dict)


class Run:
    """An MLflow run, or nothing at all when tracking is off: every call is then a no-op."""

    def __init__(self, spool: Spool | None = None) -> None:
        self.spool, self._asked, self.told = spool, "", False

    def __bool__(self) -> bool:
        return self.spool is not None

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run, once the server was reached."""
        return self.spool.state.get("run_id") if self.spool else None

    @property
    def registered(self) -> str:
        """What became of `register`, once the run was closed."""
        if self.spool is None or not self._asked:
            return ""
        if self.spool.left:
            return f"not yet, MLflow is away; later: distdiff mlflow sync {self.spool.path.parents[1]}"
        return str(self.spool.state.get("registered", f"{self._asked} was not registered, as was logged"))

    def metrics(self, numbers: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at ``step`` (cells seen); signs that MLflow's names may not hold are left out."""
        finite = {re.sub(r"[^\w\-. :/]", "", k): float(v) for k, v in numbers.items() if abs(v) < float("inf")}
        if self.spool and finite:
            self.told = True
            self.spool.append("metrics", numbers=finite, step=step)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file, or every file of a folder, that lies in or beside the run's folder.

        What lies in it is sent as it is then; what lies beside it is copied into it now, as nothing is sent from
        elsewhere.
        """
        if self.spool is None:
            return
        path = Path(path)
        beside = path.exists() and path.resolve().is_relative_to(self.spool.run.resolve().parent)
        if beside and self.spool.inside(path.absolute()) is None:
            copied = self.spool.path.with_suffix(f".{time.time_ns()}.files") / path.name
            shutil.copytree(path, copied) if path.is_dir() else _copy(path, copied)
            path = copied
        self.spool.append("artifact", path=self._relative(path), folder=folder)

    def register(
        self, name: str, model: str | Path, *, score: float, data: str, description: str = "", step: int = 0
    ) -> None:
        """Log a model folder as a pyfunc and register it as a new version of ``name``.

        Parameters
        ----------
        name
            Of the registered model.
        model
            Folder written by :meth:`Model.save <distdiff.model.Model.save>`; it is packed now.
        score
            Validation score, lower is better.
        data
            What scores must share to be compared: the data's fingerprint and the score's name.
        description
            Model card (markdown).
        """
        if self.spool is None:
            return
        from distdiff.tracking.pack import pack

        self._asked, packed = name, self.spool.path.with_suffix(f".{time.time_ns()}.model")
        try:
            weights = pack(Path(model), packed, card=description)
        except Exception as error:  # weeks of training end well without MLflow
            log.warning("MLflow: %s could not be packed (%s); registered later by: distdiff mlflow sync %s", model,
                        error, self.spool.run)  # fmt: skip
            try:
                weights = str(received.json_of(Path(model) / "model.json")["info"]["weights_sha256"])
            except (OSError, ValueError, KeyError, TypeError):
                return
        self.spool.append(
            "model", name=name, path=self._relative(packed), score=score, data=data, description=description,
            step=step, weights=weights,
        )  # fmt: skip

    def _relative(self, path: str | Path) -> str:
        assert self.spool is not None
        return os.path.relpath(path, self.spool.path.parents[1])


@contextlib.contextmanager
def run(
    *,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    folder: str | Path,
    dataset: Dataset | None = None,
    judge: Judge | None = None,
    again: bool = False,
    enabled: bool = True,
) -> Iterator[Run]:
    """Open a run for the time of a ``with`` block; it ends FINISHED, KILLED (Ctrl-C, a signal) or FAILED.

    Nothing in the block waits for MLflow. Its end waits while a server answers (`LIMIT`); what a server that is away
    did not get stays in the folder, and is sent by the next run there or by :func:`sync`.

    Parameters
    ----------
    params
        The resolved config, nested; logged flat as ``section.key``.
    tags
        For example the data fingerprint; git commit and versions are added.
    folder
        Of the run; spools lie in its subfolder ``mlflow``.
    dataset
        Logged as the run's input.
    judge
        Scores a champion that was trained on other data.
    again
        Training is continued: go on with the folder's newest run.
    enabled
        ``False`` on all processes but the main one, and when tracking is off.
    """
    if not enabled:
        yield Run()
        return
    try:
        library()
    except Exception as error:
        log.warning("MLflow does not start: %s", error)
    spool = Spool.of(folder, again=again)
    tags = {**versions(), **tags}
    before = "FAILED"
    if spool.path.exists():
        before = next((e["status"] for e in reversed([e for e, _ in spool.read(0)]) if e["kind"] == "end"), "KILLED")
        spool.append("again", tags=tags)
    else:
        spool.append("start", uri=public(where()), experiment=experiment, name=name, params=flatten(params),
                     config=dict(params), tags=tags)  # fmt: skip
        if dataset is not None:
            described = {**dataset.profile, "fingerprint": dataset.fingerprint}
            spool.append("dataset", **{**dataclasses.asdict(dataset), "profile": json.dumps(described)})
    others = [other for other in spools(folder) if other.path != spool.path and other.due]
    sender = Sender(spool, where(), judge)
    spool, courier = sender.spool, Courier(sender, others)
    courier.start()
    status, current = "FAILED", Run(spool)
    try:
        with _system(spool):
            yield current
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        # a start that was refused (another config ...) takes nothing from the run that was to be continued
        spool.append("end", status=before if status == "FAILED" and not current.told else status)
        courier.close(LIMIT[status])
        if left := spool.left:
            log.warning("MLflow: %d entries were not sent (%s); later: distdiff mlflow sync %s", left,
                        courier.away or "too slow", folder)  # fmt: skip


def attach(folder: str | Path, path: str | Path) -> None:
    """Add a file to the newest run of a folder after it has ended; kept there if the server is away."""
    found = spools(folder)
    if not found:
        return
    sender = Sender(found[-1], where())
    Run(sender.spool).artifact(path)
    courier = Courier(sender, [])
    courier.start()
    courier.close(LIMIT["FINISHED"])


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True)
    shutil.copyfile(path, to)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        if isinstance(v, Mapping):
            flat |= flatten(v, f"{prefix}{k}.")
        else:
            flat[prefix + k] = v
    return flat


@contextlib.contextmanager
def _system(spool: Spool) -> Iterator[None]:
    """MLflow's system metrics (processors, memory, disk, network, GPUs) as entries of the spool."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        yield
        return
    from distdiff.tracking.system import watch

    stop = threading.Event()
    thread = threading.Thread(target=watch, args=(spool, stop), name="distdiff-system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)
