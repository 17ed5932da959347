"""CUDA graphs: a function of tensors is recorded once and replayed, so that a GPU does not wait for Python."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

log = logging.getLogger("distdiff")

Function = Callable[..., tuple[Tensor, ...]]
WARM = 3
"""Ordinary calls before the recording: libraries choose their kernels, an optimiser allocates its state."""


class Captured:
    """A function of tensors with fixed shapes and dtypes, replayed as a CUDA graph, with the same results.

    The function must not read tensors on the host, and tensors that it uses besides its arguments (weights, constants)
    must keep their memory. It changes weights once a call, in the first calls and in the recorded call as well.

    Parameters
    ----------
    function
        Function from tensors on one CUDA device to a tuple of tensors.
    name
        Setting that switched the graph on, for messages.
    must
        What cannot be recorded is an error; else a warning, and every call stays an ordinary one.
    """

    def __init__(self, function: Function, name: str, *, must: bool = True) -> None:
        self.function, self.name, self.must, self.calls = function, name, must, 0
        self.ordinary = WARM
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], tuple[Tensor, ...]] | None = None

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Results of this call, which no later call overwrites.

        Raises
        ------
        ValueError
            Arguments of another shape or dtype than those that were recorded, or a function that cannot be recorded.
        """
        self.calls += 1
        if self.calls <= self.ordinary:
            return call_on_own_stream(self.function, given)
        if self.replay is None:
            self.inputs = [x.clone() for x in given]
            try:
                self.replay = record(self.function, self.inputs)
            except RuntimeError as error:
                why = f"{self.name}: this cannot be recorded as a CUDA graph ({str(error).splitlines()[0]})"
                if self.must:
                    raise ValueError(f"{why}; leave it out") from error
                log.warning("%s; every step is started from Python, which is slower", why)
                self.ordinary, self.inputs = sys.maxsize, []
                return call_on_own_stream(self.function, given)
        if [(x.shape, x.dtype) for x in given] != [(x.shape, x.dtype) for x in self.inputs]:
            shapes = [[tuple(x.shape) for x in of] for of in (given, self.inputs)]
            raise ValueError(f"{self.name}: a CUDA graph takes one shape, recorded was {shapes[1]}, given {shapes[0]}")
        for mine, new in zip(self.inputs, given, strict=True):
            mine.copy_(new, non_blocking=True)
        return tuple(x.clone() for x in self.replay())


def record(function: Function, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Record ``function`` on ``inputs`` without running it; the result replays it on whatever these tensors hold."""
    graph, cached = torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()  # casts of weights must be in the graph: cached copies end with the autocast
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # other threads (loader, writer) may use CUDA meanwhile
            outputs = function(*inputs)
    finally:
        torch.set_autocast_cache_enabled(cached)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def call_on_own_stream(function: Function, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Call on a separate stream, as in the recording: autograd remembers the stream of each tensor."""
    here, own = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    own.wait_stream(here)
    with torch.cuda.stream(own):
        outputs = function(*given)
    here.wait_stream(own)
    for x in outputs:
        x.record_stream(here)
    return outputs
