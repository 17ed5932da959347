"""Scores of what is done with imputed or denoised cells: embeddings, clusters, tests, a probe of types.

And the two scores of the denoising board of Open Problems. Scores of entries are in :mod:`~distdiff.metrics`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distdiff.metrics import BoolArray, FloatArray


def log_cp10k(counts: FloatArray, dtype: type[np.floating] = np.float32) -> FloatArray:
    """``log(1 + 10,000 x / depth)``, ``[n g]`` of type ``dtype``; a cell without molecules stays zero.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import log_cp10k
    >>> log_cp10k(np.array([[0.0, 0.0], [1.0, 1.0]])).round(1)
    array([[0. , 0. ],
           [8.5, 8.5]], dtype=float32)
    """
    depth = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.log1p(1e4 * counts / np.where(depth > 0, depth, 1.0)).astype(dtype)


def frechet(truth: FloatArray, answer: FloatArray) -> float:
    """Fréchet distance between normal laws of two sets of embedded cells (scFID, with the encoder of your choice).

    ``|mu - nu|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2)``; its logarithm is what CountsDiff's tables hold.

    Parameters
    ----------
    truth, answer
        ``float [n d]`` and ``[m d]`` embeddings of true and of imputed cells.

    Raises
    ------
    ValueError
        Fewer than two cells, or different numbers of dimensions.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import frechet
    >>> cells = np.random.default_rng(0).normal(size=(500, 3))
    >>> round(frechet(cells, cells + 2.0), 6)  # a shift by 2 in 3 dimensions
    12.0
    """
    if min(len(truth), len(answer)) < 2 or truth.shape[1] != answer.shape[1]:
        raise ValueError(
            f"frechet: embeddings {truth.shape} and {answer.shape}: two cells or more in the same dimensions are wanted"
        )
    x, y = truth.astype(np.float64), answer.astype(np.float64)
    s, t = (np.atleast_2d(np.cov(a, rowvar=False)) for a in (x, y))
    value, vector = np.linalg.eigh(s)
    root = (vector * np.sqrt(np.maximum(value, 0.0))) @ vector.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ t @ root), 0.0)).sum()
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s) + np.trace(t) - 2.0 * shared)


def clustering(labels: NDArray[np.integer], clusters: NDArray[np.integer]) -> dict[str, float]:
    """How well clusters agree with labels: ``ari``, ``nmi``, ``purity`` and ``f`` (of pairs of cells), as in scIDPMs.

    ``purity`` is the share of cells that have the commonest label of their cluster; ``f`` the harmonic mean of
    precision and recall of pairs in one cluster as pairs of one label.

    Raises
    ------
    ValueError
        Not one cluster for each label, or no cells.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import clustering
    >>> clustering(np.array([0, 0, 1, 1]), np.array([5, 5, 3, 3]))
    {'ari': 1.0, 'nmi': 1.0, 'purity': 1.0, 'f': 1.0}
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    if len(labels) == 0 or len(labels) != len(clusters):
        raise ValueError(f"clustering: {len(labels)} labels and {len(clusters)} clusters; one of each a cell is wanted")
    table = contingency_matrix(labels, clusters).astype(np.float64)

    def pairs(n: FloatArray) -> float:
        return float((n * (n - 1)).sum() / 2)

    both, in_cluster, in_label = pairs(table), pairs(table.sum(0)), pairs(table.sum(1))
    return {
        "ari": float(adjusted_rand_score(labels, clusters)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "purity": float(table.max(axis=0).sum() / table.sum()),
        "f": 2 * both / (in_cluster + in_label) if in_cluster + in_label else 1.0,
    }


def differential(values: FloatArray, inside: BoolArray) -> FloatArray:
    """Wilcoxon rank-sum test of each gene between the cells ``inside`` and the others, Benjamini-Hochberg adjusted.

    Tests on imputed values find differences that the imputation made; compare with those on the true counts.

    Parameters
    ----------
    values
        ``float [b g]``, such as log counts.
    inside
        ``bool [b]``.

    Returns
    -------
    numpy.ndarray
        ``float64 [g]`` adjusted p-values, 1 for a gene that is the same in all cells.

    Raises
    ------
    ValueError
        A side with fewer than two cells.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import differential
    >>> values = np.random.default_rng(0).normal(size=(60, 2))
    >>> values[:30, 1] += 3.0
    >>> differential(values, inside=np.arange(60) < 30) < 0.05
    array([False,  True])
    """
    sides = int(inside.sum()), int((~inside).sum())
    if min(sides) < 2:
        raise ValueError(f"differential: {sides[0]} cells against {sides[1]}; two or more on each side are wanted")
    return _adjusted(values, inside[None])[0]


def _adjusted(values: FloatArray, groups: BoolArray) -> NDArray[np.float64]:
    """Adjusted p-values of each group of cells (``bool [k b]``) against the others, from one ranking: ``[k g]``.

    Normal approximation with ties and continuity, as `scipy.stats.mannwhitneyu`.
    """
    from scipy.stats import false_discovery_control, norm, rankdata

    n, ranks = len(values), rankdata(values, axis=0)
    ties = 2.0 * n * (n + 1) * (2 * n + 1) - 12.0 * np.einsum("bg,bg->g", ranks, ranks)  # sum of t^3 - t
    one = groups.sum(1, dtype=np.float64)[:, None]
    pairs = one * (n - one)
    u = groups.astype(np.float64) @ ranks - one * (one + 1) / 2
    spread = np.sqrt(pairs / 12 * np.maximum(n + 1 - ties / (n * (n - 1)), 0))
    excess, varies = np.abs(u - pairs / 2) - 0.5, np.ptp(values, axis=0) > 0
    z = np.divide(excess, spread, out=np.zeros_like(excess), where=varies & (spread > 0))
    return false_discovery_control(np.where(varies, np.minimum(2 * norm.sf(z), 1.0), 1.0), axis=1)


def recovered(
    truth: FloatArray, answer: FloatArray, types: NDArray[np.integer], *, level: float = 0.05
) -> dict[str, NDArray[np.float64]]:
    """Which genes that tell a type from the other cells are still found in imputed cells: a number for each type.

    Genes with an adjusted Wilcoxon p-value (:func:`differential`) below ``level`` in the true cells are to be found.
    ``recall`` is the share of them found in the imputed cells; ``false`` the share of those found that are not among
    them (0 where none is found). Types with fewer than two cells, or without such a gene, are left out.

    Parameters
    ----------
    truth, answer
        ``[b g]`` true and imputed values, such as log counts.
    types
        ``int [b]``; -1 is no type (such a cell is among the others).
    level
        Of the tests.

    Returns
    -------
    dict
        ``recall`` and ``false``, each ``float64 [types left]``.

    Raises
    ------
    ValueError
        No type is left.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import recovered
    >>> cells, types = np.random.default_rng(0).normal(size=(60, 2)), np.repeat([0, 1], 30)
    >>> cells[:30, 1] += 3.0
    >>> recovered(cells, cells[:, ::-1], types)  # the other gene instead
    {'recall': array([0., 0.]), 'false': array([1., 1.])}
    """
    known, size = np.unique(types[types >= 0], return_counts=True)
    known = known[(size >= 2) & (len(types) - size >= 2)]
    if not len(known):
        raise ValueError("differential expression needs a type with two cells or more, and two cells of other types")
    groups = types[None] == known[:, None]
    wanted, found = (_adjusted(values, groups) < level for values in (truth, answer))
    some = wanted.any(1)
    if not some.any():
        raise ValueError(f"no gene tells a type from the other cells at level {level} in {len(types)} true cells")
    both, true, all_found = (a[some].sum(1).astype(np.float64) for a in (wanted & found, wanted, found))
    return {"recall": both / true, "false": (all_found - both) / np.maximum(all_found, 1)}


def probe(
    train: FloatArray, train_labels: NDArray[np.integer], cells: FloatArray, *, seed: int = 0
) -> NDArray[np.integer]:
    """Types of cells as XGBoost tells them (100 trees of depth 6), trained on true training cells: ``int [b]``.

    Parameters
    ----------
    train, train_labels
        ``[n g]`` true values and ``int [n]`` types of training cells.
    cells
        ``[b g]`` imputed values of other cells.
    seed
        Of XGBoost.

    Raises
    ------
    ImportError
        XGBoost is not installed.
    ValueError
        Training cells of fewer than two types, or no cells.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import probe
    >>> probe(np.zeros((3, 2)), np.zeros(3, int), np.zeros((1, 2)))
    Traceback (most recent call last):
        ...
    ValueError: probe: training cells of 1 type(s); two or more are wanted, and cells to tell (1 given)
    """
    known, codes = np.unique(train_labels, return_inverse=True)
    if len(known) < 2 or len(cells) == 0:
        raise ValueError(
            f"probe: training cells of {len(known)} type(s); two or more are wanted, and cells to tell ({len(cells)} "
            "given)"
        )
    try:
        from xgboost import XGBClassifier
    except ImportError as error:
        raise ImportError("the cell-type probe needs XGBoost: pip install xgboost") from error
    model = XGBClassifier(n_estimators=100, max_depth=6, random_state=seed, n_jobs=1)
    return known[model.fit(train, codes).predict(cells)]


def agreement(labels: NDArray[np.integer], answer: NDArray[np.integer]) -> dict[str, float]:
    """``accuracy`` and macro ``f1`` of the types that a :func:`probe` tells.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import agreement
    >>> agreement(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]))["accuracy"]
    0.75
    """
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, answer)), "f1": float(f1_score(labels, answer, average="macro")),
    }  # fmt: skip


