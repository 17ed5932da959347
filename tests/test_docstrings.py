"""Docstrings of public names follow numpydoc: known sections in their order, parameters that exist."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import distdiff

validate = pytest.importorskip("numpydoc.validate", reason="needs numpydoc (pip install -e '.[dev]')").validate

CHECKED = {
    "GL01": "no text on the first line", "GL02": "ends in a blank line", "GL06": "an unknown section",
    "GL07": "sections out of order", "GL08": "no docstring", "PR02": "a parameter that the signature has not",
    "SS01": "no summary", "RT02": "a name and a type for one returned value",
}  # fmt: skip


def public() -> list[str]:
    """Dotted names of the public functions and classes of every module."""
    found = []
    for module in pkgutil.walk_packages(distdiff.__path__, "distdiff."):
        if module.name.rpartition(".")[2].startswith("_") or module.name in (
            "distdiff.rng.fused",
            "distdiff.tracking.pyfunc",
        ):
            continue
        try:
            loaded = importlib.import_module(module.name)
        except ImportError:
            continue
        for name, value in vars(loaded).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.name:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                found.append(f"{module.name}.{name}")
    return found


def faults(name: str) -> list[str]:
    return [f"{name}: {code} {text}" for code, text in validate(name)["errors"] if code in CHECKED]


def test_docstrings_of_public_names_follow_numpydoc():
    names = public()
    assert len(names) > 300
    assert not [fault for name in names for fault in faults(name)]


def sample(x: int) -> int:
    """Do something.

    Parameters
    ----------
    y
        No such parameter.
    """
    return x


def test_a_wrong_docstring_is_found():
    assert [fault.split()[1] for fault in faults(f"{__name__}.sample")] == ["PR02"]
