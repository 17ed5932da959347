"""Benchmark grids: data sets x protocols x rows x seeds, every cell of the grid one finished file.

A grid that was killed goes on with the same command. A row whose library is absent says how to install it, a row that
fails is marked with its reason, and the grid goes on with the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from distdiff import files, tracking
from distdiff.batch.cluster import local_workers
from distdiff.cluster import connect, explained
from distdiff.data.store.store import CountStore
from distdiff.grid import sweep, table
from distdiff.grid.cell import Cell, Record, compute, finished, fitted, opened, trained
from distdiff.grid.spec import Grid, Ours, of_data, read

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Result", "run"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What :func:`run` leaves in ``folder``: the tidy table and its file, Markdown, and sentences on who is first.

    Attributes
    ----------
    table
        Columns data, protocol, rate, fold, row, seed, ours, status, reason, capacity, n_trials, peak_mib, of, swept,
        at (of a sweep: the row, the option, its value), answer, note, metric, value, error, fit_cpu_seconds,
        fill_cpu_seconds.
    """

    folder: Path
    table: pd.DataFrame
    markdown: str
    claims: tuple[str, ...]


def run(
    config: str | Path | Mapping[str, Any], out: str | Path = "benchmark", *, data: Sequence[str] = (),
    overrides: Sequence[str] = (), workers: int | None = None, scheduler: str | None = None, progress: bool = True,
) -> Result:  # fmt: skip
    """Compute what is missing of a grid, and write the tables and figures of all of it.

    Parameters
    ----------
    config
        A YAML file, the name of one in ``configs/eval`` (``light``), or a mapping with its keys
        (:mod:`distdiff.grid.spec`).
    out
        Folder: ``cells/`` (one file for each), ``results.parquet`` (``.csv`` without pyarrow), ``table.md``, a figure
        for each headline metric and each swept option. Its finished cells are not computed again.
    data
        Stores, in place of the file's data.
    overrides
        ``key=value`` for keys of the file.
    workers, scheduler
        Compute cells on so many dask processes of this machine, or on a running cluster whose workers see the same
        folders. By default here, one after the other. Models are trained here in any case.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        A grid that cannot be read, or a store that is not there.

    Examples
    --------
    >>> import distdiff.grid
    >>> rows = [{"kind": "gene_mean", "depth": True}, {"kind": "ridge", "alpha": [10.0]}, {"kind": "zero"}]
    >>> grid = {"rows": rows, "protocols": [{"protocol": "mcar", "rate": 0.3}], "resamples": [20, 5]}
    >>> result = distdiff.grid.run(grid, "benchmark", data=["atlas.zarr"], progress=False)
    >>> means = result.table[(result.table.metric == "deviance") & (result.table.answer == "mean")]
    >>> means.sort_values("value").row.tolist()
    ['ridge', 'gene mean x depth', 'none (zero)']
    """
    grid, folder = read(config, overrides, data), files.local(Path(out).expanduser())
    for data_set in grid.data.values():
        if data_set.store and not files.is_url(data_set.store):
            files.refuse_nested(folder, data_set.store)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    cells = list(_cells(grid, folder, progress))
    done = {cell.file: record for cell in cells if (record := finished(folder / "cells" / cell.file))}
    missing = [cell for cell in cells if cell.file not in done]
    bar = tqdm(total=len(cells), initial=len(done), desc="benchmark", unit=" cells", disable=not progress)
    with bar:
        for cell, record in _computed(missing, folder / "cells", workers, scheduler, bar):
            done[cell.file] = record
            bar.update()
    return _written(grid, [done[cell.file] for cell in cells], folder)


def _cells(grid: Grid, folder: Path, progress: bool) -> Iterator[Cell]:
    for name, about in grid.data.items():
        store = opened(name, about, folder)
        models: dict[str, tuple[str, str, float]] = {}
        once: dict[tuple[str, ...], tuple[str, str, float]] = {}
        for row in grid.rows:
            if isinstance(row.options, Ours):
                of = (row.options.model, row.options.train, *row.options.settings)
                if of not in once:  # the rows of a sweep have one model
                    once[of] = _model(name, of_data(row.options, about), store, folder, progress)
                models[row.name] = once[of]
        for protocol, row, seed in itertools.product(grid.protocols, grid.rows, grid.settings.seeds):
            if protocol.protocol == "molecules" and "mean" not in row.answers:
                continue  # means alone are scored
            model, trouble, seconds = models.get(row.name, ("", "", 0.0))
            own = fitted(row, about, protocol, seed, grid.settings.minutes)
            yield Cell(
                name, store.url, store.manifest.fingerprint, about, protocol, own, seed, grid.settings, model, trouble,
                seconds,
            )  # fmt: skip


