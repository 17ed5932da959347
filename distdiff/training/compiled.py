"""``torch.compile`` as a switch that stops no run: what cannot be compiled runs as it is, and one line says why."""

from __future__ import annotations

import logging

import torch

from distdiff.denoise import Denoiser
from distdiff.training.losses import Law
from distdiff.types import Condition

log = logging.getLogger("distdiff")


def compile_denoiser(denoiser: Denoiser, cells: int, genes: int, labels: tuple[str, ...] = ()) -> bool:
    """Compile a denoiser in place, proved by one forward and backward pass; names of weights stay as they are.

    Parameters
    ----------
    cells, genes, labels
        Shape of the batches to come, and the covariates they carry.

    Returns
    -------
    bool
        Whether it is compiled now. If not, the reason was logged.
    """
    if denoiser.ragged:
        log.warning(
            "train.compile: shapes differ from batch to batch (%s); the network runs uncompiled", denoiser.ragged
        )
        return False
    device = next(denoiser.parameters()).device
    x, p = torch.zeros(cells, genes, device=device), torch.full((cells, genes), 0.5, device=device)
    cond = Condition({name: torch.zeros(cells, dtype=torch.long, device=device) for name in labels})
    kept = {name: w.grad for name, w in denoiser.named_parameters()}
    denoiser.compile()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            denoiser(x, p, cond).sum().backward()
    except Exception as error:  # whatever the compiler cannot do here: no C++ compiler, an operation, a device
        denoiser._compiled_call_impl = None
        _warn(error, "network")
        return False
    finally:
        for name, w in denoiser.named_parameters():
            w.grad = kept[name]
    return True


def compile_law(law: Law, outputs: int, cells: int, genes: int, device: torch.device) -> Law:
    """Compile what a process makes of the network's answers, proved by one forward and backward pass.

    It is nothing but sums, products and logarithms of ``[b g]`` in float32: apart they read and write far more memory
    than the network does, together little.

    Parameters
    ----------
    outputs, cells, genes
        Shape of the answers to come.

    Returns
    -------
    callable
        The compiled law; if it cannot be compiled the law as it is, and the reason was logged.
    """
    raw = torch.zeros(cells, outputs, genes, device=device, requires_grad=True)
    x, p = torch.zeros(cells, genes, device=device), torch.full((cells, genes), 0.5, device=device)
    try:
        compiled = torch.compile(law)
        compiled(raw.transpose(1, 2), x + 1, x, p).sum().backward()
    except Exception as error:  # see above
        _warn(error, "loss")
        return law
    return compiled


def _warn(error: Exception, what: str) -> None:
    first = str(error).strip().splitlines() or [""]
    log.warning("train.compile: %s: %s; the %s runs uncompiled", type(error).__name__, first[0], what)
