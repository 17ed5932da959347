"""Splat: simulated counts whose truth before dropout is known (Zappia, Phipson & Oshlack 2017; docs/MATHS.md 11).

Written from the paper's equations; parameters and defaults are those that the Splatter package documents. Two choices
differ from Splatter: groups are of equal size (Splatter draws each cell's group), and a differential factor is
``exp(+-|z|)`` with ``z`` normal, so that ``de_down`` is the share of differential genes that are below the base level.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import expit

from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from anndata import AnnData

SMALLEST, LARGEST = 1e-12, 2.0**24  # floor of means: no gene is impossible; float32 is exact up to 2^24


class Published(NamedTuple):
    """One published set: its midpoint in `splat`, and its reported dropout and zero rates (see `rates`).

    Examples
    --------
    >>> from distdiff.data.splat import SETS
    >>> SETS["splat30"]
    Published(mid=1.46, dropout=0.3, zeros=0.55)
    """

    mid: float
    dropout: float
    zeros: float


SETS_LIBRARY_LOC = 9.95
"""Location of the library size in `SETS`, log molecules. Splatter's 11 leaves .13 zeros before dropout; the published
zero rate less dropout rate is .23 to .26 (mean .247) in the six sets, and 9.95 gives .247 on average over seeds."""

SETS = {
    "splat55": Published(3.37, 0.55, 0.78),
    "splat47": Published(2.70, 0.47, 0.71),
    "splat38": Published(2.04, 0.38, 0.63),
    "splat30": Published(1.46, 0.30, 0.55),
    "splat23": Published(0.92, 0.23, 0.48),
    "splat16": Published(0.28, 0.16, 0.42),
}
"""Six sets of 500 cells, 1000 genes and four groups, named by dropout rate in per cent (docs/MATHS.md 11). Mean dropout
rate over twelve seeds: as published within .001, zero rate within .02 (seed 0: within .007 and .021)."""


def gene_means(
    genes: int, shape: float, rate: float, prob: float, loc: float, scale: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``mean ~ Gamma(shape, rate)``, of outliers ``median(mean) LogNormal(loc, scale)`` (docs/MATHS.md 11.1).

    Relative means ``float64 [g]``, and which genes are outliers ``bool [g]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.splat import gene_means
    >>> mean, outlier = gene_means(1000, 0.6, 0.3, prob=0.05, loc=4.0, scale=0.5, rng=np.random.default_rng(0))
    >>> bool(mean[outlier].mean() > 10 * mean[~outlier].mean())
    True
    """
    mean = np.maximum(rng.gamma(shape, 1.0 / rate, genes), SMALLEST)
    outlier = rng.random(genes) < prob
    return np.where(outlier, np.median(mean) * rng.lognormal(loc, scale, genes), mean), outlier


def de_factors(
    genes: int, groups: int, prob: float, down: float, loc: float, scale: float, rng: np.random.Generator
) -> np.ndarray:
    """Factor ``exp(+-|z|)`` of a gene in a group, else 1 (docs/MATHS.md 11.2): ``float64 [g groups]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.splat import de_factors
    >>> factors = de_factors(1000, 4, prob=0.1, down=0.5, loc=0.1, scale=0.4, rng=np.random.default_rng(0))
    >>> factors.shape, float((factors != 1).mean().round(1))
    ((1000, 4), 0.1)
    """
    size = np.abs(rng.normal(loc, scale, (genes, groups)))
    sign = np.where(rng.random((genes, groups)) < down, -1.0, 1.0)
    return np.exp(np.where(rng.random((genes, groups)) < prob, sign * size, 0.0))


def expected(mean: np.ndarray, factors: np.ndarray, group: np.ndarray, library: np.ndarray) -> np.ndarray:
    """``L_c mu_g F_gk / sum_h mu_h F_hk``, k the cell's group (docs/MATHS.md 11.2): molecules, ``float64 [n g]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.splat import expected
    >>> mean, factors = np.array([1.0, 3.0]), np.ones((2, 1))
    >>> expected(mean, factors, group=np.array([0, 0]), library=np.array([100.0, 200.0]))
    array([[ 25.,  75.],
           [ 50., 150.]])
    """
    level = mean[:, None] * factors
    return library[:, None] * (level / level.sum(axis=0)).T[group]


