"""Where MLflow is, and what stands at an address of its registry."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from distdiff import files

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
CHAMPION = "champion"
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow would wait 120 s, eight times; what is not sent now is sent later. The user's own settings go first."""

PATIENT = 120.0
"""Seconds to wait for another process that makes the database."""


def where() -> str:
    """The tracking URI in use: MLFLOW_TRACKING_URI, else ``mlflow.db`` (SQLite) in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).absolute()}"


def public(uri: str) -> str:
    """The address without user and password, which are not to lie in files."""
    parts = urlsplit(uri)
    uri = uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1) if "@" in parts.netloc else uri
    return uri.rstrip("/")


def library(uri: str = "") -> Any:
    """The module ``mlflow``, quiet, patient for seconds only, looking at ``uri`` (default: `where`)."""
    for name, value in {**QUIET, **PATIENCE}.items():
        os.environ.setdefault(name, value)
    import mlflow

    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics", "mlflow.tracking.fluent"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a server that is away is told once, by us
    if not (uri or os.environ.get("MLFLOW_TRACKING_URI") or Path(DATABASE).exists()):
        _make_database(mlflow)
    mlflow.set_tracking_uri(uri or where())
    return mlflow


def _make_database(mlflow: Any) -> None:
    """Let MLflow lay out its tables under a temporary name: interrupted half-way, they could not be opened again.

    Of launches at the same time one does, the others wait; a database that is there by then is never replaced.
    """
    lock = FileLock(f".{DATABASE}.lock", timeout=PATIENT)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(Timeout, NotImplementedError):  # a file system without locks: whole() replaces nothing
            held.enter_context(lock)
            held.callback(files.remove, Path(lock.lock_file))
        if Path(DATABASE).exists():
            return
        with contextlib.suppress(FileExistsError), files.whole(DATABASE) as temporary:
            try:
                mlflow.set_tracking_uri(f"sqlite:///{temporary.absolute()}")
                mlflow.search_experiments()
            finally:
                os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow puts what is set there, for its subprocesses


def fetch(model: str) -> Path:
    """Folder of a model given by path, ``models:/NAME@champion``, ``models:/NAME/3`` or ``runs:/ID/model``.

    Of what MLflow holds only weights and JSON are looked at; no code that comes with it is run.

    Raises
    ------
    ValueError
        No such model in the registry, or no such folder.
    """
    if not model.startswith(("models:/", "runs:/")):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ValueError(f"no model folder at {model}; give a folder or models:/NAME@{CHAMPION}")
        return folder
    from mlflow.exceptions import MlflowException

    mlflow = library()
    try:
        uri = _source(mlflow.MlflowClient(), model) if model.startswith("models:/") else model
        return download(uri)
    except (MlflowException, OSError) as error:
        raise ValueError(f"{model} cannot be had from the registry at {where()}: {error}") from error


def download(uri: str, server: str | None = None) -> Path:
    """Our own folder out of the one that MLflow keeps (or, of older versions, that folder itself)."""
    from mlflow.artifacts import download_artifacts

    folder = Path(download_artifacts(uri, tracking_uri=server))
    inner = folder / "artifacts" / "model"
    return inner if inner.is_dir() else folder


def _source(client: MlflowClient, model: str) -> str:
    name = model.removeprefix("models:/")
    if "@" in name:
        name, _, alias = name.partition("@")
        return str(client.get_model_version_by_alias(name, alias).source)
    name, _, version = name.partition("/")
    if not version:
        raise ValueError(f"{model!r} names no version; write models:/{name}@{CHAMPION} or models:/{name}/1")
    return str(client.get_model_version(name, version).source)
