"""Checkpoints: whole or invisible, written beside the training. safetensors and JSON only; nothing is ever unpickled.

A folder ``step-<n>`` holds ``weights``, ``ema`` and ``optimizer`` as whole tensors by name, shared out over a few files
when several processes write, and ``state.json``: progress, loss scale, times, the settings and data that shaped them,
bytes and CRC-32C of every other file, and a CRC-32C of itself. What differs from them when it is read is refused. No
generator has a state: all noise, dropout too, is a function of (seed, step, place).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import google_crc32c
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn

from distdiff import files, received
from distdiff.component import nearest
from distdiff.training.engine import Engine

PREFIX = "step-"
FORMAT = 4
GROUPS = ("weights", "ema", "optimizer")
FILE = re.compile(rf"({'|'.join(GROUPS)})(-[0-9]{{5}}-of-[0-9]{{5}})?[.]safetensors")
SEAL = "crc32c"
"""What ``state.json`` calls the checksum of the rest of itself."""

WRITERS = 8
"""At most so many processes share the writing of a checkpoint."""

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds that the first process waits for the files of the others."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint in memory: ``state.json``, and tensors by name."""

    path: Path
    state: dict[str, Any]
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def progress(self, kind: type[T]) -> T:
        """``state["progress"]`` as the dataclass ``kind``.

        Raises
        ------
        ValueError
            It has other fields, or values of other types (named).
        """
        given, like = self.state.get("progress"), kind()
        names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
        if not isinstance(given, dict) or set(given) != names:
            raise ValueError(f"checkpoint {self.path}: progress must hold {', '.join(sorted(names))}")
        for name, value in given.items():
            wanted = (int, float) if isinstance(getattr(like, name), float) else type(getattr(like, name))
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise ValueError(f"checkpoint {self.path}: progress.{name} is {received.kind(value)}")
        return kind(**given)


