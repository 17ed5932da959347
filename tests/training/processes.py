"""Training in processes of its own (tests/forkserver.py)."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forkserver import process


def train(config, log: str, environment: Mapping[str, str], prepare: Callable[..., None] | None, given: Any) -> None:
    """Run one rank; its losses and history go to ``<log>.json``, what it says to ``<log>.txt``."""
    with open(f"{log}.txt", "a", buffering=1) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.enable()
    os.environ.update(environment)
    import torch

    from distdiff import experiment
    from distdiff.training import loop
    from distdiff.training.peers import Lost
    from distdiff.training.stop import Stopped

    torch.set_num_threads(1)
    losses: list[float] = []
    real = loop.train

    def fit(recipe, accelerator, hooks, **kwargs):
        hooks = dataclasses.replace(hooks, on_step=lambda step, loss: losses.append(float(loss)))
        return real(recipe, accelerator, hooks, **kwargs)

    experiment.fit = fit
    if prepare is not None:
        prepare(given)
    try:
        history = experiment.train(config).progress.history
        Path(f"{log}.json").write_text(json.dumps([losses, history]))
    except (Stopped, Lost) as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.code)


def start(
    config, log: Path, *, world: int = 1, environment: Mapping[str, str] | None = None,
    prepare: Callable[..., None] | None = None, given: Any = None,
) -> list[BaseProcess]:  # fmt: skip
    """Start the ranks of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        own = dict(environment or {})
        if world > 1:
            own |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        ranks.append(process(train, (config, f"{log}.{rank}", own, prepare, given)))
        ranks[-1].start()
    return ranks


def finish(ranks: Sequence[Any], seconds: float = 90) -> list[int | None]:
    """Exit codes; whoever is late is killed and has none."""
    until = time.monotonic() + seconds
    try:
        for rank in ranks:
            rank.join(max(0.0, until - time.monotonic()))
        return [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(10)


def run(config, log: Path, **how: Any) -> list[list[Any]]:
    """Train to the end; ``[losses, history]`` of every rank."""
    codes = finish(start(config, log, **how))
    assert set(codes) == {0}, f"{codes}\n" + "\n".join(
        Path(f"{log}.{i}.txt").read_text()[-3000:] for i in range(len(codes))
    )
    return [json.loads(Path(f"{log}.{i}.json").read_text()) for i in range(len(codes))]
