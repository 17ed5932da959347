"""Negative binomial score tests of groups of cells, all genes at once, from sparse counts (docs/MATHS.md 14).

Nothing here is dense in cells and genes: what a gene's zeros add to a sum over cells depends on one number of the gene,
so it is tabulated once (`Sums`), and the rest is a sum over the counts that are not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar
from scipy.stats import norm, pearson3, t

FloatArray = NDArray[np.floating]

GENES = 1024
"""Genes whose counts are weighed at once."""

LEAST, MOST = 1e-6, 1e4
"""Dispersions below the first are taken for 0; none is above the second."""

HALVINGS = 22
"""Of the interval in which a dispersion lies, in logarithms: it is found to a part in 100,000."""

NODES = 192
"""Points of a table of sums over cells."""


class Sums:
    """``sum_c d_c / (1 + a d_c)^power`` over the cells of each group, as a function of ``a`` (docs/MATHS.md 14.1).

    Parameters
    ----------
    depth
        ``float64 [n]``, not negative; a cell of depth 0 adds nothing.
    group
        ``int [n]`` in ``0 <= group < k``.
    k
        Number of groups.
    power
        Of the denominator.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.scoretest import Sums
    >>> sums = Sums(np.array([1.0, 2.0, 4.0]), np.array([0, 0, 1]), 2)
    >>> sums(np.array([0.0, 0.5])).round(6)  # 1 + 2 and 1/1.5 + 2/2; 4 and 4/3
    array([[3.      , 1.666667],
           [4.      , 1.333333]])
    """

    def __init__(self, depth: FloatArray, group: np.ndarray, k: int, power: int = 1) -> None:
        self.whole = np.bincount(group, weights=depth, minlength=k)
        scale = depth[depth > 0].mean() if (depth > 0).any() else 1.0
        self._log_a = np.linspace(np.log(1e-7 / scale), np.log(1e8 / scale), NODES)
        sums = [np.bincount(group, weights=depth / (1 + a * depth) ** power, minlength=k) for a in np.exp(self._log_a)]
        self._spline = CubicSpline(self._log_a, np.log(np.maximum(sums, 1e-300)))

    def __call__(self, a: FloatArray) -> FloatArray:
        """``float64 [k g]`` for ``a [g]``."""
        log_a = np.log(np.maximum(a, 1e-300))
        found = np.exp(self._spline(np.minimum(log_a, self._log_a[-1]))).T
        return np.where(log_a < self._log_a[0], self.whole[:, None], found)


@dataclass(frozen=True)
class Null:
    """What every gene would follow if no group differed.

    Attributes
    ----------
    mean
        ``float64 [g]`` molecules of a cell of depth 1.
    dispersion
        ``float64 [g]``: the variance of a count of mean ``mu`` is ``mu + dispersion mu^2``.
    """

    mean: FloatArray
    dispersion: FloatArray


@dataclass(frozen=True)
class Tested:
    """A test of every gene; all ``float64 [g]``.

    Attributes
    ----------
    z
        Standardised score, positive where the group is above the others.
    p
        Two-sided p-value; 1 where the gene has no count.
    ratio, error
        Natural logarithm of the ratio of rates, and its standard error.
    """

    z: FloatArray
    p: FloatArray
    ratio: FloatArray
    error: FloatArray


def fit_null(counts: sparse.csc_matrix, depth: FloatArray) -> Null:
    """Mean and dispersion of every gene over all cells (docs/MATHS.md 14.1, 14.2).

    Parameters
    ----------
    counts
        ``[n g]`` molecules.
    depth
        ``float64 [n]``.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> from distdiff.scoretest import fit_null
    >>> rng = np.random.default_rng(0)
    >>> rate = rng.gamma(2.0, 0.5, (40_000, 2))  # dispersion 1/2
    >>> null = fit_null(sp.csc_matrix(rng.poisson(3.0 * rate)), np.ones(40_000))
    >>> null.mean.round(1), null.dispersion.round(1)
    (array([3., 3.]), array([0.5, 0.5]))
    """
    depth = np.asarray(depth, dtype=np.float64)
    all_cells = Sums(depth, np.zeros(len(depth), dtype=np.int64), 1)
    free = max(int((depth > 0).sum()) - 1, 1)
    mean, dispersion = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for start in range(0, counts.shape[1], GENES):
        part = counts[:, start : start + GENES]
        m, phi = _fit(part, depth, all_cells, free)
        mean[start : start + GENES], dispersion[start : start + GENES] = m, phi
    return Null(mean, dispersion)


def _fit(part: sparse.csc_matrix, depth: FloatArray, sums: Sums, free: int) -> tuple[FloatArray, FloatArray]:
    g, x = part.shape[1], part.data.astype(np.float64)
    column = np.repeat(np.arange(g), np.diff(part.indptr))
    d = depth[part.indices]
    mean = np.bincount(column, weights=x, minlength=g) / sums.whole[0]
    phi = np.zeros(g)
    for _ in range(2):
        mu = mean[column] * d
        excess = x * (x - 2 * mu) / mu

        def spread(
            phi: FloatArray, mean: FloatArray = mean, mu: FloatArray = mu, excess: FloatArray = excess
        ) -> FloatArray:
            """Sum of squared residuals over their variances: what ``free`` is the expectation of."""
            with_counts = np.bincount(column, weights=excess / (1 + phi[column] * mu), minlength=g)
            return with_counts + mean * sums(phi * mean)[0]

        low, high = np.full(g, np.log(LEAST)), np.full(g, np.log(MOST))
        flat = spread(np.zeros(g)) <= free
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = spread(np.exp(middle)) > free
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        phi = np.where(flat, 0.0, np.exp((low + high) / 2))
        for _ in range(3):
            a = phi * mean
            mean = np.bincount(column, weights=x / (1 + a[column] * d), minlength=g) / sums(a)[0]
    return mean, phi


def score_tests(counts: sparse.csc_matrix, depth: FloatArray, group: np.ndarray, k: int, null: Null) -> list[Tested]:
    """Test each group of cells against all the others (docs/MATHS.md 14.1, 14.3).

    Parameters
    ----------
    counts
        ``[n g]`` molecules.
    depth
        ``float64 [n]``.
    group
        ``int [n]`` in ``0 <= group < k``.
    null
        Of the same cells (`fit_null`).

    Returns
    -------
    list of Tested
        One a group.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sp
    >>> from distdiff.scoretest import fit_null, score_tests
    >>> rng = np.random.default_rng(0)
    >>> group, depth = np.repeat([0, 1], 500), np.ones(1000)
    >>> counts = sp.csc_matrix(rng.poisson(np.array([[1.0, 2.0], [1.0, 1.0]])[group]))
    >>> first, second = score_tests(counts, depth, group, 2, fit_null(counts, depth))
    >>> first.p[0] > 0.05, first.p[1] < 1e-6, np.exp(first.ratio[1]).round(1)
    (np.True_, np.True_, np.float64(2.0))
    """
    weights, thirds = Sums(depth, group, k), Sums(depth, group, k, power=2)
    a = null.dispersion * null.mean
    weighed, plain = np.zeros((k, counts.shape[1])), np.zeros((k, counts.shape[1]))
    for start in range(0, counts.shape[1], GENES):
        part = counts[:, start : start + GENES]
        g = part.shape[1]
        column = np.repeat(np.arange(g), np.diff(part.indptr))
        at = group[part.indices] * g + column
        x = part.data.astype(np.float64)
        weight = x / (1 + a[start + column] * depth[part.indices])
        weighed[:, start : start + g] = np.bincount(at, weights=weight, minlength=k * g).reshape(k, g)
        plain[:, start : start + g] = np.bincount(at, weights=x, minlength=k * g).reshape(k, g)
    information = null.mean * weights(a)
    third = 2 * information - null.mean * thirds(a)
    free = max(int((depth > 0).sum()) - 2, 1)
    return [_tested(weighed, plain, weights, information, third, null, j, free) for j in range(k)]


def _tested(
    weighed: FloatArray, plain: FloatArray, weights: Sums, information: FloatArray, third: FloatArray, null: Null,
    j: int, free: int,
) -> Tested:  # fmt: skip
    own, rest = information[j], information.sum(0) - information[j]
    share = own / np.maximum(own + rest, 1e-300)
    variance = own * (1 - share)
    u = weighed[j] - own
    third_moment = (1 - share) ** 3 * third[j] - share**3 * (third.sum(0) - third[j])
    some = variance > 0
    safe = np.where(some, variance, 1.0)
    z = np.where(some, u / np.sqrt(safe), 0.0)
    p = np.where(some, p_value(z, np.where(some, third_moment / safe**1.5, 0.0), free), 1.0)
    ratio, error = _ratio(plain[j], plain.sum(0) - plain[j], weights, null, j)
    return Tested(z, p, ratio, error)


def p_value(z: FloatArray, skew: FloatArray, free: int) -> FloatArray:
    """Two-sided p-value of a standardised score with a skewness (docs/MATHS.md 14.3).

    Parameters
    ----------
    z, skew
        ``float64 [g]``.
    free
        Degrees of freedom of the variance.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.scoretest import p_value
    >>> p_value(np.array([1.96, 1.96, -1.96]), np.array([0.0, 1.0, 1.0]), 10**6).round(3)
    array([0.05 , 0.089, 0.019])
    """
    above = z >= 0
    skew = np.where(z * skew < 0, np.clip(skew, -1 / np.maximum(np.abs(z), 1), 1 / np.maximum(np.abs(z), 1)), skew)
    with np.errstate(all="ignore"):
        tail = np.where(above, pearson3.sf(z, skew), pearson3.cdf(z, skew))
    normal = norm.isf(np.clip(tail, 1e-300, 0.5))
    normal = np.where(tail <= 1e-300, np.maximum(np.abs(z), normal), normal)
    return np.minimum(2 * t.sf(normal, free), 1.0)


def _ratio(
    own: FloatArray, rest: FloatArray, weights: Sums, null: Null, j: int
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """Log ratio of molecules to depth, half a molecule added to both, and its error from the two groups' means."""
    depth_own, depth_rest = weights.whole[j], weights.whole.sum() - weights.whole[j]
    ratio = np.log((own + 0.5) / depth_own) - np.log((rest + 0.5) / depth_rest)
    variance = np.zeros_like(ratio)
    for molecules, depth, mine in ((own, depth_own, True), (rest, depth_rest, False)):
        mean = (molecules + 0.5) / depth
        sums = weights(null.dispersion * mean)
        information = mean * (sums[j] if mine else sums.sum(0) - sums[j])
        variance += 1 / np.maximum(information, 1e-300)
    return ratio, np.sqrt(variance)


