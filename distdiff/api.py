"""The Python interface: shard, train and evaluate from AnnData objects, files or stores, as the command line does."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdiff import config as configs
from distdiff import experiment, heldout, tracking
from distdiff.component import complete, modules, name_list, nearest
from distdiff.data.ingest.memory import written
from distdiff.data.ingest.shard import shard as shard_files
from distdiff.data.ingest.source import Source
from distdiff.data.store.store import CountStore
from distdiff.files import is_url
from distdiff.model import Model

if TYPE_CHECKING:
    from anndata import AnnData

    from distdiff.data.store.manifest import Manifest
    from distdiff.realism import Realism
    from distdiff.report import Report

    Data: typing.TypeAlias = "AnnData | str | Path | Sequence[AnnData | str | Path]"


def train(
    data: Data | CountStore,
    *,
    layer: str | None = None,
    genes: str | Sequence[str] = "all",
    labels: Sequence[str] = (),
    out: str | Path | None = None,
    store: str | Path | None = None,
    config: str | Path | Mapping[str, Any] = "default",
    split_by: str | None = None,
    trust: Sequence[str] = (),
    progress: bool = True,
    **settings: Any,
) -> Model:
    """Train a model on counts and return it.

    Parameters
    ----------
    data
        Raw counts: an AnnData (in memory, backed or lazy), an h5ad file, an AnnData zarr folder, 10x output, several of
        these, or a store that :func:`shard` built. What is no store is sharded first.
    layer
        Where the raw counts are: None is ``X``, ``"raw"`` is ``raw.X``, else a layer.
    genes
        ``"all"``, ``"hvg:N"``, ``"top:N"``, a text file with one gene a line, or the names. Of a store: ``"all"``
        or ``"panel"``.
    labels
        obs columns that the model is conditioned on.
    out
        Folder of the run: checkpoints, the best model (``out/model``), curves and tables, the store unless ``store``
        names another place; the model of ``runs/mine`` is registered as ``distdiff-mine``. The same call goes on with a
        run that was interrupted. None: a temporary folder, which is removed once the model is in memory; nothing can
        be resumed then.
    store
        Where to put the store; nothing may be there yet. None: ``out/atlas.zarr``, which every call builds anew.
    config
        A config that ships with distdiff (``"default"``, ``"quick"``, ``"dev"``, ``"attention"``, ``"published"``), a
        YAML file, or a nested mapping with its keys.
    split_by
        obs column, such as the donor, whose values stay whole in training, validation or test cells.
    trust
        Packages whose code may run for components ``module:Class`` (see :func:`distdiff.load`).
    progress
        Show bars, and lines on what is done; False: only warnings are logged.
    **settings
        Any key of the config: ``cells=300_000``, ``lr=1e-3``, ``width=512``; a section as a mapping:
        ``denoiser={"kind": "transformer"}``, ``evaluate={"enabled": False}``. A key of several sections is the one of
        ``train``, else it must be given with its section.

    Returns
    -------
    Model
        The weights with the best validation score; its ``info`` holds the config and the scores.

    Raises
    ------
    ValueError
        Data that are no counts, an unknown key or value (the nearest one is named), a label that is no column.

    Examples
    --------
    >>> import anndata, numpy as np, distdiff
    >>> counts = np.random.default_rng(0).poisson(3.0, (60, 12)).astype("float32")
    >>> model = distdiff.train(
    ...     anndata.AnnData(counts), cells=64, batch=32, width=8, evaluate={"enabled": False},
    ...     tracking={"enabled": False}, progress=False,
    ... )
    >>> model.denoise(anndata.AnnData(counts)).layers["denoised"].shape
    (60, 12)
    """
    labels = name_list("labels", labels)
    raw = _raw(config)
    _merge(raw, settings)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(_temporary()) if out is None else out).expanduser()
        if isinstance(data, CountStore) or _is_store(data):
            address = data.url if isinstance(data, CountStore) else str(data)
            _refuse_for_store(address, layer=layer, genes=genes, store=store, split_by=split_by)
        else:
            address = str(Path(store).expanduser()) if store is not None else str(folder / "atlas.zarr")
            made = shard(
                data, address, layer=layer, genes=genes, labels=labels, split_by=split_by, overwrite=store is None,
                progress=progress,
            )  # fmt: skip
            genes = "all"
            if store is None:  # which has no name of its own
                tracked = raw.setdefault("tracking", {})
                if tracked.get("model", "auto") == "auto":
                    name = made.fingerprint[:8] if out is None else folder.resolve().name
                    tracked["model"] = configs.Tracking().named(name).model
        section = raw.setdefault("data", {})
        section.update({"store": address, "labels": list(labels) or list(section.get("labels", ()))})
        if isinstance(genes, str) and genes != "all":
            section["genes"] = genes
        raw.setdefault("train", {})["out"] = str(folder)
        resolved = configs.parse(raw)
        outcome = experiment.train(resolved, trust=trust, progress=progress)
        model = Model.load(outcome.model, trust=(*trust, *modules((resolved.process, resolved.denoiser))))
        if out is None:
            model.where = ""  # the folder is gone
        return model


def shard(data: Data, out: str | Path, **options: Any) -> Manifest:
    """Turn counts into a store: AnnData objects, files, or several of them.

    The options are those of :func:`distdiff.data.ingest.shard.shard`: ``layer``, ``genes``, ``labels``, ``split``,
    ``min_genes`` ... An AnnData is written beside ``out`` first, in blocks of cells, and removed afterwards; it may be
    backed or lazy.

    Examples
    --------
    >>> import anndata, numpy as np, distdiff, tempfile
    >>> counts = np.random.default_rng(0).poisson(1.0, (50, 10)).astype("float32")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manifest = distdiff.shard(anndata.AnnData(counts), f"{folder}/atlas.zarr", progress=False)
    >>> manifest.n_cells, len(manifest.genes)
    (50, 10)
    """
    out = Path(out).expanduser()
    several = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    layer = options.pop("layer", None)
    out.parent.mkdir(parents=True, exist_ok=True)
    in_memory = [item for item in several if not isinstance(item, str | Path)]
    if not in_memory:
        return shard_files([Path(item).expanduser() for item in several], out, layer=layer, **options)
    if len(in_memory) < len(several):
        raise ValueError("shard: give either AnnData objects or paths, not both; write the AnnData with write_h5ad")
    columns = {
        *name_list("labels", options.get("labels", ())),
        *(options[k] for k in ("split_by", "strata") if options.get(k)),
    }
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.counts-", dir=out.parent) as folder:
        paths = [
            written(adata, Path(folder) / f"{i}.h5ad", layer=layer, columns=sorted(columns))
            for i, adata in enumerate(in_memory)
        ]
        try:
            return shard_files(paths, out, **options)
        except ValueError as error:  # may name a file that nobody else knows
            text = str(error)
            for i, path in enumerate(paths):
                text = text.replace(str(path), f"AnnData {i}" if len(paths) > 1 else "AnnData")
            if text == str(error):
                raise
            raise ValueError(text) from error


def load(model: str | Path, *, trust: Sequence[str] = ()) -> Model:
    """Load a model from a folder or from the MLflow registry (``models:/NAME@champion``).

    Parameters
    ----------
    trust
        Packages whose code the model may run (``trust=("mypackage",)``), for models of one's own kinds
        ``mypackage.module:Class``. By default none.

    Raises
    ------
    ValueError
        No model there, a damaged one, or one that asks for code of a package that is not trusted.

    Examples
    --------
    >>> import distdiff
    >>> distdiff.load("runs/nowhere")
    Traceback (most recent call last):
    ValueError: no model folder at runs/nowhere; ...
    """
    loaded = Model.load(tracking.fetch(str(model)), trust=trust)
    loaded.where = str(model)
    return loaded


def evaluate(
    model: Model | str | Path, data: Data | CountStore, *, task: typing.Literal["impute", "generate"] = "impute",
    layer: str | None = None, rate: float = 0.5, protocol: str = "mcar", draws: int = 5,
    cells: int | None = None, cell_type: str | None = None, repaint_steps: int = 100, keep_trained: bool = False,
    steps: int = 16, guidance: float = 1.0, depth: float | str | None = None, scvi: bool = True, seed: int = 0,
    trust: Sequence[str] = (), progress: bool = True,
) -> Report | Realism:  # fmt: skip
    """Hide counts of held-out cells, let the model and the cheap estimators fill them, and score both.

    With ``task="generate"``: generate cells of every value of a label and score them against real cells.

    Parameters
    ----------
    model
        A model, its folder, or ``models:/NAME@champion``.
    data
        A store, whose test cells are scored, or counts as :func:`train` takes them, which are split anew. Score a model
        on cells that it was not trained on.
    task
        ``"impute"``, or ``"generate"``: ``cells`` (200) of each value of the label ``cell_type`` (the model's first)
        are generated and compared with validation and test cells (:func:`distdiff.realism.evaluate_generated`).
    layer
        Where the raw counts are (default ``X``); a store has none.
    rate, protocol, draws, cells, cell_type, repaint_steps
        Keys of the config's section ``evaluate``.
    keep_trained
        Score also cells that the model was trained on; else they are left out, where the model holds its filter of them
        (:mod:`distdiff.seen`).
    steps, guidance, depth
        Of ``task="generate"``, as in :meth:`Model.generate <distdiff.model.Model.generate>`.
    scvi
        Of ``task="generate"``: train scVI (minutes), where it is installed, for a row of its samples.
    seed
        Of masks and draws.
    trust
        Packages whose code the model may run (see :func:`load`).
    progress
        Show bars.

    Returns
    -------
    Report or Realism
        ``to_text()`` is the table, ``write(folder)`` its files and figures.
    """
    generating = {"steps": steps, "guidance": guidance, "depth": depth, "scvi": scvi}
    if task not in ("impute", "generate"):
        raise ValueError(f"evaluate: task={task!r}; the tasks are impute and generate")
    if task == "impute" and generating != {"steps": 16, "guidance": 1.0, "depth": None, "scvi": True}:
        raise ValueError("evaluate: steps, guidance, depth and scvi belong to task='generate'")
    found = model if isinstance(model, Model) else load(model, trust=trust)
    cells = {"impute": 2000, "generate": 200}[task] if cells is None else cells
    if task == "generate":
        label = cell_type or next(iter(found.spec.labels), None)
        with store_of(data, layer, found.spec.labels, label, progress) as opened:
            return heldout.evaluate_generated(
                found, opened, label=label, cells=cells, seed=seed, progress=progress, **generating
            )
    settings = configs.Evaluation(
        rate=rate, protocol=protocol, draws=draws, cells=cells, cell_type=cell_type,  # type: ignore[arg-type]
        repaint_steps=repaint_steps,
    )  # fmt: skip
    with store_of(data, layer, found.spec.labels, cell_type, progress) as opened:
        return heldout.evaluate_model(found, opened, settings, seed=seed, keep_trained=keep_trained, progress=progress)


@contextlib.contextmanager
def store_of(
    data: Data | CountStore, layer: str | None, known: Iterable[str], label: str | None, progress: bool
) -> Iterator[CountStore]:
    """A store, opened; other counts get a temporary one, with ``label`` and what they have of ``known``."""
    if isinstance(data, CountStore) or _is_store(data):
        if layer is not None:
            raise ValueError(f"layer={layer!r}: a store has no layers; leave layer= out")
        yield data if isinstance(data, CountStore) else CountStore.open(str(data))
        return
    with _temporary() as folder:
        labels = dict.fromkeys([*_columns(data, layer, known), *([label] if label else [])])
        shard(data, Path(folder) / "data.zarr", layer=layer, labels=list(labels), progress=progress)
        yield CountStore.open(Path(folder) / "data.zarr")


def _raw(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A config as a nested dict of its own."""
    if isinstance(config, Mapping):
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    return configs.load(config).as_dict()


def _merge(raw: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Put keyword settings where they belong.

    Raises
    ------
    ValueError
        A key that no section has, or several have.
    """
    hints = typing.get_type_hints(configs.Config)
    sections = {name: [f.name for f in dataclasses.fields(hint)] for name, hint in hints.items()
                if dataclasses.is_dataclass(hint)}  # fmt: skip
    for section, base, kind, given in configs.SECTIONS:
        chosen = {"kind": kind, **raw.get(section, {}), **(settings.get(section) or {})}["kind"]
        sections[section] = list(complete(base, {"kind": chosen}, given=given))
    for key, value in sorted(settings.items(), key=lambda item: item[0] not in sections):  # whole sections first
        if key in sections:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}={value!r}: a section of the config is given as a mapping, {key}={{...}}")
            if "kind" in value and value["kind"] != raw.get(key, {}).get("kind"):
                raw[key] = {}  # options of another kind do not apply
            raw.setdefault(key, {}).update(value)
            continue
        owners = [name for name, keys in sections.items() if key in keys]
        if "train" in owners:
            owners = ["train"]
        if not owners:
            known = sorted({k for keys in sections.values() for k in keys} | set(sections))
            raise ValueError(f"train: unknown argument {key!r}{nearest(key, known)}")
        if len(owners) > 1:
            choices = " or ".join(f"{name}={{{key!r}: ...}}" for name in owners)
            raise ValueError(f"train: {key!r} is a key of several sections of the config; write {choices}")
        raw.setdefault(owners[0], {})[key] = value


def _refuse_for_store(address: str, **given: Any) -> None:
    """What was decided when a store was built cannot be asked of it again.

    Raises
    ------
    ValueError
        A layer, genes other than ``"all"`` and ``"panel"``, another place, or another split.
    """
    if given["genes"] in ("all", "panel"):
        given.pop("genes")
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"train: {name}={value if isinstance(value, str) else '...'} was decided when the store {address} was "
                f"built, and is not looked at; leave {name}= out, or give the counts themselves (AnnData, h5ad), or "
                f"build another store with it: distdiff.shard(counts, 'other.zarr', {name}=...)"
            )


def _columns(data: Data, layer: str | None, labels: Iterable[str]) -> list[str]:
    """Those of ``labels`` that are obs columns of all of the data."""
    several = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    sources = [
        Source.open(Path(item).expanduser(), layer=layer, every=True) if isinstance(item, str | Path)
        else Source.from_anndata(item, layer=layer)
        for item in several
    ]  # fmt: skip

    def has(source: Source, label: str) -> bool:
        try:
            source.obs(label)
        except ValueError:
            return False
        return True

    return [label for label in labels if all(has(source, label) for source in sources)]


def _is_store(data: Any) -> bool:
    """Whether it is the path or URL of a store."""
    if not isinstance(data, str | Path):
        return False
    return is_url(str(data)) or (Path(data).expanduser() / "manifest.json").exists()


def _temporary() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed afterwards (a context)."""
    return tempfile.TemporaryDirectory(prefix="distdiff-", ignore_cleanup_errors=True)