def biological(mean: np.ndarray, common: float, df: float, rng: np.random.Generator) -> np.ndarray:
    """Molecules expected of each entry after biological variation (docs/MATHS.md 11.3): ``float64 [n g]``.

    Gamma of mean ``m``, coefficient of variation ``(common + 1/sqrt(m)) sqrt(df / chi2_df)``; one chi-squared a gene.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.splat import biological
    >>> level = biological(np.full((20_000, 1), 5.0), common=0.1, df=np.inf, rng=np.random.default_rng(0))
    >>> float(level.mean().round(1))
    5.0
    """
    scatter = df / rng.chisquare(df, mean.shape[1]) if np.isfinite(df) else 1.0
    square = (common + 1.0 / np.sqrt(mean)) ** 2 * scatter
    return rng.gamma(1.0 / square, mean * square)


def dropout_probability(mean: np.ndarray, shape: float, mid: float) -> np.ndarray:
    """Probability that an entry is zeroed, ``1 / (1 + exp(-shape (log mean - mid)))`` (docs/MATHS.md 11.5).

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.splat import dropout_probability
    >>> dropout_probability(np.exp([-1.0, 0.0, 1.0]), shape=-1.0, mid=0.0).round(2)  # small means drop out most
    array([0.73, 0.5 , 0.27])
    """
    return expit(shape * (np.log(np.maximum(mean, np.finfo(float).tiny)) - mid))


def splat(
    cells: int = 500,
    genes: int = 1000,
    groups: int = 4,
    *,
    mid: float = 0.0,
    shape: float = -1.0,
    mean_shape: float = 0.6,
    mean_rate: float = 0.3,
    outlier_prob: float = 0.05,
    outlier_loc: float = 4.0,
    outlier_scale: float = 0.5,
    library_loc: float = 11.0,
    library_scale: float = 0.2,
    de_prob: float = 0.1,
    de_down: float = 0.5,
    de_loc: float = 0.1,
    de_scale: float = 0.4,
    bcv: float = 0.1,
    bcv_df: float = 60.0,
    seed: int = 0,
) -> AnnData:
    """Simulate counts with groups of cells, with and without dropout (docs/MATHS.md 11.1-11.5).

    Sets that differ only in ``mid`` have the same true counts, and a higher ``mid`` drops all that a lower one drops.

    Parameters
    ----------
    cells, genes, groups
        Sizes; groups are equal up to one cell, in random order.
    mid, shape
        Midpoint (log molecules) and slope of the dropout logistic (docs/MATHS.md 11.5); ``mid=-inf`` is Splatter's
        default, none.
    mean_shape, mean_rate, outlier_prob, outlier_loc, outlier_scale
        Gene means: gamma, and log-normal outliers (docs/MATHS.md 11.1).
    library_loc, library_scale
        Expected library size, log-normal, log molecules (docs/MATHS.md 11.2).
    de_prob, de_down, de_loc, de_scale
        Share of genes differential in each group, share of these that are lower, log-normal size (docs/MATHS.md 11.2).
    bcv, bcv_df
        Common biological coefficient of variation, and degrees of freedom of its scatter (docs/MATHS.md 11.3); ``inf``:
        no scatter.
    seed
        Seed of all noise.

    Returns
    -------
    anndata.AnnData
        ``X`` observed and ``layers['true']`` counts before dropout (CSR float32, whole numbers), ``obs['group']``,
        ``obs['expected_library']`` (molecules), ``var['mean']`` (relative), ``var['outlier']``, ``varm['de_factor']``
        ``[g groups]`` and ``uns['splat']`` (all parameters).

    Raises
    ------
    ValueError
        A parameter out of its range, or an expected count above 2^24.

    Examples
    --------
    >>> from distdiff.data.splat import splat
    >>> data = splat(cells=20, genes=30, groups=2, library_loc=6.0)
    >>> data.shape, bool((data.layers["true"] - data.X).min() >= 0)  # dropout only removes molecules
    ((20, 30), True)
    """
    parameters = dict(locals())
    _check(parameters)
    import pandas as pd
    from anndata import AnnData

    rng = partial(numpy_generator, seed, "splat")
    mean, outlier = gene_means(genes, mean_shape, mean_rate, outlier_prob, outlier_loc, outlier_scale, rng("means"))
    factors = de_factors(genes, groups, de_prob, de_down, de_loc, de_scale, rng("factors"))
    group = rng("groups").permutation(np.arange(cells) % groups)
    library = rng("library").lognormal(library_loc, library_scale, cells)
    with np.errstate(all="ignore"):
        base = expected(mean, factors, group, library)
    if not base.max() < LARGEST:
        raise ValueError(f"splat: an expected count of {base.max():.3g} is above 2^24; lower library_loc or a scale")
    level = biological(np.maximum(base, SMALLEST), bcv, bcv_df, rng("biology"))
    true = rng("counts").poisson(level).astype(np.float32)  # docs/MATHS.md 11.4
    kept = rng("dropout").random(level.shape) >= dropout_probability(level, shape, mid)
    labels = pd.Categorical.from_codes(group, [f"Group{i + 1}" for i in range(groups)])
    obs = pd.DataFrame({"group": labels, "expected_library": library})
    var = pd.DataFrame({"mean": mean, "outlier": outlier})
    obs.index, var.index = [f"Cell{i + 1}" for i in range(cells)], [f"Gene{i + 1}" for i in range(genes)]
    seen, layers = sparse.csr_matrix(np.where(kept, true, np.float32(0))), {"true": sparse.csr_matrix(true)}
    return AnnData(seen, obs, var, uns={"splat": parameters}, varm={"de_factor": factors}, layers=layers)


