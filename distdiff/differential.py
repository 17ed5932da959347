"""Differential expression that keeps its error rate: raw counts, a depth offset, and a reason where it refuses.

Genes that were measured are tested by `distdiff.scoretest`, or between donors by PyDESeq2; genes that were completed
from a panel by Rubin's rules over draws, marked exploratory. What a model made of the counts is shown and never tested.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from distdiff import files
from distdiff.component import nearest
from distdiff.data.counts import check_counts
from distdiff.data.ingest.source import Source, layer_names
from distdiff.scoretest import Tested, fit_null, rubin, score_tests, shrink
from distdiff.tasks.made import count_generated, made_by

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

DRAWS = 10
"""Draws that a completed gene needs."""

OURS = re.compile(r"(denoised|imputed|deepened)(_.*)?")
"""Names of layers that distdiff writes."""

PAGE = "docs/never-test-on-denoised.md"

WHY = {
    "mean": "holds estimates whose noise was taken out, so that groups without any difference differ in it (measured: "
    f"27 to 86 % of genes without a difference at p < .05, {PAGE})",
    "draw": "holds draws from a model, which say nothing of their uncertainty one at a time (measured: 15 % of genes "
    f"without a difference at p < .05, {PAGE})",
}  # fmt: skip


def de(
    adata: AnnData,
    groupby: str,
    *,
    groups: Sequence[str] | str = "all",
    reference: str = "rest",
    sample: str | None = None,
    layer: str | None = None,
    depth: str | None = None,
    model_layer: str | None = None,
    key_added: str = "rank_genes_groups",
    allow_invalid: bool = False,
    copy: bool = False,
) -> AnnData | None:
    """Test every gene between groups of cells and store the result as scanpy's `rank_genes_groups` does.

    Parameters
    ----------
    adata
        Raw counts; at least two groups of two cells.
    groupby
        Column of obs. Groups that were made from the same counts (clusters) differ by construction: their p-values
        order genes and test nothing.
    groups
        Those to test, or ``"all"``.
    reference
        The group to compare with, or ``"rest"``: all other cells.
    sample
        Column of obs with the donor: donors are the replicates, not cells. Sums over the cells of each donor and group
        are tested by PyDESeq2 (``pip install 'distdiff[de]'``), within donors where each has cells of both sides.
    layer
        Where the raw counts are (default ``X``; ``"raw"`` for ``.raw.X``).
    depth
        Numeric column of obs to use as the depth of a cell; by default its molecules in all measured genes.
    model_layer
        Layer whose log ratio is shown beside the test, as ``model_logfoldchanges``; by default ``denoised`` or
        ``imputed_mean`` where there is one.
    key_added
        Entry of ``uns``.
    allow_invalid
        Test a layer that a model made nevertheless; the reason why that is invalid is put into
        ``uns[key_added]["params"]["invalid"]``.
    copy
        Return a copy with the result; else it is put into ``adata``.

    Returns
    -------
    AnnData or None
        ``uns[key_added]``: record arrays ``names``, ``scores``, ``logfoldchanges`` (log2, shrunken), ``pvals``,
        ``pvals_adj`` (Benjamini and Hochberg), by score, a field a group, as `scanpy.get.rank_genes_groups_df` reads
        them; also ``logfoldchanges_raw``, ``logfoldchanges_error``, ``model_logfoldchanges`` and ``exploratory``. Genes
        completed from a panel (``var["distdiff_added"]``) are exploratory and are adjusted apart from the others.

    Raises
    ------
    ValueError
        A layer that a model made, values that are no counts, no such column or group, a single group, a group of one
        cell, fewer than two donors on a side, fewer than 10 draws of completed genes.

    Examples
    --------
    >>> import anndata, distdiff, scanpy
    >>> cells = anndata.read_h5ad("counts.h5ad")
    >>> distdiff.de(cells, "cell_type", groups=["B"])
    >>> table = scanpy.get.rank_genes_groups_df(cells, "B")
    >>> int((table.pvals_adj < 0.05).sum()) > 5, float(table.pvals.min()) < 1e-6
    (True, True)
    >>> cells.layers["denoised"] = cells.X * 0.5
    >>> distdiff.de(cells, "cell_type", layer="denoised")
    Traceback (most recent call last):
        ...
    ValueError: de: layer 'denoised' holds estimates whose noise was taken out, ...
    """
    if copy:
        adata = adata.copy()
    reason = invalid(adata, layer)
    if reason and not allow_invalid:
        raise ValueError(
            f"de: {reason}; test the raw counts, or give allow_invalid=True and keep the result to yourself"
        )
    source = Source.from_anndata(adata, layer)
    counts = source.read(0, source.n_cells)
    if not reason:
        check_counts(counts, source.genes, source.obs_names, f"de: {source.where}")
    labels, chosen = _groups(source, groupby, groups, reference)
    completed = _completed(adata, source)
    cells = _depth(source, counts[:, ~completed], depth)
    if sample is not None and completed.any():
        raise ValueError(
            f"de: {int(completed.sum())} genes were completed from a panel, and donors (sample={sample!r}) test "
            "measured genes alone; leave them out: adata[:, ~adata.var['distdiff_added']]"
        )
    if sample is None:
        found = _by_cells(counts.tocsc(), cells, labels, chosen, reference)
    else:
        found = _by_donors(counts, source, labels, chosen, reference, sample)
    if completed.any():
        drawn = _by_draws(adata, completed, cells, labels, chosen, reference)
        for name, part in drawn.items():
            for field, values in vars(part).items():
                getattr(found[name], field)[completed] = values
    shown = _model_ratios(adata, source, model_layer, cells, labels, chosen, reference)
    params = {
        "groupby": groupby, "reference": reference, "method": "nb-score" if sample is None else "pydeseq2",
        "use_raw": layer == "raw", "layer": None if layer == "raw" else layer, "corr_method": "benjamini-hochberg",
        **({"sample": sample} if sample else {}), **({"invalid": reason} if reason else {}),
    }  # fmt: skip
    adata.uns[key_added] = {"params": params, **_records(source.genes, found, completed, shown)}
    return adata if copy else None


def table(adata: AnnData, key: str = "rank_genes_groups") -> DataFrame:
    """All groups of a result of `de` as one table, a row a group and gene.

    Examples
    --------
    >>> import anndata, distdiff
    >>> from distdiff.differential import table
    >>> cells = anndata.read_h5ad("counts.h5ad")
    >>> distdiff.de(cells, "cell_type")
    >>> table(cells).columns[:4].tolist()
    ['group', 'names', 'scores', 'logfoldchanges']
    """
    import pandas as pd

    result = adata.uns[key]
    fields = [name for name in result if name != "params"]
    parts = [
        pd.DataFrame({"group": name, **{field: result[field][name] for field in fields}})
        for name in result["names"].dtype.names
    ]
    return pd.concat(parts, ignore_index=True)


def of_file(data: str | Path, out: str | Path, *, overwrite: bool = False, **options: Any) -> str:
    """Test the groups of a file; returns one line for each.

    Parameters
    ----------
    data
        An h5ad file, read into memory.
    out
        ``.csv`` or ``.tsv``: a row a group and gene (`table`); ``.h5ad``: the input with the result in ``uns``.
    overwrite
        Replace ``out``.
    **options
        Of `de`.

    Raises
    ------
    ValueError
        Another kind of file, something at ``out`` already, or as `de`.

    Examples
    --------
    >>> from distdiff.differential import of_file
    >>> print(of_file("counts.h5ad", "de.csv", groupby="cell_type"))
    30 genes at a false discovery rate of 5 %: B ..., T ...
    """
    import anndata as ad

    data, out = Path(data).expanduser(), Path(out).expanduser()
    if data.suffix != ".h5ad" or out.suffix not in (".csv", ".tsv", ".h5ad"):
        raise ValueError(f"de: {data} -> {out}: an .h5ad file is wanted, and a .csv, .tsv or .h5ad to write")
    if not data.exists():
        raise ValueError(f"de: no file at {data}")
    adata = ad.read_h5ad(data)
    with files.whole(out, overwrite=overwrite) as temporary:
        de(adata, **options)
        result = adata.uns["rank_genes_groups"]
        if out.suffix == ".h5ad":
            adata.write_h5ad(temporary)
        else:
            table(adata).to_csv(temporary, index=False, sep="," if out.suffix == ".csv" else "\t")
    found = ", ".join(f"{name} {int((result['pvals_adj'][name] < 0.05).sum())}" for name in result["names"].dtype.names)
    return f"{len(result['names'])} genes at a false discovery rate of 5 %: {found}"


def invalid(adata: AnnData, layer: str | None) -> str:
    """Why a layer must not be tested, or nothing.

    Examples
    --------
    >>> import anndata
    >>> from distdiff.differential import invalid
    >>> cells = anndata.read_h5ad("counts.h5ad")
    >>> invalid(cells, None), invalid(cells, "imputed_draw2")[:39]
    ('', "layer 'imputed_draw2' holds draws from ")
    """
    x, layers = made_by(adata.uns)
    if layer is not None and OURS.fullmatch(layer):
        draw = layer in ("imputed", "deepened") or layer.startswith("imputed_draw")
        return f"layer {layer!r} {WHY['draw' if draw else 'mean']}"
    if layer in layers:
        return f"layer {layer!r} {WHY['mean']}"
    what = "X" if layer is None else f"layer {layer!r}"
    if x:
        return f"{what} holds cells that a model generated, not cells that were measured"
    if n := count_generated(adata.obs_names):  # joined with others, they lose their mark
        return f"{what} holds {n:,} cells that a model generated, by their names (generated0, ...)"
    return ""


def _groups(
    source: Source, groupby: str, groups: Sequence[str] | str, reference: str
) -> tuple[np.ndarray, list[str]]:  # fmt: skip
    """Labels ``object [n]`` (None where missing), and the groups to test."""
    labels = source.obs(groupby)
    names, sizes = np.unique([label for label in labels if label is not None], return_counts=True)
    known = [str(name) for name in names]
    if len(known) < 2:
        raise ValueError(f"de: obs[{groupby!r}] has {len(known)} group, at least two are wanted")
    if reference != "rest" and reference not in known:
        raise ValueError(f"de: reference {reference!r} is no group of obs[{groupby!r}]{nearest(reference, known)}")
    asked = known if isinstance(groups, str) and groups == "all" else [groups] if isinstance(groups, str) else groups
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"de: {unknown[0]!r} is no group of obs[{groupby!r}]{nearest(str(unknown[0]), known)}")
    chosen = [str(name) for name in asked if name != reference]
    if not chosen:
        raise ValueError(f"de: no group is left to compare with reference {reference!r}")
    size = dict(zip(known, sizes.tolist(), strict=True))
    for name in [*chosen, *([] if reference == "rest" else [reference])]:
        if size[name] < 2:
            raise ValueError(f"de: group {name!r} has one cell, at least two are wanted; leave it out with groups=")
    return labels, chosen


def _completed(adata: AnnData, source: Source) -> np.ndarray:
    """``bool [g]``: genes that distdiff appended."""
    if source.var != "var" or "distdiff_added" not in adata.var:
        return np.zeros(len(source.genes), dtype=bool)
    return np.asarray(adata.var["distdiff_added"], dtype=bool)


def _depth(source: Source, measured: sparse.csr_matrix, column: str | None) -> np.ndarray:
    """``float64 [n]`` with mean 1."""
    if column is None:
        depth = np.asarray(measured.sum(1), dtype=np.float64).ravel()
    else:
        try:
            depth = np.array([np.nan if v is None else float(v) for v in source.obs(column)])
        except ValueError:
            raise ValueError(f"de: obs[{column!r}] is to be the depth of a cell and holds no numbers") from None
        if not (np.isfinite(depth).all() and (depth > 0).all()):
            raise ValueError(f"de: obs[{column!r}] is to be the depth of a cell; all of it must be above 0")
    if not depth.sum() > 0:
        raise ValueError(f"de: {source.where} holds no molecule")
    return depth / depth.mean()


def _sides(labels: np.ndarray, name: str, reference: str) -> np.ndarray:
    """``int8 [n]``: 1 in the group, 0 in what it is compared with, -1 elsewhere."""
    missing = np.array([label is None for label in labels])
    other = ~missing if reference == "rest" else labels == reference
    return np.where(labels == name, 1, np.where(other, 0, -1)).astype(np.int8)


def _by_cells(
    counts: sparse.csc_matrix, depth: np.ndarray, labels: np.ndarray, chosen: Sequence[str], reference: str
) -> dict[str, Tested]:  # fmt: skip
    if reference == "rest":  # one null for all groups
        use = np.array([label is not None for label in labels])
        names = sorted(set(labels[use]))
        group = np.searchsorted(names, labels[use].astype(str))
        part = counts[use] if not use.all() else counts
        tests = score_tests(part, depth[use], group, len(names), fit_null(part, depth[use]))
        return {name: tests[names.index(name)] for name in chosen}
    found = {}
    for name in chosen:
        side = _sides(labels, name, reference)
        use = side >= 0
        part = counts[use]
        found[name] = score_tests(part, depth[use], side[use].astype(int), 2, fit_null(part, depth[use]))[1]
    return found


def _by_draws(
    adata: AnnData, completed: np.ndarray, depth: np.ndarray, labels: np.ndarray, chosen: Sequence[str], reference: str
) -> dict[str, Tested]:  # fmt: skip
    layers = [name for name in layer_names(adata) if name == "imputed" or re.fullmatch(r"imputed_draw\d+", name)]
    if len(layers) < DRAWS:
        raise ValueError(
            f"de: {int(completed.sum())} genes were completed from a panel and there are {len(layers)} draws of them, "
            f"at least {DRAWS} are wanted (complete with draws={DRAWS}); or leave these genes out: "
            "adata[:, ~adata.var['distdiff_added']]"
        )
    tests = []
    for name in layers:
        part = adata.layers[name][:, np.flatnonzero(completed)]
        tests.append(_by_cells(sparse.csc_matrix(part), depth, labels, chosen, reference))
    return {
        name: rubin(np.array([t[name].ratio for t in tests]), np.array([t[name].error for t in tests]))
        for name in chosen
    }


def _by_donors(
    counts: sparse.csr_matrix, source: Source, labels: np.ndarray, chosen: Sequence[str], reference: str, sample: str
) -> dict[str, Tested]:  # fmt: skip
    donors = source.obs(sample)
    return {
        name: _of_sums(*donor_sums(counts, donors, _sides(labels, name, reference), name, sample)) for name in chosen
    }


def donor_sums(
    counts: sparse.csr_matrix, donors: np.ndarray, side: np.ndarray, name: str, sample: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of the counts of each donor on each side.

    Parameters
    ----------
    counts
        ``[n g]`` molecules.
    donors
        ``object [n]``, None where missing.
    side
        ``int8 [n]``, 1 in the group, 0 in what it is compared with, -1 for cells that take no part.
    name, sample
        Group and column of donors, for messages.

    Returns
    -------
    sums : int64 [s g]
        Molecules.
    side : int [s]
        Side of each sum.
    donor : str [s]
        Donor of each sum.

    Raises
    ------
    ValueError
        Fewer than two donors on a side.
    """
    use = (side >= 0) & np.array([donor is not None for donor in donors])
    pairs = [f"{s}\t{d}" for s, d in zip(side[use], donors[use], strict=True)]
    keys, at = np.unique(np.array(pairs, dtype=str), return_inverse=True)
    sides = np.array([int(key[0]) for key in keys])
    for value, what in ((1, f"group {name!r}"), (0, f"what group {name!r} is compared with")):
        if (n := int((sides == value).sum())) < 2:
            raise ValueError(
                f"de: {what} has cells of {n} of the donors in obs[{sample!r}], at least two are wanted; without "
                "sample= the cells are the replicates, and the answer is about these donors alone"
            )
    pick = sparse.csr_matrix((np.ones(len(at)), (at, np.flatnonzero(use))), shape=(len(keys), len(side)))
    sums = np.rint((pick @ counts).toarray()).astype(np.int64)
    return sums, sides, np.array([key.partition("\t")[2] for key in keys])


