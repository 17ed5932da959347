"""A job by the processes of ``accelerate launch`` or ``torchrun``: rank r computes every world-th missing shard.

Rank 0 owns the output: it plans, lists the shards that are missing, and at the end makes and publishes the result. The
processes meet three times, by gloo: when rank 0 hands out the plan, when all shards are finished, and when the result
is published. A process that dies closes its connections, which ends the others at once; one that is suspended, or a
network that is silent, ends them after :data:`PATIENCE` seconds without a newly finished shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distdiff.batch.job import OneProcess, carry_out
from distdiff.batch.plan import Plan
from distdiff.batch.summary import Summary
from distdiff.batch.workplace import finished_shards
from distdiff.training.peers import Peers

PATIENCE = 1800.0
"""Seconds without a newly finished shard after which a process that waits for the others gives up."""

LONGEST = timedelta(hours=24)
"""The longest that processes wait for rank 0 while it plans, or while it makes the result."""

LOOK = 0.2
"""Seconds between two looks while waiting for the others."""


def run(engine: OneProcess, out: Path, *, progress: bool = True, **options: Any) -> Summary:
    """Do the part of this process; options as for :func:`~distdiff.batch.job.carry_out`.

    Returns
    -------
    Summary
        Of the whole job.

    Raises
    ------
    RuntimeError
        Another process failed, is lost, or finishes nothing any more.
    """
    with Peers() as peers, _group() as group:
        peers.where = lambda: f"before {out} was finished"
        if dist.get_rank(group) == 0:
            return _lead(engine, out, group, progress=progress, **options)
        return _follow(engine, out, group)


class _Leading:
    """The engine of rank 0: it computes its share, and waits for the shares of the others."""

    def __init__(self, engine: OneProcess, group: Any) -> None:
        self.engine, self.group = engine, group
        self.others_listen = True
        """Whether the other ranks wait for a message, rather than compute."""
        self.describe, self.make_plan, self.finish = engine.describe, engine.make_plan, engine.finish

    def compute(self, plan: Plan, work: Path, shards: Sequence[int], look: Callable[[], None]) -> None:
        """See :class:`~distdiff.batch.job.Engine`."""
        _broadcast(self.group, {"plan": plan, "work": work, "shards": shards})
        self.others_listen = False
        self.engine.compute(plan, work, shards[:: dist.get_world_size(self.group)], look)
        _wait_for_all(self.group, work / plan.token, shards, look)
        self.others_listen = True


def _lead(engine: OneProcess, out: Path, group: Any, **options: Any) -> Summary:
    leading = _Leading(engine, group)
    try:
        summary = carry_out(leading, out, **options)
    except Exception as error:
        if leading.others_listen:  # else they end when this process closes its connections
            _broadcast(group, {"error": f"{type(error).__name__}: {error}"})
        raise
    _broadcast(group, {"summary": summary})
    return summary


def _follow(engine: OneProcess, out: Path, group: Any) -> Summary:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    while True:
        message = _broadcast(group)
        if "error" in message:
            raise RuntimeError(f"{out}: rank 0 ended with {message['error']}")
        if "summary" in message:
            return message["summary"]
        plan, work, shards = message["plan"], message["work"], message["shards"]
        if not (work / plan.token).is_dir():
            raise RuntimeError(
                f"rank {rank} does not see {work / plan.token}, which rank 0 made: the output must lie in a folder "
                "that all machines share"
            )
        engine.compute(plan, work, shards[rank::world], _nothing)
        _wait_for_all(group, work / plan.token, shards, _nothing)


def _broadcast(group: Any, message: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send rank 0's message to the others, or receive it."""
    messages: list[Any] = [message]
    dist.broadcast_object_list(messages, src=0, group=group)
    return messages[0]


def _nothing() -> None:
    """Rank 0 alone shows progress."""


def _wait_for_all(group: Any, folder: Path, shards: Sequence[int], look: Callable[[], None]) -> None:
    """Wait until every process has computed its share.

    Raises
    ------
    RuntimeError
        A process is gone, or no shard was finished for :data:`PATIENCE` seconds.
    """
    meeting = dist.barrier(group=group, async_op=True)
    finished, since = -1, time.monotonic()
    while not meeting.is_completed():
        look()
        if (now_finished := len(finished_shards(folder))) != finished:
            finished, since = now_finished, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            world = dist.get_world_size(group)
            late = sorted({i % world for i, shard in enumerate(shards) if shard not in finished_shards(folder)})
            raise RuntimeError(
                f"no shard was finished for {PATIENCE:g} s; ranks {late} have not computed their share; stop the "
                "job, the same command continues it"
            )
        time.sleep(LOOK)
    meeting.wait()


@contextmanager
def _group() -> Iterator[Any]:
    """All processes of the launch as a gloo group, whichever backend the caller uses beside it."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=LONGEST)
    yield dist.new_group(backend="gloo", timeout=LONGEST)
    if ours:
        dist.destroy_process_group()
