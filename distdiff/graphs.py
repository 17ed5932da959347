"""CUDA graphs: a function of tensors recorded once and replayed, so that a GPU waits for no Python between kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
WARM = 3
"""Calls that run as they are before one is recorded: libraries choose their kernels, an optimiser makes its state."""


class Captured:
    """``function`` of tensors that keep shape and dtype from call to call; a call is the function's, numbers and all.

    The function must not ask for numbers on the host, and what it takes besides its arguments (weights, constants) must
    stay where it is. What it does to weights happens once a call, in the first calls and the recorded one too.

    Parameters
    ----------
    function
        Takes tensors on one CUDA device and returns a tuple of them.
    name
        Setting that asked for this, for messages.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.function, self.name, self.calls = function, name, 0
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], tuple[Tensor, ...]] | None = None

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Answers of this call, which no later call overwrites.

        Raises
        ------
        ValueError
            Arguments of another shape or dtype than those that were recorded, or a function that cannot be recorded.
        """
        self.calls += 1
        if self.calls <= WARM:
            return call_on_own_stream(self.function, given)
        if self.replay is None:
            self.inputs = [x.clone() for x in given]
            try:
                self.replay = record(self.function, self.inputs)
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                raise ValueError(
                    f"{self.name}: this cannot be recorded as a CUDA graph ({first}); leave it out"
                ) from error
        if [(x.shape, x.dtype) for x in given] != [(x.shape, x.dtype) for x in self.inputs]:
            shapes = [[tuple(x.shape) for x in of] for of in (given, self.inputs)]
            raise ValueError(f"{self.name}: a CUDA graph takes one shape, recorded was {shapes[1]}, given {shapes[0]}")
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new, non_blocking=True)
        return tuple(x.clone() for x in self.replay())


def record(function: Function, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Record what ``function`` does to ``inputs`` where they are, without doing it; the answer does it."""
    graph, cached = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()  # casts of weights belong into the graph: their copies do not outlive an autocast
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on: loader, writer
            outputs = function(*inputs)
    finally:
        torch.set_autocast_cache_enabled(cached)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def call_on_own_stream(function: Function, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Call on a stream of its own, as recording will be: what autograd notes of streams then fits."""
    here, own = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    own.wait_stream(here)
    with torch.cuda.stream(own):
        outputs = function(*given)
    here.wait_stream(own)
    for x in outputs:
        x.record_stream(here)
    return outputs
