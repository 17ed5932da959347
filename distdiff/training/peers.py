"""Whether the other machines of a run are still there, and one sentence when they are not.

A process that is killed closes its connections, and whoever exchanges numbers with it fails at once, not knowing why. A
machine that falls off the network closes nothing, and an exchange may wait for a slow process, so its own time limit
must be long. Each machine therefore gives a sign of life every few seconds, through the store by which the processes of
a launch find each other.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from types import TracebackType

import psutil
import torch.distributed as dist

from distdiff.training.stop import EXCHANGE, Stopped

BEAT = 1.0
"""Seconds between two signs of life."""

SILENCE = 45.0
"""Seconds without a sign after which a machine counts as lost; ``DISTDIFF_SILENCE`` in the environment overrides it.

Long enough for a machine whose Python is held up by one long call; a process that waits for cells gives signs.
"""

DIAGNOSIS = 5 * BEAT
"""The same once an exchange has failed: somebody is gone, only who is not known."""


class Lost(RuntimeError):
    """Another machine or process of the run is gone; the same command goes on from the last checkpoint."""

    code = Stopped.code
    """Exit status: try again."""


class Peers:
    """Watches the other machines of a launch (a context), and explains exchanges that fail.

    The first process of each machine watches. When another machine has been silent for too long, it says so and ends
    its process with status 75 from a thread, because the main one may wait for ever; the launcher then ends the others
    of this machine.

    Attributes
    ----------
    where
        Tells how far training is and where its last checkpoint lies, for the sentence.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        # the launcher's words for machines (torchrun's, which accelerate uses; others are taken for one machine)
        self.hosts, self.mine = int(environment.get("GROUP_WORLD_SIZE", "1")), int(environment.get("GROUP_RANK", "0"))
        self.environment, self.first = environment, environment.get("LOCAL_RANK", "0") == "0"
        self.silence = float(environment.get("DISTDIFF_SILENCE", SILENCE))
        self.where: Callable[[], str] = lambda: (
            "before the first step"
            + (" (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between hosts)" if self.hosts > 1 else "")
        )
        self.closed = threading.Event()
        self.names: dict[int, str] = {}
        self.counts: dict[int, int] = {}
        self.seen: dict[int, float] = {}
        self.last_words = ""
        self.ended: tuple[int, str] | None = None
        """The machine whose program ended by an error of its own, and the error."""
        self.signs = threading.Thread(target=self._give_signs, name="distdiff-signs", daemon=True)

    def __enter__(self) -> Peers:
        if self.hosts > 1:
            self.name = ", ".join(filter(None, (socket.gethostname(), _reach(self.environment))))
            if self.first:
                self.signs.start()
                threading.Thread(target=self._judge, name="distdiff-peers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, RuntimeError) and _of_an_exchange(error):
                raise Lost(self._explained(error)) from error
            if isinstance(error, Exception):  # the others wait for this machine: let them know
                self.last_words = str(error).strip().partition("\n")[0] or type(error).__name__
        finally:
            self.close()

    def close(self) -> None:
        """Others may end from now on: nothing is exchanged any more."""
        self.closed.set()
        if self.signs.is_alive():  # Python must not end while a thread is in torch's code: that aborts the process
            self.signs.join(DIAGNOSIS)

    def _give_signs(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has hung up: then there are no signs either
            store = _store(self.environment)
            store.set(f"name/{self.mine}", self.name)
            keys = [f"signs/{host}" for host in range(self.hosts)]
            while True:
                store.add(keys[self.mine], 1)
                # one request once all have come; a key that is not there would be waited for
                counts = store.multi_get(keys) if len(self.names) == self.hosts else [store.add(k, 0) for k in keys]
                for host, count in enumerate(map(int, counts)):
                    if count != self.counts.get(host, 0):
                        self.counts[host], self.seen[host] = count, time.monotonic()
                    if count and host not in self.names:
                        self.names[host] = store.get(f"name/{host}").decode()
                if self.last_words:
                    store.compare_set("ended", "", f"{self.mine} {self.last_words}")
                elif store.check(["ended"]):
                    who, _, words = store.get("ended").decode().partition(" ")
                    self.ended = int(who), words
                if self.closed.is_set():
                    return
                self.closed.wait(BEAT)

    def _judge(self) -> None:
        awake = time.monotonic()
        while not self.closed.wait(0.5):
            if time.monotonic() - awake > DIAGNOSIS:  # this process itself was held up: it may have missed signs
                self.seen = dict.fromkeys(self.seen, time.monotonic())
            awake = time.monotonic()
            lost, why = self._silent(self.silence), f"no sign of life for {self.silence:g} s"
            if self.ended:
                lost, why = [self.ended[0]], f"it ended: {self.ended[1]}"
            if lost:
                with contextlib.suppress(OSError):
                    print(f"\ndistdiff: {self._sentence(lost, why)}", file=sys.stderr, flush=True)
                os._exit(Lost.code)

    def _silent(self, seconds: float) -> list[int]:
        """Machines that gave no sign for so long; the first alone when not even this one's own come through to it."""
        silent = [host for host, last in self.seen.copy().items() if time.monotonic() - last >= seconds]
        return [0] if self.mine in silent and self.mine else [host for host in silent if host != self.mine]

    def _explained(self, error: RuntimeError) -> str:
        """Find out who is gone, and say it."""
        lost: list[int] = []
        if self.hosts > 1:
            until = time.monotonic() + 1.5 * DIAGNOSIS  # on a machine's other processes: until the launcher ends them
            while not (lost := self._silent(DIAGNOSIS)) and time.monotonic() < until:
                time.sleep(0.1)
        words = re.sub(r"\[/\S*\]\s*|\. .*", "", str(error).strip().splitlines()[0])
        return self._sentence(lost, f"torch: {words}")

    def _sentence(self, lost: list[int], why: str) -> str:
        names = [f"host {h + 1} of {self.hosts}" + (f" ({n})" if (n := self.names.get(h)) else "") for h in lost]
        what = f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} lost"
        everywhere = " on all hosts" if self.hosts > 1 else ""
        return (
            f"{what if names else 'the exchange with another process failed'} ({why}) {self.where()}; the same command"
            f"{everywhere} goes on"
        )


def _of_an_exchange(error: RuntimeError) -> bool:
    """Whether torch says that processes could not exchange something."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _store(environment: Mapping[str, str]) -> dist.Store:
    """A connection of our own to the launch's store, and a place in it that this attempt has for itself."""
    store = dist.TCPStore(
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False, wait_for_workers=False,
        timeout=EXCHANGE,
    )  # fmt: skip
    return dist.PrefixStore(f"distdiff/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _reach(environment: MutableMapping[str, str]) -> str:
    """Address of this machine on the way to the first one (empty: not known); gloo is told to use that interface.

    By itself gloo takes the address of the host's name, which many an ``/etc/hosts`` gives as 127.0.0.1.
    """
    try:
        family, kind, _, _, to = socket.getaddrinfo(environment["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(to)  # sends nothing
            address = str(probe.getsockname()[0])
    except (OSError, KeyError):
        return ""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses) and not address.startswith(("127.", "::1")):
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
            return address
    return ""
