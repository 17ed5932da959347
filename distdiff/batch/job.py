"""One job from its lock to its published result: what is the same whether one process or many compute the shards.

The process that runs :func:`carry_out` owns the work folder (:mod:`~distdiff.batch.workplace`) until it ends, and it
alone publishes. What computes is an :class:`Engine`: this process, the ranks of ``accelerate launch``
(:mod:`~distdiff.batch.ranks`), or the workers of a dask cluster (:mod:`~distdiff.batch.cluster`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from distdiff import files
from distdiff.batch import plan as planning
from distdiff.batch.compute import ShardComputer
from distdiff.batch.finish import existing_result, finish, gene_counts
from distdiff.batch.plan import Plan
from distdiff.batch.summary import Summary
from distdiff.batch.task import Task
from distdiff.batch.workplace import clear, finished_shards, folder_of, owned, read_plan, write_plan

Notify = Callable[[str], None]

LOOK = 0.5
"""Seconds between two looks at how many shards are finished, for the progress bar."""


@dataclass(frozen=True)
class Described:
    """A task, as whoever owns its job must know it.

    Attributes
    ----------
    name
        ``impute``, ``denoise``, ...
    identity
        What must be equal for a command to continue the job, or to find it finished (:func:`plan.identity
        <distdiff.batch.plan.identity>`).
    cells
        Cells of the result.
    genes
        Numbers of genes for the :class:`~distdiff.batch.summary.Summary`.
    """

    name: str
    identity: dict[str, Any]
    cells: int
    genes: dict[str, int]


class Engine(Protocol):
    """What computes the shards of a job."""

    def describe(self) -> Described:
        """The task that it computes."""

    def make_plan(self, batch_size: int | None, shard_cells: int | None) -> Plan:
        """A new plan for the task, by a trial on some cells."""

    def compute(self, plan: Plan, work: Path, shards: Sequence[int], look: Callable[[], None]) -> None:
        """Compute these shards of an unfinished job in ``work``; all are finished when it returns.

        ``look`` moves the progress bar and is to be called often.
        """

    def finish(self, plan: Plan, work: Path, suffix: str, command: str) -> Path:
        """Make the result in a folder of its own in ``work``; returns its path."""


class OneProcess:
    """The engine that is this process alone: one shard after the other."""

    def __init__(self, task: Task, data: str, precision: str) -> None:
        for_gpu = task.device.startswith("cuda")
        self.precision = ("bfloat16" if for_gpu else "float32") if precision == "auto" else precision
        self.task, self.data = task, data
        task.model.denoiser.to(task.device).eval()

    def describe(self) -> Described:
        """See :class:`Engine`."""
        identity = planning.identity(self.task, self.data, self.precision)
        return Described(self.task.name, identity, self.task.rows.n_cells, gene_counts(self.task))

    def make_plan(self, batch_size: int | None, shard_cells: int | None) -> Plan:
        """See :class:`Engine`."""
        identity = planning.identity(self.task, self.data, self.precision)
        return planning.make(
            self.task, identity, precision=self.precision, batch_size=batch_size, shard_cells=shard_cells
        )

    def compute(self, plan: Plan, work: Path, shards: Sequence[int], look: Callable[[], None]) -> None:
        """See :class:`Engine`."""
        with ShardComputer(self.task, plan, work / plan.token) as computer:
            computer.compute(shards, look)

    def finish(self, plan: Plan, work: Path, suffix: str, command: str) -> Path:
        """See :class:`Engine`."""
        return finish(self.task, plan, work, suffix=suffix, command=command)


def check_options(precision: str, batch_size: int | None, shard_cells: int | None) -> None:
    """Refuse options that no engine takes.

    Raises
    ------
    ValueError
        An unknown precision; no cells at a time.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision {precision!r}: auto, float32 or bfloat16 is wanted")
    for name, number in {"batch_size": batch_size, "shard_cells": shard_cells}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1 cell, got {number}")


