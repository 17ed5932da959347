"""Imputation of a user's cells: which counts, which targets, which layers (docs/MATHS.md 5.2, 5.3, 5.6)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp
import torch

from distdiff.component import nearest
from distdiff.data.ingest.scan import select
from distdiff.data.ingest.source import codes, layer_names
from distdiff.data.masks import check_indices
from distdiff.imputers import Imputer, targets
from distdiff.received import check_answer
from distdiff.tasks import Block, Reader, check_labels
from distdiff.tasks.frame import taken

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from distdiff.data.ingest.source import Source
    from distdiff.model import Model


@dataclass
class Filled:
    """What an imputation did; stands in ``uns['distdiff']`` of the output."""

    cells: int = 0
    genes: int = 0
    targets: int = 0
    molecules_added: float = 0.0
    cells_without_evidence: int = 0
    genes_unknown_to_model: int = 0
    genes_absent_from_input: int = 0
    targets_of_unknown_genes: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> Filled:
        """Count one block's answer, and return itself."""
        self.cells += len(answer.filled)
        mean = next(iter(answer.layers.values()))
        added = torch.where(answer.filled, mean, 0.0).sum(dtype=torch.float64)
        counts = torch.stack((answer.filled.sum(), (~answer.evidence).sum(), answer.unknown))
        *numbers, molecules = torch.cat((counts.double(), added.unsqueeze(0))).tolist()  # one wait for the device
        targets, empty, unknown = map(int, numbers)
        self.targets += targets
        self.molecules_added += molecules
        self.cells_without_evidence += empty
        self.targets_of_unknown_genes += unknown
        return self


def mask_of(
    adata: AnnData, mask: str | np.ndarray | sp.spmatrix | DataFrame | None, rows: Source
) -> np.ndarray | sp.spmatrix | None:
    """A mask in the order of ``rows``, the counts of ``adata`` that are imputed.

    A layer (by its name) and a DataFrame are taken by names; a gene or cell that they lack is no target. An array goes
    by position.

    Raises
    ------
    ValueError
        No such layer; a DataFrame with names that the counts do not have, or have twice.
    """
    import pandas as pd

    if isinstance(mask, pd.DataFrame):
        for what, names, known in (("cell", mask.index, rows.obs_names), ("gene", mask.columns, rows.genes)):
            if (odd := ~names.isin(known) | names.duplicated()).any():
                raise ValueError(
                    f"mask: {what} {str(names[odd.argmax()])!r} is not among the input's {what}s, or is named twice; a "
                    "DataFrame is taken by its names, give mask.to_numpy() to have it taken by position"
                )
        return mask.reindex(index=rows.obs_names, columns=list(rows.genes), fill_value=False).to_numpy() != 0
    if not isinstance(mask, str):
        return mask
    if mask not in adata.layers:
        raise ValueError(f"mask={mask!r} is no layer of this AnnData{nearest(mask, layer_names(adata))}")
    layer = adata.layers[mask]
    if tuple(adata.var_names) == tuple(rows.genes):
        return layer
    at = adata.var_names.get_indexer(list(rows.genes))
    return taken(layer, at, (1,))


class MaskLayer:
    """A layer of a file as a mask of which rows are read; its columns are found by name, a gene that it lacks is no
    target."""

    def __init__(self, source: Source, genes: Sequence[str]) -> None:
        place = {gene: i for i, gene in enumerate(genes)}
        self.columns = np.array([place.get(gene, -1) for gene in source.genes], dtype=np.int32)
        self.source, self.shape = source, (source.n_cells, len(genes))

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        return select(self.source.read(rows.start, rows.stop), self.columns, self.shape[1])


