"""A model folder as an MLflow model: weights and JSON, our own code, what it needs, signature and input example."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distdiff import files, received
from distdiff.tracking.address import library

if TYPE_CHECKING:
    from pandas import DataFrame

CODE = Path(__file__).parents[1]
NEEDS = (
    "mlflow", "torch", "numpy", "scipy", "pandas", "anndata", "h5py", "zarr", "numcodecs", "google-crc32c", "numba",
    "scanpy", "safetensors", "filelock", "psutil", "tqdm", "jaxtyping", "igraph", "leidenalg",
)  # fmt: skip
"""What imputing imports; pinned to the versions at hand."""

LISTED = 2000
"""Genes that the signature names, at most; model.json has all."""

EXAMPLE = (3, 20)
"""Cells and genes of the input example, at most."""


def pack(model: Path, target: Path, *, card: str = "") -> str:
    """Write an MLflow model to ``target``, replacing what is there; return the weights' sha256.

    Loaded, it runs the code of distdiff that is packed with it: nothing has to be installed but `NEEDS`. The script
    itself (``pyfunc.py``) stands in the place of a pickled object.
    """
    mlflow = library()
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    spec = received.json_of(model / "model.json")
    example, weights = _example(spec["genes"]), str(spec["info"]["weights_sha256"])
    with files.whole(target, overwrite=True) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of the hints in its own code
        mlflow.pyfunc.save_model(
            temporary,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(model.absolute())},
            code_paths=[str(CODE)],
            signature=_signature(spec["genes"], spec["labels"]),
            input_example=example,
            pip_requirements=_requirements(),
            metadata={"weights_sha256": weights},
        )
        # MLflow writes the request as a frame, which it does not take of a model that checks its input itself
        request = {"inputs": example.astype(object).where(example.notna(), None).to_dict("records")}
        (temporary / "serving_input_example.json").write_text(json.dumps(request))
        if card:
            (temporary / "README.md").write_text(card)
        for cache in temporary.rglob("__pycache__"):
            shutil.rmtree(cache, ignore_errors=True)
    return weights


def _signature(genes: list[str], labels: dict[str, Any]) -> Any:
    """Every input is optional. The model checks them itself: MLflow would refuse whole numbers and paths.

    MLflow reads the signature as YAML, three times a load (12 s for 20,000 genes), so it names `LISTED` genes at most.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    inputs: list[Any] = [ColSpec(DataType.string, name, required=False) for name in ("path", *labels)]
    text = {name: ParamSpec(name, DataType.string, "") for name in ("layer", "mask", "sites", "groups")}
    params = [
        *text.values(),
        ParamSpec("readout", DataType.string, "mean"),
        ParamSpec("batch_size", DataType.long, 256),
        ParamSpec("use_labels", DataType.boolean, False),
    ]
    signature = ModelSignature(
        Schema(inputs + [ColSpec(DataType.double, gene, required=False) for gene in genes[:LISTED]]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
        ParamSchema(params),
    )
    signature._is_signature_from_type_hint = True
    return signature


def _example(genes: list[str]) -> DataFrame:
    """A few made cells with some genes; the first count is to be imputed, and so are the other genes."""
    import pandas as pd

    cells, some = EXAMPLE[0], genes[: EXAMPLE[1]]
    counts = (np.arange(cells)[:, None] + np.arange(len(some))) % 3 + 0.0
    counts[0, 0] = np.nan
    return pd.DataFrame(counts, columns=some, index=[f"cell{i}" for i in range(cells)])


def _requirements() -> list[str]:
    found = []
    for name in NEEDS:
        try:
            found.append(f"{name}=={importlib.metadata.version(name).partition('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
