"""The same job by the workers of a dask cluster: each takes shards as any other process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distdiff.batch.summary import Summary
from distdiff.data.cluster import connect, explained
from distdiff.files import is_url
from distdiff.model import Model


def on_cluster(
    scheduler: str, kind: str, load: Callable[[], Model], data: str | Path | None, out: str | Path, *,
    say: Callable[[str], None] = lambda text: None, **options: Any,
) -> Summary:  # fmt: skip
    """Do a task on files on a dask cluster whose workers see them: one task a worker, one worker a GPU.

    A worker that joins the cluster later takes no part; one that dies leaves its shard to the others.

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
        No scheduler with workers answers there, or it is lost.
    """
    with explained(scheduler), connect(scheduler) as client:
        workers = list(client.scheduler_info(n_workers=-1)["workers"])
        paths = [None if p is None else p if is_url(p) else str(Path(p).absolute()) for p in (data, out)]
        say(f"{len(workers)} workers")
        futures = [
            client.submit(_work, kind, load, *paths, i, options, workers=[w], pure=False, key=f"distdiff-{kind}-{i}")
            for i, w in enumerate(workers)
        ]
        return client.gather(futures)[0]


def _work(
    kind: str, load: Callable[[], Model], data: str | None, out: str, index: int, options: dict[str, Any]
) -> Summary:
    """One worker's share."""
    import torch

    from distdiff import batch

    if options.get("device", "auto") == "auto" and torch.cuda.is_available():
        options = {**options, "device": f"cuda:{index % torch.cuda.device_count()}"}
    return batch.run(kind, load(), data, out, progress=False, **options)