class Writer:
    """Writes checkpoints on a thread, one at a time, so that training waits for copies alone (a context).

    Every process writes its share of the tensors into a hidden folder and reads it again for its checksums; the first
    one waits for all files, adds ``state.json``, gives the folder its name, and drops what is no longer kept. Files are
    flushed to disk before a rename tells of them, so a process may be killed at any moment.

    Parameters
    ----------
    folder
        Where checkpoints go; all processes see it.
    keep
        Newest checkpoints that stay, besides the first one since the best validation.
    process, processes
        Which of how many this is.
    launch
        A name that this launch shares among its processes and with no other.
    """

    def __init__(self, folder: Path, *, keep: int = 2, process: int = 0, processes: int = 1, launch: str = "") -> None:
        self.folder, self.keep, self.launch = folder, keep, launch
        self.process, self.writers = process, min(processes, WRITERS)
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.given_up = threading.Event()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.given_up.set()  # others may be gone: finish what needs nobody else
            if self.thread is not None:
                self.thread.join()
        else:
            self.wait()

    def mine(self, names: Iterable[str]) -> set[str]:
        """Those of ``names`` that this process writes."""
        if self.process >= self.writers:
            return set()
        return set(sorted(names)[self.process :: self.writers])

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: int) -> None:
        """Start to write ``step-<step>``.

        Parameters
        ----------
        tensors
            ``weights``, ``ema``, ``optimizer`` -> this process's tensors by name, on the CPU, never written to again.
        state
            Goes into ``state.json``; the first process's counts.
        best
            Step of the best validation so far.

        Raises
        ------
        OSError
            What went wrong with the checkpoint before.
        """
        self.wait()
        body = json.dumps({"format": FORMAT, "step": step, **state}, indent=1)
        self.thread = threading.Thread(target=self._run, args=(step, tensors, body, best), name="distdiff-checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _run(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], body: str, best: int) -> None:
        name = f"{PREFIX}{step:09d}"
        hidden = self.folder / f".{name}.{self.launch}"
        try:
            self._write(hidden, tensors, body)
            if self.process == 0:
                _flush(hidden)
                if (self.folder / name / "state.json").exists():  # the same step of the same run has the same bits
                    shutil.rmtree(hidden)
                else:
                    files.remove(self.folder / name)
                    os.replace(hidden, self.folder / name)
                    _flush(self.folder)
                prune(self.folder, self.keep, best)
        except BaseException as error:  # belongs to whoever saves next, or waits
            self.error = error
            if self.process == 0:
                shutil.rmtree(hidden, ignore_errors=True)

    def _write(self, hidden: Path, tensors: Mapping[str, Mapping[str, Tensor]], body: str) -> None:
        if self.process < self.writers:
            hidden.mkdir(parents=True, exist_ok=True)
            sums = {}
            for group, entries in tensors.items():
                target = hidden / f"{group}{_part(self.process, self.writers)}.safetensors"
                save_file(dict(entries), target.with_suffix(".part"))
                _flush(target.with_suffix(".part"))
                sums[target.name] = received.record(target.with_suffix(".part"))
                os.replace(target.with_suffix(".part"), target)
            record = hidden / f"sums{_part(self.process, self.writers)}.json"
            record.with_suffix(".part").write_text(json.dumps(sums))
            os.replace(record.with_suffix(".part"), record)
        if self.process == 0:
            self._wait_for_others(hidden, tensors)
            records = [hidden / f"sums{_part(i, self.writers)}.json" for i in range(self.writers)]
            state = {**json.loads(body), "files": {k: v for path in records for k, v in received.json_of(path).items()}}
            for path in records:
                path.unlink()
            (hidden / "state.json").write_text(json.dumps({**state, SEAL: _seal(state)}, indent=1))
            _flush(hidden / "state.json")

    def _wait_for_others(self, hidden: Path, groups: Iterable[str]) -> None:
        names = [*(f"{group}{{}}.safetensors" for group in groups), "sums{}.json"]
        missing = {name.format(_part(i, self.writers)) for name in names for i in range(self.writers)}
        until = time.monotonic() + PATIENCE
        while missing := {name for name in missing if not (hidden / name).exists()}:
            if self.given_up.is_set() or time.monotonic() > until:
                raise OSError(
                    f"{hidden.name} was not finished: {sorted(missing)[0]} of another process did not come; is "
                    f"{self.folder} a folder that all processes share?"
                )
            time.sleep(0.01)


def snapshot(engine: Engine, ema: nn.Module, writer: Writer) -> dict[str, dict[str, Tensor]]:
    """Copies of what this process writes, for :meth:`Writer.save` (all must ask: sharded tensors are gathered)."""
    names = [name for name, _ in engine.bare.named_parameters()]
    mine = writer.mine(engine.bare.state_dict())
    with engine.weights() as whole:
        weights = {**engine.bare.state_dict(), **dict(zip(names, whole, strict=True))}
        copies = {"weights": {name: _copy(w) for name, w in weights.items() if name in mine}}
    copies["ema"] = {name: _copy(w) for name, w in ema.state_dict().items() if name in mine}
    copies["optimizer"] = {key: _copy(w) for key, w in engine.state() if key.rpartition("/")[0] in mine}
    return copies


def share(accelerator: Accelerator, folder: Path, resume: str) -> tuple[Path | None, str]:
    """Let the first process look for a checkpoint, name this launch and clear away what killed launches left.

    Returns
    -------
    (Path or None, str)
        The checkpoint to go on with, and the launch's name; the same on all processes.
    """
    start_and_launch: list[str] = ["", ""]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(f".{PREFIX}*"):
            files.remove(unfinished)
        found = find(resume, folder)
        _set_aside(folder, found)
        start_and_launch = [str(found or ""), os.urandom(4).hex()]
    broadcast_object_list(start_and_launch)
    start, launch = start_and_launch
    return Path(start) if start else None, launch


def _set_aside(folder: Path, start: Path | None) -> None:
    """Move checkpoints beyond the one that is gone on with into ``left-<n>``: this run will write those steps anew."""
    newer = [p for p in _whole_ones(folder) if start is None or (p.name > start.name)]
    if newer:
        number = 1 + max((int(p.name[5:]) for p in folder.glob("left-*") if p.name[5:].isdigit()), default=0)
        aside = folder / f"left-{number}"
        aside.mkdir()
        for path in newer:
            os.replace(path, aside / path.name)


def prune(folder: Path, keep: int, best: int) -> None:
    """Drop all checkpoints but the newest ``keep`` and the first one since step ``best`` (0: none was validated)."""
    found = _whole_ones(folder)
    since = [p for p in found if best and int(p.name.removeprefix(PREFIX)) >= best]
    for old in found[:-keep]:
        if old not in since[:1]:
            hidden = old.with_name(f".{old.name}.old")  # never half a checkpoint under a checkpoint's name
            files.remove(hidden)
            os.replace(old, hidden)
            files.remove(hidden)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of ``folder``, or ``None``."""
    found = _whole_ones(folder)
    return found[-1] if found else None


def _whole_ones(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob(f"{PREFIX}*") if (p / "state.json").exists())


def find(resume: str, folder: Path) -> Path | None:
    """Resolve ``train.resume``: ``auto`` (newest in ``folder``, if any), ``never``, or the path of a checkpoint.

    Raises
    ------
    ValueError
        A path that is no checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return latest(folder)
    if not (Path(resume) / "state.json").exists():
        raise ValueError(f"train.resume={resume!r} is no checkpoint folder{nearest(resume, ('auto', 'never'))}")
    return Path(resume)


def load(
    path: Path, expect: Mapping[str, Any], *, changed: bool = False, like: Mapping[str, Tensor] | None = None
) -> Saved:
    """Read a checkpoint, and compare every file with its checksum.

    Parameters
    ----------
    expect
        What must be as it was.
    changed
        The optimiser's settings (``config.optim``) may differ.
    like
        The weights to fill, by name: what the checkpoint holds must have their shapes.

    Raises
    ------
    ValueError
        The checkpoint is of another format, is damaged (the way back is named), or was made with other settings or data
        than ``expect`` (first difference named).
    """
    try:
        state = received.json_of(path / "state.json")
        if state.get("format") == FORMAT and state.pop(SEAL, None) != _seal(state):
            raise ValueError("state.json differs from what was written")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state.get('format', 1)!r:.40} (state.json), this distdiff reads {FORMAT}; "
            "go on with the version of distdiff that made it, or start anew with train.resume=never or another "
            "train.out (train.start=MODEL takes over the weights of the run's best model)"
        )
    for name, value in expect.items():
        existing = state.get(name)
        if name == "config" and isinstance(existing, dict) and isinstance(existing.get("train"), dict):
            known = value.get("train", existing["train"])  # what no longer counts may differ
            existing = {**existing, "train": {k: v for k, v in existing["train"].items() if k in known}}
        if changed and name == "config" and isinstance(existing, dict):
            value = {**value, "optim": existing.get("optim")}
        if existing != json.loads(json.dumps(value)):
            raise ValueError(
                f"checkpoint {path} was made with another {name}: {_difference(existing, value)}; continue with "
                "the old setting, or start anew with train.resume=never or another train.out"
            )
    try:
        found = _tensors(path, state.get("files"))
        if like is not None:
            _check_fit(found, like)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return Saved(path, state, *(found[group] for group in GROUPS))


