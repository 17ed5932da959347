"""One cell of a grid: a row fitted to a data set under a protocol with a seed, scored, and written as one file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distdiff import config as configs
from distdiff import experiment, files, heldout, received, tracking
from distdiff.baselines import Baseline
from distdiff.component import build
from distdiff.data.splat import published
from distdiff.data.store.store import CountStore
from distdiff.evaluation import Contestant, evaluate
from distdiff.grid import encoder, generate, made, molecules
from distdiff.grid.scores import Scored, extra, plain
from distdiff.grid.spec import CannotError, DataSet, Line, Ours, Peer, Protocol, Settings, fitting
from distdiff.model import Model
from distdiff.report import COLUMNS, Report
from distdiff.version import __version__

SPLAT_SPLIT = (0.7, 0.1, 0.2)
"""Training, validation and test cells of simulated sets."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What one file of the grid is computed from; it travels to dask workers.

    Parameters
    ----------
    data, url, fingerprint
        The data set's name, address and content.
    about
        The data set as the grid names it.
    row
        The row, with the options for this cell.
    model
        Folder of the model of a row of ours; ``trouble``: why there is none.
    fit_cpu
        CPU seconds of its training.

    Examples
    --------
    >>> from distdiff.grid.cell import Cell
    >>> from distdiff.grid.spec import DataSet, Line, Protocol, Settings
    >>> row = Line("ridge", ("mean",), {"kind": "ridge"})
    >>> cell = Cell("atlas", "atlas.zarr", "4f2a", DataSet("atlas.zarr"), Protocol("mcar"), row, 0, Settings())
    >>> cell.file.startswith("atlas-mcar-50-0-ridge-0-")
    True
    """

    data: str
    url: str
    fingerprint: str
    about: DataSet
    protocol: Protocol
    row: Line
    seed: int
    settings: Settings
    model: str = ""
    trouble: str = ""
    fit_cpu: float = 0.0

    @property
    def file(self) -> str:
        """Name of its file: what it is in words, and a digest of all that its numbers depend on."""
        kept = {k: v for k, v in dataclasses.asdict(self.settings).items() if k in ("cells", "draws", "resamples")}
        parts = [
            __version__, self.fingerprint, self.about.cell_type, dataclasses.asdict(self.protocol), self.seed, kept,
            self.settings.scores, self.row.answers,
            dataclasses.asdict(self.row.options) if dataclasses.is_dataclass(self.row.options) else self.row.options,
            received.sha256(Path(self.model) / "weights.safetensors") if self.model else "",
            *([encoder.fingerprint(self.settings.encoder)] if self.settings.encoder else []),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
        words = f"{self.data} {self.protocol.name} {self.protocol.fold} {self.row.name} {self.seed}"
        return f"{re.sub(r'[^A-Za-z0-9_]+', '-', words)[:100]}-{digest}.json"


def finished(path: Path) -> Record | None:
    """The record that a file holds, if its row ran; rows that failed or had no library are tried again.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.grid.cell import finished
    >>> finished(Path("nothing.json")) is None
    True
    """
    try:
        record = received.json_of(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("status") == "done" else None


def compute(cell: Cell, folder: str | Path) -> Record:
    """Fit, fill and score; write the file whole into ``folder``. A row that cannot run is written with its reason.

    Returns
    -------
    dict
        ``status`` (done; absent: a library is not installed; cannot: the row has no answer under this
        protocol; failed), ``reason``, what was compared, ``answers``.
    """
    record: Record = {
        "data": cell.data, **dataclasses.asdict(cell.protocol), "name": cell.protocol.name, "row": cell.row.name,
        "seed": cell.seed, "ours": cell.row.ours, "swept": cell.row.swept,
        "wanted": ["cells"] if cell.protocol.protocol == "generate" else list(cell.row.answers),
    }  # fmt: skip
    record["start_mib"] = peak_memory(restart=True)
    try:
        record |= {"status": "done", "reason": ""} | _scored(cell)
    except ImportError as error:
        record |= {"status": "absent", "reason": str(error)}
    except CannotError as error:
        record |= {"status": "cannot", "reason": str(error)}
    except Exception as error:  # whatever a row does: it is marked, and the grid goes on
        record |= {"status": "failed", "reason": _sentence(error)}
    record["peak_mib"] = peak_memory()
    with files.whole(Path(folder) / cell.file, overwrite=True) as temporary:
        temporary.write_text(json.dumps(record, indent=1))
    return record


def peak_memory(*, restart: bool = False) -> float | None:
    """Largest resident memory of this process in MiB since the last restart; ``None`` where the system is not Linux.

    Examples
    --------
    >>> from distdiff.grid.cell import peak_memory
    >>> start = peak_memory(restart=True)
    >>> start is None or peak_memory() >= 0.9 * start
    True
    """
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def _sentence(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"


def _scored(cell: Cell) -> Record:
    if cell.trouble:
        raise ValueError(cell.trouble)
    store = CountStore.open(cell.url)
    rows = scored_rows(store, cell.settings.cells, cell.data)
    if cell.about.cell_type and cell.about.cell_type not in store.manifest.labels:
        have = ", ".join(store.manifest.labels) or "none"
        raise ValueError(f"{cell.data} has no label {cell.about.cell_type!r} (cell_type); it has: {have}")
    options, capacity = cell.row.options, None
    labels: tuple[str, ...] = ()
    if cell.protocol.protocol == "generate":
        return generate.scored(
            options, store, rows, model=_model(cell, options, store, rows) if isinstance(options, Ours) else None,
            cell_type=cell.about.cell_type, seed=cell.seed, few=cell.settings.resamples[1], fit_cpu=cell.fit_cpu,
        )  # fmt: skip
    if isinstance(options, Peer):
        raise CannotError(f"{cell.row.name} draws cells, and fills none; its protocol is generate")
    if cell.protocol.protocol == "molecules":
        return _denoised(cell, options, store, rows)
    if isinstance(options, Ours):
        imputer, labels, capacity = _ours(cell, options, store, rows)
        tried = 1
    else:
        imputer = build(Baseline, options)
        tried = imputer.n_trials()
    dropout = cell.protocol.protocol == "dropout"
    report = evaluate(
        store, rows, [Contestant(cell.row.name, imputer, cell.row.answers)], rate=cell.protocol.rate,
        protocol="paper" if dropout else cell.protocol.protocol, draws=cell.settings.draws, seed=cell.seed,
        labels=labels, groups=cell.about.cell_type, targets=cell.protocol.targets, fold=cell.protocol.fold,
        resamples=cell.settings.resamples, before=before_dropout(cell.about, store, rows) if dropout else None,
        ours=cell.row.name, progress=False,
    )  # fmt: skip
    if report.mean is None or not np.isfinite(report.mean[report.targets]).all():
        raise ValueError(f"{cell.row.name} answered with numbers that are not finite; its row cannot be scored")
    row = getattr(imputer, "row", imputer)
    return {
        "answers": _answers(cell, report, store, rows),
        "setting": {k: report.setting[k] for k in ("cells", "genes", "targets", "zeros_among_targets", "data")},
        "capacity": getattr(row, "capacity", None) if capacity is None else capacity, "n_trials": tried,
    }  # fmt: skip


def _denoised(cell: Cell, options: Ours | dict[str, Any], store: CountStore, rows: np.ndarray) -> Record:
    """The record of a row under the protocol ``molecules``."""
    row: Baseline | molecules.OfModel
    if isinstance(options, Ours):
        row = molecules.OfModel(_model(cell, options, store, rows), store, rows, labels=options.labels)
    else:
        row = build(Baseline, options)
    found = molecules.scored(
        cell.row.name, row, store, rows, share=cell.protocol.rate, seed=cell.seed, resamples=cell.settings.resamples,
        cell_type=cell.about.cell_type, scores=cell.settings.scores,
    )  # fmt: skip
    for answer in found["answers"]:
        answer["fit_cpu_seconds"] += cell.fit_cpu
    return {**found, "capacity": getattr(row, "capacity", None), "n_trials": row.n_trials()}


def _answers(cell: Cell, report: Report, store: CountStore, rows: np.ndarray) -> list[Record]:
    """Metric -> value and standard error for each answer; extra scores are the mean's."""
    found = []
    for answer, row in zip(cell.row.answers, report.rows, strict=True):
        numbers = {name: (row.values[name], row.errors.get(name, math.nan)) for name in COLUMNS if name in row.errors}
        reasons: list[str] = []
        if answer == "mean":
            scored = Scored(
                report, store, rows, cell.about.cell_type, cell.seed, *cell.settings.resamples, cell.settings.encoder
            )
            more, reasons = extra(cell.settings.scores, scored)
            numbers |= more
        found.append({
            "answer": answer, "note": row.note, "reasons": reasons,
            "numbers": {name: [plain(number) for number in pair] for name, pair in numbers.items()},
            "fit_cpu_seconds": row.values["fit_cpu_seconds"] + cell.fit_cpu,
            "fill_cpu_seconds": row.values["fill_cpu_seconds"],
        })  # fmt: skip
    return found


