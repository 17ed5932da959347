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
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from distdiff.denoise import Denoiser
from distdiff.training.optim import Optim
from distdiff.types import Tensor


class Engine:
    """One process, or DDP.

    Parameters
    ----------
    denoiser
        Carries the weights to start with; used through the engine alone afterwards.
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
        self.network, self.optimizer = self._prepare(denoiser, optim, share // accumulate)
        self.bare: torch.nn.Module = accelerator.unwrap_model(self.network)
        # what a short step need not wait for: a walk over modules, accelerate looking on disk for an optimiser library
        self._clipped = list(self.network.parameters())
        wrapped = accelerator.scaler is not None or accelerator.distributed_type is DistributedType.DEEPSPEED
        self._move = self.optimizer.step if wrapped else self.optimizer.optimizer.step

    def _prepare(self, denoiser: Denoiser, optim: Optim, cells: int) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
        """The network and the optimiser for passes of ``cells`` cells."""
        return self.accelerator.prepare(denoiser, optim.build(denoiser))

    def one_pass(self) -> AbstractContextManager[Any]:
        """Context of one forward and backward pass; gradients are exchanged in the last of a step alone."""
        return self.accelerator.accumulate(self.network)

    def rate(self, lr: float) -> None:
        """Set the learning rate of the coming step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def capturable(self) -> None:
        """Let a CUDA graph hold the optimiser's move: its learning rate becomes a number on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = torch.full((), group["lr"], device=self.accelerator.device)
            group["capturable"] = True

    def step(self) -> Tensor:
        """Clip, move the weights, forget the gradients; returns the gradient's norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self._clipped, self.clip)
        self._move()
        self.optimizer.zero_grad(set_to_none=True)
        if not isinstance(norm, Tensor):  # DeepSpeed's is a number; copying it to a GPU would wait
            return torch.full((), norm, device=self.accelerator.device)
        return _whole(norm)

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
            kept[w][field] = _like(w, value) if value.shape == w.shape else value.to(w.device)


class Sharded(Engine):
    """FSDP2."""

    def _prepare(self, denoiser: Denoiser, optim: Optim, cells: int) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
        _refuse_fp16(self.accelerator, "FSDP")
        if self.accelerator.mixed_precision == "bf16":  # as in all engines, not by casting the counts
            cast = torch.autocast(self.accelerator.device.type, torch.bfloat16)
            denoiser.forward = cast(denoiser.forward)  # type: ignore[method-assign]
        # the gathering for the backward pass hangs on the answer, which must be no view of another tensor
        denoiser.register_forward_hook(lambda module, given, answer: answer.clone())
        if self.accelerator.distributed_type is DistributedType.FSDP:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
            return super()._prepare(denoiser, optim, cells)
        from torch.distributed.fsdp import fully_shard

        fully_shard(denoiser)  # in place; accelerate knows no FSDP on CPUs
        return denoiser, self.accelerator.prepare(optim.build(denoiser))


class Zero(Engine):
    """DeepSpeed ZeRO, stages 1 to 3; weights stay float32, lower precision is torch's autocast as in all engines."""

    def _prepare(self, denoiser: Denoiser, optim: Optim, cells: int) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
        _refuse_fp16(self.accelerator, "DeepSpeed")
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self.stage = settings["zero_optimization"]["stage"]
        autocast = {"enabled": self.accelerator.mixed_precision == "bf16", "dtype": "bfloat16"}
        settings |= {
            "train_micro_batch_size_per_gpu": cells,
            "gradient_accumulation_steps": self.accelerator.gradient_accumulation_steps,
            "gradient_clipping": optim.clip,
            "torch_autocast": autocast,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "zero_force_ds_cpu_optimizer": False,  # offloaded moments move by torch's fused AdamW: nothing to compile
        }
        return super()._prepare(denoiser, optim, cells)

    @contextlib.contextmanager
    def weights(self) -> Iterator[list[Tensor]]:
        import deepspeed

        found = list(self.bare.parameters())
        with deepspeed.zero.GatheredParameters(found, enabled=self.stage == 3), torch.no_grad():
            yield [w.detach() for w in found]

    def state(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.optimizer.optimizer.optimizer
        step = next((torch.as_tensor(entry["step"]) for entry in inner.state.values()), None)
        if step is None:
            return
        self._link()
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
            zero.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **empty}
        self._link()
        weights: dict[str, Any] = dict(self.bare.named_parameters())
        for name, w in weights.items():
            for field in ("exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"{name}/{field}")) is None:
                    continue  # it never had a gradient
                value = value.to(self.accelerator.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(w, _part(value, w.ds_tensor.ds_numel, self.accelerator), field)
                else:
                    safe_set_full_optimizer_state(w, value, field)

    def _link(self) -> None:
        """Let each weight find its moments: DeepSpeed 0.19 does so after its first parameter group only."""
        zero = self.optimizer.optimizer
        if self.stage < 3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def prepare(accelerator: Accelerator, denoiser: Denoiser, optim: Optim, *, share: int, accumulate: int) -> Engine:
    """The engine that the launcher asked for, around a denoiser that is on its device.

    Raises
    ------
    ValueError
        fp16 under DeepSpeed or FSDP.
    """
    kind = Engine
    fsdp_on_cpus = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and accelerator.num_processes > 1
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        kind = Zero
    elif accelerator.distributed_type is DistributedType.FSDP or fsdp_on_cpus:
        kind = Sharded
    return kind(accelerator, denoiser, optim, share=share, accumulate=accumulate)


def _refuse_fp16(accelerator: Accelerator, engine: str) -> None:
    if accelerator.mixed_precision == "fp16":
        raise ValueError(f"train.precision=fp16 under {engine} is not supported: use bf16, or launch with ddp.yaml")


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is a ``DTensor`` (whose module takes a second to import and is not asked for)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(weight: Any, value: Tensor) -> Tensor:
    """``value`` on the devices of ``weight``, shared out as it is."""
    value = value.to(weight.device)
    if not hasattr(weight, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, weight.device_mesh, weight.placements)


def _part(value: Tensor, size: int, accelerator: Accelerator) -> Tensor:
    """The ``size`` numbers of this process, out of a flat tensor; the last parts are filled up with zeros."""
    flat = torch.zeros(size * accelerator.num_processes, dtype=value.dtype, device=value.device)
    flat[: value.numel()] = value.flatten()
    return flat[size * accelerator.process_index :][:size]
