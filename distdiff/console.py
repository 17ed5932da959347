"""Parts of the command line that need no model: version, how much is printed, ``doctor``, ``config show``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

NAMES = {"help_option_names": ["-h", "--help"]}
"""Settings of the whole command line: ``-h`` is help, of every command."""


def _version(wanted: bool) -> None:
    if wanted:
        from distdiff.version import __version__

        typer.echo(f"distdiff {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Results and errors only: no bars, no warnings.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also notes, and the traceback of an error.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
    if quiet and verbose:
        raise ValueError("give --quiet or --verbose, not both")
    if quiet:
        _silence()
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("distdiff").setLevel(logging.DEBUG)
        os.environ["DISTDIFF_DEBUG"] = "1"


def _silence() -> None:
    """No progress bars and no warnings in this process."""
    import warnings

    from tqdm import tqdm

    warnings.simplefilter("ignore")
    logging.getLogger("distdiff").setLevel(logging.ERROR)
    shown = tqdm.__init__

    def hidden(bar: Any, *arguments: Any, **settings: Any) -> None:
        shown(bar, *arguments, **{**settings, "disable": True})

    # bars are made in many places, each with a ``disable`` of its own
    tqdm.__init__ = hidden  # type: ignore[method-assign, assignment]


def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON, a list.")] = False) -> None:
    """Look at this machine: versions, GPUs, kernels, processes, disk, MLflow, dask; leaves with 1 if one is missing."""
    from distdiff import doctor as clinic

    checks = clinic.examine()
    typer.echo(json.dumps(clinic.as_dicts(checks), indent=1) if as_json else clinic.text(checks))
    if clinic.needed(checks)["missing"]:
        raise typer.Exit(1)


def show(
    name: Annotated[str | None, typer.Argument(help="A config that ships with distdiff, or a YAML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, a list.")] = False,
) -> None:
    """Print every key of a config: value, default, type, help; without NAME the defaults and all kinds' options."""
    import dataclasses

    from distdiff import config, describe

    keys = describe.config_keys(name)
    alternatives = (
        describe.of_other_kinds({key.name.partition(".")[0]: key.kind for key in keys if key.kind}) if not name else []
    )
    if as_json:
        listed = [dataclasses.asdict(key) for key in [*keys, *alternatives]]
        typer.echo(json.dumps(listed, indent=1, default=lambda value: None if value is ... else str(value)))
        return
    typer.echo(describe.text(keys, alternatives))
    typer.echo(f"\nConfigs that ship with distdiff: {', '.join(config.shipped())}" if not name else "", nl=not name)


Flags = Mapping[str, tuple[str, str]]
"""Name of an option in Python -> its flag, and the flag that says no (or nothing)."""

VALUE = r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|[\w/.:%{}@-]*[\w/%}])"""


def flags_of(app: typer.Typer, words: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The options of the command that some words name."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    found: dict[str, tuple[str, str]] = {}
    for option in command.params:
        if option.param_type_name == "option":
            long = [word for word in option.opts if word.startswith("--")]
            found.setdefault(option.name, ((long or option.opts)[0], (*option.secondary_opts, "")[0]))
    return found


def in_flags(text: str, flags: Flags) -> str:
    """A message that names arguments as Python has them (``draws=3``, ``overwrite=True``) with the flags of a shell.

    Examples
    --------
    >>> from distdiff.console import in_flags
    >>> flags = {"overwrite": ("--overwrite", ""), "shard_cells": ("--shard-cells", ""), "layers": ("--layers", "")}
    >>> in_flags("give overwrite=True, a smaller shard_cells=, or layers=['mean', 'sd']", flags)
    'give --overwrite, a smaller --shard-cells, or --layers mean,sd'
    """

    def flag(at: re.Match[str]) -> str:
        yes, no = flags[at["name"]]
        value = at["value"] or ""
        if value == "True" or (value == "False" and no):
            return yes if value == "True" else no
        if value.startswith("["):
            value = ",".join(re.findall(r"[^\s,'\"\[\]]+", value))
        return f"{yes} {value.strip(chr(34) + chr(39))}".rstrip()

    if not flags:
        return text
    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))
    return re.sub(rf"(?<![\w.\-])(?P<name>{names})=(?P<value>{VALUE})?", flag, text)


@contextlib.contextmanager
def warnings_in_flags(flags: Flags) -> Iterator[None]:
    """What the library logs in here names arguments as the command line does."""

    def translated(record: logging.LogRecord) -> bool:
        record.msg, record.args = in_flags(record.getMessage(), flags), ()
        return True

    log = logging.getLogger("distdiff")
    log.addFilter(translated)
    try:
        yield
    finally:
        log.removeFilter(translated)


def add(app: typer.Typer) -> None:
    """Add these options and commands to the command line."""
    app.callback()(options)
    app.command()(doctor)
    configs = typer.Typer(no_args_is_help=True, help="Look at configs.")
    configs.command()(show)
    app.add_typer(configs, name="config")
