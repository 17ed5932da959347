"""How a process of a training uses its machine: device, precision, and how it talks to the others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from distdiff.training.stop import EXCHANGE


def accelerator(asked: str) -> Accelerator:
    """The accelerator of this process, in ``train.precision``."""
    if "WORLD_SIZE" not in os.environ:
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier training here, in another precision
    return Accelerator(
        mixed_precision=_precision(asked), step_scheduler_with_optimizer=False, cpu=_told_cpu(),
        kwargs_handlers=_exchange(),
    )  # fmt: skip


def _precision(asked: str) -> str:
    if asked in ("fp32", "tf32", "fp16"):
        return "fp16" if asked == "fp16" else "no"
    if asked == "bf16" or (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        return "bf16"
    return "no"


@contextlib.contextmanager
def products(asked: str) -> Iterator[None]:
    """How exact products of float32 matrices are for the time of a run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if asked == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Without a GPU, tell DeepSpeed so: where it is installed it prints otherwise that it found none."""
    if not _told_cpu() or "DS_ACCELERATOR" in os.environ:
        yield
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        os.environ.pop("DS_ACCELERATOR", None)


def _told_cpu() -> bool:
    """Whether accelerate must be told to use the CPU: without it, several processes of a CPU machine each run alone.

    DeepSpeed chooses its device itself, and accelerate drops it when told.
    """
    return not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"


def _exchange() -> list[KwargsHandler]:
    """How processes talk: one that does not answer for ten minutes ends the job; buffers are constants.

    DeepSpeed on CPUs is told of gloo; without, each process takes itself for the only one.
    """
    backend = "gloo" if not (torch.cuda.is_available() or _told_cpu()) else None
    return [
        InitProcessGroupKwargs(backend=backend, timeout=EXCHANGE),
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