def _damaged(path: Path, error: Exception) -> ValueError:
    """What to say of a checkpoint that cannot be gone on with."""
    before = [p for p in _whole_ones(path.parent) if p.name < path.name]
    way = f"go back to the one before it with train.resume={before[-1]}, or " if before else ""
    return ValueError(
        f"checkpoint {path} is damaged: {error}; {way}start anew with train.resume=never or another train.out"
    )


def _seal(state: Mapping[str, Any]) -> int:
    """Checksum of what ``state.json`` says."""
    return google_crc32c.value(json.dumps(state, sort_keys=True).encode())


def _tensors(path: Path, sums: Any) -> dict[str, dict[str, Tensor]]:
    """Tensors of each group by name, from files that are as they were written."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, wanted in sorted(sums.items()) if isinstance(sums, dict) else ():
        if not (known := FILE.fullmatch(name)):
            raise ValueError(f"it lists {name!r}, which is no file of a checkpoint")
        if not (path / name).exists():
            raise ValueError(f"{name} is missing")
        if list(received.record(path / name)) != wanted:
            raise ValueError(f"{name} differs from what was written (checksum)")
        tensors = received.tensors_of(path / name)
        received.check_finite(tensors)
        groups.setdefault(known[1], {}).update(tensors)
    if absent := [group for group in GROUPS if group not in groups]:
        raise ValueError(f"it lists no {absent[0]}")
    return groups


def _check_fit(found: Mapping[str, Mapping[str, Tensor]], like: Mapping[str, Tensor]) -> None:
    """Weights and averages must be those of ``like``; what the optimiser keeps, of their shapes or one number."""
    for group in ("weights", "ema"):
        try:
            received.check_fit(found[group], like)
        except ValueError as error:
            raise ValueError(f"{group}: {error}") from None
    for key, tensor in found["optimizer"].items():
        weight = like.get(key.rpartition("/")[0])
        if weight is None or not (tensor.shape == weight.shape or tensor.numel() == 1):
            raise ValueError(f"optimizer: tensor {key} of shape {list(tensor.shape)} belongs to no weight")


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU that training does not touch."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor.detach())


def _part(process: int, writers: int) -> str:
    return f"-{process:05d}-of-{writers:05d}" if writers > 1 else ""


def _flush(path: Path) -> None:
    """To disk: a file's content, a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for k in {**old, **new}:
            if old.get(k) != json.loads(json.dumps(new.get(k))):
                return _difference(old.get(k), new.get(k), f"{where}.{k}" if where else str(k))
    return f"{where + ' ' if where else ''}was {old!r}, is {new!r}"
