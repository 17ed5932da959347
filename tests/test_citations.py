"""Every citation resolves: equations of docs/MATHS.md, the functions it names, and the links and paths of the pages.

The rules are plain functions of a :class:`Tree`, so that they are tried on small trees with planted faults as well.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
MATHS = "docs/MATHS.md"
CODE = ("distdiff/", "configs/", "benchmarks/", "data_prep/", "launch/")
NO_TEXT = {".gz", ".json", ".png", ".pyc"}
UNREAD = {"tests/test_citations.py", "CHANGELOG.md"}  # planted faults; history, which names files as they were

NUMBER = r"\d{1,2}(?:\.\d{1,2})?"
GAP = r"[\s#]+"  # a citation may go on in the next line, and there behind a comment's sign
CITATION = re.compile(rf"docs/MATHS\.md{GAP}({NUMBER}(?:(?:\s?-\s?|,{GAP}|{GAP}and{GAP}){NUMBER})*)(?![\d%])")
BARE = re.compile(rf"\(({NUMBER}(?:(?:-|, ){NUMBER})*)\)")
HEADING = re.compile(rf"^#{{2,3}} ({NUMBER}) .+$", re.MULTILINE)
PATH = re.compile(
    r"(?<![\w/.~-])(?<!--out )(?<!> )"  # what a command writes need not be there
    r"((?:\.ci|benchmarks|configs|data_prep|distdiff|docs|launch|results|tests)/[\w./*-]*\w)(?![\w<{/])"
)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")

TO_COME = {  # named in examples, or written once a GPU is there
    "configs/mine.yaml", "distdiff/process/poisson.py", "benchmarks/gpu/results.json",
    "docs/reference/cli.md", "docs/reference/configuration.md",  # made by docs/generated.py
}  # fmt: skip

UNPUBLISHED = {
    "MATHS without docs/": re.compile(r"(?<!docs/)(?<!\]\()\bMATHS\b"),
    "a working note": re.compile(r"\b(?:EVIDENCE|REFERENCE|FIELD)\b|\b(?:IO|DESIGN|STACK)\.md\b|\blessons? \d"),
    "a paper's short name": re.compile(r"\b(?:CD|ID) (?:(?:eq\.|[Aa]lgorithm|section) ?\(?\d|[A-E]\.\d|\d+\.\d)"),
}


@dataclass(frozen=True)
class Tree:
    """The text files of a repository, by their path from its root."""

    root: Path
    files: dict[str, str]

    @cached_property
    def notes(self) -> dict[str, str]:
        """What a file says to its reader: comments and strings of Python, the whole text of others."""
        return {path: _said(text) if path.endswith(".py") else text for path, text in self.files.items()}

    @cached_property
    def entries(self) -> dict[str, str]:
        """Number -> text of each section and equation of the page, up to the next heading."""
        page = self.files[MATHS]
        found = [*HEADING.finditer(page)]
        ends = [*(m.start() for m in found[1:]), len(page)]
        return {m[1]: page[m.start() : end] for m, end in zip(found, ends, strict=True)}

    def exists(self, path: str, base: str = "") -> bool:
        """Whether there is such a file or folder; ``*`` stands for any name."""
        folder = self.root / base
        return any(folder.glob(path)) if "*" in path else (folder / path).exists()


def repository() -> Tree:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = listed.splitlines()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        folders = (".ci", "docs", "tests", *CODE)
        paths = [str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*")]
        paths += [p.name for p in ROOT.iterdir()]
    files = {}
    for path in paths:
        if path not in UNREAD and Path(path).suffix not in NO_TEXT and (ROOT / path).is_file():
            files[path] = (ROOT / path).read_text()
    return Tree(ROOT, files)


def _said(text: str) -> str:
    kept = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.COMMENT))
    return "\n".join(t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in kept)


def cited(text: str) -> Iterator[str]:
    """The numbers that a text cites; a range of equations is all of them."""
    for found in CITATION.finditer(text):
        yield from _spread(found[1])


def _spread(numbers: str) -> Iterator[str]:
    for part in re.split(rf",{GAP}|{GAP}and{GAP}", numbers):
        first, _, last = (s.strip() for s in part.partition("-"))
        if not last:
            yield first
        elif "." in first and first.split(".")[0] == last.split(".")[0]:
            section = first.split(".")[0]
            yield from (f"{section}.{n}" for n in range(int(first.split(".")[1]), int(last.split(".")[1]) + 1))
        else:
            yield from (str(n) for n in range(int(first.split(".")[0]), int(last.split(".")[0]) + 1))


def numbers_exist(tree: Tree) -> Iterator[str]:
    for path, text in tree.notes.items():
        for number in cited(text):
            if number not in tree.entries:
                yield f"{path} cites docs/MATHS.md {number}, which is no heading there"


def headings_are_in_order(tree: Tree) -> Iterator[str]:
    numbers = [m[1] for m in HEADING.finditer(tree.files[MATHS])]
    if numbers != sorted(set(numbers), key=lambda n: [int(part) for part in n.split(".")]):
        yield f"{MATHS}: its numbers do not rise, or one is there twice: {', '.join(numbers)}"


def entries_are_whole(tree: Tree) -> Iterator[str]:
    for number, text in tree.entries.items():
        if "." in number or "$$" in text:
            for part in ("$$", "- In words:", "- Source:", "- Computed by:"):
                if part not in text:
                    yield f"docs/MATHS.md {number} lacks {part!r}"


def functions_cite_back(tree: Tree) -> Iterator[str]:
    for number, text in tree.entries.items():
        line = re.search(r"- Computed by:(.*?)(?=\n- |\n\n|\Z)", text, re.DOTALL)
        names = re.findall(r"`([^`]+)`", line[1]) if line else []
        if line and not names and "nothing" not in line[1]:
            yield f"docs/MATHS.md {number} is computed by nothing that it names, and does not say so"
        for name in names:
            if (source := definition(tree, name)) is None:
                yield f"docs/MATHS.md {number} is computed by {name}, which is not defined there"
            elif number not in cited(source):
                yield f"{name} computes docs/MATHS.md {number} and does not cite it"


def definition(tree: Tree, name: str) -> str | None:
    """Source of a function, class or method, where it is defined (no import is followed)."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        stem = "/".join(parts[:n])
        text = tree.files.get(f"{stem}.py") or tree.files.get(f"{stem}/__init__.py")
        if text is None:
            continue
        node: ast.AST | None = ast.parse(text)
        for part in parts[n:]:
            node = next((child for child in getattr(node, "body", ()) if getattr(child, "name", None) == part), None)
        return None if node is None else ast.get_source_segment(text, node)
    return None


