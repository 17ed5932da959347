"""How well a panel predicts each gene that it lacks, before anyone uses the answer (docs/howto/panel.md).

Genes of cells whose counts are known are hidden, completed from the panel, and compared with what was hidden; each
score is a number a gene, with an interval over cells. Shapes: ``n`` cells, ``g`` genes, ``t`` genes that are scored,
``R`` resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from distdiff import files, metrics
from distdiff.data.masks import thin
from distdiff.imputers import Imputer
from distdiff.report import text_block
from distdiff.rng import numpy_generator
from distdiff.tasks.expected import RELIABLE, TABLE
from distdiff.types import Cells, Condition

if TYPE_CHECKING:
    from pandas import DataFrame

FloatArray = NDArray[np.floating]

GeneScores = dict[str, NDArray[np.float64]]
"""Name of a score -> its value for each gene, ``float64 [t]``."""

GENES = 512
"""Genes whose cells are dense in float64 at once."""

LEAST = 20
"""Cells that must show a gene for anything to be said of it."""

GOOD = 0.3
"""Correlation that a reliable gene reaches surely."""

WORDS = {
    RELIABLE: f"predicted: surely better than the gene's mean, correlation surely above {GOOD:g}",
    "weak": f"predicted a little: surely better than the gene's mean, correlation not surely above {GOOD:g}",
    "not reliable": "NOT RELIABLE: not surely better than the gene's mean at the cell's depth; do not interpret it",
    "unknown": f"fewer than {LEAST} cells show it at this depth: nothing can be said; do not interpret it",
}
"""Verdicts on a gene, best first, and what each means."""

SCORES = ("correlation", "spearman", "deviance_explained")
"""Scores with an interval (``_low``, ``_high``)."""


def depth_shares(depth: FloatArray, query: FloatArray) -> NDArray[np.float64]:
    """Share of its molecules that each cell keeps to be as deep as a query (docs/MATHS.md 17.1): ``float64 [n]``.

    Parameters
    ----------
    depth
        ``[n]`` molecules of the cells in the genes of the panel.
    query
        ``[m]`` molecules of the query's cells in the same genes.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.reliability import depth_shares
    >>> depth_shares(np.array([100.0, 300.0, 200.0]), np.array([50.0, 50.0]))
    array([0.5       , 0.16666667, 0.25      ])
    """
    rank = np.empty(len(depth))
    rank[np.argsort(depth, kind="stable")] = (np.arange(len(depth)) + 0.5) / max(len(depth), 1)
    return np.minimum(np.quantile(query, rank) / np.maximum(depth, 1e-12), 1.0)


def gene_scores(
    imputer: Imputer, counts: sparse.csr_matrix, panel: NDArray[np.bool_], targets: NDArray[np.int64], *,
    draws: int = 20, seed: int = 0, group: np.ndarray | None = None, resamples: int = 200, batch: int = 256,
) -> GeneScores:  # fmt: skip
    """Hide all genes that are not on the panel, complete ``targets``, and score each of them over the cells.

    Parameters
    ----------
    imputer
        Knows ``g`` genes.
    counts
        CSR ``[n g]`` molecules.
    panel
        ``bool [g]``: genes that are measured; of the others nothing is looked at.
    targets
        ``[t]`` columns that are scored, none of them on the panel.
    draws
        For the coverage of 95 % intervals; at least 2.
    group
        ``[n]`` group of each cell: ``correlation_within`` is of values less the mean of their group.
    resamples
        Of cells, for the intervals.

    Returns
    -------
    dict
        Name -> ``float64 [t]``: ``mean`` (molecules a cell), ``cells`` (that show the gene), ``correlation`` and
        ``spearman`` of the posterior mean with the counts, ``deviance_explained`` (docs/MATHS.md 17.2), each with
        ``_low`` and ``_high`` (95 % of resamples of cells; ranks are those of the sample); ``coverage`` of 95 %
        intervals of the draws; ``ceiling``, the correlation of the best answer there could be, if counts are Poisson
        around it; ``correlation_within``, with ``group``. NaN where a score is undefined.

    Raises
    ------
    ValueError
        A target on the panel, or fewer than 2 draws.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.model import Model
    >>> from distdiff.reliability import gene_scores
    >>> store = CountStore.open("atlas.zarr")
    >>> model = Model.new(store.spec(()), {"kind": "counts"}, {"kind": "mlp", "width": 8})
    >>> counts = store.read(store.rows("test"))
    >>> found = gene_scores(model.imputer(), counts, np.arange(30) < 20, np.arange(20, 30))
    >>> found["correlation"].shape, bool((found["correlation_low"] <= found["correlation_high"]).all())
    ((10,), True)
    """
    if panel[targets].any():
        raise ValueError(f"{int(panel[targets].sum())} of the genes to score are on the panel; hide them")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    mean, inside = completed_means(imputer, counts, panel, targets, draws=draws, seed=seed, batch=batch)
    n = counts.shape[0]
    weights = np.concatenate(
        (metrics.once(n), metrics.bootstrap_weights(n, resamples, numpy_generator(seed, "panel-resample")))
    ).astype(np.float64)
    depth = np.maximum(np.asarray(counts[:, np.flatnonzero(panel)].sum(1), dtype=np.float64).ravel(), 0.5)
    truth, parts = counts[:, targets].tocsc(), []
    for start in range(0, len(targets), GENES):
        x = truth[:, start : start + GENES].toarray().astype(np.float64)
        m = mean[:, start : start + GENES].astype(np.float64)
        parts.append(_chunk(x, m, depth, weights, group))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    return found | {"coverage": inside / max(n, 1)}


def completed_means(
    imputer: Imputer, counts: sparse.csr_matrix, panel: NDArray[np.bool_], targets: NDArray[np.int64], *,
    draws: int = 0, seed: int = 0, batch: int = 256,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:  # fmt: skip
    """Posterior means ``float32 [n t]`` of hidden genes, and how many cells' counts lie in their 95 % interval ``[t]``.

    Parameters as in `gene_scores`; without draws no interval holds anything.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.baselines.gene_mean import GeneMean
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.reliability import completed_means
    >>> store, baseline = CountStore.open("atlas.zarr"), GeneMean()
    >>> baseline.fit(store, store.rows("train"))
    >>> mean, _ = completed_means(baseline, store.read(store.rows("test")), np.arange(30) < 20, np.array([25]))
    >>> mean.shape, len(np.unique(mean))  # the mean of the gene in all cells
    ((20, 1), 1)
    """
    n, network = counts.shape[0], getattr(imputer, "denoiser", None)
    device = torch.device("cpu") if network is None else next(network.parameters()).device
    mean, inside = np.zeros((n, len(targets)), dtype=np.float32), np.zeros(len(targets), dtype=np.int64)
    at = torch.from_numpy(targets).to(device)
    for start in range(0, n, batch):
        x = counts[start : start + batch].toarray().astype(np.float32)
        seen = torch.from_numpy(panel).expand(x.shape)
        given = Cells(torch.from_numpy(np.where(panel, x, 0)), Condition(), torch.arange(start, start + len(x)))
        answer = imputer.impute(given.to(device), seen.to(device), draws=draws, seed=seed)
        mean[start : start + len(x)] = answer.mean[:, at].cpu().numpy()
        if answer.draws is not None:
            drawn, truth = answer.draws[..., at].cpu().numpy(), x[:, targets]
            u = metrics.pit(truth, np.ones(truth.shape, bool), drawn, numpy_generator(seed, "panel-pit", start))
            inside += (np.abs(u.reshape(truth.shape) - 0.5) <= 0.475).sum(0)
    return mean, inside


def _chunk(
    x: FloatArray, m: FloatArray, depth: FloatArray, weights: FloatArray, group: np.ndarray | None
) -> GeneScores:  # fmt: skip
    """All scores of some genes from counts and means ``[n t]``; the first row of ``weights`` is the sample itself."""
    n, every = len(x), np.ones(x.T.shape, dtype=bool)
    rank_x, rank_m = (np.ascontiguousarray(metrics.ranks(values.T, every).T) for values in (x, m))
    several = {
        "correlation": correlations(x, m, weights), "spearman": correlations(rank_x, rank_m, weights),
        "deviance_explained": deviance_explained(x, m, depth, weights),
    }  # fmt: skip
    found: GeneScores = {"mean": x.mean(0), "cells": (x > 0).sum(0).astype(np.float64)}
    for name, values in several.items():
        found[name] = values[0]
        with np.errstate(invalid="ignore"):
            bounds = np.quantile(np.where(np.isfinite(values), values, 0.0), (0.025, 0.975), axis=0)
        found[f"{name}_low"], found[f"{name}_high"] = np.where(np.isfinite(values[0]), bounds, np.nan)
    variance = x.var(0)
    found["ceiling"] = np.sqrt(np.clip(1 - found["mean"] / np.maximum(variance, 1e-12), 0, 1))
    if group is not None:
        code = np.unique(group.astype(str), return_inverse=True)[1]
        pick = sparse.csr_matrix((np.ones(n), (code, np.arange(n))))
        size = np.bincount(code)[:, None]
        x, m = (values - ((pick @ values) / size)[code] for values in (x, m))
        found["correlation_within"] = correlations(x, m, weights[:1])[0]
    return found


def correlations(x: FloatArray, m: FloatArray, weights: FloatArray) -> NDArray[np.float64]:
    """Pearson correlation of each column of ``x`` and ``m`` ``[n t]``, where cells count ``weights`` ``[R n]`` times.

    Returns ``float64 [R t]``, NaN where a column does not vary.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.reliability import correlations
    >>> x = np.array([[0.0], [1.0], [2.0]])
    >>> correlations(x, 3 * x + 1, np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 3.0]])).round(6)
    array([[ 1.],
           [nan]])
    """
    share = weights / weights.sum(1, keepdims=True)
    x, m = x - x.mean(0), m - m.mean(0)  # sums of squares lose no digits
    of_x, of_m, of_xx, of_mm, of_xm = (share @ values for values in (x, m, x * x, m * m, x * m))
    var_x, var_m = of_xx - of_x**2, of_mm - of_m**2
    varies = (var_x > 1e-12 * (x * x).mean(0)) & (var_m > 1e-12 * (m * m).mean(0))
    return np.divide(
        of_xm - of_x * of_m, np.sqrt(np.where(varies, var_x * var_m, 1.0)), out=np.full(var_x.shape, np.nan),
        where=varies,
    )  # fmt: skip


def deviance_explained(x: FloatArray, m: FloatArray, depth: FloatArray, weights: FloatArray) -> NDArray[np.float64]:
    """Share of the Poisson deviance of gene mean x depth that an answer explains (docs/MATHS.md 17.2).

    Returns ``float64 [R t]``, NaN for genes without molecules. The gene's mean is that of the same cells, so that it is
    right on average, which the answer need not be.

    Parameters
    ----------
    x, m
        ``[n t]`` molecules and expected molecules (below `metrics.DEVIANCE_FLOOR`: that).
    depth
        ``[n]`` of each cell, on any scale.
    weights
        ``[R n]``, how often each cell counts.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.reliability import deviance_explained
    >>> x, depth = np.array([[0.0], [4.0]]), np.array([1.0, 1.0])
    >>> answers = (x, np.full((2, 1), 2.0), 4 - x)  # right, the mean, upside down
    >>> [float(deviance_explained(x, m, depth, np.ones((1, 2)))[0, 0].round(1)) for m in answers]
    [1.0, 0.0, -20.9]
    """
    from scipy.special import xlogy

    m = np.maximum(m, metrics.DEVIANCE_FLOOR)
    total, size = weights @ x, (weights @ depth)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        own = weights @ xlogy(x, x)
        trivial = own - weights @ xlogy(x, depth[:, None]) - xlogy(total, total / size)
        model = own - weights @ xlogy(x, m) - total + weights @ m
        return np.where((total > 0) & (trivial > 1e-9 * total), 1 - model / trivial, np.nan)


def verdicts(scores: Mapping[str, NDArray[np.float64]]) -> np.ndarray:
    """One of `WORDS` for each gene, ``str [t]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.reliability import verdicts
    >>> scores = {"cells": [900, 900, 900, 3], "correlation_low": [0.6, 0.1, 0.4, 0.9],
    ...           "deviance_explained_low": [0.2, 0.01, -0.1, 0.9]}  # fmt: skip
    >>> verdicts({name: np.array(values) for name, values in scores.items()}).tolist()
    ['reliable', 'weak', 'not reliable', 'unknown']
    """
    better, good = scores["deviance_explained_low"] > 0, scores["correlation_low"] > GOOD
    return np.select([scores["cells"] < LEAST, better & good, better], ["unknown", RELIABLE, "weak"], "not reliable")


@dataclass(frozen=True)
class PanelReport:
    """What `distdiff.panel` found.

    Attributes
    ----------
    table
        A row a gene that the panel lacks (index ``gene``), best first: ``reliability`` (one of `WORDS`), the scores of
        `gene_scores`, and ``in_words``.
    about
        Model, atlas, panel, numbers of cells, depths, seed.
    notes
        What else is to be known.

    Examples
    --------
    >>> import pandas as pd
    >>> from distdiff.reliability import PanelReport
    >>> table = pd.DataFrame({"reliability": ["reliable", "weak"]}, index=["CD3E", "MS4A1"])
    >>> PanelReport(table, {}, []).reliable
    ['CD3E']
    """

    table: DataFrame
    about: dict[str, Any]
    notes: list[str]

    @property
    def reliable(self) -> list[str]:
        """Names of the genes that are reliable, best first."""
        return [str(gene) for gene in self.table.index[self.table["reliability"] == RELIABLE]]

    def to_text(self) -> str:
        """How many genes are reliable, the first and the last of them, and what the words mean."""
        a, table = self.about, self.table
        lines = [
            f"panel of {a['panel_genes']:,} genes that the model knows, {len(table):,} genes that it lacks; expected "
            f"from {a['cells']:,} cells of {a['atlas']} ({a['cells_from']}), {a['depth']:,.0f} molecules a cell on the "
            f"panel (median; the query has {a['query_depth']:,.0f})",
            *(f"note: {note}" for note in self.notes), "",
        ]  # fmt: skip
        number = table["reliability"].value_counts()
        lines += [f"{number.get(name, 0):>7,} {name:<13} {words}" for name, words in WORDS.items()]
        names = ["gene", "correlation (95 %)", "Spearman", "deviance explained (95 %)", "coverage", "reliability"]
        shown = table if len(table) <= 20 else table.iloc[[*range(15), *range(-5, 0)]]
        body = [
            [str(gene), _range(row, "correlation"), _two(row["spearman"]), _range(row, "deviance_explained"),
             f"{row['coverage']:.1%}", row["reliability"]] for gene, row in shown.iterrows()
        ]  # fmt: skip
        middle = "" if len(table) <= 20 else f"\n(the first 15 and the last 5 of {len(table):,} genes)"
        return "\n".join([*lines, "", text_block(names, body) + middle]) + "\n"

    def write(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``genes.csv``, ``reliable.txt`` (names), ``panel.txt``, ``panel.json`` and ``panel.png``.

        The folder appears when complete.
        """
        from distdiff import pl

        with files.whole(folder, overwrite=overwrite) as temporary:
            temporary.mkdir()
            self.table.to_csv(temporary / TABLE, index_label="gene")
            (temporary / "reliable.txt").write_text("".join(f"{gene}\n" for gene in self.reliable))
            (temporary / "panel.txt").write_text(self.to_text())
            (temporary / "panel.json").write_text(json.dumps({"about": self.about, "notes": self.notes}, indent=1))
            pl.panel(self.table, name=Path(str(self.about["query"])).name, save=temporary / "panel.png")
        return Path(folder)


