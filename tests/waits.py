"""Counts where code waits for a GPU, on a machine that has none.

Tensors of torch's device ``meta`` stand for those on the GPU: they have shapes and no numbers. Whatever needs a number
of theirs would wait for a real device: :class:`Waits` sees it, notes who asked, and answers with made-up numbers so
that the run goes on. Code that asks ``device.type == "cpu"`` goes its GPU's way.

Seen: ``.item()``, ``float``, ``bool``, ``.tolist()``, ``.cpu()``; ``nonzero``, masks as indices, ``masked_select``,
``unique``, ``repeat_interleave`` without its output's size, ``bincount`` (shapes that depend on numbers); copies to the
device that wait (``torch.tensor(..., device=)``, ``.to(device)`` without ``non_blocking``).

Not seen: whether memory is pinned (``non_blocking`` copies of more than 64 KiB wait where it is not); waits inside
kernels of CUDA, its allocator and NCCL; explicit ``torch.cuda.synchronize``; an optimiser's fused kernel, which
``meta`` does not have. Tests marked ``gpu`` see those, under ``torch.cuda.set_sync_debug_mode("error")``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distdiff.rng import Rng

aten = torch.ops.aten
DEVICE = torch.device("meta")
ROOT = Path(__file__).parents[1] / "distdiff"


def _on(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device == DEVICE


class Waits(TorchDispatchMode):
    """``with Waits() as waits: ...; waits.seen``: file:line of distdiff and the operation, one for each wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __enter__(self) -> Waits:
        self.made = _Made(self)
        self.made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)

    def note(self, what: str) -> None:
        """One more wait."""
        frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"
        self.seen.append(f"{at} ({what})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = SHAPED.get(func.overloadpacket)
        if answer is not None and kwargs.get("output_size") is None and any(map(_on, tree_leaves((args, kwargs)))):
            self.note(func.overloadpacket.__name__)
            return answer(*args, **kwargs)
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(map(_masks, args[1])):
            if len(args) < 3 or args[2].dim():  # (one number for all is a masked_fill)
                self.note(func.overloadpacket.__name__)
            return func(args[0], _unmasked(args[1]), *args[2:], **kwargs)
        if func is aten._to_copy.default and _on(args[0]) != (kwargs.get("device", args[0].device) == DEVICE):
            if _on(args[0]) or not kwargs.get("non_blocking"):
                self.note(func.overloadpacket.__name__)
            if _on(args[0]):
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and _on(args[0]) != _on(args[1]):
            if _on(args[1]) or not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.note(func.overloadpacket.__name__)
            return args[0] if _on(args[0]) else args[0].fill_(0)
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    """Tensors that are made of Python numbers on the device: torch copies them there, and waits."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = args[1] if func is Tensor.new_tensor else args[0] if args else None
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and _on(answer) and not isinstance(given, Tensor):
            self.waits.note(func.__name__)
        return answer


def _masks(index: Any) -> bool:
    return _on(index) and index.dtype in (torch.bool, torch.uint8)


def _number(x: Tensor) -> Any:
    return torch.zeros((), dtype=x.dtype).item()


def _some(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As if the first half were not 0."""
    return torch.empty(x.numel() // 2, x.dim(), dtype=torch.int64, device=DEVICE)


def _unmasked(indices: list[Any]) -> list[Any]:
    out: list[Any] = []
    for i in indices:
        out += [torch.empty(i.numel() // 2, dtype=torch.int64, device=DEVICE)] * i.dim() if _masks(i) else [i]
    return out


SHAPED: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: _number,
    aten.equal: lambda a, b: False,
    aten.nonzero: _some,
    aten.masked_select: lambda x, where: torch.empty(x.numel() // 2, dtype=x.dtype, device=DEVICE),
    aten.bincount: lambda x, weights=None, minlength=0: torch.empty(
        max(1, minlength), dtype=torch.int64, device=DEVICE
    ),
    aten.repeat_interleave: lambda n: torch.empty(2 * n.numel(), dtype=torch.int64, device=DEVICE),
    aten._linalg_check_errors: lambda info, *a, **k: None,
    aten._unique2: lambda x, *a, **k: (torch.empty(x.numel(), dtype=x.dtype, device=DEVICE),) * 3,
}


class NoNumbers(Rng):
    """Draws of the right shape on the device; where they come from is not what is tested."""

    device = DEVICE

    def uniform(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=DEVICE)

    normal = uniform

    def binomial(self, n: Tensor, p: Tensor) -> Tensor:
        return torch.empty_like(n)

    def poisson(self, rate: Tensor) -> Tensor:
        return torch.empty_like(rate)

    def nb(self, mean: Tensor, log_size: Tensor) -> Tensor:
        return torch.empty_like(mean)
