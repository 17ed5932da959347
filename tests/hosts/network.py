"""Two hosts out of one machine: network namespaces with names and addresses of their own, and a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


class Unavailable(Exception):
    """No namespaces can be made here; says why."""


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise Unavailable(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Host:
    """One of them; its processes share this machine's files."""

    namespace: str
    name: str
    address: str
    device: str
    processes: list[subprocess.Popen] = field(default_factory=list)

    def start(self, program: str, *words: object, log: Path, **environment: str) -> subprocess.Popen:
        """Start a program of the Python environment as if on this host; what it says is added to ``log``."""
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "bash", "-c", 'hostname $0; exec "$@"']
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as said:
            process = subprocess.Popen(
                [*inside, self.name, BIN / program, *map(str, words)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said,
                stderr=said, env={**os.environ, **own, **environment},
            )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, program: str, *words: object, log: Path, seconds: float = 90, **environment: str) -> str:
        """Run a program to its end; what it said."""
        code = self.start(program, *words, log=log, **environment).wait(seconds)
        assert code == 0, f"{program} ended with {code}:\n{log.read_text()[-4000:]}"
        return log.read_text()

    def kill(self) -> None:
        """End all processes of this host at once."""
        until = time.monotonic() + 10
        while (left := ip("netns", "pids", self.namespace).split()) and time.monotonic() < until:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        for process in self.processes:
            process.wait(10)

    def plug(self, state: str) -> None:
        """Pull its network cable (``down``), or put it back (``up``)."""
        ip("-n", self.namespace, "link", "set", self.device, state)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nobody else; all that they ran is ended with the block.

    Raises
    ------
    Unavailable
        Namespaces cannot be made here.
    """
    if os.geteuid():
        raise Unavailable("network namespaces need root")
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            raise Unavailable(f"network namespaces need {tool} (Debian: iproute2, util-linux, hostname)")
    hosts = tuple(
        Host(f"distdiff{os.getpid()}{x}", f"host-{x}", f"10.77.0.{i}", f"dd{x}") for i, x in ((1, "a"), (2, "b"))
    )
    a, b = hosts
    with contextlib.ExitStack() as undo:
        for host in hosts:
            ip("netns", "add", host.namespace)
            undo.callback(ip, "netns", "delete", host.namespace)
            undo.callback(host.kill)
        ip("link", "add", a.device, "netns", a.namespace, "type", "veth", "peer", b.device, "netns", b.namespace)
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                ip("-n", host.namespace, "link", "set", device, "up")
        yield a, b


def wait_for(what: Callable[[], object], seconds: float, why: Callable[[], str]) -> None:
    """Until something is so; fails with what ``why`` tells."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, why()
        time.sleep(0.02)
