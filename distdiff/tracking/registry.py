"""Versions of a registered model, and which of them is the champion."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdiff.tracking.address import CHAMPION, download

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("distdiff")

Judge = Callable[[Path, Path], tuple[float, float]]
"""Folders of a new model and of a champion trained on other data -> scores of both on the same cells, lower better."""

LONGEST = 5000
"""Characters that MLflow's registry takes of a description."""


def known_version(client: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> ModelVersion | None:
    """The version that this run has made of these weights before, if any."""
    found = client.search_model_versions(f"name = '{entry['name']}' and run_id = '{run_id}'")
    return next((v for v in found if v.tags.get("weights") == entry["weights"]), None)


def version_of(client: MlflowClient, run_id: str, model_id: str, entry: Mapping[str, Any]) -> ModelVersion:
    """The version of a logged model, made unless an attempt that broke off has made it."""
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


def crown(client: MlflowClient, version: ModelVersion, folder: Path, judge: Judge | None) -> str:
    """Move ``champion`` to ``version`` if that scores better; says what became of it.

    Validation scores compare where both were trained on the same data (same cells held out) and judged by the same
    number. A champion of other data is scored again, by ``judge``, on the cells that the new model was held out from;
    without a judge it stays.
    """
    name = f"{version.name} version {version.version}"
    champion = _champion(client, version.name)
    if champion is not None and champion.version == version.version:
        return f"{name} is '{CHAMPION}'"
    if champion is not None:
        stays = f"{name}; '{CHAMPION}' stays at version {champion.version}"
        how, scores = "validation", _same_data(version, champion)
        if scores is None:
            other = download(str(champion.source), client.tracking_uri)
            try:
                how, scores = "on the new model's validation cells", _judged(folder, other, judge)
            except Exception as error:
                log.debug("the champion could not be scored", exc_info=True)
                return f"{stays}, which was trained on other data and could not be scored on these cells ({error})"
        ours, theirs = scores
        if not ours < theirs:
            return f"{stays} ({how} {theirs:.4f} against {ours:.4f})"
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    return f"{name}, now '{CHAMPION}'"


def _same_data(version: ModelVersion, champion: ModelVersion) -> tuple[float, float] | None:
    """Validation scores of both, if they compare."""
    if champion.tags.get("data") == version.tags["data"]:
        with contextlib.suppress(KeyError, ValueError):
            return float(version.tags["score"]), float(champion.tags["score"])
    return None


def _judged(new: Path, champion: Path, judge: Judge | None) -> tuple[float, float]:
    if judge is None:
        raise ValueError("nobody to judge")
    ours, theirs = judge(new, champion)
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        raise ValueError(f"scores {ours} and {theirs}")
    return ours, theirs


def _champion(client: MlflowClient, name: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
