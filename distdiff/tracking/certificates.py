"""Certificates in MLflow: in the run that the model came from, or in a new one, with a line in the model's card."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdiff import files, received
from distdiff.tracking.address import load_mlflow, public_uri, tracking_uri
from distdiff.tracking.redact import short
from distdiff.tracking.registry import LONGEST
from distdiff.tracking.run import metric_name
from distdiff.tracking.spool import Spool
from distdiff.tracking.versions import versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("distdiff")

HEADING = "## Certificates"
"""Of the lines in a card."""

BEFORE = "## Data"
"""Heading of a card before which they stand."""


def log_certificate(
    folder: str | Path, *, model: str, weights: str, data: str, name: str, status: str, numbers: Mapping[str, float],
    sentence: str,
) -> str:  # fmt: skip
    """Log a certificate, and link it from the model's card; returns a line on what was done.

    The run is that which registered these weights, or which trained them in the model's folder; else a new one. A
    server that cannot be reached is told of in the line, nothing is raised: the certificate is on disk.

    Parameters
    ----------
    folder
        Files of the certificate; they become the artifacts ``certificates/<data>``.
    model
        Folder or address of the model; empty: in memory.
    weights
        Its ``weights_sha256``.
    data
        Fingerprint of the cells; a certificate of the same cells replaces its line in the card.
    name, status, sentence
        What the cells are, the verdict, and a sentence on it.
    numbers
        Logged as ``certificate/<name of the number>``.
    """
    line = f"- {name} (data {data}): **{status}**, {sentence}"
    try:
        mlflow = load_mlflow()
        client = mlflow.MlflowClient()
        version = _version(client, model, weights)
        run_id = version.run_id if version is not None else _trained_in(client, model)
        made = run_id is None
        if run_id is None:
            run_id = _new_run(client, name, weights)
        now, artifacts = int(time.time() * 1000), f"certificates/{data}"
        finite = {metric_name(f"certificate/{k}"): float(v) for k, v in numbers.items() if abs(v) < float("inf")}
        client.log_batch(run_id, metrics=[mlflow.entities.Metric(k, v, now, 0) for k, v in finite.items()])
        client.set_tag(run_id, "certificate", status)
        client.log_artifacts(run_id, str(folder), artifacts)
        if made:
            client.set_terminated(run_id)
        line += f" (run `{run_id}`, {artifacts}/certificate.html)"
        if version is not None:
            text = with_line(version.description or "", line)
            client.update_model_version(version.name, version.version, description=text[:LONGEST])
        done = f"logged to {'a new run' if made else 'run'} {run_id} of {public_uri(tracking_uri())}"
        done += f", linked from {version.name} version {version.version}" if version is not None else ""
    except Exception as error:  # of MLflow, of the disk, or of a database's driver
        log.warning("MLflow: the certificate was not logged (%s)", short(error))
        done = f"not logged to MLflow ({short(error)})"
    return done + _into_card(model, data, line)


def with_line(text: str, line: str) -> str:
    """A card with a certificate's line, in place of an earlier one of the same data.

    Examples
    --------
    >>> from distdiff.tracking.certificates import with_line
    >>> card = with_line("# pbmc", "- a.h5ad (data 4f2a): **look**")
    >>> print(with_line(card, "- a.h5ad (data 4f2a): **pass**"))
    # pbmc
    <BLANKLINE>
    ## Certificates
    <BLANKLINE>
    - a.h5ad (data 4f2a): **pass**
    """
    found = re.match(r"- .* \(data (\S+)\): ", line)
    earlier = re.search(rf"^- .* \(data {re.escape(found[1])}\): .*$", text, re.MULTILINE) if found else None
    if earlier:
        return text[: earlier.start()] + line + text[earlier.end() :]
    if HEADING in text:
        return text.replace(f"{HEADING}\n\n", f"{HEADING}\n\n{line}\n", 1)
    head, data, rest = text.partition(f"{BEFORE}\n")
    return f"{head.rstrip()}\n\n{HEADING}\n\n{line}" + (f"\n\n{data}{rest}" if data else "")


def _version(client: MlflowClient, model: str, weights: str) -> ModelVersion | None:
    """The registered version that the address names, or the newest with these weights."""
    if model.startswith("models:/"):
        name, _, what = model.removeprefix("models:/").replace("@", "/@", 1).partition("/")
        if what.startswith("@"):
            return client.get_model_version_by_alias(name, what[1:])
        return client.get_model_version(name, what)
    if not re.fullmatch("[0-9a-f]{64}", weights):
        return None
    found = client.search_model_versions(f"tags.weights = '{weights}'")
    return max(found, key=lambda version: version.creation_timestamp, default=None)


def _trained_in(client: MlflowClient, model: str) -> str | None:
    """The run of ``runs:/ID/model``, or the one that trained a model in this folder, if the server has it."""
    from mlflow.exceptions import MlflowException

    if model.startswith("runs:/"):
        return model.removeprefix("runs:/").partition("/")[0]
    if not model or "://" in model:
        return None
    spool = Spool.latest(Path(model).expanduser().absolute().parent)
    run_id = spool.state.get("run_id") if spool else None
    if run_id is None:
        return None
    try:
        return str(client.get_run(run_id).info.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _new_run(client: MlflowClient, name: str, weights: str) -> str:
    label = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "distdiff"
    experiment = client.get_experiment_by_name(label)
    number = experiment.experiment_id if experiment else client.create_experiment(label)
    tags = {**versions(), "weights": weights}
    return str(client.create_run(number, run_name=f"certificate of {name}", tags=tags).info.run_id)


def _into_card(model: str, data: str, line: str) -> str:
    """Put the line into the card beside a model's folder, if there is one; returns what to say of it."""
    if not model or ":/" in model:
        return ""
    folder = Path(model).expanduser().absolute().parent / "card"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        text, card = (folder / "card.md").read_text(), received.json_of(folder / "card.json")
        card["certificates"] = [*(c for c in card.get("certificates", ()) if f"(data {data})" not in c), line]
        with files.whole(folder, overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / "card.md").write_text(with_line(text, line))
            (temporary / "card.json").write_text(json.dumps(card, indent=1))
        return f"; linked from {folder / 'card.md'}"
    return ""


def described(found: Any) -> dict[str, Any]:
    """What `log_certificate` logs of a certificate (`distdiff.certified.Certificate`)."""
    numbers = {item.name: item.value for item in found.items}
    numbers |= {f"{score} of {name}": v for name, scores in found.scores.items() for score, v in scores.items()}
    by_status = {s: sum(item.status == s for item in found.items) for s in ("pass", "look", "fail")}
    numbers |= {f"items that {'are to be looked at' if s == 'look' else s}": n for s, n in by_status.items()}
    return {
        "data": found.about["data"], "name": Path(found.about["where"]).name, "status": found.status,
        "numbers": numbers, "sentence": f"{by_status['pass']} of {len(found.items)} items pass",
    }  # fmt: skip
