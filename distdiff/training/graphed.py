"""``train.graph``: the network's and the optimiser's part of a step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType

from distdiff.denoise import Denoiser
from distdiff.graphs import Captured
from distdiff.training.engine import Engine
from distdiff.training.noise import Noised
from distdiff.types import Condition, Tensor

Losses = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
"""``(x_0, x, p, labels)`` -> loss of each cell ``[b]``."""


def wanted(graph: bool | Literal["auto"], accelerator: Accelerator, denoiser: Denoiser, accumulate: int) -> bool:
    """Whether steps shall be a graph: ``graph`` is ``train.graph``.

    Raises
    ------
    ValueError
        They shall and cannot; the reason is told.
    """
    if graph is False or (graph == "auto" and not denoiser.light):
        return False
    why = reason(accelerator, denoiser, accumulate)
    if why and graph is True:
        raise ValueError(f"train.graph=true: {why}; or set train.graph=false")
    return not why


def reason(accelerator: Accelerator, denoiser: Denoiser, accumulate: int) -> str:
    """Why a step cannot be a graph, or ``""``."""
    why = ""
    if accelerator.device.type != "cuda":
        why = f"CUDA graphs need a GPU, this is a {accelerator.device.type}"
    elif accelerator.distributed_type is not DistributedType.NO:
        why = f"one process only, this is {accelerator.distributed_type.value}, whose exchanges are not recorded"
    elif accumulate > 1:
        why = f"a step of one pass only, train.accumulate={accumulate}"
    elif accelerator.scaler is not None:
        why = "train.precision=fp16 decides on the host whether a step counts; use bf16"
    elif denoiser.ragged:
        why = f"shapes differ from batch to batch ({denoiser.ragged})"
    elif any(getattr(module, "dropout", 0) for module in denoiser.modules()):
        why = "dropout draws anew at each step; set denoiser.dropout=0"
    return why


class Step:
    """Forward and backward pass, clipping and the optimiser's move; noise is drawn before and handed in.

    Parameters
    ----------
    engine
        Its optimiser's learning rate becomes a tensor.
    losses
        Of each cell, by ``engine.network``.
    labels
        Covariates of every batch.
    must
        A step that cannot be recorded is an error; else it is told, and steps go on one kernel after the other.
    """

    def __init__(self, engine: Engine, losses: Losses, labels: tuple[str, ...], *, must: bool = True) -> None:
        self.engine, self.losses, self.labels = engine, losses, labels
        engine.capturable()
        self.captured = Captured(self._step, "train.graph", must=must)

    def __call__(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """Take a step on these cells: their losses ``[b]``, not weighted, and the gradient's norm."""
        codes = (noised.cond.labels[k] for k in self.labels)
        losses, norm = self.captured(noised.x_0, noised.x, noised.p, noised.weight, *codes)
        return losses, norm

    def _step(self, x_0: Tensor, x: Tensor, p: Tensor, weight: Tensor, *codes: Tensor) -> tuple[Tensor, ...]:
        cond = Condition(dict(zip(self.labels, codes, strict=True)))
        with self.engine.one_pass():
            losses = self.losses(x_0, x, p, cond)
            self.engine.accelerator.backward((losses * weight).mean())
        return losses.detach(), self.engine.step()
