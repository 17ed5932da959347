"""What the training loop keeps between two logs: losses, norms and rows of its steps, and its waiting for cells."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from distdiff.training.checkpoint import Writer
from distdiff.training.trouble import check_finite, not_finite
from distdiff.types import Cells, Tensor


class Window:
    """Steps since the last log."""

    def __init__(self, start: int, device: torch.device) -> None:
        self.start, self.device = start, device
        self.began = self.ended = self._mark()
        self.came = time.perf_counter()
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.rows: list[Tensor] = []

    def add(self, losses: Tensor, norm: Tensor, rows: Tensor) -> None:
        self.losses.append(losses)
        self.norms.append(norm)
        self.rows.append(rows)

    def check(self, accelerator: Accelerator, writer: Writer) -> None:
        """Stop if a loss or a gradient is not finite; waits for the device."""
        check_finite(accelerator, self.losses, self.norms, self.rows, self.start, writer)

    def means(self, accelerator: Accelerator, waited: float) -> dict[str, Tensor]:
        """Means over processes and steps: loss, gradient norm, share of time ``waited`` for cells.

        And whether anything is ``bad`` (see :meth:`check`). All stays on the device.
        """
        self.ended, loss = self._mark(), torch.cat(self.losses).mean()
        share = torch.full_like(loss, waited / (time.perf_counter() - self.came))
        loss, share = accelerator.reduce(torch.stack((loss, share)), "mean")
        bad = not_finite(accelerator, self.losses, self.norms).any()
        return {"loss": loss, "grad_norm": torch.stack(self.norms).mean(), "data_wait": share, "bad": bad}

    def speed(self, batch: int) -> float:
        """Cells per second, once the means were read."""
        took = self.ended - self.began if isinstance(self.ended, float) else self.began.elapsed_time(self.ended) / 1000
        return len(self.losses) * batch / took

    def _mark(self) -> Any:
        """Now, on the clock of the device, which runs behind the host's."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()  # type: ignore[no-untyped-call]
        return event


def read(numbers: Mapping[str, float | Tensor], scores: Tensor) -> tuple[dict[str, float], list[float]]:
    """All numbers, and ``scores`` (``[n]``), as Python's, in one wait for the device."""
    on_device = {k: v.double() for k, v in numbers.items() if isinstance(v, Tensor)}
    values = torch.cat((torch.stack(list(on_device.values())), scores.double())).tolist()
    of_numbers, of_scores = values[: len(on_device)], values[len(on_device) :]
    return {**numbers, **dict(zip(on_device, of_numbers, strict=True))}, of_scores  # type: ignore[dict-item]


class Waited:
    """Batches, and how long they were waited for; ``named`` in a profiler's trace."""

    def __init__(self, batches: Generator[tuple[int, Cells], None, None], *, named: bool) -> None:
        self.batches, self.named, self.seconds = batches, named, 0.0

    def __iter__(self) -> Iterator[tuple[int, Cells]]:
        while True:
            began = time.perf_counter()
            with torch.profiler.record_function("wait for cells") if self.named else contextlib.nullcontext():
                found = next(self.batches, None)
            self.seconds += time.perf_counter() - began
            if found is None:
                return
            yield found

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