def equations_are_used(tree: Tree) -> Iterator[str]:
    used = {n for path, text in tree.notes.items() if path.startswith(CODE) for n in cited(text)}
    for number, text in tree.entries.items():
        if "$$" in text and (number in used) == ("- Not cited:" in text):
            yield f"docs/MATHS.md {number} is {'cited, and denies it' if number in used else 'not cited, nor says why'}"


def only_published_sources(tree: Tree) -> Iterator[str]:
    for path, text in tree.notes.items():
        for what, pattern in UNPUBLISHED.items():
            for found in pattern.finditer(text):
                yield f"{path} cites {what}: {_around(text, found)!r}"
        if path.endswith(".py"):
            for found in BARE.finditer(text):
                if all("." in n and n in tree.entries for n in _spread(found[1])):
                    yield f"{path}: {found[0]} reads as an equation; cite it as docs/MATHS.md {found[1]}"


def _around(text: str, found: re.Match[str]) -> str:
    return text[max(0, found.start() - 25) : found.end() + 25].replace("\n", " ")


def links_lead_somewhere(tree: Tree) -> Iterator[str]:
    for page, text in tree.files.items():
        if not page.endswith(".md"):
            continue
        for target in LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            if path and not tree.exists(path, str(Path(page).parent)):
                yield f"{page} links to {target}, which is not there"
            elif anchor and (not path or path.endswith(".md")):
                other = (tree.root / Path(page).parent / path) if path else tree.root / page
                if anchor not in anchors(other.read_text()):
                    yield f"{page} links to {target}: that page has no such heading"


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def paths_exist(tree: Tree) -> Iterator[str]:
    """Paths that pages name; in code, those of pages and of measurements."""
    for page, text in tree.notes.items():
        for path in PATH.findall(text):
            measured = re.match(r"docs/.*\.md$|benchmarks/.*\.(json|png|md|py)$", path)
            there = path in TO_COME or tree.exists(path) or tree.exists(path, "benchmarks")
            if (page.endswith(".md") or measured) and not there:
                yield f"{page} names {path}, which is not there"


