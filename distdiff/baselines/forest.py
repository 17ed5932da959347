"""Forest-Diffusion (Jolicoeur-Martineau et al., AISTATS 2024), as its package ships it: boosted trees as the score."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distdiff.baselines import BoolArray, FloatArray
from distdiff.baselines._fitted import Fitted
from distdiff.types import Cells

BINS = 256
"""What the package's iterator over batches takes."""


@dataclass(eq=False)
class Forest(Fitted):
    """``ForestDiffusionModel(diffusion_type="vp").impute`` on the training cells' counts and the cells to impute.

    Genes are declared whole numbers by ``int_indexes``, the package's own spelling (another spelling is silently taken
    for an option of XGBoost, and nothing is rounded). The package trains a forest for every noise level and gene:
    thousands of genes take hours, and fewer ``bins`` a tenth of them.

    Parameters
    ----------
    levels
        Noise levels.
    copies
        Noise samples of each training cell (the package's own default: 100).
    trees, bins
        Trees of a forest, and bins that XGBoost puts each gene's values into (the package's own: 100, 256). With other
        ``bins`` the noised cells are all in memory, ``float64 [levels, copies cells, g]``: the package's iterator
        takes 256 alone.
    samples
        Imputations whose mean is the answer.
    threads
        Processes of the package.

    Examples
    --------
    >>> from distdiff.baselines.forest import Forest
    >>> Forest(levels=0)
    Traceback (most recent call last):
        ...
    ValueError: Forest-Diffusion: levels=0, copies=10, trees=100 and samples=5 must each be 1 or more
    """

    levels: int | Sequence[int] = 20
    copies: int | Sequence[int] = 10
    trees: int | Sequence[int] = 100
    bins: int | Sequence[int] = BINS
    samples: int = 5
    threads: int = 1

    refit: ClassVar[bool] = False
    denoises = False
    label = "Forest-Diffusion"

    def __post_init__(self) -> None:
        super().__post_init__()
        options = self.options()
        if min(*(min(options[name]) for name in ("levels", "copies", "trees")), self.samples) < 1:
            raise ValueError(
                f"{self.label}: levels={self.levels}, copies={self.copies}, trees={self.trees} and "
                f"samples={self.samples} must each be 1 or more"
            )
        if min(options["bins"]) < 2:
            raise ValueError(f"{self.label}: bins={self.bins} must be 2 or more")

    def solve(self, kept: Cells, held: Cells, option: dict[str, Any]) -> None:
        """Train the forests.

        Raises
        ------
        ImportError
            ForestDiffusion, or a library that it imports, is not installed.
        """
        try:
            from ForestDiffusion import ForestDiffusionModel
        except ImportError as error:
            raise ImportError(
                f"the forest baseline needs ForestDiffusion and what it imports ({error.name} is not there): "
                "pip install ForestDiffusion xgboost catboost lightgbm"
            ) from error
        counts = kept.counts.numpy().astype(np.float64)
        self.varies = np.flatnonzero(counts.min(axis=0) < counts.max(axis=0))
        self.constant = counts[0]
        if len(self.varies) == 0:
            return
        with _quiet():
            self.model = ForestDiffusionModel(
                counts[:, self.varies], diffusion_type="vp", n_t=option["levels"], duplicate_K=option["copies"],
                int_indexes=list(range(len(self.varies))), n_jobs=self.threads, seed=self.seed,
                n_estimators=option["trees"], max_bin=option["bins"], n_batch=int(option["bins"] == BINS),
            )  # fmt: skip

    def predict(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Mean of the imputations; the package draws from NumPy's global generator, restored afterwards."""
        answer = np.tile(self.constant, (len(counts), 1))
        if len(self.varies) == 0:
            return answer
        x = np.where(observed, counts, np.nan)[:, self.varies].astype(np.float64)
        open_cells = ~observed[:, self.varies].all(axis=1)
        if open_cells.any():
            with _quiet(self.seed):  # the package scales what it trains on, and not what it is given to impute
                found = self.model.impute(k=self.samples, X=self.model.scaler.transform(x[open_cells]))
            stack = np.asarray(found if isinstance(found, list) else [found], dtype=np.float64)
            x[open_cells] = stack.reshape(-1, *x[open_cells].shape).mean(axis=0)
        answer[:, self.varies] = x
        return answer


@contextlib.contextmanager
def _quiet(seed: int = 0) -> Any:
    """Seed NumPy's global generator, restore it afterwards, and silence what the package prints."""
    state = np.random.get_state()  # noqa: NPY002 (the package draws from it)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
