"""One YAML file is one experiment. Validated once, here: unknown keys and wrong literals are refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from distdiff.component import build, complete, nearest
from distdiff.data.loader import Loading
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.survival import Survival
from distdiff.train.loop import Training
from distdiff.train.optim import Optim


@dataclass(frozen=True)
class Data:
    """What is trained on.

    ``store``: a folder written by ``distdiff shard``, or its URL; ``genes``: all, or the panel that it was built with;
    ``labels``: covariates the model is conditioned on.
    """

    store: str
    genes: Literal["all", "panel"] = "all"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The table at the end of training.

    ``enabled: false`` skips it; ``cells`` bounds the test cells scored; ``cell_type`` names the label of the
    cell-type rows (none: the rows are left out); ``repaint_steps: 0`` leaves RePaint out.
    """

    enabled: bool = True
    rate: float = 0.5
    protocol: Literal["mcar", "paper"] = "mcar"
    draws: int = 5
    cells: int = 2000
    cell_type: str | None = None
    repaint_steps: int = 100


@dataclass(frozen=True)
class Tracking:
    """MLflow names; ``enabled: false`` logs nothing. The store is MLFLOW_TRACKING_URI, else ./mlflow.db (SQLite)."""

    enabled: bool = True
    experiment: str = "distdiff"
    model: str = "distdiff"


@dataclass(frozen=True)
class Config:
    """A whole experiment."""

    data: Data
    process: dict[str, Any]
    denoiser: dict[str, Any]
    survival: Survival = field(default_factory=Survival)
    optim: Optim = field(default_factory=Optim)
    train: Training = field(default_factory=Training)
    loader: Loading = field(default_factory=Loading)
    evaluate: Evaluation = field(default_factory=Evaluation)
    tracking: Tracking = field(default_factory=Tracking)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain dict, as it would stand in YAML."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def identity(self) -> dict[str, Any]:
        """The settings that shape the weights: what a checkpoint must share to be continued."""
        whole = self.as_dict()
        for name in (
            "out", "resume", "compile", "trace", "accumulate", "eval_cells", "checkpoint_cells", "checkpoint_minutes",
            "keep", "minutes",
        ):  # fmt: skip
            whole["train"].pop(name)
        return {k: whole[k] for k in ("process", "denoiser", "survival", "optim", "train")} | {
            "data": {k: whole["data"][k] for k in ("genes", "labels")},
            "loader": {k: whole["loader"][k] for k in ("window", "strata", "weights")},
        }

    def comparable(self, judge: str) -> str:
        """What validation scores ``judge`` on the same data must share to be compared.

        A deviance is one of the same genes and labels (validation tells them, and they were made from the counts); a
        loss means the same only under the same law and mixture.
        """
        law = {k: self.identity()[k] for k in ("process", "survival")} if judge == "val/loss" else {}
        labels = "".join(f"/{label}" for label in sorted(self.data.labels))
        digest = hashlib.sha256(json.dumps(law, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.data.genes}{labels}/{judge}/{digest}"

    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the resolved config."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (``None``: defaults), apply ``key.sub=value`` overrides and validate.

    Raises
    ------
    ValueError
        Unreadable file, unknown key (the nearest one is told), wrong type or literal, an override without ``=``.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(Path(path).read_text()) or {}
        except FileNotFoundError:
            raise ValueError(f"config file {path} does not exist") from None
        except yaml.YAMLError as error:
            raise ValueError(f"config file {path} is no valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"config file {path} must hold a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} must read key=value, for example optim.lr=1e-4")
        node = raw
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {override!r}: {parent!r} is a value, not a section")
        node[last] = _scalar(value)
    return parse(raw, where=str(path) if path else "config")


def parse(raw: Mapping[str, Any], *, where: str = "config") -> Config:
    """Validate a nested mapping into a :class:`Config`, the components' options included."""
    _check_keys(Config, raw, where)
    raw = dict(raw)
    parts: tuple[tuple[str, type, str, int], ...] = (
        ("process", Process, "counts", 0),
        ("denoiser", Denoiser, "mlp", 2),
    )
    for section, base, kind, given in parts:
        options = raw.get(section, {})
        if isinstance(options, Mapping):
            raw[section] = complete(base, {"kind": kind, **options}, given=given)
    train = raw.get("train")
    if isinstance(train, Mapping) and train.get("batch") == "auto":
        raw["train"] = {**train, "batch": 0}
    try:
        config = TypeAdapter(Config).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        value, message = first["input"], first["msg"]
        if first["type"] == "literal_error":
            allowed = [w.strip("' ") for w in first["ctx"]["expected"].replace(" or ", ",").split(",")]
            message = message + nearest(str(value), allowed)
        if first["type"] == "missing":
            raise ValueError(f"{where}: {place} is missing") from None
        raise ValueError(f"{where}: {place}={value!r}: {message}") from None
    build(Process, config.process)
    return config


def _check_keys(cls: type, raw: Mapping[str, Any], where: str) -> None:
    hints = typing.get_type_hints(cls)
    for key, value in raw.items():
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), hints)}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            _check_keys(typing.cast(type, hints[key]), value, f"{where}: {key}")


def _scalar(text: str) -> Any:
    """YAML's reading of a value, with ``1e-4`` taken as a number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
