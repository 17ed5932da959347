"""Should these counts be denoised or imputed at all? Molecular cross-validation on the user's own file.

Each cell's molecules are split (docs/MATHS.md 5.7); estimators see one part and are scored on the other. None is
recommended unless its likelihood is surely better than that of the counts left alone and than that of the gene mean.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import poisson

from distdiff import files
from distdiff.baselines import CHUNK, Baseline
from distdiff.baselines._tuning import sizes
from distdiff.baselines.gene_mean import GeneMean
from distdiff.baselines.knn import Knn
from distdiff.baselines.magic import Magic
from distdiff.baselines.pca import Pca
from distdiff.data.counts import check_counts
from distdiff.data.ingest.source import Source
from distdiff.data.masks import split_molecules
from distdiff.data.store.moments import Moments
from distdiff.inmemory import FEWEST, InMemory, groups_of
from distdiff.metrics import bootstrap_weights, paired_gain
from distdiff.rng import numpy_generator
from distdiff.seen import cell_hashes

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger("distdiff")

FloatArray = NDArray[np.floating]

DEPTHS = (0.9, 0.5, 0.2)
"""Shares of the molecules that estimators see; the first decides."""

RAW, MEAN = "no denoising", "gene mean x depth"

OWN = "own count + kNN"
"""Shown and not recommended: it wins where a gene's own count is all there is to know, and nothing is to be shared."""

FLOOR = 1e-6
"""Least expected molecules."""