RULES: tuple[Callable[[Tree], Iterator[str]], ...] = (
    numbers_exist, headings_are_in_order, entries_are_whole, functions_cite_back, equations_are_used,
    only_published_sources, links_lead_somewhere, paths_exist,
)  # fmt: skip


@pytest.fixture(scope="module")
def tree():
    return repository()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_citations_of_this_repository(tree, rule):
    found = [*rule(tree)]
    assert not found, "\n".join(found)


PLANTED = {
    MATHS: """# Maths

## 2 Counts

### 2.1 Death

$$n$$

- In words: one dies.
- Source: a paper.
- Computed by: nothing.
- Not cited: it has no function.

### 2.2 Kept

$$x$$

- In words: each is kept.
- Source: [the guide](GUIDE.md#how-to-thin).
- Computed by: `distdiff.law.Law.forward`, `distdiff.law.share`
""",
    "docs/GUIDE.md": """# Guide

## How to *thin*

See [2.2](MATHS.md#22-kept), `results/a.json` and `distdiff/law.py`.
""",
    "distdiff/law.py": '''"""A law (docs/MATHS.md 2); measured in benchmarks/results/*.json."""


def share():
    # (docs/MATHS.md
    # 2.2)
    return 0.5


class Law:
    def forward(self):
        """``x`` (docs/MATHS.md 2.2)."""
''',
    "benchmarks/results/a.json": "{}",
}


def _planted(folder: Path, file: str = "", old: str = "", new: str = "") -> list[str]:
    files = dict(PLANTED)
    if file:
        assert old in files[file], "the fault must be planted where it changes something"
        files[file] = files[file].replace(old, new, 1)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return [fault for rule in RULES for fault in rule(Tree(folder, files))]


