"""What the launcher was asked for: the number of processes, and options that distdiff does not take from it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch"}


def check_world(accelerator: Accelerator) -> None:
    """Stop when the launcher was asked for more processes than accelerate sees; say which of its options do nothing.

    ``accelerate launch --cpu --num_processes 2`` runs one process without a word (its multi-CPU launcher wants MPI).

    Raises
    ------
    RuntimeError
        As said.
    """
    launcher = _launcher()
    asked = max(int(os.environ.get("WORLD_SIZE", "1")), int(launcher.get("num_processes") or 1))
    if asked != accelerator.num_processes:
        raise RuntimeError(
            f"{asked} processes were asked for, {accelerator.num_processes} is running: on CPU use 'accelerate launch "
            "--config_file launch/accelerate/cpu2.yaml', or ACCELERATE_USE_CPU=true torchrun --nproc_per_node "
            f"{asked}"
        )
    precision = launcher.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", accelerator.mixed_precision):
        accelerator.print(
            f"distdiff train: the launcher's mixed_precision={precision} has no effect; train.precision decides: "
            f"{accelerator.mixed_precision}"
        )
    steps = launcher.get("gradient_accumulation_steps") or os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    if str(steps) not in ("1", "auto"):
        accelerator.print(f"the launcher's gradient_accumulation_steps={steps} has no effect; train.accumulate decides")


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """What a command line of ``accelerate launch``, and the config file it reads, ask for; nothing of another one."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    at = next((i for i, word in enumerate(words[:4]) if Path(word).name in LAUNCHERS), None)
    if at is None:
        return {}
    given = list(words[at + 1 :])
    if given[:1] == ["launch"]:
        given = given[1:]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            found = vars(launch_command_parser().parse_known_args(given)[0])
        except SystemExit:  # a launcher of another version: it knows its own options
            return {}
    config: Any = None
    if found["config_file"] or (Path(default_config_file).is_file() and not found["cpu"]):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            config = load_config_from_file(found["config_file"])
    names = ("num_processes", "mixed_precision", "gradient_accumulation_steps")
    return {name: found.get(name) or getattr(config, name, None) for name in names}


def _launcher() -> dict[str, Any]:
    import psutil

    try:
        parent = psutil.Process().parent()
        return {} if parent is None else options_of(parent.cmdline())
    except psutil.Error:
        return {}
