"""Deepen: walk a cell on to a multiple of its depth; molecules are added, none removed (docs/MATHS.md 5.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from distdiff.component import nearest
from distdiff.denoise import Denoiser
from distdiff.imputers import by_row
from distdiff.process import Process
from distdiff.process.counts import of_molecules
from distdiff.process.schedule import levels
from distdiff.sampling import predictor, sample
from distdiff.tasks.depths import share_of
from distdiff.types import Bool, Cells, DataSpec, Float, Tensor

BEYOND = ("refuse", "allow")
"""What becomes of cells that would be deeper than the training cells were."""

MOST = 1000
"""Times the depth: a cell of 2,000 molecules would have more than a cell holds."""


@torch.no_grad()
def deepen(
    process: Process, denoiser: Denoiser, spec: DataSpec, cells: Cells, measured: Bool[Tensor, "b g"], *, times: float,
    steps: int = 8, seed: int = 0, depth: Mapping[str, float] | None = None,
    beyond: Literal["refuse", "allow"] = "refuse",
) -> Float[Tensor, "b g"]:  # fmt: skip
    """Whole counts of the same cells at ``times`` their depth: a walk from p = 1 / times to 1 (docs/MATHS.md 5.5).

    Genes that were not measured start at p = 0. There is no attrition, so no count falls.

    Parameters
    ----------
    depth
        Quantiles of the training cells' molecules, of which ``q99`` is the limit; ``None``: they were not measured.

    Raises
    ------
    ValueError
        ``times`` below 1 or above 1,000, a process without molecules, or a cell that would become deeper than the
        training atlas was (its 99th percentile), unless ``beyond="allow"``.
    """
    if not 1 <= times <= MOST:
        raise ValueError(f"deepen: times must be between 1 and {MOST:,}, got {times:,g}")
    of_molecules(process, "deepening")
    if beyond not in BEYOND:
        raise ValueError(f"deepen: beyond={beyond!r}; it is refuse or allow{nearest(beyond, BEYOND)}")
    if beyond == "refuse":
        _check_depth(spec, cells, measured, times, depth)
    rng = by_row(cells, 1, seed, "deepen")
    x = torch.where(measured, cells.counts, 0.0)
    first = measured.to(x.dtype) / times
    grid = [first + (1 - first) * level for level in levels(process.schedule, steps).tolist()]
    return sample(process, predictor(process, denoiser, cells.labels), x, grid, rng=rng)


def _check_depth(
    spec: DataSpec, cells: Cells, measured: Tensor, times: float, depth: Mapping[str, float] | None
) -> None:
    if depth is None:
        raise ValueError(
            "this model does not say how deep its training cells were (info['depth']), so it cannot tell how far; "
            "give beyond='allow' to deepen all the same"
        )
    asked = torch.where(measured, cells.counts, 0.0).sum(1) * times
    most = depth["q99"] * share_of(spec, measured)
    if bool((asked > most).any()):  # (waits for a GPU: a refusal must come before the answer)
        worst = int((asked / most.clamp_min(1e-12)).argmax())
        raise ValueError(
            f"row {int(cells.rows[worst])} would have {float(asked[worst]):,.0f} molecules, but 99 % of the training "
            f"cells have at most {float(most[worst]):,.0f} in these genes: the model never saw such depth; deepen by "
            "less, or give beyond='allow'"
        )
