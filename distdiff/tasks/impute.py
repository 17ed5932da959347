"""Imputation of a user's cells: which counts, which targets, which layers (MATHS 5.2, 5.3, 5.6)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.sparse as sp

from distdiff.component import nearest
from distdiff.data.source import codes
from distdiff.impute import Imputer, targets
from distdiff.tasks import Reader

if TYPE_CHECKING:
    from anndata import AnnData

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


def mask_of(adata: AnnData, mask: str | np.ndarray | sp.spmatrix | None) -> np.ndarray | sp.spmatrix | None:
    """A mask given as such, or the layer it names."""
    if not isinstance(mask, str):
        return mask
    if mask not in adata.layers:
        raise ValueError(f"mask={mask!r} is no layer of this AnnData{nearest(mask, adata.layers)}")
    return adata.layers[mask]


def extend(adata: AnnData, genes: tuple[str, ...]) -> AnnData:
    """Copy an AnnData, with ``genes`` appended as unmeasured columns (``var['distdiff_added']``, counts 0)."""
    out = adata.copy()
    if not genes:
        return out
    import anndata as ad
    import pandas as pd

    empty = sp.csr_matrix((adata.n_obs, len(genes)), dtype=adata.X.dtype)
    x = sp.hstack((sp.csr_matrix(adata.X), empty), format="csr")
    var = adata.var.reindex([*adata.var_names, *genes])
    var["distdiff_added"] = np.r_[np.zeros(adata.n_vars, bool), np.ones(len(genes), bool)]
    return ad.AnnData(x, obs=out.obs, var=pd.DataFrame(var), obsm=dict(out.obsm), uns=dict(out.uns))


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
    provenance: dict[str, Any]

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
        use_labels: bool = True,
        method: Literal["conditional", "repaint"] = "conditional",
        batch_size: int = 256,
        device: str = "auto",
        **options: Any,
    ) -> Job:
        """Resolve targets, genes and labels.

        Raises
        ------
        ValueError
            No gene in common, nothing to impute, a mask of another shape, ``draws < 1``, a label value that the model
            never saw, sites without groups, mask and sites together, genes that the model does not know.
        """
        if draws < 1 and not mean_only:
            raise ValueError(f"draws must be at least 1, got {draws}; for the posterior mean alone give --mean-only")
        draws = 0 if mean_only else draws
        reader = Reader(model.spec, rows, use_labels=use_labels, batch_size=batch_size, device=device)
        kind, hidden = _targets(rows, mask, sites, groups, seed)
        added = _absent(model.spec.genes, set(rows.genes), genes) if kind == "panel" else ()
        model.denoiser.to(reader.device).eval()
        imputer = model.imputer(method, **options)
        point = getattr(imputer, "readout", "mean")
        provenance = model.provenance(
            targets=kind, groups=groups or "", method=method, readout=point, draws=draws, seed=seed
        )
        return cls(reader, imputer, hidden, added, point, draws, seed, provenance)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`run` fills."""
        drawn = ["imputed", *(f"imputed_draw{i}" for i in range(2, self.draws + 1))]
        return [f"imputed_{self.point}", *(drawn if self.draws else [])]

    def run(self, layers: Mapping[str, Any], *, progress: bool = True) -> Filled:
        """Fill ``layers`` (array-likes ``[cells, genes + added]``: numpy, h5py or zarr) block by block."""
        began, filled, reader = time.perf_counter(), Filled(), self.reader
        filled.genes = len(reader.rows.genes) + len(self.added)
        filled.genes_unknown_to_model = reader.unknown
        filled.genes_absent_from_input = reader.absent
        for start, stop, answer in self._blocks(filled, progress):
            for name, values in zip(self.layers, answer, strict=True):
                layers[name][start:stop] = values
        filled.cells, filled.seconds = reader.rows.n_cells, time.perf_counter() - began
        return filled

    def _blocks(self, filled: Filled, progress: bool) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        reader, known = self.reader, self.reader.known
        place = {gene: i for i, gene in enumerate(reader.spec.genes)}
        more = np.array([place[gene] for gene in self.added], dtype=np.int64)
        for block in reader.blocks(self.hidden, progress=progress, desc="impute"):
            answer = self.imputer.impute(block.cells, block.observed, draws=self.draws, seed=self.seed)
            empty = (block.cells.counts.sum(1) == 0).cpu().numpy()
            fill = block.hidden & known & ~empty[:, None]
            out = []
            for values in (answer.mean, *(answer.draws if answer.draws is not None else ())):
                full = reader.widen(block.given, values, fill)
                if len(more):
                    full = np.hstack((full, np.where(empty[:, None], 0, values.cpu().numpy()[:, more])))
                out.append(full)
            filled.targets += int(fill.sum() + (~empty).sum() * len(more))
            filled.molecules_added += float(out[0].sum(dtype=np.float64) - np.where(fill, 0, block.given).sum())
            filled.cells_without_evidence += int(empty.sum())
            filled.targets_of_unknown_genes += int((block.hidden & ~known).sum())
            yield block.start, block.stop, out


def _absent(known: Sequence[str], have: set[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """The genes to append: those of the model that the input lacks, or those of them that are asked for."""
    absent = tuple(g for g in known if g not in have)
    if asked is not None:
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
        return "mask", targets.by_mask(mask)
    if sites is None:
        return "panel", targets.nothing
    if sites != "dropout":
        raise ValueError(f"unknown sites {sites!r}{nearest(sites, ['dropout'])}")
    if not groups:
        raise ValueError("sites=dropout needs groups: an obs column such as cell_type, or leiden")
    code = targets.leiden(rows, seed=seed) if groups == "leiden" else codes(rows.obs(groups))
    return "dropout", targets.by_dropout(rows, code)
