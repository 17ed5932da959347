"""Send spools to the tracking server: in a thread beside the training, or later by ``distdiff mlflow sync``."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path

from distdiff.tracking.address import DATABASE, public_uri, tracking_uri
from distdiff.tracking.redact import redacted, short
from distdiff.tracking.registry import Compare
from distdiff.tracking.sender import ProjectMoved, Sender, UnknownRun
from distdiff.tracking.spool import Spool, spools
from distdiff.tracking.transport import silent_seconds

log = logging.getLogger("distdiff")

INTERVAL = 1.0
"""Seconds between two looks at the spool."""

LONGEST_PAUSE = 60.0
"""Most seconds between two attempts to reach a server that fails."""

MOST_SILENCE = 45.0
"""Most seconds that the end of a run waits for answers that do not come; seconds of an upload do not count."""


class BackgroundSender:
    """A thread that sends a spool while the run goes on; it never raises, and only the end of the run waits for it.

    Parameters
    ----------
    sender
        Sends the run's own spool.
    earlier
        Spools that earlier runs of the folder could not send.
    """

    def __init__(self, sender: Sender, earlier: list[Spool]) -> None:
        self.sender, self.earlier = sender, earlier
        self.failure = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="distdiff-mlflow", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, limit: float) -> None:
        """Wait until the rest is sent.

        The wait ends at the first failure, after ``limit`` seconds, or after :data:`MOST_SILENCE` seconds without an
        answer. The thread is a daemon: the end of the process does not wait for it.
        """
        self._closing.set()
        step, silence, deadline = 0.25, 0.0, time.monotonic() + limit
        while self._thread.is_alive() and time.monotonic() < deadline and silence < MOST_SILENCE:
            self._thread.join(step)
            silence += step if silent_seconds() > step else 0.0
        if silence >= MOST_SILENCE and not self.failure:
            self.failure = f"no answer in {silence:.0f} s"

    def _work(self) -> None:
        pause, locked = INTERVAL, False
        with contextlib.ExitStack() as stack:
            while True:
                last = self._closing.is_set()
                try:
                    locked = locked or stack.enter_context(self.sender.lock())
                    if not locked:
                        raise RuntimeError("another process is sending this run")
                    self.sender.send()
                    self.failure, pause = "", INTERVAL
                    self._send_earlier()
                except Exception as error:
                    if not self.failure:
                        log.warning("MLflow cannot be reached (%s); training goes on, and metrics are kept in %s",
                                    described(error), self.sender.spool.path)  # fmt: skip
                    self.failure, pause = described(error), min(2 * pause, LONGEST_PAUSE)
                    last = last or self._closing.is_set()
                if last:
                    return
                self._closing.wait(pause)

    def _send_earlier(self) -> None:
        """Try once to send what earlier runs of the folder could not send to the same server."""
        while self.earlier:
            spool = self.earlier.pop()
            try:
                sender = Sender(spool, self.sender.uri, self.sender.compare)
                if sender.first_uri == public_uri(self.sender.uri or self.sender.first_uri):
                    send_ended_run(sender)
            except Exception as error:
                log.warning("MLflow: %s stays unsent (%s)", spool.path, described(error))


def described(error: Exception) -> str:
    """Return what a log line says about an error: the whole sentence of distdiff's own errors, else a short form."""
    return redacted(error) if isinstance(error, (ProjectMoved, UnknownRun)) else short(error)


def send_ended_run(sender: Sender, *, anew: bool = False) -> str:
    """Send the spool of a run whose process has ended; return a line on what was sent, or nothing."""
    with sender.lock() as locked:
        if not locked:
            return f"{sender.spool.path}: another process is sending it now"
        if anew:
            sender.begin_anew()
        n_sent = sender.send()
        ended = sender.end_run("KILLED")
        if not n_sent:
            return f"run {sender.run_id}: its process ended without closing it, now KILLED" if ended else ""
        registered = f"; {sender.state['registered']}" if "registered" in sender.state else ""
        return f"run {sender.state.get('run_id')}: {n_sent} entries sent{registered}"


def sync(folder: str | Path, compare: Compare | None = None, *, uri: str = "", anew: bool = False) -> list[str]:
    """Send what the runs in a folder (of one run, or of many) could not send while their server was unreachable.

    Only files in a run's own folder are read or removed, even if another person wrote the spool.

    Parameters
    ----------
    compare
        Scores a new model and a champion that was trained on other data.
    uri
        Address of the server; by default MLFLOW_TRACKING_URI, else ``mlflow.db`` here if the runs were begun with it.
        Nothing is sent to a server that only the files in the folder name. A server that a run was not begun with
        receives all of the run.
    anew
        Begin a run again that the server does not have (any more), and send all of it.

    Returns
    -------
    list of str
        One line for each run of which something was sent.

    Raises
    ------
    ValueError
        The folder has no spool, a spool is a symbolic link, or only the folder names the server.
    RuntimeError
        The server cannot be reached, does not have a run, or the project folder was moved.

    Examples
    --------
    >>> sync("/nowhere")
    Traceback (most recent call last):
    ValueError: no run was tracked in /nowhere: there is no mlflow/*.jsonl; give train.out of a run
    """
    found = [spool for run in sorted({path.parents[1] for path in Path(folder).rglob("mlflow/*.jsonl")})
             for spool in spools(run)]  # fmt: skip
    if not found:
        raise ValueError(f"no run was tracked in {folder}: there is no mlflow/*.jsonl; give train.out of a run")
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")  # MLflow changes the variable later
    senders = []
    for spool in found:
        sender = Sender(spool, uri, compare)
        if not uri and sender.pending and sender.first_uri != public_uri(tracking_uri()):
            raise ValueError(_unnamed_server(spool.run_folder, sender.first_uri))
        senders.append(sender)
    lines = [_send_or_explain(sender, anew) for sender in senders]
    return [line for line in lines if line]


def _unnamed_server(folder: Path, first_uri: str) -> str:
    """A sentence on a run whose server the user did not name."""
    database = Path(first_uri.removeprefix("sqlite:///"))
    if first_uri.startswith("sqlite:///") and not database.exists() and Path(DATABASE).exists():
        return (
            f"{folder} was begun with {first_uri}, which does not exist, and nothing was sent: if the project folder "
            f"was moved from {database.parent}, give uri={public_uri(tracking_uri())}"
        )
    return (
        f"{folder} says that its server is {first_uri or 'unknown'}, and nothing was sent: if you know that server and "
        f"trust it, give uri={first_uri or 'ADDRESS'}, or set MLFLOW_TRACKING_URI"
    )


def _send_or_explain(sender: Sender, anew: bool) -> str:
    """Send an ended run; an error says what happened and how many entries stay."""
    try:
        return send_ended_run(sender, anew=anew)
    except (UnknownRun, ProjectMoved) as error:
        raise RuntimeError(
            f"{redacted(error)}; {sender.spool.n_unsent} entries stay in {sender.spool.path}"
        ) from None  # the error may hold a password
    except Exception as error:
        server = public_uri(sender.uri) or sender.first_uri
        raise RuntimeError(
            f"MLflow at {server} cannot be reached ({short(error)}); {sender.spool.n_unsent} entries stay in "
            f"{sender.spool.path}, run the same command again"
        ) from None