def published(name: str, seed: int = 0) -> AnnData:
    """One of `SETS` by name; with the same seed all six have the same true counts. ValueError for another name.

    Examples
    --------
    >>> from distdiff.data.splat import published
    >>> published("splat99")
    Traceback (most recent call last):
        ...
    ValueError: splat: no set is called 'splat99'; choose one of splat55, splat47, splat38, splat30, ...
    """
    if name not in SETS:
        raise ValueError(f"splat: no set is called {name!r}; choose one of {', '.join(SETS)}")
    return splat(mid=SETS[name].mid, library_loc=SETS_LIBRARY_LOC, seed=seed)


def rates(data: AnnData) -> tuple[float, float]:
    """Share of all entries that dropout turned to zero, and of zeros, in a set made by `splat`.

    This definition fits the published rates: as ``mid`` changes, their difference (zeros before dropout) is constant.

    Examples
    --------
    >>> from distdiff.data.splat import rates, splat
    >>> dropout, zeros = rates(splat(cells=20, genes=30, groups=2, library_loc=6.0))
    >>> bool(0 < dropout < zeros < 1)
    True
    """
    size, true, seen = data.n_obs * data.n_vars, data.layers["true"].count_nonzero(), data.X.count_nonzero()
    return (true - seen) / size, 1.0 - seen / size


def _check(given: dict[str, float]) -> None:
    for name, value in given.items():
        if name in ("cells", "genes", "groups"):
            most = given["cells"] if name == "groups" else np.inf
            good, want = isinstance(value, int | np.integer) and 1 <= value <= most, f"a whole number, 1 to {most}"
        elif name in ("outlier_prob", "de_prob", "de_down"):
            good, want = 0 <= value <= 1, "a share in [0, 1]"
        elif name in ("mean_shape", "mean_rate", "bcv_df"):
            good, want = 0 < value < np.inf or (name, value) == ("bcv_df", np.inf), "positive"
        elif name.endswith("_scale") or name == "bcv":
            good, want = 0 <= value < np.inf, "finite, 0 or more"
        elif name == "shape":
            good, want = -np.inf < value < 0, "finite and negative, so that small means are dropped"
        else:
            good, want = np.isfinite(value) or (name, value) == ("mid", -np.inf), "finite (mid=-inf: no dropout)"
        if not good:
            raise ValueError(f"splat: {name}={value} must be {want}")
