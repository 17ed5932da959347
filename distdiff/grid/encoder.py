"""The encoder of a saved scvi-tools model, for scFID: read as arrays and plain values, nothing in the file is run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distdiff import received
from distdiff.configtext import shown

FILE = "model.pt"
"""What scvi-tools writes into the folder of a model."""

LEAST = 0.5
"""Share of the encoder's genes that a store must have."""

CELLS = 2048
"""Cells that are encoded at once."""


def checked(folder: str) -> Path:
    """The file of a saved model.

    Raises
    ------
    ValueError
        There is none.

    Examples
    --------
    >>> from distdiff.grid.encoder import checked
    >>> checked("nothing")
    Traceback (most recent call last):
        ...
    ValueError: encoder 'nothing' holds no model.pt; give the folder that scvi-tools' model.save(...) has written
    """
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise ValueError(
            f"encoder {shown(folder)} holds no {FILE}; give the folder that scvi-tools' model.save(...) has written"
        )
    return path


def fingerprint(folder: str) -> str:
    """Digest of the file, or nothing without a folder.

    Examples
    --------
    >>> from distdiff.grid.encoder import fingerprint
    >>> fingerprint("")
    ''
    """
    return received.sha256(checked(folder)) if folder else ""


class Scvi:
    """The encoder of an SCVI model: counts of a store's genes to means of the latent law.

    Genes of the encoder that the store lacks are 0, as scvi-tools prepares a query.

    Parameters
    ----------
    folder
        Of a model that scvi-tools saved.
    genes
        Of the store.

    Raises
    ------
    ImportError
        scvi-tools is not installed.
    ValueError
        No such file; a file that holds more than arrays and plain values, or no SCVI model; an encoder that takes
        batches; fewer than half of its genes in the store.
    """

    def __init__(self, folder: str, genes: Sequence[str]) -> None:
        try:
            from scvi.module import VAE
        except ImportError as error:
            raise ImportError("an encoder of scvi-tools needs scvi-tools: pip install 'distdiff[baselines]'") from error
        path = checked(folder)
        saved = _read(path)
        try:
            about, weights = saved["attr_dict"], saved["model_state_dict"]
            given = about["init_params_"]
            options = {**given["kwargs"].get("kwargs", {}), **given["non_kwargs"]}
            name = about["registry_"]["model_name"]
            own = [str(gene) for gene in np.asarray(saved["var_names"]).ravel()]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no model as scvi-tools 1 saves it: it lacks {error}") from None
        if name != "SCVI":
            raise ValueError(f"{path} is a model {shown(name)} of scvi-tools, wanted SCVI")
        if options.get("encode_covariates"):
            raise ValueError(
                f"{path}: its encoder takes batches (encode_covariates), which cells of a store have not; train one "
                "without"
            )
        at = {gene: i for i, gene in enumerate(genes)}
        self.of_store = np.array([at[gene] for gene in own if gene in at], dtype=np.int64)
        self.of_encoder = np.array([i for i, gene in enumerate(own) if gene in at], dtype=np.int64)
        if len(self.of_store) < LEAST * len(own):
            raise ValueError(
                f"{path}: the store has {len(self.of_store)} of its {len(own)} genes, at least {LEAST:.0%} are wanted; "
                "are both symbols or both Ensembl ids?"
            )
        self.n = len(own)
        dropped = ("gene_likelihood", "dispersion", "use_observed_lib_size")  # of the decoder
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.module = VAE(self.n, n_batch=1, **{k: v for k, v in options.items() if k not in dropped}).eval()
            start = "z_encoder."
            part = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
            self.module.z_encoder.load_state_dict(part)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path}: this scvi-tools builds no such encoder: {' '.join(str(error).split())[:200]}"
            ) from None

    @torch.no_grad()
    def __call__(self, counts: NDArray[np.floating]) -> NDArray[np.float32]:
        """Means of the latent law: ``float32 [n d]`` of counts ``[n g]`` of the store's genes."""
        parts = []
        for start in range(0, len(counts), CELLS):
            part = counts[start : start + CELLS]
            x = torch.zeros(len(part), self.n)
            x[:, self.of_encoder] = torch.from_numpy(part[:, self.of_store].astype(np.float32))
            parts.append(self.module.inference(x, torch.zeros(len(x), 1))["qz"].loc)
        return torch.cat(parts).numpy()


def _read(path: Path) -> dict[str, Any]:
    """Arrays and plain values of a file of torch: anything else in it is refused, and nothing of it is called."""
    array, scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    parts = [
        (part, f"numpy.{core}.multiarray.{name}")  # as NumPy 1 and 2 name what makes an array
        for core in ("core", "_core")
        for part, name in ((array, "_reconstruct"), (scalar, "scalar"))
    ]
    kinds = {type(np.dtype(code)) for code in "OSU?bBhHiIlLqQefdgM"}
    known: list[Any] = [np.ndarray, np.dtype, dict, bytes, *parts, *kinds]
    known.append((lambda *kind: {}, "collections.defaultdict"))  # torch fills no defaultdict: a dict in its place
    try:
        with torch.serialization.safe_globals(known):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch fail in many ways
        words = " ".join(str(error).split())
        if what := re.search(r"GLOBAL (\S+)", words):
            raise ValueError(
                f"{path} holds {what[1]}, and only arrays and plain values of such a file are read; load it with "
                "scvi-tools where you trust it, and save it again"
            ) from None
        raise ValueError(f"{path} cannot be read as a file of torch: {words[:120]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no model of scvi-tools: it holds a {type(found).__name__}")
    return found
