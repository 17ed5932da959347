"""What a job is, decided once before its first shard: identity, layout, batch size, bytes of the result."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from distdiff import received
from distdiff.batch import layout as encoding
from distdiff.batch.layout import Layout, Values
from distdiff.batch.task import Task
from distdiff.files import NoRoom
from distdiff.version import __version__

FORMAT = 1

PROBE = 256
"""Cells of the trial that measures how dense the result is."""

BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)

PATIENCE = 5.0
"""Seconds of a trial of one batch size after which no larger one is tried."""


@dataclass(frozen=True)
class Plan:
    """A job as all its processes must see it; lies in ``job.json`` of the work folder.

    Attributes
    ----------
    identity
        What must be equal for a command to continue the job.
    layout
        Fields, shards.
    batch
        Cells of a network call. It belongs to the plan so that all processes round alike.
    precision
        ``float32``, or ``bfloat16`` inside the network.
    bytes_per_cell
        Of the finished result, measured on some cells; ``parts_per_cell`` (CSR values of finished shards) is needed
        beside it until the result is published.
    token
        Names this beginning of the job among all others: the folder of its shards.
    """

    identity: dict[str, Any]
    layout: Layout
    batch: int
    precision: str
    bytes_per_cell: float
    parts_per_cell: float
    token: str

    def batches(self, shard: int) -> list[tuple[int, int]]:
        """First row of each batch of a shard, and one past its last."""
        start, stop = self.layout.span(shard)
        return [(a, min(a + self.batch, stop)) for a in range(start, stop, self.batch)]

    def to_json(self) -> str:
        """For ``job.json``."""
        return json.dumps({**asdict(self), "layout": self.layout.to_dict()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """What :meth:`to_json` gave.

        Raises
        ------
        ValueError
            It is something else, or of another version of distdiff.
        """
        try:
            tree = received.parsed(text)
            return cls(**{**tree, "layout": Layout.from_dict(tree["layout"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no plan of this version of distdiff ({error})") from error


def identity(task: Task, data: str, precision: str) -> dict[str, Any]:
    """What must be equal for two commands to be the same job, as plain JSON."""
    about = {
        "format": FORMAT, "version": __version__, "task": task.name, "model": task.model.fingerprint(),
        "data": data, "fingerprint": task.rows.fingerprint, "cells": task.rows.n_cells, "precision": precision,
        **task.identity(), "inherits": task.inherits,
    }  # fmt: skip
    return json.loads(json.dumps(about, default=str))


def difference(existing: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between the identities of two jobs: ``seed: 0 there, 1 here; ...``; empty: nothing."""
    keys = [key for key in {**existing, **new} if existing.get(key) != new.get(key)]
    return "; ".join(f"{key}: {_short(existing.get(key))} there, {_short(new.get(key))} here" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-10:]}"


def make(
    task: Task, identity: dict[str, Any], *, precision: str, batch_size: int | None, shard_cells: int | None
) -> Plan:
    """Plan a job: try some cells, choose layout and batch size, measure how large the result will be."""
    values = _try(task, precision)
    fields = []
    for field in task.fields:
        if field.sparse is None:
            field = replace(field, sparse=field.pays(_density(values[field.path])))
        fields.append(field)
    layout = Layout.fit(task.rows.n_cells, fields, shard_cells)
    final, parts = _bytes(layout, values)
    batch = batch_size or _batch(task, precision, min(layout.rows, task.rows.n_cells))
    return Plan(identity, layout, min(batch, layout.rows), precision, final, parts, uuid.uuid4().hex[:12])


def autocast(device: str, precision: str) -> Any:
    """The context in which networks run."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bfloat16")


def _try(task: Task, precision: str) -> Values:
    """The fields of some rows from four places of the input."""
    n, size = task.rows.n_cells, max(1, PROBE // 4)
    starts = sorted({min(max(0, n - size), int(q * n)) for q in (0.0, 0.25, 0.5, 0.75)}) if n > PROBE else [0]
    size = size if n > PROBE else n
    parts = []
    for start in starts:
        with autocast(task.device, precision), torch.no_grad():
            found, _ = task.compute(task.read(start, start + size))
        for name, values in found.items():
            received.check_answer(values.cpu().numpy() if isinstance(values, torch.Tensor) else values, name, start)
        parts.append({**found, **task.labels(start, start + size)})
    return {key: _stacked([part[key] for part in parts]) for key in parts[0]}


def _stacked(parts: list[Any]) -> Any:
    if sp.issparse(parts[0]):
        return sp.vstack(parts, format="csr")
    return np.concatenate([p.cpu().numpy() if isinstance(p, torch.Tensor) else p for p in parts])


def _density(values: Any) -> float:
    stored = values.nnz if sp.issparse(values) else np.count_nonzero(values)
    return stored / max(1, int(np.prod(values.shape)))


def _bytes(layout: Layout, values: Values) -> tuple[float, float]:
    """Bytes a cell of the result, encoded as it will be, and of the parts of sparse fields."""
    final = parts = 0.0
    for field in layout.fields:
        given = values[field.path]
        n, keep = given.shape[0], dict[str, Any]()
        if field.sparse:
            csr = encoding.csr_of(given, field)
            if csr.nnz:
                for part in ("data", "indices"):
                    keep = {}
                    array = encoding.csr_array(part, field, csr.nnz, csr.nnz, keep)
                    array[:] = getattr(csr, part)
                    final += len(keep["c/0"].to_bytes()) / n
            final, parts = final + 8, parts + csr.nnz / n * (csr.data.itemsize + 4) + 4
            continue
        array = encoding.array_of(
            field, replace(layout, rows=max(layout.chunk, -(-n // layout.chunk) * layout.chunk)), n, keep
        )
        array[:] = encoding.cast(given, field)
        final += sum(len(v.to_bytes()) for k, v in keep.items() if k.startswith("c/")) / n
    return final, parts


def _batch(task: Task, precision: str, most: int) -> int:
    """The batch size with the most cells a second, by trial; one that memory does not hold is too large."""
    best, rate = min(BATCHES[0], most), 0.0
    for size in BATCHES:
        if size > most:
            break
        try:
            block = task.read(0, size)
            took = []
            for _ in range(3):
                began = time.perf_counter()
                with autocast(task.device, precision), torch.no_grad():
                    task.compute(block)
                if task.device.startswith("cuda"):
                    torch.cuda.synchronize()
                took.append(time.perf_counter() - began)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if size / min(took) > 1.05 * rate:
            best, rate = size, size / min(took)
        if sum(took) > PATIENCE or size >= 4 * best:
            break
    return best


def check_room(plan: Plan, folder: Path, done: int, *, h5ad: bool = False) -> str:
    """A message on how many bytes the result takes.

    Raises
    ------
    NoRoom
        The disk cannot hold it.
    """
    cells = plan.layout.n_cells * (1 - done / max(1, plan.layout.n_shards))
    needed = int(cells * (plan.bytes_per_cell * (2 if h5ad else 1) + plan.parts_per_cell))
    free = shutil.disk_usage(folder).free
    message = f"{plan.bytes_per_cell:,.0f} bytes a cell, {_size(plan.layout.n_cells * plan.bytes_per_cell)} in all" + (
        f", and {_size(cells * plan.parts_per_cell)} meanwhile" if plan.parts_per_cell else ""
    )
    if needed > free:
        raise NoRoom(
            errno.ENOSPC, f"{os.fspath(folder)} has {_size(free)} free, the result needs {_size(needed)} ({message}); "
            "free space, write elsewhere, or less: layers=, genes=, dtype='float16'",
        )  # fmt: skip
    return message


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:,.0f} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"
