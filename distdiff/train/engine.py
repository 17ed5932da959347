"""What trains the network: one process, DDP, FSDP2 or DeepSpeed ZeRO, behind one face that shows whole tensors.

accelerate chooses by the launch file (launch/accelerate). A checkpoint holds whole tensors by name, so one that was
written under any engine, by any number of processes, goes on under any other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distdiff.denoise import Denoiser
from distdiff.train.optim import Optim
from distdiff.types import Tensor


class Engine:
    """One process, DDP or FSDP2.

    Parameters
    ----------
    denoiser
        Carries the weights to start with; it must not be used but through the engine afterwards.
    share
        Cells of a step on this process.
    accumulate
        Backward passes of a step.
    """

    def __init__(
        self, accelerator: Accelerator, denoiser: Denoiser, optim: Optim, *, share: int, accumulate: int
    ) -> None:
        self.accelerator, self.clip = accelerator, optim.clip
        accelerator.gradient_accumulation_steps = accumulate
        self._configure(share // accumulate)
        if _asked_for("FSDP"):
            # torch hangs the gathering for the backward pass on the answer, which must be no view of another tensor
            denoiser.register_forward_hook(lambda module, given, answer: answer.clone())
        if accelerator.distributed_type is DistributedType.MULTI_CPU and _asked_for("FSDP"):
            fully_shard(denoiser)  # in place; accelerate does so on accelerators only
            self.network, self.optimizer = denoiser, accelerator.prepare(optim.build(denoiser))
        else:
            self.network, self.optimizer = accelerator.prepare(denoiser, optim.build(denoiser))
        self.bare: torch.nn.Module = accelerator.unwrap_model(self.network)
        self._clipped = list(self.network.parameters())  # looking for them takes longer than a small step on a GPU

    def _configure(self, cells: int) -> None:
        """Tell the engine what it must know about micro-batches of ``cells`` before it starts."""

    def one_pass(self) -> AbstractContextManager[Any]:
        """Context of one forward and backward pass; gradients are exchanged in the last of a step alone."""
        return self.accelerator.accumulate(self.network)

    def rate(self, lr: float) -> None:
        """Set the learning rate of the coming step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> Tensor:
        """Clip, move the weights, forget the gradients; returns the gradient's norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self._clipped, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return _whole(torch.as_tensor(norm, device=self.accelerator.device))

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[Tensor]]:
        """All weights, whole, on every process (all must ask)."""
        yield [_whole(w.detach()) for w in self.bare.parameters()]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of everything that the optimiser keeps, one after the other (all must ask)."""
        kept = self.optimizer.optimizer.state
        for name, w in self.bare.named_parameters():
            for field, value in kept.get(w, {}).items():
                yield f"{name}/{field}", _whole(value)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put :meth:`state` back."""
        kept = self.optimizer.optimizer.state
        weights: dict[str, Any] = dict(self.bare.named_parameters())
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            w = weights[name]
            shared_out = isinstance(w, DTensor) and value.shape == w.shape
            value = value.to(w.device)
            kept[w][field] = distribute_tensor(value, w.device_mesh, w.placements) if shared_out else value


class Zero(Engine):
    """DeepSpeed ZeRO, stages 1 to 3; weights stay float32, lower precision is torch's autocast as in all engines."""

    def _configure(self, cells: int) -> None:
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self.stage = settings["zero_optimization"]["stage"]
        precision = self.accelerator.mixed_precision
        if precision == "fp16":
            raise ValueError("train.precision=fp16 under DeepSpeed is not supported: use bf16, or launch with ddp.yaml")
        for name in ("bf16", "fp16"):
            settings[name] = {"enabled": False}
        settings |= {
            "train_micro_batch_size_per_gpu": cells,
            "gradient_accumulation_steps": self.accelerator.gradient_accumulation_steps,
            "gradient_clipping": self.clip,
            "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        }

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[Tensor]]:
        from deepspeed.zero import GatheredParameters

        found = list(self.bare.parameters())
        with GatheredParameters(found, enabled=self.stage == 3), torch.no_grad():
            yield [w.detach() for w in found]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.optimizer.optimizer.optimizer
        step = next((torch.as_tensor(entry["step"]) for entry in inner.state.values()), None)
        if step is None:
            return
        for name, w in self.bare.named_parameters():
            for field in ("exp_avg", "exp_avg_sq"):
                yield f"{name}/{field}", safe_get_full_optimizer_state(w, field)
            yield f"{name}/step", step

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not tensors:
            return
        zero = self.optimizer.optimizer
        step = next(value for key, value in tensors.items() if key.endswith("/step"))
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            empty = {field: torch.zeros_like(flat.data) for field in ("exp_avg", "exp_avg_sq")}
            zero.optimizer.state[flat] = {"step": step.to(flat.device), **empty}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        weights: dict[str, Any] = dict(self.bare.named_parameters())
        for name, w in weights.items():
            for field in ("exp_avg", "exp_avg_sq"):
                value = tensors[f"{name}/{field}"].to(self.accelerator.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(w, _part(value, w.ds_tensor.ds_numel, self.accelerator), field)
                else:
                    safe_set_full_optimizer_state(w, value, field)


def prepare(accelerator: Accelerator, denoiser: Denoiser, optim: Optim, *, share: int, accumulate: int) -> Engine:
    """The engine that the launcher asked for, around a denoiser that is on its device.

    Raises
    ------
    ValueError
        fp16 under DeepSpeed.
    """
    kind = Zero if accelerator.distributed_type is DistributedType.DEEPSPEED else Engine
    return kind(accelerator, denoiser, optim, share=share, accumulate=accumulate)


def _asked_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(value: Tensor, size: int, accelerator: Accelerator) -> Tensor:
    """This process's ``size`` numbers of a flat tensor; the last parts are filled up with zeros."""
    flat = torch.zeros(size * accelerator.num_processes, dtype=value.dtype, device=value.device)
    flat[: value.numel()] = value.flatten()
    return flat[size * accelerator.process_index :][:size]
