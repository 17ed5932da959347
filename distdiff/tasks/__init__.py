"""What a model does to a user's cells: impute, denoise, deepen, latent, generate, likelihood (docs/MATHS.md 5)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from tqdm import tqdm

from distdiff.component import name_list, nearest
from distdiff.data.counts import LAST_EXACT, as_counts, check_counts, dense, first_bad
from distdiff.data.ingest.source import codes
from distdiff.imputers.targets import Hidden
from distdiff.types import Cells, Condition, DataSpec

log = logging.getLogger("distdiff")

UNSEEN = ("unknown", "refuse")


@dataclass(frozen=True)
class Block:
    """Rows ``start ... stop`` of the input, as given and in the model's genes.

    Attributes
    ----------
    counts
        ``[n g_in]`` counts as they stand in the input.
    given, hidden
        The same, dense ``float32 [n g_in]``, and ``bool [n g_in]``: entries that are not to be looked at (``None``:
        none is).
    cells, observed
        The cells in the model's genes, hidden and absent entries 0, and which entries are evidence.
    """

    start: int
    stop: int
    counts: sp.csr_matrix
    given: torch.Tensor
    hidden: torch.Tensor | None
    cells: Cells
    observed: torch.Tensor

    def to(self, device: torch.device | str) -> Block:
        """The same on a device, which is not waited for."""
        hidden = None if self.hidden is None else self.hidden.to(device, non_blocking=True)
        return replace(
            self, given=self.given.to(device, non_blocking=True), hidden=hidden, cells=self.cells.to(device),
            observed=self.observed.to(device, non_blocking=True),
        )  # fmt: skip

    def pinned(self) -> Block:
        """The same in memory from which a GPU copies by itself."""
        cells = Cells(self.cells.counts.pin_memory(), self.cells.labels, self.cells.rows)
        hidden = None if self.hidden is None else self.hidden.pin_memory()
        return replace(
            self, given=self.given.pin_memory(), hidden=hidden, cells=cells, observed=self.observed.pin_memory()
        )


def columns_of(genes: Sequence[str], among: Sequence[str]) -> np.ndarray:
    """Where named genes stand among those of a result, ``int64 [g]``.

    Raises
    ------
    ValueError
        None is named, one twice, or one that the result does not have (the nearest one is named).
    """
    check_names(genes)
    column_of = {gene: i for i, gene in enumerate(among)}
    if unknown := [gene for gene in genes if gene not in column_of]:
        raise ValueError(
            f"genes: {unknown[0]!r} is no gene of the result{nearest(unknown[0], among)}; these are the input's, and "
            "those of the model that it lacks where they are imputed"
        )
    return np.array([column_of[gene] for gene in genes], dtype=np.int64)


def check_names(genes: Sequence[str]) -> None:
    """Refuse a list of genes that names none, or one twice.

    Raises
    ------
    ValueError
        It does.
    """
    if not len(genes := name_list("genes", genes)):
        raise ValueError("genes: no gene is named; leave genes= out to have all, or name some")
    seen: set[str] = set()
    for gene in genes:
        if gene in seen:
            raise ValueError(f"genes: {gene!r} is named more than once; name each gene once")
        seen.add(gene)


def device_of(device: str) -> str:
    """``auto``: the GPU where there is one; else the device as it is named.

    Raises
    ------
    ValueError
        No such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = ", ".join(("auto", "cpu", *(f"cuda:{i}" for i in range(gpus))))
        raise ValueError(f"device={device!r} is not to be had here; choose one of {here}") from error
    return device


def at_least_one(batch_size: int) -> int:
    """Cells at a time, of which there must be some.

    Raises
    ------
    ValueError
        There are none.
    """
    if not isinstance(batch_size, int | np.integer):
        raise ValueError(f"batch_size={batch_size!r}: a whole number of cells is wanted")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 cell, got {batch_size}")
    return batch_size


