"""Which genes: all, those that lead by one of five measures, or a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from distdiff.component import nearest
from distdiff.data.ingest.damage import reading
from distdiff.data.store.moments import Moments
from distdiff.jit import njit

MEASURES = {
    "hvg": "variance of a gene's Pearson residuals without the two largest (docs/MATHS.md 12.1)",
    "top": "molecules",
    "cv": "standard deviation / mean, as in CountsDiff",
    "fano": "variance / mean of the molecules, 1 for Poisson noise; one cell with many molecules lifts a gene",
    "seurat_v3": "variance of counts standardised by a fit of variance on mean, as scanpy's flavor of that name",
}

THETA = 100.0
"""Size of the negative binomial around a gene's expected molecules (docs/MATHS.md 12.1)."""

LEVELS = 2048
"""Classes of depth, 64 in each power of two, whose cells count as their mean where a sum runs over every cell."""

QUANTUM = 2.0**-16
"""Terms are rounded to multiples of it, so that their sum is exact and has no order."""

Of = Callable[[sparse.csr_matrix], Any]
Again = Callable[[Of], Any]
"""Sum (``+``) of a function over the training cells, of which it gets a piece ``csr [n g]`` at a time."""


@dataclass(frozen=True)
class Choice:
    """A choice of genes: how (for the manifest), names if they are given, else the ``top`` by a measure (None: all)."""

    how: str
    names: tuple[str, ...] | None = None
    measure: str | None = None
    top: int | None = None

    @classmethod
    def parse(cls, genes: str | Path | Sequence[str], known: Sequence[str], option: str) -> Choice:
        """Read ``all``, ``hvg:N`` (or another of `MEASURES`), a text file with one gene a line, names, or ``A,B,C``.

        Raises
        ------
        ValueError, FileNotFoundError
            It is none of these, or names genes that are not in ``known`` or twice.
        """
        if isinstance(genes, str) and genes == "all":
            return cls("all")
        measure, colon, number = str(genes).partition(":") if isinstance(genes, str) else ("", "", "")
        if measure in MEASURES and colon:
            if not number.isdigit() or int(number) < 1:
                raise ValueError(
                    f"{option} {genes!r}: a whole number of genes is wanted after '{measure}:', for example "
                    f"{measure}:2000"
                )
            return cls(str(genes), None, measure, int(number))
        if isinstance(genes, str | Path):
            file, words = file_of(genes), [word.strip() for word in str(genes).split(",") if word.strip()]
            if file is not None:
                how, where, names = file.name, str(file), listed(file)
            elif len(words) > 1 or str(genes) in known:
                how, where, names = "names", option, words
            else:
                measures = ", ".join(f"'{name}:N'" for name in MEASURES)
                raise FileNotFoundError(
                    f"{option} {str(genes)[:200]!r} is neither 'all', {measures}, "
                    "names of genes with commas between them, nor a text file of gene names"
                )
        else:
            how, where, names = "names", option, list(genes)
        _check_names(names, known, where)
        return cls(how, tuple(names))

    def pick(self, genes: Sequence[str], among: np.ndarray, moments: Moments, again: Again) -> np.ndarray:
        """Numbers of the chosen genes, ascending (those given by name in the order given).

        Parameters
        ----------
        genes
            Names ``[g]``.
        among
            ``bool [g]``, genes that may be chosen.
        moments
            Of the training cells.
        again
            Another pass over them, for ``hvg`` and ``seurat_v3``.

        Raises
        ------
        ValueError
            Fewer genes than are to be chosen.
        """
        if self.names is not None:
            at = {g: i for i, g in enumerate(genes)}
            return np.array([at[n] for n in self.names], np.int64)
        if self.measure is None:
            return np.flatnonzero(among)
        top, n_counted = self.top or 0, int(among.sum())
        if top > n_counted:
            raise ValueError(f"genes {self.how!r}: only {n_counted} genes have a count; ask for at most that many")
        score = np.where(among, _SCORES[self.measure](moments, again), -np.inf)
        return np.sort(np.argsort(-score, kind="stable")[:top])


