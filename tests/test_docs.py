"""The site (docs/), and what stands around a package: citation, workflows, issue forms, the container."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import typer
import yaml

from distdiff import __version__, cli, component, config
from tests.scripts import loaded

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def generated():
    return loaded(DOCS / "generated.py")


def test_the_page_of_the_command_line_holds_every_command_and_option(generated):
    sections = dict(re.findall(r"^## (distdiff .+?)\n(.*?)(?=^## |\Z)", generated.command_line(), re.M | re.S))
    found = dict(generated.commands(typer.main.get_command(cli.app), ("distdiff",)))
    assert {" ".join(words) for words in found} == sections.keys()
    assert ("distdiff", "store", "verify") in found
    for words, command in found.items():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert all(option in sections[" ".join(words)] for option in parameter.opts), (words, parameter.opts)


def test_the_page_of_the_configuration_holds_every_key(generated):
    page = generated.configuration()
    for section, hint in typing.get_type_hints(config.Config).items():
        if dataclasses.is_dataclass(hint):
            assert not [f.name for f in dataclasses.fields(hint) if f"`{section}.{f.name}`" not in page]
    for section, base, _, given in config.SECTIONS:
        for kind in component.kinds(base):
            text = page.partition(f"### {section} {kind}\n")[2].partition("\n### ")[0]
            options = component.complete(base, {"kind": kind}, given=given)
            assert not [key for key in options if key != "kind" and f"`{section}.{key}`" not in text], kind


def test_every_page_stands_in_the_contents():
    contents = (DOCS / "index.md").read_text()
    listed = {
        path.relative_to(DOCS).as_posix()
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", contents, re.S)
        for line in tree.splitlines()
        if line and not line.startswith(":")
        for path in DOCS.glob(f"{line}.md")
    }
    written = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if "_build" not in p.parts}
    made = {"reference/cli.md", "reference/configuration.md"}
    assert written - made == listed - made - {"index.md"} | {"index.md"}
    assert "STORE.md" in listed


@pytest.mark.parametrize("path", sorted((DOCS / "tutorials").glob("*.md")), ids=lambda p: p.stem)
def test_tutorials_are_notebooks(path):
    text = path.read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["file_format"] == "mystnb"
    cells = re.findall(r"^```\{code-cell\} ipython3\n(?::tags: [^\n]*\n)?(.*?)^```$", text, re.M | re.S)
    assert len(cells) >= 4
    for cell in cells:  # lines for the shell begin with !
        compile(re.sub(r"^!.*$", "", cell, flags=re.M), str(path), "exec")


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_nb", "sphinx_book_theme")),
    reason="Sphinx is not installed: pip install 'distdiff[docs]'",
)
@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    """Tutorials do not run here; they do in ``sphinx-build -W docs build/site``, whose result $DISTDIFF_SITE names."""
    site = Path(os.environ.get("DISTDIFF_SITE") or tmp_path / "site")
    if "DISTDIFF_SITE" not in os.environ:
        done = subprocess.run(
            [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-d", tmp_path / "trees", DOCS, site],
            cwd=tmp_path, env=os.environ | {"DISTDIFF_DOCS_EXECUTE": "off", "PYTHONPATH": str(ROOT)}, text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (maths,) = (page.read_text() for page in site.glob("M*S.html"))
    assert maths.count('class="math notranslate') > 100
    assert "$$" not in re.sub(r"<script.*?</script>", "", maths, flags=re.S)


def test_versions_and_licences_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_pythons_that_are_tested_are_those_that_are_named():
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert set(jobs["tests"]["strategy"]["matrix"]["python"]) == named
    assert PROJECT["requires-python"] == f">={min(named, key=lambda v: int(v.split('.')[1]))}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_forms_and_workflows_are_whole(path):
    tree = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        for job in tree["jobs"].values():
            assert all("uses" in step or "run" in step for step in job["steps"])
            assert job["runs-on"]
    elif path.name != "config.yml":
        assert {"name", "description", "body"} <= tree.keys()
        ids = [part["id"] for part in tree["body"]]
        assert len(set(ids)) == len(ids)


def test_the_container_runs_without_root_and_writes_to_tmp_alone():
    text = (ROOT / "launch" / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["1000"]
    assert not [line for line in lines[lines.index("USER 1000") :] if line.startswith(("RUN", "COPY"))]
    (variables,) = [line.split()[1:] for line in lines if line.startswith("ENV")]
    folders = [
        value for name, _, value in (v.partition("=") for v in variables) if name == "HOME" or name.endswith("DIR")
    ]
    assert len(folders) >= 4
    assert all(folder.startswith("/tmp/") for folder in folders)
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1])
