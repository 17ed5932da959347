"""Which genes: all, the most variable by one of three measures, or a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distdiff.component import nearest
from distdiff.data.ingest.damage import reading
from distdiff.data.store.moments import Moments

MEASURES = {
    "hvg": "variance / mean (Fano factor of the raw molecules; 1 for Poisson noise)",
    "cv": "standard deviation / mean, as in CountsDiff",
    "seurat_v3": "variance of counts standardised by a fit of variance on mean, as scanpy's flavor of that name",
}

Clip = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Sums and sums of squares of the training cells' counts cut at a limit a gene."""


@dataclass(frozen=True)
class Choice:
    """A choice of genes: how (for the manifest), names if they are given, else the ``top`` by a measure (None: all)."""

    how: str
    names: tuple[str, ...] | None = None
    measure: str | None = None
    top: int | None = None

    @classmethod
    def parse(cls, genes: str | Path | Sequence[str], known: Sequence[str], option: str) -> Choice:
        """Read ``all``, ``hvg:N``, ``cv:N``, ``seurat_v3:N``, a text file with one gene a line, names, or ``A,B,C``.

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
                raise FileNotFoundError(
                    f"{option} {str(genes)[:200]!r} is neither 'all', 'hvg:N', 'cv:N', 'seurat_v3:N', names of genes "
                    "with commas between them, nor a text file of gene names"
                )
        else:
            how, where, names = "names", option, list(genes)
        _check_names(names, known, where)
        return cls(how, tuple(names))

    def pick(self, genes: Sequence[str], among: np.ndarray, moments: Moments, clip: Clip) -> np.ndarray:
        """Numbers of the chosen genes, ascending (those given by name in the order given).

        Parameters
        ----------
        genes
            Names ``[g]``.
        among
            ``bool [g]``, genes that may be chosen.
        moments
            Of the training cells.
        clip
            For ``seurat_v3``.

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
        score = np.where(among, _SCORES[self.measure](moments, clip), -np.inf)
        return np.sort(np.argsort(-score, kind="stable")[:top])


def file_of(genes: str | Path) -> Path | None:
    """The file that this is the path of, or None: names of many genes are longer than a path can be."""
    try:
        file = Path(genes).expanduser()
        return file if file.is_file() else None
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


def _fano(moments: Moments, clip: Clip) -> np.ndarray:
    return np.divide(moments.var, moments.mean, out=np.full(len(moments.total), -1.0), where=moments.mean > 0)


def _cv(moments: Moments, clip: Clip) -> np.ndarray:
    return np.divide(np.sqrt(moments.var), moments.mean, out=np.full(len(moments.total), -1.0), where=moments.mean > 0)


def _seurat_v3(moments: Moments, clip: Clip) -> np.ndarray:
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
    total, squares = clip(spread * np.sqrt(n) + mean)
    score = np.zeros(len(mean))
    score[seen] = ((n * mean**2 + squares - 2 * total * mean) / ((n - 1) * np.where(seen, spread, 1.0) ** 2))[seen]
    return score


_SCORES: dict[str, Callable[[Moments, Clip], np.ndarray]] = {"hvg": _fano, "cv": _cv, "seurat_v3": _seurat_v3}


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