def open_problems(held: FloatArray, answer: FloatArray) -> dict[str, float]:
    """The two denoising scores of Open Problems, and the second with its arguments the right way round.

    ``mse``: of ``log(1 + CP10k)`` of both. ``poisson``: mean of ``x - y log(x + 1e-6)`` as they compute it, with the
    held-out molecules ``x`` in the place of the prediction; ``poisson_right``: of ``y - x log(y + 1e-6)``, whose
    optimum is the true rate. ``answer`` is scaled to the molecules of ``held`` for both.

    Parameters
    ----------
    held
        ``[b g]`` held-out molecules.
    answer
        ``[b g]`` denoised values of the same cells, at any depth.

    Raises
    ------
    ValueError
        Shapes that differ, negative values, or an answer or held-out counts of nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.downstream import open_problems
    >>> held = np.array([[1.0, 3.0], [2.0, 0.0]])
    >>> {name: round(value, 3) for name, value in open_problems(held, 9 * held).items()}  # perfect
    {'mse': 0.0, 'poisson': 0.329, 'poisson_right': 0.329}
    """
    if held.shape != answer.shape:
        raise ValueError(
            f"open_problems: held-out molecules {held.shape}, answer {answer.shape}: they must be the same"
        )
    x, y = held.astype(np.float64), answer.astype(np.float64)
    if min(x.min(initial=0.0), y.min(initial=0.0)) < 0 or x.sum() <= 0 or y.sum() <= 0:
        raise ValueError("open_problems: values of at least 0 are wanted, with a positive sum on both sides")

    logs = [log_cp10k(a, np.float64) for a in (x, y)]
    mse = float(np.mean((logs[0] - logs[1]) ** 2))
    y = y * (x.sum() / y.sum())
    return {
        "mse": mse,
        "poisson": float(np.mean(x - y * np.log(x + 1e-6))),
        "poisson_right": float(np.mean(y - x * np.log(y + 1e-6))),
    }
