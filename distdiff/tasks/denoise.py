"""Denoise: the rate behind the counts of a cell, in one network call (docs/MATHS.md 5.4)."""

from __future__ import annotations

import numpy as np
import torch

from distdiff import readouts
from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.counts import of_molecules
from distdiff.sampling import predictor
from distdiff.tasks import Block, Reader
from distdiff.types import Bool, Cells, Float, Tensor

NEAR = 0.999
"""Survival of the evidence: the limit p -> 1 (docs/MATHS.md 5.4), from the side on which the network was trained."""

LIBRARIES = ("panel", "cell")
"""What ``log1p_cp10k`` can be normalised to, beside a column of obs: see :class:`Library`."""


@torch.no_grad()
def rates(
    process: Process, denoiser: Denoiser, cells: Cells, measured: Bool[Tensor, "b g"], *, p: float = NEAR
) -> tuple[Float[Tensor, "b g"], Float[Tensor, "b g"]]:  # fmt: skip
    """Rates ``lambda = f / (1 - p)`` as p -> 1 (docs/MATHS.md 5.4), in molecules at full depth, and log sizes.

    Parameters
    ----------
    measured
        Genes that were looked for; the others are at p = 0.

    Raises
    ------
    ValueError
        The process has no rates.
    """
    law = of_molecules(process, "denoising")
    x = torch.where(measured, cells.counts, 0.0)
    survival = p * measured.to(x.dtype)
    eta = predictor(law, denoiser, cells.labels)(x, survival)
    return law.rate(eta), law.log_size(eta)


@torch.no_grad()
def denoise(
    process: Process, denoiser: Denoiser, cells: Cells, measured: Bool[Tensor, "b g"], *, readout: str = "mean",
    depth: float = 1.0, library: Float[Tensor, "b 1"] | None = None,
) -> Float[Tensor, "b g"]:  # fmt: skip
    """Read out what another measurement of the same cells, ``depth`` times as deep, would hold.

    ``mean`` is the rate times ``depth``. For the read-outs see :func:`~distdiff.readouts.readout`.

    Parameters
    ----------
    library
        Molecules of each cell at its own depth, for ``log1p_cp10k``; None (or 0 of a cell): the sum of its rates.
    """
    readouts.check(readout)
    if not depth > 0:
        raise ValueError(f"denoise: depth must be positive, got {depth}")
    rate, log_size = rates(process, denoiser, cells, measured)
    if library is not None:
        library = depth * torch.where(library > 0, library, rate.sum(1, keepdim=True))
    return readouts.readout(readout, torch.zeros_like(rate), depth * rate, log_size, library)


class Library:
    """The molecules of each cell that ``log1p_cp10k`` is normalised to (docs/MATHS.md 5.8).

    Parameters
    ----------
    reader
        The cells.
    library
        ``panel``: what the model expects in its own genes; ``cell``: all molecules of the cell in the input, those of
        genes that the model does not know included; else a column of obs that holds them. None is ``cell`` where the
        input has genes that the model does not know, else ``panel``. A cell without molecules is as in ``panel``.
    readout
        The read-out that it is for.

    Raises
    ------
    ValueError
        A read-out that has no library; no such column, or one that is not a positive number for every cell.
    """

    def __init__(self, reader: Reader, library: str | None, readout: str) -> None:
        self.used = readout == "log1p_cp10k"
        if not self.used:
            if library is not None:
                raise ValueError(
                    f"denoise: library={library!r} is for readout='log1p_cp10k'; {readout!r} is normalised to nothing, "
                    "or to a sum of its own: leave library out"
                )
            library = "panel"
        self.name = library or ("cell" if reader.unknown else "panel")
        expressed = getattr(reader.rows, "expressed", None)
        self._genes = np.arange(len(reader.rows.genes)) if expressed is None else np.flatnonzero(expressed)
        self._names = reader.rows.genes
        self._column = None if self.name in LIBRARIES else _column(reader, self.name)

    def provenance(self) -> dict[str, str]:
        """Entry of ``uns``, where there is something to say."""
        return {"library": self.name} if self.used else {}

    def of(self, block: Block) -> Tensor | None:
        """``float32 [b, 1]`` of the cells of a block, on its device; None for ``panel``.

        Raises
        ------
        ValueError
            A gene that is to be counted holds numbers below 0.
        """
        if self.name == "panel":
            return None
        if self._column is not None:
            found = self._column[block.start : block.stop]
        else:
            counts = block.counts[:, self._genes]
            if counts.nnz and counts.data.min() < 0:
                gene = self._names[self._genes[counts.indices[counts.data.argmin()]]]
                raise ValueError(
                    f"denoise: library='cell' counts all molecules of a cell, and {gene!r} holds numbers below 0; say "
                    "in var['feature_types'] what is no Gene Expression, or take library='panel' or a column of obs"
                )
            found = torch.from_numpy(np.asarray(counts.sum(1), np.float32).ravel())
        return found.to(block.cells.counts.device, non_blocking=True).unsqueeze(1)


def _column(reader: Reader, key: str) -> Tensor:
    """A column of obs as ``float32 [n]``."""
    import pandas as pd

    try:
        values = reader.rows.obs(key)
    except ValueError as error:
        raise ValueError(f"denoise: library={key!r} is none of {', '.join(LIBRARIES)}, and {error}") from None
    found = pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(np.float32)
    good = np.isfinite(found) & (found > 0)
    if not good.all():
        at = int(np.argmin(good))
        raise ValueError(
            f"denoise: library={key!r}: obs[{key!r}] holds {values[at]!r} (cell {at}), a positive number of molecules "
            "is wanted for every cell; repair the column, or take library='cell'"
        )
    return torch.from_numpy(found)
