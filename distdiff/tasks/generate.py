"""Generate: cells from nothing but covariates (docs/MATHS.md 5.1)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from distdiff.component import nearest
from distdiff.denoise import Denoiser
from distdiff.imputers import by_row
from distdiff.process import Process
from distdiff.process.schedule import levels
from distdiff.sampling import predictor, sample
from distdiff.tasks import at_least_one
from distdiff.types import UNKNOWN, Cells, Condition, DataSpec, Float, Tensor

log = logging.getLogger("distdiff")


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
            raise ValueError(f"the model was not trained with label {name!r}{nearest(name, spec.labels)}")
        known = {value: code for code, value in enumerate(spec.labels[name])}
        values = [values] * n if isinstance(values, str) else list(values)
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
        for value in sorted({values} if isinstance(values, str) else set(values)):
            cells = counted.get(label, {}).get(value, RARE)
            if cells < RARE:
                log.warning(
                    "generate: %s %r had %d training cells, fewer than %d; what is made of it is a guess",
                    label, value, cells, RARE,
                )  # fmt: skip


@torch.no_grad()
def generate(
    process: Process, denoiser: Denoiser, spec: DataSpec, n: int, labels: Mapping[str, torch.Tensor], *,
    steps: int = 16, spacing: str | Sequence[float] = "time", solver: str = "plain",
    sigma: tuple[str, float] = ("none", 0.0), guidance: float = 1.0, seed: int = 0, batch_size: int = 256,
) -> Iterator[Float[Tensor, "b g"]]:  # fmt: skip
    """Draw ``n`` cells, every gene from p = 0 to 1 (docs/MATHS.md 5.1); cell ``i`` depends on ``seed`` and ``i`` alone.

    Raises
    ------
    ValueError
        ``batch_size`` below 1, or steps that are no walk.
    """
    device = next(denoiser.parameters()).device
    grid = levels(process.schedule, steps, spacing).to(device)
    for start in range(0, n, at_least_one(batch_size)):
        rows = torch.arange(start, min(start + batch_size, n))
        cond = Condition({k: v[rows] for k, v in labels.items()}).to(device)
        counts = torch.zeros(len(rows), spec.n_genes, device=device)
        cells = Cells(counts, cond, rows.to(device, non_blocking=True))
        rng = by_row(cells, 1, seed, "generate")
        x = process.prior(tuple(cells.counts.shape), rng=rng)  # type: ignore[arg-type]
        predict = predictor(process, denoiser, cond, guidance=guidance)
        yield process.leave(sample(process, predict, x, list(grid), sigma=sigma, solver=solver, rng=rng))


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
    if not spec.labels:
        raise ValueError(f"guidance={guidance:g} needs a model trained with labels (data.labels); this one has none")
    if required:
        raise ValueError(
            f"guidance={guidance:g} needs a model trained with label dropout (train.label_dropout > 0); this one had "
            "the labels in every cell"
        )
