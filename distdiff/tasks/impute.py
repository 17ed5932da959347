"""Imputation of a user's cells: which counts, which targets, which layers (docs/MATHS.md 5.2, 5.3, 5.6)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch

from distdiff.component import name_list, nearest
from distdiff.data.ingest.scan import select
from distdiff.data.ingest.source import codes, layer_names
from distdiff.data.masks import check_indices
from distdiff.imputers import Imputer, targets
from distdiff.process import Process
from distdiff.received import check_answer
from distdiff.tasks import Block, Reader, check_names
from distdiff.tasks.depths import shallow
from distdiff.tasks.frame import reindex_genes

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from distdiff.data.ingest.source import Source
    from distdiff.types import DataSpec


LAYERS = ("mean", "draws", "mask", "sd", "ood")
"""What an imputation can write, besides quantiles (``q5``)."""

QUANTILE = r"q\d+(\.\d+)?"
"""Pattern of a quantile's name."""


def chosen_layers(
    layers: Sequence[str] | None, process: Process, *, method: str = "conditional", mean_only: bool = False,
    panel: bool = False,
) -> tuple[tuple[str, ...], list[str]]:  # fmt: skip
    """Check names of layers; returns them without repeats, and which of them are statistics of the predictive law.

    Parameters
    ----------
    layers
        Names; ``None``: mean, draws, mask and ood, less draws and ood (which costs network calls) for ``mean_only``,
        mask where all targets are appended genes (``panel``), and ood where the process has no likelihood.

    Raises
    ------
    ValueError
        An unknown name, neither mean nor draws, or statistics of a method that draws only.

    Examples
    --------
    >>> from distdiff.tasks.impute import chosen_layers
    >>> from distdiff.process.counts import Counts
    >>> chosen_layers(["mean", "sd", "q95"], Counts())
    (('mean', 'sd', 'q95'), ['sd', 'q95'])
    """
    if layers is None:
        bound = type(process).bound is not Process.bound
        asked = {"mean": True, "draws": not mean_only, "mask": not panel, "ood": bound and not mean_only}
        layers = [name for name, wanted in asked.items() if wanted]
    layers = tuple(dict.fromkeys(name_list("layers", layers)))
    statistics = [name for name in layers if name not in LAYERS or name == "sd"]
    if unknown := [name for name in statistics if name != "sd" and not re.fullmatch(QUANTILE, name)]:
        raise ValueError(f"unknown layer {unknown[0]!r}{nearest(unknown[0], LAYERS)}; or a quantile such as q5")
    if not {"mean", "draws"} & set(layers):
        raise ValueError(f"layers {','.join(layers)}: mean or draws must be among them")
    if statistics and method != "conditional":
        raise ValueError(f"layer {statistics[0]!r} needs method 'conditional', which knows its predictive law")
    return layers, statistics


@dataclass
class FillCounts:
    """What an imputation did; stands in ``uns['distdiff']`` of the output."""

    cells: int = 0
    genes: int = 0
    targets: int = 0
    molecules_added: float = 0.0
    cells_without_evidence: int = 0
    cells_shallower_than_trained: int = 0
    genes_unknown_to_model: int = 0
    genes_absent_from_input: int = 0
    targets_of_unknown_genes: int = 0
    cells_trained_on: int = 0
    seconds: float = 0.0

    def add(self, answer: Answer) -> FillCounts:
        """Count one block's answer, and return itself."""
        self.cells += len(answer.filled)
        mean = next(iter(answer.layers.values()))
        added = torch.where(answer.filled, mean, 0.0).sum(dtype=torch.float64)
        counts = torch.stack((answer.filled.sum(), (~answer.evidence).sum(), answer.unknown, answer.shallow))
        *numbers, molecules = torch.cat((counts.double(), added.unsqueeze(0))).tolist()  # one wait for the device
        targets, empty, unknown, few = map(int, numbers)
        self.targets += targets
        self.molecules_added += molecules
        self.cells_without_evidence += empty
        self.cells_shallower_than_trained += few
        self.targets_of_unknown_genes += unknown
        self.cells_trained_on += answer.trained_on
        return self

    def add_cells(self, spec: DataSpec, block: Block, depth: Mapping[str, float] | None) -> FillCounts:
        """Count the cells of a block of which every entry is answered (``denoise``), and return itself."""
        x = block.cells.counts
        found = torch.stack(((x.sum(1) == 0).sum(), shallow(spec, x, block.observed, depth).sum()))
        empty, few = map(int, found.tolist())  # one wait for the device
        self.cells += len(x)
        self.targets += x.numel()
        self.cells_without_evidence += empty
        self.cells_shallower_than_trained += few
        return self

    def warnings(self, task: str) -> list[str]:
        """What a user should know of the answer of a task."""
        blind = "they become an average cell" if task == "denoise" else "their targets are 0"
        empty, unknown = self.cells_without_evidence, self.targets_of_unknown_genes
        few = self.cells_shallower_than_trained
        texts = {
            f"{empty} cells without evidence (no molecule, or all under the mask): {blind}": empty,
            f"{unknown} entries to impute are of genes that the model does not know: they stay as they were": unknown,
            f"{few} of {self.cells} cells show fewer molecules than 99 % of the training cells had in these genes: the "
            "model never saw such cells, and its answers for them lean towards an average cell":
                few > MANY_SHALLOW * self.cells,
        }  # fmt: skip
        return [text for text, wanted in texts.items() if wanted]