def scored_rows(store: CountStore, most: int, name: str) -> np.ndarray:
    """Test cells of a store, at most ``most``, evenly spaced.

    Raises
    ------
    ValueError
        Fewer than two: a bootstrap over cells needs them.

    Examples
    --------
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.grid.cell import scored_rows
    >>> len(scored_rows(CountStore.open("atlas.zarr"), 10, "atlas"))
    10
    """
    rows = store.rows("test")
    if len(rows) < 2:
        raise ValueError(
            f"{name} has {len(rows)} test cells, and a bootstrap over cells needs two or more; shard it with another "
            "split="
        )
    return rows[:: max(1, -(-len(rows) // most))]


def _model(cell: Cell, options: Ours, store: CountStore, rows: np.ndarray) -> Model:
    """The model of a row of ours, with the rounding that the row asks for.

    One that was trained elsewhere must not have seen the cells ``rows``.
    """
    model = Model.load(cell.model)
    if options.model:
        known, _ = heldout.not_trained_on(store, model, rows, keep=False)
        if len(known) < len(rows):
            raise ValueError(
                f"{options.model} was trained on {len(rows) - len(known)} of {len(rows)} test cells of {cell.data}; "
                "give cells that it has not seen, or train in the grid (train:)"
            )
    if not options.rounding:
        return model
    law: Any = model.process
    if not hasattr(law, "rounding") or law._leap != "plain":
        raise ValueError(
            f"rounding={options.rounding!r} is of plain steps of count diffusion; this model's law has none (train it "
            "with process.leap=plain)"
        )
    return dataclasses.replace(model, process=dataclasses.replace(law, rounding=options.rounding))


def _ours(
    cell: Cell, options: Ours, store: CountStore, rows: np.ndarray
) -> tuple[Any, tuple[str, ...], int]:  # fmt: skip
    """The imputer of a model, the labels that it is given, and its number of weights."""
    model = _model(cell, options, store, rows)
    if options.guidance != 1 and not options.labels:
        raise ValueError(f"guidance={options.guidance:g} weighs labels, and this row is told none; give labels: true")
    if options.attrition and options.method != "repaint":
        raise ValueError(f"attrition={options.attrition:g} is of method: repaint; evidence is never thinned otherwise")
    walk: dict[str, Any] = {"guidance": options.guidance}
    walk |= {k: v for k in ("steps", "readout", "spacing") if (v := getattr(options, k))}
    if options.attrition:
        walk["sigma"] = ("rescale", options.attrition)
    imputer = heldout.answering(model, store, model.imputer(options.method, **walk), options.labels or None)
    labels = tuple(label for label in model.spec.labels if label in store.manifest.labels)
    return imputer, labels, sum(p.numel() for p in model.denoiser.parameters())


def before_dropout(about: DataSet, store: CountStore, rows: np.ndarray) -> np.ndarray:
    """Counts of a simulated set before dropout, for cells ``rows`` of its store: ``float32 [n g]``.

    Raises
    ------
    ValueError
        The data set is not a simulated one.
    """
    if not about.splat:
        raise ValueError("protocol dropout is of simulated sets (splat:)")
    data = published(about.splat, about.seed)
    genes = data.var_names.get_indexer(list(store.genes))
    return data.layers["true"][store.origin(rows)[1]][:, genes].toarray().astype(np.float32)


def opened(name: str, about: DataSet, folder: Path) -> CountStore:
    """The store of a data set; that of a simulated set is made in ``folder`` first."""
    if about.store:
        return CountStore.open(about.store)
    if about.made:
        return made.opened(about.made, about.seed, folder / "data")

    def splat() -> Any:
        data = published(about.splat, about.seed)
        del data.layers["true"], data.varm["de_factor"]
        return data

    out = folder / "data" / f"{about.splat}-{about.seed}.zarr"
    return made.stored(splat, out, labels=("group",), split=SPLAT_SPLIT, seed=about.seed)


def trained(name: str, options: Ours, store: CountStore, folder: Path, *, progress: bool) -> tuple[str, float]:
    """Folder of the model of a row of ours, trained now if need be, and the CPU seconds of its last launch.

    A training that was interrupted goes on; one that is done is not repeated.
    """
    if options.model:
        return str(tracking.fetch(options.model)), 0.0
    config = configs.load(
        options.train,
        [*options.settings, f"data.store={store.url}", "evaluate.enabled=false", "tracking.enabled=false"],
    )
    named = hashlib.sha256(
        json.dumps([config.identity(), config.train.cells, config.train.patience, store.manifest.fingerprint],
                   sort_keys=True).encode()
    ).hexdigest()[:12]  # fmt: skip
    out = folder / "models" / f"{name}-{named}"
    mark = out / "grid.json"
    if not mark.exists():
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, out=str(out)))
        began = time.process_time()
        experiment.train(config, progress=progress)
        with files.whole(mark) as temporary:
            temporary.write_text(json.dumps({"cpu_seconds": time.process_time() - began}))
    return str(out / "model"), float(received.json_of(mark)["cpu_seconds"])


def fitted(row: Line, data: DataSet, protocol: Protocol, seed: int, minutes: float = 0.0) -> Line:
    """A row with the options of one cell of the grid (:func:`~distdiff.grid.spec.fitting`).

    Examples
    --------
    >>> from distdiff.grid.cell import fitted
    >>> from distdiff.grid.spec import DataSet, Line, Protocol
    >>> fitted(Line("k", ("mean",), {"kind": "knn"}), DataSet("a.zarr"), Protocol("mcar"), seed=1).options["seed"]
    1
    """
    if not isinstance(row.options, dict):
        return row
    return dataclasses.replace(row, options=fitting(row.options, data, protocol, seed, minutes))
