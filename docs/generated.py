"""Pages that are made from the code: ``reference/cli.md`` from the command line, ``reference/configuration.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from distdiff import cli, config, describe

NOTE = "<!-- made by docs/generated.py when the site is built; do not edit -->\n"


def write(folder: Path) -> None:
    """Write both pages, where they changed."""
    for name, text in (("cli.md", command_line()), ("configuration.md", configuration())):
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


# -- the command line ----------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options."""
    parts = [
        f"{NOTE}# Command line\n\nEvery command, as `distdiff COMMAND --help` prints it. `~` at the start of a path is "
        "the home folder."
    ]
    for words, command in commands(typer.main.get_command(cli.app), ("distdiff",)):
        parts.append(f"## {' '.join(words)}\n\n{_cell(command.help or '')}")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        line = [*words, *(_placeholder(p) for p in arguments), *(["[OPTIONS]"] if options else [])]
        parts.append(f"```text\n{' '.join(line)}\n```")
        rows = [(f"`{_placeholder(p)}`", "", _cell(getattr(p, "help", "") or "")) for p in arguments]
        rows += [(_names(p), _default(p), _cell(p.help or "")) for p in options]
        if rows:
            parts.append(table(("option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of a typer application, groups left out."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*words, name))
    else:
        yield words, command


def _placeholder(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name or "").upper()
    return name + ("..." if parameter.nargs != 1 or getattr(parameter, "multiple", False) else "")


def _names(option: Any) -> str:
    words = "/".join([*option.opts, *option.secondary_opts])
    return f"`{words}`" + (" (required)" if option.required else "")


def _default(option: Any) -> str:
    value = option.default
    if value is None or option.required or value is ... or callable(value) or "UNSET" in repr(value):
        return ""
    return f"`{value}`" if value != "" else ""


# -- the configuration ---------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of every section, and the options of every process and denoiser."""
    keys = describe.config_keys()
    parts = [
        f"{NOTE}# Configuration\n\nOne YAML file is one experiment: `distdiff train --config NAME section.key=value "
        "...`, with the name of a configuration or a file. In Python every key is a keyword of `distdiff.train`. "
        "Unknown keys and values are refused, and the nearest known one is named. Configurations of distdiff: "
        f"{', '.join(f'`{name}`' for name in config.shipped())}. `distdiff config show` prints this page."
    ]
    for section in dict.fromkeys(key.name.partition(".")[0] for key in keys):
        inside = [key for key in keys if key.name.startswith(f"{section}.")]
        parts.append(f"## {section}")
        if inside[0].kind:
            others = [key for key in describe.of_other_kinds({}) if key.name.startswith(f"{section}.")]
            parts.append(
                f"Options depend on `{section}.kind` (default `{inside[0].default}`); a class of your own is "
                "`mypackage.module:Class`, with `--trust mypackage`."
            )
            usual = inside[0].default
            for kind in sorted({key.kind for key in others}, key=lambda kind: (kind != usual, kind)):
                first, *options = [key for key in others if key.kind == kind]
                parts.append(f"### {section} {kind}\n\n{_cell(first.help)}.")
                parts += [_keys(options)] if options else []
        else:
            parts.append(_keys(inside))
    return "\n\n".join(parts) + "\n"


def _keys(keys: list[describe.Key]) -> str:
    rows = [
        (
            f"`{key.name}`",
            _cell(key.type),
            "(required)" if key.default is ... else f"`{key.default!r}`",
            _cell(key.help),
        )
        for key in keys
    ]
    return table(("key", "type", "default", "meaning"), rows)


# -- words ---------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines)


def _cell(text: str) -> str:
    """One line of markdown from a docstring's words."""
    text = re.sub(r":\w+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"docs/(M\w+\.md) (\d[\d.]*\d|\d+)", r"[maths \2](../\1)", text)
    text = re.sub(r"(?<![\w`-])(--\w[\w-]*)(?!`)", r"`\1`", text) if "`" not in text else text
    return re.sub(r"(?<![`$\w])\$(?=\w)", r"\\$", " ".join(text.split())).replace("<", "&lt;")
