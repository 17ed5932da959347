"""Versions of a registered model, and which of them has the alias ``champion``."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdiff.tracking.address import CHAMPION, download
from distdiff.tracking.redact import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("distdiff")

Compare = Callable[[Path, Path], tuple[float, float]]
"""Folders of a new model and of a champion trained on other data -> both scores on the same cells, lower is better."""

LONGEST = 5000
"""Characters of a description that MLflow's registry takes, at most."""


def known_version(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> ModelVersion | None:
    """Return the version that this run has registered with the same weights; ``None`` if there is none."""
    found = client.search_model_versions(f"name = '{entry['name']}' and run_id = '{run_id}'")
    return next((v for v in found if v.tags.get("weights") == entry["weights"]), None)


def register_version(client: MlflowClient, run_id: str, model_id: str, entry: Mapping[str, Any]) -> ModelVersion:
    """Register a logged model and return its version; one that an interrupted attempt has registered is returned."""
    from mlflow.exceptions import MlflowException

    name = entry["name"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if version.tags.get("model_id") == model_id:
            return version
    tags = {"score": repr(entry["score"]), "data": entry["data"], "model_id": model_id,
            "weights": entry["weights"]}  # fmt: skip
    return client.create_model_version(
        name, f"models:/{model_id}", run_id, tags=tags, description=entry["description"][:LONGEST],
        await_creation_for=0, model_id=model_id,
    )  # fmt: skip


def update_champion(client: MlflowClient, version: ModelVersion, folder: Path, compare: Compare | None) -> str:
    """Give the alias ``champion`` to a version if its score is better, and return a line on the outcome.

    Validation scores are compared where both models were trained on the same data (the same cells held out) and have
    the same kind of score. A champion of other data is scored again, by ``compare``, on cells that the new model was
    not trained on; without ``compare``, or where it fails, it stays.

    Parameters
    ----------
    version
        The new version.
    folder
        Its model folder.
    """
    from mlflow.exceptions import MlflowException

    name = f"{version.name} version {version.version}"
    champion = _champion(client, version.name)
    if champion is not None and champion.version == version.version:
        return f"{name} is '{CHAMPION}'"
    if champion is not None:
        stays = f"{name}; '{CHAMPION}' stays at version {champion.version}"
        cells, scores = "validation", _validation_scores(version, champion)
        if scores is None:
            cells = "on the new model's validation cells"
            try:
                scores = _compared(folder, _champion_folder(client, champion), compare)
            except MlflowException:  # the server cannot be reached: the entry is sent again later
                raise
            except Exception as error:
                log.debug("the champion could not be scored: %s", redacted(error))
                return (
                    f"{stays}, which was trained on other data and could not be scored on these cells "
                    f"({redacted(error)})"
                )
        new_score, champion_score = scores
        if not new_score < champion_score:
            return f"{stays} ({cells} {champion_score:.4f} against {new_score:.4f})"
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return f"{name}, now '{CHAMPION}'"


def _validation_scores(version: ModelVersion, champion: ModelVersion) -> tuple[float, float] | None:
    """Validation scores of both versions if they can be compared."""
    if champion.tags.get("data") == version.tags["data"]:
        with contextlib.suppress(KeyError, ValueError):
            return float(version.tags["score"]), float(champion.tags["score"])
    return None


def _champion_folder(client: MlflowClient, champion: ModelVersion) -> Path:
    """Folder of the champion's model, downloaded."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        return download(str(champion.source), client.tracking_uri)
    except RequestException as error:
        raise MlflowException(f"the champion could not be downloaded: {error}") from error


def _compared(new: Path, champion: Path, compare: Compare | None) -> tuple[float, float]:
    if compare is None:
        raise ValueError("no comparison was given")
    new_score, champion_score = compare(new, champion)
    if not (math.isfinite(new_score) and math.isfinite(champion_score)):
        raise ValueError(f"the scores {new_score} and {champion_score} are not finite")
    return new_score, champion_score


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
