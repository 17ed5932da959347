"""Cells whose right answer is known, and what a model makes of them: nothing may come out that was not put in.

Shapes: ``n`` cells, ``g`` genes. Correlations are of log1p CP10k, within groups of cells, over the genes of highest
mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]

TOP = 200
"""Genes of highest mean that correlations are of."""


def permuted(counts: FloatArray, group: np.ndarray, rng: np.random.Generator) -> FloatArray:
    """Each gene's counts dealt anew to the cells of a group: genes are independent there, their laws as they were.

    Parameters
    ----------
    counts
        ``[n g]`` molecules.
    group
        ``[n]`` names.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import permuted
    >>> dealt = permuted(np.arange(6.0).reshape(3, 2), np.array(["a", "a", "b"]), np.random.default_rng(0))
    >>> sorted(dealt[:2, 0].tolist()), dealt[2].tolist()
    ([0.0, 2.0], [4.0, 5.0])
    """
    out = counts.copy()
    for name in np.unique(group):
        at = np.flatnonzero(group == name)
        out[at] = rng.permuted(out[at], axis=0)
    return out


def flat(counts: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Poisson cells with the depths and the gene means of ``counts``, and no other difference between them.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import flat
    >>> alike = flat(np.array([[900.0, 0.0], [0.0, 900.0]]), np.random.default_rng(0))
    >>> bool((np.abs(alike - 450) < 100).all())
    True
    """
    share = counts.mean(0, dtype=np.float64) / max(counts.sum(dtype=np.float64) / len(counts), 1e-12)
    return rng.poisson(counts.sum(1, dtype=np.float64)[:, None] * share).astype(np.float32)


def within(values: FloatArray, group: np.ndarray) -> NDArray[np.float64]:
    """Values less the means of their groups, ``float64 [n g]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import within
    >>> within(np.array([[1.0], [3.0], [7.0]]), np.array(["a", "a", "b"])).ravel().tolist()
    [-1.0, 1.0, 0.0]
    """
    code = np.unique(group, return_inverse=True)[1]
    total = np.zeros((code.max() + 1, values.shape[1]))
    np.add.at(total, code, values)
    return values - (total / np.bincount(code)[:, None])[code]


def mean_correlation(values: FloatArray, group: np.ndarray) -> float:
    """Mean absolute correlation of two genes within groups; genes that do not vary are left out, NaN without a pair.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import mean_correlation
    >>> x = np.random.default_rng(0).normal(size=(2000, 1))
    >>> group = np.repeat(["a", "b"], 1000)
    >>> round(mean_correlation(np.hstack((x, -x)), group), 6)
    1.0
    """
    centred = within(values, group)
    centred = centred[:, centred.std(0) > 1e-9]
    if centred.shape[1] < 2:
        return float("nan")
    found = np.abs(np.corrcoef(centred.T))
    return float(found[np.triu_indices(len(found), 1)].mean())


def real_share(seen: FloatArray, held: FloatArray, group: np.ndarray) -> float:
    """How much of the covariance of denoised genes held-out molecules bear out: 1 all, 0 none (docs/MATHS.md 16.1).

    ``seen`` ``[n g]`` are rates made from a part of each cell's molecules, ``held`` ``[n g]`` the other molecules on
    the same scale. For rates that are what the cell leads one to expect, ``cov(seen_i, held_j) = cov(seen_i, seen_j)``;
    the answer is the slope of the first on the second over pairs of different genes, within groups.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import real_share
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.gamma(5.0, 1.0, (4000, 1)) * np.ones(10)  # all genes go together
    >>> group = np.repeat("a", 4000)
    >>> shown = [real_share(rate, rng.poisson(r), group) for r in (rate, rng.permutation(rate))]
    >>> [round(value, 1) + 0.0 for value in shown]
    [1.0, 0.0]
    """
    scale = seen.mean(0, dtype=np.float64) + 1e-12
    a, b = within(seen / scale, group), within(held / scale, group)
    of_seen, of_both = a.T @ a, a.T @ b
    off = ~np.eye(len(of_seen), dtype=bool)
    square = float((of_seen[off] ** 2).sum())
    return float((of_seen[off] * of_both[off]).sum() / square) if square > 0 else float("nan")


def halves(values: FloatArray, rng: np.random.Generator, *, splits: int = 20) -> NDArray[np.float64]:
    """Share of genes that a t-test tells apart (p < .05) between random halves of cells: ``float64 [splits]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import halves
    >>> rng = np.random.default_rng(0)
    >>> round(float(halves(rng.normal(size=(100, 500)), rng).mean()), 2)
    0.05
    """
    from scipy.stats import ttest_ind

    found = []
    varies = values[:, values.std(0) > 1e-9]
    for _ in range(splits):
        order = rng.permutation(len(varies))
        half = len(order) // 2
        found.append((ttest_ind(varies[order[:half]], varies[order[half:]]).pvalue < 0.05).mean())
    return np.array(found)


def leak(rate: FloatArray, held: FloatArray, group: np.ndarray, markers: dict[str, np.ndarray]) -> tuple[float, float]:
    """Expected and seen molecules of markers in all cells of the groups that are not theirs.

    Parameters
    ----------
    rate
        ``[n g]`` denoised molecules.
    held
        ``[n g]`` molecules that the model did not see, on the same scale.
    markers
        Group -> columns of genes that it alone has.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import leak
    >>> held, group = np.array([[4.0, 0.0], [0.0, 6.0]]), np.array(["B", "T"])
    >>> leak(held + 1, held, group, {"B": np.array([0]), "T": np.array([1])})
    (2.0, 0.0)
    """
    expected = seen = 0.0
    for name, genes in markers.items():
        other_cells = np.flatnonzero(group != name)
        expected += float(rate[np.ix_(other_cells, genes)].sum(dtype=np.float64))
        seen += float(held[np.ix_(other_cells, genes)].sum(dtype=np.float64))
    return expected, seen


def markers_of(counts: FloatArray, group: np.ndarray, *, most: int = 10) -> dict[str, np.ndarray]:
    """Genes ten times as high in one group of 20 cells or more as in any other, the highest first: group -> columns.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.nulls import markers_of
    >>> group = np.repeat(["B", "T"], 30)
    >>> counts = np.where(group[:, None] == np.array(["B", "T", "all"]), 9.0, 0.1) + np.array([0.0, 0.0, 9.0])
    >>> {name: genes.tolist() for name, genes in markers_of(counts, group).items()}
    {'B': [0], 'T': [1]}
    """
    names, size = np.unique(group, return_counts=True)
    names = names[size >= 20]
    if len(names) < 2:
        return {}
    rate = np.stack([counts[group == name].sum(0, dtype=np.float64) for name in names])
    rate /= np.maximum(rate.sum(1, keepdims=True), 1e-12)
    found = {}
    for i, name in enumerate(names):
        other_rate = np.delete(rate, i, 0).max(0)
        own = np.flatnonzero((rate[i] > 10 * other_rate) & (rate[i] > 1e-4))
        if len(own):
            found[str(name)] = own[np.argsort(-rate[i][own], kind="stable")][:most]
    return found
