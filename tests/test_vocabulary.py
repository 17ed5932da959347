"""One vocabulary: every option of a task has the same name and default on the command line and in Python."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from pathlib import Path

import pytest

import distdiff
from distdiff import cli, console
from distdiff.batch.tasks import ON_CELLS
from distdiff.data.ingest.shard import shard
from distdiff.model import Model

ROOT = Path(distdiff.__file__).parent

TASKS = {name: getattr(Model, name) for name in (*ON_CELLS, "generate")}
CALLS = {**TASKS, "evaluate": distdiff.evaluate, "check": distdiff.check, "certify": distdiff.certify,
         "panel": distdiff.panel, "de": distdiff.de, "shard": shard}  # fmt: skip

ON_FILES = {
    "context", "model", "data", "inputs", "out", "dtype", "sparse", "shard_cells", "precision", "scheduler", "workers",
    "verify", "repair", "overwrite", "trust",
}  # fmt: skip
"""Of what is written to disk, and of who computes it: nothing of this is there in memory."""

IN_MEMORY = {"self", "adata", "model", "data", "inputs", "out", "trust", "copy", "key_added", "progress"}
"""Of objects in memory; a bar is ``--quiet`` on the command line."""

OTHERWISE = {
    "shard": {"labels": ("", ()), "split": ("0.8,0.1,0.1", (0.8, 0.1, 0.1)),
              **dict.fromkeys(("block", "blocks_per_shard", "scheduler", "workers", "overwrite"), "alone")},
    "de": {"model_layer": "alone"},
}  # fmt: skip
"""Defaults that a shell writes otherwise, and what one of the two has alone."""


def options(function, but):
    function = inspect.signature(function, eval_str=False)
    return {p.name: p.default for p in function.parameters.values() if p.name not in but}


def command(name):
    return next(c.callback for c in cli.app.registered_commands if (c.name or c.callback.__name__) == name)


@pytest.mark.parametrize("name", CALLS)
def test_an_option_has_one_name_and_one_default(name):
    shell, python = options(command(name), ON_FILES), options(CALLS[name], IN_MEMORY)
    for option, how in OTHERWISE.get(name, {}).items():
        if how == "alone":
            shell.pop(option, None), python.pop(option, None)
        else:
            assert (shell.pop(option), python.pop(option)) == how
    assert shell == python


def test_every_task_of_the_command_line_is_looked_at():
    commands = [c.callback for c in cli.app.registered_commands]
    assert {c.__name__ for c in commands if "shard_cells" in inspect.signature(c).parameters} == set(TASKS)


def texts(path):
    """String constants of a module that are no docstrings, pieces of f-strings joined."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            docs |= {id(part) for part in node.values}
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


SHELL_ALONE = {"cli.py", "console.py", "quickstart.py", "doctor.py", "launched.py", "versions.py", "foreign.py"}
COMMAND = re.compile(r"(distdiff [a-z]+|command with|command again without)[^.;]* --|^--[\w-]+$|^shard --overwrite$")


def test_the_library_names_arguments_as_python_does():
    """A flag stands only in a whole command line (the command line translates the rest)."""
    found = [
        (str(path.relative_to(ROOT)), text)
        for path in sorted(ROOT.rglob("*.py"))
        if path.name not in SHELL_ALONE
        for text in texts(path)
        if re.search(r"(^|[\s(])--[a-z]", text) and not COMMAND.search(text)
    ]
    assert not found


FLAGS = {**console.flags_of(cli.app, ["impute"]), **console.flags_of(cli.app, ["deepen"])}


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("give overwrite=True to replace it", "give --overwrite to replace it"),
        ("write it dense (sparse=False), or as dtype='float32'", "write it dense (--dense), or as --dtype float32"),
        ("layers=['mean', 'q5'] holds", "--layers mean,q5 holds"),
        ("a smaller shard_cells= or batch_size=; go on", "a smaller --shard-cells or --batch-size; go on"),
        ("train.batch=128 and denoiser.width=8 stay", "train.batch=128 and denoiser.width=8 stay"),
        ("out=/a/b.zarr lies inside", "--out /a/b.zarr lies inside"),
        ("times=3", "--times 3"),
    ],
)
def test_arguments_become_flags(python, shell):
    assert console.in_flags(python, FLAGS) == shell


def test_errors_and_warnings_of_the_command_line_have_flags(counts, atlas, tmp_path, capfd, caplog):
    spec = distdiff.CountStore.open(atlas).spec(("cell_type",))
    model = Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    model.save(tmp_path / "m")
    (tmp_path / "a.h5ad").touch()
    given = ["denoise", "--model", str(tmp_path / "m"), "--data", str(atlas), "--out", str(tmp_path / "a.h5ad")]
    with pytest.raises(SystemExit):
        cli.main(given)
    assert "give --overwrite to replace it" in capfd.readouterr().err
    with pytest.raises(FileExistsError, match="give overwrite=True to replace it"):
        distdiff.batch.run("denoise", model, atlas, tmp_path / "a.h5ad", progress=False)
    with pytest.raises(SystemExit):
        cli.main(["impute", *given[1:-1], str(tmp_path / "b.h5ad")])
    told = capfd.readouterr().err
    assert len(told.splitlines()) == 3  # which task do you want?
    assert "give --mask" in told
    assert "--sites dropout with --groups" in told
    with console.warnings_in_flags(FLAGS), caplog.at_level(logging.WARNING, "distdiff"):
        logging.getLogger("distdiff").warning("unseen=%r is an option", "refuse")
    assert caplog.messages == ["--unseen refuse is an option"]
