"""What a job does to its rows: the interface of all tasks, and what tasks on measured cells share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch

from distdiff.batch.layout import Field, Values
from distdiff.model import Model
from distdiff.tasks import Block, Reader, check_labels, columns_of
from distdiff.tasks.frame import warn_left_out
from distdiff.tasks.impute import FillCounts
from distdiff.tasks.likelihood import check_ood, nats

if TYPE_CHECKING:
    from pandas import DataFrame

NATS = "obs/distdiff_nats"


class Task(ABC):
    """One task on the rows of one input.

    Attributes
    ----------
    rows
        The input (see :mod:`~distdiff.batch.rows`).
    genes
        Genes of the result.
    inherits
        Whether the result holds whatever else the input holds, its X untouched; else X is a field.
    fields
        What is written.
    uns
        Entry of ``uns`` that says what was done.
    about_genes
        Columns that ``var`` gets, a row a gene of the result, or ``None``.
    """

    name: str
    uns = "distdiff"
    inherits = False
    model: Model
    rows: Any
    genes: tuple[str, ...]
    added: tuple[str, ...] = ()
    about_genes: DataFrame | None = None
    fields: list[Field]
    device: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Options that must be equal for two runs of this task to give the same result; plain JSON."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Any:
        """Rows of the input, on the CPU; called in a thread of its own, for one block after the other."""

    @abstractmethod
    def compute(self, block: Any) -> tuple[Values, Callable[[], FillCounts]]:
        """The fields of a block, still on the device, and a function that counts what was done.

        The function waits for the device.
        """

    def provenance(self) -> dict[str, Any]:
        """What stands in ``uns['distdiff']``, beside what was done."""
        return self.model.provenance(task=self.name)

    def about(self) -> dict[str, Any]:
        """What else stands in ``uns['distdiff']``."""
        return {}

    def stale(self, path: str) -> bool:
        """Whether an element of the input is the result of an earlier run, which is not taken over."""
        return path == NATS

    def labels(self, start: int, stop: int) -> Values:
        """Names and labels of some rows, where they are not inherited."""
        if self.rows.frame is not None:
            return {}
        codes = {f"obs/{k}/codes": self.rows.codes(k, start, stop) for k in self.rows.labels}
        return {"obs/_index": self.rows.names(start, stop), **codes}

    def label_fields(self) -> list[Field]:
        """The fields of :meth:`labels`."""
        if self.rows.frame is not None:
            return []
        wide = {k: "int16" if len(v) < 2**15 else "int32" for k, v in self.rows.labels.items()}
        return [Field("obs/_index", "str"), *(Field(f"obs/{k}/codes", dtype) for k, dtype in wide.items())]


class OnCells(Task):
    """A task on cells that were measured.

    Parameters
    ----------
    model, rows
        The model and the input.
    keep
        Genes of the result that are to be written; ``None``: all.
    ood
        Levels of the likelihood bound that stands in ``obs['distdiff_nats']``, each a network call; 0: none.
    """

    reader: Reader
    whole = False

    def __init__(
        self, model: Model, rows: Any, reader: Reader, genes: tuple[str, ...], *, keep: Sequence[str] | None, ood: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.reader, self.ood, self.seed = model, rows, reader, check_ood(ood), seed
        self.device = reader.device
        check_labels(reader, model.required_labels)
        self.at: np.ndarray | None = None
        self.genes = genes
        if keep is not None:
            at = columns_of(keep, genes)
            if tuple(keep) != genes:
                self.genes, self.at = tuple(keep), at
        self.inherits = rows.frame is not None and rows.whole(self.genes)
        self.left_out = [] if self.inherits or rows.frame is None else rows.left_out()
        warn_left_out(self.left_out, rows.where)
        self.fields = [*self.label_fields(), *([] if self.inherits else [Field("X", "float32", len(self.genes), True)])]
        if ood:
            self.fields.append(Field(NATS, "float32"))

    def identity(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {
            "genes": hashlib.sha256("\n".join(self.genes).encode()).hexdigest(), "labels": sorted(self.reader.labels),
            "ood": self.ood, "seed": self.seed,
        }  # fmt: skip

    def read(self, start: int, stop: int) -> Block:
        """See :class:`Task`."""
        return self._fitting(self.reader.block(start, stop))

    def _fitting(self, block: Block) -> Block:
        """Refuse decimals of genes that the model does not know where they would stand in a layer of whole numbers."""
        if self.reader.unknown and self.whole:
            given = block.given[:, torch.from_numpy(~self.reader.known)]
            if bool((given != given.round()).any()):
                at = np.flatnonzero(~self.reader.known)[int((given != given.round()).any(0).nonzero()[0])]
                raise ValueError(
                    f"{self.rows.where}: {self.rows.genes[at]!r}, which the model does not know, holds decimals, and "
                    "draws are layers of whole numbers: say in var['feature_types'] what is no Gene Expression, leave "
                    "those columns out, or write no draws (layers=['mean'])"
                )
        return block

    def drawn(self, path: str, width: int, sparse: bool | None) -> Field:
        """A layer of draws: whole numbers of 32 bits, floating point where features that are no genes stand beside."""
        self.whole = getattr(self.rows, "expressed", None) is None
        return Field(path, "int32" if self.whole else "float32", width, sparse)

    def compute(self, block: Block) -> tuple[Values, Callable[[], FillCounts]]:
        """See :class:`Task`."""
        block = block.to(self.device)
        layers, filled = self.answer(block)
        found: Values = {k: self._kept(v) for k, v in layers.items()}
        if not self.inherits:
            found["X"] = self._counts(block.counts)
        if self.ood:
            found[NATS] = nats(
                self.model.process, self.model.denoiser, block.cells, block.observed, levels=self.ood, seed=self.seed
            )
        return found, filled

    @abstractmethod
    def answer(self, block: Block) -> tuple[dict[str, torch.Tensor], Callable[[], FillCounts]]:
        """The layers ``layers/NAME`` of a block, all genes of the result."""

    def about(self) -> dict[str, Any]:
        """See :class:`Task`."""
        return {"left_out": self.left_out} if self.left_out else {}

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        if self.at is None:
            return values
        return values[:, torch.from_numpy(self.at).to(values.device, non_blocking=True)]

    def _counts(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """The observed counts in the genes of the result, ascending."""
        wide = sp.csr_matrix((counts.data, counts.indices, counts.indptr), (counts.shape[0], self._width))
        return wide if self.at is None else wide[:, self.at].sorted_indices()

    @property
    def _width(self) -> int:
        return len(self.rows.genes) + len(self.added)
