"""Ten negative-binomial dimensions: the toy of CountsDiff (arXiv 2604.03779, appendix D.1), whose moments are known.

A sample is a cell, a dimension a gene. What ties the dimensions together is the sample's size factor alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from anndata import AnnData

DIMENSIONS = 10
DEPTH = 0.6
"""Standard deviation of the log of a sample's size factor."""


def parameters() -> tuple[np.ndarray, np.ndarray]:
    """Mean at size factor 1, log-uniform [.05, 5], and dispersion, log-uniform [.05, .5]: ``float64 [10]`` each.

    The same for every sample, and in the paper's order: torch's seed 0, ten means, then ten dispersions. The exact
    variances of dimensions 0, 1 and 7 are then .79, 4.66 and 15.9; a sample of the paper has .78, 4.71 and 16.1.

    Examples
    --------
    >>> from distdiff.data.toy import parameters
    >>> mean, dispersion = parameters()
    >>> mean.round(2).tolist()
    [0.49, 1.72, 0.08, 0.09, 0.21, 0.93, 0.48, 3.1, 0.41, 0.92]
    """
    import torch

    u = torch.rand(2, DIMENSIONS, generator=torch.Generator().manual_seed(0)).double().numpy()
    return 0.05 * (5.0 / 0.05) ** u[0], 0.05 * (0.5 / 0.05) ** u[1]


def toy(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the toy data: ``int64 [n 10]`` counts.

    ``s ~ LogNormal(0, .6)`` a sample, ``x ~ Poisson(Gamma(theta, theta / (s mu)))`` a dimension, ``theta = 1/alpha``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.data.toy import toy
    >>> toy(3, np.random.default_rng(0)).shape
    (3, 10)
    """
    mu, alpha = parameters()
    mean = rng.lognormal(0.0, DEPTH, (n, 1)) * mu
    return rng.poisson(rng.gamma(1.0 / alpha, alpha * mean))


def exact_moments() -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each dimension of `toy`: ``float64 [10]`` each.

    With ``E[s^k] = exp(k^2 DEPTH^2 / 2)``: mean ``mu E[s]``, variance ``mu E[s] + mu^2 ((1 + alpha) E[s^2] - E[s]^2)``.

    Examples
    --------
    >>> from distdiff.data.toy import exact_moments
    >>> mean, variance = exact_moments()
    >>> variance[[0, 1, 7]].round(2).tolist()
    [0.79, 4.66, 15.94]
    """
    mu, alpha = parameters()
    first, second = np.exp(DEPTH**2 / 2), np.exp(2 * DEPTH**2)
    return mu * first, mu * first + mu**2 * ((1 + alpha) * second - first**2)


def samples(n: int, seed: int = 0) -> AnnData:
    """``n`` samples of `toy` as cells with genes ``dimension0`` ... ``dimension9``.

    Raises
    ------
    ValueError
        ``n`` below 1.

    Examples
    --------
    >>> from distdiff.data.toy import samples
    >>> samples(50).shape
    (50, 10)
    """
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    if n < 1:
        raise ValueError(f"toy: n={n} samples must be 1 or more")
    counts = toy(n, numpy_generator(seed, "toy", "samples"))
    obs = pd.DataFrame(index=[f"sample{i}" for i in range(n)])
    var = pd.DataFrame(index=[f"dimension{i}" for i in range(DIMENSIONS)])
    return ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
