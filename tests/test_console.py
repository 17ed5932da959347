"""Parts of the command line that need no model, and what they print about configs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import yaml
from tqdm import tqdm
from typer.testing import CliRunner

import distdiff
from distdiff import cli, config, console, describe, doctor


def _run(*words, **options):
    return CliRunner().invoke(cli.app, list(words), **options)


def test_version_and_python_m():
    assert _run("--version").output == f"distdiff {distdiff.__version__}\n"
    out = subprocess.run([sys.executable, "-m", "distdiff", "--version"], check=True, capture_output=True, text=True)
    assert out.stdout == f"distdiff {distdiff.__version__}\n"


@pytest.mark.parametrize("words", [(), ("train",), ("store", "verify"), ("config", "show"), ("doctor",)])
def test_h_is_help_of_every_command(words):
    short, long = _run(*words, "-h"), _run(*words, "--help")
    assert short.exit_code == 0
    assert "Usage" in short.output
    assert short.output == long.output


def test_completion_names_the_commands():
    environment = {"_DISTDIFF_COMPLETE": "complete_bash", "COMP_WORDS": "distdiff imp", "COMP_CWORD": "1"}
    code = "from distdiff.cli import app; app(prog_name='distdiff')"
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert "impute" in out.stdout
    assert "train" not in out.stdout


@pytest.fixture
def restored(monkeypatch):
    """The process as it was: bars, levels, warnings."""
    monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)
    monkeypatch.delenv("DISTDIFF_DEBUG", raising=False)
    monkeypatch.setenv("DISTDIFF_DEBUG", "")
    logger = logging.getLogger("distdiff")
    before = logger.level
    with warnings.catch_warnings():
        yield logger
    logger.setLevel(before)


def test_quiet_hides_bars_and_warnings(restored, capsys):
    console.options(quiet=True)
    list(tqdm(range(3), disable=False))
    restored.warning("a warning")
    warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().err == ""
    restored.error("an error")
    assert restored.isEnabledFor(logging.ERROR)


def test_bars_are_shown_otherwise(restored, capsys):
    console.options()
    list(tqdm(range(3), disable=False))
    assert "3/3" in capsys.readouterr().err


def test_verbose_shows_notes_and_tracebacks(restored):
    console.options(verbose=True)
    assert restored.isEnabledFor(logging.DEBUG)
    with pytest.raises(ValueError, match="not both"):
        console.options(quiet=True, verbose=True)
    with pytest.raises(ValueError, match="no file and none of"):
        cli.main(["--verbose", "config", "show", "defalt"])


def test_a_mistake_is_one_sentence_without_verbose(restored, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["config", "show", "defalt"])
    assert leaving.value.code == 2
    assert "did you mean 'default'" in capsys.readouterr().err


def test_doctor_prints_lines_or_json_and_tells_by_its_status(monkeypatch):
    checks = [doctor.Check("torch", "look", "no GPU", "buy one")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    assert _run("doctor").output == doctor.text(checks) + "\n"
    found = _run("doctor", "--json")
    assert (found.exit_code, json.loads(found.output)) == (0, doctor.as_dicts(checks))
    checks.append(doctor.Check("packages", "missing", "numpy", "pip install numpy"))
    assert _run("doctor").exit_code == 1


# -- config show ----------------------------------------------------------------------------------------------------


def test_every_key_of_every_config_has_a_type_and_a_line_of_help():
    keys = [*describe.config_keys(), *describe.of_other_kinds({})]
    assert not [key.name for key in keys if not key.type]
    assert not [f"{key.name} ({key.kind})" for key in keys if not key.help]
    assert not [key.help for key in keys if "`" in key.help or "\n" in key.help or key.help != key.help.strip()]


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and prefix == "":
            yield from _flat(value, f"{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("name", sorted(config.shipped()))
def test_a_shipped_config_is_shown_whole(name):
    """Each key of the resolved config once, with its value; the defaults are those of an empty config."""
    resolved = dict(_flat(config.load(name).as_dict()))
    shown = {key.name: key.value for key in describe.config_keys(name)}
    assert shown == resolved
    assert [key.name for key in describe.config_keys(name)] == list(shown)  # none twice


def test_defaults_are_those_of_an_empty_config():
    empty = dict(_flat(config.load(None, ["data.store=x"]).as_dict()))
    for key in describe.config_keys():
        if key.default is not ...:
            assert json.loads(json.dumps(key.default)) == empty[key.name], key.name


def test_the_options_of_all_kinds_are_shown():
    keys = describe.of_other_kinds({"process": "counts"})
    kinds = {(key.name.partition(".")[0], key.kind) for key in keys}
    assert {("denoiser", "mlp"), ("denoiser", "transformer"), ("denoiser", "lsh"), ("process", "masked")} <= kinds
    assert ("process", "counts") not in kinds
    lsh = {key.name: key for key in keys if key.kind == "lsh"}
    assert lsh["denoiser.width"].help == next(
        k.help for k in keys if k.kind == "transformer" and k.name == "denoiser.width"
    )
    assert next(k.type for k in keys if k.kind == "blackout" and k.name == "process.weight") == "instantaneous | finite"


def test_config_show(tmp_path):
    out = _run("config", "show", "attention").output
    assert "denoiser: transformer" in out
    assert "denoiser.pack" in out
    assert "(default false)" in out
    assert "another kind" not in out
    everything = _run("config", "show").output
    assert "denoiser of another kind: denoiser.kind=transformer" in everything
    assert "attention" in everything.splitlines()[-1]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"data": {"store": "mine.zarr"}, "optim": {"lr": 0.5}}))
    listed = {key["name"]: key for key in json.loads(_run("config", "show", str(path), "--json").output)}
    assert listed["optim.lr"]["value"] == 0.5
    assert listed["optim.lr"]["default"] == 0.001
    assert listed["data.store"]["default"] is None


@pytest.mark.parametrize(
    ("docstring", "first"),
    [
        ("One. Two.", "One"),
        ("Of e.g. this, and ``that``. More.", "Of e.g. this, and that"),
        ("See :func:`~a.b.c`.\n\nMore.", "See c"),
        ("An address, tcp://...", "An address, tcp://..."),
        ("Two\nlines. More.", "Two lines"),
    ],
)
def test_first_sentence(docstring, first):
    assert describe._first(docstring) == first
