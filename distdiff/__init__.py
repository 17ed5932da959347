"""distdiff: diffusion models on single-cell counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distdiff.version import __version__

__all__ = ["CountStore", "Model", "__version__", "evaluate", "impute_file", "load", "sample", "shard", "train"]

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distdiff.api import evaluate, shard, train
    from distdiff.batch import impute_file
    from distdiff.data.store.store import CountStore
    from distdiff.model import Model
    from distdiff.sampling import sample

_HOME = {
    "CountStore": "distdiff.data.store.store",
    "Model": "distdiff.model",
    "evaluate": "distdiff.api",
    "impute_file": "distdiff.batch",
    "sample": "distdiff.sampling",
    "shard": "distdiff.api",
    "train": "distdiff.api",
}


def load(model: str | Path, *, trust: Sequence[str] = ()) -> Model:
    """Load a model from a folder or from the MLflow registry (``models:/NAME@champion``).

    Parameters
    ----------
    trust
        Packages whose code the model may run (``trust=("mypackage",)``), for models of one's own kinds
        ``mypackage.module:Class``. By default none.

    Raises
    ------
    ValueError
        No model there, a damaged one, or one that asks for code of a package that is not trusted.
    """
    from distdiff import tracking
    from distdiff.model import Model

    return Model.load(tracking.fetch(str(model)), trust=trust)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'distdiff' has no attribute {name!r}")
