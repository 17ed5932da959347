"""What a grid is: data sets, protocols, rows, seeds; read from YAML, anything unknown refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from distdiff import configtext
from distdiff.baselines import Baseline
from distdiff.component import build, complete, nearest, resolve
from distdiff.config import section, shipped
from distdiff.configtext import shown
from distdiff.data.splat import SETS
from distdiff.grid import encoder, sweep

Answer = Literal["mean", "1 draw", "draws"]
Score = Literal["cells", "open_problems", "rare", "frechet", "mmd", "clustering", "probe", "de"]


class CannotError(ValueError):
    """A row that has no answer under a protocol, whatever the data; it is marked with this reason.

    Examples
    --------
    >>> from distdiff.grid.spec import CannotError
    >>> str(CannotError("ridge fills entries and draws no cells"))
    'ridge fills entries and draws no cells'
    """


@dataclass(frozen=True)
class DataSet:
    """A data set of the grid: a store, a simulated set whose counts before dropout are known, or another that is made.

    Parameters
    ----------
    store
        Folder or URL of a store; its test cells are scored, so its split (by cell, by donor) is the grid's.
    splat
        Or a set of `distdiff.data.splat.SETS`, made in the folder of the grid.
    made
        Or ``toy`` (`distdiff.data.toy`: ten negative binomials) or ``digits`` (scikit-learn's, label ``label``), made
        in the folder of the grid.
    seed
        Of the simulation, and of the split of a set that is made.
    cell_type
        Label of the cell types: of rows with ``key: cell_type``, of protocol ``paper`` and of scores by type.

    Examples
    --------
    >>> from distdiff.grid.spec import DataSet
    >>> DataSet(store="atlas.zarr", cell_type="cell_type").splat
    ''
    """

    store: str = ""
    splat: str = ""
    made: Literal["", "toy", "digits"] = ""
    seed: int = 0
    cell_type: str | None = None

    def __post_init__(self) -> None:
        if [bool(self.store), bool(self.splat), bool(self.made)].count(True) != 1:
            raise ValueError(
                f"give either store, splat or made, got store={self.store!r}, splat={self.splat!r}, made={self.made!r}"
            )
        if self.splat and self.splat not in SETS:
            raise ValueError(f"unknown splat {self.splat!r}{nearest(self.splat, SETS)}")


@dataclass(frozen=True)
class Protocol:
    """What is hidden and scored, as in `distdiff.evaluation.evaluate`; of simulated sets what dropout took is filled.

    ``generate`` hides nothing: rows draw cells, which are compared with the test cells (`distdiff.grid.generate`). Of
    ``molecules`` a share ``rate`` is held out from every cell (:mod:`distdiff.grid.molecules`).

    Examples
    --------
    >>> from distdiff.grid.spec import Protocol
    >>> Protocol("genes", rate=0.1, fold=3).name, Protocol("mcar", targets="nonzero").name
    ('genes 10%', 'mcar 50%, nonzero')
    """

    protocol: Literal["mcar", "mar", "mnar_low", "mnar_high", "genes", "paper", "dropout", "generate", "molecules"]
    rate: float = 0.5
    targets: Literal["all", "nonzero"] = "all"
    fold: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, got {self.rate}")
        if self.protocol == "molecules" and self.targets != "all":
            raise ValueError("protocol molecules scores every entry; leave targets out")

    @property
    def name(self) -> str:
        """How tables call it; folds of genes share a name and are averaged."""
        rate = "" if self.protocol in ("dropout", "generate") else f" {self.rate:.0%}"
        return f"{self.protocol}{rate}" + (", nonzero" if self.targets == "nonzero" else "")


@dataclass(frozen=True)
class Ours:
    """A row of distdiff's own models: one that is trained, or one to train once for each data set.

    Parameters
    ----------
    model
        Folder of a trained model, or ``models:/NAME@champion``.
    train
        Or the config to train it by (a name such as ``quick``, or a file), in the folder of the grid.
    settings
        Of the training, as ``key=value``; ``data.labels=[cell_type]`` names the data set's label of types.
    labels
        Tell the model the labels of the cells, too (the row peeks). Generated cells get them in any case.
    method, steps, readout
        How it imputes; ``steps: 0`` and ``readout: ""`` are the defaults of the method. Cells are generated in
        ``steps`` steps, too.
    guidance
        Weight of the labels; other than 1 it needs ``labels: true`` to impute.
    attrition
        Eta of the rescaled rule (docs/MATHS.md 4.4), of RePaint and of generated cells.
    rounding
        How the expected births of a plain step become molecules (``random``, ``nearest``); ``""``: as trained.
    spacing, depth
        Where the steps lie, and ``free`` for generated cells with the molecules that the walk gives; ``""``: the
        defaults of the method.

    Examples
    --------
    >>> from distdiff.grid.spec import Ours
    >>> Ours(train="quick", settings=("train.cells=2560",)).method
    'conditional'
    """

    model: str = ""
    train: str = ""
    settings: tuple[str, ...] = ()
    labels: bool = False
    method: Literal["conditional", "repaint"] = "conditional"
    steps: int = 0
    readout: str = ""
    guidance: float = 1.0
    attrition: float = 0.0
    rounding: str = ""
    spacing: str = ""
    depth: Literal["", "free"] = ""

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.train):
            raise ValueError(f"give either model or train, got model={self.model!r} and train={self.train!r}")
        if not 0 <= self.attrition <= 1:
            raise ValueError(f"attrition must lie between 0 and 1, got {self.attrition}")


@dataclass(frozen=True)
class Peer:
    """A row of generated cells that no network of ours draws, one cell for each test cell and with its type.

    Parameters
    ----------
    generator
        ``resampled``: training cells again, the ceiling. ``marginals``: each gene from another training cell of the
        type. ``nb``, ``poisson``: each gene by itself around the type's mean. ``scvi``: scVI's decoder at latents of
        its prior.

    Examples
    --------
    >>> from distdiff.grid.spec import Peer
    >>> Peer("nb").name
    "NB of the label's mean"
    """

    generator: Literal["resampled", "marginals", "nb", "poisson", "scvi"]

    @property
    def name(self) -> str:
        """How tables call it."""
        return {
            "resampled": "training cells again", "marginals": "genes of different cells",
            "nb": "NB of the label's mean", "poisson": "Poisson of the label's mean", "scvi": "scVI, prior",
        }[self.generator]  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of the grid: its name, its answers, and a model, a generator or the options of a baseline.

    ``swept``: of a row of a sweep, the row's name without it, the key and its value. ``ours``: whether sentences and
    figures tell it from the peers; a model of the grid that stands for another method is none.

    Examples
    --------
    >>> from distdiff.grid.spec import Line
    >>> Line("ridge", ("mean",), {"kind": "ridge"}).options["kind"]
    'ridge'
    """

    name: str
    answers: tuple[Answer, ...]
    options: dict[str, Any] | Ours | Peer
    swept: tuple[str, str, str | float] | None = None
    ours: bool = False


@dataclass(frozen=True)
class Settings:
    """Keys of a grid's YAML that are single values.

    Parameters
    ----------
    seeds
        Of masks, draws, bootstraps, and of rows with a seed of their own.
    cells
        Most test cells of a data set.
    draws
        Of an ensemble.
    answers
        What is scored of a row: its ``mean``, ``1 draw``, an ensemble of ``draws``; a row may have its own.
    nb
        Give every baseline that is no control a second row: a negative binomial around the same mean.
    minutes
        CPU minutes that each row that is a network may train, unless it has its own ``minutes``; 0: no limit.
    scores
        Beyond those of `distdiff.report.COLUMNS`, of means alone: ``cells`` (R2, cosine, RMSE averaged over cells),
        ``open_problems``, ``rare`` (deviance in types of at most 30 training cells), ``frechet`` (log scFID by PCA of
        training cells), ``mmd`` (log squared MMD of counts over five bandwidths), ``clustering`` (Leiden against
        types), ``probe`` (types by XGBoost), ``de`` (genes that tell a type, by Wilcoxon: recovered, false).
    encoder
        Folder of an SCVI model that scvi-tools saved, which ``frechet`` encodes cells with in place of the PCA.
    resamples
        Bootstraps over cells, for scores of entries and of distributions.
    experiment
        MLflow experiment that the table is logged to, in one run for each folder, which later calls update (the step of
        its metrics is the number of cells of the grid that are done); none: it is not logged.

    Examples
    --------
    >>> from distdiff.grid.spec import Settings
    >>> Settings().resamples
    (200, 40)
    """

    seeds: tuple[int, ...] = (0,)
    cells: int = 2000
    draws: int = 5
    answers: tuple[Answer, ...] = ("mean", "draws")
    nb: bool = False
    minutes: float = 0.0
    scores: tuple[Score, ...] = ()
    encoder: str = ""
    resamples: tuple[int, int] = (200, 40)
    experiment: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or not self.answers or self.cells < 2 or self.draws < 2 or min(self.resamples) < 2:
            raise ValueError(
                f"seeds and answers must not be empty, cells, draws and resamples at least 2; got seeds={self.seeds}, "
                f"answers={self.answers}, cells={self.cells}, draws={self.draws}, resamples={self.resamples}"
            )
        if not 0 <= self.minutes < 1e6:
            raise ValueError(f"minutes must be a number of minutes, or 0 for no limit, got {self.minutes}")
        if self.encoder and "frechet" not in self.scores:
            raise ValueError(f"encoder={self.encoder!r} is of the score frechet; add it to scores, or leave it out")


@dataclass(frozen=True)
class Grid:
    """A whole grid, as :func:`read` returns it.

    Examples
    --------
    >>> from distdiff.grid.spec import DataSet, Grid, Line, Protocol, Settings
    >>> lines = (Line("ridge", ("mean",), {"kind": "ridge"}),)
    >>> Grid({"a": DataSet("a.zarr")}, (Protocol("mcar"),), lines, Settings()).data["a"].store
    'a.zarr'
    """

    data: dict[str, DataSet]
    protocols: tuple[Protocol, ...]
    rows: tuple[Line, ...]
    settings: Settings


def read(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), data: Sequence[str] = ()) -> Grid:
    """Read a grid from YAML (a file, or the name of one that ships with distdiff in ``configs/eval``) or a mapping.

    Parameters
    ----------
    overrides
        ``key=value`` for keys of the file, such as ``cells=500`` or ``cell_type=louvain`` (of every data set).
    data
        Stores, in place of the file's data.

    Raises
    ------
    ValueError
        Unreadable file, unknown key (the nearest one is named), wrong value, nothing to compare.

    Examples
    --------
    >>> from distdiff.grid.spec import read
    >>> grid = read({"rows": [{"kind": "zero"}], "protocols": [{"protocol": "mcar"}]}, data=["atlas.zarr"])
    >>> grid.data["atlas"].store, grid.rows[0].name
    ('atlas.zarr', 'none (zero)')
    """
    raw, where = ({**config}, "grid") if isinstance(config, Mapping) else (_file(Path(config)), str(config))
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"override {shown(word)} must read key=value, for example cells=500")
        raw[key] = configtext.parsed(value)[0]
    try:
        return _grid(raw, data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _file(path: Path) -> dict[str, Any]:
    path = path.expanduser()
    ours = {p.stem: p for p in sorted((shipped()["default"].parent / "eval").glob("*.yaml"))}
    if path.name == str(path) and not path.suffix and not path.is_file():  # a folder is results
        if path.name not in ours:
            raise ValueError(f"grid {path.name!r} is no file and none of {', '.join(ours)}{nearest(path.name, ours)}")
        path = ours[path.name]
    try:
        raw, _ = configtext.read(path)
    except FileNotFoundError:
        raise ValueError(f"grid file {path} does not exist; distdiff ships {', '.join(ours)}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"grid file {path} must hold a mapping")
    return raw


def _grid(raw: dict[str, Any], data: Sequence[str]) -> Grid:
    own = {f.name for f in fields(Settings)}
    known = {*own, "data", "rows", "protocols", "cell_type"}
    for key in raw:
        if key not in known:
            raise ValueError(f"unknown key {shown(key)}{nearest(str(key)[:99], known)}")
    settings = section(Settings, {k: v for k, v in raw.items() if k in own}, where="settings")
    if settings.encoder:
        encoder.checked(settings.encoder)
    sets = {Path(store).stem: {"store": store} for store in data} or raw.get("data") or {}
    if len(sets) < len(data):
        raise ValueError("two stores have one name; name them in the file under data:")
    found = {str(k): section(DataSet, v, where=f"data.{k}") for k, v in sets.items()}
    if label := raw.get("cell_type"):
        found = {name: replace(data_set, cell_type=str(label)) for name, data_set in found.items()}
    protocols = [p for i, item in enumerate(raw.get("protocols") or ()) for p in _protocols(item, f"protocols[{i}]")]
    lines = [line for i, item in enumerate(raw.get("rows") or ()) for line in _swept(item, f"rows[{i}]", settings)]
    types = {"splat": "group", "digits": "label"}
    found = {
        k: replace(d, cell_type=d.cell_type or types.get("splat" if d.splat else d.made)) for k, d in found.items()
    }
    stores = [name for name, data_set in found.items() if not data_set.splat]
    if stores and any(protocol.protocol == "dropout" for protocol in protocols):
        raise ValueError(f"protocol dropout is of simulated sets (splat:), and {stores[0]} is none")
    for name, items in (("data", found), ("protocols", protocols), ("rows", lines)):
        if not items:
            raise ValueError(f"no {name}: a grid needs at least one" + (" (data=STORE)" if name == "data" else ""))
    for names in ([line.name for line in lines], protocols):
        if len(set(names)) < len(names):
            raise ValueError(f"two of {shown(names, 300)} are the same; give one a name: of its own or leave it out")
    return Grid(found, tuple(protocols), tuple(lines), settings)


def _protocols(item: Any, where: str) -> list[Protocol]:
    """One, or of ``folds: all`` one for each fold of genes; of molecules a tenth is held out unless a rate is given."""
    if isinstance(item, Mapping) and item.get("protocol") == "molecules":
        item = {"rate": 0.1, **item}
    if isinstance(item, Mapping) and "folds" in item:
        first = section(Protocol, {k: v for k, v in item.items() if k != "folds"}, where=where)
        if item["folds"] != "all" or first.protocol != "genes":
            raise ValueError(f"{where}: folds may only be all, of the protocol genes; one fold is named by fold")
        return [replace(first, fold=k) for k in range(round(1 / first.rate))]
    return [section(Protocol, item, where=where)]


def _swept(item: Any, where: str, settings: Settings) -> list[Line]:
    """The lines of a row, or of ``sweep`` those of each value."""
    if not isinstance(item, Mapping) or "sweep" not in item:
        return _lines(item, where, settings)
    names = [line.name for line in _lines({k: v for k, v in item.items() if k != "sweep"}, where, settings)]
    return [
        replace(line, name=sweep.named(name, key, value), swept=(name, key, value))
        for key, value, one in sweep.unfolded(item, where)
        for name, line in zip(names, _lines(one, where, settings), strict=True)
    ]


def _lines(item: Any, where: str, settings: Settings) -> list[Line]:
    """The row, and its negative binomial where the grid asks for one."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} must be a mapping with kind, model, train or generator, got {shown(item)}")
    about = {k: v for k, v in item.items() if k in ("name", "answers", "ours")}
    options = {k: v for k, v in item.items() if k not in about}
    answers = section(Settings, {"answers": about.get("answers", settings.answers)}, where=where).answers
    if "generator" in options:
        peer = section(Peer, options, where=where)
        return [Line(str(about.get("name", peer.name)), answers, peer)]
    if "kind" not in options:
        ours = about.get("ours", True)
        if not isinstance(ours, bool):
            raise ValueError(f"{where}: ours must be true or false, got {shown(ours)}")
        return [Line(str(about.get("name", "distdiff")), answers, section(Ours, options, where=where), ours=ours)]
    if "ours" in about:
        raise ValueError(f"{where}: ours is of rows with model or train, and this one has {shown(options)}")
    row = _built(options, where)
    name = str(about.get("name") or getattr(row, "label", "") or options["kind"])
    lines = [Line(name, ("mean",) if getattr(row, "control", False) else answers, options)]
    if settings.nb and row is not None and not row.control and options["kind"] != "with_nb":
        drawn: tuple[Answer, ...] = tuple(a for a in answers if a != "mean")
        if drawn:  # its mean is that of the row
            lines.append(Line(f"{name} + NB", drawn, {"kind": "with_nb", "of": options}))
    return lines


def _built(options: Mapping[str, Any], where: str) -> Any:
    """The row, so that a wrong option is said before anything runs; none where its library is absent."""
    try:
        return build(Baseline, options)
    except ImportError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def of_data(options: Ours, data: DataSet) -> Ours:
    """A row of ours with ``data.labels=[cell_type]`` as the data set's label of types.

    Examples
    --------
    >>> from distdiff.grid.spec import DataSet, Ours, of_data
    >>> row = Ours(train="quick", settings=("data.labels=[cell_type]", "train.cells=2560"))
    >>> of_data(row, DataSet("a.zarr", cell_type="louvain")).settings
    ('data.labels=[louvain]', 'train.cells=2560')
    """
    types = f"data.labels=[{data.cell_type or 'cell_type'}]"
    return replace(options, settings=tuple(types if s == "data.labels=[cell_type]" else s for s in options.settings))


def fitting(
    options: Mapping[str, Any], data: DataSet, protocol: Protocol, seed: int, minutes: float = 0.0
) -> dict[str, Any]:
    """Options of a row for one cell of the grid: its seed, the share hidden while it is tuned, the label of types.

    ``minutes`` of training are those of :class:`Settings`.

    Examples
    --------
    >>> from distdiff.grid.spec import DataSet, Protocol, fitting
    >>> fitting({"kind": "type_mean"}, DataSet("a.zarr", cell_type="louvain"), Protocol("mcar"), seed=0)
    {'kind': 'type_mean', 'key': 'louvain'}
    >>> fitting({"kind": "knn"}, DataSet("a.zarr"), Protocol("mcar", rate=0.2), seed=3)
    {'kind': 'knn', 'hide': 0.2, 'seed': 3}
    """
    takes = inspect.signature(resolve(Baseline, options["kind"])).parameters
    found = dict(options)
    given = {"hide": protocol.rate, "seed": seed} | ({"minutes": minutes} if minutes else {})
    for name, value in given.items():
        if name in takes:
            found.setdefault(name, value)
    if data.cell_type and complete(Baseline, options).get("key") == "cell_type":
        found["key"] = data.cell_type
    if isinstance(found.get("of"), Mapping):
        found["of"] = fitting(found["of"], data, protocol, seed, minutes)
    return found
