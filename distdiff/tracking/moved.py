"""Recognise a project folder that was moved after MLflow had stored the absolute paths of its files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def local_path(uri: str) -> Path | None:
    """Return the path that an artifact location names on this machine; ``None`` for a location elsewhere.

    Examples
    --------
    >>> local_path("file:///data/mlruns/1")
    PosixPath('/data/mlruns/1')
    >>> local_path("s3://bucket/1") is None
    True
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return None
    path = Path(unquote(parts.path) if parts.scheme else uri)
    return path if path.is_absolute() else None


def missing_project(location: str, database: Path) -> Path | None:
    """Return the folder that a project had before it was moved; ``None`` if it was not moved.

    A project counts as moved if the location ``OLD/mlruns/1`` does not exist, and either ``OLD`` does not exist or the
    database's own folder has an ``mlruns/1``.

    Examples
    --------
    >>> missing_project("/nowhere/project/mlruns/1", Path("/tmp/mlflow.db"))
    PosixPath('/nowhere/project')
    >>> missing_project("mlflow-artifacts:/1", Path("/tmp/mlflow.db")) is None
    True
    """
    path = local_path(location)
    if path is None or path.exists() or len(path.parents) < 2:
        return None
    old = path.parents[1]
    tail = path.relative_to(old)
    return old if not old.exists() or (database.parent / tail).exists() else None


def moved_sentence(client: Any, uri: str, experiment_name: str = "") -> str:
    """Return a sentence on a project that was moved and what to do about it; empty if none was moved.

    Parameters
    ----------
    client
        MLflow's client of the server at ``uri``.
    uri
        Tracking URI; only an SQLite file is looked at.
    experiment_name
        Experiment to look at; all of them by default.
    """
    if not uri.startswith("sqlite:///"):
        return ""
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    if not database.exists():
        return ""
    for experiment in client.search_experiments():
        old = missing_project(experiment.artifact_location, database)
        if old is not None and experiment_name in ("", experiment.name):
            location = local_path(experiment.artifact_location)
            return (
                f"{database} says that the files of experiment {experiment.name!r} are in {location}, which does not "
                "exist: the project folder was moved or removed after its runs were logged; move it back, or link the "
                f"old name to the new folder ({_link_command(old, location, database.parent)})"
            )
    return ""


def _link_command(old: Path, location: Path | None, new: Path) -> str:
    """The command that makes ``location`` of the old project a name of the same folder of the new one."""
    path = location or old
    missing = next(folder for folder in (*reversed(path.parents), path) if folder.is_relative_to(old)
                   and not folder.exists())  # fmt: skip
    make_parent = "" if missing.parent.exists() else f"mkdir -p {shlex.quote(str(missing.parent))} && "
    return f"{make_parent}ln -s {shlex.quote(str(new / missing.relative_to(old)))} {shlex.quote(str(missing))}"
