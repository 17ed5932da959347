"""Checkpoints: whole or invisible. safetensors and JSON only; nothing here is ever unpickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distdiff import files
from distdiff.component import nearest

PREFIX = "step-"


def write_folder(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write ``<name>.safetensors`` for each entry of ``tensors`` and ``state.json``; flush to disk, then rename.

    An existing ``target`` is replaced only once the new one is whole.
    """
    with files.whole(target, overwrite=True) as temporary:
        temporary.mkdir()
        for name, group in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for file in temporary.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as flat tensors ``<parameter index>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put :func:`optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(
    folder: Path, step: int, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any], *, keep: int = 2,
) -> Path:  # fmt: skip
    """Write ``folder/step-<step>`` and drop all but the newest ``keep``."""
    target = folder / f"{PREFIX}{step:09d}"
    write_folder(
        target,
        {"weights": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer_tensors(optimizer)},
        {**state, "step": step},
    )
    for old in sorted(folder.glob(f"{PREFIX}*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of ``folder``, or ``None``."""
    found = sorted(p for p in folder.glob(f"{PREFIX}*") if (p / "state.json").exists())
    return found[-1] if found else None


def load(
    path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, expect: Mapping[str, Any]
) -> dict[str, Any]:
    """Load a checkpoint in place and return its state.

    Raises
    ------
    ValueError
        The checkpoint was made with other settings or data than ``expect`` (first difference named).
    """
    state = json.loads((path / "state.json").read_text())
    for name, value in expect.items():
        if state.get(name) != json.loads(json.dumps(value)):
            raise ValueError(
                f"checkpoint {path} was made with another {name}: {_difference(state.get(name), value)}; continue with "
                "the old setting, or start anew with train.resume=never or another train.out"
            )
    model.load_state_dict(load_file(path / "weights.safetensors"))
    ema.load_state_dict(load_file(path / "ema.safetensors"))
    load_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
    return state


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


def _difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for k in {**old, **new}:
            if old.get(k) != json.loads(json.dumps(new.get(k))):
                return _difference(old.get(k), new.get(k), f"{where}.{k}" if where else str(k))
    return f"{where + ' ' if where else ''}was {old!r}, is {new!r}"
