"""A job that any number of processes share: shards are claimed, computed, written, and the last one finishes.

Processes need to see one folder and nothing of each other. What was finished is never done again; a process that dies
costs the shard that it was at; one that comes late takes what is left; the same command goes on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distdiff import files
from distdiff.batch import frame, output, plan
from distdiff.batch.claims import Claims
from distdiff.batch.output import Corrupt, Field, Values
from distdiff.batch.plan import Plan
from distdiff.batch.summary import Summary, peak_mib, summed, together
from distdiff.batch.tasks import Task
from distdiff.data.store.export import named
from distdiff.data.store.pool import cores
from distdiff.tasks.impute import FillCounts

AHEAD, BEHIND = 2, 4
"""Batches read before they are computed, and computed before they are written."""

WRITERS = 4
"""Threads that take answers from the device and encode them, where there are cores for them."""

WAIT = (0.02, 2.0)
"""Seconds between looks at what other processes have finished: at first, and at most."""

PATIENCE = 10.0
"""Seconds after which another job that is at work in the same place is believed to stay."""

KEY = "distdiff"
"""Attribute of a finished result that holds its identity, and in zarr what its files must be."""


def run(
    task: Task, out: str | Path, *, data: str = "", overwrite: bool = False, progress: bool = True,
    batch_size: int | None = None, shard_cells: int | None = None, precision: str = "auto", command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> Summary:  # fmt: skip
    """Do a job, or the share of it that other processes leave to this one, and wait until it is finished.

    Parameters
    ----------
    task
        What to do.
    out
        ``.zarr``, or ``.h5ad`` for what fits one process.
    data
        Name of the input, for provenance.
    overwrite
        Replace a result of another job, and begin anew where another was stopped.
    batch_size, shard_cells
        Cells of a network call and of an output shard; ``None``: found by trial. The first process decides for all.
    precision
        ``float32``, ``bfloat16``; ``auto``: the second on a GPU.
    command, say
        For provenance; where to tell what is written.

    Raises
    ------
    FileExistsError
        Another job is, or was, written there: says what differs.
    OSError
        The disk cannot hold the result, or is full: says how to go on.
    ValueError
        Another suffix, or what the task refuses.
    """
    out = named(out)
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision {precision!r}: auto, float32 or bfloat16 is wanted")
    for name, number in {"batch_size": batch_size, "shard_cells": shard_cells}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1 cell, got {number}")
    if precision == "auto":
        precision = "bfloat16" if task.device.startswith("cuda") else "float32"
    task.model.denoiser.to(task.device).eval()
    job = _Job(task, out, plan.identity(task, data, precision), progress)
    with files.explain_full_disk(out, job.work):
        if not job.open(overwrite, precision, batch_size, shard_cells, say):
            return job.told(finished(out)["records"])
        with job:
            return job.run(command)


def finished(out: Path) -> dict[str, Any]:
    """What a finished result says about itself: ``identity``, ``records``, in zarr ``files``; empty: nothing."""
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


class _Job:
    def __init__(self, task: Task, out: Path, identity: dict[str, Any], progress: bool) -> None:
        self.task, self.out, self.identity, self.progress = task, out, identity, progress
        self.work = out.with_name(f".{out.name}.building")
        self.store, self.parts, self.done = self.work / "store", self.work / "parts", self.work / "done"
        self.calls, self.passed, self.came = 0, 0, time.time()
        self._lock, self._pause = threading.Lock(), WAIT[0]
        self.plan: Plan

    # -- beginning -------------------------------------------------------------------------------------------------

    def open(
        self,
        overwrite: bool,
        precision: str,
        batch_size: int | None,
        shard_cells: int | None,
        say: Callable[[str], None],
    ) -> bool:
        """Join the job, or plan it; false where it is finished already."""
        files.workplace(self.work)
        files.tidy(self.out, say)
        files.evict_build(self.out, self.work, say)
        files.restore(self.out, self.work / "old")
        self._discard(say)
        there = finished(self.out)
        if there.get("identity") == self.identity:
            if (left := self._begun()) is not None and left.identity == self.identity:
                self._leave()  # of a process that was killed after it had published
            return False
        if os.path.lexists(self.out) and not overwrite:
            what = f" with another job ({plan.difference(there['identity'], self.identity)})" if there else ""
            raise FileExistsError(f"{self.out} exists already{what}; give --overwrite to replace it, or another name")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.claims = Claims(self.work / "claims")
        try:
            while (begun := self._begun()) is None or begun.identity != self.identity:
                if self._over():  # another process finished it since, and its folder is gone
                    self.claims.close()
                    self._leave()
                    return False
                if begun is not None:
                    self._replace(begun, overwrite)
                elif self.claims.take("plan") and self._begun() is None:
                    self._plan(precision, batch_size, shard_cells)
                else:
                    time.sleep(0.05)
            self.plan = begun
            said = plan.check_room(begun, self.out.parent, len(self._done()), h5ad=self.out.suffix == ".h5ad")
        except BaseException:
            self.claims.close()
            if self._begun() is None and not self.claims.others():
                files.remove(self.work)
            raise
        say(said)
        return True

    def _begun(self) -> Plan | None:
        """The plan that lies in the work folder."""
        try:
            return Plan.from_json((self.work / "job.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{self.work / 'job.json'} cannot be read: {error}; another process is at work there: wait for it, "
                "then run the same command again"
            ) from error

    def _discard(self, say: Callable[[str], None]) -> None:
        """Remove a work folder whose plan cannot be read, of another version perhaps, unless somebody is at work there.

        Raises
        ------
        ValueError
            Somebody is.
        """
        while True:
            try:
                self._begun()
                return
            except ValueError as error:
                claims = Claims(self.work / "claims")
                try:
                    if claims.others() and time.time() - self.came > PATIENCE:
                        raise
                    if not claims.others() and claims.take("replace") and self._unreadable():
                        self._leave()
                        say(f"{error.__cause__}: {self.work} removed, it was left by another version of distdiff")
                finally:
                    claims.close()
            time.sleep(0.05)

    def _unreadable(self) -> bool:
        try:
            self._begun()
        except ValueError:
            return True
        return False

    def _plan(self, precision: str, batch_size: int | None, shard_cells: int | None) -> None:
        made = plan.make(self.task, self.identity, precision=precision, batch_size=batch_size, shard_cells=shard_cells)
        plan.check_room(made, self.out.parent, 0, h5ad=self.out.suffix == ".h5ad")
        for field in made.layout.fields:
            if not field.sparse:
                output.metadata(self.store, field, made.layout)
        self.done.mkdir(parents=True, exist_ok=True)
        output.put(self.work / "job.json", made.to_json().encode())

    def _replace(self, begun: Plan, overwrite: bool) -> None:
        """Throw away what another job left, if that is asked for and nobody is at it; one process does."""
        others, odd = self.claims.others(), plan.difference(begun.identity, self.identity)
        if others and (not overwrite or time.time() - self.came > PATIENCE):
            raise FileExistsError(
                f"{self.out} is being written by another job now ({', '.join(others)}), which differs: {odd}; wait for "
                "it, or choose another name"
            )
        if not overwrite:
            raise FileExistsError(
                f"{self.out} was begun by another job and is not finished; it differs: {odd}; give --overwrite to "
                "begin anew, or another name"
            )
        if others or not self.claims.take("replace"):  # perhaps by one that replaces it just now
            time.sleep(0.05)
            return
        if (still := self._begun()) is not None and still.identity == begun.identity:
            self.claims.close()
            self._leave()
            self.claims = Claims(self.work / "claims")

    def __enter__(self) -> _Job:
        self._hook = self.task.model.denoiser.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self.claims.close()

    def _count(self, network: Any, inputs: tuple[Any, ...]) -> None:
        self.calls += 1
        self.passed += len(inputs[0])

    # -- the work --------------------------------------------------------------------------------------------------

    def run(self, command: str) -> Summary:
        layout = self.plan.layout
        shards = [f"shard-{i:06d}" for i in range(layout.n_shards)]
        with self._bar() as self.bar:
            try:
                self._all(shards, command)
            except FileNotFoundError:
                if not self._over():  # else another process has just published, and removed the work folder
                    raise
            self._show(layout.n_shards)
        return self.told(finished(self.out)["records"])

    def _all(self, shards: Sequence[str], command: str) -> None:
        """Shards, then what is joined of them, then the rest."""
        while self._pending(shards):
            if not self._shards(shards):
                self._wait()
        if self._over():
            return
        records = self._records(shards)
        joins = self._joins(records)
        while self._pending(joins):
            for unit in self._free(joins):
                self._join(unit, records)
            self._wait()
        while not self._over():
            if self.claims.take("finish") and not self._over():
                self._finish(dict(zip(shards, records, strict=True)), joins, command)
            else:
                self._wait()

    def _over(self) -> bool:
        """Whether somebody has published the result."""
        return finished(self.out).get("identity") == self.identity

    def _done(self) -> set[str]:
        try:
            return {name.removesuffix(".json") for name in os.listdir(self.done) if name.endswith(".json")}
        except FileNotFoundError:
            return set()

    def _pending(self, units: Sequence[str]) -> list[str]:
        if not units or not self.done.exists():
            return []
        done = self._done()
        return [] if self._gone() else [unit for unit in units if unit not in done]

    def _gone(self) -> bool:
        return not (self.work / "job.json").exists()

    def _free(self, units: Sequence[str]) -> Iterator[str]:
        """Claim, one after another, units that nobody has finished or is at."""
        for unit in self._pending(units):
            if self.claims.take(unit):
                if (self.done / f"{unit}.json").exists():  # finished since
                    self.claims.drop(unit)
                else:
                    self._pause = WAIT[0]
                    yield unit

    def _shards(self, shards: Sequence[str]) -> int:
        """Compute free shards: reading, computing and writing go on side by side."""
        ahead: deque[tuple[str, int, int, Future[Any]]] = deque()
        behind: deque[Future[None]] = deque()
        batches = self._batches(shards)
        self._began, some = time.perf_counter(), 0
        self._held: dict[str, dict[int, Values]] = {}
        writers = max(1, min(WRITERS, cores() - 1))
        with (
            ThreadPoolExecutor(1, "distdiff-read") as reading,
            ThreadPoolExecutor(writers, "distdiff-write") as writing,
        ):
            while True:
                while len(ahead) <= AHEAD and (following := next(batches, None)) is not None:
                    unit, a, b = following
                    ahead.append((unit, a, b, reading.submit(self.task.read, a, b)))
                if not ahead:
                    break
                unit, a, b, block = ahead.popleft()
                calls, passed = self.calls, self.passed
                with plan.autocast(self.task.device, self.plan.precision), torch.no_grad():
                    values, filled = self.task.compute(block.result())
                some += 1
                record = {"calls": self.calls - calls, "passes": self.passed - passed}
                behind.append(writing.submit(self._keep, unit, a, b, values, filled, record))
                while len(behind) > BEHIND or (behind and behind[0].done()):
                    behind.popleft().result()
                self._show()
            for future in behind:
                future.result()
        return some

    def _batches(self, shards: Sequence[str]) -> Iterator[tuple[str, int, int]]:
        for unit in self._free(shards):
            start, stop = self.plan.layout.span(output.number(unit))
            for a in range(start, stop, self.plan.batch):
                yield unit, a, min(a + self.plan.batch, stop)

    def _keep(
        self, unit: str, a: int, b: int, values: Values, filled: Callable[[], FillCounts], record: dict[str, Any]
    ) -> None:
        """Take one batch's answer from the device; write the shard when it is whole."""
        layout = self.plan.layout
        taken = {"record": {"filled": asdict(filled()), **record}}
        for field in layout.fields:
            if field.path in values:
                taken[field.path] = output.fetched(values[field.path], field, a)
        start, stop = layout.span(output.number(unit))
        with self._lock:
            held = self._held.setdefault(unit, {})
            held[a] = taken
            if len(held) < len(range(start, stop, self.plan.batch)):
                return
            batches = [values for _, values in sorted(self._held.pop(unit).items())]
        if not self.claims.mine(unit):  # this process slept, and somebody took over
            return
        labels = self.task.labels(start, stop)
        written = output.write(layout, output.number(unit), batches, labels, self.store, self.parts)
        with self._lock:
            now = time.perf_counter()
            seconds, self._began = now - self._began, now
        done = summed([batch["record"] for batch in batches])
        record = {**written, **done, "seconds": seconds, "peak_mib": peak_mib()}
        output.put(self.done / f"{unit}.json", json.dumps(record).encode())

    # -- joining and finishing -------------------------------------------------------------------------------------

    def _records(self, units: Sequence[str]) -> list[dict[str, Any]]:
        return [json.loads((self.done / f"{unit}.json").read_text()) for unit in units]

    def _sparse(self) -> list[Field]:
        return [field for field in self.plan.layout.fields if field.sparse]

    def _joins(self, records: Sequence[dict[str, Any]]) -> list[str]:
        """Shards of the final CSR arrays."""
        found = []
        for field in self._sparse():
            total = sum(record["nnz"][field.path] for record in records)
            found += [f"join-{field.name}-{i:06d}" for i in range(-(-total // output.runs(total)[1]))]
        return found

    def _join(self, unit: str, records: Sequence[dict[str, Any]]) -> None:
        field = next(f for f in self._sparse() if unit.startswith(f"join-{f.name}-"))
        nnz = [record["nnz"][field.path] for record in records]
        for shard, _, _ in output.cut_from(nnz, output.number(unit)):
            parts = {k: v for k, v in records[shard]["parts"].items() if k.startswith(f"{field.name}/")}
            if bad := output.check(self.parts, parts):
                raise Corrupt(
                    f"{self.parts / bad[0]} (shard {shard}) differs from what was written: run the same command with "
                    "--verify --repair"
                )
        written = output.join(self.parts, self.store, field, nnz, output.number(unit))
        output.put(self.done / f"{unit}.json", json.dumps({"files": written}).encode())

    def _finish(self, shards: dict[str, dict[str, Any]], joins: Sequence[str], command: str) -> None:
        """All that is left once every value is written; whoever does it publishes the result."""
        for name in (".*.tmp", "*.partial"):  # of a process that was killed while it wrote: our names and zarr's
            for left in self.store.rglob(name):
                left.unlink()
        records, layout = list(shards.values()), self.plan.layout
        units = {**shards, **dict(zip(joins, self._records(joins), strict=True))}
        known = {unit: record["files"] for unit, record in units.items()}
        with frame.as_zarr(self.store) as root:
            for field in self._sparse():
                output.finish_csr(root, self.parts, self.store, field, layout, [r["nnz"][field.path] for r in records])
            whole = together(records)
            whole["peak_mib"] = max(whole["peak_mib"], peak_mib())
            summary = self.told([whole])
            about = {
                **self.task.provenance(), **self.task.about(), **asdict(summary), "seed": getattr(self.task, "seed", 0),
                "model_sha256": self.identity["model"], "input": self.identity["data"], "command": command,
                "batch_size": self.plan.batch, "precision": self.plan.precision,
            }  # fmt: skip
            told = {"identity": self.identity, "records": [whole]}
            if self.out.suffix == ".zarr":
                result = self.store
                frame.build(root, self.task, layout.fields)
                frame.write_uns(root, about)
                known["rest"] = output.others(self.store, known)
                told |= {"plan": json.loads(self.plan.to_json()), "files": known,
                         "nnz": {f.path: [r["nnz"][f.path] for r in records] for f in self._sparse()}}  # fmt: skip
                root.attrs[KEY] = told
                frame.consolidate(self.store)
            else:
                result = self.work / "result.h5ad"
                frame.to_h5ad(root, result, self.task, layout.fields)
                frame.write_uns_h5ad(result, about, KEY, json.dumps(told))
        if not self.claims.mine("finish"):
            return
        files.publish(result, self.out, self.work / "old")
        self._leave()

    def _leave(self) -> None:
        files.remove_at_once(self.work)

    def told(self, records: Sequence[dict[str, Any]]) -> Summary:
        reader = getattr(self.task, "reader", None)
        about = {"genes": len(self.task.genes)}
        if reader is not None:
            about |= {"genes_unknown_to_model": reader.unknown, "genes_absent_from_input": reader.absent}
        return Summary.of(records, **about)

    # -- telling ---------------------------------------------------------------------------------------------------

    def _bar(self) -> Any:
        cells = self.task.rows.n_cells
        done = min(cells, sum(u.startswith("shard-") for u in self._done()) * self.plan.layout.rows)
        self._looked = 0.0
        return tqdm(total=cells, initial=done, unit=" cells", unit_scale=True, desc=self.task.name, mininterval=1.0,
                    disable=not self.progress)  # fmt: skip

    def _show(self, done: int | None = None) -> None:
        """Move the bar to what all processes have finished."""
        if not self.progress or (done is None and time.perf_counter() - self._looked < 0.5):
            return
        self._looked = time.perf_counter()
        done = sum(u.startswith("shard-") for u in self._done()) if done is None else done
        cells = min(self.task.rows.n_cells, done * self.plan.layout.rows)
        self.bar.update(max(0, cells - self.bar.n))

    def _wait(self) -> None:
        """Wait for other processes, ever longer."""
        self._show()
        time.sleep(self._pause)
        self._pause = min(1.5 * self._pause, WAIT[1])
