"""scVI (Lopez et al., Nat Methods 2018) as scvi-tools ships it, with a negative binomial likelihood."""

from __future__ import annotations

import contextlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from distdiff.baselines import CHUNK, Baseline, BoolArray, Cells, FloatArray, _tuning, depth

if TYPE_CHECKING:
    from distdiff.data.store.store import CountStore


class Scvi(Baseline):
    """``rate = s px_rate``, decoded at the mean of the encoder's posterior; ``s`` is the depth of the evidence.

    `scvi.model.SCVI` with ``gene_likelihood="nb"`` and its own defaults otherwise, trained on the training cells with
    all genes observed: scVI has no notion of hidden entries. So that they do not act as zeros, the encoder gets them
    filled with ``depth x gene_mean``, the depth from the observed genes; the library size is that of the filled cell.
    An encoder trained on random masks would do better on imputation; with every gene observed (`denoise`) nothing is
    filled and this is scVI as published.

    Parameters
    ----------
    epochs
        Training epochs; ``None`` is the default of scvi-tools for this number of cells (400 up to 20,000 cells).
    latent, hidden, layers
        Dimensions of the latent space, width and number of hidden layers.
    max_cells
        Most training cells to use, chosen at random (bounds time; they stay sparse).
    seed
        Seed of the sample, the weights and the training. The global generators are restored afterwards.

    Raises
    ------
    ValueError
        An option below 1.

    Examples
    --------
    >>> from distdiff.baselines.scvi import Scvi
    >>> Scvi(epochs=5, latent=0)
    Traceback (most recent call last):
        ...
    ValueError: scvi: epochs=5, latent=0, hidden=128, layers=1 and max_cells=50000 must each be 1 or ...
    """

    label = "scVI"
    denoises = True

    def __init__(
        self,
        epochs: int | None = None,
        *,
        latent: int = 10,
        hidden: int = 128,
        layers: int = 1,
        max_cells: int = 50_000,
        seed: int = 0,
    ) -> None:
        if min(latent, hidden, layers, max_cells, 1 if epochs is None else epochs) < 1:
            raise ValueError(
                f"scvi: epochs={epochs}, latent={latent}, hidden={hidden}, layers={layers} and max_cells={max_cells} "
                "must each be 1 or more"
            )
        self.epochs, self.latent, self.hidden, self.layers = epochs, latent, hidden, layers
        self.max_cells, self.seed = max_cells, seed

    def learn(self, store: CountStore, rows: np.ndarray) -> None:
        """Train on CPU. Cells without counts are excluded, and a cell that would be alone in the last batch of 128.

        Raises
        ------
        ImportError
            scvi-tools is not installed.
        ValueError
            Fewer than two training cells have counts.
        """
        try:
            import scvi
        except ImportError as error:
            raise ImportError("the scvi baseline needs scvi-tools: pip install 'distdiff[baselines]'") from error
        from anndata import AnnData
        from scipy.sparse import csr_matrix

        some = np.sort(_tuning.sample(rows, self.max_cells, self.seed))
        counts = csr_matrix(store.read(some), dtype=np.float32)
        counts = counts[np.diff(counts.indptr) > 0]
        if counts.shape[0] % 128 == 1:
            counts = counts[:-1]
        if counts.shape[0] < 2:
            raise ValueError(f"scvi: {counts.shape[0]} training cells with counts, wanted two or more")
        with _quiet(self.seed):
            data = AnnData(counts)
            scvi.model.SCVI.setup_anndata(data)
            model = scvi.model.SCVI(
                data, n_latent=self.latent, n_hidden=self.hidden, n_layers=self.layers, gene_likelihood="nb"
            )
            model.train(
                max_epochs=self.epochs, accelerator="cpu", devices=1, train_size=1.0, shuffle_set_split=False,
                enable_progress_bar=False, logger=False, enable_checkpointing=False, enable_model_summary=False,
            )  # fmt: skip
        self.module = model.module.eval()

    def rate(self, counts: FloatArray, observed: BoolArray, cells: Cells) -> FloatArray:
        """Encode the filled cells, decode the latent mean, scale to the depth of the evidence."""
        filled = np.where(observed, counts, depth(counts, observed, self.gene_mean) * self.gene_mean)
        x = torch.from_numpy(filled.astype(np.float32))
        parts = [self._decode(x[start : start + CHUNK]) for start in range(0, len(x), CHUNK)]
        profile = torch.cat(parts).numpy() if parts else np.zeros(counts.shape, np.float32)
        return depth(counts, observed, profile) * profile

    @torch.no_grad()
    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        x = x + (x.sum(1, keepdim=True) == 0) * 1e-3  # avoid the logarithm of an empty library
        batch = torch.zeros(len(x), 1)
        encoded = self.module.inference(x, batch)
        decoded = self.module.generative(z=encoded["qz"].loc, library=encoded["library"], batch_index=batch)
        return decoded["px"].mean


def prior_sampler(
    counts: sparse.csr_matrix, codes: np.ndarray, *, epochs: int | None = None, seed: int = 0
) -> Callable[[int, np.ndarray], sparse.csr_matrix]:
    """Train scVI with the label as its batch; returns ``(code, library [n]) -> n`` cells at latents of the prior.

    scVI has no cells of a label otherwise: the decoder is told the label, the latent ``z ~ N(0, I)`` is not.

    Raises
    ------
    ImportError
        scvi-tools is not installed.
    """
    try:
        import scvi
    except ImportError as error:
        raise ImportError("scVI needs scvi-tools: pip install 'distdiff[baselines]'") from error
    import pandas as pd
    from anndata import AnnData

    some = np.diff(counts.indptr) > 0
    known, batch = np.unique(codes[some], return_inverse=True)
    with _quiet(seed):
        data = AnnData(counts[some].astype(np.float32), obs=pd.DataFrame({"label": pd.Categorical(batch)}))
        scvi.model.SCVI.setup_anndata(data, batch_key="label")
        model = scvi.model.SCVI(data, gene_likelihood="nb")
        model.train(
            max_epochs=epochs, accelerator="cpu", devices=1, train_size=1.0, shuffle_set_split=False,
            enable_progress_bar=False, logger=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
    module = model.module.eval()

    @torch.no_grad()
    def draw(code: int, library: np.ndarray) -> sparse.csr_matrix:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + code)
            z = torch.randn(len(library), module.n_latent)
            depth = torch.from_numpy(np.log(np.maximum(library, 1)).astype(np.float32)).unsqueeze(1)
            label = torch.full((len(library), 1), int(np.searchsorted(known, code)))
            drawn = module.generative(z=z, library=depth, batch_index=label)["px"].sample()
        return sparse.csr_matrix(drawn.numpy().astype(np.float32))

    return draw


@contextlib.contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Seed the global generators that scvi-tools uses, restore them afterwards, and silence its log and warnings."""
    state, python = np.random.get_state(), random.getstate()  # noqa: NPY002 (scvi-tools draws from it)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "scvi")]
    levels = [log.level for log in loggers]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
            random.setstate(python)
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)
