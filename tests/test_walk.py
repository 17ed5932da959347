"""The README and every page of docs/ are walked: their shell and Python blocks run in order, in an empty folder.

A page begins with what ``distdiff quickstart`` made. ``pip`` and ``pytest`` are stand-ins that do nothing, and of the
thousands of cells of a training (``cells=40_000``) a tenth is trained on. A block
after ``<!-- not run: REASON -->`` is not run (a comment is invisible on the page); its commands are parsed, and the
files that it names must exist. Blocks of tutorials (``{code-cell}``) run when the site is built.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
CLONE = ("benchmarks", "configs", "data_prep", "launch")  # folders of a clone that commands name
FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=ticks)[ ]*$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")
SHELL, PYTHON = {"bash", "sh", "shell", "console"}, {"python", "py"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``reason``: why it is not run."""

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    found = []
    for fence in FENCE.finditer(text):
        language = fence["language"].strip().lower()
        if language in SHELL | PYTHON:
            marker = MARKER.search(text, 0, fence.start())
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(page, line, language, fence["text"], marker["reason"] if marker else ""))
    return found


def shorter(text: str) -> str:
    """The block with trainings of a tenth of the cells, as docs/conf.py does with tutorials."""
    return re.sub(r"(\bcells=\d+_\d\d)0\b", r"\1", text)


def commands(block: Block) -> Iterator[list[str]]:
    """Words of every command line of a shell block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;(?=\s)", line):
            words = shlex.split(part.strip().removeprefix("$ "), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


def parse(words: list[str]) -> None:
    """Let the command line read, and not run, what ``distdiff`` is given."""
    import typer

    from distdiff.cli import app

    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            raise ValueError(f"distdiff has no command {words[:1]}")
        command = command.commands[words.pop(0)]
    if "--help" not in words:
        command.make_context(command.name, words)


def of_distdiff(words: list[str]) -> list[str]:
    """The words for ``distdiff`` in a command, if it has any."""
    if words[0] == "distdiff":
        return words[1:]
    for script, task in (("launch/train.py", "train"), ("train.sbatch", "train"), ("launch/impute.py", "impute")):
        for place, word in enumerate(words):
            if word.endswith(script):
                return [task, *words[place + 1 :]]
    return []


def faults(block: Block) -> Iterator[str]:
    """What is wrong with a block, without running it."""
    if block.language in PYTHON:
        try:
            compile(block.text, str(block), "exec")
        except SyntaxError as error:
            yield f"{block}: {error}"
        return
    for words in commands(block):
        for word in words:
            value = word.partition("=")[2] or word
            if value.split("/")[0] in CLONE and "/" in value and not (ROOT / value).exists():
                yield f"{block} names {value}, which is not there"
        ours = of_distdiff(words)
        if ours and ours != ["--help"]:
            try:
                parse(ours)
            except Exception as error:
                yield f"{block}: {shlex.join(words)}: {error}"


READ = [block for path in PAGES for block in blocks(str(path.relative_to(ROOT)), path.read_text())]


@pytest.mark.parametrize("page", sorted({block.page for block in READ}))
def test_commands_are_known_and_files_exist(page):
    assert not [fault for block in READ if block.page == page for fault in faults(block)]


def test_extras_that_pages_name_exist():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        (str(path.relative_to(ROOT)), extra.strip())
        for path in PAGES
        for extras in re.findall(r"(?:distdiff|install -e '?\.)\[([\w, ]+)\]", path.read_text())
        for extra in extras.split(",")
    }
    assert named
    assert not [(page, extra) for page, extra in named if extra not in known]


def test_the_doctor_knows_every_extra():
    from distdiff.doctor import EXTRAS

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) == set(known) - {"test", "dev", "docs"}


PLANTED = """
# Page

```bash
distdiff train --config default data.store=mine.zarr
```

<!-- not run: needs SLURM -->
```bash
sbatch --nodes=4 launch/slurm/train.sbatch --config configs/pbmc68k.yaml
```

```python
1 + 1
```
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("--config default", "--confg default", "confg"),
        ("distdiff train", "distdiff trian", "no command"),
        ("train.sbatch --config", "train.sbatch --confgi", "confgi"),
        ("launch/slurm/train.sbatch", "launch/slurm/trian.sbatch", "not there"),
        ("configs/pbmc68k.yaml", "configs/pbmc.yaml", "not there"),
        ("1 + 1", "1 +", "invalid syntax"),
    ],
)
def test_planted_faults_are_found(old, new, told):
    sound = blocks("page.md", PLANTED)
    assert [block.reason for block in sound] == ["", "needs SLURM", ""]
    assert not [fault for block in sound for fault in faults(block)]
    assert told in " ".join(fault for block in blocks("page.md", PLANTED.replace(old, new)) for fault in faults(block))


# -- the walk ------------------------------------------------------------------------------------------------------

SESSION = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(json.loads(line), "<block>", "exec"), names)
        answer = ""
    except BaseException:
        answer = traceback.format_exc()
    sys.stdout.flush()
    print(json.dumps(answer), file=sys.stderr, flush=True)
