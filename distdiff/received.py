"""Reading of files of unknown origin: sizes are limited, content is checked, errors name the file.

Nothing is unpickled or imported. Only regular files are opened, no pipes or devices.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

Record = tuple[int, int]
"""Bytes and CRC-32C of a file."""

LARGEST = 64 << 20
"""Most bytes of a JSON file; the names of a million genes and labels take less."""

DEEPEST = 64
"""Most nested levels of a JSON file."""

PIECE = 4 << 20
"""Bytes that are read at one time for a checksum."""


def regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading.

    Raises
    ------
    OSError
        It does not exist, or is no regular file.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.received import regular
    >>> with regular(Path("counts.h5ad")) as file:
    ...     len(file.read(4))
    4
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would never open
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{path} is no regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(folder: Path) -> None:
    """Refuse a folder in which something is neither a file nor a folder: a pipe is waited for without end.

    Raises
    ------
    OSError
        Something is (named).
    """
    for where, _, names in os.walk(folder):
        for name in names:
            if not stat.S_ISREG(os.stat(os.path.join(where, name)).st_mode):
                raise OSError(f"{os.path.join(where, name)} is no regular file")


def parsed(text: bytes | str) -> dict[str, Any]:
    """The mapping in a JSON text.

    Raises
    ------
    ValueError
        The text is no JSON, or no mapping, or has more than :data:`DEEPEST` levels.

    Examples
    --------
    >>> from distdiff.received import parsed
    >>> parsed('{"genes": 30}')
    {'genes': 30}
    >>> parsed("[1, 2]")
    Traceback (most recent call last):
        ...
    ValueError: a mapping is wanted, it holds a list
    """
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError(f"it has more than {DEEPEST} levels") from None
    if not isinstance(tree, dict):
        raise ValueError(f"a mapping is wanted, it holds {kind(tree)}")
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        level = [v for part in level for v in (part.values() if isinstance(part, dict) else part)
                 if isinstance(v, (dict, list))]  # fmt: skip
        if not level:
            return tree
    raise ValueError(f"it has more than {DEEPEST} levels")


def json_of(path: Path, most: int = LARGEST) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises
    ------
    FileNotFoundError
        It is not there.
    ValueError
        It cannot be read, is larger than ``most`` bytes, or :func:`parsed` refuses it.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.received import json_of
    >>> json_of(Path("atlas.zarr/manifest.json"))["n_cells"]
    199
    """
    try:
        with regular(path) as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        return parsed(text)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name.

    Raises
    ------
    FileNotFoundError
        It is not there.
    ValueError
        It is damaged.

    Examples
    --------
    >>> from pathlib import Path
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> from distdiff.received import tensors_of
    >>> save_file({"weight": torch.ones(2)}, "weights.safetensors")
    >>> tensors_of(Path("weights.safetensors"))
    {'weight': tensor([1., 1.])}
    """
    try:
        regular(path).close()
        return load_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has an error class for each kind of damage
        raise ValueError(f"{path} cannot be read: {error}") from None


def notes_of(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file: text by name.

    Examples
    --------
    >>> from pathlib import Path
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> from distdiff.received import notes_of
    >>> save_file({"weight": torch.ones(2)}, "noted.safetensors", {"genes": "CD3E MS4A1"})
    >>> notes_of(Path("noted.safetensors"))
    {'genes': 'CD3E MS4A1'}
    """
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.received import sha256
    >>> Path("empty").touch()
    >>> sha256(Path("empty"))[:16]
    'e3b0c44298fc1c14'
    """
    with regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(path: Path) -> Record:
    """Bytes and CRC-32C of a file, read piece by piece.

    Examples
    --------
    >>> from pathlib import Path
    >>> from distdiff.received import record
    >>> _ = Path("nine").write_text("123456789")
    >>> record(Path("nine"))
    (9, 3808858755)
    """
    size = found = 0
    with regular(path) as file:
        while piece := file.read(PIECE):
            size, found = size + len(piece), google_crc32c.extend(found, piece)
    return size, found


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse numbers that are not finite.

    Raises
    ------
    ValueError
        A tensor that holds such numbers (named).

    Examples
    --------
    >>> import torch
    >>> from distdiff.received import check_finite
    >>> check_finite({"bias": torch.tensor([0.0, float("nan")])})
    Traceback (most recent call last):
        ...
    ValueError: tensor bias holds 1 numbers that are not finite, of 2
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if math.isfinite(float(tensor.sum(dtype=torch.float32))):  # five times as fast as a check of each number
            continue
        if bad := int((~tensor.isfinite()).sum()):
            raise ValueError(f"tensor {name} holds {bad} numbers that are not finite, of {tensor.numel()}")


def check_answer(values: Any, name: str, first: int = 0) -> Any:
    """Return ``values`` of a model (array or CSR ``[n, ...]``) if all are finite, or of a dtype without NaN.

    Parameters
    ----------
    name, first
        Name of the values, and the row number of the first, for the message.

    Raises
    ------
    FloatingPointError
        A value is not finite (row and column named).

    Examples
    --------
    >>> import numpy as np
    >>> from distdiff.received import check_answer
    >>> check_answer(np.array([[0.0, 1.5]]), "mean")
    array([[0. , 1.5]])
    """
    data = values.data if hasattr(values, "indptr") else values
    if data.dtype.kind != "f":
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(data.sum()):
            return values
    if (bad := np.flatnonzero(~np.isfinite(data))).size:
        if hasattr(values, "indptr"):
            row, column = int(np.searchsorted(values.indptr, bad[0], "right")) - 1, int(values.indices[bad[0]])
        else:
            row, column = divmod(int(bad[0]), int(np.prod(values.shape[1:])))
        raise FloatingPointError(
            f"{name}: the model's answer for row {first + row}, column {column} is {data.flat[bad[0]]}, no finite "
            "number, and is not written; its weights are damaged or its training went wrong: take another model, or "
            "train again"
        )
    return values


def check_fit(tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that differ from ``like`` in names, shapes, or in being floating point.

    Raises
    ------
    ValueError
        The first that is missing, unknown or does not fit (named).

    Examples
    --------
    >>> import torch
    >>> from distdiff.received import check_fit
    >>> check_fit({"bias": torch.zeros(3)}, like={"bias": torch.zeros(2)})
    Traceback (most recent call last):
        ...
    ValueError: tensor bias has shape [3], [2] is wanted
    """
    for name, wanted in like.items():
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
        found = tensors[name]
        if found.shape != wanted.shape:
            raise ValueError(f"tensor {name} has shape {list(found.shape)}, {list(wanted.shape)} is wanted")
        if found.is_floating_point() != wanted.is_floating_point():
            raise ValueError(f"tensor {name} holds {found.dtype}, {wanted.dtype} is wanted")
    if unknown := sorted(set(tensors) - set(like)):
        raise ValueError(f"tensor {unknown[0]} is not part of this model")


def kind(value: Any) -> str:
    """The kind of a JSON value, in words.

    Examples
    --------
    >>> from distdiff.received import kind
    >>> kind([1, 2]), kind(None)
    ('a list', 'nothing')
    """
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a whole number",
             float: "a number", type(None): "nothing"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