LISTS = (".txt", ".csv", ".tsv")
"""How files of gene names end, and no gene."""


def file_of(genes: str | Path) -> Path | None:
    """The file that this is the path of, or None: names of many genes are longer than a path can be."""
    try:
        file = Path(genes).expanduser()
        if file.is_file():
            return file
        if file.suffix in LISTS and "," not in str(genes):
            raise FileNotFoundError(f"{genes} does not exist; a file of gene names, one a line, is wanted")
        return None
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError):  # too long, no such home, or a zero byte
        return None


def listed(file: Path) -> list[str]:
    """Names in a text file, one a line.

    Raises
    ------
    InputError
        It is no text.
    """
    with reading(str(file)):
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def choose(counts: sparse.csr_matrix, genes: str) -> np.ndarray:
    """Columns of counts in memory that ``genes``, such as ``hvg:2000``, chooses: ``int64 [N]``, ascending.

    As `distdiff.data.ingest.shard.shard` chooses them if all of these are training cells.

    Raises
    ------
    ValueError
        Fewer genes than are to be chosen.

    Examples
    --------
    >>> from scipy import sparse
    >>> from distdiff.data.ingest.choose import choose
    >>> cells = 4 * [[9, 0, 7, 1]] + 4 * [[9, 7, 0, 1]] + [[9, 0, 7, 90]]  # the last gene stands on one cell
    >>> choose(sparse.csr_matrix(cells), "hvg:2"), choose(sparse.csr_matrix(cells), "fano:1")
    (array([1, 2]), array([3]))
    """
    names = [str(i) for i in range(counts.shape[1])]
    moments = Moments.of(counts)
    return Choice.parse(genes, names, "genes").pick(names, moments.total > 0, moments, lambda of: of(counts))


def _hvg(moments: Moments, again: Again) -> np.ndarray:
    """Variance of each gene's Pearson residuals without the two largest (docs/MATHS.md 12.1)."""
    share, limit = moments.total / max(moments.total.sum(), 1.0), float(np.sqrt(moments.n))
    found: Residuals = again(partial(Residuals.of, share=share, limit=limit))
    squares, total = found.squares - (found.largest**2).sum(0), found.total - found.largest.sum(0)
    for cells, molecules in found.depths[:, found.depths[0] > 0].T:
        zero = _residual(np.zeros(len(share)), molecules / cells * share, limit)
        squares += cells * zero**2
        total += cells * zero
    n = max(moments.n - len(found.largest), 1)
    return squares / n - (total / n) ** 2


@dataclass(frozen=True)
class Residuals:
    """Sums over training cells of Pearson residuals (docs/MATHS.md 12.1); ``+`` adds cells, in any order the same.

    Parameters
    ----------
    squares, total
        ``float64 [g]``, what counts add to the sums (of squares) that zeros in their places would give.
    largest
        ``float64 [2, g]``, the largest of each gene, descending, at least 0.
    depths
        ``float64 [2, LEVELS]``, cells of each class of depth, and their molecules.
    """

    squares: np.ndarray
    total: np.ndarray
    largest: np.ndarray
    depths: np.ndarray

    @classmethod
    def of(cls, counts: sparse.csr_matrix, share: np.ndarray, limit: float) -> Residuals:
        """Of cells ``[n g]``, with each gene's share of all molecules ``float64 [g]``, clipped at +-``limit``."""
        depth = np.asarray(counts.sum(1), np.float64).ravel()
        sums, largest = np.zeros((2, len(share))), np.zeros((2, len(share)))
        _residuals(counts.indptr, counts.indices, counts.data, depth, share, limit, sums, largest)
        level = np.minimum(np.log2(np.maximum(depth, 1)) * 64, LEVELS - 1).astype(np.int64)
        depths = np.stack([np.bincount(level, weights, minlength=LEVELS) for weights in (np.ones_like(depth), depth)])
        return cls(sums[0], sums[1], largest, depths)

    def __add__(self, other: Residuals) -> Residuals:
        largest = -np.sort(-np.concatenate((self.largest, other.largest)), axis=0)[:2]
        return Residuals(
            self.squares + other.squares, self.total + other.total, largest, self.depths + other.depths
        )  # fmt: skip