"""
"""Runs the Python blocks of a page one after the other, with the same variables."""


READY = """
import json, os, socket, sys
import matplotlib.backends.backend_agg, mlflow, torch._dynamo
import distdiff.batch, distdiff.cli, distdiff.experiment, distdiff.tasks.measure
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    begun = 0
    while True:
        client, _ = listener.accept()
        while begun and os.waitpid(-1, os.WNOHANG)[0]:
            begun -= 1
        if os.fork():  # this server goes on
            client.close()
            begun += 1
            continue
        asked, outs, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if command := os.fork():  # this process waits for the command
            client.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
            os._exit(0)
        break
listener.close(), client.close()
words, folder, environment = json.loads(asked)
for number, out in enumerate(outs):
    os.dup2(out, number)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
sys.argv = ["distdiff", *words]
distdiff.cli.main()
"""
"""Has imported what commands import, and forks a process for each: a page has many, and an import takes seconds."""

ASK = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    asked = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [asked], [0, 1, 2])
    sys.exit(int(server.recv(9) or 1))
"""


@pytest.fixture(scope="session")
def ready(tmp_path_factory):
    """Socket of a server that runs commands of ``distdiff``."""
    folder = Path(tempfile.mkdtemp())  # a short path, as sockets need
    (folder / "ask.py").write_text(ASK)
    with subprocess.Popen([sys.executable, "-c", READY, folder / "socket"], cwd=folder, env=clean()) as server:
        while not (folder / "socket").exists():
            assert server.poll() is None
            time.sleep(0.05)
        yield f'exec "{sys.executable}" -IS "{folder}/ask.py" "{folder}/socket" "$@"\n'
        server.kill()
    shutil.rmtree(folder)


def environment(folder: Path, quickstart: Path | None, real: str = "") -> dict[str, str]:
    """A PATH that begins with stand-ins for what must not or need not run again; ``real``: how distdiff is started."""
    bin_ = folder / ".bin"
    bin_.mkdir()
    real = real or f'exec "{sys.executable}" -c "from distdiff.cli import main; main()" "$@"\n'
    made = "" if quickstart is None else f'[ "$*" = quickstart ] && exec cp -a "{quickstart}/." .\n'
    for name, text in (("distdiff", made + real), ("pip", "exit 0\n"), ("pytest", "exit 0\n")):
        (bin_ / name).write_text(f"#!/bin/bash\n{text}")
        (bin_ / name).chmod(0o755)
    return clean() | {"PATH": f"{bin_}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def clean() -> dict[str, str]:
    """The environment without what tests and users set for themselves."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DISTDIFF_"))} | {
        "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg", "TQDM_DISABLE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def walk(page: str, folder: Path, quickstart: Path, ready: str = "") -> None:
    """Run the blocks of a page in order, in ``folder``."""
    for name in CLONE:
        (folder / name).symlink_to(ROOT / name)
    if page != "README.md":  # which makes it itself
        shutil.copytree(quickstart, folder, dirs_exist_ok=True)
    env = environment(folder, quickstart, ready)
    with subprocess.Popen(
        [sys.executable, "-c", SESSION], cwd=folder, env=env, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as session:  # fmt: skip
        for block in (b for b in READ if b.page == page and not b.reason):
            if block.language in SHELL:
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", shorter(block.text)], cwd=folder, env=env, text=True,
                    capture_output=True, timeout=900,
                )  # fmt: skip
                assert done.returncode == 0, f"{block}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
                continue
            session.stdin.write(json.dumps(shorter(block.text)) + "\n")
            session.stdin.flush()
            for line in session.stderr:
                if line.startswith('"'):
                    assert not (failed := json.loads(line)), f"{block}\n{block.text}\n{failed}"
                    break
            else:
                pytest.fail(f"{block}: Python ended\n{block.text}")
        session.stdin.close()


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A folder in which the README's ``distdiff quickstart`` ran: $DISTDIFF_WALK_QUICKSTART, else a new one."""
    if made := os.environ.get("DISTDIFF_WALK_QUICKSTART"):
        return Path(made)
    folder, elsewhere = tmp_path_factory.mktemp("quickstart"), tmp_path_factory.mktemp("stand-ins")
    done = subprocess.run(
        ["distdiff", "quickstart"], cwd=folder, env=environment(elsewhere, None), text=True, capture_output=True,
        timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_makes_what_it_says(quickstart):
    folder = quickstart / "distdiff-quickstart"
    pictures = [f"figures/{name}.png" for name in ("umap", "markers", "violins", "genes", "depth")]
    for name in (*pictures, "imputed.h5ad", "run/evaluation/calibration.png", "run/evaluation/table.md"):
        assert (folder / name).stat().st_size > 1000
    assert "distdiff mean is first in Poisson deviance" in (folder / "run/evaluation/table.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted({block.page for block in READ if not block.reason}))
def test_a_page_can_be_walked(page, quickstart, ready, tmp_path):
    walk(page, tmp_path, quickstart, ready)


@pytest.mark.parametrize("text", ["```bash\nfalse\ntrue\n```", "```python\nx = 1\n```\n\n```python\nx.missing\n```"])
def test_a_block_that_fails_fails_the_walk(monkeypatch, tmp_path, text):
    monkeypatch.setattr(sys.modules[__name__], "READ", blocks("README.md", text))
    with pytest.raises(AssertionError, match=r"README\.md:"):
        walk("README.md", tmp_path, tmp_path)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900
