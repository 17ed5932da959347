"""What a run has to tell, on disk before anything is sent: JSON lines, appended by one process."""

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
"""Where spools lie in the folder of a run."""


class Spool:
    """One file of entries, and beside it what of them was sent.

    A line cut short by a kill is passed over when read. Entries may be sent twice after a kill, so whoever sends them
    must not mind; MLflow keeps one of two equal metrics.

    Parameters
    ----------
    path
        The file.
    server
        Address of the server that is told, if it is another one than the run was begun with; each has its own state.
    """

    def __init__(self, path: Path, server: str = "") -> None:
        self.path = path
        mark = f"-{hashlib.sha256(server.encode()).hexdigest()[:12]}" if server else ""
        self._state = path.with_suffix(f".sent{mark}.json")
        self._lock = threading.Lock()
        self._told = False

    def to(self, server: str) -> Spool:
        """The same entries, and what of them was sent to another server than the one the run was begun with."""
        return Spool(self.path, server)

    @classmethod
    def of(cls, folder: str | Path, *, again: bool = False) -> Spool:
        """A new spool of a run's folder; ``again``: the newest one there, if any, to be continued."""
        found = spools(folder)
        if again and found:
            found[-1].check_links()
            return found[-1]
        stamp = time.strftime("%Y%m%d-%H%M%S")
        return cls(Path(folder) / FOLDER / f"{stamp}-{len(found):04d}-{os.getpid()}-{os.urandom(4).hex()}.jsonl")

    def append(self, kind: str, **what: Any) -> None:
        """Add an entry with the time (ms). A disk that cannot take it is told once; training goes on."""
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **what}).encode()
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
            if not self._told:
                log.warning("MLflow: %s cannot be written (%s); metrics are lost from here on", self.path, error)
            self._told = True

    def read(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Whole entries from byte ``offset`` on, each with the offset behind it."""
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
                    log.warning("MLflow: an entry of %s was cut short and is left out", self.path)
                    continue
                yield entry, offset

    @property
    def state(self) -> dict[str, Any]:
        """What was sent: ``offset``, ``run_id`` and what else the sender must know again."""
        try:
            state = received.json_of(self._state)
        except (OSError, ValueError):
            return {}
        offset = state.get("offset", 0)
        return state if type(offset) is int and offset >= 0 else {}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        partial = self._state.with_suffix(".part")
        partial.unlink(missing_ok=True)  # never through a link
        partial.write_text(json.dumps(state))
        os.replace(partial, self._state)

    @property
    def run(self) -> Path:
        """The run's folder, which may have moved since."""
        return self.path.parents[1]

    def inside(self, path: str | Path) -> Path | None:
        """Where a file or folder of the run lies, links resolved; ``None``: outside of the run's folder.

        A spool may be somebody else's, and so may be links that lie in its folder.
        """
        try:
            root, found = self.run.resolve(), (self.run / path).resolve()
            links = (p for folder, folders, names in os.walk(found)
                     for p in (Path(folder, name) for name in (*folders, *names)) if p.is_symlink())  # fmt: skip
            inside = all(p.resolve().is_relative_to(root) for p in (found, *links))
        except (ValueError, OSError, RuntimeError):  # no path at all, or links that go round in circles
            return None
        return found if inside else None

    def check_links(self) -> None:
        """Refuse a spool of which a file is a link: what is written to it would be written elsewhere.

        Raises
        ------
        ValueError
            One is (named).
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        beside = (self.path, self._state, self._state.with_suffix(".part"), lock)
        for path in (self.path.parent, *beside):
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link, which no run of distdiff makes; nothing was read or sent")

    @property
    def left(self) -> int:
        """Entries that were not sent yet."""
        return sum(1 for _ in self.read(self.state.get("offset", 0)))

    @property
    def due(self) -> bool:
        """Whether the server is still to be told something: entries, or that the run is over."""
        state = self.state
        return bool(self.left or (state.get("run_id") and not state.get("ended")))


def spools(folder: str | Path) -> list[Spool]:
    """Those of a run's folder, oldest first."""
    return [Spool(path) for path in sorted((Path(folder) / FOLDER).glob("*.jsonl"))]