MANY_SHALLOW = 0.05
"""Share of cells below the 1 % quantile of the training cells' depth that is more than chance."""


def mask_of(
    adata: AnnData, mask: str | np.ndarray | sp.spmatrix | DataFrame | None, rows: Source
) -> np.ndarray | sp.spmatrix | None:
    """A mask in the order of ``rows``, the counts of ``adata`` that are imputed.

    A layer (by its name) and a DataFrame are taken by names; a gene or cell that they lack is no target. An array or a
    list of lists goes by position.

    Raises
    ------
    ValueError
        No such layer; a DataFrame with names that the counts do not have, or have twice.
    """
    import pandas as pd

    if isinstance(mask, pd.DataFrame):
        for what, names, known in (("cell", mask.index, rows.obs_names), ("gene", mask.columns, rows.genes)):
            if (wrong := ~names.isin(known) | names.duplicated()).any():
                raise ValueError(
                    f"mask: {what} {str(names[wrong.argmax()])!r} is not among the input's {what}s, or is named twice; "
                    "a DataFrame is taken by its names, give mask.to_numpy() to have it taken by position"
                )
        return mask.reindex(index=rows.obs_names, columns=list(rows.genes), fill_value=False).to_numpy() != 0
    if not isinstance(mask, str):
        return _matrix(mask)
    if mask not in adata.layers:
        raise ValueError(f"mask={mask!r} is no layer of this AnnData{nearest(mask, layer_names(adata))}")
    layer = _matrix(adata.layers[mask])
    if tuple(adata.var_names) == tuple(rows.genes):
        return layer
    at = adata.var_names.get_indexer(list(rows.genes))
    return reindex_genes(layer, at, (1,))


def _matrix(mask: Any) -> np.ndarray | sp.spmatrix | None:
    """A mask as an array or sparse matrix: lists are made one, what is lazy or on disk is read.

    Raises
    ------
    ValueError
        It is no matrix of numbers.
    """
    if mask is None or sp.issparse(mask):
        return mask
    if hasattr(mask, "to_memory") or hasattr(mask, "dask"):
        return mask.to_memory() if hasattr(mask, "to_memory") else mask.compute()
    try:
        found = np.asarray(mask)
    except ValueError:
        found = np.empty(0, object)
    if found.dtype.kind not in "biuf":
        raise ValueError(
            f"mask: {type(mask).__name__} is no matrix of true and false for each cell and gene; give one, a "
            "DataFrame, or the name of a layer"
        )
    return found


class MaskLayer:
    """A layer of a file as a mask, read by rows.

    Its columns are found by name; a gene that it lacks is no target.
    """

    def __init__(self, source: Source, genes: Sequence[str]) -> None:
        column_of = {gene: i for i, gene in enumerate(genes)}
        self.columns = np.array([column_of.get(gene, -1) for gene in source.genes], dtype=np.int32)
        self.source, self.shape = source, (source.n_cells, len(genes))

    def __getitem__(self, rows: slice) -> sp.csr_matrix:
        return select(self.source.read(rows.start, rows.stop), self.columns, self.shape[1])