class Reader:
    """A user's cells, block by block, in the order of a model's genes.

    Parameters
    ----------
    spec
        The model's genes and labels.
    rows
        Anything with ``n_cells``, ``genes``, ``read(start, stop)`` and ``obs(key)``: a Source, or a store behind it.
    use_labels
        Condition on the obs columns that the model was trained with. Then the answer holds what they say: whoever
        compares their groups in it afterwards finds, in part, the labels again.
    unseen
        What a value that the model never saw is: ``unknown``, as a missing one (``uns`` has their number), or refused.
    device
        ``auto``: the GPU where there is one.

    Raises
    ------
    ValueError
        No cells, or no gene in common; labels that are to be used and are no column (the nearest one is named), or hold
        values that the model never saw with ``unseen="refuse"``.
    """

    def __init__(
        self, spec: DataSpec, rows: Any, *, use_labels: bool = False, unseen: Literal["unknown", "refuse"] = "unknown",
        batch_size: int = 256, device: str = "auto",
    ) -> None:  # fmt: skip
        column_of = {gene: i for i, gene in enumerate(spec.genes)}
        self.spec, self.rows, self.batch_size = spec, rows, at_least_one(batch_size)
        self._warned = False
        if unseen not in UNSEEN:
            raise ValueError(f"unseen={unseen!r}{nearest(unseen, UNSEEN)}")
        if not rows.n_cells:
            raise ValueError(f"{getattr(rows, 'where', 'the input')} has no cells; give an input with at least one")
        self.columns = np.array([column_of.get(g, -1) for g in rows.genes], dtype=np.int64)
        """Column in the model of each input gene, -1 where it has none (no gene expression has)."""
        if (expressed := getattr(rows, "expressed", None)) is not None:
            self.columns[~expressed] = -1
        self.known = self.columns >= 0
        if not self.known.any():
            raise ValueError(
                f"none of the input's {len(rows.genes)} genes is among the model's {spec.n_genes} (input: "
                f"{', '.join(rows.genes[:3])}..., model: {', '.join(spec.genes[:3])}...); are both symbols or "
                "both Ensembl ids?"
            )
        self.measured = np.zeros(spec.n_genes, dtype=bool)
        self.measured[self.columns[self.known]] = True
        self.unknown, self.absent = int((~self.known).sum()), int((~self.measured).sum())
        """Genes of the input that the model does not know, and of the model that the input lacks."""
        if self.unknown:
            first = rows.genes[int(np.argmin(self.known))]
            log.warning(
                "%d of the input's %d genes are unknown to the model (%s...) and are not used; %d of its own %d are "
                "absent from the input", self.unknown, len(rows.genes), first, self.absent, spec.n_genes,
            )  # fmt: skip
        self.same = bool(self.known.all()) and tuple(rows.genes) == tuple(spec.genes)
        """Whether the input's genes are the model's, in its order, and all of them were measured."""
        self.labels, self.unseen = _labels(spec, rows, unseen) if use_labels else ({}, 0)
        """Codes of the labels that answers are conditioned on, and how many values the model never saw."""
        self.device = device_of(device)

    def provenance(self) -> dict[str, Any]:
        """Entries of ``uns``: numbers of genes that only one of input and model has, and the labels that are used."""
        return {
            "genes_unknown_to_model": self.unknown, "genes_absent_from_input": self.absent,
            **self.label_provenance(),
        }  # fmt: skip

    def label_provenance(self) -> dict[str, Any]:
        """Entries of ``uns``: the labels that the answer is conditioned on, and the number of values never seen."""
        return {"conditioned_on": ",".join(self.labels), "labels_unseen": self.unseen}

    def blocks(self, hidden: Hidden | None = None, *, progress: bool = False, desc: str = "") -> Iterator[Block]:
        """All rows in order, on the device."""
        with tqdm(total=self.rows.n_cells, unit=" cells", desc=desc, disable=not progress) as bar:
            for start in range(0, self.rows.n_cells, self.batch_size):
                stop = min(start + self.batch_size, self.rows.n_cells)
                yield self.block(start, stop, hidden).to(self.device)
                bar.update(stop - start)

    def block(self, start: int, stop: int, hidden: Hidden | None = None) -> Block:
        """Some rows on the CPU; ``hidden(start, stop, counts)`` says which entries are not to be looked at.

        Raises
        ------
        ValueError
            An entry of a gene that the model knows is looked at and is no count, or one of 2^24 or more.
        """
        counts = as_counts(self.rows.read(start, stop))
        away = None if hidden is None else hidden(start, stop, counts)
        away = away if away is not None and away.any() else None
        refused = first_bad(counts) is not None or (counts.nnz and counts.data.max() >= LAST_EXACT)
        if refused:
            self._refuse(counts, away, start, stop)
            counts = self._finite(counts)
        given = counts.astype(np.float32, copy=False).toarray()
        evidence = given if away is None else np.where(away, np.float32(0), given)
        if self.same:
            x = evidence
            observed = np.ones(x.shape, dtype=bool) if away is None else ~away
        else:
            columns = self.columns[self.known]
            x = np.zeros((stop - start, self.spec.n_genes), dtype=np.float32)
            observed = np.zeros(x.shape, dtype=bool)
            observed[:, columns] = True if away is None else ~away[:, self.known]
            x[:, columns] = evidence[:, self.known]
        labels = {k: torch.from_numpy(v[start:stop]) for k, v in self.labels.items()}
        cells = Cells(torch.from_numpy(x), Condition(labels), torch.arange(start, stop))
        gone = None if away is None else torch.from_numpy(away)
        block = Block(start, stop, counts, torch.from_numpy(given), gone, cells, torch.from_numpy(observed))
        return block.pinned() if str(self.device).startswith("cuda") else block

    def _refuse(self, counts: sp.csr_matrix, away: np.ndarray | None, start: int, stop: int) -> None:
        """Name an entry that is looked at (no target, of a gene that is known) and is no count, if there is one."""
        read = np.broadcast_to(self.known, counts.shape)
        looked_at = sp.csr_matrix(np.where(read if away is None else read & ~away, counts.toarray(), 0))
        names = getattr(self.rows, "obs_names", None)
        cells = [str(n) for n in (names[start:stop] if names is not None else range(start, stop))]
        check_counts(looked_at, self.rows.genes, cells, getattr(self.rows, "where", "the input"))
        dense(looked_at)

    def _finite(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """The same with 0 for what is no finite number of 32 bits and is not looked at; warns once."""
        bad = ~(np.abs(counts.data) <= np.finfo(np.float32).max)
        if not bad.any():
            return counts
        if not self._warned:
            self._warned = True
            gene = self.rows.genes[int(counts.indices[int(np.argmax(bad))])]
            log.warning(
                "gene %r holds numbers that are not finite; the model does not look at them, and 0 stands for them in "
                "what it writes", gene,
            )  # fmt: skip
        return sp.csr_matrix((np.where(bad, 0, counts.data), counts.indices, counts.indptr), shape=counts.shape)

    def chosen(self, genes: Sequence[str] | Literal["model", "all"] | None) -> list[str] | None:
        """Genes of an answer: those of the input that the model knows, named ones, or all of the input (``None``).

        Raises
        ------
        ValueError
            A named gene that the model does not know, or that the input lacks.
        """
        if genes is None or genes == "all":
            return None
        known = [gene for gene, is_known in zip(self.rows.genes, self.known, strict=True) if is_known]
        if genes == "model":
            return None if len(known) == len(self.rows.genes) else known
        if isinstance(genes, str):
            raise ValueError(
                f"genes={genes!r}: 'model', 'all' or a list of names is wanted{nearest(genes, ('model', 'all'))}"
            )
        both = set(known)
        if unknown := [gene for gene in genes if gene not in both]:
            raise ValueError(
                f"genes: {unknown[0]!r} is no gene that both the model and the input know{nearest(unknown[0], known)}"
            )
        return list(genes)

    def widen(self, values: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        """``values`` ``[n g]`` in the input's genes; ``given`` (or 0) where the model does not know them."""
        if self.same:
            return values
        out = values.new_zeros(len(values), len(self.known)) if given is None else given.clone()
        known = torch.from_numpy(self.known).to(values.device)
        out[:, known] = values[:, torch.from_numpy(self.columns[self.known]).to(values.device)]
        return out


def _labels(spec: DataSpec, rows: Any, unseen: str) -> tuple[dict[str, np.ndarray], int]:
    """Codes of each label of the model, and how many values it never saw."""
    if not spec.labels:
        raise ValueError("use_labels: this model was trained without labels (data.labels), so there are none to use")
    found, total = {}, 0
    for name, vocabulary in spec.labels.items():
        try:
            values = rows.obs(name)
        except ValueError as error:
            raise ValueError(
                f"use_labels: the model is conditioned on {name!r}, and {error}; rename the column, give one that is "
                "empty (its values count as unknown), or go without labels"
            ) from None
        found[name] = codes(values, vocabulary)
        never = [v for v, code in zip(values, found[name], strict=True) if code < 0 and v is not None]
        if never and unseen == "refuse":
            raise ValueError(
                f"obs[{name!r}] holds {never[0]!r}, which the model never saw in training"
                f"{nearest(never[0], vocabulary)}; rename it, empty it, or let it count as unknown (unseen='unknown')"
            )
        if never:
            log.warning(
                "obs[%r]: %d of %d cells have a value that the model never saw, such as %r%s; it counts as unknown",
                name, len(never), len(values), never[0], nearest(never[0], vocabulary),
            )  # fmt: skip
        total += len(never)
    log.warning("conditioned on obs %s, as asked: differences between its groups are in part put in", ", ".join(found))
    return found, total


def check_labels(reader: Reader, required: Sequence[str], guidance: float = 1.0) -> None:
    """Refuse cells without the labels that a model requires, and guidance by labels that are not used.

    Parameters
    ----------
    required
        Labels that the model was trained with in every cell (:attr:`Model.required_labels
        <distdiff.model.Model.required_labels>`).

    Raises
    ------
    ValueError
        A required label is not used or has unseen values, or ``guidance`` is not 1 without labels.
    """
    if required and (reader.unseen or not reader.labels):
        raise ValueError(
            f"this model was trained with {', '.join(required)} in every cell (train.label_dropout=0) and has no "
            "answer without: use the labels (use_labels=True), with values that it saw, or train another"
        )
    if guidance != 1 and not reader.labels:
        raise ValueError(f"guidance={guidance:g} weighs labels, which are not used: give use_labels=True")