def _model(name: str, options: Ours, store: CountStore, folder: Path, progress: bool) -> tuple[str, str, float]:
    """Folder of a model, or why there is none, and CPU seconds of its training."""
    try:
        path, seconds = trained(name, options, store, folder, progress=progress)
    except Exception as error:  # as any row that fails
        return "", f"no model: {' '.join(str(error).split())}", 0.0
    return path, "", seconds


def _computed(
    cells: list[Cell], folder: Path, workers: int | None, scheduler: str | None, bar: Any
) -> Iterator[tuple[Cell, Record]]:
    """Cells with their records as they are done: here, or by dask."""
    if not cells:
        return
    if workers is None and scheduler is None:
        for cell in cells:
            bar.set_postfix_str(cell.row.name)
            yield cell, compute(cell, folder)
        return
    from dask.distributed import as_completed

    with contextlib.ExitStack() as stack:
        address = stack.enter_context(local_workers(workers)) if scheduler is None else scheduler
        stack.enter_context(explained(address))
        client = stack.enter_context(connect(address))
        task = partial(compute, folder=folder.absolute())
        sent = {client.submit(task, cell, pure=False): cell for cell in cells}
        for future in as_completed(sent, loop=client.loop):
            yield sent[future], future.result()


def _written(grid: Grid, records: list[Record], folder: Path) -> Result:
    found = table.tidy(records)
    _table_file(found, folder)
    setting: dict[str, str] = {}
    for key, of_table in itertools.groupby(records, lambda r: f"{r['data']}, {r['name']}"):
        setting[key] = _about([r for r in of_table if r["status"] == "done"], grid)
    text, lines = table.markdown(found, setting), table.merged(found)
    with files.whole(folder / "table.md", overwrite=True) as temporary:
        temporary.write_text(text)
    figures = [folder / f"{metric}.png" for metric in table.HEADLINES]
    drawn = [path for path in figures if table.figure(lines, path.stem, path)]
    drawn += sweep.figures(lines, {metric: column.heading for metric, column in table.COLUMNS.items()}, folder)
    settings = grid.settings
    params = {"rows": [row.name for row in grid.rows], "data": list(grid.data), **dataclasses.asdict(settings)}
    with tracking.run(
        experiment=settings.experiment, name=f"benchmark {folder.name}", params=params, tags={}, folder=folder,
        resume=True, enabled=bool(settings.experiment),
    ) as logged:  # fmt: skip
        shown = lines[lines.metric.isin(list(table.HEADLINES))]
        logged.metrics(
            {f"{r.data}/{r.protocol}/{r.row}/{r.answer}/{r.metric}": r.value for r in shown.itertuples()},
            step=sum(record["status"] == "done" for record in records),
        )
        for path in (folder / "table.md", *drawn):
            logged.artifact(path)
    return Result(folder, found, text, tuple(table.claims(lines)))


def _table_file(found: pd.DataFrame, folder: Path) -> None:
    try:
        with files.whole(folder / "results.parquet", overwrite=True) as temporary:
            found.to_parquet(temporary, index=False)
    except ImportError:  # pyarrow comes with MLflow, but not with its slim builds
        with files.whole(folder / "results.csv", overwrite=True) as temporary:
            found.to_csv(temporary, index=False)


def _about(done: list[Record], grid: Grid) -> str:
    """What was scored, and which scores are missing, of one table."""
    if not done:
        return ""
    s = done[0]["setting"]
    seeds = f"seeds {', '.join(map(str, grid.settings.seeds))}"
    text = (
        f"{s['said']} Of {seeds}."
        if "said" in s
        else (
            f"{s['cells']} test cells x {s['genes']} genes ({s['data']}), {s['targets']:,} entries scored, "
            f"{s['zeros_among_targets']:.0%} of them zero; {seeds}, "
            f"{grid.settings.draws} draws in an ensemble."
        )
    )
    reasons = dict.fromkeys(f"- {reason}" for r in done for answer in r["answers"] for reason in answer["reasons"])
    return "\n\n".join([text, *(["\n".join(reasons)] if reasons else [])])
