"""The spool: a file in the run's folder that holds what is to be logged, before anything is sent.

Each entry is one line of JSON, appended by one process. A second file beside it holds what was sent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distdiff import received

log = logging.getLogger("distdiff")

FOLDER = "mlflow"
"""Subfolder of a run's folder that holds its spools."""


class Spool:
    """Entries of one MLflow run in a file, and in a second file how many of them were sent.

    Reading skips a line that a killed process left unfinished. After a kill an entry may be sent a second time; MLflow
    keeps one of two equal metrics.

    Parameters
    ----------
    path
        The file of entries, ``RUN/mlflow/NAME.jsonl``.
    server
        Address of the server, if it is another one than the run was begun with; each server has a state of its own.

    Examples
    --------
    >>> import tempfile
    >>> spool = Spool.create(tempfile.mkdtemp())
    >>> spool.append("metrics", numbers={"loss": 1.5}, step=64)
    >>> [(entry["kind"], entry["step"]) for entry, offset in spool.read(0)], spool.n_unsent
    ([('metrics', 64)], 1)
    """

    def __init__(self, path: Path, server: str = "") -> None:
        self.path = path
        mark = f"-{hashlib.sha256(server.encode()).hexdigest()[:12]}" if server else ""
        self.state_path = path.with_suffix(f".sent{mark}.json")
        self._lock = threading.Lock()
        self._warned = False

    def for_server(self, server: str) -> Spool:
        """Return the same entries with the state of another server than the one that the run was begun with."""
        return Spool(self.path, server)

    @classmethod
    def create(cls, folder: str | Path) -> Spool:
        """Return a new, empty spool of a run's folder."""
        stamp, number = time.strftime("%Y%m%d-%H%M%S"), len(spools(folder))
        return cls(Path(folder) / FOLDER / f"{stamp}-{number:04d}-{os.getpid()}-{os.urandom(4).hex()}.jsonl")

    @classmethod
    def latest(cls, folder: str | Path) -> Spool | None:
        """Return the newest spool of a run's folder; ``None`` if it has none.

        Raises
        ------
        ValueError
            One of its files is a symbolic link.
        """
        found = spools(folder)
        if not found:
            return None
        found[-1].check_links()
        return found[-1]

    def append(self, kind: str, **content: Any) -> None:
        """Add an entry with the time in ms. A disk that cannot be written is logged once; training goes on."""
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **content}).encode()
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab+") as file:
                    size = file.seek(0, os.SEEK_END)
                    if size:
                        file.seek(size - 1)
                        line = line if file.read(1) == b"\n" else b"\n" + line
                    file.write(line + b"\n")
        except OSError as error:
            if not self._warned:
                log.warning("MLflow: %s cannot be written (%s); metrics are lost from here on", self.path, error)
            self._warned = True

    def read(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the whole entries from byte ``offset`` on, each with the offset behind it."""
        if not self.path.exists():
            return
        with received.regular(self.path) as file:
            file.seek(offset)
            while (line := file.readline(received.LARGEST)).endswith(b"\n"):
                offset += len(line)
                try:
                    entry = received.parsed(line)
                    if not isinstance(entry.get("kind"), str):
                        raise ValueError("it has no kind")
                    if entry["kind"] == "metrics" and not isinstance(entry.get("numbers"), dict):
                        raise ValueError("it has no numbers")
                except ValueError:
                    log.warning("MLflow: an entry of %s is incomplete and is left out", self.path)
                    continue
                yield entry, offset

    @property
    def state(self) -> dict[str, Any]:
        """What was sent: ``offset`` (bytes), ``run_id`` and what else the sender needs after a restart."""
        try:
            state = received.json_of(self.state_path)
        except (OSError, ValueError):
            return {}
        offset = state.get("offset", 0)
        return state if type(offset) is int and offset >= 0 else {}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        partial = self.state_path.with_suffix(".part")
        partial.unlink(missing_ok=True)  # a link is removed, not followed
        partial.write_text(json.dumps(state))
        os.replace(partial, self.state_path)

    @property
    def run_folder(self) -> Path:
        """The run's folder, wherever it was moved."""
        return self.path.parents[1]

    def resolve_inside(self, path: str | Path) -> Path | None:
        """Return the real path of a file or folder of the run; ``None`` if it, or a link in it, leads elsewhere.

        Another person may have written the spool and put links into its folder.
        """
        try:
            root, found = self.run_folder.resolve(), (self.run_folder / path).resolve()
            links = (p for folder, folders, names in os.walk(found)
                     for p in (Path(folder, name) for name in (*folders, *names)) if p.is_symlink())  # fmt: skip
            inside = all(p.resolve().is_relative_to(root) for p in (found, *links))
        except (ValueError, OSError, RuntimeError):  # no path, or links that lead in a circle
            return None
        return found if inside else None

    def check_links(self) -> None:
        """Refuse a spool if one of its files is a link: writing to it would write elsewhere.

        Raises
        ------
        ValueError
            One of them is a link (named).
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        for path in (self.path.parent, self.path, self.state_path, self.state_path.with_suffix(".part"), lock):
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link, which no run of distdiff makes; nothing was read or sent")

    @property
    def n_unsent(self) -> int:
        """Number of entries that were not sent."""
        return sum(1 for _ in self.read(self.state.get("offset", 0)))

    @property
    def pending(self) -> bool:
        """Whether something must still be sent: entries, or the end of the run."""
        state = self.state
        return bool(self.n_unsent or (state.get("run_id") and not state.get("ended")))


def spools(folder: str | Path) -> list[Spool]:
    """Return the spools of a run's folder, oldest first."""
    return [Spool(path) for path in sorted((Path(folder) / FOLDER).glob("*.jsonl"))]
