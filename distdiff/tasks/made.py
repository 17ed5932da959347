"""What models made of an AnnData, task after task: ``uns["distdiff"]`` tells of the last one, ``uns[MADE]`` of all."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import numpy as np
import pandas as pd

ENTRY = "distdiff"
"""Entry of ``uns`` on the last task that wrote values."""

MADE = "distdiff_made"
"""Entry of ``uns``: ``{"X": "generate", "layers": {"denoised": "denoise"}}``, element -> task that made it."""

NAME = re.compile(r"generated[0-9]+(\W.*)?")
"""Names of generated cells, which are left when cells are joined and ``uns`` is dropped; joining may add an ending."""


def generated_names(start: int, stop: int) -> np.ndarray:
    """Names of generated cells in a row range, ``str [n]``.

    Examples
    --------
    >>> from distdiff.tasks.made import generated_names
    >>> generated_names(8, 10)
    array(['generated8', 'generated9'], dtype='<U10')
    """
    return np.array([f"generated{i}" for i in range(start, stop)])


def count_generated(names: pd.Index) -> int:
    """How many cells were generated, by their names alone.

    Examples
    --------
    >>> import pandas as pd
    >>> from distdiff.tasks.made import count_generated
    >>> count_generated(pd.Index(["AAAC-1", "generated0", "generated12-made", "generatedX"]))
    2
    """
    return int(names.astype(str).str.fullmatch(NAME).sum())


def made_by(uns: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Task that made X (empty: measured), and the layers that tasks made, each with its task.

    Results from before `MADE` was written are read by their `ENTRY`.

    Examples
    --------
    >>> from distdiff.tasks.made import made_by
    >>> made_by({"distdiff": {"task": "generate"}})
    ('generate', {})
    >>> made_by({"distdiff_made": {"X": "generate", "layers": {"mine": "denoise"}}})
    ('generate', {'mine': 'denoise'})
    """
    last, known = (value if isinstance(value, Mapping) else {} for value in (uns.get(ENTRY), uns.get(MADE)))
    of_layers = known.get("layers")
    layers = {str(k): str(v) for k, v in of_layers.items()} if isinstance(of_layers, Mapping) else {}
    task = str(last.get("task", ""))
    if not last.get("valid_for_tests", True) and isinstance(last.get("layer"), str) and last["layer"]:
        layers.setdefault(str(last["layer"]), task)
    return str(known.get("X", "")) or (task if task == "generate" else ""), layers


def noted(uns: Mapping[str, Any], task: str, layers: Collection[str], kept: Collection[str]) -> dict[str, Any]:
    """`MADE` after another task.

    Parameters
    ----------
    uns
        As it was before.
    task
        That was done; ``generate`` made X.
    layers
        That it wrote.
    kept
        All layers of the result; of others nothing is said.

    Examples
    --------
    >>> from distdiff.tasks.made import noted
    >>> noted({"distdiff": {"task": "generate"}}, "denoise", ["denoised"], ["counts", "denoised"])
    {'layers': {'denoised': 'denoise'}, 'X': 'generate'}
    """
    x, before = made_by(uns)
    every = {name: by for name, by in before.items() if name in kept} | dict.fromkeys(layers, task)
    x = "generate" if task == "generate" else x
    return {"layers": every} | ({"X": x} if x else {})


def record(
    uns: MutableMapping[str, Any], about: dict[str, Any], layers: Collection[str], kept: Collection[str]
) -> None:
    """Write ``uns["distdiff"]`` and ``uns["distdiff_made"]`` of a result in memory; parameters as in `noted`.

    Examples
    --------
    >>> from distdiff.tasks.made import record
    >>> uns = {"distdiff": {"task": "generate"}}
    >>> record(uns, {"task": "deepen"}, ["deepened"], ["deepened"])
    >>> uns["distdiff"], uns["distdiff_made"]["X"]
    ({'task': 'deepen'}, 'generate')
    """
    uns[MADE] = noted(uns, str(about.get("task", "impute")), layers, kept)
    uns[ENTRY] = about