@dataclass
class Job:
    """One imputation. :meth:`plan` checks all before anything is written."""

    reader: Reader
    imputer: Imputer
    hidden: targets.Hidden
    added: tuple[str, ...]
    point: str
    draws: int
    seed: int
    also: tuple[str, ...]
    provenance: dict[str, Any]

    @cached_property
    def place(self) -> np.ndarray:
        """Place in the model of each gene of the answer, -1 where it has none."""
        where = {gene: i for i, gene in enumerate(self.reader.spec.genes)}
        return np.r_[self.reader.columns, np.array([where[gene] for gene in self.added], dtype=np.int64)]

    @classmethod
    def plan(
        cls,
        model: Model,
        rows: Any,
        *,
        mask: np.ndarray | sp.spmatrix | None = None,
        sites: str | None = None,
        groups: str | None = None,
        genes: Sequence[str] | None = None,
        draws: int = 1,
        mean_only: bool = False,
        seed: int = 0,
        use_labels: bool = False,
        unseen: Literal["unknown", "refuse"] = "unknown",
        method: Literal["conditional", "repaint"] = "conditional",
        batch_size: int = 256,
        device: str = "auto",
        **options: Any,
    ) -> Job:
        """Resolve targets, genes and labels.

        Raises
        ------
        ValueError
            No gene in common, nothing to impute, a mask of another shape, ``draws < 1``, labels that cannot be used as
            asked, sites without groups, mask and sites together, genes that the model does not know.
        """
        if draws < 1 and not mean_only:
            raise ValueError(f"draws must be at least 1, got {draws}; for the posterior mean alone give --mean-only")
        draws = 0 if mean_only else draws
        reader = Reader(model.spec, rows, use_labels=use_labels, unseen=unseen, batch_size=batch_size, device=device)
        check_labels(model, reader, options.get("guidance", 1.0))
        kind, hidden = _targets(rows, mask, sites, groups, seed)
        added = _absent(model.spec.genes, set(rows.genes), genes) if kind == "panel" else ()
        model.denoiser.to(reader.device).eval()
        imputer = model.imputer(method, **options)
        point = getattr(imputer, "readout", "mean")
        provenance = model.provenance(
            targets=kind, groups=groups or "", method=method, readout=point, draws=draws, seed=seed,
            **reader.conditioned(),
        )  # fmt: skip
        return cls(reader, imputer, hidden, added, point, draws, seed, getattr(imputer, "also", ()), provenance)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`run` fills."""
        drawn = ["imputed", *(f"imputed_draw{i}" for i in range(2, self.draws + 1))]
        return [f"imputed_{self.point}", *(drawn if self.draws else []), *(f"imputed_{name}" for name in self.also)]

    @property
    def genes(self) -> tuple[str, ...]:
        """Genes of the answer: the input's, then those that are appended."""
        return (*self.reader.rows.genes, *self.added)

    def run(self, layers: Mapping[str, Any], *, progress: bool = True) -> Filled:
        """Fill ``layers`` (array-likes ``[cells, genes]``) block by block."""
        began, filled = time.perf_counter(), self.filled()
        for block in self.reader.blocks(self.hidden, progress=progress, desc="impute"):
            answer = self.answer(block)
            filled.add(answer)
            for name, values in answer.layers.items():
                layers[name][block.start : block.stop] = check_answer(values.cpu().numpy(), name, block.start)
        filled.seconds = time.perf_counter() - began
        return filled

    def filled(self) -> Filled:
        """What is known before the first cell is."""
        return Filled(
            genes=len(self.genes),
            genes_unknown_to_model=self.reader.unknown,
            genes_absent_from_input=self.reader.absent,
        )

    def answer(self, block: Block) -> Answer:
        """Impute one block, which lies on the device."""
        imputed = self.imputer.impute(block.cells, block.observed, draws=self.draws, seed=self.seed)
        given, device = block.given, block.given.device
        if self.added:
            given = torch.cat((given, given.new_zeros(len(given), len(self.added))), 1)
        place = torch.from_numpy(self.place).to(device, non_blocking=True)
        some = block.cells.counts.sum(1, keepdim=True) > 0
        wanted = torch.zeros(given.shape, dtype=torch.bool, device=device)
        if block.hidden is not None:
            wanted[:, : block.hidden.shape[1]] = block.hidden
        wanted[:, len(self.reader.columns) :] = True
        fill = wanted & some & (place >= 0)
        order = None if self.reader.same and not self.added else place.clamp_min(0)

        def whole(values: torch.Tensor, elsewhere: torch.Tensor | float) -> torch.Tensor:
            return torch.where(fill, values if order is None else values[:, order], elsewhere)

        parts = [imputed.mean, *(imputed.draws if imputed.draws is not None else ())]
        layers = [whole(values, given) for values in parts]
        layers += [whole(imputed.also[name], 0.0 if name == "sd" else given) for name in self.also]
        at = slice(len(self.reader.columns))
        none = torch.zeros((), dtype=torch.int64, device=device)
        unknown = none if block.hidden is None else (block.hidden & (place[at] < 0)).sum()
        return Answer(dict(zip(self.layers, layers, strict=True)), fill, some.squeeze(1), unknown)


