"""Names say what they hold: words that say nothing of the value are no names of functions, arguments or variables."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "distdiff"

RIDDLES = {
    "there", "said", "told", "tells", "left", "also", "place", "point", "Job", "Filled", "taken", "odd", "others",
    "asks", "somebody", "say",
}  # fmt: skip

LATER: tuple[str, ...] = ()
"""Files and folders of distdiff/ that are not held to this yet; the list only gets shorter."""


def names_given(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of everything that a module names: functions, classes, arguments, attributes and variables."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            found.append((node.lineno, node.arg))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append((node.lineno, node.id))
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.append((node.lineno, node.name))
        elif isinstance(node, ast.alias) and node.asname:
            found.append((node.lineno, node.asname))
    return found


def riddles(source: str) -> list[str]:
    return [f"{line}: {name}" for line, name in names_given(ast.parse(source)) if name in RIDDLES]


def later(path: Path) -> bool:
    inside = path.relative_to(SOURCE)
    return any(inside == Path(listed) or Path(listed) in inside.parents for listed in LATER)


def module_id(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@pytest.mark.parametrize("path", sorted(p for p in SOURCE.rglob("*.py") if not later(p)), ids=module_id)
def test_names_say_what_they_hold(path):
    assert not riddles(path.read_text(encoding="utf-8")), "give each a name that says what the value is"


def test_every_exempt_path_still_needs_it():
    done = [listed for listed in LATER if not any(riddles(p.read_text(encoding="utf-8")) for p in _under(listed))]
    assert not done, f"no riddles are left in {done}: take them out of LATER"


def _under(listed: str) -> list[Path]:
    path = SOURCE / listed
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize(
    "source",
    ["def said(): ...", "class Job: ...", "def f(there): ...", "self.left = 1", "for place in x: ...", "a, told = 1, 2",
     "point: int = 0", "with f() as odd: ...", "import x as others", "[1 for say in x]", "lambda taken: 1",
     "async def also(): ...", "(left := 1)", "def f(*others, **told): ..."],
)  # fmt: skip
def test_each_way_of_naming_is_seen(source):
    assert riddles(source)


@pytest.mark.parametrize("source", ["x.left", "f(place=1)", "leftover = 1", "'there'", "remaining, existing = 1, 2"])
def test_other_code_is_not(source):
    assert not riddles(source)
