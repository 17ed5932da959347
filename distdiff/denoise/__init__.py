"""Denoisers: networks that predict ``k`` numbers for every gene of a thinned cell. They own weights and know no law."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from distdiff.types import Condition, Float, Tensor


class Denoiser(nn.Module, ABC):
    """``[b g]`` encoded counts and their survival probabilities -> ``[b g k]`` raw outputs.

    Built as ``Denoiser(spec, outputs, **options)`` from a :class:`~distdiff.types.DataSpec`. A gene with ``p = 0`` was
    not measured: its ``x`` must not change the output for any other gene. The output for a gene with ``p = 1`` is not
    used.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from distdiff.component import build
    >>> from distdiff.denoise import Denoiser
    >>> from distdiff.types import Condition, DataSpec
    >>> spec = DataSpec(("CD3E", "MS4A1"), {}, np.array([0.5, 2.0], np.float32))
    >>> network = build(Denoiser, {"kind": "mlp", "width": 8}, spec, 2)  # two numbers for each gene
    >>> network(torch.zeros(3, 2), torch.ones(3, 2), Condition()).shape
    torch.Size([3, 2, 2])
    """

    relative: bool = True
    """Whether output 0 is added to ``log(gene mean x depth)`` (:class:`~distdiff.denoise.embed.Expectation`)."""

    depths: bool = True
    """Whether a cell's total is a depth, which the measurement sets, and not its content, as the light of an image."""

    largest: Tensor | None
    """Most molecules of each gene in a training cell, ``float32 [g]``, or ``None``; moves with the weights, is none."""

    ragged: str = ""
    """Why tensor shapes change from batch to batch, so that ``torch.compile`` does not help; empty: they do not."""

    light: bool = False
    """Whether a GPU ends a training step sooner than Python can start it, so that a CUDA graph is faster."""

    gene_axes: Mapping[str, int] = {}
    """Weights that belong to genes, by name, and their gene axis (its length: k x genes, genes fastest)."""

    label_tables: str = "condition.tables"
    """Prefix of the names of weights that belong to label values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", None, persistent=False)

    @abstractmethod
    def forward(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b g k"]:
        """Outputs for every gene; ``x`` is ``log(1 + counts)``, ``p`` lies in [0, 1]."""

    def hidden(self, x: Float[Tensor, "b g"], p: Float[Tensor, "b g"], cond: Condition) -> Float[Tensor, "b d"]:
        """The last hidden state before the outputs, one vector a cell.

        Raises
        ------
        ValueError
            The denoiser has none.
        """
        raise ValueError(
            f"denoiser {type(self).__name__} has no hidden state of a cell; give it a method hidden(x, p, cond) -> "
            "[b d], or embed the layer that denoise writes (PCA)"
        )


DEEPEST = 1000
"""Largest depth; a larger one is a typing error, and building it would fill the memory."""


def layers(depth: int) -> range:
    """The numbers of the blocks, 0 to ``depth - 1``.

    Raises
    ------
    ValueError
        ``depth`` below 0 or above 1,000.

    Examples
    --------
    >>> from distdiff.denoise import layers
    >>> layers(3)
    range(0, 3)
    """
    if not 0 <= depth <= DEEPEST:
        raise ValueError(f"denoiser: depth must be between 0 and {DEEPEST:,}, got {depth:,}")
    return range(depth)


@torch.no_grad()
def adopt(
    to: Denoiser, genes: Sequence[str], weights: Mapping[str, Tensor], of: Sequence[str]
) -> tuple[int, tuple[str, ...]]:
    """Copy weights from a denoiser that was trained on other genes; weights of a gene are matched by its name.

    Parameters
    ----------
    to, genes
        The denoiser to fill and its genes, in its order. Genes that are not in ``of`` keep their initial weights.
    weights, of
        State of the trained denoiser and its genes.

    Returns
    -------
    known
        How many of ``genes`` are known.
    unused
        Names of weights that were not copied, because their labels have another vocabulary.

    Raises
    ------
    ValueError
        Another kind of denoiser, or another shape.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.denoise import adopt
    >>> from distdiff.denoise.mlp import MLP
    >>> from distdiff.types import DataSpec
    >>> trained = MLP(DataSpec(("A", "B"), {}, np.ones(2, np.float32)), 2, width=8)
    >>> new = MLP(DataSpec(("B", "C", "D"), {}, np.ones(3, np.float32)), 2, width=8)
    >>> adopt(new, ("B", "C", "D"), trained.state_dict(), of=("A", "B"))  # one gene is known, every weight fits
    (1, ())
    """
    mine = to.state_dict()
    if set(mine) != set(weights):
        unmatched = sorted(set(mine) ^ set(weights))[0]
        raise ValueError(
            f"these weights are of another denoiser: {unmatched!r} is in one of the two only; use its options"
        )
    column_of = {gene: i for i, gene in enumerate(of)}
    pairs = [(i, column_of[gene]) for i, gene in enumerate(genes) if gene in column_of]
    to_column, from_column = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    unused, buffers = [], dict(to.named_buffers())
    for name, tensor in mine.items():
        if name == "expectation.mean":  # measured on the new data
            continue
        axis, given = to.gene_axes.get(name), weights[name].to(tensor)
        if axis is None:
            if given.shape == tensor.shape:
                tensor.copy_(given)
            elif name.startswith(to.label_tables):
                unused.append(name)
            elif (
                name not in buffers
            ):  # a buffer (the rotations of LSH) is random, not trained, and depends on the number of genes
                raise ValueError(f"weight {name} has shape {list(given.shape)}, {list(tensor.shape)} is wanted")
            continue
        new = tensor.movedim(axis, 0).unflatten(0, (-1, len(genes)))
        old = given.movedim(axis, 0).unflatten(0, (-1, len(of)))
        if new[:, :0].shape != old[:, :0].shape:
            raise ValueError(
                f"weight {name} has shape {list(given.shape)}, {list(tensor.shape)} is wanted (apart from genes)"
            )
        new[:, to_column] = old[:, from_column]
    return len(pairs), tuple(unused)
