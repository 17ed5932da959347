"""What goes wrong in training, said with the step, the cells and the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from distdiff.training.checkpoint import Writer, latest
from distdiff.training.settings import Training
from distdiff.types import Tensor

_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "can't allocate memory", "ALLOC_FAILED")


class OutOfMemory(RuntimeError):
    """No memory for a step: says which setting needs less."""


def ran_out(error: RuntimeError) -> bool:
    """Whether torch says that it found no memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _ALLOCATORS)


@contextlib.contextmanager
def memory_explained(settings: Training, share: int, device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory errors into advice.

    Parameters
    ----------
    share
        Cells of a step on this process.

    Raises
    ------
    OutOfMemory
        Where torch found no memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(
            f"out of memory on {device} with {share // settings.accumulate} cells a pass; {_ways_out(settings, share)} "
            f"(torch: {str(error).splitlines()[0]})"
        ) from error


def _ways_out(settings: Training, share: int) -> str:
    fits = [k for k in range(settings.accumulate + 1, share // settings.grain + 1) if not share % (k * settings.grain)]
    more = (
        f"train.accumulate={fits[0]} ({share // fits[0]} cells) goes on from the last checkpoint to the same result"
        if fits
        else f"a pass cannot be smaller than train.grain={settings.grain} cells: start anew with a smaller one"
    )
    return (
        f"{more}; or start anew with train.precision=bf16, or denoiser.checkpoint=true where the denoiser has it; or "
        "launch with launch/accelerate/deepspeed_zero3.yaml (many GPUs), deepspeed_zero2_offload.yaml (one)"
    )


def not_finite(accelerator: Accelerator, losses: list[Tensor], norms: list[Tensor]) -> Tensor:
    """``bool [2 steps]``: steps in which a loss, or the gradient, is not finite on any process; see `check_finite`."""
    cells = ~torch.stack([step.isfinite().all() for step in losses])
    skips = accelerator.scaler is not None  # of fp16: it leaves a step out whose gradients are not finite, by design
    gradients = torch.zeros_like(cells) if skips else ~torch.stack(norms).to(cells.device).isfinite()
    return accelerator.reduce(torch.stack((cells, gradients)).float(), "sum") > 0


def check_finite(
    accelerator: Accelerator, losses: list[Tensor], norms: list[Tensor], rows: list[Tensor], first: int, writer: Writer
) -> None:
    """Stop all processes if a loss or a gradient of the steps from ``first`` on is not finite.

    Parameters
    ----------
    losses, norms, rows
        For each step the losses of this process's cells ``[b]``, the gradient's norm, the store's rows ``int64 [b]``
        (on the CPU).
    writer
        Of checkpoints; the one that it is still writing is waited for, to go back to it.

    Raises
    ------
    FloatingPointError
        The same on all processes: names step, rows and way back.
    """
    if not losses:
        return
    bad = not_finite(accelerator, losses, norms)
    if not bool(bad.any()):
        return
    at = int(bad.any(0).nonzero()[0])
    mine = rows[at][((~losses[at].isfinite()) | (not bool(bad[0, at]))).cpu()].tolist()
    named = sorted(gather_object(mine))
    what = "the loss" if bad[0, at] else "the gradient (of finite losses)"
    few = ", ".join(map(str, named[:8])) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
    way = [Path()]
    if accelerator.is_main_process:  # which publishes them
        with contextlib.suppress(OSError):
            writer.wait()
        way = [latest(writer.folder) or Path("never")]
    broadcast_object_list(way)
    raise FloatingPointError(
        f"{what} is not finite at step {first + at}, rows {few} of the store: look at these cells, or go back with "
        f"train.resume={way[0]} and a smaller optim.lr"
    )
