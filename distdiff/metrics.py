"""Scores of imputed counts: plain functions of numpy arrays, ready for a bootstrap over cells.

Shapes: ``b`` cells, ``g`` genes, ``k`` draws, ``R`` bootstrap replicates. ``targets`` (``bool [b g]``) marks the
entries that are scored. There are two families.

* *Per cell*: a function returns one number a cell (``float64 [b]``). `poisson_deviance`, `crps`, `squared_error`,
  `absolute_error`, `error` and `log1p_squared_error` return **sums over the cell's targets**, so the score of any
  resample of cells is a ratio of two weighted sums (`pooled`). `spearman` and `pearson` return a coefficient a cell
  (NaN where undefined), averaged by `cell_mean`.
* *Of distributions*: `energy_distance`, `mmd`, `sliced_wasserstein` and `correlation_error` take ``weights``
  (``int [R b]``, how often each cell is in each replicate) and return ``float64 [R]``.

Scores of what is done with an answer (scFID, clusters, differential expression, a probe) are in
:mod:`~distdiff.downstream`.

Sums are accumulated in float64. The published evaluations (CountsDiff, scIDPMs) differ in details, noted in each
function.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
BoolArray = NDArray[np.bool_]

DEVIANCE_FLOOR = 1e-6
"""Smallest mean in `poisson_deviance`, in molecules; a smaller one counts as this."""

BANDWIDTHS = 5
"""Number of Gaussian bandwidths in `mmd`; each squared bandwidth is twice the one before."""


def bootstrap_weights(n_cells: int, replicates: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each cell is drawn when ``n_cells`` cells are drawn with replacement: ``int64 [R b]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import bootstrap_weights
    >>> weights = bootstrap_weights(5, 3, np.random.default_rng(0))
    >>> weights.shape, weights.sum(axis=1)
    ((3, 5), array([5, 5, 5]))
    """
    return rng.multinomial(n_cells, np.full(n_cells, 1.0 / n_cells), size=replicates)


def once(n_cells: int) -> NDArray[np.int64]:
    """The weights of the sample itself: ``int64 [1 b]`` of ones.

    Examples
    --------
    >>> from distdiff.metrics import once
    >>> once(4)
    array([[1, 1, 1, 1]])
    """
    return np.ones((1, n_cells), dtype=np.int64)


def pooled(sums: FloatArray, n: NDArray[np.integer], weights: NDArray[np.integer]) -> FloatArray:
    """Average over all targets of each replicate, ``sum_c w_c sums_c / sum_c w_c n_c``: ``float64 [R]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import once, pooled
    >>> pooled(np.array([6.0, 2.0]), np.array([3, 1]), once(2))  # 8 over 4 targets
    array([2.])
    """
    total = weights @ n.astype(np.float64)
    return np.divide(weights @ sums, total, out=np.full(len(weights), np.nan), where=total > 0)


def cell_mean(values: FloatArray, weights: NDArray[np.integer]) -> FloatArray:
    """Average over cells of each replicate, without cells whose value is NaN: ``float64 [R]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import cell_mean, once
    >>> cell_mean(np.array([0.5, np.nan, 0.7]), once(3))
    array([0.6])
    """
    known = ~np.isnan(values)
    return pooled(np.where(known, values, 0.0), known.astype(np.int64), weights)


