"""Protocol ``molecules``: test cells lose a share of their molecules, a row denoises the rest, the lost ones judge it.

Molecular cross-validation (docs/MATHS.md 5.7) on held-out cells: rows are fitted to whole training cells, as under
every protocol of a grid, and see of a test cell the evidence alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from distdiff import metrics
from distdiff.baselines import Baseline
from distdiff.data.masks import split_molecules
from distdiff.downstream import log_cp10k
from distdiff.grid.scores import Found, Scored, extra, plain, with_error
from distdiff.grid.spec import CannotError
from distdiff.model import Model
from distdiff.readouts import readout
from distdiff.report import Report
from distdiff.rng import numpy_generator

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore

APPLY = ("cells", "rare", "open_problems")
"""Scores of a grid's ``scores:`` that held-out molecules have; ``open_problems`` is there in any case."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Denoised:
    """What a row says of denoised cells.

    Parameters
    ----------
    rate
        ``float32 [n g]`` expected molecules at full depth.
    log
        ``float32 [n g]`` its answer to the squared error of log CP10k of the held-out molecules.
    entry
        ``float32 [n g]`` what it would hand in to Open Problems, at any depth.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.grid.molecules import Denoised
    >>> Denoised.of(np.array([[3.0, 1.0]], np.float32)).log.round(2)
    array([[8.92, 7.82]], dtype=float32)
    """

    rate: Array
    log: Array
    entry: Array

    @classmethod
    def of(cls, rate: Array) -> Denoised:
        """Of a row that knows no more than its rate."""
        return cls(rate, log_cp10k(rate), rate)


class OfModel:
    """A trained model as a row that denoises; it reads out what each score asks for.

    Parameters
    ----------
    store, rows
        The cells that it will be asked about, for their genes and labels.
    labels
        Tell the model the labels of the cells (it peeks: they were made from whole counts).
    """

    control = False

    def __init__(self, model: Model, store: CountStore, rows: NDArray[np.int64], *, labels: bool = False) -> None:
        self.model, self.store, self.rows = model, store, rows
        self.peeks = labels or bool(model.required_labels)
        self.capacity = sum(p.numel() for p in model.denoiser.parameters())

    def fit(self, store: CountStore, rows: NDArray[np.int64]) -> None:
        """Nothing is left to fit."""

    def n_trials(self) -> int:
        """Nothing is chosen."""
        return 1

    def denoised(self, evidence: sparse.csr_matrix, p: float) -> Denoised:
        """Three network calls: the rate, and two read-outs of another measurement ``(1 - p) / p`` times as deep.

        Raises
        ------
        ValueError
            A gene that the model does not know.
        """
        import anndata as ad
        import pandas as pd

        genes = list(self.store.genes)
        if unknown := set(genes) - set(self.model.spec.genes):
            raise ValueError(f"the model does not know {len(unknown)} of {len(genes)} genes; train one on this store")
        names = self.store.manifest.labels
        of_cells = self.store.labels(self.rows, [label for label in self.model.spec.labels if label in names])
        columns = {k: pd.Categorical.from_codes(v, list(names[k])) for k, v in of_cells.items()}
        index = pd.Index([f"cell{i}" for i in range(evidence.shape[0])])
        cells = ad.AnnData(evidence, obs=pd.DataFrame(columns, index=index), var=pd.DataFrame(index=pd.Index(genes)))

        def read(name: str, depth: float = 1.0) -> Array:
            self.model.denoise(cells, copy=False, key_added=name, readout=name, depth=depth, use_labels=self.peeks)
            found = cells.layers[name]
            return np.asarray(found.toarray() if sparse.issparse(found) else found, np.float32)

        more = (1 - p) / p
        return Denoised(read("mean") / np.float32(p), read("log1p_cp10k", more), read("open_problems", more))


