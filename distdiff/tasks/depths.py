"""The molecules that generated cells are to have, drawn from the depths of the training cells of their labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from distdiff.denoise import Denoiser
from distdiff.process import Process
from distdiff.process.counts import Counts, of_molecules
from distdiff.rng import numpy_generator
from distdiff.rng.rows import Rows
from distdiff.types import DataSpec, Float, Tensor

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

log = logging.getLogger("distdiff")

QUANTILES = 41
"""Quantiles of depth that a model holds of each label value."""

MOST = 2048
"""Cells of a label value whose molecules are read, at most."""

BLOCK = 4096
"""Cells that are read at one time."""

Depth = float | Sequence[float] | NDArray[Any] | str | None
"""``None``: drawn. ``"free"``: what the walk gives. A number, or one a cell: molecules."""


def share_of(spec: DataSpec, observed: Tensor) -> Tensor:
    """Share of an average training cell's molecules that lie in the observed genes of each cell, ``float32 [b]``.

    Parameters
    ----------
    observed
        ``bool [b g]``.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from distdiff.tasks.depths import share_of
    >>> from distdiff.types import DataSpec
    >>> share_of(DataSpec(("A", "B"), {}, np.array([3.0, 1.0], np.float32)), torch.tensor([[True, False]]))
    tensor([0.7500])
    """
    mean = torch.as_tensor(spec.gene_mean, dtype=torch.float32).to(observed.device, non_blocking=True)
    return (observed * mean).sum(1) / mean.sum().clamp_min(1e-12)


def shallow(
    spec: DataSpec, counts: Float[Tensor, "b g"], observed: Tensor, depth: Mapping[str, float] | None
) -> Tensor:
    """Cells with fewer molecules than 99 % of the training cells had in the same genes, ``bool [b]``; not empty ones.

    Parameters
    ----------
    observed
        Entries that are evidence, ``bool [b g]``; ``counts`` are 0 in the others.
    depth
        Quantiles of the training cells' molecules, ``info["depth"]``; ``None``: they were not measured, and no cell is.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from distdiff.tasks.depths import shallow
    >>> from distdiff.types import DataSpec
    >>> spec = DataSpec(("A", "B"), {}, np.ones(2))
    >>> counts = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 0.0]])
    >>> shallow(spec, counts, torch.ones(3, 2, dtype=torch.bool), {"q01": 4.0})
    tensor([False,  True, False])
    """
    molecules = counts.sum(1)
    if depth is None:
        return torch.zeros_like(molecules, dtype=torch.bool)
    return (molecules > 0) & (molecules < depth["q01"] * share_of(spec, observed))


def levels(n: int) -> NDArray[np.float64]:
    """Probabilities of ``n`` quantiles, ``sin^2`` of equal steps: dense at both ends, where depths are far apart.

    Examples
    --------
    >>> from distdiff.tasks.depths import levels
    >>> levels(5).round(3)
    array([0.   , 0.146, 0.5  , 0.854, 1.   ])
    """
    return np.sin(np.linspace(0, np.pi / 2, n)) ** 2


def label_depths(store: CountStore, labels: Sequence[str], *, seed: int = 0) -> dict[str, dict[str, list[float]]]:
    """Quantiles of the molecules of training cells, label -> value -> list, in the store's genes.

    Stands in ``info["training"]["label_depth"]`` of a model. Under ``[""][""]`` are all training cells; values that
    no training cell has are left out. At most 2,048 cells of a value are read (of all cells, eight times as many).

    Examples
    --------
    >>> from distdiff import CountStore
    >>> from distdiff.tasks.depths import label_depths
    >>> found = label_depths(CountStore.open("atlas.zarr"), ["cell_type"])
    >>> sorted(found), len(found["cell_type"]["B"])
    (['', 'cell_type'], 41)
    """
    rows, rng = store.rows("train"), numpy_generator(seed, "label depths")
    shuffled, at = rng.permutation(rows), levels(QUANTILES)
    codes = store.labels(shuffled, labels)
    chosen = {("", ""): shuffled[: 8 * MOST]}
    for label in labels:
        for code, value in enumerate(store.manifest.labels[label]):
            if len(some := shuffled[codes[label] == code][:MOST]):
                chosen[label, value] = some
    every = np.unique(np.concatenate(list(chosen.values())))
    parts = [np.asarray(store.read(every[i : i + BLOCK]).sum(1)).ravel() for i in range(0, len(every), BLOCK)]
    molecules = np.concatenate(parts)
    found: dict[str, dict[str, list[float]]] = {label: {} for label in ("", *labels)}
    for (label, value), some in chosen.items():
        depths = molecules[np.searchsorted(every, some)]
        found[label][value] = np.quantile(depths, at).round(2).tolist()
    return found


def has_depths(process: Process, denoiser: Denoiser) -> bool:
    """Whether what a model generates are cells whose molecules can be drawn apart: counts, and no image."""
    return isinstance(process, Counts) and process.molecules and denoiser.depths


def depths_of(
    process: Process, denoiser: Denoiser, spec: DataSpec, info: Mapping[str, Any], labels: Mapping[str, torch.Tensor],
    n: int, depth: Depth = None, *, seed: int = 0,
) -> Float[Tensor, " n"] | None:  # fmt: skip
    """Molecules of each of ``n`` cells to be generated; ``None``: whatever the walk gives (docs/MATHS.md 4.12).

    Parameters
    ----------
    info
        Of the model; ``info["training"]["label_depth"]`` is written by training (:func:`label_depths`).
    labels
        Codes ``int64 [n]`` of every label of ``spec``, -1 where it is open.
    depth
        ``None``: drawn from the depths of the training cells with the cell's label (of all training cells, where every
        label is open). With several labels it is the geometric mean of their quantiles at one random level, so it lies
        between what each of them alone would give. ``"free"``, a number, or one for each cell.
    seed
        Cell ``i`` depends on it and on ``i`` alone.

    Raises
    ------
    ValueError
        A depth that is not a positive number, not one for each cell, or for a process that has no molecules.
    """
    if depth is None:
        return _drawn(process, denoiser, spec, info, labels, n, seed)
    if isinstance(depth, str):
        if depth != "free":
            raise ValueError(f"depth={depth!r}: 'free', a number of molecules, or one for each cell is wanted")
        return None
    of_molecules(process, f"depth={depth if np.ndim(depth) == 0 else '...'}")
    given = np.asarray(depth, dtype=np.float64)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != n):
        raise ValueError(f"depth: one number, or one for each of {n} cells is wanted, got shape {list(given.shape)}")
    if not (np.isfinite(given) & (given > 0)).all():
        wrong = given[~(np.isfinite(given) & (given > 0))].ravel()[0] if given.ndim else float(given)
        raise ValueError(f"depth must be a number of molecules above 0, got {wrong:g}")
    return torch.from_numpy(np.broadcast_to(given, n).astype(np.float32))


def _drawn(
    process: Process, denoiser: Denoiser, spec: DataSpec, info: Mapping[str, Any], labels: Mapping[str, torch.Tensor],
    n: int, seed: int,
) -> Float[Tensor, " n"] | None:  # fmt: skip
    if not has_depths(process, denoiser):
        return None
    known = info.get("training", {}).get("label_depth")
    if not known:
        log.warning(
            "generate: the model does not hold the depths of its training cells (it is of an earlier distdiff), so "
            "depths will vary too little; depth='free' asks for that, depth=NUMBER for another; train again to have "
            "them drawn"
        )
        return None
    places = torch.arange(n)
    u = Rows(places, torch.zeros_like(places), seed, "depth").uniform(n, 1).squeeze(1).double().numpy()
    total, parts = np.zeros(n), np.zeros(n)
    for label, values in spec.labels.items():
        code = labels[label].numpy()
        law = known.get(label, {})
        have = np.array([value in law for value in values], dtype=bool)
        asked = (code >= 0) & have[code] if len(values) else np.zeros(n, dtype=bool)
        total[asked] += np.log(_quantile([law.get(value, [1.0]) for value in values], code[asked], u[asked]))
        parts += asked
    open_ = parts == 0
    if open_.any():
        everyone = np.zeros(int(open_.sum()), dtype=np.int64)
        total[open_] = np.log(_quantile([known[""][""]], everyone, u[open_]))
    return torch.from_numpy(np.exp(total / np.maximum(parts, 1)).astype(np.float32))


def _quantile(laws: Sequence[Sequence[float]], code: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantile ``u`` of law ``code`` of each cell, linear between those that are known, at least one molecule."""
    found = np.empty(len(code))
    for value in np.unique(code):
        at, law = code == value, np.asarray(laws[value], dtype=np.float64)
        found[at] = np.interp(u[at], levels(len(law)), law)
    return np.maximum(found, 1.0)
