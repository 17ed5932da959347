"""The tracking server: its address, MLflow set up for it, and model folders from its registry."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from distdiff import files
from distdiff.tracking.moved import moved_sentence
from distdiff.tracking.redact import redact_logs, redacted
from distdiff.tracking.transport import limit_requests

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
"""SQLite database in the working directory, which is used where no server is named."""

CHAMPION = "champion"
"""Alias of the registered version with the best score."""

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL would be printed with user and password
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # MLflow: 120 s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow: 7; what fails is sent again from the spool
}
"""Environment variables of MLflow and the values that they get where the user has set none."""

LOCK_SECONDS = 120.0
"""Seconds to wait for another process that makes the database."""


def tracking_uri() -> str:
    """Return the tracking URI in use: MLFLOW_TRACKING_URI, else ``mlflow.db`` (SQLite) in the working directory.

    It may hold a password: print it by :func:`~distdiff.tracking.redact.redacted` only.

    Examples
    --------
    >>> import os
    >>> os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:5000"
    >>> tracking_uri()
    'http://127.0.0.1:5000'
    >>> del os.environ["MLFLOW_TRACKING_URI"]
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).absolute()}"


def public_uri(uri: str) -> str:
    """Return an address without user and password, and without a slash at its end, to be stored and compared.

    Examples
    --------
    >>> public_uri("https://me:secret@host:5000/")
    'https://host:5000'
    """
    return redacted(uri).rstrip("/")


def load_mlflow(uri: str = "") -> Any:
    """Import ``mlflow``, set it up (:data:`SETTINGS`, limits on requests, no passwords in its logs) and return it.

    Parameters
    ----------
    uri
        Tracking URI that MLflow uses from here on; by default that of :func:`tracking_uri`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # distdiff logs an unreachable server once
    redact_logs("mlflow")
    limit_requests()
    if not (uri or os.environ.get("MLFLOW_TRACKING_URI") or Path(DATABASE).exists()):
        _make_database(mlflow)
    mlflow.set_tracking_uri(uri or tracking_uri())
    return mlflow


def _make_database(mlflow: Any) -> None:
    """Let MLflow make its tables in a temporary file, and rename the file: half-made tables cannot be opened again.

    Of processes that start at the same time one makes the database and the others wait; a database that another program
    has made meanwhile is not replaced.
    """
    lock = FileLock(f".{DATABASE}.lock", timeout=LOCK_SECONDS)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Timeout, NotImplementedError):  # a file system without locks: whole() replaces nothing
            stack.enter_context(lock)
            stack.callback(files.remove, Path(lock.lock_file))
        if Path(DATABASE).exists():
            return
        with contextlib.suppress(FileExistsError), files.whole(DATABASE) as temporary:
            try:
                mlflow.set_tracking_uri(f"sqlite:///{temporary.absolute()}")
                mlflow.search_experiments()
            finally:
                os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it for its subprocesses


def fetch(model: str) -> Path:
    """Return the folder of a model that is given by path or by an address of MLflow, downloaded if need be.

    Only the weights and JSON files of what MLflow holds are read later; code that is stored beside them is not run.

    Parameters
    ----------
    model
        A folder, ``models:/NAME@champion``, ``models:/NAME/3`` or ``runs:/ID/model``.

    Raises
    ------
    ValueError
        The registry has no such model, its files are gone, or there is no such folder.

    Examples
    --------
    >>> fetch("models:/pbmc")
    Traceback (most recent call last):
    ValueError: 'models:/pbmc' names no version; write models:/pbmc@champion or models:/pbmc/1
    """
    if not model.startswith(("models:/", "runs:/")):
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise ValueError(f"no model folder at {model}; give a folder or models:/NAME@{CHAMPION}")
        return folder
    name, version, alias = _registered(model) if model.startswith("models:/") else ("", "", "")
    client, source = None, ""
    try:
        client = load_mlflow().MlflowClient()
        source = _source(client, name, version, alias) if name else model
        return download(source)
    except Exception as error:  # of MLflow, of the disk, or of a database's driver
        reason = (moved_sentence(client, tracking_uri()) if source else "") or redacted(error)
        raise ValueError(
            f"{model} cannot be had from the registry at {public_uri(tracking_uri())}: {reason}"
        ) from None  # the error may hold a password


def download(uri: str, server: str | None = None) -> Path:
    """Return the folder of a model in MLflow's store, downloaded: of an MLflow model the folder that it packs."""
    from mlflow.artifacts import download_artifacts

    folder = Path(download_artifacts(uri, tracking_uri=server))
    packed = folder / "artifacts" / "model"
    return packed if packed.is_dir() else folder


def _registered(model: str) -> tuple[str, str, str]:
    """Name, version and alias of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``."""
    name = model.removeprefix("models:/")
    if "@" in name:
        name, _, alias = name.partition("@")
        return name, "", alias
    name, _, version = name.partition("/")
    if not version:
        raise ValueError(f"{model!r} names no version; write models:/{name}@{CHAMPION} or models:/{name}/1")
    return name, version, ""


def _source(client: MlflowClient, name: str, version: str, alias: str) -> str:
    """MLflow's address of the files of a registered version."""
    found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    return str(found.source)
