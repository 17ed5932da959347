"""What this machine offers distdiff: versions, devices, kernels, processes, disk, MLflow, dask; each with what to do.

Nothing is started: GPUs are asked through NVIDIA's management library, which makes no context on them, and of an MLflow
server only its health page is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sqlite3
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from distdiff.tracking.address import public_uri, tracking_uri
from distdiff.tracking.redact import redacted
from distdiff.version import __version__

PATIENCE = 2.0
"""Seconds that a server or a name may take to answer."""

FREE = 10 << 30
"""Bytes of free disk below which a run may fill it."""

FLASH = (8, 0)
"""Compute capability from which flash attention runs."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name, found
        What, and what is there.
    state
        ``ok``; ``look``: works, with a limit; ``missing``: something needed is absent.
    advice
        What to do; nothing where all is well.
    """

    name: str
    state: Literal["ok", "look", "missing"]
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """All checks, in a few seconds; one that fails itself is reported as ``look``.

    Examples
    --------
    >>> [check.name for check in examine()][0]
    'distdiff'
    """
    found: list[Check] = []
    for each in (_distdiff, _packages, _extras, _processor, _devices, _flash, _exchange, _disk, _mlflow, _dask, _numba):
        try:
            found += each()
        except Exception as error:  # a broken installation is what this is for
            name = each.__name__.removeprefix("_")
            found.append(Check(name, "look", redacted(f"could not be examined: {type(error).__name__}: {error}"),
                               "report it, with this line"))  # fmt: skip
    return found


def text(checks: list[Check]) -> str:
    """An aligned table, advice below what it is about."""
    wide = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.state:<7}  {check.name:<{wide}}  {check.found}")
        if check.advice:
            lines.append(f"{'':<7}  {'':<{wide}}  -> {check.advice}")
    return "\n".join(lines)


def as_dicts(checks: list[Check]) -> list[dict[str, str]]:
    """The checks as plain mappings, for JSON."""
    return [dataclasses.asdict(check) for check in checks]


def _distdiff() -> Iterator[Check]:
    yield Check("distdiff", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    try:
        return [Requirement(text) for text in importlib.metadata.requires("distdiff") or []]
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return []


def _packages() -> Iterator[Check]:
    needed = [r for r in _requirements() if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not needed:
        yield Check("packages", "look", "distdiff is not installed, so its requirements are unknown",
                    "pip install distdiff, or pip install -e . in a checkout")  # fmt: skip
    wrong, absent = [], []
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(requirement)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} ({requirement.specifier} is needed)")
    if absent:
        yield Check("packages", "missing", ", ".join(r.name for r in absent),
                    f"pip install {' '.join(repr(_plain(r)) for r in absent)}")  # fmt: skip
    if wrong:
        yield Check("packages", "look", "; ".join(wrong), "pip install --upgrade distdiff")
    if needed and not absent and not wrong:
        names = ("torch", "accelerate", "numpy", "zarr", "anndata", "scanpy", "mlflow", "dask")
        yield Check("packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))


def _plain(requirement: Any) -> str:
    """A requirement without its marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


EXTRAS = {
    "deepspeed": "deepspeed", "scvi": "baselines", "diffusers": "images", "skmisc": "seurat", "zarrs": "zarrs",
    "leidenalg": "leiden", "dask_jobqueue": "slurm", "dask_kubernetes": "k8s",
    "pynvml": "gpu", "pydeseq2": "de", "dask_cuda": "dask-cuda",
}  # fmt: skip
"""Modules of optional dependencies, and the extra that installs them."""


def _extras() -> Iterator[Check]:
    here = [module for module in EXTRAS if importlib.util.find_spec(module) is not None]
    absent = [extra for module, extra in EXTRAS.items() if module not in here]
    advice = f"only if you need them: pip install 'distdiff[{','.join(absent)}]'" if absent else ""
    yield Check("extras", "ok", f"installed: {', '.join(here) or 'none'}; not: {', '.join(absent) or 'none'}", advice)


def _processor() -> Iterator[Check]:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = load > 2 * cores
    yield Check(
        "processor", "look" if busy else "ok",
        f"{cores} cores, load {load:.1f}, {_size(memory.available)} of {_size(memory.total)} memory free",
        "other programs keep the cores busy; timings will not hold" if busy else "",
    )  # fmt: skip


