"""One YAML file is one experiment. Validated once, here: unknown keys and wrong literals are refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from distdiff import configtext, received
from distdiff.component import build, complete, nearest
from distdiff.configtext import shown
from distdiff.data.feed.loader import Loading
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.survival import Survival
from distdiff.training.optim import Optim
from distdiff.training.settings import AUTO, Training

T = TypeVar("T")

MOST_DRAWS, MOST_STEPS = 1_000, 10_000
"""Draws of a cell and steps of a walk in the evaluation, at most: more would keep a finished run waiting for days."""


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Parameters
    ----------
    store
        Folder that ``distdiff shard`` wrote, or its URL.
    genes
        All genes of the store, or the panel that it was built with.
    labels
        Covariates that the model is conditioned on: labels of the store.
    """

    store: str
    genes: Literal["all", "panel"] = "all"
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.store:
            raise ValueError("data.store must be the folder or URL of a store, got nothing")
        if len(set(self.labels)) < len(self.labels) or "" in self.labels:
            raise ValueError(f"data.labels must name each label once, got {list(self.labels)}")


@dataclass(frozen=True)
class Evaluation:
    """The table at the end of training.

    Parameters
    ----------
    enabled
        Whether test cells are scored after training.
    rate
        Share of the entries of a test cell that are hidden.
    protocol
        ``mcar``: zeros are scored too; ``mar``, ``mnar_low``, ``mnar_high``, ``genes``: hidden in blocks, by value, or
        whole genes; ``paper``: zeros that may be dropout are neither seen nor scored.
    draws
        Draws of an ensemble, at least 2.
    cells
        Test cells scored, at most.
    cell_type
        Label of the cell-type rows; none: the rows are left out.
    repaint_steps
        Steps of the RePaint row; 0 leaves it out.
    generated
        Cells to generate of each value of the first label and to compare with held-out cells; 0: none.
    """

    enabled: bool = True
    rate: float = 0.5
    protocol: Literal["mcar", "mar", "mnar_low", "mnar_high", "genes", "paper"] = "mcar"
    draws: int = 5
    cells: int = 2000
    cell_type: str | None = None
    repaint_steps: int = 100
    generated: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"evaluate.rate must lie between 0 and 1, got {self.rate}")
        if not 2 <= self.draws <= MOST_DRAWS:
            raise ValueError(
                f"evaluate.draws must be at least 2 (CRPS needs an ensemble), at most {MOST_DRAWS:,}, got {self.draws}"
            )
        if self.cells < 1 or not 0 <= self.repaint_steps <= MOST_STEPS:
            raise ValueError(
                f"evaluate.cells must be at least 1 and evaluate.repaint_steps at least 0, at most {MOST_STEPS:,}, got "
                f"{self.cells} and {self.repaint_steps}"
            )
        if not (self.generated == 0 or 2 <= self.generated <= MOST_STEPS):
            raise ValueError(f"evaluate.generated must be 0, or 2 to {MOST_STEPS:,} cells, got {self.generated}")
        if self.protocol == "paper" and not self.cell_type:
            raise ValueError("protocol 'paper' needs the label of the cell groups (evaluate.cell_type)")


REFUSED = "/:@'\"`"
"""Characters that MLflow's registry does not take in a model's name."""


