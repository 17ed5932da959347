"""From the spool to the server, entry by entry; every step may be taken twice."""

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
from distdiff.tracking.address import library, public
from distdiff.tracking.registry import Judge, crown, known_version, version_of
from distdiff.tracking.spool import Spool

log = logging.getLogger("distdiff")

MODEL = "model"
"""Where a run's folder has its model."""

BATCH = 1000
"""Most metrics of a request (MLflow's own limit)."""

REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "FEATURE_DISABLED"}
"""MLflow's answers that stay the same however often one asks; what a proxy says (404, 502 ...) is not among them."""


class Lost(Exception):
    """What an entry names cannot be sent any more."""


class Gone(RuntimeError):
    """The server does not know the run that was begun on it."""


class Sender:
    """Sends one spool, in its order.

    Parameters
    ----------
    spool
        Where the entries are.
    uri
        Tracking server; empty: the one the run was begun with.
    judge
        Scores a new model and a champion that was trained on other data (see `registry.crown`).
    """

    def __init__(self, spool: Spool, uri: str = "", judge: Judge | None = None) -> None:
        self.spool, self.uri, self.judge = spool, uri, judge
        if uri and self.home and public(uri) != self.home:
            self.spool = spool.to(public(uri))
        self.spool.check_links()
        spool = self.spool
        self.state: dict[str, Any] = spool.state
        self._client: Any = None
        self._told: set[str] = set()
        self._kinds: dict[str, Callable[[list[dict[str, Any]]], None]] = {
            "start": self._start, "again": self._again, "metrics": self._metrics, "dataset": self._dataset,
            "artifact": self._artifact, "model": self._model, "end": self._end,
        }  # fmt: skip
        self._lock = FileLock(f"{spool.path}.lock", timeout=0)

    def send(self) -> int:
        """Send what is there and return the number of entries.

        Raises
        ------
        Exception
            The server is away (MLflow has no error of its own for that); what was sent before is marked as sent.
        """
        sent = 0
        for entries, end in _batches(self.spool.read(self.state.get("offset", 0))):
            self._take(entries)
            self._mark(offset=end)
            sent += len(entries)
        return sent

    def _take(self, entries: list[dict[str, Any]]) -> None:
        """Send entries of one kind; of those that MLflow refuses each is left out alone."""
        kind = entries[0]["kind"]
        try:
            self._kinds[kind](entries)
        except Exception as error:
            if kind == "start" or not _refused(error):
                raise
            if len(entries) == 1:
                (log.debug if kind in self._told else log.warning)("MLflow refused a %s entry: %s", kind, error)
                self._told.add(kind)
                return
            for entry in entries:
                self._take([entry])

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold the spool; false when another process does."""
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

    def close(self, status: str) -> bool:
        """End the run of a process that could not do so itself; whether there was need."""
        needed = bool(self.state.get("run_id") and not self.state.get("ended"))
        if needed:
            self._end([{"status": status, "time": None}])
        return needed

    def begin_anew(self) -> None:
        """Forget what was sent, if the server does not know the run (any more)."""
        if self.state.get("run_id"):
            try:
                _ = self.client
            except Gone:
                self.state, self.spool.state = {}, {}

    # -- one method a kind of entry ------------------------------------------------------------------------------

    def _start(self, entries: list[dict[str, Any]]) -> None:
        entry, mlflow = entries[0], library(self.uri or self.home)
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(entry["experiment"])
        number = experiment.experiment_id if experiment else self._client.create_experiment(entry["experiment"])
        mark = f"tags.`distdiff.spool` = '{self.spool.path.stem}'"
        found = self._client.search_runs([number], mark, max_results=1)
        run = found[0] if found else self._client.create_run(
            number, start_time=entry["time"], run_name=entry["name"],
            tags={**entry["tags"], "distdiff.spool": self.spool.path.stem},
        )  # fmt: skip
        self._mark(run_id=run.info.run_id, experiment_id=number)
        params = [mlflow.entities.Param(k, str(v)[:500]) for k, v in entry["params"].items()]
        for first in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[first : first + 100])
        self.client.log_dict(self.run_id, entry["config"], "config.yaml")

    def _again(self, entries: list[dict[str, Any]]) -> None:
        self.client.update_run(self.run_id, status="RUNNING")
        for key, value in entries[0]["tags"].items():
            self.client.set_tag(self.run_id, key, value)
        self._mark(ended=False)

    def _metrics(self, entries: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        found = [Metric(k, v, e["time"], e["step"]) for e in entries for k, v in e["numbers"].items()]
        for first in range(0, len(found), BATCH):
            self.client.log_batch(self.run_id, metrics=found[first : first + BATCH])

    def _dataset(self, entries: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entry = entries[0]
        scheme = urlsplit(entry["uri"]).scheme
        web = scheme in ("http", "https")
        dataset = Dataset(
            entry["name"], entry["fingerprint"][:32], "http" if web else scheme or "local",
            json.dumps({"url" if web else "uri": entry["uri"]}), profile=entry["profile"],
        )  # fmt: skip
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def _artifact(self, entries: list[dict[str, Any]]) -> None:
        path, folder = self._path(entries[0]["path"]), entries[0]["folder"]
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder or path.name)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def _model(self, entries: list[dict[str, Any]]) -> None:
        """Log the packed model, register it as a version, and decide on the alias."""
        from mlflow.entities import LoggedModelOutput

        entry = entries[0]
        weights = f"{entry['name']} {entry['weights']}"
        folder = self._packed(entry, needed=self.state.get("weights") != weights)
        if self.state.get("weights") == weights:  # a training that was over was started again
            self._drop(folder)
            return
        if "model_id" not in self.state and (version := known_version(self.client, self.run_id, entry)):
            line = crown(self.client, version, folder / "artifacts" / "model", self.judge)
            self._mark(registered=line, weights=weights)
            self._drop(folder)
            return
        if "model_id" not in self.state:
            model = self.client.create_logged_model(
                self.state["experiment_id"], "model", self.run_id, model_type="imputation",
                params={k: str(v)[:500] for k, v in self._begun["params"].items()},
                tags={"score": repr(entry["score"]), "data": entry["data"]},
            )  # fmt: skip
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, entry["step"])])
            self._mark(model_id=model.model_id)
        model_id = self.state["model_id"]
        if not self.state.get("uploaded"):
            self.client.log_model_artifacts(model_id, str(folder))
            self.client.finalize_logged_model(model_id, "READY")
            self._mark(uploaded=True)
        version = version_of(self.client, self.run_id, model_id, entry)
        line = crown(self.client, version, folder / "artifacts" / "model", self.judge)
        self._mark(registered=line, weights=weights, model_id=None, uploaded=None)
        self._drop(folder)

    def _packed(self, entry: dict[str, Any], *, needed: bool) -> Path:
        """The packed model; made again of the run's own model where it was sent to another server, or never made.

        Raises
        ------
        Lost
            Neither is there.
        """
        packed = self.spool.inside(entry["path"])
        model = self.spool.inside(MODEL)
        if not needed or packed is None or packed.exists() or model is None or not self._ours(packed):
            return self._path(entry["path"])
        from distdiff.tracking.pack import pack

        try:
            if received.json_of(model / "model.json")["info"]["weights_sha256"] != entry["weights"]:
                raise Lost(f"{packed} is gone, and {model} holds other weights by now")
            pack(model, packed, card=entry["description"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise Lost(f"{packed} is gone and cannot be made again: {error}") from error
        return packed

    def _ours(self, folder: Path) -> bool:
        """Whether a path is one that :meth:`Run.register` gives to a packed model of this run."""
        mine = self.spool.path.resolve()
        return folder.parent == mine.parent and folder.name.startswith(f"{mine.stem}.") and folder.suffix == ".model"

    def _end(self, entries: list[dict[str, Any]]) -> None:
        self.client.set_terminated(self.run_id, entries[0]["status"], entries[0]["time"])
        self._mark(ended=True)

    # ------------------------------------------------------------------------------------------------------------

    @property
    def client(self) -> Any:
        """MLflow's client of the run's server.

        Raises
        ------
        RuntimeError
            The run is not there: nothing may be sent, and nothing given up, but the run begun anew if that is asked.
        """
        if self._client is None:
            from mlflow.exceptions import MlflowException

            client = library(self.uri or self.home).MlflowClient()
            try:
                client.get_run(self.run_id)
            except MlflowException as error:
                if _refused(error):
                    raise Gone(
                        f"run {self.run_id} is not on this server; if it will not come back, --anew begins it anew "
                        "there and sends everything"
                    ) from error
                raise
            self._client = client
        return self._client

    @property
    def run_id(self) -> str:
        """The run that was begun."""
        return self.state["run_id"]

    @property
    def due(self) -> bool:
        """Whether the server is still to be told something."""
        return self.spool.due

    @property
    def home(self) -> str:
        """Address of the server that the run was begun with."""
        return public(str(self._begun.get("uri", "")))

    @property
    def _begun(self) -> dict[str, Any]:
        return next((entry for entry, _ in self.spool.read(0) if entry["kind"] == "start"), {})

    def _path(self, path: str) -> Path:
        """Where a file or folder is by now: its path is relative to the run's folder, which may have moved.

        Raises
        ------
        Lost
            It is gone, or it is, or holds a link to, what lies outside of the run's folder.
        """
        if (found := self.spool.inside(path)) is None:
            raise Lost(f"{path} is not sent: it lies, or a link in it points, outside of the run's folder")
        if not found.exists():
            raise Lost(f"{found} is gone")
        return found

    def _drop(self, folder: Path) -> None:
        """Remove a packed model that was sent; nothing but what :meth:`Run.register` has made."""
        if self._ours(folder):
            files.remove(folder)

    def _mark(self, **what: Any) -> None:
        self.state = {k: v for k, v in {**self.state, **what}.items() if v is not None}
        self.spool.state = self.state


def _batches(entries: Iterator[tuple[dict[str, Any], int]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Metrics that follow one another together, anything else alone."""
    held: list[dict[str, Any]] = []
    end = numbers = 0
    for entry, offset in entries:
        metrics = entry["kind"] == "metrics"
        if held and (not metrics or numbers >= BATCH):
            yield held, end
            held, numbers = [], 0
        if not metrics:
            yield [entry], offset
            continue
        held.append(entry)
        numbers += len(entry["numbers"])
        end = offset
    if held:
        yield held, end


def _refused(error: Exception) -> bool:
    """Whether asking again would not help: the entry is wrong, not the server away."""
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in REFUSED
    return isinstance(error, (Lost, TypeError, KeyError, AttributeError))


def short(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
