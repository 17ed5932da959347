"""Pack a model folder as an MLflow model: weights and JSON, distdiff's code, requirements, signature, input example."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff import files, received
from distdiff.tracking.address import load_mlflow

if TYPE_CHECKING:
    from pandas import DataFrame

CODE = Path(__file__).parents[1]
PACKAGES = (
    "mlflow", "torch", "numpy", "scipy", "pandas", "anndata", "h5py", "zarr", "numcodecs", "google-crc32c", "numba",
    "scanpy", "safetensors", "filelock", "psutil", "tqdm", "jaxtyping", "igraph", "leidenalg",
)  # fmt: skip
"""Packages that imputation imports; the model requires the versions that are installed here."""

EXAMPLE = (3, 20)
"""Cells and genes of the input example, at most."""


def pack(model: Path, target: Path, *, card: str = "") -> str:
    """Write an MLflow model to ``target``, replacing what is there, and return the SHA-256 of the weights.

    The model runs the copy of distdiff that is packed with it; only :data:`PACKAGES` must be installed. The script
    ``pyfunc.py`` is stored as the model's code, so that nothing is pickled.

    Parameters
    ----------
    model
        Folder written by :meth:`Model.save <distdiff.model.Model.save>`.
    target
        Folder to write.
    card
        Model card (markdown), stored as ``README.md``.

    Raises
    ------
    ValueError
        The folder holds no model.
    """
    mlflow = load_mlflow()
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    spec = received.json_of(model / "model.json")
    example, weights = _example(spec["genes"]), str(spec["info"]["weights_sha256"])
    with files.whole(target, overwrite=True) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns that the signature names no inputs
        mlflow.pyfunc.save_model(
            temporary,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(model.absolute())},
            code_paths=[str(CODE)],
            signature=_signature(),
            input_example=example,
            pip_requirements=_requirements(),
            metadata={"weights_sha256": weights},
        )
        if card:
            (temporary / "README.md").write_text(card)
        for cache in temporary.rglob("__pycache__"):
            shutil.rmtree(cache, ignore_errors=True)
    return weights


def _signature() -> Any:
    """Output and parameters; the model checks its input itself.

    MLflow would check named inputs: it would refuse whole numbers, file paths and AnnData, drop columns without a name
    in the signature, and need 12 s to read 20,000 names.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    texts = [ParamSpec(name, DataType.string, "") for name in ("layer", "mask", "sites", "groups")]
    return ModelSignature(
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
        params=ParamSchema([
            *texts,
            ParamSpec("readout", DataType.string, "mean"),
            ParamSpec("batch_size", DataType.long, 256),
            ParamSpec("use_labels", DataType.boolean, False),
        ]),
    )  # fmt: skip


def _example(genes: list[str]) -> DataFrame:
    """A few invented cells with some of the genes; the first count and the other genes are to be imputed."""
    import pandas as pd

    n_cells, shown = EXAMPLE[0], genes[: EXAMPLE[1]]
    counts = (np.arange(n_cells)[:, None] + np.arange(len(shown))) % 3 + 0.0
    counts[0, 0] = np.nan
    return pd.DataFrame(counts, columns=shown, index=[f"cell{i}" for i in range(n_cells)])


def _requirements() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
