"""Point estimates for a given loss, computed from the predictive law and not from its mean (docs/MATHS.md 5.8).

The posterior mean is best for Poisson deviance and squared error of molecules; for a squared error of logarithms the
mean of the logarithm is best, for an absolute error the median. Each read-out names its loss; nothing is transformed
silently.
"""

from __future__ import annotations

import torch

from distdiff.component import nearest
from distdiff.process._laws import nb_mean_log1p, nb_quantile
from distdiff.types import Float, Tensor

NAMED = ("mean", "log1p", "log1p_cp10k", "open_problems", "median")

LIFTED = 10
"""Genes of a cell that carry the mass that ``open_problems`` lacks."""


def check(name: str) -> None:
    """Check the name of a read-out.

    Raises
    ------
    ValueError
        There is no read-out of this name.

    Examples
    --------
    >>> from distdiff.readouts import check
    >>> check("q97.5")
    >>> check("q101")
    Traceback (most recent call last):
        ...
    ValueError: unknown readout 'q101'; known: log1p, log1p_cp10k, mean, median, open_problems, q5, q95; a quantile ...
    """
    if name not in NAMED and _quantile(name) is None:
        raise ValueError(
            f"unknown readout {name!r}{nearest(name, (*NAMED, 'q5', 'q95'))}; a quantile reads q5 or q97.5"
        )


def _quantile(name: str) -> float | None:
    try:
        percent = float(name[1:]) if name.startswith("q") else -1.0
    except ValueError:
        return None
    return percent / 100 if 0 < percent < 100 else None


def readout(
    name: str,
    base: Float[Tensor, "b g"],
    mean: Float[Tensor, "b g"],
    log_size: Float[Tensor, "b g"],
    library: Float[Tensor, "b 1"] | None = None,
) -> Float[Tensor, "b g"]:
    """A statistic of ``y = base + NB(mean, size)``: ``E[y]``, ``E[log(1 + y)]`` or a quantile (docs/MATHS.md 5.8).

    Parameters
    ----------
    name
        ``mean`` (molecules); ``log1p``: ``E[log(1 + x)]``; ``log1p_cp10k``: ``E[log(1 + 10^4 x / library)]``;
        ``open_problems``: see :func:`open_problems`; ``median``, ``q5``, ``q97.5`` ...: quantiles (molecules).
    base, mean, log_size
        Observed molecules, expected further molecules, log size.
    library
        Molecules of each cell, for ``log1p_cp10k``; by default the sum of the means.

    Raises
    ------
    ValueError
        Unknown name.

    Examples
    --------
    >>> import torch
    >>> from distdiff.readouts import readout
    >>> observed, lost = torch.tensor([[1.0]]), torch.tensor([[2.0]])  # 1 molecule is there, 2 more are expected
    >>> log_size = torch.tensor([[0.5]]).log()
    >>> [readout(name, observed, lost, log_size).item() for name in ("mean", "median", "q95")]
    [3.0, 2.0, 9.0]
    """
    check(name)
    if name == "mean":
        return base + mean
    if name == "log1p":
        return nb_mean_log1p(base, mean, log_size, torch.ones_like(mean[:, :1]))
    if name == "log1p_cp10k":
        library = (base + mean).sum(1, keepdim=True) if library is None else library
        return nb_mean_log1p(base, mean, log_size, 1e4 / library.clamp_min(1e-12))
    if name == "open_problems":
        return open_problems(readout("log1p_cp10k", base, mean, log_size))
    return base + nb_quantile(0.5 if name == "median" else _quantile(name) or 0.5, mean, log_size)


def open_problems(log: Float[Tensor, "b g"]) -> Float[Tensor, "b g"]:
    """An entry for Open Problems' denoising score, not an estimate of expression (docs/MATHS.md 5.9).

    That score scales an answer to 10,000 a cell and takes its log1p, so the matching answer to its squared error,
    ``E[log(1 + 10^4 x / library)]``, is inflated: it adds up to less. Here the ten largest genes of each cell are
    multiplied until the cell has 10,000, and all others stay what they should be.

    Parameters
    ----------
    log
        The read-out ``log1p_cp10k``.

    Returns
    -------
    Tensor
        ``float32``, molecules in 10,000.

    Examples
    --------
    >>> import torch
    >>> from distdiff.readouts import open_problems
    >>> made = open_problems(torch.log1p(torch.tensor([[900.0] * 10 + [3.0]])))
    >>> round(made.sum().item()), round(made[0, -1].item(), 2)
    (10000, 3.0)
    """
    part = torch.expm1(log)
    largest, at = part.topk(min(LIFTED, part.shape[1]), dim=1)
    lacking = 1e4 - part.sum(1, keepdim=True)
    return part.scatter(1, at, largest + lacking * largest / largest.sum(1, keepdim=True).clamp_min(1e-12))