def paired_gain(difference: FloatArray, weights: FloatArray) -> tuple[float, float, float]:
    """Mean of a paired difference over cells, and the interval that holds it in 95 % of resamples.

    Parameters
    ----------
    difference
        ``[b]`` of each cell.
    weights
        ``[R b]``, rows that sum to 1.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import bootstrap_weights, paired_gain
    >>> weights = bootstrap_weights(4, 200, np.random.default_rng(0)) / 4
    >>> paired_gain(np.array([1.0, 1.0, 1.0, 1.0]), weights)
    (1.0, 1.0, 1.0)
    """
    low, high = np.quantile(weights @ difference, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def _sum(entries: FloatArray, targets: BoolArray) -> FloatArray:
    return np.sum(entries, axis=1, where=targets, dtype=np.float64)


def poisson_deviance(
    truth: FloatArray, targets: BoolArray, mean: FloatArray, *, floor: float = DEVIANCE_FLOOR
) -> FloatArray:
    """Unit Poisson deviance ``2 (x log(x/m) - x + m)``, summed over each cell's targets.

    Proper for means: its expectation is least at ``m = E[x]``. Means below ``floor`` molecules count as ``floor``, so
    that a mean of zero has a large but finite deviance (about 25.6 for each molecule at the default 1e-6).

    Parameters
    ----------
    truth, mean
        ``float [b g]`` molecules.
    targets
        ``bool [b g]``.
    floor
        Smallest mean, in molecules.

    Returns
    -------
    numpy.ndarray
        ``float64 [b]`` sums; divide by the number of targets (`pooled`).

    Raises
    ------
    ValueError
        ``floor`` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import poisson_deviance
    >>> truth, targets = np.array([[0.0, 3.0]]), np.array([[True, True]])
    >>> [poisson_deviance(truth, targets, mean=truth + wrong).round(3) for wrong in (0, 1)]
    [array([0.]), array([2.274])]
    """
    if not floor > 0:
        raise ValueError(f"poisson_deviance: floor={floor} must be positive, for example {DEVIANCE_FLOOR}")
    x = truth[targets].astype(np.float64)
    m = np.maximum(mean[targets].astype(np.float64), floor)
    entries = np.zeros(targets.shape)
    entries[targets] = 2.0 * (np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0) / m), 0.0) - x + m)
    return _sum(entries, targets)


