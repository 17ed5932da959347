"""Which genes a panel can be completed by: expected reliability of each, from cells whose counts are known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from distdiff.api import load, store_of
from distdiff.batch.rows import open_rows
from distdiff.component import nearest
from distdiff.data.ingest.choose import file_of, listed
from distdiff.data.ingest.source import Source
from distdiff.data.masks import thin
from distdiff.data.store.store import CountStore
from distdiff.heldout import answering
from distdiff.model import Model
from distdiff.process.counts import of_molecules
from distdiff.reliability import GeneScores, PanelReport, depth_shares, gene_scores, tabled
from distdiff.rng import numpy_generator
from distdiff.seen import CELLS, counter
from distdiff.tasks import Reader, check_names
from distdiff.tasks.expected import panel_digest

if TYPE_CHECKING:
    from anndata import AnnData

    from distdiff.api import Data

log = logging.getLogger("distdiff")

FEWEST = 100
"""Cells of the atlas below which nothing is said."""


def panel(
    model: Model | str | Path, data: AnnData | str | Path | Sequence[str], atlas: Data | CountStore, *,
    layer: str | None = None, genes: Sequence[str] | None = None, groupby: str | None = None, cells: int = 2000,
    draws: int = 20, seed: int = 0, trust: Sequence[str] = (), progress: bool = False,
) -> PanelReport:  # fmt: skip
    """Tell before a panel is completed how well each gene that it lacks will be predicted (docs/MATHS.md 17.1, 17.2).

    In cells of the atlas all genes that the panel lacks are hidden, and the cells are thinned to the depth of the
    query. The model completes them from the panel's genes alone, and each gene is compared with what was hidden. The
    expectation is for a mix of cells like the atlas's: give an atlas of cells like those of the query.

    Parameters
    ----------
    model
        A model, its folder, or ``models:/NAME@champion``.
    data
        The query: an AnnData, a file or a store, whose genes and depths are looked at; or a panel that is planned, as
        a list of names or a text file with one a line (``.txt``), at the depth of the atlas.
    atlas
        Cells that have the genes that the panel lacks: the store that the model was trained on, of which validation and
        test cells are taken, or other counts as `distdiff.train` takes them, less cells that it was trained on.
    layer
        Where the raw counts of the query are (default ``X``).
    genes
        Genes of which to tell (default: all of the model's that the panel lacks).
    groupby
        Label of the atlas: ``correlation_within`` is of differences within its groups.
    cells
        At most so many cells of the atlas, at random.
    draws
        Draws of each hidden count, for the coverage of intervals.
    seed
        Of cells, thinning, draws and resamples.
    trust
        Packages whose code the model may run.
    progress
        Tell each step.

    Returns
    -------
    PanelReport
        ``print(found.to_text())``; ``found.table``; ``model.complete(query, report=found)`` puts it into ``var``.

    Raises
    ------
    ValueError
        A panel that lacks no gene of the model, or has none; a named gene that the panel has; fewer than 100 cells in
        the atlas; a model whose states are no molecules or that has no answer without labels.

    Examples
    --------
    >>> import anndata, distdiff
    >>> model = distdiff.train(
    ...     "atlas.zarr", cells=64, batch=32, width=8, evaluate={"enabled": False}, tracking={"enabled": False},
    ...     progress=False,
    ... )
    >>> cells = anndata.read_h5ad("counts.h5ad")
    >>> found = distdiff.panel(model, cells[:, :25].copy(), cells)
    >>> found.table.shape[0], found.about["panel_genes"]
    (5, 25)
    >>> model.complete(cells[:, :25].copy(), report=found).var["reliability"].iloc[0]
    'measured'
    """
    found = model if isinstance(model, Model) else load(model, trust=trust)
    of_molecules(found.process, "panel")
    if found.required_labels:
        raise ValueError(
            f"panel: this model has no answer without {', '.join(found.required_labels)} (train.label_dropout=0), and "
            "the labels of cells were made from the genes that are hidden"
        )
    tell: Callable[[str], None] = log.warning if progress else log.debug
    rows, planned = _query(data, layer)
    reader = Reader(found.spec, rows)
    wanted = _wanted(reader, genes)
    tell("panel: reads the query's depths and the atlas")
    with store_of(atlas, None, found.spec.labels, groupby, progress) as store:
        found.check_store(store.manifest, store.url)
        have = set(store.genes)
        store = store.panel([gene for gene in found.spec.genes if gene in have] or None)
        names = np.asarray(store.genes)
        measured = np.asarray(found.spec.genes)[reader.measured]
        shared = np.isin(names, measured)
        targets = np.flatnonzero(np.isin(names, wanted))
        notes = _lacking(store.url, measured, names[shared], wanted, names[targets])
        at, where, trained = _cells(found, store, cells, seed)
        if trained:
            notes.append(trained)
        counts = store.read(at)
        group = None if groupby is None else _values(store, at, groupby)
    depth = np.asarray(counts[:, np.flatnonzero(shared)].sum(1), dtype=np.float64).ravel()
    query = depth if planned else _depths(reader, set(names[shared]))
    share = np.ones(len(at)) if planned else depth_shares(depth, query)
    if np.median(query) > 1.1 * np.median(depth):
        notes.append(
            f"the query is deeper than the atlas ({np.median(query):,.0f} and {np.median(depth):,.0f} molecules a cell "
            "on the panel), which cannot be made deeper: the expectation is of the atlas's depth, and too low"
        )
    thinned = thin(counts, share, numpy_generator(seed, "panel-thin"))
    found.denoiser.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tell(f"panel: completes {len(targets):,} genes of {len(at):,} cells")
    scores: GeneScores = gene_scores(
        answering(found, store, found.imputer()), thinned, shared, targets, draws=draws, seed=seed, group=group
    )
    about = {
        "query": getattr(rows, "where", "a list of genes"), "panel": panel_digest(reader),
        "panel_genes": int(reader.measured.sum()), "genes": len(targets), "atlas": Path(store.url).name,
        "atlas_fingerprint": store.manifest.fingerprint[:12], "cells": len(at), "cells_from": where,
        "depth": float(np.median(np.asarray(thinned[:, np.flatnonzero(shared)].sum(1)))),
        "query_depth": float(np.median(query)), "molecules_kept": float(share.mean()), "groups": groupby or "",
        "draws": draws, "seed": seed, "model": found.where or found.info.get("name", "in memory"),
        "weights_sha256": found.info.get("weights_sha256", ""),
    }  # fmt: skip
    return PanelReport(tabled(names[targets].tolist(), scores), about, notes)


def _query(data: Any, layer: str | None) -> tuple[Any, bool]:
    """The query by rows, and whether it is a list of genes without cells."""
    file = file_of(data) if isinstance(data, str | Path) else None
    if isinstance(data, str | Path) and not (file is not None and file.suffix == ".txt"):
        return open_rows(data, layer), False
    if file is None and not isinstance(data, Sequence):
        return Source.from_anndata(data, layer=layer), False
    names = listed(file) if file is not None else list(data)
    check_names(names)
    return SimpleNamespace(n_cells=1, genes=tuple(map(str, names)), where="a list of genes"), True


def _wanted(reader: Reader, genes: Sequence[str] | None) -> NDArray[np.str_]:
    """Names of the genes of which to tell."""
    absent = np.asarray(reader.spec.genes)[~reader.measured]
    if not len(absent):
        raise ValueError("panel: the query has all of the model's genes, there is none to complete")
    if genes is None:
        return absent
    check_names(genes)
    if unknown := sorted(set(genes) - set(absent)):
        hint = "the query has it" if unknown[0] in reader.spec.genes else "the model does not know it"
        raise ValueError(f"panel: genes: {unknown[0]!r}: {hint}{nearest(unknown[0], absent.tolist())}")
    return np.asarray(list(genes))


def _lacking(
    url: str, measured: np.ndarray, shared: np.ndarray, wanted: np.ndarray, targets: np.ndarray
) -> list[str]:  # fmt: skip
    """Notes on what the atlas lacks; refuses one that cannot answer at all."""
    if not len(shared) or not len(targets):
        what = "no gene of the panel" if not len(shared) else "none of the genes that the panel lacks"
        raise ValueError(f"panel: the atlas {url} has {what}; give cells in which the model's genes were measured")
    notes = []
    if len(shared) < len(measured):
        notes.append(
            f"{len(measured) - len(shared)} genes of the panel are not in the atlas; the expectation is without them"
        )
    if len(targets) < len(wanted):
        notes.append(f"{len(wanted) - len(targets)} genes that the panel lacks are not in the atlas; nothing is known")
    return notes


def _cells(model: Model, store: CountStore, most: int, seed: int) -> tuple[NDArray[np.int64], str, str]:
    """Rows of cells that the model was not trained on, where they come from, and what to know of them."""
    where, note = "cells that the model was not trained on", ""
    if own := store.manifest.fingerprint == model.info.get("data"):
        rows = np.concatenate([store.rows("val"), store.rows("test")])
        where = "validation and test cells of the model's own store"
    else:
        rows = store.rows("all")
        columns = {gene: i for i, gene in enumerate(model.spec.genes)}
        at = np.array([columns[gene] for gene in store.genes])
        _, why = counter(model.seen, at, len(columns) - len(at))
        if why or model.seen is None:
            where, note = "all cells", f"whether the model was trained on cells of the atlas is not known: {why}"
        else:
            parts = [rows[start : start + CELLS] for start in range(0, len(rows), CELLS)]
            rows = rows[~np.concatenate([model.seen.found(store.read(part), at) for part in parts])]
    if len(rows) < FEWEST and (own or len(store.rows("all")) >= FEWEST):
        rows, where = store.rows("all"), "all cells, those of training too"
        note = "the model was trained on most of these cells: the expectation may be too good"
    if len(rows) < FEWEST:
        raise ValueError(f"panel: the atlas {store.url} has {len(rows)} cells, at least {FEWEST} are wanted")
    return np.sort(numpy_generator(seed, "panel-cells").permutation(rows)[:most]), where, note


def _values(store: CountStore, rows: NDArray[np.int64], label: str) -> np.ndarray:
    """Values of a label of some cells, ``object [n]``."""
    code = store.labels(rows, [label])[label]
    return np.array([*store.manifest.labels[label], "missing"], dtype=object)[code]


def _depths(reader: Reader, shared: set[str]) -> NDArray[np.float64]:
    """Molecules of each cell of the query in the genes of the panel that the atlas has; cells without are left out."""
    use = np.flatnonzero(reader.known & np.array([gene in shared for gene in reader.rows.genes]))
    found = []
    for start in range(0, reader.rows.n_cells, CELLS):
        part = sparse.csr_matrix(reader.rows.read(start, min(start + CELLS, reader.rows.n_cells)))
        found.append(np.asarray(part[:, use].sum(1), dtype=np.float64).ravel())
    depth = np.concatenate(found)
    if not (np.isfinite(depth).all() and (depth > 0).any()):
        raise ValueError(f"panel: {reader.rows.where} holds no molecules in the genes of the panel; give raw counts")
    return depth[depth > 0]
