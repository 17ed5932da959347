"""Send a spool to a tracking server, entry by entry; each step may be repeated after a failure."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from distdiff import files, received
from distdiff.tracking.address import load_mlflow, public_uri
from distdiff.tracking.moved import moved_sentence
from distdiff.tracking.redact import redacted
from distdiff.tracking.registry import Compare, known_version, register_version, update_champion
from distdiff.tracking.spool import Spool

log = logging.getLogger("distdiff")

Entry = dict[str, Any]

MODEL = "model"
"""Subfolder of a run's folder that holds its model."""

BATCH = 1000
"""Most metrics of a request (MLflow's own limit)."""

PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "FEATURE_DISABLED"}
"""MLflow's error codes that a repeated request would get again; what a proxy answers (404, 502) has none of them."""


class MissingFile(Exception):
    """A file or folder that an entry names cannot be sent any more."""


class UnknownRun(RuntimeError):
    """The server does not have the run that was begun on it."""


class ProjectMoved(RuntimeError):
    """The project folder was moved after its runs were logged; MLflow would write to the old place."""


class Sender:
    """Sends the entries of one spool in their order.

    Parameters
    ----------
    spool
        The entries.
    uri
        Tracking server; empty: the one that the run was begun with.
    compare
        Scores a new model and a champion (see :func:`~distdiff.tracking.registry.update_champion`).
    """

    def __init__(self, spool: Spool, uri: str = "", compare: Compare | None = None) -> None:
        self.spool, self.uri, self.compare = spool, uri, compare
        if uri and self.first_uri and public_uri(uri) != self.first_uri:
            self.spool = spool.for_server(public_uri(uri))
        self.spool.check_links()
        self.state: dict[str, Any] = self.spool.state
        self._client: Any = None
        self._warned: set[str] = set()
        self._methods: dict[str, Callable[[list[Entry]], None]] = {
            "start": self._start, "again": self._continue, "metrics": self._metrics, "dataset": self._dataset,
            "artifact": self._artifact, "model": self._model, "end": self._end,
        }  # fmt: skip
        self._lock = FileLock(f"{self.spool.path}.lock", timeout=0)

    def send(self) -> int:
        """Send the entries that were not sent and return their number.

        Raises
        ------
        Exception
            The server cannot be reached (MLflow has no class of its own for that); what was sent before is recorded.
        """
        n_sent = 0
        for entries, end in _batches(self.spool.read(self.state.get("offset", 0))):
            self._send_entries(entries)
            self._save(offset=end)
            n_sent += len(entries)
        return n_sent

    def _send_entries(self, entries: list[Entry]) -> None:
        """Send entries of one kind; where MLflow refuses them, send each alone and leave out the refused ones."""
        kind = entries[0]["kind"]
        try:
            self._methods[kind](entries)
        except Exception as error:
            if kind == "start" or not _is_permanent(error):
                raise
            if len(entries) > 1:
                for entry in entries:
                    self._send_entries([entry])
                return
            level = logging.DEBUG if kind in self._warned else logging.WARNING
            log.log(level, "MLflow refused a %s entry: %s", kind, redacted(error))
            self._warned.add(kind)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Lock the spool; yields false where another process has the lock."""
        self.spool.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError):  # a file system without locks
            yield True
            return
        try:
            self.state = self.spool.state
            yield True
        finally:
            self._lock.release()

    def end_run(self, status: str) -> bool:
        """End the run of a process that did not end it; return whether that was needed."""
        needed = bool(self.state.get("run_id") and not self.state.get("ended"))
        if needed:
            self._end([{"status": status, "time": None}])
        return needed

    def begin_anew(self) -> None:
        """Delete the record of what was sent, if the server does not have the run."""
        if self.state.get("run_id"):
            try:
                _ = self.client
            except UnknownRun:
                self.state, self.spool.state = {}, {}

    # -- one method for each kind of entry ------------------------------------------------------------------------

    def _start(self, entries: list[Entry]) -> None:
        """Find or make the run, and log its config."""
        entry, mlflow = entries[0], load_mlflow(self.uri or self.first_uri)
        self._client = mlflow.MlflowClient(self.uri or self.first_uri or None)
        run = self._named_run(entry.get("run_id")) or self._own_run(entry)
        self._save(run_id=run.info.run_id, experiment_id=run.info.experiment_id)
        params = [mlflow.entities.Param(k, str(v)[:500]) for k, v in entry["params"].items()]
        for first in range(0, len(params), 100):
            self._log_params(params[first : first + 100])
        self._client.log_dict(self.run_id, entry["config"], "config.yaml")

    def _named_run(self, run_id: str | None) -> Any:
        """The run of MLFLOW_RUN_ID, continued; ``None`` where the server does not have it."""
        from mlflow.exceptions import MlflowException

        if not run_id:
            return None
        try:
            run = self._client.get_run(run_id)
            self._check_not_moved(run.info.experiment_id)
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if not _is_permanent(error):
                raise
            log.warning("MLFLOW_RUN_ID is %s, which is no active run on this server; a new run was begun", run_id)
            return None
        return run

    def _own_run(self, entry: Entry) -> Any:
        """The run that an interrupted attempt made, or a new one."""
        experiment = self._client.get_experiment_by_name(entry["experiment"])
        if experiment:
            self._check_not_moved(experiment.experiment_id)
        number = experiment.experiment_id if experiment else self._client.create_experiment(entry["experiment"])
        found = self._client.search_runs([number], f"tags.`distdiff.spool` = '{self.spool.path.stem}'", max_results=1)
        return found[0] if found else self._client.create_run(
            number, start_time=entry["time"], run_name=entry["name"],
            tags={**entry["tags"], "distdiff.spool": self.spool.path.stem},
        )  # fmt: skip

    def _log_params(self, params: list[Any]) -> None:
        """Log parameters; those that a run of MLFLOW_RUN_ID already has with other values are left out."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.run_id, params=params)
        except MlflowException as error:
            if not _is_permanent(error):
                raise
            if len(params) == 1:
                log.warning("MLflow refused the parameter %s: %s", params[0].key, redacted(error))
                return
            for param in params:
                self._log_params([param])

    def _continue(self, entries: list[Entry]) -> None:
        self.client.update_run(self.run_id, status="RUNNING")
        for key, value in entries[0]["tags"].items():
            self.client.set_tag(self.run_id, key, value)
        self._save(ended=False)

    def _metrics(self, entries: list[Entry]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(k, v, e["time"], e["step"]) for e in entries for k, v in e["numbers"].items()]
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + BATCH])

    def _dataset(self, entries: list[Entry]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entry = entries[0]
        scheme = urlsplit(entry["uri"]).scheme
        web = scheme in ("http", "https")
        dataset = Dataset(
            entry["name"], entry["fingerprint"][:32], "http" if web else scheme or "local",
            json.dumps({"url" if web else "uri": entry["uri"]}), profile=entry["profile"],
        )  # fmt: skip
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _artifact(self, entries: list[Entry]) -> None:
        path, folder = self._existing(entries[0]["path"]), entries[0]["folder"]
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def _model(self, entries: list[Entry]) -> None:
        """Upload the packed model, register it as a version, and decide on the champion."""
        entry = entries[0]
        weights = f"{entry['name']} {entry['weights']}"
        registered = self.state.get("weights") == weights  # a finished training was started again
        folder = self._packed_model(entry, needed=not registered)
        if not registered:
            version = None if "model_id" in self.state else known_version(self.client, self.run_id, entry)
            if version is None:
                self._upload(entry, folder)
                version = register_version(self.client, self.run_id, self.state["model_id"], entry)
            line = update_champion(self.client, version, folder / "artifacts" / "model", self.compare)
            self._save(registered=line, weights=weights, model_id=None, uploaded=None)
        if self._is_packed_model(folder):
            files.remove(folder)

    def _upload(self, entry: Entry, folder: Path) -> None:
        """Log the packed model; what an interrupted attempt has done is not repeated."""
        from mlflow.entities import LoggedModelOutput

        if "model_id" not in self.state:
            model = self.client.create_logged_model(
                self.state["experiment_id"], "model", self.run_id, model_type="imputation",
                params={k: str(v)[:500] for k, v in self._start_entry["params"].items()},
                tags={"score": repr(entry["score"]), "data": entry["data"]},
            )  # fmt: skip
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, entry["step"])])
            self._save(model_id=model.model_id)
        if not self.state.get("uploaded"):
            self.client.log_model_artifacts(self.state["model_id"], str(folder))
            self.client.finalize_logged_model(self.state["model_id"], "READY")
            self._save(uploaded=True)

    def _packed_model(self, entry: Entry, *, needed: bool) -> Path:
        """Folder of the packed model; packed again from the run's model where it was removed or never written.

        Raises
        ------
        MissingFile
            Neither the packed model nor the run's model with the same weights exists.
        """
        packed = self.spool.resolve_inside(entry["path"])
        model = self.spool.resolve_inside(MODEL)
        if not needed or packed is None or packed.exists() or model is None or not self._is_packed_model(packed):
            return self._existing(entry["path"])
        from distdiff.tracking.pack import pack

        try:
            if received.json_of(model / "model.json")["info"]["weights_sha256"] != entry["weights"]:
                raise MissingFile(f"{packed} is gone, and {model} holds other weights by now")
            pack(model, packed, card=entry["description"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise MissingFile(f"{packed} is gone and cannot be made again: {error}") from error
        return packed

    def _is_packed_model(self, folder: Path) -> bool:
        """Whether a path is one that :meth:`Run.register` gives to a packed model of this run."""
        spool = self.spool.path.resolve()
        return folder.parent == spool.parent and folder.name.startswith(f"{spool.stem}.") and folder.suffix == ".model"

    def _end(self, entries: list[Entry]) -> None:
        self.client.set_terminated(self.run_id, entries[0]["status"], entries[0]["time"])
        self._save(ended=True)

    # ------------------------------------------------------------------------------------------------------------

    @property
    def client(self) -> Any:
        """MLflow's client of the run's server.

        Raises
        ------
        UnknownRun
            The server does not have the run: nothing is sent; ``--anew`` begins it again.
        ProjectMoved
            The files of the run are in a folder that was moved.
        """
        if self._client is None:
            from mlflow.exceptions import MlflowException

            uri = self.uri or self.first_uri
            client = load_mlflow(uri).MlflowClient(uri or None)  # another thread may change MLflow's own
            try:
                run = client.get_run(self.run_id)
            except MlflowException as error:
                if not _is_permanent(error):
                    raise
                raise UnknownRun(
                    f"run {self.run_id} is not on this server; if it will not come back, anew=True begins it anew "
                    "there and sends everything"
                ) from error
            self._check_not_moved(run.info.experiment_id, client)
            self._client = client
        return self._client

    def _check_not_moved(self, experiment_id: str, client: Any = None) -> None:
        client = client or self._client
        name = client.get_experiment(experiment_id).name
        if sentence := moved_sentence(client, self.uri or self.first_uri, name):
            raise ProjectMoved(sentence)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self.state["run_id"]

    @property
    def pending(self) -> bool:
        """Whether something must still be sent."""
        return self.spool.pending

    @property
    def first_uri(self) -> str:
        """Address of the server that the run was begun with."""
        return public_uri(str(self._start_entry.get("uri", "")))

    @property
    def _start_entry(self) -> Entry:
        return next((entry for entry, _ in self.spool.read(0) if entry["kind"] == "start"), {})

    def _existing(self, path: str) -> Path:
        """Real path of a file or folder of the run; its path is relative to the run's folder, which may have moved.

        Raises
        ------
        MissingFile
            It does not exist, or it (or a link in it) leads out of the run's folder.
        """
        if (found := self.spool.resolve_inside(path)) is None:
            raise MissingFile(f"{path} is not sent: it, or a link in it, leads out of the run's folder")
        if not found.exists():
            raise MissingFile(f"{found} is gone")
        return found

    def _save(self, **changes: Any) -> None:
        """Change the record of what was sent; ``None`` removes a key."""
        self.state = {k: v for k, v in {**self.state, **changes}.items() if v is not None}
        self.spool.state = self.state


def _batches(entries: Iterator[tuple[Entry, int]]) -> Iterator[tuple[list[Entry], int]]:
    """Group metrics that follow one another; each other entry is a group of its own."""
    group: list[Entry] = []
    end = n_numbers = 0
    for entry, offset in entries:
        metrics = entry["kind"] == "metrics"
        if group and (not metrics or n_numbers >= BATCH):
            yield group, end
            group, n_numbers = [], 0
        if not metrics:
            yield [entry], offset
            continue
        group.append(entry)
        n_numbers += len(entry["numbers"])
        end = offset
    if group:
        yield group, end


def _is_permanent(error: Exception) -> bool:
    """Whether a repeated request would fail again: the entry is wrong, and the server can be reached."""
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in PERMANENT
    return isinstance(error, (MissingFile, TypeError, KeyError, AttributeError))