@dataclass
class ImputationPlan:
    """One imputation, checked before anything is written.

    Attributes
    ----------
    reader, imputer
        The input, and what fills its entries.
    hidden
        Which of the input's entries are targets.
    added
        Genes that are appended to the input's.
    draws, seed
        Draws of each target (0: the mean alone), and the seed of their noise.
    provenance
        Entries of ``uns['distdiff']``.
    trained
        Counts the cells of a block that the model was trained on (`distdiff.seen.counter`).
    depth
        Quantiles of the training cells' molecules, ``info["depth"]`` of a model.
    """

    reader: Reader
    imputer: Imputer
    hidden: targets.Hidden
    added: tuple[str, ...]
    draws: int
    seed: int
    provenance: dict[str, Any]
    trained: Callable[[sp.csr_matrix], int] = lambda counts: 0
    depth: Mapping[str, float] | None = None

    @classmethod
    def of(
        cls,
        reader: Reader,
        imputer: Imputer,
        *,
        mask: np.ndarray | sp.spmatrix | None = None,
        sites: str | None = None,
        groups: str | None = None,
        genes: Sequence[str] | None = None,
        draws: int = 1,
        mean_only: bool = False,
        seed: int = 0,
        progress: bool = True,
        provenance: Mapping[str, Any] = MappingProxyType({}),
        trained: Callable[[sp.csr_matrix], int] = lambda counts: 0,
        depth: Mapping[str, float] | None = None,
    ) -> ImputationPlan:
        """Resolve targets and genes.

        Parameters
        ----------
        progress
            Tell of clustering that takes long.
        provenance
            Entries of ``uns['distdiff']`` about the model and the method.
        trained, depth
            As of the class.

        Raises
        ------
        ValueError
            Nothing to impute, a mask of another shape, ``draws < 1``, sites without groups, mask and sites together,
            genes that the model does not know.
        """
        check_draws(draws, mean_only)
        draws, rows = 0 if mean_only else draws, reader.rows
        kind, hidden = _targets(rows, mask, sites, groups, seed, progress)
        added = _absent(reader.spec.genes, set(rows.genes), genes) if kind == "panel" else ()
        entries = {
            **provenance, "targets": kind, "groups": groups or "", "readout": imputer.readout, "draws": draws,
            "seed": seed, **reader.label_provenance(),
        }  # fmt: skip
        return cls(reader, imputer, hidden, added, draws, seed, entries, trained, depth)

    @cached_property
    def columns(self) -> np.ndarray:
        """Column in the model of each gene of the answer ``int64 [g]``, -1 where the model does not know it."""
        column_of = {gene: i for i, gene in enumerate(self.reader.spec.genes)}
        return np.r_[self.reader.columns, np.array([column_of[gene] for gene in self.added], dtype=np.int64)]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`run` fills."""
        drawn = ["imputed", *(f"imputed_draw{i}" for i in range(2, self.draws + 1))] if self.draws else []
        return [f"imputed_{self.imputer.readout}", *drawn, *(f"imputed_{name}" for name in self.imputer.statistics)]

    @property
    def genes(self) -> tuple[str, ...]:
        """Genes of the answer: the input's, then those that are appended."""
        return (*self.reader.rows.genes, *self.added)

    def run(
        self, layers: Mapping[str, Any], *, columns: np.ndarray | None = None, progress: bool = True,
        on_block: Callable[[Block, Answer], None] = lambda block, answer: None,
    ) -> FillCounts:  # fmt: skip
        """Fill ``layers`` (array-likes ``[cells, genes]``) block by block; ``on_block`` sees each block's answer.

        ``columns``: those genes of the answer that the layers hold (default: all).
        """
        began, counts = time.perf_counter(), self.initial_counts()
        for block in self.reader.blocks(self.hidden, progress=progress, desc="impute"):
            answer = self.answer(block)
            counts.add(answer)
            for name in layers:
                values = answer.layers[name].cpu().numpy()
                values = check_answer(values, name, block.start)
                layers[name][block.start : block.stop] = values if columns is None else values[:, columns]
            on_block(block, answer)
        counts.seconds = time.perf_counter() - began
        return counts

    def initial_counts(self) -> FillCounts:
        """The counts before the first cell is imputed."""
        return FillCounts(
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
        columns = torch.from_numpy(self.columns).to(device, non_blocking=True)
        some = block.cells.counts.sum(1, keepdim=True) > 0
        wanted = torch.zeros(given.shape, dtype=torch.bool, device=device)
        if block.hidden is not None:
            wanted[:, : block.hidden.shape[1]] = block.hidden
        wanted[:, len(self.reader.columns) :] = True
        known = columns >= 0
        fill = wanted & some & known
        given = torch.where(wanted & ~some & known, 0.0, given)  # what stands under a mask is nobody's answer
        order = None if self.reader.same and not self.added else columns.clamp_min(0)

        def whole(values: torch.Tensor, elsewhere: torch.Tensor | float) -> torch.Tensor:
            return torch.where(fill, values if order is None else values[:, order], elsewhere)

        parts = [imputed.mean, *(imputed.draws if imputed.draws is not None else ())]
        layers = [whole(values, given) for values in parts]
        layers += [whole(values, 0.0 if name == "sd" else given) for name, values in imputed.statistics.items()]
        of_input = slice(len(self.reader.columns))
        none = torch.zeros((), dtype=torch.int64, device=device)
        unknown = none if block.hidden is None else (block.hidden & (columns[of_input] < 0)).sum()
        trained_on = self.trained(block.counts)
        return Answer(
            dict(zip(self.layers, layers, strict=True)), fill, some.squeeze(1), unknown,
            shallow(self.reader.spec, block.cells.counts, block.observed, self.depth).sum(), trained_on,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One block's answer, on the device.

    Attributes
    ----------
    layers
        Name -> ``float32 [n g]``, in the genes of the answer; what was no target is as given, targets of cells without
        evidence are 0.
    filled
        ``bool [n g]``: entries that were imputed.
    evidence
        ``bool [n]``: cells that had any.
    unknown
        ``int64 []``: targets in genes that the model does not know.
    shallow
        ``int64 []``: cells shallower than the training cells.
    trained_on
        Cells that the model was trained on.
    """

    layers: dict[str, torch.Tensor]
    filled: torch.Tensor
    evidence: torch.Tensor
    unknown: torch.Tensor
    shallow: torch.Tensor
    trained_on: int = 0


def check_draws(draws: int, mean_only: bool) -> None:
    """Refuse a number of draws below 1, except for the mean alone.

    Raises
    ------
    ValueError
        ``draws`` is below 1, or no whole number.
    """
    if isinstance(draws, bool) or not isinstance(draws, int | np.integer):
        raise ValueError(f"draws={draws!r}: a whole number is wanted")
    if draws < 1 and not mean_only:
        raise ValueError(f"draws must be at least 1, got {draws}; for the posterior mean alone give mean_only=True")


def check_options(method: str, known: Mapping[str, Iterable[str]], options: Iterable[str]) -> None:
    """Refuse options that a method of imputation does not have.

    Parameters
    ----------
    known
        Methods and the names of their options.

    Raises
    ------
    ValueError
        There is one; the method that has it is named.

    Examples
    --------
    >>> from distdiff.tasks.impute import check_options
    >>> check_options("conditional", {"conditional": ["steps"], "repaint": ["steps", "jump"]}, ["jump"])
    Traceback (most recent call last):
        ...
    ValueError: jump= is an option of method='repaint', not of 'conditional'
    """
    for name in options:
        if name in known[method]:
            continue
        if owners := [other for other, names in known.items() if name in names]:
            raise ValueError(f"{name}= is an option of method={owners[0]!r}, not of {method!r}")
        raise ValueError(f"method {method!r} has no option {name!r}{nearest(name, known[method])}")


def absent_of(genes: Sequence[str], have: Sequence[str]) -> list[str] | None:
    """Those of ``genes`` that are not among ``have``; ``None`` where all are."""
    known = set(have)
    return [gene for gene in genes if gene not in known] or None


def is_imputation_layer(layer: str) -> bool:
    """Whether an imputation writes a layer of that name, with any options."""
    return bool(_LAYER.fullmatch(layer))


_LAYER = re.compile(rf"imputed(_(draw\d+|mean|mask|sd|median|log1p|log1p_cp10k|{QUANTILE}))?")


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
            "nothing to impute: the input has all of the model's genes, and no entry is named. Which do you want?\n"
            "- denoise: the expression behind every count; complete: genes that an input lacks (this one lacks none)\n"
            "- impute some entries: give mask=, a layer or a matrix of the input's shape that is true where to impute "
            "(scipy.sparse.save_npz('mask.npz', wrong) makes a file of one), or sites='dropout' with groups="
        )
    return absent


def _targets(
    rows: Any,
    mask: np.ndarray | sp.spmatrix | None,
    sites: str | None,
    groups: str | None,
    seed: int,
    progress: bool,
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
    code = targets.leiden(rows, seed=seed, progress=progress) if groups == "leiden" else codes(rows.obs(groups))
    return "dropout", targets.by_dropout(rows, code)
