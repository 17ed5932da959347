"""MLflow: one run a launch, on the main process; the registry of models. The only file that knows MLflow."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdiff import files

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
CHAMPION = "champion"


class Run:
    """An MLflow run, or nothing at all when tracking is off: every call is then a no-op."""

    def __init__(self, run_id: str | None = None):
        self.run_id = run_id

    def __bool__(self) -> bool:
        return self.run_id is not None

    def metrics(self, numbers: Mapping[str, float], step: int = 0) -> None:
        """Log finite numbers at ``step`` (cells seen); signs that MLflow's names may not hold are left out."""
        if self:
            finite = {
                re.sub(r"[^\w\-. :/]", "", k): float(v) for k, v in numbers.items() if v == v and abs(v) != float("inf")
            }
            _mlflow().log_metrics(finite, step=step, run_id=self.run_id)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file, or every file of a folder."""
        if not self:
            return
        if Path(path).is_dir():
            _mlflow().log_artifacts(str(path), artifact_path=folder or Path(path).name, run_id=self.run_id)
        else:
            _mlflow().log_artifact(str(path), artifact_path=folder, run_id=self.run_id)

    def register(self, name: str, artifact: str, *, score: float, data: str, description: str = "") -> str:
        """Register a logged folder as a new version of ``name``; return the version and what became of the alias.

        ``champion`` moves to the new version if there is none yet, if the champion was trained on other data (scores
        do not compare), or if the new validation score is lower.
        """
        if not self:
            return ""
        from mlflow.exceptions import MlflowException

        client = _client()
        with contextlib.suppress(MlflowException):
            client.create_registered_model(name)
        source = f"{client.get_run(self.run_id).info.artifact_uri}/{artifact}"  # type: ignore[arg-type]
        version = client.create_model_version(
            name, source, self.run_id, tags={"score": repr(score), "data": data}, description=description
        )
        try:
            champion = client.get_model_version_by_alias(name, CHAMPION)
        except MlflowException:
            champion = None
        if champion is not None and champion.tags.get("data") == data:
            best = float(champion.tags.get("score", "inf"))
            if best <= score:
                return (
                    f"{name} version {version.version}; '{CHAMPION}' stays at version {champion.version} "
                    f"(validation {best:.4f} against {score:.4f})"
                )
        client.set_registered_model_alias(name, CHAMPION, version.version)
        return f"{name} version {version.version}, now '{CHAMPION}'"


@contextlib.contextmanager
def run(
    *, experiment: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str], enabled: bool = True
) -> Iterator[Run]:
    """Open a run for the time of a ``with`` block; it ends FINISHED, KILLED (Ctrl-C) or FAILED.

    Parameters
    ----------
    params
        The resolved config, nested; logged flat as ``section.key``.
    tags
        For example the data fingerprint; git commit and versions are added.
    enabled
        ``False`` on all processes but the main one, and when tracking is off.
    """
    if not enabled:
        yield Run()
        return
    mlflow = _mlflow()
    mlflow.set_experiment(experiment)
    status = "FAILED"
    active = mlflow.start_run(run_name=name, log_system_metrics=True)
    try:
        mlflow.log_params({k: str(v)[:500] for k, v in flatten(params).items()})
        mlflow.log_dict(dict(params), "config.yaml")
        mlflow.set_tags({**_versions(), **tags})
        yield Run(active.info.run_id)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        mlflow.end_run(status)


def attach(run_id: str, path: str | Path) -> None:
    """Add a file to a run that has ended."""
    Run(run_id).artifact(path)


def where() -> str:
    """The tracking URI in use: MLFLOW_TRACKING_URI, else ``mlflow.db`` (SQLite) in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DATABASE).absolute()}"


def fetch(model: str) -> Path:
    """Folder of a model given by path, ``models:/NAME@champion``, ``models:/NAME/3`` or ``runs:/ID/path``.

    Raises
    ------
    ValueError
        No such model in the registry, or no such folder.
    """
    if not model.startswith(("models:/", "runs:/")):
        if not Path(model).is_dir():
            raise ValueError(f"no model folder at {model}; give a folder or models:/NAME@{CHAMPION}")
        return Path(model)
    from mlflow.exceptions import MlflowException

    mlflow = _mlflow()
    try:
        uri = _source(model) if model.startswith("models:/") else model
        return Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        raise ValueError(f"{model} cannot be had from the registry at {where()}: {error}") from error


def _source(model: str) -> str:
    client, name = _client(), model.removeprefix("models:/")
    if "@" in name:
        name, _, alias = name.partition("@")
        return str(client.get_model_version_by_alias(name, alias).source)
    name, _, version = name.partition("/")
    if not version:
        raise ValueError(f"{model!r} names no version; write models:/{name}@{CHAMPION} or models:/{name}/1")
    return str(client.get_model_version(name, version).source)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        if isinstance(v, Mapping):
            flat |= flatten(v, f"{prefix}{k}.")
        else:
            flat[prefix + k] = v
    return flat


def _versions() -> dict[str, str]:
    import torch

    from distdiff import __version__

    tags = {"distdiff": __version__, "torch": torch.__version__}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).parent
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        if out.returncode == 0:
            tags["git_commit"] = out.stdout.strip()
    return tags


def _mlflow() -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics", "mlflow.tracking.fluent"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not os.environ.get("MLFLOW_TRACKING_URI") and not Path(DATABASE).exists():
        _make_database(mlflow)
    mlflow.set_tracking_uri(where())
    return mlflow


def _make_database(mlflow: Any) -> None:
    """Let MLflow lay out its tables under a temporary name: interrupted half-way, they could not be opened again."""
    with files.whole(DATABASE) as temporary:
        try:
            mlflow.set_tracking_uri(f"sqlite:///{temporary.absolute()}")
            mlflow.search_experiments()
        finally:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow puts what is set there, for its subprocesses


def _client() -> MlflowClient:
    return _mlflow().MlflowClient()
