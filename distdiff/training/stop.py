"""When to save and when to leave: signals, time limits, time since the last save; all processes agree."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they kill: Kubernetes and torchrun the first, SLURM (--signal=USR1@120) either."""

MARGIN = 90.0
"""Seconds before the end of a SLURM job at which a run saves and leaves by itself."""

EXCHANGE = timedelta(minutes=10)
"""How long an exchange waits for a process that lives: one may read from a slow disk, compile, write a checkpoint."""

REPEAT = 5.0
"""Seconds in which a signal that comes again is the same request: SLURM signals a whole job, and launchers do too."""

GO_ON, SAVE, LEAVE = 0, 1, 2


class Stopped(KeyboardInterrupt):
    """Training was asked to stop; all is saved, and the same command goes on."""

    code = 75
    """Exit status (EX_TEMPFAIL, try again): neither success, so that schedulers requeue, nor a failure of the run."""


class Stop:
    """Watches for reasons to save or to leave while training goes on (a context).

    Every process may have its own reason, and clocks differ, so processes agree by the maximum over all, on a group of
    its own (gloo: no device waits for it). The answer of a step is what was asked before the step before: the exchange
    has the length of a step to finish, and nobody waits.

    Parameters
    ----------
    every
        Minutes between saves.
    minutes
        Minutes from now after which to leave; 0: a SLURM job leaves 90 s before its end, others never.
    """

    def __init__(self, every: float, minutes: float = 0.0, environment: Mapping[str, str] = os.environ) -> None:
        self.every, self.reason = 60 * every, ""
        self.limit, self.saved_at = _limit(minutes, environment), time.monotonic()
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=EXCHANGE) if several else None
        self.asked = torch.zeros(1, dtype=torch.int32)
        self.pending: dist.Work | None = None
        self.before: dict[signal.Signals, Any] = {}
        self.received: dict[int, float] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python knows no other place for handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.pending is not None and kind is None:
            self.pending.wait()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The first signal is a request; one that comes after `REPEAT` seconds does what it always did."""
        now = time.monotonic()
        if number not in self.received:
            self.reason, self.received[number] = signal.Signals(number).name, now
        elif now - self.received[number] > REPEAT:
            signal.signal(number, self.before[signal.Signals(number)])
            os.kill(os.getpid(), number)

    def agreed(self) -> int:
        """``GO_ON``, ``SAVE`` or ``LEAVE``, the same on every process; call it once a step."""
        if self.group is None:
            return self._wish()
        answer = GO_ON
        if self.pending is not None:
            self.pending.wait()
            answer = int(self.asked)
        self.asked = torch.tensor([self._wish()], dtype=torch.int32)
        self.pending = dist.all_reduce(self.asked, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer

    def saved(self) -> None:
        """A checkpoint was just taken."""
        self.saved_at = time.monotonic()

    def _wish(self) -> int:
        now = time.monotonic()
        if now >= self.limit:
            self.reason = self.reason or "the time limit"
        if self.reason:
            return LEAVE
        return SAVE if now - self.saved_at >= self.every else GO_ON


def _limit(minutes: float, environment: Mapping[str, str]) -> float:
    """When to leave, on the monotonic clock."""
    limits = [60 * minutes] if minutes else []
    if end := environment.get("SLURM_JOB_END_TIME"):
        limits.append(max(0.0, float(end) - MARGIN - time.time()))
    return time.monotonic() + min(limits, default=float("inf"))