@dataclass(frozen=True)
class Answer:
    """One block's answer, on the device.

    Attributes
    ----------
    layers
        Name -> ``float32 [n g]``, in the genes of the answer; what was no target is as given.
    filled
        ``bool [n g]``: entries that were imputed.
    evidence
        ``bool [n]``: cells that had any; the others are as given.
    unknown
        ``int64 []``: targets in genes that the model does not know.
    """

    layers: dict[str, torch.Tensor]
    filled: torch.Tensor
    evidence: torch.Tensor
    unknown: torch.Tensor


def check_names(genes: Sequence[str]) -> None:
    """Refuse a list of genes that names none, or one twice.

    Raises
    ------
    ValueError
        It does.
    """
    if not len(genes):
        raise ValueError("genes: no gene is named; leave --genes (genes=) out to have all, or name some")
    seen: set[str] = set()
    for gene in genes:
        if gene in seen:
            raise ValueError(f"genes: {gene!r} is named more than once; name each gene once")
        seen.add(gene)


def ours(layer: str) -> bool:
    """Whether an imputation writes a layer of that name, with any options."""
    return bool(_OURS.fullmatch(layer))


_OURS = re.compile(r"imputed(_(draw\d+|mean|mask|sd|median|log1p|log1p_cp10k|q\d+(\.\d+)?))?")


def _absent(known: Sequence[str], have: set[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The genes to append: those of the model that the input lacks, or those of them that are asked for."""
    absent = tuple(g for g in known if g not in have)
    if asked is not None:
        check_names(asked)
        if unknown := [g for g in asked if g not in known]:
            raise ValueError(f"the model does not know gene {unknown[0]!r}{nearest(unknown[0], known)}")
        if present := [g for g in asked if g in have]:
            raise ValueError(f"gene {present[0]!r} is measured in the input already; complete adds genes that it lacks")
        absent = tuple(asked)
    if not absent:
        raise ValueError(
            "nothing to impute: the input has all of the model's genes; say which entries are targets with --mask "
            "FILE|layer or --sites dropout --groups cell_type|leiden"
        )
    return absent


def _targets(
    rows: Any, mask: np.ndarray | sp.spmatrix | None, sites: str | None, groups: str | None, seed: int
) -> tuple[str, targets.Hidden]:
    if mask is not None and sites is not None:
        raise ValueError("give either a mask or sites, not both")
    if mask is not None:
        if mask.shape != (rows.n_cells, len(rows.genes)):
            raise ValueError(f"the mask has shape {mask.shape}, the input {(rows.n_cells, len(rows.genes))}")
        if sp.issparse(mask):
            check_indices(mask, "the mask")
        return "mask", targets.by_mask(mask)
    if sites is None:
        return "panel", targets.nothing
    if sites != "dropout":
        raise ValueError(f"unknown sites {sites!r}{nearest(sites, ['dropout'])}")
    if not groups:
        raise ValueError("sites=dropout needs groups: an obs column such as cell_type, or leiden")
    code = targets.leiden(rows, seed=seed) if groups == "leiden" else codes(rows.obs(groups))
    return "dropout", targets.by_dropout(rows, code)
