"""The same job by the workers of a dask cluster: each takes shards as any other process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distdiff.batch.summary import Summary
from distdiff.cluster import WorkerWatch, connect, explained
from distdiff.files import is_url
from distdiff.model import Model

LOOK = 0.5
"""Seconds between looks at who is there."""


def on_cluster(
    scheduler: str, kind: str, load: Callable[[], Model], data: str | Path | None, out: str | Path, *,
    say: Callable[[str], None] = lambda text: None, **options: Any,
) -> Summary:  # fmt: skip
    """Do a task on files on a dask cluster whose workers see them: one task a worker, one worker a GPU.

    A worker that joins later takes part too; one that dies or leaves costs the shard that it was at, which others do.

    Parameters
    ----------
    scheduler
        Address, ``tcp://...``.
    load
        Called by every worker for its model, ``functools.partial(distdiff.load, "models:/NAME@champion")``.
    **options
        Of :func:`distdiff.batch.run`.

    Raises
    ------
    OSError
        No scheduler with workers answers there, it is lost, or its workers left and none came for ten minutes.
    """
    paths = [None if p is None else p if is_url(p) else str(Path(p).absolute()) for p in (data, out)]
    with explained(scheduler), connect(scheduler) as client:
        shares: dict[str, Any] = {}  # of each worker
        seen, told, watch = 0, 0, WorkerWatch(client, say)
        while True:
            here = watch.workers()
            for gone in shares.keys() - here:
                del shares[gone]  # it is bound to its worker and would wait for it for ever
            for new in sorted(here - shares.keys()):
                shares[new] = client.submit(_work, kind, load, *paths, seen, options, workers=[new], pure=False)
                seen += 1
            if len(shares) != told:
                told = len(shares)
                say(f"{told} workers")
            for share in shares.values():
                if share.done():  # with the whole job: whoever finds nothing to do waits for the others
                    return share.result()
            time.sleep(LOOK)


def _work(
    kind: str, load: Callable[[], Model], data: str | None, out: str, index: int, options: dict[str, Any]
) -> Summary:
    """One worker's share."""
    import torch

    from distdiff import batch

    if options.get("device", "auto") == "auto" and torch.cuda.is_available():
        options = {**options, "device": f"cuda:{index % torch.cuda.device_count()}"}
    return batch.run(kind, load(), data, out, progress=False, **options)