@dataclass(frozen=True)
class Tracking:
    """MLflow's names. Its server or folder is MLFLOW_TRACKING_URI, else ./mlflow.db (SQLite).

    Parameters
    ----------
    enabled
        Whether anything is logged and registered.
    experiment
        MLflow experiment that the runs belong to; by default MLFLOW_EXPERIMENT_NAME, else distdiff.
    model
        Name in MLflow's registry; auto: ``distdiff-`` and the store's, so that champions of other data do not mix.
    """

    enabled: bool = True
    experiment: str = field(default_factory=lambda: os.environ.get("MLFLOW_EXPERIMENT_NAME") or "distdiff")
    model: str = "auto"

    def __post_init__(self) -> None:
        for name, refused in (("experiment", ""), ("model", REFUSED)):
            value = getattr(self, name)
            if not value.strip() or not value.isprintable() or set(value) & set(refused):
                but = f" and none of {' '.join(refused)}" if refused else ""
                raise ValueError(f"tracking.{name} must be a name of printable characters{but}, got {value!r}")

    def named(self, data: str) -> Tracking:
        """The same with the registry's name for a model of ``data``, where it is ``auto``.

        Examples
        --------
        >>> Tracking().named("mine.zarr").model, Tracking(model="pbmc").named("mine.zarr").model
        ('distdiff-mine', 'pbmc')
        """
        if self.model != "auto":
            return self
        name = "".join(c if c.isprintable() and c not in REFUSED else "-" for c in data.removesuffix(".zarr"))
        return dataclasses.replace(self, model=f"distdiff-{name}")


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
    overrides: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """The ``key=value`` words that :func:`load` applied; no key of the YAML file."""

    def as_dict(self) -> dict[str, Any]:
        """Nested plain dict, as it would stand in YAML."""
        tree = json.loads(json.dumps(dataclasses.asdict(self)))
        del tree["overrides"]
        return tree

    def run_name(self) -> str:
        """Name of the MLflow run: the model's name and the overrides, so that the runs of a sweep differ.

        Examples
        --------
        >>> load(None, ["data.store=a.zarr", "tracking.model=pbmc", "optim.lr=1e-4"]).run_name()
        'pbmc data.store=a.zarr optim.lr=1e-4'
        """
        shown = [word for word in self.overrides if not word.startswith(("tracking.", "train.out="))]
        name = " ".join((self.tracking.model, *shown))
        return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 13]} {self.digest()}"

    def identity(self) -> dict[str, Any]:
        """The settings that shape the weights: what a checkpoint must share to be continued."""
        whole = self.as_dict()
        for name in (
            "out", "resume", "compile", "graph", "trace", "accumulate", "eval_cells", "checkpoint_cells",
            "checkpoint_minutes", "keep", "minutes", "manifest", "blend", *CHANGEABLE,
        ):  # fmt: skip
            whole["train"].pop(name)
        if whole["train"]["noise"] == "streams":  # as it was before there was a choice
            whole["train"].pop("noise")
        if whole["survival"]["levels"] != "logit":
            whole["survival"].pop("levels")
        return {k: whole[k] for k in ("process", "denoiser", "survival", "optim", "train")} | {
            "data": {k: whole["data"][k] for k in ("genes", "labels")},
            "loader": {k: whole["loader"][k] for k in ("window", "strata", "weights")},
        }

    def comparable(self, judge: str) -> str:
        """What validation scores ``judge`` on the same data must share to be compared.

        A deviance is one of the same genes and labels (validation knows them, and they were made from the counts); a
        loss means the same only under the same law and mixture.
        """
        law = {k: self.identity()[k] for k in ("process", "survival")} if judge == "val/loss" else {}
        labels = "".join(f"/{label}" for label in sorted(self.data.labels))
        digest = hashlib.sha256(json.dumps(law, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.data.genes}{labels}/{judge}/{digest}"

    def digest(self) -> str:
        """First 12 hex digits of the SHA-256 of the resolved config."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


def shipped() -> dict[str, Path]:
    """Configs that come with distdiff, by name: ``default``, ``dev``, ``attention``, ``published`` ..."""
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):  # of a wheel, of a checkout
        if found := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return found
    return {}


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (``None``: defaults), apply ``key.sub=value`` overrides and validate.

    A bare name such as ``default`` is one of the `shipped` configs, unless a file is called so.

    Raises
    ------
    ValueError
        Unreadable file, unknown key (the nearest one is named), wrong type or literal, an override without ``=``.
    """
    raw: Any = {}
    text: Any = {}
    if path is not None:
        path = Path(path).expanduser()
        if path.name == str(path) and not path.suffix and not path.is_file():  # a folder is results
            if path.name not in (known := shipped()):
                raise ValueError(
                    f"config {path.name!r} is no file and none of {', '.join(known)}{nearest(path.name, known)}"
                )
            path = known[path.name]
        try:
            raw, text = configtext.read(path)
        except FileNotFoundError:
            raise ValueError(f"config file {path} does not exist") from None
        if not isinstance(raw, dict):
            raise ValueError(f"config file {path} must hold a mapping of sections, got {received.kind(raw)}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"override {shown(override)} must read key=value, for example data.store=mine.zarr")
        try:
            read, words = configtext.parsed(value)
        except ValueError:
            read = words = value
        for tree, leaf in ((raw, _number(read)), (text, value if words is None else words)):
            node = tree
            *parents, last = key.split(".")
            for parent in parents:
                if node.get(parent) is None or (tree is text and not isinstance(node[parent], dict)):
                    node[parent] = {}  # no such section, or an empty one
                node = node[parent]
                if not isinstance(node, dict):
                    raise ValueError(f"override {shown(override)}: {parent!r} is a value, not a section")
            node[last] = leaf
    config = parse(_as_text(typing.get_type_hints(Config), raw, text), where=str(path) if path else "config")
    return dataclasses.replace(config, overrides=tuple(overrides))


def parse(raw: Mapping[str, Any], *, where: str = "config") -> Config:
    """Validate a nested mapping into a :class:`Config`, the components' options included.

    Raises
    ------
    ValueError
        As :func:`load`; the sentence names ``where``, key and value.
    """
    try:
        return _parse({key: {} if value is None else value for key, value in raw.items()})
    except ValueError as error:
        message = str(error)
        raise ValueError(f"{where}: {message if len(message) <= LONGEST else f'{message[:LONGEST]}...'}") from None


def _parse(raw: Mapping[str, Any]) -> Config:
    if "overrides" in raw:
        raise ValueError("unknown key 'overrides'; they are given as key=value behind the config file")
    _check_keys(Config, raw)
    raw = _at_home(raw)
    for section, base, kind, given in SECTIONS:
        raw[section] = _checked(base, complete(base, {"kind": kind, **raw.get(section, {})}, given=given), section)
    train = raw.get("train", {})
    if automatic := {name: 0 for name in AUTO if train.get(name) == "auto"}:
        raw["train"] = {**train, **automatic}
    config: Config = _typed(Config, raw)
    try:
        build(Process, config.process)
    except (TypeError, OverflowError) as error:  # of a component from outside the tree, or an option of any type
        raise ValueError(f"process {shown(config.process)}: {error}") from None
    return config


def section(cls: type[T], raw: Any, *, where: str) -> T:
    """A mapping as the frozen dataclass ``cls``, checked as the sections of a config are.

    Raises
    ------
    ValueError
        No mapping, an unknown key (the nearest one is named), a wrong type or literal.

    Examples
    --------
    >>> from distdiff.config import Evaluation, section
    >>> section(Evaluation, {"rate": 0.2}, where="evaluate").rate
    0.2
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping, got {shown(raw)}")
    _check_keys(cls, raw, f"{where}: ")
    try:
        return _typed(cls, raw)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _typed(cls: type[T], raw: Any) -> T:
    """``raw`` with the types of ``cls``; what is wrong is said in one sentence."""
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        first, *further = error.errors()
        # a key of several types has an error for each, whose place is section, key, type
        of_types = len(first["loc"]) == 3 and isinstance(first["loc"][-1], str)
        alike = [e for e in further if of_types and len(e["loc"]) == 3 and e["loc"][:-1] == first["loc"][:-1]]
        location = ".".join(str(part) for part in (first["loc"][:-1] if alike else first["loc"]))
        value, message = first["input"], "; or ".join(e["msg"] for e in (first, *alike))
        if first["type"] == "literal_error":
            allowed = [w.strip("' ") for w in first["ctx"]["expected"].replace(" or ", ",").split(",")]
            message = message + nearest(str(value), allowed)
        if first["type"] == "value_error":  # of the section's own checks, which name the key
            raise ValueError(first["ctx"]["error"]) from None
        if first["type"] == "missing":
            raise ValueError(f"{location} is missing") from None
        raise ValueError(f"{location}={shown(value)}: {message}") from None


LONGEST = 600
"""Characters of what is wrong with a config, at most: a value may be a page of text."""


def _check_keys(cls: type, raw: Mapping[str, Any], where: str = "") -> None:
    """Unknown keys, sections that are values, and true or false where a number is wanted."""
    hints = typing.get_type_hints(cls)
    for key, value in raw.items():
        if key not in hints:
            raise ValueError(f"{where}unknown key {shown(key)}{nearest(str(key)[:99], hints)}")
        hint = hints[key]
        section = cls is Config
        if section and not isinstance(value, Mapping):
            raise ValueError(f"{key} must be a section with keys below it, got {shown(value)}")
        if dataclasses.is_dataclass(hint):
            _check_keys(typing.cast(type, hint), value, f"{key}: ")
        elif hint in NUMBERS and any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{where.replace(': ', '.')}{key} must be a number, got {shown(value)}")


NUMBERS = (int, float, tuple[float, float])
"""Types of values in which ``yes`` is no 1."""


LONGEST_NAME = 250
"""Characters of an MLflow run's name, at most."""

PATHS = (("data", "store"), ("train", "out"), ("train", "start"), ("train", "resume"))
"""Values in which ``~`` is the home folder."""

CHANGEABLE = ("cells", "patience")
"""Of ``train``: how long to go on. A run that is continued may change it; the learning rate follows the new length."""

SECTIONS: tuple[tuple[str, type, str, int], ...] = (("process", Process, "counts", 0), ("denoiser", Denoiser, "mlp", 2))
"""Components of a config: section, base, kind by default, and constructor arguments that are no options."""


def _at_home(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with ``~`` expanded in paths."""
    raw = dict(raw)
    for section, key in PATHS:
        part = raw.get(section)
        if isinstance(part, Mapping) and isinstance(part.get(key), str) and part[key].startswith("~"):
            raw[section] = {**part, key: os.path.expanduser(part[key])}
    return raw


def _as_text(hints: Mapping[str, Any], read: Any, text: Any) -> Any:
    """``read``, as YAML reads it, with the very words where text is wanted: ``no``, ``12345``; names by commas."""
    if not (isinstance(read, Mapping) and isinstance(text, Mapping)):
        return read
    found = dict(read)
    for key, value in read.items():
        hint, words = hints.get(key), text.get(key)
        if dataclasses.is_dataclass(hint):
            found[key] = _as_text(typing.get_type_hints(hint), value, words)
        elif isinstance(value, Mapping):
            section = next((s for s in SECTIONS if s[0] == key), None)
            found[key] = _as_text(_option_types(section, value), value, words) if section else value
        elif hint == tuple[str, ...]:
            if isinstance(words, str):
                found[key] = [word.strip() for word in words.split(",") if word.strip()]
            elif isinstance(words, list):
                found[key] = words
        elif isinstance(words, str) and _is_text(hint) and (value is not None or hint is str):
            found[key] = words
        elif hint in (int, float):
            found[key] = _number(value)
    return found


def _is_text(hint: Any) -> bool:
    """Whether nothing but text is wanted (or none)."""
    if typing.get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in typing.get_args(hint))
    return hint in (str, str | None)


def _option_types(section: tuple[str, type, str, int], options: Mapping[str, Any]) -> dict[str, Any]:
    """Type of the default of each option of a component; none where there is no such component."""
    _, base, kind, given = section
    try:
        defaults = complete(base, {"kind": options.get("kind", kind)}, given=given)
    except (ValueError, TypeError):
        return {}
    return {name: type(value) for name, value in defaults.items()}


RANGES = {"dropout": (0.0, 0.99), "scale": (1e-6, 1e6)}
"""Options of components beyond which nothing is learned: the share of what is dropped, molecules to a unit."""


def _checked(base: type, options: dict[str, Any], section: str) -> dict[str, Any]:
    """Options of a component, numbers as its defaults are: whole, finite, at least 1 (0 where that is the default)."""
    given = next(g for s, _, _, g in SECTIONS if s == section)
    defaults = complete(base, {"kind": options["kind"]}, given=given)
    found = dict(options)
    for name, value in options.items():
        default = defaults.get(name)
        wrong = _fault(default, value, free=name == "schedule")
        if not wrong and name in RANGES and not RANGES[name][0] <= value <= RANGES[name][1]:
            wrong = "between {:g} and {:g}".format(*RANGES[name])
        if wrong:
            raise ValueError(f"{section}.{name} must be {wrong}, got {shown(value)}")
        if isinstance(default, int) and not isinstance(default, bool):
            found[name] = int(value)
    return found


def _fault(default: Any, value: Any, *, free: bool) -> str:
    """What an option must be whose value is not of the kind of its default; empty where it is (or may be anything)."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "yes or no"
    if isinstance(default, int):
        least = min(1, default)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return "" if whole and not isinstance(value, bool) and value >= least else f"a whole number >= {least}"
    if isinstance(default, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if number and math.isfinite(value) else "a number"
    if isinstance(default, tuple) and default and all(type(v) is int for v in default):
        whole = isinstance(value, (list, tuple)) and all(type(v) is int and v >= 0 for v in value)
        return "" if whole else "a list of whole numbers"
    if isinstance(default, str) and free:
        return "" if isinstance(value, (str, list, tuple, Mapping)) else "a name, a list of numbers or a mapping"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "text"
    return ""


def _number(value: Any) -> Any:
    """Text that is a number, to Python though not to YAML, as that number."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value
