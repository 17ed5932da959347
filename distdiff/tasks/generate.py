"""Generate: cells from nothing but covariates (docs/MATHS.md 5.1)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distdiff.component import nearest
from distdiff.data.ingest.source import as_text
from distdiff.denoise import Denoiser
from distdiff.imputers import by_row
from distdiff.process import Process
from distdiff.process.schedule import levels
from distdiff.sampling import predictor, sample, to_depth
from distdiff.tasks import at_least_one
from distdiff.tasks.depths import has_depths
from distdiff.types import UNKNOWN, Cells, Condition, DataSpec, Float, Tensor

log = logging.getLogger("distdiff")


def one_a_cell(values: Any, n: int) -> list[str]:
    """Names of label values: a single one for all ``n`` cells, or those given.

    Examples
    --------
    >>> from distdiff.tasks.generate import one_a_cell
    >>> one_a_cell("B", 2), one_a_cell([1, 2.0], 2)
    (['B', 'B'], ['1', '2'])
    """
    return [as_text(value) for value in ([values] * n if np.ndim(values) == 0 else values)]


def label_codes(spec: DataSpec, obs: Mapping[str, str | Sequence[str]], n: int) -> dict[str, torch.Tensor]:
    """Codes ``int64 [n]`` of the asked labels; labels that are not asked for stay unknown.

    Raises
    ------
    ValueError
        A label or value that the model does not know, or another number of values than cells.
    """
    found = {name: torch.full((n,), UNKNOWN) for name in spec.labels}
    for name, values in obs.items():
        if name not in spec.labels:
            how = nearest(name, spec.labels) if spec.labels else f"; train one with data.labels=[{name}]"
            raise ValueError(f"the model was not trained with label {name!r}{how}")
        known = {value: code for code, value in enumerate(spec.labels[name])}
        values = one_a_cell(values, n)
        if len(values) != n:
            raise ValueError(f"obs[{name!r}] has {len(values)} values for {n} cells")
        if unknown := [v for v in values if v not in known]:
            raise ValueError(f"the model never saw {name} {unknown[0]!r}{nearest(str(unknown[0]), known)}")
        found[name] = torch.tensor([known[v] for v in values])
    return found


RARE = 100
"""Training cells of a label value below which generated cells of it are warned of."""


def warn_rare(info: Mapping[str, Any], obs: Mapping[str, str | Sequence[str]]) -> None:
    """Warn of asked label values that fewer than :data:`RARE` training cells had (``info["training"]`` of a model)."""
    counted = info.get("training", {}).get("labels", {})
    for label, values in obs.items():
        for value in sorted(set(one_a_cell(values, 1))):
            cells = counted.get(label, {}).get(value, RARE)
            if cells < RARE:
                log.warning(
                    "generate: %s %r had %d training cells, fewer than %d; what is made of it is a guess",
                    label, value, cells, RARE,
                )  # fmt: skip


@torch.no_grad()
def generate(
    process: Process, denoiser: Denoiser, spec: DataSpec, n: int, labels: Mapping[str, torch.Tensor], *,
    depth: Float[Tensor, " n"] | None = None, steps: int = 16, spacing: str | Sequence[float] | None = None,
    solver: str = "plain", sigma: tuple[str, float] = ("none", 0.0), guidance: float = 1.0, seed: int = 0,
    batch_size: int = 256,
) -> Iterator[Float[Tensor, "b g"]]:  # fmt: skip
    """Draw ``n`` cells, every gene from p = 0 to 1 (docs/MATHS.md 5.1); cell ``i`` depends on ``seed`` and ``i`` alone.

    Parameters
    ----------
    depth
        Molecules that each cell is to have (docs/MATHS.md 4.12, :func:`~distdiff.tasks.depths.depths_of`); ``None``:
        what the walk gives.
    steps, spacing
        Levels of the walk (:func:`~distdiff.process.schedule.levels`). ``None`` is ``geometric`` for cells of counts,
        ``time`` for other processes and images.
    solver, sigma
        Of :func:`~distdiff.sampling.sample`.
    guidance
        Weight of the labels (docs/MATHS.md 4.6). 1 keeps the law that was learned; more makes cells more typical of
        their label and less varied: a classifier recognises more of them, and their law is further from that of real
        cells (benchmarks/results/generate_pbmc3k.json).

    Raises
    ------
    ValueError
        ``batch_size`` below 1, or steps that are no walk.
    """
    device = next(denoiser.parameters()).device
    grid = walk_levels(process, denoiser, steps, spacing).to(device)
    for start in range(0, n, at_least_one(batch_size)):
        rows = torch.arange(start, min(start + batch_size, n))
        cond = Condition({k: v[rows] for k, v in labels.items()}).to(device)
        cells = Cells(torch.zeros(len(rows), 0, device=device), cond, rows.to(device, non_blocking=True))
        wanted = None if depth is None else depth[rows]
        yield walk(
            process, denoiser, cells, spec.n_genes, list(grid), depth=wanted, sigma=sigma, solver=solver,
            guidance=guidance, seed=seed,
        )  # fmt: skip


def walk_levels(
    process: Process, denoiser: Denoiser, steps: int, spacing: str | Sequence[float] | None
) -> Float[Tensor, " n"]:
    """Levels of a generating walk; ``None`` is ``geometric`` for cells of counts, else ``time`` (docs/MATHS.md 5.1)."""
    if spacing is None:
        spacing = "geometric" if has_depths(process, denoiser) else "time"
    return levels(process.schedule, steps, spacing)


def walk(
    process: Process, denoiser: Denoiser, cells: Cells, genes: int, grid: Sequence[Tensor], *,
    depth: Float[Tensor, " b"] | None, sigma: tuple[str, float], solver: str, guidance: float, seed: int,
) -> Float[Tensor, "b g"]:  # fmt: skip
    """Generate the cells of one batch from their labels and row numbers, along the levels ``grid``."""
    rng = by_row(cells, 1, seed, "generate")
    x = process.prior((len(cells), genes), rng=rng)
    predict = predictor(process, denoiser, cells.labels, guidance=guidance)
    if depth is not None:
        predict = to_depth(process, predict, depth.to(x.device, non_blocking=True).unsqueeze(1))
    return process.leave(sample(process, predict, x, grid, sigma=sigma, solver=solver, rng=rng))


def check_guidance(spec: DataSpec, required: Sequence[str], guidance: float) -> None:
    """A weight other than 1 needs a model that was trained with labels and without.

    Parameters
    ----------
    required
        Labels that the model was trained with in every cell.

    Raises
    ------
    ValueError
        The model has no labels, or requires them.
    """
    if guidance == 1:
        return
    if not np.isfinite(guidance):
        raise ValueError(f"guidance={guidance}: a weight is a finite number; 1 is the labels as they are")
    if not spec.labels:
        raise ValueError(f"guidance={guidance:g} needs a model trained with labels (data.labels); this one has none")
    if required:
        raise ValueError(
            f"guidance={guidance:g} needs a model trained with label dropout (train.label_dropout > 0); this one had "
            "the labels in every cell"
        )
