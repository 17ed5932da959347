"""The examples in docstrings and in the READMEs of the package run as they stand, and their number only grows.

An example may read ``atlas.zarr`` (a store of 199 cells x 30 genes, label ``cell_type``) and ``counts.h5ad`` (the file
that it was made of), and may write beside them: each module's examples run in a folder of their own.
"""

import ast
import doctest
import importlib
import io
import pkgutil
import re
import shutil
import warnings
from pathlib import Path

import pytest

import distdiff

ROOT = Path(distdiff.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "distdiff."))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

MOST_WITHOUT = 0.63
"""Share of public classes and functions that may lack an example; lower it when more of them have one."""


@pytest.fixture
def folder(atlas, counts, tmp_path, monkeypatch):
    shutil.copytree(atlas, tmp_path / "atlas.zarr")
    counts.write_h5ad(tmp_path / "counts.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failures(tests: list[doctest.DocTest]) -> str:
    """What the examples printed that they should not have, or nothing."""
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    for test in tests:
        runner.run(test, out=report.write)
    return report.getvalue()


@pytest.mark.parametrize("name", ["distdiff", *MODULES])
def test_examples_of_a_module_run(name, request):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library's own, of its import
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distdiff"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    if tests := [test for test in doctest.DocTestFinder().find(module) if test.examples]:
        request.getfixturevalue("folder")
        wrong = failures(tests)
        assert not wrong, wrong


@pytest.mark.parametrize("page", sorted(ROOT.rglob("README.md")), ids=lambda page: page.parent.name)
def test_the_example_of_a_readme_runs(page, folder):
    text = re.sub("^```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)  # a fence is no output
    test = doctest.DocTestParser().get_doctest(text, {}, str(page), str(page), 0)
    assert test.examples, f"{page} shows no example"
    wrong = failures([test])
    assert not wrong, wrong


def public(source: str) -> dict[str, bool]:
    """Public classes and functions of a module, and whether each shows an example (a class: in a method will do)."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            inside = [n for n in ast.walk(node) if isinstance(n, ast.ClassDef | ast.FunctionDef)]
            found[node.name] = any(">>>" in (ast.get_docstring(n) or "") for n in inside)
    return found


def test_most_public_names_show_an_example():
    shown = {}
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT)
        if not any(part.startswith("_") and part != "__init__.py" for part in inside.parts):
            shown |= {f"{inside}: {name}": has for name, has in public(path.read_text(encoding="utf-8")).items()}
    without = [name for name, has in shown.items() if not has]
    share = len(without) / len(shown)
    assert share <= MOST_WITHOUT, f"{share:.3f} of {len(shown)} public names show no example:\n" + "\n".join(without)


def test_a_wrong_example_is_found():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert "Expected:" in failures([test])


def test_examples_are_counted_in_methods_too():
    source = 'def f():\n    """>>> 1"""\nclass C:\n    def m(self):\n        """>>> 1"""\nclass D: ...\ndef _g(): ...\n'
    assert public(source) == {"f": True, "C": True, "D": False}
