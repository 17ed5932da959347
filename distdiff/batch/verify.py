"""Read every byte of a result again; compute again what the disk has lost."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distdiff import files
from distdiff.batch import output
from distdiff.batch import plan as planning
from distdiff.batch.compute import ShardComputer
from distdiff.batch.finish import existing_result
from distdiff.batch.output import RECORD, Corrupt
from distdiff.batch.plan import Plan
from distdiff.batch.task import Task
from distdiff.batch.workplace import finished_shards, folder_of, owned, read_plan, shard_folder

HINT = "the same command with --verify --repair computes it again"

OTHERWISE = "other hardware or other versions round sums otherwise; write the result anew (overwrite=True)"


def verify(
    out: str | Path, *, repair: bool = False, task: Task | None = None, data: str = "", progress: bool = True
) -> str:
    """Compare all files of a result, or of an unfinished job, with the checksums of what was written.

    Parameters
    ----------
    repair
        Compute again what differs; of an unfinished job: remove it, so that the same command computes it again.
    task, data
        The task and the name of its input, to repair a finished result; they must be the same as at first.

    Returns
    -------
    str
        What was found.

    Raises
    ------
    Corrupt
        Files differ and are not to be repaired, or cannot be.
    FileExistsError
        Another process is writing there.
    ValueError
        There is no result of this package, or it is h5ad.
    """
    out = Path(out)
    if out.suffix != ".zarr":
        raise ValueError(f"{out}: only .zarr results keep checksums; write one, and export it")
    result = existing_result(out)
    work = files.workplace(folder_of(out))
    if not result and (work / "job.json").exists():
        with owned(out, lambda message: None):
            return _verify_unfinished(work, repair)
    if not result.get("files"):
        raise ValueError(f"{out} is no finished result of a job, and none was begun there")
    units = result["files"]
    damaged = {}
    for unit in tqdm(units, desc="verify", unit="shard", disable=not progress, ascii=True):
        if found := output.check(out, units[unit]):
            damaged[unit] = found
    if not damaged:
        return f"{out}: {len(units) - 1} shards and all that is around them are as written"
    first = next(iter(damaged.values()))[0]
    if not repair:
        raise Corrupt(f"{out}: {_listed(damaged)} differ from what was written (first: {first}); {HINT}")
    if "rest" in damaged:
        raise Corrupt(
            f"{out}: {damaged['rest'][0]} is damaged, which stands around the shards: write the result anew "
            "(overwrite=True)"
        )
    if task is None:
        raise ValueError("to repair a result, its task must be given")
    identity = planning.identity(task, data, result["identity"]["precision"])
    if differs := planning.difference(result["identity"], identity):
        raise ValueError(f"{out} was written by another job, it cannot be repaired by this one: {differs}")
    with owned(out, lambda message: None) as work, tempfile.TemporaryDirectory(prefix="repair-", dir=work) as scratch:
        _repair(out, Path(scratch), task, result, damaged)
    return f"{out}: {_listed(damaged)} computed again"


def _listed(units: Mapping[str, Any]) -> str:
    return ", ".join(list(units)[:5]) + (f" and {len(units) - 5} more" if len(units) > 5 else "")


def _verify_unfinished(work: Path, repair: bool) -> str:
    if (plan := read_plan(work)) is None:
        return f"{work}: no job is unfinished there any more"
    shards = work / plan.token
    numbers = sorted(finished_shards(shards))
    damaged = {}
    for number in numbers:
        folder = shard_folder(shards, number)
        if found := output.check(folder, output.read_record(folder)["files"]):
            damaged[f"shard-{number:06d}"] = folder / found[0]
    if not damaged:
        return f"{work}: the {len(numbers)} shards finished so far are as written"
    if not repair:
        first = next(iter(damaged.values()))
        raise Corrupt(f"{work}: {_listed(damaged)} differ from what was written (first: {first}); {HINT}")
    for path in damaged.values():
        files.remove(path.parent / RECORD)
        files.remove(path.parent)
    return f"{work}: {_listed(damaged)} removed; run the same command again without --verify"


def _repair(out: Path, scratch: Path, task: Task, result: dict[str, Any], damaged: Mapping[str, list[str]]) -> None:
    """Compute the shards again that damaged files hold values of, compare with the records, put the files in place."""
    plan, nnz = Plan.from_json(json.dumps(result["plan"])), result["nnz"]
    layout, shards, store = plan.layout, scratch / "shards", scratch / "store"
    shards.mkdir()
    numbers = {int(unit.removeprefix("shard-")) for unit in damaged if unit.startswith("shard-")}
    joins = []
    for unit in damaged:
        if unit.startswith("join-"):
            name, _, digits = unit.removeprefix("join-").rpartition("-")
            field = next(f for f in layout.fields if f.name == name)
            joins.append((field, int(digits)))
            numbers |= {shard for shard, _, _ in output.cut_from(nnz[field.path], int(digits))}
    with ShardComputer(task, plan, shards) as computer:
        computer.compute(tqdm(sorted(numbers), desc="repair", unit="shard"))
    written: dict[str, Any] = {}
    for number in numbers:
        if any(n != nnz[path][number] for path, n in output.read_record(shard_folder(shards, number))["nnz"].items()):
            raise Corrupt(f"{out}: shard {number} came out with another number of values: {OTHERWISE}")
        written |= output.link_shard(shards, store, layout, number)
    for field, number in joins:
        written |= output.join(shards, store, field, nnz[field.path], number)
    names = [(unit, name) for unit, found in damaged.items() for name in found]
    for unit, name in names:
        if tuple(written[name]) != tuple(result["files"][unit][name]):
            raise Corrupt(f"{out}: {name} came out otherwise than it was: {OTHERWISE}")
    for _, name in names:
        os.replace(store / name, out / name)