@njit
def _residual(x, expected, limit):  # type: ignore[no-untyped-def]
    return np.minimum(np.maximum((x - expected) / np.sqrt(expected + expected**2 / THETA + 1e-300), -limit), limit)


@njit
def _residuals(indptr, indices, data, depth, share, limit, sums, largest):  # type: ignore[no-untyped-def]
    for i in range(len(depth)):
        for j in range(indptr[i], indptr[i + 1]):
            gene = indices[j]
            expected = depth[i] * share[gene]
            some, zero = _residual(float(data[j]), expected, limit), _residual(0.0, expected, limit)
            sums[0, gene] += np.round((some**2 - zero**2) / QUANTUM) * QUANTUM
            sums[1, gene] += np.round((some - zero) / QUANTUM) * QUANTUM
            for k in range(2):
                if some > largest[k, gene]:
                    some, largest[k, gene] = largest[k, gene], some


def _top(moments: Moments, again: Again) -> np.ndarray:
    return moments.total


def _fano(moments: Moments, again: Again) -> np.ndarray:
    return np.divide(moments.var, moments.mean, out=np.full(len(moments.total), -1.0), where=moments.mean > 0)


def _cv(moments: Moments, again: Again) -> np.ndarray:
    return np.divide(np.sqrt(moments.var), moments.mean, out=np.full(len(moments.total), -1.0), where=moments.mean > 0)


def _seurat_v3(moments: Moments, again: Again) -> np.ndarray:
    """Stuart et al. 2019: counts standardised by a loess fit of log variance on log mean, cut at sqrt(n)."""
    try:
        from skmisc.loess import loess
    except ImportError:
        raise ValueError("genes 'seurat_v3:N' needs scikit-misc: pip install 'distdiff[seurat]'") from None
    n, mean = moments.n, moments.mean
    var = moments.var * n / max(n - 1, 1)
    seen = var > 0
    fit = loess(np.log10(mean[seen]), np.log10(var[seen]), span=0.3, degree=2)
    fit.fit()
    spread = np.zeros(len(mean))
    spread[seen] = np.sqrt(10**fit.outputs.fitted_values)
    total, squares = again(partial(clipped, limit=spread * np.sqrt(n) + mean))
    score = np.zeros(len(mean))
    score[seen] = ((n * mean**2 + squares - 2 * total * mean) / ((n - 1) * np.where(seen, spread, 1.0) ** 2))[seen]
    return score


def clipped(counts: sparse.csr_matrix, limit: np.ndarray) -> np.ndarray:
    """Sums, and sums of squares, of counts cut at a limit a gene ``float64 [g]``: ``float64 [2, g]``."""
    values = np.round(np.minimum(counts.data, limit[counts.indices]) / QUANTUM) * QUANTUM
    return np.stack([np.bincount(counts.indices, v, minlength=len(limit)) for v in (values, values**2)])


_SCORES: dict[str, Callable[[Moments, Again], np.ndarray]] = {
    "hvg": _hvg, "top": _top, "cv": _cv, "fano": _fano, "seurat_v3": _seurat_v3
}  # fmt: skip


def _check_names(names: Sequence[str], known: Sequence[str], where: str) -> None:
    if not names:
        raise ValueError(f"{where} names no gene; write one a line")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(g for g in names if g in seen or seen.add(g))  # type: ignore[func-returns-value]
        raise ValueError(f"{where} names gene {twice!r} more than once")
    known_names = set(known)
    if unknown := [g for g in names if g not in known_names]:
        near = nearest(unknown[0], known) if len(known) <= 100_000 else ""
        near = near if near.startswith("; did") else ""
        raise ValueError(
            f"{where}: {len(unknown)} of {len(names)} genes are not in every input: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}{near}"
        )