def _nvidia() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each NVIDIA GPU; no context is made. None without the extra ``gpu``."""
    try:
        import pynvml
    except ImportError:
        return []
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        found = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            name = pynvml.nvmlDeviceGetName(handle)
            with contextlib.suppress(pynvml.NVMLError):
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                found.append({
                    "name": name.decode() if isinstance(name, bytes) else name, "free": int(memory.free),
                    "total": int(memory.total), "capability": tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                    "driver": pynvml.nvmlSystemGetDriverVersion(),
                })  # fmt: skip
        pynvml.nvmlShutdown()
        return found
    return []


def _devices() -> Iterator[Check]:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch counts devices without CUDA's runtime
    import torch

    gpus, built = _nvidia(), torch.version.cuda or torch.version.hip
    if importlib.util.find_spec("pynvml") is None and shutil.which("nvidia-smi"):
        yield Check("GPU", "look", "nvidia-smi is here, but its library for Python is not, so GPUs are not examined",
                    "pip install 'distdiff[gpu]'")  # fmt: skip
    for i, gpu in enumerate(gpus):
        full = gpu["free"] < 0.5 * gpu["total"]
        yield Check(
            f"GPU {i}", "look" if full else "ok",
            f"{gpu['name']}, {_size(gpu['free'])} of {_size(gpu['total'])} free, driver {gpu['driver']}",
            "another program holds most of its memory (nvidia-smi names it)" if full else "",
        )  # fmt: skip
    if torch.cuda.is_available():
        yield Check("torch", "ok", f"{torch.__version__}, sees {torch.cuda.device_count()} GPU(s)")
    elif gpus:
        why = (
            "is built for CPUs alone" if not built else f"is built for CUDA {torch.version.cuda} and sees none of them"
        )
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        advice = (
            f"CUDA_VISIBLE_DEVICES={hidden!r} may hide them" if hidden is not None
            else "install a torch that fits the driver: https://pytorch.org/get-started/locally"
        )  # fmt: skip
        yield Check("torch", "missing", f"{torch.__version__} {why}", advice)
    else:
        yield Check("torch", "look", f"{torch.__version__}, no GPU here: the CPU is used",
                    "enough for some ten thousand cells; more want a GPU")  # fmt: skip


def _flash() -> Iterator[Check]:
    import torch

    built = torch.backends.cuda.is_flash_attention_available()
    old = [gpu for gpu in _nvidia() if gpu["capability"] < FLASH]
    if not torch.cuda.is_available():
        yield Check("flash attention", "ok", "not used: without a GPU torch computes attention on the CPU")
    elif built and not old and torch.backends.cuda.flash_sdp_enabled():
        yield Check("flash attention", "ok", "in torch's scaled_dot_product_attention, in bf16 and fp16")
    else:
        why = f"{old[0]['name']} is older than compute capability 8.0" if old else "this torch has no kernel of it"
        yield Check(
            "flash attention", "look", why, "transformer and lsh run by another kernel, slower; mlp does not care"
        )


def _exchange() -> Iterator[Check]:
    import torch
    from torch import distributed

    if not distributed.is_available():
        yield Check("gloo, NCCL", "look", "this torch has no torch.distributed", "one process alone can train")
        return
    gloo, nccl = distributed.is_gloo_available(), distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else ""
    found = f"gloo {'here' if gloo else 'absent'}, NCCL {version or 'absent'}"
    gpus = torch.cuda.is_available()
    lacking = (gpus and not nccl) or not gloo
    yield Check("gloo, NCCL", "look" if lacking else "ok", found,
                "several processes cannot work together on this device" if lacking else "")  # fmt: skip
    name = socket.gethostname()
    try:
        address = _within(lambda: socket.gethostbyname(name))
        yield Check("host name", "ok", f"{name} is {address}")
    except (OSError, TimeoutError):
        yield Check("host name", "look", f"{name} has no address",
                    "processes may miss each other: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo")  # fmt: skip


def _within(ask: Callable[[], Any]) -> Any:
    """The answer of ``ask``, or TimeoutError after `PATIENCE` seconds (a thread that hangs ends with the program)."""
    import threading

    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append((True, ask()))
        except Exception as error:
            answers.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not answers:
        raise TimeoutError("no answer")
    good, answer = answers[0]
    if not good:
        raise answer
    return answer


def _disk() -> Iterator[Check]:
    for name, folder in (("disk here", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        writable = os.access(folder, os.W_OK)
        state: Literal["ok", "look", "missing"] = "missing" if not writable else "look" if free < FREE else "ok"
        advice = {
            "missing": "work in a folder that you may write to" if name == "disk here" else "set TMPDIR to a folder "
            "that you may write to",
            "look": "little is free: checkpoints and stores need room beside what they replace", "ok": "",
        }[state]  # fmt: skip
        yield Check(name, state, f"{folder}, {_size(free)} free{'' if writable else ', not writable'}", advice)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < 1 << 30:
        total = _size(shutil.disk_usage(shared).total)
        yield Check("shared memory", "look", f"{shared} holds {total}",
                    "NCCL and worker processes may stop: start the container with --shm-size=8g")  # fmt: skip


def _mlflow() -> Iterator[Check]:
    if importlib.util.find_spec("mlflow") is None:
        yield Check("MLflow", "missing", "not installed", "pip install mlflow, or tracking.enabled=false")
        return
    uri = tracking_uri()
    shown, scheme = public_uri(uri), urlsplit(uri).scheme
    if scheme.startswith("http"):
        yield _server(uri, shown)
    elif scheme == "sqlite":
        yield _database(Path(uri.removeprefix("sqlite:///")), shown)
    elif scheme in ("", "file"):
        folder = Path(urlsplit(uri).path if scheme else uri)
        existing = folder.is_dir() or os.access(folder.parent, os.W_OK)
        yield Check("MLflow", "ok" if existing else "missing", shown,
                    "" if existing else "set MLFLOW_TRACKING_URI to a place that you may write to")  # fmt: skip
    else:
        yield Check("MLflow", "look", f"{shown}: a database of this kind is not examined")


def _server(uri: str, shown: str) -> Check:
    parts = urlsplit(uri)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
    away = "runs keep what they log in train.out; send it later: distdiff mlflow sync FOLDER"
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            return Check("MLflow", "ok", f"{shown} answers ({answer.status})")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Check("MLflow", "ok", f"{shown} answers and asks for a password",
                         "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")  # fmt: skip
        return Check("MLflow", "look", f"{shown} answers {error.code}", away)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Check("MLflow", "look", f"{shown} is away ({type(reason).__name__})", away)


def _database(path: Path, shown: str) -> Check:
    if not path.exists():
        if os.access(path.parent, os.W_OK):
            return Check("MLflow", "ok", f"{shown}, made by the first run")
        return Check("MLflow", "missing", f"{shown} cannot be made", "set MLFLOW_TRACKING_URI to a writable place")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE)) as database:
            runs = database.execute("select count(*) from runs").fetchone()[0]
            return Check("MLflow", "ok", f"{shown}, {runs:,} runs")
    except sqlite3.Error as error:
        return Check("MLflow", "look", f"{shown} cannot be read ({error})",
                     "move it away, or set MLFLOW_TRACKING_URI; runs keep what they log in train.out")  # fmt: skip


def _dask() -> Iterator[Check]:
    absent = [name for name in ("dask", "distributed") if importlib.util.find_spec(name) is None]
    if absent:
        yield Check("dask", "missing", f"{', '.join(absent)} not installed", "pip install 'dask[distributed]'")
        return
    found = f"dask {importlib.metadata.version('dask')}, distributed {importlib.metadata.version('distributed')}"
    address = os.environ.get("DASK_SCHEDULER_ADDRESS", "")
    parts = urlsplit(address)
    if not parts.hostname or not parts.port:
        yield Check("dask", "ok", f"{found}; --scheduler takes the address of a cluster")
        return
    try:
        _within(lambda: socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE).close())
        yield Check("dask", "ok", f"{found}; the scheduler {public_uri(address)} answers")
    except (OSError, TimeoutError):
        yield Check("dask", "look", f"{found}; the scheduler {public_uri(address)} does not answer",
                    "start it, or unset DASK_SCHEDULER_ADDRESS")  # fmt: skip


def _numba() -> Iterator[Check]:
    from distdiff.jit import njit

    kept = njit(_nothing).stats.cache_path  # type: ignore[attr-defined]
    version = importlib.metadata.version("numba")
    if kept and Path(kept).is_dir() and os.access(kept, os.W_OK):
        yield Check("numba cache", "ok", f"numba {version}, {kept}")
    else:
        yield Check("numba cache", "look", f"numba {version}, no folder to keep machine code in",
                    "every process compiles again, some seconds: set NUMBA_CACHE_DIR to a writable folder")  # fmt: skip


def _nothing() -> int:
    return 0


def _size(n: float) -> str:
    """Bytes in GiB, TiB from 1,024 of them."""
    gib = n / (1 << 30)
    return f"{gib / 1024:.1f} TiB" if gib >= 1024 else f"{gib:.1f} GiB"


def needed(checks: list[Check]) -> Mapping[str, int]:
    """How many checks are in each state."""
    return {state: sum(check.state == state for check in checks) for state in ("ok", "look", "missing")}
