"""Any imputer's batches as CUDA graphs: a batch of a shape that was seen before is one launch."""

from __future__ import annotations

import torch

from distdiff.graphs import Captured
from distdiff.imputers import Imputed, Imputer, fused_draws
from distdiff.imputers.conditional import Conditional
from distdiff.types import Bool, Cells, Condition, Tensor


class Graphed(Imputer):
    """The same answers as ``imputer``'s, recorded and replayed (:class:`~distdiff.graphs.Captured`).

    For :class:`~distdiff.imputers.conditional.Conditional` by means, standard deviations and draws: the network's
    weights must stay where they are, and the network have one shape inside.

    Raises
    ------
    ValueError
        A network whose shapes differ from batch to batch, or a read-out that looks at numbers on the host.
    """

    def __init__(self, imputer: Imputer):
        if not isinstance(imputer, Conditional):
            raise ValueError(f"graph=True: method {type(imputer).__name__} looks at its walk on the host; leave it out")
        self.imputer, self.readout, self.statistics = imputer, imputer.readout, imputer.statistics
        self.graphs: dict[object, Captured] = {}
        why = imputer.denoiser.ragged and f"shapes differ from batch to batch ({imputer.denoiser.ragged})"
        if on_host := {self.readout, *self.statistics} - {"mean", "sd"}:
            why = f"the read-out {min(on_host)!r} is computed on the host in part; means, sd and draws are not"
        if imputer.solver != "plain":
            why = f"solver {imputer.solver!r} looks at the walk on the host; use solver='plain'"
        if why:
            raise ValueError(f"graph=True: {why}; or leave it out")

    @torch.no_grad()
    def impute(self, cells: Cells, observed: Bool[Tensor, "b g"], *, draws: int = 0, seed: int = 0) -> Imputed:
        """See :class:`~distdiff.imputers.Imputer`.

        Raises
        ------
        ValueError
            Not on a GPU, or draws that wait for it.
        """
        _check(observed.device, draws)
        names = tuple(cells.labels.labels)

        def flat(counts: Tensor, rows: Tensor, observed: Tensor, *codes: Tensor) -> tuple[Tensor, ...]:
            these = Cells(counts, Condition(dict(zip(names, codes, strict=True))), rows)
            found = self.imputer.impute(these, observed, draws=draws, seed=seed)
            return (found.mean, *found.statistics.values(), *(() if found.draws is None else (found.draws,)))

        key = tuple(observed.shape), names, draws, seed
        captured = self.graphs.setdefault(key, Captured(flat, "graph=True"))
        mean, *rest = captured(cells.counts, cells.rows, observed, *cells.labels.labels.values())
        return Imputed(mean, rest[-1] if draws else None, dict(zip(self.statistics, rest, strict=False)))


def _check(device: torch.device, draws: int) -> None:
    if device.type != "cuda":
        raise ValueError(f"graph=True: CUDA graphs need a GPU, these cells are on {device}; leave it out")
    if draws and not fused_draws(device):
        raise ValueError("graph=True: draws must not wait for the GPU; that needs triton, and DISTDIFF_FUSED not 0")