def carry_out(
    engine: Engine, out: Path, *, overwrite: bool, progress: bool, batch_size: int | None, shard_cells: int | None,
    command: str, notify: Notify,
) -> Summary:  # fmt: skip
    """Own the output, plan or continue the job, let the engine compute what is missing, and publish."""
    described = engine.describe()
    if _is_finished(out, described) and not folder_of(out).exists():
        return _summary(out, described)
    with files.explain_full_disk(out, folder_of(out)), owned(out, notify) as work:
        if _is_finished(out, described):  # by a process that was killed before it had removed the work folder
            clear(work)
            return _summary(out, described)
        plan = _continued(described, out, work, overwrite, notify)
        if plan is None:
            plan = engine.make_plan(batch_size, shard_cells)
            planning.check_room(plan, out.parent, 0, h5ad=out.suffix == ".h5ad")
            write_plan(work, plan)
        finished = finished_shards(work / plan.token)
        notify(planning.check_room(plan, out.parent, len(finished), h5ad=out.suffix == ".h5ad"))
        missing = [shard for shard in range(plan.layout.n_shards) if shard not in finished]
        with Progress(described, plan, work, len(finished), progress) as bar:
            engine.compute(plan, work, missing, bar.look)
        result = engine.finish(plan, work, out.suffix, command)
        _refuse_stranger(out, work, plan)
        files.publish(result, out, work / "old")
        clear(work)
        return _summary(out, described)


def _is_finished(out: Path, described: Described) -> bool:
    return existing_result(out).get("identity") == described.identity


def _summary(out: Path, described: Described) -> Summary:
    return Summary.of(existing_result(out)["records"], **described.genes)


def _continued(described: Described, out: Path, work: Path, overwrite: bool, notify: Notify) -> Plan | None:
    """The plan of this job in the work folder, if it was begun; whatever else lies there is removed, or refused."""
    if os.path.lexists(out) and not overwrite:
        result = existing_result(out)
        differs = f" with another job ({planning.difference(result['identity'], described.identity)})" if result else ""
        raise FileExistsError(f"{out} exists already{differs}; give overwrite=True to replace it, or another name")
    try:
        begun = read_plan(work)
    except ValueError as error:
        notify(f"{work}: removed, its plan was left by another version of distdiff or is damaged ({error})")
        begun = None
    else:
        if begun is None and (work / "identity").exists():
            notify(f"{work}: removed, it was left by a distdiff shard that was killed")
    if begun is not None and begun.identity != described.identity and not overwrite:
        differs = planning.difference(begun.identity, described.identity)
        raise FileExistsError(
            f"{out} was begun by another job and is not finished; it differs: {differs}; give overwrite=True to begin "
            "anew, or another name"
        )
    if begun is not None and begun.identity == described.identity and (work / begun.token).is_dir():
        return begun
    clear(work)
    return None


def _refuse_stranger(out: Path, work: Path, plan: Plan) -> None:
    """Publish nothing where the work folder is another job's: this process lost its lock, with its file server say."""
    current = read_plan(work)
    if current is None or current.token != plan.token:
        raise FileExistsError(f"{out} was taken over by another command meanwhile; nothing of this one was published")


class Progress:
    """A bar that moves to what is finished, by whichever process (a context)."""

    def __init__(self, described: Described, plan: Plan, work: Path, finished: int, show: bool) -> None:
        self.cells, self.rows, self.shards, self.show = described.cells, plan.layout.rows, work / plan.token, show
        self._looked = 0.0
        self.bar = tqdm(
            total=self.cells, initial=min(self.cells, finished * self.rows), unit=" cells", unit_scale=True,
            desc=described.name, mininterval=1.0, disable=not show,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._looked = 0.0
        self.look()
        self.bar.close()

    def look(self) -> None:
        """Count the finished shards, now and then."""
        if self.show and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            cells = min(self.cells, len(finished_shards(self.shards)) * self.rows)
            self.bar.update(max(0, cells - self.bar.n))