def test_a_sound_tree_has_no_fault(tmp_path):
    assert _planted(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("distdiff/law.py", "(docs/MATHS.md 2)", "(docs/MATHS.md 2, 2.2 and\n3)", "cites docs/MATHS.md 3,"),
        ("distdiff/law.py", "(docs/MATHS.md 2)", "(docs/MATHS.md 2.1-2.4)", "cites docs/MATHS.md 2.4,"),
        ("distdiff/law.py", "# 2.2)", "# 2.3)", "cites docs/MATHS.md 2.3,"),
        ("docs/GUIDE.md", "See ", "See docs/MATHS.md 7 and ", "docs/GUIDE.md cites docs/MATHS.md 7,"),
        (MATHS, "### 2.2 Kept", "### 2.1 Kept", "do not rise"),
        (MATHS, "- In words: each is kept.\n", "", "2.2 lacks '- In words:'"),
        (MATHS, "\n$$x$$\n", "\n", "2.2 lacks '$$'"),
        (MATHS, "Law.forward", "Law.backward", "Law.backward, which is not defined"),
        (MATHS, "distdiff.law.share", "distdiff.laws.share", "distdiff.laws.share, which is not defined"),
        (MATHS, "Computed by: nothing", "Computed by: hand", "2.1 is computed by nothing that it names"),
        ("distdiff/law.py", "``x`` (docs/MATHS.md 2.2)", "``x``", "Law.forward computes docs/MATHS.md 2.2 and"),
        (MATHS, "- Not cited: it has no function.\n", "", "2.1 is not cited, nor says why"),
        ("distdiff/law.py", "(docs/MATHS.md 2)", "(docs/MATHS.md 2.1)", "2.1 is cited, and denies it"),
        ("distdiff/law.py", "A law (docs/", "A law (", "MATHS without docs/"),
        ("docs/GUIDE.md", "See ", "See MATHS 2.2, ", "MATHS without docs/"),
        ("distdiff/law.py", "A law", "A law (EVIDENCE)", "a working note"),
        ("distdiff/law.py", "A law", "A law (ours; FIELD E8)", "a working note"),
        ("distdiff/law.py", "# 2.2)", "# 2.2; REFERENCE 1.2)", "a working note"),
        ("docs/GUIDE.md", "See ", "See IO.md, ", "a working note"),
        ("docs/GUIDE.md", "See ", "See (lesson 5), ", "a working note"),
        ("distdiff/law.py", "A law", "A law (CD 3.6)", "a paper's short name"),
        ("distdiff/law.py", "A law", "A law (CD eq. 6)", "a paper's short name"),
        ("distdiff/law.py", "A law", "A law (CD B.2)", "a paper's short name"),
        ("distdiff/law.py", "A law", "A law (ID Algorithm 1)", "a paper's short name"),
        ("distdiff/law.py", "A law", "A law, as (2.2) says", "(2.2) reads as an equation"),
        ("docs/GUIDE.md", "MATHS.md#22-kept", "MATH.md#22-kept", "links to MATH.md#22-kept, which is not there"),
        ("docs/GUIDE.md", "#22-kept", "#22-lost", "no such heading"),
        ("docs/GUIDE.md", "distdiff/law.py", "distdiff/laws.py", "names distdiff/laws.py"),
        ("docs/GUIDE.md", "results/a.json", "results/b.json", "names results/b.json"),
        ("distdiff/law.py", "results/*.json", "results/b*.json", "names benchmarks/results/b*.json"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(tmp_path, file, old, new, told):
    assert any(told in fault for fault in _planted(tmp_path, file, old, new))


@pytest.mark.parametrize(
    "text",
    ["CD4 T cells and CD 8, IO errors, an ID of 5", "an HTTP FIELDS list", "half (0.5), all (1.0), [b g]",
     "REFERENCES, field, evidence, reference", "X-DISTDIFF_REFERENCE", "see docs/MATHS.md"],
)  # fmt: skip
def test_words_that_are_no_citation_pass(tmp_path, text):
    assert _planted(tmp_path, "distdiff/law.py", "A law", f"A law: {text}") == []


def test_variances_that_the_page_tells_of_plain_walks():
    """docs/MATHS.md 4.7: the law of the state after each step, summed over all states."""
    page = (ROOT / MATHS).read_text()
    told = re.search(r"walks of ([\d, and]+) steps end with variances of ([\d., and]+)\(", page)
    steps, variances = (re.findall(r"\d+(?:\.\d+)?", part) for part in (told[1], told[2]))
    assert len(steps) == 5
    assert [f"{_variance(int(k)):.1f}" for k in steps] == variances


def _variance(steps: int, mean: float = 2.0, variance: float = 7.71, top: int = 120) -> float:
    size, x = mean**2 / (variance - mean), np.arange(top)
    p = np.cos(np.pi / 2 * np.linspace(1, 0, steps + 1)) ** 2
    p[0], p[-1] = 0.0, 1.0
    law = np.eye(1, top)[0]
    for p_t, p_s in itertools.pairwise(p):
        f = (1 - p_t) * (x + size) / (p_t + size / mean)
        low, beta = np.floor(f), (p_s - p_t) / (1 - p_t)
        born = x[None, :] - x[:, None]
        moved = (1 - f + low)[:, None] * stats.binom.pmf(born, low[:, None], beta)
        law = law @ (moved + (f - low)[:, None] * stats.binom.pmf(born, low[:, None] + 1, beta))
    return float(law @ x**2 - (law @ x) ** 2)
