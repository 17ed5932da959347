"""Read every byte of a result again; compute again what the disk has lost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distdiff import files
from distdiff.batch import output, plan
from distdiff.batch.claims import Claims
from distdiff.batch.job import finished
from distdiff.batch.output import Corrupt
from distdiff.batch.plan import Plan
from distdiff.batch.tasks import Task

HINT = "--verify --repair computes it again"


def verify(
    out: str | Path, *, repair: bool = False, task: Task | None = None, data: str = "", progress: bool = True
) -> str:
    """Compare all files of a result with the checksums of what was written; unfinished ones too.

    Parameters
    ----------
    repair
        Compute again what differs; of an unfinished job: forget it, so that going on computes it.
    task, data
        The job, to repair a finished result; must be the same as at first.

    Returns
    -------
    str
        What was found.

    Raises
    ------
    Corrupt
        Files differ and are not to be repaired, or cannot be.
    ValueError
        No result of this package there, or h5ad.
    """
    out = Path(out)
    work = out.with_name(f".{out.name}.building")
    if out.suffix != ".zarr":
        raise ValueError(f"{out}: only .zarr results keep checksums; write one, and export it")
    about = finished(out)
    files.workplace(work)
    if not about and (work / "job.json").exists():
        return _unfinished(work, repair)
    if not about.get("files"):
        raise ValueError(f"{out} is no finished result of a job, and none was begun there")
    units = about["files"]
    bad = {}
    for unit in tqdm(units, desc="verify", unit="shard", disable=not progress, ascii=True):
        if found := output.check(out, units[unit]):
            bad[unit] = found
    if not bad:
        return f"{out}: {len(units) - 1} shards and all that is around them are as written"
    unit, first = next(iter(bad.items()))
    if not repair:
        raise Corrupt(f"{out}: {_told(bad)} differ from what was written (first: {first[0]}); {HINT}")
    if "rest" in bad:
        raise Corrupt(
            f"{out}: {bad['rest'][0]} is damaged, which stands around the shards: write the result anew (--overwrite)"
        )
    if task is None:
        raise ValueError("to repair a result, its task must be given")
    if odd := plan.difference(about["identity"], plan.identity(task, data, about["identity"]["precision"])):
        raise ValueError(f"{out} was written by another job, it cannot be repaired by this one: {odd}")
    scratch = files.workplace(out.with_name(f".{out.name}.repairing"))
    with Claims(scratch / "claims") as claims:
        if not claims.take("repair"):
            raise FileExistsError(f"{out} is being repaired by another process now")
        try:
            _repair(out, scratch, task, about, bad)
        finally:
            files.remove(scratch)
    return f"{out}: {_told(bad)} computed again"


def _told(bad: Mapping[str, Any]) -> str:
    return ", ".join(list(bad)[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")


def _unfinished(work: Path, repair: bool) -> str:
    with Claims(work / "claims") as claims:
        if others := claims.others():
            raise FileExistsError(f"{work} is being written now ({', '.join(others)}): verify once they are done")
        bad, n = {}, 0
        for path in sorted((work / "done").glob("*.json")):
            record, n = json.loads(path.read_text()), n + 1
            found = output.check(work / "store", record["files"]) + output.check(
                work / "parts", record.get("parts", {})
            )
            if found:
                bad[path] = found
        names = [path.stem for path in bad]
        if bad and not repair:
            first = next(iter(bad.values()))[0]
            raise Corrupt(
                f"{work}: {_told(dict.fromkeys(names))} differ from what was written (first: {first}); {HINT}"
            )
        for path in bad:
            path.unlink()
    if bad:
        return f"{work}: {_told(dict.fromkeys(names))} forgotten; run the same command again without --verify"
    return f"{work}: the {n} shards finished so far are as written"


def _repair(out: Path, scratch: Path, task: Task, about: dict[str, Any], bad: Mapping[str, list[str]]) -> None:
    """Compute the shards again that bad files hold values of, compare with what was written, put them in place."""
    made, nnz = Plan.from_json(json.dumps(about["plan"])), about["nnz"]
    task.model.denoiser.to(task.device).eval()
    store, parts, joins = scratch / "store", scratch / "parts", []
    shards = {output.number(unit) for unit in bad if unit.startswith("shard-")}
    for unit in bad:
        if unit.startswith("join-"):
            field = next(f for f in made.layout.fields if f.sparse and unit.startswith(f"join-{f.name}-"))
            joins.append((field, output.number(unit)))
            shards |= {s for s, _, _ in output.cut_from(nnz[field.path], output.number(unit))}
    written: dict[str, Any] = {}
    for shard in tqdm(sorted(shards), desc="repair", unit="shard"):
        start, stop = made.layout.span(shard)
        batches = []
        for a in range(start, stop, made.batch):
            b = min(a + made.batch, stop)
            with plan.autocast(task.device, made.precision), torch.no_grad():
                values, _ = task.compute(task.read(a, b))
            batches.append(
                {f.path: output.fetched(values[f.path], f, a) for f in made.layout.fields if f.path in values}
            )
        found = output.write(made.layout, shard, batches, task.labels(start, stop), store, parts)
        written |= found["files"]
        if any(found["nnz"][path] != nnz[path][shard] for path in nnz):
            raise Corrupt(f"{out}: shard {shard} came out with another number of values: {OTHER}")
    for field, number in joins:
        written |= output.join(parts, store, field, nnz[field.path], number)
    for unit, names in bad.items():
        for name in names:
            if tuple(written[name]) != tuple(about["files"][unit][name]):
                raise Corrupt(f"{out}: {name} came out otherwise than it was: {OTHER}")
    for name in (name for names in bad.values() for name in names):
        os.replace(store / name, out / name)


OTHER = "on other hardware, or with other versions, sums are rounded otherwise; write the result anew (--overwrite)"