def _of_sums(sums: np.ndarray, side: np.ndarray, donor: np.ndarray) -> Tested:
    """Test sums by PyDESeq2, donors as a factor where each of them is on both sides."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pydeseq2.dds import DeseqDataSet
            from pydeseq2.ds import DeseqStats
    except ImportError:
        raise ValueError("de: sample= needs PyDESeq2: pip install 'distdiff[de]'") from None
    import pandas as pd

    names = [f"sum{i}" for i in range(len(sums))]
    some = sums.sum(0) > 0
    if not (sums[:, some] > 0).all(0).any():
        raise ValueError(
            "de: no gene has a count in every sum of a donor and a group, so their depths cannot be compared"
        )
    paired = len(set(donor)) * 2 == len(donor)
    about = pd.DataFrame({"donor": [f"d{d}" for d in donor], "side": np.where(side == 1, "one", "two")}, index=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few replicates, and of libraries it uses
        data = DeseqDataSet(
            counts=pd.DataFrame(sums[:, some], index=names), metadata=about, quiet=True, n_cpus=1,
            design="~donor + side" if paired else "~side",
        )  # fmt: skip
        data.deseq2()
        stats = DeseqStats(data, contrast=["side", "one", "two"], quiet=True, n_cpus=1)
        stats.summary()
    found = stats.results_df
    empty = np.zeros(sums.shape[1])
    tested = Tested(empty.copy(), empty + 1.0, empty.copy(), empty + np.inf)
    for field, column, factor in (
        ("z", "stat", 1.0), ("p", "pvalue", 1.0), ("ratio", "log2FoldChange", np.log(2)), ("error", "lfcSE", np.log(2)),
    ):  # fmt: skip
        getattr(tested, field)[some] = found[column].to_numpy(dtype=np.float64) * factor
    bad = ~np.isfinite(tested.p)  # a count that fits no negative binomial
    tested.p[bad], tested.z[bad] = 1.0, 0.0
    return tested


def _model_ratios(
    adata: AnnData, source: Source, model_layer: str | None, depth: np.ndarray, labels: np.ndarray,
    chosen: Sequence[str], reference: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Log2 ratios of a model's layer, ``float64 [g]`` a group; nan where there is none."""
    names = layer_names(adata)
    if model_layer is not None and model_layer not in names:
        raise ValueError(f"de: model_layer={model_layer!r} is no layer of this AnnData{nearest(model_layer, names)}")
    name = model_layer or next((name for name in ("denoised", "imputed_mean") if name in names), None)
    if name is None or source.var != "var":
        return {group: np.full(len(source.genes), np.nan) for group in chosen}
    values, found = adata.layers[name], {}
    for group in chosen:
        side = _sides(labels, group, reference)
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = [np.asarray(values[side == s].sum(0), np.float64).ravel() / depth[side == s].sum() for s in (1, 0)]
            found[group] = np.log2(rates[0] / rates[1])
    return found


