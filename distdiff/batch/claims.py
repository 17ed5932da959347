"""Who works on what, told by files: any number of processes on any number of hosts share out named units of work.

A claim is a file ``UNIT.GENERATION`` that only one process can create (``O_EXCL``). Where its owner has died, whoever
creates the next generation has taken over, and again only one can: there is nothing to delete and hence no moment in
which two takers both believe they have it. A claim's time of change is its heartbeat.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import psutil

BEAT = 5.0
"""Seconds between heartbeats."""

STALE = 60.0
"""Seconds without a heartbeat after which a process of another host counts as dead. One of this host is looked up."""


class Claims:
    """Claims of this process under one folder; a thread keeps them alive until :meth:`close`."""

    def __init__(self, folder: Path, *, beat: float = BEAT, stale: float = STALE) -> None:
        self.folder, self.beat, self.stale = folder, beat, stale
        folder.mkdir(parents=True, exist_ok=True)
        born = psutil.Process().create_time()
        self._host = _host()
        self._me = json.dumps({"host": self._host, "pid": os.getpid(), "born": born})
        self._held: dict[str, Path] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beats, name="distdiff-heartbeat", daemon=True)
        self._thread.start()

    def take(self, unit: str) -> bool:
        """Claim a unit that nobody has, or whose owner died; false where somebody else has it."""
        last = self._last(unit)
        if last is not None and (self._held.get(unit) == last or not self._dead(last)):
            return False
        generation = 0 if last is None else int(last.suffix[1:]) + 1
        path = self.folder / f"{unit}.{generation}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):  # somebody was faster; the job is finished and its folder gone
            return False
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self._me)
        except OSError:  # the disk is full
            path.unlink(missing_ok=True)
            raise
        self._held[unit] = path
        return True

    def mine(self, unit: str) -> bool:
        """Whether this process still has a unit: not where it slept so long that somebody took over."""
        return unit in self._held and self._last(unit) == self._held[unit]

    def drop(self, unit: str) -> None:
        """Give a unit back, unless somebody took over."""
        mine, path = self.mine(unit), self._held.pop(unit, None)
        if mine and path is not None:
            path.unlink(missing_ok=True)

    def others(self) -> list[str]:
        """``pid PID on HOST`` of every other process at work here."""
        found: dict[str, None] = {}
        for unit in {p.name.rpartition(".")[0] for p in self.folder.iterdir() if p.suffix[1:].isdigit()}:
            last = self._last(unit)
            if last is not None and self._held.get(unit) != last and not self._dead(last):
                owner = _read(last) or {"pid": "?", "host": "?"}
                found[f"pid {owner['pid']} on {owner['host'].split('/')[0]}"] = None
        return list(found)

    def close(self) -> None:
        """Give back what is held and stop the heartbeat."""
        self._stop.set()
        self._thread.join()
        for unit in list(self._held):
            self.drop(unit)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _last(self, unit: str) -> Path | None:
        """The newest claim of a unit."""
        if not (path := self.folder / f"{unit}.0").exists():
            return None
        generation = 0
        while (after := self.folder / f"{unit}.{generation + 1}").exists():
            path, generation = after, generation + 1
        return path

    def _dead(self, path: Path) -> bool:
        owner = _read(path)
        if owner is not None and owner["host"] == self._host:
            return not _alive(owner["pid"], owner["born"])
        try:
            return self._now() - path.stat().st_mtime > self.stale
        except FileNotFoundError:  # given back meanwhile: whoever asks again will get it
            return False

    def _now(self) -> float:
        """The file system's own clock: those of hosts may differ."""
        mark = self.folder / f"clock-{os.getpid()}"
        mark.touch()
        return mark.stat().st_mtime

    def _beats(self) -> None:
        while not self._stop.wait(self.beat):
            for path in list(self._held.values()):
                with contextlib.suppress(OSError):
                    os.utime(path)


def _host() -> str:
    """This host and its table of processes (a container has one of its own)."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _read(path: Path) -> dict[str, Any] | None:
    """Who wrote a claim; ``None`` where it is just being written, or gone."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None


def _alive(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