def error(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """Signed error ``answer - truth`` summed over each cell's targets (pooled: the bias): ``float64 [b]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import error
    >>> error(np.array([[0.0, 3.0]]), np.array([[True, True]]), np.array([[1.0, 3.5]]))
    array([1.5])
    """
    return _sum(answer.astype(np.float64) - truth, targets)


def absolute_error(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """``|answer - truth|`` summed over each cell's targets (pooled: the MAE): ``float64 [b]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import absolute_error
    >>> absolute_error(np.array([[0.0, 3.0]]), np.array([[True, True]]), np.array([[1.0, 2.5]]))
    array([1.5])
    """
    return _sum(np.abs(answer.astype(np.float64) - truth), targets)


def squared_error(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """``(answer - truth)^2`` summed over each cell's targets (square root of the pooled mean: the RMSE).

    CountsDiff's paper averages an RMSE a cell; its code, as here, pools all targets.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import squared_error
    >>> squared_error(np.array([[0.0, 3.0]]), np.array([[True, False]]), np.array([[2.0, 9.0]]))  # targets only
    array([4.])
    """
    return _sum((answer.astype(np.float64) - truth) ** 2, targets)


def log1p_squared_error(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """``(log1p(answer) - log1p(truth))^2`` summed over each cell's targets; answers below zero count as zero.

    Not proper for means: its optimum is ``exp(E[log1p x]) - 1``, below ``E[x]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import log1p_squared_error
    >>> log1p_squared_error(np.array([[0.0]]), np.array([[True]]), np.array([[np.e - 1]]))
    array([1.])
    """
    entries = (np.log1p(np.maximum(answer, 0.0).astype(np.float64)) - np.log1p(truth.astype(np.float64))) ** 2
    return _sum(entries, targets)


def crps(truth: FloatArray, targets: BoolArray, draws: FloatArray) -> FloatArray:
    """Continuous ranked probability score, fair ensemble estimate, summed over each cell's targets.

    ``mean_i |X_i - y| - sum_{i<j} |X_i - X_j| / (k (k-1))``, whose expectation over draws is the score of their law
    for every ``k >= 2`` (Ferro 2014). The pair sum comes from the sorted draws,
    ``sum_i (2i - k - 1) X_(i)``, in memory O(k b g). A point estimate, or a single draw, scores ``|x - y|``.

    Parameters
    ----------
    truth, targets
        ``[b g]``.
    draws
        ``float [k b g]``.

    Returns
    -------
    numpy.ndarray
        ``float64 [b]`` sums, in molecules.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import crps
    >>> truth, targets = np.array([[2.0]]), np.array([[True]])
    >>> draws = np.array([2.0, 2.0, 5.0]).reshape(3, 1, 1)
    >>> crps(truth, targets, draws), crps(truth, targets, draws[2:])  # three draws, and one
    (array([0.]), array([3.]))
    """
    if len(draws) == 1:
        return absolute_error(truth, targets, draws[0])
    k = len(draws)
    x = np.sort(draws[:, targets], axis=0)
    rank = 2.0 * np.arange(1, k + 1) - k - 1
    spread = np.tensordot(rank, x.astype(np.float64), axes=1) / (k * (k - 1))
    entries = np.zeros(targets.shape)
    entries[targets] = np.mean(np.abs(x.astype(np.float64) - truth[targets]), axis=0) - spread
    return _sum(entries, targets)


def ranks(values: FloatArray, mask: BoolArray) -> FloatArray:
    """Average ranks (from 1) within each row among the entries of ``mask``; zero elsewhere: ``float64 [b g]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import ranks
    >>> ranks(np.array([[5.0, 0.0, 0.0, 9.0]]), np.array([[True, True, True, False]]))
    array([[3. , 1.5, 1.5, 0. ]])
    """
    kept = np.where(mask, values, np.inf)
    order = np.argsort(kept, axis=1, kind="stable")
    ordered = np.take_along_axis(kept, order, axis=1)
    position = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    new = np.ones(values.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(new, position, 0), axis=1)
    end = np.ones(values.shape, dtype=bool)
    end[:, :-1] = new[:, 1:]
    last = np.minimum.accumulate(np.where(end, position, values.shape[1])[:, ::-1], axis=1)[:, ::-1]
    out = np.empty(values.shape)
    np.put_along_axis(out, order, (first + last) / 2.0 + 1.0, axis=1)
    return np.where(mask, out, 0.0)


def pearson(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """Pearson correlation of each cell over its targets; NaN where either side is constant: ``float64 [b]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import pearson
    >>> truth, targets = np.array([[0.0, 1.0, 2.0]]), np.ones((1, 3), dtype=bool)
    >>> pearson(truth, targets, 3 * truth + 1).round(6), pearson(truth, targets, np.ones((1, 3)))
    (array([1.]), array([nan]))
    """
    n = np.maximum(targets.sum(axis=1, keepdims=True), 1)

    def centred(a: FloatArray) -> FloatArray:
        a = np.where(targets, a, 0.0).astype(np.float64)
        return np.where(targets, a - a.sum(axis=1, keepdims=True) / n, 0.0)

    def size(a: FloatArray) -> FloatArray:
        low = np.min(a, axis=1, where=targets, initial=np.inf)
        varies = np.max(a, axis=1, where=targets, initial=-np.inf) > low
        return np.where(varies, np.sqrt(np.einsum("bg,bg->b", a, a)), 0.0)

    x, y = centred(truth), centred(answer)
    scale = size(x) * size(y)
    return np.divide(np.einsum("bg,bg->b", x, y), scale, out=np.full(len(x), np.nan), where=scale > 0)


def spearman(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """Spearman correlation of each cell over its targets, average ranks; NaN where either side is constant.

    With many zeros among the targets (ties) it rewards rounding, so it is not a main score. Returns ``float64 [b]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import spearman
    >>> truth, targets = np.array([[0.0, 1.0, 2.0]]), np.ones((1, 3), dtype=bool)
    >>> spearman(truth, targets, truth**5).round(6)  # the same order
    array([1.])
    """
    return pearson(ranks(truth, targets), targets, ranks(answer, targets))


def energy_distance(
    truth: FloatArray, targets: BoolArray, answer: FloatArray, weights: NDArray[np.integer]
) -> FloatArray:
    """Energy distance of the pooled targets in one dimension, ``sqrt(2 int (F - G)^2)``: ``float64 [R]``.

    Equal to ``scipy.stats.energy_distance(answer[targets], truth[targets])`` of each replicate, from one global sort.
    It ignores which value belongs to which entry: a good value is necessary, not sufficient.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import energy_distance, once
    >>> truth, targets = np.array([[0.0, 4.0]]), np.ones((1, 2), dtype=bool)
    >>> energy_distance(truth, targets, truth[:, ::-1], once(1))  # the same values, each on the other gene
    array([0.])
    """
    from scipy.sparse import csr_array

    cell = np.tile(np.nonzero(targets)[0].astype(np.int32), 2)
    pool = np.concatenate([truth[targets], answer[targets]])
    sign = np.repeat([1.0, -1.0], len(pool) // 2)
    order = np.argsort(pool)
    values = pool[order].astype(np.float64)
    starts = np.flatnonzero(np.diff(values, prepend=-np.inf))
    net = csr_array((sign[order], cell[order], np.append(starts, len(pool))), shape=(len(starts), len(truth)))
    step = np.diff(values[starts])
    total = weights @ targets.sum(axis=1).astype(np.float64)
    out = np.empty(len(weights))
    for start in range(0, len(weights), 8):
        part = slice(start, start + 8)
        gap = np.cumsum(net @ weights[part].T.astype(np.float64), axis=0)[:-1]
        out[part] = step @ np.square(gap, out=gap)
    return np.sqrt(2.0 * out) / np.where(total > 0, total, np.nan)


def _squared_distances(x: FloatArray, y: FloatArray) -> FloatArray:
    squares = np.einsum("bg,bg->b", x, x)[:, None] + np.einsum("bg,bg->b", y, y)[None, :]
    return np.maximum(squares - 2.0 * (x @ y.T), 0.0)


def mmd(truth: FloatArray, answer: FloatArray, weights: NDArray[np.integer], *, biased: bool = False) -> FloatArray:
    """Unbiased squared maximum mean discrepancy of completed cells: ``float64 [R]`` (it can be slightly negative).

    With ``h_ij = k(x_i,x_j) + k(y_i,y_j) - k(x_i,y_j) - k(x_j,y_i)`` (Gretton et al. 2012, eq. 3),
    ``MMD^2 = sum_{i != j} w_i w_j h_ij / ((sum w)^2 - sum w^2)``. Pairs of a cell with itself are excluded, so
    the estimate is unbiased although ``y_i`` shares its observed entries with ``x_i``, and copies of a cell in a
    bootstrap replicate add no bias. ``k`` is the mean of five Gaussians whose squared bandwidths are 1/4 ... 4 times
    the median squared distance between cells of the truth. CountsDiff's paper reports the log of such a five-scale
    estimate on raw counts; its code uses one bandwidth and divides by m^2.

    Parameters
    ----------
    truth, answer
        ``float [b g]`` completed cells on the scale of comparison (`distdiff.evaluation` gives log1p of counts).
    weights
        ``int [R b]``.
    biased
        Keep the pairs of a cell with itself, ``sum_ij w_i w_j h_ij / (sum w)^2``: never negative, so that it has a
        logarithm.

    Raises
    ------
    ValueError
        Fewer than two cells.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import mmd, once
    >>> cells = np.random.default_rng(0).normal(size=(50, 3))
    >>> bool(mmd(cells, cells + 2, once(50))[0] > 0.1)
    True
    """
    if len(truth) < 2:
        raise ValueError(f"mmd needs two cells or more, got {len(truth)}")
    x, y = truth.astype(np.float64), answer.astype(np.float64)
    xx = _squared_distances(x, x)
    off = xx[np.triu_indices(len(x), 1)]
    unit = float(np.median(off)) or float(off.mean()) or 1.0

    def kernel(d: FloatArray) -> FloatArray:
        k = np.exp(-d / (2.0 * 4.0 * unit))  # the widest kernel; squaring it halves the squared bandwidth
        total = k.copy()
        for _ in range(BANDWIDTHS - 1):
            k *= k
            total += k
        return total / BANDWIDTHS

    cross = kernel(_squared_distances(x, y))
    h = kernel(xx) + kernel(_squared_distances(y, y)) - cross - cross.T
    w = weights.astype(np.float64)
    pairs = w.sum(axis=1) ** 2
    if not biased:
        np.fill_diagonal(h, 0.0)
        pairs -= (w**2).sum(axis=1)
    return np.divide(((w @ h) * w).sum(axis=1), pairs, out=np.full(len(w), np.nan), where=pairs > 0)


def sliced_wasserstein(
    truth: FloatArray, answer: FloatArray, weights: NDArray[np.integer], directions: FloatArray
) -> FloatArray:
    """Sliced Wasserstein-2 distance of completed cells: root mean squared difference of sorted projections.

    Parameters
    ----------
    truth, answer
        ``float [b g]`` completed cells on the scale of comparison.
    weights
        ``int [R b]``, every row with the same sum, as in a resample.
    directions
        ``float [g d]`` unit columns (`unit_directions`); the same for every imputer.

    Returns
    -------
    numpy.ndarray
        ``float64 [R]``. The papers use 1000 directions (tables) or 500 (toy data) on raw counts.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import once, sliced_wasserstein
    >>> cells, directions = np.array([[0.0, 0.0], [1.0, 3.0]]), np.eye(2)
    >>> sliced_wasserstein(cells, cells + 1, once(2), directions)
    array([1.])
    """
    out = np.empty(len(weights))
    projected = [(a.astype(np.float64) @ directions).T for a in (truth, answer)]
    order = [np.argsort(p, axis=1) for p in projected]
    ordered = [np.take_along_axis(p, o, axis=1).ravel() for p, o in zip(projected, order, strict=True)]
    for r, w in enumerate(weights):
        x, y = (np.repeat(p, w[o].ravel()) for p, o in zip(ordered, order, strict=True))
        out[r] = np.sqrt(np.mean((x - y) ** 2))
    return out


def unit_directions(n_genes: int, n_directions: int, rng: np.random.Generator) -> FloatArray:
    """Random unit vectors in gene space: ``float64 [g d]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import unit_directions
    >>> np.linalg.norm(unit_directions(30, 2, np.random.default_rng(0)), axis=0).round(6)
    array([1., 1.])
    """
    v = rng.standard_normal((n_genes, n_directions))
    return v / np.linalg.norm(v, axis=0, keepdims=True)


def correlation_error(
    truth: FloatArray, answer: FloatArray, weights: NDArray[np.integer], *, top: int = 200
) -> FloatArray:
    """Mean absolute difference of the gene-gene Pearson correlations of two sets of completed cells: ``float64 [R]``.

    Over the ``top`` genes of largest mean in ``truth``, pairs of different genes; genes that are constant in either set
    of a replicate are excluded. ``truth`` and ``answer`` (``float [b g]``) are on the scale of comparison, log1p of
    counts in `distdiff.evaluation`. Not in the papers.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import correlation_error, once
    >>> together = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    >>> correlation_error(together, together[:, [0, 1]] * [1, -1], once(3)).round(6)  # from 1 to -1
    array([2.])
    """
    genes = np.argsort(-truth.mean(axis=0), kind="stable")[:top]
    x, y = truth[:, genes].astype(np.float64), answer[:, genes].astype(np.float64)
    out = np.empty(len(weights))
    for r, w in enumerate(weights):
        (c_x, v_x), (c_y, v_y) = _correlation(x, w), _correlation(y, w)
        varies = v_x & v_y
        pairs = np.triu(np.ones((len(genes), len(genes)), dtype=bool), 1) & varies[:, None] & varies[None, :]
        out[r] = np.abs(c_x - c_y)[pairs].mean() if pairs.any() else np.nan
    return out


def _correlation(a: FloatArray, w: NDArray[np.integer]) -> tuple[FloatArray, BoolArray]:
    used = a[w > 0]
    share = (w[w > 0] / w.sum())[:, None]
    centred = (used - (share * used).sum(axis=0)) * np.sqrt(share)
    size = np.sqrt(np.einsum("bg,bg->g", centred, centred))
    varies = used.max(axis=0) > used.min(axis=0)
    unit = centred / np.where(varies, size, 1.0)
    return unit.T @ unit, varies


def pit(truth: FloatArray, targets: BoolArray, draws: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Randomised probability integral transform of each target among its draws: ``float64 [n]`` in [0, 1].

    ``u = (#{X_i < y} + V (1 + #{X_i = y})) / (k + 1)`` with ``V`` uniform: exactly uniform, for any number of draws
    ``k`` and any ties, if truth and draws have the same law. Targets come in row-major order.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import pit
    >>> rng = np.random.default_rng(0)
    >>> draws, truth = rng.poisson(3.0, (20, 1, 5000)), rng.poisson(3.0, (1, 5000))  # one law
    >>> float(pit(truth, np.ones((1, 5000), dtype=bool), draws, rng).mean().round(1))
    0.5
    """
    x, y = draws[:, targets], truth[targets]
    below, ties = (x < y).sum(axis=0), (x == y).sum(axis=0)
    return (below + rng.random(len(y)) * (1 + ties)) / (len(draws) + 1)


def coverage(u: FloatArray, levels: FloatArray) -> FloatArray:
    """Share of targets inside their central interval of each nominal level: ``float64 [levels]``.

    From the randomised PIT, ``|u - 1/2| <= level / 2``, so a calibrated law covers exactly its nominal share (a closed
    interval between whole numbers would cover more).

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import coverage
    >>> coverage(np.linspace(0, 1, 1001), np.array([0.5, 0.9])).round(2)
    array([0.5, 0.9])
    """
    return (np.abs(u[None, :] - 0.5) <= np.asarray(levels)[:, None] / 2).mean(axis=1)


def negative_binomial_score(truth: FloatArray, targets: BoolArray, mean: FloatArray, size: FloatArray) -> FloatArray:
    """``-log NB(x; m, size)`` summed over each cell's targets, in nats: the log score of a row with such a law.

    Parameters
    ----------
    truth, mean
        ``float [b g]`` molecules; a mean below `DEVIANCE_FLOOR` counts as that.
    targets
        ``bool [b g]``.
    size
        ``float [g]`` or ``[b g]``, variance ``m + m^2 / size``.

    Returns
    -------
    numpy.ndarray
        ``float64 [b]`` sums.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import negative_binomial_score
    >>> one = np.ones((1, 1))
    >>> negative_binomial_score(0 * one, one > 0, one, size=one[0]).round(4)  # log 2: a geometric law
    array([0.6931])
    """
    from scipy.special import gammaln, xlogy

    x = truth[targets].astype(np.float64)
    m = np.maximum(mean[targets].astype(np.float64), DEVIANCE_FLOOR)
    r = np.broadcast_to(size, targets.shape)[targets].astype(np.float64)
    entries = np.zeros(targets.shape)
    entries[targets] = (
        gammaln(r) + gammaln(x + 1) - gammaln(x + r) + r * np.log1p(m / r) - xlogy(x, m) + xlogy(x, r + m)
    )
    return _sum(entries, targets)


def cell_rmse(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """RMSE of each cell (CountsDiff's paper averages it over cells), NaN without targets: ``float64 [b]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import cell_rmse
    >>> cell_rmse(np.array([[0.0, 3.0]]), np.array([[True, True]]), np.array([[1.0, 2.0]]))
    array([1.])
    """
    n = targets.sum(axis=1)
    sums = squared_error(truth, targets, answer)
    return np.sqrt(np.divide(sums, n, out=np.full(len(n), np.nan), where=n > 0))


def r2(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """``1 - SSE / SST`` of each cell, SST of the truth; NaN with fewer than two targets or equal ones: ``float64 [b]``.

    CountsDiff's code swaps the two, so that a constant answer is undefined.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import r2
    >>> r2(np.array([[0.0, 2.0]]), np.array([[True, True]]), np.array([[0.0, 1.0]]))
    array([0.5])
    """
    n = targets.sum(axis=1)
    x = truth.astype(np.float64)
    centre = np.divide(_sum(x, targets), n, out=np.zeros(len(n)), where=n > 0)
    total = _sum((x - centre[:, None]) ** 2, targets)
    ratio = np.divide(squared_error(truth, targets, answer), total, out=np.full(len(n), np.nan), where=total > 0)
    return 1.0 - ratio


def cosine(truth: FloatArray, targets: BoolArray, answer: FloatArray) -> FloatArray:
    """Cosine of truth and answer over each cell's targets, NaN where one is zero throughout: ``float64 [b]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.metrics import cosine
    >>> cosine(np.array([[0.0, 2.0]]), np.array([[True, True]]), np.array([[0.0, 1.0]]))
    array([1.])
    """
    x, y = truth.astype(np.float64), answer.astype(np.float64)
    length = np.sqrt(_sum(x * x, targets) * _sum(y * y, targets))
    return np.divide(_sum(x * y, targets), length, out=np.full(len(x), np.nan), where=length > 0)
