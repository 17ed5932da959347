"""distdiff: diffusion models on single-cell counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distdiff.version import __version__

__all__ = [
    "CountStore",
    "Model",
    "__version__",
    "certify",
    "check",
    "de",
    "evaluate",
    "impute_file",
    "load",
    "panel",
    "pl",
    "sample",
    "shard",
    "train",
]

if TYPE_CHECKING:
    from distdiff import pl
    from distdiff.api import evaluate, load, shard, train
    from distdiff.batch import impute_file
    from distdiff.certificate import certify
    from distdiff.checkup import check
    from distdiff.completion import panel
    from distdiff.data.store.store import CountStore
    from distdiff.differential import de
    from distdiff.model import Model
    from distdiff.sampling import sample

_HOME = {
    "CountStore": "distdiff.data.store.store",
    "Model": "distdiff.model",
    "certify": "distdiff.certificate",
    "check": "distdiff.checkup",
    "de": "distdiff.differential",
    "evaluate": "distdiff.api",
    "impute_file": "distdiff.batch",
    "load": "distdiff.api",
    "panel": "distdiff.completion",
    "sample": "distdiff.sampling",
    "shard": "distdiff.api",
    "train": "distdiff.api",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "pl":
        return importlib.import_module("distdiff.pl")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'distdiff' has no attribute {name!r}")