def _two(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"


def _range(row: Any, name: str) -> str:
    low, high = (row[f"{name}_{end}"] for end in ("low", "high"))
    return f"{_two(row[name])} ({low:.2f} to {high:.2f})" if np.isfinite(row[name]) else "-"


def tabled(genes: Sequence[str], scores: Mapping[str, NDArray[np.float64]]) -> DataFrame:
    """The table of a `PanelReport`: genes by verdict, then by correlation.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.reliability import SCORES, tabled
    >>> two = {name: np.array([0.1, 0.9]) for s in SCORES for name in (s, f"{s}_low", f"{s}_high")}
    >>> tabled(["a", "b"], two | {"cells": np.array([90, 90])}).index.tolist()
    ['b', 'a']
    """
    import pandas as pd

    table = pd.DataFrame({"reliability": verdicts(scores), **scores}, index=pd.Index(list(genes), name="gene"))
    table["in_words"] = table["reliability"].map(WORDS)
    place_of = {name: i for i, name in enumerate(WORDS)}
    order = np.lexsort((-table["correlation"].fillna(-2.0), table["reliability"].map(place_of)))
    return table.iloc[order]


def agreement(
    imputer: Imputer, genes: Sequence[str], atlas: sparse.csr_matrix, query: sparse.csr_matrix, fold: NDArray[np.int64],
    *, draws: int = 20, seed: int = 0,
) -> DataFrame:  # fmt: skip
    """Expected and real reliability of every gene, when one fold of genes after the other is what a panel lacks.

    Parameters
    ----------
    imputer
        Knows ``g`` genes, whose names are ``genes``.
    atlas
        CSR ``[n g]``: cells that give the expectation, thinned to the depth of the query.
    query
        CSR ``[m g]``: other cells, whose counts are known too.
    fold
        ``int [g]`` fold of each gene, from 0; -1: on every panel.

    Returns
    -------
    pandas.DataFrame
        A row a gene (index ``gene``): ``fold``, ``reliability``, the scores of `gene_scores` of the query's cells, and
        those of the atlas with ``expected_`` before their names.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.model import Model
    >>> from distdiff.reliability import agreement
    >>> store = CountStore.open("atlas.zarr")
    >>> model = Model.new(store.spec(()), {"kind": "counts"}, {"kind": "mlp", "width": 8})
    >>> counts = [store.read(store.rows(split)) for split in ("val", "test")]
    >>> agreement(model.imputer(), store.genes, *counts, np.arange(30) % 3, draws=2).shape[0]
    30
    """
    import pandas as pd

    tables = []
    for number in range(int(fold.max()) + 1):
        panel, targets = fold != number, np.flatnonzero(fold == number)
        depths = [np.asarray(part[:, np.flatnonzero(panel)].sum(1)).ravel() for part in (atlas, query)]
        thinned = thin(atlas, depth_shares(*depths), numpy_generator(seed, "panel-thin", number))
        before = gene_scores(imputer, thinned, panel, targets, draws=draws, seed=seed)
        after = gene_scores(imputer, query, panel, targets, draws=draws, seed=seed)
        expected = {f"expected_{name}": values for name, values in before.items()}
        index = pd.Index([genes[int(i)] for i in targets], name="gene")
        tables.append(pd.DataFrame(
            {"fold": number, "reliability": verdicts(before), **expected, **after}, index=index
        ))  # fmt: skip
    return pd.concat(tables)


def agreed(table: DataFrame) -> dict[str, Any]:
    """How far expected and real reliability in the table of `agreement` agree, over genes that enough cells show.

    Examples
    --------
    >>> import pandas as pd
    >>> from distdiff.reliability import agreed
    >>> scores = ("correlation", "spearman", "deviance_explained")
    >>> table = pd.DataFrame({f"{of}{name}": [0.1, 0.2, 0.9] for of in ("", "expected_") for name in scores})
    >>> table = table.assign(cells=90, coverage=0.95, fold=0, reliability="weak")
    >>> round(agreed(table)["rank_correlation"]["correlation"], 6), round(agreed(table)["coverage"], 6)
    (1.0, 0.95)
    """
    known = table[(table["reliability"] != "unknown") & (table["cells"] >= LEAST)]
    ranked = {
        name: float(known[f"expected_{name}"].corr(known[name], method="spearman")) if len(known) > 2 else float("nan")
        for name in SCORES
    }
    by_verdict = {}
    for name in WORDS:
        part = table[table["reliability"] == name]
        if len(part):
            by_verdict[name] = {
                "genes": len(part), "correlation": float(part["correlation"].median()),
                "deviance_explained": float(part["deviance_explained"].median()),
                "correlation_above_limit": float((part["correlation"] > GOOD).mean()),
                "better_than_mean": float((part["deviance_explained"] > 0).mean()),
            }  # fmt: skip
    return {
        "genes": len(table), "genes_known": len(known), "folds": int(table["fold"].max()) + 1,
        "rank_correlation": ranked, "coverage": float(table["coverage"].mean()),
        "coverage_of_known_genes": float(known["coverage"].mean()),
        "mean_difference": {name: float((known[name] - known[f"expected_{name}"]).mean()) for name in SCORES},
        "by_verdict": by_verdict,
    }  # fmt: skip
