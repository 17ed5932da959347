"""Who sends and when: a thread beside the training, or ``distdiff mlflow sync`` later."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

from distdiff.tracking.address import public, where
from distdiff.tracking.registry import Judge
from distdiff.tracking.sender import Gone, Sender, short
from distdiff.tracking.spool import Spool, spools

log = logging.getLogger("distdiff")

EVERY = 1.0
"""Seconds between looks at the spool."""

SLOWEST = 60.0
"""Most seconds between two attempts to reach a server that is away."""


class Courier:
    """A thread that sends a spool while the run goes on. It never raises, and nothing waits for it but the end."""

    def __init__(self, sender: Sender, others: list[Spool]) -> None:
        self.sender, self.others = sender, others
        self.away = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="distdiff-mlflow", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, limit: float) -> None:
        """Send the rest; give up at the first failure, or after ``limit`` seconds."""
        self._closing.set()
        self._thread.join(limit)

    def _work(self) -> None:
        pause, mine = EVERY, False
        with contextlib.ExitStack() as held:
            while True:
                last = self._closing.is_set()
                try:
                    mine = mine or held.enter_context(self.sender.alone())
                    if not mine:
                        raise RuntimeError("another process is sending this run")
                    self.sender.send()
                    self.away, pause = "", EVERY
                    self._older()
                except Exception as error:
                    if not self.away:
                        log.warning("MLflow is away (%s); training goes on, metrics are kept in %s", short(error),
                                    self.sender.spool.path)  # fmt: skip
                    self.away, pause = short(error), min(2 * pause, SLOWEST)
                    last = last or self._closing.is_set()
                if last:
                    return
                self._closing.wait(pause)

    def _older(self) -> None:
        """What earlier runs of the folder could not send to the same server; tried once."""
        while self.others:
            spool = self.others.pop()
            try:
                sender = Sender(spool, self.sender.uri, self.sender.judge)
                if sender.home == public(self.sender.uri or self.sender.home):
                    deliver(sender)
            except Exception as error:
                log.warning("MLflow: %s stays unsent (%s)", spool.path, short(error))


def deliver(sender: Sender, *, anew: bool = False) -> str:
    """Send a spool whose process is gone; what was done in words, or empty."""
    with sender.alone() as mine:
        if not mine:
            return f"{sender.spool.path}: being sent by another process now"
        if anew:
            sender.begin_anew()
        sent = sender.send()
        closed = sender.close("KILLED")
        if not sent:
            return f"run {sender.run_id}: its process was gone, now KILLED" if closed else ""
        registered = f"; {sender.state['registered']}" if "registered" in sender.state else ""
        return f"run {sender.state.get('run_id')}: {sent} entries sent{registered}"


def sync(folder: str | Path, judge: Judge | None = None, *, uri: str = "", anew: bool = False) -> list[str]:
    """Send what runs in ``folder`` (of one run, or of many) could not send while their server was away.

    Of a run only what lies in its own folder is read or removed, whoever wrote it.

    Parameters
    ----------
    judge
        Scores a new model and a champion that was trained on other data.
    uri
        The server; by default that of MLFLOW_TRACKING_URI, else ``mlflow.db`` here if the runs were begun with it. A
        server that only the runs' folders name is not sent to. A server that a run was not begun with is sent all.
    anew
        A run that the server does not know any more is begun anew there, and all of it sent.

    Returns
    -------
    list of str
        What was done, a line a run.

    Raises
    ------
    ValueError
        No spool there, one that is a link, or a server that nobody but the folder has named.
    RuntimeError
        The server is still away.
    """
    found = [spool for run in sorted({path.parents[1] for path in Path(folder).rglob("mlflow/*.jsonl")})
             for spool in spools(run)]  # fmt: skip
    if not found:
        raise ValueError(f"no run was tracked in {folder}: there is no mlflow/*.jsonl; give train.out of a run")
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")  # MLflow changes it
    lines, senders = [], []
    for spool in found:
        sender = Sender(spool, uri, judge)
        if not uri and sender.due and sender.home != public(where()):
            raise ValueError(
                f"{spool.run} says that its server is {sender.home or 'unknown'}, and nothing was sent: if you know "
                f"that server and trust it, give --uri {sender.home or 'ADDRESS'}, or set MLFLOW_TRACKING_URI"
            )
        senders.append(sender)
    for sender in senders:
        try:
            lines.append(deliver(sender, anew=anew))
        except Gone as error:
            raise RuntimeError(f"{error}; {sender.spool.left} entries stay in {sender.spool.path}") from error
        except Exception as error:
            home = public(sender.uri) or sender.home
            raise RuntimeError(
                f"MLflow at {home} is away ({short(error)}); {sender.spool.left} entries stay in "
                f"{sender.spool.path}, run the same command again"
            ) from error
    return [line for line in lines if line]