def adjusted(p: np.ndarray) -> np.ndarray:
    """P-values adjusted by Benjamini and Hochberg.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.differential import adjusted
    >>> adjusted(np.array([0.04, 0.01, 0.5])).round(2)
    array([0.06, 0.03, 0.5 ])
    """
    order = np.argsort(p)[::-1]
    rank = np.arange(len(p), 0, -1)
    found = np.empty(len(p))
    found[order] = np.minimum.accumulate(np.minimum(p[order] * len(p) / rank, 1.0))
    return found


def _records(
    genes: Sequence[str], found: Mapping[str, Tested], completed: np.ndarray, shown: Mapping[str, np.ndarray]
) -> dict[str, Any]:  # fmt: skip
    columns: dict[str, dict[str, np.ndarray]] = {}
    for name, test in found.items():
        known = np.isfinite(test.error)
        small, _ = shrink(test.ratio, np.where(known, test.error, np.inf))
        padj = np.ones(len(genes))
        for part in (completed, ~completed):
            padj[part] = adjusted(test.p[part])
        order = np.lexsort((-test.z, completed))  # as scanpy: what is higher in the group comes first
        log2 = 1 / np.log(2)
        values = {
            "names": np.asarray(genes, dtype=object), "scores": test.z,
            "logfoldchanges": np.where(known, small, 0) * log2,
            "pvals": test.p, "pvals_adj": padj, "logfoldchanges_raw": test.ratio * log2,
            "logfoldchanges_error": test.error * log2, "model_logfoldchanges": shown[name], "exploratory": completed,
        }  # fmt: skip
        columns[name] = {field: value[order] for field, value in values.items()}
    kind = {"names": "O", "pvals": "float64", "pvals_adj": "float64", "exploratory": "bool"}
    return {field: _record(columns, field, kind.get(field, "float32")) for field in next(iter(columns.values()))}


def _record(columns: Mapping[str, Mapping[str, np.ndarray]], field: str, dtype: str) -> np.ndarray:
    record = np.zeros(len(next(iter(columns.values()))[field]), dtype=[(name, dtype) for name in columns])
    for name in columns:
        record[name] = columns[name][field]
    return record.view(np.recarray)