def scored(
    name: str, row: Baseline | OfModel, store: CountStore, rows: NDArray[np.int64], *, share: float, seed: int,
    resamples: tuple[int, int], cell_type: str | None = None, scores: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Fit a row, let it denoise what is left of the cells ``rows``, and score it on the molecules that they lost.

    Parameters
    ----------
    share
        Of the molecules that are held out.
    scores
        Those of the grid that are asked for besides.

    Returns
    -------
    dict
        ``answers`` (of the mean alone) and ``setting`` of a record of the grid.

    Raises
    ------
    CannotError
        A row that does not denoise.
    ValueError
        Answers that are not finite, or cells without a held-out molecule.

    Examples
    --------
    >>> from distdiff.baselines.gene_mean import GeneMean
    >>> from distdiff.data.store.store import CountStore
    >>> from distdiff.grid.molecules import scored
    >>> store = CountStore.open("atlas.zarr")
    >>> mean = GeneMean(depth=True)
    >>> found = scored("mean", mean, store, store.rows("test"), share=0.1, seed=0, resamples=(20, 5))
    >>> sorted(found["answers"][0]["numbers"])[:4]
    ['bias', 'cp10k_mse', 'cp10k_mse_poisson', 'deviance']
    """
    if isinstance(row, Baseline) and not row.denoises:
        raise CannotError(
            f"{name} does not denoise: its answer does not follow the depth of a cell (protocol molecules)"
        )
    p = 1.0 - share
    rng = numpy_generator(seed, "grid-molecules")
    evidence, held = split_molecules(store.read(rows).astype(np.int32), p, rng)
    if held.sum() == 0:
        raise ValueError(f"no molecule of {len(rows)} test cells was held out at rate {share}; give a larger rate")
    clock = [time.process_time()]
    row.fit(store, store.rows("train"))
    clock.append(time.process_time())
    found = Denoised.of(row.denoise(evidence, p)) if isinstance(row, Baseline) else row.denoised(evidence, p)
    clock.append(time.process_time())
    if not all(np.isfinite(part).all() for part in (found.rate, found.log, found.entry)):
        raise ValueError(f"{name} answered with numbers that are not finite; its row cannot be scored")
    truth = held.toarray().astype(np.float32)
    report = Report([], {}, truth, np.ones(truth.shape, dtype=bool), mean=(1 - p) * found.rate)
    of_rate = Scored(report, store, rows, cell_type, seed, *resamples)
    numbers = _numbers(truth, found, p, of_rate)
    more, reasons = extra(tuple(n for n in scores if n in APPLY and n != "open_problems"), of_rate)
    reasons += [
        f"no score {n!r}: it is of completed cells, not of held-out molecules" for n in scores if n not in APPLY
    ]
    spent = {"fit_cpu_seconds": clock[1] - clock[0], "fill_cpu_seconds": clock[2] - clock[1]}
    note = "control" if row.control else "peeks" if row.peeks else ""
    pairs = {k: [plain(x) for x in pair] for k, pair in {**numbers, **more}.items()}
    about = f"{len(rows)} test cells x {truth.shape[1]} genes ({store.manifest.fingerprint[:12]})"
    return {
        "answers": [{"answer": "mean", "note": note, "reasons": reasons, "numbers": pairs, **spent}],
        "setting": {
            "cells": len(rows), "genes": truth.shape[1], "targets": truth.size, "data": store.manifest.fingerprint[:12],
            "zeros_among_targets": float((truth == 0).mean()),
            "said": f"{about}, {share:.0%} of their molecules held out ({int(held.sum()):,}).",
        },
    }  # fmt: skip


def _numbers(held: Array, found: Denoised, p: float, of_rate: Scored) -> Found:
    """Metric -> value and standard error over bootstraps of cells."""
    every, n = np.ones(held.shape, dtype=bool), np.full(len(held), held.shape[1])
    mean = (1 - p) * found.rate
    deviance = metrics.poisson_deviance(held, every, mean)
    rest = np.sum(held - held * np.log(np.maximum(held, 1.0)), axis=1, dtype=np.float64)
    truth = log_cp10k(held)
    logs = {"cp10k_mse": found.log, "cp10k_mse_poisson": of_poisson(mean)}
    sums = {
        "deviance": deviance, "nll": deviance / 2 + rest, "bias": metrics.error(held, every, mean),
        **{name: metrics.squared_error(truth, every, log) for name, log in logs.items()},
    }  # fmt: skip
    numbers = {name: with_error(metrics.pooled(each, n, of_rate.weights)) for name, each in sums.items()}
    squares = metrics.pooled(metrics.squared_error(held, every, mean), n, of_rate.weights)
    entry = metrics.squared_error(truth, every, log_cp10k(found.entry))
    numbers |= {"rmse": with_error(np.sqrt(squares))} | of_rate.open_problems()
    return numbers | {"op_mse": with_error(metrics.pooled(entry, n, of_rate.weights))}


def of_poisson(mean: Array) -> Array:
    """``E[log CP10k]`` of Poisson molecules around a mean: the matching read-out that any rate allows, ``[n g]``.

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.grid.molecules import of_poisson
    >>> mean = np.array([[0.5, 1.5]], np.float32)
    >>> bool((of_poisson(mean) < np.log1p(1e4 * mean / 2)).all())  # a logarithm is concave
    True
    """
    out = np.zeros(mean.shape, np.float32)
    for start in range(0, len(mean), 256):
        part = torch.from_numpy(np.ascontiguousarray(mean[start : start + 256], np.float32))
        poisson = torch.full_like(part, 9.0)  # log size of a negative binomial that is Poisson
        out[start : start + 256] = readout("log1p_cp10k", torch.zeros_like(part), part, poisson).numpy()
    return out