def shrink(ratio: FloatArray, error: FloatArray) -> tuple[FloatArray, float]:
    """Log ratios drawn towards 0 by a normal prior whose width is that of all genes (docs/MATHS.md 14.4).

    Parameters
    ----------
    ratio, error
        ``float64 [g]``; genes whose error is not finite do not take part in the width.

    Returns
    -------
    ratio : float64 [g]
        Posterior means.
    width : float
        Standard deviation of the prior.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.scoretest import shrink
    >>> rng = np.random.default_rng(0)
    >>> truth, error = rng.normal(0, 0.5, 2000), np.full(2000, 0.5)
    >>> found, width = shrink(truth + error * rng.normal(size=2000), error)
    >>> round(width, 1), (found / (truth + 1e-9)).shape
    (0.5, (2000,))
    """
    use = np.isfinite(ratio) & np.isfinite(error)
    if not use.any():
        return ratio, 0.0
    b, v = ratio[use], error[use] ** 2

    def cost(log_width: float) -> float:
        total = v + np.exp(2 * log_width)
        return float(np.sum(np.log(total) + b**2 / total))

    width = float(np.exp(minimize_scalar(cost, bounds=(-8.0, 3.0), method="bounded").x))
    return ratio * width**2 / (width**2 + error**2), width


def rubin(ratios: FloatArray, errors: FloatArray) -> Tested:
    """One answer of several draws, by Rubin's rules (docs/MATHS.md 14.5).

    Parameters
    ----------
    ratios, errors
        ``float64 [k g]``, of each draw.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.scoretest import rubin
    >>> rng = np.random.default_rng(0)
    >>> one = rubin(1.0 + rng.normal(0, 0.5, (10, 1)), np.full((10, 1), 0.1))  # draws that do not agree
    >>> one.p[0] > rubin(np.ones((10, 1)), np.full((10, 1), 0.1)).p[0]
    np.True_
    """
    k = len(ratios)
    ratio, within = ratios.mean(0), (errors**2).mean(0)
    between = (1 + 1 / k) * ratios.var(0, ddof=1)
    error = np.sqrt(within + between)
    with np.errstate(divide="ignore"):
        free = (k - 1) * (1 + within / between) ** 2
    z = ratio / error
    return Tested(z, 2 * t.sf(np.abs(z), np.where(np.isfinite(free), free, 1e12)), ratio, error)
