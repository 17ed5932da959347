"""A SLURM cluster on one machine, real but small: munged, slurmctld and a slurmd a node, all of it in one folder.

Every node has process table, host name and ``/etc/hosts`` of its own, so that it can die as a machine does: with all
that ran on it. Memory, network and files are the machine's. Nothing outside the folder is changed, and what was
started ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare")

SHORT = {
    "cred_expire": 5,  # the least; a job that is queued again waits as long as a credential may live: 120 s by default
    "KillWait": 5,
    "SlurmdTimeout": 10,  # seconds of silence after which a node counts as dead: 300 by default
    "MessageTimeout": 5,
}

CONFIGURATION = """\
ClusterName=distdiff
SlurmctldHost=login(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait={KillWait}
SlurmdTimeout={SlurmdTimeout}
MessageTimeout={MessageTimeout}
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=abrupt Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def lacking() -> str:
    """Why there can be no cluster here; empty: there can."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=_path())]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons and the namespaces of their nodes need root"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return f"no namespaces for nodes: {tried.stderr.strip()}" if tried.returncode else ""


NAMESPACES = ("--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts")


class Cluster:
    """The cluster (a context); nodes are ``node1``, ``node2`` ... with 64 CPUs and 4 GPUs that are but files.

    Parameters
    ----------
    folder
        For everything that is written; SLURM_CONF of what uses the cluster points there.
    """

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder, self.names = folder, [f"node{i + 1}" for i in range(nodes)]
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(list(self.started.values())):  # the nodes first, with all that runs on them
            process.kill()
            process.wait(10)

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "munge", *(f"spool/{name}" for name in self.names)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "munge").chmod(0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o400)
        control, *ports = _free(1 + len(self.names))
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=500000 Gres=gpu:4"
            for name, port in zip(self.names, ports, strict=True)
        )
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, control=control, nodes=nodes, **SHORT))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
        for i in range(4):
            (folder / f"gpu{i}").touch()
        (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", "login", *self.names)))
        self._launch(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={folder}/munge/key",
            f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed",
        )  # fmt: skip
        self.wait(lambda: (folder / "munge.sock").exists(), "munged")
        self._in_namespaces("slurmctld", "login", "slurmctld -D -i")
        for name in self.names:
            self.start_node(name)
        self.wait(lambda: self.states() == dict.fromkeys(self.names, "idle"), "idle nodes")

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        self._in_namespaces(name, name, f"slurmd -D -N {name}")

    def kill_node(self, name: str) -> None:
        """Cut a node's power: the daemon and everything that ran there is gone at once."""
        self.started[name].kill()
        self.started.pop(name).wait(10)

    def _in_namespaces(self, key: str, host: str, command: str) -> None:
        set_up = f"hostname {host} && mount --bind {self.folder}/hosts /etc/hosts"
        self._launch("unshare", *NAMESPACES, "sh", "-c", f"{set_up} && {command} & wait $!", name=key)

    def _launch(self, *command: str, name: str = "") -> None:
        name = name or command[0]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.started[name] = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=_ends_with_its_parent, start_new_session=True,
            )  # fmt: skip

    # -- what a user does ------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, timeout: float = 60, **more: object) -> str:
        """What a command of a user prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, **more,  # type: ignore[call-overload]
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}{self.logs()}"
            )
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> int:
        """Number of the job that ``sbatch WORDS`` makes."""
        given = self.environment | dict(environment or {})
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)], cwd=cwd, env=given, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {words}: {done.stderr}{self.logs()}")
        return int(done.stdout)

    def states(self) -> dict[str, str]:
        """Of every node, as sinfo tells."""
        told = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t", check=False)
        return dict(line.split() for line in told.splitlines())

    def job(self, number: int) -> dict[str, str]:
        """What scontrol tells of a job."""
        told = self.run("scontrol", "show", "job", "--oneliner", str(number))
        return dict(word.partition("=")[::2] for word in told.split() if "=" in word)

    def wait_for_job(
        self, number: int, *states: str, seconds: float = 120, told: Callable[[], str] = str
    ) -> dict[str, str]:
        """A job, once it is in one of some states (default: at its end)."""
        found: dict[str, str] = {}

        def there() -> bool:
            found.update(self.job(number))
            return found["JobState"] in (states or ENDS)

        self.wait(
            there, f"job {number} to be {' or '.join(states) or 'at its end'}", seconds, lambda: f"{found}\n{told()}"
        )
        return found

    def wait(self, ready: Callable[[], bool], what: str, seconds: float = 30, told: Callable[[], str] = str) -> None:
        """Until something is so; else all logs are shown."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}: {told()}{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of what the daemons say."""
        return "".join(f"\n--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")


def _path() -> str:
    """PATH with this Python's programs (distdiff, accelerate) and the daemons'."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


def _free(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with_ports = [socket.socket() for _ in range(number)]
    try:
        for one in with_ports:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in with_ports]
    finally:
        for one in with_ports:
            one.close()


def _ends_with_its_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Keep a cluster up until interrupted: ``python -m tests.slurm.cluster FOLDER``."""
    if why := lacking():
        sys.exit(why)
    with Cluster(Path(sys.argv[1]).absolute()) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        signal.pause()


if __name__ == "__main__":
    main()
