"""Compute output shards in this process: reading, the network, and writing go on side by side."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distdiff.batch import output
from distdiff.batch.layout import Values, fetched
from distdiff.batch.plan import Plan, autocast
from distdiff.batch.summary import peak_mib, summed
from distdiff.batch.task import Task
from distdiff.batch.workplace import shard_folder
from distdiff.data.store.pool import cores
from distdiff.tasks.impute import FillCounts

READ_AHEAD, WRITE_BEHIND = 2, 4
"""Batches that are read before they are computed, and computed before they are written."""

WRITERS = 4
"""Threads that copy results from the device and encode them, where there are cores for them."""


class ShardComputer:
    """Computes shards of one job into ``shards`` (a context); several threads may call :meth:`compute` at a time.

    Parameters
    ----------
    shards
        Folder of the finished shards; it must exist.
    """

    def __init__(self, task: Task, plan: Plan, shards: Path) -> None:
        self.task, self.plan, self.shards = task, plan, shards
        self._calls = self._cells_passed = 0
        self._network_lock, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> ShardComputer:
        network = self.task.model.denoiser.to(self.task.device).eval()
        self._hook = network.register_forward_pre_hook(self._count)
        self._reading = ThreadPoolExecutor(1, "distdiff-read")
        self._writing = ThreadPoolExecutor(max(1, min(WRITERS, cores() - 1)), "distdiff-write")
        return self

    def __exit__(self, *error: object) -> None:
        self._reading.shutdown(cancel_futures=True)
        self._writing.shutdown(cancel_futures=True)
        self._hook.remove()

    def compute(self, shards: Iterable[int], after_batch: Callable[[], None] = lambda: None) -> None:
        """Compute and write shards, by number; ``after_batch`` is called after each batch."""
        self._last_written = time.perf_counter()
        read_ahead: deque[tuple[int, int, int, Future[Any]]] = deque()
        being_written: deque[Future[None]] = deque()
        held: dict[int, dict[int, Values]] = {}  # shard -> first row of a batch -> its values
        batches = ((shard, start, stop) for shard in shards for start, stop in self.plan.batches(shard))
        while True:
            while len(read_ahead) <= READ_AHEAD and (batch := next(batches, None)) is not None:
                read_ahead.append((*batch, self._reading.submit(self.task.read, *batch[1:])))
            if not read_ahead:
                break
            shard, start, _, block = read_ahead.popleft()
            values, counts, passes = self._through_network(block.result())
            being_written.append(self._writing.submit(self._keep, held, shard, start, values, counts, passes))
            while len(being_written) > WRITE_BEHIND or (being_written and being_written[0].done()):
                being_written.popleft().result()
            after_batch()
        for written in being_written:
            written.result()

    def _through_network(self, block: Any) -> tuple[Values, Callable[[], FillCounts], dict[str, int]]:
        with self._network_lock:
            calls, cells = self._calls, self._cells_passed
            with autocast(self.task.device, self.plan.precision), torch.no_grad():
                values, counts = self.task.compute(block)
            return values, counts, {"calls": self._calls - calls, "passes": self._cells_passed - cells}

    def _count(self, network: Any, inputs: tuple[Any, ...]) -> None:
        self._calls += 1
        self._cells_passed += len(inputs[0])

    def _keep(
        self, held: dict[int, dict[int, Values]], shard: int, start: int, values: Values,
        counts: Callable[[], FillCounts], passes: dict[str, int],
    ) -> None:  # fmt: skip
        """Copy one batch from the device; write the shard once all its batches are there."""
        layout = self.plan.layout
        batch: Values = {"counts": {"filled": asdict(counts()), **passes}}
        for field in layout.fields:
            if field.path in values:
                batch[field.path] = fetched(values[field.path], field, start)
        with self._lock:
            held.setdefault(shard, {})[start] = batch
            if len(held[shard]) < len(self.plan.batches(shard)):
                return
            batches = [batch for _, batch in sorted(held.pop(shard).items())]
            now = time.perf_counter()
            seconds, self._last_written = now - self._last_written, now
        about = {**summed([batch["counts"] for batch in batches]), "seconds": seconds, "peak_mib": peak_mib()}
        labels = self.task.labels(*layout.span(shard))
        output.write_shard(layout, shard, batches, labels, shard_folder(self.shards, shard), about)