ZEROS = (0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
"""What a zero that is left alone promises, in shares of the gene mean x depth; the best of them is taken."""

BANDS = {"low (below 0.05)": (0.0, 0.05), "middle": (0.05, 0.5), "high (above 0.5)": (0.5, np.inf)}
"""Bands of genes by molecules a cell."""

SMALL = 20
"""Cells that a group needs for a row of its own."""


@dataclass(frozen=True)
class Row:
    """A method's score on some cells and genes, and its gain over the two ways of doing nothing.

    Attributes
    ----------
    depth
        Share of the molecules that the method saw.
    method, group, band
        ``all`` where the row is of all cells or genes.
    cells
        Their number.
    nll, mse
        Poisson negative log-likelihood of the molecules held out (without terms of theirs alone) and squared error of
        ``log1p`` of these with the matching read-out, means over entries.
    nll_gain, mse_gain
        Of ``no denoising`` and of ``gene mean x depth`` less the method's: ``{name: (mean, low, high)}``, with 95 % of
        paired resamples of cells; above 0 the method is better.
    """

    depth: float
    method: str
    group: str
    band: str
    cells: int
    nll: float
    mse: float
    nll_gain: dict[str, tuple[float, float, float]]
    mse_gain: dict[str, tuple[float, float, float]]

    @property
    def better(self) -> bool:
        """Whether the likelihood is surely better than both ways of doing nothing."""
        return all(low > 0 for _, low, _ in self.nll_gain.values())


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes
    ----------
    use
        The method to denoise with, or ``None``: do not.
    verdict
        One sentence.
    about
        Cells, genes, depth, sparsity, groups, seed.
    notes
        What else was seen: suspected non-counts, ambient-looking genes, duplicated barcodes, equal cells.
    rows
        The scores.
    """

    use: str | None
    verdict: str
    about: dict[str, Any]
    notes: list[str]
    rows: list[Row] = field(repr=False)

    def to_text(self) -> str:
        """The verdict, what was seen in passing, and tables."""
        about = self.about
        lines = [
            f"verdict: {self.verdict}",
            f"{about['cells']:,} cells x {about['genes']:,} genes scored; {about['depth']:,.0f} molecules a cell "
            f"(median), {about['zeros']:.1%} zeros; groups: {about['groups']}",
            *(f"note: {note}" for note in self.notes),
        ]
        whole = [row for row in self.rows if row.group == row.band == "all"]
        for depth in dict.fromkeys(row.depth for row in whole):
            lines += ["", f"{depth:.0%} of the molecules seen, {1 - depth:.0%} scored (gains with 95 % intervals)"]
            lines.append(f"{'method':<20}{'NLL':>9}{'log1p MSE':>11}  {'NLL gain on the mean':<28}log1p gain on raw")
            for row in sorted((r for r in whole if r.depth == depth), key=lambda r: r.nll):
                gains = [_interval(g) for g in (row.nll_gain.get(MEAN), row.mse_gain.get(RAW))]
                lines.append(f"{row.method:<20}{row.nll:>9.4f}{row.mse:>11.5f}  {gains[0]:<28}{gains[1]}")
        parts = [
            r for r in self.rows if r.method == self.use and r.depth == DEPTHS[0] and (r.group, r.band) != ("all",) * 2
        ]
        if parts:
            lines += ["", f"where {self.use} is surely better than no denoising and than the mean (NLL)"]
            lines += [
                f"  {r.group if r.band == 'all' else r.band + ' genes'}: {'yes' if r.better else 'no'}" for r in parts
            ]
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write everything as JSON, whole or not at all."""
        text = json.dumps({**asdict(self), "rows": [asdict(row) for row in self.rows]}, indent=1)
        with files.whole(path, overwrite=overwrite) as temporary:
            temporary.write_text(text)
        return Path(path)


def _interval(gain: tuple[float, float, float] | None) -> str:
    return "-" if gain is None else f"{gain[0]:.2g} ({gain[1]:.2g} to {gain[2]:.2g})"


def check(
    adata: AnnData | str | Path, *, layer: str | None = None, groupby: str | None = None, cells: int = 3000,
    genes: int = 2000, model: bool = False, seed: int = 0, progress: bool = False,
) -> Check:  # fmt: skip
    """Find out by molecular cross-validation whether some counts should be denoised, and how.

    Parameters
    ----------
    adata
        Raw counts: an AnnData, an h5ad file, an AnnData zarr folder or 10x output.
    layer
        Where the raw counts are (default ``X``).
    groupby
        Column of obs whose groups get rows of their own; None: Leiden clusters of the same counts.
    cells, genes
        At most so many: cells at random, genes of largest variance over mean.
    model
        Train a distdiff model too (a minute or more), which then takes part.
    seed
        Of the splits.
    progress
        Tell each step.

    Returns
    -------
    Check
        ``print(found.to_text())``; ``found.use`` is the method or None.

    Raises
    ------
    ValueError
        Values that are no counts, fewer than 50 cells with molecules, fewer than 10 genes, no such column.

    Examples
    --------
    >>> import anndata, distdiff, numpy as np
    >>> flat = np.random.default_rng(0).poisson(np.full((120, 30), 2.0)).astype("float32")
    >>> found = distdiff.check(anndata.AnnData(flat))
    >>> found.use, found.verdict
    (None, 'do not denoise: no method is surely better than the gene mean ...')
    """
    source = Source.open(adata, layer) if isinstance(adata, str | Path) else Source.from_anndata(adata, layer)
    counts = source.read(0, source.n_cells)
    check_counts(counts, source.genes, source.obs_names, f"check: {source.where}")
    if source.expressed is not None:
        counts = counts[:, np.flatnonzero(source.expressed)]
    names = np.asarray(source.genes)[slice(None) if source.expressed is None else source.expressed]
    some = np.flatnonzero(np.asarray(counts.sum(1)).ravel() > 0)
    if len(some) < FEWEST:
        raise ValueError(f"check: {source.where} has {len(some)} cells with molecules, at least {FEWEST} are wanted")
    if len(some) > cells:
        some = np.sort(numpy_generator(seed, "check-cells").permutation(some)[:cells])
    counts = sparse.csr_matrix(counts[some], dtype=np.int64)
    moments = Moments.of(counts)
    spread = np.where(moments.mean > 0, moments.var / np.maximum(moments.mean, 1e-12), 0.0)
    keep = np.sort(np.argsort(-spread, kind="stable")[:genes])
    keep = keep[moments.mean[keep] > 0]
    if len(keep) < 10:
        raise ValueError(f"check: {source.where} has {len(keep)} genes with molecules, at least 10 are wanted")
    tell: Callable[[str], None] = log.warning if progress else log.debug
    group, label = groups_of(source, counts, some, groupby, seed)
    depth = np.asarray(counts.sum(1)).ravel()
    about = {
        "where": source.where, "cells": len(some), "genes": len(keep), "depth": float(np.median(depth)),
        "zeros": float(1 - counts.nnz / np.prod(counts.shape)), "groups": label, "seed": seed,
    }  # fmt: skip
    notes = _notes(source, counts, depth, group, names)
    rows: list[Row] = []
    for p in DEPTHS:
        rng = numpy_generator(seed, "check-split", round(1000 * p))
        seen, held = split_molecules(counts[:, keep], p, rng)
        answers = _answers(seen, p, names[keep], model and p == DEPTHS[0], seed, tell)
        rows += _rows(answers, held, p, group, np.asarray(counts[:, keep].mean(0)).ravel(), seed)
    use, verdict = _verdict([row for row in rows if row.depth == DEPTHS[0] and row.group == row.band == "all"])
    return Check(use, verdict, about, notes, rows)


def methods(cells: int) -> dict[str, Baseline]:
    """The estimators that take part, with options to choose from on hidden entries of the part that they see.

    Examples
    --------
    >>> from distdiff.checkup import methods
    >>> list(methods(1000))
    ['gene mean x depth', 'kNN', 'PCA', 'MAGIC']
    """
    k = [k for k in (10, 30) if k < cells // 2] or [5]
    return {
        MEAN: GeneMean(depth=True),
        "kNN": Knn(k=k, prior=(0.1, 1.0)),
        "PCA": Pca(components=(5, 20), scale=(0.3, 1.0)),
        "MAGIC": Magic(knn=k[0], t=(1, 3), n_pca=20),
    }


def _answers(
    seen: sparse.csr_matrix, p: float, names: np.ndarray, model: bool, seed: int, tell: Callable[[str], None]
) -> dict[str, FloatArray]:  # fmt: skip
    """Expected molecules of the part that is held out, ``float32 [n g]`` a method."""
    memory, odds = InMemory(sparse.csr_matrix(seen, dtype=np.float32)), (1 - p) / p
    found: dict[str, FloatArray] = {}
    for name, method in methods(seen.shape[0]).items():
        tell(f"check: {name} at {p:.0%}")
        method.fit(memory, np.arange(seen.shape[0]))  # type: ignore[arg-type]
        found[name] = method.denoise(memory.counts, 1.0) * np.float32(odds)
        if isinstance(method, Knn):
            found[OWN] = with_own_count(method, memory.counts) * np.float32(odds)
    found = {RAW: memory.counts.toarray() * np.float32(odds), **found}
    if model:
        tell(f"check: a model at {p:.0%}")
        found["distdiff"] = _model_rate(memory.counts, names, seed) * np.float32(odds)
    return found


def with_own_count(knn: Knn, counts: sparse.csr_matrix) -> FloatArray:
    """Mean of a rate whose prior the nearest *other* cells give, once the cell's own count is seen: ``float32 [n g]``.

    ``m (size + x) / (size + m)``, a gamma prior of mean ``m`` and a size a gene, by moments.

    Parameters
    ----------
    knn
        Fitted on these cells.
    counts
        CSR ``[n g]``.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy import sparse
    >>> from distdiff.baselines.knn import Knn
    >>> from distdiff.checkup import with_own_count
    >>> from distdiff.inmemory import InMemory
    >>> alike = sparse.csr_matrix(np.random.default_rng(0).poisson(4.0, (200, 9)).astype("float32"))
    >>> knn = Knn(k=30, prior=1.0, scale=1.0)
    >>> knn.fit(InMemory(alike), np.arange(200))
    >>> bool(with_own_count(knn, alike).var() < 0.3 * alike.toarray().var())  # the own count says little here
    True
    """
    x = counts.toarray()
    every, mean, k = np.ones(x.shape, dtype=bool), np.empty_like(x), int(knn.chosen["k"])
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        near = knn.neighbours(x[part], every[part], k + 1, knn.chosen["scale"])
        own = near == np.arange(start, start + len(near))[:, None]
        near = np.take_along_axis(near, np.argsort(own, axis=1, kind="stable"), axis=1)[:, :k]
        mean[part] = knn.pool(x[part], every[part], near, knn.chosen["prior"])
    size = sizes(x, every, mean)
    return (mean * (size + x) / (size + mean)).astype(np.float32)


def _model_rate(counts: sparse.csr_matrix, names: np.ndarray, seed: int) -> FloatArray:
    """Rates of a model that is trained for a minute or so on the same part."""
    import anndata as ad
    import pandas as pd

    from distdiff.api import train

    adata = ad.AnnData(
        counts, var=pd.DataFrame(index=names), obs=pd.DataFrame(index=[f"c{i}" for i in range(counts.shape[0])])
    )
    trained = train(
        adata, cells=max(20_000, min(100_000, 30 * counts.shape[0])), width=128, seed=seed, progress=False,
        evaluate={"enabled": False}, tracking={"enabled": False}, manifest="none",
    )  # fmt: skip
    trained.denoise(adata, copy=False)
    rate = adata.layers["denoised"]
    return np.asarray(rate.toarray() if sparse.issparse(rate) else rate)


def mean_log1p(rate: FloatArray) -> FloatArray:
    """``E[log(1 + y)]`` of Poisson molecules ``y`` of a rate: the answer that squared error wants (docs/MATHS.md 5.8).

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.checkup import mean_log1p
    >>> mean_log1p(np.array([0.0, 1.0, 1000.0])).round(3)
    array([0.   , 0.573, 6.908])
    """
    grid = np.linspace(0.0, 10.0, 1001) ** 2  # up to 100
    y = np.arange(200)
    exact = (poisson.pmf(y, grid[:, None]) * np.log1p(y)).sum(1)
    far = np.log1p(np.maximum(rate, 1.0)) - rate / (2 * (1 + rate) ** 2)
    return np.where(rate < grid[-1], np.interp(np.sqrt(rate), np.sqrt(grid), exact), far)


def _rows(
    answers: dict[str, FloatArray], held: sparse.csr_matrix, p: float, group: np.ndarray, mean: FloatArray, seed: int
) -> list[Row]:  # fmt: skip
    truth = held.toarray().astype(np.float32)
    log_truth = np.log1p(truth)
    masks = {"all": np.ones(len(mean), dtype=bool)}
    masks |= {name: (mean >= low) & (mean < high) for name, (low, high) in BANDS.items()}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    sums: dict[tuple[str, str], tuple[FloatArray, FloatArray]] = {}
    for name, rate in answers.items():
        r = _floored(rate, answers[MEAN], truth) if name == RAW else np.maximum(rate, FLOOR)
        nll, mse = r - truth * np.log(r), (log_truth - mean_log1p(rate)) ** 2
        for band, mask in masks.items():
            sums[name, band] = nll[:, mask].mean(1, dtype=np.float64), mse[:, mask].mean(1, dtype=np.float64)
    parts = {"all": np.arange(len(group))}
    parts |= {str(name): np.flatnonzero(group == name) for name in np.unique(group)}
    rows = []
    for label, at in parts.items():
        if len(at) < SMALL:
            continue
        weights = bootstrap_weights(len(at), 500, numpy_generator(seed, "check-resample", len(at))) / len(at)
        for name in answers:
            for band in masks if label == "all" else ("all",):
                gains = [
                    {other: paired_gain(sums[other, band][i][at] - sums[name, band][i][at], weights)
                     for other in (RAW, MEAN) if other != name} for i in (0, 1)
                ]  # fmt: skip
                score = [float(sums[name, band][i][at].mean()) for i in (0, 1)]
                rows.append(Row(p, name, label, band, len(at), score[0], score[1], gains[0], gains[1]))
    return rows


def _floored(rate: FloatArray, mean: FloatArray, truth: FloatArray) -> FloatArray:
    """Counts that are left alone, with the least rate at which their zeros do best: a count of 0 is no promise of 0."""
    tried = [np.maximum(rate, np.maximum(share * mean, FLOOR)) for share in ZEROS]
    return min(tried, key=lambda r: float((r - truth * np.log(r)).sum(dtype=np.float64)))


def _verdict(rows: Sequence[Row]) -> tuple[str | None, str]:
    """The best method by likelihood that is surely better than both ways of doing nothing, or a reason not to."""
    able = sorted((row for row in rows if row.method not in (RAW, MEAN, OWN)), key=lambda row: row.nll)
    best, own = able[0], next((row for row in rows if row.method == OWN), None)
    if best.better:
        low, high = best.nll_gain[MEAN][1:]
        logs = best.mse_gain[RAW][1] > 0
        return best.method, (
            f"denoise with {best.method}: it predicts held-out molecules better than the gene mean (NLL lower by "
            f"{low:.2g} to {high:.2g} an entry) and than the counts themselves"
            + ("" if logs else ", but not their logarithms: where counts are large, keep them")
            + (f"; {OWN} predicts them better still" if own is not None and own.nll < best.nll else "")
        )
    missing = [name for name in (MEAN, RAW) if best.nll_gain[name][1] <= 0]
    what = " and ".join("the gene mean" if name == MEAN else "the counts as they are" for name in missing)
    return None, f"do not denoise: no method is surely better than {what} (the best is {best.method})"


def _notes(
    source: Source, counts: sparse.csr_matrix, depth: np.ndarray, group: np.ndarray, names: np.ndarray
) -> list[str]:  # fmt: skip
    found = []
    if source.renamed:
        found.append(source.renamed)
    hashes, enough = cell_hashes(counts)
    equal = int(enough.sum() - len(np.unique(hashes[enough])))
    if equal:
        found.append(f"{equal} cells have exactly the counts of another: were files joined twice?")
    if len(np.unique(depth)) < max(2, len(depth) // 50):
        found.append(
            "most cells have the same number of molecules: were these normalised or down-sampled, and rounded?"
        )
    if counts.nnz and (step := int(np.gcd.reduce(counts.data))) > 1:
        found.append(f"every count is a multiple of {step}: are these no counts of molecules?")
    if counts.nnz and (counts.data == 1).mean() < 0.05 and counts.nnz / np.prod(counts.shape) < 0.5:
        found.append("zeros are many and ones are rare: are these reads without UMIs, or rounded estimates?")
    if len(ambient := _ambient(counts, depth, group, names)):
        found.append(
            f"ambient-looking genes (one group's own, and in at least a fifth of the cells of every group): "
            f"{', '.join(ambient[:8])}{' ...' if len(ambient) > 8 else ''}; denoising does not remove ambient RNA"
        )
    return found


def _ambient(counts: sparse.csr_matrix, depth: np.ndarray, group: np.ndarray, names: np.ndarray) -> list[str]:
    """Genes ten times as high in one group as in the median group, that a fifth of the cells of every group show."""
    labels, code = np.unique(group.astype(str), return_inverse=True)
    size = np.bincount(code)
    if (size >= SMALL).sum() < 3:
        return []
    large = np.flatnonzero(size >= SMALL)
    pick = sparse.csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))), shape=(len(labels), len(code)))
    rate = (pick @ counts).toarray()[large] / np.bincount(code, weights=depth)[large, None]
    shown = (pick @ (counts > 0)).toarray()[large] / size[large, None]
    own = (rate.max(0) > 10 * np.median(rate, axis=0)) & (shown.min(0) >= 0.2)
    return [str(name) for name in names[np.flatnonzero(own)[np.argsort(-rate.max(0)[own])]]]
