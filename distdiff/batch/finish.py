"""Make the whole result of finished shards, in a folder of its own that only its maker writes to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from distdiff.batch import frame, output
from distdiff.batch.layout import Field, Layout, runs
from distdiff.batch.output import Corrupt
from distdiff.batch.plan import Plan
from distdiff.batch.summary import Summary, peak_mib, together
from distdiff.batch.task import Task
from distdiff.batch.workplace import shard_folder
from distdiff.data.store.pool import cores
from distdiff.received import Record
from distdiff.tasks.made import ENTRY

WRITERS = 4
"""Threads that write CSR arrays."""

KEY = "distdiff"
"""Attribute of a finished result that holds its identity, and in zarr the checksums of its files."""


def existing_result(out: Path) -> dict[str, Any]:
    """What a finished result holds about itself: ``identity``, ``records``, in zarr ``files``; empty: no result."""
    try:
        if out.is_dir():
            return json.loads((out / "zarr.json").read_text())["attributes"][KEY]
        if out.is_file():
            import h5py

            with h5py.File(out, "r") as file:
                return json.loads(file.attrs[KEY])
    except (OSError, KeyError, ValueError):
        pass
    return {}


def finish(task: Task, plan: Plan, work: Path, *, suffix: str, command: str = "") -> Path:
    """Make the result, ``.zarr`` or ``.h5ad``, in a new folder in ``work``; returns its path, to be renamed.

    Raises
    ------
    Corrupt
        A file of a finished shard differs from what was written.
    """
    layout, shards = plan.layout, work / plan.token
    own = Path(tempfile.mkdtemp(prefix="finish-", dir=work))
    store = own / "result.zarr"
    store.mkdir()
    records = [output.read_record(shard_folder(shards, shard)) for shard in range(layout.n_shards)]
    nnz = {field.path: [record["nnz"][field.path] for record in records] for field in _sparse(layout)}
    files = {f"shard-{shard:06d}": output.link_shard(shards, store, layout, shard) for shard in range(layout.n_shards)}
    for field in layout.fields:
        if not field.sparse:
            output.metadata(store, field, layout)
    files |= _joined(layout, shards, store, records, nnz)
    whole = together(records)
    whole["peak_mib"] = max(whole["peak_mib"], peak_mib())
    about = _provenance(task, plan, whole, command)
    note: dict[str, Any] = {"identity": plan.identity, "records": [whole]}
    with frame.as_zarr(store) as root:
        for field in _sparse(layout):
            output.finish_csr(root, shards, store, field, layout, nnz[field.path])
        if suffix == ".h5ad":
            result = own / "result.h5ad"
            frame.to_h5ad(root, result, task, layout.fields)
            frame.write_uns_h5ad(result, task, about, KEY, json.dumps(note))
            return result
        frame.build(root, task, layout.fields)
        if task.uns == ENTRY:
            frame.write_made(root, task)
        frame.write_uns(root, about, task.uns)
        files["rest"] = output.unrecorded(store, files)
        root.attrs[KEY] = {**note, "plan": json.loads(plan.to_json()), "files": files, "nnz": nnz}
        frame.consolidate(store)
    return store


def gene_counts(task: Task) -> dict[str, int]:
    """Numbers of genes for a :class:`Summary`."""
    reader = getattr(task, "reader", None)
    counts = {"genes": len(task.genes)}
    if reader is not None:
        counts |= {"genes_unknown_to_model": reader.unknown, "genes_absent_from_input": reader.absent}
    return counts


def _provenance(task: Task, plan: Plan, whole: dict[str, Any], command: str) -> dict[str, Any]:
    """``uns['distdiff']``."""
    return {
        **task.provenance(), **task.about(), **asdict(Summary.of([whole], **gene_counts(task))),
        "seed": getattr(task, "seed", 0), "model_sha256": plan.identity["model"], "input": plan.identity["data"],
        "command": command, "batch_size": plan.batch, "precision": plan.precision,
    }  # fmt: skip


def _sparse(layout: Layout) -> list[Field]:
    return [field for field in layout.fields if field.sparse]


def _joined(
    layout: Layout, shards: Path, store: Path, records: Sequence[Mapping[str, Any]], nnz: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Record]]:
    """Write the shards of the final CSR arrays: unit ``join-NAME-NUMBER`` -> records of its files."""
    units = {}
    for field in _sparse(layout):
        _, size = runs(sum(nnz[field.path]))
        for number in range(-(-sum(nnz[field.path]) // size)):
            write = partial(output.join, shards, store, field, nnz[field.path], number)
            units[f"join-{field.name}-{number:06d}"] = write
    with ThreadPoolExecutor(max(1, min(WRITERS, cores())), "distdiff-join") as writers:
        for checked in [writers.submit(_check, layout, shards, *numbered) for numbered in enumerate(records)]:
            checked.result()
        written = {unit: writers.submit(write) for unit, write in units.items()}
        return {unit: future.result() for unit, future in written.items()}


def _check(layout: Layout, shards: Path, shard: int, record: Mapping[str, Any]) -> None:
    """Compare the CSR values of a finished shard with its record before they are cut and joined."""
    folder = shard_folder(shards, shard)
    names = [f"{field.name}.{part}" for field in _sparse(layout) for part in ("data", "indices", "counts")]
    if damaged := output.check(folder, {name: record["files"][name] for name in names}):
        raise Corrupt(
            f"{folder / damaged[0]} (shard {shard}) differs from what was written: run the same command with "
            "--verify --repair"
        )
