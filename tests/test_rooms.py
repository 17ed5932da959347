"""No module of distdiff reaches itself by imports, those inside functions and under TYPE_CHECKING included.

import-linter (pyproject.toml) sees circles of siblings; this test sees those of a package and its own modules as well.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).parents[1]


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted names of all modules of a package, and their files."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> dict[str, int]:
    """Modules of ``known`` that a module imports anywhere, and the line."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            named = [full if full in known else str(node.module) for full in named]
        else:
            continue
        found |= {full: node.lineno for full in named if full in known and full != name}
    return found


def circles(root: Path, package: str) -> list[str]:
    """A line for each import inside a strongly connected component of the graph of imports."""
    known = modules(root, package)
    edges = {name: imports(name, path, known) for name, path in known.items()}
    number = {name: i for i, name in enumerate(known)}
    pairs = [(number[a], number[b]) for a in edges for b in edges[a]]
    row, column = zip(*pairs, strict=True) if pairs else ((), ())
    graph = csr_matrix(([1] * len(pairs), (row, column)), shape=(len(known), len(known)))
    _, part = connected_components(graph, directed=True, connection="strong")
    return [
        f"{known[a].relative_to(root)}:{line} imports {b}"
        for a in edges
        for b, line in edges[a].items()
        if part[number[a]] == part[number[b]]
    ]


def test_there_is_no_circle():
    assert "distdiff.training.loop" in modules(ROOT, "distdiff")
    assert circles(ROOT, "distdiff") == []


@pytest.mark.parametrize(
    "inner",
    [
        "from p.b import x",
        "import p.b",
        "def f():\n    from p import b",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import x",
    ],
)
def test_a_circle_is_seen_wherever_its_imports_stand(tmp_path, inner):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text("")
    (tmp_path / "p" / "a.py").write_text(inner)
    (tmp_path / "p" / "b.py").write_text("from p.c import y\n")
    (tmp_path / "p" / "c.py").write_text("")
    assert circles(tmp_path, "p") == []
    (tmp_path / "p" / "c.py").write_text("from p.a import f\n")
    assert [line.split(":")[0] for line in circles(tmp_path, "p")] == ["p/a.py", "p/b.py", "p/c.py"]


def test_a_package_and_its_own_module_are_a_circle(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text("def f():\n    from p.a import g\n")
    (tmp_path / "p" / "a.py").write_text("from p import f\n")
    assert circles(tmp_path, "p") == ["p/__init__.py:2 imports p.a", "p/a.py:1 imports p"]
